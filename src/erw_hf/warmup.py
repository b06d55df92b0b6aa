# Copyright 2026 The ERW-HF authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The early model of the warmup, its hand-over to the full one (ERW, arXiv 2504.10188, §3.3), and a start from an encoder's blocks.

A pre-norm ViT block is an adaLN block whose modulation has no weights: scale = gamma - 1 and shift = beta of each norm, gate =
LayerScale. Without the encoder's class and register tokens, the model's early tokens are the encoder's own.
"""

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from transformers import PretrainedConfig

from erw_hf.encoders import RepresentationEncoder, vit_blocks
from erw_hf.objective import AlignedTransformer
from erw_hf.sizes import SIZES, mlp_ratio
from erw_hf.transformer_erw import ERWTransformer2DModel


_FINAL_LAYER = ("transformer.norm_out.", "transformer.proj_out.", "transformer.class_token_out.")
_EMBEDDERS = ("transformer.pos_embed.", "transformer.time_class_embed.", "transformer.class_token_embed.")

_FAMILIES = (
    "dinov2",
    "dinov2_with_registers",
    "vit",
    "vit_mae",
    "clip_vision_model",
    "siglip_vision_model",
    "dinov3_vit",
)
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "geglu-approximate", "gelu_pytorch_tanh": "gelu-approximate"}
# Our names of a block's parts, and theirs in transformers.
_PARTS = {
    "attn.to_q": ("attention.q_proj", "self_attn.q_proj", "attention.attention.query"),
    "attn.to_k": ("attention.k_proj", "self_attn.k_proj", "attention.attention.key"),
    "attn.to_v": ("attention.v_proj", "self_attn.v_proj", "attention.attention.value"),
    "attn.to_out.0": ("attention.o_proj", "self_attn.out_proj", "attention.output.dense"),
    "ff.net.0.proj": ("mlp.fc1", "mlp.up_proj", "intermediate.dense"),
    "ff.net.2": ("mlp.fc2", "mlp.down_proj", "output.dense"),
    "norm1": ("norm1", "layernorm_before", "layer_norm1"),
    "norm2": ("norm2", "layernorm_after", "layer_norm2"),
}


def build_warmup_transformer(model_config: Mapping[str, Any], warmup_depth: int) -> ERWTransformer2DModel:
    """
    The model of the warmup: the embedders and the first blocks of the full model, and nothing else.

    Args:
        model_config (`Mapping[str, Any]`): Configuration of the full [`ERWTransformer2DModel`].
        warmup_depth (`int`): Number of blocks.

    Returns:
        [`ERWTransformer2DModel`]: A model of `warmup_depth` blocks whose final layer is frozen.

    Raises:
        ValueError: if the full model has fewer blocks.
    """
    num_layers = model_config["num_layers"]
    if not 1 <= warmup_depth <= num_layers:
        raise ValueError(f"warmup_depth={warmup_depth} must lie in [1, num_layers={num_layers}]")
    transformer = ERWTransformer2DModel(**{**model_config, "num_layers": warmup_depth})
    transformer.norm_out.requires_grad_(False)
    transformer.proj_out.requires_grad_(False)
    if transformer.class_token_out is not None:
        transformer.class_token_out.requires_grad_(False)
    return transformer


def check_hand_over(
    warmup_state: Mapping[str, torch.Tensor], model: AlignedTransformer, with_projectors: bool = True
) -> dict[str, torch.Tensor]:
    """
    The tensors that a warmup would hand over, after checking that they fit. The model may be on the meta device.

    Args:
        warmup_state (`Mapping[str, torch.Tensor]`): State dict of the warmed-up [`AlignedTransformer`].
        model ([`AlignedTransformer`]): The full model.
        with_projectors (`bool`, *optional*, defaults to `True`):
            Hand the projectors over too, if the full model has any.

    Returns:
        `dict[str, torch.Tensor]`: The tensors to hand over, by name.

    Raises:
        ValueError: if the full model lacks a tensor with the name and shape of any of them, or they are only some of those of
            the embedders, of a block or of the projectors.
    """
    with_projectors = with_projectors and len(model.projectors) > 0
    tensors = {
        name: tensor
        for name, tensor in warmup_state.items()
        if not name.startswith(_FINAL_LAYER) and (with_projectors or not name.startswith("projectors."))
    }
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"hand-over: the full model has no tensor {name}")
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"hand-over: {name} is {tuple(tensor.shape)} in the warmup and {tuple(own[name].shape)} in the full "
                "model"
            )
    block = re.compile(r"transformer\.transformer_blocks\.(\d+)\.")
    depth = 1 + max((int(match[1]) for name in tensors if (match := block.match(name))), default=0)
    missing = [
        name
        for name in own
        if name not in tensors
        and (name.startswith(_EMBEDDERS) or ((match := block.match(name)) and int(match[1]) < depth))
    ]
    if missing:
        raise ValueError(f"hand-over: the warmup lacks {len(missing)} tensors, such as {missing[0]}")
    projectors = [name for name in own if with_projectors and name.startswith("projectors.") and name not in tensors]
    if projectors:
        raise ValueError(
            f"hand-over: the warmup lacks {projectors[0]}; set hand_over_projector to false for fresh projectors"
        )
    return tensors


@torch.no_grad()
def hand_over(
    warmup_state: Mapping[str, torch.Tensor], model: AlignedTransformer, with_projectors: bool = True
) -> list[str]:
    """
    Copies the warmed-up weights into the early layers of the full model and verifies each tensor.

    Args:
        warmup_state (`Mapping[str, torch.Tensor]`): State dict of the warmed-up [`AlignedTransformer`].
        model ([`AlignedTransformer`]): The full model, freshly initialised. Its later blocks stay as they are.
        with_projectors (`bool`, *optional*, defaults to `True`):
            Hand the projectors over too, if the full model has any.

    Returns:
        `list[str]`: Names of the tensors handed over.

    Raises:
        ValueError: if the warmup does not fit the full model; see [`check_hand_over`].
        RuntimeError: if a tensor of the full model differs afterwards.
    """
    tensors = check_hand_over(warmup_state, model, with_projectors)
    model.load_state_dict(tensors, strict=False)
    own = model.state_dict()
    differing = [
        name
        for name, tensor in tensors.items()
        if not torch.equal(own[name], tensor.to(own[name].device, own[name].dtype))
    ]
    if differing:
        raise RuntimeError(f"hand-over: {len(differing)} tensors differ afterwards, the first is {differing[0]}")
    return list(tensors)


def encoder_options(
    encoder_config: PretrainedConfig, model_config: Mapping[str, Any], name: str | None = None
) -> dict[str, Any]:
    """
    The options that a transformer needs to hold an encoder's blocks.

    Args:
        encoder_config (`transformers.PretrainedConfig`): Of a ViT: DINOv2 with or without registers, DINO, MAE, CLIP, SigLIP or
            DINOv3.
        model_config (`Mapping[str, Any]`): Configuration of the [`ERWTransformer2DModel`].
        name (`str`, *optional*): What errors call the encoder.

    Returns:
        `dict[str, Any]`: Arguments of the [`ERWTransformer2DModel`] that say how its blocks compute.

    Raises:
        ValueError: if the encoder is not one of these, or the transformer's width, heads or options are others.
    """
    theirs = getattr(encoder_config, "vision_config", encoder_config)
    name = name or theirs.name_or_path or theirs.model_type
    if theirs.model_type not in _FAMILIES:
        raise ValueError(
            f"{name} is a {theirs.model_type}, whose blocks are not a SiT's: start_from_encoder takes DINOv2 (with or without "
            "registers), DINO, MAE, CLIP, SigLIP and DINOv3"
        )
    if getattr(theirs, "use_swiglu_ffn", False) or getattr(theirs, "use_gated_mlp", False):
        raise ValueError(
            f"{name} has gated feed-forwards, which start_from_encoder does not take: use a smaller size of it"
        )
    if theirs.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"{name} has the activation {theirs.hidden_act}; start_from_encoder takes {list(_ACTIVATIONS)}"
        )
    width, heads = theirs.hidden_size, theirs.num_attention_heads
    inner = int(width * theirs.mlp_ratio) if hasattr(theirs, "mlp_ratio") else theirs.intermediate_size
    has_rope = theirs.model_type == "dinov3_vit"
    if has_rope and width // heads % 4 != 0:
        raise ValueError(f"{name} has heads of {width // heads} channels, rotary embeddings here take multiples of 4")
    grid = model_config["sample_size"] // model_config["patch_size"]
    same_mlp = int(width * model_config["mlp_ratio"]) == inner
    fixed = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_ratio": model_config["mlp_ratio"] if same_mlp else mlp_ratio(inner, width),
        "qk_norm": None,
        "norm_type": "layer_norm",
    }
    free = {
        "activation_fn": _ACTIVATIONS[theirs.hidden_act],
        "pos_embed_type": "learned",
        "norm_eps": theirs.layer_norm_eps,
        "use_rope": has_rope,
        # DINOv3's coordinates run from -1 to 1 over the grid, times 2 pi.
        "rope_theta": theirs.rope_theta if has_rope else 10000.0,
        "rope_scale": 4 * math.pi / grid if has_rope else 1.0,
    }
    defaults = inspect.signature(ERWTransformer2DModel.__init__).parameters
    for key, value in {**fixed, **free}.items():
        if model_config[key] != value and (key in fixed or model_config[key] != defaults[key].default):
            size = next((size for size, (_, *own) in SIZES.items() if own == [heads, width // heads]), None)
            raise ValueError(
                f"{name} does not fit the model: its blocks have {key}={value!r}, the model {model_config[key]!r}. What fits: "
                f"{f'{size}, ' if size else ''}{heads} heads of {width // heads} channels, mlp_ratio {mlp_ratio(inner, width)!r}, norm_type "
                "layer_norm, no qk_norm, and the other keys of the model at their defaults"
            )
    return free


def takes_patch_embedding(encoder: RepresentationEncoder, model_config: Mapping[str, Any]) -> bool:
    """
    Args:
        encoder ([`RepresentationEncoder`]): A ViT.
        model_config (`Mapping[str, Any]`): Configuration of an [`ERWTransformer2DModel`] on pixels.

    Returns:
        `bool`: Whether the encoder's patch embedding can be the transformer's: of equal patches and without a bottleneck.
        CLIP's cannot, since a norm comes after it.
    """
    return (
        encoder.patch_size == model_config["patch_size"]
        and encoder.model.config.model_type != "clip_vision_model"
        and model_config["in_channels"] in (1, 3)
        and model_config["patch_bottleneck_dim"] is None
    )


@torch.no_grad()
def start_from_encoder(
    transformer: ERWTransformer2DModel,
    encoder: RepresentationEncoder,
    depth: int,
    with_patch_embedding: bool | None = None,
) -> list[str]:
    """
    Makes an encoder's first blocks those of a transformer, in place. Call it before an optimizer is made: its activation,
    norms and table of positions become the encoder's too, and its configuration says so, so that it is saved as what it is.
    Attention processors stay; compile it, and set hooks of offloading or caches, afterwards. Time and class do not affect these blocks until they are trained.

    Args:
        transformer ([`ERWTransformer2DModel`]): The model, of the encoder's width, heads and token grid.
        encoder ([`RepresentationEncoder`]): A ViT: DINOv2 with or without registers, DINO, MAE, CLIP, SigLIP or DINOv3.
        depth (`int`): Number of blocks.
        with_patch_embedding (`bool`, *optional*):
            Take the patch embedding too, for a model on images in [-1, 1]; grey ones are read as three equal channels. By
            default where the patches are as large as the encoder's. For a model on latents `False`: its own stays, and has to
            learn to give the encoder's tokens.

    Returns:
        `list[str]`: Names of the transformer's tensors that are the encoder's.

    Raises:
        ValueError: if the encoder does not fit the transformer (see [`encoder_options`]), or that has adapters.
    """
    if getattr(transformer, "peft_config", None):
        raise ValueError("start_from_encoder would lose the adapters of this transformer: add them afterwards")
    blocks, config = vit_blocks(encoder.model), transformer.config
    options = encoder_options(encoder.model.config, config)
    if not 1 <= depth <= min(len(blocks), config.num_layers):
        raise ValueError(
            f"start_from_encoder: the depth {depth} must lie in [1, {min(len(blocks), config.num_layers)}]: the encoder has "
            f"{len(blocks)} blocks, the model {config.num_layers}"
        )
    if encoder.token_grid != config.sample_size // config.patch_size:
        raise ValueError(
            f"the encoder was opened for {encoder.token_grid}x{encoder.token_grid} tokens, the model has "
            f"{config.sample_size // config.patch_size} a side"
        )
    foldable = takes_patch_embedding(encoder, config)
    if with_patch_embedding and not foldable:
        raise ValueError(
            f"the patch embedding of {type(encoder.model).__name__}, of {encoder.patch_size} px patches, cannot be that of a "
            f"model with patch_size={config.patch_size}, in_channels={config.in_channels} and "
            f"patch_bottleneck_dim={config.patch_bottleneck_dim}: set with_patch_embedding to "
            "False, and let a warmup teach a new one"
        )
    tensors = {"pos_embed.pos_embed": _positions(encoder)}
    if foldable and with_patch_embedding is not False:
        tensors |= _patch_embedding(encoder, config.in_channels)
    for index, block in enumerate(blocks[:depth]):
        own = _block(block, config.attention_head_dim if options["use_rope"] else None)
        tensors |= {f"transformer_blocks.{index}.{name}": tensor for name, tensor in own.items()}
    if any(config[key] != value for key, value in options.items()):
        _change(transformer, options)
    transformer.load_state_dict(tensors, strict=False)
    return list(tensors)


def _change(transformer: ERWTransformer2DModel, options: Mapping[str, Any]) -> None:
    """Gives a model other options in place: the modules of a model that was built with them, and its own weights."""
    changed = ERWTransformer2DModel(**{**transformer.config, **options})
    nn.Module.to(changed, transformer.device, transformer.dtype)  # ModelMixin's warns of a dtype
    own = dict(transformer.named_parameters())
    for name, parameter in changed.named_parameters():
        if name in own:
            parameter.requires_grad_(own[name].requires_grad)
    changed.load_state_dict(own, strict=False, assign=True)
    changed.set_attn_processor(transformer.attn_processors)
    for name, module in changed.named_children():
        setattr(transformer, name, module.train(transformer.training))
    transformer._cp_plan = changed._cp_plan
    transformer.register_to_config(**options)


def _block(block: nn.Module, rotary_head_dim: int | None) -> dict[str, torch.Tensor]:
    """A block's tensors, by our names within one."""
    theirs = block.state_dict()
    found: dict[str, torch.Tensor] = {}
    for ours, names in _PARTS.items():
        name = next(name for name in names if f"{name}.weight" in theirs)
        weight = theirs[f"{name}.weight"]
        found[f"{ours}.weight"] = weight
        found[f"{ours}.bias"] = theirs.get(f"{name}.bias", weight.new_zeros(len(weight)))  # not every key has one
    if rotary_head_dim is not None:
        order = _rotary_order(rotary_head_dim)
        for part in ("attn.to_q.weight", "attn.to_q.bias", "attn.to_k.weight", "attn.to_k.bias"):
            heads = found[part].unflatten(0, (-1, rotary_head_dim))
            found[part] = heads[:, order].flatten(0, 1)
    modulation = []  # shift, scale and gate of the attention, then of the feed-forward
    for index in (1, 2):
        gamma, beta = found.pop(f"norm{index}.weight"), found.pop(f"norm{index}.bias")
        modulation += [beta, gamma - 1, theirs.get(f"layer_scale{index}.lambda1", torch.ones_like(gamma))]
    bias = torch.cat(modulation)
    return {**found, "modulation.weight": bias.new_zeros(len(bias), len(bias) // 6), "modulation.bias": bias}


def _rotary_order(head_dim: int) -> list[int]:
    """Where DINOv3 has the channels of a head: it turns i with i + half, rows before columns; here neighbours turn."""
    half, quarter = head_dim // 2, head_dim // 4
    return [index for start in (0, quarter) for k in range(quarter) for index in (start + k, start + k + half)]


def _positions(encoder: RepresentationEncoder) -> torch.Tensor:
    """The encoder's table `(1, N, D)`, resampled as the encoder resamples it; zeros for one that has rotary embeddings only."""
    count, side = encoder.token_grid**2, encoder.image_size
    width = encoder.embed_dim
    for module in encoder.model.modules():
        if hasattr(module, "interpolate_pos_encoding"):
            has_class = encoder.model.config.model_type != "siglip_vision_model"
            tokens = torch.empty(1, count + has_class, width, device=encoder.image_mean.device)
            return module.interpolate_pos_encoding(tokens, side, side)[:, int(has_class) :]
    return torch.zeros(1, count, width)


def _patch_embedding(encoder: RepresentationEncoder, in_channels: int) -> dict[str, torch.Tensor]:
    """The encoder's, on images in [-1, 1] in place of normalised ones."""
    conv = next(module for module in encoder.model.modules() if isinstance(module, nn.Conv2d))
    weight = conv.weight.double() / encoder.image_std.double()  # (D, 3, p, p)
    bias = (weight * (0.5 - encoder.image_mean.double())).sum(dim=(1, 2, 3))
    if conv.bias is not None:
        bias = bias + conv.bias.double()
    weight = weight / 2
    if in_channels == 1:
        weight = weight.sum(dim=1, keepdim=True)
    return {"pos_embed.proj.weight": weight, "pos_embed.proj.bias": bias}
