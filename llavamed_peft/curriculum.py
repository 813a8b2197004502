"""`curriculum_finetune`: a checkpoint and some data, stage after stage, one adapter folder each."""

from __future__ import annotations

import contextlib
import functools
import gc
import glob
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from . import __version__
from .adapters import (
    StageAdapter,
    base_record,
    check_arrived,
    check_fits,
    public_name,
    read_record,
    warn_of_another_base,
    write_adapter,
    write_checkpoint,
)
from .card import card_text
from .checkpoints import Checkpoint, newest_checkpoint, remove_folder, standing
from .datasets.rejects import RejectLog
from .datasets.sources import Data, Source, open_sources
from .errors import AdapterError, ConfigError, TrainingError
from .modeling.load import Quantization, load_checkpoint, read_config
from .modeling.parts import adapter_config, attach, bare, load_tensors, set_dtypes, unfreeze_full
from .modeling.processor import load_processor, make_stage_processor
from .modeling.sharding import launcher_aside
from .packing.collator import PackedCollator
from .packing.index import Index, build_index, failed_in
from .packing.masks import check_window
from .preflight import carried_lora, check_architecture, check_files, check_lineage, check_names, choose_computing
from .report import CURVE, METRICS, TABLE, RunLog, draw_losses, read_metrics, stage_table
from .runs import LOCK, RUN, check_same_run, disk_faults, locked, remove_partial, write_run
from .stages import LLAVA_MED, Curriculum, Stage
from .training import Computing, Trained, train_stage

REJECTED, INDEX, LOGS, CHECKPOINTS, FEATURES = "rejected.jsonl", "index", "logs", "checkpoints", "features"
_OWN_NAMES = (INDEX, LOGS, CHECKPOINTS, FEATURES, METRICS, REJECTED, CURVE, TABLE, RUN, LOCK)
_LONGEST_WAIT = timedelta(minutes=30)
_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "safetensors")


def curriculum_finetune(
    model: str | Path,
    data: Mapping[str, Data],
    output_dir: str | Path,
    *,
    image_folder: str | Path | Mapping[str, str | Path] | None = None,
    curriculum: Curriculum = LLAVA_MED,
    eval_data: Mapping[str, Data] | None = None,
    quantization: Quantization = None,
    start_from: StageAdapter | str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    layout: str = "packed",
    max_row_tokens: int | None = None,
    max_rejected: float = 0.05,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    workers: int | None = None,
    report_to: str | list[str] = "none",
    gradient_checkpointing: bool | None = None,
    feature_cache: Literal["auto"] | bool = "auto",
) -> dict[str, StageAdapter]:
    """Take a LLaVA checkpoint through a curriculum; every stage leaves a self-contained folder in `output_dir`.

    A run that was interrupted, however it was, is gone on with by the same call: finished stages are not trained again, the
    one that was training goes on from its last whole checkpoint, and what comes out is what would have come out without the
    interruption, to the bit where the machine computes the same twice (CPUs; on GPUs not measured). SIGTERM and Ctrl-C save
    first. A finished run is only read. Keywords that only say how it is computed may differ between the calls.

    Args:
        model: Hub id or folder of any LLaVA checkpoint (LLaVA, LLaVA-NeXT, ViP-LLaVA, LLaVA-OneVision).
        data: stage name → a LLaVA JSON file, several, or `Conversation` and `Question` values. Every stage has an entry.
        output_dir: holds `<stage>/` for each stage; beside them `metrics.jsonl`, `rejected.jsonl` (if rows were), `loss.png`,
            `stages.md`, `index/` (the checked rows, found again by a later call with the same data; delete it where images were
            mended), `logs/` (the trackers'), `run.json` (what decides the result) and, until the last stage is finished,
            `checkpoints/` and `features/`.
        image_folder: that image paths are relative to: one folder, or stage name → folder; `None`: each data file's own.
        curriculum: what to train, how. Default: the paper's stages, the later two as LoRA.
        eval_data: as `data`; stages with an entry report the held-out loss before, during and after.
        quantization: `"nf4"` trains over a 4-bit language model; not for `full` stages.
        start_from: a finished stage to begin behind: a folder, a `StageAdapter`, or a Hub repository.
        dtype: of frozen weights and autocast; `None`: bfloat16 on CUDA, float32 on a CPU. Trainable tensors are float32.
        layout: of device batches. `"packed"`: what the conversations of a step begin with alike (a system prompt, an image)
            stands once, in rows without gaps; with FlexAttention on CUDA (not yet run there), masked `sdpa` elsewhere.
            `"padded"`: a row each, padded to the longest. The losses are the same. Under LoRA dropout, what several
            conversations share is dropped for all of them alike: the same in expectation, with other noise.
        max_row_tokens: bound of a device batch's tokens, rows × longest; packed on CUDA it is one row. `None`: 4,096 on a CPU,
            8,192 on CUDA (not yet measured there).
        max_rejected: share of unusable rows above which a data set is refused as a whole.
        eval_steps: optimizer steps between two held-out losses; `None`: ten of them a stage.
        save_steps: optimizer steps between two checkpoints; `None`: ten of them a stage. What one costs is shown at the first.
        workers: processes that decode images ahead, for each GPU; `None`: its share of the cores, up to 8; none on a CPU, where
            they would take the model's cores. One that dies, or that lets training wait for ten minutes, is an error that names
            its row.
        report_to: further trackers, such as `"tensorboard"` or `"trackio"`.
        gradient_checkpointing: `None`: on for CUDA, off for a CPU.
        feature_cache: store in `features/` what the frozen vision tower makes of each image (about 1.2 MB of an image of 336
            pixels in 16 bits, more where images have tiles), compute it once, and decode no image again. `"auto"`: where at most
            half as many images then pass the tower and it fits into 50 GB and half of the free disk; a line says so before
            each stage. True: always, or an error where it does not fit. Not for a sharded model.

    Launched by `torchrun` or `accelerate launch`, the processes share the work; where the launch configuration asks for FSDP
    (version 2) or DeepSpeed (ZeRO-2, ZeRO-3), each holds a part of every stage's model. What is learnt stays the same.

    Returns:
        Stage name → `StageAdapter`, in order.

    Raises:
        ConfigError: arguments that do not fit together, `output_dir` holds a run of another curriculum, base or data (the message
            lists the difference), or conversations longer than a sliding window that packed rows would not heed; nothing was
            trained.
        CheckpointError, DataError, AdapterError: the base, the data or `start_from` cannot be used; the message says why.
        TrainingError: a stage cannot begin or go on: a loss that is not finite, a full disk, another run at work in
            `output_dir`. Finished stages and the last checkpoint stay.
        interruption.Interrupted: SIGTERM or Ctrl-C while a stage trained; a `KeyboardInterrupt`. The last step was saved.

    Example:
        >>> adapters = curriculum_finetune(
        ...     "llava-hf/llava-1.5-7b-hf",
        ...     data={"align": "pmc_align.json", "instruct": "instruct_60k.json", "vqa": "vqa_train.json"},
        ...     output_dir="runs/llava-med",
        ...     image_folder="images/",
        ...     quantization="nf4",
        ... )  # doctest: +SKIP
    """
    eval_data = {} if eval_data is None else eval_data
    check_names(curriculum, data, eval_data, image_folder)
    check_files(Path(output_dir), [*data.values(), *eval_data.values()], _OWN_NAMES)
    if not isinstance(max_rejected, (int, float)) or not 0 <= max_rejected <= 1:
        raise ConfigError(f"max_rejected is {max_rejected!r}; wanted a share between 0 and 1.")
    parent = start_from if isinstance(start_from, StageAdapter) or start_from is None else StageAdapter.load(start_from)
    check_lineage(curriculum, parent, quantization)
    computing = choose_computing(
        dtype=dtype,
        layout=layout,
        max_row_tokens=max_row_tokens,
        gradient_checkpointing=gradient_checkpointing,
        workers=workers,
        eval_steps=eval_steps,
        save_steps=save_steps,
        report_to=report_to,
        quantization=quantization,
        feature_cache=feature_cache,
    )
    config = read_config(model)
    base = base_record(model, config)
    if parent is not None:
        check_architecture(base, parent)
    lineage = Lineage(str(model), base, root=base).behind(parent)
    processor = load_processor(model if parent is None else parent.path, config)
    stage_processor = make_stage_processor(processor, curriculum.image_aspect_ratio)
    # the others wait while one checks data or writes a checkpoint
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
    sources = {
        use: {
            stage.name: open_sources(given[stage.name], _folder_of(image_folder, stage), f"{use}[{stage.name!r}]")
            for stage in curriculum.stages
            if stage.name in given
        }
        for use, given in (("data", data), ("eval_data", eval_data))
    }
    run = Run(Path(output_dir), curriculum, quantization, computing, stage_processor, processes)
    identity = run.identity(base, parent, sources)
    if run.is_finished(identity):
        return {stage.name: StageAdapter.load(run.folder / stage.name) for stage in curriculum.stages}
    adapters: dict[str, StageAdapter] = {}
    with run.claimed(identity) as rejects:
        indexes = {
            stage.name: [
                None if found is None else run.index(stage, found, rejects, max_rejected, use)
                for use, found in (("train", sources["data"][stage.name]), ("eval", sources["eval_data"].get(stage.name)))
            ]
            for stage in curriculum.stages
            if not run.has(stage)
        }
        if layout == "packed":
            for index in (index for both in indexes.values() for index in both if index is not None):
                check_window(config, int(index.column("length").max()))
        run.begin(identity)
        for stage in curriculum.stages:
            if run.has(stage):
                adapters[stage.name] = run.finished_stage(stage, lineage)
            else:
                train_index, eval_index = indexes[stage.name]
                assert train_index is not None
                with launcher_aside():
                    adapters[stage.name] = run.stage(stage, lineage, train_index, eval_index, rejects)
            run.settle(stage)
            lineage = lineage.behind(adapters[stage.name])
    return adapters


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a stage begins: the checkpoint its tensors sit on, and the adapter they continue.

    Args:
        base: Hub id or folder of that checkpoint.
        record: what identifies it, for `stage.json`.
        root: what identifies the checkpoint that the lineage began with, before any full stage.
        parent: the stage before, an adapter or a checkpoint.
    """

    base: str
    record: dict[str, Any]
    root: dict[str, Any]
    parent: StageAdapter | None = None

    def behind(self, stage: StageAdapter | None) -> Lineage:
        """The lineage behind a finished stage; a full stage's checkpoint is the base of what follows it."""
        if stage is None:
            return self
        if stage.is_checkpoint:
            # its hash was checked when it was loaded
            base = base_record(stage.path, read_config(stage.path), stage.record["sha256"])
            return Lineage(str(stage.path), base, stage.record["root"], stage)
        return replace(self, parent=stage)

    @property
    def adapter(self) -> StageAdapter | None:
        """The parent, where its tensors are not in the base already."""
        return None if self.parent is None or self.parent.is_checkpoint else self.parent


@dataclass(slots=True)
class Run:
    """What the stages of one call share.

    Args:
        folder: the call's `output_dir`.
        computing: how stages are computed.
        processor: every stage's: the base's, with what training adds.
        processes: those that train together; the first of them writes.
    """

    folder: Path
    curriculum: Curriculum
    quantization: Quantization
    computing: Computing
    processor: ProcessorMixin
    processes: PartialState

    @property
    def writes(self) -> bool:
        """One process writes; the others read what it wrote. If it fails, the launcher ends them."""
        return self.processes.is_main_process

    def identity(
        self, base: Mapping[str, Any], parent: StageAdapter | None, sources: Mapping[str, Mapping[str, Sequence[Source]]]
    ) -> dict[str, Any]:
        """What decides the run's result, for `run.json`: how it is computed is no part of it, but for the dtype."""
        curriculum = self.curriculum.to_dict()
        return {
            "base": base,
            "start_from": None if parent is None else {"stage": parent.stage.name, "sha256": parent.record["sha256"]},
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
        taken = [stage.name for stage in self.curriculum.stages if stage.name in _OWN_NAMES]
        if taken:
            raise ConfigError(
                f"Stage.name is {taken[0]!r}, which the run needs for itself (as {', '.join(_OWN_NAMES)}); wanted another name."
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
                rejects.forget(failed_in(stage.name) for stage in self.curriculum.stages if not self.has(stage))
                self.processes.wait_for_everyone()
                yield rejects

    def begin(self, identity: Mapping[str, Any]) -> None:
        """From here on the folder is this run's and no other's."""
        if self.writes and not (self.folder / RUN).exists():
            write_run(self.folder, identity)

    def has(self, stage: Stage) -> bool:
        """The stage is finished."""
        return (self.folder / stage.name).exists()

    def index(self, stage: Stage, sources: list[Source], rejects: RejectLog, max_rejected: float, use: str) -> Index:
        """Check a stage's training or held-out data and keep what was found beside the run, for the next call as well."""
        path = self.folder / INDEX / f"{stage.name}-{use}.arrow"
        with _others_wait(self.processes):
            if self.writes:
                collator = PackedCollator(self.processor, stage.schedule.max_length)
                build_index(sources, collator, path, rejects, max_rejected, RunLog(self.folder).show)
        return Index.open(path)

    def finished_stage(self, stage: Stage, lineage: Lineage) -> StageAdapter:
        """A stage that an earlier call finished.

        Raises:
            TrainingError: the stage before it was trained anew and came out otherwise.
        """
        adapter = StageAdapter.load(self.folder / stage.name)
        if adapter.parent != _parent(lineage):
            raise TrainingError(
                f"{adapter.path}: was trained behind {adapter.parent}, what stands before it now is {_parent(lineage)}. Remove "
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
        model, _ = load_checkpoint(lineage.base, self.quantization)  # in the stored dtype: what trains begins unrounded
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
        try:
            trained = train_stage(
                model,
                self.processor,
                stage,
                train_index,
                eval_index,
                computing=self.computing,
                seed=self.curriculum.seed,
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
            records = [read_record(self.folder / done.name) for done in self.curriculum.stages if self.has(done)]
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
            "parent": _parent(lineage),
            "data": train_index.account(),
            "eval_data": [] if eval_index is None else eval_index.account(),
            "metrics": trained.metrics,
            "computing": {
                **computing,
                "dtype": str(self.computing.dtype).removeprefix("torch."),
                "sharding": None if self.computing.sharding is None else self.computing.sharding.method,
                "quantization": self.quantization,
            },
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
            "processes": self.processes.num_processes,
            "versions": _versions(),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }


def _parent(lineage: Lineage) -> dict[str, str] | None:
    parent = lineage.parent
    return None if parent is None else {"stage": parent.stage.name, "sha256": parent.record["sha256"]}


@contextlib.contextmanager
def _others_wait(processes: PartialState) -> Iterator[None]:
    """What may take long for one process; the others wait at the end of it, a day if need be.

    The barrier of the training group would give up after `_LONGEST_WAIT`.
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


def _folder_of(image_folder: str | Path | Mapping[str, str | Path] | None, stage: Stage) -> str | Path | None:
    return image_folder.get(stage.name) if isinstance(image_folder, Mapping) else image_folder


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"llavamed-peft": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions
