"""llava_vtt.py: what the loss sees against transformers' own numbers, and runs as its user starts them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import clips
import llava
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    children,
    command,
    environment,
    finish,
    hub_variables,
    losses,
    read,
    run,
    start,
    unbroken_runs,
    wait_for,
    weights,
)
from hub import Static
from safetensors.torch import load_file

import common
import llava_vtt
from common import QA
from demos import scenes
from llava_vtt import Config, Footage, Sample, VideoCollator

SCRIPT = "llava_vtt.py"
ZERO3 = ROOT / "ds_zero3_offload.json"
SHARED = Path(__file__).parents[2] / "shared" / "clips"
# A LoRA run of seconds on a small model; flags after these win.
SMALL = "--frames 3 --steps 6 --accum 1 --lr 1e-2 --log_every 1 --save_every 2 --eval_every 4 --eval_questions 4".split()
SMALL += "--max_new_tokens 3 --val_fraction 0.25".split()
QUESTIONS = (QA("What number?", "one"), QA("Who is there?", "nobody at all"), QA("Where?", "on the left"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A LLaVA of 4 x 4 tokens a frame."""
    return llava.build(tmp_path_factory.mktemp("models") / "small", size=32, patch=8)


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """{"manifest": JSON lines, 8 rows about 4 clips, of two of them a part} and the folder of the clips"""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        clips.write(folder / f"video_{number:03d}.mp4", 20 + number, "mpeg4", options={"b": "1M"})
    parts = [{}, {}, {"start": 0.2, "end": 0.6}, {"start": 0.2}]
    rows = [
        {"video": f"video_{i:03d}.mp4", "question": q, "answer": f"{a} {i}"} | parts[i]
        for i in range(4)
        for q, a, *_ in QUESTIONS[:2]
    ]
    return {"folder": folder, "manifest": llava.write_rows(folder / "clips.jsonl", rows)}


@pytest.fixture(scope="module")
def base(small):
    return llava_vtt.open_base(str(small), 1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, small, videos):
    flags = ["--model", small, "--manifest", videos["manifest"], *SMALL, "--output_dir"]
    return unbroken_runs(tmp_path_factory, SCRIPT, lambda ranks, folder: [*flags, folder])


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder, "adapter/adapter_model.safetensors")


def picture(seed: int, frames: int = 3, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), np.uint8)


def shown(seed: int, frames: int = 3, size: int = 32) -> Footage:
    return Footage(picture(seed, frames, size), np.arange(frames))


def talk(questions) -> tuple[QA, ...]:
    """The questions as turns of one conversation"""
    return tuple(qa._replace(follows=i > 0) for i, qa in enumerate(questions))


# --- What the loss sees


def test_ids_and_answer_mask_are_those_of_the_processor(base):
    collate = VideoCollator(base, Config(frames=3, dtype="fp32", report_to="none"))
    batch = collate([(shown(0), (talk(QUESTIONS),)), (shown(1), (QUESTIONS[:1],))])
    messages = []
    for number, (question, answer, *_) in enumerate(QUESTIONS):
        images = [{"type": "image", "image": frame} for frame in picture(0)] if number == 0 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    peer = base.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    count = len(batch["input_ids"][0])
    assert batch["input_ids"][0].tolist() == peer["input_ids"][0].tolist()[:count]
    rest = base.processor.tokenizer.decode(peer["input_ids"][0][count:])
    assert rest == "\n", "nothing follows the last end that the loss would see"
    torch.testing.assert_close(batch["pixel_values"][:3], peer["pixel_values"], rtol=0, atol=1e-6)
    mask = torch.as_tensor(peer["assistant_masks"])[0].bool()[:count]
    assert (batch["labels"][0] != -100).tolist() == mask.tolist()
    said = base.processor.tokenizer.decode(batch["labels"][0][mask])
    assert said == "one<|im_end|>nobody at all<|im_end|>on the left<|im_end|>"
    alone = collate([(shown(1), (QUESTIONS[:1],))])["input_ids"].shape[1]
    assert batch["attention_mask"].sum(1).tolist() == [count, alone]
    assert (batch["input_ids"] == base.processor.image_token_id).sum() == 2 * 3 * 16


def test_loss_on_supervised_positions_is_the_models_own(base, small):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(small).eval()
    batch = VideoCollator(base, Config(frames=3, dtype="fp32", report_to="none"))(
        [(shown(0), (talk(QUESTIONS),)), (shown(1), (talk(QUESTIONS[1:]),))]
    )
    loss, count = llava_vtt.supervised_loss(model, batch)
    peer = model(**batch).loss
    assert count == (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss / count, peer, rtol=1e-5, atol=0)
    ours, theirs = (
        torch.autograd.grad(x, model.model.multi_modal_projector.linear_1.weight)[0]
        for x in (loss / count, peer)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_answers_of_a_batch_are_those_asked_one_by_one(base, small):
    cfg = Config(frames=3, dtype="fp32", report_to="none")
    model, collate = llava_vtt.load_vlm(small, base, cfg).eval(), VideoCollator(base, cfg)
    items = [(shown(i), qa.question) for i, qa in enumerate(QUESTIONS)]
    assert llava_vtt.greedy_answers(model, collate, items, 8) == [
        llava_vtt.greedy_answers(model, collate, [item], 8)[0] for item in items
    ]


@pytest.mark.parametrize("how", ["missing", "of another shape"])
def test_weights_that_are_missing_or_do_not_fit_are_an_error_and_never_random(
    small, base, tmp_path, how, capsys
):
    from safetensors.torch import save_file

    shutil.copytree(small, tmp_path / "model")
    weights = load_file(small / "model.safetensors")
    first = weights.pop("multi_modal_projector.linear_1.weight")
    if how != "missing":
        weights["multi_modal_projector.linear_1.weight"] = first[:-1].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        llava_vtt.load_vlm(tmp_path / "model", base, Config(report_to="none", dtype="fp32"))
    assert stop.value.code == 2
    assert re.search("1 weights are missing or do not fit.*linear_1.weight", capsys.readouterr().err)


# --- Samples


@pytest.mark.parametrize("seed", range(40))
def test_the_questions_of_a_scene_tell_the_truth(seed):
    scene = scenes.draw_scene((7, seed))
    answers = {question: answer for question, answer, _ in scenes.questions_of(scene)}
    way, moves, number = (
        answers[q]
        for q in ("Which way does the shape move?", "Does a shape move?", "How many shapes are there?")
    )
    colour = next((answer for question, answer in answers.items() if "colour" in question), None)
    clip = scene.draw(5, 64).astype(int)
    assert len({tuple(frame.ravel()) for frame in clip}) == 5, "noise differs"
    rgb = np.array(scenes.COLOURS[scene.colour]) * 255
    seen = [np.argwhere((abs(frame - rgb) < 60).all(-1)) for frame in clip]
    (y0, x0), (y1, x1) = seen[0].mean(0), seen[-1].mean(0)
    if scene.other is None:  # else the moving one may cover the other, and both centres are seen
        moved = "it stays" if abs(x1 - x0) + abs(y1 - y0) < 4 else None
        moved = moved or (
            ("right" if x1 > x0 else "left") if abs(x1 - x0) > abs(y1 - y0) else ("down" if y1 > y0 else "up")
        )
        assert way == moved and number == "one" and colour == scene.colour
    assert moves == ("yes" if scene.move else "no") and number == ("two" if scene.other else "one")
    assert (colour is not None) == (bool(scene.move) or scene.other is None), (
        "which of two that stay is not asked"
    )


def test_frames_shuffled_reversed_blanked():
    clip = picture(0, 5)
    shuffled = llava_vtt.rearrange_frames(clip, "shuffled", 3)
    assert not np.array_equal(shuffled, clip) and sorted(map(np.sum, shuffled)) == sorted(map(np.sum, clip))
    assert np.array_equal(shuffled, llava_vtt.rearrange_frames(clip, "shuffled", 3)), (
        "the same in every evaluation"
    )
    assert np.array_equal(llava_vtt.rearrange_frames(clip, "reversed", 0), clip[::-1])
    assert not llava_vtt.rearrange_frames(clip, "blanked", 0).any()
    assert np.array_equal(llava_vtt.rearrange_frames(clip[:1], "shuffled", 0), clip[:1])


def test_augmentation_is_the_same_for_all_frames():
    still = picture(0, 1).repeat(4, 0)
    changed = llava_vtt.augmented(still, np.random.default_rng(0), flip=True)
    assert changed.shape == still.shape and changed.dtype == np.uint8 and not np.array_equal(changed, still)
    assert all(np.array_equal(frame, changed[0]) for frame in changed)
    left = np.zeros((2, 32, 32, 3), np.uint8)
    left[:, :, :16] = 255
    sides = [llava_vtt.augmented(left, np.random.default_rng(i), flip)[0, :, :8].mean() > 127 for flip in (False, True)
             for i in range(20)]  # fmt: skip
    assert all(sides[:20]) and 3 < sum(sides[20:]) < 17


def test_curriculum_goes_by_words_of_the_answers():
    answers = [" ".join(["word"] * count) for count in (3, 9, 10, 19, 20)]
    samples = [
        Sample(Path("a"), tuple((QA("?", answer),) for answer in answers)),
        Sample(Path("b"), ((QA("?", answers[4]),),)),
        Sample(Path("c"), (talk([QA("?", answers[0]), QA("?", answers[4])]),)),
    ]
    stages = llava_vtt.stages_of(samples, True)
    assert [[len(sample.qa) for sample in stage] for stage in stages] == [[2], [4], [5, 1, 2]], (
        "each with those before"
    )
    assert llava_vtt.stages_of(samples, False) == [samples]
    assert len(llava_vtt.stages_of(samples[1:], True)) == 1, "stages without samples are left out"


def test_an_epoch_has_each_sample_once_over_all_ranks(monkeypatch):
    samples = [Sample(Path(str(i)), ((QA(str(i), "a"),),)) for i in range(12)]
    monkeypatch.setattr(Sample, "load", lambda self, frames: shown(0))
    cfg = Config(steps=6, batch_size=2, accum=1, frames=3, report_to="none", dtype="fp32")
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        for micro_step in range(6):
            seen.append(
                llava_vtt.get_batch([samples], lambda batch: [talks for _, talks in batch], cfg, micro_step)
            )
    first = [talks[0][0].question for batch in (*seen[:3], *seen[6:9]) for talks in batch]
    assert sorted(first) == sorted(str(i) for i in range(12))


# --- Data


def test_split_is_by_video():
    videos, none = [str(i // 2) for i in range(40)], [""] * 40  # two rows each
    train, held_out = common.split_clips(videos, none, 0.1, seed=0)
    assert len(held_out) == 4 and sorted(train + held_out) == list(range(40))
    assert not {videos[i] for i in train} & {videos[i] for i in held_out}
    assert (
        common.split_clips(videos, none, 0.1, 0)
        == (train, held_out)
        != common.split_clips(videos, none, 0.1, 1)
    )
    assert (
        common.split_clips(videos[:2], none, 0.1, 0) == ([0, 1], [])
        and common.split_clips(["a", "b"], ["", ""], 0.01, 0)[1]
    )
    own = ["held_out" if i in (6, 7, 8) else "train" for i in range(40)]
    assert common.split_clips(videos, own, 0.5, 0)[1] == [6, 7], "a video in both parts is trained on"


@pytest.mark.parametrize(
    "bad", [{"answer": "a <image>"}, {"answer": "a<|im_end|>"}, {"question": "<|im_start|>?"}]
)
def test_a_special_token_inside_the_text_makes_a_bad_sample(videos, tmp_path, bad):
    good = {"video": str(videos["folder"] / "video_000.mp4"), "question": "a?", "answer": "a"}
    manifest = llava.write_rows(tmp_path / "rows.jsonl", [good, good | bad])
    cfg = Config(manifest=manifest, max_bad=0.5, report_to="none")
    (clip,), left_out = llava_vtt.read_clips(cfg, ["<image>", "<|im_start|>", "<|im_end|>"])
    assert clip.texts == [QA("a?", "a")], "what else is asked of that clip stays"
    assert "special token" in left_out[0]["reason"] and left_out[0]["where"].endswith("rows.jsonl:2")


# --- The plan


def test_memory_plan_of_the_real_size():
    base = llava_vtt.Base("real", Path(), llava.real_size_config(), None, None, False, 384, False, [], True)
    longest = llava_vtt.Longest(tokens=3668, supervised=20, visual=5 * 729, patches=5 * 729)
    full, cfg = (Config(lora_r=lora_r, dtype="bf16", report_to="none") for lora_r in (0, 16))
    sizes = llava_vtt.sizes_of(base, full, longest, False)
    assert sizes.parameters == 8_141_100_576
    assert sizes.parameters - sizes.trained == pytest.approx(0.398e9, rel=0.08)
    bare = dataclasses.replace(sizes, kept={False: 0})
    per_gpu = {n: llava_vtt.vlm_layouts(bare, "bf16", False, n)[0].gpu_gb for n in (2, 4)}
    # facts/vtt.md, section 0
    assert per_gpu[4] == pytest.approx(45, abs=2) and per_gpu[2] == pytest.approx(73, abs=3)
    lora = llava_vtt.sizes_of(base, cfg, longest, False)
    assert lora.trained == 39_976_960 + 21_504_000  # r (in + out) over 7 x 32 layers, and the projector
    assert 15e9 < lora.kept[False] < 40e9 and lora.kept[True] < 0.15 * lora.kept[False]
    table = llava_vtt.machines_that_fit(base, cfg, longest)
    chosen = {tuple(re.split(r"\s{2,}", line.strip())[:3]) for line in table.splitlines()[1:]}
    assert ("1x H100 80 GB", "LoRA", "ZeRO-2") in chosen
    four = llava_vtt.sizes_of(base, cfg, longest, True)
    # facts: 6.476 B in the layers
    assert four.frozen_bytes == pytest.approx(6.476e9 * 4.127 / 8 + (8.141e9 - 6.476e9) * 2, rel=0.01)
    assert {layout.stage for layout in llava_vtt.vlm_layouts(four, "bf16", True, 4)} == {2}
    v100 = [layout for machine, method, layout in chosen if (machine, method) == ("4x V100 16 GB", "LoRA")]
    assert v100[0].startswith("ZeRO-3")


def test_the_row_that_is_too_long_is_named_wherever_it_stands(tmp_path, small, videos):
    """Of hundreds of short ones, each looked at"""
    shutil.copytree(small, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 400
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    rows = [
        {"video": str(videos["folder"] / f"video_{i % 4:03d}.mp4"), "question": f"What {i}?", "answer": "one"}
        for i in range(300)
    ]
    rows[217]["answer"] = "a very long one " * 60
    manifest = llava.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--model", "model", "--manifest", manifest, *SMALL, "--check", "--max_turns", 1]
    output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    assert re.search(r"rows.jsonl:\d+: a sequence of \d{3,} tokens, model takes 400: lower --frames", output)


def test_check_prints_the_plan_and_writes_nothing(tmp_path, small, videos):
    output = run(SCRIPT, "--model", small, "--manifest", videos["manifest"], *SMALL, "--check", cwd=tmp_path)
    assert (
        "3 sequences with 6 questions to train on, 1 with 2 held out" in output
        and "3 of 32x32, as images: 48 tokens at most" in output
    )
    assert (
        re.search(r"loss +on \d+ of \d+ tokens", output)
        and "<- auto takes this" in output
        and "4x V100 16 GB" in output
    )
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


# --- Runs


def test_run_folder_and_output(unbroken, tmp_path, videos):
    folder = unbroken(1)
    output = (folder.parent / "output").read_text()
    assert "eval step 000004 | held-out loss" in output and "needs the video" in output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 7)) and steps[-1]["loss"] < steps[0]["loss"]
    assert all(
        row["grad_norm"] > 0 and row["peak_memory_gb"] > 0 and row["samples_per_s"] > 0 for row in steps
    )
    assert {"exact_in_order", "rouge_l_shuffled", "bleu_blanked", "held_out_loss"} <= next(
        r for r in rows if "loss" not in r
    ).keys()
    cfg = Config(steps=6, warmup_steps=0, lr=1e-2, report_to="none")
    assert [row["lr"] for row in steps] == [common.learning_rate(cfg, step) for step in range(6)]
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 6 and set(results["controls"]) == {
        "frames_shuffled",
        "frames_reversed",
        "frames_blanked",
    }
    assert (folder / "SUCCESS").exists() and len(read(folder / "samples" / "answers.jsonl").splitlines()) == 2
    names = {path.name for path in (folder / "model").iterdir()}
    assert {
        "adapter",
        "model.safetensors",
        "config.json",
        "chat_template.jinja",
        "README.md",
        "llava_vtt.py",
        "common.py",
    } <= names
    assert "samples.png" not in names and (folder / "samples" / "answers.png").exists(), (
        "a user's pictures stay here"
    )
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_000004", "step_000006"}
    assert "HF_TOKEN" not in "".join(read(path) for path in folder.rglob("*.json"))


def test_everything_trained_is_saved_and_answers_the_same_in_a_fresh_process(
    unbroken, small, videos, tmp_path
):
    """The loss that the run measured with its own weights is the loss of what it saved, merged and apart."""
    folder = unbroken(1)
    trained = adapter(folder)
    before = load_file(small / "model.safetensors")
    name = "base_model.model.model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(trained[name], before["multi_modal_projector.linear_1.weight"])
    assert any(weight.abs().max() > 0 for key, weight in trained.items() if "lora_B" in key)
    code = f"""
import common, llava_vtt as L
common.mend_torchvision()
from pathlib import Path
from peft import PeftModel
cfg = L.Config(report_to="none", dtype="fp32", manifest=Path({str(videos["manifest"])!r}), frames=3, val_fraction=0.25)
base = L.open_base({str(small)!r}, 1)
apart = PeftModel.from_pretrained(L.load_vlm(base.folder, base, cfg), {str(folder / "model/adapter")!r}).eval()
merged = L.load_vlm(Path({str(folder / "model")!r}), base, cfg).eval()
common.init_distributed()
for model in (apart, merged):
    print("LOSS", L.held_out_loss(model, L.VideoCollator(base, cfg), L.load_data(cfg, base)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=ROOT),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((folder / "results.json").read_text())["held_out_loss"]
    assert [float(loss) for loss in re.findall(r"LOSS (\S+)", done.stdout)] == pytest.approx(
        [measured] * 2, rel=1e-5
    )


def test_two_ranks_with_zero3_offload_and_accumulation_give_the_losses_of_one_batch(
    unbroken, small, videos, tmp_path
):
    """Two ranks of one clip, twice, are one rank of four: the loss is the mean over all answer tokens, however they are spread."""
    flags = ["--model", small, "--manifest", videos["manifest"], *SMALL, "--lora_dropout", 0, "--steps", 3]
    run(SCRIPT, *flags, "--batch_size", 4, "--output_dir", "one", cwd=tmp_path)
    offload = ["--accum", 2, "--deepspeed", ZERO3, "--gradient_checkpointing", "on"]
    run(SCRIPT, *flags, *offload, cwd=tmp_path, ranks=2, launcher="deepspeed")
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(tmp_path / "one"), losses(tmp_path / "runs/llava_vtt")):
        assert a == pytest.approx(b, rel=1e-4) and norm_a == pytest.approx(norm_b, rel=1e-3)
    a, b = adapter(tmp_path / "one"), adapter(tmp_path / "runs" / "llava_vtt")
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


@pytest.mark.demo
def test_sigterm_saves_and_another_number_of_ranks_goes_on(tmp_path, small, videos):
    flags = [
        "--model",
        small,
        "--manifest",
        videos["manifest"],
        *SMALL,
        "--save_every",
        1000,
        "--eval_every",
        1000,
    ]
    process = start(command(SCRIPT, *flags, "--steps", 500, ranks=2), tmp_path)
    folder = tmp_path / "runs" / "llava_vtt"
    wait_for(lambda: '"step": 2' in read(folder / "metrics.jsonl"), what="step 2")
    for pid in children(process.pid):
        os.kill(pid, signal.SIGTERM)
    _, output = finish(process)
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", output)[1])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{stopped:06d}"]
    output = run(SCRIPT, *flags, "--steps", stopped + 2, cwd=tmp_path)
    assert (
        "saved by another number of ranks" in output and [row[0] for row in losses(folder)][-1] == stopped + 2
    )


def test_data_may_move_but_not_change(tmp_path, unbroken, small, videos):
    shutil.copytree(unbroken(1), tmp_path / "run")
    shutil.copytree(videos["folder"], tmp_path / "moved", copy_function=shutil.copyfile)
    manifest = tmp_path / "moved" / "clips.jsonl"
    flags = ["--model", small, "--manifest", manifest, *SMALL, "--output_dir", "run", "--cache_dir", "other"]
    rows = manifest.read_text()
    manifest.write_text(rows.replace("one 0", "two 0"))
    output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    assert "was trained on other data" in output
    manifest.write_text(rows)
    (tmp_path / "moved" / "video_000.mp4").replace(tmp_path / "kept.mp4")
    shutil.copyfile(tmp_path / "moved" / "video_001.mp4", tmp_path / "moved" / "video_000.mp4")
    assert "was trained on other data" in run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    (tmp_path / "kept.mp4").replace(tmp_path / "moved" / "video_000.mp4")
    assert "resumed" in run(SCRIPT, *flags, "--steps", 7, cwd=tmp_path)


def test_full_fine_tuning_leaves_the_vision_tower_as_it_was(tmp_path, small, videos):
    flags = [
        "--model",
        small,
        "--manifest",
        videos["manifest"],
        *SMALL,
        "--lora_r",
        0,
        "--steps",
        2,
        "--augment",
        "--curriculum",
    ]
    run(SCRIPT, *flags, "--deepspeed", ZERO3, cwd=tmp_path)
    after, before = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "runs" / "llava_vtt" / "model", small)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys() and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed) and any(
        "language_model" in name for name in changed
    )
    answer = run(SCRIPT, "--predict", videos["folder"] / "video_000.mp4", "--question", "What?", cwd=tmp_path)
    assert answer.count("\n") == 1


def test_a_projector_without_gradient_ends_the_run(tmp_path, small, videos):
    """A run that learns from the text alone looks healthy. Here the pictures are cut off from the loss."""
    (tmp_path / "cut.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import common; common.mend_torchvision()\n"
        "from transformers.models.llava import modeling_llava as m\n"
        "real = m.LlavaMultiModalProjector.forward\n"
        "m.LlavaMultiModalProjector.forward = lambda self, x: real(self, x).detach() * 0 + real(self, x) * 0\n"
        f"import runpy; sys.argv[0] = {str(ROOT / SCRIPT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--model", small, "--manifest", videos["manifest"], *SMALL]
    code, output = finish(start([sys.executable, tmp_path / "cut.py", *map(str, flags)], tmp_path))
    assert code == 1 and "the projector got no gradient" in output
    assert not (tmp_path / "runs" / "llava_vtt" / "checkpoints").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the real clips are not here")
def test_real_layout_on_real_clips_with_two_ranks(tmp_path):
    model = llava.build(tmp_path / "real")  # 729 tokens a frame
    files = sorted(path for path in SHARED.iterdir() if path.suffix in (".mp4", ".mkv", ".avi"))
    rows = [
        {"video": str(path), "question": "What happens?", "answer": f"thing {i}"}
        for i, path in enumerate(files)
    ]
    rows += [{"video": str(path), "question": "How many?", "answer": str(i)} for i, path in enumerate(files)]
    manifest = llava.write_rows(tmp_path / "clips.jsonl", rows)
    flags = [
        "--model",
        model,
        "--manifest",
        manifest,
        "--steps",
        3,
        "--accum",
        1,
        "--log_every",
        1,
        "--max_new_tokens",
        2,
    ]
    output = run(SCRIPT, *flags, "--eval_questions", 1, "--deepspeed", ZERO3, cwd=tmp_path, ranks=2)
    assert (
        "5 of 384x384, as images: 3645 tokens at most" in output
        and len(losses(tmp_path / "runs" / "llava_vtt")) == 3
    )
    run(SCRIPT, "--predict", files[0], "--question", "What happens?", "--max_new_tokens", 2, cwd=tmp_path)


# --- Bad input


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--load_in_4bit"], "--load_in_4bit: needs a GPU"),
        (["--predict", "clip.mp4"], "Give --question"),
        (["--augment_flip"], "give both"),
        (["--demo", "--video_dir", "x"], "the data come from one of them"),
        (["--lora_r", "-1"], "--lora_r -1"),
        (["--frames", "0"], "--frames 0: at least 1"),
        (["--report_to", "nothing"], "report_to"),
    ],
)
def test_flags_that_cannot_be(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
    with pytest.raises(SystemExit) as stop:
        llava_vtt.main()
    assert stop.value.code == 2
    shown = re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))
    assert told in shown


@pytest.mark.parametrize(
    "case", ["too few frames", "image", "class", "no chat template", "targets", "flip", "nothing"]
)
def test_bad_input_is_found_before_the_model_is_loaded(case, tmp_path, small, videos, monkeypatch, capsys):
    good = [
        {"video": str(videos["folder"] / f"video_{i:03d}.mp4"), "question": "a?", "answer": "a"}
        for i in range(2)
    ]
    rows, flags, model = good, {}, small
    if case == "too few frames":
        flags, told = {"frames": 30}, "20 frames, 30 needed"
    elif case == "image":
        from PIL import Image

        Image.new("RGB", (64, 64)).save(tmp_path / "still.jpg")
        rows, told = [row | {"video": "still.jpg"} for row in good], "1 frames, 5 needed"
    elif case == "class":
        from transformers import Qwen2Config

        Qwen2Config().save_pretrained(model := tmp_path / "other")
        told = "Qwen2Config"
    elif case == "no chat template":
        model, told = llava.build(tmp_path / "other", size=32, patch=8, chatml=False), "its chat template"
    elif case == "targets":
        flags, told = (
            {"lora_targets": "q_proj,query"},
            "--lora_targets query: no such layer; the language model has down_proj,",
        )
    elif case == "flip":
        rows, flags = [good[0] | {"answer": "to the left"}, good[1]], {"augment": True, "augment_flip": True}
        told = "makes left and right wrong"
    else:
        model, told = tmp_path / "missing", "no such folder"
    manifest = llava.write_rows(tmp_path / "rows.jsonl", rows)
    cfg = Config(
        report_to="none",
        manifest=manifest,
        model=str(model),
        cache_dir=tmp_path / "cache",
        dtype="fp32",
        steps=1,
        **flags,
    )
    monkeypatch.setattr(llava_vtt, "load_vlm", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        base = llava_vtt.open_base(str(model), 1)
        data = llava_vtt.load_data(cfg, base)
        llava_vtt.plan_of(llava_vtt.with_steps(cfg, 0), base, data, torch.device("cpu"))
    assert stop.value.code == 2 and told in "".join(capsys.readouterr())


# --- Hub


def test_the_whole_pipeline_pushes_data_and_model_and_takes_them_back(tmp_path, small, videos, hub):
    variables = hub_variables(hub, tmp_path)
    flags = ["--model", small, "--manifest", videos["manifest"], *SMALL, "--steps", 2]
    output = run(SCRIPT, *flags, "--push_to_hub", "--push_videos", cwd=tmp_path, **variables)
    data, model = hub.files("tester/llava_vtt_data", kind="datasets"), hub.files("tester/llava_vtt")
    assert hub.repo("tester/llava_vtt_data", "datasets").private and hub.repo("tester/llava_vtt").private
    assert {"train.jsonl", "validation.jsonl", "README.md", "videos/train_000000.mp4"} <= data.keys()
    assert (
        str(tmp_path) not in b"".join(v for k, v in data.items() if not k.endswith(".mp4")).decode()
        and "pushed" in output
    )
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= model.keys() and not any(
        "optim" in name or name.endswith(".bin") for name in model
    )
    card = model["README.md"].decode()
    plain, snippet = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "llava_vtt" not in plain
    snippet = snippet.replace("clip.mp4", str(videos["folder"] / "video_000.mp4"))
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    output = run(
        SCRIPT,
        "--model",
        small,
        "--dataset",
        "tester/llava_vtt_data",
        *SMALL,
        "--check",
        cwd=tmp_path,
        **variables,
    )
    assert "3 sequences with 6 questions to train on, 1 with 2 held out" in output, (
        "the split comes back as it was"
    )


def test_a_model_on_the_hub_is_downloaded_and_one_without_weights_refused(tmp_path, small, videos, hub):
    files = {path.name: path.read_bytes() for path in small.iterdir()}
    hub.add_repo("tester/base", private=False, files=files)
    flags = ["--model", "tester/base", "--manifest", videos["manifest"], *SMALL, "--steps", 1]
    output = run(SCRIPT, *flags, "--check", cwd=tmp_path, **hub_variables(hub, tmp_path))
    assert re.search(r"download 0.0\d GB of tester/base", output) and not list(
        (tmp_path / "home").rglob("*.safetensors")
    )
    output = run(SCRIPT, *flags, cwd=tmp_path, **hub_variables(hub, tmp_path))
    assert "tester/base (LlavaForConditionalGeneration), 0.0" in output and list(
        (tmp_path / "home").rglob("*.safetensors")
    )
    shutil.copytree(small, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = [*flags[2:], "--model", "bare", "--output_dir", "bare_run", "--check"]
    output = run(SCRIPT, *flags, cwd=tmp_path, expect=2)
    assert "1 of 1 files of weights are missing, model.safetensors among them" in output


def test_four_public_samples_without_any_data_flag(tmp_path, small, videos, hub):
    for number, name in enumerate(("sample1.mp4", "sample2.mp4")):
        hub.static[name] = Static((videos["folder"] / f"video_{number:03d}.mp4").read_bytes())
    for name in ("0059", "0008"):
        file = clips.write(tmp_path / f"hailuo-02_scene-motion_{name}.gif", 12, "gif", pix_fmt="rgb8")
        hub.static[file.name] = Static(file.read_bytes())
    mirror = {"SAMPLES_URL": f"{hub.url}/files"}
    output = run(SCRIPT, "--model", small, *SMALL, "--check", cwd=tmp_path, **mirror)
    assert "four public samples: 2 sequences with 2 questions to train on, 2 with 2 held out" in output


# --- The demo


@pytest.mark.demo
def test_the_demo_made_short(tmp_path):
    flags = "--demo --steps 3 --batch_size 4 --eval_questions 8 --log_every 1".split()
    run(SCRIPT, *flags, cwd=tmp_path)
    results = json.loads((tmp_path / "runs" / "llava_vtt_demo" / "results.json").read_text())
    kinds = results["tables"]["exact by kind"]
    assert kinds.keys() <= {"direction", "moving", "count", "colour", "shape"}
    assert list(kinds["moving"]) == [*llava_vtt.SHUFFLES, "needs the video"]
    assert "exact match of 8 answers about held-out clips" in results["score_is"]
    from PIL import Image

    assert Image.open(tmp_path / "runs" / "llava_vtt_demo" / "model" / "samples.png").width > 300


@pytest.mark.demo
def test_demo_learns(tmp_path):
    code, output = finish(
        start(command(SCRIPT, "--demo"), tmp_path, OMP_NUM_THREADS=os.cpu_count()), timeout=1800
    )
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "llava_vtt_demo" / "results.json").read_text())
    direction = results["tables"]["exact by kind"]["direction"]
    assert results["score"] >= 0.9 and direction["in order"] >= 0.85
    assert direction["shuffled"] < 0.5 and direction["reversed"] < 0.2
