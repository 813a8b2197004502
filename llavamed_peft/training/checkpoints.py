"""Checkpoints of a stage that is still training: what is in one, how it is written, and which one to resume
from.

`<output_dir>/checkpoints/<stage>/step-<n>/` holds `tensors.safetensors` (what trains),
`optimizer.safetensors` (its state, by parameter name), `state.json` (schedule, random numbers of each
process, losses so far, rows that failed) and `checkpoint.json`, which lists the three with size and SHA-256.
A folder is there completely or not at all; the hashes find what a disk or a copy damaged later. The two
newest are kept.

The order of the data is in none of it: it is a function of seed, epoch and step.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import TrainingError
from ..modeling.sharding import as_sharded, free_gathered, whole
from ..modeling.tensors import Tensors
from ..storage.hashing import file_sha256
from ..storage.whole import not_written, remove_folder, write_folder

SCHEMA_VERSION = 1
KEPT = 2

_MANIFEST, _TENSORS, _OPTIMIZER, _STATE = (
    "checkpoint.json",
    "tensors.safetensors",
    "optimizer.safetensors",
    "state.json",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stage in the middle of its training.

    Args:
        path: the folder.
        step: optimizer steps taken.
        state: everything but the tensors, as `state.json` holds it.
    """

    path: Path
    step: int
    state: dict[str, Any] = field(repr=False)

    def began_with(self, begins_with: Mapping[str, str | None]) -> bool:
        """Whether the stage had these content hashes of base and parent when it began, as far as is known.

        A Hub id's is not before it was downloaded, and older checkpoints hold none.
        """
        then = self.state.get("begins_with")
        if not then:
            return True
        bases = (then["base"], begins_with["base"])
        return then["parent"] == begins_with["parent"] and (None in bases or bases[0] == bases[1])

    def tensors(self) -> Tensors:
        """What trains, as `trainable_tensors` gave it."""
        return load_file(self.path / _TENSORS)

    def optimizer(self) -> Tensors:
        """The optimizer's state, as `optimizer_tensors` gave it."""
        return load_file(self.path / _OPTIMIZER)


def save_checkpoint(
    folder: Path, step: int, tensors: Tensors, optimizer: Tensors, state: Mapping[str, Any]
) -> int:
    """Write `step-<step>` and remove all but the two newest.

    Args:
        folder: of the stage's checkpoints.

    Returns:
        Its size in bytes.

    Raises:
        TrainingError: it cannot be written. Those before it are intact.
    """

    def fill(partial: Path) -> None:
        save_file(tensors, partial / _TENSORS)
        save_file(optimizer, partial / _OPTIMIZER)
        (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(partial.iterdir())
        }
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    try:
        path = write_folder(folder / f"step-{step}", fill)
    except OSError as error:
        raise TrainingError(
            f"{not_written(folder / f'step-{step}', error)} {how_to_resume(folder)}"
        ) from error
    for old in _steps(folder)[:-KEPT]:
        remove_folder(folder / f"step-{old}")
    return sum(file.stat().st_size for file in path.iterdir())


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint of a stage, or `None`. Damaged ones are removed.

    Warns:
        UserWarning: some were damaged; which file of each, and what is taken instead.
    """
    faults: list[str] = []
    found = None
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step}"
        damage = fault(path)
        if damage is None:
            found = Checkpoint(path, step, json.loads((path / _STATE).read_text(encoding="utf-8")))
            break
        faults.append(damage)
        remove_folder(path)
    if faults:
        warnings.warn(f"{' '.join(faults)} Removed, since damaged. {how_to_resume(folder)}", stacklevel=2)
    return found


def how_to_resume(folder: Path) -> str:
    """What the same call would resume from, in a sentence."""
    steps = _steps(folder)
    if not steps:
        return (
            "This stage has no checkpoint; make the same call again to start it again after the finished "
            "stages."
        )
    return f"The checkpoint of step {steps[-1]} is intact; make the same call again to resume from it."


def _steps(folder: Path) -> list[int]:
    numbers = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's folder, naming the file; `None` where it is intact."""
    manifest_path = path / _MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest_path}: cannot be read ({error!r})."
    if manifest.get("schema_version") != SCHEMA_VERSION or set(files) != {_TENSORS, _OPTIMIZER, _STATE}:
        return f"{manifest_path}: is another version's, or incomplete."
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"{file}: is missing."
        if file.stat().st_size != size:
            return f"{file}: has {file.stat().st_size:,} bytes, was written with {size:,}."
        if file_sha256(file) != sha256:
            return f"{file}: its content is not what was written."
    return None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state on the CPU, as `<parameter>/<entry>`, such as `lm_head.weight/exp_avg`.

    Where the model is sharded, every process has to call this, and the main one gets the tensors, the others
    an empty mapping.
    """
    free_gathered(model)
    keeps = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        for entry, tensor in optimizer.state.get(parameter, {}).items():
            full = whole(tensor)
            if keeps:
                tensors[f"{name}/{entry}"] = full.detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, whatever order the groups hold their parameters in, over any number
    of processes.

    Raises:
        TrainingError: a tensor belongs to no parameter of the optimizer.
    """
    free_gathered(model)
    states: dict[str, Tensors] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        states[name][entry] = tensor
    # Saved by name, since the order of parameters depends on the groups and on the versions of the libraries.
    names = {parameter: name for name, parameter in model.named_parameters()}
    # torch numbers parameters through its groups
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    homeless = sorted(set(states) - set(order))
    if homeless:
        raise TrainingError(
            f"The checkpoint holds optimizer state of {len(homeless)} parameter(s) that do not train "
            f"({homeless[0]}). The installed peft or transformers names modules differently; use the "
            "versions it was saved with."
        )
    parameters = dict(model.named_parameters())
    state = {
        number: {entry: as_sharded(tensor, parameters[name]) for entry, tensor in states[name].items()}
        for number, name in enumerate(order)
        if name in states
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state() -> dict[str, Any]:
    """This process's random number generators: Python's, NumPy's, torch's and the current GPU's."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The inverse of `rng_state`; a GPU's is left alone where the state is of a process without one."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
