# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "datasets==5.2.0", "deepspeed==0.19.8", "huggingface_hub==2.4.0", "matplotlib==3.11.2", "numpy==2.4.6",
#   "peft==0.21.2", "rouge-score==0.1.2", "sacrebleu==2.6.0", "torch>=2.6", "tqdm==4.70.1",
#   "transformers==5.23.0", "tyro==1.0.17",
# ]
# ///
"""Question and video metadata to text: NLLB-200 600M answers in any of its 202 languages what is known of a
video as text.

    python nllb_vtt.py --demo                        # minutes on 2 CPU cores, scored by BLEU
    python nllb_vtt.py --manifest clips.jsonl        # one GPU of 8 GB (or a CPU): the debugging path
    ./run.sh nllb_vtt.py 4 --manifest clips.jsonl    # four GPUs, logged; data set and model go to the Hub
    python nllb_vtt.py --predict --question "What happens?" --metadata '{"title": "A cat", "tags": ["sofa"]}'

Data as llava_vtt.py takes them, in any of the forms that README.md lists: --manifest, --dataset, or four
public samples; no video is opened. The source is the question and the columns that --source_fields names,
never the answer: sources that hold their answer word by word are counted, and refused when there are more
than a few. Columns src_lang and tgt_lang win over the flags.

model/ is merged where LoRA was trained, and its generation config makes a plain generate() answer in
--tgt_lang. Each evaluation generates, and shows beside it what the most frequent answer of the language and
the copied source would score.

Writes the run folder described in README.md. The same command again goes on from the newest whole checkpoint.

Measured: --demo, 75 s on 2 CPU cores: BLEU 100 for 200 answers about combinations never seen (the most
frequent answer: 6, the source copied: 0), all of them exact. On a GPU: not yet measured.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

# isort: off
from common import (
    CHECKPOINTING, DEFAULT_QUESTION, Free, Layout, Lower, Run, answer_scores, barrier, batches_ahead, brief,
    check_loaded, check_settings, check_weights, copy_code, data_name, demo_module, evaluating,
    export_pretrained, fetch_model, fingerprint, finish_run, finished_model, is_undivided, is_url,
    load_pretrained, log, mean_loss, memory_layouts, merged_over_ranks, on_rank0, open_engine, open_run,
    out_of_memory, over_ranks, pad, pick_dtype, push_rows, pushes_data, rank, read_data, read_flags,
    read_json_lines, ready, refuse, refuse_adapter, rounds, row_lines, run, save_run, saved_bytes, show_plan,
    split_clips, start_run, steps_line, tiny_model, training_steps, with_steps, words, world_size, write_json,
    write_lines,
)  # fmt: skip

BASE_MODEL = "facebook/nllb-200-distilled-600M"
WARMUP = 100  # steps, when --warmup_steps is not given
ANSWERERS = ("model", "majority", "source_copied")  # the last two are controls
# columns that are metadata when nothing is said
FIELDS = "title,tags,categories,duration,frames,num_frames,fps,transcript"
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    demo: bool = False  # a tiny model on metadata made on the spot: minutes on 2 CPU cores, no network
    check: Free[bool] = False  # all checks and the plan, no training
    output_dir: Free[Path] = Path("runs/nllb_vtt")  # run folder; the same folder again resumes the run
    seed: int = 0

    # data

    # JSON, JSON lines, CSV, TSV or parquet of questions, answers and metadata, or a folder
    manifest: Free[Annotated[Path | None, tyro.conf.arg(aliases=["--video_dir"])]] = None
    dataset: Free[str] = ""  # of the Hub, ID[:config][:split], or a folder
    videos: Free[Path | None] = None  # as llava_vtt.py has it; no video is opened here
    source_fields: str = FIELDS  # columns that go into the source, in this order
    question: str = ""  # of --predict; and what a caption answers where the data ask nothing
    src_lang: str = "eng_Latn"  # of the source, where a row has no column src_lang
    tgt_lang: str = "eng_Latn"  # of the answer, where a row has no column tgt_lang
    allow_leak: Free[bool] = False  # take data whose sources hold their answers word by word
    val_fraction: float = 0.1  # share of the videos held out, unless the data set has such a split
    curriculum: bool = False  # three stages, each with those before it: answers below 10 words, below 20, all
    max_bad: Free[float] = 0.05  # share of unusable samples above which the run refuses
    max_cut: Free[float] = 0.05  # share of sources or answers too long for the model above which it refuses
    cache_dir: Free[Path] = Path("cache")  # downloads

    # model

    # NLLB, a Hub id or a folder; default: the distilled 600M, for --predict <output_dir>/model
    model: str = ""
    lora_r: int = 0  # rank; 0: full fine-tuning
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    gradient_checkpointing: Free[Literal["auto", "on", "off"]] = "auto"  # auto: when it does not fit without

    # optimisation

    steps: Free[int] = 0  # optimizer steps in all, over all resumes; 0: as many as --epochs are
    epochs: Free[float] = 3.0  # passes over the training questions
    batch_size: Lower[int] = 16  # questions per GPU per micro-step; lower this first when memory runs out
    accum: Lower[int] = 1  # micro-steps per optimizer step
    lr: Free[float] = 5e-5  # with --lora_r take 3e-4
    warmup_steps: Free[int | None] = None  # default: 100, but at most a tenth of the steps
    lr_decay: bool = True  # to 0 at the last step, along a cosine
    weight_decay: float = 0.01
    beta2: float = 0.98  # of AdamW
    clip: Free[float] = 1.0  # gradient norm limit
    label_smoothing: float = 0.1
    adam_8bit: bool = False  # moments in 8 bits; needs a GPU and bitsandbytes
    # default: bf16, fp16 on GPUs without it, fp32 on a CPU
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    # JSON file, or auto: what fits
    deepspeed: Free[Annotated[str, tyro.conf.arg(aliases=["--deepspeed_config"])]] = "auto"

    # asking

    predict: Free[bool] = False  # answer with --model and stop: --question with --metadata, or a file of them
    metadata: Free[str] = ""  # a JSON object, or a file of JSON lines with questions
    num_beams: Free[int] = 4
    max_new_tokens: Free[int] = 128  # longest answer
    eval_questions: Free[int] = 200  # of the held-out part, always the same

    # watching and saving

    log_every: Free[int] = 20
    eval_every: Free[int] = 500
    save_every: Free[int] = 500
    keep: Free[int] = 2  # newest checkpoints kept
    resume: Free[bool] = True  # --no_resume: refuse a folder that has checkpoints
    report_to: Free[Literal["none", "tensorboard", "wandb"]] = (
        "wandb" if os.environ.get("WANDB_API_KEY") else "none"
    )

    # Hub

    push_to_hub: Free[bool] = False  # needs HF_TOKEN, and HF_USER_ID or a full --hub_model_id
    hub_model_id: Free[str] = "nllb_vtt"
    hub_dataset_id: Free[str] = "nllb_vtt_data"  # the data set is pushed too, unless it came from the Hub
    adapter_only: Free[bool] = False  # model/ is the LoRA adapter, small; default: the model with it merged
    public: Free[bool] = False  # visibility of new repositories

    def __post_init__(self) -> None:
        check_settings(
            self,
            at_least_1="batch_size accum num_beams max_new_tokens eval_questions log_every eval_every "
            "save_every keep",
            at_least_0="steps lora_r warmup_steps",
            above_0="lr clip epochs lora_alpha",
            shares="val_fraction lora_dropout label_smoothing max_bad max_cut",
        )
        if self.predict and not (self.question or self.metadata):
            raise ValueError(
                "--predict: what is to be asked? Give --question, or a file of questions as --metadata"
            )
        if self.adapter_only and not self.lora_r:
            raise ValueError("--adapter_only: there is no adapter with --lora_r 0; leave it out")
        if self.adam_8bit and not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")):
            raise ValueError("--adam_8bit: needs a GPU and pip install bitsandbytes; leave it out")


# The demo is a preset: the same code with other numbers. Recipe and scores: README.md and
# benchmarks/RESULTS.md.
DEMO = dict(
    demo=True, output_dir=Path("runs/nllb_vtt_demo"), report_to="none", steps=900, batch_size=64, lr=1e-3,
    warmup_steps=50, label_smoothing=0.0, source_fields="tags,duration,frames", max_new_tokens=40,
    num_beams=1, log_every=100, eval_every=300, save_every=300,
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


@on_rank0
def read_examples(cfg: Config) -> tuple[list[Example], list[str], list[dict]]:
    """-> (an example for each question, its part as split_of gives it, bad samples). Exit 2 when a field that
    was asked for is nowhere."""
    records = None
    if cfg.demo:
        metadata = demo_module("metadata")
        records = metadata.generated_rows(cfg.steps * cfg.batch_size * cfg.accum, cfg.seed, held_out=False)
        records += metadata.generated_rows(cfg.eval_questions, cfg.seed, held_out=True)
    fields = cfg.source_fields.split(",")
    named = dict.fromkeys(fields, "--source_fields" if cfg.source_fields != FIELDS else "")
    keep = named | {"src_lang": "", "tgt_lang": ""}
    rows, bad = read_data(cfg, "answer", keep, videos=False, records=records)
    examples, parts = [], []
    for row in rows:
        cells = {name: cell for name, cell in zip(keep, row.cells) if cell is not None}
        langs = [str(cells.pop(column, getattr(cfg, column))) for column in ("src_lang", "tgt_lang")]
        # no path of this machine
        shown = row.video if is_url(row.video) else Path(row.video).name or row.where
        for question, target, *_ in row.texts:
            source = source_of(question, cells, fields)
            pushed = {"video": shown, "question": question, "answer": target} | cells
            examples.append(Example(source, target, *langs, row.video or row.where, row.where, pushed))
            parts.append(row.split)
    return examples, parts, bad


def leaks(example: Example) -> bool:
    """Whether the source has the answer in it word by word; answers of up to three words, or eight letters
    where each is a word, may well be a tag."""
    answer, blank = words(example.target), " "
    tag = 8 if is_undivided([example.target]) else 3
    source = blank.join(words(example.source))
    return len(answer) > tag and f" {blank.join(answer)} " in f" {source} "


def contradicting(examples: list[Example]) -> list[Example]:
    """Those whose source was there before with another answer in this language: no model can give both"""
    first: dict[tuple, str] = {}
    asked = ((e, first.setdefault((e.source, e.src_lang, e.tgt_lang), e.target)) for e in examples)
    return [e for e, target in asked if target != e.target]


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
    cut: tuple[int, int]  # sources, and answers, that were longer than the model takes


def load_data(cfg: Config, base: Base) -> Data:
    """Every rank. Exit 2 when there is nothing to train on, when sources hold their answers, or too many are
    too long."""
    examples, parts, bad = read_examples(cfg)
    for code in sorted({e.src_lang for e in examples} | {e.tgt_lang for e in examples}):
        check_language(code, base)
    leaking = [e for e in examples if leaks(e)]
    if len(leaking) > max(2, 0.01 * len(examples)) and not cfg.allow_leak:
        refuse(
            f"{data_name(cfg)}: {len(leaking)} of {len(examples)} sources have the answer in them word by "
            f"word, and the model would learn to copy; first {leaking[0].where}: {leaking[0].source[:200]!r} "
            f"-> {leaking[0].target!r}\n"
            "take the column out of --source_fields, or give --allow_leak"
        )
    if several := contradicting(examples):
        shown = f"first {several[0].where}: {several[0].source[:200]!r}"
        log.warning(
            f"warning: {len(several)} of {len(examples)} answers are other ones to a same source; {shown}"
        )
    encoded, cut = encode(examples, base)
    for what, count in zip(("sources", "answers"), cut):
        if count > cfg.max_cut * len(encoded):
            fewer = ", or name fewer --source_fields" if what == "sources" else ""
            refuse(
                f"{data_name(cfg)}: {count} of {len(encoded)} {what} are longer than the {base.longest} "
                f"tokens that the model takes, more than --max_cut {cfg.max_cut}: shorten them{fewer}"
            )
    train, held_out = split_clips([e.video for e in examples], parts, cfg.val_fraction, cfg.seed)
    if not train:
        refuse("every row is in the held-out split: there is none to train on")
    kept = [encoded[i] for i in train]
    return Data(kept, [encoded[i] for i in held_out] or kept, bad, cut)


def encode(examples: list[Example], base: Base) -> tuple[list[Encoded], tuple[int, int]]:
    """-> (examples as tokens, how many sources and how many answers were cut)"""
    tokenizer, rows, cut = base.tokenizer, [], [0, 0]
    for e in examples:
        # the setters change what stands in front
        tokenizer.src_lang, tokenizer.tgt_lang = e.src_lang, e.tgt_lang
        both = [tokenizer(e.source)["input_ids"], tokenizer(text_target=e.target)["input_ids"]]
        for i, ids in enumerate(both):
            if len(ids) > base.longest:
                both[i] = ids[: base.longest - 1] + ids[-1:]
                cut[i] += 1
        rows.append(Encoded(*both, e))
    return rows, (cut[0], cut[1])


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # compared by identity: a key of the cache below
class Stage:
    rows: list[Encoded]
    # Of the sources alone: batches of one answer length are of one kind of question, and teach worse
    # (benchmarks/RESULTS.md).
    lengths: np.ndarray


def curriculum(rows: list[Encoded], by_length: bool) -> list[Stage]:
    """The stages, of equal numbers of steps: answers below 10 words, below 20, all. A stage that is empty or
    adds nothing is left out."""
    stages: list[Stage] = []
    for limit in (10, 20, math.inf) if by_length else (math.inf,):
        kept = [row for row in rows if len(words(row.example.target)) < limit]
        if kept and (not stages or len(kept) > len(stages[-1].rows)):
            stages.append(Stage(kept, np.array([len(row.source) for row in kept])))
    return stages


@lru_cache(maxsize=2)
def epoch_batches(stage: Stage, size: int, seed: int, epoch: int) -> np.ndarray:
    """The batches of an epoch, (batches, size) indices: rows of about the same length together, in random
    order. Some rows come twice where the last batch would not be full."""
    rng, count = np.random.default_rng([seed, epoch]), len(stage.rows)
    order = np.resize(rng.permutation(count), -(-count // size) * size)
    # sorted within: the epoch stays random
    pools = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    order = np.concatenate([pool[np.argsort(stage.lengths[pool], kind="stable")] for pool in pools])
    return order.reshape(-1, size)[rng.permutation(len(order) // size)]


def collate_rows(rows: list[Encoded], base: Base) -> dict[str, Tensor]:
    """-> input_ids, attention_mask (B, S), decoder_input_ids, labels (B, T): padded to the longest; labels
    with -100"""
    pad_id, start = base.tokenizer.pad_token_id, base.config.decoder_start_token_id
    return {
        "input_ids": pad([row.source for row in rows], pad_id),
        "attention_mask": pad([[1] * len(row.source) for row in rows], 0),
        "decoder_input_ids": pad([[start, *row.labels[:-1]] for row in rows], pad_id),
        "labels": pad([row.labels for row in rows], -100),
    }


def get_batch(stages: list[Stage], collate: Callable, cfg: Config, micro_step: int) -> dict[str, Tensor]:
    """This rank's batch at a micro-step: a pure function of (seed, micro-step, rank), so that a resumed run
    repeats the order."""
    per_stage = -(-cfg.steps * cfg.accum // len(stages))
    stage, micro_step = divmod(micro_step, per_stage)
    rows, size = stages[stage].rows, cfg.batch_size * world_size()
    epoch, place = divmod(micro_step, -(-len(rows) // size))
    batch = epoch_batches(stages[stage], size, cfg.seed, epoch)[place]
    return collate([rows[i] for i in batch[rank() :: world_size()]])


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
    folder = on_rank0(fetch_model)(source, "*.json", "*.model")
    refuse_adapter(source, folder)
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
            f"language {code}: {base.source} does not know it; near ones are {', '.join(near[:8])} (of "
            f"{len(known)})"
        )


def load_weights(folder: Path, base: Base, cfg: Config):
    """Weights of a folder into the real class, which answers in cfg.tgt_lang; a missing or unexpected one is
    an error."""
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
        forced_bos_token_id=base.tokenizer.convert_tokens_to_ids(cfg.tgt_lang),
        pad_token_id=base.tokenizer.pad_token_id, decoder_start_token_id=base.config.decoder_start_token_id,
        eos_token_id=base.tokenizer.eos_token_id, num_beams=cfg.num_beams, max_new_tokens=cfg.max_new_tokens,
        max_length=None,
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
        input_ids=tokens, attention_mask=mask, decoder_input_ids=start, forced_bos_token_id=None,
        num_beams=cfg.num_beams, max_new_tokens=cfg.max_new_tokens, do_sample=False, synced_gpus=zero3,
    )  # fmt: skip
    return [text.strip() for text in base.tokenizer.batch_decode(out[:, 2:], skip_special_tokens=True)]


def evaluate(model: nn.Module, base: Base, data: Data, cfg: Config) -> dict:
    """Every rank: the fixed questions of the held-out part, and the loss there. -> {"held_out_loss", "model":
    answer_scores, "majority": the most frequent training answer of the language instead, "source_copied",
    "answers"}"""
    count = min(cfg.eval_questions, len(data.held_out))
    asked = [data.held_out[i * len(data.held_out) // count] for i in range(count)]
    answers: dict[int, str] = {}
    by_length = sorted(range(count), key=lambda i: len(asked[i].source))  # batches of about one length
    with evaluating(model):
        loss = held_out_loss(model, base, asked, cfg)
        for places in rounds(count, cfg.batch_size):
            part = [by_length[place] for place in places]
            answers |= dict(zip(part, generate_answers(model, base, [asked[i] for i in part], cfg)))
    answers = merged_over_ranks(answers)
    said, references = list(answers.values()), [row.example.target for row in asked]
    frequent: dict[str, collections.Counter] = {}
    for row in data.train:
        frequent.setdefault(row.example.tgt_lang, collections.Counter())[row.example.target] += 1
    majority = {lang: counts.most_common(1)[0][0] for lang, counts in frequent.items()}
    return {
        "held_out_loss": loss,
        "model": answer_scores(said, references),
        "majority": answer_scores([majority.get(row.example.tgt_lang, "") for row in asked], references),
        "source_copied": answer_scores([row.example.source for row in asked], references),
        "answers": [
            {"source": row.example.source, "answer": row.example.target, "said": text}
            for row, text in zip(asked, said)
        ],
    }


@torch.no_grad()
def held_out_loss(model: nn.Module, base: Base, asked: list[Encoded], cfg: Config) -> float:
    """Mean over the answer tokens, without label smoothing."""
    device = next(model.parameters()).device

    def loss_of(part: list[int]) -> tuple[Tensor, int]:
        batch = collate_rows([asked[i] for i in part], base)
        return answer_loss(model, {name: value.to(device) for name, value in batch.items()}, 0.0)

    return mean_loss(len(asked), cfg.batch_size, loss_of)


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


def sizes_of(base: Base, cfg: Config, source: int, target: int) -> tuple[int, int, int, dict[bool, int]]:
    """Counted on the meta device, without memory or arithmetic: (parameters, those that are trained, bytes of
    the frozen ones, {with gradient checkpointing: bytes that a micro-batch of this many tokens keeps for the
    backward pass})."""
    from peft import get_peft_model
    from transformers import M2M100ForConditionalGeneration

    kind, text = TORCH_DTYPES[cfg.dtype], base.config
    with torch.device("meta"):
        # sdpa looks at its mask
        model = M2M100ForConditionalGeneration._from_config(text, attn_implementation="eager").to(kind)
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
    layer_by_layer = saved_bytes(
        lambda: inner(inputs_embeds=encoder, decoder_inputs_embeds=decoder, use_cache=False), model
    )
    logits = batch * target * text.vocab_size * (2 * kind.itemsize + 8)  # chosen, in fp32, and their gradient
    if not cfg.lora_r:  # embeddings and head are one: backward has two gradients of it before it adds them
        logits += text.vocab_size * width * kind.itemsize
    layers = text.encoder_layers + text.decoder_layers
    once = batch * (text.encoder_layers * source + text.decoder_layers * target) * width * kind.itemsize
    frozen = (parameters if cfg.lora_r else 0) * kind.itemsize
    kept = {False: layer_by_layer + logits, True: once + 2 * layer_by_layer // layers + logits}
    return parameters, trained, frozen, {on: kept[on] for on in CHECKPOINTING[cfg.gradient_checkpointing]}


def plan_of(cfg: Config, base: Base, data: Data, device: torch.device) -> Layout:
    """Print what this run is going to do, and check that it fits. -> the layout of memory that is taken"""
    source, target = (max(len(getattr(row, name)) for row in data.train) for name in ("source", "labels"))
    parameters, trained, frozen, kept = sizes_of(base, cfg, source, target)
    layouts = memory_layouts(trained, frozen, kept, cfg.dtype, world_size())
    size = TORCH_DTYPES[cfg.dtype].itemsize
    disk = (cfg.keep + 1) * trained * (12 + size) + (trained if cfg.lora_r else 0) * size
    disk += 0 if cfg.adapter_only else parameters * size
    pairs = collections.Counter((row.example.src_lang, row.example.tgt_lang) for row in data.train)
    same = " (the same: there is one video)" if data.held_out is data.train else ""
    tokens = np.array([(len(row.source), len(row.labels)) for row in data.train])
    stages = len(curriculum(data.train, cfg.curriculum))
    method = f"LoRA r {cfg.lora_r}" if cfg.lora_r else "all trained"
    lines = [
        (
            "data",
            f"{data_name(cfg)}: {len(data.train)} questions to train on, {len(data.held_out)} held "
            f"out{same}, {len(data.bad)} left out as bad, {data.cut[0]} sources and {data.cut[1]} answers "
            f"cut to {base.longest} tokens",
        ),
        *([("", f"{stages} stages by answer length, each with those before it")] if cfg.curriculum else []),
        ("langs", ", ".join(f"{a} -> {b} ({count})" for (a, b), count in pairs.most_common(4))),
        (
            "tokens",
            f"source {tokens[:, 0].mean():.0f} on average, {source} at most; "
            f"answer {tokens[:, 1].mean():.0f}, {target}",
        ),
        *row_lines(
            data.train, lambda row: "  ->  ".join(map(base.tokenizer.decode, (row.source, row.labels)))
        ),
        ("model", f"{base.source}, {parameters / 1e6:.2f} M parameters; {method}: {trained / 1e6:.2f} M"),
        steps_line(cfg, device, "questions"),
    ]
    return show_plan(cfg, device, lines, layouts, advice(cfg), disk)


def advice(cfg: Config) -> str:
    return f"lower --batch_size {cfg.batch_size}, or take --lora_r 16"


# ---------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------


def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if cfg.adam_8bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)


def open_model(cfg: Config, run: Run, base: Base, checkpointing: bool) -> nn.Module:
    """Every rank: the model in training mode."""
    model = load_pretrained(partial(load_weights, base=base, cfg=cfg), cfg, run, checkpointing)
    if cfg.lora_r:
        from peft import get_peft_model

        torch.manual_seed(cfg.seed)  # LoRA begins the same, whatever loading took of the random numbers
        # DeepSpeed keeps fp32 weights of what it trains
        model = get_peft_model(model, lora_config(cfg), autocast_adapter_dtype=False)
    return model.train()


def train_steps(cfg: Config, run: Run, engine: Any, base: Base, data: Data) -> None:
    """From run.step to cfg.steps; the loss is the mean over the answer tokens of all ranks and micro-steps of
    a step."""
    stages, collate = curriculum(data.train, cfg.curriculum), partial(collate_rows, base=base)
    save = partial(save_run, run, engine, frozen_left_out=True)
    evaluation = partial(evaluate_at, cfg, engine.module, base, data)
    ahead = batches_ahead(partial(get_batch, stages, collate, cfg), cfg, run.step)
    for (_, row), batches in zip(training_steps(run, engine, save, evaluation), ahead):
        tokens = over_ranks(sum(int((batch["labels"] != -100).sum()) for batch in batches), "mean")
        row["loss"] = 0.0
        for batch in batches:
            batch = {name: value.to(engine.device) for name, value in batch.items()}
            loss = answer_loss(engine, batch, cfg.label_smoothing)[0] / tokens
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()  # skips the update, on all ranks, when a gradient is not finite
            row["loss"] += loss.detach()


def evaluate_at(cfg: Config, model: nn.Module, base: Base, data: Data, step: int) -> dict[str, float]:
    """Every rank: evaluate in the middle of the run. -> what goes into metrics.jsonl"""
    result = evaluate(model, base, data, cfg)
    bleu = " | ".join(f"{who} {100 * result[who]['bleu']:.1f}" for who in ANSWERERS)
    log.info(f"eval step {step:06d} | held-out loss {result['held_out_loss']:.4f} | BLEU {bleu}")
    if rank() == 0:
        write_lines(cfg.output_dir / "samples" / f"answers_step{step:06d}.jsonl", result["answers"])
    return {"held_out_loss": result["held_out_loss"]} | result["model"]


def train(cfg: Config) -> None:
    from_flags = cfg
    device = open_run(cfg, cfg.hub_dataset_id if pushes_data(cfg) else "")
    cfg = dataclasses.replace(cfg, dtype=pick_dtype(cfg.dtype), model=cfg.model or BASE_MODEL)
    if cfg.demo:
        build = partial(demo_module("metadata").build_tiny, source_of=source_of)
        cfg = dataclasses.replace(cfg, model=on_rank0(tiny_model)(cfg, __file__, build))
    base = open_base(cfg.model)
    for code in (cfg.src_lang, cfg.tgt_lang):
        check_language(code, base)
    data = load_data(cfg, base)
    cfg = with_steps(cfg, WARMUP, len(data.train), cfg.batch_size * cfg.accum * world_size())
    layout = plan_of(cfg, base, data, device)
    on_rank0(check_weights)(cfg.model)
    if cfg.check:
        return
    # the demo makes as many rows as its steps take, and its model lies in the cache: both may change
    rows = "" if cfg.demo else fingerprint((row.source, row.labels) for row in (*data.train, *data.held_out))
    loss_is = "cross-entropy per answer token"
    base_model = Path(cfg.model).name if cfg.demo else cfg.model
    run = start_run(from_flags, cfg, __file__, layout, data.bad, loss_is, base_model=base_model, data=rows)
    cfg = run.cfg
    if cfg.push_to_hub and pushes_data(cfg):
        push_data(cfg, data)
    model = open_model(cfg, run, base, layout.checkpointing)
    engine = open_engine(run, model, make_optimizer(model, cfg), frozen_left_out=True)
    with out_of_memory(advice(cfg)):
        train_steps(cfg, run, engine, base, data)
    finish_run(
        run,
        export=partial(export, cfg, engine.module, base),
        evaluate=partial(final_results, cfg, engine.module, base, data),
        card=partial(card_of, cfg, base),
    )


# ---------------------------------------------------------------------------
# The finished model: export, card, Hub
# ---------------------------------------------------------------------------


def export(cfg: Config, model: nn.Module, base: Base, target: Path) -> None:
    """Every rank: model/ as export_pretrained makes it, its tokenizer with the languages, and the scripts
    that ask it."""
    load = partial(load_weights, base=base, cfg=cfg)
    base.tokenizer.src_lang, base.tokenizer.tgt_lang = cfg.src_lang, cfg.tgt_lang
    export_pretrained(model, load, cfg, TORCH_DTYPES[cfg.dtype], base.tokenizer, target)
    if rank() == 0:
        kept = ("source_fields", "src_lang", "tgt_lang", "num_beams", "max_new_tokens", "dtype")
        write_json(target / "nllb_vtt.json", {name: getattr(cfg, name) for name in kept})
        copy_code(target, __file__)
    barrier()


def final_results(cfg: Config, model: nn.Module, base: Base, data: Data) -> dict:
    """Every rank: what results.json says of the finished model. The score is BLEU, or chrF where words are
    not divided."""
    result = evaluate(model, base, data, cfg)
    if rank() == 0:
        write_lines(cfg.output_dir / "samples" / "answers.jsonl", result["answers"])
    undivided = is_undivided(row["answer"] for row in result["answers"])
    metric, name = ("chrf", "chrF") if undivided else ("bleu", "BLEU / 100")
    which = "training" if data.held_out is data.train else "held-out"
    table = {metric: {who: result[who][metric] for who in ANSWERERS} for metric in result["model"]}
    return {
        "score": result["model"][metric],
        "score_is": f"{name} of {len(result['answers'])} {which} answers",
        "controls": {who: result[who][metric] for who in ANSWERERS[1:]},
        "held_out_loss": result["held_out_loss"],
        "tables": {"answers": table},
    }


@on_rank0
def push_data(cfg: Config, data: Data) -> None:
    """The rows of both splits, without the videos, as a data set that --dataset takes. Exit 2 if that
    fails."""
    folder = cfg.output_dir / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # made by us, and made anew
    folder.mkdir()
    parts = {"train": data.train, "validation": [] if data.held_out is data.train else data.held_out}
    parts = {name: [row.example.row for row in rows] for name, rows in parts.items()}
    about = (
        "`video` is a URL or the name of a file that is not part of it; the model sees the other columns "
        "alone."
    )
    push_rows(folder, cfg.hub_dataset_id, cfg.public, parts, about, Path(__file__).name)


def card_of(cfg: Config, base: Base, results: dict) -> dict:
    """Rank 0: what write_card wants"""
    first = read_json_lines(cfg.output_dir / "samples" / "answers.jsonl")[0][1]["source"]
    fields = {name: "..." for name in cfg.source_fields.split(",") if f"| {name}: " in first}
    asked = json.dumps({"question": cfg.question or DEFAULT_QUESTION} | fields)
    local = Path(base.source).exists()
    what = "is a LoRA adapter" if cfg.adapter_only else "are all weights"
    if cfg.lora_r and not cfg.adapter_only:
        what += ", LoRA merged into them; `adapter/` is the adapter alone"
    return {
        "about": f"`{Path(base.source).name if local else base.source}`, fine-tuned to answer questions "
        f"about videos from what is known of them as text, on `{Path(data_name(cfg)).name}` by "
        f"`nllb_vtt.py`, which lies in this repository. Here {what}. It answers in {cfg.tgt_lang}.",
        "usage": f"from nllb_vtt import answer\n\nprint(answer([{asked}], folder))",
        "data": Path(data_name(cfg)).name,
        "library_name": "peft" if cfg.adapter_only else "transformers",
        "pipeline_tag": "translation",
        "base_model": "" if local else base.source,
        "license": "cc-by-nc-4.0" if base.source == BASE_MODEL else "",
        "datasets": cfg.dataset if cfg.dataset and not Path(cfg.dataset).exists() else "",
        "tags": ["nllb", "video", "deepspeed"],
    }


def answer(rows: list[dict], model: str | Path, **asking: Any) -> list[str]:
    """Answers to rows of a question and metadata, [{"question", "title", ...}], by a finished model, a folder
    or a Hub id.

    asking: num_beams, max_new_tokens, src_lang, tgt_lang; what the model was trained with by default; a row's
    own src_lang and tgt_lang win. Exit 2 when the model cannot be found, or does not know a language.
    """
    folder, below, saved = finished_model(str(model), "nllb_vtt.json")
    cfg = Config(report_to="none", **(saved | asking))
    base = open_base(below)
    net = ready(load_weights(fetch_model(below, "*"), base, cfg), folder)
    fields, examples = cfg.source_fields.split(","), []
    for row in rows:
        langs = [str(row.get(column) or getattr(cfg, column)) for column in ("src_lang", "tgt_lang")]
        for code in langs:
            check_language(code, base)
        examples.append(Example(source_of(row["question"], row, fields), "", *langs, "", "", row))
    encoded, cut = encode(examples, base)
    if cut[0]:
        log.warning(f"warning: {cut[0]} of {len(rows)} sources are cut to {base.longest} tokens")
    order, answers = sorted(range(len(rows)), key=lambda i: len(encoded[i].source)), {}
    for start in range(0, len(rows), cfg.batch_size):  # of about one length
        part = order[start : start + cfg.batch_size]
        answers |= dict(zip(part, generate_answers(net, base, [encoded[i] for i in part], cfg)))
    return [answers[i] for i in range(len(rows))]


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
