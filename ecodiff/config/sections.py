"""The sections of the configuration, one a stage. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ecodiff.config.methods import METHODS

MethodName = Literal[tuple(METHODS)]  # type: ignore[valid-type]
RetrainKind = Literal["lora", "full"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Share = Annotated[float, Field(gt=0, lt=1)]
T = TypeVar("T")
NonEmpty = Annotated[tuple[T, ...], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values don't change, docstrings describe."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as truth values, which pydantic takes for 1 and 0."""
        kinds = str(cls.model_fields[str(info.field_name)].annotation)
        inside = value if isinstance(value, list | tuple) else [value]
        if "bool" not in kinds and any(isinstance(one, bool) for one in inside):
            raise ValueError(f"should be no truth value (yes, no, true, false), is {value}")
        return value


class PromptSet(Settings):
    """Where the prompts of one set come from."""

    source: Literal["shapeworld", "file", "coco", "flickr30k", "gcc"]
    """`file`: txt (a prompt a line), csv, tsv, jsonl or parquet; the others: the layout of that
    data set."""
    path: str | None = None
    """The file, or the captions file of the data set; not for shapeworld."""
    images: str | None = None
    """Folder of the real images, for coco and flickr30k."""
    column: str = "prompt"
    """file: the column (jsonl: the key) that holds the prompts; not for txt."""
    split: Literal["train", "held-out"] = "train"
    """shapeworld: captions of the two splits never meet."""
    count: PositiveInt
    """How many prompts to take."""
    seed: NonNegativeInt = 0
    """Prompt i starts from noise of seed `seed + i`, below 2^63; shapeworld also draws its scenes
    from it, coco and flickr30k which images they take."""

    @model_validator(mode="after")
    def _has_what_its_source_reads(self) -> PromptSet:
        read = {
            "shapeworld": {"split"},
            "file": {"path", "column"},
            "coco": {"path", "images"},
            "flickr30k": {"path", "images"},
            "gcc": {"path"},
        }[self.source]
        if (self.path or "").lower().endswith(".txt"):
            read -= {"column"}
        for key in ("path", "images", "column", "split"):
            value = getattr(self, key)
            if key in read and value is None:
                raise ValueError(f"source {self.source} needs the key {key}")
            if key not in read and value != PromptSet.model_fields[key].default:
                raise ValueError(f"{key}: nothing reads it here (source {self.source})")
        if self.seed + self.count > 2**63:
            raise ValueError(f"seed: seed + count goes beyond 2^63: {self.seed} + {self.count}")
        return self

    @property
    def files(self) -> list[str]:
        """The file and the folder that the prompts are read from."""
        return [path for path in (self.path, self.images) if path is not None]


class CallSettings(Settings):
    """How the pipeline is called, the same for all stages and variants of a model."""

    model_config = ConfigDict(allow_inf_nan=False)

    num_inference_steps: PositiveInt
    guidance_scale: NonNegativeFloat | None = None
    """null: the pipeline's own default. Classifier-free guidance, or what guidance-distilled models
    (FLUX dev, LCM) take as an input."""
    true_cfg_scale: NonNegativeFloat | None = None
    """Qwen-Image, FLUX: classifier-free guidance; null: the pipeline's own default."""
    negative_prompt: str | None = None
    """What classifier-free guidance leads away from; null: the pipeline's own default."""
    height: PositiveInt
    width: PositiveInt
    num_frames: PositiveInt | None = None
    """Wan: frames of a video, 1 for a picture; null: the pipeline's own default."""
    max_sequence_length: PositiveInt | None = None
    """Tokens of the text encoder, where it is no CLIP; null: the pipeline's own default."""


class LoadSettings(Settings):
    """How a model is loaded."""

    dtype: Dtype = "float32"
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    device_map: str | None = None
    """How components are spread over several GPUs, such as balanced; null: all on `device`."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    variant: str | None = None
    """File variant on the hub, such as fp16."""
    config: str | None = None
    """For a source that is a single file: hub id or folder of the pipeline it belongs to."""

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"must be auto, cpu, cuda or cuda:<n>, not {device!r}")
        return device


class ResourceSettings(Settings):
    """What a job that holds the model asks of the scheduler."""

    gpu: NonNegativeInt = 0
    mem_mb: PositiveInt = 3000
    """Host memory."""
    runtime: PositiveInt = 60
    """Minutes a job may take."""


class LearningRates(Settings):
    """AdamW's learning rate for the logits of each kind of structure."""

    heads: PositiveFloat = 0.1
    neurons: PositiveFloat = 0.1
    modulation: PositiveFloat = 0.1


class KindWeights(Settings):
    """What a parameter of each kind of structure weighs in a penalty."""

    heads: NonNegativeFloat = 1.0
    neurons: NonNegativeFloat = 1.0
    modulation: NonNegativeFloat = 1.0


class MaskSettings(Settings):
    """How masks are learned and units selected (EcoDiff)."""

    objective: Literal["penalty", "budget"] = "budget"
    """`penalty`: a fixed beta, the same for all sparsities. `budget`: aims at a sparsity by itself,
    by Lagrange multipliers."""
    sparsities: Literal["per-sparsity", "shared"] = "per-sparsity"
    """`shared`: learned once, for the middle one of a model's sparsities; the others rank its
    scores again. A penalty aims at none, so there it is always shared."""
    beta: NonNegativeFloat = 0.1
    """penalty: weight of the expected share of parameters kept."""
    weights: KindWeights = KindWeights()
    """penalty: how much more than others the parameters of a kind are wanted gone."""
    loss: Literal["end-to-end", "per-step"] = "end-to-end"
    """`end-to-end`: the final latent must not change. `per-step`: each step's prediction must not,
    on the dense model's own latents; the paper's ablation, far worse."""
    first_logit: float | Literal["sensitivity"] = "sensitivity"
    """Where logits start: `sensitivity`: each by what its unit is worth alone, to second order. A
    number: all there, as in the paper, which starts at 3."""
    closed: Literal["mean", "zero"] = "mean"
    """What a closed gate lets through. `mean`: what its unit gives on average, where a bias can do
    so when the unit is gone. `zero`: nothing, as in the paper."""
    lr: LearningRates = LearningRates()
    lr_warmup: NonNegativeInt = 0
    """Iterations over which learning rates rise to their full value."""
    noise_floor: NonNegativeFloat = 0.1
    """Added to the uniform noise of the gates; 0 is the hard concrete distribution itself."""
    prompts: PositiveInt | None = None
    """How many of the calibration prompts to learn from, the first ones; null: all."""
    iterations: PositiveInt = 100
    """Updates of the logits."""
    patience: PositiveInt | None = None
    """Stop early when the units to remove were the same for so many iterations, but for one in a
    hundred. null: never."""
    save_every: PositiveInt = 10
    """Iterations after which the state is written: a job that is killed loses at most so many."""
    batch: PositiveInt = 4
    """Prompts that pass through the denoiser together."""
    accumulate: PositiveInt = 1
    """Batches whose mean gradient makes one update."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    """budget: share of the iterations over which the target rises to the full sparsity, where all
    logits start at one value."""
    multiplier_lr: PositiveFloat = 0.01
    """budget: learning rate of the multipliers' ascent."""
    checkpoint: bool = True
    """Recompute each denoising step in the backward pass instead of keeping its activations."""
    keep_steps: NonNegativeInt | Literal["auto"] = 0
    """With checkpoint: steps whose activations are kept all the same; more memory, less time.
    `auto`: as many as `memory_mb` allows."""
    memory_mb: PositiveInt | None = None
    """keep_steps auto: memory that activations may take; null: most of what is free."""
    debug: bool = False
    """With checkpoint: fail unless each step that is computed again gives what it gave at first,
    to the bit."""
    scope: Literal["global", "structure"] = "global"
    """Rank units across all structures, or remove the same share of each."""
    min_units: NonNegativeInt = 0
    """Units that each structure keeps at least."""
    align: Literal[1, 8, 16, 64] = 1
    """Feed-forwards that lose neurons keep a multiple of this many: tensor cores are slow at other
    widths. 1: as the scores say."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _keys_are_read(self) -> MaskSettings:
        if not self.checkpoint and self.keep_steps != 0:
            raise ValueError("keep_steps: nothing reads it without checkpoint")
        if not self.checkpoint and self.debug:
            raise ValueError("debug: nothing reads it without checkpoint")
        if self.memory_mb is not None and self.keep_steps != "auto":
            raise ValueError("memory_mb: nothing reads it without keep_steps: auto")
        return self

    @property
    def is_shared(self) -> bool:
        """Whether one learning serves all sparsities."""
        return self.objective == "penalty" or self.sparsities == "shared"


class RetrainSettings(Settings):
    """How a pruned model is retrained on what the dense model generates."""

    kind: RetrainKind = "lora"
    prompts: Name | None = None
    """The prompt set whose images it learns from; null: the calibration set."""
    rank: PositiveInt = 16
    """lora: rank of the updates, merged into the weights at the end."""
    lr: PositiveFloat = 1e-4
    steps: PositiveInt = 1000
    batch: PositiveInt = 8
    seed: Seed = 0
    distillation: NonNegativeFloat = 0.0
    """Weight of the distance to the dense model's prediction, beside the training loss."""


class RetrainSection(Settings):
    """The settings of the two kinds of retraining that variants can name."""

    lora: RetrainSettings = RetrainSettings(kind="lora")
    full: RetrainSettings = RetrainSettings(kind="full", lr=1e-5)

    @model_validator(mode="before")
    @classmethod
    def _kind_is_the_key(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            key: {"kind": key, **value} if isinstance(value, Mapping) else value
            for key, value in data.items()
        }

    @model_validator(mode="after")
    def _kinds_agree(self) -> RetrainSection:
        if self.lora.kind != "lora" or self.full.kind != "full":
            raise ValueError("kind must be the name of its section")
        return self


class CalibrateSettings(Settings):
    """What the dense model is recorded on."""

    prompts: Name = "calibration"
    """Which prompt set."""
    batch_size: PositiveInt = 8


class PruneSettings(Settings):
    """How pruned models are made."""

    ridge: NonNegativeFloat = 1e-4
    """Compensation: ridge, relative to the mean of the Gram matrix's diagonal."""
    groups: PositiveInt = 1
    """Compensation: 1 solves all layers at once, on the dense model's activations. More: so many
    groups of layers one after the other, on what the layers before them give by then."""
    batch_size: PositiveInt = 8
    """Compensation in groups: prompts that run together."""


class GenerateSettings(Settings):
    """How images are made."""

    shard_size: PositiveInt = 1024
    """Prompts a job; a job starts by loading the model."""
    batch_size: PositiveInt = 8


class EfficiencySettings(Settings):
    """How speed and memory are measured: all variants of a model in turns, in one process."""

    batch_size: PositiveInt = 1
    warmup: NonNegativeInt = 1
    """Rounds that are not counted."""
    repeats: PositiveInt = 5
    """Rounds whose median is reported."""


class MaskCostSettings(Settings):
    """How the cost of one learning iteration is measured."""

    steps: NonEmpty[PositiveInt] = (2, 4, 8)
    """Numbers of denoising steps."""
    kept: NonEmpty[Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Shares of the steps whose activations are kept; 0: all steps are recomputed."""
    batch: PositiveInt = 4
    repeats: PositiveInt = 3
    """Rounds whose median is reported."""


class EvaluateSettings(Settings):
    """How variants are judged."""

    prompts: Name = "evaluation"
    """Which prompt set."""
    features: Literal["inception", "clip"] = "inception"
    """What FID and KID compare: Inception pool features or the image side of clip_model."""
    clip_model: str = "ViT-B-16"
    """open_clip model, or `local-dir:<folder>`."""
    clip_pretrained: str | None = "datacomp_xl_s13b_b90k"
    """open_clip weights; null for a local folder."""
    batch_size: PositiveInt = 32
    efficiency: EfficiencySettings | None = EfficiencySettings()
    """null: not measured."""
    mask_cost: MaskCostSettings | None = MaskCostSettings()
    """null: not measured."""


class ReportSettings(Settings):
    """What the tables and figures show."""

    published: str | None = None
    """A csv of published results to show beside ours."""
    examples: PositiveInt = 8
    """Prompts in the picture grid."""
    shown: NonEmpty[Share] | None = None
    """Sparsities in figures that have a row or column a variant; null: all. Such figures show the
    first seed alone."""
