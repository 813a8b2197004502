"""The console script `llavamed-peft`: one verb per subparser, each a short function that imports what it needs when it is called.

    llavamed-peft ask llava-hf/llava-1.5-7b-hf runs/llava-med/vqa chest.png "Is the heart enlarged?"
    llavamed-peft catalogue adapters

What this package refuses is one line on stderr and exit code 2, as argparse does with a wrong command line; anything else that
goes wrong is a defect and shows its traceback. Training has no verb: it is `curriculum_finetune`, and the scripts in `recipes/`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from . import __version__
from .errors import LlavaMedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: the words of the command line behind the program's name; `None` takes the process's own.

    Returns:
        The exit code: 0, or 2 for what the package refuses.
    """
    options = _parser().parse_args(arguments)
    # The libraries' notes to programmers would only hide the answer or the error.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        options.verb(options)
    except LlavaMedError as error:
        print(f"llavamed-peft: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llavamed-peft",
        description="The LLaVA-Med curriculum, as swappable PEFT stage adapters. For research only, not for clinical use.",
    )
    parser.add_argument("--version", action="version", version=f"llavamed-peft {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    ask = verbs.add_parser("ask", help="answer a question about an image with a stage's adapter")
    ask.add_argument("base", metavar="BASE", help="Hub id or folder of the raw base")
    ask.add_argument("adapter", metavar="ADAPTER", help="a stage's folder, or a Hub repository of one")
    ask.add_argument("image", metavar="IMAGE", help="an image file")
    ask.add_argument("question", metavar="QUESTION", help="the question's words")
    ask.add_argument(
        "--max_new_tokens", type=_whole_number, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    ask.set_defaults(verb=_ask)

    catalogue = verbs.add_parser("catalogue", help="renew the index of a folder of published adapters")
    catalogue.add_argument("folder", metavar="FOLDER", help="holds one folder <base>--<stage> per adapter")
    catalogue.set_defaults(verb=_catalogue)
    return parser


def _ask(options: argparse.Namespace) -> None:
    """Print the answer, and nothing else, on stdout."""
    from .conversations import Question
    from .images import image_size

    # What is wrong with image or words shows before a model is loaded. The answer is what is asked for, so it has no words yet.
    question = Question("question", options.image, options.question, answer="?", answer_type="open")
    image_size(question.image)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from .adapters import load_stage
    from .evaluation.answer import answer_questions

    disable_progress_bar()
    model, processor = load_stage(options.base, options.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(*answer_questions(model, processor, [question], options.max_new_tokens))


def _catalogue(options: argparse.Namespace) -> None:
    """Print the name of the file that holds the index."""
    from .catalogue import update

    print(update(options.folder))


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
