"""The architecture, held by a test: who may import whom, what stays free of torch, and what an import of the
package does.

Read from the source text (AST), so that imports inside functions and under `TYPE_CHECKING` count as well: a
layer that needs a higher one for a type alone still leans on it. The layers are the table in CONTRIBUTING.md.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import llavamed_peft

PACKAGE = Path(llavamed_peft.__file__).parent
CONTRIBUTING = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


class Layer(NamedTuple):
    """A row of CONTRIBUTING's table."""

    number: int
    may_import: frozenset[str]  # units of the package
    may_use_torch: bool


def read_layers(text: str) -> dict[str, Layer]:
    """Unit of the package (a folder, or a module at its top) -> its row of the table."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\| *\d+ *\|.*\|$", text, re.MULTILINE)
    ]
    names = {tuple(re.findall(r"`(\w+)`", unit)): (number, unit, may) for number, unit, may in rows}
    values = next(units for units, (number, *_) in names.items() if number == "0")
    layers: dict[str, Layer] = {}
    for units, (number, _, may) in names.items():
        below = {name for others, (other, *_) in names.items() if int(other) < int(number) for name in others}
        allowed = below if "anything below" in may else set(re.findall(r"`(\w+)`", may))
        if "values" in may or "each other" in may:
            allowed |= set(values)
        torch = "no torch" not in may
        layers |= {
            name: Layer(int(number), frozenset(allowed), torch)
            for name in (units if number == "0" else units[:1])
        }
    return layers


LAYERS = read_layers(CONTRIBUTING)
NO_TORCH = {unit for unit, layer in LAYERS.items() if not layer.may_use_torch}
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "peft",
    "torch",
    "torchvision",
    "transformers",
    "triton",
    "trl",
}
# Where a folder may use these packages and nothing else that has to be installed.
THIRD_PARTY = {"storage": {"PIL", "numpy", "pydicom", "safetensors"}}

PUBLIC = {
    *("curriculum_finetune", "Curriculum", "Stage", "Schedule", "LoraSpec", "LLAVA_MED", "LLAVA_MED_FULL"),
    *("StageAdapter", "load_stage", "Conversation", "Turn", "Question"),
}


class Import(NamedTuple):
    """One imported name, absolute: `from ..errors import DataError` in `datasets/vqa.py` has target
    `llavamed_peft.errors`."""

    file: str
    line: int
    target: str
    name: str | None

    @property
    def place(self) -> str:
        return f"llavamed_peft/{self.file}:{self.line}"

    @property
    def unit(self) -> str:
        """The module or subpackage that holds the import, as `LAYERS` names it."""
        return unit_of(self.file)

    @property
    def imported_unit(self) -> str | None:
        """The imported unit of this package; "" for the package itself, None for what is installed."""
        top, _, rest = self.target.partition(".")
        if top != "llavamed_peft":
            return None
        return rest.partition(".")[0] or (self.name if self.name in LAYERS else "")


def unit_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"), file)


def imports_in(file: str, root: ast.AST | None = None) -> Iterator[Import]:
    package = ["llavamed_peft", *Path(file).parts[:-1]]
    for node in ast.walk(root or tree_of(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(file, node.lineno, target, alias.name)


def package_imports() -> list[Import]:
    """Every import of every module in `LAYERS`, so not of the package's own `__init__`, which is the face of
    all layers."""
    return [found for file in files() if unit_of(file) in LAYERS for found in imports_in(file)]


def test_the_table_is_read_completely() -> None:
    assert len(LAYERS) == 20
    assert LAYERS["batches"] == Layer(
        5, LAYERS["storage"].may_import | {"storage", "reporting", "datasets", "packing"}, True
    )
    assert {unit for unit in LAYERS if LAYERS[unit].number == 0} == LAYERS["errors"].may_import
    for unit, layer in LAYERS.items():
        assert layer.may_import <= set(LAYERS)
        higher = {other for other in layer.may_import if LAYERS[other].number >= layer.number > 0}
        assert not higher, f"CONTRIBUTING's table lets {unit} import {sorted(higher)}, which are not below it"


def test_every_folder_has_a_layer() -> None:
    units = {unit_of(file) for file in files()} - {"__init__"}
    assert not set(LAYERS) - units, "in CONTRIBUTING's table, and not in the package"
    homeless = sorted(units - set(LAYERS))
    assert not homeless, f"{homeless} have no layer. Add each to the table in CONTRIBUTING.md."


def test_imports_point_downwards() -> None:
    wrong = []
    for found in package_imports():
        target = found.imported_unit
        if target is None or target == found.unit:
            continue  # installed, or its own
        if target == "":
            wrong.append(f"{found.place} imports {found.name or found.target} from the package's top")
        elif target in LAYERS and target not in LAYERS[found.unit].may_import:
            wrong.append(
                f"{found.place}: {found.unit} may not import {target}; see the table in CONTRIBUTING.md"
            )
    assert not wrong, "\n".join(wrong)


def test_no_two_units_import_each_other() -> None:
    left = {
        unit: {found.imported_unit for found in package_imports() if found.unit == unit} - {unit}
        for unit in LAYERS
    }
    # Take away what imports nothing that is left, and what nothing left imports, until only circles remain.
    while outside := [
        unit
        for unit in left
        if left[unit].isdisjoint(left) or not any(unit in targets for targets in left.values())
    ]:
        for unit in outside:
            del left[unit]
    assert not left, f"a circle of imports among {', '.join(left)}"


def test_what_needs_no_torch_imports_none() -> None:
    wrong = [
        f"{found.place} imports {found.target}; {found.unit} is to work without torch"
        for found in package_imports()
        if found.unit in NO_TORCH and found.target.partition(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_with_few_dependencies_keep_them_few() -> None:
    wrong = []
    for found in package_imports():
        top = found.target.partition(".")[0]
        installed = top not in sys.stdlib_module_names and top != "llavamed_peft"
        if installed and top not in THIRD_PARTY.get(found.unit, {top}):
            wrong.append(
                f"{found.place} imports {top}; {found.unit} may use {sorted(THIRD_PARTY[found.unit])} only"
            )
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_values_only() -> None:
    """`__init__` reaches upwards under `TYPE_CHECKING` and in `__getattr__` alone."""
    at_import = [
        node for node in tree_of("__init__.py").body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    units = {found.imported_unit for node in at_import for found in imports_in("__init__.py", node)} - {None}
    assert {LAYERS[unit].number for unit in units} == {0}


def test_public_names() -> None:
    assert set(llavamed_peft.__all__) == PUBLIC
    assert len(llavamed_peft.__all__) == len(PUBLIC) <= 12, "the public surface is at most a dozen names"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_there(name: str) -> None:
    assert getattr(llavamed_peft, name) is not None
    assert name in dir(llavamed_peft)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'llavamed_peft' has no attribute 'finetune'"):
        llavamed_peft.finetune  # noqa: B018


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process with few environment variables: an import in this one may already have set
    some."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent, env=environment
    )


def test_importing_the_package_has_no_effect() -> None:
    code = f"""
import json, os, sys
environment = dict(os.environ)
import llavamed_peft
changed = dict(os.environ) != environment
heavy = sorted({HEAVY!r} & set(sys.modules))
sys.__stdout__.write(json.dumps([changed, heavy]) + "\\n")
"""
    done = run_fresh(code)
    lines = done.stdout.splitlines()
    assert (len(lines), done.stderr) == (1, ""), "importing the package printed something"
    changed, heavy = json.loads(lines[0])
    assert not changed, "importing the package changed os.environ"
    assert not heavy, f"importing the package imported {heavy}"


def test_value_layers_run_without_torch() -> None:
    """As above, for what the modules import in turn (a third party may import torch, too)."""
    modules = sorted(
        ".".join(["llavamed_peft", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        for file in files()
        if unit_of(file) in NO_TORCH
    )
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*({HEAVY!r} & set(sys.modules)))"
    )
    done = run_fresh(code)
    assert done.stdout.strip() == "", f"importing {', '.join(modules)} also imports {done.stdout.strip()}"


def test_no_broad_except() -> None:
    wrong = []
    for file in files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(
                    kind is None or ast.unparse(kind).split(".")[-1] in ("Exception", "BaseException")
                    for kind in caught
                ):
                    wrong.append(f"llavamed_peft/{file}:{node.lineno}")
    # Where a script ends, and turns whatever came into a sentence
    wrong = [
        place
        for place in wrong
        if not place.startswith(("llavamed_peft/cli/main.py", "llavamed_peft/cli/launching.py"))
    ]
    assert not wrong, f"name the errors that are expected, at {', '.join(wrong)}"


def test_no_file_without_a_concept() -> None:
    nameless = {"common", "helper", "helpers", "misc", "util", "utils"}
    wrong = [file for file in files() if nameless & set(Path(file).with_suffix("").parts)]
    assert not wrong, f"{wrong}: a function without a home is a missing concept"
