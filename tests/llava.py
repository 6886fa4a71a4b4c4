"""Tiny random LLaVAs of the real classes, saved as the real one is: folder, processor, safetensors; and rows
about clips."""

import json
from pathlib import Path


def build(
    folder: Path, size: int = 384, patch: int = 14, width: int = 32, words: str = "", chatml: bool = True
) -> Path:
    """(size / patch)^2 tokens a frame: 27 x 27 by default, as llava-interleave-qwen has. Byte-level BPE: it
    can say anything."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if chatml else ["<s>", "</s>"]), "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(["user assistant What happens in this video?", words], learn)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[2],
        pad_token=special[0],
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": size, "width": size}), tokenizer=tokenizer,
        patch_size=patch, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        chat_template="{{ messages }}",
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        image_size=size, patch_size=patch, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=320, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=False,
        eos_token_id=2, pad_token_id=0, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def real_size_config():
    """llava-hf/llava-interleave-qwen-7b-hf, as its config.json resolves (facts: 8.141 B parameters)."""
    from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16,
        image_size=384, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=152000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=151646,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
