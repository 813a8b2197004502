"""`curriculum_finetune`: a checkpoint and some data, stage after stage, one adapter folder each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedConfig

from .adapters.record import Base
from .adapters.stage_adapter import StageAdapter
from .batches.ledger import Ledger
from .datasets.sources import Data, Source, open_sources
from .llava_med import LLAVA_MED
from .modeling.fit import check_positions, embedding_rows
from .modeling.load import read_config
from .modeling.processor import load_processor, make_stage_processor
from .modeling.quantization import Quantization, check_quantization, stored_quantization
from .modeling.sharding import launcher_aside
from .packing.masks import check_window
from .running.lineage import Lineage
from .running.preflight import (
    check_base,
    check_files,
    check_lineage,
    check_names,
    check_names_fit,
    check_scopes,
    check_share,
    parent_processor,
)
from .running.run import LONGEST_WAIT, OWN_NAMES, Run
from .stages import Curriculum
from .training.computing import choose_computing


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
    full_dtype: Literal["float32", "stored"] = "float32",
) -> dict[str, StageAdapter]:
    """Take a LLaVA checkpoint through a curriculum; every stage leaves a self-contained folder in
    `output_dir`.

    To resume an interrupted run, make the same call again. Finished stages are not trained again, and the one
    that was training resumes from its last intact checkpoint. The result is what it would have been without
    the interruption, bit for bit where the machine computes the same twice (CPUs; not measured on GPUs).
    SIGTERM and Ctrl-C save first. A finished run is only read. Keywords that only say how it is computed may
    differ between the calls.

    Args:
        model: Hub id or folder of any LLaVA checkpoint (LLaVA, LLaVA-NeXT, ViP-LLaVA, LLaVA-OneVision).
        data: stage name → a LLaVA JSON file, several, or `Conversation` and `Question` values. Every stage
            has an entry.
        output_dir: a folder; `~` is one's own. It gets `<stage>/` for each stage, `metrics.jsonl`,
            `rejected.jsonl` (if rows were rejected), `loss.png`, `stages.md`, `index/` (the checked rows with
            their SHA-256, which a later call with the same data uses again; delete it after fixing images),
            `logs/` (the trackers'), `run.json` (what decides the result) and, until the last stage is
            finished, `checkpoints/` and `features/`.
        image_folder: what image paths are relative to: one folder, or stage name → folder; `None`: the folder
            of each data file.
        curriculum: what to train, and how. Default: the paper's stages, the later two as LoRA.
        eval_data: as `data`; stages with an entry report the held-out loss before, during and after training.
        quantization: `"nf4"` trains over a 4-bit language model; not for `full` stages. A base that is stored
            in NF4 is trained over as it is, with the keyword or without it.
        start_from: a finished stage to continue: a folder, a `StageAdapter`, or a Hub repository.
        dtype: of frozen weights and autocast; `None`: bfloat16 on CUDA, float32 on a CPU. Trainable tensors
            are float32.
        layout: of device batches. `"packed"`: what several conversations of a step begin with (a system
            prompt, an image) is there once, in rows without gaps; with FlexAttention on CUDA (not yet run
            there), with a mask and `sdpa` elsewhere and where FlexAttention is not available. `"padded"`: a
            row for each conversation, padded to the longest. The losses are the same. Under LoRA dropout, the
            shared part is dropped for all of its conversations alike: the same in expectation, with other
            noise.
        max_row_tokens: bound of a device batch's tokens, rows × longest; with FlexAttention it is one row.
            `None`: 4,096 on a CPU, 8,192 on CUDA (not yet measured there).
        max_rejected: share of unusable rows above which a data set is refused: before training, or while it
            trains if images turn out to be damaged or vanish. The last checkpoint stays intact then.
        eval_steps: optimizer steps between two held-out losses; `None`: ten of them in a stage.
        save_steps: optimizer steps between two checkpoints; `None`: ten of them in a stage. The first one
            shows what it costs.
        workers: processes that decode images ahead, for each GPU; `None`: its share of the cores, at most 8;
            none on a CPU, where they would take the model's cores. Fewer start where half of the free
            /dev/shm has no room for the steps that they hold; a line says so. One that dies, or is at one
            image for ten minutes while training waits, is an error that names its row.
        report_to: further trackers, such as `"tensorboard"` or `"trackio"`.
        gradient_checkpointing: `None`: on for CUDA, off for a CPU.
        feature_cache: store in `features/` what the frozen vision tower makes of each image (about 1.2 MB for
            an image of 336 pixels in 16 bits, more where images have tiles). It is computed once, and no
            image is decoded again. `"auto"`: where at most half as many images then pass the tower, and it
            fits into 50 GB and half of the free disk; a line says so before each stage. True: always, or an
            error where it does not fit. Not for a sharded model.
        full_dtype: in which a `full` stage is written. `"float32"`: as it was trained, bit for bit, and the
            next stage begins there (28 GB for 7B). `"stored"`: in the base's stored dtype (14 GB in 16 bits);
            it is rounded before its last held-out loss, and the loss before that is recorded beside it.
            What training changed by less than the last place of that dtype is lost.

    Launched by `torchrun` or `accelerate launch`, the processes share the work. Where the launch
    configuration asks for FSDP (version 2) or DeepSpeed (ZeRO-2, ZeRO-3), each process holds a part of every
    stage's model. What is learnt stays the same.

    Returns:
        Stage name → `StageAdapter`, in order.

    Raises:
        ConfigError: arguments that do not fit together; `output_dir` holds a run of another curriculum, base
            or data (the message lists the difference); or conversations longer than a sliding window, which
            packed rows would ignore. Nothing was trained.
        CheckpointError, DataError, AdapterError: the base, the data or `start_from` cannot be used; the
            message says why.
        TrainingError: a stage cannot begin or continue: a loss that is not finite, too little memory on the
            GPU, a full disk, images that vanished, another run at work in `output_dir`. Finished stages and
            the last checkpoint stay intact.
        errors.Interrupted: SIGTERM or Ctrl-C while a stage trained; a `KeyboardInterrupt`. The last step was
            saved.

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
    check_files(output_dir, [*data.values(), *eval_data.values()], OWN_NAMES)
    check_share("max_rejected", max_rejected)
    output_dir = Path(output_dir).expanduser()
    check_names_fit(output_dir, [stage.name for stage in curriculum.stages])
    model = os.path.expanduser(model)
    parent, config, quantization = _beginning(model, start_from, curriculum, quantization)
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
        full_dtype=full_dtype,
    )
    base = Base.of(model, read_config(model))
    if parent is not None:
        check_base(base, config, parent, quantization)
    lineage = Lineage(str(model), base, root=base).after(parent)
    processor = load_processor(model, config) if parent is None else parent_processor(parent, config)
    processor = make_stage_processor(processor, curriculum.image_aspect_ratio)
    # The others wait while one checks data or writes a checkpoint.
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    given = {"data": data, "eval_data": eval_data}
    sources = {name: _sources(curriculum, name, files, image_folder) for name, files in given.items()}
    rows = embedding_rows(config)
    run = Run(output_dir, curriculum, quantization, computing, processor, processes, max_rejected, rows)
    identity = run.identity(base, parent, sources)
    if run.is_finished(identity):
        return {stage.name: StageAdapter.load(run.folder / stage.name) for stage in curriculum.stages}
    adapters: dict[str, StageAdapter] = {}
    with run.claimed(identity) as rejects:
        ledgers = run.ledgers(sources, rejects)
        _check_lengths(config, ledgers, layout)
        run.begin(identity)
        for stage in curriculum.stages:
            if run.has(stage):
                adapters[stage.name] = run.finished_stage(stage, lineage)
            else:
                with launcher_aside():
                    adapters[stage.name] = run.stage(stage, lineage, *ledgers[stage.name], rejects)
            run.settle(stage)
            lineage = lineage.after(adapters[stage.name])
    return adapters


def _beginning(
    model: str,
    start_from: StageAdapter | str | Path | None,
    curriculum: Curriculum,
    quantization: Quantization,
) -> tuple[StageAdapter | None, PreTrainedConfig, Quantization]:
    """`start_from`, the configuration of the checkpoint that the first stage begins with, and whether its
    language model is in 4 bits, asked for or stored so."""
    in_memory = start_from is None or isinstance(start_from, StageAdapter)
    parent = start_from if in_memory else StageAdapter.load(os.path.expanduser(start_from))
    check_lineage(curriculum, parent)
    check_quantization(quantization)
    first = parent.path if parent is not None and parent.is_checkpoint else model
    config = read_config(first)
    stored = stored_quantization(first, config)
    check_scopes(curriculum, quantization, stored)
    return parent, config, quantization or stored


def _check_lengths(
    config: PreTrainedConfig, ledgers: Mapping[str, tuple[Ledger, Ledger | None]], layout: str
) -> None:
    """The longest conversation of all data fits the language model."""
    every = (ledger for both in ledgers.values() for ledger in both if ledger is not None)
    longest = max((int(ledger.index.column("length").max()) for ledger in every), default=0)
    check_positions(config, longest)
    if layout == "packed":
        check_window(config, longest)


def _sources(
    curriculum: Curriculum,
    argument: str,
    given: Mapping[str, Data],
    image_folder: str | Path | Mapping[str, str | Path] | None,
) -> dict[str, list[Source]]:
    """Stage name → its data files, opened, for the stages that have any."""
    sources = {}
    for name in (stage.name for stage in curriculum.stages if stage.name in given):
        folder = image_folder.get(name) if isinstance(image_folder, Mapping) else image_folder
        sources[name] = open_sources(given[name], folder, f"{argument}[{name!r}]")
    return sources
