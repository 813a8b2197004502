"""The packed layout: trees, rows and masks by definition; loss, gradients, logits against the padded one."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import KINDS, asked, assert_same, draw_conversations, draw_images, loss_and_gradients, trainable
from transformers import AutoProcessor

from llavamed_peft import Conversation, Question
from llavamed_peft.errors import CheckpointError, ConfigError, DataError
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.parts import bare
from llavamed_peft.modeling.tensors import set_dtypes
from llavamed_peft.packing import PackedCollator
from llavamed_peft.packing.encoding import IGNORED
from llavamed_peft.packing.masks import attention_inputs
from llavamed_peft.packing.rows import Row
from llavamed_peft.packing.tree import Segment, TokenSequence
from llavamed_peft.storage.equal_images import content_key
from llavamed_peft.storage.images import image_size

# Batches


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_row_tokens", [None, 200, 1])
def test_loss_and_every_gradient_are_the_padded_batchs(
    kind: str, max_row_tokens: int | None, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = trainable(bases[kind])
    packed = PackedCollator(processor, 2048, max_row_tokens, "packed")(conversations)
    padded = PackedCollator(processor, layout="padded")(conversations)
    assert packed["input_ids"].numel() < padded["input_ids"].numel() or max_row_tokens == 1
    assert len(packed["input_ids"]) == 1 or max_row_tokens is not None
    assert_same(loss_and_gradients(model, packed), loss_and_gradients(model, padded))


SAID = (("what is it ?", "what is the heart ?", "is it left ?"), ("yes", "the heart", "the heart is normal"))


exchanges = st.lists(st.tuples(*map(st.sampled_from, SAID)), min_size=1, max_size=3)


shown = st.lists(st.sampled_from(["a", "b", "again"]), max_size=2)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.lists(st.tuples(shown, exchanges), min_size=1, max_size=7),
    bound=st.sampled_from([None, 300, 120]),
    apart=st.booleans(),
    kind=st.sampled_from([*KINDS]),
)
def test_random_trees_have_the_padded_batchs_gradient(
    rows: list[tuple[list[str], list[tuple[str, str]]]],
    bound: int | None,
    apart: bool,
    kind: str,
    models: dict[str, tuple[object, object]],
    images: dict[str, str],
) -> None:
    """Few words and images, so that much is common: beginnings, questions, whole dialogues, everything."""
    model, processor = models[kind]
    given = [
        asked(
            number, tuple(images[name] for name in names), *(word for exchange in said for word in exchange)
        )
        for number, (names, said) in enumerate(rows)
    ]
    packed = PackedCollator(processor, 2048, bound, "packed", 1024 if apart else None).inputs(given)
    packed |= attention_inputs(packed.pop("ends"), bare(model).config)
    padded = PackedCollator(processor, layout="padded")(given)
    assert_same(loss_and_gradients(model, packed), loss_and_gradients(model, padded))


@pytest.fixture(scope="module")
def models(bases: dict[str, Path]) -> dict[str, tuple[object, object]]:
    return {kind: trainable(base, "lora") for kind, base in bases.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_their_own_have_the_padded_batchs_loss_and_gradients(
    kind: str, shared: bool, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    """Four lengths in one batch, the shorter ones padded; without shared tokens it needs no mask."""
    model, processor = trainable(bases[kind])
    given = conversations if shared else [conversations[i] for i in (0, 2, 6, 9)]
    packed = PackedCollator(processor, layout="packed", fill_tokens=1024).inputs(given)
    assert len(packed["input_ids"]) == (7 if shared else 4)
    packed |= attention_inputs(packed.pop("ends"), bare(model).config)
    assert (packed["attention_mask"] is None) == (not shared)
    padded = PackedCollator(processor, layout="padded")(given)
    assert_same(loss_and_gradients(model, packed), loss_and_gradients(model, padded))


def test_equal_images_are_one_whatever_their_paths(bases: dict[str, Path], images: dict[str, str]) -> None:
    processor = load_checkpoint(bases["llava"])[1]
    given = [
        asked(i, (images[name],), "what is it ?", "a heart") for i, name in enumerate(("a", "again", "b"))
    ]
    batch = PackedCollator(processor, layout="packed")(given)
    assert len(batch["pixel_values"]) == 2
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * tiny.GRID


def test_image_inputs_are_in_the_rows_order(bases: dict[str, Path], images: dict[str, str]) -> None:
    """One row a conversation (bound 1), in another order than the conversations': longest first."""
    processor = load_checkpoint(bases["llava_onevision"])[1]
    a, b, c = (images[name] for name in "abc")
    given = [
        asked(1, (a,), "what is it ?", "a heart"),
        asked(2, (b, c), "what is it ?", "a heart"),
        asked(3, (c,), "what is it ?", "a heart"),
    ]
    batch = PackedCollator(processor, max_row_tokens=1, layout="packed")(given)
    tokens = (batch["input_ids"] == processor.image_token_id).sum(-1)
    alone = [PackedCollator(processor, layout="packed")([one]) for one in given]
    order = [
        next(i for i, one in enumerate(alone) if (one["input_ids"] == processor.image_token_id).sum() == n)
        for n in tokens
    ]
    assert sorted(order) == [0, 1, 2] and order != [0, 1, 2]
    assert batch["image_sizes"].tolist() == [size for i in order for size in alone[i]["image_sizes"].tolist()]
    assert batch["batch_num_images"].tolist() == [[1, 2, 1][i] for i in order]


def test_no_conversations_are_one_row_without_a_label(bases: dict[str, Path]) -> None:
    model, processor = load_checkpoint(bases["llava"])
    batch = PackedCollator(processor, layout="packed")([])
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == IGNORED).all()
    assert model(**{**batch, "labels": None}).logits.isfinite().all()


def test_a_conversation_that_is_too_long_or_an_image_that_is_missing_is_named(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    processor = load_checkpoint(bases["llava"])[1]
    given = [asked(7, (), "what is it ?", "a heart " * 20)]
    with pytest.raises(
        DataError, match=r"d\.json:7 \(id 7\): \d+ tokens, 0 of them image tokens; max_length is 20"
    ):
        PackedCollator(processor, max_length=20, layout="packed")(given)
    with pytest.raises(DataError, match="no such file"):
        PackedCollator(processor, layout="packed")(
            [asked(8, (str(tmp_path / "none.png"),), "what is it ?", "a heart")]
        )


def laid_rows(
    collator: PackedCollator, conversations: list[Conversation]
) -> tuple[list[TokenSequence], list[Row]]:
    sequences = [
        collator.sequence(
            one, [content_key(image) for image in one.images], [image_size(image) for image in one.images]
        )
        for one in conversations
    ]
    return sequences, collator.rows(sequences)


def paths_of(row: Row) -> dict[int, list[int]]:
    """The places of each conversation's tokens, from the segments; nothing that masks are made of is read."""
    paths: dict[int, list[int]] = {}
    places = itertools.count()

    def walk(segment: Segment, before: list[int]) -> None:
        path = before + [next(places) for _ in range(segment.begin, segment.end)]
        for child in segment.children:
            walk(child, path)
        if not segment.children:
            paths[segment.sequence] = path

    for tree in row.forest:
        walk(tree, [])
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_branch_or_image_leaves_every_other_one_as_it_was_to_the_last_bit(
    kind: str, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = load_checkpoint(bases[kind])
    collator = PackedCollator(processor, layout="packed")
    batch = {**collator(conversations), "labels": None}
    sequences, (row,) = laid_rows(collator, conversations)
    paths = paths_of(row)
    assert all(
        row.input_ids[path].tolist() == sequences[number].input_ids.tolist() for number, path in paths.items()
    )
    assert len(paths) == len(conversations) and batch["input_ids"][0].tolist() == row.input_ids.tolist()

    def logits(**changed: torch.Tensor) -> dict[int, torch.Tensor]:
        with torch.no_grad():
            found = model(**{**batch, **changed}).logits[0]
        return {number: found[path] for number, path in paths.items()}

    before = logits()
    for changed, path in paths.items():
        others = {token for other in paths if other != changed for token in paths[other]}
        own = [
            token
            for token in path
            if token not in others and row.input_ids[token] != processor.image_token_id
        ]
        input_ids = batch["input_ids"].clone()
        input_ids[0, own] = 10 + (input_ids[0, own] + 7) % 200
        after = logits(input_ids=input_ids)
        assert [number for number in paths if not torch.equal(after[number], before[number])] == [changed]
    for shown, (sequence, number) in enumerate(row.images):
        pixels = batch["pixel_values"].clone()
        pixels[shown] = -pixels[shown]
        after = logits(pixel_values=pixels)
        place = paths[sequence][sequences[sequence].images[number].begin]
        seeing = [other for other in paths if place in paths[other]]
        assert [other for other in paths if not torch.equal(after[other], before[other])] == seeing


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_supervised_positions_are_those_among_all(
    kind: str, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = load_checkpoint(bases[kind])
    batch = PackedCollator(processor, max_row_tokens=200, layout="packed")(conversations)
    labels = batch.pop("labels")
    asked = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    with torch.no_grad():
        some, every = model(**batch, logits_to_keep=asked).logits, model(**batch).logits
    assert len(labels) > 1 and asked.any(-1).all()
    torch.testing.assert_close(some, every[asked], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_optimizer_steps_have_the_padded_batchs_losses(
    kind: str, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    losses: dict[str, list[float]] = {}
    for layout in ("packed", "padded"):
        model, processor = trainable(bases[kind], "lora")
        collator = PackedCollator(
            processor, max_row_tokens=200 if layout == "packed" else None, layout=layout
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        for step in range(20):
            chosen = [
                conversations[i]
                for i in np.random.default_rng(step).choice(len(conversations), 6, replace=False)
            ]
            optimizer.zero_grad()
            loss = model(**collator(chosen)).loss
            loss.backward()
            optimizer.step()
            losses.setdefault(layout, []).append(loss.item())
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)
    assert np.mean(losses["packed"][-5:]) < 0.7 * np.mean(losses["packed"][:5]), "it learns"


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("trains", ["projector", "lora"])
def test_gradients_are_the_padded_ones_over_nf4_and_under_checkpointing(
    trains: str, quantization: str | None, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = trainable(bases["llava_next"], trains, quantization)
    packed = PackedCollator(processor, max_row_tokens=400, layout="packed")(conversations)
    plain = loss_and_gradients(model, packed)
    bare(model).gradient_checkpointing_enable({"use_reentrant": False})
    bare(model).enable_input_require_grads()
    checkpointed = loss_and_gradients(model, packed)
    assert_same(checkpointed, plain)
    assert_same(
        checkpointed, loss_and_gradients(model, PackedCollator(processor, layout="padded")(conversations))
    )


def test_bf16_and_lora_dropout_train(bases: dict[str, Path], conversations: list[Conversation]) -> None:
    model, processor = trainable(bases["llava"], "lora", dropout=0.1)
    set_dtypes(model, torch.bfloat16)
    packed = PackedCollator(processor, layout="packed")(conversations)
    padded = PackedCollator(processor, layout="padded")(conversations)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, packed)
        model.eval()
        same = [model(**batch).loss.item() for batch in (packed, padded)]
    assert np.isfinite(loss) and all(gradient.isfinite().all() for gradient in gradients.values())
    assert same[0] == pytest.approx(same[1], rel=2e-2)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"layout": "dense"}, ConfigError, "layout is 'dense'; wanted one of packed, padded."),
        (
            {"max_row_tokens": 0},
            ConfigError,
            "max_row_tokens is 0; wanted None or a whole number of at least 1.",
        ),
        (
            {"fill_tokens": "some"},
            ConfigError,
            "fill_tokens is 'some'; wanted None or a whole number of at least 1.",
        ),
        ({"max_length": None}, ConfigError, "max_length is None; wanted a whole number of at least 1."),
        (
            {"processor": "stock"},
            CheckpointError,
            "LlavaProcessor has no patch_size; wanted the processor of a LLaVA checkpoint as",
        ),
        (
            {"processor": "tokenizer"},
            CheckpointError,
            " has no tokenizer, image_token_id; wanted the processor of a LLaVA checkp",
        ),
    ],
)
def test_a_collator_refuses_what_it_cannot_work_with(
    wrong: dict[str, object], error: type[Exception], said: str, bases: dict[str, Path]
) -> None:
    stock = AutoProcessor.from_pretrained(bases["llava"])
    processors = {None: load_checkpoint(bases["llava"])[1], "stock": stock, "tokenizer": stock.tokenizer}
    with pytest.raises(error, match=re.escape(said)):
        PackedCollator(processors[wrong.pop("processor", None)], **wrong)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_collator_takes_any_iterable_of_conversations_and_names_what_it_cannot_take(
    layout: str, bases: dict[str, Path], images: dict[str, str]
) -> None:
    collator = PackedCollator(load_checkpoint(bases["llava"])[1], layout=layout)
    questions = [
        Question(str(number), images["a"], f"is it {number} ?", "no", "closed") for number in range(3)
    ]
    asked_for = [question.conversation() for question in questions]
    one, other = (collator(asked_for), collator(question.conversation() for question in questions))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(
        ConfigError,
        match=r"conversations\[1\] is a Question; wanted a Conversation; call its conversation\(\)\.",
    ):
        collator([asked_for[0], questions[1]])
    with pytest.raises(ConfigError, match=r"conversations\[0\] is a str; wanted a Conversation\."):
        collator("abc")
    for words, said in (
        ("a </s> b", "Turn 1 holds '</s>', which"),
        ("a \ud800 b", r"Turn 1 holds '\\ud800', half of a char"),
    ):
        with pytest.raises(DataError, match=rf"d\.json:7 \(id 7\): {said}"):
            collator([asked(7, (), words, "a heart")])
