"""The codecs of t2v_rflow.py: lengths, shapes, pieces, the published layout, the temporal half against plain loops, loading.

Layout: opensora/models/vae/{vae,vae_temporal}.py of github.com/hpcaitech/Open-Sora, branch opensora/v1.2; names and shapes of the
published file also stand in mindspore-lab/mindone, examples/opensora_hpcai/tools/pt_pnames_vae1.2.txt.
"""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VAE, save_vae
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from t2v_rflow import OpenSoraVAE, Pixels, WanVAE, draw, weights_key


def movie(frames, size=(16, 24), clips=1, seed=0):
    return torch.randint(
        0, 256, (clips, frames, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def spread(module):
    """Every weight drawn, norms and biases too, so that no mistake hides behind a 1 or a 0."""
    draws = torch.Generator().manual_seed(1)
    for value in module.parameters():
        value.data = value.data + 0.2 * torch.randn(value.shape, generator=draws) * (value.ndim == 1)
    return module


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return spread(OpenSoraVAE(**TINY_VAE)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    return WanVAE(AutoencoderKLWan(base_dim=8, num_res_blocks=1)).eval().requires_grad_(False)


# --- Open-Sora's: lengths and shapes


def test_latent_lengths_are_the_published_ones():
    table = {1: 1, 2: 1, 4: 1, 5: 2, 16: 4, 17: 5, 18: 6, 34: 10, 51: 15, 102: 30, 204: 60, 408: 120}
    assert {n: OpenSoraVAE.latent_frames(n) for n in table} == table and all(
        OpenSoraVAE.whole_length(n) == n for n in table
    )
    assert {n: WanVAE.whole_length(n) for n in table if n < 103} == {
        1: 1, 2: 1, 4: 1, 5: 5, 16: 13, 17: 17, 18: 17, 34: 33, 51: 49, 102: 101
    }  # fmt: skip


@pytest.mark.parametrize(("frames", "clips"), [(1, 5), (20, 1), (51, 1)])
def test_a_clip_goes_in_and_comes_out_as_long(vae, frames, clips):
    latents = vae.encode(movie(frames, clips=clips))
    assert latents.shape == (clips, 4, vae.latent_frames(frames), 2, 3) and latents.dtype == torch.float32
    back = vae.decode(latents, frames)
    assert back.shape == (clips, frames, 16, 24, 3) and back.dtype == torch.uint8
    with pytest.raises(ValueError, match="latent frames"):
        vae.decode(latents, frames + 4)


def test_what_is_beyond_a_multiple_of_8_makes_no_latent(vae):
    latents = vae.encode(movie(1, (14, 29)))
    assert latents.shape[-2:] == (1, 3) and vae.decode(latents, 1).shape == (1, 1, 8, 24, 3)


def test_clips_of_a_batch_do_not_see_each_other(vae):
    """Five clips of a whole piece, of which four go through the temporal half at a time, and three frames more. In fp64: with
    norms over so few numbers fp32 is a matter of luck."""
    codec, clips = copy.deepcopy(vae).double(), movie(20, (8, 16), clips=5)
    latents = codec.encode(clips)
    movies = codec.decode(latents, 20)
    for i in (0, 4):
        assert torch.allclose(latents[i : i + 1], codec.encode(clips[i : i + 1]), atol=1e-5)
        assert (
            movies[i : i + 1].int() - codec.decode(latents[i : i + 1], 20).int()
        ).abs().max() <= 1  # of rounding


# --- Open-Sora's: pieces and time


def test_a_piece_of_17_frames_is_encoded_and_decoded_by_itself(vae):
    clip, other = movie(34), movie(34)
    other[:, 20] = 255 - other[:, 20]
    a, b = vae.encode(clip), vae.encode(other)
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a[:, :, 5:], b[:, :, 5:])
    assert torch.equal(a[:, :, 5:], vae.encode(clip[:, 17:]))
    assert torch.equal(vae.decode(a, 34)[:, :17], vae.decode(b, 34)[:, :17])


def test_inside_a_piece_a_latent_sees_no_later_frame(vae):
    """But for the norms, which span the piece: without them latent i of 17 frames sees frames 0 to 4i (3 zeros come first)."""
    net = OpenSoraVAE(**TINY_VAE).temporal_vae.requires_grad_(False)
    net.load_state_dict(vae.temporal_vae.state_dict())
    x = torch.randn(1, 4, 17, 2, 3)

    def change(frame):
        y = x.clone()
        y[:, :, frame] += 1
        return [
            not torch.equal(a, b)
            for a, b in zip(net.encode(x).unbind(2), net.encode(y).unbind(2), strict=True)
        ]

    assert all(change(16))
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    assert change(16) == [False] * 4 + [True]
    assert change(13) == [False] * 4 + [True]
    assert change(12)[:4] == [False] * 3 + [True]
    assert change(1)[0] is False and change(0)[0] is True


def test_a_generator_samples_both_posteriors_and_none_takes_the_mean(vae):
    clip = movie(5)
    mean = vae.encode(clip)
    assert torch.equal(mean, vae.encode(clip))
    one, same, other = (vae.encode(clip, [torch.Generator().manual_seed(seed)]) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, mean)
    moments = torch.cat(
        [torch.full((1, 2, 5000), 3.0), torch.full((1, 2, 5000), 2 * torch.tensor(0.5).log())], dim=1
    )
    drawn = draw(moments, [torch.Generator().manual_seed(0)])
    assert (
        abs(drawn.mean() - 3) < 0.02
        and abs(drawn.std() - 0.5) < 0.02
        and torch.equal(draw(moments, None), moments[:, :2])
    )


@pytest.mark.parametrize("certain", ["temporal", "spatial"])
def test_each_half_draws_for_itself(vae, certain):
    """With the other half's variance put to nothing there is still something to draw."""
    codec, clip = copy.deepcopy(vae), movie(5)
    last = (
        codec.temporal_vae.quant_conv.conv
        if certain == "temporal"
        else codec.spatial_vae["module"].quant_conv
    )
    last.weight[4:], last.bias[4:] = 0, -30
    assert (codec.encode(clip, [torch.Generator().manual_seed(3)]) - codec.encode(clip)).abs().max() > 1e-3


def test_shift_scale_and_factor_stand_where_upstream_has_them(vae):
    clip = movie(1)
    x = (
        vae.spatial_vae["module"].encode(clip[0].permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        * 0.18215
    )
    z = vae.temporal_vae.encode(x[:, :, None])[:, :4]
    shift, scale = (
        torch.tensor(v).view(1, 4, 1, 1, 1) for v in ([-0.10, 0.34, 0.27, 0.98], [3.85, 2.32, 2.33, 3.06])
    )
    assert torch.allclose(vae.encode(clip), (z - shift) / scale, atol=1e-6)
    x = vae.temporal_vae.decode(z, 1)[:, :, 0] / 0.18215
    picture = (
        ((vae.spatial_vae["module"].decode(x).sample.clamp(-1, 1) + 1) / 2 * 255).round().permute(0, 2, 3, 1)
    )
    assert (vae.decode((z - shift) / scale, 1)[0].float() - picture).abs().max() <= 1


# --- Open-Sora's temporal half, written once more with plain loops


def conv(w, name, x, stride=1):
    """out[t] = sum of kernel[i] * in[stride * t + i - (k - stride)], zeros outside."""
    kernel, bias = w[f"{name}.conv.weight"], w.get(f"{name}.conv.bias")
    k, (b, _, t, h, wide) = kernel.shape[2], x.shape
    out = torch.zeros(b, len(kernel), t // stride, h, wide, dtype=x.dtype)
    for o in range(out.shape[2]):
        for i in range(k):
            source = stride * o + i - (k - stride)
            for dy in range(k):
                for dx in range(k):
                    for y in range(h):
                        for column in range(wide):
                            row, place = y + dy - k // 2, column + dx - k // 2
                            if source >= 0 and 0 <= row < h and 0 <= place < wide:
                                out[:, :, o, y, column] += (
                                    x[:, :, source, row, place] @ kernel[:, :, i, dy, dx].T
                                )
    return out if bias is None else out + bias.view(1, -1, 1, 1, 1)


def norm_silu(w, name, x):
    groups = x.reshape(len(x), 32, -1)
    y = (groups - groups.mean(-1, keepdim=True)) / (
        groups.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    y = y.reshape(x.shape) * w[f"{name}.weight"].view(1, -1, 1, 1, 1) + w[f"{name}.bias"].view(1, -1, 1, 1, 1)
    return y / (1 + (-y).exp())


def res(w, name, x):
    y = conv(w, f"{name}.conv1", norm_silu(w, f"{name}.norm1", x))
    y = conv(w, f"{name}.conv2", norm_silu(w, f"{name}.norm2", y))
    return y + (conv(w, f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in w else x)


def test_temporal_half_is_that_of_upstream(vae):
    w = {name: value.double() for name, value in vae.temporal_vae.state_dict().items()}
    x = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)

    y = conv(w, "encoder.conv_in", torch.cat([torch.zeros(1, 4, 3, 2, 2), x], dim=2))
    for level in range(4):
        y = res(w, f"encoder.block_res_blocks.{level}.0", y)
        if level in (1, 2):
            y = conv(w, f"encoder.conv_blocks.{level}", y, stride=2)
    y = norm_silu(w, "encoder.norm1", res(w, "encoder.res_blocks.0", y))
    moments = conv(w, "quant_conv", conv(w, "encoder.conv2", y))
    assert moments.shape == (1, 8, 2, 2, 2)
    assert torch.allclose(vae.temporal_vae.encode(x.float()), moments.float(), atol=1e-4)

    z = moments[:, :4]
    y = res(w, "decoder.res_blocks.0", conv(w, "decoder.conv1", conv(w, "post_quant_conv", z)))
    for level in (3, 2, 1, 0):
        y = res(w, f"decoder.block_res_blocks.{level}.0", y)
        if level in (3, 2):
            y = conv(w, f"decoder.conv_blocks.{level - 1}", y)
            y = torch.stack(
                [y[:, i % 2 :: 2, i // 2] for i in range(2 * y.shape[2])], dim=2
            )  # channel 2c + i of frame t
    out = conv(w, "decoder.conv_out", norm_silu(w, "decoder.norm1", y))
    assert out.shape[2] == 8
    assert torch.allclose(vae.temporal_vae.decode(z.float(), 5), out[:, :, 3:].float(), atol=1e-4)


# --- Open-Sora's: the published file


def published():
    """{name: shape} of hpcai-tech/OpenSora-VAE-v1.2."""
    names = {"shift": (1, 4, 1, 1, 1), "scale": (1, 4, 1, 1, 1)}

    def put(name, outer, inner, kernel, bias=True):
        names[f"{name}.weight"] = (outer, inner, *kernel)
        if bias:
            names[f"{name}.bias"] = (outer,)

    def norm(name, width):
        names.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    t, side = "temporal_vae", (3, 3, 3)
    put(f"{t}.quant_conv.conv", 8, 8, (1, 1, 1))
    put(f"{t}.post_quant_conv.conv", 4, 4, (1, 1, 1))
    put(f"{t}.encoder.conv_in.conv", 128, 4, side, bias=False)
    put(f"{t}.encoder.conv2.conv", 8, 512, (1, 1, 1))
    put(f"{t}.decoder.conv1.conv", 512, 4, side)
    put(f"{t}.decoder.conv_out.conv", 4, 128, side)
    norm(f"{t}.encoder.norm1", 512)
    norm(f"{t}.decoder.norm1", 128)
    for half, widths, wider in (
        ("encoder", ((128, 128), (128, 256), (256, 256), (256, 512)), {1: (256, 256), 2: (256, 256)}),
        ("decoder", ((256, 128), (256, 256), (512, 256), (512, 512)), {1: (512, 256), 2: (1024, 512)}),
    ):
        for i, (outer, inner) in wider.items():
            put(f"{t}.{half}.conv_blocks.{i}.conv", outer, inner, side)
        chains = {f"block_res_blocks.{i}": ends for i, ends in enumerate(widths)} | {"res_blocks": (512, 512)}
        for chain, (first, outer) in chains.items():
            for j in range(4):
                inner, block = first if j == 0 else outer, f"{t}.{half}.{chain}.{j}"
                norm(f"{block}.norm1", inner)
                norm(f"{block}.norm2", outer)
                put(f"{block}.conv1.conv", outer, inner, side, bias=False)
                put(f"{block}.conv2.conv", outer, outer, side, bias=False)
                if inner != outer:
                    put(f"{block}.conv3.conv", outer, inner, (1, 1, 1), bias=False)

    s, side = "spatial_vae.module", (3, 3)

    def resnet(name, inner, outer):
        norm(f"{name}.norm1", inner)
        norm(f"{name}.norm2", outer)
        put(f"{name}.conv1", outer, inner, side)
        put(f"{name}.conv2", outer, outer, side)
        if inner != outer:
            put(f"{name}.conv_shortcut", outer, inner, (1, 1))

    put(f"{s}.quant_conv", 8, 8, (1, 1))
    put(f"{s}.post_quant_conv", 4, 4, (1, 1))
    for half, ends, levels, resnets, sampler in (
        (
            "encoder",
            (3, 128, 512, 8),
            ((128, 128), (128, 256), (256, 512), (512, 512)),
            2,
            "down_blocks.{}.downsamplers",
        ),
        (
            "decoder",
            (4, 512, 128, 3),
            ((512, 512), (512, 512), (512, 256), (256, 128)),
            3,
            "up_blocks.{}.upsamplers",
        ),
    ):
        put(f"{s}.{half}.conv_in", ends[1], ends[0], side)
        norm(f"{s}.{half}.conv_norm_out", ends[2])
        put(f"{s}.{half}.conv_out", ends[3], ends[2], side)
        for i, (inner, outer) in enumerate(levels):
            place = sampler.format(i)
            for j in range(resnets):
                resnet(f"{s}.{half}.{place.rsplit('.', 1)[0]}.resnets.{j}", outer if j else inner, outer)
            if i < 3:
                put(f"{s}.{half}.{place}.0.conv", outer, outer, side)
        for j in range(2):
            resnet(f"{s}.{half}.mid_block.resnets.{j}", 512, 512)
        norm(f"{s}.{half}.mid_block.attentions.0.group_norm", 512)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            put(f"{s}.{half}.mid_block.attentions.0.{part}", 512, 512, ())
    return names


def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        full = OpenSoraVAE()
    assert {name: tuple(value.shape) for name, value in full.state_dict().items()} == published()
    assert len(full.state_dict()) == 517
    assert sum(p.numel() for p in full.temporal_vae.parameters()) == 309_687_144
    assert sum(p.numel() for p in full.spatial_vae.parameters()) == 83_653_863


def test_a_saved_codec_is_loaded_as_it_was(vae, tmp_path):
    save_vae(vae, tmp_path / "codec")
    assert sorted(path.name for path in (tmp_path / "codec").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = OpenSoraVAE.load(str(tmp_path / "codec"))
    for name, value in vae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(vae.encode(movie(5)), again.encode(movie(5)))


def test_other_weights_have_another_key(vae, tmp_path):
    """The cache of latents is found by it. The Hub's cache links to files named by their content, whose time says nothing."""
    for folder in ("one", "two"):
        (tmp_path / folder / "blobs").mkdir(parents=True)
        (tmp_path / folder / "blobs" / "abc").write_bytes(b"weights")
        (tmp_path / folder / "model.safetensors").symlink_to(tmp_path / folder / "blobs" / "abc")
        os.utime(tmp_path / folder / "blobs" / "abc", (7, 7 if folder == "one" else 8))
    assert weights_key(tmp_path / "one") == weights_key(tmp_path / "two")
    save_vae(vae, tmp_path / "codec")
    first = OpenSoraVAE.load(str(tmp_path / "codec")).key
    assert first == weights_key(tmp_path / "codec") != weights_key(tmp_path / "one")
    os.utime(tmp_path / "codec" / "model.safetensors", (1, 1))
    assert weights_key(tmp_path / "codec") != first


def less(weights, config):
    del weights["temporal_vae.encoder.norm1.bias"]


def more(weights, config):
    weights["loss.logvar"] = torch.zeros(1)


def reshaped(weights, config):
    weights["shift"] = weights["shift"].flatten()


def other_pieces(weights, config):
    config["micro_frame_size"] = 16


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (less, "temporal_vae.encoder.norm1.bias is missing"),
        (more, "loss.logvar has no place"),
        (reshaped, "shift has another shape"),
        (other_pieces, "micro_frame_size is 16"),
    ],
)
def test_a_file_that_does_not_fit_ends_the_run(vae, tmp_path, capsys, damage, said):
    save_vae(vae, tmp_path)
    weights, config = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    damage(weights, config)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        OpenSoraVAE.load(str(tmp_path))
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_the_files_ends_the_run(vae, tmp_path, capsys, name):
    save_vae(vae, tmp_path)
    for broken in (lambda: (tmp_path / name).write_text("{"), (tmp_path / name).unlink):
        broken()
        with pytest.raises(SystemExit) as stop:
            OpenSoraVAE.load(str(tmp_path))
        assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err


# --- Wan's, and pixels


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (9, 3)])
def test_wan_in_and_out(wan, frames, latents):
    assert (wan.name, wan.channels, wan.space, wan.latent_frames(frames)) == ("wan", 16, 8, latents)
    z = wan.encode(movie(frames, clips=2))
    assert z.shape == (2, 16, latents, 2, 3) and z.dtype == torch.float32
    assert wan.decode(z, frames).shape == (2, frames, 16, 24, 3)


def test_wan_latents_are_normalised_by_its_config(wan):
    clip, config = movie(5), wan.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    raw = wan.vae.encode(clip.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mean
    assert torch.allclose(wan.encode(clip) * std + mean, raw, atol=1e-5)
    picture = ((wan.vae.decode(raw).sample + 1) * 127.5).round().permute(0, 2, 3, 4, 1)
    assert (wan.decode(wan.encode(clip), 5).float() - picture).abs().max() <= 1
    assert not torch.equal(wan.encode(clip), wan.encode(clip, [torch.Generator().manual_seed(0)]))


@pytest.mark.parametrize(("frames", "following"), [(2, 5), (16, 17)])
def test_wan_refuses_other_lengths(wan, capsys, frames, following):
    for use in (lambda: wan.latent_frames(frames), lambda: wan.encode(movie(frames))):
        with pytest.raises(SystemExit) as stop:
            use()
        assert stop.value.code == 2 and f"{following} is the next" in capsys.readouterr().err


def test_wan_is_loaded_from_a_folder_whole_or_not_at_all(wan, tmp_path, capsys):
    wan.vae.save_pretrained(tmp_path / "vae")
    assert torch.equal(WanVAE.load(str(tmp_path)).encode(movie(1)), wan.encode(movie(1)))
    assert torch.equal(WanVAE.load(str(tmp_path / "vae")).encode(movie(1)), wan.encode(movie(1)))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["quant_conv.bias"]
    for broken in (weights, {**weights, "quant_conv.bias": torch.zeros(7)}):
        save_file(broken, file)
        with pytest.raises(SystemExit) as stop:
            WanVAE.load(str(tmp_path))
        assert stop.value.code == 2 and "quant_conv.bias" in capsys.readouterr().err


def test_pixels_come_back_as_they_were():
    codec, clip = (
        Pixels(),
        torch.arange(256, dtype=torch.uint8).repeat(3)[:, None].expand(768, 3).reshape(1, 2, 16, 24, 3),
    )
    latents = codec.encode(clip)
    assert latents.shape == (1, 3, 2, 16, 24) and (latents.min(), latents.max()) == (-1, 1)
    assert (codec.name, codec.channels, codec.space, codec.latent_frames(7)) == ("pixels", 3, 1, 7)
    assert torch.equal(codec.decode(latents, 2), clip)


def test_a_codec_keeps_no_gradient(vae, wan):
    for codec in (vae, wan):
        codec.requires_grad_(True)
        latents = codec.encode(movie(1))
        assert not latents.requires_grad and not codec.decode(latents, 1).requires_grad
        codec.requires_grad_(False)


def test_bf16_weights_take_and_give_the_same_types(vae):
    half = OpenSoraVAE(**TINY_VAE).to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    latents, exact = half.encode(movie(5)), vae.encode(movie(5))
    assert (
        latents.dtype == torch.float32
        and F.cosine_similarity(latents.flatten(), exact.flatten(), dim=0) > 0.98
    )
    assert half.decode(latents, 5).dtype == torch.uint8
