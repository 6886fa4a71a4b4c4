"""What it costs to know that a checkpoint is whole: sums of a large file against writing it.

    python benchmarks/sums.py [GB] [ROUNDS]     # default 2 GB, 5 rounds, in the current directory's file system

Each round writes the file, flushes it to disk, and reads it back once for each sum; medians, as a ratio to the
writing. Right after a save the file lies in the page cache, as it does here.
"""

import hashlib
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

BLOCK = 1 << 20


def write(path: Path, gb: float) -> None:
    data = os.urandom(BLOCK)
    with path.open("wb") as file:
        for _ in range(int(gb * 1e9 / BLOCK)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(gb: float = 2.0, rounds: int = 5) -> None:
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "file"
        ways = {
            "write and flush": lambda: write(path, gb),
            "size alone": lambda: path.stat().st_size,
            "crc32": lambda: crc32(path),
            "sha256": lambda: sha256(path),
        }
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                spent.setdefault(name, []).append(time.perf_counter() - start)
    base = statistics.median(spent["write and flush"])
    print(
        f"| {gb:g} GB, {rounds} rounds | s | GB/s | of the writing | 100 GB take, s |\n|---|---|---|---|---|"
    )
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        rate = f"{gb / median:.2f}" if name != "size alone" else ""
        print(f"| {name} | {median:.3f} | {rate} | {median / base:.3f} | {100 / gb * median:.0f} |")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))
