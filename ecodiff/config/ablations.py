"""Settings of mask learning that are varied one at a time. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ecodiff.config.sections import (
    LearningRates,
    MaskSettings,
    Name,
    NonEmpty,
    Settings,
    Share,
)

DEFAULT = "default"


@dataclass(frozen=True)
class Ablation:
    """One point of a sweep: a mask learned with one setting changed, or with none.

    Attributes:
        setting: the key that was changed; `default` for none.
        value: what it was changed to.
        sparsity: what the mask is learned for.
        settings: all settings that it is learned with.
        changes: those that differ from the model's.
    """

    setting: str
    value: Any
    sparsity: float
    settings: MaskSettings
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder, such as `noise-floor-0.2`."""
        if self.setting == DEFAULT:
            return DEFAULT
        return f"{self.setting}-{self.value}".replace("_", "-")


class AblationSettings(Settings):
    """What `snakemake ablations` varies, and how the masks are judged."""

    prompts: Name
    """The prompt set on which masks are judged; not the one they are learned on."""
    sparsity: Share = 0.2
    """What masks are learned for."""
    judged_at: NonEmpty[Share] = (0.1, 0.2, 0.3)
    """The sparsities at which each mask's scores are judged."""
    vary: dict[str, NonEmpty[Any]]
    """Keys of the section `mask`, and `sparsity`: the values that each takes, one key at a time;
    `lr`: the same for all kinds."""

    def points(self, base: MaskSettings) -> list[Ablation]:
        """All points of the sweep around a model's settings, the default first.

        Raises:
            pydantic.ValidationError: a key or value that the section `mask` does not allow.
        """
        found = [Ablation(DEFAULT, None, self.sparsity, base)]
        for key, values in self.vary.items():
            for value in values:
                if key == "sparsity":
                    found.append(Ablation(key, value, value, base))
                    continue
                rates = dict.fromkeys(LearningRates.model_fields, value)
                changes = {key: rates if key == "lr" else value}
                settings = MaskSettings.model_validate({**base.model_dump(), **changes})
                found.append(Ablation(key, value, self.sparsity, settings, changes))
        return found
