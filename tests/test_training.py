"""The step: one mean over the step's supervised tokens however it is cut, exactly the scope's parameters, two
learning rates."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import skip_first_batches
from PIL import Image
from staged import prepared, stage_trainer
from transformers import Trainer

from llavamed_peft import Conversation, LoraSpec, Schedule, Stage, Turn
from llavamed_peft.batches.decoding import DeviceBatches, DeviceInputs
from llavamed_peft.errors import TrainingError
from llavamed_peft.modeling.parts import bare, language_linears
from llavamed_peft.modeling.scopes import check_trainable
from llavamed_peft.modeling.tensors import set_dtypes, trainable_tensors
from llavamed_peft.modeling.tower import freeze_tower
from llavamed_peft.packing import PackedCollator
from llavamed_peft.packing.masks import DENSE_FILL
from llavamed_peft.training.checkpointing import order_of
from llavamed_peft.training.trainer import StageTrainer

LORA = LoraSpec(rank=4, alpha=8, dropout=0.0)
KINDS = {"llava": (), "vipllava": (), "llava_next": ("mistral",), "llava_onevision": ("qwen2", "siglip", -1)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for i in range(5):
        Image.new("RGB", (40 + 20 * i, 60), (50 * i, 90, 20)).save(folder / f"{i}.png")
        turns = (Turn("user", "<image>\nwhat is this?"), Turn("assistant", "a heart " * (i + 1)))
        rows.append(Conversation(str(i), turns, (str(folder / f"{i}.png"),)))
    return [
        *rows,
        Conversation("text", (Turn("user", "what is a lung?"), Turn("assistant", "an organ of breath"))),
    ]


def stage_of(trains: str, **schedule: object) -> Stage:
    how = {"epochs": 1, "learning_rate": 1e-3, "global_batch": 6, **schedule}
    return Stage("s", trains, Schedule(**how), LORA if trains == "lora" else None)


def trainer(
    base: Path,
    conversations: list[Conversation],
    folder: Path,
    trains: str = "lora",
    max_row_tokens: int = 4096,
    layout: str = "packed",
    fill: int | None = DENSE_FILL,
    **schedule: object,
) -> StageTrainer:
    stage = stage_of(trains, **schedule)
    made = stage_trainer(
        base, conversations, folder, stage, layout=layout, max_row_tokens=max_row_tokens, fill_tokens=fill
    )
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1
    return made


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_row_tokens", [1, 150, 4096])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_steps_gradient_is_the_plain_means_however_it_is_cut(
    kind: str,
    max_row_tokens: int,
    layout: str,
    bases: dict[str, Path],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    stage = trainer(bases[kind], conversations, tmp_path, max_row_tokens=max_row_tokens, layout=layout)
    (inputs,) = list(stage.get_train_dataloader())
    assert len(inputs) > 1 or max_row_tokens == 4096
    scored: list[int] = []
    head = bare(stage.model).lm_head.register_forward_hook(
        lambda head, given, logits: scored.append(logits[..., 0].numel())
    )
    loss = stage.training_step(stage.model, inputs)
    head.remove()
    assert scored == [batch.supervised_tokens for batch in inputs], "no other position has logits"
    cut = gradients(stage.model)
    stage.model.zero_grad()
    plain = stage.model(**PackedCollator(stage.processing_class, layout="padded")(conversations)).loss
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    whole = gradients(stage.model)
    assert set(cut) == set(whole) == {name for name, p in stage.model.named_parameters() if p.requires_grad}
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("fill", [None, DENSE_FILL])
@pytest.mark.parametrize("max_row_tokens", [60, 100, 400, 4096])
def test_a_packed_device_batch_is_no_larger_than_its_bound(
    max_row_tokens: int,
    fill: int | None,
    copied: bool,
    bases: dict[str, Path],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    """Ten questions about each of two images and some text: planned from the index, laid out from the tokens.

    Copied, each question has a file of its own: equal images are one, whatever their paths.
    """
    shown = [conversations[0].images, conversations[1].images] * 10
    if copied:
        shown = [(shutil.copy(image, tmp_path / f"{i}.png"),) for i, (image,) in enumerate(shown)]
    asked = [
        Conversation(
            f"{i}",
            (
                Turn("user", f"<image>\nwhat is in the {'left ' * (i // 2)}lung ?"),
                Turn("assistant", "a heart"),
            ),
            images,
        )
        for i, images in enumerate(shown)
    ] + conversations[5:]
    stage = trainer(
        bases["llava"], asked, tmp_path, max_row_tokens=max_row_tokens, fill=fill, global_batch=21
    )
    (step,) = stage.get_train_dataloader()
    assert sum(batch.conversations for batch in step) == 21
    for batch in step:
        rows, tokens = batch.inputs["ends"].shape
        assert rows == 1 if fill is None else rows * tokens <= fill or rows == 1
        assert rows * tokens <= max_row_tokens or batch.conversations == 1
        assert "attention_mask" not in batch.inputs
    decoded = sum(len(batch.inputs.get("pixel_values", ())) for batch in step)
    assert decoded == 2 or max_row_tokens < 400, (
        "an image is repeated only where its questions do not fit a row"
    )


def test_a_trainer_without_what_is_taken_over_is_refused(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(
        TrainingError,
        match=r"trl 1\.\d+\.\d+ has no _run_epoch, so .*; wanted transformers 5\.23 and trl 1\.16",
    ):
        trainer(bases["llava"], conversations, tmp_path)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_can_be_entered_in_its_middle_as_the_trainer_does_it(
    epoch: int, bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def texts(steps: Iterable[list[DeviceInputs]]) -> list[list[list[int]]]:
        return [[row for batch in step for row in batch.inputs["input_ids"].tolist()] for step in steps]

    loader = trainer(bases["llava"], conversations, tmp_path, global_batch=2).get_train_dataloader()
    loader.set_epoch(epoch)
    whole = texts(loader)
    loader.set_epoch(7)
    entered = skip_first_batches(loader, 1)
    # Where the trainer looks for it in a loader that skips
    entered.batch_sampler.batch_sampler.set_epoch(epoch)
    assert len(whole) == 3 and texts(entered) == whole[1:]


def test_a_checkpoints_order_is_of_the_rows_and_images_wherever_they_lie(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def made(name: str, given: list[Conversation]) -> StageTrainer:
        (tmp_path / name).mkdir(exist_ok=True)
        return trainer(bases["llava"], given, tmp_path / name)

    def order(made: StageTrainer) -> str:
        return order_of(made.train_steps.index)

    def asked(first: str, second: str) -> Conversation:
        turns = (Turn("user", first), Turn("assistant", "yes"), Turn("user", second), Turn("assistant", "no"))
        return Conversation("two", turns, conversations[0].images + conversations[1].images)

    (tmp_path / "moved").mkdir()
    moved = [
        replace(c, images=tuple(shutil.copy(image, tmp_path / "moved") for image in c.images))
        for c in conversations
    ]
    here = order(made("here", conversations))
    assert order(made("moved", moved)) == here
    Image.effect_noise((60, 60), 50).convert("RGB").save(moved[2].images[0])
    assert order(made("other", moved)) != here, "another image of the same size in tokens"
    both_first = made("both", [asked("<image> <image> what ?", "why ?")])
    one_later = made("one", [asked("<image> what ?", "<image> why ?")])
    assert both_first.train_steps.index.column("length") == one_later.train_steps.index.column("length")
    assert order(both_first) != order(one_later)


@pytest.mark.parametrize("trains", ["projector", "lora", "full"])
@pytest.mark.parametrize("rows", [(), (5,)])
def test_a_batch_without_images_or_rows_gives_the_projector_a_zero_gradient(
    trains: str,
    rows: tuple[int, ...],
    bases: dict[str, Path],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    stage = trainer(bases["llava"], conversations, tmp_path, trains)
    batch = DeviceBatches(stage.train_steps.index, stage.train_steps.collator)[rows]
    assert batch.conversations == len(rows) and "pixel_values" not in batch.inputs
    stage._summed_loss(stage.model, batch).backward()
    found = gradients(stage.model)
    assert set(found) == {name for name, p in stage.model.named_parameters() if p.requires_grad}
    projector = [grad for name, grad in found.items() if "multi_modal_projector" in name]
    assert projector and all((grad == 0).all() for grad in projector)
    if not rows:
        assert all((grad == 0).all() for grad in found.values())


@pytest.mark.parametrize("trains", ["projector", "full"])
def test_a_step_whose_images_all_fail_moves_no_weight(
    trains: str, bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    """AdamW's momentum of the steps before it and its decay would."""
    stage = trainer(bases["llava"], conversations, tmp_path, trains)
    batches = DeviceBatches(stage.train_steps.index, stage.train_steps.collator)
    stage.args.weight_decay = 0.1
    optimizer = stage.create_optimizer()
    stage.model.zero_grad()
    stage.training_step(stage.model, [batches[(0, 1)]])
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in stage.model.parameters()]
    stage.training_step(stage.model, [batches[()]])
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, stage.model.parameters(), strict=True))
    stage.training_step(stage.model, [batches[(0, 1)]])
    optimizer.step()
    assert not all(torch.equal(old, new) for old, new in zip(before, stage.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", ["projector", "lora", "full"])
def test_exactly_the_scope_trains(kind: str, trains: str, bases: dict[str, Path]) -> None:
    model, _ = prepared(bases[kind], stage_of(trains))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name or "image_newline" in name for name in trained)
    assert any("multi_modal_projector" in name for name in trained)
    linears = language_linears(bare(model))
    if trains == "lora":
        adapted = {
            name.split(".lora_A")[0].removeprefix("base_model.model.")
            for name in trained
            if ".lora_A" in name
        }
        assert adapted == {name.removesuffix(".base_layer") for name in linears if ".lora_" not in name}
        assert len(adapted) == 14 and not any("lm_head" in name for name in trained)
    if trains == "full":
        assert "lm_head.weight" in trained and {f"{name}.weight" for name in linears} <= trained


def test_a_parameter_too_many_or_too_few_stops_the_stage(bases: dict[str, Path]) -> None:
    model, _ = prepared(bases["llava"], stage_of("projector"))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    tower = next(p for name, p in model.named_parameters() if "vision_tower" in name)
    tower.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"1 parameter\(s\) would train that should not \(.*vision_tower"):
        check_trainable(model, wanted)
    tower.requires_grad_(False)
    next(p for name, p in model.named_parameters() if name in wanted).requires_grad_(False)
    with pytest.raises(TrainingError, match=r"1 would not that should \(.*multi_modal_projector"):
        check_trainable(model, wanted)


@pytest.mark.parametrize("trains", ["projector", "lora", "full"])
def test_tower_runs_without_a_graph_and_in_eval_mode_even_when_checkpointing(
    trains: str, bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    model, processor = prepared(bases["llava"], stage_of(trains))
    freeze_tower(model)
    model.train()
    bare(model).gradient_checkpointing_enable({"use_reentrant": False})
    bare(model).enable_input_require_grads()
    tower = bare(model).model.vision_tower
    assert not any(module.training for module in tower.modules())
    seen: list[torch.Tensor] = []
    tower.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    model(**PackedCollator(processor)(conversations)).loss.backward()
    assert seen and not any(tensor.requires_grad for tensor in seen)
    assert all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("trains", ["projector", "lora"])
def test_trainables_are_fp32_and_the_rest_has_the_compute_dtype(
    trains: str, quantization: str | None, tmp_path: Path
) -> None:
    model, _ = prepared(tiny.build(tmp_path / "base", dtype=torch.bfloat16), stage_of(trains), quantization)
    set_dtypes(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted or parameter.dtype == torch.uint8, name
    assert {tensor.dtype for tensor in trainable_tensors(model).values()} == {torch.float32}


def test_two_learning_rates_and_decay_are_in_the_optimizers_groups(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    stage = trainer(
        bases["llava"],
        conversations,
        tmp_path,
        "full",
        learning_rate=1e-3,
        projector_learning_rate=1e-5,
        weight_decay=0.1,
    )
    groups = {(group["name"], group["weight_decay"]): group for group in stage.optimizer.param_groups}
    assert set(groups) == {(part, decay) for part in ("projector", "language_model") for decay in (0.0, 0.1)}
    assert {group["lr"] for (part, _), group in groups.items() if part == "projector"} == {1e-5}
    assert {group["lr"] for (part, _), group in groups.items() if part == "language_model"} == {1e-3}
    counted = sum(len(group["params"]) for group in groups.values())
    assert counted == sum(p.requires_grad for p in stage.model.parameters())


def test_dummy_target_string_still_means_modules_to_save_only(bases: dict[str, Path]) -> None:
    model, _ = prepared(bases["llava"], stage_of("projector"))
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert len(trainable_tensors(model)) == 4
