"""Measure the published memory table: ViT-B/16, batch 128, random weights, MLPs of four layers.

    python -m ViT.memory_table --device 0            all six cells, each in a process of its own, then table.md

Peak memory is the CUDA allocator's largest allocation over whole training steps (forward, backward, SGD) under fp16
autocast with a loss scaler; a batch lies on the device, as in the published loop. Random weights need no download
and change neither memory nor time. Records and the table go to results/vit/memory.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import RunRecord, git_state, package_versions, read_record, utc_now
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.device import (
    choose_precision,
    describe_device,
    seed_everything,
    select_device,
)
from control_experiments.training.metering import MemoryMeter, Throughput
from control_experiments.training.methods import count_parameters
from ViT.classifier import add_adapter
from ViT.options import RecipeOptions
from ViT.training import Step
from ViT.vision_models import create, set_attention, set_mlp_layers

METHODS = ("lora", "control", "dora")
ATTENTIONS = ("eager", "sdpa")
CLASSES = 100
#: Trained parameters of ViT-B/16 with four-layer MLPs and 100 classes, by hand: 12 x (3840 + 2 x 6144 + 3840) for
#: LoRA of rank 1, 12 x (2 x 768 x 16 + 16 + 768) for the control, 12 x (3 x 3072 + 768) more for DoRA; head 76,900.
TRAINED = {"control": 381_220, "lora": 316_516, "dora": 316_516 + 119_808}
#: MiB: the authors' logs (ViT/result_*.log of their repository), and an independent H100's MiB and ms a step.
PUBLISHED = {("eager", "lora"): 17067, ("eager", "control"): 11083}
INDEPENDENT_MIB = {
    ("eager", "lora"): 16962, ("eager", "control"): 10982, ("eager", "dora"): 31111,
    ("sdpa", "lora"): 13638, ("sdpa", "control"): 7647,
}  # fmt: skip
INDEPENDENT_MS = {("eager", "lora"): 158, ("eager", "control"): 92, ("eager", "dora"): 313}


@dataclass
class Options:
    """Options of the measurement; all but the first three are there for smaller machines."""

    device: str = field(default="0", metadata={"help": "GPU index, or cpu (which measures no split)."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "Default: results/vit/memory."})
    cell: Optional[str] = field(
        default=None, metadata={"help": "Only this one, in this process: eager_control, ..."}
    )
    architecture: str = field(default="vit_base_patch16_224", metadata={"help": "timm name."})
    image_size: int = field(default=224, metadata={"help": "Pixels."})
    batch_size: int = field(default=128, metadata={"help": "Images a step."})
    warmup: int = field(default=5, metadata={"help": "Steps before the clock starts."})
    steps: int = field(default=30, metadata={"help": "Steps that are timed."})


def measure(options: Options, folder: Path) -> None:
    """Measure one cell in this process and write its record."""
    attention, _, method = options.cell.partition("_")
    if attention not in ATTENTIONS or method not in METHODS:
        raise UserError(f"--cell joins one of {ATTENTIONS} and one of {METHODS} with _, got {options.cell!r}")
    created, device = utc_now(), select_device(options.device)
    precision = choose_precision("auto", device, "fp16")
    seed_everything(0)
    vit = create(options.architecture, num_classes=CLASSES, image_size=options.image_size)
    set_mlp_layers(vit, 4)
    set_attention(vit, attention)
    memory = MemoryMeter(device)
    vit = vit.to(device)
    memory.after_load()
    total = sum(p.numel() for p in vit.parameters())
    model = add_adapter(vit, RecipeOptions(method=method, mlp_layers=4)).to(device).train()
    counts = count_parameters(model)
    if options.architecture == Options.architecture and counts["trainable_parameters"] != TRAINED[method]:
        raise RuntimeError(
            f"{method} trains {counts['trainable_parameters']:,}, not {TRAINED[method]:,} parameters"
        )
    inputs = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    labels = torch.randint(CLASSES, (options.batch_size,), device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = Step(model, torch.optim.SGD(parameters, lr=5e-3, momentum=0.9), device, precision)
    clock = Throughput(device)
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            clock.start()
        step.backward(inputs, labels)
        step.update()
        memory.after_optimizer()
        if number >= options.warmup:
            clock.step(options.batch_size)
    clock.stop()
    time = clock.summary()
    RunRecord(
        domain="vit", name=options.cell, method=method, task="memory", seed=0, command=["python", *sys.argv],
        created=created, finished=utc_now(), git=git_state(), versions=package_versions(),
        device=describe_device(device),
        model={"id": f"{options.architecture} (random weights)", "class": options.architecture, "total_parameters": total},
        data={"id": "one random batch", "sizes": {"train": options.batch_size}},
        adapter={"config": model.peft_config["default"].to_dict(), "dtype": "float32", **counts},
        hyperparameters={**asdict(options), "attention": attention, "mlp_layers": 4, "autocast": precision,
                         "optimizer": "SGD", "momentum": 0.9},
        metrics={"milliseconds_per_step": 1000 * time["train_seconds"] / time["steps"]},
        memory=memory.summary(), time=time,
    ).write(folder / f"{options.cell}.json")  # fmt: skip


def table(folder: Path) -> str:
    """The Markdown table of all records in `folder`, with the published figures beside ours.

    Each of our figures links to its record; a cell without a record says so.
    """
    lines = [
        "# ViT-B/16, batch 128, fp16 autocast, four-layer MLPs: peak memory and time of training",
        "",
        "Peak allocated MiB. Authors: exact, from their logs. Independent: another implementation on one H100. "
        "Ours: random weights, one resident batch; click for the record.",
        "",
        "| attention | method | trained | MiB, authors | MiB, independent | MiB, ours | ours / LoRA | ms, independent | ms, ours |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    devices = set()
    for attention in ATTENTIONS:
        baseline = None
        for method in METHODS:
            key, path = (attention, method), folder / f"{attention}_{method}.json"
            row = [attention, method]
            published = [f"{PUBLISHED[key]:,}" if key in PUBLISHED else "not published",
                         f"{INDEPENDENT_MIB[key]:,}" if key in INDEPENDENT_MIB else "not measured"]  # fmt: skip
            milliseconds = str(INDEPENDENT_MS.get(key, "not measured"))
            if not path.is_file():
                lines.append(
                    "| "
                    + " | ".join([*row, "", *published, "no record", "", milliseconds, "no record"])
                    + " |"
                )
                continue
            record = read_record(path)
            devices.add(
                f"{record.device['name']} (torch {record.versions['torch']}, timm {record.versions['timm']})"
            )
            peak = record.memory["peak_allocated_bytes"]
            mib = None if peak is None else peak / 2**20
            baseline = mib if method == "lora" else baseline
            lines.append("| " + " | ".join([
                *row, f"{record.adapter['trainable_parameters']:,}", *published,
                f"[{mib:,.0f}]({path.name})" if mib else f"[not measured on a {record.device['kind']}]({path.name})",
                f"{mib / baseline:.2f}" if mib and baseline else "",
                milliseconds, f"[{record.metrics['milliseconds_per_step']:.0f}]({path.name})",
            ]) + " |")  # fmt: skip
    return "\n".join([*lines, "", f"Ours: {'; '.join(sorted(devices)) or 'no record yet'}.", ""])


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    folder = Path(options.output_dir) if options.output_dir else RESULTS / "vit" / "memory"
    if options.cell:
        measure(options, folder)
        return
    for attention in ATTENTIONS:
        for method in METHODS:
            cell = f"{attention}_{method}"
            print(f"measuring {cell}", flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "ViT.memory_table", *sys.argv[1:], "--cell", cell], check=False
            )
            if done.returncode:
                raise UserError(f"{cell} could not be measured (see above); needs about 32 GiB free for dora")
    text = table(folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {folder / 'table.md'}")


if __name__ == "__main__":
    run_main(main)
