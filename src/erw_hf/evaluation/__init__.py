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
"""Measures of pictures and of representations.

On the way to an FID each file has one part: `images` reads or draws the pictures, `extractors` are the networks,
`feature_statistics` runs them and sums up mean and covariance, `metrics` holds the formula, and `quality` says which features a
metric takes, reads and writes the reference's statistics, and does the whole. `record` keeps what came out. `probes`
looks into the blocks of a transformer, with the CKNNA of `metrics`.
"""

from erw_hf.evaluation.metrics import cknna, frechet_distance


__all__ = ["cknna", "frechet_distance"]
