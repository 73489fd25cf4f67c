"""What a workflow makes of a config: which file each job reads, and which variants share one.

Paths are relative to the working directory. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ecodiff.config.ablations import Ablation
from ecodiff.config.checks import is_local
from ecodiff.config.methods import METHODS
from ecodiff.config.run import Config
from ecodiff.config.sections import MaskSettings, RetrainSettings
from ecodiff.config.variants import Variant


class Plan:
    """The names and files of a run.

    Attributes:
        config: the run's config, complete with defaults.
        results: its folder.
        pruned: (model, variant) of all variants but the dense ones.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.results = f"results/{config.run}"
        self._variants = {model: config.variants_of(model) for model in config.models}
        self.pruned = [
            (model, variant)
            for model, variants in self._variants.items()
            for variant in variants
            if not variant.is_dense
        ]
        self._scored = self._middle_ones()
        self._ablations = {
            model: {point.name: point for point in config.ablations_of(model)}
            for model in config.models
        }

    def names(self) -> list[str]:
        """The names of all variants."""
        return ["dense", *dict.fromkeys(variant.name for _, variant in self.pruned)]

    def masks(self, learned: bool) -> list[str]:
        """The names of the masks that are learned, or of those that are scored at once."""
        found = (v.mask for _, v in self.pruned if METHODS[v.method].learns == learned)
        return [*dict.fromkeys(found)]

    def figures(self, model: str) -> list[str]:
        """The figures of a model that a run of this config can fill."""
        chosen, variants = self.config.evaluate, self._variants[model]
        learned = any(METHODS[v.method].learns or v.retrain for v in variants if not v.is_dense)
        return [
            "quality",
            "pictures",
            *(["removed", "analysis"] if len(variants) > 1 else []),
            *(["learning"] if learned else []),
            *(["cost"] if chosen.efficiency else []),
            *(["mask-cost"] if chosen.mask_cost else []),
        ]

    def source(self, model: str, variant: str = "dense") -> str:
        """The folder, file or hub id of a variant's model."""
        if variant == "dense":
            return self.config.models[model].source
        return f"{self.results}/{model}/{variant}/model"

    def dense_files(self, model: str) -> list[str]:
        """The files of a dense model that lies here; none for a model on the hub."""
        source = self.config.models[model].source
        folder = Path(source)
        if folder.is_file():
            return [source]
        if not is_local(source):
            return []
        files = [*folder.rglob("*.json"), *folder.rglob("*.safetensors")]
        return sorted(map(str, files)) or [str(folder / "model_index.json")]

    def source_of_dense(self, model: str) -> str:
        """The folder, file or hub id of a dense model."""
        return self.source(model)

    def model_files(self, model: str, variant: str) -> list[str]:
        """What a variant's model is read from."""
        return self.dense_files(model) if variant == "dense" else [self.source(model, variant)]

    def clip_files(self) -> list[str]:
        """The files of the CLIP models that pictures are judged by and that lie in folders."""
        chosen = self.config.evaluate
        names = (name or "" for name in (chosen.clip_model, chosen.cmmd_model))
        folders = [name.partition("local-dir:")[2] for name in names]
        found = [sorted(map(str, Path(one).glob("*"))) or [one] for one in folders if one]
        return [file for files in found for file in files]

    def prompt_sets(self, drawn: bool) -> list[str]:
        """The prompt sets whose pictures are written beside their tables, or the others."""
        sets = self.config.prompts.items()
        return [name for name, one in sets if one.writes_pictures == drawn]

    def prompt_files(self, set: str) -> list[str]:
        """What a prompt set is read from. A dry-run may come before its files do."""
        return [file for file in self.config.prompts[set].files if Path(file).exists()]

    def learned_tables(self, set: str) -> list[str]:
        """The tables of the prompts that models learn from, other than those of a set."""
        return [self.prompts(name) for name in self.config.prompts_learned() if name != set]

    def real_pictures(self, set: str) -> list[str]:
        """The folder of the real pictures of a set; none without them."""
        if self.config.prompts[set].writes_pictures:
            return [f"{self.results}/prompts/{set}"]
        return self.prompt_files(set)[1:]

    def prompts(self, set: str) -> str:
        """The table of a prompt set."""
        return f"{self.results}/prompts/{set}.parquet"

    def timed(self) -> str:
        """The table of the prompts that variants are timed on: the first set."""
        return self.prompts(self.config.evaluate.prompts[0])

    def calibration(self, model: str) -> str:
        """What the dense model made of the calibration prompts."""
        return self._record(model, self.config.calibrate.prompts)

    def scored(self, model: str, variant: Variant) -> Variant:
        """The variant whose mask holds a variant's scores.

        That of the middle sparsity (the lower one of two) of its method and seed, or itself where
        each sparsity is learned for itself.
        """
        if METHODS[variant.method].learns and not self.config.models[model].mask.is_shared:
            return variant
        return self._scored[model, variant.method, variant.seed]

    def _middle_ones(self) -> dict[tuple[str, str, int | None], Variant]:
        """Of each model, method and seed the variant of the middle sparsity."""
        found: dict[tuple[str, str, int | None], dict[int, Variant]] = {}
        for model, variants in self._variants.items():
            for one in variants:
                found.setdefault((model, one.method, one.seed), {})[one.percent] = one
        return {
            key: by_percent[sorted(by_percent)[(len(by_percent) - 1) // 2]]
            for key, by_percent in found.items()
        }

    def mask(self, model: str, variant: str) -> str:
        """The mask that holds a variant's scores."""
        name = self.scored(model, Variant.parse(variant)).mask
        return f"{self.results}/{model}/masks/{name}/mask.safetensors"

    def all_masks(self) -> list[str]:
        """Each mask that is scored."""
        return sorted({self.mask(model, variant.name) for model, variant in self.pruned})

    def mask_settings(self, model: str, mask: str) -> MaskSettings:
        """How a mask is made: its model's settings, but for the seed that its name may give."""
        section, seed = self.config.models[model].mask, Variant.parse(mask).seed
        return section if seed is None else section.model_copy(update={"seed": seed})

    def aim(self, mask: str) -> list[str]:
        """What `ecodiff mask` is told of a mask beside the config: what its name says."""
        variant = Variant.parse(mask)
        return _aim(variant.method, variant.percent, _seed(variant))

    def mask_data(self, model: str, mask: str) -> list[str]:
        """What a mask's method looks at, or its budget: that of a call depends on the call."""
        looks = METHODS[Variant.parse(mask).method].looks_at == "calibration"
        looks |= self.config.models[model].mask.budget in ("macs", "latency")
        return [self.calibration(model)] if looks else []

    def compensation(self, model: str, variant: str) -> dict[str, str]:
        """What a variant is compensated by, named as `ecodiff prune` takes it.

        Activations for all layers at once, or a calibration for groups of layers; nothing for
        variants that aren't compensated.
        """
        if not Variant.parse(variant).compensation:
            return {}
        if self.config.prune.groups > 1:
            return {"calibration": self.calibration(model)}
        return {"grams": f"{self.results}/{model}/grams"}

    def percent(self, variant: str) -> int:
        """The per cent of the denoiser's parameters that a variant lacks."""
        return Variant.parse(variant).percent

    def folders(self, model: str) -> list[str]:
        """The folders of all pruned variants of a model."""
        return [self.source(model, v.name) for m, v in self.pruned if m == model]

    def all_pruned(self) -> list[str]:
        """The pruned models as they were before any retraining; each holds its mask."""
        return sorted({self.source(model, v.pruned.name) for model, v in self.pruned})

    def before_retraining(self, model: str, variant: str) -> str:
        """The pruned model that a variant's retraining starts from."""
        return self.source(model, Variant.parse(variant).pruned.name)

    def retraining(self, model: str, variant: str) -> RetrainSettings:
        """The settings that a variant is retrained by."""
        chosen = Variant.parse(variant)
        found = self.config.models[model].retrain[str(chosen.retrain)]
        return found if chosen.seed is None else found.model_copy(update={"seed": chosen.seed})

    def retraining_aim(self, model: str, variant: str) -> list[str]:
        """What `ecodiff retrain` is told of a variant beside the config: what its name says."""
        chosen = Variant.parse(variant)
        return ["--recipe", str(chosen.retrain), *_settings(_seed(chosen))]

    def trajectories(self, model: str, variant: str) -> list[str]:
        """The trajectories that a variant is retrained on, in shards: the dense model's, and where
        the recipe says so the pruned one's own."""
        settings, pruned = self.retraining(model, variant), Variant.parse(variant).pruned
        folders = [f"{self.results}/{model}"]
        if settings.states == "both":
            folders.append(f"{self.results}/{model}/{pruned.name}")
        prompts = settings.prompts or self.config.calibrate.prompts
        at = "-pictures" if settings.states == "pictures" else ""
        return [
            f"{folder}/trajectories/{prompts}-{settings.batch}{at}/{shard}"
            for folder in folders
            for shard in self._shards(prompts)
        ]

    def _shards(self, prompts: str) -> range:
        return range(-(-self.config.prompts[prompts].count // self.config.generate.shard_size))

    def all_shards(self) -> list[str]:
        """The image shards of all models, variants and sets that they are judged on."""
        return [
            f"{self.results}/{model}/{variant.name}/images/{name}/{shard}"
            for model, variants in self._variants.items()
            for variant in variants
            for name in self.config.evaluate.prompts
            for shard in self._shards(name)
        ]

    def seen(self, model: str, variant: str, set: str) -> list[str]:
        """What was seen of each image shard of a variant."""
        folder = f"{self.results}/{model}/{variant}/seen/{set}"
        return [f"{folder}/{shard}.safetensors" for shard in self._shards(set)]

    def all_seen(self) -> list[str]:
        """What was seen of the image shards that the gallery shows, of all models and variants."""
        return [
            file
            for model, variants in self._variants.items()
            for variant in variants
            for file in self.seen(model, variant.name, self.config.evaluate.prompts[0])
        ]

    def real(self, model: str, set: str) -> list[str]:
        """What was seen of the real images at the size of a model's, in shards; none without."""
        call = self.config.models[model].call
        folder = f"{self.results}/real/{set}/{call.width}x{call.height}"
        shards = self._shards(set) if self.config.prompts[set].has_pictures else ()
        return [f"{folder}/{shard}.safetensors" for shard in shards]

    def judged(self) -> list[str]:
        """The quality of all variants of all models on each set."""
        return [
            f"{self.results}/{model}/{variant.name}/quality/{name}.json"
            for model, variants in self._variants.items()
            for variant in variants
            for name in self.config.evaluate.prompts
        ]

    def source_by_variant(self, model: str) -> list[str]:
        """Where all variants of a model lie, as `ecodiff evaluate efficiency` takes them."""
        variants = self._variants[model]
        return _options((v.name, self.source(model, v.name)) for v in variants)

    def of_models(self, file: str) -> list[str]:
        """A file of each model."""
        return [f"{self.results}/{model}/{file}" for model in self.config.models]

    def ablation(self, model: str, ablation: str) -> Ablation:
        """The point of the sweep of a name."""
        return self._ablations[model][ablation]

    def ablation_names(self) -> list[str]:
        """The names of all points of the sweeps."""
        return [*dict.fromkeys(name for points in self._ablations.values() for name in points)]

    def ablation_aim(self, model: str, ablation: str) -> list[str]:
        """What `ecodiff mask` is told of a point of the sweep beside the config: its change."""
        point = self.ablation(model, ablation)
        return _aim("ecodiff", round(100 * point.sparsity), point.changes)

    def ablation_masks(self, model: str) -> list[str]:
        """The masks of a model's sweep."""
        folder = f"{self.results}/{model}/ablations"
        return [f"{folder}/{name}/mask.safetensors" for name in self._ablations[model]]

    def ablation_record(self, model: str) -> str:
        """What the dense model made of the prompts that the sweep is judged on."""
        assert self.config.ablations is not None
        return self._record(model, self.config.ablations.prompts)

    def _record(self, model: str, prompts: str) -> str:
        return f"{self.results}/{model}/{prompts}.safetensors"


def _aim(method: str, percent: int, changes: Mapping[str, Any]) -> list[str]:
    return ["--method", method, "--percent", str(percent), *_settings(changes)]


def _seed(variant: Variant) -> dict[str, int]:
    return {} if variant.seed is None else {"seed": variant.seed}


def _settings(changes: Mapping[str, Any]) -> list[str]:
    return ["--settings", json.dumps(changes)] if changes else []


def _options(variants: Iterable[tuple[str, str]]) -> list[str]:
    return [word for name, value in variants for word in ("--variant", f"{name}={value}")]
