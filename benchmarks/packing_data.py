"""The conversations that `packing.py` and `packing_gpu.py` train on: one optimizer step's worth of each work,
as LLaVA JSON.

- vqa: a real step over VQA-RAD's training file, drawn image by image as a stage draws it (9.8 questions an
image).
- slake: the same over SLAKE's English training questions (10.9 an image), images drawn: its files have none.
- instruct: dialogues of 2.86 exchanges in the mean, as in LLaVA-Med's file of 60,000, each about an image of
its own.
- align: one caption each, about an image of its own; a quarter of the captions has fewer than 30 words, as in
PMC-15M.
- curve-k: k questions an image, questions and answers as in VQA-RAD, images drawn.

Dialogues and captions are words of the questions and answers drawn at random. They come in groups of sixteen
of nearly one
length, taken from a thousand: what length-grouped device batches are given in an epoch of that size, so that
a trainer that groups by length pads as little here as it would there.

Without a data folder, vqa and slake are made up after the same structure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CURVE = (1, 2, 5, 11, 20)  # questions an image
EXCHANGES = {2: 0.40, 3: 0.40, 4: 0.15, 5: 0.05}  # of a dialogue, 2.85 in the mean
PER_IMAGE = {"vqa": 9.8, "slake": 10.9}
GROUP, DRAWN = (16, 1024)  # conversations of about one length, and of how many they are taken
WORDS = (
    "left",
    "right",
    "upper",
    "lower",
    "lung",
    "lobe",
    "heart",
    "liver",
    "brain",
    "chest",
    "nodule",
    "mass",
    "normal",
    "fluid",
)

Rows = list[dict[str, Any]]


class Drawer:
    """Writes steps of a work, with the images that must be drawn.

    Args:
        folder: holds `images/` and a file a step.
        data: holds `vqa_rad/` and `slake/` as their authors release them; `None`: both are made up.
        image_size: pixels of the short side of a drawn image.
        seed: of everything drawn.
    """

    def __init__(self, folder: Path, data: Path | None, image_size: int, seed: int):
        self.folder, self.data, self.image_size, self.seed = (folder, data, image_size, seed)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        self.real = {name: self._questions(name) for name in ("vqa", "slake")}
        self.words = [
            word for row in self.real["vqa"] for word in f"{row['question']} {row['answer']}".split()
        ]

    @property
    def texts(self) -> list[str]:
        """Words to train a tokenizer on."""
        return [f"{row['question']} {row['answer']}" for name in self.real for row in self.real[name]]

    def write(self, work: str, step: int, conversations: int, steps: int = 1) -> tuple[Path, Path]:
        """Write the conversations of one step, or of several from it on.

        Returns:
            The file, and the folder that its images are relative to.
        """
        rows = [row for number in range(step, step + steps) for row in self.rows(work, number, conversations)]
        path = self.folder / f"{work}-{step}.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        real = work == "vqa" and self.data is not None
        return (path, self.data / "vqa_rad" / "images" if real else self.folder / "images")

    def rows(self, work: str, step: int, conversations: int) -> Rows:
        """The rows of that file: the step-th of an epoch, or drawn anew for each step."""
        if work in self.real:
            return self._step_of_questions(work, step, conversations)
        words = random.Random(f"{self.seed} {work} {step}")
        if work.startswith("curve-"):
            per_image = int(work.removeprefix("curve-"))
            asked = (
                words.sample(self.real["vqa"], conversations)
                if len(self.real["vqa"]) >= conversations
                else self.real["vqa"]
            )
            images = [
                self._draw(f"{work}-{step}-{number // per_image}.jpg", words)
                for number in range(conversations)
            ]
            return [
                _row(str(number), image, [(row["question"], row["answer"])])
                for number, (image, row) in enumerate(zip(images, asked, strict=True))
            ]
        say = self._caption if work == "align" else self._dialogue
        drawn = sorted((say(words) for _ in range(DRAWN)), key=_length)
        groups = max(1, conversations // GROUP)
        centres = [round((number + 0.5) / groups * DRAWN) for number in range(groups)]
        each = -(-conversations // groups)
        chosen = [drawn[centre - each // 2 + place] for centre in centres for place in range(each)][
            :conversations
        ]
        return [
            _row(str(i), self._draw(f"{work}-{step}-{i}.jpg", words), exchanges)
            for i, exchanges in enumerate(chosen)
        ]

    def _step_of_questions(self, work: str, step: int, conversations: int) -> Rows:
        from llavamed_peft.batches.steps import shuffled

        rows = self.real[work]
        names = {name: number for number, name in enumerate(dict.fromkeys(row["image"] for row in rows))}
        order = shuffled(np.array([names[row["image"]] for row in rows]), "images", self.seed, 0)
        chosen = [rows[i] for i in order[step * conversations : (step + 1) * conversations]]
        words = random.Random(self.seed)
        drawn = work != "vqa" or self.data is None
        return [
            _row(
                row["id"],
                self._draw(row["image"], words) if drawn else row["image"],
                [(row["question"], row["answer"])],
            )
            for row in chosen
        ]

    def _questions(self, work: str) -> list[dict[str, str]]:
        if self.data is None:
            return _made_up(work, self.seed)
        if work == "vqa":
            from llavamed_peft.datasets import vqa_rad

            questions = vqa_rad.read(self.data / "vqa_rad" / "trainset.json", split="train")
            return [
                {"id": one.id, "image": Path(one.image).name, "question": one.question, "answer": one.answer}
                for one in questions
            ]
        rows = json.loads((self.data / "slake" / "train.json").read_text(encoding="utf-8"))
        return [
            {
                "id": str(row["qid"]),
                "image": row["img_name"].replace("/", "-"),
                "question": row["question"],
                "answer": str(row["answer"]),
            }
            for row in rows
            if row["q_lang"] == "en" and str(row["answer"]).strip()
        ]

    def _dialogue(self, words: random.Random) -> list[tuple[str, str]]:
        (exchanges,) = words.choices(list(EXCHANGES), list(EXCHANGES.values()))
        return [(self._say(words, 12, 0.4), self._say(words, 35, 0.5)) for _ in range(exchanges)]

    def _caption(self, words: random.Random) -> list[tuple[str, str]]:
        return [("Describe this figure in detail.", self._say(words, 51, 0.8))]

    def _say(self, words: random.Random, median: float, sigma: float) -> str:
        """Words whose number is log-normal about the median."""
        number = min(max(round(median * words.lognormvariate(0, sigma)), 3), 300)
        return " ".join(words.choices(self.words, k=number))

    def _draw(self, name: str, words: random.Random) -> str:
        """A blurred JPEG that is not square and like no other; returns its name."""
        path = self.folder / "images" / name
        if not path.exists():
            noise = np.random.default_rng([ord(letter) for letter in name])
            small = Image.fromarray(noise.integers(0, 256, (24, 30), dtype=np.uint8))
            small.resize((self.image_size * 5 // 4, self.image_size), Image.Resampling.BICUBIC).convert(
                "RGB"
            ).save(path)
        return name


def dialogues(rows: Rows) -> Rows:
    """Questions about one image as the exchanges of one dialogue, which is another objective: later ones see
    earlier answers."""
    return [
        _row(
            image,
            image,
            [
                (_words(turns[0]["value"]), turns[1]["value"])
                for turns in (row["conversations"] for row in some)
            ],
        )
        for image, some in (
            (image, list(some)) for image, some in groupby(rows, key=lambda row: row["image"])
        )
    ]


def exchanges(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What is asked and said in a row, without the image's marker."""
    said = [_words(turn["value"]) for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def _row(name: str, image: str, exchanges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = [
        {"from": who, "value": words}
        for pair in exchanges
        for who, words in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": name, "image": image, "conversations": turns}


def _words(value: str) -> str:
    return value.removeprefix("<image>\n")


def _length(exchanges: Sequence[tuple[str, str]]) -> int:
    return sum(len(asked) + len(said) for asked, said in exchanges)


def _made_up(work: str, seed: int) -> list[dict[str, str]]:
    words = random.Random(f"{seed} {work}")
    rows = []
    for image in range(60):
        for _ in range(max(1, round(words.gauss(PER_IMAGE[work], 3)))):
            asked = f"Is there a {' '.join(words.choices(WORDS, k=words.randint(2, 6)))}?"
            rows.append(
                {
                    "id": str(len(rows)),
                    "image": f"{work}-{image}.jpg",
                    "question": asked,
                    "answer": words.choice(WORDS),
                }
            )
    return rows
