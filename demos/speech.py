"""Coloured clips, spoken numbers and spoken replies, and a tiny LongCat-Flash-Omni: the demo of
longcat_vss.py."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from common import made_once, usable_cores, write_mp4
from demos.shapes import COLOURS

# as longcat_vss.py has it
SAMPLE_RATE = 16_000
# Words are two syllables. The colour that fills the clip and the number that is heard make the reply: 6 x 4
# of them.
WORDS = {"red": "seta", "green": "miso", "blue": "tume", "yellow": "mati", "magenta": "sumo", "cyan": "tosi"}
NUMBERS = ("samu", "tiso", "metu", "tami")
# Hz, of men's vowels: Peterson and Barney 1952, table II
FORMANTS = {
    "a": (730, 1090, 2440), "e": (530, 1840, 2480), "i": (270, 2290, 3010), "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}  # fmt: skip
DEMO_SECONDS = 2.0
NUM_TRAIN, NUM_HELD_OUT = 1536, 96


def voiced(length: int, pitch: float, formants: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Harmonics of `pitch` Hz, loud around the formants. -> (length,), peak 0.4"""
    pitch = pitch * rng.uniform(0.97, 1.03)
    harmonic = pitch * np.arange(1, int(4000 / pitch) + 1)
    loud = sum(1 / (1 + ((harmonic - formant) / 90) ** 2) / (i + 1) for i, formant in enumerate(formants))
    phase = rng.uniform(0, 2 * np.pi, len(harmonic))
    time_axis = np.arange(length)[:, None] / SAMPLE_RATE
    sound = (loud * np.sin(2 * np.pi * harmonic * time_axis + phase)).sum(1)
    return 0.4 * sound / abs(sound).max()


def say(word: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A word of consonant-vowel syllables (s, t, m; a, e, i, o, u) as float32 (N,) at 16 kHz, a little
    different each time."""
    parts = []
    for consonant, vowel in zip(word[::2], word[1::2]):
        length = int(SAMPLE_RATE * rng.uniform(0.075, 0.09))
        if consonant == "m":
            # a low hum
            parts.append(0.25 * voiced(length, pitch, (250, 1000, 2200), rng))
        else:
            # noise above 3 kHz: long for s, a short burst after silence for t
            noise = np.diff(rng.standard_normal(length + 2), 2) / 6
            long, burst = np.hanning(length), np.maximum(0, np.linspace(-2, 1, length)) ** 2
            parts.append(0.5 * noise * (long if consonant == "s" else burst))
        length = int(SAMPLE_RATE * rng.uniform(0.13, 0.15))
        to_the_edge = np.minimum(np.arange(length), np.arange(length)[::-1])
        rise = np.minimum(1, to_the_edge / (0.015 * SAMPLE_RATE))
        parts.append(voiced(length, pitch, FORMANTS[vowel], rng) * rise)
    return np.concatenate(parts).astype(np.float32)


def make_clip(
    folder: Path, number: int, held_out: bool, adapted: bool, seed: int, write_wav: Callable[..., None]
) -> None:
    """One sample folder: a clip filled with a colour in which a grey square drifts, a number that some voice
    says over and over, and the reply. `adapted`: colours have other words, spoken by a higher voice."""
    rng = np.random.default_rng((seed, held_out, adapted, number))
    colour, heard = str(rng.choice(list(WORDS))), str(rng.choice(NUMBERS))

    size, frames = 56, int(2 * DEMO_SECONDS)
    clip = np.full((frames, size, size, 3), 25.0) + 200 * np.array(COLOURS[colour])
    place, drift = rng.uniform(0, size - 12, 2), rng.uniform(-8, 8, 2)
    for i, picture in enumerate(clip):
        x, y = np.clip(place + drift * i, 0, size - 12).astype(int)
        picture[y : y + 12, x : x + 12] = 128
    clip = np.clip(clip + rng.normal(0, 12, 3) + rng.normal(0, 8, clip.shape), 0, 255).astype(np.uint8)

    question = np.tile(say(heard, rng.uniform(90, 190), rng), 8)[: int(SAMPLE_RATE * DEMO_SECONDS)]
    # a room is never silent
    question += rng.normal(0, 0.003, len(question))

    word = WORDS[colour]
    if adapted:
        others = list(WORDS.values())
        word = others[(others.index(word) + 2) % len(others)]
    pitch = 190 if adapted else 115
    reply = np.concatenate([say(word, pitch, rng), say(heard, pitch, rng)])

    folder.mkdir(parents=True)
    write_mp4(clip, folder / "in.mp4", fps=2)
    write_wav(folder / "in.wav", question)
    write_wav(folder / "out.wav", reply)
    (folder / "out.txt").write_text(f"{word} {heard}\n")


def make_data(cfg: Any, adapted: bool, write_wav: Callable[..., None]) -> Path:
    """Rank 0: the demo's folder of samples, made once; a shorter demo needs fewer."""
    train = min(NUM_TRAIN, cfg.steps * cfg.batch_size * cfg.accum)
    test = min(NUM_HELD_OUT, cfg.eval_samples)
    wanted = [("train", number) for number in range(train)] + [("test", number) for number in range(test)]

    def make(aside: Path) -> None:
        def make_one(one: tuple[str, int]) -> None:
            part, number = one
            folder = aside / part / f"{number + 1:03d}"
            make_clip(folder, number, part == "test", adapted, cfg.seed, write_wav)

        with ThreadPoolExecutor(cfg.num_workers or usable_cores()) as pool:
            list(pool.map(make_one, wanted))

    kind = "adapted" if adapted else "base"
    # the last 1: version of what is made
    return made_once(cfg.cache_dir / f"longcat_vss_demo_{cfg.seed}_{kind}_{train}_{test}_1", make)


def tiny_tokenizer() -> Any:
    """Byte-level, trained on what the demo says, with the special tokens of the real one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<longcat_s>", "</longcat_s>", "<longcat_pad>"]
    special += [f"<mask_{i}>" for i in range(110, 120)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=352, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    said = [f"{word} {number}" for word in WORDS.values() for number in NUMBERS]
    prompt = "USER:second{0.0}:second{1.0}:second{0.6}:\nVOICE ASSISTANT:"
    bpe.train_from_iterator(said + [prompt] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<longcat_s>", eos_token="</longcat_s>",
        pad_token="<longcat_pad>",
    )  # fmt: skip


def build_tiny(folder: Path, seed: int, script: ModuleType) -> None:
    """A LongCat-Flash-Omni of 1.6 M random weights, 8 real experts and 4 identities, in the real files: its
    tokenizer, statistics of the demo's speech, codes of 4 x 64. script: longcat_vss.py, which has its
    classes"""
    import kaldiio
    import torch
    from torch import nn
    from transformers import LongcatFlashConfig

    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer()
    config = LongcatFlashConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_layers=2, num_attention_heads=4, ffn_hidden_size=256,
        q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, head_dim=8, v_head_dim=32,
        moe_topk=3, n_routed_experts=8, zero_expert_num=4, expert_ffn_hidden_size=64,
        max_position_embeddings=2048, pad_token_id=3, routed_scaling_factor=2.0,
    )  # fmt: skip
    vision = script.VISION | dict(
        hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4,
        initializer_factor=1.0, adaptor_dim=128,
    )  # fmt: skip
    audio = script.AUDIO | dict(
        hidden_size=128, proj_size=64, vocab_size=8, nlayer=3, ndnn=1, num_right_layers=2, dropout=0.1
    )
    front = {
        "fbank": {"freq": SAMPLE_RATE, "frame_length": 25, "frame_shift": 10, "num_mel_bins": 80,
                  "low_freq": 20, "high_freq": 7800, "preemphasis": 0.97, "dither": 0.0},
        "delta": {"delta_order": 0, "window_size": 2}, "cmvn": {"global_cmvn": "global_cmvn"},
        "splice": {"left": 7, "right": 7, "stride": 8, "random_start": False, "seed": 0},
    }  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in script.SPECIAL.items()}
    plain_rows = (np.zeros(80), np.ones(80))
    codes = script.CODEC_OFFSET + 64
    base = script.Base("", None, config, tokenizer, vision, audio, front, plain_rows, ids, codes)

    heard = [np.tile(say(str(rng.choice(NUMBERS)), rng.uniform(90, 190), rng), 3) for _ in range(32)]
    features = [script.speech_features(s + rng.normal(0, 0.003, len(s)), base) for s in heard]
    # the middle one of 15 frames
    rows = np.concatenate([feature[:, 560:640] for feature in features])
    stats = np.stack([np.append(rows.sum(0), len(rows)), np.append((rows**2).sum(0), 0)])

    torch.manual_seed(seed)
    net = script.Omni(base)
    for name, module in net.named_modules():
        # 0.02 and the like are for models that are fifty times as wide
        linear = isinstance(module, (nn.Linear, nn.Conv3d, nn.Conv1d))
        if linear and not name.startswith(("llm.", "audio_heads.")):
            gain = 1.0 if isinstance(module, nn.Conv1d) else 2.0
            nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    (folder / "audio").mkdir(parents=True)
    kaldiio.save_mat(str(folder / "audio" / "global_cmvn"), stats.astype(np.float32))
    script.write_omni(folder, dict(net.state_dict()), base)
