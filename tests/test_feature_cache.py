"""When the feature cache is used, and how its files are found, checked and shared."""

from __future__ import annotations

import os
from pathlib import Path

import kills
import pytest
import tiny
import torch
from cached import (
    KINDS,
    asked,
    bases,
    collator_of,
    conversations,
    images,
    run,
    schedule,
    stored,
    tensors_of,
    trainer,
)

from llavamed_peft import (
    Conversation,
)
from llavamed_peft.errors import ConfigError, TrainingError
from llavamed_peft.features import filling, store
from llavamed_peft.features import forecast as forecasting
from llavamed_peft.features.forecast import Forecast, decide
from llavamed_peft.features.store import read_plans

# Whether it pays


def test_the_forecast_decides_where_nobody_did(tmp_path: Path) -> None:
    small = Forecast(
        images=4000, uncomputed=4000, passes=36_000, stored=0, missing=4_800_000_000, free=96 * 10**9
    )
    assert decide(small, "auto", "vqa", tmp_path) == (
        True,
        "feature cache on: 4,000 images, 4.8 GB on disk, 4.8 GB of them to be added (96.0 GB "
        "free); 4,000 images pass the vision tower instead of 36,000",
    )
    once = Forecast(500_000, 500_000, 500_000, 0, 600 * 10**9, 10**13)
    on, line = decide(once, "auto", "align", tmp_path)
    assert (
        not on
        and line.startswith("feature cache off: 500,000 images, 600.0 GB")
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
    held_out = {"vqa": [asked("held out", images[0])]}  # measured before, and after each of 3 steps
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
    """As where an export has a copy of the image for each question, and a later stage's export copies of its
    own."""

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
        (one, whole[:-1] + bytes([whole[-1] ^ 1]), "its content is not what was written"),
        (one, b"", r"cannot be read \(.*"),
        (one, (first.folder / other).read_bytes(), "its content is not what was written"),
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
