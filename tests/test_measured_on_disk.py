"""What a record says was measured, measured again on what is on the disk: every scope, stored dtype and NF4;
and merged checkpoints, stop tokens, cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cached import asked, run, schedule
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from llavamed_peft import Conversation, StageAdapter, load_stage
from llavamed_peft.cli.main import main
from llavamed_peft.errors import AdapterError, ConfigError
from llavamed_peft.evaluation.held_out import held_out_loss
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.running import run as running


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        Image.effect_noise((60, 50), 60 + number).convert("RGB").save(folder / f"{number}.png")
    answers = ["a heart", "no", "the left lung", "yes"]
    return [asked(str(n), str(folder / f"{n % 3}.png"), answer=answer) for n, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {
        str(dtype).removeprefix("torch."): tiny.build(folder / f"llava-{number}", dtype=dtype)
        for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
    }
    return made | {"chatml": tiny.build(folder / "chatml", "llava_onevision", "qwen2", "siglip", -1)}


def trained(
    base: Path, rows: list[Conversation], out: Path, trains: str = "lora", **how: Any
) -> StageAdapter:
    rate = schedule(epochs=2, learning_rate=1e-3 if trains == "lora" else 1e-4)
    return run(base, rows, out, {"vqa": trains}, eval_data={"vqa": rows}, schedule=rate, **how)["vqa"]


def on_disk(stage: StageAdapter, base: Path, rows: list[Conversation]) -> float:
    """The held-out loss of the folder, loaded and computed as its record says."""
    computing = stage.record.computing
    quantization = None if stage.is_checkpoint else computing["quantization"]
    dtype = getattr(torch, computing["dtype"])
    model, processor = load_stage(base, stage, quantization, dtype)
    return held_out_loss(model, processor, rows, dtype=dtype)


CASES = [
    ("float32", "projector", {}),
    ("float16", "lora", {"dtype": "float32"}),
    ("bfloat16", "lora", {"dtype": "bfloat16"}),
    ("float16", "lora", {"quantization": "nf4"}),
    ("bfloat16", "full", {"dtype": "float32"}),
    ("bfloat16", "full", {"dtype": "float32", "full_dtype": "stored"}),
    ("float16", "full", {"dtype": "float32", "full_dtype": "stored"}),
]


@pytest.mark.parametrize(("stored", "trains", "how"), CASES)
def test_the_loss_of_the_record_is_that_of_the_folder(
    stored: str,
    trains: str,
    how: dict[str, Any],
    bases: dict[str, Path],
    rows: list[Conversation],
    tmp_path: Path,
) -> None:
    stage = trained(bases[stored], rows, tmp_path / "run", trains, **how)
    bound = 2e-2 if how.get("dtype") == "bfloat16" else 1e-4
    assert on_disk(stage, bases[stored], rows) == pytest.approx(stage.metrics["eval_loss_after"], abs=bound)
    if trains == "full":
        kept = how.get("full_dtype") == "stored"
        tensors = load_file(stage.path / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {
            getattr(torch, stored) if kept else torch.float32
        }
        assert ("eval_loss_unrounded" in stage.metrics) == kept
        assert ("eval_loss_unrounded: " in (stage.path / "README.md").read_text(encoding="utf-8")) == kept


def test_a_full_stages_folder_is_the_trained_model_bit_for_bit(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: dict[str, torch.Tensor] = {}
    train = running.train_stage

    def watched(*given: Any, **how: Any) -> Any:
        trained = train(*given, **how)
        left.update(trained.tensors)
        return trained

    monkeypatch.setattr(running, "train_stage", watched)
    stage = trained(bases["bfloat16"], rows, tmp_path / "run", "full", dtype="float32")
    model, _ = load_checkpoint(stage.path)
    parameters = dict(model.named_parameters())
    assert left and all(torch.equal(parameters[name], tensor) for name, tensor in left.items())
    assert not all(torch.equal(tensor.bfloat16().float(), tensor) for tensor in left.values())


def test_the_next_stage_begins_where_a_full_one_ended(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    """Bit for bit, over a base of 16 bits; rounded to it, it would not."""
    for full_dtype in ("float32", "stored"):
        how: dict[str, Any] = {
            "dtype": "float32",
            "full_dtype": full_dtype,
            "eval_data": {"a": rows, "b": rows},
        }
        rate = schedule(epochs=2, learning_rate=1e-4)
        stages = run(
            bases["bfloat16"], rows, tmp_path / full_dtype, {"a": "full", "b": "lora"}, schedule=rate, **how
        )
        first, second = stages["a"].metrics, stages["b"].metrics
        assert second["eval_loss_before"] == pytest.approx(first["eval_loss_after"], abs=1e-5)
        if full_dtype == "stored":
            assert first["eval_loss_unrounded"] != first["eval_loss_after"]
    run_json = tmp_path / "stored" / "run.json"
    plain = json.loads(run_json.read_text(encoding="utf-8"))
    del plain["full_dtype"]  # as an earlier version left it
    run_json.write_text(json.dumps(plain), encoding="utf-8")
    again = {**how, "schedule": rate}
    run(bases["bfloat16"], rows, tmp_path / "stored", {"a": "full", "b": "lora"}, **again)
    again["full_dtype"] = "float32"
    with pytest.raises(ConfigError, match='full_dtype: "stored" there, "float32" now'):
        run(bases["bfloat16"], rows, tmp_path / "stored", {"a": "full", "b": "lora"}, **again)
    with pytest.raises(ConfigError, match="full_dtype is 'int8'; wanted 'float32' or 'stored'"):
        trained(bases["float32"], rows, tmp_path / "no", full_dtype="int8")


@pytest.fixture(scope="module")
def over_nf4(
    bases: dict[str, Path], rows: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> StageAdapter:
    return trained(bases["float16"], rows, tmp_path_factory.mktemp("nf4") / "run", quantization="nf4")


def logits(model: torch.nn.Module, processor: Any, rows: list[Conversation]) -> torch.Tensor:
    from llavamed_peft.packing import PackedCollator

    inputs = PackedCollator(processor, layout="padded")(rows)
    inputs.pop("labels")
    with torch.no_grad():
        return model(
            **{n: v.to(model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        ).logits


def test_merged_onto_dequantised_weights_it_is_the_trained_model(
    over_nf4: StageAdapter, bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    base = bases["float16"]
    wanted = logits(*load_stage(base, over_nf4, "nf4", "float32"), rows)
    merged = StageAdapter.load(over_nf4.merge(base, tmp_path / "merged", dtype="float32"))
    torch.testing.assert_close(logits(*load_stage(base, merged), rows), wanted, atol=2e-4, rtol=0)
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text(encoding="utf-8"))
    with pytest.warns(
        UserWarning, match=r"vqa was trained over NF4 weights, these are not: .* onto='dequantised'"
    ):
        over_nf4.merge(base, tmp_path / "original", dtype="float32", onto="original")
    other = logits(*load_stage(base, StageAdapter.load(tmp_path / "original")), rows)
    assert (other - wanted).abs().max() > 1e-2
    record = merged.record
    assert (
        record.merged is not None and record.merged.onto == "dequantised" and record.merged.dtype == "float32"
    )
    assert record.parent is not None and record.parent.sha256 == over_nf4.record.sha256
    assert record.base.name == base.name and record.data == over_nf4.record.data
    assert record.metrics["eval_loss_after"] is None, "nothing was measured on these weights"
    card = (merged.path / "README.md").read_text(encoding="utf-8")
    assert (
        "This is that stage, merged onto what the base's 4-bit weights stand for, written in float32." in card
    )
    assert "4-bit weights (NF4)" in card and "eval_loss" not in card
    with pytest.raises(ConfigError, match="onto is 'both'; wanted None, 'dequantised' or 'original'"):
        over_nf4.merge(base, tmp_path / "no", onto="both")


def test_a_stored_nf4_base_is_merged_dequantised_only(
    over_nf4: StageAdapter, bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    model, processor = load_checkpoint(bases["float16"], "nf4")
    model.save_pretrained(tmp_path / "nf4")
    processor.save_pretrained(tmp_path / "nf4")
    with pytest.warns(UserWarning, match="was trained on another base"):
        one = over_nf4.merge(tmp_path / "nf4", tmp_path / "merged")
    two = over_nf4.merge(bases["float16"], tmp_path / "two")
    tensors = load_file(two / "model.safetensors")
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(one / "model.safetensors").items())
    with pytest.raises(
        ConfigError, match=r"onto is 'original' and .* is stored in NF4; wanted 'dequantised'"
    ):
        over_nf4.merge(tmp_path / "nf4", tmp_path / "no", onto="original")


def test_a_stage_over_nf4_put_on_other_weights_warns(
    over_nf4: StageAdapter, bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="vqa was trained over NF4 weights, these are not"):
        load_stage(bases["float16"], over_nf4)
    with pytest.warns(UserWarning, match="vqa was trained over NF4 weights, these are not"):
        run(
            bases["float16"],
            rows,
            tmp_path / "run",
            {"more": "lora"},
            start_from=over_nf4,
            schedule=schedule(epochs=1),
        )


def test_merge_measures_before_and_after_rounding_where_data_are_given(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = trained(bases["float32"], rows, tmp_path / "run", "full")
    given = [
        {
            "id": row.id,
            "image": row.images[0],
            "conversations": [
                {"from": "human", "value": row.turns[0].text},
                {"from": "gpt", "value": row.turns[1].text},
            ],
        }
        for row in rows
    ]
    folder = Path(rows[0].images[0]).parent
    for one in given:
        one["image"] = Path(str(one["image"])).name
    (tmp_path / "data.json").write_text(json.dumps(given), encoding="utf-8")
    words = ["merge", bases["float32"], stage.path, tmp_path / "half", "--dtype", "bfloat16"]
    words += ["--eval_data", tmp_path / "data.json", "--image_folder", folder]
    assert main([str(word) for word in words]) == 0
    half = StageAdapter.load(tmp_path / "half")
    assert half.metrics["eval_loss_unrounded"] == pytest.approx(stage.metrics["eval_loss_after"], abs=1e-5)
    assert half.metrics["eval_loss_after"] != half.metrics["eval_loss_unrounded"]
    assert half.record.merged is not None and half.record.merged.onto is None
    assert {t.dtype for t in load_file(half.path / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(AdapterError, match="is a checkpoint already; nothing to merge"):
        stage.merge(bases["float32"], tmp_path / "no")


def test_stock_generation_stops_where_answers_ended_in_training(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    """The base's generation config says `</s>`; its template ends answers with `<|im_end|>`."""
    base = bases["chatml"]
    assert GenerationConfig.from_pretrained(base).eos_token_id == 2
    stop = load_checkpoint(base)[1].tokenizer.convert_tokens_to_ids("<|im_end|>")
    lora, full = (trained(base, rows, tmp_path / kind, kind) for kind in ("lora", "full"))
    merged = lora.merge(base, tmp_path / "merged")
    for folder in (full.path, merged):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == sorted([2, stop])
    model, processor = load_stage(base, lora)
    assert model.get_base_model().generation_config.eos_token_id == sorted([2, stop])
    assert lora.record.stop_tokens == {"<|im_end|>": stop}
    card = (lora.path / "README.md").read_text(encoding="utf-8")
    assert (
        f"An answer ends in `<|im_end|>` (id {stop})." in card
        and f"pass `eos_token_id=[{stop}]` to `generate`" in card
    )
    # a model that would say the stop token for ever is stopped by it
    head = AutoModelForImageTextToText.from_pretrained(merged)
    head.lm_head.register_forward_hook(
        lambda module, inputs, out: out.index_fill(-1, torch.tensor([stop]), 1e4)
    )
    asked_ids = processor.tokenizer("what?", return_tensors="pt")["input_ids"]
    assert head.generate(input_ids=asked_ids, max_new_tokens=9).shape[1] == asked_ids.shape[1] + 1
    plain = trained(bases["float32"], rows, tmp_path / "plain", "full")
    assert GenerationConfig.from_pretrained(plain.path).eos_token_id == 2, "as the base has it"


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_cards_lines_give_the_trained_model(
    quantization: str | None,
    bases: dict[str, Path],
    rows: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a base stored in fp16, computed in bf16: under autocast what `load_stage` gives."""
    base = bases["float16"]
    stage = trained(base, rows, tmp_path / "run", dtype="bfloat16", quantization=quantization)
    card = (stage.path / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "torch.bfloat16" in code and ("load_in_4bit=True" in code) == bool(quantization)
    names: dict[str, Any] = {}
    exec(code.replace(f'"{base.name}"', repr(str(base))).replace('"vqa"', repr(str(stage.path))), names)
    if quantization:  # the guard of load_stage, which stock code lacks
        for module in names["base"].modules():
            module.support_avx512bf16_for_cpu = False
    with torch.autocast("cpu", torch.bfloat16):
        one = logits(names["model"].eval(), names["processor"], rows)
        two = logits(*load_stage(base, stage, quantization, "bfloat16"), rows)
    torch.testing.assert_close(one.float(), two.float(), atol=0.05 if quantization else 0, rtol=0)


def test_a_stages_processor_pads_on_the_left(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    """Whatever the base's says; stock generation in batches answers wrongly after padding on the right."""
    tokenizer = AutoProcessor.from_pretrained(bases["float32"]).tokenizer
    assert tokenizer.padding_side == "right"
    stage = trained(bases["float32"], rows, tmp_path / "run", "projector")
    assert AutoProcessor.from_pretrained(stage.path).tokenizer.padding_side == "left"
