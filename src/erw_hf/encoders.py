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
"""Frozen vision encoders of transformers as teachers: images in, patch tokens out."""

import inspect
import math
import re
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)


PROBE_SIDE = 256  # px, of the image that a network of stages gives its map for
# Repos that hold an image and a text tower: the image tower alone is loaded.
_VISION_TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


class RepresentationEncoder(nn.Module):
    """
    A frozen vision encoder that turns images into a square grid of patch tokens, the alignment target of REPA
    (arXiv 2410.06940) and ERW (arXiv 2504.10188).

    Args:
        model (`transformers.PreTrainedModel`):
            A vision model whose `last_hidden_state` holds prefix and patch tokens, or is the last map of a convolutional
            network, whose cells are taken as patch tokens and whose pooled features as the class token.
        image_mean (`list[float]`): Mean of each RGB channel that the model was trained with, on images in [0, 1].
        image_std (`list[float]`): Standard deviation of each RGB channel, likewise.
        token_grid (`int`): Side of the grid of patch tokens that is wanted: the transformer's own token grid.
        image_size (`int`, *optional*):
            Side of the image given to the model, in pixels. Defaults to `token_grid` times the model's patch size, or
            stride.
        antialias_positions (`bool`, *optional*, defaults to `False`):
            Resample the model's position table once, with antialias, as REPA-type code does by way of timm. By default
            transformers resamples it in its own way, which gives other tokens where the grid is not the model's own.
        depth (`int`, *optional*):
            Give the tokens after this block, without the last norm; the later blocks are cut off the model. ViTs only.
            By default the model's last tokens.

    Raises:
        ValueError: if the model cannot give `token_grid` x `token_grid` patch tokens, or has no block `depth`.
    """

    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        image_mean: list[float],
        image_std: list[float],
        token_grid: int,
        image_size: int | None = None,
        antialias_positions: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        if antialias_positions:
            _resample_positions(model, token_grid)
        if depth is not None:
            _cut(model, depth)
        self.model = model.eval().requires_grad_(False)
        # ViT, MAE, I-JEPA, CLIP and SigLIP resample their position tables only when told to.
        accepted = inspect.signature(model.forward).parameters
        self._forward_kwargs = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self._shuffles = getattr(model.config, "model_type", None) == "vit_mae"
        if self._shuffles:
            model.config.mask_ratio = 0.0
        self.token_grid = token_grid
        is_timm = getattr(model.config, "model_type", None) == "timm_wrapper"
        try:
            self.patch_size = patch_size = _patch_size(model)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} does not take images of {PROBE_SIDE} px alone: its features cannot be aligned ({error})"
            ) from error
        self.image_size = token_grid * patch_size if image_size is None else image_size
        if is_timm and hasattr(model.timm_model, "set_input_size"):
            model.timm_model.set_input_size(self.image_size)  # resamples the position table with antialias
        self.register_buffer("image_mean", torch.tensor(image_mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).reshape(1, -1, 1, 1), persistent=False)

        grid = self.image_size / patch_size
        if grid != token_grid:
            raise ValueError(
                f"the encoder's token grid does not match the latent's: {self.image_size} px images in patches of "
                f"{patch_size} px give {grid:g}x{grid:g} encoder tokens, the latent has {token_grid}x{token_grid}. "
                f"Omit encoder_image_size, or set it to {token_grid * patch_size}"
            )
        self._seen_range = False
        zeros = torch.zeros(1, 3, self.image_size, self.image_size, dtype=self.dtype, device="meta")
        try:
            with torch.no_grad():
                tokens = self._hidden_states(zeros, on_meta(self.model))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{type(model).__name__} does not take images of {self.image_size} px, which {token_grid}x{token_grid} "
                f"tokens need: {error}"
            ) from error
        # Class and register tokens come first in every encoder that has them; their number is computed, not assumed.
        self.num_prefix_tokens = tokens.shape[1] - token_grid**2
        if not 0 <= self.num_prefix_tokens < 32:
            side = math.isqrt(tokens.shape[1])
            raise ValueError(
                f"the encoder's token grid does not match the latent's: {type(model).__name__} gives {tokens.shape[1]} "
                f"tokens (about {side}x{side}) for a {self.image_size} px image, the latent has "
                f"{token_grid}x{token_grid}"
            )
        self.embed_dim = tokens.shape[2]
        # Of prefix tokens the first is the class token; only timm has transformers with register tokens alone.
        self.has_class_token = self.num_prefix_tokens > 0
        if is_timm and hasattr(model.timm_model, "num_prefix_tokens") and model.timm_model.cls_token is None:
            self.has_class_token = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        token_grid: int,
        image_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        antialias_positions: bool = False,
        revision: str | None = None,
        depth: int | None = None,
    ) -> "RepresentationEncoder":
        """
        Loads an encoder from the Hub or from a folder.

        Args:
            pretrained_model_name_or_path (`str`): Hub id (`"facebook/dinov2-base"`) or local folder.
            token_grid (`int`): Side of the wanted grid of tokens, `sample_size // patch_size` of the transformer.
            image_size (`int`, *optional*): Side of the image given to the encoder; see the class.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of the weights.
            antialias_positions (`bool`, *optional*, defaults to `False`): See the class.
            revision (`str`, *optional*): Commit, branch or tag of the Hub repo.
            depth (`int`, *optional*): See the class.

        Returns:
            [`RepresentationEncoder`]: The encoder, frozen, on the CPU.

        Raises:
            OSError: if there is no such model.
            ValueError: if its tokens do not fit the grid, or its file lacks weights.
        """
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, revision=revision)
        model_class = _model_class(config)
        model = load_whole(model_class, pretrained_model_name_or_path, dtype=dtype, revision=revision)
        # Mean and deviation come from the model's own processor: constants in the code were wrong for half of the
        # encoders that published training code supports.
        processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, revision=revision, backend="pil")
        mean, std = normalization(processor)
        return cls(model, mean, std, token_grid, image_size, antialias_positions, depth)

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        token_grid: int,
        image_size: int | None = None,
        antialias_positions: bool = False,
        depth: int | None = None,
    ) -> "RepresentationEncoder":
        """
        An encoder with random weights, to count its cost; on the meta device it takes no memory.

        Args:
            config (`transformers.PretrainedConfig`): The model's configuration.
            token_grid (`int`): See the class.
            image_size (`int`, *optional*): See the class.
            antialias_positions (`bool`, *optional*, defaults to `False`): See the class.
            depth (`int`, *optional*): See the class.

        Returns:
            [`RepresentationEncoder`]: The encoder.

        Raises:
            ValueError: if its tokens do not fit the grid.
        """
        model_class = _model_class(config)
        if model_class is AutoModel:
            model = AutoModel.from_config(config)
        else:
            model = model_class(config.vision_config)
        return cls(model, [0.5] * 3, [0.5] * 3, token_grid, image_size, antialias_positions, depth)

    def train(self, mode: bool = True) -> "RepresentationEncoder":
        """
        Stays in evaluation mode, as part of a model in training too: it is frozen.

        Args:
            mode (`bool`, *optional*, defaults to `True`): Not taken.

        Returns:
            [`RepresentationEncoder`]: Itself.
        """
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of the tokens."""
        return next(self.model.parameters()).dtype

    @property
    def class_token_dim(self) -> int:
        """
        Width of the class token.

        Raises:
            ValueError: if the encoder has none.
        """
        if not self.has_class_token:
            name = self.model.config.name_or_path or type(self.model).__name__
            raise ValueError(
                f"the encoder {name} ({type(self.model).__name__}) has no class token, which class_token_weight needs: "
                "name one that has, such as DINOv2, DINOv3, MAE, CLIP or a ResNet, as the first encoder"
            )
        return self.embed_dim

    def _hidden_states(
        self, pixel_values: torch.Tensor, parameters: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Of the model as it is, or with other parameters and buffers."""
        kwargs: dict[str, Any] = dict(self._forward_kwargs)
        if self._shuffles:
            # MAE orders its tokens by this noise even when it masks none.
            order = torch.arange(self.token_grid**2, device=pixel_values.device, dtype=torch.float32)
            kwargs["noise"] = order.expand(len(pixel_values), -1)
        kwargs["pixel_values"] = pixel_values
        output = self.model(**kwargs) if parameters is None else functional_call(self.model, parameters, (), kwargs)
        hidden_states = output.last_hidden_state
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.ndim not in (3, 4):
            raise ValueError(
                f"{type(self.model).__name__} gives neither tokens nor a map: its features cannot be aligned"
            )
        if hidden_states.ndim == 3:
            return hidden_states
        if getattr(getattr(self.model, "timm_model", None), "output_fmt", None) == "NHWC":  # Swin
            hidden_states = hidden_states.permute(0, 3, 1, 2)
        if hidden_states.shape[2:] != (self.token_grid, self.token_grid):
            height, width = hidden_states.shape[2:]
            raise ValueError(
                f"the encoder's token grid does not match the latent's: {type(self.model).__name__} gives a map of "
                f"{height}x{width} cells for a {self.image_size} px image, the latent has {self.token_grid}x{self.token_grid}"
            )
        # A map (B, D, h, w) is laid out in the order of DINOv3's ConvNeXt: what the network's head reads comes first.
        cells, pooled = hidden_states.flatten(2).transpose(1, 2), getattr(output, "pooler_output", None)
        if pooled is None or pooled[0].numel() != cells.shape[2]:
            return cells
        return torch.cat([pooled.reshape(len(cells), 1, -1), cells], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Encodes images.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, 1, H, W)`): Images in [0, 1].

        Returns:
            `torch.Tensor` of shape `(B, token_grid ** 2, embed_dim)`: Patch tokens in row-major order.

        Raises:
            ValueError: for images that are not square, not floats, or not in [0, 1].
        """
        return self._encode(images)[:, self.num_prefix_tokens :]

    @torch.no_grad()
    def patch_and_class_tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images, for a model that draws the class token too (REG, arXiv 2507.01467).

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, 1, H, W)`): Images in [0, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Patch tokens `(B, token_grid ** 2, embed_dim)` in row-major order, and the
            class token `(B, embed_dim)`, after the model's last norm. For a convolutional network it is what the head reads: a
            ResNet's is the mean of its patch tokens, without a norm.

        Raises:
            ValueError: if the encoder has no class token, and for images as in [`forward`].
        """
        hidden_states = self._encode(images)
        class_token = hidden_states[:, 0, : self.class_token_dim]  # (B, D)
        if hasattr(self.model, "post_layernorm"):  # CLIP's last norm, which CLIP applies to the class token alone
            class_token = self.model.post_layernorm(class_token)
        return hidden_states[:, self.num_prefix_tokens :], class_token

    def _check_images(self, images: torch.Tensor) -> None:
        if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"images must be square, (B, 3, side, side) or (B, 1, side, side), got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}: divide images of 8 bits by 255")
        # On a GPU only the first batch is checked, since each look waits for the device; FLOPs are counted on meta.
        if images.is_meta or (self._seen_range and images.device.type != "cpu"):
            return
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -0.25 and high <= 1.25):  # a resize may overshoot; NaN is neither
            raise ValueError(
                f"images must lie in [0, 1], got values from {low:.3g} to {high:.3g}: divide by 255, or take x / 2 + 0.5 of "
                "images in [-1, 1]"
            )
        self._seen_range = True

    @torch.no_grad()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        self._check_images(images)
        images = images.expand(-1, 3, -1, -1)
        # Normalised, then resized without antialias: what REPA and ERW feed their encoders.
        images = (images.float() - self.image_mean) / self.image_std
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, size=(self.image_size, self.image_size), mode="bicubic")
        return self._hidden_states(images.to(self.dtype))


def _model_class(config: PretrainedConfig) -> Any:
    if config.model_type == "siglip2":
        raise ValueError(
            f"{config.name_or_path} is a NaFlex variant of SigLIP 2, which takes patches of images of any shape: use one of "
            "fixed size, such as google/siglip2-base-patch16-256"
        )
    return _VISION_TOWERS.get(config.model_type, AutoModel)


def load_whole(model_class: Any, path: str, **kwargs: Any) -> PreTrainedModel:
    """
    Loads a vision model whole. transformers only warns of weights that are missing, and leaves them random.

    Args:
        model_class (`type`): Class of transformers.
        path (`str`): Folder or Hub id.
        kwargs: Further arguments of its `from_pretrained`.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        ValueError: if weights are missing. A pooler, a head and the mask token, which make no tokens, may be.
    """
    model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    lacking = [name for name in info["missing_keys"] if not re.search(r"(^|\.)(pooler|head|mask_token)(\.|$)", name)]
    lacking += [name for name, *_ in info["mismatched_keys"]]
    if lacking:
        raise ValueError(
            f"{path} lacks the weights of {len(lacking)} tensors of {type(model).__name__}, such as {sorted(lacking)[0]}: its "
            "file holds another model, or other names"
        )
    return model


def normalization(processor: Any) -> tuple[list[float], list[float]]:
    """
    Args:
        processor (`transformers.BaseImageProcessor`): Of a vision model; for one of timm, it holds timm's own settings.

    Returns:
        `tuple[list[float], list[float]]`: Mean and deviation of each channel, of images in [0, 1].
    """
    if hasattr(processor, "data_config"):
        return processor.data_config["mean"], processor.data_config["std"]
    if not getattr(processor, "do_normalize", True):
        return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return processor.image_mean, processor.image_std


def vit_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """
    Args:
        model (`transformers.PreTrainedModel`): A ViT.

    Returns:
        `nn.ModuleList`: Its blocks.

    Raises:
        ValueError: if it is not a ViT.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} is not a ViT of transformers: it has no list of blocks")


def _cut(model: PreTrainedModel, depth: int) -> None:
    """Leaves the first blocks of a ViT, and no norm after them."""
    blocks = vit_blocks(model)
    if not 1 <= depth <= len(blocks):
        raise ValueError(
            f"the encoder's depth {depth} must lie in [1, {len(blocks)}], the blocks of {type(model).__name__}"
        )
    del blocks[depth:]
    model.config.num_hidden_layers = depth
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if name in ("layernorm", "norm", "post_layernorm"):
                setattr(module, name, nn.Identity())
    if hasattr(model, "rms_norm"):  # AIMv2's last; its embeddings have one of this name too
        model.rms_norm = nn.Identity()


def on_meta(module: nn.Module) -> dict[str, torch.Tensor]:
    """
    What lets a module run without computing anything, by `torch.func.functional_call`: the shapes of its outputs are right. Not
    a FakeTensor, which a module that caches tensors by device would find again in its first real forward.

    Args:
        module (`nn.Module`): Any, on any device.

    Returns:
        `dict[str, torch.Tensor]`: Its parameters and buffers by name, on the meta device.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def _patch_size(model: PreTrainedModel) -> int:
    """Of a network of stages, whose config names no patch size or only its stem's, the stride of its last map."""
    if getattr(model.config, "model_type", None) == "timm_wrapper":
        return model.timm_model.feature_info[-1]["reduction"]
    if hasattr(model.config, "patch_size") and not hasattr(model.config, "depths"):
        sizes = model.config.patch_size
        sides = set(sizes) if isinstance(sizes, (list, tuple)) else {sizes}
        if len(sides) != 1:
            raise ValueError(f"its patches, {sizes}, are not square")
        return sides.pop()
    side = PROBE_SIDE
    zeros = torch.zeros(1, 3, side, side, dtype=model.dtype, device="meta")
    hidden_states = functional_call(model, on_meta(model), (), {"pixel_values": zeros}).last_hidden_state
    # DINOv3's ConvNeXt puts its map in a row, after a class token.
    cells = hidden_states.shape[-1] if hidden_states.ndim == 4 else math.isqrt(hidden_states.shape[1])
    return side // cells


@torch.no_grad()
def _resample_positions(model: PreTrainedModel, token_grid: int) -> None:
    """The grid part of the table; class and register positions stay."""
    embeddings: Any = getattr(model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Parameter):
        raise ValueError(f"{type(model).__name__} has no position table that antialias_positions could resample")
    prefix = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    resampled = torch.cat([table[:, :prefix], resample_positions(table[:, prefix:], token_grid)], dim=1)
    embeddings.position_embeddings = nn.Parameter(resampled)


def resample_positions(table: torch.Tensor, token_grid: int) -> torch.Tensor:
    """
    Args:
        table (`torch.Tensor` of shape `(1, N, D)`): A table of positions of a square grid.
        token_grid (`int`): Side of the wanted grid.

    Returns:
        `torch.Tensor` of shape `(1, token_grid ** 2, D)`: Bicubic with antialias, in float32.
    """
    side = math.isqrt(table.shape[1])
    grid = table.float().transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
    grid = F.interpolate(grid, size=(token_grid, token_grid), mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)
