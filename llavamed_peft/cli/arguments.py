"""The options of recipes and of the console script, as dataclasses, and the one grammar of `stage=path`.

What decides the result and how it is computed are dataclasses of their own: `CurriculumArguments`, or for a
single stage `StageDataArguments` and what `stage_arguments` makes; and `RunArguments`, the same everywhere.
`parsing.py` reads them from the command line and from a YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import ConfigError, did_you_mean
from ..llava_med import LLAVA_MED, LLAVA_MED_FULL
from ..stages import Curriculum, LoraSpec, Schedule, Stage

# of an option: on the command line, or a mapping in a YAML file
Words = Sequence[str] | Mapping[str, Any] | None

_NAMED = {"LLAVA_MED": LLAVA_MED, "LLAVA_MED_FULL": LLAVA_MED_FULL}


def by_stage(option: str, given: Words, plain_for: Sequence[str] = ()) -> dict[str, list[str]]:
    """`["vqa=a.json", "vqa=b.json"]`, or `{"vqa": ["a.json", "b.json"]}` → `{"vqa": ["a.json", "b.json"]}`.

    Args:
        option: its name, for errors.
        given: its words, or a mapping.
        plain_for: stages that a plain path counts for; without any, each word must be `stage=path`. A word
            that is the name of a file is a plain path, also with a `=` in it.

    Raises:
        ConfigError: a word is neither, names a stage that is not in `plain_for`, or a mapping holds no paths.
    """
    paths: dict[str, list[str]] = {}
    if isinstance(given, Mapping):
        for stage, value in given.items():
            several = [value] if isinstance(value, str) else value
            if not (isinstance(several, list) and several and all(p and isinstance(p, str) for p in several)):
                raise ConfigError(f"{option}[{stage!r}] is {value!r}; wanted a path or a list of paths.")
            paths[stage] = several
        return paths
    for word in given or ():
        stage, equals, path = word.partition("=")
        if plain_for and (not equals or Path(word).is_file()):
            for name in plain_for:
                paths.setdefault(name, []).append(word)
        elif plain_for and stage not in plain_for:
            raise ConfigError(
                f"{word!r} is no file, and {stage!r} no stage of the "
                f"curriculum.{did_you_mean(stage, plain_for)}"
            )
        elif stage and equals and path:
            paths.setdefault(stage, []).append(path)
        else:
            example = "data.json" if equals else word
            raise ConfigError(f"{option} is given {word!r}; wanted stage=path, such as align={example}.")
    return paths


def folder_by_stage(option: str, given: Words) -> str | dict[str, str] | None:
    """`["images/"]` → one folder for all stages; `["align=a/", "vqa=b/"]`, or a mapping → stage → folder.

    Raises:
        ConfigError: as `by_stage`; or a stage has several folders.
    """
    if not given:
        return None
    if (
        not isinstance(given, Mapping)
        and len(given) == 1
        and ("=" not in given[0] or Path(given[0]).is_dir())
    ):
        return given[0]
    found = by_stage(option, given)
    for stage, folders in found.items():
        if len(folders) != 1:
            raise ConfigError(f"{option}[{stage!r}] is {folders!r}; wanted one folder.")
    return {stage: folder for stage, (folder,) in found.items()}


@dataclass(kw_only=True)
class RunArguments:
    """How a run is computed: keywords of `curriculum_finetune`, which says more about each."""

    quantization: Literal["nf4"] | None = field(
        default=None,
        metadata={
            "help": "'nf4' trains over a 4-bit language model (QLoRA); None leaves the base as it is stored"
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "of frozen weights and autocast; None: bfloat16 on CUDA, float32 on a CPU"},
    )
    layout: Literal["packed", "padded"] = field(
        default="packed",
        metadata={
            "help": "'packed': what conversations begin with, such as an image, is there once; 'padded': "
            "a row each"
        },
    )
    max_row_tokens: int | None = field(
        default=None,
        metadata={"help": "bound of a device batch in tokens; less where memory runs out. None: by device"},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "recompute activations to save memory; None: on for CUDA, off for a CPU"},
    )
    max_rejected: float = field(
        default=0.05,
        metadata={
            "help": "share of unusable rows above which a data set is refused, before training or in it"
        },
    )
    eval_steps: int | None = field(
        default=None,
        metadata={"help": "optimizer steps between two held-out losses; None: ten of them a stage"},
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps between two checkpoints; None: ten of them a stage"}
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "processes that decode images ahead, for each GPU; None: its share of the cores, up to "
            "8; none on a CPU; "
            "fewer where /dev/shm has no room"
        },
    )
    feature_cache: Literal["auto", True, False] = field(
        default="auto",
        metadata={
            "help": "store what the vision tower makes of each image and compute it once; auto: where that "
            "pays and fits"
        },
    )
    full_dtype: Literal["float32", "stored"] = field(
        default="float32",
        metadata={
            "help": "in which a full stage is written: as it was trained, or rounded to the base's stored "
            "dtype before its last held-out loss"
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "further trackers, such as tensorboard or trackio"},
    )


@dataclass(kw_only=True)
class CurriculumArguments:
    """What decides the result of a curriculum: the options of `recipes/curriculum.py`, and of every
    cookbook."""

    MAPPINGS: ClassVar = ("data", "eval_data", "image_folder", "curriculum")

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: list[str] = field(metadata={"help": "LLaVA JSON of each stage, stage=file"})
    output_dir: str = field(
        metadata={
            "help": "holds the stages' folders, the losses and rejected.jsonl; the same command resumes"
        }
    )
    image_folder: list[str] | None = field(
        default=None,
        metadata={
            "help": "where image paths start: one folder, or stage=folder; None: each data file's folder"
        },
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "LLaVA JSON to measure held-out losses on, stage=file"}
    )
    curriculum: str = field(
        default="LLAVA_MED",
        metadata={"help": "LLAVA_MED, LLAVA_MED_FULL, a YAML file of stages, or in --config the stages"},
    )
    start_from: str | None = field(
        default=None, metadata={"help": "a finished stage (folder or Hub id) to continue"}
    )

    def files(self, option: Literal["data", "eval_data"]) -> dict[str, list[str]]:
        """Stage → its files.

        Raises:
            ConfigError: a word is not `stage=file`, or a mapping holds something else.
        """
        return by_stage(option, getattr(self, option))

    def folders(self) -> str | dict[str, str] | None:
        """One folder for all stages, or stage → folder.

        Raises:
            ConfigError: as `folder_by_stage`.
        """
        return folder_by_stage("image_folder", self.image_folder)

    def stages(self) -> Curriculum:
        """The curriculum: one that has a name, one in a YAML file, or one in the file of options."""
        if isinstance(self.curriculum, Mapping):
            return Curriculum.from_dict(self.curriculum)
        return _NAMED.get(self.curriculum) or Curriculum.from_yaml(Path(self.curriculum))


@dataclass(kw_only=True)
class StageDataArguments:
    """What a single stage learns from, in LLaVA's format, and where it is left."""

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: list[str] = field(metadata={"help": "LLaVA JSON, one file or several"})
    output_dir: str = field(
        metadata={"help": "holds the stage's folder, the losses and rejected.jsonl; the same command resumes"}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "where image paths start; None: each data file's folder"}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "LLaVA JSON to measure the held-out loss on"}
    )
    start_from: str | None = field(
        default=None, metadata={"help": "a finished stage (folder or Hub id) to continue"}
    )


class StageArguments:
    """The options of a stage's schedule and LoRA; `stage_arguments` makes the dataclass."""

    STAGE: ClassVar[Stage]
    image_aspect_ratio: str
    seed: int

    def curriculum(self) -> Curriculum:
        """The stage with these options, as a curriculum of its own."""
        given = vars(self)
        schedule = {one.name: given[one.name] for one in fields(Schedule) if one.name in given}
        lora = {
            one.name: given[f"lora_{one.name}"] for one in fields(LoraSpec) if f"lora_{one.name}" in given
        }
        stage = replace(self.STAGE, schedule=Schedule(**schedule), lora=LoraSpec(**lora) if lora else None)
        return Curriculum((stage,), self.seed, self.image_aspect_ratio)


def stage_arguments(name: str, rows: str = "conversations") -> type[StageArguments]:
    """A dataclass of the options of one of the paper's stages, with the paper's values as defaults.

    Args:
        name: of a stage of `LLAVA_MED`.
        rows: what its data's rows are called.
    """
    stage = LLAVA_MED[name]
    schedule, lora = stage.schedule, stage.lora
    options: list[tuple[str, Any, Any, str]] = [
        ("epochs", float, schedule.epochs, "passes over the data; a fraction is allowed"),
        (
            "learning_rate",
            float,
            schedule.learning_rate,
            f"peak rate of {'LoRA' if lora else 'the projector'}",
        ),
    ]
    if lora is not None:
        rate, words = schedule.projector_learning_rate, "peak rate of the projector; None: that of LoRA"
        options.append(("projector_learning_rate", float | None, rate, words))
    options += [
        ("global_batch", int, schedule.global_batch, f"{rows} per optimizer step, all devices"),
        ("warmup_ratio", float, schedule.warmup_ratio, "share of the steps in which the learning rate rises"),
        ("weight_decay", float, schedule.weight_decay, "AdamW's"),
        ("max_length", int, schedule.max_length, "tokens; a longer row is rejected. LLaVA-NeXT: 4096"),
        ("shuffle", Literal["images", "conversations"], schedule.shuffle, "what is drawn"),
    ]
    if lora is not None:
        options += [
            ("lora_rank", int, lora.rank, "as in start_from, where that has LoRA"),
            ("lora_alpha", float, lora.alpha, "the update is scaled by alpha / rank"),
            ("lora_dropout", float, lora.dropout, "on LoRA's inputs, in training"),
        ]
    at_random = (
        "the order of the data" if lora is None else "the order of the data, LoRA's first values and dropout"
    )
    options += [
        (
            "image_aspect_ratio",
            Literal["pad", "checkpoint"],
            LLAVA_MED.image_aspect_ratio,
            "pad images to a square, or do as the checkpoint's processor does",
        ),
        ("seed", int, LLAVA_MED.seed, f"of {at_random}"),
    ]
    made = [
        (name, kind, field(default=default, metadata={"help": words}))
        for name, kind, default, words in options
    ]
    return make_dataclass(
        "StageArguments", made, bases=(StageArguments,), namespace={"STAGE": stage}, kw_only=True
    )
