# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "av==18.1.0", "datasets==5.2.0", "deepspeed==0.19.8", "huggingface_hub==2.4.0", "matplotlib==3.11.2",
#   "numpy==2.4.6", "opencv-python-headless==5.0.0.93", "peft==0.21.2", "pillow==13.0.0", "requests==2.34.2",
#   "rouge-score==0.1.2", "sacrebleu==2.6.0", "torch>=2.6", "tqdm==4.70.1", "transformers==5.23.0",
#   "trl==1.16.0", "tyro==1.0.17",
# ]
# ///
"""Video and question to text: LLaVA-interleave 7B, with a proof that it sees the video.

    python llava_vtt.py --demo                       # minutes on 2 CPU cores: a tiny LLaVA learns motion
    python llava_vtt.py --manifest clips.jsonl       # one GPU (or a CPU): the debugging path
    ./run.sh llava_vtt.py 4 --manifest clips.jsonl   # four GPUs, logged, data set and model pushed to the Hub
    python llava_vtt.py --predict clip.mp4 --question "What happens?"

Data: --manifest, a table or a folder, or --dataset, an id of the Hub, in any of the forms that README.md
lists (conversations, messages, question and answer, multiple choice, captions). Without either, four public
samples. Training and held-out clips are split by video; all questions of a clip are turns of one
conversation.

LoRA on the language model and the whole projector are trained; --lora_r 0 trains all of the language model,
--train_vision the vision tower too, --load_in_4bit is QLoRA. The loss is on the answers and their <|im_end|>
alone. Each evaluation asks the same questions again with the frames shuffled, reversed and blanked.

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.

Measured: --demo, 7 minutes on 2 CPU cores: 0.98 of 500 answers about clips never seen are right; of the
directions 0.96, with the frames shuffled 0.21, reversed 0.00. On a GPU: not yet measured.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from common import (
    CHECKPOINTING,
    DEFAULT_QUESTION,
    QA,
    BadSample,
    Free,
    Layout,
    Lower,
    Row,
    Run,
    barrier,
    brief,
    check_loaded,
    check_settings,
    check_weights,
    copy_code,
    data_name,
    decode_rows,
    demo_module,
    epoch_order,
    extract_frames,
    fetch_model,
    fingerprint,
    finish_run,
    full_weights,
    is_url,
    local_file,
    log,
    memory_layouts,
    merged_over_ranks,
    normalized,
    on_rank0,
    open_run,
    out_of_memory,
    over_ranks,
    pad,
    pick_dtype,
    push_rows,
    pushes_data,
    rank,
    read_data,
    read_flags,
    read_json_lines,
    refuse,
    resume_engine,
    rounds,
    row_lines,
    run,
    save_run,
    saved_bytes,
    show_plan,
    split_clips,
    start_run,
    steps_line,
    tiny_model,
    training_steps,
    with_steps,
    words,
    world_size,
    write_grid,
    write_json,
    write_lines,
)

BASE_MODEL = "llava-hf/llava-interleave-qwen-7b-hf"
# ChatML, as the model was trained; what lies between the generation marks is what the loss sees.
TEMPLATE = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content if part.type == 'image' %}
{{- '<image>' + ('\\n' if loop.last else '') }}{% endfor %}
{%- for part in message.content if part.type == 'text' %}
{%- if message.role == 'assistant' %}{% generation %}{{ part.text + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ part.text + '<|im_end|>' }}{% endif %}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WARMUP = 10  # steps, when --warmup_steps is not given
SHUFFLES = ("in order", "shuffled", "reversed", "blanked")  # how frames are shown in an evaluation
METRICS = ("exact", "bleu", "rouge_l")
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
    question: str = ""  # of --predict; and what a caption answers where the data ask nothing
    max_turns: int = 8  # questions of one clip in one sequence
    val_fraction: float = 0.1  # share of the videos held out, unless the data set has such a split
    augment: bool = False  # crop, brightness and contrast, the same for all frames of a clip
    augment_flip: bool = False  # also mirror clips; off by default, for it makes left and right wrong
    curriculum: bool = False  # three stages: answers below 10 words, below 20, all
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    cache_dir: Free[Path] = Path("cache")  # decoded frames, downloads
    streaming: Free[bool] = False  # remove what was downloaded once it is decoded: for what no disk holds
    num_workers: Free[int] = 0  # threads that decode; 0: one for each core that is this rank's

    # model

    # LLaVA, a Hub id or a folder; default: LLaVA-interleave 7B, for --predict <output_dir>/model
    model: str = ""
    attn: Free[Literal["sdpa", "eager", "flash_attention_2"]] = "sdpa"  # attention kernel
    compile: Free[bool] = False  # torch.compile the decoder layers; needs a C++ compiler
    lora_r: int = 16  # rank; 0: full fine-tuning
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # of the language model
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

    predict: Free[str] = ""  # path or URL: answer --question about this video with --model and stop
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
    public: Free[bool] = False  # visibility of new repositories

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="frames max_turns batch_size accum max_new_tokens eval_questions log_every eval_every "
            "save_every keep",
            at_least_0="steps lora_r warmup_steps num_workers",
            above_0="lr clip epochs lora_alpha",
            shares="val_fraction lora_dropout max_bad",
        )
        if self.predict and not self.question:
            raise ValueError(f"--predict {self.predict}: what is to be asked? Give --question")
        if self.augment_flip and not self.augment:
            raise ValueError("--augment_flip: is part of --augment; give both")
        if self.load_in_4bit and not torch.cuda.is_available():
            raise ValueError("--load_in_4bit: needs a GPU; leave it out to debug on a CPU")
        if self.load_in_4bit and not importlib.util.find_spec("bitsandbytes"):
            raise ValueError("--load_in_4bit: pip install bitsandbytes")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError(
                "--load_in_4bit: such weights cannot be trained; give --lora_r 16, or leave it out"
            )


# A preset: the same code with other numbers. Recipe and scores: README.md and benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/llava_vtt_demo"), report_to="none", lora_r=0, train_vision=True,
    steps=3500, batch_size=16, accum=1, lr=1.4e-3, warmup_steps=50, weight_decay=0.05, beta2=0.98,
    max_new_tokens=8, eval_questions=500, log_every=100, eval_every=1000, save_every=1000,
)  # fmt: skip

# ---------------------------------------------------------------------------
# Data: videos and questions
# ---------------------------------------------------------------------------


def check_text(texts: list[QA]) -> None:
    """BadSample for what the tokenizer would take for something else"""
    if any(token in text for qa in texts for text in qa[:2] for token in ("<|im_", "<image>")):
        raise BadSample("a special token (<image>, <|im_end|>, ...) inside the text")


@on_rank0
def read_clips(cfg: Config) -> tuple[list[Row], list[dict]]:
    """-> (a clip for each video, with all its questions, bad samples)"""
    rows, bad = read_data(cfg, "answer", check=check_text)
    for row in rows if cfg.augment_flip else ():
        if SIDES & set(words(" ".join(f"{qa.question} {qa.answer}" for qa in row.texts))):
            refuse(
                f"--augment_flip: a mirrored clip makes left and right wrong, and {row.where} asks for them; "
                "leave it out"
            )
    return rows, bad


@dataclass(frozen=True)
class Sample:
    """One training sequence: the frames once, then the questions as turns of a conversation."""

    frames: Path | Any  # a .npy file of uint8 (F, S, S, 3), or a Scene of demos/scenes.py to draw
    qa: tuple[QA, ...]

    def load(self, frames: int) -> np.ndarray:
        return np.load(self.frames) if isinstance(self.frames, Path) else self.frames.draw(frames)

    def contents(self) -> tuple:
        """What makes it, wherever its file lies: the questions, and of each frame one row of pixels"""
        if not isinstance(self.frames, Path):
            return self.frames, self.qa
        pixels = np.load(self.frames, mmap_mode="r")
        return zlib.crc32(pixels[:, pixels.shape[1] // 2].tobytes()), self.qa


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
        return Sample(scene, tuple(QA(*asked) for asked in scenes.questions_of(scene)))

    steps = cfg.steps or DEMO["steps"]
    train = scenes.draw_scenes(cfg.seed, steps * cfg.batch_size * cfg.accum)
    held_out = scenes.draw_scenes(cfg.seed + 1_000_003, scenes.NUM_HELD_OUT)
    return Data([sample(scene) for scene in train], [sample(scene) for scene in held_out], bad=[])


def load_data(cfg: Config, base: Base) -> Data:
    """Every rank. Exit 2 when there is nothing to train on."""
    if cfg.demo:
        return generated_data(cfg)
    clips, bad = read_clips(cfg)
    clips, files, undecoded = decode_rows(clips, cfg.frames, base.size, cfg, base.crop)
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    videos, splits = [clip.video for clip in clips], [clip.split for clip in clips]
    parts = split_clips(videos, splits, cfg.val_fraction, cfg.seed)
    for part, indices in zip(samples, parts):
        for i in indices:
            for turn in range(0, len(clips[i].texts), cfg.max_turns):
                part.append(Sample(files[i], tuple(clips[i].texts[turn : turn + cfg.max_turns])))
    train, held_out = samples
    if not train:
        refuse("every video is in the held-out split: there is none to train on")
    return Data(train, held_out or train, bad + undecoded, tuple([clips[i] for i in part] for part in parts))


def rearrange_frames(clip: np.ndarray, how: str, seed: int) -> np.ndarray:
    """uint8 (F, H, W, 3) -> the same frames in order, shuffled, reversed, or all black"""
    if how == "shuffled":
        rng, order = np.random.default_rng(seed), np.arange(len(clip))
        while len(clip) > 1 and (order == np.arange(len(clip))).all():
            order = rng.permutation(len(clip))
        return clip[order]
    return clip[::-1] if how == "reversed" else np.zeros_like(clip) if how == "blanked" else clip


def augmented(clip: np.ndarray, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """uint8 (F, S, S, 3): one crop (85 to 100 % of a side), brightness, contrast and flip for all frames."""
    import cv2

    size = clip.shape[1]
    side = round(size * rng.uniform(0.85, 1))
    top, left = rng.integers(0, size - side + 1, 2)
    cropped = clip[:, top : top + side, left : left + side]
    clip = np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in cropped])
    contrast, brightness, mirrored = rng.uniform(0.85, 1.15), rng.uniform(-20, 20), rng.random() < 0.5
    clip = np.clip((clip - 127.5) * contrast + 127.5 + brightness, 0, 255).round().astype(np.uint8)
    return clip[:, :, ::-1] if flip and mirrored else clip


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------

Stages = list[list[Sample]]  # of --curriculum, or one


def stages_of(samples: list[Sample], by_length: bool) -> Stages:
    """The samples of each stage, of equal numbers of steps: answers below 10 words, below 20, all. A stage
    that is empty or adds nothing is left out."""
    stages: Stages = []
    for limit in (10, 20, math.inf) if by_length else (math.inf,):
        stage = []
        for sample in samples:
            if qa := tuple(qa for qa in sample.qa if len(qa.answer.split()) < limit):
                stage.append(dataclasses.replace(sample, qa=qa))
        if stage and stage not in stages:
            stages.append(stage)
    return stages


def encode_turn(qa: QA, frames: int, processor: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of one question and its answer after `frames` placeholders; labels are -100 but for
    answer and <|im_end|>."""
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
    image, wide = base.processor.image_token_id, ([], [])
    for token, label in zip(ids, labels):
        times = base.tokens_per_frame if token == image else 1
        wide[0].extend([token] * times)
        wide[1].extend([label] * times)
    return wide


def as_seen(sample: Sample, collate: VideoCollator) -> str:
    """For people: the text of its sequence, with the tokens of the frames counted"""
    image = collate.base.processor.image_token
    text = collate.base.processor.tokenizer.decode(collate.sequence(sample.qa)[0])
    return re.sub(f"({re.escape(image)})+", lambda run: f"{image} x {len(run[0]) // len(image)}", text)


def pixel_values(clips: list[np.ndarray], base: Base, dtype: str | None) -> Tensor:
    """uint8 (F, S, S, 3) clips -> (B*F, 3, S, S), scaled and normalised as the model wants it"""
    pictures = list(np.concatenate(clips))
    as_they_are = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    return base.processor.image_processor(pictures, **as_they_are)["pixel_values"].to(TORCH_DTYPES[dtype])


class VideoCollator:
    """Samples -> a batch: input_ids, attention_mask and labels (B, T), pixel_values (B*F, 3, S, S).

    A sequence is the frames once and then the turns; what they share and where turns begin is known here, so
    that turns can become branches of one prefix without a change elsewhere.
    """

    def __init__(self, base: Base, cfg: Config) -> None:
        self.base, self.cfg = base, cfg
        self.turn = lru_cache(maxsize=1 << 16)(partial(encode_turn, processor=base.processor))

    def sequence(self, turns: tuple[QA, ...]) -> tuple[list[int], list[int]]:
        """-> (ids, labels) of all turns, the frames in the first"""
        ids, labels = [], []
        for number, qa in enumerate(turns):
            turn = self.turn(qa, 0 if number else self.cfg.frames)
            ids += turn[0]
            labels += turn[1]
        return expand(ids, labels, self.base)

    def __call__(self, batch: list[tuple[np.ndarray, tuple[QA, ...]]]) -> dict[str, Tensor]:
        """[(uint8 (F, S, S, 3), turns)]. Raises ValueError when image tokens and frames do not match."""
        ids, labels = zip(*(self.sequence(turns) for _, turns in batch))
        clips, per_frame = [clip for clip, _ in batch], self.base.tokens_per_frame
        tokens = pad(ids, self.base.processor.tokenizer.pad_token_id)
        images, frames = (tokens == self.base.processor.image_token_id).sum(), sum(map(len, clips))
        if images != frames * per_frame:
            raise ValueError(f"{images} image tokens for {frames} frames of {per_frame} tokens")
        return {
            "input_ids": tokens,
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(labels, -100),
            "pixel_values": pixel_values(clips, self.base, self.cfg.dtype),
        }


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
        rng = np.random.default_rng([cfg.seed, stage, place])
        clip = sample.load(cfg.frames)
        if cfg.augment:
            clip = augmented(clip, rng, cfg.augment_flip)
        # any question may be asked first
        batch.append((clip, tuple(sample.qa[j] for j in rng.permutation(len(sample.qa)))))
    return collate(batch)


def micro_batches(
    stages: Stages, collate: VideoCollator, cfg: Config, first: int
) -> Iterator[dict[str, Tensor]]:
    """From micro-step `first` to the last; a thread prepares the next one while the GPU works."""
    pool, count = ThreadPoolExecutor(1), cfg.steps * cfg.accum
    get = partial(get_batch, stages, collate, cfg)
    ahead = pool.submit(get, first)
    for micro_step in range(first, count):
        batch, ahead = ahead.result(), pool.submit(get, min(micro_step + 1, count - 1))
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
    """Rank 0 fetches config and processor, every rank opens them. Exit 2 for all but a LLaVA with ChatML."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving, on each rank
    folder = on_rank0(fetch_model)(source, "*.json", "*.jinja", "*.txt", "tokenizer.model")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "llava":
            wanted = "LlavaForConditionalGeneration (llava) is wanted"
            refuse(f"--model {source} is of the class {config.model_type}; {wanted}")
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        refuse(f"--model {source}: {brief(error)}")
    tokenizer, pictures = processor.tokenizer, processor.image_processor
    if "<|im_end|>" not in tokenizer.get_vocab():
        move = "take a LLaVA that speaks ChatML, as llava-interleave-qwen does"
        refuse(f"--model {source}: its tokenizer has no <|im_end|>; {move}")
    processor.chat_template = TEMPLATE
    crop = bool(getattr(pictures, "do_center_crop", False))
    size = (pictures.crop_size if crop else pictures.size)["height"]
    black = np.zeros((size, size, 3), np.uint8)
    ids = processor(images=[black], text="<image>", return_tensors="pt")["input_ids"]
    tokens_per_frame = int((ids == processor.image_token_id).sum())
    return Base(source, folder, config, processor, tokens_per_frame, size, crop)


def lora_and_projector(cfg: Config):
    from peft import LoraConfig

    return LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        task_type="CAUSAL_LM",
        target_modules=rf".*language_model.*\.({'|'.join(cfg.lora_targets.split(','))})",
        modules_to_save=["multi_modal_projector", *(["vision_tower"] if cfg.train_vision else [])],
    )


def load_llava(folder: Path, base: Base, cfg: Config, dtype: str):
    """Weights of a folder into the real class; one that is missing or unexpected is an error."""
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    kind = TORCH_DTYPES[dtype]
    in_4bit = None
    if cfg.load_in_4bit:
        in_4bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind,
            bnb_4bit_quant_storage=kind,
            llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
        )
    model, loading = LlavaForConditionalGeneration.from_pretrained(
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
    if not cfg.train_vision:
        # gradient checkpointing makes inputs require gradients, and would go back through it for nothing
        tower.forward = torch.no_grad()(tower.forward)


def inner_llava(model: nn.Module) -> nn.Module:
    """The LlavaForConditionalGeneration inside PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------


@torch.no_grad()
def greedy_answers(model: nn.Module, base: Base, items: list, cfg: Config) -> list[str]:
    """-> answers to [(uint8 (F, S, S, 3), question)], in one batch."""
    device, zero3 = next(model.parameters()).device, any(hasattr(p, "ds_id") for p in model.parameters())
    tokenizer, prompts = base.processor.tokenizer, []
    for clip, question in items:
        content = [{"type": "image"}] * len(clip) + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=True
        )
        prompts.append(expand(prompt["input_ids"], prompt["input_ids"], base)[0])
    tokens = pad(prompts, tokenizer.pad_token_id, left=True).to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(device)
    pixels = pixel_values([clip for clip, _ in items], base, cfg.dtype).to(device)
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        pixel_values=pixels,
        max_new_tokens=cfg.max_new_tokens,
        do_sample=False,
        synced_gpus=zero3,
    )
    answers = tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def answer_scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """exact (see normalized), BLEU (Post 2018) and ROUGE-L F (Lin 2004), each 0 to 1"""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    rouge, pairs = RougeScorer(["rougeL"]), list(zip(answers, references))
    exact = [normalized(answer) == normalized(wanted) for answer, wanted in pairs]
    # effective order: one word has no 4-grams
    bleu = BLEU(effective_order=True).corpus_score(answers, [references]).score / 100
    rouge_l = [rouge.score(wanted, answer)["rougeL"].fmeasure for answer, wanted in pairs]
    return {"exact": float(np.mean(exact)), "bleu": bleu, "rouge_l": float(np.mean(rouge_l))}


def exact_by_kind(answers: list[str], asked: list[QA]) -> dict[str, float]:
    """{what is asked for: share of exact answers}, where the data say what"""
    hits: dict[str, list[bool]] = {}
    for answer, qa in zip(answers, asked):
        if qa.kind:
            hits.setdefault(qa.kind, []).append(normalized(answer) == normalized(qa.answer))
    return {kind: float(np.mean(hit)) for kind, hit in hits.items()}


def chosen_questions(held_out: list[Sample], count: int) -> list[tuple[int, QA]]:
    """Up to `count` (sample, question), spread evenly, the same in every evaluation."""
    every = [(i, qa) for i, sample in enumerate(held_out) for qa in sample.qa]
    return [every[i * len(every) // min(count, len(every))] for i in range(min(count, len(every)))]


def evaluate(model: nn.Module, base: Base, data: Data, cfg: Config) -> dict:
    """Every rank: the fixed questions of the held-out part, asked with the frames in order, shuffled,
    reversed and blanked, and the loss there. -> {"held_out_loss", "in order": {"exact", "bleu", "rouge_l"},
    ..., "kinds": {"in order": {kind: exact}, ...}, "answers": [{"question", "answer", "said", "sample"}]}"""
    was_training = model.training
    model.eval()
    chosen = chosen_questions(data.held_out, cfg.eval_questions)
    asked = [qa for _, qa in chosen]
    result: dict[str, Any] = {"held_out_loss": held_out_loss(model, base, data, cfg), "kinds": {}}
    for how in SHUFFLES:
        answers: dict[int, str] = {}
        # a sequence's cache of keys and values is about its training memory
        for part in rounds(len(chosen), cfg.batch_size):
            items = []
            for i in part:
                clip = data.held_out[chosen[i][0]].load(cfg.frames)
                items.append((rearrange_frames(clip, how, i), asked[i].question))
            answers |= dict(zip(part, greedy_answers(model, base, items, cfg)))
        said = list(merged_over_ranks(answers).values())
        result[how] = answer_scores(said, [qa.answer for qa in asked])
        result["kinds"][how] = exact_by_kind(said, asked)
        if how == "in order":
            result["answers"] = [
                {"question": qa.question, "answer": qa.answer, "said": text, "sample": i}
                for (i, qa), text in zip(chosen, said)
            ]
    model.train(was_training)
    return result


@torch.no_grad()
def held_out_loss(model: nn.Module, base: Base, data: Data, cfg: Config) -> float:
    """Mean over the supervised tokens of up to 64 held-out sequences."""
    device, collate, sums = next(model.parameters()).device, VideoCollator(base, cfg), {}
    for (i,) in rounds(min(64, len(data.held_out)), 1):
        sample = data.held_out[i]
        batch = collate([(sample.load(cfg.frames), sample.qa)])
        loss, tokens = supervised_loss(model, {name: value.to(device) for name, value in batch.items()})
        sums[i] = (loss.item(), tokens)
    total_loss, total_tokens = np.sum(list(merged_over_ranks(sums).values()), axis=0)
    return float(total_loss / total_tokens)


def supervised_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(cross-entropy summed over the supervised tokens, their number). The head runs on the positions that
    any sequence of the micro-batch supervises, and not on thousands of image tokens: 2.2 GB less at 5 frames
    of 729 tokens and 152,000 words."""
    labels = batch["labels"][:, 1:]
    positions = (labels != -100).any(0).nonzero()[:, 0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits  # (B, positions, vocabulary)
    wanted = labels[:, positions].flatten()
    loss = F.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=-100, reduction="sum")
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
# (lora_r, 4-bit weights)
METHODS = {"full fine-tuning": (0, False), "LoRA": (16, False), "LoRA, 4 bits": (16, True)}


@dataclass(frozen=True)
class Sizes:
    parameters: int  # of the model, without LoRA's
    trained: int  # parameters
    frozen_bytes: int
    kept: dict[bool, int]  # {with gradient checkpointing: bytes a micro-batch keeps for the backward pass}


def sizes_of(base: Base, cfg: Config, tokens: int, supervised: int, in_4bit: bool) -> Sizes:
    """Counted on the meta device, at a micro-batch of sequences of `tokens`: no memory, no arithmetic. Exit 2
    for LoRA targets that the language model does not have."""
    from peft import get_peft_model
    from transformers import LlavaForConditionalGeneration

    kind = TORCH_DTYPES[cfg.dtype]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(base.config).to(kind)
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    linear = {n: m for n, m in model.model.language_model.named_modules() if isinstance(m, nn.Linear)}
    choose_trained(model, cfg)
    if cfg.lora_r:
        names = sorted({name.split(".")[-1] for name in linear})
        if wrong := [name for name in cfg.lora_targets.split(",") if name not in names]:
            refuse(f"--lora_targets {wrong[0]}: no such layer; the language model has {', '.join(names)}")
        model = get_peft_model(model, lora_and_projector(cfg), autocast_adapter_dtype=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = (parameters - (0 if cfg.lora_r else trained)) * kind.itemsize
    if in_4bit:
        # 4 bits and a share of the scales, which are quantized too (Dettmers et al. 2023, section 3)
        in_linear = sum(layer.weight.numel() for layer in linear.values())
        frozen_bytes -= int(in_linear * (kind.itemsize - 4.127 / 8))

    inner, text = inner_llava(model).model, base.config.text_config
    layers, batch, width = inner.language_model.layers, cfg.batch_size, text.hidden_size

    def kept_by(count: int) -> int:
        """Bytes, by this many layers"""
        inner.language_model.layers = layers[:count]
        with torch.device("meta"):
            forward = partial(
                inner.language_model,
                inputs_embeds=torch.empty(batch, tokens, width, dtype=kind, requires_grad=True),
                position_ids=torch.arange(tokens)[None],
                attention_mask={"full_attention": None},  # causal, as SDPA does it by itself
                use_cache=False,
            )
            return saved_bytes(forward, model)

    first = kept_by(1)
    another = kept_by(2) - first
    with torch.device("meta"):
        vision = base.config.vision_config
        features = torch.empty(batch * cfg.frames, base.tokens_per_frame, vision.hidden_size, dtype=kind)
        around = saved_bytes(partial(inner.multi_modal_projector, features), model)
        if cfg.train_vision:
            pictures = torch.empty(batch * cfg.frames, 3, base.size, base.size, dtype=kind)
            around += saved_bytes(partial(inner.vision_tower, pictures), model)
    # logits, in fp32, and their gradient
    around += first + batch * supervised * text.vocab_size * (kind.itemsize + 8)
    a_layer = {False: another, True: batch * tokens * width * kind.itemsize}
    allowed = CHECKPOINTING[cfg.gradient_checkpointing]
    kept = {on: around + (len(layers) - 1) * a_layer[on] for on in allowed}
    return Sizes(parameters, trained, frozen_bytes, kept)


def llava_layouts(sizes: Sizes, dtype: str, in_4bit: bool, devices: int, local: int = 0) -> list[Layout]:
    """memory_layouts; 4-bit weights are not partitioned, so they have no ZeRO-3."""
    layouts = memory_layouts(sizes.trained, sizes.frozen_bytes, sizes.kept, dtype, devices, local or None)
    return [layout for layout in layouts if not (in_4bit and layout.stage == 3)]


def machines_that_fit(base: Base, cfg: Config, tokens: int, supervised: int) -> str:
    """What fits on which machine, by arithmetic: for --check."""
    lines = ["machines estimated: the least offloading that fits, GB per GPU, GB of RAM"]
    for method, (lora_r, in_4bit) in METHODS.items():
        usual = {"batch_size": 1, "dtype": "bf16", "gradient_checkpointing": "auto"}
        sizes = sizes_of(base, dataclasses.replace(cfg, lora_r=lora_r, **usual), tokens, supervised, in_4bit)
        for machine, (devices, gpu_gb, dtype) in MACHINES.items():
            layouts = llava_layouts(sizes, dtype, in_4bit, devices, devices)
            first = next((x for x in layouts if x.fits(gpu_gb, math.inf, devices)), None)
            needs = f"{first.name:<40}{first.gpu_gb:6.1f}{first.host_gb:8.1f}" if first else "does not fit"
            lines.append(f"  {machine:<20}{method:<18}{needs}")
    return "\n".join(lines)


def plan_of(cfg: Config, base: Base, data: Data, device: torch.device) -> Layout:
    """Print what this run is going to do, and check that it fits. -> the layout of memory that is taken"""
    collate, looked_at = VideoCollator(base, cfg), data.train[:: max(1, len(data.train) // 256)]
    lengths = []
    for sample in looked_at:
        ids, labels = collate.sequence(sample.qa)
        lengths.append((len(ids), sum(label >= 0 for label in labels)))
    (tokens, supervised), (all_tokens, all_supervised) = np.max(lengths, 0).tolist(), np.sum(lengths, 0)
    limit = base.config.text_config.max_position_embeddings
    if tokens > limit:
        move = f"lower --frames {cfg.frames} or --max_turns"
        refuse(f"sequences of {tokens} tokens, {base.source} takes {limit}: {move}")
    sizes = sizes_of(base, cfg, tokens, supervised, cfg.load_in_4bit)
    layouts = llava_layouts(sizes, cfg.dtype, cfg.load_in_4bit, world_size())
    low = TORCH_DTYPES[cfg.dtype].itemsize
    whole = sizes.trained if cfg.lora_r else sizes.parameters
    disk = (cfg.keep + 1) * sizes.trained * (12 + low) + whole * low
    method = f"LoRA r {cfg.lora_r} and the projector" if cfg.lora_r else "full fine-tuning"
    method += (", 4-bit weights" if cfg.load_in_4bit else "") + (", vision tower" if cfg.train_vision else "")
    questions = [sum(len(sample.qa) for sample in part) for part in (data.train, data.held_out)]
    stages = f", {len(stages_of(data.train, True))} stages by answer length" if cfg.curriculum else ""
    same = " (the same: there is one video)" if data.held_out is data.train else ""
    sequences = (
        f"{len(data.train)} sequences with {questions[0]} questions to train on, {len(data.held_out)} with "
        f"{questions[1]} held out{same}, {len(data.bad)} left out as bad{stages}"
    )
    seen = f"on {all_supervised} of {all_tokens} tokens in {len(looked_at)} sequences"
    parameters = f"{sizes.parameters / 1e6:.2f} M parameters; {method}: {sizes.trained / 1e6:.2f} M trained"
    lines = [
        ("data", f"{data_name(cfg)}: {sequences}"),
        ("frames", f"{cfg.frames} of {base.size}x{base.size}, {base.tokens_per_frame} tokens each"),
        ("loss", f"{seen}: answers and <|im_end|> alone; longest sequence {tokens}"),
        *row_lines(data.train, partial(as_seen, collate=collate)),
        ("model", f"{base.source}, {parameters}"),
        steps_line(cfg, device, "clips"),
    ]
    layout = show_plan(cfg, device, lines, layouts, advice(cfg), disk)
    if cfg.check and not cfg.demo:
        log.info(machines_that_fit(base, cfg, tokens, supervised))
    return layout


def advice(cfg: Config) -> str:
    others = "take --gradient_checkpointing on, --load_in_4bit or --deepspeed ds_zero3_offload.json"
    return f"lower --batch_size {cfg.batch_size} or --frames {cfg.frames}, or {others}"


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


def video_trainer(cfg: Config, batches: Callable[[], Iterator], **of_trl: Any) -> Any:
    """TRL's SFTTrainer with our batches, optimizer and loss, which is summed up in trainer.row["loss"]."""
    from datasets import Dataset
    from trl import SFTTrainer

    class VideoTrainer(SFTTrainer):
        def get_train_dataloader(self) -> Iterator:
            return batches()

        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                trained = [p for p in self.model.parameters() if p.requires_grad]
                self.optimizer = torch.optim.AdamW(
                    trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
                )
            return self.optimizer

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
            """Mean over the supervised tokens of all ranks and micro-steps of this optimizer step."""
            # DeepSpeed averages over ranks
            loss = supervised_loss(model, inputs)[0] / num_items_in_batch * world_size()
            self.row["loss"] = self.row.get("loss", 0.0) + loss.detach()
            return loss

    # TRL wants a data set to look at
    trainer = VideoTrainer(train_dataset=Dataset.from_dict({"input_ids": [[0]]}), **of_trl)
    trainer.row = {}
    return trainer


def open_trainer(cfg: Config, run: Run, base: Base, data: Data, checkpointing: bool) -> Any:
    """Every rank: the trainer with its model; training_steps of common.py runs around its steps."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig

    args = SFTConfig(
        output_dir=str(cfg.output_dir), max_steps=cfg.steps, per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accum, gradient_checkpointing=checkpointing, max_grad_norm=cfg.clip,
        bf16=cfg.dtype == "bf16", fp16=cfg.dtype == "fp16", deepspeed=run.config, seed=cfg.seed,
        use_cpu=not torch.cuda.is_available(), lr_scheduler_type="constant", max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, report_to="none",
        logging_nan_inf_filter=False, logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    folder = on_rank0(fetch_model)(cfg.model, "*")
    torch.manual_seed(cfg.seed)
    # after SFTConfig: under ZeRO-3 each rank takes its part of the weights
    model = load_llava(folder, base, cfg, cfg.dtype)
    choose_trained(model, cfg)
    if cfg.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    stages, collate = stages_of(data.train, cfg.curriculum), VideoCollator(base, cfg)
    trainer = video_trainer(
        cfg,
        batches=partial(micro_batches, stages, collate, cfg, run.step * cfg.accum),
        data_collator=collate,
        model=model,
        args=args,
        processing_class=base.processor,
        peft_config=lora_and_projector(cfg) if cfg.lora_r else None,
    )
    check_projector = watch_projector(trainer.model)

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            engine = trainer.deepspeed
            resume_engine(run, engine, frozen_left_out=True)
            state.global_step = run.step
            save = partial(save_run, run, engine, frozen_left_out=True)
            evaluation = partial(evaluate_at, cfg, trainer.model, base, data)
            self.steps = training_steps(run, engine, save, evaluation)
            self.begin()

        def begin(self) -> None:
            _, trainer.row = next(self.steps, (cfg.steps, {}))

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == run.step + 1:
                check_projector()
            self.begin()

    trainer.add_callback(Steps())
    trainer.remove_callback(PrinterCallback)
    return trainer


def watch_projector(model: nn.Module) -> Callable[[], None]:
    """-> what to call after the first step: it ends the run when no gradient has reached the projector."""
    projector, reached = inner_llava(model).model.multi_modal_projector, []
    trained = [p for p in projector.parameters() if p.requires_grad]
    hooks = [p.register_hook(lambda grad: reached.append(bool(grad.any()))) for p in trained]

    def check() -> None:
        for hook in hooks:
            hook.remove()
        if not over_ranks(any(reached), "max"):
            blind = "the model answers without the video; nothing was saved"
            raise SystemExit(f"error: the projector got no gradient: {blind}")

    return check


def evaluate_at(cfg: Config, model: nn.Module, base: Base, data: Data, step: int) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    result = evaluate(model, base, data, cfg)
    exact = " | ".join(f"{how} {result[how]['exact']:.2f}" for how in SHUFFLES)
    log.info(f"eval step {step:06d} | held-out loss {result['held_out_loss']:.4f} | {exact} exact")
    if rank() == 0:
        write_lines(cfg.output_dir / "samples" / f"answers_step{step:06d}.jsonl", result["answers"])
    numbers = {"held_out_loss": result["held_out_loss"]}
    for how in SHUFFLES:
        numbers |= {f"{name}_{how.replace(' ', '_')}": result[how][name] for name in METRICS}
    return numbers


def train(cfg: Config) -> None:
    from_flags = cfg
    device = open_run(cfg, cfg.hub_dataset_id if pushes_data(cfg) else "")
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or BASE_MODEL)
    if cfg.demo:
        build = partial(demo_module("scenes").build_tiny, template=TEMPLATE)
        cfg = dataclasses.replace(cfg, model=on_rank0(tiny_model)(cfg, __file__, build))
    base = open_base(cfg.model)
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
    trainer = open_trainer(cfg, run, base, data, layout.checkpointing)
    with out_of_memory(advice(cfg)):
        trainer.train()
    finish_run(
        run,
        export=partial(export, cfg, trainer.model, base),
        evaluate=partial(final_results, cfg, trainer.model, base, data),
        card=partial(card_of, cfg, base),
    )


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


def export(cfg: Config, model: nn.Module, base: Base, target: Path) -> None:
    """Every rank: model/ with everything that was trained (with LoRA the adapter and the projector; else the
    model whole), the processor, and the scripts that ask it."""
    weights = full_weights(model, TORCH_DTYPES[cfg.dtype], lambda p: p.requires_grad or not cfg.lora_r)
    if rank() == 0:
        target.mkdir(exist_ok=True)
        # loaded under ZeRO-3 it would save other names (transformers 5.23)
        vars(model).pop("_weight_conversions", None)
        model.save_pretrained(target, state_dict=weights)
        base.processor.save_pretrained(target)
        kept = ("frames", "max_new_tokens", "dtype")
        write_json(target / "llava_vtt.json", {name: getattr(cfg, name) for name in kept})
        copy_code(target, __file__)
    barrier()


def final_results(cfg: Config, model: nn.Module, base: Base, data: Data) -> dict:
    """Every rank: what results.json says of the finished model. Short answers are right or wrong; of
    sentences ROUGE-L tells more."""
    result = evaluate(model, base, data, cfg)
    on_rank0(write_answers)(cfg, data, result["answers"])
    short = all(len(qa.answer.split()) <= 3 for sample in data.held_out for qa in sample.qa)
    metric, name = ("exact", "exact match") if short else ("rouge_l", "ROUGE-L")
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
    clips = np.stack([data.held_out[row["sample"]].load(cfg.frames) for row in one_each])
    titles = [f"{row['question']}  {row['said']}  (wanted: {row['answer']})" for row in one_each]
    write_grid(clips, titles, folder / "answers.png")
    if cfg.demo or cfg.push_videos:
        shutil.copyfile(folder / "answers.png", cfg.output_dir / "model" / "samples.png")


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
            asked = ({"question": qa.question, "answer": qa.answer} for qa in clip.texts)
            rows += [{"video": video} | part | qa for qa in asked]
    files = "a file of this repository" if cfg.push_videos else "the name of a file that is not part of it"
    about = f"`video` is a URL, or {files}."
    push_rows(folder, cfg.hub_dataset_id, cfg.public, parts, about, Path(__file__).name)


def card_of(cfg: Config, base: Base, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    lines = ["| question | answer | wanted |", "|---|---|---|"]
    for _, row in read_json_lines(cfg.output_dir / "samples" / "answers.jsonl")[:6]:
        cells = [str(row[column]).replace("|", "/") for column in ("question", "said", "answer")]
        lines.append(f"| {' | '.join(cells)} |".replace("\n", " "))
    if (cfg.output_dir / "model" / "samples.png").exists():
        lines += ["", "![samples](samples.png)"]
    local, original = Path(base.source).exists(), base.source == BASE_MODEL
    weights = f"a LoRA adapter (r {cfg.lora_r}) and the projector" if cfg.lora_r else "all weights"
    question = json.dumps(cfg.question or DEFAULT_QUESTION)
    return {
        "about": f"`{Path(base.source).name if local else base.source}`, fine-tuned to answer questions "
        f"about videos ({cfg.frames} frames, evenly spread) on `{Path(data_name(cfg)).name}` by "
        f"`llava_vtt.py`, which lies in this repository. Here are {weights}. The tables show how much of the "
        "score needs the pictures, and their order.",
        "usage": f'from llava_vtt import ask\n\nprint(ask("clip.mp4", {question}, folder))',
        "data": Path(data_name(cfg)).name,
        "more": "\n".join(lines),
        "library_name": "peft" if cfg.lora_r else "transformers",
        "pipeline_tag": "video-text-to-text",
        "base_model": "" if local else base.source,
        "license": "other" if original else "",
        "license_name": "tongyi-qianwen-research" if original else "",
        "datasets": cfg.dataset if cfg.dataset and not Path(cfg.dataset).exists() else "",
        "tags": ["llava", "video-text-to-text", "deepspeed"],
    }


def ask(video: str | Path, question: str, model: str | Path) -> str:
    """The answer to a question about a video file or URL by a finished model, a folder or a Hub id.

    Raises OSError when the model cannot be found, BadSample (a ValueError) when the video cannot be used.
    """
    folder = fetch_model(str(model), "*")
    trained = json.loads(path.read_text()) if (path := folder / "llava_vtt.json").exists() else {}
    adapter = folder / "adapter_config.json"
    below = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = trained.get("dtype") if device.type == "cuda" or trained.get("dtype") != "fp16" else "fp32"
    kept = {name: trained[name] for name in ("frames", "max_new_tokens") if name in trained}
    cfg = Config(report_to="none", dtype=pick_dtype(dtype), **kept)
    base = open_base(below)
    net = load_llava(fetch_model(below, "*"), base, cfg, cfg.dtype)
    if adapter.exists():
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, folder)
    with local_file(str(video), cfg) as path:
        clip = extract_frames(path, cfg.frames, (base.size, base.size), base.crop)
    return greedy_answers(net.to(device).eval(), base, [(clip, question)], cfg)[0]


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
