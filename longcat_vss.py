# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "av==18.1.0", "deepspeed==0.19.8", "einops==0.8.2", "huggingface_hub==2.4.0", "kaldiio==2.18.1",
#   "matplotlib==3.11.2", "numpy==2.4.6", "opencv-python-headless==5.0.0.93", "peft==0.21.2",
#   "pystoi==0.4.1", "requests==2.34.2", "safetensors==0.8.0", "scipy==1.17.1",
#   "torch>=2.6", "tqdm==4.70.1", "transformers==5.23.0", "tyro==1.0.17",
# ]
# ///
"""Video and speech to speech: LongCat-Flash-Omni 560B learns to see a clip, hear a question and speak the
answer, by LoRA.

    python longcat_vss.py --demo                     # minutes on 2 CPU cores: a tiny one learns to speak
    python longcat_vss.py --check                    # storage, memory, time: what it takes, and what fits
    ./run.sh longcat_vss.py 8 --data_dir data --codec LongCat-Audio-Codec    # eight GPUs, adapter pushed
    python longcat_vss.py --predict in.mp4 in.wav    # writes out.wav and prints the text

DATA: data/train/01/{in.mp4,in.wav,out.wav}, data/train/02/..., and, if there, a folder data/test beside it.
Also .mov, .mkv, .mp3 and .flac; without in.wav the sound track of in.mp4 is the question; out.txt, what
out.wav says, is optional and helps much.

The model is meituan-longcat/LongCat-Flash-Omni (1.1 TB) in its own files; its authors published no training
code. The language model is transformers' LongcatFlash, corrected to load the checkpoint; encoders and speech
heads are written here, under the names of the official weights. Replies are spoken in four parallel streams
of codes beside the text. LoRA on the attention, ZeRO-3 with weights in RAM or on NVMe. Speech codes come from
LongCat-Audio-Codec (--codec, a checkout with its ckpts/, encoder too).

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.

Never run on the real weights, nor on a GPU. Measured: --demo, 6.5 minutes on 2 CPU cores: 1.00 of 96 spoken
replies to clips never seen are recognised, 0.17 with the video blanked, 0.19 with the audio silenced; after
LoRA, new words in a new voice, 1.00.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import shutil
import sys
import time
import types
import warnings
import wave
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

# isort: off
from common import (
    CHECKPOINTING, GB, BadSample, Free, Layout, Lower, Row, Run, barrier, batches_ahead, brief, cached_frames,
    check_loaded, check_settings, choose_layout, copy_code, decoded_frames, demo_module, digest_of, disk_free,
    ds_config, epoch_order, evaluating, fetch_model, fingerprint, finish_run, full_weights, gathered,
    identity_of, in_threads, init_distributed, leave_out, local_ranks, log, memory_here, memory_layouts,
    merged_over_ranks, normalized, on_rank0, open_engine, open_media, open_run, out_of_memory, over_ranks,
    packet_times, pick_dtype, rank, read_flags, read_json, refuse, rounds, row_lines, run, save_array,
    save_run, show_plan, show_results, split_clips, split_of, start_run, steps_line, tiny_model,
    training_steps, with_steps, world_size, write_json, write_lines, write_text, write_whole,
)  # fmt: skip

BASE_MODEL = "meituan-longcat/LongCat-Flash-Omni"
# 562.6 B parameters in bf16, counted with the published sizes (tests/test_longcat_maths.py)
PUBLISHED_BYTES = 1.125e12
WARMUP = 100  # steps, when --warmup_steps is not given
SAMPLE_RATE = 16_000  # of all speech that the model hears
# Of the speech streams, from constants.py of the official repository (commit 9df66a8).
CODEBOOKS = 4  # one semantic, three acoustic
CODEC_EOS, CODEC_PAD, CODEC_OFFSET = 2, 3, 32  # codes are stored 32 higher, the ids below are special
FRAME_SECONDS = 0.06  # of speech for one row of codes: LongCat-Audio-Codec has 16.67 a second
AUDIO_VOCABULARY = 8224  # CODEC_OFFSET and the 8192 semantic codes
# What the official tokenizer calls them; the names that users see are in the comments.
SPECIAL = {
    "audio_start": "<mask_110>",  # <|audio|>
    "audio_end": "<mask_111>",  # <|/audio|>
    "audio_pad": "<mask_112>",  # <|audio_pad|>
    "pause": "<mask_113>",  # </pause>
    "image_pad": "<mask_118>",  # <|image_pad|>
}
HEADS = ("semantic", "acoustic_1", "acoustic_2", "acoustic_3")
STREAMS = ("text", *HEADS)
BEFORE = "spoken before this training"  # a table of results.json
SHOWN = ("as it is", "video blanked", "audio silenced")  # how held-out clips are shown in an evaluation
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on clips and words made on the spot: minutes on 2 CPU cores, no network
    check: Free[bool] = False  # all checks and the plan, no training
    output_dir: Free[Path] = Path("runs/longcat_vss")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    # train/01/{in.mp4,in.wav,out.wav,out.txt}, ... and, if there, test/ beside it
    data_dir: Free[Path] = Path("data")
    frames: int = 64  # most frames of a clip; two a second are taken
    size: int = 224  # pictures have at most size x size pixels, in their own proportions; a multiple of 28
    max_seconds: float = 120.0  # longest in.wav and out.wav
    val_fraction: float = 0.1  # share of the clips held out when there is no test/
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Free[Path] = Path("cache")  # decoded frames and speech, speech codes
    num_workers: Free[int] = 0  # threads that decode; 0: one for each core that is this rank's

    # model

    model: str = ""  # LongCat-Flash-Omni, a Hub id or a folder; for --predict <output_dir>/model
    # checkout of LongCat-Audio-Codec with its ckpts/; the tiny model has a codec of its own
    codec: Free[Path | None] = None
    lora_r: int = 8  # rank; 0: full fine-tuning
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    # also dense MLPs and audio_output_layers
    lora_targets: str = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
    gradient_checkpointing: Free[Literal["auto", "on", "off"]] = "auto"  # auto: when it does not fit without

    # loss: the published weights of the first pre-training stage; those of fine-tuning are not published

    text_weight: float = 1.5  # of what the reply says
    audio_weight: float = 0.25  # of each of the four code streams
    semantic_weight: float = 0.1  # of the semantic stream once more

    # optimisation

    steps: Free[int] = 0  # optimizer steps in all, over all resumes; 0: as many as --epochs are
    epochs: Free[float] = 3.0  # passes over the training clips
    batch_size: Lower[int] = 1  # clips per GPU per micro-step
    accum: Lower[int] = 16  # micro-steps per optimizer step
    lr: Free[float] = 1e-5
    warmup_steps: Free[int | None] = None  # default: 100, but at most a tenth of the steps
    lr_decay: bool = True  # to 0 at the last step, along a cosine
    weight_decay: float = 0.1
    beta2: float = 0.95  # of AdamW
    clip: Free[float] = 1.0  # gradient norm limit
    # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    # JSON file, or auto: what fits
    deepspeed: Free[Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])]] = "auto"
    # folder on a fast disk: weights may lie there when they do not fit into RAM
    nvme_path: Free[Path | None] = None

    # speaking

    predict: Free[tuple[Path, ...]] = ()  # in.mp4 [in.wav]: speak the reply with --model and stop
    out: Free[Path] = Path("out.wav")  # of --predict
    max_reply: Free[float] = 30.0  # longest reply, seconds
    repetition_penalty: Free[float] = 1.1  # of codes heard in the last 30 rows, as the official demo has it
    eval_samples: Free[int] = 8  # held-out clips of an evaluation; 0: none
    # answer them aloud at the end, one pass through the model for each 60 ms, where that takes a tenth of the
    # training at most; --no_speak: never
    speak: Free[bool] = True

    # watching and saving

    log_every: Free[int] = 1
    eval_every: Free[int] = 200
    save_every: Free[int] = 50
    keep: Free[int] = 2  # newest checkpoints kept
    resume: Free[bool] = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Free[Literal["none", "tensorboard", "wandb"]] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: Free[bool] = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: Free[str] = "longcat_vss"
    public: Free[bool] = False  # visibility of a new repository

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="frames batch_size accum log_every eval_every save_every keep",
            at_least_0="steps warmup_steps num_workers lora_r eval_samples text_weight audio_weight "
            "semantic_weight",
            above_0="lr clip epochs lora_alpha max_seconds max_reply repetition_penalty",
            shares="val_fraction lora_dropout max_bad",
        )
        if self.size < 28 or self.size % 28:
            near = max(1, self.size // 28) * 28
            raise ValueError(f"--size {self.size}: a multiple of 28 (pairs of 14-pixel patches), {near} say")
        if self.frames % 2:
            raise ValueError(f"--frames {self.frames}: an even number, the model sees frames in pairs")
        if self.demo and self.data_dir != Path("data"):
            raise ValueError(f"--demo makes its own clips: leave out --data_dir {self.data_dir}")
        if len(self.predict) > 2:
            files = " ".join(map(str, self.predict))
            raise ValueError(f"--predict {files}: one video and one file of speech, in.mp4 in.wav")
        if self.nvme_path and not self.nvme_path.is_dir():
            raise ValueError(f"--nvme_path {self.nvme_path}: no such folder")


# The demo is two presets: the same code with other numbers. Recipe and scores: README.md and
# benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/longcat_vss_demo"), report_to="none", size=56, lora_r=0, steps=1000,
    batch_size=8, accum=1, lr=2e-3, warmup_steps=40, weight_decay=0.01, max_reply=3.0, repetition_penalty=1.0,
    eval_samples=96, log_every=50, eval_every=500, save_every=250,
)  # fmt: skip
# What the demo does with the model that it trained: a frozen base learns other words in another voice.
ADAPT = dict(
    lora_r=8, lora_dropout=0.0, steps=200, lr=4e-3, warmup_steps=20,
    lora_targets="q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj,gate_proj,up_proj,down_proj,"
    "audio_output_layers",
)  # fmt: skip

# ---------------------------------------------------------------------------
# Data: folders of video and speech
# ---------------------------------------------------------------------------

SUFFIXES = {
    "text": (".txt",),
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi"),
    "speech": (".wav", ".mp3", ".flac", ".m4a", ".ogg", ".opus"),
}


@dataclass(frozen=True)
class Clip:
    """One sample, decoded."""

    name: str  # of its folder, as train/01
    frames: Path  # .npy of uint8 (F, H, W, 3), two a second
    size: tuple[int, int]  # H, W
    seconds: tuple[float, ...]  # when each pair of frames is seen
    spread: bool  # pairs are further apart than a second, for the clip is longer than --frames take
    speech: Path  # .npy of float32 (N,), 16 kHz, in [-1, 1]
    reply: Path | None  # the same of what is to be said; None in --predict
    text: str  # what it says, "" if unknown
    rates: tuple[int, ...]  # of the files of speech, Hz
    codes: Path | None = None  # .npy of int64 (T, 4), the reply as its codec has it


def member(folder: Path, stem: str, kind: str) -> Path | None:
    """in.mp4, IN.MOV, in.wav, ...: the file of this stem and kind in a sample folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.stem.lower() == stem)
    return next((path for suffix in SUFFIXES[kind] for path in files if path.suffix.lower() == suffix), None)


@contextlib.contextmanager
def opened(path: Path, kind: Literal["video", "audio"]) -> Iterator[tuple[Any, Any]]:
    """open_media, whose reasons say which of a sample's files they are about"""
    try:
        with open_media(path, kind) as media:
            yield media
    except BadSample as error:
        raise BadSample(f"{path.name}: {error}") from error


def video_times(path: Path, most: int) -> tuple[tuple[int, ...], tuple[float, ...], bool, tuple[int, int]]:
    """(the numbers of the frames to take: two for each second begun, `most` at most; when each pair is seen,
    in seconds; whether pairs are further apart than a second; height and width of the upright picture).

    As the official loader takes them (data/utils.py): evenly to the end of the last second begun, frames
    that are not there being the last one again.
    """
    with opened(path, "video") as (container, stream):
        rate, frame = float(stream.average_rate or 0), next(decoded_frames(container, stream), None)
    if frame is None or not rate:
        raise BadSample(f"{path.name}: {'no frame decodes' if rate else 'does not say how long it is'}")
    with opened(path, "video") as (container, stream):
        total = len(packet_times(container, stream)[1])
    seconds = math.ceil(total / rate)
    spread = 2 * seconds > most
    places = np.linspace(0, total - 1, most) if spread else np.linspace(0, seconds * rate, 2 * seconds)
    numbers = np.minimum(np.rint(places).astype(int), total - 1).tolist()
    turned = frame.rotation % 180
    shape = (frame.width, frame.height) if turned else (frame.height, frame.width)
    return tuple(numbers), tuple(number / rate for number in numbers[::2]), spread, shape


def picture_size(height: int, width: int, cap: int, pairs: int, vision: dict) -> tuple[int, int]:
    """Height and width that the ViT sees, in the picture's proportions: multiples of 14 and 28, at most
    cap x cap pixels and what vision/config.json allows (smart_resize of encoders/utils.py)"""
    patch = vision["patch_size"]
    factor = patch * vision["spatial_merge_size"] * vision.get("resize_factor", 2)
    limits = (vision.get("max_tokens"), vision.get("max_tokens_video_vit", 0) // pairs)
    most = min([cap**2, *(tokens * patch**2 for tokens in limits if tokens)])
    least = vision.get("min_tokens_video_vit", vision.get("min_tokens", 0)) * patch**2
    if height < factor:
        height, width = factor, int(factor / height * width) + 1
    if width < factor:
        height, width = int(factor / width * height) + 1, factor
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (math.floor(side / shrink / factor) * factor for side in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    if rows < factor:  # a very wide one
        rows, columns = factor, most // factor
    if columns < factor:
        rows, columns = most // factor, factor
    return rows // 14 * 14, columns // 28 * 28


def read_speech(path: Path) -> tuple[np.ndarray, int]:
    """(float32 (N,) in [-1, 1], mono, at 16 kHz; the file's own sampling rate) of any file that has sound.
    Raises BadSample."""
    import av

    with opened(path, "audio") as (container, stream):
        resampler, parts = av.AudioResampler("fltp", None, SAMPLE_RATE), []
        try:
            for frame in container.decode(stream):
                parts += resampler.resample(frame)
            parts += resampler.resample(None) if parts else []
        except av.error.FFmpegError as error:
            raise BadSample(f"cannot be decoded: {error.strerror}") from error
        sound = np.concatenate([np.zeros(0, np.float32), *(part.to_ndarray().mean(0) for part in parts)])
        return np.clip(sound, -1, 1), stream.rate


def check_speech(sound: np.ndarray, name: str, longest: float) -> None:
    """BadSample for speech that is empty, too short, too long or silent."""
    seconds = len(sound) / SAMPLE_RATE
    if seconds < 0.1:
        raise BadSample(f"{name} is empty" if not seconds else f"{name} has {seconds:.2f} s, 0.1 needed")
    if seconds > longest:
        raise BadSample(f"{name} has {seconds:.1f} s, --max_seconds is {longest:g}: cut it")
    if (loud := float(np.sqrt(np.mean(sound**2)))) < 1e-3:
        raise BadSample(f"{name} is silent ({20 * math.log10(max(loud, 1e-9)):.0f} dB)")


def cached_speech(path: Path, cfg: Config) -> tuple[Path, int]:
    """Decoded and checked once: (.npy of read_speech, the file's own sampling rate)."""
    # 2: version of the reader
    target = cfg.cache_dir / "speech" / f"{digest_of(f'{identity_of(str(path))}|2')}.npy"
    sound, rate = (np.load(target), 0) if target.exists() else read_speech(path)
    check_speech(sound, path.name, cfg.max_seconds)
    if not target.exists():
        save_array(target, sound)
    with opened(path, "audio") as (_, stream):
        return target, rate or stream.rate


def open_clip(folder: Path, cfg: Config, base: Base) -> Clip:
    """Find, decode and check the members of a sample folder. Raises BadSample."""
    video, reply = member(folder, "in", "video"), member(folder, "out", "speech")
    if video is None or reply is None:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise BadSample(f"no {'in.mp4' if video is None else 'out.wav'}; there is {names}")
    out_txt = member(folder, "out", "text")
    text = read_words(out_txt) if out_txt else ""
    speech = member(folder, "in", "speech") or video
    name = f"{folder.parent.name}/{folder.name}"
    clip = make_sample(name, video, speech, reply, text, cfg, base.vision)
    tokens = len(base.encode(text))
    rows = int(np.load(clip.reply, mmap_mode="r").size / SAMPLE_RATE / FRAME_SECONDS) - 1
    if tokens > rows:
        raise BadSample(f"out.txt has {tokens} tokens, {reply.name} has room for {rows}: is it its text?")
    return clip


def read_words(path: Path) -> str:
    """UTF-8, or UTF-16 as Windows writes it, with the mark that says so. Raises BadSample for anything
    else."""
    content = path.read_bytes()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if marked else "utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"{path.name} is not UTF-8 (byte {error.start}): save it as that") from error


def make_sample(
    name: str, video: Path, speech: Path, reply: Path | None, text: str, cfg: Config, vision: dict
) -> Clip:
    numbers, seconds, spread, shape = video_times(video, cfg.frames)
    size = picture_size(*shape, cfg.size, len(seconds), vision)
    frames = cached_frames(Row(name, 0, str(video)), numbers, size, cfg, crop=False)
    heard, *rates = cached_speech(speech, cfg)
    said = None
    if reply:
        said, rate = cached_speech(reply, cfg)
        rates.append(rate)
    return Clip(name, frames, size, seconds, spread, heard, said, text, tuple(rates))


def sample_folders(source: Path) -> dict[str, list[Path]]:
    """{"train": folders, "test": folders}. Exit 2 when there are none."""
    root = source.parent if source.name == "train" and not (source / "train").is_dir() else source
    holds = "01/in.mp4, in.wav and out.wav, 02/..."
    if not root.is_dir():
        refuse(f"--data_dir {source}: no such folder; its folder train/ holds {holds}")

    def inside(place: Path) -> list[Path]:
        paths = sorted(place.iterdir()) if place.is_dir() else []
        return [path for path in paths if path.is_dir() and not path.name.startswith(".")]

    parted = (root / "train").is_dir()
    train = root / "train" if parted else root
    folders = {"train": inside(train), "test": inside(root / "test") if parted else []}
    if not folders["train"]:
        refuse(f"--data_dir {source}: no sample folders in {train}; it holds {holds}")
    return folders


@dataclass(frozen=True)
class Data:
    train: list[Clip]
    held_out: list[Clip]  # to evaluate on; the same as train when there is one clip alone
    bad: list[dict]  # samples that were left out, and why


def load_data(cfg: Config, source: Path, base: Base) -> Data:
    """Rank 0. Exit 2 when there is nothing to train on."""
    folders = sample_folders(source)
    every = [folder for part in ("train", "test") for folder in folders[part]]

    def decode(folder: Path) -> Clip | dict:
        try:
            return open_clip(folder, cfg, base)
        except BadSample as error:
            return {"where": str(folder), "reason": str(error)}

    decoded = in_threads(decode, every, cfg, "decode")
    bad = [clip for clip in decoded if isinstance(clip, dict)]
    clips = [clip for clip in decoded if isinstance(clip, Clip)]
    leave_out(source, len(clips), bad, cfg.max_bad)
    parts = [split_of(clip.name.split("/")[0]) if folders["test"] else "" for clip in clips]
    train, held_out = split_clips([clip.name for clip in clips], parts, cfg.val_fraction, cfg.seed)
    if not train:
        refuse(f"{source}: every usable sample lies in test/: there is none to train on")
    kept = [clips[i] for i in train]
    return Data(kept, [clips[i] for i in held_out] or kept, bad)


@on_rank0
def contents(data: Data) -> str:
    """The fingerprint of what is trained and evaluated on, wherever its files lie: when pictures are seen,
    texts, and checksums of the first picture, the speech and the codes."""

    def row(clip: Clip) -> tuple:
        first = np.load(clip.frames, mmap_mode="r")[0]
        sums = [zlib.crc32(array.tobytes()) for array in (first, np.load(clip.speech), np.load(clip.codes))]
        return clip.seconds, clip.text, sums

    return fingerprint(map(row, [*data.train, *data.held_out]))


# ---------------------------------------------------------------------------
# Codecs: speech to four streams of codes, and back
# ---------------------------------------------------------------------------


class MelCodec:
    """A codec without a network to download: 60 ms of log-mel spectrum at a time through four codebooks, each
    fitted to what the one before left over (residual vector quantization), back by Griffin-Lim. Its first
    codebook stands for the semantic one."""

    rate, mels = SAMPLE_RATE, 40
    per_frame, window = 6, 512  # 6 spectra, 10 ms apart, in 60 ms; windows of 32 ms
    hop = int(SAMPLE_RATE * FRAME_SECONDS) // per_frame

    def __init__(self, mean: Tensor, codebooks: Tensor) -> None:
        """mean (240,), codebooks (4, V, 240)"""
        self.mean, self.codebooks = mean, codebooks
        self.sizes = (codebooks.shape[1],) * CODEBOOKS
        self.key = hashlib.sha256(codebooks.numpy().tobytes()).hexdigest()[:16]

    @staticmethod
    @cache
    def filters() -> Tensor:
        """(mels, 257), of equal area"""
        from transformers.audio_utils import mel_filter_bank

        bank = mel_filter_bank(
            MelCodec.window // 2 + 1, MelCodec.mels, 40, 7800, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        return torch.from_numpy(bank.T).float()

    @staticmethod
    def log_mel(sound: np.ndarray) -> Tensor:
        """float32 (N,) at 16 kHz -> (6 * T, mels), T = N / 960 rounded up, natural logarithm"""
        frame = MelCodec.hop * MelCodec.per_frame
        padded = F.pad(torch.from_numpy(np.asarray(sound, np.float32)), (0, -len(sound) % frame))
        window = torch.hann_window(MelCodec.window)
        spectrum = torch.stft(padded, MelCodec.window, MelCodec.hop, window=window, return_complex=True)
        spectrum = spectrum.abs()[:, :-1]
        return (MelCodec.filters() @ spectrum + 1e-3).log().T

    @classmethod
    def fit(cls, sounds: list[np.ndarray], size: int, seed: int) -> MelCodec:
        """Four codebooks of `size` entries by k-means on these replies. Exit 2 when they are too short for
        that."""
        from scipy.cluster.vq import kmeans2

        rows = torch.cat([cls.log_mel(sound).reshape(-1, cls.per_frame * cls.mels) for sound in sounds])
        rows = rows.double().numpy()
        if len(rows) < size:
            seconds, needed = len(rows) * FRAME_SECONDS, size * FRAME_SECONDS
            refuse(f"{seconds:.1f} s of replies: the codec needs {needed:.0f} s to be fitted on")
        mean, books = rows.mean(0), []
        left = rows - mean
        for number in range(CODEBOOKS):
            book, nearest = kmeans2(left, size, iter=12, minit="++", missing="warn", seed=seed + number)
            books.append(book)
            left = left - book[nearest]
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(np.stack(books)).float())

    def encode(self, sound: np.ndarray) -> np.ndarray:
        """float32 (N,) at 16 kHz -> int64 (T, 4)"""
        left = self.log_mel(sound).reshape(-1, self.per_frame * self.mels) - self.mean
        codes = []
        for book in self.codebooks:
            codes.append(torch.cdist(left[None], book[None])[0].argmin(1))
            left = left - book[codes[-1]]
        return torch.stack(codes, 1).numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int (T, 4) -> float32 (960 * T,) at `rate`"""
        index = torch.from_numpy(np.asarray(codes, np.int64))
        summed = self.mean + sum(book[index[:, i]] for i, book in enumerate(self.codebooks))  # (T, 240)
        return self.sound_of(summed.reshape(-1, self.mels))

    @classmethod
    def sound_of(cls, log_mel: Tensor, iterations: int = 32) -> np.ndarray:
        """The inverse of log_mel but for the phase, which is estimated (Griffin and Lim 1984) from a fixed
        random one."""
        if not len(log_mel):
            return np.zeros(0, np.float32)
        loud = torch.linalg.pinv(cls.filters()) @ (log_mel.exp().T - 1e-3).clamp(min=0)
        loud = F.pad(loud.clamp(min=0), (0, 1))  # (257, 6 * T + 1)
        transform = dict(n_fft=cls.window, hop_length=cls.hop, window=torch.hann_window(cls.window))
        phase = torch.rand(loud.shape, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
        for _ in range(iterations):
            sound = torch.istft(torch.polar(loud, phase), **transform, length=cls.hop * len(log_mel))
            phase = torch.stft(sound, **transform, return_complex=True).angle()
        return sound.clamp(-1, 1).numpy()

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"mean": self.mean, "codebooks": self.codebooks}, path)

    @classmethod
    def load(cls, path: Path) -> MelCodec:
        from safetensors.torch import load_file

        return cls(**load_file(path))


def resample(sound: Tensor, orig_freq: int, new_freq: int) -> Tensor:
    """(..., N) -> (..., N * new_freq / orig_freq), as torchaudio.functional has it"""
    from scipy.signal import resample_poly

    made = resample_poly(sound.cpu().numpy(), new_freq, orig_freq, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(made)).to(sound)


@contextlib.contextmanager
def with_torchaudio() -> Iterator[None]:
    """Inside, `import torchaudio` works: LongCat-Audio-Codec resamples with it, its requirements do not list
    it, and its last release refuses today's torch."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        stand_in, functional = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.functional")
        stand_in.functional, functional.resample = functional, resample
        mine = {"torchaudio": stand_in, "torchaudio.functional": functional}
        sys.modules |= mine
        try:
            yield
        finally:
            for name in mine:
                del sys.modules[name]
    else:
        yield


class LongCatCodec:
    """The official LongCat-Audio-Codec by its own code: a checkout with configs/ and ckpts/. Its encoder is
    not part of LongCat-Flash-Omni's download. One semantic and three acoustic codebooks, 24 kHz out."""

    sizes = (8192, 8100, 8100, 8100)
    files = (
        "configs/LongCatAudioCodec_encoder.yaml",
        "configs/LongCatAudioCodec_decoder_24k_4codebooks.yaml",
    )

    def __init__(self, checkout: Path) -> None:
        root, here = checkout.resolve(), Path.cwd()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.key = f"longcat-{root.name}"
        sys.path.insert(0, str(root))
        os.chdir(root)  # its configurations name their files from there
        try:
            with with_torchaudio():
                from networks.semantic_codec.model_loader import load_decoder, load_encoder

                self.encoder = load_encoder(self.files[0], self.device)
                self.decoder = load_decoder(self.files[1], self.device)
        except ModuleNotFoundError as error:
            refuse(f"--codec {checkout}: its code needs {error.name}: pip install {error.name}")
        except (ImportError, OSError, KeyError, RuntimeError) as error:
            refuse(f"--codec {checkout}: {brief(error)}: fill its ckpts/ as its README says")
        finally:
            os.chdir(here)
            sys.path.remove(str(root))
        self.rate = int(self.decoder.output_rate)

    @torch.no_grad()
    def encode(self, sound: np.ndarray) -> np.ndarray:
        """float32 (N,) at 16 kHz -> int64 (T, 4)"""
        wave_in = torch.from_numpy(sound).to(self.device)[None, None]
        outputs = self.encoder(wave_in, SAMPLE_RATE, n_acoustic_codebooks=CODEBOOKS - 1)
        semantic, acoustic = outputs[:2]  # (1, T), (1, 3, T)
        count = min(semantic.shape[-1], acoustic.shape[-1])
        return torch.cat([semantic[:, None, :count], acoustic[..., :count]], 1)[0].T.cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int (T, 4) -> float32 (N,) at `rate`"""
        index = torch.from_numpy(np.asarray(codes, np.int64)).T[None].to(self.device)
        return self.decoder(index[:, 0], index[:, 1:]).float().flatten().clamp(-1, 1).cpu().numpy()


def check_codec(cfg: Config, base: Base) -> None:
    """Exit 2 when the model's codes can be had neither from --codec nor from a codec that lies in its folder
    or can be fitted."""
    if cfg.codec:
        needed = [*LongCatCodec.files, "networks/semantic_codec/model_loader.py"]
        needed += ["ckpts/LongCatAudioCodec_encoder.pt"]
        if missing := [name for name in needed if not (cfg.codec / name).is_file()]:
            refuse(
                f"--codec {cfg.codec}: {', '.join(missing)} missing; clone "
                "github.com/meituan-longcat/LongCat-Audio-Codec and put the files of the Hub repository of "
                "that name into its ckpts/ (the encoder is a download of its own)"
            )
    elif base.audio_vocabulary == AUDIO_VOCABULARY:
        refuse(f"{base.source} speaks in the codes of LongCat-Audio-Codec: give --codec, a checkout of it")


def open_codec(cfg: Config, base: Base, replies: list[Path]) -> MelCodec | LongCatCodec:
    """The codec of --codec, else the one in the model's folder, else one fitted to the replies that are
    trained on, cached."""
    if cfg.codec:
        return LongCatCodec(cfg.codec)
    inside = base.folder / "audio_codec" / "mel_codec.safetensors"
    if inside.exists():
        return MelCodec.load(inside)
    size = base.audio_vocabulary - CODEC_OFFSET
    key = digest_of(f"{[path.name for path in replies]}|{size}|{cfg.seed}|1")
    cached = cfg.cache_dir / "codecs" / f"{key}.safetensors"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        codec = MelCodec.fit([np.load(path) for path in replies[:512]], size, cfg.seed)
        write_whole(cached, codec.save)
    return MelCodec.load(cached)


def encode_replies(clips: list[Clip], codec: MelCodec | LongCatCodec, base: Base, cfg: Config) -> list[Clip]:
    """Rank 0: the clips with the codes of their replies, each encoded once."""

    def encode(clip: Clip) -> Clip:
        target = cfg.cache_dir / "codes" / f"{clip.reply.stem}_{codec.key}.npy"
        if not target.exists():
            save_array(target, codec.encode(np.load(clip.reply)))
        tokens, rows = len(base.encode(clip.text)), len(np.load(target, mmap_mode="r"))
        if rows < tokens:
            refuse(f"{clip.name}: out.txt has {tokens} tokens, the codec makes {rows} rows of out.wav")
        return dataclasses.replace(clip, codes=target)

    return [encode(clip) for clip in tqdm(clips, "encode replies", unit="clip", disable=None)]


def write_wav(path: Path, sound: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """float (N,) in [-1, 1] -> 16-bit mono"""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())


# ---------------------------------------------------------------------------
# Tokens and batches
# ---------------------------------------------------------------------------


def speech_features(sound: np.ndarray, base: Base) -> np.ndarray:
    """float32 (N,) at 16 kHz -> (T, 1200), one row for 80 ms: Kaldi's 80 log-mel energies of 25 ms every
    10 ms, normalised by the training data's mean and variance, 15 neighbours side by side, every 8th
    (data/audio_feature.py of the official repository)"""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    fbank, splice = base.front["fbank"], base.front["splice"]
    length, hop = (int(SAMPLE_RATE * fbank[name] / 1000) for name in ("frame_length", "frame_shift"))
    bins, high = 2 ** (length - 1).bit_length(), fbank["high_freq"]
    high = high + SAMPLE_RATE / 2 if high < 0 else high
    bank = mel_filter_bank(
        bins // 2 + 1, fbank["num_mel_bins"], fbank["low_freq"], high, SAMPLE_RATE, mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )  # fmt: skip
    loud = sound.astype(np.float64) * 32768
    if dither := fbank.get("dither", 0):  # the official code draws anew for each window and call
        loud = loud + dither * np.random.default_rng(zlib.crc32(sound)).standard_normal(len(loud))
    rows = spectrogram(
        loud, window_function(length, "povey", periodic=False), length, hop, bins,
        power=2.0, center=False, preemphasis=fbank["preemphasis"], mel_filters=bank, log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
    ).T  # fmt: skip
    rows = (rows - base.cmvn[0]) * base.cmvn[1]
    padded = np.concatenate([rows[:1].repeat(splice["left"], 0), rows, rows[-1:].repeat(splice["right"], 0)])
    width = splice["left"] + splice["right"] + 1
    spliced = [padded[i : i + width].ravel() for i in range(0, len(rows), splice["stride"])]
    return np.stack(spliced).astype(np.float32)


def patches(frames: np.ndarray, base: Base) -> Tensor:
    """uint8 (F, H, W, 3), F even -> (F/2, H/14 * W/14, 3 * 2 * 14 * 14): pairs of frames, normalised as the
    ViT wants"""
    mean, std = (torch.tensor(base.vision[name]) for name in ("image_mean", "image_std"))
    pixels = (torch.from_numpy(frames).float() / 255 - mean) / std
    size = base.vision["patch_size"]
    return rearrange(pixels, "(n t) (h p) (w q) c -> n (h w) (c t p q)", t=2, p=size, q=size)


def prompt_ids(
    seconds: tuple[float, ...], spread: bool, tokens_per_pair: int, audio_tokens: int, base: Base
) -> list[int]:
    """The user's turn and the start of the reply: pairs of frames, each after its time, with the speech heard
    meanwhile, 12.5 tokens a second. Frames before the speech begins come first, speech after the last frame
    last; of a clip whose pairs are further apart than a second the speech is spread over them.
    (multimodal_interleaved_converter.py)"""
    ids, left = base.encode("USER:"), audio_tokens
    lead = 0 if spread else max(0, len(seconds) - math.ceil(round(audio_tokens * 0.08, 6)))
    for number, second in enumerate(seconds):
        ids = ids + base.encode(f"second{{{second:.1f}}}:") + [base.ids["image_pad"]] * tokens_per_pair
        chunk, last = number - lead, number == len(seconds) - 1
        if chunk < 0:
            continue
        share = audio_tokens // len(seconds) if spread else 12 + chunk % 2
        take = left if last else min(left, share)
        ids = ids + [base.ids["audio_start"]] * (chunk == 0) + [base.ids["audio_pad"]] * take
        ids = ids + [base.ids["audio_end"]] * last
        left -= take
    return ids + base.encode("\n") + base.encode("VOICE ASSISTANT:")


def reply_rows(codes: np.ndarray, text: list[int], base: Base) -> tuple[list[int], np.ndarray]:
    """What is said, as the model sees it, one row more than the codes (T, 4) have: text ids, padded (T + 1),
    and the streams (T + 1, 4), the acoustic ones one row later than the semantic one, which ends with
    CODEC_EOS. (audio_converter.py)"""
    rows, text = len(codes) + 1, [*text, base.config.eos_token_id]
    streams = np.full((rows, CODEBOOKS), CODEC_PAD, np.int64)
    streams[:-1, 0], streams[-1, 0] = codes[:, 0] + CODEC_OFFSET, CODEC_EOS
    streams[1:, 1:] = codes[:, 1:] + CODEC_OFFSET
    return text + [base.pad] * (rows - len(text)), streams


def codes_from(rows: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The inverse of reply_rows' streams: rows (R, 4) of one or more segments -> codes (T, 4)"""
    kept = [(row[0], *after[1:]) for row, after in zip(rows[:-1], rows[1:]) if row[0] != CODEC_EOS]
    codes = np.array(kept, np.int64).reshape(-1, CODEBOOKS) - CODEC_OFFSET
    return codes.clip(0, np.array(sizes) - 1)  # a special id in the middle of a reply has no sound


class Collator:
    """Clips -> a batch of tensors, B sequences of L positions padded on the right, or on the left without the
    reply.

    ids (B, L) text; streams (B, L, 4) codes; text_labels (B, L) and code_labels (B, L, 4), -100 outside the
    reply; mask (B, L) bool; pixels (all pairs, T, 1176), those of the larger pictures, and grids (all
    pairs, 2), rows and columns of patches; features (B, T, 1200) of the speech and heard (B, T), which rows
    are real.
    """

    def __init__(self, base: Base, cfg: Config) -> None:
        self.base, self.cfg = base, cfg
        cached = functools.lru_cache(maxsize=1024)
        self.features = cached(lambda path: speech_features(np.load(path), base))
        self.patches = lambda path: patches(np.load(path), base)
        if cfg.size <= 56:
            self.patches = cached(self.patches)

    def grid(self, clip: Clip) -> tuple[int, int]:
        """Rows and columns of patches of a picture"""
        rows, columns = (side // self.base.vision["patch_size"] for side in clip.size)
        return rows, columns

    def sequence(self, clip: Clip, reply: bool) -> tuple[list[int], np.ndarray, int]:
        """(ids, streams, where the reply starts)"""
        sounds = len(self.features(clip.speech))
        tokens = math.prod(self.grid(clip)) // 2
        prompt = prompt_ids(clip.seconds, clip.spread, tokens, sounds, self.base)
        ids, streams = [], np.zeros((0, CODEBOOKS), np.int64)
        if reply:
            ids, streams = reply_rows(np.load(clip.codes), self.base.encode(clip.text), self.base)
        silent = np.full((len(prompt), CODEBOOKS), CODEC_PAD, np.int64)
        return prompt + ids, np.concatenate([silent, streams]), len(prompt)

    def __call__(self, clips: list[Clip], shown: str = SHOWN[0], reply: bool = True) -> dict[str, Tensor]:
        sequences = [self.sequence(clip, reply) for clip in clips]
        length = max(len(ids) for ids, _, _ in sequences)
        ids = torch.full((len(clips), length), self.base.pad)
        streams = torch.full((len(clips), length, CODEBOOKS), CODEC_PAD)
        text_labels, code_labels = torch.full_like(ids, -100), torch.full_like(streams, -100)
        mask = torch.zeros(len(clips), length, dtype=torch.bool)
        for i, (tokens, codes, start) in enumerate(sequences):
            place = slice(0, len(tokens)) if reply else slice(length - len(tokens), length)
            ids[i, place], streams[i, place] = torch.tensor(tokens), torch.from_numpy(codes)
            mask[i, place] = True
            body = slice(start, len(tokens))
            if reply:
                text_labels[i, body] = torch.where(ids[i, body] == self.base.pad, -100, ids[i, body])
                code_labels[i, body] = torch.where(streams[i, body] == CODEC_PAD, -100, streams[i, body])
        pixels = [self.patches(clip.frames) for clip in clips]
        rows = [self.features(clip.speech) for clip in clips]
        if shown == "video blanked":
            pixels = [patches(np.zeros_like(np.load(clip.frames)), self.base) for clip in clips]
        elif shown == "audio silenced":
            rows = [speech_features(np.zeros_like(np.load(clip.speech)), self.base) for clip in clips]
        features = torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, rows)), batch_first=True)
        heard = torch.arange(features.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        largest = max(part.shape[1] for part in pixels)
        pixels = torch.cat([F.pad(part, (0, 0, 0, largest - part.shape[1])) for part in pixels])
        grids = torch.tensor([self.grid(clip) for clip in clips for _ in clip.seconds])
        dtype = TORCH_DTYPES[self.cfg.dtype]
        return {
            "ids": ids, "streams": streams, "text_labels": text_labels, "code_labels": code_labels,
            "mask": mask, "pixels": pixels.to(dtype), "grids": grids, "features": features.to(dtype),
            "heard": heard,
        }  # fmt: skip


def get_batch(clips: list[Clip], collate: Collator, cfg: Config, micro_step: int) -> dict[str, Tensor]:
    """This rank's batch at a micro-step: a pure function of (seed, micro-step, rank), so that a resumed run
    repeats the order."""
    first = (micro_step * world_size() + rank()) * cfg.batch_size
    places = [divmod(place, len(clips)) for place in range(first, first + cfg.batch_size)]
    return collate([clips[int(epoch_order(len(clips), cfg.seed, epoch)[i])] for epoch, i in places])


# ---------------------------------------------------------------------------
# Model: what sees and hears, under the names of vision_model.pt, audio_encoder.pt and the others
# ---------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


class ViTAttention(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        width, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=c["qkv_bias"]), nn.Linear(width, width)
        if c["qk_normalization"]:
            self.q_norm = RMSNorm(width, c["layer_norm_eps"])
            self.k_norm = RMSNorm(width, c["layer_norm_eps"])
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x (N, T, D), one row an image; cos, sin (N, T, D / heads); mask (N, T), which are patches. The norm
        runs over all heads, after the rotation."""
        q, k, v = rearrange(self.qkv(x), "n t (three h d) -> three n t h d", three=3, h=self.heads)

        def turn(u: Tensor) -> Tensor:
            a, b = u.float().chunk(2, -1)
            return (u.float() * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]).to(u.dtype)

        q, k = self.q_norm(turn(q).flatten(2)), self.k_norm(turn(k).flatten(2))
        q, k, v = (rearrange(u, "n t (h d) -> n h t d", h=self.heads) for u in (q, k, v.flatten(2)))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(rearrange(heads, "n h t d -> n t (h d)"))


class SwiGLU(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        width, inner = c["hidden_size"], int(c["intermediate_size"] * 2 / 3)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.fc3 = nn.Linear(width, inner)
        self.norm = RMSNorm(inner, c["layer_norm_eps"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1(x)) * self.fc3(x)))


class ViTLayer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        width, eps = c["hidden_size"], c["layer_norm_eps"]
        self.attn, self.mlp = ViTAttention(c), SwiGLU(c)
        self.norm1, self.norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.ls1, self.ls2 = (nn.Parameter(c["initializer_factor"] * torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, mask) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class VisionEncoder(nn.Module):
    """LongCat-ViT: pairs of frames in patches of 14 x 14, rotary places of row and column, LayerScale."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        kernel = (c["temporal_patch_size"], c["patch_size"], c["patch_size"])
        self.width, self.theta = c["hidden_size"], c["rope_theta"]
        self.head = self.width // c["num_attention_heads"]
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        bias = c["patch_embedding_bias"]
        self.embeddings.patch_embedding = nn.Conv3d(3, self.width, kernel, stride=kernel, bias=bias)
        self.encoder.layers = nn.ModuleList(ViTLayer(c) for _ in range(c["num_hidden_layers"]))

    def forward(self, pixels: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (N, T, 3 * 2 * 14 * 14) of pictures with `grids` (N, 2) rows and columns of patches, row
        after row, padded to T -> (N, T, D); (N, T), which are patches"""
        convolution = self.embeddings.patch_embedding
        places = torch.arange(pixels.shape[1], device=pixels.device)
        x = convolution(pixels.reshape(-1, 3, *convolution.kernel_size)).view(*pixels.shape[:2], self.width)
        half, columns = self.head // 2, grids[:, 1:]
        rates = self.theta ** -(torch.arange(0, half, 2, device=x.device).float() / half)
        where = torch.stack([places // columns, places % columns], -1)  # (N, T, 2), row and column
        angles = (where[..., None] * rates).flatten(2).repeat(1, 1, 2)
        mask = places < grids.prod(1, keepdim=True)
        for layer in self.encoder.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return x, mask


class VisionProjector(nn.Module):
    def __init__(self, width: int, adaptor: int, out: int) -> None:
        super().__init__()
        self.p0 = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, adaptor), nn.GELU(), nn.Linear(adaptor, adaptor),
            nn.GELU(),
        )  # fmt: skip
        self.proj = nn.Linear(adaptor, out)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) -> (N, T/2, out): neighbours in a row are one token"""
        return self.proj(self.p0(rearrange(x, "n (t two) d -> n t (two d)", two=2)))


class MemoryLayer(nn.Module):
    """A layer of a feedforward sequential memory network (Zhang et al. 2018): a depthwise convolution
    remembers what was and, in the last layers, looks at what comes next."""

    def __init__(self, c: dict, right: int) -> None:
        super().__init__()
        width, inner, self.reach = c["proj_size"], c["hidden_size"], (c["left_order"], right)
        self.memory_ln = nn.LayerNorm(width)
        self.memory = nn.Conv1d(width, width, sum(self.reach) + 1, groups=width, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.ReLU6(), nn.Linear(inner, width)
        )
        self.dropout = nn.Dropout(c["dropout"])

    def forward(self, x: Tensor) -> Tensor:
        remembered = self.memory(F.pad(self.memory_ln(x).transpose(1, 2), self.reach))
        x = x + self.dropout(remembered.transpose(1, 2))
        return x + self.ffn(x)


class AudioEncoder(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        inner, width, layers = c["hidden_size"], c["proj_size"], c["nlayer"]
        self.ffn = nn.Sequential(
            nn.Linear(c["input_size"], inner), nn.ReLU6(), nn.Linear(inner, width, bias=False)
        )
        rights = [0 if i < layers - c["num_right_layers"] else c["right_order"] for i in range(layers)]
        self.fsmn_layers = nn.ModuleList(MemoryLayer(c, right) for right in rights)
        widths = [width] + [inner] * c["ndnn"]
        dense: list[nn.Module] = []
        for a, b in zip(widths, widths[1:]):
            dense += [nn.Linear(a, b), nn.ReLU6()]
        self.dnn = nn.Sequential(*dense)
        self.output = nn.Linear(widths[-1], c["vocab_size"])  # of its pre-training; does nothing here
        self.width = widths[-1]

    def forward(self, features: Tensor, heard: Tensor) -> Tensor:
        """features (B, T, 1200), heard (B, T) bool -> (B, T, D)"""
        x, mask = self.ffn(features), heard[..., None].to(features.dtype)
        for layer in self.fsmn_layers:
            x = layer(x * mask)
        return self.dnn(x * mask)


# ---------------------------------------------------------------------------
# Model: what speaks
# ---------------------------------------------------------------------------


class AudioEmbedding(nn.Module):
    """The sum of the embeddings of the four streams; padding adds nothing."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.audio_embeddings = nn.ModuleList(nn.Embedding(vocabulary, width) for _ in range(CODEBOOKS))

    def forward(self, streams: Tensor) -> Tensor:
        """(B, L, 4) -> (B, L, D)"""
        spoken = (streams != CODEC_PAD)[..., None]
        tables = enumerate(self.audio_embeddings)
        return sum(table(streams[..., i]) * spoken[..., i, :] for i, table in tables)


class AudioHeads(nn.Module):
    """One head for each stream; each also sees the codes of the heads before it in the same row, as summed
    embeddings."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.audio_output_layers = nn.ModuleList(
            nn.Linear(width, vocabulary, bias=False) for _ in range(CODEBOOKS)
        )
        self.embedding = nn.ModuleList(nn.Embedding(vocabulary, width) for _ in range(CODEBOOKS - 1))

    def forward(self, hidden: Tensor, pick: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """hidden (N, D); pick(i, logits (N, V)) -> the codes (N,) of stream i, known or chosen. -> logits of
        each stream"""
        logits = []
        for i, head in enumerate(self.audio_output_layers):
            logits.append(head(hidden))
            chosen = pick(i, logits[-1])
            if i + 1 < CODEBOOKS:
                hidden = hidden + self.embedding[i](chosen)
        return logits


@cache
def longcat_class() -> type[nn.Module]:
    """transformers' LongcatFlashForCausalLM, corrected to load the checkpoint. A function, for the import of
    transformers' models takes seconds."""
    from transformers.models.longcat_flash import modeling_longcat_flash as stock

    stock_experts = stock.LongcatFlashExperts

    class RealExperts(stock_experts):
        """With weights for the real experts alone. Stock 5.23 makes gate_up_proj for the 256 identity experts
        as well: 180 B parameters too many, and the checkpoint does not fit."""

        def __init__(self, config: Any) -> None:
            nn.Module.__init__(self)
            self.num_routed_experts = config.n_routed_experts
            self.zero_expert_num = config.zero_expert_num or 0
            self.total_experts = self.num_routed_experts + self.zero_expert_num
            self.intermediate_size, self.hidden_size = config.expert_ffn_hidden_size, config.hidden_size
            self.act_fn, self.identity_expert = stock.ACT2FN[config.hidden_act], nn.Identity()
            shape = (self.num_routed_experts, 2 * self.intermediate_size, self.hidden_size)
            self.gate_up_proj = nn.Parameter(torch.empty(shape))
            self.down_proj = nn.Parameter(torch.empty(shape[0], self.hidden_size, self.intermediate_size))

    class LongCat(stock.LongcatFlashForCausalLM):
        """Real experts, and routers in fp32 as the engines have them."""

        _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

        def __init__(self, config: Any) -> None:
            stock.LongcatFlashExperts = RealExperts
            try:
                super().__init__(config)
            finally:
                stock.LongcatFlashExperts = stock_experts
            self.routers = [m for m in self.modules() if isinstance(m, stock.LongcatFlashTopkRouter)]

        def _apply(self, fn, recurse=True):
            """A cast, by DeepSpeed for one, moves what the routers hold as buffers and leaves it in fp32:
            rounded, they choose other experts."""
            holders = [m for router in self.routers for m in (router, router.classifier)]
            exact = [(holder, dict(holder._buffers)) for holder in holders]
            super()._apply(fn, recurse)
            for holder, buffers in exact:
                for name, buffer in buffers.items():
                    holder._buffers[name] = buffer.to(holder._buffers[name].device)
            return self

    return LongCat


class Omni(nn.Module):
    """LongCat-Flash-Omni: text, pairs of frames, speech and codes in; text and four streams of codes out."""

    def __init__(self, base: Base, llm: nn.Module | None = None) -> None:
        super().__init__()
        width = base.config.hidden_size
        self.pad, self.special = base.pad, base.ids
        self.vision_encoder = VisionEncoder(base.vision)
        self.vision_projector = VisionProjector(base.vision["hidden_size"], base.vision["adaptor_dim"], width)
        self.audio_encoder = AudioEncoder(base.audio)
        self.audio_projector = nn.Sequential(
            nn.Linear(self.audio_encoder.width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.audio_embedding = AudioEmbedding(base.audio_vocabulary, width)
        self.audio_heads = AudioHeads(base.audio_vocabulary, width)
        self.llm = llm or longcat_class()(base.config)

    def train(self, mode: bool = True) -> Omni:
        """The frozen audio encoder does not drop out: a tenth of what it hears would change half of what it
        says."""
        super().train(mode)
        self.audio_encoder.train(mode and next(self.audio_encoder.parameters()).requires_grad)
        return self

    def rows(self, ids: Tensor, streams: Tensor) -> Tensor:
        """Text ids (B, L) and codes (B, L, 4) -> (B, L, D): the sum of what is there; padding of all is the
        pad token."""
        text, is_pad = self.llm.get_input_embeddings()(ids), (ids == self.pad)[..., None]
        silent = is_pad & (streams == CODEC_PAD).all(-1, keepdim=True)
        return torch.where(is_pad & ~silent, 0, text) + self.audio_embedding(streams)

    def embed(
        self, ids: Tensor, streams: Tensor, pixels: Tensor, grids: Tensor, features: Tensor, heard: Tensor,
        **_: Tensor,
    ) -> Tensor:  # fmt: skip
        """A batch as the Collator makes it -> (B, L, D)"""
        trained = torch.is_grad_enabled() and next(self.vision_projector.parameters()).requires_grad
        with torch.set_grad_enabled(trained):  # frozen encoders keep nothing for a backward pass
            pictures, real = self.vision_encoder(pixels, grids)
            seen = self.vision_projector(pictures)[real[:, ::2]]
            sounds = self.audio_projector(self.audio_encoder(features, heard))[heard]
        x = self.rows(ids, streams)
        x = x.masked_scatter((ids == self.special["image_pad"])[..., None], seen.to(x.dtype))
        return x.masked_scatter((ids == self.special["audio_pad"])[..., None], sounds.to(x.dtype))

    def forward(
        self, text_labels: Tensor, code_labels: Tensor, mask: Tensor, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A batch -> (cross-entropy of the text and of each stream (5,), share of right predictions (5,)),
        mean over the clips of the mean over a reply. The heads run on the positions of replies alone."""
        x = self.embed(**inputs)
        hidden = self.llm.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        labels = torch.cat([text_labels[..., None], code_labels], -1)[:, 1:]  # (B, L - 1, 5)
        clip, place = (labels != -100).any(-1).nonzero().unbind(1)
        hidden, labels = hidden[clip, place], labels[clip, place]  # (N, D), (N, 5)
        codes = labels[:, 1:].clamp(min=0)  # where there is none, the head is not scored
        logits = [self.llm.lm_head(hidden), *self.audio_heads(hidden, lambda i, _: codes[:, i])]
        losses, hits = [], []
        for i, scores in enumerate(logits):
            scored = labels[:, i] != -100
            count = torch.zeros(len(mask), device=hidden.device).index_add_(0, clip, scored.float())
            share = scored / count.clamp(min=1)[clip] / len(mask)
            loss = F.cross_entropy(scores.float(), labels[:, i], ignore_index=-100, reduction="none")
            losses.append((loss * share).sum())
            hits.append(((scores.argmax(-1) == labels[:, i]) * share).sum())
        return torch.stack(losses), torch.stack(hits)

    def choose(self, hidden: Tensor, spoken: Tensor, penalty: float) -> Tensor:
        """hidden (B, D), spoken (B, R, 4) -> the next row of codes (B, 4): one stream after the other, those
        of the last 30 rows less likely, by `penalty` for each time"""
        row: list[Tensor] = []

        def pick(i: int, logits: Tensor) -> Tensor:
            recent = spoken[:, -30:, i]
            times = torch.zeros_like(logits).scatter_add_(1, recent, (recent != CODEC_PAD).to(logits.dtype))
            row.append(torch.where(logits < 0, logits * penalty**times, logits / penalty**times).argmax(-1))
            return row[-1]

        self.audio_heads(hidden, pick)
        return torch.stack(row, 1)

    @torch.no_grad()
    def speak(
        self, batch: dict[str, Tensor], most: int, penalty: float, together: bool
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Greedy replies to a batch without labels: (text ids, rows of codes (R, 4)) for each clip.

        A segment is text and codes until the text ends with a pause or the end, then codes alone until the
        semantic stream ends; its first row has no acoustic codes (AT_ST0 and AT_ST1 of the engines'
        longcat_flash_omni.py). `most` rows at most. `together`: all ranks go on until the last is done, for
        each of them holds a part of the weights.
        """
        count, device, mask = len(batch["ids"]), batch["ids"].device, batch["mask"]
        x = self.embed(**{k: v for k, v in batch.items() if "label" not in k and k != "mask"})
        length = [0] * count  # rows
        writing = [True] * count  # text goes on
        first = [True] * count  # the next row begins a segment
        last, done = [False] * count, [False] * count  # this segment is the last
        texts: list[list[int]] = [[] for _ in range(count)]
        spoken = torch.full((count, 0, CODEBOOKS), CODEC_PAD, device=device)
        cached, end = None, self.llm.config.eos_token_id
        for _ in range(most):
            place = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
            out = self.llm.model(
                inputs_embeds=x, attention_mask=mask, position_ids=place, past_key_values=cached,
                use_cache=True,
            )  # fmt: skip
            cached, hidden = out.past_key_values, out.last_hidden_state[:, -1]
            text, row = self.llm.lm_head(hidden).argmax(-1), self.choose(hidden, spoken, penalty)
            for b in range(count):
                if done[b]:
                    row[b], text[b] = CODEC_PAD, self.pad
                    continue
                length[b] += 1
                if first[b]:
                    row[b, 1:], first[b] = CODEC_PAD, False
                if writing[b]:
                    texts[b].append(token := int(text[b]))
                    last[b], writing[b] = token == end, token not in (end, self.special["pause"])
                else:
                    text[b] = self.pad
                # the engines look for the end of speech once its text has ended
                if row[b, 0] == CODEC_EOS and not writing[b]:
                    done[b] = last[b]
                    writing[b] = first[b] = True
            spoken = torch.cat([spoken, row[:, None]], 1)
            if not (over_ranks(not all(done), "max") if together else not all(done)):
                break
            x = self.rows(text[:, None], row[:, None])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        rows = [r[:n] for r, n in zip(spoken.cpu(), length)]
        return texts, [r.numpy() for r in rows]


# ---------------------------------------------------------------------------
# Model: files
# ---------------------------------------------------------------------------

# The parts that lie beside the shards, each the state dict of a module of Omni.
PARTS = {
    "language_model_embedding.pt": "",  # the embedding of the language model
    "vision/vision_model.pt": "vision_encoder",
    "vision/vision_projector.pt": "vision_projector",
    "audio/audio_encoder.pt": "audio_encoder",
    "audio/audio_projector.pt": "audio_projector",
    "audio/audio_embeddings.pt": "audio_embedding",
    "audio/audio_output_layers.pt": "audio_heads",
}
SMALL = "*.json tokenizer* *.txt *.jinja *.py vision/config.json audio/*.json".split()
SMALL += ["audio/global_cmvn", "audio_codec/*"]
WEIGHTS = (*SMALL, *PARTS, "*.safetensors")
# Defaults of the official code, LongCatVisionConfig and LongCatAudioConfig, and of the report's table 1 where
# they differ.
VISION = dict(
    hidden_size=1280, intermediate_size=5184, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
    temporal_patch_size=2, patch_embedding_bias=True, qkv_bias=False, qk_normalization=True,
    layer_norm_eps=1e-6, initializer_factor=0.1, rope_theta=10000, spatial_merge_size=1, adaptor_dim=7168,
    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
)  # fmt: skip
AUDIO = dict(
    input_size=1200, hidden_size=6144, proj_size=1536, vocab_size=5252, nlayer=22, ndnn=2, num_right_layers=6,
    left_order=10, right_order=1, dropout=0.1,
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The model that is trained, all but its weights."""

    source: str  # Hub id or folder
    # where its files lie; None: not to be had here, the sizes are the published ones
    folder: Path | None
    config: Any  # LongcatFlashConfig
    tokenizer: Any
    vision: dict  # vision/config.json
    audio: dict  # audio/config.json
    front: dict  # audio/preprocessor_config.json
    cmvn: tuple[np.ndarray, np.ndarray]  # mean and 1 / standard deviation (80,) of the log-mel energies
    ids: dict[str, int]  # of SPECIAL
    audio_vocabulary: int

    @property
    def pad(self) -> int:
        return self.config.pad_token_id

    def encode(self, text: str) -> list[int]:
        return list(token_ids(self.tokenizer, text))


@functools.lru_cache(maxsize=1 << 16)
def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def published_base(source: str) -> Base:
    """The sizes alone, for --check where the model cannot be looked up."""
    from transformers import LongcatFlashConfig

    config, no_cmvn = LongcatFlashConfig(pad_token_id=3), (np.zeros(80), np.ones(80))
    return Base(source, None, config, None, VISION, AUDIO, {}, no_cmvn, {}, AUDIO_VOCABULARY)


def open_base(source: str) -> Base:
    """Rank 0 fetches configs and tokenizer, every rank opens them. Exit 2 for anything but
    LongCat-Flash-Omni's files."""
    import kaldiio
    from transformers import AutoTokenizer, LongcatFlashConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving, on each rank
    folder = on_rank0(fetch_model)(source, *SMALL)
    try:
        # without a type transformers takes defaults
        kind = read_json(folder / "config.json").get("model_type", "longcat_flash")
        config = LongcatFlashConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vision = VISION | read_json(folder / "vision" / "config.json")
        audio = AUDIO | read_json(folder / "audio" / "config.json")
        front = read_json(folder / "audio" / "preprocessor_config.json")
        stats = kaldiio.load_mat(str(folder / "audio" / "global_cmvn"))
    except (OSError, ValueError, KeyError) as error:
        missing = missing_files(folder)
        names = f"{len(missing)} files are missing: {', '.join(missing)}" if missing else brief(error)
        refuse(f"--model {source}: {names}")
    if kind != "longcat_flash":
        refuse(f"--model {source}: LongCat-Flash-Omni (model_type longcat_flash) is wanted")
    config.pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    if unknown := [SPECIAL[name] for name, i in ids.items() if i is None or i == tokenizer.unk_token_id]:
        refuse(f"--model {source}: its tokenizer lacks {', '.join(unknown)}, for speech and pictures")
    width = front["fbank"]["num_mel_bins"] * (front["splice"]["left"] + front["splice"]["right"] + 1)
    odd = {
        "vision spatial_merge_size": (vision["spatial_merge_size"], 1),
        "audio delta_order": (front.get("delta", {}).get("delta_order", 0), 0),
        "audio freq": (front["fbank"]["freq"], SAMPLE_RATE),
        "audio left_stride": (audio.get("left_stride", 1), 1),
        "audio right_stride": (audio.get("right_stride", 1), 1),
        "audio activation": (audio.get("activation", "relu6"), "relu6"),
        "audio input_size": (audio["input_size"], width),
    }
    for name, (has, knows) in odd.items():
        if has != knows:
            refuse(f"--model {source}: {name} is {has}; this script knows {knows}")
    total = stats[0, -1]
    mean = stats[0, :-1] / total  # Kaldi's statistics: sums and count, sums of squares
    scale = 1 / np.sqrt(np.maximum(stats[1, :-1] / total - mean**2, np.finfo(np.float32).eps ** 2))
    table = folder / "audio" / "audio_embeddings.pt"
    vocabulary = AUDIO_VOCABULARY
    if table.exists():
        weights = torch.load(table, weights_only=True, map_location="cpu")
        vocabulary = len(weights["audio_embeddings.0.weight"])
    return Base(source, folder, config, tokenizer, vision, audio, front, (mean, scale), ids, vocabulary)


def missing_files(folder: Path) -> list[str]:
    """What LongCat-Flash-Omni consists of and is not in the folder, the shards that its index lists
    included."""
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else {index.name}
    around = "config.json tokenizer_config.json vision/config.json audio/config.json".split()
    around += ["audio/preprocessor_config.json", "audio/global_cmvn"]
    return [name for name in (*around, *PARTS, *sorted(shards)) if not (folder / name).is_file()]


def part_of(net: Omni, name: str) -> nn.Module:
    """The module whose state dict a file of PARTS is; of the embedding under the name that the file has."""
    if PARTS[name]:
        return getattr(net, PARTS[name])
    embedding = nn.Module()
    embedding.word_embeddings = net.llm.get_input_embeddings()
    return embedding


def load_omni(base: Base, dtype: str, routers: bool = False) -> Omni:
    """The weights of a folder; one that is missing, left over or of another shape ends the run. Under
    ZeRO-3: a rank's part. `routers`: whether they are to be trained; else they are whole and exact on each
    rank, in fp32."""
    from safetensors import safe_open

    folder, kind = base.folder, TORCH_DTYPES[dtype]
    try:
        llm, loaded = longcat_class().from_pretrained(
            folder, config=base.config, dtype=kind, output_loading_info=True, local_files_only=True,
            ignore_mismatched_sizes=True,  # check_loaded ends the run, and names them
        )  # fmt: skip
    except RuntimeError as error:  # an expert is missing: transformers puts them together
        refuse(f"{folder}: {brief(error)}")
    own_file = "model.embed_tokens.weight"
    loaded["missing_keys"] = [name for name in loaded["missing_keys"] if name != own_file]
    check_loaded(loaded, folder)
    where = read_json(folder / "model.safetensors.index.json")["weight_map"]
    names = {module: name for name, module in llm.named_modules()}
    for router in llm.routers:
        for name in ("e_score_correction_bias", "classifier.weight"):
            full = f"{names[router]}.{name}"
            with safe_open(folder / where[full], "pt") as shard:
                exact = shard.get_tensor(full).to(llm.device, torch.float32)
            if name != "classifier.weight":
                router.e_score_correction_bias.data = exact
            elif not routers:
                del router.classifier.weight
                router.classifier.register_buffer("weight", exact)
    net = Omni(base, llm)
    for name in PARTS:
        part, weights = part_of(net, name), torch.load(folder / name, weights_only=True, map_location="cpu")
        state = part.state_dict(keep_vars=True)
        wanted = {(key, tuple(getattr(value, "ds_shape", value.shape))) for key, value in state.items()}
        if wrong := sorted(wanted ^ {(key, tuple(value.shape)) for key, value in weights.items()}):
            which = f"{len(wrong)} weights are missing or do not fit, {wrong[0][0]} among them"
            refuse(f"{folder / name}: {which}")
        with gathered(list(part.parameters()), changed=True):
            for key, value in state.items():
                value.data.copy_(weights[key])
    for part in (m for n, m in net.named_children() if n != "llm"):
        part.to(kind)
    return net


def checkpoint_names(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The language model's weights under the names of the checkpoint: an expert's three matrices each have
    their own."""
    for name, value in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(value):
                gate, up = expert.chunk(2)
                yield f"{name.removesuffix('gate_up_proj')}{number}.gate_proj.weight", gate
                yield f"{name.removesuffix('gate_up_proj')}{number}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(value):
                yield f"{name.removesuffix('down_proj')}{number}.down_proj.weight", expert
        else:
            yield name, value


def write_omni(folder: Path, weights: dict[str, Tensor], base: Base) -> None:
    """A whole model in the layout that load_omni reads: shards with an index, the .pt parts, configs,
    tokenizer."""
    from huggingface_hub import save_torch_state_dict

    for name in ("vision", "audio"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    embedding = "llm.model.embed_tokens.weight"
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    names = [name for name in weights if name.startswith("llm.") and name != embedding]
    llm = {name.removeprefix("llm."): weights[name] for name in names}
    shards = {}
    for name, value in checkpoint_names(llm):
        value = value.float() if name.endswith("e_score_correction_bias") else value
        shards[name] = value.clone(memory_format=torch.contiguous_format)
    half = sum(value.nbytes for value in shards.values()) // 2  # two shards at least: there is an index
    save_torch_state_dict(shards, folder, max_shard_size=min(half, 10**10))
    for file, prefix in PARTS.items():
        names = [name for name in weights if prefix and name.startswith(f"{prefix}.")]
        part = {name.removeprefix(f"{prefix}."): weights[name] for name in names}
        torch.save(part or {"word_embeddings.weight": weights[embedding]}, folder / file)
    base.config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    write_json(folder / "vision" / "config.json", base.vision)
    write_json(folder / "audio" / "config.json", base.audio)
    write_json(folder / "audio" / "preprocessor_config.json", base.front)
    if base.folder and base.folder != folder:  # what engines read besides: remote code, templates, the codec
        for path in (path for pattern in SMALL for path in base.folder.glob(pattern) if path.is_file()):
            target = folder / path.relative_to(base.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() and path.name != "model.safetensors.index.json":
                shutil.copyfile(path, target)


def lora_names(base: Base) -> dict[str, int]:
    """{name of a layer that LoRA can be given: parameters that it adds there for each unit of rank}, over the
    whole model"""
    with torch.device("meta"):
        net = Omni(base)
    sizes: dict[str, int] = {}
    for name, module in net.named_modules():
        inside = any(part in name for part in (".self_attn.", ".mlps.", "audio_heads.audio_output_layers"))
        if isinstance(module, nn.Linear) and inside:
            last = "audio_output_layers" if "audio_output_layers" in name else name.split(".")[-1]
            sizes[last] = sizes.get(last, 0) + module.in_features + module.out_features
    return sizes


def lora_settings(cfg: Config, base: Base):
    """Exit 2 for a name that is no such layer: the router is never called as a module, experts are one
    tensor, and PEFT would pass over what it does not find."""
    from peft import LoraConfig

    sizes = lora_names(base)
    asked = [name.strip() for name in cfg.lora_targets.split(",") if name.strip()]
    if wrong := [name for name in asked if name not in sizes]:
        layers = ", ".join(f"{name} ({cfg.lora_r * size / 1e6:.3g} M)" for name, size in sizes.items())
        mixture = wrong[0] in ("classifier", "router", "experts", "mlp")
        why = "; the router and the experts cannot be adapted" if mixture else ""
        refuse(
            f"--lora_targets {wrong[0]}: no such layer{why}. There are, with what each trains at --lora_r "
            f"{cfg.lora_r}: {layers}"
        )
    if not asked:
        refuse("--lora_targets: name at least one layer")
    layers = "|".join(name for name in asked if name != "audio_output_layers")
    spoken = r"|audio_heads\.audio_output_layers\.\d+" if "audio_output_layers" in asked else ""
    return LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
        target_modules=rf"llm\.model\.layers\.\d+\.(self_attn|mlps)\.\d+\.({layers}){spoken}",
    )  # fmt: skip


def with_adapter(net: Omni, cfg: Config, base: Base) -> nn.Module:
    """What is trained: LoRA over frozen weights, or with --lora_r 0 everything but a head that does
    nothing."""
    net.requires_grad_(not cfg.lora_r)
    net.audio_encoder.output.requires_grad_(False)
    if not cfg.lora_r:
        return net
    from peft import get_peft_model

    adapted = get_peft_model(net, lora_settings(cfg, base), autocast_adapter_dtype=False)
    # PEFT looks for it in a model of transformers
    here = Path(base.source)  # a folder is found from wherever the adapter is used
    source = str(here.resolve()) if here.is_dir() else base.source
    adapted.peft_config["default"].base_model_name_or_path = source
    return adapted


def with_finished(net: Omni, folder: Path) -> nn.Module:
    """The adapter of a finished model, if that is what lies in its folder."""
    if not (folder / "adapter_config.json").exists():
        return net
    from peft import PeftModel

    return PeftModel.from_pretrained(net, folder)


def core(net: nn.Module) -> Omni:
    """The Omni inside PEFT's wrapping."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net


# ---------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------


def weighted(losses: Tensor, cfg: Config) -> Tensor:
    """The loss of training from those of text and the four streams (5,)"""
    weights = [cfg.text_weight, cfg.audio_weight + cfg.semantic_weight, *[cfg.audio_weight] * (CODEBOOKS - 1)]
    return (losses * torch.tensor(weights, device=losses.device)).sum()


def spectral_shape(sound: np.ndarray, columns: int = 32) -> np.ndarray:
    """What recognition compares: the log-mel spectrum, stretched to `columns` -> (columns, 40)"""
    spectrum = MelCodec.log_mel(sound).T[None]
    return F.interpolate(spectrum, columns, mode="linear")[0].T.numpy()


def recognised(sound: np.ndarray, known: dict[str, np.ndarray]) -> str:
    """Which of the known replies (spectral shapes, several for each text) is nearest, "" for no sound."""
    if len(sound) < SAMPLE_RATE // 10:
        return ""
    shape = spectral_shape(sound)
    return min(known, key=lambda text: min(abs(known[text] - shape).mean((1, 2))))


def speech_distance(target: np.ndarray, output: np.ndarray) -> dict[str, float]:
    """STOI (Taal et al. 2011), mel-cepstral distance in dB (Kubichek 1993, coefficients 1 to 13), and the
    error of the duration as a share of the target's. The first two compare moment by moment: they say nothing
    where other words are spoken."""
    from pystoi import stoi
    from scipy.fft import dct

    wrong = abs(len(output) - len(target)) / len(target)
    output = output if len(output) else np.zeros_like(target)
    length = min(len(target), len(output))
    spectra = [MelCodec.log_mel(sound[:length]).numpy() for sound in (target, output)]
    cepstra = [dct(spectrum, norm="ortho")[:, 1:14] for spectrum in spectra]
    moved = np.sqrt(2 * ((cepstra[0] - cepstra[1]) ** 2).sum(1)).mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of speech that is shorter than its 0.4 s
        similar = float(stoi(target[:length], output[:length], SAMPLE_RATE)) if length > 6400 else 0.0
    distance = 10 / math.log(10) * float(moved)
    return {"stoi": similar, "mel_cepstral_distance": distance, "duration_error": wrong}


def evenly(clips: list[Clip], count: int) -> list[Clip]:
    """Up to `count`, spread evenly, the same in every evaluation."""
    count = min(count, len(clips))
    return [clips[i * len(clips) // count] for i in range(count)]


def mean_row(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over the rows that have it"""
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        means[name] = float(np.mean([row[name] for row in rows if name in row]))
    return means


def baseline(data: Data, codec: MelCodec | LongCatCodec, cfg: Config) -> dict:
    """Rank 0: what the mean of the training replies would score: codes by frequency, the mean spectrum for
    the mean duration."""
    known, clips = data.train[:256], evenly(data.held_out, cfg.eval_samples)
    codes = np.concatenate([np.load(clip.codes) for clip in known])
    wanted = np.concatenate([np.load(clip.codes) for clip in clips])
    entropy, best = {}, {}
    for i, (head, size) in enumerate(zip(HEADS, codec.sizes)):
        share = (np.bincount(codes[:, i], minlength=size) + 1) / (len(codes) + size)
        entropy[head] = float(-np.log(share[wanted[:, i]]).mean())
        best[head] = float((wanted[:, i] == share.argmax()).mean())
    spectra = [MelCodec.log_mel(np.load(clip.reply)) for clip in known]
    frames = round(np.mean([len(spectrum) for spectrum in spectra]))
    sound = MelCodec.sound_of(torch.cat(spectra).mean(0).expand(frames, -1))
    distances = [speech_distance(np.load(clip.reply), sound) for clip in clips]
    return {"cross_entropy": entropy, "accuracy": best} | mean_row(distances)


@torch.no_grad()
def evaluate(net: nn.Module, base: Base, data: Data, cfg: Config, aloud: bool) -> dict:
    """Every rank: held-out clips as they are, with the video blanked and with the audio silenced. For each of
    SHOWN {"loss", "cross_entropy" and "accuracy" of the text and each stream}, given the reply so far; and
    `aloud` the replies themselves, in the demo for all three: "replies" {number of the clip: (text, rows of
    codes (R, 4))}."""
    device = next(net.parameters()).device
    collate, clips = Collator(base, cfg), evenly(data.held_out, cfg.eval_samples)
    together = any(hasattr(p, "ds_id") for p in net.parameters())
    most = math.ceil(cfg.max_reply / FRAME_SECONDS)
    result: dict[str, Any] = {}
    with evaluating(net):
        for shown in SHOWN:
            scores = {}
            for part in rounds(len(clips), 1):
                batch = collate([clips[i] for i in part], shown)
                losses, hits = net(**{name: value.to(device) for name, value in batch.items()})
                scores[part[0]] = torch.cat([losses, hits]).double().cpu().numpy()
            means = np.mean(list(merged_over_ranks(scores).values()), axis=0).tolist()
            result[shown] = {
                "loss": float(weighted(torch.tensor(means[:5]), cfg)),
                "cross_entropy": dict(zip(STREAMS, means[:5])),
                "accuracy": dict(zip(STREAMS, means[5:])),
            }
            if aloud and (cfg.demo or shown == SHOWN[0]):
                replies = {}
                # a sequence's cache of keys and values is about its training memory
                for part in rounds(len(clips), cfg.batch_size):
                    batch = collate([clips[i] for i in part], shown, reply=False)
                    batch = {name: value.to(device) for name, value in batch.items()}
                    texts, rows = core(net).speak(batch, most, cfg.repetition_penalty, together)
                    said = [base.tokenizer.decode(text, skip_special_tokens=True).strip() for text in texts]
                    replies |= dict(zip(part, zip(said, rows)))
                result[shown]["replies"] = merged_over_ranks(replies)
    return result


def listen(result: dict, data: Data, codec: MelCodec | LongCatCodec, cfg: Config) -> dict[str, np.ndarray]:
    """Rank 0: what the spoken replies are worth, added as "spoken" to each part of an evaluation that has
    some. -> {name of the clip: float32 at codec.rate} of those to the clips as they are"""
    from scipy.signal import resample_poly

    clips, known, sounds = evenly(data.held_out, cfg.eval_samples), {}, {}
    if cfg.demo:
        for clip in data.train:
            known.setdefault(clip.text, []).append(spectral_shape(np.load(clip.reply)))
        known = {text: np.stack(shapes[:8]) for text, shapes in known.items()}
    for shown in SHOWN:
        if "replies" not in result[shown]:
            continue
        rows = []
        for i, clip in enumerate(clips):
            text, codes = result[shown]["replies"][i]
            sound = codec.decode(codes_from(codes, codec.sizes))
            sounds.setdefault(clip.name, sound)
            if codec.rate != SAMPLE_RATE:
                sound = resample_poly(sound, SAMPLE_RATE, codec.rate).astype(np.float32)
            row = {"text right": float(normalized(text) == normalized(clip.text))} if clip.text else {}
            row |= speech_distance(np.load(clip.reply), sound)
            if cfg.demo:
                row["recognised"] = float(recognised(sound, known) == clip.text)
            rows.append(row)
        result[shown]["spoken"] = mean_row(rows)
    return sounds


# ---------------------------------------------------------------------------
# Plan
# ---------------------------------------------------------------------------

# (GPUs, usable memory of one in GB, GPUs of one machine, RAM of one machine in GB)
MACHINES = {
    "8x H100 80 GB, 512 GB RAM": (8, 84.9, 8, 512),
    "8x H100 80 GB, 1 TB RAM": (8, 84.9, 8, 1000),
    "2x B200 192 GB, 512 GB RAM": (2, 191.0, 2, 512),
    "2x B200 192 GB, 2 TB RAM": (2, 191.0, 2, 2000),
    "8x H100 80 GB, 2 TB RAM": (8, 84.9, 8, 2000),
    "8x H200 141 GB, 2 TB RAM": (8, 149.2, 8, 2000),
    "8x B200 192 GB, 2 TB RAM": (8, 191.0, 8, 2000),
    "16x H200 141 GB, two machines": (16, 149.2, 8, 2000),
}
# Bytes a second, assumed: RAM to one GPU over PCIe 5, NVLink between GPUs, 400 Gb/s of network for each GPU
# between machines, one good NVMe disk.
HOST, LINK, NETWORK, DISK = 50e9, 350e9, 50e9, 7e9


@dataclass(frozen=True)
class Sizes:
    parameters: int
    trained: int  # parameters
    experts: int  # parameters of all of them
    layer: int  # of one mixture, which ZeRO-3 gathers whole
    largest: int  # of the largest tensor, which is read from NVMe in one piece for each rank
    smallest_expert: int  # of the smaller of the two tensors of a mixture
    tensors: int  # of a layer of the language model that are large enough to be swapped
    shapes: dict[int, int]  # {parameters of a tensor: how many tensors have as many}
    # {with gradient checkpointing: bytes that one micro-batch keeps for the backward pass}
    kept: dict[bool, int]


def sizes_of(base: Base, cfg: Config, dtype: str, tokens: int, supervised: int) -> Sizes:
    """Parameters counted on the meta device. Activations of the language model by a count of what its layers
    keep; not yet measured. Exit 2 for LoRA targets that there are not."""
    c = base.config
    with torch.device("meta"):
        net = Omni(base)
    parameters = sum(p.numel() for p in net.parameters())
    first = net.llm.model.layers[0]
    fused = sorted(p.numel() for p in first.mlp.experts.parameters())
    routed = "" if not cfg.lora_r else ".router."  # beside an adapter these are buffers, see load_omni
    moved = [(name, p.numel()) for name, p in net.named_parameters() if not (routed and routed in name)]
    swapped = sum(count >= 2**20 for name, count in moved if name.startswith("llm.model.layers.0."))
    trained = sum(p.numel() for p in with_adapter(net, cfg, base).parameters() if p.requires_grad)
    heads, low = c.num_attention_heads, TORCH_DTYPES[dtype].itemsize
    attention = 3 * c.hidden_size + 2 * c.q_lora_rank + 2 * c.kv_lora_rank + c.qk_rope_head_dim
    attention += heads * (3 * c.qk_head_dim + c.qk_nope_head_dim + 2 * c.v_head_dim)
    mixture = 4 * (c.n_routed_experts + (c.zero_expert_num or 0))
    mixture += c.moe_topk * (3 * c.hidden_size + 5 * c.expert_ffn_hidden_size)
    one = 2 * (attention + c.hidden_size + 4 * c.ffn_hidden_size) + mixture  # numbers a token in one layer
    rows, classes = cfg.batch_size * tokens * low, c.vocab_size + CODEBOOKS * base.audio_vocabulary
    around = cfg.batch_size * supervised * classes * (low + 8)  # logits, in fp32, and their gradient
    around += 0 if cfg.lora_r else rows * 40 * base.vision["hidden_size"]
    layer_by_layer = {False: c.num_layers * one, True: c.num_layers * c.hidden_size + one}
    return Sizes(
        parameters, trained, sum(fused) * c.num_layers, sum(fused), fused[-1], fused[0], swapped,
        dict(collections.Counter(count for _, count in moved)),
        {on: rows * numbers + around for on, numbers in layer_by_layer.items()},
    )  # fmt: skip


def layouts_of(
    sizes: Sizes, cfg: Config, dtype: str, devices: int, local: int | None = None, nvme: Path | None = None
) -> list[Layout]:
    """memory_layouts, with NVMe last, and with the time that the transfer of weights alone takes."""
    low = TORCH_DTYPES[dtype].itemsize
    frozen = low * (sizes.parameters - (0 if cfg.lora_r else sizes.trained))
    kept = {on: sizes.kept[on] for on in CHECKPOINTING[cfg.gradient_checkpointing]}
    layouts = memory_layouts(sizes.trained, frozen, kept, dtype, devices, local, low * sizes.layer)
    if nvme:
        layouts += nvme_layouts(layouts[-1], sizes, low, devices, local or devices, nvme)
    weights, finished = low * sizes.parameters, []
    for layout in layouts:
        gpu, host = layout.gpu_gb, layout.host_gb
        if layout.offload == "all":
            host += (
                pinned_gb(sizes, low, devices, local or devices) - weights * (local or devices) / devices / GB
            )
        if layout.stage == 3 and not layout.checkpointing:
            gpu += weights / GB  # autograd holds on to slices of what was gathered
        if layout.offload not in ("", "optimizer"):
            gpu += low * sizes.layer / devices / GB  # a rank's own part of what is gathered, on its way
        seconds = transfer_seconds(layout, weights, devices, local or devices)
        note = f"at least {duration(seconds)} a micro-step, {duration(seconds * cfg.accum)} a step"
        note = note if seconds > 1 else ""
        finished.append(dataclasses.replace(layout, gpu_gb=gpu, host_gb=host, note=note))
    return finished


def pinned_gb(sizes: Sizes, low: int, devices: int, local: int) -> float:
    """Of one machine's RAM for all weights: each rank's part of each tensor, of which torch's allocator of
    pinned memory takes the next power of two"""
    parts = ((2 ** math.ceil(math.log2(low * -(-size // devices))), n) for size, n in sizes.shapes.items())
    return local * sum(part * count for part, count in parts) / GB


def transfer_seconds(layout: Layout, weights: int, devices: int, local: int) -> float:
    """That a micro-step needs to bring bytes of weights to the GPUs: forward, backward and, with gradient
    checkpointing, once in between. The slowest way counts."""
    return (2 + layout.checkpointing) * max(
        weights * (devices - 1) / devices / (LINK if devices <= local else NETWORK)
        if layout.stage == 3
        else 0,
        weights / devices / HOST if layout.offload == "all" else 0,
        weights * local / devices / DISK if "NVMe" in layout.offload else 0,
    )


def nvme_layouts(like: Layout, sizes: Sizes, low: int, devices: int, local: int, nvme: Path) -> list[Layout]:
    """The layout "all on CPU" with weights on a disk, for machines with too little RAM:
    ds_zero3_offload.json with a buffer for each tensor that may be in use at once, of the size of a rank's
    part of the largest. First the experts alone on the disk, two tensors a layer, and all else resident on
    each GPU; then every weight there, and the tensors of a whole layer at once. Prefetching is off: DeepSpeed
    0.19.8 would ask for a tensor twice. Optimizer states stay in RAM: with LoRA they are small."""
    buffer, around = math.ceil(1.05 * sizes.largest / devices), sizes.parameters - sizes.experts
    layouts = []
    for what, tensors, resident in (("experts", 4, around), ("weights", sizes.tensors, 0)):
        zero = like.config["zero_optimization"] | {
            "offload_param": {"device": "nvme", "nvme_path": str(nvme), "buffer_count": tensors,
                              "buffer_size": buffer, "pin_memory": True},
            "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": sizes.smallest_expert - 1 if resident else 0,
        }  # fmt: skip
        aio = {"block_size": 2**20, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False,
               "overlap_events": True}  # fmt: skip
        layout = dataclasses.replace(
            like,
            offload=f"{what} on NVMe",
            gpu_gb=like.gpu_gb + low * resident / GB,
            host_gb=(tensors * buffer * low + 14 * sizes.trained / devices) * local / GB,
            config=like.config | {"zero_optimization": zero, "aio": aio},
        )
        layouts.append(layout)
    return layouts


def check_nvme(cfg: Config) -> None:
    """Exit 2 where DeepSpeed cannot read weights from a disk, or (0.19.8) reads them into what is still in
    use."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        refuse(f"--nvme_path {cfg.nvme_path}: DeepSpeed needs libaio for it: apt-get install libaio-dev")
    if not torch.cuda.is_available() and world_size() == 1:
        why = "with one process on a CPU DeepSpeed computes wrong gradients"
        refuse(f"--nvme_path: {why}; take two, or leave it out")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def bytes_text(count: float) -> str:
    """For people: 1.1 TB, 8.4 MB"""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
    name, unit = next(((name, unit) for name, unit in units if count >= unit / 2), ("kB", 1e3))
    return f"{count / unit:.1f} {name}"


@on_rank0
def storage(cfg: Config) -> list[str]:
    """Without the network: the storage check, whose first lines are those of the public tutorial. -> what is
    short"""
    from huggingface_hub import constants, try_to_load_from_cache

    folder = Path(cfg.model)
    if not folder.is_dir():  # a Hub id, perhaps downloaded already
        cached = try_to_load_from_cache(cfg.model, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else None
    missing, shards, weights = missing_files(folder) if folder else ["all"], set(), PUBLISHED_BYTES
    if folder and (index := folder / "model.safetensors.index.json").exists():
        listed = read_json(index)
        shards = set(listed["weight_map"].values())
        weights = listed.get("metadata", {}).get("total_size", weights)
    place, need = (folder, 0.0) if folder and not missing else (Path(constants.HF_HUB_CACHE), 1.06 * weights)
    if need and shards:  # a download that was broken off goes on with what is not there
        need *= len(shards & set(missing)) / len(shards)
        blobs = folder.parent.parent / "blobs"
        need = max(0.0, need - sum(path.stat().st_size for path in blobs.glob("*.incomplete")))
    status, free, short = "OK", disk_free(place), []
    if missing and Path(cfg.model).is_dir():
        status, need = f"{len(missing)} files missing", 0.0
        more = " ..." if len(missing) > 8 else ""
        short.append(f"--model {cfg.model}: missing are {', '.join(missing[:8])}{more}")
    elif need > free:
        status = f"{bytes_text(need - free)} short"
        sizes = f"{bytes_text(need)} are needed in {place}, {bytes_text(free)} are free"
        short.append(f"--model {cfg.model}: {sizes}: set HF_HOME")
    log.info(f"Model weights: {bytes_text(weights)}\nAvailable space: {bytes_text(free)} in {place}")
    log.info(f"Status: {status}")
    here = f"{len(shards - set(missing))} of {len(shards)} are there" if shards else "not downloaded"
    log.info(f"shards   {here}{f'; {bytes_text(need)} of disk for the download' if need else ''}")
    if cfg.nvme_path:
        swap = bytes_text(free := disk_free(cfg.nvme_path))
        log.info(f"nvme     {bytes_text(weights)} of weights once more in {cfg.nvme_path}, {swap} free")
        if free < weights:
            short.append(f"--nvme_path {cfg.nvme_path}: {swap} free, {bytes_text(weights)} needed")
    return short


def machine_table(sizes: Sizes, cfg: Config) -> tuple[str, str]:
    """-> (what holds the model and what each step then takes at least, by arithmetic; the first machine that
    needs no NVMe)"""
    ways = {"RAM": HOST, "NVLink": LINK, "network": NETWORK, "NVMe": DISK}
    assumed = ", ".join(f"{rate / 1e9:.0f} GB/s {name}" for name, rate in ways.items())
    lines = [f"machines estimated for bf16, one clip a GPU; transfer alone, at assumed {assumed}"]
    nearest = ""
    for machine, (devices, gpu, local, ram) in MACHINES.items():
        layouts = layouts_of(sizes, cfg, "bf16", devices, local, Path("nvme"))
        fitting = next((layout for layout in layouts if layout.fits(gpu, ram, devices)), None)
        weights = 2 * sizes.parameters * local / devices / GB
        text = "" if weights < 0.9 * ram else f"cannot hold the {weights:.0f} GB of weights in its RAM; "
        if fitting:
            text += f"{fitting.name} ({fitting.gpu_gb:.0f} GB a GPU, {fitting.host_gb:.0f} GB RAM)"
            text += f": {fitting.note}" if fitting.note else ""
            nearest = nearest or ("" if "NVMe" in fitting.offload else machine)
        else:
            text += "does not fit"
        lines.append(f"  {machine:<30}{text}")
    return "\n".join(lines), nearest or "none of those listed"


def plan_of(
    cfg: Config, base: Base, data: Data | None, source: Path, device: torch.device
) -> tuple[Layout, bool]:
    """Print what this run is going to do, and check that it fits. -> (the layout of memory that is taken,
    whether held-out clips are answered aloud)"""
    low = TORCH_DTYPES[cfg.dtype].itemsize
    tokens, supervised = 1650, 168
    lines = [("data", "none yet: the plan is for clips of 10 s with replies of 10 s")]
    if data:
        collate, lengths = Collator(base, cfg), []
        for clip in data.train[:: max(1, len(data.train) // 256)]:
            ids, _, start = collate.sequence(clip, True)
            lengths.append((len(ids), len(ids) - start))
        tokens, supervised = map(max, zip(*lengths))
        lines = [*describe(cfg, data, source), steps_line(cfg, device, "clips")]
    if tokens > base.config.max_position_embeddings:
        refuse(
            f"sequences of {tokens} tokens, {base.source} takes {base.config.max_position_embeddings}: "
            "lower --frames"
        )
    sizes = sizes_of(base, cfg, cfg.dtype, tokens, supervised)
    layouts = layouts_of(sizes, cfg, cfg.dtype, world_size(), None, cfg.nvme_path)
    table, nearest = machine_table(sizes, cfg)
    if cfg.check and not cfg.demo:
        log.info(table)
    trained = f"LoRA r {cfg.lora_r}: {sizes.trained / 1e6:.2f} M trained" if cfg.lora_r else "all are trained"
    lines += [
        ("sequence", f"{tokens} tokens at most, {supervised} of them the reply"),
        (
            "loss",
            f"{cfg.text_weight:g} text + {cfg.audio_weight:g} each stream + {cfg.semantic_weight:g} semantic"
            "; published are those of the first stage of pre-training, not of fine-tuning",
        ),
        ("model", f"{base.source}, {sizes.parameters / 1e6:,.2f} M parameters; {trained}"),
        ("experts", f"one mixture, {bytes_text(low * sizes.layer)}, is gathered on each GPU under ZeRO-3"),
    ]
    whole = sizes.trained if cfg.lora_r else sizes.parameters
    disk = (cfg.keep + 1) * sizes.trained * (12 + low) + whole * low
    move = f"the nearest machine that would do: {nearest}"
    with_nvme = layouts_of(sizes, cfg, cfg.dtype, world_size(), None, cfg.nvme_path or Path("nvme"))
    here = memory_here()
    if not cfg.nvme_path and any("NVMe" in x.offload and x.fits(*here, world_size()) for x in with_nvme):
        move += "; or give --nvme_path, a folder on a fast disk"
    layout = show_plan(cfg, device, lines, layouts, move, disk)
    aloud, told = speaks(cfg, layout, low * sizes.parameters)
    log.info(f"evaluate {told}")
    return layout, aloud


def speaking_seconds(cfg: Config, layout: Layout, weights: int, devices: int, local: int) -> float:
    """At least, for the replies of an evaluation: each row of codes is a pass through all weights"""
    passes = -(-cfg.eval_samples // (cfg.batch_size * devices)) * cfg.max_reply / FRAME_SECONDS
    return (
        passes
        * transfer_seconds(dataclasses.replace(layout, checkpointing=False), weights, devices, local)
        / 2
    )


def speaks(cfg: Config, layout: Layout, weights: int) -> tuple[bool, str]:
    """-> (whether replies are spoken at the end, what the plan says of it)"""
    devices, local = world_size(), local_ranks()
    spoken = speaking_seconds(cfg, layout, weights, devices, local)
    training = cfg.steps * cfg.accum * transfer_seconds(layout, weights, devices, local)
    aloud = cfg.speak and (spoken < 60 or spoken < 0.1 * training)
    told = "spoken at the end" if aloud else "not spoken"
    if spoken > 1:
        told += f" ({duration(spoken)} of speaking at least, {duration(training)} of training)"
    if cfg.speak and not aloud:
        told += ": lower --eval_samples or --max_reply, or train longer"
    return aloud, f"{cfg.eval_samples} held-out clips, {told}"


def describe(cfg: Config, data: Data, source: Path) -> list[tuple[str, str]]:
    """The plan's lines about the data."""
    clips = data.train if data.held_out is data.train else data.train + data.held_out
    heard = [np.load(clip.speech, mmap_mode="r").size / SAMPLE_RATE for clip in clips]
    said = [np.load(clip.reply, mmap_mode="r").size / SAMPLE_RATE for clip in clips]
    pairs = [len(clip.seconds) for clip in clips]
    areas = sorted({clip.size for clip in clips}, key=math.prod)
    sizes = " to ".join(dict.fromkeys(f"{h}x{w}" for h, w in (areas[0], areas[-1])))
    narrow = [clip.name for clip in clips if min(clip.rates) < SAMPLE_RATE]
    same = " (the same: there is one clip)" if data.held_out is data.train else ""
    written, without = sum(bool(clip.text) for clip in clips), ""

    def told(clip: tuple[Clip, float, float]) -> str:
        (clip, into, out), pictures = clip, f"{2 * len(clip[0].seconds)} pictures"
        return f"{clip.name}: {pictures}, speech {into:.1f} s  ->  {out:.1f} s {clip.text!r}"

    if written < len(clips):
        without = ": without it the model has no words to hold on to (a tiny one spoke .50 right, not .97)"
    lines = [
        (
            "data",
            f"{source}: {len(data.train)} clips to train on, {len(data.held_out)} held out{same}, "
            f"{len(data.bad)} left out as bad",
        ),
        ("frames", f"{2 * min(pairs)} to {2 * max(pairs)}, two a second, {sizes} (height x width)"),
        ("speech", f"in {min(heard):.1f} to {max(heard):.1f} s, out {min(said):.1f} to {max(said):.1f} s"),
        ("text", f"{written} of {len(clips)} clips have an out.txt{without}"),
        *row_lines(list(zip(data.train, heard, said)), told),
    ]
    if narrow:
        more = " ..." if len(narrow) > 5 else ""
        lines.append(("", f"warning: below 16 kHz, so dull: {', '.join(narrow[:5])}{more}"))
    return lines


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


def load_net(
    base: Base, cfg: Config, config: dict, adapt: Callable[[Omni], nn.Module], train: bool = True
) -> nn.Module:
    """Every rank: the model for a layout of memory, under ZeRO-3 each rank's part of it; `adapt` adds an
    adapter. ZeRO-3 gathers a mixture of experts whole: ranks choose different experts, and would else wait
    for each other for ever."""
    import deepspeed  # after init_distributed has told it the device
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    weights = on_rank0(fetch_model)(base.source, *WEIGHTS)
    base = dataclasses.replace(base, folder=weights)
    zero3 = config["zero_optimization"]["stage"] == 3
    # from_pretrained looks whether one that says ZeRO-3 is alive
    alive = HfDeepSpeedConfig(config) if zero3 else None
    net = load_omni(base, cfg.dtype, routers=not cfg.lora_r and train)
    del alive
    net = adapt(net)
    if zero3:
        deepspeed.utils.set_z3_leaf_modules(net, [LongcatFlashMoE])
    return net


def prepare(cfg: Config, base: Base, source: Path) -> tuple[Data, Any]:
    """Every rank: (the data, on rank 0 the codec). Exit 2 when the one does not fit the other."""
    codec = None

    @on_rank0
    def read() -> Data:
        nonlocal codec
        check_codec(cfg, base)
        data = load_data(cfg, source, base)
        codec = open_codec(cfg, base, [clip.reply for clip in data.train])
        train = encode_replies(data.train, codec, base, cfg)
        same = data.held_out is data.train
        return Data(train, train if same else encode_replies(data.held_out, codec, base, cfg), data.bad)

    return read(), codec


@on_rank0
def demo_parts(cfg: Config, adapts: bool) -> tuple[str, Path]:
    """(the demo's tiny model, or the one that was trained before; the clips made for it)"""
    speech = demo_module("speech")
    source = speech.make_data(cfg, adapts, write_wav)
    if adapts:
        return str(cfg.output_dir.parent / "model"), source
    return tiny_model(cfg, __file__, partial(speech.build_tiny, script=sys.modules[__name__])), source


def train(cfg: Config, part: Literal["", "base", "adapt"] = "") -> dict:
    """From the samples in --data_dir to cfg.output_dir/model. -> results.json. `part` of the demo: after the
    base comes more; how it speaks before it is adapted is measured too."""
    from_flags, device, source = cfg, open_run(cfg), cfg.data_dir
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or BASE_MODEL)
    if cfg.demo:
        model, source = demo_parts(cfg, part == "adapt")
        cfg = dataclasses.replace(cfg, model=model)
    if short := storage(cfg):
        refuse("\n".join(short))
    if cfg.nvme_path:
        check_nvme(cfg)
    base = open_base(cfg.model)
    data, codec = prepare(cfg, base, source)
    cfg = with_steps(cfg, WARMUP, len(data.train), cfg.batch_size * cfg.accum * world_size())
    layout, aloud = plan_of(cfg, base, data, source, device)
    cfg = dataclasses.replace(cfg, speak=aloud)
    if cfg.check:
        return {}
    # the demo makes as many clips as its steps take, and its models lie in folders of its own
    facts = {"base_model": part or cfg.model, "data": "" if cfg.demo else contents(data)}
    run = start_run(from_flags, cfg, __file__, layout, data.bad, "weighted cross-entropy", **facts)
    cfg = run.cfg
    torch.manual_seed(cfg.seed)  # the same adapter on every rank
    net = load_net(base, cfg, run.config, partial(with_adapter, cfg=cfg, base=base))
    net.train()  # from_pretrained leaves it in the mode of use, in which transformers keeps all activations
    if layout.checkpointing:
        core(net).llm.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in net.parameters() if p.requires_grad]
    betas = (0.9, cfg.beta2)
    optimizer = torch.optim.AdamW(trained, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True)
    engine = open_engine(run, net, optimizer, frozen_left_out=True)
    if part == "adapt" and cfg.eval_samples and not run.checkpoint:
        keep_before(cfg, evaluate(engine.module, base, data, cfg, aloud=True), data, codec)
    with out_of_memory(
        f"lower --batch_size {cfg.batch_size}, give --gradient_checkpointing on, or start anew with a lower "
        f"--size {cfg.size} or --frames {cfg.frames}"
    ):
        train_steps(cfg, run, engine, base, data)
    return finish_run(
        run,
        export=partial(export, cfg, engine.module, base, codec),
        evaluate=partial(final_results, cfg, engine.module, base, data, codec),
        card=partial(card_of, cfg, base, source),
        last=part != "base",
    )


def train_steps(cfg: Config, run: Run, engine: Any, base: Base, data: Data) -> None:
    """From run.step to cfg.steps; what is saved is what is trained alone, 14 bytes a parameter in bf16."""
    collate, device = Collator(base, cfg), engine.device
    save = partial(save_run, run, engine, frozen_left_out=True)
    evaluation = partial(evaluate_at, cfg, engine.module, base, data) if cfg.eval_samples else None
    names = [f"{stream}_{what}" for what in ("loss", "accuracy") for stream in STREAMS]
    ahead = batches_ahead(partial(get_batch, data.train, collate, cfg), cfg, run.step)
    for (_, row), batches in zip(training_steps(run, engine, save, evaluation), ahead):
        means = torch.zeros(10, device=device)
        for batch in batches:
            losses, hits = engine(**{name: value.to(device) for name, value in batch.items()})
            engine.backward(weighted(losses, cfg))
            engine.step()  # skips the update, on all ranks, when a gradient is not finite
            means += torch.cat([losses, hits]).detach() / cfg.accum
        row["loss"] = weighted(means[:5], cfg)
        row.update(zip(names, means))


def evaluate_at(cfg: Config, net: nn.Module, base: Base, data: Data, step: int) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run, without speaking. -> what goes into metrics.jsonl"""
    result = evaluate(net, base, data, cfg, aloud=False)
    loss, *others = (result[shown]["loss"] for shown in SHOWN)
    right = " | ".join(f"{shown} {result[shown]['accuracy']['semantic']:.2f}" for shown in SHOWN)
    log.info(f"eval step {step:06d} | held-out loss {loss:.4f} | semantic codes right: {right}")
    names = [f"held_out_loss_{shown.replace(' ', '_')}" for shown in SHOWN[1:]]
    return {"held_out_loss": loss} | dict(zip(names, others))


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


def export(cfg: Config, net: nn.Module, base: Base, codec: Any, target: Path) -> None:
    """Every rank: model/ with what was trained (the adapter as PEFT has it; with --lora_r 0 the whole model
    in LongCat's files), the fitted codec if there is one, and the scripts that speak with it."""
    weights = full_weights(net, TORCH_DTYPES[cfg.dtype], lambda p: p.requires_grad or not cfg.lora_r)
    if rank() == 0:
        target.mkdir(exist_ok=True)
        if cfg.lora_r:
            net.save_pretrained(target, state_dict=weights)
        else:
            write_omni(target, weights, base)
        if isinstance(codec, MelCodec):
            (target / "audio_codec").mkdir(exist_ok=True)
            codec.save(target / "audio_codec" / "mel_codec.safetensors")
        kept = ("frames", "size", "max_reply", "repetition_penalty", "dtype")
        write_json(target / "longcat_vss.json", {name: getattr(cfg, name) for name in kept})
        copy_code(target, __file__, "ds_zero2.json", "ds_zero3_offload.json")
    barrier()


def final_results(cfg: Config, net: nn.Module, base: Base, data: Data, codec: Any) -> dict:
    """Every rank: what results.json says of the finished model, and the samples"""
    if not cfg.eval_samples:
        return {"score": None, "score_is": "not evaluated: --eval_samples 0", "controls": {}, "tables": {}}
    result = evaluate(net, base, data, cfg, aloud=cfg.speak)

    @on_rank0
    def judge() -> dict:
        sounds, samples = listen(result, data, codec, cfg), cfg.output_dir / "samples"
        show_samples(samples, sounds, result, data, codec)
        if cfg.demo:  # else nothing of what users say leaves the machine
            for path in sorted(samples.glob("*.png"))[:2]:
                for name in (path.name, path.with_suffix(".wav").name):
                    shutil.copyfile(samples / name, cfg.output_dir / "model" / name)
        return results_of(result, data, codec, cfg)

    return judge()


def results_of(result: dict, data: Data, codec: Any, cfg: Config) -> dict:
    """Rank 0: an evaluation as results.json has it: score, controls and tables."""
    which = "training" if data.held_out is data.train else "held-out"
    count = f"{min(cfg.eval_samples, len(data.held_out))} {which} clips"
    scores = {shown: result[shown]["accuracy"]["semantic"] for shown in SHOWN}
    score_is = f"semantic codes right, given those before, {count}"
    spoken = {shown: result[shown].get("spoken", {}) for shown in SHOWN}
    if "recognised" in spoken[SHOWN[0]]:
        scores = {shown: spoken[shown]["recognised"] for shown in SHOWN}
        score_is = f"spoken replies recognised, {count}"
    mean = baseline(data, codec, cfg)
    so_far = {"loss": {shown: result[shown]["loss"] for shown in SHOWN} | {"training mean": None}}
    for what in ("cross_entropy", "accuracy"):
        for stream in STREAMS:
            row = {shown: result[shown][what][stream] for shown in SHOWN}
            row["training mean"] = mean[what].get(stream)
            so_far[f"{what}, {stream}".replace("_", " ")] = row
    tables = {"given the reply so far": so_far, "spoken": table_of(spoken | {"training mean": mean})}
    before = cfg.output_dir / "before.json"
    if before.exists():
        tables[BEFORE] = table_of(read_json(before))
    return {
        "score": scores[SHOWN[0]],
        "score_is": score_is,
        "controls": {shown.replace(" ", "_"): scores[shown] for shown in SHOWN[1:]},
        "held_out_loss": result[SHOWN[0]]["loss"],
        "tables": {title: rows for title, rows in tables.items() if rows},
    }


def table_of(columns: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """{column: {name: number}} -> {name: {column: number, or None}}, a row for each name of the first"""
    table = {}
    for name in next(iter(columns.values())):
        row = {column: numbers.get(name) for column, numbers in columns.items()}
        table[name.replace("_", " ")] = row
    return table


@on_rank0
def keep_before(cfg: Config, result: dict, data: Data, codec: Any) -> None:
    """How the model speaks before it is adapted, for the results at the end"""
    listen(result, data, codec, cfg)
    write_json(cfg.output_dir / "before.json", {shown: result[shown]["spoken"] for shown in SHOWN})


def show_samples(folder: Path, sounds: dict, result: dict, data: Data, codec: Any) -> None:
    """Rank 0: for each spoken reply NAME.wav, NAME_target.wav and NAME.png with both spectra, and
    samples.jsonl."""
    from matplotlib.figure import Figure

    clips, rows = {clip.name: clip for clip in data.held_out}, []
    for number, (name, sound) in enumerate(sounds.items()):
        clip, path = clips[name], folder / name.replace("/", "_")
        target = np.load(clip.reply)
        said = result[SHOWN[0]]["replies"][number][0]
        write_wav(path.with_suffix(".wav"), sound, codec.rate)
        write_wav(path.with_name(f"{path.name}_target.wav"), target)
        rows.append({"clip": name, "text": said, "wanted": clip.text, "seconds": len(sound) / codec.rate})
        axes = (figure := Figure(figsize=(8, 4.2), layout="constrained")).subplots(2, 1, sharex=True)
        both = ((f"wanted: {clip.text}", target, SAMPLE_RATE), (f"spoken: {said}", sound, codec.rate))
        for place, (title, samples, rate) in zip(axes, both):
            padded = np.pad(samples, (0, max(0, 512 - len(samples)))) + 1e-6
            place.specgram(padded, NFFT=512, Fs=rate, noverlap=352, vmin=-120, vmax=-20)
            printable = "".join(c if c.isprintable() else "?" for c in title)
            place.set(title=printable, ylabel="Hz", ylim=(0, 8000))
        axes[1].set(xlabel="s")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks
            figure.savefig(path.with_suffix(".png"), dpi=90)
    write_lines(folder / "samples.jsonl", rows)


def card_of(cfg: Config, base: Base, source: Path, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    data = "generated clips and words" if cfg.demo else source.name
    what = "all weights, in LongCat-Flash-Omni's files"
    if cfg.lora_r:
        what = f"a LoRA adapter (r {cfg.lora_r}, PEFT)"
    local = Path(base.source).exists()
    codec = f', codec="{cfg.codec.name}"  # your checkout of it' if cfg.codec else ""
    pictures = sorted(path.name for path in (cfg.output_dir / "model").glob("*.png"))
    return {
        "about": f"`{Path(base.source).name if local else base.source}`, fine-tuned to answer spoken "
        f"questions about videos aloud, on `{data}` by `longcat_vss.py`, which lies in this repository. Here "
        f"are {what}. The controls show the same with the video blanked and the audio silenced.",
        "usage": "from longcat_vss import reply, write_wav\n\n"
        f'text, sound, rate = reply("in.mp4", "in.wav", folder{codec})\nwrite_wav("out.wav", sound, rate)',
        "more": "\n".join(f"![wanted and spoken]({name})" for name in pictures if name != "loss.png"),
        "data": data,
        "library_name": "peft" if cfg.lora_r else "pytorch",
        "pipeline_tag": "any-to-any",
        "base_model": "" if local else base.source,
        "tags": ["longcat-flash-omni", "speech-to-speech", "video", "deepspeed"],
    }


def reply(
    video: str | Path, speech: str | Path, model: str | Path, codec: str | Path = "", **flags: Any
) -> tuple[str, np.ndarray, int]:
    """What a finished model, a folder or a Hub id, answers to a video and a spoken question: (text, float32
    (N,), sampling rate).

    Under ZeRO-3, when the plan or deepspeed= says so, every rank must call it. Exit 2 when the model cannot
    be found; raises BadSample (a ValueError) when video or speech cannot be used.
    """
    device, folder = init_distributed(), on_rank0(fetch_model)(str(model), "*")
    path, adapter = folder / "longcat_vss.json", folder / "adapter_config.json"
    saved = read_json(path) if path.exists() else {}
    below = read_json(adapter)["base_model_name_or_path"] if adapter.exists() else str(folder)
    if device.type == "cpu" and saved.get("dtype") == "fp16":
        saved["dtype"] = "fp32"
    cfg = Config(report_to="none", lora_r=0, codec=Path(codec) if codec else None, **{**saved, **flags})
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype))
    base = open_base(below)
    clip = on_rank0(make_sample)("predict", Path(video), Path(speech), None, "", cfg, base.vision)
    check_codec(cfg, base)
    inside = folder / "audio_codec" / "mel_codec.safetensors"
    spoken = MelCodec.load(inside) if inside.exists() else open_codec(cfg, base, [])
    sizes = dataclasses.replace(sizes_of(base, cfg, cfg.dtype, 0, 0), trained=0)
    layouts = layouts_of(sizes, cfg, cfg.dtype, world_size(), None, cfg.nvme_path)
    _, layout = choose_layout(layouts, cfg.deepspeed, "give more GPUs, or --nvme_path")
    config = ds_config(layout.config, "DeepSpeed's config", 1, 1, 1.0, cfg.dtype)
    net = load_net(base, cfg, config, partial(with_finished, folder=folder), train=False).eval()
    if together := config["zero_optimization"]["stage"] == 3:
        import deepspeed

        net = deepspeed.initialize(model=net, config=config)[0].module
    net = core(net if together else net.to(device))
    batch = {name: value.to(device) for name, value in Collator(base, cfg)([clip], reply=False).items()}
    most = math.ceil(cfg.max_reply / FRAME_SECONDS)
    texts, codes = net.speak(batch, most, cfg.repetition_penalty, together)
    text = base.tokenizer.decode(texts[0], skip_special_tokens=True).strip()
    return text, spoken.decode(codes_from(codes[0], spoken.sizes)), spoken.rate


def check(cfg: Config) -> None:
    """--check: storage first, then as far as they are there the model, the data, memory and time. Exit 2 if
    anything is short."""
    device = open_run(cfg)
    cfg = dataclasses.replace(cfg, model=cfg.model or BASE_MODEL)
    wrong, base, data = storage(cfg), published_base(cfg.model), None
    try:
        base = open_base(cfg.model)
    except SystemExit as stop:
        if stop.code != 2:  # a signal
            raise
        wrong.append(f"--model {cfg.model} cannot be opened: the plan is for the published sizes, in bf16")
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype) if base.folder else "bf16")
    if not cfg.data_dir.is_dir():
        wrong.append(f"--data_dir {cfg.data_dir}: no such folder")
    elif base.folder:
        try:
            data, _ = prepare(cfg, base, cfg.data_dir)
        except SystemExit as stop:
            if stop.code != 2:
                raise
            unusable = f"--data_dir {cfg.data_dir} or --codec cannot be used as they are"
            wrong.append(f"{unusable}: the plan is for clips of 10 s")
    samples = len(data.train) if data else 0
    cfg = with_steps(cfg, WARMUP, samples, cfg.batch_size * cfg.accum * world_size())
    for text in wrong:
        log.warning(f"error: {text}")
    plan_of(cfg, base, data, cfg.data_dir, device)
    if wrong:
        raise SystemExit(2)


def predict(cfg: Config) -> None:
    """--predict: write the spoken reply to --out, print the text."""
    model = cfg.model or str(cfg.output_dir / "model")
    video, speech = cfg.predict[0], cfg.predict[-1]  # the video's own sound when there is no other
    flags = {name: getattr(cfg, name) for name in ("deepspeed", "nvme_path", "cache_dir")}
    try:
        text, sound, rate = reply(video, speech, model, cfg.codec or "", **flags)
    except BadSample as error:
        refuse(f"--predict {' '.join(map(str, cfg.predict))}: {error}")
    except (OSError, ValueError) as error:
        refuse(f"--model {model}: {brief(error)}; give a folder that a run wrote, or a Hub id")
    if rank() == 0:
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        write_wav(cfg.out, sound, rate)
        print(f"{text}\n{cfg.out}: {len(sound) / rate:.2f} s")


def demo(cfg: Config) -> None:
    """A tiny model learns to speak; then, frozen, other words in another voice by LoRA. Both are runs as any
    other."""
    base, folder = train(cfg, "base"), cfg.output_dir
    if cfg.check:
        return
    adapt = ADAPT | {"steps": min(cfg.steps, ADAPT["steps"]), "push_to_hub": False}
    adapted = train(dataclasses.replace(cfg, output_dir=folder / "lora", **adapt), "adapt")

    @on_rank0
    def add_adapted() -> None:
        tables = dict(base["tables"])
        if {BEFORE, "spoken"} <= adapted["tables"].keys():
            before, after = (adapted["tables"][title]["recognised"] for title in (BEFORE, "spoken"))
            tables["new words and voice"] = {"before LoRA": before, "after LoRA": after}
        together = base | {"tables": tables}
        write_json(folder / "results.json", together)
        show_results(together, folder)
        write_text(folder / "SUCCESS", time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))

    add_adapted()


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, {})
    if cfg.predict:
        predict(cfg)
    elif cfg.demo:
        demo(cfg)
    elif cfg.check:
        check(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    run(main)
