"""The sections of the configuration, one per stage. Imports no torch.

The docstring below a setting is its description in the JSON schema of the config. A prefix such as
"penalty:" names the value of another setting that the setting belongs to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
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
RetrainKind = Literal["lora", "full", "light"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Share = Annotated[float, Field(gt=0, lt=1)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder; ~ is the home of who plans the run."""
Resize = Literal["clean", "torch", "legacy"]
# Weights of open_clip whose models are only right by the name with "-quickgelu".
QUICKGELU = ("openai", "metaclip_400m", "metaclip_fullcc", "dfn2b", "dfn5b")
T = TypeVar("T")


def listed(value: Any) -> Any:
    """Wrap a single value in a list."""
    return value if isinstance(value, list | tuple) else [value]


NonEmpty = Annotated[tuple[T, ...], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be changed once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as truth values, which pydantic takes for 1 and 0."""
        kinds = str(cls.model_fields[str(info.field_name)].annotation)
        inside = value if isinstance(value, list | tuple) else [value]
        wrong = [one for one in inside if isinstance(one, bool)]
        if wrong and "bool" not in kinds:
            raise ValueError(f"should be no truth value (yes, no, true, false), is {wrong[0]}")
        return value


class PromptSet(Settings):
    """Where the prompts of one set, their seeds and their real images come from."""

    source: Literal["shapeworld", "file", "folder", "datasets", "coco", "flickr30k", "gcc"]
    """`file`: a txt (one prompt per line), csv, tsv, jsonl or parquet file. `folder`: pictures with
    captions, in txt files of the same names or in a metadata.csv (tsv, jsonl, parquet) with a
    column `file_name`. `datasets`: what that library reads, the first rows. `shapeworld`: captions
    of the toys' world, drawn from `seed`. The others: the captions file of that data set."""
    path: FilePath | None = None
    """The file, the folder, or the captions file of the data set; datasets: an id of the hub or a
    folder; not for shapeworld."""
    images: FilePath | None = None
    """coco, flickr30k: folder of the real images, which FID, KID and CMMD compare with."""
    column: str = "prompt"
    """file, folder, datasets: the column (jsonl: the key) that holds the prompts; not for txt."""
    image_column: str | None = None
    """datasets: the column of the real pictures; null: there are none."""
    subset: str | None = None
    """datasets: which configuration, where there are several."""
    split: str = "train"
    """datasets: the split. shapeworld: `train` or `held-out`, which share no caption; the toys are
    trained on `train`."""
    count: PositiveInt
    """How many prompts to take. The paper uses 100 for calibration, 5,000 for evaluation."""
    seed: NonNegativeInt = 0
    """Prompt i starts from noise of seed `seed + i` (below 2^63), so choose seeds of different sets
    further apart than their counts. shapeworld also draws its scenes from it; coco and flickr30k
    choose the images with it."""

    @model_validator(mode="after")
    def _has_what_its_source_reads(self) -> PromptSet:
        read = {
            "shapeworld": {"split"},
            "file": {"path", "column"},
            "folder": {"path", "column"},
            "datasets": {"path", "column", "image_column", "subset", "split"},
            "coco": {"path", "images"},
            "flickr30k": {"path", "images"},
            "gcc": {"path"},
        }[self.source]
        if (self.path or "").lower().endswith(".txt"):
            read -= {"column"}
        for key in ("path", "images", "column", "image_column", "subset", "split"):
            value = getattr(self, key)
            if key in read and value is None and key in ("path", "images"):
                raise ValueError(f"source {self.source} needs the key {key}")
            if key not in read and value != PromptSet.model_fields[key].default:
                raise ValueError(f"{key}: nothing reads it here (source {self.source})")
        if self.source == "shapeworld" and self.split not in ("train", "held-out"):
            raise ValueError(f"split: shapeworld has train and held-out, not {self.split!r}")
        if self.seed + self.count > 2**63:
            raise ValueError(f"seed: seed + count goes beyond 2^63: {self.seed} + {self.count}")
        return self

    @property
    def has_pictures(self) -> bool:
        """Whether each prompt has a real picture."""
        return bool(self.images) or self.source == "folder" or self.writes_pictures

    @property
    def writes_pictures(self) -> bool:
        """Whether its pictures are written beside its table."""
        return self.source == "shapeworld" or self.image_column is not None

    @property
    def files(self) -> list[str]:
        """The file and the folder that the prompts are read from."""
        return [path for path in (self.path, self.images) if path is not None]


class CallSettings(Settings):
    """How the pipeline is called, the same for all stages and variants of a model."""

    model_config = ConfigDict(allow_inf_nan=False)

    num_inference_steps: PositiveInt
    """Denoising steps, as the model is meant to be used: 1 to 8 for step-distilled models, 20 to 50
    for others. The time of mask learning and of generation grows in proportion."""
    guidance_scale: NonNegativeFloat | None = None
    """Scale of classifier-free guidance; for guidance-distilled models (FLUX dev, LCM) the scale
    that they take as an input. null: the pipeline's own default."""
    true_cfg_scale: NonNegativeFloat | None = None
    """Qwen-Image, FLUX: scale of classifier-free guidance; null: the pipeline's own default."""
    negative_prompt: str | None = None
    """Prompt of the unconditional branch of classifier-free guidance, the same for all prompts;
    null: the pipeline's own default."""
    height: PositiveInt
    """Pixels; a multiple of what a token of the denoiser covers."""
    width: PositiveInt
    """Pixels; as `height`."""
    num_frames: PositiveInt | None = None
    """Wan: frames of a video, 1 for an image; null: the pipeline's own default."""
    max_sequence_length: PositiveInt | None = None
    """Tokens of the text encoder where it is not CLIP (T5, for example); null: the pipeline's own
    default."""


class LoadSettings(Settings):
    """How a model is loaded."""

    dtype: Dtype = "float32"
    """Of the weights. bfloat16 and float16 take half the memory of float32; gate logits are float32
    in any case."""
    device: str = "auto"
    """auto (a free GPU where there is one), cpu, cuda (a free GPU) or cuda:<n>."""
    device_map: str | None = None
    """How diffusers spreads the components over several GPUs, such as `balanced`; null: all on
    `device`."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null: the main branch. A commit makes a run repeatable."""
    variant: str | None = None
    """File variant on the hub, such as `fp16`; null: the files without a variant."""
    config: str | None = None
    """For a source that is a single file: hub id or folder of the pipeline it belongs to."""

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"must be auto, cpu, cuda or cuda:<n>, not {device!r}")
        return device


class ResourceSettings(Settings):
    """What a job that loads the model requests from Snakemake or the cluster's scheduler."""

    gpu: NonNegativeInt = 0
    """Number of GPUs. With more than one, masks are learned by one process on each."""
    mem_mb: PositiveInt = 3000
    """Host memory in MB."""
    runtime: PositiveInt = 60
    """Minutes that a job may take; a cluster stops it then."""


class LearningRates(Settings):
    """AdamW's learning rate for the gate logits, by kind of structure.

    0.05 to 0.5; the paper uses 0.1 to 0.5. Higher moves the ranking further in the same number of
    iterations and may overshoot: on the toys, with the default start and 20 % removed, 0.4 was
    worse than 0.2.
    """

    heads: PositiveFloat = 0.2
    """Logits of attention heads."""
    neurons: PositiveFloat = 0.2
    """Logits of feed-forward neurons."""
    modulation: PositiveFloat = 0.2
    """Logits of modulation (AdaLN)."""


class KindWeights(Settings):
    """Factor on the parameters of each kind of structure in a penalty.

    1: all parameters count the same. Above 1 more units of that kind are removed, below 1 fewer; 0
    puts no pressure on that kind.
    """

    heads: NonNegativeFloat = 1.0
    """Attention heads."""
    neurons: NonNegativeFloat = 1.0
    """Feed-forward neurons."""
    modulation: NonNegativeFloat = 1.0
    """Modulation (AdaLN)."""


class MaskSettings(Settings):
    """How masks are learned (EcoDiff) and units selected.

    Loss of mask learning: mean((z0' - z0)^2) / var(z0) + regulariser, with z0 the final latent of
    the dense model and z0' that of the gated one.
    """

    objective: Literal["penalty", "budget"] = "budget"
    """The regulariser. `penalty`: beta times the expected share of parameters kept, for all
    sparsities. `budget`: Lagrange multipliers that steer the expected sparsity to the target."""
    sparsities: Literal["per-sparsity", "shared"] = "per-sparsity"
    """`per-sparsity`: learn a mask for each sparsity. `shared`: learn once, for the middle one of a
    model's sparsities, and rank its scores again for the others; takes the time of one. With
    `penalty`, which has no target, masks are always shared."""
    beta: NonNegativeFloat = 0.1
    """penalty: weight of the expected share of parameters kept. Removing a unit pays off when it
    adds less relative latent error than beta times the unit's share of the parameters. 0.01 to 1,
    to be tuned for each model; higher removes more. The paper's values are for another regulariser
    and do not carry over."""
    weights: KindWeights = KindWeights()
    """penalty: factor on the parameters of each kind of structure."""
    loss: Literal["end-to-end", "per-step"] = "end-to-end"
    """`end-to-end`: compare final latents. `per-step`: compare the prediction of each step, on the
    dense model's latents; the paper's ablation, far worse from a flat start and, on the toys, no
    worse from the default start."""
    first_logit: float | Literal["sensitivity"] = "sensitivity"
    """Initial logits. `sensitivity`: by the importance of each unit by itself (diagonal of the
    Gauss-Newton matrix), for one backward pass per calibration prompt before learning. A number:
    the same for all units, 2 to 4; the paper uses 3. On the toys such a flat start was far worse in
    the same number of iterations."""
    closed: Literal["mean", "zero"] = "mean"
    """What a closed gate replaces its unit's activation by. `mean`: its mean over the calibration
    set, where there is a bias to hold it after pruning. `zero`: 0, as in the paper; on the toys,
    errors were up to three quarters higher."""
    budget: Literal["parameters", "macs", "memory", "latency"] = "parameters"
    """What a sparsity is a share of, in the denoiser. `macs`: multiply-adds at the call's size.
    `memory`: bytes of weights. `latency`: time on this device, measured (a minute)."""
    modulation: Literal["rank", "channels"] = "rank"
    """Units of linears that read the conditioning alone (AdaLN). `rank`: directions of their input,
    which leaves two linears of a low rank. It saves memory, not time. `channels`: output channels,
    as in the paper. Published methods go by channels whatever is said here."""
    lr: LearningRates = LearningRates()
    """Learning rates of the logits."""
    lr_warmup: NonNegativeInt = 0
    """Iterations over which the learning rates rise linearly to their full value; 0: none."""
    noise_floor: NonNegativeFloat = 0.1
    """Bounds the noise of the gates; 0 is the hard concrete distribution itself. 0 to 1, the paper
    uses 0.1 to 1. Higher makes gates less random. It hardly matters with the default start."""
    prompts: PositiveInt | None = 25
    """Learn from at most this many of the calibration prompts, the first ones; null: all. On the
    toys 25 did as well as 100. The initial `sensitivity` takes one backward pass for each."""
    iterations: PositiveInt = 12
    """Updates of the logits; time grows in proportion. On the toys 12 updates of 2 prompts did what
    50 of 8 did with the default start, and up to 40 % removed none did. The paper takes 75 to 256
    from a flat start."""
    patience: PositiveInt | None = None
    """Stop early once at most 1 % of the units to remove were exchanged over this many iterations
    together. 10 to 30; null: run all iterations."""
    save_every: PositiveInt = 10
    """Save the state every so many iterations: a killed job loses at most these. 1 to 50; costs the
    time to write the logits and two optimiser moments."""
    batch: PositiveInt = 2
    """Prompts that pass through the denoiser together. Activation memory grows in proportion;
    larger batches use a GPU better."""
    accumulate: PositiveInt = 1
    """Batches whose mean gradient makes one update: time grows in proportion, memory does not. Use
    it where a larger batch does not fit; 2 to 16 prompts per update in all."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    """budget, with a number as `first_logit`: share of the iterations over which the target rises
    to the full sparsity. 0.1 to 0.5; 0: the full target at once."""
    multiplier_lr: PositiveFloat = 0.01
    """budget: learning rate of the gradient ascent on the Lagrange multipliers. 0.001 to 0.1;
    higher reaches the target sooner and may overshoot."""
    checkpoint: bool = True
    """Gradient checkpointing over denoising steps: recompute each step in the backward pass instead
    of keeping its activations. Memory of one step instead of all, for three forward passes a step
    instead of two; the result is the same."""
    keep_steps: NonNegativeInt | Literal["auto"] = 0
    """checkpoint: number of steps that keep their activations and are not recomputed, from 0 to all
    steps. Each saves one forward pass and takes the activation memory of one step. `auto`: as many
    as `memory_mb` allows."""
    memory_mb: PositiveInt | None = None
    """keep_steps auto: memory that activations may take, in MB; null: 80 % of what is free."""
    debug: bool = False
    """checkpoint: fail unless each recomputed step gives its first prediction bit by bit. Finds
    models that are random or keep a state."""
    scope: Literal["global", "structure"] = "global"
    """`global`: rank all units against each other. `structure`: remove the same share of units from
    each structure."""
    min_units: NonNegativeInt = 0
    """Minimum number of units that each structure keeps; 0: a structure may be removed as a whole.
    Larger values lower the sparsity that is possible."""
    align: Literal[1, 8, 16, 64] = 1
    """Linears that lose neurons or heads keep a multiple of this many rows or columns, because
    tensor cores are slow at other widths. 1: no alignment. Larger values follow the scores less
    closely."""
    exclude: list[str] = []
    """Structures that stay whole, by patterns of their names with * and ?, such as
    `*.ff_context.*`; `ecodiff.discover` lists the names."""
    limits: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """The largest share of its units that a structure may lose, by kind (heads, neurons,
    modulation) or by pattern, such as `{heads: 0.5, "transformer_blocks.0.*": 0.1}`; where several
    fit, the lowest counts. Lower values lower the sparsity that is possible."""
    seed: Seed = 0
    """Of gate noise, order of prompts, the signs of `sensitivity`, and the methods that draw random
    numbers."""

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
        """Whether one learned mask gives the scores for all sparsities."""
        return self.objective == "penalty" or self.sparsities == "shared"


class RetrainSettings(Settings):
    """How a pruned model learns to predict what the dense one predicted, on its own trajectory."""

    kind: RetrainKind = "lora"
    """`lora`: low-rank updates of attention and feed-forward linears, merged into the weights at
    the end and saved beside them. `full`: all weights. `light`: biases and norms alone."""
    prompts: Name | None = None
    """Prompt set that the dense model's trajectory is recorded on; null: the calibration set. A
    hundred prompts are few: 400 to 5,000."""
    states: Literal["dense", "both", "pictures"] = "both"
    """Latents to learn at, where the dense model says what to predict. `dense`: those that it meets
    itself. `both`: also those that the pruned model meets before it is retrained; that corrects
    what adds up from step to step and, on the toys, left half the error of `dense`, for a recording
    of each variant. `pictures`: the prompts'
    real pictures, noised as far as each step of the pipeline expects."""
    rank: PositiveInt = 16
    """lora: rank of the updates. 4 to 256; the paper uses 16 for SDXL and 256 for FLUX."""
    alpha: PositiveFloat | None = None
    """lora: updates are multiplied by alpha / rank; null: by 1. For rank-stabilised LoRA (rsLoRA)
    give its alpha times the root of the rank."""
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw`: float32 weights and moments, 16 bytes a trained parameter. `adamw8bit` (torchao):
    weights in the model's dtype, bfloat16 ones with stochastic rounding, and moments of a byte: 6
    bytes a parameter, which trains all of FLUX in 80 GB."""
    lr: PositiveFloat = 1e-3
    """Learning rate at its highest. On the toys 3e-4 to 3e-3; the paper uses 1e-6 for
    lora and 1e-7 for full, for 10,000 steps and more of a batch of 32."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the learning rate rises; then it falls by a cosine to 0."""
    steps: PositiveInt = 1000
    """Updates; time grows in proportion. 200 to 1,500 for a toy; the paper takes 10,000 to
    40,000."""
    batch: PositiveInt = 16
    """Prompts that pass together, all at one step of the trajectory; activation memory grows in
    proportion. The paper uses 4 to 32."""
    accumulate: PositiveInt = 1
    """Batches, each at a step of its own, whose mean gradient makes one update: time grows in
    proportion, memory does not."""
    checkpoint: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: a third more
    time, for the memory of one block."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights (EMA) that is saved instead of the last ones: 0.99
    to 0.9999; 0: none. It rises to that value over the first updates. A copy of what is trained."""
    clip: PositiveFloat = 1.0
    """Largest norm of an update's gradient."""
    pictures: NonNegativeInt = 4
    """Held-out prompts that are drawn at the start and every tenth of the run, on sheets in
    `model.pictures/` beside the model. 0: none."""
    save_every: PositiveInt = 100
    """Steps after which the state is written: a job that is killed loses at most so many."""
    seed: Seed = 0
    """Of the order of batches and steps, and of the first LoRA weights. A variant with a seed of
    its own is retrained with that."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> RetrainSettings:
        for key in ("rank", "alpha"):
            is_set = getattr(self, key) != RetrainSettings.model_fields[key].default
            if self.kind != "lora" and is_set:
                raise ValueError(f"{key}: nothing reads it with kind: {self.kind}")
        return self


def _recipes(data: Any) -> Any:
    """Each kind is a recipe of that name; others say which kind they are."""
    if not isinstance(data, Mapping):
        return data
    found: dict[Any, Any] = {kind: {"kind": kind} for kind in get_args(RetrainKind)}
    for name, value in data.items():
        if isinstance(value, Mapping) and name in found:
            value = {**found[name], **value}
        elif isinstance(value, Mapping) and "kind" not in value:
            kinds = ", ".join(get_args(RetrainKind))
            raise ValueError(f"{name}: a recipe of this name needs the key kind: {kinds}")
        if value is not None or name not in found:
            found[name] = value
    return found


def _kinds_agree(recipes: dict[str, RetrainSettings]) -> dict[str, RetrainSettings]:
    for kind in get_args(RetrainKind):
        if recipes[kind].kind != kind:
            raise ValueError(f"{kind}: kind must be {kind}, as its name says")
    return recipes


def _no_other_part(name: str) -> str:
    if re.fullmatch(r"comp|s\d+", name):
        raise ValueError(f"{name} means something else in a variant's name; choose another")
    return name


RecipeName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*$"), AfterValidator(_no_other_part)]
Recipes = Annotated[
    dict[RecipeName, RetrainSettings], BeforeValidator(_recipes), AfterValidator(_kinds_agree)
]
"""Ways of retraining by their names, which variants' names end with: `lora`, `full` and `light`,
and others that say their kind."""


class CalibrateSettings(Settings):
    """Which prompts the dense model is recorded on: the calibration set."""

    prompts: Name = "calibration"
    """The prompt set. The paper uses 100 prompts."""
    batch_size: PositiveInt = 8
    """Prompts that run together, without gradients: as many as fit."""
    memory_mb: PositiveInt | None = None
    """Memory that the second moments for compensation may take at once beside the model, in MB:
    they are gathered in as many passes over the prompts as that takes, with the same result. null:
    80 % of what is free."""


class PruneSettings(Settings):
    """How the surviving weights of pruned models are compensated by least squares."""

    ridge: NonNegativeFloat = 1e-4
    """Ridge, relative to the mean diagonal of the Gram matrix. 1e-6 to 1e-2; higher changes the
    weights less, which is safer with few calibration prompts."""
    groups: PositiveInt = 1
    """1: solve all linears at once, from the dense model's activations. More: solve this many
    groups in the order of the forward pass, each from the activations of the model as pruned and
    compensated so far. Each group runs the dense and the pruned model over all calibration prompts
    and steps again."""
    batch_size: PositiveInt = 8
    """groups above 1: prompts that run together."""


class GenerateSettings(Settings):
    """How images are generated."""

    shard_size: PositiveInt = 1024
    """Prompts per job. Smaller shards run on more machines at once, but each job loads the model
    first."""
    batch_size: PositiveInt = 8
    """Prompts that run together: as many as fit. Images do not depend on it, but for rounding."""


class EfficiencySettings(Settings):
    """How speed and memory are measured: all variants of a model in one process, each once in each
    round, so that a slow moment of the machine meets all of them."""

    batch_size: PositiveInt = 1
    """Images per call of the pipeline."""
    warmup: NonNegativeInt = 1
    """Rounds before the measured ones, which are not counted. 1 to 3."""
    repeats: PositiveInt = 5
    """Rounds whose median is reported. 3 to 20."""


class MaskCostSettings(Settings):
    """How the cost of one learning iteration is measured."""

    steps: NonEmpty[PositiveInt] = (2, 4, 8)
    """The numbers of denoising steps to measure at."""
    kept: NonEmpty[Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """The shares of steps that keep their activations to measure at. 0: all steps are recomputed;
    1: none is, which takes the memory of all steps."""
    batch: PositiveInt = 4
    """Prompts that pass through the denoiser together."""
    repeats: PositiveInt = 3
    """Rounds whose median is reported. 3 to 10."""


def _local_folder(name: str) -> str:
    """An open_clip model's name; in that of a folder, ~ is the home of who plans the run."""
    _, local, folder = name.partition("local-dir:")
    return f"{local}{os.path.expanduser(folder)}" if local else name


# The settings of `evaluate` that decide what is seen of a picture.
SEEN_BY = ("features", "resize", "clip_model", "clip_pretrained", "cmmd_model", "cmmd_pretrained")


class EvaluateSettings(Settings):
    """How variants are evaluated."""

    prompts: Annotated[
        NonEmpty[Name], BeforeValidator(listed, json_schema_input_type=Name | list[Name])
    ] = ("evaluation",)
    """The prompt set, or a list of them: each has columns of its own in the tables; figures show
    the first, and speed is measured on it. The paper uses 5,000 captions of COCO and of Flickr30k;
    FID of a few hundred images is biased upwards."""
    features: Literal["inception", "clip"] = "inception"
    """Features that FID and KID compare: `inception`: Inception's 2,048 pool features; `clip`:
    image embeddings of `clip_model`."""
    resize: Resize = "clean"
    """inception: how pictures are made 299 pixels wide. `clean`: as clean-fid; `torch`: as
    torchmetrics; `legacy`: as torch-fidelity and the first code of FID. FID differs by several
    points between them, so compare with numbers of the same alone."""
    clip_model: Annotated[str, AfterValidator(_local_folder)] = "ViT-B-16"
    """open_clip model, or `local-dir:<folder>`. The paper uses ViT-B-16."""
    clip_pretrained: str | None = "datacomp_xl_s13b_b90k"
    """open_clip weights; null for a local folder."""
    cmmd_model: Annotated[str, AfterValidator(_local_folder)] | None = None
    """open_clip model whose embeddings CMMD compares; null: `clip_model`. CMMD is published on
    ViT-L-14-336-quickgelu with the weights openai."""
    cmmd_pretrained: str | None = None
    """open_clip weights of `cmmd_model`; null for a local folder."""
    batch_size: PositiveInt = 32
    """Images that pass through the feature networks together."""
    resamples: NonNegativeInt = 100
    """Resampled prompt sets that the metrics' standard errors come from; 0: none. 50 to 1,000; FID
    on Inception's features takes three seconds of a core for each."""
    efficiency: EfficiencySettings | None = EfficiencySettings()
    """How speed and memory are measured; null: they are not."""
    mask_cost: MaskCostSettings | None = MaskCostSettings()
    """How the cost of mask learning is measured; null: it is not."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> EvaluateSettings:
        if self.cmmd_model is None and self.cmmd_pretrained is not None:
            raise ValueError("cmmd_pretrained: nothing reads it without cmmd_model")
        for key in ("clip", "cmmd"):
            name, weights = (getattr(self, f"{key}_{of}") for of in ("model", "pretrained"))
            if weights in QUICKGELU and re.fullmatch(r"(ViT|RN)[\w-]+(?<!-quickgelu)", name or ""):
                raise ValueError(
                    f"{key}_model: the weights {weights} were trained with QuickGELU, which {name}"
                    f" lacks; write {name}-quickgelu"
                )
        return self


class ReportSettings(Settings):
    """What the tables and figures show."""

    published: FilePath | None = None
    """A csv file of published results, shown below our own table; null: none."""
    examples: PositiveInt = 8
    """Prompts (rows) in the grid of images, the first ones of the evaluation set."""
    shown: NonEmpty[Share] | None = None
    """Sparsities in figures that have one row or column per variant; null: all. Such figures show
    only the first seed."""
