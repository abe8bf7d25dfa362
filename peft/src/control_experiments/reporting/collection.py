"""All run records below a results folder, sorted into comparisons whose runs differ in nothing but method and seed.

A table, a claim or a picture that compares methods takes its runs from here, so that what may be compared with what is
decided once: the same model, data, device and settings. A run that differs, two runs that claim one place, and a record that
cannot be read become a `Problem` that names the file; the place in question stays empty.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..record import RunRecord, read_record

#: Folders below results/ whose runs belong to no comparison of methods: a demonstration, and runs that choose or vary settings.
LEFT_OUT = ("quickstart", "learning_rate_search", "ablations")
#: Columns of the commonsense tables, in the paper's order.
COMMONSENSE = (
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa", "average",
)  # fmt: skip
#: The setting of the runs that quantized ones are compared with.
UNQUANTIZED = "not quantized"
#: Ranks that need no mention in a method's label; other domains always mention them.
_USUAL_RANKS = {"roberta": (16, 8), "qcontrol": (16, 8), "vit": (16, 1)}
#: Hyperparameters in which methods may differ from each other, but seeds of one method may not.
_METHODS_OWN = (
    "lr", "learning_rate", "memory", "cuda_graphs", "gradient_checkpointing", "shard", "lora_", "control_",
)  # fmt: skip
#: Hyperparameters that change neither what is learned nor what it costs, or that name what is compared.
_NEUTRAL = ("method", "seed", "task", "data", "model", "limit", "mode", "quantization", "mlp_layers")


@dataclass(frozen=True)
class Place:
    """Where a run belongs: a comparison, a row of it (method with what else tells rows apart), and a seed."""

    domain: str
    model: str
    setting: str
    task: str
    row: str
    seed: int

    @property
    def comparison(self) -> tuple[str, str, str, str]:
        return (self.domain, self.model, self.setting, self.task)


@dataclass
class Run:
    """One finished run as the tables see it.

    Attributes:
        record, scored: of the training, and of the evaluation where that is apart (else the same).
        links: its record files, relative to the results folder; training first, then its evaluation if that is apart.
        best, last: column -> score in percent, of the best and of the last evaluation.
        shared: conditions that all runs of a comparison must have in common.
        own: conditions that all seeds of one row must have in common.
        shared_gpu: whether other processes used its GPU, so that its times say little.
    """

    place: Place
    record: RunRecord
    scored: RunRecord
    links: list[str]
    best: dict[str, float]
    last: dict[str, float]
    shared: dict[str, str]
    own: dict[str, str]
    shared_gpu: bool = False

    @property
    def method(self) -> str:
        return self.record.method

    @property
    def trained_parameters(self) -> int | None:
        return self.record.adapter.get("trainable_parameters")

    @property
    def resumed(self) -> bool:
        """Whether memory and time cover only a part of the run."""
        return self.record.time.get("resumed_from_step") is not None

    @property
    def peak_bytes(self) -> int | None:
        """Peak of the GPU's allocator, or of the process's resident memory on a CPU; None when it was not measured."""
        if self.resumed:
            return None
        memory = self.record.memory
        return memory.get("peak_allocated_bytes") or memory.get("peak_resident_bytes")

    @property
    def seconds(self) -> float | None:
        """Training time, evaluations left out; None for a run that was resumed, shared its GPU, or did not train."""
        return None if self.resumed or self.shared_gpu else self.record.time.get("train_seconds")

    def per_second(self, what: str) -> float | None:
        """Training "examples" or (without padding) "tokens" a second; None where `seconds` is."""
        return self.seconds and self.record.time.get(f"{what}_per_second")


@dataclass(frozen=True)
class Problem:
    """Something that kept a run out of its place: a message that names the file and says what to do."""

    message: str
    domain: str
    place: Place | None = None


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (None for a single value) of n values."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        if not values:
            return None
        return cls(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
        )


@dataclass
class Row:
    """The runs of one method in a comparison by seed; empty with problems when they must not be shown together."""

    runs: dict[int, Run] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def summary(self, column: str, which: str = "last") -> Summary | None:
        """Of the scores over seeds, in percent; `which` is "best" or "last"."""
        return self.over_seeds(lambda run: getattr(run, which).get(column))

    def over_seeds(self, value) -> Summary | None:
        """Of `value(run)` over the seeds; None unless every run has it."""
        values = [value(run) for run in self.runs.values()]
        return None if None in values else Summary.of(values)

    @property
    def links(self) -> list[tuple[str, str]]:
        """(text, file) of each record."""
        return [
            (str(seed) if number == 0 else "answers", link)
            for seed, run in sorted(self.runs.items())
            for number, link in enumerate(run.links)
        ]


@dataclass
class Comparison:
    """Runs on one task with one model in one setting, under equal conditions."""

    domain: str
    model: str
    setting: str
    task: str
    rows: dict[str, Row]
    conditions: dict[str, str]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for run in self.runs() for column in run.last))

    def runs(self) -> Iterator[Run]:
        for row in self.rows.values():
            yield from row.runs.values()

    def first_row(self, method: str) -> str | None:
        """The label of the method's plainest row: the shortest, then the first in order."""
        labels = [
            label
            for label, row in self.rows.items()
            if any(run.method == method for run in row.runs.values())
        ]
        return min(labels, key=lambda label: (len(label), label), default=None)


@dataclass
class Collection:
    """Everything that a results folder holds.

    Attributes:
        comparisons: sorted by domain, model, setting, task.
        measurements: records without a score, such as ViT's memory table, by their path relative to `root`.
        benchmarks: files of scripts/bench_memory.py, by their path relative to `root`.
        paddings: files of RoBERTa/benchmark_padding.py, likewise.
        scalings: files of scripts/bench_scaling.py, likewise.
        problems: of all kinds; those with a place also stand in its row.
    """

    root: Path
    comparisons: list[Comparison]
    measurements: dict[str, RunRecord]
    benchmarks: dict[str, dict]
    paddings: dict[str, dict]
    scalings: dict[str, dict]
    problems: list[Problem]

    def of(self, domain: str) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.domain == domain]


def collect(root: Path) -> Collection:
    """Read every record below `root`; never raises for a broken file.

    Raises:
        UserError: `root` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one that holds the runs (default: results)")
    runs, measurements, problems = [], {}, []
    for path in sorted(root.rglob("record.json")):
        link = path.relative_to(root)
        # an evaluation lies in its training's folder and is read with it
        if any(part in LEFT_OUT for part in link.parts) or (path.parents[1] / "record.json").is_file():
            continue
        try:
            record = read_record(path)
            answers = path.parent / "evaluation" / "record.json"
            retested = record.domain == "vit" and not record.history  # of an adapter that has its own record
            if (_scores(record) and not retested) or answers.is_file():
                runs.append(_run(root, path, record))
            else:
                measurements[link.as_posix()] = _checked_measurement(path, record)
        except UserError as error:
            problems.append(_problem(root, path, str(error)))
    for path in sorted(root.glob("vit/memory/**/*.json")):
        try:
            measurements[path.relative_to(root).as_posix()] = read_record(path)
        except UserError as error:
            problems.append(_problem(root, path, str(error)))
    benchmarks, paddings, scalings = {}, {}, {}
    for found, pattern, wanted in (
        (benchmarks, "memory/**/*.json", ("schema", "device", "options", "results")),
        (paddings, "roberta/**/benchmark_padding*.json", ("device", "settings", "max_length", "longest")),
        (scalings, "scaling/**/*.json", ("schema", "device", "options", "results")),
    ):
        for path in sorted(root.glob(pattern)):
            try:
                found[path.relative_to(root).as_posix()] = _read_benchmark(path, wanted)
            except UserError as error:
                problems.append(_problem(root, path, str(error)))
    for run in runs:
        run.shared_gpu = _shared_gpu(run, runs)
    comparisons = _compare(runs, problems)
    return Collection(root, comparisons, measurements, benchmarks, paddings, scalings, problems)


def _read_benchmark(path: Path, wanted: Sequence[str]) -> dict:
    """A benchmark's file.

    Raises:
        UserError: it cannot be read, is of another schema, or lacks one of the fields `wanted`.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable benchmark ({error}): delete it and measure again") from error
    missing = [name for name in wanted if not isinstance(contents, dict) or name not in contents]
    if missing:
        raise UserError(
            f"{path} is a broken benchmark ({missing[0]!r} is missing): delete it and measure again"
        )
    if contents.get("schema", 1) != 1:
        raise UserError(
            f"{path} is a benchmark of schema {contents['schema']}, not 1: delete it and measure again"
        )
    return contents


#: Kind of measurement -> hyperparameters and last metrics that its record must have.
_MEASURED = {
    "shape benchmark": (("memory", "micro_batch_size", "cutoff", "dtype", "control_rank", "lora_rank"), ("seconds_per_step",)),
    "memory benchmark": (
        ("shape", "weights", "mode", "batch", "tokens", "dtype", "control_rank", "lora_rank"), ("seconds_per_step",),
    ),
    "throughput": (("memory", "batch_size", "cutoff", "dtype"), ("published", "packed", "large")),
    "batches": (("mode", "quantization", "dtype"), ("questions", "batch_size", "speedup", "answers_agree")),
}  # fmt: skip


def measurement_kind(record: RunRecord) -> str | None:
    """Which benchmark's the record is, or None: of ViT's memory table, or of no benchmark."""
    if "questions_per_second_batch_one" in (record.metrics.get("last") or {}):
        return "batches"
    return record.task if record.task in _MEASURED else None


def _checked_measurement(path: Path, record: RunRecord) -> RunRecord:
    """Raises UserError: the record lacks what its table needs."""
    for wanted, there in zip(
        _MEASURED.get(measurement_kind(record), ()),
        (record.hyperparameters, record.metrics.get("last") or {}),
    ):
        missing = [name for name in wanted if name not in there]
        if missing:
            raise UserError(
                f"{path} is a broken measurement ({missing[0]!r} is missing): delete it and measure again"
            )
    return record


def torch_minor(versions: dict | None) -> str | None:
    """torch's version without its patch, such as 2.14; None where it was not noted."""
    version = (versions or {}).get("torch")
    return version and ".".join(version.split(".")[:2])


# -- one run --------------------------------------------------------------------------------------------------


def _run(root: Path, path: Path, record: RunRecord) -> Run:
    """Raises UserError: the record, or the evaluation that belongs to it, lacks what a table needs."""
    links, scored, evaluation = [path.relative_to(root).as_posix()], record, None
    answers = path.parent / "evaluation" / "record.json"
    if answers.is_file():
        scored = evaluation = read_record(answers)
        links.append(answers.relative_to(root).as_posix())
    scores = _scores(scored)
    if not scores:
        raise UserError(f"{answers} holds no accuracies: delete its folder and evaluate again")
    try:
        shared, own = _conditions(record, evaluation)
        place = _place(
            _table_of(record, links[0]),
            record.model,
            record.hyperparameters,
            record.method,
            record.task,
            record.seed,
            scored,
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is a broken run record ({error} is missing): delete it and run again"
        ) from error
    return Run(place, record, scored, links, scores["best"], scores["last"], shared, own)


def _table_of(record: RunRecord, link: str) -> str:
    """The domain whose table a run belongs to.

    A quantized LLaMA stands beside the others, in a setting of its own, and QControl's launcher also makes the runs in
    16 bits that the quantized ones are compared with, which say "roberta" but lie beside those.
    """
    if record.task.startswith("commonsense"):
        return "llama"
    return "qcontrol" if link.startswith("qcontrol/") else record.domain


def _shared_gpu(run: Run, runs: Sequence[Run]) -> bool:
    """What the meter saw; of records older than that, whether another run overlaps with it on a GPU of the name."""
    one = run.record
    if one.device.get("kind") != "cuda":
        return False
    seen = one.memory.get("other_processes_bytes")
    if seen is not None:
        return seen > 0
    return any(
        other is not run
        and other.record.device.get("name") == one.device["name"]
        and one.created < other.record.finished
        and other.record.created < one.finished
        for other in runs
    )


def _scores(record: RunRecord) -> dict[str, dict[str, float]] | None:
    """{"best": {column: percent}, "last": ...}, or None for a record that holds no scores of a task."""
    found = {}
    for which in ("best", "last"):
        metrics = record.metrics.get(which)
        if not isinstance(metrics, dict):
            return None
        if isinstance(metrics.get("score"), float):
            found[which] = {record.task: 100 * metrics["score"]}
        elif isinstance(metrics.get("test_accuracy"), float):
            found[which] = {record.task: metrics["test_accuracy"]}
        elif isinstance(metrics.get("average"), float):
            found[which] = {column: metrics[column] for column in COMMONSENSE if column in metrics}
        else:
            return None
    return found


def _place(
    domain: str,
    model: dict,
    hyperparameters: dict,
    method: str,
    task: str,
    seed: int,
    scored: RunRecord | None,
) -> Place:
    # a ViT's weights come under many file names, its architecture under one
    name = (
        model.get("class") if domain == "vit" and model.get("class") else str(model["id"]).rpartition("/")[2]
    )
    settings = []
    if hyperparameters.get("quantization") not in (None, "none"):
        settings.append(str(hyperparameters["quantization"]))
    elif domain == "qcontrol":
        settings.append(UNQUANTIZED)
    if domain == "vit":
        settings.append(f"{hyperparameters.get('mlp_layers', 2)}-layer MLP")
    if scored is not None and scored.hyperparameters.get("limit"):
        settings.append(f"first {scored.hyperparameters['limit']} questions")
    if domain == "llama" and scored is not None and scored.task == "commonsense-likelihood":
        settings.append("ranked by likelihood")
    if domain == "llama":
        task = "commonsense"
    return Place(
        domain, name.lower(), ", ".join(settings), task, row_label(domain, method, hyperparameters), seed
    )


def row_label(domain: str, method: str, hyperparameters: dict) -> str:
    """A method's name with what tells its rows apart: ranks other than the domain's usual ones, memory mode, shards."""
    ranks = []
    for part, option, usual in zip(
        ("control", "lora"), ("control_rank", "lora_rank"), _USUAL_RANKS.get(domain, (None, None))
    ):
        has_part = part in method or (part == "lora" and "dora" in method)
        rank = hyperparameters.get(option)
        if has_part and rank is not None and rank != usual:
            ranks.append("matched" if rank == 0 else f"r{rank}")
    label = f"{method} {'+'.join(ranks)}" if ranks else method
    if hyperparameters.get("memory") not in (None, "plain"):
        label += f", {hyperparameters['memory']}"
    if hyperparameters.get("cuda_graphs"):
        label += ", graphs"
    if hyperparameters.get("gradient_checkpointing"):
        label += ", checkpointing"
    if hyperparameters.get("shard"):
        label += f", {hyperparameters['shard']}"
    return label


def _conditions(record: RunRecord, evaluation: RunRecord | None) -> tuple[dict[str, str], dict[str, str]]:
    shared, own, llama = {}, {}, record.task.startswith("commonsense")
    for name, value in record.hyperparameters.items():
        # the paper's recipe for LLaMA-2-7B has another batch for control+lora than for double control
        if name.startswith(_METHODS_OWN) or (llama and name == "batch_size"):
            own[name] = str(value)
        elif name not in _NEUTRAL:
            shared[name] = str(value)
    shared["device"] = record.device["name"]
    if torch := torch_minor(record.versions):  # another one may have other kernels
        shared["torch"] = torch
    shared["model"] = str(record.model.get("sha256") or record.model.get("revision"))[:12]
    shared["data"] = str(record.data.get("sha256") or record.data.get("revision"))[:12]
    if evaluation is None and llama:  # zero-shot: nothing of it is training
        shared = {
            f"evaluation {name}": value for name, value in shared.items() if name not in ("device", "torch")
        }
    elif evaluation is not None:
        answered = {
            name: str(value) for name, value in evaluation.hyperparameters.items() if name not in _NEUTRAL
        }
        shared |= {f"evaluation {name}": value for name, value in answered.items() if name != "batch_size"}
        shared["evaluation data"] = str(evaluation.data.get("sha256"))[:12]
    shared.pop("evaluation batch_size", None)
    return shared, own


def _problem(root: Path, path: Path, message: str) -> Problem:
    """A file that cannot be used, with its place if the claim beside it (run.json) tells which it is."""
    link = path.relative_to(root)
    domain, place = link.parts[0], None
    message = message.replace(str(path), link.as_posix())
    try:
        claim = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        model = {"id": Path(claim["model"]).name.partition(".orig")[0]}
        task = claim.get("task") or Path(claim["data"]).stem
        place = _place(domain, model, claim, claim["method"], task, claim["seed"], None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        place = None  # nothing says whose place it was; the message still names the file
    return Problem(message, domain, place)


# -- comparisons ----------------------------------------------------------------------------------------------


def _compare(runs: list[Run], problems: list[Problem]) -> list[Comparison]:
    """Sort runs into comparisons; adds to `problems` what must not be shown together."""
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.place.comparison].append(run)
    broken = [problem for problem in problems if problem.place is not None]
    for problem in broken:
        groups.setdefault(problem.place.comparison, [])
    comparisons = []
    for key, members in sorted(groups.items()):
        rows: dict[str, Row] = defaultdict(Row)
        reference = _most_common_conditions(members)
        by_row: dict[str, list[Run]] = defaultdict(list)
        for run in members:
            by_row[run.place.row].append(run)
        for label, claimants in sorted(by_row.items()):
            found = _row_problems(claimants, reference)
            if not found:
                rows[label].runs = {run.place.seed: run for run in claimants}
            rows[label].problems += found
            problems += found
        for problem in broken:
            if problem.place.comparison == key:
                rows[problem.place.row].runs = {}
                rows[problem.place.row].problems.append(problem)
        comparisons.append(Comparison(*key, rows=dict(rows), conditions=reference))
    return comparisons


def _most_common_conditions(runs: Sequence[Run]) -> dict[str, str]:
    """The conditions that most runs share; among equally many, those of more methods, then of the newest run."""

    def weight(run: Run) -> tuple:
        alike = [other for other in runs if not _difference(run.shared, other.shared)]
        return (
            len(alike),
            len({other.place.row for other in alike}),
            max(other.record.finished for other in alike),
        )

    return max(runs, key=lambda run: (weight(run), len(run.shared))).shared if runs else {}


def _difference(one: dict[str, str], other: dict[str, str]) -> str | None:
    """The first condition that both know and in which they differ."""
    return next((name for name in one if name in other and one[name] != other[name]), None)


def _row_problems(claimants: list[Run], reference: dict[str, str]) -> list[Problem]:
    """Why the runs of one row must not be shown, if they must not."""
    place, found = claimants[0].place, []
    seeds = Counter(run.place.seed for run in claimants)
    for seed in (seed for seed, count in seeds.items() if count > 1):
        files = [run.links[0] for run in claimants if run.place.seed == seed]
        found.append(f"{' and '.join(files)} both claim {place.row} with seed {seed}: delete one of them")
    for run in claimants:
        name = _difference(run.shared, reference)
        if name:
            found.append(
                f"{run.links[0]} was run with {name} {run.shared[name]}, the others it would be compared with have "
                f"{name} {reference[name]}: run it again under equal conditions, or move it to another results folder"
            )
    usual = Counter(json.dumps(run.own, sort_keys=True) for run in claimants).most_common(1)[0][0]
    for run in claimants:
        name = _difference(run.own, json.loads(usual))
        if name:
            found.append(
                f"{run.links[0]} was run with {name} {run.own[name]}, other seeds of {place.row} with "
                f"{json.loads(usual)[name]}: run it again with the same settings"
            )
    return [Problem(message, place.domain, place) for message in found]
