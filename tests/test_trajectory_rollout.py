"""Time-step checkpointing must change the memory and nothing else."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from tiny import tiny_flux, tiny_sdxl

from ecodiff.models.pipelines import denoise, encode, starting_noise
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates
from ecodiff.trajectory.rollout import frozen, rollout

CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}
PROMPTS = ["a red circle", "a blue square"]


SCHEDULERS = {
    "euler": (tiny_sdxl, EulerDiscreteScheduler),
    "euler-ancestral": (tiny_sdxl, EulerAncestralDiscreteScheduler),
    "ddim": (tiny_sdxl, DDIMScheduler),
    "dpm++2m": (tiny_sdxl, DPMSolverMultistepScheduler),
    "lcm": (tiny_sdxl, LCMScheduler),
    "flow-match-euler": (tiny_flux, FlowMatchEulerDiscreteScheduler),
}


@pytest.fixture(params=[tiny_sdxl, tiny_flux], ids=["sdxl", "flux"])
def pipe(request):
    return request.param()


@pytest.fixture(params=SCHEDULERS)
def scheduled(request):
    """A pipeline under one of the schedulers that its family is used with."""
    make, scheduler = SCHEDULERS[request.param]
    pipe = make()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def inputs(pipe):
    return encode(pipe, PROMPTS, CALL), starting_noise(pipe, [0, 1], CALL)


def gate_gradients(pipe, **options):
    gates = Gates(discover(pipe), first_logit=0.5)
    gates.draw(len(PROMPTS), torch.Generator().manual_seed(3))
    denoiser = denoiser_of(pipe)
    with frozen(denoiser), gates.attached(denoiser):
        rollout(pipe, *inputs(pipe), CALL, **options).square().mean().backward()
    return torch.cat([logits.grad for logits in gates.logits.values()])


@pytest.mark.parametrize("keep_steps", [0, 1, 3])
def test_gradients_equal_full_backpropagation_to_the_bit(scheduled, keep_steps):
    full = gate_gradients(scheduled, checkpoint=False)
    assert full.norm() > 0
    assert torch.equal(gate_gradients(scheduled, keep_steps=keep_steps), full)


def test_the_latent_is_that_of_the_plain_call(pipe):
    with torch.no_grad():
        z0 = rollout(pipe, *inputs(pipe), CALL)
    torch.testing.assert_close(z0, denoise(pipe, *inputs(pipe), CALL), rtol=0, atol=0)


def test_recomputed_steps_see_the_stored_latents(scheduled):
    """Fault 1: a recompute that scaled its input with another step's sigma."""
    pipe = scheduled
    seen = []
    first = "conv_in" if hasattr(pipe, "unet") else "x_embedder"
    denoiser, gates = denoiser_of(pipe), Gates(discover(pipe))
    hook = getattr(denoiser, first).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    gates.draw(len(PROMPTS), torch.Generator().manual_seed(0))
    with frozen(denoiser), gates.attached(denoiser):
        rollout(pipe, *inputs(pipe), CALL).sum().backward()
    hook.remove()
    stored, recomputed = seen[:3], seen[3:]
    assert len(recomputed) == 3
    for latent, again in zip(stored, reversed(recomputed), strict=True):
        torch.testing.assert_close(latent, again, rtol=0, atol=0)


def test_debug_finds_every_recomputed_step_equal_and_changes_nothing(scheduled):
    plain = gate_gradients(scheduled)
    assert torch.equal(gate_gradients(scheduled, debug=True), plain)


def test_debug_finds_a_step_that_is_not_the_same_again(pipe):
    last = pipe.unet.conv_out if hasattr(pipe, "unet") else pipe.transformer.proj_out
    noise = torch.Generator().manual_seed(0)
    handle = last.register_forward_hook(
        lambda _, args, out: out + 1e-6 * torch.randn(out.shape, generator=noise)
    )
    gate_gradients(pipe)  # nothing is noticed
    with pytest.raises(UserError, match=r"mask\.debug: step 3, computed again, differs by up to"):
        gate_gradients(pipe, debug=True)
    handle.remove()


def test_kept_steps_are_not_recomputed(pipe):
    runs = []
    hook = denoiser_of(pipe).time_embedding.register_forward_hook if hasattr(pipe, "unet") else None
    hook = hook or pipe.transformer.x_embedder.register_forward_hook
    handle = hook(lambda *_: runs.append(1))
    gate_gradients(pipe, keep_steps=2)
    handle.remove()
    assert len(runs) == 3 + 1


def test_forward_is_restored_even_after_an_error(pipe):
    denoiser = denoiser_of(pipe)
    embeds, noise = inputs(pipe)
    with pytest.raises((RuntimeError, ValueError)):
        rollout(pipe, embeds, noise[:, :1], CALL)
    assert "forward" not in vars(denoiser)


def test_weights_get_no_gradients_and_their_settings_come_back(pipe):
    denoiser = denoiser_of(pipe)
    first = next(denoiser.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in denoiser.parameters()]
    assert not first.requires_grad and any(before)
    gate_gradients(pipe)
    assert all(p.grad is None for p in denoiser.parameters())
    assert [p.requires_grad for p in denoiser.parameters()] == before
