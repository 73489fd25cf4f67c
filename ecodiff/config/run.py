"""The whole configuration: everything a run depends on, checked before anything starts.

`config/config.yaml` explains each key by example; `workflow/schemas/config.schema.json`
is what `python -m ecodiff.config.run` prints. Imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ecodiff.config.ablations import Ablation, AblationSettings
from ecodiff.config.reading import explain, merged, read_settings
from ecodiff.config.sections import (
    CalibrateSettings,
    CallSettings,
    EvaluateSettings,
    GenerateSettings,
    LoadSettings,
    MaskSettings,
    Name,
    PromptSet,
    PruneSettings,
    ReportSettings,
    ResourceSettings,
    RetrainSection,
    Settings,
)
from ecodiff.config.variants import Variant, VariantSettings


class ModelSettings(Settings):
    """One dense model."""

    source: str
    """Hub id or folder of a diffusers pipeline."""
    load: LoadSettings = LoadSettings()
    call: CallSettings
    resources: ResourceSettings = ResourceSettings()
    mask: MaskSettings = MaskSettings()
    """What differs from the section `mask`."""
    retrain: RetrainSection = RetrainSection()
    """What differs from the section `retrain`."""


class Config(Settings):
    """A whole run. The sections are named after the stages."""

    run: Name
    """Results go to `results/<run>/`."""
    models: Annotated[dict[Name, ModelSettings], Field(min_length=1)]
    variants: tuple[VariantSettings, ...]
    """Beside the dense model."""
    prompts: dict[Name, PromptSet]
    calibrate: CalibrateSettings = CalibrateSettings()
    mask: MaskSettings = MaskSettings()
    prune: PruneSettings = PruneSettings()
    retrain: RetrainSection = RetrainSection()
    generate: GenerateSettings = GenerateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
    ablations: AblationSettings | None = None
    """null: none."""

    @model_validator(mode="before")
    @classmethod
    def _models_inherit(cls, data: Any) -> Any:
        """Puts the sections `mask` and `retrain` under those of each model."""
        if not isinstance(data, Mapping) or not isinstance(data.get("models"), Mapping):
            return data
        shared = {key: data.get(key) or {} for key in ("mask", "retrain")}
        models = {
            name: {**model, **{key: merged(shared[key], model.get(key)) for key in shared}}
            if isinstance(model, Mapping)
            else model
            for name, model in data["models"].items()
        }
        return {**data, "models": models}

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        wanted = {"calibrate": self.calibrate.prompts, "evaluate": self.evaluate.prompts}
        for kind in ("lora", "full"):
            wanted[f"retrain.{kind}"] = getattr(self.retrain, kind).prompts or wanted["calibrate"]
        if self.ablations:
            wanted["ablations"] = self.ablations.prompts
        for section, name in wanted.items():
            if name not in self.prompts:
                raise ValueError(
                    f"{section}.prompts: no prompt set {name!r}; there are {list(self.prompts)}"
                )
        unknown = {m for v in self.variants for m in v.models or ()} - set(self.models)
        if unknown:
            raise ValueError(f"variants: no model {min(unknown)!r}; there are {list(self.models)}")
        for model in self.models:
            name, times = Counter(v.name for v in self.variants_of(model)).most_common(1)[0]
            if times > 1:
                raise ValueError(f"variants: {name} is named twice for {model}")
        return self

    @model_validator(mode="after")
    def _ablations_are_possible(self) -> Config:
        for model in self.models:
            try:
                names = Counter(point.name for point in self.ablations_of(model))
            except ValidationError as error:
                raise ValueError(f"ablations.vary: {explain(error, MaskSettings)}") from None
            name, times = names.most_common(1)[0] if names else ("", 0)
            if times > 1:
                raise ValueError(f"ablations.vary: {name} is named twice")
        return self

    def ablations_of(self, model: str) -> list[Ablation]:
        """The points of a model's sweep; none without the section."""
        return self.ablations.points(self.models[model].mask) if self.ablations else []

    def variants_of(self, model: str) -> list[Variant]:
        """The variants of a model, the dense one first."""
        families = [v for v in self.variants if v.models is None or model in v.models]
        return [Variant(), *(variant for family in families for variant in family.variants())]


def load_config(source: str | Path | Mapping[str, Any]) -> Config:
    """A config from a YAML file or from its contents; UserError when it is not valid."""
    return read_settings(Config, source)


def schema() -> str:
    """The JSON schema of the config, for editors and for the documentation."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
