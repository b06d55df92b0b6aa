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
"""Train the tiny DINOv2 of the digits default, self-supervised: the teacher that ERW aligns with, on data anyone has.

    python training/train_tiny_encoder.py --output_dir pipelines/dinov2-tiny-digits

It has no use for labels: two augmented views of each digit, DINO's loss on the class token and iBOT's on masked patches
(DINOv2, arXiv 2304.07193, §4; centring by Sinkhorn-Knopp as there). About 10 minutes on 2 CPU cores. The result is an
ordinary transformers folder, which `AutoModel.from_pretrained` and `RepresentationEncoder.from_pretrained` load. The
held-out digits serve for the k-NN accuracy that is printed, and for nothing else.
"""

import argparse
import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from erw_hf.data.digits import load_digits_dataset


MEAN, STD = 0.3, 0.35  # about those of the digits, so that the encoder sees unit-scale inputs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/dinov2-tiny-digits")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    splits = load_digits_dataset()
    train, train_labels = load_images(splits["train"], args.image_size)
    test, test_labels = load_images(splits["test"], args.image_size)

    config = Dinov2Config(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        patch_size=args.patch_size,
        image_size=args.image_size,
        use_mask_token=True,
        layerscale_value=0.1,  # DINOv2's 1.0 is for far deeper models
    )
    student = Student(Dinov2Model(config), args.prototypes)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.04)

    bar = tqdm(range(args.steps))
    for step in bar:
        progress = step / args.steps
        warm = min(1.0, step / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
        images = train[torch.randint(len(train), (args.batch_size,))]
        views = [augment(images), augment(images)]
        masks = [torch.rand(args.batch_size, (args.image_size // args.patch_size) ** 2) < 0.4 for _ in views]

        with torch.no_grad():
            temperature = 0.04 + 0.03 * warm
            targets = [
                [sinkhorn(scores.flatten(0, -2), temperature).view_as(scores) for scores in teacher(v)] for v in views
            ]
        loss = 0.0
        for i, (view, mask) in enumerate(zip(views, masks, strict=True)):
            class_scores, patch_scores = student(view, mask)
            class_loss = cross_entropy(class_scores, targets[1 - i][0]).mean()  # the other view's class token
            patch_loss = cross_entropy(patch_scores, targets[i][1])[mask].mean()  # this view's masked patches
            loss = loss + class_loss + patch_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()

        momentum = 1 - (1 - 0.992) * (0.5 + 0.5 * math.cos(math.pi * progress))
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
        if step % 100 == 99:
            accuracy = knn_accuracy(teacher.backbone, train, train_labels, test, test_labels)
            bar.set_postfix(loss=f"{loss.item():.3f}", **{name: f"{a:.3f}" for name, a in accuracy.items()})

    accuracy = knn_accuracy(teacher.backbone, train, train_labels, test, test_labels)
    print("k-NN accuracy on the held-out digits:", {name: round(a, 4) for name, a in accuracy.items()})
    teacher.backbone.save_pretrained(args.output_dir)
    size = args.image_size
    BitImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(args.output_dir)


class Student(nn.Module):
    """A backbone with DINO's head: scores of prototypes for the class token and for each patch token."""

    def __init__(self, backbone: Dinov2Model, prototypes: int) -> None:
        super().__init__()
        self.backbone = backbone
        dim = backbone.config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Linear(64, prototypes, bias=False)

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.backbone(normalise(images), bool_masked_pos=mask).last_hidden_state  # (B, 1 + N, D)
        scores = F.linear(F.normalize(self.mlp(tokens), dim=-1), F.normalize(self.prototypes.weight, dim=-1))
        return scores[:, 0], scores[:, 1:]  # (B, K), (B, N, K)


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images - MEAN) / STD).expand(-1, 3, -1, -1)


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * F.log_softmax(scores / 0.1, dim=-1)).sum(-1)


def sinkhorn(scores: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """Assignments (rows, K) that use every prototype equally often, so that the features cannot collapse."""
    q = torch.exp(scores / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random rotation, scale, shear and shift; contrast; noise. No flip: a mirrored 2 is another sign."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.7
    scale = 0.8 + 0.45 * torch.rand(n, 2)
    shear = (torch.rand(n) - 0.5) * 0.5
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    theta = torch.stack(
        [
            torch.stack([scale[:, 0] * angle.cos(), shear - angle.sin(), shift[:, 0]], dim=1),
            torch.stack([angle.sin(), scale[:, 1] * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    images = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    images = images.clamp(0, 1) ** (0.6 + 0.9 * torch.rand(n, 1, 1, 1))
    return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)


def load_images(split, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = [np.asarray(image.resize((size, size), resample=3), dtype=np.float32) / 255 for image in split["image"]]
    return torch.from_numpy(np.stack(arrays))[:, None], torch.tensor(list(split["label"]))


@torch.no_grad()
def knn_accuracy(backbone, train, train_labels, test, test_labels, k: int = 10) -> dict[str, float]:
    """Vote of the k nearest training digits by cosine similarity, on the class token and on the mean patch token."""
    backbone.eval()
    features = [torch.cat([backbone(normalise(b)).last_hidden_state for b in x.split(500)]) for x in (train, test)]
    backbone.train()
    accuracy = {}
    for name, pool in (("class", lambda f: f[:, 0]), ("patches", lambda f: f[:, 1:].mean(1))):
        a, b = (F.normalize(pool(f), dim=-1) for f in features)
        votes = F.one_hot(train_labels[(b @ a.T).topk(k).indices], 10).sum(1)
        accuracy[name] = (votes.argmax(1) == test_labels).float().mean().item()
    return accuracy


if __name__ == "__main__":
    main()
