"""What holds for every test, however pytest is started: no test asks the Hub, and none waits for it."""

import os

# Before any test imports huggingface_hub or tokenizers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads and forked data-loader workers do not go together
