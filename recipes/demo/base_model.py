"""The base's parts: image processor and a LLaVA model of 1.6 million parameters with random weights."""

from __future__ import annotations

from collections.abc import Iterable

from base_text import CHAT_TEMPLATE, build_tokenizer, scene_texts
from clinic_scenes import clinic_scene
from general_scenes import general_scene
from scene import IMAGE_SIZE, Scene
from scenes import FIRST_SEED
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

PATCH = 10
GRID = IMAGE_SIZE // PATCH
WIDTH = 128


def build_processor() -> LlavaProcessor:
    """Tokenizer, image preparation (80 pixels, values from -1 to 1) and chat template."""
    scenes = (
        scene_of(FIRST_SEED["base"] + number)
        for number in range(2_000)
        for scene_of in (general_scene, clinic_scene)
    )
    # saved under CLIP's name, so that a machine with torchvision may use that instead
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(scene_texts(scenes)),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """CLIP tower and Llama of four layers each, 128 wide; every matrix a multiple of 64 on both sides, for
    the NF4 kernels."""
    tokenizer = processor.tokenizer
    layers = 4
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("language_model" in name or "multi_modal_projector" in name):
            # 0.02, made for widths in the thousands, leaves attention uniform at 128 and learning flat for
            # long
            std = 0.08 if "embed_tokens" in name else weight.shape[1] ** -0.5
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=std * (2 * layers) ** -0.5 if into_residual else std)
    nn.init.normal_(model.model.vision_tower.embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def pixels_of(processor: LlavaProcessor, scenes: Iterable[Scene]) -> Tensor:
    return processor.image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
