# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "av==18.1.0", "datasets==5.2.0", "deepspeed==0.19.8", "einops==0.8.2", "huggingface_hub==2.4.0",
#   "matplotlib==3.11.2", "numpy==2.4.6", "opencv-python-headless==5.0.0.93", "pillow==13.0.0",
#   "requests==2.34.2", "safetensors==0.8.0", "torch>=2.6", "tqdm==4.70.1", "transformers==5.23.0",
#   "tyro==1.0.17",
# ]
# ///
"""Text to video by diffusion on pixels: a 3-D U-Net with FiLM on CLIP text, cosine DDPM, DDIM sampling.

    python t2v_ddpm.py --demo                   # minutes on 2 CPU cores: moving shapes, scored by the samples
    MANIFEST=clips.jsonl python t2v_ddpm.py     # one GPU (or a CPU): the debugging path
    MANIFEST=clips.jsonl ./run.sh t2v_ddpm.py 4 # four GPUs, logged, pushed to the Hub at the end
    python t2v_ddpm.py --prompt "a dog runs"    # sample the finished model: mp4, gif and png

MANIFEST is a table of videos and captions or a folder, in any of the forms that README.md lists; --dataset
takes an id of the Hub. Without either the model trains, at its real size, on generated clips. The variables
MANIFEST, OUTDIR, STEPS, BS, FRAMES, SIZE and LR stand for the flags --manifest, --output_dir, --steps,
--batch_size, --frames, --size and --lr; a flag wins.

Writes the run folder described in README.md, with ckpt_000200.pt = {step, model, ema} and
samples/preview_step000200.png at every --save_every. The same command again goes on from the newest whole
checkpoint.

Measured: --demo, 3 minutes on 2 CPU cores: all five attributes right in 1.00 of 88 samples for captions never
seen, 0.00 with the captions shuffled. On a GPU: not yet measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

# isort: off
from common import (
    GB, Free, Layout, Lower, Run, asked_to_stop, check_settings, copy_code, decode_rows, demo_module,
    digest_of, epoch_order, fingerprint, finish_run, full_weights, gathered, log, memory_layouts, numbered,
    offline, on_rank0, open_engine, open_run, out_of_memory, pick_dtype, rank, read_data, read_flags, refuse,
    row_lines, run, save_array, save_run, saved_bytes, seed_of, show_plan, split_clips, start_run, steps_line,
    stop_if_asked, training_steps, with_steps, world_size, write_grid, write_json, write_samples, write_whole,
)  # fmt: skip

TIMESTEPS = 1000  # of the diffusion, as DDPM has
GENERATED = "generated clips of moving shapes"  # what is trained on without --manifest and --dataset
STAND_IN = "stand-in"  # for CLIP: see stand_in_text
WARMUP = 100  # steps, when --warmup_steps is not given
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on clips made on the spot: minutes on 2 CPU cores, no network
    check: Free[bool] = False  # all checks and the plan, no training
    output_dir: Free[Path] = Path("runs/t2v_ddpm")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    # JSON, JSON lines, CSV, TSV or parquet of videos and captions, or a folder; default: generated clips
    manifest: Free[Path | None] = None
    dataset: Free[str] = ""  # of the Hub, ID[:config][:split], or a folder
    videos: Free[Path | None] = None  # folder of the videos; default: the manifest's
    frames: int = 8  # per clip, spread evenly over the video
    size: int = 64  # height and width, pixels
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Free[Path] = Path("cache")  # decoded frames, encoded captions, downloads
    streaming: Free[bool] = False  # remove what was downloaded once it is decoded: for what no disk holds
    num_workers: Free[int] = 0  # threads that decode; 0: one for each core that is this rank's

    # model

    base: int = 64  # channels of the first level; the levels have 1, 2 and 4 times as many
    levels: int = 3  # of the U-Net, each half as high and wide
    blocks: int = 2  # residual blocks per level
    patch: int = 1  # pixels of a patch x patch square enter as channels
    text_encoder: str = "openai/clip-vit-base-patch32"  # CLIP, a Hub id or a folder
    caption_dropout: float = 0.1  # share of captions left out, for guidance

    # diffusion

    prediction: Literal["noise", "v"] = "noise"  # what the model predicts
    # divides alpha_bar / (1 - alpha_bar) by its square: above 1, more steps see mostly noise
    shift: float = 1.0
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"  # of the training loss

    # optimisation

    steps: Free[int] = 1000  # optimizer steps in all, over all resumes
    batch_size: Lower[int] = 2  # clips per GPU per micro-step; lower this first when memory runs out
    accum: Lower[int] = 1  # micro-steps per optimizer step
    lr: Free[float] = 1e-4
    warmup_steps: Free[int | None] = None  # default: 100, but at most a tenth of the steps
    lr_decay: bool = False  # to 0 at the last step, along a cosine
    weight_decay: float = 0.0
    beta2: float = 0.999  # of AdamW
    clip: Free[float] = 1.0  # gradient norm limit
    ema: float = 0.999  # decay of the averaged weights, which are sampled and pushed
    # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    # JSON file, or auto: what fits
    deepspeed: Free[Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])]] = "auto"

    # sampling

    prompt: Free[str] = ""  # sample this caption from --model and stop
    model: Free[str] = ""  # for --prompt, a folder or a Hub id; default: <output_dir>/model
    sampler: Free[Literal["ddim", "ddpm"]] = "ddim"  # ddpm: all 1000 steps, ancestral
    sample_steps: Free[int] = 50  # of ddim
    guidance: Free[float] = 3.0  # 1 = none

    # watching and saving

    log_every: Free[int] = 20
    eval_every: Free[int] = 1000
    save_every: Free[int] = 200
    keep: Free[int] = 3  # newest checkpoints (and ckpt_*.pt) kept
    resume: Free[bool] = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Free[Literal["none", "tensorboard", "wandb"]] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: Free[bool] = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: Free[str] = "t2v_ddpm"
    public: Free[bool] = False  # visibility of a new repository

    def __post_init__(self) -> None:
        if self.demo and self.manifest:
            raise ValueError(
                f"--demo makes its own clips: leave out --manifest {self.manifest} (or unset MANIFEST)"
            )
        check_settings(
            self,
            at_least_1="frames base levels blocks patch steps batch_size accum sample_steps log_every "
            "eval_every save_every keep",
            at_least_0="warmup_steps num_workers",
            above_0="lr shift clip guidance",
            shares="caption_dropout ema max_bad",
        )
        if self.size < 1 or self.size % self.multiple:
            raise ValueError(
                f"--size {self.size} must be a multiple of {self.multiple} (--patch {self.patch} x 2 for "
                f"each of {self.levels - 1} downsamplings): take "
                f"{max(1, round(self.size / self.multiple)) * self.multiple}"
            )
        if self.base % 8:
            raise ValueError(f"--base {self.base} must be a multiple of 8, the groups of the normalisation")
        if self.sample_steps > TIMESTEPS:
            raise ValueError(f"--sample_steps {self.sample_steps}: at most {TIMESTEPS}")

    @property
    def multiple(self) -> int:
        return self.patch * 2 ** (self.levels - 1)


# The demo is a preset: the same code with other numbers. Recipe and scores: README.md and
# benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/t2v_ddpm_demo"), size=16, base=32, levels=2, blocks=1, patch=2,
    text_encoder=STAND_IN, report_to="none", prediction="v", shift=3.0, timestep_sampling="logit_normal",
    steps=2000, batch_size=8, lr=1.5e-3, warmup_steps=50, lr_decay=True, beta2=0.99, ema=0.98,
    sample_steps=20, log_every=100, eval_every=500, save_every=500,
)  # fmt: skip
VARIABLES = {
    "MANIFEST": "--manifest", "OUTDIR": "--output_dir", "STEPS": "--steps", "BS": "--batch_size",
    "FRAMES": "--frames", "SIZE": "--size", "LR": "--lr",
}  # fmt: skip

# ---------------------------------------------------------------------------
# Data: videos
# ---------------------------------------------------------------------------


def load_videos(cfg: Config) -> tuple[list[Path], list[tuple[str, ...]], set[int], list[dict]]:
    """Every rank: (cached clips, their captions, which are held out, bad samples). Exit 2 when too many
    samples are bad, or all."""
    rows, bad = on_rank0(read_data)(cfg, "caption")
    rows, files, undecoded = decode_rows(rows, cfg.frames, cfg.size, cfg)
    share = 0.05 if len(rows) >= 20 else 0  # none of a handful
    parts = split_clips([row.video for row in rows], [row.split for row in rows], share, cfg.seed)
    return files, [tuple(row.texts) for row in rows], set(parts[1]), bad + undecoded


# ---------------------------------------------------------------------------
# Data: text
# ---------------------------------------------------------------------------


@cache
def word_direction(word: str, width: int) -> np.ndarray:
    """Where no text encoder is at hand: for each word a fixed random direction, normal numbers (width,)"""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(width)


def stand_in_text(captions: list[str], width: int = 512) -> Tensor:
    """Instead of CLIP where there is no network: each word a fixed random direction, averaged. It knows
    words, not meaning. -> (N, width)"""

    def direction(word: str) -> np.ndarray:
        vector = word_direction(word, width)
        return vector / np.linalg.norm(vector) * math.sqrt(width)

    means = [np.mean([direction(word) for word in caption.lower().split()], axis=0) for caption in captions]
    return torch.tensor(np.stack(means), dtype=torch.float32)


def clip_text(captions: list[str], source: str, device: torch.device) -> Tensor:
    """Last hidden states of a frozen CLIP text encoder, averaged over the real tokens. -> (N, D), D = 512 for
    ViT-B/32.

    Raises OSError when `source`, a folder or a Hub id, has no such model or cannot be reached.
    """
    from transformers import AutoTokenizer, CLIPTextModel

    local = offline(source)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    encoder = CLIPTextModel.from_pretrained(source, local_files_only=local).to(device).eval()
    length, pooled = encoder.config.max_position_embeddings, []
    cut = sum(len(ids) > length for ids in tokenizer(captions).input_ids)
    if cut:
        log.warning(
            f"warning: {cut} of {len(captions)} captions are longer than {length} tokens; their ends are not "
            "read"
        )
    with torch.no_grad():
        for start in tqdm(range(0, len(captions), 256), "encode captions", disable=None):
            tokens = tokenizer(
                captions[start : start + 256],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            states = encoder(**tokens.to(device)).last_hidden_state.float()  # (N, T, D)
            mask = tokens.attention_mask[..., None]  # (N, T, 1)
            pooled.append(((states * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(pooled)


@on_rank0
def encode_text(captions: list[str], cfg: Config, device: torch.device) -> tuple[Tensor, str]:
    """Each caption encoded once and cached on disk; the encoder is gone from the GPU afterwards.
    -> ((N, D), the encoder that was used)"""
    if cfg.text_encoder == STAND_IN:
        return stand_in_text(captions), STAND_IN
    weights = Path(cfg.text_encoder) / "model.safetensors"
    key = [cfg.text_encoder, weights.stat().st_mtime_ns if weights.exists() else 0, captions]
    cached = cfg.cache_dir / "text" / f"{digest_of(json.dumps(key))}.npy"
    if not cached.exists():
        try:
            table = clip_text(captions, cfg.text_encoder, device).numpy()
        except OSError as error:
            reason = str(error).splitlines()[0]
            if cfg.manifest or cfg.dataset:
                refuse(
                    f"--text_encoder {cfg.text_encoder}: {reason}\ndownload it where there is network, and "
                    "give its folder"
                )
            log.warning(
                f"warning: {cfg.text_encoder} is out of reach ({reason}); a stand-in encodes the captions: "
                "it knows words, not meaning"
            )
            return stand_in_text(captions), STAND_IN
        save_array(cached, table)
    return torch.from_numpy(np.load(cached)), cfg.text_encoder


@dataclass(frozen=True)
class Clips:
    """Clip i is frames[i], uint8 (F, H, W, 3) or a .npy file of it; its captions are the rows[i] of `text`
    (captions, D)."""

    frames: list[np.ndarray | Path]
    captions: list[tuple[str, ...]]
    rows: list[list[int]]
    text: Tensor

    def batch(self, indices: list[int], draws: list[int]) -> tuple[Tensor, Tensor]:
        """-> uint8 (B, F, H, W, 3), text (B, D). A clip of n captions takes number draw % n."""
        frames = [np.load(f) if isinstance(f := self.frames[i], Path) else f for i in indices]
        text = [self.rows[i][draw % len(self.rows[i])] for i, draw in zip(indices, draws)]
        return torch.from_numpy(np.stack(frames)), self.text[text]

    def part(self, keep: list[int]) -> Clips:
        frames, captions, rows = (
            [values[i] for i in keep] for values in (self.frames, self.captions, self.rows)
        )
        return Clips(frames, captions, rows, self.text)

    def contents(self) -> list:
        """What makes these clips: captions, and frames or the name of their file, which says which video,
        size and reader"""
        frames = [f.name if isinstance(f, Path) else zlib.crc32(f) for f in self.frames]
        return list(zip(self.captions, frames))

    def different_captions(self, count: int) -> tuple[list[str], Tensor]:
        """Up to `count` different captions, and their encodings (count, D)"""
        rows = {several[0]: numbers[0] for several, numbers in zip(self.captions, self.rows)}
        chosen = list(rows)[:: max(1, len(rows) // count)][:count]
        return chosen, self.text[[rows[caption] for caption in chosen]]


@dataclass(frozen=True)
class Data:
    train: Clips
    held_out: Clips  # to evaluate on; the same as train when there are fewer than 20 videos
    encoder: str  # that made the text table: CLIP or the stand-in
    bad: list[dict]  # samples that were left out, and why


def load_data(cfg: Config, device: torch.device) -> Data:
    """Every rank. Exit 2 when there is nothing to train on."""
    if cfg.manifest or cfg.dataset:
        frames, captions, held_out, bad = load_videos(cfg)
    else:
        shapes, bad = demo_module("shapes"), []
        frames, captions, held_out = shapes.generated_clips(cfg.seed, cfg.frames, cfg.size)
    unique = dict.fromkeys(itertools.chain.from_iterable(captions))
    text, encoder = encode_text(list(unique), cfg, device)
    row_of = {caption: row for row, caption in enumerate(unique)}
    clips = Clips(frames, captions, [[row_of[c] for c in several] for several in captions], text)
    train = clips.part([i for i in range(len(frames)) if i not in held_out])
    return Data(train, clips.part(sorted(held_out)) if held_out else train, encoder, bad)


def get_batch(clips: Clips, cfg: Config, micro_step: int) -> tuple[Tensor, Tensor]:
    """This rank's clips at a micro-step: a pure function of (seed, micro-step, rank), so that a resumed run
    repeats the order."""
    first = (micro_step * world_size() + rank()) * cfg.batch_size
    places = [divmod(place, len(clips.frames)) for place in range(first, first + cfg.batch_size)]
    return clips.batch(
        [int(epoch_order(len(clips.frames), cfg.seed, e)[i]) for e, i in places], [e for e, _ in places]
    )


# ---------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------


def sinusoids(x: Tensor, width: int) -> Tensor:
    """Positions or timesteps (N,) -> (N, width), as in Attention Is All You Need, section 3.5."""
    angles = x.float()[:, None] * torch.exp(
        torch.arange(width // 2, device=x.device) * (-math.log(10_000) / (width // 2))
    )
    return torch.cat([angles.cos(), angles.sin()], -1)


def places(clips: int, sizes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Frame, row and column of each pixel, evenly from -sqrt(3) to sqrt(3) (unit variance), as in CoordConv
    (Liu et al. 2018): without them the model learns late that things move. sizes = (F, H, W) -> (B*F, 3, H,
    W)"""
    axes = [
        torch.linspace(-1, 1, n, device=device) * math.sqrt(3) if n > 1 else torch.zeros(n, device=device)
        for n in sizes
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), 1).repeat(clips, 1, 1, 1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions on every frame; FiLM (Perez et al. 2018) by time and text between them."""

    def __init__(self, c_in: int, c_out: int, c_film: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_film, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, film: Tensor, frames: int) -> Tensor:
        """x (B*F, C, H, W), film (B*F, D) -> (B*F, C', H, W)"""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(film)[..., None, None].chunk(2, 1)  # (B*F, C', 1, 1) each
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Self-attention along time (each pixel over the frames) or over space (each frame over its pixels)."""

    def __init__(self, c: int, axis: Literal["time", "space"]) -> None:
        super().__init__()
        self.axis, self.heads = axis, math.gcd(c, max(1, c // 32))  # about 32 wide each
        self.norm, self.qkv, self.out = nn.GroupNorm(8, c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)  # starts as the identity
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, film: Tensor, frames: int) -> Tensor:
        """x (B*F, C, H, W) -> the same shape"""
        h, w = x.shape[-2:]
        if self.axis == "time":
            u = rearrange(self.norm(x), "(b f) c h w -> (b h w) f c", f=frames)
            u = u + sinusoids(torch.arange(frames, device=x.device), u.shape[-1]).to(u.dtype)
        else:
            u = rearrange(self.norm(x), "n c h w -> n (h w) c")
        q, k, v = rearrange(
            self.qkv(u), "n t (three heads d) -> three n heads t d", three=3, heads=self.heads
        )
        u = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n heads t d -> n t (heads d)"))
        if self.axis == "time":
            return x + rearrange(u, "(b h w) f c -> (b f) c h w", h=h, w=w)
        return x + rearrange(u, "n (h w) c -> n c h w", h=h)


class Resize(nn.Module):
    """Half or twice the height and width, by a convolution."""

    def __init__(self, c: int, up: bool) -> None:
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, padding=1, stride=1 if up else 2)

    def forward(self, x: Tensor, film: Tensor, frames: int) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class UNet3DCond(nn.Module):
    """3-D U-Net on pixels: frames folded into the batch for 2-D convolutions in channels_last, attention
    along time between them; cheaper per step than 3-D or (2+1)-D convolutions (benchmarks/RESULTS.md)."""

    def __init__(
        self, base: int = 64, levels: int = 3, blocks: int = 2, patch: int = 1, text_dim: int = 512
    ) -> None:
        super().__init__()
        self.config = {"base": base, "levels": levels, "blocks": blocks, "patch": patch, "text_dim": text_dim}
        self.patch, self.base, width = patch, base, 4 * base
        self.time = nn.Sequential(nn.Linear(base, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("text_mean", torch.zeros(text_dim))  # see standardise
        self.register_buffer("text_std", torch.ones(()))
        self.text = nn.Linear(text_dim, width)
        self.no_text = nn.Parameter(torch.zeros(width))  # stands for a caption that was left out

        def stage(c_in: int, c_out: int, level: int) -> nn.ModuleList:
            return nn.ModuleList(
                [ResBlock(c_in, c_out, width), *([Attention(c_out, "time")] if level else [])]
            )

        channels = [base * 2**level for level in range(levels)]
        self.enter = nn.Conv2d(3 * patch**2 + 3, base, 3, padding=1)  # the pixels and where they are
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [base], base
        for level, c_out in enumerate(channels):
            for _ in range(blocks):
                self.down.append(stage(c, c_out, level))
                skips.append(c := c_out)
            if level < levels - 1:
                self.down.append(nn.ModuleList([Resize(c, up=False)]))
                skips.append(c)
        around = [Attention(c, "space"), Attention(c, "time")]
        self.middle = nn.ModuleList([ResBlock(c, c, width), *around, ResBlock(c, c, width)])
        for level, c_out in reversed(list(enumerate(channels))):
            for block in range(blocks + 1):
                parts = stage(c + skips.pop(), c_out, level)
                if level > 0 and block == blocks:
                    parts.append(Resize(c_out, up=True))
                self.up.append(parts)
                c = c_out
        self.leave = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, 3 * patch**2, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def standardise(self, text: Tensor) -> None:
        """Take mean and spread of the training captions' encodings (N, D): what all captions share says
        nothing."""
        spread = text.var(0, correction=0).mean().sqrt()
        self.text_mean.copy_(text.mean(0))
        self.text_std.copy_(spread if spread > 1e-6 else torch.ones(()))  # one caption alone has none

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """x (B, F, 3, H, W), timesteps (B,) in [0, 1000), text (B, D); drop (B,) bool leaves captions out. ->
        x's shape"""
        frames, dtype = x.shape[1], self.enter.weight.dtype
        text = self.text(((text - self.text_mean) / self.text_std).to(dtype))  # (B, W)
        if drop is not None:
            text = torch.where(drop[:, None], self.no_text, text)
        film = F.silu(self.time(sinusoids(timesteps, self.base).to(dtype)) + text)
        film = film.repeat_interleave(frames, 0)  # (B*F, W)
        h = F.pixel_unshuffle(x.flatten(0, 1).to(dtype), self.patch)  # (B*F, 3pp, H/p, W/p)
        h = torch.cat([h, places(len(x), (frames, *h.shape[-2:]), h.device).to(dtype)], 1)
        h = self.enter(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for parts in self.down:
            for part in parts:
                h = part(h, film, frames)
            skips.append(h)
        for part in self.middle:
            h = part(h, film, frames)
        for parts in self.up:
            h = torch.cat([h, skips.pop()], 1)
            for part in parts:
                h = part(h, film, frames)
        h = F.pixel_shuffle(self.leave(h), self.patch)
        return h.unflatten(0, (-1, frames)).to(x.dtype)


# ---------------------------------------------------------------------------
# Diffusion
# ---------------------------------------------------------------------------


def cosine_alpha_bar(shift: float = 1.0) -> Tensor:
    """alpha_bar (1000,) float32 of the cosine schedule (Nichol and Dhariwal 2021, equation 17, betas at most
    0.999).

    `shift` divides the signal-to-noise ratio alpha_bar / (1 - alpha_bar) by its square: larger pictures and
    motion, seen only at high noise, want more of it (Hoogeboom et al. 2023, equation 5).
    """
    u = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)
    ratio = alpha_bar / (1 - alpha_bar) / shift**2
    return (ratio / (1 + ratio)).float()


def add_noise(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """q(x_t | x_0), Ho et al. 2020, equation 4; alpha_bar (B,)"""
    a = alpha_bar.view(-1, 1, 1, 1, 1)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def diffusion_target(x: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """What the model predicts: the noise, or v = sqrt(a) noise - sqrt(1 - a) x (Salimans and Ho 2022,
    appendix D)."""
    a = alpha_bar.view(-1, 1, 1, 1, 1)
    return noise if prediction == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x


def clean_and_noise(x: Tensor, output: Tensor, alpha_bar: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """The inverse: (x_0 clipped to [-1, 1], the noise that goes with it) from a noisy x and the model's
    output; alpha_bar ()"""
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    clean = (x - b * output) / a if prediction == "noise" else a * x - b * output
    clean = clean.clamp(-1, 1)
    return clean, (x - a * clean) / b


def diffusion_loss(
    model: nn.Module, frames: Tensor, text: Tensor, alpha_bar: Tensor, cfg: Config, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the prediction. frames uint8 (B, F, H, W, 3), text (B, D), alpha_bar (1000,)"""
    x = to_unit(frames)
    count, device = len(x), x.device
    if cfg.timestep_sampling == "uniform":
        t = torch.randint(TIMESTEPS, (count,), generator=generator, device=device)
    else:  # more often in the middle (Esser et al. 2024, section 3.1)
        t = (torch.randn(count, generator=generator, device=device).sigmoid() * TIMESTEPS).long()
    noise = torch.randn(x.shape, generator=generator, device=device)
    drop = torch.rand(count, generator=generator, device=device) < cfg.caption_dropout
    output = model(add_noise(x, noise, alpha_bar[t]), t, text, drop)
    return F.mse_loss(output, diffusion_target(x, noise, alpha_bar[t], cfg.prediction))


def to_unit(frames: Tensor) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, F, 3, H, W) in [-1, 1]"""
    return rearrange(frames, "b f h w c -> b f c h w").float() / 127.5 - 1


def to_pixels(clips: Tensor) -> np.ndarray:
    """float (B, F, 3, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3)"""
    return (
        rearrange(((clips.clamp(-1, 1) + 1) * 127.5).round(), "b f c h w -> b f h w c")
        .to(torch.uint8)
        .cpu()
        .numpy()
    )


# ---------------------------------------------------------------------------
# Sample and evaluate
# ---------------------------------------------------------------------------


@torch.no_grad()
def sample(model: UNet3DCond, text: Tensor, shape: tuple[int, ...], cfg: Config, seed: int = 0) -> Tensor:
    """On rank 0: clips (N, *shape) in [-1, 1] for text (N, D); shape = (F, 3, H, W).

    DDIM (Song et al. 2021, equation 12) with eta 0 over `sample_steps` evenly spaced timesteps that end at
    the noisiest, or with eta 1 over all 1000, which is DDPM's ancestral sampler. Guidance after Ho and
    Salimans 2022; x_0 is clipped in each step.
    """
    device = next(model.parameters()).device
    generator, text = torch.Generator(device).manual_seed(seed), text.to(device)
    alpha_bar = cosine_alpha_bar(cfg.shift).to(device)
    steps, eta = (TIMESTEPS, 1.0) if cfg.sampler == "ddpm" else (cfg.sample_steps, 0.0)
    timesteps = (TIMESTEPS - torch.arange(steps) * TIMESTEPS / steps).round().long() - 1  # 999 first
    x = torch.randn(len(text), *shape, generator=generator, device=device)
    both = torch.arange(2 * len(text), device=device) >= len(text)  # second half without captions
    for i, t in enumerate(timesteps.tolist()):
        stop_if_asked()
        if cfg.guidance == 1:
            output = model(x, torch.full((len(x),), t, device=device), text)
        else:
            output = model(
                x.repeat(2, 1, 1, 1, 1), torch.full((2 * len(x),), t, device=device), text.repeat(2, 1), both
            )
            with_text, without = output.chunk(2)
            output = without + cfg.guidance * (with_text - without)
        a = alpha_bar[t]
        a_next = alpha_bar[timesteps[i + 1]] if i + 1 < steps else torch.ones_like(a)
        clean, noise = clean_and_noise(x, output, a, cfg.prediction)
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x = a_next.sqrt() * clean + (1 - a_next - sigma**2).clamp(min=0).sqrt() * noise
        if eta and i + 1 < steps:
            x = x + sigma * torch.randn(x.shape, generator=generator, device=device)
    return x


def slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def held_out_loss(model: UNet3DCond, clips: Clips, cfg: Config) -> dict[str, float]:
    """Loss at 8 fixed timesteps with fixed noise, on up to 64 clips; the same with each clip's caption
    replaced by another's."""
    device, alpha_bar = next(model.parameters()).device, cosine_alpha_bar(cfg.shift)
    count = min(64, len(clips.frames))
    frames, text = clips.batch(list(range(count)), [0] * count)
    other = text[[(i + count // 2) % count for i in range(count)]]
    whole, generator = to_unit(frames), torch.Generator().manual_seed(cfg.seed)
    sums = {"loss": 0.0, "captions_swapped": 0.0, "power": 0.0}
    for t in range(TIMESTEPS // 16, TIMESTEPS, TIMESTEPS // 8):
        noise = torch.randn(whole.shape, generator=generator)
        for part in slices(count, cfg.batch_size):
            stop_if_asked()
            x, e = whole[part], noise[part]
            a = alpha_bar[t].expand(len(x))
            target = diffusion_target(x, e, a, cfg.prediction)
            noisy, when = add_noise(x, e, a).to(device), torch.full((len(x),), t, device=device)
            for name, captions in (("loss", text), ("captions_swapped", other)):
                with torch.no_grad():
                    output = model(noisy, when, captions[part].to(device)).cpu()
                sums[name] += F.mse_loss(output, target, reduction="sum").item()
            sums["power"] += target.square().sum().item()
    return {name: value / (8 * whole.numel()) for name, value in sums.items()}


def sample_pixels(model: UNet3DCond, text: Tensor, cfg: Config, seed: int) -> np.ndarray:
    """-> uint8 (N, F, H, W, 3), in batches that need no more memory than training"""
    shape, size = (cfg.frames, 3, cfg.size, cfg.size), max(8, cfg.batch_size)
    return np.concatenate(
        [to_pixels(sample(model, text[p], shape, cfg, seed + p.start)) for p in slices(len(text), size)]
    )


def evaluate(model: UNet3DCond, data: Data, cfg: Config) -> dict:
    """The score of results.json. Generated clips: asked = made on held-out captions, read back from the
    sampled pixels, next to the same clips held against each other's captions. Videos: 1 - loss / power of the
    target, on held-out videos."""
    held_out, losses = data.held_out, held_out_loss(model, data.held_out, cfg)
    loss_table = {"loss": {"with captions": losses["loss"], "captions swapped": losses["captions_swapped"]}}
    results = {"held_out_loss": losses["loss"], "controls": {}, "tables": {"held out": loss_table}}
    if cfg.manifest or cfg.dataset:
        which = (
            "the training videos (there are fewer than 20)" if held_out is data.train else "held-out videos"
        )
        explained = 1 - losses["loss"] / losses["power"]
        return results | {"score": explained, "score_is": f"share of the target explained, {which}"}
    shapes = demo_module("shapes")
    asked = shapes.held_out_captions(shapes.DDPM_SHAPES)
    asked = asked * max(1, 96 // len(asked))
    table = {caption: held_out.text[rows[0]] for (caption,), rows in zip(held_out.captions, held_out.rows)}
    text = torch.stack([table[shapes.caption_of(a)] for a in asked])
    clips = sample_pixels(model, text, cfg, cfg.seed)
    right, shuffled = shapes.score_and_control(clips, asked, shapes.DDPM_SHAPES)
    attributes = {name: {"as asked": right[name], "captions shuffled": shuffled[name]} for name in right}
    count = f"{len(asked)} clips of {len(table)} held-out captions"
    return results | {
        "score": right["all_five"],
        "score_is": f"asked = made for all five attributes, {count}",
        "controls": {"captions_shuffled": shuffled["all_five"]},
        "tables": {"asked is made": attributes} | results["tables"],
    }


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


def activation_bytes(model: UNet3DCond, cfg: Config) -> int:
    """What one micro-batch keeps for the backward pass, counted on the meta device: no memory, no
    arithmetic."""
    count = cfg.batch_size
    with torch.device("meta"):
        twin = UNet3DCond(**model.config).to(TORCH_DTYPES[cfg.dtype])
        clips = torch.empty(count, cfg.frames, 3, cfg.size, cfg.size)
        times, text = torch.empty(count), torch.empty(count, model.config["text_dim"])
        return saved_bytes(lambda: twin(clips, times, text), twin)


def memory_advice(model: UNet3DCond, cfg: Config) -> str:
    now = activation_bytes(model, cfg)
    less = [
        ("BS", "batch_size", cfg.batch_size // 2),
        ("FRAMES", "frames", cfg.frames // 2),
        ("SIZE", "size", cfg.size // 2 // cfg.multiple * cfg.multiple),
    ]
    lines = [
        f"activations of a micro-batch: {now / GB:.2f} GB at BS={cfg.batch_size} FRAMES={cfg.frames} "
        f"SIZE={cfg.size}"
    ]
    for name, field, value in less:
        if value >= 1:
            saved = now - activation_bytes(model, dataclasses.replace(cfg, **{field: value}))
            lines.append(f"  {name}={value} saves {saved / GB:.2f} GB")
    return "\n".join(lines)


def plan_of(cfg: Config, model: UNet3DCond, data: Data, device: torch.device) -> Layout:
    """Print what this run is going to do, and check that it fits. -> the layout of memory that is taken"""
    parameters = sum(p.numel() for p in model.parameters())
    layouts = memory_layouts(parameters, 0, {False: activation_bytes(model, cfg)}, cfg.dtype, world_size())
    stand_in = " for CLIP: it knows words, not meaning" if data.encoder == STAND_IN else ""
    lines = [
        (
            "data",
            f"{cfg.manifest or cfg.dataset or GENERATED}: {len(data.train.frames)} clips to train on, "
            f"{len(data.held_out.frames)} to evaluate, {len(data.bad)} left out as bad; "
            f"{cfg.frames} frames of {cfg.size}x{cfg.size}",
        ),
        ("text", f"{data.encoder}{stand_in}, {data.train.text.shape[1]} numbers a caption"),
        *row_lines(data.train.captions, " | ".join),
        (
            "model",
            f"UNet3DCond, base {cfg.base}, {parameters / 1e6:.2f} M parameters, all trained; predicts "
            f"{cfg.prediction}",
        ),
        steps_line(cfg, device, "clips"),
    ]
    disk = 28 * (cfg.keep + 2) * parameters  # 28: see save()
    return show_plan(cfg, device, lines, layouts, memory_advice(model, cfg), disk)


def update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    with torch.no_grad(), gathered(list(module.parameters())):
        names, weights = zip(*((name, p.float()) for name, p in module.named_parameters()))
        torch._foreach_lerp_([ema[name] for name in names], list(weights), 1 - decay)


def train(cfg: Config) -> None:
    from_flags, device = cfg, open_run(cfg)
    cfg = with_steps(dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype)), warmup=WARMUP)
    data = load_data(cfg, device)
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    model = UNet3DCond(cfg.base, cfg.levels, cfg.blocks, cfg.patch, data.train.text.shape[1])
    model.standardise(data.train.text[list(itertools.chain.from_iterable(data.train.rows))])
    layout = plan_of(cfg, model, data, device)
    if cfg.check:
        return
    facts = {
        "text_encoder": data.encoder,
        "data": fingerprint(data.train.contents() + data.held_out.contents()),
    }
    run = start_run(from_flags, cfg, __file__, layout, data.bad, "mean squared error", **facts)
    betas = (0.9, cfg.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True
    )
    engine = open_engine(run, model, optimizer)
    if run.checkpoint:
        ema = torch.load(run.checkpoint / "ema.pt", weights_only=True, map_location=device)
    else:
        ema = {name: weight.to(device) for name, weight in full_weights(engine.module, torch.float32).items()}
    with out_of_memory(partial(memory_advice, model, cfg)):
        train_steps(cfg, run, engine, ema, data)
    model = averaged(engine.module, ema)
    finish_run(
        run,
        export=partial(export, cfg, model, ema, data.encoder),
        evaluate=partial(final_results, cfg, model, data),
        card=partial(card_of, cfg, data),
    )


def train_steps(cfg: Config, run: Run, engine, ema: dict[str, Tensor], data: Data) -> None:
    device, alpha_bar = engine.device, cosine_alpha_bar(cfg.shift).to(engine.device)
    steps = training_steps(
        run,
        engine,
        save=partial(save, cfg, run, engine, ema, data),
        evaluate=partial(evaluate_at, cfg, engine.module, ema, data),
    )
    pool = ThreadPoolExecutor(1)  # reads the next batch while the GPU works
    ahead = pool.submit(get_batch, data.train, cfg, run.step * cfg.accum)
    for step, row in steps:
        noise = torch.Generator(device).manual_seed(seed_of(cfg.seed, step, rank()))
        row["loss"] = torch.zeros((), device=device)
        for micro in range(step * cfg.accum, (step + 1) * cfg.accum):
            frames, text = ahead.result()
            ahead = pool.submit(get_batch, data.train, cfg, micro + 1)
            loss = diffusion_loss(engine, frames.to(device), text.to(device), alpha_bar, cfg, noise)
            engine.backward(loss)
            engine.step()  # skips the update, on all ranks, when a gradient is not finite
            row["loss"] += loss.detach() / cfg.accum
        if engine.was_step_applied():
            update_ema(ema, engine.module, min(cfg.ema, (2 + step) / (11 + step)))


@on_rank0
def evaluate_at(
    cfg: Config, model: UNet3DCond, ema: dict[str, Tensor], data: Data, step: int
) -> dict[str, float]:
    """Evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    losses = held_out_loss(averaged(model, ema), data.held_out, cfg)
    swapped = losses["captions_swapped"]
    log.info(f"eval step {step:06d} | held-out loss {losses['loss']:.4f} | swapped {swapped:.4f}")
    return {f"held_out_{name}": value for name, value in losses.items()}


def save(cfg: Config, run: Run, engine, ema: dict[str, Tensor], data: Data, step: int) -> None:
    """Every rank: checkpoints/step_000200 to resume from, then ckpt_000200.pt and, without hurry, a preview.

    In fp32 28 bytes a parameter: weights, master weights, two moments, EMA; and weights and EMA once more.
    """

    def add_ema(aside: Path) -> None:
        if rank() == 0:
            torch.save(ema, aside / "ema.pt")

    save_run(run, engine, step, add_ema)
    weights = full_weights(engine.module, torch.float32)

    @on_rank0
    def save_weights() -> None:
        target = run.folder / f"ckpt_{step:06d}.pt"
        state = {"step": step, "model": weights, "ema": {name: weight.cpu() for name, weight in ema.items()}}
        write_whole(target, lambda aside: torch.save(state, aside))
        whole = [path for path in numbered(run.folder, "ckpt_", ".pt") if zipfile.is_zipfile(path)]
        for old in whole[: -cfg.keep]:
            old.unlink()
        log.info(f"saved {target}")
        if not asked_to_stop():
            captions, text = data.held_out.different_captions(4)
            pictures = sample_pixels(averaged(engine.module, ema), text, cfg, cfg.seed)
            write_grid(pictures, captions, run.folder / "samples" / f"preview_step{step:06d}.png")

    save_weights()


def averaged(model: UNet3DCond, ema: dict[str, Tensor]) -> UNet3DCond:
    """A plain fp32 copy of the model with the averaged weights, where these are, to sample from."""
    copy = UNet3DCond(**model.config)
    copy.load_state_dict(ema)
    return copy.to(next(iter(ema.values())).device).eval()


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


@on_rank0
def export(cfg: Config, model: UNet3DCond, ema: dict[str, Tensor], encoder: str, target: Path) -> None:
    from safetensors.torch import save_file

    target.mkdir(exist_ok=True)
    weights = {name: weight.cpu().contiguous() for name, weight in ema.items()}
    write_whole(target / "model.safetensors", lambda aside: save_file(weights, aside))
    kept = ("frames", "size", "prediction", "shift", "sampler", "sample_steps", "guidance")
    config = {"model": model.config, "text_encoder": encoder} | {name: getattr(cfg, name) for name in kept}
    write_json(target / "config.json", config)
    copy_code(target, __file__)


@on_rank0
def final_results(cfg: Config, model: UNet3DCond, data: Data) -> dict:
    """What results.json says of the finished model; and model/samples.png, .mp4 and .gif"""
    results = evaluate(model, data, cfg)
    captions, text = data.held_out.different_captions(6)
    pictures = sample_pixels(model, text, cfg, cfg.seed)
    write_samples(pictures, captions, cfg.output_dir / "model" / "samples")
    return results


def card_of(cfg: Config, data: Data, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    clips = Path(cfg.manifest or cfg.dataset or GENERATED).name
    caption = json.dumps(data.held_out.captions[0][0])
    return {
        "about": f"A text-to-video diffusion model on pixels, {cfg.frames} frames of {cfg.size}x{cfg.size}: "
        f"a 3-D U-Net with FiLM on the text features of `{data.encoder}`, trained from scratch on {clips} by "
        "`t2v_ddpm.py`, which lies in this repository.",
        "usage": "from common import write_video\nfrom t2v_ddpm import generate\n\n"
        f'frames = generate({caption}, folder)  # uint8 (F, H, W, 3)\nwrite_video(frames, "sample")',
        "more": "![samples](samples.png)",
        "data": clips,
        "library_name": "pytorch",
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "ddpm", "deepspeed"],
    }


def generate(prompt: str, model: str | Path, seed: int = 0, **sampling) -> np.ndarray:
    """One clip for a caption from a finished model, a folder or a Hub id: uint8 (F, H, W, 3).

    sampling: sampler, sample_steps, guidance as in Config; what the model was trained with by default. Raises
    OSError when the model cannot be found.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(str(model)))
    config = json.loads((folder / "config.json").read_text())
    cfg = Config(report_to="none", **{k: v for k, v in (config | sampling).items() if k != "model"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = UNet3DCond(**config["model"])
    net.load_state_dict(load_file(folder / "model.safetensors"))
    text = (
        stand_in_text([prompt])
        if cfg.text_encoder == STAND_IN
        else clip_text([prompt], cfg.text_encoder, device)
    )
    return sample_pixels(net.to(device).eval(), text, cfg, seed)[0]


def sample_prompt(cfg: Config) -> None:
    """--prompt: <output_dir>/samples/<prompt>.mp4, .gif and .png"""
    model = cfg.model or cfg.output_dir / "model"
    try:
        clip = generate(
            cfg.prompt,
            model,
            cfg.seed,
            sampler=cfg.sampler,
            sample_steps=cfg.sample_steps,
            guidance=cfg.guidance,
        )
    except (OSError, ValueError) as error:
        refuse(f"--model {model}: {error}; give a folder with model.safetensors, or a Hub id")
    path = cfg.output_dir / "samples" / re.sub(r"\W+", "_", cfg.prompt.lower()).strip("_")[:60]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_samples(clip[None], [cfg.prompt], path)
    log.info(f"{path}.mp4, .gif, .png")


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, VARIABLES)
    sample_prompt(cfg) if cfg.prompt else train(cfg)


if __name__ == "__main__":
    run(main)
