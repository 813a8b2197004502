"""Build the demo's base: a LLaVA checkpoint of 1.6 million parameters, trained from nothing on drawn shapes.

    python recipes/demo/build_base.py --out recipes/demo/tiny-llava

The shipped weights came out of this command in 31 minutes on 2 CPU cores that had other work too (22 minutes
of CPU time):

| held-out scenes | closed (guessing .500) | open | caption loss | dialogue loss |
|---|---|---|---|---|
| general | 0.892 | 0.919 | 0.076 | 0.062 |
| general, images shuffled | 0.488 | 0.239 | 2.158 | 0.618 |
| clinic, never seen | 0.510 | 0.248 | 6.831 | 4.497 |

Its weak point: "Is the bar on the left?" stays near chance (.53, on the 60 scenes watched in training),
though it answers "Which side is the bar on?" (.85). One seed was run; another machine's arithmetic gives
other weights.

It is a base as a curriculum wants one: it can look, caption and answer in its own world (the general scenes
of `scenes.py`) and has never seen a clinic image. Clinic words it knows as text only: questions about a
written report. What it leaves is an ordinary Hugging Face LLaVA checkpoint with its processor.

What made so small a model look at the image before it answers, found by trial and not taken apart piece by
piece: weights drawn with 1/sqrt(width) instead of 0.02; a vision tower that first learns to say what each
patch shows (`PatchProbe`) and goes on doing so; one shape in each scene for the first fifth of the steps;
closed questions beside their opposites; "yes" and "no" weighing four times, open answers twice, the end of an
answer a fifth. Of these the curriculum that follows keeps the pairs only, which are in its data; its loss is
the plain mean. All questions about one image stand in one row behind a single copy of the image, each blind
to the others.

What is left out: gradient accumulation, bf16, resuming, several devices. The package has them; this script
has only to run once.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from statistics import mean

import torch
from scenes import (
    COLORS,
    FIRST_SEED,
    IMAGE_SIZE,
    INSTRUCTIONS,
    SHAPES,
    Scene,
    SceneQuestion,
    Turns,
    clinic_scene,
    general_scene,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 10
GRID = IMAGE_SIZE // PATCH
WIDTH = 128
EOS_WEIGHT, CLOSED_WEIGHT, OPEN_WEIGHT = 0.2, 4.0, 2.0
PROBE_WEIGHT = 0.3
SIMPLE_SHARE = 0.2  # of the steps, from the first on, with one shape in each scene

# LLaVA-1.5's manner of speaking: `<s>USER: <image>\nquestion ASSISTANT: answer</s>`. Images come first; an
# answer begins with a blank, so that its first word is one token.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role != 'assistant' -%}
        {{- 'USER: ' if message.role == 'user' else '' -}}
        {%- if message.content is string -%}
            {{- message.content | trim -}}
        {%- else -%}
            {%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
            {%- for part in message.content if part.type == 'text' -%}{{- part.text | trim -}}{%- endfor -%}
        {%- endif -%}
        {{- ' ' -}}
    {%- else -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {%- if message.content is string -%}
                {{- ' ' + message.content | trim + eos_token -}}
            {%- else -%}
                {%- for part in message.content if part.type == 'text' -%}{{- ' ' + part.text | trim -}}{%- endfor -%}
                {{- eos_token -}}
            {%- endif -%}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""  # noqa: E501 - the template's own lines


# -------------------------------------------------------------------------------------------------- processor
# and model


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, and every word of `texts` with the blank before it is one
    token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,  # an upper bound: merging ends when every word is whole
        min_frequency=1,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def scene_texts(scenes: Iterable[Scene]) -> Iterable[str]:
    """All that the scenes say, as the chat template has it: requests after `USER:`, answers after a space."""
    for scene in scenes:
        turns = chain(((question.question, question.answer) for question in scene.questions), scene.dialogue)
        for request, answer in chain(turns, ((instruction, scene.caption) for instruction in INSTRUCTIONS)):
            yield f"USER: {request} ASSISTANT: {answer}"
            yield request  # behind the image's line break no blank precedes it
        yield f"USER: Report: {scene.caption}"


def build_processor() -> LlavaProcessor:
    """Tokenizer, image preparation (80 pixels, values from -1 to 1) and chat template."""
    scenes = (
        scene_of(FIRST_SEED["base"] + number)
        for number in range(2_000)
        for scene_of in (general_scene, clinic_scene)
    )
    # saved under CLIP's name, so that a machine with torchvision may use that instead
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(scene_texts(scenes)),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """CLIP tower and Llama of four layers each, 128 wide; every matrix a multiple of 64 on both sides, for
    the NF4 kernels."""
    tokenizer = processor.tokenizer
    layers = 4
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("language_model" in name or "multi_modal_projector" in name):
            # 0.02, made for widths in the thousands, leaves attention uniform at 128 and learning flat for
            # long
            std = 0.08 if "embed_tokens" in name else weight.shape[1] ** -0.5
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=std * (2 * layers) ** -0.5 if into_residual else std)
    nn.init.normal_(model.model.vision_tower.embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


# ------------------------------------------------------------------------------------------------------- rows
# and batches


@dataclass(frozen=True, slots=True)
class Branch:
    """One conversation behind its row's prefix: tokens, and how much each weighs in the loss (0: not
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
        """Prefix up to the line break behind the image (or the report), the tokens behind it, and which of
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


# ----------------------------------------------------------------------------------------------------
# training


class PatchProbe(nn.Module):
    """A dense task for the vision tower: which shape, colour and size stand in each patch, and the patch's
    own pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.ModuleList(nn.Linear(WIDTH, 1 + count) for count in (len(SHAPES), len(COLORS), 2))
        self.pixels = nn.Linear(WIDTH, 3 * (PATCH // 2) ** 2)

    def forward(self, patches_NPC: Tensor, pixels_N3HW: Tensor, scenes: Sequence[Scene]) -> Tensor:
        coarse = F.unfold(F.avg_pool2d(pixels_N3HW, 2), kernel_size=PATCH // 2, stride=PATCH // 2).transpose(
            1, 2
        )
        loss = 4 * F.mse_loss(self.pixels(patches_NPC), coarse)
        for head, label_NP in zip(
            self.classes, torch.stack([self._labels(scene) for scene in scenes], dim=1), strict=True
        ):
            weight = torch.ones(head.out_features)
            weight[0] = 0.15  # most patches show nothing
            loss = loss + F.cross_entropy(head(patches_NPC).flatten(0, 1), label_NP.flatten(), weight=weight)
        return loss

    @staticmethod
    def _labels(scene: Scene) -> Tensor:
        """Shape, colour and size of what stands in each patch, [3, patches]; 0 for nothing."""
        labels = torch.zeros(3, GRID, GRID, dtype=torch.long)
        centres = torch.arange(GRID) * PATCH + PATCH // 2
        for shape in scene.shapes:
            rows, columns = ((centres - middle).abs() < shape.radius + 2 for middle in (shape.y, shape.x))
            values = torch.tensor(
                [SHAPES.index(shape.name), list(COLORS).index(shape.color), int(shape.large)]
            )
            labels[:, rows[:, None] & columns] = 1 + values[:, None]
        return labels.flatten(1)


def pixels_of(processor: LlavaProcessor, scenes: Iterable[Scene]) -> Tensor:
    return processor.image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]


def adamw(learning_rate: float, *modules: nn.Module) -> torch.optim.AdamW:
    weights = [weight for module in modules for weight in module.parameters()]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.05},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def warm_up_tower(
    model: LlavaForConditionalGeneration,
    probe: PatchProbe,
    processor: LlavaProcessor,
    seeds: Iterator[int],
    steps: int,
) -> None:
    """The vision tower alone on the dense task."""
    optimizer = adamw(2e-3, model.model.vision_tower, probe)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    for step in range(1, steps + 1):
        scenes = [general_scene(next(seeds)) for _ in range(32)]
        pixels = pixels_of(processor, scenes)
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        loss = probe(hidden[model.config.vision_feature_layer][:, 1:], pixels, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vision tower, step {step} of {steps}: dense loss {loss.item():.3f}", flush=True)


def scene_to_look_at(seeds: Iterator[int], at_most: int) -> Scene:
    """The next general scene with no more shapes than that."""
    return next(scene for scene in map(general_scene, seeds) if len(scene.shapes) <= at_most)


def train(
    model: LlavaForConditionalGeneration,
    probe: PatchProbe,
    processor: LlavaProcessor,
    seeds: Iterator[int],
    steps: int,
) -> None:
    """The whole model on captions, questions and dialogues; a step takes six general scenes seen and two
    scenes told in words."""
    rows_of = RowBuilder(processor)
    rng = random.Random(0)
    watched = [general_scene(FIRST_SEED["general_heldout"] + 50_000 + number) for number in range(60)]
    optimizer = adamw(1.5e-3, model, probe)
    schedule = LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, max(0.03, (1 - step / steps) / 0.3))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        seen = [scene_to_look_at(seeds, at_most=1 if step <= steps * SIMPLE_SHARE else 4) for _ in range(6)]
        told = [
            clinic_scene(next(seeds)) if rng.random() < 0.6 else general_scene(next(seeds)) for _ in range(2)
        ]
        rows = [rows_of.sample(scene, rng, seen=True) for scene in seen]
        rows += [rows_of.sample(scene, rng, seen=False) for scene in told]
        batch = collate(rows, pixels_of(processor, seen))
        answers = answer(model, batch)
        loss = (answers.loss_S * answers.weight_S).sum() / answers.weight_S.sum()
        total = loss + PROBE_WEIGHT * probe(answers.patches_NPC, batch.pixels_N3HW, seen)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            result = evaluate(model, processor, watched)
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step} of {steps}, {minutes:.1f} min: loss {loss.item():.3f}; held-out general "
                f"{result}",
                flush=True,
            )


# ----------------------------------------------------------------------------------------------------
# evaluation


@dataclass(frozen=True, slots=True)
class Result:
    """Shares of questions answered exactly, by answer type and by kind; mean token losses of captions and
    dialogues."""

    closed: float
    open: float
    caption: float
    dialogue: float
    by_kind: dict[str, float]

    def __str__(self) -> str:
        answers = f"closed {self.closed:.3f}, open {self.open:.3f}"
        return f"{answers}, caption loss {self.caption:.3f}, dialogue loss {self.dialogue:.3f}"


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    shuffled: bool = False,
) -> Result:
    """All texts of the scenes; an answer is right if each of its tokens, the end included, is the likeliest
    after the true ones.

    Args:
        shuffled: every scene's texts go with the next scene's image, to see how much is known without
            looking.
    """
    rows_of = RowBuilder(processor)
    rows = [rows_of.everything(scene) for scene in scenes]
    images = [*scenes[1:], scenes[0]] if shuffled else scenes
    right: dict[str, list[bool]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    model.eval()
    for begin in range(0, len(rows), 20):
        some = rows[begin : begin + 20]
        answers = answer(model, collate(some, pixels_of(processor, images[begin : begin + 20])))
        for row in range(len(some)):
            for index, branch in enumerate(some[row].branches, start=1):
                here = (answers.row_S == row) & (answers.branch_S == index)
                right[branch.kind].append(bool(answers.right_S[here].all()))
                losses[branch.kind].extend(answers.loss_S[here].tolist())
                if branch.about:
                    right[f"{branch.kind} {branch.about}"].append(right[branch.kind][-1])
    model.train()
    by_kind = {kind: mean(values) for kind, values in sorted(right.items()) if " " in kind}
    return Result(
        mean(right["closed"]), mean(right["open"]), mean(losses["caption"]), mean(losses["dialogue"]), by_kind
    )


def print_table(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    general = [general_scene(FIRST_SEED["general_heldout"] + number) for number in range(250)]
    clinic = [clinic_scene(FIRST_SEED["heldout"] + number) for number in range(250)]
    print(
        "\n| held-out scenes | closed (guessing .500) | open | caption loss | dialogue loss "
        "|\n|---|---|---|---|---|"
    )
    sets = (
        ("general", general, False),
        ("general, images shuffled", general, True),
        ("clinic, never seen", clinic, False),
    )
    results = {}
    for name, scenes, shuffled in sets:
        result = evaluate(model, processor, scenes, shuffled)
        print(
            f"| {name} | {result.closed:.3f} | {result.open:.3f} | {result.caption:.3f} | "
            f"{result.dialogue:.3f} |",
            flush=True,
        )
        results[name] = result
    print(
        "\nHeld-out general scenes by kind: "
        + ", ".join(f"{kind} {x:.2f}" for kind, x in results["general"].by_kind.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4_500, help="training steps of the whole model")
    parser.add_argument(
        "--tower-steps", type=int, default=800, help="training steps of the vision tower before that"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    seeds = count(FIRST_SEED["base"])
    processor = build_processor()
    model = build_model(processor)
    probe = PatchProbe()
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens", flush=True)

    warm_up_tower(model, probe, processor, seeds, options.tower_steps)
    train(model, probe, processor, seeds, options.steps)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print_table(model, processor)


if __name__ == "__main__":
    main()
