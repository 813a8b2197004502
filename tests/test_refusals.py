"""What `curriculum_finetune` refuses before anything is trained, word for word."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from three_stages import THREE, bases, conversations, images, schedule

from llavamed_peft import (
    Conversation,
    Curriculum,
    LoraSpec,
    Stage,
    StageAdapter,
    curriculum_finetune,
)
from llavamed_peft.errors import AdapterError, CheckpointError, ConfigError, DataError, TrainingError


@pytest.fixture(scope="module")
def finished(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StageAdapter]:
    """A projector stage and a LoRA stage that a run may start from."""
    data = dict.fromkeys(("align", "instruct"), conversations)
    stages = Curriculum(THREE.stages[:2])
    return curriculum_finetune(bases["llava"], data, tmp_path_factory.mktemp("finished"), curriculum=stages)


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

    def test_another_rank_after_start_from(
        self, call, conversations: list[Conversation], finished: dict[str, StageAdapter]
    ) -> None:
        other = Curriculum((Stage("vqa", "lora", schedule(), LoraSpec(rank=8, alpha=8)),))
        with pytest.raises(
            ConfigError, match="Stage 'vqa' has LoRA rank 8 and alpha 8, start_from rank 4 and alpha 8"
        ):
            call(curriculum=other, data={"vqa": conversations}, start_from=finished["instruct"])

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
        with pytest.raises(
            TrainingError,
            match=r"The loss of step \d+ is (nan|inf). The same call would meet this again: lower",
        ):
            call(curriculum=wild)
        assert not (tmp_path / "run" / "align").exists()


def test_start_from_another_architecture_or_padding_is_refused_at_once(
    bases: dict[str, Path],
    finished: dict[str, StageAdapter],
    conversations: list[Conversation],
    tmp_path: Path,
) -> None:
    curriculum = Curriculum((THREE["vqa"],))
    arguments = {
        "data": {"vqa": conversations},
        "output_dir": tmp_path / "run",
        "start_from": finished["align"],
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
