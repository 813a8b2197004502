"""What `inspect` and `show` say: word for word on tiny checkpoints, and compared with training."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inspected import CURRICULUM, ROWS, SHORT, place, row, said
from tiny import build

from llavamed_peft import Curriculum, Stage, curriculum_finetune
from llavamed_peft.cli.arguments import by_stage
from llavamed_peft.errors import CheckpointError, ConfigError, DataError
from llavamed_peft.modeling.load import read_config
from llavamed_peft.modeling.processor import load_processor, make_stage_processor
from llavamed_peft.packing.collator import PackedCollator
from llavamed_peft.preview.inspect import inspect
from llavamed_peft.preview.rows import marked_text
from llavamed_peft.preview.scopes import trainable_parameters
from llavamed_peft.reporting.text import histogram

EXPECTED = """\
tiny-llava: llava over llama and clip_vision_model
  270,976 parameters, stored in bfloat16

what trains
  align: projector, 8,320 parameters in 4 tensors, float32; 3.07% of the checkpoint
    model.multi_modal_projector.linear_1  weight 64×64, bias 64  4,160
    model.multi_modal_projector.linear_2  weight 64×64, bias 64  4,160
  instruct: lora (rank 4, alpha 8, dropout 0), 16,512 parameters in 32 tensors, float32; 6.09% of the checkpoint
    model.multi_modal_projector.linear_1                  weight 64×64, bias 64      4,160
    model.multi_modal_projector.linear_2                  weight 64×64, bias 64      4,160
    model.language_model.layers.0-1.self_attn.q_proj  ×2  lora_A 4×64, lora_B 64×4   1,024
    model.language_model.layers.0-1.self_attn.k_proj  ×2  lora_A 4×64, lora_B 32×4     768
    model.language_model.layers.0-1.self_attn.v_proj  ×2  lora_A 4×64, lora_B 32×4     768
    model.language_model.layers.0-1.self_attn.o_proj  ×2  lora_A 4×64, lora_B 64×4   1,024
    model.language_model.layers.0-1.mlp.gate_proj     ×2  lora_A 4×64, lora_B 128×4  1,536
    model.language_model.layers.0-1.mlp.up_proj       ×2  lora_A 4×64, lora_B 128×4  1,536
    model.language_model.layers.0-1.mlp.down_proj     ×2  lora_A 4×128, lora_B 64×4  1,536
  vqa: lora (rank 4, alpha 8, dropout 0), the same as instruct

data of align, instruct (max_length 64)
  train.json: 7 rows, 4 used, 3 rejected
    missing image: 1
      train.json:2 (id q2): image 'nope.png' is not a file in .; wanted an image there.
    empty answer: 1
      train.json:5 (id q5): turn 2 is an empty answer; wanted words.
    longer than max_length: 1
      train.json:6 (id q6): 128 tokens, 16 of them image tokens; max_length is 64. It would need max_length=128.
  training would refuse these data: train.json: 3 of 7 rows cannot be used (42.9%; max_rejected is 5.0%). Commonest: missing
    image (1); empty answer (1); longer than max_length (1).
  lengths: 20 to 56 tokens, mean 35; of them 12 of images and 7 supervised
    20-24  1  ############################################################
    25-29  1  ############################################################
    30-34  0
    35-39  1  ############################################################
    40-44  0
    45-49  0
    50-54  0
    55-59  1  ############################################################
  the first rows; supervised tokens are in [[ ]]
    train.json:1 (id q1)
      USER: <image>×16\\nwhat is it ? ASSISTANT:[[ a chest x-ray\\nof the left lung</s>]]USER: normal ? ASSISTANT:[[ yes</s>]]
    train.json:3 (id q3)
      USER: <image>×16\\nis the heart normal ? ASSISTANT:[[ no</s>]]

steps
  stage     conversations  images  batch  steps an epoch  epochs  steps in all  supervised tokens an epoch
  align                 4       2      8               1     1.5             2                          28
  instruct              4       2      2               2     1.5             3                          28
  vqa       no data given              2                     1.5
"""  # noqa: E501 - a terminal of 120 columns


def test_word_for_word_without_weights(place, monkeypatch):
    monkeypatch.chdir(place)
    assert not list(Path("tiny-llava").glob("*.safetensors"))
    data = {"align": ["train.json"], "instruct": ["train.json"]}
    assert "\n".join(inspect("tiny-llava", data, curriculum=CURRICULUM, rows=2, width=125)) + "\n" == EXPECTED


def test_stages_that_differ_in_files_or_max_length_are_checked_apart(place):
    longer = Stage("long", "projector", replace(SHORT, max_length=200))
    curriculum = Curriculum((CURRICULUM["align"], longer))
    found = said(place, {"align": [place / "train.json"], "long": [place / "train.json"]}, curriculum, rows=0)
    assert "data of align (max_length 64)\n  train.json: 7 rows, 4 used, 3 rejected" in found
    assert "data of long (max_length 200)\n  train.json: 7 rows, 5 used, 2 rejected" in found
    assert "the first rows" not in found


def test_what_is_given_for_no_stage_is_refused_as_in_training(place):
    data = {"align": [place / "train.json"]}
    for argument, given in (
        ("data", {"data": data | {"instrct": []}}),
        ("image_folder", {"image_folder": {"instrct": place}}),
    ):
        told = (
            f"{argument} has the key 'instrct', which is no stage of the curriculum. Did you mean 'instruct'?"
        )
        with pytest.raises(ConfigError, match=re.escape(told)):
            said(place, **{"data": data, **given})


def test_only_a_png_is_drawn_over(place):
    before = (place / "train.json").read_bytes()
    with pytest.raises(ConfigError, match=r"is to be '.*train\.json'; wanted a name that ends in \.png\."):
        said(place, packing=place / "train.json")
    assert (place / "train.json").read_bytes() == before


def test_a_single_step_of_warm_up_is_named(place):
    curriculum = Curriculum((Stage("align", "projector", replace(SHORT, epochs=1, global_batch=8)),))
    assert said(place, curriculum=curriculum).endswith(
        "\n  align would learn nothing: warm-up begins at rate 0, and there is one optimizer step. Give it "
        "more data or epochs, a smaller global_batch, or warmup_ratio=0.\n"
    )


def test_colour_marks_the_same_characters_as_brackets(place):
    plain, coloured = said(place, width=200), said(place, width=200, colour=True)
    assert "ASSISTANT:\033[4;32m yes</s>\033[0m\n" in coloured
    assert "\033" not in plain
    marked = coloured.replace("\033[4;32mlike this\033[0m", "in [[ ]]")
    assert marked.replace("\033[4;32m", "[[").replace("\033[0m", "]]") == plain
    # A line break ends the colour, and the next line begins it again.
    assert "ASSISTANT:\033[4;32m the \033[0m\n      \033[4;32mlung is in" in said(
        place, width=45, colour=True
    )


def test_no_line_is_wider_than_asked(place):
    for line in said(place, width=60).partition("data of")[2].partition("\nsteps")[0].splitlines()[1:]:
        assert len(line) <= 60 or "lengths" in line or str(place)[:30] in line, line


@pytest.mark.parametrize(
    ("kind", "language", "lead", "stop"),
    [
        ("llava", "llama", " ", "</s>"),
        ("llava_next", "mistral", " ", "</s>"),
        ("llava_onevision", "qwen2", "", "<|im_end|>"),
    ],
)
def test_marked_are_exactly_the_answers_with_their_stop(place, tmp_path, kind, language, lead, stop):
    base = build(tmp_path / kind, kind, language)
    processor = make_stage_processor(load_processor(base, read_config(base)), "pad")
    collator = PackedCollator(processor, layout="padded")
    lines = list(inspect(base, {"vqa": [place / "train.json"]}, rows=1, width=1000))
    marked = "".join(lines).split("in [[ ]]")[1].split("steps")[0]
    answers = [lead + answer + stop for answer in ("a chest x-ray\\nof the left lung", "yes")]
    assert [part.split("]]")[0] for part in marked.split("[[")[1:]] == answers
    from llavamed_peft.datasets import llava_json

    conversation = next(iter(llava_json.read(place / "train.json")))
    batch = collator([conversation])
    pieces = marked_text(processor, batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
    assert [text for text, supervised in pieces if supervised] == answers
    count = int((batch["input_ids"] == processor.image_token_id).sum())
    assert [text for text, _ in pieces if "<image>" in text] == [f"<image>×{count}"]


def test_nothing_usable_is_a_finding_and_not_an_error(place, tmp_path):
    shutil.copy(place / "a.png", tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps([ROWS[1], ROWS[4]]), encoding="utf-8")
    found = said(place, {"align": [tmp_path / "bad.json"]}, width=200)
    assert (
        "bad.json: 2 rows, 0 used, 2 rejected\n    missing image: 1\n      bad.json:1 (id q2): image" in found
    )
    assert "training would refuse these data: bad.json: 2 of 2 rows cannot be used (100.0%" in found
    assert "lengths" not in found and "first rows" not in found
    assert found.splitlines()[-3].split()[:5] == ["align", "0", "0", "8", "0"]


def test_only_the_first_of_many_rejected_rows_are_shown(place, tmp_path):
    (tmp_path / "many.json").write_text(json.dumps([ROWS[3]] + [ROWS[4]] * 1200), encoding="utf-8")
    found = said(place, {"align": [tmp_path / "many.json"]}, max_rejected=1)
    assert "    empty answer: 1,200\n" in found
    assert [line.split(" ")[6] for line in found.splitlines() if "turn 2 is an empty answer" in line] == [
        f"many.json:{number}" for number in (2, 3, 4)
    ]
    assert "would refuse" not in found


def test_pixels_that_cannot_be_decoded_show_in_the_first_rows(place, tmp_path):
    (tmp_path / "a.png").write_bytes((place / "a.png").read_bytes()[:60])
    (tmp_path / "one.json").write_text(json.dumps([ROWS[0], ROWS[3]]), encoding="utf-8")
    found = said(place, {"align": [tmp_path / "one.json"]}, width=400)
    assert "one.json: 2 rows, 2 used, 0 rejected" in found
    assert f"one.json:1 (id q1)\n      would fail: {tmp_path / 'a.png'}: cannot be decoded" in found
    assert "USER: what is a lung ? ASSISTANT:[[ the lung is in the chest</s>]]" in found


def test_data_cannot_command_the_terminal(place, tmp_path):
    rows = [
        row("\033[2Jq", None, "what ?\u202e", "yes\033[31m"),
        row("\033]0;q\a", "\033c.png", "<image>\nwhat ?", "no"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    found = said(place, {"align": [tmp_path / "rows.json"]}, width=400)
    assert "(id \\x1b[2Jq)" in found and "[[ yes\\x1b[31m</s>]]" in found and "what ?\\u202e" in found
    assert all(character.isprintable() for character in found.replace("\n", ""))


def test_what_cannot_be_opened_raises_before_the_first_line(place, tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: no such file; wanted a LLaVA JSON file\."):
        next(
            inspect(
                place / "tiny-llava",
                {"align": [place / "train.json"], "vqa": ["gone.json"]},
                curriculum=CURRICULUM,
            )
        )
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        next(inspect(tmp_path, {}))


def test_training_does_what_was_said(place, tmp_path):
    """Trained names, numbers of parameters and steps, and what was rejected, for each scope."""
    base = shutil.copytree(place / "tiny-llava", tmp_path / "tiny-llava")
    shutil.copy(place / "weights.safetensors", base / "model.safetensors")
    curriculum = Curriculum((*CURRICULUM.stages[:2], Stage("full", "full", SHORT)))
    data = {stage.name: [place / "train.json"] for stage in curriculum.stages}
    lines = list(inspect(base, data, curriculum=curriculum, width=200))
    adapters = curriculum_finetune(base, data, tmp_path / "run", curriculum=curriculum, max_rejected=0.5)
    for stage in curriculum.stages:
        adapter = adapters[stage.name]
        (trains,) = [line for line in lines if line.startswith(f"  {stage.name}: {stage.trains}")]
        assert f", {adapter.metrics['trainable_parameters']:,} parameters in " in trains
        (steps,) = [line.split() for line in lines if line.startswith(f"  {stage.name} ")]
        assert steps[6] == str(adapter.metrics["steps"])
        assert [f"    {reason}: {number}" for reason, number in adapter.record.data[0].rejected.items()] == [
            line for line in lines if line.startswith("    ") and line.endswith(": 1")
        ]
        names = set(trainable_parameters(read_config(base), stage.trains, stage.lora))
        if not adapter.is_checkpoint:
            assert names == {name.removeprefix("base_model.model.") for name in adapter.tensors()}
    assert "  full: full, 131,520 parameters in 25 tensors, float32; 48.54% of the checkpoint" in lines
    assert (
        "    model.language_model.layers.0-1.mlp.down_proj             ×2  weight 64×128          16,384"
        in lines
    )


def test_files_by_stage(tmp_path, monkeypatch):
    stages = [stage.name for stage in CURRICULUM.stages]
    monkeypatch.chdir(tmp_path)
    Path("x=y.json").write_text("[]", encoding="utf-8")
    assert by_stage("DATA", ["a.json", "vqa=b=c.json", "vqa=d.json"], stages) == {
        "align": ["a.json"],
        "instruct": ["a.json"],
        "vqa": ["a.json", "b=c.json", "d.json"],
    }
    assert by_stage("DATA", ["x=y.json"], stages)["align"] == ["x=y.json"]
    with pytest.raises(ConfigError) as refusal:
        by_stage("DATA", ["algn=a.json"], stages)
    assert (
        str(refusal.value)
        == "'algn=a.json' is no file, and 'algn' no stage of the curriculum. Did you mean 'align'?"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7], ["7  1  " + "#" * 14]),
        ([1, 1, 1, 3], ["1  3  " + "#" * 14, "2  0", "3  1  #####"]),
        (
            [995, 1999, 2010],
            ["    800-999  1  ####", "1,000-1,199  0", "1,200-1,399  0", "1,400-1,599  0", "1,600-1,799  0"],
        ),
    ],
)
def test_histogram(values, expected):
    lines = histogram(np.array(values, np.int32), 20)
    assert lines[: len(expected)] == expected
    assert sum(int(line.split()[1]) for line in lines) == len(values)
    assert len(lines) <= 11
