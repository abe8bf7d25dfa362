"""The card (README.md) of an adapter that a script trained: what it is, what it reached, and how to load it."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..record import RunRecord, public_command
from .options import METHODS

_TEMPLATE = """
# {method} on {base}: {task}

An adapter for `{base}`, trained on {task} by [Parallel Control](https://proceedings.mlr.press/v267/): {kind}.

| | |
| --- | --- |
{rows}

## How to load it

```bash
pip install ./peft  # from a copy of the Parallel Control repository
```

```python
{load}
```

`import peft_control` registers CONTROL with peft; LoRA and DoRA load without it.

## How it was trained

```bash
{command}
```
"""


def write_card(folder: Path, record: RunRecord, load: str) -> None:
    """Write README.md into an adapter's folder from the run's record; the metadata that peft wrote there stay. `load` are
    Python lines that load the adapter from its folder."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["base_model"] = record.model["id"]
    # peft's `base_model:` tag names a folder by its whole path
    tags = {tag for tag in card.data.get("tags") or [] if not tag.startswith("base_model:")}
    card.data["tags"] = sorted({*tags, "parallel-control"})
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(record).items())
    said = {"method": record.method, "kind": METHODS[record.method], "base": record.model["id"]}
    command = shlex.join(public_command(record.command))
    card.text = _TEMPLATE.format(**said, task=record.task, rows=rows, load=load.strip(), command=command)
    card.save(path)


def _rows(record: RunRecord) -> dict[str, str]:
    """What the record says, for people."""
    counts, sizes = record.adapter, record.data.get("sizes", {})
    rows = {
        **_parts(record.adapter["config"] or {}),
        "trained parameters": f"{counts['trainable_parameters']:,} of {record.model['total_parameters']:,} "
        f"(adapter {counts['adapter_parameters']:,}, head {counts['head_parameters']:,})",
        "data": f"{record.data['id']} ({', '.join(f'{count:,} {name}' for name, count in sizes.items())})",
        "last evaluation": _figures(record.metrics["last"]),
        "best evaluation": _figures(record.metrics["best"]),
        "device": record.device["name"],
    }
    peak = record.memory.get("peak_allocated_bytes") or record.memory.get("peak_resident_bytes")
    if peak:
        rows["peak memory"] = f"{peak / 2**30:.2f} GiB ({record.memory['kind']})"
    if rate := record.time.get("examples_per_second"):
        rows["time"] = f"{record.time['train_seconds']:.0f} s of training, {rate:,.0f} examples/s"
    return {name: value for name, value in rows.items() if value}


def _parts(config: dict) -> dict[str, str]:
    """The adapter's two parts, as its configuration (a dictionary of peft's) says."""
    parts = {}
    if blocks := config.get("control_blocks"):
        rank, alpha = config["control_rank"], config["control_alpha"]
        parts["control"] = f"rank {rank}, alpha {alpha}, parallel to {' and '.join(blocks)}"
    if targets := config.get("target_modules"):
        has_alpha = "lora_alpha" in config
        name = "DoRA" if config.get("use_dora") else "LoRA" if has_alpha else "MiSS"
        alpha = f", alpha {config['lora_alpha']}" if has_alpha else ""
        parts[name] = f"rank {config['r']}{alpha}, on {', '.join(sorted(targets))}"
    return parts


def _figures(row: dict) -> str:
    numbers = {name: value for name, value in row.items() if isinstance(value, float) and name != "epoch"}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
