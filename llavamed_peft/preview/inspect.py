"""What a run would do with its data, line by line, before it runs: `inspect`.

It needs a checkpoint's configuration and processor, no weights and no GPU: the model is built on torch's meta
device and adapters are attached to it there, so what is listed as trained is what `modeling/parts.py` has
compared name by name. Rows are checked by the functions with which training checks them, and those shown were
laid out by the collator, pixels decoded. Left out: time and memory, which only a run can tell, and held-out
data.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
from transformers import PreTrainedConfig, ProcessorMixin

from ..batches.index import Index
from ..batches.steps import StepSampler, steps_in_all, why_nothing_is_learnt
from ..datasets.sources import open_sources
from ..errors import ConfigError
from ..llava_med import LLAVA_MED
from ..modeling.fit import embedding_rows
from ..modeling.load import read_config
from ..modeling.processor import load_processor, make_stage_processor
from ..packing.collator import PackedCollator
from ..packing.masks import MAX_ROW_TOKENS, check_window
from ..reporting.text import aligned, indented, wrapped
from ..stages import Curriculum, Stage
from .packed_step import describe_step, draw_steps, first_step
from .rows import accounts, check_data, first_rows, lengths
from .scopes import what_trains


def inspect(
    base: str | Path,
    data: Mapping[str, Sequence[str | Path]],
    image_folder: str | Path | Mapping[str, str | Path] | None = None,
    curriculum: Curriculum = LLAVA_MED,
    *,
    rows: int = 3,
    max_rejected: float = 0.05,
    packing: bool | Path = False,
    max_row_tokens: int | None = None,
    width: int = 100,
    colour: bool = False,
) -> Iterator[str]:
    """What `curriculum_finetune` would train, on what, and for how many steps.

    Args:
        base: Hub id or folder of a LLaVA checkpoint; its weights are not read and need not be there.
        data: stage name → LLaVA JSON files; a stage without an entry is shown without data.
        image_folder: that image paths are relative to: one folder, or stage name → folder; `None`: each data
            file's own folder.
        curriculum: what would be trained.
        rows: how many usable rows of each data set are shown, supervised tokens marked.
        max_rejected: share of unusable rows above which training would refuse a data set.
        packing: show how each stage's first step is packed; a path: and draw it there; its name ends in
            `.png`.
        max_row_tokens: of that step, as on one GPU; `None`: what a run takes there.
        width: characters of a line.
        colour: supervised tokens underlined and green, for a terminal; otherwise they are in `[[…]]`.

    Returns:
        Lines, as they are found out. What cannot be opened at all raises before the first.

    Raises:
        ConfigError: `data` or `image_folder` has a key that is no stage of the curriculum; the picture is no
            PNG file, has no folder to be in, or nothing to show.
        CheckpointError: the configuration or the processor cannot be used.
        DataError: a file that is missing, or broken.
    """
    curriculum.check_keys("data", data)
    curriculum.check_keys("image_folder", image_folder if isinstance(image_folder, Mapping) else ())
    if isinstance(packing, Path):
        if packing.suffix.lower() != ".png":
            raise ConfigError(
                f"The picture of the packed steps is to be {str(packing)!r}; wanted a name that ends in .png."
            )
        if not packing.parent.is_dir():
            raise ConfigError(
                f"The picture of the packed steps is to be {packing}; {packing.parent} is no folder. Make it "
                "first."
            )
    max_row_tokens = max_row_tokens or MAX_ROW_TOKENS["cuda"]
    config = read_config(base)
    processor = make_stage_processor(load_processor(base, config), curriculum.image_aspect_ratio)
    # Stages that share files, image folder and max_length share one check.
    sharing: dict[tuple[tuple[str, ...], str | Path | None, int], list[Stage]] = defaultdict(list)
    for stage in curriculum.stages:
        if stage.name in data:
            folder = image_folder.get(stage.name) if isinstance(image_folder, Mapping) else image_folder
            sharing[tuple(map(str, data[stage.name])), folder, stage.schedule.max_length].append(stage)
    opened = {
        key: open_sources(key[0], key[1], f"data[{stages[0].name!r}]") for key, stages in sharing.items()
    }
    yield from what_trains(str(base), config, curriculum.stages)
    indexes: dict[str, Index] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, (key, stages) in enumerate(sharing.items()):
            collator = PackedCollator(
                processor, max_length=key[2], layout="padded", embedding_rows=embedding_rows(config)
            )
            check = check_data(opened[key], collator, Path(folder, str(number)))
            indexes |= {stage.name: check.index for stage in stages}
            yield f"\ndata of {', '.join(stage.name for stage in stages)} (max_length {key[2]:,})"
            yield from indented(2, accounts(check, max_rejected, width - 2))
            yield from indented(2, lengths(check.index, width - 2))
            yield from indented(2, first_rows(check.index, collator, rows, width - 2, colour))
        yield "\nsteps"
        yield from indented(2, _steps(curriculum, indexes))
        if packing:
            yield f"\npacking, in rows of at most {max_row_tokens:,} tokens"
            picture = packing if isinstance(packing, Path) else None
            yield from indented(
                2, _packing(curriculum, indexes, config, processor, max_row_tokens, picture, width - 2)
            )


def _steps(curriculum: Curriculum, indexes: Mapping[str, Index]) -> Iterator[str]:
    table = [
        [
            "stage",
            "conversations",
            "images",
            "batch",
            "steps an epoch",
            "epochs",
            "steps in all",
            "supervised tokens an epoch",
        ]
    ]
    idle = []
    for stage in curriculum.stages:
        schedule, index = stage.schedule, indexes.get(stage.name)
        if index is None:
            table.append(
                [
                    stage.name,
                    "no data given",
                    "",
                    f"{schedule.global_batch:,}",
                    "",
                    f"{schedule.epochs:g}",
                    "",
                    "",
                ]
            )
            continue
        # Steps depend on the schedule alone, not on how they are cut into device batches.
        sampler = StepSampler(
            index.column("length"), index.column("group"), schedule, schedule.max_length, curriculum.seed
        )
        images = pc.count_distinct(pc.list_flatten(index.rows.data.column("images"))).as_py()
        counts = [len(index), images, schedule.global_batch, len(sampler)]
        supervised = int(index.column("supervised_tokens").sum())
        in_all = steps_in_all(len(sampler), schedule)
        table.append(
            [
                stage.name,
                *(f"{n:,}" for n in counts),
                f"{schedule.epochs:g}",
                f"{in_all:,}",
                f"{supervised:,}",
            ]
        )
        if len(index) and (why := why_nothing_is_learnt(stage, len(sampler), index.image_counts().sum())):
            idle.append(f"{stage.name} would learn nothing: {why}")
    yield from aligned(table, right=set(range(1, 8)))
    yield from idle


def _packing(
    curriculum: Curriculum,
    indexes: Mapping[str, Index],
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    max_row_tokens: int,
    picture: Path | None,
    width: int,
) -> Iterator[str]:
    drawn = []
    for stage in curriculum.stages:
        index = indexes.get(stage.name)
        if index is None or not len(index):
            continue
        try:
            check_window(config, int(index.column("length").max()))
        except ConfigError as error:
            yield from wrapped(f"{stage.name}: training would refuse this: {error}", width, "", "  ")
            continue
        collator = PackedCollator(processor, stage.schedule.max_length, max_row_tokens)
        sampler = index.sampler(collator, stage.schedule, curriculum.seed)
        drawn.append(first_step(f"{stage.name}, the first step", index, collator, sampler))
        for line in describe_step(drawn[-1], width):
            indent = len(line) - len(line.lstrip())
            yield from wrapped(line.strip(), width, " " * indent, " " * (indent + 2))
    if picture is None:
        return
    if not drawn:
        raise ConfigError(f"{picture}: not drawn, since no stage has conversations that could be packed.")
    try:
        draw_steps(drawn, picture)
    except OSError as error:
        raise ConfigError(
            f"{picture}: cannot be written ({error}); choose another place for the picture."
        ) from error
    yield f"drawn: {picture}"
