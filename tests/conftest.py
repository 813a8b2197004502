"""What holds for every test, however pytest is started: no test asks the Hub, and none waits for it."""

import os
from pathlib import Path

# Before any test imports huggingface_hub or tokenizers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # tokenizer threads and forked data-loader workers do not go together
# Before torch is imported: idle threads sleep. Spinning ones cost tiny models on a busy machine 208 s instead
# of 52 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A test means the same on every machine. Where kernels are to be shown: CUDA_VISIBLE_DEVICES=0
# (CONTRIBUTING.md).
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not Path(
    "/dev/nvidia0"
).exists():  # DeepSpeed, once installed, otherwise says on stdout of every training that it found none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
