"""longcat_vss.py where maths can be wrong quietly: encoders and rows against the official code as read from
its repository, features against Kaldi's, losses against brute force, the speaking loop, loading, LoRA,
codecs, bad samples and the plan.

The official code is github.com/meituan-longcat/LongCat-Flash-Omni at 9df66a8; "engine" is
longcat_flash_omni.py of github.com/XiaoBin1992/sglang at a6c07b9, which the official README tells to install.
"""

import copy
import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import av
import kaldiio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.special import erf
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM
from transformers.models.longcat_flash import modeling_longcat_flash as longcat_flash

import common
import longcat_vss as vss
from demos import speech
from longcat_vss import CODEC_EOS, CODEC_OFFSET, CODEC_PAD, BadSample, Config

MLA = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
NVME = Path("nvme")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longcat") / "tiny"
    speech.build_tiny(folder, 0, vss)
    return folder


@pytest.fixture(scope="session")
def base(tiny):
    return vss.open_base(str(tiny))


@pytest.fixture(scope="session")
def net(base):
    return vss.load_omni(base, "fp32").eval()


@pytest.fixture(scope="session")
def cfg(tmp_path_factory):
    return Config(
        report_to="none", cache_dir=tmp_path_factory.mktemp("cache"), size=56, dtype="fp32", max_bad=0.9
    )


@pytest.fixture(scope="session")
def clips(tmp_path_factory, base, cfg):
    """Three: the second hears 1.2 s alone, the third has no text and a shorter reply. Codes are random."""
    root, rng, opened = tmp_path_factory.mktemp("data") / "train", np.random.default_rng(0), []
    for number in range(3):
        folder = root / f"{number + 1:02d}"
        speech.make_clip(folder, number, False, False, 0, vss.write_wav)
        if number == 1:
            vss.write_wav(folder / "in.wav", vss.read_speech(folder / "in.wav")[0][:19_200])
        if number == 2:
            vss.write_wav(folder / "out.wav", vss.read_speech(folder / "out.wav")[0][:8_000])
            (folder / "out.txt").unlink()
        clip = vss.open_clip(folder, cfg, base)
        codes = root.parent / f"codes_{number}.npy"
        np.save(codes, rng.integers(0, 64, (math.ceil(len(np.load(clip.reply)) / 960), 4)))
        opened.append(dataclasses.replace(clip, codes=codes))
    return opened


@pytest.fixture
def sample(tmp_path):
    """A folder with in.mp4, in.wav, out.wav and out.txt."""
    speech.make_clip(tmp_path / "train" / "01", 7, False, False, 0, vss.write_wav)
    return tmp_path / "train" / "01"


def said(seed: int, count: int, pitch: float = 115) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    every = [*speech.WORDS.values(), *speech.NUMBERS]
    return [(word := every[i % len(every)], speech.say(word, pitch, rng)) for i in range(count)]


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy in which no weight is 0 or 1 by chance, norms and scales included."""
    module, source = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=source)
        p.data = 0.3 * noise + name.endswith("weight") if p.ndim == 1 else noise * p[0].numel() ** -0.5
    return module.eval()


def numbers(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def layer_norm(x, w, name):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def keys(module: torch.nn.Module) -> set[str]:
    """Names of weights, with # for numbers of layers."""
    return {
        re.sub(r"(layers|audio_embeddings|audio_output_layers|embedding)\.\d+", r"\1.#", name)
        for name in module.state_dict()
    }


# --- Encoders


def picture_by_hand(patches: np.ndarray, w: dict, c: dict) -> np.ndarray:
    """(T, 1176) -> (T, D): encoders/vision_adaptor.py for one picture, one patch and one angle after the
    other"""
    heads, side = c["num_attention_heads"], math.isqrt(len(patches))
    head = c["hidden_size"] // heads
    rates = [10_000 ** -(4 * i / head) for i in range(head // 4)]
    x = (
        patches @ w["embeddings.patch_embedding.weight"].reshape(c["hidden_size"], -1).T
        + w["embeddings.patch_embedding.bias"]
    )
    for n in range(c["num_hidden_layers"]):
        at = f"encoder.layers.{n}"
        q, k, v = np.split(linear(rms(x, w[f"{at}.norm1.weight"]), w, f"{at}.attn.qkv"), 3, axis=1)
        for place in range(len(x)):
            row, column = divmod(place, side)
            for i, angle in enumerate([row * r for r in rates] + [column * r for r in rates]):
                for first in range(i, c["hidden_size"], head):  # the pair (i, i + head / 2) of each head
                    for u in (q, k):
                        a, b = u[place, first], u[place, first + head // 2]
                        u[place, first] = a * math.cos(angle) - b * math.sin(angle)
                        u[place, first + head // 2] = b * math.cos(angle) + a * math.sin(angle)
        q, k = rms(q, w[f"{at}.attn.q_norm.weight"]), rms(k, w[f"{at}.attn.k_norm.weight"])
        out = np.zeros_like(x)
        for part in (slice(h * head, (h + 1) * head) for h in range(heads)):
            share = np.exp(q[:, part] @ k[:, part].T / math.sqrt(head))
            out[:, part] = share / share.sum(1, keepdims=True) @ v[:, part]
        x = x + w[f"{at}.ls1"] * linear(out, w, f"{at}.attn.proj")
        y = rms(x, w[f"{at}.norm2.weight"])
        gate = linear(y, w, f"{at}.mlp.fc1")
        inner = rms(gate / (1 + np.exp(-gate)) * linear(y, w, f"{at}.mlp.fc3"), w[f"{at}.mlp.norm.weight"])
        x = x + w[f"{at}.ls2"] * linear(inner, w, f"{at}.mlp.fc2")
    return x


def test_vision_is_the_official_code(net, base):
    encoder, projector = randomised(net.vision_encoder, 1), randomised(net.vision_projector, 2)
    pixels = torch.randn(2, 16, 1176, generator=torch.Generator().manual_seed(3))
    wanted = [picture_by_hand(picture, numbers(encoder), base.vision) for picture in pixels.double().numpy()]
    with torch.no_grad():
        seen, real = encoder(pixels, torch.full((2, 2), 4))
        tokens = projector(seen).flatten(0, 1)
        # beside a larger picture, padded, they are the same
        small = F.pad(pixels[:, :8], (0, 0, 0, 8))
        mixed, which = encoder(torch.cat([pixels[:1], small]), torch.tensor([[4, 4], [2, 4], [4, 2]]))
        for i, grid in enumerate(([2, 4], [4, 2])):
            alone, _ = encoder(pixels[i : i + 1, :8], torch.tensor([grid]))
            torch.testing.assert_close(mixed[i + 1, :8], alone[0], atol=1e-5, rtol=1e-5)
    assert real.all() and which.sum(1).tolist() == [16, 8, 8]
    np.testing.assert_allclose(mixed[0].numpy(), wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen.numpy(), np.stack(wanted), rtol=1e-5, atol=1e-5)
    w, by_hand = numbers(projector), []
    for picture in wanted:
        for row in range(4):
            for column in (0, 2):
                y = layer_norm(np.concatenate(picture[4 * row + column : 4 * row + column + 2]), w, "p0.0")
                by_hand.append(linear(gelu(linear(gelu(linear(y, w, "p0.1")), w, "p0.3")), w, "proj"))
    np.testing.assert_allclose(tokens.numpy(), by_hand, rtol=1e-5, atol=1e-5)


def test_pictures_are_cut_as_the_official_convolution_wants_them(base):
    frames = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    cut = vss.patches(frames, base)
    assert cut.shape == (2, 4, 1176)
    wide = vss.patches(np.arange(2 * 14 * 56 * 3, dtype=np.uint8).reshape(2, 14, 56, 3), base)
    assert wide.shape == (1, 4, 1176), "row after row"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    at = 0
    for channel in range(3):  # pair 1, lower left patch
        for frame in (2, 3):
            for y in range(14, 28):
                for x in range(14):
                    wanted = (frames[frame, y, x, channel] / 255 - mean[channel]) / std[channel]
                    assert float(cut[1, 2, at]) == pytest.approx(wanted, abs=1e-5)
                    at += 1


def sounds_by_hand(features: np.ndarray, heard: np.ndarray, w: dict, c: dict) -> np.ndarray:
    """(B, T, 1200) -> (B, T, D): encoders/audio_adaptor.py, one tap of its memory after the other"""
    mask, right_from = heard[..., None], c["nlayer"] - c["num_right_layers"]
    x = np.clip(linear(features, w, "ffn.0"), 0, 6) @ w["ffn.2.weight"].T
    for n in range(c["nlayer"]):
        at, reach = f"fsmn_layers.{n}", c["right_order"] if n >= right_from else 0
        x = x * mask
        y, taps = layer_norm(x, w, f"{at}.memory_ln"), w[f"{at}.memory.weight"][:, 0]
        remembered = np.zeros_like(x)
        for t in range(x.shape[1]):
            for tap in range(taps.shape[1]):
                if 0 <= t + tap - c["left_order"] < x.shape[1]:
                    remembered[:, t] += taps[:, tap] * y[:, t + tap - c["left_order"]]
        assert taps.shape[1] == c["left_order"] + 1 + reach
        x = x + remembered
        x = x + linear(
            np.clip(linear(layer_norm(x, w, f"{at}.ffn.0"), w, f"{at}.ffn.1"), 0, 6), w, f"{at}.ffn.3"
        )
    return np.clip(linear(x * mask, w, "dnn.0"), 0, 6)


def test_hearing_is_the_official_code(net, base):
    encoder, projector = randomised(net.audio_encoder, 1), randomised(net.audio_projector, 2)
    features = 4 * torch.randn(
        2, 13, 1200, generator=torch.Generator().manual_seed(3)
    )  # loud: ReLU6 ends at 6
    heard = torch.arange(13) < torch.tensor([[13], [9]])
    wanted = sounds_by_hand(features.double().numpy(), heard.numpy(), numbers(encoder), base.audio)
    assert (wanted == 6).any() and (wanted == 0).any()
    with torch.no_grad():
        sounds = encoder(features, heard)
        tokens = projector(sounds)
    np.testing.assert_allclose(sounds[heard].numpy(), wanted[heard.numpy()], rtol=1e-5, atol=1e-5)
    w = numbers(projector)
    by_hand = linear(gelu(linear(wanted, w, "0")), w, "2")
    np.testing.assert_allclose(tokens[heard].numpy(), by_hand[heard.numpy()], rtol=1e-5, atol=2e-5)


def test_weights_have_the_names_of_the_official_files(net):
    both = ("weight", "bias")
    layer = "encoder.layers.#"
    vision = {f"embeddings.patch_embedding.{kind}" for kind in both} | {f"{layer}.ls1", f"{layer}.ls2"}
    vision |= {f"{layer}.mlp.{part}.{kind}" for part in ("fc1", "fc2", "fc3") for kind in both}
    vision |= {
        f"{layer}.attn.{name}"
        for name in ("qkv.weight", "proj.weight", "proj.bias", "q_norm.weight", "k_norm.weight")
    }
    vision |= {f"{layer}.{name}.weight" for name in ("mlp.norm", "norm1", "norm2")}
    assert keys(net.vision_encoder) == vision
    assert keys(net.vision_projector) == {
        f"{part}.{kind}" for part in ("p0.0", "p0.1", "p0.3", "proj") for kind in both
    }
    layer = "fsmn_layers.#"
    audio = {f"{layer}.{part}.{kind}" for part in ("memory_ln", "ffn.0", "ffn.1", "ffn.3") for kind in both}
    audio |= {f"{part}.{kind}" for part in ("ffn.0", "dnn.0", "output") for kind in both} | {
        f"{layer}.memory.weight",
        "ffn.2.weight",
    }
    assert keys(net.audio_encoder) == audio
    assert keys(net.audio_projector) == {f"{part}.{kind}" for part in ("0", "2") for kind in both}
    assert (
        keys(net.audio_embedding) == {"audio_embeddings.#.weight"}
        and len(net.audio_embedding.state_dict()) == 4
    )
    assert sorted(net.audio_heads.state_dict()) == [  # AudioOutputLayer of the engine
        *(f"audio_output_layers.{i}.weight" for i in range(4)), *(f"embedding.{i}.weight" for i in range(3))
    ]  # fmt: skip
    assert set(vss.part_of(net, "language_model_embedding.pt").state_dict()) == {"word_embeddings.weight"}


def kaldi_energies(sound: np.ndarray, front: dict) -> np.ndarray:
    """(T, 80), by Kaldi's own code"""
    import kaldi_native_fbank

    options, asked = kaldi_native_fbank.FbankOptions(), front["fbank"]
    frame, mel = options.frame_opts, options.mel_opts
    frame.samp_freq, frame.dither, frame.remove_dc_offset, frame.snip_edges = asked["freq"], 0, False, True
    frame.window_type, frame.preemph_coeff = "povey", asked["preemphasis"]
    frame.frame_length_ms, frame.frame_shift_ms = asked["frame_length"], asked["frame_shift"]
    mel.num_bins, mel.low_freq, mel.high_freq, mel.htk_mode = (
        asked["num_mel_bins"],
        asked["low_freq"],
        asked["high_freq"],
        False,
    )
    options.use_energy = False
    energies = kaldi_native_fbank.OnlineFbank(options)
    energies.accept_waveform(asked["freq"], (sound * 32768).tolist())
    energies.input_finished()
    return np.stack([energies.get_frame(i) for i in range(energies.num_frames_ready)])


@pytest.mark.parametrize("high", [7800, -400, 8000])
def test_speech_features_are_kaldis_spliced(base, high):
    front = base.front | {"fbank": base.front["fbank"] | {"high_freq": high}}
    plain = dataclasses.replace(base, cmvn=(np.zeros(80), np.ones(80)), front=front)
    sound = (0.1 * np.random.default_rng(0).standard_normal(32_000)).astype(np.float32)
    sound[8_000:16_000] *= 1e-3
    rows = vss.speech_features(sound, plain)
    energies = kaldi_energies(sound, front)
    assert rows.shape == (25, 1200) and rows.dtype == np.float32 and len(energies) == 198
    for t in range(25):
        for neighbour in range(15):
            wanted = energies[min(max(8 * t - 7 + neighbour, 0), 197)]
            np.testing.assert_allclose(rows[t, 80 * neighbour : 80 * neighbour + 80], wanted, atol=1e-3)


def test_features_are_normalised_by_the_statistics_in_the_kaldi_file(base, tiny):
    sums, squares = kaldiio.load_mat(str(tiny / "audio" / "global_cmvn")).astype(np.float64)
    mean = sums[:-1] / sums[-1]
    deviation = np.sqrt(squares[:-1] / sums[-1] - mean**2)
    rng, heard = np.random.default_rng(5), []
    for i in range(16):
        sound = np.tile(speech.say(speech.NUMBERS[i % 4], rng.uniform(90, 190), rng), 3)
        heard.append((sound + rng.normal(0, 0.003, len(sound))).astype(np.float32))
    wanted = (kaldi_energies(heard[0], base.front)[8] - mean) / deviation
    np.testing.assert_allclose(vss.speech_features(heard[0], base)[1, 560:640], wanted, atol=2e-3)
    rows = np.concatenate([vss.speech_features(sound, base)[:, 560:640] for sound in heard])
    assert abs(rows.mean(0)).max() < 0.35 and abs(rows.mean()) < 0.1 and abs(rows.std(0) - 1).max() < 0.3


# --- The sequence


def told(seconds: tuple, spread: bool, sounds: int, base) -> list[tuple[str, str]]:
    """[(time, what follows it)] of a prompt with two tokens a pair: "i" of a picture, "a" of speech, "(" and
    ")" around speech"""
    ids = vss.prompt_ids(seconds, spread, 2, sounds, base)
    marks = {
        base.ids[n]: m
        for n, m in (("image_pad", "i"), ("audio_pad", "a"), ("audio_start", "("), ("audio_end", ")"))
    }
    text = "".join(marks.get(i) or base.tokenizer.decode([i]) for i in ids)
    assert text.startswith("USER:") and text.endswith("\nVOICE ASSISTANT:")
    parts = re.findall(
        r"second\{(\d+\.\d)\}:([ia()]*)", text.removeprefix("USER:").removesuffix("\nVOICE ASSISTANT:")
    )
    assert "".join(f"second{{{time}}}:{pads}" for time, pads in parts) == text[5 : -len("\nVOICE ASSISTANT:")]
    return parts


@pytest.mark.parametrize(
    ("pairs", "spread", "sounds", "wanted"),
    [  # multimodal_interleaved_converter.py: chunks of 1 s, 12.5 tokens of 80 ms; the rest goes to the last
        (5, False, 62, ["(12", "13", "12", "13", "12)"]),
        (4, False, 50, ["(12", "13", "12", "13)"]),
        (1, False, 13, ["(13)"]),
        (5, False, 25, ["", "", "", "(12", "13)"]),  # three seconds without speech come first
        (5, False, 26, ["", "", "(12", "13", "1)"]),  # 2.08 s are three chunks
        (2, False, 50, ["(12", "38)"]),  # speech after the last picture
        (4, True, 50, ["(12", "12", "12", "14)"]),
        (4, True, 3, ["(", "", "", "3)"]),
    ],
)
def test_speech_is_interleaved_with_pictures_as_the_official_converter_has_it(
    base, pairs, spread, sounds, wanted
):
    seconds = tuple(1.04 * i for i in range(pairs))
    parts = told(seconds, spread, sounds, base)
    assert [time for time, _ in parts] == [f"{second:.1f}" for second in seconds]
    assert [pads for _, pads in parts] == [
        "ii" + re.sub(r"\d+", lambda m: "a" * int(m[0]), one) for one in wanted
    ]


def test_every_sound_and_picture_has_one_place(base):
    rng = np.random.default_rng(0)
    for pairs, sounds in rng.integers(1, [[40, 400]] * 50):
        for spread in (False, True):
            pads = "".join(part for _, part in told(tuple(range(pairs)), spread, sounds, base))
            assert (pads.count("a"), pads.count("i"), pads.count("("), pads.count(")")) == (
                sounds,
                2 * pairs,
                1,
                1,
            )
            assert pads[-1] == ")" and pads.index("(") < pads.index("a")


def test_a_reply_is_delayed_ended_and_padded_and_comes_back(base):
    codes = np.random.default_rng(0).integers(0, 64, (9, 4))
    ids, streams = vss.reply_rows(codes, [20, 21, 22], base)
    assert ids == [20, 21, 22, 2] + [3] * 6 and streams.shape == (10, 4)
    for t in range(10):  # audio_converter.py: ids 32 higher, eos 2, pad 3, acoustic streams one row late
        assert streams[t, 0] == (codes[t, 0] + 32 if t < 9 else 2)
        assert list(streams[t, 1:]) == (list(codes[t - 1, 1:] + 32) if t else [3, 3, 3])
    assert np.array_equal(vss.codes_from(streams, (64,) * 4), codes)
    more = np.random.default_rng(1).integers(0, 64, (4, 4))
    both = np.concatenate([streams, vss.reply_rows(more, [], base)[1]])
    assert np.array_equal(vss.codes_from(both, (64,) * 4), np.concatenate([codes, more])), "two segments"
    assert np.array_equal(vss.codes_from(streams[:6], (64,) * 4), codes[:5]), (
        "cut: the last semantic code has no others"
    )
    assert vss.codes_from(streams[:0], (64,) * 4).shape == (0, 4)


def test_codes_that_no_codebook_has_are_brought_to_one_that_it_has():
    rows = np.array([[40, 3, 3, 3], [0, 35, 1, 8223], [2, 40, 40, 40]])
    assert vss.codes_from(rows, (8192, 8100, 8100, 8100)).tolist() == [[8, 3, 0, 8099], [0, 8, 8, 8]]


def test_text_may_fill_the_rows_of_its_speech_and_no_more(base, cfg, sample):
    assert vss.reply_rows(np.zeros((5, 4), int), [20] * 5, base)[0] == [20] * 5 + [2]
    vss.write_wav(sample / "out.wav", tone(0.63))  # 10 rows of 60 ms, one of which a codec may leave out
    word = next(word for word in ("0", "1", "x") if len(base.encode(word * 9)) == 9)
    (sample / "out.txt").write_text(word * 9)
    assert vss.open_clip(sample, cfg, base).text == word * 9
    (sample / "out.txt").write_text(word * 10)
    with pytest.raises(BadSample, match="out.txt has 10 tokens, out.wav has room for 9"):
        vss.open_clip(sample, cfg, base)


def test_rows_are_summed_as_the_official_demo_does(net, base):
    rng = np.random.default_rng(0)
    ids = torch.tensor(np.where(rng.random((2, 12)) < 0.4, base.pad, rng.integers(20, 300, (2, 12))))
    streams = torch.tensor(np.where(rng.random((2, 12, 4)) < 0.4, CODEC_PAD, rng.integers(0, 96, (2, 12, 4))))
    ids[0, :4], streams[0, 0], streams[0, 1] = base.pad, CODEC_PAD, torch.tensor([3, 3, 3, 40])
    text, tables = (
        net.llm.get_input_embeddings().weight,
        [t.weight for t in net.audio_embedding.audio_embeddings],
    )
    made = net.rows(ids, streams)
    for b in range(2):
        for t in range(12):
            row = [(tables[i], int(code)) for i, code in enumerate(streams[b, t]) if code != CODEC_PAD]
            if ids[b, t] != base.pad or not row:
                row.append((text, int(ids[b, t])))
            torch.testing.assert_close(
                made[b, t], sum(table[code] for table, code in row), rtol=1e-5, atol=1e-6
            )


def test_pictures_and_sounds_stand_where_the_prompt_has_room_for_them(net, base, cfg, clips):
    batch = vss.Collator(base, cfg)(clips[:2])
    with torch.no_grad():
        whole = net.embed(
            **{name: batch[name] for name in ("ids", "streams", "pixels", "grids", "features", "heard")}
        )
        seen = net.vision_projector(net.vision_encoder(batch["pixels"], batch["grids"])[0]).view(2, -1, 128)
        for b in range(2):
            features = batch["features"][b : b + 1, : int(batch["heard"][b].sum())]
            sounds = net.audio_projector(net.audio_encoder(features, torch.ones(features.shape[:2]).bool()))[
                0
            ]
            torch.testing.assert_close(
                whole[b][batch["ids"][b] == base.ids["image_pad"]], seen[b], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                whole[b][batch["ids"][b] == base.ids["audio_pad"]], sounds, rtol=1e-4, atol=1e-5
            )


# --- Loss and speech


def without_labels(batch: dict) -> dict:
    return {name: batch[name] for name in ("ids", "streams", "pixels", "grids", "features", "heard")}


def loud(net: torch.nn.Module) -> torch.nn.Module:
    """A copy that says other things in every row, and no special ids."""
    net, source = copy.deepcopy(net), torch.Generator().manual_seed(1)
    heads = net.audio_heads.audio_output_layers
    for layer in (net.llm.lm_head, *heads, *net.audio_heads.embedding, net.llm.model.embed_tokens):
        layer.weight.data = torch.randn(layer.weight.shape, generator=source)
    for table in net.audio_embedding.audio_embeddings:
        table.weight.data = torch.randn(table.weight.shape, generator=source)
    for p in net.llm.model.layers.parameters():
        if p.ndim > 1:
            p.data = 2 * p.shape[-1] ** -0.5 * torch.randn(p.shape, generator=source)
    net.llm.lm_head.weight.data[:14] = 0
    for head in heads:
        head.weight.data[:CODEC_OFFSET] = 0
    return net


def heads_by_hand(net: torch.nn.Module, hidden: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
    """hidden (..., D), codes (..., 4) that are known -> logits of text and streams"""
    logits = [hidden @ net.llm.lm_head.weight.T]
    for i, head in enumerate(net.audio_heads.audio_output_layers):
        before = sum(net.audio_heads.embedding[j].weight[codes[..., j]] for j in range(i))
        logits.append((hidden + before) @ head.weight.T)
    return logits


@torch.no_grad()
def losses_by_hand(net: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits of all positions, each clip by itself."""
    hidden = net.llm.model(
        inputs_embeds=net.embed(**without_labels(batch)), attention_mask=batch["mask"]
    ).last_hidden_state
    labels = torch.cat([batch["text_labels"][..., None], batch["code_labels"]], -1)
    losses, hits = torch.zeros(5), torch.zeros(5)
    for b in range(len(hidden)):
        for i, logits in enumerate(heads_by_hand(net, hidden[b, :-1], batch["streams"][b, 1:])):
            losses[i] += F.cross_entropy(logits, labels[b, 1:, i]) / len(hidden)  # -100 is left out
            wanted = labels[b, 1:, i] != -100
            hits[i] += (logits.argmax(-1) == labels[b, 1:, i])[wanted].float().mean() / len(hidden)
    return losses, hits


def test_losses_are_those_of_brute_force_and_the_mean_over_clips(net, base, cfg, clips):
    net, collate = loud(net), vss.Collator(base, cfg)
    batch = collate(clips)
    assert len(set(batch["mask"].sum(1).tolist())) == 3, "lengths differ"
    # Labels that are often right, so that the hits are not all zero.
    with torch.no_grad():
        hidden = net.llm.model(
            inputs_embeds=net.embed(**without_labels(batch)), attention_mask=batch["mask"]
        ).last_hidden_state
        said_text = net.llm.lm_head(hidden[:, :-1]).argmax(-1)
    change = (batch["text_labels"][:, 1:] != -100) & (torch.arange(said_text.shape[1]) % 2 == 0)
    batch["text_labels"][:, 1:] = torch.where(change, said_text, batch["text_labels"][:, 1:])
    losses, hits = net(**batch)
    by_hand = losses_by_hand(net, batch)
    torch.testing.assert_close(losses, by_hand[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hits, by_hand[1], rtol=1e-5, atol=1e-6)
    assert 0.2 < hits[0] < 0.9
    together = torch.stack(net(**collate(clips[1:])))
    alone = [torch.stack(net(**collate([clip]))) for clip in clips[1:]]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-5)
    assert (losses_by_hand(net, collate(clips[2:]))[0] > 0).all(), "a clip without text still ends it"


def test_labels_are_the_reply_alone(base, cfg, clips):
    batch = vss.Collator(base, cfg)(clips)
    for b, clip in enumerate(clips):
        codes, text = np.load(clip.codes), base.encode(clip.text)
        end = int(batch["mask"][b].sum())
        start = end - len(codes) - 1
        assert batch["text_labels"][b, start : start + len(text) + 1].tolist() == [*text, 2]
        assert (batch["text_labels"][b] != -100).sum() == len(text) + 1
        assert (batch["code_labels"][b] != -100).sum(0).tolist() == [len(codes) + 1] + [len(codes)] * 3
        assert (batch["code_labels"][b, start : end - 1, 0] == torch.from_numpy(codes[:, 0] + 32)).all()
        assert (batch["code_labels"][b, start + 1 : end, 1:] == torch.from_numpy(codes[:, 1:] + 32)).all()
        assert not batch["mask"][b, end:].any() and (batch["ids"][b, end:] == base.pad).all()


def test_the_weights_of_the_losses():
    losses = torch.tensor([1.0, 10, 100, 1000, 10000])
    assert vss.weighted(losses, Config()) == pytest.approx(
        1.5 + 0.25 * 11110 + 0.1 * 10
    )  # tech report, section 4.1


def rows_fed(text: list[int], rows: np.ndarray, net) -> tuple[list[int], np.ndarray]:
    """What stands in the text stream beside the rows of one reply; which rows begin a segment."""
    fed, begins, told_yet, writing, begun = [], [], iter(text), True, True
    for row in rows:
        fed.append(next(told_yet) if writing else net.pad)
        begins.append(begun)
        writing = writing and fed[-1] not in (net.llm.config.eos_token_id, net.special["pause"])
        begun = row[0] == CODEC_EOS and not writing
        writing = writing or begun
    return fed, np.array(begins)


@torch.no_grad()
def test_what_is_spoken_step_by_step_is_what_one_pass_over_it_would_say(net, base, cfg, clips):
    net, collate = loud(net), vss.Collator(base, cfg)
    batch = collate(clips[:2], reply=False)
    assert not batch["mask"].all(), "one prompt is padded on the left"
    texts, rows = net.speak(batch, 24, 1.0, False)
    assert [len(r) for r in rows] == [len(text) for text in texts] == [24, 24]
    # From now on the fourth word of one reply is a pause, the sixth of the other the end, and then a code
    # ends the segment.
    net.special["pause"], net.llm.config.eos_token_id = texts[0][3], texts[1][5]
    said, other = (row[:, 0].tolist() for row in net.speak(batch, 24, 1.0, False)[1])
    code = next(code for code in said[4:10] if code not in other[:6])
    semantic = net.audio_heads.audio_output_layers[0].weight
    semantic[[code, CODEC_EOS]] = semantic[[CODEC_EOS, code]]
    texts, rows = net.speak(batch, 24, 1.0, False)
    for clip, text, spoken in zip(clips, texts, rows):
        one = collate([clip], reply=False)
        alone = net.speak(one, 24, 1.0, False)
        assert alone[0] == [text] and np.array_equal(alone[1][0], spoken)
        fed, first = rows_fed(text, spoken, net)
        fed = torch.tensor([fed])
        one["ids"], one["streams"] = (
            torch.cat([one["ids"], fed], 1),
            torch.cat([one["streams"], torch.from_numpy(spoken)[None]], 1),
        )
        hidden = net.llm.model(inputs_embeds=net.embed(**without_labels(one))).last_hidden_state[
            0, -len(spoken) - 1 : -1
        ]
        known = heads_by_hand(net, hidden, torch.from_numpy(spoken))
        assert [int(i) for i, token in zip(known[0].argmax(-1), fed[0]) if token != net.pad] == text
        assert (
            np.array_equal(known[1].argmax(-1).numpy(), spoken[:, 0])
            and (spoken[first, 1:] == CODEC_PAD).all()
        )
        for i in (1, 2, 3):
            assert np.array_equal(known[i + 1].argmax(-1).numpy()[~first], spoken[~first, i])
        assert len({tuple(row) for row in spoken.tolist()}) > len(spoken) / 2, "it says different things"
    assert len(rows[0]) > 8 and len(texts[0]) > 4, "one goes on after its pause"
    assert len(texts[1]) <= 6 < len(rows[1]), "the other has no more text, but more to say"


class Scripted(torch.nn.Module):
    """A head that says at each step what it was told, to each clip."""

    def __init__(self, *scripts: list[int], size: int = 400):
        super().__init__()
        self.scripts, self.size, self.step = scripts, size, 0

    def forward(self, hidden):
        wanted = torch.tensor([script[min(self.step, len(script) - 1)] for script in self.scripts])
        self.step += 1
        return F.one_hot(wanted, self.size).float()


def speak_as_told(net, base, cfg, clips, monkeypatch, texts, semantic, most=20, acoustic=None):
    """-> (texts, rows, [(text ids, codes) fed back at each step])"""
    net, fed = copy.deepcopy(net), []
    net.llm.lm_head = Scripted(*texts)
    acoustic = acoustic or [[50 + i + step for step in range(20)] for i in (0, 10, 20)]
    heads = [
        Scripted(*semantic, size=96),
        *(Scripted(*[script] * len(texts), size=96) for script in acoustic),
    ]
    net.audio_heads.audio_output_layers = torch.nn.ModuleList(heads)
    batch = vss.Collator(base, cfg)(clips[: len(texts)], reply=False)
    real = net.rows
    monkeypatch.setattr(
        net,
        "rows",
        lambda ids, streams: (fed.append((ids.tolist(), streams.tolist())), real(ids, streams))[1],
    )
    out, rows = net.speak(batch, most, 1.0, False)
    return out, [r.tolist() for r in rows], fed[1:]  # the first is the prompt


def test_text_stops_after_its_end_and_the_reply_after_the_semantic_stream(net, base, cfg, clips, monkeypatch):
    texts, rows, fed = speak_as_told(
        net, base, cfg, clips, monkeypatch, [[20, 21, 2, 22, 23]], [[40, 41, 42, 43, 2, 44]]
    )
    assert texts == [[20, 21, 2]]
    assert rows == [[[40, 3, 3, 3], [41, 51, 61, 71], [42, 52, 62, 72], [43, 53, 63, 73], [2, 54, 64, 74]]]
    assert [ids[0][0] for ids, _ in fed] == [20, 21, 2, 3] and [codes[0][0] for _, codes in fed] == rows[0][
        :4
    ]
    assert vss.codes_from(np.array(rows[0]), (64,) * 4).tolist() == [
        [8 + i, 19 + i, 29 + i, 39 + i] for i in range(4)
    ]


def test_a_pause_starts_a_second_segment(net, base, cfg, clips, monkeypatch):
    pause = base.ids["pause"]
    script = [20, pause, 99, 21, 2, 98, 97, 96]
    texts, rows, fed = speak_as_told(
        net, base, cfg, clips, monkeypatch, [script], [[40, 41, 2, 42, 43, 44, 2]]
    )
    assert texts == [[20, pause, 21, 2]]
    assert [row[0] for row in rows[0]] == [40, 41, 2, 42, 43, 44, 2]
    assert [row[1] for row in rows[0]] == [3, 51, 52, 3, 54, 55, 56]
    assert [ids[0][0] for ids, _ in fed] == [20, pause, 3, 21, 2, 3]
    assert len(vss.codes_from(np.array(rows[0]), (64,) * 4)) == 5


def test_a_reply_ends_where_it_must(net, base, cfg, clips, monkeypatch):
    script = dict(texts=[[20, 2], [21, 22, 23]], semantic=[[40, 41, 2], [40]])
    texts, rows, fed = speak_as_told(net, base, cfg, clips, monkeypatch, **script, most=7)
    assert texts == [[20, 2], [21, 22, 23, 23, 23, 23, 23]]
    assert [len(r) for r in rows] == [3, 7], "one is done, the other goes on to the longest reply"
    assert all(ids[0] == [3] and codes[0] == [[3, 3, 3, 3]] for ids, codes in fed[3:]), (
        "nothing is fed to what is done"
    )
    script = dict(texts=[[20, 21, 22, 23, 2]], semantic=[[40, 41, 2, 43, 44, 45, 2]])
    texts, rows, _ = speak_as_told(net, base, cfg, clips, monkeypatch, **script)
    assert texts == [[20, 21, 22, 23, 2]], "the text is said to its end, whatever the codes say of theirs"
    assert [row[0] for row in rows[0]] == [40, 41, 2, 43, 44, 45, 2]
    texts, rows, _ = speak_as_told(net, base, cfg, clips, monkeypatch, [[20, 21, 2]], [[40, 41, 2]])
    assert texts == [[20, 21, 2]] and len(rows[0]) == 3, "both in one row"


def test_a_row_of_padding_keeps_its_place(net, base, cfg, clips, monkeypatch):
    """Left out, it would shift the acoustic codes against the semantic ones from there on."""
    acoustic = [[50, 51, 3, 53, 54]] * 3
    texts, rows, _ = speak_as_told(
        net, base, cfg, clips, monkeypatch, [[20, 2]], [[40, 41, 3, 43, 2]], acoustic=acoustic
    )
    assert rows == [[[40, 3, 3, 3], [41, 51, 51, 51], [3, 3, 3, 3], [43, 53, 53, 53], [2, 54, 54, 54]]]


@torch.no_grad()
def test_codes_heard_in_the_last_30_rows_are_less_likely(net):
    net, source = loud(net), np.random.default_rng(0)
    net.audio_heads.audio_output_layers[2].weight[:, 0] = -3  # with logits below zero
    hidden = torch.from_numpy(source.standard_normal((3, 128))).float()
    hidden[:, 0] = 30
    spoken = torch.from_numpy(source.integers(CODEC_OFFSET, CODEC_OFFSET + 12, (3, 45, 4)))
    spoken[:, 0, 1:], spoken[1, -4:] = CODEC_PAD, CODEC_PAD
    net.audio_heads.audio_output_layers[0].weight[CODEC_OFFSET : CODEC_OFFSET + 12] *= (
        3  # those that were said are likely
    )

    def by_hand(penalty: float, rows: int) -> np.ndarray:
        chosen = np.zeros((3, 4), int)
        for b in range(3):
            h = hidden[b].clone()
            for i, head in enumerate(net.audio_heads.audio_output_layers):
                logits = (head.weight @ h).tolist()
                for code in spoken[
                    b, -rows:, i
                ].tolist():  # EXPONENTIAL of the engine: once more for each time
                    if code != CODEC_PAD:
                        logits[code] = logits[code] * penalty if logits[code] < 0 else logits[code] / penalty
                chosen[b, i] = np.argmax(logits)
                h += net.audio_heads.embedding[i].weight[chosen[b, i]] if i < 3 else 0
        return chosen

    assert np.array_equal(net.choose(hidden, spoken, 1.3).numpy(), by_hand(1.3, 30))
    assert np.array_equal(net.choose(hidden, spoken[:, :0], 1.3).numpy(), by_hand(1.0, 30))
    assert not np.array_equal(by_hand(1.3, 30), by_hand(1.0, 30)), "the penalty matters here"


# --- Files of the model


def test_the_published_sizes_are_those_of_the_report():
    config = LongcatFlashConfig(pad_token_id=3)
    with torch.device("meta"):
        ours, stock = vss.longcat_class()(config), LongcatFlashForCausalLM(config)
        whole = vss.Omni(vss.published_base(vss.BASE_MODEL), ours)
    count = {
        name: sum(p.numel() for p in m.parameters()) / 1e9
        for name, m in (("ours", ours), ("stock", stock), ("all", whole))
    }
    assert count["ours"] == pytest.approx(560.66, abs=0.01), "the 560 B of the model's name"
    assert count["stock"] == pytest.approx(741.05, abs=0.01), (
        "transformers 5.23 has weights for the identity experts as well"
    )
    assert 2e9 * count["all"] == pytest.approx(vss.PUBLISHED_BYTES, rel=1e-3)
    assert sum(p.numel() for p in whole.vision_encoder.parameters()) / 1e6 == pytest.approx(
        637, abs=1
    )  # report, table 1
    experts = ours.model.layers[0].mlp.experts
    assert isinstance(experts, longcat_flash.LongcatFlashExperts)
    assert type(experts) is not longcat_flash.LongcatFlashExperts, "put back"


def test_the_checkpoint_has_real_experts_alone_and_stock_transformers_cannot_take_it(tiny, base):
    names = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    experts = sorted(name for name in names if ".experts." in name)
    assert experts == sorted(
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in (0, 1) for expert in range(8) for part in ("gate", "up", "down")
    )  # fmt: skip
    _, report = LongcatFlashForCausalLM.from_pretrained(
        tiny, config=base.config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert {name.split(".")[-1] for name, *_ in report["mismatched_keys"]} == {"gate_up_proj"}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LongcatFlashForCausalLM.from_pretrained(tiny, config=base.config)
    _, report = vss.longcat_class().from_pretrained(tiny, config=base.config, output_loading_info=True)
    assert list(report["missing_keys"]) == ["model.embed_tokens.weight"], "it has a file of its own"
    assert not report["mismatched_keys"] and not report["unexpected_keys"]


@torch.no_grad()
def test_logits_are_those_of_stock_transformers_with_the_same_weights(net, base):
    ours, stock = copy.deepcopy(net.llm), LongcatFlashForCausalLM(copy.deepcopy(base.config)).eval()
    for layer in ours.model.layers:
        layer.mlp.router.e_score_correction_bias.data = 0.05 * torch.randn(
            12, generator=torch.Generator().manual_seed(1)
        )
    theirs, weights = stock.state_dict(), ours.state_dict()
    assert theirs.keys() == weights.keys()
    for name, value in weights.items():
        if name.endswith("gate_up_proj"):
            value = torch.cat([value, torch.full_like(theirs[name][8:], math.nan)])  # never read
        theirs[name].copy_(value)
    ids = torch.arange(20, 80)[None]
    logits = ours(ids).logits
    torch.testing.assert_close(logits, stock(ids).logits, rtol=1e-5, atol=1e-6)
    assert logits.std() > 0.01 and torch.isfinite(logits).all()


@pytest.fixture
def broken(tiny, tmp_path):
    """(a copy of the model's folder, a function that changes the shard that holds a weight, or a .pt)"""
    shutil.copytree(tiny, tmp_path / "model")
    folder = tmp_path / "model"
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def change(name: str, how) -> None:
        path = folder / where.get(name, name)
        if path.suffix == ".pt":
            torch.save(how(torch.load(path)), path)
        else:
            save_file(how(load_file(path)), path, {"format": "pt"})

    return folder, change


O_PROJ = "model.layers.0.self_attn.0.o_proj.weight"
BIAS = "model.layers.1.mlp.router.e_score_correction_bias"
ROUTER = "model.layers.1.mlp.router.classifier.weight"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("file", "how", "named"),
    [
        (O_PROJ, lambda w: {k: v for k, v in w.items() if k != O_PROJ}, "self_attn.0.o_proj"),
        (BIAS, lambda w: {k: v for k, v in w.items() if k != BIAS}, "e_score_correction_bias"),
        (EXPERT, lambda w: {k: v for k, v in w.items() if k != EXPERT}, "experts|conversion of the weights"),
        (O_PROJ, lambda w: w | {"model.layers.0.surplus.weight": torch.ones(3)}, "surplus"),
        (O_PROJ, lambda w: w | {O_PROJ: w[O_PROJ][:-1].clone()}, "self_attn.0.o_proj"),
        (
            "vision/vision_model.pt",
            lambda w: {k: v for k, v in w.items() if k != "encoder.layers.1.ls2"},
            "vision_model.pt: 1 w.*ls2",
        ),
        (
            "audio/audio_encoder.pt",
            lambda w: w | {"surplus": torch.ones(3)},
            "audio_encoder.pt: 1 w.*surplus",
        ),
        (
            "audio/audio_output_layers.pt",
            lambda w: w | {"embedding.0.weight": torch.ones(96, 64)},
            "embedding.0.weight",
        ),
        (
            "language_model_embedding.pt",
            lambda w: {"embeddings.weight": w["word_embeddings.weight"]},
            "language_model_embedding.pt",
        ),
    ],
    ids="missing bias expert unexpected shape pt_missing pt_unexpected pt_shape pt_name".split(),
)
def test_weights_that_are_missing_or_do_not_fit_end_the_run(broken, capsys, file, how, named):
    folder, change = broken
    change(file, how)
    with pytest.raises(SystemExit) as end:
        vss.load_omni(vss.open_base(str(folder)), "fp32")
    assert end.value.code == 2 and re.search(named, capsys.readouterr().err)


def test_the_head_for_several_tokens_at_once_is_passed_over(broken, net):
    """The published checkpoint has it, as model.mtp."""
    folder, change = broken
    change(O_PROJ, lambda w: w | {"model.mtp.layers.0.eh_proj.weight": torch.ones(3)})
    loaded = vss.load_omni(vss.open_base(str(folder)), "fp32")
    for (name, a), (_, b) in zip(loaded.state_dict().items(), net.state_dict().items()):
        assert torch.equal(a, b), name


def test_files_that_are_missing_are_named(broken, capsys):
    folder, _ = broken
    gone = ["model-00002-of-00003.safetensors", "vision/vision_projector.pt", "audio/audio_encoder.pt"]
    for name in gone:
        (folder / name).unlink()
    assert sorted(vss.missing_files(folder)) == sorted(gone)
    assert all(name in "\n".join(vss.storage(Config(model=str(folder)))) for name in gone)
    (folder / "vision" / "config.json").unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SystemExit) as end:
        vss.open_base(str(folder))
    told_of = capsys.readouterr().err
    assert end.value.code == 2 and "4 files are missing" in told_of
    assert all(name in told_of for name in (*gone[1:], "vision/config.json", "model.safetensors.index.json"))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "audio/global_cmvn", "audio/preprocessor_config.json"]
)
def test_a_folder_without_a_configuration_is_refused(broken, capsys, name):
    (broken[0] / name).unlink()
    with pytest.raises(SystemExit) as end:
        vss.open_base(str(broken[0]))
    assert end.value.code == 2 and "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("audio/preprocessor_config.json", lambda c: c | {"delta": {"delta_order": 2}}, "delta_order is 2"),
        ("audio/preprocessor_config.json", lambda c: c | {"splice": c["splice"] | {"left": 3}}, "input_size"),
        ("audio/config.json", lambda c: c | {"activation": "gelu"}, "activation is gelu"),
        ("audio/config.json", lambda c: c | {"left_stride": 2}, "left_stride is 2"),
        ("vision/config.json", lambda c: c | {"spatial_merge_size": 2}, "spatial_merge_size is 2"),
        ("config.json", lambda c: c | {"model_type": "qwen2"}, "longcat_flash"),
    ],
)
def test_a_model_that_is_built_otherwise_is_refused(broken, capsys, file, change, named):
    path = broken[0] / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(SystemExit) as end:
        vss.open_base(str(broken[0]))
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_routing_biases_stay_exact_where_the_rest_is_bf16(broken):
    folder, change = broken
    exact = torch.linspace(0.1, 0.7, 12) + 1e-4
    assert not torch.equal(exact.bfloat16().float(), exact)
    fine = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        change(
            name := BIAS.replace("layers.1", f"layers.{layer}"),
            lambda w, name=name, by=layer: w | {name: exact + by},
        )
        change(
            name := ROUTER.replace("layers.1", f"layers.{layer}"),
            lambda w, name=name, by=layer: w | {name: fine + by},
        )
    net = vss.load_omni(vss.open_base(str(folder)), "bf16")
    trained = vss.load_omni(vss.open_base(str(folder)), "bf16", routers=True)
    assert isinstance(trained.llm.model.layers[0].mlp.router.classifier.weight, torch.nn.Parameter)
    for cast in (
        lambda m: m,
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        copy.deepcopy,
    ):
        net = cast(net)
        for layer in (0, 1):
            router = net.llm.model.layers[layer].mlp.router
            bias, weight = router.e_score_correction_bias, router.classifier.weight
            assert bias.dtype == torch.float32 and torch.equal(bias, exact + layer)
            assert weight.dtype == torch.float32 and torch.equal(weight, fine + layer)
            assert not isinstance(weight, torch.nn.Parameter), "ZeRO-3 takes parameters of one dtype alone"
            assert (
                net.llm.lm_head.weight.dtype
                == net.vision_encoder.encoder.layers[0].ls1.dtype
                != torch.float32
            )


def test_a_layer_runs_twice_where_it_is_checkpointed_also_after_an_evaluation(net, base, cfg, clips):
    """In the mode of use transformers keeps all activations, and from_pretrained leaves a model in that."""
    data = vss.Data(clips, clips, [])
    for on, calls in ((False, 1), (True, 2)):
        adapted = vss.with_adapter(copy.deepcopy(net), dataclasses.replace(cfg, lora_r=2), base).train()
        if on:
            vss.core(adapted).llm.gradient_checkpointing_enable({"use_reentrant": False})
        seen = []
        layer = vss.core(adapted).llm.model.layers[0].self_attn[0]
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for again in (False, True):
            if again:
                vss.evaluate(adapted, base, data, dataclasses.replace(cfg, eval_samples=1), aloud=False)
            seen.clear()
            losses, _ = adapted(**vss.Collator(base, cfg)(clips[:1]))
            losses.sum().backward()
            assert len(seen) == calls, f"checkpointing {on}, after an evaluation {again}"
            assert adapted.training and vss.core(adapted).llm.training


def test_the_frozen_audio_encoder_drops_nothing_out(net, base, cfg, clips):
    batch = vss.Collator(base, cfg)(clips[:1])
    heard = batch["features"], batch["heard"]
    assert base.audio["dropout"] > 0
    frozen = vss.core(vss.with_adapter(copy.deepcopy(net), dataclasses.replace(cfg, lora_r=2), base).train())
    with torch.no_grad():
        assert torch.equal(frozen.audio_encoder(*heard), net.eval().audio_encoder(*heard))
        trained = copy.deepcopy(net).requires_grad_(True).train()
        assert not torch.equal(trained.audio_encoder(*heard), frozen.audio_encoder(*heard))


def test_an_interrupted_download_goes_on(broken, monkeypatch, caplog):
    """What is there counts: shards, and the part of the one that was being fetched."""
    import huggingface_hub

    folder, _ = broken
    snapshot = folder.parent / "models--x--y" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    (snapshot.parent.parent / "blobs").mkdir()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(snapshot / "config.json"))
    weights = json.loads((snapshot / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    monkeypatch.setattr(vss, "disk_free", lambda _: 0)
    need = 1.06 * weights / 3
    (short,) = vss.storage(Config(model="x/y"))
    assert f"{vss.bytes_text(need)} are needed" in short
    (snapshot.parent.parent / "blobs" / "abc.incomplete").write_bytes(b"0" * int(need / 2))
    (short,) = vss.storage(Config(model="x/y"))
    assert f"{vss.bytes_text(need / 2)} are needed" in short


def what_it_reads(base) -> tuple:
    return (
        base.vision,
        base.audio,
        base.front,
        base.ids,
        base.audio_vocabulary,
        base.pad,
        base.cmvn[0].tolist(),
        base.encode("ab"),
    )


def test_a_written_model_is_the_same_when_it_is_read(net, base, tmp_path):
    (base.folder / "generation_config.json").write_text("{}")
    (base.folder / "modeling_longcat_flash.py").write_text("# remote code")
    vss.write_omni(tmp_path / "again", dict(net.state_dict()), base)
    for name in ("generation_config.json", "modeling_longcat_flash.py", "audio/global_cmvn"):
        assert (tmp_path / "again" / name).read_bytes() == (base.folder / name).read_bytes(), (
            "engines read it"
        )
    again = vss.open_base(str(tmp_path / "again"))
    assert what_it_reads(again) == what_it_reads(base)
    for (name, a), (_, b) in zip(vss.load_omni(again, "fp32").state_dict().items(), net.state_dict().items()):
        assert torch.equal(a, b), name


# --- LoRA


def adapted_layers(net: torch.nn.Module) -> list[str]:
    return sorted(
        name.removesuffix(".lora_A.default")
        for name, _ in net.named_modules()
        if name.endswith("lora_A.default")
    )


def test_lora_at_the_published_sizes_trains_26_6_million():
    names = vss.lora_names(vss.published_base(vss.BASE_MODEL))
    assert 8 * sum(names[name] for name in MLA.split(",")) / 1e6 == pytest.approx(26.6, abs=0.05)
    # By the sizes of the published config: 28 layers of two attentions.
    one = (6144 + 1536) + (1536 + 64 * 192) + (6144 + 512 + 64) + (512 + 64 * 256) + (64 * 128 + 6144)
    assert sum(names[name] for name in MLA.split(",")) == 56 * one


def test_lora_is_given_to_attention_alone(net, base):
    made = vss.with_adapter(copy.deepcopy(net), Config(), base)
    layers = adapted_layers(made)
    assert [sum(f"layers.{n}." in name for name in layers) for n in (0, 1)] == [10, 10] and len(layers) == 20
    assert {name.split(".")[-1] for name in layers} == set(MLA.split(","))
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    names = vss.lora_names(base)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == 8 * sum(
        names[name] for name in MLA.split(",")
    )


def test_lora_of_dense_layers_and_heads_leaves_experts_and_router_alone(net, base):
    cfg = Config(lora_targets="gate_proj,up_proj,down_proj,audio_output_layers")
    layers = adapted_layers(made := vss.with_adapter(copy.deepcopy(net), cfg, base))
    inside = [name.removeprefix("base_model.model.") for name in layers]
    dense = {
        f"llm.model.layers.{n}.mlps.{i}.{part}_proj"
        for n in (0, 1)
        for i in (0, 1)
        for part in ("gate", "up", "down")
    }
    assert set(inside) == dense | {f"audio_heads.audio_output_layers.{i}" for i in range(4)}
    assert not [
        name
        for name, p in made.named_parameters()
        if p.requires_grad and (".experts" in name or "router" in name)
    ]


@pytest.mark.parametrize("wrong", ["q_proj", "classifier", "experts", "audio_encoder", "router", "lm_head"])
def test_lora_targets_that_are_no_such_layers_are_refused(base, capsys, wrong):
    with pytest.raises(SystemExit) as end:
        vss.lora_settings(Config(lora_targets=f"o_proj,{wrong}"), base)
    told_of = capsys.readouterr().err
    assert end.value.code == 2 and f"--lora_targets {wrong}" in told_of
    real = dict(re.findall(r"(\w+) \(([\d.e-]+) M\)", told_of))
    assert set(real) == {*MLA.split(","), "gate_proj", "up_proj", "down_proj", "audio_output_layers"}
    assert float(real["o_proj"]) == pytest.approx(8 * 4 * (128 + 128) / 1e6, rel=1e-3), (
        "two layers of two, 4 heads of 32 to 128"
    )


def test_no_lora_targets_at_all_are_refused(base):
    with pytest.raises(SystemExit) as end:
        vss.lora_settings(Config(lora_targets=" , "), base)
    assert end.value.code == 2


@torch.no_grad()
def test_an_adapter_comes_back_from_its_folder(net, base, cfg, clips, tmp_path):
    made = vss.with_adapter(
        copy.deepcopy(net), Config(lora_targets=f"{MLA},down_proj,audio_output_layers"), base
    ).eval()
    for name, p in made.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    back = vss.with_finished(copy.deepcopy(net), tmp_path / "adapter").eval()
    batch = vss.Collator(base, cfg)(clips[:1])
    losses = [torch.cat(m(**batch)) for m in (made, back, net)]
    assert torch.equal(losses[0], losses[1])
    assert abs(losses[0] - losses[2])[:5].min() > 1e-4, "it changes what all heads say"
    assert vss.with_finished(net, tmp_path) is net, "no adapter there"


# --- Codecs


@pytest.fixture(scope="session")
def codec():
    return vss.MelCodec.fit([sound for _, sound in said(0, 64)], 64, 0)


def test_words_survive_the_mel_codec(codec):
    from pystoi import stoi

    known: dict[str, list] = {}
    for word, sound in said(0, 64):
        known.setdefault(word, []).append(vss.spectral_shape(sound))
    known, right, words = {word: np.stack(prints) for word, prints in known.items()}, 0, said(1, 16)
    for word, sound in words:
        codes = codec.encode(sound)
        back = codec.decode(codes)
        assert codes.shape == (math.ceil(len(sound) / 960), 4) and codes.dtype == np.int64
        assert codes.min() >= 0 and codes.max() < 64
        assert back.shape == (960 * len(codes),) and back.dtype == np.float32 and abs(back).max() <= 1
        right += vss.recognised(back, known) == word
    assert right / 16 > 0.9
    pairs = [
        np.concatenate([a, b]) for (_, a), (_, b) in zip(words[::2], words[1::2])
    ]  # STOI needs 0.4 s of speech
    assert (
        np.mean(
            [stoi(pair, codec.decode(codec.encode(pair))[: len(pair)], vss.SAMPLE_RATE) for pair in pairs]
        )
        > 0.8
    )


def test_each_codebook_of_the_mel_codec_takes_up_what_is_left(codec):
    sound = np.concatenate([sound for _, sound in said(1, 16)])
    wanted = codec.log_mel(sound).reshape(-1, 240)
    codes = torch.from_numpy(codec.encode(sound))
    left = [(wanted - codec.mean).pow(2).mean()]
    for used in range(1, 5):
        summed = codec.mean + sum(codec.codebooks[i][codes[:, i]] for i in range(used))
        left.append((wanted - summed).pow(2).mean())
    assert all(b < a for a, b in zip(left, left[1:])) and left[-1] < 0.2 * left[0]
    first = (wanted[:, None] - codec.mean - codec.codebooks[0]).pow(2).sum(-1).argmin(1)
    assert torch.equal(first, codes[:, 0])


def test_a_codec_is_fitted_the_same_again_and_kept_in_a_file(codec, tmp_path):
    again = vss.MelCodec.fit([sound for _, sound in said(0, 64)], 64, 0)
    codec.save(tmp_path / "codec.safetensors")
    read = vss.MelCodec.load(tmp_path / "codec.safetensors")
    sound = said(2, 1)[0][1]
    for other in (again, read):
        assert (
            torch.equal(other.codebooks, codec.codebooks)
            and torch.equal(other.mean, codec.mean)
            and other.key == codec.key
        )
        assert np.array_equal(other.encode(sound), codec.encode(sound))
    assert np.array_equal(read.decode(codec.encode(sound)), codec.decode(codec.encode(sound)))
    assert codec.decode(np.zeros((0, 4), int)).shape == (0,)


def test_a_codec_is_not_fitted_on_too_little(capsys):
    with pytest.raises(SystemExit) as end:
        vss.MelCodec.fit([np.zeros(9600, np.float32)], 64, 0)
    assert end.value.code == 2 and "0.6 s of replies" in capsys.readouterr().err


CHECKOUT = '''
from pathlib import Path

import torch
import torchaudio  # which is in no requirements


def opened(config, device):
    """A configuration that names a file of weights, both from the checkout's root, as in the official one."""
    ckpt = Path(config).read_text().strip()
    return float(torch.load(ckpt, map_location=device))


def load_encoder(config, device):
    step = opened(config, device)

    def encoder(audio, sample_rate, n_acoustic_codebooks):
        assert audio.ndim == 3 and audio.shape[1] == 1 and sample_rate == 16000 and n_acoustic_codebooks == 3
        rows = audio[:, 0, : audio.shape[2] // 960 * 960].reshape(len(audio), -1, 960)
        levels = [((rows.mean(2) + 1) * step).long() + i for i in range(4)]
        return levels[0], torch.stack(levels[1:], 1)[..., : rows.shape[1] - 1], "more"

    return encoder


class Decoder(torch.nn.Module):
    output_rate = 24000

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, semantic, acoustic):
        assert semantic.ndim == 2 and acoustic.shape == (len(semantic), 3, semantic.shape[1])
        return ((semantic + acoustic.sum(1)) / 4 / self.step - 1).repeat_interleave(1440, 1)[:, None]


def load_decoder(config, device):
    return Decoder(opened(config, device))
'''


@pytest.fixture
def checkout(tmp_path):
    """Stands in for LongCat-Audio-Codec: its files, with its calling convention."""
    root = tmp_path / "LongCat-Audio-Codec"
    for folder in ("configs", "ckpts", "networks/semantic_codec"):
        (root / folder).mkdir(parents=True)
    (root / "networks" / "semantic_codec" / "model_loader.py").write_text(CHECKOUT)
    for name, file in zip(
        vss.LongCatCodec.files, ("LongCatAudioCodec_encoder.pt", "LongCatAudioCodec_decoder_24k.pt")
    ):
        (root / name).write_text(f"ckpts/{file}\n")
        torch.save(1000.0, root / "ckpts" / file)
    yield root
    for name in [name for name in sys.modules if name == "networks" or name.startswith("networks.")]:
        del sys.modules[name]


def test_the_official_codec_is_called_as_its_own_code_wants_it(checkout, base, monkeypatch):
    monkeypatch.chdir(checkout.parent)
    path = list(sys.path)
    cfg = Config(codec=Path("LongCat-Audio-Codec"))
    vss.check_codec(cfg, dataclasses.replace(base, audio_vocabulary=vss.AUDIO_VOCABULARY))
    codec = vss.open_codec(cfg, base, [])
    assert Path.cwd() == checkout.parent and sys.path == path, "as before"
    assert "torchaudio" not in sys.modules
    made = vss.resample(torch.randn(1, 1, 4800), orig_freq=48_000, new_freq=16_000)
    assert made.shape == (1, 1, 1600) and made.dtype == torch.float32
    sound = np.repeat(np.linspace(-0.5, 0.5, 10), 960).astype(np.float32)
    codes = codec.encode(sound)
    assert codes.shape == (9, 4) and codes.dtype == np.int64 and codec.rate == 24_000
    assert codes[:, 0].tolist() == [int(1000 * (1 + value)) for value in sound[480 : 9 * 960 : 960]]
    assert (codes - codes[:, :1] == np.arange(4)).all()
    back = codec.decode(codes)
    assert back.shape == (9 * 1440,) and back.dtype == np.float32
    np.testing.assert_allclose(back[::1440], sound[: 9 * 960 : 960], atol=3e-3)


@pytest.mark.parametrize(
    "name", ["configs/LongCatAudioCodec_encoder.yaml", "ckpts/LongCatAudioCodec_encoder.pt"]
)
def test_a_file_that_the_official_codec_lacks_is_named(checkout, base, capsys, name):
    (checkout / name).unlink()
    with pytest.raises(SystemExit) as end:
        vss.check_codec(Config(codec=checkout), base)
    assert end.value.code == 2 and name in capsys.readouterr().err


def test_an_official_codec_that_does_not_load_is_refused_and_leaves_no_trace(checkout, capsys):
    (checkout / "ckpts" / "LongCatAudioCodec_decoder_24k.pt").unlink()
    here, path = Path.cwd(), list(sys.path)
    with pytest.raises(SystemExit) as end:
        vss.LongCatCodec(checkout)
    assert end.value.code == 2 and "LongCatAudioCodec_decoder_24k.pt" in capsys.readouterr().err
    assert Path.cwd() == here and sys.path == path


def test_a_package_that_the_codec_needs_is_named(checkout, capsys):
    path = checkout / "networks" / "semantic_codec" / "model_loader.py"
    path.write_text("import no_such_package\n" + path.read_text())
    with pytest.raises(SystemExit) as end:
        vss.LongCatCodec(checkout)
    assert end.value.code == 2 and "pip install no_such_package" in capsys.readouterr().err


def test_the_published_model_asks_for_its_codec(base, capsys):
    with pytest.raises(SystemExit) as end:
        vss.check_codec(Config(), dataclasses.replace(base, audio_vocabulary=vss.AUDIO_VOCABULARY))
    assert end.value.code == 2 and "--codec" in capsys.readouterr().err
    vss.check_codec(Config(), base)


# --- Data


def write_sound(
    path: Path, sound: np.ndarray, rate: int, codec: str, pictures: np.ndarray | None = None, form=None
) -> None:
    """float (N,), and pictures at 2 a second beside it, through ffmpeg"""
    with av.open(str(path), "w", format=form) as file:
        video = file.add_stream("libx264", rate=2) if pictures is not None else None
        stream = file.add_stream(codec, rate=rate, layout="mono")
        if video:
            video.height, video.width, video.pix_fmt = *pictures.shape[1:3], "yuv420p"
            for picture in pictures:
                file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(
            (sound * 32767).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def tone(seconds: float, rate: int = vss.SAMPLE_RATE, hertz: float = 440) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def hertz_of(path: Path) -> float:
    sound = np.load(path)
    return float(np.argmax(abs(np.fft.rfft(sound))) * vss.SAMPLE_RATE / len(sound))


def loudness(path: Path) -> float:
    return float(
        np.sqrt(np.mean(np.load(path)[4_000:16_000] ** 2))
    )  # LAME adds silence at both ends, and takes 5 % away


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        (".mp3", "mp3", 44_100),
        (".flac", "flac", 8_000),
        (".WAV", "pcm_s16le", 48_000),
        (".opus", "libopus", 48_000),
    ],
)
def test_other_containers_and_rates_are_read(sample, cfg, base, suffix, codec, rate):
    (sample / "in.mp4").rename(sample / "IN.MOV")
    (sample / "in.wav").unlink()
    write_sound(sample / f"in{suffix}", tone(1.5, rate), rate, codec)
    clip = vss.open_clip(sample, cfg, base)
    assert clip.rates == (rate, 16_000) and clip.name == "train/01"
    assert len(np.load(clip.speech)) / vss.SAMPLE_RATE == pytest.approx(1.5, abs=0.06)
    assert hertz_of(clip.speech) == pytest.approx(440, abs=2) and loudness(clip.speech) == pytest.approx(
        0.3 / 2**0.5, rel=0.06
    )
    assert np.load(clip.frames).shape == (4, 56, 56, 3)
    assert vss.open_clip(sample, cfg, base) == clip, "from the cache"


@pytest.mark.parametrize("written", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with its mark"])
def test_what_is_said_may_be_written_as_windows_does(sample, cfg, base, written):
    (sample / "out.txt").unlink()
    content = (
        "Grüße\n".encode(written) if "mark" not in written else b"\xff\xfe" + "Grüße\n".encode("utf-16-le")
    )
    (sample / "OUT.TXT").write_bytes(content)
    assert vss.open_clip(sample, cfg, base).text == "Grüße"
    (sample / "OUT.TXT").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(BadSample, match=r"OUT.TXT is not UTF-8 \(byte 2\)"):
        vss.open_clip(sample, cfg, base)


def test_the_sound_track_is_the_question_where_there_is_no_other(sample, cfg, base):
    pictures = np.full((4, 56, 56, 3), 90, np.uint8)
    write_sound(sample / "in.mp4", tone(2, hertz=600), vss.SAMPLE_RATE, "aac", pictures)
    assert hertz_of(vss.open_clip(sample, cfg, base).speech) != pytest.approx(600, abs=5), (
        "in.wav goes before it"
    )
    (sample / "in.wav").unlink()
    clip = vss.open_clip(sample, cfg, base)
    assert hertz_of(clip.speech) == pytest.approx(600, abs=5) and len(np.load(clip.speech)) == pytest.approx(
        32_000, abs=2_100
    )


def test_two_channels_become_one_at_the_same_loudness(sample, tmp_path):
    import wave

    both = np.stack([tone(1), np.zeros(16_000)], 1)
    with wave.open(str(tmp_path / "two.wav"), "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes((both * 32767).astype("<i2").tobytes())
    sound, rate = vss.read_speech(tmp_path / "two.wav")
    assert rate == 16_000 and sound.shape == (16_000,) and sound.dtype == np.float32
    np.testing.assert_allclose(sound, both.mean(1), atol=1e-3)


def no_video_stream(folder: Path) -> None:
    write_sound(folder / "in.mp4", tone(2), vss.SAMPLE_RATE, "aac")


BAD = {
    "no in.mp4; there is in.wav": lambda f: (f / "in.mp4").unlink(),
    "no out.wav; there is in.mp4, in.wav, out.txt": lambda f: (f / "out.wav").unlink(),
    "in.wav is empty": lambda f: vss.write_wav(f / "in.wav", np.zeros(0)),
    "in.wav: empty file": lambda f: (f / "in.wav").write_bytes(b""),
    "in.wav has 0.05 s": lambda f: vss.write_wav(f / "in.wav", tone(0.05)),
    "out.wav is silent": lambda f: vss.write_wav(f / "out.wav", np.zeros(16_000)),
    "in.wav has 3.0 s, --max_seconds is 2.5": lambda f: vss.write_wav(f / "in.wav", tone(3)),
    "in.mp4: no video stream": no_video_stream,
    "in.mp4: text or HTML, not a video": lambda f: (f / "in.mp4").write_text("not a video\n" * 99),
    "in.mp4: no audio stream": lambda f: (f / "in.wav").unlink(),
    "out.txt has [0-9]+ tokens, out.wav has room for 1[0-9]": lambda f: (f / "out.txt").write_text(
        "words that nobody says " * 9
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_samples_are_told_with_their_reason(sample, cfg, base, reason):
    BAD[reason](sample)
    with pytest.raises(BadSample, match=reason):
        vss.open_clip(sample, dataclasses.replace(cfg, max_seconds=2.5), base)


def test_speech_that_was_decoded_before_is_checked_again(sample, cfg, base):
    vss.open_clip(sample, cfg, base)
    with pytest.raises(BadSample, match="in.wav has 2.0 s, --max_seconds is 1.5"):
        vss.open_clip(sample, dataclasses.replace(cfg, max_seconds=1.5), base)


def test_samples_lie_under_train_and_beside_it_test(tmp_path, capsys):
    for name in ("train/02", "train/01", "train/.hidden", "test/01", "alone/x"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "notes.txt").touch()
    for given in (tmp_path, tmp_path / "train"):
        found = vss.sample_folders(given)
        assert [f"{p.parent.name}/{p.name}" for p in found["train"] + found["test"]] == [
            "train/01",
            "train/02",
            "test/01",
        ]
    assert vss.sample_folders(tmp_path / "alone") == {"train": [tmp_path / "alone" / "x"], "test": []}
    (tmp_path / "empty").mkdir()
    for wrong, why in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no sample folders")):
        with pytest.raises(SystemExit) as end:
            vss.sample_folders(wrong)
        assert end.value.code == 2 and why in capsys.readouterr().err


def test_data_are_split_as_their_folders_are_and_dull_speech_is_named(tmp_path, cfg, base):
    for number, name in enumerate(("train/01", "train/02", "test/01", "train/03")):
        speech.make_clip(tmp_path / name, number, False, False, 0, vss.write_wav)
    write_sound(tmp_path / "train" / "02" / "in.wav", tone(2, 8_000), 8_000, "pcm_s16le")
    (tmp_path / "train" / "03" / "out.wav").unlink()
    data = vss.load_data(cfg, tmp_path, base)
    assert [clip.name for clip in data.train] == ["train/01", "train/02"]
    assert [clip.name for clip in data.held_out] == ["test/01"]
    assert [Path(bad["where"]).name for bad in data.bad] == ["03"] and "no out.wav" in data.bad[0]["reason"]
    lines = "\n".join(text for _, text in vss.describe(cfg, data, tmp_path))
    assert (
        "2 clips to train on, 1 held out, 1 left out as bad" in lines
        and "3 of 3 clips have an out.txt" in lines
    )
    assert lines.endswith("\nwarning: below 16 kHz, so dull: train/02"), "it alone"
    assert "\ntrain/01: 4 pictures, speech 2.0 s  ->  " in lines, "rows are shown"
    lengths = sorted(len(np.load(clip.reply)) / 16_000 for clip in (*data.train, *data.held_out))
    assert f"in 2.0 to 2.0 s, out {lengths[0]:.1f} to {lengths[-1]:.1f} s" in lines
    shutil.rmtree(tmp_path / "test")
    data = vss.load_data(dataclasses.replace(cfg, val_fraction=0.5), tmp_path, base)
    assert len(data.train) == len(data.held_out) == 1 and data.train[0].name != data.held_out[0].name
    shutil.rmtree(tmp_path / "train" / "02")
    data = vss.load_data(cfg, tmp_path, base)
    assert data.held_out is data.train
    assert "(the same: there is one clip)" in vss.describe(cfg, data, tmp_path)[0][1]


def official_frames(fps: float, total: int, most: int) -> list[int]:
    """_load_and_sample_video_track of data/utils.py, a pair for each second"""
    seconds = math.ceil(total / fps)
    if 2 * seconds > most:
        return torch.linspace(0, total - 1, most).round().long().tolist()
    places = torch.linspace(0, seconds * fps, 2 * seconds).round()
    places[places > total - 1] = total - 1
    return places.long().tolist()


@pytest.mark.parametrize("most", [64, 4])
@pytest.mark.parametrize(("fps", "total"), [(2, 4), (8, 8), (8, 28), (25, 50), (25, 87), (2, 7), (1, 5)])
def test_frames_and_their_times_are_the_official_ones(tmp_path, fps, total, most):
    """Also of 3.5 s, and of fewer frames than two a second: some are taken twice."""
    common.write_mp4(np.full((total, 30, 56, 3), 99, np.uint8), tmp_path / "in.mp4", fps)
    numbers, times, spread, shape = vss.video_times(tmp_path / "in.mp4", most)
    wanted = official_frames(fps, total, most)
    assert list(numbers) == wanted and times == tuple(number / fps for number in wanted[::2])
    assert spread == (2 * math.ceil(total / fps) > most) and shape == (30, 56)


def test_a_clip_of_few_frames_is_no_bad_sample(sample, cfg, base):
    pictures = np.stack([np.full((56, 56, 3), 40 * i, np.uint8) for i in range(5)])
    common.write_mp4(pictures, sample / "in.mp4", 1)
    clip = vss.open_clip(sample, cfg, base)
    frames = np.load(clip.frames)
    assert len(frames) == 2 * len(clip.seconds) == 10
    assert [round(float(frame.mean()) / 40) for frame in frames] == official_frames(1, 5, 64)


@pytest.mark.parametrize(
    ("height", "width", "cap", "wanted"),
    [
        (360, 640, 224, (168, 280)), (640, 360, 224, (280, 168)), (480, 480, 224, (224, 224)), (56, 56, 56, (56, 56)),
        (20, 30, 224, (28, 56)), (100, 2000, 224, (28, 980)), (30, 900, 56, (28, 112)), (1080, 1920, 448, (336, 588)),
    ],
)  # fmt: skip
def test_pictures_keep_their_proportions(base, height, width, cap, wanted):
    rows, columns = vss.picture_size(height, width, cap, 4, base.vision)
    assert (rows, columns) == wanted and rows % 14 == columns % 28 == 0 and rows * columns <= cap**2
    tight = base.vision | {"max_tokens": 60, "max_tokens_video_vit": 120, "min_tokens": 4}
    small = math.prod(vss.picture_size(height, width, cap, 4, tight))
    assert small <= 30 * 14 * 14, "120 patches of 4 pairs"
    large = vss.picture_size(28, 28, cap, 4, base.vision | {"min_tokens_video_vit": 16})
    assert math.prod(large) >= min(16 * 14 * 14, cap**2)


def test_clips_of_different_proportions_share_a_batch(sample, cfg, base, net):
    common.write_mp4(np.full((8, 30, 120, 3), 99, np.uint8), sample / "in.mp4", 4)
    wide = vss.open_clip(sample, cfg, base)
    wide = dataclasses.replace(wide, codes=None)
    common.write_mp4(np.full((8, 120, 60, 3), 99, np.uint8), sample / "in.mp4", 4)
    tall = dataclasses.replace(vss.open_clip(sample, cfg, base), codes=None)
    assert wide.size == (28, 112) and tall.size == (56, 28)
    collate = vss.Collator(base, cfg)
    batch = collate([wide, tall], reply=False)
    assert batch["grids"].tolist() == [[2, 8]] * 2 + [[4, 2]] * 2 and batch["pixels"].shape[:2] == (4, 16)
    with torch.no_grad():
        together = net.eval().embed(**without_labels(batch))
        for i, clip in enumerate((wide, tall)):
            alone = collate([clip], reply=False)
            length = int(alone["mask"].sum())
            torch.testing.assert_close(
                together[i, -length:], net.embed(**without_labels(alone))[0], atol=1e-5, rtol=1e-4
            )


# --- Evaluation


def test_recognition_knows_words_of_another_voice_and_no_sound():
    known = {word: np.stack([vss.spectral_shape(sound)]) for word, sound in said(3, 10)}
    assert [vss.recognised(sound, known) for _, sound in said(4, 10, 125)] == list(known)
    assert vss.recognised(np.zeros(1000, np.float32), known) == ""


def test_speech_distance_of_the_same_and_of_a_longer_reply():
    target = np.concatenate([sound for _, sound in said(5, 3)])
    same = vss.speech_distance(target, target)
    assert (
        same["stoi"] == pytest.approx(1, abs=1e-3)
        and same["mel_cepstral_distance"] == 0 == same["duration_error"]
    )
    longer = np.concatenate([target, np.zeros(round(0.1 * len(target)), np.float32)])
    assert vss.speech_distance(target, longer)["duration_error"] == pytest.approx(0.1, abs=1e-3)
    assert vss.speech_distance(target, longer[: len(target) // 2])["duration_error"] == pytest.approx(
        0.5, abs=1e-3
    )
    noise = np.random.default_rng(0).normal(0, 0.1, len(target)).astype(np.float32)
    other = vss.speech_distance(target, noise)
    assert other["stoi"] < 0.5 and other["mel_cepstral_distance"] > 5
    # Kubichek 1993 with the orthonormal DCT-II written out: coefficients 1 to 13 of 40 bands, in dB.
    a, b = (vss.MelCodec.log_mel(sound).numpy().astype(np.float64) for sound in (target, noise))
    squared = np.zeros(len(a))
    for k in range(1, 14):
        wave_of = math.sqrt(2 / 40) * np.cos(math.pi * k * (2 * np.arange(40) + 1) / 80)
        squared += ((a - b) @ wave_of) ** 2
    assert other["mel_cepstral_distance"] == pytest.approx(
        10 / math.log(10) * np.sqrt(2 * squared).mean(), rel=1e-4
    )


def test_no_reply_at_all_can_be_scored():
    scores = vss.speech_distance(tone(1).astype(np.float32), np.zeros(0, np.float32))
    assert scores["stoi"] == 0 and scores["duration_error"] == 1


# --- The plan


@pytest.fixture(scope="module")
def published():
    base = vss.published_base(vss.BASE_MODEL)
    return vss.sizes_of(base, Config(), "bf16", 1650, 168)


def test_the_published_model_is_counted(published):
    assert published.parameters == pytest.approx(562.6e9, rel=1e-3) and published.trained == pytest.approx(
        26.6e6, rel=2e-3
    )
    assert published.layer == 512 * 3 * 2048 * 6144, "38.7 GB of one mixture are gathered whole"
    assert published.largest == 512 * 2 * 2048 * 6144
    assert published.kept[True] < published.kept[False]


def test_the_time_that_weights_take_to_the_gpus(published):
    layouts = {layout.name: layout for layout in vss.layouts_of(published, Config(), "bf16", 8, 8, NVME)}
    offloaded, disk = (layouts[f"ZeRO-3, {at}, checkpointing"] for at in ("all on CPU", "weights on NVMe"))
    # 1.125 TB three times (forward, again, backward): an eighth each at 50 GB/s, or all of it at 7 GB/s
    weights = 2 * published.parameters
    assert vss.transfer_seconds(offloaded, weights, 8, 8) == pytest.approx(8.4, abs=0.1)
    assert "8 s a micro-step, 2 min a step" in offloaded.note
    assert vss.transfer_seconds(disk, weights, 8, 8) == pytest.approx(3 * 1.125e12 / 7e9, rel=0.01)
    assert "8 min a micro-step, 2.1 h a step" in disk.note
    # pinned memory comes in powers of two: an eighth of the largest tensor is 3.2 GB, and takes 4.3
    assert offloaded.host_gb == pytest.approx(1507, rel=0.01)
    assert 38.7 < offloaded.gpu_gb < 80, "one mixture and the activations"
    assert layouts["ZeRO-3, checkpointing"].gpu_gb > 1125 / 8 and "ZeRO-2" in next(iter(layouts))


@pytest.mark.parametrize(("devices", "partition"), [(8, 1.61e9), (2, 6.44e9)])
def test_buffers_of_nvme_hold_the_largest_partition_and_all_that_is_used_at_once(
    published, devices, partition
):
    layouts = vss.layouts_of(published, Config(), "bf16", devices, devices, NVME)
    experts, everything = layouts[-2:]
    # Two fused tensors of experts a layer. In all of a layer: 2 x (5 of attention, 3 dense), 2 of experts;
    # the router is a buffer.
    for layout, tensors in ((experts, 2), (everything, 16 + 2)):
        offload = layout.config["zero_optimization"]["offload_param"]
        assert offload["device"] == "nvme" and offload["nvme_path"] == "nvme"
        assert published.largest / devices == pytest.approx(partition, rel=1e-3)
        assert offload["buffer_size"] >= partition and offload["buffer_count"] >= tensors
        pinned = offload["buffer_count"] * offload["buffer_size"] * 2 * devices / 1e9
        assert layout.host_gb == pytest.approx(pinned, rel=0.01) and pinned < 500
    small = experts.config["zero_optimization"]["stage3_param_persistence_threshold"]
    assert 131_072 * 6144 <= small < 512 * 2048 * 6144, (
        "all but experts stay: the embedding too is smaller than they"
    )
    assert experts.gpu_gb - everything.gpu_gb == pytest.approx(
        2 * (562.6 - 28 * 512 * 3 * 2048 * 6144 / 1e9), rel=0.01
    )
    like = next(layout for layout in layouts if layout.name == "ZeRO-3, all on CPU, checkpointing")
    assert like.config["zero_optimization"]["offload_param"]["device"] == "cpu", "not changed with it"


def test_between_machines_the_network_is_the_slowest_way(published):
    near, far = (
        next(
            x
            for x in vss.layouts_of(published, Config(), "bf16", 16, local)
            if x.name == "ZeRO-3, checkpointing"
        )
        for local in (16, 8)
    )
    weights = 2 * published.parameters
    assert vss.transfer_seconds(near, weights, 16, 16) == pytest.approx(
        3 * 1.125e12 * 15 / 16 / 350e9, rel=0.01
    )
    assert vss.transfer_seconds(far, weights, 16, 8) == pytest.approx(3 * 1.125e12 * 15 / 16 / 50e9, rel=0.01)


def test_speaking_is_planned_and_left_out_where_it_would_take_longer_than_learning(published, monkeypatch):
    """Half an hour for 10 s on 2 B200 with the weights in RAM, by the bandwidths that the plan assumes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    weights = 2 * published.parameters
    layout = next(
        x
        for x in vss.layouts_of(published, Config(), "bf16", 2, 2)
        if x.name == "ZeRO-3, all on CPU, checkpointing"
    )
    one = Config(eval_samples=2, max_reply=10.0)
    assert vss.speaking_seconds(one, layout, weights, 2, 2) / 3600 == pytest.approx(0.52, abs=0.02)
    assert vss.speaking_seconds(Config(), layout, weights, 2, 2) / 3600 == pytest.approx(4 * 1.56, abs=0.1)
    short, long = Config(steps=10, max_reply=10.0), Config(steps=1000, max_reply=10.0)
    aloud, told = vss.speaks(short, layout, weights)
    assert not aloud and "not spoken (2.1 h of speaking at least" in told and "lower --eval_samples" in told
    assert vss.speaks(long, layout, weights)[0]
    silent, told = vss.speaks(dataclasses.replace(long, speak=False), layout, weights)
    assert not silent and "lower" not in told


def test_machines_that_take_it_and_that_do_not(published):
    table, nearest = vss.machine_table(published, Config())
    lines = {name: line for line in table.splitlines() for name in vss.MACHINES if name in line}
    assert list(lines) == list(vss.MACHINES)
    for machine in ("8x H100 80 GB, 512 GB RAM", "2x B200 192 GB, 512 GB RAM"):
        assert "cannot hold the 1125 GB of weights in its RAM" in lines[machine]
    assert "on NVMe" in lines["2x B200 192 GB, 512 GB RAM"]
    for machine in ("8x H100 80 GB, 2 TB RAM", "2x B200 192 GB, 2 TB RAM", "8x H200 141 GB, 2 TB RAM"):
        assert "cannot" not in lines[machine] and "ZeRO-3, all on CPU, checkpointing" in lines[machine]
    assert "ZeRO-3, checkpointing" in lines["16x H200 141 GB, two machines"]
    assert nearest == "2x B200 192 GB, 2 TB RAM"


def test_activations_are_estimated_to_within_a_factor_of_two(net, base, cfg, clips):
    net = vss.with_adapter(copy.deepcopy(net), cfg, base).train()
    batch = vss.Collator(base, cfg)(clips)
    weights, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses, _ = net(**batch)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    supervised = int((batch["code_labels"] != -100).any(-1).sum(1).max())
    asked = dataclasses.replace(cfg, batch_size=3)
    sizes = vss.sizes_of(base, asked, "fp32", batch["ids"].shape[1], supervised)
    estimated = sizes.kept[False]
    assert losses.requires_grad and 0.5 < estimated / real < 2, (
        f"{estimated / 1e6:.2f} MB estimated, {real / 1e6:.2f} kept"
    )
