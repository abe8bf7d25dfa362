"""Does the data pipeline hold the GPU back? Images per second of training, three ways, in one run.

    python -m ViT.benchmark_pipeline --data cifar100 --device 0

- ours:      batches cropped, resized, flipped and normalised on the device (augment.py)
- resident:  the same training step fed from one batch that already lies there: the most a pipeline could reach
- published: Pillow images, RandomResizedCrop, flip and normalise in DataLoader workers, as the authors train

The three take turns for several rounds; the medians and their ratios go to results/vit/pipeline.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import RunRecord
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.device import choose_precision, describe_device, seed_everything, select_device
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import describe_adapter
from control_experiments.training.options import check_method
from ViT import augment
from ViT.classifier import add_adapter
from ViT.images import Decoded, ImageData, load_data
from ViT.names import check_data
from ViT.options import METHODS, RecipeOptions
from ViT.training import Step, index_batches, make_optimizer, prepared, train_epoch
from ViT.vision_models import create, set_attention

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


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


class PillowImages(Dataset):
    """Decoded images as Pillow images again, through the published transforms."""

    def __init__(self, data: Decoded, size: int):
        self.images = [image.permute(1, 2, 0).numpy() for image in data.images]
        self.labels = data.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def ours(data: ImageData, options: Options, device: torch.device) -> Batches:
    """Endless epochs of our pipeline."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(epoch)
        indices = index_batches(len(data.train), options.batch_size, generator)
        yield from prepared(
            data.train,
            [i for i in indices if len(i) == options.batch_size],
            lambda sizes, generator=generator: augment.random_views(sizes, options.image_size, generator),
            options.image_size,
            device,
        )


def published(images: Dataset, options: Options, device: torch.device) -> Batches:
    """Endless epochs of the published pipeline; the workers live on between epochs."""
    loader = DataLoader(
        images, options.batch_size, shuffle=True, drop_last=True, num_workers=options.workers,
        pin_memory=device.type == "cuda", persistent_workers=options.workers > 0,
    )  # fmt: skip
    while True:
        for inputs, labels in loader:
            yield inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def images_per_second(step: Step, batches: Batches, options: Options, device: torch.device) -> float:
    """Rate of `options.steps` training steps, after two that do not count."""
    train_epoch(step, itertools.islice(batches, 2))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    float(train_epoch(step, itertools.islice(batches, options.steps)).total)  # waits for the device
    return options.steps * options.batch_size / (time.perf_counter() - started)


def main() -> None:
    """Measure the three ways in turn, print their rates and write the record."""
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    device = select_device(options.device)
    precision = choose_precision(options.precision, device, "fp16")
    seed_everything(options.seed)
    data = load_data(options.data, root=options.data_root)
    if not isinstance(data.train, Decoded) or len(data.train) < options.batch_size:
        raise UserError(f"{data.name} is too large for the memory or smaller than a batch")
    architecture = options.architecture
    name = f"{architecture}_{data.name}_{options.method}_batch{options.batch_size}"
    record = RunRecord.begin(
        options, domain="vit", name=name, task="pipeline", device=describe_device(device),
        command=["python", "-m", "ViT.benchmark_pipeline", *sys.argv[1:]], data=data.name, autocast=precision,
    )  # fmt: skip
    pillow = PillowImages(data.train, options.image_size)
    data.place(device)
    vit = create(architecture, num_classes=len(data.classes), image_size=options.image_size)
    set_attention(vit, options.attention)
    total = sum(p.numel() for p in vit.parameters())
    memory = MemoryMeter(device)
    model = add_adapter(vit.to(device), RecipeOptions(method=options.method, lora_rank=0)).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = Step(model, make_optimizer("sgd", parameters, 5e-3, momentum=0.9), device, precision)
    our_batches = ours(data, options, device)
    ways = {
        "ours": our_batches,
        "resident": itertools.repeat(next(our_batches)),
        "published": published(pillow, options, device),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for way, batches in ways.items():
            rates[way].append(images_per_second(step, batches, options, device))
    median = {way: statistics.median(values) for way, values in rates.items()}
    metrics = {
        "images_per_second": median,
        "rounds": rates,
        "ours_over_resident": median["ours"] / median["resident"],
        "ours_over_published": median["ours"] / median["published"],
    }
    folder = Path(options.output_dir) if options.output_dir else RESULTS / "vit" / "pipeline"
    place = folder / f"{name}.json"
    record.finish(
        place,
        model={"id": f"{architecture} (random weights)", "class": architecture, "total_parameters": total},
        data={**data.identity, "sizes": {"train": len(data.train)}},
        adapter=describe_adapter(model),
        metrics=metrics,
        memory=memory.summary(),
        time={"steps": options.steps * options.rounds * len(ways)},
    )
    print(f"{'pipeline':<12}{'images/s':>10}")
    for way, rate in median.items():
        print(f"{way:<12}{rate:>10.0f}")
    print(
        f"ours is {100 * metrics['ours_over_resident']:.1f} % of the resident batch and "
        f"{metrics['ours_over_published']:.2f} times the published pipeline; record in {place}"
    )


if __name__ == "__main__":
    run_main(main)
