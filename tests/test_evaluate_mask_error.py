import copy

import pytest
import torch
from tiny import CALLS, tiny

from ecodiff import prune
from ecodiff.calibrate import calibrate
from ecodiff.config.sections import MaskSettings
from ecodiff.evaluate.mask_error import mask_error
from ecodiff.mask import make_mask
from ecodiff.models.pipelines import denoise
from ecodiff.runtime.errors import UserError

PROMPTS = ["a red circle", "a blue square", "a small red ring"]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_error_is_that_of_the_model_that_is_really_pruned(family):
    pipe = tiny(family)
    record = calibrate(pipe, PROMPTS, [0, 1, 2], CALLS[family], batch_size=3)
    masks = {
        f"of seed {s}": make_mask(pipe, "random", 0.1, settings=MaskSettings(seed=s))[0]
        for s in (0, 1)
    }
    found = mask_error(pipe, record, masks, [0.05, 0.1], batch_size=2)
    assert [*zip(found["mask"], found["sparsity"], strict=True)] == [
        (name, sparsity) for name in masks for sparsity in (0.05, 0.1)
    ]
    for name, sparsity, error, median in found.itertuples(index=False):
        cut = copy.deepcopy(pipe)
        prune(cut, masks[name].at(cut, sparsity))
        z0 = denoise(cut, record.embeds, record.noise, record.call)
        spread = (record.z0 - record.z0.mean()).square().mean()
        errors = [
            ((a - b).square().mean() / spread).item() for a, b in zip(z0, record.z0, strict=True)
        ]
        assert error == pytest.approx(sum(errors) / 3, rel=1e-3)
        assert median == pytest.approx(sorted(errors)[1], rel=1e-3)
        assert median > 1e-4


def test_a_record_of_another_model_is_refused():
    record = calibrate(tiny("flux", 1), PROMPTS, [0, 1, 2], CALLS["flux"], batch_size=3)
    with pytest.raises(UserError, match="another model"):
        mask_error(tiny("flux"), record, {}, [0.1], batch_size=2)


def test_a_mask_of_another_model_is_refused_before_any_is_measured():
    pipe = tiny("flux")
    record = calibrate(pipe, PROMPTS, [0, 1, 2], CALLS["flux"], batch_size=3)
    masks = {str(s): make_mask(tiny("flux", s), "random", 0.1)[0] for s in (0, 1)}
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="mask: was made of another model"):
        mask_error(pipe, record, masks, [0.1], batch_size=2)


def test_latents_that_are_not_finite_are_no_error_of_a_mask():
    pipe = tiny("flux")
    record = calibrate(pipe, PROMPTS, [0, 1, 2], CALLS["flux"], batch_size=3)
    mask = make_mask(pipe, "random", 0.1)[0]
    hook = pipe.transformer.proj_out.register_forward_hook(lambda *args: args[-1] * torch.nan)
    with pytest.raises(UserError, match=r"mask at 0\.1: errors of prompts \[0, 1, 2\]"):
        mask_error(pipe, record, {"a": mask}, [0.1], batch_size=2)
    hook.remove()
