"""A conversation → token ids and labels: supervised are the assistant's words and their stop token.

The text comes from `modeling/templates.py`. Here it becomes tokens (`Tokens`, which an index keeps). Then
each `<image>` becomes as many image tokens as the processor makes of that image (`Encoded`). The tokens
before the first answer are those of the bare prompt, so the model is asked at inference what it was asked in
training. Nothing is cut.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from torch.utils.data import default_collate
from transformers import BatchFeature, ProcessorMixin
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..conversations import IMAGE_MARKER, Conversation, Turn
from ..errors import CheckpointError, DataError
from ..modeling.templates import Piece, read_template

IGNORED = -100  # the label that the losses of Hugging Face do not count

_SURROGATE = re.compile("[\ud800-\udfff]")

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, slots=True)
class Tokens:
    """The words of a conversation as tokens; each image is still one of them.

    Args:
        ids: [tokens] int32.
        supervised: [tokens] bool.
    """

    ids: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A conversation as an index keeps it: its words are tokens already.

    Args:
        id, images, source: as `Conversation` has them.
        tokens: of its turns, from `Encoder.tokenize`.
    """

    id: str
    images: tuple[str, ...]
    source: str
    tokens: Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A conversation's tokens.

    Args:
        input_ids: [tokens] int64, image tokens expanded.
        labels: [tokens] int64, `input_ids` where supervised, else -100; not shifted, which Hugging Face
            models do themselves.
        image_tokens: how many of the tokens are image tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_tokens: int

    @property
    def supervised_tokens(self) -> int:
        """Tokens that count in the loss; no token predicts the first one."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


class Encoder:
    """Turns conversations into tokens with a checkpoint's own tokenizer, template and image processor.

    Args:
        processor: of a LLaVA checkpoint or a stage folder.
        embedding_rows: tokens that the model knows, from `modeling.fit`; `None`: not checked.

    Raises:
        CheckpointError: the chat template cannot be trained on, or the processor lacks what it needs to count
            image tokens.
    """

    def __init__(self, processor: ProcessorMixin, embedding_rows: int | None = None):
        lacks = [name for name in ("patch_size", "num_image_tokens") if getattr(processor, name, 0) is None]
        lacks += [name for name in ("tokenizer", "image_token_id") if not hasattr(processor, name)]
        if lacks:
            raise CheckpointError(
                f"{type(processor).__name__} has no {', '.join(lacks)}; wanted the processor of a LLaVA "
                "checkpoint as load_checkpoint returns it, completed from the model's configuration, or that "
                "of a stage's folder."
            )
        self.processor, self.embedding_rows = processor, embedding_rows
        self.format = read_template(processor)
        self.pads_with = processor.tokenizer.pad_token_id
        special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile(
            "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"
        )

    def encode(self, conversation: Conversation | Tokenized, tokens_per_image: Sequence[int]) -> Encoded:
        """Tokens and labels of one conversation.

        Args:
            conversation: any number of turns and images.
            tokens_per_image: of each of its images, from `count_image_tokens` or from the processed images.

        Raises:
            DataError: the words contain a special token, or the template shows more or fewer images than
                there are.
        """
        tokens = conversation.tokens if isinstance(conversation, Tokenized) else self.tokenize(conversation)
        ids = tokens.ids.astype(np.int64)  # [tokens], an image is one token
        repeats = self._repeats(ids, tokens_per_image)  # [tokens]
        labels = np.where(tokens.supervised, ids, IGNORED)  # [tokens]
        return Encoded(np.repeat(ids, repeats), np.repeat(labels, repeats), sum(tokens_per_image))

    def tokenize(self, conversation: Conversation) -> Tokens:
        """The words of one conversation as tokens.

        Raises:
            DataError: the words contain a special token, half of a character, or a token that the model does
                not know; or the template refuses the conversation.
        """
        texts = {f"Turn {place}": turn.text for place, turn in enumerate(conversation.turns, start=1)}
        for place, text in {"The system message": conversation.system, **texts}.items():
            if halves := _SURROGATE.search(text):
                raise DataError(
                    f"{place} holds {halves[0]!r}, half of a character; wanted text that UTF-8 can write."
                )
            if found := self._special.search(text.replace(IMAGE_MARKER, "")):
                raise DataError(
                    f"{place} holds {found[0]!r}, which the tokenizer reads as a special token; wanted words."
                )
        tokens = self._tokenize(self.format.pieces(self.processor, conversation.turns, conversation.system))
        if self.embedding_rows is not None and (beyond := tokens.ids[tokens.ids >= self.embedding_rows]).size:
            word = self.processor.tokenizer.convert_ids_to_tokens(int(beyond[0]))
            raise DataError(
                f"The words hold {word!r}, which is token {beyond[0]}, and the language model's embedding "
                f"has {self.embedding_rows} rows; wanted tokens that it has."
            )
        return tokens

    def encode_prompt(
        self, turns: Sequence[Turn], tokens_per_image: Sequence[int], system: str = ""
    ) -> list[int]:
        """Token ids of the turns up to the user's last and the generation prompt; `encode` begins with these.

        Args:
            system: the conversation's system message.

        Raises:
            DataError: as `encode`.
        """
        placeholder = Turn("assistant", "-")
        tokens = self._tokenize(self.format.pieces(self.processor, [*turns, placeholder], system)[:-1])
        return np.repeat(tokens.ids, self._repeats(tokens.ids, tokens_per_image)).tolist()

    def fingerprint(self) -> str:
        """SHA-256 of all that decides how a conversation is encoded: equal fingerprints, equal tokens."""
        tokenizer = json.loads(self.processor.tokenizer.backend_tokenizer.to_str())
        settings = {
            "versions": [transformers.__version__, tokenizers.__version__],
            "format": asdict(self.format),
            "embedding_rows": self.embedding_rows,
            "special_tokens": self.processor.tokenizer.special_tokens_map,
            # Truncation and padding are settings of the tokenizer's last call.
            "tokenizer": {
                name: part for name, part in tokenizer.items() if name not in ("truncation", "padding")
            },
            "processor": self.processor.to_dict(),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def count_image_tokens(self, sizes: Sequence[Size]) -> list[int]:
        """Image tokens that each image of one conversation becomes, from its (height, width) in pixels."""
        return [self._image_tokens(size, len(sizes)) for size in sizes]

    @property
    def tiles_lone_images_only(self) -> bool:
        """Only an image that is alone in its conversation is cut into tiles, as LLaVA-OneVision does it."""
        return "batch_num_images" in self.processor.image_processor.model_input_names

    def process_images(
        self, conversations: Sequence[Sequence[Image.Image]]
    ) -> tuple[BatchFeature, list[list[int]]]:
        """Pixels of the images of some conversations, and the tokens that each image becomes.

        Args:
            conversations: the images of each, at least one.

        Returns:
            The image processor's tensors (`pixel_values` and what the model class wants beside it), and for
            each conversation the number of image tokens of each of its images.
        """
        images = [list(group) for group in conversations]
        if not self.tiles_lone_images_only:
            images = [image for group in images for image in group]
        inputs = self.processor.image_processor(images)
        # In a data-loader worker this copies the pixels straight into shared memory. They are [images, 3,
        # height, width], or [images, tiles, 3, height, width] where the class sends sizes.
        inputs["pixel_values"] = default_collate(inputs["pixel_values"])
        inputs.convert_to_tensors("pt")
        counts = iter([self._count(inputs, i) for i in range(sum(len(group) for group in conversations))])
        return inputs, [[next(counts) for _ in group] for group in conversations]

    @property
    def sends_image_sizes(self) -> bool:
        """The model gets each image's size, and its tiles in a dimension of their own (NeXT, OneVision)."""
        return "image_sizes" in self._probe

    def tiles(self, size: Size, alone: bool) -> int:
        """How many tiles of an image of (height, width) pixels the vision tower gets.

        Args:
            alone: the image is the only one of its conversation, or `tiles_lone_images_only` is false.
        """
        if not self.sends_image_sizes or not alone:
            return 1
        pinpoints = list(self.processor.image_processor.image_grid_pinpoints)
        return image_size_to_num_patches(size, pinpoints, self._probe["pixel_values"].shape[-1])

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile's pixels."""
        pixels = self._probe["pixel_values"]
        return math.prod(pixels.shape[-3:]) * pixels.itemsize

    def process_image(self, image: Image.Image, alone: bool) -> torch.Tensor:
        """Pixels of one image as the vision tower gets them, [tiles, 3, height, width].

        Args:
            alone: the image is the only one of its conversation.
        """
        inputs, _ = self.process_images([[image] if alone else [image, image]])
        pixels = inputs["pixel_values"][0]
        return pixels if self.sends_image_sizes else pixels[None]

    def select_images(
        self, inputs: BatchFeature, chosen: Sequence[int], alone: Sequence[bool]
    ) -> BatchFeature:
        """Processed images in the order in which the model is to get them, some perhaps several times.

        Args:
            inputs: from `process_images`.
            chosen: which of its images.
            alone: of each chosen one, whether it was alone in its conversation; if not, the next one or the
                one before it is of the same conversation.
        """
        selected = {name: values for name, values in inputs.items() if name != "batch_num_images"}
        if list(chosen) != list(range(len(selected["pixel_values"]))):  # else they stay in shared memory
            selected = {name: values[list(chosen)] for name, values in selected.items()}  # all are per image
        return BatchFeature(selected | self.image_numbers(alone))

    def image_numbers(self, alone: Sequence[bool]) -> dict[str, torch.Tensor]:
        """`batch_num_images` of a class that tiles lone images only: 1, or the length of a run of others.

        Args:
            alone: of each image, whether it was alone in its conversation.
        """
        if not self.tiles_lone_images_only:
            return {}
        runs = [(lone, sum(1 for _ in run)) for lone, run in itertools.groupby(alone)]
        numbers = [number for lone, length in runs for number in ([1] * length if lone else [length])]
        return {"batch_num_images": torch.tensor(numbers)}

    def _repeats(self, ids: np.ndarray, tokens_per_image: Sequence[int]) -> np.ndarray:
        """[tokens] int64: how often to repeat each token; an image's is repeated, others not."""
        shows_image = ids == self.processor.image_token_id
        shown = int(shows_image.sum())
        if shown != len(tokens_per_image):
            raise DataError(
                f"The chat template shows {shown} image(s), the conversation has {len(tokens_per_image)}; "
                "wanted equal numbers."
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[shows_image] = tokens_per_image  # in the order of the images
        return repeats

    def _tokenize(self, pieces: Sequence[Piece]) -> Tokens:
        tokenizer = self.processor.tokenizer
        text = "".join(piece.text for piece in pieces)
        # As the stock processor decides it.
        adds_bos = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        whole = tokenizer(text, add_special_tokens=adds_bos, return_offsets_mapping=True)
        # The first piece is the prompt before the first answer; pieces alternate from there.
        prompt = tokenizer(pieces[0].text, add_special_tokens=adds_bos)["input_ids"]
        edges = np.cumsum([len(piece.text) for piece in pieces])  # [pieces]: the characters where they end
        ids = np.array(whole["input_ids"], dtype=np.int32)
        # [tokens] each: the characters of a token, and the piece it begins in
        start, end = np.array(whole["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        piece = np.searchsorted(edges, start, side="right")
        no_words = start == end  # BOS, or a template's zero-width token
        piece[no_words] = piece[no_words].clip(max=len(pieces) - 1)
        piece[:1][no_words[:1]] = 0
        added = piece == len(pieces)  # an EOS that the tokenizer adds at the end
        if added.any():
            ids, piece, end = (values[: added.argmax()] for values in (ids, piece, end))
        # A token reaches into the next piece, or the prompt's tokens change once an answer follows it.
        if (end > edges[piece]).any() or (len(pieces) > 1 and ids[: len(prompt)].tolist() != prompt):
            # Then each piece is tokenized by itself.
            return self._tokenize_apart(pieces, prompt)
        return Tokens(ids, np.array([piece.supervised for piece in pieces])[piece])

    def _tokenize_apart(self, pieces: Sequence[Piece], prompt: list[int]) -> Tokens:
        """For a tokenizer that merges across the edge of a prompt and its answer, which no model can do."""
        tokenizer = self.processor.tokenizer
        # Before a piece, EOS keeps the tokenizer from treating it as the beginning of a text.
        anchor = [tokenizer.eos_token_id]
        ids, supervised = list(prompt), [False] * len(prompt)
        for piece in pieces[1:]:
            anchored = tokenizer(tokenizer.eos_token + piece.text, add_special_tokens=False)["input_ids"]
            own = anchored[len(anchor) :]
            ids += own
            supervised += [piece.supervised] * len(own)
        return Tokens(np.array(ids, dtype=np.int32), np.array(supervised))

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 - an encoder lives as long as the run
    def _image_tokens(self, size: Size, images_in_conversation: int) -> int:
        probe = self._probe
        # NeXT and OneVision count from the size; OneVision also asks whether the image is alone.
        if "image_sizes" in probe:
            tiles = {**probe, "image_sizes": [list(size)], "batch_num_images": [images_in_conversation]}
            if images_in_conversation > 1:
                tiles["image_sizes"] = [list(size)] * images_in_conversation
            return self._count(tiles, 0)
        if self._one_shape:
            return self._count(probe, 0)
        return self._count(
            self.processor.image_processor([Image.new("RGB", size[::-1])], return_tensors="pt"), 0
        )

    @functools.cached_property
    def _probe(self) -> BatchFeature:
        return self.processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")

    @functools.cached_property
    def _one_shape(self) -> bool:
        """The processor makes the same shape of every image, as LLaVA's do; then all have one count."""
        wide = self.processor.image_processor([Image.new("RGB", (96, 48))], return_tensors="pt")
        return wide["pixel_values"].shape == self._probe["pixel_values"].shape

    def _count(self, inputs: BatchFeature | dict[str, object], image: int) -> int:
        return self.processor.replace_image_token(inputs, image).count(self.processor.image_token)
