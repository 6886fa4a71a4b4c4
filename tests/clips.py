"""Test videos, written with PyAV alone: every frame carries its own number, so a reader can be checked frame
by frame.

GOOD[name].make(path) writes one good file, make_bad(folder) -> {name: (path, words the reason must hold)} those
to refuse. The number stands in a bar of 16 black or white blocks on top, which survives lossy coding; below it
moves a texture, so that the encoder makes real P and B frames. Editing boxes gives what muxers do not write:
a trim, a display matrix.
"""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

WIDTH, HEIGHT, BAR = 160, 96, 16  # the bar: 16 blocks of 10 x 16 pixels
TEXTURE = (
    np.random.default_rng(0)
    .integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), np.uint8)
    .repeat(8, 0)
    .repeat(8, 1)
)
# Display matrices (a, b, c, d) of a track header: the pixel (x, y) is shown at (a x + c y, b x + d y).
UPRIGHT, QUARTER = (1, 0, 0, 1), (0, 1, -1, 0)
MATRICES = {"upright": UPRIGHT, "quarter": QUARTER, "half": (-1, 0, 0, -1), "three_quarters": (0, -1, 1, 0)}
MATRICES |= {"mirrored": (-1, 0, 0, 1), "flipped": (1, 0, 0, -1)}
MATRICES |= {"transposed": (0, 1, 1, 0), "transversed": (0, -1, -1, 0)}


def draw(number: int) -> np.ndarray:
    """The frame with this number (0..65535): (96, 160, 3) RGB uint8."""
    frame = np.roll(TEXTURE, 3 * number, axis=1)[:, :WIDTH].copy()
    bits = [number >> b & 1 for b in range(16)]
    frame[:BAR] = np.repeat(np.array(bits, np.uint8) * 255, WIDTH // 16)[None, :, None]
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number drawn into an upright RGB frame (96, 160, 3), also after lossy coding."""
    blocks = frame[4 : BAR - 4].mean(axis=(0, 2)).reshape(16, -1)[:, 3:-3].mean(axis=1)
    return sum(1 << b for b, level in enumerate(blocks) if level > 127)


def turned(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """How a player shows (H, W, 3) by this display matrix. Its inverse is (a, c, b, d)."""
    y, x = np.indices(picture.shape[:2] if a else picture.shape[1::-1])
    return picture[c * x + d * y - (c + d < 0), a * x + b * y - (a + b < 0)]


def picture(number: int, scale: int = 1, matrix: tuple = UPRIGHT) -> av.VideoFrame:
    """The frame with this number, enlarged, and so turned that the matrix shows it upright."""
    a, b, c, d = matrix
    pixels = turned(draw(number).repeat(scale, 0).repeat(scale, 1), a, c, b, d)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def write(
    path,
    frames,
    codec="libx264",
    gop=250,
    times=None,
    pix_fmt="yuv420p",
    options=None,
    mux=None,
    scale=1,
    matrix=UPRIGHT,
):
    """Encode the numbers 0..frames-1 at 25 fps, or at `times` (ms); matrix: what the container is to say."""
    options = dict({"libx264": {"preset": "veryfast", "bf": "3"}}.get(codec, {}), **(options or {}))
    with av.open(str(path), "w", options=mux or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        first = picture(0, scale, matrix)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = first.width, first.height, pix_fmt, gop
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = picture(i, scale, matrix)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path if matrix == UPRIGHT else show_by(matrix, path)


def write_streams(path: Path, *streams: tuple) -> Path:
    """Several video streams in one file: (codec, frames, scale, disposition) each."""
    with av.open(str(path), "w") as out:
        outs = []
        for codec, _, scale, disposition in streams:
            options = {"preset": "ultrafast"} if codec == "libx264" else {}
            outs.append(stream := out.add_stream(codec, rate=25, options=options))
            stream.width, stream.height, stream.disposition = WIDTH * scale, HEIGHT * scale, disposition
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(max(frames for _, frames, _, _ in streams)):
            for stream, (_, frames, scale, _) in zip(outs, streams):
                out.mux(stream.encode(picture(i, scale)) if i < frames else [])
        for stream in outs:
            out.mux(stream.encode(None))
    return path


def irregular(n: int, step: int = 1) -> list[int]:
    """Times in ms of a phone-like stream, in steps of so many: bursts at 60 fps, then long pauses."""
    times = np.cumsum([0] + [16 if i // 20 % 2 else 90 + i % 7 for i in range(n - 1)])
    return (times // step * step).tolist()


def trim(path: Path, start: int, frames: int) -> Path:
    """Cut to `frames` frames from `start` by the edit list alone: the coded frames all stay in the file."""
    data = bytearray(path.read_bytes())
    elst, mdhd, mvhd = (data.index(box) + 4 for box in (b"elst", b"mdhd", b"mvhd"))
    media, movie = struct.unpack_from(">I", data, mdhd + 12)[0], struct.unpack_from(">I", data, mvhd + 12)[0]
    assert struct.unpack_from(">I", data, elst + 4)[0] == 1, "one edit expected: the delay of the B frames"
    delay = struct.unpack_from(">i", data, elst + 12)[0]
    struct.pack_into(">Ii", data, elst + 8, frames * movie // 25, delay + start * media // 25)
    path.write_bytes(data)
    return path


def show_by(matrix: tuple, path: Path) -> Path:
    """Write this display matrix into the track header, with the shift that phones add."""
    data, (a, b, c, d) = bytearray(path.read_bytes()), matrix
    box = data.index(b"tkhd") + 4
    width, height = (size >> 16 for size in struct.unpack_from(">2I", data, box + 76))
    shift = [(-min(0, along * width + across * height)) << 16 for along, across in ((a, c), (b, d))]
    struct.pack_into(">9i", data, box + 40, a << 16, b << 16, 0, c << 16, d << 16, 0, *shift, 1 << 30)
    path.write_bytes(data)
    return path


def cut(path: Path, start: float = 0.0, stop: float = 1.0) -> Path:
    """Keep only this part of the bytes, as a broken download or a tuned-in broadcast does."""
    data = path.read_bytes()
    path.write_bytes(data[int(start * len(data)) // 188 * 188 : int(stop * len(data))])
    return path


def lose_frame(path: Path, nth: int) -> Path:
    """Turn the nth disposable B frame into a packet that demuxes well and decodes to nothing."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        first_bytes = [packet.pos + 4 for packet in container.demux(video=0) if packet.size]
    position = [i for i in first_bytes if data[i] == 0x01][nth]  # a slice that no other frame refers to
    data[position] = 0  # the NAL unit's type: "unspecified"
    path.write_bytes(data)
    return path


def cover_first(path: Path) -> Path:
    """Put the cover before the video, as some shops do: ffmpeg numbers streams in the order of the boxes."""
    data = path.read_bytes()
    video, cover = (data.index(box) - 4 for box in (b"trak", b"udta"))
    path.write_bytes(data[:video] + data[cover:] + data[video:cover])
    return path


def copy(sources: list[Path], target: Path, change: Callable = lambda i, packet: [packet]) -> Path:
    """The packets of all sources, one each 40 ms, as change(i, packet) -> packets gives them; no B frames."""
    with av.open(str(target), "w") as out:
        stream, i = None, 0
        for source in sources:
            with av.open(str(source)) as container:
                stream = stream or out.add_stream_from_template(container.streams.video[0])
                for packet in (packet for packet in container.demux(video=0) if packet.size):
                    for late, item in enumerate(change(i, packet)):
                        item.stream, item.time_base = stream, Fraction(1, 1000)
                        item.pts = item.dts = 40 * i + 20 * late
                        out.mux(item)
                    i += 1
    return target


def mark_keys(source: Path, target: Path, nth: int) -> Path:
    """Mark each nth packet as a keyframe, which it is not."""

    def mark(i: int, packet: av.Packet) -> list:
        packet.is_keyframe = packet.is_keyframe or i % nth == 0
        return [packet]

    return copy([source], target, mark)


def add_ghosts(source: Path, target: Path) -> Path:
    """A "VOP not coded" after each tenth of the first 200 frames of MPEG-4 video: it decodes to nothing."""

    def haunt(i: int, packet: av.Packet) -> list:
        return [packet, av.Packet(b"\0\0\1\xb6\x50\x4f")] if i % 10 == 5 and i < 200 else [packet]

    return copy([source], target, haunt)


class Clip(NamedTuple):
    file: str
    make: Callable[[Path], Path]
    frames: int | None = None  # that a player shows; None: as many as decode
    first: int = 0  # the number in the first of them
    stream: int = 0  # which of the video streams players show
    matrix: tuple = UPRIGHT


X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"}
VP9, AV1 = {"deadline": "realtime", "cpu-used": "8"}, {"preset": "12", "svtav1-params": "lp=1"}
MPEG4, FASTSTART = {"b": "2M", "bf": "2"}, {"movflags": "faststart"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def x265(more: str) -> dict[str, str]:
    return X265 | {"x265-params": f"{X265['x265-params']}:{more}"}


def mp4v(path: Path) -> Path:
    return write(path.with_name(f"{path.stem}_source.mp4"), 300, "mpeg4", gop=12, options={"b": "2M"})


def hevc(path: Path) -> Path:
    return write(path.with_name("no_b.mp4"), 100, "libx265", gop=30, options=x265("bframes=0"))


# Files that a player shows, by the trap in them
GOOD = {
    "h264_gop12": Clip("gop12.mp4", lambda p: write(p, 300, gop=12), 300),
    "h264_gop250": Clip("gop250.mp4", lambda p: write(p, 300), 300),
    "h264_open_gop": Clip(
        "open.mkv", lambda p: write(p, 100, gop=20, options={"x264-params": "open-gop=1"}), 100
    ),
    "intra_refresh": Clip(
        "refresh.mp4", lambda p: write(p, 100, gop=20, options={"x264-params": "intra-refresh=1"}), 100
    ),
    "interlaced": Clip(
        "interlaced.mp4", lambda p: write(p, 100, gop=12, options={"x264-params": "tff=1"}), 100
    ),
    "hevc": Clip("hevc.mp4", lambda p: write(p, 150, "libx265", gop=30, options=X265), 150),
    "hevc_open_gop": Clip(
        "hevc_open.mp4", lambda p: write(p, 150, "libx265", gop=30, options=x265("open-gop=1")), 150
    ),
    "hevc_false_keys": Clip("hevc_keys.mkv", lambda p: mark_keys(hevc(p), p, 7), 100),
    "vp9": Clip("vp9.mp4", lambda p: write(p, 120, "libvpx-vp9", gop=12, options=VP9), 120),
    "webm_live": Clip(
        "live.webm", lambda p: write(p, 120, "libvpx-vp9", gop=30, options=VP9, mux={"live": "1"}), 120
    ),
    "av1": Clip("av1.mp4", lambda p: write(p, 60, "libsvtav1", gop=10, options=AV1), 60),
    "av1_rotated": Clip(
        "av1_rotated.mp4",
        lambda p: write(p, 20, "libsvtav1", options=AV1, matrix=QUARTER),
        20,
        matrix=QUARTER,
    ),
    "mp4v": Clip("mp4v.mp4", lambda p: write(p, 300, "mpeg4", gop=12, options={"b": "2M"}), 300),
    "mp4v_all_keys": Clip("mp4v_keys.mp4", lambda p: mark_keys(mp4v(p), p, 1), 300),
    "avi": Clip("mpeg4.avi", lambda p: write(p, 300, "mpeg4", gop=50, options=MPEG4), 300),
    "mpeg_ps": Clip("clip.mpg", lambda p: write(p, 200, "mpeg2video", gop=15, options=MPEG4)),
    "vfr_mp4": Clip("vfr.mp4", lambda p: write(p, 300, gop=40, times=irregular(300)), 300),
    "vfr_mkv": Clip("vfr.mkv", lambda p: write(p, 300, gop=40, times=irregular(300)), 300),
    "edit_list": Clip("edit.mp4", lambda p: trim(write(p, 300, gop=60), 100, 150), 150, first=100),
    "edit_list_start": Clip("edit_start.mp4", lambda p: trim(write(p, 300, gop=60), 70, 230), 230, first=70),
    "truncated": Clip("truncated.mp4", lambda p: cut(write(p, 300, gop=60, mux=FASTSTART), 0, 0.6)),
    "fragmented": Clip("fragments.mp4", lambda p: write(p, 156, gop=12, mux=FRAGMENTS), 156),
    "fragmented_truncated": Clip(
        "fragments_cut.mp4", lambda p: cut(write(p, 156, gop=12, mux=FRAGMENTS), 0, 0.6)
    ),
    "ts": Clip("clip.ts", lambda p: write(p, 300, gop=50), 300),
    "ts_tuned_in": Clip("tuned_in.ts", lambda p: cut(write(p, 300, gop=50), 0.3)),
    "ts_mpeg2": Clip("mpeg2.ts", lambda p: write(p, 200, "mpeg2video", gop=50, options=MPEG4)),
    "lost_frame": Clip("lost.mp4", lambda p: lose_frame(write(p, 100), 30), 99),
    "ghosts": Clip("ghosts.mp4", lambda p: add_ghosts(mp4v(p), p), 300),
    "two_streams": Clip(
        "two.mkv", lambda p: write_streams(p, ("libx264", 100, 1, 0), ("libx264", 60, 2, 0)), 100
    ),
    "default_second": Clip(
        "default.mkv", lambda p: write_streams(p, ("libx264", 60, 2, 0), ("libx264", 60, 1, 1)), 60, stream=1
    ),
    "poster_mov": Clip(
        "poster.mov", lambda p: write_streams(p, ("mjpeg", 1, 2, 1), ("libx264", 60, 1, 0)), 60, stream=1
    ),
    "poster_mkv": Clip(
        "poster.mkv", lambda p: write_streams(p, ("mjpeg", 1, 2, 1), ("libx264", 60, 1, 0)), 60, stream=1
    ),
    "cover_first": Clip(
        "cover.mp4",
        lambda p: cover_first(write_streams(p, ("mjpeg", 1, 2, 1 << 10), ("libx264", 60, 1, 1))),
        60,
        stream=1,
    ),
    "gif": Clip("clip.gif", lambda p: write(p, 60, "gif", pix_fmt="rgb8"), 60),
    "gif_irregular": Clip(
        "slow.gif", lambda p: write(p, 60, "gif", pix_fmt="rgb8", times=irregular(60, 10)), 60
    ),
    "one": Clip("one.mp4", lambda p: write(p, 1), 1),
    "three": Clip("three.mp4", lambda p: write(p, 3), 3),
}
GOOD |= {
    f"matrix_{name}": Clip(f"{name}.mp4", lambda p, m=m: write(p, 20, gop=5, matrix=m), 20, matrix=m)
    for name, m in MATRICES.items()
}


def write_hdr(path: Path, transfer: str, matrix: tuple = UPRIGHT) -> Path:
    """10 frames as cameras write HDR: 10 bits, BT.2020 and this transfer function, smpte2084 or arib-std-b67."""
    colours = x265(f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc")
    return write(path, 10, "libx265", gop=5, pix_fmt="yuv420p10le", options=colours, matrix=matrix)


def write_webp(path: Path, frames: int) -> Path:
    from PIL import Image

    first, *rest = (Image.fromarray(draw(i)) for i in range(frames))
    first.save(path, save_all=True, append_images=rest, duration=40, lossless=True)
    return path


def make_bad(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no usable video, with a word that the reason must hold."""
    good = write(folder / "target.mp4", 30)
    with av.open(str(folder / "sound.m4a"), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    bomb = bytearray(write(folder / "small.gif", 1, "gif", pix_fmt="rgb8").read_bytes())
    struct.pack_into("<2H", bomb, 6, 16384, 4352)  # 71 megapixels, says the header
    ts = [write(folder / f"{scale}.ts", 50, gop=25, scale=scale).read_bytes() for scale in (1, 2)]
    webm = [
        write(folder / f"{scale}.webm", 50, "libvpx-vp9", gop=10, options=VP9, scale=scale)
        for scale in (1, 2)
    ]
    contents = {
        "empty.mp4": (b"", "empty"),
        "page.mp4": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "HTML"),
        "note.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "text"),
        "list.ffconcat": (f"ffconcat version 1.0\nfile {good.name}\n".encode(), "text"),
        "list.m3u8": (f"#EXTM3U\n#EXTINF:1,\n{good.name}\n#EXT-X-ENDLIST\n".encode(), "text"),
        "disguised.mp4": (f"ffconcat version 1.0\nfile {good.name}\n#\0#\n".encode(), "not a video"),
        "noise.mp4": (np.random.default_rng(1).bytes(5000), "not a video"),
        "moov_lost.mp4": (good.read_bytes()[:-2000], "not a video"),
        "unknown_codec.mp4": (good.read_bytes().replace(b"avc1", b"zzzz"), "no decoder"),
        "bomb.gif": (bomb, "16384x4352"),
        "size_changes.ts": (b"".join(ts), "changes its size, from 160x96 to 320x192"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    (folder / "folder.mp4").mkdir()
    return {name: (folder / name, reason) for name, (_, reason) in contents.items()} | {
        "missing.mp4": (folder / "missing.mp4", "no such file"),
        "folder.mp4": (folder / "folder.mp4", "not a regular file"),
        "sound.m4a": (folder / "sound.m4a", "no video stream"),
        "size_changes.webm": (copy(webm, folder / "size_changes.webm"), "changes its size, from 160x96"),
        "animated.webp": (write_webp(folder / "animated.webp", 5), "no frame decodes"),
        f"concat:{good}": (f"concat:{good}", "no such file"),
        f"file:{good}": (f"file:{good}", "no such file"),
    }
