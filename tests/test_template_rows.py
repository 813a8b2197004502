"""What a template makes of single rows: those it refuses or rewrites, system messages, answers that are not
learnt, and today's date."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
from PIL import Image
from staged import stage_trainer
from transformers import ProcessorMixin

from llavamed_peft import Conversation, Schedule, Stage, Turn
from llavamed_peft.errors import CheckpointError, DataError
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.processor import make_stage_processor
from llavamed_peft.modeling.templates import to_messages
from llavamed_peft.packing import Encoder


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProcessorMixin]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        kind: load_checkpoint(tiny.build(folder / kind, kind))[1] for kind in ("llava", "llava_onevision")
    }


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


ONCE = tiny.VICUNA.replace(
    "{% for message in messages %}",
    "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    "{% for message in messages %}",
    1,
)
FORGETS_THOUGHTS = tiny.VICUNA.replace(
    "{{ part['text'] + ' ' }}{% endgeneration %}",
    "{{ (part['text'] if message == messages[-1] else part['text'].split('</think>')[-1]) + ' ' }}"
    "{% endgeneration %}",
)


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))


def test_a_template_for_one_exchange_rejects_longer_rows(tmp_path: Path) -> None:
    _, processor = load_checkpoint(tiny.build(tmp_path / "once", template=ONCE))
    encoder = Encoder(make_stage_processor(processor, "pad"))
    encoder.encode(Conversation("1", turns("what?", "no")), [])
    with pytest.raises(DataError) as raised:
        encoder.encode(Conversation("1", turns("what?", "no", "sure?", "yes")), [])
    assert str(raised.value) == (
        "The chat template refuses turn 3 (one question only); wanted turns that it takes. Leave the row "
        "out, or split it into conversations of one question each."
    )


def test_a_row_whose_earlier_answer_the_template_rewrites_is_rejected(tmp_path: Path) -> None:
    """As a template of a reasoning model drops the thoughts of earlier answers."""
    _, processor = load_checkpoint(tiny.build(tmp_path / "forgets", template=FORGETS_THOUGHTS))
    encoder = Encoder(processor)
    encoder.encode(Conversation("1", turns("what?", "<think>hm</think>no")), [])
    encoder.encode(Conversation("1", turns("what?", "no", "sure?", "<think>hm</think>no")), [])
    with pytest.raises(DataError) as raised:
        encoder.encode(Conversation("1", turns("what?", "<think>hm</think>no", "sure?", "yes")), [])
    assert str(raised.value) == (
        "The chat template renders the turns before turn 3 as 'R: what? ASSISTANT: <think>hm</think>no ', "
        "and with that turn as 'R: what? ASSISTANT: no USER: sure? ASSISTANT:'; wanted the same. It "
        "rewrites earlier turns, so later answers cannot be trained on. Leave the row out, or split it into "
        "conversations of one question each."
    )


DATED = "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}{{ today + ' ' }}"


@pytest.mark.parametrize("own", [tiny.VICUNA, tiny.MISTRAL], ids=["wrapped", "as it is"])
def test_a_template_that_writes_the_date_gets_a_fixed_one(own: str, tmp_path: Path) -> None:
    """A run resumed tomorrow sees the same prompt, and so does stock inference."""
    _, processor = load_checkpoint(tiny.build(tmp_path / "dated", template=DATED + own))
    stage = make_stage_processor(processor, "pad")
    again = make_stage_processor(stage, "pad")  # the next stage's
    assert (
        again.chat_template == stage.chat_template and stage.chat_template.count("strftime_now(format)") == 1
    )
    conversation = Conversation("1", turns("what?", "no"))
    for read in (processor, stage):
        words = processor.tokenizer.decode(Encoder(read).encode(conversation, []).input_ids)
        assert words.startswith("01 Jan 2026 ")
    messages = to_messages(conversation.turns[:1])
    asked = stage.apply_chat_template(messages, add_generation_prompt=True)
    assert (
        asked.startswith("01 Jan 2026 ")
        and Encoder(stage).encode_prompt(conversation.turns[:1], []) == (stage.tokenizer(asked)["input_ids"])
    )


def test_a_date_that_cannot_be_fixed_is_refused(tmp_path: Path) -> None:
    computed = "{% set format = '%d' + '%m' %}{{ strftime_now(format) }}"
    _, processor = load_checkpoint(tiny.build(tmp_path / "computed", template=computed + tiny.VICUNA))
    with pytest.raises(CheckpointError, match="asks for today's date in a format that it computes"):
        make_stage_processor(processor, "pad")


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_a_system_message_is_written_by_the_checkpoints_template(
    kind: str, processors: dict[str, ProcessorMixin], image: str
) -> None:
    encoder = Encoder(processors[kind])
    plain = Conversation("1", turns("<image> what?", "no"), (image,))
    with_system = Conversation("1", turns("<image> what?", "no"), (image,), system="Be brief.")
    counts = encoder.count_image_tokens([(64, 64)])
    texts = [
        processors[kind].tokenizer.decode(encoder.encode(one, counts).input_ids)
        for one in (plain, with_system)
    ]
    assert "Be brief." not in texts[0] and texts[1].count("Be brief.") == 1
    assert texts[1].index("Be brief.") < texts[1].index("<image>")
    prompt = encoder.encode_prompt(with_system.turns[:1], counts, "Be brief.")
    assert encoder.encode(with_system, counts).input_ids[: len(prompt)].tolist() == prompt
    stage = make_stage_processor(processors[kind], "pad")
    messages = to_messages(with_system.turns, system="Be brief.")
    assert stage.apply_chat_template(messages).count("Be brief.") == 1


def test_a_template_without_a_place_for_a_system_message_rejects_the_row(
    processors: dict[str, ProcessorMixin], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        without = tiny.VICUNA.replace(
            "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
        )
        _, processor = load_checkpoint(tiny.build(tmp_path / "without", template=without))
        Encoder(processor).encode(Conversation("1", turns("what?", "no"), system="Be brief."), [])
    assert str(raised.value) == (
        "The chat template shows nothing of the system message 'Be brief.'; wanted a template with a place "
        "for it. Leave the message out, or put it before the question."
    )
    with pytest.raises(
        DataError, match="The system message holds '<s>', which the tokenizer reads as a special"
    ):
        Encoder(processor).encode(Conversation("1", turns("what?", "no"), system="<s>"), [])


def test_an_answer_that_is_not_learnt_is_shown_before_later_ones(
    processors: dict[str, ProcessorMixin],
) -> None:
    said = turns("what?", "no", "sure?", "yes")
    learnt = Encoder(processors["llava"]).encode(Conversation("1", said), [])
    shown = (said[0], Turn("assistant", "no", supervised=False), *said[2:])
    half = Encoder(processors["llava"]).encode(Conversation("1", shown), [])
    assert half.input_ids.tolist() == learnt.input_ids.tolist()
    supervised = [processors["llava"].tokenizer.decode(one.labels[one.labels >= 0]) for one in (learnt, half)]
    assert supervised == [" no</s> yes</s>", " yes</s>"]


def test_a_word_beyond_the_embedding_rejects_its_row(processors: dict[str, ProcessorMixin]) -> None:
    processor = copy.deepcopy(processors["llava"])
    processor.tokenizer.add_tokens(["cardiomegaly"])
    encoder = Encoder(processor, embedding_rows=len(processor.tokenizer) - 1)
    encoder.encode(Conversation("1", turns("what?", "no")), [])
    with pytest.raises(DataError) as raised:
        encoder.encode(Conversation("1", turns("what?", "cardiomegaly")), [])
    rows = len(processor.tokenizer) - 1
    assert str(raised.value) == (
        f"The words hold 'cardiomegaly', which is token {rows}, and the language model's embedding has "
        f"{rows} rows; wanted tokens that it has."
    )


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_packed_rows_with_system_messages_and_unlearnt_answers_give_the_padded_loss(
    kind: str, image: str, tmp_path: Path
) -> None:
    """What comes before the first learnt answer is part of the beginning that conversations share."""
    stage = Stage("vqa", "projector", Schedule(epochs=1, learning_rate=1e-3, global_batch=4))
    first = (Turn("user", "<image> what?"), Turn("assistant", "a heart", supervised=False))
    rows = [
        Conversation(str(n), (*first, *turns("sure?", answer)), (image,), system=system)
        for n, (answer, system) in enumerate(
            [("yes", "Be brief."), ("no", "Be brief."), ("no", ""), ("yes", "")]
        )
    ]
    base = tiny.build(tmp_path / kind, kind, *(("qwen2", "siglip", -1) if kind != "llava" else ()))
    losses = {}
    for layout in ("packed", "padded"):
        made = stage_trainer(base, rows, tmp_path / layout, stage, layout=layout)
        (step,) = made.train_steps.loader()
        losses[layout] = sum(made._summed_loss(made.model, batch).item() for batch in step)
        tokens = sum(batch.inputs["input_ids"].numel() for batch in step)
        losses[f"{layout} tokens"] = tokens
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)
    assert losses["packed tokens"] < losses["padded tokens"] * 0.7
