"""The frozen vision tower's features of each image, kept on disk: planned in files, filled, checked, found
again.

A folder belongs to one tower, the layers that the projector takes, one image processor and one dtype; images
are known by the SHA-256 of their files. A plan (`plan-*.json`) says which images are together in which file
(`*.safetensors`, one tensor an image). It is written before the first of its files and never changed, and an
image is in one file only. A file's images pass the tower together, cut into batches the same way each time,
so an image's features are the same bits whenever they are computed, by whatever process, and whatever was
there before. A file holds the SHA-256 of its name and content: one that is damaged, or another one, is
removed and computed again.

Left out: whether the cache pays (`forecast.py`), and filling it (`filling.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset, default_collate

from ..batches.workers import WorkerNotes
from ..errors import DataError, TrainingError
from ..modeling.tower import no_pixels
from ..packing.encoding import Encoder, Size
from ..storage.equal_images import content_key
from ..storage.images import load_image
from ..storage.whole import not_written, write_file

FORMAT = 4  # goes up with every change of what a file holds or of how its images are computed
IMAGES_PER_FILE = 32  # 38 MB of a tower of 336 pixels in 16 bits; what a kill or a damaged byte costs at most
_BYTES_PER_FILE = 256_000_000  # of images with many tiles, fewer are in a file
_TILES_PER_BATCH = 32  # that pass the tower at once; an image's stay together
_OPEN_FILES = 64
_SHA256 = "sha256"  # in a file's metadata
_AMONG = "-among-others"
Plans = dict[str, tuple["Planned", ...]]  # a file's name → the images in it


class Planned(NamedTuple):
    """An image of a plan.

    key: see `image_key`.
    path: where its file was.
    height, width: in pixels.
    tiles: that the tower sees of it.
    """

    key: str
    path: str
    height: int
    width: int
    tiles: int

    @property
    def content(self) -> str:
        """SHA-256 of its file."""
        return self.key.partition("-")[0]

    @property
    def alone(self) -> bool:
        """It is processed as the only image of its conversation."""
        return not self.key.endswith(_AMONG)


def image_key(content: str, alone: bool, tiles_lone_images_only: bool) -> str:
    """What an image's features are found by: its content, and in OneVision whether it is among others."""
    return content + (_AMONG if tiles_lone_images_only and not alone else "")


def read_plans(folder: Path) -> Plans:
    """All that was ever planned for the folder, file by file."""
    plans: Plans = {}
    for path in sorted(folder.glob("plan-*.json")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        # Another process found it damaged; writing it says that a folder is there
        except (FileNotFoundError, IsADirectoryError):
            continue
        if path.name == _plan_name(text):
            files = {
                name: tuple(Planned(*image) for image in images) for name, images in json.loads(text).items()
            }
            plans = files | plans
        else:
            warnings.warn(f"{path}: is damaged. Removed; what it planned is planned again.", stacklevel=2)
            path.unlink(missing_ok=True)
    return plans


def planned_files(plans: Plans) -> dict[str, str]:
    """Key → the file that it is planned for; the first, should two processes have planned it at the same
    moment."""
    files: dict[str, str] = {}
    for name in sorted(plans):
        for image in plans[name]:
            files.setdefault(image.key, name)
    return files


def write_plan(folder: Path, images: Sequence[Planned], bytes_per_tile: int) -> None:
    """Plan files for images that no earlier plan has.

    Args:
        images: each once.
        bytes_per_tile: of what the tower makes of one.

    Raises:
        TrainingError: it cannot be written.
    """
    files: Plans = {}
    first = 0
    while first < len(images):
        last = first + 1
        while last < min(first + IMAGES_PER_FILE, len(images)) and (
            sum(image.tiles for image in images[first : last + 1]) * bytes_per_tile <= _BYTES_PER_FILE
        ):
            last += 1
        together = tuple(images[first:last])
        files[f"{_digest(image.key for image in together)[:32]}.safetensors"] = together
        first = last
    text = json.dumps(files)
    _write(folder / _plan_name(text), text)


def _plan_name(text: str) -> str:
    return f"plan-{_digest([text])[:32]}.json"


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def is_whole(path: Path) -> bool:
    """A file of features is there and as it was written; one that is damaged is removed.

    Warns:
        UserWarning: it was damaged.
    """
    if path.is_dir():  # writing it will say so
        return False
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(_SHA256)
            if written == _content(
                path.name, ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            ):
                return True
        damage = "its content is not what was written"
    except FileNotFoundError:
        return False
    except (OSError, SafetensorError) as error:
        damage = f"cannot be read ({error})"
    warnings.warn(f"{path}: {damage}. Removed; the features of its images are computed again.", stacklevel=2)
    path.unlink(missing_ok=True)
    return False


def _content(file: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(f"{file}\n".encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def fill(
    path: Path, images: Sequence[Planned], pixels: Iterator[torch.Tensor | None], tower: Callable[[Any], Any]
) -> int:
    """Compute a file's images and write it; returns how many of them it holds.

    Args:
        images: as they are planned.
        pixels: of each, [tiles, 3, height, width], from `Pictures`; `None`: it cannot be decoded and is left
            out.
        tower: [tiles, 3, height, width] → [tiles, positions, layers, width] in the stored dtype, on the CPU.

    Raises:
        TrainingError: it cannot be written.
    """
    features: dict[str, torch.Tensor] = {}
    batch: dict[str, torch.Tensor] = {}

    def look() -> None:
        if batch:
            seen = tower(torch.cat(list(batch.values())))
            parts = seen.split([len(tiles) for tiles in batch.values()])
            features.update((key, part.clone()) for key, part in zip(batch, parts, strict=True))
            batch.clear()

    for image in images:
        tiles = next(pixels)
        if tiles is not None:
            if sum(map(len, batch.values())) + len(tiles) > _TILES_PER_BATCH:
                look()
            batch[image.key] = tiles
    look()
    metadata = {_SHA256: _content(path.name, sorted(features.items()))}
    _write(path, lambda partial: save_file(features, partial, metadata))
    return len(features)


def _write(path: Path, content: str | Callable[[Path], object]) -> None:
    try:
        write_file(path, content, several_writers=True)
    except OSError as error:
        raise TrainingError(
            f"{not_written(path, error)} Make room or fix the folder and make the same call again, which "
            "keeps what is stored; or pass feature_cache=False, which stores nothing."
        ) from error


class Pictures(Dataset[torch.Tensor | None]):
    """Planned images → their pixels, [tiles, 3, height, width]; `None` for what cannot be decoded or is
    another image by now.

    What is `None` is missing in its file of features for good. So an image of this stage whose file can no
    longer be read is an error: its disk may come back.

    Args:
        images: in the order of their files.
        paths: key → where the image is, for this stage's images; an earlier stage's are where they were.
        rows: path → the row of the data that shows the image, as an error should name it.
        notes: where a worker process writes what it is at; `None` where there are no workers.
    """

    def __init__(
        self,
        images: Sequence[Planned],
        paths: Mapping[str, str],
        rows: Mapping[str, str],
        encoder: Encoder,
        notes: WorkerNotes | None = None,
    ):
        self.images, self.paths, self.rows, self.encoder, self.notes = (images, paths, rows, encoder, notes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> torch.Tensor | None:
        image = self.images[number]
        path = self.paths.get(image.key, image.path)
        if self.notes is not None:
            self.notes.write(
                f"{self.rows.get(path, 'an earlier stage')}, image {path}, for the feature cache"
            )
        try:
            if self._content(image, path) != image.content:
                return None
            return self.encoder.process_image(load_image(path), image.alone)
        except DataError:
            return None
        finally:
            if self.notes is not None:
                self.notes.clear()

    def _content(self, image: Planned, path: str) -> str:
        """SHA-256 of the image's file.

        Raises:
            TrainingError: the file of an image of this stage cannot be read any more.
            DataError: that of an earlier stage's cannot.
        """
        try:
            return content_key(path)
        except DataError as error:
            if image.key not in self.paths:
                raise
            raise TrainingError(
                f"{error} It could be read when the feature cache was planned; bring it back. What is stored "
                "stays; make the same call again to resume. An image that is gone for good is left out then."
            ) from error


@dataclass(frozen=True, slots=True)
class Features:
    """Where the features of a stage's images are; goes to the data-loading workers.

    Args:
        folder: of the files.
        tile_bytes: of what the tower makes of one tile.
        contents: path → SHA-256 of the image's file.
        sizes: SHA-256 → (height, width) in pixels.
        files: key → name of the file that holds it.
        tiles_lone_images_only, sends_image_sizes: of the `Encoder`.
    """

    folder: Path
    tile_bytes: int
    contents: dict[str, str]
    sizes: dict[str, Size]
    files: dict[str, str]
    tiles_lone_images_only: bool
    sends_image_sizes: bool

    @classmethod
    def open(
        cls,
        folder: Path,
        names: Iterable[str],
        plans: Plans,
        contents: Mapping[str, str],
        encoder: Encoder,
        tile_bytes: int,
    ) -> Features:
        """Find what the complete files of these names hold.

        Args:
            contents: path → SHA-256, of the images that may be asked for.
        """
        sizes: dict[str, Size] = {}
        files: dict[str, str] = {}
        _open.cache_clear()  # an earlier stage's may be of a file that was damaged since, and written anew
        for name in names:
            stored = set(_open(folder / name).keys())
            for image in plans[name]:
                if image.key in stored:
                    files[image.key] = name
                    sizes[image.content] = (image.height, image.width)
        lone, sizes_sent = encoder.tiles_lone_images_only, encoder.sends_image_sizes
        return cls(folder, tile_bytes, dict(contents), sizes, files, lone, sizes_sent)

    def _key(self, content: str, alone: bool) -> str:
        return image_key(content, alone, self.tiles_lone_images_only)

    def __len__(self) -> int:
        return len(self.files)

    def has(self, path: str, alone: bool) -> bool:
        """Whether features of this image are stored, as one alone in its conversation or among others."""
        content = self.contents.get(path)
        return content is not None and self._key(content, alone) in self.files

    def inputs(self, contents: Sequence[str], alone: Sequence[bool]) -> dict[str, torch.Tensor]:
        """What a model gets in place of images' pixels; in a data-loader worker it is in shared memory.

        Args:
            contents: of the images, as a model is to see them.
            alone: of each, whether it is alone in its conversation.

        Returns:
            `tower_features`, [tiles, positions, layers, width], the tiles of all images one after the other;
            `pixel_values`, an empty placeholder for them (see `modeling.tower.no_pixels`); where the class
            sends sizes, `image_sizes`, [images, 2] int64.
        """
        found = []
        for content, lone in zip(contents, alone, strict=True):
            key = self._key(content, lone)
            path = self.folder / self.files[key]
            try:
                found.append(_open(path).get_tensor(key))
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"{path}: cannot be read any more ({error}); wanted what was stored before the stage "
                    "trained. Make the same call again: what is missing or damaged is computed anew."
                ) from error
        # In a data-loader worker, default_collate copies them straight into shared memory.
        features = default_collate([tile for tiles in found for tile in tiles])
        inputs = {"tower_features": features, "pixel_values": no_pixels(features)}
        if self.sends_image_sizes:
            inputs["image_sizes"] = torch.tensor([self.sizes[content] for content in contents])
        return inputs


@functools.lru_cache(_OPEN_FILES)
def _open(path: Path) -> Any:
    """A file, mapped into memory; its tensors are read in place."""
    return safe_open(path, framework="pt")
