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
import weakref

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers import train
from safetensors.torch import load_file

from erw_hf import ERWPipeline
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.ema import EMA, EMAProfile, ema_profiles, main, post_hoc_coefficients, power_of


def test_constant_decay_against_its_definition():
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, [EMAProfile(decay=0.9)])
    expected = model.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.step()
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(ema.weights()["weight"], expected)


@pytest.mark.parametrize("decay", [0.9, 0.9999, 0.0])
def test_the_ramp_is_that_of_diffusers(decay):
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=decay)
    ours = EMAProfile(decay=decay, ramp=True)
    assert [ours.decay_at(step) for step in range(1, 200)] == [theirs.get_decay(step) for step in range(1, 200)]


@pytest.mark.parametrize(
    "profile",
    [EMAProfile(decay=0.95), EMAProfile(decay=0.95, ramp=True), EMAProfile(sigma_rel=0.1), EMAProfile(decay=0.0)],
)
def test_where_an_average_is_after_some_steps(profile):
    """Of weights that are their own step, the average is how far it lies behind."""
    steps, average, share = 60, 0.0, 1.0
    for step in range(1, steps + 1):
        decay = profile.decay_at(step)
        average, share = decay * average + (1 - decay) * step, share * decay
    assert profile.after(steps) == (pytest.approx(share), pytest.approx(steps - average))
    assert profile.after(0) == (1.0, 0.0)


def test_a_short_run_forgets_its_initial_weights_by_default():
    """300 steps: 97 % of a constant average would be what the run began with."""
    assert EMAProfile(decay=0.9999).after(300)[0] == pytest.approx(0.97, abs=0.01)
    share, behind = ema_profiles(TrainingConfig(in_channels=1))[0].after(300)
    assert share == 0 and behind == pytest.approx(30)
    assert ema_profiles(TrainingConfig(in_channels=1, ema_ramp=False))[0] == EMAProfile(decay=0.9999)


def test_averages_are_float32_whatever_the_model_is():
    model = torch.nn.Linear(3, 2).bfloat16()
    ema = EMA(model, [EMAProfile(decay=0.9999)])
    before = ema.weights()["weight"].clone()
    with torch.no_grad():
        model.weight.add_(0.01)
    ema.step()
    assert before.dtype == torch.float32
    assert not torch.equal(before, ema.weights()["weight"])  # bfloat16 would have swallowed the step


def test_powers_are_those_of_the_paper():
    """EDM2, arXiv 2312.02696, §3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert power_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_of(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match="sigma_rel must lie in"):
            power_of(width)


def test_a_power_function_average_is_the_weighted_mean_that_it_stands_for():
    """Its weights over the steps are t^gamma, normalised (EDM2, Eq. 3), up to the steps' own width."""
    values, steps = np.sin(np.arange(1, 2001) / 300), 2000
    average, profile = 0.0, EMAProfile(sigma_rel=0.1)
    for t in range(1, steps + 1):
        decay = profile.decay_at(t)
        average = decay * average + (1 - decay) * values[t - 1]
    weights = np.arange(1, steps + 1) ** power_of(0.1)
    assert average == pytest.approx((weights * values).sum() / weights.sum(), abs=1e-3)


def test_a_power_function_average_forgets_the_initial_weights_at_its_first_step():
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, [EMAProfile(sigma_rel=0.1)])
    with torch.no_grad():
        model.weight.add_(1)
    ema.step()
    assert torch.equal(ema.weights()["weight"], model.weight)
    assert EMAProfile(sigma_rel=0.1).decay_at(2) == pytest.approx(0.5 ** (power_of(0.1) + 1))


def test_restored_averages_go_on_as_if_nothing_had_happened():
    def follow(ema, model, steps):
        for step in steps:
            with torch.no_grad():
                model.weight.fill_(step)
            ema.step()

    profiles = [EMAProfile(decay=0.9), EMAProfile(sigma_rel=0.05), EMAProfile(sigma_rel=0.1)]
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    whole, resumed = EMA(model, profiles), EMA(other, profiles)
    follow(whole, model, range(5))
    resumed.load_state_dict(whole.state_dict())
    follow(whole, model, range(5, 9))
    follow(resumed, other, range(5, 9))
    for index in range(3):
        assert torch.equal(resumed.weights(index)["weight"], whole.weights(index)["weight"])
        assert not torch.equal(whole.weights(index)["weight"], whole.weights(index - 1)["weight"])


@pytest.mark.parametrize("width", [0.05, 0.07, 0.15, 0.2])
def test_post_hoc_averages_match_those_that_were_followed(width):
    values = np.cumsum(np.random.default_rng(0).standard_normal(2000)) / 20
    followed = {}
    for sigma_rel in (0.05, 0.1, width):
        profile, average = EMAProfile(sigma_rel=sigma_rel), 0.0
        for t in range(1, 2001):
            decay = profile.decay_at(t)
            average = decay * average + (1 - decay) * values[t - 1]
            if t % 100 == 0:
                followed[t, sigma_rel] = average
    stored = [(t, sigma_rel) for t in range(100, 2001, 100) for sigma_rel in (0.05, 0.1)]
    coefficients = post_hoc_coefficients([t for t, _ in stored], [s for _, s in stored], 2000, width)
    rebuilt = sum(c * followed[key] for c, key in zip(coefficients, stored, strict=True))
    assert rebuilt == pytest.approx(followed[2000, width], abs=0.02)
    assert coefficients.sum() == pytest.approx(1, abs=0.01)


def test_the_width_is_chosen_after_training(tmp_path, tiny_flags, monkeypatch, capsys):
    run = tmp_path / "run"
    train(*tiny_flags, "--max_train_steps=15", "--learning_rate=1e-2", "--ema_sigma_rel=0.1", "--ema_snapshot_steps=1",
        f"--output_dir={run}")  # fmt: skip
    arguments = ["ema", str(run), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "rebuilt")]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    file = "transformer/diffusion_pytorch_model.safetensors"
    followed, rebuilt = load_file(run / "pipeline" / file), load_file(tmp_path / "rebuilt" / file)
    for name, tensor in followed.items():  # stored in float16
        torch.testing.assert_close(rebuilt[name], tensor, atol=2e-3, rtol=2e-3)
    pipe = ERWPipeline.from_pretrained(tmp_path / "rebuilt")
    assert pipe(class_labels=[3], num_inference_steps=2).images[0].size == (8, 8)
    monkeypatch.setattr("sys.argv", [*arguments[:1], str(tmp_path), *arguments[2:]])
    with pytest.raises(SystemExit):
        main()
    assert "train with ema_snapshot_steps" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--step", "0"])  # before the first: its weights would be about 0
    with pytest.raises(SystemExit):
        main()
    assert "the snapshots are of the steps 1 to" in capsys.readouterr().err


def test_a_checkpoint_gathers_one_tensor_at_a_time_and_the_main_process_keeps_them(monkeypatch):
    """As under FSDP2, where each `whole_tensor` takes memory of the GPU."""
    on_gpu, most = weakref.WeakSet(), []

    class Gathered:
        def __init__(self, tensor):
            self.cpu = tensor.clone
            on_gpu.add(self)
            most.append(len(on_gpu))

    ema = EMA(torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4))), [EMAProfile(decay=0.9)] * 3)
    monkeypatch.setattr("erw_hf.trainer.ema.whole_tensor", Gathered)
    saved = ema.state_dict()
    assert max(most) <= 2
    assert [list(average) for average in saved["averages"]] == [ema.names] * 3
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert ema.state_dict() == {"step_count": 0, "averages": [{}] * 3}
