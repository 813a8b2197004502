"""What the model waits for images: decoded in the training process, or ahead, by workers.

    python benchmarks/waiting.py --data DATA         # five repeats; eight minutes on 2 idle cores
    python benchmarks/waiting.py --data DATA --log   # the same, and adds what it found to LOG.md and results/

`DATA` is as in `packing.py`; without it, questions and images are made up. Stages as there, each in a process
of its own, over one epoch of steps that all differ, as workers get to see them:

- vqa: VQA-RAD's questions, about ten an image.
- align: captions, an image each: the most images for what the model has to do.

The model has one thread, and with one worker that one has another core: what a GPU with cores enough beside
it is like, where the model takes no core from the workers. It is small, so that decoding is no trifle beside
it. The first step is left out: nothing can be ready before it.

Left out: GPUs, disks that are slower than the page cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import packing
from packing_data import Drawer
from packing_runs import RUNS, SEED, Run
from workbench import heading, run_apart, spread, write_down

CONVERSATIONS = {"vqa": 64, "align": 16}  # of an optimizer step
WANTED = 0.01  # share of the time that the model waits, with workers


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder of vqa_rad/; left out: questions and images are made up"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="processes that decode ahead")
    parser.add_argument("--steps", type=int, default=8, help="of a run; nine of vqa are all that is made up")
    parser.add_argument("--repeats", type=int, default=5, help="of each run, in turn")
    parser.add_argument("--image_size", type=int, default=336, help="pixels; (image_size / 14)² image tokens")
    parser.add_argument("--width", type=int, default=128, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the language model")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    found: dict[str, dict[int, list[Run]]] = {
        work: {workers: [] for workers in options.workers} for work in CONVERSATIONS
    }
    with tempfile.TemporaryDirectory() as folder:
        drawer = Drawer(Path(folder), options.data, options.image_size * 4 // 3, SEED)
        parameters = packing.build_base(Path(folder), drawer.texts, options)
        for _ in range(options.repeats):
            for work, of_step in CONVERSATIONS.items():
                path, images = drawer.write(work, 0, of_step, options.steps)
                for workers, runs in found[work].items():
                    how = {"feature_cache": False, "workers": workers}
                    run = {
                        "side": "ours",
                        "how": how,
                        "steps": options.steps,
                        "epochs": 1,
                        "conversations": of_step,
                    }
                    places = {"folder": folder, "file": str(path), "images": str(images)}
                    runs.append(run_apart(str(RUNS), [json.dumps(run | places)], {"OMP_NUM_THREADS": "1"}))
                    share, speed = runs[-1]["waiting_share"], runs[-1]["per_second"]
                    told = f"{share:.1%} of the time waited, {speed:.2f} conversations/s"
                    print(f"{work}, {workers} worker(s): {told}", file=sys.stderr)
    result = {
        **heading("waiting"),
        "parameters": parameters,
        "settings": {key: value for key, value in vars(options).items() if key not in ("data", "log")},
        "real_data": options.data is not None,
        "runs": found,
    }
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, "-".join(CONVERSATIONS))


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    settings, rows, missed = result["settings"], [], []
    for work, by_workers in result["runs"].items():
        for workers, runs in by_workers.items():
            waiting, speed = (spread([run[what] for run in runs]) for what in ("waiting_share", "per_second"))
            shares = f"{waiting['median']:.1%} ({waiting['least']:.1%} to {waiting['most']:.1%})"
            rows.append(
                f"| {work} | {workers} | {shares} | {speed['median']:.2f} ({speed['least']:.2f} to "
                f"{speed['most']:.2f}) |"
            )
            missed += [f"{work} with {workers}"] if workers and waiting["median"] > WANTED else []
    return "\n".join(
        [
            f"## {result['date']} · waiting: what the model waits for images",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            f"- What: LLaVA of {result['parameters'] / 1e6:.1f} M parameters on one thread, "
            f"{(settings['image_size'] // 14) ** 2} image tokens, LoRA and projector, fp32, packed; "
            f"{'real' if result['real_data'] else 'made-up'} questions; {settings['steps']} steps, "
            f"{settings['repeats']} repeats",
            f"- Expected: with workers at most {WANTED:.0%} of the time",
            f"- Result: {'missed: ' + ', '.join(missed) if missed else 'as expected'}",
            "",
            "| work | workers | waiting, median (range) | conversations/s |",
            "|" + "---|" * 4,
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
