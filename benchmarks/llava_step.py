"""Questions trained on per CPU second: llava_vtt.py against TRL's SFTTrainer, as TRL's example sft_vlm.py
uses it.

    python benchmarks/llava_step.py                                         # CPU, one thread, under 2 minutes
    python benchmarks/llava_step.py --image 378 --width 1024 --layers 12 --vocab 150000    # for a GPU: 729 tokens a frame

All rows train the same random LLaVA (llava_vtt.py's tiny one, made larger) on the same clips, four questions
each, in one process: full fine-tuning with the vision tower frozen, AdamW, fp32 on a CPU and bf16 autocast on
a GPU (there the clock is the wall's), no DeepSpeed. Every update is about the same number of questions. TRL
has its own loop and its defaults but for max_length=None, since its default cuts clips off. Rounds go through
all rows in turn, so that a noisy machine hurts all; medians.

A step is everything from the end of one update to the end of the next, data included. TRL decodes its images
column and runs its collator; llava_vtt.py loads .npy frames, as from its cache, in its thread. TRL's images
are those same frames, already resized: it is spared the decoding and shrinking of full pictures, which it
would do anew in every step of a real run. With --cache_features llava_vtt.py reads the tower's output from
disk, made before the clock starts.

Predicted before the first measurement, as speed against TRL's defaults: loss on answers alone 0.97, the same
without gradient checkpointing 1.25, llava_vtt.py with one question a sequence 1.5, that with cached features
1.9, four questions as branches of one prefix 5.0, those with cached features 6.5. The second to fourth rows
train the very same thing (their batches are checked to be equal), and the branches too (tests compare their
loss and gradients with separate samples). Measured: RESULTS.md. On a GPU with Triton, TRL too runs the head
on supervised positions alone: expect a smaller gap there. TRL is no requirement of the scripts: pip install
trl==1.16.0.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process; the Trainer would spread over all GPUs
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

common.mend_torchvision()  # before anything imports transformers

import numpy as np
import transformers
import trl
from clock import CUDA, DEVICE, device_name, now
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import llava_vtt
from demos.scenes import build_tiny, draw_scene, questions_of
from llava_vtt import (
    Base,
    Config,
    Sample,
    VideoCollator,
    choose_trained,
    get_batch,
    load_vlm,
    open_base,
    supervised_loss,
    tower_output,
    with_features,
)

QUESTIONS = 4  # a clip


def build(folder: Path, args: argparse.Namespace) -> None:
    """llava_vtt.py's tiny LLaVA and its processor with other sizes."""
    build_tiny(folder, 0, "llava", llava_vtt.TEMPLATE)
    processor, config = AutoProcessor.from_pretrained(folder), LlavaConfig.from_pretrained(folder)
    processor.image_processor.size, processor.patch_size = {"height": args.image, "width": args.image}, 14
    config.image_seq_length = (args.image // 14) ** 2
    vision, width = config.vision_config, args.vision_width
    vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size = (
        args.image,
        14,
        width,
        4 * width,
    )
    vision.num_hidden_layers, vision.num_attention_heads = args.vision_layers, width // 40
    sizes = dict(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width // 12 * 32,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 128, max_position_embeddings=32768, layer_types=None,
    )  # fmt: skip
    config.text_config = Qwen2Config(**(config.text_config.to_dict() | sizes))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_clips(folder: Path, args: argparse.Namespace) -> list[Sample]:
    """Clips with four questions as llava_vtt.py caches them; one batch more than is trained on, for both
    loaders read ahead."""
    scenes = (draw_scene((0, number)) for number in itertools.count())
    asked = (scene for scene in scenes if len(questions_of(scene)) >= QUESTIONS)
    samples = []
    for number, scene in enumerate(itertools.islice(asked, args.clips * (args.steps + 1))):
        common.save_array(
            folder / f"{number}.npy", scene.draw(args.frames, args.image), np.arange(args.frames)
        )
        talks = tuple((common.QA(*one),) for one in questions_of(scene)[:QUESTIONS])
        samples.append(Sample(folder / f"{number}.npy", talks))
    return samples


def for_trl(samples: list[Sample]) -> Dataset:
    """A row for each question: images and messages, as in sft_vlm.py's data sets."""
    rows = []
    for sample in samples:
        images = [Image.fromarray(frame) for frame in np.load(sample.frames)]
        for qa in sample.qa:
            messages = [{"role": "user", "content": qa.question}, {"role": "assistant", "content": qa.answer}]
            rows.append({"images": images, "messages": messages})
    return Dataset.from_list(rows)


def settings(args: argparse.Namespace, folder: Path, **more) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder / "out"), max_steps=args.steps,
        per_device_train_batch_size=QUESTIONS * args.clips, max_length=None, use_cpu=not CUDA, bf16=CUDA,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


def model_of(base: Base, cfg: Config, ours: bool) -> LlavaForConditionalGeneration:
    model = load_vlm(base.folder, base, cfg)
    if not ours:
        model.model.vision_tower.requires_grad_(False)
    return (choose_trained(model, cfg) if ours else model).to(DEVICE)


class Ours:
    """llava_vtt.py's data, model and loss as its train() has them, with `turns` questions of a clip in a
    sequence, in a plain loop."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        base: Base,
        samples: list[Sample],
        turns: int,
        features: bool,
    ):
        self.cfg = cfg = Config(
            lora_r=0, dtype="fp32", frames=args.frames, max_turns=turns, steps=args.steps + 1, accum=1,
            batch_size=args.clips * QUESTIONS // turns, report_to="none", cache_features=features,
            cache_dir=folder / "cache",
        )  # fmt: skip
        split = [
            Sample(s.frames, s.talks[t : t + turns]) for s in samples for t in range(0, QUESTIONS, turns)
        ]
        self.collate, self.model = VideoCollator(base, cfg), model_of(base, cfg, True)
        if features:
            split = with_features(cfg, base, split)
            for sample in split:
                made = tower_output(self.model, self.collate, sample.load(0))
                sample.features.parent.mkdir(parents=True, exist_ok=True)
                save_file({"features": made}, sample.features)
        self.get_batch = partial(get_batch, [split], self.collate, cfg)

    def get_train_dataloader(self) -> Iterator[dict]:
        return map(self.get_batch, range(self.cfg.steps - 1))

    def train(self, ended: Callable[[], None]) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 5e-5, fused=True)
        for step, batches in enumerate(common.batches_ahead(self.get_batch, self.cfg, 0), 1):
            batch = {name: value.to(DEVICE) for name, value in batches[0].items()}
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                loss, tokens = supervised_loss(self.model, batch)
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ended()
            if step == self.cfg.steps - 1:  # the last batch is the one that both loaders read ahead
                break


class Clock(TrainerCallback):
    """When each update ended, on the device's own clock."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(now())


def run(trainer: SFTTrainer | Ours) -> list[float]:
    """-> when each of its updates ended"""
    clock = Clock()
    if isinstance(trainer, Ours):
        trainer.train(clock.on_step_end)
    else:
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.ends


def look(trainer: SFTTrainer | Ours, questions: int) -> tuple[float, float, float]:
    """(ms of the data per question, tokens per sequence, supervised ones among them), over all batches"""
    list(trainer.get_train_dataloader())  # warm-up
    start = now()
    batches = list(trainer.get_train_dataloader())
    spent = now() - start
    rows = sum(len(batch["input_ids"]) for batch in batches)
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    real = ((batch["branch"] >= 0) if "branch" in batch else batch["attention_mask"] for batch in batches)
    tokens = sum(int(mask.sum()) for mask in real)
    return 1000 * spent / questions, tokens / rows, supervised / rows


def check_same(theirs: SFTTrainer, rows: Dataset, mine: Ours, sample: Sample) -> None:
    """TRL's answers-only batch and ours of one question: the same tokens, labels and pixels, so the same
    training. TRL's has a line feed after the end of the answer."""
    a, b = theirs.data_collator([rows[0]]), mine.collate([(sample.load(0), sample.talks[:1])])
    a |= {name: a[name][:, : b["input_ids"].shape[1]] for name in ("input_ids", "attention_mask", "labels")}
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "image": 112,
        "frames": 5,
        "width": 256,
        "layers": 6,
        "vision_width": 160,
        "vision_layers": 4,
        "vocab": 1800,
    }
    for name, value in (sizes | {"clips": 1, "steps": 4, "rounds": 5}).items():  # clips per update
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    build(folder, args)
    base, samples = open_base(str(folder), 1), make_clips(folder, args)
    ours = partial(Ours, args, folder, base, samples)
    rows, cfg = for_trl(samples), Config(lora_r=0, dtype="fp32", report_to="none")

    def peer(**how) -> SFTTrainer:
        model = model_of(base, cfg, False)
        return SFTTrainer(
            model, settings(args, folder, **how), train_dataset=rows, processing_class=base.processor
        )

    makers = {
        "TRL SFTTrainer, defaults": peer,
        "TRL, assistant_only_loss": lambda: peer(assistant_only_loss=True),
        "TRL, that without checkpointing": lambda: peer(
            assistant_only_loss=True, gradient_checkpointing=False
        ),
        "llava_vtt.py, one question a sequence": lambda: ours(1, False),
        "that with --cache_features": lambda: ours(1, True),
        "llava_vtt.py, four questions as branches": lambda: ours(QUESTIONS, False),
        "those with --cache_features": lambda: ours(QUESTIONS, True),
    }
    _, theirs, _, mine, *_ = makers.values()
    check_same(theirs(), rows, mine(), samples[0])
    looks = [look(make(), QUESTIONS * len(samples)) for make in makers.values()]
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(args.rounds):
        for name, make in makers.items():
            ends = run(make())
            steps = len(ends) - 1  # the first one is the warm-up
            times[name].append((ends[-1] - ends[0]) / (steps * args.clips * QUESTIONS))

    medians = {name: statistics.median(column) for name, column in times.items()}
    parameters = [(p.numel() / 1e6, p.requires_grad) for p in model_of(base, cfg, True).parameters()]
    every, trained = sum(count for count, _ in parameters), sum(count for count, grad in parameters if grad)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    print(f"{args.frames} frames of {args.image}x{args.image}, {(args.image // 14) ** 2} tokens each, "
          f"{QUESTIONS * args.clips} questions per update; {every:.1f} M parameters, {trained:.1f} M "
          "trained; "
          f"{device_name(DEVICE)}, {versions}\n")  # fmt: skip
    print(
        "| | tokens per sequence | supervised | data, ms per question | questions per "
        f"{'s' if CUDA else 'CPU s'} | ratio |"
    )
    print("|---|---|---|---|---|---|")
    for (name, seconds), (data, tokens, supervised) in zip(medians.items(), looks):
        ratio = medians["TRL SFTTrainer, defaults"] / seconds
        print(f"| {name} | {tokens:.0f} | {supervised:.1f} | {data:.1f} | {1 / seconds:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
