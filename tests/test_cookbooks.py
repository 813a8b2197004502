"""`recipes/configs/`: every cookbook is parsed, and every command that one prints is run, on a tiny
checkpoint of its kind.

Commands of `python` run in this process; those of `accelerate launch` under their own launcher and
configuration, with two processes where it names more (over gloo, one for each machine where it names two).
Whatever needs a GPU is not shown.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
from miniature import REPOSITORY, account, build, commands, option, run_here

from llavamed_peft import LLAVA_MED, LLAVA_MED_FULL, Curriculum
from llavamed_peft.cli import main as cli
from llavamed_peft.cli.arguments import CurriculumArguments, RunArguments
from llavamed_peft.cli.parsing import parse

CONFIGS = REPOSITORY / "recipes" / "configs"
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
COOKBOOKS = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path not in LAUNCHERS]
BASES = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava_next",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
}
MAX_LENGTH = {"llava": 2048, "llava_next": 4096, "llava_onevision": 8192}
ALIGN_ROWS = 130  # more than one step of 128: warm-up's first step learns nothing


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def printed(start):
    """Every command that a cookbook or a launcher's configuration prints, each once."""
    words = [
        words for path in (*COOKBOOKS, *LAUNCHERS) for words in commands(path.read_text(encoding="utf-8"))
    ]
    return [list(one) for one in dict.fromkeys(map(tuple, words)) if one[0] == start]


def options_of(cookbook):
    return parse(CurriculumArguments, RunArguments, command_line=["--config", str(cookbook)])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return build(tmp_path_factory.mktemp("workspace"), BASES, ALIGN_ROWS)


@pytest.mark.parametrize("cookbook", COOKBOOKS, ids=name_of)
def test_a_cookbook_says_what_it_needs_and_how_to_run_it(cookbook):
    text = cookbook.read_text(encoding="utf-8")
    opening = text.partition("\nmodel: ")[0]
    assert "# Needs:" in opening and "NOT YET RUN on such a" in opening.replace("\n# ", " ")
    assert all(line.startswith("#") or not line for line in opening.splitlines())
    assert any(str(cookbook.relative_to(REPOSITORY)) in words for words in commands(opening))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=name_of)
def test_a_launcher_prints_the_command_that_takes_it(launcher):
    (words,) = commands(launcher.read_text(encoding="utf-8"))
    assert words[:4] == ["accelerate", "launch", "--config_file", str(launcher.relative_to(REPOSITORY))]


def test_what_the_documents_launch_is_printed_here_too():
    """So that it is run below."""
    texts = [
        path.read_text(encoding="utf-8") for path in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"))
    ]
    words = [words for text in texts for words in commands(text.replace(".venv/bin/", ""))]
    named = [one for one in words if "recipes/configs/" in " ".join(one)]
    assert {one[0] for one in named} == {"accelerate", "python", "llavamed-peft"}
    assert [one for one in named if one not in printed(one[0])] == []


def test_no_two_commands_write_to_one_folder():
    folders = [option(words, "output_dir") for words in printed("accelerate") if "--output_dir" in words]
    folders += [options_of(cookbook)[0].output_dir for cookbook in COOKBOOKS]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("cookbook", COOKBOOKS, ids=name_of)
def test_stages_are_the_papers(cookbook):
    """But for max_length, which follows the architecture, and for what a cookbook is named after."""
    arguments, run = options_of(cookbook)
    found = arguments.stages()
    wanted = (LLAVA_MED_FULL if cookbook.stem.startswith("full") else LLAVA_MED).to_dict()
    for stage in wanted["stages"]:
        stage["schedule"]["max_length"] = MAX_LENGTH[BASES[arguments.model]]
    assert found == Curriculum.from_dict(wanted)
    assert run.quantization == ("nf4" if cookbook.stem.startswith("nf4") else None)


def check_run(left, processes, sharding=None):
    for stage in ("align", "instruct", "vqa"):
        record = json.loads((left / stage / "stage.json").read_text(encoding="utf-8"))
        assert (record["processes"], record["computing"]["sharding"]) == (processes, sharding)
        assert record["metrics"]["steps"] >= 2
        rows, accounted, used = account(left / stage)
        assert rows == accounted == used > 0
    assert list((left / "logs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "words", printed("python"), ids=lambda words: name_of(REPOSITORY / option(words, "config"))
)
def test_a_command_runs(words, workspace):
    run_here([*words, "--workers", "0"], workspace)
    arguments, _ = options_of(workspace / option(words, "config"))
    check_run(workspace / arguments.output_dir, 1)


@pytest.mark.timeout(600)  # half a minute on two cores that do nothing else
@pytest.mark.parametrize(
    "words", printed("accelerate"), ids=lambda words: name_of(REPOSITORY / option(words, "config_file"))
)
def test_a_launched_command_runs(words, workspace):
    launcher = option(words, "config_file")
    processes = 1 if launcher.endswith("-1gpu.yaml") else 2
    machines = 2 if launcher.endswith("-2nodes.yaml") else 1
    script = words.index("recipes/curriculum.py")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *words[2:script],
        "--num_processes",
        str(processes),
    ]
    if machines == 2:
        launch[launch.index("--main_process_ip") + 1] = "127.0.0.1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch += ["--main_process_port", str(free.getsockname()[1])]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = []
    for machine in range(machines):
        if machines == 2:
            launch[launch.index("--machine_rank") + 1] = str(machine)
        command = [*launch, *words[script:], "--workers", "0"]
        log = (workspace / f"machine-{machine}.log").open("w+", encoding="utf-8")
        running.append(
            (subprocess.Popen(command, cwd=workspace, env=environment, stdout=log, stderr=log), log)
        )
    tables = 0
    for process, log in running:
        code = process.wait(timeout=500)
        log.seek(0)
        said = log.read()
        log.close()
        assert code == 0, said[-4000:]
        tables += said.count("| stage | trains |")
    assert tables == 1, "one process of all prints the table"
    config = options_of(workspace / option(words[script:], "config"))[0]
    left = workspace / (option(words, "output_dir") if "--output_dir" in words else config.output_dir)
    sharding = launcher.rpartition("/")[2].partition("-")[0]
    check_run(left, processes, None if sharding == "ddp" else sharding)


@pytest.mark.parametrize(
    "words", printed("llavamed-peft"), ids=lambda words: name_of(REPOSITORY / option(words, "config"))
)
def test_an_inspecting_command_runs(words, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert cli.main(words[1:]) == 0
    shown = capsys.readouterr().out
    assert f"pmc_align.json: {ALIGN_ROWS} rows, {ALIGN_ROWS} used, 0 rejected" in shown
    assert "vqa: lora (rank 128, alpha 256, dropout 0.05)" in shown
