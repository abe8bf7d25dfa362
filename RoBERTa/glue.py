"""The GLUE tasks: their columns, classes, official metrics, readers and the server's prediction files.

Scripts read the table of tasks before anything heavy is imported, so that a wrong option is answered at once.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", ICLR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from control_experiments.errors import UserError
from control_experiments.record import write_text_atomic
from RoBERTa.demo_task import make_demo

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB_ID = "nyu-mll/glue"
#: Label of a row whose label the GLUE server keeps to itself.
HIDDEN = -1


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        folder: its folder in the classic tsv layout.
        texts: names of its one or two text columns on the hub.
        tsv: the tsv columns that hold those texts and, last, the label.
        classes: class names in label order; empty for regression.
        metric: its official metrics, by their name in `control_experiments.outcomes.METRICS`, or "accuracy".
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
    def labels(self) -> list[str]:
        """The classes as tsv files write them."""
        return list(self.classes) if self.server_names else [str(label) for label in range(len(self.classes))]

    def label(self, text: str) -> int | float | None:
        """The class or score that a tsv file writes so; None if it is neither."""
        try:
            value = float(text) if self.regression else self.labels.index(text)
        except ValueError:
            return None
        return None if self.regression and not 0 <= value <= 5 else value

    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """Model outputs, (rows, classes) or (rows, 1) -> predicted classes or scores, (rows,)."""
        return outputs.reshape(-1) if self.regression else outputs.argmax(axis=-1)

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The official metrics, each in [-1, 1], and `score`, their mean, which is what the GLUE leaderboard averages over tasks."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import f1_score, matthews_corrcoef

        predictions = self.predictions(outputs)
        if self.metric == "matthews":
            values = {"matthews": matthews_corrcoef(labels, predictions)}
        elif self.regression:
            # undefined where one is constant; a model that says one thing has learnt nothing
            constant = np.ptp(predictions) == 0 or np.ptp(labels) == 0
            found = {"pearson": pearsonr, "spearman": spearmanr}
            values = {name: 0.0 if constant else of(predictions, labels).statistic for name, of in found.items()}
        else:
            values = {"accuracy": np.mean(labels == predictions)}
            if self.metric == "accuracy and F1":
                values["f1"] = f1_score(labels, predictions, zero_division=0.0)
        values = {name: float(value) for name, value in values.items()}
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
    wanted = ["train", *task.dev_splits, *(task.server_files if tests else [])]
    folder = None if data is None else find_folder(name, Path(data))
    if folder is None and name == "demo":
        splits = _from_rows(task, make_demo())
    elif folder is None or (folder / "dataset_dict.json").is_file():
        splits = _as_on_hub(name, folder, wanted)
    else:
        files = {split: folder / f"{split.replace('validation', 'dev')}.tsv" for split in wanted}
        splits = _from_rows(task, {split: read_tsv(file, task) for split, file in files.items()})
    for split in wanted:
        if not len(splits[split]):
            raise UserError(f"task {name}: the {split} split is empty")
    return DatasetDict({split: splits[split] for split in wanted})


def _from_rows(task: Task, splits: dict[str, list[tuple]]) -> dict[str, Dataset]:
    from datasets import Dataset

    columns = ("first", "second", "label") if len(task.texts) == 2 else ("first", "label")
    return {split: Dataset.from_dict(dict(zip(columns, zip(*rows), strict=True))) for split, rows in splits.items()}


def _as_on_hub(name: str, folder: Path | None, wanted: list[str]) -> dict[str, Dataset]:
    """Splits of the hub, or of a `save_to_disk` folder of it, with our names of the columns."""
    from datasets import load_dataset, load_from_disk

    columns = dict(zip(get_task(name).texts, ("first", "second"), strict=False))
    try:
        splits = load_dataset(HUB_ID, name) if folder is None else load_from_disk(str(folder))
        return {split: splits[split].select_columns([*columns, "label"]).rename_columns(columns) for split in wanted}
    except Exception as error:  # datasets has many kinds for a broken folder
        instead = "check the network, or point DATA (--data) to a folder with the data, see RoBERTa/download_glue.py"
        if folder is not None:
            instead = "save the task's datasets there again"
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load {name} from {folder or HUB_ID} ({type(error).__name__}: {reason}): {instead}") from error


def hold_out(splits: DatasetDict, task: Task, share: float) -> DatasetDict:
    """`splits` with a share of the training rows (at most 5,000), the same for every seed, in the place of the dev sets."""
    from datasets import DatasetDict

    rows = splits["train"]
    parts = rows.train_test_split(test_size=max(1, min(int(len(rows) * share), 5000)), seed=0)
    return DatasetDict({**splits, "train": parts["train"], **dict.fromkeys(task.dev_splits, parts["test"])})


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


def read_tsv(path: Path, task: Task) -> list[tuple]:
    """Rows `(text, [text,] label)` of a classic GLUE tsv; `test*.tsv` files have a header and no label
    (`HIDDEN`).

    Columns are separated by tabs alone: quotes in GLUE are text, so this is no csv. Raises UserError: no file,
    no rows, or a line with other than the expected columns or label (named by its number).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; DATA (--data) must hold the classic GLUE folders") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
    # only a line feed ends a line, for GLUE texts hold other characters that Python calls line ends
    lines = [line.rstrip("\r") for line in text.split("\n")] if text else []
    hidden = path.name.startswith("test")
    headed = hidden or task.headed
    wanted = task.tsv[:-1] if hidden else task.tsv
    if len(lines) <= headed:
        raise UserError(f"{path} has no rows")
    header = lines.pop(0).split("\t") if headed else ["source", "label", "star", "sentence"]
    if missing := [column for column in wanted if column not in header]:
        raise UserError(f"{path}, line 1: expected a header with the column {missing[0]!r}, found {header}")
    places = [header.index(column) for column in wanted]
    rows = []
    for number, line in enumerate(lines, 1 + headed):
        cells = line.split("\t")
        if len(cells) != len(header):
            what = f"{len(header)} tab-separated columns ({', '.join(header)}), found {len(cells)}"
            raise UserError(f"{path}, line {number}: expected {what}")
        texts = [cells[place] for place in places]
        label = HIDDEN if hidden else task.label(texts.pop())
        if label is None:
            expected = "a score from 0 to 5" if task.regression else f"a label ({', '.join(task.labels)})"
            raise UserError(f"{path}, line {number}: expected {expected}, found {cells[places[-1]]!r:.40}")
        rows.append((*texts, float(label) if task.regression else label))
    return rows


def write_predictions(path: Path, task: Task, outputs: np.ndarray) -> None:
    """Write one file as the GLUE server takes it: a header, then `index<TAB>prediction` in the test set's order."""
    predictions = task.predictions(outputs)
    if task.regression:
        values = [f"{min(max(value, 0.0), 5.0):.3f}" for value in predictions]
    else:
        values = [task.classes[value] if task.server_names else str(value) for value in predictions]
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
    write_text_atomic(path, "\n".join(lines) + "\n")
