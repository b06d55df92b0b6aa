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
"""Licences: the identifiers that the Hub takes, and what a card says of weights and data."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erw_hf.hub.public import is_hub_id, public_name
from erw_hf.names import names_hub_file
from erw_hf.trainer.run_record import split_names


# https://huggingface.co/docs/hub/repositories-licenses; huggingface_hub has no list of them.
LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()
DATA_LICENCES = {
    "digits": "CC BY 4.0: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, 1998.",
    "ILSVRC/imagenet-1k": "ImageNet's terms of access: its images are for non-commercial research and education.",
}


def check_licence(name: str) -> None:
    """Raises ValueError if `name` is not a licence identifier of the Hub, with the nearest ones."""
    if name not in LICENCES:
        likely = name.strip().lower().replace(" ", "-")
        nearest = difflib.get_close_matches(likely, LICENCES, n=3)
        meant = f" did you mean {' or '.join(nearest)}?" if nearest else ""
        raise ValueError(
            f"{name!r} is not a licence identifier of the Hub:{meant} All are at "
            'https://huggingface.co/docs/hub/repositories-licenses; "other" is for a licence that you name in the repo'
        )


def _origin(name: str) -> str:
    """The repo of a file on the Hub; of a run's folder `pipeline` or `warmup` the run."""
    if names_hub_file(name) and not os.path.exists(name):
        return "/".join(name.split("/")[:2])
    path = Path(name)
    return path.parent.name if path.name in ("pipeline", "warmup") and not is_hub_id(name) else public_name(name)


def licence_text(config: Mapping[str, Any], trained: bool = True) -> str:
    """The licences on the card of a run, or of a recipe: weights, what they grew from, data."""
    text = f"Weights: {config['hub_license']}." if trained else "Recipe and code: apache-2.0."
    origins = [split_names(config["encoder"])[0]] if config["start_from_encoder"] else []
    origins += [config[key] for key in ("init_from", "warmup_from") if config.get(key)]
    if origins:
        names = " and ".join(f"`{_origin(origin)}`" for origin in origins)
        text += f" They grew from those of {names}, whose licence may bind them too."
    data = str(config["dataset_name"])
    if data in DATA_LICENCES:
        return f"{text} Data: {DATA_LICENCES[data]}"
    where = f"its [card](https://huggingface.co/datasets/{data})" if is_hub_id(data) else "whoever made it"
    return (
        f"{text} Data: `{public_name(data)}` is under the terms of {where}; they may also bind what is made from it."
    )
