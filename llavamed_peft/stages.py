"""What to train, as values: `Schedule`, `LoraSpec`, `Stage`, `Curriculum`.

Everything that changes the result of a run is here, and so in the `stage.json` that the run leaves; how a
run is computed (device batches, dtypes, workers) is a keyword of `curriculum_finetune`. No torch is imported.

Numbers come from LLaVA-Med (arXiv:2306.00890) where a comment names a section or table of it, else from the
source it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import ConfigError, did_you_mean, nearest
from .yaml12 import Yaml12Dumper, read_yaml

SCOPES = ("projector", "lora", "full")
SHUFFLES = ("images", "conversations")
ASPECT_RATIOS = ("pad", "checkpoint")
# Not hidden, no space at either end, nothing that a file system or a control character makes special.
_FOLDER_NAME = re.compile(r"""(?![.\s])[^/\\:*?"<>|\x00-\x1f\x7f]+(?<!\s)""")
MAX_NAME_BYTES = 200  # a file system holds 255, and files of a stage have its name and some more
Scope = Literal["projector", "lora", "full"]
Shuffle = Literal["images", "conversations"]
AspectRatio = Literal["pad", "checkpoint"]
Value = TypeVar("Value")


def _number(
    owner: object,
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> None:
    """Check that a field is a finite number in a range; an error names field, value and what was wanted."""
    value = getattr(owner, name)
    wanted = "a number"
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )
    if above is not None:
        wanted, good = f"{wanted} above {above:g}", good and value > above
    if at_least is not None:
        wanted, good = f"{wanted} of at least {at_least:g}", good and value >= at_least
    if below is not None:
        wanted, good = f"{wanted} and below {below:g}", good and value < below
    if not good:
        raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; wanted {wanted}.")


def _whole(owner: object, name: str, *, at_least: int) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(
            f"{type(owner).__name__}.{name} is {value!r}; wanted a whole number of at least {at_least}."
        )


def _one_of(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise ConfigError(
            f"{type(owner).__name__}.{name} is {value!r}; wanted one of {', '.join(allowed)}.{hint}"
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast a stage learns: AdamW, linear warm-up, then cosine to zero (LLaVA-Med appendix;
    LLaVA's recipe).

    Args:
        epochs: passes over the data; a fraction is allowed.
        learning_rate: peak rate of what the stage trains (in a projector stage: of the projector).
        projector_learning_rate: peak rate of the projector in a `lora` or `full` stage; `None` means
            `learning_rate`.
        global_batch: conversations per optimizer step, over all devices and however they are laid out.
        warmup_ratio: share of the steps over which the rate rises from zero.
        weight_decay: AdamW's decoupled decay.
        max_length: tokens, image tokens included; a longer conversation is rejected by name, never cut.
            LLaVA-NeXT's tiles make up to about 2,900 tokens an image: use 4096 there, 8192 for
            LLaVA-OneVision.
        shuffle: `"images"` draws images, each with all its conversations: packed, an image is then there once
            in a step. A step shows fewer images for it, so its gradient is noisier; benchmarks/LOG.md has
            what that did to scores. `"conversations"` is the paper's plain shuffling, in which they fall
            together by chance alone.

    Raises:
        ConfigError: a field out of its range; the message names field, value and what was wanted.
    """

    epochs: float
    learning_rate: float
    projector_learning_rate: float | None = None
    global_batch: int = 128
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 2048
    shuffle: Shuffle = "images"

    def __post_init__(self) -> None:
        _number(self, "epochs", above=0)
        _number(self, "learning_rate", above=0)
        if self.projector_learning_rate is not None:
            _number(self, "projector_learning_rate", above=0)
        _whole(self, "global_batch", at_least=1)
        _number(self, "warmup_ratio", at_least=0, below=1)
        _number(self, "weight_decay", at_least=0)
        _whole(self, "max_length", at_least=2)
        _one_of(self, "shuffle", SHUFFLES)


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Low-rank adapters (arXiv:2106.09685) on every linear of the language model: W + (alpha / rank) · B A.

    Args:
        rank: rows of A [rank, in] and columns of B [out, rank]. Default: LLaVA's own LoRA recipe.
        alpha: numerator of the scale. Default: LLaVA's own LoRA recipe.
        dropout: probability with which an input of A is zeroed in training. Default: LLaVA's own LoRA recipe.

    Raises:
        ConfigError: a field out of its range.
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        _whole(self, "rank", at_least=1)
        _number(self, "alpha", above=0)
        _number(self, "dropout", at_least=0, below=1)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what is trained, and how.

    Args:
        name: free; it names the stage's folder and its key in `data`.
        trains: `"projector"` (the projector alone), `"lora"` (LoRA on every linear of the language model,
            `lm_head` not, plus the projector in full) or `"full"` (projector, language model and `lm_head`).
            The vision tower is always frozen, and so is LLaVA-NeXT's `image_newline`, which stock PEFT cannot
            carry.
        schedule: how long and how fast.
        lora: only for `trains="lora"`; `None` there means `LoraSpec()`.

    Raises:
        ConfigError: a name that cannot be a folder, an unknown scope, a `lora` where none is trained.
    """

    name: str
    trains: Scope
    schedule: Schedule
    lora: LoraSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _FOLDER_NAME.fullmatch(self.name) or len(self.name) > 100:
            raise ConfigError(f"Stage.name is {self.name!r}; wanted a plain folder name such as 'align'.")
        written = self.name.encode(errors="replace")
        if len(written) > MAX_NAME_BYTES or written.decode() != self.name:
            raise ConfigError(
                f"Stage.name is {self.name!r}, {len(written)} bytes in UTF-8; wanted a name that any disk "
                f"can hold, of at most {MAX_NAME_BYTES} bytes and of characters that can be written."
            )
        _one_of(self, "trains", SCOPES)
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(f"Stage.schedule is {self.schedule!r}; wanted a Schedule.")
        if self.trains == "lora" and self.lora is None:
            object.__setattr__(self, "lora", LoraSpec())
        if self.lora is not None and not isinstance(self.lora, LoraSpec):
            raise ConfigError(f"Stage.lora is {self.lora!r}; wanted a LoraSpec or None.")
        if self.trains == "projector" and self.schedule.projector_learning_rate is not None:
            raise ConfigError(
                f"Stage {self.name!r}: Schedule.projector_learning_rate is "
                f"{self.schedule.projector_learning_rate!r}; wanted None, since in a projector stage "
                "learning_rate is the projector's."
            )
        if self.trains != "lora" and self.lora is not None:
            raise ConfigError(
                f"Stage.lora is given, but stage {self.name!r} trains {self.trains!r}; wanted None or "
                "trains='lora'."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, as YAML and `stage.json` hold it."""
        plain = asdict(self)
        if self.lora is None:
            del plain["lora"]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], where: str = "stage") -> Stage:
        """The inverse of `to_dict`; an unknown key names the nearest known one.

        Raises:
            ConfigError: an unknown or missing key, or a value out of range; `where` says which stage.
        """
        values = _known(cls, plain, where)
        values["schedule"] = _build(Schedule, values["schedule"], f"{where}.schedule")
        if values.get("lora") is not None:
            values["lora"] = _build(LoraSpec, values["lora"], f"{where}.lora")
        return _make(cls, values, where)


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Stages in order, and what holds for all of them.

    Args:
        stages: at least one, names unique. Two LoRA stages with no `full` stage between them share one rank
            and alpha, since their tensors are one lineage.
        seed: of the order of the data, of LoRA's initialisation and of dropout.
        image_aspect_ratio: what happens to an image that is not square, where the checkpoint shows one square
            per image (LLaVA, ViP-LLaVA). `"pad"` pads it to a square with the processor's mean colour, so
            that nothing of a radiograph is lost (as LLaVA-1.5 was trained); `"checkpoint"` leaves the
            checkpoint's own processor alone, which for CLIP crops the borders. LLaVA-NeXT and OneVision cut
            any shape into tiles; nothing changes there. The stage's processor carries the choice.

    Raises:
        ConfigError: no stages, equal names, LoRA stages that do not fit one another.
    """

    stages: tuple[Stage, ...]
    seed: int = 42
    image_aspect_ratio: AspectRatio = "pad"

    def __post_init__(self) -> None:
        stages = tuple(self.stages) if isinstance(self.stages, Iterable) else (None,)
        if not all(isinstance(stage, Stage) for stage in stages):
            raise ConfigError(f"Curriculum.stages is {self.stages!r}; wanted a tuple of Stage.")
        object.__setattr__(self, "stages", stages)
        if not self.stages:
            raise ConfigError("Curriculum.stages is empty; wanted at least one Stage.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"Curriculum.stages has equal names: {', '.join(names)}; wanted each name once."
            )
        _whole(self, "seed", at_least=0)
        if self.seed >= 2**32:
            raise ConfigError(f"Curriculum.seed is {self.seed!r}; wanted a whole number below 2**32.")
        _one_of(self, "image_aspect_ratio", ASPECT_RATIOS)
        lineage: Stage | None = None
        for stage in self.stages:
            if stage.trains == "full":
                lineage = None
            elif stage.lora is not None:
                if lineage is not None:
                    require_same_lora(lineage, stage)
                lineage = stage

    def __getitem__(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            KeyError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"no stage {name!r}.{did_you_mean(str(name), [stage.name for stage in self.stages])}")

    def check_keys(self, argument: str, keys: Iterable[str]) -> None:
        """What is given by stage is given for stages of this curriculum.

        Raises:
            ConfigError: a key is none of them; the message names the argument.
        """
        names = [stage.name for stage in self.stages]
        for key in keys:
            if key not in names:
                raise ConfigError(
                    f"{argument} has the key {key!r}, which is no stage of the "
                    f"curriculum.{did_you_mean(str(key), names)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return {
            "seed": self.seed,
            "image_aspect_ratio": self.image_aspect_ratio,
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], where: str = "curriculum") -> Curriculum:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown or missing key, or a value out of range.
        """
        values = _known(cls, plain, where)
        stages = values["stages"]
        if not isinstance(stages, (list, tuple)):
            raise ConfigError(f"{where}.stages is {stages!r}; wanted a list of stages.")
        values["stages"] = tuple(
            Stage.from_dict(stage, f"{where}.stages[{i}]") for i, stage in enumerate(stages)
        )
        return _make(cls, values, where)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The curriculum as YAML text; also written to `path` if one is given."""
        text: str = yaml.dump(self.to_dict(), Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Curriculum:
        """Read a curriculum from a YAML file, or from YAML text (a string with a line break in it).

        Raises:
            ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value out
                of range.
        """
        is_text = isinstance(source, str) and "\n" in source
        where = "curriculum" if is_text else str(source)
        try:
            text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read ({error}); wanted a YAML file of stages.") from error
        return cls.from_dict(read_yaml(text, where), where)


def require_same_lora(earlier: Stage, later: Stage) -> None:
    """Two LoRA stages of one lineage continue the same tensors, so rank and alpha must be equal.

    Raises:
        ConfigError: they are not.
    """
    assert earlier.lora is not None and later.lora is not None
    for name in ("rank", "alpha"):
        first, second = getattr(earlier.lora, name), getattr(later.lora, name)
        if first != second:
            raise ConfigError(
                f"Stage {later.name!r} has LoRA {name} {second}, stage {earlier.name!r} before it {first}; "
                "wanted equal numbers, since the later stage continues the earlier one's tensors. Change "
                "one, or put a full stage between them."
            )


def _known(cls: type, plain: object, where: str) -> dict[str, Any]:
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where} is {plain!r}; wanted a mapping with the keys of {cls.__name__}.")
    names = [field.name for field in fields(cls)]
    for key in plain:
        if key not in names:
            raise ConfigError(f"{where} has the unknown key {key!r}.{did_you_mean(str(key), names)}")
    missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in plain]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; {cls.__name__} has no default there.")
    return dict(plain)


def _make(cls: type[Value], values: dict[str, Any], where: str) -> Value:
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _build(cls: type[Value], plain: object, where: str) -> Value:
    return _make(cls, _known(cls, plain, where), where)
