"""Several processes train what one does: really several, over gloo, each with a whole model or with shards of
one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llavamed_peft import StageAdapter
from llavamed_peft.running.summary import read_metrics

# 20 to 60 s each on two cores with little beside them; with much beside them one took five minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent

SCRIPT = """
import os
import signal
import sys
import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from llavamed_peft import Conversation, Curriculum, LoraSpec, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.modeling.parts import bare
from llavamed_peft.training.optimizer import parameter_groups
from llavamed_peft.training.trainer import StageTrainer

base, images, out, processes, how, dtype, stopped, attention = sys.argv[1:]
if attention == "flex_attention":
    import flex_on_cpu
    flex_on_cpu.allow()
    flex_on_cpu.choose()

def plain_descent(self, model=None):  # Adam would blow rounding up
    assert bare(self.model).config.text_config._attn_implementation == attention
    groups = parameter_groups(model or self.model, self.stage.schedule, 0.0, ())
    self.optimizer = torch.optim.SGD(groups)
    trained = [parameter for group in groups for parameter in group["params"]]
    if how == "fsdp2":  # really in shards, about equal ones
        mine = sum(parameter.to_local().numel() for parameter in trained)
        assert mine < 1.1 * sum(parameter.numel() for parameter in trained) / int(processes), mine
    else:
        assert not any(isinstance(parameter, DTensor) for parameter in trained)
    return self.optimizer

def training_step(self, model, *inputs):
    if how.startswith("zero"):
        assert model.zero_optimization_stage() == int(how[-1])
        whole = [tensor for tensor in model.parameters() if tensor.requires_grad and tensor.numel()]
        assert bool(whole) == (how == "zero2"), len(whole)
    return step(self, model, *inputs)

step, StageTrainer.training_step = StageTrainer.training_step, training_step
StageTrainer.create_optimizer = plain_descent
compute = StageTrainer._summed_loss

def stopping(self, model, batch):  # the last process alone is signalled, while it computes
    if (self.stage.name, self.state.global_step, self.args.process_index) == (stopped, 3, int(processes) - 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return compute(self, model, batch)

if stopped:
    StageTrainer._summed_loss = stopping
said = (Turn("user", "<image>\\nwhat is this?"), Turn("assistant", "a heart"))
answers = [Turn("assistant", "a heart " * (1 + i % 3)) for i in range(9)]
rows = [
    Conversation(str(i), (said[0], answer), (f"{images}/{i % 4}.png",)) for i, answer in enumerate(answers)
]
rows += [Conversation("text", (Turn("user", "what is a lung?"), Turn("assistant", "an organ")))] * 2
rows += [Conversation("cut", said, (f"{images}/cut.png",))]
schedule = Schedule(epochs=2, learning_rate=0.05, global_batch=5)
lora = LoraSpec(rank=4, alpha=8, dropout=0.0)
align, vqa = Stage("align", "projector", schedule), Stage("vqa", "lora", schedule, lora)
more = Stage("more", "full", schedule)
stages = (align, vqa, more) if dtype == "float32" else (vqa, align, more)
data = {stage.name: rows for stage in stages}
how_computed = dict(eval_steps=2, max_row_tokens=100, dtype=dtype, gradient_checkpointing=how != "alone")
how_computed |= dict(eval_data=data, max_rejected=0.1)
curriculum_finetune(base, data, out, curriculum=Curriculum(stages), **how_computed)
assert PartialState().num_processes == int(processes), PartialState()
"""

# As `accelerate launch` wants them; what the recipes' own have for GPUs is there too, where a CPU can
# take it.
LAUNCH = {
    "fsdp2": {
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",  # the package's dtype decides: float32 on a CPU
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
        },
    },
    "zero2": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 2, "gradient_clipping": 1.0},
    },
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": "zero3.json", "zero3_init_flag": True},
    },
}

# Without the threshold DeepSpeed keeps weights as small as the tiny model's whole.
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": "auto",
}

STAGES = ("align", "vqa", "more")

WITHOUT_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (extra distributed)"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny.build(folder / "base")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    for i in range(4):
        Image.new("RGB", (40 + 20 * i, 60), (50 * i, 90, 20)).save(folder / f"{i}.png")
    Image.effect_noise((90, 60), 50).save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "zero3.json").write_text(json.dumps(ZERO3), encoding="utf-8")
    for how, settings in LAUNCH.items():
        (folder / f"{how}.yaml").write_text(
            yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **settings}), "utf-8"
        )
    return folder


def launch(
    place: Path,
    processes: int,
    how: str,
    dtype: str = "float32",
    out: Path | None = None,
    stopped: str = "",
    attention: str = "sdpa",
) -> Path:
    out = place / f"run-{how}-{processes}-{dtype}" if out is None else out
    port = ["--main_process_port", "0"]  # any free one
    accelerate = [
        "accelerate.commands.launch",
        "--config_file",
        str(place / f"{how}.yaml"),
        "--num_machines",
        "1",
        *port,
    ]
    torchrun = ["torch.distributed.run", "--standalone"]
    launcher = [
        *(accelerate if how in LAUNCH else torchrun),
        "--num_processes" if how in LAUNCH else "--nproc_per_node",
    ]
    program = [sys.executable] if processes == 1 else [sys.executable, "-m", *launcher, str(processes)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [
        str(place / "script.py"),
        str(place / "base"),
        str(place),
        str(out),
        str(processes),
        how,
        dtype,
        stopped,
        attention,
    ]
    done = subprocess.run(
        [*program, *words], env=environment, cwd=place, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == bool(stopped), done.stderr[-3000:]
    assert not stopped or f"Stopped by SIGTERM after step 4 of 6 of stage '{stopped}'" in done.stderr, (
        done.stderr[-3000:]
    )
    return out


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    return launch(place, 1, "alone")


SHARDED = [
    "fsdp2",
    pytest.param("zero2", marks=WITHOUT_DEEPSPEED),
    pytest.param("zero3", marks=WITHOUT_DEEPSPEED),
]


def agree(one: Path, other: Path, bound: float) -> None:
    """Two runs left the same tensors, of the same dtypes, up to a bound."""
    for stage in STAGES:
        (weights,) = (path.name for path in (one / stage).glob("*.safetensors"))
        tensors, expected = (load_file(other / stage / weights), load_file(one / stage / weights))
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            name: t.dtype for name, t in expected.items()
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "stage"), [("ddp", "vqa"), ("fsdp2", "more")])
def test_processes_stop_together_and_resume_as_many_or_fewer(
    how: str, stage: str, place: Path, alone: Path
) -> None:
    stopped = launch(place, 2, how, out=place / f"stopped-{how}", stopped=stage)
    assert sorted(path.name for path in (stopped / "checkpoints" / stage).iterdir()) == ["step-3", "step-4"]
    fewer = Path(shutil.copytree(stopped, place / f"fewer-{how}"))
    agree(launch(place, 2, how), launch(place, 2, how, out=stopped), 0)
    agree(alone, launch(place, 1, "alone", out=fewer), 1e-5)
    for run in (stopped, fewer):
        assert (run / "rejected.jsonl").read_text() == (alone / "rejected.jsonl").read_text()
        steps = [(record["stage"], record["step"], "loss" in record) for record in read_metrics(run)]
        assert steps == [
            (record["stage"], record["step"], "loss" in record) for record in read_metrics(alone)
        ]


@WITHOUT_DEEPSPEED
def test_under_deepspeed_a_stage_that_was_stopped_begins_again(place: Path, alone: Path) -> None:
    stopped = launch(place, 2, "zero2", out=place / "stopped-zero2", stopped="vqa")
    assert not (stopped / "checkpoints" / "vqa").exists()
    agree(alone, launch(place, 2, "zero2", out=stopped), 1e-5)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("how", ["ddp", *SHARDED])
def test_losses_tensors_and_counts_are_one_processes(
    how: str, processes: int, place: Path, alone: Path
) -> None:
    together = launch(place, processes, how)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (alone, together)
    ]
    assert len(logs[0]) == len(logs[1])
    for one, several in zip(*logs, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert several.get(key) == pytest.approx(one.get(key), abs=1e-5)
    assert max(record.get("grad_norm", 0) for record in logs[0]) > 2, "nothing was clipped"
    for stage in STAGES:
        one, several = (StageAdapter.load(alone / stage), StageAdapter.load(together / stage))
        assert (one.record.processes, several.record.processes) == (1, processes)
        assert several.record.computing["sharding"] == (how if how in LAUNCH else None)
        assert one.record.data == several.record.data and one.record.data[0].failed == 1
        for key in ("steps", "conversations", "supervised_tokens", "trainable_parameters"):
            assert one.metrics[key] == several.metrics[key]
        assert sorted(path.name for path in one.path.iterdir()) == sorted(
            path.name for path in several.path.iterdir()
        )
    agree(alone, together, 1e-5)
    _, info = AutoModelForImageTextToText.from_pretrained(together / "more", output_loading_info=True)
    assert not any(info.values()), info
    assert (alone / "rejected.jsonl").read_text() == (together / "rejected.jsonl").read_text()


@pytest.mark.parametrize("how", ["ddp", *SHARDED])
def test_what_spreads_a_model_hands_flex_attention_its_mask(how: str, place: Path, alone: Path) -> None:
    """A block mask is no tensor, and goes through DDP's, FSDP2's and DeepSpeed's hands."""
    agree(alone, launch(place, 2, how, out=place / f"flex-{how}", attention="flex_attention"), 1e-5)


@pytest.fixture(scope="module")
def alone_in_bf16(place: Path) -> Path:
    return launch(place, 1, "alone", "bfloat16")


@pytest.mark.parametrize("how", SHARDED)
def test_trained_in_bf16_the_tensors_are_kept_in_fp32(how: str, place: Path, alone_in_bf16: Path) -> None:
    """Sharded weights are rounded to compute with; what is summed up and handed on is not (rounded, 2e-3 is
    lost)."""
    together = launch(place, 2, how, "bfloat16")
    for stage in STAGES:
        (weights,) = (path.name for path in (alone_in_bf16 / stage).glob("*.safetensors"))
        tensors, expected = (
            load_file(together / stage / weights),
            load_file(alone_in_bf16 / stage / weights),
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=2e-4)
    before, carried = (
        StageAdapter.load(together / "vqa").tensors(),
        StageAdapter.load(together / "align").tensors(),
    )
    frozen = [name for name in carried if ".lora_" in name]
    assert frozen and all(torch.equal(carried[name], before[name]) for name in frozen)
