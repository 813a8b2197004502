"""The optimizer's parameter groups: the projector and the language model learn at rates of their own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..modeling.parts import PROJECTOR
from ..stages import Schedule


def parameter_groups(
    model: nn.Module, schedule: Schedule, weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """What trains, in groups with a name, a learning rate and a weight decay.

    Args:
        model: what trains in it requires grad.
        schedule: its learning rates; a projector without its own takes the language model's.
        weight_decay: of the parameters in `decayed`.
        decayed: names of the parameters that decay; norms and biases do not.
    """
    rates = {
        "language_model": schedule.learning_rate,
        "projector": schedule.projector_learning_rate or schedule.learning_rate,
    }
    groups: dict[tuple[str, float], dict[str, Any]] = {}  # (part, weight decay) → a group, as torch wants it
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # PEFT's names hold the model's: base_model.model.model.multi_modal_projector.modules_to_save…
            part = "projector" if PROJECTOR in name else "language_model"
            decay = weight_decay if name in decayed else 0.0
            group = {"name": part, "lr": rates[part], "weight_decay": decay, "params": []}
            groups.setdefault((part, decay), group)["params"].append(parameter)
    return list(groups.values())
