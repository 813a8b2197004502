"""What `inspect` and `show` say: word for word on tiny checkpoints, and compared with training."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import build

from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, StageAdapter, curriculum_finetune
from llavamed_peft.adapters.lineage_tree import show
from llavamed_peft.adapters.record import RECORD
from llavamed_peft.batches.shares import share_of_step
from llavamed_peft.cli.arguments import by_stage
from llavamed_peft.datasets import llava_json
from llavamed_peft.errors import AdapterError, CheckpointError, ConfigError, DataError
from llavamed_peft.modeling.load import read_config
from llavamed_peft.modeling.processor import load_processor, make_stage_processor
from llavamed_peft.packing.collator import PackedCollator
from llavamed_peft.preview.inspect import inspect
from llavamed_peft.preview.rows import marked_text
from llavamed_peft.preview.scopes import trainable_parameters
from llavamed_peft.reporting.text import histogram

SHORT = Schedule(epochs=1.5, learning_rate=1e-3, global_batch=2, max_length=64)
CURRICULUM = Curriculum(
    (
        Stage("align", "projector", replace(SHORT, global_batch=8)),
        Stage("instruct", "lora", SHORT, LoraSpec(rank=4, alpha=8, dropout=0)),
        Stage("vqa", "lora", SHORT, LoraSpec(rank=4, alpha=8, dropout=0)),
    )
)


def row(name, image, *said):
    turns = [
        {"from": "gpt" if position % 2 else "human", "value": text} for position, text in enumerate(said)
    ]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


ROWS = [
    row("q1", "a.png", "<image>\nwhat is it ?", "a chest x-ray\nof the left lung", "normal ?", "yes"),
    row("q2", "nope.png", "<image>\nwhat ?", "no"),
    row("q3", "b.png", "<image>\nis the heart normal ?", "no"),
    row("q4", None, "what is a lung ?", "the lung is in the chest"),
    row("q5", "a.png", "<image>\nwhat ?", " "),
    row("q6", "a.png", "<image>\nwhat ?", "the lung " * 50),
    row("q7", "a.png", "<image>\nwhat ?", "yes"),
]

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
  the first rows; supervised is what stands in [[ ]]
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of configuration and processor alone, data, and images."""
    folder = tmp_path_factory.mktemp("inspected")
    base = build(folder / "tiny-llava")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    (base / "model.safetensors").rename(folder / "weights.safetensors")
    Image.new("RGB", (60, 40), "gray").save(folder / "a.png")
    Image.new("RGB", (40, 60), "gray").save(folder / "b.png")
    (folder / "train.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return folder


def said(place, data=None, curriculum=CURRICULUM, **options):
    data = {"align": [place / "train.json"]} if data is None else data
    return "\n".join(inspect(place / "tiny-llava", data, curriculum=curriculum, **options)) + "\n"


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


TREE = """\
tiny-llava: llava over llama and clip_vision_model, sha256 4e0cbfadd35b
└─ align: projector (adapter), sha256 c0cca0bced5d, in tiny-llava--align
   ├─ schedule: epochs 2, learning_rate 0.003, global_batch 16, warmup_ratio 0.03, weight_decay 0,
   │     max_length 256, shuffle images
   ├─ data
   │  └─ align.json, sha256 ea05693d63b4: 1,500 rows = 1,500 used
   ├─ held out
   │  └─ align_heldout.json, sha256 af27a48331b7: 250 rows = 250 used
   ├─ metrics
   │  ├─ steps: 188
"""


@pytest.fixture
def catalogue(tmp_path):
    """The three stages of the tiny base with fixed numbers, without their weights, in folders beside one
    another."""
    schedule = Schedule(epochs=2, learning_rate=3e-3, global_batch=16, max_length=256)
    lora = LoraSpec(rank=16, alpha=32, dropout=0)
    parent = None
    for stage, sha, rejected in (
        (Stage("align", "projector", schedule), "c0cca0bced5d", {}),
        (
            Stage("instruct", "lora", schedule, lora),
            "8523372bce04",
            {"missing image": 1200, "empty answer": 3},
        ),
        (Stage("vqa", "lora", schedule, lora), "5a9f8116dd9b", {}),
    ):
        account = {"file": f"{stage.name}.json", "sha256": "ea05693d63b4ffff", "rows": 1500, "failed": 0}
        account |= {"used": 1500 - sum(rejected.values()), "rejected": rejected}
        held_out = account | {
            "file": f"{stage.name}_heldout.json",
            "sha256": "af27a48331b7",
            "rows": 250,
            "used": 250,
        }
        base = {"id": None, "revision": None, "name": "tiny-llava", "sha256": "4e0cbfadd35bffff"}
        record = {
            "schema_version": 1,
            "stage": stage.to_dict(),
            "kind": "adapter",
            "base": base
            | {"model_type": "llava", "language_model": "llama", "vision_tower": "clip_vision_model"},
            "parent": parent,
            "data": [account],
            "eval_data": [held_out | {"rejected": {}}] if stage.name == "align" else [],
            "metrics": {
                "steps": 188,
                "conversations": 3000,
                "loss_last": 0.10039781,
                "eval_loss_after": None,
            },
            "versions": {"llavamed-peft": "0.1.0", "torch": "2.13.0", "bitsandbytes": None},
            "device": "CPU (x86_64)",
            "sha256": sha + "f" * 52,
        }
        parent = {"stage": stage.name, "sha256": record["sha256"]}
        folder = tmp_path / f"tiny-llava--{stage.name}"
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return tmp_path


def test_show_is_a_tree_from_the_base_to_the_stage(catalogue):
    (catalogue / "other").mkdir()
    (catalogue / "other" / "stage.json").write_text(
        "{", encoding="utf-8"
    )  # damage beside it is not what was asked about
    lines = show(catalogue / "tiny-llava--vqa")
    assert "\n".join(lines).startswith(TREE)
    assert "   │  ├─ loss_last: 0.1004" in lines and "   │  └─ eval_loss_after: –" in lines
    assert "   ├─ made on CPU (x86_64) with llavamed-peft 0.1.0, torch 2.13.0" in lines
    assert "   └─ instruct: lora (adapter), sha256 8523372bce04, in tiny-llava--instruct" in lines
    assert "      ├─ lora: rank 16, alpha 32, dropout 0" in lines
    used = (
        "      │  └─ instruct.json, sha256 ea05693d63b4: 1,500 rows = 297 used + 1,200 missing image + "
        "3 empty answer"
    )
    assert used in show(catalogue / "tiny-llava--vqa", width=120)
    assert "      └─ vqa: lora (adapter), sha256 5a9f8116dd9b, in tiny-llava--vqa" in lines
    assert max(map(len, show(catalogue / "tiny-llava--vqa", width=60))) <= 60
    assert not any("instruct" in line for line in show(catalogue / "tiny-llava--align"))


def test_show_names_a_parent_that_does_not_lie_beside(catalogue):
    shutil.rmtree(catalogue / "tiny-llava--align")
    lines = show(catalogue / "tiny-llava--vqa")
    assert lines[1] == "└─ align, sha256 c0cca0bced5d: is not in the same folder"
    assert lines[2] == "   └─ instruct: lora (adapter), sha256 8523372bce04, in tiny-llava--instruct"


def test_show_of_a_stage_that_training_left(place, tmp_path):
    base = shutil.copytree(place / "tiny-llava", tmp_path / "tiny-llava")
    shutil.copy(place / "weights.safetensors", base / "model.safetensors")
    data = {stage.name: [place / "train.json"] for stage in CURRICULUM.stages[:2]}
    curriculum = Curriculum(CURRICULUM.stages[:2])
    curriculum_finetune(
        base,
        data,
        tmp_path / "run",
        curriculum=curriculum,
        eval_data={"align": data["align"]},
        max_rejected=0.5,
    )
    lines = show(tmp_path / "run" / "instruct", width=200)
    record = StageAdapter.load(tmp_path / "run" / "instruct").record
    assert f"   └─ instruct: lora (adapter), sha256 {record.sha256[:12]}, in instruct" in lines
    assert "      │  └─ eval_loss_after: –" in lines
    assert (
        sum(
            "7 rows = 4 used + 1 missing image + 1 empty answer + 1 longer than max_length" in line
            for line in lines
        )
        == 3
    )


def test_show_refuses_what_is_no_stage(tmp_path):
    with pytest.raises(AdapterError, match=r"has no stage\.json; wanted a folder that a finished stage left"):
        show(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stage": "x"}, "stage is 'x'"),
        (
            {"stage": {"name": "a", "trains": "projector"}},
            "stage lacks schedule; Stage has no default there.",
        ),
        ({"kind": "x"}, "kind is 'x'"),
        ({"data": 5}, "data is 5"),
        ({"data": [{"file": "a.json"}]}, "data[0] lacks sha256, rows, used, rejected, failed"),
        ({"metrics": []}, "metrics is []"),
        ({"parent": "x"}, "parent is 'x'"),
        ({"parent": {"stage": "x"}}, "parent lacks sha256"),
        ({"base": None}, "base is None"),
        ({"base": {"name": "x"}}, "base lacks model_type, language_model, vision_tower"),
        ({"sha256": 5}, "sha256 is 5"),
        ({"versions": None}, "versions is None"),
    ],
)
def test_a_damaged_record_is_an_error(changes: dict[str, object], fault: str, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "adapters" / "tiny-llava--align" / RECORD
    record = json.loads(shipped.read_text(encoding="utf-8"))
    (tmp_path / RECORD).write_text(json.dumps(record | changes), encoding="utf-8")
    with pytest.raises(AdapterError) as caught:
        show(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path / RECORD}: {fault}; the folder is damaged. Copy or download it again."
    )
