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
"""Train a tiny DINOv2 or ResNet without labels: the teacher that ERW aligns with, on data anyone has.

    python training/train_tiny_encoder.py --output_dir pipelines/dinov2-tiny-digits
    python training/train_tiny_encoder.py --dataset_name outputs/glyphs --view_column view --resnet --num_layers 2 \\
        --learning_rate 2e-3 --steps 3000 --output_dir pipelines/resnet-tiny-glyphs

It has no use for labels. Two augmented views of each image must find each other in the batch (SimCLR's NT-Xent, arXiv
2002.05709, Eq. 1), once by their class token and once by the mean of their patch tokens. DINOv2's own self-distillation
needs far longer to leave its uniform start on 1 438 digits. A few minutes on 2 CPU cores for those. The result is an ordinary
transformers folder, which `AutoModel.from_pretrained` and `RepresentationEncoder.from_pretrained` load. The images of the
split `test` serve for the k-NN accuracy that is printed, and for nothing else.

Data may bring the second view of each image itself (`--view_column`), which nothing augments then. That of the glyphs has the
character and font of the first: no label is seen, but the pairs share one, a hint that DINOv2 does not have. `--resnet` trains
basic blocks of convolutions, by their mean. It knew the glyphs' characters, in fonts that it had not seen, after 500 steps (k-NN
0.84 in grey; 0.95 after 3000); a ViT with the same views knew none (0.03).
"""

import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from datasets import Image, load_dataset
from tqdm.auto import tqdm
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from erw_hf.data.decoding import decode_image
from erw_hf.data.digits import load_digits_dataset


# Loading, `normalise` and the processor are copied in train_classifier.py: no script imports another, and the
# library has no use for them.
# About those of the digits, and near enough elsewhere, so that the encoder sees unit-scale inputs.
MEAN, STD = 0.3, 0.35
KNN_IMAGES = 4000  # of each split, at most


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/dinov2-tiny-digits")
    parser.add_argument(
        "--dataset_name", default="digits", help="default: the digits; or a dataset with the splits train and test"
    )
    parser.add_argument(
        "--view_column",
        help="column with another image of the same thing; by default two augmentations of one image are the views",
    )
    parser.add_argument(
        "--resnet",
        action="store_true",
        help="a ResNet with a map at a --patch_size-th of the side (4, 8, 16 ...), --num_layers blocks in each of its stages",
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    splits = load_digits_dataset() if args.dataset_name == "digits" else load_dataset(args.dataset_name)
    train, train_labels = load_images(splits["train"], args.image_size)
    test, test_labels = load_images(splits["test"], args.image_size)
    second = None
    if args.view_column is not None:
        second, _ = load_images(splits["train"], args.image_size, args.view_column)

    backbone = build_backbone(args)
    with torch.no_grad():
        heads = nn.ModuleDict({name: head(x.shape[1]) for name, x in pooled(backbone, train[:1] / 255).items()})
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1
    )

    bar = tqdm(range(args.steps), mininterval=5)
    for step in bar:
        rows = torch.randperm(len(train))[: args.batch_size]
        images = train[rows].float() / 255
        if second is None:
            views = torch.cat([augment(images), augment(images)])
        else:
            views = torch.cat([images, second[rows].float() / 255])
        features = pooled(backbone, views)
        loss = sum(nt_xent(heads[name](x), args.temperature) for name, x in features.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            accuracy = knn_accuracy(backbone, train, train_labels, test, test_labels)
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}, k-NN accuracy on the held-out images {accuracy}")

    backbone.save_pretrained(args.output_dir)
    size = args.image_size
    BitImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(args.output_dir)


def build_backbone(args: argparse.Namespace) -> nn.Module:
    if args.resnet:
        stages = args.patch_size.bit_length() - 2  # the stem's stride is 4, and each stage after the first halves
        if stages < 1 or args.patch_size != 4 << (stages - 1):
            raise ValueError(f"--resnet takes a --patch_size of 4, 8, 16 ..., got {args.patch_size}")
        widths = [args.hidden_size >> (stages - 1 - i) for i in range(stages)]
        return ResNetModel(
            ResNetConfig(
                embedding_size=widths[0] // 2,
                hidden_sizes=widths,
                depths=[args.num_layers] * stages,
                layer_type="basic",
            )
        )
    return Dinov2Model(
        Dinov2Config(
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 32,
            patch_size=args.patch_size,
            image_size=args.image_size,
        )
    )


def pooled(backbone: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features (B, D) of images in [0, 1]: of a ViT the class token and the mean patch token, of a ResNet its mean cell."""
    hidden = backbone(normalise(images)).last_hidden_state
    if hidden.ndim == 4:  # (B, D, h, w)
        return {"cells": hidden.mean(dim=(2, 3))}
    return {"class": hidden[:, 0], "patches": hidden[:, 1:].mean(1)}


def head(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 64))


def nt_xent(features: torch.Tensor, temperature: float) -> torch.Tensor:
    """Each view's only positive among all others is the other view of its image, B rows away."""
    features = F.normalize(features, dim=-1)
    similarity = features @ features.T / temperature  # (2 B, 2 B)
    similarity.fill_diagonal_(float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(features)).roll(len(features) // 2))


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images - MEAN) / STD).expand(-1, 3, -1, -1)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random rotation, scale, shear and shift; contrast; noise; of colour images the colours. No flip: a mirrored 2 is
    another sign."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5
    scale = 0.8 + 0.45 * torch.rand(n, 2)
    shear = (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    theta = torch.stack(
        [
            torch.stack([scale[:, 0] * angle.cos(), shear - angle.sin(), shift[:, 0]], dim=1),
            torch.stack([angle.sin(), scale[:, 1] * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if images.shape[1] == 1:
        images = F.grid_sample(images, grid, align_corners=False)
    else:
        images = recolour(F.grid_sample(images, grid, padding_mode="reflection", align_corners=False))
    images = images.clamp(0, 1) ** (0.6 + 0.9 * torch.rand(n, 1, 1, 1))
    return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)


def recolour(images: torch.Tensor) -> torch.Tensor:
    """Channels mixed at random, and half of the images inverted: else their colours alone would tell images apart."""
    n = len(images)
    mixing = torch.rand(n, 3, 3) + torch.eye(3)[torch.stack([torch.randperm(3) for _ in range(n)])]
    images = torch.einsum("nij,njhw->nihw", mixing / mixing.sum(dim=2, keepdim=True), images)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, images, 1 - images)


def load_images(split, size: int, column: str = "image") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W), uint8, and labels."""
    images = [decode_image(image)[0] for image in split.cast_column(column, Image(decode=False))[column]]
    images = np.stack([np.asarray(image.resize((size, size), resample=3)) for image in images])
    return torch.from_numpy(images).reshape(len(images), size, size, -1).movedim(-1, 1), torch.tensor(
        list(split["label"])
    )


@torch.no_grad()
def knn_accuracy(backbone, train, train_labels, test, test_labels, k: int = 10) -> dict[str, float]:
    """Vote of the k nearest training images by cosine similarity of their features."""
    rows = [torch.linspace(0, len(x) - 1, min(len(x), KNN_IMAGES)).round().long() for x in (train, test)]
    train_labels, test_labels = train_labels[rows[0]], test_labels[rows[1]]
    backbone.eval()
    features = []
    for x, r in zip((train, test), rows, strict=True):
        batches = [pooled(backbone, b.float() / 255) for b in x[r].split(500)]
        features.append({name: F.normalize(torch.cat([b[name] for b in batches]), dim=-1) for name in batches[0]})
    backbone.train()
    accuracy = {}
    for name, a in features[0].items():
        votes = F.one_hot(train_labels[(features[1][name] @ a.T).topk(k).indices]).sum(1)
        accuracy[name] = round((votes.argmax(1) == test_labels).float().mean().item(), 4)
    return accuracy


if __name__ == "__main__":
    main()
