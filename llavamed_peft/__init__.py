"""The LLaVA-Med curriculum for any Hugging Face LLaVA checkpoint, as swappable PEFT stage adapters.

>>> from llavamed_peft import curriculum_finetune, LLAVA_MED

Importing this package imports no torch and has no effect; what needs torch is imported when it is first asked
for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .conversations import Conversation, Question, Turn
from .llava_med import LLAVA_MED, LLAVA_MED_FULL
from .stages import Curriculum, LoraSpec, Schedule, Stage
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters import StageAdapter, load_stage
    from .curriculum import curriculum_finetune

__all__ = [
    "LLAVA_MED",
    "LLAVA_MED_FULL",
    "Conversation",
    "Curriculum",
    "LoraSpec",
    "Question",
    "Schedule",
    "Stage",
    "StageAdapter",
    "Turn",
    "curriculum_finetune",
    "load_stage",
]

_NEEDS_TORCH = {"curriculum_finetune": "curriculum", "StageAdapter": "adapters", "load_stage": "adapters"}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(f".{_NEEDS_TORCH[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEEDS_TORCH])
