"""Does the data pipeline hold the GPU back? Images per second of training, three ways, in one run.

    python -m ViT.benchmark_pipeline --data cifar100 --device 0

- ours:      batches cropped, resized, flipped and normalised on the device (augment.py)
- resident:  the same training step fed from one batch that already lies there: the most a pipeline could reach
- published: Pillow images, RandomResizedCrop, flip and normalise in DataLoader workers, as the authors train

The three take turns for several rounds; the medians and their ratios go to results/vit/pipeline.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.options import check_method
from ViT.names import check_data
from ViT.options import METHODS


@dataclass
class Options:
    """Options of the benchmark."""

    data: str = HfArg(default="cifar100", help="As in finetune.py.")
    data_root: str = HfArg(default="data", help="Where torchvision keeps its downloads.")
    architecture: str = HfArg(default="vit_base_patch16_224", help="timm name; random weights.")
    image_size: int = HfArg(default=224, help="Pixels.")
    batch_size: int = HfArg(default=128, help="Images a step.")
    method: str = HfArg(default="control", help="As in finetune.py; with as many parameters as the control.")
    attention: Literal["sdpa", "eager"] = HfArg(default="sdpa", help="sdpa is fused.")
    precision: Literal["auto", "fp16", "bf16", "fp32"] = HfArg(default="auto", help="fp16 on a GPU.")
    steps: int = HfArg(default=40, help="Steps of each way in each round.")
    rounds: int = HfArg(default=3, help="Rounds; the median counts.")
    workers: int = HfArg(default=8, help="DataLoader workers of the published pipeline.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    output_dir: Optional[str] = HfArg(default=None, help="Default: results/vit/pipeline.")

    seed: ClassVar[int] = 0

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be."""
        check_method(self.method, METHODS)
        check_data(self.data)
        check_numbers(self, "image_size", "batch_size", "steps", "rounds", above=0)
        check_numbers(self, "workers", at_least=0)

    def hyperparameters(self) -> dict:
        """For the record."""
        return {**asdict(self), "data_root": None}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from ViT import pipelines  # with torch and timm, for which --help and a wrong option do not wait

    pipelines.measure(options)


if __name__ == "__main__":
    run_main(main)
