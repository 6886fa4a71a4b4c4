"""Cost of one training step of t2v_ddpm.py's UNet3DCond against other text-to-video U-Nets, each at its own
layout.

    python benchmarks/ddpm_step.py                       # CPU, one thread: 2 clips of 8 frames of 32x32
    python benchmarks/ddpm_step.py --size 64 --batch 8   # a GPU is used when there is one

Forward, backward and AdamW, on the same batch, fp32 on a CPU and bf16 autocast on a GPU. Rounds alternate
between UNet3DCond and the peer, so that a noisy machine hurts both; the ratio is of the medians. Peers:
diffusers' UNet3DConditionModel and, where `pip install --no-deps video-diffusion-pytorch einops-exts
rotary-embedding-torch` was done, lucidrains' Unet3D, both with widths 64-128-256.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from t2v_ddpm import UNet3DCond


class Diffusers(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        from diffusers import UNet3DConditionModel

        self.net = UNet3DConditionModel(
            sample_size=size, in_channels=3, out_channels=3, block_out_channels=(64, 128, 256),
            layers_per_block=2,
            down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
            cross_attention_dim=512, up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
            norm_num_groups=8, attention_head_dim=8,
        )  # fmt: skip

    def forward(self, x, t, text):
        return self.net(x.transpose(1, 2), t, text[:, None]).sample.transpose(1, 2)


class Lucidrains(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        for name in (
            "torchvision",
            "torchvision.transforms",
            "torchvision.utils",
        ):  # imported for its Trainer, not used here
            sys.modules.setdefault(name, MagicMock())
        from video_diffusion_pytorch import Unet3D

        self.net = Unet3D(dim=64, cond_dim=512, dim_mults=(1, 2, 4))

    def forward(self, x, t, text):
        return self.net(x.transpose(1, 2), t, cond=text).transpose(1, 2)


def stepper(model: nn.Module, batch: tuple, device: torch.device):
    """-> seconds of one training step, on the device's own clock"""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x, t, text, noise = batch

    def step() -> float:
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        start = clock()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = (model(x, t, text) - noise).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    step()  # warm-up
    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"batch": 2, "frames": 8, "size": 32, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(args.batch, args.frames, 3, args.size, args.size, device=device)
    batch = (
        x,
        torch.randint(0, 1000, (args.batch,), device=device),
        torch.randn(args.batch, 512, device=device),
        torch.randn_like(x),
    )
    ours = UNet3DCond()
    our_step = stepper(ours, batch, device)
    print(
        f"batch {args.batch}, {args.frames} frames of {args.size}x{args.size}, {device}, torch "
        f"{torch.__version__}\n"
    )
    print(
        "| model | M parameters | ms per step | UNet3DCond ms | UNet3DCond is faster by "
        "|\n|---|---|---|---|---|"
    )
    for name, peer in (("diffusers UNet3DConditionModel", Diffusers), ("lucidrains Unet3D", Lucidrains)):
        try:
            model = peer(args.size)
        except ModuleNotFoundError as error:
            print(f"| {name} | not installed ({error.name}) | | | |")
            continue
        their_step = stepper(model, batch, device)
        rounds = [(our_step(), their_step()) for _ in range(args.rounds)]
        mine, theirs = (statistics.median(column) for column in zip(*rounds))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"| {name} | {millions:.1f} | {1000 * theirs:.0f} | {1000 * mine:.0f} | {theirs / mine:.2f} |")
    print(f"\nUNet3DCond has {sum(p.numel() for p in ours.parameters()) / 1e6:.1f} M parameters.")


if __name__ == "__main__":
    main()
