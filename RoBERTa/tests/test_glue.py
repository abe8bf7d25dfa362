"""Readers, metrics and prediction files of the GLUE tasks."""

import math

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from control_experiments.errors import UserError
from RoBERTa import glue


@pytest.mark.parametrize("name", glue.GLUE_TASKS)
def test_classic_folder(name, glue_folder):
    splits = glue.load_task(name, str(glue_folder), tests=True)
    assert len(splits["train"]) == 24
    dev, test = [s for s in splits if s.startswith("validation")], [s for s in splits if s.startswith("test")]
    assert (len(dev), len(test)) == ((2, 2) if name == "mnli" else (1, 1))
    assert {label for split in test for label in splits[split]["label"]} == {glue.HIDDEN}
    if name == "stsb":
        assert splits["train"]["label"][:4] == [0.0, 2.5, 4.25, 5.0]
    else:
        classes = 3 if name == "mnli" else 2
        assert splits["train"]["label"][:classes] == list(range(classes))
    assert ("second" in splits["train"].column_names) == (name not in ("cola", "sst2"))
    # the first training row's first text, cut out by hand
    line = (glue_folder / glue.TASKS[name].folder / "train.tsv").read_text().splitlines()[0 if name == "cola" else 1]
    place = {"cola": 3, "sst2": 0, "mrpc": 3, "qqp": 3, "stsb": 7, "mnli": 8}.get(name, 1)
    assert splits["train"][0]["first"] == line.split("\t")[place]


@pytest.mark.parametrize("name", glue.GLUE_TASKS)
def test_save_to_disk_folder_equals_the_classic_one(name, glue_folder, tmp_path):
    task, classic = glue.TASKS[name], glue.load_task(name, str(glue_folder), tests=True)
    as_on_hub = DatasetDict()
    for split, rows in classic.items():
        columns = {hub: rows[ours] for hub, ours in zip(task.texts, ("first", "second"), strict=False)}
        label = Value("float32") if task.regression else ClassLabel(names=list(task.classes))
        features = Features({**dict.fromkeys(columns, Value("string")), "label": label})
        as_on_hub[split] = Dataset.from_dict({**columns, "label": rows["label"]}, features=features)
    as_on_hub.save_to_disk(str(tmp_path / name))
    for data in (tmp_path, tmp_path / name):
        loaded = glue.load_task(name, str(data), tests=True)
        for split, rows in classic.items():
            assert loaded[split].to_dict() == rows.to_dict()


# GLUE texts hold quotes, and characters that Python takes for line ends
text = st.text(st.characters(exclude_characters="\t\n\r\ufeff", exclude_categories=["Cs"]))


@given(rows=st.lists(st.tuples(text, st.integers(0, 1)), min_size=1))
def test_any_cola_text_survives(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("cola") / "train.tsv"
    lines = "".join(f"x\t{label}\t\t{sentence}\n" for sentence, label in rows)
    path.write_text(lines, encoding="utf-8", newline="")
    assert glue.read_tsv(path, glue.TASKS["cola"]) == rows


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("cola", "", "has no rows"),
        ("rte", "", "has no rows"),
        ("rte", "index\tsentence1\tlabel\n0\ta\tb\n", "line 1: expected a header with the column 'sentence2'"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", r"line 2: expected a label \(entail"),
        ("cola", "x\t1\t\ta\nx\t2\t\ta\n", "line 2: expected a label"),
        ("cola", "x\t1\t\ta\n1\t1\t1\n", r"train\.tsv, line 2: expected 4 .*found 3"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: expected a score from 0 to 5"),
    ],
)
def test_malformed_files(name, contents, message, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(contents)
    with pytest.raises(UserError, match=message):
        glue.read_tsv(path, glue.TASKS[name])


def test_missing_data(tmp_path):
    with pytest.raises(UserError, match=r"no data for cola.*CoLA/train\.tsv"):
        glue.load_task("cola", str(tmp_path))
    (tmp_path / "CoLA").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*train\.tsv: No such file"):
        glue.load_task("cola", str(tmp_path))
    (tmp_path / "CoLA" / "train.tsv").write_bytes(b"x\t1\t\t\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        glue.load_task("cola", str(tmp_path))


def test_metrics_by_hand():
    predicted, labels = np.array([1, 1, 0, 0, 1, 0, 1]), np.array([1, 0, 0, 1, 1, 0, 0])
    tp, fp, fn, tn = 2, 2, 1, 2
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    accuracy, f1 = (tp + tn) / 7, 2 * tp / (2 * tp + fp + fn)
    expected = {
        "cola": {"matthews": matthews, "score": matthews},
        **{key: {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2} for key in ("mrpc", "qqp")},
        **{key: {"accuracy": accuracy, "score": accuracy} for key in ("mnli", "qnli", "rte", "sst2", "wnli")},
    }
    for name, metrics in expected.items():
        assert glue.TASKS[name].metrics(np.eye(3)[predicted], labels) == pytest.approx(metrics)


def test_correlations_by_hand():
    x, y = np.array([0.5, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.5, 5.0])
    dx, dy = x - x.mean(), y - y.mean()
    pearson = (dx @ dy) / math.sqrt((dx @ dx) * (dy @ dy))
    spearman = 1 - 6 * 2 / (4 * (16 - 1))  # ranks 1 2 4 3 and 1 2 3 4: two differ by one
    expected = {"pearson": pearson, "spearman": spearman, "score": (pearson + spearman) / 2}
    assert glue.TASKS["stsb"].metrics(x[:, None], y) == pytest.approx(expected)
    assert glue.TASKS["stsb"].metrics(np.ones((4, 1)), y)["score"] == 0


@pytest.mark.parametrize(
    ("name", "outputs", "expected"),
    [
        ("cola", [[0, 1], [1, 0]], ["1", "0"]),
        ("rte", [[0, 1], [1, 0]], ["not_entailment", "entailment"]),
        ("mnli", [[0, 0, 1], [0, 1, 0]], ["contradiction", "neutral"]),
        ("stsb", [[5.7], [-0.1], [1.23456]], ["5.000", "0.000", "1.235"]),
    ],
)
def test_prediction_file(name, outputs, expected, tmp_path):
    glue.write_predictions(tmp_path / "x.tsv", glue.TASKS[name], np.array(outputs, dtype=float))
    lines = (tmp_path / "x.tsv").read_text().split("\n")
    assert lines == ["index\tprediction", *(f"{i}\t{value}" for i, value in enumerate(expected)), ""]


def test_demo_is_balanced_repeatable_and_split_without_overlap():
    from RoBERTa import demo_task

    splits = demo_task.make_demo()
    assert demo_task.demo_checksum(splits) == demo_task.demo_checksum(demo_task.make_demo())
    for rows in splits.values():
        assert sum(label for _, label in rows) * 2 == len(rows)
    assert len(splits["validation"]) == demo_task.DEV_ROWS and len(splits["train"]) > 2000
    train, dev = ({text for text, label in splits[name] if label} for name in ("train", "validation"))
    assert not train & dev and max(len(text.split()) for text in train) <= demo_task.MAX_WORDS
    assert len(glue.load_task("demo")["train"]) == len(splits["train"])
