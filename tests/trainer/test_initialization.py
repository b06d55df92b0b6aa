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
"""What a run starts from: `--init_from`. `--warmup_from` is tested in test_training.py and test_push.py."""

import pytest
import torch
from helpers import TINY_MODEL, randomize, train
from safetensors.torch import load_file

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
from erw_hf.trainer.initialization import CLASS_TABLE, load_initial


NAMES = {0: "cat", 1: "dog", 2: "emu"}
CONFIG = {**TINY_MODEL, "num_classes": 3}


@pytest.fixture
def trained(tmp_path):
    """The folder of a pipeline, and its weights."""
    transformer = randomize(ERWTransformer2DModel(**CONFIG))
    ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label=NAMES).save_pretrained(
        tmp_path / "run/pipeline"
    )
    return tmp_path / "run", transformer.state_dict()


def test_classes_keep_their_embedding_by_name_and_new_ones_start_from_the_null_class(trained):
    folder, before = trained
    state = load_initial(
        str(folder), {**CONFIG, "num_classes": 4, "sample_size": 16}, {0: "dog", 1: "yak", 2: "cat", 3: "gnu"}
    )
    assert torch.equal(state[CLASS_TABLE], before[CLASS_TABLE][[1, 3, 0, 3, 3]])
    assert set(state) == set(before)
    assert all(torch.equal(state[name], before[name]) for name in before if name != CLASS_TABLE)
    ERWTransformer2DModel(**{**CONFIG, "num_classes": 4, "sample_size": 16}).load_state_dict(state)


@pytest.mark.parametrize(("count", "rows"), [(3, [0, 1, 2, 3]), (2, [3, 3, 3]), (0, [3])])
def test_classes_without_names_are_the_same_only_if_they_are_as_many(trained, count, rows):
    folder, before = trained
    state = load_initial(str(folder / "pipeline"), {**CONFIG, "num_classes": count}, None)
    assert torch.equal(state[CLASS_TABLE], before[CLASS_TABLE][rows])


def test_another_model_and_what_is_no_pipeline_are_refused(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match="num_layers=3, the config has 4"):
        load_initial(str(folder), {**CONFIG, "num_layers": 4}, NAMES)
    with pytest.raises(ValueError, match="is not a pipeline"):
        load_initial(str(tmp_path), CONFIG, NAMES)


def test_a_run_goes_on_from_a_trained_pipeline(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--warmup_steps=0", "--checkpointing_steps=100"]
    train(*flags, "--max_train_steps=3", f"--output_dir={tmp_path}/first")
    # A step that moves nothing shows what it started from.
    train(
        *flags,
        "--max_train_steps=1",
        "--learning_rate=0",
        f"--init_from={tmp_path}/first",
        f"--output_dir={tmp_path}/second",
    )
    first, second = (
        load_file(tmp_path / name / "pipeline/transformer/diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit):
        train(*tiny_flags, f"--init_from={tmp_path}/first", f"--output_dir={tmp_path}/third")
