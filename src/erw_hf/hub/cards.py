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
"""Model and dataset cards of runs, recipes, warmups and latent caches, rendered from their own records.

python -m erw_hf.hub.cards --config training/configs/imagenet256-erw-paper.yaml   # prints a recipe's card
"""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from safetensors import safe_open

from erw_hf.files import write_record
from erw_hf.hub.licences import DATA_LICENCES, check_licence, licence_text
from erw_hf.hub.public import is_hub_id, public_name
from erw_hf.names import names_hub_file
from erw_hf.trainer.config import (
    KEYS,
    AlignmentConfig,
    ObjectiveConfig,
    OptimisationConfig,
    StartConfig,
    parse_config,
)
from erw_hf.trainer.run_record import split_names, training_cost


TEMPLATES = Path(__file__).parent / "model_cards"
LORA, CLASS_EMBEDDINGS = "pytorch_lora_weights.safetensors", "class_embeddings.safetensors"  # of an adapter
ERW = """@article{liu2025erw,
  title = {Efficient Generative Model Training via Embedded Representation Warmup},
  author = {Liu, Deyuan and Sun, Peng and Li, Xufeng and Lin, Tao},
  journal = {arXiv preprint arXiv:2504.10188},
  year = {2025}
}"""
REPA = """@article{yu2024repa,
  title = {Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think},
  author = {Yu, Sihyun and Kwak, Sangkyung and Jang, Huiwon and Jeong, Jongheon and Huang, Jonathan and Shin, Jinwoo and Xie, Saining},
  journal = {arXiv preprint arXiv:2410.06940},
  year = {2024}
}"""
SIT = """@article{ma2024sit,
  title = {SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers},
  author = {Ma, Nanye and Goldstein, Mark and Albergo, Michael S. and Boffi, Nicholas M. and Vanden-Eijnden, Eric and Xie, Saining},
  journal = {arXiv preprint arXiv:2401.08740},
  year = {2024}
}"""
CITATION = f"{ERW}\n\n{REPA}\n\n{SIT}"


def draws(folder: Path) -> bool:
    """Whether a folder holds a pipeline, or an adapter of one."""
    return (folder / "model_index.json").is_file() or (folder / LORA).is_file()


def run_card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a run, from a snapshot of it: `config.yaml` and `metrics.jsonl` and, if there are any, the pipeline,
    pictures, `evaluation.json`, the warmup and a checkpoint. The records are already public (see
    [`~hub.public.public_value`])."""
    config: dict[str, Any] = {name: key.default for name, key in KEYS.items()}  # a run may be older than a key
    config |= yaml.safe_load((folder / "config.yaml").read_text())
    environment = _read_json(folder / "environment.json")
    cost = training_cost(folder / "metrics.jsonl", environment, config["warmup_steps"])
    trained = draws(folder)
    id2label = (_read_json(folder / "model_index.json") or {}).get("id2label") or {}
    adapter = (folder / LORA).is_file()
    new_classes = _new_classes(folder / CLASS_EMBEDDINGS) if adapter else []
    transformer = _read_json(folder / "transformer" / "config.json") or {}
    warmup_note = None
    if config["warmup_from"] is not None:
        before = _read_json(folder / "warmup_from.json")
        warmup_note = (
            f"The run started from the warmup `{public_name(config['warmup_from'])}`, which is **not** in the table: "
        )
        warmup_note += (
            f"{before['steps']} steps, {before['images_seen']} images, {before['flops']:.3e} FLOPs."
            if before is not None
            else "its cost is not known."
        )
    weights = (folder / LORA, folder / CLASS_EMBEDDINGS) if adapter else (folder / "transformer").glob("*.safetensors")
    parameters = sum(_count_parameters(path) for path in weights if path.is_file())
    return _model_card(
        config,
        repo_id,
        num_classes=transformer.get("num_classes", config["num_classes"]),
        parameters=parameters or None,
        trained=trained,
        unfinished=cost["steps"] < config["max_train_steps"],
        grid="grid.png" if (folder / "grid.png").is_file() else None,
        example_label=_example_label([*new_classes, *id2label.values()]),
        new_classes=new_classes,
        adapter=adapter,
        class_names=bool(id2label),
        checkpoint=(folder / "last-checkpoint").is_dir(),
        warmup=(folder / "warmup").is_dir(),
        warmup_note=warmup_note,
        config_file=f"{repo_id.split('/')[-1]}/config.yaml",
        cost=cost,
        quality_curve=(folder / "quality_curve.png").is_file(),
        probes=(folder / "probes.png").is_file(),
        record=_read_json(folder / "evaluation.json"),
    )


def _new_classes(path: Path) -> list[str]:
    """Names of the classes that come with an adapter."""
    if not path.is_file():
        return []
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("names", "[]"))


def preset_card(path: Path) -> ModelCard:
    """
    The card of a recipe (a YAML file of `training/configs`) that has not been run: what it is and what its comment
    expects.
    """
    import torch

    from erw_hf.data.source import is_local, load_source
    from erw_hf.transformer_erw import ERWTransformer2DModel

    resolved = parse_config(["--config", str(path)])
    num_classes = resolved.num_classes
    if num_classes is None and is_local(resolved.dataset_name):
        num_classes = load_source(**resolved.source_arguments()).num_classes
    parameters = None  # a class token's layers are as wide as an encoder, whose width is unknown here
    if resolved.class_token_weight == 0:
        with torch.device("meta"):
            model = ERWTransformer2DModel(**resolved.model_config(num_classes or 0))
        parameters = sum(parameter.numel() for parameter in model.parameters())
    comment = re.match(r"(#.*\n)+", path.read_text())
    lines = [line.removeprefix("#").strip() for line in comment[0].splitlines()] if comment else []
    commands = ("accelerate launch", "python ", "make ")
    return _model_card(
        vars(resolved),
        f"erw-hf/{path.stem}",
        num_classes=num_classes,
        parameters=parameters,
        expectation=[line for line in lines if line and not line.startswith(commands)],
        config_file=f"training/configs/{path.name}",
    )


def _example_label(names: list[str]) -> str:
    """Python source of the class that the example draws: the first, by its shortest name that means it alone, or 0."""
    if not names:
        return "0"
    synonyms = [part.strip() for name in names for part in name.split(",")]
    short = names[0].split(",")[0].strip()
    return json.dumps(short if synonyms.count(short) == 1 else names[0], ensure_ascii=False)


def _model_card(
    config: Mapping[str, Any],
    repo_id: str,
    num_classes: int | None,
    parameters: int | None,
    trained: bool = False,
    cost: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    new_classes: Sequence[str] = (),
    adapter: bool = False,
    **context: Any,
) -> ModelCard:
    name = repo_id.split("/")[-1]
    data, encoder = str(config["dataset_name"]), config["encoder"]
    aligned = encoder is not None and (config["warmup_steps"] > 0 or config["alignment_weight"] > 0)
    draws_class_token = config["class_token_weight"] > 0
    start = config["start_from_encoder"]
    is_erw = config["warmup_steps"] > 0 or config["warmup_from"] is not None
    method = "ERW" if is_erw else "REPA" if aligned else "SiT"
    size = f"{config['sample_size']}x{config['sample_size']}"
    space = f"latents of `{public_name(config['vae'])}`, {size}" if config["vae"] else f"pixels, {size}"
    subject = f"the {num_classes or ''} classes of its data".replace("  ", " ")
    if num_classes == 0:
        subject = "images like those of its data, without classes,"
    kind = "class-conditional" if num_classes != 0 else "unconditional"
    count = ""
    if parameters:
        count = f"{f'{parameters / 1e6:.1f} M' if parameters >= 1e5 else parameters} parameters; "
    verb = "trained" if trained else "to be trained"
    descriptions = {
        "ERW": "with Embedded Representation Warmup ([ERW](https://arxiv.org/abs/2504.10188)): its early blocks are first "
        "warmed up against a pretrained vision encoder",
        "REPA": "with representation alignment ([REPA](https://arxiv.org/abs/2410.06940)), without a warmup",
        "SiT": "by velocity matching ([SiT](https://arxiv.org/abs/2401.08740)), without "
        + ("alignment" if draws_class_token or start else "an encoder"),
    }
    summary = (
        f"A {kind} flow-matching transformer ({count}{space}), {verb} on `{public_name(data)}` {descriptions[method]}."
    )
    base, lora_rank = str(config.get("init_from") or ""), config.get("lora_rank") or 0
    base_id = "/".join(base.split("/")[:2])  # of a folder or a file in a repo too
    base_model = base_id if is_hub_id(base) or names_hub_file(base) else None
    if lora_rank:
        summary = (
            f"A LoRA adapter of rank {lora_rank} ({count.replace('parameters; ', 'parameters, ')}layers "
            f"{config['lora_targets']}) of `{base if base_model else public_name(base)}`, {verb} on `{public_name(data)}`."
        )
        if new_classes:
            summary += f" Classes that it adds: {', '.join(new_classes)}."
    if start:
        summary += f" Its first {start} blocks started as those of `{public_name(split_names(encoder)[0])}`."
    if draws_class_token:
        summary += (
            " It draws the encoder's class token together with the image ([REG](https://arxiv.org/abs/2507.01467))."
        )
    check_licence(config["hub_license"])  # a run may be older than the check of its configuration
    card_data = ModelCardData(
        license=config["hub_license"],
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[
            "erw-hf",
            *(["lora", "adapter"] if lora_rank else [method.lower()]),
            "flow-matching",
            *(["class-conditional"] if num_classes != 0 else []),
        ],
        datasets=[data] if is_hub_id(data) else None,
        base_model=base_model,
        base_model_relation="adapter" if lora_rank and base_model else None,
        model_name=name,
        eval_results=_eval_results(record) if record else None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model.md.jinja"),
        title=f"{name}: {'a LoRA adapter' if lora_rank else method} on {public_name(data)}",
        adapter=adapter,
        base=base if base_model else public_name(base),
        summary=summary,
        repo_id=repo_id,
        run_name=name,
        config=config,
        num_classes=num_classes,
        trained=trained,
        cost=cost,
        evaluation=_evaluation_table(record) if record else None,
        recipe=_recipe(config, method),
        settings=_settings(config, num_classes, aligned),
        subject=subject,
        alignment=aligned,
        encoder=f"`{public_name(encoder)}`",
        licence=licence_text(config, trained=cost is not None),
        citation=CITATION,
        **context,
    )


def _recipe(config: Mapping[str, Any], method: str) -> str:
    full = config["max_train_steps"] - config["warmup_steps"]
    schedules = {
        "constant": "constant",
        "half_life": f"halving every {config['alignment_half_life']} steps",
        "stop": f"stopped at step {config['alignment_stop_step']} of this phase",
    }
    matching = "velocity matching"
    if config["class_token_weight"] > 0:
        matching += f", {config['class_token_weight']} times that of the encoder's class token,"
    if config["contrastive_weight"] > 0:
        matching += (
            f" minus {config['contrastive_weight']} times the distance to another sample's velocity "
            "([contrastive flow matching](https://arxiv.org/abs/2506.05350))"
        )
    aligned = (
        f"{matching} plus λ times the alignment of block {config['projector_depth']}, λ = "
        f"{config['alignment_weight']}, {schedules.get(config['alignment_schedule'], config['alignment_schedule'])}"
    )
    start = f"From the weights of `{public_name(config['init_from'])}`: " if config["init_from"] is not None else ""
    if method == "SiT":
        return f"{start}{full} steps of {matching.rstrip(',')}."
    if method == "REPA":
        return f"{start}{full} steps of {aligned}."
    if config["warmup_from"] is not None:
        return f"From the warmup `{public_name(config['warmup_from'])}`: {full} steps of {aligned}."
    return (
        f"1. Warmup, {config['warmup_steps']} steps: the embedders and the first {config['warmup_depth']} blocks only, "
        f"aligned with `{public_name(config['encoder'])}` on {'noised' if config['warmup_noised'] else 'clean'} inputs.\n"
        f"2. Hand-over of those weights to the full model, each tensor checked; a fresh optimizer, and the EMA starts.\n"
        f"3. Full training, {full} steps: {aligned}."
    )


def _settings(config: Mapping[str, Any], num_classes: int | None, aligned: bool) -> list[tuple[str, object]]:
    """The keys that a card always shows, and those that decide the losses and differ from their default."""
    has_encoder = aligned or config["start_from_encoder"] > 0 or config["class_token_weight"] > 0
    unused = set() if aligned else {key.name for key in fields(AlignmentConfig)}
    groups = (AlignmentConfig, StartConfig, ObjectiveConfig, OptimisationConfig)
    decisive = {key.name for group in groups for key in fields(group)}
    rows: list[tuple[str, object]] = []
    for name, key in KEYS.items():
        value, metadata = config[name], key.metadata
        if name == "num_classes":
            value = "from the data" if num_classes is None else num_classes or None
        elif name == "encoder" and has_encoder:
            pass
        elif name in unused:
            value = None
        if metadata["card"] or ((metadata["fixed"] or name in decisive) and value not in (key.default, None)):
            shown = str(value).lower() if value is None or isinstance(value, bool) else value
            rows.append((f"`{name}`", f"`{public_name(value)}`" if metadata["path"] and value is not None else shown))
    return rows


def write_warmup_record(
    folder: Path,
    config: Mapping[str, Any],
    progress: Mapping[str, Any],
    model_config: Mapping[str, Any],
    taught: bool = False,
) -> None:
    """Completes the `warmup` folder of a run for others to use: `warmup.json`, its cost, and its card. `progress` is
    at the end of the warmup; `taught`: it taught a new patch embedding before the encoder's blocks, by its tokens
    after these, without a projector."""
    target = f"tokens after block {config['warmup_depth']}" if taught else "patch tokens"
    record = {
        "steps": progress["step"],
        "images_seen": progress["images_seen"],
        "flops": progress["flops"],
        "depth": config["warmup_depth"],
        "encoder": public_name(config["encoder"]),
        "target": target,
        "start_from_encoder": config["start_from_encoder"],
        "dataset": public_name(config["dataset_name"]),
    }
    write_record(folder / "warmup.json", record)
    data = str(config["dataset_name"])
    card_data = ModelCardData(
        license=config["hub_license"],
        library_name="diffusers",
        tags=["erw-hf", "erw", "warmup"],
        datasets=[data] if is_hub_id(data) else None,
        base_model=start if (start := config["init_from"]) and is_hub_id(start) else None,
    )
    settings = [
        ("blocks", config["warmup_depth"]),
        ("encoder", f"`{record['encoder']}`, {target}"),
        ("blocks that started as the encoder's", record["start_from_encoder"] or "none"),
        ("data", f"`{record['dataset']}`"),
        ("autoencoder", f"`{public_name(config['vae'])}`" if config["vae"] else "none: pixels"),
        ("inputs", "noised, t drawn" if config["warmup_noised"] else "clean, t = 0"),
        ("loss", config["alignment_loss"]),
        ("projector", "none" if taught else config["projector"]),
        *((name, value) for name, value in model_config.items() if name not in ("num_layers", "class_dropout_prob")),
    ]
    cost = [
        ("steps", record["steps"]),
        ("images seen", record["images_seen"]),
        ("FLOPs, the encoder's counted", f"{record['flops']:.3e}"),
    ]
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "warmup.md.jinja"),
        title=f"ERW warmup: {record['depth']} blocks on {record['dataset']}",
        depth=record["depth"],
        encoder=record["encoder"],
        target=target,
        taught=taught,
        settings=settings,
        cost=cost,
        licence=licence_text(config),
        citation=CITATION,
    )
    card.save(folder / "README.md")


def dataset_card(folder: Path, repo_id: str) -> DatasetCard:
    """The card of a latent cache in `folder`; its metadata tell `datasets` the columns and the number of rows."""
    import pyarrow.parquet as parquet
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict

    made = json.loads((folder / "cache.json").read_text())
    statistics = json.loads((folder / "latent_statistics.json").read_text())
    files = sorted((folder / "data").glob("train-*.parquet"))
    features = Features.from_arrow_schema(parquet.read_schema(files[0]))
    rows = sum(parquet.read_metadata(file).num_rows for file in files)
    num_bytes = sum(file.stat().st_size for file in files)
    splits = SplitDict()
    splits["train"] = SplitInfo(name="train", num_bytes=num_bytes, num_examples=rows)
    source = str(made["dataset_name"])
    card_data = DatasetCardData(
        pretty_name=f"Latents of {public_name(source)}",
        source_datasets=[source] if is_hub_id(source) else None,
        task_categories=["unconditional-image-generation"],
        tags=["erw-hf", "latents"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    info = DatasetInfo(features=features, splits=splits, dataset_size=num_bytes, download_size=num_bytes)
    DatasetInfosDict({"default": info}).to_dataset_card_data(card_data)
    return DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "dataset.md.jinja"),
        title=f"Latents of {public_name(source)}",
        repo_id=repo_id,
        rows=f"{rows:,}".replace(",", " "),
        source=public_name(source),
        split=made["dataset_split"],
        vae=public_name(made["vae"]),
        flipped=made["flipped"],
        encoder=public_name(made["encoder"]) if made.get("encoder") else None,
        channels=len(statistics["latents_mean"]),
        sample_size=made["sample_size"],
        jpeg_quality=made["jpeg_quality"],
        labelled="label" in features,
        licence=DATA_LICENCES.get(source),
    )


def evaluation_files(folder: Path) -> dict[str, str]:
    """
    The evaluation record in the Hub's own format, `.eval_results/erw.yaml`, if the reference is a dataset on the Hub;
    otherwise empty.
    """
    record = _read_json(folder / "evaluation.json")
    if record is None or not is_hub_id(record["reference"]["name"]):
        return {}
    data = record["reference"]["name"]
    notes = "; ".join(f"{name}: {value}" for name, value in _evaluation_table(record)["rest"])
    entries = [
        EvalResultEntry(dataset_id=data, task_id=name, value=value, date=record.get("date"), notes=notes or None)
        for name, value in record["metrics"].items()
    ]
    return {".eval_results/erw.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)}


def _evaluation_table(record: Mapping[str, Any]) -> dict[str, list[tuple[str, object]]]:
    errors = record.get("errors", {})
    metrics = [
        (
            name,
            (f"{value:.4g}" if isinstance(value, float) else str(value))
            + (f" ± {errors[name]:.2g}" if name in errors else ""),
        )
        for name, value in record["metrics"].items()
    ]
    rest = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
        if name not in ("metrics", "errors"):
            rest.append((name, value))
    return {"metrics": metrics, "rest": rest}


def _eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    data = record["reference"]["name"]  # what the images were compared with, not necessarily the training data
    settings = {name: value for name, value in record.items() if not isinstance(value, Mapping)}
    settings |= {name: value for name, value in record.get("settings", {}).items() if value is not None}
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Class-conditional image generation",
            dataset_type=data if is_hub_id(data) else re.sub(r"[^\w.-]", "-", public_name(data)),
            dataset_name=public_name(data),
            metric_type=name,
            metric_name=name,
            metric_value=value,
            metric_args=settings or None,
        )
        for name, value in record["metrics"].items()
    ]


def _count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header."""
    with safe_open(path, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main() -> None:
    """`python -m erw_hf.hub.cards`."""
    parser = argparse.ArgumentParser(prog="python -m erw_hf.hub.cards", description="Print the card of a recipe.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of training/configs")
    print(preset_card(parser.parse_args().config))


if __name__ == "__main__":
    main()
