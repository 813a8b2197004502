"""Keys of a row that change what is learnt, numbers of any size, and objects spread over several lines."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from llava_rows import folder, gpt, human, row, write

from llavamed_peft import Conversation, Turn
from llavamed_peft.datasets import llava_json
from llavamed_peft.errors import DataError


def read(path: Path, rejects: list | None = None) -> list[Conversation]:
    return list(llava_json.read(path, rejects=rejects))


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_message_is_the_conversations(key: str, folder: Path) -> None:
    (conversation,) = read(write(folder, [row(**{key: " You are a radiologist. "})]))
    assert conversation.system == "You are a radiologist."


def test_a_first_turn_may_be_the_systems(folder: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, human("What?\n<image>"), gpt("A chest.")]
    (conversation,) = read(write(folder, [row(conversations=turns)]))
    assert conversation.system == "Be brief." and len(conversation.turns) == 2


@pytest.mark.parametrize(
    ("value", "learnt"), [(0, False), (0.0, False), (False, False), (1, True), (None, True)]
)
@pytest.mark.parametrize("key", ["weight", "loss"])
def test_an_answer_of_weight_0_is_shown_and_not_learnt(
    key: str, value: object, learnt: bool, folder: Path
) -> None:
    turns = [human("What?\n<image>"), gpt("A chest.") | {key: value}, human("Sure?"), gpt("Yes.")]
    (conversation,) = read(write(folder, [row(conversations=turns)]))
    assert [turn.supervised for turn in conversation.turns] == [True, learnt, True, True]


REFUSED = {
    "several system messages": (
        row(system="a", conversations=[{"from": "system", "value": "b"}, human("<image>"), gpt("a")]),
        "the row has several system messages (system and turn 1); wanted one of them.",
    ),
    "a system message with an image": (
        row(system="<image>"),
        "the system message (system) shows an image; wanted words.",
    ),
    "a system message that is a list": (
        row(system=["a"]),
        "the system message (system) is a list; wanted text.",
    ),
    "only a system message": (
        row(conversations=[{"from": "system", "value": "a"}]),
        "turn 0, the last, is the human's; wanted an answer to it.",
    ),
    "a video": (row(video="a.mp4"), "the row has 'video'; wanted images only."),
    "audio": (row(audio=["a.wav"]), "the row has 'audio'; wanted images only."),
    "a video's marker": (
        row(conversations=[human("<video>\nWhat?"), gpt("a")], image=...),
        "turn 1 holds <video>; wanted images only.",
    ),
    "a weight between": (
        row(conversations=[human("<image>"), gpt("a") | {"weight": 0.5}]),
        "turn 2 has 'weight': 0.5; wanted 1 (the answer is learnt) or 0 (it is not).",
    ),
    "a weight in words": (
        row(conversations=[human("<image>"), gpt("a") | {"loss": "no"}]),
        "turn 2 has 'loss': 'no'; wanted 1 (the answer is learnt) or 0 (it is not).",
    ),
    "a question that is to be learnt": (
        row(conversations=[human("<image>") | {"loss": True}, gpt("a")]),
        "turn 1 is a question with 'loss': True; only answers are learnt.",
    ),
    "weight and loss that differ": (
        row(conversations=[human("<image>"), gpt("a") | {"loss": True, "weight": 0}]),
        "turn 2 has {'weight': 0, 'loss': True}; wanted one of them, or the same.",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}], "images": ["a.jpg"]},
        "the row has 'messages', a form that is not read; wanted 'conversations', a list of "
        '{"from": "human" or "gpt", "value": …}, and images under \'image\'.',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_so_is_rejected_by_name(case: str, folder: Path) -> None:
    given, detail = REFUSED[case]
    rejects = []
    assert len(read(write(folder, [row(), given]), rejects)) == 1
    assert [reject.detail for reject in rejects] == [detail]


def test_keys_that_are_not_read_are_named_once_a_file(folder: Path) -> None:
    odd = row(domain="ct", conversations=[human("<image>"), gpt("a") | {"name": "x"}])
    path = write(folder, [row(video=None, audio=[]), odd, odd | {"license": "?"}])
    with pytest.warns(UserWarning) as warned:
        assert len(read(path)) == 3
    assert [str(one.message) for one in warned] == [
        f"{path}: keys that are not read: 'conversations.name' (first in row 2), 'domain' (first in row 2), "
        "'license' (first in row 3)."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(write(folder, [row(system="a"), row()]))


BIG = 1 << 200  # a DICOM UID written as a number


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_a_whole_number_of_any_size_is_read(layout: str, folder: Path) -> None:
    """In a key that nobody reads, as an id, and as an answer; numbers with a point stay floats."""
    given = [
        row(),
        row(uid=BIG, id=BIG),
        row(id=0.5, conversations=[human("<image>"), gpt(-BIG)], nested=[{"a": [BIG, 1.5]}]),
        row(id="last", conversations=[human("<image>"), gpt(1.5)]),
    ]
    path = write(folder, given, layout)
    with pytest.warns(UserWarning, match="keys that are not read: 'uid' .*, 'nested'"):
        found = read(path)
    assert [one.id for one in found] == ["r", str(BIG), "0.5", "last"]
    assert [one.turns[1].text for one in found[2:]] == [str(-BIG), "1.5"]
    assert [one.source for one in found] == [f"data.json:{n}" for n in (1, 2, 3, 4)]


def test_what_is_broken_after_a_big_number_is_named_there(folder: Path) -> None:
    path = write(folder, [row(), row(uid=BIG)])
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-2] + ",\n{]", encoding="utf-8")
    with pytest.raises(
        DataError, match=rf"broken JSON at byte \d+ \(line {text.count(chr(10)) + 1}, after row 2\)"
    ):
        read(path)


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_a_number_that_python_does_not_write_rejects_its_row(layout: str, folder: Path) -> None:
    path = write(folder, [row(), row(id="long", uid="HERE"), row(id="last")], layout)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"HERE"', "1" + "0" * 5000), encoding="utf-8")
    rejects = []
    assert [one.id for one in read(path, rejects)] == ["r", "last"]
    assert [reject.row for reject in rejects] == [2]
    with pytest.raises(DataError, match=rf"{path}:2 \(id '(long|row 2)'\): "):
        read(path)
    if layout == "array":
        assert rejects[0].id == "long" and rejects[0].detail == "a whole number has 16,610 bits; wanted text."


@pytest.mark.parametrize("between", ["\n", "", "\n\n"])
def test_objects_spread_over_lines_are_rows(between: str, folder: Path) -> None:
    given = [row(id=str(number)) for number in range(3)] + [row(id=BIG)]
    (folder / "data.json").write_text(
        "\ufeff" * (not between) + between.join(json.dumps(one, indent=2) for one in given), encoding="utf-8"
    )
    assert [(one.id, one.source) for one in read(folder / "data.json")] == [
        (id, f"data.json:{number}") for number, id in enumerate(("0", "1", "2", str(BIG)), 1)
    ]


def test_one_row_spread_over_lines_is_a_row_as_one_on_a_line_is(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(row(), indent=2), encoding="utf-8")
    assert [one.id for one in read(folder / "data.json")] == ["r"]


def test_objects_over_lines_that_break_off_say_where(folder: Path) -> None:
    text = json.dumps(row(), indent=2) + "\n" + json.dumps(row(), indent=2)[:-20]
    (folder / "data.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape("broken JSON: the file ends too early, at byte")):
        read(folder / "data.json")
