"""How a script's options are read: `parse`, and the options that every training script shares, `RunArguments`.

A recipe has a dataclass of its own for what decides the result (data, schedule, LoRA); how the run is computed is the same
everywhere and stands here. Options come from the command line and from a YAML file, and what is written on the command line
counts. An option that nobody knows is an error, wherever it stands.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from .errors import LlavaMedError, did_you_mean


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
        default=0.05, metadata={"help": "share of unusable rows above which a data set is refused as a whole"}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps between two held-out losses; None: ten of them a stage"}
    )
    workers: int | None = field(
        default=None, metadata={"help": "processes that decode images ahead; None: up to 8 with a GPU, none on a CPU"}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "further trackers, such as tensorboard or trackio"}
    )


def start(main: Callable[..., object], *arguments: type) -> None:
    """Parse the options, call `main` with them, and end with one line on stderr and exit code 1 where the package refuses."""
    parsed = parse(*arguments)
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, to programmers
    disable_progress_bar()
    try:
        main(*parsed)
    except LlavaMedError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def parse(*arguments: type, command_line: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read a script's options from its command line and from the YAML file behind `--config`.

    Args:
        arguments: dataclasses whose fields are the options, with a `help` in their metadata.
        command_line: the words behind the script's name; `None`: those of this process.

    Returns:
        One object of each dataclass. Where something is wrong (an option nobody knows, a missing or impossible one) the process
        ends with exit code 2, usage and reason on stderr; the nearest known name is given.
    """
    parser = TrlParser(
        arguments,
        allow_abbrev=False,
        description="Every option may also stand in a YAML file, --config FILE; what the command line says counts.",
    )
    words = sys.argv[1:] if command_line is None else command_line
    # TRL's parser only sees a --config that stands apart from its file
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    try:
        *parsed, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    except (OSError, ValueError, IndexError, yaml.YAMLError) as error:  # of the file behind --config
        parser.error(f"--config: {error}")
    known = {action.dest: action for action in parser._actions}
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            parser.error(f"unknown option {name!r}.{did_you_mean(name.replace('-', '_'), known)}")
    if unknown:
        parser.error(f"{unknown[0]!r} belongs to no option; options are written --name value.")
    for name, value in (pair for group in parsed for pair in vars(group).items()):
        choices = known[name].choices  # a default out of a YAML file has not been compared with them
        if choices and value is not None and value not in choices:
            parser.error(f"{name} is {value!r}; wanted one of {', '.join(choices)}.")
    return tuple(parsed)
