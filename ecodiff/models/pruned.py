"""The class of a pruned denoiser. `save_pretrained` copies this file beside the weights.

It imports nothing of ecodiff, so diffusers can load a pruned folder where ecodiff is not installed,
with `trust_remote_code=True`. A pruned denoiser is its dense diffusers class with narrower layers.
The entry `pruned` of its config holds their sizes:

    shapes     layer name -> shape of its weight
    scattered  names of modulation linears, whose removed output channels give only their bias
    heads      attention name -> number of heads left
    dense      the fingerprint of the dense model, see `pipelines.fingerprint`
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

CLASS_FILE = "ecodiff.py"


class ScatterLinear(nn.Linear):
    """A linear with fewer rows whose output keeps its width: removed channels give only their bias,
    or 0 without one.

    The weight is (k, in) and the bias (out,). The buffer `index`, int64 (k,), holds the places of
    the rows in the output and is saved with them.

    Args:
        linear: the dense linear, weight (out, in).
        kept: int64 (k,), the output channels that stay.
    """

    def __init__(self, linear: nn.Linear, kept: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, len(kept)
        self.channels = linear.out_features
        self.weight, self.bias = _selected(linear.weight, 0, kept), linear.bias
        self.register_buffer("index", kept.clone())

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype that the matrix product has."""
        narrow = nn.functional.linear(input, self.weight)
        full = narrow.new_zeros(*narrow.shape[:-1], self.channels)
        full = full.index_copy(-1, self.index, narrow)
        return full if self.bias is None else full + self.bias


class NoChannels(nn.Conv2d):
    """A convolution with 0 input or output channels, which torch refuses to run: gives its bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (n, in, h, w) to (n, out, h, w); all convolutions that can be pruned keep h and w."""
        output = input.new_zeros(len(input), self.out_channels, *input.shape[2:])
        return output if self.bias is None else output + self.bias[:, None, None]


class NoHeads(nn.Module):
    """An attention whose heads are all removed. It returns what the attention returns with all
    heads masked: the bias of its output projection, and the residual where the attention adds it.

    Without an output projection (FLUX's single blocks) the result has zero width.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.is_joint = getattr(attention, "add_k_proj", None) is not None
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)
        self.to_out = getattr(attention, "to_out", None)
        self.to_add_out = getattr(attention, "to_add_out", None)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the shape of `hidden_states`; in joint attention a pair with that of the text."""
        image = hidden_states
        if image.ndim == 4:
            image = image.flatten(2).transpose(1, 2)
        image = _project(self.to_out, image[..., :0])
        if hidden_states.ndim == 4:
            image = image.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            image = image + hidden_states
        image = image / self.rescale_output_factor
        if self.is_joint and encoder_hidden_states is not None:
            return image, _project(self.to_add_out, encoder_hidden_states[..., :0])
        return image


class Pruned:
    """Mixin for a diffusers model class: narrows its layers to the sizes in its config."""

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build the model without its weights; same contract as `ConfigMixin.from_config`.

        Raises:
            ValueError: the config's entry `pruned` names layers or sizes that are not possible.
        """
        config = dict(config)
        record = config.pop("pruned", {})
        model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        _apply(model, record)
        model.register_to_config(pruned=dict(record))
        return (model, unused) if return_unused_kwargs else model

    @wraps(ModelMixin.save_pretrained)  # diffusers inspects its signature
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and this class; same contract as `ModelMixin.save_pretrained`."""
        # Copied before the weights are saved: that call may also push the folder to the hub.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, CLASS_FILE))
        super().save_pretrained(save_directory, *args, **kwargs)


@cache
def pruned_class(dense: type[ModelMixin]) -> type[ModelMixin]:
    """Return the pruned counterpart of a diffusers model class."""
    # diffusers writes this module name into model_index.json. `ecodiff` is both the package, where
    # it is installed, and the name of the file in the folder.
    members = {"__module__": "ecodiff", "__doc__": f"A pruned `diffusers.{dense.__name__}`."}
    return type(f"Pruned{dense.__name__}", (Pruned, dense), members)


def __getattr__(name: str) -> type[ModelMixin]:
    """Module attributes `Pruned<Class>`, such as `PrunedFluxTransformer2DModel`."""
    dense = getattr(diffusers, name.removeprefix("Pruned"), None)
    is_model = isinstance(dense, type) and issubclass(dense, ModelMixin)
    if not (name.startswith("Pruned") and is_model):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(dense)


def take(layer: nn.Linear | nn.Conv2d, dim: int, kept: Tensor) -> None:
    """Keep rows (dim 0, with their biases) or columns (dim 1) of a linear or convolution."""
    layer.weight = _selected(layer.weight, dim, kept)
    if dim == 0 and layer.bias is not None:
        layer.bias = _selected(layer.bias, 0, kept)
    sizes = ("out", "in")[dim : dim + 1]
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # depthwise: one filter per channel
        layer.groups, sizes = len(kept), ("out", "in")
    for size in sizes:
        unit = "channels" if isinstance(layer, nn.Conv2d) else "features"
        setattr(layer, f"{size}_{unit}", len(kept))
    if isinstance(layer, nn.Conv2d) and not len(kept):
        layer.__class__ = NoChannels


def set_heads(denoiser: nn.Module, name: str, heads: int) -> None:
    """Set an attention's number of heads, by which diffusers' processors split channels; with 0 it
    becomes `NoHeads`."""
    attention = denoiser.get_submodule(name)
    if heads == 0:
        denoiser.set_submodule(name, NoHeads(attention))
        return
    inner = heads * (attention.inner_dim // attention.heads)
    for attribute, value in (
        ("heads", heads),
        ("sliceable_head_dim", heads),
        ("inner_dim", inner),
        ("inner_kv_dim", inner),
    ):
        if hasattr(attention, attribute):
            setattr(attention, attribute, value)


def _apply(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Narrow a dense model to the recorded shapes. The weights are loaded afterwards, so it does
    not matter which units stay."""
    scattered = set(record.get("scattered", ()))
    for name, shape in record.get("shapes", {}).items():
        layer = _part(model, name)
        dense = list(layer.weight.shape) if isinstance(layer, nn.Linear | nn.Conv2d) else []
        fits = (0 <= narrow <= wide for narrow, wide in zip(shape, dense, strict=False))
        if len(shape) != len(dense) or not all(fits):
            allowed = f"at most {dense}" if dense else "a linear of this model"
            raise ValueError(f"config.json: pruned: {name}: {shape} is not possible ({allowed})")
        device = layer.weight.device
        rows, columns = (torch.arange(size, device=device) for size in shape[:2])
        if name in scattered:
            model.set_submodule(name, ScatterLinear(layer, rows))
        elif len(rows) < dense[0]:
            take(layer, 0, rows)
        if len(columns) < dense[1]:
            take(layer, 1, columns)
    for name, heads in record.get("heads", {}).items():
        dense_heads = getattr(_part(model, name), "heads", 0)
        if not isinstance(heads, int) or not 0 <= heads <= dense_heads:
            allowed = f"0 to {dense_heads}" if dense_heads else "an attention of this model"
            raise ValueError(f"config.json: pruned: {name}: {heads} is not possible ({allowed})")
        set_heads(model, name, heads)


def _part(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _selected(weight: nn.Parameter, dim: int, kept: Tensor) -> nn.Parameter:
    chosen = weight.detach().index_select(dim, kept.to(weight.device)).contiguous()
    return nn.Parameter(chosen, requires_grad=weight.requires_grad)


def _project(output: nn.Module | None, empty: Tensor) -> Tensor:
    """Apply an output projection, which may be followed by a dropout, to a zero-width input."""
    if output is None:
        return empty
    for layer in output if isinstance(output, nn.ModuleList) else (output,):
        empty = layer(empty)
    return empty
