# `demo`, `test` and `check` build .venv themselves: the first time takes the network and some minutes, later times neither.
# Another Python: make demo PYTHON=python3.12. Options for pytest: make test ARGS="-k stages -x".

PYTHON ?= python3
EXTRAS := dicom,distributed,quantization,tracking,dev
IN_VENV := .venv/bin/python
# What .venv is made from. After an install .venv/installed has a copy; while the two agree, nothing is installed.
INGREDIENTS := pwd; echo "$(EXTRAS)"; cat pyproject.toml constraints.txt

# The demo needs nothing from the Hub, so it does not wait for it. (The tests set the same in tests/conftest.py.)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Idle OpenMP threads sleep instead of spinning: several times faster on a machine that runs something else too.
export OMP_WAIT_POLICY ?= PASSIVE
ifeq ($(wildcard /dev/nvidia0),)
# Otherwise DeepSpeed, once installed, prints in every training that it found no GPU.
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help demo demo-seeds test check tree venv install

help:
	@echo "make demo        the whole curriculum on a tiny checkpoint, then load, swap and ask its stages"
	@echo "make demo-seeds  the same with three seeds, about 14 minutes"
	@echo "make test        every test; options for pytest: ARGS=\"-k stages -x\""
	@echo "make check       format, lint, types of the value layers, layers"
	@echo "make tree        renew the tree in docs/architecture.md, after a file was added"
	@echo "make venv        only build .venv"

demo: venv
	$(IN_VENV) recipes/demo/demo.py

demo-seeds: venv
	$(IN_VENV) recipes/demo/demo.py --seeds 0 1 2 --output_dir runs/demo-seeds

# Two processes share the test files, since long tests wait more than they compute. With one: make test ARGS="-n 0"
test: venv
	$(IN_VENV) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

tree: venv
	$(IN_VENV) docs/tree.py --write

check: venv
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy
	$(IN_VENV) -m pytest tests/test_layers.py

venv:
	@test -x $(IN_VENV) && test "$$($(INGREDIENTS))" = "$$(cat .venv/installed 2>/dev/null)" || $(MAKE) --no-print-directory install

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); the tested transformers and trl need Python 3.11 or newer. Try: make PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Building .venv, once: torch and about a hundred packages."
	@rm -f .venv/installed
	$(PYTHON) -m venv .venv
	$(IN_VENV) -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@{ $(INGREDIENTS); } > .venv/installed.new && mv .venv/installed.new .venv/installed
