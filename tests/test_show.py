"""The tree of a stage: `llavamed-peft show`."""

import json
import shutil
from pathlib import Path

import pytest
from inspected import CURRICULUM, place

from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, StageAdapter, curriculum_finetune
from llavamed_peft.adapters.lineage_tree import show
from llavamed_peft.adapters.record import RECORD
from llavamed_peft.errors import AdapterError

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
    # Damage beside it is not what was asked about
    (catalogue / "other" / "stage.json").write_text("{", encoding="utf-8")
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
