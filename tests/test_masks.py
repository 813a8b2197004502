"""Dense masks of packed rows: where none is needed, what may be done with one, and models that get none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from packed import KINDS, draw_conversations, draw_images, loss_and_gradients, trainable
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration, ProcessorMixin
from transformers.modeling_flash_attention_utils import _get_unpad_data

from llavamed_peft import Conversation
from llavamed_peft.errors import ConfigError
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.packing import PackedCollator
from llavamed_peft.packing.masks import (
    DenseMask,
    attention_inputs,
    check_window,
    choose_attention,
    dense_mask,
)


def test_only_rows_of_one_sequence_go_without_a_mask(bases: dict[str, Path]) -> None:
    config = load_checkpoint(bases["llava"])[0].config
    assert attention_inputs(torch.tensor([[4, 4, 4, 4], [2, 2, 3, 4]]), config)["attention_mask"] is None
    for branching in ([[2, 2, 6, 5, 6, 7]], [[4, 2, 4, 4]], [[2, 2, 4, 4]]):
        assert attention_inputs(torch.tensor(branching), config)["attention_mask"] is not None


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def conversations(images: dict[str, str]) -> list[Conversation]:
    return draw_conversations(images)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_that_would_misread_a_dense_mask_is_refused(
    implementation: str, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = load_checkpoint(bases["llava"])
    batch = PackedCollator(processor, layout="packed")(conversations[:3])
    model.set_attn_implementation({"text_config": implementation})
    with pytest.raises(
        ConfigError, match=r"other than scaled_dot_product_attention, .*set_attn_implementation\('sdpa'\)"
    ):
        model(**batch)
    model.set_attn_implementation("sdpa")
    assert model(**batch).loss.isfinite()


def test_a_compiled_model_reads_a_packed_batch_as_it_is(
    bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = trainable(bases["llava"])
    batch = PackedCollator(processor, layout="packed")(conversations[:3])
    plain = loss_and_gradients(model, batch)
    compiled = loss_and_gradients(torch.compile(model, backend="aot_eager"), batch)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6) and len(compiled[1]) == len(plain[1])


SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
OTHERS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "attn_layer_indices": [1],
    },
    "llama4_text": {
        "head_dim": 16,
        "attention_chunk_size": 32,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    },
}


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_model_that_is_not_attention_alone_is_refused(language: str) -> None:
    """Packed, it would train and learn something else; the first two let a branch see its sibling."""
    text_config = CONFIG_MAPPING[language](**SMALL, **OTHERS[language])
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=tiny.vision_config("clip"), text_config=text_config)
        )
    with pytest.raises(ConfigError, match=rf"\({language}\) has layers that ignore .* Use layout='padded'"):
        choose_attention(model, torch.device("cpu"), torch.float32)


def test_a_sliding_window_is_refused_only_where_a_conversation_is_longer(
    bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = load_checkpoint(bases["llava_next"])
    packed = PackedCollator(processor, layout="packed")(conversations)
    padded = PackedCollator(processor, layout="padded")(conversations)
    longest = padded["input_ids"].shape[1]
    assert packed["input_ids"].shape[1] > longest
    for window in (longest, longest - 20):
        model.config.text_config.sliding_window = window
        with torch.no_grad():
            losses = [model(**batch).loss.item() for batch in (packed, padded)]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) == (window == longest), "why it is refused"
    check_window(model.config, window)
    with pytest.raises(
        ConfigError, match=rf"sliding_window is {window}, the longest conversation has {window + 1} tokens"
    ):
        check_window(model.config, window + 1)
    model.config.text_config.layer_types = ["full_attention"]
    check_window(model.config, longest)
    check_window(LlavaConfig(text_config=CONFIG_MAPPING["qwen2_moe"]()), longest)


def test_a_mask_can_be_moved_and_looked_into_and_survives_a_worker(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    processor: ProcessorMixin = load_checkpoint(bases["llava"])[1]
    collator = PackedCollator(processor, layout="packed")
    (batch,) = DataLoader(conversations[:4], batch_size=4, collate_fn=collator, num_workers=1)
    mask = batch["attention_mask"]
    assert type(mask) is type(mask.to("cpu")) is type(mask.clone()) is DenseMask
    whole = collator(conversations[:4])["attention_mask"].plain()
    assert type(whole) is type(mask[0, 0]) is torch.Tensor and torch.equal(mask, whole)
    assert mask[0, 0].tolist() == mask.numpy()[0, 0].tolist() == whole[0, 0].tolist()
    assert torch.equal((~mask).to(torch.float32), (~whole).float()) and torch.equal(
        mask[:, :, :, 0], whole[:, :, :, 0]
    )
    assert torch.equal(mask.sum(-1, dtype=torch.long), whole.sum(-1)) and mask.sum() == whole.sum()
    assert mask.plain().float().mean() == whole.float().mean() and (mask & ~whole).sum() == 0
    assert torch.equal(mask[:, :, :5, :5], whole[:, :, :5, :5]) and torch.equal(
        copy.deepcopy(batch)["attention_mask"], whole
    )
    torch.save(batch, tmp_path / "batch.pt")
    with torch.serialization.safe_globals([DenseMask]):
        loaded = torch.load(tmp_path / "batch.pt")["attention_mask"]
    assert type(loaded) is DenseMask and torch.equal(loaded, whole)
    assert torch.equal(torch.zeros(whole.shape).masked_fill(~mask, -1), whole.float() - 1)
    assert "True" in str(mask) and mask.shape[-1] == batch["input_ids"].shape[1]


MISREADINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "added to scores": lambda mask, scores: scores + mask,
    "scores added to it": lambda mask, scores: mask + scores,
    "in place": lambda mask, scores: scores.add_(mask),
    "for every head": lambda mask, scores: scores + mask.expand(1, 2, 4, 4),
    "cut otherwise": lambda mask, scores: scores + mask[..., :4],
    "with another mask": lambda mask, scores: scores + (mask & torch.ones(4, 4, dtype=torch.bool)),
    "to trained scores": lambda mask, scores: torch.nn.Parameter(scores) + mask,
    "cast": lambda mask, scores: mask.to(torch.float32),
    "cast by type": lambda mask, scores: mask.type(torch.float16),
    "lengths, summed by torch": lambda mask, scores: torch.sum(mask, -1, dtype=torch.int32),
    "cast by name": lambda mask, scores: mask.float(),
    "cast and moved": lambda mask, scores: mask.to("cpu", torch.bfloat16),
    "cut to the keys": lambda mask, scores: mask[:, :, :, : scores.shape[-1]],
    "flash attention's lengths": lambda mask, scores: _get_unpad_data(mask),
}


@pytest.mark.parametrize("how", MISREADINGS)
def test_what_attention_that_misreads_a_mask_does_with_it_is_refused(how: str) -> None:
    mask = dense_mask(torch.tensor([[4, 4, 3, 4]]))
    with pytest.raises(
        ConfigError, match=r"which reads it wrongly.* To compute with the mask, call its plain\(\)"
    ):
        MISREADINGS[how](mask, torch.zeros(1, 2, 4, 4))
