"""Which parameters of a pruned denoiser are trained: adapters, all of them, or the lightest.

Each kind is a context that yields name -> parameter, in float32 whatever the model's dtype, since
an update of 1e-6 is below what bfloat16 can tell apart. At its end the denoiser has its class and
dtype again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ecodiff.config.sections import RetrainSettings
from ecodiff.models.saving import dense_structures
from ecodiff.runtime.errors import UserError

Parameters = dict[str, nn.Parameter]


@contextmanager
def trainable(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """Yield the parameters to train; then restore `requires_grad` and drop gradients."""
    wanted = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    denoiser.requires_grad_(False)
    try:
        with KINDS[settings.kind](denoiser, settings) as parameters:
            yield parameters
    finally:
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


@contextmanager
def _lora(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """LoRA on attention and feed-forward linears: merged at the end, removed after an error."""
    targets = {
        port.module
        for structure in dense_structures(denoiser)
        if structure.kind != "modulation"
        for port in (*structure.producers, *structure.consumers)
    }
    present = dict(denoiser.named_modules())
    # An attention without heads has lost its linears, and others may be empty (0 rows or columns).
    targets = sorted(t for t in targets if t in present and present[t].weight.numel())
    widest = max((min(present[t].weight.shape[:2]) for t in targets), default=0)
    if settings.rank > widest:
        raise UserError(f"retrain: rank: {settings.rank} is above the widest layer's {widest}")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapted = LoraModel(denoiser, config, "default")
    cast_training_params(denoiser, torch.float32)
    try:
        yield _wanted(denoiser)
    except BaseException:
        adapted.unload()
        raise
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            _merge(layer)
    adapted.unload()


def _merge(layer: BaseTunerLayer) -> None:
    """Add an adapter to its weight in float32, so that it is rounded once."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    base.to(torch.float32)
    layer.merge()
    base.to(dtype)


@contextmanager
def _full(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """All weights: 16 bytes a parameter for weights, gradients and moments."""
    with _in_float32(denoiser):
        denoiser.requires_grad_(True)
        yield {name: p for name, p in _wanted(denoiser).items() if p.numel()}


@contextmanager
def _light(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """Biases and the weights of norms (PERP; Zimmer et al. 2023): vectors, hardly any memory."""
    with _in_float32(denoiser):
        for parameter in denoiser.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        yield {name: p for name, p in _wanted(denoiser).items() if p.numel()}


@contextmanager
def _in_float32(denoiser: nn.Module) -> Iterator[None]:
    dtype = denoiser.dtype
    nn.Module.to(denoiser, torch.float32)  # diffusers' own warns of what is meant here
    try:
        yield
    finally:
        nn.Module.to(denoiser, dtype)


def _wanted(denoiser: nn.Module) -> Parameters:
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


KINDS: dict[str, Callable[[nn.Module, RetrainSettings], AbstractContextManager[Parameters]]] = {
    "lora": _lora,
    "full": _full,
    "light": _light,
}
