"""Build the demo's base: a LLaVA checkpoint of 1.6 million parameters, trained from nothing on drawn shapes.

    python recipes/demo/build_base.py --out recipes/demo/tiny-llava

The shipped weights came out of this command in 31 minutes on 2 CPU cores that had other work too (22 minutes
of CPU time):

| held-out scenes | closed (guessing .500) | open | caption loss | dialogue loss |
|---|---|---|---|---|
| general | 0.892 | 0.919 | 0.076 | 0.062 |
| general, images shuffled | 0.488 | 0.239 | 2.158 | 0.618 |
| clinic, never seen | 0.510 | 0.248 | 6.831 | 4.497 |

Its weak point: "Is the bar on the left?" stays near chance (.53, on the 60 scenes watched in training),
though it answers "Which side is the bar on?" (.85). One seed was run; another machine's arithmetic gives
other weights.

It is a base as a curriculum wants one: it can look, caption and answer in its own world (the general scenes
of `scenes.py`) and has never seen a clinic image. Clinic words it knows as text only: questions about a
written report. What it leaves is an ordinary Hugging Face LLaVA checkpoint with its processor.

What made so small a model look at the image before it answers, found by trial and not taken apart piece by
piece: weights drawn with 1/sqrt(width) instead of 0.02; a vision tower that first learns to say what each
patch shows (`PatchProbe`) and keeps doing so; one shape in each scene for the first fifth of the steps;
closed questions beside their opposites; "yes" and "no" weighing four times, open answers twice, the end of an
answer a fifth. Of these the curriculum that follows keeps the pairs only, which are in its data; its loss is
the plain mean. All questions about one image are in one row after a single copy of the image, each blind
to the others.

What is left out: gradient accumulation, bf16, resuming, several devices. The package has them; this script
has only to run once.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

import torch
from base_evaluation import print_table
from base_model import build_model, build_processor
from base_training import PatchProbe, train, warm_up_tower
from scenes import FIRST_SEED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4_500, help="training steps of the whole model")
    parser.add_argument(
        "--tower-steps", type=int, default=800, help="training steps of the vision tower before that"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    seeds = count(FIRST_SEED["base"])
    processor = build_processor()
    model = build_model(processor)
    probe = PatchProbe()
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens", flush=True)

    warm_up_tower(model, probe, processor, seeds, options.tower_steps)
    train(model, probe, processor, seeds, options.steps)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print_table(model, processor)


if __name__ == "__main__":
    main()
