"""Time and memory of an iteration of mask learning at the size of SDXL and FLUX.1.

Weights are random. Run `python benchmarks/real_size.py` on a GPU; `--small` checks the script
itself on any machine. TFLOP/s count the operations of a denoising step's forward pass once for the
forward pass, once for the gradient and once for the recomputation, if there is one; `of ceiling`
compares them with the rate of large matrix products, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from ecodiff.config.sections import MaskCostSettings
from ecodiff.evaluate.mask_cost import mask_cost
from ecodiff.models.families import Call
from ecodiff.models.pipelines import call_arguments, starting_noise
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.runtime.timing import seconds

CONFIGS = Path(__file__).parents[1] / "tests/configs"
PROMPTS = 400  # 100 calibration prompts, four epochs
# Model -> pairs of (numbers of denoising steps, shares of them whose activations are kept).
PLANS = {
    "sdxl": [((50,), (0.0,)), ((4,), (0.0, 1.0))],
    "flux": [((4, 28), (0.0,)), ((1,), (1.0,))],
}
SMALL = {
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 4],
    },
    "flux": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
}


def built(name: str, device: str, small: bool) -> DiffusionPipeline:
    """A bf16 pipeline of a real model's architecture: random weights, no text encoders."""
    facts = json.loads((CONFIGS / f"{name}.json").read_text())
    config = facts["config"] | (SMALL[name] if small else {})
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=8,
        latent_channels=4 if name == "sdxl" else 16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            denoiser = getattr(diffusers, facts["class"])(**config).eval()
    finally:
        torch.set_default_dtype(before)
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if name == "sdxl":
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
        return diffusers.StableDiffusionXLPipeline(
            vae=vae, unet=denoiser, scheduler=scheduler, add_watermarker=False, **texts
        )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    return diffusers.FluxPipeline(vae=vae, transformer=denoiser, scheduler=scheduler, **texts)


def texts_of(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Random embeddings of one prompt, and for SDXL of a negative prompt, for guidance."""
    denoiser = denoiser_of(pipe)
    config, like = denoiser.config, {"device": denoiser.device, "dtype": denoiser.dtype}
    if "joint_attention_dim" in config:
        return {
            "prompt_embeds": torch.randn(1, 512, config.joint_attention_dim, **like),
            "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **like),
        }
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        f"{branch}{key}": torch.randn(1, *shape, **like)
        for branch in ("", "negative_")
        for key, shape in (
            ("prompt_embeds", (77, config.cross_attention_dim)),
            ("pooled_prompt_embeds", (pooled,)),
        )
    }


def call_of(name: str, side: int) -> Call:
    """Arguments of the pipeline's call, but for the number of steps; `side` in pixels."""
    return {"height": side, "width": side, "guidance_scale": 5.0 if name == "sdxl" else 3.5}


def asked_for(description: str | None, repeats: int) -> argparse.Namespace:
    """The command line of a benchmark at real size; `device` is a GPU where there is one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", default=[*PLANS], choices=[*PLANS])
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--small", action="store_true", help="tiny models, to check the script")
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def show(table: pd.DataFrame, asked: argparse.Namespace) -> None:
    """Print a table under its date, hardware and versions."""
    hardware = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    print(f"{date.today()}, {hardware}, torch {torch.__version__}, bf16, {asked.side} px")
    print(table.to_markdown(index=False))


def ceiling(device: str, side: int) -> float:
    """Floating-point operations per second of large bf16 matrix products, the median of ten."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: left @ right, left.device) for _ in range(12)]
    return 2 * side**3 / float(np.median(times[2:]))


def operations(pipe: DiffusionPipeline, embeds: dict, noise: torch.Tensor, call: Call) -> int:
    """Floating-point operations of one denoising step."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        arguments = call_arguments(pipe, embeds, noise, {**call, "num_inference_steps": 1})
        pipe(**arguments)
    return counter.get_total_flops()


def measured(name: str, side: int, device: str, repeats: int, small: bool) -> pd.DataFrame:
    """The rows of one model: time, memory and utilisation of an iteration."""
    pipe = built(name, device, small)
    call = call_of(name, side)
    embeds, noise = texts_of(pipe), starting_noise(pipe, [0], call)
    rate = ceiling(device, 512 if small else 8192)
    work = operations(pipe, embeds, noise, call)
    tables = []
    for steps, kept in [((2,), (0.0, 1.0))] if small else PLANS[name]:
        settings = MaskCostSettings(steps=steps, kept=kept, batch=1, repeats=repeats)
        tables.append(mask_cost(pipe, embeds, noise, call, settings))
    table = pd.concat(tables)
    total = (3 - table["kept"]) * table["steps"] * work
    return pd.DataFrame(
        {
            "model": f"{name} ({count_parameters(denoiser_of(pipe)) / 1e9:.2f}B)",
            "steps": table["steps"],
            "kept": table["kept"],
            "seconds": table["seconds"].round(2),
            "x floor": (table["seconds"] / table["floor_seconds"]).round(3),
            "peak GB": (table["peak_memory_mb"] / 1e3).round(2),
            "TFLOP/s": (total / table["seconds"] / 1e12).round(1),
            "of ceiling": (total / table["seconds"] / rate).round(3),
            f"hours for {PROMPTS} prompts": (table["seconds"] * PROMPTS / 3600).round(2),
        }
    )


def main() -> None:
    """Measure and print one table."""
    asked = asked_for(__doc__, repeats=3)
    tables = [
        measured(name, asked.side, asked.device, asked.repeats, asked.small)
        for name in asked.models
    ]
    show(pd.concat(tables), asked)


if __name__ == "__main__":
    main()
