"""The README keeps its word: its tree is the one on disk, and its commands and snippets run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from llavamed_peft.datasets import llava_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASE = "llava-hf/llava-1.5-7b-hf"
SMALL = """
from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage
schedule, lora = Schedule(epochs=1, learning_rate=1e-3, global_batch=4), LoraSpec(rank=4, alpha=8)
LLAVA_MED = Curriculum(
    (Stage("align", "projector", schedule), Stage("instruct", "lora", schedule, lora), Stage("vqa", "lora", schedule, lora))
)
"""


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's snippets name: a checkpoint under that id, data files and images."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.build(folder / BASE)
    (folder / "images").mkdir()
    Image.new("RGB", (60, 40), "gray").save(folder / "images" / "a.png")
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a heart"}]
    rows = [{"id": str(i), "image": "a.png", "conversations": said} for i in range(6)]
    for name in ("pmc_align.json", "instruct_60k.json", "vqa_train.json", "vqa_test.json"):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_row_shown_is_one_that_is_read(workplace: Path) -> None:
    (row,) = blocks("json")
    (workplace / "shown.json").write_text(row, encoding="utf-8")
    (conversation,) = llava_json.read(workplace / "shown.json", workplace / "images")
    assert [turn.text for turn in conversation.turns] == ["<image>\nWhat is it?", "A heart."]


def test_the_two_commands_are_targets_and_what_ci_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (commands, *_) = blocks("bash")
    targets = re.findall(r"^make (\w+)", commands, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}: venv$", makefile, flags=re.MULTILINE)
        assert f'"make {target}"' in ci


def test_snippets_and_recipe_command_run(workplace: Path) -> None:
    """In the README's order, with the small curriculum in the place of the paper's."""
    whole, stock, yaml, packed = blocks("python")
    assert 'quantization="nf4"' in whole
    script = re.sub(r"import LLAVA_MED, ", "import ", whole)
    run(
        [sys.executable, "-c", SMALL + script + "\nassert list(adapters) == ['align', 'instruct', 'vqa']"],
        workplace,
    )
    run([sys.executable, "-c", stock + "\nassert model.active_adapter == 'vqa'"], workplace)
    run([sys.executable, "-c", yaml.replace("from llavamed_peft import LLAVA_MED\n", SMALL)], workplace)
    alone = "one = PackedCollator(processor)([questions[0].conversation()])['input_ids'].shape[1]"
    run(
        [
            sys.executable,
            "-c",
            f"{packed}\n{alone}\nassert one < batch['input_ids'].shape[1] < 2 * one and loss > 0",
        ],
        workplace,
    )
    (command,) = [block for block in blocks("bash") if "recipes/curriculum.py" in block]
    words = shlex.split(command.replace("\\\n", " ").replace("runs/llava-med", "runs/again"))
    assert words[0] == ".venv/bin/python"
    run([sys.executable, str(ROOT / words[1]), *words[2:]], workplace)
    assert (workplace / "runs" / "again" / "vqa" / "stage.json").is_file()


def test_shipped_stage_answers_the_question(tmp_path: Path) -> None:
    """The catalogue's last stage, asked by the README's command about the image the demo would have drawn."""
    (command,) = [block for block in blocks("bash") if " ask " in block]
    program, *words = shlex.split(command)
    assert program == ".venv/bin/llavamed-peft"
    draw = (
        "from scenes import FIRST_SEED, clinic_scene; clinic_scene(FIRST_SEED['heldout']).image.save('a.png')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes" / "demo")}
    subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, env=environment, check=True)
    words = [str(tmp_path / "a.png") if word.startswith("runs/") else word for word in words]
    answer = run([sys.executable, "-m", "llavamed_peft.cli.main", *words], ROOT).stdout.strip()
    (modality,) = [
        name
        for name in ("chest X-ray", "CT scan", "MRI scan", "histology slide", "gross specimen")
        if name == answer
    ]
    assert modality


def test_inspect_show_and_merge_run(workplace: Path, tmp_path: Path) -> None:
    """The README's commands: the first beside its data, the others in the repository."""
    (block,) = [block for block in blocks("bash") if " inspect " in block]
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [words[0] for words in commands] == ["inspect", "show", "merge"]
    program = [sys.executable, "-m", "llavamed_peft.cli.main"]
    found = run([*program, *commands[0]], workplace).stdout
    assert "ASSISTANT:[[ a heart</s>]]" in found and "6 rows, 6 used, 0 rejected" in found
    assert "vqa: lora (adapter)" in run([*program, *commands[1]], ROOT).stdout
    merged = tmp_path / "merged"
    run([*program, *(str(merged) if word == "runs/merged" else word for word in commands[2])], ROOT)
    assert (merged / "config.json").is_file()


def test_tree_names_the_folders_on_disk() -> None:
    (tree,) = blocks("text")
    shown = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).is_dir() for name in shown)
    listed = run(["git", "ls-files"], ROOT).stdout.splitlines()
    assert {name.split("/")[0] for name in listed if "/" in name and not name.startswith(".")} == {
        name[:-1] for name in shown
    }


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
