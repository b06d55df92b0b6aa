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
"""Metrics of images and of representations.

For an FID, `images` reads or draws the images, `extractors` holds the networks, `feature_statistics` runs them and sums up mean
and covariance, `metrics` has the formula and its error, and `quality` puts it all together: which features a metric takes, and
the reference files. `published` has the numbers of others, `compare` sets two records side by side. `probes` measures the blocks of a transformer, with the CKNNA of `metrics`.
"""

from erw_hf.evaluation.metrics import cknna, frechet_distance


__all__ = ["cknna", "frechet_distance"]
