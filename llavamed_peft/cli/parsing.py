"""How a script's options are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from trl import TrlParser

from ..errors import ConfigError, did_you_mean
from ..yaml12 import read_yaml


def parse(*arguments: type, command_line: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read a script's options from its command line and from the YAML file after `--config`.

    Args:
        arguments: dataclasses whose fields are the options, with a `help` in their metadata. Those that a
            dataclass names in `MAPPINGS` may be mappings in the file.
        command_line: the words after the script's name; `None`: those of this process.

    Returns:
        One object of each dataclass. Where something is wrong (an option nobody knows, a missing or
        impossible one) the process ends with exit code 2, usage and reason on stderr; the nearest known name
        is given.
    """
    parser = _Parser(
        arguments,
        allow_abbrev=False,
        description="Every option may also be in a YAML file, --config FILE; what the command line says "
        "counts.",
    )
    for action in parser._actions:
        if action.choices and True in action.choices:
            action.type = _written_in_small_letters(action.type)
    words = list(sys.argv[1:] if command_line is None else command_line)
    words = [
        part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
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
            if isinstance(value, str) and value.startswith("~"):
                setattr(group, name, os.path.expanduser(value))
            elif isinstance(value, str) and not _fits(value, hints[name]) and _fits([value], hints[name]):
                setattr(group, name, [value])
            elif not (
                _fits(value, hints[name])
                or (isinstance(value, Mapping) and name in getattr(group, "MAPPINGS", ()))
            ):
                choices = known[name].choices
                wanted = f"one of {', '.join(map(str, choices))}" if choices else _words(hints[name])
                parser.error(
                    f"{name} is {value!r}; wanted "
                    f"{wanted}{', or no such line' if _fits(None, hints[name]) else ''}."
                )
    return tuple(parsed)


def _written_in_small_letters(choose: Callable[[str], object]) -> Callable[[str], object]:
    """An option's kind that takes true and false as YAML writes them, too."""
    return lambda word: choose(word.capitalize() if word in ("true", "false") else word)


class _Parser(TrlParser):
    """Reads the file of options itself, and names it in every error."""

    file: str | None = None

    def take_file(self, words: list[str]) -> list[object]:
        """Take `--config FILE` out of the words and make what the file says the options' defaults; returns
        keys that are none."""
        if "--config" not in words:
            return []
        place = words.index("--config")
        if place + 1 == len(words):
            self.error("--config: expected a file after it.")
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
        super().error(
            message
            if self.file is None
            else f"{message} (Options are from {self.file} and the command line.)"
        )


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
    kinds = {
        str: "a word",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list: "a list of words",
    }
    return next(
        kinds[get_origin(one) or one]
        for one in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
    )
