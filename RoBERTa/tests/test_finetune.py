"""The training script and its launcher, end to end on tiny encoders and tiny data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from control_experiments import outcomes
from control_experiments.errors import UserError, run_main
from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.record import read_record
from control_experiments.training.device import seed_everything
from control_experiments.training.runs import RunFolder
from control_experiments.training.trainer import ExperimentTrainer
from peft_control import ControlConfig  # (importing it registers CONTROL for PeftModel.from_pretrained)
from peft_control.export import export
from RoBERTa import encoder, finetune
from RoBERTa.glue import TASKS, load_task
from RoBERTa.tests.conftest import write_glue

LAUNCHER = Path(finetune.__file__).with_name("run_roberta.sh")


@pytest.fixture
def arguments(encoders, glue_folder, tmp_path):
    """Makes a command line for a tiny run."""

    def make(method="control", task="cola", model="bert", output="run", **options):
        options = {
            "method": method, "task": task, "model": encoders[model], "data": glue_folder, "device": "cpu",
            "epochs": 2, "lr": 1e-2, "batch_size": 8, "output_dir": tmp_path / output, **options,
        }  # fmt: skip
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    return make


def launch(*words, **environment):
    return subprocess.run(
        ["bash", str(LAUNCHER), *map(str, words)],
        capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def one_line_error(done, *parts):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert all(part in errors[0] for part in parts), errors[0]


@pytest.mark.parametrize(("method", "model"), [("control", "roberta"), ("lora", "bert"), ("dora", "roberta")])
def test_methods_train_and_leave_a_record_and_an_adapter(method, model, arguments, encoders, tmp_path, capsys):
    # counts by hand: hidden 16, two layers, a head of 2 classes (RoBERTa's has a dense layer before it)
    counts = {"control": 2 * 2 * 16 * 16, "lora": 2 * 2 * 2 * 16 * 8, "dora": 2 * 2 * (2 * 16 * 8 + 16)}
    head = 16 * 2 + 2 + (16 * 16 + 16 if model == "roberta" else 0)
    record = finetune.main(arguments(method, model=model))
    assert record.adapter["adapter_parameters"] == counts[method]
    assert record.adapter["head_parameters"] == head
    assert [row["epoch"] for row in record.history] == [1.0, 2.0]
    assert all(np.isfinite(row["train_loss"]) for row in record.history)
    assert record.metrics["last"] == record.history[-1]
    assert record.metrics["best"]["matthews"] == max(row["matthews"] for row in record.history)
    assert record.time["examples"] == 48 and record.time["real_tokens"] > 48
    assert record.memory["kind"] == "resident set" and record.memory["peak_resident_bytes"] > 0

    text = (tmp_path / "run" / "record.json").read_text()
    assert str(tmp_path) not in text and str(Path.home()) + "/" not in text
    assert read_record(tmp_path / "run" / "record.json").metrics == record.metrics
    assert not (tmp_path / "run" / "checkpoints").exists()

    base = AutoModelForSequenceClassification.from_pretrained(encoders[model], num_labels=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "run" / "adapter").iterdir())
    score = dev_metrics(loaded, encoders[model], record.task, Path(arguments()[7]))["matthews"]
    assert score == pytest.approx(record.metrics["last"]["matthews"], abs=1e-6)
    with np.load(tmp_path / "run" / "outcomes.npz") as kept:
        assert sorted(kept["example"].astype(int)) == list(range(10))
        paired = outcomes.METRICS[str(kept["metric"])](kept["prediction"], kept["label"])
    assert paired == pytest.approx(score, abs=1e-6)

    capsys.readouterr()
    assert finetune.main(arguments(method, model=model)) is None
    assert capsys.readouterr().out.count("\n") == 1


def test_an_adapters_card_says_how_to_load_it(arguments, tmp_path):
    """The lines that a reader of the card would copy, labels and tokenizer included."""
    for method, task, labels in (("control", "mnli", ["entailment", "neutral", "contradiction"]), ("lora", "stsb", ["score"])):
        record = finetune.main(arguments(method, task, output=task, max_steps=1))
        folder = tmp_path / task / "adapter"
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == "bert" and str(tmp_path) not in card.content
        assert f"{record.adapter['trainable_parameters']:,} of" in card.text and "rank" in card.text
        lines = card.text.partition("```python\n")[2].partition("```")[0]
        loaded: dict = {}
        exec(re.sub(r'folder = ".*?"', f"folder = {str(folder)!r}", lines), loaded)
        assert list(loaded["model"].config.id2label.values()) == labels
        assert loaded["tokenizer"]("the cat")["input_ids"]
    exported = export(str(tmp_path / "mnli" / "adapter"), tmp_path / "exported")
    names = exported.config.id2label
    assert [*names.values()] == ["entailment", "neutral", "contradiction"]
    assert exported.config.label2id == {name: label for label, name in names.items()}


def dev_metrics(model, encoder, task, data):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = load_task(task, str(data))["validation"]
    texts = [list(rows[column]) for column in ("first", "second") if column in rows.column_names]
    batch = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return TASKS[task].metrics(model(**batch).logits.numpy(), np.array(rows["label"]))


@pytest.mark.parametrize("random_order", [False, True], ids=["grouped", "random"])
@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_losses_are_a_plain_loops(task, random_order, arguments, encoders, tmp_path, monkeypatch):
    """Row for row and step for step: every row once an epoch, and from them what a loop over AdamW gives."""
    batches, draws, losses, rates = [], [], [], []
    training_step = ExperimentTrainer.training_step

    def noting(trainer, model, inputs, *args):
        batches.append([dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)])
        draws.append(torch.get_rng_state())  # dropout's
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        loss = training_step(trainer, model, inputs, *args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(ExperimentTrainer, "training_step", noting)
    data = write_glue(tmp_path / "glue", TASKS[task].folder, train=64)
    options = {"data": data, "epochs": 2, "batch_size": 5, "warmup_ratio": 0.2, "random_order": random_order}
    record = finetune.main(arguments("control", task, **options))

    tokenizer = AutoTokenizer.from_pretrained(encoders["bert"])
    rows = load_task(task, str(data))["train"]
    known = {
        (tuple(tokenizer(first, second).input_ids), label): (first, second, label)
        for first, second, label in zip(rows["first"], rows["second"], rows["label"], strict=True)
    }

    def key(row):
        return tuple(row["input_ids"][row["attention_mask"] == 1].tolist()), row["labels"].item()

    keys = [[key(row) for row in batch] for batch in batches]
    assert [len(batch) for batch in keys] == [*[5] * 12, 4] * 2
    epochs = [[key for batch in part for key in batch] for part in (keys[:13], keys[13:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(known) and len(known) == 64
    assert epochs[0] != epochs[1]
    spread = np.mean([np.ptp([len(ids) for ids, _ in batch]) for batch in keys])
    assert spread > 8 if random_order else spread < 6  # tokens; sentences have 2 to 12 words each

    seed_everything(42)
    classes = 1 if task == "stsb" else 2
    base = AutoModelForSequenceClassification.from_pretrained(encoders["bert"], num_labels=classes)
    model = get_peft_model(base, ControlConfig(task_type="SEQ_CLS", control_blocks=["mlp"], control_rank=16))
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(keys):
        # of 26 steps the rate rises in a fifth, rounded up
        optimizer.param_groups[0]["lr"] = 1e-2 * (step / 6 if step < 6 else (26 - step) / 20)
        first, second, labels = zip(*(known[key] for key in batch), strict=True)
        torch.set_rng_state(draws[step])
        logits = model(**tokenizer(first, second, padding=True, return_tensors="pt")).logits
        labels = torch.tensor(labels)
        loss = ((logits[:, 0] - labels) ** 2).mean() if task == "stsb" else cross_entropy(logits, labels)
        assert rates[step] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    averages = [row["train_loss"] for row in record.history]
    assert averages == pytest.approx([np.mean(losses[:13]), np.mean(losses[13:])])
    metrics = dev_metrics(model.eval(), encoders["bert"], task, data)
    assert {name: record.metrics["last"][name] for name in metrics} == pytest.approx(metrics, abs=1e-5)


def test_mnli_has_two_dev_sets_and_two_prediction_files(arguments, encoders, glue_folder, tmp_path):
    record = finetune.main(arguments("control", "mnli", predict=True, eval_steps=2))
    assert [row["step"] for row in record.history] == [2, 4, 6]
    last = record.metrics["last"]
    assert last["score"] == pytest.approx((last["matched_accuracy"] + last["mismatched_accuracy"]) / 2)
    # rows are sorted by length for speed: the files must have the test set's own order
    base = AutoModelForSequenceClassification.from_pretrained(encoders["bert"], num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(encoders["bert"])
    for split, file in TASKS["mnli"].server_files.items():
        rows = load_task("mnli", str(glue_folder), tests=True)[split]
        with torch.no_grad():
            logits = [
                model(**tokenizer(a, b, return_tensors="pt")).logits for a, b in zip(rows["first"], rows["second"], strict=True)
            ]
        expected = [TASKS["mnli"].classes[row.argmax()] for row in logits]
        lines = (tmp_path / "run" / "predictions" / file).read_text().splitlines()
        assert lines == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(expected))]


def test_a_finished_run_can_still_predict(arguments, encoders, tmp_path, capsys):
    command = arguments("control", "rte", model="roberta", epochs=1)
    finetune.main(arguments("control", "rte", model="roberta", epochs=1, predict=True, output="at once"))
    finetune.main(command)
    contents = (tmp_path / "run" / "record.json").read_bytes()
    assert finetune.main([*command, "--predict"]) is None
    assert f"in {tmp_path / 'run' / 'predictions'}" in capsys.readouterr().out
    later, at_once = (tmp_path / run / "predictions" / "RTE.tsv" for run in ("run", "at once"))
    assert later.read_text() == at_once.read_text()
    assert (tmp_path / "run" / "record.json").read_bytes() == contents
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert finetune.main([*command, "--predict"]) is None
    assert "is finished: skipped" in capsys.readouterr().out
    later.unlink()
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "classifier" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    with pytest.raises(UserError, match="it has no .*classifier"):
        finetune.main([*command, "--predict"])
    (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds no adapter to --predict with"):
        finetune.main([*command, "--predict"])


def test_memory_modes_train_alike(arguments, tmp_path):
    """Dropout included: every mode draws what plain draws."""
    states = {}
    for mode in ("plain", "fast", "balanced", "lean"):
        record = finetune.main(arguments("control", memory=mode, output=mode, epochs=1))
        assert record.hyperparameters["memory"] == mode
        states[mode] = load_file(tmp_path / mode / "adapter" / "adapter_model.safetensors")
        torch.testing.assert_close(states[mode], states["plain"], rtol=1e-3, atol=1e-5)


def test_padding_to_the_longest_changes_no_logit(encoders):
    tokenizer, model = encoder.load_tokenizer_and_model(str(encoders["roberta"]), TASKS["cola"])
    options = finetune.Options(method="control", task="cola")
    model = encoder.add_adapter(model, options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    texts = ("the cat sees a dog", "dog runs", "a big red bird sleeps and the cat hears")
    rows = [tokenizer(text) for text in texts]
    outputs = []
    for padding in ("longest", "max_length"):
        batch = DataCollatorWithPadding(tokenizer, padding=padding, max_length=128)(rows)
        assert batch["input_ids"].shape[1] == {"longest": 11, "max_length": 128}[padding]
        with torch.no_grad():
            outputs.append(model(**batch).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_a_killed_run_resumes_to_the_same_end(arguments, monkeypatch, tmp_path):
    whole = finetune.main(arguments(epochs=4, output="whole"))
    step, calls = ExperimentTrainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 9:  # in the third epoch, after the checkpoint of step 7 in its midst
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    command = arguments(epochs=4, save_steps=7)
    monkeypatch.setattr(ExperimentTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(command)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "record.json").exists()
    with pytest.raises(UserError, match=r"unfinished run \(checkpoint-7\): add --resume"):
        finetune.main(command)
    with pytest.raises(UserError, match=r"belongs to another run.*method 'control' there, 'lora' asked for"):
        finetune.main([*arguments("lora", epochs=4, save_steps=7), "--resume"])
    resumed = finetune.main([*command, "--resume"])
    assert resumed.time["resumed_from_step"] == 7
    for name in ("loss", "matthews", "step"):
        assert resumed.metrics["last"][name] == pytest.approx(whole.metrics["last"][name], abs=1e-6)


def test_bf16_keeps_trained_parameters_in_float32(arguments):
    record = finetune.main(arguments("lora", precision="bf16", max_steps=2))
    assert record.adapter["dtype"] == "float32" and record.hyperparameters["precision"] == "bf16"


def test_save_to_disk_data_and_tensorboard(arguments, glue_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    splits = load_task("cola", str(glue_folder)).rename_columns({"first": "sentence"})
    splits.save_to_disk(str(tmp_path / "disk" / "cola"))
    ours = finetune.main(arguments(data=tmp_path / "disk", report_to="tensorboard", output="disk_run"))
    classic = finetune.main(arguments(output="classic_run"))
    assert ours.metrics["last"]["loss"] == pytest.approx(classic.metrics["last"]["loss"])
    assert list((tmp_path / "board").glob("events*"))


def test_wandb_offline(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    finetune.main(arguments(report_to="wandb", max_steps=2))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_wandb_without_an_account_is_one_line(arguments, tmp_path):
    """In a process of its own: wandb reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "RoBERTa.finetune", *arguments(report_to="wandb", max_steps=2)]
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    one_line_error(done, "--report_to wandb:", "WANDB_MODE=offline")


@pytest.mark.slow
def test_launcher_end_to_end(encoders, glue_folder, tmp_path):
    """The first command of a new user: the default folder, which no shipped record occupies."""
    model = shutil.copytree(encoders["roberta"], tmp_path / f"tiny-{os.getpid()}")
    folder = RESULTS / "roberta" / f"{model.name}_rte_control_seed7"
    try:
        command = ("control", "rte", 1, "1e-3", "cpu", "--max_length", 64)
        done = launch(*command, MODEL=str(model), DATA=str(glue_folder), SEED="7")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("running:")
        record = read_record(folder / "record.json")
        refused = launch(*command, "--lr", "1e-2", MODEL=str(model), DATA=str(glue_folder), SEED="7")
        one_line_error(refused, "lr 0.001 there, 0.01 asked for", "--output_dir", "--overwrite")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert (record.method, record.task, record.seed) == ("control", "rte", 7)
    given = {"epochs": 1.0, "lr": 1e-3, "max_length": 64, "batch_size": 64, "weight_decay": 0.1}
    assert {name: record.hyperparameters[name] for name in given} == given


@pytest.mark.slow
def test_launcher_defaults_are_the_papers_recipe():
    recipe = {
        "epochs": "80", "lr": "3e-4", "batch_size": "64", "max_length": "128", "warmup_ratio": "0.06",
        "weight_decay": "0.1", "lora_rank": "8", "lora_alpha": "16", "control_rank": "16", "control_alpha": "1.0",
        "model": "roberta-base", "seed": "42", "device": "0",
    }  # fmt: skip
    words = launch("control", "cola", PYTHON="echo", MODEL="", DATA="").stdout.splitlines()[-1].split()
    given = {name.removeprefix("--"): value for name, value in zip(words[2::2], words[3::2], strict=True)}
    assert {name: given[name] for name in recipe} == recipe
    options = finetune.Options(method="control", task="cola")
    for name in recipe.keys() - {"model"}:
        assert float(recipe[name]) == float(getattr(options, name))


@pytest.mark.slow
def test_launcher_refuses_in_one_line(noting, tmp_path, capsys):
    one_line_error(launch("lora"), "METHOD and TASK")
    assert launch("-h").stdout.startswith("usage:")
    refused = launch("lora", "cola", 1, "1e-3", 99, "--output_dir", tmp_path / "run")
    one_line_error(refused, "no GPU 99" if torch.cuda.is_available() else "no GPU is visible, choose cpu")
    assert launch("lora", "cola", 1, "abc", "cpu", PYTHON=str(noting.interpreter)).returncode == 0
    ((_, *words),) = noting.calls
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: finetune.main(words))
    one_line_error(SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err), "--lr")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adapter"}, "unknown method 'adapter': choose one of control, lora, dora"),
        ({"task": "snli"}, "unknown task 'snli'"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"device": "gpu"}, "GPU must be an index"),
        ({"control_blocks": "memory"}, "memory"),
        ({"method": "lora", "lora_targets": "nowhere"}, "nowhere"),
        ({"data": "/nonexistent"}, "no data for cola"),
        ({"lora_alpha": "inf"}, "--lora_alpha must be a finite number"),
        ({"warmup_ratio": 1}, "--warmup_ratio must be less than 1"),
        ({"seed": 2**32}, "--seed must be at most 4294967295"),
        ({"max_length": 131}, r"more than .* can read \(130 tokens\)"),
        ({"max_length": 131, "model": "roberta"}, r"more than .* can read \(130 tokens\)"),
        ({"task": "demo", "predict": True}, "no test set"),
    ],
)
def test_bad_options_write_nothing(options, message, arguments, tmp_path):
    with pytest.raises(UserError, match=message):
        finetune.main(arguments(**options))
    assert not (tmp_path / "run").exists()


def test_bad_models(arguments, tmp_path, encoders):
    with pytest.raises(UserError, match=r"no model folder: it has no config\.json"):
        finetune.main([*arguments(), "--model", str(tmp_path)])
    hollow = shutil.copytree(encoders["bert"], tmp_path / "hollow")
    for damage in (Path.unlink, lambda weights: weights.write_bytes(b"not safetensors")):
        damage(hollow / "model.safetensors")
        with pytest.raises(UserError, match="cannot load a model"):
            finetune.main([*arguments(), "--model", str(hollow)])
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_and_left_alone(arguments, tmp_path):
    with RunFolder(tmp_path / "run") as held:
        (held.path / "precious").write_text("x")
        with pytest.raises(UserError, match="in use by another run"):
            finetune.main(arguments())
    with pytest.raises(UserError, match="holds no run: --overwrite deletes nothing there"):
        finetune.main([*arguments(), "--overwrite"])
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"] == ["precious"]


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(arguments):
    finetune.main(arguments(max_steps=1))
    with pytest.raises(UserError, match=r"lr 0\.01 there, 0\.02 asked for"):
        finetune.main(arguments(max_steps=1, lr=2e-2))
    record = finetune.main([*arguments(max_steps=1, lr=2e-2), "--overwrite"])
    assert record.hyperparameters["lr"] == 2e-2
    with pytest.raises(UserError, match="choose one of the two"):
        finetune.main([*arguments(max_steps=1), "--overwrite", "--resume"])


def test_a_run_is_told_by_what_its_data_and_model_hold(arguments, encoders, glue_folder, tmp_path):
    """Folders of the same name with other contents are another run, but for a record that is older than this check."""
    for name, source in (("glue", glue_folder / "RTE"), ("bert", encoders["bert"])):
        shutil.copytree(source, tmp_path / name / ("RTE" if name == "glue" else ""))
    command = arguments("lora", "rte", max_steps=1, data=tmp_path / "glue")
    command[command.index("--model") + 1] = str(tmp_path / "bert")
    finetune.main(command)
    train = tmp_path / "glue" / "RTE" / "train.tsv"
    whole = train.read_text()
    train.write_text(whole.replace("cat", "dog"))
    with pytest.raises(UserError, match="belongs to another run .data_sha256"):
        finetune.main(command)
    train.write_text(whole)
    (tmp_path / "bert" / "vocabulary.txt").write_text("another tokenizer")
    with pytest.raises(UserError, match="belongs to another run .model_sha256"):
        finetune.main(command)
    claim = tmp_path / "run" / "run.json"
    older = {name: value for name, value in json.loads(claim.read_text()).items() if "sha256" not in name}
    claim.write_text(json.dumps(older))
    assert finetune.main(command) is None


@pytest.mark.slow
def test_committed_runs_are_still_taken_for_what_their_commands_ask_for(tmp_path, capsys):
    """Whatever options came after them; the models and data of their checksums are not here."""
    runs = [path.parent for path in sorted((RESULTS / "published" / "roberta").glob("minilm_*/record.json"))]
    assert runs
    for run in runs:
        shutil.copytree(run, tmp_path / run.name)
        claim = json.loads((run / "run.json").read_text())
        named = {name: value for name, value in claim.items() if "sha256" not in name}
        (tmp_path / run.name / "run.json").write_text(json.dumps(named))
        precision = claim["precision"]
        here = ("--device", "cpu", "--precision", precision, "--output_dir", str(tmp_path / run.name))
        assert finetune.main([*read_record(run / "record.json").command[2:], *here]) is None
        assert "is finished: skipped" in capsys.readouterr().out


def test_the_longest_input_of_each_family(tmp_path):
    """One forward of the longest input that is let through, and an error of torch's for one token more."""
    from transformers import BertConfig, ElectraConfig, MPNetConfig, RobertaConfig, XLMRobertaConfig

    shape = {
        "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 40,
    }  # fmt: skip
    for kind in (BertConfig, ElectraConfig, MPNetConfig, RobertaConfig, XLMRobertaConfig):
        config = kind(**shape, **({"embedding_size": 16} if kind is ElectraConfig else {}))
        model = AutoModelForSequenceClassification.from_config(config).eval()
        longest = 40 if kind in (BertConfig, ElectraConfig) else 38
        options = finetune.Options(method="control", task="cola", max_length=longest)
        encoder.check_length(options, model)
        model(input_ids=torch.full((1, longest), 7))
        options.max_length += 1
        with pytest.raises(UserError, match=rf"can read \({longest} tokens\)"):
            encoder.check_length(options, model)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))


@pytest.mark.slow
def test_padding_benchmark(encoders, glue_folder, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "RoBERTa.benchmark_padding", "--model", encoders["bert"], "--data", glue_folder, "--device", "cpu",
         "--batch_size", "4", "--steps", "3", "--output", tmp_path / "figures.json"],
        check=True,
    )  # fmt: skip
    written = json.loads((tmp_path / "figures.json").read_text())
    seconds = {padding: written[padding]["seconds_per_epoch"] for padding in ("longest", "max_length")}
    assert written["ratio"] == seconds["longest"] / seconds["max_length"]
    assert written["longest"]["padding_share"] < 0.5 < written["max_length"]["padding_share"]


def test_download_glue(monkeypatch, tmp_path, capsys):
    from RoBERTa import download_glue

    rows = Dataset.from_dict({"sentence": ["a b", "c d"], "label": [0, 1]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(train=rows, validation=rows))
    download_glue.main(["--tasks", "cola", "--output", str(tmp_path)])
    assert len(load_task("cola", str(tmp_path))["train"]) == 2
    download_glue.main(["--tasks", "cola", "--output", str(tmp_path)])
    assert "is there already" in capsys.readouterr().out

    def offline(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"cannot download rte .*no route.*network"):
        download_glue.main(["--tasks", "rte", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cola"]
    with pytest.raises(UserError, match="unknown task 'snli'"):
        download_glue.main(["--tasks", "snli", "--output", str(tmp_path)])
