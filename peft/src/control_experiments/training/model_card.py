"""The card (README.md) of an adapter that a script trained: what it is, what it reached, and how to load it."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..record import RunRecord, public_command
from .options import METHODS

#: What the card says of an adapter's configuration, where peft's has it, and how.
_SHOWN = {
    "control_blocks": "control parallel to", "control_rank": "control rank", "control_alpha": "control alpha",
    "target_modules": "adapted weights", "r": "rank on weights", "lora_alpha": "alpha on weights", "use_dora": "DoRA",
}  # fmt: skip


def write_card(folder: Path, record: RunRecord, load: str) -> None:
    """Write README.md into an adapter's folder from the run's record; the metadata that peft wrote there stay. `load` are
    Python lines that load the adapter from its folder."""
    path = folder / "README.md"
    data = ModelCard.load(path).data if path.exists() else ModelCardData()
    data["library_name"] = "peft"
    data["base_model"] = record.model["id"]
    # peft's `base_model:` tag names a folder by its whole path
    tags = {tag for tag in data.get("tags") or [] if not tag.startswith("base_model:")}
    data["tags"] = sorted({*tags, "parallel-control"})
    said = {"record": record, "kind": METHODS[record.method], "rows": _rows(record)}
    command, template = shlex.join(public_command(record.command)), Path(__file__).with_suffix(".md.jinja")
    ModelCard.from_template(data, str(template), **said, load=load.strip(), command=command).save(path)


def _rows(record: RunRecord) -> dict[str, object]:
    """What the record says, for people."""
    counts, config = record.adapter, record.adapter["config"] or {}
    rows = {what: config[name] for name, what in _SHOWN.items() if config.get(name)}
    rows |= {
        "trained parameters": f"{counts['trainable_parameters']:,} of {record.model['total_parameters']:,} "
        f"(adapter {counts['adapter_parameters']:,}, head {counts['head_parameters']:,})",
        "data": f"{record.data['id']} ({', '.join(f'{n:,} {name}' for name, n in record.data.get('sizes', {}).items())})",
        "last evaluation": _figures(record.metrics["last"]),
        "best evaluation": _figures(record.metrics["best"]),
        "device": record.device["name"],
    }
    if peak := record.memory.get("peak_allocated_bytes") or record.memory.get("peak_resident_bytes"):
        rows["peak memory"] = f"{peak / 2**30:.2f} GiB ({record.memory['kind']})"
    if rate := record.time.get("examples_per_second"):
        rows["time"] = f"{record.time['train_seconds']:.0f} s of training, {rate:,.0f} examples/s"
    return rows


def _figures(row: dict) -> str:
    numbers = {name: value for name, value in row.items() if isinstance(value, float) and name != "epoch"}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
