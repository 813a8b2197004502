"""Where the features of a stage's images come from, as the collator asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .encoding import Size


class StoredFeatures(Protocol):
    """What `features.store.Features` is to the collator.

    folder: of the files.
    tile_bytes: of the features of one tile.
    contents: path → SHA-256 of the image's file.
    sizes: SHA-256 → (height, width) in pixels.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def tile_bytes(self) -> int: ...

    @property
    def contents(self) -> Mapping[str, str]: ...

    @property
    def sizes(self) -> Mapping[str, Size]: ...

    def __len__(self) -> int: ...

    def has(self, path: str, alone: bool) -> bool:
        """Whether features of this image are stored, as one alone in its conversation or among others."""

    def inputs(self, contents: Sequence[str], alone: Sequence[bool]) -> dict[str, torch.Tensor]:
        """What a model gets in place of images' pixels: `tower_features` and what belongs to them."""
