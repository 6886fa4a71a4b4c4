# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "av==18.1.0", "datasets==5.2.0", "deepspeed==0.19.8", "diffusers==0.42.1", "einops==0.8.2",
#   "huggingface_hub==2.4.0", "matplotlib==3.11.2", "numpy==2.4.6", "opencv-python-headless==5.0.0.93",
#   "pillow==13.0.0", "requests==2.34.2", "safetensors==0.8.0", "torch>=2.6", "tqdm==4.70.1",
#   "transformers==5.23.0", "tyro==1.0.17",
# ]
# ///
"""Text to video by diffusion: a 3-D U-Net on pixels or on an image VAE's latents, with FiLM on CLIP text or
cross-attention to its tokens, cosine DDPM.

    python t2v_ddpm.py --demo                   # minutes on 2 CPU cores: moving shapes, scored by the samples
    MANIFEST=clips.jsonl python t2v_ddpm.py     # one GPU (or a CPU): the debugging path
    MANIFEST=clips.jsonl ./run.sh t2v_ddpm.py 4 # four GPUs, logged, pushed to the Hub at the end
    python t2v_ddpm.py --prompt "a dog runs"    # sample the run's model, finished or not: mp4, gif and png

MANIFEST is a table of videos and captions or a folder, in any of the forms that README.md lists; --dataset
takes an id of the Hub. Without either the model trains, at its real size, on generated clips. The variables
MANIFEST, OUTDIR, STEPS, BS, FRAMES, SIZE and LR stand for the flags --manifest, --output_dir, --steps,
--batch_size, --frames, --size and --lr; a flag wins.

--vae trains on latents (by itself: stabilityai/sd-vae-ft-mse), --text_mode cross reads the caption word by
word, --caption_dropout 1 needs no captions, --frames 1 takes pictures, and --init_from goes on from them.
The tutorial's own objective is --prediction noise --shift 1 --timestep_sampling uniform.

Writes the run folder described in README.md, with ckpt_000200.pt = {step, model, ema} and
samples/preview_step000200.png at every --save_every. The same command again goes on from the newest whole
checkpoint.

Measured: --demo, 5 minutes on 2 CPU cores: all five attributes right in .99 of 88 samples for captions never
seen, 0.00 with the captions shuffled. On a GPU: not yet measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# isort: off
from common import (
    CHECKPOINTING, GB, Free, Layout, Lower, Run, asked_to_stop, barrier, batches_ahead, brief,
    check_loaded, check_settings, copy_code, decode_rows, demo_module, digest_of, disk_free, epoch_order,
    fetch_model, fill, fingerprint, finish_run, full_weights, gathered, local_ranks, log, memory_layouts,
    merged_over_ranks, numbered, on_rank0, open_engine, open_run, out_of_memory, pick_dtype, rank, read_data,
    read_flags, read_json, refuse, rounds, row_lines, run, sample_path, save_array, save_run, saved_bytes,
    seed_of, show_plan, split_clips, start_run, steps_line, stop_if_asked, tiny_model, training_steps,
    weights_key, with_steps, world_size, write_grid, write_json, write_samples, write_whole,
)  # fmt: skip

TIMESTEPS = 1000  # of the diffusion, as DDPM has
GENERATED = "generated clips of moving shapes"  # what is trained on without --manifest and --dataset
CLIP = "openai/clip-vit-base-patch32"
VAE = "stabilityai/sd-vae-ft-mse"
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
    frames: int = 8  # per clip, spread evenly over the video; 1: of pictures, or the middle one
    size: int = 64  # height and width, pixels
    image_share: float = 0.0  # of micro-batches that take the frames of their clips as single pictures
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Free[Path] = Path("cache")  # decoded frames, latents, encoded captions, downloads
    streaming: Free[bool] = False  # remove what was downloaded once it is decoded: for what no disk holds
    num_workers: Free[int] = 0  # threads that decode; 0: one for each core that is this rank's

    # model

    base: int = 64  # channels of the first level; the levels have 1, 2 and 4 times as many
    levels: int = 3  # of the U-Net, each half as high and wide
    blocks: int = 2  # residual blocks per level
    patch: int | None = None  # a patch x patch square enters as channels; default: 2 of pixels, 1 of latents
    # train on latents of this AutoencoderKL of diffusers, a Hub id or a folder; by itself or auto:
    # stabilityai/sd-vae-ft-mse, for generated clips a tiny one; default: on pixels
    vae: str = ""
    text_encoder: str = "auto"  # CLIP, a Hub id or a folder; auto: ViT-B/32, for generated clips a tiny one
    text_mode: Literal["film", "cross"] = "film"  # the caption's mean state, or attention to all its tokens
    caption_dropout: float = 0.1  # share of captions left out, for guidance; 1: none are needed, or read
    init_from: str = ""  # start from the weights of a run, model folder, ckpt_000200.pt or Hub id
    gradient_checkpointing: Free[Literal["auto", "on", "off"]] = "auto"  # auto: when it does not fit without
    compile: Free[bool] = False  # torch.compile the model; needs a C++ compiler

    # diffusion

    prediction: Literal["noise", "v"] = "v"  # what the model predicts
    # divides alpha_bar / (1 - alpha_bar) by its square: above 1, more steps see mostly noise; default: 3 for
    # each 16 pixels of the side, 3 on latents
    shift: float | None = None
    timestep_sampling: Literal["uniform", "logit_normal"] = "logit_normal"  # of the training loss
    min_snr: float = 0.0  # weigh the loss by min(SNR, this) / SNR, as of x_0; 0: each timestep alike

    # optimisation

    steps: Free[int] = 1000  # optimizer steps in all, over all resumes
    batch_size: Lower[int] = 2  # clips per GPU per micro-step; lower this first when memory runs out
    accum: Lower[int] = 1  # micro-steps per optimizer step
    lr: Free[float] = 3e-4
    warmup_steps: Free[int | None] = None  # default: 100, but at most a tenth of the steps
    lr_decay: bool = True  # to 0 at the last step, along a cosine
    weight_decay: float = 0.0
    beta2: float = 0.999  # of AdamW
    clip: Free[float] = 1.0  # gradient norm limit
    ema: float = 0.999  # decay of the averaged weights, which are sampled and pushed
    # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    # JSON file, or auto: what fits
    deepspeed: Free[Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])]] = "auto"

    # sampling

    prompt: Free[str] = ""  # sample this caption, or each line of this .txt file, from --model and stop
    model: Free[str] = ""  # for --prompt: a run, model folder, ckpt_000200.pt or Hub id; default: output_dir
    # dpm: DPM-Solver++ 2M; heun wants 25 steps or more, of --spacing karras
    sampler: Free[Literal["ddim", "ddpm", "dpm", "heun"]] = "ddim"
    spacing: Free[Literal["cosine", "karras"]] = "cosine"  # of the steps, karras for dpm and heun
    sample_steps: Free[int] = 50
    preview_steps: Free[int | None] = None  # of the pictures at each save; default: sample_steps
    guidance: Free[float] = 3.0  # 1 = none
    fps: Free[float | None] = None  # of samples; default: as fast as the training clips' frames follow

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
            at_least_1="frames base levels blocks patch steps batch_size accum sample_steps preview_steps "
            "log_every eval_every save_every keep",
            at_least_0="warmup_steps num_workers min_snr",
            above_0="lr shift clip guidance fps",
            shares="ema max_bad",
        )
        for name in ("caption_dropout", "image_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: from 0 to 1")
        self.check_size(1)
        if self.base % 8:
            raise ValueError(f"--base {self.base} must be a multiple of 8, the groups of the normalisation")
        if max(self.sample_steps, self.preview_steps or 0) > TIMESTEPS:
            raise ValueError(f"--sample_steps, --preview_steps: at most {TIMESTEPS}")
        if self.spacing == "karras" and self.sampler not in ("dpm", "heun"):
            raise ValueError(f"--spacing karras: --sampler dpm and heun have it, {self.sampler} has not")

    def check_size(self, scale: int) -> None:
        """ValueError unless the U-Net takes --size; `scale`: pixels of a latent's side"""
        multiple = self.multiple(scale)
        if self.size < 1 or self.size % multiple:
            latents = f"latents of {scale} pixels, " if scale > 1 else ""
            raise ValueError(
                f"--size {self.size} must be a multiple of {multiple} ({latents}--patch {self.patch_size} x "
                f"2 for each of {self.levels - 1} downsamplings): take "
                f"{max(1, round(self.size / multiple)) * multiple}"
            )

    def multiple(self, scale: int) -> int:
        return scale * self.patch_size * 2 ** (self.levels - 1)

    @property
    def patch_size(self) -> int:
        return self.patch or (1 if self.vae else 2)

    @property
    def conditional(self) -> bool:
        """Whether captions are wanted at all"""
        return self.caption_dropout < 1


# The demo is a preset: the same code with other numbers. Recipe and scores: README.md and
# benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/t2v_ddpm_demo"), size=16, base=32, levels=2, blocks=1, report_to="none",
    steps=2000, batch_size=8, lr=1.5e-3, warmup_steps=50, beta2=0.99, ema=0.98,
    sample_steps=20, log_every=100, eval_every=500, save_every=500,
)  # fmt: skip
VARIABLES = {
    "MANIFEST": "--manifest", "OUTDIR": "--output_dir", "STEPS": "--steps", "BS": "--batch_size",
    "FRAMES": "--frames", "SIZE": "--size", "LR": "--lr",
}  # fmt: skip
BARE = {"--vae": "auto"}
# What samples depend on, and a finished model knows of itself
KEPT = (
    "frames", "size", "base", "levels", "blocks", "patch", "vae", "text_encoder", "text_mode",
    "caption_dropout", "prediction", "shift", "sampler", "spacing", "sample_steps", "guidance", "fps",
)  # fmt: skip

# ---------------------------------------------------------------------------
# Data: videos
# ---------------------------------------------------------------------------


def load_videos(cfg: Config) -> tuple[list[Path], list[tuple[str, ...]], set[int], list[dict]]:
    """Every rank: (cached clips, their captions, which are held out, bad samples). Exit 2 when too many
    samples are bad, or all."""
    rows, bad = on_rank0(read_data)(cfg, "caption" if cfg.conditional else "video")
    rows, files, undecoded = decode_rows(rows, cfg.frames, cfg.size, cfg)
    share = 0.05 if len(rows) >= 20 else 0  # none of a handful
    parts = split_clips([row.video for row in rows], [row.split for row in rows], share, cfg.seed)
    return files, [tuple(row.texts) for row in rows], set(parts[1]), bad + undecoded


def frames_per_second(files: list[Path]) -> float:
    """How fast the frames of these clips follow each other: the median of some, by their times in the
    cache"""
    rates = []
    for path in files[:: max(1, len(files) // 64)]:
        with path.open("rb") as file:
            times = [np.load(file) for _ in range(2)][1]
        rates += [(len(times) - 1) / times[-1]] if times[-1] > 0 else []
    return float(np.median(rates)) if rates else 8.0


def open_vae(source: str, device: torch.device) -> tuple[nn.Module, str]:
    """-> (a frozen AutoencoderKL, the name of its weights), from its folder or that of a pipeline. Exit 2
    without one, or when weights are missing."""
    from diffusers import AutoencoderKL

    files = "config.json", "diffusion_pytorch_model*.safetensors"
    folder = fetch_model(source, *files, *(f"vae/{name}" for name in files), flag="--vae")
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        kind = read_json(folder / "config.json").get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"it is {kind or 'no model of diffusers'}, AutoencoderKL is wanted, as {VAE}")
        vae, report = AutoencoderKL.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        refuse(f"--vae {source}: {brief(error)}")
    check_loaded(report, folder)
    return vae.to(device).eval().requires_grad_(False), weights_key(folder)


def with_shift(cfg: Config) -> Config:
    """--shift, unless it was given, grows with the side in pixels: the larger a picture, the more noise it
    takes to hide as much of it (Hoogeboom et al. 2023, section 3.1)."""
    return dataclasses.replace(cfg, shift=cfg.shift or (3.0 if cfg.vae else 3 * cfg.size / 16))


def scale_of(vae: nn.Module | None) -> int:
    """Pixels of a latent's side"""
    return 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1


@torch.no_grad()
def to_latents(frames: np.ndarray, vae: nn.Module) -> np.ndarray:
    """uint8 (F, H, W, 3) -> float16 (F, C, h, w), of about unit variance: means of the posterior, scaled as
    the VAE says"""
    x = to_unit(torch.from_numpy(frames)[None])[0].to(vae.device)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(8)])
    return ((z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor).half().cpu().numpy()


@torch.no_grad()
def to_clips(x: Tensor, vae: nn.Module | None) -> np.ndarray:
    """The inverse, of (B, F, C, h, w); without a VAE of (B, F, 3, H, W) in [-1, 1]. -> uint8 (B, F, H, W,
    3)"""
    if vae:
        z = (x / vae.config.scaling_factor + (vae.config.shift_factor or 0)).flatten(0, 1)
        x = torch.cat([vae.decode(part).sample for part in z.split(8)]).unflatten(0, x.shape[:2])
    return to_pixels(x)


def encode_clips(clips: list[np.ndarray | Path], cfg: Config, vae: nn.Module, key: str) -> list[Path]:
    """Every rank, each its share: the latents of the clips, in the cache; it may be stopped and started
    again."""
    names = [digest_of(f"{key}|{name_of(clip)}") for clip in clips]
    files = [cfg.cache_dir / "latents" / name[:2] / f"{name}.npy" for name in names]
    mine = range(rank() % local_ranks(), len(clips), local_ranks())
    todo = [i for i in mine if not files[i].exists()]
    side = cfg.size // scale_of(vae)
    need = len(todo) * local_ranks() * cfg.frames * vae.config.latent_channels * side**2 * 2 / GB
    if need > (free := disk_free(cfg.cache_dir) / GB):
        refuse(f"--cache_dir {cfg.cache_dir}: {free:.2f} GB free for {need:.2f} GB of latents")
    for i in tqdm(todo, "encode clips", disable=None if todo and rank() == 0 else True):
        save_array(files[i], to_latents(load(clips[i]), vae))
    barrier()
    return files


def name_of(clip: np.ndarray | Path) -> str:
    """Of its file, which says which video, size and reader; or its sum"""
    return clip.name if isinstance(clip, Path) else f"{zlib.crc32(clip):08x}"


def load(clip: np.ndarray | Path) -> np.ndarray:
    return np.load(clip) if isinstance(clip, Path) else clip


# ---------------------------------------------------------------------------
# Data: text
# ---------------------------------------------------------------------------


class Text(NamedTuple):
    """What the encoder makes of captions: of each its tokens' states, or their mean alone"""

    states: np.ndarray  # float16 (all tokens, D), caption after caption
    ends: np.ndarray  # (N,) where each caption's states end

    def of(self, row: int) -> np.ndarray:
        return self.states[self.ends[row - 1] if row else 0 : self.ends[row]]

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """-> text (B, T, D) float32, mask (B, T): which are tokens"""
        parts = [torch.from_numpy(self.of(row)) for row in rows]
        text = nn.utils.rnn.pad_sequence(parts, batch_first=True).float()
        return text, torch.arange(text.shape[1]) < torch.tensor([len(part) for part in parts])[:, None]


NO_CAPTION = Text(np.zeros((1, 1), np.float16), np.ones(1, int))  # of one caption, which is always left out


def clip_folder(source: str) -> Path:
    """Exit 2 without one. ViT-B/32 was published before there were safetensors."""
    fetch = partial(fetch_model, source, "*.json", "*.txt", flag="--text_encoder")
    folder = fetch("model*.safetensors")
    return folder if any(folder.glob("model*.safetensors")) else fetch("pytorch_model*.bin")


def open_encoder(source: str, device: torch.device) -> tuple[Any, nn.Module]:
    """-> (tokenizer, CLIP's frozen text encoder). Exit 2 without one: not found, another class, weights or
    the tokenizer missing."""
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel

    folder = clip_folder(source)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(f"it is of class {kind}, CLIP is wanted, as {CLIP}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder, report = CLIPTextModel.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names them
        )
        # without its files there is one of special tokens alone, to which every word is the same
        if len(tokenizer) < (size := encoder.config.vocab_size) - 256:
            raise ValueError(f"its tokenizer knows {len(tokenizer)} tokens, its weights {size}")
    except (OSError, ValueError) as error:
        refuse(f"--text_encoder {source}: {brief(error)}")
    check_loaded({**report, "unexpected_keys": []}, folder)  # the pictures' half of CLIP
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


@torch.no_grad()
def clip_text(captions: list[str], source: str, mode: str, device: torch.device) -> Text:
    """Last hidden states of the real tokens, D = 512 for ViT-B/32: of each caption all, or for FiLM their
    mean."""
    tokenizer, encoder = open_encoder(source, device)
    length, states = encoder.config.max_position_embeddings, []
    if cut := sum(len(ids) > length for ids in tokenizer(captions).input_ids):
        log.warning(
            f"warning: {cut} of {len(captions)} captions are longer than {length} tokens; their ends are not "
            "read"
        )
    for start in tqdm(range(0, len(captions), 256), "encode captions", disable=None):
        part = captions[start : start + 256]
        tokens = tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output, mask = encoder(**tokens.to(device)).last_hidden_state, tokens.attention_mask.bool()
        rows = [row[real].cpu().numpy() for row, real in zip(output, mask)]
        states += rows if mode == "cross" else [row.mean(0, keepdims=True) for row in rows]
    return Text(np.concatenate(states).astype(np.float16), np.cumsum([len(row) for row in states]))


def encode_text(captions: list[str], cfg: Config, device: torch.device) -> Path:
    """Each caption encoded once; the encoder is gone from the GPU afterwards. -> the file in the cache, of
    ends and states"""
    key = json.dumps([weights_key(clip_folder(cfg.text_encoder)), cfg.text_mode, captions])
    target = cfg.cache_dir / "text" / f"{digest_of(key)}.npy"
    if not target.exists():
        text = clip_text(captions, cfg.text_encoder, cfg.text_mode, device)
        save_array(target.with_suffix(".ends.npy"), text.ends)
        save_array(target, text.states)
    return target


def load_text(captions: list[str], cfg: Config, device: torch.device) -> Text:
    """Every rank; the file is mapped, not read: of a million captions the tokens take 20 GB"""
    if not cfg.conditional:
        return NO_CAPTION
    file = on_rank0(encode_text)(captions, cfg, device)
    if not file.exists():  # another machine, whose cache is its own
        encode_text(captions, cfg, device)
    return Text(np.load(file, mmap_mode="c"), np.load(file.with_suffix(".ends.npy")))


@dataclass(frozen=True)
class Clips:
    """Clip i is frames[i], uint8 (F, H, W, 3), or float16 latents (F, C, h, w), or a .npy file of it; its
    captions are the rows[i] of `text`."""

    frames: list[np.ndarray | Path]
    captions: list[tuple[str, ...]]
    rows: list[list[int]]
    text: Text

    def batch(self, indices: list[int]) -> Tensor:
        """-> the frames, (B, ...)"""
        return torch.from_numpy(np.stack([load(self.frames[i]) for i in indices]))

    def part(self, keep: list[int]) -> Clips:
        frames, captions, rows = (
            [values[i] for i in keep] for values in (self.frames, self.captions, self.rows)
        )
        return Clips(frames, captions, rows, self.text)

    def different_captions(self, count: int) -> tuple[list[str], list[int]]:
        """`count` captions, different as far as there are so many, and their rows of `text`"""
        rows = {several[0]: numbers[0] for several, numbers in zip(self.captions, self.rows)}
        chosen = list(rows)[:: max(1, len(rows) // count)]
        chosen = list(itertools.islice(itertools.cycle(chosen), count))
        return chosen, [rows[caption] for caption in chosen]


@dataclass(frozen=True)
class Data:
    train: Clips
    held_out: Clips  # to evaluate on; the same as train when there are fewer than 20 videos
    vae: nn.Module | None
    fps: float  # of the clips
    bad: list[dict]  # samples that were left out, and why

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (C, H, W) and variance () of some training clips' pixels or latents"""
        count = len(self.train.frames)
        x = to_unit(self.train.batch(list(range(count))[:: max(1, count // 256)]))
        mean = x.mean((0, 1))
        return mean, (x - mean).square().mean()


def with_encoders(cfg: Config) -> Config:
    """Every rank: what --text_encoder and --vae of auto stand for; for generated clips both are made on the
    spot."""
    found, any_seed = {}, dataclasses.replace(cfg, seed=0)
    for name, published in {"text_encoder": CLIP, "vae": VAE}.items():
        if getattr(cfg, name) == "auto":
            found[name] = published
            if not (cfg.manifest or cfg.dataset):
                build = getattr(demo_module("shapes"), f"build_{name}")
                found[name] = on_rank0(tiny_model)(any_seed, __file__, build, name)
    return dataclasses.replace(cfg, **found)


def load_data(cfg: Config, device: torch.device) -> Data:
    """Every rank. Exit 2 when there is nothing to train on."""
    vae, key = open_vae(cfg.vae, device) if cfg.vae else (None, "")
    try:
        cfg.check_size(scale_of(vae))
    except ValueError as error:
        refuse(str(error))
    if cfg.manifest or cfg.dataset:
        frames, captions, held_out, bad = load_videos(cfg)
        fps = frames_per_second(frames)
    else:
        shapes, bad, fps = demo_module("shapes"), [], 8.0
        frames, captions, held_out = shapes.generated_clips(cfg.seed, cfg.frames, cfg.size)
    if not cfg.conditional:
        captions = [("",)] * len(frames)
    unique = dict.fromkeys(itertools.chain.from_iterable(captions))
    text = load_text(list(unique), cfg, device)
    row_of = {caption: row for row, caption in enumerate(unique)}
    frames = encode_clips(frames, cfg, vae, key) if vae else frames
    clips = Clips(frames, captions, [[row_of[c] for c in several] for several in captions], text)
    train = clips.part([i for i in range(len(frames)) if i not in held_out])
    return Data(train, clips.part(sorted(held_out)) if held_out else train, vae, cfg.fps or fps, bad)


def get_batch(clips: Clips, cfg: Config, micro_step: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's frames, text and mask at a micro-step: a pure function of (seed, micro-step, rank), so that
    a resumed run repeats the order. A clip of n captions takes number epoch % n."""
    first = (micro_step * world_size() + rank()) * cfg.batch_size
    places = [divmod(place, len(clips.frames)) for place in range(first, first + cfg.batch_size)]
    indices = [int(epoch_order(len(clips.frames), cfg.seed, epoch)[i]) for epoch, i in places]
    rows = [clips.rows[i][epoch % len(clips.rows[i])] for i, (epoch, _) in zip(indices, places)]
    frames = clips.batch(indices)
    # on all ranks the same, so that none waits for another's clips
    if np.random.default_rng([cfg.seed, micro_step]).random() < cfg.image_share:
        rows = [row for row in rows for _ in range(frames.shape[1])]
        frames = frames.flatten(0, 1)[:, None]
    return frames, *clips.text.batch(rows)


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


class Given(NamedTuple):
    """What each part of the model sees besides its input"""

    frames: int
    film: Tensor  # (B, W) of the timestep and the mean of the text
    text: Tensor  # (B, T, D)
    mask: Tensor  # (B, T) which are tokens


class ResBlock(nn.Module):
    """Two 3x3 convolutions on every frame; FiLM (Perez et al. 2018) by time and text between them."""

    def __init__(self, c_in: int, c_out: int, c_film: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_film, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """x (B*F, C, H, W) -> (B*F, C', H, W)"""
        h = self.conv1(F.silu(self.norm1(x)))
        film = self.film(given.film).repeat_interleave(given.frames, 0)[..., None, None]  # (B*F, 2C', 1, 1)
        scale, shift = film.chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))


class Attention(nn.Module):
    """Self-attention along time (each pixel over the frames) or over space (each frame over its pixels), or
    cross-attention (each pixel to the caption's tokens)."""

    def __init__(self, c: int, axis: Literal["time", "space", "text"], c_text: int = 0) -> None:
        super().__init__()
        self.axis, self.heads = axis, math.gcd(c, max(1, c // 32))  # about 32 wide each
        self.norm, self.out = nn.GroupNorm(8, c), nn.Linear(c, c)
        if axis == "text":
            self.q, self.kv = nn.Linear(c, c), nn.Linear(c_text, 2 * c)
        else:
            self.qkv = nn.Linear(c, 3 * c)
        nn.init.zeros_(self.out.weight)  # starts as the identity
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """x (B*F, C, H, W) -> the same shape"""
        frames, (h, w), mask = given.frames, x.shape[-2:], None
        u = self.norm(x).permute(0, 2, 3, 1)  # (B*F, H, W, C)
        if self.axis == "time":
            u = rearrange(u, "(b f) h w c -> (b h w) f c", f=frames)
            u = u + sinusoids(torch.arange(frames, device=x.device), u.shape[-1]).to(u.dtype)
        elif self.axis == "space":
            u = u.flatten(1, 2)
        if self.axis == "text":
            u, mask = rearrange(u, "(b f) h w c -> b (f h w) c", f=frames), given.mask[:, None, None]
            parts = self.q(u), *self.kv(given.text).chunk(2, -1)
        else:
            parts = self.qkv(u).chunk(3, -1)
        q, k, v = (rearrange(y, "n t (heads d) -> n heads t d", heads=self.heads) for y in parts)
        u = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        u = self.out(rearrange(u, "n heads t d -> n t (heads d)"))
        if self.axis == "time":
            u = rearrange(u, "(b h w) f c -> (b f) h w c", h=h, w=w)
        return x + u.reshape(-1, h, w, u.shape[-1]).permute(0, 3, 1, 2)


class Resize(nn.Module):
    """Half or twice the height and width, by a convolution."""

    def __init__(self, c: int, up: bool) -> None:
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, padding=1, stride=1 if up else 2)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class UNet3DCond(nn.Module):
    """3-D U-Net: frames folded into the batch for 2-D convolutions in channels_last, attention along time
    between them; cheaper per step than 3-D or (2+1)-D convolutions (benchmarks/RESULTS.md)."""

    def __init__(
        self,
        base: int = 64,
        levels: int = 3,
        blocks: int = 2,
        patch: int = 2,
        text_mode: str = "film",
        text_dim: int = 512,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.config = {"base": base, "levels": levels, "blocks": blocks, "patch": patch}
        self.config |= {"text_mode": text_mode, "text_dim": text_dim, "channels": channels}
        self.patch, self.base, self.checkpointing, width = patch, base, False, 4 * base
        self.time = nn.Sequential(nn.Linear(base, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("text_mean", torch.zeros(text_dim))  # see standardise
        self.register_buffer("text_std", torch.ones(()))
        self.no_text = nn.Parameter(torch.zeros(text_dim))  # stands for a caption that was left out
        self.text = nn.Linear(text_dim, width)

        def stage(c_in: int, c_out: int, level: int) -> nn.ModuleList:
            text = [Attention(c_out, "text", text_dim)] if text_mode == "cross" else []
            attention = [Attention(c_out, "time"), *text] if level else []
            return nn.ModuleList([ResBlock(c_in, c_out, width), *attention])

        widths = [base * 2**level for level in range(levels)]
        self.enter = nn.Conv2d(channels * patch**2 + 3, base, 3, padding=1)  # the pixels and where they are
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [base], base
        for level, c_out in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(c, c_out, level))
                skips.append(c := c_out)
            if level < levels - 1:
                self.down.append(nn.ModuleList([Resize(c, up=False)]))
                skips.append(c)
        around = [Attention(c, "space"), Attention(c, "time")]
        self.middle = nn.ModuleList([ResBlock(c, c, width), *around, ResBlock(c, c, width)])
        for level, c_out in reversed(list(enumerate(widths))):
            for block in range(blocks + 1):
                parts = stage(c + skips.pop(), c_out, level)
                if level > 0 and block == blocks:
                    parts.append(Resize(c_out, up=True))
                self.up.append(parts)
                c = c_out
        self.leave = nn.Sequential(
            nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, channels * patch**2, 3, padding=1)
        )
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def standardise(self, states: np.ndarray) -> None:
        """Take mean and spread of the training captions' states (N, D): what all captions share says
        nothing."""
        states = torch.from_numpy(states.astype(np.float32))
        spread = states.var(0, correction=0).mean().sqrt()
        self.text_mean.copy_(states.mean(0))
        self.text_std.copy_(spread if spread > 1e-3 else torch.ones(()))  # one caption alone has none

    def forward(
        self, x: Tensor, timesteps: Tensor, text: Tensor, mask: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """x (B, F, C, H, W), timesteps (B,) in [0, 1000), text (B, T, D), mask (B, T) bool; drop (B,) bool
        leaves captions out. -> x's shape"""
        frames, dtype = x.shape[1], self.enter.weight.dtype
        text = ((text - self.text_mean) / self.text_std).to(dtype)
        if drop is not None:
            text = torch.where(drop[:, None, None], self.no_text, text)
        mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
        film = F.silu(self.time(sinusoids(timesteps, self.base).to(dtype)) + self.text(mean))
        given = Given(frames, film, text, mask)
        h = F.pixel_unshuffle(x.flatten(0, 1).to(dtype), self.patch)  # (B*F, Cpp, H/p, W/p)
        h = torch.cat([h, places(len(x), (frames, *h.shape[-2:]), h.device).to(dtype)], 1)
        h = self.enter(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for parts in self.down:
            skips.append(h := self.through(parts, h, given))
        h = self.through(self.middle, h, given)
        for parts in self.up:
            h = self.through(parts, torch.cat([h, skips.pop()], 1), given)
        h = F.pixel_shuffle(self.leave(h), self.patch)
        return h.unflatten(0, (-1, frames)).to(x.dtype)

    def through(self, parts: nn.ModuleList, h: Tensor, given: Given) -> Tensor:
        """Of what is checkpointed only the input is kept, and computed again for the backward pass."""
        for part in parts:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(part, h, given, use_reentrant=False)
            else:
                h = part(h, given)
        return h


# ---------------------------------------------------------------------------
# Diffusion
# ---------------------------------------------------------------------------


def cosine_alpha_bar(shift: float = 1.0) -> Tensor:
    """alpha_bar (1000,) float32 of the cosine schedule (Nichol and Dhariwal 2021, equation 17, betas at most
    0.999). It ends at 2e-9, so that samples may start from noise alone (Lin et al. 2024).

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


def clean_of(noisy: Tensor, output: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """The inverse: x_0 from a noisy x and the model's output; alpha_bar ()"""
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return (noisy - b * output) / a if prediction == "noise" else a * noisy - b * output


def loss_weight(alpha_bar: Tensor, prediction: str, most: float) -> Tensor:
    """Min-SNR (Hang et al. 2023, section 3.4): an error of x_0 counts min(SNR, most), one of what is
    predicted as much as that makes of it; alpha_bar (B,)"""
    if not most:
        return torch.ones_like(alpha_bar)
    ratio = alpha_bar / (1 - alpha_bar)
    return ratio.clamp(max=most) / (ratio if prediction == "noise" else ratio + 1)


def diffusion_loss(
    model: nn.Module, x: Tensor, text: Tensor, mask: Tensor, alpha_bar: Tensor, cfg: Config, seed: int
) -> Tensor:
    """Mean squared error of the prediction. x (B, F, C, H, W) in [-1, 1] or latents, text (B, T, D), mask (B,
    T), alpha_bar (1000,)"""
    generator, count, device = torch.Generator(x.device).manual_seed(seed), len(x), x.device
    if cfg.timestep_sampling == "uniform":
        t = torch.randint(TIMESTEPS, (count,), generator=generator, device=device)
    else:  # more often in the middle (Esser et al. 2024, section 3.1)
        t = (torch.randn(count, generator=generator, device=device).sigmoid() * TIMESTEPS).long()
    noise = torch.randn(x.shape, generator=generator, device=device)
    drop = torch.rand(count, generator=generator, device=device) < cfg.caption_dropout
    a = alpha_bar[t]
    error = model(add_noise(x, noise, a), t, text, mask, drop) - diffusion_target(x, noise, a, cfg.prediction)
    return (loss_weight(a, cfg.prediction, cfg.min_snr) * error.square().mean((1, 2, 3, 4))).mean()


def to_unit(frames: Tensor) -> Tensor:
    """What the model sees: of uint8 (B, F, H, W, 3) float32 (B, F, 3, H, W) in [-1, 1], of latents float32"""
    if frames.dtype != torch.uint8:
        return frames.float()
    return rearrange(frames, "b f h w c -> b f c h w").float() / 127.5 - 1


def to_pixels(clips: Tensor) -> np.ndarray:
    """float (B, F, 3, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3)"""
    levels = ((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(levels, "b f c h w -> b f h w c").cpu().numpy()


# ---------------------------------------------------------------------------
# Sample and evaluate
# ---------------------------------------------------------------------------


def scheduler_of(cfg: Config) -> Any:
    """diffusers' scheduler on the schedule of the training, which is given x_0"""
    import diffusers

    a = cosine_alpha_bar(cfg.shift).double()
    betas = 1 - a / torch.cat([torch.ones(1).double(), a[:-1]])
    kinds = {"ddim": "DDIM", "ddpm": "DDPM", "dpm": "DPMSolverMultistep", "heun": "HeunDiscrete"}
    own = {"clip_sample": False} if cfg.sampler in ("ddim", "ddpm") else {}
    own |= {"use_karras_sigmas": True} if cfg.spacing == "karras" else {}
    scheduler = getattr(diffusers, f"{kinds[cfg.sampler]}Scheduler")(  # the others' imports take a second
        trained_betas=betas.numpy(), prediction_type="sample", timestep_spacing="trailing", **own
    )
    scheduler.set_timesteps(cfg.sample_steps)
    if cfg.sampler in ("dpm", "heun"):
        scheduler.set_begin_index(0)  # it would look for the time, which Karras' steps have several times
    return scheduler


@torch.no_grad()
def sample(
    model: UNet3DCond, text: Tensor, mask: Tensor, shape: tuple[int, ...], cfg: Config, seeds: list[int]
) -> Tensor:
    """Clips (N, *shape) for text (N, T, D), mask (N, T), each from its own seed; shape = (F, C, H, W).

    Guidance after Ho and Salimans 2022; on pixels x_0 is clipped in each step.
    """
    device, scheduler = next(model.parameters()).device, scheduler_of(cfg)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])
    x, guided = x * scheduler.init_noise_sigma, cfg.guidance != 1 and cfg.conditional
    text, mask, count = text.to(device), mask.to(device), len(text)
    # with guidance a second half without captions
    drop = torch.arange(2 * count if guided else count, device=device) >= (count if cfg.conditional else 0)
    times = 2 if guided else 1
    text, mask = text.repeat(times, 1, 1), mask.repeat(times, 1)
    noise = {"generator": generators} if cfg.sampler == "ddpm" else {}
    for i, t in enumerate(scheduler.timesteps):
        stop_if_asked()
        noisy = scheduler.scale_model_input(x, t)
        output = model(noisy.repeat(times, 1, 1, 1, 1), t.to(device).expand(len(drop)), text, mask, drop)
        if guided:
            with_text, without = output.chunk(2)
            output = without + cfg.guidance * (with_text - without)
        has_sigmas = cfg.sampler in ("dpm", "heun")  # times may lie between those of the training
        a = 1 / (1 + scheduler.sigmas[i] ** 2) if has_sigmas else scheduler.alphas_cumprod[t]
        clean = clean_of(noisy, output, a.to(device), cfg.prediction)
        x = scheduler.step(clean if cfg.vae else clean.clamp(-1, 1), t, x, **noise).prev_sample
    return x


def sample_clips(model: UNet3DCond, text: Text, rows: list[int], vae: Any, cfg: Config) -> np.ndarray:
    """Every rank its share: uint8 (N, F, H, W, 3) for these rows of text, in batches that need no more memory
    than training."""
    side, done = cfg.size // scale_of(vae), {}
    shape = (cfg.frames, model.config["channels"], side, side)
    for part in rounds(len(rows), max(8, cfg.batch_size)):
        seeds = [seed_of(cfg.seed, i) for i in part]
        x = sample(model, *text.batch([rows[i] for i in part]), shape, cfg, seeds)
        done |= dict(zip(part, to_clips(x, vae)))
    return np.stack(list(merged_over_ranks(done).values()))


def blind_guess(noisy: Tensor, alpha_bar: Tensor, moments: tuple[Tensor, Tensor], prediction: str) -> Tensor:
    """The best that can be predicted from mean and variance alone, by what does not look at the clip: x_0's
    conditional mean, were all pixels independent and normal. Most of the target is noise, and known by it."""
    (mean, variance), a = moments, alpha_bar.view(-1, 1, 1, 1, 1)
    gain = a.sqrt() * variance / (a * variance + 1 - a)
    clean = mean + gain * (noisy - a.sqrt() * mean)
    return diffusion_target(clean, (noisy - a.sqrt() * clean) / (1 - a).sqrt(), alpha_bar, prediction)


def held_out_loss(model: UNet3DCond, data: Data, cfg: Config) -> dict[str, float]:
    """Every rank its share: the loss at 8 fixed timesteps with fixed noise, on up to 64 clips; the same with
    each clip's caption replaced by another's, and of what does not look at the clip."""
    device, alpha_bar, done = next(model.parameters()).device, cosine_alpha_bar(cfg.shift), {}
    clips, count = data.held_out, min(64, len(data.held_out.frames))
    first = [numbers[0] for numbers in clips.rows]
    for part in rounds(count, cfg.batch_size):
        x = to_unit(clips.batch(part))
        captions = [clips.text.batch([first[i] for i in part])]
        captions += [clips.text.batch([first[(i + count // 2) % count] for i in part])]
        drop = None if cfg.conditional else torch.ones(len(x), dtype=torch.bool, device=device)
        sums = torch.zeros(len(part), 3)
        for t in range(TIMESTEPS // 16, TIMESTEPS, TIMESTEPS // 8):
            generators = [torch.Generator().manual_seed(seed_of(cfg.seed, i, t)) for i in part]
            noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
            a, when = alpha_bar[t].expand(len(x)), torch.full((len(x),), t, device=device)
            noisy, target = add_noise(x, noise, a), diffusion_target(x, noise, a, cfg.prediction)
            with torch.no_grad():
                guesses = [
                    model(noisy.to(device), when, text.to(device), mask.to(device), drop).cpu()
                    for text, mask in captions
                ]
            guesses.append(blind_guess(noisy, a, data.moments, cfg.prediction))
            weight = loss_weight(a, cfg.prediction, cfg.min_snr)
            errors = [(guess - target).square().mean((1, 2, 3, 4)) * weight for guess in guesses]
            sums += torch.stack(errors, 1) / 8
        done |= dict(zip(part, sums.tolist()))
    means = np.mean(list(merged_over_ranks(done).values()), axis=0)
    return dict(zip(("loss", "captions_swapped", "blind"), means.tolist()))


def evaluate(model: UNet3DCond, data: Data, cfg: Config) -> dict:
    """Every rank: the score of results.json. Generated clips: asked = made on held-out captions, read back
    from the sampled pixels, next to the same clips held against each other's captions. Videos: how much of
    the loss that remains without a look at the clip the model takes away, on held-out videos."""
    held_out, losses = data.held_out, held_out_loss(model, data, cfg)
    names = {"as captioned": "loss", "captions swapped": "captions_swapped", "blind to the clip": "blind"}
    loss_table = {"loss": {name: losses[key] for name, key in names.items()}}
    results = {"held_out_loss": losses["loss"], "controls": {}, "tables": {"held out": loss_table}}
    if cfg.manifest or cfg.dataset or not cfg.conditional:
        which = "the training clips (there are fewer than 20)" if held_out is data.train else "held-out clips"
        less, swapped = (1 - losses[key] / losses["blind"] for key in ("loss", "captions_swapped"))
        return results | {
            "score": max(0.0, less),
            "score_is": f"loss below that of the best guess from mean and variance alone, {which}",
            "controls": {"captions_swapped": max(0.0, swapped)} if cfg.conditional else {},
        }
    shapes = demo_module("shapes")
    asked = shapes.held_out_captions(shapes.DDPM_SHAPES)
    asked = asked * max(1, 96 // len(asked))
    row_of = {caption: rows[0] for (caption,), rows in zip(held_out.captions, held_out.rows)}
    rows = [row_of[shapes.caption_of(a)] for a in asked]
    clips = sample_clips(model, held_out.text, rows, data.vae, cfg)
    right, shuffled = shapes.score_and_control(clips, asked, shapes.DDPM_SHAPES)
    attributes = {name: {"as asked": right[name], "captions shuffled": shuffled[name]} for name in right}
    count = f"{len(asked)} clips of {len(row_of)} held-out captions"
    return results | {
        "score": right["all_five"],
        "score_is": f"asked = made for all five attributes, {count}",
        "controls": {"captions_shuffled": shuffled["all_five"]},
        "tables": {"asked is made": attributes} | results["tables"],
    }


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


def activation_bytes(model: UNet3DCond, cfg: Config, vae: Any = None, checkpointing: bool = False) -> int:
    """What one micro-batch keeps for the backward pass, counted on the meta device: no memory, no
    arithmetic."""
    count, side, tokens = cfg.batch_size, cfg.size // scale_of(vae), 77 if cfg.text_mode == "cross" else 1
    with torch.device("meta"):
        twin = UNet3DCond(**model.config).to(TORCH_DTYPES[cfg.dtype])
        twin.checkpointing = checkpointing
        clips = torch.empty(count, cfg.frames, model.config["channels"], side, side)
        text, mask = torch.empty(count, tokens, model.config["text_dim"]), torch.empty(count, tokens).bool()
        return saved_bytes(lambda: twin(clips, torch.empty(count), text, mask), twin)


def kept_bytes(model: UNet3DCond, cfg: Config, vae: Any) -> dict[bool, int]:
    """{with checkpointing: bytes besides weights, gradients and the optimizer's}: the averaged weights and a
    micro-batch. Measured on a CPU: gradients on their way add .4 of the activations, DeepSpeed's flat copies
    8 bytes a parameter."""
    besides = 12 * sum(p.numel() for p in model.parameters())
    allowed = CHECKPOINTING[cfg.gradient_checkpointing]
    return {on: int(1.4 * activation_bytes(model, cfg, vae, on)) + besides for on in allowed}


def memory_advice(model: UNet3DCond, vae: Any, cfg: Config) -> str:
    now = f"activations of a micro-batch: {activation_bytes(model, cfg, vae) / GB:.2f} GB at "
    now += f"BS={cfg.batch_size} FRAMES={cfg.frames} SIZE={cfg.size}"
    return f"{now}; half of BS or of FRAMES halves them, half of SIZE quarters them"


def plan_of(cfg: Config, model: UNet3DCond, data: Data, device: torch.device) -> Layout:
    """Print what this run is going to do, and check that it fits. -> the layout of memory that is taken"""
    parameters, text = sum(p.numel() for p in model.parameters()), data.train.text.states
    kept = kept_bytes(model, cfg, data.vae)
    frozen = 4 * sum(p.numel() for p in data.vae.parameters()) if data.vae else 0
    layouts = memory_layouts(parameters, frozen, kept, cfg.dtype, world_size())
    clips = len(data.train.frames) + (len(data.held_out.frames) if data.held_out is not data.train else 0)
    frames = clips * cfg.frames * cfg.size**2 * 3 / GB if cfg.manifest or cfg.dataset else 0.0
    latents = clips * load(data.train.frames[0]).nbytes / GB if data.vae else 0.0
    reads = f"{cfg.text_encoder}, {text.shape[1]} numbers for each of {len(text)} " + (
        "tokens, by cross-attention" if cfg.text_mode == "cross" else "captions, by FiLM"
    )
    lines = [
        (
            "data",
            f"{cfg.manifest or cfg.dataset or GENERATED}: {len(data.train.frames)} clips to train on, "
            f"{len(data.held_out.frames)} to evaluate, {len(data.bad)} left out as bad; "
            f"{cfg.frames} frames of {cfg.size}x{cfg.size}, {data.fps:.3g} a second",
        ),
        ("text", reads if cfg.conditional else "none: --caption_dropout 1"),
        *(row_lines(data.train.captions, " | ".join) if cfg.conditional else []),
        (
            "model",
            f"UNet3DCond, base {cfg.base}, {parameters / 1e6:.2f} M parameters, all trained; predicts "
            f"{cfg.prediction} of {f'latents of {cfg.vae}' if cfg.vae else 'pixels'}, shift {cfg.shift:.3g}",
        ),
        steps_line(cfg, device, "clips"),
        ("cache", f"{cfg.cache_dir}: {frames:.2f} GB of frames, {latents:.2f} of latents, "
         f"{text.nbytes / GB:.2f} of text"),
    ]  # fmt: skip
    disk = 28 * (cfg.keep + 2) * parameters  # 28: see save()
    return show_plan(cfg, device, lines, layouts, memory_advice(model, data.vae, cfg), disk)


def update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    with torch.no_grad(), gathered(list(module.parameters())):
        names, weights = zip(*((name, p.float()) for name, p in module.named_parameters()))
        torch._foreach_lerp_([ema[name] for name in names], list(weights), 1 - decay)


def unet_of(cfg: Config, text: Text, vae: Any) -> UNet3DCond:
    sizes = cfg.base, cfg.levels, cfg.blocks, cfg.patch_size, cfg.text_mode, text.states.shape[1]
    return UNet3DCond(*sizes, vae.config.latent_channels if vae else 3)


def new_model(cfg: Config, data: Data) -> UNet3DCond:
    """With the weights of --init_from, if given; the same on every rank"""
    torch.manual_seed(cfg.seed)
    text, model = data.train.text, unet_of(cfg, data.train.text, data.vae)
    # of the captions that are trained on, some if there are many
    seen = sorted(set(itertools.chain.from_iterable(data.train.rows)))
    model.standardise(np.concatenate([text.of(row) for row in seen[:: max(1, len(seen) // 4096)]]))
    if cfg.init_from and not numbered(cfg.output_dir / "checkpoints", "step_"):  # else those count
        _, weights = trained_weights(cfg.init_from, "--init_from")
        fill(model, weights, f"--init_from {cfg.init_from}, with these flags and this text encoder")
    return model


def train(cfg: Config) -> None:
    from_flags, device = cfg, open_run(cfg)
    cfg = with_steps(dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype)), warmup=WARMUP)
    cfg = with_shift(with_encoders(cfg))
    data = load_data(cfg, device)
    model = new_model(cfg, data)
    layout = plan_of(cfg, model, data, device)
    if cfg.check:
        return
    clips = [data.train, data.held_out]
    contents = [(c, name_of(f)) for part in clips for c, f in zip(part.captions, part.frames)]
    encoders = {"text_encoder": from_flags.text_encoder, "vae": from_flags.vae}
    facts = {"data": fingerprint(contents)} | encoders
    run = start_run(from_flags, cfg, __file__, layout, data.bad, "mean squared error", **facts)
    model.checkpointing = layout.checkpointing
    if cfg.compile:
        model.compile()
    betas = (0.9, cfg.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True
    )
    engine = open_engine(run, model, optimizer)
    if run.checkpoint:
        ema = torch.load(run.checkpoint / "ema.pt", weights_only=True, map_location=device)
    else:
        ema = {name: weight.to(device) for name, weight in full_weights(engine.module, torch.float32).items()}
    with out_of_memory(partial(memory_advice, model, data.vae, cfg)):
        train_steps(cfg, run, engine, ema, data)
    model = averaged(engine.module, ema)
    finish_run(
        run,
        export=partial(export, cfg, ema, data),
        evaluate=partial(final_results, cfg, model, data),
        card=partial(card_of, cfg, data),
    )


def train_steps(cfg: Config, run: Run, engine: Any, ema: dict[str, Tensor], data: Data) -> None:
    device, alpha_bar = engine.device, cosine_alpha_bar(cfg.shift).to(engine.device)
    steps = training_steps(
        run,
        engine,
        save=partial(save, cfg, run, engine, ema, data),
        evaluate=partial(evaluate_at, cfg, engine.module, ema, data),
    )
    batches = batches_ahead(partial(get_batch, data.train, cfg), cfg, run.step)
    for (step, row), micro_batches in zip(steps, batches):
        row["loss"] = torch.zeros((), device=device)
        for micro, batch in enumerate(micro_batches):
            frames, text, mask = (part.to(device) for part in batch)
            seed = seed_of(cfg.seed, step, micro, rank())
            loss = diffusion_loss(engine, to_unit(frames), text, mask, alpha_bar, cfg, seed)
            engine.backward(loss)
            engine.step()  # skips the update, on all ranks, when a gradient is not finite
            row["loss"] += loss.detach() / cfg.accum
        if engine.was_step_applied():
            update_ema(ema, engine.module, min(cfg.ema, (2 + step) / (11 + step)))


def evaluate_at(
    cfg: Config, model: UNet3DCond, ema: dict[str, Tensor], data: Data, step: int
) -> dict[str, float]:
    """Every rank, in the middle of the run. -> what goes into metrics.jsonl"""
    losses = held_out_loss(averaged(model, ema), data, cfg)
    swapped, blind = losses["captions_swapped"], losses["blind"]
    told = f"held-out loss {losses['loss']:.4f} | swapped {swapped:.4f} | blind {blind:.4f}"
    log.info(f"eval step {step:06d} | {told}")
    return {f"held_out_{name}": value for name, value in losses.items()}


def save(cfg: Config, run: Run, engine: Any, ema: dict[str, Tensor], data: Data, step: int) -> None:
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

    save_weights()
    if not asked_to_stop():
        quick = dataclasses.replace(cfg, sample_steps=cfg.preview_steps or cfg.sample_steps)
        captions, rows = data.held_out.different_captions(4)
        pictures = sample_clips(averaged(engine.module, ema), data.held_out.text, rows, data.vae, quick)
        if rank() == 0:
            write_grid(pictures, captions, run.folder / "samples" / f"preview_step{step:06d}.png")


def averaged(model: UNet3DCond, ema: dict[str, Tensor]) -> UNet3DCond:
    """A plain fp32 copy of the model with the averaged weights, where these are, to sample from."""
    copy = UNet3DCond(**model.config)
    copy.load_state_dict(ema)
    return copy.to(next(iter(ema.values())).device).eval()


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


@on_rank0
def export(cfg: Config, ema: dict[str, Tensor], data: Data, target: Path) -> None:
    """model/: weights, and what samples depend on; encoders that came from a folder lie in it too"""
    from safetensors.torch import save_file

    target.mkdir(exist_ok=True)
    weights = {name: weight.cpu().contiguous() for name, weight in ema.items()}
    write_whole(target / "model.safetensors", lambda aside: save_file(weights, aside))
    config = {name: getattr(cfg, name) for name in KEPT} | {"fps": data.fps}
    if cfg.conditional and Path(cfg.text_encoder).is_dir():
        for part in open_encoder(cfg.text_encoder, torch.device("cpu")):
            part.save_pretrained(target / "text_encoder")
        config["text_encoder"] = "text_encoder"
    if data.vae and Path(cfg.vae).is_dir():
        data.vae.save_pretrained(target / "vae")
        config["vae"] = "vae"
    write_json(target / "config.json", config)
    copy_code(target, __file__)


def final_results(cfg: Config, model: UNet3DCond, data: Data) -> dict:
    """Every rank: what results.json says of the finished model; and model/samples.png, .mp4 and .gif"""
    results = evaluate(model, data, cfg)
    captions, rows = data.held_out.different_captions(6)
    pictures = sample_clips(model, data.held_out.text, rows, data.vae, cfg)
    if rank() == 0:
        write_samples(pictures, captions, cfg.output_dir / "model" / "samples", data.fps)
    return results


def card_of(cfg: Config, data: Data, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    clips = Path(cfg.manifest or cfg.dataset or GENERATED).name
    caption = json.dumps(data.held_out.captions[0][0])
    space = (
        f"latents of `{Path(cfg.vae).name if Path(cfg.vae).is_dir() else cfg.vae}`" if cfg.vae else "pixels"
    )
    encoder = f"`{cfg.text_encoder}`" if not Path(cfg.text_encoder).is_dir() else "a CLIP that lies here too"
    how = {
        "film": f"with FiLM on the text features of {encoder}",
        "cross": f"with cross-attention to {encoder}",
    }
    return {
        "about": f"A text-to-video diffusion model on {space}, {cfg.frames} frames of {cfg.size}x{cfg.size}: "
        f"a 3-D U-Net, {how[cfg.text_mode] if cfg.conditional else 'without captions'}, trained on {clips} "
        "by `t2v_ddpm.py`, which lies in this repository.",
        "usage": "from common import write_video\nfrom t2v_ddpm import generate\n\n"
        f'frames = generate({caption}, folder)  # uint8 (F, H, W, 3)\nwrite_video(frames, "sample")',
        "more": "![samples](samples.png)",
        "data": clips,
        "library_name": "pytorch",
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "ddpm", "deepspeed"],
    }


def kept_of(saved: dict) -> dict:
    return {name: saved[name] for name in KEPT if name in saved}


def trained_weights(source: str, flag: str) -> tuple[dict, dict[str, Tensor]]:
    """Of a run folder, finished or not, one of its checkpoints or ckpt_000200.pt, a model folder or a Hub id:
    (what of KEPT it was trained with, its averaged weights). Exit 2 when they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if (path / "model" / "model.safetensors").is_file():
        path /= "model"
    elif path.is_dir():
        path = [path, *path.glob("ema.pt"), *numbered(path, "ckpt_", ".pt")][-1]
    try:
        if path.is_file():
            weights = torch.load(path, weights_only=True, map_location="cpu")
            saved = read_json((path.parents[2] if path.name == "ema.pt" else path.parent) / "config.json")
            if saved.get("manifest") or saved.get("dataset"):
                auto = {"text_encoder": CLIP, "vae": VAE}
                saved |= {name: value for name, value in auto.items() if saved.get(name) == "auto"}
            return kept_of(saved), weights.get("ema", weights)
        folder = fetch_model(str(path), "*.json", "*.safetensors", "*.txt", flag=flag)
        saved = read_json(folder / "config.json")
        for name in ("text_encoder", "vae"):  # that lie in it
            inside = folder / str(saved.get(name))
            saved[name] = str(inside) if saved.get(name) and inside.is_dir() else saved.get(name, "")
        return kept_of(saved), load_file(folder / "model.safetensors")
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        hint = "give the --output_dir of a run that has saved, a ckpt_*.pt, or a folder or Hub id of a model"
        refuse(f"{flag} {source}: {brief(error)}; {hint}")


def sample_model(prompts: list[str], weights: dict[str, Tensor], cfg: Config) -> np.ndarray:
    """-> uint8 (N, F, H, W, 3). Exit 2 when the weights are of another model than cfg says."""
    cfg, device = with_shift(with_encoders(cfg)), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = open_vae(cfg.vae, device)[0] if cfg.vae else None
    text = clip_text(prompts, cfg.text_encoder, cfg.text_mode, device) if cfg.conditional else NO_CAPTION
    net = unet_of(cfg, text, vae)
    fill(net, weights, "the model, with these flags")
    rows = list(range(len(prompts))) if cfg.conditional else [0] * len(prompts)
    return sample_clips(net.to(device).eval(), text, rows, vae, cfg)


def generate(prompt: str, model: str | Path, seed: int = 0, **flags: Any) -> np.ndarray:
    """One clip for a caption from a model: uint8 (F, H, W, 3).

    model: a run folder, a model folder, a ckpt_000200.pt or a Hub id. flags: those of Config; what the model
    was trained with by default.
    """
    kept, weights = trained_weights(str(model), "model")
    return sample_model([prompt], weights, Config(report_to="none", seed=seed, **(kept | flags)))[0]


def sample_prompt(cfg: Config) -> None:
    """--prompt: <output_dir>/samples/<prompt>_seed0.mp4, .gif and .png, of each line if it is a file"""
    kept, weights = trained_weights(cfg.model or str(cfg.output_dir), "--model")
    cfg = read_flags(Config, __doc__, DEMO, VARIABLES, BARE, kept)  # flags win over what the model knows
    prompts = [cfg.prompt]
    if cfg.prompt.endswith(".txt"):
        try:
            lines = Path(cfg.prompt).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            refuse(f"--prompt {cfg.prompt}: {brief(error)}; a text file has a caption in each line")
        prompts = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    for prompt, clip in zip(prompts, sample_model(prompts, weights, cfg)):
        path = sample_path(cfg, prompt)
        write_samples(clip[None], [prompt], path, cfg.fps or 8)
        log.info(f"{path}.mp4, .gif, .png")


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, VARIABLES, BARE)
    sample_prompt(cfg) if cfg.prompt else train(cfg)


if __name__ == "__main__":
    run(main)
