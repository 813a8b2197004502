"""Rows and images that are made for the data path, and a base without weights."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

from workbench import SPECIAL, llava_config, make_processor, train_tokenizer

GLOBAL_BATCH, MAX_ROW_TOKENS, SEED = 128, 4096, 42
TINY, REAL = 28, 336  # pixels of a prepared image; (pixels / 14)² image tokens

TEXT = (
    "the left right lung lobe chest x-ray shows normal heart size opacity consolidation upper lower with "
    "mild pleural effusion arrow indicates lesion axial coronal computed tomography patient describe image "
    "briefly what is seen in this scan and where"
)

WORDS = TEXT.split()


# The files


def make_tiny(folder: Path, rows: int) -> None:
    """A checkpoint without weights, and rows of one exchange about an image of 16×16 each."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(SEED)
    pictures = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        pictures.append(file.getvalue())
    make_base(folder, TINY)
    make_rows(folder, rows, exchanges=1, pictures=pictures, suffix="png")


def make_real(folder: Path, rows: int) -> None:
    """The same for 336 pixels, with rows of three exchanges about a JPEG of 640×480 each."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(SEED)
    pictures = []
    for _ in range(64):
        file = io.BytesIO()
        coarse = Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    make_base(folder, REAL)
    make_rows(folder, rows, exchanges=3, pictures=pictures, suffix="jpg")


def make_base(folder: Path, size: int) -> None:
    """Configuration, tokenizer and image processor of a LLaVA-1.5; nobody loads weights here."""
    from transformers import LlamaConfig

    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, 1024)
    llava_config(LlamaConfig(vocab_size=len(tokenizer)), size, SPECIAL.index("<image>")).save_pretrained(
        folder / "base"
    )
    make_processor(tokenizer, size).save_pretrained(folder / "base")


def make_rows(folder: Path, rows: int, exchanges: int, pictures: Sequence[bytes], suffix: str) -> None:
    """`data.jsonl`, and one image file per row in folders of a thousand; an exchange has some 10 and 20 to 60
    words."""
    words = random.Random(SEED)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            name = f"images/{row // 1000:03d}/{row}.{suffix}"
            image = folder / name
            if row % 1000 == 0:
                image.parent.mkdir(parents=True)
            # Decoders stop before that; no two are equal
            image.write_bytes(pictures[row % len(pictures)] + str(row).encode())
            turns = []
            for number in range(exchanges):
                asked, said = (
                    " ".join(words.choices(WORDS, k=10)),
                    " ".join(words.choices(WORDS, k=words.randint(20, 60))),
                )
                turns += [
                    {"from": "human", "value": asked if number else f"<image>\n{asked}"},
                    {"from": "gpt", "value": said},
                ]
            file.write(json.dumps({"id": str(row), "image": name, "conversations": turns}) + "\n")
