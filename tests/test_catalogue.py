"""`catalogue.py` on tiny adapters, and on the repository's own `adapters/`, whatever is in it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny import build

from llavamed_peft import Curriculum, LoraSpec, Question, Schedule, Stage, StageAdapter, curriculum_finetune
from llavamed_peft.adapters import catalogue
from llavamed_peft.adapters.record import CARD, CONFIG, RECORD, WEIGHTS, StageRecord
from llavamed_peft.errors import AdapterError

PUBLISHED = Path(__file__).parents[1] / "adapters"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two stages whose names sort against their order, and what they left."""
    folder = tmp_path_factory.mktemp("run")
    Image.new("RGB", (56, 56), "gray").save(folder / "chest.png")
    questions = [
        Question(str(i), str(folder / "chest.png"), "is it normal?", "yes", "closed") for i in range(3)
    ]
    schedule = Schedule(epochs=1, learning_rate=1e-3, global_batch=2)
    stages = (Stage("see", "projector", schedule), Stage("ask", "lora", schedule, LoraSpec(rank=4, alpha=8)))
    return curriculum_finetune(
        build(folder / "tiny-llava"),
        {"see": questions, "ask": questions},
        folder / "run",
        curriculum=Curriculum(stages),
        eval_data={"ask": questions[:1]},
    )


@pytest.fixture
def shelf(run, tmp_path):
    """A catalogue of the two."""
    for name, adapter in run.items():
        shutil.copytree(adapter.path, tmp_path / f"tiny-llava--{name}")
    return tmp_path


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_table_says_what_the_stage_files_say(run, shelf):
    metrics, hashes = (
        run["ask"].metrics,
        {name: adapter.record.sha256[:12] for name, adapter in run.items()},
    )
    sizes = {name: (adapter.path / WEIGHTS).stat().st_size / 1e6 for name, adapter in run.items()}
    losses = f"{metrics['eval_loss_before']:.4f} → {metrics['eval_loss_after']:.4f}"
    assert catalogue.table(shelf) == (
        "| stage | base | trains | parent | data (rows used) | held-out loss | MB | sha256 |\n| --- | --- | "
        "--- | --- | --- | --- | --- | --- |\n| [see](tiny-llava--see) | tiny-llava | projector | – | in "
        f"memory (3) | – → – | {sizes['see']:.2f} | `{hashes['see']}` |\n| [ask](tiny-llava--ask) | "
        f"tiny-llava | lora | [see](tiny-llava--see) | in memory (3) | {losses} | {sizes['ask']:.2f} | "
        f"`{hashes['ask']}` |\n"
    )


def test_weights_may_be_on_the_hub_and_a_parent_elsewhere(run, shelf):
    shutil.rmtree(shelf / "tiny-llava--see")
    entry = shelf / "tiny-llava--ask"
    for path in entry.iterdir():
        if path.name not in (RECORD, CONFIG, CARD):
            path.unlink()
    row = catalogue.table(shelf).splitlines()[-1]
    assert f"| see `{run['see'].record.sha256[:12]}` |" in row
    assert f"| on the Hub | `{run['ask'].record.sha256[:12]}` |" in row


def test_a_hub_base_goes_by_its_id_and_bars_are_escaped(shelf):
    path = shelf / "tiny-llava--see" / RECORD
    record = json.loads(path.read_text())
    change(
        path,
        base=record["base"] | {"id": "someone/tiny-llava"},
        data=[record["data"][0] | {"file": "a|b.json", "used": 1200}],
    )
    assert "| someone/tiny-llava | projector | – | a\\|b.json (1,200) |" in catalogue.table(shelf)


def test_update_writes_the_table_and_leaves_the_rest(shelf):
    path = catalogue.update(shelf)
    assert path == shelf / "README.md"
    made = path.read_text()
    assert made.startswith("# Adapters\n") and catalogue.table(shelf) in made
    shutil.rmtree(shelf / "tiny-llava--ask")
    path.write_text(made.replace("# Adapters", "# Ours") + "\nBelow.\n")
    renewed = catalogue.update(shelf).read_text()
    assert (
        renewed.startswith("# Ours\n") and renewed.endswith("\nBelow.\n") and "tiny-llava--ask" not in renewed
    )
    assert catalogue.update(shelf).read_text() == renewed


@pytest.mark.parametrize(
    "text", ["# Adapters\n", f"{catalogue.BEGIN}\n", f"{catalogue.END}\n{catalogue.BEGIN}\n"]
)
def test_an_index_without_its_markers_is_left_alone(shelf, text):
    (shelf / "README.md").write_text(text)
    with pytest.raises(AdapterError) as caught:
        catalogue.update(shelf)
    assert str(caught.value) == (
        f"{shelf / 'README.md'}: wanted a line {catalogue.BEGIN} and below it a line {catalogue.END}, for "
        "the table between them."
    )
    assert (shelf / "README.md").read_text() == text


def test_an_empty_catalogue_has_an_empty_table(tmp_path):
    (tmp_path / ".cache").mkdir()
    assert len(catalogue.table(tmp_path).splitlines()) == 2


def rename(shelf):
    (shelf / "tiny-llava--ask").rename(shelf / "tiny-llava-ask")
    return "tiny-llava-ask", (
        ": stage.json says base 'tiny-llava' and stage 'ask'; wanted the folder's name to be "
        "'tiny-llava--ask'. Rename it."
    )


def bare_folder(shelf):
    (shelf / "notes").mkdir()
    return "notes", (
        ": has no stage.json, adapter_config.json, README.md; wanted each of stage.json, adapter_config.json "
        "and README.md in a folder of the catalogue."
    )


def no_card(shelf):
    (shelf / "tiny-llava--see" / CARD).unlink()
    return "tiny-llava--see", (
        ": has no README.md; wanted each of stage.json, adapter_config.json and README.md in a folder of the "
        "catalogue."
    )


def other_weights(shelf):
    shutil.copy(shelf / "tiny-llava--see" / WEIGHTS, shelf / "tiny-llava--ask" / WEIGHTS)
    return "tiny-llava--ask", ": the weights have sha256 "


def not_json(shelf):
    (shelf / "tiny-llava--ask" / RECORD).write_text('{"schema_version": 1,')
    return "tiny-llava--ask/stage.json", ": is not JSON ("


def not_an_object(shelf):
    (shelf / "tiny-llava--ask" / RECORD).write_text("[]")
    return (
        "tiny-llava--ask/stage.json",
        ": the record is []; the folder is damaged. Copy or download it again.",
    )


def lost_key(shelf):
    path = shelf / "tiny-llava--ask" / RECORD
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"})
    )
    return (
        "tiny-llava--ask/stage.json",
        ": the record lacks sha256; the folder is damaged. Copy or download it again.",
    )


def later_version(shelf):
    change(shelf / "tiny-llava--ask" / RECORD, schema_version=99, kind="shard")
    return (
        "tiny-llava--ask/stage.json",
        ": schema_version is 99; this version of llavamed-peft reads 1. Try another one.",
    )


def full_stage(shelf):
    change(shelf / "tiny-llava--ask" / RECORD, kind="checkpoint")
    return "tiny-llava--ask", (
        ": is a full stage's checkpoint; the catalogue holds adapters only. Publish it as a model."
    )


DAMAGES = [
    rename,
    bare_folder,
    no_card,
    other_weights,
    not_json,
    not_an_object,
    lost_key,
    later_version,
    full_stage,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_wrong_with_a_folder_is_said(shelf, damage):
    named, words = damage(shelf)
    with pytest.raises(AdapterError) as caught:
        catalogue.update(shelf)
    assert str(caught.value).startswith(f"{shelf / named}{words}")
    assert not (shelf / "README.md").exists()


def test_no_such_catalogue(tmp_path):
    with pytest.raises(AdapterError) as caught:
        catalogue.table(tmp_path / "adapters")
    assert str(caught.value) == f"{tmp_path / 'adapters'}: no such folder; wanted the catalogue's."


def test_the_repository_s_index_is_the_generated_one():
    text = (PUBLISHED / catalogue.INDEX).read_text(encoding="utf-8")
    between = text.partition(catalogue.BEGIN)[2].partition(catalogue.END)[0]
    assert between == f"\n\n{catalogue.table(PUBLISHED)}\n", "renew it: llavamed-peft catalogue adapters"


def test_the_repository_s_adapters_load_and_name_no_path():
    for folder in sorted(path for path in PUBLISHED.iterdir() if path.is_dir()):
        entry = catalogue.Entry.read(folder)
        named = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        assert named in (entry.record.base.id, entry.record.base.name), (
            f"{folder.name}/{CONFIG} names {named}"
        )
        if entry.size is not None:
            adapter = StageAdapter.load(folder)
            assert f"{adapter.record.base.name}--{adapter.stage.name}" == folder.name
            assert adapter.tensors()


def test_a_record_that_is_read_and_written_is_the_same_file():
    for folder in sorted(path for path in PUBLISHED.iterdir() if path.is_dir()):
        assert StageRecord.read(folder).to_json() == (folder / RECORD).read_text(encoding="utf-8")
