# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "av==18.1.0", "datasets==5.2.0", "deepspeed==0.19.8", "huggingface_hub==2.4.0", "jinja2==3.1.6",
#   "matplotlib==3.11.2", "num2words==0.5.14", "numpy==2.4.6", "opencv-python-headless==5.0.0.93",
#   "peft==0.21.2", "pillow==13.0.0", "requests==2.34.2", "rouge-score==0.1.2", "sacrebleu==2.6.0",
#   "safetensors==0.8.0", "torch>=2.6", "torchvision>=0.21", "tqdm==4.70.1", "transformers==5.23.0",
#   "tyro==1.0.17",
# ]
# ///
"""Video and question to text: LLaVA-interleave 7B or any VLM of today, with a proof that it sees the video.

    python llava_vtt.py --demo                       # minutes on 2 CPU cores: a tiny LLaVA learns motion
    python llava_vtt.py --manifest clips.jsonl       # one GPU (or a CPU): the debugging path
    ./run.sh llava_vtt.py 4 --manifest clips.jsonl   # four GPUs, logged, data set and model pushed to the Hub
    python llava_vtt.py --predict clip.mp4 --question "What happens?"

--model takes what AutoModelForImageTextToText loads: LLaVA, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, SmolVLM2
and their kin, with the processor, the chat template and the placeholders that they were trained with.

Data: --manifest, a table or a folder, or --dataset, an id of the Hub, in any of the forms that README.md
lists (conversations, messages, question and answer, multiple choice, captions). Without either, four public
samples. Training and held-out clips are split by video. The questions of a clip share its frames in one
sequence, each a branch that does not see the others; the turns of a conversation keep their order.

LoRA on the language model and the whole projector are trained; --lora_r 0 trains all of the language model,
--train_vision the vision tower too, --load_in_4bit is QLoRA. The loss is on the answers and what ends them
alone. Each evaluation asks the same questions again with the frames shuffled, reversed and blanked.

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.
model/ is merged, for transformers and servers as it is; model/adapter/ is the LoRA.

Measured: --demo, 15 minutes on a busy CPU core: 1.00 of 500 answers about clips never seen are right; of the
directions 1.00, with the frames shuffled 0.16, reversed 0.00. On a GPU: not yet measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# isort: off
from common import (
    CHECKPOINTING, DEFAULT_QUESTION, GB, QA, AtMost, BadSample, Free, Layout, Lower, Pace, Row, Run,
    answer_scores, barrier, batches_ahead, brief, check_loaded, check_settings, check_weights, copy_code,
    data_name, decode_rows, demo_module, digest_of, disk_free, epoch_order, evaluating, export_pretrained,
    fetch_model, fingerprint, finish_run, finished_model, fitted, frame_indices, gathered, is_undivided,
    is_url, load_pretrained, local_file, log, mean_loss, memory_layouts, merged_over_ranks, normalized,
    on_rank0, open_engine, open_run, out_of_memory, over_ranks, pad, pick_dtype, push_rows, pushes_data, rank,
    read_data, read_flags, read_json_lines, ready, refuse, refuse_adapter, rounds, row_lines, run, save_run,
    saved_bytes, show_plan, split_clips, start_run, steps_line, timed_frames, tiny_model, training_steps,
    with_steps, words, world_size, write_grid, write_json, write_lines, write_whole,
)  # fmt: skip

BASE_MODEL = "llava-hf/llava-interleave-qwen-7b-hf"
# ChatML, as LLaVA-interleave was trained. Its own template says "assistant \n" of an answer that is there and
# "assistant\n" of one that is asked for.
TEMPLATE = """\
{% for message in messages %}
{%- set whole = message.content is string %}
{%- set parts = [{'type': 'text', 'text': message.content}] if whole else message.content %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- for part in parts if part.type == 'image' %}{{ '<image>' + ('\\n' if loop.last else '') }}{% endfor %}
{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join + '<|im_end|>' %}
{%- if message.role == 'assistant' %}{% generation %}{{ text }}{% endgeneration %}
{%- else %}{{ text }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WARMUP = 10  # steps, when --warmup_steps is not given
QUESTIONS = (".jsonl", ".ndjson")  # files of them that --predict takes
# settings of the training that --predict goes by, unless they are given
ASKED_WITH = ("frames", "fps", "max_frames", "max_pixels", "max_new_tokens")
SHUFFLES = ("in order", "shuffled", "reversed", "blanked")  # how frames are shown in an evaluation
# wrong in a mirror
SIDES = set("left right leftwards rightwards clockwise counterclockwise anticlockwise".split())
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on clips made on the spot: minutes on 2 CPU cores, no network
    check: Free[bool] = False  # all checks and the plan, no training
    output_dir: Free[Path] = Path("runs/llava_vtt")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    # JSON, JSON lines, CSV, TSV or parquet of videos, questions and answers, or a folder
    manifest: Free[Annotated[Path | None, tyro.conf.arg(aliases=["--video_dir"])]] = None
    dataset: Free[str] = ""  # of the Hub, ID[:config][:split], or a folder
    videos: Free[Path | None] = None  # folder of the videos; default: the manifest's
    frames: int = 5  # per clip, spread evenly over the video
    fps: float = 0.0  # frames per second instead, of long clips at most --max_frames
    max_frames: int = 64
    max_pixels: int = 200_704  # of a frame, for models that take any shape; 448x448
    question: str = ""  # of --predict; and what a caption answers where the data ask nothing
    max_turns: int = 8  # questions of one clip in one sequence
    val_fraction: float = 0.1  # share of the videos held out, unless the data set has such a split
    augment: bool = False  # crop, brightness and contrast, the same for all frames of a clip
    augment_flip: bool = False  # also mirror clips; off by default, for it makes left and right wrong
    curriculum: bool = False  # three stages, each with those before it: answers below 10 words, below 20, all
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Free[Path] = Path("cache")  # decoded frames, downloads
    cache_features: Free[bool] = False  # keep what the frozen tower makes of the frames on disk too
    streaming: Free[bool] = False  # remove what was downloaded once it is decoded: for what no disk holds
    num_workers: Free[int] = 0  # threads that decode; 0: one for each core that is this rank's

    # model

    # a VLM, Hub id or folder; default: LLaVA-interleave 7B, for --predict <output_dir>/model; with --demo
    # llava or qwen3_vl
    model: str = ""
    attn: Free[Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]] = "sdpa"  # attention kernel
    compile: Free[bool] = False  # torch.compile the decoder layers; needs a C++ compiler
    lora_r: int = 16  # rank; 0: full fine-tuning
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: str = "all"  # linear layers of the language model, or names of some: q_proj,v_proj
    train_projector: bool = (
        True  # what lies between tower and language model; vLLM serves adapters without it
    )
    train_vision: bool = False  # the vision tower too
    load_in_4bit: bool = False  # QLoRA: frozen weights in 4 bits; needs a GPU and bitsandbytes
    gradient_checkpointing: Free[Literal["auto", "on", "off"]] = "auto"  # auto: when it does not fit without

    # optimisation

    steps: Free[int] = 0  # optimizer steps in all, over all resumes; 0: as many as --epochs are
    epochs: Free[float] = 3.0  # passes over the training clips
    batch_size: Lower[int] = 1  # clips per GPU per micro-step; lower this first when memory runs out
    accum: Lower[int] = 4  # micro-steps per optimizer step
    lr: Free[float] = 1e-4  # with --lora_r 0 take 1e-5
    warmup_steps: Free[int | None] = None  # default: 10, but at most a tenth of the steps
    lr_decay: bool = True  # to 0 at the last step, along a cosine
    weight_decay: float = 0.0
    beta2: float = 0.999  # of AdamW
    clip: Free[float] = 1.0  # gradient norm limit
    # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    # JSON file, or auto: what fits
    deepspeed: Free[Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])]] = "auto"

    # asking

    # path or URL of a video: answer --question about it with --model and stop; or a file of JSON lines with
    # video and question
    predict: Free[str] = ""
    max_new_tokens: Free[int] = 64  # longest answer
    eval_questions: Free[int] = 64  # of the held-out part, always the same

    # watching and saving

    log_every: Free[int] = 10
    eval_every: Free[int] = 200
    save_every: Free[int] = 100
    keep: Free[int] = 2  # newest checkpoints kept
    resume: Free[bool] = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Free[Literal["none", "tensorboard", "wandb"]] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: Free[bool] = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: Free[str] = "llava_vtt"
    hub_dataset_id: Free[str] = "llava_vtt_data"  # the data set is pushed too, unless it came from the Hub
    push_videos: Free[bool] = False  # with the video files, not their names alone
    adapter_only: Free[bool] = False  # model/ is the LoRA adapter, small; default: the model with it merged
    public: Free[bool] = False  # visibility of new repositories

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="frames max_frames max_pixels max_turns batch_size accum max_new_tokens "
            "eval_questions log_every eval_every save_every keep",
            at_least_0="steps fps lora_r warmup_steps num_workers",
            above_0="lr clip epochs lora_alpha",
            shares="val_fraction lora_dropout max_bad",
        )
        if self.predict and not self.question and Path(self.predict).suffix.lower() not in QUESTIONS:
            raise ValueError(f"--predict {self.predict}: what is to be asked? Give --question")
        if self.augment_flip and not self.augment:
            raise ValueError("--augment_flip: is part of --augment; give both")
        if self.cache_features and (self.augment or self.train_vision or self.demo):
            other = "augment" if self.augment else "train_vision" if self.train_vision else "demo"
            raise ValueError(f"--cache_features: the tower's output changes with --{other}; leave one out")
        if self.adapter_only and not self.lora_r:
            raise ValueError("--adapter_only: there is no adapter with --lora_r 0; leave it out")
        if self.demo and self.fps:
            raise ValueError(f"--fps {self.fps}: the demo draws its frames; give --frames")
        if self.load_in_4bit and not torch.cuda.is_available():
            raise ValueError("--load_in_4bit: needs a GPU; leave it out to debug on a CPU")
        if self.load_in_4bit and not importlib.util.find_spec("bitsandbytes"):
            raise ValueError("--load_in_4bit: pip install bitsandbytes")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError(
                "--load_in_4bit: such weights cannot be trained; give --lora_r 16, or leave it out"
            )

    @property
    def how_many(self) -> int | Pace:
        return Pace(self.fps, self.max_frames) if self.fps else self.frames


# A preset: the same code with other numbers. Recipe and scores: README.md and benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/llava_vtt_demo"), report_to="none", lora_r=0, train_vision=True,
    steps=3500, batch_size=16, accum=1, lr=1.4e-3, warmup_steps=50, weight_decay=0.05, beta2=0.98,
    max_new_tokens=8, eval_questions=500, log_every=100, eval_every=1000, save_every=1000,
)  # fmt: skip

# ---------------------------------------------------------------------------
# Data: videos and questions
# ---------------------------------------------------------------------------

Talk = tuple[QA, ...]  # a conversation: a question, its answer, and what was asked after it


def talks_of(texts: list[QA]) -> list[Talk]:
    """The questions of a clip, those of one conversation together and in their order"""
    talks: list[list[QA]] = []
    for qa in texts:
        if not (qa.follows and talks):
            talks.append([])
        talks[-1].append(qa)
    return [tuple(talk) for talk in talks]


@on_rank0
def read_clips(cfg: Config, special: list[str]) -> tuple[list[Row], list[dict]]:
    """-> (a clip for each video, with all its questions, bad samples)"""

    def check_text(texts: list[QA]) -> None:
        inside = [token for qa in texts for text in qa[:2] for token in special if token in text]
        if inside:
            raise BadSample(f"the special token {inside[0]} inside the text")

    rows, bad = read_data(cfg, "answer", check=check_text)
    for row in rows if cfg.augment_flip else ():
        if SIDES & set(words(" ".join(f"{qa.question} {qa.answer}" for qa in row.texts))):
            refuse(
                f"--augment_flip: a mirrored clip makes left and right wrong, and {row.where} asks for them; "
                "leave it out"
            )
    return rows, bad


class Footage(NamedTuple):
    frames: np.ndarray  # uint8 (F, H, W, 3)
    times: np.ndarray  # (F,) seconds
    features: Tensor | None = None  # what the tower makes of them, instead of the frames


@dataclass(frozen=True)
class Sample:
    """One training sequence: the frames once, then conversations about them."""

    # a .npy file of uint8 (F, H, W, 3) and its times, or a Scene of demos/scenes.py to draw
    frames: Path | Any
    talks: tuple[Talk, ...]
    where: str = ""
    features: Path | None = None  # with --cache_features

    @property
    def qa(self) -> list[QA]:
        return [qa for talk in self.talks for qa in talk]

    def load(self, frames: int) -> Footage:
        if not isinstance(self.frames, Path):
            return Footage(self.frames.draw(frames), np.arange(frames, dtype=float))
        with self.frames.open("rb") as file:
            return Footage(np.load(file), np.load(file))

    def contents(self) -> tuple:
        """What makes it, wherever its file lies: the questions, and of each frame one row of pixels"""
        if not isinstance(self.frames, Path):
            return self.frames, self.talks
        pixels = np.load(self.frames, mmap_mode="r")
        return zlib.crc32(pixels[:, pixels.shape[1] // 2].tobytes()), self.talks


@dataclass(frozen=True)
class Data:
    train: list[Sample]
    held_out: list[Sample]  # to evaluate on; the same as train when there is one video alone
    bad: list[dict]  # samples that were left out, and why
    # of both parts, for the data set that is pushed
    clips: tuple[list[Row], list[Row]] = ((), ())


def generated_data(cfg: Config) -> Data:
    """What the demo trains on."""
    scenes = demo_module("scenes")

    def sample(scene: Any) -> Sample:
        return Sample(scene, tuple((QA(*asked),) for asked in scenes.questions_of(scene)))

    steps = cfg.steps or DEMO["steps"]
    train = scenes.draw_scenes(cfg.seed, steps * cfg.batch_size * cfg.accum)
    held_out = scenes.draw_scenes(cfg.seed + 1_000_003, scenes.NUM_HELD_OUT)
    return Data([sample(scene) for scene in train], [sample(scene) for scene in held_out], bad=[])


def load_data(cfg: Config, base: Base) -> Data:
    """Every rank. Exit 2 when there is nothing to train on."""
    if cfg.demo:
        return generated_data(cfg)
    clips, bad = read_clips(cfg, base.special)
    clips, files, undecoded = decode_rows(clips, cfg.how_many, base.size, cfg, base.crop)
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    videos, splits = [clip.video for clip in clips], [clip.split for clip in clips]
    parts = split_clips(videos, splits, cfg.val_fraction, cfg.seed)
    for part, indices in zip(samples, parts):
        for i in indices:
            for talks in sequences_of(talks_of(clips[i].texts), cfg.max_turns if base.branches else 1):
                part.append(Sample(files[i], talks, clips[i].where + clips[i].part))
    train, held_out = samples
    if not train:
        refuse("every video is in the held-out split: there is none to train on")
    return Data(train, held_out or train, bad + undecoded, tuple([clips[i] for i in part] for part in parts))


def sequences_of(talks: list[Talk], most: int) -> list[tuple[Talk, ...]]:
    """The conversations that share a sequence, with up to `most` questions in it; none is cut"""
    together: list[list[Talk]] = []
    for talk in talks:
        if together and sum(map(len, together[-1])) + len(talk) <= most:
            together[-1].append(talk)
        else:
            together.append([talk])
    return [tuple(sequence) for sequence in together]


def rearrange_frames(clip: np.ndarray, how: str, seed: int) -> np.ndarray:
    """uint8 (F, H, W, 3) -> the same frames in order, shuffled, reversed, or all black"""
    if how == "shuffled":
        rng, order = np.random.default_rng(seed), np.arange(len(clip))
        while len(clip) > 1 and (order == np.arange(len(clip))).all():
            order = rng.permutation(len(clip))
        return clip[order]
    return clip[::-1] if how == "reversed" else np.zeros_like(clip) if how == "blanked" else clip


def augmented(clip: np.ndarray, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """uint8 (F, H, W, 3): one crop (85 to 100 % of a side), brightness, contrast and flip for all frames."""
    import cv2

    height, width = clip.shape[1:3]
    share, place = rng.uniform(0.85, 1), rng.uniform(0, 1, 2)
    h, w = round(height * share), round(width * share)
    top, left = round((height - h) * place[0]), round((width - w) * place[1])
    cropped = clip[:, top : top + h, left : left + w]
    clip = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in cropped])
    contrast, brightness, mirrored = rng.uniform(0.85, 1.15), rng.uniform(-20, 20), rng.random() < 0.5
    clip = np.clip((clip - 127.5) * contrast + 127.5 + brightness, 0, 255).round().astype(np.uint8)
    return clip[:, :, ::-1] if flip and mirrored else clip


# ---------------------------------------------------------------------------
# Model: what it is called and how it is spoken to
# ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Base:
    """The model that is trained, all but its weights."""

    source: str  # Hub id or folder
    folder: Path  # where its files lie
    config: Any
    processor: Any
    skeleton: nn.Module  # of its class, on the meta device
    video: bool  # whether it takes videos; else each frame is an image
    size: int | AtMost  # height and width of its pictures, or how many pixels; as decode_rows wants it
    crop: bool  # whether other shapes are cropped to a square, or squeezed
    special: list[str]  # tokens that a text must not hold
    branches: bool  # whether several questions can share the frames
    gap: str = ""  # the blanks before an answer, where one is asked for
    after: str = ""  # the token of the last place of the frames, and what the processor puts after it
    frame: str = ""  # what the template puts around the mark, where the processor puts it around each frame

    @property
    def mark(self) -> str:
        """What stands for a video, or an image, in a text"""
        return self.processor.video_token if self.video else self.processor.image_token

    @property
    def marks(self) -> list[int]:
        """The tokens whose places the features take"""
        names = ("image_token_id", "video_token_id")
        return [i for i in (getattr(self.processor, name, None) for name in names) if i is not None]


def open_base(source: str, max_pixels: int, attn: str = "sdpa") -> Base:
    """Rank 0 fetches config and processor, every rank opens them. Exit 2 for what is no VLM, or cannot be
    asked about frames."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving, on each rank
    folder = on_rank0(fetch_model)(source, "*.json", "*.jinja", "*.txt", "tokenizer.model")
    refuse_adapter(source, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
        processor = AutoProcessor.from_pretrained(folder)
    # an ImportError names the package that a processor needs, or a kernel of attention
    except (OSError, ValueError, KeyError, ImportError) as error:
        refuse(f"--model {source}: {brief(error)}")
    tokenizer = getattr(processor, "tokenizer", None)
    videos = getattr(processor, "video_processor", None)
    video = videos is not None and bool(getattr(processor, "video_token", None))
    if tokenizer is None or not (video or getattr(processor, "image_token", None)):
        refuse(f"--model {source}: its {type(processor).__name__} has no placeholder for a video or an image")
    if config.model_type == "llava" and "<|im_end|>" in tokenizer.get_vocab():
        processor.chat_template = TEMPLATE
    if not processor.chat_template:
        refuse(f"--model {source}: it has no chat template; take the instruct model of its kind")
    pictures = videos if video else processor.image_processor
    crop = bool(getattr(pictures, "do_center_crop", False))
    square = dict((pictures.crop_size if crop else pictures.size) or {})
    fixed = "height" in square and not hasattr(pictures, "image_grid_pinpoints")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    # others have masks of their own, which ours would replace
    branches = kinds == {"full_attention"} and "token_type_ids" not in processor.model_input_names
    branches &= attn != "flash_attention_2"
    size, special = square["height"] if fixed else AtMost(max_pixels), sorted(filter(None, special))
    return spoken_to(Base(source, folder, config, processor, skeleton, video, size, crop, special, branches))


def chat_text(base: Base, asked: list[str], said: list[str], frames: int) -> str:
    """A conversation as the model's own template has it: the frames, the questions and the answers, the last
    of which may be still to come."""
    messages: list[dict] = []
    for number, question in enumerate(asked):
        media = [] if number else [{"type": "video"}] if base.video else [{"type": "image"}] * frames
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        answer = [{"type": "text", "text": text} for text in said[number : number + 1]]
        messages += [{"role": "assistant", "content": answer}] if answer else []
    open_ended = len(said) < len(asked)
    text = base.processor.apply_chat_template(messages, add_generation_prompt=open_ended, tokenize=False)
    return text.replace(base.frame, base.mark) if base.frame else text


def spoken_to(base: Base) -> Base:
    """Base with `gap`, `after` and `frame`. Exit 2 for a template that does not show the frames and each
    answer once, or puts something else before one that is there than before one to come (thinking)."""
    from jinja2 import TemplateError

    try:
        pieces = around_answers(base, ["What?", "Why?"], 2)
        prompt = chat_text(base, ["What?"], [], 2)
    # what its expressions may raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        refuse(f"--model {base.source}: its chat template cannot be used: {brief(error)}")
    if len(pieces) != 3 or base.mark not in pieces[0]:
        refuse(f"--model {base.source}: its chat template does not show the frames and every answer")
    before, wanted = pieces[0].rstrip(), prompt.rstrip()
    if before != wanted:
        shown = f"{before[-40:]!r} before an answer and {wanted[-40:]!r} where one is asked for"
        refuse(f"--model {base.source}: its chat template has {shown}; take the instruct model of its kind")
    side = base.size if isinstance(base.size, int) else 64
    black = Footage(np.zeros((2, side, side, 3), np.uint8), np.arange(2))
    ids = processed(base, [prompt.partition(base.mark)[0] + base.mark * (1 if base.video else 2)], [black])
    ids = ids["input_ids"][0].tolist()
    decode = base.processor.tokenizer.decode
    # Qwen3-VL was trained with one pair around each frame, and none around them all
    begin, end = (getattr(base.processor, f"vision_{what}_token", "") for what in ("start", "end"))
    frame = begin + base.mark + end if begin and decode(ids).count(begin) > prompt.count(begin) else ""
    return dataclasses.replace(
        base, gap=prompt[len(wanted) :], after=decode(ids[last_place(ids, base) :]), frame=frame
    )


def last_place(ids: list[int], base: Base) -> int:
    """The index of the last token that stands for a part of the frames. Raises ValueError without one."""
    marks = base.marks
    for i in reversed(range(len(ids))):  # from the end, where it is
        if ids[i] in marks:
            return i
    raise ValueError(f"{type(base.processor).__name__} made no image tokens of the frames")


def end_of_answer(base: Base) -> int:
    """The token that the loss teaches to end an answer with"""
    return encode_talk((QA("What?", "This."),), 1, base).labels[-1]


def around_answers(base: Base, asked: list[str], frames: int) -> list[str]:
    """What the template puts before, between and after the answers. The blanks before one are those of the
    prompt (LLaVA's own templates have a blank more), or where that has none the answer's (SmolVLM)."""
    slots = [f"\ue000{i}\ue001" for i in range(len(asked))]  # for private use: in no text
    *before, last = re.split("\ue000\\d+\ue001", chat_text(base, asked, slots, frames))
    return [piece.rstrip() + base.gap if base.gap else piece for piece in before] + [last]


class Tokens(NamedTuple):
    head: str  # text up to the frames; the processor expands the placeholders in it
    ids: list[int]  # what comes after the last place of the frames
    labels: list[int]  # -100 but for answers and what ends them


def encode_talk(talk: Talk, frames: int, base: Base) -> Tokens:
    """A conversation about `frames` frames as tokens. An answer's end is the special token that the template
    puts after it; where it has none, the tokenizer's eos_token."""
    pieces = around_answers(base, [qa.question for qa in talk], frames)
    end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, base.special))})")
    at = pieces[0].rindex(base.mark) + len(base.mark)
    # with the token before it, for some tokenizers see the first word of a text with other eyes
    text, spans = base.after + pieces[0][at:], []
    for qa, piece in zip(talk, pieces[1:]):
        end = end_of_turn.match(piece)
        ending = end[0] if end else base.processor.tokenizer.eos_token
        begin = len(text if base.gap else text.rstrip())
        text += qa.answer + ending
        spans.append((begin, len(text)))
        text += piece[end.end() :] if end else piece
    return encoded(base, pieces[0][:at], text[: spans[-1][1]], spans)


def encode_prompt(question: str, frames: int, base: Base) -> Tokens:
    text = chat_text(base, [question], [], frames)
    at = text.rindex(base.mark) + len(base.mark)
    return encoded(base, text[:at], base.after + text[at:], [])


def encoded(base: Base, head: str, text: str, spans: list[tuple[int, int]]) -> Tokens:
    """`text`, which begins with the token of the last place, supervised in these spans of letters"""
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    tokens = base.processor.tokenizer(text, **options)
    ids, places = tokens["input_ids"][1:], tokens["offset_mapping"][1:]
    answers = [any(a < end and b > begin for begin, end in spans) for a, b in places]
    return Tokens(head, ids, [token if answer else -100 for token, answer in zip(ids, answers)])


def processed(base: Base, heads: list[str], clips: list[Footage]) -> dict[str, Tensor]:
    """What the model's processor makes of clips and the text up to them: input_ids and attention_mask (B, T),
    and whatever else the class takes"""
    from transformers.video_utils import VideoMetadata

    begin = base.processor.tokenizer.bos_token
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
    options["add_special_tokens"] = not (begin and heads[0].startswith(begin))
    if isinstance(base.size, int):
        options |= {"do_resize": False} | ({"do_center_crop": False} if base.crop else {})
    if not base.video:
        return dict(base.processor(images=[list(clip.frames) for clip in clips], text=heads, **options))
    about = []
    for clip in clips:
        stamps = [round(1000 * second) for second in clip.times]  # a clock of milliseconds
        gap = stamps[-1] / (len(stamps) - 1) if len(stamps) > 1 else 1000
        length = round(stamps[-1] + gap)
        about.append(VideoMetadata(length, 1000, duration=stamps[-1] / 1000, frames_indices=stamps))
    options |= {"video_metadata": about, "do_sample_frames": False}
    videos = [np.ascontiguousarray(clip.frames) for clip in clips]  # torch takes no reversed view
    return dict(base.processor(videos=videos, text=heads, **options))


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------

Stages = list[list[Sample]]  # of --curriculum, or one


def stages_of(samples: list[Sample], by_length: bool) -> Stages:
    """The samples of each stage, of equal numbers of steps: conversations with answers below 10 words, below
    20, all. A stage that is empty or adds nothing is left out."""
    stages: Stages = []
    for limit in (10, 20, math.inf) if by_length else (math.inf,):
        stage = []
        for sample in samples:
            short = (talk for talk in sample.talks if all(len(words(qa.answer)) < limit for qa in talk))
            if talks := sample.talks if limit == math.inf else tuple(short):
                stage.append(dataclasses.replace(sample, talks=talks))
        if stage and stage not in stages:
            stages.append(stage)
    return stages


class VideoCollator:
    """Clips and conversations -> a batch: input_ids and labels (B, T), what the class takes of the frames,
    and attention_mask (B, T); or, where several conversations share a clip, branch (B, T) and position_ids.

    A sequence is the text up to the frames, which all share, and then the conversations, branches that do not
    see each other: branch is 0 before them, 1, 2, ... in them, -1 in padding, and each goes on with the
    position after the frames, as if it were the only one.
    """

    def __init__(self, base: Base, cfg: Config) -> None:
        self.base, self.cfg = base, cfg
        self.lock = threading.RLock()  # a tokenizer works for one thread at a time
        self.talk = lru_cache(maxsize=1 << 16)(partial(encode_talk, base=base))
        self.blank = lru_cache(maxsize=1 << 10)(self.look)

    def look(self, head: str, shape: tuple[int, ...], times: tuple[float, ...] = ()) -> dict[str, Tensor]:
        """What the processor makes of a clip of this shape, whatever it shows"""
        black = Footage(np.zeros(shape, np.uint8), np.array(times or range(shape[0]), float))
        return processed(self.base, [head], [black])

    def looked(self, heads: list[str], clips: list[Footage]) -> dict[str, Tensor]:
        """`processed`, or where the tower's output is known already as if, with ones for pixels"""
        if clips[0].features is None:
            return processed(self.base, heads, clips)
        each = [self.blank(head, clip.frames.shape, tuple(clip.times)) for head, clip in zip(heads, clips)]
        inputs = {}
        for name, value in each[0].items():
            values = [one[name] for one in each]
            if value.is_floating_point():
                shape = sum(map(len, values)), *value.shape[1:]
                inputs[name] = torch.ones((), dtype=value.dtype).expand(shape)
            elif value.shape == each[0]["input_ids"].shape:
                inputs[name] = pad([one[0].tolist() for one in values], 0)
            else:
                inputs[name] = torch.cat(values)
        return inputs | {"features": torch.cat([clip.features for clip in clips])}

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """(rows, B, T) of the text up to the frames: three rows where the class counts in time, height and
        width"""
        rope = getattr(self.base.skeleton.model, "get_rope_index", None)
        if rope is None:
            return torch.arange(inputs["input_ids"].shape[1]).expand(1, *inputs["input_ids"].shape)
        wanted = "input_ids attention_mask mm_token_type_ids image_grid_thw video_grid_thw second_per_grid_ts"
        return rope(**{name: inputs[name] for name in wanted.split() if name in inputs})[0]

    def __call__(self, batch: list[tuple[Footage, tuple[Talk, ...]]]) -> dict[str, Tensor]:
        with self.lock:
            encoded = [[self.talk(talk, len(clip.frames)) for talk in talks] for clip, talks in batch]
            return self.join([clip for clip, _ in batch], encoded)

    def ask(self, items: list[tuple[Footage, str]]) -> dict[str, Tensor]:
        """Questions about clips, to be answered: padded on the left"""
        with self.lock:
            encoded = [[encode_prompt(question, len(clip.frames), self.base)] for clip, question in items]
            return self.join([clip for clip, _ in items], encoded, left=True)

    def join(
        self, clips: list[Footage], encoded: list[list[Tokens]], left: bool = False
    ) -> dict[str, Tensor]:
        """`left`: padded there. Raises ValueError when a clip has no place in its text."""
        inputs = self.looked([own[0].head for own in encoded], clips)
        shape, rows = inputs["input_ids"].shape, inputs["input_ids"].tolist()
        lengths = [last_place(row, self.base) + 1 for row in rows]
        starts = [row[:n] for row, n in zip(rows, lengths)]
        ids = [start + [i for one in own for i in one.ids] for start, own in zip(starts, encoded)]
        labels = [[-100] * n + [i for one in own for i in one.labels] for n, own in zip(lengths, encoded)]
        joined = {
            "input_ids": pad(ids, self.base.processor.tokenizer.pad_token_id or 0, left),
            "labels": pad(labels, -100, left),
        }
        if any(len(own) > 1 for own in encoded):
            positions, rows, branches = self.positions(inputs), [], []
            for i, (n, own) in enumerate(zip(lengths, encoded)):
                begin = int(positions[:, i, :n].max()) + 1
                steps = [begin + step for one in own for step in range(len(one.ids))]
                rows.append([row[i, :n].tolist() + steps for row in positions])
                branches.append([0] * n + [b for b, one in enumerate(own, 1) for _ in one.ids])
            by_axis = [pad(list(axis), 0) for axis in zip(*rows)]
            joined["position_ids"] = torch.stack(by_axis) if len(by_axis) > 1 else by_axis[0]
            joined["branch"] = pad(branches, -1)
        else:
            joined["attention_mask"] = pad([[1] * len(row) for row in ids], 0, left)
        for name, value in inputs.items():
            if name in joined or name == "attention_mask":
                continue
            if value.shape == shape:  # of tokens: after the frames comes text
                rest = [len(row) - n for row, n in zip(ids, lengths)]
                rows = [value[i, :n].tolist() + [0] * more for i, (n, more) in enumerate(zip(lengths, rest))]
                joined[name] = pad(rows, 0, left)
            else:
                kind = TORCH_DTYPES[self.cfg.dtype] if value.is_floating_point() else value.dtype
                joined[name] = value.to(kind)
        return joined

    def lengths(self, sample: Sample) -> tuple[int, int, int]:
        """Tokens of its sequence, those supervised, and those of the frames, without a look at the frames"""
        head, own = self.seen(sample, self.shape_of(sample))
        visual = sum(map(head.count, self.base.marks))
        supervised = sum(label >= 0 for one in own for label in one.labels)
        return len(head) + sum(len(one.ids) for one in own), supervised, visual

    def shape_of(self, sample: Sample) -> tuple[int, ...]:
        """(F, H, W, 3) of its frames, which are read only where they may differ from clip to clip"""
        if isinstance(sample.frames, Path) and (self.cfg.fps or not isinstance(self.base.size, int)):
            return np.load(sample.frames, mmap_mode="r").shape
        if isinstance(sample.frames, Path):
            return self.cfg.frames, self.base.size, self.base.size, 3
        return sample.frames.draw(self.cfg.frames).shape

    def seen(
        self, sample: Sample, shape: tuple[int, ...], times: tuple[float, ...] = ()
    ) -> tuple[list[int], list[Tokens]]:
        """-> (the tokens up to the frames, its conversations)"""
        own = [self.talk(talk, shape[0]) for talk in sample.talks]
        head = self.blank(own[0].head, shape, times)["input_ids"][0].tolist()
        return head[: last_place(head, self.base) + 1], own

    def told(self, sample: Sample) -> str:
        """For people: the text of its sequence, with the tokens of the frames counted"""
        clip = sample.load(self.cfg.frames)
        head, own = self.seen(sample, clip.frames.shape, tuple(clip.times))
        decode = self.base.processor.tokenizer.decode
        text = decode(head) + "  |  ".join(decode(one.ids) for one in own)
        for mark in map(decode, self.base.marks):
            text = re.sub(f"({re.escape(mark)})+", lambda r, m=mark: f"{m} x {len(r[0]) // len(m)}", text)
        return text


def get_batch(stages: Stages, collate: VideoCollator, cfg: Config, micro_step: int) -> dict[str, Tensor]:
    """This rank's batch at a micro-step: a pure function of (seed, micro-step, rank), so that a resumed run
    repeats the order."""
    per_stage = -(-cfg.steps * cfg.accum // len(stages))
    stage, micro_step = divmod(micro_step, per_stage)
    samples, batch = stages[stage], []
    first = (micro_step * world_size() + rank()) * cfg.batch_size
    for place in range(first, first + cfg.batch_size):
        epoch, i = divmod(place, len(samples))
        sample = samples[epoch_order(len(samples), cfg.seed + stage, epoch)[i]]
        clip = cached_clip(sample) if sample.features else sample.load(cfg.frames)
        if cfg.augment:
            rng = np.random.default_rng([cfg.seed, stage, place])
            clip = clip._replace(frames=augmented(clip.frames, rng, cfg.augment_flip))
        batch.append((clip, sample.talks))
    return collate(batch)


# ---------------------------------------------------------------------------
# Model: its weights, and which of them are trained
# ---------------------------------------------------------------------------


class Parts(NamedTuple):
    """Names of modules, as the class has them"""

    language: str
    tower: str
    projector: list[str]  # what lies between the two


def module_names(model: nn.Module) -> Parts:
    names = {module: name for name, module in model.named_modules()}
    language, tower = names[model.get_decoder()], names[model.get_encoder("image")]
    around = model.base_model_prefix
    beside = [f"{around}.{name}" for name, _ in getattr(model, around).named_children()]
    projector = [name for name in beside if name not in (language, tower)]
    if not projector:  # Qwen's tower ends in it, and has more of them on its way (deepstack)
        inside = [name for name in names.values() if name.startswith(f"{tower}.")]
        projector = [name for name in inside if re.search(r"\.(merger|deepstack_merger_list\.\d+)$", name)]
    return Parts(language, tower, projector)


def trained_whole(parts: Parts, cfg: Config) -> list[str]:
    """What is trained without LoRA beside it; what lies inside another is part of that."""
    projector = parts.projector if cfg.train_projector else []
    if not cfg.train_vision:
        return projector
    return [parts.tower, *(name for name in projector if not name.startswith(f"{parts.tower}."))]


def adapter_config(model: nn.Module, cfg: Config):
    """Exit 2 for --lora_targets that the language model does not have."""
    from peft import LoraConfig

    parts = module_names(model)
    language = model.get_submodule(parts.language)
    linear = {name.split(".")[-1] for name, m in language.named_modules() if isinstance(m, nn.Linear)}
    targets = sorted(linear) if cfg.lora_targets == "all" else cfg.lora_targets.split(",")
    if wrong := [name for name in targets if name not in linear]:
        refuse(
            f"--lora_targets {wrong[0]}: no such layer; the language model has {', '.join(sorted(linear))}"
        )
    return LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        task_type="CAUSAL_LM",
        target_modules=rf"{re.escape(parts.language)}\..*\.({'|'.join(targets)})",
        modules_to_save=trained_whole(parts, cfg) or None,
    )


def load_vlm(folder: Path, base: Base, cfg: Config):
    """Weights of a folder into the class of its config; one that is missing or unexpected is an error."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    kind, parts = TORCH_DTYPES[cfg.dtype], module_names(base.skeleton)
    in_4bit = None
    if cfg.load_in_4bit:
        in_4bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind,
            bnb_4bit_quant_storage=kind,
            llm_int8_skip_modules=[parts.tower, *parts.projector, "lm_head"],
        )
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=kind,
        attn_implementation=cfg.attn,
        quantization_config=in_4bit,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_loaded ends the run, and names them
        local_files_only=True,
    )
    check_loaded(loading, folder)
    tokenizer = base.processor.tokenizer
    # what the loss teaches to end an answer with must end it everywhere
    end = end_of_answer(base)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    model.generation_config.eos_token_id = ends + [end] if end not in ends else ends
    if not model.generation_config.do_sample:  # saving refuses what only sampling has
        model.generation_config.update(temperature=None, top_p=None, top_k=None)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def choose_trained(model: nn.Module, cfg: Config) -> nn.Module:
    """-> the model in training mode, with LoRA where that is asked for; what is not trained is frozen, and in
    the mode of use: no dropout."""
    parts = module_names(model)
    tower, projector = model.get_submodule(parts.tower), map(model.get_submodule, parts.projector)
    model.requires_grad_(not cfg.lora_r).train()
    tower.requires_grad_(cfg.train_vision).train(cfg.train_vision)
    for module in projector:
        module.requires_grad_(cfg.train_projector).train(cfg.train_projector)
    if not cfg.lora_r:
        return model
    from peft import get_peft_model

    # DeepSpeed keeps fp32 weights of what it trains
    return get_peft_model(model, adapter_config(model, cfg), autocast_adapter_dtype=False)


def inner_vlm(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def outside_forward(inner: nn.Module) -> Any:
    """Inside, what encodes the frames may be called by itself, as generate() does it, also under ZeRO-3,
    which gathers a module's weights (image_newline) for its forward alone."""
    return gathered(list(getattr(inner, inner.base_model_prefix).parameters(recurse=False)))


# ---------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------


def branch_mask(branch: Tensor, attn: str, dtype: torch.dtype) -> Any:
    """branch (B, T) as VideoCollator makes it -> who sees whom, (B, 1, T, T): what came before and is of the
    own branch, or before all of them; as this kernel of attention wants it"""

    def sees(b: Any, _: Any, q: Any, k: Any) -> Tensor:
        return (k <= q) & ((branch[b, k] == branch[b, q]) | (branch[b, k] == 0))

    batch, length = branch.shape
    if attn == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, batch, None, length, length, device=branch.device)
    at = torch.arange(length, device=branch.device)
    seen = sees(torch.arange(batch, device=branch.device)[:, None, None], None, at[:, None], at)[:, None]
    # to be added, as SDPA would make it of a mask of booleans anew in each layer
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def supervised_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(cross-entropy summed over the supervised tokens, their number). The head runs on the positions that
    any sequence of the micro-batch supervises, and not on thousands of image tokens: 2.2 GB less at 5 frames
    of 729 tokens and 152,000 words."""
    # also right where a branch ends and another begins, for a branch begins with a question
    labels = batch["labels"][:, 1:]
    positions = (labels != -100).any(0).nonzero()[:, 0]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "branch", "features")}
    inner = inner_vlm(getattr(model, "module", model))  # inside DeepSpeed's engine, and PEFT's wrapping
    if "branch" in batch:
        attn = inner.config.get_text_config()._attn_implementation
        inputs["attention_mask"] = branch_mask(batch["branch"], attn, inner.dtype)
    known = fed(inner, batch["features"]) if "features" in batch else contextlib.nullcontext()
    with known:
        # (B, positions, vocabulary)
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    wanted = labels[:, positions].flatten()
    loss = F.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


# ---------------------------------------------------------------------------
# What the frozen tower makes of the frames, kept on disk
# ---------------------------------------------------------------------------


def check_cacheable(base: Base) -> None:
    """Exit 2 for a class whose projector is part of its tower."""
    tower, projector = module_names(base.skeleton)[1:]
    if len(projector) != 1 or projector[0].startswith(f"{tower}."):
        has = f"{type(base.skeleton).__name__} has {', '.join(projector) or 'nothing'}"
        refuse(f"--cache_features: {has} where one projector, outside of {tower}, is wanted; leave it out")


def with_features(cfg: Config, base: Base, samples: list[Sample]) -> list[Sample]:
    """The samples with the files of the cache for what enters the projector, by frames, weights and dtype"""
    weights = ((path.resolve(), path.stat()) for path in sorted(base.folder.glob("*.safetensors")))
    made_by = [f"{path}|{stat.st_size}|{stat.st_mtime_ns}" for path, stat in weights]
    made_by += [cfg.dtype, cfg.attn, str(base.processor)]

    def file_of(frames: Path) -> Path:
        digest = digest_of("|".join([*made_by, frames.name]))
        return cfg.cache_dir / "features" / digest[:2] / f"{digest}.safetensors"

    return [dataclasses.replace(sample, features=file_of(sample.frames)) for sample in samples]


def keep_features(model: nn.Module, collate: VideoCollator, samples: list[Sample]) -> None:
    """Every rank, with the weights: make what is missing, and see what the tower's output looks like."""
    from safetensors.torch import save_file

    inner = inner_vlm(model)
    paths = {sample.features: sample for sample in samples}
    todo = [sample for path, sample in paths.items() if not path.exists()]
    todo = on_rank0(lambda: todo)()  # of one disk, or of rank 0's: made by all in step
    with evaluating(inner):
        for (i,) in rounds(max(1, len(todo)), 1):
            sample = todo[i] if todo else samples[0]
            features = tower_output(inner, collate, sample.load(collate.cfg.frames))
            if not sample.features.exists():
                sample.features.parent.mkdir(parents=True, exist_ok=True)
                write_whole(sample.features, lambda aside, t=features: save_file({"features": t}, aside))
    barrier()


@torch.no_grad()
def tower_output(inner: nn.Module, collate: VideoCollator, clip: Footage) -> Tensor:
    """What enters the projector, on the CPU; inner.tower_form keeps the form of the tower's own output"""
    parts, caught = module_names(inner), []
    tower, projector = inner.get_submodule(parts.tower), inner.get_submodule(parts.projector[0])
    device = next(inner.parameters()).device
    head = collate.talk((QA("What?", "This."),), len(clip.frames)).head
    inputs = {name: value.to(device) for name, value in processed(collate.base, [head], [clip]).items()}
    kind = TORCH_DTYPES[collate.cfg.dtype]
    inputs = {name: v.to(kind) if v.is_floating_point() else v for name, v in inputs.items()}
    look = (
        inner.model.get_video_features if "pixel_values_videos" in inputs else inner.model.get_image_features
    )
    known = inspect.signature(look).parameters
    hooks = [
        projector.register_forward_pre_hook(lambda _, args: caught.append(args[0])),
        tower.register_forward_hook(lambda _, args, output: caught.insert(0, output)),
    ]
    with outside_forward(inner):
        look(**{name: value for name, value in inputs.items() if name in known})
    for hook in hooks:
        hook.remove()
    form, features = caught
    inner.tower_form = tree_map(
        lambda t: t.new_zeros(()).expand(t.shape) if isinstance(t, Tensor) else t, form
    )
    return features.cpu().contiguous()


def cached_clip(sample: Sample) -> Footage:
    from safetensors.torch import load_file

    with sample.frames.open("rb") as file:
        pixels = np.load(sample.frames, mmap_mode="r")  # for its shape: the pixels are not read
        file.seek(pixels.offset + pixels.nbytes)
        return Footage(pixels, np.load(file), load_file(sample.features)["features"])


@contextlib.contextmanager
def fed(inner: nn.Module, features: Tensor) -> Iterator[None]:
    """Inside, the tower does nothing, and these are what its projector gets, in each pass of the class's own
    code."""
    parts = module_names(inner)
    tower, projector = inner.get_submodule(parts.tower), inner.get_submodule(parts.projector[0])

    def as_if(t: Any) -> Any:
        return t[:1].expand(len(features), *t.shape[1:]) if isinstance(t, Tensor) else t

    hook = projector.register_forward_pre_hook(lambda _, args: (features, *args[1:]))
    tower.forward = lambda *_, **__: tree_map(as_if, inner.tower_form)
    try:
        yield
    finally:
        del tower.forward
        hook.remove()


# ---------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------


@torch.no_grad()
def greedy_answers(
    model: nn.Module, collate: VideoCollator, items: list[tuple[Footage, str]], max_new_tokens: int
) -> list[str]:
    """-> answers to questions about clips, in one batch."""
    from transformers import GenerationConfig

    parameter = next(model.parameters())
    zero3 = any(hasattr(p, "ds_id") for p in model.parameters())
    batch = {
        name: value.to(parameter.device) for name, value in collate.ask(items).items() if name != "labels"
    }
    own = inner_vlm(model).generation_config
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
        eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id,
    )  # fmt: skip
    with outside_forward(inner_vlm(model)):
        out = model.generate(**batch, generation_config=greedy, synced_gpus=zero3)
    said = out[:, batch["input_ids"].shape[1] :]
    answers = collate.base.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def exact_by_kind(answers: list[str], asked: list[QA]) -> dict[str, float]:
    """{what is asked for: share of exact answers}, where the data say what"""
    hits: dict[str, list[bool]] = {}
    for answer, qa in zip(answers, asked):
        if qa.kind:
            hits.setdefault(qa.kind, []).append(normalized(answer) == normalized(qa.answer))
    return {kind: float(np.mean(hit)) for kind, hit in hits.items()}


def chosen_questions(held_out: list[Sample], count: int) -> list[tuple[int, QA]]:
    """Up to `count` (sample, question), spread evenly, the same in every evaluation; of a conversation its
    first, for the others are about what was said before."""
    every = [(i, talk[0]) for i, sample in enumerate(held_out) for talk in sample.talks]
    return [every[i * len(every) // min(count, len(every))] for i in range(min(count, len(every)))]


def asked_about(
    model: nn.Module, collate: VideoCollator, data: Data, chosen: list[tuple[int, QA]], how: str
) -> list[str]:
    """Every rank: the answers to the chosen questions, with the frames shown in this way"""
    cfg, answers = collate.cfg, {}
    # a sequence's cache of keys and values is about its training memory
    for part in rounds(len(chosen), cfg.batch_size):
        items = []
        for i in part:
            number, qa = chosen[i]
            clip = data.held_out[number].load(cfg.frames)
            items.append((clip._replace(frames=rearrange_frames(clip.frames, how, i)), qa.question))
        answers |= dict(zip(part, greedy_answers(model, collate, items, cfg.max_new_tokens)))
    return list(merged_over_ranks(answers).values())


def evaluate(model: nn.Module, collate: VideoCollator, data: Data) -> dict:
    """Every rank: the fixed questions of the held-out part, asked with the frames in order, shuffled,
    reversed and blanked, and the loss there. -> {"held_out_loss", "in order": answer_scores, ..., "kinds":
    {"in order": {kind: exact}, ...}, "answers": [{"question", "answer", "said", "sample"}]}"""
    chosen = chosen_questions(data.held_out, collate.cfg.eval_questions)
    asked = [qa for _, qa in chosen]
    with evaluating(model):
        loss = held_out_loss(model, collate, data)
        said = {how: asked_about(model, collate, data, chosen, how) for how in SHUFFLES}
    answers = [
        {"question": qa.question, "answer": qa.answer, "said": text, "sample": i}
        for (i, qa), text in zip(chosen, said["in order"])
    ]
    scores = {how: answer_scores(said[how], [qa.answer for qa in asked]) for how in SHUFFLES}
    kinds = {how: exact_by_kind(said[how], asked) for how in SHUFFLES}
    return {"held_out_loss": loss, "kinds": kinds, "answers": answers} | scores


@torch.no_grad()
def held_out_loss(model: nn.Module, collate: VideoCollator, data: Data) -> float:
    """Mean over the supervised tokens of up to 64 held-out sequences."""
    device = next(model.parameters()).device

    def loss_of(part: list[int]) -> tuple[Tensor, int]:
        chosen = [data.held_out[i] for i in part]
        batch = collate([(sample.load(collate.cfg.frames), sample.talks) for sample in chosen])
        return supervised_loss(model, {name: value.to(device) for name, value in batch.items()})

    return mean_loss(min(64, len(data.held_out)), 1, loss_of)


# ---------------------------------------------------------------------------
# Plan
# ---------------------------------------------------------------------------

# (GPUs, usable memory of one in GB, what it computes in)
MACHINES = {
    "1x H100 80 GB": (1, 84.9, "bf16"),
    "4x A100 40 GB": (4, 42.3, "bf16"),
    "4x RTX 4090 24 GB": (4, 25.3, "bf16"),
    "4x V100 16 GB": (4, 16.9, "fp16"),
}
# (lora_r, 4-bit weights)
METHODS = {"full fine-tuning": (0, False), "LoRA": (16, False), "LoRA, 4 bits": (16, True)}


@dataclass(frozen=True)
class Longest:
    """Over all sequences"""

    tokens: int
    supervised: int
    visual: int  # tokens that stand for frames
    patches: int  # that the tower sees


@dataclass(frozen=True)
class Sizes:
    parameters: int  # of the model, without LoRA's
    trained: int  # parameters
    frozen_bytes: int
    kept: dict[bool, int]  # {with gradient checkpointing: bytes a micro-batch keeps for the backward pass}


def patches_of(inputs: dict[str, Tensor], vision: Any) -> int:
    """How many patches the pixels are"""
    pixels = sum(value.numel() for name, value in inputs.items() if name.startswith("pixel_values"))
    return pixels // (3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1))


def sizes_of(base: Base, cfg: Config, longest: Longest, in_4bit: bool) -> Sizes:
    """Counted on the meta device, at a micro-batch of the longest sequences: no memory, no arithmetic. Exit 2
    for LoRA targets that the language model does not have."""
    from transformers import AutoModelForImageTextToText

    kind = TORCH_DTYPES[cfg.dtype]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(base.config).to(kind)
    parameters = sum(p.numel() for p in model.parameters())
    parts = module_names(model)
    language = model.get_submodule(parts.language)
    in_linear = sum(m.weight.numel() for m in language.modules() if isinstance(m, nn.Linear))
    model = choose_trained(model, cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = (parameters - (0 if cfg.lora_r else trained)) * kind.itemsize
    if in_4bit:
        # 4 bits and a share of the scales, which are quantized too (Dettmers et al. 2023, section 3)
        frozen_bytes -= int(in_linear * (kind.itemsize - 4.127 / 8))

    text, vision = base.config.get_text_config(), base.config.vision_config
    layers, batch, tokens, width = language.layers, cfg.batch_size, longest.tokens, text.hidden_size

    def kept_by(count: int) -> int:
        """Bytes, by this many layers"""
        language.layers = layers[:count]
        with torch.device("meta"):
            forward = partial(
                language,
                inputs_embeds=torch.empty(batch, tokens, width, dtype=kind, requires_grad=True),
                position_ids=torch.arange(tokens)[None],
                attention_mask=torch.empty(batch, 1, tokens, tokens, dtype=torch.bool),
                use_cache=False,
            )
            return saved_bytes(forward, model)

    first = kept_by(1)
    another = kept_by(2) - first
    # the projector's input, what its nonlinearity takes and gives, and its output
    around = batch * longest.visual * 3 * width * kind.itemsize if cfg.train_projector else 0
    if cfg.train_vision:  # 17 values a token and feature (Korthikanti et al. 2022, equation 2)
        deep = getattr(vision, "num_hidden_layers", None) or vision.depth
        around += batch * longest.patches * deep * 17 * vision.hidden_size * kind.itemsize
    # logits, in fp32, and their gradient
    around += first + batch * longest.supervised * text.vocab_size * (kind.itemsize + 8)
    a_layer = {False: another, True: batch * tokens * width * kind.itemsize}
    allowed = CHECKPOINTING[cfg.gradient_checkpointing]
    kept = {on: around + (len(layers) - 1) * a_layer[on] for on in allowed}
    return Sizes(parameters, trained, frozen_bytes, kept)


def vlm_layouts(sizes: Sizes, dtype: str, in_4bit: bool, devices: int, local: int = 0) -> list[Layout]:
    """memory_layouts; 4-bit weights are not partitioned, so they have no ZeRO-3."""
    layouts = memory_layouts(sizes.trained, sizes.frozen_bytes, sizes.kept, dtype, devices, local or None)
    return [layout for layout in layouts if not (in_4bit and layout.stage == 3)]


def machines_that_fit(base: Base, cfg: Config, longest: Longest) -> str:
    """What fits on which machine, by arithmetic: for --check."""
    lines = ["machines estimated: the least offloading that fits, GB per GPU, GB of RAM"]
    for method, (lora_r, in_4bit) in METHODS.items():
        usual = {"batch_size": 1, "dtype": "bf16", "gradient_checkpointing": "auto"}
        sizes = sizes_of(base, dataclasses.replace(cfg, lora_r=lora_r, **usual), longest, in_4bit)
        for machine, (devices, gpu_gb, dtype) in MACHINES.items():
            layouts = vlm_layouts(sizes, dtype, in_4bit, devices, devices)
            first = next((x for x in layouts if x.fits(gpu_gb, math.inf, devices)), None)
            needs = f"{first.name:<40}{first.gpu_gb:6.1f}{first.host_gb:8.1f}" if first else "does not fit"
            lines.append(f"  {machine:<20}{method:<18}{needs}")
    return "\n".join(lines)


def longest_of(collate: VideoCollator, samples: list[Sample]) -> tuple[Longest, int, int]:
    """(The longest of them, tokens in all, supervised ones). Exit 2 with the row that is too long."""
    base, cfg = collate.base, collate.cfg
    lengths = [collate.lengths(sample) for sample in samples]
    (tokens, supervised, visual), (all_tokens, all_supervised, _) = (
        np.max(lengths, 0).tolist(),
        np.sum(lengths, 0),
    )
    limit = base.config.get_text_config().max_position_embeddings
    if tokens > limit:
        where = samples[int(np.argmax([length[0] for length in lengths]))].where
        fewer = "max_frames" if cfg.fps else "frames"
        moves = f"lower --{fewer}, --max_pixels or --max_turns, or shorten its texts"
        refuse(f"{where}: a sequence of {tokens} tokens, {base.source} takes {limit}: {moves}")
    most = samples[int(np.argmax([length[2] for length in lengths]))]
    shape = collate.shape_of(most)
    seen = collate.blank(collate.talk(most.talks[0], shape[0]).head, shape)
    patches = patches_of(seen, base.config.vision_config)
    return Longest(tokens, supervised, visual, patches), int(all_tokens), int(all_supervised)


def plan_of(cfg: Config, base: Base, data: Data, device: torch.device) -> Layout:
    """Print what this run is going to do, and check that it fits. -> the layout of memory that is taken"""
    collate = VideoCollator(base, cfg)
    different = data.train if not cfg.demo else data.train[:2000]  # the demo's are all of one kind
    longest, tokens, supervised = longest_of(collate, different)
    sizes = sizes_of(base, cfg, longest, cfg.load_in_4bit)
    layouts = vlm_layouts(sizes, cfg.dtype, cfg.load_in_4bit, world_size())
    low = TORCH_DTYPES[cfg.dtype].itemsize
    whole = 0 if cfg.adapter_only else sizes.parameters
    disk = (cfg.keep + 1) * sizes.trained * (12 + low) + (whole + (sizes.trained if cfg.lora_r else 0)) * low
    method = f"LoRA r {cfg.lora_r}" if cfg.lora_r else "full fine-tuning"
    parts = module_names(base.skeleton)
    method += f" of {parts.language}" + (", 4-bit weights" if cfg.load_in_4bit else "")
    method += f", {' and '.join(parts.projector)} whole" if cfg.train_projector else ""
    method += f", {parts.tower} whole" if cfg.train_vision else ""
    questions = [sum(len(sample.qa) for sample in part) for part in (data.train, data.held_out)]
    stages = f", {len(stages_of(data.train, True))} stages by answer length" if cfg.curriculum else ""
    same = " (the same: there is one video)" if data.held_out is data.train else ""
    sequences = (
        f"{len(data.train)} sequences with {questions[0]} questions to train on, {len(data.held_out)} with "
        f"{questions[1]} held out{same}, {len(data.bad)} left out as bad{stages}"
    )
    seen = f"on {supervised} of {tokens} tokens in {len(different)} sequences"
    size = f"{base.size}x{base.size}" if isinstance(base.size, int) else f"at most {base.size.pixels} pixels"
    pace = f"{cfg.fps:g} a second, at most {cfg.max_frames}," if cfg.fps else cfg.frames
    ends = base.processor.tokenizer.decode(end_of_answer(base))
    lines = [
        ("data", f"{data_name(cfg)}: {sequences}"),
        (
            "frames",
            f"{pace} of {size}, as {'a video' if base.video else 'images'}: {longest.visual} tokens at most",
        ),
        ("loss", f"{seen}: answers and {ends} alone; longest sequence {longest.tokens}"),
        *row_lines(data.train, collate.told),
        (
            "model",
            f"{base.source} ({type(base.skeleton).__name__}), {sizes.parameters / 1e6:.2f} M parameters",
        ),
        ("trained", f"{method}: {sizes.trained / 1e6:.2f} M"),
        steps_line(cfg, device, "clips"),
    ]
    if cfg.cache_features:
        check_cacheable(base)
        clips = len({sample.frames for sample in (*data.train, *data.held_out)})
        each = longest.patches * base.config.vision_config.hidden_size * low
        free = disk_free(cfg.cache_dir)
        told = f"{clips * each / GB:.2f} GB in {cfg.cache_dir}/features, {free / GB:.1f} GB free"
        lines.append(("features", told))
        if clips * each > free:
            refuse(f"--cache_features: {told}: leave it out, or give another --cache_dir")
    layout = show_plan(cfg, device, lines, layouts, advice(cfg), disk)
    if cfg.check and not cfg.demo:
        log.info(machines_that_fit(base, cfg, longest))
    return layout


def advice(cfg: Config) -> str:
    others = "take --gradient_checkpointing on, --load_in_4bit or --deepspeed ds_zero3_offload.json"
    return f"lower --batch_size {cfg.batch_size}, --frames {cfg.frames} or --max_pixels, or {others}"


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


def open_model(cfg: Config, run: Run, base: Base, checkpointing: bool) -> nn.Module:
    """Every rank: the model in training mode."""
    model = load_pretrained(partial(load_vlm, base=base, cfg=cfg), cfg, run, checkpointing)
    if cfg.compile:
        for layer in model.get_submodule(module_names(model).language).layers:
            layer.compile(dynamic=True)
    torch.manual_seed(cfg.seed)  # LoRA begins the same, whatever loading took of the random numbers
    return choose_trained(model, cfg)


def train_steps(cfg: Config, run: Run, engine: Any, collate: VideoCollator, data: Data) -> None:
    """From run.step to cfg.steps; the loss is the mean over the supervised tokens of all ranks and
    micro-steps of a step."""
    train = data.train
    if cfg.cache_features:
        train = with_features(cfg, collate.base, train)
        keep_features(engine.module, collate, train)
    stages = stages_of(train, cfg.curriculum)
    save = partial(save_run, run, engine, frozen_left_out=True)
    evaluation = partial(evaluate_at, collate, engine.module, data)
    check_projector = watch_projector(engine.module)
    ahead = batches_ahead(partial(get_batch, stages, collate, cfg), cfg, run.step)
    for (step, row), batches in zip(training_steps(run, engine, save, evaluation), ahead):
        tokens = over_ranks(sum(int((batch["labels"] != -100).sum()) for batch in batches), "mean")
        row["loss"] = 0.0
        for batch in batches:
            batch = {name: value.to(engine.device) for name, value in batch.items()}
            loss = supervised_loss(engine, batch)[0] / tokens
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()  # skips the update, on all ranks, when a gradient is not finite
            row["loss"] += loss.detach()
        if step == run.step:
            check_projector()


def watch_projector(model: nn.Module) -> Callable[[], None]:
    """-> what to call after the first step: it ends the run when no gradient has reached the projector."""
    names, reached = module_names(inner_vlm(model)).projector, []
    trained = [
        p for name, p in inner_vlm(model).named_parameters()
        if p.requires_grad and "lora_" not in name and name.startswith(tuple(names))
    ]  # fmt: skip
    hooks = [p.register_hook(lambda grad: reached.append(bool(grad.any()))) for p in trained]

    def check() -> None:
        for hook in hooks:
            hook.remove()
        if hooks and not over_ranks(any(reached), "max"):
            blind = "the model answers without the video; nothing was saved"
            raise SystemExit(f"error: the projector got no gradient: {blind}")

    return check


def evaluate_at(collate: VideoCollator, model: nn.Module, data: Data, step: int) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    result = evaluate(model, collate, data)
    exact = " | ".join(f"{how} {result[how]['exact']:.2f}" for how in SHUFFLES)
    log.info(f"eval step {step:06d} | held-out loss {result['held_out_loss']:.4f} | {exact} exact")
    if rank() == 0:
        folder = collate.cfg.output_dir / "samples"
        write_lines(folder / f"answers_step{step:06d}.jsonl", result["answers"])
    numbers = {"held_out_loss": result["held_out_loss"]}
    for how in SHUFFLES:
        numbers |= {f"{name}_{how.replace(' ', '_')}": value for name, value in result[how].items()}
    return numbers


def train(cfg: Config) -> None:
    from_flags = cfg
    device = open_run(cfg, cfg.hub_dataset_id if pushes_data(cfg) else "")
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or BASE_MODEL)
    if cfg.demo:
        kind, scenes = from_flags.model or "llava", demo_module("scenes")
        if kind not in scenes.KINDS:
            refuse(f"--demo --model {kind}: no such tiny model; there are {', '.join(scenes.KINDS)}")
        build = partial(scenes.build_tiny, kind=kind, template=TEMPLATE)
        cfg = dataclasses.replace(cfg, model=on_rank0(tiny_model)(cfg, __file__, build, kind))
    base = open_base(cfg.model, cfg.max_pixels, cfg.attn)
    data = load_data(cfg, base)
    cfg = with_steps(cfg, WARMUP, len(data.train), cfg.batch_size * cfg.accum * world_size())
    layout = plan_of(cfg, base, data, device)
    on_rank0(check_weights)(cfg.model)
    if cfg.check:
        return
    # the demo draws as many clips as its steps need, and its model lies in the cache: both may change
    samples = data.held_out if cfg.demo else [*data.train, *data.held_out]
    base_model = Path(cfg.model).name if cfg.demo else cfg.model
    facts = {"base_model": base_model, "data": fingerprint(sample.contents() for sample in samples)}
    loss_is = "cross-entropy per answer token"
    run = start_run(from_flags, cfg, __file__, layout, data.bad, loss_is, **facts)
    cfg = run.cfg
    if cfg.push_to_hub and pushes_data(cfg):
        push_clips(cfg, data)
    model = open_model(cfg, run, base, layout.checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
    )
    engine = open_engine(run, model, optimizer, frozen_left_out=True)
    collate = VideoCollator(base, cfg)
    with out_of_memory(advice(cfg)):
        train_steps(cfg, run, engine, collate, data)
    finish_run(
        run,
        export=partial(export, cfg, engine.module, base),
        evaluate=partial(final_results, collate, engine.module, data),
        card=partial(card_of, cfg, base),
    )


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


def export(cfg: Config, model: nn.Module, base: Base, target: Path) -> None:
    """Every rank: model/ as export_pretrained makes it, and the scripts that ask it."""
    load = partial(load_vlm, base=base, cfg=dataclasses.replace(cfg, load_in_4bit=False))
    export_pretrained(model, load, cfg, TORCH_DTYPES[cfg.dtype], base.processor, target)
    if rank() == 0:
        write_json(target / "llava_vtt.json", {name: getattr(cfg, name) for name in (*ASKED_WITH, "dtype")})
        copy_code(target, __file__)
    barrier()


def final_results(collate: VideoCollator, model: nn.Module, data: Data) -> dict:
    """Every rank: what results.json says of the finished model. Short answers are right or wrong; of
    sentences ROUGE-L tells more, and chrF where words are not divided."""
    result = evaluate(model, collate, data)
    on_rank0(write_answers)(collate.cfg, data, result["answers"])
    wanted = [row["answer"] for row in result["answers"]]
    metric, name = ("chrf", "chrF") if is_undivided(wanted) else ("rouge_l", "ROUGE-L")
    if all(len(words(answer)) <= 3 for answer in wanted):
        metric, name = "exact", "exact match"
    which = "training" if data.held_out is data.train else "held-out"

    def table(numbers: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """{how frames were shown: {row: number}} -> {row: {how: number}}, and what is lost without them"""
        rows = {row: {how: numbers[how][row] for how in SHUFFLES} for row in numbers["in order"]}
        return {row: v | {"needs the video": v["in order"] - v["blanked"]} for row, v in rows.items()}

    tables = {"answers": table(result), "exact by kind": table(result["kinds"])}
    return {
        "score": result["in order"][metric],
        "score_is": f"{name} of {len(result['answers'])} answers about {which} clips",
        "controls": {f"frames_{how}": result[how][metric] for how in SHUFFLES[1:]},
        "held_out_loss": result["held_out_loss"],
        "tables": {title: rows for title, rows in tables.items() if rows},
    }


def write_answers(cfg: Config, data: Data, answers: list[dict]) -> None:
    """Rank 0: samples/answers.jsonl and .png. No picture of a user's videos goes into model/ unasked."""
    folder = cfg.output_dir / "samples"
    write_lines(folder / "answers.jsonl", answers)
    one_each = list({row["sample"]: row for row in answers}.values())[:6]
    clips = [data.held_out[row["sample"]].load(cfg.frames).frames for row in one_each]
    # one grid: of each as many frames as the shortest has, in the shape of the first
    few, shape = min(map(len, clips)), clips[0].shape[1:3]
    clips = [
        np.stack([fitted(clip[i], shape, crop=False) for i in frame_indices(len(clip), few)])
        for clip in clips
    ]
    titles = [f"{row['question']}  {row['said']}  (wanted: {row['answer']})" for row in one_each]
    write_grid(np.stack(clips), titles, folder / "answers.png")
    if cfg.demo or cfg.push_videos:
        shutil.copyfile(folder / "answers.png", cfg.output_dir / "model" / "samples.png")


def columns_of_talk(talk: Talk) -> dict:
    """As it is pushed: a question and its answer, or what was said in turns"""
    if len(talk) == 1:
        return {"question": talk[0].question, "answer": talk[0].answer}
    turns = [zip(("user", "assistant"), qa[:2]) for qa in talk]
    return {"messages": [{"role": role, "content": text} for turn in turns for role, text in turn]}


@on_rank0
def push_clips(cfg: Config, data: Data) -> None:
    """The rows of both splits, with --push_videos the files, as a data set that --dataset takes. Exit 2 if
    that fails."""
    folder = cfg.output_dir / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # made by us, and made anew
    (folder / "videos").mkdir(parents=True)
    parts: dict[str, list[dict]] = {"train": [], "validation": []}
    for (split, rows), clips in zip(parts.items(), data.clips):
        for number, clip in enumerate(clips):
            video = clip.video if is_url(clip.video) else Path(clip.video).name  # no path of this machine
            if cfg.push_videos and not is_url(clip.video):
                with local_file(clip.video, cfg) as file:
                    video = f"videos/{split}_{number:06d}{file.suffix}"
                    shutil.copyfile(file, folder / video)
            part = {"start": clip.start} if clip.part else {}
            part |= {"end": clip.end} if clip.end < math.inf else {}
            rows += [{"video": video} | part | texts for texts in map(columns_of_talk, talks_of(clip.texts))]
    files = "a file of this repository" if cfg.push_videos else "the name of a file that is not part of it"
    about = f"`video` is a URL, or {files}."
    push_rows(folder, cfg.hub_dataset_id, cfg.public, parts, about, Path(__file__).name)


PLAIN_USE = """
Without these scripts, as any model of its class, from the folder or by the name of this repository:

```python
from transformers import AutoProcessor, {cls}

folder = "."
processor = AutoProcessor.from_pretrained(folder)
model = {cls}.from_pretrained(folder, dtype="auto")
```"""


def card_of(cfg: Config, base: Base, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    lines = ["| question | answer | wanted |", "|---|---|---|"]
    for _, row in read_json_lines(cfg.output_dir / "samples" / "answers.jsonl")[:6]:
        cells = [str(row[column]).replace("|", "/") for column in ("question", "said", "answer")]
        lines.append(f"| {' | '.join(cells)} |".replace("\n", " "))
    if (cfg.output_dir / "model" / "samples.png").exists():
        lines += ["", "![samples](samples.png)"]
    local, original = Path(base.source).exists(), base.source == BASE_MODEL
    weights = f"LoRA (r {cfg.lora_r})" if cfg.lora_r else "all weights"
    question = json.dumps(cfg.question or DEFAULT_QUESTION)
    if not cfg.adapter_only:
        lines.append(PLAIN_USE.format(cls=type(base.skeleton).__name__))
    return {
        "about": f"`{Path(base.source).name if local else base.source}`, fine-tuned to answer questions "
        f"about videos ({cfg.frames} frames, evenly spread) on `{Path(data_name(cfg)).name}` by "
        f"`llava_vtt.py`, which lies in this repository. {served(cfg, base, weights)} The tables show how "
        "much of the score needs the pictures, and their order.",
        "usage": f'from llava_vtt import ask\n\nprint(ask("clip.mp4", {question}, folder))',
        "data": Path(data_name(cfg)).name,
        "more": "\n".join(lines),
        "library_name": "peft" if cfg.adapter_only else "transformers",
        "pipeline_tag": "video-text-to-text",
        "base_model": "" if local else base.source,
        "license": "other" if original else "",
        "license_name": "tongyi-qianwen-research" if original else "",
        "datasets": cfg.dataset if cfg.dataset and not Path(cfg.dataset).exists() else "",
        "tags": [base.config.model_type, "video-text-to-text", "deepspeed"],
    }


def served(cfg: Config, base: Base, weights: str) -> str:
    """Of what model/ is, and who takes it"""
    if not cfg.lora_r:
        return f"Here are {weights}."
    where = "Here is the adapter alone." if cfg.adapter_only else "It is merged here; `adapter/` is it alone."
    names, served_by = trained_whole(module_names(base.skeleton), cfg), "vLLM and PEFT serve it."
    if names:
        served_by = (
            f"It has {', '.join(names)} whole (modules_to_save), which vLLM does not serve as an adapter."
        )
    return f"{weights}. {where} {served_by}"


def ask(video: str | Path, question: str, model: str | Path, **asking: Any) -> str:
    """The answer to a question about a video file or URL by a finished model, a folder or a Hub id.

    asking: frames, fps, max_frames, max_pixels, max_new_tokens; what it was trained with by default. Raises
    BadSample (a ValueError) when the video cannot be used. Exit 2 when the model cannot be found.
    """
    return next(answers([(str(video), question)], model, **asking))


def answers(asked: list[tuple[str, str]], model: str | Path, **asking: Any) -> Iterator[str]:
    """To [(video, question)], one after the other, by `ask`'s rules; the model is loaded once."""
    folder, below, saved = finished_model(str(model), "llava_vtt.json")
    cfg = Config(report_to="none", **(saved | asking))
    base = open_base(below, cfg.max_pixels)
    net, collate = ready(load_vlm(fetch_model(below, "*"), base, cfg), folder), VideoCollator(base, cfg)
    size = base.size if isinstance(base.size, AtMost) else (base.size, base.size)

    @lru_cache(maxsize=1)  # several questions about one clip
    def clip_of(video: str) -> Footage:
        with local_file(video, cfg) as path:
            return Footage(*timed_frames(path, cfg.how_many, size, base.crop))

    for video, question in asked:
        yield greedy_answers(net, collate, [(clip_of(video), question)], cfg.max_new_tokens)[0]


def predict(cfg: Config) -> None:
    """--predict: print an answer a line, alone."""
    model, source = cfg.model or str(cfg.output_dir / "model"), Path(cfg.predict)
    asked = [(cfg.predict, cfg.question)]
    if source.suffix.lower() in QUESTIONS:
        if not source.is_file():
            refuse(f"--predict {source}: no such file")
        asked = []
        for number, row in read_json_lines(source):
            video, question = str(row.get("video", "")), str(row.get("question", cfg.question))
            if not video or not question:
                refuse(f"{source}:{number}: no {'question' if video else 'video'} in it")
            asked.append((video if is_url(video) else str(source.parent / video), question))
    defaults = Config(report_to="none")
    given = {name: getattr(cfg, name) for name in ASKED_WITH if getattr(cfg, name) != getattr(defaults, name)}
    said = 0
    try:
        for answer in answers(asked, model, **given):
            print(answer, flush=True)
            said += 1
    except BadSample as error:
        refuse(f"--predict {asked[said][0]}: {error}")
    except (OSError, ValueError) as error:
        refuse(f"--model {model}: {brief(error)}; give a folder that a run wrote, or a Hub id")


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, {})
    predict(cfg) if cfg.predict else train(cfg)


if __name__ == "__main__":
    run(main, torchvision=True)
