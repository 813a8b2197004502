"""What several benchmarks need: a LLaVA with random weights on disk, the machine in words, medians, an entry
in the log."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
PATCH = 14  # pixels of a side; (pixels / 14)² image tokens

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str], most_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=most_tokens, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*texts, "USER: ASSISTANT:"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast, image_size: int) -> LlavaProcessor:
    """A LLaVA-1.5 processor around a tokenizer that has `SPECIAL`."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava_config(
    text: LlamaConfig, image_size: int, image_token: int, tower: Mapping[str, int] | None = None
) -> LlavaConfig:
    """A LLaVA-1.5 around a language model.

    Args:
        tower: sizes of the vision tower, as `CLIPVisionConfig` names them; `None`: about 5 million
            parameters.
    """
    from transformers import CLIPVisionConfig, LlavaConfig

    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**(tower or small), image_size=image_size, patch_size=PATCH),
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-2,
    )


def write_checkpoint(
    folder: Path,
    config: LlavaConfig,
    processor: LlavaProcessor,
    seed: int,
    dtype: str = "float32",
    device: str = "cpu",
) -> int:
    """Write a LLaVA with random weights, drawn on a device, and its processor; returns its number of
    parameters."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.num_parameters()


def save_stage_processor(folder: Path) -> None:
    """Write `processor/`, with which a stage over `base/` trains, so that stock trainers can do the same."""
    from llavamed_peft.modeling.load import read_config
    from llavamed_peft.modeling.processor import load_processor, make_stage_processor, save_processor

    processor = load_processor(folder / "base", read_config(folder / "base"))
    save_processor(make_stage_processor(processor, "pad"), folder / "processor")


def run_apart(
    script: str,
    arguments: Sequence[str],
    variables: Mapping[str, str] | None = None,
    allowed: Sequence[str] = (),
) -> Any:
    """Run a script in a process of its own, offline, with some environment variables.

    Returns:
        Its last line of output, read as JSON; `None` where it failed and said something of what is allowed.
    """
    environment = (
        os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(variables or {})
    )
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode and any(words in done.stderr for words in allowed):
        return None
    if done.returncode:
        sys.exit(
            f"{done.stderr}\n{Path(script).name} {shlex.join(arguments)} failed with exit code "
            f"{done.returncode}."
        )
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """The machine in words."""
    import torch

    cores = len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    few = "" if threads == cores else f" ({threads} thread{'s' if threads > 1 else ''} used)"
    return f"{cores} cores{few} {platform.machine().replace('_', '-')} with {capability}, {gpu}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def heading(name: str, libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """What every result says: which benchmark, when, where, with which libraries, by which command."""
    return {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
    }


def write_down(result: Mapping[str, Any], entry: str, suffix: str) -> Path:
    """Add an entry to `LOG.md`, and write its numbers to `results/`; returns that file."""
    with (HERE / "LOG.md").open("a", encoding="utf-8") as log:
        log.write(f"\n{entry}")
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"{result['benchmark']}-{result['date']}-{suffix}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
