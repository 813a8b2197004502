"""`datasets.vqa_rad`: both published forms in miniature, and the published files themselves where they are at
hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from llavamed_peft.conversations import Question
from llavamed_peft.datasets import vqa_rad
from llavamed_peft.datasets.rejects import Reject
from llavamed_peft.datasets.sources import open_sources, question_source
from llavamed_peft.errors import ConfigError, DataError

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "vqa_rad"


def mevf(**changes):
    whole = {
        "qid": 1,
        "image_name": "synpic1.jpg",
        "image_organ": "HEAD",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "question": "Are regions of the brain infarcted?",
        "phrase_type": "freeform",
    } | changes
    return {key: value for key, value in whole.items() if value is not ...}


def original(**changes):
    return mevf(
        qid_linked_id="03f4",
        evaluation="evaluated",
        question_rephrase="NULL",
        question_frame="NULL",
        **changes,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "synpic1.jpg").touch()
    return tmp_path


def write(folder, name, rows):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def test_a_row_becomes_a_question(folder):
    path = write(folder, "trainset.json", [mevf(answer_type="CLOSED ", answer=4)])
    assert list(vqa_rad.read(path)) == [
        Question(
            "1",
            str(folder / "images" / "synpic1.jpg"),
            "Are regions of the brain infarcted?",
            "4",
            "closed",
            "train",
            "trainset.json:1",
            (("image_organ", "HEAD"), ("question_type", "PRES"), ("phrase_type", "freeform")),
        )
    ]


def test_the_original_release_tells_the_split_by_phrase_type(folder):
    rows = [
        original(qid=i, phrase_type=kind)
        for i, kind in enumerate(["freeform", "test_para", "para", "test_freeform"])
    ]
    path = write(folder, "vqa_rad_public.json", rows)
    assert [(question.id, question.split) for question in vqa_rad.read(path)] == [
        ("0", "train"),
        ("1", "test"),
        ("2", "train"),
        ("3", "test"),
    ]
    assert [question.id for question in vqa_rad.read(path, split="train")] == ["0", "2"]
    assert [question.source for question in vqa_rad.read(path, split="test")] == [
        "vqa_rad_public.json:2",
        "vqa_rad_public.json:4",
    ]
    # The name does not overrule the rows.
    assert [question.split for question in vqa_rad.read(write(folder, "test.json", rows))] == [
        "train",
        "test",
        "train",
        "test",
    ]


@pytest.mark.parametrize("keep", ["phrase_type", "evaluation"])
def test_one_mark_of_the_original_release_is_enough(folder, keep):
    """A hand-made excerpt: one row says what form the file has, and the others go by it."""
    telling = mevf(phrase_type="test_para") if keep == "phrase_type" else mevf(evaluation="given")
    path = write(folder, "excerpt.json", [mevf(), telling])
    assert [question.split for question in vqa_rad.read(path)] == [
        "train",
        "test" if keep == "phrase_type" else "train",
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("trainset.json", "train"),
        ("testset.json", "test"),
        ("train.json", "train"),
        ("VQA_RAD_Test.json", "test"),
        ("test-2.json", "test"),
    ],
)
def test_the_mevf_form_tells_the_split_by_the_files_name(folder, name, split):
    path = write(folder, name, [mevf()])
    assert [question.split for question in vqa_rad.read(path)] == [split]
    assert [question.split for question in vqa_rad.read(path, split=split)] == [split]


@pytest.mark.parametrize("name", ["latest.json", "train_test.json", "vqa.json", "contested.json"])
def test_a_name_that_does_not_tell_needs_split(folder, name):
    path = write(folder, name, [mevf()])
    assert [question.split for question in vqa_rad.read(path, split="test")] == ["test"]
    with pytest.raises(DataError) as caught:
        list(vqa_rad.read(path, rejects=[]))
    assert str(caught.value) == (
        f"{path}: neither its rows nor its name tell train from test; "
        "wanted split='train' or 'test', or a name such as trainset.json."
    )


def test_a_split_the_file_cannot_have_is_an_error_not_an_empty_list(folder):
    path = write(folder, "trainset.json", [mevf()])
    with pytest.raises(ConfigError) as caught:
        list(vqa_rad.read(path, split="test"))
    assert str(caught.value) == (
        f"{path}: split='test' was asked for, but by its name the file is the train split; wanted 'train' or "
        "None."
    )
    with pytest.raises(ConfigError) as caught:
        list(vqa_rad.read(path, split="val"))
    assert str(caught.value) == "split is 'val'; wanted 'train', 'test' or None."


def test_image_folder(folder, tmp_path_factory):
    path = write(folder, "trainset.json", [mevf()])
    (question,) = vqa_rad.read(path, image_folder=folder / "images")
    assert question.image == str(folder / "images" / "synpic1.jpg")
    flat = tmp_path_factory.mktemp("flat")
    (flat / "synpic1.jpg").touch()
    (question,) = vqa_rad.read(write(flat, "trainset.json", [mevf()]))
    assert question.image == str(flat / "synpic1.jpg")


BAD = {
    "not an object": (7, "malformed row", "the row is a number; wanted an object."),
    "no answer": (
        mevf(answer=...),
        "malformed row",
        "the row has no 'answer'; wanted image_name, question, answer, answer_type.",
    ),
    "null answer": (mevf(answer=None), "malformed row", "'answer' is null; wanted text."),
    "empty answer": (mevf(answer=" "), "empty answer", "'answer' is empty; wanted words."),
    "empty question": (mevf(question=""), "empty question", "'question' is empty; wanted words."),
    "marker": (
        mevf(question="<image> What?"),
        "marker in a question",
        "'question' holds <image>; wanted the words alone.",
    ),
    "answer type": (
        mevf(answer_type="MAYBE"),
        "unknown answer type",
        "'answer_type' is 'MAYBE'; wanted one of open, closed.",
    ),
    "image a number": (mevf(image_name=3), "malformed row", "'image_name' is 3; wanted a file name."),
    "missing image": (
        mevf(image_name="x.jpg"),
        "missing image",
        "image 'x.jpg' is not a file in IMAGES; wanted an image there.",
    ),
    "outside": (
        mevf(image_name="../x.jpg"),
        "image outside image folder",
        "image path '../x.jpg' leads out of IMAGES; wanted one inside.",
    ),
    "attribute": (mevf(image_organ=[]), "malformed row", "'image_organ' is a list; wanted text."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_rejected_with_a_reason(folder, case):
    given, reason, detail = BAD[case]
    detail = detail.replace("IMAGES", str(folder / "images"))
    path = write(folder, "testset.json", [mevf(), given, mevf(qid="last")])
    id = "1" if isinstance(given, dict) else "row 2"
    rejects = []
    assert [question.id for question in vqa_rad.read(path, rejects=rejects)] == ["1", "last"]
    assert rejects == [Reject(str(path), 2, id, reason, detail)]
    with pytest.raises(DataError) as caught:
        list(vqa_rad.read(path))
    assert str(caught.value) == f"{path}:2 (id {id!r}): {detail}"


def test_rows_of_the_other_split_are_not_checked(folder):
    path = write(folder, "vqa_rad_public.json", [original(), original(phrase_type="test_para", answer="")])
    rejects = []
    assert len(list(vqa_rad.read(path, split="train", rejects=rejects))) == 1
    assert rejects == []


def test_a_llava_file_is_refused_by_row_and_an_object_as_a_file(folder):
    path = write(folder, "train.json", [{"id": 1, "image": "synpic1.jpg", "conversations": []}])
    with pytest.raises(DataError, match=r"train\.json:1 \(id 'row 1'\): the row has no 'image_name'"):
        list(vqa_rad.read(path))
    path = write(folder, "train.json", {"questions": []})
    with pytest.raises(DataError) as caught:
        list(vqa_rad.read(path, rejects=[]))
    assert str(caught.value) == (
        f"{path}: one JSON object; "
        "wanted VQA-RAD's JSON: an array of rows with 'image_name', 'question', 'answer' and 'answer_type'."
    )


@pytest.mark.skipif(
    not PUBLISHED.is_dir(),
    reason="the published VQA-RAD files are not beside the repository (../shared/data)",
)
@pytest.mark.parametrize(
    ("name", "split", "counts"),  # images, questions, open, closed
    [
        ("trainset.json", "train", (314, 3064, 1241, 1823)),
        ("testset.json", "test", (203, 451, 179, 272)),
        ("vqa_rad_public.json", "train", (313, 1797, 770, 1027)),
        ("vqa_rad_public.json", "test", (203, 451, 179, 272)),
    ],
)
def test_published_counts(name, split, counts):
    rejects = []
    questions = list(vqa_rad.read(PUBLISHED / name, split=split, rejects=rejects))
    assert rejects == []
    kinds = Counter(question.answer_type for question in questions)
    assert (
        len({question.image for question in questions}),
        len(questions),
        kinds["open"],
        kinds["closed"],
    ) == counts
    assert {question.split for question in questions} == {split}
    assert len({question.id for question in questions}) == len(questions)


@pytest.mark.skipif(
    not PUBLISHED.is_dir(),
    reason="the published VQA-RAD files are not beside the repository (../shared/data)",
)
def test_both_published_forms_hold_the_same_test_questions():
    def asked(name):
        read = vqa_rad.read(PUBLISHED / name, split="test")
        return Counter(
            (question.image, question.question, question.answer, question.answer_type) for question in read
        )

    assert asked("testset.json") == asked("vqa_rad_public.json")


@pytest.mark.skipif(
    not PUBLISHED.is_dir(),
    reason="the published VQA-RAD files are not beside the repository (../shared/data)",
)
def test_the_published_splits_share_images():
    def images(name, split):
        return {question.image for question in vqa_rad.read(PUBLISHED / name, split=split)}

    test = images("testset.json", "test")
    assert len(test & images("trainset.json", "train")) == 203
    assert len(test & images("vqa_rad_public.json", "train")) == 202


def test_a_split_is_data_for_a_stage(folder):
    """As a source, whose rejected rows are counted like those of any file."""
    path = write(
        folder,
        "vqa_rad_public.json",
        [original(), original(phrase_type="test_para"), original(qid=3, answer="")],
    )
    source = question_source(vqa_rad.read, path, None, "train")
    assert (
        open_sources(source, None, "data['vqa']") == open_sources([source], None, "data['vqa']") == [source]
    )
    rejects: list[Reject] = []
    read = list(source.read(rejects))
    assert read == [question.conversation() for question in vqa_rad.read(path, split="train", rejects=[])]
    assert (source.name, len(read), [reject.row for reject in rejects]) == (
        "vqa_rad_public.json (train)",
        1,
        [3],
    )


def test_a_missing_file_is_no_source(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: no such file; wanted a file of questions\."):
        question_source(vqa_rad.read, tmp_path / "nowhere.json", None, "train")
