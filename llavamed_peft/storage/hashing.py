"""Content hashes: what says that a file or a checkpoint is the one it was."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_CHUNK = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = ("*.safetensors", "*.bin")


def file_sha256(path: str | Path, trust_cache: bool = False) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Args:
        path: of the file.
        trust_cache: do not read a file of the Hugging Face cache, whose name there is this hash.
    """
    if trust_cache:
        stored = Path(path).resolve()
        if stored.parent.name == "blobs" and _SHA256.fullmatch(stored.name):
            return stored.name
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(folder: str | Path, trust_cache: bool = False) -> str:
    """The content hash of an adapter's or a checkpoint's folder.

    Of one weight file it is the file's SHA-256, as `sha256sum` and the Hub show it; of several, the SHA-256
    of their names and hashes.
    """
    paths = sorted(path for pattern in _WEIGHTS for path in Path(folder).glob(pattern))
    if len(paths) == 1:
        return file_sha256(paths[0], trust_cache)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{file_sha256(path, trust_cache)}\n".encode())
    return digest.hexdigest()
