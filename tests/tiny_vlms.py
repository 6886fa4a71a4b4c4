"""Tiny random VLMs, each of its real classes with its real processors and published chat template, saved as the
real one is. Small are the sizes alone."""

from pathlib import Path

KINDS = ("llava_1_5", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm")

TEMPLATES = {
    # llava-hf/llava-1.5-7b-hf
    "llava_1_5": "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    # llava-hf/llava-onevision-qwen2-7b-ov-hf
    "llava_onevision": "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2_5_vl": "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # Qwen/Qwen3-VL-8B-Instruct, without what it says of tools
    "qwen3_vl": """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].content is string %}
        {{- messages[0].content }}
    {%- else %}
        {%- for content in messages[0].content %}
            {%- if 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif content.type == 'video' or 'video' in content %}
                    {%- set video_count.value = video_count.value + 1 %}
                    {%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content_item in message.content %}
                {%- if 'text' in content_item %}
                    {{- content_item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    # HuggingFaceTB/SmolVLM2-2.2B-Instruct; also in processing_smolvlm.py of transformers
    "smolvlm": "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}
QWEN = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
# (special tokens, eos, pad)
TOKENS = {
    "llava_1_5": (["<unk>", "<s>", "</s>", "<image>", "<pad>"], "</s>", "<pad>"),
    "llava_onevision": ([*QWEN[:3], "<image>", "<video>"], "<|im_end|>", "<|endoftext|>"),
    "qwen2_5_vl": (QWEN, "<|im_end|>", "<|endoftext|>"),
    "qwen3_vl": (QWEN, "<|im_end|>", "<|endoftext|>"),
    "smolvlm": (
        "<|endoftext|> <|im_start|> <end_of_utterance> <fake_token_around_image> <global-img> <image> "
        "<row_1_col_1>".split(),
        "<end_of_utterance>",
        "<|im_start|>",
    ),
}
# Qwen's published defaults of generate(): answers of an evaluation must not depend on them
SAMPLED = dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


def train_tokenizer(kind: str):
    """Byte-level BPE, or Llama's own with a blank before each word, bytes for the rest and <s> in front"""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, eos, pad = TOKENS[kind]
    texts = [
        f"What happens in {i}.5 seconds? USER: It is a red car, ASSISTANT: yes. Frame from 00:0{i}:"
        for i in range(10)
    ]
    llama = kind == "llava_1_5"
    extra, alphabet = {}, pre_tokenizers.ByteLevel.alphabet()
    if llama:
        special, alphabet = special + [f"<0x{byte:02X}>" for byte in range(256)], []
        bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(content=" ", left=1)
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        )
        extra = dict(bos_token="<s>", unk_token="<unk>")
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    size = 600 + len(special) - 5
    splits = bpe.pre_tokenizer
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next") if llama else splits  # no word of two
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        ),
    )
    if llama:
        bpe.pre_tokenizer = None
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
        special = special[:5]
    named = {"image_token": "<image>"} if "<image>" in special else {}
    named |= {
        f"mark_{i}": token
        for i, token in enumerate(special)
        if token not in (eos, pad, "<image>", "<s>", "<unk>")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=named,
        padding_side="left",
        **extra,
    )


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    import torch
    import transformers as tf

    tokenizer = train_tokenizer(kind)
    token = tokenizer.convert_tokens_to_ids
    words = dict(tokenizer=tokenizer, chat_template=TEMPLATES[kind])
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    sampled = {}
    if kind == "llava_1_5":
        pictures = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = tf.LlavaProcessor(
            image_processor=pictures, patch_size=7, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, **words,
        )  # fmt: skip
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(image_size=28, patch_size=7, projection_dim=32, **vision),
            text_config=tf.LlamaConfig(**text), image_token_index=token("<image>"), image_seq_length=16,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip
        model_class = tf.LlavaForConditionalGeneration
    elif kind == "llava_onevision":
        size, grid = {"height": 28, "width": 28}, [[28, 28], [28, 56], [56, 28], [56, 56]]
        processor = tf.LlavaOnevisionProcessor(
            image_processor=tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
            video_processor=tf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16,
            vision_feature_select_strategy="full", **words,
        )  # fmt: skip
        config = tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(image_size=28, patch_size=7, vision_use_head=False, **vision),
            text_config=tf.Qwen2Config(**text), image_token_index=token("<image>"), video_token_index=token("<video>"),
            image_grid_pinpoints=grid, vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip
        model_class = tf.LlavaOnevisionForConditionalGeneration
    elif kind == "smolvlm":
        whole, part = {"longest_edge": 64}, {"longest_edge": 32}
        processor = tf.SmolVLMProcessor(
            image_processor=tf.SmolVLMImageProcessor(size=whole, max_image_size=part),
            video_processor=tf.SmolVLMVideoProcessor(size=part, max_image_size=part, num_frames=64, fps=1),
            image_seq_len=4, **words,
        )  # fmt: skip
        config = tf.SmolVLMConfig(
            vision_config=dict(image_size=32, patch_size=8, max_image_size=part, **vision),
            text_config=tf.LlamaConfig(**text), image_token_id=token("<image>"), scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model_class = tf.SmolVLMForConditionalGeneration
    else:
        new, patch = kind == "qwen3_vl", 4
        pixels = {"shortest_edge": 2 * 16**2, "longest_edge": 64 * 64**2}
        patches = dict(patch_size=patch, merge_size=2, temporal_patch_size=2)
        videos = tf.Qwen3VLVideoProcessor if new else tf.Qwen2VLVideoProcessor
        processor_class = tf.Qwen3VLProcessor if new else tf.Qwen2_5_VLProcessor
        processor = processor_class(
            image_processor=tf.Qwen2VLImageProcessor(size=pixels, **patches), video_processor=videos(size=pixels, **patches),
            **words,
        )  # fmt: skip
        tower = dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=patch, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=32, initializer_range=0.2,
        )  # fmt: skip
        turning = {"rope_type": "default", "mrope_section": [2, 1, 1]}
        if new:
            tower |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0])
            turning["mrope_interleaved"] = True
            text["head_dim"] = 8
        else:
            tower |= dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
        marks = {name: token(f"<|{name}|>") for name in ("vision_start", "vision_end")}
        config_class = tf.Qwen3VLConfig if new else tf.Qwen2_5_VLConfig
        config = config_class(
            vision_config=tower, text_config=text | {"rope_parameters": turning},
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            **{f"{name}_token_id": number for name, number in marks.items()},
        )  # fmt: skip
        model_class = tf.Qwen3VLForConditionalGeneration if new else tf.Qwen2_5_VLForConditionalGeneration
        sampled = SAMPLED
    torch.manual_seed(seed)
    model = model_class(config)
    model.generation_config = tf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id,
        **sampled,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
