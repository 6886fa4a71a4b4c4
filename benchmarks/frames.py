"""CPU time of common.extract_frames against the usual OpenCV loop, and how many frames each got right.

    python benchmarks/frames.py [FOLDER] [ROUNDS]     # default ../shared/clips, 7 rounds

The usual loop is CAP_PROP_FRAME_COUNT, set(CAP_PROP_POS_FRAMES), read, as most training scripts have it. Both
decode on one thread, open the file each time and return RGB. Rounds are interleaved, so that a busy machine
slows both alike; the time is the CPU time of the process, the ratio that of the medians. Right means equal to
the frame of that index in a full sequential PyAV decode (mean difference under 0.5 of 255). Prints a Markdown
table.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OPENCV_FFMPEG_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402

from common import extract_frames, frame_indices  # noqa: E402

NUM_FRAMES = (5, 8, 32)


def usual_loop(path: Path, k: int) -> list[np.ndarray]:
    """(H, W, 3) RGB uint8 each; a read that fails repeats the last frame, as such loops do."""
    cap, frames = cv2.VideoCapture(str(path)), []
    for index in frame_indices(max(k, int(cap.get(cv2.CAP_PROP_FRAME_COUNT))), k):
        cap.set(cv2.CAP_PROP_POS_FRAMES, index)
        ok, frame = cap.read()
        frames += [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)] if ok else frames[-1:]
    return frames


def cpu_seconds(read: Callable, path: Path, k: int) -> float:
    start = time.process_time()
    read(path, k)
    return time.process_time() - start


def right(frames, every: list[np.ndarray]) -> int:
    """How many of the frames are the wanted ones of `every`, all the frames of the clip."""
    if not len(frames) or frames[0].shape != every[0].shape:
        return 0
    wanted = [every[i] for i in frame_indices(len(every), len(frames))]
    return sum(np.abs(a.astype(np.int16) - b).mean() < 0.5 for a, b in zip(frames, wanted, strict=True))


def main() -> None:
    root = Path(__file__).resolve().parents[2] / "shared/clips"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else root
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    clips = sorted(
        path for path in folder.iterdir() if path.suffix in (".mp4", ".mkv", ".avi", ".webm", ".mov", ".ts")
    )
    if not clips:
        sys.exit(f"{folder}: no clips (.mp4, .mkv, .avi, .webm, .mov, .ts)")
    print("| clip | K | usual loop, CPU ms | extract_frames, CPU ms | ratio | usual right | ours right |")
    print("|---|---|---|---|---|---|---|")
    sums = {k: np.zeros(5) for k in NUM_FRAMES}
    for path in clips:
        with av.open(str(path)) as container:
            every = [
                np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in container.decode(video=0)
            ]
        for k in (k for k in NUM_FRAMES if k <= len(every)):
            # also warms up both
            score = (
                right(usual_loop(path, k), every),
                right(extract_frames(path, k), every),
            )
            pairs = [
                (cpu_seconds(usual_loop, path, k), cpu_seconds(extract_frames, path, k))
                for _ in range(rounds)
            ]
            usual, ours = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"| {path.name} | {k} | {usual:.1f} | {ours:.1f} | {usual / ours:.2f}x | {score[0]} | "
                f"{score[1]} |"
            )
            sums[k] += usual, ours, *score, k
    for k, (usual, ours, *score, frames) in sums.items():
        counts = " | ".join(f"{n:.0f} of {frames:.0f}" for n in score)
        print(f"| **all** | {k} | {usual:.1f} | {ours:.1f} | **{usual / ours:.2f}x** | {counts} |")
    usual, ours = sum(sums.values())[:2]
    print(
        f"\nOverall {usual / ours:.2f}x. OpenCV {cv2.__version__}, {rounds} interleaved rounds, one thread."
    )


if __name__ == "__main__":
    main()
