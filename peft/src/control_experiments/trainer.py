"""transformers' Trainer as the experiments use it: metered, with the papers' weight decay, reproducible on resume."""

from __future__ import annotations

import logging
import sys

import torch
from torch.utils.data import Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .metering import MemoryMeter, Throughput

logger = logging.getLogger(__name__)


class ResumableLengthSampler(LengthGroupedSampler):
    """Groups rows by length with an order that depends on seed and epoch alone, so a run resumed within an epoch
    sees the rows that it would have seen, and every process of a distributed run draws the same order."""

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return super().__iter__()


class ExperimentTrainer(Trainer):
    """A Trainer that decays every trained parameter, biases too (the paper's AdamW), and meters memory and time.

    Evaluation and prediction keep the data set's order whatever the sampling strategy: sort by length beforehand.
    With `--train_sampling_strategy group_by_length` the training set needs a `length` column.

    Args:
        memory: meter that gets its optimizer mark after the first step.
        All others are the Trainer's.
    """

    def __init__(self, *args, memory: MemoryMeter, **kwargs):
        super().__init__(*args, **kwargs)
        self.throughput = Throughput(self.args.device)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Meter(self.throughput, memory))
        self.add_callback(_ProgressBar())

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        examples = len(next(iter(inputs.values())))
        self.throughput.add(examples, 0 if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with self.throughput.left_out():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self.throughput.left_out():
            super()._save_checkpoint(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return ResumableLengthSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            # from the full data set: what arrives here has lost the columns that the model does not take
            lengths=self.train_dataset[self.args.length_column_name],
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class _Meter(TrainerCallback):
    """Tells the meters where training and its steps begin and end."""

    def __init__(self, throughput: Throughput, memory: MemoryMeter):
        self.throughput, self.memory = throughput, memory

    def on_train_begin(self, *_, **__):
        self.throughput.start()

    def on_step_end(self, *_, **__):
        self.throughput.step()
        self.memory.after_optimizer()

    def on_train_end(self, *_, **__):
        self.throughput.stop()


class _ProgressBar(TrainerCallback):
    """One bar with the time left and the last figures; the figures also go to the log."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            # a file or a pipe gets a line now and then, a terminal a moving bar
            interval = 0.2 if sys.stderr.isatty() else 20.0
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                mininterval=interval,
                dynamic_ncols=True,
            )

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        figures = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, figures)
        if self.bar is not None:
            shown = {
                name: value
                for name, value in figures.items()
                if name == "loss"
                or not name.endswith(("loss", "runtime", "per_second", "epoch", "rate", "norm"))
            }
            self.bar.set_postfix(
                {name: f"{float(value):.4f}" for name, value in shown.items()}, refresh=False
            )

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
