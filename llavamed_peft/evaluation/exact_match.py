"""The plainest score of VQA answers: equal to the truth or not, open and closed questions apart, next to the
majority answer.

The majority answer is what a model that looks at nothing would say: the commonest training answer of the
question's kind. An accuracy below it has not been earned by looking. The literature's metrics, token recall
above all, are not here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..conversations import ANSWER_TYPES, Question


@dataclass(frozen=True, slots=True)
class Score:
    """What the answers to one kind of question are worth.

    Args:
        n: questions of the kind.
        correct: of them, answers equal to the truth.
        majority_answer: the commonest training answer of the kind; empty where training had none.
        majority_correct: questions whose truth it is.
    """

    n: int
    correct: int
    majority_answer: str
    majority_correct: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.n

    @property
    def majority(self) -> float:
        """Share that the majority answer would get right, 0 to 1."""
        return self.majority_correct / self.n


def normalise(text: str) -> str:
    """What is compared: the text in lower case, without outer whitespace and without one final full stop.

    >>> normalise(" Yes. ")
    'yes'
    """
    return text.strip().lower().removesuffix(".").rstrip()


def majority_answers(train: Iterable[Question]) -> dict[str, str]:
    """The most frequent training answer, normalised, of each kind (`"open"`, `"closed"`) that training has.

    Of equally frequent answers the first in the alphabet is taken.
    """
    counts: dict[str, Counter[str]] = {}
    for question in train:
        counts.setdefault(question.answer_type, Counter())[normalise(question.answer)] += 1
    return {
        kind: min(of_kind, key=lambda answer: (-of_kind[answer], answer)) for kind, of_kind in counts.items()
    }


def score(
    questions: Sequence[Question], answers: Sequence[str], majority: Mapping[str, str]
) -> dict[str, Score]:
    """Score the answers of each kind of question.

    Args:
        questions: with the true answers.
        answers: as many, in the same order.
        majority: of the training questions, from `majority_answers`.

    Returns:
        `"open"` and `"closed"` → `Score`, in this order; a kind without questions is left out.

    Raises:
        ValueError: `questions` and `answers` differ in number.
    """
    if len(answers) != len(questions):
        raise ValueError(
            f"{len(questions)} questions and {len(answers)} answers; wanted equal numbers, in the same order."
        )
    scores: dict[str, Score] = {}
    for kind in ANSWER_TYPES:
        pairs = [
            (normalise(question.answer), normalise(answer))
            for question, answer in zip(questions, answers, strict=True)
            if question.answer_type == kind
        ]
        if pairs:
            commonest = majority.get(kind, "")
            correct = sum(truth == answer for truth, answer in pairs)
            scores[kind] = Score(
                len(pairs), correct, commonest, sum(truth == commonest for truth, _ in pairs)
            )
    return scores


def score_table(scores: Mapping[str, Score]) -> str:
    """The scores as a Markdown table; shares in per cent."""
    rows = ["| questions | n | exact match | majority answer | its exact match |", "|---|---|---|---|---|"]
    for kind, of_kind in scores.items():
        rows.append(
            f"| {kind} | {of_kind.n} | {of_kind.accuracy:.1%} | {of_kind.majority_answer or '–'} | "
            f"{of_kind.majority:.1%} |"
        )
    return "\n".join(rows) + "\n"
