"""What one evaluation of a denoiser takes, counted on the meta device: no weights, no GPU.

The denoiser is built from its public config and run once on empty tensors at the size of a model's
call. Attention counts as a kernel that keeps no matrix of all pairs of tokens.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ecodiff.calibrate import watched
from ecodiff.config.run import ModelSettings
from ecodiff.models.structures import count_parameters, discover
from ecodiff.runtime.errors import UserError

CONFIGS = Path(__file__).parents[1] / "tests/configs"
# Hub id -> file of `CONFIGS`, what differs from it, and the parameters beside the denoiser (10^9):
# text encoders (CLIP-L .12, OpenCLIP bigG .69 and H .34, T5-XXL 4.76) and autoencoder (.08).
KNOWN: dict[str, tuple[str, dict[str, Any], float]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", {}, 0.90),
    "stabilityai/sdxl-turbo": ("sdxl", {}, 0.90),
    "stabilityai/stable-diffusion-2": ("sd2", {}, 0.42),
    "stabilityai/stable-diffusion-3.5-large": ("sd35-large", {}, 5.66),
    "black-forest-labs/FLUX.1-dev": ("flux", {}, 4.97),
    "black-forest-labs/FLUX.1-schnell": ("flux", {"guidance_embeds": False}, 4.97),
}


@dataclass(frozen=True)
class Sizes:
    """Of a model at its call; a step is all that one prompt needs in it, both guidance branches.

    Attributes:
        parameters: of the denoiser.
        other: parameters of the rest of the pipeline.
        value: bytes of a value in the model's dtype.
        step: floating-point operations of a step's forward pass.
        activations: bytes that autograd keeps of a step, weights frozen.
        inputs: bytes that the transformer blocks read in a step.
        blocks: how many transformer blocks there are.
        texts: bytes of a prompt's embeddings.
        latent: bytes of a latent.
        branches: of guidance, 1 or 2.
        consumers: linear -> (columns, rows that it reads in a step).
        lora: parameters of low-rank updates, a rank.
    """

    parameters: int
    other: float
    value: int
    step: float
    activations: float
    inputs: float
    blocks: int
    texts: float
    latent: float
    branches: int
    consumers: dict[str, tuple[int, int]]
    lora: int


def sizes_of(model: ModelSettings) -> Sizes:
    """Counts a model of a config.

    Raises:
        UserError: its source is no folder and no hub id of `KNOWN`, or its architecture's inputs
            are not known here.
    """
    kind, config, other, scale = _facts(model.source)
    dtype = getattr(torch, model.load.dtype)
    if "pos_embed_max_size" in config:  # a table of gigabytes, none of it parameters
        config["pos_embed_max_size"] = 1 + max(model.call.height, model.call.width) // 2 // scale
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind).from_config(config).requires_grad_(False)
        denoiser = denoiser.to(dtype)
        latent, others = _inputs(denoiser, model, scale, dtype)
        counted = _counted(denoiser, latent, others)
    guidance = model.call.guidance_scale
    branches = 1 if kind.startswith("Flux") or (guidance is not None and guidance <= 1) else 2
    structures = discover(denoiser)
    ports = [p for s in structures if s.kind != "modulation" for p in (*s.producers, *s.consumers)]
    weights = [denoiser.get_submodule(name).weight for name in {port.module for port in ports}]
    return Sizes(
        parameters=count_parameters(denoiser),
        other=other,
        value=dtype.itemsize,
        step=branches * counted["operations"],
        activations=branches * counted["activations"],
        inputs=branches * counted["inputs"],
        blocks=counted["blocks"],
        texts=branches * sum(t.nbytes for t in _tensors(others) if t.dtype == dtype and t.ndim > 1),
        latent=latent.nbytes,
        branches=branches,
        consumers={
            name: (columns, branches * rows) for name, (columns, rows) in counted["rows"].items()
        },
        lora=sum(sum(weight.shape[:2]) for weight in weights),
    )


def _facts(source: str) -> tuple[str, dict[str, Any], float, int]:
    """Class and config of a denoiser, parameters of the rest, pixels a latent pixel."""
    if source in KNOWN:
        name, change, other = KNOWN[source]
        facts = json.loads((CONFIGS / f"{name}.json").read_text())
        return facts["class"], facts["config"] | change, 1e9 * other, 8
    folder = Path(source)
    found = [*folder.glob("unet/config.json"), *folder.glob("transformer/config.json")]
    if not found:
        known = ", ".join(KNOWN)
        raise UserError(f"{source}: neither a pipeline's folder nor one of those known: {known}")
    config = json.loads(found[0].read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_")} | {
        "_class_name": config["_class_name"]
    }
    weights = folder.rglob("*.safetensors")
    other = sum(f.stat().st_size for f in weights if f.parent != found[0].parent) / 4  # float32
    stages = json.loads((folder / "vae/config.json").read_text())["block_out_channels"]
    return config.pop("_class_name"), config, other, 2 ** (len(stages) - 1)


def _inputs(
    denoiser: nn.Module, model: ModelSettings, scale: int, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any]]:
    """The latent of one prompt, and the other arguments of the denoiser."""
    config, call, like = denoiser.config, model.call, {"dtype": dtype, "device": "meta"}
    height, width = call.height // scale, call.width // scale
    name = type(denoiser).__name__

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, **like)

    if name == "UNet2DConditionModel":
        words = _words(model.source)
        others: dict[str, Any] = {
            "encoder_hidden_states": empty(1, words, config.cross_attention_dim)
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim
            pooled -= 6 * config.addition_time_embed_dim
            added = {"text_embeds": empty(1, pooled), "time_ids": torch.empty(1, 6)}
            others["added_cond_kwargs"] = added
        return empty(1, config.in_channels, height, width), others | {"timestep": torch.empty(1)}
    others = {"timestep": empty(1), "pooled_projections": empty(1, config.pooled_projection_dim)}
    if name == "FluxTransformer2DModel":
        tokens, words = height // 2 * (width // 2), call.max_sequence_length or 512
        others |= {"img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(words, 3)}
        others |= {"guidance": empty(1)} if config.guidance_embeds else {}
        others["encoder_hidden_states"] = empty(1, words, config.joint_attention_dim)
        return empty(1, tokens, config.in_channels), others
    if name == "SD3Transformer2DModel":
        words = 77 + (call.max_sequence_length or 256)
        others["encoder_hidden_states"] = empty(1, words, config.joint_attention_dim)
        return empty(1, config.in_channels, height, width), others
    raise UserError(f"{model.source}: the inputs of a {name} are not known here")


def _words(source: str) -> int:
    """Tokens of a caption for CLIP: of a folder's own text encoder, or 77."""
    config = Path(source) / "text_encoder/config.json"
    return json.loads(config.read_text())["max_position_embeddings"] if config.is_file() else 77


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, dict):
        return [tensor for value in values.values() for tensor in _tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def _counted(denoiser: nn.Module, latent: Tensor, others: dict[str, Any]) -> dict[str, Any]:
    """One forward pass: its operations, what autograd keeps, what blocks and consumers read."""
    blocks = {n: m for n, m in denoiser.named_modules() if type(m).__name__.endswith("Block")}
    blocks = {n: m for n, m in blocks.items() if "Transformer" in type(m).__name__}
    consumers = {port.module for s in discover(denoiser) for port in s.consumers}
    weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no freed storage's address is used again
    found: dict[str, Any] = {"inputs": 0, "rows": {}, "blocks": len(blocks)}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = _tensors({**dict(enumerate(args)), **kwargs})
        found["inputs"] += sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)

    def consumed(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        columns = layer.weight.shape[1]
        found["rows"][name] = (columns, args[0].numel() // columns)

    with ExitStack() as stack:
        for block in blocks.values():
            stack.callback(block.register_forward_pre_hook(read, with_kwargs=True).remove)
        stack.enter_context(watched(denoiser, consumers, consumed))
        stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", _attention))
        stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        counter = stack.enter_context(FlopCounterMode(display=False))
        output = denoiser(latent.requires_grad_(), **others, return_dict=False)  # noqa: F841
    found |= {"operations": counter.get_total_flops(), "activations": sum(kept.values())}
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention as a GPU computes it: queries, keys, values and result are kept, nothing else."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
