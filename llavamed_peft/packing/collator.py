"""Conversations → one device batch, with which plain `model(**batch).loss` is the mean over the batch's
supervised tokens.

Two layouts with the same loss and the same gradient. Padded: one row per conversation, padded on the right to
the longest.
Packed: what conversations begin with alike stands once (`tree.py`), in rows without gaps (`rows.py`), and
each token sees its own conversation only (`masks.py`). Ten questions about one image then cost one image and
ten questions, not ten images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from numbers import Integral

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..conversations import Conversation, Question
from ..errors import ConfigError, DataError
from ..storage.equal_images import content_key, file_size
from ..storage.images import load_image
from .encoding import IGNORED, Encoded, Encoder, Size, Tokenized
from .masks import dense_mask
from .pictures import StoredFeatures
from .rows import Row, lay_rows
from .tree import ImageSpan, TokenSequence

LAYOUTS = ("packed", "padded")

Batch = dict[str, torch.Tensor]


class PackedCollator:
    """Lays conversations out as the inputs of a model, decoding their images.

    Args:
        processor: of a LLaVA checkpoint or a stage folder.
        max_length: tokens that a conversation may have; a longer one is an error, never cut.
        max_row_tokens: packed: tokens of a row; where they do not suffice, the batch has several rows, padded
            to the longest, and a conversation longer than that has a row of its own. `None`: one row, as long
            as it gets. Padded: no bound of one call, whose conversations are one batch, but of rows × longest
            of a step's device batches (see `steps.py`).
        layout: `"packed"` or `"padded"`.
        fill_tokens: packed: `None`, or conversations that do not begin with the same image stand in rows of
            their own; see `masks.fill_tokens`.

    Where `features` is set, no image is decoded: the batch has `tower_features`, what the frozen tower makes
    of the images, and `pixel_values` holds nothing (see `tower.freeze_tower`, which prepares a model for it).
    An image without stored features could not be decoded when they were stored; it is an error, as it would
    be without them, and stays one should its file be fixed while the stage trains.

    A packed batch goes to a model whose language model's attention is `sdpa`, as `load_checkpoint` leaves it;
    another's raises `ConfigError`. It must be attention alone, which `masks.choose_attention` checks, and
    have no sliding window shorter than a conversation (`masks.check_window`): packed rows do not heed it.
    `curriculum_finetune` calls both. TRL's own trainer takes the pairs in the mask for tokens where it logs
    `num_tokens`.

    Raises:
        ConfigError: an unknown layout, or a bound that is no whole number of at least 1.
        CheckpointError: the processor's chat template cannot be trained on, or it cannot count image tokens.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int = 2048,
        max_row_tokens: int | None = None,
        layout: str = "packed",
        fill_tokens: int | None = None,
    ):
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is {layout!r}; wanted one of {', '.join(LAYOUTS)}.")
        bounds = (
            ("max_length", max_length, ""),
            ("max_row_tokens", max_row_tokens, "None or "),
            ("fill_tokens", fill_tokens, "None or "),
        )
        for name, number, wanted in bounds:
            if not (number is None and wanted) and (
                not isinstance(number, Integral) or isinstance(number, bool) or number < 1
            ):
                raise ConfigError(f"{name} is {number!r}; wanted {wanted}a whole number of at least 1.")
        self.encoder = Encoder(processor)
        self.max_length = max_length
        self.max_row_tokens = max_row_tokens
        self.layout = layout
        self.fill_tokens = fill_tokens
        self.features: StoredFeatures | None = None

    def __call__(
        self, conversations: Iterable[Conversation | Tokenized], on_image: Callable[[str], None] | None = None
    ) -> Batch:
        """Inputs of the model for these conversations.

        Args:
            conversations: as they were read, or out of an index.
            on_image: told the path of each image before its file is opened.

        Returns:
            `input_ids` and `labels`, [rows, tokens] int64, and where there are images `pixel_values` and what
            the model class wants beside it, in the order in which placeholders stand in the rows. Padded:
            `attention_mask`, [rows, tokens] int64.
            Packed: `position_ids`, [rows, tokens] int64, and `attention_mask`, [rows, 1, tokens, tokens]
                boolean, for `sdpa`. No
            conversations give one row of padding without a label, whose loss is not a number.

        Raises:
            ConfigError: something that is no conversation.
            DataError: an image that cannot be decoded, a conversation longer than `max_length` or without a
                supervised token.
        """
        batch = self.inputs(conversations, on_image)
        if "ends" in batch:
            batch["attention_mask"] = dense_mask(batch.pop("ends"))
        return batch

    def inputs(
        self, conversations: Iterable[Conversation | Tokenized], on_image: Callable[[str], None] | None = None
    ) -> Batch:
        """As a call, but packed with `ends`, [rows, tokens] int64, in the place of the mask that `masks.py`
        makes of it.

        Raises:
            DataError: as a call.
        """
        conversations = list(conversations)
        for number, given in enumerate(conversations):
            if not isinstance(given, (Conversation, Tokenized)):
                advice = "; call its conversation()" if isinstance(given, Question) else ""
                raise ConfigError(
                    f"conversations[{number}] is a {type(given).__name__}; wanted a Conversation{advice}."
                )
        lay_out = self._packed if self.layout == "packed" else self._padded
        return lay_out(conversations, on_image or (lambda path: None))

    def sequence(
        self, conversation: Conversation | Tokenized, contents: Sequence[str], sizes: Sequence[Size]
    ) -> TokenSequence:
        """A conversation's tokens, ready to be laid out.

        Args:
            contents: of each of its images, what is equal for equal images.
            sizes: of each of its images, (height, width) in pixels.

        Raises:
            DataError: it is longer than `max_length`, without a supervised token, or cannot be encoded.
        """
        counts = self.encoder.count_image_tokens(sizes)
        return token_sequence(self._encode(conversation, counts), contents, counts, self.encoder)

    def _encode(self, conversation: Conversation | Tokenized, tokens_per_image: Sequence[int]) -> Encoded:
        try:
            encoded = self.encoder.encode(conversation, tokens_per_image)
        except DataError as error:
            raise DataError(f"{_place(conversation)}: {error}") from error
        return check_length(conversation, encoded, self.max_length)

    def rows(self, sequences: Sequence[TokenSequence]) -> list[Row]:
        """The rows of a packed device batch of these conversations."""
        beginnings = None if self.fill_tokens is None else [_beginning(sequence) for sequence in sequences]
        return lay_rows(sequences, self.max_row_tokens, beginnings)

    def _packed(
        self, conversations: Sequence[Conversation | Tokenized], on_image: Callable[[str], None]
    ) -> Batch:
        paths = list(dict.fromkeys(image for conversation in conversations for image in conversation.images))
        decoded: dict[str, Image.Image] = {}
        if self.features is None:
            content = _contents(paths, on_image)
            for path in paths:
                if content[path] not in decoded:
                    on_image(path)
                    decoded[content[path]] = load_image(path)
            sizes = {key: image.size[::-1] for key, image in decoded.items()}
        else:
            self._check_stored(conversations, self.features, on_image)
            content, sizes = self.features.contents, self.features.sizes
        shown = [tuple(content[path] for path in conversation.images) for conversation in conversations]
        sequences = [
            self.sequence(conversation, keys, [sizes[key] for key in keys])
            for conversation, keys in zip(conversations, shown, strict=True)
        ]
        rows = self.rows(sequences)
        return self._stack(rows) | self._pixels(rows, shown, decoded)

    def _check_stored(
        self,
        conversations: Sequence[Conversation | Tokenized],
        features: StoredFeatures,
        on_image: Callable[[str], None],
    ) -> None:
        """Every image has its features.

        Raises:
            DataError: one has none, since it cannot be decoded, or could not.
        """
        for conversation in conversations:
            for path in conversation.images:
                if not features.has(path, len(conversation.images) == 1):
                    on_image(path)
                    load_image(path)
                    raise DataError(
                        f"{path}: could not be decoded when the stage's features were stored, and can be "
                        "now; it is left out. If its file was mended, the same call made again takes it; if "
                        f"it is the same file (a disk that failed for a moment), delete {features.folder} "
                        "before."
                    )

    def _pixels(
        self, rows: Sequence[Row], shown: Sequence[tuple[str, ...]], decoded: dict[str, Image.Image]
    ) -> Batch:
        """What the model gets of the images, each processed once, in the order in which their placeholders
        stand in the rows."""
        standing = [(shown[sequence], number) for row in rows for sequence, number in row.images]
        groups = list(dict.fromkeys(group for group, _ in standing))
        if not groups:
            return {}
        if self.features is not None:
            contents = [group[number] for group, number in standing]
            return self._stored(self.features, contents, [len(group) == 1 for group, _ in standing])
        processed, _ = self.encoder.process_images([[decoded[key] for key in group] for group in groups])
        first = dict(zip(groups, accumulate(map(len, groups), initial=0), strict=False))
        chosen = [first[group] + number for group, number in standing]
        return dict(self.encoder.select_images(processed, chosen, [len(group) == 1 for group, _ in standing]))

    def _stored(self, features: StoredFeatures, contents: Sequence[str], alone: Sequence[bool]) -> Batch:
        """What the model gets in place of pixels, with what its class wants beside them."""
        return {**features.inputs(contents, alone), **self.encoder.image_numbers(alone)}

    def _stack(self, rows: Sequence[Row]) -> Batch:
        """Rows padded on the right to the longest; padding sees itself alone."""
        shape = (max(len(rows), 1), max(map(len, rows), default=2))
        input_ids = torch.full(shape, self.encoder.pads_with)
        position_ids = torch.zeros(shape, dtype=torch.long)
        ends = torch.arange(1, shape[1] + 1).repeat(shape[0], 1)
        labels = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.from_numpy(row.input_ids)
            position_ids[i, : len(row)] = torch.from_numpy(row.positions)
            if (
                self.fill_tokens is not None
            ):  # a position that begins anew would be taken for another sequence's
                behind = int(row.positions[-1]) + 1
                position_ids[i, len(row) :] = torch.arange(behind, behind + shape[1] - len(row))
            ends[i, : len(row)] = torch.from_numpy(row.ends)
            labels[i, : len(row)] = torch.from_numpy(row.labels)
        return {"input_ids": input_ids, "position_ids": position_ids, "ends": ends, "labels": labels}

    def _padded(
        self, conversations: Sequence[Conversation | Tokenized], on_image: Callable[[str], None]
    ) -> Batch:
        shown = [conversation.images for conversation in conversations if conversation.images]
        batch: Batch = {}
        counts: list[list[int]] = []
        if self.features is not None:
            self._check_stored(conversations, self.features, on_image)
            keys = [[self.features.contents[path] for path in group] for group in shown]
            counts = [
                self.encoder.count_image_tokens([self.features.sizes[key] for key in group]) for group in keys
            ]
            if shown:
                alone = [len(group) == 1 for group in keys for _ in group]
                batch.update(self._stored(self.features, [key for group in keys for key in group], alone))
        elif shown:
            decoded: dict[str, Image.Image] = {}
            for path in dict.fromkeys(path for group in shown for path in group):
                on_image(path)
                decoded[path] = load_image(path)
            inputs, counts = self.encoder.process_images(
                [[decoded[path] for path in group] for group in shown]
            )
            batch.update(inputs)
        remaining = iter(counts)
        rows = [
            self._encode(conversation, next(remaining) if conversation.images else [])
            for conversation in conversations
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
            input_ids[i, :length] = torch.from_numpy(row.input_ids)
            labels[i, :length] = torch.from_numpy(row.labels)
            attention_mask[i, :length] = 1
        if not rows:
            attention_mask[:] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _contents(paths: Collection[str], on_image: Callable[[str], None]) -> dict[str, str]:
    """Path → what is equal for equal files; only those of one size are read for it, since others cannot be
    equal."""
    sizes: dict[str, int] = {}
    for path in paths:
        on_image(path)
        sizes[path] = file_size(path)
    alike = Counter(sizes.values())
    return {path: content_key(path) if alike[size] > 1 else f"path {path}" for path, size in sizes.items()}


def token_sequence(
    encoded: Encoded, contents: Sequence[str], tokens_per_image: Sequence[int], encoder: Encoder
) -> TokenSequence:
    """An encoded conversation with its images found in it.

    Args:
        contents: of each of its images, what is equal for equal images.
        tokens_per_image: of each of its images.
    """
    placeholders = np.flatnonzero(encoded.input_ids == encoder.processor.image_token_id)
    begins = (
        [int(placeholders[before]) for before in accumulate(tokens_per_image[:-1], initial=0)]
        if contents
        else []
    )
    # An image that is alone is processed otherwise than among others where the processor tiles lone images
    # only.
    tiled = encoder.tiles_lone_images_only and len(contents) == 1
    spans = (
        ImageSpan((content, tiled), begin, begin + tokens)
        for content, begin, tokens in zip(contents, begins, tokens_per_image, strict=True)
    )
    return TokenSequence(encoded.input_ids, encoded.labels, tuple(spans))


def _beginning(sequence: TokenSequence) -> int | None:
    return sequence.prefix_key() if sequence.image_prefix else None


def check_length(conversation: Conversation | Tokenized, encoded: Encoded, max_length: int) -> Encoded:
    """Pass an encoded conversation on if it fits and has something to learn.

    Raises:
        DataError: it is longer than `max_length`, or no token of it is supervised; the message names the
            conversation.
    """
    length = len(encoded.input_ids)
    if length > max_length:
        raise DataError(
            f"{_place(conversation)}: {length} tokens, {encoded.image_tokens} of them "
            f"image tokens; max_length is {max_length}. It would need max_length={length}."
        )
    if not encoded.supervised_tokens:
        raise DataError(f"{_place(conversation)}: no token of it is supervised.")
    return encoded


def _place(conversation: Conversation | Tokenized) -> str:
    """A conversation, as an error names it."""
    return f"{conversation.source or 'conversation'} (id {conversation.id})"
