"""How far a quantized base moves a control's gradients, layer by layer: a record and a picture.

    python -m QControl.gradient_error --model SMOLLM2_FOLDER --data commonsense_51k.json

The gradients are those of a first step, of the controls' B, on the same rows, for each base. They are compared with the same
weights in float32. fp8-e5m2 has the gradients of outputs in e5m2, fp8 in e4m3. fp8states is bf16 in memory mode lean, whose states
wait in FP8 (`offload="fp8"`). On a CPU FP8 is emulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.training.arguments import check_numbers, parse_arguments

BASES = ("bf16", "fp8states", "int8", "nf4", "fp8", "fp8-e5m2")


@dataclass(kw_only=True)
class Options:
    model: str = HfArg(help="Folder of a causal language model, or hub id.")
    data: str = HfArg(help="Commonsense training rows, a JSON file.")
    bases: list[str] = HfArg(
        default_factory=lambda: list(BASES),
        help="How the weights, or the states that wait, are stored.",
        metadata={"choices": BASES},
    )
    rows: int = HfArg(default=16, help="The first so many rows make the batch.")
    control_rank: int = HfArg(default=16, help="Rank of the controls on attention and mlp.")
    seed: int = HfArg(default=42, help="Of the controls.")
    device: str = HfArg(default="0", help="A GPU's index, or cpu.")
    output_dir: str = HfArg(default=str(RESULTS / "gradient_error"), help="Folder of the record and the picture.")


def gradients(options: Options, base: str, device) -> dict[str, list]:
    """Block -> the gradient of its control's B, layer by layer, in float64."""
    import torch

    from control_experiments.training.device import DTYPES
    from LlaMA.commonsense import read_rows, tokenize_rows
    from LlaMA.models import add_adapter, load_model, load_tokenizer
    from peft_control import ControlConfig, quantize_fp8
    from peft_control.memory import set_memory_mode

    fp8 = base in ("fp8", "fp8-e5m2")
    dtype = DTYPES["fp32" if base == "fp32" or fp8 else "bf16"]
    model = load_model(options.model, dtype, device, quantization=base if base in ("int8", "nf4") else "none")
    if fp8:
        quantize_fp8(model, gradients="e5m2" if base.endswith("e5m2") else "e4m3")
    torch.manual_seed(options.seed)
    model = add_adapter(model, ControlConfig(control_blocks=["attention", "mlp"], control_rank=options.control_rank)).train()
    if base == "fp8states":
        set_memory_mode(model, "lean", offload="fp8")
    rows = tokenize_rows(read_rows(options.data)[: options.rows], load_tokenizer(options.model), 512, response_only=True)
    for row in rows:
        given = {"input_ids": [row.ids], "labels": [row.labels]}
        with torch.autocast(device.type, torch.bfloat16, enabled=base != "fp32"):
            loss = model(**{name: torch.tensor(value, device=device) for name, value in given.items()}).loss
        (loss / len(rows)).backward()
    found: dict[str, list] = {"attention": [], "mlp": []}
    for name, parameter in model.named_parameters():
        if ".control_B." in name:
            found["attention" if "attention_control" in name else "mlp"].append(parameter.grad.double().cpu())
    return found


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    check_numbers(options, "rows", "control_rank", at_least=1)
    from control_experiments.record import git_state, package_versions, utc_now, write_json_atomic
    from control_experiments.reporting import pictures
    from control_experiments.training.device import describe_device, select_device
    from control_experiments.training.quiet import quieten

    quieten()
    device, folder = select_device(options.device), Path(options.output_dir)
    exact, found = gradients(options, "fp32", device), {}
    for base in options.bases:
        blocks = gradients(options, base, device).items()
        # the norm of each layer's difference over the norm of the exact gradient
        found[base] = {block: [((a - b).norm() / b.norm()).item() for a, b in zip(g, exact[block])] for block, g in blocks}
        means = ", ".join(f"{block} {sum(values) / len(values):.4f}" for block, values in found[base].items())
        print(f"{base:9} mean relative error of the gradients: {means}")
    write_json_atomic(folder / "record.json", {
        "schema": 1, "model": Path(options.model).name, "data": Path(options.data).name, "rows": options.rows,
        "control_rank": options.control_rank, "seed": options.seed, "relative_error": found,
        "device": describe_device(device), "versions": package_versions(), "git": git_state(), "created": utc_now(),
    })  # fmt: skip
    lines = [
        (base, options.seed, [(layer, sum(both) / 2) for layer, both in enumerate(zip(*blocks.values()))])
        for base, blocks in found.items()
    ]
    title = f"Controls' gradients over a quantized base of {Path(options.model).name}"
    pictures.save(pictures.curves(lines, title, "relative error", "layer"), folder / "gradient_error.png")


if __name__ == "__main__":
    run_main(main)
