"""What a stage leaves: a folder that stock PEFT loads on the raw base, and how it is written, read, checked
and merged.

One folder is one complete state: the projector in full and, from the first LoRA stage on, the LoRA tensors,
in PEFT's own format; the processor; `stage.json` with lineage, data and numbers; a Hub card. A `full` stage
leaves a checkpoint folder instead, with the same `stage.json`. Folders are written under another name and
renamed when complete.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, ProcessorMixin

from ..errors import AdapterError
from ..modeling.generation import set_stops
from ..modeling.load import load_checkpoint
from ..modeling.parts import IN_PEFT, LANGUAGE, PROJECTOR
from ..modeling.processor import load_processor
from ..modeling.quantization import Quantization, linear4bits
from ..modeling.tensors import Tensors, check_places
from ..stages import Stage
from ..storage.hashing import file_sha256, weights_sha256
from ..storage.whole import not_written, write_folder
from .record import CARD, CONFIG, RECORD, WEIGHTS, Base, StageRecord


@dataclass(frozen=True, slots=True)
class StageAdapter:
    """A finished stage on disk.

    Args:
        path: its folder.
        record: what its `stage.json` says.
    """

    path: Path
    record: StageRecord = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> StageAdapter:
        """Open a stage's folder, or a Hub repository of one, and check that it is complete.

        Raises:
            AdapterError: there is none, it was not made by this package, or its weights are not those that
                were written.
        """
        path = local_folder(folder)
        record = StageRecord.read(path)
        adapter = cls(path, record)
        if not adapter.is_checkpoint and not (path / WEIGHTS).is_file():
            raise AdapterError(
                f"{path}: has no {WEIGHTS}; wanted a complete folder. Are its weights on the Hub? See its "
                f"{CARD}."
            )
        if not adapter.is_checkpoint:
            config = file_sha256(path / CONFIG) if (path / CONFIG).is_file() else None
            if config != record.config_sha256:
                raise AdapterError(
                    f"{path / CONFIG}: is missing or was changed. Copy or download the folder again."
                )
        found = weights_sha256(path)
        if found != record.sha256:
            raise AdapterError(
                f"{path}: the weights have sha256 {found[:12]}…, {RECORD} says {record.sha256[:12]}…; the "
                "folder is damaged or was changed. Copy or download it again."
            )
        return adapter

    @property
    def stage(self) -> Stage:
        """The stage as it was trained."""
        return self.record.stage

    @property
    def parent(self) -> dict[str, str] | None:
        """Name and content hash of the stage it began from; `None` for a first stage."""
        return None if self.record.parent is None else asdict(self.record.parent)

    @property
    def metrics(self) -> dict[str, Any]:
        """Losses, counts and times of the training."""
        return self.record.metrics

    @property
    def is_checkpoint(self) -> bool:
        """A `full` stage: a checkpoint of its own, not an adapter."""
        return self.record.kind == "checkpoint"

    def tensors(self) -> Tensors:
        """The adapter's tensors under PEFT's names, fp32."""
        return load_file(self.path / WEIGHTS)

    def peft_config(self) -> LoraConfig:
        """The adapter's stock configuration."""
        return LoraConfig.from_pretrained(str(self.path))

    def merge(
        self,
        base: str | Path,
        out: str | Path,
        dtype: str | torch.dtype | None = None,
        onto: Literal["dequantised", "original"] | None = None,
        measure: Callable[[torch.nn.Module, ProcessorMixin], float] | None = None,
    ) -> Path:
        """Write base and adapter as one checkpoint, in 16 or 32 bit, with a card and `stage.json`; or a full
        stage's checkpoint in another dtype.

        Args:
            base: the checkpoint the adapter belongs to; not read for a full stage.
            out: the folder to write; it must not be there yet.
            dtype: of the merged weights; `None` takes the base's stored one.
            onto: the weights to merge onto: `"dequantised"`, what the base's weights become in NF4, or
                `"original"`. `None`: dequantised for a stage that was trained over NF4, which gives the
                trained model; original otherwise.
            measure: takes a model and the processor and returns a held-out loss; it is called before and
                after rounding, both times with float32 weights; both losses are recorded. `None`: none is.

        Returns:
            `out`.

        Raises:
            AdapterError: the adapter does not fit the base, it is a full checkpoint already and no `dtype` is
                given, or `out` is there.
            CheckpointError: the base cannot be loaded.
            ConfigError: an unknown `dtype` or `onto`; or onto the original weights of a base stored in NF4.

        Warns:
            UserWarning: the base is another one, or the stage was trained over NF4 and these weights are not.
        """
        from .merging import merge

        return merge(self, base, out, dtype, onto, measure)


def load_stage(
    base: str | Path,
    adapter: StageAdapter | str | Path,
    quantization: Quantization = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[torch.nn.Module, ProcessorMixin]:
    """A model with a stage's adapter on it (a full stage: its own checkpoint), in eval mode, and the stage's
    processor.

    Args:
        base: Hub id or folder of the raw base; for a `full` stage's checkpoint it is not read.
        adapter: a `StageAdapter`, its folder, or a Hub repository of one.
        quantization: `"nf4"` for a 4-bit language model. A base stored in NF4 is loaded so either way.
        dtype: of the base's weights; `None` takes the stored one. The projector is rounded to it, as stock
            PEFT does. 4-bit weights are made of the stored ones in any case.

    Returns:
        The model's generation configuration stops at what ended an answer in training.

    Raises:
        AdapterError: the folder is damaged, or was trained on another architecture.
        CheckpointError: the base cannot be loaded.
        ConfigError: an unknown `quantization` or `dtype`.

    Warns:
        UserWarning: the base has the right shape but is not the one the stage was trained on; or the stage
            was trained over NF4 weights and these are not.
    """
    adapter = adapter if isinstance(adapter, StageAdapter) else StageAdapter.load(adapter)
    if adapter.is_checkpoint:
        model, processor = load_checkpoint(adapter.path, quantization, dtype)
    else:
        bare_model, _ = load_checkpoint(base, quantization, dtype)
        model = on_base(bare_model, base, adapter, "nf4" if linear4bits(bare_model) else None).eval()
        processor = stage_processor(adapter, bare_model)
    set_stops(model, processor)
    return model, processor


def on_base(
    model: PreTrainedModel, base: str | Path, adapter: StageAdapter, quantization: Quantization
) -> PeftModel:
    """A stage's adapter on a bare model, every tensor where it belongs.

    Args:
        base: Hub id or folder that the model came from.
        quantization: of the model.

    Raises:
        AdapterError: it does not fit.

    Warns:
        UserWarning: as `load_stage`.
    """
    check_fits(model, adapter)
    warn_of_another_base(Base.of(base, model.config), adapter)
    warn_of_unquantized(adapter, quantization)
    peft_model = PeftModel.from_pretrained(model, str(adapter.path))
    check_arrived(peft_model, adapter)
    return peft_model


def stage_processor(adapter: StageAdapter, model: PreTrainedModel) -> ProcessorMixin:
    """The processor of a stage, for a model."""
    return load_processor(adapter.path, model.config)


def warn_of_another_base(base: Base, adapter: StageAdapter) -> None:
    """Warn where the bases differ: by the content of their weights, else by id and revision."""
    if difference := base.difference(adapter.record.base):
        warnings.warn(
            f"{adapter.path.name} was trained on another base: {difference}. It fits and loads, but the "
            "numbers of its card do not hold.",
            stacklevel=3,
        )


def warn_of_unquantized(adapter: StageAdapter, quantization: Quantization) -> None:
    """Warn where a stage that was trained over NF4 weights is put on others."""
    if adapter.record.computing.get("quantization") == "nf4" and quantization is None:
        warnings.warn(
            f"{adapter.path.name} was trained over NF4 weights, these are not: its answers and losses are "
            "not those of its card. Pass quantization='nf4', or merge it with onto='dequantised', which is "
            "exact.",
            stacklevel=3,
        )


def check_fits(model: PreTrainedModel, adapter: StageAdapter) -> None:
    """Every tensor of the adapter's file has a place in the bare model, by name and shape; only the file's
    header is read.

    Raises:
        AdapterError: one has not.
    """
    config, wanted = model.config, adapter.record.base.architecture
    found = (config.model_type, config.get_text_config().model_type, config.vision_config.model_type)
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
        raise AdapterError(
            f"{adapter.path / WEIGHTS}: cannot be read ({error}); the folder is damaged."
        ) from error
    check_places(
        shapes,
        places,
        f"the base ({model.config.model_type} over {model.config.get_text_config().model_type})",
    )


def check_arrived(model: PeftModel, adapter: StageAdapter, name: str = "default") -> None:
    """What PEFT loaded is what the file holds, bit for bit after rounding to each tensor's dtype; it would
    only warn.

    Raises:
        AdapterError: a tensor did not arrive.
    """
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = adapter.tensors()
    lost = [key for key, tensor in tensors.items() if key not in loaded or not _same(loaded[key], tensor)]
    lost += [key for key in loaded if key not in tensors]
    if lost:
        raise AdapterError(
            f"{adapter.path}: {len(lost)} of {len(tensors)} tensors did not arrive in the model "
            f"({', '.join(sorted(lost)[:3])}). The installed peft names modules differently; use the "
            "versions that stage.json lists."
        )


def _same(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    return torch.equal(loaded.detach().cpu(), stored.to(loaded.dtype))


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
        raise AdapterError(
            f"{folder}: neither a folder nor a Hub repository that can be reached. ({error})"
        ) from error


def adapter_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Write a folder, completely or not at all.

    Raises:
        AdapterError: it is there already, or cannot be written.
    """
    refuse_existing(folder)
    try:
        return write_folder(folder, fill)
    except OSError as error:
        raise AdapterError(not_written(folder, error)) from error


def refuse_existing(folder: Path) -> None:
    """Nothing is overwritten.

    Raises:
        AdapterError: the folder is there already.
    """
    if folder.exists():
        raise AdapterError(f"{folder}: is there already; wanted a new folder. Nothing was overwritten.")
