"""The training loss is the model's own, in the conventions of the pipeline that samples from it."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny import calibrated

from ecodiff.models.pipelines import denoise
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.denoising_loss import conditioned, objective

FAMILIES = ("sdxl", "flux")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def latents(seed):
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_noise_and_velocity_targets_by_hand():
    z0, noise, t = latents(0), latents(1), torch.tensor([0, 700])
    scheduler = DDIMScheduler(**BETAS)
    alpha = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    for prediction, target in (
        ("epsilon", noise),
        ("v_prediction", alpha**0.5 * noise - (1 - alpha) ** 0.5 * z0),
        ("sample", z0),
    ):
        learned = objective(DDIMScheduler(**BETAS, prediction_type=prediction))
        noised = alpha**0.5 * z0 + (1 - alpha) ** 0.5 * noise
        assert torch.allclose(learned.noised(z0, noise, t), noised, atol=1e-6)
        assert torch.allclose(learned.target(z0, noise, t), target, atol=1e-6)


def test_flow_target_by_hand():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    z0, noise, t = latents(0), latents(1), torch.tensor([250.0, 1000.0])
    learned = objective(scheduler)
    noised = torch.stack([0.75 * z0[0] + 0.25 * noise[0], noise[1]])
    assert torch.allclose(learned.noised(z0, noise, t), noised, atol=1e-6)
    assert torch.equal(learned.target(z0, noise, t), noise - z0)


def test_euler_feeds_the_denoiser_what_training_does():
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    z0, noise = latents(0), latents(1)
    for step in (0, 4, 9):
        t = scheduler.timesteps[step]
        scheduler._step_index = None
        given = scheduler.scale_model_input(scheduler.add_noise(z0, noise, t[None]), t)
        learned = objective(scheduler).noised(z0, noise, t.long().expand(2))
        assert torch.allclose(given, learned, atol=1e-5)


SCHEDULERS = {
    "euler-epsilon": ("sdxl", EulerDiscreteScheduler, {**BETAS, "timestep_spacing": "trailing"}),
    "euler-v": (
        "sdxl",
        EulerDiscreteScheduler,
        {**BETAS, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "ddim-epsilon": ("sdxl", DDIMScheduler, {**BETAS, "clip_sample": False}),
    "ddim-v": (
        "sdxl",
        DDIMScheduler,
        {**BETAS, "clip_sample": False, "prediction_type": "v_prediction"},
    ),
    "ddim-sample": (
        "sdxl",
        DDIMScheduler,
        {**BETAS, "clip_sample": False, "prediction_type": "sample"},
    ),
    "flow": ("flux", FlowMatchEulerDiscreteScheduler, {}),
    "flow-shift": ("flux", FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flow-dynamic": ("flux", FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_perfect_denoiser_recovers_the_clean_latent_in_the_pipelines_own_loop(case, monkeypatch):
    family, scheduler, config = SCHEDULERS[case]
    pipe, calibration = calibrated(family)
    pipe.scheduler = scheduler(**config)
    prepared = conditioned(pipe, calibration.embeds, calibration.noise, calibration.call)
    learned, denoiser = objective(pipe.scheduler), denoiser_of(pipe)
    signature, z0 = inspect.signature(denoiser.forward), calibration.z0

    def perfect(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        seen, t = given[prepared.latents], given["timestep"] / prepared.scale
        clean = torch.cat([z0] * (len(seen) // len(z0)))  # guidance branches
        t = t.round().long() if family == "sdxl" else t
        t = t.expand(len(seen))
        # What is seen is affine in the noise: solve for it, then answer as training demands.
        offset = learned.noised(clean, torch.zeros_like(clean), t)
        slope = learned.noised(torch.zeros_like(clean), torch.ones_like(clean), t)
        return (learned.target(clean, (seen - offset) / slope, t),)

    monkeypatch.setattr(denoiser, "forward", perfect)
    call = {**calibration.call, "num_inference_steps": 10}
    found = denoise(pipe, calibration.embeds, calibration.noise, call)
    # DDIM without final alpha of one keeps the noise of the first training step.
    atol = 0.1 if "ddim" in case else 1e-3
    assert torch.allclose(found, z0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_denoiser_is_called_as_the_pipeline_calls_it(family):
    pipe, calibration = calibrated(family)
    denoiser = denoiser_of(pipe)
    call = {**calibration.call, "num_inference_steps": 3, "guidance_scale": 1.0}
    embeds = {k: v for k, v in calibration.embeds.items() if not k.startswith("negative_")}
    outputs = []
    hook = denoiser.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    denoise(pipe, embeds, calibration.noise, call)
    hook.remove()
    first = pipe.scheduler.timesteps[0].clone()
    pipe.scheduler._step_index = None
    seen = calibration.noise
    if family == "sdxl":
        seen = pipe.scheduler.scale_model_input(seen * pipe.scheduler.init_noise_sigma, first)
    prepared = conditioned(pipe, calibration.embeds, calibration.noise, calibration.call)
    with torch.no_grad():
        found = prepared.predict(denoiser, seen, first.expand(2))
    assert torch.allclose(found, outputs[0], atol=1e-5)


def test_flow_timesteps_are_those_of_the_shifted_schedule():
    pipe, calibration = calibrated("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    conditioned(pipe, calibration.embeds, calibration.noise, calibration.call)
    chosen = objective(pipe.scheduler).spread(4000) / 1000
    # The median of u is 1/2, which the shift moves to 3 u / (1 + 2 u) = 3/4.
    assert chosen.median() == pytest.approx(0.75, abs=0.03)


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(UserError, match="EDMEulerScheduler"):
        objective(EDMEulerScheduler())


def test_timesteps_are_spread_from_little_noise_to_much():
    assert objective(DDIMScheduler(**BETAS)).spread(4).tolist() == [0, 333, 666, 999]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    assert objective(scheduler).spread(3).tolist() == pytest.approx([300, 600, 1000])
