"""The paper's curriculum as values: `LLAVA_MED`, with LoRA in its later stages, and `LLAVA_MED_FULL`, the
paper's own."""

from __future__ import annotations

from .stages import Curriculum, LoraSpec, Schedule, Stage

# The paper's curriculum. Stages 2 and 3 as LoRA are not in the paper; their rates are LLaVA's own LoRA recipe
# (rank 128, alpha 256, dropout 0.05, 2e-4 for LoRA, 2e-5 for the projector). `LLAVA_MED_FULL` is the paper's
# own.
LLAVA_MED = Curriculum(
    stages=(
        # Section 4, stage 1 (concept alignment): projector only, 2e-3, batch 128, 1 epoch over figure-caption
        # pairs
        Stage("align", "projector", Schedule(epochs=1, learning_rate=2e-3, global_batch=128)),
        # Section 4, stage 2 (instruction tuning): batch 128, 3 epochs over the dialogues
        Stage(
            "instruct",
            "lora",
            Schedule(epochs=3, learning_rate=2e-4, projector_learning_rate=2e-5, global_batch=128),
            LoraSpec(),
        ),
        # Section 5.2: "LLaVA-Med from LLaVA" is fine-tuned 15 epochs on each data set, batch 64 (the README's
        # command: 3)
        Stage(
            "vqa",
            "lora",
            Schedule(epochs=15, learning_rate=2e-4, projector_learning_rate=2e-5, global_batch=64),
            LoraSpec(),
        ),
    )
)

LLAVA_MED_FULL = Curriculum(
    stages=(
        # Section 4, stage 1
        Stage(
            "align",
            "projector",
            Schedule(epochs=1, learning_rate=2e-3, global_batch=128, shuffle="conversations"),
        ),
        # Section 4, stage 2: projector and language model, 2e-5, batch 128, 3 epochs
        Stage(
            "instruct",
            "full",
            Schedule(epochs=3, learning_rate=2e-5, global_batch=128, shuffle="conversations"),
        ),
        # Section 5.2: 2e-5, batch 64, 15 epochs from LLaVA
        Stage(
            "vqa", "full", Schedule(epochs=15, learning_rate=2e-5, global_batch=64, shuffle="conversations")
        ),
    )
)
