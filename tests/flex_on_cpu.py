"""FlexAttention that can train on a CPU: torch's own formulas for both passes, in place of kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import flex_attention as flex_module
from transformers.integrations.flex_attention import WrappedFlexAttention

from llavamed_peft.packing import masks
from llavamed_peft.training import stage as training

CUDA = torch.device("cuda")


def allow(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Have torch not refuse gradients on a CPU, and compile without inductor, whose CPU kernel has none."""
    patch(masks, "has_triton", lambda: True)
    patch(flex_module, "_validate_device", lambda *tensors: None)
    patch(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    patch(WrappedFlexAttention, "_instance", None)  # what transformers has compiled already


def choose(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Have training on a CPU take the attention of CUDA."""
    patch(
        training, "choose_attention", lambda model, device, dtype: masks.choose_attention(model, CUDA, dtype)
    )
