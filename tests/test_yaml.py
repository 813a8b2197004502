"""Curricula as YAML: there and back, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_values import lora, schedule

from llavamed_peft import (
    LLAVA_MED,
    LLAVA_MED_FULL,
    Curriculum,
    LoraSpec,
    Schedule,
    Stage,
)
from llavamed_peft.errors import (
    ConfigError,
)

# --- YAML ---

POSITIVE = st.floats(min_value=0, max_value=1e9, exclude_min=True) | st.integers(min_value=1, max_value=10**6)
SHARES = st.floats(min_value=0, max_value=1, exclude_max=True)

SCHEDULES = st.builds(
    Schedule,
    epochs=POSITIVE,
    learning_rate=POSITIVE,
    projector_learning_rate=st.none() | POSITIVE,
    global_batch=st.integers(1, 10**6),
    warmup_ratio=SHARES,
    weight_decay=st.floats(0, 1),
    max_length=st.integers(2, 10**6),
    shuffle=st.sampled_from(["images", "conversations"]),
)

# Names that YAML would rather read as numbers, truth values, dates or nothing, among all sorts of others.
NAMES = st.sampled_from(
    ["2e-3", "1e5", "15", "no", "true", "null", "~", "2026-11-23", "- a", "#a", "'a'", "&a", "!a", "a #b"]
) | st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters='/\\:*?"<>|.'), min_size=1, max_size=12
)


@st.composite
def curricula(draw: st.DrawFn) -> Curriculum:
    spec = LoraSpec(draw(st.integers(1, 512)), draw(POSITIVE), draw(SHARES))
    stages = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        trains = draw(st.sampled_from(["projector", "lora", "full"]))
        schedule = draw(SCHEDULES)
        if trains == "projector":
            schedule = dataclasses.replace(schedule, projector_learning_rate=None)
        stages.append(Stage(name, trains, schedule, spec if trains == "lora" else None))
    return Curriculum(
        tuple(stages), draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(["pad", "checkpoint"]))
    )


@settings(deadline=None)  # a busy machine is no fault
@given(curricula())
def test_yaml_there_and_back(curriculum: Curriculum) -> None:
    assert Curriculum.from_yaml(curriculum.to_yaml()) == curriculum
    assert Curriculum.from_dict(curriculum.to_dict()) == curriculum


@pytest.mark.parametrize("curriculum", [LLAVA_MED, LLAVA_MED_FULL], ids=["LLAVA_MED", "LLAVA_MED_FULL"])
def test_yaml_file_there_and_back(curriculum: Curriculum, tmp_path: Path) -> None:
    path = tmp_path / "curriculum.yaml"
    assert curriculum.to_yaml(path) == path.read_text(encoding="utf-8")
    assert Curriculum.from_yaml(path) == Curriculum.from_yaml(str(path)) == curriculum


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("2e-3", 0.002),
        ("2E-3", 0.002),
        ("2.0e-3", 0.002),
        (".002", 0.002),
        ("+2e-3", 0.002),
        ("1", 1),
        ("1.", 1.0),
    ],
)
def test_a_learning_rate_reads_as_a_number_however_it_is_written(written: str, number: float) -> None:
    text = (
        f"stages:\n- name: align\n  trains: projector\n  schedule: {{epochs: 1, learning_rate: {written}}}\n"
    )
    rate = Curriculum.from_yaml(text)["align"].schedule.learning_rate
    assert rate == number and type(rate) is type(number)


def test_yaml_needs_only_what_has_no_default() -> None:
    text = "stages:\n- {name: vqa, trains: lora, schedule: {epochs: 1, learning_rate: 2e-4}}\n"
    assert Curriculum.from_yaml(text) == Curriculum(
        (Stage("vqa", "lora", Schedule(epochs=1, learning_rate=2e-4), LoraSpec()),)
    )


ONE_STAGE = "stages:\n- name: align\n  trains: projector\n  schedule: {epochs: 1, learning_rate: 2e-3}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ONE_STAGE + "sede: 1\n", "curriculum has the unknown key 'sede'. Did you mean 'seed'?"),
        (
            ONE_STAGE + "zzz: 1\n",
            "curriculum has the unknown key 'zzz'. Known: image_aspect_ratio, seed, stages.",
        ),
        (ONE_STAGE + "1: 1\n", "curriculum has the unknown key 1. Known: image_aspect_ratio, seed, stages."),
        (
            ONE_STAGE.replace("trains", "train"),
            "curriculum.stages[0] has the unknown key 'train'. Did you mean 'trains'?",
        ),
        (
            ONE_STAGE.replace("epochs", "epoch"),
            "curriculum.stages[0].schedule has the unknown key 'epoch'. Did you mean 'epochs'?",
        ),
        (
            ONE_STAGE + "  lora: {ranks: 8}\n",
            "curriculum.stages[0].lora has the unknown key 'ranks'. Did you mean 'rank'?",
        ),
        ("seed: 1\n", "curriculum lacks stages; Curriculum has no default there."),
        ("stages: align\n", "curriculum.stages is 'align'; wanted a list of stages."),
        ("stages: []\n", "curriculum: Curriculum.stages is empty; wanted at least one Stage."),
        ("- align\n", "curriculum is ['align']; wanted a mapping with the keys of Curriculum."),
        ("\n", "curriculum is None; wanted a mapping with the keys of Curriculum."),
        ("stages:\n- align\n", "curriculum.stages[0] is 'align'; wanted a mapping with the keys of Stage."),
        (
            "stages:\n- {name: align}\n",
            "curriculum.stages[0] lacks trains, schedule; Stage has no default there.",
        ),
        (
            "stages:\n- {name: align, trains: projector, schedule: {epochs: 1}}\n",
            "curriculum.stages[0].schedule lacks learning_rate; Schedule has no default there.",
        ),
        (
            "stages:\n- {name: align, trains: projector, schedule: null}\n",
            "curriculum.stages[0].schedule is None; wanted a mapping with the keys of Schedule.",
        ),
        (
            ONE_STAGE.replace("2e-3", "fast"),
            "curriculum.stages[0].schedule: Schedule.learning_rate is 'fast'; wanted a number above 0.",
        ),
        (
            ONE_STAGE.replace("align", "no"),
            "curriculum.stages[0]: Stage.name is False; wanted a plain folder name such as 'align'.",
        ),
        (ONE_STAGE + "seed: -1\n", "curriculum: Curriculum.seed is -1; wanted a whole number of at least 0."),
    ],
)
def test_yaml_refuses(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Curriculum.from_yaml(text)
    assert str(refusal.value) == words


def test_a_yaml_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "curriculum.yaml"
    path.write_text(ONE_STAGE + "sede: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        Curriculum.from_yaml(path)
    assert str(refusal.value) == f"{path} has the unknown key 'sede'. Did you mean 'seed'?"
    path.write_text("stages: [\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        Curriculum.from_yaml(path)
    assert str(refusal.value).startswith(f"{path} is not YAML: ")
    for broken in (tmp_path / "nope.yaml", tmp_path):
        with pytest.raises(ConfigError) as refusal:
            Curriculum.from_yaml(broken)
        assert str(refusal.value).startswith(f"{broken}: cannot be read (")
        assert str(refusal.value).endswith("; wanted a YAML file of stages.")


def test_yaml_with_a_key_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the key 'epochs' is there twice"):
        Curriculum.from_yaml(
            "stages:\n- {name: a, trains: projector, schedule: {epochs: 1, learning_rate: 1e-3, epochs: "
            "30}}\n"
        )


def test_seed_has_the_width_that_numpy_takes() -> None:
    with pytest.raises(
        ConfigError, match=r"Curriculum\.seed is 4294967296; wanted a whole number below 2\*\*32\."
    ):
        Curriculum(LLAVA_MED.stages, seed=2**32)
