"""README, CONTRIBUTING and docs/ keep their word: commands and snippets run, links and paths are there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import tiny
from miniature import run_here
from PIL import Image

from llavamed_peft.cli import main as cli
from llavamed_peft.datasets import llava_json

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "adapters/README.md", *(f"docs/{name}" for name in CHAPTERS))
}
# What is run below. A new block needs a test of its own first, and then a place here.
BLOCKS = {
    ("README.md", "bash"): 3,  # the cookbooks' in test_cookbooks.py
    ("README.md", "python"): 2,
    ("README.md", "bibtex"): 1,
    ("CONTRIBUTING.md", "bash"): 2,
    ("adapters/README.md", "bash"): 1,
    ("adapters/README.md", "python"): 1,
    ("docs/architecture.md", "text"): 1,  # test_architecture.py
    ("docs/demo.md", "bash"): 1,
    ("docs/packing.md", "python"): 1,
    ("docs/scaling.md", "bash"): 1,  # test_cookbooks.py
    ("docs/training.md", "bash"): 2,
    ("docs/training.md", "json"): 1,
    ("docs/training.md", "python"): 1,
}
BASE = "llava-hf/llava-1.5-7b-hf"
SMALL = """
from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage
schedule, lora = Schedule(epochs=1, learning_rate=1e-3, global_batch=4), LoraSpec(rank=4, alpha=8)
LLAVA_MED = Curriculum(
    (
        Stage("align", "projector", schedule),
        Stage("instruct", "lora", schedule, lora),
        Stage("vqa", "lora", schedule, lora),
    )
)
"""


def fenced(name: str) -> list[tuple[str, str]]:
    """(language, text) of every code block of a document."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [text for found, text in fenced(name) if found == language]


def commands(name: str) -> list[list[str]]:
    """The commands of a document's bash blocks as words, comments left out, continuation lines joined."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the snippets name: a checkpoint under that id, data files and images."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.build(folder / BASE)
    (folder / "images").mkdir()
    Image.new("RGB", (60, 40), "gray").save(folder / "images" / "a.png")
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a heart"}]
    rows = [{"id": str(i), "image": "a.png", "conversations": said} for i in range(6)]
    for name in ("pmc_align.json", "instruct_60k.json", "vqa_train.json", "vqa_test.json"):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


def run(script: str, folder: Path) -> None:
    """A snippet in a process of its own, as a reader would run it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_verb(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert words[0].rpartition("/")[2] == "llavamed-peft"
    assert cli.main(words[1:]) == 0


def test_every_code_block_is_known() -> None:
    assert Counter((name, language) for name in TEXTS for language, _ in fenced(name)) == BLOCKS


def test_the_two_commands_come_first_and_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    first = blocks("README.md", "bash")[0]
    assert [shlex.split(line, comments=True) for line in first.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    assert all(f'"make {target}"' in ci for target in ("demo", "test"))
    assert TEXTS["README.md"].partition(first)[0].count("\n") <= 20, "they are on the first screen"


def test_every_make_command_is_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        target
        for text in [*TEXTS.values(), re.search(r"^help:\n(?:\t.*\n)+", makefile, flags=re.MULTILINE)[0]]
        for target in re.findall(
            r"(?:`|^|[\" ])make ([a-z][a-z-]*)(?=`|\"| +#| ARGS|  |$)", text, flags=re.MULTILINE
        )
    }
    assert {"demo", "test", "check", "demo-seeds", "tree", "venv"} <= named
    missing = [target for target in named if not re.search(rf"^{target}: ?", makefile, flags=re.MULTILINE)]
    assert not missing


def test_readme_is_short_and_leads_to_every_chapter() -> None:
    assert TEXTS["README.md"].count("\n") <= 180
    assert not [name for name in CHAPTERS if f"](docs/{name})" not in TEXTS["README.md"]]


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    (named,) = re.findall(r"\(extras: (.*?)\)", TEXTS["README.md"], flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", named)) == set(extras) - {"dev"}


def test_the_row_shown_is_one_that_is_read(workplace: Path) -> None:
    (row,) = blocks("docs/training.md", "json")
    (workplace / "shown.json").write_text(row, encoding="utf-8")
    (conversation,) = llava_json.read(workplace / "shown.json", workplace / "images")
    assert [turn.text for turn in conversation.turns] == ["<image>\nWhat is it?", "A heart."]


def test_the_readmes_snippets_run(workplace: Path) -> None:
    """In their order, with the small curriculum in place of the paper's."""
    call, stock = blocks("README.md", "python")
    assert 'quantization="nf4"' in call and call.count("\n") <= 14 and "llavamed_peft" not in stock
    script = SMALL + call.replace("import LLAVA_MED, ", "import ")
    run(f"{script}\nassert list(adapters) == ['align', 'instruct', 'vqa']", workplace)
    run(f"{stock}\nassert model.active_adapter == 'vqa'", workplace)


def test_a_curriculum_is_written_and_trained(workplace: Path) -> None:
    (script,) = blocks("docs/training.md", "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        exec(script.replace("from llavamed_peft import LLAVA_MED\n", SMALL), {})
    (words,) = [words for words in commands("docs/training.md") if "recipes/curriculum.py" in words]
    words = [word.replace("runs/llava-med", "runs/again") for word in words]
    assert words[0] == ".venv/bin/python" and "curriculum.yaml" in words
    run_here([words[0], str(ROOT / words[1]), *words[2:]], workplace)
    record = json.loads((workplace / "runs" / "again" / "vqa" / "stage.json").read_text(encoding="utf-8"))
    assert record["stage"]["lora"]["rank"] == 4


def test_a_packed_batch_holds_the_image_once(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = blocks("docs/packing.md", "python")
    monkeypatch.chdir(workplace)
    names: dict = {}
    exec(script, names)
    batch = names["batch"]["input_ids"]
    image = names["model"].config.image_token_id
    alone = names["PackedCollator"](names["processor"])([names["questions"][0].conversation()])["input_ids"]
    assert names["loss"] > 0 and (batch == image).sum() == (alone == image).sum() > 0
    assert alone.shape[1] < batch.shape[1] < 2 * alone.shape[1]


def test_a_stage_of_the_catalogue_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = blocks("adapters/README.md", "python")
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(script, names)
    assert names["model"].active_adapter == "default" and names["processor"].chat_template


def test_the_index_of_the_catalogue_is_what_its_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = commands("adapters/README.md")
    copy = shutil.copytree(ROOT / "adapters", tmp_path / words[-1])
    (copy / "README.md").write_text(
        re.sub(r"^\| \[.*\n", "", TEXTS["adapters/README.md"], flags=re.MULTILINE)
    )
    run_verb(words, tmp_path, monkeypatch)
    assert (copy / "README.md").read_text(encoding="utf-8") == TEXTS["adapters/README.md"]


def test_the_command_for_a_gpu_has_these_options() -> None:
    """What needs a GPU is not run: its files are there and its options are the script's."""
    pytest_words, (python, script, *options) = [
        words for words in commands("CONTRIBUTING.md") if "make" not in words[0]
    ]
    assert (python, pytest_words[1:3]) == (".venv/bin/python", ["make", "test"])
    assert (ROOT / pytest_words[3].split()[-1]).is_file()
    source = (ROOT / script).read_text(encoding="utf-8")
    assert not [word for word in options if word.startswith("--") and f'"{word}"' not in source]


def test_shipped_stage_answers_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The catalogue's last stage, asked by README's command about the image the demo would have drawn."""
    (words,) = [words for words in commands("README.md") if "ask" in words]
    draw = (
        "from scenes import FIRST_SEED, clinic_scene; clinic_scene(FIRST_SEED['heldout']).image.save('a.png')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes" / "demo")}
    subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, env=environment, check=True)
    words = [str(tmp_path / "a.png") if word.startswith("runs/") else word for word in words]
    run_verb(words, ROOT, monkeypatch)
    modalities = ("chest X-ray", "CT scan", "MRI scan", "histology slide", "gross specimen")
    assert capsys.readouterr().out.strip() in modalities


def test_inspect_show_and_merge_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first beside its data, the others in the repository."""
    inspect, show, merge = [words for words in commands("docs/training.md") if "llavamed-peft" in words[0]]
    run_verb(inspect, workplace, monkeypatch)
    found = capsys.readouterr().out
    assert "ASSISTANT:[[ a heart</s>]]" in found and "6 rows, 6 used, 0 rejected" in found
    run_verb(show, ROOT, monkeypatch)
    assert "vqa: lora (adapter)" in capsys.readouterr().out
    merged = tmp_path / "merged"
    run_verb([str(merged) if word == "runs/merged" else word for word in merge], ROOT, monkeypatch)
    assert (merged / "config.json").is_file() and (merged / "processor_config.json").is_file()


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert target.startswith("http") or (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", [*TEXTS, "CHANGELOG.md"])
def test_paths_named_in_the_text_exist(name: str) -> None:
    """A path in backquotes is one from the repository's root, the package or the cookbooks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    told = re.findall(r"`([\w.*/-]+/[\w.*-]+\.(?:py|md|yaml|txt|png))`", text)
    places = (ROOT, ROOT / "llavamed_peft", ROOT / "recipes" / "configs")
    assert not [path for path in told if not any((place / path).exists() for place in places)]


def test_the_changelog_sends_importers_to_modules_that_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  \| `.*\| (`.*) \|$", text, flags=re.MULTILINE)
    modules = [module for row in rows for module in re.findall(r"`([\w.]+)`", row)]
    assert len(modules) > 20
    assert not [
        m for m in modules if not (ROOT / "llavamed_peft" / m.replace(".", "/")).with_suffix(".py").exists()
    ]
