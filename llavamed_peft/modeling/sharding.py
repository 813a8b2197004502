"""A stage's model spread over processes, as accelerate's launcher asks: FSDP2, or DeepSpeed's ZeRO-2/3.

What the launch asks for is read from the variables that `accelerate launch` sets. What is not supported is
refused before anything is done. For FSDP2 we call PyTorch's `fully_shard` ourselves, on a CPU (gloo) as on
GPUs (nccl), so that tests and GPUs run the same code; accelerate's own FSDP is not used, since on a CPU it
silently becomes plain DDP. The Hugging Face trainer runs DeepSpeed. In both cases `whole` returns a parameter
in full. Each process still loads the whole model into its host memory before it is spread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from accelerate.utils import DeepSpeedPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ConfigError

# What accelerate and transformers would do by themselves with these variables, we do ourselves or not at all.
_ASIDE = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_CONFIG_DS_FIELDS": "",
}
# Variable of accelerate's launcher → its key in the YAML file and why it is refused when it is true.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "Shard over more GPUs, or train LoRA."),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (
        "fsdp_activation_checkpointing_offload",
        "Lower max_row_tokens.",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "parallelism_config",
        "Conversations are spread over processes, never cut.",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("megatron_lm_config", "Use fsdp_version: 2 or DeepSpeed."),
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a stage's model is spread over processes.

    Args:
        method: `"fsdp2"`, `"zero2"` (gradients and optimizer state) or `"zero3"` (weights too).
        reshard_after_forward: FSDP2: free a layer's weights after its forward and gather them again for its
            backward.
        gradient_checkpointing: the launch asks to recompute activations.
        deepspeed: DeepSpeed's configuration; `None` for FSDP2.
    """

    method: Literal["fsdp2", "zero2", "zero3"]
    reshard_after_forward: bool = True
    gradient_checkpointing: bool = False
    deepspeed: dict[str, Any] | None = field(default=None, repr=False)


def asked_sharding(dtype: torch.dtype, max_grad_norm: float) -> Sharding | None:
    """What `accelerate launch` was configured for; `None`: whole models, their gradients averaged (DDP).

    Args:
        dtype: to compute in.
        max_grad_norm: to which gradients are clipped, by DeepSpeed itself where it runs.

    Raises:
        ConfigError: something is asked for that is not supported.
    """
    for variable, (key, instead) in _REFUSED.items():
        if _is_true(variable):
            raise ConfigError(
                f"The launch configuration has {key} ({variable} is set); this is not supported. {instead}"
            )
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        return _asked_deepspeed(dtype, max_grad_norm)
    if not _is_true("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"The launch configuration has fsdp_version {os.environ.get('FSDP_VERSION', '1')}; wanted "
            "fsdp_version: 2 (PyTorch's fully_shard), the only one supported."
        )
    return Sharding(
        "fsdp2",
        reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
        gradient_checkpointing=_is_true("FSDP_ACTIVATION_CHECKPOINTING"),
    )


def _asked_deepspeed(dtype: torch.dtype, max_grad_norm: float) -> Sharding:
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "The launch configuration asks for DeepSpeed, which is not installed. pip install "
            "'llavamed-peft[distributed]'"
        )
    try:
        config = DeepSpeedPlugin().deepspeed_config
    except ValueError as error:
        raise ConfigError(f"The launch configuration of DeepSpeed cannot be used: {error}") from error
    stage = config["zero_optimization"].get("stage")
    if stage not in (2, 3):
        raise ConfigError(f"DeepSpeed's zero_optimization.stage is {stage!r}; wanted 2 or 3.")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(
                f"DeepSpeed's configuration has {key!r}; wanted none, since the stage's Schedule says it."
            )
    compute = {"bf16": dtype == torch.bfloat16, "fp16": False}
    for key, wanted in (
        ("gradient_accumulation_steps", 1),
        ("gradient_clipping", max_grad_norm),
        *((f"{kind}.enabled", enabled) for kind, enabled in compute.items()),
    ):
        group, _, name = key.rpartition(".")
        found = (config.get(group, {}) if group else config).get(name, "auto")
        if found not in ("auto", wanted):
            raise ConfigError(
                f"DeepSpeed's {key} is {found!r}; wanted {wanted!r} or 'auto': the package decides it."
            )
    config = {
        **config,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        # DeepSpeed wants these numbers, but the schedule's global_batch says what a step holds.
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        **{kind: {**config.get(kind, {}), "enabled": enabled} for kind, enabled in compute.items()},
        # In bf16, the sum over a step's device batches would lose its small terms.
        "data_types": config.get("data_types", {"grad_accum_dtype": "fp32"}),
    }
    return Sharding("zero2" if stage == 2 else "zero3", deepspeed=config)


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


@contextlib.contextmanager
def launcher_aside() -> Iterator[None]:
    """While this lasts, accelerate and transformers do not act on the launcher's variables by themselves."""
    before = {name: os.environ.get(name) for name in _ASIDE}
    os.environ.update({name: value for name, value in _ASIDE.items() if name in os.environ})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value


def shard(
    model: torch.nn.Module, units: Sequence[torch.nn.Module], sharding: Sharding, compute_dtype: torch.dtype
) -> None:
    """Spread a model over all processes by FSDP2, in place.

    Trainable tensors stay fp32 in their shards. They are gathered in `compute_dtype`, in which the model
    computes. Their gradients are reduced in fp32 after each device batch, so no process ever holds the summed
    gradients of the whole model.

    Args:
        model: with the stage's parameters frozen and unfrozen, in the dtypes they are kept in, before any
            optimizer is made.
        units: of the model, each gathered when it runs; what is in none of them stays gathered from the
            forward to the backward.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for unit in units:
        fully_shard(unit, reshard_after_forward=sharding.reshard_after_forward, mp_policy=policy)
    fully_shard(model, reshard_after_forward=False, mp_policy=policy)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter in full and, where it trains, unrounded.

    Every process has to ask for the same parameters in the same order.
    """
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    in_zero3 = hasattr(parameter, "ds_id")
    if parameter.requires_grad and (in_zero3 or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if in_zero3:
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def as_sharded(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut as the parameter is.

    It is unchanged if the parameter is not sharded, or has another shape (the tensor is a scalar).
    """
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def free_gathered(model: torch.nn.Module) -> None:
    """Free what evaluation, a forward without a backward, left gathered in a model that FSDP2 shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


def unrounded(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors that `dtype` cannot hold as they are."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not torch.equal(parameter, parameter.to(dtype).to(parameter.dtype))
    }


def set_masters(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set DeepSpeed's fp32 copies of the trainable tensors, which it made of a model rounded to bf16."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in model.named_parameters():
        if name in tensors:
            safe_set_full_fp32_param(parameter, tensors[name])
