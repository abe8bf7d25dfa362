"""The programs as their users call them, on tiny inputs."""

import logging
from dataclasses import asdict

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from control_experiments.paths import REPOSITORY
from control_experiments.record import write_json_atomic
from scripts.tests.faults import a_record
from ViT import recipe, tiny_model
from ViT.finetune import Options
from ViT.vision_models import Base


@pytest.mark.parametrize("method", ["control", "lora", "dora", "miss", "probe"])
def test_train_then_evaluate_and_predict(call, train_vit, npz, base_model, tmp_path, method):
    out, record = tmp_path / "run", train_vit("--method", method, "--mlp_layers", 4).record
    hidden = load_file(base_model)["blocks.0.mlp.fc1.weight"].shape[0]
    lora, outputs = 6 * (2 * (64 + hidden) + 2 * 2 * hidden), 6 * (64 + 3 * hidden)
    expected = {"control": 6 * (2 * 64 * 16 + 16 + 64), "lora": lora, "dora": lora + outputs, "miss": outputs, "probe": 0}
    assert record.adapter["adapter_parameters"] == expected[method]
    assert record.adapter["head_parameters"] == 3 * 64 + 3
    assert [row["epoch"] for row in record.history] == [1, 2]
    assert record.history[1]["learning_rate"] == pytest.approx(0.05 * 0.95)
    assert record.time["examples"] == 80 and record.data["sizes"] == {"train": 40, "test": 12}
    assert record.data["id"] == npz.name

    evaluation = tmp_path / "evaluation"
    common = ("ViT.finetune", "--device", "cpu", "--model", base_model)
    asked = (*common, "--evaluate", out / "adapter", "--data", npz, "--output_dir")
    contents = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "holds a training run" in call(*asked, out).refused()
    assert contents == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    evaluated = call(*asked, evaluation).record
    again = evaluated.metrics["last"]
    assert again == pytest.approx({key: record.history[-1][key] for key in again}, rel=1e-4)
    assert evaluated.model == record.model and evaluated.hyperparameters.items() <= record.hyperparameters.items()

    photos = tmp_path / "photos" / "inner"
    photos.mkdir(parents=True)
    for index, image in enumerate(np.load(npz)["x_test"]):
        Image.fromarray(image).save(photos / f"{index:02}.png")
    predicted = ("--predict", tmp_path / "photos", "--adapter", out / "adapter")
    call(*common, *predicted, "--output", tmp_path / "classes.csv").finished()
    classes, tested = pd.read_csv(tmp_path / "classes.csv"), pd.read_csv(out / "predictions.csv")
    assert classes.file[0] == "inner/00.png" and classes.predicted.equals(tested.predicted)
    for folder in (out, evaluation):
        outcomes = np.load(folder / "outcomes.npz")
        assert outcomes["example"].tolist() == tested["index"].astype(str).tolist()
        assert outcomes["correct"].tolist() == (tested.predicted == tested.true).tolist()


def test_the_readme_loads_an_adapter_as_its_card_does():
    readme = (REPOSITORY / "ViT" / "README.md").read_text()
    lines = recipe.loading_lines(Options(image_size=224), Base(Options.model, Options.model))
    assert lines.strip() in readme and recipe.RESTORE.strip() in readme


def test_data_and_base_model_must_fit_the_adapter(call, train_vit, npz, base_model, tmp_path):
    train_vit("--epochs", 1).finished()
    arrays = dict(np.load(npz))
    np.savez(tmp_path / "more.npz", **{**arrays, "classes": ["red", "green", "blue", "black"]})
    np.savez(tmp_path / "other.npz", **{**arrays, "classes": ["cyan", "green", "blue"]})
    state = load_file(base_model)
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, tmp_path / "model.safetensors")
    for data, more, message in (
        (tmp_path / "more.npz", (), "(4: red, green, blue, ...) are not those that"),
        (tmp_path / "other.npz", (), "are not those that"),
        (npz, ("--model", tmp_path / "model.safetensors"), "checksums differ"),
    ):
        words = ("--device", "cpu", "--evaluate", tmp_path / "run" / "adapter", "--data", data, *more)
        assert message in call("ViT.finetune", *words).refused()
    words = ("--device", "cpu", "--model", base_model, "--adapter", tmp_path / "run" / "adapter", "--predict")
    (tmp_path / "empty").mkdir()
    for folder, message in (("none", "is no folder of images"), ("empty", "holds no image")):
        assert message in call("ViT.finetune", *words, tmp_path / folder).refused()
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    assert "Is a directory" in call("ViT.finetune", *words, tmp_path, "--output", tmp_path / "empty").refused()


def test_figures_are_of_image_runs(call, tmp_path):
    write_json_atomic(tmp_path / "record.json", asdict(a_record(domain="llama", history=[{"step": 1, "eval_loss": 1.0}])))
    words = ("--runs", tmp_path, "--output_dir", tmp_path / "figures")
    assert "is no training run of ViT.finetune" in call("ViT.figures", *words).refused()
    assert not (tmp_path / "figures").exists()


def test_an_unreachable_hub_is_one_line(train_vit, tmp_path, monkeypatch):
    told, retries = [], logging.getLogger("huggingface_hub.utils._http")

    def unreachable(*_, **__):
        told.append(retries.isEnabledFor(logging.WARNING))
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("timm.create_model", unreachable)
    huggingface_hub.utils.logging.set_verbosity_warning()
    assert "cannot reach the hub" in train_vit("--model", "vit_tiny_patch16_224").refused()
    assert told == [False]  # nothing more is said of it
    assert not (tmp_path / "run").exists()


def test_the_tuned_recipe_is_the_other_one(launch, started):
    recipe = {"--optimizer": "adamw", "--lr": "2e-3", "--epochs": "10", "--warmup_steps": "20"}
    for more, changed in (({}, {}), ({"LR": "1e-3", "EPOCHS": 3}, {"--lr": "1e-3", "--epochs": "3"})):
        ((_, *words),) = started("ViT/run_ViT.sh", "lora", "cpu", RECIPE="tuned", **more)
        assert {**recipe, **changed}.items() <= dict(zip(words[::2], words[1::2], strict=True)).items()
    assert "RECIPE is published or tuned, got best" in launch("ViT/run_ViT.sh", "lora", "cpu", RECIPE="best").refused()


def test_launcher_demonstration(call, started, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model, "STEPS", 100)  # which learns less
    recipe = {"MODEL": "tiny", "DATA": "digits", "MLP_LAYERS": 2, "EPOCHS": 4, "BATCH": 32, "LR": 0.05}
    (run,) = started("ViT/run_ViT.sh", "control", "cpu", "--seed", 3, "--output_dir", tmp_path / "run", **recipe)
    record = call(*run).record
    assert record.seed == 3 and record.metrics["best"]["test_accuracy"] > 35  # five classes
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "base.safetensors").is_file()
    words = ("--device", "cpu", "--data", "digits", "--evaluate", adapter, "--model", "vit_tiny_patch16_224")
    assert "vit_tiny_patch16_224 is not the base model" in call("ViT.finetune", *words).refused()
