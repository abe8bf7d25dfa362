"""The GLUE tasks: their columns, classes, official metrics, readers and the server's prediction files.

Scripts read the table of tasks before anything heavy is imported, so that a wrong option is answered at once.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from control_experiments.errors import UserError
from control_experiments.record import write_text_atomic

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB_ID = "nyu-mll/glue"
#: Label of a row whose label the GLUE server keeps to itself.
HIDDEN = -1


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": float(matthews_corrcoef(labels, predictions))}


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(np.mean(labels == predictions))}


def _accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score

    return {**_accuracy(predictions, labels), "f1": float(f1_score(labels, predictions, zero_division=0.0))}


def _correlations(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    # undefined where one is constant; a model that says one thing has learnt nothing
    constant = np.ptp(predictions) == 0 or np.ptp(labels) == 0
    found = {"pearson": pearsonr, "spearman": spearmanr}
    return {n: 0.0 if constant else float(f(predictions, labels).statistic) for n, f in found.items()}


#: (predicted classes or scores, labels) -> official metrics, each in [-1, 1].
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "accuracy and F1": _accuracy_and_f1,
    "Pearson and Spearman": _correlations,
}


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        folder: its folder in the classic tsv layout.
        texts: names of its one or two text columns on the hub.
        tsv: the tsv columns that hold those texts and, last, the label.
        classes: class names in label order; empty for regression.
        metric: name of its official metrics in `METRICS`, which `control_experiments.outcomes` has too.
        server_names: whether the server wants class names (else numbers).
        evaluations: suffixes of its dev and test splits, e.g. ("matched", "mismatched").
        headed: whether its train and dev tsv start with a header (CoLA's do not).
        tested: whether there are test sets.
    """

    folder: str
    texts: tuple[str, ...]
    tsv: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str
    server_names: bool = False
    evaluations: tuple[str, ...] = ("",)
    headed: bool = True
    tested: bool = True

    @property
    def server_files(self) -> dict[str, str]:
        """Test split -> file name that the GLUE server expects."""
        files = {"": "", "matched": "-m", "mismatched": "-mm"}
        named = {f"test_{suffix}".rstrip("_"): f"{self.folder}{files[suffix]}.tsv" for suffix in self.evaluations}
        return named if self.tested else {}

    @property
    def regression(self) -> bool:
        return not self.classes

    @property
    def dev_splits(self) -> list[str]:
        return [f"validation_{suffix}" if suffix else "validation" for suffix in self.evaluations]

    @property
    def test_splits(self) -> list[str]:
        return list(self.server_files)

    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """Model outputs, (rows, classes) or (rows, 1) -> predicted classes or scores, (rows,)."""
        return outputs.reshape(-1) if self.regression else outputs.argmax(axis=-1)

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The official metrics, and `score`, their mean, which is what the GLUE leaderboard averages over tasks."""
        values = METRICS[self.metric](self.predictions(outputs), labels)
        return {**values, "score": float(np.mean(list(values.values())))}


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

_FIRST, _SENTENCE = ("sentence",), ("sentence", "label")
_QUESTIONS = ("question1", "question2")
TASKS: dict[str, Task] = {
    "cola": Task("CoLA", _FIRST, _SENTENCE, ("unacceptable", "acceptable"), "matthews", headed=False),
    "mnli": Task(
        "MNLI", ("premise", "hypothesis"), (*_PAIR, "gold_label"), ("entailment", "neutral", "contradiction"),
        "accuracy", True, ("matched", "mismatched"),
    ),
    "mrpc": Task(
        "MRPC", _PAIR, ("#1 String", "#2 String", "Quality"), ("not_equivalent", "equivalent"), "accuracy and F1"
    ),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", *_SENTENCE), _ENTAILMENT, "accuracy", True),
    "qqp": Task("QQP", _QUESTIONS, (*_QUESTIONS, "is_duplicate"), ("not_duplicate", "duplicate"), "accuracy and F1"),
    "rte": Task("RTE", _PAIR, (*_PAIR, "label"), _ENTAILMENT, "accuracy", True),
    "sst2": Task("SST-2", _FIRST, _SENTENCE, ("negative", "positive"), "accuracy"),
    "stsb": Task("STS-B", _PAIR, (*_PAIR, "score"), (), "Pearson and Spearman"),
    "wnli": Task("WNLI", _PAIR, (*_PAIR, "label"), ("not_entailment", "entailment"), "accuracy"),
    "demo": Task("Demo", _FIRST, _SENTENCE, ("corrupted", "intact"), "matthews", headed=False, tested=False),
}  # fmt: skip
#: The nine tasks of the benchmark ("demo" is the project's own, see demo_task.py).
GLUE_TASKS = tuple(name for name in TASKS if name != "demo")


def get_task(name: str) -> Task:
    """The task of that name; raises UserError, which lists the tasks, if there is none."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name: str, data: str | None = None, *, tests: bool = False) -> DatasetDict:
    """A task's splits, each with columns `first`, `second` (pairs only) and `label`.

    Args:
        data: a folder of classic GLUE tsv folders, a `datasets.save_to_disk` folder (of the task, or holding one
            folder per task), or None for the hub ("demo" is then made on the spot).
        tests: whether the test splits are needed; without it they are not read.

    Raises UserError: the data is missing, empty or malformed.
    """
    from datasets import DatasetDict

    task = get_task(name)
    wanted = ["train", *task.dev_splits, *(task.test_splits if tests else [])]
    if data is not None:
        splits = _load_folder(name, task, Path(data), wanted)
    elif name == "demo":
        from RoBERTa.demo_task import make_demo

        splits = {split: _dataset(task, rows) for split, rows in make_demo().items()}
    else:
        splits = _load_hub(name, task, wanted)
    for split in wanted:
        if not len(splits[split]):
            raise UserError(f"task {name}: the {split} split is empty")
    return DatasetDict({split: splits[split] for split in wanted})


def hold_out(splits: DatasetDict, task: Task, share: float) -> DatasetDict:
    """`splits` with a share of the training rows (at most 5,000), the same for every seed, in the place of the dev sets."""
    from datasets import DatasetDict

    rows = splits["train"]
    parts = rows.train_test_split(test_size=max(1, min(int(len(rows) * share), 5000)), seed=0)
    return DatasetDict({**splits, "train": parts["train"], **dict.fromkeys(task.dev_splits, parts["test"])})


def _load_hub(name: str, task: Task, wanted: list[str]) -> Mapping[str, Dataset]:
    from datasets import load_dataset

    try:
        splits = load_dataset(HUB_ID, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot load {name} from the hub ({type(error).__name__}): check the network, or point DATA (--data) to "
            "a folder with the data, see RoBERTa/download_glue.py"
        ) from error
    return _from_columns(name, task, splits, wanted, HUB_ID)


def find_folder(name: str, data: Path) -> Path:
    """The part of `data` that holds a task: a `save_to_disk` folder, or one of classic tsv files. Raises
    UserError: there is none."""
    for folder in (data, data / name):
        if (folder / "dataset_dict.json").is_file():
            return folder
    folder = data / get_task(name).folder
    if not folder.is_dir():
        raise UserError(
            f"no data for {name} in {data}: expected {folder.name}/train.tsv and so on (classic GLUE), or a "
            f"save_to_disk folder {name}/"
        )
    return folder


def _load_folder(name: str, task: Task, data: Path, wanted: list[str]) -> Mapping[str, Dataset]:
    folder = find_folder(name, data)
    if not (folder / "dataset_dict.json").is_file():
        files = {split: folder / f"{split.replace('validation', 'dev')}.tsv" for split in wanted}
        return {split: _dataset(task, read_tsv(file, task)) for split, file in files.items()}

    from datasets import load_from_disk

    try:
        splits = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is a broken save_to_disk folder ({error}): save it again") from error
    return _from_columns(name, task, splits, wanted, folder)


def _from_columns(
    name: str, task: Task, splits: Mapping[str, Dataset], wanted: list[str], where: object
) -> Mapping[str, Dataset]:
    """Rename hub columns to ours."""
    renamed, columns = {}, dict(zip(task.texts, ("first", "second"), strict=False))
    for split in wanted:
        if split not in splits:
            raise UserError(f"{where}: task {name} needs the split {split!r}, found {', '.join(splits)}")
        try:
            renamed[split] = splits[split].select_columns([*columns, "label"]).rename_columns(columns)
        except ValueError as error:
            raise UserError(f"{where}: the {split} split of {name} lacks a column: {error}") from error
    return renamed


def _dataset(task: Task, rows: list[tuple]) -> Dataset:
    from datasets import Dataset

    columns = ("first", "second", "label") if len(task.texts) == 2 else ("first", "label")
    return Dataset.from_dict({column: [row[place] for row in rows] for place, column in enumerate(columns)})


def read_tsv(path: Path, task: Task) -> list[tuple]:
    """Rows `(text, [text,] label)` of a classic GLUE tsv; `test*.tsv` files have a header and no label
    (`HIDDEN`).

    Columns are separated by tabs alone: quotes in GLUE are text, so this is no csv. Raises UserError: no file,
    no rows, or a line with other than the expected columns or label (named by its number).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").rstrip("\r\n")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: DATA (--data) must hold the classic GLUE folders") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
    # only a line feed ends a line, for GLUE texts hold other characters that Python calls line ends
    lines = [line.rstrip("\r") for line in text.split("\n")] if text else []
    hidden = path.name.startswith("test")
    wanted = task.tsv[:-1] if hidden else task.tsv
    if task.headed or hidden:
        if not lines:
            raise UserError(f"{path} is empty: expected a header with {', '.join(wanted)}")
        header, first = lines[0].split("\t"), 2
        missing = [column for column in wanted if column not in header]
        if missing:
            what = f"a header with the column {missing[0]!r}, found {lines[0]!r:.80}"
            raise UserError(f"{path}, line 1: expected {what}")
        lines = lines[1:]
    else:
        header, first = ["source", "label", "star", "sentence"], 1
    if not lines:
        raise UserError(f"{path} has no rows")
    places = [header.index(column) for column in wanted]
    rows = []
    for number, line in enumerate(lines, first):
        cells = line.split("\t")
        if len(cells) != len(header):
            what = f"{len(header)} tab-separated columns ({', '.join(header)}), found {len(cells)}"
            raise UserError(f"{path}, line {number}: expected {what}")
        *texts, label = [cells[place] for place in places] + ([None] if hidden else [])
        rows.append((*texts, _label(task, label, f"{path}, line {number}")))
    return rows


def _label(task: Task, text: str | None, where: str) -> int | float:
    """A class number from its name or number, or a regression score in [0, 5]; None is a hidden one."""
    if text is None:
        return float(HIDDEN) if task.regression else HIDDEN
    if task.regression:
        with suppress(ValueError):
            if 0 <= (score := float(text)) <= 5:
                return score
        raise UserError(f"{where}: expected a score from 0 to 5, found {text!r:.40}")
    numbers = tuple(str(label) for label in range(len(task.classes)))
    allowed = task.classes if task.server_names else numbers
    if text not in allowed:
        raise UserError(f"{where}: expected a label ({', '.join(allowed)}), found {text!r:.40}")
    return allowed.index(text)


def write_predictions(path: Path, task: Task, outputs: np.ndarray) -> None:
    """Write one file as the GLUE server takes it: a header, then `index<TAB>prediction` in the test set's order."""
    predictions = task.predictions(outputs)
    if task.regression:
        values = [f"{min(max(value, 0.0), 5.0):.3f}" for value in predictions]
    else:
        values = [task.classes[value] if task.server_names else str(value) for value in predictions]
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
    write_text_atomic(path, "\n".join(lines) + "\n")
