"""FlexAttention's CUDA kernels for packed rows, as Inductor writes them, run in Triton's interpreter: no GPU
is there.

One process for each case, since Triton reads once whether it interprets. What only a GPU shows is left out:
bfloat16, time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from packed import KINDS

ROOT = Path(__file__).parents[1]

SCRIPT = """
import functools, json, sys
from pathlib import Path
import cuda_without_gpu
import torch

backend, kernels = cuda_without_gpu.pretend(cuda_without_gpu.GPUS["sm_80"])
torch.compile = functools.partial(torch.compile, backend=backend)

from packed import assert_same, draw_conversations, draw_images, loss_and_gradients, trainable
from llavamed_peft.modeling.parts import bare
from llavamed_peft.packing import PackedCollator, masks

base, folder, trains, number, bound = sys.argv[1:]
conversations = draw_conversations(draw_images(Path(folder)))[: int(number)]
model, processor = trainable(base, trains)
padded = loss_and_gradients(model, PackedCollator(processor, layout="padded")(conversations))
masks.has_triton = lambda: True
assert masks.choose_attention(bare(model), torch.device("cuda"), torch.float32) == "flex_attention"
if trains == "lora":
    bare(model).gradient_checkpointing_enable({"use_reentrant": False})
    bare(model).enable_input_require_grads()
batch = PackedCollator(processor, max_row_tokens=int(bound)).inputs(conversations)
shape = list(batch["input_ids"].shape)
packed = loss_and_gradients(model, batch | masks.attention_inputs(batch.pop("ends"), model.config))
assert_same(packed, padded)
templates = {kernel.name.rstrip("_0123456789") for kernel in kernels if "_tem_" in kernel.name}
print(json.dumps([shape, sorted(templates)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trains", "conversations", "bound", "shape"),
    [
        ("llava", "full", 3, 4096, [1, 88]),  # shorter than a block, with grouped heads
        ("llava", "lora", 3, 60, [2, 57]),  # padding after the shorter row, activations computed again
        ("llava_onevision", "full", 2, 4096, [1, 144]),  # two blocks
    ],
)
def test_loss_and_every_gradient_are_the_padded_batchs(
    kind: str, trains: str, conversations: int, bound: int, shape: list[int], tmp_path: Path
) -> None:
    base = tiny.build(tmp_path / kind, kind, *KINDS[kind])
    given = [str(base), str(tmp_path), trains, str(conversations), str(bound)]
    found, kernels = run_interpreted(["-c", SCRIPT, *given])
    assert found == shape
    assert kernels == ["triton_tem_fused_flex_attention", "triton_tem_fused_flex_attention_backward"]


def run_interpreted(command: list[str]) -> list[object]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}:{ROOT / 'tests'}", "TRITON_INTERPRET": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
