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
from diffusers import AutoencoderKL
from diffusers_tests.pipelines.pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
)
from diffusers_tests.pipelines.testing_utils import BasePipelineTesterConfig, MemoryTesterMixin, PipelineTesterMixin
from diffusers_tests.testing_utils import enable_full_determinism

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler


enable_full_determinism()


class ERWPipelineTesterConfig(BasePipelineTesterConfig):
    pipeline_class = ERWPipeline
    required_input_params_in_call_signature = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    callback_cfg_params = frozenset()
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        torch.manual_seed(0)
        transformer = ERWTransformer2DModel(
            sample_size=8, in_channels=3, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=10
        )  # three channels, which are shown as pixels where a test takes the autoencoder away
        for parameter in transformer.parameters():  # a fresh model predicts zeros, which would hide most errors
            torch.nn.init.normal_(parameter, std=0.1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        return {
            "transformer": transformer.eval(),
            "vae": vae.eval(),
            "scheduler": FlowMatchEulerMaruyamaScheduler(),
            "guidance_transformer": None,
        }

    def get_dummy_inputs(self):
        return {
            "class_labels": 1,
            "generator": self.get_generator(),
            "num_inference_steps": 2,
            "output_type": "pt",
        }


class TestPipeline(ERWPipelineTesterConfig, PipelineTesterMixin):
    pass


class TestPipelineMemory(ERWPipelineTesterConfig, MemoryTesterMixin):
    pass
