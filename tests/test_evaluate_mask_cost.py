from __future__ import annotations

import pytest
from tiny import CALLS, tiny

from ecodiff.config.sections import MaskCostSettings
from ecodiff.evaluate.mask_cost import mask_cost
from ecodiff.models.pipelines import encode, starting_noise
from ecodiff.runtime import timing


def cost_of(pipe, call, settings):
    embeds = encode(pipe, ["a small red ring on navy"], call)
    return mask_cost(pipe, embeds, starting_noise(pipe, [0], call), call, settings)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_memory_grows_with_the_steps_that_are_kept(family: str) -> None:
    pipe = tiny(family)
    settings = MaskCostSettings(steps=(2, 6), kept=(0.0, 0.5, 1.0), batch=1, repeats=1)
    cost = cost_of(pipe, CALLS[family], settings).set_index(["steps", "kept"])
    assert [*cost.index] == [(steps, kept) for steps in (2, 6) for kept in (0.0, 0.5, 1.0)]
    peak = cost["peak_memory_mb"]
    step = (peak[6, 1.0] - peak[2, 1.0]) / 4  # activations of one
    assert step > 0.1 * peak[2, 1.0]
    assert peak[6, 0.0] - peak[2, 0.0] < 0.05 * step
    assert peak[6, 0.5] - peak[2, 0.5] == pytest.approx(2 * step, rel=0.1)
    assert (cost["seconds"] > 0).all()
    assert all(p.requires_grad for p in pipe.vae.parameters())


def test_the_floor_is_counted_in_forward_passes(monkeypatch) -> None:
    """By hand: with every piece of work taking a second, F is 1."""
    monkeypatch.setattr(timing, "seconds", lambda work, device: work() or 1.0)
    settings = MaskCostSettings(steps=(2,), kept=(0.0, 0.5, 1.0), batch=1, repeats=1)
    cost = cost_of(tiny("flux"), CALLS["flux"], settings)
    assert cost["floor_seconds"].tolist() == [3.0, 2.5, 2.0]
