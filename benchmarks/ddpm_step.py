"""Cost of one training step of t2v_ddpm.py's UNet3DCond against other text-to-video U-Nets, each as it is
published, with the work that each does.

    python benchmarks/ddpm_step.py                       # CPU, one thread: 2 clips of 8 frames of 32x32
    python benchmarks/ddpm_step.py --size 64 --batch 8   # a GPU is used when there is one

Forward, backward and AdamW, on the same batch, fp32 on a CPU and bf16 autocast on a GPU. Rounds alternate
between UNet3DCond and the peer, so that a noisy machine hurts both; the ratio is of the medians. GFLOP are
those of matrices and convolutions in forward and backward, as torch counts them: at equal work the ratio is
that of GFLOP a second. Peers: diffusers' UNet3DConditionModel and, where `pip install --no-deps
video-diffusion-pytorch einops-exts rotary-embedding-torch` was done, lucidrains' Unet3D, both with widths
64-128-256; and UNet3DCond on single pixels (--patch 1), whose layers are as large as theirs.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from clock import CUDA, DEVICE, device_name, seconds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import mend_torchvision
from t2v_ddpm import UNet3DCond

mend_torchvision()  # before the peers import it


class Ours(nn.Module):
    def __init__(self, size: int, patch: int = 2) -> None:
        super().__init__()
        self.net = UNet3DCond(patch=patch)

    def forward(self, x, t, text):
        return self.net(x, t, text[:, None], torch.ones(len(x), 1, dtype=torch.bool, device=x.device))


class Pixels(Ours):
    def __init__(self, size: int) -> None:
        super().__init__(size, patch=1)


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
    def __init__(self, size: int, cond_dim: int = 512) -> None:
        super().__init__()
        from video_diffusion_pytorch import Unet3D

        self.net = Unet3D(dim=64, cond_dim=cond_dim, dim_mults=(1, 2, 4))

    def forward(self, x, t, text):
        return self.net(x.transpose(1, 2), t, cond=text).transpose(1, 2)


PEERS = {
    "diffusers UNet3DConditionModel": Diffusers,
    "lucidrains Unet3D": Lucidrains,
    "UNet3DCond, patch 1": Pixels,
}


def stepper(model: nn.Module, batch: tuple):
    """-> (seconds of one training step, on the device's own clock; GFLOP of it)"""
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x, t, text, noise = batch

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            loss = (model(x, t, text) - noise).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()  # warm-up too
    return lambda: seconds(step), counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"batch": 2, "frames": 8, "size": 32, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(args.batch, args.frames, 3, args.size, args.size, device=DEVICE)
    timesteps = torch.randint(0, 1000, (args.batch,), device=DEVICE)
    batch = x, timesteps, torch.randn(args.batch, 512, device=DEVICE), torch.randn_like(x)
    ours = Ours(args.size)
    our_step, our_work = stepper(ours, batch)
    size = f"{args.frames} frames of {args.size}x{args.size}"
    print(f"batch {args.batch}, {size}, {device_name(DEVICE)}, torch {torch.__version__}")
    parameters = sum(p.numel() for p in ours.parameters()) / 1e6
    print(f"UNet3DCond: {parameters:.1f} M parameters, {our_work:.0f} GFLOP a step\n")
    print("| peer | M parameters | GFLOP | ms per step | UNet3DCond ms | as published | at equal work |")
    print("|---|---|---|---|---|---|---|")
    for name, peer in PEERS.items():
        try:
            model = peer(args.size)
        except ModuleNotFoundError as error:
            print(f"| {name} | not installed ({error.name}) | | | | | |")
            continue
        their_step, their_work = stepper(model, batch)
        rounds = [(our_step(), their_step()) for _ in range(args.rounds)]
        mine, theirs = (statistics.median(column) for column in zip(*rounds))
        millions, ratio = sum(p.numel() for p in model.parameters()) / 1e6, theirs / mine
        times = f"{1000 * theirs:.0f} | {1000 * mine:.0f} | {ratio:.2f} | {ratio * our_work / their_work:.2f}"
        print(f"| {name} | {millions:.1f} | {their_work:.0f} | {times} |")


if __name__ == "__main__":
    main()
