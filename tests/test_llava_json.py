"""`datasets.llava_json`: what published files do is read, what would have to be guessed is rejected with a
reason, and nothing is dropped in silence. Also the rejects themselves, which every reader shares.
"""

import json

import pytest
from llava_rows import folder, gpt, human, row, write

from llavamed_peft.conversations import Conversation, Turn
from llavamed_peft.datasets import llava_json
from llavamed_peft.errors import DataError


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_a_row_becomes_a_conversation(folder, layout):
    path = write(folder, [row(domain={"mri": True}), row(id=7)], layout)
    turns = (Turn("user", "What?\n<image>"), Turn("assistant", "A chest."))
    assert list(llava_json.read(path)) == [
        Conversation("r", turns, (str(folder / "a.jpg"),), "data.json:1"),
        Conversation("7", turns, (str(folder / "a.jpg"),), "data.json:2"),
    ]


ODD_BUT_GOOD = {
    "misspelled key": (
        row(conversations=..., conversatons=[human("<image>\nq"), gpt("a")]),
        [("<image>\nq", "a")],
        ["a.jpg"],
    ),
    "whole number": (
        row(conversations=[human("<image> how many?"), gpt(3)]),
        [("<image> how many?", "3")],
        ["a.jpg"],
    ),
    "decimal number": (row(conversations=[human("<image>"), gpt(2.5)]), [("<image>", "2.5")], ["a.jpg"]),
    "truth value": (row(conversations=[human("<image>"), gpt(True)]), [("<image>", "true")], ["a.jpg"]),
    "no image key": (row(image=..., conversations=[human("q"), gpt("a")]), [("q", "a")], []),
    "null image": (row(image=None, conversations=[human("q"), gpt("a")]), [("q", "a")], []),
    "empty image": (row(image="", conversations=[human("q"), gpt("a")]), [("q", "a")], []),
    "marker first": (row(conversations=[human("<image>\nq"), gpt("a")]), [("<image>\nq", "a")], ["a.jpg"]),
    "marker in a later turn": (
        row(conversations=[human("q"), gpt("a"), human("and <image>?"), gpt("b")]),
        [("q", "a"), ("and <image>?", "b")],
        ["a.jpg"],
    ),
    "list of images": (
        row(image=["b.jpg", "a.jpg"], conversations=[human("<image><image>"), gpt("a")]),
        [("<image><image>", "a")],
        ["b.jpg", "a.jpg"],
    ),
    "images": (
        row(image=..., images=["a.jpg"], conversations=[human("<image>"), gpt("a")]),
        [("<image>", "a")],
        ["a.jpg"],
    ),
    "same image twice": (
        row(image=["a.jpg"] * 2, conversations=[human("<image><image>"), gpt("a")]),
        [("<image><image>", "a")],
        ["a.jpg"] * 2,
    ),
    "user and assistant": (
        row(conversations=[{"from": "user", "value": "<image>"}, {"from": "assistant", "value": "a"}]),
        [("<image>", "a")],
        ["a.jpg"],
    ),
    "sub-folder and blank": (
        row(image="PMC1/fig 1.jpg", conversations=[human("<image>"), gpt("a")]),
        [("<image>", "a")],
        ["PMC1/fig 1.jpg"],
    ),
    "dots that stay inside": (
        row(image="./PMC1/../a.jpg", conversations=[human("<image>"), gpt("a")]),
        [("<image>", "a")],
        ["a.jpg"],
    ),
    "beyond ASCII": (
        row(conversations=[human("<image> 位置?"), gpt("β 😀")]),
        [("<image> 位置?", "β 😀")],
        ["a.jpg"],
    ),
}


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("case", ODD_BUT_GOOD)
def test_odd_rows_of_published_files_are_read(folder, case, layout):
    given, turns, images = ODD_BUT_GOOD[case]
    (conversation,) = llava_json.read(write(folder, [given], layout))
    texts = [turn.text for turn in conversation.turns]
    assert list(zip(texts[::2], texts[1::2], strict=True)) == turns
    assert list(conversation.images) == [str(folder / image) for image in images]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(3, "3"), (1.5, "1.5"), ("x", "x"), ("", "row 2"), (None, "row 2"), (..., "row 2"), ([1], "row 2")],
)
def test_ids(folder, given, wanted):
    path = write(folder, [row(id="x"), row(id=given)])
    assert [conversation.id for conversation in llava_json.read(path)] == ["x", wanted]


def test_links_inside_the_image_folder_are_followed(folder, tmp_path_factory):
    """They are the folder owner's, not the data file's; the Hugging Face cache consists of them."""
    elsewhere = tmp_path_factory.mktemp("blobs")
    (elsewhere / "blob").touch()
    (folder / "linked.jpg").symlink_to(elsewhere / "blob")
    (conversation,) = llava_json.read(write(folder, [row(image="linked.jpg")]))
    assert conversation.images == (str(folder / "linked.jpg"),)


def test_image_folder(folder, tmp_path_factory, monkeypatch):
    path = write(tmp_path_factory.mktemp("elsewhere"), [row()])
    (conversation,) = llava_json.read(path, image_folder=folder)
    assert conversation.images == (str(folder / "a.jpg"),)
    rejects = []
    assert list(llava_json.read(path, rejects=rejects)) == []
    assert [reject.reason for reject in rejects] == ["missing image"]
    with pytest.raises(DataError) as caught:
        list(llava_json.read(path, image_folder=folder / "none", rejects=[]))
    assert (
        str(caught.value)
        == f"image folder {folder / 'none'}: no such folder; wanted the folder the rows' image paths "
        "start from."
    )
    write(folder, [row()])
    monkeypatch.chdir(folder)
    (conversation,) = llava_json.read("data.json")
    assert conversation.images == ("./a.jpg",)


def test_rows_are_read_lazily(folder):
    """The second row is broken JSON; the first is there before it is met."""
    path = folder / "data.json"
    path.write_text(f"[{json.dumps(row())},\n" + " " * 200_000 + "oops")
    rows = llava_json.read(path)
    assert next(rows).id == "r"
    with pytest.raises(DataError, match="broken JSON"):
        next(rows)


def test_byte_order_mark_empty_lines_and_line_numbers(folder):
    good = json.dumps(row(id=...))
    for name, text in {"array": f"\ufeff \n[{good}]", "lines": f"\ufeff{good}\r\n\n  \n{good}"}.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    assert [conversation.id for conversation in llava_json.read(folder / "array")] == ["row 1"]
    assert [conversation.source for conversation in llava_json.read(folder / "lines")] == [
        "lines:1",
        "lines:4",
    ]


def test_an_empty_array_has_no_rows(folder):
    assert list(llava_json.read(write(folder, []))) == []
