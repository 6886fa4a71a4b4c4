"""nllb_vtt.py: tokens and loss against transformers' own, languages, every kind of bad data, and runs as its
user starts them.

What it shares with llava_vtt.py to the letter (divergence, a stop, a kill inside a save) is tested there;
test_consistency.py sees to it that it stays so.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import llava
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    command,
    environment,
    finish,
    hub_variables,
    losses,
    read,
    run,
    start,
    unbroken_runs,
)

import common
import nllb_vtt
from demos import metadata
from nllb_vtt import Config, Example

SCRIPT = "nllb_vtt.py"
ZERO3 = ROOT / "ds_zero3_offload.json"
# A run of seconds; flags after these win.
SMALL = "--steps 6 --batch_size 4 --lr 1e-3 --warmup_steps 1 --log_every 1 --save_every 2 --eval_every 4 --eval_questions 4".split()
SMALL += "--max_new_tokens 4 --num_beams 2 --val_fraction 0.25".split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nllb"
    metadata.build_tiny(folder, 0, nllb_vtt.source_of)
    return folder


@pytest.fixture(scope="module")
def base(tiny):
    return nllb_vtt.open_base(str(tiny))


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """24 rows about 12 videos: question, answer, tags, duration, frames"""
    rows = [
        row | {"video": f"clip_{i // 2:02d}.mp4", "split": ""}
        for i, (_, _, row) in enumerate(metadata.generated_rows(24, 5, False))
    ]
    return llava.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny, manifest):
    flags = ["--model", tiny, "--manifest", manifest, *SMALL, "--output_dir"]
    return unbroken_runs(tmp_path_factory, SCRIPT, lambda ranks, folder: [*flags, folder])


def example(
    source="question: a? | tags: red", target="a red ball", src="eng_Latn", tgt="eng_Latn"
) -> Example:
    return Example(source, target, src, tgt, "", "", {})


def asked_cfg(**flags) -> Config:
    return Config(report_to="none", dtype="fp32", **flags)


# --- Tokens and loss


def test_tokens_loss_and_shift_are_transformers_own(base, tiny):
    from transformers import AutoTokenizer, M2M100ForConditionalGeneration

    rows, _ = nllb_vtt.encode(
        [example(), example("question: b?", "la voiture", "deu_Latn", "fra_Latn")], base
    )
    batch = nllb_vtt.collate_rows(rows, base)
    peer = AutoTokenizer.from_pretrained(tiny, src_lang="deu_Latn", tgt_lang="fra_Latn")
    theirs = peer("question: b?", text_target="la voiture")
    assert rows[1].source == theirs["input_ids"] and rows[1].labels == theirs["labels"]
    assert (
        peer.convert_ids_to_tokens(rows[1].source)[0] == "deu_Latn"
        and peer.convert_ids_to_tokens(rows[1].labels)[0] == "fra_Latn"
    )
    model = M2M100ForConditionalGeneration.from_pretrained(tiny).eval()
    loss, count = nllb_vtt.answer_loss(model, batch, 0.0)
    reference = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    assert count == (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss / count, reference, rtol=1e-5, atol=0)


def test_sources_have_the_question_and_the_named_columns_and_never_the_answer():
    row = {
        "tags": ["a", "b"],
        "duration": 2.0,
        "title": "",
        "transcript": "x\ny",
        "answer": "secret",
        "caption": "secret",
    }
    source = nllb_vtt.source_of("What?", row, nllb_vtt.FIELDS.split(","))
    assert source == "question: What? | tags: a, b | duration: 2 | transcript: x y"


@pytest.mark.parametrize(
    ("source", "target", "leak"),
    [
        ("question: a? | title: A red ball rolls.", "a red ball rolls", True),
        ("question: a? | title: a red ball", "a red ball rolls", False),
        ("question: a? | tags: red, ball", "red", False),
        ("question: a? | title: not a red ball rolls on", "A red ball rolls!", True),
        ("question: 这是什么? | title: 一个红色的球在地上滚动。", "红色的球在地上滚动", True),
        ("question: 这是什么? | tags: 红色的球", "红色的球", False),
    ],
)
def test_leaks(source, target, leak):
    assert nllb_vtt.leaks(example(source, target)) == leak


def test_batches_hold_rows_of_about_one_length_and_every_row(base):
    rng = np.random.default_rng(0)
    rows = [nllb_vtt.Encoded([7] * int(n), [1], example()) for n in rng.integers(1, 200, 1001)]
    (stage,) = nllb_vtt.curriculum(rows, False)
    batches = nllb_vtt.epoch_batches(stage, 16, 0, 0)
    assert set(batches.ravel().tolist()) == set(range(1001)) and batches.shape == (63, 16)
    spread = np.mean([np.ptp(stage.lengths[batch]) for batch in batches])
    assert spread < 15 < 170 < np.mean([np.ptp(rng.permutation(stage.lengths)[:16]) for _ in range(50)])
    assert not np.array_equal(batches, nllb_vtt.epoch_batches(stage, 16, 0, 1)), (
        "another order in the next epoch"
    )


def test_ranks_share_a_batch_and_curriculum_goes_by_words(base, monkeypatch):
    rows, _ = nllb_vtt.encode([example(target=" ".join(["word"] * n)) for n in (3, 9, 10, 19, 20, 25)], base)
    stages = nllb_vtt.curriculum(rows, True)
    assert [len(stage.rows) for stage in stages] == [2, 4, 6]
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg, seen = asked_cfg(steps=6, batch_size=3), []
    for number in "01":
        monkeypatch.setenv("RANK", number)
        seen += [
            len(row.example.target.split()) for row in nllb_vtt.get_batch(stages, lambda rows: rows, cfg, 5)
        ]
    assert sorted(seen) == [3, 9, 10, 19, 20, 25], "the last stage has all, each once over the ranks"


def test_sources_with_several_answers_are_counted_in_one_language():
    rows = [
        example(target="red"),
        example(target="red"),
        example(target="blue"),
        example(target="rouge", tgt="fra_Latn"),
    ]
    assert [e.target for e in nllb_vtt.contradicting(rows)] == ["blue"]


def test_answers_that_are_too_long_are_cut_and_counted_as_sources_are(base):
    rows, cut = nllb_vtt.encode([example(), example("word " * 400), example(target="word " * 400)], base)
    assert cut == (1, 1) and len(rows[2].labels) == len(rows[1].source) == base.longest
    assert rows[2].labels[-1] == rows[0].labels[-1] == base.tokenizer.eos_token_id


def test_the_majority_is_that_of_the_language(base, tiny):
    rows = [example(target="a red ball")] * 3 + [example(target="une balle", tgt="fra_Latn")] * 2
    train, _ = nllb_vtt.encode(rows, base)
    held_out, _ = nllb_vtt.encode([example(target="une balle", tgt="fra_Latn")], base)
    cfg = asked_cfg(max_new_tokens=2, num_beams=1)
    model = nllb_vtt.load_weights(tiny, base, cfg)
    result = nllb_vtt.evaluate(model, base, nllb_vtt.Data(train, held_out, [], (0, 0)), cfg)
    assert result["majority"]["exact"] == 1.0


# --- Languages


def test_an_unknown_language_names_near_ones(base, capsys):
    for code, near in (("eng_Latin", "eng_Latn"), ("english", "eng_Latn"), ("fr", "fra_Latn")):
        with pytest.raises(SystemExit) as stop:
            nllb_vtt.check_language(code, base)
        assert stop.value.code == 2 and near in capsys.readouterr().err


def test_one_question_is_answered_in_several_languages_after_training(tmp_path, tiny):
    """Columns win over flags; a plain generate() of the saved model answers in --tgt_lang."""
    said = {"eng_Latn": "red ball", "fra_Latn": "ball blue", "deu_Latn": "train"}
    rows = [{"question": "What is it?", "tags": ["red"], "answer": text, "tgt_lang": code, "video": code + str(i)}
            for code, text in said.items() for i in range(4)]  # fmt: skip
    manifest = llava.write_rows(tmp_path / "rows.jsonl", rows)
    flags = [
        "--model",
        tiny,
        "--manifest",
        manifest,
        "--steps",
        80,
        "--batch_size",
        12,
        "--lr",
        3e-3,
        "--warmup_steps",
        5,
    ]
    flags += ["--label_smoothing", 0, "--num_beams", 1, "--max_new_tokens", 8, "--tgt_lang", "fra_Latn"]
    assert "eng_Latn -> deu_Latn" in run(SCRIPT, *flags, cwd=tmp_path)
    model = tmp_path / "runs" / "nllb_vtt" / "model"
    asked = [{"question": "What is it?", "tags": ["red"], "tgt_lang": code} for code in said]
    assert nllb_vtt.answer(asked, model) == list(said.values())
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForSeq2SeqLM.from_pretrained(model)
    out = plain.generate(**tokenizer("question: What is it? | tags: red", return_tensors="pt"))
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == [said["fra_Latn"]]
    llava.write_rows(tmp_path / "asked.jsonl", asked)
    lines = run(SCRIPT, "--predict", "--metadata", tmp_path / "asked.jsonl", cwd=tmp_path).splitlines()
    assert lines == list(said.values())
    one = [
        "--predict",
        "--question",
        "What is it?",
        "--metadata",
        '{"tags": ["red"]}',
        "--tgt_lang",
        "deu_Latn",
    ]
    assert run(SCRIPT, *one, cwd=tmp_path).strip() == said["deu_Latn"]


# --- Runs


def test_run_folder_and_output(unbroken):
    folder = unbroken(1)
    output = (folder.parent / "output").read_text()
    assert "18 questions to train on, 6 held out" in output and "eng_Latn -> eng_Latn (18)" in output
    assert output.count("  ->  ") == 3, "three real examples"
    results = json.loads((folder / "results.json").read_text())
    metrics = {"exact", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"}
    assert set(results["controls"]) == {"majority", "source_copied"}
    assert set(results["tables"]["answers"]) == metrics
    steps = losses(folder)
    assert [step for step, *_ in steps] == list(range(1, 7)) and steps[-1][1] < steps[0][1]
    made = json.loads((folder / "model" / "generation_config.json").read_text())
    assert made["forced_bos_token_id"] == nllb_vtt.open_base(
        str(folder / "model")
    ).tokenizer.convert_tokens_to_ids("eng_Latn")
    assert (folder / "SUCCESS").exists() and "| source_copied |" in read(folder / "model" / "README.md")


@pytest.mark.demo
def test_two_ranks_with_lora_and_zero3_give_the_losses_of_one(tmp_path, tiny, manifest):
    flags = [
        "--model",
        tiny,
        "--manifest",
        manifest,
        *SMALL,
        "--steps",
        3,
        "--lora_r",
        4,
        "--lora_dropout",
        0,
    ]
    run(SCRIPT, *flags, "--output_dir", "one", cwd=tmp_path)
    run(
        SCRIPT,
        *flags,
        "--batch_size",
        2,
        "--deepspeed",
        ZERO3,
        "--gradient_checkpointing",
        "on",
        cwd=tmp_path,
        ranks=2,
    )
    for (_, a, norm_a), (_, b, norm_b) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "runs" / "nllb_vtt")
    ):
        assert a == pytest.approx(b, rel=1e-4) and norm_a == pytest.approx(norm_b, rel=1e-3)
    assert run(SCRIPT, "--predict", "--question", "What is in this video?", cwd=tmp_path).count("\n") == 1


FRESH = """
import sys, torch
for name in ("nms", "qnms"):  # torchvision here is of another torch
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
if len(sys.argv) > 3:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[3])
    model.generation_config = model.get_base_model().generation_config = GenerationConfig.from_pretrained(sys.argv[3])
assert not {"common", "nllb_vtt"} & set(sys.modules)
source = "question: What is it? | tags: red"
print(tokenizer.batch_decode(model.generate(**tokenizer([source], return_tensors="pt")), skip_special_tokens=True)[0])
"""


def test_what_lora_exports_answers_in_its_language_in_a_fresh_process(tmp_path, tiny):
    """Merged, by from_pretrained and a plain generate(); and the adapter with its generation config"""
    rows = [
        {"question": "What is it?", "tags": ["red"], "answer": "ball blue", "video": str(i)}
        for i in range(12)
    ]
    manifest = llava.write_rows(tmp_path / "rows.jsonl", rows)
    flags = [
        "--model",
        tiny,
        "--manifest",
        manifest,
        "--steps",
        60,
        "--batch_size",
        12,
        "--lr",
        1e-2,
        "--warmup_steps",
        5,
    ]
    flags += [
        "--label_smoothing",
        0,
        "--num_beams",
        1,
        "--max_new_tokens",
        8,
        "--tgt_lang",
        "fra_Latn",
        "--lora_r",
        16,
    ]
    run(SCRIPT, *flags, cwd=tmp_path)
    model = tmp_path / "runs/nllb_vtt/model"
    wanted = nllb_vtt.answer([{"question": "What is it?", "tags": ["red"]}], model)
    assert wanted == ["ball blue"]
    code = tmp_path / "fresh.py"
    code.write_text(FRESH)
    for arguments in ([model, model], [tiny, model, model / "adapter"]):
        done = subprocess.run(
            [sys.executable, code, *arguments],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == wanted[0], done.stderr
    config = json.loads((model / "generation_config.json").read_text())
    assert config["forced_bos_token_id"] == nllb_vtt.open_base(str(model)).tokenizer.convert_tokens_to_ids(
        "fra_Latn"
    )
    again = ["--model", model / "adapter", *flags[2:], "--output_dir", "other"]
    assert f"is a LoRA adapter of {tiny}" in run(SCRIPT, *again, cwd=tmp_path, expect=2)


@pytest.mark.demo
def test_the_whole_pipeline_pushes_data_and_model_and_takes_them_back(tmp_path, tiny, manifest, hub):
    variables = hub_variables(hub, tmp_path)
    run(
        SCRIPT,
        "--model",
        tiny,
        "--manifest",
        manifest,
        *SMALL,
        "--steps",
        2,
        "--push_to_hub",
        cwd=tmp_path,
        **variables,
    )
    model = hub.files("tester/nllb_vtt")
    assert {"train.jsonl", "validation.jsonl", "README.md"} <= hub.files(
        "tester/nllb_vtt_data", kind="datasets"
    ).keys()
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "nllb_vtt.py"} <= model.keys()
    snippet = re.search(r"```python\n(.*?)```", model["README.md"].decode(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr
    output = run(
        SCRIPT,
        "--model",
        tiny,
        "--dataset",
        "tester/nllb_vtt_data",
        *SMALL,
        "--check",
        cwd=tmp_path,
        **variables,
    )
    assert "18 questions to train on, 6 held out" in output


# --- Bad input


@pytest.mark.parametrize(
    "case",
    ["no answer", "leak", "language", "column language", "too long", "long answers", "decoder", "field"],
)
def test_bad_input_is_found_before_the_model_is_loaded(case, tmp_path, tiny, capsys, monkeypatch):
    rows = [
        {"video": f"{i}.mp4", "question": "What is it?", "answer": f"thing {i}", "title": f"title {i}"}
        for i in range(6)
    ]
    flags, model = {}, tiny
    if case == "no answer":
        rows, told = [row | {"answer": ""} for row in rows], "none of 6 samples is usable"
    elif case == "leak":
        rows = [row | {"title": "A cat sleeps here.", "answer": "a cat sleeps here"} for row in rows]
        told = "6 of 6 sources have the answer in them word by word"
    elif case == "language":
        flags, told = {"tgt_lang": "eng_Latin"}, "near ones are eng_Latn"
    elif case == "column language":
        rows[3]["tgt_lang"] = "xxx_Latn"
        told = "language xxx_Latn"
    elif case == "too long":
        rows, told = (
            [row | {"title": "word " * 400} for row in rows],
            "6 of 6 sources are longer than the 256 tokens",
        )
    elif case == "long answers":
        rows = [row | {"answer": "word " * 400} for row in rows]
        told = "6 of 6 answers are longer than the 256 tokens"
    elif case == "field":
        flags, told = {"source_fields": "title,taggs"}, "--source_fields taggs: in none of 6 rows"
    else:
        from transformers import Qwen2Config

        Qwen2Config().save_pretrained(model := tmp_path / "other")
        told = "a decoder-only model of the class qwen2"
    manifest = llava.write_rows(tmp_path / "rows.jsonl", rows)
    cfg = asked_cfg(manifest=manifest, steps=1, **flags)
    with pytest.raises(SystemExit) as stop:
        base = nllb_vtt.open_base(str(model))
        nllb_vtt.check_language(cfg.tgt_lang, base)
        nllb_vtt.load_data(cfg, base)
    assert stop.value.code == 2 and told in "".join(capsys.readouterr())
    if case == "leak":
        assert len(nllb_vtt.load_data(asked_cfg(manifest=manifest, allow_leak=True), base).train) == 5


def test_flags_that_cannot_be(tmp_path, monkeypatch, capsys):
    for flags, told in (
        (["--adam_8bit"], "needs a GPU"),
        (["--predict"], "Give --question"),
        (["--num_beams", "0"], "at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
        with pytest.raises(SystemExit) as stop:
            nllb_vtt.main()
        assert stop.value.code == 2 and told in re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))


def test_memory_plan_of_the_real_size():
    from transformers import M2M100Config

    sizes = dict(
        d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096
    )
    config = M2M100Config(vocab_size=256206, encoder_attention_heads=16, decoder_attention_heads=16, **sizes)
    base = nllb_vtt.Base("real", Path(), config, None, 1024)
    cfg = Config(report_to="none", dtype="bf16")
    parameters, trained, frozen, kept = nllb_vtt.sizes_of(base, cfg, 64, 32)
    assert parameters == trained == 615_073_792 and frozen == 0 and kept[True] < kept[False]
    first = common.memory_layouts(trained, frozen, kept, "bf16", 4)[0]
    assert first.name == "ZeRO-2" and first.gpu_gb < 8 * 0.92, "8 GB a GPU at 4 GPUs"


# --- The demo


def test_the_demo_made_short(tmp_path):
    run(SCRIPT, *"--demo --steps 3 --batch_size 8 --eval_questions 8 --log_every 1".split(), cwd=tmp_path)
    results = json.loads((tmp_path / "runs" / "nllb_vtt_demo" / "results.json").read_text())
    assert results["score_is"] == "BLEU / 100 of 8 held-out answers"
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.demo
def test_demo_learns(tmp_path):
    code, output = finish(
        start(command(SCRIPT, "--demo"), tmp_path, OMP_NUM_THREADS=os.cpu_count()), timeout=1800
    )
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "nllb_vtt_demo" / "results.json").read_text())
    assert results["score"] >= 0.9 and max(results["controls"].values()) < 0.2
