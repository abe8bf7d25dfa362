"""The training script and its launcher, end to end on tiny encoders and tiny data."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from control_experiments import outcomes
from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.record import read_record
from control_experiments.training.device import seed_everything
from control_experiments.training.trainer import ExperimentTrainer
from peft_control import ControlConfig  # (importing it registers CONTROL for PeftModel.from_pretrained)
from RoBERTa import encoder, finetune
from RoBERTa.glue import TASKS, load_task
from RoBERTa.tests.conftest import write_glue


@pytest.mark.parametrize(("method", "kind"), [("control", "roberta"), ("lora", "bert"), ("dora", "roberta")])
def test_methods_train_and_leave_a_record_and_an_adapter(train_roberta, encoders, glue_folder, tmp_path, method, kind):
    record, folder = train_roberta("--method", method, "--model", encoders[kind]).record, tmp_path / "run"
    # counts by hand: hidden 16, two layers, a head of 2 classes (RoBERTa's has a dense layer before it)
    counts = {"control": 2 * 2 * 16 * 16, "lora": 2 * 2 * 2 * 16 * 8, "dora": 2 * 2 * (2 * 16 * 8 + 16)}
    assert record.adapter["adapter_parameters"] == counts[method]
    assert record.adapter["head_parameters"] == 16 * 2 + 2 + (16 * 16 + 16 if kind == "roberta" else 0)
    assert [row["epoch"] for row in record.history] == [1.0, 2.0]
    assert record.metrics["last"] == record.history[-1]
    assert record.metrics["best"]["matthews"] == max(row["matthews"] for row in record.history)
    assert record.time["examples"] == 48 and record.time["real_tokens"] > 48
    assert record.memory["kind"] == "resident set" and record.memory["peak_resident_bytes"] > 0

    base = AutoModelForSequenceClassification.from_pretrained(encoders[kind], num_labels=2)
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    score = dev_metrics(loaded, encoders[kind], record.task, glue_folder)["matthews"]
    assert score == pytest.approx(record.metrics["last"]["matthews"], abs=1e-6)
    with np.load(folder / "outcomes.npz") as kept:
        assert sorted(kept["example"].astype(int)) == list(range(10))
        paired = outcomes.METRICS[str(kept["metric"])](kept["prediction"], kept["label"])
    assert paired == pytest.approx(score, abs=1e-6)


def dev_metrics(model, encoder, task, data):
    rows = load_task(task, str(data))["validation"]
    texts = [list(rows[column]) for column in ("first", "second") if column in rows.column_names]
    batch = AutoTokenizer.from_pretrained(encoder)(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return TASKS[task].metrics(model(**batch).logits.numpy(), np.array(rows["label"]))


@pytest.mark.parametrize("random_order", [False, True], ids=["grouped", "random"])
@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_losses_are_a_plain_loops(train_roberta, task, random_order, encoders, tmp_path, monkeypatch):
    """Row for row and step for step: every row once an epoch, and from them what a loop over AdamW gives."""
    batches, draws, losses = [], [], []
    training_step = ExperimentTrainer.training_step

    def noting(trainer, model, inputs, *args):
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        draws.append(torch.get_rng_state())  # dropout's
        loss = training_step(trainer, model, inputs, *args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(ExperimentTrainer, "training_step", noting)
    data = write_glue(tmp_path / "glue", TASKS[task].folder, train=64)
    options = ("--data", data, "--batch_size", 5, "--warmup_ratio", 0.2, "--random_order", random_order)
    record = train_roberta("--task", task, *options).record

    tokenizer, rows = AutoTokenizer.from_pretrained(encoders["bert"]), load_task(task, str(data))["train"]
    expected = sorted(zip(tokenizer(list(rows["first"]), list(rows["second"])).input_ids, rows["label"], strict=True))
    found = [
        [(row[seen == 1].tolist(), label.item()) for row, seen, label in zip(*map(batch.get, ("input_ids", "attention_mask", "labels")), strict=True)]
        for batch in batches
    ]  # fmt: skip
    assert [len(batch) for batch in found] == [*[5] * 12, 4] * 2
    epochs = [[row for batch in part for row in batch] for part in (found[:13], found[13:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected and epochs[0] != epochs[1]
    spread = np.mean([np.ptp([len(ids) for ids, _ in batch]) for batch in found])
    assert spread > 8 if random_order else spread < 6  # tokens; sentences have 2 to 12 words each

    seed_everything(42)
    classes = 1 if task == "stsb" else 2
    base = AutoModelForSequenceClassification.from_pretrained(encoders["bert"], num_labels=classes)
    if task == "stsb":
        torch.nn.init.constant_(base.classifier.bias, np.mean(rows["label"]))
    model = get_peft_model(base, ControlConfig(task_type="SEQ_CLS", control_blocks=["mlp"], control_rank=16)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, 6, 26)  # a fifth, rounded up
    for batch, draw, loss_there in zip(batches, draws, losses, strict=True):
        torch.set_rng_state(draw)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = ((logits[:, 0] - labels) ** 2).mean() if task == "stsb" else cross_entropy(logits, labels)
        assert loss_there == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    averages = [row["train_loss"] for row in record.history]
    assert averages == pytest.approx([np.mean(losses[:13]), np.mean(losses[13:])])
    metrics = dev_metrics(model.eval(), encoders["bert"], task, data)
    assert {name: record.metrics["last"][name] for name in metrics} == pytest.approx(metrics, abs=1e-5)


def test_mnli_has_two_dev_sets_and_two_prediction_files(train_roberta, encoders, glue_folder, tmp_path):
    record = train_roberta("--task", "mnli", "--predict", "--eval_steps", 2).record
    assert [row["step"] for row in record.history] == [2, 4, 6]
    last = record.metrics["last"]
    assert last["score"] == pytest.approx((last["matched_accuracy"] + last["mismatched_accuracy"]) / 2)
    # rows are sorted by length for speed: the files must have the test set's own order
    base = AutoModelForSequenceClassification.from_pretrained(encoders["bert"], num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(encoders["bert"])
    for split, file in TASKS["mnli"].server_files.items():
        rows = load_task("mnli", str(glue_folder), tests=True)[split]
        pairs = zip(rows["first"], rows["second"], strict=True)
        expected = [TASKS["mnli"].classes[model(**tokenizer(*pair, return_tensors="pt")).logits.argmax()] for pair in pairs]
        lines = (tmp_path / "run" / "predictions" / file).read_text().splitlines()
        assert lines == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(expected))]


def test_a_finished_run_can_still_predict(train_roberta, tmp_path):
    train = partial(train_roberta, "--task", "rte", "--epochs", 1)
    predict = partial(train, "--predict")
    predict("--output_dir", tmp_path / "at once").finished()
    train().finished()
    contents = (tmp_path / "run" / "record.json").read_bytes()
    assert f"in {tmp_path / 'run' / 'predictions'}" in predict().finished().out
    later, at_once = (tmp_path / run / "predictions" / "RTE.tsv" for run in ("run", "at once"))
    assert later.read_text() == at_once.read_text()
    assert (tmp_path / "run" / "record.json").read_bytes() == contents
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "is finished: skipped" in predict().finished().out
    later.unlink()
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "classifier" not in name}, weights)
    assert "it has no" in predict().refused()
    (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    assert "holds no adapter to --predict with" in predict().refused()


@torch.no_grad()
def test_padding_to_the_longest_changes_no_logit(encoders):
    tokenizer, model = encoder.load_tokenizer(encoders["roberta"]), encoder.load_model(encoders["roberta"], TASKS["cola"])
    model = encoder.add_adapter(model, finetune.Options(method="control", task="cola")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = [tokenizer(text) for text in ("the cat sees a dog", "dog runs", "a big red bird sleeps and the cat hears")]
    batches = [DataCollatorWithPadding(tokenizer, padding, max_length=128)(rows) for padding in ("longest", "max_length")]
    assert [batch["input_ids"].shape[1] for batch in batches] == [11, 128]
    torch.testing.assert_close(*(model(**batch).logits for batch in batches), rtol=1e-5, atol=1e-6)


def test_reports_and_half_precision(train_roberta, tmp_path, monkeypatch):
    places = {"WANDB_DIR": tmp_path, "TENSORBOARD_LOGGING_DIR": tmp_path / "board"}
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **places}.items():
        monkeypatch.setenv(name, str(value))
    for reporter, files in (("wandb", "wandb/offline-run-*/*.wandb"), ("tensorboard", "board/events*")):
        more = ("--report_to", reporter, "--max_steps", 2, "--output_dir", tmp_path / reporter)
        record = train_roberta(*more, "--precision", "bf16").record
        assert list(tmp_path.glob(files))
        assert record.adapter["dtype"] == "float32" and record.hyperparameters["precision"] == "bf16"


@pytest.mark.slow
def test_wandb_without_an_account_is_one_line(train_roberta, tmp_path):
    """In a process of its own: wandb reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", *map(str, train_roberta.args), "--report_to", "wandb", "--max_steps", "2"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "--report_to wandb:" in line and "WANDB_MODE=offline" in line
    assert "Traceback" not in done.stderr


def test_folders_that_hold_no_whole_model(train_roberta, encoders, tmp_path):
    for name, damage in (("hollow", Path.unlink), ("broken", lambda file: file.write_bytes(b"not safetensors"))):
        damage(shutil.copytree(encoders["bert"], tmp_path / name) / "model.safetensors")
        assert "cannot load a model" in train_roberta("--model", tmp_path / name).refused()
    assert not (tmp_path / "run").exists()


def test_a_run_is_told_by_what_its_data_and_model_hold(train_roberta, encoders, glue_folder, tmp_path):
    """Folders of the same name with other contents are another run, but for a record that is older than this check."""
    data, model = (tmp_path / name for name in ("glue", "copied"))
    shutil.copytree(glue_folder / "RTE", data / "RTE")
    shutil.copytree(encoders["bert"], model)
    train = partial(train_roberta, "--task", "rte", "--max_steps", 1, "--data", data, "--model", model)
    train().finished()
    rows = data / "RTE" / "train.tsv"
    whole = rows.read_text()
    rows.write_text(whole.replace("cat", "dog"))
    assert "belongs to another run (data_sha256" in train().refused()
    rows.write_text(whole)
    (model / "vocabulary.txt").write_text("another tokenizer")
    assert "belongs to another run (model_sha256" in train().refused()
    claim = tmp_path / "run" / "run.json"
    older = {name: value for name, value in json.loads(claim.read_text()).items() if "sha256" not in name}
    claim.write_text(json.dumps(older))
    assert "skipped" in train().finished().out


@pytest.mark.slow
def test_committed_runs_are_still_taken_for_what_their_commands_ask_for(call, tmp_path):
    """Whatever options came after them; the models and data of their checksums are not here."""
    runs = [path.parent for path in sorted((RESULTS / "published" / "roberta").glob("mpnet_*/record.json"))]
    assert runs
    for run in runs:
        shutil.copytree(run, tmp_path / run.name)
        claim = json.loads((run / "run.json").read_text())
        named = {name: value for name, value in claim.items() if "sha256" not in name}
        (tmp_path / run.name / "run.json").write_text(json.dumps(named))
        precision = claim["precision"]
        here = ("--device", "cpu", "--precision", precision, "--output_dir", tmp_path / run.name)
        command = read_record(run / "record.json").command
        assert "is finished: skipped" in call("RoBERTa.finetune", *command[2:], *here).finished().out


def test_download_glue(call, monkeypatch, tmp_path):
    def download(task):
        return call("RoBERTa.download_glue", "--tasks", task, "--output", tmp_path)

    rows = Dataset.from_dict({"sentence": ["a b", "c d"], "label": [0, 1]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(train=rows, validation=rows))
    download("cola").finished()
    assert len(load_task("cola", str(tmp_path))["train"]) == 2
    assert "is there already" in download("cola").finished().out
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ConnectionError("no route")))
    assert re.search(r"cannot download rte .*no route.*network", download("rte").refused())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cola"]
    assert "argument --tasks: invalid choice: 'snli'" in download("snli").refused()
