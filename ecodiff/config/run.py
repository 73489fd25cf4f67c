"""The whole configuration: everything a run depends on, checked before anything starts.

`config/config.yaml` explains each key by example; `workflow/schemas/config.schema.json`
is what `python -m ecodiff.config.run` prints. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ecodiff.config.ablations import Ablation, AblationSettings
from ecodiff.config.checks import Mistake, missing, mistakes
from ecodiff.config.reading import Document, merged, read_document, read_settings
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
from ecodiff.runtime.errors import UserError


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
    variants: Annotated[tuple[VariantSettings, ...], Field(min_length=1)]
    """Beside the dense model."""
    prompts: Annotated[dict[Name, PromptSet], Field(min_length=1)]
    calibrate: CalibrateSettings = CalibrateSettings()
    mask: MaskSettings = MaskSettings()
    prune: PruneSettings = PruneSettings()
    retrain: RetrainSection = RetrainSection()
    generate: GenerateSettings = GenerateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
    ablations: AblationSettings | None = None
    """null: none."""
    allow_overlap: bool = False
    """Let a model be judged on prompts or noise that it learned from; results then look better than
    they are."""

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

    def ablations_of(self, model: str) -> list[Ablation]:
        """The points of a model's sweep; none without the section."""
        return self.ablations.points(self.models[model].mask) if self.ablations else []

    def variants_of(self, model: str) -> list[Variant]:
        """The variants of a model, the dense one first."""
        families = [v for v in self.variants if v.models is None or model in v.models]
        return [Variant(), *(variant for family in families for variant in family.variants())]


def load_config(source: str | Path | Mapping[str, Any] | Document) -> Config:
    """A config from a YAML file, or from its contents.

    Raises:
        UserError: with a line for each thing that is wrong: file, line, key, what is allowed.
    """
    if not isinstance(source, Document):
        values = isinstance(source, Mapping)
        source = Document(source) if values else read_document(Path(str(source)))
    config = read_settings(Config, source)
    _raise_all(mistakes(config), source)
    return config


def load_planned(values: Mapping[str, Any], files: Sequence[str | Path]) -> Config:
    """The config of a run that is to begin: the files that it names are there, too.

    Args:
        values: what Snakemake read of `files`, `--config` put over it.
        files: where it was read; messages name the lines of the last one.

    Raises:
        UserError: what `load_config` raises, or a file or folder is not there.
    """
    documents = [read_document(Path(file)) for file in files]  # finds keys that stand there twice
    last = documents[-1] if documents else Document(None)
    document = Document(values, last.name, last.lines)
    config = load_config(document)
    _raise_all(missing(config), document)
    return config


def _raise_all(found: Iterable[Mistake], document: Document) -> None:
    """Raise `UserError` with a line for each mistake; do nothing when there is none."""
    lines = dict.fromkeys(f"{document.where(path)}: {message}" for path, message in found)
    if lines:
        raise UserError("\n".join(lines))


def schema() -> str:
    """The JSON schema of the config, for editors and for the documentation."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
