"""One run of a curriculum: its data's indexes, its stages trained one after the other, and what stands in its folder.

Of several processes one writes, the others read what it wrote. Whose folder it is, is `run_folder.py`'s business, how a stage is
trained `training.py`'s, what it leaves `adapters.py`'s.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import glob
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from ..adapters.card import card_text
from ..adapters.record import public_name, read_record
from ..adapters.stage_adapter import StageAdapter, check_arrived, check_fits, warn_of_another_base
from ..adapters.writing import write_adapter, write_checkpoint
from ..batches.checking import build_index
from ..batches.index import Index, failed_in
from ..datasets.rejects import RejectLog
from ..datasets.sources import Source
from ..errors import AdapterError, ConfigError, TrainingError
from ..modeling.load import Quantization, load_checkpoint
from ..modeling.parts import bare
from ..modeling.scopes import adapter_config, attach, unfreeze_full
from ..modeling.tensors import load_tensors, set_dtypes
from ..packing.collator import PackedCollator
from ..reporting.run_log import METRICS, RunLog
from ..stages import Curriculum, Stage
from ..training.checkpoints import Checkpoint, newest_checkpoint, remove_folder, standing
from ..training.computing import Computing
from ..training.gpu_memory import enough_for_model
from ..training.stage import Trained, train_stage
from ..version import __version__
from .folder import LOCK, RUN, check_same_run, disk_faults, locked, remove_partial, write_run
from .lineage import Lineage, carried_lora, parent_of
from .summary import CURVE, TABLE, draw_losses, read_metrics, stage_table

REJECTED, INDEX, LOGS, CHECKPOINTS, FEATURES = ("rejected.jsonl", "index", "logs", "checkpoints", "features")


OWN_NAMES = (INDEX, LOGS, CHECKPOINTS, FEATURES, METRICS, REJECTED, CURVE, TABLE, RUN, LOCK)


LONGEST_WAIT = timedelta(minutes=30)


_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "safetensors")


@dataclass(slots=True)
class Run:
    """What the stages of one call share.

    Args:
        folder: the call's `output_dir`.
        computing: how stages are computed.
        processor: every stage's: the base's, with what training adds.
        processes: those that train together; the first of them writes.
        max_rejected: share of unusable rows above which a data set is refused.
    """

    folder: Path
    curriculum: Curriculum
    quantization: Quantization
    computing: Computing
    processor: ProcessorMixin
    processes: PartialState
    max_rejected: float

    @property
    def writes(self) -> bool:
        """One process writes; the others read what it wrote. If it fails, the launcher ends them."""
        return self.processes.is_main_process

    def identity(
        self,
        base: Mapping[str, Any],
        parent: StageAdapter | None,
        sources: Mapping[str, Mapping[str, Sequence[Source]]],
    ) -> dict[str, Any]:
        """What decides the run's result, for `run.json`: how it is computed is no part of it, but for the dtype."""
        curriculum = self.curriculum.to_dict()
        return {
            "base": base,
            "start_from": None
            if parent is None
            else {"stage": parent.stage.name, "sha256": parent.record["sha256"]},
            "quantization": self.quantization,
            "dtype": str(self.computing.dtype).removeprefix("torch."),
            **curriculum,
            "stages": {stage.pop("name"): stage for stage in curriculum["stages"]},
            **{
                use: {
                    stage: [{"file": source.name, "sha256": source.sha256} for source in found]
                    for stage, found in per_stage.items()
                }
                for use, per_stage in sources.items()
            },
        }

    def is_finished(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds this run with all its stages, and nothing is left to do.

        Raises:
            ConfigError: it holds another run, or a stage has the name of one of the run's own files.
            TrainingError: it holds a stage of nobody knows which run.
        """
        taken = [stage.name for stage in self.curriculum.stages if stage.name in OWN_NAMES]
        if taken:
            raise ConfigError(
                f"Stage.name is {taken[0]!r}, which the run needs for itself (as {', '.join(OWN_NAMES)}); wanted another name."
            )
        goes_on = check_same_run(self.folder, identity)
        there = [stage.name for stage in self.curriculum.stages if os.path.lexists(self.folder / stage.name)]
        if there and not goes_on:
            raise TrainingError(
                f"{self.folder}: holds {', '.join(there)} already, but no {RUN} that says of which run; wanted a folder without "
                "these stages. Choose another output_dir; there, start_from= builds on a finished stage."
            )
        finished = goes_on and all(self.has(stage) for stage in self.curriculum.stages)
        finished = finished and not any((self.folder / name).exists() for name in (CHECKPOINTS, FEATURES))
        self.processes.wait_for_everyone()  # nothing changes before all have seen it
        return finished

    @contextlib.contextmanager
    def claimed(self, identity: Mapping[str, Any]) -> Iterator[RejectLog]:
        """Be the one run at work in the folder, which is made; yields the log of rows that cannot be used.

        Raises:
            TrainingError: another one is, or the folder cannot be written.
        """
        if not self.writes:
            self.processes.wait_for_everyone()
            yield RejectLog(os.devnull, keep=True)
            return
        with disk_faults(self.folder), locked(self.folder):
            goes_on = check_same_run(self.folder, identity)  # as it is now that nobody else writes
            for name in (*(stage.name for stage in self.curriculum.stages), METRICS, REJECTED, RUN):
                remove_partial(self.folder, glob.escape(name))
            for folder in (self.folder / name for name in (CHECKPOINTS, FEATURES)):
                for inner in (folder, *folder.glob("*")):
                    remove_partial(inner)
            with RejectLog(self.folder / REJECTED, keep=goes_on) as rejects:
                # what was not decoded in a stage that goes on may be by now; what its checkpoint counts is written again
                rejects.forget(
                    failed_in(stage.name) for stage in self.curriculum.stages if not self.has(stage)
                )
                self.processes.wait_for_everyone()
                yield rejects

    def begin(self, identity: Mapping[str, Any]) -> None:
        """From here on the folder is this run's and no other's."""
        if self.writes and not (self.folder / RUN).exists():
            write_run(self.folder, identity)

    def has(self, stage: Stage) -> bool:
        """The stage is finished."""
        return (self.folder / stage.name).exists()

    def index(self, stage: Stage, sources: list[Source], rejects: RejectLog, use: str) -> Index:
        """Check a stage's training or held-out data and keep what was found beside the run, for the next call as well."""
        path = self.folder / INDEX / f"{stage.name}-{use}.arrow"
        with _others_wait(self.processes):
            if self.writes:
                collator = PackedCollator(self.processor, stage.schedule.max_length)
                build_index(sources, collator, path, rejects, self.max_rejected, RunLog(self.folder).show)
        return Index.open(path)

    def finished_stage(self, stage: Stage, lineage: Lineage) -> StageAdapter:
        """A stage that an earlier call finished.

        Raises:
            TrainingError: the stage before it was trained anew and came out otherwise.
        """
        adapter = StageAdapter.load(self.folder / stage.name)
        if adapter.parent != parent_of(lineage):
            raise TrainingError(
                f"{adapter.path}: was trained behind {adapter.parent}, what stands before it now is {parent_of(lineage)}. Remove "
                f"{adapter.path.name} to train it again, or choose another output_dir."
            )
        return adapter

    def stage(
        self, stage: Stage, lineage: Lineage, train_index: Index, eval_index: Index | None, rejects: RejectLog
    ) -> StageAdapter:
        """Train one stage behind its lineage, from its last checkpoint on, and write its folder."""
        checkpoints = self.folder / CHECKPOINTS / stage.name
        checkpoint = self._newest_checkpoint(checkpoints)
        run_log = RunLog(self.folder)
        if self.writes:
            run_log.rewind(stage.name, [] if checkpoint is None else checkpoint.state["history"])
        try:
            with enough_for_model(stage):
                model, config = self._model(stage, lineage)
                trained = train_stage(
                    model,
                    self.processor,
                    stage,
                    train_index,
                    eval_index,
                    computing=self.computing,
                    seed=self.curriculum.seed,
                    max_rejected=self.max_rejected,
                    work_folder=self.folder / LOGS / stage.name,
                    checkpoint_folder=checkpoints,
                    feature_folder=self.folder / FEATURES,
                    checkpoint=checkpoint,
                    run_log=run_log,
                )
        finally:
            for index in (train_index, eval_index):
                if index is not None and self.writes:
                    index.report_failures(rejects, stage.name)
        base_class = type(bare(model))
        del model  # a full stage's folder needs the base once more
        gc.collect()  # its parts refer to one another
        folder = self.folder / stage.name
        if self.writes:
            record = self._record(stage, lineage, train_index, eval_index, trained)
            card = functools.partial(card_text, base_name=public_name(lineage.record))
            try:
                if config is None:
                    write_checkpoint(folder, lineage.base, trained.tensors, self.processor, record, card)
                else:
                    write_adapter(folder, trained.tensors, config, base_class, self.processor, record, card)
            except AdapterError as error:
                raise TrainingError(f"{error} {standing(checkpoints)}") from error
        self.processes.wait_for_everyone()
        return StageAdapter.load(folder)

    def _model(self, stage: Stage, lineage: Lineage) -> tuple[torch.nn.Module, LoraConfig | None]:
        """The stage's model as its training begins, and its adapter's configuration; a full stage has none."""
        model, _ = load_checkpoint(
            lineage.base, self.quantization
        )  # in the stored dtype: what trains begins unrounded
        set_seed(self.curriculum.seed)
        if stage.trains == "full":
            config, model = None, _full_model(model, lineage)
        else:
            config = adapter_config(model, stage.lora or carried_lora(lineage.adapter))
            model = attach(model, config, stage.trains)
        set_dtypes(model, self.computing.dtype)
        if config is not None and lineage.adapter is not None:
            load_tensors(model, lineage.adapter.tensors())
            warn_of_another_base(lineage.record, lineage.adapter)
        return model, config

    def _newest_checkpoint(self, folder: Path) -> Checkpoint | None:
        """The one that all processes go on from."""
        found = [newest_checkpoint(folder) if self.writes else None]
        broadcast_object_list(found)
        return found[0]

    def settle(self, stage: Stage) -> None:
        """Behind a finished stage: the table and the loss curves so far, then its checkpoints go; what is there was not done.

        Behind the last one, the features go as well.
        """
        if self.writes:
            records = [
                read_record(self.folder / done.name) for done in self.curriculum.stages if self.has(done)
            ]
            table, path = stage_table(records), self.folder / TABLE
            if not path.exists() or path.read_text(encoding="utf-8") != table:
                draw_losses(read_metrics(self.folder), self.folder / CURVE)
                path.write_text(table, encoding="utf-8")
            checkpoints = self.folder / CHECKPOINTS / stage.name
            if checkpoints.exists():
                remove_folder(checkpoints)
            with contextlib.suppress(OSError):  # not there, or another stage's are in it
                checkpoints.parent.rmdir()
            if len(records) == len(self.curriculum.stages) and (self.folder / FEATURES).exists():
                shutil.rmtree(self.folder / FEATURES)
        self.processes.wait_for_everyone()

    def _record(
        self, stage: Stage, lineage: Lineage, train_index: Index, eval_index: Index | None, trained: Trained
    ) -> dict[str, Any]:
        computing = asdict(self.computing)
        return {
            "stage": stage.to_dict(),
            "image_aspect_ratio": self.curriculum.image_aspect_ratio,
            "seed": self.curriculum.seed,
            "base": lineage.record,
            "root": lineage.root,
            "parent": parent_of(lineage),
            "data": train_index.account(),
            "eval_data": [] if eval_index is None else eval_index.account(),
            "metrics": trained.metrics,
            "computing": {
                **computing,
                "dtype": str(self.computing.dtype).removeprefix("torch."),
                "sharding": None if self.computing.sharding is None else self.computing.sharding.method,
                "quantization": self.quantization,
            },
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU ({platform.machine()})",
            "processes": self.processes.num_processes,
            "versions": _versions(),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }


@contextlib.contextmanager
def _others_wait(processes: PartialState) -> Iterator[None]:
    """What may take long for one process; the others wait at the end of it, a day if need be.

    The barrier of the training group would give up after `LONGEST_WAIT`.
    """
    if processes.num_processes == 1:
        yield
        return
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    yield
    torch.distributed.barrier(group=group)
    torch.distributed.destroy_process_group(group)


def _full_model(model: PreTrainedModel, lineage: Lineage) -> torch.nn.Module:
    """The bare model with everything the scope trains in fp32, and the parent's adapter merged into it there."""
    set_dtypes(unfreeze_full(model), model.dtype)
    if lineage.adapter is None:
        return model
    check_fits(model, lineage.adapter)
    warn_of_another_base(lineage.record, lineage.adapter)
    peft_model = PeftModel.from_pretrained(model, str(lineage.adapter.path))
    check_arrived(peft_model, lineage.adapter)
    return unfreeze_full(peft_model.merge_and_unload())


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"llavamed-peft": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions
