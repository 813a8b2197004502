"""A packed row's `ends` → what its attention must be given, and what is refused since it would compute something else.

Token i sees token j exactly if j <= i < ends[j] (`rows.py`). The language model gets this as a dense boolean mask (`sdpa`, on any
device; tokens² bytes a row), as none where causal attention does the same, or as FlexAttention's block mask (`flex_attention`,
CUDA with Triton; its CPU kernel has no backward pass). The vision tower is not concerned. transformers hands a mask of four
dimensions to the attention function as it is: `eager` would add the booleans to its scores, `flex_attention` would take them for
scores and crash, and a sliding window is forgotten. So the dense mask refuses what attention other than
`scaled_dot_product_attention` does to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._triton import has_triton
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError

BLOCK = 128  # tokens of a side of FlexAttention's blocks, its default
# FlexAttention is compiled for each kind of row: another width of heads, with and without gradients, one block or more. Behind
# torch's limit, 8 in a process, it goes on uncompiled, with a warning, and writes a row's scores out in full: tokens² a head.
RECOMPILE_LIMIT = 64
_NARROWEST_HEAD = 16  # that FlexAttention's kernels take
# By the dtype that attention is computed in; wider ones need more shared memory than common cards have, of whose 99 KB 97 are
# taken in bfloat16 at 128 (benchmarks/LOG.md, "flex_kernels").
WIDEST_HEAD = {torch.bfloat16: 128, torch.float32: 64}
# Left to choose, torch takes a kernel for decoding where a row is shorter than 128 tokens, which then does not compile for
# grouped heads such as Mistral's.
_KERNEL_OPTIONS = {"BACKEND": "TRITON"}
# Most tokens of a device batch of several rows that need a dense mask. Larger ones cost memory, for masks (their square) and
# activations: with 4,096 a model of 64 M parameters trained 7 % faster and took 3.9 GB (benchmarks/LOG.md, "rows of their own").
DENSE_FILL = 1024
# Of a device batch, by default. CUDA's is counted, not measured: with it, a 7B base in 4 bits and LoRA take 14 GB, of the
# 24 GB of one card (recipes/configs/llava-1.5-7b/nf4-24gb.yaml).
MAX_ROW_TOKENS = {"cpu": 4096, "cuda": 8192}

_INVERTING = {"__invert__", "bitwise_not", "logical_not"}  # what is not seen may be used as a number
_CASTING = {"float", "double", "half", "bfloat16"}
_SELECTING = {"where", "masked_fill", "masked_fill_", "masked_select", "__getitem__", "__setitem__"}


class DenseMask(torch.Tensor):
    """A boolean mask [rows, 1, tokens, tokens], true where a token (third) sees one (fourth), for `sdpa` alone.

    It can be looked into like any other tensor: what is read out of it is one (if it is no mask of four dimensions again), and so
    is `plain()`, with which anything may be done.

    Raises:
        ConfigError: it is used as attention would that reads it wrongly: computed with beside floating point numbers (`eager`
            adds it to its scores), cast to them, cut along its last dimension alone, summed into int32.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if (
                func is torch.nn.functional.scaled_dot_product_attention
            ):  # plain, or a compiler would be in the mask's way
                return func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
            if _misread(func.__name__, args, kwargs):
                raise ConfigError(
                    f"A packed batch's attention_mask was given to {func.__name__!r} as if by attention other than "
                    "scaled_dot_product_attention, which reads it wrongly. Set the language model's: "
                    "model.set_attn_implementation('sdpa'), or take layout='padded'. To compute with the mask, call its plain()."
                )
            result = func(*args, **kwargs)
            if func.__name__ == "__get__":  # an attribute
                return _plain(result)
            is_mask = isinstance(result, torch.Tensor) and result.dtype == torch.bool and result.ndim == 4
            is_mask &= func.__name__ not in _INVERTING
            return result.as_subclass(cls) if is_mask else _plain(result)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseMask:
        memo[id(self)] = copied = self.clone()
        return copied

    def plain(self) -> torch.Tensor:
        """The same booleans as a tensor like any other."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)


torch.serialization.add_safe_globals([DenseMask])  # so that a saved batch can be loaded


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, DenseMask) else value


def _misread(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function is called on a mask as attention does that takes it for something else."""
    given = [value for value in (*args, *kwargs.values()) if not isinstance(value, DenseMask)]
    computes = (
        any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in given)
        and name not in _SELECTING
    )
    casts = name in _CASTING
    casts |= name in ("to", "type") and any(
        isinstance(value, torch.dtype) and value.is_floating_point for value in given
    )
    part = args[1] if name == "__getitem__" else None
    cuts = (
        isinstance(part, tuple)
        and [type(place) for place in part] == [slice] * 4
        and part[:3] == (slice(None),) * 3
    )
    counts = (
        name == "sum" and kwargs.get("dtype") == torch.int32
    )  # each row's tokens, as flash attention does
    return computes or casts or cuts or counts


def dense_mask(ends: torch.Tensor) -> DenseMask:
    """The mask of some rows in full.

    Args:
        ends: [rows, tokens] integers.

    Returns:
        [rows, 1, tokens, tokens] boolean.
    """
    place = torch.arange(ends.shape[-1], device=ends.device)
    visible = (place[None, :] <= place[:, None]) & (place[:, None] < ends[:, None, None, :])
    return visible.as_subclass(DenseMask)


def block_mask(ends: torch.Tensor) -> BlockMask:
    """The mask of some rows as FlexAttention wants it, never written out in full.

    Which blocks of 128 by 128 tokens are empty, full or mixed follows from the least and the greatest end of their columns.

    Args:
        ends: [rows, tokens] integers.
    """
    tokens = ends.shape[-1]
    blocks = -(-tokens // BLOCK)
    padded = torch.nn.functional.pad(ends, (0, blocks * BLOCK - tokens)).unflatten(-1, (blocks, BLOCK))
    first = torch.arange(blocks, device=ends.device) * BLOCK
    query, key = first[:, None], first[None, :]
    seen = (key <= query) & (padded.amax(-1)[:, None, :] > query)
    full = (key < query) & (padded.amin(-1)[:, None, :] >= query + BLOCK)

    def visible(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= query) & (query < ends[row, key])

    return BlockMask.from_kv_blocks(
        *_in_order(seen & ~full),
        *_in_order(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def attention_inputs(ends: torch.Tensor, config: PreTrainedConfig) -> dict[str, Any]:
    """What a model is given beside its other inputs so that its attention heeds the rows.

    Args:
        ends: [rows, tokens] integers, on the model's device.
        config: the model's; its language model's attention implementation decides.

    Returns:
        `attention_mask`, and for FlexAttention `kernel_options`. The mask is `None` for `sdpa` where each row is one sequence,
        perhaps with padding behind it: there everything before a token is its own, and attention that is causal by itself skips
        half of the work.

    Raises:
        ConfigError: an implementation that packed rows cannot be given to.
    """
    implementation = config.get_text_config()._attn_implementation
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(ends), "kernel_options": dict(_KERNEL_OPTIONS)}
    if implementation == "sdpa":
        return {"attention_mask": None if _is_causal(ends) else dense_mask(ends)}
    raise ConfigError(
        f"The language model's attention is {implementation!r}; packed rows need one of sdpa, flex_attention. Call "
        "model.set_attn_implementation('sdpa'), or take layout='padded'."
    )


def _is_causal(ends: torch.Tensor) -> bool:
    """Every row is one sequence, and padding (each sees itself alone) that nobody asks for what it saw."""
    tokens, places = ends[:, :1], torch.arange(ends.shape[-1], device=ends.device)
    return bool(((ends == tokens) | ((places >= tokens) & (ends == places + 1))).all())


def choose_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Give the language model the attention with which packed rows are computed: FlexAttention on CUDA if it can, else `sdpa`.

    Args:
        dtype: that attention is computed in, the model's or autocast's.

    Returns:
        Its name.

    Raises:
        ConfigError: not all of its layers are attention that heeds a mask of four dimensions. A convolution or a state runs
            along the row, from one branch into the next; attention in chunks counts its chunks along it.

    Warns:
        UserWarning: FlexAttention cannot be had on CUDA, and why.
    """
    text = model.config.get_text_config()
    others = sorted({*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"})
    others += [
        name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Conv1d)
    ][:1]
    if others:
        raise ConfigError(
            f"The language model ({text.model_type}) has layers that do not heed a packed row's mask ({', '.join(others)}), so "
            "conversations would see one another; wanted attention alone. Take layout='padded'."
        )
    implementation = "sdpa"
    if device.type == "cuda":
        why = _why_not_flex(model, dtype)
        if why is None:
            implementation = "flex_attention"
        else:
            warnings.warn(f"Packed rows get masks in full, not FlexAttention: {why}.", stacklevel=2)
    model.set_attn_implementation({"text_config": implementation})
    return implementation


def _why_not_flex(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """What keeps a model from FlexAttention's kernels, if anything does."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not has_triton():
        return "Triton is not installed, or does not know this GPU"
    if width < _NARROWEST_HEAD:
        return f"the language model's heads are {width} wide, and its kernels need {_NARROWEST_HEAD}"
    if width > WIDEST_HEAD.get(dtype, 0):
        name = str(dtype).removeprefix("torch.")
        return f"the language model's heads are {width} wide, too wide for its kernels in {name}"
    if getattr(text, "attention_dropout", 0):
        return f"the language model has attention_dropout {text.attention_dropout}, which it cannot do"
    if not model.get_decoder()._supports_flex_attn:
        return f"transformers' {text.model_type} does not take it"
    return None


def fill_tokens(implementation: str) -> int | None:
    """How far device batches are filled with what shares nothing.

    Args:
        implementation: from `choose_attention`.

    Returns:
        `None` for FlexAttention, which skips what is not seen: a device batch is one row, filled up to its bound. For `sdpa` a
        dense mask costs the square of a row's tokens, seen or not, so what shares nothing stands in rows of its own, and rows of
        about one length make a device batch; where they need a mask, of at most this many tokens.
    """
    return None if implementation == "flex_attention" else DENSE_FILL


def check_window(config: PreTrainedConfig, longest: int) -> None:
    """Refuse sequences longer than the language model's sliding window, which a mask of four dimensions would switch off.

    Args:
        config: the model's.
        longest: tokens of the longest sequence; a row may be longer.

    Raises:
        ConfigError: it does not fit the window.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)
    if window and (layers is None or "sliding_attention" in layers) and longest > window:
        raise ConfigError(
            f"The language model's sliding_window is {window}, the longest conversation has {longest} tokens; packed rows need "
            f"conversations that fit the window. Set max_length={window}, or take layout='padded'."
        )


def _in_order(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, queries, keys] boolean → [rows, 1, queries] how many, [rows, 1, queries, keys] which, the chosen ones first."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1).int()[:, None].contiguous(), order[:, None].contiguous()
