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
"""Samplers (SDE: Euler-Maruyama; ODE: Heun): steps of a velocity, whatever the network predicts. Travels in Hub repos."""

import math
import numbers
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class FlowMatchSchedulerOutput(BaseOutput):
    """Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor` of shape `(B, C, H, W)`): The sample one step nearer to the data, in float32.
        pred_original_sample (`torch.Tensor` of shape `(B, C, H, W)`):
            The clean sample implied by the prediction, for previews.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class _FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """The common part of both samplers: a sequence of model calls, each with its time, and their count so far."""

    # Classes that accept each other's config: `scheduler.compatibles`, `X.from_config(scheduler.config)`.
    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    _source = Path(__file__).read_bytes()  # saved with a pipeline

    def _reset(self) -> None:
        self.num_inference_steps: int | None = None
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index of the next model call; `None` before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first model call, if `set_begin_index` set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index of the first model call, which saves a search (and a host sync) for it.

        Args:
            begin_index (`int`, *optional*, defaults to 0): Index into `timesteps`.
        """
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Finds the model call that starts at a time.

        Args:
            timestep (`float` or `torch.Tensor` of shape `()`): One of `timesteps`.

        Returns:
            `int`: Its index; of two calls at one time the second, which starts a step.

        Raises:
            ValueError: if the scheduler has no such time.
        """
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep {float(timestep)} is not one of this scheduler's `timesteps`")
        return int(matches[-1])

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noises clean samples along the path, as image-to-image does.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Clean samples.
            timestep (`torch.Tensor` of shape `(B,)`): Times in [0, num_train_timesteps].
            noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: alpha x_0 + sigma noise.
        """
        t = timestep.to(sample.device, torch.float32).reshape(-1, *[1] * (sample.ndim - 1))
        t = t / self.config.num_train_timesteps
        if self.config.path_type == "linear":
            return (1 - t) * sample + t * noise
        return torch.cos(t * math.pi / 2) * sample + torch.sin(t * math.pi / 2) * noise

    def _set_grid(self, sigmas: torch.Tensor, call_sigmas: torch.Tensor, device: str | torch.device | None) -> None:
        # The sigmas stay on the CPU: `step` reads single values, and on a device each would be a sync.
        self.sigmas = sigmas
        self.timesteps = (self.config.num_train_timesteps * call_sigmas).to(device=device, dtype=torch.float32)
        self._step_index = None
        self._begin_index = None

    def _start_step(self, timestep: float | torch.Tensor) -> int:
        if self.num_inference_steps is None:
            raise ValueError("call `set_timesteps` before `step`")
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError("`timestep` is an integer: pass one of `scheduler.timesteps`, not its index")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        return self._step_index

    def _predicted_original(self, velocity: torch.Tensor, sample: torch.Tensor, t: float) -> torch.Tensor:
        if self.config.path_type == "linear":
            return sample - t * velocity
        # x = alpha x_0 + sigma e and v = d_alpha x_0 + d_sigma e, solved for x_0; the determinant is pi / 2.
        return math.cos(t * math.pi / 2) * sample - math.sin(t * math.pi / 2) * velocity / (math.pi / 2)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _check_config(num_train_timesteps: int, path_type: str) -> None:
    if not num_train_timesteps >= 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    if path_type not in ("linear", "cosine"):
        raise ValueError(f'path_type must be "linear" or "cosine", got {path_type!r}')


def _checked_steps(num_inference_steps: int) -> int:
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, numbers.Integral):
        kind = type(num_inference_steps).__name__
        raise ValueError(f"num_inference_steps must be an integer, got {num_inference_steps!r} ({kind})")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    return int(num_inference_steps)


class FlowMatchEulerMaruyamaScheduler(_FlowMatchScheduler):
    """
    Euler-Maruyama steps of the reverse SDE of a flow-matching model (SiT, arXiv 2401.08740, Eq. 5 and §3), with the
    diffusion coefficient w(t) = 2 t of REPA and ERW.

    `N` inference steps take `N` model calls: sigma runs evenly from 1 to `sigma_last`, each of those `N - 1` steps
    drawing one float32 noise of the sample's shape, and a last step without noise goes from `sigma_last` to 0. The published
    one, `"mean"`, is the SDE's step without its noise. It overshoots: even with a perfect model it leaves noise of standard
    deviation `sigma_last` in the sample.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The factor between flow time and the `timesteps` that this scheduler hands out.
        path_type (`str`, defaults to `"linear"`): `"linear"` or `"cosine"`, as the model was trained.
        sigma_last (`float`, defaults to 0.04): Where the stochastic part ends; the SDE's score term grows towards 0.
        last_step (`str`, defaults to `"mean"`):
            `"mean"`, as in REPA and ERW and by default in SiT, or `"tweedie"` (SiT's name), the predicted clean sample,
            which leaves no noise: for models of pixels.

    Raises:
        ValueError: if `path_type`, `sigma_last` or `last_step` is out of its range.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path_type: str = "linear",
        sigma_last: float = 0.04,
        last_step: str = "mean",
    ) -> None:
        _check_config(num_train_timesteps, path_type)
        if not 0 < sigma_last < 1:
            raise ValueError(f"sigma_last must lie in (0, 1), got {sigma_last}")
        if last_step not in ("mean", "tweedie"):
            raise ValueError(f'last_step must be "mean" or "tweedie", got {last_step!r}')
        self._reset()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the grid of times.

        Args:
            num_inference_steps (`int`): Number of steps N, which is the number of model calls.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes.

        Raises:
            ValueError: if `num_inference_steps` is not an integer of at least 1.
        """
        self.num_inference_steps = num_inference_steps = _checked_steps(num_inference_steps)
        sigmas = torch.linspace(1.0, self.config.sigma_last, num_inference_steps, dtype=torch.float64, device="cpu")
        self._set_grid(torch.cat([sigmas, torch.zeros(1, dtype=torch.float64, device="cpu")]), sigmas, device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One step towards the data: `x <- x + (v - w/2 score) dt + sqrt(w |dt|) noise`, the noise missing in the last.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)`): The velocity, guided or not.
            timestep (`float` or `torch.Tensor` of shape `()`): The time of `sample`, one of `timesteps`.
            sample (`torch.Tensor` of shape `(B, C, H, W)`): The current sample.
            generator (`torch.Generator` or a list of B of them, *optional*):
                Source of the noise; a list gives each image of the batch its own.
            return_dict (`bool`, *optional*, defaults to `True`): Return a dataclass instead of a tuple.

        Returns:
            [`FlowMatchSchedulerOutput`] or `tuple`: the next sample and the predicted clean one.

        Raises:
            ValueError: if `set_timesteps` was not called, or `timestep` is an index instead of a time.
        """
        index = self._start_step(timestep)
        t, t_next = self.sigmas[index].item(), self.sigmas[index + 1].item()
        dt = t_next - t
        diffusion = 2 * t  # w(t)
        # A bf16 state would lose about 1 % over 50 steps, so state and update are float32.
        sample, velocity = sample.float(), model_output.float()

        if self.config.path_type == "linear":
            # With alpha = 1 - t and sigma = t, v - w/2 score has a closed form without any division: at t = 1 the
            # general form below would divide 0 by 0.
            drift = (2 - t) * velocity + sample
        else:
            alpha, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
            d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
            # score = (alpha v - d_alpha x) / (sigma (sigma d_alpha - alpha d_sigma)): SiT, Eq. 9, cleared of the
            # fraction alpha / d_alpha. On this path the inner bracket is -pi / 2.
            score = (alpha * velocity - d_alpha * sample) / (sigma * (sigma * d_alpha - alpha * d_sigma))
            drift = velocity - diffusion / 2 * score

        original = self._predicted_original(velocity, sample, t)
        prev_sample = sample + drift * dt
        if t_next > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            prev_sample = prev_sample + math.sqrt(diffusion * -dt) * noise
        elif self.config.last_step == "tweedie":
            prev_sample = original

        self._step_index = index + 1
        if not return_dict:
            return prev_sample, original
        return FlowMatchSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)


class FlowMatchHeunScheduler(_FlowMatchScheduler):
    """
    Heun's second-order steps of the probability-flow ODE on the grid of SiT, REPA and ERW, evenly from 1 to 0.

    `N` inference steps take `2 N - 1` model calls: each step but the last is corrected by a second call at its end.
    diffusers' own `FlowMatchHeunDiscreteScheduler` steps on another grid, which ends at 1 / num_train_timesteps.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The factor between flow time and the `timesteps` that this scheduler hands out.
        path_type (`str`, defaults to `"linear"`):
            `"linear"` or `"cosine"`, as the model was trained. The steps are the same for both; previews are not.

    Raises:
        ValueError: if `path_type` is neither of the two.
    """

    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, path_type: str = "linear") -> None:
        _check_config(num_train_timesteps, path_type)
        self._reset()
        self._predictor: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the grid of times.

        Args:
            num_inference_steps (`int`): Number of steps N, which take 2 N - 1 model calls.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes.

        Raises:
            ValueError: if `num_inference_steps` is not an integer of at least 1.
        """
        self.num_inference_steps = num_inference_steps = _checked_steps(num_inference_steps)
        self._predictor = None
        sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64, device="cpu")
        # The calls: predict from sigma_0, correct at sigma_1, predict from sigma_1, correct at sigma_2, ...
        self._set_grid(sigmas, torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)]), device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> FlowMatchSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Half a step: the prediction `x + v dt`, or at its end the correction `x + (v + v') / 2 dt`.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)`): The velocity, guided or not.
            timestep (`float` or `torch.Tensor` of shape `()`): The time of `sample`, one of `timesteps`.
            sample (`torch.Tensor` of shape `(B, C, H, W)`): The current sample.
            return_dict (`bool`, *optional*, defaults to `True`): Return a dataclass instead of a tuple.

        Returns:
            [`FlowMatchSchedulerOutput`] or `tuple`: the next sample and the predicted clean one.

        Raises:
            ValueError: if `set_timesteps` was not called, or `timestep` is an index instead of a time.
        """
        index = self._start_step(timestep)
        sample, velocity = sample.float(), model_output.float()
        original = self._predicted_original(velocity, sample, self.sigmas[(index + 1) // 2].item())
        interval = index // 2 if self._predictor is None else (index - 1) // 2
        dt = (self.sigmas[interval + 1] - self.sigmas[interval]).item()
        if self._predictor is None:
            prev_sample = sample + velocity * dt
            if interval < self.num_inference_steps - 1:  # type: ignore[operator]
                self._predictor = (sample, velocity)
        else:
            start, first_velocity = self._predictor
            prev_sample = start + (first_velocity + velocity) / 2 * dt
            self._predictor = None

        self._step_index = index + 1
        if not return_dict:
            return prev_sample, original
        return FlowMatchSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)
