"""Rows without a model: every sequence complete, prefixes once, masks as defined."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from llavamed_peft import packing
from llavamed_peft.packing.encoding import IGNORED
from llavamed_peft.packing.masks import block_mask, dense_mask
from llavamed_peft.packing.rows import lay_rows
from llavamed_peft.packing.tree import ImageSpan, TokenSequence, build_forest, describe, first_fit

untimed = settings(deadline=None)  # a busy machine is no failure


# Trees and rows


def sequence(ids: list[int], supervised: list[int], images: tuple[ImageSpan, ...] = ()) -> TokenSequence:
    labels = np.full(len(ids), IGNORED)
    labels[supervised] = np.array(ids)[supervised]
    return TokenSequence(np.array(ids), labels, images)


@st.composite
def sequences(draw: st.DrawFn) -> list[TokenSequence]:
    """Random conversations of few tokens and images, so much is shared; an image has 1 to 3 tokens 9."""
    drawn = []
    for _ in range(draw(st.integers(1, 12))):
        ids: list[int] = []
        spans = []
        for _ in range(draw(st.integers(1, 6))):
            if draw(st.booleans()):
                content = draw(st.integers(0, 2))
                spans.append(ImageSpan(content, len(ids), len(ids) + 1 + content))
                ids += [9] * (1 + content)
            else:
                ids += draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
        ids += draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
        free = [i for i in range(len(ids)) if ids[i] != 9]
        drawn.append(sequence(ids, sorted(draw(st.sets(st.sampled_from(free), max_size=3))), tuple(spans)))
    return drawn


def content_at(sequence: TokenSequence, token: int) -> tuple[object, ...]:
    for content, begin, end in sequence.images:
        if begin <= token < end:
            return ("image", content, token - begin)
    return ("token", int(sequence.input_ids[token]))


@untimed
@given(sequences(), st.one_of(st.none(), st.integers(1, 60)))
def test_rows_hold_every_sequence_completely_and_share_all_they_may(
    given: list[TokenSequence], bound: int | None
) -> None:
    rows = lay_rows(given, bound)
    assert sorted(number for row in rows for number in row.last) == list(range(len(given)))
    assert bound is not None or len(rows) == 1
    for row in rows:
        assert bound is None or len(row) <= bound or len(row.last) == 1
        covered = set()
        for number in row.last:
            path = row.path(number)
            covered |= set(path.tolist())
            assert row.input_ids[path].tolist() == given[number].input_ids.tolist()
            assert row.positions[path].tolist() == list(range(len(given[number])))
            # Hugging Face's shift: the token before a supervised one in the row is the one before it in its
            # sequence
            for place, token in enumerate(path.tolist()):
                if row.labels[token] != IGNORED:
                    assert place > 0 and path[place - 1] == token - 1
            wanted = given[number].labels.copy()
            wanted[0] = IGNORED
            assert row.labels[path].tolist() == wanted.tolist()
        assert covered == set(range(len(row))), "every token belongs to a sequence"
    learnt = sum(int((row.labels != IGNORED).sum()) for row in rows)
    assert learnt == sum(int((one.labels[1:] != IGNORED).sum()) for one in given), (
        "supervised tokens count once each"
    )


@untimed
@given(sequences())
def test_one_row_holds_each_shareable_prefix_once(given: list[TokenSequence]) -> None:
    (row,) = lay_rows(given)
    once = set()
    for number, one in enumerate(given):
        seen: tuple[object, ...] = ()
        for token in range(len(one)):
            seen = (*seen, content_at(one, token))
            once.add(seen if token < one.shareable else (number, token))
    assert len(row) == len(once)


@untimed
@given(sequences(), st.one_of(st.none(), st.integers(1, 60)))
def test_images_of_a_row_are_in_the_order_of_their_placeholders(
    given: list[TokenSequence], bound: int | None
) -> None:
    for row in lay_rows(given, bound):
        listed = [given[number].images[image] for number, image in row.images]
        contents = [(span.content, place) for span in listed for place in range(span.end - span.begin)]
        shown_at = {}
        for number in row.last:
            for place, token in enumerate(row.path(number).tolist()):
                shown_at[token] = content_at(given[number], place)
        placeholders = [shown_at[token] for token in np.flatnonzero(row.input_ids == 9).tolist()]
        assert placeholders == [("image", *content) for content in contents]


@untimed
@given(sequences(), st.one_of(st.none(), st.integers(1, 60)))
def test_masks_are_what_is_visible_by_definition(given: list[TokenSequence], bound: int | None) -> None:
    """A token sees exactly its own sequence up to itself: written from the paths, without `ends`."""
    for row in lay_rows(given, bound):
        wanted = np.zeros((len(row), len(row)), dtype=bool)
        for number in row.last:
            path = row.path(number)
            for place, token in enumerate(path):
                wanted[token, path[: place + 1]] = True
        ends = torch.from_numpy(row.ends)[None]
        assert (dense_mask(ends)[0, 0].numpy() == wanted).all()
        assert torch.equal(
            create_mask(block_mask(ends).mask_mod, 1, 1, len(row), len(row), "cpu")[0, 0],
            torch.tensor(wanted),
        )


def test_a_tree_reads_as_written() -> None:
    image = lambda content: (ImageSpan(content, 1, 4),)  # noqa: E731
    given = [
        sequence([1, 9, 9, 9, 5, 6, 7], [6], image("a")),
        sequence([1, 9, 9, 9, 5, 8, 7], [6], image("a")),
        sequence([1, 9, 9, 9, 5, 8, 7], [6], image("a")),  # asked twice: its answer counts twice
        sequence([1, 9, 9, 9, 5, 6, 7], [6], image("b")),
    ]
    forest = build_forest(given)
    assert list(describe(forest)) == [
        "0-1: 1 tokens shared by 4",
        "  1-5: 4 tokens shared by 3",
        "    5-7: 2 tokens of sequence 0",
        "    5-7: 2 tokens of sequence 1",
        "    5-7: 2 tokens of sequence 2",
        "  1-7: 6 tokens of sequence 3",
    ]
    (row,) = lay_rows(given)
    assert row.input_ids.tolist() == [1, 9, 9, 9, 5, 6, 7, 8, 7, 8, 7, 9, 9, 9, 5, 6, 7]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 1, 2, 3, 4, 5, 6]
    assert row.ends.tolist() == [17, 11, 11, 11, 11, 7, 7, 9, 9, 11, 11, *[17] * 6]
    assert np.flatnonzero(row.labels != IGNORED).tolist() == [6, 8, 10, 16]
    assert row.images == ((0, 0), (3, 0))


def test_the_row_drawn_in_the_documentation_is_laid_out() -> None:
    lines = packing.__doc__.splitlines()
    drawn = {words[0]: words[1:16] for words in map(str.split, lines) if len(words) > 15}
    texts = {"^##a?x$": (ImageSpan("image", 1, 3),), "^##b?y$": (ImageSpan("image", 1, 3),), "^c?z$": ()}
    given = []
    for text, images in texts.items():
        ids = np.array([ord(character) for character in text])
        given.append(TokenSequence(ids, np.where(np.arange(len(ids)) < len(ids) - 2, IGNORED, ids), images))
    (row,) = lay_rows(given)
    assert [chr(token) for token in row.input_ids] == drawn["input_ids"]
    assert [str(position) for position in row.positions] == drawn["positions"]
    assert [str(end) for end in row.ends] == drawn["ends"]
    assert ["." if label == IGNORED else chr(label) for label in row.labels] == drawn["labels"]
    assert row.images == ((0, 0),) and "".join(chr(row.input_ids[i]) for i in row.path(1)) == "^##b?y$"


def test_a_tree_longer_than_a_row_is_split_by_repeating_its_prefix() -> None:
    given = [sequence([1, 2, 3, 4, 10 + i, 5], [5]) for i in range(5)]
    rows = lay_rows(given, 8)
    assert [len(row) for row in rows] == [8, 8, 6]
    assert all(row.input_ids[:4].tolist() == [1, 2, 3, 4] for row in rows)
    assert [len(row) for row in lay_rows(given, 5)] == [6] * 5, "a sequence longer than the bound is alone"


def test_a_path_of_many_segments_is_cut_short() -> None:
    """Each continues the last one's question; sharing all of it would be deeper than Python can recurse."""
    given = [sequence([*range(10, 11 + i), 1, 2], [i + 2]) for i in range(2000)]
    (row,) = lay_rows(given)
    assert all(row.input_ids[row.path(i)].tolist() == given[i].input_ids.tolist() for i in range(0, 2000, 50))
    assert len(row) < sum(map(len, given))


def test_an_image_is_not_cut_though_it_predicts_the_answer() -> None:
    given = [sequence([1, 9, 9, 9, 5, i], [4, 5], (ImageSpan("a", 1, 4),)) for i in (6, 7)]
    assert [one.shareable for one in given] == [1, 1]
    (row,) = lay_rows(given)
    assert row.images == ((0, 0), (1, 0)) and len(row) == 11


@untimed
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_first_fit_wastes_little(sizes: list[int], capacity: int) -> None:
    bins = first_fit(sizes, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in items) for items in bins]
    assert all(load <= capacity or len(items) == 1 for load, items in zip(loads, bins, strict=True))
    fitting = sorted(load for load in loads if load <= capacity)
    assert len(fitting) < 2 or fitting[0] + fitting[1] > capacity, "two bins could have been one"
