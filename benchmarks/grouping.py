"""Do scores suffer from drawing an image's conversations together, which is what makes packed batches cheap?

    python benchmarks/grouping.py --vqa_rad vqa_rad_public.json --image_folder images/    # an hour on 2 cores
    python benchmarks/grouping.py --vqa_rad vqa_rad_public.json --image_folder images/ --log
    python benchmarks/grouping.py --works demo --seeds 3 4

`Schedule.shuffle="images"`, the default, draws image by image; `"conversations"` is the paper's plain
shuffling. What differs is the order of the data, hence which questions share a step and how noisy its
gradient is. Two works, each trained with both, from the same beginning, over several seeds:

- demo: the vqa stage of `make demo` after its instruct stage. A seed draws another clinic, orders its rows
otherwise and begins
  LoRA elsewhere. 600 held-out questions are answered.
- vqa_rad: `recipes/configs/tiny-vqa-rad.yaml`, three epochs of VQA-RAD's 1,797 training questions on the
demo's base, which is
  far too small for it: its 451 held-out answers are scored beside the loss, and the loss says more.

Only results are compared here; what grouping saves is measured by `packing.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path += [str(HERE), str(ROOT / "recipes" / "demo")]

from workbench import heading, write_down  # noqa: E402

SHUFFLES = ("images", "conversations")
WORKS = ("demo", "vqa_rad")
SCORES = ("closed", "open", "held_out_loss")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--vqa_rad", type=Path, help="the original release's vqa_rad_public.json")
    parser.add_argument("--image_folder", type=Path, help="VQA-RAD's images")
    parser.add_argument("--epochs", type=float, help="of the stage that is compared; default: 3")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    options = parser.parse_args(arguments)
    if "vqa_rad" in options.works and options.vqa_rad is None:
        parser.error("vqa_rad needs --vqa_rad FILE (and --image_folder); or take --works demo")
    return options


def main() -> None:
    options = parse()
    found: list[dict[str, Any]] = []
    for work in options.works:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                found += {"demo": demo, "vqa_rad": vqa_rad}[work](options, seed, Path(folder))
            print(json.dumps(found[-2:]), file=sys.stderr)
    result = {**heading("grouping"), "found": found}
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, f"seeds-{len(options.seeds)}")


def demo(options: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The demo's vqa stage, trained with either shuffle after the same two stages."""
    from demo import BASE, QUESTIONS, exact_match, read_questions
    from demo import HERE as DEMO
    from scenes import write_dataset

    from llavamed_peft import Curriculum, curriculum_finetune, load_stage
    from llavamed_peft.evaluation.answer import answer_questions

    files = write_dataset(folder / "data", seed)
    curriculum = replace(Curriculum.from_yaml(DEMO / "curriculum.yaml"), seed=seed)
    *before, vqa = curriculum.stages
    data = {stage.name: files[stage.name] for stage in before}
    parent = curriculum_finetune(
        BASE, data, folder / "before", curriculum=replace(curriculum, stages=tuple(before))
    )["instruct"]
    questions = read_questions(files["vqa_heldout"])[:QUESTIONS]
    found = []
    for shuffle in SHUFFLES:
        schedule = replace(vqa.schedule, shuffle=shuffle, epochs=options.epochs or vqa.schedule.epochs)
        adapter = curriculum_finetune(
            BASE,
            {"vqa": files["vqa"]},
            folder / shuffle,
            curriculum=replace(curriculum, stages=(replace(vqa, schedule=schedule),)),
            eval_data={"vqa": files["vqa_heldout"]},
            start_from=parent,
            eval_steps=10_000,  # before and after
        )["vqa"]
        model, processor = load_stage(BASE, adapter)
        closed, open_ = exact_match(
            questions, answer_questions(model, processor, questions, max_new_tokens=8, batch_size=64)
        )
        scores = (closed, open_, adapter.metrics["eval_loss_after"])
        found.append(
            {"work": "demo", "seed": seed, "shuffle": shuffle, **dict(zip(SCORES, scores, strict=True))}
        )
    return found


def vqa_rad(options: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    """VQA-RAD on the demo's base, trained with either shuffle."""
    from demo import BASE, exact_match

    from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune, load_stage
    from llavamed_peft.datasets import vqa_rad
    from llavamed_peft.datasets.sources import question_source
    from llavamed_peft.evaluation.answer import answer_questions

    train, test = (
        question_source(vqa_rad.read, options.vqa_rad, options.image_folder, split)
        for split in ("train", "test")
    )
    questions = list(vqa_rad.read(options.vqa_rad, options.image_folder, "test"))
    found = []
    for shuffle in SHUFFLES:
        schedule = Schedule(epochs=options.epochs or 3, learning_rate=2e-3, global_batch=32, shuffle=shuffle)
        adapter = curriculum_finetune(
            BASE,
            {"vqa": train},
            folder / shuffle,
            curriculum=Curriculum((Stage("vqa", "lora", schedule, LoraSpec(16, 32, 0.0)),), seed),
            eval_data={"vqa": test},
            eval_steps=10_000,
        )["vqa"]
        model, processor = load_stage(BASE, adapter)
        closed, open_ = exact_match(
            questions, answer_questions(model, processor, questions, max_new_tokens=24, batch_size=32)
        )
        loss = adapter.metrics["eval_loss_after"]
        found.append(
            {
                "work": "vqa_rad",
                "seed": seed,
                "shuffle": shuffle,
                "closed": closed,
                "open": open_,
                "held_out_loss": loss,
            }
        )
    return found


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    found = result["found"]
    rows, differences = [], []
    for work in dict.fromkeys(one["work"] for one in found):
        of_work = [one for one in found if one["work"] == work]
        pairs = list(zip(of_work[::2], of_work[1::2], strict=True))
        for pair in pairs:
            cells = [f"{one[score]:.3f}" for score in SCORES for one in pair]
            rows.append(f"| {work} | {pair[0]['seed']} | {' | '.join(cells)} |")
        means = {
            score: statistics.mean(one[score] - other[score] for one, other in pairs) for score in SCORES
        }
        differences.append(
            f"{work}: " + ", ".join(f"{score.replace('_', '-')} {mean:+.3f}" for score, mean in means.items())
        )
    heads = [f"{score.replace('_', '-')}, {shuffle}" for score in SCORES for shuffle in SHUFFLES]
    return "\n".join(
        [
            f"## {result['date']} · grouping: an image's conversations drawn together, or one by one",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            '- What: the same stage from the same beginning with `shuffle="images"` and `"conversations"`, '
            "packed, fp32",
            "- Expected: drawn by images, exact match at most .02 lower in the mean, held-out loss at most "
            ".05 higher",
            f"- Result: images minus conversations, mean over the seeds. {'; '.join(differences)}",
            "",
            f"| work | seed | {' | '.join(heads)} |",
            "|---" * (2 + len(heads)) + "|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
