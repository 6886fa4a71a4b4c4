"""CPU time of common.timed_frames against other ways to read K frames of a clip, and which of them are right.

    python benchmarks/frames.py [FOLDER] [ROUNDS]     # default ../shared/clips, 7 rounds

The usual loop is CAP_PROP_FRAME_COUNT, set(CAP_PROP_POS_FRAMES), read, as most training scripts have it; "before"
is the reader of revision e5a967f, on OpenCV. torchcodec and decord2 are left out where they do not import. All
decode on one thread, open the file each time and return RGB. Rounds are interleaved, so that a busy machine slows
all alike; the time is the CPU time of the process, the median of the rounds. A clip is right when each frame is:
of the clip's size, and of all the frames of a full decode the one of that index is the nearest to it (they differ
by the rounding of colours). Prints a Markdown table.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OPENCV_FFMPEG_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402

from common import frame_indices, timed_frames  # noqa: E402

SUFFIXES = (".mp4", ".mkv", ".avi", ".webm", ".mov", ".ts")
BEFORE = "e5a967f"


# --- Readers: (path, k) -> k RGB pictures


def usual_loop(path: Path, k: int) -> list[np.ndarray]:
    """A read that fails repeats the last frame, as such loops do."""
    cap, frames = cv2.VideoCapture(str(path)), []
    for index in frame_indices(max(k, int(cap.get(cv2.CAP_PROP_FRAME_COUNT))), k):
        cap.set(cv2.CAP_PROP_POS_FRAMES, index)
        ok, frame = cap.read()
        frames += [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)] if ok else frames[-1:]
    return frames


def start_to_end(path: Path, k: int) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    return [frames[i].to_ndarray(format="rgb24") for i in frame_indices(len(frames), k)]


def reader_before() -> Callable | None:
    """The reader of that revision, if this is a clone that has it."""
    show = subprocess.run(["git", "-C", ROOT, "show", f"{BEFORE}:common.py"], capture_output=True)
    if show.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "common_before.py")
        path.write_bytes(show.stdout)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, "timed_frames", None) or module.extract_frames


def torchcodec_reader() -> Callable | None:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):  # also where it finds no ffmpeg or another torch
        return None

    def read(path: Path, k: int) -> list[np.ndarray]:
        video = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
        return list(video.get_frames_at(frame_indices(len(video), k)).data.numpy())

    return read


def decord_reader() -> Callable | None:
    try:
        import decord
    except (ImportError, OSError):
        return None

    def read(path: Path, k: int) -> list[np.ndarray]:
        video = decord.VideoReader(str(path), num_threads=1)
        return list(video.get_batch(frame_indices(len(video), k)).asnumpy())

    return read


READERS = {
    "usual loop": usual_loop,
    "PyAV, start to end": start_to_end,
    f"before ({BEFORE})": reader_before(),
    "torchcodec": torchcodec_reader(),
    "decord2": decord_reader(),
    "timed_frames": timed_frames,
}
READERS = {name: read for name, read in READERS.items() if read}


# --- Right and fast


def small(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA).astype(np.int16)


def attempt(read: Callable, path: Path, k: int) -> list[np.ndarray]:
    """Its frames; none if it raises what these libraries raise for a clip they cannot read."""
    try:
        return list(read(path, k))
    except (RuntimeError, ValueError, IndexError, OSError):
        return []


def right_clips(read: Callable, clips: dict[Path, tuple], k: int) -> int:
    """Of clips {path: (shape of a frame, all frames made small)}."""
    right = 0
    for path, (shape, every) in clips.items():
        frames, wanted = attempt(read, path, k), frame_indices(len(every), k)
        distances = [np.abs(every - small(frame)).mean(axis=(1, 2, 3)) for frame in frames]
        right += len(frames) == k and all(
            frame.shape == shape and distance[i] == distance.min()
            for frame, distance, i in zip(frames, distances, wanted)
        )
    return right


def cpu_seconds(paths: list[Path], k: int, rounds: int) -> dict[str, float]:
    """{reader: median over the rounds of its CPU seconds for all paths}"""
    seconds = {name: [] for name in READERS}
    for _ in range(rounds):
        for name, read in READERS.items():
            start = time.process_time()
            for path in paths:
                attempt(read, path, k)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(column) for name, column in seconds.items()}


def write_minute(path: Path) -> Path:
    """60 s of 360p at 25 fps: soft blobs that move, H.264 with a keyframe each 12 frames."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 3), np.uint8)
    texture = cv2.resize(noise, (1280, 360), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 640, 360, "yuv420p", 12
        for i in range(1500):
            picture = np.ascontiguousarray(np.roll(texture, 5 * i, axis=1)[:, :640])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def all_frames(path: Path) -> tuple[tuple, np.ndarray]:
    """(shape of a frame, all frames made small) by a full decode."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in container.decode(video=0)]
    return frames[0].shape, np.stack([small(frame) for frame in frames])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared/clips"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not paths:
        sys.exit(f"{folder}: no clips ({', '.join(SUFFIXES)})")
    clips = {path: all_frames(path) for path in paths}

    print("|", *(f"| {name}" for name in READERS), "|")
    print("|---" * (len(READERS) + 1) + "|")
    for k in (5, 8, 32):
        enough = {path: clip for path, clip in clips.items() if len(clip[1]) >= k}
        counts = (f"| {right_clips(read, enough, k)} of {len(enough)}" for read in READERS.values())
        print(f"| right clips, K = {k}", *counts, "|")
    for k in (5, 32):
        times = cpu_seconds(paths, k, rounds).values()
        print(f"| all clips, K = {k}, CPU s", *(f"| {seconds:.3f}" for seconds in times), "|")
    with tempfile.TemporaryDirectory() as folder:
        minute = write_minute(Path(folder, "minute.mp4"))
        times = cpu_seconds([minute], 5, rounds).values()
    print("| 60 s of 360p, GOP 12, K = 5, CPU s", *(f"| {seconds:.3f}" for seconds in times), "|")
    print(
        f"\n{len(paths)} clips, {rounds} interleaved rounds, one thread. PyAV {av.__version__}, OpenCV {cv2.__version__}."
    )


if __name__ == "__main__":
    main()
