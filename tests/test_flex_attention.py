"""FlexAttention, which reads packed rows on CUDA: its block mask, its gradients, how often it is compiled,
where it cannot be.

Its kernels for training run on CUDA only. On a CPU torch's own formulas for both passes take their place,
which shows everything but the kernels (`test_flex_kernels.py` has them): that mask, model, checkpointing and
trainer give FlexAttention what it must get, and what becomes of it. With `CUDA_VISIBLE_DEVICES=0` the same
tests run the kernels.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import flex_on_cpu
import pytest
import tiny
import torch
from packed import (
    KINDS,
    assert_same,
    draw_conversations,
    draw_images,
    loss_and_gradients,
    random_ends,
    trainable,
)
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from llavamed_peft import Conversation, Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune
from llavamed_peft.errors import ConfigError
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.parts import bare
from llavamed_peft.modeling.tensors import set_dtypes
from llavamed_peft.packing import PackedCollator, masks
from llavamed_peft.packing.masks import (
    RECOMPILE_LIMIT,
    attention_inputs,
    block_mask,
    choose_attention,
    dense_mask,
    fill_tokens,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_GPU = torch.cuda.is_available()
LOSS, GRADIENT = (1e-5, 1e-4) if ON_GPU else (1e-6, 1e-5)  # relative; a kernel adds in another order


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    return draw_conversations(draw_images(tmp_path_factory.mktemp("images")))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where FlexAttention can train: on a GPU if one is visible, else on a CPU that is made to allow it."""
    torch._dynamo.reset()
    if not ON_GPU:
        flex_on_cpu.allow(monkeypatch.setattr)
    yield CUDA if ON_GPU else CPU
    torch._dynamo.reset()


# The mask


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 640, 1000])
def test_block_mask_is_what_flex_attention_finds_by_itself(tokens: int) -> None:
    ends = random_ends(tokens)
    ours = block_mask(ends)
    theirs = create_block_mask(ours.mask_mod, len(ends), None, tokens, tokens, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices"))
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[used], getattr(theirs, f"{name}_indices")[used]), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(create_mask(ours.mask_mod, len(ends), 1, tokens, tokens, "cpu"), dense_mask(ends))


def test_flex_attention_and_sdpa_agree() -> None:
    ends = random_ends(300)
    query, key, value = torch.randn(3, 2, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    flex = flex_attention(query, key, value, block_mask=block_mask(ends))
    dense = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(ends))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


def test_a_model_reads_a_packed_batch_through_the_cpu_kernel_as_through_sdpa(
    bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = load_checkpoint(bases["llava_next"])
    batch = PackedCollator(processor, max_row_tokens=400, layout="packed").inputs(conversations)
    ends = batch.pop("ends")
    found = {}
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation({"text_config": implementation})
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        with torch.no_grad():
            found[implementation] = model(**batch, **attention_inputs(ends, model.config)).logits[ends > 0]
    torch.testing.assert_close(found["flex_attention"], found["sdpa"], rtol=1e-4, atol=1e-4)


# Gradients


def packed_inputs(
    model: torch.nn.Module, collator: PackedCollator, conversations: list[Conversation]
) -> dict[str, object]:
    """A batch for FlexAttention, on the model's device."""
    batch = {name: tensor.to(model.device) for name, tensor in collator.inputs(conversations).items()}
    return {**batch, **attention_inputs(batch.pop("ends"), bare(model).config)}


def padded_inputs(
    model: torch.nn.Module, processor: object, conversations: list[Conversation]
) -> dict[str, object]:
    batch = PackedCollator(processor, layout="padded")(conversations)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trains", "quantization"), [("full", None), ("projector", "nf4"), ("lora", "nf4")])
def test_loss_and_every_gradient_are_the_padded_batchs(
    kind: str,
    trains: str,
    quantization: str | None,
    device: torch.device,
    bases: dict[str, Path],
    conversations: list[Conversation],
) -> None:
    """In one row, and in several padded to the longest; projector and LoRA also with checkpointing."""
    model, processor = trainable(bases[kind], trains, quantization)
    model.to(device)
    padded = loss_and_gradients(model, padded_inputs(model, processor, conversations))
    assert choose_attention(bare(model), CUDA, torch.float32) == "flex_attention"
    if trains != "full":
        bare(model).gradient_checkpointing_enable({"use_reentrant": False})
        bare(model).enable_input_require_grads()
    for bound in (None, 200):
        batch = packed_inputs(model, PackedCollator(processor, max_row_tokens=bound), conversations)
        assert len(batch["input_ids"]) > 1 or bound is None
        assert_same(loss_and_gradients(model, batch), padded, LOSS, GRADIENT)


def test_bf16_stays_near_the_padded_batch(
    device: torch.device, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = trainable(bases["llava_onevision"], "lora")
    set_dtypes(model, torch.bfloat16)
    model.to(device)
    choose_attention(bare(model), CUDA, torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        one = loss_and_gradients(model, packed_inputs(model, PackedCollator(processor), conversations))
        choose_attention(bare(model), CPU, torch.bfloat16)
        other = loss_and_gradients(model, padded_inputs(model, processor, conversations))
    assert_same(one, other, loss=2e-2, gradient=0.1)


# Compiling


def test_rows_of_any_length_are_compiled_a_few_times_and_no_more(
    device: torch.device, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    """A row of one block is a kind of its own, as are rows without gradients; lengths are not."""
    model, processor = trainable(bases["llava"])
    model.to(device)
    choose_attention(bare(model), CUDA, torch.float32)
    counters.clear()
    lengths = set()
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):
        for chosen in range(1, len(conversations) + 1):
            batch = packed_inputs(model, PackedCollator(processor), conversations[-chosen:])
            lengths.add(batch["input_ids"].shape[1])
            loss_and_gradients(model.train(), batch)
            with torch.no_grad():
                model.eval()(**batch)
    assert min(lengths) < masks.BLOCK < 2 * masks.BLOCK < max(lengths) and len(lengths) == len(conversations)
    assert counters["stats"]["unique_graphs"] <= 6


def test_stages_of_every_class_train_in_one_process_as_padded_ones(
    device: torch.device,
    bases: dict[str, Path],
    conversations: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They need more compilations than torch's own limit, beyond which FlexAttention would run uncompiled."""
    if device == CPU:
        flex_on_cpu.choose(monkeypatch.setattr)
    schedule = Schedule(epochs=1, learning_rate=1e-3, global_batch=4)
    stages = (Stage("align", "projector", schedule), Stage("vqa", "lora", schedule, LoraSpec(4, 8, 0.0)))
    counters.clear()
    for kind, dtype in itertools.product(bases, ("float32", "bfloat16")):
        found = {}
        for layout in ("packed", "padded"):
            adapters = curriculum_finetune(
                bases[kind],
                dict.fromkeys(("align", "vqa"), conversations),
                tmp_path / f"{kind}-{dtype}-{layout}",
                curriculum=Curriculum(stages),
                eval_data={"vqa": conversations[:5]},
                max_row_tokens=500,
                dtype=dtype,
                layout=layout,
            )
            metrics = [adapter.metrics for adapter in adapters.values()]
            found[layout] = [one[name] for one in metrics for name in ("loss_first", "loss_last")]
            found[layout] += [metrics[-1][name] for name in ("eval_loss_before", "eval_loss_after")]
        tolerance = 10 * GRADIENT if dtype == "float32" else 2e-2
        assert found["packed"] == pytest.approx(found["padded"], rel=tolerance)
    assert 8 < counters["stats"]["unique_graphs"] < RECOMPILE_LIMIT


# Where it cannot be had


def test_each_device_has_one_attention_and_others_are_refused(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_checkpoint(bases["llava"])
    monkeypatch.setattr(masks, "has_triton", lambda: True)
    assert [fill_tokens(choose_attention(model, device, torch.float32)) for device in (CPU, CUDA)] == [
        1024,
        None,
    ]
    assert model.config.text_config._attn_implementation == "flex_attention"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    choose_attention(model, CPU, torch.float32)
    assert model.config.text_config._attn_implementation == "sdpa"
    model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(
        ConfigError, match="The language model's attention is 'eager'; packed rows need one of sdpa, flex_att"
    ):
        attention_inputs(torch.tensor([[2, 2]]), model.config)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"triton": False}, "Triton is not installed"),
        ({"head_dim": 8}, "heads are 8 wide, and its kernels need 16"),
        ({"head_dim": 128}, "heads are 128 wide, too wide for its kernels in float32"),
        ({"attention_dropout": 0.1}, "has attention_dropout 0.1"),
        ({"supported": False}, "transformers' llama does not support it"),
    ],
)
def test_where_flex_attention_cannot_be_had_on_cuda_sdpa_takes_its_place(
    change: dict[str, object], why: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_checkpoint(bases["llava"])
    monkeypatch.setattr(masks, "has_triton", lambda: "triton" not in change)
    monkeypatch.setattr(type(model.get_decoder()), "_supports_flex_attn", "supported" not in change)
    for name in change.keys() - {"triton", "supported"}:
        setattr(model.config.text_config, name, change[name])
    with pytest.warns(UserWarning, match=f"Packed rows get dense masks, not FlexAttention: .*{why}"):
        assert choose_attention(model, CUDA, torch.float32) == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_attention(model, CPU, torch.float32)
