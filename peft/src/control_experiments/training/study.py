"""A study: each method's learning rate chosen on held-out training data, then runs with it on the test sets.

The protocol is the one of results/README.md. A domain says how a run is named, trained and scored (it subclasses `Study`); which
runs there are and in which order is decided here, once for all domains.

Any number of processes may work on the same folder, with the same command: each takes the next run that no other one works on,
under a lock that a dying process lets go of. Finished runs are skipped and unfinished ones resumed, so the same command also
completes what was interrupted, or what --max_minutes ended. A run that fails stops no other.
"""

from __future__ import annotations

import fcntl
import gc
import json
import shlex
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import ClassVar, Optional

from transformers.hf_argparser import HfArg

from ..errors import UserError
from ..paths import SEARCH_FOLDER
from ..record import read_json, read_record
from .arguments import check_numbers, parse_arguments

#: Options whose record says what "auto" came to.
SETTLED = ("precision", "dtype", "attention")
#: Folder for the locks of runs that are worked on.
LOCKS = ".lock"
#: Seed of the runs that choose learning rates, which no table has.
SEARCH_SEED = 0


@dataclass(kw_only=True)
class StudyOptions:
    """What the runs of a study differ in; a domain's options add what they share."""

    methods: list[str] = HfArg(
        default_factory=lambda: ["control", "lora", "dora"],
        help="Methods, each perhaps with options of its own: 'double control:control_rank=8,control_alpha=0.5'.",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [1, 2, 3], help="Seeds.")
    grid: Optional[list[float]] = HfArg(
        default=None,
        help="Learning rates from which each method gets its own for each task, chosen on held-out training data; "
        "default: --lr for all, no search.",
    )
    growth: int = HfArg(default=0, help="Rates to add at most beyond an edge of --grid while the best one lies on it.")
    search_share: float = HfArg(default=0.1, help="Share of the training data on which the search scores.")
    search_only: bool = HfArg(default=False, help="Choose the learning rates and stop there.")
    gpus: Optional[list[str]] = HfArg(
        default=None, help="GPUs by index, with a process on each; or all that are visible, or cpu. Default: --device alone."
    )
    max_minutes: Optional[float] = HfArg(default=None, help="Begin no run that would end later.")
    max_hours: Optional[float] = HfArg(default=None, help="The same in hours.")
    dry_run: bool = HfArg(default=False, help="Print what would be run and run nothing.")
    # what the study itself says of each run
    method: str = field(init=False, default="control")
    seed: int = field(init=False, default=0)
    resume: bool = field(init=False, default=True)

    def check_study(self) -> None:
        """Raise `UserError` for what the runs themselves do not check."""
        if self.search_only and not self.grid:
            raise UserError("--search_only needs --grid with the learning rates to choose from")
        if self.grid and not 0 < self.search_share < 1:
            raise UserError(f"--search_share must lie between 0 and 1, both excluded, got {self.search_share}")
        check_numbers(self, "growth", at_least=0)
        check_numbers(self, "max_minutes", "max_hours", above=0)
        if wrong := [gpu for gpu in self.gpus or () if gpu not in ("all", "cpu") and not gpu.isdecimal()]:
            raise UserError(f"--gpus takes indices, cpu or all, got {wrong[0]!r}")


@dataclass(frozen=True)
class Arm:
    """A method with the options that are its own in this study; `text` is both as they were given."""

    text: str

    @property
    def method(self) -> str:
        return self.text.partition(":")[0]

    @property
    def own(self) -> dict[str, object]:
        """Options of the run by name. Raises UserError: they are not written NAME=VALUE,NAME=VALUE."""
        parts = [part.partition("=") for part in self.text.partition(":")[2].split(",") if part]
        if not all(name and equals for name, equals, _ in parts):
            raise UserError(f"--methods {self.text!r}: after a method come options as NAME=VALUE,NAME=VALUE")
        return {name: _value(text) for name, _, text in parts}

    @property
    def slug(self) -> str:
        """The arm in names of folders."""
        words = [self.method.replace(" ", "_"), *(f"{name}{value}" for name, value in self.own.items())]
        return "_".join(words)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Cell:
    """One run of a study; `searching` runs choose the learning rate, the others are tested with the chosen one."""

    task: str
    arm: Arm
    seed: int
    lr: float
    searching: bool

    def __str__(self) -> str:
        kind = "search" if self.searching else "test"
        return f"[{kind}] {self.arm.text} on {Path(self.task).stem}, lr {self.lr}, seed {self.seed}"


class Study(ABC):
    """Runs what is left of a study; subclasses know their domain.

    Args:
        model: the model in names of runs.
        tasks: the data sets, in order.
        output: the folder of all runs.
    """

    #: Methods that nothing is trained for, so that they have neither learning rates nor seeds.
    untrained: ClassVar[tuple[str, ...]] = ()
    #: What a record calls the score of a run; larger is better.
    metric: ClassVar[str] = "score"

    def __init__(self, options: StudyOptions, model: str, tasks: Sequence[str], output: Path):
        self.options, self.output = options, output
        self.model, self.tasks = model, list(tasks)
        self.minutes = options.max_minutes if options.max_hours is None else 60 * options.max_hours
        self.end = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        self.longest = 0.0
        self.failed: dict[str, str] = {}
        self.arms = [Arm(text) for text in dict.fromkeys(options.methods)]
        self._scores: dict[Cell, float] = {}
        self._chosen: dict[tuple[str, Arm], float | None] = {}

    @abstractmethod
    def plan(self, cell: Cell) -> object:
        """The options of the cell's run, checked."""

    @abstractmethod
    def train(self, cell: Cell, run: object) -> None:
        """Train and evaluate the run that `plan` made. Raises Diverged: its loss is not finite."""

    def records(self, cell: Cell) -> list[Path]:
        """The records that a finished run has left, the one with its score last."""
        return [self.folder(cell) / "record.json"]

    def folder(self, cell: Cell) -> Path:
        """The folder of the cell's run."""
        name = f"{self.model}_{Path(cell.task).stem}_{cell.arm.slug}"
        if cell.arm.method in self.untrained:
            return self.output / name
        name += f"_seed{cell.seed}"
        return self.output / SEARCH_FOLDER / f"{name}_lr{cell.lr}" if cell.searching else self.output / name

    def check(self) -> None:
        """Raise `UserError`, before anything is loaded or written, for a run that cannot be."""
        for task, arm, rate in product(self.tasks, self.arms, self.options.grid or [self.options.lr]):
            seeds = [(seed, False) for seed in self.options.seeds] + [(SEARCH_SEED, True)] * bool(self.options.grid)
            for seed, searching in seeds:
                self.plan(Cell(task, arm, seed, rate, searching))

    # -- what is left to do -----------------------------------------------------------------------------------

    def left(self) -> list[Cell]:
        """The runs to do next: those of searches, and tests of methods whose search is done; each method gets its
        first seed before any gets its second one."""
        searches = [cell for task, arm in product(self.tasks, self.arms) for cell in self.searches(task, arm)]
        return searches + [cell for cell in self.tests() if not self.is_done(cell)]

    def searches(self, task: str, arm: Arm) -> list[Cell]:
        """What the search for one method's learning rate lacks; once that is nothing, the rate with the best score is chosen, the
        smallest of equals."""
        if (task, arm) in self._chosen:
            return []
        if not self.options.grid or arm.method in self.untrained:
            self._chosen[task, arm] = self.options.lr
            return []
        rates, chosen = sorted({*self.options.grid}), None
        for _ in range(self.options.growth + 1):
            runs = [Cell(task, arm, SEARCH_SEED, rate, True) for rate in rates]
            if left := [cell for cell in runs if not self.is_done(cell)]:
                return left
            scores = {cell.lr: self._scores[cell] for cell in runs if cell in self._scores}  # the others diverged
            chosen = max(scores, key=scores.__getitem__, default=None)
            best = rates[0] if chosen is None else chosen
            if len(rates) < 2 or best not in (rates[0], rates[-1]):
                break
            beyond_edge = beyond(rates[0], rates[1]) if best == rates[0] else beyond(rates[-1], rates[-2])
            rates = sorted([*rates, beyond_edge])
        self._chosen[task, arm] = chosen
        if chosen is not None:
            print(f"{arm.text} on {Path(task).stem}: lr {chosen} is chosen", flush=True)
        return []

    def tests(self) -> Iterator[Cell]:
        """The runs on test sets of all methods whose learning rate is known."""
        if self.options.search_only:
            return
        for number, (seed, task, arm) in enumerate(product(self.options.seeds, self.tasks, self.arms)):
            first = number < len(self.tasks) * len(self.arms)
            if (rate := self._chosen.get((task, arm))) is not None and (first or arm.method not in self.untrained):
                yield Cell(task, arm, seed, rate, False)

    def is_done(self, cell: Cell) -> bool:
        """Whether a run is finished, or diverged. Raises UserError: it had other settings."""
        if cell in self._scores or self.diverged(cell):
            return True
        records = self.records(cell)
        if not all(record.is_file() for record in records):
            return False
        if cell.arm.method not in self.untrained:
            run, again = self.plan(cell), "delete such folders or choose another --output_dir"
            found, wanted = read_record(records[0]).hyperparameters, run.hyperparameters()
            for name in wanted.keys() & found.keys() - set(SETTLED):
                if found[name] != wanted[name]:
                    raise UserError(f"{self.folder(cell)} has {name} {found[name]}, not {wanted[name]}: {again}")
            if (noted := self.folder(cell) / "run.json").is_file():  # shipped runs have none
                before, now = read_json(noted), run.identity()
                for name in ("model", "data"):  # None where nothing is there, as of a hub id
                    if None not in (old := before.get(f"{name}_sha256"), new := now.get(f"{name}_sha256")) and old != new:
                        raise UserError(f"{self.folder(cell)} had other contents of --{name}: {again}")
        self._scores[cell] = read_record(records[-1]).metrics["last"][self.metric]
        return True

    def diverged(self, cell: Cell) -> bool:
        """Whether a run cannot be finished, which its lock notes."""
        return self.lock(cell).is_file() and self.lock(cell).stat().st_size > 0

    # -- doing it ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until nothing is left, or the time is up. Raises UserError: runs failed or diverged, or a finished run has other
        settings."""
        while left := [cell for cell in self.left() if self.name(cell) not in self.failed]:
            if self.end is not None and time.monotonic() + self.longest > self.end:
                break
            if not any(self.take(cell) for cell in left):  # other processes work on all that is left
                time.sleep(0.5)
        tests, problems = [*self.tests()], [f"{name} failed: {why}" for name, why in self.failed.items()]
        lost = [self.name(cell) for cell in tests if self.diverged(cell)]
        hopeless = [f"{arm.text} on {Path(task).stem}" for (task, arm), rate in self._chosen.items() if rate is None]
        if lost and not left:
            problems.insert(0, f"{len(lost)} of {len(tests)} runs diverged: {', '.join(lost)}")
        if hopeless and not left:
            problems.insert(0, f"{', '.join(hopeless)} diverges with every learning rate of --grid: add lower")
        if problems:
            raise UserError("; ".join(problems))
        if left:
            print(f"the next run does not fit into {self.minutes:g} minutes: the same command goes on")
        else:
            print(f"all {len(tests)} runs are finished" if tests else "all learning rates are chosen")

    def name(self, cell: Cell) -> str:
        return self.folder(cell).name

    def lock(self, cell: Cell) -> Path:
        return self.output / LOCKS / self.name(cell)

    def take(self, cell: Cell) -> bool:
        """Do the run unless another process holds its lock, or has finished it; whether it was tried here."""
        from .losses import Diverged  # with torch, for which --help and a wrong option do not wait

        self.lock(cell).parent.mkdir(parents=True, exist_ok=True)
        with self.lock(cell).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.is_done(cell):
                return False
            began = time.monotonic()
            print(cell, flush=True)
            try:
                self.train(cell, self.plan(cell))
            except Diverged as error:  # it would again
                file.write(str(error))
                what = f"lr {cell.lr} is not chosen" if cell.searching else self.name(cell)
                print(f"warning: {what}: {error}", file=sys.stderr)
            except UserError as error:
                self.failed[self.name(cell)] = str(error)
                print(f"warning: {self.name(cell)} failed: {error}", file=sys.stderr, flush=True)
            finally:
                free_memory()
            self.longest = max(self.longest, time.monotonic() - began)
            return True

    def command(self, cell: Cell) -> str:
        run = self.plan(cell)
        domain = type(run).__module__.partition(".")[0]
        return shlex.join(["python", "-m", f"{domain}.finetune", *command_of(run)])


def beyond(edge: float, inner: float) -> float:
    """The learning rate on the other side of a grid's edge, as far away as the one inside, to one digit."""
    return float(f"{edge * edge / inner:.0e}")


def free_memory() -> None:
    """Let go of what a run held, so that the next one's memory holds none of it: a model's parts refer to each other."""
    import torch

    gc.collect()
    gc.freeze()  # what is left was imported or read for all runs: collections need not look at it again
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_run(kind: type, options: object, arm: Arm, **own: object):
    """Options of one run of `kind`: those that it shares with the study's `options`, the arm's and `own`, checked.

    Raises UserError: the arm names an option that a run does not have, or a value cannot be.
    """
    known = {entry.name for entry in fields(kind) if entry.init}
    shared = {entry.name: getattr(options, entry.name) for entry in fields(options) if entry.name in known}
    for name in arm.own:
        if name not in known or name in own:
            raise UserError(f"--methods {arm.text!r}: a run has no option {name!r} of its own")
    run = kind(**{**shared, "method": arm.method, **own, **arm.own})
    run.check()
    return run


def command_of(run) -> list[str]:
    """The arguments with which a domain's finetune.py makes the same run."""
    words = []
    for entry in fields(run):
        value = getattr(run, entry.name)
        usual = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.init and value != usual:
            words += [f"--{entry.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_study(study: type[Study], options: type[StudyOptions], description: str | None) -> None:
    """A domain's program: the study that its command line asks for, on one GPU, or in a process on each of several."""
    (given,) = parse_arguments(options, description=description)
    given.check_study()
    asked = study(given)
    asked.check()
    if given.dry_run:
        for cell in asked.left():
            print(asked.command(cell))
        return
    import torch  # for which --help and a wrong option do not wait

    from .device import select_device

    gpus = list(dict.fromkeys(given.gpus or [given.device]))
    if "all" in gpus:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    if not gpus:
        raise UserError("no GPU is visible: add --gpus cpu to run on the CPU, or --dry_run to see the commands")
    if len(gpus) > 1:
        return run_on_each(gpus)
    device = select_device(gpus[0])  # once for all runs, by its index among those that this process still sees
    given.device = "cpu" if device.type == "cpu" else str(device.index)
    asked.run()


def run_on_each(gpus: Sequence[str]) -> None:
    """Run this process's command on each of several GPUs at once. Raises UserError: one of the processes failed."""
    # a terminal's Ctrl-C then reaches this process alone, which asks each to end once: a second signal would cost its checkpoint
    commands = [[sys.executable, *sys.orig_argv[1:], "--gpus", gpu] for gpu in gpus]
    processes = [subprocess.Popen(command, start_new_session=True) for command in commands]
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    if failed := [gpu for gpu, code in zip(gpus, codes, strict=True) if code]:
        raise UserError(f"not all could be done on GPU {', '.join(failed)} (reasons above)")
