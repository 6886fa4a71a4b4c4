"""Test videos, written with PyAV alone: every frame carries its own number, so a reader can be checked frame
by frame.

make_all(folder) -> {name: path} of good files, make_bad(folder) -> {name: (path, words the reason must
hold)}. The number stands in a bar of 16 black or white blocks on top, which survives lossy coding; below it
moves a texture, so that the encoder makes real P and B frames. Editing boxes gives what muxers do not write:
a trim, a rotation.
"""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, BAR = 160, 96, 16  # the bar: 16 blocks of 10 x 16 pixels
TEXTURE = (
    np.random.default_rng(0)
    .integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), np.uint8)
    .repeat(8, 0)
    .repeat(8, 1)
)


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


def write(
    path, frames, codec="libx264", gop=250, times=None, pix_fmt="yuv420p", options=None, mux=None, turn=0
):
    """Encode the numbers 0..frames-1 at 25 fps, or at `times` (ms); turn: quarter turns of the picture
    before."""
    options = dict({"libx264": {"preset": "veryfast", "bf": "3"}}.get(codec, {}), **(options or {}))
    with av.open(str(path), "w", options=mux or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        height, width = np.rot90(draw(0), turn).shape[:2]
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pix_fmt, gop
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(draw(i), turn)), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def irregular(n: int) -> list[int]:
    """Times in ms of a phone-like stream: bursts at 60 fps, then long pauses."""
    return np.cumsum([0] + [16 if i // 20 % 2 else 90 + i % 7 for i in range(n - 1)]).tolist()


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


def rotate(path: Path) -> Path:
    """Ask players for a quarter turn clockwise: the matrix of the track header, as phones write it."""
    data = bytearray(path.read_bytes())
    struct.pack_into(
        ">9i", data, data.index(b"tkhd") + 4 + 40, 0, 1 << 16, 0, -1 << 16, 0, 0, WIDTH << 16, 0, 1 << 30
    )
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


def add_ghosts(path: Path, target: Path) -> Path:
    """Copy MPEG-4 video, with a "VOP not coded" after each tenth of the first 200 frames: it decodes to
    nothing."""
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            ghost = av.Packet(b"\0\0\1\xb6\x50\x4f")
            for item, time in ((packet, 40 * i), (ghost, 40 * i + 20))[: 2 if i % 10 == 5 and i < 200 else 1]:
                item.stream, item.time_base, item.pts, item.dts = stream, Fraction(1, 1000), time, time
                out.mux(item)
    return target


def write_two(path: Path) -> Path:
    """A first video stream of 100 frames, and a larger one of 60, which ffmpeg takes for the best one."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=25, options={"preset": "ultrafast"}) for _ in range(2)]
        for scale, stream in enumerate(streams, 1):
            stream.width, stream.height, stream.pix_fmt = WIDTH * scale, HEIGHT * scale, "yuv420p"
        for i in range(100):
            for scale, stream in list(enumerate(streams, 1))[: 2 if i < 60 else 1]:
                picture = np.ascontiguousarray(draw(i).repeat(scale, 0).repeat(scale, 1))
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode(None))
    return path


def make_all(folder: Path) -> dict[str, Path]:
    """Files that a player shows, by the trap in them."""
    x265 = {"preset": "ultrafast", "x265-params": "open-gop=1:log-level=none:pools=1"}
    vp9, av1 = {"deadline": "realtime", "cpu-used": "8"}, {"preset": "12", "svtav1-params": "lp=1"}
    mpeg4 = {"b": "2M", "bf": "2"}
    return {
        "h264_gop12": write(folder / "gop12.mp4", 300, gop=12),
        "h264_gop250": write(folder / "gop250.mp4", 300),
        "hevc_open_gop": write(folder / "hevc.mp4", 150, "libx265", gop=30, options=x265),
        "mp4v": write(folder / "mp4v.mp4", 300, "mpeg4", gop=12, options={"b": "2M"}),
        "avi": write(folder / "mpeg4.avi", 300, "mpeg4", gop=50, options=mpeg4),
        "mpeg_ps": write(folder / "clip.mpg", 200, "mpeg2video", gop=15, options=mpeg4),
        "vfr_mp4": write(folder / "vfr.mp4", 300, gop=40, times=irregular(300)),
        "vfr_mkv": write(folder / "vfr.mkv", 300, gop=40, times=irregular(300)),
        "edit_list": trim(write(folder / "edit.mp4", 300, gop=60), 100, 150),
        "edit_list_start": trim(write(folder / "edit_start.mp4", 300, gop=60), 70, 230),
        "truncated": cut(write(folder / "truncated.mp4", 300, gop=60, mux={"movflags": "faststart"}), 0, 0.6),
        "ts": write(folder / "clip.ts", 300, gop=50),
        "ts_tuned_in": cut(write(folder / "tuned_in.ts", 300, gop=50), 0.3),
        "ts_mpeg2": write(folder / "mpeg2.ts", 200, "mpeg2video", gop=50, options=mpeg4),
        "lost_frame": lose_frame(write(folder / "lost.mp4", 100), 30),
        "ghosts": add_ghosts(folder / "mp4v.mp4", folder / "ghosts.mp4"),
        "two_streams": write_two(folder / "two.mkv"),
        "webm_live": write(folder / "live.webm", 120, "libvpx-vp9", gop=30, options=vp9, mux={"live": "1"}),
        "gif": write(folder / "clip.gif", 60, "gif", pix_fmt="rgb8"),
        "av1": write(folder / "av1.mp4", 60, "libsvtav1", gop=20, options=av1),
        "av1_rotated": rotate(write(folder / "av1_rotated.mp4", 20, "libsvtav1", options=av1, turn=1)),
        "rotated": rotate(write(folder / "rotated.mp4", 100, gop=25, turn=1)),
        "one": write(folder / "one.mp4", 1),
        "three": write(folder / "three.mp4", 3),
    }


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
    with av.open(
        str(folder / "bomb.avi"), "w"
    ) as out:  # one grey picture of 71 megapixels in a few kilobytes
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16384, 4352, "yuvj420p"
        planes = np.full((4352 * 3 // 2, 16384), 128, np.uint8)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuvj420p")))
        out.mux(stream.encode(None))
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
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    (folder / "folder.mp4").mkdir()
    return {name: (folder / name, reason) for name, (_, reason) in contents.items()} | {
        "missing.mp4": (folder / "missing.mp4", "no such file"),
        "folder.mp4": (folder / "folder.mp4", "not a regular file"),
        "sound.m4a": (folder / "sound.m4a", "no video stream"),
        "bomb.avi": (folder / "bomb.avi", "16384x4352"),
        f"concat:{good}": (f"concat:{good}", "no such file"),
        f"file:{good}": (f"file:{good}", "no such file"),
    }
