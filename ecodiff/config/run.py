"""The whole configuration: everything a run depends on, checked before anything starts.

`config/config.yaml` explains each key by example; `workflow/schemas/config.schema.json`
is what `python -m ecodiff.config.run` prints. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ecodiff.config.ablations import Ablation, AblationSettings
from ecodiff.config.checks import Mistake, missing, mistakes, to_fetch
from ecodiff.config.reading import Document, merged, read_document, read_settings
from ecodiff.config.sections import (
    CalibrateSettings,
    CallSettings,
    EvaluateSettings,
    FilePath,
    GenerateSettings,
    LoadSettings,
    MaskSettings,
    Name,
    PromptSet,
    PruneSettings,
    Recipes,
    ReportSettings,
    ResourceSettings,
    Settings,
)
from ecodiff.config.variants import Variant, VariantSettings
from ecodiff.runtime.errors import UserError

log = logging.getLogger(__name__)


class ModelSettings(Settings):
    """One dense model."""

    source: FilePath
    """Hub id or folder of a diffusers pipeline."""
    load: LoadSettings = LoadSettings()
    call: CallSettings
    resources: ResourceSettings = ResourceSettings()
    mask: MaskSettings = MaskSettings()
    """What differs from the section `mask`."""
    retrain: Recipes = Field({}, validate_default=True)
    """What differs from the section `retrain`."""


class Config(Settings):
    """A whole run. The sections are named after the stages."""

    run: Name
    """Results go to `results/<run>/`."""
    models: Annotated[dict[Name, ModelSettings], Field(min_length=1)]
    """null leaves out a model that an earlier file names."""
    variants: Annotated[tuple[VariantSettings, ...], Field(min_length=1)]
    """Beside the dense model."""
    prompts: Annotated[dict[Name, PromptSet], Field(min_length=1)]
    calibrate: CalibrateSettings = CalibrateSettings()
    mask: MaskSettings = MaskSettings()
    prune: PruneSettings = PruneSettings()
    retrain: Recipes = Field({}, validate_default=True)
    """Ways of retraining: `lora`, `full`, `light`, and others under names of their own."""
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
            if model is not None
        }
        return {**data, "models": models}

    def prompts_learned(self) -> list[str]:
        """The prompt sets that masks are learned from and models retrained on."""
        sections = [self.retrain, *(model.retrain for model in self.models.values())]
        names = [one.prompts for section in sections for one in section.values() if one.prompts]
        return [*dict.fromkeys([self.calibrate.prompts, *names])]

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
    lines = _lines(mistakes(config), source)
    if lines:
        raise UserError("\n".join(lines))
    return config


def load_planned(
    values: Mapping[str, Any], files: Sequence[str | Path]
) -> tuple[Config, list[str]]:
    """The config of a run that is to begin, and a line for each file of it that is not there.

    Args:
        values: what Snakemake read of `files`, `--config` put over it.
        files: where it was read, each put over those before it.

    Raises:
        UserError: see `load_config`.
    """
    document = replace(_over_each_other(map(_from_here, files)), values=values)
    config = load_config(document)
    for line in _lines(to_fetch(config), document):
        log.warning("config: %s; they will be fetched when pictures are judged", line)
    return config, _lines(missing(config), document)


def read_over_each_other(files: Iterable[str | Path]) -> Config:
    """The config of several files, each put over those before it, as Snakemake does.

    Raises:
        UserError: see `load_config`.
    """
    return load_config(_over_each_other(map(Path, files)))


def _over_each_other(files: Iterable[Path]) -> Document:
    """The contents of several files, each put over those before it; finds keys that stand twice."""
    document = Document(None)
    for file in files:
        top = read_document(file)
        document = replace(top, values=_put_over(document.values, top.values), under=document)
    return document


def _put_over(base: Any, changes: Any) -> Any:
    """Mappings key by key, and null as any other value."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{key: _put_over(base.get(key), one) for key, one in changes.items()}}


def _from_here(file: str | Path) -> Path:
    """The file's path relative to the working directory, where that is shorter to read."""
    here = os.path.relpath(file)
    return Path(file) if here.startswith("..") else Path(here)


def _lines(found: Iterable[Mistake], document: Document) -> list[str]:
    return [*dict.fromkeys(f"{document.where(path)}: {message}" for path, message in found)]


def schema() -> str:
    """The JSON schema of the config, for editors and for the documentation."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
