"""The vision tower: frozen, what it makes of images, and features in the place of pixels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .parts import bare

_CHANNELS = 3  # of pixels


def freeze_tower(model: torch.nn.Module) -> None:
    """Run the vision tower without a graph and always in eval mode, whatever mode the model is put in.

    Its parameters never require grad, but gradient checkpointing asks for gradients of every embedding's output, the tower's
    too, and would carry them through it. Given features (`tower_features`) in the place of pixels, it hands them on.
    """
    tower = bare(model).model.vision_tower
    tower.eval()
    tower.train = functools.partial(_stay_in_eval, tower)
    tower.forward = functools.partial(_look_or_hand_on, model, torch.no_grad()(tower.forward))


def tower_positions(tower: torch.nn.Module) -> int:
    """Positions that a vision tower makes of a tile: one for each patch and, in CLIP, one for the CLS token."""
    return int(tower.embeddings.position_embedding.num_embeddings)


def tower_layers(model: torch.nn.Module) -> list[int]:
    """Which of the vision tower's hidden states the projector is given, ascending; 0 is what goes into its first layer."""
    config = bare(model).config
    chosen = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return sorted({layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen)})


def tower_features(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower makes of images, as the projector needs it.

    Args:
        model: its tower frozen by `freeze_tower`.
        pixel_values: [tiles, 3, height, width].

    Returns:
        [tiles, positions, layers, width], the layers those of `tower_layers`. In the place of `pixel_values` (those of
        LLaVA-NeXT and OneVision have the tiles of each image in a dimension of their own) the model takes them as what they are.
    """
    layers = tower_layers(model)
    states = bare(model).model.vision_tower(pixel_values, output_hidden_states=layers).hidden_states
    return torch.stack([states[layer] for layer in layers], dim=2)


def _look_or_hand_on(
    model: torch.nn.Module, forward: Any, pixel_values: torch.Tensor, **settings: Any
) -> Any:
    if pixel_values.shape[1] == _CHANNELS:  # no tower has three positions: they are a square, or one more
        return forward(pixel_values, **settings)
    states: list[torch.Tensor | None] = [None] * (bare(model).config.vision_config.num_hidden_layers + 1)
    for number, layer in enumerate(tower_layers(model)):
        states[layer] = pixel_values[:, :, number]
    return BaseModelOutputWithPooling(hidden_states=tuple(states))


def _stay_in_eval(tower: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return tower


def always_look(model: torch.nn.Module) -> None:
    """Run vision tower and projector in every forward: one without an image looks at a blank one, which counts nothing.

    So every trainable tensor has a gradient in every step (perhaps zero), and processes that gather a sharded model's weights
    part by part, each when it runs, all gather the same parts in the same order; otherwise one would wait for ever.
    """
    inner = bare(model).model
    inner.forward = functools.partial(_forward_with_an_image, inner, inner.forward)


def _forward_with_an_image(
    inner: PreTrainedModel, forward: Any, input_ids: torch.Tensor, **inputs: Any
) -> Any:
    if inputs.get("pixel_values") is None:
        embeddings = inner.get_input_embeddings()(input_ids)
        size = inner.config.vision_config.image_size
        seen = inner.vision_tower(torch.zeros(1, 3, size, size, device=embeddings.device)).last_hidden_state[
            :, :1
        ]
        projector = inner.multi_modal_projector
        layers = projector.linear_1.in_features // seen.shape[-1]  # the features of several may be joined
        inputs["inputs_embeds"] = embeddings + projector(seen.repeat(1, 1, layers)).sum() * 0.0
        input_ids = None
    return forward(input_ids=input_ids, **inputs)
