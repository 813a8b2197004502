"""Rows and files in LLaVA's format that cannot be read: rejected with a reason, or an error."""

import json
import subprocess
import sys

import pytest
from llava_rows import WANTED, folder, gpt, human, row, write

from llavamed_peft.datasets import llava_json
from llavamed_peft.datasets.rejects import Reject, RejectLog
from llavamed_peft.errors import DataError

BAD = {
    "not an object": (["x"], "malformed row", "the row is a list; wanted an object with 'conversations'."),
    "null": (None, "malformed row", "the row is null; wanted an object with 'conversations'."),
    "no turns key": (
        row(conversations=...),
        "malformed row",
        "the row has no 'conversations'; wanted a list of turns.",
    ),
    "a question of another format": (
        row(conversations=..., question="what?", answer="yes"),
        "malformed row",
        "the row has no 'conversations'; wanted a list of turns. VQA-RAD's own files, and no other set's, "
        "are read by recipes/vqa.py --dataset vqa_rad.",
    ),
    "turns as text": (
        row(conversations="hi"),
        "malformed row",
        "'conversations' is a string; wanted a list of turns.",
    ),
    "turns empty": (
        row(conversations=[]),
        "malformed row",
        "'conversations' is an empty list; wanted a list of turns.",
    ),
    "turn as text": (
        row(conversations=["hi"]),
        "malformed row",
        "turn 1 is a string; wanted an object with 'from' and 'value'.",
    ),
    "turn without value": (
        row(conversations=[human("<image>"), {"from": "gpt", "text": "a"}]),
        "malformed row",
        "turn 2 has the keys 'from', 'text'; wanted an object with 'from' and 'value'.",
    ),
    "value null": (
        row(conversations=[human("<image>"), gpt(None)]),
        "malformed row",
        "the value of turn 2 is null; wanted text.",
    ),
    "value list": (
        row(conversations=[human(["q"]), gpt("a")]),
        "malformed row",
        "the value of turn 1 is a list; wanted text.",
    ),
    "speaker": (
        row(conversations=[{"from": "function", "value": "{}"}, human("<image>"), gpt("a")]),
        "unknown speaker",
        "turn 1 is from 'function'; wanted one of human, user, gpt, assistant.",
    ),
    "speaker a list": (
        row(conversations=[{"from": [], "value": "x"}]),
        "unknown speaker",
        "turn 1 is from []; wanted one of human, user, gpt, assistant.",
    ),
    "gpt first": (
        row(conversations=[gpt("a"), human("<image>")]),
        "turns do not alternate",
        "turn 1 is from 'gpt'; wanted 'human' (human first, then in turn).",
    ),
    "two questions": (
        row(conversations=[human("<image>"), human("q"), gpt("a")]),
        "turns do not alternate",
        "turn 2 is from 'human'; wanted 'gpt' (human first, then in turn).",
    ),
    "no last answer": (
        row(conversations=[human("<image>"), gpt("a"), human("q")]),
        "last turn is a question",
        "turn 3, the last, is the human's; wanted an answer to it.",
    ),
    "empty question": (
        row(conversations=[human("<image>"), gpt("a"), human(" \n"), gpt("b")]),
        "empty question",
        "turn 3 is an empty question; wanted words, or <image> at least.",
    ),
    "empty answer": (
        row(conversations=[human("<image>"), gpt(" ")]),
        "empty answer",
        "turn 2 is an empty answer; wanted words.",
    ),
    "marker in answer": (
        row(conversations=[human("q"), gpt("<image> a")]),
        "marker in an answer",
        "turn 2 is an answer with <image>; wanted images in questions only.",
    ),
    "image without marker": (
        row(conversations=[human("q"), gpt("a")]),
        "image count differs from marker count",
        "the turns hold 0 <image> marker(s) and the row has 1 image(s); wanted equal numbers.",
    ),
    "marker without image": (
        row(image=...),
        "image count differs from marker count",
        "the turns hold 1 <image> marker(s) and the row has 0 image(s); wanted equal numbers.",
    ),
    "two images, one marker": (
        row(image=["a.jpg", "b.jpg"]),
        "image count differs from marker count",
        "the turns hold 1 <image> marker(s) and the row has 2 image(s); wanted equal numbers.",
    ),
    "image a number": (
        row(image=0),
        "malformed row",
        "the row's image is 0; wanted a path or a list of paths.",
    ),
    "image a list with null": (
        row(image=["a.jpg", None]),
        "malformed row",
        "the row's image is ['a.jpg', None]; wanted a path or a list of paths.",
    ),
    "image and images": (
        row(images=["a.jpg"]),
        "malformed row",
        "the row has both 'image' and 'images'; wanted one of them.",
    ),
    "absolute": (
        row(image="/etc/passwd"),
        "absolute image path",
        "image path '/etc/passwd' is absolute; wanted one relative to FOLDER.",
    ),
    "absolute and there": (
        row(image="FOLDER/a.jpg"),
        "absolute image path",
        "image path 'FOLDER/a.jpg' is absolute; wanted one relative to FOLDER.",
    ),
    "drive": (
        row(image="C:/a.jpg"),
        "absolute image path",
        "image path 'C:/a.jpg' is absolute; wanted one relative to FOLDER.",
    ),
    "leaves": (
        row(image="../a.jpg"),
        "image outside image folder",
        "image path '../a.jpg' leads out of FOLDER; wanted one inside.",
    ),
    "leaves later": (
        row(image="PMC1/../../a.jpg"),
        "image outside image folder",
        "image path 'PMC1/../../a.jpg' leads out of FOLDER; wanted one inside.",
    ),
    "parent": (
        row(image=".."),
        "image outside image folder",
        "image path '..' leads out of FOLDER; wanted one inside.",
    ),
    "backslash": (
        row(image="PMC1\\fig 1.jpg"),
        "malformed image path",
        "image path 'PMC1\\\\fig 1.jpg' holds a backslash; wanted forward slashes.",
    ),
    "NUL": (
        row(image="a.jpg\0"),
        "malformed image path",
        "image path 'a.jpg\\x00' holds a NUL byte; wanted a file name.",
    ),
    "missing": (
        row(image="c.jpg"),
        "missing image",
        "image 'c.jpg' is not a file in FOLDER; wanted an image there.",
    ),
    "a folder": (
        row(image="PMC1"),
        "missing image",
        "image 'PMC1' is not a file in FOLDER; wanted an image there.",
    ),
}


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_rejected_with_a_reason_and_reading_continues(folder, case, layout):
    given, reason, detail = BAD[case]
    given = json.loads(json.dumps(given).replace("FOLDER", str(folder)))
    detail = detail.replace("FOLDER", str(folder))
    id = "r" if isinstance(given, dict) else "row 2"
    path = write(folder, [row(), given, row(id="last")], layout)

    rejects = []
    assert [conversation.id for conversation in llava_json.read(path, rejects=rejects)] == ["r", "last"]
    assert rejects == [Reject(str(path), 2, id, reason, detail)]

    with pytest.raises(DataError) as caught:
        list(llava_json.read(path))
    assert str(caught.value) == f"{path}:2 (id {id!r}): {detail}"


def test_half_a_surrogate_pair_is_rejected(folder):
    path = write(folder, [row(conversations=[human("<image>"), gpt("a\ud800")])], "lines")
    rejects = []
    assert list(llava_json.read(path, rejects=rejects)) == []
    assert rejects[0].detail == "the value of turn 2 holds half a surrogate pair at character 2; wanted text."


GOOD = json.dumps({"id": 1, "conversations": [human("q"), gpt("a")]}).encode()

BROKEN_LINES = {
    "cut": (
        b'{"id": 2',
        "the line is not JSON (Expecting ',' delimiter: line 2 column 1 (char 9)); wanted one complete "
        "object.",
    ),
    "words": (
        b"oops",
        "the line is not JSON (Expecting value: line 1 column 1 (char 0)); wanted one complete object.",
    ),
    "two": (
        b"{} {}",
        "the line is not JSON (Extra data: line 1 column 4 (char 3)); wanted one complete object.",
    ),
    "nan": (
        b'{"id": NaN}',
        "the line is not JSON (NaN is not JSON, write null); wanted one complete object.",
    ),
    "infinity": (
        b'{"id": -Infinity}',
        "the line is not JSON (-Infinity is not JSON, write null); wanted one complete object.",
    ),
}


@pytest.mark.parametrize("position", [1, 2, 3])
@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_line_that_is_not_json_is_a_rejected_row(tmp_path, case, position):
    line, detail = BROKEN_LINES[case]
    lines = [GOOD, GOOD]
    lines.insert(position - 1, line)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    rejects = []
    assert len(list(llava_json.read(path, rejects=rejects))) == 2
    assert rejects == [Reject(str(path), position, f"row {position}", "line is not JSON", detail)]
    with pytest.raises(DataError) as caught:
        list(llava_json.read(path))
    assert str(caught.value) == f"{path}:{position} (id 'row {position}'): {detail}"


def test_a_line_nested_too_deep_is_a_rejected_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + b"[" * 100_000 + b"\n" + GOOD)
    rejects = []
    assert len(list(llava_json.read(path, rejects=rejects))) == 2
    assert [reject.reason for reject in rejects] == ["line is not JSON"]


MANY = b"[" + b",\n".join([GOOD] * 2000)  # more than one piece of the parser's, 65,536 bytes
END = len(MANY)

# A wrong byte is told by the byte after it, and that is the one named.
BROKEN_FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n\t", "the file is empty"),
    "latin-1": (b'[{"id": "caf\xe9"}]', "not UTF-8 at byte 14 (line 1, after row 0)"),
    "latin-1 far behind": (
        MANY + b',\n{"id": "\xe9!"}]',
        f"not UTF-8 at byte {END + 12} (line 2001, after row 2000)",
    ),
    "latin-1 lines": (GOOD + b'\n{"id": "\xe9"}', f"not UTF-8 at byte {len(GOOD) + 10} (line 2)"),
    "encoded surrogate": (b'[{"id": "\xed\xa0\x80"}]', "not UTF-8 at byte 13 (line 1, after row 0)"),
    "table": (b"id,image\n1,a.jpg\n", "not JSON, it begins with b'id,image\\n1,a.jpg'"),
    "a string": (b'"hello"', "not JSON, it begins with b'\"hello\"'"),
    "object": (b'{"data": []}', "one JSON object"),
    "object over lines": (json.dumps({"data": [row()]}, indent=1).encode(), "one JSON object"),
    "empty object": (b"{}", "one JSON object"),
    "captions": (
        json.dumps({"mri": [{"pair_id": "x", "fig_caption": "y"}], "ct_scan": []}).encode(),
        "one JSON object, {'mri': [...]}: it looks like figure captions by domain",
    ),
    "captions over lines": (
        json.dumps({"mri": [{"pmid": 1, "pair_id": "x"}]}, indent=1).encode(),
        "one JSON object, {'mri': [...]}: it looks like figure captions by domain",
    ),
    "cut": (
        MANY + b",\n{",
        f"broken JSON: the file ends too early, at byte {END + 3} (line 2001, after row 2000)",
    ),
    "comma": (
        b"[" + GOOD + b",\n]",
        f"broken JSON at byte {len(GOOD) + 4} (line 2, after row 1): parse error: unallowed token at this "
        "point in JSON text",
    ),
    "more behind": (b"[]\n[]", "broken JSON at byte 4 (line 2, after row 0): parse error: trailing garbage"),
    "nan": (
        MANY + b',\n{"id": NaN}]',
        f"broken JSON at byte {END + 10} (line 2001, after row 2000): NaN and Infinity are not JSON, write "
        "null",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_faults_of_the_file_raise_even_where_rejects_are_taken(tmp_path, case):
    content, sentence = BROKEN_FILES[case]
    path = tmp_path / "data.json"
    path.write_bytes(content)
    rejects = []
    with pytest.raises(DataError) as caught:
        list(llava_json.read(path, rejects=rejects))
    assert str(caught.value) == f"{path}: {sentence}; {WANTED}"
    assert rejects == []


def test_missing_file_and_folder(tmp_path):
    for path, sentence in {tmp_path / "none.json": "no such file", tmp_path: "a folder"}.items():
        with pytest.raises(DataError) as caught:
            list(llava_json.read(path, rejects=[]))
        assert str(caught.value) == f"{path}: {sentence}; {WANTED}"


def test_reject_log_counts_and_writes_only_when_there_is_something(folder):
    out = folder / "run" / "rejected.jsonl"
    with RejectLog(out) as log:
        list(llava_json.read(write(folder, [row()]), rejects=log))
        assert (log.total, dict(log.counts), log.commonest(3)) == (0, {}, [])
    assert not out.exists()

    rows = [row(image="no.jpg"), row(conversations=[]), row(), row(image="nö.jpg"), row(image=...)]
    with RejectLog(out) as log:
        assert len(list(llava_json.read(write(folder, rows), rejects=log))) == 1
        assert len(out.read_text().splitlines()) == 4  # written at once, not at the end
    assert log.total == 4
    assert log.counts == {"missing image": 2, "malformed row": 1, "image count differs from marker count": 1}
    assert log.commonest(2) == [("missing image", 2), ("malformed row", 1)]
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 4, 5]
    assert lines[2] == {
        "file": str(folder / "data.json"),
        "row": 4,
        "id": "r",
        "reason": "missing image",
        "detail": f"image 'nö.jpg' is not a file in {folder}; wanted an image there.",
    }

    with RejectLog(out):  # a run without rejects does not leave the last run's behind
        pass
    assert not out.exists()


MEASURE = """
import sys
from llavamed_peft.datasets import llava_json
rows = turns = 0
for conversation in llava_json.read(sys.argv[1]):
    rows += 1
    turns += len(conversation.turns)
assert "torch" not in sys.modules
# not ru_maxrss, which a process inherits from the one that started it, torch and all
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(rows, turns, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("layout", ["array", "lines"])
def test_500_000_rows_need_less_than_300_mb(folder, layout):
    """The size of the released alignment file: about 190 MB of JSON; held in memory as Python objects it is
    above 1 GB."""
    one = json.dumps(
        row(
            domain={"mri": True, "ct_scan": False},
            conversations=[human("<image>\nDescribe it."), gpt("A chest. " * 20)],
        )
    )
    separator, ends = (",\n", "[]") if layout == "array" else ("\n", ("", ""))
    thousand = separator.join([one] * 1000)
    path = folder / "many.json"
    with path.open("w") as file:
        file.write(ends[0] + thousand)
        for _ in range(499):
            file.write(separator + thousand)
        file.write(ends[1])
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, turns, peak_kib = map(int, done.stdout.split())
    assert (rows, turns) == (500_000, 1_000_000)
    assert peak_kib < 300 * 1000**2 / 1024
    path.unlink()
