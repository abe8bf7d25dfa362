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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import RunRecord
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.options import Precision
from ViT import finetune


@dataclass
class Options:
    data: str = HfArg(default="cifar100", help="As in finetune.py.")
    data_root: str = HfArg(default="data", help="Where torchvision keeps its downloads.")
    architecture: str = HfArg(default="vit_base_patch16_224", help="timm name; random weights.")
    image_size: int = HfArg(default=224, help="Pixels.")
    batch_size: int = HfArg(default=128, help="Images a step.")
    method: str = HfArg(default="control", help="As in finetune.py; with as many parameters as the control.")
    attention: Literal["sdpa", "eager"] = HfArg(default="sdpa", help="sdpa is fused.")
    precision: Precision = HfArg(default="auto", help="fp16 on a GPU.")
    steps: int = HfArg(default=40, help="Steps of each way in each round.")
    rounds: int = HfArg(default=3, help="Rounds; the median counts.")
    workers: int = HfArg(default=8, help="DataLoader workers of the published pipeline.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    output_dir: Optional[str] = HfArg(default=None, help="Default: results/vit/pipeline.")

    seed: ClassVar[int] = 0

    def hyperparameters(self) -> dict:
        """For the record."""
        return {**asdict(self), "data_root": None}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    named = ("data", "data_root", "image_size", "batch_size", "method", "attention", "precision", "device", "seed")
    asked = finetune.Options(**{name: getattr(options, name) for name in named}, lora_rank=0)
    asked.check()
    check_numbers(options, "steps", "rounds", above=0)
    check_numbers(options, "workers", at_least=0)
    import torch
    from timm.data import create_transform
    from torch.utils.data import DataLoader, default_collate
    from torchvision.transforms.functional import to_pil_image

    from control_experiments.training.benchmarking import time_steps
    from control_experiments.training.device import describe_device, seed_everything
    from control_experiments.training.metering import MemoryMeter
    from control_experiments.training.methods import describe_adapter
    from control_experiments.training.setup import choose
    from ViT import classifier, images, recipe, training, vision_models

    (device, precision), size = choose(asked, on_gpu="fp16"), options.image_size
    seed_everything(options.seed)
    data = images.load_data(options.data, root=options.data_root)
    if not isinstance(data.train, images.Decoded) or len(data.train) < options.batch_size:
        raise UserError(f"{data.name} is too large for the memory or smaller than a batch")
    architecture = options.architecture
    name = f"{architecture}_{data.name}_{options.method}_batch{options.batch_size}"
    record = RunRecord.begin(
        options, domain="vit", name=name, task="pipeline", device=describe_device(device),
        command=["python", "-m", "ViT.benchmark_pipeline", *sys.argv[1:]], data=data.name, autocast=precision,
    )  # fmt: skip
    decoded = list(zip(data.train.images, data.train.labels.tolist(), strict=True))
    data.place(device)
    vit = vision_models.create(architecture, num_classes=len(data.classes), image_size=size)
    vision_models.set_attention(vit, options.attention)
    total = sum(p.numel() for p in vit.parameters())
    memory = MemoryMeter(device)
    model = classifier.add_adapter(vit.to(device), asked).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 5e-3, momentum=0.9)
    step = training.Step(model, optimizer, device, precision)

    # endless epochs, here and below, of whole batches
    whole = len(data.train) // options.batch_size
    epochs = (recipe.epoch_batches(asked, data, device, epoch, 0, whole) for epoch in itertools.count())
    ours = itertools.chain.from_iterable(epochs)
    # RandomResizedCrop and flip, normalised by the ImageNet statistics
    transform = create_transform(size, is_training=True, color_jitter=None, interpolation="bicubic")
    loader = DataLoader(
        decoded, options.batch_size, shuffle=True, drop_last=True, pin_memory=device.type == "cuda",
        num_workers=options.workers, persistent_workers=options.workers > 0,
        collate_fn=lambda batch: default_collate([(transform(to_pil_image(image)), label) for image, label in batch]),
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    published = (tuple(part.to(device, non_blocking=True) for part in batch) for batch in batches)
    ways = {"ours": ours, "resident": itertools.repeat(next(ours)), "published": published}
    trained = {way: training.train_steps(step, batches) for way, batches in ways.items()}
    rates = {way: [] for way in ways}
    for way in itertools.chain.from_iterable(itertools.repeat(ways, options.rounds)):
        seconds = time_steps(lambda steps=trained[way]: next(steps), options.steps + 2, device.type)[2:]
        rates[way].append(options.steps * options.batch_size / sum(seconds))
    median = {way: statistics.median(values) for way, values in rates.items()}
    over = {f"ours_over_{way}": median["ours"] / median[way] for way in ("resident", "published")}
    place = (Path(options.output_dir) if options.output_dir else RESULTS / "vit" / "pipeline") / f"{name}.json"
    record.finish(
        place,
        model={"id": f"{architecture} (random weights)", "class": architecture, "total_parameters": total},
        data={**data.identity, "sizes": {"train": len(data.train)}},
        adapter=describe_adapter(model),
        metrics={"images_per_second": median, "rounds": rates, **over},
        memory=memory.summary(),
        time={"steps": options.steps * options.rounds * len(ways)},
    )
    print(f"{'pipeline':<12}{'images/s':>10}")
    for way, rate in median.items():
        print(f"{way:<12}{rate:>10.0f}")
    print(
        f"ours is {100 * over['ours_over_resident']:.1f} % of the resident batch and "
        f"{over['ours_over_published']:.2f} times the published pipeline; record in {place}"
    )


if __name__ == "__main__":
    run_main(main)
