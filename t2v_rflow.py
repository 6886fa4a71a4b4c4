# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "av==18.1.0", "beautifulsoup4==4.15.0", "datasets==5.2.0", "deepspeed==0.19.8", "diffusers==0.42.1",
#   "einops==0.8.2", "ftfy==6.3.1", "huggingface_hub==2.4.0", "matplotlib==3.11.2", "numpy==2.4.6",
#   "opencv-python-headless==5.0.0.93", "peft==0.21.2", "pillow==13.0.0", "requests==2.34.2",
#   "safetensors==0.8.0", "sentencepiece==0.2.3", "torch>=2.6", "tqdm==4.70.1", "transformers==5.23.0",
#   "tyro==1.0.17",
# ]
# ///
"""Text to video in latent space: Open-Sora 1.2 (ST-DiT, rectified flow, 3-D VAE, buckets) in one file.

    python t2v_rflow.py --demo                 # minutes on 2 CPU cores: moving shapes, two sizes, two lengths
    python t2v_rflow.py --manifest clips.csv --cache latents    # one GPU: fine-tune the published weights
    ./run.sh t2v_rflow.py 8 --manifest clips.csv --cache latents --recipe speed --stage 1
    python t2v_rflow.py --prompt "a dog runs"  # sample the finished model: mp4, gif and png
    python t2v_rflow.py --prompt "a dog runs" --image first.png # from a first frame; --extend clip.mp4: go on
    python t2v_rflow.py --watch runs/t2v_rflow # on another GPU: samples of each new checkpoint

MANIFEST is a table of videos and captions or a folder, in any of the forms that README.md lists (OpenVid,
MiraData and Panda-70M among them); --dataset takes an id of the Hub. Sizes, frame rates and lengths that it
does not say are read from the files; scores become part of the caption. Clips go into buckets by resolution,
length and aspect ratio; in one step each GPU may have another bucket, of equal cost. --recipe speed is that
of the 18,000-hour run.

--model takes hpcai-tech/OpenSora-STDiT-v3, Wan-AI/Wan2.1-T2V-1.3B-Diffusers (with its own VAE, UMT5 and
recipe), PixArt-Sigma's .pth, a file, folder, run or checkpoint with such weights, scratch or scratch-wan; the
model is exported under the same names, and Wan's LoRA also as diffusers loads it. --lora_r 16 trains LoRA.
--vae is the published 3-D VAE, diffusers' AutoencoderKLWan, or pixels. --cache encodes captions and clips
once; each clip then keeps its bucket and its frames in all epochs, and the cache is enough to train from:
without --manifest, where the videos are not.

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.

Measured: --demo, 8 minutes on 2 CPU cores: all five attributes right in .99 of 176 samples for captions never
seen, 0.00 with the captions shuffled. The published weights and a GPU: not yet measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

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
    CHECKPOINTING, GB, PICTURES, BadSample, Free, Layout, Lower, Row, Run, append_json, barrier,
    batches_ahead, brief, check_loaded, check_settings, check_weights, copy_code, data_name, decoded_frames,
    demo_module, digest_of, disk_free, epoch_order, fetch_model, fill, fingerprint, finish_run,
    from_all_ranks, gathered, identity_of, in_threads, leave_out, local_file, local_ranks, log, made_once,
    memory_layouts, merged_over_ranks, newest_checkpoint, number_of, numbered, on_rank0, open_engine,
    open_media, open_run, out_of_memory, over_ranks, packet_times, part_of, pick_dtype, rank, read_data,
    read_flags, read_json, refuse, rounds, row_lines, run, sample_path, save_array, save_run, saved_bytes,
    seed_of, show_plan, split_clips, start_run, stop_if_asked, timed_frames, tracker, training_steps,
    usable_cores, weights_key, with_steps, without_gc, world_size, write_json, write_samples, write_whole,
)  # fmt: skip

PUBLISHED = "hpcai-tech/OpenSora-STDiT-v3"
PIXART = "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-2K-MS.pth"  # a file of the Hub
VAES = {"opensora": "hpcai-tech/OpenSora-VAE-v1.2", "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
WARMUP = 1000  # steps, when --warmup_steps is not given
TIMESTEPS = 1000  # the model is told t * 1000; 1 is noise
IMAGE_FPS = 120.0  # what upstream tells the model of an image (IMG_FPS)
PIECE = 17  # frames that Open-Sora's VAE encodes together; trained with this alone
MICRO = 4  # pictures through a 2-D encoder or decoder at a time
# between the two halves of Open-Sora's VAE: Stable Diffusion's factor, not SDXL's 0.13025
SPATIAL_FACTOR = 0.18215
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on clips made on the spot: minutes on 2 CPU cores, no network
    check: Free[bool] = False  # all checks and the plan, no training
    output_dir: Free[Path] = Path("runs/t2v_rflow")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    # JSON, JSON lines, CSV, TSV or parquet of videos, captions and, if there, sizes and scores, or a folder
    manifest: Free[Path | None] = None
    dataset: Free[str] = ""  # of the Hub, ID[:config][:split], or a folder
    videos: Free[Path | None] = None  # folder of the videos; default: the manifest's
    # settings of a published run, at --stage; other flags win
    recipe: Literal["none", "speed", "full"] = "none"
    stage: Literal["1", "2", "3", "demo"] = "2"  # of Open-Sora's table of buckets
    # JSON of another table, {"240p": {"51": [probability, clips in a batch]}}
    buckets: Free[Path | None] = None
    tokens_per_gpu: Lower[int] = 110_000  # of a micro-batch, on 80 GB; lower this first when memory runs out
    # encode captions and clips once, into this folder; without it in each step
    cache: Free[Path | None] = None
    val_fraction: float = 0.02  # share of the videos held out
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Free[Path] = Path("cache")  # downloads
    streaming: Free[bool] = False  # remove what was downloaded once it is encoded: for what no disk holds
    num_workers: Free[int] = 0  # threads that decode; 0: one for each core that is this rank's

    # model

    # STDiT3 or Wan: Hub id, file of the Hub, folder, file, scratch or scratch-wan; default: the published
    # STDiT3, for --prompt <output_dir>/model
    model: str = ""
    vae: Literal["opensora", "wan", "pixels"] = "opensora"
    # Hub id or folder; default: hpcai-tech/OpenSora-VAE-v1.2, for wan Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    vae_model: str = ""
    text: Literal["t5", "words"] = "t5"  # words: fixed random directions, for the demo
    text_model: str = "DeepFloyd/t5-v1_1-xxl"  # Hub id or folder
    depth: int = 28  # of scratch: pairs of spatial and temporal blocks
    width: int = 1152  # of scratch
    heads: int = 16  # of scratch
    frame_places: bool = False  # of scratch: tell the model the number of each frame, see STDiT3; of
    # scratch-wan diffusers' pipeline does not
    lora_r: int = 0  # rank of LoRA on all linear layers of the blocks; 0: every weight is trained
    lora_alpha: int = 16
    caption_dropout: float = 0.1  # share of captions left out, for guidance
    mask_share: float = 0.25  # of clips with frames that are given: image to video, extension
    base_size: int = 512  # pixels a side that need no shift towards noise; 0: --shift is that of all sizes
    shift: float = 1.0  # factor of the shift by size and length
    gradient_checkpointing: Free[Literal["auto", "on", "off"]] = "auto"  # auto: when it does not fit without

    # optimisation

    steps: Free[int] = 0  # optimizer steps in all, over all resumes; 0: as many as --epochs are
    epochs: Free[float] = 1.0  # passes over the buckets
    accum: Lower[int] = 1  # micro-steps per optimizer step
    lr: Free[float] = 1e-4
    warmup_steps: Free[int | None] = None  # default: 1000, but at most a tenth of the steps
    lr_decay: bool = False  # to 0 at the last step, along a cosine
    weight_decay: float = 0.0
    beta2: float = 0.999  # of AdamW
    eps: float = 1e-15  # of AdamW
    clip: Free[float] = 1.0  # gradient norm limit
    ema: float = 0.99  # decay of the averaged weights, which are sampled and pushed
    # after the run, also try the mean of the last N checkpoints; the best by held-out loss is kept
    average: Free[int] = 0
    # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    # JSON file, or auto: what fits
    deepspeed: Free[Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])]] = "auto"

    # sampling

    prompt: Free[str] = ""  # sample this caption from --model and stop
    image: Free[Path | None] = None  # of --prompt: the first frame
    extend: Free[Path | None] = None  # of --prompt: a clip to go on with
    # sample each new checkpoint of this run folder, on another GPU or machine
    watch: Free[Path | None] = None
    resolution: Free[str] = "240p"
    ratio: Free[str] = "9:16"  # height to width
    frames: Free[int] = 51
    fps: Free[int] = 24
    sample_steps: Free[int] = 30
    guidance: Free[float] = 7.0  # 1 = none
    aes: Free[float] = 6.5  # aesthetic score that is asked for; 0: none

    # watching and saving

    log_every: Free[int] = 10
    eval_every: Free[int] = 500
    save_every: Free[int] = 200
    keep: Free[int] = 3  # newest checkpoints kept
    resume: Free[bool] = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Free[Literal["none", "tensorboard", "wandb"]] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: Free[bool] = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: Free[str] = "t2v_rflow"
    public: Free[bool] = False  # visibility of a new repository

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="tokens_per_gpu depth width heads accum frames fps sample_steps "
            "log_every eval_every save_every keep lora_alpha",
            at_least_0="steps lora_r base_size average warmup_steps num_workers",
            above_0="lr shift clip guidance eps epochs",
            shares="caption_dropout mask_share ema max_bad val_fraction",
        )
        if self.width % (4 * self.heads):
            raise ValueError(
                f"--width {self.width} must be a multiple of 4 x --heads {self.heads}: sines and cosines of "
                "two axes"
            )
        if self.streaming and not self.cache:
            raise ValueError("--streaming: each step would download its clips anew; give --cache too")
        if self.image and self.extend:
            raise ValueError("--image and --extend: give one of them")
        if (self.image or self.extend) and not self.prompt:
            raise ValueError("--image and --extend need --prompt")
        size_of(self.resolution, self.ratio)


# The demo is a preset: the same code with other numbers. Recipe and scores: README.md and
# benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/t2v_rflow_demo"), report_to="none", stage="demo",
    cache=Path("cache/t2v_rflow_demo_latents"), model="scratch", vae="pixels", text="words", depth=2,
    width=96, heads=4, frame_places=True, mask_share=0.1, base_size=12, shift=2.5,
    gradient_checkpointing="off", steps=3600, lr=3e-3, warmup_steps=50, lr_decay=True, beta2=0.99, eps=1e-8,
    ema=0.99, resolution="16p", ratio="1:1", frames=6, fps=8, sample_steps=20, guidance=3.0, aes=0.0,
    log_every=100, eval_every=1200, save_every=1200,
)  # fmt: skip
# Stages of two published runs; their buckets are Open-Sora's of that stage. Other flags win over these.
RECIPES = {
    # Lambda's Open-Sora tutorial (github.com/LambdaLabsML/Open-Sora, docs/tutorial): 192 H100, 18,000 GPU
    # hours, on OpenVid-1M, in stage 3 with MiraData; 2,210, 7,099 and 14,778 steps, from PixArt-Sigma on.
    # Stages 2 and 3 start from the stage before: give it as --model. Their table of buckets was not seen.
    "speed": {
        "1": dict(model=PIXART, epochs=5.0, lr=1.6e-4, warmup_steps=400, weight_decay=0.01, mask_share=0.2),
        "2": dict(epochs=5.0, lr=1.6e-4, warmup_steps=400, weight_decay=0.01, mask_share=0.25),
        "3": dict(epochs=5.0, lr=2e-4, warmup_steps=1000, weight_decay=0.01, mask_share=0.25),
    },
    # Open-Sora 1.2's own (its report and configs/opensora-v1-2/train/stage*.py): 96 H100, 30,000, 23,000 and
    # 15,000 steps
    "full": {
        "1": dict(epochs=2.0, lr=1e-4, warmup_steps=1000, mask_share=0.2),
        "2": dict(epochs=0.5, lr=1e-4, warmup_steps=1000, mask_share=0.2),
        "3": dict(steps=15_000, lr=1e-4, warmup_steps=1000, mask_share=0.25),
    },
}

# ---------------------------------------------------------------------------
# Data: buckets
# ---------------------------------------------------------------------------

# Height:width. The last is 50:27 upstream, whose own key, 2.08, is 25/12.
RATIOS = "3:8 9:21 12:25 1:2 9:17 27:50 9:16 5:8 2:3 3:4 1:1 4:3 3:2 16:9 17:9 2:1 25:12".split()
# Height x width in the order of RATIOS, as opensora/datasets/aspect.py (branch opensora/v1.2) has them: even
# sides of equal area save for 144p and six others that were set by hand, so a table and no formula.
PUBLISHED_SIZES = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 "
    "235x156 256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 "
    "392x262 426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 "
    "588x392 640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 "
    "740x555 784x522 854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 "
    "960x960 1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 "
    "1248x1664 1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
}
# PixArt's, of about 1024 x 1024. The tall ones are the wide ones on their side, save for 704x1344.
WIDE = (
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 "
    "704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024"
)


def sides(sizes: str) -> list[tuple[int, int]]:
    """ "196x522 210x490" -> [(196, 522), (210, 490)]"""
    return [tuple(map(int, size.split("x"))) for size in sizes.split()]


def pixart_sizes(share: float) -> dict[str, tuple[int, int]]:
    """{ratio: (height, width)} of 1024 * share pixels a side"""
    wide = sides(WIDE)
    tall = [(w, h) for h, w in reversed(wide) if (h, w) != (704, 1344)]
    sizes = {}
    for h, w in [*wide, (1024, 1024), *tall]:
        part = math.gcd(h, w)
        sizes[f"{h // part}:{w // part}"] = int(h * share), int(w * share)
    return sizes


SIZES = {name: dict(zip(RATIOS, sides(sizes), strict=True)) for name, sizes in PUBLISHED_SIZES.items()}
SIZES |= {name: pixart_sizes(int(name) / 1024) for name in ("256", "512", "1024", "2048")}

# {resolution: {frames: (keep, batch)}}: what a clip is resized to, with which probability, and how many to a
# batch on 80 GB; keep may be (of the resolution, of the length); batch None: keeps longer clips out. From
# configs/opensora-v1-2/train/stage{1,2,3}.py. One frame is an image.
Buckets = dict[str, dict[int, tuple[Any, int | None]]]
BUCKETS: dict[str, Buckets] = {
    "demo": {"12p": {4: (1.0, 12), 6: (1.0, 8)}, "16p": {4: (1.0, 7), 6: (1.0, 5)}},
    "1": {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13),
                 408: ((1.0, 0.1), 6)},
        "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 0.1), 5),
                408: ((0.5, 0.1), 2)},
        "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 0.1), 5),
                 408: ((0.4, 0.1), 2)},
        "360p": {1: (0.2, 141), 51: (0.15, 8), 102: ((0.15, 0.33), 4), 204: ((0.15, 0.1), 2),
                 408: ((0.15, 0.1), 1)},
        "512": {1: (0.1, 141)},
        "480p": {1: (0.1, 89)},
        "720p": {1: (0.05, 36)},
        "1024": {1: (0.05, 36)},
        "1080p": {1: (0.1, 5)},
        "2048": {1: (0.1, 5)},
    },
    "2": {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13),
                 408: ((1.0, 0.1), 6)},
        "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 1.0), 5),
                408: ((0.5, 1.0), 2)},
        "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 1.0), 5),
                 408: ((0.4, 1.0), 2)},
        "360p": {1: (0.5, 141), 51: (0.15, 8), 102: ((0.3, 0.5), 4), 204: ((0.3, 1.0), 2),
                 408: ((0.5, 0.5), 1)},
        "512": {1: (0.4, 141), 51: (0.15, 8), 102: ((0.2, 0.4), 4), 204: ((0.2, 1.0), 2),
                408: ((0.4, 0.5), 1)},
        "480p": {1: (0.5, 89), 51: (0.2, 5), 102: (0.2, 2), 204: (0.1, 1)},
        "720p": {1: (0.1, 36), 51: (0.03, 1)},
        "1024": {1: (0.1, 36), 51: (0.02, 1)},
        "1080p": {1: (0.01, 5)},
        "2048": {1: (0.01, 5)},
    },
    "3": {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: (1.0, 27), 204: (1.0, 13), 408: (1.0, 6)},
        "256": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.5), 2)},
        "240p": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.4), 2)},
        "360p": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.3), 1)},
        "512": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.2), 1)},
        "480p": {1: (1.0, 89), 51: (0.5, 5), 102: (0.5, 3), 204: ((0.5, 0.5), 1), 408: (0.0, None)},
        "720p": {1: (0.3, 36), 51: (0.2, 2), 102: (0.1, 1), 204: (0.0, None)},
        "1024": {1: (0.3, 36), 51: (0.1, 2), 102: (0.1, 1), 204: (0.0, None)},
        "1080p": {1: (0.1, 5)},
        "2048": {1: (0.05, 5)},
    },
}  # fmt: skip
PUBLISHED_TOKENS = 110_000  # of a batch on 80 GB: video rows of the tables hold 95,000 to 143,000
# steps sorted by cost together: stage 2 waits 10 % for its costliest of 192 ranks with 8, 2 % with 32
WINDOW = 32
ENOUGH = 0.8  # of a resolution's area: bucket.py's `approx`


def ratios_of(resolution: str) -> list[str]:
    """Its aspect ratios (H:W), wide to tall. Of a made-up one, as 16p, only 1:1."""
    return list(SIZES.get(resolution, ["1:1"]))


def typical_size(resolution: str) -> tuple[int, int]:
    """(height, width) of 9:16, of a square of PixArt's or a made-up resolution of 1:1. Or ValueError."""
    if resolution in SIZES:
        return SIZES[resolution].get("9:16") or SIZES[resolution]["1:1"]
    if resolution.endswith("p") and resolution[:-1].isdecimal() and int(resolution[:-1]):
        return int(resolution[:-1]), int(resolution[:-1])
    known = ", ".join(SIZES)
    raise ValueError(f"resolution {resolution}: one of {known}, or a side in pixels and p, as 16p")


def area_of(resolution: str) -> int:
    """Pixels: of 240p 102,240, of 512 262,144. Or ValueError."""
    return math.prod(typical_size(resolution))


def size_of(resolution: str, ratio: str) -> tuple[int, int]:
    """-> (height, width) in pixels; `ratio` is height:width, so 9:16 of 240p is (240, 426). Or ValueError."""
    typical = typical_size(resolution)
    if ratio not in ratios_of(resolution):
        known = ", ".join(ratios_of(resolution))
        raise ValueError(f"aspect ratio {ratio} (height:width) of {resolution}: one of {known}")
    return SIZES[resolution][ratio] if resolution in SIZES else typical


def tokens_of(codec: Any) -> Callable[[int, int, int], int]:
    """-> tokens of a clip (frames, height, width): 2 x 2 latents each"""

    def count(frames: int, height: int, width: int) -> int:
        rows, columns = (math.ceil(side // codec.space / 2) for side in (height, width))
        return codec.latent_frames(frames) * rows * columns

    return count


def published_tokens(frames: int, height: int, width: int) -> int:
    """Of a clip in Open-Sora 1.2"""
    return tokens_of(OpenSoraVAE)(frames, height, width)


def scaled(buckets: Buckets, tokens_per_gpu: int, codec: Any) -> Buckets:
    """`buckets` with upstream's batches in proportion to --tokens_per_gpu, and in inverse proportion to the
    tokens that a clip has with this codec. With upstream's codec and 110,000 tokens they are upstream's. A
    bucket whose single clip has over 4/3 of the tokens takes none: its clips go to shorter lengths and lower
    resolutions. Lengths become those that the codec has."""
    adapted: Buckets = {}
    for resolution, lengths in buckets.items():
        size = typical_size(resolution)
        adapted[resolution] = {}
        for frames, (keep, batch) in lengths.items():
            tokens = tokens_of(codec)(codec.whole_length(frames), *size)
            if batch and tokens > tokens_per_gpu * 4 / 3:
                keep, batch = (0.0, 0.0), None
            elif batch:
                share = tokens_per_gpu / PUBLISHED_TOKENS * published_tokens(frames, *size) / tokens
                batch = max(1, int(batch * share + 1e-6))
            adapted[resolution][codec.whole_length(frames)] = keep, batch
    return adapted


def read_buckets(path: Path) -> Buckets:
    """A table like BUCKETS[stage] from JSON, {"240p": {"51": [0.4, 20]}}. Exit 2 for any other."""
    table: Buckets = {}
    try:
        for resolution, lengths in read_json(path).items():
            area_of(resolution)
            table[resolution] = {int(frames): (keep, batch) for frames, (keep, batch) in lengths.items()}
            for frames, (keep, batch) in table[resolution].items():
                chances(resolution, frames, keep, batch)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        form = '{"240p": {"51": [0.4, 20]}}: probability, clips in a batch'
        refuse(f"--buckets {path}: {error}; a table has the form {form}")
    return table


# ---------------------------------------------------------------------------
# Data: manifest
# ---------------------------------------------------------------------------

# What may be said of a clip, and the columns that say it: Open-Sora's, OpenVid-1M's. It becomes part of the
# caption.
SCORES = {
    "aesthetic score": ("aes", "aesthetic score", "aesthetic_score"),
    "motion score": ("flow", "motion score", "motion_score"),
    "camera motion": ("cmotion", "camera motion", "camera_motion"),
}
SCORE_COLUMNS = dict.fromkeys(itertools.chain.from_iterable(SCORES.values()), "")
KEEP, SHUFFLE, CAPTION, FRAMES, MASKS, ENCODE, ORDER = range(1, 8)  # what random numbers are for


@dataclass(frozen=True)
class Table:
    """The numbers of N clips that the batches of an epoch are planned by."""

    num_frames: np.ndarray  # int32 (N,)
    height: np.ndarray  # int32 (N,), pixels, upright
    width: np.ndarray  # int32 (N,)
    fps: np.ndarray  # float32 (N,)

    def part(self, keep: np.ndarray) -> Table:
        return Table(*(column[keep] for column in (self.num_frames, self.height, self.width, self.fps)))


class Rows:
    """Rows as JSON in one file that all ranks of a machine map: as Python's objects a million take 2.6 GB in
    each of them."""

    def __init__(self, folder: Path, numbers: np.ndarray) -> None:
        """numbers: which of the folder's rows these are"""
        self.folder, self.numbers = folder, numbers
        self.ends = np.load(folder / "ends.npy", mmap_mode="r")
        self.content = np.memmap(folder / "rows.json", np.uint8, "r")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Row:
        (_, source, line, video, split), (texts, cells, *numbers) = self.said(i)
        return Row(source, line, video, texts, split, *numbers, tuple(cells))

    def said(self, i: int) -> list:
        at = int(self.numbers[i])
        said = self.content[int(self.ends[at - 1]) if at else 0 : int(self.ends[at])].tobytes()
        return [json.loads(line) for line in said.splitlines()]

    def identity(self, i: int) -> str:
        """Of the file as it was when it was read: path, size and time of change, or URL"""
        return self.said(i)[0][0]


def rng_of(use: int, *parts: int) -> np.random.Generator:
    """Random numbers that are a function of (use, seed, epoch, ...) alone, so a resumed run draws them again.
    `use` comes first, for numpy takes [1, 2] and [1, 2, 0] as one seed."""
    return np.random.default_rng([use, *parts])


def scores_of(row: Row) -> tuple[str, str, str]:
    """As SCORES, "" where unknown"""
    cells = dict(zip(SCORE_COLUMNS, row.cells))
    aes, flow, camera = (next(filter(None, map(cells.get, names)), None) for names in SCORES.values())
    camera = str(camera or "").replace("_", " ").strip().lower()
    told = (f"{value:.1f}" if (value := number_of(score)) else "" for score in (aes, flow))
    return (*told, "" if camera == "undetermined" else camera)


def probe(path: Path, start: float = 0.0, end: float = math.inf) -> tuple[int, int, int, float]:
    """-> (num_frames, height, width, fps) of a video, of a part of it in seconds, or of an image. Decodes one
    frame: the header alone does not say whether the picture lies on its side, nor whether it can be decoded
    at all. Raises BadSample."""
    with open_media(path) as (container, stream):
        image, fps = container.format.name in PICTURES.split(","), float(stream.average_rate or 0)
        count, frame = stream.frames, next(decoded_frames(container, stream), None)
    if frame is None:
        raise BadSample("no frame decodes")
    if image:
        count = 1
    elif not count or (start, end) != (0, math.inf):
        with open_media(path) as (container, stream):
            count = len(part_of(packet_times(container, stream)[1], start, end))
    if not count:
        raise BadSample(f"no frame from {start:g} to {end:g} s")
    if count > 1 and not fps:
        raise BadSample("does not say how many frames a second it has")
    height, width = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
    return count, height, width, IMAGE_FPS if count == 1 else fps


def clip_table(rows: list[Row], cfg: Config) -> tuple[list[Row], Table, list[dict]]:
    """-> (good rows, their Table, bad samples): what the data do not say is read from the files, in threads,
    and noted in cache_dir/looked_at, for a million of them take minutes."""

    def look(row: Row) -> tuple[int, int, int, float] | dict:
        try:
            with local_file(row.video, cfg) as path:
                seen = probe(path, row.start, row.end)
        except BadSample as error:
            return row.left_out(error)
        said = (0 if row.part else row.num_frames, row.height, row.width, row.fps)
        return tuple(of_data or of_file for of_data, of_file in zip(said, seen, strict=True))

    known: list = [
        (int(row.num_frames), int(row.height), int(row.width), IMAGE_FPS if row.num_frames == 1 else row.fps)
        for row in rows
    ]
    lacking = [i for i, numbers in enumerate(known) if rows[i].part or not all(numbers)]
    contents = ((row.video, row.start, row.end, *numbers) for row, numbers in zip(rows, known))
    noted = cfg.cache_dir / "looked_at" / f"{fingerprint(contents)}.npy" if lacking else None
    if noted and noted.exists():
        seen = {int(i): tuple(numbers) for i, *numbers in np.load(noted).tolist()}
        known = [seen.get(i, numbers) for i, numbers in enumerate(known)]
        lacking = [i for i in lacking if i not in seen]
    for i, numbers in zip(lacking, in_threads(look, [rows[i] for i in lacking], cfg, "look at")):
        known[i] = numbers
    good = [i for i, numbers in enumerate(known) if not isinstance(numbers, dict)]
    if lacking:
        save_array(noted, np.array([(i, *known[i]) for i in good], np.float64).reshape(-1, 5))
    columns = np.array([known[i] for i in good], np.float64).reshape(-1, 4).T
    table = Table(*columns[:3].astype(np.int32), columns[3].astype(np.float32))
    return [rows[i] for i in good], table, [numbers for numbers in known if isinstance(numbers, dict)]


def scored_caption(text: str, scores: tuple[str, str, str], rng: np.random.Generator | None) -> str:
    """The caption with those of its scores that it does not name, as upstream's inference appends them
    (append_score_to_prompts), "a dog runs aesthetic score: 5.5. motion score: 10.0. camera motion: pan left."
    Each is left out one time in five (tools/datasets/datautil.py), so that the model is at home without.
    `rng`: Source.rng; None leaves none out."""
    draws = rng.random(3) if rng else np.ones(3)
    for name, value, draw in zip(SCORES, scores, draws, strict=True):
        if value and draw >= 0.2 and f"{name}:" not in text:
            text = f"{text} {name}: {value}."
    return text


def frames_of(num_frames: int, frames: int, rng: np.random.Generator) -> range:
    """The frames of a clip that a bucket takes: `frames` in a row from a random one on. The last of all is
    left: headers often count one too many. `rng`: Source.rng. BadSample when the clip is shorter."""
    if num_frames < frames:
        raise BadSample(f"{num_frames} frames, at least {frames} needed")
    start = int(rng.integers(max(1, num_frames - frames)))
    return range(start, start + frames)


# ---------------------------------------------------------------------------
# Data: the batches of an epoch
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape."""

    resolution: str
    frames: int
    ratio: str  # height:width
    batch_size: int

    @property
    def size(self) -> tuple[int, int]:
        return size_of(self.resolution, self.ratio)

    @property
    def name(self) -> str:
        """Without the ratio, as losses and scores are told apart"""
        return f"{self.resolution}_{self.frames}"


@dataclass(frozen=True)
class Groups:
    """Batches of clips of one shape each."""

    buckets: tuple[Bucket, ...]
    rows: np.ndarray  # int64 (N,), of the table: batch after batch
    starts: np.ndarray  # int64 (B + 1,): batch b is rows[starts[b]:starts[b + 1]]
    bucket_of: np.ndarray  # int64 (B,), of each batch
    dropped: dict[str, int]  # clips that are in none, by reason

    def batch(self, b: int) -> tuple[Bucket, np.ndarray]:
        """-> (its shape, the rows of its clips)"""
        return self.buckets[self.bucket_of[b]], self.rows[self.starts[b] : self.starts[b + 1]]

    def others(self, b: int) -> Iterator[int]:
        """Rows of the other batches of its shape, the next ones first, to take the place of bad clips"""
        begin, end = (np.searchsorted(self.bucket_of, self.bucket_of[b], side) for side in ("left", "right"))
        before, first, after, last = self.starts[[begin, b, b + 1, end]]
        return map(int, itertools.chain(self.rows[after:last], self.rows[before:first]))

    def first_of_each(self, most: int) -> list[int]:
        """The first `most` batches of each resolution and length"""
        by_name: dict[str, list[int]] = {bucket.name: [] for bucket in self.buckets}
        for b, index in enumerate(self.bucket_of.tolist()):
            batches = by_name[self.buckets[index].name]
            if len(batches) < most:
                batches.append(b)
        return list(itertools.chain.from_iterable(by_name.values()))


@dataclass(frozen=True)
class Epoch(Groups):
    """What each rank trains on in each step of an epoch. Ranks may hold different shapes in one step."""

    order: np.ndarray  # int64 (steps, world), numbers of batches
    imbalance: float  # mean over steps of the costliest rank / the mean rank: what waiting for it costs
    imbalance_shuffled: float  # the same for upstream's order, a plain shuffle

    def table(self) -> str:
        """For people: clips and batches by resolution and length, then what is left out and why."""
        clips, used = np.diff(self.starts), self.order.ravel()
        counts: dict[tuple[str, int], tuple[int, int, int]] = {}
        for index, bucket in enumerate(self.buckets):
            here, key = used[self.bucket_of[used] == index], (bucket.resolution, bucket.frames)
            total, batches, largest = counts.get(key, (0, 0, 0))
            total, batches = total + clips[here].sum(), batches + len(here)
            counts[key] = total, batches, max(largest, bucket.batch_size)
        lines = [f"{'resolution':10} {'frames':>6} {'clips':>10} {'batches':>9} {'of':>5}"]
        for (resolution, frames), (total, batches, largest) in counts.items():
            lines.append(f"{resolution:10} {frames:6} {total:10,} {batches:9,} {largest:5}")
        return "\n".join([*lines, "left out:", dropped_text(self.dropped)])


def dropped_text(dropped: dict[str, int]) -> str:
    return "\n".join(f"  {reason:27} {count:12,}" for reason, count in dropped.items())


def assign(
    table: Table, buckets: Buckets, seed: int, epoch: int
) -> tuple[np.ndarray, list[tuple[str, int, str]], dict[str, int]]:
    """-> (int64 (N,), which of the cells each clip goes to, -1 for none; the cells, (resolution, frames,
    ratio); clips that go to none, by reason).

    The rules of Bucket.get_bucket_id (opensora/datasets/bucket.py): resolutions large to small, a clip having
    0.8 of the area; there lengths long to short, a clip having more frames, images going to images alone; the
    chance of the length passes it on to a shorter one, the chance of the resolution to a lower one; then the
    nearest ratio. The random numbers are other ones.
    """
    pixels, cells = table.height.astype(np.int64) * table.width, []
    cell, large, long = np.full(len(pixels), -1), np.zeros(len(pixels), bool), np.zeros(len(pixels), bool)
    aspects, which = np.unique(table.height / table.width, return_inverse=True)  # data sets have few
    for resolution in sorted(buckets, key=area_of, reverse=True):
        nearest = nearest_ratio(aspects, resolution)[which]
        fits = pixels >= ENOUGH * area_of(resolution)
        large |= fits
        looking = fits & (cell < 0)
        for frames in sorted(buckets[resolution], reverse=True):
            of_resolution, of_length = chances(resolution, frames, *buckets[resolution][frames])
            enough = fits & (table.num_frames == 1 if frames == 1 else table.num_frames > frames)
            long |= enough
            # One line a clip: its draw depends neither on the clips that follow nor on the other buckets.
            rng = rng_of(KEEP, seed, epoch, area_of(resolution), frames)
            draws = rng.random((len(pixels), 2), np.float32)
            here = looking & enough & (draws[:, 0] < of_length)
            looking &= ~here
            taken = here & (draws[:, 1] < of_resolution)
            cell[taken] = len(cells) + nearest[taken]
            cells += [(resolution, frames, ratio) for ratio in ratios_of(resolution)]
    videos = any(frames > 1 for frames in itertools.chain.from_iterable(buckets.values()))
    readable = table.num_frames > 0
    unfit = {
        "cannot be read": ~readable,
        "too small": readable & ~large,
        "no longer than a bucket" if videos else "not an image": readable & large & ~long,
        "kept out by probability": long & (cell < 0),
    }
    return cell, cells, {reason: int(mask.sum()) for reason, mask in unfit.items()}


def nearest_ratio(aspects: np.ndarray, resolution: str) -> np.ndarray:
    """Heights / widths -> which of ratios_of is nearest to each, by two digits, as upstream's keys have
    them"""
    sides = (ratio.split(":") for ratio in ratios_of(resolution))
    keys = np.array([round(int(h) / int(w), 2) for h, w in sides])
    return np.abs(keys - aspects[:, None]).argmin(1)


def chances(resolution: str, frames: int, keep: Any, batch: int | None) -> tuple[float, float]:
    """A bucket's probabilities, by resolution and by length. ValueError for what is none."""
    of_resolution, of_length = keep if isinstance(keep, tuple | list) else (keep, 1.0)
    takes = of_resolution * of_length
    if 0 <= of_resolution <= 1 and 0 <= of_length <= 1 and ((batch or 0) >= 1 or not takes):
        return of_resolution, of_length
    raise ValueError(f"bucket {resolution}, {frames} frames, {keep}, {batch}: (probability, 1 clip or more)")


def imbalance(costs: np.ndarray, order: np.ndarray) -> float:
    """costs (B,) of batches, order (steps, world) -> mean over steps of the costliest rank / the mean rank"""
    return float((costs[order].max(1) / costs[order].mean(1)).mean())


def group(table: Table, buckets: Buckets, seed: int, epoch: int) -> Groups:
    """The clips that go to a bucket, in batches of one shape. No clip comes twice.

    A group of one shape drops the clips that do not fill its last batch: others are left out in the next
    epoch. A group smaller than one batch is one smaller batch, for its clips would else never be seen.
    """
    cell, cells, dropped = assign(table, buckets, seed, epoch)
    rows = rng_of(SHUFFLE, seed, epoch).permutation(len(cell))
    rows = rows[cell[rows] >= 0]
    # a radix sort: shuffled inside each cell
    rows = rows[np.argsort(cell[rows].astype(np.int16), kind="stable")]
    counts = np.bincount(cell[rows], minlength=len(cells))
    sizes = np.array([buckets[resolution][frames][1] or 0 for resolution, frames, _ in cells])
    sizes = np.where(counts < sizes, counts, sizes)
    batches = counts // np.maximum(sizes, 1)
    used = np.flatnonzero(batches)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each row in its group
    whole = place < np.repeat(batches * sizes, counts)
    bucket_of = np.repeat(np.arange(len(used)), batches[used])
    starts = np.concatenate([[0], np.cumsum(sizes[used][bucket_of])])
    dropped["remainder of a batch"] = int((~whole).sum())
    shapes = tuple(Bucket(*cells[i], int(sizes[i])) for i in used)
    return Groups(shapes, rows[whole], starts, bucket_of, dropped)


def plan_epoch(
    table: Table,
    buckets: Buckets,
    seed: int,
    epoch: int,
    world: int,
    cost: Callable[[int, int, int], float] = published_tokens,
) -> Epoch:
    """The epoch's batches in the order of training, a function of its arguments alone: (epoch, step) is all
    that a resume needs. `cost` of one clip of (frames, height, width), in any unit. Exit 2 without a batch
    for each rank."""
    groups = group(table, buckets, seed, epoch)
    count, dropped = len(groups.bucket_of), groups.dropped
    steps, clips = count // world, len(groups.rows)
    counted = f"of {len(table.fps):,} clips\n{dropped_text(dropped)}\n  {'trained on':27} {clips:12,}"
    if not clips:
        refuse(
            f"no batch to train on: {counted}\n"
            "take buckets with smaller resolutions, shorter lengths or higher probabilities"
        )
    if not steps:
        refuse(
            f"{count} batches for {world} ranks, each needs one in a step: {counted}\n"
            f"take {count} GPUs at most, smaller batches (--tokens_per_gpu), or more clips"
        )
    costs = np.array([cost(b.frames, *b.size) * b.batch_size for b in groups.buckets], np.float64)
    costs, rng = costs[groups.bucket_of], rng_of(ORDER, seed, epoch)
    shuffled = rng.permutation(count)
    dropped["remainder of a step"] = int(np.diff(groups.starts)[shuffled[steps * world :]].sum())
    shuffled = shuffled[: steps * world]
    # Ranks of a step are to cost the same: windows of batches are sorted by cost and cut into steps. These
    # are shuffled, or each window would go from cheap to dear, and so are the ranks in each, or the last
    # would always have the costliest.
    window = np.arange(steps * world) // (WINDOW * world)
    order = shuffled[np.lexsort((costs[shuffled], window))].reshape(steps, world)
    order = rng.permuted(order[rng.permutation(steps)], axis=1)
    ours, theirs = imbalance(costs, order), imbalance(costs, shuffled.reshape(steps, world))
    return Epoch(*(getattr(groups, f.name) for f in dataclasses.fields(Groups)), order, ours, theirs)


# ---------------------------------------------------------------------------
# Codec: pictures <-> latents. OpenSoraVAE, WanVAE and Pixels have one interface:
#   name, key (of its weights), channels (of the latents), space (pixels that a latent has in height and in
#   width), latent_frames(n) -> T, whole_length(n): the longest length up to n that it has,
#   encode(clips, generators=None): uint8 (B, F, H, W, 3) -> float32 (B, C, T, H // space, W // space),
#     normalised for the transformer; the posterior's mean, or with a generator (on the CPU) for each clip a
#     sample, the same in any batch. Rows and columns
#     beyond a multiple of `space` make no latent (as upstream, 240x426 has 30x53): nothing is padded or
#     cropped, the last convolutions see what they reach.
#   decode(latents, frames): the way back, uint8 (B, frames, h * space, w * space, 3).
# ---------------------------------------------------------------------------


def config_and_weights(
    source: str, meta: bool, flag: str, hint: str, file: str = "model.safetensors", below: str = ""
) -> tuple[Path, dict, dict[str, Tensor]]:
    """-> (folder, config.json, `file` or, for `meta`, {}) of a folder or Hub id, where they may lie in its
    folder `below`. Exit 2 when they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = ["config.json"] if meta else ["config.json", file]
    folder = fetch_model(source, *names, *(str(Path(below, name)) for name in names), flag=flag)
    folder = folder / below if (folder / below).is_dir() else folder
    try:
        return folder, read_json(folder / "config.json"), {} if meta else load_file(folder / file)
    except (OSError, SafetensorError) as error:
        refuse(f"{flag} {source}: {brief(error)}; {hint}")


Generators = list[torch.Generator] | None


def signed(clips: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) in 0..255 -> float32 (..., 3, H, W) in [-1, 1]"""
    return clips.movedim(-1, -3).float() / 127.5 - 1


def unsigned(x: Tensor) -> Tensor:
    """float (..., 3, H, W), clipped to [-1, 1] -> uint8 (..., H, W, 3) in 0..255"""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def draw(moments: Tensor, generators: Generators) -> Tensor:
    """moments (B, 2C, ...), the posterior's mean and log variance -> (B, C, ...), the mean, or of each clip a
    sample by its generator"""
    mean, logvar = moments.chunk(2, dim=1)
    if generators is None:
        return mean
    noise = torch.stack([torch.randn(m.shape, generator=g) for m, g in zip(mean, generators, strict=True)])
    return mean + noise.to(mean) * (logvar.clamp(-30, 20) / 2).exp()


def check_length(codec: Any, latents: Tensor, frames: int) -> None:
    count = codec.latent_frames(frames)
    if latents.shape[2] != count:
        raise ValueError(f"{frames} frames are {count} latent frames, not {latents.shape[2]}")


class CausalConv(nn.Module):
    """A 3-D convolution that sees no later frame: zeros before the first one, none after the last."""

    def __init__(self, inner: int, outer: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.before, side = kernel - stride, kernel // 2
        self.conv = nn.Conv3d(inner, outer, kernel, stride=(stride, 1, 1), padding=(0, side, side), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, h, w) -> (B, C', T / stride, h, w)"""
        return self.conv(F.pad(x, (0, 0, 0, 0, self.before, 0)))


class CausalResBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inner), nn.GroupNorm(32, outer)
        self.conv1, self.conv2 = CausalConv(inner, outer, bias=False), CausalConv(outer, outer, bias=False)
        self.conv3 = nn.Identity() if inner == outer else CausalConv(inner, outer, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(inside)))


def res_blocks(inner: int, outer: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(CausalResBlock(outer if i else inner, outer) for i in range(count)))


class TemporalEncoder(nn.Module):
    """Four levels; after the second and the third the frames are halved. The list conv_blocks starts with an
    idle place, for the first level halves nothing and the checkpoint counts it."""

    def __init__(self, filters: int, blocks: int) -> None:
        super().__init__()
        a, b, c, d = (filters * m for m in (1, 2, 2, 4))
        levels = ((a, a), (a, b), (b, c), (c, d))
        halving = [CausalConv(b, b, stride=2), CausalConv(c, c, stride=2)]
        self.conv_in = CausalConv(4, a, bias=False)
        self.block_res_blocks = nn.ModuleList(res_blocks(*widths, blocks) for widths in levels)
        self.conv_blocks = nn.ModuleList([nn.Identity(), *halving])
        self.res_blocks, self.norm1 = res_blocks(d, d, blocks), nn.GroupNorm(32, d)
        self.conv2 = CausalConv(d, 8, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, T, h, w), T a multiple of 4 -> (B, 8, T/4, h, w)"""
        x = self.conv_in(x)
        for i, level in enumerate(self.block_res_blocks):
            x = level(x)
            if i in (1, 2):
                x = self.conv_blocks[i](x)
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class TemporalDecoder(nn.Module):
    """The encoder's mirror: its levels from the last to the first. Where that halved the frames, a
    convolution makes twice the channels and each pair of them becomes two frames."""

    def __init__(self, filters: int, blocks: int) -> None:
        super().__init__()
        a, b, c, d = (filters * m for m in (1, 2, 2, 4))
        levels = ((b, a), (c, b), (d, c), (d, d))
        self.conv1, self.res_blocks = CausalConv(4, d), res_blocks(d, d, blocks)
        self.block_res_blocks = nn.ModuleList(res_blocks(*widths, blocks) for widths in levels)
        self.conv_blocks = nn.ModuleList([nn.Identity(), CausalConv(c, 2 * c), CausalConv(d, 2 * d)])
        self.norm1, self.conv_out = nn.GroupNorm(32, a), CausalConv(a, 4)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 4, T, h, w) -> (B, 4, 4T, h, w)"""
        x = self.res_blocks(self.conv1(z))
        for i in (3, 2, 1, 0):
            x = self.block_res_blocks[i](x)
            if i in (3, 2):
                x = rearrange(self.conv_blocks[i - 1](x), "b (c two) t h w -> b c (t two) h w", two=2)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """4 frames of 2-D latents <-> one latent, after MAGVIT-2 (Yu et al. 2023, arXiv 2310.05737)."""

    def __init__(self, filters: int, blocks: int) -> None:
        super().__init__()
        self.encoder, self.decoder = TemporalEncoder(filters, blocks), TemporalDecoder(filters, blocks)
        self.quant_conv, self.post_quant_conv = CausalConv(8, 8, kernel=1), CausalConv(4, 4, kernel=1)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 4, F, h, w) -> moments (B, 8, ceil(F / 4), h, w); zeros in front make F a multiple of 4"""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % 4, 0))))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """(B, 4, T, h, w) -> (B, 4, frames, h, w), without the frames that were zeros in front"""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames:]


def clips_at_once(frames: int) -> int:
    """How many clips of `frames` frames the temporal half takes: 4 whole pieces, but 68 pictures"""
    return max(1, MICRO * PIECE // frames)


class OpenSoraVAE(nn.Module):
    """Open-Sora 1.2's VAE, 4 channels, 4 x 8 x 8 (opensora/models/vae/vae.py of its branch v1.2), with the
    published state dict: an image VAE of SDXL's layout for each frame, then TemporalVAE for each piece of 17
    frames, by itself.

    GroupNorm takes its statistics over a whole piece, so a frame that changes changes all latents of its
    piece, and no other.
    """

    name, key, channels, space = "opensora", "", 4, 8

    def __init__(
        self,
        filters: int = 128,
        blocks: int = 4,
        image_filters: tuple[int, ...] = (128, 256, 512, 512),
        image_blocks: int = 2,
    ) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        levels = len(image_filters)
        image = AutoencoderKL(
            block_out_channels=tuple(image_filters), layers_per_block=image_blocks, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        )  # fmt: skip
        # upstream's wrapper, whose name stands in the keys
        self.spatial_vae = nn.ModuleDict({"module": image})
        self.temporal_vae = TemporalVAE(filters, blocks)
        self.register_buffer("shift", torch.tensor([-0.10, 0.34, 0.27, 0.98]).view(1, 4, 1, 1, 1))
        self.register_buffer("scale", torch.tensor([3.85, 2.32, 2.33, 3.06]).view(1, 4, 1, 1, 1))

    @staticmethod
    def whole_length(n: int) -> int:
        return n

    @staticmethod
    def latent_frames(n: int) -> int:
        return n // PIECE * 5 + -(n % PIECE // -4)

    @torch.no_grad()
    def encode(self, clips: Tensor, generators: Generators = None) -> Tensor:
        """See above. With generators both posteriors are sampled, as upstream always does."""
        image, like, pieces = self.spatial_vae["module"], self.temporal_vae.quant_conv.conv.weight, []
        for piece in clips.split(PIECE, dim=1):
            parts = [
                image.encode(signed(pictures.to(like.device)).to(like)).latent_dist.parameters
                for pictures in piece.flatten(0, 1).split(MICRO)
            ]
            moments = torch.cat(parts).unflatten(0, piece.shape[:2]).transpose(1, 2)  # (B, 8, F, h, w)
            x = draw(moments, generators) * SPATIAL_FACTOR
            halves = [self.temporal_vae.encode(part) for part in x.split(clips_at_once(x.shape[2]))]
            pieces.append(draw(torch.cat(halves), generators))
        return (torch.cat(pieces, dim=2).float() - self.shift.float()) / self.scale.float()

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int) -> Tensor:
        check_length(self, latents, frames)
        image, like, clips = self.spatial_vae["module"], self.temporal_vae.quant_conv.conv.weight, []
        z = (latents.to(like.device).float() * self.scale.float() + self.shift.float()).to(like)
        for i, piece in enumerate(z.split(5, dim=2)):
            count = min(PIECE, frames - i * PIECE)
            parts = piece.split(clips_at_once(count))
            x = torch.cat([self.temporal_vae.decode(rows, count) for rows in parts])
            flat = (x / SPATIAL_FACTOR).transpose(1, 2).flatten(0, 1)
            pictures = torch.cat([unsigned(image.decode(part).sample) for part in flat.split(MICRO)])
            clips.append(pictures.unflatten(0, (len(latents), count)))
        return torch.cat(clips, dim=1)

    @classmethod
    def load(cls, source: str, meta: bool = False) -> OpenSoraVAE:
        """From a Hub id or a folder with config.json and model.safetensors; in fp32, frozen, on the CPU. Exit
        2 unless each of the weights is there, in its shape, and nothing else. `meta`: its sizes alone, on
        the meta device."""
        hint = f"{VAES['opensora']} is the published VAE"
        folder, config, weights = config_and_weights(source, meta, "--vae_model", hint)
        frames = config.get("micro_frame_size") or PIECE
        if frames != PIECE:
            refuse(f"{source}: micro_frame_size is {frames}; this script knows pieces of {PIECE} frames")
        with torch.device("meta"):  # weights are not drawn that the file replaces
            codec = cls(**config.get("sizes", {}))  # the published file has none
        if meta:
            return codec
        fill(codec, weights, f"--vae_model {source}")
        codec.key = weights_key(folder)
        return codec.float().eval().requires_grad_(False)


class WanVAE(nn.Module):
    """Wan 2.1's VAE, 16 channels, 4 x 8 x 8, clips of 4n + 1 frames (arXiv 2503.20314), for scratch."""

    name, key = "wan", ""

    def __init__(self, vae: Any) -> None:
        """vae: diffusers' AutoencoderKLWan"""
        super().__init__()
        self.vae, self.channels, self.space = vae, vae.config.z_dim, vae.config.scale_factor_spatial
        for key, value in (("mean", vae.config.latents_mean), ("std", vae.config.latents_std)):
            self.register_buffer(key, torch.tensor(value).view(1, -1, 1, 1, 1), persistent=False)

    @staticmethod
    def whole_length(n: int) -> int:
        return (n - 1) // 4 * 4 + 1

    @staticmethod
    def latent_frames(n: int) -> int:
        """Exit 2 for a length that Wan's VAE does not have."""
        if n % 4 != 1:
            refuse(f"{n} frames: Wan's VAE takes 4n + 1 of them; {n + (1 - n) % 4} is the next such number")
        return n // 4 + 1

    @torch.no_grad()
    def encode(self, clips: Tensor, generators: Generators = None) -> Tensor:
        """See above; diffusers takes 4 frames at a time and keeps what the convolutions remember."""
        self.latent_frames(clips.shape[1])
        like, z = next(self.vae.parameters()), []
        for rows in clips.split(max(1, MICRO // clips.shape[1])):
            x = signed(rows.to(like.device)).to(like).transpose(1, 2)
            z.append(self.vae.encode(x).latent_dist.parameters)
        return (draw(torch.cat(z), generators).float() - self.mean.float()) / self.std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int) -> Tensor:
        check_length(self, latents, frames)
        like, clips = next(self.vae.parameters()), []
        z = (latents.to(like.device).float() * self.std.float() + self.mean.float()).to(like)
        for rows in z.split(max(1, MICRO // frames)):
            clips.append(unsigned(self.vae.decode(rows).sample.transpose(1, 2)))
        return torch.cat(clips)

    @classmethod
    def load(cls, source: str, meta: bool = False) -> WanVAE:
        """From a Hub id or a folder of diffusers' layout, the VAE in it or below vae/; else as above."""
        from diffusers import AutoencoderKLWan

        file, hint = "diffusion_pytorch_model.safetensors", f"{VAES['wan']} has a VAE that fits"
        folder, config, weights = config_and_weights(source, meta, "--vae_model", hint, file, "vae")
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(config)
        if meta:
            return cls(vae)
        fill(vae, weights, f"--vae_model {source}")
        codec = cls(vae).float().eval().requires_grad_(False)
        codec.key = weights_key(folder)
        return codec


class Pixels(nn.Module):
    """No codec: the pictures themselves, for the demo. They stay on their device."""

    name, key, channels, space = "pixels", "", 3, 1
    whole_length = latent_frames = staticmethod(int)  # any

    def encode(self, clips: Tensor, generators: Generators = None) -> Tensor:
        return signed(clips).transpose(1, 2)

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        check_length(self, latents, frames)
        return unsigned(latents.transpose(1, 2))


# ---------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------

# STDiT3-XL/2 as published; a size is these with other numbers. frame_places is ours.
XL = dict(
    depth=28, hidden_size=1152, num_heads=16, mlp_ratio=4.0, in_channels=4, pred_sigma=True,
    caption_channels=4096, model_max_length=300, input_sq_size=512, frame_places=False,
)  # fmt: skip


class HeadNorm(nn.Module):
    """Over each head's width, in fp32; the weight after the cast, as upstream has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype)


MOST_SEQUENCES = 65_535  # in one call of the attention kernels: CUDA's limit on a grid's second dimension


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of sequences (N, heads, L, D). Of one token each it is the value; queries and keys stay in the graph,
    with gradients of 0, or ranks would reduce different ones."""
    if q.shape[2] == 1:
        return v + 0 * (q + k)
    parts = zip(*(u.split(MOST_SEQUENCES) for u in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


class SelfAttention(nn.Module):
    """Self-attention (N, L, C) with normalised queries and keys, turned by place in time with `rope`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = HeadNorm(width // heads), HeadNorm(width // heads)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n l (three h d) -> three n h l d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = turn(q, rope), turn(k, rope)
        return self.proj(rearrange(attention(q, k, v), "n h l d -> n l (h d)"))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of interleaved pairs: x (N, H, L, D), angles (L, D/2)"""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


class CrossAttention(nn.Module):
    """Every token of a clip attends to its caption's; padding is masked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, C), y (B, L, C), mask (B, 1, 1, L) bool"""
        q = rearrange(self.q_linear(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv_linear(y), "b l (two h d) -> two b h l d", two=2, h=self.heads)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(heads, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention over space (the tokens of a frame) or time (one place over the frames), cross-attention, MLP;
    the first and the last are shifted, scaled and gated by the time of each frame (adaLN-single, PixArt-alpha
    section 2.3)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn, self.cross_attn = SelfAttention(width, heads), CrossAttention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, t: Tensor, rope: Tensor) -> Tensor:
        """x (B, T, S, C), y (B, L, C), t (B, T, 6, C) of each frame -> x's shape"""
        frames, width = x.shape[1], x.shape[-1:]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            (self.scale_shift_table + t).to(x.dtype).unsqueeze(2).unbind(3)
        )
        h = F.layer_norm(x, width, eps=1e-6) * (1 + scale) + shift  # (B, T, 1, C) each
        if self.temporal:
            h = rearrange(
                self.attn(rearrange(h, "b t s c -> (b s) t c"), rope), "(b s) t c -> b t s c", s=x.shape[2]
            )
        else:
            h = rearrange(
                self.attn(rearrange(h, "b t s c -> (b t) s c"), None), "(b t) s c -> b t s c", t=frames
            )
        x = x + gate * h
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).unflatten(1, (frames, -1))
        h = F.layer_norm(x, width, eps=1e-6) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.mlp(h)


class NumberEmbedder(nn.Module):
    """A number -> (N, C): 256 cosines and sines (cosines first, period 10^4), then an MLP. The number is
    rounded to the weights' dtype, as upstream trained: in bf16 times above 512 are multiples of 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000) * torch.arange(128, device=x.device) / 128)
        dtype = self.mlp[0].weight.dtype
        angles = x.to(dtype).float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(dtype))


def frame_places(frames: int, width: int, device: Any) -> Tensor:
    """Sines and cosines of each frame's number, (T, C)"""
    rates = 10_000 ** -(torch.arange(width // 2, device=device) / (width // 2))
    angles = torch.arange(frames, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class STDiT3(nn.Module):
    """Spatial-temporal diffusion transformer of Open-Sora 1.2, under the names of
    hpcai-tech/OpenSora-STDiT-v3.

    It sees only how far frames lie apart (the rotation of temporal attention), not which is the first.
    frame_places adds sines and cosines of each frame's number to its tokens, without a weight: from scratch,
    motion is then learned several times sooner (benchmarks/RESULTS.md). The published weights were trained
    without.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.config = c = XL | sizes
        width, heads, depth = c["hidden_size"], c["num_heads"], c["depth"]
        self.out_channels = c["in_channels"] * (2 if c["pred_sigma"] else 1)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv3d(c["in_channels"], width, (1, 2, 2), (1, 2, 2))
        self.t_embedder, self.fps_embedder = NumberEmbedder(width), NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Module()
        self.y_embedder.y_proj = MLP(c["caption_channels"], width, width)
        no_caption = torch.randn(c["model_max_length"], c["caption_channels"]) / c["caption_channels"] ** 0.5
        self.y_embedder.register_buffer("y_embedding", no_caption)
        self.rope = nn.Module()
        head = width // heads
        rates = 10_000 ** -(torch.arange(0, head, 2).float() / head)
        self.rope.freqs = nn.Parameter(rates, requires_grad=False)
        blocks = partial(Block, width, heads, c["mlp_ratio"])
        self.spatial_blocks = nn.ModuleList(blocks(temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(blocks(temporal=True) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, 4 * self.out_channels)
        self.final_layer.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.checkpointing = False
        self.initialise()

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for embedder in (self.t_embedder, self.fps_embedder):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        nn.init.zeros_(self.fps_embedder.mlp[2].weight)
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        for block in self.temporal_blocks:  # starts as a model of images
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def places(self, h: int, w: int, pixels: float, device: Any) -> Tensor:
        """Sines and cosines of column and row (h * w, C), as if its sides had input_sq_size pixels"""
        width, base = self.config["hidden_size"], round(math.sqrt(h * w))
        scale = pixels / self.config["input_sq_size"]
        rates = 10_000 ** -(torch.arange(0, width // 2, 2, device=device).float() / (width // 2))
        rows, columns = (torch.arange(n, device=device) / scale * base / n for n in (h, w))
        angles = [u.flatten()[:, None] * rates for u in torch.meshgrid(rows, columns, indexing="ij")]
        return torch.cat([angles[1].sin(), angles[1].cos(), angles[0].sin(), angles[0].cos()], 1)

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor, mask: Tensor, fps: Tensor, pixels: float,
        x_mask: Tensor | None = None, drop: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, C, T, H, W) latents, timesteps (B,) in [0, 1000], y (B, L, D) caption states and mask (B, L)
        of the real ones, fps (B,), pixels sqrt(height * width) of the video. x_mask (B, T) bool: False for
        frames that are given, clean, and so of time 0; drop (B,) bool: clips whose caption is left out. ->
        (B, C_out, T, H, W) float32"""
        frames, height, width = x.shape[2:]
        dtype = self.x_embedder.proj.weight.dtype
        x = F.pad(x.to(dtype), (0, width % 2, 0, height % 2))
        h, w = x.shape[3] // 2, x.shape[4] // 2
        x = rearrange(self.x_embedder.proj(x), "b c t h w -> b t (h w) c")
        x = x + self.places(h, w, pixels, x.device).to(dtype)
        if self.config["frame_places"]:
            x = x + frame_places(frames, x.shape[-1], x.device)[:, None].to(dtype)
        # of frames that are predicted, of those that are given
        times = torch.stack([timesteps, torch.zeros_like(timesteps)])
        t = self.t_embedder(times.flatten()).unflatten(0, (2, -1)) + self.fps_embedder(fps)  # (2, B, C)
        t6 = self.t_block(t).unflatten(-1, (6, -1))  # (2, B, 6, C)
        if x_mask is None:
            x_mask = torch.ones(len(timesteps), frames, dtype=torch.bool, device=x.device)
        t = torch.where(x_mask[..., None], t[0][:, None], t[1][:, None])  # (B, T, C)
        t6 = torch.where(x_mask[..., None, None], t6[0][:, None], t6[1][:, None])
        y = y.to(dtype)
        if drop is not None:
            y = torch.where(drop[:, None, None], self.y_embedder.y_embedding[: y.shape[1]].to(dtype), y)
        y, mask = self.y_embedder.y_proj(y), mask[:, None, None]
        rope = torch.arange(frames, device=x.device)[:, None] * self.rope.freqs.float()
        for pair in zip(self.spatial_blocks, self.temporal_blocks):
            for block in pair:
                if self.checkpointing and self.training:
                    x = checkpoint(block, x, y, mask, t6, rope, use_reentrant=False)
                else:
                    x = block(x, y, mask, t6, rope)
        shift, scale = (self.final_layer.scale_shift_table + t[:, :, None]).to(dtype).unsqueeze(2).unbind(3)
        x = self.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = rearrange(x, "b t (h w) (p q c) -> b c t (h p) (w q)", h=h, w=w, p=2, q=2)
        return x[..., :height, :width].float()


# ---------------------------------------------------------------------------
# Model: Wan 2.1 and 2.2, diffusers' class as STDiT3 is called
# ---------------------------------------------------------------------------

# What training of Wan's weights differs in: --vae_model and --text_model are those beside them; times are
# shifted alike for all sizes; no frames are given (Wan2.2-TI2V knows how; --mask_share 0.25 trains it).
WAN = dict(vae="wan", mask_share=0.0, base_size=0, shift=3.0, lr=1e-5, resolution="480p", frames=81, fps=16,
           guidance=5.0, sample_steps=50, aes=0.0)  # fmt: skip
WAN_LAYERS = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"


@cache
def wan_class() -> type[nn.Module]:
    """diffusers is imported when it is needed."""
    from diffusers import WanTransformer3DModel

    class Wan(WanTransformer3DModel):
        """Its weights and names are diffusers'; no_caption (1, D) is added: the states of "", which stand for
        a caption that is left out. Captions are filled with zeros, which Wan attends to."""

        def forward(
            self, x: Tensor, timesteps: Tensor, y: Tensor, mask: Tensor, fps: Tensor, pixels: float,
            x_mask: Tensor | None = None, drop: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            """As STDiT3.forward; x_mask is looked at only where `gives_frames` is set"""
            height, width = x.shape[3:]
            y = torch.where(mask[..., None], y.to(self.dtype), 0)
            y = F.pad(y, (0, 0, 0, self.caption_length - y.shape[1]))
            if drop is not None:
                none = F.pad(self.no_caption, (0, 0, 0, self.caption_length - len(self.no_caption)))
                y = torch.where(drop[:, None, None], none.to(y), y)
            x = F.pad(x.to(self.dtype), (0, width % 2, 0, height % 2))
            if x_mask is not None and self.gives_frames:  # each token has its time, 0 where it is given
                tokens = x.shape[3] * x.shape[4] // 4
                timesteps = (timesteps[:, None] * x_mask).repeat_interleave(tokens, 1)
            (noise_less_clip,) = super().forward(x, timesteps, y, return_dict=False)
            return -noise_less_clip[..., :height, :width].float()  # ours is the clip less the noise

        @property
        def checkpointing(self) -> bool:
            return self.gradient_checkpointing

        @checkpointing.setter
        def checkpointing(self, on: bool) -> None:
            (self.enable_gradient_checkpointing if on else self.disable_gradient_checkpointing)()

    return Wan


def is_wan(config: dict) -> bool:
    return config.get("_class_name") == "WanTransformer3DModel"


def build(config: dict) -> nn.Module:
    """A model of these sizes: STDiT3's, or of diffusers' Wan with OWN"""
    if not is_wan(config):
        return STDiT3(**config)
    model = wan_class().from_config(of_diffusers(config))
    model.caption_length, model.gives_frames = config["caption_length"], config["gives_frames"]
    if config["frame_places"]:
        model.patch_embedding.register_forward_hook(add_frame_places)
    model.register_buffer("no_caption", torch.zeros(1, config["text_dim"]))
    with torch.device("cpu"):  # its angles are in no file
        sizes = model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len
        model.rope = type(model.rope)(*sizes)
    model.rope._apply = partial(moved, model.rope)  # fp32 also in a model of bf16
    return model


def moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, of which a module's buffers take the device alone"""
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer.to(change(buffer).device)
    return module


OWN = ("caption_length", "gives_frames", "frame_places")  # of Wan's sizes, that diffusers' class has not


def of_diffusers(config: dict) -> dict:
    return {name: value for name, value in config.items() if name not in OWN}


def add_frame_places(patches: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
    """A forward hook; tokens (B, C, T, h, w)"""
    places = frame_places(tokens.shape[2], tokens.shape[1], tokens.device)
    return tokens + places.T[:, :, None, None].to(tokens.dtype)


def with_depth(config: dict, depth: int) -> dict:
    return config | {"num_layers" if is_wan(config) else "depth": depth}


def wan_config(source: str, cfg: Config, codec: Any, text: Any) -> dict:
    """Of a --model in diffusers' layout, or from scratch; {} of another"""
    own = {"_class_name": "WanTransformer3DModel", "caption_length": text.length}
    own |= {"gives_frames": cfg.mask_share > 0, "frame_places": False}
    if source == "scratch-wan":
        own["frame_places"] = cfg.frame_places
        sizes = dict(num_attention_heads=cfg.heads, attention_head_dim=cfg.width // cfg.heads,
                     in_channels=codec.channels, out_channels=codec.channels, text_dim=text.width,
                     ffn_dim=4 * cfg.width, num_layers=cfg.depth)  # fmt: skip
        with torch.device("meta"):
            return dict(wan_class()(**sizes).config) | own
    file = wan_folder(source) / "config.json"
    config = read_json(file) if file.exists() else {}
    if config and config.get("_class_name") != own["_class_name"]:
        refuse(f"--model {source}: its transformer is {config.get('_class_name')}; Wan's is known here")
    return config | own if config else {}


@cache
def wan_folder(source: str) -> Path:
    """Of the transformer, if --model is in diffusers' layout"""
    if source.startswith("scratch") or Path(source).is_file() or source.count("/") == 2:
        return Path("nowhere")
    return fetch_model(source, "config.json", "transformer/config.json") / "transformer"


# ---------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------


@cache
def word_direction(word: str, width: int) -> np.ndarray:
    """Where no text encoder is at hand: for each word a fixed random direction, normal numbers (width,)"""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(width)


class Words:
    """Instead of T5 where there is no network: each word a fixed random direction, without meaning."""

    name, encoder, width, length = "words", None, 64, 16
    cleaned = staticmethod(str)

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """-> float16 (L, 64) of each caption, L words, at most 16"""
        states = []
        for caption in captions:
            directions = [word_direction(word, self.width) for word in caption.lower().split() or [""]]
            states.append(np.stack(directions[: self.length]).astype(np.float16))
        return states


class T5:
    """Last hidden states of T5's encoder, as the published weights know it, of the real tokens alone; or of
    UMT5's, in diffusers' layout beside Wan's weights."""

    def __init__(self, source: str, device: torch.device, meta: bool = False) -> None:
        """`meta`: its sizes alone, on the meta device. ValueError without a tokenizer of its size."""
        import bs4  # noqa: F401  diffusers cleans captions with these two
        import ftfy  # noqa: F401
        import sentencepiece  # noqa: F401  transformers reads the Hub's spiece.model with it
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

        names = ["*.json", "*.model"] if meta else ["*.json", "*.model", "*.safetensors", "*.bin"]
        # a whole pipeline's other weights are not wanted: patterns cross folders
        below = [f"{part}/{name}" for part in ("text_encoder", "tokenizer") for name in names]
        folder = fetch_model(source, *below, "config.json", "model_index.json", flag="--text_model")
        self.of_wan = (folder / "text_encoder").is_dir()
        self.length = 512 if self.of_wan else 300
        if not self.of_wan:
            folder = fetch_model(source, *names, flag="--text_model")
        tokenizer, encoder = (
            folder / part if self.of_wan else folder for part in ("tokenizer", "text_encoder")
        )
        self.name = f"{source} {weights_key(encoder)}"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        if meta:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(encoder)
                self.encoder = AutoModelForTextEncoding.from_config(config).to(kind)
        else:
            self.encoder, report = AutoModelForTextEncoding.from_pretrained(
                encoder, dtype=kind, local_files_only=True, output_loading_info=True
            )
            check_loaded({**report, "unexpected_keys": []}, encoder)  # a whole T5 has a decoder
            self.encoder = self.encoder.to(device).eval()
        self.width = self.encoder.config.d_model
        pieces, vocabulary = len(self.tokenizer), self.encoder.config.vocab_size
        # without its files there is one of special tokens alone
        if pieces < vocabulary - 256:
            raise ValueError(f"its tokenizer knows {pieces} pieces, its weights {vocabulary}")

    def cleaned(self, caption: str) -> str:
        if self.of_wan:
            from diffusers.pipelines.wan.pipeline_wan import prompt_clean

            return prompt_clean(caption)
        return clean(caption)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """-> float16 (L, D) of each caption, L tokens, at most 300, of UMT5 512; D = 4096 for XXL"""
        rows: list[np.ndarray] = []
        for start in range(0, len(captions), 16):
            part = [self.cleaned(caption) for caption in captions[start : start + 16]]
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
            )
            states = self.encoder(**tokens.to(self.encoder.device)).last_hidden_state.half().cpu().numpy()
            lengths = tokens.attention_mask.sum(1).tolist()
            rows += [row[:length] for row, length in zip(states, lengths)]
        return rows


def clean(caption: str) -> str:
    """As DeepFloyd, PixArt and Open-Sora (models/text_encoder/t5.py) clean what T5 reads: lower case, without
    links, markup, brackets, Chinese characters, numbers of articles; twice, as upstream does."""
    from diffusers import PixArtSigmaPipeline

    once = partial(PixArtSigmaPipeline._clean_caption, PixArtSigmaPipeline)
    return once(once(caption))


def open_text(cfg: Config, device: torch.device, meta: bool = False) -> Words | T5:
    """Exit 2 when the encoder cannot be had. `meta`: its sizes alone, on that device."""
    if cfg.text == "words":
        return Words()
    try:
        return T5(cfg.text_model, device, meta)
    except (OSError, ValueError) as error:
        hint = "give a folder, or a Hub id that HF_TOKEN may read"
        refuse(f"--text_model {cfg.text_model}: {brief(error)}; {hint}")


def open_codec(cfg: Config, device: torch.device, meta: bool = False) -> OpenSoraVAE | WanVAE | Pixels:
    """Exit 2 when the VAE cannot be had. `meta`: its sizes alone, on that device."""
    if cfg.vae == "pixels":
        return Pixels()
    kind, source = OpenSoraVAE if cfg.vae == "opensora" else WanVAE, cfg.vae_model or VAES[cfg.vae]
    codec = kind.load(source, meta).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return codec if meta else codec.to(device)


# ---------------------------------------------------------------------------
# Samples: what a bucket takes of a clip, encoded once or in the step
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    rows: Rows
    table: Table
    held_rows: Rows  # to evaluate on; the same as rows when there are fewer than 20
    held_table: Table
    sums: np.ndarray  # uint64 (N,) of what is said of each clip, train and held out
    source: str  # where they come from
    bad: list[dict]  # samples that were left out, and why

    @cached_property
    def names(self) -> np.ndarray:
        """uint64 (N,), of the videos of `sums`"""
        rows = Rows(self.rows.folder, np.arange(len(self.sums)))
        return np.array([name_number(rows[i].video) for i in range(len(rows))], np.uint64)

    def digest(self, unread: list[int]) -> str:
        """Of the rows, in any order and wherever they lie, without those of videos that are known not to be
        readable (name_number): these may be removed or repaired later"""
        sums = self.sums[~np.isin(self.names, np.array(unread, np.uint64))] if unread else self.sums
        return f"{int(sums.sum(dtype=np.uint64)):016x}"


def load_data(cfg: Config) -> Data:
    """Every rank. Exit 2 when there is nothing to train on."""
    folder, source, bad = on_rank0(stored_rows)(cfg)
    if not folder.exists():  # another machine, whose cache is its own
        if rank() % local_ranks() == 0:
            stored_rows(cfg)
        barrier()
    numbers, held = np.load(folder / "numbers.npy"), np.load(folder / "held.npy")
    sums = np.load(folder / "sums.npy", mmap_mode="r")
    table = Table(*numbers[:3].astype(np.int32), numbers[3].astype(np.float32))
    train, held = np.flatnonzero(~held), np.flatnonzero(held)
    to_train = Rows(folder, train), table.part(train)
    to_evaluate = (Rows(folder, held), table.part(held)) if len(held) else to_train
    return Data(*to_train, *to_evaluate, sums, source, bad)


def stored_rows(cfg: Config) -> tuple[Path, str, list[dict]]:
    """-> (the folder of the rows, below the latents' cache if there is one; where they come from; bad
    samples)"""
    home = (cfg.cache if cfg.cache and not cfg.check else cfg.cache_dir) / "rows"
    if cfg.manifest or cfg.dataset or cfg.demo:
        made = {"demo": False, "manifest": demo_module("shapes").make_data(cfg)} if cfg.demo else {}
        rows, bad = read_data(source := dataclasses.replace(cfg, **made), "caption", SCORE_COLUMNS)
        rows, table, unread = clip_table(rows, cfg)
        leave_out(name := data_name(source), len(rows), unread, cfg.max_bad)
        return store_rows(home, rows, table, held_out(rows, cfg), cfg), name, bad + unread
    if cfg.cache and (cfg.cache / "rows" / "filled.json").exists():  # the videos may be gone
        filled = read_json(cfg.cache / "rows" / "filled.json")
        return cfg.cache / "rows" / filled["rows"], filled["source"], []
    refuse(
        "--manifest: a table of videos and captions, or a folder of them; or --dataset, or --demo, or the "
        "--cache of a run whose videos are gone, which it has filled"
    )


def held_out(rows: list[Row], cfg: Config) -> np.ndarray:
    """bool (N,): which are evaluated and not trained on"""
    held = np.zeros(len(rows), bool)
    if cfg.demo:  # combinations of what captions say
        shapes = demo_module("shapes")
        held[:] = [
            shapes.is_held_out(shapes.attributes_in(row.texts[0]), shapes.RFLOW_SHAPES) for row in rows
        ]
    else:
        fraction = cfg.val_fraction if len(rows) >= 20 else 0
        _, these = split_clips([row.video for row in rows], [row.split for row in rows], fraction, cfg.seed)
        held[these] = True
    return held


@without_gc
def store_rows(home: Path, rows: list[Row], table: Table, held: np.ndarray, cfg: Config) -> Path:
    """-> a folder named by its content: rows.json (two lines of JSON each, see Rows), ends.npy (where they
    end), numbers.npy (as Table, (4, N)), held.npy, sums.npy (as Data)"""
    numbers = np.stack([table.num_frames, table.height, table.width, table.fps]).astype(np.float64)
    encode = json.JSONEncoder(default=str, ensure_ascii=False).encode
    sums, lengths = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.int64)
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=home) as temporary:
        aside, whole = Path(temporary), hashlib.sha256()
        with (aside / "rows.json").open("wb") as file:
            for i, (row, *seen) in enumerate(zip(rows, *numbers.tolist())):
                identity = ""
                with contextlib.suppress(BadSample):  # gone since it was looked at: whoever reads it says so
                    identity = identity_of(row.video) if cfg.cache else ""
                place = encode([identity, row.source, row.line, row.video, row.split])
                clip = encode([row.texts, row.cells, row.start, row.end, *seen]).encode(errors="replace")
                if not cfg.demo:  # which makes as many clips as its steps take
                    sums[i] = number_of_bytes(os.path.basename(row.video).encode(errors="replace") + clip)
                said = place.encode(errors="replace") + b"\n" + clip
                lengths[i] = file.write(said)
                whole.update(said)
        arrays = {"ends": lengths.cumsum(), "numbers": numbers, "held": held, "sums": sums}
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
            whole.update(array)

        def write(folder: Path) -> None:
            for file in aside.iterdir():
                file.rename(folder / file.name)

        return made_once(home / whole.hexdigest()[:32], write)


def number_of_bytes(content: bytes) -> int:
    """64 bits"""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def name_number(video: str) -> int:
    return number_of_bytes(os.path.basename(video).encode(errors="replace"))


def clip_name(row: Row) -> str:
    """What the random numbers of a clip go by, wherever the files lie and in whichever order"""
    return os.path.basename(row.video) + row.part


ENCODING = threading.Lock()  # evaluation and the thread that is a batch ahead share the encoders


class Source:
    """Latents and caption states of rows: from the cache, or encoded, in which case a cache gets them. The
    step's are encoded by a thread that is a batch ahead."""

    def __init__(self, cfg: Config, rows: Rows, table: Table, codec: Any, text: Any) -> None:
        self.cfg, self.rows, self.table, self.codec, self.text = cfg, rows, table, codec, text
        self.bad: dict[int, dict] = {}  # rows whose clip could not be read, and why
        self.noted: set[int] = set()  # of these, in bad_samples.jsonl
        self.pool = ThreadPoolExecutor(cfg.num_workers or usable_cores())  # the decoders release the GIL
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # beside the training's

    def files(self, row: int, bucket: Bucket) -> tuple[Path, Path]:
        """Where the cache has latents and caption of a row; another clip, crop, choice of frames or encoder
        has another name. Raises BadSample."""
        # 4, 1: versions of what reads and encodes
        file, frames = f"{self.rows.identity(row)}{self.rows[row].part}", self.frames(row, bucket, 0)
        latents = f"{file}|{bucket.size}|{frames}|{self.codec.name}|{self.codec.key}|{self.cfg.seed}|4"
        return self.file("latents", latents), self.file("text", f"{self.caption(row, 0)}|{self.text.name}|1")

    def file(self, kind: str, content: str) -> Path:
        digest = digest_of(content)
        return self.cfg.cache / kind / digest[:2] / f"{digest}.npy"

    def rng(self, use: int, row: int, epoch: int) -> np.random.Generator:
        """By the clip's name, not by the row's number: rows that are added leave what the cache has"""
        return rng_of(use, self.cfg.seed, epoch, zlib.crc32(clip_name(self.rows[row]).encode()))

    def caption(self, row: int, epoch: int) -> str:
        texts, rng = self.rows[row].texts, self.rng(CAPTION, row, epoch)
        text = texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0]
        return scored_caption(text, scores_of(self.rows[row]), rng)

    def frames(self, row: int, bucket: Bucket, epoch: int) -> range:
        return frames_of(int(self.table.num_frames[row]), bucket.frames, self.rng(FRAMES, row, epoch))

    def pixels(self, row: int, bucket: Bucket, epoch: int) -> np.ndarray | None:
        """uint8 (F, h, w, 3); None for a clip that cannot be read, which is noted"""
        clip = self.rows[row]
        try:
            with local_file(clip.video, self.cfg) as path:
                frames = self.frames(row, bucket, epoch)
                return timed_frames(path, frames, bucket.size, True, clip.start, clip.end)[0]
        except BadSample as error:
            self.bad[row] = clip.left_out(error)
            return None

    def encoded(
        self, bucket: Bucket, rows: list[int], epoch: int
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{row: (latents (C, T, h, w), states of the caption (L, D)), float16}, of those that can be read;
        the latents drawn from the posterior, as the published weights were trained"""
        latents, states, files = {}, {}, {}
        for row in rows if self.cfg.cache else []:
            try:
                files[row] = self.files(row, bucket)
                for kept, file in zip((latents, states), files[row]):
                    if file.exists():
                        kept[row] = np.load(file)
            except (BadSample, OSError, ValueError, EOFError) as error:
                self.bad[row] = self.rows[row].left_out(error)
        decode = partial(self.pixels, bucket=bucket, epoch=epoch)
        lacking = [row for row in rows if row not in latents and row not in self.bad]
        clips = {row: clip for row, clip in zip(lacking, self.pool.map(decode, lacking)) if clip is not None}
        good = [row for row in rows if row not in self.bad]
        unsaid = [row for row in good if row not in states]
        with ENCODING, torch.cuda.stream(self.stream):  # of None: nothing
            if clips:
                seeds = [int(self.rng(ENCODE, row, epoch).integers(2**62)) for row in clips]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                encoded = self.codec.encode(torch.from_numpy(np.stack(list(clips.values()))), generators)
                latents |= zip(clips, encoded.half().cpu().numpy())
            states |= zip(unsaid, self.text.encode([self.caption(row, epoch) for row in unsaid]))
        for row in files:
            for file, part in zip(files[row], (latents.get(row), states.get(row))):
                if part is not None and not file.exists():
                    save_array(file, part)
        return {row: (latents[row], states[row]) for row in good}

    def lacks(self, row: int, bucket: Bucket) -> bool:
        """Whether the cache does. ValueError for a file that is broken, by its header and size."""
        try:
            for file in self.files(row, bucket):
                np.load(file, mmap_mode="r")
        except (FileNotFoundError, BadSample):
            return True
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is not what an earlier run wrote there: {error}") from error
        return False

    def batch(
        self, bucket: Bucket, rows: Iterable[int], others: Iterator[int], epoch: int
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
        """(latents, caption states, the rows). In the place of a clip that cannot be read comes one of
        `others`, rows of the same shape; where they run out the batch is smaller, and may be empty."""
        rows = list(map(int, rows))
        done = self.encoded(bucket, rows, epoch)
        while len(done) < len(rows) and (row := next(others, None)) is not None:
            done |= self.encoded(bucket, [row], epoch)
        for row in self.bad.keys() - self.noted:
            self.noted.add(row)
            append_json(self.cfg.output_dir / "bad_samples.jsonl", self.bad[row])
            log.warning(f"warning: {' | '.join(self.bad[row].values())}: another clip takes its place")
        latents, states = zip(*done.values()) if done else ((), ())
        return list(latents), list(states), list(done)


def fill_cache(source: Source, groups: Groups, batches: Iterable[int]) -> dict[int, dict]:
    """Every rank: encode its share of these batches, what the cache lacks of them. It may be stopped and
    started again. -> {row: what is wrong} of clips that cannot be read, the same on every rank. Exit 2 for a
    file of the cache that is broken."""
    mine, broken = list(batches)[rank() :: world_size()], []
    for b in tqdm(mine, "encode", unit="batch", disable=None if rank() == 0 else True):
        bucket, rows = groups.batch(b)
        try:
            if lacking := [row for row in map(int, rows) if source.lacks(row, bucket)]:
                source.encoded(bucket, lacking, 0)
        except ValueError as error:
            broken.append(str(error))
    if broken := list(itertools.chain.from_iterable(from_all_ranks(broken))):
        refuse(f"--cache: {len(broken)} files cannot be read: {broken[0]}; remove them and run again")
    bad = merged_over_ranks(source.bad)
    source.bad.clear()
    return bad


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------


class Batches:
    """The batch of each micro-step: a pure function of (seed, micro-step, rank), so that a resumed run
    repeats the order. With a cache each epoch has the buckets and frames of the first, in another order."""

    def __init__(self, cfg: Config, source: Source, buckets: Buckets) -> None:
        self.cfg, self.source = cfg, source
        cost = tokens_of(source.codec)
        plan = partial(plan_epoch, source.table, buckets, cfg.seed, world=world_size(), cost=cost)
        self.plan = lru_cache(maxsize=2)(plan)
        self.length = cache(lambda number: len(self.epoch(number).order))

    def epoch(self, number: int) -> Epoch:
        return self.plan(0 if self.cfg.cache else number)

    def forget(self) -> None:
        """The table has changed."""
        self.plan.cache_clear()
        self.length.cache_clear()

    def place(self, micro_step: int) -> tuple[int, int]:
        """(epoch, step in it)"""
        epoch = 0
        while micro_step >= self.length(epoch):
            micro_step, epoch = micro_step - self.length(epoch), epoch + 1
        if self.cfg.cache and epoch:
            micro_step = int(epoch_order(self.length(0), self.cfg.seed, epoch)[micro_step])
        return epoch, micro_step

    def __call__(self, micro_step: int) -> dict[str, Any]:
        number, step = self.place(micro_step)
        epoch, rng = self.epoch(number), rng_of(MASKS, self.cfg.seed, micro_step, rank())
        for b in np.roll(epoch.order[:, rank()], -step):  # the next batch, when no clip of one can be read
            bucket, rows = epoch.batch(b)
            latents, text, rows = self.source.batch(bucket, rows, epoch.others(b), number)
            if rows:
                break
        else:
            raise SystemExit(
                f"error: no clip of {self.cfg.manifest or self.cfg.dataset} can be read any more"
            )
        predicted = np.ones((len(rows), latents[0].shape[1]), bool)
        for mask in predicted:
            if rng.random() < self.cfg.mask_share:
                mask[:] = given_frames(len(mask), GIVEN[self.cfg.stage], rng)
        return batch_of(bucket, latents, text, self.source.table.fps[rows], predicted)


class HeldOut:
    """What the held-out loss is measured on: for each resolution and length that training uses, up to two
    batches of held-out clips that fit it. Their losses count as often as training takes such a batch."""

    def __init__(self, cfg: Config, source: Source, buckets: Buckets, epoch: Epoch) -> None:
        """epoch: the first one of the training"""
        self.cfg, self.source, self.buckets = cfg, source, buckets
        names = [epoch.buckets[i].name for i in epoch.bucket_of[epoch.order.ravel()]]
        self.shares = {name: names.count(name) / len(names) for name in dict.fromkeys(names)}
        self.forget()

    def forget(self) -> None:
        """The table has changed."""
        self.groups = []
        for resolution, lengths in self.buckets.items():
            for frames, (_, batch) in lengths.items():
                if f"{resolution}_{frames}" in self.shares:
                    fitting = {resolution: {frames: (1.0, batch)}}
                    self.groups.append(group(self.source.table, fitting, self.cfg.seed, 0))
        largest = [np.argsort(-np.diff(part.starts), kind="stable")[:2] for part in self.groups]
        self.places = [(part, int(b)) for part, batches in zip(self.groups, largest) for b in batches]

    @property
    def shapes(self) -> list[Bucket]:
        """One of each resolution and length"""
        shapes = {bucket.name: bucket for bucket in (part.batch(b)[0] for part, b in reversed(self.places))}
        return list(shapes.values())[::-1]


def batch_of(
    bucket: Bucket, latents: list[np.ndarray], text: list[np.ndarray], fps: np.ndarray, predicted: np.ndarray
) -> dict[str, Any]:
    """latents (C, T, h, w) and caption states (L, D) of each clip; fps (B,), told to the model as whole
    numbers, 29.97 as 29 (upstream's datasets.py takes int of it); predicted: bool (B, T), of the latent
    frames, False where they are given"""
    y, mask = padded(text)
    fps = np.full(len(text), IMAGE_FPS) if bucket.frames == 1 else np.floor(fps)
    batch = {"bucket": bucket, "x": torch.from_numpy(np.stack(latents)), "y": y, "mask": mask}
    return batch | {"fps": torch.as_tensor(fps).float(), "predicted": torch.from_numpy(predicted)}


def padded(text: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Caption states (L, D) of several lengths -> float16 (B, longest, D), bool (B, longest)"""
    y = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in text], batch_first=True)
    return y, torch.arange(y.shape[1]) < torch.tensor([len(row) for row in text])[:, None]


# Which frames of a clip are given, of 1,000 clips: stage{1,2,3}.py. A quarter is 1 to a quarter of the latent
# frames, an image is one.
EARLY = {
    "random": 50, "interpolate": 5, "quarter_random": 5, "quarter_head": 5, "quarter_tail": 5,
    "quarter_head_tail": 5, "image_random": 25, "image_head": 50, "image_tail": 25, "image_head_tail": 25,
}  # fmt: skip
LATE = {
    "random": 10, "interpolate": 2, "quarter_random": 2, "quarter_head": 2, "quarter_tail": 2,
    "quarter_head_tail": 2, "image_head": 220, "image_tail": 5, "image_head_tail": 5,
}  # fmt: skip
GIVEN = {"1": EARLY, "2": EARLY, "3": LATE, "demo": LATE}


def given_frames(frames: int, kinds: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Which of the latent frames of a clip are to be made, bool (T,): the others are given, clean, in one of
    `kinds` by weight (MaskGenerator, which fails on clips of 2 and 3 latent frames). At least one is made."""
    made = np.ones(frames, bool)
    if frames == 1:
        return made
    weights = np.array(list(kinds.values())) / sum(kinds.values())
    kind = str(rng.choice(list(kinds), p=weights))
    if kind == "random":
        made = rng.random(frames) > rng.uniform(0.1, 0.9)
    elif kind == "interpolate":
        made[rng.integers(2) :: 2] = False
    else:
        count = 1 if kind.startswith("image") else int(rng.integers(1, max(2, frames // 4 + 1)))
        first = int(rng.integers(frames - count + 1))
        if kind.endswith("_random"):
            made[first : first + count] = False
        if "head" in kind:
            made[:count] = False
        if "tail" in kind:
            made[-count:] = False
    if not made.any():
        made[-1] = True
    return made


# ---------------------------------------------------------------------------
# Loss and sampling
# ---------------------------------------------------------------------------


def shifted(t: Tensor, ratio: float) -> Tensor:
    """t in [0, 1], 1 is noise -> more of it for larger and longer clips (Esser et al. 2024, equation 23)"""
    return ratio * t / (1 + (ratio - 1) * t)


def flow_shift(height: int, width: int, latent_frames: int, base: float, scale: float) -> float:
    """sqrt(pixels / base^2) * sqrt(latent frames) * scale; without a base `scale` alone. Upstream counts
    latent frames as num_frames // 17 * 5, which is 0 below 17 frames: then t is always 0 and nothing is
    learned; here their true number."""
    return math.sqrt(height * width) / base * math.sqrt(latent_frames) * scale if base else scale


def noisy(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(1 - t) x + t noise; x (B, C, T, H, W), t (B,) in [0, 1]"""
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * x + t * noise


def shift_of(cfg: Config, bucket: Bucket, codec: Any) -> float:
    return flow_shift(*bucket.size, codec.latent_frames(bucket.frames), cfg.base_size, cfg.shift)


def velocity(
    model: nn.Module, x: Tensor, t: Tensor, batch: dict, predicted: Tensor | None, drop: Tensor | None = None
) -> Tensor:
    """The model's v = x_0 - noise for noisy latents x, t (B,) in [0, 1]; without the half upstream drops"""
    y, mask, fps = (batch[name].to(x.device) for name in ("y", "mask", "fps"))
    pixels = math.sqrt(math.prod(batch["bucket"].size))
    return model(x, t * TIMESTEPS, y, mask, fps, pixels, predicted, drop)[:, : x.shape[1]]


def flow_loss(
    model: nn.Module, x: Tensor, batch: dict, t: Tensor, noise: Tensor, drop: Tensor | None = None
) -> Tensor:
    """Mean squared error of v over the predicted frames, mean over clips; given frames stay clean."""
    predicted = batch["predicted"].to(x.device)
    part = predicted[:, None, :, None, None].to(x.dtype)  # (B, 1, T, 1, 1)
    v = velocity(model, noisy(x, noise, t) * part + x * (1 - part), t, batch, predicted, drop)
    error = ((v - (x - noise)) ** 2 * part).flatten(1).sum(1)
    return (error / (part.sum((1, 2, 3, 4)) * x[0, :, 0].numel())).mean()


def training_loss(
    model: nn.Module, x: Tensor, batch: dict, cfg: Config, shift: float, generator: torch.Generator
) -> Tensor:
    """t logit-normal (Esser et al. 2024, section 3.1), shifted; x (B, C, T, H, W)"""
    t = shifted(torch.randn(len(x), generator=generator, device=x.device).sigmoid(), shift)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    drop = torch.rand(len(x), generator=generator, device=x.device) < cfg.caption_dropout
    return flow_loss(model, x, batch, t, noise, drop)


@torch.no_grad()
def sample(
    model: nn.Module, text: list[np.ndarray], bucket: Bucket, codec: Any, cfg: Config, seed: int,
    known: Tensor | None = None, predicted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Latents (N, C, T, h, w) for captions: Euler steps from noise at t = 1 to 0, guidance after Ho and
    Salimans 2022. `known` latents of the same shape are kept where `predicted` (T,) is False."""
    device, count = next(model.parameters()).device, len(text)
    generator = torch.Generator(device).manual_seed(seed)
    height, width = (side // codec.space for side in bucket.size)
    shape = (count, codec.channels, codec.latent_frames(bucket.frames), height, width)
    x = torch.randn(shape, generator=generator, device=device)
    y, mask = padded(text)
    fps = torch.full((2 * count,), IMAGE_FPS if bucket.frames == 1 else float(cfg.fps))
    both = {"bucket": bucket, "y": y.repeat(2, 1, 1), "mask": mask.repeat(2, 1), "fps": fps}
    drop = torch.arange(2 * count, device=device) >= count  # second half without captions
    x_mask = None
    if predicted is not None:
        known, predicted = known.to(x), predicted.to(device)
        x_mask = predicted.expand(2 * count, -1)

    def with_known(x: Tensor) -> Tensor:
        return x if x_mask is None else torch.where(predicted[:, None, None], x, known)

    even = 1 - torch.arange(cfg.sample_steps + 1) / cfg.sample_steps
    times = shifted(even, shift_of(cfg, bucket, codec)).tolist()
    for t, after in zip(times, times[1:]):
        x = with_known(x)
        t_of_each = torch.full((2 * count,), t, device=device)
        v = velocity(model, x.repeat(2, 1, 1, 1, 1), t_of_each, both, x_mask, drop)
        with_text, without = v.chunk(2)
        x = x + (without + cfg.guidance * (with_text - without)) * (t - after)
    return with_known(x)


@torch.no_grad()
def held_out_loss(model: nn.Module, held: HeldOut, cfg: Config) -> dict[str, float]:
    """Every rank: the loss at 10 evenly spaced t with fixed noise, by bucket, and "loss", their mean by how
    often training takes them (nan where no clip can be read)."""
    device, losses = next(model.parameters()).device, {}
    for (place,) in rounds(len(held.places), 1):
        groups, b = held.places[place]
        bucket, rows = groups.batch(b)
        latents, text, rows = held.source.batch(bucket, rows, groups.others(b), 0)
        if rows:
            predicted = np.ones((len(rows), latents[0].shape[1]), bool)
            batch = batch_of(bucket, latents, text, held.source.table.fps[rows], predicted)
            x = batch["x"].to(device).float()
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(device)
            losses[place] = bucket.name, 0.0
        for tenth in range(10):
            stop_if_asked()  # on every rank as often
            if rows:
                t = torch.full((len(x),), (tenth + 0.5) / 10, device=device)
                losses[place] = (
                    bucket.name,
                    losses[place][1] + flow_loss(model, x, batch, t, noise).item() / 10,
                )
    by_name: dict[str, list[float]] = {}
    for name, loss in merged_over_ranks(losses).values():
        by_name.setdefault(name, []).append(loss)
    means = {name: float(np.mean(values)) for name, values in by_name.items()}
    shares = [held.shares[name] for name in means]
    total = float(np.average(list(means.values()), weights=shares)) if means else math.nan
    return {"loss": total} | means


def sample_clips(
    model: nn.Module, captions: list[str], bucket: Bucket, codec: Any, text: Any, cfg: Config, seed: int
) -> np.ndarray:
    """-> uint8 (N, F, H, W, 3), in batches of the bucket's size"""
    clips, states = [], text.encode(captions)
    for start in range(0, len(captions), bucket.batch_size):
        part = states[start : start + bucket.batch_size]
        x = sample(model, part, bucket, codec, cfg, seed_of(cfg.seed, seed, start))
        clips.append(codec.decode(x, bucket.frames).cpu().numpy())
    return np.concatenate(clips)


# ---------------------------------------------------------------------------
# Averaged weights, in the parts that the ranks hold
# ---------------------------------------------------------------------------


def parts_of(engine: Any) -> list[Tensor]:
    """This rank's part of the fp32 weights under ZeRO, flat."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


@contextlib.contextmanager
def in_place_of_weights(engine: Any, ema: list[Tensor]) -> Iterator[None]:
    """Inside, the averaged weights stand where the trained ones are."""
    parts = [part.data for part in parts_of(engine)]
    kept = [part.clone() for part in parts]
    for part, mean in zip(parts, ema):
        part.copy_(mean)
    try:
        yield
    finally:
        for part, mean, weight in zip(parts, ema, kept):
            mean.copy_(part)
            part.copy_(weight)


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Every rank; rank 0 gets all weights in fp32 on the CPU, gathered one after the other, and buffers."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, value in engine.module.named_parameters():
        full = safe_get_full_fp32_param(value) if value.requires_grad else None
        with gathered([value]):
            if rank() == 0:
                full = value if full is None else full
                weights[name] = full.detach().to("cpu", torch.float32, copy=True)
    state = set(engine.module.state_dict())
    buffers = [(name, value) for name, value in engine.module.named_buffers() if name in state]
    return weights | {name: value.detach().float().cpu() for name, value in buffers}


def averaged_weights(engine: Any, ema: list[Tensor]) -> dict[str, Tensor]:
    with in_place_of_weights(engine, ema):
        return whole_weights(engine)


def load_ema(engine: Any, ema: list[Tensor], checkpoint: Path) -> None:
    """Every rank: its part of the averaged weights, by whatever number of ranks they were saved."""
    from deepspeed.utils import safe_set_full_fp32_param
    from safetensors.torch import load_file

    whole = load_file(checkpoint / "ema.safetensors")
    with in_place_of_weights(engine, ema):
        for name, value in engine.module.named_parameters():
            if value.requires_grad:
                safe_set_full_fp32_param(value, whole[name].to(engine.device))


def set_trained(model: nn.Module, cfg: Config) -> nn.Module:
    """What is trained: all weights but the rotation's, and of loaded ones the layers that captions enter by
    (both as upstream), or LoRA on every linear layer of the blocks."""
    if isinstance(model, STDiT3):
        model.rope.freqs.requires_grad_(False)
        model.y_embedder.requires_grad_(cfg.model == "scratch")
    if not cfg.lora_r:
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora_of(isinstance(model, STDiT3), cfg))


def lora_of(of_stdit: bool, cfg: Config) -> Any:
    from peft import LoraConfig

    layers = r"attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|mlp\.fc[12]"
    where = rf"(spatial|temporal)_blocks\.\d+\.({layers})" if of_stdit else WAN_LAYERS
    return LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=where)


def merged(weights: dict[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Weights of a model with LoRA -> those of one without, under the published names"""
    if not cfg.lora_r:
        return weights
    whole = {}
    for name, value in weights.items():
        if ".lora_" not in name:
            if "base_layer.weight" in name:
                a, b = (weights[name.replace("base_layer.weight", f"lora_{x}.default.weight")] for x in "AB")
                value = value + b @ a * (cfg.lora_alpha / cfg.lora_r)
            whole[name.removeprefix("base_model.model.").replace(".base_layer", "")] = value
    return whole


def plain_model(config: dict, weights: dict[str, Tensor], device: torch.device, dtype: str) -> nn.Module:
    """A model of these merged weights, which rank 0 has, to evaluate and sample: whole on each rank"""
    import torch.distributed as dist

    with torch.device("meta"):
        model = build(config)
    kind, state = TORCH_DTYPES[dtype], {}
    for name, value in model.state_dict().items():
        state[name] = torch.empty(value.shape, dtype=kind, device=device)
        if rank() == 0:
            state[name].copy_(weights[name])
        if world_size() > 1:
            dist.broadcast(state[name].view(torch.uint8), 0)  # as bytes: gloo does not know every dtype
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


# ---------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------


@on_rank0
def evaluate(model: nn.Module, losses: dict[str, float], held: HeldOut, data: Data, cfg: Config) -> dict:
    """The score of results.json. The demo: asked = made for captions never seen, for each bucket, next to the
    same clips held against each other's captions. Else: 1 - loss / power of the target on held-out clips."""
    by_bucket = {name: {"held-out loss": loss} for name, loss in losses.items() if name != "loss"}
    results = {"held_out_loss": losses["loss"], "controls": {}, "tables": {"bucket": by_bucket}}
    if not cfg.demo:
        trained_on = held.source.rows is data.rows
        which = "the training clips (few, or none other fits a bucket)" if trained_on else "held-out clips"
        # v = x - noise has a power of 1 + 1 where latents are normalised
        if math.isnan(losses["loss"]):
            return results | {"held_out_loss": None, "score": 0.0, "score_is": "no held-out clip can be read"}
        explained = max(0.0, 1 - losses["loss"] / 2)
        return results | {"score": explained, "score_is": f"share of the target explained, {which}"}
    shapes = demo_module("shapes")
    asked = shapes.held_out_captions(shapes.RFLOW_SHAPES)
    captions = [shapes.caption_of(a) for a in asked]
    right, shuffled, codec, text = {}, {}, held.source.codec, held.source.text
    for bucket in held.shapes:
        clips = sample_clips(model, captions, bucket, codec, text, cfg, bucket.frames)
        scores = shapes.score_and_control(clips, asked, shapes.RFLOW_SHAPES)
        right[bucket.name], shuffled[bucket.name] = scores
    count = f"{len(asked) * len(right)} clips of {len(asked)} held-out captions"
    for table in (right, shuffled):
        columns = list(next(iter(table.values())))
        table["mean"] = {name: float(np.mean([row[name] for row in table.values()])) for name in columns}
    return results | {
        "score": right["mean"]["all_five"],
        "score_is": f"asked = made for all five attributes, {count}",
        "controls": {"captions_shuffled": shuffled["mean"]["all_five"]},
        "tables": {"asked is made": right, "captions shuffled": shuffled} | results["tables"],
    }


# ---------------------------------------------------------------------------
# Plan of the run
# ---------------------------------------------------------------------------


def micro_batch_bytes(
    config: dict, bucket: Bucket, codec: Any, caption: int, dtype: str, checkpointing: bool
) -> int:
    """What one micro-batch keeps for the backward pass, counted on the meta device with one and with two
    pairs of blocks. caption: longest in tokens. With checkpointing each block keeps its input; of the one at
    work all is there, and the gradient of its MLP's inside."""
    height, width = (side // codec.space for side in bucket.size)
    count, frames = bucket.batch_size, codec.latent_frames(bucket.frames)

    def kept(depth: int) -> int:
        with torch.device("meta"):
            twin = build(with_depth(config, depth)).to("meta", TORCH_DTYPES[dtype])
            x, times = torch.empty(count, codec.channels, frames, height, width), torch.empty(count)
            y = torch.empty(count, caption, config["text_dim" if is_wan(config) else "caption_channels"])
            mask = torch.empty(count, caption, dtype=torch.bool)
            return saved_bytes(lambda: twin(x, times, y, mask, times, 1.0), twin)

    one, two = kept(1), kept(2)
    if is_wan(config):
        depth, blocks, inner = config["num_layers"], 1, config["ffn_dim"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
    else:
        depth, blocks, width = config["depth"], 2, config["hidden_size"]
        inner = config["mlp_ratio"] * width
    if not checkpointing:
        return one + (depth - 1) * (two - one)
    tokens = count * tokens_of(codec)(bucket.frames, *bucket.size)
    numbers = blocks * (depth - 1) * width + inner  # of a token
    return int(one - (two - one) / 2 * (blocks - 1) + tokens * numbers * TORCH_DTYPES[dtype].itemsize)


def plan_of(
    cfg: Config, model: nn.Module, config: dict, data: Data, batches: Batches, device: torch.device
) -> Layout:
    """Print what this run is going to do, and check that it fits. -> the layout of memory that is taken"""
    codec, text, first, world = batches.source.codec, batches.source.text, batches.epoch(0), world_size()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = (parameters - trained) * TORCH_DTYPES[cfg.dtype].itemsize

    def tokens(bucket: Bucket) -> int:
        return bucket.batch_size * tokens_of(codec)(bucket.frames, *bucket.size)

    largest = max(first.buckets, key=tokens)
    kept = {
        on: micro_batch_bytes(config, largest, codec, text.length, cfg.dtype, on)
        for on in CHECKPOINTING[cfg.gradient_checkpointing]
    }
    besides = 4 * trained / world / GB  # the averaged weights
    besides += 0 if cfg.cache else weights_gb(codec) + weights_gb(text.encoder)
    layouts = [
        dataclasses.replace(layout, gpu_gb=layout.gpu_gb + besides)
        for layout in memory_layouts(trained, frozen, kept, cfg.dtype, world)
    ]
    encoded, where = 0.0, "encoded a batch ahead of the step"
    if cfg.cache:
        encoded = encoded_bytes(first, data.rows, codec, text) / GB
        where = f"encoded once, with the clips, into {cfg.cache} ({encoded:.2f} GB)"

    def told(b: int) -> str:
        bucket, rows = first.batch(b)
        caption = batches.source.caption(int(rows[0]), 0)
        return f"{bucket.name}: {text.cleaned(caption)}"

    clips = f"{len(data.rows)} clips to train on, {len(data.held_rows)} to evaluate"
    used = f"{int(np.diff(first.starts)[first.order.ravel()].sum())} clips of the first epoch"
    ours, theirs = (f"{100 * (value - 1):.1f} %" for value in (first.imbalance, first.imbalance_shuffled))
    waits = f"a step waits {ours} for its costliest rank ({theirs} in a plain shuffle)"
    counts = f"{parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"
    ranks = f"{world} {'GPU' if device.type == 'cuda' else 'CPU process'} x {cfg.accum} accum"
    epochs = f"{cfg.steps * cfg.accum / len(first.order):.2f} epochs"
    lines = [
        ("data", f"{data.source}: {clips}, {len(data.bad)} left out as bad"),
        ("buckets", f"{used} in {first.order.size} batches; {waits}\n{first.table()}"),
        ("text", f"{text.name}; {where}"),
        *row_lines(first.first_of_each(1), told),
        ("model", f"{'Wan' if is_wan(config) else 'STDiT3'} {cfg.model}, {counts}"),
        ("latents", f"{codec.name}; at most {tokens(largest)} tokens a micro-batch"),
        ("steps", f"{cfg.steps} of {ranks}, {epochs}; warm-up {cfg.warmup_steps}"),
    ]
    advice = "lower --tokens_per_gpu, give --cache, or take more GPUs"
    disk = 16 * (cfg.keep + 1) * trained + 4 * parameters
    layout = show_plan(cfg, device, lines, layouts, advice, disk)
    if cfg.cache and encoded > (free := disk_free(cfg.cache) / GB):
        cached = sum(path.stat().st_size for path in cfg.cache.rglob("*.npy")) / GB
        if encoded > free + cached:
            refuse(
                f"--cache {cfg.cache}: {free:.2f} GB free, {cached:.2f} GB there, the first epoch takes "
                f"{encoded:.2f} GB; make room, or leave out --cache"
            )
    return layout


def encoded_bytes(epoch: Epoch, rows: Rows, codec: Any, text: Any) -> float:
    """Of an epoch's clips in the cache, in 16 bits; of captions three tokens for two words are assumed"""
    some = epoch.rows[:: max(1, len(epoch.rows) // 1000)]
    tokens = np.mean([min(text.length, 1.5 * len(rows[int(i)].texts[0].split()) + 1) for i in some])
    numbers = text.width * tokens * len(epoch.rows)
    for count, index in zip(np.diff(epoch.starts), epoch.bucket_of):
        bucket = epoch.buckets[index]
        pixels = math.prod(side // codec.space for side in bucket.size)
        numbers += count * codec.channels * codec.latent_frames(bucket.frames) * pixels
    return 2 * float(numbers)


def weights_gb(module: nn.Module | None) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / GB if module else 0.0


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


# Where a --model that is a folder has its weights: of a model, a run, a checkpoint of ours or of upstream's
WEIGHTS = (
    "model.safetensors diffusion_pytorch_model.safetensors model/model.safetensors ema.safetensors ema.pt "
    "*.index.json model/*.index.json"
)
FRESH = r"temporal_blocks\.|.*\.[qk]_norm\.|fps_embedder\.|rope\."  # what PixArt has not


def read_weights(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """-> (sizes, as XL; weights) of a file or of one of WEIGHTS in a folder; of a run that has not finished
    the averaged weights of its newest checkpoint."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if path.is_dir():
        saved = [folder / "ema.safetensors" for folder in reversed(numbered(path / "checkpoints", "step_"))]
        found = [file for pattern in WEIGHTS.split() for file in sorted(path.glob(pattern))] + saved
        path = next((file for file in found if file.is_file()), path / WEIGHTS.split()[0])
    told: dict = {}
    if path.suffix == ".json":  # ColossalAI's and Hugging Face's shards
        parts = sorted(set(read_json(path)["weight_map"].values()))
        weights = {
            name: value for part in parts for name, value in read_weights(path.parent / part)[1].items()
        }
    elif path.suffix == ".safetensors":
        weights = load_file(path)
        with safe_open(path, "pt") as file:  # a checkpoint of ours says it there
            told = json.loads((file.metadata() or {}).get("config", "{}"))
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
    if (path.parent / "config.json").exists():
        told = read_json(path.parent / "config.json")
    return told, weights


def sizes_of(weights: dict[str, Tensor]) -> dict:
    """As XL, by the shapes of weights. KeyError for other weights."""
    width, channels = weights["x_embedder.proj.weight"].shape[:2]
    head = 2 * len(weights["rope.freqs"]) if "rope.freqs" in weights else 72
    return {
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("spatial_blocks.")),
        "hidden_size": width,
        "num_heads": width // head,
        "mlp_ratio": len(weights["spatial_blocks.0.mlp.fc1.bias"]) / width,
        "in_channels": channels,
        "pred_sigma": len(weights["final_layer.linear.bias"]) == 8 * channels,
        "caption_channels": weights["y_embedder.y_proj.fc1.weight"].shape[1],
        "model_max_length": len(weights["y_embedder.y_embedding"]),
    }


def from_pixart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """PixArt-Sigma's names -> STDiT3's spatial half (reparameter in opensora/utils/ckpt_utils.py)"""
    named = {name.replace("blocks.", "spatial_blocks.", 1): value for name, value in weights.items()}
    named.pop("pos_embed", None)
    named["x_embedder.proj.weight"] = named["x_embedder.proj.weight"].unsqueeze(2)
    rows = named["y_embedder.y_embedding"][: XL["model_max_length"]]
    more = rows[-1:].expand(XL["model_max_length"] - len(rows), -1)
    return named | {"y_embedder.y_embedding": torch.cat([rows, more])}


def model_weights(source: str, meta: bool) -> tuple[dict, dict[str, Tensor]]:
    """-> (sizes, as XL; weights) of what --model names: a folder or file, OWNER/NAME of the Hub, or a file of
    it, OWNER/NAME/FILE. With `meta` no weights that would have to be read. Exit 2 when they cannot be."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    path, a_file = Path(source), source.count("/") == 2 and not source.startswith((".", "/", "~"))
    try:
        if not path.exists():
            if meta and a_file:
                return {}, {}
            repo, _, name = source.rpartition("/") if a_file else (source, "", "*.safetensors")
            path = fetch_model(repo, "config.json", *([] if meta else [name]))
            path = path / name if a_file else path
        a_run = (path / "checkpoints").exists()  # whose config.json has its flags
        if meta and (path / "config.json").exists() and not a_run:
            return read_json(path / "config.json"), {}
        told, weights = read_weights(path)
        if "blocks.0.attn.qkv.weight" in weights:
            weights = from_pixart(weights)
        return sizes_of(weights) | told, weights
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        hint = f"give {PUBLISHED}, a folder or file of such weights, PixArt-Sigma's .pth, or scratch"
        reason = f"has no {error}" if isinstance(error, KeyError) else brief(error)
        refuse(f"--model {source}: {reason}; {hint}")


def open_model(source: str, cfg: Config, codec: Any, text: Any, meta: bool = False) -> tuple[nn.Module, dict]:
    """-> (the published model or one that a run wrote, every weight in its place, PixArt-Sigma with a
    temporal half that starts as the identity, Wan, or from scratch; its sizes for `build`). Exit 2 for one of
    another size. `meta`: its sizes alone, on that device."""
    if config := wan_config(source, cfg, codec, text):
        return open_wan(source, config, cfg, codec, text, meta), config
    model = open_stdit(source, cfg, codec, text, meta)
    return model, model.config


def open_wan(source: str, config: dict, cfg: Config, codec: Any, text: Any, meta: bool) -> nn.Module:
    from safetensors import SafetensorError

    if not source.startswith("scratch") and not Path(source).is_dir():
        check_weights(source, "transformer/*")
    check_sizes(source, config["in_channels"], config["text_dim"], cfg, codec, text)
    with torch.device("cpu" if source.startswith("scratch") and not meta else "meta"):
        model = build(config)
    if meta:
        return model
    none = {"no_caption": torch.from_numpy(text.encode([""])[0]).float()}
    if source.startswith("scratch"):
        weights = model.state_dict()
    else:
        try:
            folder = fetch_model(source, "transformer/*.json", "transformer/*.safetensors")
            _, weights = read_weights(folder / "transformer")
        except (OSError, KeyError, SafetensorError) as error:
            refuse(f"--model {source}: {brief(error)}")
    fill(model, {name: value.float() for name, value in (weights | none).items()}, f"--model {source}")
    model.requires_grad_(True)
    return model


def check_sizes(source: str, channels: int, width: int, cfg: Config, codec: Any, text: Any) -> None:
    if (channels, width) != (codec.channels, text.width):
        refuse(
            f"--model {source} takes latents of {channels} channels and captions of {width} numbers; "
            f"--vae {cfg.vae} has {codec.channels}, --text {cfg.text} {text.width}"
        )


def open_stdit(source: str, cfg: Config, codec: Any, text: Any, meta: bool) -> STDiT3:
    if source == "scratch":
        with torch.device("meta" if meta else "cpu"):
            return STDiT3(
                depth=cfg.depth, hidden_size=cfg.width, num_heads=cfg.heads, in_channels=codec.channels,
                pred_sigma=False, caption_channels=text.width, model_max_length=text.length,
                input_sq_size=cfg.base_size, frame_places=cfg.frame_places,
            )  # fmt: skip
    if not Path(source).exists() and source.count("/") == 1:
        check_weights(source)
    config, weights = model_weights(source, meta)
    if config.get("qk_norm_legacy") or not config.get("qk_norm", True):
        refuse(
            f"--model {source}: turns queries before their norm, or has no such norm; this script knows "
            "Open-Sora 1.2's order"
        )
    is_image_model = weights and not any(name.startswith("temporal_blocks.") for name in weights)
    with torch.device("cpu" if is_image_model and not meta else "meta"):
        model = STDiT3(**{name: config[name] for name in XL if name in config})
    check_sizes(source, model.config["in_channels"], model.config["caption_channels"], cfg, codec, text)
    if meta:
        return model
    if is_image_model:
        made = {name: value for name, value in model.state_dict().items() if re.match(FRESH, name)}
        weights = made | weights
    fill(model, weights, f"--model {source}")
    return model.float()


def train(cfg: Config) -> None:
    from_flags, device = cfg, open_run(cfg)
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or PUBLISHED)
    data = load_data(cfg)
    # all checks come before the first weight is downloaded: sizes alone
    codec, text = open_codec(cfg, device, meta=True), open_text(cfg, device, meta=True)
    model, config = open_model(cfg.model, cfg, codec, text, meta=True)
    table = read_buckets(cfg.buckets) if cfg.buckets else BUCKETS[cfg.stage]
    buckets = table if cfg.stage == "demo" else scaled(table, cfg.tokens_per_gpu, codec)
    batches = Batches(cfg, Source(cfg, data.rows, data.table, codec, text), buckets)
    cfg = with_steps(cfg, WARMUP, batches.length(0), cfg.accum)
    layout = plan_of(cfg, set_trained(model, cfg), config, data, batches, device)
    held = held_out_of(cfg, data, batches, buckets)
    if cfg.check:
        return
    facts = facts_of(cfg, data, table)
    loss_is = "mean squared error"
    run = start_run(from_flags, cfg, __file__, layout, data.bad, loss_is, several=True, **facts)
    cfg = run.cfg
    open_encoders(cfg, batches, held, data, device)
    engine = engine_of(cfg, run, layout, held.source)
    ema = [part.detach().clone() for part in parts_of(engine)]
    if run.checkpoint:
        load_ema(engine, ema, run.checkpoint)
    with out_of_memory(f"lower --tokens_per_gpu {cfg.tokens_per_gpu}"):
        train_steps(cfg, run, engine, ema, config, batches, held, data)
    finish_run(
        run,
        export=partial(export, cfg, engine, ema, config),
        evaluate=partial(final_results, cfg, engine, ema, config, held, data),
        card=partial(card_of, cfg, config, data),
    )


def facts_of(cfg: Config, data: Data, table: Buckets) -> dict:
    """What a checkpoint must have been trained with, to be gone on from"""
    unread = unread_before(cfg.output_dir, data.bad)
    return {
        "unread": unread,
        "data": data.digest(unread),
        "buckets": fingerprint(sorted((name, sorted(lengths.items())) for name, lengths in table.items())),
        "cached": bool(cfg.cache),
    }


def open_encoders(cfg: Config, batches: Batches, held: HeldOut, data: Data, device: torch.device) -> None:
    """Every rank: the weights of codec and text encoder; with a cache they fill it, and wait on the CPU."""
    codec, text = open_codec(cfg, device), open_text(cfg, device)
    for source in (batches.source, held.source):
        source.codec, source.text = codec, text
    if cfg.cache:
        encode_all(batches, held, cfg, data)
        move_encoders(held.source, torch.device("cpu"))
    # what --watch samples
    captions = {"captions": first_captions(data.held_rows, 4)}
    on_rank0(write_json)(cfg.output_dir / "samples" / "captions.json", captions)


def engine_of(cfg: Config, run: Run, layout: Layout, source: Source) -> Any:
    """Every rank: DeepSpeed's engine around what is trained, from run.checkpoint if there is one"""
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    model, _ = open_model(cfg.model, cfg, source.codec, source.text)
    model.checkpointing = layout.checkpointing
    model = set_trained(model, cfg).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, cfg.lr, (0.9, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )
    return open_engine(run, model, optimizer, frozen_left_out=bool(cfg.lora_r))


def held_out_of(cfg: Config, data: Data, batches: Batches, buckets: Buckets) -> HeldOut:
    """Of the clips that are evaluated, or of the training clips where none of those fits a bucket"""
    codec, text, epoch = batches.source.codec, batches.source.text, batches.epoch(0)
    held = HeldOut(cfg, Source(cfg, data.held_rows, data.held_table, codec, text), buckets, epoch)
    return held if held.places else HeldOut(cfg, batches.source, buckets, epoch)


def first_captions(rows: Rows, count: int) -> list[str]:
    """`count` different ones, or as many as there are"""
    captions: dict[str, None] = {}
    for i in range(len(rows)):
        captions[rows[i].texts[0]] = None
        if len(captions) == count:
            break
    return list(captions)


@on_rank0
def unread_before(folder: Path, bad: list[dict]) -> list[int]:
    """Videos that could not be read (unread_names), by the newest checkpoint, or of a new run by its data"""
    saved = newest_checkpoint(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    return read_json(saved / "checkpoint.json").get("unread", []) if saved else unread_names(bad)


def unread_names(bad: Iterable[dict]) -> list[int]:
    return sorted({name_number(sample["video"]) for sample in bad if "video" in sample})


def move_encoders(source: Source, device: torch.device) -> None:
    source.codec.to(device)
    if source.text.encoder:
        source.text.encoder.to(device)


def encode_all(batches: Batches, held: HeldOut, cfg: Config, data: Data) -> None:
    """Every rank: fill the cache with the first epoch's clips and those that are evaluated. Clips that cannot
    be read are left out of the batches, in which others come up, until all can be read."""
    bad: dict[str, dict] = {}
    while True:
        count, epoch = len(bad), batches.epoch(0)
        for source, parts in (
            (batches.source, [(epoch, range(len(epoch.bucket_of)))]),
            (held.source, [(groups, [b]) for groups, b in held.places]),
        ):
            for groups, numbers in parts:
                unread = fill_cache(source, groups, numbers)
                source.table.num_frames[list(unread)] = 0
                bad |= {reason["where"]: reason for reason in unread.values()}
        if len(bad) == count:
            break
        on_rank0(leave_out)(data.source, len(data.rows) - len(bad), [*data.bad, *bad.values()], cfg.max_bad)
        batches.forget()
        held.forget()
    data.bad.extend(bad.values())
    if rank() == 0:
        for reason in bad.values():
            append_json(cfg.output_dir / "bad_samples.jsonl", reason)
        filled = {"rows": data.rows.folder.name, "source": data.source}
        write_json(cfg.cache / "rows" / "filled.json", filled)


def clock(device: torch.device) -> Any:
    """A point in time on the device's own clock: nothing waits for it."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_in(spans: list[tuple[Any, Any]]) -> float:
    """Of pairs of clock()"""
    if spans and not isinstance(spans[0][0], float):
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000
    return sum(end - start for start, end in spans)


class Window:
    """What happened between two lines of metrics.jsonl."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.since, self.waited, self.clips, self.tokens = time.monotonic(), 0.0, 0, 0
        self.forward: list[tuple[Any, Any]] = []

    def waiting(self, batches: Iterator[list[dict]]) -> Iterator[list[dict]]:
        """The batches, as they come"""
        while True:
            begun = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - begun
            if batch is None:
                return
            yield batch

    def numbers(self, engine: Any) -> dict[str, float]:
        """Every rank. straggler: the slowest rank's forward passes / the mean rank's; backward passes wait
        for each other, so they cannot tell. weight_norm: data that repeat show there first."""
        seconds, forward = time.monotonic() - self.since, seconds_in(self.forward)
        squares = 0.0
        for part in parts_of(engine):
            squares += sum(float(piece.square().sum()) for piece in part.detach().split(1 << 22))
        numbers = {
            "weight_norm": math.sqrt(over_ranks(squares, "sum")),
            "samples_per_s": over_ranks(self.clips, "sum") / seconds,
            "tokens_per_s_per_gpu": over_ranks(self.tokens, "mean") / seconds,
            "straggler": over_ranks(forward, "max") / over_ranks(forward, "mean"),
            "share_waiting_for_data": over_ranks(self.waited / seconds, "mean"),
        }
        self.restart()
        return numbers


def train_steps(
    cfg: Config, run: Run, engine: Any, ema: list[Tensor], config: dict, batches: Batches, held: HeldOut,
    data: Data,
) -> None:  # fmt: skip
    device, codec, window = engine.device, batches.source.codec, Window()
    steps = training_steps(
        run,
        engine,
        save=partial(save, cfg, run, engine, ema, config, batches.source, data),
        evaluate=partial(evaluate_at, cfg, engine, ema, config, held),
        numbers=partial(window.numbers, engine),
    )
    ahead = window.waiting(batches_ahead(batches, cfg, run.step))
    for (step, row), micro_batches in zip(steps, ahead):
        if step == run.step or step % cfg.save_every == 0 or step % cfg.eval_every == 0:
            window.restart()  # the clock is for training alone
        noise = torch.Generator(device).manual_seed(seed_of(cfg.seed, step, rank()))
        row["loss"] = torch.zeros((), device=device)
        for batch in micro_batches:
            start, bucket, x = clock(device), batch["bucket"], batch["x"].to(device).float()
            loss = training_loss(engine, x, batch, cfg, shift_of(cfg, bucket, codec), noise)
            window.forward.append((start, clock(device)))
            engine.backward(loss)
            engine.step()  # skips the update, on all ranks, when a gradient is not finite
            row["loss"] += loss.detach() / cfg.accum
            window.clips += len(x)
            window.tokens += len(x) * tokens_of(codec)(bucket.frames, *bucket.size)
        if engine.was_step_applied():
            decay = min(cfg.ema, (2 + step) / (11 + step))
            torch._foreach_lerp_(ema, [part.detach() for part in parts_of(engine)], 1 - decay)


def evaluate_at(
    cfg: Config, engine: Any, ema: list[Tensor], config: dict, held: HeldOut, step: int
) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    model = plain_model(config, merged(averaged_weights(engine, ema), cfg), engine.device, cfg.dtype)
    losses = held_out_loss(model, held, cfg)
    shown = " | ".join(f"{name} {value:.4f}" for name, value in losses.items())
    log.info(f"eval step {step:06d} | {shown}")
    return {f"held_out_{name}": value for name, value in losses.items()}


def save(
    cfg: Config, run: Run, engine: Any, ema: list[Tensor], config: dict, source: Source, data: Data, step: int
) -> None:
    """Every rank: checkpoints/step_000200 to resume from, with the averaged weights whole (of LoRA the
    adapter), which --watch and another number of ranks read. Videos that cannot be read are told of."""
    from safetensors.torch import save_file

    unread = unread_names(merged_over_ranks(dict(source.bad)).values())
    run.facts["unread"] = sorted({*run.facts["unread"], *unread})
    run.facts["data"] = data.digest(run.facts["unread"])
    weights = averaged_weights(engine, ema)
    kept = {name: value for name, value in weights.items() if not cfg.lora_r or ".lora_" in name}

    def add_average(aside: Path) -> None:
        if rank() == 0:
            save_file(kept, aside / "ema.safetensors", {"config": json.dumps(config)})

    save_run(run, engine, step, add_average, frozen_left_out=bool(cfg.lora_r))


# ---------------------------------------------------------------------------
# The finished model: averaging, export, card
# ---------------------------------------------------------------------------


# What a model is used with, and how it is sampled unless flags say otherwise
USED = "vae vae_model text text_model base_size shift".split()
SAMPLING = "resolution ratio frames fps sample_steps guidance aes".split()


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def best_of(
    cfg: Config, engine: Any, ema: list[Tensor], config: dict, held: HeldOut
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Every rank: -> (on rank 0 the merged weights that are kept, their held-out losses by bucket, {tried:
    loss}). Without --average the average along the run is taken; with it also the last weights and the means
    of both over the last --average checkpoints are tried, and the lowest loss wins. Our own experiment: there
    is no published number to lean on."""
    average = averaged_weights(engine, ema)
    last = whole_weights(engine) if cfg.average else {}
    tried = candidates(cfg, average, last) if rank() == 0 else {}
    losses = {}
    for name in from_all_ranks(list(tried))[0]:
        model = plain_model(config, tried.get(name, {}), engine.device, cfg.dtype)
        losses[name] = held_out_loss(model, held, cfg)
        del model
    totals = {name: loss["loss"] for name, loss in losses.items()}
    best = min(totals, key=totals.__getitem__)
    if cfg.average:
        shown = " | ".join(f"{name} {loss:.5f}" for name, loss in totals.items())
        log.info(f"averaging | {shown} | taken: {best}")
    return tried.get(best, {}), losses[best], totals


def candidates(
    cfg: Config, average: dict[str, Tensor], last: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Rank 0: {name: merged weights}"""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file

    if not cfg.average:
        return {"average": merged(average, cfg)}
    tried = {"average": average, "weights": last}
    saved = numbered(cfg.output_dir / "checkpoints", "step_")[-cfg.average :]
    if len(saved) > 1:
        averages = [average | load_file(path / "ema.safetensors") for path in saved]
        tried[f"average, mean of {len(saved)} checkpoints"] = mean_of(averages)
        # it prints each rank, with a bar of its own
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trained = [get_fp32_state_dict_from_zero_checkpoint(str(path), tag="deepspeed") for path in saved]
        tried[f"weights, mean of {len(saved)} checkpoints"] = mean_of([last | state for state in trained])
    return {name: merged(weights, cfg) for name, weights in tried.items()}


def export(cfg: Config, engine: Any, ema: list[Tensor], config: dict, target: Path) -> None:
    """Every rank: model/ with the averaged weights; Wan's LoRA also as diffusers loads it"""
    weights = averaged_weights(engine, ema)
    write_model(cfg, config, merged(weights, cfg), target)

    @on_rank0
    def write_lora() -> None:
        from diffusers import WanPipeline

        names = {name: name.removeprefix("base_model.model.").replace(".default", "") for name in weights}
        layers = {names[name]: value.contiguous() for name, value in weights.items() if ".lora_" in name}
        kind = lora_of(False, cfg).to_dict()
        WanPipeline.save_lora_weights(target, layers, transformer_lora_adapter_metadata=kind)

    if cfg.lora_r and is_wan(config):
        write_lora()


@on_rank0
def write_model(cfg: Config, config: dict, weights: dict[str, Tensor], target: Path) -> None:
    """Under the published names"""
    from safetensors.torch import save_file

    folder, name = target, "model.safetensors"
    if is_wan(config):
        folder, name = target / "transformer", "diffusion_pytorch_model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in weights.items() if name != "no_caption"}
    write_whole(folder / name, lambda aside: save_file(weights, aside, {"format": "pt"}))
    told = of_diffusers(config) if is_wan(config) else {"model_type": "STDiT3"} | config
    write_json(folder / "config.json", told)
    write_json(target / "t2v_rflow.json", {name: getattr(cfg, name) for name in (*USED, *SAMPLING)})
    copy_code(target, __file__)


def final_results(
    cfg: Config, engine: Any, ema: list[Tensor], config: dict, held: HeldOut, data: Data
) -> dict:
    """Every rank: what results.json says of the finished model; and model/samples.png, .mp4 and .gif"""
    target = cfg.output_dir / "model"
    weights, losses, totals = best_of(cfg, engine, ema, config, held)
    if cfg.average:
        write_model(cfg, config, weights, target)
    model = plain_model(config, weights, engine.device, cfg.dtype)
    move_encoders(held.source, engine.device)
    results = evaluate(model, losses, held, data, cfg)
    if cfg.average:
        results["tables"]["averaging"] = {name: {"held-out loss": loss} for name, loss in totals.items()}

    @on_rank0
    def show_samples() -> None:
        bucket = max(held.shapes, key=lambda b: (b.frames, math.prod(b.size)))
        captions = first_captions(held.source.rows, 6)
        clips = sample_clips(model, captions, bucket, held.source.codec, held.source.text, cfg, 0)
        write_samples(clips, captions, target / "samples", cfg.fps, max(1, bucket.frames // 8))

    show_samples()
    return results


def card_of(cfg: Config, config: dict, data: Data, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    scratch = cfg.model.startswith("scratch")
    what = "Wan's transformer, as diffusers has it," if is_wan(config) else "Open-Sora 1.2's STDiT3"
    started = "trained from scratch" if scratch else f"fine-tuned from `{cfg.model}`"
    caption = json.dumps(data.held_rows[0].texts[0])
    return {
        "about": f"{what} {started} on `{Path(data.source).name}` by `t2v_rflow.py`, which lies in this "
        "repository; the weights have the published names.",
        "usage": "from common import write_video\nfrom t2v_rflow import generate\n\n"
        f'frames = generate({caption}, folder)  # uint8 (F, H, W, 3)\nwrite_video(frames, "sample")',
        "more": "![samples](samples.png)",
        "data": Path(data.source).name,
        "library_name": "pytorch",
        "pipeline_tag": "text-to-video",
        "base_model": "" if scratch or Path(cfg.model).exists() else cfg.model,
        "tags": ["text-to-video", "wan" if is_wan(config) else "open-sora", "rectified-flow", "deepspeed"],
    }


# ---------------------------------------------------------------------------
# Use: samples of a prompt, and of each checkpoint of a run
# ---------------------------------------------------------------------------


def settings_of(model: str | Path, flags: dict) -> Config:
    """What a model was trained with, and is sampled with by default, under `flags`"""
    path = fetch_model(str(model), "*.json") / "t2v_rflow.json"
    saved = read_json(path) if path.exists() else {}
    return Config(report_to="none", **(saved | flags))


def generate(
    prompt: str,
    model: str | Path,
    seed: int = 0,
    image: Path | None = None,
    extend: Path | None = None,
    **flags: Any,
) -> np.ndarray:
    """One clip for a caption from a finished model, a folder or a Hub id: uint8 (F, H, W, 3). Its first frame
    is that of `image`, or it begins with the last frames of the clip `extend` and goes on; the model sees
    these as latents, which it does not change.

    flags: those of Config; what the model was trained with by default. Raises BadSample for a file that
    cannot be used.
    """
    cfg, device = settings_of(model, flags), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec, text = open_codec(cfg, device), open_text(cfg, device)
    net = open_model(str(model), cfg, codec, text)[0].to(device, TORCH_DTYPES[pick_dtype(cfg.dtype)]).eval()
    bucket = Bucket(cfg.resolution, codec.whole_length(cfg.frames), cfg.ratio, 1)
    known = predicted = None
    if file := image or extend:
        known, predicted = condition(file, extend is not None, bucket, codec, seed)
    caption = scored_caption(prompt, (f"{cfg.aes:.1f}" if cfg.aes else "", "", ""), None)
    x = sample(net, text.encode([caption]), bucket, codec, cfg, seed, known, predicted)
    return codec.decode(x, bucket.frames)[0].cpu().numpy()


def condition(file: Path, extend: bool, bucket: Bucket, codec: Any, seed: int) -> tuple[Tensor, Tensor]:
    """-> (latents (1, C, T, h, w) that begin with those of `file`, bool (T,): which are to be predicted). Of
    a clip the last 17 frames are given, a piece of Open-Sora's VAE, or about half of a shorter clip that is
    predicted, as many as whole latents show; a picture stands still for as long as the first latent lasts.
    Raises BadSample."""
    count, *_ = probe(file)
    if extend and count == 1:
        raise BadSample("is an image; give it as --image, --extend takes a clip")
    if not extend and count > 1:
        raise BadSample("is a clip; give it as --extend, --image takes a picture")
    head = 1
    if extend:
        head = min(PIECE if bucket.frames > PIECE else bucket.frames // 2, count)
        if codec.name == "opensora":
            head -= (head - min(bucket.frames, PIECE)) % 4
        elif codec.name == "wan":
            head = (head - 1) // 4 * 4 + 1
        if not 0 < head < bucket.frames:
            raise BadSample(
                f"has {count} frames, which {bucket.frames} cannot begin with: give more --frames, or a "
                "longer clip"
            )
    try:
        clip, _ = timed_frames(file, range(count - head, count), bucket.size)
    except BadSample:  # headers often count one too many
        clip, _ = timed_frames(file, range(max(0, count - 1 - head), count - 1), bucket.size)
    if not extend and codec.name == "opensora":
        clip = clip.repeat((min(bucket.frames, PIECE) - 1) % 4 + 1, axis=0)
    start = codec.encode(torch.from_numpy(clip[None]), [torch.Generator().manual_seed(seed)])
    known = torch.zeros(1, codec.channels, codec.latent_frames(bucket.frames), *start.shape[3:])
    known[:, :, : start.shape[2]] = start.cpu()
    return known, torch.arange(known.shape[2]) >= start.shape[2]


def sample_prompt(cfg: Config) -> None:
    """--prompt: <output_dir>/samples/<prompt>.mp4, .gif and .png"""
    model, default = cfg.model or str(cfg.output_dir / "model"), Config()
    names = [*SAMPLING, *USED]
    flags = {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(default, name)}
    try:
        clip = generate(cfg.prompt, model, cfg.seed, cfg.image, cfg.extend, **flags)
    except BadSample as error:
        refuse(f"{cfg.image or cfg.extend} {error}")
    path = sample_path(cfg, cfg.prompt)
    write_samples(clip[None], [cfg.prompt], path, settings_of(model, flags).fps, max(1, len(clip) // 8))
    log.info(f"{path}.mp4, .gif, .png")


def watch(cfg: Config) -> None:
    """--watch RUN_FOLDER: clips of each new checkpoint of a run, into its samples/ and its W&B run, on
    another GPU or machine. Ends with a run that has finished. It may be a copy that rsync keeps fresh."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = read_json(cfg.watch / "config.json")
        captions = [cfg.prompt]
        if not cfg.prompt:
            captions = read_json(cfg.watch / "samples" / "captions.json")["captions"]
    except OSError as error:
        refuse(f"--watch {cfg.watch}: {error.strerror}; give the --output_dir of a run that has begun")
    names = [*USED, *SAMPLING, *"depth width heads frame_places lora_r lora_alpha mask_share seed".split()]
    run_cfg = dataclasses.replace(cfg, prompt="", **{name: saved[name] for name in names})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec, text = open_codec(run_cfg, device), open_text(run_cfg, device)
    started, config = open_model(saved["model"] or PUBLISHED, run_cfg, codec, text)
    base = set_trained(started, run_cfg).state_dict()
    track = tracker(cfg.report_to, cfg.watch, "t2v_rflow", shared=True, primary=False)
    bucket = Bucket(run_cfg.resolution, codec.whole_length(run_cfg.frames), run_cfg.ratio, len(captions))
    sampled: set[str] = set()
    while True:
        finished = (cfg.watch / "SUCCESS").exists()
        for path in numbered(cfg.watch / "checkpoints", "step_"):
            if path.name in sampled or not (path / "checkpoint.json").exists():
                continue
            try:
                weights = merged(base | load_file(path / "ema.safetensors"), run_cfg)
            except (OSError, SafetensorError) as error:
                log.info(f"{path} went away or is not whole yet ({brief(error)})")
                continue
            model = plain_model(config, weights, device, pick_dtype(cfg.dtype))
            clips = sample_clips(model, captions, bucket, codec, text, run_cfg, 0)
            target = cfg.watch / "samples" / path.name
            write_samples(clips, captions, target, run_cfg.fps, max(1, bucket.frames // 8))
            log.info(f"{target}.mp4, .gif, .png")
            step = int(path.name.removeprefix("step_"))
            track({"samples": target.with_suffix(".mp4"), "samples_of_step": step}, None)
            sampled.add(path.name)
        if finished:
            return
        time.sleep(10)


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, {})
    preset = {} if cfg.recipe == "none" or cfg.demo else RECIPES[cfg.recipe].get(cfg.stage, {})
    if cfg.model and not cfg.watch and (wan_folder(cfg.model) / "config.json").exists():
        ours = wan_folder(cfg.model).parent / "t2v_rflow.json"  # a model that a run has written knows it
        beside = {"vae_model": cfg.model, "text_model": cfg.model}
        preset = preset | WAN | (read_json(ours) if ours.exists() else beside)
    if preset:
        cfg = read_flags(Config, __doc__, DEMO, {}, preset=preset)
    watch(cfg) if cfg.watch else sample_prompt(cfg) if cfg.prompt else train(cfg)


if __name__ == "__main__":
    run(main)
