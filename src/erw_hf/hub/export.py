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
"""Saving a pipeline so that it loads with and without this package: another name for its `save_pretrained`.

`hub.push` adds the rest of a run's repo.
"""

import os

from erw_hf.pipeline_erw import ERWPipeline


def export_to_hub(pipe: ERWPipeline, folder: str | os.PathLike[str]) -> None:
    """
    Writes a folder that can be uploaded as it is and loads in three ways:

    * `ERWPipeline.from_pretrained(repo)`, without any trust flag;
    * `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`, where erw_hf is not
      installed;
    * `ERWTransformer2DModel.from_pretrained(repo, subfolder="transformer")`.

    Args:
        pipe ([`ERWPipeline`]): The pipeline.
        folder (`str` or `os.PathLike`): Folder to write.
    """
    pipe.save_pretrained(folder)
