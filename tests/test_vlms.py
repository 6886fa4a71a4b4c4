"""llava_vtt.py on the classes of today: each with its own processor, template and defaults of generate()."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import clips
import llava
import numpy as np
import pytest
import tiny_vlms
import torch
from conftest import ROOT, command, environment, finish, losses, run, start

import llava_vtt
from common import QA, AtMost
from llava_vtt import Config, Footage, Sample, VideoCollator

SCRIPT = "llava_vtt.py"
FLAGS = "--frames 4 --max_pixels 3000 --steps 3 --accum 1 --lr 1e-2 --log_every 1 --eval_questions 2 --max_new_tokens 4".split()
LORA = "--lora_r 4 --lora_dropout 0".split()
TALKS = (
    (QA("What moves?", "a red cat"),),
    (QA("Is it big?", "yes"), QA("Why?", "it grows", follows=True)),
    (QA("How many are there?", "two"),),
)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """get(kind) -> folder of its tiny model, built once"""
    folder, built = tmp_path_factory.mktemp("vlms"), {}

    def get(kind: str) -> Path:
        if kind not in built:
            built[kind] = tiny_vlms.build(kind, folder / kind)
        return built[kind]

    return get


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Four clips, each with two rows and a conversation"""
    folder, rows = tmp_path_factory.mktemp("videos"), []
    for number in range(4):
        clips.write(folder / f"{number}.mp4", 20 + number, "mpeg4", options={"b": "1M"})
        video = {"video": f"{number}.mp4"}
        rows += [
            video | {"question": q, "answer": f"{a} {number}"}
            for q, a in (("What number?", "one"), ("Where?", "there"))
        ]
        said = zip(("user", "assistant") * 2, ("Who is it?", "nobody", "Why not?", "it is dark"))
        rows.append(video | {"messages": [{"role": role, "content": text} for role, text in said]})
    return llava.write_rows(folder / "clips.jsonl", rows)


def opened(folder: Path, attn: str = "sdpa", **more) -> tuple:
    """(settings, Base, model, collator), all of it trained but for dropout"""
    cfg = Config(
        report_to="none",
        dtype="fp32",
        frames=4,
        max_pixels=3000,
        attn=attn,
        max_new_tokens=2,
        eval_questions=1,
        **{"lora_r": 0, "train_vision": True} | more,
    )
    base = llava_vtt.open_base(str(folder), cfg.max_pixels, attn)
    model = llava_vtt.choose_trained(llava_vtt.load_vlm(folder, base, cfg), cfg)
    return cfg, base, model, VideoCollator(base, cfg)


def clip(seed: int, base, frames: int = 4) -> Footage:
    size = (48, 80) if isinstance(base.size, AtMost) else (base.size, base.size)
    return Footage(
        np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), np.uint8), np.arange(frames) * 0.7
    )


# --- What the model reads


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
@pytest.mark.parametrize("talk", TALKS[:2], ids=["one turn", "two turns"])
def test_tokens_are_those_of_the_processor_and_the_loss_sees_answers_and_their_ends(models, kind, talk):
    cfg, base, _, collate = opened(models(kind))
    batch = collate([(clip(0, base), (talk,))])
    tokenizer, mine = base.processor.tokenizer, batch["input_ids"][0].tolist()
    # the text as the model's own template has it, with an end where it has none (LLaVA 1.5)
    messages = []
    media = [{"type": "video"}] if base.video else [{"type": "image"}] * 4
    for number, qa in enumerate(talk):
        question = [{"type": "text", "text": qa.question}]
        messages.append({"role": "user", "content": question if number else media + question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": qa.answer}]})
    text = base.processor.apply_chat_template(messages, tokenize=False)
    if kind == "llava_1_5":
        for qa in talk:
            text = text.replace(f"ASSISTANT: {qa.answer}", f"ASSISTANT: {qa.answer}</s>")
    text = text.replace("assistant \n", "assistant\n")  # LLaVA's template contradicts its own prompt
    # one pair around each frame, as it was trained; the processor leaves the template's own around them all
    pair = "<|vision_start|><|video_pad|><|vision_end|>"
    text = text.replace(pair, "<|video_pad|>") if kind == "qwen3_vl" else text
    whole = llava_vtt.processed(base, [text], [clip(0, base)])
    assert mine == whole["input_ids"][0].tolist()[: len(mine)]
    end = {"llava_1_5": "</s>", "smolvlm": "<end_of_utterance>"}.get(kind, "<|im_end|>")
    supervised = tokenizer.decode([label for label in batch["labels"][0].tolist() if label >= 0])
    assert "".join(supervised.split()) == "".join(qa.answer + end for qa in talk).replace(" ", "")
    # an answer is asked for by the very tokens before it
    prompt, first = (
        collate.ask([(clip(0, base), talk[0].question)])["input_ids"][0].tolist(),
        batch["labels"][0].tolist(),
    )
    assert prompt == mine[: next(i for i, label in enumerate(first) if label >= 0)]


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_each_frame_has_its_places_and_the_features_fill_them(models, kind):
    cfg, base, model, collate = opened(models(kind))
    for frames in (2, 4, 5):
        batch = collate([(clip(0, base, frames), TALKS[:1])])
        places = sum(int((batch["input_ids"] == mark).sum()) for mark in base.marks)
        grid = batch.get("video_grid_thw")
        wanted = {
            "llava_1_5": 16 * frames, "llava_onevision": 4 * frames + 1, "smolvlm": 4 * frames,
        }.get(kind) or int(grid.prod()) // 4  # fmt: skip
        assert places == wanted and (grid is None or grid[0, 0] == -(-frames // 2))
        llava_vtt.supervised_loss(model, batch)  # raises where places and features differ
    with pytest.raises(ValueError, match="no image tokens"):
        llava_vtt.last_place([], base)


@pytest.mark.parametrize("kind, told", [("qwen3_vl", "<1.8 seconds>"), ("smolvlm", "Frame from 00:02:")])
def test_models_that_take_times_are_told_those_of_the_frames(models, kind, told):
    _, base, _, collate = opened(models(kind))
    ids = collate([(clip(0, base), TALKS[:1])])["input_ids"][0]  # shown at 0, .7, 1.4 and 2.1 seconds
    assert told in base.processor.tokenizer.decode(ids)
    if kind == "qwen3_vl":  # two frames are at the mean of their times, in one pair of marks
        text = base.processor.tokenizer.decode(ids)
        assert re.search(
            r"user\n<0\.[34] seconds><\|vision_start\|>(<\|video_pad\|>)+<\|vision_end\|><1\.8", text
        )
        assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == 2


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_branches_of_a_prefix_are_separate_samples(models, kind, attn):
    """Loss and all gradients of several conversations about a clip in one sequence, against each alone"""
    _, base, model, collate = opened(models(kind), attn)
    assert base.branches
    pair = [(clip(0, base), TALKS), (clip(1, base), TALKS[:1])]

    def learn(batches) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = llava_vtt.supervised_loss(model, batch)
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    together, gradient = learn([collate(pair)])
    apart, wanted = learn([collate([(shown, (talk,))]) for shown, talks in pair for talk in talks])
    assert together == pytest.approx(apart, rel=1e-5)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()
    # the mask is what makes it so
    batch = collate(pair)
    plain = {name: value for name, value in batch.items() if name != "branch"}
    plain["attention_mask"] = (batch["branch"] >= 0).long()
    assert abs(llava_vtt.supervised_loss(model, plain)[0].item() - apart) > 1e-3 * apart


@pytest.mark.demo  # compiled: a minute
def test_branches_by_flex_attention(models):
    """Its forward pass, which is all that a CPU has"""
    losses = []
    for attn in ("sdpa", "flex_attention"):
        _, base, model, collate = opened(models("llava_1_5"), attn)
        with torch.no_grad():
            losses.append(
                llava_vtt.supervised_loss(model.eval(), collate([(clip(0, base), TALKS)]))[0].item()
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_where_masks_are_the_models_own_each_question_has_its_sequence(models, tmp_path, manifest):
    """Sliding windows and recurrences do not take ours"""
    folder = tmp_path / "model"
    tiny_vlms.build("llava_onevision", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    base = llava_vtt.open_base(str(folder), 3000)
    assert not base.branches
    cfg = Config(manifest=manifest, report_to="none", frames=4, cache_dir=tmp_path / "cache")
    data = llava_vtt.load_data(cfg, base)
    assert {len(sample.talks) for sample in data.train} == {1}


def test_a_conversation_keeps_its_order_and_separate_rows_do_not_see_each_other(models, tmp_path, manifest):
    base = llava_vtt.open_base(str(models("qwen3_vl")), 3000)
    cfg = Config(manifest=manifest, report_to="none", frames=4, max_pixels=3000, cache_dir=tmp_path / "cache")
    data = llava_vtt.load_data(cfg, base)
    for sample in data.train:
        assert [[qa.question for qa in talk] for talk in sample.talks] == [
            ["What number?"],
            ["Where?"],
            ["Who is it?", "Why not?"],
        ]
    few = llava_vtt.load_data(dataclasses.replace(cfg, max_turns=2), base)
    assert [list(map(len, sample.talks)) for sample in few.train[:2]] == [[1, 1], [2]]
    assert [qa.question for _, qa in llava_vtt.chosen_questions(data.train[:1], 9)] == [
        "What number?",
        "Where?",
        "Who is it?",
    ]


# --- The template that LLaVA-interleave gets


def test_the_saved_template_keeps_strings_and_system_turns_and_ends_a_turn_once(tmp_path):
    from transformers import AutoProcessor

    folder = llava.build(tmp_path / "model", size=32, patch=8)
    base = llava_vtt.open_base(str(folder), 1)
    base.processor.save_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    two = [{"type": "image"}, {"type": "text", "text": "Look."}, {"type": "text", "text": " What is it?"}]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": two}]
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nLook. What is it?<|im_end|>\n"
    assert (
        processor.apply_chat_template(asked, add_generation_prompt=True) == head + "<|im_start|>assistant\n"
    )
    said = {"role": "assistant", "content": "A cat."}
    whole = processor.apply_chat_template([*asked, said], tokenize=False)
    assert whole == head + "<|im_start|>assistant\nA cat.<|im_end|>\n"


def replaced_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("template, told", [
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text or '<|video_pad|>' }}{% endfor %}<|im_end|>\n"
     "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}", "<think>"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show the frames"),
    ("{{ raise_exception('no') }}", "cannot be used"),
])  # fmt: skip
def test_a_template_that_would_mislead_is_refused(tmp_path, capsys, template, told):
    folder = replaced_template(tiny_vlms.build("qwen3_vl", tmp_path / "model"), template)
    with pytest.raises(SystemExit) as stop:
        llava_vtt.open_base(str(folder), 3000)
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_texts_with_a_special_token_of_the_model_are_bad_samples(models, tmp_path, manifest, capsys):
    base = llava_vtt.open_base(str(models("smolvlm")), 3000)
    assert {"<video>", "<image>", "<end_of_utterance>"} <= set(base.special)
    rows = [{"video": str(manifest.parent / "0.mp4"), "question": "A <end_of_utterance> b?", "answer": "yes"}]
    path = llava.write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(SystemExit):
        llava_vtt.read_clips(Config(manifest=path, report_to="none"), base.special)
    assert "special token <end_of_utterance>" in capsys.readouterr().err


# --- Frames


def test_frames_by_pace_and_pixels(models, tmp_path, manifest):
    """Clips of 20 to 23 frames, a second or less"""
    base = llava_vtt.open_base(str(models("qwen2_5_vl")), 3000)
    cfg = Config(
        manifest=manifest, report_to="none", fps=20.0, max_frames=4, max_pixels=3000, cache_dir=tmp_path
    )
    data = llava_vtt.load_data(cfg, base)
    seen = {len(sample.load(cfg.frames).frames) for sample in (*data.train, *data.held_out)}
    assert seen == {4}
    slow = dataclasses.replace(cfg, fps=10.0, max_frames=64)
    shown = [sample.load(cfg.frames) for sample in llava_vtt.load_data(slow, base).train]
    for one in shown:
        height, width = one.frames.shape[1:3]
        assert height * width <= 3000 and 1 < len(one.frames) == len(one.times) == int(10 * one.times[-1]) + 1
    with pytest.raises(ValueError, match="--fps"):
        Config(demo=True, fps=2.0)


def test_clips_of_several_shapes_and_lengths_make_one_batch(models):
    for kind in ("qwen2_5_vl", "qwen3_vl"):
        _, base, model, collate = opened(models(kind))
        others = Footage(np.zeros((6, 32, 64, 3), np.uint8), np.arange(6) * 0.5)
        pair = [(clip(0, base), TALKS[:1]), (others, TALKS[1:2])]
        together = llava_vtt.supervised_loss(model, collate(pair))[0].item()
        apart = sum(llava_vtt.supervised_loss(model, collate([one]))[0].item() for one in pair)
        assert together == pytest.approx(apart, rel=1e-5)


# --- What is trained, and how


def test_parts_are_called_as_the_class_calls_them(models):
    for kind in tiny_vlms.KINDS:
        base = llava_vtt.open_base(str(models(kind)), 3000)
        language, tower, projector = llava_vtt.module_names(base.skeleton)
        assert language.split(".")[-1] in ("language_model", "text_model") and tower.split(".")[-1] in (
            "vision_tower",
            "visual",
            "vision_model",
        )
        assert projector and all(list(base.skeleton.get_submodule(name).parameters()) for name in projector)


def test_lora_targets_by_the_classes_names(models, capsys):
    base = llava_vtt.open_base(str(models("smolvlm")), 3000)
    cfg = Config(report_to="none", lora_r=4, lora_targets="q_proj,query_key_value")
    with pytest.raises(SystemExit):
        llava_vtt.adapter_config(base.skeleton, cfg)
    told = capsys.readouterr().err
    assert (
        "query_key_value" in told and "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in told
    )


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_lora_trains_the_language_model_and_the_projector_and_nothing_in_the_tower(models, kind, monkeypatch):
    monkeypatch.setattr(llava_vtt, "over_ranks", lambda value, _: value)
    _, base, model, collate = opened(models(kind), lora_r=4, train_vision=False, lora_dropout=0.0)
    parts = llava_vtt.module_names(base.skeleton)
    trained = {
        name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained and all("lora_" in name or name.startswith(tuple(parts.projector)) for name in trained)
    assert all(name.startswith(parts.language) for name in trained if "lora_" in name)
    tower = model.get_base_model().get_submodule(parts.tower)
    layers = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))
    assert not any(layer.training for layer in layers), "no dropout in what is frozen"
    check = llava_vtt.watch_projector(model)
    llava_vtt.supervised_loss(model, collate([(clip(0, base), TALKS)]))[0].backward()
    check()
    assert all(
        p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name
    )


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_checkpointing_is_on_in_training_also_after_an_evaluation(models, kind, tmp_path):
    cfg, base, _, collate = opened(models(kind))
    model = llava_vtt.load_vlm(models(kind), base, cfg)
    layer = model.get_submodule(llava_vtt.module_names(model).language).layers[0].mlp
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    data = llava_vtt.Data([], [Sample(fake(tmp_path, base), TALKS)], [])
    for checkpointing, wanted in ((False, 1), (True, 2)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = llava_vtt.choose_trained(model, cfg)
        for _ in range(2):  # before and after an evaluation
            calls.clear()
            llava_vtt.supervised_loss(model, collate([(clip(0, base), TALKS)]))[0].backward()
            assert len(calls) == wanted
            llava_vtt.evaluate(model, collate, data)


def fake(folder: Path, base) -> Path:
    from common import save_array

    save_array(folder / "clip.npy", *clip(0, base)[:2])
    return folder / "clip.npy"


def test_answers_do_not_depend_on_the_published_defaults_of_generate(models):
    """Qwen's are sampling, and a penalty for repetition that greedy search would keep"""
    _, base, model, collate = opened(models("qwen2_5_vl"))
    assert model.generation_config.do_sample and model.generation_config.repetition_penalty == 1.05
    items = [(clip(0, base), "What moves?"), (clip(1, base), "Is it a very big one?")]
    said = llava_vtt.greedy_answers(model.eval(), collate, items, 12)
    assert said == [llava_vtt.greedy_answers(model, collate, [item], 12)[0] for item in items]
    batch = collate.ask(items[:1])
    batch.pop("labels")
    for _ in range(12):  # step by step, by the largest logit
        ids = batch["input_ids"]
        token = model(**batch).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() in model.generation_config.eos_token_id:
            break
        batch |= {
            name: torch.cat([batch[name], torch.full_like(token, fill)], 1)
            for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0))
        }
        batch["input_ids"] = torch.cat([ids, token], 1)
    text = base.processor.tokenizer.decode(
        batch["input_ids"][0, collate.ask(items[:1])["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert said[0] == text.strip()


# --- What the tower makes of the frames, kept


@pytest.mark.parametrize("kind", ["llava_1_5", "llava_onevision", "smolvlm"])
def test_kept_features_give_the_logits_of_live_ones(models, kind, tmp_path):
    cfg, base, model, collate = opened(models(kind), train_vision=False)
    sample = Sample(fake(tmp_path, base), TALKS)
    made = llava_vtt.tower_output(model.eval(), collate, sample.load(4))
    batch = collate([(sample.load(4), TALKS)])
    live = llava_vtt.supervised_loss(model, batch)[0]
    kept = collate([(sample.load(4)._replace(features=made), TALKS)])
    again = llava_vtt.supervised_loss(model, kept)[0]
    assert torch.equal(kept["input_ids"], batch["input_ids"]) and again.item() == pytest.approx(
        live.item(), rel=1e-5
    )
    assert (again - llava_vtt.supervised_loss(model, kept | {"features": 0 * made})[0]).abs() > 1e-3, (
        "they are what is used"
    )
    after = llava_vtt.supervised_loss(model, batch)[0]
    assert torch.equal(after, live), "and the tower is as it was"


def test_kept_features_are_never_stale(tmp_path):
    folder = tiny_vlms.build("llava_onevision", tmp_path / "model")
    cfg, base, _, _ = opened(folder, train_vision=False, cache_dir=tmp_path)
    samples = [Sample(tmp_path / "clip.npy", TALKS)]
    first = llava_vtt.with_features(cfg, base, samples)[0].features
    assert first == llava_vtt.with_features(cfg, base, samples)[0].features
    assert first != llava_vtt.with_features(dataclasses.replace(cfg, dtype="bf16"), base, samples)[0].features
    assert first != llava_vtt.with_features(cfg, base, [Sample(tmp_path / "other.npy", TALKS)])[0].features
    tiny_vlms.build("llava_onevision", folder, seed=1)
    assert first != llava_vtt.with_features(cfg, base, samples)[0].features


def test_features_of_a_tower_that_ends_in_its_projector_are_refused(models, capsys):
    with pytest.raises(SystemExit):
        llava_vtt.check_cacheable(llava_vtt.open_base(str(models("qwen3_vl")), 3000))
    assert "visual.merger" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["augment", "train_vision", "demo"])
def test_features_that_would_change_are_refused(flag):
    with pytest.raises(ValueError, match=f"--{flag}"):
        Config(cache_features=True, **{flag: True})


def test_a_run_on_kept_features_is_the_run_on_live_ones(models, manifest, tmp_path):
    flags = [
        "--model",
        models("llava_1_5"),
        "--manifest",
        manifest,
        *FLAGS,
        *LORA,
        "--cache_dir",
        tmp_path / "cache",
        "--output_dir",
    ]
    run(SCRIPT, *flags, "live", cwd=tmp_path)
    zero3 = ["--deepspeed", ROOT / "ds_zero3_offload.json"]
    for folder, more in (("kept", []), ("again", zero3)):
        output = run(SCRIPT, *flags, folder, "--cache_features", *more, cwd=tmp_path)
        assert "features " in output
        for (_, a, _), (_, b, _) in zip(losses(tmp_path / "live"), losses(tmp_path / folder), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


# --- Whole runs

LAYOUTS = list(itertools.product((1, 2), (2, 3), (0, 4)))  # ranks, ZeRO stage, LoRA's r
# of each class one, and of all together each; the others with --demos
SHORT = dict(zip(tiny_vlms.KINDS, ((1, 2, 4), (1, 3, 4), (1, 3, 0), (2, 2, 4), (2, 3, 0))))
MATRIX = [
    pytest.param(kind, *layout, marks=[] if layout == SHORT[kind] else [pytest.mark.demo])
    for kind in tiny_vlms.KINDS
    for layout in LAYOUTS
]


@pytest.mark.parametrize("kind, ranks, stage, lora_r", MATRIX)
def test_each_class_trains_predicts_merges_and_loads_as_its_own(
    models, manifest, tmp_path, kind, ranks, stage, lora_r
):
    import transformers

    json_file = ROOT / ("ds_zero2.json" if stage == 2 else "ds_zero3_offload.json")
    flags = ["--model", models(kind), "--manifest", manifest, *FLAGS, "--lora_r", lora_r, "--lora_dropout", 0]
    output = run(SCRIPT, *flags, "--deepspeed", json_file, "--output_dir", "run", cwd=tmp_path, ranks=ranks)
    folder = tmp_path / "run/model"
    assert len(losses(tmp_path / "run")) == 3 and "Traceback" not in output
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert name in output and not (tmp_path / "run/model/adapter/README.md").exists()
    model, loading = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first = json.loads((tmp_path / "run/samples/answers.jsonl").read_text().splitlines()[0])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    video = next(manifest.parent / row["video"] for row in rows if row.get("answer", "") == first["answer"])
    said = run(SCRIPT, "--predict", video, "--question", first["question"], "--model", folder, cwd=tmp_path)
    assert said.endswith(first["said"] + "\n")
    if lora_r:
        check_merged(folder, models(kind), model.eval(), ranks)


def check_merged(folder: Path, below: Path, merged, ranks: int) -> None:
    """Merged weights and base model with adapter give the same logits, and not those of the base alone"""
    from peft import PeftModel

    cfg = Config(report_to="none", dtype="fp32", frames=4, max_pixels=3000)
    base = llava_vtt.open_base(str(folder), cfg.max_pixels)
    batch = VideoCollator(base, cfg)([(clip(0, base), TALKS[:1])])
    plain = llava_vtt.load_vlm(below, base, cfg).eval()
    with torch.no_grad():
        before = llava_vtt.supervised_loss(plain, batch)[0].item()
        beside = llava_vtt.supervised_loss(
            PeftModel.from_pretrained(plain, folder / "adapter").eval(), batch
        )[0].item()
        whole = llava_vtt.supervised_loss(merged, batch)[0].item()
    assert whole == pytest.approx(beside, rel=1e-5) and abs(whole - before) > 1e-4 * abs(before)


@pytest.mark.parametrize("projector", [True, False])
def test_an_adapter_is_what_vllm_serves_or_says_why_not(models, manifest, tmp_path, projector):
    """vLLM's rules for adapters (PEFTHelper, 2026): no modules_to_save, no bias, no DoRA, rank up to
    --max_lora_rank, 16 by default"""
    flags = ["--model", models("qwen3_vl"), "--manifest", manifest, *FLAGS, *LORA, "--output_dir", "run"]
    run(SCRIPT, *flags, *([] if projector else ["--no_train_projector"]), cwd=tmp_path)
    folder = tmp_path / "run/model"
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    card = (folder / "README.md").read_text()
    assert (config["modules_to_save"] is None) != projector and ("vLLM does not serve" in card) == projector
    assert config["bias"] == "none" and not config["use_dora"] and config["r"] <= 16
    from safetensors import safe_open

    with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as file:
        others = [
            name
            for name in file.keys()
            if not re.search(r"language_model\.layers\.\d+\..*\.lora_[AB]\.weight$", name)
        ]
    assert bool(others) == projector


def test_the_cards_plain_lines_load_the_model_in_a_fresh_process(models, manifest, tmp_path):
    flags = ["--model", models("smolvlm"), "--manifest", manifest, *FLAGS, *LORA, "--output_dir", "run"]
    run(SCRIPT, *flags, cwd=tmp_path)
    card = (tmp_path / "run/model/README.md").read_text()
    lines = re.search(r"Without these scripts.*?```python\n(.*?)```", card, re.S)[1]
    operators = "import torch\n" + "".join(
        f'torch.library.define("torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
        for name in ("nms", "qnms")
    )  # torchvision here is not of this torch
    check = '\nassert "llava_vtt" not in __import__("sys").modules\nprint(type(model).__name__, type(processor).__name__)'
    done = subprocess.run(
        [sys.executable, "-c", operators + lines + check],
        cwd=tmp_path / "run/model",
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["SmolVLMForConditionalGeneration", "SmolVLMProcessor"], done.stderr


def test_an_adapter_as_the_model_is_called_by_its_name(models, manifest, tmp_path):
    flags = ["--manifest", manifest, *FLAGS, *LORA, "--output_dir"]
    run(SCRIPT, "--model", models("llava_onevision"), *flags, "run", "--adapter_only", cwd=tmp_path)
    assert not (tmp_path / "run/model/model.safetensors").exists()
    output = run(SCRIPT, "--model", "run/model", *flags, "other", cwd=tmp_path, expect=2)
    assert f"is a LoRA adapter of {models('llava_onevision')}" in output
    run(
        SCRIPT,
        "--predict",
        manifest.parent / "0.mp4",
        "--question",
        "Where?",
        "--model",
        "run/model",
        cwd=tmp_path,
    )


def test_a_file_of_questions_is_answered_line_by_line_by_one_model(models, manifest, tmp_path):
    run(
        SCRIPT,
        "--model",
        models("qwen3_vl"),
        "--manifest",
        manifest,
        *FLAGS,
        *LORA,
        "--output_dir",
        "run",
        cwd=tmp_path,
    )
    rows = [{"video": f"{i % 2}.mp4", "question": f"What number {i}?"} for i in range(3)]
    asked = manifest.parent / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--model", "run/model", "--max_new_tokens", 2, "--frames", 3]
    output = run(SCRIPT, "--predict", asked, *more, cwd=tmp_path)
    each = [
        run(
            SCRIPT,
            "--predict",
            manifest.parent / rows[0]["video"],
            "--question",
            rows[0]["question"],
            *more,
            cwd=tmp_path,
        )
    ]
    assert output.startswith(each[0]) and len(output.split("\n")) == 4
    asked.write_text(json.dumps({"video": "0.mp4"}) + "\n")
    assert "asked.jsonl:1: no question" in run(SCRIPT, "--predict", asked, *more, cwd=tmp_path, expect=2)
    asked.write_text(json.dumps({"video": "nowhere.mp4", "question": "What?"}) + "\n")
    assert "nowhere.mp4: No such file" in run(SCRIPT, "--predict", asked, *more, cwd=tmp_path, expect=2)


def test_a_demo_of_a_class_that_there_is_not_is_refused(tmp_path):
    output = run(SCRIPT, "--demo", "--model", "qwen4_vl", cwd=tmp_path, expect=2)
    assert "--demo --model qwen4_vl: no such tiny model; there are llava, qwen3_vl" in output
    assert not any(tmp_path.iterdir())


@pytest.mark.demo
def test_the_demo_of_another_class_learns_to_see_motion(tmp_path):
    flags = ["--demo", "--model", "qwen3_vl", "--output_dir", "run"]
    code, output = finish(
        start(command(SCRIPT, *flags), tmp_path, OMP_NUM_THREADS=os.cpu_count()), timeout=3000
    )
    assert code == 0, output
    results = json.loads((tmp_path / "run/results.json").read_text())
    kinds = results["tables"]["exact by kind"]
    assert results["score"] > 0.93 and kinds["direction"]["in order"] > 0.9
    assert kinds["direction"]["reversed"] < 0.2 and kinds["direction"]["shuffled"] < 0.5
