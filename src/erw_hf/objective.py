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
"""The objective of both phases: the batch, the teacher's targets, the aligned model, the loss terms, the schedule of lambda.

t is 0 for data and 1 for noise; x_t is a point on the path between them, v = dx_t/dt (arXiv 2504.10188).
Warmup:         L = alignment(early tokens of x_0, the teacher's)
Full training:  L = |model(x_t) - v|^2 + lambda * alignment(tokens of x_t, the teacher's)   + the terms of other papers
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn

from erw_hf.alignment import (
    AlignmentLoss,
    alignment_weight,
    cosine_alignment_loss,
    seen_tokens,
    spatial_normalize,
)
from erw_hf.encoders import RepresentationEncoder
from erw_hf.flow import interpolate, sample_loss_weight, timestep_from_normal
from erw_hf.transformer_erw import MIN_TIME, ERWTransformer2DModel


@dataclass(frozen=True)
class Batch:
    """
    The input of a loss. It contains every random draw, so that the losses are pure functions.

    Args:
        x0 (`torch.Tensor` of shape `(B, C, h, w)`): Clean latents.
        noise (`torch.Tensor` of shape `(B, C, h, w)`): Standard normal noise.
        t (`torch.Tensor` of shape `(B,)`): Flow time in [0, 1]; at 0 the model sees the clean latents.
        class_labels (`torch.LongTensor` of shape `(B,)`, *optional*): Class ids.
        drop (`torch.Tensor` of shape `(B,)`): Non-zero where the label is dropped.
        targets (`Sequence[torch.Tensor]` of shape `(B, N, D)`, *optional*):
            Tokens to align with, of each encoder; `None` in a step that does not align.
        class_token (`torch.Tensor` of shape `(B, E)`, *optional*): The first encoder's class token, for a model with one.
        class_noise (`torch.Tensor` of shape `(B, E)`, *optional*): Standard normal noise, for the class token.
        hidden (`torch.Tensor` of shape `(B, N)`, bool, *optional*): Tokens that are hidden from the projectors.
    """

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    class_labels: torch.Tensor | None
    drop: torch.Tensor
    targets: Sequence[torch.Tensor] | None = None
    class_token: torch.Tensor | None = None
    class_noise: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class Teacher:
    """
    The frozen encoders, and the tokens that a step takes from them.

    Args:
        encoders (`Sequence[RepresentationEncoder]`): May be empty.
        spatial_norm (`bool`): Normalise the targets over the grid, as iREPA does.
        draws_class_token (`bool`): The model draws the first encoder's class token beside the image, as REG does.
        aligns_class_token (`bool`):
            Also align the model's class token with the encoder's, which is prepended to the first encoder's targets.
        cached (`bool`): The tokens come with the samples, from a latent cache.
    """

    encoders: Sequence[RepresentationEncoder] = ()
    spatial_norm: bool = False
    draws_class_token: bool = False
    aligns_class_token: bool = False
    cached: bool = False

    def encoders_for(self, aligned: bool) -> Sequence[RepresentationEncoder]:
        """
        Args:
            aligned (`bool`): Whether the step aligns.

        Returns:
            `Sequence[RepresentationEncoder]`: The encoders that the step runs: all, or only the first if just a class
            token is needed.
        """
        if self.cached:
            return ()
        return self.encoders if aligned else self.encoders[: int(self.draws_class_token)]

    def __call__(
        self, samples: Mapping[str, torch.Tensor], aligned: bool
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """
        Args:
            samples (`Mapping[str, torch.Tensor]`): With `pixels` (B, C, H, W) uint8, or from a cache `features` (B, N D).
            aligned (`bool`): Whether the step aligns.

        Returns:
            `tuple`: The targets, `(B, N, D)` of each encoder, `None` without alignment; and the class token `(B, E)`, `None`
            unless the model draws it.
        """
        tokens, class_token = [], None
        if aligned and self.cached:
            tokens = [samples["features"].unflatten(1, (self.encoders[0].token_grid ** 2, -1))]
        if encoders := self.encoders_for(aligned):
            images = samples["pixels"].float() / 255
            if self.draws_class_token:
                patch_tokens, class_token = encoders[0].patch_and_class_tokens(images)
                tokens, class_token, encoders = [patch_tokens], class_token.float(), encoders[1:]
            tokens += [encoder(images) for encoder in encoders]
        if not aligned:
            return None, class_token
        if self.spatial_norm:
            tokens = [spatial_normalize(target) for target in tokens]
        if self.aligns_class_token and class_token is not None:
            tokens[0] = torch.cat([class_token.unsqueeze(1), tokens[0]], dim=1)  # (B, 1 + N, D)
        return tokens, class_token


class AlignedOutput(NamedTuple):
    """
    Args:
        velocity (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): `None` in warmup.
        projected (`list[torch.Tensor]`): Of each projector, `(B, N, D)`.
        class_velocity (`torch.Tensor` of shape `(B, E)`, *optional*): `None` in warmup and without a class token.
    """

    velocity: torch.Tensor | None
    projected: list[torch.Tensor]
    class_velocity: torch.Tensor | None


class AlignedTransformer(nn.Module):
    """
    A transformer and the projectors on its intermediate tokens, as the one module that is trained: one forward for
    DistributedDataParallel and FSDP to hook.

    Args:
        transformer ([`ERWTransformer2DModel`]): The model.
        projectors (`Sequence[nn.Module]`): Map its tokens `(B, N, D)` to those of the encoders, one each; may be empty.
        depth (`int`): The block, counted from 1, whose output is projected.
        warmup (`bool`, *optional*, defaults to `False`): Run no block after `depth` and predict no velocity.
        aligns_class_token (`bool`, *optional*, defaults to `False`):
            Put the class token before the tokens that the first projector takes, for a model that draws one.
    """

    def __init__(
        self,
        transformer: ERWTransformer2DModel,
        projectors: Sequence[nn.Module],
        depth: int,
        warmup: bool = False,
        aligns_class_token: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.projectors = nn.ModuleList(projectors)
        self.depth = depth
        self.warmup = warmup
        self.aligns_class_token = aligns_class_token

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None,
        drop: torch.Tensor,
        class_token: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> AlignedOutput:
        """
        Args:
            x_t (`torch.Tensor` of shape `(B, C, h, w)`): Noised (in warmup: clean) latents.
            t (`torch.Tensor` of shape `(B,)`): Flow time in [0, 1].
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*): Class ids.
            drop (`torch.Tensor` of shape `(B,)`): Non-zero where the label is dropped.
            class_token (`torch.Tensor` of shape `(B, E)`, *optional*): Noised class token, for a model with one.
            hidden (`torch.Tensor` of shape `(B, N)`, bool, *optional*): Tokens in whose place the projectors see zeros.

        Returns:
            [`AlignedOutput`]: Velocities and projected tokens.
        """
        depths = (self.depth,) if self.projectors else ()
        output = self.transformer(
            x_t,
            t,
            class_labels,
            force_drop_ids=drop,
            hidden_states_depths=depths,
            tokens_only=self.warmup,
            class_token=class_token,
        )
        inputs = []
        if depths:
            tokens = output.hidden_states[0]  # (B, N, D)
            tokens = tokens if hidden is None else tokens.masked_fill(hidden.unsqueeze(-1), 0)
            inputs = [tokens] * len(self.projectors)
        if depths and self.aligns_class_token:
            inputs[0] = torch.cat([output.class_hidden_states[0].unsqueeze(1), inputs[0]], dim=1)  # (B, 1 + N, D)
        projected = [projector(tokens) for projector, tokens in zip(self.projectors, inputs, strict=True)]
        return AlignedOutput(output.sample, projected, output.class_token)


@dataclass(frozen=True)
class Term:
    """
    A term of a loss.

    Args:
        weight (`float`): Its factor in the loss.
        value (`torch.Tensor` of shape `()`): Its value, without the weight.
    """

    weight: float
    value: torch.Tensor


@dataclass(frozen=True)
class Losses:
    """
    Args:
        loss (`torch.Tensor` of shape `()`): The weighted sum of the terms, which is minimised.
        terms (`dict[str, Term]`): The terms by name.
    """

    loss: torch.Tensor
    terms: dict[str, Term]

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The loss and its terms, without their weights, by name."""
        return {"loss": self.loss, **{name: term.value for name, term in self.terms.items()}}


@dataclass(frozen=True)
class Objective:
    """
    The losses of both phases. Each field but `align` is a key of a run, where it is described.

    Args:
        align (`Callable`, *optional*, defaults to [`~alignment.cosine_alignment_loss`]): The alignment loss of each sample.
        path_type (`str`, *optional*, defaults to `"linear"`): See [`~flow.path_coefficients`].
        prediction_type (`str`, *optional*, defaults to `"velocity"`): Of the model; see [`~flow.sample_loss_weight`].
        timestep_distribution (`str`, *optional*, defaults to `"uniform"`): See [`~flow.timestep_from_normal`].
        timestep_logit_mean (`float`, *optional*, defaults to 0.0): Likewise.
        timestep_logit_std (`float`, *optional*, defaults to 1.0): Likewise.
        timestep_shift (`float`, *optional*, defaults to 1.0): Likewise.
        contrastive_weight (`float`, *optional*, defaults to 0.0): Weight of contrastive flow matching.
        class_token_weight (`float`, *optional*, defaults to 0.0): Weight of the class token's velocity.
        projector (`str`, *optional*, defaults to `"mlp"`): `"transformer"` is compared at hidden tokens too.
        alignment_mask_ratio (`float`, *optional*, defaults to 0.0): Share of the tokens that are hidden.
        alignment_schedule (`str`, *optional*, defaults to `"constant"`): See [`~alignment.alignment_weight`].
        alignment_weight (`float`, *optional*, defaults to 0.5): lambda at the first step of full training.
        alignment_half_life (`int`, *optional*): See [`~alignment.alignment_weight`].
        alignment_stop_step (`int`, *optional*): Likewise.
    """

    align: AlignmentLoss = cosine_alignment_loss
    path_type: str = "linear"
    prediction_type: str = "velocity"
    timestep_distribution: str = "uniform"
    timestep_logit_mean: float = 0.0
    timestep_logit_std: float = 1.0
    timestep_shift: float = 1.0
    contrastive_weight: float = 0.0
    class_token_weight: float = 0.0
    projector: str = "mlp"
    alignment_mask_ratio: float = 0.0
    alignment_schedule: str = "constant"
    alignment_weight: float = 0.5
    alignment_half_life: int | None = None
    alignment_stop_step: int | None = None

    def warmup_loss(self, model: nn.Module, batch: Batch, weight: float = 1.0) -> Losses:
        """
        The warmup (ERW, Eq. 13): align the early blocks' tokens with the encoder's. Published with clean latents, at t = 0.

        Args:
            model ([`AlignedTransformer`]): In warmup mode.
            batch ([`Batch`]): With targets.
            weight (`float`, *optional*, defaults to 1.0): Weight of the alignment.

        Returns:
            [`Losses`]: With the term `alignment` alone.
        """
        output, _, _ = self._run(model, batch)
        alignment = Term(weight, self._alignment(output, batch))
        return Losses(alignment.weight * alignment.value, {"alignment": alignment})

    def full_loss(self, model: nn.Module, batch: Batch, weight: float) -> Losses:
        """
        Full training (ERW, Eq. 5 and 14): velocity matching plus lambda times the alignment of the noised latents' tokens.

        Args:
            model ([`AlignedTransformer`]): The full model.
            batch ([`Batch`]): With or without targets.
            weight (`float`): lambda.

        Returns:
            [`Losses`]: With the terms `velocity`; `contrastive`, if it has a weight; `class_token`, if the batch has one;
            and `alignment`, if it has targets.
        """
        output, velocity, class_velocity = self._run(model, batch)
        weight_of_t = sample_loss_weight(batch.t) if self.prediction_type == "sample" else None  # (B,)
        terms = {"velocity": Term(1.0, _squared_error(output.velocity, velocity, weight_of_t))}
        if self.contrastive_weight > 0:
            # Pushes away from the velocity of another sample, the previous one in the batch (arXiv 2506.05350, Eq. 5).
            other = _squared_error(output.velocity, velocity.roll(1, dims=0), weight_of_t)
            terms["contrastive"] = Term(-self.contrastive_weight, other)
        if class_velocity is not None:  # REG (arXiv 2507.01467)
            class_error = _squared_error(output.class_velocity, class_velocity, weight_of_t)
            terms["class_token"] = Term(self.class_token_weight, class_error)
        if batch.targets is not None:
            terms["alignment"] = Term(weight, self._alignment(output, batch))
        loss = sum((term.weight * term.value for term in terms.values()), torch.zeros(()))
        if batch.targets is None:
            # Unused projectors (lambda = 0) stay in the graph, because DistributedDataParallel waits for every gradient.
            loss = loss + sum(0 * tokens.sum() for tokens in output.projected)
        return Losses(loss, terms)

    def flow_time(self, normal: torch.Tensor) -> torch.Tensor:
        """
        Args:
            normal (`torch.Tensor` of shape `(B,)`): Standard normal draws.

        Returns:
            `torch.Tensor` of shape `(B,)`: The flow times that they stand for; a model that predicts samples has no velocity
            below `MIN_TIME`.
        """
        t = timestep_from_normal(
            normal,
            self.timestep_distribution,
            self.timestep_logit_mean,
            self.timestep_logit_std,
            self.timestep_shift,
        )
        return t.clamp(min=MIN_TIME) if self.prediction_type == "sample" else t

    def weight_at(self, step: int) -> float:
        """
        Args:
            step (`int`): Steps of full training done so far.

        Returns:
            `float`: lambda.
        """
        return alignment_weight(
            step,
            self.alignment_schedule,
            self.alignment_weight,
            self.alignment_half_life,
            self.alignment_stop_step,
        )

    def _run(self, model: nn.Module, batch: Batch) -> tuple[AlignedOutput, torch.Tensor, torch.Tensor | None]:
        """The model at the batch's points of the path, and the velocities there; a class token has the latents' t."""
        x_t, velocity = interpolate(batch.x0, batch.noise, batch.t, self.path_type)  # (B, C, h, w)
        class_t = class_velocity = None
        if batch.class_token is not None and batch.class_noise is not None:
            class_t, class_velocity = interpolate(
                batch.class_token, batch.class_noise, batch.t, self.path_type
            )  # (B, E)
        return model(x_t, batch.t, batch.class_labels, batch.drop, class_t, batch.hidden), velocity, class_velocity

    def _alignment(self, output: AlignedOutput, batch: Batch) -> torch.Tensor:
        """The mean over samples and encoders."""
        pairs = list(zip(output.projected, batch.targets or (), strict=True))
        if batch.hidden is not None and self.projector != "transformer":
            hidden, ratio = batch.hidden, self.alignment_mask_ratio
            pairs = [(seen_tokens(ours, hidden, ratio), seen_tokens(theirs, hidden, ratio)) for ours, theirs in pairs]
        losses = [self.align(ours, theirs).mean() for ours, theirs in pairs]
        return torch.stack(losses).mean()


def _squared_error(
    predicted: torch.Tensor | None, target: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    assert predicted is not None  # except in warmup
    error = (predicted.float() - target).square()
    return error.mean() if weight is None else (weight * error.flatten(1).mean(dim=1)).mean()
