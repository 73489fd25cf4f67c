"""The class of a pruned denoiser. `save_pretrained` copies this file beside the weights.

It imports nothing of ecodiff, so diffusers can load a pruned folder where ecodiff is not installed,
with `trust_remote_code=True`. A pruned denoiser is its dense diffusers class with narrower layers.
The entry `pruned` of its config holds their sizes:

    shapes     layer name -> shape of its weight
    scattered  names of modulation linears, whose removed output channels give only their bias
    heads      attention name -> number of heads left
    kept       layer name -> which rows and columns of the dense layer these are, see `packed`;
               those of scattered linears are saved with the weights
    ranks      name of a modulation linear -> its rank, where it became two linears
    dense      the fingerprint of the dense model, see `pipelines.fingerprint`

So adapters of the dense model fit: their rows and columns of removed units are dropped, and what
they add to a linear of a low rank is added beside it.
"""

from __future__ import annotations

import base64
import inspect
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from functools import cache, wraps
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from torch import Tensor, nn

log = logging.get_logger("diffusers.ecodiff")  # said as loudly as diffusers' own warnings
CLASS_FILE = "ecodiff.py"
# How attentions call their number of heads, and what else is counted with it; their output
# projections, of the picture's stream and of the text's.
HEADS = ("heads", "num_heads", "num_attention_heads")
_WITH_HEADS = ("kv_heads", "num_kv_heads", "num_key_value_heads")
_WITH_HEADS += ("inner_dim", "inner_kv_dim", "kv_inner_dim")
# And how they call what gives the queries, if it isn't the first that they take.
_STREAMS = ("hidden_states", "latents")
IMAGE_OUT, TEXT_OUT = ("to_out", "img_attn_proj", "out_layer"), ("to_add_out", "txt_attn_proj")
# How an adapter's tensors follow their layer: whether its rows or columns, and in which dimension.
_CUTS = {"lora_A": ("columns", 1), "lora_B": ("rows", 0), "lora_magnitude_vector": ("rows", 0)}
_PLAIN = ("lora_A.", "lora_B.")
# Where diffusers' loaders may be told to find an adapter.
_WHERE = ("weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only")
_WHERE += ("force_download", "proxies", "metadata")


class ScatterLinear(nn.Module):
    """A linear without some rows whose output keeps its width: removed channels give only their
    bias, or 0 without one.

    `rows` is the linear of the channels that stay, weight (k, in), without a bias: an ordinary one,
    which adapters and quantisers may change. `bias` is (out,) or None, and `index`, int64 (k,), the
    places of the rows in the output.

    Args:
        linear: the dense linear, weight (out, in).
        kept: int64 (k,), the output channels that stay.
    """

    def __init__(self, linear: nn.Linear, kept: Tensor) -> None:
        super().__init__()
        self.channels = linear.out_features
        self.rows = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        self.rows.weight, self.bias = linear.weight, linear.bias
        places = torch.arange(self.channels, device=linear.weight.device)
        self.register_buffer("index", places)
        self.keep(kept)

    def keep(self, kept: Tensor) -> None:
        """Keep some of the channels that are left; the others give only their bias."""
        take(self.rows, 0, kept)
        self.index = self.index[kept.to(self.index.device)]

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype that the matrix product has."""
        narrow = self.rows(input)
        full = narrow.new_zeros(*narrow.shape[:-1], self.channels)
        full = full.index_copy(-1, self.index, narrow)
        return full if self.bias is None else full + self.bias


class LowRankLinear(nn.Module):
    """A linear of a low rank as two: `up(down(x))`, where `up` has the bias.

    Adapters of the dense linear read all of x and so fit neither: they sit on `free`, which is a
    `NoLinear` once there are any, and is no part of the model otherwise.

    Args:
        linear: the dense linear, (out, in); gives sizes, dtype and device.
        rank: rows of `down` and columns of `up`, 0 or more.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.device("meta"):  # no random weights: they are set or loaded afterwards
            self.down = nn.Linear(linear.in_features, rank, bias=False)
            self.up = nn.Linear(rank, linear.out_features)
        self.register_module("free", None)
        self.to_empty(device=linear.weight.device).to(linear.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        output = self.up(self.down(input))
        return output if self.free is None else output + self.free(input)

    def make_free(self) -> None:
        """Make the place of adapters, if it is not there."""
        if self.free is None:
            self.free = NoLinear(self)


class NoLinear(nn.Linear):
    """A linear that gives zeros and holds nothing: a place for adapters.

    Args:
        like: gives sizes, dtype and device.
    """

    def __init__(self, like: LowRankLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, None
        self.register_buffer("weight", like.up.weight.new_zeros(0, 0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to zeros (..., out)."""
        return input.new_zeros(*input.shape[:-1], self.out_features)


class NoChannels(nn.Conv2d):
    """A convolution with 0 input or output channels, which torch refuses to run: gives its bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (n, in, h, w) to (n, out, h, w); all convolutions that can be pruned keep h and w."""
        output = input.new_zeros(len(input), self.out_channels, *input.shape[2:])
        return output if self.bias is None else output + self.bias[:, None, None]


class NoHeads(nn.Module):
    """An attention whose heads are all removed. It returns what the attention returns with all
    heads masked: the bias of its output projection, and the residual where the attention adds it.

    Without an output projection (FLUX's single blocks) the result has zero width. Where one
    projection reads for heads and for an MLP (FLUX.2's), the MLP is left.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        # Some give both streams though one set of projections reads them joined (CogVideoX).
        call = type(getattr(attention, "processor", attention)).__call__
        self.is_joint = re.search(r"return \w+, \w+\n", inspect.getsource(call)) is not None
        self.reads = [*inspect.signature(attention.forward).parameters]
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)
        for name in (*IMAGE_OUT, *TEXT_OUT, "to_qkv_mlp_proj", "mlp_act_fn"):
            if isinstance(part := getattr(attention, name, None), nn.Module):
                self.add_module(name, part)
        if not isinstance(getattr(attention, "processor", None), nn.Module):
            self.processor = getattr(attention, "processor", None)  # some blocks ask for it

    def forward(self, *args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Take what the attention takes. Return the shape of the stream that gave the queries; in
        joint attention a pair with that of the text."""
        given = dict(zip(self.reads, args, strict=False)) | options
        hidden_states = next(given[name] for name in (*_STREAMS, *given) if name in given)
        text = given.get("encoder_hidden_states", given.get("".join(self.reads[1:2])))
        image = hidden_states
        if image.ndim == 4:
            image = image.flatten(2).transpose(1, 2)
        image = self._projected(IMAGE_OUT, image)
        if hidden_states.ndim == 4:
            image = image.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            image = image + hidden_states
        image = image / self.rescale_output_factor
        if self.is_joint and text is not None:
            return image, self._projected((*TEXT_OUT, *IMAGE_OUT), text)
        return image

    def _projected(self, names: tuple[str, ...], read: Tensor) -> Tensor:
        """What the first of the output projections that is there gives of no heads; it may be
        followed by a dropout."""
        output = read[..., :0]
        if "to_qkv_mlp_proj" in self._modules:
            output = self.mlp_act_fn(self.to_qkv_mlp_proj(read))
        layers = next((self._modules[name] for name in names if name in self._modules), ())
        for layer in layers if isinstance(layers, nn.ModuleList | tuple) else (layers,):
            output = layer(output)
        return output


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
        config.pop("auto_map", None)  # where this class is; written anew when it is saved
        model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        _apply(model, record)
        model.register_to_config(pruned=dict(record))
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load weights and config; same contract as `ModelMixin.from_pretrained`. Warns when the
        class file in the folder is not this one."""
        file = Path(pretrained_model_name_or_path, options.get("subfolder") or "", CLASS_FILE)
        if file.is_file() and file.read_bytes() != Path(__file__).read_bytes():
            log.warning(
                f"{file} was edited, or saved by another version of ecodiff: it differs from"
                f" {__file__}, whose class is used; its own code is not run"
            )
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @wraps(ModelMixin.save_pretrained)  # diffusers inspects its signature
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and this class; same contract as `ModelMixin.save_pretrained`."""
        # Copied before the weights are saved: that call may also push the folder to the hub.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, CLASS_FILE))
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        prefix: str | None = "transformer",
        **options: Any,
    ) -> None:
        """Load an adapter of this model or of the dense one; same contract as diffusers'.

        Raises:
            ValueError: the adapter doesn't fit; nothing is changed.
        """
        source, dot = pretrained_model_name_or_path_or_dict, f"{prefix}." if prefix else ""
        where = {name: options.pop(name, None) for name in _WHERE}
        where |= {"use_safetensors": options.pop("use_safetensors", None) is not False}
        state, metadata = _fetch_state_dict(source, user_agent={}, allow_pickle=False, **where)
        state = {key.removeprefix(dot): v for key, v in state.items() if key.startswith(dot)}
        if not any("lora_A" in key or "lokr_" in key for key in state):
            state = convert_unet_state_dict_to_peft(state)
        state = self.fit_lora(state)
        # Targets, ranks and scales go by name; some layers now take adapters at a part of them.
        alphas, metadata = dict(options.pop("network_alphas", None) or {}), dict(metadata or {})
        patterns = metadata.keys() & {f"{dot}rank_pattern", f"{dot}alpha_pattern"}
        for name, part in [*self.named_modules()]:
            place = _place(name, part)
            if place == name:
                continue
            if isinstance(part, LowRankLinear) and f"{place}.lora_A.weight" in state:
                part.make_free()
            if f"{dot}{name}.alpha" in alphas:
                alphas[f"{dot}{place}.alpha"] = alphas.pop(f"{dot}{name}.alpha")
            for key in patterns:
                old = metadata[key] or {}
                found = [value for k, value in old.items() if re.match(rf"(.*\.)?({k})$", name)]
                if found:
                    metadata[key] = {**old, place: found[0]}
        if metadata:
            metadata[f"{dot}target_modules"] = sorted({_layer_and_part(key)[0] for key in state})
        options |= {"network_alphas": alphas or None, "metadata": metadata or None}
        state = {f"{dot}{key}": value for key, value in state.items()}
        super().load_lora_adapter(state, prefix, **options)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add an adapter to train; same contract as diffusers'. Of a scattered linear its rows are
        adapted, beside one of a low rank what it lost."""
        from peft.tuners.tuners_utils import check_target_module_exists as matches

        parts = {n: part for n, part in self.named_modules() if _place(n, part) != n}
        wanted = [name for name in parts if matches(adapter_config, name) is True]
        if not isinstance(adapter_config.target_modules, str) and wanted:
            adapter_config = copy(adapter_config)
            for name in wanted:
                if isinstance(parts[name], LowRankLinear):
                    parts[name].make_free()
            places = {_place(name, parts[name]) for name in wanted}
            not_these = adapter_config.exclude_modules
            adapter_config.target_modules = places | {*adapter_config.target_modules}
            adapter_config.exclude_modules = [*wanted, *(not_these or ())]
        super().add_adapter(adapter_config, adapter_name)

    def _convert_ip_adapter_attn_to_diffusers(
        self, state_dicts: list[dict[str, Any]], **options: Any
    ) -> dict[str, Any]:
        """The attention processors of IP-Adapters, without what belongs to removed heads.

        Raises:
            ValueError: in a transformer, where they read all heads.
        """
        convert = super()._convert_ip_adapter_attn_to_diffusers
        if not isinstance(self, diffusers.UNet2DConditionModel):
            if self.config["pruned"]["heads"]:
                raise ValueError(f"IP-Adapters need all heads; {type(self).__name__} lost some")
            return convert(state_dicts, **options)
        # Their layers are numbered by the cross-attentions, in order: 1, 3, 5, ...
        present, cross = self.attn_processors, []
        for name, part in self.named_modules():
            if isinstance(part, NoHeads) or f"{name}.processor" in present:
                cross += [] if name.endswith("attn1") else [name]
        left = [i for i, name in enumerate(cross) if f"{name}.processor" in present]
        moved = [
            {
                **state,
                "ip_adapter": {
                    f"{2 * new + 1}.{part}": state["ip_adapter"][f"{2 * old + 1}.{part}"]
                    for new, old in enumerate(left)
                    for part in ("to_k_ip.weight", "to_v_ip.weight")
                },
            }
            for state in state_dicts
        ]
        processors = convert(moved, **options)
        for name in (cross[i] for i in left):
            rows = self._kept(f"{name}.to_k", None).get("rows")
            processor = processors[f"{name}.processor"]
            for layer in () if rows is None else (*processor.to_k_ip, *processor.to_v_ip):
                take(layer, 0, rows.nonzero().flatten())
        return processors

    def fit_lora(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter of the dense model without the rows and columns of removed units: with it this
        model draws what the dense one draws with the adapter and the mask.

        Args:
            state: as peft has it: `<layer>.lora_A.weight` (rank, in), `<layer>.lora_B.weight` (out,
                rank) and their like. An adapter of this model is returned as it is.

        Raises:
            ValueError: it is an adapter of another model, or of a kind that can't be cut.
        """
        layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        present, fitted, made_for = dict(self.named_modules()), {}, set()
        for key, value in state.items():
            layer, part = _layer_and_part(key)
            if isinstance(present.get(layer.removesuffix(".free")), LowRankLinear):
                layer = layer.removesuffix(".free")
            layers[layer][part] = value
        gone = tuple(f"{name}." for name, part in present.items() if isinstance(part, NoHeads))
        absent = [name for name in layers if name not in present and not name.startswith(gone)]
        if layers and len(absent) == len(layers):
            raise ValueError(f"adapter: {type(self).__name__} has no layer {absent[0]}, nor others")
        for name, tensors in layers.items():
            layer = present.get(name)
            if layer is None and name.startswith(gone):
                continue
            cut, model = self._cut(name, layer, tensors)
            made_for |= model
            place = _place(name, layer)
            fitted |= {f"{place}.{part}": value for part, value in cut.items()}
        if len(made_for) > 1:
            raise ValueError(
                "adapter: some layers are of the dense model's sizes, others of this one's"
            )
        return fitted

    def _cut(
        self, name: str, layer: nn.Module | None, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], set[str]]:
        """The tensors of one layer's adapter, cut; and for which model they were made, if that can
        be told."""
        if isinstance(layer, LowRankLinear) and not all(p.startswith(_PLAIN) for p in tensors):
            raise ValueError(f"adapter: {name} is of a low rank here, which only plain LoRA fits")
        kept = self._kept(name, layer)
        layer = layer.rows if isinstance(layer, ScatterLinear) else layer
        sizes = {"rows": _size(layer, "out"), "columns": _size(layer, "in")}
        cut, made_for = {}, set()
        for part, value in tensors.items():
            side, dim = _CUTS.get(part.partition(".")[0], ("", 0))
            if kept and (not side or ("magnitude_vector" in part and "columns" in kept)):
                raise ValueError(f"adapter: {name}.{part} can't be cut, only plain LoRA can")
            stays, size = kept.get(side), value.shape[dim] if value.ndim else 0
            if stays is not None:
                made_for.add("dense" if size == len(stays) else "pruned")
            if stays is not None and size == len(stays):
                value = value.index_select(dim, stays.nonzero().flatten().to(value.device))
            if sizes.get(side) not in (None, value.shape[dim] if value.ndim else 0):
                dense = f" (of the dense model {len(stays)})" if stays is not None else ""
                raise ValueError(
                    f"adapter: {name}.{part} is for {size} {side}; the layer has"
                    f" {sizes[side]}{dense}: it is of another model"
                )
            cut[part] = value
        is_nothing = 0 in sizes.values() and "lora_B.bias" not in tensors
        return {} if is_nothing else cut, made_for

    def _kept(self, name: str, layer: nn.Module | None) -> dict[str, Tensor]:
        """Which "rows" and "columns" of a dense layer are left: bool (out,) and bool (in,); only of
        what lost some."""
        record = self.config["pruned"]
        kept = {side: unpacked(text) for side, text in record.get("kept", {}).get(name, {}).items()}
        if isinstance(layer, ScatterLinear):
            stays = torch.zeros(layer.channels, dtype=torch.bool)
            return kept | {"rows": stays.index_fill(0, layer.index.cpu(), True)}
        if name in record["shapes"] and not kept:
            raise ValueError("adapter: config.json doesn't tell which units stayed; prune again")
        return kept


def packed(stays: Tensor) -> str:
    """A bool tensor (n,) as short text: n, and its bits."""
    bits = zlib.compress(np.packbits(stays.numpy()).tobytes(), 9)
    return f"{len(stays)}:{base64.b64encode(bits).decode()}"


def unpacked(text: str) -> Tensor:
    """What `packed` made text of."""
    size, _, bits = text.partition(":")
    found = np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8)
    return torch.from_numpy(np.unpackbits(found, count=int(size)).astype(bool))


def _place(name: str, part: nn.Module | None) -> str:
    """The layer that adapters of the dense layer `name` sit on."""
    inside = {ScatterLinear: ".rows", LowRankLinear: ".free"}.get(type(part), "")
    return f"{name}{inside}"


def _layer_and_part(key: str) -> tuple[str, str]:
    """`a.to_q` and `lora_A.weight` of `a.to_q.lora_A.weight`."""
    match = re.fullmatch(r"(.+)\.(\w+\.(?:weight|bias))", key) or re.fullmatch(r"(.+)\.(\w+)", key)
    return match.groups() if match else (key, "")


def _size(layer: nn.Module | None, side: str) -> int | None:
    """Input or output features or channels of a layer; None where an adapter's can't be told."""
    if getattr(layer, "groups", 1) > 1:
        return None
    return getattr(layer, f"{side}_features", getattr(layer, f"{side}_channels", None))


def _left_alone(name: str, unchanged: Any) -> None:
    """Let diffusers' loader not widen a pruned FLUX or its adapters with zeros; `Pruned` fits them.

    Args:
        name: the loader's method, of a transformer and an adapter.
        unchanged: what it returns where nothing needs it, from the adapter.
    """
    widen = getattr(FluxLoraLoaderMixin, name).__func__

    def unless_pruned(cls: type, transformer: Any, lora_state_dict: Any = None, *rest: Any) -> Any:
        if isinstance(getattr(transformer, "_orig_mod", transformer), Pruned):
            return unchanged(lora_state_dict)
        return widen(cls, transformer, lora_state_dict, *rest)

    setattr(FluxLoraLoaderMixin, name, classmethod(unless_pruned))


_left_alone("_maybe_expand_transformer_param_shape_or_error_", lambda _: False)
_left_alone("_maybe_expand_lora_state_dict", lambda adapter: adapter)


@cache
def pruned_class(dense: type[ModelMixin]) -> type[ModelMixin]:
    """Return the pruned counterpart of a diffusers model class."""
    # diffusers writes this module name into model_index.json. `ecodiff` is both the package, where
    # it is installed, and the name of the file in the folder.
    members = {"__module__": "ecodiff", "__doc__": f"A pruned `diffusers.{dense.__name__}`."}
    members["_auto_class"] = "AutoModel"  # config.json then names class and file for it
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


def tell_widths(denoiser: nn.Module) -> None:
    """Tell blocks and attentions that hold heads and an MLP in the same linears how wide the MLP
    is, by which some split what they read (Ovis, FLUX.2)."""
    for module in denoiser.modules():
        parts = module._modules
        if "proj_mlp" in parts and "proj_out" in parts and hasattr(module, "mlp_hidden_dim"):
            heads = 0 if isinstance(module.attn, NoHeads) else module.attn.to_q.out_features
            module.mlp_hidden_dim = module.proj_out.in_features - heads
        elif "to_qkv_mlp_proj" in parts and not isinstance(module, NoHeads):
            module.mlp_hidden_dim = module.to_out.in_features - module.inner_dim


def largest_rank(rows: int, columns: int) -> int:
    """The largest rank at which two linears have fewer weights than one of (rows, columns)."""
    return (rows * columns - 1) // (rows + columns)


def heads_of(attention: nn.Module | None) -> int:
    """An attention's number of (query) heads; 0 for other modules, and for none."""
    own = vars(attention) if attention is not None else {}  # a model's config would warn of others
    found = (own.get(name, 0) for name in HEADS)
    return next((count for count in found if isinstance(count, int) and count > 0), 0)


def set_heads(denoiser: nn.Module, name: str, heads: int) -> None:
    """Set an attention's number of heads, by which diffusers' processors split channels; with 0 it
    becomes `NoHeads`."""
    attention = denoiser.get_submodule(name)
    if heads == 0:
        denoiser.set_submodule(name, NoHeads(attention))
        return
    dense = heads_of(attention)
    counted = [*HEADS, *_WITH_HEADS]
    # What is as wide as all heads follows them: OmniGen lays its heads out by it.
    if getattr(attention, "out_dim", 0) == getattr(attention, "inner_dim", None):
        counted.append("out_dim")
    for attribute in counted:
        value = getattr(attention, attribute, None)
        if isinstance(value, int):
            setattr(attention, attribute, value * heads // dense)
    if hasattr(attention, "sliceable_head_dim"):  # by default diffusers takes half of it
        attention.sliceable_head_dim = max(2, heads)


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
    for name, rank in record.get("ranks", {}).items():
        layer = _part(model, name)
        most = largest_rank(*layer.weight.shape) if isinstance(layer, nn.Linear) else -1
        if not isinstance(rank, int) or not 0 <= rank <= most:
            allowed = f"0 to {most}" if most >= 0 else "a linear of this model"
            raise ValueError(f"config.json: pruned: {name}: {rank} is not possible ({allowed})")
        model.set_submodule(name, LowRankLinear(layer, rank))
    for name, heads in record.get("heads", {}).items():
        dense_heads = heads_of(_part(model, name))
        if not isinstance(heads, int) or not 0 <= heads <= dense_heads:
            allowed = f"0 to {dense_heads}" if dense_heads else "an attention of this model"
            raise ValueError(f"config.json: pruned: {name}: {heads} is not possible ({allowed})")
        set_heads(model, name, heads)
    tell_widths(model)


def _part(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _selected(weight: nn.Parameter, dim: int, kept: Tensor) -> nn.Parameter:
    chosen = weight.detach().index_select(dim, kept.to(weight.device)).contiguous()
    return nn.Parameter(chosen, requires_grad=weight.requires_grad)
