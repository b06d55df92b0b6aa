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
import pytest


pytest.importorskip(
    "diffusers_tests", reason="set DIFFUSERS_SOURCE to a checkout of diffusers, whose wheel has no tests"
)

import torch
from diffusers_tests.models.testing_utils import (
    AttentionBackendTesterMixin,
    AttentionTesterMixin,
    BaseModelTesterConfig,
    ContextParallelTesterMixin,
    FirstBlockCacheTesterMixin,
    LoraTesterMixin,
    MagCacheTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TaylorSeerCacheTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from diffusers_tests.testing_utils import enable_full_determinism, torch_device

from erw_hf import ERWTransformer2DModel


enable_full_determinism()


@pytest.fixture(autouse=True, scope="module")
def no_zero_init():
    """A fresh adaLN-zero model predicts zeros whatever its adapters or caches do; the mixins ask for a difference."""

    def normal(model):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ERWTransformer2DModel, "_initialize_weights", normal)
        yield


class ERWTesterConfig(BaseModelTesterConfig):
    model_class = ERWTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (4, 8, 8)
    input_shape = (4, 8, 8)
    model_split_percents = [0.7, 0.6, 0.6]
    uses_custom_attn_processor = True

    @property
    def generator(self):
        return torch.Generator("cpu").manual_seed(0)

    def get_init_dict(self):
        return {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_classes": 10,
            "use_rope": True,
            "qk_norm": "rms_norm",
        }

    def get_dummy_inputs(self, batch_size=2):
        hidden_states = torch.randn(batch_size, 4, 8, 8, generator=self.generator)
        return {
            "hidden_states": hidden_states.to(torch_device, self.torch_dtype),
            "timestep": torch.linspace(0.2, 0.8, batch_size, device=torch_device),
            "class_labels": torch.arange(batch_size, device=torch_device),
            # Without it, labels drop at random in training mode, which comparisons between two passes cannot bear.
            "force_drop_ids": torch.zeros(batch_size, device=torch_device),
        }


class TestModel(ERWTesterConfig, ModelTesterMixin):
    pass


class TestMemory(ERWTesterConfig, MemoryTesterMixin):
    pass


class TestCompile(ERWTesterConfig, TorchCompileTesterMixin):
    pass


class TestTraining(ERWTesterConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"ERWTransformer2DModel"})


class TestAttention(ERWTesterConfig, AttentionTesterMixin):
    pass


class TestAttentionBackends(ERWTesterConfig, AttentionBackendTesterMixin):
    pass


class TestLora(ERWTesterConfig, LoraTesterMixin):
    pass


class TestFirstBlockCache(ERWTesterConfig, FirstBlockCacheTesterMixin):
    pass


class TestTaylorSeerCache(ERWTesterConfig, TaylorSeerCacheTesterMixin):
    pass


class TestMagCache(ERWTesterConfig, MagCacheTesterMixin):
    MAG_CACHE_CONFIG = {
        "num_inference_steps": 2,
        "retention_ratio": 0.0,
        "threshold": 100.0,
        "mag_ratios": torch.ones(100),
    }


class TestContextParallel(ERWTesterConfig, ContextParallelTesterMixin):
    pass
