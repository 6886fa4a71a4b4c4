"""t2v_rflow.py on Wan: diffusers' transformer, VAE and UMT5, tiny ones of the same classes; what it leaves is loaded by diffusers."""

import json

import numpy as np
import pytest
import torch
from conftest import run, same
from safetensors.torch import load_file
from test_t2v_rflow import word_tokenizer

import t2v_rflow as rflow
from demos import shapes

SCRIPT = "t2v_rflow.py"
CAPTION = "a man flips pancake"
SIZE = "--resolution 32p --ratio 1:1 --frames 9 --sample_steps 2".split()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A pipeline in diffusers' layout, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers is"""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("wan") / "pipe"
    torch.manual_seed(0)
    tokenizer = word_tokenizer(folder / "tokenizer")
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=len(tokenizer))
    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=32, ffn_dim=64, num_layers=2
    )
    parts = UMT5EncoderModel(UMT5Config(**sizes)), AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    WanPipeline(tokenizer, *parts, FlowMatchEulerDiscreteScheduler(shift=3.0), net).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(pipe):
    """The folder of a run with LoRA, stopped once and gone on"""
    folder, rng, lines = pipe.parent, np.random.default_rng(0), ["path,text"]
    for i in range(12):
        clip = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8).repeat(10, 0)
        shapes.write_lossless(clip, folder / f"{i}.mkv", 16)
        lines.append(f"{i}.mkv,{CAPTION}")
    (folder / "clips.csv").write_text("\n".join(lines))
    (folder / "buckets.json").write_text('{"32p": {"9": [1, 4]}}')
    flags = f"--model {pipe} --manifest clips.csv --buckets buckets.json --lora_r 4 --lr 0.05 --log_every 1".split()
    for steps in (2, 4):
        output = run(SCRIPT, *flags, *SIZE, "--save_every", 2, "--steps", steps, cwd=folder)
    assert "resumed" in output and "Wan " in output and "predicted" not in output
    return folder / "runs" / "t2v_rflow"


def opened(source, pipe, **flags):
    cfg = rflow.Config(model=str(source), vae_model=str(pipe), text_model=str(pipe), **{**rflow.WAN, **flags})
    codec, text = (opens(cfg, torch.device("cpu")) for opens in (rflow.open_codec, rflow.open_text))
    return (*rflow.open_model(cfg.model, cfg, codec, text), codec, text)


def test_the_model_says_what_the_pipeline_says(pipe):
    """The clip less the noise is the other way round there; captions are padded with zeros, and none is ""."""
    from diffusers import WanPipeline

    net, config, _, text = opened(pipe, pipe)
    theirs = WanPipeline.from_pretrained(pipe)
    assert same(
        {name: value for name, value in net.state_dict().items() if name != "no_caption"},
        theirs.transformer.state_dict(),
    )
    x, t = torch.randn(2, 16, 3, 4, 4), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        asked, none = theirs.encode_prompt([CAPTION, "a man"], max_sequence_length=512)
        y, mask = rflow.padded(text.encode([f"  {CAPTION} ", "a  man"]))
        for drop, states in ((None, asked), (torch.tensor([True, False]), torch.stack([none[0], asked[1]]))):
            said = theirs.transformer(x, t, states, return_dict=False)[0]
            made = net(x, t, y, mask, torch.full((2,), 16.0), 32.0, None, drop)
            torch.testing.assert_close(made, -said, atol=2e-3, rtol=2e-3)  # states are kept in 16 bits
        odd = net(x[..., :3], t, y, mask, torch.full((2,), 16.0), 32.0)
    assert odd.shape == (2, 16, 3, 4, 3)
    half = rflow.plain_model(config, net.state_dict(), torch.device("cpu"), "bf16")
    assert (
        half.rope.freqs_cos.dtype == net.rope.freqs_cos.dtype != half.proj_out.weight.dtype == torch.bfloat16
    )
    assert torch.equal(half.rope.freqs_cos, theirs.transformer.rope.freqs_cos)


def test_frames_that_are_given_have_time_0(pipe):
    net, *_, text = opened(pipe, pipe, mask_share=0.5)
    y, mask = rflow.padded(text.encode([CAPTION]))
    x, t, rest = torch.randn(1, 16, 3, 4, 4), torch.tensor([700.0]), (y, mask, torch.tensor([16.0]), 32.0)
    with torch.no_grad():
        plain, whole = net(x, t, *rest), net(x, t, *rest, torch.ones(1, 3, dtype=torch.bool))
        torch.testing.assert_close(whole, plain, atol=1e-5, rtol=1e-5)
        first = net(x, t, *rest, torch.tensor([[False, True, True]]))
        all_given = net(x, t, *rest, torch.zeros(1, 3, dtype=torch.bool))
        torch.testing.assert_close(all_given, net(x, 0 * t, *rest), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(first, plain, atol=1e-3)
        net.gives_frames = False  # as its weights were trained
        assert torch.equal(net(x, t, *rest, torch.tensor([[False, True, True]])), plain)


def test_a_layer_is_called_twice_when_it_is_checkpointed(pipe):
    net, *_, text = opened(pipe, pipe)
    y, mask = rflow.padded(text.encode([CAPTION]))
    batch = torch.randn(1, 16, 3, 4, 4), torch.tensor([700.0]), y, mask, torch.tensor([16.0]), 32.0
    for on, calls in ((False, 1), (True, 2)):
        net.train().checkpointing, seen = on, []
        hook = net.blocks[0].ffn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        net(*batch).square().mean().backward()
        hook.remove()
        assert len(seen) == calls


def test_diffusers_loads_the_adapter_and_the_merged_weights(pipe, trained):
    from diffusers import WanPipeline, WanTransformer3DModel

    base, merged = (
        WanTransformer3DModel.from_pretrained(folder / "transformer") for folder in (pipe, trained / "model")
    )
    with_adapter = WanPipeline.from_pretrained(pipe)
    with_adapter.load_lora_weights(trained / "model")
    x, t, y = torch.randn(1, 16, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 32)
    with torch.no_grad():
        one, two, before = (
            model(x, t, y, return_dict=False)[0] for model in (merged, with_adapter.transformer, base)
        )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert (one - before).abs().max() > 1e-3
    kept = load_file(trained / "checkpoints" / "step_000004" / "ema.safetensors")
    assert kept and all(".lora_" in name for name in kept)
    config = json.loads((trained / "model" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel" and "caption_length" not in config


def test_it_is_sampled_watched_and_trained_on(pipe, trained, monkeypatch):
    folder = pipe.parent
    clip = rflow.generate(CAPTION, trained / "model", sample_steps=1)
    assert clip.shape == (9, 32, 32, 3)
    run(SCRIPT, "--model", trained / "model", "--prompt", CAPTION, "--sample_steps", 1, cwd=folder)
    assert list((folder / "runs" / "t2v_rflow" / "samples").glob("*flips*.mp4"))
    rflow.watch(rflow.Config(watch=trained, report_to="none"))
    assert (trained / "samples" / "step_000004.mp4").stat().st_size > 200
    flags = "--buckets buckets.json --output_dir more --cache latents".split()
    run(
        SCRIPT,
        "--model",
        trained / "model",
        "--manifest",
        "clips.csv",
        *flags,
        *SIZE,
        "--steps",
        1,
        cwd=folder,
    )
    assert not (folder / "more" / "model" / "pytorch_lora_weights.safetensors").exists()
    # the cache is enough: of the data neither the table nor the videos are left
    for path in [folder / "clips.csv", *folder.glob("*.mkv")]:
        path.unlink()
    output = run(SCRIPT, "--model", trained / "model", *flags, *SIZE, "--steps", 2, cwd=folder)
    assert "resumed" in output and "clips.csv: 12 clips to train on" in output
    (folder / "latents" / "rows" / "filled.json").unlink()
    output = run(SCRIPT, "--model", trained / "model", *flags, *SIZE, "--steps", 3, cwd=folder, expect=2)
    assert "--manifest: a table of videos" in output and "Traceback" not in output


def test_another_transformer_is_refused(pipe, tmp_path, capsys):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    with pytest.raises(SystemExit) as stop:
        opened(tmp_path, pipe)
    assert stop.value.code == 2 and "CogVideoXTransformer3DModel; Wan's is known" in capsys.readouterr().err
