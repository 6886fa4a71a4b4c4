"""Questions trained on per CPU second: nllb_vtt.py against the settings of transformers' run_translation.py.

    python benchmarks/nllb_step.py                                    # CPU, one thread, about a minute
    python benchmarks/nllb_step.py --width 1024 --layers 12 --vocab 256206 --questions 2000    # for a GPU: the real size
    python benchmarks/nllb_step.py --real                             # 615 M parameters: peak memory against the forecast, 12 GB

All rows train the same random NLLB (nllb_vtt.py's tiny one with a vocabulary whose head costs, against the
layers, what the real one does) on the same questions, fp32 on a CPU and bf16 autocast on a GPU (there the
clock is the wall's): fused AdamW, gradients clipped, no Trainer, no DeepSpeed. A round is one pass over all
questions, in a new order, by each row in turn; medians. The time includes collation, not tokenisation. Their
loader reads a list instead of an Arrow table, to its advantage.

run_translation.py pads to max_length only when --pad_to_max_length is given, to 1024 (here the tiny model's
256) and 128 tokens; its default is the second row, padding to the longest of a batch of any lengths. Both
with 8 questions a step, its default.

Lengths are assumed, not read from a data set: log-normal, answers of 10 words in the median (sigma 0.45, cut
to 3 to 40; captions of MSR-VTT are about so long), sources of 30 (sigma 0.52, 3 to 150), each for itself; a
word is one token.

Predicted before the first measurement, as speed against padding to max_length: dynamic padding 3.8,
nllb_vtt.py 4.5; padding 0.87, 0.44 and 0.16 of all positions; --real: 11.5 GB measured, 13.5 forecast
(DeepSpeed's fp32 master weights are in it). Measured (CPU): 4.72, 6.04, so 1.28 against run_translation.py's
default; padding 0.87, 0.46, 0.17; --real: 12.40 GB measured with plain AdamW, 13.62 forecast for DeepSpeed,
of which plain AdamW lacks 2.86. On a GPU: not yet measured.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from clock import CUDA, DEVICE, device_name, now
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    M2M100Config,
    M2M100ForConditionalGeneration,
    default_data_collator,
)

import nllb_vtt
from common import GB, memory_layouts, peak_memory_gb
from demos import metadata
from nllb_vtt import (
    Base,
    Config,
    Example,
    answer_loss,
    collate_rows,
    curriculum,
    encode,
    get_batches,
    load_weights,
    open_base,
)

MAX_SOURCE, MAX_TARGET = 1024, 128  # run_translation.py's defaults


def build(folder: Path, args: argparse.Namespace) -> None:
    """nllb_vtt.py's tiny NLLB with other sizes."""
    metadata.build_tiny(folder, 0, nllb_vtt.source_of)
    config, width = M2M100Config.from_pretrained(folder), args.width
    config.vocab_size, config.d_model, config.encoder_layers, config.decoder_layers = (
        args.vocab,
        width,
        args.layers,
        args.layers,
    )
    config.encoder_ffn_dim = config.decoder_ffn_dim = 4 * width
    config.encoder_attention_heads = config.decoder_attention_heads = max(4, width // 64)
    M2M100ForConditionalGeneration(config).save_pretrained(folder)


def make_examples(base: Base, count: int) -> list[Example]:
    """Questions of words that are one token each, of the lengths in the docstring."""
    rng = np.random.default_rng(0)
    words = sorted(
        t[1:] for t in base.tokenizer.get_vocab() if t[0] == "▁" and len(t) > 3 and t[1:].isalpha()
    )

    def text(median: float, sigma: float, most: int) -> str:
        return " ".join(rng.choice(words, int(np.clip(round(rng.lognormal(np.log(median), sigma)), 3, most))))

    return [
        Example(text(30, 0.52, 150), text(10, 0.45, 40), "eng_Latn", "eng_Latn", "", "", {})
        for _ in range(count)
    ]


def preprocessed(examples: list[Example], base: Base, padding: str | bool) -> list[dict]:
    """The rows that run_translation.py's preprocess_function makes."""
    tokenizer, longest = base.tokenizer, min(MAX_SOURCE, base.longest)
    inputs = tokenizer([e.source for e in examples], max_length=longest, padding=padding, truncation=True)
    labels = tokenizer(
        text_target=[e.target for e in examples], max_length=MAX_TARGET, padding=padding, truncation=True
    )
    ignored = [
        [token if token != tokenizer.pad_token_id else -100 for token in row] for row in labels["input_ids"]
    ]
    columns = zip(inputs["input_ids"], inputs["attention_mask"], ignored)
    return [dict(zip(("input_ids", "attention_mask", "labels"), row)) for row in columns]


def their_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def our_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss, tokens = answer_loss(model, batch, 0.0)  # without label smoothing, as theirs
    return loss / tokens


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable, loss_of: Callable
) -> tuple[float, int]:
    """(seconds of these batches, positions in them, padding and all)"""
    positions, start = 0, now()
    for batch in batches:
        batch = {name: value.to(DEVICE) for name, value in batch.items()}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        positions += batch["input_ids"].numel() + batch["labels"].numel()
    if CUDA:
        torch.cuda.synchronize()
    return now() - start, positions


def compare(args: argparse.Namespace, folder: Path) -> None:
    build(folder, args)
    base, steps = open_base(str(folder)), args.questions // args.batch
    cfg = Config(batch_size=args.batch, dtype="fp32", report_to="none")
    examples = make_examples(base, steps * args.batch)
    rows, _ = encode(examples, base)
    tokens = sum(len(row.source) + len(row.labels) for row in rows)
    collate, stages = functools.partial(collate_rows, base=base), curriculum(rows, False)

    def model() -> nn.Module:
        made = load_weights(folder, base, cfg).train()
        made.config.use_cache = False  # as the Trainer does
        return made.to(DEVICE)

    full, dynamic = preprocessed(examples, base, "max_length"), preprocessed(examples, base, False)
    by_batch = DataCollatorForSeq2Seq(base.tokenizer, model=model(), label_pad_token_id=-100)

    def theirs(data: list[dict], collator: Callable) -> Callable[[int], Iterable]:
        loader = DataLoader(data, args.batch, shuffle=True, collate_fn=collator, pin_memory=CUDA)
        return lambda _: loader

    def ours(number: int) -> Iterable:
        until = dataclasses.replace(cfg, steps=(number + 1) * steps)
        for step in range(number * steps, until.steps):
            yield from get_batches(stages, collate, until, step)

    makers = {
        "run_translation.py, --pad_to_max_length": (theirs(full, default_data_collator), their_loss),
        "run_translation.py, its default: dynamic padding": (theirs(dynamic, by_batch), their_loss),
        "nllb_vtt.py: that, batches by source length": (ours, our_loss),
    }
    same = [
        (default_data_collator(full[:4]), their_loss),
        (by_batch(dynamic[:4]), their_loss),
        (collate(rows[:4]), our_loss),
    ]
    losses = [loss_of(model(), {n: v.to(DEVICE) for n, v in batch.items()}) for batch, loss_of in same]
    torch.testing.assert_close(losses[0], losses[2])  # the same questions have the same loss in all three
    torch.testing.assert_close(losses[1], losses[2])

    trained = {name: model() for name in makers}
    optimizers = {name: torch.optim.AdamW(m.parameters(), 1e-4, fused=True) for name, m in trained.items()}
    times: dict[str, list[float]] = {name: [] for name in makers}
    padding: dict[str, list[float]] = {name: [] for name in makers}
    for name, (batches, loss_of) in makers.items():  # warm-up
        train(trained[name], optimizers[name], itertools.islice(batches(0), 3), loss_of)
    for number in range(args.rounds):
        for name, (batches, loss_of) in makers.items():
            seconds, positions = train(trained[name], optimizers[name], batches(number), loss_of)
            times[name].append(seconds)
            padding[name].append(1 - tokens / positions)

    medians = {name: statistics.median(column) for name, column in times.items()}
    first, clock, count = (
        next(iter(medians.values())),
        "s" if CUDA else "CPU s",
        sum(p.numel() for p in model().parameters()),
    )
    sources, answers = (
        statistics.mean(len(getattr(row, name)) for row in rows) for name in ("source", "labels")
    )
    print(f"{count / 1e6:.2f} M parameters, {len(rows)} questions a round, {args.batch} per step, {sources:.0f} source and "
          f"{answers:.0f} answer tokens on average, {args.rounds} rounds; {device_name(DEVICE)}, torch "
          f"{torch.__version__}, "
          f"transformers {transformers.__version__}\n")  # fmt: skip
    print(f"| | padding | tokens per {clock} | questions per {clock} | ratio |")
    print("|---|---|---|---|---|")
    for name, seconds in medians.items():
        share = statistics.median(padding[name])
        print(
            f"| {name} | {share:.2f} | {tokens / seconds:.0f} | {len(rows) / seconds:.1f} | "
            f"{first / seconds:.2f} |"
        )


def real() -> None:
    """Two steps of the real size, 4 questions of 64 source and 32 answer tokens in fp32."""
    config = M2M100Config(
        vocab_size=256206, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096,
        decoder_ffn_dim=4096, encoder_attention_heads=16, decoder_attention_heads=16, encoder_layerdrop=0.0,
        decoder_layerdrop=0.0, decoder_start_token_id=2,
    )  # fmt: skip
    cfg, before = Config(batch_size=4, dtype="fp32", report_to="none"), peak_memory_gb()
    sizes = nllb_vtt.sizes_of(Base("", Path(), config, None, 1024), cfg, 64, 32)
    parameters, trained, frozen, kept = *sizes[:3], sizes[3][False]
    forecast = memory_layouts(trained, frozen, {False: kept}, "fp32", 1)[0].gpu_gb
    model = M2M100ForConditionalGeneration(config).to(DEVICE).train()
    tokens = torch.randint(4, config.vocab_size, (4, 96))
    batch = {
        "input_ids": tokens[:, :64],
        "labels": tokens[:, 64:],
        "attention_mask": torch.ones(4, 64, dtype=torch.long),
    }
    batch["decoder_input_ids"] = batch["labels"].roll(1, 1)
    seconds, _ = train(
        model, torch.optim.AdamW(model.parameters(), 1e-5, fused=True), [batch, batch], our_loss
    )
    print(f"{parameters / 1e6:.1f} M parameters, fp32, {device_name(DEVICE)}: 2 steps in {seconds:.0f} s\n")
    print("| | GB |\n|---|---|")
    print(f"| measured, plain AdamW (the process had {before:.2f} before) | {peak_memory_gb():.2f} |")
    print(f"| forecast, ZeRO-2, 1 device ({kept / GB:.2f} of it kept for backward) | {forecast:.2f} |")
    print(
        "| forecast less the master weights and bucket, which plain AdamW lacks | "
        f"{(16 * trained + kept) / GB:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true")
    for name, value in {
        "width": 128,
        "layers": 2,
        "vocab": 5376,
        "questions": 400,
        "batch": 8,
        "rounds": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.real:
        return real()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
