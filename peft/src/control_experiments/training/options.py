"""Options that several scripts take, as dataclasses that a script's own inherits and transformers' parser reads.

    @dataclass(kw_only=True)
    class Options(RunOptions, AdapterOptions, MemoryOptions, TrainingOptions):
        lr: float = HfArg(default=5e-3, help="...")          another default, or an option of its own

Each group checks its own values in `check`, and calls `super().check()`. Nothing here imports torch or a model: `--help` and
a wrong option are answered at once.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, Optional, get_args

from transformers.hf_argparser import HfArg

from ..errors import UserError
from ..paths import SEARCH_FOLDER, public_path
from .arguments import check_numbers
from .checksums import local_fingerprint

#: Every method by the name that launchers take, and what it is.
METHODS = {
    "control": "a low-rank path parallel to each chosen frozen block (the paper's method)",
    "lora": "low-rank updates of chosen weights",
    "dora": "LoRA with the weights' magnitudes trained apart from their directions",
    "double control": "control parallel to both the attention and the mlp block",
    "control+lora": "control on the mlp block and LoRA on chosen weights, in one adapter",
    "control+dora": "control on the mlp block and DoRA on chosen weights, in one adapter",
    "miss": "MiSS: one small matrix a weight, shared by its input's shards (peft's)",
    "shadow": "SHADOW: a small network beside the whole decoder, whose states correct each layer's input (peft's)",
    "probe": "no adapter: only the task's head is trained",
}
Quantization = Literal["none", "nf4", "fp4", "int8", "fp8"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
Precision = Literal["auto", "fp32", "bf16", "fp16"]
QUANTIZATION_HELP = (
    "Frozen linear layers in 4 bits (nf4, fp4; scales quantized again) or 8 (int8) by bitsandbytes, or in 8-bit floating "
    "point, which is fast on GPUs of compute capability 8.9 and up (fp8); none: as they are."
)
STREAM_HELP = (
    "The layers' frozen weights wait in the host's memory and come to the GPU as they are needed: for models larger than it."
)
#: What accelerate launch can ask FSDP for that is not done here, by the variable that it sets.
_NOT_DONE = {"FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params", "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing"}
#: Options that say what a run is; its record states them in fields of their own.
_NAMED = ("method", "task", "model", "data", "seed")


def processes() -> int:
    """How many processes torchrun or accelerate launch has started for this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def public_id(name: str) -> str:
    """A hub id as it is, a file or folder without what it tells about the machine."""
    return public_path(name) if Path(name).expanduser().exists() else name


class _Group:
    """The root of all groups, where the chain of `super().check()` ends."""

    #: Options that do not change what a run comes to; each group lists its own.
    neutral: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be, before anything is loaded or written."""


@dataclass(kw_only=True)
class RunOptions(_Group):
    """Where a run happens and where its files go."""

    output_dir: Optional[str] = HfArg(default=None, help="Folder for adapter, record, log and checkpoints.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    seed: int = HfArg(default=42, help="Seeds data order, dropout and the new parameters.")
    deterministic: bool = HfArg(default=False, help="Deterministic GPU kernels: the same bits again, slower.")
    workers: int = HfArg(default=0, help="Processes that make batches; no effect on results.")
    resume: bool = HfArg(default=False, help="Go on from the output folder's last checkpoint.")

    neutral: ClassVar[tuple[str, ...]] = ("output_dir", "device", "workers", "resume")

    def check(self) -> None:
        super().check()
        if self.output_dir == "":  # as a path it is the current folder
            raise UserError("the output folder's name is empty: give one")
        check_numbers(self, "seed", at_least=0, at_most=2**32 - 1)  # NumPy's largest
        check_numbers(self, "workers", at_least=0)

    @property
    def folder(self) -> Path:
        """The run's folder; scripts that know a name for it override this."""
        if self.output_dir is None:
            raise UserError("--output_dir is needed: name a folder for the run")
        return Path(self.output_dir)

    def hyperparameters(self) -> dict:
        """Everything that decides the outcome, besides what the run is called."""
        kinds = type(self).__mro__
        left_out = {*_NAMED, *(name for kind in kinds for name in vars(kind).get("neutral", ()))}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def identity(self) -> dict:
        """What a run in the same folder must share to be this run: paths by their public names, and what they hold."""
        found = {name: getattr(self, name) for name in _NAMED if hasattr(self, name)}
        for name in ("model", "data"):
            if isinstance(place := found.get(name), str):
                found[name] = public_id(place)
                found[f"{name}_sha256"] = local_fingerprint(self.contents(name))
        return {**found, **self.hyperparameters()}

    def contents(self, name: str) -> Path:
        """The file or folder whose checksum stands for option `name`."""
        return Path(getattr(self, name))

    @classmethod
    def defaults(cls) -> dict:
        """What every option says that nobody gave, where it has a default."""
        given = ((entry.name, entry.default, entry.default_factory) for entry in fields(cls))
        found = {name: value if make is MISSING else make() for name, value, make in given}
        return {name: value for name, value in found.items() if value is not MISSING}


@dataclass(kw_only=True)
class SearchOptions(_Group):
    """For a run that only helps to choose hyperparameters."""

    validation_share: Optional[float] = HfArg(
        default=None,
        help="For choosing hyperparameters: this share of the training rows, the same for every seed, is held out and scored in "
        f"the place of the test rows. --output_dir must lie below a folder named {SEARCH_FOLDER}.",
    )

    def check(self) -> None:
        super().check()
        check_numbers(self, "validation_share", above=0, below=1)
        if self.validation_share is not None and SEARCH_FOLDER not in self.folder.resolve().parts:
            raise UserError(
                f"--validation_share needs an --output_dir below a folder named {SEARCH_FOLDER}: its scores are not of test "
                "rows, and tables leave that folder out"
            )


@dataclass(kw_only=True)
class AdapterOptions(_Group):
    """What is trained; see `METHODS`."""

    method: str = HfArg(help=f"What to train: {', '.join(METHODS)}.")
    control_rank: int = HfArg(default=16, help="Rank of the control.")
    control_alpha: float = HfArg(default=1.0, help="Plain multiplier of the control.")
    control_dropout: float = HfArg(default=0.0, help="Dropout between the control's A and B.")
    control_blocks: list[str] = HfArg(default_factory=lambda: ["mlp"], help="Controlled: mlp, attention.")
    lora_rank: int = HfArg(default=8, help="Rank of LoRA and DoRA.")
    lora_alpha: float = HfArg(default=16, help="LoRA's updates are scaled by alpha/rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before LoRA's A.")
    lora_targets: Optional[list[str]] = HfArg(default=None, help="LoRA's modules; else the recipe's.")

    #: The methods that the script knows.
    methods: ClassVar[tuple[str, ...]] = tuple(METHODS)
    #: 0 where a script takes it for ranks that give as many parameters as the control has.
    smallest_lora_rank: ClassVar[int] = 1

    def check(self) -> None:
        super().check()
        check_method(self.method, self.methods)
        check_numbers(self, "control_rank", at_least=1)
        check_numbers(self, "lora_rank", at_least=self.smallest_lora_rank)
        check_numbers(self, "control_dropout", "lora_dropout", at_least=0, below=1)
        check_numbers(self, "control_alpha", "lora_alpha")
        wrong = [block for block in self.control_blocks if block not in ("mlp", "attention")]
        if wrong or not self.control_blocks:
            raise UserError(f"--control_blocks are mlp, attention or both, got {' '.join(wrong) or 'none'}")


@dataclass(kw_only=True)
class MemoryOptions(_Group):
    """How a step is computed; the results are the same."""

    memory: Literal["plain", "fast", "balanced", "lean"] = HfArg(
        default="plain", help="How little the frozen blocks keep for the backward; same results."
    )
    chunk_tokens: Optional[int] = HfArg(default=None, help="Tokens per recomputed chunk of an MLP.")
    offload: Literal["auto", "always", "never", "fp8"] = HfArg(
        default="auto",
        help="Whether lean's states wait in host memory; auto: where that costs no time; fp8: in 8 bits, for twice the tokens.",
    )
    cuda_graphs: bool = HfArg(default=False, help="Replay steps as CUDA graphs: for small models.")

    neutral: ClassVar[tuple[str, ...]] = ("chunk_tokens", "offload")

    def check(self) -> None:
        super().check()
        check_numbers(self, "chunk_tokens", at_least=1)
        if self.memory == "plain" and (self.chunk_tokens is not None or self.offload != "auto"):
            raise UserError("--chunk_tokens and --offload are for --memory fast, balanced or lean")
        if self.offload == "fp8" and self.memory != "lean":
            raise UserError("--offload fp8 is for --memory lean")


@dataclass(kw_only=True)
class BaseOptions(_Group):
    """How the frozen weights are stored, beside the run's, the adapter's and the memory's options. `accelerate launch --use_fsdp
    --fsdp_version 2` asks for --shard fsdp2 too."""

    quantization: Quantization = HfArg(default="none", help=QUANTIZATION_HELP)
    shard: Literal["ddp", "fsdp2"] = HfArg(
        default="ddp", help="What several processes share: ddp: the rows; fsdp2: the frozen weights too."
    )

    neutral: ClassVar[tuple[str, ...]] = ("shard",)

    def check(self) -> None:
        super().check()
        if _is_set("ACCELERATE_USE_FSDP"):  # by accelerate launch
            if os.environ.get("FSDP_VERSION", "1") != "2":
                instead = "add --fsdp_version 2 to accelerate launch, or start with torchrun and --shard fsdp2"
                raise UserError(f"FSDP1 is not supported: {instead}")
            for variable, option in _NOT_DONE.items():
                if _is_set(variable):
                    raise UserError(f"{option} true is not supported: leave it out; --memory lean needs less too")
            # accelerate and transformers would act on it too, once a model is loaded
            os.environ["ACCELERATE_USE_FSDP"] = "false"
            self.shard = "fsdp2"
        if self.shard == "fsdp2" and self.quantization not in ("none", "fp8"):
            raise UserError(f"--quantization {self.quantization} cannot be sharded: choose fp8, or --shard ddp")
        if self.shard == "fsdp2" and self.cuda_graphs:
            raise UserError("--cuda_graphs cannot replay the gathering of shards: leave it out, or choose --shard ddp")
        check_method_runs(self.method, self.quantization, self.device)


@dataclass(kw_only=True)
class TrainingOptions(_Group):
    """How long and how fast a model learns."""

    epochs: float = HfArg(default=3, help="Passes over the training set.")
    max_steps: int = HfArg(default=-1, help="Stop after so many optimizer steps; -1: after --epochs.")
    lr: float = HfArg(default=3e-4, help="Peak learning rate.")
    batch_size: int = HfArg(default=64, help="Rows per optimizer step, over all processes.")

    def check(self) -> None:
        super().check()
        check_numbers(self, "epochs", "lr", "batch_size", above=0)
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserError(f"--max_steps must be at least 1, or -1 for no limit, got {self.max_steps}")
        if self.batch_size % processes():
            raise UserError(f"--batch_size {self.batch_size} must be a multiple of the {processes()} processes")


@dataclass(kw_only=True)
class TrainerOptions(TrainingOptions):
    """What transformers' Trainer takes besides (AdamW with a schedule)."""

    # all but the schedules that need arguments of their own
    scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = HfArg(default="linear", help="How the learning rate goes on after the warm-up.")
    weight_decay: float = HfArg(default=0.0, help="AdamW's, on every trained parameter, biases too.")
    eval_steps: int = HfArg(default=0, help="Evaluate every so many steps; 0: after each epoch.")
    report_to: Literal["none", "tensorboard", "wandb"] = HfArg(
        default="none", help="Also log there (WANDB_MODE=offline needs no account)."
    )

    neutral: ClassVar[tuple[str, ...]] = ("report_to",)

    def check(self) -> None:
        super().check()
        check_numbers(self, "weight_decay", "eval_steps", at_least=0)


def check_method(method: str, known: tuple[str, ...]) -> None:
    """Raise UserError for a method that is none of `known`; the message lists them."""
    if method not in known:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(known)}")


def check_streaming(options: object) -> None:
    """Raise UserError for options that do not go together with `--stream_weights True`."""
    wrong = {
        "--cuda_graphs": getattr(options, "cuda_graphs", False),
        "--memory fast": getattr(options, "memory", "plain") == "fast",
        "--shard fsdp2": getattr(options, "shard", "ddp") == "fsdp2" and processes() > 1,
        "--quantization int8": options.quantization == "int8",
        "--method shadow": options.method == "shadow",
    }
    for option, given in wrong.items():
        if given:
            raise UserError(f"--stream_weights does not go together with {option}: leave one of the two out")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def check_method_runs(method: str, quantization: str, device: object) -> None:
    """Raise UserError for DoRA over 8-bit weights on a CPU: each forward reads the weights' norms, and on a CPU peft
    (0.21) loses the layer's scales while it does."""
    if quantization == "int8" and "dora" in method and str(device) == "cpu":
        raise UserError(f"{method} over int8 needs a GPU: choose --quantization nf4, fp4, fp8 or none on a CPU")
