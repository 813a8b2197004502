"""`recipes/demo/demo.py` around its training (which `make demo` runs): what it removes, shows, and calls
missed."""

import sys
from pathlib import Path

import pytest

from llavamed_peft import Question
from llavamed_peft.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "demo"))
import demo


def test_only_an_earlier_demo_is_removed(tmp_path):
    (tmp_path / "seed-1" / "stages").mkdir(parents=True)
    (tmp_path / "seeds.md").write_text("x")
    demo.empty(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which no demo left; wanted another folder\."):
        demo.empty(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "thesis.txt"]
    with pytest.raises(ConfigError, match="is a file; wanted a folder"):
        demo.empty(tmp_path / "thesis.txt")


def test_six_different_questions_are_shown_open_and_closed_in_turn():
    asked = [
        Question(str(i), "a.png", f"question {i % 7} of {kind}?", "yes", kind)
        for i in range(60)
        for kind in ("open", "closed")
    ]
    shown = [asked[number] for number in demo.shown(asked)]
    assert [question.answer_type for question in shown] == ["open", "closed"] * 3
    assert len({question.question for question in shown}) == 6


def exam(closed, open_, caption_loss=0.1, dialogue_loss=0.1):
    return demo.Exam([], closed, open_, caption_loss, dialogue_loss, 0.5, 0.5)


def test_every_bound_is_missed_where_it_is_missed():
    good = {
        "base": exam(0.5, 0.2, 6.8, 4.5),
        "align": exam(0.5, 0.5, 0.1, 0.4),
        "instruct": exam(0.5, 0.6, 0.3, 0.05),
        "vqa": exam(0.9, 0.95, 1.4, 0.3),
        "shuffled": exam(0.5, 0.2),
    }
    assert demo.missed_bounds(good) == []
    assert [bound.split(" is ")[0] for bound in demo.missed_bounds(good | {"vqa": exam(0.75, 0.55)})] == [
        "closed",
        "open",
        "closed above shuffled",
        "open above shuffled",
    ]
    assert len(demo.missed_bounds(good | {"base": exam(0.7, 0.2, 6.8, 4.5)})) == 1
    assert len(demo.missed_bounds(good | {"align": exam(0.5, 0.5, 7.0, 0.4)})) == 1
    assert len(demo.missed_bounds(good | {"instruct": exam(0.5, 0.6, 0.3, 0.4)})) == 1
    table = demo.seeds_table({3: demo.Demo(good, 100.4, 9.6)})
    assert "| 3 | 0.500 | 0.900 | 0.950 | 0.500 | 0.200 | 6.800 → 0.100 | 0.400 → 0.050 | 100 | 10 |" in table
