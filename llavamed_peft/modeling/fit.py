"""Whether the processor and the model of a checkpoint belong together; found out before anything is read.

A folder may hold another model's processor, a tokenizer that grew after the embedding was made, or one whose
post-processor ends every text in EOS. Each of them fails in the middle of training, or worse, does not fail.
"""

from __future__ import annotations

import warnings
from typing import Any

from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor, PreTrainedConfig

from ..errors import CheckpointError, ConfigError

_PROCESSORS: dict[str, type] = {
    "llava": LlavaProcessor,
    "vipllava": LlavaProcessor,
    "llava_next": LlavaNextProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
}


def embedding_rows(config: PreTrainedConfig) -> int:
    """Tokens that the language model's embedding has a row for."""
    return int(config.get_text_config().vocab_size)


def check_positions(config: PreTrainedConfig, longest: int) -> None:
    """Compare the longest conversation with the positions that the language model was made for.

    Args:
        longest: tokens.

    Raises:
        ConfigError: its positions are a table, which ends there.

    Warns:
        UserWarning: its positions are computed, and these were never trained.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not most or longest <= most:
        return
    words = f"The longest conversation has {longest} tokens, the language model {most} positions"
    if not (getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)):
        raise ConfigError(f"{words}; wanted max_length={most} or less.")
    warnings.warn(
        f"{words} (max_position_embeddings). Beyond them it was never trained. Set max_length={most}, or "
        "give the checkpoint's config.json a rope scaling.",
        stacklevel=3,
    )


def check_fit(processor: Any, config: PreTrainedConfig, folder: str) -> None:
    """The processor is of the model's class, makes images of its tower's size, and knows tokens that it has.

    Args:
        processor: as it was loaded from the folder, a fast tokenizer in it.
        config: of the model.
        folder: for errors.

    Raises:
        CheckpointError: it is another model's, or its tokenizer cannot be used.
    """
    wanted = _PROCESSORS[config.model_type]
    if not isinstance(processor, wanted):
        raise CheckpointError(
            f"{folder}: the processor is a {type(processor).__name__}, the model a {config.model_type}; "
            f"wanted a {wanted.__name__} ('processor_class' in processor_config.json or "
            "preprocessor_config.json)."
        )
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"{folder}: the processor's image token {processor.image_token!r} has id "
            f"{processor.image_token_id}, the model's image_token_id is {config.image_token_id}; wanted "
            "equal ids."
        )
    _check_embedding(processor, config, folder)
    _check_endings(processor.tokenizer, folder)
    _check_pixels(processor, config, folder)


def _check_embedding(processor: Any, config: PreTrainedConfig, folder: str) -> None:
    """The tokens that every row has. Those of single words are looked for row by row."""
    tokenizer, rows = processor.tokenizer, embedding_rows(config)
    always = {"image": processor.image_token, "BOS": tokenizer.bos_token, "EOS": tokenizer.eos_token}
    always["padding"] = tokenizer.pad_token
    for use, token in always.items():
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if number is not None and number >= rows:
            raise CheckpointError(
                f"{folder}: the {use} token {token!r} has id {number}, and the language model's "
                f"embedding has {rows} rows; wanted ids below that. The tokenizer grew, the embedding did "
                "not: load the model, call resize_token_embeddings(len(tokenizer)), and save it."
            )


def _check_endings(tokenizer: Any, folder: str) -> None:
    """A tokenizer that appends EOS would put it between the prompt and the answer, in every inference too."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    if ids[-len(plain) :] != plain:
        ending = tokenizer.convert_ids_to_tokens(ids[-1])
        raise CheckpointError(
            f"{folder}: the tokenizer appends {ending!r} to every text, so it would stand between a "
            "prompt and its answer; wanted one that appends nothing. Set add_eos_token to false in "
            f"tokenizer_config.json, or take {ending!r} out of the post_processor in tokenizer.json."
        )


def _check_pixels(processor: Any, config: PreTrainedConfig, folder: str) -> None:
    size = config.vision_config.image_size
    try:
        pixels = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        shape = tuple(pixels.shape[-3:])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its {type(processor.image_processor).__name__} fails on an image ({error!r}); wanted "
            "the image processor of this model (preprocessor_config.json)."
        ) from error
    tiled = isinstance(processor, (LlavaNextProcessor, LlavaOnevisionProcessor))
    if shape != (3, size, size) or pixels.ndim != (5 if tiled else 4):
        raise CheckpointError(
            f"{folder}: the image processor makes {list(pixels.shape)} of an image, the vision tower takes "
            f"[{'images, tiles' if tiled else 'images'}, 3, {size}, {size}]; wanted the image processor of "
            "this model. Is 'size' or 'crop_size' in preprocessor_config.json another model's?"
        )
