"""longcat_vss.py as its user runs it: folders of video and speech, LoRA on a tiny model in the real files,
kill, resume, Hub."""

import json
import shutil
import signal
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    command,
    environment,
    finish,
    hub_variables,
    losses,
    read,
    run,
    start,
    unbroken_runs,
    wait_for,
    weights,
)

import longcat_vss
from demos import speech

SCRIPT = "longcat_vss.py"
ZERO3 = ROOT / "ds_zero3_offload.json"
SHARED = Path(__file__).parents[2] / "shared" / "clips"
# A run of seconds; flags after these win.
SMALL = "--size 56 --max_reply 1 --steps 6 --accum 2 --lr 1e-2 --warmup_steps 1 --log_every 1 --save_every 2".split()
SMALL += "--eval_every 4 --eval_samples 2 --repetition_penalty 1".split()
TINY_DEMO = "--demo --steps 4 --log_every 1 --save_every 2 --eval_every 2 --eval_samples 4".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "omni"
    speech.build_tiny(folder, 0, longcat_vss)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """data/train/01 to 08 and data/test/01 to 02, each in.mp4, in.wav, out.wav and out.txt"""
    folder = tmp_path_factory.mktemp("samples") / "data"
    for number in range(8):
        speech.make_clip(
            folder / "train" / f"{number + 1:02d}", number, False, False, 0, longcat_vss.write_wav
        )
    for number in range(2):
        speech.make_clip(folder / "test" / f"{number + 1:02d}", number, True, False, 0, longcat_vss.write_wav)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny, samples):
    """Two ranks under ZeRO-3 with CPU offload"""
    return unbroken_runs(tmp_path_factory, SCRIPT, lambda ranks, folder: flags(ranks, tiny, samples, folder))


def flags(ranks: int, model: Path, data: Path, output: Path) -> list:
    zero3 = ["--deepspeed", ZERO3] if ranks == 2 else []
    return ["--model", model, "--data_dir", data, *SMALL, "--output_dir", output, *zero3]


def adapter(folder: Path) -> dict:
    return weights(folder, "adapter_model.safetensors")


# --- A run


def test_the_demo_trains_a_base_and_adapts_it(tmp_path):
    output = run(SCRIPT, *TINY_DEMO, cwd=tmp_path)
    folder = tmp_path / "runs" / "longcat_vss_demo"
    names = {path.name for path in folder.iterdir()}
    assert names >= set("config.json environment.json longcat_vss.py metrics.jsonl loss.png results.json bad_samples.jsonl "
                        "SUCCESS deepspeed.json samples checkpoints model lora".split())  # fmt: skip
    assert (
        output.startswith("Model weights: ") and "eval step 000002" in output and "Warning" not in output
    ), output
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["score"] <= 1 and set(results["controls"]) == {"video_blanked", "audio_silenced"}
    tables = results["tables"]
    assert set(tables["new words and voice"]) == {"before LoRA", "after LoRA"}
    given = tables["given the reply so far"]
    assert set(given["accuracy, semantic"]) == {*longcat_vss.SHOWN, "training mean"}
    assert {"recognised", "stoi", "duration error"} <= set(tables["spoken"])
    assert (folder / "lora" / "model" / "adapter_config.json").exists()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert row.keys() >= {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "samples_per_s",
        "semantic_accuracy",
        "acoustic_3_loss",
        "text_loss",
    }
    shown = [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == 4
    for row in shown:
        path = folder / "samples" / row["clip"].replace("/", "_")
        assert path.with_suffix(".png").stat().st_size > 1000
        with wave.open(str(path.with_suffix(".wav"))) as file:
            assert file.getframerate() == 16_000 and file.getnframes() == round(row["seconds"] * 16_000)
    # the same command again does no work twice, and the whole model that was trained speaks
    before = (folder / "lora" / "model" / "adapter_model.safetensors").stat().st_mtime_ns
    again = run(SCRIPT, *TINY_DEMO, cwd=tmp_path)
    assert again.count("resumed") == 2 and "| loss " not in again
    assert (folder / "lora" / "model" / "adapter_model.safetensors").stat().st_mtime_ns == before
    clip = next(tmp_path.glob("cache/longcat_vss_demo_*_base_*/test/001"))
    said = run(
        SCRIPT, "--predict", clip / "in.mp4", clip / "in.wav", "--model", folder / "model", cwd=tmp_path
    )
    assert "out.wav: " in said and (tmp_path / "out.wav").exists()


def test_check_starts_with_the_storage_check_and_trains_nothing(tmp_path, tiny, samples):
    output = run(SCRIPT, "--check", "--model", tiny, "--data_dir", samples, "--size", 56, cwd=tmp_path)
    lines = output.splitlines()
    assert (
        lines[0].startswith("Model weights: ")
        and lines[1].startswith("Available space: ")
        and lines[2] == "Status: OK"
    )
    assert (
        lines[3] == "shards   3 of 3 are there"
        and "8 clips to train on, 2 held out" in output
        and "auto takes this" in output
    )
    assert not (tmp_path / "runs").exists()
    output = run(
        SCRIPT,
        "--check",
        "--model",
        tiny,
        "--data_dir",
        samples / "test" / "01",
        "--size",
        56,
        cwd=tmp_path,
        expect=2,
    )
    assert (
        "no sample folders" in output
        and "the plan is for clips of 10 s" in output
        and "auto takes this" in output
    )


def test_check_of_the_published_sizes_says_what_cannot_hold_them_and_what_can(tmp_path, hub):
    output = run(SCRIPT, "--check", cwd=tmp_path, expect=2, **hub_variables(hub, tmp_path))
    lines = output.splitlines()
    assert (
        lines[0] == "Model weights: 1.1 TB"
        and lines[1].startswith("Available space: ")
        and lines[2].startswith("Status: ")
    )
    machines = dict(line.strip().split("  ", 1) for line in lines if line.startswith(("  8x", "  2x")))
    for machine in ("8x H100 80 GB, 512 GB RAM", "2x B200 192 GB, 512 GB RAM"):
        assert "cannot hold the 1125 GB of weights in its RAM" in machines[machine]
    assert (
        "all on CPU" in machines["8x H100 80 GB, 2 TB RAM"]
        and "8 s a micro-step" in machines["8x H100 80 GB, 2 TB RAM"]
    )
    assert (
        "the nearest machine that would do: 2x B200 192 GB, 2 TB RAM" in output
        and "26.64 M trained" in output
    )


@pytest.mark.demo
def test_sixty_micro_steps_of_two_ranks_with_zero3_offload_are_those_of_one(tmp_path, tiny, samples):
    more = ["--steps", 30, "--lr", 1e-3, "--lora_dropout", 0, "--eval_samples", 0]
    common = ["--model", tiny, "--data_dir", samples, *SMALL, *more]
    run(SCRIPT, *common, "--deepspeed", ZERO3, "--output_dir", tmp_path / "two", cwd=tmp_path, ranks=2)
    run(SCRIPT, *common, "--batch_size", 2, "--output_dir", tmp_path / "one", cwd=tmp_path)
    two, one = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("two", "one"))
    assert len(two) == 30 and two[:10] == pytest.approx(one[:10], rel=1e-4)
    assert two == pytest.approx(one, rel=0.05) and two[-1] < two[0], (
        "later the last digits choose other experts"
    )
    used = json.loads((tmp_path / "two" / "deepspeed.json").read_text())["zero_optimization"]
    assert used["stage"] == 3 and used["offload_param"]["device"] == "cpu"
    ours, theirs = adapter(tmp_path / "two"), adapter(tmp_path / "one")
    assert ours.keys() == theirs.keys() and all(np.allclose(ours[k], theirs[k], atol=0.02) for k in ours)


def test_bf16_with_checkpointing_trains(tmp_path, tiny, samples):
    more = ["--dtype", "bf16", "--gradient_checkpointing", "on", "--steps", 2, "--eval_samples", 0]
    run(
        SCRIPT,
        "--model",
        tiny,
        "--data_dir",
        samples,
        *SMALL,
        *more,
        "--output_dir",
        tmp_path / "run",
        cwd=tmp_path,
    )
    assert {str(value.dtype) for value in adapter(tmp_path / "run").values()} == {"torch.bfloat16"}


# two: the base in two parts in RAM
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.demo)])
def test_what_was_trained_speaks_the_same_when_it_is_loaded_again(ranks, tmp_path, unbroken, samples):
    clip = samples / "test" / "01"
    spoken = ["--predict", clip / "in.mp4", clip / "in.wav", "--model", unbroken(2) / "model"]
    zero3 = ["--deepspeed", ZERO3] if ranks == 2 else []
    run(SCRIPT, *spoken, "--out", "said.wav", *zero3, cwd=tmp_path, ranks=ranks)
    wanted = unbroken(2) / "samples" / "test_01.wav"
    assert (tmp_path / "said.wav").read_bytes() == wanted.read_bytes()


def test_a_real_clip_with_its_own_sound(tmp_path, tiny, samples):
    if not (SHARED / "mmaction2_test.mp4").exists():
        pytest.skip("the shared clips are not here")
    for name, clip in (("01", "mmaction2_test.mp4"), ("02", "askanything_yoga.mp4")):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(SHARED / clip, tmp_path / "data" / name / "in.mp4")
        shutil.copy(samples / "train" / "01" / "out.wav", tmp_path / "data" / name)
        if not sound(SHARED / clip):
            shutil.copy(samples / "train" / "01" / "in.wav", tmp_path / "data" / name)
    more = ["--steps", 2, "--eval_samples", 0]
    output = run(SCRIPT, "--model", tiny, *SMALL, *more, cwd=tmp_path, expect=2)
    assert "the codec needs" in output, "two short replies are not enough to fit one on"
    for number in range(3, 12):
        shutil.copytree(samples / "train" / "02", tmp_path / "data" / f"{number:02d}")
    output = run(SCRIPT, "--model", tiny, *SMALL, *more, cwd=tmp_path)
    assert (
        "10 clips to train on, 1 held out" in output and "9 of 11 clips have an out.txt: without it" in output
    )


def sound(path: Path) -> bool:
    import av

    with av.open(str(path)) as container:
        return bool(container.streams.audio)


# --- Nothing is lost


def test_sigterm_saves_and_another_number_of_ranks_goes_on(tmp_path, unbroken, tiny, samples):
    given = flags(1, tiny, samples, tmp_path / "run")
    process = start(command(SCRIPT, *given), tmp_path)
    wait_for(lambda: '"step": 3' in read(tmp_path / "run" / "metrics.jsonl"), what="step 3")
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 143 and "the same command goes on from there" in output, output
    refusal = run(SCRIPT, *given, "--accum", 3, cwd=tmp_path, expect=2)
    assert "accum: 2 there, 3 here (it may only go down)" in refusal
    assert "saved by another number of ranks" in run(SCRIPT, *given, cwd=tmp_path, ranks=2)
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.demo
def test_the_data_may_lie_elsewhere_but_be_no_others(tmp_path, unbroken, tiny, samples):
    shutil.copytree(unbroken(1), tmp_path / "run")
    data = shutil.copytree(samples, tmp_path / "elsewhere")
    given = flags(1, tiny, data, tmp_path / "run")
    output = run(SCRIPT, *given, cwd=tmp_path)
    assert "data_dir: " in output and "resumed" in output
    (data / "train" / "03" / "out.txt").write_text("seta samu")
    assert "was trained on other data" in run(SCRIPT, *given, cwd=tmp_path, expect=2)


# --- Hub


def test_the_adapter_is_pushed_and_the_card_s_snippet_speaks(tmp_path, tiny, samples, hub):
    variables = hub_variables(hub, tmp_path)
    run(SCRIPT, *flags(1, tiny, samples, tmp_path / "run"), "--push_to_hub", cwd=tmp_path, **variables)
    files = hub.files("tester/longcat_vss")
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "longcat_vss.py",
        "common.py",
        "loss.png",
    } <= set(files)
    assert not [name for name in files if name.endswith(("wav", "mp4")) or name.startswith("samples")], (
        "a user's voice stays here"
    )
    card = files["README.md"].decode()
    assert "given those before" in card and "video blanked" in card
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('"in.mp4"', repr(str(samples / "test/01/in.mp4")))
    )
    code = code.replace('"in.wav"', repr(str(samples / "test/01/in.wav")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.wav").read_bytes() == (tmp_path / "run" / "samples" / "test_01.wav").read_bytes()


# --- Bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size", 100], "a multiple of 28"),
        (["--lora_targets", "q_proj,o_proj"], "q_proj: no such layer"),
        (["--predict", "nothing.mp4"], "nothing.mp4"),
    ],
)
def test_bad_flags_end_with_2(tmp_path, tiny, samples, given, said):
    output = run(SCRIPT, "--model", tiny, "--data_dir", samples, *SMALL, *given, cwd=tmp_path, expect=2)
    assert said in output and "Traceback" not in output and not (tmp_path / "runs").exists()


def test_an_incomplete_model_is_refused_with_the_list(tmp_path, tiny, samples):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.unlink()
    (broken / "audio" / "audio_encoder.pt").unlink()
    output = run(SCRIPT, "--model", broken, "--data_dir", samples, *SMALL, cwd=tmp_path, expect=2)
    assert "Status: 2 files missing" in output and shard.name in output and "audio/audio_encoder.pt" in output


def test_bad_samples_are_named_by_folder(tmp_path, tiny, samples):
    data = shutil.copytree(samples, tmp_path / "data")
    (data / "train" / "03" / "in.wav").write_bytes(b"")
    (data / "train" / "05" / "out.wav").unlink()
    output = run(SCRIPT, "--model", tiny, *SMALL, cwd=tmp_path, expect=2)
    assert (
        "2 of 10 samples are bad" in output
        and "train/03" in output
        and "train/05" in output
        and "no out.wav" in output
    )


# --- Whole


@pytest.mark.demo
def test_the_whole_demo_learns_to_speak(tmp_path):
    run(SCRIPT, "--demo", cwd=tmp_path, OMP_NUM_THREADS=2)
    results = json.loads((tmp_path / "runs" / "longcat_vss_demo" / "results.json").read_text())
    assert results["score"] >= 0.85 and max(results["controls"].values()) <= 0.35
    adapted = results["tables"]["new words and voice"]
    assert adapted["before LoRA"]["as it is"] <= 0.2 and adapted["after LoRA"]["as it is"] >= 0.8
