"""What a launch configuration may ask for, and what is refused; `test_processes` tests what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from llavamed_peft import Conversation, Curriculum, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.errors import ConfigError
from llavamed_peft.modeling import sharding
from llavamed_peft.modeling.sharding import Sharding, asked_sharding, launcher_aside

ROOT = Path(__file__).parent.parent
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
OPTIMIZER = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.parts import sharding_units
from llavamed_peft.modeling.scopes import unfreeze_full
from llavamed_peft.modeling.sharding import Sharding, shard
from llavamed_peft.modeling.tensors import load_tensors, trainable_tensors
from llavamed_peft.modeling.tower import always_look, freeze_tower
from llavamed_peft.training.checkpoints import load_optimizer_tensors, optimizer_tensors

base, folder, begins = sys.argv[1:]
processes = PartialState(cpu=True)
middle = None if begins == "new" else torch.load(Path(folder, "middle.pt"))
model = unfreeze_full(load_checkpoint(base)[0])
if middle:
    load_tensors(model, middle["tensors"])
freeze_tower(model)
always_look(model)
if processes.num_processes > 1:
    shard(model, sharding_units(model), Sharding("fsdp2"), torch.float32)
parts = {"projector": 1e-3, "language_model": 1e-4}
trained = {part: [] for part in parts}
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        trained["projector" if "projector" in name else "language_model"].append(parameter)
groups = [{"name": part, "lr": rate, "params": trained[part]} for part, rate in parts.items()]
optimizer = torch.optim.AdamW(groups)
if middle:
    load_optimizer_tensors(model, optimizer, middle["optimizer"])
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == parts
for step in range(2 if middle else 0, 4):
    ids = torch.randint(10, 300, (1, 12), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(input_ids=ids)  # as evaluation does; it leaves a part gathered
    if step == 1:
        state = {"tensors": trainable_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
        if processes.is_main_process:
            torch.save(state, Path(folder, "middle.pt"))
        else:
            assert state == {"tensors": {}, "optimizer": {}}
tensors = trainable_tensors(model)
if processes.is_main_process:
    torch.save(tensors, Path(folder, f"{begins}-{processes.num_processes}.pt"))
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


def asked(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], dtype: torch.dtype = torch.float32
) -> Sharding | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # As if deepspeed were installed: it is not called here
    monkeypatch.setattr(sharding, "find_spec", lambda name: object())
    return asked_sharding(dtype, 1.0)


def test_fsdp2_as_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, {}) is None
    assert asked(monkeypatch, FSDP2) == Sharding("fsdp2")
    more = {
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
    }
    assert asked(monkeypatch, more) == Sharding(
        "fsdp2", reshard_after_forward=False, gradient_checkpointing=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepspeed_gets_the_packages_own_clipping_precision_and_steps(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(monkeypatch, ZERO3, dtype)
    assert found is not None and found.deepspeed is not None and found.method == "zero3"
    assert (found.deepspeed["gradient_clipping"], found.deepspeed["gradient_accumulation_steps"]) == (1.0, 1)
    assert found.deepspeed["bf16"] == {"enabled": dtype == torch.bfloat16}
    assert found.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}
    assert asked(monkeypatch, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, dtype).method == "zero2"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "The launch configuration has fsdp_version 1; wanted fsdp_version: 2 (PyTorch's fully_shard), "
            "the only one supported.",
        ),
        (
            FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"},
            "The launch configuration has fsdp_offload_params (FSDP_OFFLOAD_PARAMS is set); this is not "
            "supported. Shard over more GPUs, or train LoRA.",
        ),
        (
            ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            "DeepSpeed's zero_optimization.stage is 1; wanted 2 or 3.",
        ),
        (
            ZERO3 | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "DeepSpeed's gradient_accumulation_steps is 4; wanted 1 or 'auto': the package decides it.",
        ),
        (
            ZERO3 | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            "DeepSpeed's gradient_clipping is 0.5; wanted 1.0 or 'auto': the package decides it.",
        ),
    ],
)
def test_what_is_not_supported_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as refusal:
        asked(monkeypatch, variables)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"optimizer": {"type": "Adam"}},
            "DeepSpeed's configuration has 'optimizer'; wanted none, since the stage's Schedule",
        ),
        (
            {"bf16": {"enabled": True}},
            "DeepSpeed's bf16.enabled is True; wanted False or 'auto': the package decides it.",
        ),
        (
            {"fp16": {"enabled": True}},
            "DeepSpeed's fp16.enabled is True; wanted False or 'auto': the package decides it.",
        ),
    ],
)
def test_a_deepspeed_file_decides_no_part_of_the_result(
    config: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}, **config}), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=message):
        asked(monkeypatch, ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")})


def test_deepspeed_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(sharding, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"DeepSpeed, which is not installed\. pip install 'llavamed-peft\[distributed\]'"
    ):
        asked_sharding(torch.float32, 1.0)


def test_4_bit_weights_are_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    data = {"align": [Conversation("0", (Turn("user", "why?"), Turn("assistant", "so")))]}
    curriculum = Curriculum((Stage("align", "projector", Schedule(epochs=1, learning_rate=1e-3)),))
    with pytest.raises(
        ConfigError,
        match=r"quantization is 'nf4' and the launch configuration shards \(fsdp2\); wanted one of the",
    ):
        base = Path(__file__).parents[1] / "recipes" / "demo" / "tiny-llava"
        curriculum_finetune(base, data, tmp_path / "out", curriculum=curriculum, quantization="nf4")
    assert not (tmp_path / "out").exists()


def test_the_launchers_variables_are_put_aside_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = dict(os.environ)
    with launcher_aside():
        assert (os.environ["ACCELERATE_USE_FSDP"], os.environ["ACCELERATE_MIXED_PRECISION"]) == (
            "false",
            "no",
        )
        assert "ACCELERATE_USE_CPU" not in os.environ
    assert dict(os.environ) == before


def test_the_optimizers_state_continues_over_another_number_of_processes(tmp_path: Path) -> None:
    """Two steps of AdamW in two processes, then two more in these, in two fresh ones or in one: the same."""
    base = tiny.build(tmp_path / "base")
    (tmp_path / "script.py").write_text(OPTIMIZER, encoding="utf-8")
    for begins, processes in (("new", 2), ("resumed", 2), ("resumed", 1)):
        torchrun = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
        )
        words = [sys.executable, *torchrun, str(tmp_path / "script.py"), str(base), str(tmp_path), begins]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    middle = torch.load(tmp_path / "middle.pt")
    assert {name.rpartition("/")[0] for name in middle["optimizer"]} == set(middle["tensors"])
    uninterrupted = torch.load(tmp_path / "new-2.pt")
    for resumed in ("resumed-2.pt", "resumed-1.pt"):
        for name, tensor in torch.load(tmp_path / resumed).items():
            torch.testing.assert_close(tensor, uninterrupted[name], rtol=0, atol=1e-6)
