"""What the tests share: start a script as its user does, a loopback Hub, tiny settings. `--demos` runs the
demos whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Before torch is imported: several processes test at once, and threads that wait for each other's cores spin.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub import WRITE, Hub  # noqa: E402

import common  # noqa: E402

common.mend_torchvision()  # before a test imports transformers

# The demo preset made smaller still: seconds a run. Flags after these win.
TINY = "--demo --base 8 --frames 4 --batch_size 4 --sample_steps 1 --log_every 1 --save_every 2".split()
OURS = (
    "HF_",
    "HUGGING",
    "WANDB",
    "MANIFEST",
    "OUTDIR",
    "STEPS",
    "BS",
    "FRAMES",
    "SIZE",
    "LR",
    "CUDA_",
    "PYTHON_RUN",
    "RANK",
    "WORLD",
)


def pytest_addoption(parser):
    parser.addoption(
        "--demos", action="store_true", help="run the demos whole and check their scores (minutes each)"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "demo: takes minutes, or shows again what another test does; only with --demos"
    )


# Files that start scripts take minutes: first, so that no process is left with the longest of them at the end.
SLOW = (
    "test_every_script.py",
    "test_t2v_ddpm.py",
    "test_llava_vtt.py",
    "test_longcat_vss.py",
    "test_t2v_rflow.py",
    "test_run_sh.py",
    "test_hub.py",
    "test_nllb_vtt.py",
    "test_vlms.py",
    "test_rflow_wan.py",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
    if not config.getoption("--demos"):
        for item in items:
            if "demo" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes; run with --demos"))


def environment(**variables) -> dict[str, str]:
    """This process's environment without what would change a run, plus `variables`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    clean |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": scripts_path(),
    }
    return clean | {k: str(v) for k, v in variables.items()}


def scripts_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def command(script, *flags, ranks=1, launcher="torchrun") -> list[str]:
    """python for one rank, else torchrun or deepspeed, as a user types them."""
    # below the ports that the kernel gives to outgoing connections
    port = str(20_000 + (os.getpid() * 7 + time.time_ns() // 1000) % 12_000)
    start = {
        "python": [sys.executable],
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", port],
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", port],
    }["python" if ranks == 1 and launcher == "torchrun" else launcher]
    return [*start, str(ROOT / script), *map(str, flags)]


def start(arguments, cwd, **variables) -> subprocess.Popen:
    """A process group of its own, with SIGINT back to normal: CI shells hand it down ignored."""
    return subprocess.Popen(
        arguments, cwd=cwd, env=environment(**variables), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 600) -> tuple[int, str]:
    """(exit code, everything printed). A process that hangs is killed with its group and fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{output}")
    return process.returncode, output


def run(script, *flags, cwd, expect=0, ranks=1, launcher="torchrun", **variables) -> str:
    """Run to the end -> what it printed; fails, showing that, on another exit code than `expect`."""
    code, output = finish(start(command(script, *flags, ranks=ranks, launcher=launcher), cwd, **variables))
    assert code == expect, f"exit code {code}, wanted {expect}:\n{output}"
    return output


def wait_for(condition, timeout: float = 300, what: str = "condition"):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    pytest.fail(f"{what}: not seen in {timeout} s")


def same(a: dict, b: dict) -> bool:
    """The same tensors, bit for bit."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(folder: Path, name: str = "model.safetensors") -> dict:
    """Of the finished model in a run folder"""
    from safetensors.torch import load_file

    return load_file(folder / "model" / name)


def unbroken_runs(tmp_path_factory, script, flags_of):
    """get(ranks) -> run folder of a run that nothing interrupted, made once; flags_of(ranks, run folder).
    Beside it: `output`."""
    done = {}

    def get(ranks: int) -> Path:
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"unbroken{ranks}")
            (folder / "output").write_text(
                run(script, *flags_of(ranks, folder / "run"), cwd=folder, ranks=ranks)
            )
            done[ranks] = folder / "run"
        return done[ranks]

    return get


def kill_at_step_3(script, *flags, folder: Path, cwd: Path, ranks=1) -> None:
    """Start a run into `folder`, and kill -9 all of its processes when step 3 is logged."""
    process = start(command(script, *flags, ranks=ranks), cwd)
    wait_for(
        lambda: '"step": 3' in read(folder / "metrics.jsonl") or process.poll() is not None, what="step 3"
    )
    assert process.poll() is None, f"ended before step 3:\n{process.stdout.read()}"
    for pid in [*children(process.pid), process.pid]:  # torchrun gives each rank a session of its own
        os.kill(pid, signal.SIGKILL)
    process.wait()


def losses(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def children(pid: int) -> list[int]:
    return sorted(int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# Start a script with this in front of it: its process kills itself in the middle of a save.
KILLED = """
import os, runpy, signal, sys
name, nth, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
calls, real = 0, getattr(os, name)

def fatal(target, *rest, **named):  # os.fsync or os.rename: the nth call on a file of the second checkpoint never returns
    global calls
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
    calls += "step_000004" in path
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(target, *rest, **named)

setattr(os, name, fatal)
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def hub_variables(hub, tmp_path, token=WRITE):
    return hub.environment(token) | {"HF_HOME": tmp_path / "home", "HF_USER_ID": "tester"}


# --- An Open-Sora VAE as it is published, of another size

TINY_VAE = dict(filters=32, blocks=1, image_filters=(32, 32, 32, 32), image_blocks=1)


def save_vae(vae, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in vae.state_dict().items()}, folder / "model.safetensors"
    )
    config = {"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17, "sizes": TINY_VAE}
    (folder / "config.json").write_text(json.dumps(config))
