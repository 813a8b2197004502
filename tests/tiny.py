"""Tiny checkpoints of all four classes, in the file layout of the Hub, built from configurations without a
network.

Every width is a multiple of 64, as bitsandbytes needs. Chat templates do what the llava-hf checkpoints' do:
LLaVA-1.5 ends no assistant turn, LLaVA-NeXT (Mistral) ends it with EOS, LLaVA-OneVision (Qwen2) writes an
assistant turn otherwise than its generation prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

IMAGE_SIZE, PATCH = 56, 14
GRID = (IMAGE_SIZE // PATCH) ** 2
PINPOINTS = [[56, 112], [112, 56], [112, 112]]

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': "
    "' }}{% endif %}{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ "
    "'<image>\n' }}{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% "
    "endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% "
    "if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% for part in "
    "message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% "
    "for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% "
    "endfor %}{{ ' [/INST]' }}{% else %}{% for part in message['content'] | selectattr('type', "
    "'equalto', 'text') %}{{ ' ' + part['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% "
    "endfor %}"
)
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}{% for part in "
    "message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% "
    "for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] "
    "}}{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llava": VICUNA, "vipllava": VICUNA, "llava_next": MISTRAL, "llava_onevision": ONEVISION}
MODELS = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
LANGUAGES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
WORDS = [
    "USER: ASSISTANT: [INST] [/INST] what is in the image ? yes no the left right lung a chest x-ray shows "
    "normal heart"
] * 4


def tokenizer(eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds BOS itself, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.add_tokens([AddedToken(token, special=True) for token in special])
    return fast


def text_config(language: str, vocabulary: int) -> LlamaConfig | MistralConfig | Qwen2Config:
    return LANGUAGES[language](
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def vision_config(tower: str) -> CLIPVisionConfig | SiglipVisionConfig:
    shape = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    if tower == "siglip":
        return SiglipVisionConfig(**shape, vision_use_head=False)
    return CLIPVisionConfig(**shape, projection_dim=64)


def build(
    folder: str | Path,
    model_type: str = "llava",
    language: str = "llama",
    tower: str = "clip",
    feature_layers: int | list[int] = -2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    template: str | None = None,
) -> Path:
    """Write a tiny checkpoint and return its folder. The processor's `patch_size` is left out, as on many Hub
    folders."""
    folder = Path(folder)
    config_class, model_class = MODELS[model_type]
    text = text_config(language, 384)
    options: dict[str, object] = dict(image_token_index=3, vision_feature_layer=feature_layers)
    if model_type != "vipllava":
        options["vision_feature_select_strategy"] = "full" if tower == "siglip" else "default"
    if model_type in ("llava_next", "llava_onevision"):
        options["image_grid_pinpoints"] = PINPOINTS
    if model_type == "llava_onevision":
        options["video_token_index"] = 4
    config = config_class(vision_config=vision_config(tower), text_config=text, **options)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():  # the library's 0.02 makes logits too flat to learn from in a few steps
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "vision_tower" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)

    eos = "<|im_end|>" if model_type == "llava_onevision" else "</s>"
    fast = tokenizer(eos)
    fast.save_pretrained(folder)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    crop = {"shortest_edge": IMAGE_SIZE}
    kinds = {
        "llava": ("CLIPImageProcessor", {"size": crop, "crop_size": square}),
        "vipllava": ("CLIPImageProcessor", {"size": crop, "crop_size": square}),
        "llava_next": (
            "LlavaNextImageProcessor",
            {"size": crop, "crop_size": square, "image_grid_pinpoints": PINPOINTS},
        ),
        "llava_onevision": (
            "LlavaOnevisionImageProcessor",
            {"size": square, "image_grid_pinpoints": PINPOINTS},
        ),
    }
    kind, settings = kinds[model_type]
    if tower == "siglip" and model_type in ("llava", "vipllava"):
        kind, settings = "SiglipImageProcessor", {"size": square}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": kind, "processor_class": PROCESSORS[model_type], **settings}),
        encoding="utf-8",
    )
    assert AutoImageProcessor.from_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template or TEMPLATES[model_type], encoding="utf-8")
    return folder


PROCESSORS = {
    "llava": "LlavaProcessor",
    "vipllava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}
