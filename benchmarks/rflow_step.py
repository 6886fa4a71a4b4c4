"""Speed and memory of t2v_rflow.py: its model against one written as Open-Sora 1.2 writes it, the cache, the
plan's forecasts.

    python benchmarks/rflow_step.py                  # all four parts on a CPU, one thread: about four minutes, 4 GB
    python benchmarks/rflow_step.py step memory      # only these; on a GPU: STDiT3-XL/2 in bf16 with gradient checkpointing

step    One training step (forward, backward, AdamW) in tokens/s and model FLOP/s: linear layers and
attention, 2 a multiply-add,
        backward twice the forward, padding and recomputation not counted. The peers have the same weights, and their outputs and
        gradients are checked to be the same first. "upstream's blocks" do what Open-Sora 1.2's do: LayerNorm, shift, scale and
        gate with the frame's time and with time 0, then torch.where, in each block; RMSNorm and rotation by elementary
        operations; fused attention only where sequences are longer than many (its rule: over space, but not over time), each
        caption's real tokens alone in cross-attention. "no fused attention" has softmax(q k^T) v everywhere, and captions packed
        with a block-diagonal mask that each call builds. On a GPU also one step through DeepSpeed, ZeRO-2 and averaged weights
        as train() has them, with its peak memory beside the forecast of plan_of.
cache   A step from files (decoded, T5, VAE) against one from the cache, through Source.batch. The ratio is
only that of the sizes
        chosen: on a CPU the model gets the depth at which the encoders have the share of a step's FLOPs that they have at full
        size (240p, 51 frames or an image, 300 tokens, counted on the meta device). Decoding is of small lossless clips, and not
        hidden behind the step as train() does it with a thread. Their speeds differ, so the share of time does too.
memory  micro_batch_bytes against the allocator: what is there after the forward pass that was not there
before, and the most
        during forward and backward, beyond weights and gradients. On a CPU from torch.profiler's record of each allocation.
plan    A manifest of a million rows, sizes and lengths as OpenVid-1M might have them: reading its CSV,
planning for 8 and 192.

Times are CPU times on a CPU, the wall's on a GPU; medians of interleaved rounds.

Predicted before the first measurement (CPU): upstream's blocks 1.25 times as slow, without fused attention
1.6; a step with encoders 1.75 times one from the cache; forecast of activations 1.00 of what is kept and 0.85
of the most, with checkpointing 1.05 of the most; read_data 12 s, plan 3 s, a step waiting at 192 ranks 2
%, in a plain shuffle 15 %. Measured (CPU): upstream's blocks 1.03 and 1.06 (two sizes), without fused
attention 1.05 and 1.06: matrix products take most of the time there; 1.43 for clips, 1.57 for images; 1.00
and 0.98 to 1.00, with checkpointing 1.00 (1.45 to 1.65 before the formula counted one block of the pair at
work); 20 s, 0.29 s, 2 % against 22 %. On a GPU: not yet measured.
"""

import argparse
import copy
import csv
import dataclasses
import gc
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from clock import CUDA, DEVICE, device_name, seconds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import t2v_rflow as rflow
from common import (
    GB,
    HERE,
    ds_config,
    init_distributed,
    memory_layouts,
    peak_memory_gb,
    quiet_libraries,
    read_data,
    read_json,
)
from demos.shapes import write_lossless

DTYPE = "bf16" if CUDA else "fp32"
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s, bf16, dense


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round is for warming up. A call without the memory for it
    has none."""
    columns: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            try:
                spent = seconds(call)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if number:
                columns[name].append(spent)
    return columns


def spread(column: list[float]) -> str:
    return f"{statistics.median(column):.3f} ({min(column):.3f} to {max(column):.3f})"


def flops_of(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_flops() -> float:
    name = torch.cuda.get_device_name() if CUDA else ""
    return next(
        (peak for card, peak in PEAKS.items() if all(word in name for word in card.split())), math.nan
    )


def rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """As rotary_embedding_torch: each angle twice, halves stacked and joined; in fp32, as t2v_rflow.py has
    it"""
    angles, wide = angles.repeat_interleave(2, -1), x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = wide * angles.cos() + torch.stack([-b, a], -1).flatten(-2) * angles.sin()
    return torch.cat([wide[..., :0], turned, wide[..., :0]], -1).to(x.dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = ((q * q.shape[-1] ** -0.5) @ k.mT).float()
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class PeerAttention(rflow.SelfAttention):
    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        many, length, width = x.shape
        q, k, v = self.qkv(x).view(many, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rms(q, self.q_norm.weight), rms(k, self.k_norm.weight)
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        h = F.scaled_dot_product_attention(q, k, v) if self.fused and length > many else by_hand(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(many, length, width))


class PeerCrossAttention(rflow.CrossAttention):
    def forward(self, x: Tensor, y: Tensor, lengths: list[int]) -> Tensor:
        """x (B, N, C), y (1, sum of lengths, C), packed"""
        clips, tokens, width = x.shape
        q = self.q_linear(x).view(1, clips * tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv_linear(y).view(1, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            parts = zip(q.split(tokens, 2), k.split(lengths, 2), v.split(lengths, 2))
            h = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        else:
            mask = torch.block_diag(
                *(torch.ones(tokens, n, dtype=torch.bool, device=x.device) for n in lengths)
            )
            h = by_hand(q, k, v, mask)
        return self.proj(h.transpose(1, 2).reshape(clips, tokens, width))


class PeerBlock(rflow.Block):
    def forward(
        self, x: Tensor, y: Tensor, lengths: list[int], t: Tensor, t0: Tensor, made: Tensor, rope: Tensor
    ) -> Tensor:
        """x (B, T, S, C), t and t0 (B, 6, C), made (B, T)"""
        clips, frames, places, width = x.shape
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = zip(
            *((self.scale_shift_table + one).to(x.dtype)[:, None, None].unbind(3) for one in (t, t0))
        )

        def either(values: list[Tensor]) -> Tensor:
            return torch.where(made[:, :, None, None], *values)

        h = either([F.layer_norm(x, (width,), eps=1e-6) * (1 + a) + b for a, b in zip(scale, shift)])
        if self.temporal:
            h = self.attn(h.transpose(1, 2).reshape(clips * places, frames, width), rope)
            h = h.unflatten(0, (clips, places)).transpose(1, 2)
        else:
            h = self.attn(h.flatten(0, 1), None).unflatten(0, (clips, frames))
        x = x + either([one * h for one in gate])
        x = x + self.cross_attn(x.flatten(1, 2), y, lengths).view_as(x)
        h = self.mlp(
            either([F.layer_norm(x, (width,), eps=1e-6) * (1 + a) + b for a, b in zip(scale_mlp, shift_mlp)])
        )
        return x + either([one * h for one in gate_mlp])


class Peer(rflow.STDiT3):
    """The forward pass of upstream around these blocks; `fused`: with the attention kernels that it has."""

    def forward(self, x, timesteps, y, mask, fps, pixels, x_mask, drop=None):
        frames, height, width = x.shape[2:]
        dtype = self.x_embedder.proj.weight.dtype
        x = self.x_embedder.proj(F.pad(x.to(dtype), (0, width % 2, 0, height % 2)))
        h, w = x.shape[3:]
        x = x.flatten(3).permute(0, 2, 3, 1) + self.places(h, w, pixels, x.device).to(dtype)
        t, t0 = (
            self.t_embedder(time) + self.fps_embedder(fps)
            for time in (timesteps, torch.zeros_like(timesteps))
        )
        t6, t60 = (self.t_block(time).unflatten(-1, (6, -1)) for time in (t, t0))
        lengths = mask.sum(1).tolist()
        y = self.y_embedder.y_proj(y.to(dtype))[mask][None]
        rope = torch.arange(frames, device=x.device)[:, None] * self.rope.freqs.float()
        for block in (block for pair in zip(self.spatial_blocks, self.temporal_blocks) for block in pair):
            given = (x, y, lengths, t6, t60, x_mask, rope)
            x = checkpoint(block, *given, use_reentrant=False) if self.checkpointing else block(*given)
        both = (
            (self.final_layer.scale_shift_table + time[:, None]).to(dtype)[:, None, None].unbind(3)
            for time in (t, t0)
        )
        x = torch.where(
            x_mask[:, :, None, None],
            *(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + b) + a for a, b in both),
        )
        x = self.final_layer.linear(x).view(len(x), frames, h, w, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(len(x), -1, frames, 2 * h, 2 * w)[..., :height, :width].float()


def peer_of(net: rflow.STDiT3, fused: bool) -> Peer:
    """The same weights, not shared"""
    twin = copy.deepcopy(net)
    twin.__class__ = Peer
    classes = {
        rflow.Block: PeerBlock,
        rflow.SelfAttention: PeerAttention,
        rflow.CrossAttention: PeerCrossAttention,
    }
    for module in twin.modules():
        module.__class__, module.fused = classes.get(type(module), type(module)), fused
    return twin


def model_flops(config: dict, clips: int, frames: int, height: int, width: int, words: int) -> int:
    """Of a forward pass on latents of this size; words: real ones, in all captions"""
    c, places = config["hidden_size"], math.ceil(height / 2) * math.ceil(width / 2)
    # in and out, 4 latents
    inner, ends = (
        int(c * config["mlp_ratio"]),
        4 * config["in_channels"] * (2 + config["pred_sigma"]),
    )
    tokens = clips * frames * places
    # qkv, proj, q_linear, proj, mlp; kv_linear
    linear = tokens * (6 * c * c + 2 * c * inner) + words * 2 * c * c
    cross = 2 * frames * places * words * c
    pair = 2 * (linear + cross) + 2 * tokens * (places + frames) * c
    rest = tokens * c * ends + words * c * (config["caption_channels"] + c) + clips * c * (3 * 256 + 15 * c)
    return 2 * (config["depth"] * pair + rest)


def model_of(config: dict) -> rflow.STDiT3:
    """Random, also where training begins with zeros, in training mode"""
    torch.manual_seed(0)
    with DEVICE:
        net = rflow.STDiT3(**config)
        for name, value in net.named_parameters():
            if value.ndim > 1 and not value.any():
                nn.init.normal_(value, std=0.02)
            elif "norm" in name:
                nn.init.uniform_(value, 0.5, 1.5)
    net.rope.freqs.requires_grad_(False)
    net.checkpointing = CUDA
    return net.to(rflow.TORCH_DTYPES[DTYPE]).train()


def inputs_of(
    config: dict, clips: int, shape: tuple[int, int, int], longest: int, device: Any = DEVICE
) -> dict:
    """Latents, captions of 0.2 to 1 of `longest` tokens, first frames given in half of the clips"""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest, max(1, longest // 5), clips).long()
    made = torch.ones(clips, shape[0], dtype=torch.bool)
    made[::2, 0] = False
    made = {
        "x": torch.randn(clips, config["in_channels"], *shape, generator=rng),
        "timesteps": 1000 * torch.rand(clips, generator=rng),
        "y": torch.randn(clips, longest, config["caption_channels"], generator=rng),
        "mask": torch.arange(longest) < lengths[:, None], "fps": torch.full((clips,), 24.0), "x_mask": made,
    }  # fmt: skip
    return {name: value.to(device) for name, value in made.items()} | {
        "pixels": 8.0 * math.sqrt(shape[1] * shape[2])
    }


def latent_shape(bucket: rflow.Bucket) -> tuple[int, int, int]:
    return (rflow.OpenSoraVAE.latent_frames(bucket.frames), *(side // 8 for side in bucket.size))


def stepper(net: nn.Module, inputs: dict) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-5, fused=True)

    def step() -> None:
        try:
            net(**inputs).square().mean().backward()
            optimizer.step()
        finally:
            optimizer.zero_grad()

    return step


def check_same(nets: dict[str, nn.Module], inputs: dict) -> None:
    """Outputs, all gradients, and the formula's FLOPs; in fp32, on the CPU, where a machine's bf16 has no
    say"""
    one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    counted, said = (
        flops_of(lambda: nets["plain"](**one)),
        model_flops(nets["plain"].config, 1, *one["x"].shape[2:], one["y"].shape[1]),
    )
    assert abs(counted / said - 1) < 0.01, f"{counted} FLOPs, not {said}"
    wanted = None
    for name, net in nets.items():
        out = net(**inputs)
        out.square().mean().backward()
        found = {"output": out.detach()} | {
            n: p.grad for n, p in net.named_parameters() if p.grad is not None
        }
        for key, value in found.items():
            size = (wanted or found)[key].abs().max()
            assert (value - (wanted or found)[key]).abs().max() <= 1e-3 * size + 1e-7, (
                f"{name}: another {key}"
            )
        wanted = wanted or found
        net.zero_grad()


def as_trained(net: nn.Module, inputs: dict, rounds: int) -> tuple[float, float]:
    """-> (seconds of a step through DeepSpeed with averaged weights, as train(); peak GB, on a CPU the
    process's)"""
    import deepspeed

    gc.collect()
    others = torch.cuda.memory_allocated() - sum(p.nbytes for p in net.parameters()) if CUDA else 0
    config = ds_config(read_json(HERE / "ds_zero2.json"), "ds_zero2.json", 1, 1, 1.0, DTYPE)
    trained = [p for p in net.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(trained, 1e-5, fused=True), config=config
    )
    ema = [part.detach().clone() for part in rflow.parts_of(engine)]

    def step() -> None:
        engine.backward(engine(**inputs).square().mean())
        engine.step()
        torch._foreach_lerp_(ema, [part.detach() for part in rflow.parts_of(engine)], 0.01)

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    spent = statistics.median(interleaved({"": step}, rounds)[""] or [math.nan])
    engine.destroy()
    return spent, peak_memory_gb() - others / GB


def forecast_gb(net: nn.Module, bucket: rflow.Bucket, caption: int) -> float:
    """As plan_of adds it up: one GPU, the cache"""
    codec = rflow.OpenSoraVAE
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    kept = rflow.micro_batch_bytes(net.config, bucket, codec, caption, DTYPE, net.checkpointing)
    return memory_layouts(trained, 0, {net.checkpointing: kept}, DTYPE, 1)[0].gpu_gb + 4 * trained / GB


# XL's heads of 72
SMALL = dict(depth=2, hidden_size=288, num_heads=4, caption_channels=256, model_max_length=60)


def part_step(args: argparse.Namespace) -> None:
    net = model_of(SMALL)
    tiny = {"ours": net, "fused": peer_of(net, True), "plain": peer_of(net, False)}
    check_same(
        {name: one.float().cpu() for name, one in tiny.items()},
        inputs_of(rflow.XL | SMALL, 3, (3, 5, 8), 20, "cpu"),
    )
    config, longest = ({}, 300) if CUDA else (SMALL, 60)
    runs = (
        [("240p", 51, "9:16", 20), ("720p", 51, "9:16", 1)]
        if CUDA
        else [("160p", 51, "1:1", 2), ("256p", 17, "1:1", 1)]
    )
    for bucket in (rflow.Bucket(*run) for run in runs):
        shape = latent_shape(bucket)
        net, inputs = model_of(config), inputs_of(rflow.XL | config, bucket.batch_size, shape, longest)
        words = int(inputs["mask"].sum())
        work = 3 * model_flops(net.config, bucket.batch_size, *shape, words)
        tokens = bucket.batch_size * shape[0] * math.ceil(shape[1] / 2) * math.ceil(shape[2] / 2)
        nets = {
            "t2v_rflow.py": net,
            "upstream's blocks": peer_of(net, True),
            "no fused attention": peer_of(net, False),
        }
        columns = interleaved({name: stepper(one, inputs) for name, one in nets.items()}, args.rounds)
        print(f"\n{bucket}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {tokens} tokens, "
              f"{words} of captions, {work / tokens / 3e9:.3f} GFLOP forward a token\n\n"
              "| | s a step | tokens/s | GFLOP/s | MFU | t2v_rflow.py is faster by |\n|---|---|---|---|---|---|")  # fmt: skip
        for name, column in columns.items():
            if not column:
                print(f"| {name} | out of memory | | | | |")
                continue
            spent, pairs = statistics.median(column), [b / a for a, b in zip(columns["t2v_rflow.py"], column)]
            rates = f"{tokens / spent:.0f} | {work / spent / 1e9:.1f} | {work / spent / peak_flops():.3f}"
            print(f"| {name} | {spent:.3f} | {rates} | {spread(pairs)} |")
        del nets, columns
        if CUDA:
            torch.cuda.empty_cache()
        spent, peak = as_trained(net, inputs, args.rounds)
        print(f"| through DeepSpeed | {spent:.3f} | {tokens / spent:.0f} | {work / spent / 1e9:.1f} | "
              f"{work / spent / peak_flops():.3f} | |\n\nThrough DeepSpeed: peak {peak:.2f} GB"
              f"{'' if CUDA else ' of the whole process'}, forecast {forecast_gb(net, bucket, longest):.2f} GB")  # fmt: skip


def text_of(config: dict, length: int, words: list[str]) -> rflow.T5:
    """A T5 with random weights and a word for each token"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *words])}, "<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = rflow.T5.__new__(rflow.T5)  # __init__ reads a folder
    names = dict(pad_token="<pad>", unk_token="<unk>", model_input_names=["input_ids", "attention_mask"])
    text.tokenizer, text.name, text.length = (
        PreTrainedTokenizerFast(tokenizer_object=core, **names),
        "random",
        length,
    )
    was = torch.get_default_dtype()
    torch.set_default_dtype(rflow.TORCH_DTYPES[DTYPE])
    text.encoder = T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()
    torch.set_default_dtype(was)
    text.width, text.of_wan = config["d_model"], False
    return text


XXL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
SMALL_T5 = dict(d_model=256, d_kv=32, d_ff=640, num_layers=3, num_heads=8, vocab_size=512)
SMALL_VAE = dict(filters=32, blocks=1, image_filters=(32, 32, 32, 32), image_blocks=1)


def full_size_shares(frames: int) -> dict[str, float]:
    """FLOPs of the encoders and of the rest of a step on one clip of 240p, 300 tokens, in 10^12"""
    with torch.device("meta"):
        vae, text, clip = (
            rflow.OpenSoraVAE(),
            text_of(XXL, 300, []),
            torch.empty(1, frames, 240, 426, 3, dtype=torch.uint8),
        )
        ids = torch.ones(1, 300, dtype=torch.long)
        made = {"T5": flops_of(lambda: text.encoder(ids)), "VAE": flops_of(lambda: vae.encode(clip))}
    made["model"] = 4 * model_flops(rflow.XL, 1, rflow.OpenSoraVAE.latent_frames(frames), 30, 53, 300)
    return {name: value / 1e12 for name, value in made.items()}


def share(work: dict[str, float]) -> float:
    return (work["T5"] + work["VAE"]) / sum(work.values())


def write_clips(folder: Path, count: int, bucket: rflow.Bucket, words: list[str], many: int) -> Path:
    """Moving stripes, lossless, with captions of `many` words"""
    rng, lines = np.random.default_rng(0), ["path,text,num_frames,height,width,fps"]
    height, width = bucket.size
    rows, columns = np.mgrid[:height, :width]
    for number in range(count):
        steps = np.arange(bucket.frames)[:, None, None, None] * rng.integers(1, 9, 3)
        clip = (rows[None, ..., None] * rng.integers(1, 4, 3) + columns[None, ..., None] + steps) % 256
        write_lossless(clip.astype(np.uint8), folder / f"{number}.mkv", 24)
        lines.append(
            f"{number}.mkv,{' '.join(rng.choice(words, many))},{bucket.frames + 1},{height},{width},24"
        )
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


def part_cache(args: argparse.Namespace) -> None:
    for full, *here in ((51, "64p", 17, "1:1", 4), (1, "64p", 1, "1:1", 16)):  # a clip, images
        compare_with_cache(args, full, rflow.Bucket(*here))


def compare_with_cache(args: argparse.Namespace, frames: int, small: rflow.Bucket) -> None:
    """frames: at full size, 240p; small: what is measured for it on a CPU"""
    full, words = full_size_shares(frames), [f"word{i}" for i in range(500)]
    told = ", ".join(f"{name} {value:.1f}" for name, value in full.items())
    print(
        f"\n240p, {frames} frames, 10^12 FLOPs a clip with recomputation: {told}; the encoders are "
        f"{100 * share(full):.1f} %"
    )
    if CUDA:
        bucket, sizes, text_sizes, config, length = (
            rflow.Bucket("240p", frames, "9:16", 20 if frames > 1 else 297),
            {},
            XXL,
            dict(rflow.XL),
            300,
        )
    else:
        bucket, sizes, text_sizes, length = small, SMALL_VAE, SMALL_T5, 60
        config = rflow.XL | SMALL
    many = length * 3 // 5  # tokens of a caption
    with DEVICE:
        codec = rflow.OpenSoraVAE(**sizes).to(rflow.TORCH_DTYPES[DTYPE]).eval().requires_grad_(False)
        text = text_of(text_sizes, length, words)
    height, width = (side // codec.space for side in bucket.size)
    clip = torch.zeros(1, bucket.frames, *bucket.size, 3, dtype=torch.uint8, device=DEVICE)
    ids = torch.ones(1, many, dtype=torch.long, device=DEVICE)
    times = 4 if CUDA else 3  # with recomputation, without
    with torch.no_grad():
        work = {"T5": flops_of(lambda: text.encoder(ids)), "VAE": flops_of(lambda: codec.encode(clip))}
    each = [
        times * model_flops(config | {"depth": n}, 1, codec.latent_frames(bucket.frames), height, width, many)
        for n in (0, 1)
    ]
    if not CUDA:
        config["depth"] = round((sum(work.values()) * (1 / share(full) - 1) - each[0]) / (each[1] - each[0]))
    work["model"] = each[0] + config["depth"] * (each[1] - each[0])
    net = model_of(config | {"caption_channels": text.width})
    told = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in work.items())
    print(f"here, {bucket}, captions of {many} tokens, {config['depth']} pairs, 10^9 FLOPs a clip: {told}; the encoders "
          f"are {100 * share(work):.1f} %")  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-5, fused=True)
    generator, chosen = torch.Generator(DEVICE).manual_seed(0), np.arange(bucket.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_clips(Path(folder), 2 * bucket.batch_size, bucket, words, many)
        cfg = rflow.Config(manifest=manifest, cache_dir=Path(folder), report_to="none")
        rows, table, _ = rflow.clip_table(read_data(cfg, "caption", rflow.SCORE_COLUMNS)[0], cfg)
        kept = dataclasses.replace(cfg, cache=Path(folder) / "cache")
        stored = rflow.store_rows(Path(folder), rows, table, np.zeros(len(rows), bool), kept)
        stored = rflow.Rows(stored, np.arange(len(rows)))
        sources = {
            name: rflow.Source(one, stored, table, codec, text)
            for name, one in (("encoders in the step", cfg), ("from the cache", kept))
        }
        sources["from the cache"].encoded(bucket, chosen.tolist(), 0)

        def step(source: rflow.Source) -> None:
            latents, captions, rows = source.batch(bucket, chosen, iter(()), 0)
            made = np.ones((len(rows), latents[0].shape[1]), bool)
            batch = rflow.batch_of(bucket, latents, captions, source.table.fps[rows], made)
            x = batch["x"].to(DEVICE).float()
            shift = rflow.shift_of(source.cfg, bucket, codec)
            rflow.training_loss(net, x, batch, source.cfg, shift, generator).backward()
            optimizer.step()
            optimizer.zero_grad()

        files = sources["encoders in the step"]
        pixels, captions = (
            [files.pixels(row, bucket, 0) for row in chosen],
            [files.caption(row, 0) for row in chosen],
        )
        seeds = [torch.Generator() for _ in pixels]
        calls = {name: lambda source=source: step(source) for name, source in sources.items()} | {
            "decoding alone": lambda: [files.pixels(row, bucket, 0) for row in chosen],
            "T5 alone": lambda: text.encode(captions),
            "VAE alone": lambda: codec.encode(torch.from_numpy(np.stack(pixels)), seeds),
        }
        columns = interleaved(calls, args.rounds)
    print("\n| a step | s | / the step from the cache |\n|---|---|---|")
    for name, column in columns.items():
        pairs = [a / b for a, b in zip(column, columns["from the cache"])]
        print(f"| {name} | {statistics.median(column):.3f} | {spread(pairs)} |")


def most_allocated(call: Callable[[], object]) -> tuple[int, int]:
    """-> (bytes there after `call`, whose result is held, that were not before; the most of them at a
    time)"""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        held = call()
        torch.cuda.synchronize()
        found = torch.cuda.memory_allocated() - start, torch.cuda.max_memory_allocated() - start
        del held
        return found
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        held = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    del held
    return int(live[-1]), int(live.max())


def part_memory(args: argparse.Namespace) -> None:
    config, longest = ({}, 300) if CUDA else (SMALL, 60)
    if CUDA:
        cases = [(28, "240p", 51, "9:16", 4), (28, "720p", 51, "9:16", 1)]
    else:
        cases = [
            (2, "80p", 51, "1:1", 4),
            (8, "80p", 51, "1:1", 4),
            (2, "256p", 17, "1:1", 1),
            (8, "80p", 1, "1:1", 64),
        ]
    print("\n| MB | pairs | checkpointing | forecast | kept by the forward pass | forecast / it | most in the step | "
          "forecast / it | upstream's blocks: most | / ours |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for depth, *of in cases:
        bucket = rflow.Bucket(*of)
        net = model_of(config | {"depth": depth})
        inputs = inputs_of(rflow.XL | config, bucket.batch_size, latent_shape(bucket), longest)
        for on in (False, True):
            guess, found = (
                rflow.micro_batch_bytes(net.config, bucket, rflow.OpenSoraVAE, longest, DTYPE, on),
                [],
            )
            for one in (net, peer_of(net, True)):
                one.checkpointing = on
                for p in one.parameters():
                    p.grad = torch.zeros_like(p) if p.requires_grad else None
                step = lambda one=one: one(**inputs).square().mean().backward()  # noqa: E731, B023 called at once
                try:
                    step()
                    found += [most_allocated(lambda: one(**inputs))[0], most_allocated(step)[1]]  # noqa: B023
                except torch.OutOfMemoryError:
                    found += [math.nan, math.nan]
            kept, most, _, theirs = found
            shape = f"{bucket.resolution}, {bucket.frames} frames, batch {bucket.batch_size}"
            print(f"| {shape} | {depth} | {on} | {guess / 1e6:.1f} | "
                  f"{kept / 1e6:.1f} | {guess / kept:.2f} | {most / 1e6:.1f} | {guess / most:.2f} | "
                  f"{theirs / 1e6:.1f} | "
                  f"{theirs / most:.2f} |")  # fmt: skip


def manifest_like_openvid(path: Path, count: int) -> None:
    """OpenVid-1M's columns, with height and width; a guess of its sizes and lengths, and captions of about
    120 words"""
    rng = np.random.default_rng(0)
    sizes = [(1080, 1920), (720, 1280), (576, 1024), (512, 960), (1920, 1080), (720, 720)]
    size = rng.choice(len(sizes), count, p=[0.43, 0.36, 0.08, 0.07, 0.04, 0.02])
    frames = np.clip(rng.lognormal(math.log(140), 0.65, count), 24, 3000).astype(int)
    fps, scores = (
        rng.choice([24.0, 25.0, 29.97, 60.0], count, p=[0.25, 0.25, 0.47, 0.03]),
        rng.uniform(4, 7, (count, 2)),
    )
    caption = (
        "The video shows a person in a blue jacket who walks along a quiet street while the camera follows. "
        * 7
    )
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            "video,caption,aesthetic score,motion score,camera motion,frame,fps,height,width".split(",")
        )
        for i in range(count):
            said = caption[: 500 + i % 200]
            os.mknod(path.parent / f"v{i}.mp4")  # empty, for each file is looked for
            out.writerow(
                [f"v{i}.mp4", said, *scores[i].round(3), "static", frames[i], fps[i], *sizes[size[i]]]
            )


def part_plan(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "OpenVid.csv"
        manifest_like_openvid(path, args.clips)

        def plain() -> None:
            with path.open(newline="") as file:
                for _ in csv.DictReader(file):
                    pass

        found: dict = {}
        times = {"csv.DictReader, rows thrown away": seconds(plain)}
        cfg = rflow.Config(manifest=path, cache_dir=path.parent / "cache", report_to="none")
        times["read_data"] = seconds(
            lambda: found.update(rows=read_data(cfg, "caption", rflow.SCORE_COLUMNS)[0])
        )
        times["clip_table"] = seconds(
            lambda: found.update(zip(("rows", "table"), rflow.clip_table(found["rows"], cfg)))
        )
        none = np.zeros(len(found["rows"]), bool)
        times["store_rows"] = seconds(
            lambda: found.update(kept=rflow.store_rows(path.parent, found["rows"], found["table"], none, cfg))
        )
        some = np.random.default_rng(0).integers(args.clips, size=10_000)
        rows = rflow.Rows(found["kept"], np.arange(args.clips))
        times["10,000 of them looked up, by any rank"] = seconds(lambda: [rows[i] for i in some])
        size = sum(file.stat().st_size for file in found["kept"].iterdir()) / GB
        print(f"\n{args.clips} rows, CSV of {path.stat().st_size / GB:.2f} GB, {size:.2f} GB in the files that ranks map, "
              f"peak {peak_memory_gb():.1f} GB\n\n| reading | s |\n|---|---|")  # fmt: skip
    for name, spent in times.items():
        print(f"| {name} | {spent:.1f} |")
    buckets = rflow.BUCKETS["2"]
    columns = interleaved(
        {
            str(n): lambda n=n: found.update({n: rflow.plan_epoch(found["table"], buckets, 0, 0, n)})
            for n in (8, 192)
        },
        args.rounds,
    )
    print(
        "\n| ranks | plan, s | steps | a step waits | in a plain shuffle | shapes "
        "|\n|---|---|---|---|---|---|"
    )
    for n in (8, 192):
        one = found[n]
        waits = [f"{100 * (value - 1):.1f} %" for value in (one.imbalance, one.imbalance_shuffled)]
        print(
            f"| {n} | {spread(columns[str(n)])} | {len(one.order)} | {waits[0]} | {waits[1]} | "
            f"{len(one.buckets)} |"
        )
    print(f"\n{found[192].table()}")


def main() -> None:
    parts = {"step": part_step, "cache": part_cache, "memory": part_memory, "plan": part_plan}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; default: all")
    for name, value in {"rounds": 5, "clips": 1_000_000}.items():  # clips: of `plan`
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if wrong := set(args.parts) - set(parts):
        parser.error(f"{', '.join(wrong)}: parts are {', '.join(parts)}")
    torch.set_num_threads(1)
    quiet_libraries()
    init_distributed()
    print(f"{device_name(DEVICE)}, {DTYPE}, torch {torch.__version__}, transformers {transformers.__version__}, numpy "
          f"{np.__version__}; {args.rounds} rounds")  # fmt: skip
    for name in args.parts or parts:
        parts[name](args)


if __name__ == "__main__":
    main()
