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

import hashlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, ResNetForImageClassification


INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


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
            raise ImportError("Inception comes from torch-fidelity: pip install erw-hf[eval]") from error
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
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): Images; the graph's own resize makes them 299 px.

        Returns:
            `dict[str, torch.Tensor]`: `pool` (B, 2048), `spatial` (B, 2023) and `logits` (B, 1008), float32.
        """
        pool, logits = self.inception(images)
        return {"pool": pool, "spatial": self._spatial.float(), "logits": logits}


class ClassifierExtractor(nn.Module):
    """
    A ResNet classifier of transformers, for data unlike Inception's: its pooled features and its logits.

    Args:
        path (`str`): Folder or Hub id of a `ResNetForImageClassification` with its image processor.
    """

    layers = ("pool", "logits")
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = ResNetForImageClassification.from_pretrained(path).eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.num_classes = self.model.config.num_labels
        self.size = processor.crop_size["height"]
        self.register_buffer("mean", torch.tensor(processor.image_mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).reshape(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): Images.

        Returns:
            `dict[str, torch.Tensor]`: `pool` (B, D) and `logits` (B, classes), float32.
        """
        pixels = _resize(images, self.size)
        pool = self.model.resnet((pixels - self.mean) / self.std).pooler_output.flatten(1)
        return {"pool": pool, "logits": self.model.classifier(pool)}


class Dinov2Extractor(nn.Module):
    """
    The class token of a DINOv2 on 224 px images, for FD-DINOv2 (Stein et al., arXiv 2306.04675).

    Args:
        path (`str`): Folder or Hub id; the paper's is `facebook/dinov2-large`.
    """

    layers = ("dinov2",)
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(path).eval().requires_grad_(False)
        # ImageNet's, which all DINOv2 models were trained with.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): Images.

        Returns:
            `dict[str, torch.Tensor]`: `dinov2` (B, D), float32.
        """
        pixels = (_resize(images, 224) - self.mean) / self.std
        return {"dinov2": self.model(pixel_values=pixels).last_hidden_state[:, 0].float()}


def load_extractor(name: str, inception_weights: str | None = None) -> nn.Module:
    """
    Args:
        name (`str`): `"inception"`, or the folder or Hub id of a [`ClassifierExtractor`].
        inception_weights (`str`, *optional*): See [`InceptionExtractor`].

    Returns:
        `torch.nn.Module`: The extractor, whose `layers` name its features.
    """
    return InceptionExtractor(inception_weights) if name == "inception" else ClassifierExtractor(name)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a model's tensors (names, types, shapes and values), whatever its file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """float32 in [0, 1], bicubic with antialias as PIL's."""
    images = images.float() / 255
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return images
