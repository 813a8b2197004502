"""What a stage continues: another base or parent is refused before anything is written, or the stage begins
anew; and what a call is refused for at once."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cached import ROOT, asked, collator_of, run, schedule, stored, trainer
from PIL import Image
from safetensors.torch import load_file

from llavamed_peft import Conversation, Schedule, Stage, StageAdapter
from llavamed_peft.cli.main import main
from llavamed_peft.errors import AdapterError, ConfigError
from llavamed_peft.modeling.fit import check_positions
from llavamed_peft.modeling.load import read_config
from llavamed_peft.training.checkpoints import newest_checkpoint
from llavamed_peft.training.trainer import StageTrainer

TWO = {"align": "projector", "vqa": "lora"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        Image.effect_noise((60, 50), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(3)]


@pytest.fixture(scope="module")
def rows(images: list[str]) -> list[Conversation]:
    return [
        asked(str(n), images[n % 3], answer=answer)
        for n, answer in enumerate(["a heart", "no", "yes", "left"])
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("bases") / "base")


def tensors(stage: StageAdapter) -> dict[str, torch.Tensor]:
    return load_file(stage.path / "adapter_model.safetensors")


def test_a_checkpoint_trained_after_another_parent_is_not_resumed(
    base: Path,
    rows: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stage 1 is removed and comes out otherwise; stage 2 then is what it is after the new one."""
    call = functools.partial(run, base, rows, schedule=schedule(epochs=3), save_steps=1)
    step = StageTrainer.training_step

    def ends(self: StageTrainer, *inputs: Any) -> torch.Tensor:
        if self.stage.name == "vqa" and self.state.global_step == 2:
            raise RuntimeError("the node was lost")
        return step(self, *inputs)

    def slower(self: StageTrainer, *inputs: Any) -> torch.Tensor:
        if self.stage.name == "align":
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5
        return step(self, *inputs)

    monkeypatch.setattr(StageTrainer, "training_step", ends)
    with pytest.raises(RuntimeError, match="the node was lost"):
        call(tmp_path / "run", TWO)
    old = StageAdapter.load(tmp_path / "run" / "align").record.sha256
    checkpoint = newest_checkpoint(tmp_path / "run/checkpoints/vqa")
    assert (
        checkpoint is not None and checkpoint.step == 2 and checkpoint.state["begins_with"]["parent"] == old
    )
    assert checkpoint.began_with({"base": None, "parent": old}), "a Hub id's hash is unknown at first"
    assert not checkpoint.began_with({"base": "another", "parent": old})
    shutil.rmtree(tmp_path / "run" / "align")
    monkeypatch.setattr(StageTrainer, "training_step", slower)
    again, alone = call(tmp_path / "run", TWO), call(tmp_path / "alone", TWO)
    assert again["align"].record.sha256 == alone["align"].record.sha256 != old
    said = "".join(capsys.readouterr())
    assert (
        "vqa        begins anew: its checkpoint of step 2 was trained after another stage 'align', or "
        "another base" in said
    )
    assert all(torch.equal(tensors(alone["vqa"])[name], one) for name, one in tensors(again["vqa"]).items())


def test_start_from_a_base_of_another_image_size_is_refused_at_once(
    base: Path, rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that failed leaves nothing that would refuse the right one."""
    first = run(base, rows, tmp_path / "first", {"align": "projector"}, schedule=schedule(epochs=1))["align"]
    monkeypatch.setattr(tiny, "IMAGE_SIZE", 28)
    smaller = tiny.build(tmp_path / "smaller")
    call = functools.partial(run, rows=rows, out=tmp_path / "run", trains={"vqa": "lora"}, start_from=first)
    with pytest.raises(
        AdapterError, match=r"start_from \(align\) does not fit the base, .* the vision tower takes \["
    ):
        call(smaller, schedule=schedule(epochs=1))
    assert not (tmp_path / "run").exists()
    wider = tiny.build(tmp_path / "wider", feature_layers=[-2, -1])
    with pytest.raises(AdapterError, match=r"tensors do not fit the base \(llava over llama\)"):
        call(wider, schedule=schedule(epochs=1))
    assert not (tmp_path / "run").exists()
    assert call(base, schedule=schedule(epochs=1))["vqa"].parent == {
        "stage": "align",
        "sha256": first.record.sha256,
    }


def test_a_full_stage_with_an_unrelated_model_is_refused(
    base: Path, rows: list[Conversation], tmp_path: Path
) -> None:
    one_epoch = schedule(epochs=1)
    full = run(base, rows, tmp_path / "full", {"instruct": "full"}, schedule=one_epoch)["instruct"]
    other = tiny.build(tmp_path / "other", seed=1)
    call = functools.partial(run, rows=rows, out=tmp_path / "run", trains={"vqa": "lora"}, start_from=full)
    with pytest.raises(AdapterError) as raised:
        call(other, schedule=one_epoch)
    assert str(raised.value).startswith(
        "start_from (instruct) is a full checkpoint, and model another one: other (sha256 "
    ) and str(raised.value).endswith(
        "Wanted model=base, which it was trained from, or its own folder: training begins with its weights."
    )
    assert not (tmp_path / "run").exists()
    assert call(full.path, schedule=one_epoch)["vqa"].record.base.sha256 == full.record.sha256
    call(base, out=tmp_path / "again", schedule=one_epoch)


def test_a_stage_name_that_no_disk_holds_is_refused(
    base: Path, rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Schedule(epochs=1, learning_rate=1e-3, global_batch=2)
    for name in ("心" * 80, "a\udcff"):
        with pytest.raises(
            ConfigError, match=r"Stage\.name is .* bytes in UTF-8; wanted a name that any disk can hold"
        ):
            Stage(name, "projector", rates)
    monkeypatch.setattr(os, "pathconf", lambda path, name: 143)  # as eCryptfs
    with pytest.raises(ConfigError, match=r"150 bytes, and .* holds names of at most 128"):
        run(base, rows, tmp_path / "run", {"心" * 50: "projector"}, schedule=rates)
    assert not (tmp_path / "run").exists()


def test_a_tilde_is_ones_own_folder(
    base: Path, rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "llava")
    stage = run("~/llava", rows, "~/runs/x", {"align": "projector"}, schedule=schedule(epochs=1))["align"]
    assert stage.path == tmp_path / "runs/x/align" and not (tmp_path / "~").exists()


def test_more_tokens_than_positions(base: Path, rows: list[Conversation], tmp_path: Path) -> None:
    config = read_config(base)
    check_positions(config, 2048)
    with pytest.warns(
        UserWarning, match=r"The longest conversation has 2049 tokens, the language model 2048 positions"
    ):
        check_positions(config, 2049)
    config.text_config.rope_parameters = None
    with pytest.raises(
        ConfigError, match="has 2049 tokens, the language model 2048 positions; wanted max_length=2048"
    ):
        check_positions(config, 2049)
    short = tmp_path / "short"
    shutil.copytree(base, short)
    plain = json.loads((short / "config.json").read_text(encoding="utf-8"))
    plain["text_config"]["max_position_embeddings"] = 20
    (short / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    with pytest.warns(UserWarning, match="the language model 20 positions") as warned:
        run(short, rows, tmp_path / "run", {"align": "projector"}, schedule=schedule(epochs=1))
    assert sum("20 positions" in str(one.message) for one in warned) == 1


def test_features_of_a_layer_norm_keep_the_towers_dtype_under_autocast(
    rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, autocast computes a layer norm in float32; here that is emulated. ViP-LLaVA's projector begins
    with one, so its first loss would differ in the sixth digit."""
    norm = torch.nn.functional.layer_norm

    def in_float32(
        values: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return norm(
                *(
                    None if v is None else v.float() if torch.is_tensor(v) else v
                    for v in (values, shape, weight, bias)
                ),
                eps,
            )

    monkeypatch.setattr(torch.nn.functional, "layer_norm", in_float32)
    for kind, how, dtype in (
        ("vipllava", ("llama", "clip", [-2, 1]), torch.float32),
        ("llava", (), torch.bfloat16),
    ):
        made = trainer(
            tiny.build(tmp_path / kind, kind, *how), rows, tmp_path / f"{kind} run", dtype=torch.bfloat16
        )
        steps = made.train_steps
        batch_of = functools.partial(next, iter(steps.loader()))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            fresh = made._summed_loss(made.model, batch_of()[0])
        collator_of(made).features = found = stored(made, tmp_path / kind, dtype=torch.bfloat16)
        assert found is not None
        (path,) = found.folder.glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            from_cache = made._summed_loss(made.model, next(iter(steps.loader()))[0])
        assert torch.equal(fresh, from_cache)


def test_a_recipe_ends_any_error_in_a_sentence(base: Path, tmp_path: Path) -> None:
    """Also one that is a library's; `--debug` shows where it came from."""
    script = tmp_path / "script.py"
    script.write_text(
        "from llavamed_peft.cli.launching import start\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Options:\n    where: str\n"
        "def main(options):\n    raise RuntimeError(f'first line of {options.where}\\nsecond line')\n"
        "start(main, Options)\n",
        encoding="utf-8",
    )
    for words in ([], ["--debug"]):
        done = subprocess.run(
            [sys.executable, str(script), "--where", "~/x", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/home/me"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == bool(words)
        if not words:
            assert done.stderr.splitlines()[-1] == (
                "RuntimeError: first line of /home/me/x (This error is not llavamed-peft's own; --debug "
                "shows where it came from.)"
            )


def test_a_verb_ends_any_error_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("odd")

    monkeypatch.setattr("llavamed_peft.adapters.lineage_tree.show", fails)
    assert main(["show", "somewhere"]) == 1
    assert capsys.readouterr().err == (
        "llavamed-peft: ValueError: odd (This error is not llavamed-peft's own; --debug shows where it came "
        "from.)\n"
    )
    with pytest.raises(ValueError, match="odd"):
        main(["show", "somewhere", "--debug"])
