"""Filling a stage's feature cache before the stage trains, where it pays.

The vision tower is frozen in every stage, so what it makes of an image can be computed once instead of in
every epoch and every held-out loss, and no image is decoded again either. First a forecast says what that
takes and saves; by default it decides. Several processes share the files between them, and all wait for all.

`store.py` lays the files out, checks them and finds them again. Left out: models in shards, whose processes
must run the tower's layers together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader

from ..batches.index import Index
from ..batches.loader import STORING, Workers
from ..errors import DataError, Interrupted
from ..modeling.parts import bare
from ..modeling.tower import feature_dtype, tower_features, tower_layers, tower_positions
from ..packing.encoding import Encoder, Size
from ..reporting.progress import Progress, named
from ..reporting.run_log import RunLog
from ..storage.equal_images import ContentNames, content_key
from ..storage.images import image_size
from .forecast import Asked, Forecast, decide
from .store import (
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

_HEADERS_READ = 1000  # to estimate how many tiles images have
# Of the tower's configuration, what does not change its output: a full stage's checkpoint may word it
# otherwise.
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
    """SHA-256 of all that features depend on apart from the image: the tower's weights, the layers that the
    projector takes, the image processor and the dtype."""
    vision = bare(model).config.vision_config.to_dict()
    config = {key: value for key, value in vision.items() if key not in _NAMES_ONLY}
    settings = [FORMAT, transformers.__version__, config, tower_layers(model), str(dtype)]
    settings.append(encoder.processor.image_processor.to_dict())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in bare(model).model.vision_tower.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def shown_images(indexes: Iterable[Index], encoder: Encoder) -> Shown:
    """The image files that some data show, each once, in their order."""
    shown: Shown = {}
    for index in indexes:
        for row, images in index.shown_images():
            alone = len(images) == 1 or not encoder.tiles_lone_images_only
            for path in images:
                shown.setdefault((path, alone), row)
    return shown


class FeatureCache:
    """Fills the feature cache of a stage. All processes make one and call it together.

    Args:
        model: on its device, the tower frozen.
        encoder: of the stage's collator.
        dtype: that training computes in.
        folder: of the run's features.
        stage: its name.
        workers: decode images ahead.
        run_log: shows what is done.
        how_to_resume: a sentence for an interruption.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        dtype: torch.dtype,
        folder: Path,
        *,
        stage: str,
        workers: Workers,
        run_log: RunLog,
        how_to_resume: Callable[[], str],
    ):
        self.model, self.encoder, self.stage = model, encoder, stage
        self.computes_in, self.dtype = dtype, feature_dtype(model, dtype)
        self.workers, self.run_log, self.how_to_resume = workers, run_log, how_to_resume
        self.processes = PartialState()
        self.root, self.folder = folder, folder / fingerprint(model, encoder, self.dtype)[:32]
        width = bare(model).config.vision_config.hidden_size
        positions = tower_positions(bare(model).model.vision_tower)
        self.tile_bytes = positions * len(tower_layers(model)) * width * self.dtype.itemsize
        # Of several processes the first speaks, of its own share.
        show = run_log.show if self.processes.is_main_process else None
        self.progress = Progress(named(stage, "feature cache:"), show)

    def prepare(self, shown: Shown, asked: Asked, passes: float) -> Features | None:
        """Store the features of these images that are not stored yet, if that was asked for or pays.

        Args:
            shown: the stage's images, from `shown_images`.
            asked: `"auto"` or True.
            passes: images that pass the tower without the cache, over the stage.

        Returns:
            Where they are; `None`: there are no images, or no cache is used.

        Raises:
            TrainingError: it was asked for and does not fit, or a file cannot be written.
            Interrupted: SIGTERM or Ctrl-C came; complete files stay.
        """
        if not shown or not self._agree_on(asked, *self._forecast(shown), passes):
            return None
        found = self._contents(list(dict.fromkeys(path for path, _ in shown)))
        keys = {self._key(found[path][0], alone): path for path, alone in shown if path in found}
        if self.processes.is_main_process:
            self._plan(shown, found)
        self.processes.wait_for_everyone()
        plans = read_plans(self.folder)
        file_of = planned_files(plans)
        names = list(dict.fromkeys(file_of[key] for key in keys))
        missing = self._missing(names)
        if self.encoder.sends_image_sizes:  # the number of tiles was an estimate, and is known now
            images = [image for name in missing for image in plans[name]]
            if not self._agree_on(asked, len(keys), len(images), self._bytes(images), passes, again=True):
                return None
        mine = self._share(missing)
        self._fill([(name, plans[name]) for name in mine], keys, shown)
        self.processes.wait_for_everyone()
        contents = {path: content for path, (content, _) in found.items()}
        return Features.open(self.folder, names, plans, contents, self.encoder, self.tile_bytes)

    def _share(self, things: Sequence[str]) -> Sequence[str]:
        """This process's share of the paths or names."""
        return things[self.processes.process_index :: self.processes.num_processes]

    def _forecast(self, shown: Shown) -> tuple[int, int, int]:
        """How many different images are shown, how many of them have to be computed, and about how many bytes
        these take. No image is decoded, and only files that look alike are read in full."""
        content_name = ContentNames()

        @functools.cache
        def name_of(path: str) -> str | None:
            self._stop_if_asked("equal images were being found")
            self.progress(f"{name_of.cache_info().currsize:,} images looked at for equal ones")
            try:
                return content_name(path)
            except DataError:  # training will meet it
                return None

        plans = read_plans(self.folder)
        planned = {(name_of(image.path), image.alone): image for images in plans.values() for image in images}
        there = [images for file, images in plans.items() if (self.folder / file).exists()]
        stored = {(name_of(image.path), image.alone) for images in there for image in images}
        # Equal files are one image. What is planned and stored is known by path; training may show a copy of
        # it.
        different = {
            (name, alone): (path, alone) for path, alone in shown if (name := name_of(path)) is not None
        }
        absent = [planned[key] for key in different if key in planned and key not in stored]
        unplanned = [place for key, place in different.items() if key not in planned]
        size = self._bytes(absent) + self.tile_bytes * self._estimated_tiles(unplanned)
        return len(different), len(absent) + len(unplanned), size

    def _bytes(self, images: Iterable[Planned]) -> int:
        return self.tile_bytes * sum(image.tiles for image in images)

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
        """Decide in one process, which says so, for all; the second time it says so only if it is off now."""
        answer = [False]
        if self.processes.is_main_process:
            stored = sum(file.stat().st_size for file in self.root.rglob("*.safetensors") if file.is_file())
            free = shutil.disk_usage(self.root.parent).free
            forecast = Forecast(images, uncomputed, round(passes), stored, missing, free)
            answer[0], text = decide(forecast, asked, self.stage, self.root)
            if not (again and answer[0]):
                self.run_log.say(self.stage, text)
        broadcast_object_list(answer)
        return answer[0]

    def _contents(self, paths: Sequence[str]) -> dict[str, tuple[str, Size]]:
        """Path → SHA-256 of the file and (height, width) of the image, for those that can be read."""
        found: list[tuple[str, tuple[str, Size]]] = []
        mine = self._share(paths)
        for number, path in enumerate(mine):
            self._stop_if_asked("its images were being read")
            self.progress(f"{number:,} of {len(mine):,} images read")
            try:
                found.append((path, (content_key(path), image_size(path))))
            except DataError:  # training will meet it
                continue
        return dict(gather_object(found))

    def _plan(self, shown: Shown, found: dict[str, tuple[str, Size]]) -> None:
        """Plan files for the images that no earlier plan has."""
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

    def _missing(self, names: Sequence[str]) -> list[str]:
        """Of these files, those that are not there or were damaged."""
        missing = []
        mine = self._share(names)
        for number, name in enumerate(mine):
            self._stop_if_asked("its files were being checked")
            self.progress(f"{number:,} of {len(mine):,} files checked")
            if not is_whole(self.folder / name):
                missing.append(name)
        return list(gather_object(missing))

    def _fill(
        self, files: Sequence[tuple[str, tuple[Planned, ...]]], paths: dict[str, str], shown: Shown
    ) -> None:
        """Compute and write files, one after the other."""
        images = [image for _, together in files for image in together]
        if not images:
            return
        rows = {path: row for (path, _), row in shown.items()}
        pixels = self._pixels(Pictures(images, paths, rows, self.encoder))
        began, stored = time.monotonic(), 0
        for number, (name, together) in enumerate(files):
            self._files_done = f"{number:,} of {len(files):,} files that were missing are complete and stay"
            stored += fill(self.folder / name, together, pixels, self._look)
            speed = stored / (time.monotonic() - began)
            self.progress(
                f"{stored:,} of {len(images):,} images stored, {speed:,.1f} images/s",
                last=number + 1 == len(files),
            )

    def _pixels(self, pictures: Pictures) -> Iterator[torch.Tensor | None]:
        """Each picture's pixels, [tiles, 3, height, width], decoded ahead where there are workers."""
        largest = max(image.tiles for image in pictures.images) * self.encoder.tile_bytes
        settings = self.workers.settings(STORING, lambda: largest, "pixels")
        pictures.notes = self.workers.notes.get(STORING)
        return self.workers.patiently(DataLoader(pictures, batch_size=None, **settings), STORING)

    def _look(self, tiles: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, height, width] → [tiles, positions, layers, width] in the stored dtype, on the CPU."""
        self._stop_if_asked(self._files_done)
        device = self.processes.device
        # As the trainer computes: autocast with bfloat16, plain in float32.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.computes_in == torch.bfloat16):
            return tower_features(self.model, tiles.to(device)).to(self.dtype).cpu()

    def _stop_if_asked(self, done: str) -> None:
        """Stop if that was asked for.

        Raises:
            Interrupted: it was.
        """
        number = self.workers.stop.received
        if number is not None:
            raise Interrupted(
                number,
                f"Stopped by {signal.Signals(number).name} while the feature cache of stage {self.stage!r} "
                f"was filled; {done}. {self.how_to_resume()}",
            )
