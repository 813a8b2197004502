"""Prompts are the checkpoint's own before the first answer; exactly the answers are supervised."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from llavamed_peft import Conversation, Turn
from llavamed_peft.errors import CheckpointError, DataError
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.processor import make_stage_processor
from llavamed_peft.modeling.templates import read_template, to_messages
from llavamed_peft.packing import Encoder, PackedCollator
from llavamed_peft.packing.encoding import IGNORED

KINDS = ["llava", "vipllava", "llava_next", "llava_onevision"]
STOPS = {"llava": "</s>", "vipllava": "</s>", "llava_next": "</s>", "llava_onevision": "<|im_end|>"}
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] | trim }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
TRAILING_SPACE = (
    "{% for m in messages %}{{ 'Question: ' if m['role'] == 'user' else 'Answer: ' }}"
    "{% for p in m['content'] %}"
    "{{ '<image> ' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
TEXT_ONLY_CONTENT = (
    "{% for m in messages %}{% if m['content'] is string %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
IN_ORDER = (
    "{% for m in messages %}{{ m['role'] + '>' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
)
TEMPLATES = {
    **tiny.TEMPLATES,
    "llama3": LLAMA3,
    "trailing space": TRAILING_SPACE,
    "strings": TEXT_ONLY_CONTENT,
    "in order": IN_ORDER,
}

ASK = Turn("user", "<image>\nwhat is in the image?")
TWO = (ASK, Turn("assistant", "a heart"), Turn("user", "is it normal?"), Turn("assistant", "yes"))


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProcessorMixin]:
    folder = tmp_path_factory.mktemp("bases")
    how = {"llava_next": ("mistral", "clip", -2), "llava_onevision": ("qwen2", "siglip", -1)}
    found = {kind: load_checkpoint(tiny.build(folder / kind, kind, *how.get(kind, ())))[1] for kind in KINDS}
    for name, template in TEMPLATES.items():
        if name not in found:
            found[name] = load_checkpoint(tiny.build(folder / name, template=template))[1]
    return found


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (100, 60), "gray").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def supervised_text(processor: ProcessorMixin, batch: dict, row: int = 0) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != IGNORED])


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_the_templates_generation_prompt(
    name: str, processors: dict[str, ProcessorMixin], image: str
) -> None:
    processor = processors[name]
    chat_format = read_template(processor)
    messages = to_messages([ASK], chat_format.plain)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert chat_format.pieces(processor, TWO)[0].text == prompt
    stock = processor(text=prompt, images=Image.open(image), add_special_tokens=not prompt.startswith("<s>"))[
        "input_ids"
    ][0]
    batch = PackedCollator(processor)([Conversation("1", TWO, (image,))])
    assert batch["input_ids"][0, : len(stock)].tolist() == stock
    first = int((batch["labels"][0] != IGNORED).nonzero()[0])
    assert first == len(stock)
    assert Encoder(processor).encode_prompt([ASK], [stock.count(3)]) == stock


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_stops_are_supervised(
    name: str, processors: dict[str, ProcessorMixin], image: str
) -> None:
    processor = processors[name]
    batch = PackedCollator(processor)([Conversation("1", TWO, (image,))])
    stop = STOPS.get(name) or ("<|im_end|>" if name == "llama3" else "</s>")
    written = supervised_text(processor, batch)
    first, second, rest = written.split(stop)
    assert (first.strip(), second.strip(), rest) == ("a heart", "yes", "")
    assert (batch["labels"][0] == 3).sum() == 0  # no image token


@pytest.mark.parametrize("name", TEMPLATES)
def test_stage_processor_yields_with_stock_calls_what_training_saw(
    name: str, processors: dict[str, ProcessorMixin], image: str, tmp_path: Path
) -> None:
    stage = make_stage_processor(processors[name], "pad")
    stage.save_pretrained(tmp_path / "stage")
    loaded = stage if name == "llava_onevision" else AutoProcessor.from_pretrained(tmp_path / "stage")
    chat_format = read_template(processors[name])
    trained = "".join(piece.text for piece in chat_format.pieces(processors[name], TWO))
    rendered = loaded.apply_chat_template(to_messages(TWO, chat_format.plain))
    assert rendered.startswith(trained) and len(rendered) - len(trained) == len(chat_format.tail)
    history = loaded.apply_chat_template(to_messages(TWO[:3], chat_format.plain), add_generation_prompt=True)
    assert trained.startswith(history), "a later answer is asked for as it was trained"
    # There, tokens merge over the edge
    if loaded.chat_template != processors[name].chat_template and name != "trailing space":
        again = read_template(loaded)
        assert again.template == loaded.chat_template, "a stage's template needs no further wrapping"
        masks = loaded.apply_chat_template(
            to_messages(TWO, chat_format.plain)
            if chat_format.plain
            else [
                {**m, "content": [{**p, "path": image} if p["type"] == "image" else p for p in m["content"]]}
                for m in to_messages(TWO)
            ],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ours = PackedCollator(loaded)([Conversation("1", TWO, (image,))])
        marked = [
            token
            for token, mask in zip(masks["input_ids"][0], masks["assistant_masks"][0], strict=True)
            if mask
        ]
        assert marked == ours["labels"][0][ours["labels"][0] != IGNORED].tolist(), "markers and labels agree"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_stock_processors(
    kind: str, processors: dict[str, ProcessorMixin], tmp_path: Path
) -> None:
    processor = make_stage_processor(processors[kind], "pad")
    for i, size in enumerate([(40, 40), (200, 50), (50, 200), (33, 77)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{i}.png")
        path = str(tmp_path / f"{i}.png")
        batch = PackedCollator(processor)([Conversation("1", TWO, (path,))])
        text = processor.apply_chat_template(to_messages(TWO))
        stock = processor(text=text, images=Image.open(path), return_tensors="pt")
        assert batch["input_ids"][0].tolist() == stock["input_ids"][0, : batch["input_ids"].shape[1]].tolist()
        assert (batch["pixel_values"] == stock["pixel_values"]).all()
        from_header = Encoder(processor).count_image_tokens([size[::-1]])
        assert from_header == [int((batch["input_ids"] == 3).sum())]


def test_template_places_images_unless_they_are_between_words(
    processors: dict[str, ProcessorMixin],
) -> None:
    def shown(name: str, text: str) -> str:
        turns = [Turn("user", text), Turn("assistant", "no")]
        return read_template(processors[name]).pieces(processors[name], turns)[0].text

    for name in ("llava", "in order"):
        assert shown(name, "<image>\nwhat?") == shown(name, "what?\n<image>") == shown(name, "<image> what?")
    assert (
        shown("in order", "left <image> right <image> same?") == "user>left<image>right<image>same?assistant>"
    )
    assert shown("in order", "<image><image> same?") == "user><image><image>same?assistant>"


def test_images_in_later_turns_stay_there(processors: dict[str, ProcessorMixin], image: str) -> None:
    turns = (ASK, Turn("assistant", "a heart"), Turn("user", "<image>\nand this?"), Turn("assistant", "no"))
    batch = PackedCollator(processors["llava"])([Conversation("1", turns, (image, image))])
    ids = batch["input_ids"][0].tolist()
    answered = ids.index(2)
    assert ids[:answered].count(3) == ids[answered:].count(3) == tiny.GRID


def test_missing_template_and_blind_template_are_errors(
    processors: dict[str, ProcessorMixin], tmp_path: Path
) -> None:
    _, processor = load_checkpoint(
        tiny.build(tmp_path / "blind", template="{% for m in messages %}{{ m['role'] }}{% endfor %}")
    )
    with pytest.raises(CheckpointError, match="wanted the question once and one <image>"):
        Encoder(processor)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="The checkpoint has no chat template"):
        Encoder(processor)


def test_template_that_rewrites_earlier_turns_is_an_error(tmp_path: Path) -> None:
    forgetful = tiny.VICUNA.replace("{% for message in messages %}", "{% for message in messages[-2:] %}", 1)
    _, processor = load_checkpoint(tiny.build(tmp_path / "forgetful", template=forgetful))
    with pytest.raises(CheckpointError, match="It rewrites earlier turns"):
        Encoder(processor)


def test_too_long_names_the_length_it_would_need(processors: dict[str, ProcessorMixin], image: str) -> None:
    with pytest.raises(DataError) as raised:
        PackedCollator(processors["llava"], max_length=20)([Conversation("7", TWO, (image,), "d.json:3")])
    batch = PackedCollator(processors["llava"])([Conversation("7", TWO, (image,))])
    needed = batch["input_ids"].shape[1]
    assert str(raised.value) == (
        f"d.json:3 (id 7): {needed} tokens, 16 of them image tokens; max_length is 20. "
        f"It would need max_length={needed}."
    )


@pytest.mark.parametrize("kind", ["llava", "vipllava"])
def test_padding_keeps_the_borders_that_the_crop_loses(
    kind: str, processors: dict[str, ProcessorMixin], tmp_path: Path
) -> None:
    wide = Image.new("RGB", (200, 50), "black")
    wide.paste("white", (0, 0, 20, 50))  # at the left border
    padded = make_stage_processor(processors[kind], "pad")
    padded.save_pretrained(tmp_path / "stage")
    reloaded = AutoProcessor.from_pretrained(tmp_path / "stage")
    for processor, kept in ((processors[kind], False), (padded, True), (reloaded, True)):
        pixels = processor.image_processor([wide], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        assert bool((pixels[0, 0] > 1.5).any()) == kept
    assert make_stage_processor(processors[kind], "checkpoint").image_processor.to_dict() == (
        processors[kind].image_processor.to_dict()
    )


def test_a_template_that_refuses_a_row_rejects_the_row(tmp_path: Path) -> None:
    picky = (
        "{% for m in messages %}{% if 'forbidden' in m['content'] | string %}"
        "{{ raise_exception('no such word') }}"
        "{% endif %}{% endfor %}"
    )
    _, processor = load_checkpoint(tiny.build(tmp_path / "picky", template=picky + tiny.VICUNA))
    with pytest.raises(DataError, match=r"The chat template refuses the conversation \(no such word\)"):
        Encoder(processor).encode(
            Conversation("1", (Turn("user", "forbidden?"), Turn("assistant", "no"))), []
        )


def test_plain_string_template_is_found_out(tmp_path: Path) -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    _, processor = load_checkpoint(tiny.build(tmp_path / "plain", template=plain))
    assert read_template(processor).plain


def test_a_stages_template_is_read_as_the_checkpoints(processors: dict[str, ProcessorMixin]) -> None:
    """Or the wrapper would run inside itself, ever longer with each turn."""
    stage = make_stage_processor(processors["llava"], "pad")
    assert "checkpoint_template" in stage.chat_template
    assert "checkpoint_template" not in read_template(stage).original
    assert read_template(stage).template == stage.chat_template
