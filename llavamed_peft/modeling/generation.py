"""Where stock `generate` stops: at the token that ends an answer in training.

A base's `generation_config.json` may not hold it (a ChatML model under a configuration that says `</s>`);
then generation would never end.
"""

from __future__ import annotations

import torch
from transformers import ProcessorMixin

from .parts import bare
from .templates import read_template


def stop_token_ids(model: torch.nn.Module, processor: ProcessorMixin) -> list[int]:
    """Tokens that end an answer: the model's own EOS, and what the chat template puts after an answer."""
    own = bare(model).generation_config.eos_token_id
    known = [own] if isinstance(own, int) else own or []
    return sorted({*known, *read_template(processor).stop_tokens(processor).values()})


def set_stops(model: torch.nn.Module, processor: ProcessorMixin) -> None:
    """Let `generate` stop there too, in place; what the model's generation configuration holds stays."""
    config, stops = bare(model).generation_config, stop_token_ids(model, processor)
    if config.eos_token_id not in (stops, *(stops if len(stops) == 1 else ())):
        config.eos_token_id = stops
