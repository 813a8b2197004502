"""`stage.json` as values: `StageRecord` and what it is made of, read, checked and written."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

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
KINDS = ("adapter", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What identifies the checkpoint that a stage was trained on.

    Args:
        id, revision: on the Hub; `None` for a local folder.
        name: the last part of its id, or of its folder's path.
        sha256: content hash of its weights; `None` where they are not complete in the cache.
        model_type, language_model, vision_tower: the architecture, as transformers names its parts.
    """

    id: str | None = None
    revision: str | None = None
    name: str
    sha256: str | None = None
    model_type: str
    language_model: str
    vision_tower: str

    @classmethod
    def of(cls, base: str | Path, config: PreTrainedConfig, sha256: str | None = None) -> Base:
        """Identify a checkpoint.

        The weights of a local folder are read for their hash, unless it is known; those of a Hub id are named
        by their hashes in the cache.
        """
        architecture = {
            "model_type": config.model_type,
            "language_model": config.get_text_config().model_type,
            "vision_tower": config.vision_config.model_type,
        }
        if Path(base).is_dir():
            sha256 = sha256 or weights_sha256(base)
            return cls(name=Path(base).resolve().name, sha256=sha256, **architecture)
        cached = try_to_load_from_cache(str(base), "config.json")
        snapshot = Path(cached).parent if isinstance(cached, str) else None
        complete = snapshot is not None and _has_all_weights(snapshot)
        return cls(
            id=str(base),
            revision=snapshot.name if snapshot else None,
            name=str(base).split("/")[-1],
            sha256=weights_sha256(snapshot, trust_cache=True) if complete else None,
            **architecture,
        )

    def difference(self, other: Base) -> str | None:
        """In what two bases differ, as far as both know it, in words: by the content of their weights, else
        by id and revision; `None` where they are the same or nothing is known of both."""
        known = [key for key in ("sha256", "id", "revision") if getattr(self, key) and getattr(other, key)]
        for key in known[:1] if "sha256" in known else known:
            here, there = getattr(self, key), getattr(other, key)
            if here != there:
                return f"{self.public_name} ({key} {here}) is not {other.public_name} ({key} {there})"
        return None

    @property
    def public_name(self) -> str:
        """How it is named where others read it: its Hub id, or its folder's last name; never a path."""
        return self.id or self.name

    @property
    def architecture(self) -> tuple[str, str, str]:
        """Model class, language model, vision tower."""
        return self.model_type, self.language_model, self.vision_tower


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The stage that a stage continues, by name and content hash."""

    stage: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.stage} ({self.sha256[:12]}…)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """How a checkpoint was made of another stage folder.

    Args:
        onto: the weights that an adapter was merged onto, `"dequantised"` or `"original"`; `None`: the folder
            was a checkpoint already, and is written in another dtype.
        dtype: of its weights.
    """

    onto: str | None
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """What became of a data file's rows: `rows` = `used` + all of `rejected` (reason → rows) + `failed`."""

    file: str
    sha256: str
    rows: int
    used: int
    rejected: dict[str, int]
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What `stage.json` says of a finished stage, in the order in which it is written.

    Args:
        stage: as it was trained.
        image_aspect_ratio, seed: of the curriculum.
        base: the checkpoint that its tensors belong to.
        root: the checkpoint that its lineage began with; `base` unless a full stage came before.
        parent: the stage it continues; `None` for a first one.
        data, eval_data: what became of the rows of its training and held-out data.
        metrics: losses, counts and seconds of the training.
        computing: how it was computed.
        device: what it was computed on.
        processes: how many trained together.
        versions: of the libraries.
        finished: when, as ISO 8601.
        stop_tokens: what ends an answer in training, token → id; empty in older records.
        merged: how a merged checkpoint was made of its parent, an adapter of the same stage; else `None`.
        kind: `"adapter"`, or `"checkpoint"` of a full stage or a merged one.
        sha256: content hash of its weights.
        config_sha256: hash of its `adapter_config.json`; `None` where it has none.
    """

    stage: Stage
    image_aspect_ratio: str | None = None
    seed: int | None = None
    base: Base
    root: Base | None = None
    parent: Parent | None
    data: tuple[DataFile, ...]
    eval_data: tuple[DataFile, ...]
    metrics: dict[str, Any]
    computing: dict[str, Any] = field(default_factory=dict)
    device: str
    processes: int | None = None
    versions: dict[str, Any]
    finished: str | None = None
    stop_tokens: dict[str, int] = field(default_factory=dict)
    merged: Merged | None = None
    kind: str
    sha256: str
    config_sha256: str | None = None

    @classmethod
    def read(cls, folder: Path) -> StageRecord:
        """What the `stage.json` of a folder says; its weights are not read.

        Raises:
            AdapterError: there is none, or it is damaged or another version's.
        """
        path = folder / RECORD
        if not path.is_file():
            raise AdapterError(
                f"{folder}: has no {RECORD}; wanted a folder that a finished stage left. A stock PEFT "
                "adapter is loaded with PeftModel.from_pretrained."
            )
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AdapterError(f"{path}: is not JSON ({error}); the folder is damaged.") from error
        version = plain.get("schema_version", SCHEMA_VERSION) if isinstance(plain, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise AdapterError(
                f"{path}: schema_version is {version!r}; this version of llavamed-peft reads "
                f"{SCHEMA_VERSION}. Try another one."
            )
        try:
            record = _read(cls, plain, "the record")
            if record.kind not in KINDS:
                raise ValueError(f"kind is {record.kind!r}")
        except (ValueError, ConfigError) as error:
            raise AdapterError(
                f"{path}: {error}; the folder is damaged. Copy or download it again."
            ) from error
        return record

    def to_json(self) -> str:
        """The text of `stage.json`."""
        plain = asdict(self) | {"stage": self.stage.to_dict()}
        for name in ("stop_tokens", "merged", "config_sha256"):  # older records have none
            if not plain[name]:
                del plain[name]
        return json.dumps({"schema_version": SCHEMA_VERSION, **plain}, indent=2) + "\n"


def _read(kind: Any, value: Any, name: str) -> Any:
    """JSON → a value of a field's type; keys that are not known are left out.

    Raises:
        ValueError: it does not fit; says what came.
        ConfigError: a stage that is none.
    """
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _read(get_args(kind)[0], value, name)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}")
        return tuple(_read(get_args(kind)[0], item, f"{name}[{place}]") for place, item in enumerate(value))
    if not dataclasses.is_dataclass(kind):
        if not isinstance(value, get_origin(kind) or kind):
            raise ValueError(f"{name} is {value!r}")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}")
    if kind is Stage:
        return Stage.from_dict(value, name)
    fields, hints = dataclasses.fields(kind), _hints(kind)
    if lacks := [one.name for one in fields if one.name not in value and not _has_default(one)]:
        raise ValueError(f"{name} lacks {', '.join(lacks)}")
    return kind(
        **{one.name: _read(hints[one.name], value[one.name], one.name) for one in fields if one.name in value}
    )


def _has_default(one: dataclasses.Field[Any]) -> bool:
    return one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _has_all_weights(snapshot: Path) -> bool:
    """False while a download is running, or after one that was cut off."""
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    return all(
        (snapshot / name).is_file()
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    )
