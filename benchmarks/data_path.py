"""The data path without a model: checking rows, starting on a checked index, decoding in workers, and the
memory of it all.

    python benchmarks/data_path.py          # 500,000 rows, three epochs: 40 minutes on 2 shared cores
    python benchmarks/data_path.py --log    # the same, and adds the results to LOG.md and results/
    python benchmarks/data_path.py --rows 2000 --epochs 2 --real_rows 200

Five parts, each in a process of its own, on files made for it (one image file per row; 500,000 take 2 GB for
the time being):

- build: `build_index` over tiny images with one exchange of words each, as in a set of captions.
- start: other processes, each with all its imports, open the same data, find the index and get their first
step from the workers.
- epochs: the workers of the training loader deal out whole epochs of the tiny images, packed. Memory is
sampled all the while.
- packed, padded: the same loader over JPEGs of 640×480 pixels with three exchanges each, prepared to 336×336,
in either layout.

Times of workers are CPU seconds of their processes, all threads counted, from the first step on, so other
work on the machine changes them little; rows per second and worker are rows by CPU second. The share spent on
images is the CPU time inside `load_image` and inside the image processor, which lays the pixels down in
shared memory; the rest is reading the row, token ids, padding, and handing tensors over. Memory is the
anonymous memory of the training process and its workers together, each page counted once (`Pss_Anon`), so
that a page which a worker copies by writing to it counts as growth; pages of the index, which the system may
drop at any time, and tensors on their way to the training process are not in it. The greatest size is
`VmHWM`, since a child inherits its parent's `ru_maxrss`. The first step is timed in wall seconds, the fastest
of three starts counts.

Left out: the model, several processes, cold disks (the files were just written, so they are in the page
cache), large images, images that several conversations are about.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_path_data import GLOBAL_BATCH, MAX_ROW_TOKENS, SEED, make_real, make_tiny
from data_path_report import Memory, log_entry, summarise
from workbench import write_down

PARTS = ("build", "start", "epochs", "packed", "padded")
STARTS = 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500_000, help="rows with tiny images")
    parser.add_argument("--epochs", type=int, default=3, help="epochs over them")
    parser.add_argument("--real_rows", type=int, default=4_000, help="rows with images of 640×480")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks at the memory")
    parser.add_argument(
        "--shared", action="store_true", help="say in the log that the machine did other work too"
    )
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    # One of them, in the process that measures it
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.part is not None:
        print(json.dumps({"build": build, "start": start}.get(options.part, worked)(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        make_tiny(options.folder / "tiny", options.rows)
        make_real(options.folder / "real", options.real_rows)
        parts = {"build": run_part(options, "build")}
        parts["start"] = min(
            (run_part(options, "start") for _ in range(STARTS)), key=lambda found: found["seconds"]
        )
        parts |= {part: run_part(options, part) for part in ("epochs", "packed", "padded")}
        megabytes = (options.folder / "tiny" / "index.arrow").stat().st_size / 1e6
    result = summarise(options, parts, megabytes)
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, f"rows-{options.rows}")


def run_part(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """One part in a process of its own, with its wall time from the outside: imports and all."""
    settings = ("rows", "epochs", "real_rows", "workers", "every", "folder")
    given = [word for name in settings for word in (f"--{name}", str(getattr(options, name)))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--part", part, *given],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"The part {part} failed with exit code {done.returncode}.")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


# The parts


def index_of(folder: Path, layout: str = "packed") -> tuple[Any, Any]:
    """The index of a folder's rows, built or found, and the collator: as `curriculum_finetune` makes them."""
    from llavamed_peft.batches.checking import build_index
    from llavamed_peft.datasets.rejects import RejectLog
    from llavamed_peft.datasets.sources import open_sources
    from llavamed_peft.modeling.load import read_config
    from llavamed_peft.modeling.processor import load_processor, make_stage_processor
    from llavamed_peft.packing.collator import PackedCollator
    from llavamed_peft.reporting.run_log import RunLog

    processor = make_stage_processor(load_processor(folder / "base", read_config(folder / "base")), "pad")
    collator = PackedCollator(processor, max_row_tokens=MAX_ROW_TOKENS, layout=layout)
    sources = open_sources(folder / "data.jsonl", None, "data")
    with RejectLog(folder / "rejected.jsonl") as rejects:
        return build_index(
            sources, collator, folder / "index.arrow", rejects, 0.0, RunLog(folder).show
        ), collator


def loader_of(batches: Any, workers: int) -> Any:
    """The training loader over an index."""
    from llavamed_peft.batches.loader import HANGS_AFTER, StepLoader
    from llavamed_peft.stages import Schedule

    schedule = Schedule(epochs=1, learning_rate=1, global_batch=GLOBAL_BATCH)
    sampler = batches.index.sampler(batches.collator, schedule, SEED)
    return StepLoader(
        batches,
        batch_sampler=sampler,
        collate_fn=as_it_is,
        num_workers=workers,
        prefetch_factor=1,
        timeout=HANGS_AFTER,
    )


def as_it_is(batches: Any) -> Any:
    return batches


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Check all rows; the wall and CPU seconds of that alone."""
    import llavamed_peft.training  # noqa: F401 - so that imports do not count

    began, cpu = time.monotonic(), time.process_time()
    index, _ = index_of(options.folder / "tiny")
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    assert len(index) == options.rows, f"{len(index)} of {options.rows} rows are in the index"
    peak = memory_of(os.getpid())["peak"]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": peak,
        "mean_tokens": float(index.column("length").mean()),
    }


def start(options: argparse.Namespace) -> dict[str, Any]:
    """From the start of the process to the first step out of the workers."""
    from llavamed_peft.batches.decoding import DeviceBatches
    from llavamed_peft.batches.workers import WorkerNotes

    imported = seconds_of_this_process()
    index, collator = index_of(options.folder / "tiny")
    found = seconds_of_this_process()
    steps = iter(loader_of(DeviceBatches(index, collator, WorkerNotes(options.workers)), options.workers))
    assert sum(batch.conversations for batch in next(steps)) == min(GLOBAL_BATCH, options.rows)
    seconds, cpu = seconds_of_this_process(), time.process_time()
    return {"imports": imported, "index": found - imported, "seconds": seconds, "cpu_seconds": cpu}


def seconds_of_this_process() -> float:
    """Seconds since this process was started, from /proc."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def worked(options: argparse.Namespace) -> dict[str, Any]:
    """Whole epochs through the workers: what they took, and the memory meanwhile."""
    tiny = options.part == "epochs"
    folder, count = (options.folder / ("tiny" if tiny else "real"), options.epochs if tiny else 1)
    index, collator = index_of(folder, "packed" if tiny else options.part)
    timed = timed_batches(index, collator, options.workers)
    loader = loader_of(timed, options.workers)
    taken, looks = [], []
    for epoch in range(count):
        loader.set_epoch(epoch)
        timed.sums.zero_()
        began, rows = time.monotonic(), 0
        with looking_at_memory(options.every) as seen:
            for step in loader:
                rows += sum(batch.conversations for batch in step)
                del step
        assert rows == len(index), f"{rows} of {len(index)} rows came out of the workers"
        on_images, cpu = (timed.sums[:, 0].tolist(), (timed.sums[:, 2] - timed.sums[:, 1]).tolist())
        taken.append(
            {
                "seconds": time.monotonic() - began,
                "worker_cpu_seconds": sum(cpu),
                "rows_per_worker_second": rows / sum(cpu),
                "share_on_images": sum(on_images) / sum(cpu),
                "on_images_us_per_row": sum(on_images) / rows * 1e6,
                "other_us_per_row": (sum(cpu) - sum(on_images)) / rows * 1e6,
            }
        )
        looks.append(seen)
    return {"rows": len(index), "epochs": taken, "memory": looks}


def timed_batches(index: Any, collator: Any, workers: int) -> Any:
    """The loader's data set, with a clock around what is done to images. Per worker: time on images, first
    and last CPU time."""
    import torch

    from llavamed_peft.batches.decoding import DeviceBatches
    from llavamed_peft.batches.workers import WorkerNotes
    from llavamed_peft.packing import collator as collation

    class Timed(DeviceBatches):
        def __init__(self) -> None:
            super().__init__(index, collator, WorkerNotes(workers))
            self.sums = torch.zeros((workers, 3), dtype=torch.float64).share_memory_()

        def __getitem__(self, rows: Sequence[int]) -> Any:
            mine = self.sums[torch.utils.data.get_worker_info().id]
            if mine[1] == 0:
                mine[1] = time.process_time()
            self.spent = 0.0
            made = super().__getitem__(rows)
            mine[0] += self.spent
            mine[2] = time.process_time()
            return made

        def clocked(self, work: Any) -> Any:
            def clocked(*arguments: Any) -> Any:
                began = time.thread_time()
                result = work(*arguments)
                self.spent += time.thread_time() - began
                return result

            return clocked

    timed = Timed()
    # In this process of the benchmark, and in its forked workers
    collation.load_image = timed.clocked(collation.load_image)
    collator.encoder.process_images = timed.clocked(collator.encoder.process_images)
    return timed


# Memory


def memory_of(pid: int) -> Memory:
    """MB of a process: its share of the anonymous memory, what of it is its own, and the greatest size that
    it had."""
    fields = {}
    for name in ("status", "smaps_rollup"):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            key, _, value = line.partition(":")
            if value.endswith(" kB"):
                fields[key] = int(value.split()[0]) / 1024
    return {"anonymous": fields["Pss_Anon"], "private": fields["Private_Dirty"], "peak": fields["VmHWM"]}


class looking_at_memory:
    """Samples this process and its workers every few seconds; gives a list of {seconds, parent, workers}."""

    def __init__(self, every: float):
        self.every = every
        self.seen: list[dict[str, Any]] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        began = time.monotonic()
        while not self.done.wait(self.every):
            workers = list(self._memories(process.pid for process in multiprocessing.active_children()))
            if workers:
                seconds = round(time.monotonic() - began, 1)
                self.seen.append({"seconds": seconds, "parent": memory_of(os.getpid()), "workers": workers})

    def _memories(self, pids: Iterator[int]) -> Iterator[Memory]:
        for pid in pids:
            try:
                yield memory_of(pid)
            except (OSError, KeyError):
                continue  # it has just ended

    def __enter__(self) -> list[dict[str, Any]]:
        self.thread.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


if __name__ == "__main__":
    main()
