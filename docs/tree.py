"""Prints the repository's tree with a phrase per file, or writes it into docs/architecture.md.

    python docs/tree.py            # print it
    python docs/tree.py --write    # renew docs/architecture.md between its two markers (make tree)

The phrase of a Python file is the first sentence of its docstring, that of a folder the first one of its
`__init__.py`; `PHRASES` has the phrases of what has no docstring. Data and what runs leave are not shown.
`tests/test_architecture.py` compares the text with the disk.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: made by `make tree` -->", "<!-- end of the tree -->"
SHOWN = ("llavamed_peft", "recipes", "benchmarks", "adapters", "docs", "tests")
PHRASES = {
    "recipes": "scripts: each reads top to bottom",
    "recipes/configs": "option files; each opens with what it needs, how to run it, what each line does",
    "recipes/configs/accelerate": "launchers: DDP, FSDP2, DeepSpeed; one GPU, eight, two machines",
    "recipes/configs/llava-1.5-7b": "4 bits on 24 GB, LoRA on 80 GB, full on 8×A100",
    "recipes/configs/llava-v1.6-mistral-7b": "the same for LLaVA-NeXT",
    "recipes/configs/llava-onevision-qwen2-7b": "LoRA on 80 GB",
    "recipes/demo": "the tiny checkpoint and the clinic it learns",
    "recipes/demo/tiny-llava": "the tiny base, 6 MB",
    "benchmarks": "measurements; LOG.md has what each found",
    "benchmarks/results": "the raw numbers",
    "adapters": "the catalogue of published adapters",
    "docs": "what README links to",
    "tests": "what shows that all this is true",
}
# Shown without their files
CLOSED = {
    "benchmarks/results",
    "tests",
    "recipes/demo/tiny-llava",
    "recipes/configs/accelerate",
}


def phrase(path: Path) -> str:
    """What a file or folder is, in a few words; empty where nothing says it."""
    name = path.relative_to(ROOT).as_posix()
    if name in PHRASES:
        return PHRASES[name]
    source = path / "__init__.py" if path.is_dir() else path
    if source.suffix == ".py" and source.is_file():
        text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    elif source.suffix == ".md":
        text = source.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    else:
        return ""
    return re.split(r"(?<=\S)\.(?:\s|$)", " ".join(text.partition("\n\n")[0].split()))[0]


def files() -> list[Path]:
    """Every file that git knows or would take, in the folders that are shown."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SHOWN]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(ROOT / name for name in set(listed) if (ROOT / name).is_file())


def lines() -> list[str]:
    """The tree, one file or folder a line; a folder's files before its folders."""
    below: dict[Path, set[Path]] = {}
    for file in files():
        if (
            file.suffix in (".py", ".yaml", ".md") and file.name != "__init__.py"
        ) or file.parent.name == "tiny-llava":
            for child in [file, *file.parents]:
                if child == ROOT:
                    break
                below.setdefault(child.parent, set()).add(child)

    def walk(folder: Path, depth: int) -> list[str]:
        found = []
        for path in sorted(below.get(folder, ()), key=lambda path: (path.is_dir(), path.name)):
            name = path.name + "/" * path.is_dir()
            found.append(f"{'    ' * depth + name:<34}  {phrase(path)}".rstrip())
            if path.is_dir() and path.relative_to(ROOT).as_posix() not in CLOSED:
                found += walk(path, depth + 1)
        return found

    tree = []
    for top in SHOWN:
        tree.append(f"{top + '/':<34}  {phrase(ROOT / top)}")
        tree += [] if top in CLOSED else walk(ROOT / top, 1)
    return tree


def document(text: str) -> str:
    """The document with today's tree between its markers."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n```text\n" + "\n".join(lines()) + f"\n```\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(*lines(), sep="\n")
