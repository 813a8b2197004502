"""`evaluation`: scores against a table worked out by hand; answers against greedy decoding by hand, against
themselves in other batches, and against what was trained."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from llavamed_peft import (
    Conversation,
    Curriculum,
    LoraSpec,
    Question,
    Schedule,
    Stage,
    Turn,
    curriculum_finetune,
    load_stage,
)
from llavamed_peft.errors import DataError
from llavamed_peft.evaluation.answer import answer_questions
from llavamed_peft.evaluation.exact_match import Score, majority_answers, normalise, score, score_table
from llavamed_peft.modeling.generation import stop_token_ids
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.processor import make_stage_processor
from llavamed_peft.packing import Encoder, PackedCollator

LANGUAGE = {"llava": "llama", "vipllava": "llama", "llava_next": "mistral", "llava_onevision": "qwen2"}
SIZES = [(56, 56), (112, 40), (40, 130), (150, 150), (30, 90)]  # (width, height)


def question(answer, answer_type="open", image="x.png", words="what is in the image?", id="1"):
    return Question(id, str(image), words, answer, answer_type)


# Scores


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        ("  yes ", "yes"),
        ("Yes.", "yes"),
        ("yes . ", "yes"),
        ("yes..", "yes."),  # one full stop only
        ("0.5", "0.5"),
        ("Left  lung", "left  lung"),  # spaces within are kept
        ("", ""),
        (".", ""),
    ],
)
def test_what_is_compared(text, wanted):
    assert normalise(text) == wanted


def test_the_majority_answer_is_the_commonest_of_its_kind():
    train = [question(answer) for answer in ("Axial", "axial.", "MRI", "liver")]
    train += [question(answer, "closed") for answer in ("Yes", "no", "No.", "yes", "left")]
    # No and yes are equally frequent: by the alphabet
    assert majority_answers(train) == {
        "open": "axial",
        "closed": "no",
    }
    assert majority_answers(train[:4]) == {"open": "axial"}
    assert majority_answers([]) == {}


def test_scores_of_each_kind_beside_the_majority():
    questions = [
        question("Yes", "closed"),
        question("no", "closed"),
        question("Left lung"),
        question("no", "closed"),
    ]
    answers = ["yes.", "yes", "left lung", "No"]
    scores = score(questions, answers, {"closed": "no"})
    assert scores == {"open": Score(1, 1, "", 0), "closed": Score(3, 2, "no", 2)}
    assert (scores["closed"].accuracy, scores["closed"].majority) == (2 / 3, 2 / 3)
    assert score_table(scores) == (
        "| questions | n | exact match | majority answer | its exact match |\n"
        "|---|---|---|---|---|\n"
        "| open | 1 | 100.0% | – | 0.0% |\n"
        "| closed | 3 | 66.7% | no | 66.7% |\n"
    )


def test_a_kind_without_questions_is_left_out():
    assert score([question("no", "closed")], ["no"], {"open": "axial", "closed": "no"}) == {
        "closed": Score(1, 1, "no", 1)
    }
    assert score([], [], {}) == {}


def test_as_many_answers_as_questions():
    with pytest.raises(
        ValueError, match=r"2 questions and 1 answers; wanted equal numbers, in the same order\."
    ):
        score([question("no"), question("yes")], ["no"], {})


# Answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """model type → (model, processor), built once."""
    loaded = {}

    def load(model_type):
        if model_type not in loaded:
            path = tiny.build(folder / model_type, model_type, LANGUAGE[model_type])
            model, processor = load_checkpoint(path)
            loaded[model_type] = model, make_stage_processor(processor, "pad")
        return loaded[model_type]

    return load


@pytest.fixture(scope="module")
def images(folder):
    generator = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        paths.append(folder / f"{number}.png")
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def asked(images):
    """Questions of several lengths about images of several shapes, one without an image, one with two and an
    earlier turn."""
    several = [
        question("yes", image=image, words=f"{'what ' * i}is in it?") for i, image in enumerate(images)
    ]
    text_only = Conversation("text", (Turn("user", "the heart ?"), Turn("assistant", "normal")))
    turns = (
        Turn("user", "<image> the left lung, <image>"),
        Turn("assistant", "a chest x-ray"),
        Turn("user", "and the right?"),
        Turn("assistant", "normal"),
    )
    return [*several[:3], text_only, *several[3:], Conversation("two", turns, tuple(map(str, images[:2])))]


@pytest.mark.parametrize("model_type", tiny.MODELS)
def test_the_model_is_asked_what_it_was_asked_in_training(checkpoint, images, monkeypatch, model_type):
    """What `generate` is given is what the collator gives in training, up to the first token of the last
    answer."""
    model, processor = checkpoint(model_type)
    seen = []

    def generate(generation_config, **inputs):
        seen.append(inputs)
        return inputs["input_ids"]

    monkeypatch.setattr(model, "generate", generate)
    questions = asked(images)
    answer_questions(model, processor, questions, batch_size=1)
    collator = PackedCollator(processor, layout="padded")
    for one, inputs in zip(questions, seen, strict=True):
        trained = collator([one.conversation() if isinstance(one, Question) else one])
        learnt = trained["labels"][0] != -100
        # Where the last stretch of supervised tokens begins
        answer = int((learnt[1:] & ~learnt[:-1]).nonzero()[-1]) + 1
        assert torch.equal(inputs["input_ids"], trained["input_ids"][:, :answer])
        assert inputs.keys() == trained.keys() - {"labels"}
        for name in inputs.keys() - {"input_ids", "attention_mask"}:
            assert torch.equal(inputs[name], trained[name]), name


@pytest.mark.parametrize("model_type", tiny.MODELS)
def test_batches_change_no_answer(checkpoint, images, model_type):
    model, processor = checkpoint(model_type)
    questions = asked(images)
    alone = answer_questions(model, processor, questions, max_new_tokens=6, batch_size=1)
    assert len(alone) == len(questions)
    assert len(set(alone)) > 1, (
        "the checkpoint says the same whatever it is asked; the test would show nothing"
    )
    assert answer_questions(model, processor, questions, max_new_tokens=6, batch_size=4) == alone


def test_answers_are_greedy_whatever_the_checkpoint_says(checkpoint, images, monkeypatch):
    """The oracle: the most probable token, appended, and again, by plain forward passes."""
    model, processor = checkpoint("llava")
    encoder = Encoder(processor)
    wanted = []
    for one in asked(images)[:3]:
        conversation = one.conversation()
        with Image.open(one.image) as image:
            pixels, counts = encoder.process_images([[image.convert("RGB")]])
        ids = encoder.encode_prompt(conversation.turns[:1], counts[0])
        length = len(ids)
        while len(ids) < length + 5 and ids[-1] not in stop_token_ids(model, encoder.processor):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), **pixels).logits[0, -1].argmax()))
        wanted.append(processor.tokenizer.decode(ids[length:], skip_special_tokens=True).strip())
    own = model.generation_config
    for name, value in (
        ("do_sample", True),
        ("temperature", 9.0),
        ("repetition_penalty", 9.0),
        ("num_beams", 2),
    ):
        monkeypatch.setattr(own, name, value)
    assert answer_questions(model, processor, asked(images)[:3], max_new_tokens=5) == wanted


@pytest.mark.parametrize(
    ("model_type", "stops"), [("llava", ["</s>"]), ("llava_onevision", ["</s>", "<|im_end|>"])]
)
def test_answers_end_at_the_models_or_the_templates_stop(checkpoint, model_type, stops):
    model, processor = checkpoint(model_type)
    ids = stop_token_ids(model, processor)
    assert sorted(processor.tokenizer.convert_ids_to_tokens(ids)) == sorted(stops)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_as_before(checkpoint, images, monkeypatch, training):
    model, processor = checkpoint("llava")
    model.train(training)
    answer_questions(model, processor, asked(images)[:1], max_new_tokens=1)
    assert model.training is training
    with pytest.raises(DataError):
        answer_questions(model, processor, [question("yes", image="nowhere.png")])
    assert model.training is training
    model.eval()


def test_an_unreadable_image_names_its_question(checkpoint, images, tmp_path):
    model, processor = checkpoint("llava")
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:200])
    questions = [
        *asked(images)[:1],
        Question("q17", str(broken), "what?", "yes", "closed", source="testset.json:17"),
    ]
    with pytest.raises(DataError, match=r"^testset\.json:17 \(id q17\): .*broken\.png"):
        answer_questions(model, processor, questions)


def test_no_questions_no_answers(checkpoint):
    assert answer_questions(*checkpoint("llava"), []) == []


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_what_was_learnt_by_heart_is_answered(folder, checkpoint, images, model_type):
    """Closes the loop: training, the stage's folder, loading, asking."""
    checkpoint(model_type)  # written
    base = folder / model_type
    questions = [
        question("a normal heart", image=images[0], words="what is in the image?"),
        question("yes", "closed", image=images[1], words="is the left lung normal?"),
    ]
    schedule = Schedule(epochs=30, learning_rate=1e-2, global_batch=2, max_length=400)
    curriculum = Curriculum((Stage("vqa", "lora", schedule, LoraSpec(rank=16, alpha=32, dropout=0.0)),))
    adapter = curriculum_finetune(
        base, {"vqa": questions}, folder / f"run-{model_type}", curriculum=curriculum
    )["vqa"]
    model, processor = load_stage(base, adapter)
    before = answer_questions(*checkpoint(model_type), questions)
    after = answer_questions(model, processor, questions)
    assert after == ["a normal heart", "yes"] != before
