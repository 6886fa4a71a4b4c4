# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "av", "datasets", "deepspeed", "huggingface_hub", "matplotlib", "numpy", "opencv-python-headless", "peft", "pillow",
#   "rouge-score", "sacrebleu", "torch", "tqdm", "transformers", "trl", "tyro",
# ]
# ///
"""Video and question to text: LLaVA-interleave 7B fine-tuned on clips and questions, with a proof that it sees the video.

    python llava_vtt.py --demo                                 # minutes on 2 CPU cores: a tiny LLaVA learns to see motion
    python llava_vtt.py --manifest clips.jsonl                 # one GPU (or a CPU): the debugging path
    ./run.sh llava_vtt.py 4 --manifest clips.jsonl             # four GPUs, logged, data set and model pushed to the Hub
    python llava_vtt.py --predict clip.mp4 --question "What happens?"

Data, one of: --manifest, a file of JSON lines, CSV or parquet with the columns video, question and answer (or caption), or video
and a list qa of {"question", "answer"}; --video_dir, a folder of video_001.mp4 beside video_001.json with a "description";
--dataset, a Hub id or folder that the library datasets loads, with such columns. Videos are paths or URLs. Without any, four
public samples. Training and held-out clips are split by video; all questions of a clip are turns of one conversation.

LoRA on the language model and the whole projector are trained; --lora_r 0 trains all of the language model, --train_vision the
vision tower too, --load_in_4bit is QLoRA. The loss is on the answers and their <|im_end|> alone. Each evaluation asks the same
questions again with the frames shuffled, reversed and blanked.

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.

Measured: --demo, 7 minutes on 2 CPU cores: 0.99 of 500 answers about clips never seen are right; of the directions 0.96, with the
frames shuffled 0.25, reversed 0.00. On a GPU: not yet measured.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from common import (
    CHECKPOINTING,
    DEFAULT_QUESTION,
    GB,
    BadSample,
    all_rows,
    barrier,
    brief,
    card_parts,
    catch_signals,
    check_loaded,
    check_settings,
    check_weights,
    choose_layout,
    count_skipped,
    decode_all,
    demo_module,
    device_name,
    disk_free,
    download,
    ds_config,
    epoch_order,
    extract_frames,
    fetch_model,
    finish,
    first_of,
    from_all_ranks,
    full_weights,
    hub_check,
    init_distributed,
    is_url,
    learning_rate,
    leave_out,
    load_engine,
    log,
    memory_rows,
    on_rank0,
    over_ranks,
    pad,
    peak_memory_gb,
    pick_dtype,
    plain,
    prepare_run_folder,
    push_finished,
    push_rows,
    pushes_data,
    rank,
    read_flags,
    read_json_lines,
    record,
    refuse,
    resume_checkpoint,
    run,
    save_checkpoint,
    saved_bytes,
    seed_of,
    split_clips,
    summary,
    sync,
    take_run_folder,
    tiny_model,
    tracker,
    without_mark,
    words,
    world_size,
    write_grid,
    write_json,
    write_lines,
    write_loss_curve,
)

BASE_MODEL = "llava-hf/llava-interleave-qwen-7b-hf"
# ChatML, as the model was trained; the span between the generation marks is what the loss sees: the answer and its end.
TEMPLATE = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content if part.type == 'image' %}{{ '<image>' + ('\\n' if loop.last else '') }}{% endfor %}
{%- for part in message.content if part.type == 'text' %}
{%- if message.role == 'assistant' %}{% generation %}{{ part.text + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ part.text + '<|im_end|>' }}{% endif %}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CURVES = ("loss", "held_out_loss")  # in loss.png
SHUFFLES = ("in order", "shuffled", "reversed", "blanked")  # how frames are shown in an evaluation
METRICS = ("exact", "bleu", "rouge_l")
SIDES = {
    "left",
    "right",
    "leftwards",
    "rightwards",
    "clockwise",
    "counterclockwise",
    "anticlockwise",
}  # wrong in a mirror
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on clips made on the spot: minutes on 2 CPU cores, no network
    check: bool = False  # all checks and the plan, no training
    output_dir: Path = Path("runs/llava_vtt")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    manifest: Path | None = None  # JSON lines, CSV or parquet: video, question, answer or caption (or qa)
    video_dir: Path | None = None  # x.mp4 beside x.json with a description
    dataset: str = ""  # Hub id or folder for the library datasets: video, question, caption
    frames: int = 5  # per clip, spread evenly over the video
    question: str = ""  # of --predict; and of videos that have a caption or description and no question
    max_turns: int = 8  # questions of one clip in one sequence
    val_fraction: float = 0.1  # share of the videos held out, unless the data set has such a split
    augment: bool = False  # crop, brightness and contrast, the same for all frames of a clip
    augment_flip: bool = False  # also mirror clips; off by default, for it makes left and right wrong
    curriculum: bool = False  # three stages: answers below 10 words, below 20, all
    max_bad: float = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Path = Path("cache")  # decoded frames, downloads
    num_workers: int = os.cpu_count() or 1  # threads that decode

    # model

    model: str = (
        ""  # LLaVA, a Hub id or a folder; default: LLaVA-interleave 7B, for --predict <output_dir>/model
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # attention kernel
    compile: bool = False  # torch.compile the decoder layers; needs a C++ compiler
    lora_r: int = 16  # rank; 0: full fine-tuning
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # of the language model
    train_vision: bool = False  # the vision tower too
    load_in_4bit: bool = False  # QLoRA: frozen weights in 4 bits; needs a GPU and bitsandbytes
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"  # auto: when it does not fit without

    # optimisation

    steps: int = 0  # optimizer steps in all, over all resumes; 0: as many as --epochs are
    epochs: float = 3.0  # passes over the training clips
    batch_size: int = 1  # clips per GPU per micro-step; lower this first when memory runs out
    accum: int = 4  # micro-steps per optimizer step
    lr: float = 1e-4  # with --lora_r 0 take 1e-5
    warmup_steps: int = 10
    lr_decay: bool = True  # to 0 at the last step, along a cosine
    weight_decay: float = 0.0
    beta2: float = 0.999  # of AdamW
    clip: float = 1.0  # gradient norm limit
    dtype: Literal["bf16", "fp16", "fp32"] | None = (
        None  # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    )
    deepspeed: Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])] = (
        "auto"  # JSON file, or auto: what fits
    )

    # asking

    predict: str = ""  # path or URL: answer --question about this video with --model and stop
    max_new_tokens: int = 64  # longest answer
    eval_questions: int = 64  # of the held-out part, always the same

    # watching and saving

    log_every: int = 10
    eval_every: int = 200
    save_every: int = 100
    keep: int = 2  # newest checkpoints kept
    resume: bool = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Literal["none", "tensorboard", "wandb"] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: bool = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: str = "llava_vtt"
    hub_dataset_id: str = "llava_vtt_data"  # the data set is pushed too, unless it came from the Hub
    push_videos: bool = False  # with the video files, not their names alone
    public: bool = False  # visibility of new repositories

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="frames max_turns batch_size accum max_new_tokens eval_questions log_every eval_every save_every keep "
            "num_workers",
            above_0="lr clip epochs lora_alpha",
            shares="val_fraction lora_dropout max_bad",
        )
        if self.steps < 0 or self.lora_r < 0:
            raise ValueError(f"--steps {self.steps}, --lora_r {self.lora_r}: at least 0")
        given = [f"--{name}" for name in ("demo", "manifest", "video_dir", "dataset") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: the data come from one of them")
        if self.predict and not self.question:
            raise ValueError(f"--predict {self.predict}: what is to be asked? Give --question")
        if self.augment_flip and not self.augment:
            raise ValueError("--augment_flip: is part of --augment; give both")
        if self.load_in_4bit and not torch.cuda.is_available():
            raise ValueError(
                "--load_in_4bit: needs a GPU, and none is visible; leave it out to debug on a CPU"
            )
        if self.load_in_4bit and not importlib.util.find_spec("bitsandbytes"):
            raise ValueError("--load_in_4bit: pip install bitsandbytes")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError(
                "--load_in_4bit: 4-bit weights cannot be trained; give --lora_r 16, or leave --load_in_4bit out"
            )


# The demo is a preset: the same code with other numbers. Recipe and scores: README.md and benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/llava_vtt_demo"), report_to="none", lora_r=0, train_vision=True, steps=3500, batch_size=16,
    accum=1, lr=1.4e-3, warmup_steps=50, weight_decay=0.05, beta2=0.98, max_new_tokens=8, eval_questions=500, log_every=100,
    eval_every=1000, save_every=1000,
)  # fmt: skip

# ---------------------------------------------------------------------------
# Data: videos and questions
# ---------------------------------------------------------------------------


class QA(NamedTuple):
    question: str
    answer: str
    kind: str = ""  # what is asked for, where the data say so: the table at the end has a line for each


@dataclass(frozen=True)
class Clip:
    video: str  # path or http(s) URL
    qa: tuple[QA, ...]
    where: str  # file and line, for messages
    split: str = ""  # as split_of gives it


def read_questions(cfg: Config) -> tuple[list[Clip], list[dict]]:
    """-> (a clip for each video, with all its questions, bad samples). Exit 2 when no row has a question."""
    rows, folder = all_rows(cfg, videos=True)
    default = cfg.question or (DEFAULT_QUESTION if cfg.video_dir else "")
    if not default and not any(first_of(row, "question", "qa") for _, row, _ in rows):
        refuse(
            f"{cfg.manifest or cfg.dataset}: no question in any of {len(rows)} rows (columns: {', '.join(rows[0][1])}); "
            f'add a column, or ask the same of all with --question "{DEFAULT_QUESTION}"'
        )
    clips: dict[str, Clip] = {}
    bad = []
    for where, row, split in rows:
        video = first_of(row, "video", "video_path", "path", "file")
        pairs = first_of(row, "qa") or [row]
        pairs = [pair for pair in pairs if isinstance(pair, dict)] if isinstance(pairs, list) else []
        asked = [
            (p.get("question") or default, first_of(p, "answer", "caption", "description"), p.get("kind"))
            for p in pairs
        ]
        if not isinstance(video, str):
            bad.append({"where": where, "reason": 'no video ("video", "video_path", "path" or "file")'})
        elif not asked or not all(isinstance(q, str) and without_mark(q) for q, _, _ in asked):
            bad.append(
                {
                    "where": where,
                    "video": video,
                    "reason": 'no question ("question", or "qa": [{"question", "answer"}])',
                }
            )
        elif not all(isinstance(a, str) and a.strip() for _, a, _ in asked):
            bad.append(
                {
                    "where": where,
                    "video": video,
                    "reason": 'question without answer ("answer", "caption", "description")',
                }
            )
        elif any("<|im_" in text or "<image>" in text for q, a, _ in asked for text in (without_mark(q), a)):
            bad.append(
                {
                    "where": where,
                    "video": video,
                    "reason": "a special token (<image>, <|im_end|>, ...) inside the text",
                }
            )
        else:
            source = video if is_url(video) else str(folder / video)
            qa = tuple(QA(without_mark(q), a.strip(), str(kind or "")) for q, a, kind in asked)
            earlier = clips.get(source, Clip(source, (), where, split))
            part = (
                split if split == earlier.split else "train"
            )  # held-out questions about pictures that were seen prove nothing
            clips[source] = dataclasses.replace(earlier, qa=earlier.qa + qa, split=part)
    return list(clips.values()), bad


@dataclass(frozen=True)
class Sample:
    """One training sequence: the frames once, then the questions as turns of a conversation."""

    frames: Path | Any  # a .npy file of uint8 (F, S, S, 3), or a Scene of demos/scenes.py to draw
    qa: tuple[QA, ...]

    def load(self, frames: int) -> np.ndarray:
        return np.load(self.frames) if isinstance(self.frames, Path) else self.frames.draw(frames)


@dataclass(frozen=True)
class Data:
    train: list[Sample]
    held_out: list[Sample]  # to evaluate on; the same as train when there is one video alone
    bad: list[dict]  # samples that were left out, and why
    clips: tuple[list[Clip], list[Clip]] = ((), ())  # of both parts, for the data set that is pushed


def generated_data(cfg: Config) -> Data:
    """What the demo trains on."""
    scenes = demo_module("scenes")

    def sample(scene: Any) -> Sample:
        return Sample(scene, tuple(QA(*asked) for asked in scenes.questions_of(scene)))

    train = scenes.draw_scenes(cfg.seed, cfg.steps * cfg.batch_size * cfg.accum)
    held_out = scenes.draw_scenes(cfg.seed + 1_000_003, scenes.NUM_HELD_OUT)
    return Data([sample(scene) for scene in train], [sample(scene) for scene in held_out], bad=[])


def load_data(cfg: Config, base: Base) -> Data:
    """Every rank. Exit 2 when there is nothing to train on."""
    if cfg.demo:
        return generated_data(cfg)

    def decode() -> tuple[list[Clip], list[Path], list[dict]]:
        clips, bad = read_questions(cfg)
        if cfg.augment_flip and (
            lost := next((c for c in clips if any(SIDES & set(words(" ".join(qa[:2]))) for qa in c.qa)), None)
        ):
            refuse(
                f"--augment_flip: a mirrored clip makes left and right wrong, and {lost.where} asks for them; leave it out"
            )
        files, undecoded = decode_all(clips, cfg.frames, base.size, cfg.cache_dir, cfg.num_workers, base.crop)
        good = [(clip, file) for clip, file in zip(clips, files) if file]
        leave_out(
            cfg.manifest or cfg.video_dir or cfg.dataset or "public samples",
            len(good),
            bad := bad + undecoded,
            cfg.max_bad,
        )
        return [clip for clip, _ in good], [file for _, file in good], bad

    clips, files, bad = on_rank0(decode)
    parts = split_clips(
        [clip.video for clip in clips], [clip.split for clip in clips], cfg.val_fraction, cfg.seed
    )
    if not parts[0]:
        refuse("every video is in the held-out split: there is none to train on")
    turns = range(0, max(len(clip.qa) for clip in clips), cfg.max_turns)
    train, held_out = (
        [Sample(files[i], some) for i in part for t in turns if (some := clips[i].qa[t : t + cfg.max_turns])]
        for part in parts
    )
    return Data(train, held_out or train, bad, tuple([clips[i] for i in part] for part in parts))


def rearrange_frames(clip: np.ndarray, how: str, seed: int) -> np.ndarray:
    """uint8 (F, H, W, 3) -> the same frames in order, shuffled, reversed, or all black"""
    if how == "shuffled":
        rng, order = np.random.default_rng(seed), np.arange(len(clip))
        while len(clip) > 1 and (order == np.arange(len(clip))).all():
            order = rng.permutation(len(clip))
        return clip[order]
    return clip[::-1] if how == "reversed" else np.zeros_like(clip) if how == "blanked" else clip


def augmented(clip: np.ndarray, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """The same crop (85 to 100 % of each side), brightness, contrast and flip for all frames of uint8 (F, S, S, 3)."""
    import cv2

    size = clip.shape[1]
    side = round(size * rng.uniform(0.85, 1))
    top, left = rng.integers(0, size - side + 1, 2)
    clip = np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in
                     clip[:, top : top + side, left : left + side]])  # fmt: skip
    contrast, brightness, mirrored = rng.uniform(0.85, 1.15), rng.uniform(-20, 20), rng.random() < 0.5
    clip = np.clip((clip - 127.5) * contrast + 127.5 + brightness, 0, 255).round().astype(np.uint8)
    return clip[:, :, ::-1] if flip and mirrored else clip


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------


def curriculum(samples: list[Sample], by_length: bool) -> list[list[Sample]]:
    """The samples of each stage, of equal numbers of steps: answers below 10 words, below 20, all. A stage that is empty or adds
    nothing is left out."""
    stages: list[list[Sample]] = []
    for limit in (10, 20, math.inf) if by_length else (math.inf,):
        kept = [(s, tuple(qa for qa in s.qa if len(qa.answer.split()) < limit)) for s in samples]
        stage = [dataclasses.replace(sample, qa=qa) for sample, qa in kept if qa]
        if stage and stage not in stages:
            stages.append(stage)
    return stages


def encode_turn(qa: QA, frames: int, processor: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of one question and its answer after `frames` placeholders; labels are -100 but for answer and <|im_end|>."""
    question = [{"type": "image"}] * frames + [{"type": "text", "text": qa.question}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": qa.answer}]},
    ]
    encoded = processor.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if answer else -100 for token, answer in zip(ids, mask)]


def expand(ids: list[int], labels: list[int], base: Base) -> tuple[list[int], list[int]]:
    """Each placeholder becomes the tokens of its frame, as the processor does it."""
    image, times = base.processor.image_token_id, base.tokens_per_frame
    wide = [
        (t, y)
        for token, label in zip(ids, labels)
        for t, y in [(token, label)] * (times if token == image else 1)
    ]
    return [t for t, _ in wide], [y for _, y in wide]


def pixel_values(clips: list[np.ndarray], base: Base, dtype: str | None) -> Tensor:
    """uint8 (F, S, S, 3) clips -> (B*F, 3, S, S), scaled and normalised as the model wants it"""
    pictures = [frame for clip in clips for frame in clip]
    pixels = base.processor.image_processor(
        pictures, do_resize=False, do_center_crop=False, return_tensors="pt"
    )
    return pixels["pixel_values"].to(TORCH_DTYPES[dtype])


class Collator:
    """Samples -> a batch: input_ids, attention_mask and labels (B, T), pixel_values (B*F, 3, S, S).

    A sequence is the frames once and then the turns; what they share and where turns begin is known here, so that turns can
    become branches of one prefix without a change elsewhere.
    """

    def __init__(self, base: Base, cfg: Config) -> None:
        self.base, self.cfg = base, cfg
        self.turn = functools.lru_cache(maxsize=1 << 16)(
            functools.partial(encode_turn, processor=base.processor)
        )

    def sequence(self, turns: tuple[QA, ...]) -> tuple[list[int], list[int]]:
        encoded = [
            self.turn(qa, self.cfg.frames if first else 0)
            for first, qa in zip([True] + [False] * len(turns), turns)
        ]
        return expand(*(sum(parts, []) for parts in zip(*encoded)), self.base)

    def __call__(self, batch: list[tuple[np.ndarray, tuple[QA, ...]]]) -> dict[str, Tensor]:
        """[(uint8 (F, S, S, 3), turns)]. Raises ValueError when image tokens and frames do not match."""
        ids, labels = zip(*(self.sequence(turns) for _, turns in batch))
        tokens = pad(ids, self.base.processor.tokenizer.pad_token_id)
        images, wanted = (
            (tokens == self.base.processor.image_token_id).sum(),
            sum(len(clip) for clip, _ in batch),
        )
        if images != wanted * self.base.tokens_per_frame:
            raise ValueError(
                f"{images} image tokens for {wanted} frames of {self.base.tokens_per_frame} tokens"
            )
        return {
            "input_ids": tokens,
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(labels, -100),
            "pixel_values": pixel_values([clip for clip, _ in batch], self.base, self.cfg.dtype),
        }


def get_batch(
    stages: list[list[Sample]], collate: Collator, cfg: Config, micro_step: int
) -> dict[str, Tensor]:
    """This rank's batch at a micro-step: a pure function of (seed, micro-step, rank), so that a resumed run repeats the order."""
    per_stage = -(-cfg.steps * cfg.accum // len(stages))
    stage, micro_step = divmod(micro_step, per_stage)
    samples, batch = stages[stage], []
    first = (micro_step * world_size() + rank()) * cfg.batch_size
    for place in range(first, first + cfg.batch_size):
        epoch, i = divmod(place, len(samples))
        sample = samples[epoch_order(len(samples), cfg.seed + stage, epoch)[i]]
        rng = np.random.default_rng([cfg.seed, stage, place])
        clip = sample.load(cfg.frames)
        if cfg.augment:
            clip = augmented(clip, rng, cfg.augment_flip)
        batch.append(
            (clip, tuple(sample.qa[j] for j in rng.permutation(len(sample.qa))))
        )  # any question may be asked first
    return collate(batch)


class Batches:
    """The data loader: from micro-step `start` to the last, each prepared in a thread while the GPU works on the one before."""

    def __init__(
        self, stages: list, collate: Callable[[list], dict[str, Tensor]], cfg: Config, start: int
    ) -> None:
        self.stages, self.collate, self.cfg, self.start = stages, collate, cfg, start

    def __len__(self) -> int:
        return max(1, self.cfg.steps * self.cfg.accum - self.start)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        last = self.cfg.steps * self.cfg.accum
        with ThreadPoolExecutor(1) as pool:
            ahead = (
                pool.submit(get_batch, self.stages, self.collate, self.cfg, self.start)
                if self.start < last
                else None
            )
            for micro_step in range(self.start, last):
                batch = ahead.result()
                if micro_step + 1 < last:
                    ahead = pool.submit(get_batch, self.stages, self.collate, self.cfg, micro_step + 1)
                yield batch


# ---------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The model that is trained, all but its weights."""

    source: str  # Hub id or folder
    folder: Path  # where its files lie
    config: Any  # LlavaConfig
    processor: Any  # LlavaProcessor
    tokens_per_frame: int
    size: int  # height and width of its pictures, pixels
    crop: bool  # whether other shapes are cropped to a square, or squeezed


def open_base(source: str) -> Base:
    """Rank 0 fetches config and processor, every rank opens them. Exit 2 for anything but a LLaVA with ChatML's tokens."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving, on each rank
    folder = on_rank0(lambda: fetch_model(source, "*.json", "*.jinja", "*.txt", "tokenizer.model"))
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "llava":
            refuse(
                f"--model {source} is of the class {config.model_type}; LlavaForConditionalGeneration (llava) is wanted"
            )
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        refuse(f"--model {source}: {brief(error)}")
    tokenizer, pictures = processor.tokenizer, processor.image_processor
    if "<|im_end|>" not in tokenizer.get_vocab():
        refuse(
            f"--model {source}: its tokenizer has no <|im_end|>; take a LLaVA that speaks ChatML, as llava-interleave-qwen does"
        )
    processor.chat_template = TEMPLATE
    crop = bool(getattr(pictures, "do_center_crop", False))
    shape = pictures.crop_size if crop else pictures.size
    size = shape["height"]
    black = np.zeros((size, size, 3), np.uint8)
    tokens = processor(images=[black], text="<image>", return_tensors="pt")["input_ids"]
    return Base(
        source, folder, config, processor, int((tokens == processor.image_token_id).sum()), size, crop
    )


def lora_config(cfg: Config):
    from peft import LoraConfig

    return LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, task_type="CAUSAL_LM",
        target_modules=rf".*language_model.*\.({'|'.join(cfg.lora_targets.split(','))})",
        modules_to_save=["multi_modal_projector", *(["vision_tower"] if cfg.train_vision else [])],
    )  # fmt: skip


def load_weights(folder: Path, base: Base, cfg: Config, dtype: str):
    """Weights of a folder into the real class; a missing or unexpected one is an error, never left at random."""
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    kind = TORCH_DTYPES[dtype]
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind,
        bnb_4bit_quant_storage=kind, llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    ) if cfg.load_in_4bit else None  # fmt: skip
    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype=kind,
        attn_implementation=cfg.attn,
        quantization_config=four,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_loaded ends the run, and names them
        local_files_only=True,
    )
    check_loaded(report, folder)
    tokenizer = base.processor.tokenizer
    model.generation_config.update(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model


def choose_trained(model: nn.Module, cfg: Config) -> None:
    """All of the model, or nothing before LoRA is added; the vision tower only when asked."""
    model.requires_grad_(not cfg.lora_r)
    tower = model.model.vision_tower
    tower.requires_grad_(cfg.train_vision)
    if (
        not cfg.train_vision
    ):  # else gradient checkpointing goes back through it for nothing (it makes inputs require gradients)
        tower.forward = torch.no_grad()(tower.forward)


def core(model: nn.Module) -> nn.Module:
    """The LlavaForConditionalGeneration inside PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------


@torch.no_grad()
def generate_answers(
    model: nn.Module, base: Base, items: list[tuple[np.ndarray, str]], cfg: Config
) -> list[str]:
    """Greedy answers to [(uint8 (F, S, S, 3), question)], in one batch."""
    device, zero3 = next(model.parameters()).device, any(hasattr(p, "ds_id") for p in model.parameters())
    tokenizer, prompts = base.processor.tokenizer, []
    for clip, question in items:
        content = [{"type": "image"}] * len(clip) + [{"type": "text", "text": question}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=TEMPLATE,
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        prompts.append(expand(prompt, prompt, base)[0])
    tokens = pad(prompts, tokenizer.pad_token_id, left=True).to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(device)
    pixels = pixel_values([clip for clip, _ in items], base, cfg.dtype).to(device)
    out = model.generate(
        input_ids=tokens, attention_mask=mask, pixel_values=pixels, max_new_tokens=cfg.max_new_tokens, do_sample=False,
        synced_gpus=zero3,
    )  # fmt: skip
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
    ]


def scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """exact (without case, blanks and a full stop at the end), BLEU (Post 2018) and ROUGE-L F (Lin 2004), each 0 to 1"""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    rouge = RougeScorer(["rougeL"])
    return {
        "exact": float(np.mean([plain(a) == plain(r) for a, r in zip(answers, references)])),
        "bleu": BLEU(effective_order=True).corpus_score(answers, [references]).score
        / 100,  # one word has no 4-grams
        "rouge_l": float(
            np.mean([rouge.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references)])
        ),
    }


def chosen_questions(held_out: list[Sample], count: int) -> list[tuple[int, QA]]:
    """Up to `count` (sample, question), spread evenly, the same in every evaluation."""
    every = [(i, qa) for i, sample in enumerate(held_out) for qa in sample.qa]
    return [every[i * len(every) // min(count, len(every))] for i in range(min(count, len(every)))]


def evaluate(model: nn.Module, base: Base, data: Data, cfg: Config) -> dict:
    """Every rank: the fixed questions of the held-out part, asked with the frames in order, shuffled, reversed and blanked, and
    the loss there. -> {"held_out_loss", "in order": {"exact", "bleu", "rouge_l", "kinds": {kind: exact}}, ..., "answers"}"""
    was_training = model.training
    model.eval()
    asked = chosen_questions(data.held_out, cfg.eval_questions)
    mine = list(range(rank(), len(asked), world_size()))
    rounds = -(-len(asked) // world_size())  # under ZeRO-3 all ranks must go through the model equally often
    mine += [mine[-1] if mine else 0] * (rounds - len(mine))
    result: dict[str, Any] = {"held_out_loss": held_out_loss(model, base, data, cfg)}
    for how in SHUFFLES:
        answers: dict[int, str] = {}
        for start in range(
            0, rounds, cfg.batch_size
        ):  # a sequence's cache of keys and values is about its training memory
            part = mine[start : start + cfg.batch_size]
            clips = [rearrange_frames(data.held_out[asked[i][0]].load(cfg.frames), how, i) for i in part]
            items = [(clip, asked[i][1].question) for clip, i in zip(clips, part)]
            answers |= dict(zip(part, generate_answers(model, base, items, cfg)))
        answers = {i: answer for several in from_all_ranks(answers) for i, answer in several.items()}
        given, references = [answers[i] for i in range(len(asked))], [qa.answer for _, qa in asked]
        result[how] = scores(given, references)
        kinds = dict.fromkeys(qa.kind for _, qa in asked if qa.kind)
        hits = {
            kind: [plain(g) == plain(qa.answer) for g, (_, qa) in zip(given, asked) if qa.kind == kind]
            for kind in kinds
        }
        result[how]["kinds"] = {kind: float(np.mean(hit)) for kind, hit in hits.items()}
        if how == "in order":
            rows = zip(asked, given)
            result["answers"] = [
                {"question": qa.question, "answer": qa.answer, "given": g, "sample": i} for (i, qa), g in rows
            ]
    model.train(was_training)
    return result


@torch.no_grad()
def held_out_loss(model: nn.Module, base: Base, data: Data, cfg: Config) -> float:
    """Mean over the supervised tokens of up to 64 held-out sequences."""
    device, collate = next(model.parameters()).device, Collator(base, cfg)
    count = min(64, len(data.held_out))
    rounds = -(-count // world_size())
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(rounds):
        place = rank() + i * world_size()
        sample = data.held_out[min(place, count - 1)]
        batch = collate([(sample.load(cfg.frames), sample.qa)])
        loss, tokens = answer_loss(model, {name: value.to(device) for name, value in batch.items()})
        if place < count:
            total += torch.tensor([loss.item(), tokens])
    sums = [over_ranks(value, "mean") for value in total.tolist()]
    return sums[0] / sums[1]


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(cross-entropy summed over the supervised tokens, their number). The head runs on the positions that any sequence of the
    micro-batch supervises, and not on thousands of image tokens: 2.2 GB less at 5 frames of 729 tokens and 152,000 words."""
    labels = batch["labels"][:, 1:]
    positions = (labels != -100).any(0).nonzero()[:, 0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits  # (B, positions, vocabulary)
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), labels[:, positions].flatten(), ignore_index=-100, reduction="sum"
    )
    return loss, int((labels != -100).sum())


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
METHODS = {
    "full fine-tuning": (0, False),
    "LoRA": (16, False),
    "LoRA, 4 bits": (16, True),
}  # (lora_r, 4-bit weights)


@dataclass(frozen=True)
class Sizes:
    parameters: int  # of the model, without LoRA's
    trained: int  # parameters
    frozen_bytes: int
    plain: int  # bytes one micro-batch keeps for the backward pass
    checkpointed: int  # the same with gradient checkpointing


def measure(base: Base, cfg: Config, dtype: str, tokens: int, supervised: int, four_bit: bool) -> Sizes:
    """Counted on the meta device, at a micro-batch of sequences of `tokens`: no memory, no arithmetic. Exit 2 for LoRA targets
    that the language model does not have."""
    from peft import get_peft_model
    from transformers import LlavaForConditionalGeneration

    kind = TORCH_DTYPES[dtype]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(base.config).to(kind)
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    linear = {n: m for n, m in model.model.language_model.named_modules() if isinstance(m, nn.Linear)}
    choose_trained(model, cfg)
    if cfg.lora_r:
        names = {name.split(".")[-1] for name in linear}
        if wrong := [name for name in cfg.lora_targets.split(",") if name not in names]:
            refuse(
                f"--lora_targets {wrong[0]}: no such layer; the language model has {', '.join(sorted(names))}"
            )
        model = get_peft_model(model, lora_config(cfg), autocast_adapter_dtype=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = (parameters - (0 if cfg.lora_r else trained)) * kind.itemsize
    if (
        four_bit
    ):  # 4 bits and a share of the scales, which are quantized too (Dettmers et al. 2023, section 3)
        frozen_bytes -= int(
            sum(layer.weight.numel() for layer in linear.values()) * (kind.itemsize - 4.127 / 8)
        )

    inner, text = core(model).model, base.config.text_config
    layers, batch, width = inner.language_model.layers, cfg.batch_size, text.hidden_size

    def kept(count: int) -> int:
        inner.language_model.layers = layers[:count]
        with torch.device("meta"):
            embedded = torch.empty(batch, tokens, width, dtype=kind, requires_grad=True)
            places = torch.arange(tokens)[None]
            mask = {"full_attention": None}  # causal, as SDPA does it by itself
            call = functools.partial(
                inner.language_model, inputs_embeds=embedded, position_ids=places, attention_mask=mask
            )
            return saved_bytes(lambda: call(use_cache=False), model)

    one, two = kept(1), kept(2)
    layer = two - one
    with torch.device("meta"):
        vision = base.config.vision_config
        features = torch.empty(batch * cfg.frames, base.tokens_per_frame, vision.hidden_size, dtype=kind)
        around = saved_bytes(lambda: inner.multi_modal_projector(features), model)
        if cfg.train_vision:
            pictures = torch.empty(batch * cfg.frames, 3, base.size, base.size, dtype=kind)
            around += saved_bytes(lambda: inner.vision_tower(pictures), model)
    around += (
        batch * supervised * text.vocab_size * (kind.itemsize + 8)
    )  # logits, in fp32, and their gradient
    plain = one + (len(layers) - 1) * layer + around
    checkpointed = one + (len(layers) - 1) * batch * tokens * width * kind.itemsize + around
    return Sizes(parameters, trained, frozen_bytes, plain, checkpointed)


def layouts(
    sizes: Sizes, checkpointing: str, four_bit: bool, dtype: str, devices: int, local: int | None = None
) -> list[dict]:
    """memory_rows; 4-bit weights are not partitioned, so they have no ZeRO-3."""
    kept = {on: sizes.checkpointed if on else sizes.plain for on in CHECKPOINTING[checkpointing]}
    rows = memory_rows(sizes.trained, sizes.frozen_bytes, kept, dtype, devices, local)
    return [row for row in rows if not (four_bit and "ZeRO-3" in row["layout"])]


def machine_table(base: Base, cfg: Config, tokens: int, supervised: int) -> str:
    """What fits on which machine, by arithmetic: for --check."""
    lines = ["machines estimated: the least offloading that fits, GB per GPU, GB of RAM"]
    for method, (lora_r, four_bit) in METHODS.items():
        asked = dataclasses.replace(cfg, batch_size=1, lora_r=lora_r)
        sizes = measure(base, asked, "bf16", tokens, supervised, four_bit)
        for machine, (devices, gpu, dtype) in MACHINES.items():
            rows = layouts(sizes, "auto", four_bit, dtype, devices, local=devices)
            fits = next((row for row in rows if row["gpu_gb"] < 0.92 * gpu), None)
            told = (
                f"{fits['layout']:<40}{fits['gpu_gb']:6.1f}{fits['host_gb']:8.1f}" if fits else "does not fit"
            )
            lines.append(f"  {machine:<20}{method:<18}{told}")
    return "\n".join(lines)


def plan(cfg: Config, base: Base, data: Data, device: torch.device) -> dict:
    """Print what this run is going to do, and check that it fits. -> the row of the memory plan that is taken"""
    world, dtype = world_size(), cfg.dtype
    collate = Collator(base, cfg)
    some = data.train[:: max(1, len(data.train) // 256)]
    lengths = [
        (len(ids), sum(label >= 0 for label in labels))
        for ids, labels in (collate.sequence(s.qa) for s in some)
    ]
    tokens, supervised = max(length for length, _ in lengths), max(count for _, count in lengths)
    limit = base.config.text_config.max_position_embeddings
    if tokens > limit:
        refuse(
            f"sequences of {tokens} tokens, {base.source} takes {limit}: lower --frames {cfg.frames} or --max_turns"
        )
    sizes = measure(base, cfg, dtype, tokens, supervised, cfg.load_in_4bit)
    rows = layouts(sizes, cfg.gradient_checkpointing, cfg.load_in_4bit, dtype, world)
    memory, row = choose_layout(
        rows, cfg.deepspeed, "take --load_in_4bit, fewer --frames, or a lower --lora_r"
    )
    state = sizes.trained * (12 + TORCH_DTYPES[dtype].itemsize)
    whole = sizes.trained if cfg.lora_r else sizes.parameters
    free, need = (
        disk_free(cfg.output_dir) / GB,
        ((cfg.keep + 1) * state + whole * TORCH_DTYPES[dtype].itemsize) / GB,
    )
    method = f"LoRA r {cfg.lora_r} and the projector" if cfg.lora_r else "full fine-tuning"
    method += (", 4-bit weights" if cfg.load_in_4bit else "") + (", vision tower" if cfg.train_vision else "")
    questions = [sum(len(sample.qa) for sample in part) for part in (data.train, data.held_out)]
    source = (
        cfg.manifest
        or cfg.video_dir
        or cfg.dataset
        or ("moving shapes" if cfg.demo else "four public samples")
    )
    stages = f", {len(curriculum(data.train, True))} stages by answer length" if cfg.curriculum else ""
    seen = "" if data.held_out is not data.train else " (the same: there is one video)"
    lines = [
        f"Out: {cfg.output_dir} | Device: {device_name(device)}, {dtype}",
        f"data     {source}: {len(data.train)} sequences with {questions[0]} questions to train on, {len(data.held_out)} with "
        f"{questions[1]} held out{seen}, {len(data.bad)} left out as bad{stages}",
        f"frames   {cfg.frames} of {base.size}x{base.size}, {base.tokens_per_frame} tokens each",
        f"loss     on {sum(c for _, c in lengths)} of {sum(n for n, _ in lengths)} tokens in {len(some)} sequences: answers and "
        f"<|im_end|> alone; longest sequence {tokens}",
        f"model    {base.source}, {sizes.parameters / 1e6:.2f} M parameters; {method}: {sizes.trained / 1e6:.2f} M trained",
        f"steps    {cfg.steps} of {world} {'GPU' if device.type == 'cuda' else 'CPU process'} x {cfg.batch_size} clips x "
        f"{cfg.accum} accum = {world * cfg.batch_size * cfg.accum} clips per step",
        f"disk     {need:.2f} GB for checkpoints and model, {free:.1f} GB free",
        memory,
    ]
    log.info("\n".join(lines))
    if cfg.check and not cfg.demo:
        log.info(machine_table(base, cfg, tokens, supervised))
    if need > free:
        refuse(
            f"--output_dir {cfg.output_dir}: {free:.2f} GB free, the run writes {need:.2f} GB; make room or lower --keep"
        )
    return row


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


class VideoTrainer(SFTTrainer):
    """TRL's trainer with our batches and our loss; what happens between steps is in Watch."""

    def __init__(self, cfg: Config, batches: Batches, **kwargs: Any) -> None:
        from datasets import Dataset

        self.cfg, self.batches, self.loss_of_step = cfg, batches, 0.0
        # TRL wants a data set to look at; the batches come from get_train_dataloader
        super().__init__(
            train_dataset=Dataset.from_dict({"input_ids": [[0]]}), data_collator=batches.collate, **kwargs
        )

    def get_train_dataloader(self) -> Batches:
        return self.batches

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained, cfg = [p for p in self.model.parameters() if p.requires_grad], self.cfg
            self.optimizer = torch.optim.AdamW(
                trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Mean over the supervised tokens of all ranks and micro-steps of this optimizer step."""
        loss, _ = answer_loss(model, inputs)
        loss = loss / num_items_in_batch * world_size()  # DeepSpeed averages over ranks
        self.loss_of_step += loss.detach()
        return loss


def save(cfg: Config, engine: Any, facts: dict, step: int) -> None:
    """Every rank: checkpoints/step_000200 to resume from, with what is trained alone: 14 bytes a parameter in bf16."""

    def write(aside: Path) -> None:
        engine.save_checkpoint(str(aside), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)

    save_checkpoint(cfg.output_dir / "checkpoints", step, write, cfg.keep, ranks=world_size(), **facts)
    log.info(f"saved {cfg.output_dir / 'checkpoints' / f'step_{step:06d}'}")


class Watch(TrainerCallback):
    """Around the steps of the trainer: learning rate, seeds, log, checkpoints, evaluation, signals."""

    def __init__(
        self, cfg: Config, trainer: Any, resume: tuple, facts: dict, caught: list[int], bar: tqdm, on: dict
    ) -> None:
        """resume: as resume_checkpoint returns it; facts: what goes into each checkpoint; caught: signals; on: what to call after
        the "first" step, and to "evaluate" at a step."""
        self.cfg, self.trainer, self.facts, self.caught, self.bar, self.on = (
            cfg,
            trainer,
            facts,
            caught,
            bar,
            on,
        )
        self.found, self.step, self.other_ranks = resume
        self.first, self.skipped = self.step + 1, 0
        self.track = tracker(cfg.report_to, cfg.output_dir, Path(__file__).stem) if rank() == 0 else None

    def start_clock(self) -> None:
        self.since, self.since_step = time.monotonic(), self.step

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.found:
            load_engine(self.trainer.deepspeed, self.found, self.other_ranks, frozen_left_out=True)
            log.info(
                f"resumed {self.found}{', saved by another number of ranks' if self.other_ranks else ''}"
            )
        state.global_step = self.step
        self.start_clock()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        for group in self.trainer.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step)
        torch.manual_seed(seed_of(self.cfg.seed, self.step, rank()))  # of dropout
        self.trainer.loss_of_step = 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ends the process with 143 or 130 after a checkpoint when a signal comes, with 4 on divergence."""
        cfg, engine = self.cfg, self.trainer.deepspeed
        self.step = step = state.global_step
        self.bar.update()
        if step == self.first:
            self.on["first"]()
        self.skipped = count_skipped(engine, self.trainer.loss_of_step, step, cfg.lr, self.skipped)
        if step % cfg.log_every == 0 or step == cfg.steps:
            self.log_step(engine, self.mean_loss())
        stop = int(over_ranks(max(self.caught, default=0), "max"))
        saved = step % cfg.save_every == 0 or step == cfg.steps or stop
        if saved:
            save(cfg, engine, self.facts, step)
        if stop:
            log.info(
                f"stopped by {signal.Signals(stop).name} after step {step}; the same command goes on from there"
            )
            raise SystemExit(128 + stop)
        if step % cfg.eval_every == 0 and step < cfg.steps:
            row = self.on["evaluate"](step)
            if rank() == 0:
                record(cfg.output_dir, {"step": step} | row, self.track)
                write_loss_curve(cfg.output_dir, CURVES, "cross-entropy per answer token")
        if saved or step % cfg.eval_every == 0:  # the clock is for training alone
            self.start_clock()

    def mean_loss(self) -> float:
        return over_ranks(float(self.trainer.loss_of_step), "mean")

    def log_step(self, engine: Any, loss: float) -> None:
        cfg, step = self.cfg, self.step
        speed = (step - self.since_step) / (time.monotonic() - self.since)
        left = timedelta(seconds=round((cfg.steps - step) / speed))
        log.info(f"step {step:06d} | loss {loss:.4f} | {speed:.2f} steps/s | {left} left")
        self.bar.set_postfix(loss=f"{loss:.4f}")
        norm = engine.get_global_grad_norm()  # None until a first update was made
        row = {"step": step, "loss": loss, "lr": learning_rate(cfg, step - 1)}
        row |= {
            "grad_norm": math.nan if norm is None else float(norm),
            "samples_per_s": speed * engine.train_batch_size(),
        }
        record(cfg.output_dir, row | {"peak_memory_gb": peak_memory_gb()}, self.track)
        self.start_clock()


def watch_projector(model: nn.Module) -> Callable[[], None]:
    """-> what to call after the first step: it ends the run when no gradient has reached the projector."""
    projector, reached = core(model).model.multi_modal_projector, []
    hooks = [
        p.register_hook(lambda grad: reached.append(bool(grad.any())))
        for p in projector.parameters()
        if p.requires_grad
    ]

    def check() -> None:
        for hook in hooks:
            hook.remove()
        if not over_ranks(any(reached), "max"):
            raise SystemExit(
                "error: the projector got no gradient: the model answers without the video; nothing was saved"
            )

    return check


def evaluate_at(step: int, model: nn.Module, base: Base, data: Data, cfg: Config) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    result = evaluate(model, base, data, cfg)
    exact = " | ".join(f"{how} {result[how]['exact']:.2f}" for how in SHUFFLES)
    log.info(f"eval step {step:06d} | held-out loss {result['held_out_loss']:.4f} | {exact} exact")
    if rank() == 0:
        write_lines(cfg.output_dir / "samples" / f"answers_step{step:06d}.jsonl", result["answers"])
    scored = {f"{name}_{how.replace(' ', '_')}": result[how][name] for how in SHUFFLES for name in METRICS}
    return {"held_out_loss": result["held_out_loss"]} | scored


def train(cfg: Config) -> None:
    given, device = cfg, init_distributed()
    if cfg.push_to_hub:
        on_rank0(lambda: hub_check(cfg.hub_model_id, cfg.public, create=False))
        if pushes_data(cfg):
            on_rank0(lambda: hub_check(cfg.hub_dataset_id, cfg.public, create=False, kind="dataset"))
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or BASE_MODEL)
    if cfg.demo:
        build = functools.partial(demo_module("scenes").build_tiny, template=TEMPLATE)
        cfg = dataclasses.replace(cfg, model=on_rank0(lambda: tiny_model(cfg, __file__, build)))
    base = open_base(cfg.model)
    data = load_data(cfg, base)
    if not cfg.steps:
        cfg = dataclasses.replace(
            cfg, steps=math.ceil(cfg.epochs * len(data.train) / (cfg.batch_size * cfg.accum * world_size()))
        )
    row = plan(cfg, base, data, device)
    config = ds_config(row["config"], cfg.batch_size, cfg.accum, cfg.clip, cfg.dtype)
    on_rank0(lambda: check_weights(cfg.model))
    if cfg.check:
        return
    on_rank0(lambda: take_run_folder(given))
    stage = config["zero_optimization"]["stage"]
    facts = {"zero_stage": stage, "dtype": cfg.dtype, "base_model": cfg.model}
    found, step, other_ranks = resume_checkpoint(
        cfg.output_dir / "checkpoints", cfg.resume, world_size(), **facts
    )
    cfg = dataclasses.replace(
        cfg, steps=max(cfg.steps, step)
    )  # more GPUs make fewer steps of the same --epochs
    folder = on_rank0(lambda: fetch_model(cfg.model, "*"))
    repo = ""
    if cfg.push_to_hub:
        repo = on_rank0(lambda: hub_check(cfg.hub_model_id, cfg.public, create=True))
    on_rank0(lambda: prepare_run_folder(given, __file__, step, data.bad, config))
    if cfg.push_to_hub and pushes_data(cfg):
        on_rank0(lambda: push_data(cfg, data))

    if other_ranks:
        config["checkpoint"] = {"load_universal": True}
    args = SFTConfig(
        output_dir=str(cfg.output_dir), max_steps=cfg.steps, per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accum, learning_rate=cfg.lr, lr_scheduler_type="constant", weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.clip, seed=cfg.seed, bf16=cfg.dtype == "bf16", fp16=cfg.dtype == "fp16", deepspeed=config,
        use_cpu=device.type == "cpu", gradient_checkpointing=row["checkpointing"], max_length=None, packing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, logging_nan_inf_filter=False,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(cfg.seed)
    model = load_weights(
        folder, base, cfg, cfg.dtype
    )  # after SFTConfig: under ZeRO-3 each rank takes its part of the weights
    choose_trained(model, cfg)
    if cfg.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    batches = Batches(curriculum(data.train, cfg.curriculum), Collator(base, cfg), cfg, step * cfg.accum)
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=None if rank() == 0 else True)
    with bar, logging_redirect_tqdm([log]), catch_signals() as caught:
        trainer = VideoTrainer(
            cfg, batches, model=model, args=args, processing_class=base.processor,
            peft_config=lora_config(cfg) if cfg.lora_r else None,
        )  # fmt: skip
        evaluation = functools.partial(evaluate_at, model=trainer.model, base=base, data=data, cfg=cfg)
        on = {"first": watch_projector(trainer.model), "evaluate": evaluation}
        trainer.add_callback(Watch(cfg, trainer, (found, step, other_ranks), facts, caught, bar, on))
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                move = "--gradient_checkpointing on, --load_in_4bit or --deepspeed ds_zero3_offload.json"
                raise SystemExit(
                    f"error: out of memory: lower --batch_size {cfg.batch_size} or --frames {cfg.frames}, or take {move}"
                ) from error
            raise
    publish(cfg, trainer.model, base, data, repo)


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


def export(cfg: Config, model: nn.Module, base: Base) -> None:
    """Every rank: model/ with everything that was trained (with LoRA the adapter and the projector; else the model whole), the
    processor, and the scripts that ask it."""
    target = cfg.output_dir / "model"
    weights = full_weights(model, TORCH_DTYPES[cfg.dtype], lambda p: p.requires_grad or not cfg.lora_r)
    if rank() == 0:
        target.mkdir(exist_ok=True)
        vars(model).pop(
            "_weight_conversions", None
        )  # loaded under ZeRO-3 it would save other names (transformers 5.23)
        model.save_pretrained(target, state_dict=weights)
        base.processor.save_pretrained(target)
        write_json(
            target / "llava_vtt.json",
            {"frames": cfg.frames, "max_new_tokens": cfg.max_new_tokens, "dtype": cfg.dtype},
        )
        for source in (Path(__file__), Path(__file__).with_name("common.py")):
            shutil.copyfile(source, target / source.name)
        for path in target.iterdir():
            sync(path)
    barrier()


def publish(cfg: Config, model: nn.Module, base: Base, data: Data, repo: str) -> None:
    """Every rank: model/, its evaluation, its card; the Hub last. Exit code 3 when only the push failed."""
    folder, target = cfg.output_dir, cfg.output_dir / "model"
    results = on_rank0(
        lambda: json.loads(path.read_text()) if (path := folder / "results.json").exists() else {}
    )
    if results.get("steps") != cfg.steps:
        export(cfg, model, base)  # before the evaluation: a run that dies there keeps its model
        result = evaluate(model, base, data, cfg)
        results = report(result, data) | on_rank0(lambda: summary(folder, cfg.steps))
        if rank() == 0:
            answers = result["answers"]
            write_lines(folder / "samples" / "answers.jsonl", answers)
            shown = list({row["sample"]: row for row in answers}.values())[:6]
            clips = np.stack([data.held_out[row["sample"]].load(cfg.frames) for row in shown])
            titles = [f"{row['question']}  {row['given']}  (wanted: {row['answer']})" for row in shown]
            write_grid(clips, titles, folder / "samples" / "answers.png")
            if cfg.demo or cfg.push_videos:  # else no picture of a user's videos leaves the machine
                shutil.copyfile(folder / "samples" / "answers.png", target / "samples.png")
            write_loss_curve(folder, CURVES, "cross-entropy per answer token")
            shutil.copyfile(folder / "loss.png", target / "loss.png")
            write_json(folder / "results.json", results)
    if rank() == 0:
        write_card(cfg, results, base, repo)  # a late push too: it names the repo
        show(results, folder)

    def push() -> None:
        if repo:
            push_finished(target, repo, f"{Path(__file__).name}, step {cfg.steps}")
        finish(folder)

    on_rank0(push)


def report(result: dict, data: Data) -> dict:
    """-> results.json: score, controls and the table. Short answers are right or wrong; of sentences ROUGE-L tells more."""
    short = all(len(qa.answer.split()) <= 3 for sample in data.held_out for qa in sample.qa)
    metric = "exact" if short else "rouge_l"
    which = "training" if data.held_out is data.train else "held-out"
    return {
        "score": result["in order"][metric],
        "score_is": f"{'exact match' if short else 'ROUGE-L'} of {len(result['answers'])} answers about {which} clips",
        "controls": {f"frames_{how}": result[how][metric] for how in SHUFFLES[1:]},
        "needs_the_video": result["in order"][metric] - result["blanked"][metric],
        "held_out_loss": result["held_out_loss"],
        "answers": {how: result[how] for how in SHUFFLES},
    }


def show(results: dict, folder: Path) -> None:
    """The table at the end of a run, and where things are."""
    answers = results["answers"]
    lines = [
        f"\nscore                 {results['score']:.3f}   {results['score_is']}",
        f"{'frames':<20}" + "".join(f"{h:>11}" for h in SHUFFLES),
    ]
    rows = {name.replace("_", "-"): [answers[how][name] for how in SHUFFLES] for name in METRICS}
    rows |= {
        f"  {kind}": [answers[how]["kinds"][kind] for how in SHUFFLES]
        for kind in answers["in order"]["kinds"]
    }
    lines += [f"{name:<20}" + "".join(f"{value:11.3f}" for value in values) for name, values in rows.items()]
    lines += [
        f"needs the video       {results['needs_the_video']:.3f}   score in order less score blanked",
        f"held-out loss         {results['held_out_loss']:.4f}",
        f"speed                 {results['samples_per_s']:.1f} clips/s, peak memory {results['peak_memory_gb']:.2f} GB",
        f"model                 {folder / 'model'}\nanswers               {folder / 'samples' / 'answers.jsonl'}, answers.png",
    ]
    log.info("\n".join(lines))


def push_data(cfg: Config, data: Data) -> None:
    """Rank 0: the rows of both splits, with --push_videos the files, as a data set that --dataset takes. Exit 2 if that fails."""
    folder = cfg.output_dir / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # made by us, and made anew
    (folder / "videos").mkdir(parents=True)
    parts = {}
    for split, clips in zip(("train", "validation"), data.clips):
        parts[split] = []
        for number, clip in enumerate(clips):
            video = clip.video if is_url(clip.video) else Path(clip.video).name  # no path of this machine
            if cfg.push_videos and not is_url(clip.video):
                video = f"videos/{split}_{number:06d}{Path(clip.video).suffix}"
                shutil.copyfile(clip.video, folder / video)
            parts[split] += [{"video": video, "question": qa.question, "answer": qa.answer} for qa in clip.qa]
    files = "a file of this repository" if cfg.push_videos else "the name of a file that is not part of it"
    push_rows(
        folder, cfg.hub_dataset_id, cfg.public, parts, f"`video` is a URL, or {files}.", Path(__file__).name
    )


def write_card(cfg: Config, results: dict, base: Base, repo: str) -> None:
    answers, numbers = (
        results["answers"],
        {name: results[name] for name in ("score", "needs_the_video", "held_out_loss")},
    )
    numbers |= {name: results[name] for name in ("steps", "final_loss", "samples_per_s", "peak_memory_gb")}
    rows, snippet, made = card_parts(cfg.output_dir, numbers, repo)
    table = "\n".join(
        f"| {m} | " + " | ".join(f"{answers[how][m]:.3f}" for how in SHUFFLES) + " |" for m in METRICS
    )
    given = [row for _, row in read_json_lines(cfg.output_dir / "samples" / "answers.jsonl")][:6]
    cells = [
        [str(row[name]).replace("|", "/").replace("\n", " ") for name in ("question", "given", "answer")]
        for row in given
    ]
    said = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    data = cfg.manifest or cfg.video_dir or cfg.dataset
    data = (
        f"`{Path(data).name}`"
        if data
        else "generated clips of moving shapes"
        if cfg.demo
        else "four public samples"
    )
    what = f"a LoRA adapter (r {cfg.lora_r}) and the projector" if cfg.lora_r else "all weights"
    known = f"base_model: {base.source}\n" if not Path(base.source).exists() else ""
    (cfg.output_dir / "model" / "README.md").write_text(f"""---
library_name: {"peft" if cfg.lora_r else "transformers"}
pipeline_tag: video-text-to-text
{known}tags: [llava, video-text-to-text, deepspeed]
---
# {(repo or cfg.hub_model_id).split("/")[-1]}

`{Path(base.source).name if Path(base.source).exists() else base.source}`, fine-tuned to answer questions about videos
({cfg.frames} frames, evenly spread) on {data} by `llava_vtt.py`, which lies in this repository. Here are {what}.

| measured | |
|---|---|
{rows}

Score: {results["score_is"]}. How much of it needs the pictures, and their order:

| frames | {" | ".join(SHUFFLES)} |
|---|---|---|---|---|
{table}

| question | answer | wanted |
|---|---|---|
{said}

{"![samples](samples.png)" if (cfg.output_dir / "model" / "samples.png").exists() else ""}
![loss](loss.png)

```python
import sys

{snippet}
sys.path.insert(0, folder)  # llava_vtt.py and common.py, whose first lines say what they need
from llava_vtt import ask

print(ask("clip.mp4", {json.dumps(cfg.question or DEFAULT_QUESTION)}, folder))
```

{made}
""")


def ask(video: str | Path, question: str, model: str | Path) -> str:
    """The answer to a question about a video file or URL by a finished model, a folder or a Hub id.

    Raises OSError when the model cannot be found, BadSample (a ValueError) when the video cannot be used.
    """
    folder = fetch_model(str(model), "*")
    made = json.loads(path.read_text()) if (path := folder / "llava_vtt.json").exists() else {}
    adapter = folder / "adapter_config.json"
    below = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = made.get("dtype") if device.type == "cuda" or made.get("dtype") != "fp16" else "fp32"
    kept = {name: made[name] for name in ("frames", "max_new_tokens") if name in made}
    cfg = Config(report_to="none", dtype=pick_dtype(dtype), **kept)
    base = open_base(below)
    net = load_weights(fetch_model(below, "*"), base, cfg, cfg.dtype)
    if adapter.exists():
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, folder)
    path = download(str(video), cfg.cache_dir / "downloads") if is_url(str(video)) else video
    clip = extract_frames(path, cfg.frames, (base.size, base.size), base.crop)
    return generate_answers(net.to(device).eval(), base, [(clip, question)], cfg)[0]


def predict(cfg: Config) -> None:
    """--predict: print the answer, alone."""
    model = cfg.model or str(cfg.output_dir / "model")
    try:
        print(ask(cfg.predict, cfg.question, model))
    except BadSample as error:
        refuse(f"--predict {cfg.predict}: {error}")
    except (OSError, ValueError) as error:
        refuse(f"--model {model}: {brief(error)}; give a folder that a run wrote, or a Hub id")


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, {})
    predict(cfg) if cfg.predict else train(cfg)


if __name__ == "__main__":
    run(main)
