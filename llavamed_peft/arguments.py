"""How a script's options are read: `parse`, and the options that several share, `RunArguments` and `CurriculumArguments`.

A recipe of one stage has a dataclass of its own for what decides the result (data, schedule, LoRA). That of a whole curriculum is
here, since `inspect --config` reads it too, and so is how a run is computed, the same everywhere. Options come from the command
line and from a YAML file, and what is written on the command line counts. An option that nobody knows is an error, wherever it
stands, and so is a value of another kind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from .errors import ConfigError, LlavaMedError, did_you_mean
from .interruption import Interrupted
from .stages import LLAVA_MED, LLAVA_MED_FULL, Curriculum, read_yaml


@dataclass(kw_only=True)
class RunArguments:
    """How a run is computed: keywords of `curriculum_finetune`, which says more about each."""

    quantization: Literal["nf4"] | None = field(
        default=None, metadata={"help": "'nf4' trains over a 4-bit language model (QLoRA); None leaves the base as it is stored"}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "of frozen weights and autocast; None: bfloat16 on CUDA, float32 on a CPU"}
    )
    layout: Literal["packed", "padded"] = field(
        default="packed",
        metadata={"help": "'packed': what conversations begin with alike, such as an image, stands once; 'padded': a row each"},
    )
    max_row_tokens: int | None = field(
        default=None, metadata={"help": "bound of a device batch in tokens; less where memory runs out. None: by device"}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "recompute activations to save memory; None: on for CUDA, off for a CPU"}
    )
    max_rejected: float = field(
        default=0.05, metadata={"help": "share of unusable rows above which a data set is refused, before training or in it"}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps between two held-out losses; None: ten of them a stage"}
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps between two checkpoints; None: ten of them a stage"}
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "processes that decode images ahead, for each GPU; None: its share of the cores, up to 8; none on a CPU; "
            "fewer where /dev/shm has no room"
        },
    )
    feature_cache: Literal["auto", True, False] = field(
        default="auto",
        metadata={"help": "store what the vision tower makes of each image and compute it once; auto: where that pays and fits"},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "further trackers, such as tensorboard or trackio"}
    )


_NAMED = {"LLAVA_MED": LLAVA_MED, "LLAVA_MED_FULL": LLAVA_MED_FULL}


@dataclass(kw_only=True)
class CurriculumArguments:
    """What decides the result of a whole curriculum: the options of `recipes/curriculum.py`, and of every cookbook."""

    MAPPINGS: ClassVar = ("data", "eval_data", "image_folder", "curriculum")

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: list[str] = field(metadata={"help": "LLaVA JSON of each stage, stage=file"})
    output_dir: str = field(
        metadata={"help": "holds the stages' folders, the losses and rejected.jsonl; the same command goes on"}
    )
    image_folder: list[str] | None = field(
        default=None, metadata={"help": "where image paths start: one folder, or stage=folder; None: each data file's folder"}
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "LLaVA JSON to measure held-out losses on, stage=file"})
    curriculum: str = field(
        default="LLAVA_MED", metadata={"help": "LLAVA_MED, LLAVA_MED_FULL, a YAML file of stages, or in --config the stages"}
    )
    start_from: str | None = field(default=None, metadata={"help": "a finished stage (folder or Hub id) to begin behind"})

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
            if not (isinstance(files, list) and files and all(isinstance(file, str) and file for file in files)):
                raise ConfigError(f"{option}[{stage!r}] is {given[stage]!r}; wanted a path or a list of paths.")
        return found
    files_of: dict[str, list[str]] = {}
    for word in given or []:
        stage, equals, path = word.partition("=")
        if not (stage and equals and path):
            raise ConfigError(f"{option} is given {word!r}; wanted stage=path, such as align={word}.")
        files_of.setdefault(stage, []).append(path)
    return files_of


def start(main: Callable[..., object], *arguments: type) -> None:
    """Parse the options and call `main` with them.

    Where the package refuses, the process ends with a line on stderr and exit code 1; where it was asked to stop, with 143
    (SIGTERM) or 130 (Ctrl-C) and a line that says how to go on.

    Of several processes under torchrun the one that fails is named, with its error, in torchrun's last lines.
    """
    parsed = parse(*arguments)
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, to programmers
    disable_progress_bar()
    try:
        with _head_start():
            record(main)(*parsed)
    except LlavaMedError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)


def is_main_process() -> bool:
    """Of several processes under a launcher, the one that speaks and writes; a process by itself is it."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _head_start() -> Iterator[None]:
    """Where one of several processes fails, let it stay until its error is the oldest.

    The others fail as soon as it leaves, and torchrun, which counts in whole seconds, names the first.
    """
    whole = False
    try:
        yield
        whole = True
    finally:
        if not whole and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(2)


def parse(*arguments: type, command_line: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read a script's options from its command line and from the YAML file behind `--config`.

    Args:
        arguments: dataclasses whose fields are the options, with a `help` in their metadata. Those that a dataclass names in
            `MAPPINGS` may be mappings in the file.
        command_line: the words behind the script's name; `None`: those of this process.

    Returns:
        One object of each dataclass. Where something is wrong (an option nobody knows, a missing or impossible one) the process
        ends with exit code 2, usage and reason on stderr; the nearest known name is given.
    """
    parser = _Parser(
        arguments,
        allow_abbrev=False,
        description="Every option may also stand in a YAML file, --config FILE; what the command line says counts.",
    )
    for action in parser._actions:
        if action.choices and True in action.choices:
            action.type = _written_in_small_letters(action.type)
    words = list(sys.argv[1:] if command_line is None else command_line)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    known = {action.dest: action for action in parser._actions}
    for name in parser.take_file(words):
        parser.error(f"unknown option {name!r}.{did_you_mean(str(name), known)}")
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except ValueError as error:
        parser.error(str(error))
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            parser.error(f"unknown option {name!r}.{did_you_mean(name.replace('-', '_'), known)}")
    if unknown:
        parser.error(f"{unknown[0]!r} belongs to no option; options are written --name value.")
    for group in parsed:
        hints = get_type_hints(type(group))
        for name, value in vars(group).items():
            if isinstance(value, str) and not _fits(value, hints[name]) and _fits([value], hints[name]):
                setattr(group, name, [value])
            elif not (_fits(value, hints[name]) or (isinstance(value, Mapping) and name in getattr(group, "MAPPINGS", ()))):
                choices = known[name].choices
                wanted = f"one of {', '.join(map(str, choices))}" if choices else _words(hints[name])
                parser.error(f"{name} is {value!r}; wanted {wanted}{', or no such line' if _fits(None, hints[name]) else ''}.")
    return tuple(parsed)


def _written_in_small_letters(choose: Callable[[str], object]) -> Callable[[str], object]:
    """An option's kind that takes true and false as YAML writes them, too."""
    return lambda word: choose(word.capitalize() if word in ("true", "false") else word)


class _Parser(TrlParser):
    """Reads the file of options itself, and names it in every error."""

    file: str | None = None

    def take_file(self, words: list[str]) -> list[object]:
        """Take `--config FILE` out of the words and make what the file says the options' defaults; returns keys that are none."""
        if "--config" not in words:
            return []
        place = words.index("--config")
        if place + 1 == len(words):
            self.error("--config: expected a file behind it.")
        del words[place]
        path = words.pop(place)
        try:
            options = read_yaml(Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            self.error(f"--config: {path} cannot be read ({error}); wanted a YAML file of options.")
        except ConfigError as error:
            self.error(f"--config: {error}")
        if not isinstance(options, dict):
            self.error(f"--config: {path} holds {options!r}; wanted a mapping of options to values.")
        self.file = path
        known = {action.dest for action in self._actions}
        self.set_defaults_with_config(**{name: value for name, value in options.items() if name in known})
        return [name for name in options if name not in known]

    def error(self, message: str) -> NoReturn:
        super().error(message if self.file is None else f"{message} (Options are from {self.file} and the command line.)")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the kind that a dataclass's field is declared as."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    kinds = {str: "a word", int: "a whole number", float: "a number", bool: "true or false", list: "a list of words"}
    return next(kinds[get_origin(one) or one] for one in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)))
