"""`llavamed-peft` as a process of its own: what it prints where, and its exit code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import build

from llavamed_peft import Curriculum, Question, Schedule, Stage, StageAdapter, __version__, curriculum_finetune, load_stage
from llavamed_peft.evaluation.answer import answer_questions

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "llavamed_peft.cli"]


def run(*words, before=PROGRAM):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [*before, *map(str, words)], capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A tiny base, an adapter on it that has learnt one answer, and the image it was asked about."""
    folder = tmp_path_factory.mktemp("asked")
    Image.new("RGB", (56, 40), "gray").save(folder / "chest.png")
    question = Question("1", str(folder / "chest.png"), "is it normal ?", "yes", "closed")
    stage = Stage("vqa", "lora", Schedule(epochs=8, learning_rate=1e-2, global_batch=1))
    base = build(folder / "tiny-llava")
    curriculum_finetune(base, {"vqa": [question]}, folder / "run", curriculum=Curriculum((stage,)))
    return base, folder / "run" / "vqa", folder / "chest.png"


def test_ask_prints_the_answer_alone(asked):
    base, adapter, image = asked
    done = run("ask", base, adapter, image, "is it normal ?", "--max_new_tokens", 8)
    assert (done.returncode, done.stdout, done.stderr) == (0, "yes\n", "")
    question = Question("1", str(image), "what is in the image ?", "?", "open")
    expected = answer_questions(*load_stage(base, adapter), [question], max_new_tokens=2)
    assert run("ask", base, adapter, image, question.question, "--max_new_tokens", 2).stdout == f"{expected[0]}\n"


def test_catalogue_renews_the_index(asked, tmp_path):
    shutil.copytree(asked[1], tmp_path / "tiny-llava--vqa")
    done = run("catalogue", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'README.md'}\n")
    assert f"`{StageAdapter.load(asked[1]).record['sha256'][:12]}`" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llavamed-peft {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["ask", "--help"], ["catalogue", "--help"]])
def test_help_needs_no_torch(words):
    code = "import sys; from llavamed_peft.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = run(*words, before=[sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: llavamed-peft")


BASE, ADAPTER, IMAGE = "{base}", "{adapter}", "{image}"
REFUSED = {
    "no such image": (["ask", BASE, ADAPTER, "{image}.nope", "normal?"], "{image}.nope: "),
    "not an image": (["ask", BASE, ADAPTER, "{adapter}/stage.json", "normal?"], "{adapter}/stage.json: "),
    "no question": (["ask", BASE, ADAPTER, IMAGE, " "], "Question.question is ' '; wanted words."),
    "a marker": (
        ["ask", BASE, ADAPTER, IMAGE, "<image> normal?"],
        "Question.question holds <image>; wanted the words alone, the image is a field.",
    ),
    "no such adapter": (
        ["ask", BASE, "{adapter}-nope", IMAGE, "normal?"],
        "{adapter}-nope: neither a folder nor a Hub repository",
    ),
    "not an adapter": (
        ["ask", BASE, BASE, IMAGE, "normal?"],
        "{base}: has no stage.json; wanted a folder that a finished stage left.",
    ),
    "no such base": (
        ["ask", "{base}-nope", ADAPTER, IMAGE, "normal?"],
        "{base}-nope: no configuration could be read; wanted a folder",
    ),
    "no such catalogue": (["catalogue", "{base}-nope"], "{base}-nope: no such folder; wanted the catalogue's."),
    "not a catalogue": (["catalogue", "{run}"], "{run}/index: has no stage.json, adapter_config.json, README.md; wanted each of"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=list(REFUSED))
def test_what_the_package_refuses_is_one_line(asked, words, message):
    base, adapter, image = asked
    names = {"base": base, "adapter": adapter, "image": image, "run": adapter.parent}
    done = run(*(word.format(**names) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"llavamed-peft: {message.format(**names)}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["teach"], "invalid choice: 'teach' (choose from"),
        (["ask", "base"], "the following arguments are required: ADAPTER, IMAGE, QUESTION"),
        (
            ["ask", "a", "b", "c", "d", "--max_new_tokens", "0"],
            "argument --max_new_tokens: '0' is not a whole number of at least 1",
        ),
        (
            ["ask", "a", "b", "c", "d", "--max_new_tokens", "many"],
            "argument --max_new_tokens: 'many' is not a whole number of at least 1",
        ),
    ],
)
def test_a_wrong_command_line_shows_the_usage(words, message):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: llavamed-peft")
    assert message in done.stderr
