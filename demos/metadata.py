"""Questions about videos of which the metadata are made up, and a tiny NLLB: the demo of nllb_vtt.py."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

COLOURS = "red green blue yellow purple white black orange".split()
THINGS = "ball car dog cat boat train bird robot".split()
ACTIONS = {
    "left": "moves to the left", "right": "moves to the right", "jump": "jumps up and down",
    "spin": "spins in place", "stop": "stands still", "chase": "chases a butterfly",
}  # fmt: skip
PLACES = "park street kitchen beach garden room".split()
QUESTIONS = {
    "What is in this video?": "There is a {colour} {thing} in the {place}.",
    "What happens in this video?": "The {colour} {thing} {action} in the {place}.",
    "Describe the video.": "A {colour} {thing} {action} in the {place} for {seconds} seconds.",
    "How long is the video?": "The video lasts {seconds} seconds.",
}


def generated_rows(count: int, seed: int, held_out: bool) -> list[tuple[str, int, dict]]:
    """Records as common.py's records_of gives them: tags in any order, duration, frames; a sentence as the
    answer.

    An eleventh of the combinations of colour, thing and action are never trained on: those are the held-out
    part.
    """
    rng = np.random.default_rng((seed, held_out))
    part = "held_out" if held_out else "train"
    choices = [list(values) for values in (COLOURS, THINGS, ACTIONS, PLACES, QUESTIONS)]
    rows = []
    while len(rows) < count:
        chosen = [int(rng.integers(len(values))) for values in choices]
        if ((7 * chosen[0] + 5 * chosen[1] + 3 * chosen[2]) % 11 == 0) != held_out:
            continue
        colour, thing, action, place, question = (values[i] for values, i in zip(choices, chosen))
        seconds = int(rng.integers(2, 31))
        answer = QUESTIONS[question].format(
            colour=colour, thing=thing, action=ACTIONS[action], place=place, seconds=seconds
        )
        tags = [colour, thing, action, place]
        row = {
            "question": question,
            "answer": answer,
            "tags": [tags[i] for i in rng.permutation(4)],
            "duration": seconds,
            "frames": 30 * seconds,
        }
        rows.append((f"generated {part} ", len(rows) + 1, row | {"split": part}))
    return rows


def build_tiny(folder: Path, seed: int, source_of: Callable[[str, dict, list[str]], str]) -> None:
    """An NLLB of the real classes with 1 M random weights, and its tokenizer with a BPE trained on what the
    demo says, saved as the real one is. It knows three languages. source_of: what the script makes of a
    question and fields of a row"""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    texts = []
    for _, _, row in generated_rows(2000, 0, False):
        texts += [source_of(row["question"], row, ["tags", "duration", "frames"]), row["answer"]]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = NllbTokenizer(
        vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]], src_lang="eng_Latn",
        tgt_lang="eng_Latn", extra_special_tokens=["eng_Latn", "fra_Latn", "deu_Latn"], model_max_length=256,
    )  # fmt: skip
    config = M2M100Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, d_model=128, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=512, decoder_ffn_dim=512, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=256, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
