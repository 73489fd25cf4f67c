"""Adapters (LoRA) of a dense model, as files for its pruned one.

`load_lora_weights` of a pruned pipeline fits them by itself, see `pruned.Pruned.fit_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError, first_line

_NAME = "fitted"


def fit_lora(lora: str | Path | Mapping[str, Tensor], pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """An adapter of the dense model for the pruned one: without what belongs to removed units.

    The pipeline draws with it what the dense one draws with the adapter and the mask. Save it by
    `safetensors.torch.save_file`.

    Args:
        lora: a file or folder, or the tensors of one; any layout that diffusers reads.
        pipe: the pruned pipeline, which is left as it was.

    Returns:
        The tensors as `load_lora_weights` reads them, `<component>.<layer>.lora_A.weight` and
        `.lora_B.weight`; scales are multiplied into the latter.

    Raises:
        UserError: the pipeline is not pruned or has adapters, or the adapter doesn't fit.
    """
    if not isinstance(denoiser_of(pipe), Pruned):
        raise UserError("fit_lora: the pipeline is not pruned; its adapters fit as they are")
    if pipe.get_list_adapters():
        raise UserError("fit_lora: the pipeline has adapters; call its unload_lora_weights() first")
    source = dict(lora) if isinstance(lora, Mapping) else str(lora)
    fitted = {}
    try:
        pipe.load_lora_weights(source, adapter_name=_NAME)
        for name, part in pipe.components.items():
            if getattr(part, "peft_config", None):
                fitted |= {f"{name}.{key}": value for key, value in _tensors(part).items()}
    except (ValueError, OSError) as error:
        raise UserError(f"fit_lora: {first_line(error)}") from error
    finally:
        pipe.unload_lora_weights()
    return fitted


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    """The tensors of a component's adapter, as if its scale were 1."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # which not all that prune have
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(part, adapter_name=_NAME)
    for name, layer in part.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for key in state.keys() & {f"{name}.lora_B.weight", f"{name}.lora_B.bias"}:
                state[key] = state[key] * layer.scaling[_NAME]
    return {key: value.detach().clone() for key, value in state.items()}
