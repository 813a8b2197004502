"""Files that stay whole: what is written is on the disk before it gets its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..errors import AdapterError


def replace_text(path: Path, text: str) -> None:
    """Make this a file's text (UTF-8); who is killed meanwhile leaves the old file, and `.<name>.partial` beside it.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def flush(path: Path) -> None:
    """Wait until what was written to a file, or which names stand in a folder, is on the disk.

    Raises:
        OSError: it cannot be opened or flushed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder under another name, flush it to disk, and rename it: it is there whole or not at all.

    Raises:
        AdapterError: the folder is there already, or cannot be written.
    """
    refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        fill(partial)
        readable = (
            partial.stat().st_mode & 0o666
        )  # as the umask has it; safetensors writes for the owner alone
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(readable)
            flush(path)
        partial.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}: cannot be written ({error}); nothing was left under that name."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def refuse_existing(folder: Path) -> None:
    """Nothing is overwritten.

    Raises:
        AdapterError: the folder is there already.
    """
    if folder.exists():
        raise AdapterError(f"{folder}: is there already; wanted a new folder. Nothing was overwritten.")
