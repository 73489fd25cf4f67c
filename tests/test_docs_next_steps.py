"""The blocks of docs/next-steps.md run as they are written, and the model still draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import CALLS, tiny

import ecodiff
from ecodiff.models.pipelines import denoise, encode, starting_noise

PAGE = Path(__file__).parents[1] / "docs/next-steps.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)

EXTRA = ("torchao", "onnxscript")  # libraries of a block that no extra of the package has


def inputs(pipe, call):
    """What a pipeline calls its denoiser with at last."""
    found = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, given, named: found.update(named), with_kwargs=True
    )
    pipe("a red square", **call)
    hook.remove()
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:60])
def test_a_block_runs(block, tmp_path):
    pipe, call = tiny("flux"), CALLS["flux"]
    kept = {s.name: torch.arange(s.units) % 2 == 0 for s in ecodiff.discover(pipe)}
    ecodiff.prune(pipe, kept)
    name = "transformer.transformer_blocks.0.attn.to_q.lora"
    adapter = {f"{name}_A.weight": torch.randn(2, 48), f"{name}_B.weight": torch.randn(48, 2)}
    given = {"pipe": pipe, "call": call, "settings": {"iterations": 1, "batch": 2}}
    given |= {"mask": ecodiff.Mask({}, kept, ""), "folder": tmp_path / "smaller"}
    given |= {"inputs": inputs(pipe, call), "adapter": adapter}
    try:
        exec(block, {**given, "ecodiff": ecodiff, "torch": torch})
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        pytest.skip(f"{error.name} is not installed, and no part of ecodiff needs it")
    embeds, noise = encode(pipe, ["a red square"], call), starting_noise(pipe, [3], call)
    assert denoise(pipe, embeds, noise, call).isfinite().all()
