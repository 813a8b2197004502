"""What FlexAttention's kernels for packed rows take of a GPU, compiled for it without one.

    python benchmarks/flex_kernels.py --log
    python benchmarks/flex_kernels.py --gpus sm_80 --heads bfloat16:64     # one GPU, one kind of head

Inductor's kernels for the mask and the options that `packing/masks.py` gives FlexAttention, forward and
backward, as transformers has it compiled, four query heads to a key's; compiled by Triton and its `ptxas`
(`cuda_without_gpu.py`). A kernel that needs more shared memory than a block may have does not start; what is
spilled from its registers is slow. That the kernels are right is `tests/test_flex_kernels.py`'s business,
how fast they are only a GPU's (`packing_gpu.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

from workbench import heading, run_apart, write_down

GPUS = {"sm_75": "T4", "sm_80": "A100", "sm_86": "RTX 3090", "sm_89": "RTX 4090, L4", "sm_90": "H100, H200"}
HEADS = [f"bfloat16:{width}" for width in (64, 128, 256)] + [f"float32:{width}" for width in (32, 64, 128)]
TOKENS = 1100  # of a row; no multiple of a block
PASSES = ("forward", "backward")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="to compile for")
    parser.add_argument(
        "--heads", nargs="+", default=HEADS, metavar="DTYPE:WIDTH", help="what attention computes in, and on"
    )
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    # One GPU, in a process of its own
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.apart:
        print(json.dumps([compiled(options.gpus[0], *head.split(":")) for head in options.heads]))
        return
    rows = []
    for gpu in options.gpus:
        # Which it has not
        heads = [head for head in options.heads if not (gpu == "sm_75" and head.startswith("bfloat16"))]
        found = run_apart(__file__, ["--apart", "--gpus", gpu, "--heads", *heads]) if heads else []
        rows += [{"gpu": gpu, "head": head, **kernels} for head, kernels in zip(heads, found, strict=True)]
        print(f"{gpu}: {len(heads)} kinds of heads compiled", file=sys.stderr)
    result = {**heading("flex_kernels", ("torch", "triton", "transformers")), "rows": rows}
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, "-".join(options.gpus))


def compiled(gpu_name: str, dtype_name: str, width: str) -> dict[str, Any]:
    """What the kernels of both passes take on a GPU, in this process."""
    from types import SimpleNamespace

    import cuda_without_gpu
    import torch
    from transformers import LlamaConfig
    from transformers.integrations import flex_attention

    from llavamed_peft.packing.masks import attention_inputs

    gpu = cuda_without_gpu.GPUS[gpu_name]
    backend, kernels = cuda_without_gpu.pretend(gpu)
    compile_any = torch.compile
    torch.compile = functools.partial(compile_any, backend=backend)
    torch._dynamo.reset()
    flex_attention.WrappedFlexAttention._instance = None
    config = LlamaConfig()
    config._attn_implementation = "flex_attention"
    query, *key_and_value = (
        torch.randn(1, heads, TOKENS, int(width), dtype=getattr(torch, dtype_name), requires_grad=True)
        for heads in (4, 1, 1)
    )
    given = attention_inputs(torch.full((1, TOKENS), TOKENS), config)
    output, _ = flex_attention.flex_attention_forward(
        SimpleNamespace(training=True), query, *key_and_value, **given
    )
    output.sum().backward()
    torch.compile = compile_any
    found = {}
    for name in PASSES:
        (kernel,) = [
            one for one in kernels if "_tem_" in one.name and ("backward" in one.name) == (name == "backward")
        ]
        takes = cuda_without_gpu.takes(kernel, gpu)
        found[name] = {**takes._asdict(), "fits": takes.shared_kb <= gpu.shared_kb}
    return found


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    from llavamed_peft.packing.masks import WIDEST_HEAD

    widest = {str(dtype).removeprefix("torch."): width for dtype, width in WIDEST_HEAD.items()}
    at_most = " and ".join(f"{width} in {dtype}" for dtype, width in widest.items())
    table, misfits = [], []
    for row in result["rows"]:
        dtype, width = row["head"].split(":")
        if int(width) <= widest[dtype] and not all(row[name]["fits"] for name in PASSES):
            misfits.append(f"{row['gpu']} {row['head']}")
        cells = [
            f"{'' if row[name]['fits'] else '**does not fit**: '}{row[name]['shared_kb']:.0f} KB, "
            f"{row[name]['spilled']:,} bytes"
            for name in PASSES
        ]
        table.append(f"| {row['gpu']} ({GPUS[row['gpu']]}) | {dtype} | {width} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"## {result['date']} · flex_kernels: what FlexAttention's kernels take of a GPU, compiled "
            "without one",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            "- What: shared memory of a block, bytes spilled from a thread's registers",
            f"- Expected: heads of at most {at_most} fit, which `packing/masks.py` gives FlexAttention",
            f"- Result: {'as expected' if not misfits else 'not as expected: ' + ', '.join(misfits)}",
            "",
            "| GPU | dtype | width of a head | forward | backward |",
            "|---|---|---|---|---|",
            *table,
            "",
        ]
    )


if __name__ == "__main__":
    main()
