"""What the scripts share: flags, ranks, run folder, frames, DeepSpeed, checkpoints, Hub, and the run itself.

Copying one script into another project? Take this file and the JSON files with it. Functions and a few
records; each function imports what it alone needs, so a script that never opens a video needs no OpenCV.
"""

from __future__ import annotations

import ast
import atexit
import bisect
import collections
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import http.client
import importlib
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
import unicodedata
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np

T = TypeVar("T")
HERE = Path(__file__).absolute().parent  # not resolved: the Hub's cache links each file to another folder
GB = 1e9  # memory is printed in units of 10^9 bytes, as GPU vendors do
CURVES = ("loss", "held_out_loss")  # of metrics.jsonl in loss.png

log = logging.getLogger("video")

# ---------------------------------------------------------------------------
# Flags, and the end of a process
# ---------------------------------------------------------------------------

# What a run that goes on may change, marked at the field of its Config: anything (Free), or to a lower number
# (Lower). Every other field makes it another run. `log_every: Free[int] = 20`
Free = Annotated[T, "free"]
Lower = Annotated[T, "lower"]


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def refuse(message: str) -> NoReturn:
    """A check failed: say it once, with value and next move, and end with exit code 2 before anything is
    written."""
    if rank() == 0:
        print(f"error: {redact(message)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_flags(
    config: type[T],
    doc: str,
    demo: dict,
    variables: dict[str, str],
    bare: dict[str, str] = MappingProxyType({}),
    preset: dict = MappingProxyType({}),
) -> T:
    """The command line as a `config` dataclass: defaults < --demo < `preset` < environment variables < flags.

    `demo` holds the fields that --demo sets, `variables` maps an environment variable to the flag it stands
    for, `bare` a flag to the value that it has when it stands by itself. Accepts the --local_rank=N that the
    deepspeed launcher adds. A bad value or flag ends the process with exit code 2.
    """
    import tyro

    flags = [flag for flag in sys.argv[1:] if not re.match("--local[_-]rank=", flag)]
    for i, flag in enumerate(flags):
        if launcher := re.match(r"--(?:num[_-]gpus|nproc[_-]per[_-]node)(?:=(.*))?$", flag):
            count, script = launcher[1] or "".join(flags[i + 1 : i + 2]) or "N", Path(sys.argv[0]).name
            refuse(f"{flag} is for a launcher, this is one process: ./run.sh {script} {count} starts {count}")
    for flag in bare.keys() & set(flags):
        place = flags.index(flag) + 1
        if place == len(flags) or flags[place].startswith("-"):
            flags.insert(place, bare[flag])
    from_environment = []
    for name, flag in variables.items():
        if os.environ.get(name):
            from_environment += [flag, os.environ[name]]
    default = config(**(demo if "--demo" in flags else {}) | dict(preset))
    return tyro.cli(
        config, args=from_environment + flags, default=default, description=doc, use_underscores=True
    )


def check_settings(
    cfg: Any, at_least_1: str = "", above_0: str = "", shares: str = "", at_least_0: str = ""
) -> None:
    """ValueError for a field of these names that is out of range (`shares`: from 0 to below 1), for two
    sources of data, a DeepSpeed JSON that is not there, and a tracker that is not installed."""
    ranges = (
        (at_least_1, lambda value: value >= 1, "at least 1"),
        (at_least_0, lambda value: value >= 0, "at least 0"),
        (above_0, lambda value: value > 0, "above 0"),
        (shares, lambda value: 0 <= value < 1, "from 0 to below 1"),
    )
    for names, holds, wanted in ranges:
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name} {value}: {wanted}")
    sources = [f"--{name}" for name in ("demo", "manifest", "dataset") if getattr(cfg, name, None)]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(sources)}: the data come from one of them")
    if cfg.deepspeed != "auto" and not Path(cfg.deepspeed).is_file():
        raise ValueError(f"--deepspeed {cfg.deepspeed}: no such file; auto takes what fits")
    if cfg.report_to != "none" and not importlib.util.find_spec(cfg.report_to):
        raise ValueError(f"--report_to {cfg.report_to}: pip install {cfg.report_to}, or --report_to none")


def run(main: Callable[[], Any], torchvision: bool = False) -> NoReturn:
    """Run `main`, then end with the exit code that all scripts share (see README.md) and leave no process
    group behind.

    Under run.sh, rank 0 also writes the code to the file $PYTHON_RUN_STATUS: launchers do not hand codes on
    reliably. torchvision: whether the script's processors need it.
    """
    quiet_libraries()
    if torchvision:
        mend_torchvision()
    else:  # transformers would import it, a second of each start
        sys.modules.setdefault("torchvision", None)
    for number in SIGNALS:
        signal.signal(number, lambda n, _: sys.exit(128 + n))  # inside signals_wait it only takes note
    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str) and rank() == 0:
            print(redact(stop.code), file=sys.stderr, flush=True)
    finally:
        end_distributed(agreed=code in (0, 3))
        if rank() == 0 and os.environ.get("PYTHON_RUN_STATUS"):
            Path(os.environ["PYTHON_RUN_STATUS"]).write_text(str(code))
    atexit._run_exitfuncs()  # W&B ends its run there
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: about 1 finished run in 30 then aborts in torch's C++ destructors, and counts as failed.
    os._exit(code)


def quiet_libraries() -> None:
    """Plain lines on stdout from rank 0, only warnings from the others; no library chatter that a user cannot
    act on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank() == 0 else f"[rank {rank()}] %(message)s"))
    handler.addFilter(hide_secrets)
    log.handlers, log.propagate = [handler], False  # libraries may put a handler on the root
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    libraries = "torch|transformers|deepspeed|huggingface_hub|matplotlib|accelerate|peft|datasets"
    warnings.filterwarnings("ignore", module=rf"({libraries})\b")
    for name in "DeepSpeed transformers huggingface_hub httpx2 httpx accelerate datasets absl".split():
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@functools.cache
def mend_torchvision() -> None:
    """A torchvision that was built for another torch cannot load its operators, and then neither it nor
    transformers can be imported. What processors of videos need of it is plain torch: declare the two
    operators that its import looks for."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return
    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", boxes)


# ---------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------


def init_distributed(timeout_minutes: float = 30):
    """Join the other ranks under deepspeed, torchrun or plain python -> this rank's torch.device.

    A collective that waits longer than `timeout_minutes` ends the run: a hung rank must not hold the machine
    for ever.
    """
    import torch

    if "RANK" not in os.environ:  # plain python: DeepSpeed would look for MPI and die
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))  # a free port, so that two debug runs can share the machine
            port = free.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(port))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_deepspeed()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        # gloo does; else the first run compiles C++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    control_group()
    return device


def import_deepspeed() -> Any:
    """Without the second of each start in which its Muon, which no script takes, goes to torch.compile"""
    import torch

    compiler, torch.compile = torch.compile, lambda plain=None, **_: plain or (lambda plain: plain)
    try:
        import deepspeed.ops

        with contextlib.suppress(ImportError):  # of another version
            import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        torch.compile = compiler
    return deepspeed


@functools.cache
def control_group():
    """A gloo group for small messages between hosts' CPUs. It waits for a day: rank 0 may be decoding or
    downloading."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def local_ranks(unknown: int = 1) -> int:
    """How many ranks this machine has, as torchrun and deepspeed tell it"""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or unknown)


def is_distributed() -> bool:
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_available() and dist.is_initialized())


def end_distributed(agreed: bool) -> None:
    """Leave the process group; `agreed`: all ranks get here, so wait for them (else a rank may abort after
    its work)."""
    if is_distributed():
        import torch.distributed as dist

        if agreed:
            barrier()
        dist.destroy_process_group()


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier(group=control_group())


def over_ranks(value: float, how: str) -> float:
    """The "max", "mean" or "sum" of a number over all ranks, the same on each."""
    import torch
    import torch.distributed as dist

    box = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=control_group())
    return box.item() / (world_size() if how == "mean" else 1)


def from_all_ranks(value: T) -> list[T]:
    """[the value of rank 0, of rank 1, ...], the same on each; for small objects."""
    import torch.distributed as dist

    if not is_distributed():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def merged_over_ranks(part: dict) -> dict:
    """Every rank's entries in one dict, sorted by key: the same on each rank, and for any number of ranks."""
    together: dict = {}
    for entries in from_all_ranks(part):
        together |= entries
    return dict(sorted(together.items()))


def rounds(count: int, size: int) -> Iterator[list[int]]:
    """Every rank: which of `count` items it does next, at most `size` at a time, until all are done.

    Equally often on each rank, since under ZeRO-3 all go through the model together: a rank for which nothing
    is left does an item that another does too, so results are kept by item (merged_over_ranks). Between two
    rounds a signal ends it, see stop_if_asked.
    """
    for start in range(0, count, size * world_size()):
        stop_if_asked()
        yield list(range(start + rank(), min(start + size * world_size(), count), world_size())) or [start]


_rank0_alone = False  # inside on_rank0: no other rank would answer


def on_rank0(call: Callable[..., T]) -> Callable[..., T]:
    """Decorator: the function runs on rank 0 alone; every rank gets its result, or ends with its exit code.

    Inside, others so decorated are plain calls.
    """

    @functools.wraps(call)
    def on_one(*args: Any, **named: Any) -> T:
        global _rank0_alone
        if _rank0_alone or world_size() == 1 or not is_distributed():
            return call(*args, **named)
        import torch.distributed as dist

        outcome: list = [None, 1]  # result, exit code: 1 where rank 0 dies of an error
        try:
            if rank() == 0:
                _rank0_alone = True
                outcome = [call(*args, **named), None]
        except SystemExit as stop:
            outcome[1] = stop.code
            raise
        finally:
            _rank0_alone = False
            dist.broadcast_object_list(outcome, src=0, group=control_group())
        if outcome[1] is not None:
            raise SystemExit(outcome[1])
        return outcome[0]

    return on_one


# ---------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = tuple(128 + number for number in SIGNALS)  # exit codes
_signals: list[int] = []  # that came inside signals_wait


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Inside, where a step or a save must not be broken off, a signal waits until stop_if_asked; elsewhere it
    ends the process at once."""
    before = [signal.signal(number, lambda n, _: _signals.append(n)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


def asked_to_stop() -> int:
    """Every rank, or rank 0 alone inside on_rank0: the number of a signal that came to any of them, else
    0."""
    number = max(_signals, default=0)
    return number if _rank0_alone or world_size() == 1 else int(over_ranks(number, "max"))


def stop_if_asked() -> None:
    """Between two batches of what takes long. Every rank, equally often: ends with 128 + n after signal n."""
    if number := asked_to_stop():
        raise SystemExit(128 + number)


# ---------------------------------------------------------------------------
# Run folder
# ---------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, also after a power cut: written aside, flushed, then renamed."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


def append_json(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, default=str) + "\n")


def settings(cfg: Any) -> dict:
    """The configuration as JSON has it: paths are strings."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def fingerprint(rows: Iterable[Any]) -> str:
    """Of rows of data, or a table: the same content has the same, wherever its file lies."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode(errors="replace") + b"\n")
    return digest.hexdigest()[:32]


def digest_of(text: str) -> str:
    """What a file of a cache is called that is made of what `text` says"""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_lock: dict[Path, int] = {}  # open for as long as the process lives


def lock_folder(folder: Path, pids: list[int]) -> None:
    """Rank 0: `folder`, made if need be, is this run's until the process ends. Exit 2, with host and pids,
    when another run has it: its ranks may have outlived the run.sh that started them."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock[folder] = lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"another run is writing to {folder}: {holder_of(path)}; or give another --output_dir")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            refuse(f"--output_dir {folder}: {error.strerror}")
        lock_without_flock(path)
    os.truncate(lock, 0)
    os.pwrite(lock, json.dumps({"host": socket.gethostname(), "pids": pids}).encode(), 0)


def holder_of(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text())
        return f"on {holder['host']}; stop it there with: kill {' '.join(map(str, holder['pids']))}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its lock does not say where"


def lock_without_flock(path: Path) -> None:
    """On a file system without flock (Lustre, some NFS) the file's content is the lock."""
    log.warning(
        f"warning: {path.parent} lies on a file system without flock: its lock is a file with host and pid"
    )
    try:
        holder = json.loads(path.read_text() or "{}")
    except ValueError:
        holder = {}
    mine = holder.get("host") == socket.gethostname()
    if holder and not (mine and not any(Path(f"/proc/{pid}").exists() for pid in holder["pids"])):
        refuse(f"another run is writing to {path.parent}: {holder_of(path)}; if it is gone, delete {path}")
    atexit.register(lambda: os.truncate(path, 0))


def check_same_run(cfg: Any) -> None:
    """Rank 0: exit 2 when cfg.output_dir holds a run that differs in more than Free and Lower fields
    allow."""
    path = cfg.output_dir / "config.json"
    try:
        was = json.loads(path.read_text())
        assert isinstance(was, dict)
    except FileNotFoundError:
        return
    except (ValueError, AssertionError):
        log.warning(f"warning: {path} is broken, after a power cut perhaps: not compared")
        return
    marks = typing.get_type_hints(type(cfg), include_extras=True)
    refused, changed = [], []
    for name, now in settings(cfg).items():
        before = was.get(name)
        if before == now:
            continue
        mark = getattr(marks[name], "__metadata__", ())
        allowed = "free" in mark or ("lower" in mark and isinstance(before, int) and now < before)
        (changed if allowed else refused).append(f"{name}: {before} there, {now} here")
        if "lower" in mark and not allowed:
            refused[-1] += " (it may only go down)"
        elif "lower" in mark:
            changed[-1] += (
                " (from here on batches are cut anew: some samples of this epoch come twice, others not)"
            )
    if refused:
        listed = "\n  ".join(refused)
        refuse(
            f"{cfg.output_dir} holds a run with another configuration:\n  {listed}\n"
            "give the same flags to go on with it, or another --output_dir to start anew"
        )
    if changed:
        log.info(f"goes on with other settings than before: {'; '.join(changed)}")


def environment() -> dict:
    """What a reader needs to repeat the run: versions, device, revision, command. No variables: they hold
    secrets."""
    import torch

    versions = {}
    packages = "torch deepspeed transformers huggingface_hub safetensors numpy opencv-python-headless av"
    for name in packages.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    revision = ""
    if shutil.which("git"):
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "command": redact(command_line()),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "world_size": world_size(),
        "git_revision": revision,
    }


def command_line() -> str:
    """What was typed: run.sh says how it was called."""
    return os.environ.get("PYTHON_RUN_COMMAND") or shlex.join(
        ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
    )


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_results(folder: Path) -> dict:
    """results.json, {} where there is none that is whole"""
    try:
        return dict(json.loads((folder / "results.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_loss_curve(folder: Path, ylabel: str) -> None:
    """loss.png: the curves of metrics.jsonl."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if name in row]
        marker = "o" if len(points) == 1 else None
        axes.plot(
            *zip(*points) if points else ((), ()), label=name.replace("_", "-"), linewidth=1, marker=marker
        )
    axes.set(xlabel="step", ylabel=ylabel, yscale="log")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=100)


def disk_free(folder: Path) -> int:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def tracker(
    report_to: str, folder: Path, name: str, shared: bool = False, primary: bool = True
) -> Callable[[dict, int | None], Any]:
    """-> log(values, step) for `none`, `tensorboard` or `wandb`; rank 0 alone. A value may be the path of a
    video.

    A resumed run goes on in the same W&B run. `shared`: several processes write into it, of which one is
    `primary`.
    """
    if report_to == "wandb":
        import wandb

        if not (known := folder / "wandb_id").exists():
            known.write_text(hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12])
        how = None
        if shared and not os.environ.get("WANDB_MODE"):  # a run that is offline cannot be shared
            how = wandb.Settings(mode="shared", x_primary=primary, x_label="train" if primary else "watch")
        wandb.init(
            project=name, name=folder.name, dir=folder, id=known.read_text(), resume="allow", settings=how
        )

        def write(values: dict, step: int | None) -> None:
            shown = {k: wandb.Video(str(v)) if isinstance(v, Path) else v for k, v in values.items()}
            wandb.log(shown, step=step)

        return write
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")

        def add(values: dict, step: int | None) -> None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)

        return add
    return lambda values, step: None


# ---------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------


def read_json_lines(path: Path) -> list[tuple[int, dict]]:
    """[(line number, object)] of a file of JSON lines, blank lines skipped; exit 2 with the number of a line
    that is none."""
    rows = []
    # bytes: one bad line must not hide
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)  # UTF-8 as well
            except ValueError as error:
                refuse(f"{path}:{number}: not JSON ({error}): {line[:80]!r}")
            if not isinstance(value, dict):
                refuse(f"{path}:{number}: a JSON object is wanted: {line[:80]!r}")
            rows.append((number, value))
    return rows


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        refuse(f"{path} is not JSON: {error}")
    return (
        value
        if isinstance(value, dict)
        else refuse(f"{path}: a JSON object is wanted, this is a {type(value).__name__}")
    )


def leave_out(source: Any, good: int, bad: list[dict], max_bad: float) -> None:
    """Say which samples are left out; exit 2 when that are more than the share `max_bad`, or all."""
    first = "".join(f"\n  {': '.join(b.values())}" for b in bad[:5])
    first += f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    if not good:
        refuse(f"{source}: none of {len(bad)} samples is usable:{first}" if bad else f"{source}: is empty")
    if len(bad) > max_bad * (good + len(bad)):
        share = f"{len(bad)} of {good + len(bad)} samples are bad, more than --max_bad {max_bad}"
        refuse(f"{source}: {share}:{first}")
    if bad:
        log.warning(f"warning: {len(bad)} of {good + len(bad)} samples are left out:{first}")


def split_clips(
    videos: list[str], parts: list[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of rows to (train on, hold out), by video and never by row: the data set's own split (`parts`,
    as split_of gives them; a video that lies in both is trained on), else a random `fraction` of the videos,
    at least one of two."""
    if "held_out" in parts:
        trained = {video for video, part in zip(videos, parts) if part != "held_out"}
        held_out = {video for video in videos if video not in trained}
    else:
        unique = list(dict.fromkeys(videos))
        count = min(len(unique) - 1, max(1, round(fraction * len(unique)))) if fraction else 0
        held_out = {unique[i] for i in np.random.default_rng(seed).permutation(len(unique))[:count]}
    rows = range(len(videos))
    return [i for i in rows if videos[i] not in held_out], [i for i in rows if videos[i] in held_out]


UNDIVIDED = tuple("CJK HIRAGANA KATAKANA THAI LAO KHMER MYANMAR TIBETAN".split())


@functools.lru_cache(maxsize=1 << 16)
def kind_of(letter: str) -> str:
    """What a letter is to `words`: "word" for letters and digits, "alone" for those of scripts without blanks
    between words, where each counts as one, "mark" for what belongs to the letter before it, else nothing"""
    category, name = unicodedata.category(letter)[0], unicodedata.name(letter, "")
    if category in "LN" or letter == "_":
        return "alone" if name.startswith(UNDIVIDED) else "word"
    return "mark" if category == "M" else ""


def words(text: str) -> list[str]:
    """In lower case; each letter of a script without blanks between words is one."""
    text = text.lower()
    if text.isascii():
        return re.findall(r"\w+", text)
    found, before = [], ""
    for letter in text:
        kind = kind_of(letter)
        if found and before and (kind == "mark" or kind == before == "word"):
            found[-1] += letter
            continue
        if kind in ("word", "alone"):
            found.append(letter)
        before = kind
    return found


def is_undivided(texts: Iterable[str]) -> bool:
    """Whether most letters of these texts are of scripts without blanks between words"""
    kinds = [kind_of(letter) for text in texts for letter in text]
    return kinds.count("alone") > kinds.count("word")


def answer_scores(said: list[str], wanted: list[str]) -> dict[str, float]:
    """Of answers against references, each 0 to 1: exact (see normalized), BLEU (Post 2018), chrF (Popovic
    2015), ROUGE-1, -2 and -L F (Lin 2004). BLEU goes by characters where words are not divided."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU, CHRF

    class Words:  # rouge-score's own tokenizer knows the Latin alphabet alone
        tokenize = staticmethod(words)

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Words)
    rouge = [scorer.score(right, answer) for answer, right in zip(said, wanted)]
    # effective order: one word has no 4-grams
    bleu = BLEU(effective_order=True, tokenize="char" if is_undivided(wanted) else "13a")
    exact = [normalized(answer) == normalized(right) for answer, right in zip(said, wanted)]
    return {
        "exact": float(np.mean(exact)),
        "bleu": bleu.corpus_score(said, [wanted]).score / 100,
        "chrf": CHRF().corpus_score(said, [wanted]).score / 100,
        **{
            f"rouge_{name[5:].lower()}": float(np.mean([one[name].fmeasure for one in rouge]))
            for name in names
        },
    }


def normalized(text: str) -> str:
    """Without case, blanks too many and a full stop at the end: what exact match compares."""
    return " ".join(text.lower().split()).rstrip(".")


def pad(rows: list[list[int]], value: int, left: bool = False) -> Any:
    """Rows of several lengths -> a tensor (rows, longest), filled with `value` on the right or left."""
    import torch

    width = max(map(len, rows))
    return torch.tensor(
        [[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows]
    )


def made_once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Rank 0: a folder of the cache, whole or absent: `make(path)` fills it aside when it is not there. Of
    two runs that make it at once, one comes first, and both use that."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make(aside)
        aside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def demo_module(name: str) -> Any:
    """demos/<name>.py, which makes up what --demo trains on. Exit 2 where a script was copied without it."""
    if not (HERE / "demos" / f"{name}.py").is_file():
        refuse(
            f"{HERE}/demos/{name}.py is not there: --demo and generated clips need the folder demos/ of the "
            f"repository that {Path(sys.argv[0]).name} comes from, beside the script"
        )
    return importlib.import_module(f"demos.{name}")


def tiny_model(cfg: Any, script: str, build: Callable[[Path, int], None], kind: str = "") -> str:
    """Rank 0: a demo's model, built once into the cache: a folder, loaded as the real one is."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    name = f"{Path(script).stem}_tiny{kind and f'_{kind}'}_{cfg.seed}_1"  # 1: version of what is built
    return str(made_once(cfg.cache_dir / name, lambda aside: build(aside, cfg.seed)))


# ---------------------------------------------------------------------------
# Rows: whatever form the data have
# ---------------------------------------------------------------------------

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# What columns are called, in any case; the first that has something in it counts. The next data set that
# calls a thing otherwise is a word here.
NAMES = {
    "video": "video videos video_path video_file file_name path file media_path file_path media video_url "
    "contenturl url clip_id video_id videoid video_name vid youtubeid image image_path image_url image_id",
    "caption": "caption captions text description dense_caption short_caption sentence sentences",
    "question": "question query prompt instruction q",
    "answer": "answer response completion output a correct_answer correct_choice",
    "turns": "messages conversations conversation",
    "pairs": "qa qa_pairs",
    "options": "options choices candidates",
    "kind": "kind question_type",
    "split": "split subset",
    "start": "start start_time start_sec start_timestamp video_start clip_start",
    "end": "end end_time end_sec end_timestamp video_end clip_end",
    "segments": "timestamp timestamps",
    "num_frames": "num_frames frame frame_number frame_count",
    "height": "height",
    "width": "width",
    "fps": "fps",
}
MEANING = {name: (what, i) for what, names in NAMES.items() for i, name in enumerate(names.split())}
OPTION = re.compile(r"(?:option[ _]?|a)\d|[A-H]")  # a column for each: NExT-QA, EgoSchema
# What stands for the frames in a question, whose place is known: LLaVA's, Qwen's and their kin
MARKS = re.compile(r"<\|?(?:vision_start|vision_end|(?:image|video|vid|img)(?:_pad|-?\d+)?)\|?>")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
DEFAULT_QUESTION = "What happens in this video?"
# What is trained on when nothing is given: (file, caption, split), as a first look at a rented box.
CATS = "https://huggingface.co/datasets/diffusion-datasets/sample-videos/resolve/main"
BREEZES = "https://assets.rapidata.ai/hailuo-02_scene-motion"
SAMPLES = [
    (f"{CATS}/sample1.mp4", "a cat", "train"), (f"{CATS}/sample2.mp4", "a cat", "held_out"),
    (f"{BREEZES}_0059.gif", "a breeze over grapes", "train"),
    (f"{BREEZES}_0008.gif", "a breeze over books", "held_out"),
]  # fmt: skip
CELL = "#row="  # x.parquet#row=17:video, a video that lies in a table

Records = Iterator[tuple[str, int, Any]]  # where it is in, the number there, the row or what is wrong with it


class QA(NamedTuple):
    question: str
    answer: str
    kind: str = ""  # what is asked for, where the data say so: the table at the end has a line for each
    follows: bool = False  # the question before, of one conversation


@dataclass(slots=True)  # slots: there may be millions
class Row:
    """A video, or a part of one, and what the data say of it; empty or 0 where they say nothing."""

    source: str  # "clips.csv:", with `line` where it stands
    line: int
    video: str = ""  # path or URL; where no file is wanted what it is called
    texts: list = field(default_factory=list)  # captions, or QA: what was asked for
    split: str = ""  # as split_of gives it
    start: float = 0.0  # seconds; the part of the video that is meant
    end: float = math.inf
    num_frames: float = 0.0
    height: float = 0.0
    width: float = 0.0
    fps: float = 0.0
    cells: tuple = ()  # of the columns that the script asked for by name; None where there is nothing

    @property
    def where(self) -> str:
        return f"{self.source}{self.line}" if self.line else self.source

    @property
    def part(self) -> str:
        """How it is said; "" for all of the video"""
        return "" if (self.start, self.end) == (0, math.inf) else f" from {self.start:g} to {self.end:g} s"

    def left_out(self, reason: Any) -> dict:
        video = {"video": without_query(self.video)} if self.video else {}
        return {"where": self.where, **video, "reason": str(reason)}


def is_url(video: str) -> bool:
    return video.startswith(("http://", "https://", "hf://"))


def without_query(video: str) -> str:
    """As it may be shown: the query of a signed URL opens the file to whoever reads it."""
    return f"{video.partition('?')[0]}?..." if is_url(video) and "?" in video else video


# Files to records


def records_of(source: Path, flag: str = "--manifest", bare: bool = False) -> Records:
    """The rows of a file or folder, with `bare` also of one that has videos alone. Exit 2 if there is none,
    or it is of no known form."""
    suffix = source.suffix.lower()
    if source.is_dir():
        return folder_records(source, flag, bare)
    if not source.is_file():
        refuse(f"{flag} {source}: no such file or folder (looked in {Path.cwd()})")
    if source.name.lower() in ("prompts.txt", "videos.txt"):
        return folder_records(source.parent, flag)
    if suffix not in TABLES:
        refuse(f"{flag} {source}: {', '.join(TABLES)} are read, and folders of videos beside their texts")
    if suffix in (".csv", ".tsv"):
        return with_captions(csv_records(source), source.parent)
    return parquet_records(str(source)) if suffix == ".parquet" else json_records(source)


def open_text(source: Path) -> Any:
    """With or without a BOM. A byte that is not UTF-8 becomes half a character, and its row a bad one."""
    with source.open("rb") as file:
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding, errors = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
    return source.open(encoding=encoding, errors=errors, newline="")


def csv_records(source: Path) -> Records:
    """By its header. A quote that does not end spoils its own row, not those behind it."""
    taken, again = [], collections.deque()  # lines of the row that is being read; lines to read once more
    with open_text(source) as file:

        def lines() -> Iterator[str]:
            while again:
                taken.append(again.popleft())
                yield taken[-1]
            for line in file:
                taken.append(line)
                yield line

        again.append(first := next(file, ""))
        delimiter = "\t" if source.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        header, number, place = None, 1, f"{source}:"
        while True:  # once more after each row that is none
            try:
                for cells in csv.reader(lines(), delimiter=delimiter, strict=True):
                    if header is None:
                        header = [cell.strip() for cell in cells]
                    elif len(cells) == len(header):
                        yield place, number, dict(zip(header, cells))
                    elif cells:
                        yield place, number, f"{len(cells)} cells, {len(header)} columns"
                    number += len(taken)
                    taken.clear()
                return
            except csv.Error as error:
                yield place, number, f"not {source.suffix[1:].upper()} (a quote that does not end? {error})"
                again.extendleft(reversed(taken[1:]))
                number += 1
                taken.clear()


def with_captions(records: Records, folder: Path) -> Records:
    """A table of videos alone, as MSR-VTT's train.9k.csv: with the captions of the annotation beside it"""
    captions: dict[str, list[Any]] | None = None
    for place, number, row in records:
        if isinstance(row, dict) and len(row) == 1 and columns_of(tuple(row)).keys() == {"video"}:
            if captions is None:
                captions = {}
                annotations = itertools.chain.from_iterable(map(json_records, sorted(folder.glob("*.json"))))
                for said in (said for *_, said in annotations if isinstance(said, dict)):
                    name = str(said.get("video_id", said.get("image_id")))
                    captions.setdefault(name, []).append(said.get("caption"))
            row["captions"] = captions.get(*row.values())
        yield place, number, row


def json_records(source: Path) -> Records:
    """JSON lines, an array, or an object that holds the rows."""
    with open_text(source) as file:
        is_array = file.read(64).lstrip().startswith("[")
    if is_array or source.suffix.lower() == ".json":
        try:
            with open_text(source) as file:
                rows = rows_in(json.loads(file.read()))
            place = f"{source}, row "
            yield from ((place, number, row) for number, row in enumerate(rows, 1))
            return
        except (ValueError, RecursionError) as error:
            if is_array:
                refuse(f"{source} is not JSON: {error}")
    place = f"{source}:"
    with open_text(source) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield place, number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield place, number, f"not JSON ({error}): {line[:60]!r}"


def rows_in(value: Any) -> list:
    """Of an array, of MSR-VTT's annotation in both of its forms, of {"data": [rows]} or ActivityNet's {video:
    row}; any other object is a row itself."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = [value.get(name) for name in ("data", "annotations", "sentences")]
    rows = next((rows for rows in lists if isinstance(rows, list) and rows), None)
    if rows is None or not all(isinstance(row, dict) for row in rows):
        if not value or not all(isinstance(row, dict) for row in value.values()):
            return [value]
        return [{"video_id": name} | row for name, row in value.items()]
    videos = filter(
        lambda video: isinstance(video, dict), items_of(value.get("videos") or value.get("images"))
    )
    splits = {str(video.get("video_id", video.get("id"))): video.get("split") for video in videos}
    return [{"split": splits.get(str(row.get("video_id", row.get("image_id"))))} | row for row in rows]


@functools.lru_cache(maxsize=2)  # of a table on the Hub each opening asks for its footer again
def open_parquet(source: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        refuse(f"{source}: pip install pyarrow, or convert it to JSON lines")
    from huggingface_hub import HfFileSystem

    try:
        return pyarrow.parquet.ParquetFile(HfFileSystem().open(source) if is_url(source) else source)
    except (pyarrow.ArrowInvalid, OSError) as error:
        refuse(f"{source} is not parquet: {brief(error)}")


def parquet_records(source: str) -> Records:
    """A path or a URL of the Hub. Videos that lie in it are left there: video_in_table fetches one."""
    file, number, place = open_parquet(source), 0, f"{source}, row "
    kinds = zip(file.schema_arrow.names, map(str, file.schema_arrow.types))
    inside = [name for name, kind in kinds if "binary" in kind]
    others = [name for name in file.schema_arrow.names if name not in inside]
    for batch in file.iter_batches(4096, columns=others):
        for row in batch.to_pylist():
            row |= {name: f"{source}{CELL}{number}:{name}" for name in inside}
            yield place, (number := number + 1), row


def saved_records(folder: Path) -> Records:
    """What the library datasets has saved"""
    from datasets import DatasetDict, Video, load_from_disk

    loaded = load_from_disk(folder)
    for name, part in loaded.items() if isinstance(loaded, DatasetDict) else [("", loaded)]:
        inside = [column for column, kind in part.features.items() if isinstance(kind, Video)]
        for number, row in enumerate(part.remove_columns(inside)):
            row |= {column: f"{folder / name}{CELL}{number}:{column}" for column in inside}
            yield f"{folder / name}, row ", number + 1, {"split": name} | row


_tables_lock = threading.Lock()  # rows are asked for in order: one thread reads a group, for all


@functools.lru_cache(maxsize=1)
def parquet_group(source: str, group: int, column: str) -> list[Any]:
    return open_parquet(source).read_row_group(group, [column])[column].to_pylist()


def video_in_table(cell: str, folder: Path) -> Path:
    """A file in `folder` of the video that lies in a cell"""
    target = folder / f"{digest_of(cell)}.mp4"
    if target.exists():
        return target
    source, _, place = cell.partition(CELL)
    number, column = int(place.partition(":")[0]), place.partition(":")[2]
    if source.lower().endswith(".parquet"):
        with _tables_lock:
            meta, group = open_parquet(source).metadata, 0
            while number >= (rows := meta.row_group(group).num_rows):
                group, number = group + 1, number - rows
            video = parquet_group(source, group, column)[number]
    else:
        from datasets import Video, load_from_disk

        video = load_from_disk(source).cast_column(column, Video(decode=False))[number][column]
    if isinstance(video, dict):
        video = video["bytes"] or Path(video["path"]).read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda aside: aside.write_bytes(video))
    return target


def hub_file(url: str, folder: Path | None = None) -> Path:
    """The file behind a URL of the Hub, in `folder` or in the Hub's cache. Raises OSError."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    at = HfFileSystem().resolve_path(url)
    where = {"repo_type": "dataset", "revision": at.revision, "local_dir": folder}
    return Path(hf_hub_download(at.repo_id, at.path_in_repo, **where))


def dataset_records(cfg: Any) -> Records:
    """--dataset ID[:config][:split] of the Hub, or a folder, also one that the library datasets has saved.
    Its tables are read by our own readers, which keep their line numbers; videos stay where they are."""
    folder, (repo, config, split) = Path(cfg.dataset), [*cfg.dataset.split(":"), "", ""][:3]
    if folder.is_dir() and not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        yield from records_of(folder, "--dataset")
        return
    try:
        from datasets import load_dataset_builder
    except ImportError:
        refuse(f"--dataset {cfg.dataset}: pip install datasets")
    if folder.is_dir():
        yield from saved_records(folder)
        return
    try:
        parts = load_dataset_builder(repo, config or None).config.data_files or {}
    except (OSError, ValueError) as error:  # a missing repository is an OSError too
        refuse(f"--dataset {cfg.dataset}: {brief(error)}")
    tables = [(str(name), str(url)) for name, urls in parts.items() for url in urls if split in ("", name)]
    tables = [(name, url) for name, url in tables if url.lower().endswith(TABLES)]
    if not tables:
        there = f"splits {', '.join(map(str, parts))}; tables are {', '.join(TABLES)}"
        refuse(f"--dataset {cfg.dataset}: no table in it ({there}): download it, and give it as --manifest")
    for name, url in tables:
        is_parquet = url.lower().endswith(".parquet")
        table = url if is_parquet else str(hub_file(url))
        for place, number, row in parquet_records(url) if is_parquet else records_of(Path(table)):
            if isinstance(row, dict):
                if not cfg.videos:
                    row = {column: on_hub(value, column, url) for column, value in row.items()}
                row = ({"split": name} if len(parts) > 1 and not split else {}) | row
            yield place.replace(table, url), number, row


def on_hub(value: Any, column: str, table: str) -> Any:
    """The URL of a video that a table of the Hub names by its path in the repository, or, as videofolder's
    file_name, beside the table; any other cell as it is."""
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or is_url(path) or not path.lower().endswith(VIDEO_SUFFIXES):
        return value
    root = table.rpartition("/")[0] if column == "file_name" else "/".join(table.split("/")[:5])
    return f"{root}/{path}"


def files_below(folder: Path) -> Iterator[Path]:
    """In order, hidden ones left out, through links, but no folder twice"""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        if real not in seen:
            yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))
        seen.add(real)


def folder_records(folder: Path, flag: str, bare: bool = False) -> Records:
    """videofolder's metadata.csv or .jsonl (also one for each split), prompts.txt with videos.txt, videos
    beside x.json or x.txt, or tables named by their split; below it too. Where there is no video, pictures
    are."""
    files = list(files_below(folder))
    tables, videos, pictures = (
        [path for path in files if path.suffix.lower() in suffixes]
        for suffixes in (TABLES, VIDEO_SUFFIXES, PICTURE_SUFFIXES)
    )
    videos = videos or pictures
    beside: dict[Path, dict[str, Path]] = {}
    for path in files:
        beside.setdefault(path.with_suffix(""), {})[path.suffix.lower()] = path
    metadata = [path for path in tables if path.stem.lower() == "metadata"]
    prompts, paths = folder / "prompts.txt", folder / "videos.txt"
    if not metadata and prompts.is_file() and paths.is_file():
        lines = (open_text(file).read().split("\n") for file in (paths, prompts))
        for number, (video, text) in enumerate(itertools.zip_longest(*lines, fillvalue=""), 1):
            if video.strip() or text.strip():
                yield f"{paths}:", number, {"video": video.strip(), "text": text}
    elif not metadata and any({".json", ".txt"} & beside[video.with_suffix("")].keys() for video in videos):
        yield from (sidecar_record(video, folder, beside[video.with_suffix("")]) for video in videos)
    elif tables := metadata or [path for path in tables if path.parent == folder]:
        for table in tables:
            inside = table.parent.relative_to(folder)
            split = split_of(inside.name or table.stem) if len(tables) > 1 else ""
            for place, number, row in records_of(table, flag):
                if isinstance(row, dict):
                    row = {"split": split} | row
                    if inside.name and isinstance(name := row.get("file_name"), str):
                        row["file_name"] = str(inside / name)
                yield place, number, row
    elif bare and videos:
        yield from ((str(video), 0, {"video": str(video.relative_to(folder))}) for video in videos)
    else:
        kinds = ", ".join(sorted({path.suffix.lower() or path.name for path in files})[:8]) or "nothing"
        refuse(
            f"{flag} {folder}: no videos beside x.json or x.txt, no metadata.csv or .jsonl, no prompts.txt "
            f"with videos.txt, no table; {len(files)} files in it and below ({kinds}), {len(videos)} of them "
            f"videos{' (t2v_ddpm.py --caption_dropout 1 needs no texts)' if videos else ''}"
        )


def sidecar_record(video: Path, folder: Path, beside: dict[str, Path]) -> tuple[str, int, Any]:
    """beside: {ending: file} of that name"""
    name, row = video.relative_to(folder), {}
    if side := beside.get(".txt"):
        row["text"] = " ".join(open_text(side).read().split())
    if side := beside.get(".json"):
        try:
            row |= json.loads(open_text(side).read())
        except (ValueError, TypeError, RecursionError) as error:
            return str(side), 0, f"not a JSON object ({error})"
    if not row:
        return str(video), 0, "no x.json or x.txt beside it"
    split = split_of(name.parts[0]) if len(name.parts) > 1 else ""
    return str(video), 0, {"split": split} | row | {"video": str(name)}


def sample_records() -> Records:
    """The public samples; $SAMPLES_URL is a mirror that has the four files."""
    mirror = os.environ.get("SAMPLES_URL", "").rstrip("/")
    for url, answer, split in SAMPLES:
        url = f"{mirror}/{url.rsplit('/', 1)[1]}" if mirror else url
        yield url, 0, {"video": url, "caption": answer, "split": split}


# What the columns of a record mean


@functools.lru_cache(maxsize=4096)
def columns_of(names: tuple[Any, ...]) -> dict[str, list[str]]:
    """{what: the columns that mean it, the most telling first}"""
    called = {name: str(name).strip().lower() for name in names}
    found: dict[str, list[str]] = {}
    for name in sorted(called, key=lambda name: MEANING.get(called[name], ("", 0))[1]):
        if called[name] in MEANING:
            found.setdefault(MEANING[called[name]][0], []).append(name)
    if "contenturl" in called.values() and "name" in called:  # WebVid's captions
        found["caption"] = ["name"]
    each = [name for name in names if OPTION.fullmatch(str(name))]
    return found | ({"each option": each} if len(each) > 1 else {})


def cell_of(row: dict, columns: dict[str, list[str]], what: str) -> Any:
    """The first of the columns that mean `what` that has something in it, or None."""
    for name in columns.get(what, ()):
        if not is_empty(row[name]):
            return row[name]
    return None


def is_empty(value: Any) -> bool:
    """Also what pandas makes of a cell without anything in it"""
    return value is None or value == "" or value == [] or value != value or value == "nan"


def text_of(value: Any, what: str) -> str:
    """true is "yes", false "no"; BadSample for what is no text, or half a character"""
    if isinstance(value, str):
        text = value.strip()
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadSample(f"{what} is not UTF-8, or has half of a character: {text[:40]!r}") from None
        return text
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)
    raise BadSample(f"{what} is a {type(value).__name__}, text is wanted")


def items_of(value: Any) -> list:
    """A list, also one written into a cell; anything else is one item."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and value.startswith("[") and value.rstrip().endswith("]"):
        try:
            items = json.loads(value)
        except (ValueError, RecursionError):
            try:
                items = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return [value]  # a text in brackets
            if re.search(r"""['"]\s+['"]""", value):
                raise BadSample(f"a list without commas: {value[:40]!r}") from None
        return items if isinstance(items, list) else [value]
    return [value]


def seconds_of(value: Any, what: str) -> float:
    """12.5, or "0:00:12.5" """
    try:
        parts = [float(part) for part in str(value).split(":")]
        seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise BadSample(f"{what} {str(value)[:20]!r}: seconds are wanted, or h:mm:ss")
    return seconds


@functools.lru_cache(maxsize=1 << 16)  # of millions of rows most have the same few sizes
def number_of(value: Any) -> float:
    """Of a cell; 0 if it holds none, or none that is finite and above 0."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return 0.0
    return value if 0 < value < 1e9 else 0.0


def split_of(name: Any) -> str:
    """The part that a split's name means: "held_out" (validation, test and the like), "train" (others), or ""
    for no name"""
    names = r"(held_out|val(id(ate|ation)?)?|test(ing)?|eval(uation)?|dev)(?![a-z])"
    return "held_out" if re.match(names, name.lower()) else "train" if name else ""


def without_marks(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", MARKS.sub("", text)).strip() if "<" in text else text


def turns_of(messages: Any, row: dict, notes: collections.Counter) -> list[tuple[str, str]]:
    """[(question, answer)] of LLaVA's conversations, or of messages as TRL and Qwen have them. A video among
    the parts of a content, and its times, go to `row`, where they are looked for."""
    turns: list[list[str]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadSample("a conversation of other things than messages")
        role = str(message.get("role") or message.get("from"))
        content = message["content"] if "content" in message else message.get("value")
        texts = []
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else "text"
            if kind in ("video", "video_url"):
                row |= {name: part[name] for name in ("video_start", "video_end") if name in part}
                clip = part.get(kind) or part.get("path") or part.get("url")
                clip = clip.get("url") if isinstance(clip, dict) else clip
                videos = items_of(row.get("videos") or [])
                row["videos"] = videos + ([clip] if clip and clip not in videos else [])
            elif kind == "text":
                text = part.get("text") if isinstance(part, dict) else part
                texts.append(text_of(text, f"the turn of {role}"))
            else:
                raise BadSample(f"a part of type {kind!r} in a message: text and video are taken")
        text = without_marks("\n".join(filter(None, texts)))
        if role == "system":
            notes["a system turn, which is left out"] += 1
        elif ROLES.get(role) == "user" and not (turns and len(turns[-1]) == 1):
            turns.append([text])
        elif ROLES.get(role) == "assistant" and turns and len(turns[-1]) == 1:
            turns[-1].append(text)
        else:
            raise BadSample(f"a turn of {role!r} where one of {'assistant' if turns else 'user'} is wanted")
    if not turns or len(turns[-1]) == 1:
        raise BadSample("a conversation without an answer at its end")
    return [(question, answer) for question, answer in turns]


def choice_of(question: str, answer: Any, options: list, by_number: bool) -> tuple[str, str]:
    """Multiple choice: the options become part of the question, and the answer the text of its option. It may
    be given as that, as a letter or as a number from 0 on; BadSample where it is not clear which."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    texts = [re.sub(rf"^\(?[{letters}][.):]\s+", "", text_of(option, "an option")) for option in options]
    said = text_of(answer, "the answer")
    bare = said.strip("().: ")
    meant = {texts.index(text) for text in {said, re.sub(r"^\(?[A-Z][.):]\s+", "", said)} if text in texts}
    if bare in letters and len(bare) == 1:
        meant.add(letters.index(bare))
    elif bare.isdecimal() and int(bare) < len(texts):
        meant = {int(bare)} if by_number else meant | {int(bare)}
    if len(meant) != 1:
        how_many = "more than one" if meant else "none"
        raise BadSample(f"answer {said!r} is {how_many} of {len(texts)} options")
    listed = [f"{letter}. {text}" for letter, text in zip(letters, texts)]
    return "\n".join([question, *listed]), texts[meant.pop()]


def pairs_of(row: dict, default: str, notes: collections.Counter) -> list[QA]:
    """The questions and answers of a row, in whichever form. BadSample for one without an answer."""
    first = partial(cell_of, row, columns_of(tuple(row)))
    question, answer, turns = first("question"), first("answer"), first("turns")
    if isinstance(question, list) and isinstance(answer, list):  # TRL's prompt and completion as messages
        turns = question + answer
    if turns := items_of(turns or []):
        asked_in_order = enumerate(turns_of(turns, row, notes))
        return [QA(asked or default, said, follows=i > 0) for i, (asked, said) in asked_in_order]
    if pairs := items_of(first("pairs") or []):
        if not all(isinstance(pair, dict) for pair in pairs):
            raise BadSample("qa is no list of questions and answers")
        return [qa for pair in pairs for qa in pairs_of(pair, default, notes)]
    captions = items_of(first("caption")) if answer is None else []
    if answer is None and is_empty(captions[0]):
        what = "no answer" if question is None else "question without answer"
        raise BadSample(f"{what} {looked_for(row, 'answer', 'caption')}")
    asked = without_marks(text_of(question, "the question")) if question is not None else ""
    kind = str(first("kind") or "")
    each = [row[name] for name in columns_of(tuple(row)).get("each option", ()) if not is_empty(row[name])]
    options = first("options") or []
    if options := each or (list(options.values()) if isinstance(options, dict) else items_of(options)):
        asked, answer = choice_of(asked or default, answer, options, by_number=bool(each))
    said = [text_of(text, "the answer") for text in (captions or [answer])]
    return [QA(asked or default, text, kind) for text in said]


def texts_of(record: Any, wants: str, default: str, notes: collections.Counter) -> list:
    """The captions of a record, or its QA; "" where its video is all that is wanted. BadSample when it has
    none, and for a record that is no row."""
    if not isinstance(record, dict):
        raise BadSample(record if isinstance(record, str) else "a JSON object is wanted")
    if wants == "video":
        return [""]
    if wants == "caption":
        return captions_of(record)
    pairs = pairs_of(record, default, notes)
    if not all(qa.answer for qa in pairs):
        raise BadSample("an answer without a word in it")
    return pairs


def captions_of(row: dict) -> list[str]:
    """The captions of a row; a prompt that nothing answers is one. BadSample when there are none."""
    columns = columns_of(tuple(row))
    value = cell_of(row, columns, "caption")
    if value is None and "answer" not in columns:
        value = cell_of(row, columns, "question")
    captions = [text_of(caption, "the caption") for caption in items_of(value) if not is_empty(caption)]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise BadSample(f"no caption {looked_for(row, 'caption')}")
    return captions


def looked_for(row: dict, *what: str) -> str:
    wanted = " ".join(NAMES[name] for name in what)
    return f"(columns looked for: {wanted}; there: {', '.join(map(str, row)) or 'none'})"


def segments_of(row: dict, columns: dict[str, list[str]], texts: int) -> list[tuple[float, float]]:
    """[(start, end)] in seconds of a row's parts of its video: one, or one for each of its texts (Panda-70M,
    ActivityNet Captions)"""
    if not ("start" in columns or "end" in columns or "segments" in columns):
        return [(0.0, math.inf)]
    first = partial(cell_of, row, columns)
    # MiraData's clips are cut already
    pairs = items_of(first("segments") or []) if "clip_id" not in row else []
    if len(pairs) == 2 and not isinstance(pairs[0], list):
        pairs = [pairs]
    if not pairs:
        pairs = [(first("start") or 0, first("end"))]
    elif not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadSample("timestamps are no pairs of a start and an end")
    elif len(pairs) not in (1, texts):
        raise BadSample(f"{len(pairs)} times for {texts} captions")
    segments = []
    for start, end in pairs:
        segments.append((seconds_of(start, "start"), math.inf if is_empty(end) else seconds_of(end, "end")))
        if segments[-1][0] >= segments[-1][1]:
            raise BadSample(f"start {start} is not before end {end}")
    return segments


# All of them


real_folder = functools.lru_cache(maxsize=1 << 16)(os.path.realpath)


def real_path(path: str, is_link: bool) -> str:
    """os.path.realpath of an absolute path, which looks at each folder above: here once for a folder"""
    if is_link:
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    real = real_folder(folder)
    return path if real == folder else os.path.join(real, name)


class Finder:
    """Where the videos that a table names lie: below `folders`, under that path; where the table has names or
    numbers alone, or `everywhere`, under that name. Folders are listed once: a file system over the network
    takes a millisecond for each question."""

    def __init__(self, folders: list[Path], everywhere: bool) -> None:
        self.folders, self.everywhere = [str(folder.absolute()) for folder in folders], everywhere
        self.entries = functools.cache(self.entries_of)

    @staticmethod
    def entries_of(folder: str) -> dict[str, bool]:
        """{name: whether it is a link}"""
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.is_symlink() for entry in entries}
        except OSError:
            return {}

    @functools.cached_property
    def by_name(self) -> dict[str, list[str]]:
        """{name, with and without its ending: paths} in the first folder that has videos; of one that was not
        given as --videos a million files are looked at, for it may be the root of all disks"""
        paths: dict[str, list[str]] = {}
        for folder in self.folders:
            files = itertools.islice(files_below(Path(folder)), None if self.everywhere else 10**6)
            for path in files if not paths else ():
                if (suffix := path.suffix.lower()) in VIDEO_SUFFIXES + PICTURE_SUFFIXES:
                    for name in (path.name, path.stem) if suffix in VIDEO_SUFFIXES else (path.name,):
                        paths.setdefault(name, []).append(str(path))
        return paths

    def __call__(self, name: str, has_url: bool) -> tuple[str, str]:
        """-> (path, the file that it is in the end). BadSample when there is none."""
        has_ending = name.lower().endswith(VIDEO_SUFFIXES)
        for base in self.folders:
            path = name if name.startswith("/") else f"{base}/{name}"
            path = os.path.normpath(path) if "/." in path or "//" in path else path
            folder, _, file = path.rpartition("/")
            for ending in ("",) if has_ending else ("", *VIDEO_SUFFIXES):
                if (is_link := self.entries(folder).get(file + ending)) is not None:
                    path += ending
                    return path, real_path(path, is_link)
        if self.everywhere or not (has_ending or has_url):
            found = self.by_name.get(os.path.basename(name), [])
            if len(found) == 1:
                return found[0], os.path.realpath(found[0])
            if found:
                raise BadSample(f"{name}: {len(found)} videos have this name, {found[0]} is one")
        raise BadSample(f"{name}: no such file in {' or '.join(self.folders)}")


def video_names(row: dict, columns: dict[str, list[str]]) -> list[str]:
    """Paths, URLs and names that the columns say, the most telling first; numbers are names."""
    names = []
    for column in columns.get("video", ()):
        if not is_empty(value := row[column]):
            items = items_of(value)
            if len(items) != 1:
                raise BadSample(f"{len(items)} videos in one row, one is taken")
            value = items[0].get("path") if isinstance(items[0], dict) else items[0]
            names += [] if is_empty(value) else [text_of(value, "the video's name")]
    return names


def find_video(row: dict, columns: dict[str, list[str]], find: Finder | None) -> tuple[str, str]:
    """-> (path or URL, the file that it is in the end). A file that is there comes before a URL. BadSample
    when there is none. Without `find`, what it is called: no file is wanted."""
    names, reason = video_names(row, columns), None
    if not find:
        return names[0] if names else "", ""
    url = next((name for name in names if is_url(name) or CELL in name), "")
    for name in names:
        if not (is_url(name) or CELL in name):
            try:
                return find(name, bool(url))
            except BadSample as error:
                reason = reason or error
    if url:
        return url, url
    raise reason or BadSample(f"no video {looked_for(row, 'video')}")


def without_gc(call: Callable[..., T]) -> Callable[..., T]:
    """Decorator for what makes millions of objects without cycles: to look for some takes a sixth of the
    time."""

    @functools.wraps(call)
    def paused(*args: Any, **named: Any) -> T:
        gc.disable()
        try:
            return call(*args, **named)
        finally:
            gc.enable()

    return paused


@without_gc
def read_data(
    cfg: Any,
    wants: Literal["caption", "answer", "video"],
    keep: dict[str, str] = MappingProxyType({}),
    videos: bool = True,
    check: Callable[[list], Any] = len,
    records: Records | None = None,
) -> tuple[list[Row], list[dict]]:
    """Rank 0: the rows of --manifest, of --dataset or, with neither, of the public samples. -> (rows, bad
    samples). Exit 2 when too many are bad.

    wants: what a row must have, captions or answers, or nothing but its video; a caption answers
    cfg.question, or what happens. keep: {column that the script wants as it is: the flag by which the user
    named it, or ""}. videos: whether their files are wanted: then rows of one file (and part of it) are one
    row, whichever way it is written. check: raises BadSample for texts that the script cannot use. records:
    those of a demo.
    """
    source = cfg.manifest or Path(cfg.dataset.partition(":")[0])
    if not records:
        if cfg.manifest:
            records = records_of(source, bare=wants == "video")
        else:
            records = dataset_records(cfg) if cfg.dataset else sample_records()
    folder = (source if source.is_dir() else source.parent).absolute()
    folders = [cfg.videos] if cfg.videos else [folder, folder.parent]
    find = Finder(folders, everywhere=bool(cfg.videos)) if videos else None
    default = getattr(cfg, "question", "") or DEFAULT_QUESTION
    merged: dict[Any, Row] = {}
    notes: collections.Counter = collections.Counter()
    bad, good, forms = [], 0, set()
    for place, number, record in records:
        row = Row(place, number)
        try:
            texts = texts_of(record, wants, default, notes)
            check(texts)
            columns = columns_of(names := tuple(record))  # a conversation may have added its video
            row.video, real = find_video(record, columns, find)
            segments = segments_of(record, columns, len(texts))
        except BadSample as error:
            bad.append(row.left_out(error))
            continue
        good += 1
        if "split" in columns:
            row.split = split_of(str(cell_of(record, columns, "split") or ""))
        for what in ("num_frames", "height", "width", "fps"):
            if what in columns:
                value = cell_of(record, columns, what)
                setattr(row, what, number_of(value if isinstance(value, str | int | float) else 0))
        if keep:
            forms.add(names)
            row.cells = tuple([None if is_empty(value := record.get(name)) else value for name in keep])
        for i, (row.start, row.end) in enumerate(segments):
            said = texts if len(segments) == 1 else texts[i : i + 1]
            key = len(merged) if not videos else (real, row.start, row.end) if row.part else real
            if same := merged.get(key):
                same.texts += said
                # held-out questions about pictures that were seen prove nothing
                same.split = same.split if same.split == row.split else "train"
            else:
                merged[key] = row if len(segments) == 1 else dataclasses.replace(row)
                merged[key].texts = list(said)
    rows = list(merged.values())
    for note, count in notes.items():
        log.warning(f"note: {count} rows have {note}")
    there = sorted({str(name) for form in forms for name in form})
    for name, flag in keep.items():
        if flag and name not in there:
            refuse(f"{flag} {name}: in none of {len(rows)} rows (columns: {', '.join(there)})")
    leave_out(data_name(cfg), good, bad, cfg.max_bad)
    return rows, bad


def data_name(cfg: Any) -> str:
    return str(cfg.manifest or cfg.dataset or ("generated data" if cfg.demo else "four public samples"))


# ---------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------

MAX_PIXELS = 8192 * 4320  # a header can declare any picture and so claim all memory: refused before decoding
# Only real containers are opened: ffmpeg's playlist formats (hls, concat, dash, sdp) would open other files
# and URLs, and image2 would read a % in a name as a pattern.
PICTURES = "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,gif,flv,asf,ogg,ivf,wav,mp3,flac,aac,aiff,"
    + PICTURES
)
# Here packets say when each frame is shown and where decoding can begin. Elsewhere (MPEG-TS) a seek can land
# in the middle of a group.
SEEKABLE = ("mov", "matroska"), ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d")
HDR = (16, 18)  # transfer characteristics PQ and HLG, ITU-T H.273
TO_SDR = ("scale", "in_chroma_loc=left:out_primaries=bt709:out_transfer=bt709"), ("format", "rgb24")
# ffmpeg's kinds of frame data that PyAV 18 does not know: LCEVC, views, 3D displays, EXIF
FORGET_UNKNOWN = tuple(("sidedata", f"mode=delete:type={kind}") for kind in range(28, 32))


class BadSample(ValueError):
    """A clip that cannot be used; the message is the reason, on one line."""


class Pace(NamedTuple):
    """So many frames a second, and no more than `most`, as a number of frames"""

    fps: float
    most: int


@dataclass(frozen=True)
class AtMost:
    """As large as a picture is, but for so many pixels, as a size"""

    pixels: int


def frame_indices(total: int, k: int) -> list[int]:
    """k evenly spaced frames of total: floor((total - 1) * j / (k - 1)), both ends included; k = 1: the
    middle one.

    Raises ValueError for k < 1 or total < 0, BadSample for total < k: a frame is never repeated.
    """
    if k < 1 or total < 0:
        raise ValueError(f"frame_indices(total={total}, k={k}): needs total >= 0 and k >= 1")
    if total < k:
        raise BadSample(f"{total} frames, {k} needed")
    return [(total - 1) // 2] if k == 1 else [(total - 1) * j // (k - 1) for j in range(k)]


def fitted(picture: np.ndarray, size: tuple[int, int] | AtMost | None, crop: bool = True) -> np.ndarray:
    """(H, W, 3) -> (h, w, 3): the largest centred crop of that shape, or all of it, scaled; size None: as it
    is."""
    import cv2

    if isinstance(size, AtMost):
        scale = (size.pixels / (picture.shape[0] * picture.shape[1])) ** 0.5
        size = tuple(max(1, int(side * scale)) for side in picture.shape[:2]) if scale < 1 else None
    if size is None:
        return picture
    (height, width), (h, w) = picture.shape[:2], size
    if crop:
        crop_h, crop_w = min(height, max(1, round(width * h / w))), min(width, max(1, round(height * w / h)))
        top, left = (height - crop_h) // 2, (width - crop_w) // 2
        picture = picture[top : top + crop_h, left : left + crop_w]
    return cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)


@contextlib.contextmanager
def open_media(path: str | Path, kind: Literal["video", "audio"] = "video") -> Iterator[tuple[Any, Any]]:
    """PyAV's (container, stream) of a file, closed afterwards; no other file or URL is opened by way of it.
    Of several video streams the one that players take: no cover and no poster of one frame, if there is
    another, then one marked as default, then the first. Raises BadSample, also for what ffmpeg finds wrong
    inside."""
    import av

    path, options = os.path.abspath(path), {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    if not os.path.isfile(path):
        raise BadSample("not a regular file" if os.path.exists(path) else "no such file")
    marks = av.stream.Disposition
    with open(path, "rb") as file:
        head = file.read(1024)
    known = "jpeg_pipe" if head.startswith(b"\xff\xd8\xff") else None  # ffmpeg would say image2 of .jpg
    try:
        with av.open(path, format=known, options=options, metadata_errors="ignore") as container:
            stream = min(
                getattr(container.streams, kind),
                key=lambda s: (
                    marks.attached_pic in s.disposition,
                    s.frames == 1 or getattr(s.codec_context, "name", "") in ("mjpeg", "png"),
                    marks.default not in s.disposition,
                ),
                default=None,
            )
            if stream is None or stream.codec_context is None:
                raise BadSample(f"no decoder for the {kind} stream" if stream else f"no {kind} stream")
            if kind == "video":
                stream.codec_context.thread_count = 1  # loaders have threads of their own
                check_pixels(stream.width, stream.height)
            yield container, stream
    except av.error.FFmpegError as error:
        if b"\0" not in head:  # nearly every container has zero bytes in its header
            raise BadSample("text or HTML, not a video" if head else "empty file") from error
        raise BadSample(f"not a video, picture or sound that can be read: {error.strerror}") from error


def packet_times(container: Any, stream: Any) -> tuple[list[tuple[int | None, bool]], list[float]]:
    """By headers alone, nothing is decoded: ([(pts, whether decoding can begin there)] of all packets in the
    order in which they are shown, their times in seconds after the first)"""
    # an edit list marks what is not shown
    shown = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
    packets = [(packet.pts, packet.is_keyframe) for packet in shown]
    if any(pts is None for pts, _ in packets):
        return packets, [i / float(stream.average_rate or 25) for i in range(len(packets))]
    packets.sort()
    return packets, [float((pts - packets[0][0]) * stream.time_base) for pts, _ in packets]


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"picture of {width}x{height}, more than {MAX_PIXELS} pixels")


def decoded_frames(container: Any, stream: Any, size: tuple[int, int] | None = None) -> Iterator[Any]:
    """PyAV's frames of a video, from where the container stands to the end, but for damaged packets. Raises
    BadSample when the picture changes its size, which was `size` so far."""
    import av

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:  # the next packet may be whole
            continue
        for frame in frames:
            now = frame.width, frame.height
            if now != (size := size or now):
                raise BadSample(
                    f"the picture changes its size, from {size[0]}x{size[1]} to {now[0]}x{now[1]}"
                )
            check_pixels(*now)
            yield frame


@functools.lru_cache(maxsize=256)
def picture_maker(thread: int) -> Callable[[Any], np.ndarray]:
    """A function for the use of one thread: PyAV's frame -> uint8 (H, W, 3), turned and mirrored as its
    container says, HDR (PQ, HLG) as it looks in SDR."""
    import av
    from av.sidedata.sidedata import Type

    reformat = av.video.reformatter.VideoReformatter().reformat  # keeps its tables from frame to frame

    @functools.lru_cache(maxsize=4)  # ffmpeg takes a second to make the map to SDR
    def graph_of(filters: tuple, width: int, height: int, pixels: str, *colours: int) -> Any:
        graph = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format=pixels, time_base=Fraction(1, 1000))
        graph.link_nodes(source, *(graph.add(*f) for f in filters), graph.add("buffersink")).configure()
        return graph

    def filtered(frame: Any, filters: tuple) -> Any:
        colours = frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range
        graph = graph_of(filters, frame.width, frame.height, frame.format.name, *colours)
        graph.push(frame)
        return graph.pull()

    def picture_of(frame: Any) -> np.ndarray:
        try:
            matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        except ValueError:
            matrix = filtered(frame, FORGET_UNKNOWN).side_data.get(Type.DISPLAYMATRIX)
        if frame.color_trc in HDR:
            frame = filtered(frame, TO_SDR)
        picture = reformat(frame, format="rgb24", threads=1).to_ndarray()
        if matrix:
            a, b, _, c, d = np.sign(np.frombuffer(matrix, np.int32)[:5])  # x' = a x + c y, y' = b x + d y
            if a == d == 0:
                picture, a, d = picture.transpose(1, 0, 2), c, b
            picture = np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
        return picture

    return picture_of


def part_of(times: list[float], start: float, end: float) -> range:
    """Of frames shown at `times` (seconds, in order), the numbers of those from `start` until before `end`"""
    first, after = (bisect.bisect_left(times, second - 1e-6) for second in (start, end))
    return range(first, max(first, after))


NUMBERS = range, tuple  # of frames, in order


def chosen_frames(
    times: list[float], frames: int | range | tuple | Pace, start: float, end: float
) -> list[int]:
    """The numbers of those frames of a part to take: so many, evenly spaced, or these. Raises BadSample when
    there are too few."""
    part = part_of(times, start, end)
    if isinstance(frames, Pace):
        seconds = times[part[-1]] - times[part[0]] if part else 0
        frames = max(1, min(frames.most, len(part), int(seconds * frames.fps) + 1))
    where = f" from {start:g} s" + (f" to {end:g} s" if end < math.inf else "")
    try:
        if isinstance(frames, NUMBERS) and len(part) <= frames[-1]:
            raise BadSample(f"ends after {len(part)} frames, {frames[-1] + 1} needed")
        numbers = frames if isinstance(frames, NUMBERS) else frame_indices(len(part), frames)
        return [part[i] for i in numbers]
    except BadSample as error:
        raise BadSample(f"{error}{where if len(part) < len(times) else ''}") from None


def sought_frames(
    path: str | Path, pts: list[int], keys: list[int], needed: list[int], take: Callable[[int, Any], None]
) -> bool:
    """Hand the frames of these numbers to take(number, frame), each by way of the keyframe before it. False
    as soon as the decoder's frames are not one for one those of the packets' times (edit list, damage)."""
    import av

    at, size, begins = -1, None, [0, *keys]
    with open_media(path) as (container, stream):
        frames = decoded_frames(container, stream)
        try:
            for number in needed:
                group = bisect.bisect_right(keys, number)
                key, after = begins[group], begins[group + 1] if group < len(keys) else len(pts)
                if key > at + 1:
                    # to the middle of the group: MP4's index holds times of decoding, some frames off
                    container.seek(pts[(key + after) // 2], stream=stream)
                    frames, at = decoded_frames(container, stream, size), key - 1
                while at < number:
                    frame = next(frames, None)
                    at += 1
                    if frame is None or frame.pts != pts[at] or frame.is_corrupt:
                        return False
                take(number, frame)
                size = frame.width, frame.height
        except av.error.FFmpegError:
            return False  # the pass from start to end says what is wrong
    return True


def timed_frames(
    path: str | Path,
    frames: int | range | tuple | Pace,
    size: tuple[int, int] | AtMost | None = None,
    crop: bool = True,
    start: float = 0.0,
    end: float = math.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a video file -> ((K, H, W, 3) RGB uint8, upright, exact on the frames that decode; when each
    is shown, (K,) seconds after the first of the part).

    frames: K, evenly spaced, K by a pace, or numbers in order, a range or a tuple; of those shown from
    `start` until before `end`, in seconds after the first. size (h, w) scales the short side and crops the
    centre, or squeezes without `crop`, as each frame is decoded. One thread: loaders have theirs. Raises
    BadSample with the reason, ValueError for K < 1; no frame is dropped, or repeated unless its number is.
    """
    # wrong numbers are the caller's fault, not the clip's
    if isinstance(frames, Pace):
        frame_indices(frames.most, frames.most)
    elif not isinstance(frames, NUMBERS):
        frame_indices(frames, frames)
    elif not frames or min(frames) < 0 or list(frames) != sorted(frames):
        raise ValueError(f"{frames}: needs numbers from 0 up, in order")
    choose = partial(chosen_frames, frames=frames, start=start, end=end)
    picture_of, pictures = picture_maker(threading.get_ident()), {}

    def together() -> tuple[np.ndarray, np.ndarray]:
        first = part_of(times, start, end)[0]
        return np.stack([pictures[i] for i in wanted]), np.array([times[i] - times[first] for i in wanted])

    def take(number: int, frame: Any) -> None:
        if number in wanted:
            pictures[number] = fitted(picture_of(frame), size, crop)

    with open_media(path) as (container, stream):
        may_seek = container.format.name.startswith(SEEKABLE[0]) and stream.codec_context.name in SEEKABLE[1]
        rate = float(stream.average_rate or 25)
        packets, times = packet_times(container, stream)
    pts, keys = [pts for pts, _ in packets], [i for i, (_, is_key) in enumerate(packets) if is_key]
    try:
        wanted = choose(times)
    except BadSample:  # perhaps the packets hide some
        wanted = []
    # MPEG-4 in the wild marks every packet as a keyframe
    if wanted and may_seek and None not in pts and len(set(pts)) == len(pts) > len(keys) > 0:
        last = wanted[-1] if isinstance(frames, NUMBERS) else len(times) - 1
        needed = sorted({0, *wanted, last})  # with both ends, or the count is not proven
        if sought_frames(path, pts, keys, needed, take):
            return together()
    for _ in range(2):  # from start to end; once more where the packets had it wrong
        pictures.clear()
        times = []
        with open_media(path) as (container, stream):
            for number, frame in enumerate(decoded_frames(container, stream)):
                take(number, frame)
                times.append(number / rate if frame.pts is None else frame.time)
                if isinstance(frames, NUMBERS) and wanted and number == wanted[-1]:
                    break  # nothing after it matters
        if not times:
            raise BadSample("no frame decodes")
        times = np.maximum.accumulate(np.array(times) - times[0]).tolist()
        guessed, wanted = wanted, choose(times)
        if wanted == guessed:
            return together()
    raise BadSample("decodes to another number of frames each time")


def fetched(video: str, folder: Path, keep: bool) -> Path:
    """The file of a path, of a URL or of a cell of a table, brought into `folder` if it is no file yet; of
    the Hub into its own cache if it is to be kept. Raises BadSample."""
    try:
        if CELL in video:
            path = video_in_table(video, folder)
        elif video.startswith("hf://"):
            path = hub_file(video, None if keep else folder)
        else:
            path = download(video, folder) if is_url(video) else Path(video)
        path.stat()
    except (OSError, ValueError) as error:
        raise BadSample(getattr(error, "strerror", None) or brief(error)) from error
    return path


@contextlib.contextmanager
def local_file(video: str, cfg: Any) -> Iterator[Path]:
    """The file of a video; with --streaming what was fetched is gone afterwards. Raises BadSample."""
    folder = cfg.cache_dir / "downloads"
    if not getattr(cfg, "streaming", False):
        yield fetched(video, folder, keep=True)
        return
    folder /= secrets.token_hex(8)  # its own, for another part of the video may be read just now
    try:
        yield fetched(video, folder, keep=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def identity_of(video: str) -> str:
    """What a video's files in the cache go by: a file that was changed is another one, a URL is what it is.
    Raises BadSample for a file that is not there."""
    if is_url(video):
        return video
    path = video.partition(CELL)[0]
    try:
        stat = os.stat(path)
    except OSError as error:
        raise BadSample(error.strerror) from error
    real = real_path(os.path.join(os.getcwd(), video), os.path.islink(path))
    return f"{real}|{stat.st_size}|{stat.st_mtime_ns}"


def frames_file(row: Row, frames: Any, size: Any, cfg: Any, crop: bool = True) -> Path:
    """Where the cache has these frames. Raises BadSample for a file that is not there."""
    # 3: version of the reader
    digest = digest_of(f"{identity_of(row.video)}|{row.start}|{row.end}|{frames}|{size}|{crop}|3")
    return cfg.cache_dir / "frames" / digest[:2] / f"{digest}.npy"


def cached_frames(
    row: Row, frames: int | tuple | Pace, size: int | tuple[int, int] | AtMost, cfg: Any, crop: bool = True
) -> Path:
    """Decode once: a .npy file of uint8 (F, H, W, 3) frames, cropped or squeezed, and after it their times, a
    second array. Raises BadSample."""
    target = frames_file(row, frames, size, cfg, crop)
    if not target.exists():
        shape = (size, size) if isinstance(size, int) else size
        with local_file(row.video, cfg) as path:
            save_array(target, *timed_frames(path, frames, shape, crop, row.start, row.end))
    return target


def usable_cores() -> int:
    """This rank's share of the cores that affinity and the container's quota leave"""
    cores, groups = float(len(os.sched_getaffinity(0))), Path("/sys/fs/cgroup")
    # cgroup 2 and 1: "quota period", in microseconds; no quota is "max" or -1
    files = [groups / "cpu.max"], [groups / "cpu/cpu.cfs_quota_us", groups / "cpu/cpu.cfs_period_us"]
    for limit in (" ".join(path.read_text() for path in paths if path.exists()).split() for paths in files):
        if len(limit) == 2 and limit[0].isdigit():
            cores = min(cores, int(limit[0]) / int(limit[1]))
    return max(1, int(cores / local_ranks()))


def in_threads(call: Callable[[Any], T], items: list, cfg: Any, what: str) -> list[T]:
    """[call(item), ...] with a bar on rank 0; decoders release the GIL. A signal ends it at once."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(cfg.num_workers or usable_cores())
    try:
        results, hidden = pool.map(call, items), None if items and rank() == 0 else True
        return list(tqdm(results, what, len(items), unit="clip", disable=hidden))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def decode_rows(
    rows: list[Row], frames: int | Pace, size: int | AtMost, cfg: Any, crop: bool = True
) -> tuple[list[Row], list[Path], list[dict]]:
    """Every rank, each its share: -> (rows whose clips can be decoded, their cached frames, bad samples), the
    same on all. It may be stopped and started again. Exit 2 when the cache would not fit onto the disk, and
    when too many clips are bad."""
    done: dict[int, Path | dict] = {}

    def by(call: Callable[..., Path], i: int) -> bool:
        """Note the file, or what is wrong; whether it is still to be made"""
        try:
            done[i] = call(rows[i], frames, size, cfg, crop)
        except BadSample as error:
            done[i] = rows[i].left_out(error)
        return isinstance(done[i], Path) and not done[i].exists()

    # each machine fills a cache; one that they share is filled from several places at once
    here, machine = local_ranks(), rank() // local_ranks()
    mine = list(range(rank() % here, len(rows), here))
    first = len(mine) * machine * here // world_size()
    todo = [i for i in mine[first:] + mine[:first] if by(frames_file, i)]
    count = sum(from_all_ranks(len(todo))[machine * here : (machine + 1) * here])
    most = frames.most if isinstance(frames, Pace) else frames
    pixels = size.pixels if isinstance(size, AtMost) else size * size
    need, free = count * (most * pixels * 3 + 4096) / GB, disk_free(cfg.cache_dir) / GB
    if rank() == 0 and count:
        into = f"{need:.2f} GB into {cfg.cache_dir}/frames, {free:.1f} GB free"
        log.info(f"frames   {count} of {len(rows)} clips are to be decoded, {into}")
    if need > free:
        refuse(f"--cache_dir {cfg.cache_dir}: {free:.2f} GB free for {need:.2f} GB of frames")
    in_threads(partial(by, cached_frames), todo, cfg, "decode")
    together = list(merged_over_ranks(done).values())
    good = [i for i, entry in enumerate(together) if isinstance(entry, Path)]
    bad = [entry for entry in together if isinstance(entry, dict)]
    leave_out(data_name(cfg), len(good), bad, cfg.max_bad)
    return [rows[i] for i in good], [together[i] for i in good], bad


def save_array(target: Path, *arrays: np.ndarray) -> None:
    """One after the other: np.load reads the first, and from an open file the next"""

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            for array in arrays:
                np.save(file, array)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, write)


# ---------------------------------------------------------------------------
# Pictures and videos
# ---------------------------------------------------------------------------


def encode_clip(
    clip: np.ndarray, path: Path, fps: float, codec: str, pix_fmt: str, options: dict, container: dict
) -> None:
    """uint8 (F, H, W, 3) -> a video without sound; options: the codec's and the container's, as ffmpeg names
    them"""
    import av

    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        for picture in clip:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def write_mp4(clip: np.ndarray, path: Path, fps: float) -> None:
    """uint8 (F, H, W, 3), sides even -> H.264 in yuv420p, which every browser plays"""
    encode_clip(clip, path, fps, "libx264", "yuv420p", {"crf": "18"}, {"movflags": "+faststart"})


def enlarge(clip: np.ndarray, least: int = 256) -> np.ndarray:
    """Whole-numbered enlargement of uint8 (F, H, W, 3) to at least `least` pixels, with even sides as H.264
    wants them."""
    factor = max(1, -(-least // clip.shape[1]))
    clip = clip.repeat(factor, 1).repeat(factor, 2)
    return clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]


def write_video(clip: np.ndarray, path: Path | str, fps: float = 8) -> None:
    """uint8 (F, H, W, 3) -> path.mp4 and path.gif"""
    from PIL import Image

    clip, path = enlarge(clip), Path(path)
    write_mp4(clip, path.with_suffix(".mp4"), fps)
    first, *rest = (Image.fromarray(picture) for picture in clip)
    first.save(
        path.with_suffix(".gif"), save_all=True, append_images=rest, duration=round(1000 / fps), loop=0
    )


def write_grid(clips: np.ndarray, captions: list[str], path: Path) -> None:
    """One row a clip, its caption above it, one column a frame: uint8 (N, F, H, W, 3) -> a png"""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    (rows, columns, height, width), gap, head, high = clips.shape[:4], 6, 20, 112
    wide = max(1, round(width * high / height))
    how = Image.Resampling.NEAREST if height < high else Image.Resampling.BOX
    page = Image.new("RGB", (columns * (wide + gap) + gap, rows * (high + head + gap)), "white")
    pen, fonts = ImageDraw.Draw(page), Path(matplotlib.get_data_path(), "fonts", "ttf")
    pen.font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 12)
    for row, (clip, caption) in enumerate(zip(clips, captions)):
        top, shown = row * (high + head + gap) + head, " ".join(caption.split())[: page.width]
        while pen.textlength(shown) > page.width - 2 * gap:
            shown = shown[: -4 if shown.endswith("...") else -1] + "..."
        pen.text((gap, top - 3), shown, "black", anchor="ls")
        for column, picture in enumerate(clip):
            image = Image.fromarray(picture).resize((wide, high), how)
            page.paste(image, (gap + column * (wide + gap), top))
    page.save(path)


def sample_path(cfg: Any, prompt: str) -> Path:
    """<output_dir>/samples/a_dog_runs_seed0, for what is made of a prompt; other prompts have other names"""
    name = re.sub(r"\W+", "_", prompt.lower()).strip("_")
    if not name or len(name) > 60:
        name = f"{name[:50]}_{digest_of(prompt)[:8]}".strip("_")
    folder = cfg.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_seed{cfg.seed}"


def write_samples(clips: np.ndarray, captions: list[str], path: Path, fps: float = 8, every: int = 1) -> None:
    """uint8 (N, F, H, W, 3) -> path.png, a row a clip, one of `every` frames; path.mp4 and path.gif, the
    clips side by side"""
    write_grid(clips[:, ::every], captions, path.with_suffix(".png"))
    write_video(np.concatenate(list(clips), axis=2), path, fps)


# ---------------------------------------------------------------------------
# Memory and DeepSpeed
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where weights, gradients and optimizer states lie, and what that takes."""

    stage: int  # of ZeRO
    offload: str  # to RAM: "", "optimizer" or "all"; longcat_vss.py has layouts with "nvme" as well
    checkpointing: bool
    gpu_gb: float  # of each GPU
    host_gb: float  # of this machine's RAM
    config: dict  # DeepSpeed's
    note: str = ""

    @property
    def name(self) -> str:
        where = {"": "", "optimizer": ", optimizer on CPU", "all": ", all on CPU"}.get(
            self.offload, f", {self.offload}"
        )
        return f"ZeRO-{self.stage}{where}{', checkpointing' if self.checkpointing else ''}"

    def fits(self, gpu_gb: float, ram_gb: float, ranks: int) -> bool:
        """In GPUs of this size, or on a CPU (gpu_gb 0), where everything lies in RAM, once for each rank."""
        if not gpu_gb:
            return self.host_gb + self.gpu_gb * ranks < 0.9 * ram_gb
        return self.host_gb < 0.9 * ram_gb and self.gpu_gb < 0.92 * gpu_gb


# what --gradient_checkpointing allows
CHECKPOINTING = {"auto": (False, True), "on": (True,), "off": (False,)}


def memory_layouts(
    trained: int,
    frozen: int,
    kept: dict[bool, int],
    dtype: str,
    devices: int,
    local: int | None = None,
    leaf: int = 0,
) -> list[Layout]:
    """Least offloading first, each without gradient checkpointing, then with it, as far as `kept` has them.

    trained: parameters; frozen: bytes of weights. kept: {with checkpointing: bytes that one micro-batch keeps
    for backward on one GPU}. devices: GPUs in all; local: those of this machine, which host_gb counts. leaf:
    bytes of the largest module that ZeRO-3 gathers at once. Adam in mixed precision keeps fp32 master weights
    and two moments: 12 bytes a parameter. The formulas are those of ZeRO (Rajbhandari et al. 2020, section 3)
    plus DeepSpeed's reduce bucket.
    """
    low = 4 if dtype == "fp32" else 2
    zero2, zero3 = (json.loads((HERE / f"ds_{name}.json").read_text()) for name in ("zero2", "zero3_offload"))
    local = local or min(devices, local_ranks(unknown=devices))

    def with_offload(config: dict, *what: str) -> dict:
        zero = {k: v for k, v in config["zero_optimization"].items() if not k.startswith("offload_")}
        zero |= {f"offload_{name}": {"device": "cpu", "pin_memory": True} for name in what}
        return config | {"zero_optimization": zero}

    weights, gradients, states = low * trained + frozen, low * trained, 12 * trained
    live = min(weights, max(leaf, low * 1e9))  # ZeRO-3 keeps up to stage3_max_live_parameters gathered
    bucket = 2 * low * min(trained, int(zero2["zero_optimization"]["reduce_bucket_size"]))
    # (stage, what lies in RAM, config, bytes on a GPU, bytes in RAM for each GPU)
    table = [
        (2, "", zero2, weights + (gradients + states) / devices, 0),
        (2, "optimizer", with_offload(zero2, "optimizer"), weights + gradients / devices, states / devices),
        (3, "", with_offload(zero3), (weights + gradients + states) / devices + live, 0),
        (
            3,
            "optimizer",
            with_offload(zero3, "optimizer"),
            (weights + gradients) / devices + live,
            states / devices,
        ),
        (3, "all", zero3, gradients / devices + live, (weights + states) / devices),
    ]
    layouts = []
    for stage, offload, config, gpu, host in table:
        for checkpointing, activations in sorted(kept.items()):
            on_gpu = (gpu + bucket + activations) / GB
            layouts.append(Layout(stage, offload, checkpointing, on_gpu, host * local / GB, config))
    return layouts


def memory_here() -> tuple[float, float]:
    """(GB of the smallest visible GPU, 0 without one; GB of host RAM that this container may use)."""
    import torch

    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # cgroup 2 and 1: a container often has less than its host
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / limit
        if path.exists() and (text := path.read_text().strip()).isdigit():
            ram = min(ram, int(text))
    return min(gpus, default=0) / GB, ram / GB


def choose_layout(layouts: list[Layout], deepspeed: str, advice: str) -> tuple[str, Layout]:
    """-> (the table of all layouts as text, the first that fits this machine). Of a JSON file, which then is
    the `config`, the layout that it asks for, whether it fits or not. Exit 2 with `advice` when auto finds
    none."""
    (gpu, ram), world = memory_here(), world_size()
    usable = layouts
    if deepspeed != "auto":
        config = read_json(Path(deepspeed))
        zero = todays_zero(config.get("zero_optimization", {}), deepspeed)
        config["zero_optimization"] = zero
        offload = "all" if "offload_param" in zero else "optimizer" if "offload_optimizer" in zero else ""
        usable = [x for x in layouts if x.stage == zero.get("stage") and x.offload == offload] or layouts[:1]
    taken = next((x for x in usable if x.fits(gpu, ram, world)), usable[-1] if deepspeed != "auto" else None)
    per_gpu = f"{gpu:.1f} GB per GPU and " if gpu else ""
    lines = [f"estimated; there are {per_gpu}{ram:.1f} GB of RAM"]
    for layout in layouts:
        notes = [layout.note] if layout.note else []
        if layout is taken:
            notes.append(f"<- {'auto' if deepspeed == 'auto' else deepspeed} takes this")
        elif not layout.fits(gpu, ram, world):
            notes.append("does not fit")
        needs = (
            f"{layout.gpu_gb:8.2f} GB per {'GPU' if gpu else 'CPU process'}{layout.host_gb:8.2f} GB of RAM"
        )
        lines.append(f"  {layout.name:<40}{needs}  {'; '.join(notes)}")
    if not taken:
        refuse("\n".join(["memory " + lines[0], *lines[1:], "no memory layout fits this machine", advice]))
    if deepspeed != "auto":
        taken = dataclasses.replace(taken, stage=zero.get("stage"), offload=offload, config=config)
    return "\n".join(lines), taken


def todays_zero(zero: Any, name: str) -> dict:
    """The section zero_optimization in today's words: cpu_offload is offload_optimizer, and what is offloaded
    to a device "none" is not."""
    if not isinstance(zero, dict):
        refuse(f"{name}: zero_optimization is {json.dumps(zero)}; a JSON object is wanted")
    zero = dict(zero)
    for old in ("cpu_offload", "cpu_offload_param"):
        if zero.pop(old, False):
            zero.setdefault("offload_param" if "param" in old else "offload_optimizer", {"device": "cpu"})
    for what in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(what) or {}, dict):
            refuse(f"{name}: zero_optimization.{what} is {json.dumps(zero[what])}; a JSON object is wanted")
        if (zero.get(what) or {}).get("device") in (None, "none"):
            zero.pop(what, None)
    return zero


# Sections of a DeepSpeed JSON that its constants do not name
SECTIONS = set(
    "zero_optimization activation_checkpointing flops_profiler aio comms_logger tensorboard wandb comet "
    "csv_monitor elasticity data_efficiency compression_training hybrid_engine autotuning amp compile".split()
)


def ds_config(source: dict, name: str, batch_size: int, accum: int, clip: float, dtype: str) -> dict:
    """A DeepSpeed configuration as people have it -> as it is used, every "auto" filled in. Where it differs
    from the flags, they count, and each such key is named; exit 2 for keys that this DeepSpeed does not know,
    which it would ignore, and for what it cannot read. `name`: what messages call it."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config, notes = json.loads(json.dumps(source)), []
    numbers = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accum,
        "train_batch_size": batch_size * accum * world_size(),
        "gradient_clipping": clip,
        "bf16.enabled": dtype == "bf16",
        "fp16.enabled": dtype == "fp16",
    }
    for section, flags in {
        "optimizer": "--lr, --beta2 and --weight_decay",
        "scheduler": "--warmup_steps",
    }.items():
        if section in config:
            what = config.pop(section)
            kind = what.get("type", "") if isinstance(what, dict) else what
            notes.append(f"{section} {kind}: this script has its own, {flags} count")
    zero = config["zero_optimization"] = todays_zero(config.get("zero_optimization", {}), name)
    if zero.get("stage") not in (1, 2, 3):
        refuse(f"{name}: zero_optimization.stage {zero.get('stage')}; take 1, 2 or 3")
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {one.alias for one in fields.values() if one.alias}
    if unknown := sorted(set(zero) - known):
        refuse(f"{name}: this DeepSpeed does not know zero_optimization.{unknown[0]} and would ignore it")
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    inside = set(DeepSpeedFP16Config.model_fields)  # of the section fp16; DeepSpeed's constants mix them
    if unknown := sorted(set(config) - (SECTIONS | known - inside)):
        refuse(f"{name}: this DeepSpeed does not know {unknown[0]} and would ignore it")
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]
        notes.append(f"zero_optimization.{key} auto: DeepSpeed's default counts")
    for key, number in numbers.items():
        *section, last = key.split(".")
        place = config.setdefault(section[0], {}) if section else config
        if not isinstance(place, dict):
            refuse(f"{name}: {section[0]} is {json.dumps(place)}; a JSON object is wanted")
        if place.get(last, "auto") not in ("auto", number):
            notes.append(f"{key} {place[last]}: the flags say {number}, which counts")
        place[last] = number
    if lost := re.search(r'"(\w+)": "auto"', json.dumps(config)):
        refuse(f'{name}: "{lost[1]}": "auto" has no value here; write a number')
    # Offloading takes torch's AdamW too, which needs no compiler.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    try:
        DeepSpeedConfig(config)
    except (ValueError, AssertionError, TypeError, KeyError, AttributeError, DeepSpeedConfigError) as error:
        refuse(f"{name}: DeepSpeed cannot read it: {brief(error)}")
    for note in notes:
        log.info(f"note: {name}: {note}")
    return config


def saved_bytes(forward: Callable[[], Any], module: Any) -> int:
    """Bytes that `forward`, run on the meta device, keeps for the backward pass, without the module's
    parameters. Attention is counted as the fused kernels do it: without the matrix of all pairs."""
    from unittest import mock

    import torch

    class FusedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, out)
            return out

    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept = {}  # by storage, alive so that no address is used twice

    def keep(t):
        kept[t.untyped_storage()._cdata] = t
        return t

    fused = mock.patch.object(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, *_, **__: FusedAttention.apply(query, key, value),
    )
    with fused, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


def pick_dtype(asked: str | None) -> str:
    """`asked`, else bf16, fp16 on GPUs without it, fp32 on a CPU."""
    import torch

    if asked or not torch.cuda.is_available():
        return asked or "fp32"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def peak_memory_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def seed_of(*parts: int) -> int:
    """One 63-bit seed of several numbers: noise is a function of (seed, step, rank), so that a resumed run
    repeats it."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def gathered(parameters: list, changed: bool = False) -> Any:
    """Inside, every one of these parameters is whole on every rank, also under ZeRO-3. `changed`: what rank 0
    writes stays."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0 if changed else None)


def full_weights(module: Any, dtype: Any, wanted: Callable[[Any], bool] = lambda p: True) -> dict[str, Any]:
    """Every rank: the weights, and buffers of the state, in `dtype` on the CPU; of parameters those that are
    `wanted`. They are gathered one after the other, so that a model fits that is larger than one GPU."""
    weights = {}
    for name, value in module.named_parameters():
        if wanted(value):
            with gathered([value]):
                weights[name] = value.detach().to("cpu", dtype, copy=True)
    state = set(module.state_dict())
    return weights | {
        n: b.detach().to("cpu", dtype, copy=True) for n, b in module.named_buffers() if n in state
    }


# ---------------------------------------------------------------------------
# Checkpoints: whole or absent
# ---------------------------------------------------------------------------

# Files up to this size are summed, larger ones compared by size alone: summing 100 GB would hold all GPUs for
# most of a minute at each save, for damage that disks and file systems find themselves
# (benchmarks/RESULTS.md).
SUMMED_BYTES = 2**30


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int, **facts: Any) -> None:
    """Every rank: `write(path)` into a folder aside, then check in all files and rename it to
    folder/step_000200.

    checkpoint.json lists each file with its size and holds `facts`; only after the new one is on disk are
    older whole checkpoints beyond `keep` removed. A full disk ends the run (exit 1) and leaves the
    checkpoints that were there.
    """
    final, aside = folder / f"step_{step:06d}", folder / f".step_{step:06d}.partial"
    if rank() == 0:
        for old in folder.glob(".step_*.partial"):
            shutil.rmtree(old)
        aside.mkdir(parents=True)
    barrier()
    with told_of_full_disk(final, aside):
        write(aside)
        barrier()
        if rank() == 0:
            write_json(aside / "checkpoint.json", {"step": step, **facts, "files": check_in(aside)})
            if final.exists():  # a broken one that was skipped: kept, under another name
                final.rename(final.with_name(f"{final.name}.broken-{time.time_ns()}"))
            aside.rename(final)
            sync(folder)
            if wrong := what_is_wrong(final):
                raise OSError(f"{final} was not written as it should be: {wrong}")
            whole = [path for path in numbered(folder, "step_") if not what_is_wrong(path, sums=False)]
            for old in whole[:-keep]:
                shutil.rmtree(old)
    barrier()


def numbered(folder: Path, prefix: str, suffix: str = "") -> list[Path]:
    """folder/step_000200 and the like, lowest number first; no other name: what is not ours must not be
    pruned."""
    pattern = re.compile(rf"{prefix}([0-9]+){re.escape(suffix)}")
    numbers = {}
    for path in folder.glob(f"{prefix}*{suffix}"):
        if match := pattern.fullmatch(path.name):
            numbers[path] = int(match[1])
    return sorted(numbers, key=numbers.__getitem__)


@contextlib.contextmanager
def told_of_full_disk(target: Path, aside: Path) -> Iterator[None]:
    """Turn a failed write into one line and exit code 1, and give the half-written space back."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        free = shutil.disk_usage(target.parent).free / GB
        raise SystemExit(
            f"error: cannot save {target} ({free:.2f} GB free): {error}\n"
            "earlier checkpoints are kept; make room and run the same command again"
        ) from error


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """`write(path)` aside, then flush and rename to `target`: whole or absent."""
    # Two ranks, or two runs, may write the same file of a cache.
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with told_of_full_disk(target, aside):
        write(aside)
        sync(aside)
        aside.rename(target)


def check_in(folder: Path) -> dict[str, dict]:
    """{relative name: {"bytes", "crc32"}} of all files below `folder`; files and folders are flushed to disk
    first."""
    paths = sorted(folder.rglob("*"))
    with ThreadPoolExecutor() as pool:  # fsync and crc32 release the GIL
        list(pool.map(sync, paths))
        files = [path for path in paths if path.is_file()]
        return {
            str(path.relative_to(folder)): entry for path, entry in zip(files, pool.map(file_entry, files))
        }


def file_entry(path: Path) -> dict:
    size = path.stat().st_size
    return {"bytes": size} | ({"crc32": crc32_of(path)} if size <= SUMMED_BYTES else {})


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32_of(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def what_is_wrong(checkpoint: Path, sums: bool = True) -> str:
    """Why a checkpoint is not whole, "" for one that is. `sums`: read the files too, not their sizes
    alone."""
    try:
        marker = json.loads((checkpoint / "checkpoint.json").read_text())
        if marker["step"] != int(checkpoint.name.removeprefix("step_")) or not marker["files"]:
            return "its checkpoint.json lists no files, or is of another step"
        for name, was in marker["files"].items():
            if (checkpoint / name).stat().st_size != was["bytes"]:
                return f"{name} has another size"
            if sums and "crc32" in was and crc32_of(checkpoint / name) != was["crc32"]:
                return f"{name} has another content"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; broken ones are named. Exit 2 for one that another user has
    put there: DeepSpeed's files are pickles, which run what they hold."""
    for path in reversed(numbered(folder, "step_")):
        if wrong := what_is_wrong(path):
            log.warning(f"warning: {path} is broken ({wrong}): skipped, kept")
            continue
        with tempfile.TemporaryFile(dir=folder) as probe:
            ours = os.fstat(probe.fileno()).st_uid  # on NFS, root's files may belong to nobody
        if path.stat().st_uid not in (os.getuid(), ours):
            refuse(
                f"{path} belongs to user {path.stat().st_uid}, not to you, and resuming would run what its "
                f"files hold: if you trust it, chown -R {os.getuid()} {folder.parent}; or give another "
                "--output_dir"
            )
        return path
    return None


def load_engine(engine: Any, checkpoint: Path, other_ranks: bool, frozen_left_out: bool = False) -> None:
    """Every rank: weights and optimizer state from checkpoint/deepspeed; with `other_ranks` by way of
    DeepSpeed's universal format, for which the engine's config must say "checkpoint": {"load_universal":
    true}."""
    if not other_ranks:
        engine.load_checkpoint(str(checkpoint), tag="deepspeed", load_module_strict=not frozen_left_out)
        return
    universal = checkpoint.parent / ".universal"

    @on_rank0
    def convert() -> None:
        shutil.rmtree(universal, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(checkpoint / "deepspeed"), "--output_folder", str(universal)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr[-500:]
            refuse(f"{checkpoint} is of another number of ranks, and DeepSpeed cannot convert it: {reason}")

    convert()
    engine.load_checkpoint(str(universal.parent), tag=universal.name, load_module_strict=not frozen_left_out)
    barrier()
    if rank() == 0:
        shutil.rmtree(universal)


# ---------------------------------------------------------------------------
# Retry
# ---------------------------------------------------------------------------

# What a vendor's tokens look like. They begin where a word does, or after the \n of a JSON string.
TOKEN = re.compile(
    r"""(?: (?<![A-Za-z0-9]) | (?<=\\[nrt]) ) (?:
    hf_[A-Za-z0-9]{20,} | api_org_[A-Za-z0-9]{30,} | wandb_v1_\w{20,}
    | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])
    | gh[opsur]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{20,} | xox[a-z]-[\w-]{15,}
    | sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{20,}
    | AIza[\w-]{35}(?![\w-]) | ya29\.[\w-]{20,}
    | eyJ[\w-]{10,}\.eyJ[\w-]{5,}\.[\w-]{5,}
    | (?i:bearer|basic)\s+(?=[\w.~+/-]*[0-9])[\w.~+/-]{16,}=*
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----
    )""",
    re.VERBOSE | re.ASCII,
)
# (name=)(value) in the query of a signed url, or for a few names anywhere, and (://user:)(password) before a
# host.
QUERY = re.compile(
    r"""((?: (?:[?&;\#]|\\u0026) (?:[\w-]*[_-])? (?:token|secret|password|passwd|key|sig|signature|credential)
    | [?&;] (?:apikey|accesskey|accountkey|AWSAccessKeyId|GoogleAccessId|policy|key-pair-id|auth)
    | (?<!\S) (?:[\w-]*[_-])? (?:token|secret|password|api_?key)
    ) =) ([^&\s"'<>#\\]+)""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
LOGIN = re.compile(r"""(://[^\s/?#"'<>@:\\]{0,100}:)([^\s/?#"'<>\\]{1,200})(?=@)""")


def own_secrets() -> list[str]:
    values = [os.environ.get(name, "").strip() for name in ("HF_TOKEN", "WANDB_API_KEY")]
    return [value for value in values if len(value) >= 8]


def redact(text: str) -> str:
    """`text` with *** for the values of HF_TOKEN and WANDB_API_KEY, other tokens, and the secrets of signed
    urls, whose addresses stay readable."""
    for value in own_secrets():
        text = text.replace(value, "***")
    return LOGIN.sub(r"\1***", QUERY.sub(r"\1***", TOKEN.sub("***", text)))


def holds_secret(text: str) -> bool:
    """Whether redact() would hide something that is not just the ?key=your_key of a document's example."""
    if TOKEN.search(text) or any(value in text for value in own_secrets()):
        return True
    values = [match[2] for match in (*QUERY.finditer(text), *LOGIN.finditer(text))]
    return any(re.fullmatch(r"(?=.*[0-9])[\w.~%+/=-]{16,}", value) for value in values)


def hide_secrets(record: logging.LogRecord) -> bool:
    """A filter for logging handlers: neither the line nor a traceback below it shows a secret."""
    record.msg, record.args = redact(record.getMessage()), None
    if record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return True


def causes(error: BaseException | None) -> list[BaseException]:
    """`error` and what it came from, outermost first: libraries wrap the HTTP answer, sometimes twice."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def brief(error: BaseException) -> str:
    """One line for people, without secrets: the HTTP answer if there is one."""
    cause = next((e for e in causes(error) if getattr(e, "response", None) is not None), error)
    return redact(" ".join(f"{type(cause).__name__}: {cause}".split()))[:400]


def passing(error: BaseException) -> tuple[bool, float]:
    """(can `error` pass by waiting, seconds the server asks for).

    The first error in the chain that says something decides. Recognised by what they carry, not by their
    class: the Hub's client changes its HTTP library with its major version, and its errors, as those of
    requests, are all OSErrors.
    """
    for e in causes(error):
        answer = getattr(e, "response", None)
        status = getattr(answer, "status_code", None)
        # hf_xet: a builtin ConnectionError for every status, 401 too
        if text := re.search(r"HTTP status (?:client|server) error \((\d{3})", str(e)):
            status = int(text[1])
        if status:
            # another writer's commit came in between; anywhere else a conflict stays
            conflict = status in (409, 412) and "/commit/" in str(getattr(answer, "url", ""))
            return conflict or status in (408, 429) or status >= 500, asked_wait(answer)
        # a ConnectionError, but the user asked for it
        if type(e).__name__ == "OfflineModeIsEnabled":
            return False, 0.0
        # a name that does not exist now will not exist in a minute
        if isinstance(e, socket.gaierror):
            return e.errno == socket.EAI_AGAIN, 0.0
        # JSON: a gateway answered with its own page
        if isinstance(e, (ConnectionError, TimeoutError, http.client.IncompleteRead, json.JSONDecodeError)):
            return True, 0.0
        names = {c.__name__ for c in type(e).__mro__ if c.__module__.startswith("httpx")}  # httpx, httpx2
        if names & {"TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"}:
            return True, 0.0
    return False, 0.0


def asked_wait(answer: Any) -> float:
    """The seconds that an HTTP answer asks for, by Retry-After or as the Hub does: ratelimit:
    "api";r=0;t=55"""
    headers = getattr(answer, "headers", {})
    after = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after") or "")
    window = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit") or "")
    return max(float(match[1]) if match else 0.0 for match in (after, window))


def retry(
    call: Callable[[], T],
    what: str,
    *,
    attempts: int = 36,  # the Hub counts in 5-minute windows: 11 attempts outlast one, 36 fill the deadline
    base: float = 1.0,
    maximum: float = 60.0,
    deadline: float = 1800.0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """`call()`, repeated after errors that can pass; it must be safe to repeat.

    Wait n (from 0) is min(base * 2**n, maximum) seconds, or what the server asks for (600 at most) when that
    is longer. None begins that would end after `deadline` seconds. Without jitter, for one rank alone writes.
    An error that cannot pass is raised as it is; giving up raises ConnectionError, with the last error as its
    cause.
    """
    start = clock()
    for n in itertools.count():
        try:
            return call()
        except Exception as error:  # passing() decides: the errors of the HTTP libraries share no base class
            may_pass, seconds = passing(error)
            if not may_pass:
                raise
            wait = max(min(base * 2**n, maximum), min(seconds, 600.0))
            if n + 1 >= attempts or clock() - start + wait > deadline:
                tried = f"{n + 1} attempts in {clock() - start:.0f} s (the next wait: {wait:.0f} s)"
                raise ConnectionError(f"{what}: gave up after {tried}: {brief(error)}") from error
            log.warning("%s: %s; attempt %d of %d in %.0f s", what, brief(error), n + 2, attempts, wait)
        sleep(wait)


def interruptible(call: Callable[[], T]) -> T:
    """`call()` in a thread that is left behind when a signal handler raises: the Hub's client would first
    wait for its uploads."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result()
    finally:
        pool.shutdown(wait=False)


# ---------------------------------------------------------------------------
# Hub
# ---------------------------------------------------------------------------

# What a finished model consists of; never optimizer state, logs, .env, or training_args.bin, which pickles
# the token.
PUSHED = "*.safetensors *.json *.txt *.model *.jinja *.py README.md *.png *.gif *.mp4 *.wav".split()
# LongCat-Flash-Omni's parts
PUSHED += "language_model_embedding.pt vision/*.pt audio/*.pt audio/global_cmvn".split()
PUSHED_DATA = ["*.jsonl", "README.md", "videos/*"]
NO_TEXT = set(".safetensors .pt .png .jpg .jpeg .webp .gif .mp4 .m4v .mov .mkv .avi .webm .wav .flac".split())
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


def hub_api(timeout: float):
    """A Hub client with HF_TOKEN (a login stored on the machine is not used); ValueError without a usable
    one.

    The default client has no timeout: a server that accepts and never answers would hang the run for ever.
    """
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ValueError(f"HF_TOKEN is not set: export a token with write access ({TOKEN_PAGE})")
    # the HTTP library would quote it in its error
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("HF_TOKEN has a space or a non-ASCII character inside: copy it again")

    def client():
        http = default_client_factory()
        http.timeout = (10.0, timeout, timeout, 10.0)  # connect, read, write, pool
        return http

    set_client_factory(client)
    return HfApi(token=token)


def ask_hub(what: str, call: Callable[[], T], deadline: float = 60.0) -> T:
    """retry(call), which a signal ends at once. OSError also for an answer that is no Hub's, where its client
    fails in odd ways."""
    try:
        return interruptible(lambda: retry(call, f"Hub, {what}", deadline=deadline))
    except (KeyError, TypeError, AttributeError) as error:
        raise OSError(f"Hub, {what}: the answer is not a Hub's ({brief(error)})") from error


def hub_check(repo_id: str, public: bool, create: bool, kind: str = "model", must_answer: bool = True) -> str:
    """The full name of the repo to push to, after making sure, before a GPU is paid for, that the push will
    work.

    create=True makes the repo where there is none (private unless `public`); create=False changes nothing.
    Ends the run with exit code 2 when the push could not work. must_answer=False is for a run that has a
    checkpoint to go on from: a Hub that is down is then a warning, if the owner is known from `repo_id` or
    HF_USER_ID.
    """
    owner = os.environ.get("HF_USER_ID", "").strip()
    known = repo_id if "/" in repo_id else f"{owner}/{repo_id}" if owner else ""
    try:
        return find_repo(known or repo_id, public, create, kind)
    except (OSError, ValueError, RuntimeError) as error:
        if known and not must_answer and passing(error)[0]:
            log.warning(f"{brief(error)}: the run goes on, and the push at its end will be to {known}")
            return known
        move = f"check HF_TOKEN ({TOKEN_PAGE}), the name and the network, or use --no_push_to_hub"
        refuse(f"{brief(error)}: {move}")


def find_repo(name: str, public: bool, create: bool, kind: str) -> str:
    """What hub_check promises for a Hub that answers; without an owner, `name` is the token's. Raises what
    ask_hub raises."""
    api = hub_api(timeout=30.0)

    def account() -> tuple[str, list[str]]:
        me = api.whoami()
        role = me.get("auth", {}).get("accessToken", {}).get("role", "")
        return role, [me["name"], *(org["name"] for org in me.get("orgs", []))]

    role, owners = ask_hub("whose token is HF_TOKEN", account)
    if role == "read":
        refuse(f"HF_TOKEN of {owners[0]} has the role read: a push needs the role write ({TOKEN_PAGE})")
    full = name if "/" in name else f"{owners[0]}/{name}"
    owner = full.split("/")[0]
    if owner not in owners:
        writes = f"HF_TOKEN writes to {', '.join(owners)}, not to {owner}"
        refuse(f"{full}: {writes}: change HF_USER_ID or --hub_model_id")
    of_repo = {"repo_id": full, "repo_type": kind}
    exists = ask_hub(f"look up {full}", partial(api.repo_exists, **of_repo))
    if not exists and not create:
        log.info("Hub: would create %s (%s)", full, "public" if public else "private")
        return full
    if not exists:
        # exist_ok: the answer to the first try may be lost
        make = partial(api.create_repo, private=not public, exist_ok=True, **of_repo)
        ask_hub(f"create {full}", make)
    info = ask_hub(f"read {full}", partial(api.repo_info, **of_repo))
    if not info.private and not public:
        refuse(f"{full} is public: add --public, make it private, or choose another --hub_model_id")
    if info.private and public:
        log.warning("Hub: %s is private and stays so; --public is for new repositories", full)
    # The role of a fineGrained token says nothing. The Hub asks here for the right that a commit needs.
    ask_hub(f"write to {full}", partial(api.auth_check, write=True, **of_repo))
    if not create:
        log.info("Hub: would push to %s, which exists", full)
    return full


def hub_push(folder: Path, repo_id: str, message: str, kind: str = "model") -> str:
    """Uploads the model files of `folder` (PUSHED) in one commit and returns the url of the repo.

    Raises ValueError if the folder must not be pushed, OSError or RuntimeError if the Hub did not take it;
    calling it again sends what is missing.
    """
    from huggingface_hub import CommitOperationAdd

    api = hub_api(timeout=120.0)
    names = files_to_push(folder, kind)

    def push() -> None:
        # Made for sending again. The client leaves out files that the Hub has: after a lost answer that is
        # all of them, and there is no second commit. A commit that is still on its way, or another writer's,
        # makes this one a conflict, and the next try sees it. upload_folder would send a commit again without
        # looking, and cut a large one in parts.
        head = api.repo_info(repo_id, repo_type=kind).sha
        files = [CommitOperationAdd(name, folder / name) for name in names]
        api.create_commit(repo_id, files, commit_message=message, repo_type=kind, parent_commit=head)

    ask_hub(f"push to {repo_id}", push, deadline=1800.0)
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


def files_to_push(folder: Path, kind: str) -> list[str]:
    """The names of the files below `folder` that belong on the Hub; ValueError if there are none, or one must
    not be there."""
    from huggingface_hub.utils import filter_repo_objects

    paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    if links := [str(path) for path in paths if path.is_symlink()]:
        raise ValueError(f"{', '.join(links)}: a link's target would be published: put a copy there")
    names = [path.relative_to(folder).as_posix() for path in paths]
    wanted = PUSHED if kind == "model" else PUSHED_DATA
    pushed = list(filter_repo_objects(names, allow_patterns=wanted, ignore_patterns=[".*", "*/.*"]))
    if not pushed:
        raise ValueError(f"{folder}: no model files to push")
    if left := sorted(set(names) - set(pushed)):
        log.info("Hub: not part of a model, not pushed: %s", ", ".join(left))
    for path in map(folder.joinpath, pushed):
        if path.suffix.lower() not in NO_TEXT and file_holds_secret(path):
            raise ValueError(f"{path} contains a token or a signed url: remove it, then push again")
    return pushed


def file_holds_secret(path: Path) -> bool:
    """holds_secret() for a text file of any size, in an 8-bit encoding, UTF-8 or UTF-16."""
    before = ""
    with path.open("rb") as file:
        while block := file.read(2**24):
            # without its NULs, UTF-16 reads as ASCII does
            text = before + block.replace(b"\0", b"").decode("latin-1")
            if holds_secret(text):
                return True
            before = text[-4096:]
    return False


def pushes_data(cfg: Any) -> bool:
    """Whether a run that pushes pushes its data too: not the demo's, and none that came from the Hub."""
    return not cfg.demo and not (cfg.dataset and not Path(cfg.dataset).is_dir())


def push_rows(
    folder: Path, repo_id: str, public: bool, parts: dict[str, list[dict]], about: str, script: str
) -> None:
    """Rank 0: push the rows of each split, JSON lines in `folder` beside what lies there, with a card, as a
    data set that the script's --dataset takes. Exit 2 if that fails: nothing was trained yet."""
    repo = hub_check(repo_id, public, create=True, kind="dataset")
    parts = {split: list(map(redact_row, rows)) for split, rows in parts.items() if rows}
    listed, table = [], []
    for split, rows in parts.items():
        write_lines(folder / f"{split}.jsonl", rows)
        listed.append(f"  - split: {split}\n    path: {split}.jsonl")
        table.append(f"| {split} | {len({row.get('video') for row in rows})} | {len(rows)} |")
    lines = "\n".join
    (folder / "README.md").write_text(f"""---
task_categories: [visual-question-answering]
tags: [video]
configs:
- config_name: default
  data_files:
{lines(listed)}
---
# {repo.split("/")[-1]}

Questions about videos, as `{script}` trained on them; the splits share no video.

| split | videos | questions |
|---|---|---|
{lines(table)}

{about}

```bash
python {script} --dataset {repo}
```
""")
    try:
        url = hub_push(folder, repo, f"{script}, {sum(map(len, parts.values()))} questions", kind="dataset")
    except (OSError, RuntimeError, ValueError) as error:
        refuse(f"Hub, push the data set to {repo}: {brief(error)}; run again, or use --no_push_to_hub")
    log.info(f"pushed {url}")


def redact_row(row: dict) -> dict:
    return {name: redact(value) if isinstance(value, str) else value for name, value in row.items()}


def push_finished(folder: Path, repo: str, message: str, again: str) -> None:
    """Rank 0, the last act of a run: push the finished model in `folder`. Exit 3 when that fails; `again`,
    the command that was typed, pushes it later."""
    try:
        log.info(f"pushed {hub_push(folder, repo, message)}")
    except (OSError, RuntimeError, ValueError) as error:
        whole = f"{folder} is whole; the same command pushes it later:\n    {again}"
        log.warning(f"error: trained, not pushed: {brief(error)}; {whole}")
        raise SystemExit(3) from error


def fetch_model(source: str, *patterns: str, flag: str = "--model") -> Path:
    """The folder with these files of a model: a folder, or a Hub id (downloaded, or in the local cache). Exit
    2 without one."""
    from huggingface_hub import snapshot_download

    mend_torchvision()
    if Path(source).is_dir():
        return Path(source)
    if "/" not in source.strip("/") or source.startswith((".", "/", "~")):
        refuse(f"{flag} {source}: no such folder")
    try:
        local = offline(source)
        get = partial(snapshot_download, source, allow_patterns=list(patterns), local_files_only=local)
        return Path(interruptible(lambda: retry(get, f"download {source}")))
    # the Hub's errors are OSErrors; an impossible name is a ValueError
    except (OSError, ValueError) as error:
        refuse(f"{flag} {source}: {brief(error)}; give a folder, or a Hub id that HF_TOKEN may read")


def check_weights(source: str, *patterns: str) -> None:
    """Exit 2 when shards are missing from a folder, or the disk has no room for what is to be downloaded from
    the Hub: all of it, or its files of these patterns."""
    from huggingface_hub import constants, snapshot_download

    folder = Path(source)
    if folder.is_dir():
        index = folder / "model.safetensors.index.json"
        wanted = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
        if missing := sorted(name for name in wanted if not (folder / name).is_file()):
            short = f"{len(missing)} of {len(wanted)} files of weights are missing"
            refuse(f"--model {source}: {short}, {missing[0]} among them")
        return
    if offline(source):
        return
    try:
        look = partial(snapshot_download, source, allow_patterns=list(patterns) or None, dry_run=True)
        files = retry(look, f"look up {source}", attempts=2)
    except (OSError, ValueError) as error:
        refuse(f"--model {source}: {brief(error)}")
    need = sum(file.file_size for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = disk_free(cache)
    sizes = f"{need / GB:.2f} GB of {source} to {cache}, {free / GB:.2f} GB free"
    if need > free:
        refuse(f"--model {source}: no room to download {sizes}: set HF_HOME")
    log.info(f"download {sizes}")


def check_loaded(loading_info: dict, folder: Path) -> None:
    """Exit 2 when from_pretrained left weights at random, or had some that fit nowhere."""
    names = [
        *loading_info["missing_keys"],
        *loading_info["unexpected_keys"],
        *loading_info["mismatched_keys"],
    ]
    if wrong := sorted(map(str, names)):
        refuse(f"{folder}: {len(wrong)} weights are missing or do not fit, {wrong[0]} among them")


def weights_key(folder: Path) -> str:
    """Of a folder: other weights have another one. Those in the Hub's cache are links to files named by their
    content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".safetensors", ".bin"}):
        file, stat = path.resolve(), path.stat()
        content = file.name if file.parent.name == "blobs" else stat.st_mtime_ns
        digest.update(f"{path.name}|{content}|{stat.st_size}".encode())
    return digest.hexdigest()[:16]


def fill(model: Any, weights: dict[str, Any], where: str) -> None:
    """A model gets these weights, also one on the meta device. Exit 2 unless just these fit, each in its
    shape."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    loaded = {name: tuple(value.shape) for name, value in weights.items()}
    if wrong := sorted({name for name, _ in wanted.items() ^ loaded.items()}):
        first = wrong[0]
        what = "has another shape" if first in wanted else "has no place"
        what = what if first in loaded else "is missing"
        refuse(f"{where}: {len(wrong)} weights are missing or do not fit; {first} {what}")
    model.load_state_dict(weights, assign=True)


@functools.cache  # asked before each of config, weights' sizes and weights
def offline(source: str) -> bool:
    """Whether `source`, a folder or a Hub id, is to be loaded without the network: a folder, or a Hub that
    does not answer.

    One quick look-up, for transformers takes over a minute to find that there is no network. Raises
    RepositoryNotFoundError.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import RepositoryNotFoundError

    if Path(source).is_dir():
        return True
    try:
        retry(lambda: model_info(source, timeout=10), f"look up {source}", attempts=2)
    except RepositoryNotFoundError:
        raise
    # no network: perhaps an earlier run downloaded it
    except OSError as error:
        log.info(f"{source} cannot be looked up ({type(error).__name__}): trying the local cache")
        return True
    return False


# ---------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------


def download(url: str, folder: Path, max_bytes: int = 2 * 2**30, timeout: float = 600.0) -> Path:
    """The file behind an http(s) url, fetched once into `folder`; whole or absent, also after a crash.

    Not by the Hub's client, for the urls of a manifest are strangers: no token, no .netrc, no proxy's
    password, no address of this machine or its link, where clouds keep secrets, but for $SAMPLES_URL's host.
    Raises OSError if the file cannot be had within `timeout` seconds, ValueError if it is none that we take.
    """
    import requests

    address, shown = urllib.parse.urlsplit(url), redact(without_query(url))
    if address.scheme not in ("http", "https"):
        raise ValueError(f"{shown}: only http and https are downloaded")
    suffix = re.search(r"(\.[A-Za-z0-9]{1,8})?$", address.path)[0]
    target = folder / (digest_of(url) + suffix)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # several ranks may want the same url
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    session = requests.Session()
    session.headers["User-Agent"] = "Mozilla/5.0 (compatible; video training)"
    proxies = requests.utils.get_environ_proxies(url)
    session.proxies = {scheme: proxy for scheme, proxy in proxies.items() if "@" not in proxy}
    session.trust_env = False
    session.hooks["response"] = [drop_redirect]
    send = session.send  # of each request, those of redirects too
    session.send = lambda request, **named: send(elsewhere(request), **named)
    end = time.monotonic() + timeout

    def fetch() -> None:
        with session.get(url, stream=True, timeout=min(30.0, timeout)) as answer, part.open("wb") as file:
            answer.raise_for_status()
            if answer.headers.get("content-type", "").lower().startswith("text/html"):
                raise ValueError(f"{shown}: a web page, not a file (moved, expired, or behind a login)")
            size = int(answer.headers.get("content-length") or 0)
            # read1: iter_content() would wait for whole blocks of an answer that drips
            while size <= max_bytes and (block := answer.raw.read1(2**20, decode_content=True)):
                file.write(block)
                size = max(size, file.tell())
                if time.monotonic() > end:
                    raise TimeoutError(f"{shown}: only {file.tell()} bytes in {timeout:.0f} s")
            if size > max_bytes:
                raise ValueError(f"{shown}: {size} bytes or more; the limit is {max_bytes}")
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave an empty file under the final name
        part.replace(target)

    try:
        retry(fetch, f"download {shown}", attempts=5, deadline=timeout)
    except requests.packages.urllib3.exceptions.HTTPError as error:
        raise OSError(f"{shown}: {brief(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def elsewhere(request: Any) -> Any:
    """The request, if it goes to another machine: ValueError for addresses of this one and of its link."""
    host = urllib.parse.urlsplit(request.url).hostname or ""
    if host == urllib.parse.urlsplit(os.environ.get("SAMPLES_URL", "")).hostname:
        return request
    try:
        found = {
            ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in socket.getaddrinfo(host, None)
        }
    except OSError:  # by a proxy it may be found; else the request says why not
        return request
    for address in found:
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback or address.is_link_local or address.is_unspecified:
            raise ValueError(f"{host} is {address}, this machine or its link: no video is fetched from there")
    return request


def drop_redirect(answer: Any, **_: Any) -> None:
    """A hook of requests, which would read the body of a redirect, however long."""
    if answer.is_redirect:
        answer.close()


# ---------------------------------------------------------------------------
# A run, from start to finish
# ---------------------------------------------------------------------------


@dataclass
class Run:
    """What start_run finds, and the steps, saves and the finish of a run need."""

    cfg: Any  # with all that was worked out: steps, dtype, model
    script: Path
    repo: str  # on the Hub, "" for none
    checkpoint: Path | None  # to go on from
    step: int  # that it is of
    other_ranks: bool  # whether another number of ranks saved it
    facts: dict  # that a checkpoint of this run has
    config: dict  # DeepSpeed's
    loss_is: str  # what the loss is, for its curve
    track: Callable[[dict, int | None], Any]
    unlogged: list[dict] = field(default_factory=list)  # numbers of the steps since the last line of the log

    @property
    def folder(self) -> Path:
        return self.cfg.output_dir


def open_run(cfg: Any, data_repo: str = "") -> Any:
    """Every rank, first of all: join the others, and make the checks that take no data: is the folder this
    run's and free, would the push work? -> this rank's torch.device"""
    device = init_distributed()
    pids = from_all_ranks(os.getpid())

    @on_rank0
    def look() -> None:
        resumes = bool(numbered(cfg.output_dir / "checkpoints", "step_"))
        if cfg.output_dir.exists():
            if not cfg.check:
                lock_folder(cfg.output_dir, pids)
            check_same_run(cfg)
        if cfg.push_to_hub:
            hub_check(cfg.hub_model_id, cfg.public, create=False, must_answer=not resumes)
            if data_repo:
                hub_check(data_repo, cfg.public, create=False, kind="dataset", must_answer=not resumes)

    look()
    return device


def with_steps(cfg: Any, warmup: int, samples: int = 0, per_step: int = 1) -> Any:
    """cfg with --steps, or as many as --epochs of `samples` are at `per_step`, and with --warmup_steps:
    unless it was given, `warmup`, but at most a tenth of the steps."""
    steps = cfg.steps or max(1, math.ceil(cfg.epochs * samples / per_step))
    warmup = min(warmup, steps // 10) if cfg.warmup_steps is None else cfg.warmup_steps
    return dataclasses.replace(cfg, steps=steps, warmup_steps=warmup)


def show_plan(
    cfg: Any, device: Any, lines: list[tuple[str, str]], layouts: list[Layout], advice: str, disk_bytes: float
) -> Layout:
    """Every rank: print what this run is going to do, and check that it fits into memory and onto the disk,
    else exit 2.

    lines: (label, text). -> the layout of memory that is taken, its config filled in.
    """
    import torch

    cuda = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    free, need = disk_free(cfg.output_dir) / GB, disk_bytes / GB
    disk = ("disk", f"{need:.2f} GB for checkpoints and model, {free:.1f} GB free")
    text = [f"{label:<9}{said}" for label, said in [*lines, disk]]
    log.info("\n".join([f"Out: {cfg.output_dir} | Device: {device} ({what}), {cfg.dtype}", *text]))
    table, layout = choose_layout(layouts, cfg.deepspeed, advice)
    log.info(f"memory   {table}")
    if cfg.warmup_steps > cfg.steps:
        log.warning(
            f"warning: --warmup_steps {cfg.warmup_steps} is more than the {cfg.steps} steps of the run: the "
            f"learning rate gets no higher than {cfg.lr * cfg.steps / cfg.warmup_steps:.2g}"
        )
    if need > free:
        refuse(
            f"--output_dir {cfg.output_dir}: {free:.2f} GB free, the run writes {need:.2f} GB; make room or "
            "lower --keep"
        )
    name = "DeepSpeed's config" if cfg.deepspeed == "auto" else cfg.deepspeed
    config = ds_config(layout.config, name, getattr(cfg, "batch_size", 1), cfg.accum, cfg.clip, cfg.dtype)
    return dataclasses.replace(layout, config=config)


def row_lines(rows: list[T], told: Callable[[T], str]) -> list[tuple[str, str]]:
    """The plan's lines about three of the rows, as the model will see them"""
    shown = (told(row).replace("\n", "\\n") for row in rows[:: max(1, len(rows) // 3)][:3])
    return [
        ("" if i else "rows", text if len(text) < 240 else f"{text[:110]} ... {text[-125:]}")
        for i, text in enumerate(shown)
    ]


def steps_line(cfg: Any, device: Any, unit: str) -> tuple[str, str]:
    """The plan's line about a step, of `unit`s"""
    world, ranks = world_size(), "GPU" if device.type == "cuda" else "CPU process"
    per_step = world * cfg.batch_size * cfg.accum
    batch = f"{world} {ranks} x {cfg.batch_size} {unit} x {cfg.accum} accum = {per_step} {unit} per step"
    return "steps", f"{cfg.steps} of {batch}; warm-up {cfg.warmup_steps}"


def start_run(
    from_flags: Any,
    cfg: Any,
    script: str,
    layout: Layout,
    bad: list[dict],
    loss_is: str,
    several: bool = False,
    **facts: Any,
) -> Run:
    """Every rank, after the plan: take the folder and the repository, find the checkpoint to go on from, and
    write down what makes this run. Exit 2 when its facts (ZeRO stage, precision, data, ...) are not those of
    this run.

    from_flags: the configuration as it came from the command line; cfg: with what was worked out. `several`:
    other processes write into the same W&B run.
    """
    pids = from_all_ranks(os.getpid())
    facts = {"zero_stage": layout.stage, "dtype": cfg.dtype} | facts

    @on_rank0
    def start() -> tuple[str, Path | None, dict]:
        folder = cfg.output_dir
        if folder not in _lock:  # else open_run has taken it, and looked
            lock_folder(folder, pids)
            check_same_run(from_flags)
        path, marker = find_checkpoint(folder / "checkpoints", cfg.resume, facts)
        repo = ""
        if cfg.push_to_hub:
            repo = hub_check(cfg.hub_model_id, cfg.public, create=True, must_answer=path is None)
        write_run_folder(from_flags, script, marker["step"], bad, layout.config)
        return repo, path, marker

    repo, path, marker = start()
    step, other_ranks = marker["step"], marker["ranks"] != world_size()
    config = layout.config | ({"checkpoint": {"load_universal": True}} if other_ranks else {})
    # more GPUs make fewer steps of the same --epochs
    cfg = dataclasses.replace(cfg, steps=max(cfg.steps, step))
    where = cfg.report_to if rank() == 0 else "none"
    track = tracker(where, cfg.output_dir, Path(script).stem, several)
    unlogged = marker.get("unlogged", [])
    return Run(cfg, Path(script), repo, path, step, other_ranks, facts, config, loss_is, track, unlogged)


def find_checkpoint(folder: Path, resume: bool, facts: dict) -> tuple[Path | None, dict]:
    """Rank 0: (the newest whole checkpoint or None, its checkpoint.json). Exit 2 when its facts differ from
    these, and when there is one that must not be resumed."""
    path = newest_checkpoint(folder)
    if path is None:
        return None, {"step": 0, "ranks": world_size()}
    if not resume:
        refuse(
            f"{path} is there: leave out --no_resume to go on from it, or give another --output_dir to start "
            "anew"
        )
    marker = json.loads((path / "checkpoint.json").read_text())
    for name, value in facts.items():
        before = marker.get(name, value)  # one of an older version may not have it
        if before == value:
            continue
        if name == "data":
            refuse(
                f"{path} was trained on other data: bring the earlier rows back, or give another --output_dir"
            )
        refuse(
            f"{path} was saved with {name} {before}, this run has {value}: go on with {name} {before}, "
            "or start anew with another --output_dir"
        )
    return path, marker


def write_run_folder(cfg: Any, script: str, step: int, bad: list[dict], config: dict) -> None:
    """Rank 0: write what makes this run (settings, versions, DeepSpeed config, the code itself, what was left
    out), and forget the metrics of steps after `step`, from which it goes on, and results that are not of
    that step."""
    folder = cfg.output_dir
    (folder / "SUCCESS").unlink(missing_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    write_json(folder / "config.json", settings(cfg))
    write_json(folder / "environment.json", environment())
    write_json(folder / "deepspeed.json", config)
    write_lines(folder / "bad_samples.jsonl", bad)
    shutil.copyfile(script, folder / Path(script).name)
    write_lines(folder / "metrics.jsonl", [row for row in read_metrics(folder) if row["step"] <= step])
    if read_results(folder).get("steps") != step:
        (folder / "results.json").unlink(missing_ok=True)


def open_engine(run: Run, model: Any, optimizer: Any, frozen_left_out: bool = False) -> Any:
    """Every rank: DeepSpeed's engine, with weights and optimizer states of the checkpoint if there is one."""
    import deepspeed  # after init_distributed has told it the device

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.config)
    resume_engine(run, engine, frozen_left_out)
    return engine


def resume_engine(run: Run, engine: Any, frozen_left_out: bool = False) -> None:
    if run.checkpoint:
        load_engine(engine, run.checkpoint, run.other_ranks, frozen_left_out)
        others = ", saved by another number of ranks" if run.other_ranks else ""
        log.info(f"resumed {run.checkpoint}{others}")


def save_run(
    run: Run,
    engine: Any,
    step: int,
    extra: Callable[[Path], None] = lambda aside: None,
    frozen_left_out: bool = False,
) -> None:
    """Every rank: checkpoints/step_000200 to resume from. extra(folder) writes what else belongs to it, on
    each rank."""

    def write(aside: Path) -> None:
        engine.save_checkpoint(
            str(aside), tag="deepspeed", save_latest=False, exclude_frozen_parameters=frozen_left_out
        )
        extra(aside)

    folder = run.folder / "checkpoints"
    save_checkpoint(
        folder, step, write, run.cfg.keep, ranks=world_size(), unlogged=mean_rows(run), **run.facts
    )
    log.info(f"saved {folder / f'step_{step:06d}'}")


def learning_rate(cfg: Any, step: int) -> float:
    """cfg.lr after a linear warm-up of cfg.warmup_steps, with cfg.lr_decay along a cosine to 0 at
    cfg.steps."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    return cfg.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / cfg.steps) if cfg.lr_decay else 1.0)


def training_steps(
    run: Run,
    engine: Any,
    save: Callable[[int], None],
    evaluate: Callable[[int], dict] | None,
    numbers: Callable[[], dict] = dict,
) -> Iterator[tuple[int, dict]]:
    """Every rank, around each optimizer step from run.step to cfg.steps. Before it: learning rate and seeds.
    After it: divergence, log, save(step), signals, and evaluate(step) -> numbers, with "held_out_loss" among
    them.

    Yields (step, row): the loop puts its mean "loss" into row, and what else is to be logged; a line of the
    log has the means since the line before, over all ranks. numbers() -> what else a line has. A signal ends
    the process with 128 + n after a checkpoint, also in the middle of evaluate, and three steps in a row that
    are not finite with 4.
    """
    import torch
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    cfg, step, skipped = run.cfg, run.step, 0
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=None if rank() == 0 else True)
    with bar, logging_redirect_tqdm([log]), signals_wait():
        if is_evaluation_missing(run, step, evaluate):
            evaluate_now(run, step, evaluate)
        since, since_step = time.monotonic(), step
        while step < cfg.steps:
            lr = learning_rate(cfg, step)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(seed_of(cfg.seed, step, rank()))  # of dropout
            row: dict[str, Any] = {}
            yield step, row
            step += 1
            bar.update()

            skipped = count_skipped(engine, row["loss"], step, cfg.lr, skipped)
            run.unlogged.append(row)
            if step % cfg.log_every == 0 or step == cfg.steps:
                speed = (step - since_step) / (time.monotonic() - since)
                log_line(run, engine, step, lr, speed, bar, numbers())
                since, since_step = time.monotonic(), step
            saves = step % cfg.save_every == 0 or step == cfg.steps
            evaluates = evaluate and step % cfg.eval_every == 0 and step < cfg.steps
            try:
                if saves:
                    save(step)
                stop_if_asked()
                if evaluates:
                    evaluate_now(run, step, evaluate)
            except SystemExit as stop:
                if stop.code in STOPPED:
                    if not saves:
                        save(step)
                    name = signal.Signals(stop.code - 128).name
                    log.info(f"stopped by {name} after step {step}; the same command goes on from there")
                raise
            if saves or evaluates:  # the clock is for training alone
                since, since_step = time.monotonic(), step


def is_evaluation_missing(run: Run, step: int, evaluate: Callable | None) -> bool:
    """Every rank: whether the run was stopped between the checkpoint and the evaluation of this step."""
    due = evaluate and step and step % run.cfg.eval_every == 0 and step < run.cfg.steps
    done = any(row["step"] == step and "held_out_loss" in row for row in read_metrics(run.folder))
    return bool(over_ranks(bool(due and not done), "max"))


def evaluate_now(run: Run, step: int, evaluate: Callable[[int], dict]) -> None:
    numbers = evaluate(step)
    if rank() == 0:
        record(run, {"step": step} | numbers)
        write_loss_curve(run.folder, run.loss_is)


def mean_rows(run: Run) -> list[dict]:
    """Every rank: the numbers of the steps since the last line, each the mean over all ranks; null where it
    is not finite."""
    import torch
    import torch.distributed as dist

    names = list(run.unlogged[-1]) if run.unlogged else []
    # null: a row that was averaged before, and perhaps saved and read back
    numbers = [
        [math.nan if row[name] is None else float(row[name]) for name in names] for row in run.unlogged
    ]
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, group=control_group())
    means = (values / world_size()).tolist()
    run.unlogged = [dict(zip(names, map(number_or_null, row))) for row in means]
    return run.unlogged


def log_line(run: Run, engine: Any, step: int, lr: float, speed: float, bar: Any, extra: dict) -> None:
    """Every rank: a line of the log, of metrics.jsonl and of the tracker, of all steps since the line
    before."""
    rows, run.unlogged = mean_rows(run), []
    means = {
        name: np.mean([math.nan if row[name] is None else row[name] for row in rows]) for name in rows[0]
    }
    left = timedelta(seconds=round((run.cfg.steps - step) / speed))
    log.info(f"step {step:06d} | loss {means['loss']:.4f} | {speed:.2f} steps/s | {left} left")
    bar.set_postfix(loss=f"{means['loss']:.4f}")
    norm = engine.get_global_grad_norm()  # None until a first update was made
    line = {"step": step} | means | {"lr": lr, "grad_norm": math.nan if norm is None else norm}
    line |= {"samples_per_s": speed * engine.train_batch_size(), "peak_memory_gb": peak_memory_gb()}
    record(run, line | extra)


def record(run: Run, row: dict) -> None:
    """Rank 0: one line of metrics.jsonl; a number that is not finite is null there, as JSON has no word for
    it."""
    if rank() == 0:
        row = {
            name: value if isinstance(value, int) else number_or_null(value) for name, value in row.items()
        }
        append_json(run.folder / "metrics.jsonl", row)
        run.track(row, row["step"])


def number_or_null(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def count_skipped(engine: Any, loss: Any, step: int, lr: float, skipped: int) -> int:
    """Every rank, after engine.step(): how many updates in a row, `skipped` before, DeepSpeed has skipped on
    all ranks because a gradient was not finite. Ends the run with exit 4 at the third."""
    if engine.was_step_applied():
        return 0
    # fp16 skips to find its scale
    if engine.fp16_enabled() and math.isfinite(over_ranks(float(loss), "mean")):
        return skipped
    log.warning(f"warning: step {step}: not finite, update skipped on all ranks ({skipped + 1} in a row)")
    if skipped == 2:
        log.warning(f"error: diverged: lower --lr {lr:g} and run again; it goes on from the last checkpoint")
        raise SystemExit(4)
    return skipped + 1


@contextlib.contextmanager
def out_of_memory(advice: str | Callable[[], str]) -> Iterator[None]:
    """Inside, running out of memory is one line with what to do, and exit code 1."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise SystemExit(
                f"error: out of memory: {advice if isinstance(advice, str) else advice()}"
            ) from error
        raise


def finish_run(
    run: Run,
    export: Callable[[Path], None],
    evaluate: Callable[[], dict],
    card: Callable[[dict], dict],
    last: bool = True,
) -> dict:
    """Every rank, after the last step: model/, its results, its card, the push, SUCCESS. -> results.json

    export(folder) writes the finished model, first, so that a run that dies in its evaluation has it.
    evaluate() -> what the script measured (on rank 0): "score" from 0 to 1, "score_is", "controls" {name:
    number to be below it}, "held_out_loss", "tables" {title: {row: {column: number}}}. card(results) ->
    what write_card wants. Exit 3 when only the push failed. `last`: False when the script has more to do.
    """
    folder, target, step = run.folder, run.folder / "model", run.cfg.steps
    results = on_rank0(read_results)(folder)
    if results.get("steps") != step:
        export(target)
        results = evaluate()

        @on_rank0
        def keep() -> dict:
            kept = results | summary(folder, step)
            numbers = {name: kept[name] for name in ("held_out_loss", "score") if kept.get(name) is not None}
            record(run, {"step": step} | numbers)
            write_loss_curve(folder, run.loss_is)
            shutil.copyfile(folder / "loss.png", target / "loss.png")
            write_json(folder / "results.json", kept)
            return kept

        results = keep()

    @on_rank0
    def publish() -> None:
        write_card(run, results, **card(results))  # again when the push comes later: it names the repo
        show_results(results, folder)
        if run.repo:
            push_finished(target, run.repo, f"{run.script.name}, step {step}", again=command_line())
        if last:
            write_text(folder / "SUCCESS", time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))

    publish()
    return results


def batches_ahead(get_batch: Callable[[int], T], cfg: Any, first: int) -> Iterator[list[T]]:
    """Of each step from `first` on the micro-batches, get_batch(micro_step); a thread prepares those of the
    next step while the GPU works."""

    def of(step: int) -> list[T]:
        return [get_batch(micro_step) for micro_step in range(step * cfg.accum, (step + 1) * cfg.accum)]

    pool = ThreadPoolExecutor(1)
    ahead = pool.submit(of, first)
    for step in range(first, cfg.steps):
        batches = ahead.result()
        if step + 1 < cfg.steps:
            ahead = pool.submit(of, step + 1)
        yield batches


def mean_loss(count: int, size: int, loss_of: Callable[[list[int]], tuple[Any, int]]) -> float:
    """Every rank: the mean per token of `count` items, at most `size` of them together; loss_of(items) ->
    (loss, summed over tokens, their number)"""
    sums = {}
    for part in rounds(count, size):
        loss, tokens = loss_of(part)
        sums[part[0]] = (loss.item(), tokens)
    total_loss, total_tokens = np.sum(list(merged_over_ranks(sums).values()), axis=0)
    return float(total_loss / total_tokens)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in the mode of use; afterwards each of its modules is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def load_pretrained(load: Callable[[Path], Any], cfg: Any, run: Run, checkpointing: bool) -> Any:
    """Every rank: the model that load(folder) makes of cfg.model; under ZeRO-3 each rank has its part of the
    weights."""
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    folder = on_rank0(fetch_model)(cfg.model, "*")
    torch.manual_seed(cfg.seed)
    # from_pretrained looks whether one that says ZeRO-3 is alive
    alive = HfDeepSpeedConfig(run.config) if run.facts["zero_stage"] == 3 else None
    model = load(folder)
    del alive
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def export_pretrained(
    model: Any, load: Callable[[Path], Any], cfg: Any, dtype: Any, processor: Any, target: Path
) -> None:
    """Every rank: model/ as the class's own from_pretrained and servers take it, with its processor or
    tokenizer. With LoRA it is merged into what load(folder) makes of cfg.model, and adapter/ is the adapter
    alone; with --adapter_only that is all."""
    weights = full_weights(model, dtype, lambda p: p.requires_grad or not cfg.lora_r)
    if rank():
        return
    target.mkdir(exist_ok=True)
    processor.save_pretrained(target)
    if not cfg.lora_r:
        # loaded under ZeRO-3 it would save other names (transformers 5.23)
        vars(model).pop("_weight_conversions", None)
        model.save_pretrained(target, state_dict=weights)
        return
    from peft import PeftModel

    adapter = target if cfg.adapter_only else target / "adapter"
    adapter.mkdir(exist_ok=True)
    below = str(Path(cfg.model).resolve()) if Path(cfg.model).is_dir() else cfg.model
    model.peft_config["default"].base_model_name_or_path = below
    model.save_pretrained(adapter, state_dict=weights)
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    model.generation_config.save_pretrained(adapter)
    if not cfg.adapter_only:
        whole = PeftModel.from_pretrained(load(fetch_model(cfg.model, "*")), adapter).merge_and_unload()
        whole.save_pretrained(target)


def finished_model(source: str, settings_file: str) -> tuple[Path, str, dict]:
    """-> (folder of a finished model, the model itself or, of an adapter, its base model; what the script
    wrote beside it, with a dtype of this machine)"""
    import torch

    folder = fetch_model(source, "*")
    saved = read_json(path) if (path := folder / settings_file).exists() else {}
    dtype = saved.get("dtype")
    saved["dtype"] = pick_dtype("fp32" if dtype == "fp16" and not torch.cuda.is_available() else dtype)
    return folder, adapter_of(folder) or str(folder), saved


def ready(net: Any, folder: Path) -> Any:
    """A loaded model, with the adapter if that is what lies in `folder`, on this machine's device and in the
    mode of use"""
    import torch

    if adapter_of(folder):
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, folder)
    return net.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def adapter_of(folder: Path) -> str:
    """The base model of a LoRA adapter, "" for what is none"""
    file = folder / "adapter_config.json"
    return read_json(file).get("base_model_name_or_path", "") if file.exists() else ""


def refuse_adapter(source: str, folder: Path) -> None:
    """Exit 2 for an adapter where a model to train is wanted."""
    if below := adapter_of(folder):
        refuse(f"--model {source} is a LoRA adapter of {below}: give {below}, or what it was merged into")


def copy_code(target: Path, script: str, *more: str) -> None:
    """Rank 0: the script and common.py into a finished model, whose card's snippet runs them; all of it
    flushed to disk."""
    for name in (Path(script).name, "common.py", *more):
        shutil.copyfile(Path(script).with_name(name), target / name)
    for path in target.rglob("*"):
        sync(path)


def summary(folder: Path, step: int) -> dict:
    """Of metrics.jsonl"""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return {
        "steps": step,
        "final_loss": rows[-1]["loss"],
        "samples_per_s": float(np.median([row["samples_per_s"] for row in rows])),
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
    }


def show_results(results: dict, folder: Path) -> None:
    """The table at the end of a run, of results.json, and where things are."""
    score = "none " if results["score"] is None else f"{results['score']:.3f}"
    lines = ["", f"{'score':<22}{score}   {results['score_is']}"]
    lines += [
        f"{name:<22}{value:.3f}   a control, to be below the score"
        for name, value in results["controls"].items()
    ]
    for title, rows in results["tables"].items():
        lines += ["", *aligned(title, rows)]
    if results.get("held_out_loss") is not None:
        lines += ["", f"{'held-out loss':<22}{results['held_out_loss']:.4f}"]
    lines.append(
        f"{'speed':<22}{results['samples_per_s']:.2f} samples/s, peak memory {results['peak_memory_gb']:.2f} "
        "GB"
    )
    pictures = folder / "model" / "samples.png"
    samples = pictures if pictures.exists() else folder / "samples"
    lines += [f"{'model':<22}{folder / 'model'}", f"{'samples':<22}{samples}"]
    log.info("\n".join(lines))


def aligned(title: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """A table {row: {column: number}} as lines of text"""
    columns = list(next(iter(rows.values())))
    wide = max(22, *(len(name) + 2 for name in [title, *rows]))
    lines = [f"{title:<{wide}}" + "".join(f"{column:>{max(9, len(column) + 2)}}" for column in columns)]
    for name, values in rows.items():
        cells = [f"{values[c]:.3f}" if values.get(c) is not None else "-" for c in columns]
        lines.append(
            f"{name:<{wide}}" + "".join(f"{cell:>{max(9, len(c) + 2)}}" for cell, c in zip(cells, columns))
        )
    return lines


CARD = """---
{{ card_data }}
---

# {{ model_name }}

{{ about }}

| measured | |
|---|---|
{% for name, value in numbers.items() %}| {{ name }} | {{ "%.4g" % value }} |
{% endfor %}
Score: {{ score_is }}.
{% for table in tables %}
{{ table }}
{% endfor %}
{{ more }}

![loss](loss.png)

```python
import sys

{{ find_folder }}
sys.path.insert(0, folder)  # {{ script }} and common.py, whose first lines say what they need
{{ usage }}
```

Command: `{{ env.command }}`; all settings are in the `config.json` of the run. {{ env.world_size }} x
{{ env.device }}; {{ versions }}; revision {{ env.git_revision or "unknown" }}.
"""


def write_card(
    run: Run, results: dict, about: str, usage: str, data: str, more: str = "", **metadata: Any
) -> None:
    """Rank 0: model/README.md, with what was measured as the Hub's model index has it.

    about, more: Markdown; usage: Python, which has the model's `folder`; data: what it was trained on, a
    name; metadata: of huggingface_hub.ModelCardData: library_name, pipeline_tag, tags, base_model, license,
    datasets.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = (run.repo or run.cfg.hub_model_id).split("/")[-1]
    measured = {"score": results["score"]} | results["controls"]
    more_numbers = "held_out_loss steps final_loss samples_per_s peak_memory_gb".split()
    numbers = measured | {number: results.get(number) for number in more_numbers}
    task = metadata["pipeline_tag"]
    index = [
        EvalResult(task, data, data, metric, value) for metric, value in measured.items() if value is not None
    ]
    made_of = {field: value for field, value in metadata.items() if value}
    environment = json.loads((run.folder / "environment.json").read_text())
    find_folder = 'folder = "."'
    if run.repo:
        find_folder = (
            f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{run.repo}")'
        )
    card = ModelCard.from_template(
        ModelCardData(model_name=name, eval_results=index or None, **made_of),
        template_str=CARD,
        model_name=name,
        about=about,
        numbers={label.replace("_", " "): value for label, value in numbers.items() if value is not None},
        score_is=results["score_is"],
        tables=[markdown_table(title, rows) for title, rows in results["tables"].items()],
        more=more,
        find_folder=find_folder,
        script=run.script.name,
        usage=usage,
        env=environment,
        versions=", ".join(f"{package} {version}" for package, version in environment["versions"].items()),
    )
    write_text(run.folder / "model" / "README.md", str(card))


def markdown_table(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = [f"{values[c]:.3f}" if values.get(c) is not None else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
