"""Too little memory on a GPU: an error that says what takes less, first what leaves the result as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..errors import TrainingError
from ..stages import Stage
from .trainer import StageTrainer

_ANOTHER_RUN = (
    "a base in 4 bits (quantization='nf4'; not for full stages) or a model spread over more GPUs "
    "(docs/scaling.md)"
)


@contextlib.contextmanager
def enough_for_model(stage: Stage) -> Iterator[None]:
    """While a stage's model is loaded, placed and wrapped; what it does then has contexts of its own, inside
    this one.

    Raises:
        TrainingError: it does not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Stage {stage.name!r}, before its first step: {_first_words(error)} The model does not fit with "
            f"what else the GPU holds; wanted an emptier GPU, or in another output_dir {_ANOTHER_RUN}."
        ) from error


@contextlib.contextmanager
def enough_to_store_features(stage: Stage, how_to_resume: Callable[[], str]) -> Iterator[None]:
    """While a stage's feature cache is filled.

    Raises:
        TrainingError: there is too little.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Stage {stage.name!r}, while features of its images were stored: {_first_words(error)} Make the "
            "same call with feature_cache=False or on an emptier GPU; what is learnt stays the same. "
            f"Complete files of features stay. {how_to_resume()}"
        ) from error


@contextlib.contextmanager
def enough_to_train(
    trainer: StageTrainer, max_row_tokens: int, gradient_checkpointing: bool
) -> Iterator[None]:
    """While a stage trains and measures its held-out loss.

    Raises:
        TrainingError: there is too little.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        data = [steps for steps in (trainer.train_steps, trainer.held_out_steps) if steps is not None]
        longest = max(int(steps.index.column("length").max()) for steps in data)
        less = []  # what takes less memory and leaves what is learnt as it is
        if max_row_tokens > longest:
            less.append(f"max_row_tokens={max(max_row_tokens // 2, longest)} (now {max_row_tokens})")
        if not gradient_checkpointing:
            less.append("gradient_checkpointing=True")
        advice = f"Make the same call with {' or '.join(less)}; what is learnt stays the same."
        if not less:
            shorter = f"a Schedule.max_length below the longest row's {longest} tokens"
            advice = (
                "The same call would meet this again; wanted, in another output_dir, "
                f"{shorter}, {_ANOTHER_RUN}."
            )
        raise TrainingError(
            f"Stage {trainer.stage.name!r}, after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}: {_first_words(error)} {advice} "
            f"{trainer.checkpointing.how_to_resume()}"
        ) from error


def _first_words(error: torch.OutOfMemoryError) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB.`, without what the GPU holds."""
    return str(error).partition(" GPU ")[0]
