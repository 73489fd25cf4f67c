"""How masks transfer to other settings: `python benchmarks/transfer.py results/compare toy-sdxl`.

Masks of a finished run are judged with another scheduler, number of steps, guidance scale, image
size or kind of caption than they were learned with. Units are masked, not cut, and the reference is
the dense model with the same change.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
from diffusers import DiffusionPipeline

from ecodiff.calibrate import Calibration, calibrate
from ecodiff.config.run import Config, load_config
from ecodiff.config.variants import Variant
from ecodiff.evaluate.mask_error import mask_error
from ecodiff.mask import Mask, make_mask
from ecodiff.models.loading import load_pipeline
from ecodiff.prompts import read_prompts
from ecodiff.report.tables import markdown
from ecodiff.runtime.devices import choose_device
from ecodiff.toys import world

BATCH = 32
UNET_SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
)
FLOW_SCHEDULERS = ("UniPCMultistepScheduler",)


@dataclass(frozen=True)
class Change:
    """One row of the table: a change of the setting in which masks are judged.

    Attributes:
        name: its name in the table.
        call: arguments of the pipeline's call that differ.
        scheduler: name of a scheduler class of diffusers; empty: the model's own.
        objects: only captions with this number of objects; 0: all.
    """

    name: str
    call: dict[str, Any]
    scheduler: str = ""
    objects: int = 0


def changes(call: dict[str, Any], flow: bool) -> list[Change]:
    """The rows: no change, then one change at a time.

    Args:
        call: the model's `call` settings.
        flow: whether the model is a flow-matching one.
    """
    steps, height, width = (call[k] for k in ("num_inference_steps", "height", "width"))
    rows = [Change("as calibrated", {})]
    for n in (steps // 2, 2 * steps, 4 * steps):
        rows.append(Change(f"{n} steps", {"num_inference_steps": n}))
    if call.get("guidance_scale"):
        scale = call["guidance_scale"]
        rows += [Change(f"guidance {s:g}", {"guidance_scale": s}) for s in (1.0, 2 * scale)]
    for part in (0.75, 1.5):
        sides = {"height": int(part * height), "width": int(part * width)}
        rows.append(Change(f"{sides['width']}x{sides['height']} pixels", sides))
    schedulers = FLOW_SCHEDULERS if flow else UNET_SCHEDULERS
    rows += [Change(name.removesuffix("Scheduler"), {}, name) for name in schedulers]
    return rows + [Change(f"captions of {n} object(s)", {}, objects=n) for n in (1, 2)]


def judged(
    pipe: DiffusionPipeline,
    prompts: pd.DataFrame,
    call: dict[str, Any],
    change: Change,
    masks: dict[str, Mask],
    sparsity: float,
) -> pd.DataFrame:
    """Errors of masks under a change, a row per mask: mask, latent_error and median_error."""
    own, rows = pipe.scheduler, prompts
    if change.objects:
        rows = prompts[[objects(p) == change.objects for p in prompts["prompt"]]]
    if change.scheduler:
        pipe.scheduler = scheduler(change.scheduler, own)
    try:
        record = calibrate(pipe, [*rows["prompt"]], [*rows["seed"]], call | change.call, BATCH)
        return mask_error(pipe, record, masks, [sparsity], BATCH)
    finally:
        pipe.scheduler = own


def scheduler(name: str, own: Any) -> Any:
    """A scheduler of class `name` with the config of the model's own."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    extra = flow if name in FLOW_SCHEDULERS else {}
    return getattr(diffusers, name).from_config(own.config, **extra)


def objects(caption: str) -> int:
    """The number of objects in a ShapeWorld caption."""
    return len(world.parse_caption(caption).things)


def learned_on_single_objects(
    pipe: DiffusionPipeline, config: Config, run: Path, model: str, sparsity: float
) -> Mask:
    """A mask learned (EcoDiff) on only the calibration prompts with one object."""
    record = Calibration.load(run / model / f"{config.calibrate.prompts}.safetensors")
    chosen = [i for i, prompt in enumerate(record.prompts) if objects(prompt) == 1]
    fewer, settings = record.of(chosen), config.models[model].mask
    return make_mask(pipe, "ecodiff", sparsity, calibration=fewer, settings=settings)[0]


def main() -> None:
    """Judge the first seed's mask of each method and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="results/<run>")
    parser.add_argument("model")
    parser.add_argument(
        "--methods", nargs="+", default=["ecodiff", "flat-start", "obs", "magnitude"]
    )
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--prompts", type=int, default=64)
    asked = parser.parse_args()
    config = load_config(asked.run / "config.yaml")
    model = config.models[asked.model]
    call = model.call.model_dump(exclude_none=True)
    loading = model.load.model_dump()
    pipe = load_pipeline(model.source, **loading | {"device": choose_device(model.load.device)})
    prompts = read_prompts(asked.run / f"prompts/{config.evaluate.prompts[0]}.parquet")[
        : asked.prompts
    ]
    masks = {m: Mask.load(first_of(m, asked.run, asked.model)) for m in asked.methods}
    masks["one object"] = learned_on_single_objects(
        pipe, config, asked.run, asked.model, asked.sparsity
    )
    rows = []
    for change in changes(call, flow="Flow" in type(pipe.scheduler).__name__):
        print(f"judging {change.name} ...", file=sys.stderr, flush=True)
        found = judged(pipe, prompts, call, change, masks, asked.sparsity).set_index("mask")
        both = zip(found["median_error"], found["latent_error"], strict=True)
        rows.append([change.name, *(f"{1e3 * m:.2f} / {e:.3f}" for m, e in both)])
    what = "median (10⁻³) / mean of the relative latent error"
    size = f"{asked.sparsity:.0%} removed, {len(prompts)} captions"
    print(f"{asked.model}, {size}: {what}; {date.today()}\n")
    print(markdown(pd.DataFrame(rows, columns=["", *masks])))


def first_of(method: str, run: Path, model: str) -> Path:
    """The file of the mask of a method's first seed in a run."""
    found = sorted((run / model / "masks").glob(f"{method}-*/mask.safetensors"))
    exact = [path for path in found if Variant.parse(path.parent.name).method == method]
    if not exact:
        raise SystemExit(f"{run / model / 'masks'}: no mask of {method}")
    return exact[0]


if __name__ == "__main__":
    main()
