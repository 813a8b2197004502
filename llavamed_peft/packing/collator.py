"""Conversations → one device batch, with which plain `model(**batch).loss` is the mean over the batch's supervised tokens.

Only the padded layout is here: one row per conversation, padded on the right to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import ProcessorMixin

from ..conversations import Conversation
from ..errors import ConfigError, DataError
from ..images import load_image
from .encoding import IGNORED, Encoded, Encoder, Tokenized

LAYOUTS = ("padded",)

Batch = dict[str, torch.Tensor]


class PackedCollator:
    """Lays conversations out as the inputs of a model, decoding their images.

    Args:
        processor: of a LLaVA checkpoint or a stage folder.
        max_length: tokens that a conversation may have; a longer one is an error, never cut.
        max_row_tokens: bound of rows × longest that a step's device batches are cut to (see `steps.py`); the conversations of one
            call are one batch, whatever their number.
        layout: `"padded"`.

    Raises:
        ConfigError: an unknown layout.
        CheckpointError: the processor's chat template cannot be trained on.
    """

    def __init__(
        self, processor: ProcessorMixin, max_length: int = 2048, max_row_tokens: int | None = None, layout: str = "padded"
    ):
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is {layout!r}; wanted one of {', '.join(LAYOUTS)}.")
        self.encoder = Encoder(processor)
        self.max_length = max_length
        self.max_row_tokens = max_row_tokens
        self.layout = layout

    def __call__(self, conversations: Sequence[Conversation | Tokenized], on_image: Callable[[str], None] | None = None) -> Batch:
        """Inputs of the model for these conversations.

        Args:
            conversations: as they were read, or out of an index.
            on_image: told the path of each image before it is decoded.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each [rows, tokens] int64, and where there are images `pixel_values` and
            what the model class wants beside it. No conversations give one row of padding without a label.

        Raises:
            DataError: an image that cannot be decoded, a conversation longer than `max_length` or without a supervised token.
        """
        decoded = {}
        for path in dict.fromkeys(image for conversation in conversations for image in conversation.images):
            if on_image is not None:
                on_image(path)
            decoded[path] = load_image(path)
        images = [[decoded[path] for path in conversation.images] for conversation in conversations]
        shown = [group for group in images if group]
        batch: Batch = {}
        counts: list[list[int]] = []
        if shown:
            inputs, counts = self.encoder.process_images(shown)
            batch.update(inputs)
        remaining = iter(counts)
        rows = [
            check_length(conversation, self.encoder.encode(conversation, next(remaining) if group else []), self.max_length)
            for conversation, group in zip(conversations, images, strict=True)
        ]
        return self._pad(rows) | batch

    def _pad(self, rows: list[Encoded]) -> Batch:
        longest = max((len(row.input_ids) for row in rows), default=2)
        shape = (max(len(rows), 1), longest)
        input_ids = torch.full(shape, self.encoder.pads_with)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[i, :length] = torch.tensor(row.input_ids)
            labels[i, :length] = torch.tensor(row.labels)
            attention_mask[i, :length] = 1
        if not rows:
            attention_mask[:] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def check_length(conversation: Conversation | Tokenized, encoded: Encoded, max_length: int) -> Encoded:
    """Pass an encoded conversation on if it fits and has something to learn.

    Raises:
        DataError: it is longer than `max_length`, or no token of it is supervised; the message names the conversation.
    """
    length = len(encoded.input_ids)
    if length > max_length:
        raise DataError(
            f"{conversation.source or 'conversation'} (id {conversation.id}): {length} tokens, {encoded.image_tokens} of them "
            f"image tokens; max_length is {max_length}. It would need max_length={length}."
        )
    if not encoded.supervised_tokens:
        raise DataError(f"{conversation.source or 'conversation'} (id {conversation.id}): no token of it is supervised.")
    return encoded
