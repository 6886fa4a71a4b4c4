"""timed_frames against a full sequential PyAV decode, on generated traps and on real clips."""

import functools
import math
from pathlib import Path

import av
import numpy as np
import pytest
from clips import GOOD, MATRICES, UPRIGHT, draw, irregular, make_bad, read_number, turned, write, write_hdr

import common
from common import AtMost, BadSample, Pace, frame_indices, open_media, timed_frames


def extract_frames(*args, **kwargs) -> np.ndarray:
    return timed_frames(*args, **kwargs)[0]


SHARED = Path(__file__).resolve().parents[2] / "shared"
CASES = SHARED / "cases/video"
SHOWN = {"matrix_hflip.mp4": MATRICES["mirrored"], "matrix_transpose.mp4": MATRICES["transposed"]}
PLAIN = ("interlaced_mbaff.mp4", "one_frame.mp4", *SHOWN)
REAL = sorted(SHARED.glob("clips/*.*[!d]")) + [CASES / name for name in PLAIN if (CASES / name).exists()]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """good(name) -> the path of that file of clips.GOOD, made once."""
    folder = tmp_path_factory.mktemp("good")
    return functools.cache(lambda name: GOOD[name].make(folder / GOOD[name].file))


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return make_bad(tmp_path_factory.mktemp("bad"))


def decode_all(path, stream=0, matrix=UPRIGHT) -> list[np.ndarray]:
    """Every frame that PyAV gets out of the file, turned by this matrix: the reference."""
    frames = []
    with av.open(str(path)) as container:
        video = container.streams.video[stream]
        video.codec_context.thread_count = 1  # what is shown for damage depends on it
        for packet in container.demux(video):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                continue
            frames += [frame.to_ndarray(format="rgb24") for frame in decoded]
    return frames if matrix == UPRIGHT else [turned(frame, *matrix) for frame in frames]


def decode_good(good, name) -> list[np.ndarray]:
    return decode_all(good(name), GOOD[name].stream, GOOD[name].matrix)


def naive_frames(path, k: int) -> list[np.ndarray]:
    """What most training scripts do: trust the header, seek, and repeat the last frame when a read fails."""
    import cv2

    cap, frames = cv2.VideoCapture(str(path)), []
    total = int(cap.get(cv2.CAP_PROP_FRAME_COUNT))
    for index in frame_indices(max(total, k), k):
        cap.set(cv2.CAP_PROP_POS_FRAMES, index)
        ok, frame = cap.read()
        frames += [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)] if ok else frames[-1:]
    return frames


def same(got, want) -> bool:
    """Equal but for the rounding of the colour conversion; a neighbouring frame of these clips differs by far
    more."""
    return len(got) == len(want) and all(
        a.shape == b.shape and np.abs(a.astype(np.int16) - b).mean() < 0.5
        for a, b in zip(got, want, strict=True)
    )


def numbers(frames) -> list[int]:
    return [read_number(frame) for frame in frames]


def test_indices():
    assert frame_indices(10, 1) == [4] and frame_indices(11, 1) == [5]
    assert frame_indices(10, 4) == [0, 3, 6, 9] and frame_indices(100, 8) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert frame_indices(5, 5) == [0, 1, 2, 3, 4]
    for total in range(1, 60):
        for k in range(2, total + 1):
            index = frame_indices(total, k)
            assert index == np.floor(np.arange(k) * (total - 1) / (k - 1) + 1e-9).tolist()
            assert len(set(index)) == k and index[0] == 0 and index[-1] == total - 1
    with pytest.raises(BadSample, match="3 frames, 8 needed"):
        frame_indices(3, 8)
    for total, k in ((10, 0), (-1, 1)):
        with pytest.raises(ValueError, match=f"total={total}, k={k}") as error:
            frame_indices(total, k)
        assert error.type is ValueError


@pytest.mark.parametrize("name", GOOD)
def test_exact(good, name):
    every = decode_good(good, name)
    first, total = GOOD[name].first, GOOD[name].frames or len(every)
    counted = numbers(every)
    assert counted == sorted(set(counted)) and len(every) == total, "the clip must count its frames"
    assert counted[0] == first or name == "ts_tuned_in"
    for k in (1, 2, 3, 8, 33):
        if k > total:
            with pytest.raises(BadSample, match=f"{total} frames, {k} needed"):
                extract_frames(good(name), k)
            continue
        frames, index = extract_frames(good(name), k), frame_indices(total, k)
        assert frames.dtype == np.uint8 and frames.shape == (k, 96, 160, 3)
        assert numbers(frames) == [counted[i] for i in index]
        assert same(frames, [every[i] for i in index])


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_clip(path):
    every = decode_all(path, matrix=SHOWN.get(path.name, UPRIGHT))
    for k in (1, 8, 16):
        if k <= len(every):
            assert same(extract_frames(path, k), [every[i] for i in frame_indices(len(every), k)])


BY_SEEKING = ["h264_gop12", "hevc", "vp9", "av1", "vfr_mp4", "vfr_mkv", "fragmented", "edit_list"]
FROM_THE_START = ["ts", "avi", "mpeg_ps", "mp4v_all_keys", "hevc_false_keys", "gif"]


@pytest.mark.parametrize("name", BY_SEEKING + FROM_THE_START)
def test_range(good, name):
    every = decode_good(good, name)
    total = len(every)
    for wanted in (range(10), range(total // 3, total // 2), range(total - 12, total), range(1, total, 7)):
        assert same(extract_frames(good(name), wanted), [every[i] for i in wanted])
    with pytest.raises(BadSample, match=f"ends after {total} frames, {total + 5} needed"):
        extract_frames(good(name), range(total - 3, total + 5))


@pytest.mark.parametrize("name", ["h264_gop12", "hevc", "vp9", "ts", "avi"])
def test_nothing_after_a_range_needs_to_decode(good, name, tmp_path):
    """The packets after frame 79, and the few that its group needs, hold zeros."""
    path, wanted = tmp_path / good(name).name, range(40, 80)
    with av.open(str(good(name))) as container:
        places = sorted((p.pos, p.size) for p in container.demux(video=0) if p.size)
    data, start = bytearray(good(name).read_bytes()), places[90][0]
    end = sum(places[-1])
    if name == "ts":
        del data[start:]
    else:
        data[start:end] = bytes(end - start)
    path.write_bytes(data)
    assert numbers(extract_frames(path, wanted)) == list(wanted)
    assert len(decode_all(path)) < GOOD[name].frames


@pytest.mark.parametrize(
    "name", ["h264_gop12", "vfr_mp4", "vfr_mkv", "edit_list", "ts", "avi", "gif_irregular"]
)
def test_segment(good, name):
    clip = GOOD[name]
    times = [40 * i for i in range(clip.frames)]
    if "vfr" in name or "irregular" in name:
        times = irregular(clip.frames, 10 if clip.file.endswith(".gif") else 1)
    for start, end in ((0, 1), (1.2, 2), (2, 2.6), (times[-20] / 1000, math.inf)):
        shown = [clip.first + i for i, t in enumerate(times) if start <= t / 1000 < end]
        for frames in (1, 5, range(2, 6)):
            index = frames if isinstance(frames, range) else frame_indices(len(shown), frames)
            got = extract_frames(good(name), frames, start=start, end=end)
            assert numbers(got) == [shown[i] for i in index], (start, end, frames)
        with pytest.raises(BadSample, match=f"{len(shown)} frames.* {len(shown) + 1} needed"):
            extract_frames(good(name), len(shown) + 1, start=start, end=end)
    for frames in (2, range(2)):
        with pytest.raises(BadSample, match="0 frames.* from 1000 s to 1001 s"):
            extract_frames(good(name), frames, start=1000, end=1001)


def test_wrong_numbers_are_the_callers_fault(good):
    for frames in (0, -1, range(0), range(-2, 2), range(9, 2, -1)):
        with pytest.raises(ValueError) as error:
            extract_frames(good("three"), frames)
        assert error.type is ValueError and str(frames) in str(error.value)


@pytest.fixture
def decoded(monkeypatch):
    """decoded(path, frames) -> how many frames extract_frames decodes for them."""
    real, count = common.decoded_frames, []

    def counted(*arguments):
        for frame in real(*arguments):
            count.append(frame)
            yield frame

    def run(path, frames) -> int:
        count.clear()
        extract_frames(path, frames)
        return len(count)

    monkeypatch.setattr(common, "decoded_frames", counted)
    return run


@pytest.mark.parametrize("name", BY_SEEKING + FROM_THE_START)
def test_seeks_where_that_is_safe(good, decoded, name):
    total = GOOD[name].frames or len(decode_good(good, name))
    most = decoded(good(name), 5)
    if name == "hevc_false_keys":  # the first seek finds out
        assert total < most < 2 * total
    else:
        assert most <= 0.7 * total if name in BY_SEEKING else most == total


def test_a_long_clip_costs_five_groups(decoded, tmp_path):
    path = write(tmp_path / "minute.mp4", 1500, gop=12)
    assert decoded(path, 5) <= 5 * 12
    assert decoded(path, range(1490, 1500)) <= 2 * 12


def test_the_usual_loop_is_wrong(good):
    """If it were right on these files, they would prove nothing."""
    for name in ("edit_list", "truncated", "vfr_mkv", "ts_tuned_in", "webm_live", "av1"):
        every = decode_good(good, name)
        assert not same(naive_frames(good(name), 5), [every[i] for i in frame_indices(len(every), 5)]), name


def damage(path: Path, target: Path, groups, seed: int) -> Path:
    """Flip bits of two packets in these groups of 12 frames."""
    rng, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for group in rng.choice(groups, 2):
        position, size = packets[12 * group + rng.integers(12)]
        data[position + size // 8 + rng.integers(size * 7 // 8)] ^= 1 << rng.integers(8)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("name", ["h264_gop12", "fragmented", "vp9", "ts", "avi"])
def test_damage_where_it_reads(good, name, tmp_path):
    """Then what players show, whatever that is, or a reason."""
    total = GOOD[name].frames
    index = frame_indices(total, 5)
    for seed in range(4):
        path = damage(good(name), tmp_path / good(name).name, [i // 12 for i in index], seed)
        try:
            frames = extract_frames(path, 5)
        except BadSample:
            continue
        every = decode_all(path)
        assert same(frames, [every[i] for i in frame_indices(len(every), 5)]), seed


@pytest.mark.parametrize("name", ["h264_gop12", "fragmented", "vp9"])
def test_damage_where_it_does_not_read(good, name, tmp_path):
    """Then nothing: the frames are those of the whole file."""
    total = GOOD[name].frames
    skipped = set(range(total // 12)) - {i // 12 for i in frame_indices(total, 5)}
    for seed in range(4):
        path = damage(good(name), tmp_path / good(name).name, sorted(skipped), seed)
        assert same(extract_frames(path, 5), extract_frames(good(name), 5)), seed


@pytest.mark.parametrize("transfer, matrix", [("smpte2084", UPRIGHT), ("arib-std-b67", MATRICES["quarter"])])
def test_hdr(tmp_path, transfer, matrix):
    """As OpenCV shows it. Converted like SDR, it would be grey and flat."""
    import cv2

    path, total = write_hdr(tmp_path / "hdr.mp4", transfer, matrix), 10
    if transfer == "smpte2084" and (CASES / "hdr_pq_hevc10.mp4").exists():
        path, total = CASES / "hdr_pq_hevc10.mp4", 40
    frames, index = extract_frames(path, 3), frame_indices(total, 3)
    plain = decode_all(path, matrix=matrix)
    assert len(plain) == total
    assert all(np.abs(a.astype(int) - plain[i]).mean() > 10 for a, i in zip(frames, index))
    if int(cv2.__version__.split(".")[0]) >= 5:  # before, OpenCV showed it flat
        cap = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        every = [cap.read()[1][..., ::-1] for _ in range(total)]
        assert all(np.abs(a.astype(int) - every[i]).mean() < 1 for a, i in zip(frames, index))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_picture(tmp_path, suffix):
    """A picture is a video of one frame, turned as its EXIF data say."""
    from PIL import Image, ImageOps

    path = tmp_path / f"picture.{suffix}"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(draw(7)).save(path, exif=exif, quality=95)
        want = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        (frame,) = extract_frames(path, 1)
        assert frame.shape == want.shape and np.abs(frame.astype(int) - want).mean() < 8
    with pytest.raises(BadSample, match="1 frames, 2 needed"):
        extract_frames(path, 2)


def test_bad_files(bad):
    for name, (path, reason) in bad.items():
        for frames in (2, range(40, 60)):
            with pytest.raises(BadSample) as error:
                extract_frames(path, frames, size=(32, 32))
            assert reason in str(error.value) and "\n" not in str(error.value), f"{name}: {error.value}"


@pytest.mark.skipif(not CASES.exists(), reason="needs shared/cases/video")
def test_a_size_that_changes_in_a_real_broadcast():
    with pytest.raises(BadSample, match="changes its size, from 160x96 to 320x192"):
        extract_frames(CASES / "size_changes.ts", 5)


@pytest.mark.parametrize("name", ["h264_gop12", "matrix_quarter", "av1_rotated", "edit_list"])
def test_size(good, name):
    import cv2

    full = extract_frames(good(name), 5)
    for h, w in ((48, 80), (48, 48), (40, 32), (64, 160), (192, 320)):
        frames = extract_frames(good(name), 5, size=(h, w))
        assert frames.shape == (5, h, w, 3) and frames.dtype == np.uint8
        scale = max(h / 96, w / 160)  # the other way round: scale the short side, then crop
        big = [
            cv2.resize(f, (round(160 * scale), round(96 * scale)), interpolation=cv2.INTER_AREA) for f in full
        ]
        top, left = (big[0].shape[0] - h) // 2, (big[0].shape[1] - w) // 2
        want = np.stack([f[top : top + h, left : left + w] for f in big]).astype(np.int16)
        assert np.abs(frames - want).mean() < 12  # half a pixel of shift at most
    assert numbers(extract_frames(good(name), 5, size=(96, 160))) == numbers(full)


def test_a_playlist_opens_no_other_file(bad):
    """The disguise (a NUL byte) passes the look at the first bytes; ffmpeg's format whitelist must stop
    it."""
    path = bad["disguised.mp4"][0]
    with av.open(str(path), options={"safe": "0"}) as container:
        assert container.format.name == "concat" and next(container.decode(video=0)).width == 160
    with pytest.raises(BadSample, match="not a video"), open_media(path):
        pass


def test_sound(good, bad):
    with open_media(bad["sound.m4a"][0], "audio") as (container, stream):
        assert stream.type == "audio" and sum(frame.samples for frame in container.decode(stream)) >= 8 * 1024
    with pytest.raises(BadSample, match="no audio stream"), open_media(good("three"), "audio"):
        pass


# --- By pace, with times, and as large as they are


def test_a_pace_takes_so_many_a_second_and_no_more_than_its_most(good):
    every, times = timed_frames(good("h264_gop12"), 300)
    assert times[0] == 0 and (np.diff(times) > 0).all()
    for pace in (Pace(2.0, 64), Pace(0.01, 64), Pace(5.0, 7)):
        frames, shown = timed_frames(good("h264_gop12"), pace)
        wanted = min(pace.most, len(every), int(times[-1] * pace.fps) + 1)
        assert len(frames) == len(shown) == wanted
        index = frame_indices(len(every), wanted)
        assert numbers(frames) == index and np.allclose(shown, times[index])


def test_times_are_after_the_first_of_the_part(good):
    _, times = timed_frames(good("h264_gop12"), 3)
    _, part = timed_frames(good("h264_gop12"), 3, start=float(times[-1] / 2))
    assert part[0] == 0 and part[-1] < times[-1]


def test_as_large_as_it_is_but_for_so_many_pixels(good):
    whole = extract_frames(good("h264_gop12"), 1)
    height, width = whole.shape[1:3]
    assert extract_frames(good("h264_gop12"), 1, AtMost(10**9)).shape == whole.shape
    h, w = extract_frames(good("h264_gop12"), 1, AtMost(height * width // 4)).shape[1:3]
    assert h * w <= height * width // 4 and abs(h / w - height / width) < 0.1
