"""Which parameters of a pruned denoiser are trained: adapters, all of them, or the lightest.

Each kind is a context that yields name -> parameter, in a dtype in which small updates are not
lost. At its end the denoiser has its class and dtype again, and adapters are merged into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ecodiff.config.sections import RetrainSettings
from ecodiff.models.saving import dense_structures
from ecodiff.runtime.errors import UserError

Parameters = dict[str, nn.Parameter]
ADAPTER = "default"


@contextmanager
def trainable(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """Yield the parameters to train; then restore `requires_grad` and drop gradients.

    Raises:
        UserError: a rank above the layers' widths, or a dtype that the optimiser can't train.
    """
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
    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapted = LoraModel(denoiser, config, ADAPTER)
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


def adapter_of(parameters: Parameters, settings: RetrainSettings) -> dict[str, Tensor]:
    """The trained updates by themselves, as peft names them: `<linear>.lora_A.weight` (rank, in)
    and `<linear>.lora_B.weight` (out, rank), float32 on the CPU; none of other kinds.

    alpha / rank is in lora_B, so that whoever loads them need know nothing else.
    """
    if settings.kind != "lora":
        return {}
    scale = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    found = {}
    for name, value in parameters.items():
        factor = scale if ".lora_B." in name else 1.0
        found[name.replace(f".{ADAPTER}.", ".")] = value.detach().cpu() * factor
    return found


@contextmanager
def _full(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """All weights."""
    with _in_dtype_of_training(denoiser, settings):
        denoiser.requires_grad_(True)
        yield _wanted(denoiser)


@contextmanager
def _light(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[Parameters]:
    """Biases and the weights of norms (PERP; Zimmer et al. 2023): vectors, hardly any memory."""
    with _in_dtype_of_training(denoiser, settings):
        for parameter in denoiser.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        yield _wanted(denoiser)


@contextmanager
def _in_dtype_of_training(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[None]:
    """float32, since an update of 1e-6 is below what bfloat16 can tell apart; where the optimiser
    rounds stochastically, the model's own."""
    dtype = denoiser.dtype
    if settings.optimiser == "adamw8bit":
        if dtype == torch.float16:
            raise UserError(
                "retrain: optimiser: adamw8bit trains bfloat16 and float32 weights, not float16"
            )
        yield
        return
    nn.Module.to(denoiser, torch.float32)  # diffusers' own warns of what is meant here
    try:
        yield
    finally:
        nn.Module.to(denoiser, dtype)


def _wanted(denoiser: nn.Module) -> Parameters:
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad and p.numel()}


KINDS: dict[str, Callable[[nn.Module, RetrainSettings], AbstractContextManager[Parameters]]] = {
    "lora": _lora,
    "full": _full,
    "light": _light,
}
