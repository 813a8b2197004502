"""What `inspect --packing` shows of the first step."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from inspected import ROWS, SHORT, place, row, said
from PIL import Image
from tiny import build

from llavamed_peft import Curriculum, Stage
from llavamed_peft.batches.shares import share_of_step
from llavamed_peft.datasets import llava_json
from llavamed_peft.errors import ConfigError
from llavamed_peft.modeling.load import read_config
from llavamed_peft.modeling.processor import load_processor, make_stage_processor
from llavamed_peft.packing.collator import PackedCollator
from llavamed_peft.preview.inspect import inspect


def test_packing_shows_what_the_first_step_would_be(place, tmp_path):
    base = shutil.copytree(place / "tiny-llava", tmp_path / "tiny-llava")
    asked = [
        row(f"{image}{i}", f"{image}.png", f"<image>\nwhat is {'left ' * i}?", "yes")
        for i in range(4)
        for image in "ab"
    ]
    (tmp_path / "asked.json").write_text(json.dumps([*asked, ROWS[3]]), encoding="utf-8")
    data, curriculum = (
        {"align": [tmp_path / "asked.json"]},
        Curriculum((Stage("align", "projector", replace(SHORT, global_batch=9)),)),
    )
    picture = tmp_path / "step.png"
    lines = list(inspect(base, data, place, curriculum, packing=picture, max_row_tokens=100, width=70))
    shown = lines[lines.index("\npacking, in rows of at most 100 tokens") + 1 :]
    assert all(len(line) <= 72 for line in shown[:-1]) and shown[-1] == f"  drawn: {picture}"
    text = " ".join(line.strip() for line in shown)
    processor = make_stage_processor(load_processor(base, read_config(base)), curriculum.image_aspect_ratio)
    conversations = list(llava_json.read(tmp_path / "asked.json", place))
    once = PackedCollator(processor)(conversations)["input_ids"]
    alone = PackedCollator(processor, layout="padded")
    lengths = alone(conversations)["attention_mask"].sum(1)
    (share,) = share_of_step(range(9), lengths, 100, world_size=1)
    padded = sum(alone([conversations[i] for i in batch])["input_ids"].numel() for batch in share)
    assert len(share) > 1 and padded < lengths.max() * 9
    found = re.search(
        r"9 conversations in (\d+) row\(s\), (\d+) tokens, ([\d.]+)% of them useful; padded ([\d.]+) times",
        text,
    )
    rows, tokens, useful, times = map(float, found.groups())
    assert rows > 1 and once.numel() < tokens <= 100 * rows
    assert useful == pytest.approx(100 * once.numel() / tokens, abs=0.06)
    assert times == pytest.approx(padded / tokens, abs=0.06)
    assert text.count("tokens shared by 4") == 2, "four questions about each image"
    assert Image.open(picture).format == "PNG" and Image.open(picture).width > 1000
    picture.unlink()
    picture.mkdir()
    with pytest.raises(
        ConfigError, match=r"step\.png: cannot be written \(.*\); choose another place for the picture\."
    ):
        list(inspect(base, data, place, curriculum, packing=picture))


def test_a_picture_that_cannot_be_is_refused(place, tmp_path):
    for picture, told in (
        (
            tmp_path / "no" / "step.png",
            rf"is to be {tmp_path}/no/step\.png; {tmp_path}/no is no folder\. Make it first\.",
        ),
        (Path("step.pdf"), r"is to be 'step\.pdf'; wanted a name that ends in \.png\."),
    ):
        with pytest.raises(ConfigError, match=told):
            next(inspect(place / "tiny-llava", {"align": [place / "train.json"]}, packing=picture))
    (tmp_path / "bad.json").write_text(json.dumps([ROWS[1]]), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"step\.png: not drawn, since no stage has conversations that could be packed\."
    ):
        said(place, {"align": [tmp_path / "bad.json"]}, packing=tmp_path / "step.png")
    assert not (tmp_path / "step.png").exists()


def test_packing_says_where_training_would_refuse_a_sliding_window(place, tmp_path):
    base = build(tmp_path / "tiny-llava_next", "llava_next", "mistral")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["sliding_window"] = 40
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "short.json").write_text(json.dumps([ROWS[3]]), encoding="utf-8")
    curriculum = Curriculum(
        (Stage("long", "projector", replace(SHORT, max_length=256)), Stage("short", "projector", SHORT))
    )
    data = {"long": [place / "train.json"], "short": [tmp_path / "short.json"]}
    shown = list(inspect(base, data, curriculum=curriculum, packing=True, width=1000))
    shown = shown[shown.index("\npacking, in rows of at most 8,192 tokens") + 1 :]
    assert re.match(
        r"  long: training would refuse this: The language model's sliding_window is 40, the longest con",
        shown[0],
    )
    assert shown[1].startswith("  short, the first step: 1 conversations in 1 row(s)")
