from __future__ import annotations

import pytest
from tiny import CALLS, tiny

from ecodiff.config import MaskCostSettings
from ecodiff.evaluate.mask_cost import mask_cost


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_memory_grows_with_steps_only_without_checkpointing(family: str) -> None:
    pipe, settings = tiny(family), MaskCostSettings(steps=(2, 6), batch=1)
    prompts = ["a small red ring on navy"]
    cost = mask_cost(pipe, prompts, [0], CALLS[family], settings)
    assert list(zip(cost["steps"], cost["checkpoint"], strict=True)) == [
        (2, True),
        (2, False),
        (6, True),
        (6, False),
    ]
    peak = cost.set_index(["checkpoint", "steps"])["peak_memory_mb"]
    grown = {checkpoint: peak[checkpoint, 6] - peak[checkpoint, 2] for checkpoint in (True, False)}
    assert grown[False] > 0.3 * peak[False, 2]
    assert grown[True] < 0.05 * grown[False]
    assert (cost["seconds"] > 0).all()
    assert all(p.requires_grad for p in pipe.vae.parameters())
