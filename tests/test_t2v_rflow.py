"""t2v_rflow.py as its user runs it: demo made short, killed and resumed, ranks in different buckets, LoRA, real clips, bad input.

What it shares with t2v_ddpm.py to the letter (signals, full disks, launchers, the Hub's errors) is tested there.
"""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY_VAE,
    command,
    environment,
    finish,
    hub_variables,
    losses,
    run,
    same,
    save_vae,
    start,
    unbroken_runs,
    wait_for,
    weights,
)
from hub import WRITE
from safetensors.torch import load_file

import common
import t2v_rflow as rflow
from demos import shapes

SCRIPT = "t2v_rflow.py"
TINY = "--demo --depth 1 --width 32 --heads 2 --sample_steps 1 --log_every 1 --save_every 2 --eval_every 4".split()
CLIPS = ROOT.parent / "shared" / "clips"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs of 6 steps"""
    return unbroken_runs(
        tmp_path_factory, SCRIPT, lambda ranks, folder: [*TINY, "--steps", 6, "--output_dir", folder]
    )


# --- A run


def test_run_folder_push_and_use(tmp_path, hub, monkeypatch):
    variables = hub_variables(hub, tmp_path)
    output = run(SCRIPT, *TINY, "--steps", 6, "--average", 2, "--push_to_hub", cwd=tmp_path, **variables)
    folder = tmp_path / "runs" / "t2v_rflow_demo"
    names = {path.name for path in folder.iterdir()}
    assert names >= set("config.json environment.json t2v_rflow.py metrics.jsonl loss.png results.json bad_samples.jsonl SUCCESS "
                        "deepspeed.json samples checkpoints model".split())  # fmt: skip
    assert re.search(r"^16p +6 +\d+ +\d+ +5$", output, re.M) and "auto takes this" in output, (
        "buckets in the plan"
    )
    assert "eval step 000004 | loss" in output and "averaging | " in output and "captions_shuffled" in output
    assert "Warning" not in output and "WARNING" not in output, output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0].keys() >= set(
        "step loss lr grad_norm weight_norm samples_per_s tokens_per_s_per_gpu straggler".split()
    )
    assert {key for row in rows for key in row} >= {
        f"held_out_{size}_{frames}" for size in ("12p", "16p") for frames in (4, 6)
    }
    results = json.loads((folder / "results.json").read_text())
    tables = results["tables"]
    assert tables["asked is made"].keys() == {"12p_4", "12p_6", "16p_4", "16p_6", "mean"}
    assert tables["bucket"].keys() == {"12p_4", "12p_6", "16p_4", "16p_6"}
    tried = {name: row["held-out loss"] for name, row in tables["averaging"].items()}
    assert set(tried) == {
        "weights",
        "average",
        *(f"{what}, mean of 2 checkpoints" for what in ("weights", "average")),
    }
    assert results["held_out_loss"] == min(tried.values()), "the best of them is exported"

    # what is pushed is model/, whose card's snippet makes a clip
    pushed = hub.files("tester/t2v_rflow")
    assert {p.name: p.read_bytes() for p in (folder / "model").iterdir()} == {
        k: v for k, v in pushed.items() if k[0] != "."
    }
    assert not any(WRITE.encode() in data for data in hub.blobs.values()) and WRITE not in output
    (snippet,) = re.findall(r"```python\n(.*?)```", pushed["README.md"].decode(), re.S)
    out = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment(**variables), capture_output=True
    )
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "sample.mp4").stat().st_size > 200

    # --image and --extend begin with what they are given; --watch makes clips of the checkpoints and ends with the run
    monkeypatch.chdir(tmp_path)
    clip = rflow.generate("a large red square moving left quickly", folder / "model", sample_steps=1)
    assert clip.shape == (6, 16, 16, 3)
    shapes.write_lossless(np.full((5, 16, 16, 3), 200, np.uint8), tmp_path / "grey.mkv", 8)
    made = rflow.generate(
        "a small red beam moving up slowly", folder / "model", extend=tmp_path / "grey.mkv", sample_steps=1
    )
    assert (made[:3] == 200).all() and (made[3:] != 200).any()
    from PIL import Image

    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "first.png")
    made = rflow.generate(
        "a small red beam moving up slowly", folder / "model", image=tmp_path / "first.png", sample_steps=1
    )
    assert (made[0] == 90).all() and (made[1:] != 90).any()
    rflow.watch(rflow.Config(watch=folder, report_to="none"))
    for step in ("step_000002", "step_000004", "step_000006"):
        assert (folder / "samples" / f"{step}.mp4").stat().st_size > 200, step
    assert same(weights(folder), load_file(folder / "model" / "model.safetensors"))

    # the same command again does no work twice
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    again = run(SCRIPT, *TINY, "--steps", 6, "--average", 2, cwd=tmp_path)
    assert "resumed" in again and "step 0000" not in again.replace("step_0000", "")
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_lora_on_a_model_of_a_run(tmp_path, unbroken):
    """The adapter alone is trained and saved; what is exported has the names of a plain model and, resumed, the same weights."""
    flags = [
        "--model",
        unbroken(1) / "model",
        "--lora_r",
        2,
        "--mask_share",
        0.5,
        "--lr",
        0.01,
        "--warmup_steps",
        0,
    ]
    flags += ["--no_lr_decay", "--output_dir", "run"]
    done = []
    for steps in (4, 4):
        output = run(SCRIPT, *TINY, *flags, "--steps", steps, cwd=tmp_path)
        done.append(weights(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run" / "model")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004", ignore_errors=True)
    assert "step_000002" in output and "step 000003 | loss" in output, "gone on with from there"
    base = weights(unbroken(1))
    assert done[0].keys() == base.keys() and same(*done)
    changed = {name for name in base if not torch.equal(base[name], done[0][name])}
    assert changed and all("blocks" in name and name.endswith("weight") for name in changed)


# --- Nothing is lost


def test_another_number_of_ranks_goes_on_with_weights_and_averages(tmp_path, unbroken):
    flags = [
        *TINY,
        "--output_dir",
        tmp_path / "run",
        "--no_lr_decay",
        "--lr",
        1e-9,
        "--warmup_steps",
        0,
        "--ema",
        0.5,
    ]
    run(SCRIPT, *flags, "--steps", 2, cwd=tmp_path, ranks=2)
    output = run(SCRIPT, *flags, "--steps", 4, cwd=tmp_path, ranks=1)
    assert "step_000002, saved by another number of ranks" in output
    old, new = (
        load_file(tmp_path / "run" / "checkpoints" / f"step_00000{n}" / "ema.safetensors") for n in (2, 4)
    )
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)


@pytest.mark.demo
def test_bf16_under_zero3_with_offload_and_accumulation(tmp_path):
    flags = [
        *TINY,
        "--steps",
        4,
        "--dtype",
        "bf16",
        "--accum",
        2,
        "--deepspeed",
        ROOT / "ds_zero3_offload.json",
    ]
    run(SCRIPT, *flags, "--average", 2, cwd=tmp_path, ranks=2)
    folder = tmp_path / "runs" / "t2v_rflow_demo"
    assert len(json.loads((folder / "results.json").read_text())["tables"]["averaging"]) == 4
    assert all(value.isfinite().all() for value in weights(folder).values()) and losses(folder)[-1][0] == 4


# Started on each rank: a run that keeps what this rank holds at the end.
KEEPS = """
import sys, runpy
sys.path.insert(0, sys.argv[1])
import torch, t2v_rflow as rflow
real, buckets, get = rflow.whole_weights, [], rflow.training_loss

def whole(engine):
    torch.save({"weights": engine.module.state_dict(), "buckets": buckets}, f"rank{rflow.rank()}.pt")
    return real(engine)

def loss(model, x, batch, *rest):
    buckets.append(batch["bucket"].frames)
    return get(model, x, batch, *rest)

rflow.whole_weights, rflow.training_loss = whole, loss
sys.argv = [rflow.__file__, *sys.argv[2:]]
rflow.run(rflow.main)
"""


def test_one_rank_on_images_while_the_other_is_on_videos(tmp_path):
    """No hang, though an image has nothing to attend to in time; and both hold the same weights afterwards."""
    from PIL import Image

    rng, lines = np.random.default_rng(0), ["path,text"]
    for number in range(16):  # 3 batches of images, 5 of clips: one step of two has to have both
        clip = rng.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
        name = f"{number}.{'png' if number < 6 else 'mkv'}"
        Image.fromarray(clip[0]).save(tmp_path / name) if number < 6 else shapes.write_lossless(
            clip, tmp_path / name, 8
        )
        lines.append(f"{name},clip {number}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    (tmp_path / "buckets.json").write_text(json.dumps({"12p": {"1": [1, 2], "4": [1, 2]}}))
    (tmp_path / "keeps.py").write_text(KEEPS)
    flags = "--model scratch --vae pixels --text words --depth 1 --width 32 --heads 2 --mask_share 0 --steps 4 --log_every 1 "
    flags += "--manifest clips.csv --buckets buckets.json --stage demo --sample_steps 1 --resolution 12p --ratio 1:1 --frames 4"
    arguments = command(tmp_path / "keeps.py", ROOT, *flags.split(), "--seed", 1, ranks=2)
    code, output = finish(start(arguments, tmp_path), timeout=200)
    assert code == 0, output
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(a != b for a, b in zip(one["buckets"], two["buckets"])), (
        "some step has an image on one rank, a clip on the other"
    )
    assert same(one["weights"], two["weights"])


def test_a_clip_that_breaks_ends_no_run_and_may_be_removed_or_repaired(tmp_path):
    """Its row says all, so that it is opened in the step; the same command goes on without it, and with it mended."""
    rng, lines = np.random.default_rng(0), ["path,text,num_frames,height,width,fps"]
    for number in range(6):
        clip = rng.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
        shapes.write_lossless(clip, tmp_path / f"{number}.mkv", 8)
        lines.append(f"{number}.mkv,clip {number},6,12,12,8")
    whole = (tmp_path / "3.mkv").read_bytes()
    (tmp_path / "3.mkv").write_bytes(whole[:300])
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    (tmp_path / "buckets.json").write_text(json.dumps({"12p": {"4": [1, 6]}}))
    flags = "--model scratch --vae pixels --text words --depth 1 --width 32 --heads 2 --stage demo --sample_steps 1 "
    flags += "--manifest clips.csv --buckets buckets.json --resolution 12p --ratio 1:1 --frames 4 --save_every 1 --steps"
    output = run(SCRIPT, *flags.split(), 2, cwd=tmp_path)
    assert output.count("3.mkv") >= 1 and "another clip takes its place" in output
    marker = tmp_path / "runs" / "t2v_rflow" / "checkpoints" / "step_000002" / "checkpoint.json"
    assert json.loads(marker.read_text())["unread"] == rflow.unread_names([{"video": "x/3.mkv"}])
    (tmp_path / "clips.csv").write_text("\n".join(lines[:4] + lines[5:]))
    assert "resumed" in run(SCRIPT, *flags.split(), 3, cwd=tmp_path)
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    (tmp_path / "3.mkv").write_bytes(whole)
    assert "resumed" in run(SCRIPT, *flags.split(), 4, cwd=tmp_path)
    (tmp_path / "clips.csv").write_text("\n".join([*lines[:2], *lines[3:]]))
    assert "was trained on other data" in run(SCRIPT, *flags.split(), 5, cwd=tmp_path, expect=2)


# --- Real clips


def word_tokenizer(folder: Path):
    """Saved there: a token for each of these words"""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "<pad> </s> <unk> a man flips pancake aesthetic score : camera motion pan left".split()
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bare.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Tiny T5 and VAE in the published files, and a CSV with what people's have: no sizes, scores, a file that is no video; a
    table of short buckets."""
    folder = tmp_path_factory.mktemp("real")
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer(folder / "t5")
    sizes = dict(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder / "t5")
    save_vae(rflow.OpenSoraVAE(**TINY_VAE), folder / "vae")
    rows = [
        (path.resolve(), "a man flips a pancake", 5.5, "pan_left")
        for path in sorted(CLIPS.iterdir())
        if path.suffix in common.VIDEO_SUFFIXES
    ]
    (folder / "page.mp4").write_text("<html>404</html>")
    rows.append((folder / "page.mp4", "a cat", 4.0, ""))
    buckets = {"64p": {"1": [1.0, 99], "51": [1.0, 9]}}
    (folder / "buckets.json").write_text(json.dumps(buckets))
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "aes", "cmotion"), *rows])
    return folder


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips here")
def test_real_clips_through_csv_buckets_and_cache(tmp_path, real):
    flags = f"--manifest {real / 'clips.csv'} --model scratch --depth 1 --width 32 --heads 2 --buckets {real / 'buckets.json'} --tokens_per_gpu 2500 "
    flags += f"--vae_model {real / 'vae'} --text_model {real / 't5'} --cache latents --max_bad 0.4 --steps 2 --sample_steps 1 "
    flags += "--resolution 64p --ratio 1:1 --frames 17 --gradient_checkpointing off --log_every 1"
    checked = run(SCRIPT, *flags.split(), "--check", cwd=tmp_path)
    assert "auto takes this" in checked and re.search(r"^64p +51 ", checked, re.M)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "latents").exists()
    output = run(SCRIPT, *flags.split(), cwd=tmp_path)
    folder = tmp_path / "runs" / "t2v_rflow"
    (bad,) = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert "page.mp4" in bad["video"] and "page.mp4" in output
    latents = [np.load(path) for path in (tmp_path / "latents").rglob("latents/*/*.npy")]
    assert latents and all(x.shape[:2] == (4, 15) for x in latents), "51 frames"
    assert (folder / "model" / "samples.mp4").stat().st_size > 200
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.npy")}
    run(SCRIPT, *flags.split(), "--output_dir", "again", cwd=tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.npy")}, (
        "encoded once"
    )
    assert same(weights(folder), weights(tmp_path / "again"))


# --- Bad input


def clips_of(folder: Path, lines: list[str]) -> Path:
    """clips.csv: i.mp4, which is empty for its row says all, and the rest of its line"""
    for i in range(len(lines)):
        (folder / f"{i}.mp4").touch()
    rows = [f"{i}.mp4,{line}" for i, line in enumerate(lines)]
    (folder / "clips.csv").write_text("\n".join(["path,text,num_frames,height,width,fps", *rows]))
    return folder / "clips.csv"


def refused(capsys, call) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return "".join(capsys.readouterr())


def test_bad_input_ends_with_2(tmp_path, capsys, unbroken):
    cfg = rflow.Config(manifest=clips_of(tmp_path, ["a clip,5,12,12,8"] * 4), cache_dir=tmp_path)
    table = rflow.load_data(cfg).table
    told = refused(capsys, lambda: rflow.plan_epoch(table, rflow.BUCKETS["2"], 0, 0, 1))
    assert re.search(r"no batch to train on: of 4 clips\n.*too small +4\n", told, re.S), told
    told = refused(capsys, lambda: rflow.plan_epoch(table, rflow.BUCKETS["demo"], 0, 0, 9))
    assert "1 batches for 9 ranks" in told and "take 1 GPUs at most" in told

    cfg = rflow.Config(demo=True, vae="pixels", text="words")
    told = refused(
        capsys,
        lambda: rflow.open_model(
            str(unbroken(1) / "model"), cfg, rflow.OpenSoraVAE(32, 1, (32,) * 4, 1), rflow.Words()
        ),
    )
    assert "takes latents of 3 channels" in told and "--vae pixels has 4" in told
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((unbroken(1) / "model" / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 2}))
    told = refused(capsys, lambda: rflow.open_model(str(tmp_path), cfg, rflow.Pixels(), rflow.Words()))
    assert "17 weights" in told or "34 weights" in told

    from PIL import Image

    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(common.BadSample, match="is an image; give it as --image"):
        rflow.condition(tmp_path / "x.png", True, rflow.Bucket("12p", 4, "1:1", 1), rflow.Pixels(), 0)
    (tmp_path / "x.json").write_text('{"240p": 3}')
    assert '"240p"' in refused(capsys, lambda: rflow.read_buckets(tmp_path / "x.json"))


def test_check_of_the_published_sizes(tmp_path, monkeypatch):
    """Without the weights: what a machine needs, from the configurations alone."""
    from transformers import T5Config

    for name, config in (("model", {}), ("vae", {"micro_frame_size": 17})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    word_tokenizer(tmp_path / "t5")
    sizes = dict(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        vocab_size=14,
    )
    T5Config(**sizes).save_pretrained(tmp_path / "t5")
    clips_of(tmp_path, [f"a clip,{60 + i},720,1280,24" for i in range(4000)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "memory_here", lambda: (85.0, 500.0))
    for module in (common, rflow):
        monkeypatch.setattr(module, "disk_free", lambda folder: 10**12)
    shown: list[str] = []
    monkeypatch.setattr(rflow.log, "info", shown.append)
    cfg = rflow.Config(
        check=True,
        manifest=Path("clips.csv"),
        model="model",
        vae_model="vae",
        text_model="t5",
        dtype="bf16",
        steps=1,
    )

    def plan(**flags) -> str:
        shown.clear()
        rflow.train(dataclasses.replace(cfg, **flags))
        return "\n".join(shown)

    def needed(plan: str) -> float:
        return float(re.search(r"ZeRO-2, checkpointing +([\d.]+) GB per GPU", plan)[1])

    whole = plan(cache=Path("latents"))
    assert "1207.64 M parameters, 1201.60 M trained" in whole and re.search(r"240p +51 ", whole)
    cached, lora = needed(whole), needed(plan(lora_r=16))
    assert 40 < cached < 65, (
        "2 + 2 + 12 + 4 bytes a parameter, and about 30 GB of activations at 110,000 tokens"
    )
    assert lora > 10, "T5 and VAE are on the GPU without a cache"


def test_a_broken_file_in_the_cache_is_named(tmp_path, unbroken):
    shutil.copytree(unbroken(1), tmp_path / "run")
    latents = next(path for path in unbroken(1).parent.rglob("latents/*/*.npy"))
    whole = latents.read_bytes()
    latents.write_bytes(whole[:-20])
    try:
        flags = [*TINY, "--steps", 6, "--output_dir", tmp_path / "run"]
        output = run(SCRIPT, *flags, cwd=unbroken(1).parent, expect=2)
    finally:
        latents.write_bytes(whole)
    assert f"{latents.relative_to(unbroken(1).parent)} is not what an earlier run wrote there" in output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--buckets", "other.json"], "was saved with buckets"),
        (["--cache", "None"], "was saved with cached True, this run has False"),
        (["--tokens_per_gpu", "200000"], "tokens_per_gpu: 110000 there, 200000 here (it may only go down)"),
    ],
)
def test_what_makes_another_run_is_refused(tmp_path, unbroken, flags, said):
    shutil.copytree(unbroken(1), tmp_path / "run")
    buckets = {"12p": {"4": [1, 12], "6": [1, 8]}, "16p": {"4": [1, 7], "6": [1, 4]}}
    (tmp_path / "other.json").write_text(json.dumps(buckets))
    output = run(SCRIPT, *TINY, "--steps", 6, "--output_dir", "run", *flags, cwd=tmp_path, expect=2)
    assert said in output and "Traceback" not in output


def test_a_signal_ends_the_filling_of_the_cache_which_goes_on(tmp_path):
    """Within seconds, and what was encoded before is not encoded again."""
    flags = [*TINY, "--steps", 30, "--num_workers", 1, "--output_dir", tmp_path / "run"]
    encoded = tmp_path / "cache" / "t2v_rflow_demo_latents" / "latents"
    process = start(command(SCRIPT, *flags), tmp_path)
    wait_for(lambda: len(list(encoded.rglob("*.npy"))) > 5 or process.poll() is not None, what="5 clips")
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, timeout=20)
    assert code == 143, output
    before = {path: path.stat().st_mtime_ns for path in encoded.rglob("*.npy")}
    assert 5 < len(before) < 3000
    run(SCRIPT, *flags, "--save_every", 100, cwd=tmp_path)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in encoded.rglob("*.npy")}.items()


def test_a_signal_ends_watching(tmp_path, unbroken):
    shutil.copytree(unbroken(1), tmp_path / "run")
    (tmp_path / "run" / "SUCCESS").unlink()
    process = start(command(SCRIPT, "--watch", tmp_path / "run", "--report_to", "none"), tmp_path)
    last = tmp_path / "run" / "samples" / "step_000006.png"
    wait_for(lambda: last.exists() or process.poll() is not None, what="samples of the last step")
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, timeout=10)
    assert code == 143 and "Traceback" not in output, output


def test_flags_that_cannot_be(monkeypatch, capsys):
    for flags, told in (
        (["--width", "50"], "multiple of 4 x --heads"),
        (["--image", "x.png"], "need --prompt"),
        (["--resolution", "huge"], "a side in pixels and p"),
        (["--ratio", "7:5"], "aspect ratio 7:5"),
    ):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
        with pytest.raises(SystemExit) as stop:
            rflow.main()
        assert stop.value.code == 2 and told in re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))


def test_a_recipe_sets_what_flags_do_not(monkeypatch):
    taken = []
    monkeypatch.setattr(rflow, "train", taken.append)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--recipe", "speed", "--stage", "3", "--warmup_steps", "7"])
    rflow.main()
    assert (taken[0].lr, taken[0].epochs, taken[0].warmup_steps, taken[0].stage) == (2e-4, 5, 7, "3")


# --- The demo itself


@pytest.mark.demo
def test_demo_learns(tmp_path):
    code, output = finish(
        start(command(SCRIPT, "--demo"), tmp_path, OMP_NUM_THREADS=os.cpu_count()), timeout=1800
    )
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "t2v_rflow_demo" / "results.json").read_text())
    right = results["tables"]["asked is made"]
    assert results["score"] >= 0.9 and right["mean"]["move"] >= 0.95
    assert results["controls"]["captions_shuffled"] <= 0.05
    assert all(row["all_five"] >= 0.8 for row in right.values()), "in each bucket"
