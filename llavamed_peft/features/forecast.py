"""Whether a stage's feature cache pays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from ..batches.loader import ExactSteps
from ..batches.steps import StepSampler, steps_in_all
from ..errors import TrainingError
from ..reporting.text import in_bytes

Asked = Literal["auto"] | bool
MAX_BYTES = 50_000_000_000  # of a run's features in all; and never more than half of the disk that is free
PAYS_FROM = 2.0  # images that pass the tower without the cache, for each that has to be computed for it
_STEPS_PLANNED = 50  # to estimate how many images pass the tower in an epoch


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a stage's feature cache would take and save.

    Args:
        images: different images that the stage shows: equal files are one (OneVision tiles lone images only:
            one that is shown alone and among others is two), and one that cannot be read is none.
        uncomputed: of them, those whose features are not stored yet.
        passes: images that pass the tower without a cache, over the stage's epochs and held-out losses; an
            estimate where an epoch has many steps.
        stored: bytes that the run's features take on disk.
        missing: bytes that the stage would add; until it is planned an estimate where images have tiles.
        free: bytes of the disk.
    """

    images: int
    uncomputed: int
    passes: int
    stored: int
    missing: int
    free: int

    @property
    def pays(self) -> bool:
        """Far fewer images would pass the tower."""
        return self.passes >= PAYS_FROM * self.uncomputed

    @property
    def fits(self) -> bool:
        """There is room, within the bound and on the disk."""
        return self.missing <= self.room

    @property
    def room(self) -> int:
        """Bytes that may be added."""
        return max(0, min(MAX_BYTES - self.stored, self.free // 2))

    def __str__(self) -> str:
        return (
            f"{self.images:,} images, {in_bytes(self.stored + self.missing)} on disk, "
            f"{in_bytes(self.missing)} of them to be added ({in_bytes(self.free)} free); {self.uncomputed:,} "
            f"images pass the vision tower instead of {self.passes:,}"
        )


def decide(forecast: Forecast, asked: Asked, stage: str, folder: Path) -> tuple[bool, str]:
    """Whether the cache is used, and the words that say why.

    Args:
        asked: `"auto"` or True.
        folder: of the run's features.

    Raises:
        TrainingError: it was asked for and does not fit.
    """
    if asked is True and not forecast.fits:
        raise TrainingError(
            f"feature_cache is True, and the features of stage {stage!r} do not fit into {folder}: "
            f"{forecast}. Wanted at most {in_bytes(forecast.room)} to be added: {in_bytes(MAX_BYTES)} in all "
            "and half of the free disk. Make room, choose another output_dir, or call with "
            "feature_cache='auto' or False."
        )
    on = asked is True or (forecast.pays and forecast.fits)
    too_many = f"; more than the {in_bytes(forecast.room)} that may be added"
    why = "" if on else "; too few to pay" if not forecast.pays else too_many
    return on, f"feature cache {'on' if on else 'off'}: {forecast}{why}"


def passes_in_an_epoch(sampler: StepSampler, images: np.ndarray) -> float:
    """How many images the tower is shown in an epoch without a cache, over all processes.

    Args:
        sampler: of the epoch's steps; of the first of them if it has many.
        images: [conversations], how many each shows.
    """
    conversations = passes = 0
    for step in islice(sampler.steps(), _STEPS_PLANNED):
        conversations += len(step)
        for batch in (batch for share in sampler.shares(step) for batch in share):
            rows = np.array(batch, dtype=np.int64)
            if sampler.prefixes is not None:  # packed, an image of several conversations is there once
                rows = rows[np.unique(sampler.groups[rows], return_index=True)[1]]
            passes += int(images[rows].sum())
    return passes * len(images) / max(conversations, 1)


def tower_passes(train: ExactSteps, held_out: ExactSteps | None, eval_steps: float) -> float:
    """How many images pass the vision tower in a stage without a cache.

    Args:
        train, held_out: the stage's steps.
        eval_steps: optimizer steps between two held-out losses; below 1, a share of the stage's steps.
    """
    sampler = train.sampler()
    passes = train.schedule.epochs * passes_in_an_epoch(sampler, train.index.image_counts())
    if held_out is None:
        return passes
    steps = steps_in_all(len(sampler), train.schedule)
    every = eval_steps if eval_steps >= 1 else math.ceil(steps * eval_steps)
    evaluations = 1 + math.ceil(steps / every)
    return passes + evaluations * passes_in_an_epoch(held_out.sampler(), held_out.index.image_counts())
