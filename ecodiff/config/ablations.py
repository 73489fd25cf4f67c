"""Ablations: masks learned with one setting changed at a time. Imports no torch."""

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
    """One mask of a sweep: learned with one setting changed, or with none.

    Attributes:
        setting: the key that is changed; `default` for none.
        value: its changed value; None for none.
        sparsity: the sparsity that the mask is learned for.
        settings: all settings that it is learned with.
        changes: the settings that differ from the model's, key -> value.
    """

    setting: str
    value: Any
    sparsity: float
    settings: MaskSettings
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder, such as `noise-floor-0.2`."""
        if self.setting == DEFAULT:
            return DEFAULT
        return f"{self.setting}-{self.value}".replace("_", "-")


class AblationSettings(Settings):
    """What `snakemake ablations` varies, and how the masks are judged."""

    prompts: Name
    """Prompt set on which masks are judged, by relative latent error; not the calibration set."""
    sparsity: Share = 0.2
    """Sparsity that masks are learned for."""
    judged_at: NonEmpty[Share] = (0.1, 0.2, 0.3)
    """Sparsities at which each mask is judged, by ranking its scores again."""
    vary: dict[str, NonEmpty[Any]]
    """Key -> values to try, one change at a time. Keys are those of the section `mask`, and
    `sparsity`; a value of `lr` holds for all kinds. Each value is one more mask to learn."""

    def points(self, base: MaskSettings) -> list[Ablation]:
        """All masks of the sweep around a model's settings `base`, the default first.

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
