"""Writing files and folders that are there completely or not at all: all that a later call relies on.

What is written gets another name first, is flushed to the disk, and is renamed. A process that is killed
meanwhile leaves what was there before, and `.<name>.partial` next to it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_file(path: Path, content: str | Callable[[Path], object], several_writers: bool = False) -> None:
    """Write a file, or replace the one that is there.

    Args:
        content: its text, written as UTF-8; or a function that writes the file at the path it is given.
        several_writers: other processes may write the same file at the same moment.

    Raises:
        OSError: it cannot be written.
    """
    token = f".{secrets.token_hex(4)}" if several_writers else ""
    partial = path.with_name(f".{path.name}{token}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            content(partial)
        keep(partial, path)
    except SafetensorError as error:  # its way to say that the disk refused
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def keep(partial: Path, path: Path) -> None:
    """Give a file that was written under another name its own, once it is on the disk.

    Raises:
        OSError: it cannot be flushed or renamed.
    """
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Write a folder; its files can be read by whoever can read a new file.

    Args:
        folder: must not be there yet.
        fill: writes the content into the folder it is given.

    Raises:
        FileExistsError: the folder is there already.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        fill(partial)
        # As the umask has it; safetensors writes for the owner alone
        readable = partial.stat().st_mode & 0o666
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(readable)
            flush(path)
        partial.rename(folder)
        flush(folder.parent)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name."""
    going = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def not_written(path: Path, error: OSError) -> str:
    """What an error says of a file or folder that could not be written."""
    return f"{path}: cannot be written ({error}); nothing was left under that name."


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk.

    Raises:
        OSError: it cannot be opened or flushed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
