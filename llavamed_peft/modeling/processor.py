"""The processor of a checkpoint: loaded, completed from the model's configuration, prepared for a stage.

Hub folders often lack what the processor needs to count image tokens; `load_processor` fills it in.
`make_stage_processor` adds what training needs: a chat template that can be trained on, padding on the left,
and square images where the checkpoint would crop. All are saved with the stage, so whoever loads it with
stock `AutoProcessor` shows the model what it was trained on.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.utils import is_torchvision_available

from ..errors import CheckpointError
from ..stages import AspectRatio
from .fit import check_fit
from .templates import read_template
from .tower import tower_positions

if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor

_IMAGE_SETTINGS = (
    "size crop_size do_resize do_center_crop do_rescale do_normalize do_convert_rgb resample rescale_factor "
    "image_mean image_std"
)


def load_processor(folder: str | Path, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of a checkpoint or stage folder, completed from the model's configuration.

    Raises:
        CheckpointError: there is none, it has no image processor, or it is not the model's (`fit.py`).
    """
    try:
        if config.model_type == "llava_onevision" and not is_torchvision_available():
            processor = _images_only_processor(str(folder))
        else:
            processor = AutoProcessor.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: no processor could be loaded; wanted tokenizer files and preprocessor_config.json. "
            f"({error})"
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise CheckpointError(
            f"{folder}: the processor is a {type(processor).__name__} without "
            f"{'a tokenizer' if tokenizer is None else 'an image processor'}; wanted both. Is "
            "preprocessor_config.json missing?"
        )
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder}: the tokenizer is slow; wanted a fast one (tokenizer.json), which knows its offsets."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    check_fit(processor, config, str(folder))
    _complete_processor(processor, config)
    return processor


class _ImagesOnly(LlavaOnevisionProcessor):
    """OneVision's processor without its video part, which needs torchvision; nothing here shows a video.

    The library reads from the arguments of `__init__` which parts a processor has, so it is enough to leave
    one out there.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
    ):
        super().__init__(
            image_processor,
            tokenizer,
            None,
            num_image_tokens,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            video_token,
            vision_aspect_ratio,
        )


_ImagesOnly.__name__ = LlavaOnevisionProcessor.__name__  # what save_pretrained writes as the class to load


def _images_only_processor(folder: str) -> ProcessorMixin:
    settings, _ = LlavaOnevisionProcessor.get_processor_dict(folder)
    return _ImagesOnly(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=settings.get("chat_template"),
    )


def _complete_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Set what the processor needs to count image tokens, from what the model makes of an image."""
    vision = config.vision_config
    grid = (vision.image_size // vision.patch_size) ** 2
    with torch.device("meta"):
        tower = AutoModel.from_config(vision)
    positions = tower_positions(tower)
    if hasattr(processor, "num_additional_image_tokens"):
        processor.patch_size = vision.patch_size
        processor.num_additional_image_tokens = positions - grid
    if hasattr(processor, "num_image_tokens"):
        processor.num_image_tokens = positions
        processor.vision_aspect_ratio = config.vision_aspect_ratio
    # ViP-LLaVA has no such setting: it always drops the first token
    processor.vision_feature_select_strategy = getattr(config, "vision_feature_select_strategy", "default")


def save_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Write files that stock `AutoProcessor` loads as this processor; OneVision's only with torchvision."""
    processor.save_pretrained(folder)
    if isinstance(processor, _ImagesOnly):
        video = {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "processor_class": LlavaOnevisionProcessor.__name__,
        }
        (folder / "video_preprocessor_config.json").write_text(
            json.dumps(video, indent=2) + "\n", encoding="utf-8"
        )


def make_stage_processor(processor: ProcessorMixin, image_aspect_ratio: AspectRatio) -> ProcessorMixin:
    """A copy of the processor as a stage trains with it and saves it.

    Args:
        processor: of the base, or of an earlier stage; unchanged.
        image_aspect_ratio: see `Curriculum`. `"pad"` changes only LLaVA and ViP-LLaVA, whose processors make
            one square of an image.

    Raises:
        CheckpointError: the chat template cannot be trained on.
    """
    processor = copy.deepcopy(processor)
    processor.chat_template = read_template(processor).template
    # Stock generation in batches answers wrongly behind padding on the right.
    processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "left"
    if image_aspect_ratio == "pad" and isinstance(processor, LlavaProcessor):
        old = processor.image_processor
        if not isinstance(old, LlavaImageProcessor):
            settings = {
                name: getattr(old, name)
                for name in _IMAGE_SETTINGS.split()
                if getattr(old, name, None) is not None
            }
            processor.image_processor = LlavaImageProcessor(**settings)
            processor.image_processor.do_center_crop = bool(settings.get("do_center_crop"))
        processor.image_processor.do_pad = True
    return processor
