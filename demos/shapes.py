"""Moving shapes with captions: what t2v_ddpm.py and t2v_rflow.py learn in their demos, and how their samples
are read back."""

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common import encode_clip, made_once

# {attribute: value}; caption_of makes a sentence of it
Caption = dict[str, str]
COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
}  # fmt: skip
# x to the right, y downwards
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# travel over the clip, in frame widths
SPEEDS = {"slowly": 0.22, "quickly": 0.40}
# radius of the circle of equal area, in frame widths
RADII = {"small": 0.20, "large": 0.30}
# sides of a pillar and a beam, over and under those of a square: longer ones would be cut off at the edges
LONG = 1.25
# what each script learns
DDPM_SHAPES = ("circle", "square", "triangle")
RFLOW_SHAPES = ("square", "pillar", "beam")
NUM_GENERATED = 4096
# of t2v_rflow.py, a quarter of the clips each: height and width in pixels, frames
MADE = ((12, 4), (12, 6), (16, 4), (16, 6))


def attributes_of(shapes: tuple[str, ...]) -> dict[str, Iterable[str]]:
    return {"shape": shapes, "colour": COLOURS, "move": MOVES, "speed": SPEEDS, "size": RADII}


def all_captions(shapes: tuple[str, ...]) -> list[Caption]:
    """The combinations of attributes, 288 of three shapes"""
    attributes = attributes_of(shapes)
    return [dict(zip(attributes, values)) for values in itertools.product(*attributes.values())]


def caption_of(a: Caption) -> str:
    return f"a {a['size']} {a['colour']} {a['shape']} moving {a['move']} {a['speed']}"


def attributes_in(caption: str) -> Caption:
    """The inverse of caption_of"""
    pattern = r"a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) moving (?P<move>\w+) (?P<speed>\w+)"
    match = re.match(pattern, caption)
    return match.groupdict() if match else {}


def is_held_out(a: Caption, shapes: tuple[str, ...]) -> bool:
    """A seventh of the combinations of shape, colour and move are never trained on."""
    shape = shapes.index(a["shape"])
    colour = list(COLOURS).index(a["colour"])
    move = list(MOVES).index(a["move"])
    return (2 * shape + 5 * colour + 3 * move) % 7 == 0


def held_out_captions(shapes: tuple[str, ...]) -> list[Caption]:
    return [a for a in all_captions(shapes) if is_held_out(a, shapes)]


def coverage(centres: np.ndarray, radius: float, shape: str, size: int) -> np.ndarray:
    """How much of each pixel the shape covers: centres (F, 2) in frame widths -> (F, size, size) in [0, 1].

    From signed distances to the edge; all shapes have the area pi radius^2.
    """
    pixel = (np.arange(size) + 0.5) / size
    dx = pixel[None, None, :] - centres[:, 0, None, None]
    dy = pixel[None, :, None] - centres[:, 1, None, None]
    if shape == "circle":
        distance = np.sqrt(dx**2 + dy**2) - radius
    elif shape == "triangle":
        # radius of the circle inside the equilateral triangle
        inner = radius * math.sqrt(math.pi / math.sqrt(3)) / math.sqrt(3)
        distance = np.maximum(dy - inner, (math.sqrt(3) * abs(dx) - dy) / 2 - inner)
    else:
        side = radius * math.sqrt(math.pi) / 2
        tall = {"square": 1, "pillar": LONG, "beam": 1 / LONG}[shape]
        distance = np.maximum(abs(dx) - side / tall, abs(dy) - side * tall)
    return np.clip(0.5 - distance * size, 0, 1)


def draw_clip(a: Caption, frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One shape that moves on black and keeps a radius off the edges. -> uint8 (F, H, W, 3)"""
    radius = RADII[a["size"]]
    travel = np.array(MOVES[a["move"]]) * SPEEDS[a["speed"]]
    low = radius + np.maximum(-travel, 0)
    high = 1 - radius - np.maximum(travel, 0)
    start = low + (high - low) * rng.uniform(0.2, 0.8, 2)
    centres = start + travel * np.linspace(0, 1, frames)[:, None]
    clip = coverage(centres, radius, a["shape"], size)[..., None] * np.array(COLOURS[a["colour"]])
    return (clip * 255).round().astype(np.uint8)


def read_clip(clip: np.ndarray, shapes: tuple[str, ...]) -> Caption:
    """The attributes seen in a uint8 (F, H, W, 3) clip; {} unless it shows one compact object of plausible
    size throughout."""
    x = clip.astype(np.float64) / 255
    frames, size = x.shape[:2]
    # foreground, without the noise floor
    weight = np.clip((x.max(-1) - 0.25) / 0.5, 0, 1)
    area = weight.sum((1, 2)) + 1e-6
    pixel = (np.arange(size) + 0.5) / size
    sums = [(weight * pixel).sum((1, 2)), (weight * pixel[:, None]).sum((1, 2))]
    centres = np.stack(sums, 1) / area[:, None]
    radius = math.sqrt(area.mean() / size**2 / math.pi)

    around = (pixel - centres[:, 0, None, None]) ** 2 + (pixel[:, None] - centres[:, 1, None, None]) ** 2
    spread = ((weight * around).sum((1, 2)) / area).mean()
    small, large = RADII.values()
    plausible = 0.6 * small < radius < 1.5 * large
    compact = spread < 1.6 * radius**2
    throughout = area.min() > 0.3 * area.max()
    if not (plausible and compact and throughout):
        return {}

    # least squares over the clip
    clock = np.linspace(-0.5, 0.5, frames)
    travel = (centres * clock[:, None]).sum(0) / (clock**2).sum()
    distance = np.linalg.norm(travel)
    still = distance < min(SPEEDS.values()) / 2
    colour = (x * weight[..., None]).sum((0, 1, 2)) / area.sum()
    errors = {shape: ((coverage(centres, radius, shape, size) - weight) ** 2).mean() for shape in shapes}
    return {
        "shape": min(errors, key=errors.get),
        "colour": min(COLOURS, key=lambda name: ((colour - COLOURS[name]) ** 2).sum()),
        "move": "none" if still else max(MOVES, key=lambda name: travel @ np.array(MOVES[name])),
        "speed": "quickly" if distance > np.mean(list(SPEEDS.values())) else "slowly",
        "size": "large" if radius > np.mean(list(RADII.values())) else "small",
    }


def asked_is_made(clips: np.ndarray, asked: list[Caption], shapes: tuple[str, ...]) -> dict[str, float]:
    """Share of uint8 (N, F, H, W, 3) clips that show what was asked, per attribute and for all five at
    once."""
    seen = [read_clip(clip, shapes) for clip in clips]
    hits = {name: [s.get(name) == a[name] for s, a in zip(seen, asked)] for name in attributes_of(shapes)}
    hits["all_five"] = [all(hit) for hit in zip(*hits.values())]
    return {name: float(np.mean(values)) for name, values in hits.items()}


def score_and_control(clips: np.ndarray, asked: list[Caption], shapes: tuple[str, ...]) -> tuple[dict, dict]:
    """asked_is_made, and the same clips held against each other's captions."""
    shuffled = asked[7:] + asked[:7]
    return asked_is_made(clips, asked, shapes), asked_is_made(clips, shuffled, shapes)


def generated_clips(seed: int, frames: int, size: int) -> tuple[list[np.ndarray], list[tuple[str]], set[int]]:
    """For t2v_ddpm.py -> (clips, the caption of each, the numbers of those held out)"""
    rng = np.random.default_rng(seed)
    captions = all_captions(DDPM_SHAPES)
    drawn = [captions[i] for i in rng.integers(len(captions), size=NUM_GENERATED)]
    clips = [draw_clip(a, frames, size, rng) for a in drawn]
    held_out = {i for i, a in enumerate(drawn) if is_held_out(a, DDPM_SHAPES)}
    return clips, [(caption_of(a),) for a in drawn], held_out


def write_lossless(clip: np.ndarray, path: Path, fps: int) -> None:
    """uint8 (F, H, W, 3) -> FFV1 with its last frame twice: a bucket takes clips that are longer than it"""
    encode_clip(np.concatenate([clip, clip[-1:]]), path, fps, "ffv1", "bgr0", {}, {})


def make_data(cfg: Any) -> Path:
    """For t2v_rflow.py, rank 0: a manifest of captioned clips, lossless, made once; a shorter demo needs
    fewer."""
    count = NUM_GENERATED if cfg.steps >= 100 else 192

    def make(folder: Path) -> None:
        rng = np.random.default_rng(cfg.seed)
        captions = all_captions(RFLOW_SHAPES)
        lines = ["path,text,num_frames,height,width,fps"]
        for number in range(count):
            size, frames = MADE[number % len(MADE)]
            a = captions[rng.integers(len(captions))]
            name = f"{number:05d}.mkv"
            write_lossless(draw_clip(a, frames, size, rng), folder / name, cfg.fps)
            lines.append(f"{name},{caption_of(a)},{frames + 1},{size},{size},{cfg.fps}")
        (folder / "clips.csv").write_text("\n".join(lines) + "\n")

    # the last 2: version of what is made
    return made_once(cfg.cache_dir / f"t2v_rflow_demo_{cfg.seed}_{count}_2", make) / "clips.csv"


def build_text_encoder(folder: Path, seed: int) -> None:
    """For t2v_ddpm.py: a CLIP text encoder of the real class with random weights, and a tokenizer that knows
    the captions' words, saved as the real ones are"""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = sorted({word for a in all_captions(DDPM_SHAPES) for word in caption_of(a).split()})
    known = {word: i for i, word in enumerate(["<pad>", "<start>", "<end>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(known), hidden_size=512, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=8, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)


def build_vae(folder: Path, seed: int) -> None:
    """For t2v_ddpm.py: diffusers' AutoencoderKL, 2 x 2 pixels to a latent of 4 channels, taught to draw the
    shapes in half a minute, and scaled as the published ones are"""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    clips = [draw_clip(a, 4, 16, rng) for a in all_captions(DDPM_SHAPES)]
    pictures = torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2) / 127.5 - 1
    optimizer, steps = torch.optim.AdamW(vae.parameters(), 3e-3), 600
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        x = pictures[torch.from_numpy(rng.integers(len(pictures), size=16))]
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().mean()
        (error + 1e-4 * posterior.kl().mean() / x[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(pictures).latent_dist.mean.std().item())
    vae.save_pretrained(folder)
