"""Whose folder an `output_dir` is: which run it belongs to, who is at work in it, what was left half written.

`run.json` holds what decides a run's result. It is written when the first stage is about to train: until then
the data can be fixed and the call repeated. Afterwards a call that would give another result is refused with
the difference, field by field. `run.lock` is locked while a process is at work. Which stages are finished,
and the step that a stage resumes from, is not written here: the stages' folders and their checkpoints say it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TrainingError
from ..storage.whole import write_file

RUN, LOCK = "run.json", "run.lock"
SCHEMA_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOTHING = object()
# What a disk, and not a program, answers: full, over quota, over the limit, read-only, broken, not ours.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


def read_run(folder: Path) -> dict[str, Any] | None:
    """What identifies the run whose folder it is; `None` where no stage has begun to train in it.

    Raises:
        TrainingError: `run.json` is damaged or another version's.
    """
    path = folder / RUN
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}). Choose another output_dir.") from error
    version = identity.pop("schema_version", None) if isinstance(identity, dict) else None
    if version != SCHEMA_VERSION:
        raise TrainingError(f"{path}: schema_version is {version!r}; this version resumes {SCHEMA_VERSION}.")
    return identity


def write_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder this run's."""
    write_file(folder / RUN, json.dumps({"schema_version": SCHEMA_VERSION, **identity}, indent=2) + "\n")


def check_same_run(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the folder is this run's already; `False` where it is nobody's.

    Raises:
        ConfigError: it is another run's; the message lists what differs, field by field.
    """
    there = read_run(folder)
    if there is None:
        return False
    if "full_dtype" in identity:
        there = {"full_dtype": "stored", **there}  # what versions did that did not say
    differing = differences(there, identity)
    if differing:
        raise ConfigError(
            f"{folder}: holds another run, which differs from this call in\n  "
            + "\n  ".join(differing)
            + "\n"
            "To resume it, make the same call as before. Otherwise choose another output_dir; there, "
            "start_from= builds on a finished stage."
        )
    return True


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`["stages.vqa.schedule.epochs: 3 there, 5 now"]`; empty where both give the same result.

    Args:
        there, now: what identifies a run: `stages`, by name in their order, and anything else that JSON
            holds. `base` is compared as far as both know it: by the content of the weights, else by id and
            revision.
    """
    found = []
    names = [list(run["stages"]) for run in (there, now)]
    if names[0] != names[1]:
        found.append(f"stages: {', '.join(names[0])} there, {', '.join(names[1])} now")
    common = set(names[0]) & set(names[1])
    per_stage = ("stages", "data", "eval_data")
    flat: list[dict[str, Any]] = []
    for run in (there, now):
        kept = {
            **run,
            **{key: {name: value for name, value in run[key].items() if name in common} for key in per_stage},
        }
        flat.append(dict(_fields(kept | {"base": _known_base(run["base"], [there["base"], now["base"]])})))
    for field in dict.fromkeys([*flat[0], *flat[1]]):
        values = [fields.get(field, _NOTHING) for fields in flat]
        if values[0] != values[1]:
            found.append(f"{field}: {_shown(values[0])} there, {_shown(values[1])} now")
    return found


def _known_base(base: Mapping[str, Any], both: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A Hub id's hash is unknown until it was downloaded, and a folder may be moved."""
    known = [key for key in ("sha256", "id", "revision") if all(other[key] for other in both)]
    return {key: base[key] for key in (known[:1] if "sha256" in known else known or ("id", "name"))}


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value, start=1):
            yield from _fields(inner, f"{name}[{number}]")
    else:
        yield name, value


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    return (
        f"{value[:12]}…"
        if isinstance(value, str) and _SHA256.fullmatch(value)
        else json.dumps(value, ensure_ascii=False)
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one process at work in a folder. The lock ends with the process, however it ends; data-loader
    workers have no part.

    Raises:
        TrainingError: another process is; or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error}); wanted a folder to write to.") from error
    with file:  # a POSIX lock ends when any descriptor of the file is closed: nothing else here may open it
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise TrainingError(
                    f"{folder}: {file.read().strip() or 'another process'} is at work in it; wanted one run "
                    "at a time. Wait for its end or stop it, then make this call again; or choose another "
                    "output_dir."
                ) from error
            warnings.warn(
                f"{folder}: its file system has no locks ({error}); see to it that only one run uses it.",
                stacklevel=4,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Say what a full or unwritable disk means for the run.

    Raises:
        TrainingError: the disk refused something.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise TrainingError(
            f"{folder}: the disk refused ({error}). Finished stages and the last checkpoint are intact; make "
            "room or fix the folder, then make the same call again to resume."
        ) from error


def remove_partial(folder: Path, name: str = "*") -> None:
    """Remove what a killed process had not yet given its name."""
    for path in folder.glob(f".{name}.partial"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
