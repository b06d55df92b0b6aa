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
"""The networks behind the metrics: images in, features out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ResNetForImageClassification

from erw_hf.encoders import load_whole, normalization
from erw_hf.provenance import weights_hash


INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class Representation:
    """Where features come from.

    Args:
        hub_id (`str`): Model of timm or transformers on the Hub.
        size (`int`): Side in pixels that images are resized to.
        validation (`float`, *optional*):
            Fréchet distance of ImageNet's validation images at 256 px from its training images, the unit of FDr.
    """

    hub_id: str
    size: int
    validation: float | None = None


# The six of FDr6 are Inception and these five of timm, at the sizes and with the validation distances of FD-loss (arXiv
# 2604.28190, its eval_all_fds.py), which rounds them to two digits: MAE's 0.04 may be off by an eighth.
REPRESENTATIONS = {
    "dinov2": Representation("facebook/dinov2-large", 224),  # FD-DINOv2, arXiv 2306.04675
    "convnext": Representation("timm/convnextv2_base.fcmae_ft_in22k_in1k", 224, 56.87),
    "dinov2_cls": Representation("timm/vit_large_patch14_dinov2.lvd142m", 256, 14.19),
    "mae_cls": Representation("timm/vit_large_patch16_224.mae", 224, 0.04),
    "siglip_cls": Representation("timm/vit_so400m_patch16_siglip_256.v2_webli", 224, 0.60),
    "clip_cls": Representation("timm/vit_large_patch14_clip_224.openai", 256, 5.60),
}
FDR6 = ("convnext", "dinov2_cls", "mae_cls", "siglip_cls", "clip_cls")  # and Inception's
INCEPTION_VALIDATION = 1.68


class InceptionExtractor(nn.Module):
    """
    The Inception of FID in torch-fidelity's port of the TensorFlow graph, with the spatial features of sFID beside it.

    `pool` (2048) are the graph's `pool_3`. `spatial` (2023) are the first 7 channels of `mixed_6/conv` over 17 x 17
    positions, channels last, as ADM's evaluator flattens them (arXiv 2103.03841; the order matters against ADM's stored
    statistics). `logits` (1008) are without bias, which is what ADM's Inception score takes.

    Args:
        weights (`str`, *optional*):
            torch-fidelity's weight file, or another state dict of it. By default torch-fidelity downloads it.

    Raises:
        ImportError: without torch-fidelity.
        OSError: if the weights are missing and cannot be downloaded.
    """

    layers = ("pool", "spatial", "logits")
    _spatial: torch.Tensor  # from the last images that the hook saw
    num_classes = 0  # TensorFlow orders its 1 008 classes differently

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception comes from torch-fidelity: pip install torch-fidelity") from error
        try:
            if weights is not None:
                torch.load(weights, weights_only=True)  # refuses code in a pickle, which torch-fidelity would run
            self.inception = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        except OSError as error:
            raise OSError(
                f"Inception's weights are missing ({error}): download {INCEPTION_URL} (91 MB) and name the file with "
                f"--inception_weights, or put it into {torch.hub.get_dir()}/checkpoints"
            ) from error
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # TensorFlow's mixed_6/conv

    def _keep_spatial(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) uint8 images, which the graph's own resize makes 299 px, to `pool` (B, 2048), `spatial` (B,
        2023) and `logits` (B, 1008), float32."""
        pool, logits = self.inception(images)
        return {"pool": pool, "spatial": self._spatial.float(), "logits": logits}


class ClassifierExtractor(nn.Module):
    """
    A ResNet classifier of transformers, for data unlike Inception's: its pooled features and its logits.

    Args:
        path (`str`): Folder or Hub id of a `ResNetForImageClassification` with its image processor.

    Raises:
        ValueError: for another model, or one without its head.
    """

    layers = ("pool", "logits")
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        model, info = ResNetForImageClassification.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:  # transformers only warns, and leaves them random
            raise ValueError(
                f"the extractor {path} is not a ResNet classifier: it lacks {len(info['missing_keys'])} tensors of one"
            )
        self.model = model.eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.num_classes, self.id2label = self.model.config.num_labels, self.model.config.id2label
        sizes = [getattr(processor, name, None) or {} for name in ("crop_size", "size")]
        size = next((of[key] for of in sizes for key in ("height", "shortest_edge") if of.get(key)), None)
        if size is None:
            raise ValueError(f"the image processor of the extractor {path} names no size of its images")
        self.size = size
        mean, std = normalization(processor)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) images, uint8 or [`resize`]d, to `pool` (B, D) and `logits` (B, classes), float32."""
        pixels = resize(images, self.size)
        pool = self.model.resnet(torch.sub(pixels, self.mean).div_(self.std)).pooler_output.flatten(1)
        return {"pool": pool, "logits": self.model.classifier(pool)}


class RepresentationExtractor(nn.Module):
    """
    One vector per image from a vision model: its class token after the last norm; without one what its attention pools (SigLIP),
    or the mean of its map (ConvNeXt).

    Mean and deviation are those of the model's own processor. The whole image is resized, with antialias.

    Args:
        name (`str`): Its name in records and references, a key of `REPRESENTATIONS`.
        path (`str`, *optional*): Folder or Hub id, of timm or transformers. Defaults to the published one.

    Raises:
        ImportError: for a model of timm where that is not installed.
        ValueError: for a model that gives no such vector.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, path: str | None = None) -> None:
        super().__init__()
        self.layers, self.num_classes = (name,), 0
        self.size = REPRESENTATIONS[name].size
        self.hub_id = path or REPRESENTATIONS[name].hub_id
        self.published = self.hub_id == REPRESENTATIONS[name].hub_id
        config = AutoConfig.from_pretrained(self.hub_id)
        processor = AutoImageProcessor.from_pretrained(self.hub_id, backend="pil")
        if config.model_type == "timm_wrapper":
            # Other sizes than the model's own; a table is resampled with antialias, sides are filled up to whole patches.
            if "vit" in config.architecture:
                config.model_args = (config.model_args or {}) | {"dynamic_img_size": True, "dynamic_img_pad": True}
        elif hasattr(config, "text_config"):
            raise ValueError(f"{self.hub_id} holds a text model too: name its image model as timm has it")
        mean, std = normalization(processor)
        self.model = load_whole(AutoModel, self.hub_id, config=config, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) images, uint8 or [`resize`]d, to the name's (B, D), float32."""
        pixels = resize(images, self.size)
        output = self.model(pixel_values=torch.sub(pixels, self.mean).div_(self.std))
        features = output.last_hidden_state
        network = getattr(self.model, "timm_model", getattr(self.model, "embeddings", None))
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        elif getattr(network, "attn_pool", None) is not None:
            features = output.pooler_output
        elif getattr(network, "cls_token", None) is not None:
            features = features[:, 0]
        else:
            raise ValueError(
                f"{self.hub_id} ({type(self.model).__name__}) has neither a class token nor a pooled vector"
            )
        return {self.layers[0]: features.float()}


def describe_extractors(extractors: Sequence[nn.Module], names: Sequence[str]) -> dict[str, object]:
    """What a record says of extractors, the first of them Inception or a classifier: names (Hub ids or paths), hashes,
    sizes, normalisation and precision as applied."""
    described: dict[str, object] = {
        "name": names[0], "sha256": weights_hash(extractors[0]), "precision": "float32 without TF32, sums in float64",
    }  # fmt: skip
    for extractor, name in zip(extractors[1:], names[1:], strict=True):
        layer: str = extractor.layers[0]  # type: ignore[index,assignment]
        described |= {layer: name, f"{layer}_sha256": weights_hash(extractor)}
        means, deviations = (getattr(extractor, part).flatten().tolist() for part in ("mean", "std"))
        described[f"{layer}_preprocessing"] = (
            f"bicubic with antialias to {extractor.size} px, mean {[round(x, 6) for x in means]}, std "
            f"{[round(x, 6) for x in deviations]}"
        )
    return described


def load_extractor(name: str, inception_weights: str | None = None) -> nn.Module:
    """Inception, or the [`ClassifierExtractor`] of a folder or Hub id; its `layers` name its features."""
    return InceptionExtractor(inception_weights) if name == "inception" else ClassifierExtractor(name)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Bicubic with antialias, as PIL's.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Images, uint8 or float32 in [0, 1].
        size (`int`): Side in pixels.

    Returns:
        `torch.Tensor` of shape `(B, 3, size, size)`: float32 in [0, 1].
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp_(0, 1)
    return images
