"""Checkpoint files by themselves: optimizer state, random numbers, which one is taken."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from llavamed_peft.errors import TrainingError
from llavamed_peft.training.checkpoints import (
    KEPT,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

# Checkpoints


@pytest.fixture
def network() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}], lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_optimizer_state_finds_its_parameters_by_name(
    network: tuple[torch.nn.Module, torch.optim.Optimizer],
) -> None:
    model, optimizer = network
    tensors = optimizer_tensors(model, optimizer)
    assert set(tensors) == {
        f"{layer}.{part}/{entry}"
        for layer in "01"
        for part in ("weight", "bias")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    other = torch.optim.AdamW(
        [{"params": [parameter]} for parameter in reversed(list(model.parameters()))], lr=0.1
    )
    load_optimizer_tensors(model, other, tensors)
    assert other.state.keys() == optimizer.state.keys()
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[entry], other.state[parameter][entry]) for entry in state)
    with pytest.raises(
        TrainingError, match=r"holds optimizer state of 1 parameter\(s\) that do not train \(2.weight\)"
    ):
        load_optimizer_tensors(model, other, {"2.weight/exp_avg": torch.zeros(1)})


def test_random_numbers_continue_where_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.normal(), torch.randn(()).item()

    draw()
    state = json.loads(json.dumps(rng_state()))
    drawn = draw(), draw()
    set_rng_state(state)
    assert (draw(), draw()) == drawn


def test_two_checkpoints_are_kept_and_the_newest_intact_one_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        size = save_checkpoint(
            tmp_path, step, {"a": torch.ones(step)}, {"a/exp_avg": torch.zeros(2)}, {"history": [step]}
        )
    assert KEPT == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert size == sum(path.stat().st_size for path in (tmp_path / "step-11").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 11 and found.state == {"history": [11]}
    assert torch.equal(found.tensors()["a"], torch.ones(11)) and torch.equal(
        found.optimizer()["a/exp_avg"], torch.zeros(2)
    )
    state = tmp_path / "step-11" / "state.json"
    state.write_text(state.read_text().replace("11", "12"))
    with pytest.warns(
        UserWarning,
        match=r"state\.json: its content is not what was written\. Removed, since damaged\. The ",
    ):
        assert newest_checkpoint(tmp_path).step == 10
    (tmp_path / "step-10" / "checkpoint.json").write_text("{")
    with pytest.warns(
        UserWarning, match=r"checkpoint\.json: cannot be read \(.*This stage has no checkpoint"
    ):
        assert newest_checkpoint(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
