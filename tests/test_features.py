"""The feature cache: stored features train as the images themselves do, however filling them was disturbed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from staged import stage_trainer
from torch.utils.data import get_worker_info

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kills

from llavamed_peft import (
    Conversation,
    Curriculum,
    LoraSpec,
    Schedule,
    Stage,
    StageAdapter,
    Turn,
    curriculum_finetune,
)
from llavamed_peft.batches.decoding import DeviceBatches
from llavamed_peft.errors import ConfigError, DataError, TrainingError
from llavamed_peft.features import filling, store
from llavamed_peft.features import forecast as forecasting
from llavamed_peft.features.filling import fingerprint
from llavamed_peft.features.forecast import Forecast, decide
from llavamed_peft.features.store import Features, read_plans
from llavamed_peft.modeling.tower import tower_layers
from llavamed_peft.packing import PackedCollator
from llavamed_peft.reporting.run_log import RunLog
from llavamed_peft.storage.images import load_image
from llavamed_peft.training.computing import Computing
from llavamed_peft.training.stage import stored_features
from llavamed_peft.training.trainer import StageTrainer

KINDS = {
    "llava": (),
    "vipllava": ("llama", "clip", [-2, 1]),
    "llava_next": ("mistral",),
    "llava_onevision": ("qwen2", "siglip", -1),
}
ALL = {"align": "projector", "more": "full", "vqa": "lora"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Seven of several shapes, the last one's content that of the first."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        shape = (50 + 30 * (number % 3), 40 + 25 * (number % 4))
        Image.effect_noise(shape, 40 + 20 * number).convert("RGB").save(path)
    paths[6].write_bytes(paths[0].read_bytes())
    return [str(path) for path in paths]


def asked(name: str, *images: str, answer: str = "a heart") -> Conversation:
    return Conversation(
        name, (Turn("user", "<image>" * len(images) + "\nwhat is it?"), Turn("assistant", answer)), images
    )


def conversations(images: list[str]) -> list[Conversation]:
    """About one image, several, and none; each image once, one of equal content apart."""
    return [
        asked("one", images[0]),
        asked("two", images[1], images[2], answer="a lung and a heart"),
        asked("text"),
        asked("three", images[3], answer="no"),
        asked("four", images[4], images[5]),
    ]


def cut(path: str) -> str:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    return path


def trainer(
    base: Path,
    rows: list[Conversation],
    folder: Path,
    layout: str = "packed",
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> StageTrainer:
    """Of a LoRA stage of three epochs, as `train_stage` has it before it trains."""
    schedule = Schedule(epochs=3, learning_rate=1e-3, global_batch=4)
    stage = Stage("vqa", "lora", schedule, LoraSpec(rank=4, alpha=8, dropout=0.0))
    return stage_trainer(base, rows, folder, stage, layout=layout, dtype=dtype, workers=workers)


def collator_of(made: StageTrainer) -> PackedCollator:
    return made.train_steps.collator


def stored(
    made: StageTrainer, folder: Path, asked_for: bool | str = True, dtype: torch.dtype = torch.float32
) -> Features | None:
    computing = Computing(dtype, "packed", 4096, False, feature_cache=asked_for)
    return stored_features(made, computing, folder / "features", RunLog(folder))


def tensors_of(found: Features) -> dict[str, torch.Tensor]:
    names = sorted(set(found.files.values()))
    return {key: tensor for name in names for key, tensor in load_file(found.folder / name).items()}


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach(), **gradients}


# Cached and fresh


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_same_tower_batch_cached_is_fresh_to_the_bit(
    kind: str, layout: str, bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    rows = conversations(images)
    made = trainer(bases[kind], rows, tmp_path / "run", layout)
    fresh = collator_of(made).inputs(rows)
    expected = loss_and_gradients(made.model, collator_of(made)(rows))
    collator_of(made).features = stored(made, tmp_path)
    assert len(collator_of(made).features) == 6
    for image in images:
        os.remove(image)  # nothing is decoded from now on
    cached = collator_of(made).inputs(rows)
    assert cached.keys() == fresh.keys() | {"tower_features"} and cached["pixel_values"].numel() == 0
    for name in fresh.keys() - {"pixel_values", "batch_num_images"}:
        assert torch.equal(cached[name], fresh[name]), name
    vision = made.model.config.vision_config
    assert cached["tower_features"].shape[-2:] == (len(tower_layers(made.model)), vision.hidden_size)
    pixels = fresh["pixel_values"].flatten(0, -4)  # [tiles, 3, height, width], perhaps with tiles of padding
    assert len(cached["tower_features"]) == int(pixels.flatten(1).any(1).sum())
    found = loss_and_gradients(made.model, collator_of(made)(rows))
    assert len(found) > 8 and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    words = collator_of(made)([rows[2]])  # a blank image's turn
    assert (
        torch.isfinite(made.model(**words).loss)
        and torch.isfinite(made.model(**collator_of(made)([])).logits).all()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_tower_batches_features_are_within_one_unit_of_the_last_place(
    kind: str,
    dtype: torch.dtype,
    bases: dict[str, Path],
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for tiles in (32, 1):
        monkeypatch.setattr(store, "_TILES_PER_BATCH", tiles)
        made = trainer(bases[kind], conversations(images), tmp_path / str(tiles), dtype=dtype)
        found.append(tensors_of(stored(made, tmp_path / str(tiles), dtype=dtype)))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert tensor.dtype == dtype
        other = found[1][
            key
        ]  # the same or its neighbour; near zero, where last places are small, one of those at 1
        assert ((tensor.nextafter(other) == other) | ((tensor - other).abs() <= torch.finfo(dtype).eps)).all()


def test_a_worker_lays_features_down_in_shared_memory(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    class Shares(DeviceBatches):
        def __getitem__(self, rows: object) -> object:
            inputs = super().__getitem__(rows)
            assert get_worker_info() is not None and inputs.inputs["tower_features"].is_shared()
            return inputs

    for kind in ("llava", "llava_next"):
        made = trainer(bases[kind], conversations(images), tmp_path / kind, workers=1)
        collator_of(made).features = stored(made, tmp_path / kind)
        loader = made.train_steps.loader()
        loader.dataset.__class__ = Shares
        assert sum(batch.conversations for step in loader for batch in step) == 5


def test_what_is_stored_is_asked_for_by_content_tower_layers_processor_and_dtype(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    made = trainer(bases["llava"], [asked("a", images[0]), asked("b", images[6])], tmp_path / "run")
    assert len(stored(made, tmp_path)) == 1, "equal files are one"
    encoder = collator_of(made).encoder
    known = {
        fingerprint(made.model, encoder, torch.float32),
        fingerprint(made.model, encoder, torch.bfloat16),
    }
    made.model.config.vision_feature_layer = -1
    known.add(fingerprint(made.model, encoder, torch.float32))
    encoder.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    known.add(fingerprint(made.model, encoder, torch.float32))
    next(made.model.get_base_model().model.vision_tower.parameters()).data[0] += 1
    assert len({*known, fingerprint(made.model, encoder, torch.float32)}) == 5


def test_an_image_fixed_since_is_left_out_until_the_next_call(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    whole = Path(images[1]).read_bytes()
    made = trainer(bases["llava"], [asked("a", images[0]), asked("b", cut(images[1]))], tmp_path / "run")
    collator_of(made).features = stored(made, tmp_path)
    with pytest.raises(DataError, match=r"1\.png: cannot be decoded"):
        collator_of(made)([asked("b", images[1])])
    Path(images[1]).write_bytes(whole)
    with pytest.raises(
        DataError,
        match=r"1\.png: could not be decoded when the stage's features were stored, and can be now; it",
    ):
        collator_of(made)([asked("b", images[1])])
    collator_of(made).features = stored(made, tmp_path)
    assert len(collator_of(made).features) == 2 and len(read_plans(collator_of(made).features.folder)) == 2
    assert collator_of(made)([asked("b", images[1])])["tower_features"].shape == (1, tiny.GRID + 1, 1, 64)


# Whole runs


def schedule(**changes: object) -> Schedule:
    return Schedule(**{"epochs": 3, "learning_rate": 1e-3, "global_batch": 3, **changes})


def run(
    base: Path, rows: list[Conversation], out: Path, trains: dict[str, str] | None = None, **how: object
) -> dict[str, StageAdapter]:
    lora = LoraSpec(rank=4, alpha=8, dropout=0.1)
    stages = [
        Stage(name, scope, how.pop("schedule", schedule()), lora if scope == "lora" else None)
        for name, scope in (trains or {"vqa": "lora"}).items()
    ]
    data = {stage.name: rows for stage in stages}
    return curriculum_finetune(base, data, out, curriculum=Curriculum(tuple(stages)), **how)


def agree(one: StageAdapter, other: StageAdapter, bound: float) -> None:
    (weights,) = (path.name for path in one.path.glob("*.safetensors"))
    tensors = load_file(other.path / weights)
    for name, tensor in load_file(one.path / weights).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=bound)


CASES = [
    ("llava", ALL, {"eval": True}),
    ("llava", {"vqa": "lora"}, {"layout": "padded", "workers": 1}),
    ("llava", {"vqa": "lora"}, {"quantization": "nf4"}),
    ("llava_next", {"vqa": "lora"}, {"workers": 1}),
    ("llava_onevision", {"vqa": "projector"}, {"layout": "padded"}),
]


@pytest.mark.parametrize(("kind", "trains", "how"), CASES)
def test_a_run_with_the_cache_learns_what_one_without_it_does(
    kind: str,
    trains: dict[str, str],
    how: dict[str, object],
    bases: dict[str, Path],
    images: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = conversations(images)
    if how.pop("eval", False):
        how["eval_data"] = {"vqa": [asked("held out", images[0])]}
    cached, fresh = (
        run(bases[kind], rows, tmp_path / str(on), trains, feature_cache=on, **how) for on in (True, False)
    )
    said = capsys.readouterr().err
    for position, (stage, adapter) in enumerate(cached.items()):
        agree(fresh[stage], adapter, 2e-5)
        assert [one.record["computing"]["feature_cache"] for one in (adapter, fresh[stage])] == [True, False]
        assert [one.metrics["cached_images"] for one in (adapter, fresh[stage])] == [6, 0]
        assert adapter.metrics["loss_last"] == pytest.approx(fresh[stage].metrics["loss_last"], abs=1e-5)
        new = (
            6 if position == 0 else 0
        )  # the full stage's checkpoint has the tower that the stages before it saw
        assert (
            f"{stage:<10} feature cache on: 6 images, " in said
            and f"; {new} images pass the vision tower instead of " in said
        )
    assert said.count("images stored") == 1
    assert not (tmp_path / "True" / "features").exists(), "of a finished run"


def test_an_undecodable_image_is_counted_once_as_without_the_cache(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    rows = [*conversations(images), asked("cut", cut(images[6])), asked("with it", images[0], images[6])]
    records, rejected = [], []
    for on in (True, False):
        adapter = run(bases["llava"], rows, tmp_path / str(on), feature_cache=on, max_rejected=0.5)["vqa"]
        records.append(adapter.record["data"])
        rejected.append((tmp_path / str(on) / "rejected.jsonl").read_text())
    assert records[0] == records[1] and (records[0][0]["used"], records[0][0]["failed"]) == (5, 2)
    assert rejected[0] == rejected[1] and rejected[0].count("6.png: cannot be decoded") == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_while_features_are_stored_are_no_gaps(
    workers: int, bases: dict[str, Path], images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(bases["llava"], conversations(images), tmp_path / "whole", feature_cache=True)
    folder, away, seen = Path(images[0]).parent, tmp_path / "away", []

    def vanish(path: str) -> Image.Image:
        picture = load_image(path)
        seen.append(path)
        if len(seen) == 2:
            folder.rename(away)
        return picture

    monkeypatch.setattr(store, "load_image", vanish)
    with pytest.raises(
        TrainingError,
        match=r"^\S+\.png: no such file; wanted an image\. It could be read when the feature cache",
    ):
        run(bases["llava"], conversations(images), tmp_path / "run", feature_cache=True, workers=workers)
    monkeypatch.undo()
    away.rename(folder)
    adapter = run(
        bases["llava"], conversations(images), tmp_path / "run", feature_cache=True, workers=workers
    )["vqa"]
    assert adapter.record["data"][0]["failed"] == 0
    agree(StageAdapter.load(tmp_path / "whole" / "vqa"), adapter, 1e-6)


def test_a_worker_that_dies_while_filling_names_its_row(
    bases: dict[str, Path], images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(path: str) -> Image.Image:
        if path == images[3]:
            os._exit(1)
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(store, "load_image", deadly)
    with pytest.raises(TrainingError) as died:
        run(bases["llava"], conversations(images), tmp_path / "run", feature_cache=True, workers=1)
    assert f"died at in memory:4 (id three), image {images[3]}, for the feature cache" in str(died.value)


# Whether it pays


def test_the_forecast_decides_where_nobody_did(tmp_path: Path) -> None:
    small = Forecast(
        images=4000, uncomputed=4000, passes=36_000, stored=0, missing=4_800_000_000, free=96 * 10**9
    )
    assert decide(small, "auto", "vqa", tmp_path) == (
        True,
        "vqa        feature cache on: 4,000 images, 4.8 GB on disk, 4.8 GB of them to be added (96.0 GB "
        "free); 4,000 images pass the vision tower instead of 36,000",
    )
    once = Forecast(500_000, 500_000, 500_000, 0, 600 * 10**9, 10**13)
    on, line = decide(once, "auto", "align", tmp_path)
    assert (
        not on
        and line.startswith("align      feature cache off: 500,000 images, 600.0 GB")
        and line.endswith("; too few to pay")
    )
    often = Forecast(500_000, 500_000, 1_500_000, 0, 600 * 10**9, 10**13)
    on, line = decide(often, "auto", "align", tmp_path)
    assert not on and line.endswith("instead of 1,500,000; more than the 50.0 GB that may be added")
    filled = Forecast(4000, 0, 4000, 4_800_000_000, 0, 10**6)
    assert decide(filled, "auto", "vqa", tmp_path)[0], "what is there costs nothing"
    assert decide(Forecast(10, 10, 10, 0, 100, 10**9), True, "vqa", tmp_path)[0]
    with pytest.raises(TrainingError) as refused:
        decide(Forecast(10, 10, 1000, 0, 600_000, 10**6), True, "vqa", tmp_path)
    assert "the features of stage 'vqa' do not fit into " in str(refused.value) and "(1.0 MB free)" in str(
        refused.value
    )
    assert (
        "Wanted at most 500.0 kB to be added: 50.0 GB in all and half of the free disk. Make room, "
        in str(refused.value)
    )


def test_by_default_it_is_used_where_the_tower_would_see_images_twice(
    bases: dict[str, Path],
    images: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        asked(str(number), images[number % 6], answer="a heart " * (1 + number // 6)) for number in range(12)
    ]
    size = 6 * (tiny.GRID + 1) * 64 * 4

    def lines(name: str, epochs: float, **how: object) -> list[str]:
        run(bases["llava"], rows, tmp_path / name, schedule=schedule(epochs=epochs, global_batch=4), **how)
        return [line for line in capsys.readouterr().err.splitlines() if "feature cache o" in line]

    assert lines("once", 1)[0].endswith("; 6 images pass the vision tower instead of 6; too few to pay"), (
        "images are drawn whole"
    )
    (padded,) = lines("padded", 1, layout="padded")
    assert padded.startswith(f"vqa        feature cache on: 6 images, {size / 1e3:.1f} kB on disk, ")
    assert padded.endswith("; 6 images pass the vision tower instead of 12")
    assert (
        lines("twice", 2, layout="packed")[0].endswith("instead of 12")
        and lines("never", 2, feature_cache=False) == []
    )
    held_out = {"vqa": [asked("held out", images[0])]}  # measured before, behind each of 3 steps
    assert (
        "; 6 images pass the vision tower instead of 10; too"
        in lines("eval", 1, eval_data=held_out, eval_steps=1)[0]
    )
    monkeypatch.setattr(forecasting, "MAX_BYTES", size - 1)
    assert lines("full", 3)[0].endswith(
        f"instead of 18; more than the {(size - 1) / 1e3:.1f} kB that may be added"
    )
    with pytest.raises(
        TrainingError, match="feature_cache is True, and the features of stage 'vqa' do not fit into "
    ):
        lines("refused", 3, feature_cache=True)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_files_are_forecast_once(
    kind: str,
    bases: dict[str, Path],
    images: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where an export has a copy of the image for each question, and a later stage's export copies of its own."""

    def copies(name: str) -> list[Conversation]:
        paths = [Path(images[number % 3]).with_name(f"{name} {number}.png") for number in range(15)]
        for number, path in enumerate(paths):
            path.write_bytes(Path(images[number % 3]).read_bytes())
        return [asked(path.name, str(path)) for path in paths]

    def lines() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if "feature cache" in line]

    made = trainer(bases[kind], copies("one"), tmp_path / "one")
    found = stored(made, tmp_path)
    written = sum(tensor.nbytes for tensor in tensors_of(found).values())
    size = f"{written / 1e3:.1f} kB"
    forecast, filled = lines()
    assert f"feature cache on: 3 images, {size} on disk, {size} of them to be added " in forecast
    assert "; 3 images pass the vision tower instead of " in forecast and "3 of 3 images stored" in filled
    files = sum(path.stat().st_size for path in found.folder.glob("*.safetensors"))
    monkeypatch.setattr(forecasting, "MAX_BYTES", files)
    later = trainer(bases[kind], copies("two"), tmp_path / "two")
    os.remove(images[1].replace("1.png", "two 1.png"))  # training will meet it
    for again in (made, later):
        stored(again, tmp_path)
        (line,) = lines()
        assert "feature cache on: 3 images, " in line and ", 0.0 kB of them to be added " in line
        assert "; 0 images pass the vision tower instead of " in line


def test_a_stage_without_images_has_no_cache(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run(bases["llava"], [asked("0"), asked("1")], tmp_path / "run", feature_cache=True)["vqa"]
    assert adapter.metrics["cached_images"] == 0 and "feature cache" not in capsys.readouterr().err


def test_tiles_are_estimated_before_and_counted_before_filling(
    bases: dict[str, Path], images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(bases["llava_next"], conversations(images), tmp_path / "run")
    whole = stored(made, tmp_path)
    written = sum(tensor.nbytes for tensor in tensors_of(whole).values())
    assert written == sum(len(tensor) for tensor in tensors_of(whole).values()) * (tiny.GRID + 1) * 64 * 4
    assert {len(tensor) for tensor in tensors_of(whole).values()} == {3, 5}
    monkeypatch.setattr(forecasting, "MAX_BYTES", written - 1)
    monkeypatch.setattr(filling, "_HEADERS_READ", 1)  # of 3 tiles, as fewest have
    (tmp_path / "other").mkdir()
    with pytest.raises(TrainingError, match="do not fit"):
        stored(made, tmp_path / "other")
    assert stored(made, tmp_path / "other", "auto") is None
    assert [path.suffix for path in (tmp_path / "other").rglob("*.*")] == [".json"], (
        "the estimate fitted, the count did not"
    )


@pytest.mark.parametrize("wrong", ["on", 1, None])
def test_other_values_are_refused(
    wrong: object, bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"feature_cache is {wrong!r}; wanted 'auto', True or False\."):
        run(bases["llava"], conversations(images), tmp_path / "run", feature_cache=wrong)


def test_asked_for_with_a_sharded_model_it_is_refused(
    bases: dict[str, Path], images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(
        ConfigError,
        match=r"feature_cache is True and the launch configuration shards \(fsdp2\); wanted 'auto' or",
    ):
        run(bases["llava"], conversations(images), tmp_path / "run", feature_cache=True)


# Disturbed


def test_a_damaged_file_is_dropped_and_its_images_come_out_as_before(
    bases: dict[str, Path],
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(store, "IMAGES_PER_FILE", 2)
    made = trainer(bases["llava"], conversations(images), tmp_path / "run")
    first = stored(made, tmp_path)
    expected = {key: tensor.clone() for key, tensor in tensors_of(first).items()}
    one, other, third = sorted(set(first.files.values()))
    whole = (first.folder / one).read_bytes()
    for name, damaged, why in (
        (one, whole[:-100], r"cannot be read \(.*"),
        (one, whole[:-1] + bytes([whole[-1] ^ 1]), "has another content than was written"),
        (one, b"", r"cannot be read \(.*"),
        (one, (first.folder / other).read_bytes(), "has another content than was written"),
    ):
        (first.folder / name).unlink()
        (first.folder / name).write_bytes(damaged)
        before = {path: path.stat().st_mtime_ns for path in (first.folder / other, first.folder / third)}
        capsys.readouterr()
        with pytest.warns(
            UserWarning, match=rf"{name}: {why}\. Removed; the features of its images are computed again\."
        ):
            again = stored(made, tmp_path)
        assert "feature cache: 2 of 2 images stored" in capsys.readouterr().err
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        found = tensors_of(again)
        assert found.keys() == expected.keys() and all(
            torch.equal(found[key], expected[key]) for key in expected
        )
    (plan,) = first.folder.glob("plan-*.json")
    text = plan.read_text()
    for damaged in (text[:-10], text.replace("50", "51"), "[[1, 2, 3, 4, 5]]"):
        assert damaged != text
        plan.write_text(damaged)
        with pytest.warns(
            UserWarning, match=r"plan-.*\.json: is damaged\. Removed; what it planned is planned again\."
        ):
            stored(made, tmp_path)
        assert plan.read_text() == text
    collator_of(made).features = stored(made, tmp_path)
    store._open.cache_clear()
    for path in first.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        TrainingError, match=r"safetensors: cannot be read any more .* Make the same call again"
    ):
        collator_of(made).inputs(conversations(images))


def test_what_is_no_file_is_replaced_or_refused(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    made = trainer(bases["llava"], conversations(images), tmp_path / "run")
    folder = stored(made, tmp_path).folder
    for path in sorted(folder.iterdir()):
        path.unlink()
        path.symlink_to("nowhere")
    assert len(stored(made, tmp_path)) == 6 and not any(path.is_symlink() for path in folder.iterdir())
    for path in sorted(folder.iterdir()):
        path.unlink()
        path.mkdir()
        with pytest.raises(
            TrainingError, match=r"cannot be written \(.*Is a directory.*Make room or fix the folder"
        ):
            stored(made, tmp_path)
        path.rmdir()


def test_a_later_stage_adds_what_is_new_and_changes_nothing(
    bases: dict[str, Path], images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "IMAGES_PER_FILE", 3)
    rows = conversations(images)
    earlier = tensors_of(stored(trainer(bases["llava"], rows[:2], tmp_path / "one"), tmp_path))
    both = stored(trainer(bases["llava"], rows[1:], tmp_path / "two"), tmp_path)
    found = tensors_of(both)
    assert len(earlier) == 3 and len(both) == 5 + 1, "the file that holds two of them holds a third"
    assert len(found) == 6 and all(torch.equal(found[key], earlier[key]) for key in earlier)
    assert sorted(len(together) for together in read_plans(both.folder).values()) == [3, 3]


def fill_at_once(base: Path, rows: list[Conversation], folder: Path, number: int, started: object) -> None:
    store.IMAGES_PER_FILE = 2
    made = trainer(base, rows, folder / str(number))
    started.wait()
    found = stored(made, folder)
    assert len(found) == 6
    torch.save(tensors_of(found), folder / f"{number}.pt")


def test_two_processes_may_fill_at_once(bases: dict[str, Path], images: list[str], tmp_path: Path) -> None:
    forks = kills.context()
    started = forks.Barrier(2)
    rows = conversations(images)
    together = [
        forks.Process(target=fill_at_once, args=(bases["llava"], rows, tmp_path, number, started))
        for number in range(2)
    ]
    for process in together:
        process.start()
    for process in together:
        process.join(120)
        assert process.exitcode == 0
    one, other = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert len(one) == 6 and all(torch.equal(one[key], other[key]) for key in one)
    (folder,) = (tmp_path / "features").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 3 and not list(folder.glob(".*"))


# What befalls a call of `benchmarks/kills.py`


def in_files_of_two() -> None:
    store.IMAGES_PER_FILE = 2


def at_flush(number: int, then: Callable[..., object], *arguments: object) -> None:
    """Before something is flushed for the so-manieth time: the plan and its folder come first, then a file and its folder."""
    in_files_of_two()
    flush, flushed = store.flush, 0

    def watched(path: Path) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == number:
            then(*arguments)
        flush(path)

    store.flush = watched


def at_call(name: str, then: Callable[..., object], *arguments: object) -> None:
    """Each time before the feature cache calls something; every line of its progress is shown."""
    in_files_of_two()
    filling._SECONDS_BETWEEN_LINES = -1
    called = getattr(filling, name)

    def watched(*how: object) -> object:
        then(*arguments)
        return called(*how)

    setattr(filling, name, watched)


def signal_myself(number: int) -> None:
    os.kill(os.getpid(), number)


def kill_in_training() -> None:
    in_files_of_two()
    step = StageTrainer.training_step

    def training_step(self: StageTrainer, *inputs: object) -> torch.Tensor:
        if self.stage.name == "vqa" and self.state.global_step == 3:
            signal_myself(signal.SIGKILL)
        return step(self, *inputs)

    StageTrainer.training_step = training_step


def limit_file_size(size: int) -> None:
    in_files_of_two()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a run that was left alone, `lora`."""
    folder = tmp_path_factory.mktemp("disturbed")
    kills.write_data(folder)
    call(folder, folder / "lora", in_files_of_two)
    return folder


def call(place: Path, out: Path, before: Callable[..., object], *how: object, exit_code: int = 0) -> str:
    """Make the call in a process of its own; returns what it said."""
    process = kills.start(place, out, "lora", before, *how, feature_cache=True)
    process.join(280)
    log = Path(f"{out}.log")
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == exit_code, said
    log.unlink()
    return said


def test_killed_while_it_was_filled_and_while_it_was_used_nothing_changes(place: Path) -> None:
    out = place / "killed"
    call(place, out, at_flush, 1, signal_myself, signal.SIGKILL, exit_code=-signal.SIGKILL)
    (folder,) = (out / "features").iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".partial"], "not even a plan"
    call(place, out, at_flush, 5, signal_myself, signal.SIGKILL, exit_code=-signal.SIGKILL)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".partial", ".safetensors"]
    (whole,) = folder.glob("[!.]*.safetensors")
    written = whole.stat().st_mtime_ns
    said = call(place, out, kill_in_training, exit_code=-signal.SIGKILL)
    assert "feature cache: 4 of 5 images stored" in said, (
        "seven in four files, one of two whole, and one cannot be decoded"
    )
    assert whole.stat().st_mtime_ns == written and not list(folder.glob(".*"))
    said = call(place, out, in_files_of_two)
    assert "images stored" not in said and "vqa        feature cache on: 7 images, " in said
    kills.check_same(place / "lora", out)
    assert not (out / "features").exists()


def test_stopped_while_it_is_filled_it_says_what_stays(place: Path) -> None:
    out = place / "stopped"
    said = call(place, out, at_flush, 5, signal_myself, signal.SIGTERM, exit_code=1)
    assert said.rstrip().endswith(
        "llavamed_peft.errors.Interrupted: Stopped by SIGTERM while the feature cache of stage 'align' was "
        "filled; 2 of 4 files that were missing are complete and stay. This stage has no checkpoint; make "
        "the same call again to start it again after the finished stages."
    )
    assert "feature cache: 2 of 3 images stored" in call(place, out, in_files_of_two)
    kills.check_same(place / "lora", out)


@pytest.mark.parametrize(
    ("name", "line", "done"),
    [
        ("ContentNames", None, "equal images were being found"),
        ("content_key", "6 images looked at for equal ones", "its images were being read"),
        ("is_whole", "6 of 7 images read", "its files were being checked"),
        ("fill", "3 of 4 files checked", "0 of 4 files that were missing are complete and stay"),
    ],
)
def test_whatever_it_is_at_it_says_so_and_can_be_stopped(
    name: str, line: str | None, done: str, place: Path
) -> None:
    said = call(
        place, place / f"stopped at {name}", at_call, name, signal_myself, signal.SIGTERM, exit_code=1
    )
    assert line is None or f"align      feature cache: {line}\n" in said
    assert (
        f"Stopped by SIGTERM while the feature cache of stage 'align' was filled; {done}. This stage has no "
        in said
    )


def test_a_full_disk_is_said_and_made_room_on_it_goes_on(place: Path) -> None:
    out = place / "full"
    last = call(place, out, limit_file_size, 20_000, exit_code=1).rstrip().splitlines()[-1]
    assert "TrainingError" in last and ".safetensors: cannot be written (" in last
    assert last.endswith("which keeps what is stored; or pass feature_cache=False, which stores nothing.")
    assert not list((out / "features").rglob("*.safetensors")) and not list(
        (out / "features").rglob("*.partial")
    )
    call(place, out, in_files_of_two)
    kills.check_same(place / "lora", out)


SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from llavamed_peft import Conversation, Curriculum, LoraSpec, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.features import filling, store
from llavamed_peft.training.optimizer import parameter_groups
from llavamed_peft.training.trainer import StageTrainer

base, images, out, processes = sys.argv[1:]

def plain_descent(self, model=None):  # Adam would blow rounding up
    self.optimizer = torch.optim.SGD(parameter_groups(model or self.model, self.stage.schedule, 0.0, ()))
    return self.optimizer

def fill(path, *how):
    with open(f"{out}.{PartialState().process_index}", "a") as wrote:
        wrote.write(path.name + "\\n")
    return write(path, *how)

StageTrainer.create_optimizer = plain_descent
write, filling.fill = filling.fill, fill
store.IMAGES_PER_FILE = 2
def asked(i, *images):
    turns = (Turn("user", "<image>" * len(images) + " what?"), Turn("assistant", "a heart " * (1 + i % 3)))
    return Conversation(str(i), turns, images)

rows = [asked(i, f"{images}/{i % 6}.png") for i in range(7)] + [asked(8), asked(9), asked(10, f"{images}/cut.png")]
schedule = Schedule(epochs=2, learning_rate=0.05, global_batch=5)
stages = Stage("align", "projector", schedule), Stage("vqa", "lora", schedule, LoraSpec(rank=4, alpha=8, dropout=0.0))
data = {stage.name: rows for stage in stages}
curriculum_finetune(base, data, out, curriculum=Curriculum(stages), max_rejected=0.1, feature_cache=True, max_row_tokens=60)
assert PartialState().num_processes == int(processes), PartialState()
"""


@pytest.mark.slow
def test_two_processes_divide_the_images_and_learn_what_one_does(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    cut(images[6])
    os.rename(images[6], Path(images[6]).with_name("cut.png"))
    for processes in (1, 2):
        torchrun = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        )
        words = [script, bases["llava"], tmp_path / "images", tmp_path / str(processes), processes]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *torchrun, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, *shares = ((tmp_path / name).read_text().split() for name in ("1.0", "2.0", "2.1"))
    assert [len(alone), *map(len, shares)] == [4, 2, 2] and {*shares[0], *shares[1]} == set(alone)
    for stage in ("align", "vqa"):
        one, two = (StageAdapter.load(tmp_path / name / stage) for name in "12")
        agree(one, two, 1e-5)
        assert one.metrics["cached_images"] == two.metrics["cached_images"] == 6
        assert one.record["data"] == two.record["data"] and one.record["data"][0]["failed"] == 1
