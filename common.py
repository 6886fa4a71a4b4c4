"""What the scripts share: flags, ranks, run folder, frames, DeepSpeed, checkpoints, Hub, and the run itself.

Copying one script into another project? Take this file and the JSON files with it. Functions and a few
records; each function imports what it alone needs, so a script that never opens a video needs no OpenCV.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import http.client
import importlib
import importlib.util
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
import time
import typing
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

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
    config: type[T], doc: str, demo: dict, variables: dict[str, str], preset: dict | None = None
) -> T:
    """The command line as a `config` dataclass: defaults < `preset` or --demo < environment variables <
    flags.

    `demo` holds the fields that --demo sets, `variables` maps an environment variable to the flag it stands
    for. Accepts the --local_rank=N that the deepspeed launcher adds. A bad value or flag ends the process
    with exit code 2.
    """
    import tyro

    flags = [flag for flag in sys.argv[1:] if not re.match("--local[_-]rank=", flag)]
    from_environment = []
    for name, flag in variables.items():
        if os.environ.get(name):
            from_environment += [flag, os.environ[name]]
    default = config(**demo) if "--demo" in flags else config(**preset or {})
    return tyro.cli(
        config, args=from_environment + flags, default=default, description=doc, use_underscores=True
    )


def check_settings(
    cfg: Any, at_least_1: str = "", above_0: str = "", shares: str = "", at_least_0: str = ""
) -> None:
    """ValueError for a field of these names that is out of range (`shares`: from 0 to below 1), for a
    DeepSpeed JSON that is not there, and for a tracker that is not installed."""
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
    if cfg.deepspeed != "auto" and not Path(cfg.deepspeed).is_file():
        raise ValueError(f"--deepspeed {cfg.deepspeed}: no such file; auto takes what fits")
    if cfg.report_to != "none" and not importlib.util.find_spec(cfg.report_to):
        raise ValueError(f"--report_to {cfg.report_to}: pip install {cfg.report_to}, or --report_to none")


def run(main: Callable[[], Any]) -> NoReturn:
    """Run `main`, then end with the exit code that all scripts share (see README.md) and leave no process
    group behind.

    Under run.sh, rank 0 also writes the code to the file $PYTHON_RUN_STATUS: launchers do not hand codes on
    reliably.
    """
    quiet_libraries()
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
    libraries = "torch|transformers|deepspeed|huggingface_hub|matplotlib|accelerate|trl|peft|datasets"
    warnings.filterwarnings("ignore", module=rf"({libraries})\b")
    for name in "DeepSpeed transformers huggingface_hub httpx2 httpx accelerate datasets absl".split():
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
    import deepspeed
    import deepspeed.ops

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


@functools.cache
def control_group():
    """A gloo group for small messages between hosts' CPUs. It waits for a day: rank 0 may be decoding or
    downloading."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


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


VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"}


def read_rows(source: Path) -> list[tuple[str, dict]]:
    """[(where, row)] of a file of JSON lines, CSV or parquet, or of a folder of x.mp4 beside x.json (the row
    is the JSON and the video's name). Exit 2 if it is missing, empty or none of these."""
    if source.is_dir():
        videos = sorted(path for path in source.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
        sides = [video.with_suffix(".json") for video in videos]
        rows = [
            (str(s), (read_json(s) if s.exists() else {}) | {"video": v.name}) for v, s in zip(videos, sides)
        ]
    elif not source.is_file():
        refuse(f"{source} does not exist")
    elif source.suffix == ".csv":
        try:
            with source.open(newline="", encoding="utf-8-sig") as file:
                rows = [(f"{source}:{number}", row) for number, row in enumerate(csv.DictReader(file), 2)]
        except (UnicodeDecodeError, csv.Error) as error:
            refuse(f"{source} is not CSV in UTF-8: {error}")
    elif source.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            refuse(f"{source}: pip install pyarrow, or convert it to JSON lines")
        try:
            table = pyarrow.parquet.read_table(source).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            refuse(f"{source} is not parquet: {error}")
        rows = [(f"{source}, row {i}", row) for i, row in enumerate(table, 1)]
    else:
        rows = [(f"{source}:{number}", row) for number, row in read_json_lines(source)]
    return rows or refuse(f"{source} is empty")


def first_of(row: dict, *names: str) -> Any:
    """The first of these columns that has something in it, or None."""
    return next((row[name] for name in names if row.get(name)), None)


def is_url(video: str) -> bool:
    return video.startswith(("http://", "https://"))


def leave_out(source: Any, good: int, bad: list[dict], max_bad: float) -> None:
    """Say which samples are left out; exit 2 when that are more than the share `max_bad`, or all."""
    first = "".join(f"\n  {b['where']}: {b.get('video', '')}: {b['reason']}" for b in bad[:5])
    if not good:
        refuse(f"{source}: none of {len(bad)} samples is usable:{first}")
    if len(bad) > max_bad * (good + len(bad)):
        refuse(
            f"{source}: {len(bad)} of {good + len(bad)} samples are bad, more than --max_bad "
            f"{max_bad}:{first}"
        )
    if bad:
        log.warning(f"warning: {len(bad)} of {good + len(bad)} samples are left out:{first}")


DEFAULT_QUESTION = "What happens in this video?"
# What is trained on when nothing is given: (file, caption, split), as a first look at a rented box.
SAMPLES = [
    (
        "https://huggingface.co/datasets/diffusion-datasets/sample-videos/resolve/main/sample1.mp4",
        "a cat",
        "train",
    ),
    (
        "https://huggingface.co/datasets/diffusion-datasets/sample-videos/resolve/main/sample2.mp4",
        "a cat",
        "held_out",
    ),
    ("https://assets.rapidata.ai/hailuo-02_scene-motion_0059.gif", "a breeze over grapes", "train"),
    ("https://assets.rapidata.ai/hailuo-02_scene-motion_0008.gif", "a breeze over books", "held_out"),
]


def sample_rows() -> list[tuple[str, dict, str]]:
    """The public samples; $SAMPLES_URL is a mirror that has the four files."""
    mirror = os.environ.get("SAMPLES_URL", "").rstrip("/")
    urls = [f"{mirror}/{url.rsplit('/', 1)[1]}" if mirror else url for url, _, _ in SAMPLES]
    return [
        (u, {"video": u, "question": DEFAULT_QUESTION, "answer": a}, s) for u, (_, a, s) in zip(urls, SAMPLES)
    ]


def split_of(name: str) -> str:
    """The part that a split's name means: "held_out" (validation, test and the like), "train" (others), or ""
    for no name"""
    return (
        "held_out" if name.startswith(("held_out", "val", "test", "eval", "dev")) else "train" if name else ""
    )


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


def dataset_rows(source: str, cache: Path, videos: bool) -> list[tuple[str, dict, str]]:
    """(where, row, split) of a Hub id or folder that the library datasets loads. A video is a path, a URL, or
    the file itself."""
    from huggingface_hub import hf_hub_download

    try:
        from datasets import Dataset, Video, load_dataset, load_from_disk
    except ImportError:
        refuse(f"--dataset {source}: pip install datasets")

    local = Path(source).is_dir()
    saved = local and any((Path(source) / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = load_from_disk(source) if saved else load_dataset(source)
    except (
        OSError,
        ValueError,
    ) as error:  # a missing repository is an OSError as well, an unknown format a ValueError
        refuse(f"--dataset {source}: {brief(error)}")

    def video_file(video: Any) -> str:
        if isinstance(video, dict):  # {"path", "bytes"}: the file lies in the table
            if not videos or not video.get("bytes"):
                return str(video.get("path") or "")
            target = cache / "dataset_videos" / f"{hashlib.sha256(video['bytes']).hexdigest()[:32]}.mp4"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, lambda aside: aside.write_bytes(video["bytes"]))
            return str(target)
        if not videos or not isinstance(video, str) or is_url(video) or Path(video).is_absolute():
            return video
        return str(Path(source) / video) if local else hf_hub_download(source, video, repo_type="dataset")

    rows, parts = [], {"train": loaded} if isinstance(loaded, Dataset) else loaded
    for name, part in parts.items():
        if isinstance(part.features.get("video"), Video):
            part = part.cast_column("video", Video(decode=False))
        split = split_of(name) if len(parts) > 1 else ""
        for number, row in enumerate(part):
            try:
                rows.append(
                    (f"{source}, {name} row {number}", row | {"video": video_file(row.get("video"))}, split)
                )
            except OSError as error:  # not on the Hub
                rows.append(
                    (
                        f"{source}, {name} row {number}",
                        row | {"video": f"{row['video']}: {brief(error)}"},
                        split,
                    )
                )
    return rows


def all_rows(cfg: Any, videos: bool) -> tuple[list[tuple[str, dict, str]], Path]:
    """What --manifest, --video_dir, --dataset, or none of them, give. `videos`: whether the files of a data
    set are wanted. -> (rows as (where, row, split), the folder that relative paths start from). Exit 2 if
    there are none."""
    if cfg.dataset:
        return dataset_rows(cfg.dataset, cfg.cache_dir, videos), Path()
    if source := cfg.manifest or cfg.video_dir:
        folder = source if source.is_dir() else source.parent
        return [
            (where, row, split_of(str(row.get("split") or ""))) for where, row in read_rows(source)
        ], folder
    return sample_rows(), Path()


def without_mark(question: str) -> str:
    """Without the "<image>" or "<video>" that LLaVA's own data sets put in front: the frames' place is
    known."""
    return re.sub(r"^(\s*<(image|video)>)+", "", question).strip()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


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


def tiny_model(cfg: Any, script: str, build: Callable[[Path, int], None]) -> str:
    """Rank 0: a demo's model, built once into the cache: a folder, loaded as the real one is."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    name = f"{Path(script).stem}_tiny_{cfg.seed}_1"  # 1: version of what is built
    return str(made_once(cfg.cache_dir / name, lambda aside: build(aside, cfg.seed)))


MAX_PIXELS = 8192 * 4320  # a header can declare any picture and so claim all memory: refused before decoding
# Only real containers are opened: ffmpeg's playlist formats (hls, concat, dash, sdp) would open other files
# and URLs.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,gif,flv,asf,ogg,ivf"


class BadSample(ValueError):
    """A clip that cannot be used; the message is the reason, on one line."""


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


def fitted(frame: np.ndarray, size: tuple[int, int] | None, crop: bool = True) -> np.ndarray:
    """frame (H, W, 3) -> (h, w, 3): the largest centred crop of that shape, or all of it, scaled; size None:
    as it is."""
    import cv2

    if size is None:
        return frame
    (height, width), (h, w) = frame.shape[:2], size
    if not crop:
        return cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA)
    crop_h, crop_w = min(height, max(1, round(width * h / w))), min(width, max(1, round(height * w / h)))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return cv2.resize(frame[top : top + crop_h, left : left + crop_w], (w, h), interpolation=cv2.INTER_AREA)


@contextlib.contextmanager
def open_video(path: str | Path, formats: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's (container, first video stream) of a file in one of ffmpeg's `formats`, closed afterwards; no
    other file or URL is opened by way of it. Raises BadSample, also for what ffmpeg finds wrong inside."""
    import av

    options = {"format_whitelist": formats, "protocol_whitelist": "file"}
    try:
        with av.open(os.path.abspath(path), options=options, metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise BadSample("no decoder for the video stream" if stream else "no video stream")
            if stream.width * stream.height > MAX_PIXELS:  # OpenCV may not have got as far as its own check
                raise BadSample(f"picture of {stream.width}x{stream.height}, more than {MAX_PIXELS} pixels")
            yield container, stream
    except av.error.FFmpegError as error:
        what = "a video" if formats == CONTAINERS else "a video or image"
        raise BadSample(f"not {what}: {error.strerror}") from error


def upright(frame: Any) -> np.ndarray:
    """PyAV's frame -> uint8 (H, W, 3), turned as its container says"""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _grabs(cap) -> Iterator[float]:
    """Grab to the end; yields times in ms. A damaged frame fails and the next may be whole: 64 failures are
    the end."""
    failed = 0
    while failed < 64:
        failed = 0 if cap.grab() else failed + 1
        if not failed:
            yield cap.get(0)  # CAP_PROP_POS_MSEC


def _rgb(cap, fit: Callable) -> np.ndarray | None:
    """The frame just grabbed, turned upright by OpenCV; None if it has no picture."""
    import cv2

    ok, frame = cap.retrieve()
    return fit(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)) if ok else None


def _cv_frames(path: str, fit: Callable) -> Iterator[Callable]:
    """Decode from start to end with OpenCV; each item, when called at once, converts its frame."""
    import cv2

    cap = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for _ in _grabs(cap):
        yield lambda: _rgb(cap, fit)


def _av_frames(path: str, fit: Callable) -> Iterator[Callable]:
    """The same with PyAV, which does not turn the picture by itself."""
    import av

    with open_video(path, CONTAINERS) as (container, stream):
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:  # one damaged packet
                continue
            for frame in decoded:
                yield lambda f=frame: fit(upright(f))


def _all_frames(read: Callable, path: str, k: int, fit: Callable, total: int) -> list | None:
    """The k frames by one full pass, by a second one if `total` was a wrong guess; None when nothing
    decodes."""
    for _ in range(2):
        wanted, frames, count = set(frame_indices(total, k) if total >= k else ()), [], 0
        for convert in read(path, fit):
            if count in wanted:
                frames.append(convert())
            count += 1
        if count == 0:
            return None
        frame_indices(count, k)  # too short: raises
        if count == total:
            return frames
        total = count
    raise BadSample(f"decodes to {count} frames, then to another number")


def _seek_frames(
    path: str, k: int, fit: Callable, times: list[float], keys: list[int], has_index: bool
) -> list | None:
    """The k frames by seeking; None as soon as the decoder's times are not the packets' times (edit list,
    damage, ...).

    Every frame grabbed must be the next of `times`; the first and the last are among them and nothing may
    follow.
    """
    import cv2

    place = {time: i for i, time in enumerate(times)}
    if len(place) < max(k, len(times)):
        return None
    cap = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    fps, header_count = cap.get(cv2.CAP_PROP_FPS), cap.get(cv2.CAP_PROP_FRAME_COUNT)
    frames, current, wanted = {}, -1, frame_indices(len(times), k)
    for target in sorted({0, *wanted, len(times) - 1}):
        # set(n) goes to a keyframe at or before n - 16 and decodes up to n - 1, a frame's number being its
        # time * fps: ask for 16 past the keyframe that we want, and expect to be as many frames after it (or
        # an earlier one).
        key = max((i for i in keys if i + 16 <= target), default=0)
        number = int(np.ceil(times[key] * fps / 1000 - 1e-3)) + 16
        if has_index and key > current >= 0 and number <= header_count:
            cap.set(cv2.CAP_PROP_POS_FRAMES, number)
            current = place.get(cap.get(cv2.CAP_PROP_POS_MSEC), len(times))
            landings = {i + number - 1 - int(times[i] * fps / 1000 + 0.5) for i in keys if i <= key}
            if current > target or current not in landings:
                return None
        while current < target:
            current += 1
            if not cap.grab() or place.get(cap.get(cv2.CAP_PROP_POS_MSEC)) != current:
                return None
        if target in wanted:
            frames[target] = _rgb(cap, fit)
    return None if cap.grab() else [frames[i] for i in wanted]


def extract_frames(
    path: str | Path, k: int, size: tuple[int, int] | None = None, crop: bool = True
) -> np.ndarray:
    """K evenly spaced frames of a video file -> (K, H, W, 3) RGB uint8, upright; exact on the frames that
    decode.

    size (h, w) scales the short side and crops the centre, or squeezes without `crop`, with cv2 INTER_AREA,
    as each frame is decoded. One thread: loaders have workers. Raises BadSample with the reason, ValueError
    for k < 1; no frame is repeated or dropped.
    """
    # Read when cv2 loads: no warning for each bad clip, none of ffmpeg's chatter about damaged frames.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    import cv2

    fit = partial(fitted, size=size, crop=crop)
    frame_indices(k, k)  # a wrong k is the caller's fault, not the clip's
    path = os.path.abspath(path)  # no "concat:" or "http:" survives
    if not os.path.isfile(path):
        raise BadSample("not a regular file" if os.path.exists(path) else "no such file")
    with open(path, "rb") as file:
        head = file.read(1024)
    if b"\0" not in head:  # every container has zero bytes in its header
        raise BadSample("text or HTML, not a video" if head else "empty file")
    # MP4, MOV, Matroska and WebM list their keyframes; elsewhere (MPEG-TS) a seek can land in the middle of a
    # group.
    has_index = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") or head.startswith(
        b"\x1a\x45\xdf\xa3"
    )
    # OpenCV takes ffmpeg's options from the environment alone, at each open.
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"format_whitelist;{CONTAINERS}|protocol_whitelist;file"
    cap = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])  # raw packets: nothing is decoded
    width, height = cap.get(cv2.CAP_PROP_FRAME_WIDTH), cap.get(cv2.CAP_PROP_FRAME_HEIGHT)
    if width * height > MAX_PIXELS:
        raise BadSample(f"picture of {width:.0f}x{height:.0f}, more than {MAX_PIXELS} pixels")
    packets = sorted((time, cap.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME)) for time in _grabs(cap))
    times, keys = [time for time, _ in packets], [i for i, (_, is_key) in enumerate(packets) if is_key]
    frames = _seek_frames(path, k, fit, times, keys, has_index)
    # PyAV has the codecs that OpenCV's wheel lacks (AV1) and, where that does not help either, the reason.
    for read in (_cv_frames, _av_frames) if times else (_av_frames,):
        frames = frames or _all_frames(read, path, k, fit, len(times))
    if not frames or any(frame is None or frame.shape != frames[0].shape for frame in frames):
        raise BadSample(
            "pictures that cannot be decoded, or change their size" if frames else "no frame decodes"
        )
    return np.stack(frames)


def local_file(video: str, cache: Path) -> Path:
    """The file of a path or URL, the latter downloaded once. Raises BadSample."""
    try:
        path = download(video, cache / "downloads") if is_url(video) else Path(video)
        path.stat()
    except (OSError, ValueError) as error:
        raise BadSample(getattr(error, "strerror", None) or str(error)) from error
    return path


def cached_frames(video: str, frames: int, size: int, cache: Path, crop: bool = True) -> Path:
    """Decode once: a .npy file of uint8 (F, size, size, 3) frames of a path or URL, cropped or squeezed.
    Raises BadSample."""
    path = local_file(video, cache)
    stat = path.stat()
    # 1: version of the reader
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{frames}|{size}|{crop}|1"
    target = cache / "frames" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if not target.exists():
        save_array(target, extract_frames(path, frames, (size, size), crop))
    return target


def decode_all(
    rows: list, frames: int, size: int, cache: Path, workers: int, crop: bool = True
) -> tuple[list[Path | None], list]:
    """-> (the cached frames of each row's video or None, bad samples). A row has the fields `video` and
    `where`."""
    from tqdm import tqdm

    def decode(row: Any) -> Path | dict:
        try:
            return cached_frames(row.video, frames, size, cache, crop)
        except BadSample as error:
            return {"where": row.where, "video": row.video, "reason": str(error)}

    pool = ThreadPoolExecutor(workers)  # the decoders release the GIL
    try:
        results = list(tqdm(pool.map(decode, rows), "decode", len(rows), unit="clip", disable=None))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a signal ends it at once
    return [None if isinstance(r, dict) else r for r in results], [r for r in results if isinstance(r, dict)]


def save_array(target: Path, array: np.ndarray) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.save(file, array)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, write)


# ---------------------------------------------------------------------------
# Pictures and videos
# ---------------------------------------------------------------------------


def encode_clip(
    clip: np.ndarray, path: Path, fps: int, codec: str, pix_fmt: str, options: dict, container: dict
) -> None:
    """uint8 (F, H, W, 3) -> a video without sound; options: the codec's and the container's, as ffmpeg names
    them"""
    import av

    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        for picture in clip:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def write_mp4(clip: np.ndarray, path: Path, fps: int) -> None:
    """uint8 (F, H, W, 3), sides even -> H.264 in yuv420p, which every browser plays"""
    encode_clip(clip, path, fps, "libx264", "yuv420p", {"crf": "18"}, {"movflags": "+faststart"})


def enlarge(clip: np.ndarray, least: int = 256) -> np.ndarray:
    """Whole-numbered enlargement of uint8 (F, H, W, 3) to at least `least` pixels, with even sides as H.264
    wants them."""
    factor = max(1, -(-least // clip.shape[1]))
    clip = clip.repeat(factor, 1).repeat(factor, 2)
    return clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]


def write_video(clip: np.ndarray, path: Path | str, fps: int = 8) -> None:
    """uint8 (F, H, W, 3) -> path.mp4 and path.gif"""
    from PIL import Image

    clip, path = enlarge(clip), Path(path)
    write_mp4(clip, path.with_suffix(".mp4"), fps)
    first, *rest = (Image.fromarray(picture) for picture in clip)
    first.save(path.with_suffix(".gif"), save_all=True, append_images=rest, duration=1000 // fps, loop=0)


def write_grid(clips: np.ndarray, captions: list[str], path: Path) -> None:
    """One row a clip, its caption above it, one column a frame: uint8 (N, F, H, W, 3) -> a png"""
    from matplotlib.figure import Figure

    rows, columns = clips.shape[:2]
    figure = Figure(figsize=(1.2 * columns, 1.45 * rows), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.15 / rows))  # room for the first caption
    for axes_row, clip, caption in zip(figure.subplots(rows, columns, squeeze=False), clips, captions):
        shown = caption if len(caption) < 18 * columns else caption[: 18 * columns] + "..."
        # runs over all columns
        axes_row[0].text(0, 1.06, shown, transform=axes_row[0].transAxes, fontsize=9, in_layout=False)
        for axes, picture in zip(axes_row, clip):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks
        figure.savefig(path, dpi=100)


def write_samples(clips: np.ndarray, captions: list[str], path: Path, fps: int = 8, every: int = 1) -> None:
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
    local = local or min(
        devices, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or devices)
    )

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
        zero = config.get("zero_optimization", {})
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


def ds_config(source: dict, name: str, batch_size: int, accum: int, clip: float, dtype: str) -> dict:
    """A DeepSpeed configuration with every "auto" filled in; exit 2 for one that nobody would fill in.

    DeepSpeed drops "auto" without a word (bf16 "auto" trains in fp32) and ignores keys that it does not know:
    both are refused. `name`: what messages call it.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    numbers = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accum,
        "train_batch_size": batch_size * accum * world_size(),
        "gradient_clipping": clip,
        "bf16.enabled": dtype == "bf16",
        "fp16.enabled": dtype == "fp16",
    }

    def filled(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: filled(v, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
        if value != "auto":
            return value
        return (
            numbers[key]
            if key in numbers
            else refuse(f'{name}: "{key}": "auto" has no value here; write a number')
        )

    config = filled(source, "")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        refuse(f"{name}: zero_optimization.stage {zero.get('stage')}; take 1, 2 or 3")
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {one.alias for one in fields.values() if one.alias}
    if unknown := sorted(set(zero) - known):
        refuse(f"{name}: this DeepSpeed does not know zero_optimization.{unknown[0]} and would ignore it")
    for key, number in numbers.items():
        *section, last = key.split(".")
        place = config.setdefault(section[0], {}) if section else config
        if place.setdefault(last, number) != number:
            refuse(f'{name}: {key} is {place[last]}, the flags say {number}; write "auto" there')
    # Offloading takes torch's AdamW too, which needs no compiler.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
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
        lambda q, k, v, *_, **__: FusedAttention.apply(q, k, v),
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
    from deepspeed.runtime.zero import GatheredParameters

    enabled = any(hasattr(p, "ds_id") for p in parameters)
    return GatheredParameters(parameters, modifier_rank=0 if changed else None, enabled=enabled)


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


def check_weights(source: str) -> None:
    """Exit 2 when shards are missing from a folder, or the disk has no room for what is to be downloaded from
    the Hub."""
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
        files = retry(lambda: snapshot_download(source, dry_run=True), f"look up {source}", attempts=2)
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
    """End the run when from_pretrained left weights at random, or had some that fit nowhere."""
    names = [
        *loading_info["missing_keys"],
        *loading_info["unexpected_keys"],
        *loading_info["mismatched_keys"],
    ]
    if wrong := sorted(map(str, names)):
        which = f"{len(wrong)} weights are missing or do not fit, {wrong[0]} among them"
        raise SystemExit(f"error: {folder}: {which}")


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
    password. Raises OSError if the file cannot be had within `timeout` seconds, ValueError if it is none that
    we take.
    """
    import requests

    address, shown = urllib.parse.urlsplit(url), redact(url)
    if address.scheme not in ("http", "https"):
        raise ValueError(f"{shown}: only http and https are downloaded")
    suffix = re.search(r"(\.[A-Za-z0-9]{1,8})?$", address.path)[0]
    target = folder / (hashlib.sha256(url.encode()).hexdigest()[:32] + suffix)
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
