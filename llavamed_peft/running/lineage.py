"""Where a stage begins: its base, and the stage it continues."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters.record import Base, Parent
from ..adapters.stage_adapter import StageAdapter
from ..modeling.load import read_config
from ..modeling.scopes import NO_TARGET
from ..stages import LoraSpec


def carried_lora(parent: StageAdapter | None) -> LoraSpec | None:
    """The LoRA that a projector stage carries, frozen and without dropout, from the stage before it."""
    config = None if parent is None else parent.peft_config()
    if config is None or config.target_modules == NO_TARGET or config.target_modules == {NO_TARGET}:
        return None
    return LoraSpec(rank=config.r, alpha=config.lora_alpha, dropout=0.0)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a stage begins: the checkpoint its tensors sit on, and the adapter they continue.

    Args:
        base: Hub id or folder of that checkpoint.
        identity: what identifies it, for `stage.json`.
        root: what identifies the checkpoint that the lineage began with, before any full stage.
        parent: the stage before, an adapter or a checkpoint.
    """

    base: str
    identity: Base
    root: Base
    parent: StageAdapter | None = None

    def after(self, stage: StageAdapter | None) -> Lineage:
        """The lineage after a finished stage; a full stage's checkpoint is the base of what follows it."""
        if stage is None:
            return self
        if stage.is_checkpoint:
            # its hash was checked when it was loaded
            base = Base.of(stage.path, read_config(stage.path), stage.record.sha256)
            return Lineage(str(stage.path), base, stage.record.root or stage.record.base, stage)
        return replace(self, parent=stage)

    @property
    def begins_with(self) -> dict[str, str | None]:
        """The content hashes of base and parent, as far as they are known; checkpoints hold them."""
        return {
            "base": self.identity.sha256,
            "parent": None if self.parent is None else self.parent.record.sha256,
        }

    @property
    def adapter(self) -> StageAdapter | None:
        """The parent, where its tensors are not in the base already."""
        return None if self.parent is None or self.parent.is_checkpoint else self.parent


def parent_of(lineage: Lineage) -> Parent | None:
    """What the record of the next stage says of the one before it."""
    parent = lineage.parent
    return None if parent is None else Parent(stage=parent.stage.name, sha256=parent.record.sha256)
