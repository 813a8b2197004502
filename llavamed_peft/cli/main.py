"""The console script `llavamed-peft`: one verb per subparser, each a short function that imports what it
needs when it is called.

    llavamed-peft ask llava-hf/llava-1.5-7b-hf runs/llava-med/vqa chest.png "Is the heart enlarged?"
    llavamed-peft inspect llava-hf/llava-1.5-7b-hf align=pmc_align.json vqa=vqa_rad/train.json \\
        --image_folder images/
    llavamed-peft inspect --config recipes/configs/llava-1.5-7b/nf4-24gb.yaml
    llavamed-peft show runs/llava-med/vqa
    llavamed-peft merge llava-hf/llava-1.5-7b-hf runs/llava-med/vqa merged/
    llavamed-peft catalogue adapters

What this package refuses is one line on stderr and exit code 2, as argparse does with a wrong command line;
anything else that goes wrong is a line and exit code 1, with its traceback under `--debug`. Training has no
verb: it is `curriculum_finetune`, and the scripts in `recipes/`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LlavaMedError, did_you_mean
from ..stages import Curriculum
from ..version import __version__

Verbs = Any  # what argparse's `add_subparsers` returns; its class has no public name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: the words of the command line after the program's name; `None`: this process's own.

    Returns:
        The exit code: 0, 2 for what the package refuses, 1 for any other error.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words = [word for word in rest if word != "--"]
    if options.verb is _inspect and not any(word.startswith("-") for word in words):
        options.data += words  # argparse takes BASE and DATA together, before an option that is between them
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # else DeepSpeed, once installed, says on stdout that it found no GPU
    if not os.path.exists("/dev/nvidia0"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The libraries' notes to programmers would only hide the answer or the error.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # data hold characters that not every terminal has
    try:
        options.verb(options)
    except LlavaMedError as error:
        print(f"llavamed-peft: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except Exception as error:
        if options.debug:
            raise
        from .launching import in_a_sentence

        print(f"llavamed-peft: {in_a_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llavamed-peft",
        description="The LLaVA-Med curriculum, as swappable PEFT stage adapters. For research only, not for "
        "clinical use.",
    )
    parser.add_argument("--version", action="version", version=f"llavamed-peft {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for add in (_add_ask, _add_inspect, _add_show, _add_merge, _add_catalogue):
        add(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_ask(verbs: Verbs) -> None:
    ask = verbs.add_parser("ask", help="answer a question about an image with a stage's adapter")
    ask.add_argument("base", metavar="BASE", help="Hub id or folder of the raw base")
    ask.add_argument("adapter", metavar="ADAPTER", help="a stage's folder, or a Hub repository of one")
    ask.add_argument("image", metavar="IMAGE", help="an image file")
    ask.add_argument("question", metavar="QUESTION", help="the question's words")
    ask.add_argument(
        "--max_new_tokens",
        type=_whole_number,
        default=128,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    ask.set_defaults(verb=_ask)


def _add_inspect(verbs: Verbs) -> None:
    inspect = verbs.add_parser(
        "inspect",
        help="show what would train, on which tokens, and what would be rejected; needs no weights",
        description="Show what a run would do, without running it. Of BASE only configuration and processor "
        "are read.",
    )
    inspect.add_argument("base", metavar="BASE", nargs="?", help="Hub id or folder of a LLaVA checkpoint")
    inspect.add_argument(
        "data",
        metavar="DATA",
        nargs="*",
        help="LLaVA JSON: a file for every stage, or stage=file, such as vqa=train.json",
    )
    inspect.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="options of recipes/curriculum.py instead of BASE, DATA, --image_folder, --curriculum",
    )
    inspect.add_argument(
        "--image_folder",
        metavar="DIR",
        action="append",
        help="where image paths start, or stage=DIR, as often as needed (default: each data file's folder)",
    )
    inspect.add_argument(
        "--curriculum", metavar="FILE.yaml", help="the stages (default: LLAVA_MED, the paper's)"
    )
    inspect.add_argument("--stage", metavar="NAME", help="this stage of the curriculum alone")
    inspect.add_argument(
        "--rows", type=_count, default=3, metavar="N", help="rows to show (default: %(default)s)"
    )
    inspect.add_argument(
        "--max_rejected",
        type=_share,
        metavar="SHARE",
        help="as the run would have it (default: 0.05, or what --config says)",
    )
    inspect.add_argument(
        "--packing",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE.png",
        help="show how each stage's first step is packed on a GPU; with a file, draw it there, too (so DATA "
        "comes before it)",
    )
    inspect.add_argument(
        "--max_row_tokens",
        type=_whole_number,
        metavar="N",
        help="of a packed row (default: 8192, as on a GPU, or what --config says)",
    )
    _add_width(inspect)
    inspect.set_defaults(verb=_inspect, usage_error=inspect.error)


def _add_show(verbs: Verbs) -> None:
    show = verbs.add_parser("show", help="show a stage's lineage, schedule, data and metrics as a tree")
    show.add_argument(
        "adapter", metavar="ADAPTER", help="a stage's folder, or a Hub repository of one; needs no weights"
    )
    _add_width(show)
    show.set_defaults(verb=_show)


def _add_merge(verbs: Verbs) -> None:
    merge = verbs.add_parser("merge", help="write base and adapter as one checkpoint")
    merge.add_argument("base", metavar="BASE", help="Hub id or folder of the raw base")
    merge.add_argument("adapter", metavar="ADAPTER", help="a stage's folder, or a Hub repository of one")
    merge.add_argument("out", metavar="OUT", help="the folder to write; it must not be there yet")
    merge.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the merged weights (default: the base's stored one); also writes a full stage in fewer bits",
    )
    merge.add_argument(
        "--onto",
        choices=("dequantised", "original"),
        help="the weights to merge onto: what the base's become in NF4, or its own (default: dequantised for "
        "a stage that was trained over NF4)",
    )
    merge.add_argument(
        "--eval_data",
        metavar="FILE",
        help="LLaVA JSON to measure the held-out loss on, before and after rounding; both are recorded",
    )
    merge.add_argument(
        "--image_folder", metavar="DIR", help="where its image paths start (default: its folder)"
    )
    merge.set_defaults(verb=_merge)


def _add_catalogue(verbs: Verbs) -> None:
    catalogue = verbs.add_parser("catalogue", help="renew the index of a folder of published adapters")
    catalogue.add_argument("folder", metavar="FOLDER", help="holds one folder <base>--<stage> per adapter")
    catalogue.set_defaults(verb=_catalogue)


def _add_width(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--width", type=_whole_number, metavar="N", help="characters of a line (default: the terminal's)"
    )


def _ask(options: argparse.Namespace) -> None:
    """Print the answer, and nothing else, on stdout."""
    from ..conversations import Question
    from ..storage.images import image_size

    # What is wrong with image or words shows before a model is loaded. The answer is what is asked for, so it
    # has no words yet.
    question = Question("question", options.image, options.question, answer="?", answer_type="open")
    image_size(question.image)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..adapters.stage_adapter import load_stage
    from ..evaluation.answer import answer_questions

    disable_progress_bar()
    model, processor = load_stage(options.base, options.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(*answer_questions(model, processor, [question], options.max_new_tokens))


def _inspect(options: argparse.Namespace) -> None:
    """Print what is found out, line by line; checking a large data set takes minutes."""
    words = {
        "BASE": options.base,
        "DATA": options.data,
        "--image_folder": options.image_folder,
        "--curriculum": options.curriculum,
    }
    if options.config is not None and (twice := [name for name, value in words.items() if value]):
        options.usage_error(f"--config says {', '.join(twice)}; give one or the other")
    if options.config is None and (missing := [name for name in ("BASE", "DATA") if not words[name]]):
        options.usage_error(f"the following arguments are required: {', '.join(missing)}")
    if options.max_row_tokens and not options.packing:
        options.usage_error("--max_row_tokens bounds the rows that --packing shows; give both")

    from ..preview.inspect import inspect

    run = _run_of_words(options) if options.config is None else _run_of_file(options.config, options.packing)
    if options.stage is not None:
        run = _one_stage(run, options.stage)
    for line in inspect(
        run.base,
        run.data,
        run.image_folder,
        run.curriculum,
        rows=options.rows,
        max_rejected=run.max_rejected if options.max_rejected is None else options.max_rejected,
        packing=options.packing if isinstance(options.packing, bool) else Path(options.packing),
        max_row_tokens=options.max_row_tokens or run.max_row_tokens,
        width=_width(options),
        colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ,
    ):
        print(line, flush=True)


@dataclass(frozen=True)
class _Run:
    """The run that `inspect` is asked about."""

    base: str
    data: dict[str, list[str]]
    image_folder: str | dict[str, str] | None
    curriculum: Curriculum
    max_rejected: float = 0.05
    max_row_tokens: int | None = None


def _run_of_words(options: argparse.Namespace) -> _Run:
    from ..llava_med import LLAVA_MED
    from .arguments import by_stage, folder_by_stage

    curriculum = LLAVA_MED if options.curriculum is None else Curriculum.from_yaml(Path(options.curriculum))
    data = by_stage("DATA", options.data, [stage.name for stage in curriculum.stages])
    return _Run(options.base, data, folder_by_stage("--image_folder", options.image_folder), curriculum)


def _run_of_file(file: str, packing: object) -> _Run:
    from .arguments import CurriculumArguments, RunArguments
    from .parsing import parse

    arguments, run = parse(CurriculumArguments, RunArguments, command_line=["--config", file])
    if packing and run.layout != "packed":
        raise ConfigError(
            f"{file}: layout is {run.layout!r}, so nothing is packed; wanted 'packed' for --packing."
        )
    data, folders, curriculum = arguments.files("data"), arguments.folders(), arguments.stages()
    return _Run(arguments.model, data, folders, curriculum, run.max_rejected, run.max_row_tokens)


def _one_stage(run: _Run, name: str) -> _Run:
    """The same for one of its stages alone."""
    names = [stage.name for stage in run.curriculum.stages]
    if name not in names:
        raise ConfigError(f"--stage is {name!r}, no stage of the curriculum.{did_you_mean(name, names)}")
    for argument, given in (("data", run.data), ("image_folder", run.image_folder)):
        if isinstance(given, dict):
            run.curriculum.check_keys(argument, given)
    folder = run.image_folder.get(name) if isinstance(run.image_folder, dict) else run.image_folder
    data = {name: run.data[name]} if name in run.data else {}
    alone = replace(run.curriculum, stages=(run.curriculum[name],))
    return replace(run, data=data, image_folder=folder, curriculum=alone)


def _show(options: argparse.Namespace) -> None:
    """Print the tree."""
    from ..adapters.lineage_tree import show

    print(*show(options.adapter, _width(options)), sep="\n")


def _merge(options: argparse.Namespace) -> None:
    """Print the name of the folder that holds the checkpoint."""
    from transformers.utils.logging import disable_progress_bar

    from ..adapters.stage_adapter import StageAdapter

    disable_progress_bar()
    adapter, measure = StageAdapter.load(options.adapter), None
    if options.eval_data is not None:
        import torch

        from ..datasets import llava_json
        from ..evaluation.held_out import held_out_loss

        conversations = list(llava_json.read(options.eval_data, options.image_folder))
        measure = partial(
            held_out_loss,
            data=conversations,
            max_length=adapter.stage.schedule.max_length,
            dtype=getattr(torch, adapter.record.computing["dtype"]),
        )
    print(adapter.merge(options.base, options.out, options.dtype, options.onto, measure))


def _catalogue(options: argparse.Namespace) -> None:
    """Print the name of the file that holds the index."""
    from ..adapters.catalogue import update

    print(update(options.folder))


def _whole_number(text: str, at_least: int = 1) -> int:
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
    return int(text)


def _count(text: str) -> int:
    return _whole_number(text, at_least=0)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return share


def _width(options: argparse.Namespace) -> int:
    return options.width or shutil.get_terminal_size((100, 24)).columns


if __name__ == "__main__":
    sys.exit(main())
