"""What a run takes: `python benchmarks/cost.py config/paper.yaml` computes it, and runs nothing.

F is a forward pass of one denoising step of one prompt, with both branches of guidance, counted on
the meta device (see sizes.py). Time is operations over a stated rate, that of bfloat16
for models in two bytes; `benchmarks/real_size.py` measures it on a GPU.
calibrate: F a step of each prompt. grams: the same, as often as `calibrate.memory_mb` makes passes
(once without it), and X^T X of each consumer at the float32 rate.
mask: learned ones, 3F a step of each prompt that passes (2F where activations are kept); others as
they look: `sensitivity` 3F, `obs` as grams, `wanda` and `depth` F, `taylor` 3F at 50 timesteps.
prune: float32 solving of n^3 / 3 + 2 n^3 for n columns; with groups, F of dense and pruned each.
trajectory: F a step of each prompt, twice where the pruned model leads.
retrain: a sample is one step of one prompt: 3F in full and 2F with adapters, F more with
`checkpoint`, times what is left of the denoiser. generate: F a step, times what is left.
Device memory: weights of the whole pipeline and what the stage adds (activations and optimiser,
second moments, the largest solve); temporary tensors are left out, 10 to 20 % more is wise.
Host memory: the weights, which pass through it, or what a stage gathers there before it is written
(a record, second moments, the state of retraining), whichever is more; `resources.mem_mb` has 4 GB
more for the libraries.
Disk: what stays of a stage; a pruned model is a whole pipeline, a picture 1.5 bytes a pixel.
Not counted: text encoders, autoencoder, judging pictures, measuring efficiency, loading.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import pandas as pd
from sizes import Sizes, sizes_of

from ecodiff.config.plan import Plan
from ecodiff.config.run import Config, read_over_each_other
from ecodiff.config.sections import MaskSettings, RetrainSettings
from ecodiff.config.variants import Variant
from ecodiff.runtime.errors import UserError

BF16, FLOAT32 = 989e12, 67e12  # peaks of an H100 SXM, dense, without TF32
USED = 0.4  # the share of a peak that is reached
TIMESTEPS = 50  # of `taylor`
PIXEL = 1.5  # bytes of a PNG
GB = 1e9


@dataclass(frozen=True)
class Job:
    """A job, or several of one size: operations in the model's dtype and in float32, bytes on the
    device and on disk, bytes gathered in the host's memory, and how many jobs share the work."""

    stage: str
    work: float
    device: float
    disk: float
    float32: float = 0.0
    gathered: float = 0.0
    shards: int = 1


class Costs:
    """The jobs of one model of a run, stage by stage.

    Args:
        config: the run's.
        name: of the model.
        sizes: of the model at its call.
    """

    def __init__(self, config: Config, name: str, sizes: Sizes) -> None:
        self.config, self.name, self.sizes = config, name, sizes
        self.plan, self.model = Plan(config), config.models[name]
        self.variants = [variant for model, variant in self.plan.pruned if model == name]
        self.steps = self.model.call.num_inference_steps
        self.loop = self.steps * sizes.step  # of one prompt
        self.prompts = config.prompts[config.calibrate.prompts].count
        self.weights = self._weights(1.0)
        # Grams are float64 where all of them take at most 8 GB, see `gather_grams`.
        squares = sum(columns**2 for columns, _ in sizes.consumers.values())
        self.moments = squares * (4 if 8 * squares > 8e9 else 8)
        self.products = self.steps * sum(2 * n**2 * rows for n, rows in sizes.consumers.values())

    def jobs(self) -> Iterator[Job]:
        """All jobs that are counted."""
        yield from self.calibrate()
        for mask in dict.fromkeys(self.plan.scored(self.name, v).scores for v in self.variants):
            yield self.mask(mask)
        for variant in dict.fromkeys(variant.pruned for variant in self.variants):
            yield self.prune(variant)
        yield from self.trajectories()
        for variant in self.variants:
            if variant.retrain:
                yield self.retrain(variant)
        for variant in (Variant(), *self.variants):
            yield self.generate(variant)

    def calibrate(self) -> Iterator[Job]:
        """The record, and the second moments where a variant needs them."""
        batch = self.config.calibrate.batch_size
        passing = batch * (self.sizes.inputs / max(self.sizes.blocks, 1) + self.sizes.latent)
        record = self.prompts * (self.sizes.texts + 2 * self.sizes.latent)
        work = self.prompts * self.loop
        yield Job("calibrate", work, self.weights + passing, record, gathered=record)
        if self.config.prune.groups == 1 and any(v.compensation for v in self.variants):
            allowed = self.config.calibrate.memory_mb
            held = min(self.moments, allowed * 1e6) if allowed else self.moments
            work *= ceil(self.moments / held)
            device, float32 = self.weights + passing + held, self.prompts * self.products
            yield Job("grams", work, device, self.moments, float32, gathered=held)

    def mask(self, variant: Variant) -> Job:
        """Scoring by a method."""
        settings = self.plan.mask_settings(self.name, variant.mask)
        work, float32, device, method = 0.0, 0.0, self.weights, variant.method
        if method in ("ecodiff", "flat-start", "per-step", "sensitivity"):
            kept = self._kept(settings)
            work = _passes(settings, method, self.prompts) * (3 - kept / self.steps) * self.loop
            device += settings.batch * self.sizes.activations * min(kept + 1, self.steps)
        elif method in ("obs", "wanda", "depth"):
            work = self.prompts * self.loop
            float32 = 0.0 if method == "depth" else self.prompts * self.products
            device += 0.0 if method == "depth" else self.moments
        elif method == "taylor":
            work = 3 * self.prompts * TIMESTEPS * self.sizes.step
            device += self.sizes.parameters * 4 + settings.batch * self.sizes.activations
        return Job("mask", work, device, 0.0, float32)

    def _kept(self, settings: MaskSettings) -> int:
        """Steps that keep their activations; `auto`, which depends on the device, counts as 0."""
        if not settings.checkpoint:
            return self.steps
        auto = settings.keep_steps == "auto"
        return 0 if auto else min(int(settings.keep_steps), self.steps)

    def prune(self, variant: Variant) -> Job:
        """Cutting, and solving the rest."""
        work, float32, device = 0.0, 0.0, self.weights
        disk = self._weights(1 - variant.sparsity)
        if variant.compensation:
            largest = max(columns for columns, _ in self.sizes.consumers.values())
            float32 = sum(7 / 3 * columns**3 for columns, _ in self.sizes.consumers.values())
            device += 3 * 8 * largest**2  # the moments, their factor and the right side, float64
            if self.config.prune.groups > 1:
                left = 2 - variant.sparsity
                work = self.config.prune.groups * self.prompts * self.loop * left
                device += self._weights(1 - variant.sparsity)
                float32 += self.prompts * self.products
        return Job("prune", work, device, disk, float32)

    def trajectories(self) -> Iterator[Job]:
        """What pruned models learn from: a folder a prompt set, batch and leader."""
        found: dict[str, tuple[str, float]] = {}
        for variant in self.variants:
            if variant.retrain:
                recipe = self.plan.retraining(self.name, variant.name)
                prompts = recipe.prompts or self.config.calibrate.prompts
                for shard in self.plan.trajectories(self.name, variant.name):
                    led = f"/{self.name}/{variant.pruned.name}/" in shard
                    folder = str(Path(shard).parent)
                    found[folder] = (prompts, (2 - variant.sparsity) if led else 1.0)
        for prompts, runs in found.values():
            count, shards = self.config.prompts[prompts].count, self._shards(prompts)
            read = 2 * self.sizes.branches * self.steps * self.sizes.latent  # and predicted
            disk = count * (read + self.sizes.texts)
            device = self.weights + (runs - 1) * self.sizes.parameters * self.sizes.value
            yield Job("trajectory", count * runs * self.loop, device, disk, shards=shards)

    def retrain(self, variant: Variant) -> Job:
        """Learning from a trajectory."""
        recipe = self.plan.retraining(self.name, variant.name)
        left = 1 - variant.sparsity
        passes = (3 if recipe.kind == "full" else 2) + recipe.checkpoint
        samples = recipe.steps * recipe.batch * recipe.accumulate
        kept = self.sizes.activations
        if recipe.checkpoint:
            kept = kept / max(self.sizes.blocks, 1) + self.sizes.inputs
        learned, replaced = self._learned(recipe, left)
        # Of a trained parameter: itself, two moments, and its gradient, which the state lacks.
        each, kept_of_each = (6, 4) if recipe.optimiser == "adamw8bit" else (16, 12)
        weights = self._weights(left) - replaced
        device = weights + each * learned + recipe.batch * left * kept
        work = samples * passes * left * self.sizes.step
        return Job("retrain", work, device, self._weights(left), gathered=kept_of_each * learned)

    def _learned(self, recipe: RetrainSettings, left: float) -> tuple[float, float]:
        """Trained parameters, and the bytes of weights that they take the place of."""
        if recipe.kind == "lora":
            return recipe.rank * self.sizes.lora * left, 0.0
        if recipe.kind == "light":
            return 0.0005 * self.sizes.parameters, 0.0
        learned = self.sizes.parameters * left
        return learned, learned * self.sizes.value

    def generate(self, variant: Variant) -> Job:
        """Drawing the evaluation sets."""
        sets, call = self.config.evaluate.prompts, self.model.call
        count = sum(self.config.prompts[name].count for name in sets)
        left = 1 - variant.sparsity
        device = self._weights(left) + self.config.generate.batch_size * self.sizes.latent
        disk = count * (PIXEL * call.height * call.width + self.sizes.latent)
        shards = sum(map(self._shards, sets))
        return Job("generate", count * left * self.loop, device, disk, shards=shards)

    def _shards(self, prompts: str) -> int:
        """How many jobs share a prompt set."""
        return -(-self.config.prompts[prompts].count // self.config.generate.shard_size)

    def _weights(self, left: float) -> float:
        """Bytes of the whole pipeline with a share of its denoiser."""
        return (left * self.sizes.parameters + self.sizes.other) * self.sizes.value


def _passes(settings: MaskSettings, method: str, prompts: int) -> int:
    """Prompts that pass forward and back while a mask is learned."""
    few = min(settings.prompts or prompts, prompts)
    if method == "sensitivity":
        return few
    starts = few if method == "ecodiff" and settings.first_logit == "sensitivity" else 0
    return starts + settings.iterations * settings.batch * settings.accumulate


def table(config: Config, rate: float, float32: float) -> pd.DataFrame:
    """A row a model and stage, and their sums.

    Args:
        config: the run's.
        rate: floating-point operations a second in bfloat16 and float16.
        float32: the same in float32.
    """
    rows = []
    for name, model in config.models.items():
        sizes = sizes_of(model)
        own, costs = rate if sizes.value == 2 else float32, Costs(config, name, sizes)
        for job in costs.jobs():
            hours = (job.work / own + job.float32 / float32) / 3600
            sizes_of_job = (job.device, max(job.gathered, costs.weights), job.disk)
            times = (job.shards, hours, hours / job.shards)
            rows.append((name, job.stage, *times, *(size / GB for size in sizes_of_job)))
    columns = ["model", "stage", "jobs", "GPU-hours", "longest h"]
    columns += ["device GB", "host GB", "disk GB"]
    jobs = pd.DataFrame(rows, columns=columns)
    largest = ("longest h", "device GB", "host GB")
    how = dict.fromkeys(columns[2:], "sum") | dict.fromkeys(largest, "max")
    stages = jobs.groupby(["model", "stage"], sort=False).agg(how).reset_index()
    return pd.concat([stages, pd.DataFrame([{"model": "all", "stage": "all", **jobs.agg(how)}])])


def main() -> None:
    """Print the model of the computation and the table."""
    parser = argparse.ArgumentParser(description="GPU-hours, memory and disk of a run.")
    parser.add_argument("config", type=Path, nargs="+", help="each is put over those before it")
    said = f"operations a second; default {USED:.0%} of an H100's peak".replace("%", "%%")
    parser.add_argument("--flops", type=float, default=USED * BF16, help=f"bfloat16 {said}")
    parser.add_argument("--float32-flops", type=float, default=USED * FLOAT32, help=said)
    asked = parser.parse_args()
    if min(asked.flops, asked.float32_flops) <= 0:
        parser.error("--flops and --float32-flops must be above 0")
    try:
        found = table(read_over_each_other(asked.config), asked.flops, asked.float32_flops)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(__doc__.split("\n\n", 1)[1])
    print(f"Rates: {asked.flops / 1e12:.3g} TFLOP/s, float32 {asked.float32_flops / 1e12:.3g}\n")
    print(found.to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
