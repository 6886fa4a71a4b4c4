"""How fast data come in: rows of a million-row table, and clips decoded into the cache and read back.

    python benchmarks/input.py [ROWS] [CLIPS]     # default 1,000,000 and 400

Rows: common.read_data over CSV, JSON lines and parquet in OpenVid's columns, each in a process of its own, the videos
beside them as empty files; the peer is `datasets` reading the same file, which neither checks a row nor looks for its
video. Clips: copies of a 10 s clip of 360p, 8 frames of 64x64, by common.decode_rows with one thread and with all
cores; cold, then warm (all in the cache), then read from it; beside it the share that writing them safely takes.
Prints Markdown.
"""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

KINDS = ("csv", "jsonl", "parquet")
CAPTION = "a person walks slowly along a beach while waves come in, and a dog follows at a distance, number"


def make_tables(folder: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    (folder / "video").mkdir()
    columns = {
        "video": [f"video/clip_{i:07d}.mp4" for i in range(count)],
        "caption": [f"{CAPTION} {i}" for i in range(count)],
        "aesthetic score": [round(4 + i % 30 / 10, 1) for i in range(count)],
        "motion score": [round(i % 90 / 10, 1) for i in range(count)],
        "frame": [51 + i % 400 for i in range(count)],
        "fps": [24.0] * count,
    }
    for name in columns["video"]:
        os.close(os.open(folder / name, os.O_CREAT))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values())])
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")


def settings(manifest: Path | None, folder: Path) -> SimpleNamespace:
    flags = dict(
        dataset="",
        videos=None,
        cache_dir=folder / "cache",
        streaming=False,
        num_workers=0,
        max_bad=0,
        demo=False,
    )
    return SimpleNamespace(manifest=manifest, **flags)


def read(reader: str, path: Path) -> None:
    """In a process of its own: print rows, seconds, GB"""
    import common

    start = time.perf_counter()
    if reader == "ours":
        rows, bad = common.read_data(settings(path, path.parent), "caption", {"aesthetic score": ""})
        assert not bad, bad[0]
        count = len(rows)
    else:
        from datasets import load_dataset

        start = time.perf_counter()
        kind = "json" if path.suffix == ".jsonl" else path.suffix[1:]
        table = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(path.parent / "hf"))
        count = sum(1 for _ in table)
    seconds = time.perf_counter() - start
    print(count, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def rows_table(count: int) -> None:
    print("| table | rows | ours: s, GB | datasets: s, GB | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        make_tables(Path(name), count)
        for kind in KINDS:
            told = {}
            for reader in ("ours", "datasets"):
                command = [sys.executable, __file__, reader, f"{name}/rows.{kind}"]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                told[reader] = list(map(float, out.split()))
            (rows, ours, gb), (_, theirs, their_gb) = told["ours"], told["datasets"]
            print(
                f"| {kind} | {rows:,.0f} | {ours:.1f}, {gb:.2f} | {theirs:.1f}, {their_gb:.2f} | {theirs / ours:.2f} |"
            )


def clips_table(count: int) -> None:
    import common

    print("\n| threads | cold, clips/s | warm, clips/s | read, clips/s | GB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        wall = rng.integers(0, 256, (45, 160, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        pictures = np.stack([np.roll(wall, 4 * i, 1)[:, :640] for i in range(240)])
        common.write_mp4(pictures, clip := folder / "clip.mp4", 24)
        for i in range(count):
            shutil.copy(clip, folder / f"{i}.mp4")
        rows = [common.Row("", i, str(folder / f"{i}.mp4")) for i in range(count)]
        for threads in dict.fromkeys((1, common.usable_cores())):
            cfg = settings(None, folder)
            cfg.num_workers = threads
            shutil.rmtree(folder / "cache", ignore_errors=True)
            speeds = []
            for _ in ("cold", "warm"):
                start = time.perf_counter()
                _, files, bad = common.decode_rows(rows, 8, 64, cfg)
                speeds.append(count / (time.perf_counter() - start))
            start = time.perf_counter()
            size = sum(np.load(file).nbytes for file in files)
            speeds.append(count / (time.perf_counter() - start))
            print(f"| {threads} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} | {size / 1e9:.3f} |")
        clip = np.load(files[0])
        start = time.perf_counter()
        for i in range(count):
            common.save_array(folder / "safe" / f"{i}.npy", clip)
        safe = (time.perf_counter() - start) / count
        print(
            f"\nOf a clip, written safely: {1e3 * safe:.2f} ms, {100 * safe * speeds[0]:.1f} % of the cold time."
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("ours", "datasets"):
        read(sys.argv[1], Path(sys.argv[2]))
    else:
        rows_table(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
        clips_table(int(sys.argv[2]) if len(sys.argv) > 2 else 400)
