"""What a run stands on: folder, lock, flags that may change, checkpoints, seeds, steps. By the functions
themselves, on real files."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, environment

import common
from common import Free, Layout, Lower


@dataclass(frozen=True)
class Config:
    output_dir: Free[Path] = Path("run")
    seed: int = 0
    guidance: Free[float] = 1.0
    batch_size: Lower[int] = 8
    steps: Free[int] = 0
    epochs: Free[float] = 1.0
    warmup_steps: Free[int | None] = None
    lr: Free[float] = 1.0
    lr_decay: bool = False


@pytest.fixture(autouse=True)
def no_locks(monkeypatch):
    """Each test is a new process to lock_folder()."""
    monkeypatch.setattr(common, "_lock", {})


def refused(capsys, call, *args, **named) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*args, **named)
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- What makes it another run


def held(folder: Path, **changes) -> Config:
    cfg = Config(output_dir=folder)
    common.write_json(folder / "config.json", common.settings(cfg))
    return dataclasses.replace(cfg, **changes)


def test_what_changes_the_run_is_refused_and_the_rest_is_told(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "video")
    common.check_same_run(held(tmp_path))
    assert not caplog.text
    common.check_same_run(held(tmp_path, guidance=2.0, batch_size=4))
    assert "guidance: 1.0 there, 2.0 here" in caplog.text and "batches are cut anew" in caplog.text
    error = refused(capsys, common.check_same_run, held(tmp_path, seed=7, batch_size=16, guidance=3.0))
    assert "seed: 0 there, 7 here" in error and "it may only go down" in error and "guidance" not in error


@pytest.mark.parametrize("content", ["", "[]", "null", '{"seed": '])
def test_a_config_that_a_power_cut_left_broken_is_no_traceback(tmp_path, content, caplog):
    (tmp_path / "config.json").write_text(content)
    common.check_same_run(Config(output_dir=tmp_path))
    assert "is broken" in caplog.text


def test_facts_of_the_data_make_another_run(tmp_path, capsys):
    step = saved(tmp_path, 2, data=common.fingerprint([("a.mp4", "a cat")]))
    found, marker = common.find_checkpoint(tmp_path, True, {"data": common.fingerprint([("a.mp4", "a cat")])})
    assert found == step and marker["step"] == 2
    other = {"data": common.fingerprint([("a.mp4", "a dog")])}
    assert "was trained on other data" in refused(capsys, common.find_checkpoint, tmp_path, True, other)
    assert "--no_resume" in refused(capsys, common.find_checkpoint, tmp_path, False, {})


# --- Steps


@pytest.mark.parametrize(
    ("flags", "steps", "warmup"),
    [
        ({"steps": 2000}, 2000, 100),
        ({"steps": 60}, 60, 6),
        ({"steps": 60, "warmup_steps": 50}, 60, 50),
        ({"epochs": 2.0}, 4, 0),
    ],
)
def test_a_warm_up_that_nobody_asked_for_is_a_tenth_of_the_run_at_most(flags, steps, warmup):
    cfg = common.with_steps(Config(**flags), 100, samples=8, per_step=4)
    assert (cfg.steps, cfg.warmup_steps) == (steps, warmup)
    last = common.learning_rate(cfg, warmup)
    assert last == 1.0


# --- Lock


def test_the_holder_of_a_folder_is_named_with_how_to_stop_it(tmp_path, capsys):
    code = (
        "import common, os, sys; common.lock_folder(common.Path('run'), [os.getpid(), 12]); "
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=ROOT),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = holder.stdout.readline().strip()
    error = refused(capsys, common.lock_folder, tmp_path / "run", [1])
    assert f"on {socket.gethostname()}; stop it there with: kill {pid} 12" in error
    holder.kill()
    holder.wait()
    common.lock_folder(tmp_path / "run", [1])  # a lock ends with its process


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_flock_gets_a_lock_file(tmp_path, capsys, caplog, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    common.lock_folder(tmp_path, [os.getpid()])
    assert "without flock" in caplog.text
    assert json.loads((tmp_path / ".lock").read_text()) == {
        "host": socket.gethostname(),
        "pids": [os.getpid()],
    }
    common._lock.clear()
    assert f"kill {os.getpid()}" in refused(capsys, common.lock_folder, tmp_path, [1])
    common._lock.clear()
    # no such process
    common.write_json(tmp_path / ".lock", {"host": socket.gethostname(), "pids": [2**22 + 1]})
    common.lock_folder(tmp_path, [os.getpid()])
    common._lock.clear()
    common.write_json(tmp_path / ".lock", {"host": "elsewhere", "pids": [1]})
    assert "on elsewhere" in refused(capsys, common.lock_folder, tmp_path, [1])


# --- Checkpoints


def saved(folder: Path, step: int, keep: int = 9, **facts) -> Path:
    def write(aside: Path) -> None:
        (aside / "deepspeed").mkdir()
        (aside / "deepspeed" / "weights.pt").write_bytes(bytes(step % 256 for _ in range(1000)))

    common.save_checkpoint(folder, step, write, keep, ranks=1, **facts)
    return folder / f"step_{step:06d}"


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(common, "barrier", lambda: None)


DAMAGE = {
    "marker []": "[]",
    "marker null": "null",
    "no files": '{"step": 9, "files": {}}',
    "another step": '{"step": 8, "files": {"deepspeed/weights.pt": {"bytes": 1000}}}',
    "files is a list": '{"step": 9, "files": ["x"]}',
    "empty": "",
    "cut": '{"step": 9, "fi',
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_marker_of_any_kind_is_skipped_by_name(tmp_path, case, caplog):
    whole = saved(tmp_path, 2)
    broken = saved(tmp_path, 9)
    (broken / "checkpoint.json").write_text(DAMAGE[case])
    assert common.newest_checkpoint(tmp_path) == whole
    assert "step_000009 is broken" in caplog.text


def test_only_whole_checkpoints_are_pruned_and_never_the_new_one(tmp_path):
    for step in (20, 30):
        (saved(tmp_path, step) / "checkpoint.json").unlink()
    (tmp_path / "step_²").mkdir()
    (tmp_path / "step_000011.mine").mkdir()
    for step in (2, 4, 6):
        saved(tmp_path, step, keep=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_000004", "step_000006", "step_000020", "step_000030", "step_²", "step_000011.mine"}
    assert common.newest_checkpoint(tmp_path).name == "step_000006"


def test_a_large_file_is_compared_by_size_a_smaller_one_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SUMMED_BYTES", 999)
    large = saved(tmp_path, 1)
    monkeypatch.setattr(common, "SUMMED_BYTES", 1000)
    small = saved(tmp_path, 2)
    for path in (large, small):
        weights = path / "deepspeed" / "weights.pt"
        weights.write_bytes(b"x" * 1000)
    assert common.what_is_wrong(large) == "" and "another content" in common.what_is_wrong(small)
    os.truncate(large / "deepspeed" / "weights.pt", 999)
    assert "another size" in common.what_is_wrong(large)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_checkpoint_of_another_user_is_not_opened(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    path = saved(folder, 2)
    (tmp_path / ".lock").touch()
    os.chown(path, 12345, 12345)
    assert "belongs to user 12345" in refused(capsys, common.newest_checkpoint, folder)


# --- Files


def test_what_two_runs_make_at_once_is_made_whole_and_both_have_it(tmp_path):
    start, results = threading.Barrier(2), []

    def make(aside: Path) -> None:
        (aside / "model").write_text("weights")
        start.wait()

    def one() -> None:
        results.append(common.made_once(tmp_path / "cache" / "tiny", make))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "cache" / "tiny"] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny"]
    assert (tmp_path / "cache" / "tiny" / "model").read_text() == "weights"


def test_a_text_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(common, "sync", lambda path: order.append(("sync", path.name)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("rename", b.name)), shutil.move(a, b)))
    common.write_text(tmp_path / "config.json", "{}")
    assert order == [("sync", ".config.json.partial"), ("rename", "config.json"), ("sync", tmp_path.name)]


SLOW_DECODING = """
import time
from types import SimpleNamespace
import common

def decode(row, *_):
    print(row.video, flush=True)
    time.sleep(0.2)

common.cached_frames = decode
rows = [common.Row("", 0, f"http://host/{n}") for n in range(10_000)]
common.run(lambda: common.decode_rows(rows, 1, 8, SimpleNamespace(cache_dir=common.Path(), num_workers=4)))
"""


def test_a_signal_ends_decoding_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DECODING], cwd=tmp_path, env=environment(PYTHONPATH=ROOT),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "10000 of 10000 clips are to be decoded" in process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate()
    assert process.returncode == 143 and len(rest.split()) < 100


# --- Memory


def test_layouts_have_fields_and_the_first_that_fits_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(common, "memory_here", lambda: (16.0, 64.0))
    layouts = common.memory_layouts(10**9, 0, {False: 8 * 10**9, True: 10**9}, "bf16", 1)
    assert [layout.stage for layout in layouts[::2]] == [2, 2, 3, 3, 3]
    assert layouts[3].name == "ZeRO-2, optimizer on CPU, checkpointing"
    table, taken = common.choose_layout(layouts, "auto", "lower --batch_size")
    assert taken == layouts[2] and isinstance(taken, Layout) and taken.offload == "optimizer"
    assert "<- auto takes this" in table.splitlines()[3] and "does not fit" in table.splitlines()[2]
    monkeypatch.setattr(common, "memory_here", lambda: (1.0, 1.0))
    assert "lower --batch_size" in refused(
        capsys, common.choose_layout, layouts, "auto", "lower --batch_size"
    )


# --- Scores of answers

METRICS = ["exact", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"]
SENTENCES = [
    "Это красный мяч.", "это GPU 4090", "这是一只猫在沙发上睡觉", "これは赤いボールです", "이것은 고양이다", "यह एक बिल्ली है",
    "ลูกบอลสีแดง", "هذه كرة حمراء", "Đây là quả bóng", "A red ball",
]  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES)
def test_a_right_answer_is_right_in_every_script(text):
    """ROUGE too, whose own tokenizer drops whatever is not Latin"""
    scores = common.answer_scores([text], [text])
    assert list(scores) == METRICS and list(scores.values()) == pytest.approx([1.0] * 6)
    nothing = common.answer_scores([""], [text])
    assert list(nothing) == METRICS and set(nothing.values()) == {0.0}


def test_a_single_word_has_no_pairs_of_words():
    assert common.answer_scores(["красный"], ["красный"]) == pytest.approx(
        dict.fromkeys(METRICS, 1.0) | {"rouge_2": 0.0}
    )


def test_scores_where_words_are_not_divided():
    """By letters: as one word each of these would be all wrong"""
    right = "这是一只猫在沙发上睡觉"  # eleven letters
    more = common.answer_scores([right + "啊"], [right])
    assert more["exact"] == 0 and min(more[name] for name in METRICS[1:]) > 0.5
    assert more["rouge_1"] == more["rouge_l"] == pytest.approx(2 * 11 / (12 + 11))
    assert more["rouge_2"] == pytest.approx(2 * 10 / (11 + 10))
    assert more["bleu"] == pytest.approx((11 / 12 * 10 / 11 * 9 / 10 * 8 / 9) ** 0.25)
    other = common.answer_scores(["那里没有人"], [right])
    assert max(other.values()) < 0.3
    assert common.is_undivided(["一只猫 an"]) and not common.is_undivided(["a cat 猫"])
    assert not common.is_undivided([""]) and not common.is_undivided(["это красный мяч", "이것은 고양이다"])


def test_words_of_scripts_with_marks_and_without_blanks():
    assert common.words("It's a GPU显卡, हिन्दी!") == ["it", "s", "a", "gpu", "显", "卡", "हिन्दी"]
    assert common.words("Красный МЯЧ, 2-й") == ["красный", "мяч", "2", "й"]
    assert common.words("看! 3只猫") == ["看", "3", "只", "猫"]
    assert common.words("e\u0301té") == ["e\u0301té"], "an accent that is a letter of its own"
    assert common.words("สี ลูก") == ["สี", "ลู", "ก"], "a vowel belongs to the letter it stands on"
    assert common.words(" ... ") == common.words("。") == []


def test_scores_are_those_of_the_literature():
    table = common.answer_scores(
        ["A red square.", "two", "a cat sat on the mat"], ["a red  square", "three", "the cat sat on the mat"]
    )
    assert table["exact"] == pytest.approx(1 / 3)
    assert (
        table["rouge_l"] == table["rouge_1"] == pytest.approx((1 + 0 + 5 / 6) / 3)
    )  # F of 5 common words of 6 and 6
    assert table["rouge_2"] == pytest.approx((1 + 0 + 4 / 5) / 3)
    assert common.answer_scores(["left", "up"], ["left", "down"])["bleu"] == pytest.approx(0.5)


# --- Flags for a launcher


@pytest.mark.parametrize("flags", [["--num_gpus", "4"], ["--num_gpus=4"], ["--nproc_per_node=4"]])
def test_the_number_of_gpus_is_answered_with_the_line_that_takes_it(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x/llava_vtt.py", *flags])
    with pytest.raises(SystemExit) as stop:
        common.read_flags(object, "", {}, {})
    assert stop.value.code == 2 and "./run.sh llava_vtt.py 4" in capsys.readouterr().err
