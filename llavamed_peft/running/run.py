"""One run of a curriculum: it checks the data, trains the stages one after the other, and keeps its folder.

Of several processes one writes, and the others read what it wrote. `folder.py` knows whose folder it is,
`training/` trains a stage, `adapters/` writes what a stage leaves.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import glob
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import ProcessorMixin

from ..adapters.record import Base, StageRecord
from ..adapters.stage_adapter import StageAdapter
from ..adapters.writing import write_adapter, write_checkpoint
from ..batches.checking import build_index
from ..batches.index import Index
from ..batches.ledger import Ledger, failed_in
from ..datasets.rejects import RejectLog
from ..datasets.sources import Source
from ..errors import AdapterError, ConfigError, TrainingError
from ..modeling.parts import bare
from ..modeling.quantization import Quantization
from ..modeling.templates import read_template
from ..packing.collator import PackedCollator
from ..reporting.run_log import METRICS, RunLog
from ..stages import Curriculum, Stage
from ..storage.whole import remove_folder, write_file
from ..training.checkpoints import Checkpoint, how_to_resume, newest_checkpoint
from ..training.computing import Computing
from ..training.gpu_memory import enough_for_model
from ..training.stage import Folders, train_stage
from .folder import LOCK, RUN, check_same_run, disk_faults, locked, remove_partial, write_run
from .lineage import Lineage, parent_of
from .stage_model import stage_model
from .stage_record import stage_record
from .summary import CURVE, TABLE, draw_losses, read_metrics, stage_table

REJECTED, INDEX, LOGS, CHECKPOINTS, FEATURES = ("rejected.jsonl", "index", "logs", "checkpoints", "features")
OWN_NAMES = (INDEX, LOGS, CHECKPOINTS, FEATURES, METRICS, REJECTED, CURVE, TABLE, RUN, LOCK)
LONGEST_WAIT = timedelta(minutes=30)


@dataclass(slots=True)
class Run:
    """What the stages of one call share.

    Args:
        folder: the call's `output_dir`.
        computing: how stages are computed.
        processor: every stage's: the base's, with what training adds.
        processes: those that train together; the first of them writes.
        max_rejected: share of unusable rows above which a data set is refused.
        embedding_rows: tokens that the language model knows.
    """

    folder: Path
    curriculum: Curriculum
    quantization: Quantization
    computing: Computing
    processor: ProcessorMixin
    processes: PartialState
    max_rejected: float
    embedding_rows: int

    @property
    def seed(self) -> int:
        """Of the order of the data, and of what begins or drops at random."""
        return self.curriculum.seed

    @property
    def writes(self) -> bool:
        """One process writes; the others read what it wrote. If it fails, the launcher ends them."""
        return self.processes.is_main_process

    @property
    def _has_full_stage(self) -> bool:
        return any(stage.trains == "full" for stage in self.curriculum.stages)

    def identity(
        self,
        base: Base,
        parent: StageAdapter | None,
        sources: Mapping[str, Mapping[str, Sequence[Source]]],
    ) -> dict[str, Any]:
        """What decides the run's result, for `run.json`: how it is computed is no part of it, but for the
        dtype."""
        curriculum = self.curriculum.to_dict()
        return {
            "base": asdict(base),
            "start_from": None
            if parent is None
            else {"stage": parent.stage.name, "sha256": parent.record.sha256},
            "quantization": self.quantization,
            "dtype": str(self.computing.dtype).removeprefix("torch."),
            **({"full_dtype": self.computing.full_dtype} if self._has_full_stage else {}),
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
            TrainingError: it holds a stage, and nothing says of which run.
        """
        taken = [stage.name for stage in self.curriculum.stages if stage.name in OWN_NAMES]
        if taken:
            raise ConfigError(
                f"Stage.name is {taken[0]!r}, which the run needs for itself (as {', '.join(OWN_NAMES)}); "
                "wanted another name."
            )
        resumes = check_same_run(self.folder, identity)
        there = [stage.name for stage in self.curriculum.stages if os.path.lexists(self.folder / stage.name)]
        if there and not resumes:
            raise TrainingError(
                f"{self.folder}: holds {', '.join(there)} already, but no {RUN} that says of which run; "
                "wanted a folder without these stages. Choose another output_dir; there, start_from= builds "
                "on a finished stage."
            )
        finished = resumes and all(self.has(stage) for stage in self.curriculum.stages)
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
            resumes = check_same_run(self.folder, identity)  # as it is now that nobody else writes
            for name in (*(stage.name for stage in self.curriculum.stages), METRICS, REJECTED, RUN):
                remove_partial(self.folder, glob.escape(name))
            for folder in (self.folder / name for name in (CHECKPOINTS, FEATURES)):
                for inner in (folder, *folder.glob("*")):
                    remove_partial(inner)
            with RejectLog(self.folder / REJECTED, keep=resumes) as rejects:
                # An image that could not be decoded before the interruption may be back now. The rows that a
                # checkpoint counts as failed are listed again.
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

    def ledgers(
        self, sources: Mapping[str, Mapping[str, list[Source]]], rejects: RejectLog
    ) -> dict[str, tuple[Ledger, Ledger | None]]:
        """Check the training and held-out data of every stage that is not finished.

        Args:
            sources: `"data"` and `"eval_data"` → stage name → data files.

        Returns:
            Stage name → the ledgers of its training and of its held-out data.
        """
        found = {}
        for stage in self.curriculum.stages:
            if not self.has(stage):
                held_out = sources["eval_data"].get(stage.name)
                found[stage.name] = (
                    self._ledger(stage, sources["data"][stage.name], rejects, "train"),
                    None if held_out is None else self._ledger(stage, held_out, rejects, "eval"),
                )
        return found

    def _ledger(self, stage: Stage, sources: list[Source], rejects: RejectLog, use: str) -> Ledger:
        """Check a stage's training or held-out data, or take what an earlier call found out about them."""
        path = self.folder / INDEX / f"{stage.name}-{use}.arrow"
        with _others_wait(self.processes):
            if self.writes:
                collator = PackedCollator(
                    self.processor, stage.schedule.max_length, embedding_rows=self.embedding_rows
                )
                build_index(sources, collator, path, rejects, self.max_rejected, RunLog(self.folder).show)
        kind = {"train": "training", "eval": "held-out"}[use]
        return Ledger(Index.open(path), kind, self.max_rejected)

    def finished_stage(self, stage: Stage, lineage: Lineage) -> StageAdapter:
        """A stage that an earlier call finished.

        Raises:
            TrainingError: the stage before it was trained anew and came out otherwise.
        """
        adapter = StageAdapter.load(self.folder / stage.name)
        if adapter.record.parent != parent_of(lineage):
            raise TrainingError(
                f"{adapter.path}: was trained after {adapter.record.parent}, but the stage before it is now "
                f"{parent_of(lineage)}. Remove {adapter.path.name} to train it again, or choose another "
                "output_dir."
            )
        return adapter

    def stage(
        self, stage: Stage, lineage: Lineage, train: Ledger, held_out: Ledger | None, rejects: RejectLog
    ) -> StageAdapter:
        """Train one stage of a lineage, from its last checkpoint if there is one, and write its folder."""
        folders = Folders(
            logs=self.folder / LOGS / stage.name,
            checkpoints=self.folder / CHECKPOINTS / stage.name,
            features=self.folder / FEATURES,
        )
        run_log, keeps = RunLog(self.folder), self.computing.full_dtype
        checkpoint = self._checkpoint_to_resume(stage, lineage, folders.checkpoints, run_log)
        if self.writes:
            run_log.rewind(stage.name, [] if checkpoint is None else checkpoint.state["history"])
        try:
            with enough_for_model(stage):
                model, config, stored_dtype = stage_model(
                    stage, lineage, self.quantization, self.computing.dtype, self.seed
                )
                trained = train_stage(
                    model,
                    self.processor,
                    stage,
                    train,
                    held_out,
                    computing=self.computing,
                    seed=self.seed,
                    folders=folders,
                    checkpoint=checkpoint,
                    run_log=run_log,
                    begins_with=lineage.begins_with,
                    rounds_to=stored_dtype if config is None and keeps == "stored" else None,
                )
        finally:
            for ledger in (train, held_out):
                if ledger is not None and self.writes:
                    ledger.list_failed(rejects, stage.name)
        base_class = type(bare(model))
        del model  # a full stage's folder needs the base once more
        gc.collect()  # its parts refer to one another
        folder = self.folder / stage.name
        if self.writes:
            unfinished = functools.partial(
                stage_record,
                stage,
                lineage,
                train,
                held_out,
                trained.metrics,
                curriculum=self.curriculum,
                computing=self.computing,
                quantization=self.quantization,
                processes=self.processes.num_processes,
                stop_tokens=read_template(self.processor).stop_tokens(self.processor),
            )
            base, processor = lineage.identity, self.processor
            try:
                if config is None:
                    full_dtype = torch.float32 if keeps == "float32" else None
                    write_checkpoint(folder, lineage.base, full_dtype, trained.tensors, processor, unfinished)
                else:
                    write_adapter(folder, trained.tensors, config, base, base_class, processor, unfinished)
            except AdapterError as error:
                raise TrainingError(f"{error} {how_to_resume(folders.checkpoints)}") from error
        self.processes.wait_for_everyone()
        return StageAdapter.load(folder)

    def _checkpoint_to_resume(
        self, stage: Stage, lineage: Lineage, folder: Path, run_log: RunLog
    ) -> Checkpoint | None:
        """The newest one, for all processes; those of a stage that began with another base or parent are
        removed."""
        found = [newest_checkpoint(folder) if self.writes else None]
        if found[0] is not None and not found[0].began_with(lineage.begins_with):
            parent = parent_of(lineage)
            other = "base" if parent is None else f"stage {parent.stage!r}, or another base"
            run_log.say(
                stage.name,
                f"begins anew: its checkpoint of step {found[0].step} was trained after another {other}",
            )
            remove_folder(folder)
            found = [None]
        broadcast_object_list(found)
        return found[0]

    def settle(self, stage: Stage) -> None:
        """After a finished stage, write the table and the loss curves so far, then remove its checkpoints.

        After the last one the features are removed as well. What an earlier call did is not done again.
        """
        if self.writes:
            records = [
                StageRecord.read(self.folder / done.name) for done in self.curriculum.stages if self.has(done)
            ]
            table, path = stage_table(records), self.folder / TABLE
            if not path.exists() or path.read_text(encoding="utf-8") != table:
                draw_losses(read_metrics(self.folder), self.folder / CURVE)
                write_file(path, table)
            checkpoints = self.folder / CHECKPOINTS / stage.name
            if checkpoints.exists():
                remove_folder(checkpoints)
            with contextlib.suppress(OSError):  # not there, or another stage's are in it
                checkpoints.parent.rmdir()
            if len(records) == len(self.curriculum.stages) and (self.folder / FEATURES).exists():
                shutil.rmtree(self.folder / FEATURES)
        self.processes.wait_for_everyone()


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
