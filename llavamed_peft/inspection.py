"""What a run would do with its data, line by line, before it runs: `inspect`.

It needs a checkpoint's configuration and processor, no weights and no GPU: the model is built on torch's meta device and adapters
are attached to it there, so what is listed as trained is what `modeling/parts.py` has compared name by name. Rows are checked by
the functions with which training checks them, and those shown were laid out by the collator, pixels decoded. Left out: time and
memory, which only a run can tell, and held-out data.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig, ProcessorMixin

from .datasets.rejects import Reject, RejectLog
from .datasets.sources import Source, open_sources
from .errors import ConfigError, DataError, did_you_mean
from .modeling.load import empty_model, read_config
from .modeling.parts import adapter_config, attach, own_name, set_dtypes, unfreeze_full
from .modeling.processor import load_processor, make_stage_processor
from .packing.collator import PackedCollator
from .packing.encoding import IGNORED
from .packing.index import Index
from .packing.indexing import build_index
from .packing.masks import MAX_ROW_TOKENS, check_window
from .packing.steps import StepSampler, steps_in_all, why_nothing_is_learnt
from .stages import LLAVA_MED, Curriculum, LoraSpec, Scope, Stage
from .step_view import describe_step, draw_steps, first_step
from .terminal import aligned, histogram, indented, visible, wrapped

EXAMPLES = 3  # rejected rows that are shown for each reason
_MARKED = "\033[4;32m{}\033[0m"  # underlined, so that blanks show, and green

Piece = tuple[str, bool]  # text, and whether the model learns to write it


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What became of the rows of some files.

    Args:
        index: the usable ones, and what was counted for each file.
        reasons: why others cannot be used → how many, most frequent first.
        examples: reason → the first of them.
    """

    index: Index
    reasons: dict[str, int]
    examples: dict[str, list[Reject]]


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
        image_folder: that image paths are relative to: one folder, or stage name → folder; `None`: each data file's own folder.
        curriculum: what would be trained.
        rows: how many usable rows of each data set are shown, supervised tokens marked.
        max_rejected: share of unusable rows above which training would refuse a data set.
        packing: show how each stage's first step is packed; a path: and draw it there; its name ends in `.png`.
        max_row_tokens: of that step, as on one GPU; `None`: what a run takes there.
        width: characters of a line.
        colour: supervised tokens underlined and green, for a terminal; else they stand in `[[…]]`.

    Returns:
        Lines, as they are found out. What cannot be opened at all raises before the first.

    Raises:
        ConfigError: `data` or `image_folder` has a key that is no stage of the curriculum; the picture is no PNG file, has no
            folder to stand in, or nothing to show.
        CheckpointError: the configuration or the processor cannot be used.
        DataError: a file that is missing, or broken as a whole.
    """
    curriculum.check_keys("data", data)
    curriculum.check_keys("image_folder", image_folder if isinstance(image_folder, Mapping) else ())
    if isinstance(packing, Path):
        if packing.suffix.lower() != ".png":
            raise ConfigError(f"The picture of the packed steps is to be {str(packing)!r}; wanted a name that ends in .png.")
        if not packing.parent.is_dir():
            raise ConfigError(
                f"The picture of the packed steps is to be {packing}; {packing.parent} is no folder. Make it first."
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
    opened = {key: open_sources(key[0], key[1], f"data[{stages[0].name!r}]") for key, stages in sharing.items()}
    yield from _what_trains(str(base), config, curriculum.stages)
    indexes: dict[str, Index] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, (key, stages) in enumerate(sharing.items()):
            collator = PackedCollator(processor, max_length=key[2], layout="padded")
            check = check_data(opened[key], collator, Path(folder, str(number)))
            indexes |= {stage.name: check.index for stage in stages}
            yield f"\ndata of {', '.join(stage.name for stage in stages)} (max_length {key[2]:,})"
            yield from indented(2, _accounts(check, max_rejected, width - 2))
            yield from indented(2, _lengths(check.index, width - 2))
            yield from indented(2, _first_rows(check.index, collator, rows, width - 2, colour))
        yield "\nsteps"
        yield from indented(2, _steps(curriculum, indexes))
        if packing:
            yield f"\npacking, in rows of at most {max_row_tokens:,} tokens"
            picture = packing if isinstance(packing, Path) else None
            yield from indented(2, _packing(curriculum, indexes, config, processor, max_row_tokens, picture, width - 2))


def files_by_stage(words: Iterable[str], curriculum: Curriculum) -> dict[str, list[str]]:
    """`["a.json", "vqa=b.json"]` → stage name → files: a plain file is every stage's, `stage=file` that stage's.

    Raises:
        ConfigError: a stage that the curriculum does not have.
    """
    names = [stage.name for stage in curriculum.stages]
    files: dict[str, list[str]] = defaultdict(list)
    for word in words:
        stage, equals, file = word.partition("=")
        if not equals or Path(word).is_file():
            for name in names:
                files[name].append(word)
        elif stage in names:
            files[stage].append(file)
        else:
            raise ConfigError(f"{word!r} is no file, and {stage!r} no stage of the curriculum.{did_you_mean(stage, names)}")
    return dict(files)


def folders_by_stage(words: Sequence[str] | None) -> str | dict[str, str] | None:
    """`["images/"]` → one folder for all stages; `["align=a/", "vqa=b/"]` → stage name → folder.

    Raises:
        ConfigError: several folders, and not each with the name of a stage.
    """
    if not words:
        return None
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).is_dir()):
        return words[0]
    parts = [word.partition("=") for word in words]
    for word, (stage, equals, folder) in zip(words, parts, strict=True):
        if not (stage and equals and folder):
            raise ConfigError(f"--image_folder is {word!r}; wanted one folder, or stage=folder for each.")
    return {stage: folder for stage, _, folder in parts}


# What trains


def trainable_parameters(config: PreTrainedConfig, trains: Scope, lora: LoraSpec | None) -> dict[str, torch.Tensor]:
    """What a stage would train: name → parameter on the meta device, in the dtype in which it trains.

    The names are the checkpoint's own, LoRA's `….q_proj.lora_A.weight` beside them.

    Raises:
        TrainingError: the checkpoint's class has other parts than the scope names.
    """
    empty = empty_model(config)
    stored = empty.dtype
    model = unfreeze_full(empty) if trains == "full" else attach(empty, adapter_config(empty, lora), trains)
    set_dtypes(model, stored)
    return {own_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _what_trains(base: str, config: PreTrainedConfig, stages: Sequence[Stage]) -> Iterator[str]:
    model = empty_model(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    dtype = _dtype_name(model.dtype)
    language_model, vision_tower = config.get_text_config().model_type, config.vision_config.model_type
    yield f"{base}: {config.model_type} over {language_model} and {vision_tower}"
    yield f"  {whole:,} parameters, stored in {dtype}"
    yield "\nwhat trains"
    shown: dict[tuple[Scope, LoraSpec | None], str] = {}
    for stage in stages:
        key = (stage.trains, stage.lora)
        spec = f" (rank {stage.lora.rank}, alpha {stage.lora.alpha:g}, dropout {stage.lora.dropout:g})" if stage.lora else ""
        if key in shown:
            yield f"  {stage.name}: {stage.trains}{spec}, the same as {shown[key]}"
            continue
        shown[key] = stage.name
        parameters = trainable_parameters(config, stage.trains, stage.lora)
        count = sum(parameter.numel() for parameter in parameters.values())
        dtypes = ", ".join(sorted({_dtype_name(parameter.dtype) for parameter in parameters.values()}))
        yield (
            f"  {stage.name}: {stage.trains}{spec}, {count:,} parameters in {len(parameters):,} tensors, {dtypes}; "
            f"{count / whole:.2%} of the checkpoint"
        )
        yield from indented(4, aligned(_by_module(parameters), right={1, 3}))


def _by_module(parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Rows of module, how many of its kind, its tensors' shapes, parameters; layers that are alike are one row."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    for name, parameter in parameters.items():
        module, tensor = re.fullmatch(r"(.+?)\.(lora_\w+\.\w+|\w+)", name).groups()
        modules[module][tensor.removesuffix(".weight")] = "×".join(map(str, parameter.shape))
        sizes[module] += parameter.numel()
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, tensors in modules.items():
        shapes = ", ".join(f"{tensor} {shape}" for tensor, shape in tensors.items())
        kinds[re.sub(r"\b\d+\b", "*", module), shapes].append(module)
    return [
        [_range_of(kind, alike), f"×{len(alike)}" if len(alike) > 1 else "", shapes, f"{sum(sizes[name] for name in alike):,}"]
        for (kind, shapes), alike in kinds.items()
    ]


def _range_of(kind: str, modules: Sequence[str]) -> str:
    """`layers.0-31.mlp` for 32 layers in a row; where some are left out, `layers.*.mlp`."""
    numbers = [int(number) for module in modules for number in re.findall(r"\b\d+\b", module)]
    if kind.count("*") == 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return kind.replace("*", f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return kind


# What it would train on


def check_data(sources: Sequence[Source], collator: PackedCollator, folder: Path) -> DataCheck:
    """Check every row as training does, and keep the first examples of what cannot be used.

    Args:
        sources: the data of a stage.
        collator: the stage's.
        folder: where the index and the list of rejected rows may be written.

    Raises:
        DataError: a file that is broken as a whole.
    """
    with RejectLog(folder / "rejected.jsonl") as log:
        index = build_index(sources, collator, folder / "index.arrow", log, max_rejected=None)
    examples: dict[str, list[Reject]] = defaultdict(list)
    if log.total:
        with log.path.open(encoding="utf-8") as lines:
            for reject in (Reject(**json.loads(line)) for line in lines):
                if len(examples[reject.reason]) < EXAMPLES:
                    examples[reject.reason].append(reject)
    return DataCheck(index, dict(log.commonest(len(log.counts))), examples)


def _accounts(check: DataCheck, max_rejected: float, width: int) -> Iterator[str]:
    for count in check.index.files:
        yield f"{visible(count.name)}: {count.rows:,} rows, {count.used:,} used, {sum(count.rejected.values()):,} rejected"
    for reason, number in check.reasons.items():
        yield f"  {reason}: {number:,}"
        for reject in check.examples[reason]:
            place = f"{Path(reject.file).name}:{reject.row} (id {reject.id}): "
            yield from wrapped(visible(place + reject.detail.removeprefix(place)), width, "    ", "      ")
    if fault := check.index.fault(max_rejected):
        yield from wrapped(f"training would refuse these data: {visible(fault)}", width, "", "  ")


def _lengths(index: Index, width: int) -> Iterator[str]:
    if len(index):
        lengths = index.column("length")
        of_images, supervised = index.column("image_tokens").mean(), index.column("supervised_tokens").mean()
        yield (
            f"lengths: {lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.0f}; of them {of_images:,.0f} of "
            f"images and {supervised:,.0f} supervised"
        )
        yield from indented(2, histogram(lengths, width - 2))


def _first_rows(index: Index, collator: PackedCollator, rows: int, width: int, colour: bool) -> Iterator[str]:
    if not len(index) or not rows:
        return
    yield f"the first rows; supervised is what stands {_MARKED.format('like this') if colour else 'in [[ ]]'}"
    for conversation in map(index.conversation, range(min(rows, len(index)))):
        yield f"  {visible(conversation.source)} (id {visible(conversation.id)})"
        try:
            batch = collator([conversation])
        except DataError as error:  # only the header was read before
            yield from wrapped(f"would fail: {visible(str(error))}", width, "    ", "      ")
            continue
        pieces = marked_text(collator.encoder.processor, batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
        yield from indented(4, _paint(pieces, width - 4, colour))


def marked_text(processor: ProcessorMixin, input_ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """A row as text in stretches, each supervised or not; adjacent image tokens are one `<image>×576`.

    Args:
        input_ids, labels: [tokens], as the model gets them.
    """
    pieces: list[Piece] = []
    shown: list[int] = []
    written = ""
    tokens = zip(input_ids, labels, strict=True)
    for (is_image, supervised), run in groupby(tokens, lambda pair: (pair[0] == processor.image_token_id, pair[1] != IGNORED)):
        ids = [token for token, _ in run]
        shown += ids[:1] if is_image else ids
        # From the beginning each time: a tokenizer may write the first token of a text otherwise than the same one inside it.
        text = processor.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((visible(text[len(written) :]) + (f"×{len(ids)}" if is_image else ""), supervised))
        written = text
    return pieces


def _paint(pieces: Sequence[Piece], width: int, colour: bool) -> list[str]:
    """Lines of at most `width` characters, broken behind blanks where there are any."""
    if not colour:
        pieces = [(f"[[{text}]]" if supervised else text, False) for text, supervised in pieces]
    characters = [(character, supervised) for text, supervised in pieces for character in text]
    lines = []
    while characters:
        cut = width
        if len(characters) > width:
            cut = next((at for at in range(width, width // 2, -1) if characters[at - 1][0] == " "), width)
        line = ""
        for supervised, run in groupby(characters[:cut], lambda pair: pair[1]):
            text = "".join(character for character, _ in run)
            line += _MARKED.format(text) if supervised else text
        lines.append(line if colour else line.rstrip())
        characters = characters[cut:]
    return lines


def _steps(curriculum: Curriculum, indexes: Mapping[str, Index]) -> Iterator[str]:
    table = [
        ["stage", "conversations", "images", "batch", "steps an epoch", "epochs", "steps in all", "supervised tokens an epoch"]
    ]
    idle = []
    for stage in curriculum.stages:
        schedule, index = stage.schedule, indexes.get(stage.name)
        if index is None:
            table.append([stage.name, "no data given", "", f"{schedule.global_batch:,}", "", f"{schedule.epochs:g}", "", ""])
            continue
        # Steps depend on the schedule alone, not on how they are cut into device batches.
        sampler = StepSampler(index.column("length"), index.column("group"), schedule, schedule.max_length, curriculum.seed)
        images = pc.count_distinct(pc.list_flatten(index.rows.data.column("images"))).as_py()
        counts = [len(index), images, schedule.global_batch, len(sampler)]
        supervised = int(index.column("supervised_tokens").sum())
        in_all = steps_in_all(len(sampler), schedule)
        table.append([stage.name, *(f"{n:,}" for n in counts), f"{schedule.epochs:g}", f"{in_all:,}", f"{supervised:,}"])
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
            blanks = len(line) - len(line.lstrip())
            yield from wrapped(line.strip(), width, " " * blanks, " " * (blanks + 2))
    if picture is None:
        return
    if not drawn:
        raise ConfigError(f"{picture}: not drawn, since no stage has conversations that could be packed.")
    try:
        draw_steps(drawn, picture)
    except OSError as error:
        raise ConfigError(f"{picture}: cannot be written ({error}); choose another place for the picture.") from error
    yield f"drawn: {picture}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
