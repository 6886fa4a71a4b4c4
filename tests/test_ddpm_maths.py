"""t2v_ddpm.py where maths can be wrong quietly: schedule and samplers against diffusers, model, generated
clips, readers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import common
import t2v_ddpm as t2v

KIND = {"noise": "epsilon", "v": "v_prediction"}


def betas_of(alpha_bar: torch.Tensor) -> np.ndarray:
    a = alpha_bar.double()
    return (1 - a / torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])).numpy()


class Fixed(torch.nn.Module):
    """Any function of (x, t) will do to compare samplers; text is added so that guidance has something to
    guide."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, t, text, drop=None):
        text = text if drop is None else torch.where(drop[:, None], 0, text)
        return torch.tanh(0.7 * x.roll(1, -1) + text.mean(-1).view(-1, 1, 1, 1, 1)) * (
            0.5 + t.view(-1, 1, 1, 1, 1) / 2000
        )


def test_cosine_schedule_is_diffusers():
    peer = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(t2v.cosine_alpha_bar(), peer, rtol=2e-4, atol=1e-7)


def test_shift_divides_the_signal_to_noise_ratio():
    a, b = t2v.cosine_alpha_bar(1.0).double(), t2v.cosine_alpha_bar(3.0).double()
    middle = slice(50, 950)  # float32 leaves no digits at the ends
    torch.testing.assert_close(
        (a / (1 - a))[middle] / (b / (1 - b))[middle], torch.full((900,), 9.0).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_noise_and_target_are_diffusers(prediction):
    alpha_bar = t2v.cosine_alpha_bar(2.0)
    peer = DDPMScheduler(trained_betas=betas_of(alpha_bar), prediction_type=KIND[prediction])
    x, noise, t = torch.randn(4, 2, 3, 8, 8), torch.randn(4, 2, 3, 8, 8), torch.tensor([0, 10, 500, 998])
    torch.testing.assert_close(
        t2v.add_noise(x, noise, alpha_bar[t]), peer.add_noise(x, noise, t), rtol=1e-3, atol=1e-4
    )
    target = peer.get_velocity(x, noise, t) if prediction == "v" else noise
    torch.testing.assert_close(
        t2v.diffusion_target(x, noise, alpha_bar[t], prediction), target, rtol=1e-3, atol=1e-4
    )
    clean, again = t2v.clean_and_noise(peer.add_noise(x.clamp(-1, 1), noise, t)[2:3], target[2:3] * 0 + t2v.diffusion_target(
        x.clamp(-1, 1), noise, alpha_bar[t], prediction)[2:3], alpha_bar[500], prediction)  # fmt: skip
    torch.testing.assert_close(clean, x.clamp(-1, 1)[2:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again, noise[2:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ddim_is_diffusers(prediction, guidance):
    cfg = t2v.Config(prediction=prediction, guidance=guidance, sample_steps=20, shift=2.0)
    peer = DDIMScheduler(
        trained_betas=betas_of(t2v.cosine_alpha_bar(2.0)),
        prediction_type=KIND[prediction],
        timestep_spacing="trailing",
    )
    peer.set_timesteps(20)
    model, text, shape = Fixed(), torch.randn(2, 16), (3, 3, 4, 4)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    for t in peer.timesteps:
        with_text, without = model(x, t.expand(2), text), model(x, t.expand(2), text * 0)
        x = peer.step(
            without + guidance * (with_text - without), t, x, use_clipped_model_output=True
        ).prev_sample
    torch.testing.assert_close(t2v.sample(model, text, shape, cfg, seed=5), x.detach(), rtol=1e-3, atol=1e-3)


def test_ancestral_sampling_is_diffusers_ddpm():
    cfg = t2v.Config(prediction="v", guidance=1.0, sampler="ddpm")
    betas = betas_of(t2v.cosine_alpha_bar())
    peer = DDPMScheduler(
        trained_betas=betas, prediction_type="v_prediction", variance_type="fixed_small", clip_sample=True
    )
    peer.set_timesteps(1000)
    model, text, shape = Fixed(), torch.randn(2, 16), (2, 3, 4, 4)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, *shape, generator=generator)
    for t in peer.timesteps:
        x = peer.step(model(x, t.expand(2), text), t, x, generator=generator).prev_sample
    torch.testing.assert_close(t2v.sample(model, text, shape, cfg, seed=5), x.detach(), rtol=2e-3, atol=2e-3)


def test_model_shapes_and_size():
    with torch.device("meta"):
        model = t2v.UNet3DCond()
        assert model(torch.empty(2, 8, 3, 64, 64), torch.empty(2), torch.empty(2, 512)).shape == (
            2,
            8,
            3,
            64,
            64,
        )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 15 < millions < 25
    small = t2v.UNet3DCond(16, 2, 1, 2, 32).eval()
    torch.nn.init.normal_(small.leave[-1].weight)
    torch.nn.init.normal_(small.no_text)
    x, t, text = torch.randn(2, 5, 3, 16, 24), torch.tensor([3, 900]), torch.randn(2, 32)
    whole, none = small(x, t, text), small(x, t, text, torch.tensor([True, True]))
    assert whole.shape == x.shape
    assert not torch.allclose(whole, none) and torch.equal(
        none, small(x, t, text * 2, torch.tensor([True, True]))
    )
    assert torch.allclose(whole[:1], small(x[:1], t[:1], text[:1]), atol=1e-3), (
        "clips of a batch must not touch each other"
    )


@pytest.mark.parametrize("base", [8, 24, 88])
def test_odd_widths_work(base):
    with torch.device("meta"):
        assert t2v.UNet3DCond(base)(
            torch.empty(1, 3, 3, 8, 8), torch.empty(1), torch.empty(1, 512)
        ).shape == (1, 3, 3, 8, 8)


def test_frames_reach_each_other_through_time_attention():
    model = t2v.UNet3DCond(16, 2, 1, 2, 32).eval()
    for part in model.modules():
        if isinstance(part, t2v.Attention):
            torch.nn.init.normal_(part.out.weight)
    torch.nn.init.normal_(model.leave[-1].weight)
    x, t, text = torch.randn(1, 4, 3, 16, 16), torch.tensor([500]), torch.randn(1, 32)
    other = x.clone()
    other[:, 3] += 1
    assert not torch.allclose(model(x, t, text)[:, 0], model(other, t, text)[:, 0])


def test_activation_bytes_grow_with_the_batch():
    model, cfg = t2v.UNet3DCond(16, 2, 1, 2, 32), t2v.Config(frames=4, size=16, patch=2, levels=2)

    def kept(batch_size: int, dtype: str) -> int:
        return t2v.activation_bytes(model, dataclasses.replace(cfg, batch_size=batch_size, dtype=dtype))

    assert kept(1, "fp32") > 100_000 and 1.8 < kept(2, "fp32") / kept(1, "fp32") < 2.05
    assert kept(1, "bf16") < 0.7 * kept(1, "fp32")


def test_batches_are_a_function_of_the_step(monkeypatch):
    clips = t2v.Clips(
        [np.full((1, 2, 2, 3), i, np.uint8) for i in range(10)],
        [("a",)] * 10,
        [[0, 1]] * 10,
        torch.arange(2.0)[:, None],
    )
    cfg, seen = t2v.Config(batch_size=1), []
    for micro in range(10):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            frames, text = t2v.get_batch(clips, cfg, micro)
            again, _ = t2v.get_batch(clips, cfg, micro)
            assert torch.equal(frames, again)
            seen.append((int(frames[0, 0, 0, 0, 0]), float(text)))
    first, second = seen[:10], seen[10:]
    assert sorted(i for i, _ in first) == sorted(i for i, _ in second) == list(range(10)), (
        "each clip once an epoch"
    )
    assert [i for i, _ in first] != [i for i, _ in second]
    assert {c for _, c in first} == {0.0} and {c for _, c in second} == {1.0}, "captions take turns"


def test_pixels_round_trip():
    frames = torch.randint(0, 256, (2, 3, 4, 4, 3), dtype=torch.uint8)
    x = t2v.to_unit(frames)
    assert x.shape == (2, 3, 3, 4, 4) and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(t2v.to_pixels(x), frames.numpy())


@pytest.mark.parametrize(
    ("count", "split", "wanted"), [(19, "", 0), (40, "", 2), (5, "validation", 1), (40, "validation", 1)]
)
def test_held_out_are_those_of_the_data_or_a_twentieth(tmp_path, monkeypatch, count, split, wanted):
    monkeypatch.setattr(
        t2v, "decode_rows", lambda rows, *_: (rows, [Path(row.video).name for row in rows], [])
    )
    rows = [{"video": f"http://host/{i}.mp4", "captions": [f"{i}", "a clip"]} for i in range(count)]
    rows[3] |= {"split": split}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files, captions, held_out, _ = t2v.load_videos(t2v.Config(manifest=tmp_path / "rows.jsonl"))
    assert files == [f"{i}.mp4" for i in range(count)] and captions[3] == ("3", "a clip")
    assert len(held_out) == wanted and (not split or held_out == {3})


def test_config_names_the_value_and_the_next_move():
    with pytest.raises(ValueError, match="--size 30 must be a multiple of 4 .* take 32"):
        t2v.Config(size=30)
    with pytest.raises(ValueError, match="--steps 0"):
        t2v.Config(steps=0)
    with pytest.raises(ValueError, match="--manifest"):
        t2v.Config(demo=True, manifest=Path("x"))


def test_written_video_plays(tmp_path):
    import av

    clip = np.random.default_rng(0).integers(0, 256, (8, 17, 16, 3), dtype=np.uint8)
    common.write_video(clip, tmp_path / "x")
    with av.open(str(tmp_path / "x.mp4")) as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert (
        len(frames) == 8
        and frames[0].shape[0] >= 256
        and frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
    )
    assert (tmp_path / "x.mp4").read_bytes().find(b"moov") < (tmp_path / "x.mp4").read_bytes().find(
        b"mdat"
    ), "plays while it loads"
    assert (tmp_path / "x.gif").read_bytes().startswith(b"GIF89a")


def test_auto_takes_the_least_offloading_that_fits(monkeypatch, capsys):
    cfg = t2v.Config(batch_size=1, size=16, frames=2, dtype="bf16", warmup_steps=0)
    model = t2v.UNet3DCond()
    clips = t2v.Clips([], [], [], torch.zeros(1, 512))
    data = t2v.Data(clips, clips, t2v.STAND_IN, [])
    kept = {False: t2v.activation_bytes(model, cfg)}
    layouts = common.memory_layouts(sum(p.numel() for p in model.parameters()), 0, kept, "bf16", 1)
    needs = {layout.name: layout.gpu_gb for layout in layouts}
    # ZeRO-3 keeps a model as small as this gathered
    assert needs["ZeRO-2"] > needs["ZeRO-2, optimizer on CPU"]
    for name, offload in {"ZeRO-2": "", "ZeRO-2, optimizer on CPU": "optimizer"}.items():
        monkeypatch.setattr(common, "memory_here", lambda gb=needs[name] * 1.1: (gb, 64.0))
        layout = t2v.plan_of(cfg, model, data, torch.device("cpu"))
        assert (layout.stage, layout.offload) == (2, offload)
        zero = layout.config["zero_optimization"]
        offloaded = [what for what in ("optimizer", "param") if f"offload_{what}" in zero]
        assert offloaded == offload.split() and layout.config["bf16"]["enabled"]
    monkeypatch.setattr(common, "memory_here", lambda: (0.01, 64.0))
    with pytest.raises(SystemExit) as stop:
        t2v.plan_of(dataclasses.replace(cfg, batch_size=2), model, data, torch.device("cpu"))
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and "no memory layout fits" in said
        and "BS=1 saves" in said
        and "FRAMES=1 saves" in said
    )
