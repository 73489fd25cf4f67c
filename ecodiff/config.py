"""The typed configuration: everything a run depends on, checked before anything starts.

`config/config.yaml` explains each key by example; `workflow/schemas/config.schema.json`
is what `python -m ecodiff.config` prints. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from ecodiff.ablations import Ablation, AblationSettings
from ecodiff.errors import UserError
from ecodiff.settings import (
    CalibrateSettings,
    CallSettings,
    EfficiencySettings,
    EvaluateSettings,
    GenerateSettings,
    LearningRates,
    LoadSettings,
    MaskCostSettings,
    MaskSettings,
    Method,
    Name,
    PromptSet,
    PruneSettings,
    ReportSettings,
    ResourceSettings,
    RetrainKind,
    RetrainSection,
    RetrainSettings,
    Settings,
    Share,
)

__all__ = [
    "AblationSettings",
    "CalibrateSettings",
    "CallSettings",
    "Config",
    "EfficiencySettings",
    "EvaluateSettings",
    "GenerateSettings",
    "LearningRates",
    "LoadSettings",
    "MaskCostSettings",
    "MaskSettings",
    "ModelSettings",
    "PromptSet",
    "PruneSettings",
    "ReportSettings",
    "ResourceSettings",
    "RetrainSection",
    "RetrainSettings",
    "Variant",
    "VariantSettings",
    "load_config",
    "read_settings",
]


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


def _listed(value: Any) -> Any:
    """A list of one, where only one is given."""
    return value if isinstance(value, list | tuple) else [value]


class VariantSettings(Settings):
    """A family of variants: one a method, sparsity, seed, and with compensation or without."""

    method: Annotated[
        tuple[Method, ...], BeforeValidator(_listed, json_schema_input_type=Method | list[Method])
    ]
    """One, or a list of them."""
    sparsities: tuple[Share, ...]
    """Shares of the denoiser's parameters to remove, in whole per cent."""
    compensation: Annotated[
        tuple[bool, ...], BeforeValidator(_listed, json_schema_input_type=bool | list[bool])
    ] = (False,)
    """Re-solve the surviving weights by least squares; [false, true] for variants of both kinds."""
    seeds: tuple[NonNegativeInt, ...] | None = None
    """A variant for each seed of the scores, instead of one with the seed of the section `mask`."""
    retrain: RetrainKind | None = None
    models: tuple[Name, ...] | None = None
    """The models it applies to; null: all."""

    @model_validator(mode="after")
    def _whole_percents(self) -> VariantSettings:
        for sparsity in self.sparsities:
            if abs(100 * sparsity - round(100 * sparsity)) > 1e-6:
                raise ValueError(f"sparsity {sparsity} is not a whole per cent, such as 0.25")
        return self

    def variants(self) -> list[Variant]:
        """The variants of the family."""
        return [
            Variant(method, round(100 * sparsity), compensation, self.retrain, seed)
            for method in self.method
            for compensation in self.compensation
            for sparsity in self.sparsities
            for seed in self.seeds or (None,)
        ]


@dataclass(frozen=True)
class Variant:
    """One version of a model; its name is a folder and a table row.

    `dense` or `{method}-{percent}[-s{seed}][-comp][-lora|-full]`, such as `ecodiff-30-comp-lora`.
    """

    method: Method | Literal["dense"] = "dense"
    percent: int = 0
    compensation: bool = False
    retrain: RetrainKind | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The inverse of `parse`."""
        if self.is_dense:
            return "dense"
        parts = [self.mask, "comp" if self.compensation else None, self.retrain]
        return "-".join(part for part in parts if part)

    @property
    def is_dense(self) -> bool:
        """Whether it is the untouched model."""
        return self.method == "dense"

    @property
    def mask(self) -> str:
        """The name of its mask, `{method}-{percent}[-s{seed}]`."""
        seed = "" if self.seed is None else f"-s{self.seed}"
        return f"{self.method}-{self.percent}{seed}"

    @property
    def sparsity(self) -> float:
        """The target share of the denoiser's parameters removed."""
        return self.percent / 100

    @property
    def pruned(self) -> Variant:
        """The variant that its retraining starts from; itself when not retrained."""
        return replace(self, retrain=None)

    @property
    def scores(self) -> Variant:
        """The variant that is its mask and nothing else."""
        return replace(self, retrain=None, compensation=False)

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant of a name; UserError when it is none."""
        match = VARIANT_NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"variant {name!r}: expected dense or "
                f"({'|'.join(get_args(Method))})-<percent>[-s<seed>][-comp][-lora|-full]"
            )
        if match["method"] is None:
            return cls()
        seed = None if match["seed"] is None else int(match["seed"])
        found = (match["method"], int(match["percent"]), bool(match["comp"]), match["retrain"])
        return cls(*found, seed)  # type: ignore[arg-type]


VARIANT_NAME = re.compile(
    rf"dense|(?P<method>{'|'.join(get_args(Method))})-(?P<percent>[1-9]\d?)"
    r"(?:-s(?P<seed>\d+))?(?P<comp>-comp)?(?:-(?P<retrain>lora|full))?"
)


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


def merged(base: Any, changes: Any) -> Any:
    """`base` with the keys of `changes` put over it, section by section."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return base if changes is None else changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def load_config(source: str | Path | Mapping[str, Any]) -> Config:
    """A config from a YAML file or from its contents; UserError when it is not valid."""
    return read_settings(Config, source)


S = TypeVar("S", bound=BaseModel)


def read_settings(kind: type[S], source: str | Path | Mapping[str, Any] | None) -> S:
    """Settings of a section from a mapping, a YAML file or YAML text; None gives the defaults.

    Raises:
        UserError: with one line on the first thing that is wrong.
    """
    where = ""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix in {".yaml", ".yml", ".json"}:
            where = f"{path}: "
            try:
                source = path.read_text()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
        try:
            source = yaml.safe_load(str(source))
        except yaml.YAMLError as error:
            raise UserError(f"{where}not YAML: {' '.join(str(error).split())}") from None
    try:
        return kind.model_validate({} if source is None else source)
    except ValidationError as error:
        raise UserError(where + explain(error, kind)) from None


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line: the key that is wrong, how, and what is allowed."""
    # An error in a shared section shows in every model that inherits it: name the section.
    first, *others = sorted(error.errors(), key=lambda one: len(one["loc"]))
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(kind, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        message = f"unknown key; {hint}"
    elif first["type"] == "missing":
        message = "this key is missing"
    elif first["type"] != "value_error":
        message = re.sub(r"^Input should", "should", message).replace("valid dictionary", "mapping")
        message = f"{re.sub(r' or instance of .*', '', message)}, not {first['input']!r}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{path + ': ' if path else ''}{message}{more}"


def _allowed_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a location of pydantic's error."""
    for part in location:
        annotation = kind.model_fields[str(part)].annotation if part in kind.model_fields else None
        inner = _first_model(annotation)
        kind = inner if inner is not None else kind
    return list(kind.model_fields)


def _first_model(annotation: Any) -> type[BaseModel] | None:
    """The first settings class within an annotation such as `dict[str, X] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_first_model(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)


def schema() -> str:
    """The JSON schema of the config, for editors and for the documentation."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
