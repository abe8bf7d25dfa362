"""transformers' Trainer as the experiments use it: metered, with the papers' weight decay, and losing nothing.

A run that was killed, stopped by a signal or cut off by a full disk goes on from its newest whole checkpoint and ends,
on a CPU, bit for bit as if nothing had happened.
"""

from __future__ import annotations

import logging
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import BatchSampler, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import Interrupted, StopRequest, UserError
from ..record import read_json, write_json_atomic
from .checkpoints import begin, keep_newest, last_good, publish
from .losses import LossWatch, check_parameters
from .metering import MemoryMeter, Throughput
from .options import processes
from .setup import Run
from .sharding import average_gradients, is_sharded

logger = logging.getLogger(__name__)

#: What the Trainer's own checkpoint lacks: its loss since the last entry in the log.
_PROGRESS = "progress.json"


def training_arguments(run: Run, **own: object) -> TrainingArguments:
    """A run's options in the Trainer's terms; `own` are the script's, which win."""
    options = run.options
    shared = {
        "output_dir": str(run.folder.checkpoints),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.batch_size // processes(),
        "learning_rate": options.lr,
        "lr_scheduler_type": options.scheduler,
        "weight_decay": options.weight_decay,
        "optim": "adamw_torch",
        "bf16": run.precision == "bf16",
        "fp16": run.precision == "fp16",
        "seed": options.seed,
        "logging_nan_inf_filter": False,  # the ExperimentTrainer stops at such a loss
        "label_names": ["labels"],
        "report_to": options.report_to,
        "run_name": run.folder.path.name,
        "use_cpu": run.device.type == "cpu",
        "dataloader_num_workers": options.workers,
        "disable_tqdm": True,  # the ExperimentTrainer has its own bar
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**{**shared, **own})


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


class SharedBatches(BatchSampler):
    """The batches of one process's run, each cut into a part for every process: part 0 of the first batch, part 1, ...

    A short last batch is shared out too, so parts may differ in size; `share` says how much one weighs. Where there are
    fewer units than processes, those left over get the batch's first unit, which then weighs nothing.

    Args:
        sampler: yields single rows in the epoch's order, the same in every process.
        batch_size: rows per batch, over all processes.
        unit: so many rows stay together; `batch_size` is a multiple of `unit * processes`.
    """

    def __init__(self, sampler: Sampler, batch_size: int, processes: int, unit: int = 1):
        super().__init__(sampler, batch_size, drop_last=False)
        self.processes, self.unit = processes, unit

    def parts(self, rows: int) -> list[range]:
        """Which units of a batch of so many rows each process gets."""
        units = -(-rows // self.unit)
        edges = [units * process // self.processes for process in range(self.processes + 1)]
        return [range(first, last) for first, last in pairwise(edges)]

    def __iter__(self):
        for batch in super().__iter__():
            for part in self.parts(len(batch)):
                chosen = part or range(1)
                yield batch[chosen.start * self.unit : chosen.stop * self.unit]

    def __len__(self) -> int:
        return super().__len__() * self.processes

    def share(self, step: int, process: int) -> float:
        """What to multiply a process's mean loss over its part with, for the mean over all processes to be the mean
        over the batch's units, at the epoch's step of number `step` (from 0)."""
        rows = min(self.batch_size, len(self.sampler) - step * self.batch_size)
        parts = self.parts(rows)
        return len(parts[process]) * self.processes / parts[-1].stop


class ExperimentTrainer(Trainer):
    """A Trainer that decays every trained parameter, biases too (the paper's AdamW), meters memory and time, and writes
    checkpoints that are whole or not there.

    SIGINT and SIGTERM are noted: after the step that is under way a checkpoint is written and `train` raises
    `Interrupted`. A loss or a trained parameter that is NaN or infinite raises `UserError` before it is saved.
    Several processes share out each batch of what one process would do, so that losses and gradients are the same; each
    holds the whole model (DDP) unless it comes sharded (`sharding.shard_frozen`).
    Evaluation and prediction keep the data set's order whatever the sampling strategy: sort by length beforehand.
    With `--train_sampling_strategy group_by_length` the training set needs a `length` column.

    Args:
        memory: meter that gets its optimizer mark after the first step.
        unit: so many rows of a batch stay in one process.
        All others are the Trainer's.
    """

    def __init__(self, *args, memory: MemoryMeter, unit: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.sharded = is_sharded(self.model)
        # else the Trainer multiplies a classifier's mean loss by the number of processes
        self.model_accepts_loss_kwargs = False
        self.unit = unit
        self._shared: SharedBatches | None = None
        self.throughput = Throughput(self.args.device)
        self.losses = LossWatch(self.args.device)
        self.remove_callback(PrinterCallback)
        self._bar = _ProgressBar()
        for callback in (_Keeper(self, memory), self._bar):
            self.add_callback(callback)
        self._stop = StopRequest()
        # over gloo, so that no process waits for its GPU; made now, for who waits here for one that died waits long
        self._host_group = dist.new_group(backend="gloo") if self.args.world_size > 1 else None
        self._aside: Path | None = None
        self._resumed_from: str | None = None

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As the Trainer's. Raises Interrupted: a signal asked the run to end; its checkpoint is written;
        UserError: the loss is NaN or infinite, or Weights & Biases refuses."""
        self._resumed_from = resume_from_checkpoint
        try:
            with self._stop:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except Exception as error:
            if type(error).__module__.startswith("wandb."):
                told = f"--report_to wandb: {error}"
                raise UserError(f"{told} (WANDB_MODE=offline needs no account)") from error
            raise
        finally:
            self._bar.bar.close()
        if self._stop.number is not None:
            raise Interrupted(self._stop.number)
        return output

    def stop_requested(self) -> bool:
        """Whether a signal came, to this process or to any other of the run; all get the same answer."""
        if self.args.world_size > 1:
            self._stop.number = self.greatest(self._stop.number or 0) or None
        return self._stop.number is not None

    def greatest(self, number: int) -> int:
        """The greatest of the numbers that the processes of the run give."""
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(found)

    def kept(self) -> str:
        """What there is to go on from, in words."""
        return last_good(Path(self.args.output_dir))

    def check_losses(self) -> None:
        """Raise UserError if a training loss so far was NaN or infinite; this waits for the device."""
        batches = len(self.callback_handler.train_dataloader)
        self.losses.check(-(-batches // self.args.gradient_accumulation_steps), self.kept())

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # resumed from its last checkpoint, within an epoch: the Trainer would do one more step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model, trial) -> None:
        with self.throughput.left_out():
            trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
            check_parameters(trained, self.state.global_step, self.kept())
            root = Path(self.args.output_dir)
            place = root / f"checkpoint-{self.state.global_step}"
            self._aside = place.with_name(f".{place.name}.partial")
            if self.args.should_save:
                begin(place)
            if self.sharded:
                # saving would do so in the process that saves alone, and then it alone would gather again
                self.model.reshard()
            try:
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)  # to where `_get_output_dir` says
                best = self._find_best_checkpoint()
                loss = float(self.accelerator.gather(self._tr_loss.reshape(1)).mean())
                progress = {"loss_since_log": loss, "last_logged": self._globalstep_last_logged}
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    written = self._aside / place.name
                    write_json_atomic(written / _PROGRESS, progress)
                    self.state.save_to_json(str(written / "trainer_state.json"))
                    (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
                    publish(written, place)
                    keep_newest(root, self.args.save_total_limit, best)
            finally:
                if self.args.should_save:
                    shutil.rmtree(self._aside, ignore_errors=True)
                self._aside = None
            self.accelerator.wait_for_everyone()

    def restore_progress(self) -> None:
        """Take up the loss since the last entry in the log, and find the best checkpoint again if the folder moved."""
        self._find_best_checkpoint()
        if self._resumed_from is not None:
            progress = read_json(Path(self._resumed_from) / _PROGRESS)
            self._tr_loss.fill_(progress["loss_since_log"])
            self._globalstep_last_logged = progress["last_logged"]

    def _find_best_checkpoint(self) -> Path | None:
        step = self.state.best_global_step
        best = None if step is None else Path(self.args.output_dir) / f"checkpoint-{step}"
        self.state.best_model_checkpoint = None if best is None else str(best)
        return best

    def _move_model_to_device(self, model, device) -> None:
        if not is_sharded(model):  # shards are where they belong, and may refuse to be moved
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model, training: bool = True, **kwargs):
        if self.sharded and training:
            # autocast alone, and accelerate then leaves the model as it is: DDP would refuse the shards
            return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, training=training, **kwargs)

    def average_gradients(self) -> None:
        """What DDP does within the last backward of a step; of a sharded model, frozen weights alone are FSDP's."""
        if self.sharded:
            average_gradients(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.args.world_size > 1:
            # accelerate's: it deals out whole batches of the sampler that it wraps
            shard, processes = loader.batch_sampler, self.args.world_size
            batch_size = self.args.train_batch_size * processes
            self._shared = SharedBatches(shard.batch_sampler.sampler, batch_size, processes, self.unit)
            shard.batch_sampler, shard.batch_size, shard.even_batches = self._shared, None, False
        return loader

    def loss_share(self) -> float:
        """What to multiply this process's mean loss with; 1 unless several processes share out a short batch."""
        if self._shared is None:
            return 1.0
        steps = len(self.callback_handler.train_dataloader)
        return self._shared.share(self.state.global_step % steps, self.args.process_index)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training or self._shared is None:
            return found
        share = self.loss_share()
        return (found[0] * share, found[1]) if return_outputs else found * share

    def floating_point_ops(self, inputs) -> int:
        return 0  # nobody reads it, and the Trainer would count the model's parameters anew at each step

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        examples = len(next(iter(inputs.values())))
        self.throughput.add(examples, 0 if mask is None else mask.sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.average_gradients()
        self.losses.add(loss, self.state.global_step + 1)
        return loss

    def evaluate(self, *args, **kwargs):
        with self.throughput.left_out():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        name = f"{metric_key_prefix}_loss"
        if self.args.world_size > 1 and name in output.metrics:
            # processes fill their last batch up with rows from the first; the gathered predictions are without them
            outputs, labels = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
            regression = outputs.shape[-1] == 1
            loss = mse_loss(outputs[:, 0], labels) if regression else cross_entropy(outputs, labels)
            output.metrics[name] = loss.item()
        return output

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return ResumableLengthSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            # from the full data set: what arrives here has lost the columns that the model does not take
            lengths=list(self.train_dataset[self.args.length_column_name]),  # a column looks each one up anew
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class _Keeper(TrainerCallback):
    """Decides when to look at the losses and when to save, beside what the arguments ask for, and tells the meters where
    training and its steps begin and end."""

    def __init__(self, trainer: ExperimentTrainer, memory: MemoryMeter):
        self.trainer, self.memory = trainer, memory
        self.save_at_epoch_end = False

    def on_train_begin(self, *_, **__):
        self.trainer.throughput.start()
        self.trainer.restore_progress()

    def on_train_end(self, *_, **__):
        self.trainer.throughput.stop()

    def on_epoch_begin(self, args, state, control, **_):
        sampler = getattr(self.trainer._shared, "sampler", None)
        if hasattr(sampler, "set_epoch"):  # accelerate does not always find it
            sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **_):
        self.trainer.throughput.step()
        self.memory.after_optimizer()
        if self.trainer.stop_requested():
            control.should_save = control.should_training_stop = True
        looked_at = control.should_log or control.should_evaluate or control.should_save
        if looked_at or self.trainer.losses.due(state.global_step):
            self.trainer.check_losses()
        if self._ends_epoch(state) and control.should_save:
            # the evaluation that belongs to this step comes after the epoch's end; a checkpoint must hold it
            control.should_save, self.save_at_epoch_end = False, True

    def on_epoch_end(self, args, state, control, **_):
        self.trainer.check_losses()
        if self.save_at_epoch_end:
            control.should_save, self.save_at_epoch_end = True, False
        elif not self._ends_epoch(state):  # the Trainer calls this too when a signal stops it within an epoch
            control.should_log = control.should_evaluate = control.should_save = False

    @staticmethod
    def _ends_epoch(state) -> bool:
        return float(state.epoch).is_integer() or state.global_step >= state.max_steps


class _ProgressBar(TrainerCallback):
    """One bar with the time left and the last figures; the figures also go to the log."""

    def __init__(self):
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args, state, control, **_):
        # a file or a pipe gets a line now and then, a terminal a moving bar
        how = {"mininterval": 0.2 if sys.stderr.isatty() else 20.0, "disable": not state.is_world_process_zero}
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, **how)

    def on_step_end(self, args, state, control, **_):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        figures = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, figures)
        hidden = ("_loss", "runtime", "per_second", "epoch", "rate", "norm", "flos")
        shown = {name: f"{float(figures[name]):.4f}" for name in figures if not name.endswith(hidden)}
        self.bar.set_postfix(shown, refresh=False)
