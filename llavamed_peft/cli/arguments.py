"""How a script's options are read: `parse`, and the options that several share, `RunArguments` and
`CurriculumArguments`.

A recipe of one stage has a dataclass of its own for what decides the result (data, schedule, LoRA). That of a
whole curriculum is here, since `inspect --config` reads it too, and so is how a run is computed, the same
everywhere. Options come from the command line and from a YAML file, and what is written on the command line
counts. An option that nobody knows is an error, wherever it stands, and so is a value of another kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import ConfigError, did_you_mean
from ..llava_med import LLAVA_MED, LLAVA_MED_FULL
from ..stages import Curriculum


def files_by_stage(words: Iterable[str], curriculum: Curriculum) -> dict[str, list[str]]:
    """`["a.json", "vqa=b.json"]` → stage name → files: a plain file is every stage's, `stage=file` that
    stage's.

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
            raise ConfigError(
                f"{word!r} is no file, and {stage!r} no stage of the curriculum.{did_you_mean(stage, names)}"
            )
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
            "help": "'packed': what conversations begin with alike, such as an image, stands once; 'padded': "
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
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "further trackers, such as tensorboard or trackio"},
    )


_NAMED = {"LLAVA_MED": LLAVA_MED, "LLAVA_MED_FULL": LLAVA_MED_FULL}


@dataclass(kw_only=True)
class CurriculumArguments:
    """What decides the result of a whole curriculum: the options of `recipes/curriculum.py`, and of every
    cookbook."""

    MAPPINGS: ClassVar = ("data", "eval_data", "image_folder", "curriculum")

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: list[str] = field(metadata={"help": "LLaVA JSON of each stage, stage=file"})
    output_dir: str = field(
        metadata={
            "help": "holds the stages' folders, the losses and rejected.jsonl; the same command goes on"
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
        default=None, metadata={"help": "a finished stage (folder or Hub id) to begin behind"}
    )

    def files(self, option: Literal["data", "eval_data"]) -> dict[str, list[str]]:
        """Stage → its files.

        Raises:
            ConfigError: a word is not `stage=file`, or a mapping holds something else.
        """
        return _by_stage(option, getattr(self, option))

    def folders(self) -> str | dict[str, str] | None:
        """One folder for all stages, or stage → folder."""
        given = self.image_folder
        if given is None:
            return None
        if isinstance(given, list) and len(given) == 1 and "=" not in given[0]:
            return given[0]
        found = _by_stage("image_folder", given)
        for stage, folders in found.items():
            if len(folders) != 1:
                raise ConfigError(f"image_folder[{stage!r}] is {folders!r}; wanted one folder.")
        return {stage: folder for stage, (folder,) in found.items()}

    def stages(self) -> Curriculum:
        """The curriculum that is named, lies in a file, or stands in the file of options."""
        if isinstance(self.curriculum, Mapping):
            return Curriculum.from_dict(self.curriculum)
        return _NAMED.get(self.curriculum) or Curriculum.from_yaml(Path(self.curriculum))


def _by_stage(option: str, given: Mapping[str, Any] | list[str] | None) -> dict[str, list[str]]:
    """`["vqa=a.json", "vqa=b.json"]` or `{"vqa": ["a.json", "b.json"]}` → `{"vqa": ["a.json", "b.json"]}`."""
    if isinstance(given, Mapping):
        found = {stage: [files] if isinstance(files, str) else files for stage, files in given.items()}
        for stage, files in found.items():
            if not (
                isinstance(files, list) and files and all(isinstance(file, str) and file for file in files)
            ):
                raise ConfigError(
                    f"{option}[{stage!r}] is {given[stage]!r}; wanted a path or a list of paths."
                )
        return found
    files_of: dict[str, list[str]] = {}
    for word in given or []:
        stage, equals, path = word.partition("=")
        if not (stage and equals and path):
            raise ConfigError(f"{option} is given {word!r}; wanted stage=path, such as align={word}.")
        files_of.setdefault(stage, []).append(path)
    return files_of
