"""A training of finetune.py, in order: images and frozen model, adapter, epochs with their evaluations.

It leaves record, adapter with its card, predictions and log in the run's folder.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch import nn
from tqdm import tqdm

from control_experiments.errors import Interrupted, StopRequest
from control_experiments.record import read_json, write_json_atomic
from control_experiments.training.checkpoints import keep_newest, last_good, whole_folder
from control_experiments.training.device import seed_everything
from control_experiments.training.losses import LossWatch, check_parameters
from control_experiments.training.metering import MemoryMeter, Throughput
from control_experiments.training.methods import describe_adapter, set_memory
from control_experiments.training.quantization import check_fp8
from control_experiments.training.setup import Run, start
from peft_control import quantize_fp8
from ViT import augment
from ViT.classifier import Description, add_adapter, save
from ViT.finetune import TINY, Options
from ViT.images import Decoded, ImageData, hold_out, load_data
from ViT.inference import LESS_MEMORY, PROGRAM, describe, reading, test_logits, write_test_predictions
from ViT.tiny_model import build_tiny
from ViT.training import Step, index_batches, prepared, rate_factor, score, train_steps
from ViT.vision_models import Base, load, new_head, set_attention, set_mlp_layers

logger = logging.getLogger("vit")
#: How a card says that an adapter is loaded.
LOAD = """
import json
import peft_control
import timm
from peft import PeftModel

folder = "results/vit/RUN/adapter"  # where this file is
classes = json.load(open(f"{{folder}}/classifier.json"))["classes"]
base = timm.create_model("{architecture}", pretrained=True, num_classes=len(classes){more})
model = PeftModel.from_pretrained(base, folder).eval()
"""
RESTORE = """
from ViT.classifier import restore  # in a checkout of Parallel Control

model, description, _ = restore("results/vit/RUN/adapter")  # where this file is
classes = description.classes
"""


def train(options: Options, argv: Sequence[str] | None = None) -> None:
    """Train and evaluate after each epoch; a finished run is left as it is. `argv` stands in the record's command, by
    default the process's own."""
    with start(options, PROGRAM, argv, less_memory=LESS_MEMORY, on_gpu="fp16") as run:
        if run.folder.finished:
            print(f"{run.folder.path} is finished: nothing to do")
            return
        if options.quantization == "fp8":
            check_fp8(run.device, instead="none")
        data = placed_data(run.device, options.validation_share, options.data, **reading(options))
        record = run.begin_record(domain="vit", task=data.name, autocast=run.precision)
        shape = {"num_classes": len(data.classes), "image_size": options.image_size}
        how = {"mlp_layers": options.mlp_layers, "attention": options.attention}
        frozen, base = frozen_model(options.model, options.architecture, **shape, **how)
        vit = copy.deepcopy(frozen)
        if options.quantization == "fp8":
            quantize_fp8(vit)
        seed_everything(options.seed)
        new_head(vit)
        total = sum(p.numel() for p in vit.parameters())
        memory = MemoryMeter(run.device)
        vit = vit.to(run.device)
        memory.after_load()
        model = add_adapter(vit, options).to(run.device)
        set_memory(model, options.memory, options.cuda_graphs, chunk_tokens=options.chunk_tokens, offload=options.offload)
        adapter = describe_adapter(model)
        with run.folder.logging_from("vit", terminal=True):
            trained, counted = adapter["trainable_parameters"], total + adapter["adapter_parameters"]
            logger.info("%s", f"{options.method}: {trained:,} trained of {counted:,} parameters")
            history, clock, outcome = fit(run, model, data, memory)
        named = ("method", "model", "image_size", "mlp_layers", "crop", "quantization")
        about = {"architecture": base.architecture, "sha256": base.sha256, "classes": data.classes}
        description = Description(**{name: getattr(options, name) for name in named}, **about)
        write_test_predictions(run.folder, data, *outcome)
        resident = [part for part in (data.train, data.test) if isinstance(part, Decoded) and part.labels.is_cuda]
        on_device = sum(part.bytes for part in resident)
        best, last = max(history, key=lambda row: row["test_accuracy"]), history[-1]
        run.finish(
            record,
            partial(save, model, description=description, base=frozen),
            loading_lines(options, base),
            **describe(base, total, data, options.scored),
            adapter=adapter,
            history=history,
            metrics={"best": best, "last": last},
            memory={**memory.summary(), "images_on_device_bytes": on_device},
            time=run.time(clock),
        )
        reached = f"{last['test_accuracy']:.2f} % (best epoch {best['test_accuracy']:.2f} %)"
        speed = f"{clock.summary()['examples_per_second'] or 0:.0f} images/s"
        print(f"{options.method}: {options.scored} accuracy {reached}, {speed}; record in {run.folder.record}")


@lru_cache(maxsize=1)  # for the next run of a table
def placed_data(device: torch.device, held_out: float | None, name: str, **how: object) -> ImageData:
    """The images that training and evaluation take, where training reads them fastest; `how` is for `load_data`."""
    data = load_data(name, **how)
    if held_out is not None:
        data = hold_out(data, held_out)
    data.place(device, how["keep"])
    return data


@lru_cache(maxsize=1)
def frozen_model(
    model: str, architecture: str | None, *, mlp_layers: int, attention: str, **shape: int
) -> tuple[VisionTransformer, Base]:
    """A frozen model of a `shape` (`load`'s) with a new head, to be copied, and where it is from."""
    vit, base = build_tiny(**shape) if model == TINY else load(model, architecture, **shape)
    set_mlp_layers(vit, mlp_layers)
    set_attention(vit, attention)
    return vit, base


def fit(
    run: Run, model: nn.Module, data: ImageData, memory: MemoryMeter
) -> tuple[list[dict], Throughput, tuple[torch.Tensor, torch.Tensor]]:
    """All epochs with their evaluations; returns the history, the clock, and the test images' last logits and
    labels.

    Order, crops, dropout and learning rate follow from the seed, the epoch and the batch alone, so a resumed
    run repeats what an uninterrupted one does, wherever in an epoch it stopped. Raises Interrupted: SIGINT or
    SIGTERM came; a checkpoint was written after the batch that was under way; UserError: the loss is NaN or
    infinite.
    """
    options, device, checkpoints = run.options, run.device, run.folder.checkpoints
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = [options.lr, options.lr_head or options.lr]
    split = ([p for name, p in trained.items() if ("modules_to_save" in name) == head] for head in (False, True))
    groups = [{"params": part, "lr": rate} for part, rate in zip(split, rates, strict=True)]
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=options.momentum, weight_decay=options.weight_decay)
    else:
        # fused, it also looks for infinite gradients by itself, so that no step waits for the device
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=device.type == "cuda")
    step = Step(model, optimizer, device, run.precision)
    parts = {"optimizer": optimizer, "scaler": step.scaler}
    per_epoch = -(-len(data.train) // options.batch_size)
    total = options.epochs * per_epoch
    if options.max_steps > 0:
        total = min(total, options.max_steps)
    schedule = {"per_epoch": per_epoch, "total": total, "decay": options.lr_decay, "warmup": options.warmup_steps}
    history, losses, done = [], None, 0
    if run.checkpoint:
        history, losses, done = load_checkpoint(run.checkpoint, trained, parts, device)
    clock, watch, outcome = Throughput(device), LossWatch(device), None
    if done == total:  # it was stopped after its last checkpoint
        outcome = test_logits(step, data.test, options)

    def check() -> None:
        watch.check(per_epoch, last_good(checkpoints))

    def before_step() -> None:
        torch.manual_seed(seed_of(options.seed, *divmod(done, per_epoch)))  # dropout's
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(options.optimizer, done, **schedule)

    bar = tqdm(total=total, initial=done, desc=options.method, unit="step", disable=None)
    with bar, StopRequest() as stop:
        while done < total:
            epoch, first = divmod(done, per_epoch)
            end = min((epoch + 1) * per_epoch, total)
            losses = losses or {"total": torch.zeros((), device=device), "images": 0}
            clock.start()
            for loss, images in train_steps(step, epoch_batches(options, data, device, epoch, first, end - done), before_step):
                done += 1
                losses["total"] += loss * images
                losses["images"] += images
                memory.after_optimizer()
                clock.step(images)
                bar.update()
                watch.add(loss, done)
                if watch.due(done):
                    check()
                if stop.number is not None:
                    break
            clock.stop()
            if done == end:  # not stopped within the epoch
                outcome = test_logits(step, data.test, options)
                row = {"step": done, "epoch": epoch + 1, "learning_rate": optimizer.param_groups[0]["lr"],
                       "train_loss": float(losses["total"]) / losses["images"], "train_seconds": clock.seconds, **score(*outcome)}  # fmt: skip
                losses = None
                history.append(row)
                reached = f"training loss {row['train_loss']:.4f}, {options.scored} accuracy {row['test_accuracy']:.2f} %"
                logger.info("%s", f"epoch {epoch + 1}, step {done} of {total}: {reached}")
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", accuracy=f"{row['test_accuracy']:.2f}")
            check()
            check_parameters(trained.values(), done, last_good(checkpoints))
            save_checkpoint(checkpoints, done, trained, parts, history, losses)
            if stop.number is not None:
                raise Interrupted(stop.number)
    return history, clock, outcome


def epoch_batches(
    options: Options, data: ImageData, device: torch.device, epoch: int, first: int, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of the epoch, from number `first` on, in the epoch's own order."""
    order = torch.Generator().manual_seed(options.seed * 100_003 + epoch)
    numbers = itertools.count(first)

    def views(sizes: torch.Tensor) -> augment.Views:
        if options.augment != "published":
            return augment.central_views(sizes, options.image_size, options.crop)
        generator = torch.Generator().manual_seed(seed_of(options.seed, epoch, next(numbers)))
        return augment.random_views(sizes, options.image_size, generator)

    indices = index_batches(len(data.train), options.batch_size, order)[first : first + count]
    return prepared(data.train, indices, views, options.image_size, device)


def seed_of(seed: int, epoch: int, batch: int) -> int:
    """A seed for what is random about one batch."""
    return ((seed * 100_003 + epoch) * 1_000_003 + batch) % 2**63


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, nn.Parameter], parts: dict, history: list[dict], losses: dict | None
) -> None:
    """Write checkpoint-STEP and keep one before it; `losses` are the sum of losses so far of an epoch that is not at its end, and
    over how many images."""
    with whole_folder(folder / f"checkpoint-{step}") as place:
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(
            {**states, "trained": {name: p.detach() for name, p in trained.items()}, "losses": losses}, place / "state.pt"
        )
        write_json_atomic(place / "trainer_state.json", {"step": step, "history": history})
    keep_newest(folder, 2)


def load_checkpoint(
    place: Path, trained: dict[str, nn.Parameter], parts: dict, device: torch.device
) -> tuple[list[dict], dict | None, int]:
    """Restore what `save_checkpoint` wrote (the run's folder has checked that it is whole, and this run's); returns the
    history, the losses of the epoch to go on with, and the step."""
    saved = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved["trained"][name])
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    losses = saved["losses"] and {**saved["losses"], "total": saved["losses"]["total"].to(device)}
    state = read_json(place / "trainer_state.json")
    return state["history"], losses, state["step"]


def loading_lines(options: Options, base: Base) -> str:
    """Python that loads the adapter again, for its card: with timm and peft alone where these can build the model."""
    changed = options.mlp_layers != 2 or options.quantization != "none"
    if changed or options.model == TINY or base.id.endswith(".npz") or options.method == "probe":
        return RESTORE
    weights = "" if base.sha256 is None else f', pretrained_cfg_overlay={{"file": "{base.id}"}}'
    size = "" if options.image_size == 224 else f", img_size={options.image_size}"
    return LOAD.format(architecture=base.architecture, more=f"{weights}{size}")
