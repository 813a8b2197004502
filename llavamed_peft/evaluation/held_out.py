"""The held-out loss of any model, outside training: what `merge` records, and what checks a stage's own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from transformers import ProcessorMixin

from ..conversations import Conversation, Question
from ..errors import DataError
from ..modeling.parts import bare
from ..packing import PackedCollator
from ..packing.encoding import IGNORED


def held_out_loss(
    model: nn.Module,
    processor: ProcessorMixin,
    data: Iterable[Conversation | Question],
    max_length: int = 2048,
    dtype: torch.dtype | None = None,
    batch_size: int = 4,
) -> float:
    """The mean cross-entropy over all supervised tokens, as a stage's `eval_loss` is.

    Args:
        model: a LLaVA model, bare or with an adapter, on its device. Its mode is as before afterwards.
        processor: of the stage.
        data: each row must be usable: a held-out loss is not measured in part.
        max_length: tokens of a conversation, at most.
        dtype: `torch.bfloat16`: computed under autocast, as stages that compute in it are; else in the
            model's own.
        batch_size: conversations at a time, padded.

    Raises:
        DataError: a conversation cannot be used, or there is none.
    """
    collator = PackedCollator(processor, max_length, layout="padded")
    tower = bare(model).model.vision_tower
    autocast = torch.autocast(tower.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    rows = (row.conversation() if isinstance(row, Question) else row for row in data)
    total, supervised, was_training = 0.0, 0, model.training
    model.eval()
    try:
        while some := list(islice(rows, batch_size)):
            inputs = {
                name: values.to(tower.device, tower.dtype if values.is_floating_point() else None)
                for name, values in collator(some).items()
            }
            labels = inputs.pop("labels")[:, 1:]  # [conversations, tokens - 1]: what position i predicts
            with torch.no_grad(), autocast:
                logits = model(**inputs, use_cache=False).logits[
                    :, :-1
                ]  # [conversations, tokens - 1, vocabulary]
            learnt = labels != IGNORED
            loss = nn.functional.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum")
            total, supervised = total + loss.item(), supervised + int(learnt.sum())
    finally:
        model.train(was_training)
    if not supervised:
        raise DataError("There is no conversation to measure a held-out loss on; wanted at least one.")
    return total / supervised
