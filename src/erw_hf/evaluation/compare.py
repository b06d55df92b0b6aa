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
"""Two evaluation records side by side: what is different in the protocol first, then every number with its error.

python -m erw_hf.evaluation.compare A/evaluation.json B/evaluation.json
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erw_hf.names import resolve_flags


PARTS = ("settings", "data", "reference", "extractor", "model", "versions", "hardware")
SAME = 1e-6  # relative difference of a number that was made again
ERRORS = 2.0  # how many standard errors of the difference count as one


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends with a message for what is not a record."""
    parser = argparse.ArgumentParser(prog="python -m erw_hf.evaluation.compare", description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs=2, metavar="RECORD", help="evaluation.json")
    args, records = parser.parse_args(arguments), []
    resolve_flags(parser, args, ["records"])
    for path in args.records:
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            record["metrics"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.exit(1, f"error: {path} is not an evaluation.json: {error!r}\n")
        records.append(record)
    print(compare_records(*records)[1])


def differs(value: float, error: float, other: float, other_error: float) -> bool:
    """Whether two numbers are two standard errors of their difference apart, 1 in 20 by chance. The errors of models
    that were drawn with one seed are not independent; as a rule their difference is surer than that."""
    return abs(value - other) > ERRORS * math.hypot(error, other_error)


def protocol_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """A line for each difference of two records: settings, data, reference and extractor first, then weights, versions and
    hardware."""
    lines = []
    for part in PARTS:
        old, new = first.get(part) or {}, second.get(part) or {}
        lines += [
            f"{part}.{key}: {old.get(key)} | {new.get(key)}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
    return lines


def compare_records(first: Mapping[str, Any], second: Mapping[str, Any], tolerance: float = SAME) -> tuple[bool, str]:
    """Compares two evaluations, of two models or of one that is evaluated again: whether all metrics of the first are
    the same in the second, up to a relative `tolerance`, and the text. Of unequal numbers of samples the numbers
    less their bias are compared, where both records have it."""
    lines, same = protocol_differences(first, second), True
    counts = [(record.get("settings") or {}).get("num_samples") for record in (first, second)]
    head = f"{'metric':22}{'first':>16}{'error':>10}{'second':>16}{'error':>10}{'difference':>12}"
    lines += ["", head] if lines else [head]
    for name, value in first["metrics"].items():
        other = second["metrics"].get(name)
        error, other_error = (record.get("errors", {}).get(name) for record in (first, second))
        shown = [f"{number:10.2g}" if number is not None else f"{'-':>10}" for number in (error, other_error)]
        if other is None:
            lines.append(f"{name:22}{value:16.10g}{shown[0]}{'missing':>16}")
            same = False
            continue
        difference = abs(other - value) / max(abs(value), 1e-12)
        same &= difference <= tolerance
        verdict = ""
        if difference <= tolerance:
            verdict = "the same"
        elif error is not None and other_error is not None:
            biases = [record.get("bias", {}).get(name) for record in (first, second)]
            corrected = counts[0] != counts[1] and None not in biases
            pair = (value - biases[0], other - biases[1]) if corrected else (value, other)
            verdict = "differ" if differs(pair[0], error, pair[1], other_error) else "not told apart"
            verdict += " less their bias" if corrected else ""
        lines.append(
            f"{name:22}{value:16.10g}{shown[0]}{other:16.10g}{shown[1]}{difference:12.1e}  {verdict}".rstrip()
        )
    lines += [f"{name:22}{'missing':>16}" for name in second["metrics"] if name not in first["metrics"]]
    seeds = [(record.get("settings") or {}).get("seed") for record in (first, second) if record.get("model")]
    if len(seeds) == 2 and seeds[0] == seeds[1] and not same:
        lines.append(
            "Both were drawn from the same noise and labels, but the errors count as independent: what is not told apart "
            "may still differ."
        )
    return bool(same), "\n".join(lines)


if __name__ == "__main__":
    main()
