"""One run of `packing.py` or `packing_gpu.py`, in the process that is measured: a stage or TRL's trainer; and
what a step costs.

The bound by FLOPs counts multiply-adds twice. A step of N positions, of which S are supervised, that show I
images of t tokens:

    tower      I · L_v · (24 t h_v² + 4 t² h_v)           forward alone (its MLP is 4 h_v wide)
    projector  I · t · 6 P_p                              P_p weights, forward and both gradients language   N
    · 4 P_l + N · 6 P_r                      P_l frozen weights: forward, gradient of the input; P_r of LoRA
    attention  L · 12 h · (pairs of tokens that see one another: n (n + 1) / 2 for a sequence of n) head
    S · 4 h V                                  TRL on a CPU: N · 6 h V, every position, and forward again

Packed, N counts what is shared once, and pairs are those along each conversation's own path. Bound = TRL's
FLOPs over ours; the bound of packing alone takes TRL's with our head.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from packing_data import dialogues, exchanges

RANK, ALPHA, RATE, SEED = 16, 32, 2e-4, 42
MAX_ROW_TOKENS = 4096  # `curriculum_finetune`'s own bound on a CPU

RUNS = Path(__file__).resolve()  # the script of one run
Run = dict[str, Any]


def main() -> None:
    run = json.loads(sys.argv[1])
    print(json.dumps({"ours": run_ours, "trl": run_trl}[run["side"]](run)))


def start_clock() -> list[tuple[float, float]]:
    """Wall and CPU seconds when training begins and after every step of the trainer that this process makes.

    On a CPU also after every part of a step. A GPU is waited for, which would hold it up there.
    """
    import torch
    from transformers import TrainerCallback, trainer

    moments: list[tuple[float, float]] = []
    on_gpu = torch.cuda.is_available()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            moments.append((time.monotonic(), sum(os.times()[:2])))

        on_step_end = on_train_begin
        if not on_gpu:
            on_substep_end = on_train_begin

    trainer.DEFAULT_CALLBACKS.append(Clock)
    return moments


def read_clock(moments: Sequence[tuple[float, float]], questions: Sequence[float], warm_up: float) -> Run:
    """Speeds without warm-up.

    Args:
        moments: from `start_clock`.
        questions: of each part between two moments.
        warm_up: questions that may pass first.
    """
    first = 0
    while sum(questions[:first]) < warm_up:
        first += 1
    wall, cpu = (last - begin for begin, last in zip(moments[first], moments[-1], strict=True))
    seconds = [round(later[0] - earlier[0], 3) for earlier, later in pairwise(moments)]
    counted = sum(questions[first:])
    return {"per_second": counted / wall, "per_cpu_second": counted / cpu, "seconds": seconds}


def peak_mb() -> float:
    """The greatest resident size that this process ever had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)  # the kernel counts in KiB


def waiting_share(records: Sequence[Run]) -> float:
    """The share of its time that a stage waited for images, its first step left out."""
    seconds = [
        (record["waiting_share"] * record["seconds"], record["seconds"])
        for record in records
        if "loss" in record
    ]
    waited, passed = (last - first for first, last in zip(seconds[0], seconds[-1], strict=True))
    return waited / passed


def run_ours(run: Run) -> Run:
    import torch

    from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune
    from llavamed_peft.packing import masks
    from llavamed_peft.running.summary import read_metrics
    from llavamed_peft.training import stage as training

    moments = start_clock()
    how = dict(run["how"])
    if how.pop("attention", None) == "sdpa":  # what a GPU without Triton has
        masks.has_triton = lambda: False
    taken: list[str] = []
    choose = training.choose_attention
    training.choose_attention = lambda *given: taken.append(choose(*given)) or taken[-1]
    schedule = Schedule(
        epochs=run["epochs"], learning_rate=RATE, global_batch=run["conversations"], warmup_ratio=0
    )
    stage = Stage("work", "lora", schedule, LoraSpec(RANK, ALPHA, dropout=0.0))
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
        found = {"peak_mb": peak_mb(), "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)}
        found["waiting_share"] = waiting_share(read_metrics(Path(runs) / "run"))
        if taken:
            found["attention"] = taken[-1]
            bound, index = (
                how.get("max_row_tokens", MAX_ROW_TOKENS),
                Path(runs) / "run" / "index" / "work-train.arrow",
            )
            found["counts"] = count(Path(run["folder"]), index, schedule, bound, masks.fill_tokens(taken[-1]))
    found |= read_clock(moments, [run["conversations"]] * run["steps"], run["conversations"])
    return found | {
        name: metrics[name] for name in ("trainable_parameters", "supervised_tokens", "loss_first")
    }


def run_trl(run: Run) -> Run:
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    class Counting(SFTTrainer):
        supervised = 0

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **others: Any) -> Any:
            self.supervised += (inputs["labels"][:, 1:] != -100).sum()
            return super().compute_loss(model, inputs, *more, **others)

    moments = start_clock()
    on_gpu = torch.cuda.is_available()
    folder, how = Path(run["folder"]), run["how"]
    size = how["device_batch"]
    processor = AutoProcessor.from_pretrained(folder / "processor")
    rows = json.loads(Path(run["file"]).read_text(encoding="utf-8"))
    epochs, questions = run["epochs"], run["conversations"]
    if how["form"] == "dialogue":
        rows = dialogues(rows)
    data = [trl_row(row, how["form"], Path(run["images"]), processor) for row in rows]
    best = {} if how["form"] == "defaults" else trl_best(how, data[0], on_gpu)
    step = len(data) * epochs // run["steps"]
    with tempfile.TemporaryDirectory() as runs:
        config = SFTConfig(
            output_dir=runs,
            num_train_epochs=epochs,
            learning_rate=RATE,
            seed=SEED,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=-(-step // size),
            max_length=None,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            **best,
        )
        trainer = Counting(
            model=AutoModelForImageTextToText.from_pretrained(folder / "base", **trl_loading(run)),
            args=config,
            train_dataset=datasets.Dataset.from_list(data).cast_column(
                "images", datasets.List(datasets.Image())
            ),
            processing_class=processor,
            peft_config=LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                lora_dropout=0.0,
                target_modules=r"model\.language_model\..*_proj",
                modules_to_save=["multi_modal_projector"],
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        found = {"peak_mb": peak_mb(), "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)}
    if trainer.model.base_model.model.is_activation_checkpointing != (on_gpu or not best):
        sys.exit(f"TRL's activation checkpointing is not what {how['form']!r} says.")
    parts = [questions] * run["steps"]
    if not on_gpu:
        parts = [min(size, step - begin) * questions / step for begin in range(0, step, size)] * run["steps"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found |= read_clock(moments, parts, questions if run["steps"] > 1 else questions / 4)
    trainable = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    counts = {"trainable_parameters": trainable, "supervised_tokens": int(trainer.supervised)}
    return found | {**counts, "loss_first": losses[0], **how}


def trl_loading(run: Run) -> dict[str, Any]:
    """How TRL's base is loaded; in 4 bits where the run asks for it, with the same modules left alone."""
    import torch
    from transformers import BitsAndBytesConfig

    from llavamed_peft.modeling.quantization import NOT_QUANTIZED

    loading: dict[str, Any] = {"dtype": "auto", "attn_implementation": "sdpa"}
    if run["how"].get("quantization"):
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        loading["quantization_config"] = BitsAndBytesConfig(
            **nf4, bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=list(NOT_QUANTIZED)
        )
    return loading


def trl_best(how: dict[str, Any], row: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """TRL's settings that make it fastest on these data."""
    return {
        "activation_checkpointing": on_gpu,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,  # or it would not find the lengths
        "dataloader_num_workers": how["workers"],
        "dataloader_persistent_workers": how["workers"] > 0,
        "completion_only_loss" if "prompt" in row else "assistant_only_loss": True,
    }


def trl_row(row: dict[str, Any], form: str, images: Path, processor: Any) -> dict[str, Any]:
    """A row as TRL's documentation has it, with its length for `group_by_length`."""
    said = exchanges(row)
    messages = [
        {"role": role, "content": words}
        for pair in said
        for role, words in zip(("user", "assistant"), pair, strict=True)
    ]
    texts = (
        {"prompt": messages[:1], "completion": messages[1:]}
        if form == "best" and len(said) == 1
        else {"messages": messages}
    )
    length = len(processor.tokenizer(" ".join(message["content"] for message in messages)).input_ids)
    return {"images": [str(images / row["image"])], "length": length, **texts}


# What it must cost


def count(
    folder: Path, index_file: Path, schedule: Any, max_row_tokens: int, fill: int | None
) -> dict[str, float]:
    """Positions, images, supervised tokens and pairs of tokens of a step, packed and padded, and the FLOPs of
    both.

    Padded are rows of a device batch of two, neighbours in length, as TRL has them at its best.
    """
    from transformers import AutoConfig, AutoProcessor

    from llavamed_peft.batches.index import Index
    from llavamed_peft.packing import PackedCollator
    from llavamed_peft.packing.encoding import IGNORED
    from llavamed_peft.packing.rows import lay_row
    from llavamed_peft.packing.tree import build_forest
    from llavamed_peft.storage.equal_images import content_key
    from llavamed_peft.storage.images import image_size

    index = Index.open(index_file)
    processor = AutoProcessor.from_pretrained(folder / "processor")
    collator = PackedCollator(processor, schedule.max_length, max_row_tokens, fill_tokens=fill)
    sampler = index.sampler(collator, schedule, SEED)
    (batches,) = sampler.shares(next(sampler.steps()))
    laid, every, rows = 0, [], []
    for batch in batches:
        conversations = [index.tokenized(row) for row in batch]
        sequences = [
            collator.sequence(
                one, [content_key(image) for image in one.images], [image_size(image) for image in one.images]
            )
            for one in conversations
        ]
        stacked = collator.rows(sequences)
        laid += len(stacked) * max(map(len, stacked))
        every += sequences
        rows += stacked
    longest_first = sorted(map(len, every), reverse=True)
    padded = [longest_first[i // 2 * 2] for i in range(len(longest_first))]
    supervised = sum(int((sequence.labels[1:] != IGNORED).sum()) for sequence in every)
    shape = AutoConfig.from_pretrained(folder / "base")
    packed_pairs = sum(int((row.positions + 1).sum()) for row in rows)
    cost = {
        "packed": flops(shape, laid, sum(len(row.images) for row in rows), packed_pairs, supervised * 4),
        "trl": flops(shape, sum(padded), len(every), sum(n * (n + 1) // 2 for n in padded), sum(padded) * 6),
        "padded": flops(
            shape, sum(padded), len(every), sum(n * (n + 1) // 2 for n in padded), supervised * 4
        ),
    }
    return {
        "useful": len(lay_row(build_forest(every), every)) / laid,
        "positions_packed": laid,
        "positions_padded": sum(padded),
        "supervised": supervised,
        "bound": cost["trl"] / cost["packed"],
        "bound_packing": cost["padded"] / cost["packed"],
        "gflops_packed": cost["packed"] / 1e9,
        "gflops_trl": cost["trl"] / 1e9,
    }


def flops(shape: Any, positions: int, images: int, pairs: int, head: int) -> float:
    """Of a step, after the formula above; `head`: scored positions times 4 or 6."""
    text, vision = shape.text_config, shape.vision_config
    h, h_v, wide = text.hidden_size, vision.hidden_size, text.intermediate_size
    t = (vision.image_size // vision.patch_size) ** 2
    tower = vision.num_hidden_layers * (24 * t * h_v**2 + 4 * t**2 * h_v)
    projector = t * 6 * (h_v * h + h * h)
    language = text.num_hidden_layers * (
        4 * (4 * h * h + 3 * h * wide) + 6 * RANK * (4 * 2 * h + 3 * (h + wide))
    )
    attention = text.num_hidden_layers * 12 * h
    return (
        images * (tower + projector) + positions * language + pairs * attention + head * h * text.vocab_size
    )


if __name__ == "__main__":
    main()
