"""The whole curriculum on a laptop: draw a clinic, train three stages on the tiny base, ask each of them,
show what changed.

    make demo
    make demo-seeds                    three seeds: three clinics, three orders, three first values of LoRA
    python recipes/demo/demo.py --output_dir runs/demo

Training is `curriculum_finetune` as anyone calls it, on files in the formats anyone has; the base is
`recipes/demo/tiny-llava` (1.6 M parameters, built by `build_base.py`, which has seen coloured shapes and read
the clinic's sentences, but never seen one of its images). Prints a table and saves it with a picture of
held-out images and every stage's answers. Fails where a stage did not learn what it should (`BOUNDS`).

This shows that the machinery works, and nothing about medicine: the images are drawings, their world has a
few hundred sentences, and captions recur between training and held-out images (the images do not).
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Notes of the libraries to programmers: kernels for a 4-bit model on a CPU, names that go away in a later
# version.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)
# Of the demo's own held-out files: the demo scores with this key, nothing is trained on it.
warnings.filterwarnings("ignore", message=".*keys that are not read: 'answer_type'")

import torch
from peft import PeftModel
from scenes import write_dataset
from transformers import ProcessorMixin
from transformers.utils.logging import disable_progress_bar

from llavamed_peft import Curriculum, Question, StageAdapter, curriculum_finetune
from llavamed_peft.datasets import llava_json
from llavamed_peft.errors import ConfigError, LlavaMedError
from llavamed_peft.evaluation.answer import answer_questions
from llavamed_peft.evaluation.exact_match import normalise, score
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.processor import load_processor
from llavamed_peft.packing import PackedCollator
from llavamed_peft.packing.collator import LAYOUTS
from llavamed_peft.running.summary import plot_losses, read_metrics

HERE = Path(__file__).parent
BASE = HERE / "tiny-llava"
# Held-out exact match that the last stage must reach, and by how much it must beat itself on other images'
# pixels.
BOUNDS = {"closed": 0.85, "open": 0.85, "closed above shuffled": 0.30, "open above shuffled": 0.40}
BASE_CLOSED_AT_MOST = 0.60
LEFT = r"data|stages|table\.md|answers\.png|seeds\.md|seed-\d+"  # in the output folder
QUESTIONS = 600  # held-out questions asked of every stage, and as many about general scenes


@dataclass(frozen=True, slots=True)
class Exam:
    """What one stage can do: exact match of its answers, and losses per supervised token."""

    answers: list[str]
    closed: float
    open: float
    caption_loss: float
    dialogue_loss: float
    general_closed: float
    general_open: float


@dataclass(frozen=True, slots=True)
class Demo:
    """One seed's run: every stage's exam and what it took."""

    exams: dict[str, Exam]
    training_seconds: float
    asking_seconds: float


def main() -> int:
    """Draw, train, ask, show, for each seed; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/demo"),
        help="emptied of an earlier demo first; default runs/demo",
    )
    parser.add_argument(
        "--curriculum", type=Path, default=HERE / "curriculum.yaml", help="default: the demo's"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="of the clinic drawn, the order of its rows, LoRA; default 0",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of batches; default %(default)s"
    )
    arguments = parser.parse_args()
    curriculum = Curriculum.from_yaml(arguments.curriculum)
    curricula = {seed: replace(curriculum, seed=seed) for seed in arguments.seeds}
    empty(arguments.output_dir)
    several = len(curricula) > 1
    folders = {
        seed: arguments.output_dir / f"seed-{seed}" if several else arguments.output_dir for seed in curricula
    }
    demos = {seed: run(curriculum, folders[seed], arguments.layout) for seed, curriculum in curricula.items()}
    if several:
        table = seeds_table(demos)
        (arguments.output_dir / "seeds.md").write_text(table, encoding="utf-8")
        print(table)
    missed = [f"seed {seed}: {bound}" for seed, demo in demos.items() for bound in missed_bounds(demo.exams)]
    print("\n".join(f"MISSED: {bound}" for bound in missed), file=sys.stderr)
    return 1 if missed else 0


def empty(folder: Path) -> None:
    """Remove what an earlier demo left in the folder; if something else is in it, nothing is removed."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; wanted a folder.")
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    if foreign := [path.name for path in there if not re.fullmatch(LEFT, path.name)]:
        raise ConfigError(
            f"output_dir {folder} holds {', '.join(foreign[:3])}, which no demo left; wanted another folder."
        )
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(curriculum: Curriculum, folder: Path, layout: str) -> Demo:
    """The whole demo on one clinic, with its table and picture in `folder`."""
    began = time.monotonic()
    print(f"Drawing the clinic into {folder / 'data'} ...", flush=True)
    files = write_dataset(folder / "data", curriculum.seed)
    disable_progress_bar()
    adapters = curriculum_finetune(
        BASE,
        data={stage.name: files[stage.name] for stage in curriculum.stages},
        eval_data={stage.name: files[f"{stage.name}_heldout"] for stage in curriculum.stages},
        output_dir=folder / "stages",
        curriculum=curriculum,
        layout=layout,
        eval_steps=10_000,  # before and after
        dtype="float32",  # also where there is a GPU: the bounds were found in it
    )
    trained = time.monotonic()
    print(
        f"Asking {QUESTIONS} held-out questions of the base and of each stage, swapped on one model ...",
        flush=True,
    )
    questions = read_questions(files["vqa_heldout"])[:QUESTIONS]
    exams = examine(adapters, questions, files)
    demo = Demo(exams, trained - began, time.monotonic() - trained)
    table = exam_table(exams)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw(questions, exams, read_metrics(folder / "stages"), folder / "answers.png")
    print(f"\n{table}")
    print(
        f"Training took {demo.training_seconds:.0f} s, asking {demo.asking_seconds:.0f} s. Closed questions "
        "come in pairs of"
    )
    print(
        "opposite answers: guessing scores .50. 'shuffled' is the last stage shown other images. General "
        "scenes are what the"
    )
    print(
        "base came with: the curriculum forgets some of them. The images are drawings and the base had read "
        "the clinic's"
    )
    print("sentences: nothing here says anything about medicine.")
    print(f"Stages: {folder}/stages/  Picture: {folder}/answers.png\n")
    return demo


def read_questions(path: Path) -> list[Question]:
    """The held-out questions: LLaVA JSON whose rows also say which are open and which closed."""
    kinds = [row["answer_type"] for row in json.loads(path.read_text(encoding="utf-8"))]
    asked = [
        Question(
            c.id, c.images[0], c.turns[0].text.removeprefix("<image>"), c.turns[1].text, kind, source=c.source
        )
        for c, kind in zip(llava_json.read(path), kinds, strict=True)
    ]
    step = max(1, len(asked) // QUESTIONS)  # spread over the images
    return asked[::step]


def examine(
    adapters: Mapping[str, StageAdapter], questions: Sequence[Question], files: Mapping[str, Path]
) -> dict[str, Exam]:
    """Every stage's exam, on one base: stock PEFT loads the folders and swaps them."""
    model, processor = load_checkpoint(BASE)
    exams = {"base": take_exam(model, processor, questions, files)}
    peft_model: PeftModel | None = None
    for name, adapter in adapters.items():
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, adapter.path, adapter_name=name)
        else:
            peft_model.load_adapter(str(adapter.path), adapter_name=name)
            peft_model.set_adapter(name)
        processor = load_processor(adapter.path, model.config)
        exams[name] = take_exam(peft_model.eval(), processor, questions, files)
    assert peft_model is not None
    others = [*questions[len(questions) // 2 :], *questions[: len(questions) // 2]]
    shuffled = [
        replace(question, image=other.image) for question, other in zip(questions, others, strict=True)
    ]
    exams["shuffled"] = take_exam(peft_model, processor, shuffled, None)
    return exams


def take_exam(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    files: Mapping[str, Path] | None,
) -> Exam:
    """Ask the questions and, given the files, measure the losses and what is left of the general scenes."""
    answers = answer_questions(model, processor, questions, max_new_tokens=8, batch_size=64)
    closed, open_ = exact_match(questions, answers)
    nothing = float("nan")
    if files is None:
        return Exam(answers, closed, open_, nothing, nothing, nothing, nothing)
    general = read_questions(files["general_heldout"])[:QUESTIONS]
    general_closed, general_open = exact_match(general, answer_questions(model, processor, general, 8, 64))
    losses = [held_out_loss(model, processor, files[f"{name}_heldout"]) for name in ("align", "instruct")]
    return Exam(answers, closed, open_, *losses, general_closed, general_open)


def exact_match(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, float]:
    """Share of closed and of open questions answered with the truth's words."""
    scores = score(questions, answers, {})
    return scores["closed"].accuracy, scores["open"].accuracy


def held_out_loss(model: torch.nn.Module, processor: ProcessorMixin, path: Path) -> float:
    """Mean cross-entropy over the supervised tokens of a file."""
    collator, conversations = (PackedCollator(processor, layout="padded"), list(llava_json.read(path)))
    total = tokens = 0.0
    with torch.no_grad():
        for begin in range(0, len(conversations), 50):
            batch = collator(conversations[begin : begin + 50])
            supervised = int((batch["labels"][:, 1:] != -100).sum())
            total += model(**batch).loss.item() * supervised
            tokens += supervised
    return total / tokens


def exam_table(exams: Mapping[str, Exam]) -> str:
    """All exams, one row each."""
    rows = [
        "| after | closed | open | caption loss | dialogue loss | general scenes: closed | open |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, exam in exams.items():
        numbers = (
            exam.closed,
            exam.open,
            exam.caption_loss,
            exam.dialogue_loss,
            exam.general_closed,
            exam.general_open,
        )
        rows.append(f"| {name} | " + " | ".join("–" if n != n else f"{n:.3f}" for n in numbers) + " |")
    return "\n".join(rows) + "\n"


def seeds_table(demos: Mapping[int, Demo]) -> str:
    """What the bounds are about, one row each seed."""
    columns = (
        "seed",
        "base closed",
        "closed",
        "open",
        "shuffled closed",
        "open",
        "caption loss",
        "dialogue loss",
        "training s",
        "asking s",
    )
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for seed, demo in demos.items():
        base, align, instruct, vqa, shuffled = demo.exams.values()
        numbers = (base.closed, vqa.closed, vqa.open, shuffled.closed, shuffled.open)
        losses = ((base.caption_loss, align.caption_loss), (align.dialogue_loss, instruct.dialogue_loss))
        cells = [
            str(seed),
            *(f"{number:.3f}" for number in numbers),
            *(f"{before:.3f} → {after:.3f}" for before, after in losses),
            f"{demo.training_seconds:.0f}",
            f"{demo.asking_seconds:.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(
    questions: Sequence[Question], exams: Mapping[str, Exam], losses: Sequence[dict[str, object]], path: Path
) -> None:
    """Six held-out images with a question, the truth and every stage's answer, and below them each stage's
    losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(12, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(7, 3))
    for panel, number in zip(above.subplots(2, 3).flat, shown(questions), strict=True):
        question = questions[number]
        with Image.open(question.image) as image:
            panel.imshow(image)
        panel.set_axis_off()
        panel.set_title(f"{question.question}\ntruth: {question.answer}", fontsize=11, loc="left")
        for line, name in enumerate(name for name in exams if name != "shuffled"):
            answer = exams[name].answers[number]
            right = normalise(answer) == normalise(question.answer)
            panel.text(
                1.03,
                0.95 - 0.12 * line,
                f"{name}: {answer[:28]}",
                color="tab:green" if right else "tab:red",
                transform=panel.transAxes,
                va="top",
            )
    above.suptitle("held-out images: green answers are right, red ones wrong", fontsize=11)
    plot_losses(below.subplots(1, 3), losses)
    figure.savefig(path, dpi=110)


def shown(questions: Sequence[Question]) -> list[int]:
    """Six different questions from all over the held-out images, open and closed in turn."""
    chosen: list[int] = []
    for panel in range(6):
        asked = {questions[number].question for number in chosen}
        rest = range(len(questions) * panel // 6, len(questions))
        kind = ("open", "closed")[panel % 2]
        chosen.append(
            next(n for n in rest if questions[n].answer_type == kind and questions[n].question not in asked)
        )
    return chosen


def missed_bounds(exams: Mapping[str, Exam]) -> list[str]:
    """What the curriculum should have taught and did not."""
    base, align, instruct, vqa, shuffled = (
        exams[name] for name in ("base", "align", "instruct", "vqa", "shuffled")
    )
    reached = {
        "closed": vqa.closed,
        "open": vqa.open,
        "closed above shuffled": vqa.closed - shuffled.closed,
        "open above shuffled": vqa.open - shuffled.open,
    }
    missed = [
        f"{name} is {reached[name]:.3f}; wanted {bound} or more"
        for name, bound in BOUNDS.items()
        if reached[name] < bound
    ]
    if base.closed > BASE_CLOSED_AT_MOST:
        missed.append(f"the base's closed is {base.closed:.3f}; wanted {BASE_CLOSED_AT_MOST} at most")
    for what, after, before in (
        ("align's caption loss", align.caption_loss, base.caption_loss),
        ("instruct's dialogue loss", instruct.dialogue_loss, align.dialogue_loss),
    ):
        if after >= before:
            missed.append(f"{what} is {after:.3f}; wanted less than the stage's before it, {before:.3f}")
    return missed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlavaMedError as error:
        sys.exit(f"{type(error).__name__}: {error}")
