"""Rows in LLaVA's format, written to files."""

import json

import pytest

WANTED = "wanted LLaVA JSON: an array of rows, or one row a line, in UTF-8."


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def row(**changes):
    """A good row about `a.jpg`, with keys changed, or removed by `...`."""
    whole = {
        "id": "r",
        "image": "a.jpg",
        "conversations": [human("What?\n<image>"), gpt("A chest.")],
    } | changes
    return {key: value for key, value in whole.items() if value is not ...}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "PMC1/fig 1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder, rows, layout="array", name="data.json"):
    text = json.dumps(rows, indent=1) if layout == "array" else "\n".join(map(json.dumps, rows)) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name
