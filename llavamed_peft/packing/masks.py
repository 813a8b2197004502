"""A packed row's `ends` → the mask that its attention gets, and a guard against attention that misreads it.

Token i sees token j exactly if j <= i < ends[j] (`rows.py`). The language model gets this in one of three
forms: a dense boolean mask (`sdpa`, on any device; tokens² bytes a row); no mask, where causal attention does
the same; FlexAttention's block mask (`flex_attention`, CUDA with Triton; its CPU kernel has no backward
pass). The vision tower gets none. transformers passes a mask of four dimensions to the attention function as
it is: `eager` would add the booleans to its scores, `flex_attention` would take them for scores and crash,
and a sliding window is ignored. No function registered with transformers is asked about such a mask. So the
mask itself refuses what attention other than `scaled_dot_product_attention` does to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MethodWrapperType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._triton import has_triton
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError

BLOCK = 128  # tokens of a side of FlexAttention's blocks, its default
# FlexAttention is compiled for each kind of row: another width of heads, with and without gradients, one
# block or more. Beyond torch's limit, 8 in a process, it runs uncompiled, with a warning, and writes a row's
# scores in full: tokens² a head.
RECOMPILE_LIMIT = 64
_NARROWEST_HEAD = 16  # that FlexAttention's kernels take
# By the dtype that attention is computed in; wider ones need more shared memory than common cards have, of
# whose 99 KB 97 are taken in bfloat16 at 128 (benchmarks/LOG.md, "flex_kernels").
WIDEST_HEAD = {torch.bfloat16: 128, torch.float32: 64}
# By itself, torch takes a kernel for decoding where a row is shorter than 128 tokens. That one does not
# compile for grouped heads such as Mistral's.
_KERNEL_OPTIONS = {"BACKEND": "TRITON"}
# Most tokens of a device batch of several rows that need a dense mask. Larger ones cost memory, for masks
# (their square) and activations: with 4,096 a model of 64 M parameters trained 7 % faster and took 3.9 GB
# (benchmarks/LOG.md, "rows of their own").
DENSE_FILL = 1024
# Of a device batch, by default. CUDA's is counted, not measured: with it, a 7B base in 4 bits and LoRA take
# 14 GB, of the 24 GB of one card (recipes/configs/llava-1.5-7b/nf4-24gb.yaml).
MAX_ROW_TOKENS = {"cpu": 4096, "cuda": 8192}

# What is done to a mask is known by the function that `__torch_function__` gets. Most functions exist twice:
# as a method of a tensor and as a function of torch.
_SELECTING = {  # reads or writes where the mask is true, so numbers beside it are no misuse
    *(Tensor.where, Tensor.masked_fill, Tensor.masked_fill_, Tensor.masked_select),
    *(torch.where, torch.masked_fill, torch.masked_select),
    *(Tensor.__getitem__, Tensor.__setitem__),
}
_INVERTING = {  # makes a tensor that says what is *not* seen; it is no mask any more
    *(Tensor.__invert__, Tensor.bitwise_not, Tensor.logical_not),
    *(torch.bitwise_not, torch.logical_not),
}
_CASTING = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_CASTING_TO = {Tensor.to, Tensor.type}  # a dtype that is an argument
_SUMMING = {Tensor.sum, torch.sum}


class DenseMask(Tensor):
    """A boolean mask for `sdpa` alone: [rows, 1, tokens, tokens], true where a token (third) sees one.

    It can be read like any other tensor. A result that is a mask again (boolean, four dimensions) is guarded
    like it, any other is a plain tensor. `plain()` is a plain tensor of the same values for any use.
    `torch.save` keeps it guarded; to load it, allow it with `torch.serialization.safe_globals([DenseMask])`.

    Raises:
        ConfigError: it is used as attention does that misreads it: computed with beside floating-point
            numbers (`eager` adds it to its scores), cast to them, cut along its last dimension alone, summed
            into int32.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:  # gets it plain, so that torch.compile can trace it
                return func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
            if _misreads(func, args, kwargs):
                raise ConfigError(
                    f"A packed batch's attention_mask was given to {func.__name__!r} as if by attention "
                    "other than scaled_dot_product_attention, which reads it wrongly. Set the language "
                    "model's: model.set_attn_implementation('sdpa'), or use layout='padded'. To compute "
                    "with the mask, call its plain()."
                )
            result = func(*args, **kwargs)
            if isinstance(func, MethodWrapperType):  # reads an attribute, such as `mask.data`
                return _plain(result)
            is_mask = isinstance(result, Tensor) and result.dtype == torch.bool and result.ndim == 4
            return result.as_subclass(cls) if is_mask and func not in _INVERTING else _plain(result)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseMask:
        memo[id(self)] = copied = self.clone()
        return copied

    def plain(self) -> Tensor:
        """The same booleans as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, DenseMask) else value


def _misreads(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function is called on a mask as attention does that takes it for something else."""
    others = [value for value in (*args, *kwargs.values()) if not isinstance(value, DenseMask)]
    # scores + mask, as `eager` does; also what happens in place or to a part of the mask
    if func not in _SELECTING and any(
        isinstance(other, Tensor) and other.is_floating_point() for other in others
    ):
        return True
    # mask.float(), mask.to(torch.float32), as attention does that makes scores of 0 and -inf from it
    to_floats = any(isinstance(other, torch.dtype) and other.is_floating_point for other in others)
    if func in _CASTING or (func in _CASTING_TO and to_floats):
        return True
    # mask[:, :, :, :keys], as attention cuts a mask of scores to its keys
    if func is Tensor.__getitem__ and isinstance(args[1], tuple):
        slices = [type(place) for place in args[1]] == [slice] * 4
        return slices and args[1][:3] == (slice(None),) * 3
    # mask.sum(-1, dtype=torch.int32): each row's tokens, as flash attention counts them
    return func in _SUMMING and kwargs.get("dtype") == torch.int32


def dense_mask(ends: Tensor) -> DenseMask:
    """The mask of some rows in full.

    Args:
        ends: [rows, tokens] integers.

    Returns:
        [rows, 1, tokens, tokens] boolean.
    """
    place = torch.arange(ends.shape[-1], device=ends.device)  # [tokens]
    before = place[None, :] <= place[:, None]  # [tokens i, tokens j]: j <= i
    within = place[:, None] < ends[:, None, None, :]  # [rows, 1, tokens i, tokens j]: i < ends[j]
    return (before & within).as_subclass(DenseMask)


def block_mask(ends: Tensor) -> BlockMask:
    """The mask of some rows as FlexAttention wants it, never written out in full.

    Which blocks of 128 by 128 tokens are empty, full or mixed follows from the least and the greatest end of
    their columns.

    Args:
        ends: [rows, tokens] integers.
    """
    tokens = ends.shape[-1]
    blocks = -(-tokens // BLOCK)  # rounded up
    # [rows, blocks, BLOCK]; the padding ends at 0, so nobody sees it
    padded = torch.nn.functional.pad(ends, (0, blocks * BLOCK - tokens)).unflatten(-1, (blocks, BLOCK))
    first = torch.arange(blocks, device=ends.device) * BLOCK  # [blocks]: the first token of each
    query, key = first[:, None], first[None, :]  # [blocks, 1] and [1, blocks]
    # [rows, query blocks, key blocks]. Seen: the key with the greatest end is visible to the block's first
    # query. Full: every key is before every query, and the one with the least end is visible to the last.
    seen = (key <= query) & (padded.amax(-1)[:, None, :] > query)
    full = (key < query) & (padded.amin(-1)[:, None, :] >= query + BLOCK)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[row, key])  # inside blocks that are neither empty nor full

    return BlockMask.from_kv_blocks(
        *_in_order(seen & ~full),
        *_in_order(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def attention_inputs(ends: Tensor, config: PreTrainedConfig) -> dict[str, Any]:
    """What a model needs beside its other inputs, so that each token sees its own conversation only.

    Args:
        ends: [rows, tokens] integers, on the model's device.
        config: the model's; its language model's attention implementation decides.

    Returns:
        `attention_mask`, and for FlexAttention `kernel_options`. For `sdpa` the mask is `None` where each row
        is one sequence, perhaps with padding after it. There a token may see everything before it, and
        attention that is causal by itself skips half of the work.

    Raises:
        ConfigError: the implementation is neither of the two.
    """
    implementation = config.get_text_config()._attn_implementation
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(ends), "kernel_options": dict(_KERNEL_OPTIONS)}
    if implementation == "sdpa":
        return {"attention_mask": None if _is_causal(ends) else dense_mask(ends)}
    raise ConfigError(
        f"The language model's attention is {implementation!r}; packed rows need one of sdpa, "
        "flex_attention. Call model.set_attn_implementation('sdpa'), or use layout='padded'."
    )


def _is_causal(ends: Tensor) -> bool:
    """Every row is one sequence, perhaps with padding after it (each token sees itself alone)."""
    # The first token of a row is visible to its whole tree, so a row of one sequence has that many tokens.
    tokens, places = ends[:, :1], torch.arange(ends.shape[-1], device=ends.device)  # [rows, 1] and [tokens]
    return bool(((ends == tokens) | ((places >= tokens) & (ends == places + 1))).all())


def choose_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Set the language model's attention for packed rows: FlexAttention on CUDA where it works, else `sdpa`.

    Args:
        dtype: in which attention is computed: the model's or autocast's.

    Returns:
        Its name.

    Raises:
        ConfigError: it has layers that ignore a mask of four dimensions. A convolution or a state runs along
            the row, from one branch into the next; attention in chunks counts its chunks along it.

    Warns:
        UserWarning: on CUDA, but FlexAttention does not work, and why.
    """
    text = model.config.get_text_config()
    others = sorted({*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"})
    others += [
        name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Conv1d)
    ][:1]
    if others:
        raise ConfigError(
            f"The language model ({text.model_type}) has layers that ignore a packed row's mask "
            f"({', '.join(others)}), so conversations would see one another; wanted attention layers only. "
            "Use layout='padded'."
        )
    implementation = "sdpa"
    if device.type == "cuda":
        why = _why_not_flex(model, dtype)
        if why is None:
            implementation = "flex_attention"
        else:
            warnings.warn(f"Packed rows get dense masks, not FlexAttention: {why}.", stacklevel=2)
    model.set_attn_implementation({"text_config": implementation})
    return implementation


def _why_not_flex(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Why FlexAttention's kernels cannot compute this model; `None`: they can."""
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
        return f"transformers' {text.model_type} does not support it"
    return None


def fill_tokens(implementation: str) -> int | None:
    """Up to how many tokens a device batch is filled with conversations that share nothing.

    Args:
        implementation: from `choose_attention`.

    Returns:
        `None` for FlexAttention, which skips what is not seen: a device batch is one row, filled up to its
        bound. For `sdpa` a dense mask costs the square of a row's tokens, seen or not. So conversations that
        share nothing get rows of their own, and rows of about the same length form a device batch: of at
        most this many tokens, if they need a mask.
    """
    return None if implementation == "flex_attention" else DENSE_FILL


def check_window(config: PreTrainedConfig, longest: int) -> None:
    """Refuse sequences longer than the language model's sliding window, which packed rows ignore.

    Args:
        config: the model's.
        longest: tokens of the longest sequence; a row may be longer.

    Raises:
        ConfigError: the longest sequence does not fit the window.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)
    if window and (layers is None or "sliding_attention" in layers) and longest > window:
        raise ConfigError(
            f"The language model's sliding_window is {window}, the longest conversation has {longest} "
            f"tokens; packed rows need conversations that fit the window. Set max_length={window}, or take "
            "layout='padded'."
        )


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen key blocks of each query block, as `BlockMask` takes them.

    Args:
        chosen: [rows, queries, keys] boolean, counted in blocks.

    Returns:
        How many are chosen, [rows, 1, queries] int32, and all keys, the chosen ones first, [rows, 1, queries,
        keys] int32.
    """
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1).int()[:, None].contiguous(), order[:, None].contiguous()
