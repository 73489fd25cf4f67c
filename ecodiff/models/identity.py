"""Which model, call and prompts a result was made of, so that results of others are told apart.

Imports no torch.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ecodiff.runtime.errors import UserError

LATENTS = "latents.safetensors"  # of a shard of pictures
OLD = "was made by an older ecodiff; run the stage that made it again"
# Rounding to float16 and bfloat16, one after the other or either alone, moves a weight by no more.
RELATIVE, ABSOLUTE = 2**-7, 2**-24


def packed(denoiser: str, scheduler: str, weights: np.ndarray) -> str:
    """A model's fingerprint: two digests, and some of the denoiser's weights as bfloat16.

    Args:
        denoiser: a digest of all of it but the values of its weights.
        scheduler: a digest of all of it.
        weights: float32 (k,), always the same ones of a denoiser.
    """
    # Rounded to nearest: half of what is cut off is added first.
    upper = ((weights.astype("<f4").view("<u4").astype(np.uint64) + 0x8000) >> 16).astype("<u2")
    return f"{denoiser}:{scheduler}:{base64.b64encode(upper.tobytes()).decode()}"


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same denoiser and scheduler, which draw the same."""
    return same_denoiser(one, other) and same_scheduler(one, other)


def same_denoiser(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same denoiser; in which dtype it was doesn't count.

    Weights that differ by rounding are the same. That lets no training pass: it moves weights that
    are nearly zero as far as others.
    """
    (make, _, weights), (other_make, _, others) = _unpacked(one), _unpacked(other)
    if make != other_make or weights.shape != others.shape:
        return False
    return np.allclose(weights, others, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)


def same_scheduler(one: str, other: str) -> bool:
    """Whether two fingerprints are of models with the same scheduler."""
    return _unpacked(one)[1] == _unpacked(other)[1]


def is_fingerprint(text: str) -> bool:
    """Whether a text was made by `packed`."""
    return text.count(":") == 2


def _unpacked(fingerprint: str) -> tuple[str, str, np.ndarray]:
    """What `packed` was given."""
    denoiser, scheduler, text = fingerprint.split(":")
    upper = np.frombuffer(base64.b64decode(text), "<u2")
    return denoiser, scheduler, (upper.astype("<u4") << 16).view("<f4")


@dataclass(frozen=True)
class Origin:
    """What a shard of pictures was made of.

    Attributes:
        model: the fingerprint of the model that drew them.
        dense: that of the dense model which that one was pruned from; itself when not pruned.
        call: the `call` section of the model.
        prompts, seeds: of its rows, in their order.
    """

    model: str
    dense: str
    call: dict[str, Any]
    prompts: list[str]
    seeds: list[int]

    def metadata(self) -> dict[str, str]:
        """As the metadata of a safetensors file."""
        return {"ecodiff": json.dumps(asdict(self))}

    @property
    def is_pruned(self) -> bool:
        """Whether a pruned model drew the pictures."""
        return self.model != self.dense

    def odd_to(self, dense: Origin) -> str:
        """Why pictures can't be compared with the dense model's, of what prompt whatever; or ""."""
        if dense.is_pruned:
            return "the dense model's are of a pruned model"
        if self.is_pruned and not same_denoiser(self.dense, dense.model):
            return "they are of a model that was pruned from another dense model"
        if not same_scheduler(self.model, dense.model):
            return "their scheduler was another one"
        return self.odd_call(dense)

    def odd_call(self, other: Origin) -> str:
        """In what the calls differ; "" when in nothing."""
        keys = sorted(self.call.keys() | other.call.keys())
        odd = [key for key in keys if self.call.get(key) != other.call.get(key)]
        if not odd:
            return ""
        mine, theirs = self.call.get(odd[0]), other.call.get(odd[0])
        return f"their call's {odd[0]} was {mine}, the other one's {theirs}"


def read_origin(shard: Path) -> tuple[list[int], Origin]:
    """The indices of a shard's prompts, in the order of its rows, and what it was made of.

    Raises:
        UserError: the shard's latents are missing, truncated or of an older ecodiff.
    """
    path = shard / LATENTS
    try:
        with safe_open(path, framework="np") as file:
            index, found = file.get_tensor("index").tolist(), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"latents: {path} cannot be read: {error}") from error
    try:
        origin = Origin(**json.loads(found["ecodiff"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {OLD}") from error
    if not (is_fingerprint(origin.model) and is_fingerprint(origin.dense)):
        raise UserError(f"{path}: {OLD}")
    if not len(index) == len(origin.prompts) == len(origin.seeds):
        raise UserError(f"{path}: has {len(index)} rows, but {len(origin.prompts)} prompts")
    return index, origin
