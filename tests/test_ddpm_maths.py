"""t2v_ddpm.py where maths can be wrong quietly: schedule and samplers against diffusers, model, generated
clips, readers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
)

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

    def forward(self, x, t, text, mask, drop):
        text = torch.where(drop[:, None], 0, (text * mask[..., None]).sum(1))
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
    noisy = peer.add_noise(x, noise, t)[2:3]
    clean = t2v.clean_of(noisy, target[2:3], alpha_bar[500], prediction)
    torch.testing.assert_close(clean, x[2:3], rtol=1e-3, atol=1e-3)


PEERS = {
    "ddim": (DDIMScheduler, {"clip_sample": True}, "cosine"),
    "ddpm": (DDPMScheduler, {"clip_sample": True}, "cosine"),
    "dpm": (DPMSolverMultistepScheduler, {}, "cosine"),
    "dpm karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "karras"),
    "heun": (HeunDiscreteScheduler, {}, "cosine"),
    "heun karras": (HeunDiscreteScheduler, {"use_karras_sigmas": True}, "karras"),
}


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samplers_are_diffusers_given_its_own_prediction(name, prediction, guidance):
    """Each of the peers makes x_0 of noise or v by itself; here it is given x_0."""
    kind, own, spacing = PEERS[name]
    # only the first two can clip x_0
    cfg = t2v.Config(
        sampler=name.split()[0], spacing=spacing, prediction=prediction, guidance=guidance, sample_steps=20,
        shift=2.0, vae="" if "clip_sample" in own else "latents",
    )  # fmt: skip
    peer = kind(
        trained_betas=betas_of(t2v.cosine_alpha_bar(2.0)), prediction_type=KIND[prediction],
        timestep_spacing="trailing", **own,
    )  # fmt: skip
    peer.set_timesteps(20)
    if "clip_sample" not in own:
        peer.set_begin_index(0)
    torch.manual_seed(0)
    model, shape = Fixed(), (3, 3, 4, 4)
    text, mask = torch.randn(2, 2, 16), torch.tensor([[True, True], [True, False]])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    x = torch.stack([torch.randn(shape, generator=g) for g in generators]) * peer.init_noise_sigma
    keep, leave = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    noise = {"generator": generators} if name == "ddpm" else {}
    noise |= {"use_clipped_model_output": True} if name == "ddim" else {}
    for t in peer.timesteps:
        given = peer.scale_model_input(x, t)
        with_text, without = (model(given, t.expand(2), text, mask, drop) for drop in (keep, leave))
        x = peer.step(without + guidance * (with_text - without), t, x, **noise).prev_sample
    made = t2v.sample(model, text, mask, shape, cfg, [5, 6])
    # where there is hardly any signal yet, few digits are left of x_0 made of noise
    torch.testing.assert_close(made, x.detach(), rtol=2e-3, atol=2e-3 * max(1.0, x.abs().max().item()))


def test_what_is_sampled_depends_on_its_own_seed_alone():
    cfg, text = t2v.Config(sample_steps=2, shift=3.0), torch.randn(3, 1, 16)
    mask = torch.ones(3, 1, dtype=torch.bool)
    together = t2v.sample(Fixed(), text, mask, (2, 3, 4, 4), cfg, [1, 2, 3])
    alone = t2v.sample(Fixed(), text[2:], mask[2:], (2, 3, 4, 4), cfg, [3])
    torch.testing.assert_close(together[2:], alone)


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_min_snr_weighs_what_the_paper_weighs(prediction):
    a = t2v.cosine_alpha_bar()[[10, 300, 600, 990]]
    snr = a / (1 - a)
    x, noise, other = torch.randn(4, 2, 3, 4, 4), torch.randn(4, 2, 3, 4, 4), torch.randn(4, 2, 3, 4, 4)
    target = t2v.diffusion_target(x, noise, a, prediction)
    output = t2v.diffusion_target(other, (t2v.add_noise(x, noise, a) - a.sqrt().view(-1, 1, 1, 1, 1) * other)
                                  / (1 - a).sqrt().view(-1, 1, 1, 1, 1), a, prediction)  # fmt: skip
    weighed = t2v.loss_weight(a, prediction, 5.0) * (output - target).square().mean((1, 2, 3, 4))
    wanted = snr.clamp(max=5.0) * (other - x).square().mean((1, 2, 3, 4))  # of x_0, equation 5
    torch.testing.assert_close(weighed, wanted, rtol=1e-2, atol=1e-4)
    assert torch.equal(t2v.loss_weight(a, prediction, 0.0), torch.ones(4))


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_the_blind_guess_is_the_best_linear_one(prediction):
    """Least squares over many pixels of one mean and variance find the same line."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(64, 2, 3, 8, 8, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    for t in (100, 500, 900):
        a = t2v.cosine_alpha_bar()[t].expand(64)
        noisy, target = t2v.add_noise(x, noise, a), t2v.diffusion_target(x, noise, a, prediction)
        guess = t2v.blind_guess(noisy, a, (torch.full((3, 8, 8), 0.3), torch.tensor(0.25)), prediction)
        line = torch.stack([noisy.flatten(), torch.ones(noisy.numel())], 1)
        best = line @ torch.linalg.lstsq(line, target.flatten()[:, None]).solution
        least = (best[:, 0] - target.flatten()).square().mean()
        assert least <= (guess - target).square().mean() < least * 1.01 + 1e-5


def text_of(count: int, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, tokens, width), torch.ones(count, tokens, dtype=torch.bool)


def alive(model: t2v.UNet3DCond) -> t2v.UNet3DCond:
    """What starts at zero is drawn instead, so that everything reaches the output"""
    for part in model.modules():
        if isinstance(part, t2v.Attention):
            torch.nn.init.normal_(part.out.weight, std=0.2)
    torch.nn.init.normal_(model.leave[-1].weight)
    torch.nn.init.normal_(model.no_text)
    return model.eval()


def test_model_shapes_and_size():
    with torch.device("meta"):
        model = t2v.UNet3DCond()
        x, t = torch.empty(2, 8, 3, 64, 64), torch.empty(2)
        assert model(x, t, torch.empty(2, 1, 512), torch.empty(2, 1).bool()).shape == x.shape
    assert 15 < sum(p.numel() for p in model.parameters()) / 1e6 < 25


@pytest.mark.parametrize("mode", ["film", "cross"])
@torch.no_grad()
def test_text_reaches_the_output_unless_it_is_left_out(mode):
    torch.manual_seed(0)
    model = alive(t2v.UNet3DCond(16, 2, 1, 2, mode, 32))
    x, t, (text, mask) = torch.randn(2, 5, 3, 16, 24), torch.tensor([3, 900]), text_of(2, 4, 32)
    leave = torch.tensor([True, True])
    whole, none = model(x, t, text, mask), model(x, t, text, mask, leave)
    assert whole.shape == x.shape and not torch.allclose(whole, none)
    torch.testing.assert_close(none, model(x, t, text * 2, mask, leave))
    alone = model(x[:1], t[:1], text[:1], mask[:1])
    torch.testing.assert_close(whole[:1], alone, rtol=1e-3, atol=1e-3)  # clips of a batch do not touch
    # padding is not read
    mask[:, 2:] = False
    short, other = model(x, t, text[:, :2], mask[:, :2]), text.clone()
    other[:, 2:] = 7.0
    torch.testing.assert_close(model(x, t, other, mask), short, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_cross_attention_reads_the_order_that_the_mean_loses():
    torch.manual_seed(0)
    x, t, (text, mask) = torch.randn(1, 2, 3, 16, 16), torch.tensor([500]), text_of(1, 2, 32)
    other = torch.stack([text[0, 0] * 2, text[0, 1] - text[0, 0]])[None]  # of the same mean
    film, cross = (alive(t2v.UNet3DCond(16, 2, 1, 2, mode, 32)) for mode in ("film", "cross"))
    torch.testing.assert_close(film(x, t, text, mask), film(x, t, other, mask), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(cross(x, t, text, mask), cross(x, t, other, mask), atol=1e-2)


@pytest.mark.parametrize("base", [8, 24, 88])
def test_odd_widths_work(base):
    with torch.device("meta"):
        x, t = torch.empty(1, 3, 3, 16, 16), torch.empty(1)
        model = t2v.UNet3DCond(base, text_mode="cross")
        assert model(x, t, torch.empty(1, 9, 512), torch.empty(1, 9).bool()).shape == x.shape


@torch.no_grad()
def test_frames_reach_each_other_through_time_attention():
    model = alive(t2v.UNet3DCond(16, 2, 1, 2, "film", 32))
    x, t, (text, mask) = torch.randn(1, 4, 3, 16, 16), torch.tensor([500]), text_of(1, 1, 32)
    other = x.clone()
    other[:, 3] += 1
    assert not torch.allclose(model(x, t, text, mask)[:, 0], model(other, t, text, mask)[:, 0])


@pytest.mark.parametrize("on", [True, False])
def test_checkpointing_runs_each_block_twice_and_changes_nothing(on):
    torch.manual_seed(0)
    model, calls = alive(t2v.UNet3DCond(16, 2, 1, 2, "cross", 32)), []
    x, t, (text, mask) = torch.randn(1, 4, 3, 16, 16), torch.tensor([500]), text_of(1, 3, 32)
    (wanted,) = torch.autograd.grad(model(x, t, text, mask).sum(), [model.enter.weight])
    model.checkpointing = on
    block = next(part for part in model.modules() if isinstance(part, t2v.ResBlock))
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    (gradient,) = torch.autograd.grad(model(x, t, text, mask).sum(), [model.enter.weight])
    assert len(calls) == (2 if on else 1)
    torch.testing.assert_close(gradient, wanted)
    calls.clear()
    with torch.no_grad():
        model(x, t, text, mask)
    assert len(calls) == 1


def test_activation_bytes_grow_with_the_batch():
    model = t2v.UNet3DCond(16, 2, 1, 2, "film", 32)
    cfg = t2v.Config(frames=4, size=16, levels=2)

    def kept(batch_size: int, dtype: str, on: bool = False) -> int:
        replaced = dataclasses.replace(cfg, batch_size=batch_size, dtype=dtype)
        return t2v.activation_bytes(model, replaced, None, on)

    assert kept(1, "fp32") > 100_000 and 1.8 < kept(2, "fp32") / kept(1, "fp32") < 2.05
    assert kept(1, "bf16") < 0.7 * kept(1, "fp32") and kept(1, "fp32", True) < 0.5 * kept(1, "fp32")


def clips_of(count: int, frames: int = 1, captions: int = 2) -> t2v.Clips:
    text = t2v.Text(np.arange(captions, dtype=np.float16)[:, None], np.arange(captions) + 1)
    arrays = [np.full((frames, 2, 2, 3), i, np.uint8) for i in range(count)]
    return t2v.Clips(arrays, [("a",)] * count, [list(range(captions))] * count, text)


def test_batches_are_a_function_of_the_step(monkeypatch):
    clips, cfg, seen = clips_of(10), t2v.Config(batch_size=1), []
    for micro in range(10):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            frames, text, mask = t2v.get_batch(clips, cfg, micro)
            again, *_ = t2v.get_batch(clips, cfg, micro)
            assert torch.equal(frames, again) and mask.all() and mask.shape == (1, 1)
            seen.append((int(frames[0, 0, 0, 0, 0]), float(text)))
    first, second = seen[:10], seen[10:]
    assert sorted(i for i, _ in first) == sorted(i for i, _ in second) == list(range(10)), (
        "each clip once an epoch"
    )
    assert [i for i, _ in first] != [i for i, _ in second]
    assert {c for _, c in first} == {0.0} and {c for _, c in second} == {1.0}, "captions take turns"


def test_single_frames_are_the_share_that_was_asked_for_on_all_ranks_alike(monkeypatch):
    clips, cfg = clips_of(10, frames=3), t2v.Config(batch_size=2, image_share=0.3)
    lengths = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        batches = [t2v.get_batch(clips, cfg, micro) for micro in range(200)]
        lengths[rank] = [frames.shape[1] for frames, *_ in batches]
        for frames, text, mask in batches:
            assert frames.shape[:2] == ((2, 3) if frames.shape[1] == 3 else (6, 1))
            assert len(text) == len(mask) == len(frames)
    assert lengths["0"] == lengths["1"] and 40 < lengths["0"].count(1) < 80


def test_captions_of_any_length_share_a_batch():
    text = t2v.Text(np.arange(12, dtype=np.float16).reshape(6, 2), np.array([1, 4, 6]))
    states, mask = text.batch([1, 0])
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert states[0].tolist() == [[2, 3], [4, 5], [6, 7]] and states[1, 0].tolist() == [0, 1]


def test_latents_are_the_vaes_own_scaled_and_come_back():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.3, shift_factor=0.1,
    ).eval()  # fmt: skip
    frames = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    latents = t2v.to_latents(frames, vae)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        wanted = (vae.encode(x).latent_dist.mode() - 0.1) * 0.3
        decoded = vae.decode(wanted / 0.3 + 0.1).sample.clamp(-1, 1)
    assert latents.shape == (9, 4, 4, 4) and latents.dtype == np.float16 and t2v.scale_of(vae) == 2
    torch.testing.assert_close(torch.from_numpy(latents).float(), wanted, rtol=1e-2, atol=1e-3)
    pixels = t2v.to_clips(torch.from_numpy(latents).float()[None], vae)
    assert pixels.shape == (1, 9, 8, 8, 3)
    assert np.abs(pixels[0] - ((decoded + 1) * 127.5).permute(0, 2, 3, 1).numpy()).max() < 3


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
    with pytest.raises(ValueError, match="--size 30 must be a multiple of 8 .* take 32"):
        t2v.Config(size=30)
    with pytest.raises(ValueError, match="latents of 8 pixels, --patch 1 .* take 32"):
        t2v.Config(size=40, vae="x").check_size(8)
    with pytest.raises(ValueError, match="--spacing karras: --sampler dpm and heun"):
        t2v.Config(spacing="karras")
    with pytest.raises(ValueError, match="--image_share 1.5: from 0 to 1"):
        t2v.Config(image_share=1.5)
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
    cfg = t2v.Config(
        batch_size=1, size=16, frames=2, dtype="bf16", warmup_steps=0, text_encoder="x", shift=3.0
    )
    model = t2v.UNet3DCond()
    clips = clips_of(1)
    data = t2v.Data(clips, clips, None, 8.0, [])
    kept = t2v.kept_bytes(model, cfg, None)
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
    assert stop.value.code == 2 and "no memory layout fits" in said and "half of BS" in said
