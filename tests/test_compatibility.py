"""What we call and override of TRL, transformers, PEFT and accelerate: each name, each parameter.

When a new version of one of them fails here, the message says what moved; nothing else has to be searched.
What these calls compute is tested elsewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import accelerate.utils
import peft
import pytest
from accelerate import Accelerator, PartialState
from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import deepspeed
from trl import SFTConfig, SFTTrainer

from llavamed_peft.training.stage import trainer_config
from llavamed_peft.training.trainer import UNDOCUMENTED, StageTrainer

# Methods of the trainer that `StageTrainer` overrides → the parameters that the library calls them with.
OVERRIDDEN = {
    "get_train_dataloader": (),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "create_optimizer": ("model",),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_load_rng_state": ("checkpoint",),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
}
# Methods that `StageTrainer` adds; none may be one of the library's.
ADDED = {
    *("_summed_loss", "_totals", "_sum", "_record_failures"),
    *("asked_to_stop", "save_and_stop", "round_trained"),
}
ANY = object()
# What is called, with the arguments as we give them.
CALLED: dict[Callable[..., Any], tuple[tuple[Any, ...], dict[str, Any]]] = {
    SFTTrainer.__init__: (
        (ANY,),
        dict.fromkeys(
            ("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"), ANY
        ),
    ),
    SFTTrainer.train: ((ANY,), {}),
    SFTTrainer.log: ((ANY, {}), {}),
    SFTTrainer.add_callback: ((ANY, ANY), {}),
    SFTTrainer.remove_callback: ((ANY, ANY), {}),
    SFTTrainer.is_world_process_zero: ((ANY,), {}),
    SFTTrainer.compute_loss_context_manager: ((ANY,), {}),
    SFTTrainer.get_decay_parameter_names: ((ANY, ANY), {}),
    SFTTrainer.get_optimizer_cls_and_kwargs: ((ANY, ANY), {}),
    SFTTrainer._prepare_input: ((ANY, {}), {}),
    TrainerCallback.on_log: ((ANY, ANY, ANY, ANY), {"logs": ANY}),
    TrainerCallback.on_train_begin: ((ANY, ANY, ANY, ANY), {"model": ANY}),
    deepspeed.unset_hf_deepspeed_config: ((), {}),
    Accelerator.reduce: ((ANY, ANY, "sum"), {}),
    Accelerator.no_sync: ((ANY, ANY), {}),
    Accelerator.backward: ((ANY, ANY), {}),
    PartialState.__init__: ((ANY,), {"cpu": True, "timeout": ANY}),
    PartialState.wait_for_everyone: ((ANY,), {}),
    accelerate.utils.gather_object: (([],), {}),
    accelerate.utils.broadcast_object_list: (([],), {}),
    peft.get_peft_model: ((ANY, ANY), {}),
    peft.get_peft_model_state_dict: ((ANY, {}), {"adapter_name": "default", "save_embedding_layers": False}),
    peft.set_peft_model_state_dict: ((ANY, {}), {}),
    PeftModel.from_pretrained: ((ANY, "folder"), {}),
    PeftModel.save_pretrained: ((ANY, "folder"), {}),
    LoraConfig.from_pretrained: (("folder",), {}),
    LoraConfig.save_pretrained: ((ANY, "folder"), {}),
}
FIELDS: dict[type, set[str]] = {
    TrainerState: {"global_step", "epoch", "max_steps", "save_steps", "is_world_process_zero"},
    TrainerControl: {"should_save", "should_evaluate"},
    LoraConfig: {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "modules_to_save",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
    },
}
# Instance attributes, which no signature shows: the source of the trainer's `__init__` must set them.
ATTRIBUTES = (
    "accelerator",
    "args",
    "callback_handler",
    "control",
    "is_deepspeed_enabled",
    "is_distributed_loading_by_transformers",
    "lr_scheduler",
    "model",
    "model_wrapped",
    "optimizer",
    "state",
)


def moved(what: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "peft", "accelerate"))
    return f"{what} ({versions})"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a method, without `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


def own_methods() -> set[str]:
    methods = {name for name, value in vars(StageTrainer).items() if inspect.isfunction(value)}
    return methods - {"__init__"}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_library_has_the_method_that_is_overridden(name: str) -> None:
    library = getattr(Trainer, name, None)  # TRL wraps some of them as (*args, **kwargs)
    assert library is not None, moved(f"Trainer.{name} is gone")
    assert parameters(library) == OVERRIDDEN[name], moved(f"Trainer.{name} has other parameters")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_override_takes_what_the_library_gives(name: str) -> None:
    override = inspect.signature(getattr(StageTrainer, name))
    given = dict.fromkeys(OVERRIDDEN[name], ANY)
    override.bind(ANY, **given) if name != "_maybe_log_save_evaluate" else override.bind(ANY, *given)


def test_every_method_of_the_subclass_is_listed() -> None:
    assert own_methods() == set(OVERRIDDEN) | ADDED
    assert {name for name in OVERRIDDEN if name.startswith("_")} == set(UNDOCUMENTED)
    for name in ADDED:
        assert not hasattr(SFTTrainer, name), moved(f"SFTTrainer has a {name} of its own now")


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__qualname__)
def test_what_is_called_takes_our_arguments(function: Callable[..., Any]) -> None:
    arguments, settings = CALLED[function]
    try:
        inspect.signature(function).bind(*arguments, **settings)
    except TypeError as error:
        pytest.fail(moved(f"{function.__qualname__}: {error}"))


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_the_fields_that_are_read_and_set_are_there(kind: type) -> None:
    lacks = FIELDS[kind] - {field.name for field in dataclasses.fields(kind)}
    assert not lacks, moved(f"{kind.__name__} has no {', '.join(sorted(lacks))}")


def test_the_trainers_settings_are_fields_of_its_configuration() -> None:
    call = inspect.getsource(trainer_config).partition("SFTConfig)(")[2]
    given = {
        line.split("=")[0].strip() for line in call.splitlines() if line.startswith(" " * 8) and "=" in line
    }
    assert {"output_dir", "warmup_steps", "activation_checkpointing", "deepspeed"} <= given and len(
        given
    ) > 25
    lacks = given - {field.name for field in dataclasses.fields(SFTConfig)}
    assert not lacks, moved(f"SFTConfig has no {', '.join(sorted(lacks))}")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_trainer_sets_the_attributes_that_are_read(name: str) -> None:
    source = inspect.getsource(Trainer)
    assert f"self.{name} =" in source or f"self.{name}:" in source, moved(f"Trainer sets no self.{name}")


def test_what_is_read_of_the_processes_is_there() -> None:
    state = PartialState()
    assert (state.process_index, state.num_processes, state.is_main_process) == (0, 1, True)
    assert state.device.type in ("cpu", "cuda")
