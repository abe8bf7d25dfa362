"""Fine-tune a timm Vision Transformer on images with control, LoRA, DoRA or a linear probe; write a run record.

    python -m ViT.finetune --method control                                    ViT-B/16 on CIFAR-100 from the hubs
    python -m ViT.finetune --method control --data digits --model tiny --device cpu --epochs 20 --batch_size 32 --lr 0.05   no hub
    python -m ViT.finetune --evaluate results/vit/RUN/adapter --data flowers102         test accuracy of an adapter
    python -m ViT.finetune --predict PHOTOS --adapter results/vit/RUN/adapter --output classes.csv

The defaults are the paper's recipe, except that --mlp_layers 4 and --attention eager give its exact model. What
the options trade: --attention sdpa needs 3 GB less than eager and gives the same results; --memory fast, balanced
and lean lower the control's peak on models that support them; --keep host leaves the images in main memory. See ViT/README.md.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from control_experiments.errors import Interrupted, StopRequest, UserError, run_main
from control_experiments.paths import RESULTS, public_path
from control_experiments.record import (
    RunRecord,
    git_state,
    package_versions,
    read_json,
    read_record,
    utc_now,
    write_json_atomic,
)
from control_experiments.training.arguments import LARGEST_SEED, check_numbers, parse_arguments
from control_experiments.training.checkpoints import checkpoints, discard, keep_newest, whole_folder
from control_experiments.training.checksums import fingerprint
from control_experiments.training.device import (
    describe_device,
    explain_out_of_memory,
    make_deterministic,
    seed_everything,
    select_device,
)
from control_experiments.training.losses import LossWatch, check_parameters
from control_experiments.training.metering import MemoryMeter, Throughput
from control_experiments.training.methods import ControlSettings, check_method, set_memory
from control_experiments.training.quiet import quieten
from control_experiments.training.rates import SEARCH_FOLDER
from control_experiments.training.runs import RunFolder
from ViT import augment
from ViT.classifier import (
    METHODS,
    AdapterSettings,
    Description,
    add_adapter,
    build_base,
    count_parameters,
    restore,
    save,
    trained_state,
)
from ViT.held_out import hold_out
from ViT.images import Decoded, ImageData, load_data, read_folder
from ViT.names import model_name, run_name
from ViT.tiny_model import build_tiny
from ViT.training import (
    EpochLoss,
    Step,
    choose_precision,
    index_batches,
    predict,
    prepared,
    score,
    train_epoch,
)
from ViT.vision_models import TINY, Base, set_attention, set_mlp_layers

logger = logging.getLogger("vit")
LESS_MEMORY = (
    "--memory lean, a smaller --batch_size or --eval_batch_size, --precision fp16 or bf16, --keep host"
)


@dataclass
class Options:
    """Every option of the program."""

    method: str = field(default="control", metadata={"help": f"One of {', '.join(METHODS)} (head only)."})
    data: str = field(
        default="cifar100",
        metadata={
            "help": "cifar100, flowers102, svhn, food101, imagenet (torchvision), digits (scikit-learn), or the "
            "path of an .npz, a tar or a folder with train/CLASS/ and test/CLASS/."
        },
    )
    data_root: str = field(default="data", metadata={"help": "Where torchvision keeps its downloads."})
    validation_share: Optional[float] = field(
        default=None,
        metadata={
            "help": "For choosing hyperparameters: this share of the training images of each class, the same for every "
            f"seed, is held out and tested on in the place of the test images. Runs lie below {SEARCH_FOLDER}/."
        },
    )
    corrupt: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "At an unreadable image: stop, or warn and skip it."}
    )
    keep: Literal["auto", "device", "host", "files"] = field(
        default="auto",
        metadata={
            "help": "Where decoded images lie; auto: on the GPU if they fit, else host, else in files."
        },
    )
    workers: int = field(default=8, metadata={"help": "Threads or processes that decode images."})
    model: str = field(
        default="vit_base_patch16_224.orig_in21k",
        metadata={
            "help": "timm name, a .safetensors or original .npz file, a folder, or tiny (with digits)."
        },
    )
    architecture: Optional[str] = field(
        default=None, metadata={"help": "timm name of the architecture, for weights from a file."}
    )
    image_size: Optional[int] = field(default=None, metadata={"help": "Pixels; 224, or 8 for tiny."})
    mlp_layers: int = field(
        default=2, metadata={"help": "2: the ordinary ViT; 4: with the paper's two frozen identity layers."}
    )
    attention: Literal["eager", "sdpa"] = field(default="sdpa", metadata={"help": "sdpa is fused."})
    memory: Literal["plain", "fast", "balanced", "lean"] = field(
        default="plain", metadata={"help": "How little the control keeps for its backward; same results."}
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Replay steps as CUDA graphs: faster where launching kernels takes the time, as with small models."
        },
    )
    augment: Optional[Literal["published", "none"]] = field(
        default=None, metadata={"help": "published: random resized crop and flip; none is tiny's default."}
    )
    crop: Optional[float] = field(
        default=None, metadata={"help": "Share of the side that evaluation keeps; 224/256, or 1 for tiny."}
    )
    control_rank: int = field(default=16, metadata={"help": "Rank of the control; it has biases."})
    control_alpha: float = field(default=1.0, metadata={"help": "Plain multiplier of the control."})
    lora_rank: int = field(
        default=1, metadata={"help": "Rank of LoRA and DoRA on fc1, fc2 (eye1, eye2); 0: match the control."}
    )
    lora_alpha: float = field(default=2.0, metadata={"help": "LoRA's updates are scaled by alpha/rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA's A."})
    epochs: int = field(default=50, metadata={"help": "Passes over the training images."})
    lr: float = field(default=5e-3, metadata={"help": "Learning rate of SGD in the first epoch."})
    momentum: float = field(default=0.9, metadata={"help": "SGD's."})
    lr_decay: float = field(default=0.95, metadata={"help": "The learning rate's factor after each epoch."})
    batch_size: int = field(default=128, metadata={"help": "Images per step."})
    eval_batch_size: int = field(default=256, metadata={"help": "Images per evaluation step."})
    precision: Literal["auto", "fp16", "bf16", "fp32"] = field(
        default="auto", metadata={"help": "Autocast type; auto: fp16 with a loss scaler on a GPU, else fp32."}
    )
    seed: int = field(default=42, metadata={"help": "Seeds order, crops and the new parameters."})
    deterministic: bool = field(
        default=False, metadata={"help": "Deterministic GPU kernels alone: the same bits again, slower."}
    )
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    output_dir: Optional[str] = field(
        default=None, metadata={"help": "Default: results/vit/<model>_<data>_<method>_seed<seed>."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the folder's last checkpoint."})
    evaluate: Optional[str] = field(
        default=None, metadata={"help": "Do not train: evaluate this adapter folder on --data."}
    )
    predict: Optional[str] = field(
        default=None, metadata={"help": "Do not train: classify the images of this folder with --adapter."}
    )
    adapter: Optional[str] = field(default=None, metadata={"help": "The adapter folder for --predict."})
    output: str = field(default="predictions.csv", metadata={"help": "The CSV file of --predict."})

    #: Options that do not change what a run comes to.
    _NEUTRAL = (
        "data_root", "keep", "workers", "eval_batch_size", "device", "output_dir", "resume",
        "evaluate", "predict", "adapter", "output",
    )  # fmt: skip

    def complete(self) -> None:
        """Fill in what depends on the model, and raise a `UserError` for a value that cannot be."""
        check_method(self.method, METHODS)
        tiny = self.model == TINY
        self.image_size = self.image_size or (8 if tiny else 224)
        self.augment = self.augment or ("none" if tiny else "published")
        self.crop = self.crop or (1.0 if tiny else 224 / 256)
        sizes = ("batch_size", "eval_batch_size", "workers", "image_size", "control_rank")
        check_numbers(self, "epochs", "lr", *sizes, above=0)
        check_numbers(self, "lr_decay", "crop", above=0, at_most=1)
        check_numbers(self, "lora_rank", "momentum", at_least=0)
        check_numbers(self, "lora_dropout", at_least=0, below=1)
        check_numbers(self, "seed", at_least=0, at_most=LARGEST_SEED)
        check_numbers(self, "control_alpha", "lora_alpha")
        if tiny and self.data != "digits":
            raise UserError("--model tiny is made for --data digits: choose a timm model for other data")
        if self.validation_share is not None:
            self._check_validation()

    def _check_validation(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UserError(
                f"--validation_share must lie between 0 and 1, both excluded, got {self.validation_share}"
            )
        if self.evaluate or self.predict:
            raise UserError("--validation_share is for training: leave it out with --evaluate and --predict")
        if SEARCH_FOLDER not in self.folder.resolve().parts:
            raise UserError(
                f"--validation_share needs an --output_dir below a folder named {SEARCH_FOLDER}: its scores are not of "
                "test images, and tables leave that folder out"
            )

    @property
    def model_name(self) -> str:
        """The model in names of runs."""
        return model_name(self.model)

    @property
    def folder(self) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = run_name(self.model, self.data, self.method, self.seed)
        if self.validation_share is None:
            return RESULTS / "vit" / name
        return RESULTS / "vit" / SEARCH_FOLDER / f"{name}_lr{self.lr}"

    @property
    def scored(self) -> str:
        """What kind of images accuracies are of, for people."""
        return "test" if self.validation_share is None else "held-out"

    def hyperparameters(self) -> dict:
        """Everything that decides the outcome, paths by their public names."""
        chosen = {name: value for name, value in asdict(self).items() if name not in self._NEUTRAL}
        for name in ("model", "data"):
            if Path(chosen[name]).exists():
                chosen[name] = public_path(chosen[name])
        return chosen

    def identity(self) -> dict:
        """What a run in the same folder must share to be this run: the above and the contents of local files."""
        files = {f"{name}_sha256": Path(getattr(self, name)).expanduser() for name in ("model", "data")}
        return {
            **self.hyperparameters(),
            **{name: fingerprint(path) for name, path in files.items() if path.exists()},
        }


# -- the three programs --------------------------------------------------------------------------------------


def train(options: Options, device: torch.device) -> None:
    """Train and evaluate after each epoch; leaves record, adapter, predictions and log in the run's folder."""
    precision = choose_precision(options.precision, device)
    identity = {**options.identity(), "precision": precision}
    with RunFolder(options.folder) as folder:
        if folder.finished:
            folder.claim(identity)
            print(f"{folder.path} is finished: nothing to do")
            return
        created = utc_now()
        data = load_data(
            options.data,
            root=options.data_root,
            corrupt=options.corrupt,
            keep=options.keep,
            workers=options.workers,
        )
        if options.validation_share is not None:
            data = hold_out(data, options.validation_share)
        data.place(device, options.keep)
        seed_everything(options.seed)
        vit, base, base_weights = load_base(options, len(data.classes))
        memory = MemoryMeter(device)
        model = vit.to(device)
        total = sum(p.numel() for p in model.parameters())
        memory.after_load()
        model = add_adapter(model, options.method, adapter_settings(options), options.mlp_layers).to(device)
        set_memory(model, options.memory, options.cuda_graphs)
        checkpoint = folder.claim(identity, resume=options.resume)
        with folder.logging_from("vit", terminal=True):
            counts = count_parameters(model)
            logger.info(
                "%s: %s trained of %s parameters",
                options.method,
                f"{counts['trainable_parameters']:,}",
                f"{total + counts['adapter_parameters']:,}",
            )
            history, clock, logits = fit(options, model, data, device, precision, folder, checkpoint, memory)
        description = Description(
            options.method, options.model, base.architecture, base.sha256, options.image_size,
            options.mlp_layers, options.crop, data.classes,
        )  # fmt: skip
        with whole_folder(folder.adapter, sealed=False) as place:
            save(model, place, description, base_weights)
        if isinstance(data.test, Decoded):
            write_predictions(
                folder.path / "predictions.csv",
                logits,
                data.classes,
                truth=[data.classes[label] for label in data.test.labels.tolist()],
            )
        finish_record(
            options, folder, created, device, base, total, data,
            adapter={
                "config": model.peft_config["default"].to_dict() if isinstance(model, PeftModel) else None,
                "dtype": "float32", **counts,
            },
            history=history,
            metrics={"best": max(history, key=lambda row: row["test_accuracy"]), "last": history[-1]},
            memory={**memory.summary(), "images_on_device_bytes": resident_bytes(data)},
            time=clock.summary(),
        )  # fmt: skip
        discard(folder.checkpoints)
        best, last = max(row["test_accuracy"] for row in history), history[-1]["test_accuracy"]
        print(
            f"{options.method}: {options.scored} accuracy {last:.2f} % (best epoch {best:.2f} %), "
            f"{clock.summary()['examples_per_second'] or 0:.0f} images/s; record in {folder.record}"
        )


def evaluate(options: Options, device: torch.device) -> None:
    """Test accuracy of a saved adapter on `--data`, printed and recorded."""
    created = utc_now()
    if options.output_dir:
        with RunFolder(options.output_dir) as folder:
            check_no_training(folder)
    model, description, base = restore(
        options.evaluate, attention=options.attention, model=moved_model(options)
    )
    adopt(options, description)
    data = load_data(
        options.data,
        root=options.data_root,
        corrupt=options.corrupt,
        keep=options.keep,
        workers=options.workers,
    )
    check_classes(data, description)
    run = Path(options.evaluate).resolve().parent.name
    options.output_dir = options.output_dir or str(RESULTS / "vit" / f"{run}_evaluated_on_{data.name}")
    with RunFolder(options.folder) as folder:
        data.place(device, options.keep)
        memory = MemoryMeter(device)
        step = evaluation_step(model.to(device), device, options)
        clock = Throughput(device)
        clock.start()
        logits, labels = test_logits(step, data, options, device)
        clock.step(len(labels))
        clock.stop()
        result = score(logits, labels)
        write_predictions(
            folder.path / "predictions.csv",
            logits,
            data.classes,
            truth=[data.classes[label] for label in labels.tolist()],
        )
        total = sum(p.numel() for p in model.parameters())
        finish_record(
            options, folder, created, device, base, total, data, adapter={"id": public_path(options.evaluate)},
            history=[], metrics={"best": result, "last": result}, memory=memory.summary(), time=clock.summary(),
        )  # fmt: skip
        print(
            f"test accuracy {result['test_accuracy']:.2f} % on {len(labels)} images; "
            f"record in {folder.record}"
        )


def check_no_training(folder: RunFolder) -> None:
    """Raises UserError: a training's record, adapter or checkpoints are in the folder, which the evaluation's files would
    overwrite or be taken for."""
    trained = folder.adapter.exists() or folder.checkpoints.exists()
    if trained or (folder.finished and read_record(folder.record).history):
        raise UserError(f"{folder.path} holds a training run: choose another --output_dir for its evaluation")


def classify_folder(options: Options, device: torch.device) -> None:
    """Classify every image below a folder into a CSV file: file, class, probability."""
    if options.adapter is None:
        raise UserError("--predict needs --adapter with the adapter folder of a finished run")
    model, description, _ = restore(options.adapter, attention=options.attention, model=moved_model(options))
    adopt(options, description)
    paths, pixels = read_folder(options.predict, options.corrupt, options.workers)
    labels = torch.zeros(len(pixels), dtype=torch.long)
    data = ImageData("folder", *[Decoded(pixels, labels)] * 2, description.classes, {})
    logits, _ = test_logits(evaluation_step(model.to(device), device, options), data, options, device)
    names = [path.relative_to(Path(options.predict).expanduser()).as_posix() for path in paths]
    write_predictions(Path(options.output), logits, description.classes, names=names)
    print(f"{len(paths)} images classified in {options.output}")


# -- their parts --------------------------------------------------------------------------------------------


def load_base(options: Options, num_classes: int) -> tuple[nn.Module, Base, dict | None]:
    """The frozen model, where it is from and, for the tiny one trained on the spot, its weights."""
    shape = {"num_classes": num_classes, "image_size": options.image_size}
    rest = {"mlp_layers": options.mlp_layers, "attention": options.attention}
    if options.model != TINY:
        return *build_base(options.model, options.architecture, **shape, **rest), None
    vit, base = build_tiny(**shape)
    weights = {name: value for name, value in vit.state_dict().items() if not name.startswith("head.")}
    set_mlp_layers(vit, options.mlp_layers)
    set_attention(vit, options.attention)
    return vit, base, weights


def adapter_settings(options: Options) -> AdapterSettings:
    control = ControlSettings(options.control_rank, options.control_alpha, bias=True)
    return AdapterSettings(control, options.lora_rank, options.lora_alpha, options.lora_dropout)


def fit(
    options: Options, model: nn.Module, data: ImageData, device: torch.device, precision: str,
    folder: RunFolder, checkpoint: Path | None, memory: MemoryMeter,
) -> tuple[list[dict], Throughput, torch.Tensor]:  # fmt: skip
    """All epochs with their evaluations; returns the history, the clock and the last test logits.

    Order, crops and dropout follow from the seed, the epoch and the batch alone, so a resumed run repeats what an
    uninterrupted one does, wherever in an epoch it stopped.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written after the batch that was under way.
        UserError: the loss is NaN or infinite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, options.lr, momentum=options.momentum)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.lr_decay)
    step = Step(model, optimizer, device, precision)
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": step.scaler}
    steps = -(-len(data.train) // options.batch_size)
    history, losses = load_checkpoint(checkpoint, model, parts, device) if checkpoint else ([], None)
    done = len(history) * steps + (losses.batches if losses else 0)
    clock, watch, logits = Throughput(device), LossWatch(device), None
    if len(history) == options.epochs:  # it was stopped after its last checkpoint
        logits, _ = test_logits(step, data, options, device)

    def save(step_number: int, losses: EpochLoss | None = None) -> None:
        watch.check(steps, kept(folder))
        check_parameters(parameters, step_number, kept(folder))
        save_checkpoint(folder.checkpoints, step_number, model, parts, history, losses)

    bar = tqdm(total=options.epochs * steps, initial=done, desc=options.method, unit="step", disable=None)
    with bar, StopRequest() as stop:
        for epoch in range(len(history), options.epochs):
            first, numbers = epoch * steps, itertools.count(losses.batches if losses else 0)

            def before_step(epoch: int = epoch, numbers: Iterator[int] = numbers) -> None:
                torch.manual_seed(seed_of(options.seed, epoch, next(numbers)))  # dropout's

            def after_step(loss: torch.Tensor, examples: int) -> bool:
                nonlocal done
                done += 1
                memory.after_optimizer()
                clock.step(examples)
                bar.update()
                watch.add(loss, done)
                if watch.due(done):
                    watch.check(steps, kept(folder))
                return stop.number is not None

            rate = optimizer.param_groups[0]["lr"]
            clock.start()
            losses = train_epoch(
                step, epoch_batches(options, data, device, epoch, losses), after_step, before_step, losses
            )
            clock.stop()
            if stop.number is not None and done < first + steps:
                save(done, losses)
                raise Interrupted(stop.number)
            schedule.step()
            logits, labels = test_logits(step, data, options, device)
            row = {"step": first + steps, "epoch": epoch + 1, "learning_rate": rate, "train_loss": losses.mean,
                   "train_seconds": clock.seconds, **score(logits, labels)}  # fmt: skip
            losses = None
            history.append(row)
            logger.info(
                "epoch %d of %d: training loss %.4f, %s accuracy %.2f %%",
                epoch + 1,
                options.epochs,
                row["train_loss"],
                options.scored,
                row["test_accuracy"],
            )
            bar.set_postfix(loss=f"{row['train_loss']:.3f}", accuracy=f"{row['test_accuracy']:.2f}")
            save(first + steps)
            if stop.number is not None:
                raise Interrupted(stop.number)
    return history, clock, logits


def seed_of(seed: int, epoch: int, batch: int) -> int:
    """A seed for what is random about one batch."""
    return ((seed * 100_003 + epoch) * 1_000_003 + batch) % 2**63


def epoch_batches(
    options: Options, data: ImageData, device: torch.device, epoch: int, losses: EpochLoss | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The epoch's batches in its own order, those after `losses.batches` when it is gone on with."""
    order = torch.Generator().manual_seed(options.seed * 100_003 + epoch)
    done = losses.batches if losses else 0
    numbers = itertools.count(done)

    def views(sizes: torch.Tensor) -> augment.Views:
        if options.augment != "published":
            return augment.central_views(sizes, options.image_size, options.crop)
        generator = torch.Generator().manual_seed(seed_of(options.seed, epoch, next(numbers)))
        return augment.random_views(sizes, options.image_size, generator)

    indices = index_batches(len(data.train), options.batch_size, order)[done:]
    return prepared(data.train, indices, views, options.image_size, device)


def kept(folder: RunFolder) -> str:
    """What there is to go on from, in words."""
    found = checkpoints(folder.checkpoints)
    return f"{found[0].name} is the last good state" if found else "no checkpoint was written yet"


def test_logits(step: Step, data: ImageData, options: Options, device: torch.device):
    """Logits and labels of the test images, each shown once as in evaluation."""
    views = partial(augment.central_views, size=options.image_size, crop=options.crop)
    indices = index_batches(len(data.test), options.eval_batch_size)
    return predict(step, prepared(data.test, indices, views, options.image_size, device))


def evaluation_step(model: nn.Module, device: torch.device, options: Options) -> Step:
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return Step(model, unused, device, choose_precision(options.precision, device))


def moved_model(options: Options) -> str | None:
    """`--model` if the user gave one beside `--evaluate` or `--predict`."""
    return options.model if options.model != Options.model else None


def adopt(options: Options, description: Description) -> None:
    """Evaluation shows images as the adapter's training did."""
    options.method, options.image_size = description.method, description.image_size
    options.mlp_layers, options.crop = description.mlp_layers, description.crop
    options.model = description.model


def check_classes(data: ImageData, description: Description) -> None:
    """Raises UserError: the data's classes are not the head's."""
    if len(data.classes) > len(description.classes):
        raise UserError(
            f"{data.name} has {len(data.classes)} classes, more than the adapter's head ({len(description.classes)})"
        )
    if data.classes != description.classes:
        raise UserError(
            f"the classes of {data.name} ({', '.join(data.classes[:3])}, ...) are not those that the adapter was "
            f"trained on ({', '.join(description.classes[:3])}, ...)"
        )


def resident_bytes(data: ImageData) -> int:
    parts = [part for part in (data.train, data.test) if isinstance(part, Decoded) and part.labels.is_cuda]
    return sum(part.bytes for part in parts)


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, parts: dict, history: list[dict], losses: EpochLoss | None
) -> None:
    """Write checkpoint-STEP and keep one before it; `losses` are those of an epoch that is not at its end."""
    with whole_folder(folder / f"checkpoint-{step}") as place:
        save_file({n: v.contiguous() for n, v in trained_state(model).items()}, place / "trained.safetensors")
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "losses": None if losses is None else asdict(losses)}, place / "state.pt")
        write_json_atomic(place / "trainer_state.json", {"step": step, "history": history})
    keep_newest(folder, 2)


def load_checkpoint(
    place: Path, model: nn.Module, parts: dict, device: torch.device
) -> tuple[list[dict], EpochLoss | None]:
    """Restore what `save_checkpoint` wrote; returns the history and the losses of the epoch to go on with.

    Raises:
        UserError: it does not fit this run.
    """
    try:
        state = load_file(place / "trained.safetensors")
        own = trained_state(model)
        if state.keys() != own.keys():
            raise ValueError("it holds other parameters")
        for name, value in own.items():
            value.copy_(state[name])
        loaded = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(loaded[name])
        losses = loaded["losses"] and EpochLoss(**loaded["losses"])
        if losses:
            losses.total = losses.total.to(device)
        return read_json(place / "trainer_state.json")["history"], losses
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{place} is no checkpoint of this run ({error}): delete it to start over") from error


def write_predictions(
    path: Path,
    logits: torch.Tensor,
    classes: list[str],
    names: list[str] | None = None,
    truth: list[str] | None = None,
) -> None:
    """A CSV file, written atomically: file or index, predicted class, its probability and, if known, the truth."""
    probability, chosen = logits.softmax(1).max(1)
    first = names if names is not None else range(len(logits))
    columns = ["file" if names is not None else "index", "predicted", "probability"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    with partial_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "true"] if truth else columns)
        rows = zip(
            first,
            [classes[i] for i in chosen.tolist()],
            [f"{p:.4f}" for p in probability.tolist()],
            strict=True,
        )
        for index, row in enumerate(rows):
            writer.writerow([*row, truth[index]] if truth else row)
    os.replace(partial_path, path)


def finish_record(
    options: Options, folder: RunFolder, created: str, device: torch.device, base: Base, total: int,
    data: ImageData, **results,
) -> None:  # fmt: skip
    RunRecord(
        domain="vit",
        name=folder.path.name,
        method=options.method,
        task=data.name,
        seed=options.seed,
        command=["python", *sys.argv],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model={"id": base.id, "sha256": base.sha256, "class": base.architecture, "total_parameters": total},
        data={**data.identity, "sizes": {"train": len(data.train), options.scored: len(data.test)}},
        hyperparameters={**options.hyperparameters(), "optimizer": "SGD", "weight_decay": 0.0,
                         "autocast": choose_precision(options.precision, device)},
        **results,
    ).write(folder.record)  # fmt: skip


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.complete()
    if options.model == TINY:
        torch.set_num_threads(
            1
        )  # its tensors are too small to share, and threads that wait for each other are slow
    if options.evaluate and options.predict:
        raise UserError("choose one of --evaluate and --predict")
    quieten()
    if options.deterministic:
        make_deterministic()
    program = evaluate if options.evaluate else classify_folder if options.predict else train
    device = select_device(options.device)
    with explain_out_of_memory(device, LESS_MEMORY):
        program(options, device)


if __name__ == "__main__":
    run_main(main)
