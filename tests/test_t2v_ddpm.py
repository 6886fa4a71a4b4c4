"""t2v_ddpm.py as its user runs it: a process, through each launcher, fresh, killed and resumed, on good input
and bad."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    KILLED,
    ROOT,
    TINY,
    children,
    command,
    environment,
    finish,
    hub_variables,
    losses,
    read,
    run,
    same,
    start,
    unbroken_runs,
    wait_for,
    weights,
)
from hub import WRITE, Hub, Static

import common
import t2v_ddpm

SCRIPT = "t2v_ddpm.py"
ZERO2, ZERO3 = ROOT / "ds_zero2.json", ROOT / "ds_zero3_offload.json"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs of 6 steps"""
    return unbroken_runs(
        tmp_path_factory, SCRIPT, lambda ranks, folder: [*TINY, "--steps", 6, "--output_dir", folder]
    )


# --- A run


def test_run_folder_and_output(tmp_path):
    output = run(SCRIPT, *TINY, "--steps", 4, "--eval_every", 2, cwd=tmp_path)
    folder = tmp_path / "runs" / "t2v_ddpm_demo"
    names = {path.name for path in folder.iterdir()}
    assert names >= set("config.json environment.json t2v_ddpm.py metrics.jsonl loss.png results.json bad_samples.jsonl SUCCESS "
                        "deepspeed.json samples checkpoints model ckpt_000002.pt ckpt_000004.pt".split())  # fmt: skip
    assert re.search(r"^Out: runs/t2v_ddpm_demo \| Device: cpu", output, re.M)
    assert (
        re.search(r"^step 000001 \| loss \d\.\d{4}", output, re.M)
        and "saved runs/t2v_ddpm_demo/ckpt_000002.pt" in output
    )
    assert "eval step 000002" in output and "captions_shuffled" in output
    assert "Warning" not in output and "WARNING" not in output, output
    assert (folder / "samples" / "preview_step000002.png").stat().st_size > 1000
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_000002", "step_000004"}
    ckpt = torch.load(folder / "ckpt_000004.pt", weights_only=True)
    assert (
        ckpt.keys() == {"step", "model", "ema"}
        and ckpt["step"] == 4
        and ckpt["model"].keys() == ckpt["ema"].keys()
    )
    assert same(ckpt["ema"], weights(folder))
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["score"] <= 1 and set(results["controls"]) == {"captions_shuffled"}
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert row.keys() >= {"step", "loss", "lr", "grad_norm", "samples_per_s", "peak_memory_gb"}

    # the finished model is used, and the same command again does no work twice
    output = run(
        SCRIPT,
        "--demo",
        "--prompt",
        "a large red circle moving left quickly",
        "--sample_steps",
        1,
        cwd=tmp_path,
    )
    made = [
        folder / "samples" / f"a_large_red_circle_moving_left_quickly_seed0.{suffix}"
        for suffix in ("mp4", "gif", "png")
    ]
    assert all(path.stat().st_size > 200 for path in made) and str(made[0].relative_to(tmp_path)) in output
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    again = run(SCRIPT, *TINY, "--steps", 4, "--eval_every", 2, cwd=tmp_path)
    assert "resumed" in again and "step 0000" not in again.replace("step_0000", "")
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before and (
        folder / "SUCCESS"
    ).exists()


@pytest.mark.demo
def test_two_ranks_under_deepspeeds_own_launcher(tmp_path, unbroken):
    output = run(
        SCRIPT, *TINY, "--steps", 6, "--deepspeed", ZERO3, cwd=tmp_path, ranks=2, launcher="deepspeed"
    )
    assert "2 CPU process" in output
    folder = tmp_path / "runs" / "t2v_ddpm_demo"
    used = json.loads((folder / "deepspeed.json").read_text())
    assert used["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(used) and used["train_micro_batch_size_per_gpu"] == 4
    ours, theirs = weights(folder), weights(unbroken(2))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs), (
        "the layout must not change what is learned"
    )


def test_bf16_and_accumulation_train(tmp_path):
    output = run(
        SCRIPT,
        *TINY,
        "--steps",
        3,
        "--dtype",
        "bf16",
        "--accum",
        2,
        "--deepspeed_config",
        ZERO2,
        cwd=tmp_path,
    )
    assert "x 4 clips x 2 accum = 8 clips per step" in output
    used = json.loads((tmp_path / "runs" / "t2v_ddpm_demo" / "deepspeed.json").read_text())
    assert used["bf16"]["enabled"] is True and used["gradient_accumulation_steps"] == 2


def test_check_prints_the_plan_and_writes_nothing(tmp_path):
    one = run(SCRIPT, *TINY, "--check", "--batch_size", 8, cwd=tmp_path)
    two = run(SCRIPT, *TINY, "--check", "--batch_size", 2, "--accum", 2, "--local_rank=0", cwd=tmp_path)
    assert "= 8 clips per step" in one and "= 4 clips per step" in two and "auto takes this" in one
    assert not (tmp_path / "runs").exists()


def test_variables_stand_for_flags_and_flags_win(tmp_path):
    variables = {"STEPS": 3, "BS": 2, "FRAMES": 3, "SIZE": 8, "LR": "1e-3", "OUTDIR": "here"}
    output = run(SCRIPT, "--demo", "--base", 8, "--frames", 4, "--check", cwd=tmp_path, **variables)
    assert "Out: here" in output and "4 frames of 8x8" in output and "x 2 clips x 1 accum" in output
    assert re.search("^steps +3 of", output, re.M)
    output = run(SCRIPT, "--demo", cwd=tmp_path, expect=2, STEPS="many")
    assert "many" in output and "--steps" in output


def test_help_is_the_manual_and_import_does_nothing(tmp_path):
    output = " ".join(re.sub("[│╭╮╰╯─]", " ", run(SCRIPT, "--help", cwd=tmp_path)).split())
    assert (
        "MANIFEST" in output
        and "--batch_size" in output
        and "lower this first when memory runs out" in output
    )
    code = "import sys; sys.argv = ['x', '--nonsense']; import t2v_ddpm; print('deepspeed' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert out.stdout == "False\n" and not out.stderr
    assert "Perhaps you meant" in run(SCRIPT, "--batch_sizes", 3, cwd=tmp_path, expect=2)


def test_a_lone_copy_works_elsewhere(tmp_path, clips_manifest):
    """Without demos/: it trains on a manifest and says what clips of its own lack."""
    for name in (SCRIPT, "common.py", "ds_zero2.json", "ds_zero3_offload.json"):
        shutil.copy(ROOT / name, tmp_path)
    flags = [flag for flag in TINY if flag != "--demo"]
    flags += "--size 16 --levels 2 --blocks 1 --report_to none --steps 2 --max_bad 0.2".split()
    flags += ["--text_encoder", clips_manifest[1]]
    code, output = finish(start([sys.executable, SCRIPT, *flags], tmp_path))
    assert code == 2 and "demos/shapes.py is not there" in output
    code, output = finish(start([sys.executable, SCRIPT, *flags, "--manifest", clips_manifest[0]], tmp_path))
    assert code == 0, output
    code, output = finish(start([sys.executable, SCRIPT, "--prompt", "a dog"], tmp_path))
    assert code == 0, output


# --- Nothing is lost


@pytest.mark.parametrize(
    ("call", "count", "ranks"), [("rename", 1, 1), pytest.param("fsync", 2, 2, marks=pytest.mark.demo)]
)
def test_killed_inside_a_save_goes_on_to_the_same_weights(tmp_path, call, count, ranks, unbroken):
    (tmp_path / "killed.py").write_text(KILLED)
    flags = [*TINY, "--steps", 6, "--output_dir", tmp_path / "run"]
    code, output = finish(
        start(command(tmp_path / "killed.py", call, count, ROOT / SCRIPT, *flags, ranks=ranks), tmp_path)
    )
    assert code == (-signal.SIGKILL if ranks == 1 else 1), output  # torchrun turns every code into 1
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step_000002", ".step_000004.partial"}
    assert f"resumed {tmp_path / 'run' / 'checkpoints' / 'step_000002'}" in run(
        SCRIPT, *flags, cwd=tmp_path, ranks=ranks
    )
    assert same(weights(tmp_path / "run"), weights(unbroken(ranks)))
    assert losses(tmp_path / "run") == losses(unbroken(ranks))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing half-written stays"


def test_a_broken_checkpoint_is_named_skipped_and_kept(tmp_path, unbroken):
    shutil.copytree(unbroken(1), tmp_path / "run", ignore=shutil.ignore_patterns("model", "results.json"))
    newest = tmp_path / "run" / "checkpoints" / "step_000006"
    victim = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    output = run(SCRIPT, *TINY, "--steps", 6, "--output_dir", tmp_path / "run", cwd=tmp_path)
    assert re.search(r"warning: \S+step_000006 is broken", output) and "step_000004" in output
    assert same(weights(tmp_path / "run"), weights(unbroken(1)))
    assert list(newest.parent.glob("step_000006.broken-*")), "kept"


def test_results_of_lost_checkpoints_are_not_published_again(tmp_path, unbroken):
    shutil.copytree(unbroken(1), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    output = run(SCRIPT, *TINY, "--steps", 6, "--lr", 1e-2, "--output_dir", tmp_path / "run", cwd=tmp_path)
    assert "resumed" not in output and "step 000006 | loss" in output
    ema = torch.load(tmp_path / "run" / "ckpt_000006.pt", weights_only=True)["ema"]
    assert same(weights(tmp_path / "run"), ema) and not same(ema, weights(unbroken(1)))


def test_full_disk_is_an_error_that_keeps_the_last_checkpoint(tmp_path):
    flags = [*TINY, "--steps", 60, "--keep", 9, "--output_dir", tmp_path / "run"]
    process = start(command(SCRIPT, *flags), tmp_path)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step_000002").exists(), what="a checkpoint")
    resource.prlimit(
        process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)
    )  # write() fails from now on
    code, output = finish(process)
    assert (
        code == 1
        and "cannot save" in output
        and str(tmp_path / "run") in output
        and "Traceback" not in output
    ), output
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept and all(re.fullmatch(r"step_\d{6}", name) for name in kept)
    assert "GB free" in output and not (tmp_path / "run" / "SUCCESS").exists()
    again = run(SCRIPT, *flags, "--steps", int(kept[-1][5:]) + 1, cwd=tmp_path)
    assert f"resumed {tmp_path / 'run' / 'checkpoints' / kept[-1]}" in again


@pytest.mark.demo
def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path):
    flags = [*TINY, "--steps", 500, "--save_every", 400, "--output_dir", tmp_path / "run"]
    status = tmp_path / "status"
    process = start(command(SCRIPT, *flags, ranks=2), tmp_path, PYTHON_RUN_STATUS=status)
    wait_for(lambda: '"step": 2' in read(tmp_path / "run" / "metrics.jsonl"), what="step 2")
    os.kill(children(process.pid)[-1], signal.SIGTERM)
    code, output = finish(process)
    assert code == 1 and status.read_text() == "143", output  # torchrun turns every code into 1
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"after step {int(saved.name[5:])};" in output and not (tmp_path / "run" / "SUCCESS").exists()
    assert "resumed" in run(SCRIPT, *flags, "--steps", int(saved.name[5:]) + 1, cwd=tmp_path, ranks=2)


@pytest.mark.demo
@pytest.mark.parametrize(("zero", "before", "after"), [(ZERO3, 1, 2), (ZERO2, 2, 1)])
def test_another_number_of_ranks_goes_on(tmp_path, zero, before, after):
    flags = [
        *TINY,
        "--output_dir",
        tmp_path / "run",
        "--deepspeed",
        zero,
        "--warmup_steps",
        0,
        "--save_every",
        99,
    ]
    run(SCRIPT, *flags, "--steps", 30, cwd=tmp_path, ranks=before)
    output = run(
        SCRIPT, *flags, "--steps", 31, cwd=tmp_path, ranks=after
    )  # the learning rate has decayed to nearly nothing there
    assert "step_000030, saved by another number of ranks" in output and "step 000031 | loss" in output
    old, new = (
        torch.load(tmp_path / "run" / f"ckpt_{n}.pt", weights_only=True)["model"]
        for n in ("000030", "000031")
    )
    torch.manual_seed(0)
    initial = t2v_ddpm.UNet3DCond(8, 2, 1, 2, "film", 512).state_dict()
    assert all(torch.allclose(old[name], new[name], atol=1e-4) for name in old)
    assert not any(
        torch.allclose(old[name], initial[name], atol=1e-3) for name in old if name.endswith("conv1.weight")
    )
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_the_launcher_stops_and_resumes_two_ranks(tmp_path):
    launch = [str(ROOT / "run.sh"), SCRIPT, "2", *TINY, "--save_every", "400", "--steps"]
    process = start([*launch, "500"], tmp_path, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    folder = tmp_path / "runs" / "t2v_ddpm_demo"
    wait_for(lambda: '"step": 2' in read(folder / "metrics.jsonl"), what="step 2")
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 143 and re.search(r"^STOPPED exit=143 seconds=\d+$", output.splitlines()[-1]), output
    (saved,) = (folder / "checkpoints").iterdir()
    again = start(
        [*launch, str(int(saved.name[5:]) + 1)], tmp_path, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES=""
    )
    code, output = finish(again)
    assert code == 0 and f"resumed runs/t2v_ddpm_demo/checkpoints/{saved.name}" in output, output
    assert output.splitlines()[-1].startswith("SUCCESS exit=0") and (folder / "SUCCESS").exists()
    assert (tmp_path / "logs" / "latest.log").read_text().splitlines()[-1] == output.splitlines()[-1]


def test_divergence_ends_with_4_and_goes_on_with_a_lower_rate(tmp_path):
    flags = [*TINY, "--steps", 40, "--warmup_steps", 0, "--save_every", 1, "--keep", 99]
    output = run(SCRIPT, *flags, "--lr", 1e30, "--clip", 1e30, cwd=tmp_path, expect=4)
    assert "update skipped on all ranks (3 in a row)" in output and "lower --lr 1e+30" in output
    folder = tmp_path / "runs" / "t2v_ddpm_demo"
    for path in folder.glob("ckpt_*.pt"):
        assert all(torch.isfinite(w).all() for w in torch.load(path, weights_only=True)["model"].values())
    for path in [
        *folder.glob("ckpt_*.pt"),
        *(folder / "checkpoints").iterdir(),
    ]:  # weights of 1e30 are finite, and useless
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = run(SCRIPT, *flags, "--lr", 1e-3, "--steps", 2, cwd=tmp_path)
    assert "lr: 1e+30 there, 0.001 here" in output


# Start the script with this in front of it: the third loss of rank 1 is not a number.
NOT_A_NUMBER = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import t2v_ddpm as script
real, calls = script.diffusion_loss, []

def diffusion_loss(*args):
    calls.append(1)
    return real(*args) * (float("nan") if len(calls) == 3 and os.environ["RANK"] == "1" else 1)

script.diffusion_loss = diffusion_loss
script.run(script.main)
"""


def test_not_a_number_on_one_rank_skips_the_update_on_all(tmp_path, unbroken):
    (tmp_path / "nan.py").write_text(NOT_A_NUMBER)
    flags = [*TINY, "--steps", 6, "--output_dir", tmp_path / "run"]
    arguments = command(tmp_path / "nan.py", ROOT / SCRIPT, *flags, ranks=2)
    code, output = finish(start(arguments, tmp_path))
    assert code == 0 and "update skipped on all ranks (1 in a row)" in output, output
    assert [loss is None for _, loss, _ in losses(tmp_path / "run")] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())
    assert losses(tmp_path / "run")[:2] == losses(unbroken(2))[:2]
    assert not same(weights(tmp_path / "run"), weights(unbroken(2)))


# --- Refusals: exit 2, value and next move, nothing written


@pytest.mark.demo
def test_one_folder_one_run(tmp_path, unbroken):
    shutil.copytree(unbroken(1), tmp_path / "run")
    flags = [*TINY, "--output_dir", tmp_path / "run"]
    output = run(SCRIPT, *flags, "--steps", 6, "--seed", 7, "--base", 16, cwd=tmp_path, expect=2)
    assert (
        "seed: 0 there, 7 here" in output and "base: 8 there, 16 here" in output and "--output_dir" in output
    )
    output = run(SCRIPT, *flags, "--steps", 8, "--dtype", "bf16", cwd=tmp_path, expect=2)
    assert "saved with dtype fp32, this run has bf16" in output or "dtype: None there, bf16 here" in output
    output = run(SCRIPT, *flags, "--steps", 8, "--deepspeed", ZERO3, cwd=tmp_path, expect=2)
    assert "zero_stage 2" in output
    output = run(SCRIPT, *flags, "--steps", 8, "--no_resume", cwd=tmp_path, expect=2)
    assert "--no_resume" in output
    process = start(command(SCRIPT, *flags, "--steps", 400), tmp_path)
    wait_for(lambda: '"step": 8' in read(tmp_path / "run" / "metrics.jsonl"), what="step 8")
    assert "another run is writing" in run(SCRIPT, *flags, "--steps", 400, cwd=tmp_path, expect=2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


BAD_JSON = {
    "auto that nobody fills": (
        {"zero_optimization": {"stage": 2}, "steps_per_print": "auto"},
        "steps_per_print",
    ),
    "stage 0": ({"zero_optimization": {"stage": 0}}, "stage 0"),
    "unknown key": ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
    "auto inside of an offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
        '"device": "auto" has no value here',
    ),
    "auto of fp16": (
        {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto", "loss_scale": "auto"}},
        '"loss_scale": "auto" has no value here',
    ),
    "auto stage": ({"zero_optimization": {"stage": "auto"}}, "stage auto; take 1, 2 or 3"),
    "no section of ZeRO": ({}, "zero_optimization.stage None; take 1, 2 or 3"),
    "unknown section": (
        {"zero_optimization": {"stage": 2}, "gradient_cliping": 1},
        "does not know gradient_cliping",
    ),
    # DeepSpeed knows the word, in another place: here it would be ignored
    "section's key outside of it": (
        {"zero_optimization": {"stage": 2}, "loss_scale": 128},
        "does not know loss_scale",
    ),
    "unknown key of fp16": ({"zero_optimization": {"stage": 2}, "fp16": {"enabld": True}}, "enabld"),
    "unknown key of an offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin": True}}},
        "offload_optimizer.pin",
    ),
    "no object": ({"zero_optimization": [2]}, "a JSON object is wanted"),
    "no object in a section": ({"zero_optimization": {"stage": 2}, "bf16": True}, "bf16"),
    "no object for an offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        "offload_optimizer",
    ),
    "no number": ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, "reduce_bucket_size"),
    "no such device": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}},
        "DeepSpeed cannot read it",
    ),
    "what DeepSpeed has no more": ({"zero_optimization": {"stage": 2}, "amp": {"enabled": True}}, "Apex AMP"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_deepspeed_json_that_would_mislead_is_refused(case, capsys):
    config, word = BAD_JSON[case]
    with pytest.raises(SystemExit) as stop:
        common.ds_config(config, "ds.json", 4, 1, 1.0, "fp32")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert word in error and "ds.json" in error


# What a JSON says against the flags -> what is said of it, once
NOTED = {
    "precision": ({"bf16": {"enabled": True}}, "bf16.enabled True: the flags say False, which counts"),
    "other precision": ({"fp16": {"enabled": True}}, "fp16.enabled True: the flags say False, which counts"),
    "global batch": ({"train_batch_size": 7}, "train_batch_size 7: the flags say 8, which counts"),
    "batch": (
        {"train_micro_batch_size_per_gpu": 3},
        "train_micro_batch_size_per_gpu 3: the flags say 4, which counts",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 7},
        "gradient_accumulation_steps 7: the flags say 2, which counts",
    ),
    "clipping": ({"gradient_clipping": 0.5}, "gradient_clipping 0.5: the flags say 1.0, which counts"),
    "optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        "optimizer AdamW: this script has its own, --lr, --beta2 and --weight_decay count",
    ),
    "scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
        "scheduler WarmupLR: this script has its own, --warmup_steps count",
    ),
    "auto of ZeRO": (
        {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"}},
        "zero_optimization.stage3_prefetch_bucket_size auto: DeepSpeed's default counts",
    ),
}
FROM_FLAGS = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,
}


@pytest.mark.parametrize("case", NOTED)
def test_keys_of_a_deepspeed_json_that_do_not_count_are_named(case, caplog):
    caplog.set_level("INFO", "video")
    config, told = NOTED[case]
    source = {"zero_optimization": {"stage": 2}} | config
    before = json.dumps(source)
    made = common.ds_config(source, "ds.json", 4, 2, 1.0, "fp32")
    assert caplog.messages == [f"note: ds.json: {told}"]
    assert made == FROM_FLAGS and json.dumps(source) == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_json_that_agrees_with_the_flags_is_taken_without_a_word(dtype, caplog):
    caplog.set_level("INFO", "video")
    filled = FROM_FLAGS | {kind: {"enabled": dtype == kind} for kind in ("bf16", "fp16")}
    agreed = filled | {"steps_per_print": 2000, "gradient_clipping": 1}  # which is 1.0
    assert common.ds_config(agreed, "ds.json", 4, 2, 1.0, dtype) == agreed
    assert common.ds_config({"zero_optimization": {"stage": 2}}, "ds.json", 4, 2, 1.0, dtype) == filled
    for ours in (ZERO2, ZERO3):
        common.ds_config(json.loads(ours.read_text()), ours.name, 4, 2, 1.0, dtype)
    assert not caplog.messages


# As Hugging Face's documentation of transformers and DeepSpeed has it: ZeRO-3 with everything on the CPU
HUGGING_FACE = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
        "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


def test_a_json_as_hugging_faces_documentation_has_it_is_taken(caplog):
    caplog.set_level("INFO", "video")
    made = common.ds_config(HUGGING_FACE, "ds.json", 4, 2, 0.3, "bf16")
    zero = HUGGING_FACE["zero_optimization"]
    autos = [key for key, value in zero.items() if value == "auto"]
    assert caplog.messages == [
        "note: ds.json: optimizer AdamW: this script has its own, --lr, --beta2 and --weight_decay count",
        "note: ds.json: scheduler WarmupLR: this script has its own, --warmup_steps count",
        *[f"note: ds.json: zero_optimization.{key} auto: DeepSpeed's default counts" for key in autos],
    ]
    numbers = FROM_FLAGS | {"gradient_clipping": 0.3, "bf16": {"enabled": True}}
    numbers |= {"fp16": HUGGING_FACE["fp16"] | {"enabled": False}}
    numbers |= {"zero_optimization": {key: value for key, value in zero.items() if key not in autos}}
    assert made == numbers | {"steps_per_print": 2000, "wall_clock_breakdown": False}


@pytest.mark.demo
def test_a_run_takes_hugging_faces_json_and_says_what_does_not_count(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(HUGGING_FACE | {"gradient_clipping": 0.5}))
    flags = [*TINY, "--output_dir", "run", "--steps", 2, "--deepspeed", "ds.json"]
    output = run(SCRIPT, *flags, cwd=tmp_path)
    assert "note: ds.json: gradient_clipping 0.5: the flags say 1.0, which counts" in output
    assert "note: ds.json: optimizer AdamW: this script has its own" in output
    assert re.search("ZeRO-3, all on CPU .*<- ds.json takes this", output)
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]
    (tmp_path / "ds.json").write_text(json.dumps(HUGGING_FACE | {"gradient_cliping": 0.5}))
    output = run(SCRIPT, *flags, "--output_dir", "other", cwd=tmp_path, expect=2)
    assert "ds.json: this DeepSpeed does not know gradient_cliping and would ignore it" in output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("zero, offload, name", [
    ({"stage": 2, "cpu_offload": True}, "optimizer", "ZeRO-2, optimizer on CPU"),
    ({"stage": 2, "cpu_offload": False}, "", "ZeRO-2"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "optimizer", "ZeRO-2, optimizer on CPU"),
    ({"stage": 2, "offload_optimizer": {"device": "none"}}, "", "ZeRO-2"),
    ({"stage": 2, "offload_optimizer": None}, "", "ZeRO-2"),
    ({"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}, "", "ZeRO-3"),
    ({"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "cpu"}}, "optimizer",
     "ZeRO-3, optimizer on CPU"),
    ({"stage": 3, "cpu_offload": True}, "optimizer", "ZeRO-3, optimizer on CPU"),
    ({"stage": 3, "cpu_offload_param": True, "cpu_offload": True}, "all", "ZeRO-3, all on CPU"),
])  # fmt: skip
def test_offloading_is_planned_as_what_a_json_does(tmp_path, zero, offload, name):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    layouts = common.memory_layouts(10**6, 0, {False: 0}, "bf16", 1)
    table, taken = common.choose_layout(layouts, str(tmp_path / "ds.json"), "")
    assert (taken.stage, taken.offload, taken.name) == (zero["stage"], offload, name)
    (line,) = [line for line in table.splitlines() if "takes this" in line]
    assert line.split("  ")[1] == name
    made = common.ds_config(taken.config, "ds.json", 1, 1, 1.0, "bf16")["zero_optimization"]
    wanted = {"": set(), "optimizer": {"offload_optimizer"}, "all": {"offload_optimizer", "offload_param"}}
    assert {key for key in made if "offload" in key} == wanted[offload]
    assert all(made[key]["device"] == "cpu" for key in wanted[offload])
    # and DeepSpeed reads it so
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read_by_it = DeepSpeedZeroConfig(**made)
    assert (read_by_it.offload_optimizer is not None) == bool(offload)
    assert (read_by_it.offload_param is not None) == (offload == "all")


# --- Real videos


SMALL = "--base 8 --levels 2 --blocks 1 --frames 4 --size 16 --batch_size 2 --sample_steps 1 --save_every 100".split()


@pytest.fixture(scope="module")
def clips_manifest(tmp_path_factory):
    """A manifest of videos made on the spot, one of them truncated, and a tiny CLIP text encoder saved by its
    real classes."""
    from clips import write
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    folder, rows = tmp_path_factory.mktemp("clips"), []
    for i in range(7):
        write(folder / f"{i}.mp4", 12 + i)
        rows.append({"video": f"{i}.mp4", "captions": [f"clip number {i}", "a numbered clip"]})
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:300])
    rows.append({"video": "broken.mp4", "caption": "a broken clip"})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    words = ["<pad>", "<start>", "<end>", "<unk>", *"clip number a numbered".split(), *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    clip = folder / "clip"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
        clip
    )
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    CLIPTextModel(
        CLIPTextConfig(vocab_size=len(words), **sizes, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    ).save_pretrained(clip)
    return manifest, clip


def test_real_videos_with_a_real_clip(tmp_path, clips_manifest):
    manifest, clip = clips_manifest
    flags = ["--manifest", manifest, "--text_encoder", clip, *SMALL, "--steps", 2]
    output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    assert "1 of 8 samples are bad, more than --max_bad 0.05" in output and "broken.mp4" in output
    output = run(SCRIPT, *flags, "--max_bad", 0.2, cwd=tmp_path)
    folder = tmp_path / "runs" / "t2v_ddpm"
    (bad,) = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert bad["where"].endswith("manifest.jsonl:8") and "broken.mp4" in bad["video"] and bad["reason"]
    assert "7 clips to train on" in output and "32 numbers for each of 8 captions, by FiLM" in output
    assert re.search(r"16x16, [\d.]+ a second", output)
    assert len(list((tmp_path / "cache" / "frames").rglob("*.npy"))) == 7
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    run(SCRIPT, *flags, "--max_bad", 0.2, "--output_dir", tmp_path / "again", cwd=tmp_path)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}, (
        "decoded and encoded once"
    )
    output = run(SCRIPT, "--prompt", "clip number 3", "--sample_steps", 1, cwd=tmp_path)
    assert (tmp_path / "runs" / "t2v_ddpm" / "samples" / "clip_number_3_seed0.mp4").exists()


def test_videos_behind_urls(tmp_path, clips_manifest, hub):
    manifest, clip = clips_manifest
    hub.static["0.mp4"] = Static((manifest.parent / "0.mp4").read_bytes())
    hub.static["page.mp4"] = Static(b"<html>moved</html>", headers={"Content-Type": "text/html"})
    rows = [{"video": f"{hub.url}/files/{name}.mp4", "caption": name} for name in ("0", "page", "gone")]
    (tmp_path / "urls.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--manifest", "urls.jsonl", "--text_encoder", clip, *SMALL, "--check"]
    flags += ["--max_bad", 0.7]
    output = run(SCRIPT, *flags, cwd=tmp_path, SAMPLES_URL=hub.url)
    assert "1 clips to train on" in output and "a web page" in output and "404" in output
    run(SCRIPT, *flags, cwd=tmp_path, SAMPLES_URL=hub.url)
    assert len(hub.requests("GET /files/0.mp4")) == 1, "fetched once"
    assert not (tmp_path / "runs").exists()


def test_text_is_of_the_real_tokens(clips_manifest):
    from transformers import AutoTokenizer, CLIPTextModel

    _, clip = clips_manifest
    tokens = AutoTokenizer.from_pretrained(clip)("a", return_tensors="pt")
    with torch.no_grad():
        alone = CLIPTextModel.from_pretrained(clip)(**tokens).last_hidden_state[0]
    for mode, wanted in (("cross", alone), ("film", alone.mean(0, keepdim=True))):
        text = t2v_ddpm.clip_text(["clip number 3", "a"], str(clip), mode, torch.device("cpu"))
        torch.testing.assert_close(torch.from_numpy(text.of(1)).float(), wanted, rtol=1e-2, atol=1e-2)


WRONG_ENCODERS = {
    "another class": (lambda clip: other_encoder(clip), "it is of class t5, CLIP is wanted"),
    "a tensor is missing": (lambda clip: leave_out_a_tensor(clip), "1 weights are missing or do not fit"),
    "no tokenizer": (lambda clip: [path.unlink() for path in clip.glob("token*")], "tokenizer"),
    "no model": (lambda clip: (clip / "config.json").unlink(), "--text_encoder"),
}


def other_encoder(folder):
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)).save_pretrained(
        folder
    )


def leave_out_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "final_layer_norm" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", WRONG_ENCODERS)
def test_a_text_encoder_that_is_none_is_refused(case, tmp_path, clips_manifest, capsys):
    spoil, said = WRONG_ENCODERS[case]
    manifest, clip = clips_manifest
    shutil.copytree(clip, tmp_path / "clip")
    spoil(tmp_path / "clip")
    if case == "another class":  # as its user sees it
        flags = ["--manifest", manifest, "--text_encoder", tmp_path / "clip", *SMALL, "--max_bad", 0.2]
        output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
        assert "Traceback" not in output and not (tmp_path / "runs").exists(), output
    else:
        with pytest.raises(SystemExit) as stop:
            t2v_ddpm.open_encoder(str(tmp_path / "clip"), torch.device("cpu"))
        output = capsys.readouterr().err
        assert stop.value.code == 2
    assert said in output


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Of the real class, 4 x 4 pixels to a latent"""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_latents_are_encoded_once_and_words_are_read_one_by_one(tmp_path, clips_manifest, vae):
    """By two ranks; sampled in a process that has the model folder alone."""
    manifest, clip = clips_manifest
    flags = ["--manifest", manifest, "--max_bad", 0.2, "--text_encoder", clip, "--vae", vae, *SMALL]
    flags += [
        "--text_mode",
        "cross",
        "--log_every",
        1,
        "--save_every",
        2,
        "--preview_steps",
        1,
        "--warmup_steps",
        0,
        "--no_lr_decay",
    ]
    whole, again = tmp_path / "whole", tmp_path / "again"
    output = run(SCRIPT, *flags, "--steps", 4, "--output_dir", whole, cwd=tmp_path, ranks=2)
    assert "by cross-attention" in output and f"predicts v of latents of {vae}" in output
    latents = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").rglob("*.npy")}
    assert len(latents) == 7 and np.load(next(iter(latents))).shape == (4, 4, 4, 4)
    run(SCRIPT, *flags, "--check", "--output_dir", again, cwd=tmp_path)
    assert latents == {path: path.stat().st_mtime_ns for path in latents}
    config = json.loads((whole / "model" / "config.json").read_text())
    assert config["text_encoder"] == "text_encoder" and config["vae"] == "vae"
    assert "a CLIP that lies here too" in (whole / "model" / "README.md").read_text()
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(whole / "model", moved)
    code = f"import t2v_ddpm; print(t2v_ddpm.generate('clip number 3', {str(moved)!r}, sample_steps=2).shape)"
    shutil.move(vae, tmp_path / "gone")
    try:
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=moved, env=environment(), capture_output=True, text=True
        )
    finally:
        shutil.move(tmp_path / "gone", vae)
    assert out.stdout.endswith("(4, 16, 16, 3)\n"), out.stderr


def test_size_must_fit_the_latents(tmp_path, clips_manifest, vae, capsys):
    manifest, clip = clips_manifest
    flags = ["--manifest", manifest, "--text_encoder", clip, "--vae", vae, *SMALL, "--size", 20]
    output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    assert "--size 20 must be a multiple of 8 (latents of 4 pixels" in output
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(SystemExit):
        t2v_ddpm.open_vae(str(tmp_path), torch.device("cpu"))
    output = capsys.readouterr().err
    assert "it is UNet2DModel, AutoencoderKL is wanted" in output


def test_pictures_then_clips_from_their_weights(tmp_path, clips_manifest):
    """FRAMES=1 on a folder of pictures beside their captions; --init_from takes the averaged weights."""
    from PIL import Image

    _, clip = clips_manifest
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 24, 3), 60 * i, np.uint8)).save(tmp_path / "pictures" / f"{i}.jpg")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"number {i}")
    flags = ["--text_encoder", clip, *SMALL, "--steps", 2, "--lr", 1e-3, "--save_every", 1]
    first, second = tmp_path / "first", tmp_path / "second"
    output = run(SCRIPT, "--manifest", "pictures", *flags, "--frames", 1, "--output_dir", first, cwd=tmp_path)
    assert "4 clips to train on" in output and "1 frames of 16x16" in output
    flags += ["--manifest", clips_manifest[0], "--max_bad", 0.2, "--image_share", 0.5, "--lr", 1e-12]
    run(SCRIPT, *flags, "--output_dir", second, "--init_from", first / "ckpt_000002.pt", cwd=tmp_path)
    ours, theirs = weights(second), weights(first)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    output = run(
        SCRIPT, *flags, "--base", 16, "--init_from", first, "--output_dir", "x", cwd=tmp_path, expect=2
    )
    assert "--init_from" in output and "weights are missing or do not fit" in output
    output = run(SCRIPT, *flags, "--init_from", "nowhere", "--output_dir", "x", cwd=tmp_path, expect=2)
    assert "--init_from nowhere: no such folder" in output and not (tmp_path / "x").exists()


def test_without_captions(tmp_path, clips_manifest):
    manifest, _ = clips_manifest
    (tmp_path / "clips").mkdir()
    for path in manifest.parent.glob("?.mp4"):
        shutil.copy(path, tmp_path / "clips")
    flags = ["--manifest", "clips", *SMALL, "--steps", 2, "--save_every", 1]
    output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    assert "no videos beside x.json or x.txt" in output and "--caption_dropout 1" in output
    output = run(SCRIPT, *flags, "--caption_dropout", 1, cwd=tmp_path)
    assert "text     none: --caption_dropout 1" in output and "7 clips to train on" in output
    results = json.loads((tmp_path / "runs" / "t2v_ddpm" / "results.json").read_text())
    assert results["controls"] == {} and not (tmp_path / "cache" / "text").exists()
    run(SCRIPT, "--prompt", "anything", "--sample_steps", 1, cwd=tmp_path)


def test_prompts_take_what_the_model_was_trained_with(tmp_path, clips_manifest, capsys):
    manifest, clip = clips_manifest
    flags = ["--manifest", manifest, "--max_bad", 0.2, "--text_encoder", clip, *SMALL, "--steps", 3]
    flags += ["--save_every", 2, "--sampler", "dpm", "--output_dir", "run", "--fps", 3]
    run(SCRIPT, *flags, cwd=tmp_path)
    (tmp_path / "prompts.txt").write_text("clip number 3\n\n!!!\n../../up\n", "utf-8-sig")
    given = ["--prompt", "prompts.txt", "--output_dir", "out", "--seed", 4]
    output = run(SCRIPT, *given, "--model", "run/ckpt_000002.pt", cwd=tmp_path)  # of a run that was stopped
    made = sorted(path.name for path in (tmp_path / "out" / "samples").glob("*.mp4"))
    assert len(made) == 3 and "clip_number_3_seed4.mp4" in made and "up_seed4.mp4" in made, output
    assert not list((tmp_path / "out").glob("*.mp4"))
    kept = {}
    for source in ("run", "run/model", "run/ckpt_000003.pt", "run/checkpoints/step_000003"):
        saved, kept[source] = t2v_ddpm.trained_weights(str(tmp_path / source), "--model")
        assert saved["sampler"] == "dpm" and saved["fps"] == 3 and Path(saved["text_encoder"]).is_dir()
    assert all(same(weights, kept["run"]) for weights in kept.values())
    flags = ["--prompt", "a", "--model", "run", "--output_dir", "big", "--frames", 2, "--size", 32]
    run(SCRIPT, *flags, cwd=tmp_path)
    import av

    for path, frames in (("out/samples/clip_number_3_seed4.mp4", 4), ("big/samples/a_seed0.mp4", 2)):
        with av.open(str(tmp_path / path)) as file:
            assert file.streams.video[0].average_rate == 3 and file.streams.video[0].frames == frames
    output = run(SCRIPT, *flags, "--base", 16, cwd=tmp_path, expect=2)
    assert "weights are missing or do not fit" in output
    for source in ("prompts.txt", "nowhere", "out"):
        with pytest.raises(SystemExit) as stop:
            t2v_ddpm.trained_weights(str(tmp_path / source), "--model")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and f"--model {tmp_path / source}" in said
    output = run(SCRIPT, "--prompt", "none.txt", "--model", "run", cwd=tmp_path, expect=2)
    assert "--prompt none.txt" in output


def test_the_score_of_real_clips_is_that_above_a_blind_guess(tmp_path, clips_manifest):
    """Untrained weights predict 0, which is worse than what mean and variance say: no score at all."""
    manifest, clip = clips_manifest
    flags = [
        "--manifest",
        manifest,
        "--max_bad",
        0.2,
        "--text_encoder",
        clip,
        *SMALL,
        "--lr",
        1e-9,
        "--steps",
        1,
    ]
    run(SCRIPT, *flags, cwd=tmp_path)
    results = json.loads((tmp_path / "runs" / "t2v_ddpm" / "results.json").read_text())
    assert results["score"] == results["controls"]["captions_swapped"] == 0.0
    assert results["tables"]["held out"]["loss"]["blind to the clip"] < results["held_out_loss"]


def test_frames_longer_than_every_clip(tmp_path, clips_manifest):
    manifest, clip = clips_manifest
    output = run(
        SCRIPT,
        "--manifest",
        manifest,
        "--text_encoder",
        clip,
        *SMALL,
        "--frames",
        100,
        cwd=tmp_path,
        expect=2,
    )
    assert "none of 8 samples is usable" in output and "100" in output


def test_clip_out_of_reach(tmp_path, clips_manifest):
    manifest, _ = clips_manifest
    with Hub() as hub:
        url = hub.url
    variables = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "home"}  # a Hub that is gone
    flags = [*SMALL, "--max_bad", 0.2]
    output = run(SCRIPT, "--manifest", manifest, *flags, cwd=tmp_path, expect=2, **variables)
    assert "openai/clip-vit-base-patch32" in output and "give a folder" in output
    output = run(SCRIPT, *flags, "--check", cwd=tmp_path, **variables)  # generated clips need none of it
    assert "generated clips of moving shapes" in output and "tiny_text_encoder" in output


# --- Hub


def test_pushed_model_is_the_folder_and_its_snippet_runs(tmp_path, hub):
    variables = hub_variables(hub, tmp_path)
    output = run(SCRIPT, *TINY, "--steps", 2, "--push_to_hub", cwd=tmp_path, **variables)
    assert "pushed " in output
    model, pushed = tmp_path / "runs" / "t2v_ddpm_demo" / "model", hub.files("tester/t2v_ddpm")
    files = [path for path in model.rglob("*") if path.is_file()]
    assert {path.relative_to(model).as_posix(): path.read_bytes() for path in files} == {
        k: v for k, v in pushed.items() if k != ".gitattributes"
    }
    assert hub.repo("tester/t2v_ddpm").private
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] + list(
        hub.blobs.values()
    )
    assert not any(WRITE.encode() in data for data in everything) and WRITE not in output
    card = pushed["README.md"].decode()
    assert "captions shuffled" in card and "samples.png" in card and "--push_to_hub" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    out = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "sample.mp4").stat().st_size > 200


# --- The demo itself


@pytest.mark.demo
def test_demo_learns(tmp_path):
    code, output = finish(
        start(command(SCRIPT, "--demo"), tmp_path, OMP_NUM_THREADS=os.cpu_count()), timeout=1800
    )
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "t2v_ddpm_demo" / "results.json").read_text())
    assert results["score"] >= 0.85 and results["tables"]["asked is made"]["move"]["as asked"] >= 0.9
    assert results["controls"]["captions_shuffled"] <= 0.05
