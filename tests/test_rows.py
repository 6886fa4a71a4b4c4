"""Every form of data that people bring, through the functions by which the scripts read it."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clips import write
from hub import Static

import common
import llava_vtt as llava
import nllb_vtt as nllb
import t2v_ddpm as ddpm
import t2v_rflow as rflow
from common import BadSample, read_data

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).resolve().parents[2] / "shared/cases/formats"
REAL = sorted(Path(__file__).resolve().parents[2].glob("shared/clips/*.*[!d]"))
ASKED = [["a.mp4", "What is it?", "a cat"], ["sub/b.mp4", "And this?", "a dog"]]
CAPTIONED = [["a.mp4", ["a cat sits"]], ["sub/b.mp4", ["a dog runs"]]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", 25, gop=5)


@pytest.fixture
def folder(tmp_path, clip):
    """a.mp4 and sub/b.mp4"""
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.mp4"):
        shutil.copy(clip, tmp_path / name)
    return tmp_path


def settings(manifest=None, **flags):
    cfg = {
        "manifest": manifest,
        "dataset": "",
        "videos": None,
        "question": "",
        "cache_dir": Path("cache"),
        "max_bad": 1,
        "demo": False,
    }
    return SimpleNamespace(**(cfg | flags))


def read(manifest, wants, root=None, **flags):
    """-> ([video, captions] or [video, question, answer], the reasons of what is left out)"""
    rows, bad = read_data(settings(manifest, **flags), wants)
    root = root or (manifest if manifest.is_dir() else manifest.parent)
    named = [
        (os.path.relpath(row.video, root) if os.path.isabs(row.video) else row.video, row) for row in rows
    ]
    if wants == "caption":
        return [[name, row.texts] for name, row in named], bad
    return [[name, qa.question, qa.answer] for name, row in named for qa in row.texts], bad


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def turns(question, answer, roles=("from", "human", "gpt", "value")):
    role, user, assistant, content = roles
    return [{role: user, content: question}, {role: assistant, content: answer}]


def asked_rows(make):
    return [make(*row) for row in ASKED]


def captioned_rows(make):
    return [make(video, *captions) for video, captions in CAPTIONED]


def parts(video, question):
    return [{"type": "video", "video": video, "fps": 1}, {"type": "text", "text": question}]


def chat(question, answer):
    return turns(question, answer, ("role", "user", "assistant", "content"))


QUESTIONS = {
    "our own columns.jsonl": lines(*asked_rows(lambda v, q, a: {"video": v, "question": q, "answer": a})),
    "array.json": json.dumps(asked_rows(lambda v, q, a: {"video": v, "question": q, "answer": a}), indent=1),
    "data.json": json.dumps({"data": asked_rows(lambda v, q, a: {"path": v, "q": q, "a": a})}),
    "lines.json": lines(*asked_rows(lambda v, q, a: {"video": v, "query": f"{q}\n<video>", "response": a})),
    "UPPER.CSV": "Video,Question,Answer\n" + "".join(f"{v},{q},{a}\n" for v, q, a in ASKED),
    "bom.csv": "\ufeffvideo;question;answer\r\n" + "".join(f"{v};{q};{a}\r\n" for v, q, a in ASKED),
    "qa.jsonl": lines(*asked_rows(lambda v, q, a: {"video": v, "qa": [{"question": q, "answer": a}]})),
    "llava.json": json.dumps(
        asked_rows(lambda v, q, a: {"id": 7, "video": v, "conversations": turns(f"<video>\n{q}", a)})
    ),
    "qwen marks.jsonl": lines(
        *asked_rows(
            lambda v, q, a: {
                "videos": [v],
                "messages": chat(f"<|vision_start|><|video_pad|><|vision_end|>{q}", a),
            }
        )
    ),
    "parts.jsonl": lines(
        *asked_rows(lambda v, q, a: {"messages": chat(parts(v, q), [{"type": "text", "text": a}])})
    ),
    "videos beside.jsonl": lines(
        *asked_rows(
            lambda v, q, a: {
                "videos": [v],
                "messages": [{"role": "system", "content": "Be brief."}, *chat(f"<video>{q}", a)],
            }
        )
    ),
    "trl messages.jsonl": lines(
        *asked_rows(lambda v, q, a: {"video": v, "prompt": chat(q, a)[:1], "completion": chat(q, a)[1:]})
    ),
    "trl strings.jsonl": lines(*asked_rows(lambda v, q, a: {"video": v, "prompt": q, "completion": a})),
}
CAPTIONS = {
    "columns.tsv": "path\ttext\n" + "".join(f"{v}\t{c[0]}\n" for v, c in CAPTIONED),
    "media.jsonl": lines(*captioned_rows(lambda v, c: {"media_path": f"./{v}", "prompt": c})),
    "openvid.csv": "video,caption,aesthetic score,frame,fps\n" + "".join(f"{v},{c[0]},5.5,25,25\n" for v, c in CAPTIONED),
    "miradata.csv": "clip_id,file_path,dense_caption,short_caption\n" + "".join(f"1,{v},{c[0]},no\n" for v, c in CAPTIONED),
    "webvid.csv": "videoid,contentUrl,duration,page_dir,name\n" + "".join(f"{Path(v).stem},http://x/{v},PT1S,p,{c[0]}\n" for v, c in CAPTIONED),
    "panda.csv": "videoID,url,timestamp,caption\n" + "".join(f"{Path(v).stem},https://youtu.be/x,\"[['0:00:00.000', '0:00:00.400']]\",\"{c}\"\n" for v, c in CAPTIONED),
    "cells.csv": "video,captions\n" + "".join(f'{v},"{c}"\n' for v, c in CAPTIONED),
    "ids.jsonl": lines(*captioned_rows(lambda v, c: {"video_id": Path(v).stem, "caption": c})),
    "jsfusion.csv": "key,vid_key,video_id,sentence\n" + "".join(f"ret0,msr0,{Path(v).stem},{c[0]}\n" for v, c in CAPTIONED),
    "videofolder/metadata.jsonl": lines(*captioned_rows(lambda v, c: {"file_name": f"../{v}", "text": c})),
    "msr_vtt.json": json.dumps({"info": {}, "videos": [{"video_id": Path(v).stem, "split": "train"} for v, _ in CAPTIONED], "sentences": captioned_rows(lambda v, c: {"sen_id": 1, "video_id": Path(v).stem, "caption": c})}),
    "annotation/MSR_VTT.json": json.dumps({"images": [{"id": Path(v).stem} for v, _ in CAPTIONED], "annotations": captioned_rows(lambda v, c: {"id": 1, "image_id": Path(v).stem, "caption": c})}),
    "activitynet.json": json.dumps({Path(v).stem: {"duration": 1, "timestamps": [[0, 0.5]], "sentences": c} for v, c in CAPTIONED}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(folder, name):
    (folder / name).write_text(QUESTIONS[name], encoding="utf-8")
    assert read(folder / name, "answer") == (ASKED, [])


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(CAPTIONS[name])
    below = (
        {"videos": folder} if name in ("webvid.csv", "panda.csv") else {}
    )  # where their URLs were loaded to
    assert read(folder / name, "caption", folder, **below) == (CAPTIONED, [])
    if name != "media.jsonl":  # a prompt is a question there
        answers, _ = read(folder / name, "answer", folder, **below)
        assert answers == [[video, common.DEFAULT_QUESTION, *captions] for video, captions in CAPTIONED]
    if "/" in name:
        assert read(folder / Path(name).parent, "caption", folder)[0] == CAPTIONED, "as a folder"


def test_captions_may_be_marked_as_train_9k_does(folder):
    (folder / "MSRVTT_data.json").write_text(CAPTIONS["msr_vtt.json"])
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\na\n")
    assert read(folder / "MSRVTT_train.9k.csv", "caption") == (CAPTIONED[:1], [])


def test_a_folder_of_videos_beside_their_texts(folder):
    (folder / "a.json").write_text('\ufeff{"caption": "a cat sits", "video": "elsewhere.mp4"}')
    (folder / "sub" / "b.TXT").write_text("a dog\n  runs\n")
    (folder / "._a.mp4").write_text("of a Mac")
    shutil.copy(folder / "a.mp4", folder / "silent.mp4")
    found, bad = read(folder, "caption")
    assert found == CAPTIONED and [b["reason"] for b in bad] == ["no x.json or x.txt beside it"]
    shutil.rmtree(folder / "sub")
    (folder / "sub").symlink_to(folder)  # a loop
    assert len(read(folder, "caption")[0]) == 1


def test_two_lists(folder):
    (folder / "videos.txt").write_text("a.mp4\nsub/b.mp4\nc.mp4\n")
    (folder / "prompts.txt").write_text("a cat sits\na dog runs\n")
    for source in (folder, folder / "prompts.txt"):
        found, bad = read(source, "caption", folder)
        assert found == CAPTIONED and bad[0]["where"].endswith("videos.txt:3")


def test_splits_of_a_videofolder(folder):
    for split, video in (("train", "a.mp4"), ("validation", "sub/b.mp4")):
        (folder / split).mkdir()
        shutil.copy(folder / video, folder / split / "x.mp4")
        (folder / split / "metadata.csv").write_text(f"file_name,text\nx.mp4,{split}\n")
    rows, bad = read_data(settings(folder), "caption")
    assert [(Path(row.video).parent.name, row.texts, row.split) for row in rows] == [
        ("train", ["train"], "train"), ("validation", ["validation"], "held_out"),
    ]  # fmt: skip


def test_a_folder_says_what_it_looked_for(tmp_path, capsys, folder):
    for what in (folder, tmp_path / "none.jsonl", tmp_path / "notes.md"):
        (tmp_path / "notes.md").write_text("x")
        with pytest.raises(SystemExit):
            read_data(settings(what), "caption")
    said = capsys.readouterr().err
    assert "metadata.csv" in said and "2 of them videos" in said and "empty" not in said
    assert "--manifest" in said and "no such file or folder" in said and ".parquet" in said


# --- what cells hold


def test_cells(folder):
    rows = [
        {"question": "How many?", "answer": 1}, {"question": "And?", "answer": 0},
        {"question": "Water?", "answer": True}, {"question": "Night?", "answer": False},
        {"question": "Share?", "answer": 0.5}, {"question": "<image>Where <video> is it?", "answer": " x "},
        {"question": "<video>", "answer": "empty but for its mark"},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text(lines(*({"video": "a.mp4"} | row for row in rows)))
    found, bad = read(folder / "rows.jsonl", "answer")
    assert [answer for *_, answer in found] == [
        "1",
        "0",
        "yes",
        "no",
        "0.5",
        "x",
        rows[-1]["answer"],
    ] and not bad
    assert found[5][1] == "Where  is it?" and found[6][1] == common.DEFAULT_QUESTION


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"options": ["red", "blue"], "answer": "B"}, "blue"),
        ({"options": ["A. red", "B. blue"], "answer": "(A)"}, "red"),
        ({"candidates": ["red", "blue"], "answer": "blue"}, "blue"),
        ({"choices": "['red', 'blue']", "correct_choice": 1}, "blue"),
        ({"a0": "red", "a1": "blue", "a2": "1", "answer": 1}, "blue"),
        ({"option 0": "red", "option 1": "blue", "answer": "0"}, "red"),
        ({"A": "red", "B": "blue", "answer": "B"}, "blue"),
        ({"options": {"A": "red", "B": "blue"}, "answer": "A"}, "red"),
        ({"options": ["3", "2", "1"], "answer": "1"}, BadSample),  # the second, or the one that is called so?
        ({"options": ["red", "blue"], "answer": "green"}, BadSample),
        ({"options": ["red", "blue"], "answer": 2}, BadSample),
    ],
)
def test_multiple_choice(row, answer):
    row = {"video": "a.mp4", "question": "Which?"} | row
    if answer is BadSample:
        with pytest.raises(BadSample, match="options"):
            common.pairs_of(row, "", {})
    else:
        (qa,) = common.pairs_of(row, "", {})
        assert qa.answer == answer and qa.question.startswith("Which?\nA. red\nB. blue")
        assert not qa.follows


SAID = ["What is it?", "a cat", "And then?", "it sleeps", "Why?", "it is late"]
CONVERSATIONS = {
    "messages": {"messages": chat(*SAID[:2]) + chat(*SAID[2:4]) + chat(*SAID[4:])},
    "conversations": {"conversations": turns(*SAID[:2]) + turns(*SAID[2:4]) + turns(*SAID[4:])},
    "with a system turn": {
        "messages": [{"role": "system", "content": "Be brief."}]
        + [turn for i in (0, 2, 4) for turn in chat(*SAID[i : i + 2])]
    },
    "prompt and completion": {
        "prompt": [*chat(*SAID[:2]), *chat(*SAID[2:4]), chat(*SAID[4:])[0]],
        "completion": chat(*SAID[4:])[1:],
    },
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_turns_of_a_conversation_follow_each_other_and_rows_do_not(folder, form):
    """Whoever asks them may show what was said before, of this conversation and of no other"""
    alone = {"question": "Alone?", "answer": "yes"}
    several = {"qa": [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": "2"}]}
    rows = [alone, CONVERSATIONS[form], several, CONVERSATIONS[form]]
    (folder / "rows.jsonl").write_text(lines(*({"video": "a.mp4"} | row for row in rows)))
    (row,), bad = read_data(settings(folder / "rows.jsonl"), "answer")
    turn = [False, True, True]
    assert not bad and [qa.follows for qa in row.texts] == [False, *turn, False, False, *turn]
    found = [[qa[:2] for qa in talk] for talk in llava.talks_of(row.texts)]
    whole = list(zip(SAID[::2], SAID[1::2]))
    assert found == [[("Alone?", "yes")], whole, [("One?", "1")], [("Two?", "2")], whole]


def test_turns_are_left_out_by_name_and_never_in_silence(folder, caplog):
    ask = {"role": "user", "content": "What?"}
    rows = [
        [{"role": "system", "content": "Be brief."}, ask, {"role": "assistant", "content": "x"}],
        [ask], [ask, ask], [ask, {"role": "tool", "content": "x"}], ["What?"],
        [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}],
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text(lines(*({"video": "a.mp4", "messages": row} for row in rows)))
    found, bad = read(folder / "rows.jsonl", "answer")
    assert len(found) == 1 and [b["where"][-2:] for b in bad] == [":2", ":3", ":4", ":5", ":6"]
    assert "1 rows have a system turn" in caplog.text


def test_columns_and_names_that_were_looked_for_are_named(folder):
    rows = (
        {"clip": "a.mp4", "words": "x"},
        {"video": "z.mp4", "caption": "x"},
        {"video": "a.mp4", "caption": "x"},
    )
    (folder / "rows.jsonl").write_text(lines(*rows))
    _, (first, second) = read(folder / "rows.jsonl", "caption")
    assert first["where"].endswith("rows.jsonl:1") and "there: clip, words" in first["reason"]
    assert "dense_caption" in first["reason"]
    assert "z.mp4: no such file" in second["reason"] and str(folder) in second["reason"]


def test_bad_lines_are_counted_against_lines(folder, capsys):
    """Of one video a hundred rows are one clip, but still a hundred rows."""
    rows = [{"video": "a.mp4", "caption": f"{i}"} for i in range(97)] + [{"video": "a.mp4"}] * 3
    (folder / "rows.jsonl").write_text(lines(*rows))
    (row,), bad = read_data(settings(folder / "rows.jsonl", max_bad=0.05), "caption")
    assert len(row.texts) == 97 and len(bad) == 3
    with pytest.raises(SystemExit):
        read_data(settings(folder / "rows.jsonl", max_bad=0.02), "caption")
    said = capsys.readouterr().err
    assert "3 of 100 samples are bad, more than --max_bad 0.02" in said and "rows.jsonl:98" in said
    (folder / "empty.csv").write_text("")
    with pytest.raises(SystemExit):
        read_data(settings(folder / "empty.csv"), "caption")
    assert "is empty" in capsys.readouterr().err


# --- lines that are none

BAD = {
    "rows.jsonl": [
        (b'{"video": "a.mp4", "caption": "fine"}', ""), (b'{"video": "a.mp4", "caption": ', "not JSON"),
        (b'{"video": "a.mp4", "caption": NaN}', "no caption"), (b"[1, 2]", "JSON object"),
        (b'{"video": "a.mp4", "caption": "half \\ud83d"}', "half of a character"),
        (b'{"video": "a.mp4", "caption": ' + b"[" * 3000 + b"]" * 3000 + b"}", ""),
        ('{"video": "a.mp4", "caption": "caf\u00e9"}'.encode("latin-1"), "not UTF-8"),
        (b'{"video": ["a.mp4", "b.mp4"], "caption": "x"}', "2 videos"),
        (b'{"video": "a.mp4", "caption": "x", "start": "soon"}', "seconds are wanted"),
        (b'{"video": "a.mp4", "caption": "x", "start": 3, "end": 2}', "not before"),
    ],
    "rows.csv": [
        (b"video,caption", None), (b"a.mp4,fine", ""), (b'a.mp4,"a quote', "quote"), (b"a.mp4,x,y", "3 cells"),
        (b'a.mp4,"it ""ends"""', ""), (b"a.mp4,caf\xe9", "not UTF-8"), (b"a.mp4,\"['a' 'b']\"", "without commas"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_spoils_no_other_one(folder, name):
    (folder / name).write_bytes(b"\n".join(line for line, _ in BAD[name]) + b"\n")
    _, bad = read(folder / name, "caption")
    reasons = {int(b["where"].rpartition(":")[2]): b["reason"] for b in bad}
    for number, (line, reason) in enumerate(BAD[name], 1):
        if reason:
            assert reason in reasons[number], line
        elif b"[[[" in line:
            assert number in reasons and "\n" not in reasons[number]
        else:
            assert number not in reasons, line
    assert all(len(reason) < 300 for reason in reasons.values())


def test_no_row_ends_a_run_whatever_is_in_it(folder, monkeypatch):
    monkeypatch.setattr(common, "leave_out", lambda *_: None)
    rng = random.Random(0)
    names = [*common.MEANING, "A", "B", "a0", "a1", "contentUrl", "name", "x"]
    words = [
        None,
        "",
        0,
        2.5,
        True,
        "a.mp4",
        "['x', 'y']",
        "[1, 2",
        "https://x/y.mp4",
        "0:01",
        float("nan"),
        "user",
    ]
    keys = ["role", "from", "content", "value", "type", "text", "video", "url", "assistant", *names]

    def value(depth):
        kind = rng.randrange(5) if depth < 3 else 0
        if kind < 3:
            return rng.choice([*words, "assistant", "text", "video", "video_url", "system"])
        values = [value(depth + 1) for _ in range(rng.randrange(4))]
        return values if kind == 3 else {rng.choice(keys): v for v in values}

    for _ in range(4000):
        record = {rng.choice(names): value(0) for _ in range(rng.randrange(1, 7))}
        common.rows_in(record)
        for wants in ("caption", "answer"):
            rows, bad = read_data(settings(folder / "none"), wants, records=iter([("x", 1, dict(record))]))
            assert rows or bad[0]["reason"]


def test_a_cell_may_have_several_lines(folder):
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "caption"], ["a.mp4", "two\nlines"], ["nope.mp4", "x"]])
    found, bad = read(folder / "rows.csv", "caption")
    assert found == [["a.mp4", ["two\nlines"]]] and bad[0]["where"].endswith("rows.csv:4")


def test_utf_16(folder):
    (folder / "rows.csv").write_text("video,caption\na.mp4,ein Café\n", encoding="utf-16")
    assert read(folder / "rows.csv", "caption") == ([["a.mp4", ["ein Café"]]], [])


# --- files


def test_rows_of_one_file_are_one_row(folder):
    (folder / "link.mp4").symlink_to("sub/b.mp4")
    (folder / "there").symlink_to("sub")
    names = [
        "sub/b.mp4",
        "./sub/b.mp4",
        str(folder / "sub" / "b.mp4"),
        "link.mp4",
        "there/b.mp4",
        "sub/../link.mp4",
    ]
    (folder / "rows.jsonl").write_text(lines(*({"video": name, "caption": name} for name in names)))
    (row,), bad = read_data(settings(folder / "rows.jsonl"), "caption")
    assert row.texts == names and not bad


def test_videos_lie_elsewhere(folder, tmp_path_factory):
    table = tmp_path_factory.mktemp("tables") / "rows.csv"
    table.write_text("video,caption\nb.mp4,found by its name\nsub/b.mp4,by its path\na,by its id\n")
    found, bad = read(table, "caption", folder, videos=folder)
    assert (
        found == [["sub/b.mp4", ["found by its name", "by its path"]], ["a.mp4", ["by its id"]]] and not bad
    )
    (folder / "other").mkdir()
    shutil.copy(folder / "a.mp4", folder / "other" / "b.mp4")
    _, (bad,) = read(table, "caption", folder, videos=folder)
    assert "2 videos have this name" in bad["reason"]


def test_a_file_comes_before_a_url(folder):
    rows = [
        {"url": "https://x/1.mp4?token=s3cret", "video_id": name, "caption": name} for name in ("a", "zz")
    ]
    (folder / "rows.jsonl").write_text(lines(*rows))
    rows, bad = read_data(settings(folder / "rows.jsonl"), "caption")
    assert [row.video for row in rows] == [str(folder / "a.mp4"), "https://x/1.mp4?token=s3cret"] and not bad
    assert "s3cret" not in str(rows[1].left_out("no such host"))


def test_parts_of_a_video(folder):
    times = [{"start": 0, "end": 0.4}, {"start_time": "0:00:00.400", "end_time": 0.8}, {}]
    (folder / "rows.jsonl").write_text(
        lines(*({"video": "a.mp4", "caption": f"{i}"} | t for i, t in enumerate(times)))
    )
    cfg = settings(folder / "rows.jsonl", cache_dir=folder / "cache", num_workers=2, streaming=False)
    rows, bad = read_data(cfg, "caption")
    assert [(row.start, row.end) for row in rows] == [(0, 0.4), (0.4, 0.8), (0, np.inf)] and not bad
    _, files, bad = common.decode_rows(rows, 4, 32, cfg)
    clips = [np.load(file) for file in files]
    assert not bad and not (clips[0] == clips[1]).all() and len(set(files)) == 3
    every, _ = common.timed_frames(folder / "a.mp4", 25, (32, 32))
    assert (clips[1] == every[[10, 13, 16, 19]]).all(), "frames 10 to 19 of 25 a second"
    for path, shown in zip(files, ([0, 0.12, 0.24, 0.36], [0, 0.12, 0.24, 0.36], [0, 0.32, 0.64, 0.96])):
        with path.open("rb") as file:  # two arrays: the frames, and when each is shown, after the first
            assert np.load(file).shape == (4, 32, 32, 3) and np.load(file) == pytest.approx(shown, abs=1e-3)
            assert not file.read()


def test_many_rows_of_one_video_take_no_longer_each(folder):
    def seconds(count):
        (folder / "rows.jsonl").write_text(
            lines(*({"video": "a.mp4", "caption": f"{i}"} for i in range(count)))
        )
        start = os.times().user
        (row,), _ = read_data(settings(folder / "rows.jsonl"), "caption")
        assert len(row.texts) == count
        return os.times().user - start

    assert seconds(40_000) < 25 * seconds(4_000) + 1  # 100 times as long when it was quadratic


def test_parts_of_a_url_are_streamed_side_by_side(folder, hub, monkeypatch):
    hub.static["a.mp4"] = Static((folder / "a.mp4").read_bytes())
    monkeypatch.setenv("SAMPLES_URL", hub.url)
    monkeypatch.setenv("no_proxy", "*")
    rows = [{"url": f"{hub.url}/files/a.mp4", "caption": f"{i}", "start": i / 10} for i in range(8)]
    (folder / "rows.jsonl").write_text(lines(*rows))
    cfg = settings(folder / "rows.jsonl", cache_dir=folder / "cache", num_workers=8, streaming=True)
    rows, _ = read_data(cfg, "caption")
    _, files, bad = common.decode_rows(rows, 3, 16, cfg)
    assert len(set(files)) == 8 and not bad and not list((folder / "cache" / "downloads").iterdir())


# --- parquet and what lies in it


def test_videos_inside_of_parquet_are_fetched_one_by_one(folder, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    video = {"bytes": (folder / "a.mp4").read_bytes(), "path": "a.mp4"}
    table = arrow.Table.from_pylist([{"video": video, "caption": f"{i}", "n": 7} for i in range(5)])
    pyarrow.parquet.write_table(table, folder / "rows.Parquet", row_group_size=2)
    cfg = settings(folder / "rows.Parquet", cache_dir=folder / "cache", num_workers=2, streaming=True)
    rows, bad = read_data(cfg, "caption", {"n": ""})
    assert (
        [row.texts for row in rows] == [["0"], ["1"], ["2"], ["3"], ["4"]]
        and rows[4].cells == (7,)
        and not bad
    )
    assert rows[4].where.endswith("rows.Parquet, row 5")
    _, files, bad = common.decode_rows(rows, 3, 32, cfg)
    assert len(set(files)) == 5 and not bad and not list((folder / "cache" / "downloads").iterdir()), (
        "streamed"
    )
    monkeypatch.setattr(common, "timed_frames", None)
    assert common.decode_rows(rows, 3, 32, cfg)[1] == files, "what is there is not decoded again"


FROM_THE_HUB = """
from pathlib import Path
from types import SimpleNamespace
import sys
import common
cfg = SimpleNamespace(manifest=None, dataset=sys.argv[1], videos=None, question="", cache_dir=Path("cache"),
                      max_bad=1, streaming=True, num_workers=2, demo=False)
rows, bad = common.read_data(cfg, "caption")
_, files, undecoded = common.decode_rows(rows, 3, 16, cfg)
print([(row.texts[0], row.split) for row in rows], len(set(filter(None, files))), [b["reason"] for b in bad + undecoded])
print(rows[0].where, sorted(path.name for path in Path("cache/downloads").rglob("*.mp4")))
"""


def test_a_data_set_of_the_hub_is_read_as_it_lies_there(folder, hub, tmp_path_factory):
    """A parquet with the videos in it, and a folder with a table beside them; no copy of either stays."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    home, video = tmp_path_factory.mktemp("home"), (folder / "a.mp4").read_bytes()
    files = {"README.md": b"---\nconfigs:\n- config_name: big\n  data_files:\n  - split: train\n    path: data/train*\n"
             b"  - split: test\n    path: data/test*\n---\n"}  # fmt: skip
    for split in ("train", "test"):
        rows = [{"video": {"bytes": video, "path": None}, "text": f"{split} {i}"} for i in range(2)]
        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), folder / "t.parquet", row_group_size=1)
        files[f"data/{split}.parquet"] = (folder / "t.parquet").read_bytes()
    hub.add_repo("tester/inside", private=False, files=files, kind="datasets")
    table = b"file_name,text\nx.mp4,beside\nnone.mp4,missing\n"
    files = {"train/metadata.csv": table, "train/x.mp4": video}
    hub.add_repo("tester/beside", private=False, files=files, kind="datasets")

    def told(source):
        variables = {**os.environ, **hub.environment(), "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FROM_THE_HUB, source]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, where = told("tester/inside:big")
    assert (
        first
        == "[('train 0', 'train'), ('train 1', 'train'), ('test 0', 'held_out'), ('test 1', 'held_out')] 4 []"
    )
    assert where.startswith("hf://datasets/tester/inside@") and where.endswith("train.parquet, row 1 []")
    assert told("tester/inside:big:test")[0] == "[('test 0', ''), ('test 1', '')] 2 []"
    first, where = told("tester/beside")
    assert first.startswith("[('beside', ''), ('missing', '')] 1 ['") and where.endswith("metadata.csv:2 []")


# --- each script


def all_of(script, source, cache):
    """What the script makes of it: [video, question, answer] or [video, [captions]]"""
    flags = {"manifest": source, "report_to": "none", "cache_dir": cache, "max_bad": 0.99}
    if script is llava:
        special = ["<image>", "<|im_start|>", "<|im_end|>"]  # of LLaVA-interleave's tokenizer
        rows, bad = llava.read_clips(llava.Config(**flags), special)
        return [[Path(row.video).name, qa.question, qa.answer] for row in rows for qa in row.texts], bad
    if script is nllb:
        examples, _, bad = nllb.read_examples(nllb.Config(**flags))
        return [[Path(e.video).name, e.row["question"], e.target] for e in examples], bad
    if script is ddpm:
        rows, bad = read_data(ddpm.Config(**flags), "caption")
        return [[Path(row.video).name, row.texts] for row in rows], bad
    data = rflow.load_data(rflow.Config(**flags))
    return [[Path(row.video).name, row.texts] for row in data.rows], data.bad


def cases():
    if CASES.is_dir():
        for name, case in json.loads((CASES / "expected.json").read_text()).items():
            for script in (llava, nllb, ddpm, rflow):
                is_vtt = script in (llava, nllb)
                for_it = "all" in case["for"] or ("vtt" if is_vtt else "t2v") in case["for"]
                if for_it or (script is nllb and case["for"] == "nllb"):
                    yield pytest.param(name, case, script, id=f"{name}-{script.__name__}")


@pytest.mark.parametrize("name, case, script", list(cases()))
def test_cases(name, case, script, tmp_path):
    source = tmp_path / Path(name).parent
    shutil.copytree((CASES / name).parent, source, dirs_exist_ok=True, ignore=lambda folder, names: [
        n for n in names if Path(name).parent == Path() and n != name])  # fmt: skip
    os.chmod(source, 0o755)
    for path in REAL if case["clips"] == "beside" and "nested" not in name else ():
        sides = [s for s in source.glob("*.txt") if s.stem == path.name.replace(".", "_")]
        shutil.copy(path, sides[0].with_suffix(path.suffix) if sides else source / path.name)
    if "nested" in name:
        shutil.copy(REAL[0], source / "one.mp4")
    as_folder = any(kind in name for kind in ("sidecar", "two_lists", "nested"))
    source = tmp_path / name.split("/")[0] if as_folder else tmp_path / name
    expected = case["expect"]
    try:
        found, bad = all_of(script, source, tmp_path / "cache")
    except SystemExit as end:  # none of the rows is usable
        assert (
            end.code == 2
            and expected is None
            and name in ("surrogate.jsonl", "deep.jsonl", "unbalanced_quote.csv")
        )
        return
    if expected and len(expected[0]) == 2 and script in (llava, nllb):  # captions answer what happens
        expected = [[video, common.DEFAULT_QUESTION, text] for video, texts in expected for text in texts]
    if expected:
        assert sorted(found) == sorted(expected) and not bad
    elif "int_id" in name:
        examples, _, _ = nllb.read_examples(nllb.Config(manifest=source, report_to="none"))
        train, held_out = common.split_clips([e.video for e in examples], [""] * 8, 0.5, 0)
        assert {examples[i].video for i in train}.isdisjoint(examples[i].video for i in held_out) and held_out
    elif "unbalanced" in name:
        assert bad[0]["where"].endswith("unbalanced_quote.csv:2") and len(found) == (
            2 if script is nllb else 0
        )
    elif "surrogate" in name or "deep" in name:
        assert len(bad) == 1 and bad[0]["where"].endswith(f"{name}:1") and not found
    elif "segments" in name:
        assert len(found) == 3 and not bad
    else:
        assert found and not bad


@pytest.mark.parametrize("script", [llava, ddpm, rflow, nllb])
def test_rows_as_the_model_sees_them_are_in_the_plan(script):
    shown = common.row_lines(list("abcdefghi"), lambda row: f"{row}\n" * 200)
    assert [label for label, _ in shown] == ["rows", "", ""] and all(len(text) < 250 for _, text in shown)
    assert "row_lines(" in Path(script.__file__).read_text()


def test_of_several_captions_those_without_a_word_are_left_out():
    row = {"captions": ["a dog", "", None, float("nan"), "nan", "it runs"]}
    assert common.captions_of(row) == ["a dog", "it runs"]
    for nothing in ("nan", float("nan"), ["", None], []):
        with pytest.raises(common.BadSample, match="no caption"):
            common.captions_of({"caption": nothing})


def test_pictures_are_found_where_there_are_no_videos(tmp_path):
    for name in ("a.jpg", "below/b.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {name}")
    rows, _ = read_data(ddpm.Config(manifest=tmp_path), "caption")
    assert [Path(row.video).name for row in rows] == ["a.jpg", "b.PNG"]
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "a.jpg", "text": "one"}\n{"image_path": "b.PNG", "text": "two"}\n'
    )
    cfg = ddpm.Config(manifest=tmp_path / "rows.jsonl", videos=tmp_path)
    rows, _ = read_data(cfg, "caption")
    assert [row.texts for row in rows] == [["one"], ["two"]]
    (tmp_path / "a.mp4").write_bytes(b"x")  # a.jpg is its cover then
    rows, _ = read_data(ddpm.Config(manifest=tmp_path, max_bad=0.9), "video")
    assert [Path(row.video).name for row in rows] == ["a.mp4"]
