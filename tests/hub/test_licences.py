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
"""What a card calls a licence is an identifier of the Hub, before the first step."""

import pytest

from erw_hf.hub.licences import check_licence, licence_text
from erw_hf.trainer.config import TrainingConfig


@pytest.mark.parametrize("name", ["apache-2.0", "cc-by-nc-4.0", "openrail++", "other", "unknown"])
def test_identifiers_of_the_hub_are_taken(name):
    assert TrainingConfig(in_channels=1, hub_license=name).hub_license == name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Apache 2.0", "apache-2.0"),
        ("Apache-2.0", "apache-2.0"),
        (" mit", "mit"),
        ("MIT License", ""),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("GPLv3", "gpl-3.0"),
        ("", ""),
        ("my own", ""),
    ],
)
def test_others_are_refused_with_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"is not a licence identifier of the Hub.*{meant}.*repositories-licenses"):
        TrainingConfig(in_channels=1, hub_license=name)


def test_a_licence_of_ones_own_is_said_to_be_other():
    with pytest.raises(ValueError, match='"other" is for a licence that you name in the repo'):
        check_licence("acme-1.0")


@pytest.mark.parametrize(
    ("values", "wanted", "unwanted"),
    [
        ({}, ["Weights: apache-2.0.", "Data: CC BY 4.0"], ["grew"]),
        ({"dataset_name": "user/photos"}, ["[card](https://huggingface.co/datasets/user/photos)"], ["CC BY"]),
        ({"dataset_name": "/data/photos"}, ["`photos` is under the terms of whoever made it"], ["/data"]),
        ({"init_from": "/runs/base", "warmup_from": "user/w"}, ["grew from those of `base` and `user/w`"], ["/runs"]),
        ({"init_from": "owner/repo/last.pt"}, ["grew from those of `owner/repo`"], ["last.pt"]),
        ({"init_from": "outputs/quickstart/pipeline"}, ["grew from those of `quickstart`"], ["`pipeline`"]),
        ({"start_from_encoder": 2, "encoder": "/my/dino,user/b"}, ["grew from those of `dino`"], ["/my", "user/b"]),
    ],
)
def test_a_card_names_the_licences_of_weights_encoder_and_data(values, wanted, unwanted):
    text = licence_text(vars(TrainingConfig(in_channels=1)) | values)
    assert all(part in text for part in wanted) and not any(part in text for part in unwanted)
    assert licence_text(vars(TrainingConfig(in_channels=1)) | values, trained=False).startswith("Recipe and code: ")
