"""The index: built once, found again with its counts and rejected rows, and never found where something it
depends on changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from checked import KINDS, account, bases, build, collator_of, data, row, which
from PIL import Image

from llavamed_peft import (
    Conversation,
    Question,
    Turn,
)
from llavamed_peft.batches import checking
from llavamed_peft.batches.index import Index
from llavamed_peft.batches.ledger import Ledger
from llavamed_peft.datasets import vqa_rad
from llavamed_peft.datasets.rejects import RejectLog
from llavamed_peft.datasets.sources import Source, open_sources, question_source
from llavamed_peft.errors import DataError
from llavamed_peft.packing import PackedCollator


def test_found_again_with_the_same_rows_counts_and_rejects(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    built, rejected = build(data, collator_of(bases["llava"]), tmp_path)
    first = which(tmp_path)
    assert [reject["row"] for reject in rejected] == [2, 3, 5, 6], "in the file's order, whoever rejects"
    (tmp_path / "c.png").unlink()
    data.with_name("c.png").write_bytes(b"not looked at again")
    found, again = build(data, collator_of(bases["llava"]), tmp_path)
    assert which(tmp_path) == first
    assert again == rejected and account(found) == account(built)
    (entry,) = account(found)
    counts = {"missing image": 1, "unreadable image": 1, "cannot be encoded": 1, "empty answer": 1}
    assert (entry["rows"], entry["used"], entry["rejected"], entry["failed"]) == (7, 3, counts, 0)
    assert [found.conversation(i) for i in range(3)] == [built.conversation(i) for i in range(3)]
    assert account(Index.open(tmp_path / "index.arrow")) == account(built), (
        "for the processes that did not build it"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_the_conversation_encodes_to(
    kind: str, bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    collator = collator_of(bases[kind])
    built, _ = build(data, collator, tmp_path)
    assert built.column("group").tolist() == [0, 0, 1]
    prefixes = built.prefixes()
    assert prefixes.keys[0] == prefixes.keys[1] != prefixes.keys[2] and (prefixes.tokens > 0).all()
    for i in range(len(built)):
        kept, read = built.tokenized(i), built.conversation(i)
        assert (kept.id, kept.images, kept.source) == (read.id, read.images, read.source)
        counts = collator.encoder.count_image_tokens([(40, 60)])
        encoded = collator.encoder.encode(read, counts)
        again = collator.encoder.encode(kept, counts)
        assert (again.input_ids == encoded.input_ids).all() and (again.labels == encoded.labels).all()
        assert len(encoded.input_ids) == built.column("length")[i]
        assert (
            encoded.supervised_tokens
            == built.column("supervised_tokens")[i]
            == np.sum(kept.tokens.supervised)
        )
        batches = collator.inputs([read]), collator.inputs([kept])
        assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


def test_images_of_equal_content_begin_alike_and_are_shuffled_by_their_paths(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    os.symlink(tmp_path / "c.png", tmp_path / "link.png")
    rows = [
        row(i, f"{name}.png", "<image>\nwhat is this?", "a heart")
        for i, name in enumerate(("a", "c", "b", "link"))
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    built, _ = build(data, collator_of(bases["llava"]), tmp_path)
    a, c, equal, link = built.prefixes().keys
    assert a == equal != c == link
    assert built.column("group").tolist() == [0, 1, 2, 1]


def test_relative_paths_are_those_of_the_call(
    bases: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, copies in (("one", ["c.png"]), ("two", [])):
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True)
        Image.effect_noise((60, 40), 50).convert("RGB").save(folder / "own.png")
        for copy in copies:
            shutil.copy(tmp_path / copy, folder)
        monkeypatch.chdir(tmp_path / name)
        turns = (Turn("user", "<image>\nwhat?"), Turn("assistant", "a heart"))
        rows = [Conversation(file, turns, (f"images/{file}",)) for file in ("own.png", *copies)]
        built, rejected = build(rows, collator_of(bases["llava"]), tmp_path / name)
        assert (len(built), rejected) == (len(rows), [])


def test_a_row_that_fails_while_training_is_listed_with_its_files_path(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    _, rejected = build(data, collator_of(bases["llava"]), tmp_path)
    ledger = Ledger(Index.open(tmp_path / "index.arrow"), "training", max_rejected=1.0)
    ledger.failed[2] = "c.png: cannot be decoded"
    with RejectLog(tmp_path / "failed.jsonl") as log:
        ledger.list_failed(log, "vqa")
    line = json.loads((tmp_path / "failed.jsonl").read_text(encoding="utf-8"))
    assert (line["file"], line["row"], line["id"]) == (str(data), 7, "id-7") and line["file"] == rejected[0][
        "file"
    ]
    assert line["reason"] == "failed while training vqa" and line["detail"] == "c.png: cannot be decoded"


def append_row(data: Path) -> None:
    with data.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row(8, "a.png", "<image>\nwhere?", "left")))


def other_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text(
        tiny.VICUNA.replace("{{ '<image>\n' }}", "{{ '<image> ' }}"), encoding="utf-8"
    )


def other_size(base: Path) -> None:
    settings = json.loads((base / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["image_mean"] = [0.5, 0.5, 0.5]
    (base / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def other_tokenizer(base: Path) -> None:
    settings = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    settings["model"]["merges"] = settings["model"]["merges"][:-1]
    (base / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("change", [other_template, other_size, other_tokenizer])
def test_another_processor_is_another_index(
    change: Callable[[Path], None], bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["llava"], tmp_path / "base"))
    build(data, collator_of(base), tmp_path)
    first = which(tmp_path)
    build(data, collator_of(base), tmp_path)
    assert which(tmp_path) == first
    change(base)
    build(data, collator_of(base), tmp_path)
    assert which(tmp_path) != first


def test_other_data_folders_limits_and_formats_are_another_index(
    bases: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = collator_of(bases["llava"])
    build(data, collator, tmp_path)
    seen = {which(tmp_path)}

    def is_new(sources: Any, how: PackedCollator = collator) -> bool:
        build(sources, how, tmp_path)
        seen.add(which(tmp_path))
        return len(seen) > before

    before = len(seen)
    assert not is_new(data) and not is_new(open_sources(data, tmp_path, "data"))
    for number, change in enumerate(
        [
            lambda: is_new(data, collator_of(bases["llava"], max_length=100)),
            lambda: is_new(data, collator_of(bases["llava"], ratio="keep")),
            lambda: append_row(data) or is_new(data),
            lambda: is_new(open_sources(data, shutil.copytree(tmp_path, tmp_path / "elsewhere"), "data")),
            lambda: is_new([data, data]),
            lambda: monkeypatch.setattr(checking, "FORMAT", checking.FORMAT + 1) or is_new(data),
        ]
    ):
        before = len(seen)
        assert change(), f"change {number}"


def test_values_are_known_by_content_and_other_sources_only_if_they_say_so(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    collator = collator_of(bases["llava"])
    said = (Turn("user", "<image>\nwhat?"), Turn("assistant", "a heart"))
    values = [
        Conversation("1", said, (str(tmp_path / "a.png"),)),
        Question("2", str(tmp_path / "b.png"), "what?", "yes", "closed"),
    ]
    build(values, collator, tmp_path)
    first = which(tmp_path)
    build(list(values), collator, tmp_path)
    assert which(tmp_path) == first
    build([values[0], replace(values[1], answer="no")], collator, tmp_path)
    assert which(tmp_path) != first

    (tmp_path / "trainset.json").write_text(
        json.dumps(
            [{"qid": 1, "image_name": "a.png", "question": "what?", "answer": "yes", "answer_type": "CLOSED"}]
        )
    )
    questions = [question_source(vqa_rad.read, tmp_path / "trainset.json", tmp_path, "train")]
    build(questions, collator, tmp_path)
    first = which(tmp_path)
    build(questions, collator, tmp_path)
    assert which(tmp_path) == first

    (source,) = open_sources(data, None, "data")
    unknown = [Source(source.name, source.path, source.sha256, source.read)]
    build(unknown, collator, tmp_path)
    first = which(tmp_path)
    build(unknown, collator, tmp_path)
    assert which(tmp_path) != first


def test_fixed_images_are_seen_after_a_refusal(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    collator = collator_of(bases["llava"])
    with pytest.raises(DataError, match=r"4 of 7 rows cannot be used \(57\.1%; max_rejected is 50\.0%\)"):
        build(data, collator, tmp_path, max_rejected=0.5)
    assert not list(tmp_path.glob("index.*"))
    build(data, collator, tmp_path, max_rejected=0.6)
    with pytest.raises(DataError, match="4 of 7 rows"):  # found again, and refused all the same
        build(data, collator, tmp_path, max_rejected=0.5)
    shutil.copy(tmp_path / "a.png", tmp_path / "broken.png")
    found, rejected = build(data, collator, tmp_path, max_rejected=0.5)
    assert len(found) == 4 and [reject["row"] for reject in rejected] == [2, 5, 6]


def test_data_refused_for_their_length_are_told_what_the_longest_needs(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    rows = [row(1, "missing.png", "<image>\nwhat?", "yes")]
    rows += [row(number, "a.png", "<image>\nwhat?", "a heart " * number) for number in range(1, 4)]
    data.write_text(json.dumps(rows), encoding="utf-8")
    whole, _ = build(data, collator_of(bases["llava"]), tmp_path)
    shortest, _, needed = whole.column("length").tolist()
    told = f"Fix the data, or give max_length={needed}, which the longest row needs"
    with pytest.raises(DataError, match=rf"{told}\."):
        build(data, collator_of(bases["llava"], max_length=shortest - 1), tmp_path)
    build(data, collator_of(bases["llava"], max_length=shortest), tmp_path)
    for _ in ("index found", "index built"):
        with pytest.raises(DataError, match=rf"{told}, or raise max_rejected\."):
            build(data, collator_of(bases["llava"], max_length=shortest), tmp_path, max_rejected=0.5)
    with pytest.raises(DataError, match=r"Fix the data, or raise max_rejected\."):
        build(data, collator_of(bases["llava"], max_length=needed - 1), tmp_path, max_rejected=0.1)
