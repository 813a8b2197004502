"""Every command that the docstring of a recipe or of the CLI prints is run as it is, in a folder that
holds what it names.

The first command of each recipe runs in a process of its own, the others in this one. What they name is in
`miniature.py`.
"""

import ast
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from miniature import (
    HELD_OUT_ROWS,
    TRAIN_ROWS,
    account,
    build,
    commands,
    link,
    option,
    run_here,
    run_in_a_process,
)
from PIL import Image

from llavamed_peft import LLAVA_MED
from llavamed_peft.cli import main as cli
from llavamed_peft.cli.arguments import RunArguments
from llavamed_peft.cli.parsing import parse
from llavamed_peft.modeling.load import load_checkpoint

REPOSITORY = Path(__file__).parents[1]
RECIPES = ("align", "instruct", "vqa", "curriculum")
PUBLISHED = REPOSITORY.parent / "shared" / "data" / "vqa_rad"
CONFIG = REPOSITORY / "recipes" / "configs" / "tiny-vqa-rad.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return build(tmp_path_factory.mktemp("workspace"), {"llava-hf/llava-1.5-7b-hf": "llava"})


def commands_of(recipe):
    return commands_in(f"recipes/{recipe}.py")


def commands_in(file):
    return commands(ast.get_docstring(ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))))


def produce(recipe, folder):
    """Run the recipe's first command, unless a test has done so already."""
    words = commands_of(recipe)[0]
    if not (folder / option(words, "output_dir")).exists():
        run_in_a_process(words, folder)
    return folder / option(words, "output_dir")


# The commands


@pytest.mark.parametrize("recipe", RECIPES)
def test_docstrings_print_commands_with_known_files(recipe):
    lines = commands_of(recipe)
    assert len(lines) >= 2
    assert len({option(words, "output_dir") for words in lines if "--output_dir" in words}) == len(
        [words for words in lines if words[1].startswith("recipes/")]
    ), "two commands would write to one folder"


def test_align(workspace):
    first = produce("align", workspace)
    assert account(first / "align") == (4, 4, 4)
    second = commands_of("align")[1]
    run_here(second, workspace)
    left = workspace / option(second, "output_dir")
    assert json.loads((left / "align" / "stage.json").read_text())["metrics"]["eval_loss_after"] is not None
    assert list((left / "logs").rglob("events.out.tfevents*")), "--report_to tensorboard wrote nothing"


def test_instruct(workspace):
    produce("align", workspace)
    first = produce("instruct", workspace)
    assert json.loads((first / "instruct" / "stage.json").read_text())["parent"]["stage"] == "align"
    second = commands_of("instruct")[1]
    run_here(second, workspace)
    config = json.loads(
        (workspace / option(second, "output_dir") / "instruct" / "adapter_config.json").read_text()
    )
    assert (config["r"], config["lora_alpha"]) == (64, 128)


def test_vqa(workspace):
    produce("align", workspace)
    produce("instruct", workspace)
    first = produce("vqa", workspace)
    second, third = commands_of("vqa")[1:]
    run_here(second, workspace)
    run_here(third, workspace)
    for left in (first, workspace / option(second, "output_dir")):
        assert account(left / "vqa") == (TRAIN_ROWS, TRAIN_ROWS, TRAIN_ROWS)
        answers = [
            json.loads(line) for line in (left / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert [list(answer) for answer in answers] == [
            ["question_id", "prompt", "text", "truth", "answer_type"] for _ in range(HELD_OUT_ROWS)
        ]
        assert [answer["truth"] for answer in answers] == ["chest x-ray", "Yes", "chest x-ray", "Yes"]
        table = (left / "scores.md").read_text(encoding="utf-8").splitlines()
        assert [re.sub(r"\d+\.\d%", "*", line, count=1) for line in table[2:]] == [
            "| open | 2 | * | chest x-ray | 100.0% |",
            "| closed | 2 | * | yes | 100.0% |",
        ]
    left = workspace / option(third, "output_dir")
    assert (left / "vqa" / "stage.json").is_file() and not (left / "scores.md").exists()


def test_a_held_out_image_that_cannot_be_shown_is_an_error_before_training(workspace, tmp_path):
    damaged = tmp_path / "images"
    damaged.mkdir()
    for number in range(3):
        (damaged / f"{number}.png").write_bytes(
            (workspace / "images" / f"{number}.png").read_bytes()[: 60 if number == 2 else None]
        )
    words = commands_of("vqa")[0]
    words[words.index("--image_folder") + 1] = str(damaged)
    words[words.index("--output_dir") + 1] = str(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"DataError: .*2\.png"):
        run_here(words, workspace)
    assert not (tmp_path / "run").exists()


def test_curriculum(workspace):
    first = produce("curriculum", workspace)
    stages = [stage.name for stage in LLAVA_MED.stages]
    assert all((first / stage / "adapter_model.safetensors").is_file() for stage in stages)
    second, write_stages, third = commands_of("curriculum")[1:]
    run_here(second, workspace)
    run_in_a_process(write_stages, workspace)
    run_here(third, workspace)
    assert (workspace / option(third, "output_dir") / "vqa" / "model.safetensors").is_file()


def test_verbs_of_the_command_line(workspace, capsys):
    """On the run that `recipes/curriculum.py` leaves."""
    stage = produce("curriculum", workspace) / "vqa"
    Image.new("RGB", (70, 90), "gray").save(workspace / "chest.png")
    shutil.copytree(stage, workspace / "adapters" / "llava-1.5-7b-hf--vqa")
    lines = commands_in("llavamed_peft/cli/main.py")
    assert {words[1] for words in lines} == {"ask", "inspect", "show", "merge", "catalogue"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        for words in lines:
            assert cli.main(words[1:]) == 0, capsys.readouterr().err
    assert (workspace / "merged" / "config.json").is_file()
    assert "llava-1.5-7b-hf--vqa" in (workspace / "adapters" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_base_is_built_by_its_command(workspace, tmp_path):
    """With a few steps instead of thousands: the checkpoint it leaves is whole, and one that a stage can
    begin on."""
    (words,) = commands_in("recipes/demo/build_base.py")
    words[words.index("--out") + 1] = str(tmp_path / "base")
    run_in_a_process([*words, "--steps", "2", "--tower-steps", "2"], workspace)
    model, _ = load_checkpoint(tmp_path / "base")
    shipped, _ = load_checkpoint(REPOSITORY / "recipes" / "demo" / "tiny-llava")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in shipped.state_dict().items()
    }


def test_curriculum_from_a_file_of_options(workspace, tmp_path):
    """A mapping of stage to file, and a curriculum of one stage."""
    (tmp_path / "one.yaml").write_text(
        "stages: [{name: again, trains: projector, schedule: {epochs: 1, learning_rate: 2e-3}}]\n"
    )
    config = tmp_path / "options.yaml"
    config.write_text(
        "model: llava-hf/llava-1.5-7b-hf\ndata: {again: [pmc_align.json, "
        "pmc_align_heldout.json]}\nimage_folder: {again: pmc}\ncurriculum: "
        f"{tmp_path / 'one.yaml'}\noutput_dir: {tmp_path / 'run'}\n"
    )
    run_here(["python", "recipes/curriculum.py", "--config", str(config)], workspace)
    assert account(tmp_path / "run" / "again") == (8, 8, 8)


def test_data_without_a_stage_is_an_error(workspace, tmp_path):
    words = [
        "python",
        "recipes/curriculum.py",
        "--model",
        "x",
        "--data",
        "pmc_align.json",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(
        SystemExit,
        match=r"ConfigError: data is given 'pmc_align\.json'; wanted stage=path, such as align=pmc",
    ):
        run_here(words, workspace)


# The real VQA-RAD, on a tiny checkpoint


def config_command():
    return commands(CONFIG.read_text(encoding="utf-8"))[0]


def check_run(left, train_rows, held_out_rows):
    rows, accounted, used = account(left / "vqa")
    assert rows == accounted == train_rows
    assert used > 0.95 * rows
    answers = (left / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == held_out_rows
    assert (
        sum(int(line.split("|")[2]) for line in (left / "scores.md").read_text().splitlines()[2:])
        == held_out_rows
    )


def test_tiny_vqa_rad_on_the_miniature(workspace):
    run_here(config_command(), workspace)
    check_run(workspace / "runs" / "tiny-vqa-rad", TRAIN_ROWS, HELD_OUT_ROWS)


@pytest.mark.slow
# Two minutes on two busy cores, a third of them for decoding and shrinking radiographs
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not PUBLISHED.is_dir(),
    reason=f"VQA-RAD is not at {PUBLISHED.relative_to(REPOSITORY.parent)} beside the clone",
)
def test_tiny_vqa_rad_on_the_published_data(tmp_path):
    """All 1,797 training rows of the official split pass through, and all 451 held-out questions are
    answered."""
    link(tmp_path / "data" / "vqa_rad", PUBLISHED)
    link(tmp_path / "recipes", REPOSITORY / "recipes")
    run_here([*config_command(), "--max_new_tokens", "8"], tmp_path)
    check_run(tmp_path / "runs" / "tiny-vqa-rad", 1797, 451)
    open_row, closed_row = (
        (tmp_path / "runs" / "tiny-vqa-rad" / "scores.md").read_text(encoding="utf-8").splitlines()[2:]
    )
    # The majority answers, counted once by hand in vqa_rad_public.json
    assert open_row.endswith("| axial | 6.1% |") and closed_row.endswith("| no | 48.9% |")


# Options


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_explains_every_option(recipe, workspace, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_here(["python", f"recipes/{recipe}.py", "--help"], workspace)
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for entry in re.split(r"\n  (?=-)", shown.partition("options:")[2])[1:]:
        assert "--help" in entry or (len(entry.split()) > 3 and "(default:" in entry), (
            f"not explained: {entry}"
        )


@dataclass(kw_only=True)
class Some:
    model: str = field(metadata={"help": "which"})
    learning_rate: float = field(default=1.0, metadata={"help": "how fast"})
    shuffle: Literal["images", "conversations"] = field(default="images", metadata={"help": "what"})


def read(*words):
    return parse(Some, RunArguments, command_line=words)


def test_options_come_from_both_sides_and_the_command_line_counts(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("model: a\nlearning_rate: 2e-3\nquantization: nf4\nreport_to: [tensorboard, trackio]\n")
    some, run = read("--config", str(config), "--model", "b")
    assert some == Some(model="b", learning_rate=0.002)  # YAML itself would read 2e-3 as a string
    assert run == RunArguments(quantization="nf4", report_to=["tensorboard", "trackio"])


@pytest.mark.parametrize(
    ("word", "value"), {"auto": "auto", "true": True, "True": True, "false": False, "False": False}.items()
)
def test_true_and_false_may_be_written_as_in_yaml(word, value, tmp_path):
    (tmp_path / "options.yaml").write_text(f"feature_cache: {word}\n")
    for words in (("--feature_cache", word), ("--config", str(tmp_path / "options.yaml"))):
        assert read("--model", "a", *words)[1].feature_cache == value


@pytest.mark.parametrize(
    ("words", "yaml", "reason"),
    [
        (
            ["--model", "a", "--learnin_rate", "1"],
            None,
            "unknown option 'learnin_rate'. Did you mean 'learning_rate'?",
        ),
        (
            ["--model", "a", "--learning-rat=1"],
            None,
            "unknown option 'learning-rat'. Did you mean 'learning_rate'?",
        ),
        (
            ["--model", "a", "--learning", "1"],
            None,
            "unknown option 'learning'. Did you mean 'learning_rate'?",
        ),
        (
            ["--config=nowhere.yaml"],
            None,
            "--config: nowhere.yaml cannot be read ([Errno 2] No such file or directory: 'nowhere.yaml')",
        ),
        (["--model", "a", "fast"], None, "'fast' belongs to no option; options are written --name value."),
        ([], None, "the following arguments are required: --model"),
        (["--model", "a", "--shuffle", "rows"], None, "argument --shuffle: invalid choice: 'rows'"),
        ([], "model: a\nlearnin_rate: 1", "unknown option 'learnin_rate'. Did you mean 'learning_rate'?"),
        ([], "model: a\nshuffle: rows", "shuffle is 'rows'; wanted one of images, conversations."),
        (
            [],
            "model: a\nlearning_rate: fast",
            "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        ),
        ([], "model: a\nlearning_rate: [1]", "learning_rate is [1]; wanted a number. (Options are from "),
        ([], "model: a\nfeature_cache: 3", "feature_cache is 3; wanted one of auto, True, False."),
        ([], "model: 3", "model is 3; wanted a word."),
        ([], "model:", "model is None; wanted a word."),
        ([], "model: a\nworkers: 1.5", "workers is 1.5; wanted a whole number, or no such line."),
        ([], "model: a\nquantization: none", "quantization is 'none'; wanted one of nf4, or no such line."),
        ([], "model: a\nreport_to: {a: b}", "report_to is {'a': 'b'}; wanted a list of words."),
        ([], "model: a\nmodel: b", "options.yaml is not YAML: the key 'model' is there twice"),
        ([], "3: x", "unknown option 3."),
        (["--config"], None, "--config: expected a file after it."),
        ([], "- model", "options.yaml holds ['model']; wanted a mapping of options to values."),
        ([], "model: [a", "options.yaml is not YAML: while parsing a flow sequence"),
        (
            ["--config", "nowhere.yaml"],
            None,
            "--config: nowhere.yaml cannot be read ([Errno 2] No such file or directory: 'nowhere.yaml')",
        ),
    ],
)
def test_a_wrong_option_is_named(words, yaml, reason, tmp_path, capsys):
    if yaml is not None:
        (tmp_path / "options.yaml").write_text(yaml)
        words = ["--config", str(tmp_path / "options.yaml")]
    with pytest.raises(SystemExit) as stopped:
        read(*words)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
