"""Make a model folder of a GGUF file: safetensors, configuration and tokenizer, which every tool reads.

    python -m LlaMA.convert --model SmolLM2-135M-Instruct.Q4_1.gguf --output_dir smollm2

An adapter finds such a folder again by its name, it loads faster, and it can be quantized. The weights are those that the
file holds, in --dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.training.arguments import parse_arguments


@dataclass(kw_only=True)
class Options:
    model: str = HfArg(help="GGUF file.")
    output_dir: str = HfArg(help="The folder to make.")
    dtype: Literal["fp32", "bf16", "fp16"] = HfArg(default="bf16", help="Type of the weights.")


def convert(model: str | Path, folder: Path, dtype: str = "bf16") -> Path:
    """Write the model folder, whole or not at all; returns it. Raises UserError: the model cannot be read, or
    the folder is there."""
    import torch

    from control_experiments.training.checkpoints import whole_folder
    from control_experiments.training.device import DTYPES
    from control_experiments.training.quiet import quieten
    from LlaMA.models import load_model, load_tokenizer

    if folder.exists():
        raise UserError(f"{folder} is there already: delete it or name another folder")
    quieten()
    tokenizer = load_tokenizer(str(model))
    base = load_model(str(model), DTYPES[dtype], torch.device("cpu"))
    with whole_folder(folder, sealed=False) as place:
        base.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return folder


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    print(convert(options.model, Path(options.output_dir), options.dtype))


if __name__ == "__main__":
    run_main(main)
