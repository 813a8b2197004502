"""The vision tower: kept frozen, what it computes from images, and stored features used in place of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .parts import bare


@dataclass(slots=True)
class Handover:
    """Stored features on their way from the call of the model to its vision tower.

    Args:
        features: [tiles, positions, layers, width], during a forward that was called with `tower_features`;
            `None` at any other time, and then the tower computes from pixels.
    """

    features: torch.Tensor | None = None


def freeze_tower(model: torch.nn.Module) -> None:
    """Run the vision tower without a graph and always in eval mode, whatever mode the model is put in.

    Its parameters never require grad. But gradient checkpointing asks for gradients of the output of every
    embedding, the tower's too, and would compute them through the whole tower.

    From now on the model also takes `tower_features`, [tiles, positions, layers, width], as the function of
    that name returns them: the tiles of all images one after the other. The tower then returns these as its
    hidden states and computes nothing. The rest of a batch stays as it is (`image_sizes`,
    `batch_num_images`), but `pixel_values` is `no_pixels(tower_features)`.
    """
    inner = bare(model).model
    tower, handover = inner.vision_tower, Handover()
    tower.eval()
    tower.train = functools.partial(_stay_in_eval, tower)
    tower.forward = functools.partial(_hidden_states, model, handover, torch.no_grad()(tower.forward))
    inner.forward = functools.partial(_hand_over, handover, inner.forward)


def tower_positions(tower: torch.nn.Module) -> int:
    """Positions of a vision tower for one tile: one for each patch and, in CLIP, one for the CLS token."""
    return int(tower.embeddings.position_embedding.num_embeddings)


def tower_layers(model: torch.nn.Module) -> list[int]:
    """The vision tower's hidden states that the projector takes, ascending; 0 is its first layer's input."""
    config = bare(model).config
    chosen = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return sorted({layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen)})


def tower_features(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower computes from images, as the projector needs it.

    Args:
        model: its tower frozen by `freeze_tower`.
        pixel_values: [tiles, 3, height, width].

    Returns:
        [tiles, positions, layers, width], the layers those of `tower_layers`. The model takes them as
        `tower_features`.
    """
    layers = tower_layers(model)
    states = bare(model).model.vision_tower(pixel_values, output_hidden_states=layers).hidden_states
    return torch.stack([states[layer] for layer in layers], dim=2)


def feature_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.dtype:
    """In which dtype features are stored, so that the projector gets what it would get from pixels.

    A projector that begins with a linear layer rounds its input to autocast's bfloat16 itself. ViP-LLaVA's
    begins with a layer norm, which autocast computes in float32: it gets what the tower returns there.

    Args:
        model: its tower frozen by `freeze_tower`, on its device.
        dtype: that training computes in.
    """
    parts = bare(model).model.multi_modal_projector.modules()  # PEFT's wrapper is one of them
    first = next(part for part in parts if not any(part.children()))
    if dtype != torch.bfloat16 or not isinstance(first, torch.nn.LayerNorm):
        return dtype
    tower = bare(model).model.vision_tower
    blank = torch.zeros(1, 3, *[bare(model).config.vision_config.image_size] * 2, device=tower.device)
    with torch.autocast(tower.device.type, torch.bfloat16):
        return tower_features(model, blank).dtype


def no_pixels(tower_features: torch.Tensor) -> torch.Tensor:
    """The `pixel_values` of a batch with stored features: [tiles, 3, 0, 0], a placeholder that holds nothing.

    A model's own forward calls its tower only if there are `pixel_values`; those of four dimensions it passes
    on as they are, in each of the four classes. A model that knows nothing of `tower_features` fails on them.
    """
    return tower_features.new_empty(len(tower_features), 3, 0, 0)


def _hand_over(
    handover: Handover,
    forward: Callable[..., Any],
    *args: Any,
    tower_features: torch.Tensor | None = None,
    **inputs: Any,
) -> Any:
    """The forward of the model inside a LLaVA model, which takes `tower_features` beside its own inputs."""
    handover.features = tower_features
    try:
        return forward(*args, **inputs)
    finally:
        handover.features = None


def _hidden_states(
    model: torch.nn.Module,
    handover: Handover,
    forward: Callable[..., Any],
    pixel_values: torch.Tensor,
    **settings: Any,
) -> Any:
    """The tower's forward: from pixels, or what was handed over."""
    if handover.features is None:
        return forward(pixel_values, **settings)
    states: list[torch.Tensor | None] = [None] * (bare(model).config.vision_config.num_hidden_layers + 1)
    for number, layer in enumerate(tower_layers(model)):
        states[layer] = handover.features[:, :, number]  # [tiles, positions, width]
    return BaseModelOutputWithPooling(hidden_states=tuple(states))


def _stay_in_eval(tower: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return tower


def always_look(model: torch.nn.Module) -> None:
    """Run vision tower and projector in every forward, if need be over an empty image, which counts nothing.

    So every trainable tensor has a gradient in every step (perhaps zero). Processes that share a sharded
    model gather the weights of each part when it runs: all must run the same parts in the same order, or one
    would wait for ever.
    """
    inner = bare(model).model
    inner.forward = functools.partial(_forward_with_an_image, inner, inner.forward)


def _forward_with_an_image(
    inner: PreTrainedModel, forward: Callable[..., Any], input_ids: torch.Tensor, **inputs: Any
) -> Any:
    if inputs.get("pixel_values") is None:
        embeddings = inner.get_input_embeddings()(input_ids)  # [rows, tokens, hidden]
        size = inner.config.vision_config.image_size
        empty = torch.zeros(1, 3, size, size, device=embeddings.device)
        seen = inner.vision_tower(empty).last_hidden_state[:, :1]  # [1, 1, width]: one position is enough
        projector = inner.multi_modal_projector
        layers = projector.linear_1.in_features // seen.shape[-1]  # it may take several layers side by side
        inputs["inputs_embeds"] = embeddings + projector(seen.repeat(1, 1, layers)).sum() * 0.0
        input_ids = None
    return forward(input_ids=input_ids, **inputs)
