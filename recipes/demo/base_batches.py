"""Dense batches for the base: many questions about an image in one row, each blind to the others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from base_model import GRID
from scene import INSTRUCTIONS, Scene, SceneQuestion, Turns
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

# ------------------------------------------------------------------------------------------------------- rows
# and batches

EOS_WEIGHT, CLOSED_WEIGHT, OPEN_WEIGHT = 0.2, 4.0, 2.0


@dataclass(frozen=True, slots=True)
class Branch:
    """One conversation after its row's prefix: tokens, and how much each weighs in the loss (0: not
    supervised)."""

    kind: str  # caption, dialogue, closed or open
    about: str  # what a question asks after; empty for the others
    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Several conversations about one image: its prefix once (`<s>USER: ` and the image, or a report in
    words), then each."""

    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]


class RowBuilder:
    """Scenes to rows, by the processor's own chat template."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self._tokenizer = processor.tokenizer
        self._template = processor.chat_template
        self._image, self._eos = (processor.image_token_id, processor.tokenizer.eos_token_id)
        (self._line_break,) = self._tokenizer.encode("\n")
        self._encode = lru_cache(maxsize=100_000)(self._encode)  # questions recur; templates are slow

    def sample(self, scene: Scene, rng: random.Random, seen: bool) -> Row:
        """For training: caption or dialogue (both, if the image is only told), four pairs of closed
        questions, four open ones."""
        talks = [("caption", self._ask_for_caption(scene, rng)), ("dialogue", scene.dialogue)]
        if seen:
            talks = [talks[0] if rng.random() < 0.7 else talks[1]]
        closed = [question for question in scene.questions if question.answer_type == "closed"]
        pairs = list(zip(closed[::2], closed[1::2], strict=True))
        opens = [question for question in scene.questions if question.answer_type == "open"]
        questions = [*chain(*rng.sample(pairs, min(4, len(pairs)))), *rng.sample(opens, min(4, len(opens)))]
        return self._row(scene, talks, questions, seen)

    def everything(self, scene: Scene) -> Row:
        """For evaluation: caption, dialogue and all questions about the image."""
        talks = [("caption", self._ask_for_caption(scene, random.Random(0))), ("dialogue", scene.dialogue)]
        return self._row(scene, talks, scene.questions, seen=True)

    @staticmethod
    def _ask_for_caption(scene: Scene, rng: random.Random) -> Turns:
        return ((rng.choice(INSTRUCTIONS), scene.caption),)

    def _row(
        self, scene: Scene, talks: list[tuple[str, Turns]], questions: Sequence[SceneQuestion], seen: bool
    ) -> Row:
        report = None if seen else scene.caption
        prefix: tuple[int, ...] = ()
        branches = []
        talks = [(kind, "", turns) for kind, turns in talks]
        asked = [
            (question.answer_type, question.kind, ((question.question, question.answer),))
            for question in questions
        ]
        for kind, about, turns in chain(talks, asked):
            prefix, ids, supervised = self._encode(turns, report)
            weight = {"closed": CLOSED_WEIGHT, "open": OPEN_WEIGHT}.get(kind, 1.0)
            weights = tuple(
                is_answer * (EOS_WEIGHT if token == self._eos else weight)
                for token, is_answer in zip(ids, supervised, strict=True)
            )
            branches.append(Branch(kind, about, ids, weights))
        return Row(prefix, tuple(branches))

    def _encode(
        self, turns: Turns, report: str | None
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Prefix up to the line break after the image (or the report), the tokens after it, and which of
        them are answer."""
        messages = []
        for number, (request, answer) in enumerate(turns):
            shown = [{"type": "image"}] if number == 0 and report is None else []
            words = f"Report: {report}\n{request}" if number == 0 and report is not None else request
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": words}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        tokens = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, supervised = tokens["input_ids"], tokens["assistant_masks"]
        cut = ids.index(self._line_break) + 1
        prefix = chain.from_iterable(
            [token] * (GRID**2 if token == self._image else 1) for token in ids[:cut]
        )
        return tuple(prefix), tuple(ids[cut:]), tuple(supervised[cut:])


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors. B rows, T tokens, N images.

    `branch_BT` numbers the conversation a token belongs to: 0 is the row's prefix, -1 is padding.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    branch_BT: Tensor
    weights_BT: Tensor
    mask_B1TT: Tensor
    pixels_N3HW: Tensor


def collate(rows: Sequence[Row], pixels: Tensor) -> Batch:
    """Lay rows out: every branch continues the prefix's positions and sees only the prefix and itself."""
    length = max(len(row.prefix) + sum(len(branch.ids) for branch in row.branches) for row in rows)
    ids, positions = torch.zeros(2, len(rows), length, dtype=torch.long)
    branch = torch.full((len(rows), length), -1)
    weights = torch.zeros(len(rows), length)
    for number, row in enumerate(rows):
        begin = len(row.prefix)
        ids[number, :begin] = torch.tensor(row.prefix)
        positions[number, :begin] = torch.arange(begin)
        branch[number, :begin] = 0
        for index, part in enumerate(row.branches, start=1):
            end = begin + len(part.ids)
            ids[number, begin:end] = torch.tensor(part.ids)
            positions[number, begin:end] = torch.arange(len(row.prefix), len(row.prefix) + len(part.ids))
            branch[number, begin:end] = index
            weights[number, begin:end] = torch.tensor(part.weights)
            begin = end
    query, key = branch[:, :, None], branch[:, None, :]
    mask = ((query == key) | ((key == 0) & (query >= 0))) & torch.ones(
        length, length, dtype=torch.bool
    ).tril()
    return Batch(ids, positions, branch, weights, mask[:, None], pixels)


@dataclass(frozen=True, slots=True)
class Answers:
    """How the S supervised tokens of a batch came out."""

    loss_S: Tensor
    right_S: Tensor  # the likeliest token is the true one
    weight_S: Tensor
    row_S: Tensor
    branch_S: Tensor
    patches_NPC: Tensor  # features of the N images' patches, as the projector gets them


def answer(model: LlavaForConditionalGeneration, batch: Batch) -> Answers:
    """One pass over the batch; logits only where a token is supervised."""
    images = model.model.get_image_features(batch.pixels_N3HW, return_dict=True)
    hidden = model.model(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_B1TT,
        position_ids=batch.positions_BT,
        mm_encoder_outputs={"image": images},
        use_cache=False,
    ).last_hidden_state
    row, before = (batch.weights_BT[:, 1:] > 0).nonzero(as_tuple=True)
    logits = model.lm_head(hidden[row, before])
    target = batch.ids_BT[row, before + 1]
    return Answers(
        loss_S=F.cross_entropy(logits, target, reduction="none"),
        right_S=logits.argmax(-1) == target,
        weight_S=batch.weights_BT[row, before + 1],
        row_S=row,
        branch_S=batch.branch_BT[row, before + 1],
        patches_NPC=images.hidden_states[model.config.vision_feature_layer][:, 1:],
    )
