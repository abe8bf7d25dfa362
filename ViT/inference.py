"""What a trained adapter answers: its outcomes on test images or on a folder, and what is written down of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel, get_peft_model_state_dict

from control_experiments.errors import UserError
from control_experiments.outcomes import write_outcomes
from control_experiments.paths import RESULTS, public_path
from control_experiments.record import RunRecord, read_record, write_text_atomic
from control_experiments.training.device import describe_device, explain_out_of_memory
from control_experiments.training.metering import MemoryMeter, Throughput
from control_experiments.training.runs import RunFolder
from control_experiments.training.setup import choose
from ViT import augment
from ViT.classifier import Description, restore
from ViT.finetune import Options
from ViT.images import Decoded, ImageData, OnDemand, load_data, read_folder
from ViT.training import Step, index_batches, predict, prepared, score
from ViT.vision_models import Base

PROGRAM = "ViT.finetune"
LESS_MEMORY = "--memory lean, a smaller --batch_size or --eval_batch_size, --precision fp16 or bf16, --keep host"


def evaluate(options: Options) -> None:
    """Test accuracy of a saved adapter on `--data`, printed and recorded."""
    run = Path(options.evaluate).resolve().parent.name
    options.output_dir = options.output_dir or str(RESULTS / "vit" / f"{run}_evaluated_on_{Path(options.data).stem}")
    with RunFolder(options.folder) as folder, trained(options, options.evaluate) as (step, description, base):
        begun = any(place.exists() for place in (folder.adapter, folder.checkpoints))
        if begun or (folder.finished and read_record(folder.record).history):  # else its files would be overwritten, or mixed
            raise UserError(f"{folder.path} holds a training run: choose another --output_dir for its evaluation")
        data = load_data(options.data, **reading(options))
        if data.classes != description.classes:
            here, there = (f"{len(names)}: {', '.join(names[:3])}, ..." for names in (data.classes, description.classes))
            raise UserError(f"the classes of {data.name} ({here}) are not those that the adapter was trained on ({there})")
        record = RunRecord.begin(
            options, domain="vit", name=folder.path.name, task=data.name, device=describe_device(step.device),
            command=["python", "-m", PROGRAM, *sys.argv[1:]],
        )  # fmt: skip
        shown = ("image_size", "crop", "mlp_layers", "attention", "quantization")  # the training's others are in its own record
        record.hyperparameters = {**{name: getattr(options, name) for name in shown}, "autocast": step.precision}
        data.place(step.device, options.keep)
        memory, clock = MemoryMeter(step.device), Throughput(step.device)
        clock.start()
        logits, labels = test_logits(step, data.test, options)
        clock.step(len(labels))
        clock.stop()
        write_test_predictions(folder, data, logits, labels)
        result = score(logits, labels)
        adapter = get_peft_model_state_dict(step.model).values() if isinstance(step.model, PeftModel) else ()
        total = sum(p.numel() for p in step.model.parameters()) - sum(tensor.numel() for tensor in adapter)
        record.finish(
            folder.record, **describe(base, total, data, "test"), adapter={"id": public_path(options.evaluate)},
            metrics={"best": result, "last": result}, memory=memory.summary(), time=clock.summary(),
        )  # fmt: skip
        print(f"test accuracy {result['test_accuracy']:.2f} % on {len(labels)} images; record in {folder.record}")


def classify_folder(options: Options) -> None:
    """Classify every image below a folder into a CSV file: file, class, probability."""
    with trained(options, options.adapter) as (step, description, _):
        paths, unknown = read_folder(options.predict, options.workers)
        logits, _ = test_logits(step, unknown, options)
        names = [path.relative_to(options.predict).as_posix() for path in paths]
        write_predictions(Path(options.output), "file", names, logits, description.classes)
        print(f"{len(paths)} images classified in {options.output}")


@contextmanager
def trained(options: Options, adapter: str) -> Iterator[tuple[Step, Description, Base]]:
    """A trained classifier on the device; from here on the options show images as its training did.

    `--model`, if it is given, says where the base model is now.
    """
    device, precision = choose(options, on_gpu="fp16")
    with explain_out_of_memory(device, LESS_MEMORY):
        moved = options.model if options.model != Options.defaults()["model"] else None
        model, description, base = restore(adapter, attention=options.attention, model=moved)
        for name in ("method", "model", "image_size", "mlp_layers", "crop", "quantization"):
            setattr(options, name, getattr(description, name))
        yield Step(model.to(device), None, device, precision), description, base


def reading(options: Options) -> dict:
    """How `load_data` is to read."""
    return {"root": options.data_root, "keep": options.keep, "workers": options.workers}


def test_logits(step: Step, images: Decoded | OnDemand, options: Options):
    """Logits and labels of images, each shown once as in evaluation."""
    views = partial(augment.central_views, size=options.image_size, crop=options.crop)
    indices = index_batches(len(images), options.eval_batch_size)
    return predict(step, prepared(images, indices, views, options.image_size, step.device))


def describe(base: Base, total: int, data: ImageData, scored: str) -> dict:
    """The record's `model` and `data`."""
    model = {"id": base.id, "sha256": base.sha256, "class": base.architecture, "total_parameters": total}
    sizes = {"train": len(data.train), scored: len(data.test)}
    return {"model": model, "data": {**data.identity, "sizes": sizes}}


def write_test_predictions(folder: RunFolder, data: ImageData, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Each test image's outcome beside the record: for people with class names, and in compact form."""
    examples = range(len(labels))
    truth = [data.classes[label] for label in labels.tolist()]
    write_predictions(folder.path / "predictions.csv", "index", examples, logits, data.classes, true=truth)
    write_outcomes(folder.path, examples, (logits.argmax(1) == labels).tolist())


def write_predictions(
    path: Path, first: str, names: Iterable, logits: torch.Tensor, classes: list[str], **more: list[str]
) -> None:
    """A CSV file, written atomically: name, predicted class, its probability, and the columns of `more`."""
    probability, chosen = (tensor.tolist() for tensor in logits.softmax(1).max(1))
    answers = {"predicted": [classes[i] for i in chosen], "probability": [f"{p:.4f}" for p in probability]}
    table = pd.DataFrame({first: names, **answers, **more})
    write_text_atomic(path, table.to_csv(index=False, lineterminator="\r\n"))
