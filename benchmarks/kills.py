"""Runs that are killed at random moments and resumed: do they end with the tensors of a run that was
left alone?

    python benchmarks/kills.py --kills 200          # an hour on 2 cores that did other work too
    python benchmarks/kills.py --kills 200 --log    # the same, and adds what it found to LOG.md and results/
    python benchmarks/kills.py --kills 20 --seed 7  # other moments; a seed gives the same ones again

Two curricula of two stages train on the demo's tiny LLaVA, each once without interruption: projector then
LoRA with dropout, and projector then full. Then calls are killed with SIGKILL and made again until they come
to their end. Half of the moments are drawn from the time a call takes. The other half are file operations in
the run's folder (an open for writing, a rename, a new folder, a removal), drawn from all that a call makes:
the process kills itself just before that one, so that checkpoints, stage folders and logs are hit in the
middle of their writing, which by the clock would be rare. After every kill, what is under a final name
must be whole. At its end a run must have the same tensors bit for bit, the same losses, the same counts, and
each unusable row listed once.

Calls are forked from a process that has imported everything, so that one takes seconds. What is left out:
several processes (`tests/test_interruptions.py`), GPUs, power failures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from workbench import heading, write_down

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "recipes" / "demo" / "tiny-llava"
KINDS = ("lora", "full")  # what the second stage trains
PRELOADED = [
    "llavamed_peft.curriculum",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
]
PRELOADED += [
    "transformers.models.llama.modeling_llama",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_data(place)
        hit, runs, calls = kill_often(
            place, {kind: measure(place, kind) for kind in KINDS}, options.kills, options.seed
        )
    result = {
        **heading("kills"),
        "kills": dict(hit),
        "runs": runs,
        "calls": calls,
        "seconds": round(time.monotonic() - began),
    }
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, f"seed-{options.seed}")


def write_data(place: Path) -> None:
    """Twelve rows about six images, one whose image breaks off in its pixels, and one that cannot be used."""
    from PIL import Image

    generator = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(6):
        color = tuple(generator.randrange(256) for _ in range(3))
        Image.new("RGB", (60 + 4 * number, 80), color).save(place / f"{number}.png")
    Image.effect_noise((90, 60), 50).save(place / "cut.png")
    (place / "cut.png").write_bytes((place / "cut.png").read_bytes()[:2000])
    for number in range(14):
        image = {12: "cut.png", 13: "missing.png"}.get(number, f"{number % 6}.png")
        answer = " ".join(["the left lung"] * (1 + number % 4))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": image, "conversations": turns})
    (place / "data.json").write_text(json.dumps(rows), encoding="utf-8")


def finetune(place: Path, out: Path, kind: str, **changes: Any) -> None:
    """The call that is killed and repeated: two stages, held-out losses, a checkpoint every 2 steps, half an
    epoch."""
    from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune

    first = Stage("align", "projector", Schedule(epochs=1.5, learning_rate=2e-3, global_batch=4))
    schedule = Schedule(
        epochs=2, learning_rate=1e-3, projector_learning_rate=1e-4, global_batch=4, shuffle="conversations"
    )
    lora = LoraSpec(rank=8, alpha=16, dropout=0.1) if kind == "lora" else None
    arguments = {
        "model": BASE,
        "data": {"align": place / "data.json", "vqa": place / "data.json"},
        "output_dir": out,
        "curriculum": Curriculum((first, Stage("vqa", kind, schedule, lora))),
        "eval_data": {"vqa": place / "data.json"},
        "max_rejected": 0.5,
        "eval_steps": 3,
        "save_steps": 2,
        "max_row_tokens": 100,
    }
    curriculum_finetune(**{**arguments, **changes})


def start(
    place: Path, out: Path, kind: str, before: Callable[..., object] | None = None, *how: Any, **changes: Any
) -> BaseProcess:
    """Make the call in a process of its own, forked from one that has imported everything; its output is
    `<out>.log`.

    Args:
        before: called with `how` in that process before the call, such as `kill_at_operation`.
        changes: of the call's arguments.
    """
    process = context().Process(target=_call, args=(place, out, kind, before, how, changes))
    process.start()
    return process


def context() -> multiprocessing.context.ForkServerContext:
    """Processes of it are forked from one that has imported everything."""
    # of threads one, since a fork while others work would leave their locks held for ever
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    return forks


def _call(
    place: Path, out: Path, kind: str, before: Callable[..., object] | None, how: Any, changes: dict[str, Any]
) -> None:
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    # Data-loader workers, as in a process that nobody forked
    multiprocessing.set_start_method("fork", force=True)
    # or the trainer's collections would go through, and so copy, all that was imported before the fork
    gc.freeze()
    if before is not None:
        before(*how)
    finetune(place, out, kind, **changes)


def operations(out: Path, then: Callable[[int], object]) -> None:
    """Call `then` with a running number before each operation that changes a file in the run's folder."""
    inside, number = f"{out}/", 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            return
        if isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(inside):
            number += 1
            then(number)

    sys.addaudithook(watch)


def kill_at_operation(out: Path, moment: int) -> None:
    """Let this process die just before one of its file operations."""
    operations(out, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == moment else None)


def count_operations(out: Path, total: Path) -> None:
    """Keep the number of this process's file operations in a file."""
    operations(out, lambda number: total.write_text(str(number)))


def measure(place: Path, kind: str) -> tuple[float, int]:
    """Seconds and file operations of a call that is left alone; its folder `<place>/<kind>` stays."""
    out, total = place / kind, place / "operations"
    finish(start(place, out, kind, sys.exit), out)  # where nothing is imported yet, this waits for it
    began = time.monotonic()
    finish(start(place, out, kind, count_operations, out, total), out)
    return time.monotonic() - began, int(total.read_text())


def finish(process: BaseProcess, out: Path) -> None:
    """Wait for a call that should succeed."""
    process.join(300)
    if process.exitcode != 0:
        raise RuntimeError(
            f"exit code {process.exitcode}: {Path(f'{out}.log').read_text(encoding='utf-8')[-3000:]}"
        )


def kill_often(
    place: Path, undisturbed: dict[str, tuple[float, int]], kills: int, seed: int
) -> tuple[Counter[str], int, int]:
    """Kill calls until so many were killed, and let every run come to its end as if none had been.

    Args:
        undisturbed: what `measure` found, by kind.

    Returns:
        What the kills hit, how many runs there were, and how many calls.
    """
    generator, hit, runs, calls = random.Random(seed), Counter[str](), 0, 0
    while hit.total() < kills:
        kind = list(undisturbed)[runs % len(undisturbed)]
        out = place / f"{kind}-{seed}-{runs}"
        finished = False
        while not finished:
            share = generator.random() if hit.total() < kills else None  # then it is left alone
            moment, process = call(
                place, out, kind, undisturbed[kind], share, by_the_clock=generator.random() < 0.5
            )
            calls += 1
            finished = process.exitcode == 0
            if not finished:
                if process.exitcode != -signal.SIGKILL:
                    finish(process, out)
                what = what_was_hit(out)
                hit[what] += 1
                print(f"kill {hit.total()}, seed {seed}, {out.name}: {moment}, {what}", file=sys.stderr)
                check_whole(out)
        runs += 1
        check_same(place / kind, out)
    return hit, runs, calls


def call(
    place: Path, out: Path, kind: str, undisturbed: tuple[float, int], share: float | None, by_the_clock: bool
) -> tuple[str, BaseProcess]:
    """Make the call and kill it when this share of its time or of its file operations is over, if it lasts so
    long."""
    seconds, operations = undisturbed
    if share is None:
        moment, process = "left alone", start(place, out, kind)
    elif by_the_clock:
        moment, process = f"after {share * seconds:.2f} s", start(place, out, kind)
        process.join(share * seconds)
        if process.exitcode is None:
            process.kill()
    else:
        number = round(share * operations)
        moment, process = (
            f"at file operation {number}",
            start(place, out, kind, kill_at_operation, out, number),
        )
    process.join(300)
    return moment, process


def what_was_hit(out: Path) -> str:
    """What a killed call was about, from what it left."""
    if not (out / "run.json").exists():
        return "before training"
    if any(out.glob("checkpoints/*/.*.partial")):
        return "writing or removing a checkpoint"
    if any(out.glob(".*.partial")):
        return "writing a stage's folder or a log"
    if any(path.name.startswith(".") or (out / path.name).exists() for path in out.glob("checkpoints/*")):
        return "after a stage"
    return "training, evaluating or loading"


def check_whole(out: Path) -> None:
    """What has a final name is whole: stages and checkpoints."""
    from llavamed_peft.adapters.stage_adapter import StageAdapter
    from llavamed_peft.training.checkpoints import fault

    for stage in out.glob("[!.]*/stage.json"):
        StageAdapter.load(stage.parent)
    for checkpoint in out.glob("checkpoints/[!.]*/step-*"):
        if found := fault(checkpoint):
            raise AssertionError(found)


def check_same(undisturbed: Path, out: Path) -> None:
    """Two finished runs agree in everything but the time they took."""
    from llavamed_peft.adapters.stage_adapter import StageAdapter

    left = {path.name for path in out.iterdir()}
    assert left == {path.name for path in undisturbed.iterdir()}, left
    for stage in ("align", "vqa"):
        one, other = (StageAdapter.load(undisturbed / stage), StageAdapter.load(out / stage))
        assert one.record.sha256 == other.record.sha256, f"{out}: {stage} has other tensors"
        assert without_clock(one.metrics) == without_clock(other.metrics), (one.metrics, other.metrics)
        assert one.record.data == other.record.data
    for name in ("metrics.jsonl", "rejected.jsonl"):
        texts = [(run / name).read_text(encoding="utf-8").splitlines() for run in (undisturbed, out)]
        one, other = ([without_clock(json.loads(line)) for line in text] for text in texts)
        assert one == other, f"{out / name} differs"


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    """What is the same after an interruption: not by the clock."""
    return {key: value for key, value in record.items() if "second" not in key and key != "waiting_share"}


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    hit = ", ".join(f"{what} {count}" for what, count in sorted(result["kills"].items()))
    return "\n".join(
        [
            f"## {result['date']} · kills: runs killed at random moments and resumed",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`, {result['seconds']} s",
            "- What: two curricula of two stages on the demo's tiny LLaVA (projector then LoRA with dropout "
            ".1; projector then full), fp32, a checkpoint every 2 steps, held-out losses every 3",
            "- Expected: every run ends as the one that was left alone: tensors bit for bit, losses, counts, "
            "rejected rows",
            f"- Result: as expected. {sum(result['kills'].values())} kills ({hit}), {result['calls']} calls, "
            f"{result['runs']} runs that came to their end, none differing",
            "",
        ]
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
