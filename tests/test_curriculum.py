"""The contracts of a run: what a stage leaves is what was in memory, for stock PEFT too, and stages follow on
exactly.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import AutoPeftModel, PeftModel
from PIL import Image
from three_stages import KINDS, LORA, ROOT, THREE, bases, conversations, images, logits, runs, schedule
from transformers import AutoModelForImageTextToText

from llavamed_peft import (
    Conversation,
    Curriculum,
    Question,
    Stage,
    StageAdapter,
    curriculum_finetune,
    load_stage,
)
from llavamed_peft.adapters.stage_adapter import adapter_folder
from llavamed_peft.errors import AdapterError
from llavamed_peft.evaluation.answer import answer_questions
from llavamed_peft.packing import PackedCollator
from llavamed_peft.reporting.run_log import progress_line
from llavamed_peft.running.summary import read_metrics
from llavamed_peft.storage.whole import write_folder


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
def test_projector_stage_after_lora_carries_it_frozen(
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


def test_auto_peft_model_finds_the_base_from_the_folder(
    bases: dict[str, Path], runs: dict[str, dict[str, StageAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases["llava"].parent)  # the base goes by its name alone
    model = AutoPeftModel.from_pretrained(runs["llava"]["vqa"].path)
    assert type(model.get_base_model()).__name__ == "LlavaForConditionalGeneration"


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
    with pytest.warns(UserWarning, match=r"vqa was trained on another base: other .* is not tiny-llava"):
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
