"""Clips of shapes that move or stay, with questions about them, and a tiny LLaVA: the demo of llava_vtt.py.

One shape stays or crosses half the frame; sometimes another, smaller and of another colour, stands behind it.
The same pictures in another order show another direction.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demos.shapes import COLOURS, MOVES

# height and width, pixels
DEMO_SIZE = 32
SHAPES = ("square", "ring", "cross")
NUM_HELD_OUT = 400
KINDS = ("llava", "qwen3_vl")  # of tiny models


@dataclass(frozen=True)
class Scene:
    """What a generated clip shows, and the seed of where and how large. The move "" stays; `other`, if there
    is a second shape, is its shape and colour."""

    seed: tuple[int, int]
    shape: str
    colour: str
    move: str
    other: tuple[str, str] | None

    def draw(self, frames: int, size: int = DEMO_SIZE) -> np.ndarray:
        """-> uint8 (F, H, W, 3)"""
        rng = np.random.default_rng((*self.seed, 1))
        radius = rng.uniform(0.15, 0.18)
        travel = np.array(MOVES.get(self.move, (0, 0))) * rng.uniform(0.5, 0.62)
        low = radius + np.maximum(-travel, 0)
        high = 1 - radius - np.maximum(travel, 0)
        centres = rng.uniform(low, high) + travel * np.linspace(0, 1, frames)[:, None]
        clip = np.full((frames, size, size, 3), rng.uniform(0, 0.15))
        if self.other:
            shape, colour = self.other
            place = np.tile(rng.uniform(0.8 * radius, 1 - 0.8 * radius, 2), (frames, 1))
            clip[outline(place, 0.8 * radius, shape, size)] = COLOURS[colour]
        clip[outline(centres, radius, self.shape, size)] = COLOURS[self.colour]
        return np.clip(clip * 255 + rng.normal(0, 5, clip.shape), 0, 255).astype(np.uint8)


def draw_scene(seed: tuple[int, int]) -> Scene:
    """The scene that this seed draws."""
    rng = np.random.default_rng(seed)
    shape, other = rng.choice(SHAPES, 2)
    colour, second = rng.choice(list(COLOURS), 2, replace=False)
    move = str(rng.choice(list(MOVES))) if rng.random() < 0.75 else ""
    behind = (str(other), str(second)) if rng.random() < 0.35 else None
    return Scene(seed, str(shape), str(colour), move, behind)


def draw_scenes(seed: int, count: int) -> list[Scene]:
    return [draw_scene((seed, number)) for number in range(count)]


def questions_of(scene: Scene) -> list[tuple[str, str, str]]:
    """[(question, answer, kind)]. With a second shape, what stays cannot be asked for: which of the two?"""
    asked = [
        ("Which way does the shape move?", scene.move or "it stays", "direction" if scene.move else "moving"),
        ("Does a shape move?", "yes" if scene.move else "no", "moving"),
        ("How many shapes are there?", "two" if scene.other else "one", "count"),
    ]
    if scene.move:
        asked.append(("What colour is the moving shape?", scene.colour, "colour"))
        asked.append(("What shape moves?", scene.shape, "shape"))
    elif not scene.other:
        asked.append(("What colour is the shape?", scene.colour, "colour"))
        asked.append(("What shape is it?", scene.shape, "shape"))
    return asked


def outline(centres: np.ndarray, radius: float, shape: str, size: int) -> np.ndarray:
    """Which pixels the shape covers: centres (F, 2) in frame widths -> bool (F, size, size)"""
    pixel = (np.arange(size) + 0.5) / size
    dx = abs(pixel[None, None, :] - centres[:, 0, None, None])
    dy = abs(pixel[None, :, None] - centres[:, 1, None, None])
    if shape == "square":
        return np.maximum(dx, dy) < radius
    if shape == "ring":
        distance = np.hypot(dx, dy)
        return (distance < radius) & (distance > radius / 2)
    return (np.minimum(dx, dy) < 0.3 * radius) & (np.maximum(dx, dy) < radius)


def build_tiny(folder: Path, seed: int, kind: str, template: str) -> None:
    """A VLM of the real classes with 0.5 M random weights, and its processor, saved as the real one is:
    byte-level BPE trained on what the demo asks and answers. kind, of KINDS: llava (SigLIP, projector, Qwen2,
    with this chat template; 16 tokens a frame) or qwen3_vl (16 tokens for two frames, which are one patch in
    time)."""
    import torch
    import transformers
    from torch import nn

    marks = ["<image>"] if kind == "llava" else QWEN_MARKS
    tokenizer = train_tokenizer(marks)
    token = tokenizer.convert_tokens_to_ids
    # mean and deviation of the generated clips
    colours = {"image_mean": [0.16] * 3, "image_std": [0.25] * 3}
    language = dict(
        vocab_size=512, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if kind == "llava":
        size = {"height": DEMO_SIZE, "width": DEMO_SIZE}
        processor = transformers.LlavaProcessor(
            image_processor=transformers.SiglipImageProcessor(size=size, **colours), tokenizer=tokenizer,
            patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=0,
            chat_template=template,
        )  # fmt: skip
        vision = transformers.SiglipVisionConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            image_size=DEMO_SIZE, patch_size=8, vision_use_head=False,
        )  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**language),
            image_token_index=token("<image>"), image_seq_length=16, vision_feature_select_strategy="full",
            vision_feature_layer=-1, tie_word_embeddings=True,
        )  # fmt: skip
        model_class = transformers.LlavaForConditionalGeneration
    else:
        patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **colours}
        pixels = {"shortest_edge": 2 * 16**2, "longest_edge": 64 * 64**2}
        processor = transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(size=pixels, **patches), tokenizer=tokenizer,
            video_processor=transformers.Qwen3VLVideoProcessor(size=pixels, **patches),
            chat_template=QWEN_TEMPLATE,
        )  # fmt: skip
        vision = dict(
            depth=2, hidden_size=64, intermediate_size=256, num_heads=4, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=96, num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        )  # fmt: skip
        turning = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        config = transformers.Qwen3VLConfig(
            vision_config=vision, text_config=language | {"head_dim": 16, "rope_parameters": turning},
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
        )  # fmt: skip
        model_class = transformers.Qwen3VLForConditionalGeneration
    torch.manual_seed(seed)
    model = model_class(config)
    for name, weight in model.named_parameters():
        # 0.02, the default, is of models that are ten times as wide
        if weight.ndim == 2 and "embed" not in name:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


QWEN_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# ChatML, as Qwen's own has it for what is asked here
QWEN_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- else %}{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{% endif %}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def train_tokenizer(marks: list[str]):
    """Byte-level BPE trained on what the demo asks and answers, ChatML's tokens and these"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = set()
    for scene in draw_scenes(0, 500):
        for question, answer, _ in questions_of(scene):
            texts.add(f"user\n{question}\nassistant\n{answer}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(sorted(texts), trainer)
    image = {"image_token": marks[0]} if len(marks) == 1 else {}
    extra = image or {f"mark_{i}": mark for i, mark in enumerate(marks)}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=extra
    )
