"""A CUDA GPU that is not there: what torch compiles for it is kept, compiled by Triton, or run in Triton's
interpreter.

`pretend` changes the process it is called in, for good: call it in one of its own, before anything is
compiled. It then gives `torch.compile` a backend that takes tensors of a CPU and lets Inductor lower their
graph as if they lay on the GPU, by its own rules for CUDA. With `TRITON_INTERPRET=1` in the environment, set
before torch is imported, what Inductor wrote is run: its calls, on the tensors' own memory, each kernel by
Triton's interpreter, which computes in float32 (its bfloat16 is wrong). Without, the kernels are kept only,
and nothing is computed; `takes` compiles one for the GPU as the driver there would.

It leans on private names of torch 2.13 and Triton 3.7 throughout. Left out: the GPU's memory, its rounding,
its races, its time.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch._C._dynamo import guards
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import codecache, compile_fx, config, scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_compat, triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex_module
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Its package has an operator of that name
FLEX_OPERATOR = sys.modules["torch._higher_order_ops.flex_attention"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.device("cuda", 0)


class Gpu(NamedTuple):
    """Compute capability, multiprocessors, KB of shared memory that a block may have."""

    capability: tuple[int, int]
    processors: int
    shared_kb: int

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


GPUS = {
    "sm_75": Gpu((7, 5), 40, 64),  # T4
    "sm_80": Gpu((8, 0), 108, 163),  # A100
    "sm_86": Gpu((8, 6), 82, 99),  # RTX 3090
    "sm_89": Gpu((8, 9), 128, 99),  # RTX 4090, L4
    "sm_90": Gpu((9, 0), 132, 227),  # H100, H200
}


class Kernel(NamedTuple):
    """One that Inductor wrote."""

    name: str
    source: str


class Takes(NamedTuple):
    """What a compiled kernel takes of a GPU: KB of shared memory a block, registers a thread, bytes spilled
    after these."""

    shared_kb: float
    registers: int
    spilled: int


def pretend(gpu: Gpu) -> tuple[Callable[..., Any], list[Kernel]]:
    """Make this process believe in a GPU.

    Returns:
        A backend for `torch.compile`, and the list to which its kernels are added.
    """
    properties = SimpleNamespace(
        name="none",
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.processors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=1 << 34,
        L2_cache_size=1 << 22,
        gcnArchName="",
        shared_memory_per_block_optin=gpu.shared_kb * 1024,
    )
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: gpu.capability,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    answers |= {"is_available": lambda: True, "raise_if_triton_unavailable": lambda device=None: None}
    answers |= {
        name: lambda device=None: 0 for name in ("get_raw_stream", "exchange_device", "maybe_exchange_device")
    }
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(answer))
    CudaInterface.Worker.get_device_properties = staticmethod(answers["get_device_properties"])
    CudaInterface.Worker.current_device = staticmethod(answers["current_device"])
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda._DeviceGuard = _no_guard
    guards._empty_strided_cuda = guards._empty_strided_cpu
    scheduler.has_triton = lambda: True
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(_driver(gpu))
    config.force_disable_caches = True
    config.compile_threads = 1
    kernels: list[Kernel] = []
    AsyncCompile.triton = functools.partialmethod(_keep, kernels)
    CachingAutotuner.run = _interpret if INTERPRETED else lambda self, *args, **kwargs: None
    if INTERPRETED:
        for name in ("exp2", "log2", "exp", "log"):  # the interpreter knows no device library
            setattr(triton_compat.libdevice, name, getattr(triton.language.math, name))
    _allow_flex_attention()
    return functools.partial(compile_fx.compile_fx, inner_compile=_compile_for_cuda), kernels


def takes(kernel: Kernel, gpu: Gpu) -> Takes:
    """Compile a kernel with Triton and its `ptxas`.

    Raises:
        RuntimeError: it does not compile.
    """
    compiled = getattr(codecache.PyCodeCache.load(kernel.source), kernel.name)
    chosen = compiled.configs[0]  # of several, timing would choose
    meta = compiled._create_compile_meta(chosen)
    source = ASTSource(compiled.fn, meta["signature"], meta["constants"], meta["configs"][0])
    binary = triton.compile(source, target=gpu.target, options=compiled._create_compile_options(chosen, meta))
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        architecture = re.search(r"\.target (sm_\w+)", binary.asm["ptx"])[1]
        command = [str(assembler), "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", said))
    spilled = max(int(number) for number in re.findall(r"(\d+) bytes spill stores", said))
    return Takes(binary.metadata.shared / 1024, registers, spilled)


@contextmanager
def _no_guard(*device: Any) -> Iterator[None]:
    yield


def _driver(gpu: Gpu) -> Any:
    """Triton's, as far as it is asked."""
    limits = {
        "max_shared_mem": gpu.shared_kb * 1024,
        "multiprocessor_count": gpu.processors,
        "warpSize": 32,
        "max_num_regs": 65536,
    }
    return SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: limits),
        get_current_target=lambda: gpu.target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        set_current_device=lambda device: None,
    )


def _keep(self: AsyncCompile, kernels: list[Kernel], name: str, source: str, device_str: str = "cuda") -> Any:
    """In the place of compiling it in another process."""
    kernels.append(Kernel(name, source))
    return getattr(codecache.PyCodeCache.load(source), name)


def _interpret(self: CachingAutotuner, *args: Any, stream: int, **kwargs: Any) -> None:
    """What a launcher does: work the grid out and call the kernel, which here is the interpreter's."""
    chosen = self.configs[0]  # of several, timing would choose
    values = {**self.triton_meta["constants"], **chosen.kwargs}
    asked = [name for name in self.fn.arg_names if name not in values]
    values |= zip([*asked, *self.inductor_meta.get("extra_launcher_args", [])], args, strict=True)
    grid = GridExpr.from_meta(self.inductor_meta, chosen).eval_slow(values)
    self.fn[grid](**{name: values[name] for name in self.fn.arg_names})


def _allow_flex_attention() -> None:
    """Have FlexAttention train on tensors of a CPU, and write what its backward pass reads."""
    flex_module._validate_device = lambda *tensors: None
    options = flex_module._apply_kernel_options
    flex_module._apply_kernel_options = lambda *given: {**options(*given), "OUTPUT_LOGSUMEXP": True}
    lay_out = FLEX_OPERATOR._permute_strides

    def without_copying(out: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        if not isinstance(out, FakeTensor):
            return lay_out(out, strides)
        laid = lay_out(torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta"), strides)
        return out.new_empty_strided(laid.shape, laid.stride())

    FLEX_OPERATOR._permute_strides = without_copying


def _compile_for_cuda(graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
    """Inductor over a graph and inputs that are moved to the GPU."""
    for module in (one for one in graph.modules() if isinstance(one, torch.fx.GraphModule)):
        for node in module.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": CUDA}
            for key in node.meta.keys() & {"val", "example_value"}:
                node.meta[key] = tree_map(_moved, node.meta[key])
        module.recompile()
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    moved = [
        _moved(node.meta["val"]) if isinstance(one, torch.Tensor) else one
        for node, one in zip(places, inputs, strict=True)
    ]
    torch._C._ensureCUDADeviceGuardSet()
    return compile_fx.compile_fx_inner(graph, moved, **kwargs | {"cudagraphs": False})


def _moved(value: Any) -> Any:
    if not isinstance(value, FakeTensor) or value.device.type == "cuda":
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
