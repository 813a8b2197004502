"""What holds for every test, however pytest is started: no test asks the Hub, and none waits for it."""

import os
import sys
from pathlib import Path

# Tests disturb runs of `benchmarks/kills.py`, and scripts there have no package.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

# Before any test imports huggingface_hub or tokenizers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokenizer threads and forked data-loader workers do not go together.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: idle threads sleep. Spinning ones cost tiny models on a busy machine 208 s instead
# of 52 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A test means the same on every machine. Where kernels are to be shown: CUDA_VISIBLE_DEVICES=0
# (CONTRIBUTING.md).
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not Path("/dev/nvidia0").exists():  # else DeepSpeed, once installed, says on stdout that it found none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
