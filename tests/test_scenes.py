"""The demo's world and its shipped base: scenes are a function of their seed, their texts hold together, the
base answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo"
BASE = DEMO / "tiny-llava"
sys.path.insert(0, str(DEMO))

from clinic_scenes import MODALITIES, clinic_scene  # noqa: E402  (the recipe's folder is no package)
from general_scenes import general_scene  # noqa: E402
from scene import IMAGE_SIZE, INSTRUCTIONS, Scene  # noqa: E402
from scenes import FIRST_SEED, write_dataset  # noqa: E402

MAKERS = pytest.mark.parametrize("scene_of", [general_scene, clinic_scene])


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(BASE)


def texts(scene: Scene) -> list[str]:
    asked = [text for question in scene.questions for text in (question.question, question.answer)]
    return [scene.caption, *asked, *(text for turn in scene.dialogue for text in turn)]


# ----------------------------------------------------------------------------------------------------
# scenes


@MAKERS
def test_same_seed_same_scene(scene_of):
    first, second = scene_of(7), scene_of(7)
    assert first.image.tobytes() == second.image.tobytes()
    assert (texts(first), first.shapes) == (texts(second), second.shapes)
    assert scene_of(8).image.tobytes() != first.image.tobytes()


def test_scenes_do_not_depend_on_the_process():
    """Another process, with another hash seed, draws the same: no order of a set decides anything."""
    code = "import hashlib, scenes; "
    code += "print([hashlib.sha256(f(s).image.tobytes() + f(s).caption.encode()).hexdigest() "
    code += "for f in (scenes.general_scene, scenes.clinic_scene) for s in range(20)])"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=DEMO,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(prints) == 1


@MAKERS
def test_scene_is_well_formed(scene_of):
    for seed in range(500):
        scene = scene_of(seed)
        assert scene.image.size == (IMAGE_SIZE, IMAGE_SIZE) and scene.image.mode == "RGB"
        assert scene.caption.startswith(("A ", "An ")) and scene.caption.endswith(".")
        assert len(scene.dialogue) == 2 and all(answer.endswith(".") for _, answer in scene.dialogue)
        for question in scene.questions:
            assert question.question.endswith("?") and question.question[0].isupper()
            assert (question.answer in ("yes", "no")) == (question.answer_type == "closed")
        assert not any("{" in text or "  " in text or " ." in text for text in texts(scene))


@MAKERS
def test_closed_questions_come_with_their_opposites(scene_of):
    for seed in range(500):
        closed = [question for question in scene_of(seed).questions if question.answer_type == "closed"]
        for one, other in zip(closed[::2], closed[1::2], strict=True):
            assert one.kind == other.kind and {one.answer, other.answer} == {"yes", "no"}, (one, other)


@MAKERS
def test_the_words_of_a_question_do_not_give_its_answer_away(scene_of):
    """Over many scenes each wording that is asked often is true about as often as false."""
    asked = Counter(
        (question.question, question.answer)
        for seed in range(1_000)
        for question in scene_of(seed).questions
        if question.answer_type == "closed"
    )
    frequent = {words for words, _ in asked if asked[words, "yes"] + asked[words, "no"] > 75}
    assert len(frequent) > 20
    for words in frequent:
        assert 0.25 < asked[words, "yes"] / (asked[words, "yes"] + asked[words, "no"]) < 0.75, words


def test_general_shapes_are_where_the_caption_says():
    for seed in range(300):
        scene = general_scene(seed)
        for shape in scene.shapes:
            assert f"a {shape.size} {shape.color} {shape.name} in the {shape.place}" in scene.caption.replace(
                "A ", "a ", 1
            )
            assert (
                shape.radius < shape.x < IMAGE_SIZE - shape.radius
                and shape.radius < shape.y < IMAGE_SIZE - shape.radius
            )


def test_every_modality_is_drawn():
    seen = Counter(
        name for seed in range(500) for name in MODALITIES if f" {name} " in clinic_scene(seed).caption
    )
    assert seen.total() == 500 and min(seen[name] for name in MODALITIES) > 60


# ----------------------------------------------------------------------------------------------------
# data files


def test_dataset_on_disk(tmp_path):
    files = write_dataset(tmp_path, align=4, instruct=3, vqa=2, heldout=2)
    rows = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    count = {name: len(content) for name, content in rows.items()}
    scenes = [clinic_scene(FIRST_SEED["vqa"] + number) for number in range(2)]
    assert (count["align"], count["instruct"], count["align_heldout"], count["instruct_heldout"]) == (
        4,
        3,
        2,
        2,
    )
    assert count["vqa"] == sum(len(scene.questions) for scene in scenes)

    for name, content in rows.items():
        assert len({row["id"] for row in content}) == len(content)
        for row in content:
            speakers = [turn["from"] for turn in row["conversations"]]
            assert speakers == ["human", "gpt"] * (2 if name.startswith("instruct") else 1)
            assert [turn["value"].count("<image>") for turn in row["conversations"]] == [1] + [0] * (
                len(speakers) - 1
            )
            assert row["conversations"][0]["value"].startswith("<image>\n")
            answer_types = ("open", "closed") if name in ("vqa_heldout", "general_heldout") else (None,)
            assert row.get("answer_type") in answer_types
            with Image.open(tmp_path / row["image"]) as image:
                assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
    assert rows["align"][0]["conversations"][0]["value"].removeprefix("<image>\n") in INSTRUCTIONS
    with Image.open(tmp_path / rows["vqa"][0]["image"]) as image:
        assert image.tobytes() == scenes[0].image.tobytes()


def test_sets_share_no_seed():
    starts = sorted(FIRST_SEED.values())
    assert all(later - earlier >= 100_000 for earlier, later in pairwise(starts))
    assert max(FIRST_SEED, key=FIRST_SEED.get) == "base"


# -------------------------------------------------------------------------------------------------------- the
# shipped base


def test_texts_survive_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for seed in range(200):
        for scene in (general_scene(seed), clinic_scene(seed)):
            for text in (*texts(scene), *INSTRUCTIONS):
                assert tokenizer.decode(tokenizer.encode(text)) == text
    foreign = "Where is the 3.5 cm hæmatoma — frontal, μ-shaped?\n\tIs it ¿midline? 脳"
    assert tokenizer.decode(tokenizer.encode(foreign)) == foreign
    assert [len(tokenizer.encode(f" {word}")) for word in ("yes", "no", "nodule", "mitoses", "left")] == [
        1
    ] * 5
    assert tokenizer.encode("Is there a nodule?")[0] != tokenizer.bos_token_id, (
        "the chat template says <s>, nobody else"
    )


def test_chat_template(processor):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Is there a nodule?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "Which side is it on?"},
    ]
    asked = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert (
        asked
        == "<s>USER: <image>\nIs there a nodule? ASSISTANT: yes</s>USER: Which side is it on? ASSISTANT:"
    )
    tokens = processor.tokenizer.apply_chat_template(
        turns[:2], return_dict=True, return_assistant_tokens_mask=True
    )
    answer = [
        token
        for token, supervised in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True)
        if supervised
    ]
    assert processor.tokenizer.convert_ids_to_tokens(answer) == ["Ġyes", "</s>"]


def test_image_preparation(processor):
    """Pixels become (value / 255 - 0.5) / 0.5, and nothing is resized or cropped away."""
    import torch

    image = clinic_scene(3).image
    prepared = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    values = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(IMAGE_SIZE, IMAGE_SIZE, 3)
        .permute(2, 0, 1)
    )
    torch.testing.assert_close(prepared, values / 127.5 - 1, atol=1e-6, rtol=0)


def test_shipped_base_answers(processor):
    """Loaded as any checkpoint is, it describes its own world: most questions about unseen general scenes
    come out exactly."""
    import torch
    from transformers import AutoModelForImageTextToText

    assert (BASE / "model.safetensors").stat().st_size <= 8_000_000
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    wide = [weight for weight in model.model.language_model.parameters() if weight.ndim == 2]
    assert all(size % 64 == 0 for weight in wide for size in weight.shape)

    right = asked = 0
    for seed in range(4):
        scene = general_scene(FIRST_SEED["general_heldout"] + seed)
        questions = [
            question for question in scene.questions if question.kind in ("background", "place", "object")
        ]
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": scene.image},
                        {"type": "text", "text": question.question},
                    ],
                }
            ]
            for question in questions
        ]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        for question, answer in zip(
            questions, processor.batch_decode(output, skip_special_tokens=True), strict=True
        ):
            right += answer.strip() == question.answer
            asked += 1
    assert right / asked > 0.6
