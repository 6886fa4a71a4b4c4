"""extract_frames against a full sequential PyAV decode, on generated traps and on four real clips."""

from pathlib import Path

import av
import numpy as np
import pytest
from clips import make_all, make_bad, read_number

from common import BadSample, extract_frames, frame_indices

REAL = sorted(Path(__file__).resolve().parents[2].glob("shared/clips/*.*[!d]"))
NAMES = [
    "h264_gop12",
    "h264_gop250",
    "hevc_open_gop",
    "mp4v",
    "avi",
    "mpeg_ps",
    "vfr_mp4",
    "vfr_mkv",
    "edit_list",
]
NAMES += [
    "edit_list_start",
    "truncated",
    "ts",
    "ts_tuned_in",
    "webm_live",
    "gif",
    "av1",
    "av1_rotated",
    "rotated",
]
NAMES += ["ts_mpeg2", "lost_frame", "ghosts", "two_streams", "one", "three"]
REAL_LENGTH = {
    "lost_frame": 99,
    "ghosts": 300,
    "two_streams": 100,
    "edit_list": 150,
    "edit_list_start": 230,
    "vfr_mkv": 300,
    "webm_live": 120,
    "rotated": 100,
    "three": 3,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return make_bad(tmp_path_factory.mktemp("bad"))


def decode_all(path) -> list[np.ndarray]:
    """Every frame that PyAV gets out of the file, upright: the reference."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                continue
            frames += [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in decoded]
    return frames


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


@pytest.mark.parametrize("name", NAMES)
def test_exact(good, name):
    every = decode_all(good[name])
    numbers = [read_number(frame) for frame in every]
    assert numbers == sorted(set(numbers)), "the clip must count its frames"
    assert len(every) == REAL_LENGTH.get(name, len(every))
    for k in (1, 2, 3, 5, 8, 16, 33):
        if k > len(every):
            with pytest.raises(BadSample, match=f"{len(every)} frames, {k} needed"):
                extract_frames(good[name], k)
            continue
        frames, index = extract_frames(good[name], k), frame_indices(len(every), k)
        assert frames.dtype == np.uint8 and frames.shape == (k, 96, 160, 3)
        assert [read_number(frame) for frame in frames] == [numbers[i] for i in index]
        assert same(frames, [every[i] for i in index])


def test_names_are_complete(good):
    assert set(NAMES) == set(good)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_clip(path):
    every = decode_all(path)
    for k in (1, 5, 8, 16):
        assert same(extract_frames(path, k), [every[i] for i in frame_indices(len(every), k)])


def test_the_usual_loop_is_wrong(good):
    """If it were right on these files, they would prove nothing."""
    wrong = set()
    for name, path in [*good.items(), *((path.name, path) for path in REAL)]:
        every = decode_all(path)
        if len(every) >= 5 and not same(
            naive_frames(path, 5), [every[i] for i in frame_indices(len(every), 5)]
        ):
            wrong.add(name)
    assert {"edit_list", "truncated", "vfr_mkv", "ts_tuned_in", "webm_live", "av1"} <= wrong
    assert not REAL or "decord_flipping_a_pancake.mkv" in wrong


def test_bad_files(bad):
    for name, (path, reason) in bad.items():
        with pytest.raises(BadSample) as error:
            extract_frames(path, 2)
        assert reason in str(error.value) and "\n" not in str(error.value), f"{name}: {error.value}"


def test_bad_k_is_not_a_bad_sample(good):
    with pytest.raises(ValueError, match="k=0") as error:
        extract_frames(good["three"], 0)
    assert error.type is ValueError


@pytest.mark.parametrize("name", ["h264_gop12", "rotated", "av1_rotated", "edit_list"])
def test_size(good, name):
    import cv2

    full = extract_frames(good[name], 5)
    for h, w in ((48, 80), (48, 48), (40, 32), (64, 160), (192, 320)):
        frames = extract_frames(good[name], 5, size=(h, w))
        assert frames.shape == (5, h, w, 3) and frames.dtype == np.uint8
        scale = max(h / 96, w / 160)  # the other way round: scale the short side, then crop
        big = [
            cv2.resize(f, (round(160 * scale), round(96 * scale)), interpolation=cv2.INTER_AREA) for f in full
        ]
        top, left = (big[0].shape[0] - h) // 2, (big[0].shape[1] - w) // 2
        want = np.stack([f[top : top + h, left : left + w] for f in big]).astype(np.int16)
        assert np.abs(frames - want).mean() < 12  # half a pixel of shift at most
    assert [read_number(f) for f in extract_frames(good[name], 5, size=(96, 160))] == [
        read_number(f) for f in full
    ]


def test_a_playlist_opens_no_other_file(bad):
    """The disguise (a NUL byte) passes the look at the first bytes; ffmpeg's format whitelist must stop
    it."""
    import cv2

    path = bad["disguised.mp4"][0]
    with av.open(str(path), options={"safe": "0"}) as container:
        assert container.format.name == "concat" and next(container.decode(video=0)).width == 160
    with pytest.raises(BadSample):
        extract_frames(path, 2)
    assert not cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).isOpened()
