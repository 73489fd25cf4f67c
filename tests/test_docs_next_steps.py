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


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_a_block_runs(block, tmp_path):
    pipe, call = tiny("flux"), CALLS["flux"]
    kept = {s.name: torch.arange(s.units) % 2 == 0 for s in ecodiff.discover(pipe)}
    ecodiff.prune(pipe, kept)
    name = "transformer.transformer_blocks.0.attn.to_q.lora"
    adapter = {f"{name}_A.weight": torch.randn(2, 48), f"{name}_B.weight": torch.randn(48, 2)}
    given = {"pipe": pipe, "call": call, "settings": {"iterations": 1, "batch": 2}}
    given |= {"mask": ecodiff.Mask({}, kept, ""), "folder": tmp_path / "smaller"}
    exec(block, {**given, "adapter": adapter, "ecodiff": ecodiff, "torch": torch})
    embeds, noise = encode(pipe, ["a red square"], call), starting_noise(pipe, [3], call)
    assert denoise(pipe, embeds, noise, call).isfinite().all()
