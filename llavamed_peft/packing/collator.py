"""Conversations → one device batch, for which plain `model(**batch).loss` is the mean over supervised tokens.

Two layouts with the same loss and the same gradient. Padded: one row for each conversation, padded on the
right to the longest. Packed: what conversations begin with is there once (`tree.py`), in rows without gaps
(`rows.py`), and each token sees its own conversation only (`masks.py`). Ten questions about one image then
cost one image and ten questions, not ten images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from numbers import Integral

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..conversations import Conversation, Question
from ..errors import ConfigError, DataError
from ..storage.equal_images import contents_among
from ..storage.images import load_image
from .encoding import IGNORED, Encoded, Encoder, Size, Tokenized
from .masks import dense_mask
from .pictures import StoredFeatures
from .rows import Row, lay_rows
from .tree import ImageSpan, TokenSequence

LAYOUTS = ("packed", "padded")

Batch = dict[str, torch.Tensor]


class PackedCollator:
    """Lays conversations out as the inputs of a model, and decodes their images.

    Args:
        processor: of a LLaVA checkpoint or a stage folder.
        max_length: tokens that a conversation may have; a longer one is an error, never cut.
        max_row_tokens: packed: most tokens of a row. What does not fit becomes several rows, padded to the
            longest; a conversation longer than that has a row of its own. `None`: one row of any length.
            Padded: does not bound one call, whose conversations are one batch, but rows × longest of a step's
            device batches (see `batches/steps.py`).
        layout: `"packed"` or `"padded"`.
        fill_tokens: packed: not `None` gives conversations that do not begin with the same image rows of
            their own; see `masks.fill_tokens`.

    Where `features` is set, no image is decoded. The batch has `tower_features`, what the frozen tower makes
    of the images, and its `pixel_values` are empty; `modeling.tower.freeze_tower` prepares a model for that.
    An image without stored features could not be decoded when they were stored. It is an error, as it would
    be without them, and stays one if its file is fixed while the stage trains.

    A packed batch needs a model whose language model's attention is `sdpa`, as `load_checkpoint` leaves it;
    another raises `ConfigError`. All its layers must be attention (`masks.choose_attention` checks that), and
    no conversation may be longer than a sliding window, which packed rows ignore (`masks.check_window`).
    `curriculum_finetune` calls both. TRL's own trainer logs a wrong `num_tokens`: it counts the pairs in the
    mask.

    A word that the model has no row of its embedding for (`embedding_rows`) makes its conversation unusable.

    Raises:
        ConfigError: an unknown layout, or a bound that is not a whole number of at least 1.
        CheckpointError: the processor's chat template cannot be trained on, or it cannot count image tokens.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int = 2048,
        max_row_tokens: int | None = None,
        layout: str = "packed",
        fill_tokens: int | None = None,
        embedding_rows: int | None = None,
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
        self.encoder = Encoder(processor, embedding_rows)
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
            conversations: as they were read, or from an index.
            on_image: called with the path of each image before its file is opened.

        Returns:
            `input_ids` and `labels`, [rows, tokens] int64. With images, `pixel_values` and what the model
            class wants beside it, in the order of the placeholders in the rows. Padded: `attention_mask`,
            [rows, tokens] int64. Packed: `position_ids`, [rows, tokens] int64, and `attention_mask`,
            [rows, 1, tokens, tokens] boolean, for `sdpa`. Without conversations: one row of padding without a
            label, whose loss is NaN.

        Raises:
            ConfigError: something is not a conversation.
            DataError: an image cannot be decoded; a conversation is longer than `max_length` or has no
                supervised token.
        """
        batch = self.inputs(conversations, on_image)
        if "ends" in batch:
            batch["attention_mask"] = dense_mask(batch.pop("ends"))
        return batch

    def inputs(
        self, conversations: Iterable[Conversation | Tokenized], on_image: Callable[[str], None] | None = None
    ) -> Batch:
        """As a call, but a packed batch has `ends`, [rows, tokens] int64, in place of the mask.

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
            contents: of each of its images, something that is equal for equal images.
            sizes: of each of its images, (height, width) in pixels.

        Raises:
            DataError: it is longer than `max_length`, has no supervised token, or cannot be encoded.
        """
        counts = self.encoder.count_image_tokens(sizes)  # of each image, from its size: nothing is decoded
        return token_sequence(self._encode(conversation, counts), contents, counts, self.encoder)

    def _encode(self, conversation: Conversation | Tokenized, tokens_per_image: Sequence[int]) -> Encoded:
        try:
            encoded = self.encoder.encode(conversation, tokens_per_image)
        except DataError as error:
            raise DataError(f"{_place(conversation)}: {error}") from error
        return check_length(conversation, encoded, self.max_length)

    def rows(self, sequences: Sequence[TokenSequence]) -> list[Row]:
        """The rows of a packed device batch of these conversations."""
        # `None`: all may share a row, since their attention skips what is not seen (FlexAttention).
        beginnings = None if self.fill_tokens is None else [_beginning(sequence) for sequence in sequences]
        return lay_rows(sequences, self.max_row_tokens, beginnings)

    def _packed(
        self, conversations: Sequence[Conversation | Tokenized], on_image: Callable[[str], None]
    ) -> Batch:
        paths = list(dict.fromkeys(image for conversation in conversations for image in conversation.images))
        decoded: dict[str, Image.Image] = {}  # by content, so that equal files are decoded once
        if self.features is None:
            content = contents_among(paths, on_image)
            for path in paths:
                if content[path] not in decoded:
                    on_image(path)
                    decoded[content[path]] = load_image(path)
            sizes = {key: image.size[::-1] for key, image in decoded.items()}  # PIL has (width, height)
        else:
            self._check_stored(conversations, self.features, on_image)
            content, sizes = self.features.contents, self.features.sizes
        # Of each conversation the contents of its images: the same for equal files under two paths.
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
        """Check that every image has its features.

        Raises:
            DataError: one has none: it cannot be decoded, or could not be when they were stored.
        """
        for conversation in conversations:
            for path in conversation.images:
                if not features.has(path, len(conversation.images) == 1):
                    on_image(path)
                    load_image(path)  # raises, with its reason, if the image still cannot be decoded
                    raise DataError(
                        f"{path}: could not be decoded when the stage's features were stored, and can be "
                        "now; it is left out. If its file was fixed, make the same call again, which uses "
                        "it; if it is the same file (a disk that failed for a moment), first delete "
                        f"{features.folder}."
                    )

    def _pixels(
        self, rows: Sequence[Row], shown: Sequence[tuple[str, ...]], decoded: dict[str, Image.Image]
    ) -> Batch:
        """What the model gets of the images, in the order of their placeholders in the rows.

        Images are processed with those of their conversation (the group), each group once.
        """
        # Each image of the rows: (its group, which of the group).
        in_rows = [(shown[sequence], number) for row in rows for sequence, number in row.images]
        groups = list(dict.fromkeys(group for group, _ in in_rows))
        if not groups:
            return {}
        alone = [len(group) == 1 for group, _ in in_rows]  # OneVision cuts only such images into tiles
        if self.features is not None:
            return self._stored(self.features, [group[number] for group, number in in_rows], alone)
        processed, _ = self.encoder.process_images([[decoded[key] for key in group] for group in groups])
        # group → the number of its first image among the processed ones
        first = dict(zip(groups, accumulate(map(len, groups), initial=0), strict=False))
        # Processed images in the order of the rows; one is repeated if several rows have it.
        chosen = [first[group] + number for group, number in in_rows]
        return dict(self.encoder.select_images(processed, chosen, alone))

    def _stored(self, features: StoredFeatures, contents: Sequence[str], alone: Sequence[bool]) -> Batch:
        """What the model gets in place of pixels, and what its class wants beside them."""
        return {**features.inputs(contents, alone), **self.encoder.image_numbers(alone)}

    def _stack(self, rows: Sequence[Row]) -> Batch:
        """Rows padded on the right to the longest; padding sees itself alone."""
        shape = (max(len(rows), 1), max(map(len, rows), default=2))  # [rows, tokens]
        input_ids = torch.full(shape, self.encoder.pads_with)
        position_ids = torch.zeros(shape, dtype=torch.long)
        ends = torch.arange(1, shape[1] + 1).repeat(shape[0], 1)  # padding ends right after itself
        labels = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.from_numpy(row.input_ids)
            position_ids[i, : len(row)] = torch.from_numpy(row.positions)
            # Positions of padding continue the row's: at one that is 0 again, transformers would see another
            # sequence begin where there is no mask.
            if self.fill_tokens is not None:
                after = int(row.positions[-1]) + 1
                position_ids[i, len(row) :] = torch.arange(after, after + shape[1] - len(row))
            # `ends` counts places of its own row, so it is the same in a batch.
            ends[i, : len(row)] = torch.from_numpy(row.ends)
            labels[i, : len(row)] = torch.from_numpy(row.labels)
        return {"input_ids": input_ids, "position_ids": position_ids, "ends": ends, "labels": labels}

    def _padded(
        self, conversations: Sequence[Conversation | Tokenized], on_image: Callable[[str], None]
    ) -> Batch:
        shown = [conversation.images for conversation in conversations if conversation.images]
        batch: Batch = {}
        counts: list[list[int]] = []  # image tokens of each image of each conversation that has images
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
            # An image of several conversations is decoded once, but processed with each of them.
            for path in dict.fromkeys(path for group in shown for path in group):
                on_image(path)
                decoded[path] = load_image(path)
            inputs, counts = self.encoder.process_images(
                [[decoded[path] for path in group] for group in shown]
            )
            batch.update(inputs)
        # `counts` has only conversations with images; the others take nothing from it.
        remaining = iter(counts)
        rows = [
            self._encode(conversation, next(remaining) if conversation.images else [])
            for conversation in conversations
        ]
        return self._pad(rows) | batch

    def _pad(self, rows: list[Encoded]) -> Batch:
        longest = max((len(row.input_ids) for row in rows), default=2)
        shape = (max(len(rows), 1), longest)  # [rows, tokens]
        input_ids = torch.full(shape, self.encoder.pads_with)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[i, :length] = torch.from_numpy(row.input_ids)
            labels[i, :length] = torch.from_numpy(row.labels)
            attention_mask[i, :length] = 1  # attention of a 2-D mask is causal; padding is not seen
        if not rows:  # attention over nothing would be NaN
            attention_mask[:] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def token_sequence(
    encoded: Encoded, contents: Sequence[str], tokens_per_image: Sequence[int], encoder: Encoder
) -> TokenSequence:
    """An encoded conversation, in which the placeholders of each image are found.

    Args:
        contents: of each of its images, something that is equal for equal images.
        tokens_per_image: of each of its images.
    """
    placeholders = np.flatnonzero(encoded.input_ids == encoder.processor.image_token_id)  # [image tokens]
    # An image's placeholders are one run; the runs are in the order of the images.
    begins = (
        [int(placeholders[before]) for before in accumulate(tokens_per_image[:-1], initial=0)]
        if contents
        else []
    )
    # Where only lone images are cut into tiles, the same image is another one beside others.
    tiled = encoder.tiles_lone_images_only and len(contents) == 1
    spans = (
        ImageSpan((content, tiled), begin, begin + tokens)
        for content, begin, tokens in zip(contents, begins, tokens_per_image, strict=True)
    )
    return TokenSequence(encoded.input_ids, encoded.labels, tuple(spans))


def _beginning(sequence: TokenSequence) -> int | None:
    return sequence.prefix_key() if sequence.image_prefix else None


def check_length(conversation: Conversation | Tokenized, encoded: Encoded, max_length: int) -> Encoded:
    """Return an encoded conversation if it fits and has something to learn.

    Raises:
        DataError: it is longer than `max_length`, or none of its tokens is supervised; the message names it.
    """
    length = len(encoded.input_ids)
    if length > max_length:
        raise DataError(
            f"{_place(conversation)}: {length} tokens, {encoded.image_tokens} of them "
            f"image tokens; max_length is {max_length}. It would need max_length={length}."
        )
    if not encoded.supervised_tokens:
        raise DataError(f"{_place(conversation)}: none of its tokens is supervised.")
    return encoded


def _place(conversation: Conversation | Tokenized) -> str:
    """A conversation, as an error names it."""
    return f"{conversation.source or 'conversation'} (id {conversation.id})"
