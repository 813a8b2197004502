"""The contracts of a run: what a stage leaves is what was in memory, for stock PEFT too, and stages follow on
exactly."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import AutoPeftModel, PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from llavamed_peft import (
    Conversation,
    Curriculum,
    LoraSpec,
    Question,
    Schedule,
    Stage,
    StageAdapter,
    Turn,
    curriculum_finetune,
    load_stage,
)
from llavamed_peft.adapters.stage_adapter import adapter_folder
from llavamed_peft.errors import AdapterError, CheckpointError, ConfigError, DataError, TrainingError
from llavamed_peft.evaluation.answer import answer_questions
from llavamed_peft.packing import PackedCollator, collator
from llavamed_peft.reporting.run_log import progress_line
from llavamed_peft.running.run import Run
from llavamed_peft.running.summary import read_metrics
from llavamed_peft.storage.hashing import file_sha256
from llavamed_peft.storage.images import load_image
from llavamed_peft.storage.whole import write_folder

KINDS = {
    "llava": ("llama", "clip", -2),
    "vipllava": ("llama", "clip", [-2, -1, 1]),
    "llava_next": ("mistral", "clip", -2),
    "llava_onevision": ("qwen2", "siglip", -1),
}
ROOT = Path(__file__).parent.parent
LORA = LoraSpec(rank=4, alpha=8, dropout=0.0)


def schedule(**changes: object) -> Schedule:
    return Schedule(**{"epochs": 1, "learning_rate": 1e-2, "global_batch": 4, **changes})


THREE = Curriculum(
    (
        Stage("align", "projector", schedule()),
        Stage("instruct", "lora", schedule(projector_learning_rate=1e-3), LORA),
        Stage("vqa", "lora", schedule(), LORA),
    )
)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = random.Random(0)
    for i in range(6):
        size = generator.randint(40, 130), generator.randint(40, 130)
        Image.new("RGB", size, tuple(generator.randint(0, 255) for _ in range(3))).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def conversations(images: Path) -> list[Conversation]:
    """Twelve: of one turn and of two, with one image, two images, an image in the second turn, and none."""
    rows = []
    for i in range(8):
        turns = [
            Turn("user", "<image>\nwhat is in the image?"),
            Turn("assistant", ["a heart", "a lung", "no"][i % 3]),
        ]
        if i % 2:
            turns += [Turn("user", "is it normal?"), Turn("assistant", "yes")]
        rows.append(Conversation(str(i), tuple(turns), (str(images / f"{i % 6}.png"),)))
    two = (Turn("user", "<image><image>\nwhich is left?"), Turn("assistant", "the first"))
    rows.append(Conversation("two", two, (str(images / "0.png"), str(images / "1.png"))))
    later = (
        Turn("user", "<image>\nand?"),
        Turn("assistant", "no"),
        Turn("user", "<image>\nthis?"),
        Turn("assistant", "yes"),
    )
    rows.append(Conversation("later", later, (str(images / "2.png"), str(images / "3.png"))))
    rows += [
        Conversation(f"text {i}", (Turn("user", "what is a lung?"), Turn("assistant", "an organ")))
        for i in range(2)
    ]
    return rows


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / f"tiny-{kind}", kind, *how) for kind, how in KINDS.items()}


@pytest.fixture(scope="session")
def runs(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, StageAdapter]]:
    """The three stages on a checkpoint of each class."""
    folder = tmp_path_factory.mktemp("runs")
    data = dict.fromkeys(("align", "instruct", "vqa"), conversations)
    return {
        kind: curriculum_finetune(
            base, data, folder / kind, curriculum=THREE, eval_data={"vqa": conversations}, eval_steps=2
        )
        for kind, base in bases.items()
    }


def logits(model: torch.nn.Module, processor: object, conversations: list[Conversation]) -> torch.Tensor:
    batch = PackedCollator(processor, layout="padded")(conversations)
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryClass:
    def test_learns(self, kind: str, runs: dict[str, dict[str, StageAdapter]]) -> None:
        metrics = [adapter.metrics for adapter in runs[kind].values()]
        assert [m["steps"] for m in metrics] == [3, 3, 3]
        assert [m["conversations"] for m in metrics] == [12, 12, 12]
        assert metrics[2]["eval_loss_after"] < metrics[2]["eval_loss_before"]

    def test_stock_peft_and_load_stage_agree(
        self,
        kind: str,
        bases: dict[str, Path],
        runs: dict[str, dict[str, StageAdapter]],
        conversations: list[Conversation],
    ) -> None:
        for adapter in runs[kind].values():
            ours, processor = load_stage(bases[kind], adapter)
            stock = PeftModel.from_pretrained(
                AutoModelForImageTextToText.from_pretrained(bases[kind]), adapter.path
            )
            assert torch.equal(
                logits(ours, processor, conversations), logits(stock, processor, conversations)
            )

    def test_held_out_loss_is_the_loaded_models(
        self,
        kind: str,
        bases: dict[str, Path],
        runs: dict[str, dict[str, StageAdapter]],
        conversations: list[Conversation],
    ) -> None:
        model, processor = load_stage(bases[kind], runs[kind]["vqa"])
        with torch.no_grad():
            loss = model(**PackedCollator(processor)(conversations)).loss.item()
        assert loss == pytest.approx(runs[kind]["vqa"].metrics["eval_loss_after"], abs=1e-5)

    def test_a_stage_begins_where_its_parent_ended(
        self,
        kind: str,
        bases: dict[str, Path],
        runs: dict[str, dict[str, StageAdapter]],
        conversations: list[Conversation],
    ) -> None:
        model, processor = load_stage(bases[kind], runs[kind]["instruct"])
        with torch.no_grad():
            loss = model(**PackedCollator(processor)(conversations)).loss.item()
        assert loss == pytest.approx(runs[kind]["vqa"].metrics["eval_loss_before"], abs=1e-5)

    def test_merged_is_unmerged(
        self,
        kind: str,
        bases: dict[str, Path],
        runs: dict[str, dict[str, StageAdapter]],
        conversations: list[Conversation],
        tmp_path: Path,
    ) -> None:
        adapter = runs[kind]["vqa"]
        model, processor = load_stage(bases[kind], adapter)
        adapter.merge(bases[kind], tmp_path / "merged")
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            logits(merged, processor, conversations), logits(model, processor, conversations)
        )
        with pytest.raises(AdapterError, match="is there already; wanted a new folder"):
            adapter.merge(bases[kind], tmp_path / "merged")

    @pytest.mark.parametrize(("quantization", "dtype"), [(None, "bfloat16"), ("nf4", "bfloat16")])
    def test_trains_in_bfloat16_and_over_four_bits(
        self,
        kind: str,
        quantization: str | None,
        dtype: str,
        bases: dict[str, Path],
        conversations: list[Conversation],
        tmp_path: Path,
    ) -> None:
        data, curriculum = {"vqa": conversations}, Curriculum((THREE["vqa"],))
        adapter = curriculum_finetune(
            bases[kind],
            data,
            tmp_path,
            curriculum=curriculum,
            eval_data=data,
            eval_steps=9,
            quantization=quantization,
            dtype=dtype,
        )["vqa"]
        assert adapter.metrics["eval_loss_after"] < adapter.metrics["eval_loss_before"]
        assert {tensor.dtype for tensor in adapter.tensors().values()} == {torch.float32}
        load_stage(bases[kind], adapter)

    def test_only_the_scope_moved(
        self,
        kind: str,
        bases: dict[str, Path],
        runs: dict[str, dict[str, StageAdapter]],
        conversations: list[Conversation],
    ) -> None:
        align = runs[kind]["align"].tensors()
        assert align and all(".multi_modal_projector." in name for name in align)
        instruct = runs[kind]["instruct"].tensors()
        lora = {name for name in instruct if ".lora_" in name}
        assert lora and all(".language_model." in name for name in lora)
        assert set(instruct) - lora == set(align)
        base = AutoModelForImageTextToText.from_pretrained(bases[kind])
        for name, tensor in base.model.multi_modal_projector.named_parameters():
            assert not torch.equal(align[f"base_model.model.model.multi_modal_projector.{name}"], tensor)


def test_stage_json_adds_up_and_names_its_parent(runs: dict[str, dict[str, StageAdapter]]) -> None:
    align, instruct, vqa = runs["llava"].values()
    assert align.parent is None
    assert instruct.parent == {"stage": "align", "sha256": align.record.sha256}
    assert vqa.parent == {"stage": "instruct", "sha256": instruct.record.sha256}
    assert instruct.stage == THREE["instruct"]
    for adapter in (align, instruct, vqa):
        for entry in adapter.record.data:
            assert entry.rows == 12 == entry.used + sum(entry.rejected.values()) + entry.failed


def test_no_local_path_is_published(bases: dict[str, Path], runs: dict[str, dict[str, StageAdapter]]) -> None:
    for adapter in runs["llava"].values():
        for path in adapter.path.iterdir():
            if path.suffix in (".json", ".md", ".jinja"):
                assert str(bases["llava"].parent) not in path.read_text(encoding="utf-8"), path.name
        config = json.loads((adapter.path / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "tiny-llava"
        card = (adapter.path / "README.md").read_text(encoding="utf-8")
        assert adapter.record.base.sha256 in card
        assert "Trained over weights that were not quantized, computed in float32." in card
        metadata = yaml.safe_load(card.split("---")[1])
        assert not {"base_model", "datasets"} & metadata.keys(), (
            "the Hub knows neither the base nor the files"
        )


def test_run_leaves_curve_table_and_metrics(runs: dict[str, dict[str, StageAdapter]]) -> None:
    folder = runs["llava"]["vqa"].path.parent
    assert Image.open(folder / "loss.png").size[0] > 300
    assert "| instruct | lora |" in (folder / "stages.md").read_text(encoding="utf-8")
    records = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [record for record in records if record["stage"] == "instruct" and "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[2]["projector_learning_rate"] == pytest.approx(steps[2]["language_model_learning_rate"] / 10)
    held_out = [record["step"] for record in records if record["stage"] == "vqa" and "eval_loss" in record]
    assert held_out == [0, 2, 3]


def test_stock_peft_swaps_stages_where_this_package_cannot_be_imported(
    bases: dict[str, Path], runs: dict[str, dict[str, StageAdapter]], images: Path
) -> None:
    script = f"""
import sys
sys.modules["llavamed_peft"] = None  # any import of it fails
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
runs = {str(runs["llava"]["vqa"].path.parent)!r}
base = AutoModelForImageTextToText.from_pretrained({str(bases["llava"])!r})
model = PeftModel.from_pretrained(base, runs + "/align", "align")
model.load_adapter(runs + "/vqa", "vqa")
processor = AutoProcessor.from_pretrained(runs + "/vqa")
question = {{"type": "text", "text": "what is in the image?"}}
messages = [{{"role": "user", "content": [{{"type": "image"}}, question]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open({str(images / "0.png")!r}), return_tensors="pt")
for stage in ("align", "vqa", "align"):
    model.set_adapter(stage)
    print(stage, model(**inputs).logits.double().sum().item())
model.set_adapter("vqa")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=3, do_sample=False)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = (line.split()[1] for line in done.stdout.splitlines()[:3])
    assert first == third != second
    ours, processor = load_stage(bases["llava"], runs["llava"]["vqa"])
    asked = Question("q", str(images / "0.png"), "what is in the image?", "?", "open")
    (answer,) = answer_questions(ours, processor, [asked], max_new_tokens=3)
    assert done.stdout.splitlines()[3].partition("ASSISTANT:")[2].removesuffix("']").strip() == answer


def test_full_stage_leaves_a_checkpoint_that_the_next_stage_builds_on(
    bases: dict[str, Path],
    runs: dict[str, dict[str, StageAdapter]],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    curriculum = Curriculum(
        (Stage("all", "full", schedule(learning_rate=1e-3)), Stage("more", "lora", schedule(), LORA))
    )
    data = {"all": conversations, "more": conversations}
    adapters = curriculum_finetune(
        bases["llava"],
        data,
        tmp_path / "run",
        curriculum=curriculum,
        eval_data=data,
        start_from=runs["llava"]["instruct"],
    )
    full, more = adapters["all"], adapters["more"]
    assert full.is_checkpoint and full.parent == {
        "stage": "instruct",
        "sha256": runs["llava"]["instruct"].record.sha256,
    }
    assert full.metrics["eval_loss_before"] == pytest.approx(
        runs["llava"]["vqa"].metrics["eval_loss_before"], abs=1e-5
    )
    model = AutoModelForImageTextToText.from_pretrained(full.path)
    loaded, processor = load_stage(bases["llava"], full)
    assert torch.equal(logits(model, processor, conversations), logits(loaded, processor, conversations))
    base = AutoModelForImageTextToText.from_pretrained(bases["llava"])
    for (name, before), (_, after) in zip(base.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(before, after) == name.startswith("model.vision_tower."), name
    assert more.record.base.sha256 == full.record.sha256
    stock = PeftModel.from_pretrained(model, more.path)
    with torch.no_grad():
        loss = stock.eval()(**PackedCollator(processor)(conversations)).loss.item()
    assert loss == pytest.approx(more.metrics["eval_loss_after"], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projector_stage_behind_lora_carries_it_frozen(
    dtype: str,
    bases: dict[str, Path],
    runs: dict[str, dict[str, StageAdapter]],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    curriculum = Curriculum((Stage("realign", "projector", schedule()),))
    adapter = curriculum_finetune(
        bases["llava"],
        {"realign": conversations},
        tmp_path,
        curriculum=curriculum,
        start_from=runs["llava"]["vqa"].path,
        dtype=dtype,
    )["realign"]
    before, after = runs["llava"]["vqa"].tensors(), adapter.tensors()
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name]) == (".lora_" in name), name


def test_order_and_dropout_are_a_function_of_the_seed(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def run(seed: int, name: str) -> dict[str, torch.Tensor]:
        stage = Stage("vqa", "lora", schedule(), LoraSpec(rank=4, alpha=8, dropout=0.2))
        curriculum = Curriculum((stage,), seed=seed)
        return curriculum_finetune(
            bases["llava"], {"vqa": conversations}, tmp_path / name, curriculum=curriculum
        )["vqa"].tensors()

    first, again, other = run(1, "first"), run(1, "again"), run(2, "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16_base_trains_in_fp32_and_rounds_only_what_is_loaded(
    dtype: str, conversations: list[Conversation], tmp_path: Path
) -> None:
    base = tiny.build(tmp_path / "base", dtype=torch.bfloat16)
    adapter = curriculum_finetune(
        base, {"vqa": conversations}, tmp_path / "run", curriculum=Curriculum((THREE["vqa"],)), dtype=dtype
    )["vqa"]
    tensors = adapter.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    projector = [name for name in tensors if "multi_modal_projector" in name]
    assert any(not torch.equal(tensors[name], tensors[name].bfloat16().float()) for name in projector)
    model, processor = load_stage(base, adapter)
    assert model.get_base_model().dtype == torch.bfloat16
    merged = AutoModelForImageTextToText.from_pretrained(adapter.merge(base, tmp_path / "merged"))
    assert merged.dtype == torch.bfloat16
    batch = PackedCollator(processor)(conversations)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        unmerged_loss, merged_loss = (model.eval()(**batch).loss.item(), merged.eval()(**batch).loss.item())
    assert merged_loss == pytest.approx(unmerged_loss, abs=0.05)  # bf16 has eight bits
    loaded = load_stage(base, adapter, dtype="float32")[0]
    name = "base_model.model.model.multi_modal_projector.linear_1.weight"
    kept = loaded.get_base_model().model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    assert torch.equal(kept, tensors[name])


def test_nf4_trains_and_its_adapter_loads_on_the_raw_base(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    adapters = curriculum_finetune(
        bases["llava"],
        dict.fromkeys(("align", "instruct", "vqa"), conversations),
        tmp_path,
        curriculum=THREE,
        quantization="nf4",
        eval_data={"vqa": conversations},
    )
    assert adapters["vqa"].metrics["eval_loss_after"] < adapters["vqa"].metrics["eval_loss_before"]
    model, processor = load_stage(bases["llava"], adapters["vqa"], quantization="nf4")
    with torch.no_grad():
        loss = model(**PackedCollator(processor)(conversations)).loss.item()
    assert loss == pytest.approx(adapters["vqa"].metrics["eval_loss_after"], abs=1e-4)
    load_stage(bases["llava"], adapters["vqa"])
    parent, child = adapters["align"].tensors(), adapters["instruct"].tensors()
    moved = [name for name in parent if not torch.equal(parent[name], child[name])]
    assert moved, "the projector stood still in bf16 steps"


def test_undecodable_image_leaves_its_step_and_is_counted(
    bases: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((90, 60), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(
        whole[: len(whole) // 2]
    )  # the header is fine, the pixels end too soon
    good = [Question(str(i), str(images / f"{i}.png"), "what?", "yes", "closed") for i in range(5)]
    bad = Question("bad", str(tmp_path / "cut.png"), "what?", "yes", "closed")
    curriculum = Curriculum((Stage("vqa", "projector", schedule(epochs=2, global_batch=3)),))
    call = {"data": {"vqa": [*good, bad]}, "max_rejected": 0.2}
    adapter = curriculum_finetune(bases["llava"], output_dir=tmp_path / "run", curriculum=curriculum, **call)[
        "vqa"
    ]
    (entry,) = adapter.record.data
    assert (entry.rows, entry.used, entry.rejected, entry.failed) == (6, 5, {}, 1)
    assert adapter.metrics["conversations"] == 10 and adapter.metrics["steps"] == 4
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["id"] == "bad" and json.loads(line)["row"] == 6
    told = (
        "vqa        1 of 6 training conversations could not be decoded and were left out, such as: "
        f"{tmp_path / 'cut.png'}: "
    )
    assert told in capsys.readouterr().err
    curriculum = Curriculum((Stage("vqa", "projector", schedule(global_batch=1)),))
    alone = curriculum_finetune(bases["llava"], output_dir=tmp_path / "alone", curriculum=curriculum, **call)[
        "vqa"
    ]
    losses = [record["loss"] for record in read_metrics(tmp_path / "alone") if "loss" in record]
    assert alone.metrics["steps"] == 6 and len(losses) == 5 and min(losses) > 0, (
        "a step that lost all it had has no loss"
    )


def test_workers_change_nothing(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def run(workers: int) -> dict[str, torch.Tensor]:
        return curriculum_finetune(
            bases["llava"],
            {"align": conversations},
            tmp_path / str(workers),
            curriculum=Curriculum((THREE["align"],)),
            workers=workers,
        )["align"].tensors()

    inside, outside = run(0), run(2)
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


def test_device_batches_change_nothing_but_rounding(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def run(max_row_tokens: int, checkpointing: bool, layout: str = "packed") -> StageAdapter:
        return curriculum_finetune(
            bases["llava"],
            {"vqa": conversations},
            tmp_path / f"{max_row_tokens} {checkpointing} {layout}",
            curriculum=Curriculum((THREE["vqa"],)),
            layout=layout,
            max_row_tokens=max_row_tokens,
            gradient_checkpointing=checkpointing,
            eval_data={"vqa": conversations},
        )["vqa"]

    whole, single, checkpointed, padded = (
        run(100_000, False),
        run(1, False),
        run(100, True),
        run(150, False, "padded"),
    )
    assert (whole.record.computing["layout"], padded.record.computing["layout"]) == ("packed", "padded")
    for other in (single, checkpointed, padded):
        assert other.metrics["loss_last"] == pytest.approx(whole.metrics["loss_last"], abs=1e-4)
        assert other.metrics["eval_loss_after"] == pytest.approx(whole.metrics["eval_loss_after"], abs=1e-4)


def test_report_to_tensorboard_writes_events(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    curriculum_finetune(
        bases["llava"],
        {"align": conversations},
        tmp_path,
        curriculum=Curriculum((THREE["align"],)),
        report_to="tensorboard",
    )
    events = list((tmp_path / "logs" / "align").rglob("events.out.tfevents.*"))
    assert events and events[0].stat().st_size > 100


class TestRefusals:
    """What is refused, before anything is written."""

    @pytest.fixture
    def call(self, bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path):
        def call(**changes: object) -> dict[str, StageAdapter]:
            arguments = {
                "model": bases["llava"],
                "data": {"align": conversations},
                "output_dir": tmp_path / "run",
                "curriculum": Curriculum((THREE["align"],)),
            }
            return curriculum_finetune(**{**arguments, **changes})

        return call

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"data": {}}, ConfigError, "data has nothing for stage 'align'; wanted an entry for each of"),
            ({"data": {"alin": []}}, ConfigError, "data has the key 'alin', which is no stage of the"),
            ({"data": {"align": []}}, ConfigError, "data['align'] is empty"),
            ({"data": {"align": 3}}, ConfigError, "data['align'] is 3; wanted a file"),
            ({"data": {"align": [3]}}, ConfigError, "data['align'] holds a int"),
            ({"data": {"align": "nowhere.json"}}, DataError, "nowhere.json: no such file; wanted a"),
            ({"eval_data": {"vqa": []}}, ConfigError, "eval_data has the key 'vqa'"),
            ({"image_folder": {"vqa": "x"}}, ConfigError, "image_folder has the key 'vqa'"),
            ({"model": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all: no configuration could be"),
            ({"quantization": "int3"}, ConfigError, "quantization is 'int3'; wanted None or 'nf4'."),
            ({"dtype": "float16"}, ConfigError, "training computes in 'bfloat16' or 'float32'"),
            ({"dtype": "floaty"}, ConfigError, "dtype is 'floaty'; wanted None or a floating-point dtype"),
            ({"layout": "rows"}, ConfigError, "layout is 'rows'; wanted one of packed, padded."),
            ({"max_row_tokens": 0}, ConfigError, "max_row_tokens is 0; wanted None or a whole number of"),
            ({"max_rejected": 2}, ConfigError, "max_rejected is 2; wanted a share between 0 and 1."),
            ({"data": {"align": None}}, ConfigError, "data['align'] is None; wanted data, or no such entry."),
            ({"data": ["x"]}, ConfigError, "data is ['x']; wanted a dictionary of stage name → data."),
            ({"curriculum": 3}, ConfigError, "curriculum is 3; wanted a Curriculum"),
            ({"report_to": ("none",)}, ConfigError, "report_to is ('none',); wanted the name of a tracker"),
            ({"report_to": 5}, ConfigError, "report_to is 5; wanted the name of a tracker"),
            ({"report_to": "nonsense"}, ConfigError, "report_to names 'nonsense'; installed here: none"),
            ({"save_steps": 0}, ConfigError, "save_steps is 0; wanted None or a whole number of at least 1."),
            ({"gradient_checkpointing": "False"}, ConfigError, "gradient_checkpointing is 'False'"),
            ({"output_dir": ""}, ConfigError, "output_dir is ''; wanted a folder to write to ('.' is the"),
            ({"output_dir": None}, ConfigError, "output_dir is None; wanted a folder to write to"),
            ({"workers": -1}, ConfigError, "workers is -1; wanted None or a whole number of at least 0."),
            ({"start_from": "/nowhere"}, AdapterError, "/nowhere: neither a folder nor a Hub repository"),
        ],
    )  # fmt: skip
    def test_arguments(
        self, call, changes: dict[str, object], error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error) as raised:
            call(**changes)
        assert message in str(raised.value)
        assert not (tmp_path / "run" / "align").exists()
        if error is ConfigError and "empty" not in message and "data['align']" not in message:
            assert not (tmp_path / "run").exists(), "nothing was done"

    def test_a_sliding_window_that_packed_rows_would_not_heed(
        self, call, bases: dict[str, Path], tmp_path: Path
    ) -> None:
        base = shutil.copytree(bases["llava_next"], tmp_path / "base")
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["sliding_window"] = 40
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        told = r"sliding_window is 40, the longest conversation has \d+ tokens.*layout='padded'"
        for _ in ("index built", "index found"):
            with pytest.raises(ConfigError, match=told):
                call(model=base)
        assert call(model=base, layout="padded")["align"].metrics["steps"]

    def test_quantised_full(self, call, conversations: list[Conversation]) -> None:
        full = Curriculum((Stage("all", "full", schedule()),))
        with pytest.raises(
            ConfigError, match="Stage 'all' trains 'full' and quantization is 'nf4'; wanted None"
        ):
            call(curriculum=full, data={"all": conversations}, quantization="nf4")

    def test_another_rank_behind_start_from(
        self, call, conversations: list[Conversation], runs: dict[str, dict[str, StageAdapter]]
    ) -> None:
        other = Curriculum((Stage("vqa", "lora", schedule(), LoraSpec(rank=8, alpha=8)),))
        with pytest.raises(
            ConfigError, match="Stage 'vqa' has LoRA rank 8 and alpha 8, start_from rank 4 and alpha 8"
        ):
            call(curriculum=other, data={"vqa": conversations}, start_from=runs["llava"]["instruct"])

    @pytest.mark.parametrize(
        "name", ["index", "logs", "checkpoints", "run.json", "metrics.jsonl", "loss.png"]
    )
    def test_a_stage_named_like_a_file_of_the_run(
        self, name: str, call, conversations: list[Conversation]
    ) -> None:
        curriculum = Curriculum((Stage(name, "projector", schedule()),))
        with pytest.raises(ConfigError, match=f"Stage.name is '{name}', which the run needs for itself"):
            call(curriculum=curriculum, data={name: conversations})

    def test_a_stage_of_nobody_knows_which_run(self, call, tmp_path: Path) -> None:
        (tmp_path / "run" / "align").mkdir(parents=True)
        with pytest.raises(
            TrainingError,
            match=r"holds align already, but no run\.json that says of which run; wanted a folder",
        ):
            call()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["align"], "nothing was done"

    def test_too_many_rejected_rows(self, call, images: Path, tmp_path: Path) -> None:
        row = {
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}],
        }
        rows = [{**row, "id": str(i)} for i in range(8)]
        rows += [{**row, "id": "a", "image": "no.png"}, {**row, "id": "b", "conversations": []}]
        (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        with pytest.raises(DataError) as raised:
            call(data={"align": tmp_path / "data.json"}, image_folder=images)
        assert "data.json: 2 of 10 rows cannot be used (20.0%; max_rejected is 5.0%). Commonest: " in str(
            raised.value
        )
        adapter = call(data={"align": tmp_path / "data.json"}, image_folder=images, max_rejected=0.2)["align"]
        (entry,) = adapter.record.data
        assert (entry.rows, entry.used) == (10, 8) and sum(entry.rejected.values()) == 2
        lines = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["a", "b"]

    def test_too_long_is_named_with_what_it_needs(self, call, conversations: list[Conversation]) -> None:
        short = Curriculum((Stage("align", "projector", schedule(max_length=60)),))
        with pytest.raises(DataError, match=r"Commonest: longer than max_length \(\d+\)"):
            call(curriculum=short, max_rejected=0.0)

    def test_loss_that_is_not_a_number(self, call, tmp_path: Path) -> None:
        wild = Curriculum(
            (Stage("align", "projector", schedule(learning_rate=1e30, warmup_ratio=0, epochs=20)),)
        )
        with pytest.raises(TrainingError, match=r"The loss of step \d+ is (nan|inf). Lower learning_rate"):
            call(curriculum=wild)
        assert not (tmp_path / "run" / "align").exists()


def test_start_from_another_architecture_or_padding_is_refused_at_once(
    bases: dict[str, Path],
    runs: dict[str, dict[str, StageAdapter]],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    curriculum = Curriculum((THREE["vqa"],))
    arguments = {
        "data": {"vqa": conversations},
        "output_dir": tmp_path / "run",
        "start_from": runs["llava"]["align"],
    }
    with pytest.raises(AdapterError, match="was trained on model_type 'llava', the base's is 'vipllava'"):
        curriculum_finetune(bases["vipllava"], curriculum=curriculum, **arguments)
    with pytest.raises(
        ConfigError, match="image_aspect_ratio is 'checkpoint', start_from was trained with 'pad'"
    ):
        curriculum_finetune(
            bases["llava"], curriculum=replace(curriculum, image_aspect_ratio="checkpoint"), **arguments
        )
    assert not (tmp_path / "run").exists()


def test_held_out_evaluation_does_not_change_what_is_learnt(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    curriculum = Curriculum((Stage("vqa", "lora", schedule(), LoraSpec(rank=4, alpha=8, dropout=0.3)),))
    plain = curriculum_finetune(
        bases["llava"], {"vqa": conversations}, tmp_path / "plain", curriculum=curriculum
    )["vqa"]
    data = {"vqa": conversations}
    watched = curriculum_finetune(
        bases["llava"], data, tmp_path / "watched", curriculum=curriculum, eval_data=data, eval_steps=1
    )["vqa"]
    tensors = watched.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.tensors().items())


def test_auto_peft_model_finds_the_base_from_the_folder(
    bases: dict[str, Path], runs: dict[str, dict[str, StageAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases["llava"].parent)  # the base goes by its name alone
    model = AutoPeftModel.from_pretrained(runs["llava"]["vqa"].path)
    assert type(model.get_base_model()).__name__ == "LlavaForConditionalGeneration"


def test_a_hub_base_is_known_by_id_revision_and_content(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    """In a process of its own, since the library reads the cache's place when it is imported."""
    revision, blobs = "a" * 40, tmp_path / "hub" / "models--org--tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / revision
    for folder in (blobs, snapshot, blobs.parent / "refs"):
        folder.mkdir(parents=True)
    (blobs.parent / "refs" / "main").write_text(revision)
    for path in bases["llava"].iterdir():
        blob = blobs / file_sha256(path)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    script = f"""
from llavamed_peft import *
rows = [Question(str(i), {conversations[0].images[0]!r}, "what?", "yes", "closed") for i in range(4)]
stage = Stage("align", "projector", Schedule(epochs=2, learning_rate=1e-3, global_batch=2))
curriculum_finetune("org/tiny", {{"align": rows}}, "run", curriculum=Curriculum((stage,)))
"""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    adapter = StageAdapter.load(tmp_path / "run" / "align")
    base = adapter.record.base
    assert (base["id"], base["revision"]) == ("org/tiny", revision)
    assert base["sha256"] == file_sha256(bases["llava"] / "model.safetensors")
    assert adapter.peft_config().base_model_name_or_path == "org/tiny"
    assert "\nbase_model: org/tiny\nbase_model_relation: adapter\n" in (adapter.path / "README.md").read_text(
        encoding="utf-8"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_stage(bases["llava"], adapter)  # a folder with the same weights is the same base


@pytest.mark.parametrize(
    ("epochs", "seen", "told"),
    [
        (1, 4, r"4 of 4 rows cannot be used \(100\.0%; max_rejected is 100\.0%\)"),
        (0.5, 2, "Not one conversation of stage 'vqa' could be decoded; nothing was written"),
    ],
)
def test_images_that_all_vanish_leave_no_stage(
    epochs: float,
    seen: int,
    told: str,
    bases: dict[str, Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    rows = [Question(str(i), str(folder / f"{i}.png"), "what?", "yes", "closed") for i in range(4)]
    stage = Run.stage

    def vanish_first(self: Run, *arguments: object) -> StageAdapter:
        shutil.rmtree(folder)
        return stage(self, *arguments)

    monkeypatch.setattr(Run, "stage", vanish_first)
    curriculum = Curriculum((Stage("vqa", "projector", schedule(global_batch=2, epochs=epochs)),))
    with pytest.raises(TrainingError, match=told):
        curriculum_finetune(
            bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=curriculum, max_rejected=1
        )
    assert not (tmp_path / "run" / "vqa").exists()
    assert len((tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == seen
    monkeypatch.undo()
    shutil.copytree(
        images, folder
    )  # found again: the same call begins the stage, for nothing had been learnt
    adapter = curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=curriculum)[
        "vqa"
    ]
    assert adapter.metrics["conversations"] == seen and adapter.record.data[0].failed == 0
    assert not (tmp_path / "run" / "rejected.jsonl").exists()


def test_rows_that_would_fill_the_memory_or_break_the_labels_are_rejected(
    bases: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    Image.new("L", (60000, 1)).save(tmp_path / "strip.png")
    good = [Question(str(i), str(images / f"{i}.png"), "what?", "yes", "closed") for i in range(4)]
    strip = Question("strip", str(tmp_path / "strip.png"), "what?", "yes", "closed")
    stop = Question("stop", str(images / "0.png"), "what?", "yes </s> no", "closed")
    curriculum = Curriculum((Stage("vqa", "projector", schedule(global_batch=2)),))
    adapter = curriculum_finetune(
        bases["llava"],
        {"vqa": [*good, strip, stop]},
        tmp_path / "run",
        curriculum=curriculum,
        max_rejected=0.5,
    )["vqa"]
    (entry,) = adapter.record.data
    assert entry.rejected == {"unreadable image": 1, "cannot be encoded": 1} and entry.used == 4
    lines = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert "60000 × 1 pixels" in json.loads(lines[0])["detail"]
    assert (
        "Turn 2 holds '</s>', which the tokenizer reads as a special token" in json.loads(lines[1])["detail"]
    )


def test_waiting_for_images_is_counted(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: str) -> Image.Image:
        time.sleep(0.05)
        return load_image(path)

    monkeypatch.setattr(collator, "load_image", slow)
    shown = [conversation for conversation in conversations if conversation.images]
    curriculum = Curriculum((Stage("align", "projector", schedule(epochs=1, global_batch=1)),))
    metrics = curriculum_finetune(
        bases["llava"], {"align": shown}, tmp_path / "run", curriculum=curriculum, feature_cache=False
    )["align"].metrics
    assert 0.05 * len(shown) <= metrics["waiting_seconds"] < metrics["seconds"]
    shares = [
        (record["waiting_share"], record["seconds"])
        for record in read_metrics(tmp_path / "run")
        if "loss" in record
    ]
    waited = [share * seconds for share, seconds in shares]
    assert all(later - earlier > 0.04 for earlier, later in pairwise([0.0, *waited])), (
        "each step waits for an image of its own"
    )


def test_a_stage_that_will_learn_nothing_is_warned_of(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    texts = [conversation for conversation in conversations if not conversation.images]
    for name, how, why in (
        (
            "text",
            {"epochs": 4, "global_batch": 1},
            "it trains the projector alone, and not one of its conversations shows an",
        ),
        (
            "once",
            {"epochs": 1, "global_batch": 8},
            "warm-up begins at rate 0, and there is one optimizer step",
        ),
    ):
        curriculum = Curriculum((Stage(name, "projector", schedule(**how)),))
        with pytest.warns(UserWarning, match=f"^Stage '{name}' will learn nothing: {why}"):
            curriculum_finetune(bases["llava"], {name: texts}, tmp_path / name, curriculum=curriculum)


def test_progress_line_says_loss_rates_speed_and_time_left(runs: dict[str, dict[str, StageAdapter]]) -> None:
    records = read_metrics(runs["llava"]["vqa"].path.parent)
    (first,) = [record for record in records if (record["stage"], record["step"]) == ("instruct", 1)]
    assert re.fullmatch(
        r"instruct   1/3  loss \d+\.\d{4}  learning rate projector 0\.0e\+00, language model 0\.0e\+00  "
        r"[\d.]+ conversations/s  \d+ supervised tokens/s  waiting \d+%  \d+:\d\d left",
        progress_line(first),
    )


class TestWriting:
    def test_a_fault_while_writing_leaves_nothing(self, tmp_path: Path) -> None:
        def fill(folder: Path) -> None:
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

        with pytest.raises(
            AdapterError,
            match=r"cannot be written .*No space left on device.*; nothing was left under that name",
        ):
            adapter_folder(tmp_path / "align", fill)
        assert list(tmp_path.iterdir()) == []

    def test_what_a_stage_leaves_may_be_read_by_whoever_may_read_a_new_file(
        self, runs: dict[str, dict[str, StageAdapter]], tmp_path: Path
    ) -> None:
        (tmp_path / "new").touch()
        modes = {path.name: path.stat().st_mode for path in runs["llava"]["vqa"].path.iterdir()}
        assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes

    def test_a_kill_while_writing_leaves_nothing_under_the_final_name(self, tmp_path: Path) -> None:
        script = f"""
import os, signal
from pathlib import Path
from llavamed_peft.storage.whole import write_folder

def fill(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

write_folder(Path({str(tmp_path / "align")!r}), fill)
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=False
        )
        assert done.returncode == -9
        assert [path.name for path in tmp_path.iterdir()] == [".align.partial"]
        write_folder(tmp_path / "align", lambda folder: (folder / "whole").write_text("whole"))
        assert [path.name for path in (tmp_path / "align").iterdir()] == ["whole"]
        assert [path.name for path in tmp_path.iterdir()] == ["align"]


def test_adapter_on_another_architecture_is_an_error(
    bases: dict[str, Path], runs: dict[str, dict[str, StageAdapter]]
) -> None:
    for kind in ("vipllava", "llava_next", "llava_onevision"):
        with pytest.raises(
            AdapterError, match=r"align was trained on llava \+ llama \+ clip_vision_model, this base is"
        ):
            load_stage(bases[kind], runs["llava"]["align"])


def test_adapter_on_another_base_of_its_shape_is_a_named_warning(
    runs: dict[str, dict[str, StageAdapter]], tmp_path: Path
) -> None:
    other = tiny.build(tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match=r"vqa was trained on tiny-llava .* this base is other"):
        load_stage(other, runs["llava"]["vqa"])


def test_a_wider_model_of_the_same_architecture_is_an_error(
    runs: dict[str, dict[str, StageAdapter]], tmp_path: Path
) -> None:
    other = tiny.build(tmp_path / "other", feature_layers=[-2, -1])
    with pytest.raises(AdapterError, match=r"tensors do not fit the base \(llava over llama\)"):
        load_stage(other, runs["llava"]["align"])


def test_damaged_folders_are_errors(runs: dict[str, dict[str, StageAdapter]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["llava"]["vqa"].path, tmp_path / "align"))
    config = folder / "adapter_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 80'), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: is missing or was changed"):
        StageAdapter.load(folder)
    config.write_text(text, encoding="utf-8")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="the folder is damaged or was changed"):
        StageAdapter.load(folder)
    (folder / "stage.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match="is not JSON"):
        StageAdapter.load(folder)
    (folder / "stage.json").unlink()
    with pytest.raises(AdapterError, match=r"has no stage\.json; wanted a folder that a finished stage left"):
        StageAdapter.load(folder)
