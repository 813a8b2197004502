"""The values check themselves: every refusal with its exact words, YAML there and back, and the paper's
numbers.
"""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from llavamed_peft import (
    LLAVA_MED,
    LLAVA_MED_FULL,
    Conversation,
    Curriculum,
    LoraSpec,
    Question,
    Schedule,
    Stage,
    Turn,
)
from llavamed_peft.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    LlavaMedError,
    TrainingError,
    did_you_mean,
    nearest,
)

SCHEDULE = Schedule(epochs=1, learning_rate=1e-3)
ALIGN = Stage("align", "projector", SCHEDULE)
ASK, TELL = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A chest radiograph."))
QUESTION = Question("7", "images/a.jpg", "Is it normal?", "no", "closed", split="test", source="vqa.json:8")


def schedule(**changes: Any) -> Schedule:
    return Schedule(**{"epochs": 1, "learning_rate": 1e-3} | changes)


def stage(**changes: Any) -> Stage:
    return Stage(**{"name": "align", "trains": "projector", "schedule": SCHEDULE} | changes)


def lora(name: str, **spec: Any) -> Stage:
    return Stage(name, "lora", SCHEDULE, LoraSpec(**spec))


def question(**changes: Any) -> Question:
    return dataclasses.replace(QUESTION, **changes)


# --- what each field refuses, in its own words ---


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("epochs", 0, "0; wanted a number above 0."),
        ("epochs", "3", "'3'; wanted a number above 0."),
        ("epochs", float("nan"), "nan; wanted a number above 0."),
        ("epochs", float("inf"), "inf; wanted a number above 0."),
        ("epochs", True, "True; wanted a number above 0."),
        ("learning_rate", -1e-3, "-0.001; wanted a number above 0."),
        ("learning_rate", None, "None; wanted a number above 0."),
        ("projector_learning_rate", 0.0, "0.0; wanted a number above 0."),
        ("global_batch", 0, "0; wanted a whole number of at least 1."),
        ("global_batch", 64.0, "64.0; wanted a whole number of at least 1."),
        ("global_batch", True, "True; wanted a whole number of at least 1."),
        ("warmup_ratio", 1, "1; wanted a number of at least 0 and below 1."),
        ("warmup_ratio", -0.1, "-0.1; wanted a number of at least 0 and below 1."),
        ("weight_decay", -1, "-1; wanted a number of at least 0."),
        ("max_length", 1, "1; wanted a whole number of at least 2."),
        ("max_length", None, "None; wanted a whole number of at least 2."),
        ("shuffle", "image", "'image'; wanted one of images, conversations. Did you mean 'images'?"),
        ("shuffle", "no", "'no'; wanted one of images, conversations."),
        ("shuffle", False, "False; wanted one of images, conversations."),
    ],
)
def test_schedule_refuses(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        schedule(**{field: value})
    assert str(refusal.value) == f"Schedule.{field} is {wanted}"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("rank", 0, "0; wanted a whole number of at least 1."),
        ("rank", 8.0, "8.0; wanted a whole number of at least 1."),
        ("alpha", 0, "0; wanted a number above 0."),
        ("dropout", 1.0, "1.0; wanted a number of at least 0 and below 1."),
        ("dropout", -0.05, "-0.05; wanted a number of at least 0 and below 1."),
    ],
)
def test_lora_spec_refuses(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        LoraSpec(**{field: value})  # type: ignore[arg-type]
    assert str(refusal.value) == f"LoraSpec.{field} is {wanted}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".align",
        "a/b",
        "a\\b",
        "C:",
        "a*",
        "a\nb",
        "a\tb",
        "a\0",
        " ",
        " align",
        "align ",
        3,
        None,
    ],
)
def test_stage_name_is_a_plain_folder_name(name: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        stage(name=name)
    assert str(refusal.value) == f"Stage.name is {name!r}; wanted a plain folder name such as 'align'."


@pytest.mark.parametrize(
    "name", ["align", "stage 2", "vqa-rad_9.epochs", "médical", "对齐", "2e-3", "no", "x"]
)
def test_stage_name_is_free(name: str) -> None:
    assert stage(name=name).name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"trains": "Lora"},
            "Stage.trains is 'Lora'; wanted one of projector, lora, full. Did you mean 'lora'?",
        ),
        ({"trains": "vision"}, "Stage.trains is 'vision'; wanted one of projector, lora, full."),
        ({"trains": None}, "Stage.trains is None; wanted one of projector, lora, full."),
        ({"schedule": {"epochs": 1}}, "Stage.schedule is {'epochs': 1}; wanted a Schedule."),
        ({"trains": "lora", "lora": 8}, "Stage.lora is 8; wanted a LoraSpec or None."),
        (
            {"schedule": schedule(projector_learning_rate=2e-5)},
            "Stage 'align': Schedule.projector_learning_rate is 2e-05; wanted None, since in a projector "
            "stage learning_rate is the projector's.",
        ),
        (
            {"lora": LoraSpec()},
            "Stage.lora is given, but stage 'align' trains 'projector'; wanted None or trains='lora'.",
        ),
        (
            {"trains": "full", "lora": LoraSpec()},
            "Stage.lora is given, but stage 'align' trains 'full'; wanted None or trains='lora'.",
        ),
    ],
)
def test_stage_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        stage(**changes)
    assert str(refusal.value) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": ()}, "Curriculum.stages is empty; wanted at least one Stage."),
        ({"stages": None}, "Curriculum.stages is None; wanted a tuple of Stage."),
        ({"stages": ALIGN}, f"Curriculum.stages is {ALIGN!r}; wanted a tuple of Stage."),
        ({"stages": ("align",)}, "Curriculum.stages is ('align',); wanted a tuple of Stage."),
        (
            {"stages": (ALIGN, ALIGN)},
            "Curriculum.stages has equal names: align, align; wanted each name once.",
        ),
        ({"seed": -1}, "Curriculum.seed is -1; wanted a whole number of at least 0."),
        ({"seed": 4.2}, "Curriculum.seed is 4.2; wanted a whole number of at least 0."),
        (
            {"image_aspect_ratio": "padd"},
            "Curriculum.image_aspect_ratio is 'padd'; wanted one of pad, checkpoint. Did you mean 'pad'?",
        ),
    ],
)
def test_curriculum_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Curriculum(**{"stages": (ALIGN,)} | changes)
    assert str(refusal.value) == words


def test_two_lora_stages_of_one_lineage_have_one_rank_and_alpha() -> None:
    for name, first, second in (("rank", 8, 16), ("alpha", 16, 32)):
        with pytest.raises(ConfigError) as refusal:
            # A projector stage between them carries the LoRA on, so it does not part them.
            Curriculum((lora("instruct", **{name: first}), ALIGN, lora("vqa", **{name: second})))
        assert str(refusal.value) == (
            f"Stage 'vqa' has LoRA {name} {second}, stage 'instruct' before it {first}; wanted equal "
            "numbers, since the later stage continues the earlier one's tensors. Change one, or put a full "
            "stage between them."
        )


def test_a_full_stage_begins_a_new_lineage() -> None:
    parted = Curriculum((lora("instruct", rank=8), Stage("all", "full", SCHEDULE), lora("vqa", rank=16)))
    assert [stage.lora and stage.lora.rank for stage in parted.stages] == [8, None, 16]


def test_dropout_may_change_within_a_lineage() -> None:
    Curriculum((lora("instruct", dropout=0.1), lora("vqa", dropout=0.0)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Turn("human", "Hello"), "Turn.role is 'human'; wanted one of user, assistant."),
        (lambda: Turn("user", 3), "Turn.text is 3 (int); wanted a string."),
        (
            lambda: Turn("assistant", " \n"),
            "Turn.text of the assistant is empty; wanted words. Leave the conversation out.",
        ),
        (
            lambda: Turn("assistant", "See <image>."),
            "Turn.text of the assistant holds <image>; images belong to the user's turns.",
        ),
        (
            lambda: Conversation("1", ()),
            "Conversation.turns is empty; wanted a user's turn and the assistant's answer.",
        ),
        (lambda: Conversation("1", None), "Conversation.turns is None; wanted a tuple of Turn."),
        (lambda: Conversation("1", ASK), f"Conversation.turns is {ASK!r}; wanted a tuple of Turn."),
        (lambda: Conversation("1", ("Hello",)), "Conversation.turns is ('Hello',); wanted a tuple of Turn."),
        (
            lambda: Conversation("1", (TELL, ASK), ("a.jpg",)),
            "Conversation.turns: turn 1 is the assistant's; wanted the user's (user first, then "
            "alternating).",
        ),
        (
            lambda: Conversation("1", (ASK, ASK), ("a.jpg", "a.jpg")),
            "Conversation.turns: turn 2 is the user's; wanted the assistant's (user first, then "
            "alternating).",
        ),
        (
            lambda: Conversation("1", (ASK, TELL, Turn("user", "Why?")), ("a.jpg",)),
            "Conversation.turns: the last of 3 turns is the user's; wanted an answer to it.",
        ),
        (
            lambda: Conversation("1", (ASK, TELL)),
            "Conversation has 1 <image> marker(s) and 0 image(s); wanted equal numbers.",
        ),
        (
            lambda: Conversation("1", (Turn("user", "Hello"), TELL), ("a.jpg",)),
            "Conversation has 0 <image> marker(s) and 1 image(s); wanted equal numbers.",
        ),
        (
            lambda: Conversation("1", (ASK, TELL), "a.jpg"),
            "Conversation.images is the string 'a.jpg'; wanted a tuple of paths.",
        ),
        (lambda: question(question=" "), "Question.question is ' '; wanted words."),
        (lambda: question(answer=3), "Question.answer is 3; wanted words."),
        (
            lambda: question(answer_type="CLOSED"),
            "Question.answer_type is 'CLOSED'; wanted one of open, closed.",
        ),
        (
            lambda: question(question="<image>\nIs it normal?"),
            "Question.question holds <image>; wanted the words alone, the image is a field.",
        ),
        (
            lambda: question(answer="<image>"),
            "Question.answer holds <image>; wanted the words alone, the image is a field.",
        ),
    ],
)
def test_data_refuses(make: Any, words: str) -> None:
    with pytest.raises(DataError) as refusal:
        make()
    assert str(refusal.value) == words


# --- what the values give ---


def test_a_conversation_is_kept_as_tuples_of_clean_text() -> None:
    kept = Conversation("1", [Turn("user", " <image>\n<image> Compare. "), TELL], [Path("a.jpg"), "b.jpg"])  # type: ignore[arg-type]
    assert kept.turns == (Turn("user", "<image>\n<image> Compare."), TELL)
    assert kept.images == ("a.jpg", "b.jpg")
    assert [turn.image_count for turn in kept.turns] == [2, 0]


def test_a_question_as_a_conversation() -> None:
    turns = (Turn("user", "<image>\nIs it normal?"), Turn("assistant", "no"))
    assert QUESTION.conversation() == Conversation("7", turns, ("images/a.jpg",), "vqa.json:8")


VALUES = [ASK, QUESTION.conversation(), QUESTION, SCHEDULE, LoraSpec(), ALIGN, LLAVA_MED]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_stays_what_it_is(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)
    assert not hasattr(value, "__dict__")
    again = pickle.loads(pickle.dumps(value))  # what a data loader's worker gets
    assert again == value and hash(again) == hash(value)


def test_a_stage_by_name() -> None:
    assert LLAVA_MED["vqa"] is LLAVA_MED.stages[2]
    with pytest.raises(KeyError, match=r"no stage 'instrct'\. Did you mean 'instruct'\?"):
        LLAVA_MED["instrct"]
    with pytest.raises(KeyError, match=r"no stage 0\. Known: align, instruct, vqa\."):
        LLAVA_MED[0]  # type: ignore[index]


def test_every_error_is_ours_and_what_python_calls_it() -> None:
    for error in (ConfigError, DataError, CheckpointError, AdapterError):
        assert issubclass(error, LlavaMedError) and issubclass(error, ValueError)
    assert issubclass(TrainingError, LlavaMedError) and issubclass(TrainingError, RuntimeError)


def test_hints() -> None:
    assert (
        did_you_mean("epoch", ("learning_rate", "epochs"))
        == nearest("epoch", ("epochs",))
        == " Did you mean 'epochs'?"
    )
    assert did_you_mean("zzz", ("b", "a")) == " Known: a, b."
    assert nearest("zzz", ("b", "a")) == ""


# --- the paper's numbers ---

# arXiv:2306.00890 section 4, section 5.2 and appendix (hyper-parameters); 15 epochs are those of the
# published row "LLaVA-Med from LLaVA" in the VQA table. Columns:
# name, trains, learning rate, projector's learning rate, conversations per step, epochs.
PAPER = [
    ("align", "projector", 2e-3, None, 128, 1),
    ("instruct", "full", 2e-5, None, 128, 3),
    ("vqa", "full", 2e-5, None, 64, 15),
]

# LLaVA's own LoRA recipe (scripts/v1_5/finetune_lora.sh in haotian-liu/LLaVA): rank 128, alpha 256, LoRA
# 2e-4, projector 2e-5; batches and epochs as above.
AS_LORA = [
    ("align", "projector", 2e-3, None, 128, 1),
    ("instruct", "lora", 2e-4, 2e-5, 128, 3),
    ("vqa", "lora", 2e-4, 2e-5, 64, 15),
]


@pytest.mark.parametrize(
    ("curriculum", "numbers"),
    [(LLAVA_MED_FULL, PAPER), (LLAVA_MED, AS_LORA)],
    ids=["LLAVA_MED_FULL", "LLAVA_MED"],
)
def test_the_curricula_have_the_numbers_of_their_sources(
    curriculum: Curriculum, numbers: list[tuple[Any, ...]]
) -> None:
    assert [
        (
            stage.name,
            stage.trains,
            stage.schedule.learning_rate,
            stage.schedule.projector_learning_rate,
            stage.schedule.global_batch,
            stage.schedule.epochs,
        )
        for stage in curriculum.stages
    ] == numbers
    for stage in curriculum.stages:
        # Appendix: cosine with warm-up ratio 0.03, no weight decay, 2,048 tokens at most, in every stage.
        assert (stage.schedule.warmup_ratio, stage.schedule.weight_decay, stage.schedule.max_length) == (
            0.03,
            0.0,
            2048,
        )
        if stage.trains == "lora":
            assert stage.lora == LoraSpec(rank=128, alpha=256, dropout=0.05)
    assert curriculum.image_aspect_ratio == "pad"


def test_the_papers_own_curriculum_shuffles_as_the_paper_does() -> None:
    assert {stage.schedule.shuffle for stage in LLAVA_MED_FULL.stages} == {"conversations"}
