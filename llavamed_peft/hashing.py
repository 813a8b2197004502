"""Content hashes: what says that a file or a checkpoint is the one it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK = 1 << 22
_WEIGHTS = ("*.safetensors", "*.bin")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a folder's weight files, their names included: what an adapter's or a checkpoint's content hash is."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _WEIGHTS for path in Path(folder).glob(pattern)):
        digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()
