"""Bytes that processes send one another in an optimizer step, counted in the collectives themselves, beside
the formula.

    torchrun --nproc_per_node 2 benchmarks/communication.py runs/communication       # DDP
    accelerate launch --config_file <FSDP2's or DeepSpeed's> --num_processes 2 benchmarks/communication.py
    runs/communication

A full stage of the demo's tiny LLaVA trains on CPUs, several device batches a step. Every collective of one
training step passes
a dispatch mode, and its tensors become the bytes that one process sends in a ring of p: of N bytes gathered
or scattered (p - 1)/p N, of N bytes summed on every process twice as many. Printed as JSON. What is sent is
counted in parameters and holds at any size; how fast it goes is not measured here, since these processes
share one memory.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llavamed_peft import Conversation, Curriculum, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.parts import sharding_units
from llavamed_peft.modeling.scopes import unfreeze_full
from llavamed_peft.training.trainer import StageTrainer

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes" / "demo" / "tiny-llava"
STEP = 1  # whose collectives are counted; the first one also sets things up
SMALL = 100  # bytes: counts and norms, which do not grow with the model
FP32 = 4  # bytes; computed on a CPU

# Collective → its argument that holds all N bytes, and how many of them a process sends, times (p - 1)/p.
SENT = {"_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1), "allreduce_": (0, 2)}
NOT_COUNTED = ("barrier", "broadcast_")  # DDP sends the model's buffers round, some hundred bytes


class Counted(TorchDispatchMode):
    """Adds up what collectives send while it is active, by collective."""

    def __init__(self, processes: int):
        super().__init__()
        self.share = (processes - 1) / processes
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace == "c10d" and name not in NOT_COUNTED:
            argument, times = SENT[name]
            tensors = args[argument] if isinstance(args[argument], (list, tuple)) else [args[argument]]
            number = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if number > SMALL:
                self.sent[name.strip("_")] += round(number * times * self.share)
        return function(*args, **(kwargs or {}))


def formula(method: str | None, batches: int, processes: int) -> dict[str, int]:
    """Bytes that a process sends in a step of a full stage, by collective."""
    model = unfreeze_full(load_checkpoint(BASE)[0])

    def size(parameters: Iterable[torch.nn.Parameter]) -> int:
        """Elements; FSDP2 pads a tensor to as many rows as the processes divide."""
        rows = processes if method == "fsdp2" else 1
        return sum(p.numel() // len(p) * math.ceil(len(p) / rows) * rows for p in parameters)

    *layers, tower_layer = sharding_units(model)
    every, trained = (size(model.parameters()), size(p for p in model.parameters() if p.requires_grad))
    decoder = size(p for layer in layers for p in layer.parameters() if p.requires_grad)
    in_vain = size(tower_layer.parameters())  # FSDP2's backward gathers ahead one more than it needs
    numbers = {
        None: {"allreduce": 2 * trained},
        "fsdp2": {
            "allgather_base": batches * (every + decoder + in_vain),
            "reduce_scatter_base": batches * trained,
        },
        "zero2": {"allreduce": batches * 2 * trained, "allgather_base": trained},
        # with stage3_max_live_parameters and stage3_max_reuse_distance 0; else it keeps some gathered and
        # sends less
        "zero3": {
            "allgather_base": batches * (every + trained + decoder),
            "reduce_scatter_base": batches * trained,
        },
    }
    return {
        name: round(FP32 * number * (processes - 1) / processes) for name, number in numbers[method].items()
    }


def main() -> None:
    found: dict[str, Any] = {}
    step = StageTrainer.training_step

    def counted_step(self: StageTrainer, model: torch.nn.Module, inputs: Any, *more: Any) -> torch.Tensor:
        if self.state.global_step != STEP:
            return step(self, model, inputs, *more)
        with Counted(self.args.world_size) as counted:
            loss = step(self, model, inputs, *more)
        found.update(sent=dict(counted.sent), batches=len(inputs), processes=self.args.world_size)
        return loss

    StageTrainer.training_step = counted_step  # this script's own process
    folder = Path(sys.argv[1])
    image = str(ROOT / "recipes" / "demo" / "answers.png")
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A scan."))
    rows = [Conversation(str(i), turns, (image,)) for i in range(24)]
    stage = Stage("full", "full", Schedule(epochs=1, learning_rate=1e-5, global_batch=8))
    # Recomputing as with a GPU
    how = {
        "layout": "padded",
        "max_row_tokens": 100,
        "gradient_checkpointing": True,
    }
    adapters = curriculum_finetune(BASE, {"full": rows}, folder, curriculum=Curriculum((stage,)), **how)
    method = adapters["full"].record.computing["sharding"]
    expected = formula(method, found["batches"], found["processes"])
    print(json.dumps({"method": method, **found, "expected": expected}))
    sys.exit(found["sent"] != expected)


if __name__ == "__main__":
    main()
