"""What every script must do, by its demo made short: start, be killed and stopped and go on, be refused,
push."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    command,
    environment,
    finish,
    hub_variables,
    kill_at_step_3,
    losses,
    read,
    run,
    same,
    start,
    unbroken_runs,
    wait_for,
)
from hub import READ, WRITE

SHORT = {
    "t2v_ddpm.py": "--base 8 --frames 4 --batch_size 4 --sample_steps 1",
    "t2v_rflow.py": "--depth 1 --width 32 --heads 2 --sample_steps 1",
    "nllb_vtt.py": "--batch_size 8 --eval_questions 4 --max_new_tokens 4",
    "llava_vtt.py": "--batch_size 4 --eval_questions 8",
    "longcat_vss.py": "--eval_samples 4",
}
# An evaluation that takes seconds, for a signal to fall into
LONG_EVALUATION = {
    "t2v_ddpm.py": "--base 64",
    "t2v_rflow.py": "--width 128 --depth 4",
    "nllb_vtt.py": "--eval_questions 100 --max_new_tokens 60",
    "llava_vtt.py": "--eval_questions 200",
    "longcat_vss.py": "--eval_samples 24",
}
each_script = pytest.mark.parametrize("script", SHORT)


def first_on(*names):
    """Of these scripts always; of the others, whose loop is the same, only with --demos"""
    marks = {name: () if name in names else pytest.mark.demo for name in SHORT}
    return pytest.mark.parametrize("script", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def flags_of(script: str, folder, cache) -> list[str]:
    common = "--demo --steps 6 --log_every 1 --save_every 2 --eval_every 4 --report_to none"
    return [*f"{common} {SHORT[script]}".split(), "--output_dir", str(folder), "--cache_dir", str(cache)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    """get(script, ranks) -> the run folder of a run that nothing interrupted"""
    made = {}

    def get(script: str, ranks: int = 1):
        if script not in made:
            made[script] = unbroken_runs(
                tmp_path_factory, script, lambda _, folder: flags_of(script, folder, cache)
            )
        return made[script](ranks)

    return get


def all_weights(folder) -> dict:
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            name = path.relative_to(folder)
            tensors |= {f"{name} {key}": value for key, value in load_file(path).items()}
    assert tensors
    return tensors


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@first_on("t2v_ddpm.py", "t2v_rflow.py", "nllb_vtt.py", "llava_vtt.py")
def test_a_run_leaves_what_the_readme_promises(script, unbroken):
    folder = unbroken(script)
    output = (folder.parent / "output").read_text()
    names = {path.name for path in folder.iterdir()}
    promised = (
        "config.json environment.json metrics.jsonl loss.png results.json bad_samples.jsonl deepspeed.json "
        "SUCCESS"
    )
    assert names >= {script, "samples", "checkpoints", "model", *promised.split()}
    assert "Warning" not in output and "WARNING" not in output and "Traceback" not in output, output
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"step_000006"}

    rows = rows_of(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 6], (
        "the last evaluation is logged too"
    )
    assert rows[0].keys() >= {"step", "loss", "lr", "grad_norm", "samples_per_s", "peak_memory_gb"}

    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["score"] <= 1 and results["score_is"] and results["controls"] and results["tables"]
    assert results["steps"] == 6 and results["held_out_loss"] > 0
    for name in results["controls"]:
        assert re.search(rf"^{name} +\d\.\d+ +a control, to be below the score$", output, re.M)
    for title in results["tables"]:
        assert re.search(rf"^{re.escape(title)}  ", output, re.M), (
            "the table at the end has all of results.json"
        )


@first_on("t2v_ddpm.py", "t2v_rflow.py", "nllb_vtt.py", "llava_vtt.py")
def test_the_card_has_what_was_measured_as_the_hub_reads_it(script, unbroken):
    from huggingface_hub import ModelCard

    folder = unbroken(script)
    results = json.loads((folder / "results.json").read_text())
    card = ModelCard.load(folder / "model" / "README.md")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"score": results["score"]} | results["controls"]
    assert card.data.pipeline_tag and card.data.library_name and card.data.tags
    assert script in card.text and "```python" in card.text and "torch" in card.text
    assert "undefined" not in card.text.lower() and "{{" not in card.text


@first_on("t2v_ddpm.py")
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.demo)])
def test_killed_while_training_it_goes_on_to_the_same_weights(script, ranks, unbroken, cache, tmp_path):
    flags = flags_of(script, tmp_path / "run", cache)
    kill_at_step_3(script, *flags, folder=tmp_path / "run", cwd=tmp_path, ranks=ranks)
    assert "resumed" in run(script, *flags, cwd=tmp_path, ranks=ranks)
    whole = unbroken(script, ranks)
    assert same(all_weights(tmp_path / "run"), all_weights(whole))
    assert losses(tmp_path / "run") == losses(whole)


@first_on("nllb_vtt.py")
def test_a_signal_ends_an_evaluation_that_is_made_up_for_later(script, cache, tmp_path):
    """It breaks off between two batches, a checkpoint is written, and the same command evaluates that step
    first."""
    flags = [*flags_of(script, tmp_path / "run", cache), *LONG_EVALUATION[script].split()]
    flags += ["--eval_every", "3", "--save_every", "400", "--steps"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start(command(script, *flags, 40), tmp_path)
    wait_for(lambda: '"step": 3' in read(metrics) or process.poll() is not None, what="step 3")
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 143 and "stopped by SIGTERM after step 3; the same command goes on" in output, output
    assert (tmp_path / "run" / "checkpoints" / "step_000003" / "checkpoint.json").exists()
    assert [row for row in rows_of(tmp_path / "run") if "held_out_loss" in row] == []
    assert "step_000003" in run(script, *flags, 4, cwd=tmp_path)
    assert [row["step"] for row in rows_of(tmp_path / "run") if "held_out_loss" in row] == [3, 4]


@first_on("t2v_ddpm.py")
def test_flags_that_make_no_other_run_may_change(script, unbroken, cache, tmp_path):
    shutil.copytree(unbroken(script), tmp_path / "run")
    flags = flags_of(script, tmp_path / "run", cache)
    output = run(script, *flags, "--seed", 7, cwd=tmp_path, expect=2)
    assert "seed: 0 there, 7 here" in output and "--output_dir" in output and "Traceback" not in output
    more = ["--steps", 7, "--keep", 4, "--log_every", 7]
    output = run(script, *flags, *more, cwd=tmp_path)
    assert "resumed" in output and "log_every: 1 there, 7 here" in output
    shown, before = rows_of(tmp_path / "run"), rows_of(unbroken(script))
    assert [row for row in shown if row["step"] <= 5] == [row for row in before if row["step"] <= 5]


@first_on("nllb_vtt.py")
def test_a_finished_run_is_pushed_by_the_same_command(script, unbroken, cache, tmp_path, hub):
    """And nothing that it leaves, prints or pushes has the token."""
    shutil.copytree(unbroken(script), tmp_path / "run")
    flags = [*flags_of(script, tmp_path / "run", cache), "--push_to_hub"]
    refusal = run(script, *flags, cwd=tmp_path, expect=2, **hub_variables(hub, tmp_path, READ))
    assert "has the role read" in refusal and READ not in refusal
    variables = hub_variables(hub, tmp_path)
    fault = hub.fault(r"preupload", status=403, times=1000)
    output = run(script, *flags, cwd=tmp_path, expect=3, **variables)
    typed = " ".join(flags[:6])
    assert (
        "trained, not pushed" in output
        and f"the same command pushes it later:\n    python {script} {typed}" in output
    )
    assert not (tmp_path / "run" / "SUCCESS").exists()
    hub.faults.remove(fault)
    output = run(script, *flags, cwd=tmp_path, **variables)
    name = script.removesuffix(".py")
    model, pushed = tmp_path / "run" / "model", hub.files(f"tester/{name}")
    kept = {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()}
    assert {k: v for k, v in pushed.items() if not k.startswith(".")} == kept
    assert hub.repo(f"tester/{name}").private and len(hub.titles(f"tester/{name}")) == 1
    assert f'snapshot_download("tester/{name}")' in pushed["README.md"].decode()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(WRITE.encode() in data for data in [*files, *hub.blobs.values(), output.encode()])


@first_on("nllb_vtt.py")
def test_a_second_run_into_the_folder_is_told_whom_to_stop(script, unbroken, cache, tmp_path):
    """Also when what started it is gone: its ranks train on alone."""
    shutil.copytree(unbroken(script), tmp_path / "run")
    flags = flags_of(script, tmp_path / "run", cache)
    process = start(command(script, *flags, "--steps", 40, "--eval_every", 9999), tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: '"step": 7' in read(metrics) or process.poll() is not None, what="step 7")
    os.killpg(process.pid, signal.SIGSTOP)
    output = run(script, *flags, cwd=tmp_path, expect=2)
    assert "another run is writing" in output and f"kill {process.pid}" in output
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@each_script
def test_import_loads_no_library_that_takes_seconds(script):
    code = f"import sys, {script.removesuffix('.py')}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    slow = {"deepspeed", "peft", "diffusers", "datasets", "matplotlib", "transformers.trainer", "cv2"}
    assert not slow & set(out.stdout.split()) and not out.stderr
