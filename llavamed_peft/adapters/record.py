"""`stage.json`: what it says, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from ..errors import AdapterError, ConfigError
from ..stages import Stage
from ..storage.hashing import weights_sha256

SCHEMA_VERSION = 1


RECORD, WEIGHTS, CONFIG, CARD = (
    "stage.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "README.md",
)


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
    return next(
        (fault for key, item, wanted in inner if (fault := _misfit(item, wanted, key)) is not None), None
    )


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
        "sha256": weights_sha256(snapshot, trust_cache=True)
        if snapshot and _has_all_weights(snapshot)
        else None,
        **shape,
    }


def _has_all_weights(snapshot: Path) -> bool:
    """Not so while a download goes on, or after one that was cut off."""
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    return all(
        (snapshot / name).is_file()
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    )


def public_name(base: Mapping[str, Any]) -> str:
    """How a base is named where others read it: its Hub id, or its folder's last name; never a path."""
    return base["id"] or base["name"]
