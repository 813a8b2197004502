"""Packed training beside TRL's `SFTTrainer` at its best settings: questions per second and memory of whole processes.

    python benchmarks/packing.py --data data/                     # data/vqa_rad and data/slake, as their authors release them
    python benchmarks/packing.py --data data/ --log               # the same, and adds what it found to LOG.md and results/
    python benchmarks/packing.py --data data/ --works vqa curve --pairs 1

Both sides train the same LoRA and projector of the same LLaVA (random weights; 336 pixels, 576 image tokens, 32,064 tokens to
choose from) in fp32, without gradient checkpointing, on the same conversations in steps of the same size. What the works are is
in `packing_data.py`. A run is a process of its own whose optimizer steps take every conversation there is, so that both sides
must find the same first loss, which is checked. The first step warms up and does not count; speed is conversations per second
of wall time of the others, memory the process's greatest resident size. Pairs follow one another directly, in alternating
order.

- ours: `curriculum_finetune` as a user calls it, with its defaults on a CPU, `feature_cache=False` but in `vqa-cached`. There
  it is True: the features are stored before the first step, so every step is what a later epoch is.
- best: `SFTTrainer`, prompt and completion apart (loss on answers alone), batches grouped by length, the device batch that is
  fastest in a run of its own before the pairs, images decoded while training (on 2 cores a worker would take what the model
  needs).
- defaults: `SFTConfig()` as it comes, device batch 8, conversations as messages: loss on every word.
- dialogue: best, with all questions of an image as the exchanges of one dialogue. Another objective (a later question sees the
  answers before it), so it is shown beside the table and compared with nothing.

Useful are positions that are neither padding nor a beginning laid down twice. The bound of the curve is a ratio of FLOPs: of a
frozen weight 4 for each position that passes it (forward, and backward for what lies before it), 2 in the tower, which has no
backward pass, 6 in the projector, which is trained; TRL computes logits of every position, a stage of the supervised ones.
Attention itself and LoRA are left out of it, so it is about, not exactly, what can be had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packing_data import CURVE, Drawer, dialogues, exchanges
from workbench import (
    SPECIAL,
    heading,
    llava_config,
    make_processor,
    run_apart,
    spread,
    train_tokenizer,
    write_checkpoint,
    write_down,
)

RANK, ALPHA, RATE, SEED = 16, 32, 2e-4, 42
TARGETS = r"model\.language_model\..*_proj"
SAME_LOSS = 1e-3  # relative; the sides sum in another order, and TRL rounds what it logs
DEVICE_BATCHES = (1, 2, 4, 8)
MAX_ROW_TOKENS = 4096
# work → conversations of a step; wanted: times the best's speed, times the defaults', share of the best's memory
WORKS = {
    "vqa": (64, 8.0, None, 1 / 3),
    "vqa-cached": (64, 10.0, None, None),
    "slake": (64, 8.0, None, None),
    "instruct": (16, 1.15, 1.3, None),
    "align": (16, 1.0, 1.25, None),
    "curve": (20, None, None, None),
}
WANTED_USEFUL = 0.97


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds vqa_rad/ and slake/; default: both are made up after their structure")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="default: all")
    parser.add_argument("--pairs", type=int, default=5, help="repeats (curve: one); default 5")
    parser.add_argument("--conversations", type=int, help="of a step, instead of each work's own")
    parser.add_argument("--steps", type=int, nargs=2, default=[3, 2], help="of a run, ours and TRL's; the first of each warms up")
    parser.add_argument("--image_size", type=int, default=336, help="pixels; (image_size / 14)² image tokens")
    parser.add_argument("--width", type=int, default=512, help="of the language model")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--vocabulary", type=int, default=32_064, help="tokens to choose from")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)  # one run, in the process that measures it
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.run is not None:
        print(json.dumps({"ours": run_ours, "trl": run_trl}[options.run["side"]](options.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        works = {work: bench.curve() if work == "curve" else bench.measure(work) for work in options.works}
    named = ("pairs", "conversations", "steps", "image_size", "width", "layers", "vocabulary")
    settings = {name: getattr(options, name) for name in named}
    result = {**heading("packing"), "settings": settings, "parameters": bench.parameters, "works": works}
    entry = log_entry(result)
    print(entry)
    if options.log:
        path = write_down(result, entry, "-".join(options.works) if len(options.works) < len(WORKS) else "all")
        if "curve" in works:
            draw_curve(works["curve"], path.with_suffix(".png"))


class Bench:
    """Runs of both sides on one checkpoint.

    Args:
        options: of the command.
        folder: for the checkpoint and the data.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        data = None if options.data is None else options.data.resolve()
        self.drawer = Drawer(folder, data, options.image_size * 10 // 7, SEED)
        sizes = (options.image_size, options.vocabulary, options.width, options.layers)
        self.parameters = build_base(folder, self.drawer.texts, *sizes)
        self.fastest: dict[str, int] = {}

    def measure(self, work: str) -> dict[str, Any]:
        """Pairs of runs on one work."""
        data, how = work.removesuffix("-cached"), {"feature_cache": work.endswith("-cached")}
        conversations, *wanted = WORKS[work]
        conversations = self.options.conversations or conversations
        arms: dict[str, dict[str, Any]] = {"ours": how, "best": self.best_of_trl(data)}
        if wanted[1] is not None:
            arms["defaults"] = {"form": "defaults", "device_batch": 8}
        pairs = []
        for number in range(self.options.pairs):
            order = list(arms) if number % 2 == 0 else list(arms)[::-1]
            pair = {arm: self.run(arm, data, conversations, arms[arm]) for arm in order}
            check_same(pair)
            pairs.append(pair)
            speeds = ", ".join(f"{arm} {pair[arm]['per_second']:.2f}" for arm in arms)
            print(f"{work}, pair {number + 1}/{self.options.pairs}: {speeds} conversations/s", file=sys.stderr, flush=True)
        found = {
            "conversations": conversations,
            "device_batch": arms["best"]["device_batch"],
            "per_second": {arm: spread([pair[arm]["per_second"] for pair in pairs]) for arm in arms},
            "peak_mb": {arm: spread([pair[arm]["peak_mb"] for pair in pairs]) for arm in arms},
            "ratios": {
                arm: spread([pair["ours"]["per_second"] / pair[arm]["per_second"] for pair in pairs])
                for arm in arms
                if arm != "ours"
            },
            "memory": spread([pair["ours"]["peak_mb"] / pair["best"]["peak_mb"] for pair in pairs]),
            "useful": self.useful(data, conversations),
            "pairs": pairs,
        }
        if data in ("vqa", "slake") and not how["feature_cache"]:
            found["dialogue"] = self.run("dialogue", data, conversations, {**arms["best"], "form": "dialogue"})
        return found

    def curve(self) -> list[dict[str, Any]]:
        """How it grows with the questions an image has: a run of each side for each number of them."""
        points = []
        conversations = self.options.conversations or WORKS["curve"][0]
        for questions in CURVE:
            work = f"curve-{questions}"
            pair = {
                "ours": self.run("ours", work, conversations, {"feature_cache": False}),
                "best": self.run("best", work, conversations, self.best_of_trl("vqa")),
            }
            check_same(pair)
            point = {"questions": questions, "ratio": pair["ours"]["per_second"] / pair["best"]["per_second"]}
            points.append(
                point | {"bound": self.bound(work, conversations), "useful": self.useful(work, conversations), "pair": pair}
            )
            print(f"curve: {questions} an image, {point['ratio']:.2f} times", file=sys.stderr, flush=True)
        return points

    def best_of_trl(self, data: str) -> dict[str, Any]:
        """TRL's best settings for some data, with the device batch that is fastest on eight conversations of it."""
        alike = "vqa" if data == "slake" else data  # questions about images, of about the same length
        if alike not in self.fastest:
            speeds = {}
            for batch in DEVICE_BATCHES:
                how = {"form": "best", "device_batch": batch}
                speeds[batch] = self.run("best", alike, min(8, self.options.conversations or 8), how)["per_second"]
            print(f"{alike}: TRL's device batches {speeds} conversations/s", file=sys.stderr, flush=True)
            self.fastest[alike] = max(speeds, key=lambda batch: speeds[batch])
        return {"form": "best", "device_batch": self.fastest[alike]}

    def run(self, arm: str, data: str, conversations: int, how: dict[str, Any]) -> dict[str, Any]:
        """One run in a process of its own."""
        file, images = self.drawer.write(data, 0, conversations)
        ours, trl = self.options.steps
        run = {
            "side": "ours" if arm == "ours" else "trl",
            "folder": str(self.folder),
            "file": str(file),
            "images": str(images),
            "steps": ours if arm == "ours" else trl,
            "conversations": conversations,
            "how": how,
        }
        return run_apart(str(Path(__file__).resolve()), ["--run", json.dumps(run)])

    def laid_out(self, data: str, conversations: int) -> tuple[Any, list[Any], Any]:
        """The collator of a stage, the conversations of a step, and the device batches that it is laid out in."""
        import torch

        from llavamed_peft import Schedule
        from llavamed_peft.datasets.llava_json import read
        from llavamed_peft.datasets.rejects import RejectLog
        from llavamed_peft.datasets.sources import open_sources
        from llavamed_peft.modeling.load import read_config
        from llavamed_peft.modeling.processor import load_processor
        from llavamed_peft.packing import PackedCollator
        from llavamed_peft.packing.index import DeviceBatches, build_index
        from llavamed_peft.packing.masks import fill_tokens
        from llavamed_peft.packing.steps import StepSampler

        file, images = self.drawer.write(data, 0, conversations)
        fills = fill_tokens(torch.device("cpu"))
        processor = load_processor(self.folder / "processor", read_config(self.folder / "base"))
        collator = PackedCollator(processor, 2048, MAX_ROW_TOKENS, fill_tokens=fills)
        with RejectLog(self.folder / "rejected.jsonl") as rejects:
            sources = open_sources(file, images, "data")
            index = build_index(sources, collator, self.folder / f"{data}-{conversations}.arrow", rejects, 0.0)
        sampler = StepSampler(
            index.column("length"),
            index.column("group"),
            Schedule(epochs=1, learning_rate=1, global_batch=conversations),
            MAX_ROW_TOKENS,
            SEED,
            prefixes=index.prefixes(),
            fill_tokens=fills,
        )
        batches = DeviceBatches(index, collator)
        return collator, list(read(file, images)), [batches[rows].inputs for step in sampler for rows in step]

    def useful(self, data: str, conversations: int) -> float:
        """Share of a step's positions that are neither padding nor laid down before."""
        from llavamed_peft.packing import PackedCollator

        collator, given, batches = self.laid_out(data, conversations)
        once = PackedCollator(collator.encoder.processor).inputs(given)["input_ids"].numel()
        return once / sum(batch["input_ids"].numel() for batch in batches)

    def bound(self, data: str, conversations: int) -> float:
        """FLOPs of the step one conversation at a time with all its logits, by those of the packed step."""
        from llavamed_peft.modeling.load import empty_model, read_config

        model = empty_model(read_config(self.folder / "base"))
        parts = {name: sum(p.numel() for p in model.get_submodule(f"model.{name}").parameters() if p.ndim == 2) for name in PARTS}
        embeddings = model.get_input_embeddings().weight.numel()
        collator, given, batches = self.laid_out(data, conversations)
        image_tokens = (self.options.image_size // 14) ** 2

        def flops(images: int, positions: int, asked: int) -> float:
            seen = images * image_tokens * (2 * parts["vision_tower"] + 6 * parts["multi_modal_projector"])
            return seen + 4 * (positions * (parts["language_model"] - embeddings) + asked * embeddings)

        alone = [collator.inputs([one]) for one in given]
        apart = sum(flops(1, batch["input_ids"].numel(), batch["input_ids"].numel()) for batch in alone)
        packed = sum(
            flops(len(batch["pixel_values"]), batch["input_ids"].numel(), int((batch["labels"] != -100).sum()))
            for batch in batches
        )
        return apart / packed


PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def check_same(pair: dict[str, dict[str, Any]]) -> None:
    """Both sides trained as much on the same loss; the defaults', over every word, is another."""
    ours, best = pair["ours"], pair["best"]
    if abs(ours["loss_first"] - best["loss_first"]) > SAME_LOSS * best["loss_first"]:
        sys.exit(
            f"The sides do not do the same work: the first loss is {ours['loss_first']} in ours, {best['loss_first']} in TRL."
        )
    if ours["trainable_parameters"] != best["trainable_parameters"]:
        sys.exit(f"Trainable parameters: {ours['trainable_parameters']} in ours, {best['trainable_parameters']} in TRL.")


def build_base(folder: Path, texts: Sequence[str], image_size: int, vocabulary: int, width: int, layers: int) -> int:
    from transformers import LlamaConfig

    from llavamed_peft.modeling.load import read_config
    from llavamed_peft.modeling.processor import load_processor, make_stage_processor, save_processor

    tokenizer = train_tokenizer(texts, 4096)
    text = LlamaConfig(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
    )
    config = llava_config(text, image_size, SPECIAL.index("<image>"))
    parameters = write_checkpoint(folder / "base", config, make_processor(tokenizer, image_size), SEED)
    processor = load_processor(folder / "base", read_config(folder / "base"))
    save_processor(make_stage_processor(processor, "pad"), folder / "processor")
    return parameters


def peak_mb() -> float:
    """The greatest resident size that this process ever had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)  # the kernel counts in KiB


def start_clock() -> list[tuple[float, float]]:
    """Wall and CPU seconds at the end of every optimizer step of whatever trainer this process makes."""
    from transformers import TrainerCallback, trainer

    moments: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            moments.append((time.monotonic(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append((time.monotonic(), time.process_time()))

    trainer.DEFAULT_CALLBACKS.append(Clock)
    return moments


def run_ours(run: dict[str, Any]) -> dict[str, Any]:
    from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune

    moments = start_clock()
    schedule = Schedule(epochs=run["steps"], learning_rate=RATE, global_batch=run["conversations"], warmup_ratio=0)
    stage = Stage("work", "lora", schedule, LoraSpec(RANK, ALPHA, dropout=0.0))
    how = run["how"]
    with tempfile.TemporaryDirectory() as runs:
        metrics = curriculum_finetune(
            Path(run["folder"]) / "base",
            {"work": run["file"]},
            Path(runs) / "run",
            image_folder=run["images"],
            curriculum=Curriculum((stage,), seed=SEED),
            save_steps=run["steps"],
            **how,
        )["work"].metrics
        found = {"peak_mb": peak_mb()}
    names = ("conversations", "trainable_parameters", "loss_first")
    return found | times(moments, run["conversations"]) | {name: metrics[name] for name in names}


def times(moments: list[tuple[float, float]], questions: int) -> dict[str, Any]:
    wall, cpu = ([b - a for a, b in itertools.pairwise(one)] for one in zip(*moments, strict=True))
    later = len(wall) - 1
    return {
        "wall": wall,
        "cpu": cpu,
        "per_second": questions * later / sum(wall[1:]),
        "per_cpu_second": questions * later / sum(cpu[1:]),
    }


def run_trl(run: dict[str, Any]) -> dict[str, Any]:
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    moments = start_clock()
    how = run["how"]
    folder = Path(run["folder"])
    processor = AutoProcessor.from_pretrained(folder / "processor")
    rows = json.loads(Path(run["file"]).read_text(encoding="utf-8"))
    questions = sum(len(exchanges(row)) for row in rows) if how["form"] == "dialogue" else len(rows)
    if how["form"] == "dialogue":
        rows = dialogues(rows)
    data = []
    for row in rows:
        messages = [
            {"role": who, "content": words}
            for pair in exchanges(row)
            for who, words in zip(("user", "assistant"), pair, strict=True)
        ]
        said = (
            {"messages": messages}
            if how["form"] != "best" or len(messages) > 2
            else {"prompt": messages[:1], "completion": messages[1:]}
        )
        length = len(processor.tokenizer(" ".join(one["content"] for one in messages)).input_ids)
        data.append({"images": [str(Path(run["images"]) / row["image"])], "length": length, **said})
    dataset = datasets.Dataset.from_list(data).cast_column("images", datasets.List(datasets.Image()))
    best = (
        dict(
            gradient_checkpointing=False,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            **({"completion_only_loss": True} if "prompt" in data[0] else {"assistant_only_loss": True}),
        )
        if how["form"] != "defaults"
        else {}
    )
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype="auto", attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as runs:
        config = SFTConfig(
            output_dir=runs,
            num_train_epochs=run["steps"],
            learning_rate=RATE,
            seed=SEED,
            per_device_train_batch_size=how["device_batch"],
            gradient_accumulation_steps=-(-len(rows) // how["device_batch"]),
            max_length=None,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            **best,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                lora_dropout=0.0,
                target_modules=TARGETS,
                modules_to_save=["multi_modal_projector"],
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        found = {"peak_mb": peak_mb()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return (
        found
        | times(moments, questions)
        | {
            "conversations": questions * trainer.state.global_step,
            "trainable_parameters": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
            "loss_first": losses[0],
        }
    )


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    settings, works = result["settings"], result["works"]
    lines = [
        f"## {result['date']} · packing: packed training beside TRL's SFTTrainer",
        "",
        f"- Machine: {result['machine']}",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
        f"- Command: `{result['command']}`",
        f"- What: LLaVA of {result['parameters'] / 1e6:.1f} M parameters, {(settings['image_size'] // 14) ** 2} image tokens, "
        f"vocabulary {settings['vocabulary']:,}, LoRA rank {RANK} and projector, fp32; {settings['pairs']} pairs, "
        f"{settings['steps'][0] - 1} and {settings['steps'][1] - 1} steps counted of ours and TRL's; conversations per second of "
        "wall time, median (range)",
        "- Expected: the column wanted",
    ]
    measured = {work: found for work, found in works.items() if work != "curve"}
    missed = [f"{work} ({', '.join(missing)})" for work, found in measured.items() if (missing := misses(work, found))]
    lines.append(f"- Result: {'as expected' if not missed else 'missed: ' + ', '.join(missed)}")
    if measured:
        lines += [
            "",
            "| work (conversations a step) | ours | TRL, best (device batch) | times best | wanted | times defaults | wanted | ",
        ]
        lines[-1] += "memory, of best | useful positions |"
        lines.append("|---" * 9 + "|")
    for work, found in measured.items():
        _, best, defaults, _ = WORKS[work]
        of_defaults = found["ratios"].get("defaults")
        peaks = [f"{found['peak_mb'][side]['median']:,.0f}" for side in ("ours", "best")]
        cells = [
            f"{work} ({found['conversations']})",
            _spread(found["per_second"]["ours"]),
            f"{_spread(found['per_second']['best'])} ({found['device_batch']})",
            f"**{found['ratios']['best']['median']:.2f}** ({_range(found['ratios']['best'])})",
            f"{best:g}",
            f"**{of_defaults['median']:.2f}** ({_range(of_defaults)})" if of_defaults else "–",
            f"{defaults:g}" if defaults else "–",
            f"{found['memory']['median']:.2f} ({' of '.join(peaks)} MB)",
            f"{found['useful']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for work, found in measured.items():
        if "dialogue" in found:
            asked = found["dialogue"]["per_second"]
            lines += ["", f"TRL's dialogue form, which is another objective: {work} {asked:.2f} questions per second."]
    if "curve" in works:
        lines += [
            "",
            "| questions an image | times TRL's best | bound by FLOPs | reached | useful positions |",
            "|---|---|---|---|---|",
        ]
        for point in works["curve"]:
            numbers = (
                f"{point['ratio']:.2f} | {point['bound']:.2f} | {point['ratio'] / point['bound']:.0%} | {point['useful']:.1%}"
            )
            lines.append(f"| {point['questions']} | {numbers} |")
    return "\n".join([*lines, ""])


def misses(work: str, found: dict[str, Any]) -> list[str]:
    """What was wanted of a work and was not reached."""
    _, best, defaults, memory = WORKS[work]
    ratios = found["ratios"]
    reached = {
        "best": ratios["best"]["median"] >= best,
        "defaults": defaults is None or ratios["defaults"]["median"] >= defaults,
        "memory": memory is None or found["memory"]["median"] <= memory,
        "useful": found["useful"] >= WANTED_USEFUL,
    }
    return [what for what, fits in reached.items() if not fits]


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({_range(values)})"


def _range(values: dict[str, float]) -> str:
    return f"{values['least']:.2f} to {values['most']:.2f}"


def draw_curve(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up and bound over the questions an image has, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    questions = [point["questions"] for point in points]
    panel.plot(questions, [point["bound"] for point in points], "--", label="bound by FLOPs")
    panel.plot(questions, [point["ratio"] for point in points], "o-", label="measured")
    panel.set(xlabel="questions an image", ylabel="times TRL's best")
    panel.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
