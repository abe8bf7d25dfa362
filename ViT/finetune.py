"""Fine-tune a timm Vision Transformer on images with control, LoRA or another adapter, or a linear probe; write a run record.

    python -m ViT.finetune --method control                                    ViT-B/16 on CIFAR-100 from the hubs
    python -m ViT.finetune --method control --data digits --model tiny --device cpu --epochs 20 --batch_size 32 --lr 0.05   no hub
    python -m ViT.finetune --evaluate results/vit/RUN/adapter --data flowers102         test accuracy of an adapter
    python -m ViT.finetune --predict PHOTOS --adapter results/vit/RUN/adapter --output classes.csv

The defaults are the paper's recipe, except that --mlp_layers 4 and --attention eager give its exact model. What
the options trade: --attention sdpa needs 3 GB less than eager and gives the same results; --memory fast, balanced
and lean lower the control's peak on models that support them; --keep host leaves the images in main memory. See ViT/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS, SEARCH_FOLDER
from control_experiments.training import options as shared
from control_experiments.training.arguments import check_numbers, parse_arguments

#: torchvision's data sets, by the names that `--data` takes.
HUB = ("cifar100", "flowers102", "svhn", "food101", "imagenet")
#: The architecture of the CPU demonstration (tiny_model.py), beside timm's own.
TINY = "tiny"
#: SHADOW, as peft has it, corrects decoders of transformers, and no timm ViT.
METHODS = tuple(name for name in shared.METHODS if name != "shadow")


def check_model(name: str) -> None:
    """Raises UserError: `--model` is a path, and nothing is there."""
    path = Path(name).expanduser()
    is_path = path.suffix in (".safetensors", ".npz", ".pth", ".pt") or len(path.parts) > 2
    if is_path and not path.exists():
        raise UserError(f"there is no model {name!r}")


def model_name(model: str) -> str:
    """A --model in names of runs."""
    path = Path(model)
    path = path.parent if path.stem == "model" else path
    return path.stem if path.suffix in (".npz", ".safetensors") else path.name


@dataclass(kw_only=True)
class RecipeOptions(shared.AdapterOptions, shared.MemoryOptions, shared.TrainingOptions):
    """All that one run and a table of runs share (small_table.py)."""

    data: str = HfArg(
        default="cifar100",
        help="cifar100, flowers102, svhn, food101, imagenet (torchvision), digits (scikit-learn), or the path of an .npz, "
        "a tar or a folder with train/CLASS/ and test/CLASS/.",
    )
    data_root: str = HfArg(default="data", help="Where torchvision keeps its downloads.")
    keep: Literal["auto", "device", "host", "files"] = HfArg(
        default="auto", help="Where decoded images lie; auto: on the GPU if they fit, else host, else in files."
    )
    image_size: Optional[int] = HfArg(default=None, help="Pixels; 224, or for tiny 8 with digits, else 32.")
    augment: Optional[Literal["published", "none"]] = HfArg(default=None, help="published: crop and flip.")
    crop: Optional[float] = HfArg(default=None, help="Share of the side in evaluation; 224/256; tiny: 1.")
    model: str = HfArg(
        default="vit_base_patch16_224.orig_in21k",
        help="timm name, a .safetensors or original .npz file, a folder, or tiny (needs no hub).",
    )
    architecture: Optional[str] = HfArg(default=None, help="timm name, for weights from a file.")
    mlp_layers: Literal[2, 4] = HfArg(default=2, help="2: the ordinary ViT; 4: with the paper's two identity layers.")
    attention: Literal["eager", "sdpa"] = HfArg(default="sdpa", help="sdpa is fused.")
    quantization: Literal["none", "fp8"] = HfArg(
        default="none", help="fp8: the blocks' frozen linear layers in 8-bit floating point."
    )
    method: str = HfArg(default="control", help=f"One of {', '.join(METHODS)} (head only).")
    lora_rank: int = HfArg(default=1, help="Of LoRA, DoRA and MiSS; 0: parameters as the control's.")
    lora_alpha: float = HfArg(default=2.0, help="LoRA's updates are scaled by alpha/rank.")
    lora_targets: Optional[list[str]] = HfArg(
        default=None,
        help="Linear layers for LoRA, DoRA and MiSS: names of qkv proj fc1 fc2, or all; default: the MLP's, and qkv beside a "
        "control.",
    )
    epochs: int = HfArg(default=50, help="Passes over the training images.")
    lr: float = HfArg(default=5e-3, help="Largest learning rate.")
    lr_head: Optional[float] = HfArg(default=None, help="The head's own largest learning rate; default: --lr.")
    optimizer: Literal["sgd", "adamw"] = HfArg(default="sgd", help="adamw: warm-up, then half a cosine.")
    momentum: float = HfArg(default=0.9, help="SGD's.")
    lr_decay: float = HfArg(default=0.95, help="SGD: the learning rate's factor after each epoch.")
    warmup_steps: int = HfArg(default=0, help="AdamW: steps in which the learning rate rises from 0.")
    weight_decay: float = HfArg(default=0.0, help="On every trained parameter.")
    batch_size: int = HfArg(default=128, help="Images per step.")
    eval_batch_size: int = HfArg(default=256, help="Images per evaluation step.")
    precision: shared.Precision = HfArg(default="auto", help="Autocast; auto: fp16, scaled, on a GPU, else fp32.")

    neutral: ClassVar[tuple[str, ...]] = ("data_root", "keep", "eval_batch_size")
    methods: ClassVar[tuple[str, ...]] = METHODS
    smallest_lora_rank: ClassVar[int] = 0

    def check(self) -> None:
        """Fill in what depends on the model, and raise a `UserError` for a value that cannot be."""
        tiny = self.model == TINY
        if self.image_size is None:
            self.image_size = 224 if not tiny else 8 if self.data == "digits" else 32
        if self.crop is None:
            self.crop = 1.0 if tiny else 224 / 256
        self.augment = self.augment or ("none" if tiny else "published")
        super().check()
        if self.data not in (*HUB, "digits") and not Path(self.data).exists():
            known = f"{', '.join(HUB)}, digits, an .npz, a tar or a folder of class folders"
            raise UserError(f"no data {self.data!r}: give one of {known}")
        check_model(self.model)
        check_numbers(self, "image_size", "eval_batch_size", "workers", "lr_head", above=0)
        check_numbers(self, "lr_decay", "crop", above=0, at_most=1)
        check_numbers(self, "momentum", "warmup_steps", "weight_decay", at_least=0)
        if self.lr_head is not None and self.method == "probe":
            raise UserError("--lr_head is for methods with an adapter: the probe's only rate is --lr")
        if self.warmup_steps and self.optimizer == "sgd":
            raise UserError("--warmup_steps is for --optimizer adamw: SGD's rate starts at --lr")


@dataclass(kw_only=True)
class Options(RecipeOptions, shared.RunOptions, shared.SearchOptions):
    workers: int = HfArg(default=8, help="Threads or processes that decode images.")
    output_dir: Optional[str] = HfArg(default=None, help="Default: results/vit/MODEL_DATA_METHOD_seedSEED.")
    evaluate: Optional[str] = HfArg(default=None, help="Do not train: evaluate this adapter on --data.")
    predict: Optional[str] = HfArg(default=None, help="Do not train: classify a folder with --adapter.")
    adapter: Optional[str] = HfArg(default=None, help="The adapter folder for --predict.")
    output: str = HfArg(default="predictions.csv", help="The CSV file of --predict.")

    neutral: ClassVar[tuple[str, ...]] = ("evaluate", "predict", "adapter", "output")

    def check(self) -> None:
        if self.validation_share is not None and (self.evaluate or self.predict):
            raise UserError("--validation_share is for training: leave it out with --evaluate and --predict")
        super().check()
        if self.evaluate and self.predict:
            raise UserError("choose one of --evaluate and --predict")
        if self.predict and not self.adapter:
            raise UserError("--predict needs --adapter with the adapter folder of a finished run")

    @property
    def folder(self) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = f"{model_name(self.model)}_{Path(self.data).stem}_{self.method.replace(' ', '_')}_seed{self.seed}"
        if self.validation_share is None:
            return RESULTS / "vit" / name
        return RESULTS / "vit" / SEARCH_FOLDER / f"{name}_lr{self.lr}"

    @property
    def scored(self) -> str:
        """What kind of images accuracies are of, for people."""
        return "test" if self.validation_share is None else "held-out"


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from ViT import inference, recipe  # with torch and timm, for which --help and a wrong option do not wait

    if options.evaluate:
        inference.evaluate(options)
    elif options.predict:
        inference.classify_folder(options)
    else:
        recipe.train(options)


if __name__ == "__main__":
    run_main(main)
