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
"""The page and the plots of convergence.py, made from the raw results."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread


FIRST_CHOOSING_SEED = 100  # reported are 0, 1, ...
COURSE = (0.25, 0.5, 0.75, 1.0)  # of the budget
Record = dict


def is_choosing(seed: int) -> bool:
    """Whether runs of a seed serve to choose among settings, and are never reported."""
    return seed >= FIRST_CHOOSING_SEED


def records_path(results: Path, data: str) -> Path:
    return results / f"convergence-{data}.jsonl"


def load_records(path: Path) -> list[Record]:
    """One record per line, in the order of arms and seeds, whatever the order the runs ended in."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(map(json.loads, lines), key=lambda record: (record["arm"], record["seed"]))


def final(record: Record) -> float:
    return record["points"][-1]["fid"]


def choose(records: Sequence[Record], names: Sequence[str]) -> str:
    """The arm with the lowest mean final distance over the choosing seeds, which all must have run alike."""
    chosen_by = {
        name: {r["seed"]: final(r) for r in records if r["arm"] == name and is_choosing(r["seed"])} for name in names
    }
    seeds = set().union(*chosen_by.values())
    lacking = [name for name in names if set(chosen_by[name]) != seeds]
    if lacking or not seeds:
        raise ValueError(
            f"to choose among {', '.join(names)}, run with --choosing first: {', '.join(lacking or names)}"
        )
    return min(names, key=lambda name: statistics.mean(chosen_by[name].values()))


def reached(record: Record, target: float, axis: str = "flops") -> tuple[float, bool] | None:
    """
    From where on a run is as good as `target` for good, interpolated in the logarithm of the distance between two
    evaluations. For good, since noise is nearer to the data than the blur that an early model draws: curves first fall,
    then rise, then fall.

    Returns the place and whether it is only known that it is not later (every evaluation is as good), or `None` if the
    last evaluation is worse.
    """
    points = record["points"]
    worse = [i for i, point in enumerate(points) if point["fid"] > target]
    if not worse:
        return points[0][axis], True
    if worse[-1] == len(points) - 1:
        return None
    before, point = points[worse[-1] : worse[-1] + 2]
    share = math.log(before["fid"] / target) / math.log(before["fid"] / point["fid"])
    return before[axis] + share * (point[axis] - before[axis]), False


def speed_up(record: Record, control: Record, axis: str = "flops") -> tuple[float, str] | None:
    """
    How many times sooner a run is as good as its control ends: the control's own time there over the run's, since a
    control that came to rest long before its end must not count as slow. With "at least " or "at most " where the first
    evaluation was that good already; `None` for never.
    """
    target = final(control)
    ours, theirs = reached(record, target, axis), reached(control, target, axis)
    if ours is None:
        return None
    bound = "" if ours[1] == theirs[1] else "at least " if ours[1] else "at most "
    return theirs[0] / ours[0], bound


def is_ahead(record: Record, control: Record) -> bool:
    """Whether a run ends lower than its control, and is as good as that ends for fewer FLOPs; where both were that good at their
    first measurement, whether it was lower there too."""
    sooner = speed_up(record, control)
    if sooner is None or final(record) >= final(control):
        return False
    if all(reached(run, final(control), "flops")[1] for run in (record, control)):  # type: ignore[index]
        return record["points"][0]["fid"] < control["points"][0]["fid"]
    return sooner[0] > 1


def distance_at(record: Record, flops: float) -> float:
    """Between two evaluations interpolated in the logarithm of the distance; NaN before the first, after the last its own."""
    points = record["points"]
    passed = sum(point["flops"] <= flops for point in points)
    if passed == 0:
        return math.nan
    if passed == len(points):
        return final(record)
    before, point = points[passed - 1 : passed + 1]
    share = (flops - before["flops"]) / (point["flops"] - before["flops"])
    return before["fid"] ** (1 - share) * point["fid"] ** share


def pairs(records: Sequence[Record], arm: str, control: str) -> list[tuple[Record, Record]]:
    """Runs of two arms with the same reported seed."""
    by_seed = [
        {r["seed"]: r for r in records if r["arm"] == name and not is_choosing(r["seed"])} for name in (arm, control)
    ]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]


def show_speed_ups(found: Sequence[tuple[float, str] | None]) -> str:
    """Geometric mean and range over seeds, and on how many seeds there is one."""
    values = [value for value in found if value is not None]
    if not values:
        return "never"
    ratios, bounds = [ratio for ratio, _ in values], {bound for _, bound in values if bound}
    text = (
        f"{bounds.pop() if len(bounds) == 1 else 'about ' if bounds else ''}{statistics.geometric_mean(ratios):.2f}×"
    )
    if len(ratios) > 1:
        text += f" ({min(ratios):.2f}–{max(ratios):.2f})"
    if len(values) < len(found):
        text += f" on {len(values)} of {len(found)} seeds"
    return text


def spread(values: Sequence[float], digits: int = 2) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else "")


def answer(records: Sequence[Record], arm: str, control: str) -> tuple[str, str]:
    """A word and the numbers behind it."""
    runs = pairs(records, arm, control)
    if not runs:
        return "not run", ""
    # Whole evaluations leave up to 2 % of a budget over, so who ends a little lower must be as good as the other ends sooner too.
    wins = sum(is_ahead(a, b) for a, b in runs)
    losses = sum(is_ahead(b, a) for a, b in runs)
    if len(runs) == 1:
        word = "one seed only"
    else:
        word = "yes" if wins == len(runs) else "no" if losses == len(runs) else "undecided"
    ours, theirs = ([final(pair[i]) for pair in runs] for i in (0, 1))
    overlap = min(theirs) <= max(ours) and min(ours) <= max(theirs)
    text = f"{arm} ends at {spread(ours)}, {control} at {spread(theirs)}; ahead on {wins} of {len(runs)} seeds"
    if len(runs) > 1:
        text += ", ranges overlap" if overlap else ", ranges apart"
    first, back = (show_speed_ups([speed_up(*pair) for pair in side]) for side in (runs, [(b, a) for a, b in runs]))
    return word, f"{text}. Speed-up over {control}: {first}; the other way round: {back}."


def write_report(results: Path, data: str, table: dict, encoder: dict | None) -> None:
    """`convergence-<data>.md` and its plots, made from `convergence-<data>.jsonl`."""
    records = load_records(records_path(results, data))
    reported = [r for r in records if not is_choosing(r["seed"])]
    page = results / f"convergence-{data}.md"
    if not records:
        return
    arms = [name for name in table["arms"] if any(r["arm"] == name for r in reported)]
    lines = [f"# Does the warmup pay? {data.capitalize()}", "", *introduction(records, table, encoder, data)]
    if reported:
        lines += ["## Answers", "", *answers(reported, table["questions"])]
        lines += ["## At a glance", "", *glance(reported, table["glance"])]
        scale = table.get("scale")
        if scale is not None and any("teacher" in r for r in reported) and scale["control"] in arms:
            lines += ["## What a teacher must know", "", *scale_text(reported, scale, data)]
            plot_scale(reported, scale, results / f"convergence-{data}-scale.png")
        levers = [name for name in table.get("levers", ()) if name in arms]
        if len(levers) > 1 and levers[0] == table["levers"][0]:
            lines += ["## What each lever is worth", "", *levers_text(reported, levers, table["arms"], data)]
            plot_levers(reported, levers, results / f"convergence-{data}-levers.png")
        for name, wanted in table["figures"].items():
            shown = [arm for arm in wanted if arm in arms]
            if len(shown) > 1:
                picture = f"convergence-{data}-{name}.png"
                plot_curves(reported, shown, results / picture)
                lines += [f"![Distance against steps, FLOPs and seconds: {', '.join(shown)}]({picture})", ""]
        drawn = [name for name in table["drawn"] if picture_path(results, data, name).exists()]
        if drawn:
            plot_pictures(results, data, drawn, results / f"convergence-{data}-pictures.png")
            lines += ["## What they draw", "", *pictures_text(data, drawn)]
        lines += ["## All arms", "", *arms_table(reported, arms, table["arms"])]
        shown = [arm for arm in next(iter(table["figures"].values())) if arm in arms]
        if shown:
            plot_probes_of_arms(reported, shown, results / f"convergence-{data}-probes.png")
            lines += ["## What the blocks know", "", *probes_text(reported, arms, data)]
    lines += choosing(records, table["arms"])
    page.write_text("\n".join(lines).rstrip() + "\n")


def introduction(records: Sequence[Record], table: dict, encoder: dict | None, data: str) -> list[str]:
    budgets = sorted({r["budget"] for r in records})
    versions = {f"{k} {v}" for r in records for k, v in r["versions"].items() if k != "erw-hf"}
    base = records[0]["base"]
    hardware = {r["hardware"] + (" in bf16" if r.get("mixed_precision") == "bf16" else "") for r in records}
    cost = []
    if encoder is not None:
        cost = [
            f"Training the encoder {encoder['name']} took {encoder['flops']:.2g} FLOPs ({encoder['steps']} steps of "
            f"{encoder['images_per_step']} views), {encoder['flops'] / budgets[0]:.2f} of a run's budget. No arm pays for it: one "
            "encoder serves all runs.",
            "",
        ]
    return [
        f"A run has {' or '.join(f'{b:.3g}' for b in budgets)} FLOPs, with those of the warmup and of the encoder"
        f"{', and only arms with other patches have another number than those that they are compared with' * (len(budgets) > 1)}. Quality is a Fréchet distance (lower is better) in the features of a classifier that is independent of the "
        f"encoder, over {base['evaluation_samples']} images drawn with the EMA weights in {base['num_inference_steps']} SDE steps "
        f"without guidance. So few images bias it upwards, equally for every arm: {table['real_distance']}. The learning rate is "
        "constant, so each point of a curve is the end of a run of that length. Runs with the same seed share initial weights, "
        "images, noise and timesteps (`asleep` and `modulation` repeat the warmup's images).",
        "",
        "Speed-up means FLOPs to the distance at which the other run ends, theirs over ours. A run is ahead if it ends lower and "
        "reaches the other's end with fewer FLOPs. Numbers are means (geometric for "
        "speed-ups) with the range over seeds. Chance alone makes one of two equal arms win on all of three seeds one time in four.",
        "",
        *cost,
        f"{len(records)} runs on {'; '.join(sorted(hardware))}: one thread each and several at a time, so "
        f"seconds are rough; {', '.join(sorted(versions))}. Each line of `convergence-{data}.jsonl` holds the command that repeats "
        "its run.",
        "",
    ]


def answers(records: Sequence[Record], questions: Sequence[Sequence[str]]) -> list[str]:
    found = [(question, *answer(records, arm, control)) for question, arm, control in questions]
    asked = [row for row in found if row[1] != "not run"]
    if not asked:
        return ["No two arms that a question compares have been run.", ""]
    lines = []
    for word in ("yes", "no", "undecided", "one seed only"):
        matching = [question for question, said, _ in asked if said == word]
        if matching:
            lines += [f"**{word.capitalize()}**: {' '.join(matching)}", ""]
    return [
        *lines,
        "| question | answer | numbers |",
        "|---|---|---|",
        *(f"| {q} | {w} | {t} |" for q, w, t in asked),
        "",
    ]


def glance(records: Sequence[Record], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of arms without a warmup, with a clean and with a noised one: what they end at, and over what course."""
    lines = [
        "| | no warmup | clean warmup | noised warmup |",
        "|---|---|---|---|",
    ]
    course = [
        f"| with | without | {' | '.join(f'{share:.0%}' for share in COURSE)} |",
        f"|---|---|{'---|' * len(COURSE)}",
    ]
    for name, control, *warmed in rows:
        cells = []
        for arm in (control, *warmed):
            runs = [r for r in records if r["arm"] == arm]
            cells.append(spread([final(r) for r in runs]) if runs else "")
            matched = pairs(records, arm, control)
            if arm != control and matched:
                cells[-1] += f"; {show_speed_ups([speed_up(a, b) for a, b in matched])}"
                course.append(f"| {arm} | {control} | {' | '.join(course_cells(matched))} |")
        if cells[0] and any(cells[1:]):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        "Distance at the end (mean, range over seeds), and the speed-up over the run of the same row without a warmup: how many "
        "times fewer FLOPs it needs to reach the distance at which that run ends.",
        "",
        *lines,
        "",
        "Distance without the warmup divided by the distance with it, at four points of the budget:",
        "",
        *course,
        "",
    ]


def course_cells(matched: Sequence[tuple[Record, Record]]) -> list[str]:
    """The control's distance over the run's, at the points of `COURSE`."""
    cells = []
    for share in COURSE:
        # A run's last evaluation, up to 2 % before the end of its budget, stands for that end.
        ratios = [distance_at(b, share * b["budget"]) / distance_at(a, share * a["budget"]) for a, b in matched]
        cells.append("" if any(map(math.isnan, ratios)) else show_speed_ups([(r, "") for r in ratios]))
    return cells


def knowledge(record: Record) -> float:
    """A teacher's accuracy on held-out images, by its better token."""
    return max(record["teacher"]["held_out_accuracy"].values())


def scale_text(records: Sequence[Record], scale: dict, data: str) -> list[str]:
    """The teachers, and each arm against the control."""
    control, lines = scale["control"], []
    taught = [r for r in records if "teacher" in r]
    teachers = {r["weights"]["encoder"]: r["teacher"] | {"knows": knowledge(r)} for r in taught}
    for weights, teacher in sorted(teachers.items(), key=lambda item: item[1]["knows"]):
        share = teacher["flops"] / records[0]["budget"]
        lines.append(
            f"| {teacher['name']} | {teacher['knows']:.3f} | {teacher['flops']:.2g} ({share:.1f}) | {weights[:8]} |"
        )
    rows = []
    for family, arms in scale["arms"].items():
        for arm in arms:
            matched = pairs(records, arm, control)
            if matched:
                teacher = ", ".join(dict.fromkeys(a["teacher"]["name"] for a, _ in matched if "teacher" in a))
                found = show_speed_ups([speed_up(a, b) for a, b in matched])
                rows.append(
                    f"| {family} | {arm} | {teacher} | {' | '.join(course_cells(matched))} | {found} | {len(matched)} |"
                )
    return [
        f"![Speed-up over {control} against what the teacher knows](convergence-{data}-scale.png)",
        "",
        f"{scale['knows']} No arm pays for its teacher.",
        "",
        "| teacher | knows | FLOPs (over a run's budget) | weights |",
        "|---|---|---|---|",
        *lines,
        "",
        f"The distance of {control} divided by that of the arm at four points of the budget, and the speed-up to where {control} "
        "ends:",
        "",
        f"| | arm | teacher | {' | '.join(f'{share:.0%}' for share in COURSE)} | speed-up | seeds |",
        f"|---|---|---|{'---|' * len(COURSE)}---|---|",
        *rows,
        "",
    ]


def levers_text(records: Sequence[Record], arms: Sequence[str], definitions: dict, data: str) -> list[str]:
    first, lines = arms[0], []
    for arm in arms:
        runs = [r for r in records if r["arm"] == arm]
        matched = pairs(records, arm, first)
        found = "" if arm == first else show_speed_ups([speed_up(a, b) for a, b in matched])
        lines.append(
            f"| {arm} | {describe(arm, definitions)} | {spread([final(r) for r in runs])} | {found} | {len(runs)} |"
        )
    return [
        f"![Speed-up over {first} by one change after another](convergence-{data}-levers.png)",
        "",
        f"| arm | what it changes in the recipe | distance at the end | speed-up over {first} | seeds |",
        "|---|---|---|---|---|",
        *lines,
        "",
    ]


def error_bar(middle: float, ratios: Sequence[float]) -> tuple[float, float]:
    """How far values lie below and above their mean, which may miss a lone one by a rounding error."""
    return max(0.0, middle - min(ratios)), max(0.0, max(ratios) - middle)


def plot_scale(records: Sequence[Record], scale: dict, path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for family, arms in scale["arms"].items():
        points = []
        for arm in arms:
            matched = [(a, b) for a, b in pairs(records, arm, scale["control"]) if "teacher" in a]
            ratios = [found[0] for pair in matched if (found := speed_up(*pair)) is not None]
            if ratios:  # a run that never gets there has no place on the axis: the table names it
                middle = statistics.geometric_mean(ratios)
                points.append((knowledge(matched[0][0]), middle, *error_bar(middle, ratios)))
        if points:
            x, y, low, high = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=(low, high), marker="o", capsize=3, label=family)
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set(xlabel="what the teacher knows", ylabel=f"speed-up over {scale['control']}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def plot_levers(records: Sequence[Record], arms: Sequence[str], path: Path) -> None:
    figure = Figure(figsize=(8, 0.5 * len(arms) + 1), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        ratios = [found[0] for pair in pairs(records, arm, arms[0]) if (found := speed_up(*pair)) is not None]
        if ratios:
            middle = statistics.geometric_mean(ratios)
            low, high = error_bar(middle, ratios)
            axes.barh(place, middle, xerr=[[low], [high]], color="tab:blue", capsize=3)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xlabel(f"speed-up over {arms[0]}")
    figure.savefig(path, dpi=90)


def picture_path(results: Path, data: str, arm: str) -> Path:
    """The grid that the first seed's run drew at its end."""
    return results / "pictures" / f"{data}-{arm}.png"


def pictures_text(data: str, arms: Sequence[str]) -> list[str]:
    return [
        f"![The same noise and classes, drawn by {', '.join(arms)}](convergence-{data}-pictures.png)",
        "",
        "Seed 0 at the end of training, one column per class, the same noise in every grid, guidance 1.8 in its interval.",
        "",
    ]


def plot_pictures(results: Path, data: str, arms: Sequence[str], path: Path) -> None:
    grids = [imread(picture_path(results, data, arm)) for arm in arms]
    height, width = grids[0].shape[:2]
    rows = math.ceil(len(arms) / 2)
    figure = Figure(figsize=(12, (6 * height / width + 0.3) * rows), layout="constrained")
    for axes, arm, grid in zip(figure.subplots(rows, 2, squeeze=False).flat, arms, grids, strict=False):
        axes.imshow(grid, cmap="gray", vmin=0, vmax=1)
        axes.set_title(arm)
    for axes in figure.axes:
        axes.axis("off")
    figure.savefig(path, dpi=90)


def arms_table(records: Sequence[Record], arms: Sequence[str], definitions: dict) -> list[str]:
    lines = [
        "| arm | what it changes | distance at the end | class found | steps | seconds | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        runs = [r for r in records if r["arm"] == arm]
        ends = [r["points"][-1] for r in runs]
        changes = f"is {runs[0]['chosen']}" if "chosen" in runs[0] else describe(arm, definitions)
        # Where the network of the metric reads other classes than the data's, none is found.
        found = spread([e["accuracy"] for e in ends], 3) if "accuracy" in ends[0] else ""
        lines.append(
            f"| {arm} | {changes} | {spread([e['fid'] for e in ends])} | {found} | "
            f"{ends[0]['step']} | {statistics.mean(e['seconds'] for e in ends):.0f} | {len(runs)} |"
        )
    return [*lines, "", "`steps` counts warmup and full steps, `seconds` training only.", ""]


def describe(name: str, definitions: dict) -> str:
    """What an arm changes: of the base, or where it is a variant of `modern`, of that."""
    settings, prefix = definitions[name], ""
    if name.startswith("modern_"):
        settings = {k: v for k, v in settings.items() if definitions["modern"].get(k) != v}
        prefix = "modern, "
    return prefix + ", ".join(f"{key} {value}" for key, value in settings.items()) or "nothing"


def probes_text(records: Sequence[Record], arms: Sequence[str], data: str) -> list[str]:
    lines = [
        f"![CKNNA and linear probe of every block](convergence-{data}-probes.png)",
        "",
        "Measured at the end of each run on held-out images with the null class: CKNNA with the trained encoder (whatever the arm "
        "was aligned with) and the accuracy of a linear probe, both of the mean token. The `modern` arms also read the encoder's "
        "noised class token, so compare them with one another only. The best block of each arm:",
        "",
        "| arm | CKNNA, clean | CKNNA, t = 0.5 | probe, clean | probe, t = 0.5 |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        runs = [r for r in records if r["arm"] == arm]
        cells = [
            spread([max(probe[measure]) for r in runs for probe in r["probes"] if probe["t"] == t], 3)
            for measure in ("cknna", "accuracy")
            for t in (0.0, 0.5)
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def choosing(records: Sequence[Record], definitions: dict) -> list[str]:
    """What was tried in order to choose, on seeds that nothing else uses."""
    tried = [r for r in records if is_choosing(r["seed"])]
    if not tried:
        return []
    lines = [
        "## How the tuned arms were chosen",
        "",
        f"On seeds {', '.join(map(str, sorted({r['seed'] for r in tried})))}, which appear in no number above.",
        "",
        "| candidate | what it changes | distance at the end |",
        "|---|---|---|",
    ]
    for arm in definitions:
        ends = [final(r) for r in tried if r["arm"] == arm]
        if ends:
            lines.append(f"| {arm} | {describe(arm, definitions)} | {spread(ends)} |")
    for arm, definition in definitions.items():
        if "best_of" in definition:
            try:
                lines.append(f"\n{arm}: {choose(records, definition['best_of'])}, of {len(definition['best_of'])}")
            except ValueError:
                continue  # not all candidates have been run
    return [*lines, ""]


def band(axes, runs: Sequence[Record], x: Callable[[dict], float], y: Callable[[dict], float], label: str) -> None:
    """Mean over seeds, and from the lowest to the highest; the runs of an arm are measured at the same steps."""
    points = list(zip(*(r["points"] for r in runs), strict=False))
    places = [statistics.mean(map(x, point)) for point in points]
    values = [[y(p) for p in point] for point in points]
    line = axes.plot(places, [statistics.mean(v) for v in values], label=label, marker=".")[0]
    axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15)


def plot_curves(records: Sequence[Record], arms: Sequence[str], path: Path) -> None:
    figure = Figure(figsize=(16, 5), layout="constrained")
    scales = (
        ("step", "steps, warmup counted"),
        ("flops", "FLOPs, warmup and encoder counted"),
        ("seconds", "seconds"),
    )
    for axes, (axis, label) in zip(figure.subplots(1, 3, sharey=True), scales, strict=True):
        for arm in arms:
            runs = [r for r in records if r["arm"] == arm]
            band(axes, runs, lambda point, axis=axis: point[axis], lambda point: point["fid"], arm)
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("Fréchet distance")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=90)


def plot_probes_of_arms(records: Sequence[Record], arms: Sequence[str], path: Path) -> None:
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    panels = [(measure, t) for measure in ("cknna", "accuracy") for t in (0.0, 0.5)]
    for axes, (measure, t) in zip(figure.subplots(1, 4), panels, strict=True):
        for arm in arms:
            blocks = [p[measure] for r in records if r["arm"] == arm for p in r["probes"] if p["t"] == t]
            depths, by_block = range(1, len(blocks[0]) + 1), list(zip(*blocks, strict=True))
            line = axes.plot(depths, [statistics.mean(v) for v in by_block], marker=".", label=arm)[0]
            low, high = ([pick(v) for v in by_block] for pick in (min, max))
            axes.fill_between(depths, low, high, color=line.get_color(), alpha=0.15)
        name = {"cknna": "CKNNA", "accuracy": "linear probe"}[measure]
        axes.set(title=f"{name}, t = {t:g}", xlabel="block")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
