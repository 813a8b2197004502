"""`llavamed-peft` as a process of its own: what it prints where, and its exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import build
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavamed_peft import (
    Curriculum,
    Question,
    Schedule,
    Stage,
    StageAdapter,
    __version__,
    curriculum_finetune,
    load_stage,
)
from llavamed_peft.evaluation.answer import answer_questions

ROOT = Path(__file__).parents[1]
VERBS = ("ask", "inspect", "show", "merge", "catalogue")
PROGRAM = [sys.executable, "-m", "llavamed_peft.cli.main"]


def run(*words, before=PROGRAM):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    environment.pop("DS_ACCELERATOR", None)  # which this process sets (conftest.py), and a user does not
    return subprocess.run(
        [*before, *map(str, words)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
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
    assert (
        run("ask", base, adapter, image, question.question, "--max_new_tokens", 2).stdout
        == f"{expected[0]}\n"
    )


def test_catalogue_renews_the_index(asked, tmp_path):
    shutil.copytree(asked[1], tmp_path / "tiny-llava--vqa")
    done = run("catalogue", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'README.md'}\n")
    assert f"`{StageAdapter.load(asked[1]).record.sha256[:12]}`" in (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )


def test_merge_leaves_a_stock_checkpoint(asked, tmp_path):
    base, adapter, image = asked
    done = run("merge", base, adapter, tmp_path / "merged")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'merged'}\n", "")
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    unmerged, _ = load_stage(base, adapter)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it normal ?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    with Image.open(image) as picture:
        inputs = processor(images=[picture.convert("RGB")], text=[text], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, unmerged(**inputs).logits, atol=1e-4, rtol=1e-4)
    done = run("merge", base, adapter, tmp_path / "half", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_inspect_needs_no_weights(asked, tmp_path):
    """The whole output, word for word, is in test_inspection.py; here, what the command line chooses."""
    base = shutil.copytree(asked[0], tmp_path / "tiny-llava")
    (base / "model.safetensors").unlink()
    said = [{"from": "human", "value": "<image>\nis it normal ?"}, {"from": "gpt", "value": "yes \u2192"}]
    rows = [{"id": "1", "image": "chest.png", "conversations": said}, {"id": "2", "conversations": said}]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    curriculum = Curriculum(
        (
            Stage("one", "projector", Schedule(1, 1e-3, global_batch=1)),
            Stage("two", "full", Schedule(3, 1e-3, global_batch=4)),
        )
    )
    curriculum.to_yaml(tmp_path / "stages.yaml")
    words = [
        "inspect",
        base,
        tmp_path / "train.json",
        "--image_folder",
        asked[2].parent,
        "--curriculum",
        tmp_path / "stages.yaml",
    ]
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"{base}: llava over llama and clip_vision_model\n  270,976 parameters, stored in float32\n"
    )
    assert "\ndata of one, two (max_length 2,048)\n  train.json: 2 rows, 1 used, 1 rejected\n" in done.stdout
    assert "\n      USER: <image>×16\\nis it normal ? ASSISTANT:[[ yes →</s>]]\n" in done.stdout
    assert "training would refuse these data" in done.stdout
    assert "\n  two                1       1      4               1       3             3" in done.stdout
    data_last = [*words[:2], *words[3:], words[2]]
    done = run(*data_last, "--stage", "two", "--rows", 0, "--width", 60, "--max_rejected", 0.5)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  two: full, 131,520 parameters" in done.stdout
    for absent in ("one", "[[", "would refuse"):
        assert absent not in done.stdout.replace("tokens", "")
    done = run(*words, "--rows", 0, "--packing", tmp_path / "step.png", "--max_row_tokens", 60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "\npacking, in rows of at most 60 tokens\n  one, the first step: 1 conversations in 1 row(s)"
        in done.stdout
    )
    assert (
        done.stdout.endswith(f"drawn: {tmp_path / 'step.png'}\n")
        and (tmp_path / "step.png").stat().st_size > 1000
    )
    cookbook = {
        "model": str(base),
        "data": {stage.name: str(tmp_path / "train.json") for stage in curriculum.stages},
        "image_folder": str(asked[2].parent),
        "curriculum": str(tmp_path / "stages.yaml"),
        "output_dir": str(tmp_path / "run"),
        "max_row_tokens": 70,
    }
    for layout in ("packed", "padded"):
        (tmp_path / f"{layout}.yaml").write_text(json.dumps(cookbook | {"layout": layout}), encoding="utf-8")
    done = run("inspect", "--config", tmp_path / "packed.yaml", "--rows", 0, "--packing")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "\npacking, in rows of at most 70 tokens\n  one, the first step: 1 conversations in 1 row(s)"
        in done.stdout
    )
    (tmp_path / "misspelt.yaml").write_text(
        json.dumps(cookbook | {"image_folder": {"tow": "images"}}), encoding="utf-8"
    )
    for narrowed in ((), ("--stage", "two")):
        done = run("inspect", "--config", tmp_path / "misspelt.yaml", *narrowed)
        told = "image_folder has the key 'tow', which is no stage of the curriculum. Did you mean 'two'?"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"llavamed-peft: {told}\n")
    done = run("inspect", "--config", tmp_path / "padded.yaml", "--packing")
    told = (
        f"llavamed-peft: {tmp_path / 'padded.yaml'}: layout is 'padded', so nothing is packed; wanted "
        "'packed' for --packing.\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    plain = run(*words, before=[sys.executable, "-X", "utf8=0", "-c", ASCII])
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "ASSISTANT:[[ yes ?</s>]]" in plain.stdout


ASCII = (
    "import sys; sys.stdout.reconfigure(encoding='ascii'); "
    "from llavamed_peft.cli.main import main; sys.exit(main())"
)


def test_show_needs_no_weights(asked, tmp_path):
    folder = shutil.copytree(asked[1], tmp_path / "vqa")
    (folder / "adapter_model.safetensors").unlink()
    done = run("show", folder)
    assert (done.returncode, done.stderr) == (0, "")
    record = StageAdapter.load(asked[1]).record
    assert done.stdout.startswith(
        f"tiny-llava: llava over llama and clip_vision_model, sha256 {record.base.sha256[:12]}\n"
        f"└─ vqa: lora (adapter), sha256 {record.sha256[:12]}, in vqa\n"
        "   ├─ schedule: epochs 8, learning_rate 0.01, global_batch 1, warmup_ratio 0.03, weight_decay 0,\n"
        "   │     max_length 2,048, shuffle images\n"
        "   ├─ lora: rank 128, alpha 256, dropout 0.05\n"
        "   ├─ data\n"
        "   │  └─ in memory, sha256 "
    )
    assert "   │  ├─ steps: 8\n" in done.stdout


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llavamed-peft {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_needs_no_torch(words):
    code = (
        "import sys; from llavamed_peft.cli.main import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
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
    "no base to inspect": (
        ["inspect", "{base}-nope", "{data}"],
        "{base}-nope: no configuration could be read; wanted a folder",
    ),
    "no model to inspect": (
        ["inspect", "{run}", "{data}"],
        "{run}: has no config.json; wanted a folder of a checkpoint",
    ),
    "no processor": (
        ["inspect", "{bare}", "{data}"],
        "{bare}: no processor could be loaded; wanted tokenizer files",
    ),
    "no data": (["inspect", BASE, "{base}.json"], "{base}.json: no such file; wanted a LLaVA JSON file."),
    "data of no stage": (
        ["inspect", BASE, "vqaa={data}"],
        "'vqaa={data}' is no file, and 'vqaa' no stage of the curriculum. Did",
    ),
    "no such stage": (
        ["inspect", BASE, "{data}", "--stage", "vqaa"],
        "--stage is 'vqaa', no stage of the curriculum. Did you mean 'vqa'?",
    ),
    "no curriculum": (
        ["inspect", BASE, "{data}", "--curriculum", "{data}.yaml"],
        "{data}.yaml: cannot be read ([Errno 2] No such file or directory",
    ),
    "not a curriculum": (["inspect", BASE, "{data}", "--curriculum", IMAGE], "{image}: cannot be read ("),
    "no name for a picture": (
        ["inspect", BASE, "{data}", "--packing", ""],
        "The picture of the packed steps is to be '.'; wanted a name that ends in .png.",
    ),
    "no folder for a picture": (
        ["inspect", BASE, "{data}", "--packing", "{base}/no/step.png"],
        "The picture of the packed steps is to be {base}/no/step.png; {base}/no is no folder. Make it first.",
    ),
    "nothing to show": (
        ["show", BASE],
        "{base}: has no stage.json; wanted a folder that a finished stage left.",
    ),
    "no such stage to show": (
        ["show", "{adapter}-nope"],
        "{adapter}-nope: neither a folder nor a Hub repository",
    ),
    "nothing to merge": (
        ["merge", BASE, BASE, "{base}-merged"],
        "{base}: has no stage.json; wanted a folder that a finished",
    ),
    "merged already": (
        ["merge", BASE, ADAPTER, BASE],
        "{base}: is there already; wanted a new folder. Nothing was overwritten.",
    ),
    "no such catalogue": (
        ["catalogue", "{base}-nope"],
        "{base}-nope: no such folder; wanted the catalogue's.",
    ),
    "not a catalogue": (
        ["catalogue", "{run}"],
        "{run}/index: has no stage.json, adapter_config.json, README.md; wanted each of",
    ),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=list(REFUSED))
def test_what_the_package_refuses_is_one_line(asked, words, message):
    base, adapter, image = asked
    names = {
        "base": base,
        "adapter": adapter,
        "image": image,
        "run": adapter.parent,
        "data": base / "config.json",
    }
    names["bare"] = base.parent / "bare"
    names["bare"].mkdir(exist_ok=True)
    shutil.copy(base / "config.json", names["bare"])
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
        (["inspect", "base"], "the following arguments are required: DATA"),
        (["inspect", "base", "--rows", "1", "data", "--colour"], "unrecognized arguments: data --colour"),
        (["show", "a", "b"], "unrecognized arguments: b"),
        (["inspect", "a", "b", "--rows", "-1"], "argument --rows: '-1' is not a whole number of at least 0"),
        (
            ["inspect", "a", "b", "--max_rejected", "5%"],
            "argument --max_rejected: '5%' is not a share between 0 and 1",
        ),
        (
            ["inspect", "a", "b", "--max_row_tokens", "512"],
            "--max_row_tokens bounds the rows that --packing shows; give both",
        ),
        (["show"], "the following arguments are required: ADAPTER"),
        (["merge", "a", "b"], "the following arguments are required: OUT"),
        (
            ["merge", "a", "b", "c", "--dtype", "int8"],
            "argument --dtype: invalid choice: 'int8' (choose from",
        ),
    ],
)
def test_a_wrong_command_line_shows_the_usage(words, message):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: llavamed-peft")
    assert message in done.stderr
