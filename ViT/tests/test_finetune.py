"""The programs as their users call them, on tiny inputs."""

import csv
import logging
import re
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from control_experiments.paths import REPOSITORY
from control_experiments.record import read_record
from ViT import recipe
from ViT.classifier import restore
from ViT.options import Options
from ViT.vision_models import Base


@pytest.mark.parametrize("method", ["control", "lora", "dora", "miss", "probe"])
def test_train_then_evaluate_and_predict(call, train, npz, base_model, tmp_path, method):
    out = tmp_path / "run"
    stdout = train("--method", method, "--mlp_layers", 4).finished().out
    record = read_record(out / "record.json")
    hidden = load_file(base_model)["blocks.0.mlp.fc1.weight"].shape[0]
    lora, outputs = 6 * (2 * (64 + hidden) + 2 * 2 * hidden), 6 * (64 + 3 * hidden)
    expected = {"control": 6 * (2 * 64 * 16 + 16 + 64), "lora": lora, "dora": lora + outputs, "miss": outputs, "probe": 0}
    assert record.adapter["adapter_parameters"] == expected[method]
    assert record.adapter["head_parameters"] == 3 * 64 + 3
    assert [row["epoch"] for row in record.history] == [1, 2]
    assert record.history[1]["learning_rate"] == pytest.approx(0.05 * 0.95)
    assert record.time["examples"] == 80 and record.data["sizes"] == {"train": 40, "test": 12}
    assert record.data["id"] == npz.name and str(tmp_path) not in (out / "record.json").read_text()
    assert not (out / "checkpoints").exists()

    evaluation = tmp_path / "evaluation"
    common = ("ViT.finetune", "--device", "cpu", "--model", base_model)
    asked = (*common, "--evaluate", out / "adapter", "--data", npz, "--output_dir")
    assert f"record in {out / 'record.json'}\n" in stdout
    contents = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "holds a training run" in call(*asked, out).refused()
    assert contents == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    stdout = call(*asked, evaluation).finished().out
    assert f"record in {evaluation / 'record.json'}\n" in stdout
    again = read_record(evaluation / "record.json").metrics["last"]
    assert again == pytest.approx({key: record.history[-1][key] for key in again}, rel=1e-4)

    photos = tmp_path / "photos" / "inner"
    photos.mkdir(parents=True)
    for index, image in enumerate(np.load(npz)["x_test"]):
        Image.fromarray(image).save(photos / f"{index:02}.png")
    predicted = ("--predict", tmp_path / "photos", "--adapter", out / "adapter")
    call(*common, *predicted, "--output", tmp_path / "classes.csv").finished()
    with (tmp_path / "classes.csv").open() as file, (out / "predictions.csv").open() as trained:
        rows, tested = list(csv.DictReader(file)), list(csv.DictReader(trained))
    assert rows[0]["file"] == "inner/00.png"
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in tested]
    for folder in (out, evaluation):
        outcomes = np.load(folder / "outcomes.npz")
        assert outcomes["example"].tolist() == [row["index"] for row in tested]
        assert outcomes["correct"].tolist() == [row["predicted"] == row["true"] for row in tested]


@pytest.mark.parametrize("mlp_layers", [2, 4])
def test_the_adapters_card_says_what_it_is_and_loads_it(train, base_model, tmp_path, mlp_layers):
    out = tmp_path / "run"
    train("--epochs", 1, "--mlp_layers", mlp_layers).finished()
    card = (out / "adapter" / "README.md").read_text()
    assert f"base_model: {base_model.parent.name}/model.safetensors" in card and "rank 16" in card
    assert str(tmp_path) not in card and f"{6 * (2 * 64 * 16 + 16 + 64) + 195:,} of " in card
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    named = {"results/vit/RUN": str(out), f"{base_model.parent.name}/model.safetensors": str(base_model)}
    for shown, place in named.items():
        lines = lines.replace(shown, place)
    exec(lines, loaded := {})
    assert loaded["classes"] == ["red", "green", "blue"]
    again, _, _ = restore(out / "adapter", model=str(base_model))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded["model"].eval()(images), again.eval()(images))


def test_the_readme_loads_an_adapter_as_its_card_does():
    readme = (REPOSITORY / "ViT" / "README.md").read_text()
    lines = recipe.loading_lines(Options(image_size=224), Base(Options.model, Options.model))
    assert lines.strip() in readme and recipe.RESTORE.strip() in readme


@pytest.mark.parametrize("mlp_layers", [2, 4])
def test_memory_modes_train_alike(train, tmp_path, mlp_layers):
    states = {}
    for mode in ("plain", "fast", "balanced", "lean"):
        train("--memory", mode, "--mlp_layers", mlp_layers, "--output_dir", tmp_path / mode).finished()
        states[mode] = load_file(tmp_path / mode / "adapter" / "adapter_model.safetensors")
        torch.testing.assert_close(states[mode], states["plain"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path, monkeypatch, optimizer):
    longer, save = partial(train, "--epochs", 3, "--optimizer", optimizer, "--lr", 0.01), recipe.save_checkpoint
    longer("--output_dir", tmp_path / "whole").finished()

    def interrupt(folder, step, *rest):
        save(folder, step, *rest)
        if step == 6:  # the end of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "save_checkpoint", interrupt)
    assert longer().code == 130
    monkeypatch.setattr(recipe, "save_checkpoint", save)
    assert "--resume" in longer().refused()
    assert "control_rank 16 there, 8 asked for" in longer("--resume", "--control_rank", 8).refused()
    longer("--resume").finished()
    weights = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "run"))
    torch.testing.assert_close(*map(load_file, weights), rtol=0, atol=0)
    assert "is finished" in longer().finished().out


def broken_image_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "set" / split / "one").mkdir(parents=True)
        (tmp_path / "set" / split / "one" / "bad.jpg").write_bytes(b"no image")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda p: ("--data", broken_image_folder(p)), "bad.jpg is no readable image"),
        (lambda p: ("--image_size", 40), "not divisible by the patch size"),
        (lambda p: ("--architecture", "vit_tiny_patch16_224"), "weights of another architecture"),
        (lambda p: ("--model", p / "none.safetensors"), "there is no model"),
        (lambda p: ("--method", "magic"), "unknown method"),
        (lambda p: ("--device", "7"), "no GPU 7"),
        (lambda p: ("--lr", "fast"), "invalid float value"),
        (lambda p: ("--crop", 0), "--crop must be greater than 0, got 0"),
        (lambda p: ("--method", "probe", "--lr_head", 1), "--lr_head is for methods with an adapter"),
        (lambda p: ("--warmup_steps", 2), "--warmup_steps is for --optimizer adamw"),
        (lambda p: ("--method", "lora", "--memory", "fast"), "--memory fast: memory modes need a frozen MLP"),
        (lambda p: ("--predict", p), "needs --adapter"),
        (lambda p: ("--evaluate", p), "no adapter folder"),
        (lambda p: ("--validation_share", 0), "must lie between 0 and 1, both excluded, got 0.0"),
        (lambda p: ("--validation_share", 0.1), "--output_dir below a folder named learning_rate_search"),
        (lambda p: ("--validation_share", 0.1, "--evaluate", p), "is for training"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(train, tmp_path, changed, message):
    assert message in train(*changed(tmp_path)).refused()
    assert not (tmp_path / "run").exists()


def test_data_and_base_model_must_fit_the_adapter(call, train, npz, base_model, tmp_path):
    out = tmp_path / "run"
    train("--epochs", 1).finished()
    arrays = dict(np.load(npz))
    np.savez(tmp_path / "more.npz", **{**arrays, "classes": ["red", "green", "blue", "black"]})
    np.savez(tmp_path / "other.npz", **{**arrays, "classes": ["cyan", "green", "blue"]})
    state = load_file(base_model)
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, tmp_path / "model.safetensors")
    for data, more, message in (
        (tmp_path / "more.npz", (), "4 classes, more than the adapter's head (3)"),
        (tmp_path / "other.npz", (), "are not those that"),
        (npz, ("--model", tmp_path / "model.safetensors"), "checksums differ"),
    ):
        words = ("--device", "cpu", "--evaluate", out / "adapter", "--data", data, *more)
        assert message in call("ViT.finetune", *words).refused()


def test_pictures(call, train, npz, tmp_path):
    runs = [tmp_path / method for method in ("control", "probe")]
    for run in runs:
        train("--method", run.name, "--output_dir", run).finished()
    call("ViT.figures", "--runs", *runs, "--data", npz, "--output_dir", tmp_path / "figures").finished()
    for name in ("accuracy_memory", "curves", "control_images"):
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert "record.json" in call("ViT.figures", "--runs", tmp_path / "nothing", "--output_dir", tmp_path / "none").refused()
    assert not (tmp_path / "none").exists()


def test_an_unreachable_hub_is_one_line(train, tmp_path, monkeypatch):
    told, retries = [], logging.getLogger("huggingface_hub.utils._http")

    def unreachable(*_, **__):
        told.append(retries.isEnabledFor(logging.WARNING))
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("timm.create_model", unreachable)
    huggingface_hub.utils.logging.set_verbosity_warning()
    assert "cannot reach the hub" in train("--model", "vit_tiny_patch16_224").refused()
    assert told == [False]  # nothing more is said of it
    assert not (tmp_path / "run").exists()


def test_the_small_tables_data_may_have_spaces_in_its_paths(launch, started, tmp_path):
    def data(value):
        (words,) = started("ViT/run_small_table.sh", "cpu", DATA=value, PARALLEL_CONTROL_SHARED="/shared")
        return words[words.index("--data") + 1 : words.index("--methods")]

    (tmp_path / "my data").mkdir()
    assert data(str(tmp_path / "my data")) == [str(tmp_path / "my data")]
    assert data("a.npz b.tar") == ["a.npz", "b.tar"]
    assert data("'my data/a.npz' digits") == ["my data/a.npz", "digits"]
    assert data("") == ["/shared/data/vision/cifar100_7k.npz", "/shared/data/vision/flowers12.tar"]
    assert "a quote in DATA is not closed" in launch("ViT/run_small_table.sh", "cpu", DATA="it's").refused()


def test_benchmark(call, npz, tmp_path):
    stdout = call(
        "ViT.benchmark_pipeline", "--data", npz, "--architecture", "test_vit", "--image_size", 32, "--device", "cpu",
        "--steps", 2, "--rounds", 1, "--workers", 0, "--batch_size", 8, "--output_dir", tmp_path,
    ).finished().out  # fmt: skip
    assert {"ours", "resident", "published"} <= set(stdout.split())
    (record,) = tmp_path.glob("*.json")
    metrics = read_record(record).metrics
    rates = metrics["images_per_second"]
    assert metrics["ours_over_resident"] == pytest.approx(rates["ours"] / rates["resident"])


def test_launcher_demonstration(launch, tmp_path):
    recipe = {"MODEL": "tiny", "DATA": "digits", "MLP_LAYERS": 2, "EPOCHS": 4, "BATCH": 32, "LR": 0.05}
    done = launch("ViT/run_ViT.sh", "control", "cpu", "--seed", 3, "--output_dir", tmp_path / "run", **recipe).finished()
    assert done.out.startswith("control on digits with tiny, published recipe, device cpu:")
    record = read_record(tmp_path / "run" / "record.json")
    assert record.seed == 3 and record.metrics["best"]["test_accuracy"] > 35  # five classes
    assert (tmp_path / "run" / "adapter" / "base.safetensors").is_file()


def test_the_tuned_recipe_is_the_other_one(launch, started):
    recipe = {"--optimizer": "adamw", "--lr": "2e-3", "--epochs": "10", "--warmup_steps": "20"}
    for more, changed in (({}, {}), ({"LR": "1e-3", "EPOCHS": 3}, {"--lr": "1e-3", "--epochs": "3"})):
        ((_, *words),) = started("ViT/run_ViT.sh", "lora", "cpu", RECIPE="tuned", **more)
        assert {**recipe, **changed}.items() <= dict(zip(words[::2], words[1::2], strict=True)).items()
    assert "RECIPE is published or tuned, got best" in launch("ViT/run_ViT.sh", "lora", "cpu", RECIPE="best").refused()


def test_launchers_explain_themselves(call, launch, started):
    for script in ("ViT/run_ViT.sh", "ViT/run_small_table.sh"):
        launch(script, "-h").finished()
        assert launch(script).code == 2
    (command,) = started("ViT/run_ViT.sh", "magic", "cpu")
    assert "unknown method 'magic': choose one of control, lora, dora, double control" in call(*command).refused()
