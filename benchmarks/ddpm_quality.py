"""What t2v_ddpm.py and lucidrains' video-diffusion-pytorch learn in equal CPU time: "asked = made" on the
moving shapes of the demo, 8 frames of 16x16.

    python benchmarks/ddpm_quality.py --minutes 2 4 8
    python benchmarks/ddpm_quality.py --samplers runs/t2v_ddpm_demo    # quality against steps

t2v_ddpm.py: --demo as it is, with as many steps as the minutes hold. The peer: its Unet3D (dim 64, 12.6 M
parameters) and GaussianDiffusion as its README has them, with its Trainer's settings (32 clips a step, 2
steps an update, Adam 1e-4; its EMA begins at update 2000, which is not reached), trained on the same clips
and the same text; its Trainer itself takes no text. Its own sampler takes 1000 steps, hours on a CPU: its
model is sampled by ours, 20 steps of DDIM on its schedule, which is the cosine schedule too, and without
guidance, as its README trains and samples. --batch B also tries it with smaller batches, an update each.
`pip install --no-deps video-diffusion-pytorch einops-exts rotary-embedding-torch`
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ddpm_step import Lucidrains

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import t2v_ddpm as t2v
from demos import shapes

ASKED = shapes.held_out_captions(shapes.DDPM_SHAPES)


def table_row(name: str, minutes: float, steps: int, right: dict[str, float]) -> None:
    attributes = " | ".join(f"{right[key]:.2f}" for key in ("shape", "colour", "move", "speed", "size"))
    print(f"| {name} | {minutes:g} | {steps} | {attributes} | {right['all_five']:.2f} |", flush=True)


def ours(minutes: list[float], folder: Path) -> None:
    def run(steps: int) -> tuple[dict, float]:
        """-> (results.json, CPU seconds a step)"""
        target = folder / str(steps)
        flags = ["--demo", "--steps", steps, "--output_dir", target, "--save_every", 10**6]
        flags += ["--eval_every", 10**6, "--cache_dir", folder / "cache"]
        command = [sys.executable, str(ROOT / "t2v_ddpm.py"), *map(str, flags)]
        subprocess.run(command, check=True, capture_output=True)
        results = json.loads((target / "results.json").read_text())
        return results, t2v.DEMO["batch_size"] / results["samples_per_s"]

    seconds = run(100)[1]  # one thread: CPU time is the wall's on an idle machine
    for count in minutes:
        steps = int(60 * count / seconds)
        results, _ = run(steps)
        right = {key: value["as asked"] for key, value in results["tables"]["asked is made"].items()}
        table_row("t2v_ddpm.py --demo", count, steps, right)


class Sampled(torch.nn.Module):
    """The peer's network as t2v_ddpm.sample calls one"""

    config = {"channels": 3}

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, t, text, mask, drop):
        return self.net(x.transpose(1, 2), t, cond=text[:, 0]).transpose(1, 2)


def peer(minutes: list[float], batch: int, accum: int) -> None:
    from video_diffusion_pytorch import GaussianDiffusion

    cfg = t2v.with_encoders(t2v.Config(**t2v.DEMO))
    cfg = t2v.dataclasses.replace(cfg, prediction="noise", shift=1.0, guidance=1.0, batch_size=11)
    data = t2v.load_data(cfg, torch.device("cpu"))
    states = data.train.text.states.astype(np.float32)
    table = torch.from_numpy((states - states.mean(0)) / states.std())
    torch.manual_seed(0)
    net = Lucidrains(16, table.shape[1]).net
    diffusion = GaussianDiffusion(net, image_size=16, num_frames=8, timesteps=1000, loss_type="l1")
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4)
    step, spent = 0, 0.0
    rng, rows = np.random.default_rng(0), [numbers[0] for numbers in data.train.rows]
    text = t2v.Text(table.numpy(), data.train.text.ends)
    captions = {caption: row for (caption,), row in zip(data.held_out.captions, data.held_out.rows)}
    for count in sorted(minutes):
        while spent < 60 * count:
            start = time.process_time()
            for _ in range(accum):
                chosen = rng.choice(len(rows), batch)
                x = torch.from_numpy(np.stack([data.train.frames[i] for i in chosen])).permute(0, 4, 1, 2, 3)
                cond = table[[rows[i] for i in chosen]]
                (diffusion(x.float() / 255, cond=cond) / accum).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            spent += time.process_time() - start
        wanted = [captions[shapes.caption_of(a)][0] for a in ASKED]
        clips = t2v.sample_clips(Sampled(net).eval(), text, wanted, None, cfg)
        net.train()
        name = f"lucidrains, {batch} clips x {accum}"
        table_row(name, count, step, shapes.asked_is_made(clips, ASKED, shapes.DDPM_SHAPES))


def samplers(model: str) -> None:
    """Of a finished demo: each sampler with 5, 10, 20 and 50 looks at the model, of which a step of Heun's
    takes two"""
    kept, weights = t2v.trained_weights(model, "--samplers")
    captions = [shapes.caption_of(a) for a in ASKED]
    print("| sampler | spacing | 5 | 10 | 20 | 50 |\n|---|---|---|---|---|---|")
    for sampler, spacing in [(s, "cosine") for s in ("ddpm", "ddim", "dpm", "heun")] + [
        (s, "karras") for s in ("dpm", "heun")
    ]:
        scores = []
        for looks in (5, 10, 20, 50):
            own = {"sampler": sampler, "spacing": spacing, "sample_steps": looks}
            own |= {"sample_steps": -(-looks // 2)} if sampler == "heun" else {}
            clips = t2v.sample_model(captions, weights, t2v.Config(report_to="none", **(kept | own)))
            scores.append(shapes.asked_is_made(clips, ASKED, shapes.DDPM_SHAPES)["all_five"])
        cells = " | ".join(f"{score:.2f}" for score in scores)
        print(f"| {sampler} | {spacing} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="of the peer, besides its own")
    parser.add_argument("--samplers", default="", help="a run folder of the demo: its samplers instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.samplers:
        samplers(args.samplers)
        return
    print("| | CPU minutes | updates | shape | colour | move | speed | size | all five |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        ours(args.minutes, Path(folder))
    for batch, accum in [(32, 2), *((size, 1) for size in args.batch)]:
        peer(args.minutes, batch, accum)


if __name__ == "__main__":
    main()
