# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "av", "datasets", "deepspeed", "huggingface_hub", "matplotlib", "numpy", "opencv-python-headless", "peft", "pillow",
#   "rouge-score", "sacrebleu", "torch", "tqdm", "transformers", "tyro",
# ]
# ///
"""Question and video metadata to text: NLLB-200 600M answers in any of its 202 languages what is known of a video as text.

    python nllb_vtt.py --demo                                  # minutes on 2 CPU cores: metadata to descriptions, scored by BLEU
    python nllb_vtt.py --manifest clips.jsonl                  # one GPU of 8 GB (or a CPU): the debugging path
    ./run.sh nllb_vtt.py 4 --manifest clips.jsonl              # four GPUs, logged, data set and model pushed to the Hub
    python nllb_vtt.py --predict --question "What happens?" --metadata '{"title": "A cat", "tags": ["cat", "sofa"]}'

Data as llava_vtt.py takes them: --manifest (JSON lines, CSV, parquet), --video_dir, --dataset, or four public samples; no video
is opened. The source is the question and the columns that --source_fields names, never the answer: sources that hold their answer
word by word are counted, and refused when there are more than a few. Columns src_lang and tgt_lang win over the flags.

The generation config that is saved and pushed makes a plain generate() answer in --tgt_lang. Each evaluation generates, and shows
beside it what the most frequent answer and the copied source would score.

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.

Measured: --demo, 75 s on 2 CPU cores: BLEU 100 for 200 answers about combinations never seen (the most frequent answer: 6, the
source copied: 0), all of them exact. On a GPU: not yet measured.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from common import (
    CHECKPOINTING,
    DEFAULT_QUESTION,
    GB,
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
    demo_module,
    device_name,
    disk_free,
    ds_config,
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
    write_json,
    write_lines,
    write_loss_curve,
)

BASE_MODEL = "facebook/nllb-200-distilled-600M"
CURVES = ("loss", "held_out_loss")  # in loss.png
METRICS = ("bleu", "chrf", "rouge_l", "exact")
FIELDS = "title,tags,categories,duration,frames,num_frames,fps,transcript"  # columns that are metadata when nothing is said
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on metadata made on the spot: minutes on 2 CPU cores, no network
    check: bool = False  # all checks and the plan, no training
    output_dir: Path = Path("runs/nllb_vtt")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    manifest: Path | None = (
        None  # JSON lines, CSV or parquet: question, answer or caption (or qa), metadata, video
    )
    video_dir: Path | None = None  # x.mp4 beside x.json with a description
    dataset: str = ""  # Hub id or folder for the library datasets: video, question, caption
    source_fields: str = FIELDS  # columns that go into the source, in this order
    question: str = ""  # of --predict; and of rows that have a caption or description and no question
    src_lang: str = "eng_Latn"  # of the source, where a row has no column src_lang
    tgt_lang: str = "eng_Latn"  # of the answer, where a row has no column tgt_lang
    allow_leak: bool = False  # take data whose sources hold their answers word by word
    val_fraction: float = 0.1  # share of the videos held out, unless the data set has such a split
    curriculum: bool = False  # three stages: answers below 10 words, below 20, all
    max_bad: float = 0.05  # share of unusable samples above which the run refuses
    max_cut: float = 0.05  # share of sources longer than the model takes above which the run refuses
    cache_dir: Path = Path("cache")  # downloads

    # model

    model: str = (
        ""  # NLLB, a Hub id or a folder; default: the distilled 600M, for --predict <output_dir>/model
    )
    lora_r: int = 0  # rank; 0: full fine-tuning
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"  # auto: when it does not fit without

    # optimisation

    steps: int = 0  # optimizer steps in all, over all resumes; 0: as many as --epochs are
    epochs: float = 3.0  # passes over the training questions
    batch_size: int = 16  # questions per GPU per micro-step; lower this first when memory runs out
    accum: int = 1  # micro-steps per optimizer step
    lr: float = 5e-5  # with --lora_r take 3e-4
    warmup_steps: int = 100
    lr_decay: bool = True  # to 0 at the last step, along a cosine
    weight_decay: float = 0.01
    beta2: float = 0.98  # of AdamW
    clip: float = 1.0  # gradient norm limit
    label_smoothing: float = 0.1
    adam_8bit: bool = False  # moments in 8 bits; needs a GPU and bitsandbytes
    dtype: Literal["bf16", "fp16", "fp32"] | None = (
        None  # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    )
    deepspeed: Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])] = (
        "auto"  # JSON file, or auto: what fits
    )

    # asking

    predict: bool = False  # answer with --model and stop: --question with --metadata, or a file of them
    metadata: str = ""  # a JSON object, or a file of JSON lines with questions
    num_beams: int = 4
    max_new_tokens: int = 128  # longest answer
    eval_questions: int = 200  # of the held-out part, always the same

    # watching and saving

    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    keep: int = 2  # newest checkpoints kept
    resume: bool = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Literal["none", "tensorboard", "wandb"] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: bool = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: str = "nllb_vtt"
    hub_dataset_id: str = "nllb_vtt_data"  # the data set is pushed too, unless it came from the Hub
    public: bool = False  # visibility of new repositories

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="batch_size accum num_beams max_new_tokens eval_questions log_every eval_every save_every keep",
            above_0="lr clip epochs lora_alpha",
            shares="val_fraction lora_dropout label_smoothing max_bad max_cut",
        )
        if self.steps < 0 or self.lora_r < 0:
            raise ValueError(f"--steps {self.steps}, --lora_r {self.lora_r}: at least 0")
        given = [f"--{name}" for name in ("demo", "manifest", "video_dir", "dataset") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: the data come from one of them")
        if self.predict and not (self.question or self.metadata):
            raise ValueError(
                "--predict: what is to be asked? Give --question, or a file of questions as --metadata"
            )
        if self.adam_8bit and not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")):
            raise ValueError("--adam_8bit: needs a GPU and pip install bitsandbytes; leave it out")


# The demo is a preset: the same code with other numbers. Recipe and scores: README.md and benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/nllb_vtt_demo"), report_to="none", steps=900, batch_size=64, lr=1e-3, warmup_steps=50,
    label_smoothing=0.0, source_fields="tags,duration,frames", max_new_tokens=40, num_beams=1, log_every=100, eval_every=300,
    save_every=300,
)  # fmt: skip

# ---------------------------------------------------------------------------
# Data: questions and metadata
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    source: str
    target: str
    src_lang: str
    tgt_lang: str
    video: str  # what the split goes by
    where: str
    row: dict  # as it is pushed


def source_of(question: str, row: dict, fields: list[str]) -> str:
    """question: What happens? | title: A cat | tags: cat, sofa"""

    def text(value: Any) -> str:
        several = value if isinstance(value, (list, tuple)) else [value]
        return ", ".join(
            json.dumps(v) if isinstance(v, dict) else f"{v:g}" if isinstance(v, float) else str(v)
            for v in several
        )

    known = [f"{name}: {text(row[name])}" for name in fields if row.get(name) not in (None, "", [])]
    return " ".join(" | ".join([f"question: {question}", *known]).split())


def read_examples(cfg: Config) -> tuple[list[Example], list[str], list[dict]]:
    """-> (an example for each question, its part as split_of gives it, bad samples). Exit 2 when no row has a question, or
    a field that was asked for is nowhere."""
    if cfg.demo:
        metadata = demo_module("metadata")
        rows = metadata.generated_rows(cfg.steps * cfg.batch_size * cfg.accum, cfg.seed, held_out=False)
        rows += metadata.generated_rows(cfg.eval_questions, cfg.seed, held_out=True)
        folder = Path()
    else:
        rows, folder = all_rows(cfg, videos=False)
    default = cfg.question or (DEFAULT_QUESTION if cfg.video_dir else "")
    columns = sorted({name for _, row, _ in rows for name in row})
    if not default and not {"question", "qa"} & set(columns):
        refuse(
            f"{data_name(cfg)}: no question in any of {len(rows)} rows (columns: {', '.join(columns)}); "
            f'add a column, or ask the same of all with --question "{DEFAULT_QUESTION}"'
        )
    fields = cfg.source_fields.split(",")
    if cfg.source_fields != FIELDS and (wrong := [name for name in fields if name not in columns]):
        refuse(f"--source_fields {wrong[0]}: in none of {len(rows)} rows (columns: {', '.join(columns)})")
    examples, parts, bad = [], [], []
    for where, row, part in rows:
        pairs = row["qa"] if isinstance(row.get("qa"), list) else [row]
        for pair in (p if isinstance(p, dict) else {} for p in pairs):
            question, target = (
                pair.get("question") or default,
                first_of(pair, "answer", "caption", "description"),
            )
            video = first_of(row, "video", "video_path", "path", "file", "video_id")
            if not isinstance(question, str) or not without_mark(question):
                bad.append(
                    {"where": where, "reason": 'no question ("question", or "qa": [{"question", "answer"}])'}
                )
            elif not isinstance(target, str) or not target.strip():
                bad.append(
                    {"where": where, "reason": 'question without answer ("answer", "caption", "description")'}
                )
            else:
                name = video if isinstance(video, str) else where
                langs = [str(row.get(column) or getattr(cfg, column)) for column in ("src_lang", "tgt_lang")]
                kept = {field: row[field] for field in fields if row.get(field) not in (None, "", [])}
                shown = (
                    name if is_url(name) or not isinstance(video, str) else Path(name).name
                )  # no path of this machine
                pushed = {"video": shown, "question": without_mark(question), "answer": target.strip()} | kept
                source = source_of(without_mark(question), row, fields)
                examples.append(Example(source, target.strip(), *langs, name, where, pushed))
                parts.append(part)
    return examples, parts, bad


def data_name(cfg: Config) -> str:
    return str(
        cfg.manifest
        or cfg.video_dir
        or cfg.dataset
        or ("generated metadata" if cfg.demo else "four public samples")
    )


def leaks(example: Example) -> bool:
    """Whether the source has the answer in it word by word; answers of up to three words may well be a tag."""
    answer = words(example.target)
    return len(answer) > 3 and f" {' '.join(answer)} " in f" {' '.join(words(example.source))} "


@dataclass(frozen=True)
class Encoded:
    """An example as the model takes it."""

    source: list[int]  # [src_lang] ... </s>
    labels: list[int]  # [tgt_lang] ... </s>
    example: Example


@dataclass(frozen=True)
class Data:
    train: list[Encoded]
    held_out: list[Encoded]  # to evaluate on; the same as train when there is one video alone
    bad: list[dict]  # samples that were left out, and why
    cut: int  # sources that were longer than the model takes


def load_data(cfg: Config, base: Base) -> Data:
    """Every rank. Exit 2 when there is nothing to train on, when sources hold their answers, or too many are too long."""
    examples, parts, bad = on_rank0(lambda: read_examples(cfg))
    on_rank0(lambda: leave_out(data_name(cfg), len(examples), bad, cfg.max_bad))
    for code in sorted({code for e in examples for code in (e.src_lang, e.tgt_lang)}):
        check_language(code, base)
    leaking = [e for e in examples if leaks(e)]
    if len(leaking) > max(2, 0.01 * len(examples)) and not cfg.allow_leak:
        refuse(
            f"{data_name(cfg)}: {len(leaking)} of {len(examples)} sources have the answer in them word by word, and the model "
            f"would learn to copy; first {leaking[0].where}: {leaking[0].source[:200]!r} -> {leaking[0].target!r}\n"
            "take the column out of --source_fields, or give --allow_leak"
        )
    encoded, cut = encode(examples, base)
    if cut > cfg.max_cut * len(encoded):
        refuse(
            f"{data_name(cfg)}: {cut} of {len(encoded)} sources are longer than the {base.longest} tokens that the model takes, "
            f"more than --max_cut {cfg.max_cut}: shorten them, or name fewer --source_fields"
        )
    train, held_out = split_clips([e.video for e in examples], parts, cfg.val_fraction, cfg.seed)
    if not train:
        refuse("every row is in the held-out split: there is none to train on")
    kept = [encoded[i] for i in train]
    return Data(kept, [encoded[i] for i in held_out] or kept, bad, cut)


def encode(examples: list[Example], base: Base) -> tuple[list[Encoded], int]:
    """-> (examples as tokens, how many sources were cut)"""
    tokenizer, rows, cut = base.tokenizer, [], 0
    for e in examples:
        tokenizer.src_lang, tokenizer.tgt_lang = (
            e.src_lang,
            e.tgt_lang,
        )  # the setters change what stands in front
        source = tokenizer(e.source)["input_ids"]
        labels = tokenizer(text_target=e.target, truncation=True, max_length=base.longest)["input_ids"]
        cut += len(source) > base.longest
        rows.append(
            Encoded(
                source[: base.longest - 1] + source[-1:] if len(source) > base.longest else source, labels, e
            )
        )
    return rows, cut


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # compared by identity: a key of the cache below
class Stage:
    rows: list[Encoded]
    # Of the sources alone: batches of one answer length are of one kind of question, and teach worse (benchmarks/RESULTS.md).
    lengths: np.ndarray


def curriculum(rows: list[Encoded], by_length: bool) -> list[Stage]:
    """The stages, of equal numbers of steps: answers below 10 words, below 20, all. A stage that is empty or adds nothing is left
    out."""
    stages: list[Stage] = []
    for limit in (10, 20, math.inf) if by_length else (math.inf,):
        kept = [row for row in rows if len(row.example.target.split()) < limit]
        if kept and (not stages or len(kept) > len(stages[-1].rows)):
            stages.append(Stage(kept, np.array([len(row.source) for row in kept])))
    return stages


@functools.lru_cache(maxsize=2)
def epoch_batches(stage: Stage, size: int, seed: int, epoch: int) -> np.ndarray:
    """The batches of an epoch, (batches, size) indices: rows of about the same length together, in random order. Some rows come
    twice where the last batch would not be full."""
    rng, count = np.random.default_rng([seed, epoch]), len(stage.rows)
    order = np.resize(rng.permutation(count), -(-count // size) * size)
    pools = [
        order[i : i + 50 * size] for i in range(0, len(order), 50 * size)
    ]  # sorted within: the epoch stays random
    order = np.concatenate([pool[np.argsort(stage.lengths[pool], kind="stable")] for pool in pools])
    return order.reshape(-1, size)[rng.permutation(len(order) // size)]


def collate_rows(rows: list[Encoded], base: Base) -> dict[str, Tensor]:
    """-> input_ids, attention_mask (B, S), decoder_input_ids, labels (B, T): padded to the longest; labels with -100"""
    pad_id, start = base.tokenizer.pad_token_id, base.config.decoder_start_token_id
    return {
        "input_ids": pad([row.source for row in rows], pad_id),
        "attention_mask": pad([[1] * len(row.source) for row in rows], 0),
        "decoder_input_ids": pad([[start, *row.labels[:-1]] for row in rows], pad_id),
        "labels": pad([row.labels for row in rows], -100),
    }


def get_batch(stages: list[Stage], collate: Callable, cfg: Config, micro_step: int) -> dict[str, Tensor]:
    """This rank's batch at a micro-step: a pure function of (seed, micro-step, rank), so that a resumed run repeats the order."""
    per_stage = -(-cfg.steps * cfg.accum // len(stages))
    stage, micro_step = divmod(micro_step, per_stage)
    rows, size = stages[stage].rows, cfg.batch_size * world_size()
    epoch, place = divmod(micro_step, -(-len(rows) // size))
    batch = epoch_batches(stages[stage], size, cfg.seed, epoch)[place]
    return collate([rows[i] for i in batch[rank() :: world_size()]])


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
    config: Any  # M2M100Config
    tokenizer: Any  # NllbTokenizer
    longest: int  # tokens of a source


def open_base(source: str) -> Base:
    """Rank 0 fetches config and tokenizer, every rank opens them. Exit 2 for anything but an NLLB."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving, on each rank
    folder = on_rank0(lambda: fetch_model(source, "*.json", "*.model"))
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "m2m_100":
            kind = "an encoder-decoder" if config.is_encoder_decoder else "a decoder-only model"
            refuse(
                f"--model {source} is {kind} of the class {config.model_type}; an NLLB (m2m_100) is wanted"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        refuse(f"--model {source}: {brief(error)}")
    longest = min(config.max_position_embeddings, tokenizer.model_max_length)
    return Base(source, folder, config, tokenizer, longest)


def languages(base: Base) -> list[str]:
    """The language codes of the tokenizer, eng_Latn and the like."""
    return sorted(
        token for token in base.tokenizer.get_added_vocab() if re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", token)
    )


def check_language(code: str, base: Base) -> None:
    """Exit 2 for a code that the tokenizer does not know: it would become <unk> without a word."""
    known = languages(base)
    if base.tokenizer.convert_tokens_to_ids(code) in (base.tokenizer.unk_token_id, None) or "_" not in code:
        near = (
            difflib.get_close_matches(code, known, 5, 0.5)
            or [k for k in known if k.startswith(code[:2].lower())]
            or known
        )
        refuse(
            f"language {code}: {base.source} does not know it; near ones are {', '.join(near[:8])} (of {len(known)})"
        )


def load_weights(folder: Path, base: Base, cfg: Config):
    """Weights of a folder into the real class, which answers in cfg.tgt_lang; a missing or unexpected one is an error."""
    from transformers import M2M100ForConditionalGeneration

    model, report = M2M100ForConditionalGeneration.from_pretrained(
        folder,
        dtype=TORCH_DTYPES[cfg.dtype],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_loaded ends the run, and names them
        local_files_only=True,
    )
    check_loaded(report, folder)
    # Not in model.config: generate() refuses a model whose config was changed to control generation.
    model.generation_config.update(
        forced_bos_token_id=base.tokenizer.convert_tokens_to_ids(cfg.tgt_lang), pad_token_id=base.tokenizer.pad_token_id,
        decoder_start_token_id=base.config.decoder_start_token_id, eos_token_id=base.tokenizer.eos_token_id,
        num_beams=cfg.num_beams, max_new_tokens=cfg.max_new_tokens, max_length=None,
    )  # fmt: skip
    return model


def lora_config(cfg: Config):
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
        task_type="SEQ_2_SEQ_LM",
    )


# ---------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------


@torch.no_grad()
def generate_answers(model: nn.Module, base: Base, rows: list[Encoded], cfg: Config) -> list[str]:
    """Answers in each row's own language, by beam search, in one batch."""
    device, zero3 = next(model.parameters()).device, any(hasattr(p, "ds_id") for p in model.parameters())
    tokens = pad([row.source for row in rows], base.tokenizer.pad_token_id).to(device)
    mask = pad([[1] * len(row.source) for row in rows], 0).to(device)
    start = torch.tensor([[base.config.decoder_start_token_id, row.labels[0]] for row in rows]).to(device)
    out = model.generate(
        input_ids=tokens, attention_mask=mask, decoder_input_ids=start, forced_bos_token_id=None, num_beams=cfg.num_beams,
        max_new_tokens=cfg.max_new_tokens, do_sample=False, synced_gpus=zero3,
    )  # fmt: skip
    return [text.strip() for text in base.tokenizer.batch_decode(out[:, 2:], skip_special_tokens=True)]


def scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """BLEU (Post 2018), chrF (Popovic 2015), ROUGE-L F (Lin 2004) and exact (without case and full stop), each 0 to 1"""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU, CHRF

    class Words:  # rouge-score's own tokenizer knows the Latin alphabet alone
        tokenize = staticmethod(words)

    rouge = RougeScorer(["rougeL"], tokenizer=Words)
    return {
        "bleu": BLEU(effective_order=True).corpus_score(answers, [references]).score
        / 100,  # one word has no 4-grams
        "chrf": CHRF().corpus_score(answers, [references]).score / 100,
        "rouge_l": float(
            np.mean([rouge.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references)])
        ),
        "exact": float(np.mean([plain(a) == plain(r) for a, r in zip(answers, references)])),
    }


def evaluate(model: nn.Module, base: Base, data: Data, cfg: Config) -> dict:
    """Every rank: the fixed questions of the held-out part, and the loss there. -> {"held_out_loss", "model": {metric: value},
    "majority": the most frequent training answer instead, "source_copied", "answers"}"""
    was_training = model.training
    model.eval()
    count = min(cfg.eval_questions, len(data.held_out))
    asked = [data.held_out[i * len(data.held_out) // count] for i in range(count)]
    loss = held_out_loss(model, base, asked, cfg)
    mine = list(range(rank(), count, world_size()))
    rounds = -(-count // world_size())  # under ZeRO-3 all ranks must go through the model equally often
    mine += [mine[-1] if mine else 0] * (rounds - len(mine))
    mine.sort(key=lambda i: len(asked[i].source))  # batches of about one length
    answers: dict[int, str] = {}
    for start in range(0, rounds, cfg.batch_size):
        part = mine[start : start + cfg.batch_size]
        answers |= dict(zip(part, generate_answers(model, base, [asked[i] for i in part], cfg)))
    answers = {i: answer for several in from_all_ranks(answers) for i, answer in several.items()}
    model.train(was_training)
    given, references = [answers[i] for i in range(count)], [row.example.target for row in asked]
    majority = collections.Counter(row.example.target for row in data.train).most_common(1)[0][0]
    return {
        "held_out_loss": loss,
        "model": scores(given, references),
        "majority": scores([majority] * count, references),
        "source_copied": scores([row.example.source for row in asked], references),
        "answers": [
            {"source": r.example.source, "answer": r.example.target, "given": g} for r, g in zip(asked, given)
        ],
    }


@torch.no_grad()
def held_out_loss(model: nn.Module, base: Base, asked: list[Encoded], cfg: Config) -> float:
    """Mean over the answer tokens, without label smoothing."""
    device, total = next(model.parameters()).device, torch.zeros(2, dtype=torch.float64)
    size = cfg.batch_size * world_size()
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        mine = part[rank() :: world_size()]
        batch = {name: value.to(device) for name, value in collate_rows(mine or part[:1], base).items()}
        loss, tokens = answer_loss(model, batch, 0.0)
        if mine:
            total += torch.tensor([loss.item(), tokens])
    sums = [over_ranks(value, "mean") for value in total.tolist()]
    return sums[0] / sums[1]


def answer_loss(model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> tuple[Tensor, int]:
    """(cross-entropy summed over the answer tokens, their number)"""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    logits, labels = model(**inputs, use_cache=False).logits, batch["labels"]  # (B, T, vocabulary)
    chosen = labels != -100
    loss = F.cross_entropy(logits[chosen].float(), labels[chosen], label_smoothing=smoothing, reduction="sum")
    return loss, int(chosen.sum())


# ---------------------------------------------------------------------------
# Plan
# ---------------------------------------------------------------------------


def measure(base: Base, cfg: Config, source: int, target: int) -> tuple[int, int, int, int, int]:
    """(parameters, those that are trained, bytes of the frozen ones, bytes that a micro-batch of this many tokens keeps for the
    backward pass, the same with gradient checkpointing), counted on the meta device: no memory, no arithmetic."""
    from peft import get_peft_model
    from transformers import M2M100ForConditionalGeneration

    kind, text = TORCH_DTYPES[cfg.dtype], base.config
    with torch.device("meta"):
        model = M2M100ForConditionalGeneration._from_config(text, attn_implementation="eager").to(
            kind
        )  # sdpa looks at its mask
    parameters = sum(p.numel() for p in model.parameters())
    if cfg.lora_r:
        model = get_peft_model(model, lora_config(cfg), autocast_adapter_dtype=False)
    model.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inner, batch, width = (
        (model.get_base_model() if cfg.lora_r else model).model,
        cfg.batch_size,
        text.d_model,
    )
    encoder, decoder = (
        torch.empty(batch, n, width, dtype=kind, device="meta", requires_grad=True) for n in (source, target)
    )
    plain = saved_bytes(
        lambda: inner(inputs_embeds=encoder, decoder_inputs_embeds=decoder, use_cache=False), model
    )
    logits = batch * target * text.vocab_size * (2 * kind.itemsize + 8)  # chosen, in fp32, and their gradient
    if not cfg.lora_r:  # embeddings and head are one: backward has two gradients of it before it adds them
        logits += text.vocab_size * width * kind.itemsize
    layers = text.encoder_layers + text.decoder_layers
    once = batch * (text.encoder_layers * source + text.decoder_layers * target) * width * kind.itemsize
    frozen = (parameters if cfg.lora_r else 0) * kind.itemsize
    return parameters, trained, frozen, plain + logits, once + 2 * plain // layers + logits


def plan(cfg: Config, base: Base, data: Data, device: torch.device) -> dict:
    """Print what this run is going to do, and check that it fits. -> the row of the memory plan that is taken"""
    world, stages = world_size(), curriculum(data.train, cfg.curriculum)
    source, target = (max(len(getattr(row, name)) for row in data.train) for name in ("source", "labels"))
    parameters, trained, frozen, without, checkpointed = measure(base, cfg, source, target)
    kept = {on: checkpointed if on else without for on in CHECKPOINTING[cfg.gradient_checkpointing]}
    rows = memory_rows(trained, frozen, kept, cfg.dtype, world)
    memory, row = choose_layout(
        rows, cfg.deepspeed, f"lower --batch_size {cfg.batch_size}, or take --lora_r 16"
    )
    size = TORCH_DTYPES[cfg.dtype].itemsize
    free = disk_free(cfg.output_dir) / GB
    need = ((cfg.keep + 1) * trained * (12 + size) + (trained if cfg.lora_r else parameters) * size) / GB
    pairs = collections.Counter((e.example.src_lang, e.example.tgt_lang) for e in data.train).most_common(4)
    tokens = np.array([(len(row.source), len(row.labels)) for row in data.train])
    method = f"LoRA r {cfg.lora_r}" if cfg.lora_r else "all trained"
    lines = [
        f"Out: {cfg.output_dir} | Device: {device_name(device)}, {cfg.dtype}",
        f"data     {data_name(cfg)}: {len(data.train)} questions to train on, {len(data.held_out)} held out"
        f"{' (the same: there is one video)' if data.held_out is data.train else ''}, {len(data.bad)} left out as bad, "
        f"{data.cut} sources cut to {base.longest} tokens{f', {len(stages)} stages by answer length' if cfg.curriculum else ''}",
        f"langs    {', '.join(f'{a} -> {b} ({count})' for (a, b), count in pairs)}",
        f"tokens   source {tokens[:, 0].mean():.0f} on average, {source} at most; answer {tokens[:, 1].mean():.0f}, {target}",
        *(
            f"  {e.example.source[:110]}  ->  {e.example.target[:60]}"
            for e in data.train[:: max(1, len(data.train) // 3)][:3]
        ),
        f"model    {base.source}, {parameters / 1e6:.2f} M parameters; {method}: {trained / 1e6:.2f} M",
        f"steps    {cfg.steps} of {world} {'GPU' if device.type == 'cuda' else 'CPU process'} x {cfg.batch_size} questions x "
        f"{cfg.accum} accum = {world * cfg.batch_size * cfg.accum} questions per step",
        f"disk     {need:.2f} GB for checkpoints and model, {free:.1f} GB free",
        memory,
    ]
    log.info("\n".join(lines))
    if need > free:
        refuse(
            f"--output_dir {cfg.output_dir}: {free:.2f} GB free, the run writes {need:.2f} GB; make room or lower --keep"
        )
    return row


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


class TextTrainer(Seq2SeqTrainer):
    """The Hugging Face trainer with our batches and our loss; what happens between steps is in Watch."""

    def __init__(self, cfg: Config, batches: Batches, **kwargs: Any) -> None:
        self.cfg, self.batches, self.loss_of_step = cfg, batches, 0.0
        super().__init__(**kwargs)

    def get_train_dataloader(self) -> Batches:
        return self.batches

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained, cfg = [p for p in self.model.parameters() if p.requires_grad], self.cfg
            if cfg.adam_8bit:
                from bitsandbytes.optim import AdamW8bit

                self.optimizer = AdamW8bit(trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)
            else:
                self.optimizer = torch.optim.AdamW(
                    trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
                )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Mean over the answer tokens of all ranks and micro-steps of this optimizer step."""
        loss, _ = answer_loss(model, inputs, self.cfg.label_smoothing)
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


def evaluate_at(step: int, model: nn.Module, base: Base, data: Data, cfg: Config) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    result = evaluate(model, base, data, cfg)
    bleu = " | ".join(
        f"{who} {100 * result[who]['bleu']:.1f}" for who in ("model", "majority", "source_copied")
    )
    log.info(f"eval step {step:06d} | held-out loss {result['held_out_loss']:.4f} | BLEU {bleu}")
    if rank() == 0:
        write_lines(cfg.output_dir / "samples" / f"answers_step{step:06d}.jsonl", result["answers"])
    return {"held_out_loss": result["held_out_loss"]} | result["model"]


def train(cfg: Config) -> None:
    given, device = cfg, init_distributed()
    if cfg.push_to_hub:
        on_rank0(lambda: hub_check(cfg.hub_model_id, cfg.public, create=False))
        if pushes_data(cfg):
            on_rank0(lambda: hub_check(cfg.hub_dataset_id, cfg.public, create=False, kind="dataset"))
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or BASE_MODEL)
    if cfg.demo:
        build = functools.partial(demo_module("metadata").build_tiny, source_of=source_of)
        cfg = dataclasses.replace(cfg, model=on_rank0(lambda: tiny_model(cfg, __file__, build)))
    base = open_base(cfg.model)
    for code in (cfg.src_lang, cfg.tgt_lang):
        check_language(code, base)
    data = load_data(cfg, base)
    if not cfg.steps:
        per_step = cfg.batch_size * cfg.accum * world_size()
        cfg = dataclasses.replace(cfg, steps=math.ceil(cfg.epochs * len(data.train) / per_step))
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
    args = Seq2SeqTrainingArguments(
        output_dir=str(cfg.output_dir), max_steps=cfg.steps, per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accum, learning_rate=cfg.lr, lr_scheduler_type="constant", weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.clip, seed=cfg.seed, bf16=cfg.dtype == "bf16", fp16=cfg.dtype == "fp16", deepspeed=config,
        use_cpu=device.type == "cpu", gradient_checkpointing=row["checkpointing"], remove_unused_columns=False,
        logging_nan_inf_filter=False, logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(cfg.seed)
    model = load_weights(
        folder, base, cfg
    )  # after the arguments: under ZeRO-3 each rank takes its part of the weights
    if cfg.lora_r:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(cfg), autocast_adapter_dtype=stage != 3)
    collate = functools.partial(collate_rows, base=base)
    batches = Batches(curriculum(data.train, cfg.curriculum), collate, cfg, step * cfg.accum)
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=None if rank() == 0 else True)
    with bar, logging_redirect_tqdm([log]), catch_signals() as caught:
        trainer = TextTrainer(cfg, batches, model=model, args=args, processing_class=base.tokenizer)
        evaluation = functools.partial(evaluate_at, model=trainer.model, base=base, data=data, cfg=cfg)
        on = {"first": lambda: None, "evaluate": evaluation}
        trainer.add_callback(Watch(cfg, trainer, (found, step, other_ranks), facts, caught, bar, on))
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise SystemExit(
                    f"error: out of memory: lower --batch_size {cfg.batch_size}, or take --lora_r 16"
                ) from error
            raise
    publish(cfg, trainer.model, base, data, repo)


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


def export(cfg: Config, model: nn.Module, base: Base) -> None:
    """Every rank: model/ with everything that was trained (with LoRA the adapter, else the model whole), the tokenizer with its
    languages, and the scripts that ask it."""
    target = cfg.output_dir / "model"
    weights = full_weights(model, TORCH_DTYPES[cfg.dtype], lambda p: p.requires_grad or not cfg.lora_r)
    if rank() == 0:
        target.mkdir(exist_ok=True)
        vars(model).pop(
            "_weight_conversions", None
        )  # loaded under ZeRO-3 it would save other names (transformers 5.23)
        model.save_pretrained(target, state_dict=weights)
        base.tokenizer.src_lang, base.tokenizer.tgt_lang = cfg.src_lang, cfg.tgt_lang
        base.tokenizer.save_pretrained(target)
        if cfg.lora_r:
            model.generation_config.save_pretrained(target)
        kept = ("source_fields", "src_lang", "tgt_lang", "num_beams", "max_new_tokens", "dtype")
        write_json(target / "nllb_vtt.json", {name: getattr(cfg, name) for name in kept})
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
        which = "training" if data.held_out is data.train else "held-out"
        results = {
            "score": result["model"]["bleu"],
            "score_is": f"BLEU / 100 of {len(result['answers'])} {which} answers",
            "controls": {who: result[who]["bleu"] for who in ("majority", "source_copied")},
            "held_out_loss": result["held_out_loss"],
            "metrics": {who: result[who] for who in ("model", "majority", "source_copied")},
        } | on_rank0(lambda: summary(folder, cfg.steps))
        if rank() == 0:
            write_lines(folder / "samples" / "answers.jsonl", result["answers"])
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


def show(results: dict, folder: Path) -> None:
    """The table at the end of a run, and where things are."""
    who = ("model", "majority", "source_copied")
    lines = [f"\nscore                 {results['score']:.3f}   {results['score_is']}"]
    lines.append(f"{'':<20}" + "".join(f"{name.replace('_', ' '):>15}" for name in who))
    lines += [
        f"{m.replace('_', '-'):<20}" + "".join(f"{results['metrics'][w][m]:15.3f}" for w in who)
        for m in METRICS
    ]
    lines += [
        f"held-out loss         {results['held_out_loss']:.4f}",
        f"speed                 {results['samples_per_s']:.1f} questions/s, peak memory {results['peak_memory_gb']:.2f} GB",
        f"model                 {folder / 'model'}\nanswers               {folder / 'samples' / 'answers.jsonl'}",
    ]
    log.info("\n".join(lines))


def push_data(cfg: Config, data: Data) -> None:
    """Rank 0: the rows of both splits, without the videos, as a data set that --dataset takes. Exit 2 if that fails."""
    folder = cfg.output_dir / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # made by us, and made anew
    folder.mkdir()
    held_out = [] if data.held_out is data.train else data.held_out
    parts = {
        name: [r.example.row for r in rows]
        for name, rows in (("train", data.train), ("validation", held_out))
    }
    about = "`video` is a URL or the name of a file that is not part of it; the model sees the other columns alone."
    push_rows(folder, cfg.hub_dataset_id, cfg.public, parts, about, Path(__file__).name)


def write_card(cfg: Config, results: dict, base: Base, repo: str) -> None:
    numbers = {
        name: results[name]
        for name in ("score", "held_out_loss", "steps", "final_loss", "samples_per_s", "peak_memory_gb")
    }
    rows, snippet, made = card_parts(cfg.output_dir, numbers, repo)
    who = results["metrics"]
    table = "\n".join(
        f"| {m} | " + " | ".join(f"{values[m]:.3f}" for values in who.values()) + " |" for m in METRICS
    )
    local = Path(base.source).exists()
    first = [row for _, row in read_json_lines(cfg.output_dir / "samples" / "answers.jsonl")][0]["source"]
    of = Path(base.source).name if local else base.source
    what = "is a LoRA adapter" if cfg.lora_r else "are all weights"
    metadata = {name: "..." for name in cfg.source_fields.split(",") if f"| {name}: " in first}
    (cfg.output_dir / "model" / "README.md").write_text(f"""---
library_name: {"peft" if cfg.lora_r else "transformers"}
pipeline_tag: translation
{"" if local else f"base_model: {base.source}"}
tags: [nllb, video, deepspeed]
---
# {(repo or cfg.hub_model_id).split("/")[-1]}

`{of}`, fine-tuned to answer questions about videos from what is known of them as text, on
`{Path(data_name(cfg)).name}` by `nllb_vtt.py`, which lies in this repository. Here {what}. It answers in {cfg.tgt_lang}.

| measured | |
|---|---|
{rows}

Score: {results["score_is"]}, beside the most frequent answer and the source copied:

| | {" | ".join(name.replace("_", " ") for name in who)} |
|---|---|---|---|
{table}

![loss](loss.png)

```python
import sys

{snippet}
sys.path.insert(0, folder)  # nllb_vtt.py and common.py, whose first lines say what they need
from nllb_vtt import answer

print(answer([{json.dumps({"question": cfg.question or DEFAULT_QUESTION} | metadata)}], folder))
```

{made}
""")


def answer(rows: list[dict], model: str | Path, **asking: Any) -> list[str]:
    """Answers to rows of a question and metadata, [{"question", "title", ...}], by a finished model, a folder or a Hub id.

    asking: num_beams, max_new_tokens, src_lang, tgt_lang; what the model was trained with by default; a row's own src_lang and
    tgt_lang win. Exit 2 when the model cannot be found, or does not know a language.
    """
    folder = fetch_model(str(model), "*")
    made = json.loads(path.read_text()) if (path := folder / "nllb_vtt.json").exists() else {}
    adapter = folder / "adapter_config.json"
    below = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made["dtype"] = pick_dtype(
        made.get("dtype") if device.type == "cuda" or made.get("dtype") != "fp16" else "fp32"
    )
    cfg = Config(report_to="none", **(made | asking))
    base = open_base(below)
    net = load_weights(fetch_model(below, "*"), base, cfg)
    if adapter.exists():
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, folder)
    net, fields, examples = net.to(device).eval(), cfg.source_fields.split(","), []
    for row in rows:
        langs = [str(row.get(column) or getattr(cfg, column)) for column in ("src_lang", "tgt_lang")]
        for code in langs:
            check_language(code, base)
        examples.append(Example(source_of(row["question"], row, fields), "", *langs, "", "", row))
    encoded, cut = encode(examples, base)
    if cut:
        log.warning(f"warning: {cut} of {len(rows)} sources are cut to {base.longest} tokens")
    order, said = sorted(range(len(rows)), key=lambda i: len(encoded[i].source)), {}
    for start in range(0, len(rows), cfg.batch_size):  # of about one length
        part = order[start : start + cfg.batch_size]
        said |= dict(zip(part, generate_answers(net, base, [encoded[i] for i in part], cfg)))
    return [said[i] for i in range(len(rows))]


def predict(cfg: Config) -> None:
    """--predict: print an answer a line."""
    if Path(cfg.metadata).is_file():
        rows = [{"question": cfg.question} | row for _, row in read_json_lines(Path(cfg.metadata))]
    else:
        try:
            rows = [{"question": cfg.question} | json.loads(cfg.metadata or "{}")]
        except (ValueError, TypeError) as error:
            refuse(f"--metadata {cfg.metadata[:80]}: neither a file nor a JSON object ({error})")
    if missing := [i for i, row in enumerate(rows, 1) if not row["question"]]:
        refuse(f"--metadata {cfg.metadata}: no question in row {missing[0]}; give one to all with --question")
    asked = {name: getattr(cfg, name) for name, default in ASKING.items() if getattr(cfg, name) != default}
    print("\n".join(answer(rows, cfg.model or cfg.output_dir / "model", **asked)))


ASKING = {
    name: getattr(Config(report_to="none"), name)
    for name in ("num_beams", "max_new_tokens", "src_lang", "tgt_lang")
}


def main() -> None:
    cfg = read_flags(Config, __doc__, DEMO, {})
    predict(cfg) if cfg.predict else train(cfg)


if __name__ == "__main__":
    run(main)
