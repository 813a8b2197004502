"""What a stage leaves: a folder that stock PEFT loads on the raw base, and how it is written, read, checked and merged.

One folder is one complete state: the projector in full and, from the first LoRA stage on, the LoRA tensors, in PEFT's own
format; the processor; `stage.json` with lineage, data and numbers; a Hub card. A `full` stage leaves a checkpoint folder
instead, with the same `stage.json`. Folders are written under another name and renamed when whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .errors import AdapterError, ConfigError
from .files import flush
from .hashing import file_sha256, weights_sha256
from .modeling.load import Quantization, load_checkpoint
from .modeling.parts import IN_PEFT, LANGUAGE, PROJECTOR, Tensors, check_places, load_tensors
from .modeling.processor import load_processor, save_processor
from .stages import Stage

SCHEMA_VERSION = 1
RECORD, WEIGHTS, CONFIG, CARD = "stage.json", "adapter_model.safetensors", "adapter_config.json", "README.md"
_BASE = {"name": str, "model_type": str, "language_model": str, "vision_tower": str}
_FILE = {"file": str, "sha256": str, "rows": int, "used": int, "rejected": dict, "failed": int}
# What must be in a record, and of which kind; in a tuple: or nothing.
_SHAPE = {
    "stage": dict,
    "kind": str,
    "base": _BASE,
    "parent": ({"stage": str, "sha256": str},),
    "data": [_FILE],
    "eval_data": [_FILE],
    "metrics": dict,
    "versions": dict,
    "device": str,
    "sha256": str,
}


@dataclass(frozen=True, slots=True)
class StageAdapter:
    """A finished stage on disk.

    Args:
        path: its folder.
        record: what its `stage.json` says.
    """

    path: Path
    record: dict[str, Any] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> StageAdapter:
        """Open a stage's folder, or a Hub repository of one, and check that it is whole.

        Raises:
            AdapterError: there is none, it was not made by this package, or its weights are not those that were written.
        """
        path = local_folder(folder)
        record = read_record(path)
        adapter = cls(path, record)
        if not adapter.is_checkpoint and not (path / WEIGHTS).is_file():
            raise AdapterError(f"{path}: has no {WEIGHTS}; wanted a whole folder. Are its weights on the Hub? See its {CARD}.")
        if not adapter.is_checkpoint:
            config = file_sha256(path / CONFIG) if (path / CONFIG).is_file() else None
            if config != record.get("config_sha256"):
                raise AdapterError(f"{path / CONFIG}: is missing or was changed. Copy or download the folder again.")
        found = weights_sha256(path)
        if found != record["sha256"]:
            raise AdapterError(
                f"{path}: the weights have sha256 {found[:12]}…, {RECORD} says {record['sha256'][:12]}…; the folder is damaged "
                "or was changed. Copy or download it again."
            )
        return adapter

    @property
    def stage(self) -> Stage:
        """The stage as it was trained."""
        return Stage.from_dict(self.record["stage"], str(self.path / RECORD))

    @property
    def parent(self) -> dict[str, Any] | None:
        """Name and content hash of the stage it began from; `None` for a first stage."""
        return self.record["parent"]

    @property
    def metrics(self) -> dict[str, Any]:
        """Losses, counts and times of the training."""
        return self.record["metrics"]

    @property
    def is_checkpoint(self) -> bool:
        """A `full` stage: a checkpoint of its own, not an adapter."""
        return self.record["kind"] == "checkpoint"

    def tensors(self) -> Tensors:
        """The adapter's tensors under PEFT's names, fp32."""
        return load_file(self.path / WEIGHTS)

    def peft_config(self) -> LoraConfig:
        """The adapter's stock configuration."""
        return LoraConfig.from_pretrained(str(self.path))

    def merge(self, base: str | Path, out: str | Path, dtype: str | torch.dtype | None = None) -> Path:
        """Write base and adapter as one checkpoint, in 16 or 32 bit.

        Args:
            base: the checkpoint the adapter belongs to.
            out: the folder to write; it must not be there yet.
            dtype: of the merged weights; `None` takes the base's stored one.

        Returns:
            `out`.

        Raises:
            AdapterError: the adapter does not fit the base, it is a full checkpoint already, or `out` is there.
            CheckpointError: the base cannot be loaded.
            ConfigError: an unknown `dtype`.
        """
        if self.is_checkpoint:
            raise AdapterError(f"{self.path}: is a checkpoint already; nothing to merge. Load it as it is.")
        refuse_existing(Path(out))  # before a model is loaded
        model, processor = load_stage(base, self, dtype=dtype)
        merged = model.merge_and_unload()

        def fill(folder: Path) -> None:
            merged.save_pretrained(folder)
            save_processor(processor, folder)

        return write_folder(Path(out), fill)


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder's `stage.json` says, its weights aside.

    Raises:
        AdapterError: there is none, or it is damaged or another version's.
    """
    path = folder / RECORD
    if not path.is_file():
        raise AdapterError(
            f"{folder}: has no {RECORD}; wanted a folder that a finished stage left. A stock PEFT adapter is loaded with "
            "PeftModel.from_pretrained."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: is not JSON ({error}); the folder is damaged.") from error
    version = record.get("schema_version", SCHEMA_VERSION) if isinstance(record, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise AdapterError(
            f"{path}: schema_version is {version!r}; this version of llavamed-peft reads {SCHEMA_VERSION}. Try another one."
        )
    fault = _misfit(record, _SHAPE, "the record")
    if fault is None:
        try:
            Stage.from_dict(record["stage"], "stage")
        except ConfigError as error:
            fault = str(error)
        if record["kind"] not in ("adapter", "checkpoint"):
            fault = f"kind is {record['kind']!r}"
    if fault is not None:
        raise AdapterError(f"{path}: {fault}; the folder is damaged. Copy or download it again.")
    return record


def _misfit(value: Any, shape: Any, name: str) -> str | None:
    """How a value does not fit a shape of `_SHAPE`, or `None`."""
    if isinstance(shape, tuple):
        return None if value is None else _misfit(value, shape[0], name)
    if not isinstance(value, shape if isinstance(shape, type) else type(shape)):
        return f"{name} is {value!r}"
    inner: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(shape, dict):
        if missing := [key for key in shape if key not in value]:
            return f"{name} lacks {', '.join(missing)}"
        inner = ((key, value[key], shape[key]) for key in shape)
    elif isinstance(shape, list):
        inner = ((f"{name}[{place}]", item, shape[0]) for place, item in enumerate(value))
    return next((fault for key, item, wanted in inner if (fault := _misfit(item, wanted, key)) is not None), None)


def load_stage(
    base: str | Path,
    adapter: StageAdapter | str | Path,
    quantization: Quantization = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[torch.nn.Module, ProcessorMixin]:
    """A model with a stage's adapter on it (a full stage: its own checkpoint), in eval mode, and the stage's processor.

    Args:
        base: Hub id or folder of the raw base; for a `full` stage's checkpoint it is not read.
        adapter: a `StageAdapter`, its folder, or a Hub repository of one.
        quantization: `"nf4"` for a 4-bit language model.
        dtype: of the base's weights; `None` takes the stored one. The projector is rounded to it, as stock PEFT does.

    Raises:
        AdapterError: the folder is damaged, or was trained on another architecture.
        CheckpointError: the base cannot be loaded.
        ConfigError: an unknown `quantization` or `dtype`.

    Warns:
        UserWarning: the base has the right shape but is not the one the stage was trained on.
    """
    adapter = adapter if isinstance(adapter, StageAdapter) else StageAdapter.load(adapter)
    if adapter.is_checkpoint:
        return load_checkpoint(adapter.path, quantization, dtype)
    model, _ = load_checkpoint(base, quantization, dtype)
    check_fits(model, adapter)
    warn_of_another_base(base_record(base, model.config), adapter)
    peft_model = PeftModel.from_pretrained(model, str(adapter.path))
    check_arrived(peft_model, adapter)
    return peft_model.eval(), load_processor(adapter.path, model.config)


def base_record(base: str | Path, config: PreTrainedConfig, sha256: str | None = None) -> dict[str, Any]:
    """What identifies a base: the content hash of its weights, with its Hub id and revision or its folder's last name.

    A local folder's weights are read for it, unless their hash is known; a Hub id's are named by their hashes in the cache.
    """
    shape = {
        "model_type": config.model_type,
        "language_model": config.get_text_config().model_type,
        "vision_tower": config.vision_config.model_type,
    }
    if Path(base).is_dir():
        sha256 = sha256 or weights_sha256(base)
        return {"id": None, "revision": None, "name": Path(base).resolve().name, "sha256": sha256, **shape}
    cached = try_to_load_from_cache(str(base), "config.json")
    snapshot = Path(cached).parent if isinstance(cached, str) else None
    return {
        "id": str(base),
        "revision": snapshot.name if snapshot else None,
        "name": str(base).split("/")[-1],
        "sha256": weights_sha256(snapshot, trust_cache=True) if snapshot and _has_all_weights(snapshot) else None,
        **shape,
    }


def _has_all_weights(snapshot: Path) -> bool:
    """Not so while a download goes on, or after one that was cut off."""
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    return all((snapshot / name).is_file() for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def public_name(base: Mapping[str, Any]) -> str:
    """How a base is named where others read it: its Hub id, or its folder's last name; never a path."""
    return base["id"] or base["name"]


def warn_of_another_base(base: Mapping[str, Any], adapter: StageAdapter) -> None:
    """Warn where the bases differ: by the content of their weights, else by id and revision."""
    trained_on = adapter.record["base"]
    known = [key for key in ("sha256", "id", "revision") if base[key] and trained_on[key]]
    for key in known[:1] if "sha256" in known else known:
        if base[key] != trained_on[key]:
            warnings.warn(
                f"{adapter.path.name} was trained on {public_name(trained_on)} ({key} {trained_on[key]}), this base is "
                f"{public_name(base)} ({key} {base[key]}). It fits and loads, but the numbers of its card do not hold.",
                stacklevel=3,
            )
            return


def check_fits(model: PreTrainedModel, adapter: StageAdapter) -> None:
    """Every tensor of the adapter's file has a place in the bare model, by name and shape; only the file's header is read.

    Raises:
        AdapterError: one has not.
    """
    trained_on, config = adapter.record["base"], model.config
    found = (config.model_type, config.get_text_config().model_type, config.vision_config.model_type)
    wanted = tuple(trained_on[part] for part in ("model_type", "language_model", "vision_tower"))
    if found != wanted:
        raise AdapterError(
            f"{adapter.path.name} was trained on {' + '.join(wanted)}, this base is {' + '.join(found)}; "
            "wanted the same architecture."
        )
    places: dict[str, Any] = {}
    rank = adapter.peft_config().r
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(LANGUAGE + "."):
            places[f"{IN_PEFT}{name}.lora_A.weight"] = (rank, module.in_features)
            places[f"{IN_PEFT}{name}.lora_B.weight"] = (module.out_features, rank)
    for name, parameter in model.get_submodule(PROJECTOR).named_parameters():
        places[f"{IN_PEFT}{PROJECTOR}.{name}"] = parameter.shape
    try:
        with safe_open(adapter.path / WEIGHTS, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{adapter.path / WEIGHTS}: cannot be read ({error}); the folder is damaged.") from error
    check_places(shapes, places, f"the base ({model.config.model_type} over {model.config.get_text_config().model_type})")


def check_arrived(model: PeftModel, adapter: StageAdapter, name: str = "default") -> None:
    """What PEFT loaded is what the file holds, bit for bit after rounding to each tensor's dtype; it would only warn.

    Raises:
        AdapterError: a tensor did not arrive.
    """
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = adapter.tensors()
    lost = [key for key, tensor in tensors.items() if key not in loaded or not _same(loaded[key], tensor)]
    lost += [key for key in loaded if key not in tensors]
    if lost:
        raise AdapterError(
            f"{adapter.path}: {len(lost)} of {len(tensors)} tensors did not arrive in the model ({', '.join(sorted(lost)[:3])}). "
            "The installed peft names modules otherwise; use the versions that stage.json lists."
        )


def _same(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    return torch.equal(loaded.detach().cpu(), stored.to(loaded.dtype))


def write_adapter(
    folder: Path,
    tensors: Tensors,
    config: LoraConfig,
    base_class: type,
    processor: ProcessorMixin,
    record: dict[str, Any],
    card: Callable[..., str],
) -> StageAdapter:
    """Write an adapter's folder, whole or not at all.

    Args:
        base_class: of the bare model, for `AutoPeftModel`.
        tensors: from `parts.trainable_tensors`.
        record: `stage.json` but for the kind and the weights' hash.
        card: makes the card's text of the finished record.
    """

    # PEFT puts the path from which the base was loaded here; others have no use for it
    published = replace(
        config,
        base_model_name_or_path=public_name(record["base"]),
        revision=record["base"]["revision"],
        inference_mode=True,
        auto_mapping={"base_model_class": base_class.__name__, "parent_library": base_class.__module__},
    )

    def fill(partial: Path) -> None:
        published.save_pretrained(str(partial))
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        save_processor(processor, partial)
        _finish(partial, {**record, "kind": "adapter"}, card)

    return StageAdapter.load(write_folder(folder, fill))


def write_checkpoint(
    folder: Path, base: str | Path, tensors: Tensors, processor: ProcessorMixin, record: dict[str, Any], card: Callable[..., str]
) -> StageAdapter:
    """Write a full stage's folder: the base with the trained tensors in it, in the dtype the base is stored in."""
    model, _ = load_checkpoint(base)
    load_tensors(model, tensors)

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        save_processor(processor, partial)
        _finish(partial, {**record, "kind": "checkpoint"}, card)

    return StageAdapter.load(write_folder(folder, fill))


def _finish(partial: Path, record: dict[str, Any], card: Callable[..., str]) -> None:
    config = {"config_sha256": file_sha256(partial / CONFIG)} if (partial / CONFIG).is_file() else {}
    record = {"schema_version": SCHEMA_VERSION, **record, "sha256": weights_sha256(partial), **config}
    (partial / CARD).write_text(card(record), encoding="utf-8")
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder under another name, flush it to disk, and rename it: it is there whole or not at all.

    Raises:
        AdapterError: the folder is there already, or cannot be written.
    """
    refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        fill(partial)
        readable = partial.stat().st_mode & 0o666  # as the umask has it; safetensors writes for the owner alone
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(readable)
            flush(path)
        partial.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: cannot be written ({error}); nothing was left under that name.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def refuse_existing(folder: Path) -> None:
    """Nothing is overwritten.

    Raises:
        AdapterError: the folder is there already.
    """
    if folder.exists():
        raise AdapterError(f"{folder}: is there already; wanted a new folder. Nothing was overwritten.")


def local_folder(folder: str | Path, only: str | None = None) -> Path:
    """The folder itself, or a Hub repository of that name, downloaded.

    Args:
        only: the one file to download.

    Raises:
        AdapterError: neither is there.
    """
    if Path(folder).is_dir():
        return Path(folder)
    try:
        return Path(snapshot_download(str(folder), allow_patterns=only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"{folder}: neither a folder nor a Hub repository that can be reached. ({error})") from error
