"""docs/architecture.md shows the tree that is on disk, with a phrase for each file of the package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import tree


def test_the_document_shows_the_tree_on_disk() -> None:
    text = tree.DOCUMENT.read_text(encoding="utf-8")
    assert text == tree.document(text), "run make tree"


def test_every_module_says_what_it_is() -> None:
    modules = [
        path for path in tree.files() if path.suffix == ".py" and path.parts[len(ROOT.parts)] != "tests"
    ]
    assert len(modules) > 80
    wrong = [str(path) for path in modules if not 10 <= len(tree.phrase(path)) <= 160]
    assert not wrong, f"{wrong}: the docstring's first sentence is the file's phrase in the tree"
