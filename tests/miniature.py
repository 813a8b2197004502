"""What the commands of recipes and cookbooks name, in miniature, and ways to run them.

The folder has the commands' files under their own names: tiny checkpoints as `llava-hf/llava-1.5-7b-hf` and
its like, a few rows as `pmc_align.json`, and so on.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
TRAIN_ROWS, HELD_OUT_ROWS = 8, 4  # of VQA-RAD's own format
# As the 7B checkpoints have them
LANGUAGE = {
    "llava": "llama",
    "llava_next": "mistral",
    "llava_onevision": "qwen2",
}
TOWER = {"llava": "clip", "llava_next": "clip", "llava_onevision": "siglip"}


def commands(text):
    """The commands in a docstring or in the comments of a YAML file, continuation lines joined."""
    joined = re.sub(r"\\\n[#\s]*", "", text)
    lines = [line.lstrip("# ") for line in joined.splitlines()]
    return [
        shlex.split(line) for line in lines if line.startswith(("python ", "accelerate ", "llavamed-peft "))
    ]


def option(words, name):
    return words[words.index(f"--{name}") + 1]


def account(stage_folder):
    """(rows, used + rejected + failed, used) over a stage's training files."""
    data = json.loads((stage_folder / "stage.json").read_text())["data"]
    used = sum(entry["used"] for entry in data)
    left = sum(sum(entry["rejected"].values()) + entry["failed"] for entry in data)
    return sum(entry["rows"] for entry in data), used + left, used


def rows(count, turns=1):
    conversation = [
        {"from": "human", "value": "<image>\nwhat is in the image?"},
        {"from": "gpt", "value": "a chest x-ray"},
        {"from": "human", "value": "is the heart normal?"},
        {"from": "gpt", "value": "yes"},
    ]
    return [
        {"id": str(i), "image": f"{i % 3}.png", "conversations": conversation[: 2 * turns]}
        for i in range(count)
    ]


def vqa_rad_rows(count, **changes):
    def row(i):
        answer, answer_type = ("Yes" if i % 4 else "no", "CLOSED") if i % 2 else ("chest x-ray", "OPEN")
        words = {"question": f"what is in image {i}?", "answer": answer, "answer_type": answer_type}
        return {"qid": str(i), "image_name": f"{i % 3}.png", "phrase_type": "freeform", **words, **changes}

    return [row(i) for i in range(count)]


def link(link, target):
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target, target_is_directory=target.is_dir())


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def build(folder, bases, align_rows=4):
    """Write checkpoints (id → model type), data and images into the folder, and a link to the recipes."""
    for name, model_type in bases.items():
        tiny.build(folder / name, model_type, LANGUAGE[model_type], TOWER[model_type])
    link(folder / "recipes", REPOSITORY / "recipes")
    write(folder / "pmc_align.json", rows(align_rows))
    for name in ("pmc_align_heldout.json", "vqa_rad/train.json", "vqa_rad/test.json"):
        write(folder / name, rows(4))
    for name in ("instruct_60k.json", "instruct_heldout.json"):
        write(folder / name, rows(4, turns=2))
    for name in ("slake/llava_train.json", "slake/llava_test.json"):
        write(folder / name, rows(4))
    original = {"qid_linked_id": "03f4"}
    both = vqa_rad_rows(TRAIN_ROWS, **original) + vqa_rad_rows(
        HELD_OUT_ROWS, phrase_type="test_freeform", **original
    )
    for name in ("vqa_rad/vqa_rad_public.json", "data/vqa_rad/vqa_rad_public.json"):
        write(folder / name, both)
    write(folder / "vqa_rad" / "trainset.json", vqa_rad_rows(TRAIN_ROWS))
    write(folder / "vqa_rad" / "testset.json", vqa_rad_rows(HELD_OUT_ROWS))
    for name in ("images", "pmc", "vqa_rad/images", "slake/images", "data/vqa_rad/images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, shade in enumerate((0, 90, 200)):
            Image.new("RGB", (80 + 20 * number, 64), (shade, shade, shade)).save(
                folder / name / f"{number}.png"
            )
    return folder


def run_in_a_process(words, folder):
    python_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_here(words, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
