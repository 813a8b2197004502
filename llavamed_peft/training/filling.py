"""The feature cache of a stage: whether it pays, and filling it before the stage trains.

The vision tower is frozen in every stage, so what it makes of an image can be computed once instead of in every epoch and every
held-out loss, and then no image is decoded either. Before that, a forecast says what it takes and what it saves; by default that
decides. Several processes divide the files between them, and all wait for all. How files are laid out, checked and found again
is `packing/features.py`'s business.

Left out: models in shards, whose processes must run the tower's layers together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from ..errors import DataError, Interrupted
from ..features.forecast import Asked, Forecast, decide
from ..features.store import (
    FORMAT,
    Features,
    Pictures,
    Planned,
    fill,
    image_key,
    is_whole,
    planned_files,
    read_plans,
    write_plan,
)
from ..modeling.parts import bare
from ..modeling.tower import tower_features, tower_layers, tower_positions
from ..packing.encoding import Encoder, Size
from ..storage.equal_images import ContentNames, content_key
from ..storage.images import image_size
from .checkpoints import standing
from .resuming import ResumableTrainer

_HEADERS_READ = 1000  # to estimate how many tiles images have


_SECONDS_BETWEEN_LINES = 5.0


# Of the tower's configuration, what does not change its output; a checkpoint that a full stage wrote may say it otherwise.
_NAMES_ONLY = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation",
}


Shown = dict[tuple[str, bool], str]  # (path, whether it is alone in its conversation) → a row that shows it


def fingerprint(model: nn.Module, encoder: Encoder, dtype: torch.dtype) -> str:
    """SHA-256 of all that features depend on beside the image: the tower's weights, its layers, the processor and the dtype."""
    config = {
        key: value
        for key, value in bare(model).config.vision_config.to_dict().items()
        if key not in _NAMES_ONLY
    }
    settings = [FORMAT, transformers.__version__, config, tower_layers(model), str(dtype)]
    settings.append(encoder.processor.image_processor.to_dict())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in bare(model).model.vision_tower.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """Fills a stage's feature cache.

    Args:
        trainer: of the stage, its model in place with the tower frozen.
        encoder: of its collator.
        dtype: to store features in: the one that is computed in.
        folder: of the run's features.
        load: a data loader over pictures, which decodes ahead where there are workers.
    """

    def __init__(
        self,
        trainer: ResumableTrainer,
        encoder: Encoder,
        dtype: torch.dtype,
        folder: Path,
        load: Callable[[Pictures], Iterable[torch.Tensor | None]],
    ):
        self.trainer, self.encoder, self.dtype, self.load = (trainer, encoder, dtype, load)
        self.root, self.folder = (folder, folder / fingerprint(trainer.model, encoder, dtype)[:32])
        vision = bare(trainer.model).config.vision_config
        positions = tower_positions(bare(trainer.model).model.vision_tower)
        self.tile_bytes = positions * len(tower_layers(trainer.model)) * vision.hidden_size * dtype.itemsize
        self.rank, self.processes = trainer.args.process_index, trainer.args.world_size
        self.line_shown = time.monotonic()

    def prepare(self, asked: Asked, passes: float) -> Features | None:
        """Make the features of all the stage's images be there, where that was asked for or pays; all processes call it.

        Args:
            asked: `"auto"` or True.
            passes: images that pass the tower without the cache, over the whole stage.

        Returns:
            Where they lie; `None`: there are no images, or no cache is used.

        Raises:
            TrainingError: it was asked for and does not fit; a file cannot be written.
            Interrupted: SIGTERM or Ctrl-C came; whole files stay.
        """
        shown = self._shown()
        if not shown or not self._agree_on(asked, *self._forecast(shown), passes):
            return None
        found = self._contents(list(dict.fromkeys(path for path, _ in shown)))
        keys = {self._key(found[path][0], alone): path for path, alone in shown if path in found}
        if self.trainer.is_world_process_zero():
            self._plan(shown, found)
        self.trainer.accelerator.wait_for_everyone()
        plans = read_plans(self.folder)
        file_of = planned_files(plans)
        names = list(dict.fromkeys(file_of[key] for key in keys))
        broken = self._broken(names)
        if self.encoder.sends_image_sizes:  # what was an estimate is known now
            images = [image for name in broken for image in plans[name]]
            if not self._agree_on(asked, len(keys), len(images), self._bytes(images), passes, again=True):
                return None
        self._fill([(name, plans[name]) for name in broken[self.rank :: self.processes]], keys, shown)
        self.trainer.accelerator.wait_for_everyone()
        return Features.open(
            self.folder, names, plans, {path: content for path, (content, _) in found.items()}, self.encoder
        )

    def _forecast(self, shown: Shown) -> tuple[int, int, int]:
        """How many different images are shown, how many of them have to be computed, and about the bytes of these.

        No image is decoded, and only files that look alike are read in full.
        """
        content_name = ContentNames()

        @functools.cache
        def name_of(path: str) -> str | None:
            self._obey("equal images were being found")
            self._progress(f"{name_of.cache_info().currsize:,} images looked at for equal ones")
            try:
                return content_name(path)
            except DataError:  # training will meet it
                return None

        plans = read_plans(self.folder)
        planned = {(name_of(image.path), image.alone): image for images in plans.values() for image in images}
        there = [images for file, images in plans.items() if (self.folder / file).exists()]
        stored = {(name_of(image.path), image.alone) for images in there for image in images}
        different = {
            (name, alone): (path, alone) for path, alone in shown if (name := name_of(path)) is not None
        }
        absent = [planned[key] for key in different if key in planned and key not in stored]
        unplanned = [place for key, place in different.items() if key not in planned]
        size = self._bytes(absent) + self.tile_bytes * self._estimated_tiles(unplanned)
        return len(different), len(absent) + len(unplanned), size

    def _bytes(self, images: Iterable[Planned]) -> int:
        return self.tile_bytes * sum(image.tiles for image in images)

    def _shown(self) -> Shown:
        """The image files of the stage's training and held-out data, each once, in their order."""
        shown: Shown = {}
        for index in (self.trainer.train_index, self.trainer.eval_index):
            for row, images in index.shown_images() if index is not None else ():
                alone = len(images) == 1 or not self.encoder.tiles_lone_images_only
                for path in images:
                    shown.setdefault((path, alone), row)
        return shown

    def _key(self, content: str, alone: bool) -> str:
        return image_key(content, alone, self.encoder.tiles_lone_images_only)

    def _estimated_tiles(self, places: Sequence[tuple[str, bool]]) -> int:
        """Of all these images, from the headers of some of them."""
        if not self.encoder.sends_image_sizes:
            return len(places)
        looked_at = places[:: max(1, len(places) // _HEADERS_READ)]
        tiles = []
        for path, alone in looked_at:
            try:
                tiles.append(self.encoder.tiles(image_size(path), alone))
            except DataError:  # will be left out
                continue
        return round(len(places) * sum(tiles) / max(len(tiles), 1))

    def _agree_on(
        self, asked: Asked, images: int, uncomputed: int, missing: int, passes: float, again: bool = False
    ) -> bool:
        """Decide in one process, which shows it, for all; the second time only where nothing came of it."""
        answer = [False]
        if self.trainer.is_world_process_zero():
            stored = sum(file.stat().st_size for file in self.root.rglob("*.safetensors") if file.is_file())
            free = shutil.disk_usage(self.root.parent).free
            forecast = Forecast(images, uncomputed, round(passes), stored, missing, free)
            answer[0], line = decide(forecast, asked, self.trainer.stage.name, self.root)
            if not (again and answer[0]):
                self._show(line, True)
        broadcast_object_list(answer)
        return answer[0]

    def _contents(self, paths: Sequence[str]) -> dict[str, tuple[str, Size]]:
        """Path → SHA-256 of the file and (height, width) of the image, of those that can be read; read in shares."""
        found: list[tuple[str, tuple[str, Size]]] = []
        mine = paths[self.rank :: self.processes]
        for number, path in enumerate(mine):
            self._obey("its images were being read")
            self._progress(f"{number:,} of {len(mine):,} images read")
            try:
                found.append((path, (content_key(path), image_size(path))))
            except DataError:  # training will meet it
                continue
        return dict(gather_object(found))

    def _plan(self, shown: Shown, found: dict[str, tuple[str, Size]]) -> None:
        planned = planned_files(read_plans(self.folder))
        new: dict[str, Planned] = {}
        for path, alone in shown:
            if path in found:
                content, size = found[path]
                key = self._key(content, alone)
                if key not in planned and key not in new:
                    new[key] = Planned(key, path, *size, self.encoder.tiles(size, alone))
        if new:
            write_plan(self.folder, list(new.values()), self.tile_bytes)

    def _broken(self, names: Sequence[str]) -> list[str]:
        """Of these files, those that are missing or were damaged; read in shares."""
        broken = []
        mine = names[self.rank :: self.processes]
        for number, name in enumerate(mine):
            self._obey("its files were being checked")
            self._progress(f"{number:,} of {len(mine):,} files checked")
            if not is_whole(self.folder / name):
                broken.append(name)
        return list(gather_object(broken))

    def _fill(
        self, files: Sequence[tuple[str, tuple[Planned, ...]]], paths: dict[str, str], shown: Shown
    ) -> None:
        """Compute and write files, one after the other."""
        images = [image for _, together in files for image in together]
        if not images:
            return
        rows = {path: row for (path, _), row in shown.items()}
        pixels = iter(self.load(Pictures(images, paths, rows, self.encoder)))
        began, stored = time.monotonic(), 0
        for number, (name, together) in enumerate(files):

            def tower(tiles: torch.Tensor, number: int = number) -> torch.Tensor:
                self._obey(f"{number:,} of {len(files):,} files that were missing are whole, and stay")
                with self.trainer.accelerator.autocast():
                    return (
                        tower_features(self.trainer.model, tiles.to(self.trainer.args.device))
                        .to(self.dtype)
                        .cpu()
                    )

            stored += fill(self.folder / name, together, pixels, tower)
            speed = stored / (time.monotonic() - began)
            self._progress(
                f"{stored:,} of {len(images):,} images stored, {speed:,.1f} images/s",
                last=number + 1 == len(files),
            )

    def _progress(self, what: str, last: bool = False) -> None:
        """Every few seconds, and at the end; of several processes the first speaks, of its own share."""
        if last or time.monotonic() - self.line_shown > _SECONDS_BETWEEN_LINES:
            self.line_shown = time.monotonic()
            if self.trainer.is_world_process_zero():
                self._show(f"{self.trainer.stage.name:<10} feature cache: {what}", last)

    def _show(self, line: str, keep: bool) -> None:
        self.trainer.run_log.show(line, keep)

    def _obey(self, done: str) -> None:
        """Stop if that was asked.

        Raises:
            Interrupted: it was.
        """
        number = self.trainer.stop.received
        if number is not None:
            raise Interrupted(
                number,
                f"Stopped by {signal.Signals(number).name} while the feature cache of stage {self.trainer.stage.name!r} was "
                f"filled; {done}. {standing(self.trainer.checkpoint_folder)}",
            )
