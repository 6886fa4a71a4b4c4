"""t2v_rflow.py where maths can be wrong quietly: STDiT3 as upstream writes it, flow, buckets, plan, rows, clips, batches.

Facts: Open-Sora's branch opensora/v1.2 (opensora/models/stdit/stdit3.py, schedulers/rf/, datasets/{aspect,bucket,sampler}.py).
"""

import csv
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import nn

import t2v_rflow as rflow
from common import BadSample, Row, fitted, read_data, write_mp4
from demos import shapes

# --- STDiT3: layout

SMALL = dict(
    depth=2,
    hidden_size=48,
    num_heads=4,
    in_channels=4,
    caption_channels=20,
    model_max_length=9,
    input_sq_size=32,
)
CODEC, TEXT = SimpleNamespace(channels=4), SimpleNamespace(width=20, length=9)


def published(depth=28, width=1152, heads=16, inner=4, caption=4096, length=300, ratio=4):
    """{name: shape} of hpcai-tech/OpenSora-STDiT-v3, or of a smaller one: written from the facts, not from our class."""
    linear = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "fps_embedder.mlp.0": (width, 256),
        "fps_embedder.mlp.2": (width, width), "t_block.1": (6 * width, width), "y_embedder.y_proj.fc1": (width, caption),
        "y_embedder.y_proj.fc2": (width, width), "final_layer.linear": (4 * 2 * inner, width),
        "x_embedder.proj": (width, inner, 1, 2, 2),
    }  # fmt: skip
    names = {"y_embedder.y_embedding": (length, caption), "rope.freqs": (width // heads // 2,)}
    names["final_layer.scale_shift_table"] = (2, width)
    for kind, i in itertools.product(("spatial", "temporal"), range(depth)):
        block = f"{kind}_blocks.{i}"
        names[f"{block}.scale_shift_table"] = (6, width)
        names |= {f"{block}.attn.{x}_norm.weight": (width // heads,) for x in "qk"}
        linear |= {
            f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width),
            f"{block}.cross_attn.q_linear": (width, width), f"{block}.cross_attn.kv_linear": (2 * width, width),
            f"{block}.cross_attn.proj": (width, width), f"{block}.mlp.fc1": (ratio * width, width),
            f"{block}.mlp.fc2": (width, ratio * width),
        }  # fmt: skip
    for name, shape in linear.items():
        names |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return names


def drawn(seed=0):
    """Weights of a small model, all of them random, so that no mistake hides behind a 0 or a 1."""
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in published(2, 48, 4, 4, 20, 9).items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        scale = 1 if "y_embedding" in name else 0.3 if "table" in name else scale
        weights[name] = scale * torch.randn(shape, generator=rng) + (1 if "_norm" in name else 0)
    weights["rope.freqs"] = weights["rope.freqs"].abs() + 0.1
    weights["temporal_blocks.0.attn.qkv.weight"][:96] *= (
        1e-3  # queries and keys so small that the eps of their norms counts
    )
    weights["temporal_blocks.0.attn.qkv.bias"][:96] *= 1e-3
    return weights


@pytest.fixture(scope="module")
def weights():
    return drawn()


def model_of(weights, **sizes):
    model = rflow.STDiT3(**SMALL | sizes)
    model.load_state_dict(weights)
    return model.eval()


def write_model(folder, weights, **config):
    """As the published folder is; what our class has no use for stands in its config too."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    other = dict(
        model_type="STDiT3",
        class_dropout_prob=0.1,
        patch_size=[1, 2, 2],
        qk_norm=True,
        pred_sigma=True,
        mlp_ratio=4.0,
    )
    (folder / "config.json").write_text(json.dumps(other | SMALL | config))
    return str(folder)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = rflow.STDiT3()
    state, names = model.state_dict(), published()
    assert {name: tuple(value.shape) for name, value in state.items()} == names and len(names) == 973
    for source, count in (
        ("scratch", 1_207_643_936),
        ("", 1_201_595_936),
    ):  # the loaded caption projection stays, as upstream
        adapted = rflow.set_trained(model, rflow.Config(model=source))
        trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
        assert sum(trained.values()) == count
        assert {"rope.freqs", "y_embedder.y_embedding"} <= set(names) - set(trained)


def test_what_is_not_stored_is_upstreams():
    """The rotation's 36 frequencies, as a new model makes them; and what starts at 0."""
    model = rflow.STDiT3(**SMALL | dict(hidden_size=96))
    torch.testing.assert_close(model.rope.freqs, torch.tensor([10_000 ** (-2 * i / 24) for i in range(12)]))
    zero = {
        name.removesuffix(".weight")
        for name, p in model.named_parameters()
        if name.endswith(".weight") and not p.any()
    }
    temporal = {
        f"temporal_blocks.{i}.{part}" for i in (0, 1) for part in ("attn.proj", "cross_attn.proj", "mlp.fc2")
    }
    assert zero == temporal | {"fps_embedder.mlp.2", "final_layer.linear"}


def test_published_weights_are_loaded_whole(tmp_path, weights):
    folder = write_model(tmp_path / "m", weights)
    assert same(rflow.open_model(folder, rflow.Config(), CODEC, TEXT)[0].state_dict(), weights)
    half = write_model(tmp_path / "h", {name: value.bfloat16() for name, value in weights.items()})
    assert {
        value.dtype for value in rflow.open_model(half, rflow.Config(), CODEC, TEXT)[0].state_dict().values()
    } == {torch.float32}


def colossal(folder, weights):
    """Shards with an index, as ColossalAI's booster writes them"""
    (folder / "model").mkdir(parents=True)
    names = sorted(weights)
    parts = {f"pytorch_model-0000{i}.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / "model" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_weights_are_taken_as_people_have_them(tmp_path, weights):
    """A file without config.json tells its sizes by its shapes, a checkpoint of ours in its header."""
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save(weights, tmp_path / "ema.pt")
    torch.save({"state_dict": weights}, tmp_path / "x.pth")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000004"
    checkpoint.mkdir(parents=True)
    config = dict(SMALL, frame_places=True)
    save_file(weights, checkpoint / "ema.safetensors", {"config": json.dumps(config)})
    forms = ["weights.safetensors", "ema.pt", "x.pth", "run", "run/checkpoints/step_000004"]
    for form in [
        *forms,
        colossal(tmp_path / "epoch0-global_step4", weights).name,
        "epoch0-global_step4/model",
    ]:
        for meta in (False, True):
            model, sizes = rflow.open_model(str(tmp_path / form), rflow.Config(), CODEC, TEXT, meta)
            assert (model.final_layer.linear.weight.is_meta, sizes["frame_places"]) == (meta, "run" in form)
            assert sizes | {"frame_places": 0, "input_sq_size": 0} == rflow.XL | SMALL | dict(
                frame_places=0, input_sq_size=0
            )
        assert same(
            rflow.open_model(str(tmp_path / form), rflow.Config(), CODEC, TEXT)[0].state_dict(), weights
        )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.safetensors", b"<html>", "header"),
        ("x.pth", b"", "EOF|end of file|read"),
        ("y.pt", None, "has no 'x_embedder"),
    ],
)
def test_files_without_weights_end_the_run(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content or b"")
    if content is None:
        torch.save({"other": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        rflow.open_model(str(tmp_path / name), rflow.Config(), CODEC, TEXT)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(said, told) and "PixArt-Sigma's .pth" in told


def test_pixart_becomes_the_spatial_half(tmp_path):
    """As reparameter in opensora/utils/ckpt_utils.py names it; then the model is one of images, whatever the frames."""
    torch.manual_seed(0)
    sizes = dict(depth=2, hidden_size=144, num_heads=2, caption_channels=20, model_max_length=300)
    ours = rflow.STDiT3(**sizes).requires_grad_(False)
    for value in ours.state_dict().values():
        value.copy_(torch.randn(value.shape) * 0.05)
    old = {}
    for name, value in ours.state_dict().items():
        if not re.match(r"temporal|fps|rope|.*[qk]_norm", name):
            old[name.replace("spatial_blocks.", "blocks.")] = value.clone()
    old["x_embedder.proj.weight"] = old["x_embedder.proj.weight"][:, :, 0]
    old["y_embedder.y_embedding"] = old["y_embedder.y_embedding"][:120]
    torch.save({"state_dict": old | {"pos_embed": torch.zeros(1, 4, 144)}}, tmp_path / "PixArt-Sigma.pth")
    model, config = rflow.open_model(str(tmp_path / "PixArt-Sigma.pth"), rflow.Config(), CODEC, TEXT)
    assert config == rflow.XL | sizes and not any(value.is_meta for value in model.state_dict().values())
    state = model.state_dict()
    for name, value in ours.state_dict().items():
        if name.replace("spatial_blocks.", "blocks.") in old and name != "y_embedder.y_embedding":
            assert torch.equal(state[name], value), name
    rows = state["y_embedder.y_embedding"]
    assert torch.equal(rows[:120], old["y_embedder.y_embedding"]) and (rows[120:] == rows[119]).all()
    x, *rest = inputs(3, 4, 4)
    with torch.no_grad():
        together = model(x, *rest)
        alone = torch.cat([model(x[:, :, i : i + 1], *rest) for i in range(3)], 2)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    old.pop("t_block.1.bias")
    torch.save({"state_dict": old}, tmp_path / "broken.pth")
    with pytest.raises(SystemExit):
        rflow.open_model(str(tmp_path / "broken.pth"), rflow.Config(), CODEC, TEXT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temporal_blocks.1.attn.q_norm.weight": None}, "temporal_blocks.1.attn.q_norm.weight"),
        ({"final_layer.linear.bias": torch.zeros(31)}, "final_layer.linear.bias"),
        ({"pos_embed": torch.zeros(3)}, "pos_embed"),
        ({"in_channels": 16, "x_embedder.proj.weight": torch.zeros(48, 16, 1, 2, 2), "final_layer.linear.bias": torch.zeros(128),
          "final_layer.linear.weight": torch.zeros(128, 48)}, "takes latents of 16 channels"),
    ],
)  # fmt: skip
def test_another_model_ends_the_run(tmp_path, capsys, weights, change, said):
    config = {name: value for name, value in change.items() if isinstance(value, int)}
    weights = {name: value for name, value in (weights | change).items() if isinstance(value, torch.Tensor)}
    with pytest.raises(SystemExit) as stop:
        rflow.open_model(write_model(tmp_path / "m", weights, **config), rflow.Config(), CODEC, TEXT)
    assert stop.value.code == 2 and said in capsys.readouterr().err


# --- STDiT3: written once more, module by module, as upstream has it


class Reference:
    """fp64, one sample, head and place after the other; w: the state dict."""

    def __init__(self, weights, heads=4, base=32):
        self.w, self.heads, self.base = {name: value.double() for name, value in weights.items()}, heads, base

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def attend(self, q, k, v):
        """(L, C) each, after heads are told apart"""
        out = []
        for a, b, c in zip(*(x.chunk(self.heads, -1) for x in (q, k, v))):
            scores = (a @ b.T) / a.shape[-1] ** 0.5
            scores = (scores - scores.max(-1, keepdim=True).values).exp()
            out.append(scores / scores.sum(-1, keepdim=True) @ c)
        return torch.cat(out, -1)

    def normed(self, name, x):
        """LlamaRMSNorm of each head"""
        x = x.unflatten(-1, (self.heads, -1))
        return (self.w[name] * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)

    def rotated(self, x):
        """Pairs (2i, 2i + 1) are complex numbers, turned by place x freqs[i]."""
        turn = torch.polar(torch.tensor(1.0).double(), torch.arange(len(x))[:, None] * self.w["rope.freqs"])
        pairs = torch.view_as_complex(x.reshape(len(x), self.heads, -1, 2).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(1)

    def self_attention(self, name, x, rope):
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, -1)
        q, k = self.normed(f"{name}.q_norm.weight", q), self.normed(f"{name}.k_norm.weight", k)
        if rope:
            q, k = self.rotated(q), self.rotated(k)
        return self.linear(f"{name}.proj", self.attend(q, k, v))

    def cross_attention(self, name, x, y):
        k, v = self.linear(f"{name}.kv_linear", y).chunk(2, -1)
        return self.linear(f"{name}.proj", self.attend(self.linear(f"{name}.q_linear", x), k, v))

    def mlp(self, name, x):
        x = self.linear(f"{name}.fc1", x)
        x = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return self.linear(f"{name}.fc2", x)

    def embedded(self, name, value):
        angles = torch.tensor([value * math.exp(-math.log(10_000) * i / 128) for i in range(128)]).double()
        x = self.linear(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        return self.linear(f"{name}.mlp.2", x / (1 + (-x).exp()))

    @staticmethod
    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def places(self, rows, columns, pixels):
        """First half of the channels the column, second the row; sines, then cosines"""
        quarter, made = self.w["t_block.1.weight"].shape[1] // 4, []
        scale, base = pixels / self.base, round((rows * columns) ** 0.5)
        for row, column in itertools.product(range(rows), range(columns)):
            ends = (column / scale * base / columns, row / scale * base / rows)
            angles = [[u / 10_000 ** (i / quarter) for i in range(quarter)] for u in ends]
            made.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
        return torch.tensor(made).double()

    def clip(self, x, timestep, y, fps, pixels, x_mask):
        """x (C, T, H, W), y (L, D) without padding, x_mask (T,) or None -> (C_out, T, H, W)"""
        frames, height, width = x.shape[1:]
        x = F.pad(x.double(), (0, width % 2, 0, height % 2))
        x = F.conv3d(
            x[None], self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"], stride=(1, 2, 2)
        )[0]
        rows, columns = x.shape[2:]
        x = x.permute(1, 2, 3, 0).flatten(1, 2) + self.places(rows, columns, pixels)  # (T, S, C)
        y = self.mlp("y_embedder.y_proj", y.double())
        made = [True] * frames if x_mask is None else x_mask.tolist()
        ts = [self.embedded("t_embedder", u) + self.embedded("fps_embedder", fps) for u in (timestep, 0.0)]
        six = [self.linear("t_block.1", t / (1 + (-t).exp())).view(6, -1) for t in ts]

        def modulate(
            x, table, many, shift, scale
        ):  # t2i_modulate with t and with t0, one of them for each frame
            both = [x * (1 + (table + t)[scale]) + (table + t)[shift] for t in many]
            return torch.stack([both[0][i] if made[i] else both[1][i] for i in range(frames)])

        def gated(x, table, gate):
            return torch.stack([x[i] * (table + six[0 if made[i] else 1])[gate] for i in range(frames)])

        depth = len({name.split(".")[1] for name in self.w if name.startswith("spatial_blocks")})
        for i, kind in itertools.product(range(depth), ("spatial", "temporal")):
            name = f"{kind}_blocks.{i}"
            table = self.w[f"{name}.scale_shift_table"]
            h = modulate(self.norm(x), table, six, 0, 1)
            if kind == "spatial":
                h = torch.stack([self.self_attention(f"{name}.attn", frame, False) for frame in h])
            else:
                h = torch.stack(
                    [self.self_attention(f"{name}.attn", place, True) for place in h.unbind(1)], 1
                )
            x = x + gated(h, table, 2)
            x = x + self.cross_attention(f"{name}.cross_attn", x.flatten(0, 1), y).view(x.shape)
            x = x + gated(self.mlp(f"{name}.mlp", modulate(self.norm(x), table, six, 3, 4)), table, 5)
        x = modulate(self.norm(x), self.w["final_layer.scale_shift_table"], ts, 0, 1)
        x = self.linear("final_layer.linear", x).view(frames, rows, columns, 2, 2, -1)  # channels innermost
        return x.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, 2 * rows, 2 * columns)[..., :height, :width]


def inputs(frames, height, width, lengths=(4, 9, 1), seed=0):
    """A batch of clips whose captions have these lengths; what stands in the padding must not matter."""
    rng, count = torch.Generator().manual_seed(seed), len(lengths)
    x = torch.randn(count, 4, frames, height, width, generator=rng)
    y = 3 * torch.randn(count, max(lengths), 20, generator=rng)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    t = torch.tensor([3.0, 517.0, 1000.0])[:count]
    return x, t, y, mask, torch.tensor([24.0, 8.0, 120.0])[:count], 21.5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 2), (4, 5, 7), (3, 4, 9)])
def test_model_is_upstreams(weights, frames, height, width, masked):
    model, reference = model_of(weights), Reference(weights)
    x, t, y, mask, fps, pixels = inputs(frames, height, width)
    x_mask = torch.rand(3, frames, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    drop = torch.tensor([False, True, False])
    with torch.no_grad():
        made = model(x, t, y, mask, fps, pixels, x_mask, drop)
    assert made.shape == (3, 8, frames, height, width) and made.dtype == torch.float32
    for i in range(3):  # without a caption: the learned rows, as many as it had
        words = weights["y_embedder.y_embedding"][: mask[i].sum()] if drop[i] else y[i, mask[i]]
        said = reference.clip(
            x[i], float(t[i]), words, float(fps[i]), pixels, None if x_mask is None else x_mask[i]
        )
        torch.testing.assert_close(made[i], said.float(), rtol=1e-4, atol=1e-4)


def test_all_frames_to_be_made_is_no_mask(weights):
    model, batch = model_of(weights), inputs(3, 4, 4)
    with torch.no_grad():
        assert torch.equal(model(*batch), model(*batch, torch.ones(3, 3, dtype=torch.bool)))
        assert not torch.equal(model(*batch), model(*batch, torch.tensor([[True, True, False]] * 3)))


def test_frames_know_their_number_only_with_frame_places(weights):
    """By the rotation alone a clip of equal frames has no first one; the sum of all pairs is the same either way round."""
    x, *rest = inputs(4, 4, 4)
    x = x[:, :, :1].expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        plain, placed = (model_of(weights, frame_places=told)(x, *rest) for told in (False, True))
    assert (plain - plain[:, :, :1]).abs().max() < 1e-4 < 1e-2 < (placed - placed[:, :, :1]).abs().max()


def gradients(model, batch):
    model.zero_grad()
    model(*batch).square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_an_image_leaves_a_gradient_on_every_weight(weights):
    """Of one frame temporal attention is the value itself, so these are 0; were they None, ranks would reduce different ones."""
    found = gradients(model_of(weights).train(), inputs(1, 4, 4))
    assert [name for name, gradient in found.items() if gradient is None] == ["rope.freqs"]
    assert (
        found["temporal_blocks.1.attn.qkv.weight"].abs().max()
        > 1e-4
        > 1e-7
        > found["temporal_blocks.1.attn.q_norm.weight"].max()
    )


def test_checkpointing_changes_no_gradient(weights):
    model, batch = model_of(weights).train(), inputs(2, 4, 4)
    plain = gradients(model, batch)
    calls, inside = [], model.temporal_blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.checkpointing = True
    again = gradients(model, batch)
    inside.remove()
    assert len(calls) == 2, "a block's forward pass is made again in the backward pass"
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


# --- LoRA


def test_merged_lora_is_the_model_with_it(weights):
    cfg = rflow.Config(lora_r=3, lora_alpha=6)
    lora = rflow.set_trained(model_of(weights), cfg)
    rng = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 4 and all(".lora_" in name for name in trained)
    for p in trained.values():
        p.data = 0.1 * torch.randn(p.shape, generator=rng)
    plain = rflow.merged({name: value.detach() for name, value in lora.state_dict().items()}, cfg)
    assert {name: tuple(value.shape) for name, value in plain.items()} == published(2, 48, 4, 4, 20, 9)
    batch, config = inputs(3, 4, 5), SMALL | {"pred_sigma": True}
    with torch.no_grad():
        torch.testing.assert_close(
            rflow.plain_model(config, plain, "cpu", "fp32")(*batch), lora(*batch), rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(model_of(weights)(*batch), lora(*batch), atol=0.03)
    assert rflow.merged(weights, rflow.Config()) is weights


# --- Rectified flow

WORDS, PIXELS = rflow.Words(), rflow.Pixels()


class Told(nn.Module):
    """What it gives is a function of (x, t in 0..1, drop), and after that as many channels for nothing, as upstream's has. It
    keeps what it was given."""

    def __init__(self, velocity):
        super().__init__()
        self.weight, self.velocity, self.seen = nn.Parameter(torch.ones(1)), velocity, []

    def forward(self, x, timesteps, y, mask, fps, pixels, x_mask=None, drop=None):
        self.seen.append(SimpleNamespace(x=x, t=timesteps, fps=fps, pixels=pixels, x_mask=x_mask, drop=drop))
        drop = torch.zeros(len(x), dtype=torch.bool) if drop is None else drop
        v = self.velocity(x, *(part.view(-1, 1, 1, 1, 1) for part in (timesteps / 1000, drop)))
        return torch.cat([v, torch.full_like(v, 1e3)], 1)


def gaussian(mean, std):
    """The best v = E[x_0 - noise | x_t] for x_0 ~ N(mean, std^2), each number by itself: x_t = (1 - t) x_0 + t noise has variance
    V = (1 - t)^2 std^2 + t^2 and with x_0 - noise the covariance (1 - t) std^2 - t; what is left has variance std^2 / V. Without
    its caption it is another one: guidance 1 is to leave that out."""

    def velocity(x, t, drop):
        v = mean + ((1 - t) * std**2 - t) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)
        return torch.where(drop, v - 1, v)

    return Told(velocity)


def constant(value, without=0.0):
    return Told(lambda x, t, drop: torch.where(drop, without, value).expand(x.shape))


def sampled(model, frames=6, given=None, made=None, **flags):
    cfg = rflow.Config(**dict(base_size=16, guidance=1.0, fps=8) | flags)
    bucket = rflow.Bucket("16p", frames, "1:1", 2)
    return rflow.sample(model, WORDS.encode(["a b", "c"]), bucket, PIXELS, cfg, 3, given, made)


def test_euler_steps_turn_noise_into_the_data():
    """Of Gaussian data the exact way leads from noise to mean + std noise, number by number."""
    noise, error = sampled(constant(0.0)), {}
    for steps in (30, 200):
        made = sampled(gaussian(0.7, 0.4), sample_steps=steps)
        error[steps] = (made - (0.7 + 0.4 * noise)).abs().max().item()
        assert abs(made.mean() - 0.7) < 0.02 and abs(made.var() - 0.16) < {30: 0.03, 200: 0.005}[steps]
    assert error[200] < 0.03 and error[200] < error[30] / 4, error


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampler_is_diffusers(guidance):
    """Whose v is noise - x_0."""
    peer = FlowMatchEulerDiscreteScheduler(shift=0.5 * 6**0.5)
    peer.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    model, x = Told(lambda x, t, drop: torch.tanh(x.roll(1, -1) + t + drop)), sampled(constant(0.0))
    for t in peer.timesteps:
        told, untold = (model.velocity(x, t / 1000, torch.tensor(without)) for without in (False, True))
        x = peer.step(-(untold + guidance * (told - untold)), t, x).prev_sample
    torch.testing.assert_close(
        sampled(model, sample_steps=7, guidance=guidance, base_size=32), x, rtol=1e-4, atol=1e-4
    )


def test_sampling_goes_from_noise_at_1000_to_0_and_guides():
    model = constant(2.0, 0.5)
    made, noise = sampled(model, sample_steps=4, guidance=3.0), sampled(constant(0.0))
    torch.testing.assert_close(made, noise + 0.5 + 3 * 1.5, rtol=0, atol=1e-5)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    ratio, even = 6**0.5, torch.tensor([1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(
        torch.stack([one.t[0] for one in model.seen]), 1000 * ratio * even / (1 + (ratio - 1) * even)
    )
    first = model.seen[0]
    assert (
        first.drop.tolist() == [False, False, True, True]
        and first.fps.tolist() == [8.0] * 4
        and first.pixels == 16
    )
    assert torch.equal(first.x[:2], noise) and torch.equal(first.x[2:], noise)
    sampled(image := constant(0.0), frames=1)
    assert image.seen[0].fps.tolist() == [120.0] * 4


def test_given_frames_come_back_bit_for_bit():
    given, made = torch.randn(2, 3, 6, 16, 16), torch.tensor([False, True, True, False, True, True])
    model = Told(lambda x, t, drop: x.roll(1, 2))
    x = sampled(model, given=given, made=made, sample_steps=5)
    assert (
        torch.equal(x[:, :, ~made], given[:, :, ~made])
        and not torch.isclose(x[:, :, made], given[:, :, made]).any(-1).all()
    )
    for one in model.seen:
        assert torch.equal(one.x[:, :, ~made], given[:, :, ~made].repeat(2, 1, 1, 1, 1)), (
            "the model sees them clean"
        )
        assert torch.equal(one.x_mask, made.expand(4, 6))
    other = torch.where(
        made[:, None, None], 9.0, given
    )  # what stands in the frames that are made is not looked at
    assert torch.equal(sampled(model, given=other, made=made, sample_steps=5), x)


def flow_batch(count, frames, made=None):
    states = [np.zeros((2, 3), np.float16)] * count
    made = np.ones((count, frames), bool) if made is None else made
    return rflow.batch_of(
        rflow.Bucket("16p", frames, "1:1", count), [np.zeros(1)] * count, states, np.full(count, 24.0), made
    )


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_loss_is_the_known_one(t):
    rng, mean, std = torch.Generator().manual_seed(0), 0.7, 0.4
    x, noise = (torch.randn(2, 3, 4, 64, 64, generator=rng) for _ in range(2))
    left = std**2 / ((1 - t) ** 2 * std**2 + t**2)  # of the target's variance, std^2 + 1
    times, batch = torch.full((2,), t), flow_batch(2, 4)
    best = rflow.flow_loss(gaussian(mean, std), mean + std * x, batch, times, noise).item()
    assert best == pytest.approx(left, rel=0.02)
    assert rflow.flow_loss(gaussian(mean, std), mean + std * x, batch, times, -noise).item() == pytest.approx(
        left, rel=0.02
    )
    assert rflow.flow_loss(constant(0.0), std * x, batch, times, noise).item() == pytest.approx(
        1 + std**2, rel=0.02
    )
    assert rflow.flow_loss(Told(lambda z, *_: std * x - noise), std * x, batch, times, noise).item() == 0


def test_1_is_noise_and_the_model_is_told_1000_for_it():
    x, noise = torch.randn(3, 3, 2, 4, 4), torch.randn(3, 3, 2, 4, 4)
    rflow.flow_loss(model := constant(0.0), x, flow_batch(3, 2), torch.tensor([0.0, 1.0, 0.25]), noise)
    (seen,) = model.seen
    assert (
        torch.equal(seen.x[:2], torch.stack([x[0], noise[1]]))
        and seen.t.tolist() == [0, 1000, 250]
        and seen.pixels == 16
    )
    torch.testing.assert_close(seen.x[2], 0.75 * x[2] + 0.25 * noise[2])


def test_loss_is_of_the_frames_that_are_made_and_each_clip_counts_the_same():
    made = np.array([[False, True, True, True], [True, False, False, False]])
    x, noise, t = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8), torch.tensor([0.3, 0.8])
    part = torch.from_numpy(made)[:, None, :, None, None]
    loss = {}
    for off in (0.0, 50.0):  # what is said of given frames
        model = Told(lambda z, *_, off=off: torch.where(part, z * 0.5, off))
        loss[off] = rflow.flow_loss(model, x, flow_batch(2, 4, made), t, noise)
    (seen,) = model.seen
    where = part.expand(x.shape)
    assert torch.equal(seen.x[~where], x[~where]) and torch.equal(seen.x_mask, torch.from_numpy(made))
    noisy = (1 - t.view(-1, 1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1, 1) * noise
    error = (0.5 * noisy - (x - noise)) ** 2
    torch.testing.assert_close(loss[0.0], (error[0, :, 1:].mean() + error[1, :, 0].mean()) / 2)
    assert loss[0.0] == loss[50.0]


@pytest.mark.parametrize("ratio", [0.63, 7.26])
def test_times_are_logit_normal_and_shifted(ratio):
    """r t / (1 + (r - 1) t) adds log r to the logit."""
    cfg, model, x = rflow.Config(caption_dropout=0.3), constant(0.0), torch.zeros(4000, 1, 1, 1, 1)
    rflow.training_loss(model, x, flow_batch(4000, 1), cfg, ratio, torch.Generator().manual_seed(0))
    (seen,) = model.seen
    logits = (seen.t / 1000).logit()
    assert abs(logits.mean() - math.log(ratio)) < 0.06 and abs(logits.std() - 1) < 0.05
    assert (
        abs(seen.drop.float().mean() - 0.3) < 0.03
        and abs(seen.x.std() - (seen.t / 1000).square().mean().sqrt()) < 0.03
    )


def test_shift_is_the_published_one():
    """sqrt(H W) / 512 sqrt(T): 240p of 320 x 320, else 9:16; the lengths of the published codec"""
    lengths = {1: 1, 17: 5, 51: 15, 102: 30, 204: 60, 408: 120}
    assert {n: rflow.OpenSoraVAE.latent_frames(n) for n in lengths} == lengths
    table = {
        ("240p", "1:1", 1): 0.625, ("240p", "9:16", 51): 2.42, ("240p", "9:16", 408): 6.84, ("360p", "9:16", 51): 3.63,
        ("720p", "9:16", 51): 7.26, ("720p", "9:16", 102): 10.27,
    }  # fmt: skip
    for (resolution, ratio, frames), r in table.items():
        found = rflow.shift_of(rflow.Config(), rflow.Bucket(resolution, frames, ratio, 1), rflow.OpenSoraVAE)
        assert found == pytest.approx(r, abs=0.005)
    assert (
        rflow.shift_of(rflow.Config(shift=2.0, base_size=256), rflow.Bucket("240p", 1, "1:1", 1), PIXELS)
        == 2.5
    )
    for frames in range(1, 17):  # upstream: 0, so that t is always 0 and nothing is learned
        r = rflow.shift_of(rflow.Config(), rflow.Bucket("240p", frames, "9:16", 1), rflow.OpenSoraVAE)
        assert rflow.shifted(torch.linspace(0.1, 0.9, 50), r).std() > 0.2 and r > 0.6


# opensora/utils/train_utils.py of branch opensora/v1.2 (MaskGenerator), read there: which latent frames are given
MASKS = {
    "quarter_head": lambda n, k: [i < k for i in range(n)],
    "quarter_tail": lambda n, k: [i >= n - k for i in range(n)],
    "quarter_head_tail": lambda n, k: [i < k or i >= n - k for i in range(n)],
    "image_head": lambda n, k: [i == 0 for i in range(n)],
    "image_tail": lambda n, k: [i == n - 1 for i in range(n)],
    "image_head_tail": lambda n, k: [i in (0, n - 1) for i in range(n)],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("frames", [3, 5, 15, 60])
def test_which_frames_are_given(kind, frames):
    rng, quarter = np.random.default_rng(0), max(1, frames // 4)
    seen = {tuple(rflow.given_frames(frames, {kind: 1}, rng).tolist()) for _ in range(600)}
    sizes = range(1, quarter + 1) if kind.startswith("quarter") else [1]
    assert seen == {tuple(not given for given in MASKS[kind](frames, k)) for k in sizes}


def test_frames_are_given_anywhere_and_never_all():
    rng = np.random.default_rng(0)
    for kind, counts in {"image_random": {1}, "quarter_random": {1, 2, 3}, "interpolate": {7, 8}}.items():
        seen = [rflow.given_frames(15, {kind: 1}, rng) for _ in range(600)]
        assert {int((~made).sum()) for made in seen} == counts
        assert {int(np.flatnonzero(~made)[0]) for made in seen} >= (
            {0, 1} if kind == "interpolate" else {0, 14 - 2}
        )
    shares = [rflow.given_frames(60, {"random": 1}, rng).mean() for _ in range(600)]
    assert min(shares) < 0.2 and max(shares) > 0.8 and abs(np.mean(shares) - 0.5) < 0.03
    for frames, kind in itertools.product((1, 2), rflow.EARLY):
        seen = [rflow.given_frames(frames, {kind: 1}, rng) for _ in range(50)]
        assert all(made.any() and made.shape == (frames,) for made in seen)
        assert frames > 1 or all(made.all() for made in seen)


def test_how_often_frames_are_given_is_published():
    """configs/opensora-v1-2/train/stage{1,2,3}.py: 20 % in the first two, an image first in 5 %; 25 and 22 % in the third"""
    for stage, share, first in (("1", 200, 50), ("2", 200, 50), ("3", 250, 220)):
        kinds, recipe = rflow.GIVEN[stage], rflow.RECIPES["full"][stage]
        assert sum(kinds.values()) == share == 1000 * recipe["mask_share"] and kinds["image_head"] == first
    rng = np.random.default_rng(0)
    head = [
        not made[0] and made[1:].all()
        for made in (rflow.given_frames(15, rflow.LATE, rng) for _ in range(2000))
    ]
    assert 0.87 < np.mean(head) < 0.92, "22 of 25"


# --- Buckets and plan


def table_of(clips):
    frames, height, width = np.array(clips, np.int32).reshape(-1, 3).T
    return rflow.Table(frames, height, width, np.full(len(frames), 24, np.float32))


def openvid(clips, seed=0):
    """Sizes and lengths in about the proportions of OpenVid-1M (512 x 512 and larger, much of it 1080p and 720p)."""
    rng = np.random.default_rng(seed)
    sizes = np.array(
        [
            (1080, 1920),
            (720, 1280),
            (576, 1024),
            (720, 960),
            (1080, 1080),
            (1920, 1080),
            (512, 910),
            (2160, 3840),
        ]
    )
    height, width = sizes[
        rng.choice(len(sizes), clips, p=[0.42, 0.3, 0.08, 0.05, 0.03, 0.04, 0.05, 0.03])
    ].T.astype(np.int32)
    frames = np.clip(rng.lognormal(5, 0.6, clips), 16, 2000).astype(np.int32)
    return rflow.Table(frames, height, width, np.full(clips, 24, np.float32))


def mixed(clips, seed=0):
    """Images and clips of all kinds of sizes, many of them too small or too short."""
    rng = np.random.default_rng(seed)
    frames = np.where(rng.random(clips) < 0.3, 1, rng.integers(2, 900, clips))
    return table_of(np.stack([frames, rng.integers(100, 1400, clips), rng.integers(100, 2200, clips)], 1))


def test_sizes_are_the_published_ones():
    # opensora/datasets/aspect.py of branch opensora/v1.2 (as in fork jhhuangchloe/Open-Sora, commit 7ee03d95), read there.
    published = {
        ("144p", "9:16"): (144, 256), ("144p", "3:8"): (117, 312), ("144p", "25:12"): (277, 132), ("240p", "9:16"): (240, 426),
        ("240p", "27:50"): (236, 436), ("240p", "2:3"): (262, 393), ("240p", "1:1"): (320, 320), ("360p", "16:9"): (640, 360),
        ("360p", "17:9"): (660, 350), ("480p", "12:25"): (444, 925), ("480p", "4:3"): (740, 555), ("480p", "25:12"): (924, 444),
        ("720p", "9:16"): (720, 1280), ("720p", "27:50"): (706, 1306), ("1080p", "5:8"): (1138, 1820),
    }  # fmt: skip
    assert {key: rflow.size_of(*key) for key in published} == published
    areas = {"144p": 36864, "240p": 102240, "360p": 230400, "480p": 409920, "720p": 921600, "1080p": 2073600}
    assert {name: rflow.area_of(name) for name in areas} == areas
    # Save for the sizes set by hand, they follow get_h_w there: even sides, the height of sqrt(area * ratio) rounded up if even.
    by_hand = [
        ("240p", "27:50"),
        ("240p", "2:3"),
        ("480p", "12:25"),
        ("480p", "4:3"),
        ("720p", "27:50"),
        ("1080p", "27:50"),
    ]
    other = []
    for name in list(areas)[1:]:
        for ratio in rflow.RATIOS:
            h, w = map(int, ratio.split(":"))
            even = [math.sqrt(areas[name] * h / w) + 1e-4, 0]
            even[0] = math.ceil(even[0]) if math.ceil(even[0]) % 2 == 0 else math.floor(even[0])
            even[1] = even[0] * w / h + 1e-4
            even[1] = math.ceil(even[1]) if math.ceil(even[1]) % 2 == 0 else math.floor(even[1])
            other += [(name, ratio)] if tuple(even) != rflow.size_of(name, ratio) else []
    assert other == by_hand
    assert (
        len(rflow.RATIOS) == 17
        and rflow.size_of("16p", "1:1") == (16, 16)
        and rflow.ratios_of("16p") == ["1:1"]
    )
    for wrong in (
        ("240", "1:1"),
        ("512", "9:16"),
        ("0p", "1:1"),
        ("xp", "1:1"),
        ("240p", "1:3"),
        ("16p", "9:16"),
    ):
        with pytest.raises(ValueError):
            rflow.size_of(*wrong)


def test_sizes_of_pixart_are_the_published_ones():
    """aspect.py's ASPECT_RATIO_256 to _2048: keys by two digits, each pixart size a multiple of the same 40"""
    keys = "0.25 0.26 0.27 0.28 0.32 0.33 0.35 0.40 0.42 0.48 0.50 0.52 0.57 0.60 0.68 0.72 0.78 0.82 0.88 0.94 1.00 1.07 1.13 "
    keys += "1.21 1.29 1.38 1.46 1.67 1.75 2.00 2.09 2.40 2.50 2.89 3.00 3.11 3.62 3.75 3.88 4.00"
    read_there = {
        "256": {"0.25": (128, 512), "0.72": (208, 288), "1.00": (256, 256), "2.89": (416, 144)},
        "512": {"0.26": (256, 992), "0.52": (352, 672), "1.75": (672, 384), "4.00": (1024, 256)},
        "1024": {"0.40": (640, 1600), "0.94": (960, 1024), "1.07": (1024, 960), "3.62": (1856, 512)},
        "2048": {"0.35": (1152, 3328), "0.82": (1792, 2176), "2.09": (2944, 1408), "3.88": (3968, 1024)},
    }
    for name, side in (("256", 256), ("512", 512), ("1024", 1024), ("2048", 2048)):
        sizes = {f"{h / w:.2f}": (h, w) for h, w in rflow.SIZES[name].values()}
        assert list(sizes) == keys.split() and rflow.area_of(name) == side**2
        assert sizes.items() >= read_there[name].items()
        for ratio in rflow.ratios_of(name):
            h, w = rflow.size_of(name, ratio)
            assert h * int(ratio.split(":")[1]) == w * int(ratio.split(":")[0])


def test_no_call_of_the_attention_kernels_is_too_large(monkeypatch):
    """They take 65,535 sequences at most, and an image bucket has up to 145,000 of one token along time. Shapes alone."""
    calls, shape_of = [], F.scaled_dot_product_attention

    def kernel(q, k, v, **kinds):
        calls.append(len(q))
        return shape_of(q, k, v, **kinds)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with torch.device("meta"):
        model = rflow.STDiT3(depth=1, hidden_size=16, num_heads=2, caption_channels=8, model_max_length=4)
        for lengths in itertools.chain(*(rflow.BUCKETS[stage].items() for stage in "123")):
            for frames, (_, batch) in lengths[1].items():
                h, w = rflow.typical_size(lengths[0])
                x = torch.empty(batch or 1, 4, rflow.OpenSoraVAE.latent_frames(frames), h // 8, w // 8)
                t, y = torch.empty(len(x)), torch.empty(len(x), 4, 8)
                model(x, t, y, torch.ones(len(x), 4, dtype=torch.bool), t, 1.0)
        assert max(calls) <= 65_535 and len(calls) > 100
        q = torch.empty(150_000, 2, 3, 4)
        assert rflow.attention(q, q, q).shape == q.shape and calls[-3:] == [
            65_535,
            65_535,
            150_000 - 2 * 65_535,
        ]


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_in_parts_is_attention(monkeypatch, tokens):
    q, k, v = torch.randn(3, 7, 2, tokens, 4).unbind()
    whole = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(rflow, "MOST_SEQUENCES", 3)
    torch.testing.assert_close(rflow.attention(q, k, v), whole)


def test_batches_scale():
    clips = [(51, 240, 426), (408, 240, 426), (102, 720, 1280), (1, 240, 426), (4, 16, 16)]
    for count in (rflow.published_tokens, rflow.tokens_of(rflow.OpenSoraVAE)):
        assert [count(*clip) for clip in clips] == [6075, 48600, 108000, 405, 1]
    twice, wan = (
        SimpleNamespace(space=8, latent_frames=frames, whole_length=whole)
        for frames, whole in (
            (lambda n: 2 * rflow.OpenSoraVAE.latent_frames(n), lambda n: n),
            (rflow.WanVAE.latent_frames, rflow.WanVAE.whole_length),
        )
    )
    for stage in map(rflow.BUCKETS.get, "123"):
        assert rflow.scaled(stage, 110_000, rflow.OpenSoraVAE) == stage
        quarter = rflow.scaled(stage, 27_500, rflow.OpenSoraVAE)
        assert quarter["240p"][51] == (stage["240p"][51][0], 5)
        assert quarter["240p"][408] == ((0.0, 0.0), None), "48,600 tokens a clip"
        assert rflow.scaled(stage, 110_000, twice)["144p"][51][1] == 25
        assert list(rflow.scaled(stage, 110_000, wan)["144p"]) == [1, 49, 101, 201, 405]
        assert rflow.scaled(stage, 110_000, wan)["144p"][49][1] == 51 * 15 // 13


def assign_slowly(table, buckets, seed, epoch):
    """Upstream's rules, one clip after the other."""
    n = len(table.num_frames)
    draws = {
        (r, f): rflow.rng_of(rflow.KEEP, seed, epoch, rflow.area_of(r), f).random((n, 2), np.float32)
        for r, lengths in buckets.items()
        for f in lengths
    }
    found = []
    for i in range(n):
        t, h, w = int(table.num_frames[i]), int(table.height[i]), int(table.width[i])
        where = None
        for r in sorted(buckets, key=rflow.area_of, reverse=True):
            if h * w < 0.8 * rflow.area_of(r):
                continue
            chosen = None
            for f in sorted(buckets[r], reverse=True):
                keep = buckets[r][f][0]
                p_res, p_len = keep if isinstance(keep, tuple) else (keep, 1.0)
                u = draws[r, f][i]
                if (t == 1) != (f == 1) or (t > 1 and t <= f) or u[0] >= p_len:
                    continue
                chosen = (f, u[1] < p_res)
                break
            if chosen and chosen[1]:

                def off(ratio, aspect=h / w):
                    a, b = ratio.split(":")
                    return abs(float(f"{int(a) / int(b):.2f}") - aspect)

                where = (r, chosen[0], min(rflow.ratios_of(r), key=off))
                break
        found.append(where)
    return found


@pytest.mark.parametrize(
    "buckets", [*map(rflow.BUCKETS.get, "23"), {"480p": {1: (0.4, 14)}}], ids=["2", "3", "images"]
)
def test_assignment_is_that_of_a_slow_loop(buckets):
    table = mixed(2000)
    cell, cells, dropped = rflow.assign(table, buckets, 7, 3)
    assert [cells[c] if c >= 0 else None for c in cell] == assign_slowly(table, buckets, 7, 3)
    assert sum(dropped.values()) == (cell < 0).sum() and len(set(cell)) > 10
    assert ("not an image" in dropped) == (list(buckets) == ["480p"])


def test_borders_of_the_rules():
    one = {"240p": {1: (1.0, 1), 51: (1.0, 1)}}
    cases = [
        (51, 240, 426),
        (52, 240, 426),
        (1, 240, 426),
        (2, 240, 426),
        (100, 240, 340),
        (100, 240, 341),
        (52, 426, 240),
    ]
    cell, cells, dropped = rflow.assign(table_of(cases), one, 0, 0)
    assert [cells[c] if c >= 0 else None for c in cell] == [
        None, ("240p", 51, "9:16"), ("240p", 1, "9:16"), None, None, ("240p", 51, "2:3"), ("240p", 51, "16:9")
    ]  # fmt: skip
    assert dropped == {
        "cannot be read": 0,
        "too small": 1,
        "no longer than a bucket": 2,
        "kept out by probability": 0,
    }
    unread = table_of([(0, 240, 426), (52, 240, 426)])  # a clip that the cache could not encode
    assert rflow.assign(unread, one, 0, 0)[2] == {
        "cannot be read": 1,
        "too small": 0,
        "no longer than a bucket": 0,
        "kept out by probability": 0,
    }
    kept_out = {
        "480p": {51: (1.0, 1), 102: (0.0, None)},
        "240p": {51: (1.0, 1)},
    }  # a longer clip goes to 240p
    cell, cells, _ = rflow.assign(table_of([(60, 480, 854), (103, 480, 854)]), kept_out, 0, 0)
    assert [cells[c][:2] for c in cell] == [("480p", 51), ("240p", 51)]
    for wrong in ((1.5, 4), (0.5, None), (0.5, 0), ((0.5, -1), 4)):
        with pytest.raises(ValueError, match="bucket 240p, 51 frames"):
            rflow.assign(table_of(cases), {"240p": {51: wrong}}, 0, 0)


def test_keep_probabilities():
    n = 100_000
    buckets = {"480p": {102: ((0.5, 0.4), 1), 51: (0.2, 1)}, "240p": {51: (0.3, 1)}}
    cell, cells, dropped = rflow.assign(table_of([(200, 480, 854)] * n), buckets, 0, 0)
    share = {
        key: float(np.mean(cell == cells.index((*key, "9:16"))))
        for key in (("480p", 102), ("480p", 51), ("240p", 51))
    }
    left = (
        0.4 * 0.5 + 0.6 * 0.8
    )  # of 102 frames, dropped by the resolution; passed on to 51 frames, dropped there
    expected = {("480p", 102): 0.4 * 0.5, ("480p", 51): 0.6 * 0.2, ("240p", 51): left * 0.3}
    assert share == pytest.approx(expected, abs=0.006)
    assert dropped["kept out by probability"] / n == pytest.approx(left * 0.7, abs=0.006)
    other = rflow.assign(table_of([(200, 480, 854)] * n), buckets, 0, 1)[0]
    agree = float(np.mean(cell == other))  # independent draws in each epoch
    shares = [*expected.values(), left * 0.7]
    assert agree == pytest.approx(sum(p * p for p in shares), abs=0.01)


def test_a_clips_draw_is_its_own():
    table = mixed(2000)
    first = rflow.Table(
        *(column[:700] for column in (table.num_frames, table.height, table.width, table.fps))
    )
    assert (
        rflow.assign(table, rflow.BUCKETS["2"], 5, 1)[0][:700]
        == rflow.assign(first, rflow.BUCKETS["2"], 5, 1)[0]
    ).all()


@pytest.mark.parametrize("world", [1, 8])
def test_plan(world):
    table = mixed(6000)
    p = rflow.plan_epoch(table, rflow.BUCKETS["3"], 1, 2, world)
    again = rflow.plan_epoch(table, rflow.BUCKETS["3"], 1, 2, world)
    assert all(
        np.array_equal(getattr(p, n), getattr(again, n)) for n in ("rows", "starts", "bucket_of", "order")
    )
    step = len(p.order) // 2  # a resumed run asks for this one at once
    assert [p.batch(p.order[step, r])[1].tolist() for r in range(world)] == [
        again.batch(again.order[step, r])[1].tolist() for r in range(world)
    ]
    assert not np.array_equal(p.rows, rflow.plan_epoch(table, rflow.BUCKETS["3"], 1, 3, world).rows)
    assert p.order.shape[1] == world and len(np.unique(p.order)) == p.order.size
    cell, cells, _ = rflow.assign(table, rflow.BUCKETS["3"], 1, 2)
    seen = []
    for s in range(len(p.order)):
        for r in range(world):
            (bucket, rows), spare = p.batch(p.order[s, r]), list(p.others(p.order[s, r]))
            assert len(rows) == bucket.batch_size <= rflow.BUCKETS["3"][bucket.resolution][bucket.frames][1]
            assert {cells[c] for c in cell[[*rows, *spare]]} == {
                (bucket.resolution, bucket.frames, bucket.ratio)
            }
            assert not set(rows) & set(spare)
            same = [b for b in range(len(p.bucket_of)) if p.batch(b)[0] == bucket] if s < 3 else []
            assert not same or len(spare) + len(rows) == sum(len(p.batch(b)[1]) for b in same), "all others"
            seen += rows.tolist()
    assert len(seen) == len(set(seen)) and sum(p.dropped.values()) + len(seen) == 6000
    clips = sum(
        int(line.split()[2].replace(",", "")) for line in p.table().split("left out")[0].splitlines()[1:]
    )
    assert clips == len(seen) and f"remainder of a step {p.dropped['remainder of a step']:20,}" in p.table()
    first = p.first_of_each(1)
    names = [(p.buckets[i].resolution, p.buckets[i].frames) for i in p.bucket_of]
    assert {names[b] for b in first} == set(names) and len(first) == len(set(names)), "whatever the ratio"


def test_remainders():
    table = table_of([(60, 240, 426)] * 47 + [(60, 426, 240)] * 3)
    plans = [rflow.plan_epoch(table, {"240p": {51: (1.0, 20)}}, 0, epoch, 1) for epoch in range(60)]
    for p in plans:  # two whole batches and a smaller one of the rare shape
        assert sorted(np.diff(p.starts)) == [3, 20, 20] and p.dropped["remainder of a batch"] == 7
    assert {int(row) for p in plans for row in p.rows} == set(range(50))  # each clip comes in some epoch
    two = rflow.plan_epoch(table, {"240p": {51: (1.0, 20)}}, 0, 0, 2)
    assert two.order.shape == (1, 2) and two.dropped["remainder of a step"] in (3, 20)


def test_refusals(capsys):
    for table, buckets, world, said in (
        (table_of([(60, 100, 100)] * 9), rflow.BUCKETS["1"], 8, "too small                              9"),
        (table_of([(20, 480, 854)] * 9), rflow.BUCKETS["1"], 8, "no longer than a bucket                9"),
        (
            table_of([(60, 480, 854)] * 9),
            {"480p": {1: (1.0, 2)}},
            8,
            "not an image                           9",
        ),
        (table_of(np.zeros((0, 3))), rflow.BUCKETS["1"], 8, "no batch to train on"),
        (table_of([(60, 480, 854)] * 9), {"480p": {51: (1.0, 3)}}, 8, "3 batches for 8 ranks"),
    ):
        with pytest.raises(SystemExit) as stop:
            rflow.plan_epoch(table, buckets, 0, 0, world)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and "take " in error


def test_demo_buckets():
    """Each generated clip, which has its last frame twice, goes where it was made for."""
    table = table_of([(frames + 1, size, size) for size, frames in shapes.MADE] * 50)
    p = rflow.plan_epoch(table, rflow.BUCKETS["demo"], 0, 0, 2)
    for b, rows in map(p.batch, range(len(p.bucket_of))):
        assert {((b.size[0], b.frames), tuple(shapes.MADE[row % 4])) for row in rows} == {
            ((b.size[0], b.frames),) * 2
        }
    assert (
        len(p.buckets) == 4
        and sum(p.dropped.values()) == p.dropped["remainder of a batch"] + p.dropped["remainder of a step"]
    )


@pytest.mark.parametrize(("stage", "world"), [("1", 8), ("2", 192)])
def test_balance(stage, world):
    """What a step waits for its costliest rank: .3 and 1.7 %, in upstream's order 6 and 23 %"""
    p = rflow.plan_epoch(openvid(200_000), rflow.BUCKETS[stage], 0, 0, world)
    assert p.order.shape[1] == world and 1 <= p.imbalance < 1.03 < 1.05 < p.imbalance_shuffled
    costs = np.array([rflow.published_tokens(b.frames, *b.size) * b.batch_size for b in p.buckets])[
        p.bucket_of
    ]
    assert rflow.imbalance(costs, p.order) == pytest.approx(p.imbalance)
    by_rank, by_step = costs[p.order].mean(0), costs[p.order].mean(1)
    assert (np.diff(by_rank) < 0).any()  # the last rank does not have the dear batches
    if len(by_step) > 1000:  # neither an epoch nor a window goes from cheap to dear
        place = np.arange(len(by_step))
        assert (
            abs(np.corrcoef(by_step, place)[0, 1]) < 0.1
            and abs(np.corrcoef(by_step, place % rflow.WINDOW)[0, 1]) < 0.1
        )


# --- Rows


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


OPEN_SORA = {
    "path": "a.mp4", "text": "a cat", "num_frames": 60, "height": 240, "width": 426, "fps": 24.0, "aes": 5.52, "flow": 10.0,
    "cmotion": "pan left",
}  # fmt: skip
OPENVID = {
    "video": "a.mp4", "caption": "A cat.", "aesthetic score": 5.52, "motion score": 10.04, "temporal consistency score": 0.9,
    "camera motion": "pan_left", "frame": 60, "fps": 23.976, "seconds": 2.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        (OPEN_SORA, ("5.5", "10.0", "pan left")),
        (OPENVID, ("5.5", "10.0", "pan left")),
        (
            OPENVID | {"aesthetic score": "nan", "motion score": "", "camera motion": "Undetermined"},
            ("", "", ""),
        ),
        ({"path": "a.mp4", "text": "a cat", "motion_score": -1}, ("", "", "")),
    ],
)
def test_scores_are_those_of_known_columns(tmp_path, said, scores):
    (tmp_path / "a.mp4").touch()
    cfg = rflow.Config(manifest=write_csv(tmp_path / "a.csv", [said]))
    (row,), _ = read_data(cfg, "caption", rflow.SCORE_COLUMNS)
    assert rflow.scores_of(row) == scores


def test_sizes_are_read_from_the_files(tmp_path):
    write_mp4(np.zeros((7, 32, 48, 3), np.uint8), tmp_path / "a.mp4", 8)
    write_mp4(np.zeros((7, 32, 48, 3), np.uint8), tmp_path / "c.mkv", 8)  # its header does not count frames
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "bad.mp4").write_text("<html>")
    with av.open(str(tmp_path / "side.mp4"), "w") as file, av.open(str(tmp_path / "a.mp4")) as source:
        stream = file.add_stream_from_template(source.streams.video[0])
        if hasattr(stream, "set_display_rotation"):
            stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    assert rflow.probe(tmp_path / "a.mp4") == (7, 32, 48, 8.0) == rflow.probe(tmp_path / "c.mkv")
    assert rflow.probe(tmp_path / "b.png") == (1, 20, 30, rflow.IMAGE_FPS)
    if hasattr(stream, "set_display_rotation"):
        assert rflow.probe(tmp_path / "side.mp4")[1:3] == (48, 32)
    assert rflow.probe(tmp_path / "c.mkv", 0.25, 0.625)[0] == 3, "at 0.25, 0.375 and 0.5 s"
    with pytest.raises(BadSample, match="no frame from 0.9 to 2 s"):
        rflow.probe(tmp_path / "a.mp4", 0.9, 2)
    (tmp_path / "said.mp4").touch()  # not looked at: the row says all
    lines = [{"path": name, "text": "x"} for name in ("a.mp4", "bad.mp4", "b.png")]
    lines += [OPEN_SORA | {"path": "said.mp4"}, {"path": "a.mp4", "text": "x", "start": 0.25, "end": 0.625}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = rflow.Config(manifest=tmp_path / "m.jsonl", cache_dir=tmp_path / "cache", num_workers=2)
    rows, _ = read_data(cfg, "caption")
    good, table, (unread,) = rflow.clip_table(rows, cfg)
    assert [Path(row.video).name for row in good] == ["a.mp4", "b.png", "said.mp4", "a.mp4"]
    assert table.num_frames.tolist() == [7, 1, 60, 3]
    assert table.height.tolist() == [32, 20, 240, 32] and table.width.tolist() == [48, 30, 426, 48]
    assert unread["where"].endswith("m.jsonl:2") and "not a video" in unread["reason"]
    assert rflow.clip_table([], cfg)[1].num_frames.shape == (0,)
    # what was seen is noted: a good file is opened once
    (tmp_path / "a.mp4").rename(tmp_path / "elsewhere.mp4")
    assert rflow.clip_table(rows, cfg)[0] == good


def test_captions():
    scores = ("5.5", "10.0", "pan left")
    captions = [
        rflow.scored_caption("A cat.", scores, rflow.rng_of(rflow.CAPTION, 0, 1, i)) for i in range(4000)
    ]
    again = [
        rflow.scored_caption("A cat.", scores, rflow.rng_of(rflow.CAPTION, 0, 1, i)) for i in range(4000)
    ]
    assert captions == again
    assert "A cat. aesthetic score: 5.5. motion score: 10.0. camera motion: pan left." in captions
    assert "A cat." in captions
    for name in rflow.SCORES:
        assert np.mean([name in text for text in captions]) == pytest.approx(0.8, abs=0.03)
    rng = rflow.rng_of(rflow.CAPTION, 0, 1, 2)
    assert rflow.scored_caption("a cat", ("", "", ""), rng) == "a cat"
    written = "a cat. aesthetic score: 6."
    assert rflow.scored_caption(written, ("5.5", "", ""), None) == written
    assert rflow.scored_caption(written, ("5.5", "2.0", ""), None) == f"{written} motion score: 2.0."
    # as append_score_to_prompts does: no full stop before it
    assert rflow.scored_caption("a cat", ("6.5", "", ""), None) == "a cat aesthetic score: 6.5."


# What clean_caption of opensora/models/text_encoder/t5.py makes of them, twice, run there
CLEANED = {
    "A dog runs. aesthetic score: 6.5.": "a dog runs. aesthetic score: 6.5.",
    "I <3 this dog -> it runs": "i <3 this dog -> it runs",
    "<b>A man</b> walks (slowly) on the beach #sunset": "a man walks slowly on the beach sunset",
    "Two cats & a dog &amp; a bird, 100% real": "two cats a dog a bird, 100% real",
    "A 红色 car drives | fast / slow": "a car drives fast slow",
    "See https://example.com/x?y=1 for more": "see ?y=1 for more",
    '"A quoted caption."': "a quoted caption.",
    "this-is-my-cute-cat video.mp4": "this is my cute cat",
    "the_man_walks_in_the_park": "the_man_walks_in_the_park".replace("_", " "),
    "It costs $5.00 ... really!!": "it costs $5.00 really!!",
    "<person> opens a door: he leaves": "person opens a door: he leaves",
    "AB1234 shipped @john 1920x1080 12:30 ": "shipped 12:30",
    "  A [robot] *dances* ~ 1.5x  ": "a robot dances 1.5x",
    "drone-view over-the-top shot, wide-angle at sun-set": "drone view over the top shot, wide angle at sun set",
}


def test_captions_are_cleaned_as_upstream_cleans_them():
    assert {caption: rflow.clean(caption) for caption in CLEANED} == CLEANED


def test_frames():
    starts = [rflow.frames_of(60, 51, rflow.rng_of(rflow.FRAMES, 0, 0, i)) for i in range(500)]
    assert {r.start for r in starts} == set(range(9)) and {len(r) for r in starts} == {51}
    assert list(rflow.frames_of(1, 1, rflow.rng_of(rflow.FRAMES, 0, 0, 0))) == [0]
    assert rflow.frames_of(5, 5, rflow.rng_of(rflow.FRAMES, 0, 0, 0)).stop == 5
    with pytest.raises(BadSample, match="50 frames, at least 51 needed"):
        rflow.frames_of(50, 51, rflow.rng_of(rflow.FRAMES, 0, 0, 0))
    uses = (rflow.KEEP, rflow.SHUFFLE, rflow.CAPTION, rflow.FRAMES, rflow.MASKS)
    assert (
        len({rflow.rng_of(use, *rest).random() for use in uses for rest in ((1, 2, 3), (1, 3, 2), (2, 1, 3))})
        == 15
    )


def test_data_are_the_same_wherever_they_lie(tmp_path):
    """Fingerprint and random numbers go by what the rows say, not by the folder that they lie in."""
    draws, digests = [], []
    for folder, text in (("here", "a cat"), ("there", "a cat"), ("there", "a dog")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.mp4").touch()
        row = OPEN_SORA | {"text": text}
        cfg = rflow.Config(manifest=write_csv(tmp_path / folder / "m.csv", [row]))
        data = rflow.load_data(cfg)
        source = rflow.Source(cfg, data.rows, data.table, PIXELS, WORDS)
        draws.append([source.frames(0, rflow.Bucket("240p", 4, "9:16", 1), epoch) for epoch in range(20)])
        digests.append(data.digest([]))
    assert int(data.digest(rflow.unread_names([{"video": "elsewhere/a.mp4"}])), 16) == 0, (
        "known not to be readable"
    )
    assert draws[0] == draws[1] and digests[0] == digests[1] != digests[2]


# --- Generated clips


def test_its_shapes_and_captions():
    rng, asked = np.random.default_rng(0), shapes.all_captions(shapes.RFLOW_SHAPES)
    assert set(shapes.RFLOW_SHAPES) == {"square", "pillar", "beam"}
    assert [shapes.attributes_in(shapes.caption_of(a)) for a in asked] == asked and shapes.attributes_in(
        "a cat"
    ) == {}
    for size, frames in itertools.product((12, 16), (4, 6)):
        clips = np.stack([shapes.draw_clip(a, frames, size, rng) for a in asked])
        turned = shapes.asked_is_made(clips.transpose(0, 1, 3, 2, 4), asked, shapes.RFLOW_SHAPES)["shape"]
        assert turned == pytest.approx(1 / 3), "a pillar on its side is a beam"


def test_what_the_demo_trains_on_shows_its_captions(tmp_path):
    """From the files, by the way that training takes: rows, bucket, frames."""
    cfg = rflow.Config(demo=True, steps=1, cache_dir=tmp_path, vae="pixels", text="words", max_bad=0.0)
    data = rflow.load_data(cfg)
    rows, table = [*data.rows, *data.held_rows], [*data.table.num_frames, *data.held_table.num_frames]
    assert len(rows) == 192 and not data.bad and 10 < len(data.held_rows) < 50
    assert not {row.texts[0] for row in data.rows} & {row.texts[0] for row in data.held_rows}
    assert int(data.digest([]), 16) == 0, "more steps take more clips, and are the same run"
    for row, frames in zip(rows, table):
        bucket = rflow.Bucket(f"{row.height:.0f}p", int(frames) - 1, "1:1", 1)
        source = rflow.Source(cfg, [row], table_of([(frames, row.height, row.width)]), PIXELS, WORDS)
        clip = source.pixels(0, bucket, epoch=3)
        assert clip.shape == (frames - 1, row.height, row.width, 3) and (clip[0] != clip[-1]).any()
        assert shapes.attributes_in(row.texts[0]) == shapes.read_clip(clip, shapes.RFLOW_SHAPES)
    assert shapes.make_data(cfg).stat().st_mtime_ns == Path(data.source).stat().st_mtime_ns, "made once"


# --- Frames


def numbered_clip(folder, frames, size=(12, 16), name="a.mkv", fps=8):
    """Frame i has the grey 10 i; the last one comes twice."""
    clip = np.broadcast_to(10 * np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, *size, 3))
    shapes.write_lossless(np.ascontiguousarray(clip), folder / name, fps)
    return folder / name


def test_frames_are_fitted_to_cover_from_the_centre():
    """A picture whose colours are its coordinates"""
    rows, columns = np.meshgrid(np.arange(60), np.arange(100), indexing="ij")
    picture = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    assert np.array_equal(fitted(picture, (60, 60)), picture[:, 20:80]), "nothing to scale"
    assert np.array_equal(fitted(picture, (20, 100)), picture[20:40])
    for size in ((30, 30), (30, 12), (11, 40), (120, 130), (45, 90), (59, 99)):
        made = fitted(picture, size)
        scale = max(size[0] / 60, size[1] / 100)
        assert made.shape == (*size, 3)
        for axis, (length, whole) in enumerate(((size[0], 60), (size[1], 100))):
            ends = [np.take(made[..., axis], i, axis).mean() for i in (0, length - 1)]
            assert sum(ends) / 2 == pytest.approx((whole - 1) / 2, abs=0.6 / scale + 0.5), "the centre"
            assert ends[1] - ends[0] == pytest.approx((length - 1) / scale, abs=1.5), (
                "the same scale on both sides"
            )


def test_what_a_sample_is_told_to_begin_with(tmp_path):
    clip, bucket = numbered_clip(tmp_path, 6), rflow.Bucket("12p", 6, "1:1", 1)
    given, made = rflow.condition(clip, True, bucket, PIXELS, 0)
    assert given.shape == (1, 3, 6, 12, 12) and made.tolist() == [False] * 3 + [True] * 3
    assert ((given[0, 0, :3, 0, 0] + 1) * 127.5).round().tolist() == [40, 50, 50], "the last ones"
    cv2.imwrite(str(tmp_path / "a.png"), np.full((24, 24, 3), 255, np.uint8))
    given, made = rflow.condition(tmp_path / "a.png", False, bucket, PIXELS, 0)
    assert made.tolist() == [False] + [True] * 5 and (given[0, :, 0] == 1).all() and not given[0, :, 1:].any()
    for file, extend in ((clip, False), (tmp_path / "a.png", True)):
        with pytest.raises(BadSample, match="give it as"):
            rflow.condition(file, extend, bucket, PIXELS, 0)
    with pytest.raises(BadSample, match="more --frames"):
        rflow.condition(clip, True, rflow.Bucket("12p", 1, "1:1", 1), PIXELS, 0)


@pytest.mark.parametrize("frames", [8, 16, 17, 34])
def test_an_extension_begins_with_the_frames_that_its_latents_show(tmp_path, monkeypatch, frames):
    """A piece is padded in front, so of 17 frames the first latent is one frame, of 16 four."""
    vae, read = rflow.OpenSoraVAE(32, 1, (32, 32, 32, 32), 1), []
    monkeypatch.setattr(
        rflow,
        "timed_frames",
        lambda path, run, size: (read.append(run) or np.zeros((len(run), *size, 3), np.uint8), None),
    )
    _, made = rflow.condition(
        numbered_clip(tmp_path, 24), True, rflow.Bucket("16p", frames, "1:1", 1), vae, 0
    )
    given, whole = int((~made).sum()), vae.latent_frames(frames)
    shown = 17 * (given // 5) if frames > 17 else frames - 4 * (whole - given)
    assert len(read[0]) == shown and read[0].stop == 25


# --- Batches


def test_captions_are_padded():
    y, mask = rflow.padded([np.full((n, 3), n, np.float16) for n in (2, 4, 1)])
    assert y.shape == (3, 4, 3) and y.dtype == torch.float16 and mask.dtype == torch.bool
    assert mask.tolist() == [[i < n for i in range(4)] for n in (2, 4, 1)]
    assert all((y[i, :n] == n).all() and not y[i, n:].any() for i, n in enumerate((2, 4, 1)))


class Named(SimpleNamespace):
    """A source whose clips are the numbers of their rows."""

    def batch(self, bucket, rows, others, epoch):
        latents = [np.full((1, bucket.frames, 1, 1), row, np.float16) for row in rows]
        return latents, [np.full((1, 2), epoch, np.float16) for _ in rows], rows.tolist()


def rows_of(batch):
    return batch["x"][:, 0, 0, 0, 0].int().tolist()


def batches_of(cache, seed=1, mask_share=0.5):
    table = table_of([(frames + 1, size, size) for size, frames in shapes.MADE] * 30)
    table.fps[:] = np.arange(120) + 0.97  # told as whole numbers
    buckets = {r: {f: (0.6, 2 if f == 4 else 3) for f in of} for r, of in rflow.BUCKETS["demo"].items()}
    cfg = rflow.Config(seed=seed, cache=cache, mask_share=mask_share)
    return rflow.Batches(cfg, Named(table=table, codec=PIXELS), buckets)


@pytest.mark.parametrize("cache", [None, Path("latents")])
def test_batches_walk_whole_epochs(monkeypatch, cache):
    monkeypatch.setenv("WORLD_SIZE", "2")
    batches = batches_of(cache)
    lengths = [batches.length(epoch) for epoch in range(3)]
    places = [batches.place(i) for i in range(sum(lengths))]
    walked = [[step for epoch, step in places if epoch == e] for e in range(3)]
    assert [epoch for epoch, _ in places] == [e for e in range(3) for _ in range(lengths[e])]
    assert [sorted(steps) for steps in walked] == [list(range(n)) for n in lengths] and walked[0] == list(
        range(lengths[0])
    )
    seen = []
    for i in range(sum(lengths)):
        parts = []
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            parts.append(batches(i))
        rows = [rows_of(part) for part in parts]
        assert not set(rows[0]) & set(rows[1])
        for part in parts:
            assert part["fps"].tolist() == rows_of(part) and (part["y"] == places[i][0]).all()
        seen.append(rows)
    epochs = [seen[sum(lengths[:e]) : sum(lengths[: e + 1])] for e in range(3)]
    same_batches = sorted(map(str, epochs[0])) == sorted(map(str, epochs[1]))
    if cache:  # the first epoch's batches in another order
        assert same_batches and epochs[0] != epochs[1] != epochs[2] and len(set(lengths)) == 1
    else:
        assert (
            not same_batches
            and all(walked[e] == list(range(lengths[e])) for e in range(3))
            and len(set(lengths)) > 1
        )
        for epoch in epochs:
            rows = [row for step in epoch for part in step for row in part]
            assert len(rows) == len(set(rows)), "each clip once an epoch"


@pytest.mark.parametrize("cache", [None, Path("latents")])
def test_batches_are_a_function_of_seed_step_and_rank(monkeypatch, cache):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = {}
    for name, seed, rank, steps in (
        ("run", 1, "0", range(40)),
        ("again", 1, "0", range(30, 40)),
        ("rank", 1, "1", range(40)),
        ("seed", 2, "0", range(40)),
    ):
        monkeypatch.setenv("RANK", rank)
        batches = batches_of(cache, seed)
        told[name] = [(rows_of(b), b["predicted"].tolist(), b["fps"].tolist()) for b in map(batches, steps)]
    assert told["again"] == told["run"][30:], "resumed"
    assert all(told[name][i] != told["run"][i] for name in ("rank", "seed") for i in range(40))
    masks = [[made[i][1] for i in range(40)] for made in (told["run"], told["rank"])]
    assert any(a != b for a, b in zip(*masks) if np.shape(a) == np.shape(b)), "ranks draw for themselves"
    given = np.mean([not all(made) for _, many, _ in told["run"] for made in many])
    assert 0.3 < given < 0.7, "of each clip by itself"
    assert any(len(set(map(all, many))) == 2 for _, many, _ in told["run"])
    assert all(b["predicted"].all() for b in map(batches_of(cache, mask_share=0.0), range(40)))


def test_another_clip_takes_the_place_of_one_that_cannot_be_read(tmp_path, caplog):
    """With all that belongs to it: its caption and its frame rate."""
    for i in range(6):
        path = numbered_clip(tmp_path, 4, (12, 12), f"{i}.mkv", fps=8 + i)
        if i == 2:
            path.write_bytes(path.read_bytes()[:300])
    rows = [
        Row("m:", i, f"{tmp_path}/{i}.mkv", [f"w{i}"], num_frames=5, height=12, width=12, fps=8.0 + i)
        for i in range(6)
    ]
    table = table_of([(5, 12, 12)] * 6)
    table.fps[:] = [row.fps for row in rows]
    cfg = rflow.Config(cache_dir=tmp_path, output_dir=tmp_path)
    source = rflow.Source(cfg, rows, table, PIXELS, WORDS)
    batches = rflow.Batches(cfg, source, {"12p": {4: (1.0, 2)}})
    states = {WORDS.encode([f"w{i}"])[0].tobytes(): i for i in range(6)}
    replaced = 0
    for micro in range(30):
        epoch, step = batches.place(micro)
        b = batches.epoch(epoch).order[step, 0]
        asked, others = batches.epoch(epoch).batch(b)[1], batches.epoch(epoch).others(b)
        batch = batches(micro)
        used = [states[y.numpy().tobytes()] for y in batch["y"]]
        assert len(batch["x"]) == 2 and 2 not in used and set(used) <= {*asked, *others}
        assert batch["fps"].tolist() == [8.0 + i for i in used], (asked, used)
        replaced += 2 in asked
    assert replaced and caplog.text.count("another clip takes its place") == 1, "told once"


def test_no_file_ends_a_run(tmp_path, caplog):
    """All but one clip are gone: smaller batches, the next bucket's, and an end only when nothing is left."""
    rows = [
        Row(
            "m:",
            i,
            f"{numbered_clip(tmp_path, 6, (16, 16), f'{i}.mkv')}",
            [f"w{i}"],
            num_frames=7 if i % 2 else 5,
        )
        for i in range(6)
    ]
    for i in (0, 2, 3, 4, 5):
        Path(rows[i].video).unlink()
    cfg = rflow.Config(cache_dir=tmp_path, output_dir=tmp_path, manifest=tmp_path)
    table = table_of([(int(row.num_frames), 16, 16) for row in rows])
    source = rflow.Source(cfg, rows, table, PIXELS, WORDS)
    batches = rflow.Batches(cfg, source, {"16p": {4: (1.0, 3), 6: (1.0, 3)}})
    for micro in range(6):
        batch = batches(micro)
        assert len(batch["x"]) == 1 and batch["bucket"].frames == 6
        assert torch.equal(batch["y"][0], torch.from_numpy(WORDS.encode(["w1"])[0]))
    noted = [json.loads(line)["video"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(Path(video).name for video in noted) == [f"{i}.mkv" for i in (0, 2, 3, 4, 5)], "each once"
    held = rflow.HeldOut(cfg, source, {"16p": {4: (1.0, 3), 6: (1.0, 3)}}, batches.epoch(0))
    losses = rflow.held_out_loss(constant(0.0), held, cfg)
    assert set(losses) == {"loss", "16p_4", "16p_6"}, "the one clip fits both"
    assert losses["loss"] == pytest.approx(np.mean([losses["16p_4"], losses["16p_6"]]))
    Path(rows[1].video).unlink()
    assert math.isnan(rflow.held_out_loss(constant(0.0), held, cfg)["loss"])
    with pytest.raises(SystemExit, match="no clip of .* can be read any more"):
        batches(7)


def test_held_out_loss_looks_where_training_looks():
    """In stage 1 clips of 1080p are trained on at 144p to 360p; all of these are looked at, and count as often."""
    table, buckets = openvid(20_000), rflow.BUCKETS["1"]
    epoch = rflow.plan_epoch(table, buckets, 0, 0, 8)
    held = rflow.HeldOut(rflow.Config(), SimpleNamespace(table=openvid(300, 1)), buckets, epoch)
    trained = [epoch.buckets[i].name for i in epoch.bucket_of[epoch.order.ravel()]]
    assert (
        {part.batch(b)[0].name for part, b in held.places} == set(trained) > {"144p_51", "240p_51", "360p_51"}
    )
    assert [b.name for b in held.shapes] == list(
        dict.fromkeys(part.batch(b)[0].name for part, b in held.places)
    )
    assert held.shares == pytest.approx({name: trained.count(name) / len(trained) for name in set(trained)})
    for part, b in held.places:
        bucket, rows = part.batch(b)
        assert 0 < len(rows) <= buckets[bucket.resolution][bucket.frames][1]
        assert (held.source.table.num_frames[rows] > bucket.frames).all()


def test_latents_are_the_same_whether_encoded_before_or_in_the_step(tmp_path):
    """Also in another batch, and with text that another encoder has read; a full cache needs no videos."""
    rows = [Row("m:", i, str(numbered_clip(tmp_path, 20, (32, 32), f"{i}.mkv")), [f"w{i}"]) for i in range(4)]
    numbers = table_of([(21, 32, 32)] * 4)
    cfg = rflow.Config(cache=tmp_path / "latents", cache_dir=tmp_path, output_dir=tmp_path)
    torch.manual_seed(0)
    vae = rflow.OpenSoraVAE(32, 1, (32, 32, 32, 32), 1).requires_grad_(False)
    stored = rflow.Rows(rflow.store_rows(tmp_path, rows, numbers, np.zeros(4, bool), cfg), np.arange(4))
    sizes = dict(num_frames=21.0, height=32.0, width=32.0, fps=24.0)
    assert [stored[i] for i in range(4)] == [dataclasses.replace(row, **sizes) for row in rows] and len(
        stored
    ) == 4
    bucket, everything = rflow.Bucket("32p", 18, "1:1", 4), list(range(4))

    def encoded(which, text=WORDS, **change):
        source = rflow.Source(dataclasses.replace(cfg, **change), stored, numbers, vae, text)
        return source.encoded(bucket, which, 0)

    step = encoded(everything, cache=None)
    alone = {row: encoded([row], cache=None)[row] for row in everything}
    filled, again = encoded(everything), encoded([2, 0])
    assert not rflow.Source(cfg, stored, numbers, vae, WORDS).lacks(1, bucket)
    for row in everything:
        for made in (alone, filled, again):
            if row in made:
                np.testing.assert_allclose(made[row][0], step[row][0], atol=2e-3)
                assert np.array_equal(made[row][1], step[row][1]) and made[row][0].dtype == np.float16
    assert not np.allclose(step[0][0], step[1][0], atol=0.1), "each clip has noise of its own"
    for row in rows:
        Path(row.video).unlink()
    other = SimpleNamespace(name="other", encode=lambda said: [np.ones((1, 2), np.float16) for _ in said])
    told = encoded([3, 1], other)
    assert np.array_equal(told[1][0], filled[1][0]) and told[3][1].tolist() == [[1, 1]]
    (tmp_path / "latents" / "latents").rename(tmp_path / "gone")
    assert encoded(everything) == {}


# --- Text
# --- Text


def test_t5_gives_the_real_tokens_alone(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(
        tmp_path
    )
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=43, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(T5Config(**sizes, dropout_rate=0.5, initializer_factor=3.0)).save_pretrained(tmp_path)
    text = rflow.T5(str(tmp_path), torch.device("cpu"))
    captions = [
        " ".join(f"w{(i * k) % 40}" for k in range(1, 3 + i)) for i in range(18)
    ]  # more than one batch of the encoder
    captions += [" ".join(["w3"] * 400), "W1  w2\n<b>w3</b> (w4)"]
    made = text.encode(captions)
    assert [len(row) for row in made] == [3 + i for i in range(18)] + [300, 5] and text.width == made[
        0
    ].shape[1] == 16
    tokenizer, alone = (
        AutoTokenizer.from_pretrained(tmp_path),
        T5EncoderModel.from_pretrained(tmp_path).eval(),
    )
    for caption, row in zip([*captions[:19], "w1 w2 w3 w4"], made, strict=True):
        ids = tokenizer(caption, truncation=True, max_length=300, return_tensors="pt").input_ids
        with torch.no_grad():
            states = alone(ids).last_hidden_state[0]
        assert ids[0, -1] == 1 and row.dtype == np.float16
        np.testing.assert_allclose(row.astype(np.float32), states.numpy(), rtol=2e-3, atol=2e-3)


def test_words_are_the_same_each_time_and_no_two_alike():
    one, two = WORDS.encode(["a Red square", " ".join(f"w{i}" for i in range(40))])
    assert one.shape == (3, 64) and two.shape == (16, 64) and one.dtype == np.float16
    again = rflow.Words().encode(["square red"])[0]
    assert np.array_equal(again, one[[2, 1]])
    angles = np.corrcoef(np.concatenate([one, two]).astype(float)) - np.eye(19)
    assert abs(angles).max() < 0.6


def test_t5_from_the_files_that_the_hub_has(tmp_path):
    """spiece.model without tokenizer.json; and without it nothing is encoded as <unk> in silence."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    (tmp_path / "text.txt").write_text(
        "a man flips a pancake\na woman does yoga\nthe cat sat on the mat and moved left\n" * 50
    )
    ids = dict(vocab_size=28, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spiece"), **ids
    )
    sizes = dict(
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        vocab_size=28 + 100 + 256,
    )
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path)
    words = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 100,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    text = rflow.T5(str(tmp_path), torch.device("cpu"))
    tokens = text.tokenizer("a man does yoga").input_ids
    assert 2 not in tokens and tokens[-1] == 1 and len(text.encode(["a man does yoga"])[0]) == len(tokens)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(ValueError, match="its tokenizer knows 1?[0-9][0-9] pieces, its weights 384"):
        rflow.T5(str(tmp_path), torch.device("cpu"))
