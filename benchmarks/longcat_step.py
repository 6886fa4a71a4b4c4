"""Time of a micro-step of longcat_vss.py: against transformers' own mixture and full logits, by length, by
experts, by layout.

    python benchmarks/longcat_step.py                                        # CPU, one thread, about two minutes
    python benchmarks/longcat_step.py --width 1024 --layers 4 --vocab 131072 --experts 64    # for a GPU

A micro-step is forward and backward of one clip through a random Omni with LoRA (r 8) on the attention, no
dropout, fp32 on a CPU and bf16 on a GPU (there the clock is the wall's). By default the tiny model's sizes:
128 wide, two layers, 8 experts and 4 identities of which 3 are taken; its heads cost 13 % of what the layers
do for a token, the real ones 4 %. Medians of interleaved rounds.

Rows of the first table: the model as it is; with transformers' LongcatFlashExperts, which has tensors for the
identities too; with the heads on all positions; with both. The loss is checked to be the same in all. The
last table is ZeRO-3 on one process with the mixture gathered whole (a leaf module) and tensor by tensor,
which with two processes ends in a mismatch after a few steps.

Predicted before the first measurement: transformers' experts 1.00 (frozen slots that are never chosen cost
memory, not time), full logits 1.08, both 1.08; time in proportion to length beyond 200 positions; +60 % from
8 to 32 experts, for the loop over experts is in Python; the leaf 0.9 of the time without, since it is one
gather and not two. Measured (CPU): transformers' experts 0.97, full logits 1.01, both 1.01 (2.17 and 2.24
with --vocab 16384 --length 512); 4.5 times the time from 256 to 1024 positions; +22 % from 8 to 32 experts;
the leaf 0.96. On a GPU: not yet measured.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from clock import CUDA, DEVICE, device_name, seconds
from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

import longcat_vss
from common import HERE, ds_config, init_distributed, quiet_libraries, read_json
from demos import speech
from longcat_vss import CODEBOOKS, Base, Config, Omni, with_adapter


def sized(base: Base, args: argparse.Namespace, experts: int) -> Base:
    """The tiny model's files with other sizes of the language model; as many identities for each expert as
    the real one has."""
    config = type(base.config).from_dict(base.config.to_dict())
    config.hidden_size, config.num_layers, config.vocab_size = args.width, args.layers, args.vocab
    config.ffn_hidden_size, config.expert_ffn_hidden_size = 2 * args.width, args.width // 2
    config.n_routed_experts, config.zero_expert_num = experts, experts // 2
    return dataclasses.replace(base, config=config)


def model(base: Base, stock: bool = False) -> nn.Module:
    """An Omni with LoRA; `stock` with transformers' experts, whose first slots hold the same weights."""
    torch.manual_seed(0)
    net = Omni(base)
    for layer in net.llm.model.layers if stock else ():
        ours, theirs = (
            layer.mlp.experts,
            transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts(base.config),
        )
        with torch.no_grad():
            theirs.gate_up_proj.zero_()[: len(ours.gate_up_proj)] = ours.gate_up_proj
            theirs.down_proj.copy_(ours.down_proj)
        layer.mlp.experts = theirs
    cfg = Config(report_to="none", lora_dropout=0.0)
    return with_adapter(net, cfg, base).to(DEVICE, torch.bfloat16 if CUDA else torch.float32).train()


def batch_of(base: Base, length: int, replied: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """One clip: two pairs of frames, two seconds of speech, text up to `length` positions, of which the last
    are the reply."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, base.config.vocab_size, (1, length), generator=rng)
    streams = torch.full((1, length, CODEBOOKS), longcat_vss.CODEC_PAD)
    ids[0, :16], ids[0, 16:41] = base.ids["image_pad"], base.ids["audio_pad"]
    streams[0, -replied:] = torch.randint(
        longcat_vss.CODEC_OFFSET, base.audio_vocabulary, (replied, CODEBOOKS), generator=rng
    )
    text_labels, code_labels = torch.full_like(ids, -100), torch.full_like(streams, -100)
    text_labels[0, -replied:], code_labels[0, -replied:] = ids[0, -replied:], streams[0, -replied:]
    kind = torch.bfloat16 if CUDA else torch.float32
    made = {
        "ids": ids, "streams": streams, "text_labels": text_labels, "code_labels": code_labels,
        "mask": torch.ones(1, length, dtype=torch.bool),
        "pixels": torch.randn(2, 16, 1176, generator=rng).to(kind), "grids": torch.full((2, 2), 4),
        "features": torch.randn(1, 25, 1200, generator=rng).to(kind),
        "heard": torch.ones(1, 25, dtype=torch.bool),
    }  # fmt: skip
    return {name: value.to(DEVICE) for name, value in made.items()}


def ours(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return longcat_vss.weighted(net(**batch)[0], Config(report_to="none"))


def full_logits(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same loss with every head on every position, as a forward(labels=...) does it."""
    omni, inputs = longcat_vss.core(net), {k: v for k, v in batch.items() if "label" not in k and k != "mask"}
    hidden = omni.llm.model(
        inputs_embeds=omni.embed(**inputs), attention_mask=batch["mask"], use_cache=False
    ).last_hidden_state
    codes, labels = batch["streams"][0, 1:], batch["code_labels"][0, 1:]
    logits = [omni.llm.lm_head(hidden[0, :-1]), *omni.audio_heads(hidden[0, :-1], lambda i, _: codes[:, i])]
    wanted = [batch["text_labels"][0, 1:], *labels.unbind(-1)]
    losses = [F.cross_entropy(one.float(), label, ignore_index=-100) for one, label in zip(logits, wanted)]
    return longcat_vss.weighted(torch.stack(losses), Config(report_to="none"))


def interleaved(steps: dict[str, Callable[[], None]], rounds: int, times: int = 4) -> dict[str, float]:
    """Milliseconds of each step: medians over rounds, in which each goes `times` times in turn."""
    columns: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            spent = seconds(lambda: [step() for _ in range(times)] and None) / times  # noqa: B023 called at once
            if number:  # the first round is for warming up
                columns[name].append(1000 * spent)
    return {name: statistics.median(column) for name, column in columns.items()}


def table(title: str, rows: dict[str, float], clock: str) -> None:
    first = next(iter(rows.values()))
    print(f"\n| {title} | {clock} per micro-step | ratio |\n|---|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.1f} | {value / first:.2f} |")


def stepper(net: nn.Module, batch: dict[str, Tensor], loss_of: Callable) -> Callable[[], None]:
    def step() -> None:
        loss_of(net, batch).backward()
        net.zero_grad(set_to_none=True)

    return step


def zero3(base: Base, batch: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Micro-steps under ZeRO-3 with CPU offload on one process, the mixture gathered whole or tensor by
    tensor."""
    import deepspeed

    init_distributed()
    path = HERE / "ds_zero3_offload.json"
    config = ds_config(read_json(path), str(path), 1, 1, 1.0, "bf16" if CUDA else "fp32")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    steps = {}
    for name in ("leaf module, gathered whole", "expert tensors by themselves"):
        net = model(base)
        if "leaf" in name:
            deepspeed.utils.set_z3_leaf_modules(net, [LongcatFlashMoE])
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-5)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)

        def step(engine=engine) -> None:
            engine.backward(longcat_vss.weighted(engine(**batch)[0], Config(report_to="none")))
            engine.step()

        steps[name] = step
    return interleaved(steps, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {
        "width": 128,
        "layers": 2,
        "vocab": 352,
        "experts": 8,
        "length": 256,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args, clock = parser.parse_args(), "ms" if CUDA else "CPU ms"
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        speech.build_tiny(Path(folder) / "tiny", 0, longcat_vss)
        tiny = longcat_vss.open_base(str(Path(folder) / "tiny"))
    base = sized(tiny, args, args.experts)
    net, theirs, batch = model(base), model(base, stock=True), batch_of(base, args.length)
    losses = [ours(net, batch), ours(theirs, batch), full_logits(net, batch)]
    assert np.allclose([loss.item() for loss in losses], losses[0].item(), rtol=2e-2 if CUDA else 1e-5), (
        losses
    )
    count = [sum(p.numel() for p in one.parameters()) / 1e6 for one in (net, theirs)]
    print(f"{count[0]:.2f} M parameters, {count[1]:.2f} M with transformers' experts; {args.length} positions, 40 of them the "
          f"reply; {args.rounds} rounds; {device_name(DEVICE)}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    table("one clip", interleaved({
        "longcat_vss.py": stepper(net, batch, ours),
        "transformers' experts": stepper(theirs, batch, ours),
        "full logits": stepper(net, batch, full_logits),
        "both": stepper(theirs, batch, full_logits),
    }, args.rounds), clock)  # fmt: skip
    lengths = {f"{n} positions": stepper(net, batch_of(base, n), ours) for n in (128, 256, 512, 1024)}
    table("length", interleaved(lengths, args.rounds), clock)
    sizes = {
        f"{n} experts": sized(tiny, args, n)
        for n in (args.experts, 2 * args.experts, 4 * args.experts, 8 * args.experts)
    }
    experts = {name: stepper(model(one), batch_of(one, args.length), ours) for name, one in sizes.items()}
    table("experts, 3 taken", interleaved(experts, args.rounds), clock)
    table("ZeRO-3, CPU offload, one process", zero3(base, batch, args.rounds), clock)


if __name__ == "__main__":
    main()
