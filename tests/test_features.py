"""The feature cache: stored features train as images do, however filling it was disturbed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch
from cached import (
    ALL,
    KINDS,
    agree,
    asked,
    bases,
    collator_of,
    conversations,
    cut,
    images,
    loss_and_gradients,
    run,
    stored,
    tensors_of,
    trainer,
)
from PIL import Image
from torch.utils.data import get_worker_info

from llavamed_peft import (
    StageAdapter,
)
from llavamed_peft.batches.decoding import DeviceBatches
from llavamed_peft.errors import DataError, TrainingError
from llavamed_peft.features import store
from llavamed_peft.features.filling import fingerprint
from llavamed_peft.features.store import read_plans
from llavamed_peft.modeling.tower import tower_layers
from llavamed_peft.storage.images import load_image

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
    words = collator_of(made)([rows[2]])  # an empty image's turn
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
        # The same or its neighbour; near zero, where last places are small, one of those at 1
        other = found[1][key]
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
        assert [one.record.computing["feature_cache"] for one in (adapter, fresh[stage])] == [True, False]
        assert [one.metrics["cached_images"] for one in (adapter, fresh[stage])] == [6, 0]
        assert adapter.metrics["loss_last"] == pytest.approx(fresh[stage].metrics["loss_last"], abs=1e-5)
        # The full stage's checkpoint has the tower that the stages before it saw
        new = 6 if position == 0 else 0
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
        records.append(adapter.record.data)
        rejected.append((tmp_path / str(on) / "rejected.jsonl").read_text())
    assert records[0] == records[1] and (records[0][0].used, records[0][0].failed) == (5, 2)
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
    assert adapter.record.data[0].failed == 0
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
