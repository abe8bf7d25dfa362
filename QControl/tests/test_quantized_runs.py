"""Quantized training and evaluation through the scripts and launchers, for real, on the CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.training.quantization import loading_arguments
from LlaMA.models import load_model
from LlaMA.tests.conftest import training_options

CPU = torch.device("cpu")
ROBERTA, LLAMA = "QControl/run_roberta_quantization.sh", "QControl/run_llama_quantization.sh"


@pytest.fixture
def roberta(encoders, glue_folder, tmp_path, call):
    """Train a tiny encoder on CoLA's tiny stand-in."""

    def run(method="control", model="bert", output="run", **options):
        options = {
            "method": method, "task": "cola", "model": encoders.get(model, model), "data": glue_folder, "device": "cpu",
            "epochs": 2, "lr": 1e-2, "batch_size": 8, "output_dir": tmp_path / output, **options,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return call("RoBERTa.finetune", *words)

    return run


@pytest.fixture
def llama(model_folder, data, tmp_path, call):
    """Train a tiny LLaMA for two steps."""

    def run(*words, output="llama", quantization="nf4", method="double control"):
        more = ("--max_steps", 2, "--held_out", 4, "--quantization", quantization, *words)
        return call("LlaMA.finetune", *training_options(model_folder, data, tmp_path / output, *more, method=method))

    return run


@pytest.mark.parametrize(
    "method, model, quantization",
    [
        ("control", "roberta", "nf4"),
        ("lora", "bert", "nf4"),
        ("dora", "mpnet", "nf4"),
        ("control+dora", "roberta", "fp4"),
        ("control", "mpnet", "int8"),
        ("lora", "roberta", "int8"),
        ("control", "bert", "fp8"),
        ("dora", "roberta", "fp8"),
    ],
)
def test_encoders_train_quantized(roberta, tmp_path, method, model, quantization):
    _, out, err = roberta(method, model, quantization=quantization).finished()
    assert f"fp32 over {quantization} on cpu" in out
    assert "MatMul8bitLt" not in err
    record = read_record(tmp_path / "run" / "record.json")
    assert (record.domain, record.model["quantization"]) == ("qcontrol", quantization)
    assert record.hyperparameters["quantization"] == quantization
    assert record.adapter["dtype"] == "float32"
    roberta(method, model, output="plain", max_steps=1).finished()
    plain = read_record(tmp_path / "plain" / "record.json")
    assert (plain.domain, plain.model["quantization"]) == ("roberta", "none")
    for counts in ("trainable_parameters", "head_parameters"):
        assert record.adapter[counts] == plain.adapter[counts]
    assert record.model["total_parameters"] == plain.model["total_parameters"]


def test_a_memory_mode_over_nf4_learns_as_plain(roberta, tmp_path):
    for mode in ("plain", "lean"):
        roberta(output=mode, quantization="nf4", memory=mode, max_steps=3).finished()
    adapters = (load_file(tmp_path / mode / "adapter" / "adapter_model.safetensors") for mode in ("plain", "lean"))
    torch.testing.assert_close(*adapters, rtol=0, atol=2e-4)
    refused = roberta(output="lean", quantization="fp4", memory="lean", max_steps=3).refused()
    assert "quantization 'nf4' there, 'fp4' asked for" in refused


def stored_in_nf4(auto_model, model_folder, folder):
    """The folder with a copy of the model whose weights are quantized already."""
    auto_model.from_pretrained(model_folder, **loading_arguments("nf4", CPU, torch.float32)).save_pretrained(folder)
    for file in model_folder.glob("token*"):
        shutil.copy(file, folder)
    return folder


def test_a_quantized_encoder_is_not_quantized_again_but_trains_as_it_is(roberta, encoders, tmp_path):
    stored = stored_in_nf4(AutoModelForSequenceClassification, encoders["bert"], tmp_path / "stored")
    assert "is quantized already (nf4)" in roberta(model=str(stored), quantization="int8").refused()
    assert not (tmp_path / "run").exists()
    roberta(model=str(stored), max_steps=2).finished()
    assert read_record(tmp_path / "run" / "record.json").model["quantization"] == "nf4"


def test_bad_input_is_one_line(roberta, tmp_path, monkeypatch):
    assert "invalid choice: 'int3'" in roberta(quantization="int3").refused()
    assert "dora over int8 needs a GPU" in roberta("dora", quantization="int8").refused()
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    assert "pip install bitsandbytes" in roberta(quantization="nf4").refused()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_roberta_launcher(launch, encoders, glue_folder, tmp_path):
    more = ("--max_steps", 1, "--output_dir", "out")
    launch(ROBERTA, "QControl", "rte", 1, "1e-2", "cpu", *more, MODEL=encoders["roberta"], DATA=glue_folder).finished()
    record = read_record(tmp_path / "out" / "record.json")
    assert record.method == "control" and record.domain == "qcontrol"
    chosen = record.hyperparameters
    assert (chosen["quantization"], chosen["batch_size"], chosen["precision"]) == ("nf4", 256, "fp32")


@pytest.mark.parametrize(
    "name, method", [("QControl", "control"), ("QLoRA", "lora"), ("QDoRA", "dora"), ("double control", "double control")]
)
def test_the_roberta_launchers_recipe(started, name, method):
    """The paper's, which scripts/tests/test_readmes.py compares, by the names that users know."""
    for quantization in ("nf4", "int8"):
        ((program, *words),) = started(ROBERTA, name, "rte", QUANTIZATION=quantization)
        recipe = f"--method {method} --task rte --model roberta-base --epochs 320 --lr 4e-4 --device 0 --seed 42"
        for part in (recipe, "--batch_size 256", "--precision fp16", f"--quantization {quantization}"):
            assert part in " ".join(words)


@pytest.mark.slow
def test_launchers_say_what_is_wrong(launch):
    for script, arguments, part in (
        (ROBERTA, ["QControl"], "METHOD and TASK are needed"),
        (ROBERTA, ["QBitFit", "rte"], "unknown method 'QBitFit': choose one of control"),
        (ROBERTA, ["QControl", "sst5"], "unknown task 'sst5'"),
        (LLAMA, ["control", 4], "METHOD CONTROL_RANK LORA_RANK"),
    ):
        assert part in launch(script, *arguments).refused()


@pytest.mark.slow
def test_the_llama_launcher_trains_and_evaluates_over_nf4(launch, model_folder, data, tmp_path):
    done = launch(
        LLAMA, "control+lora", 4, 2, 4, "out", "cpu", "--max_steps", 2, "--held_out", 4, MODEL=model_folder, DATA=data,
        TRAIN_DATA=data / "train.json", MEMORY="lean", EVALUATE_ARGS="--limit 1 --max_new_tokens 4",
    )  # fmt: skip
    assert "warning" not in done.finished().err
    for folder in ("out", "out/evaluation"):
        record = read_record(tmp_path / folder / "record.json")
        assert (record.domain, record.model["quantization"]) == ("qcontrol", "nf4")
        assert record.hyperparameters["quantization"] == "nf4"
    assert record.adapter["adapter_parameters"] == 2 * (2 * 4 * 32 + 2 * (32 + 32) + 2 * 2 * (32 + 16))


def test_evaluating_over_another_quantization_warns(llama, model_folder, data, tmp_path, call):
    llama().finished()
    words = (
        "--model", model_folder, "--adapter", tmp_path / "llama" / "adapter", "--data", data, "--device", "cpu",
        "--limit", 1, "--max_new_tokens", 2, "--beams", 1, "--tasks", "boolq",
    )  # fmt: skip
    err = call("LlaMA.evaluate", *words, "--output_dir", tmp_path / "other").finished().err
    assert err.count("warning:") == 1 and "--quantization nf4, the base here is loaded with none" in err
    words += ("--output_dir", tmp_path / "same", "--quantization")
    assert "warning:" not in call("LlaMA.evaluate", *words, "nf4").finished().err
    assert "quantization" in call("LlaMA.evaluate", *words, "fp4").refused()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_paged_optimizer_trains_nearly_as_adamw_does(llama, tmp_path):
    losses = {}
    for optimizer in ("adamw", "paged_adamw_8bit"):
        words = ("--device", 0, "--optimizer", optimizer, "--max_steps", 6, "--eval_steps", 2, "--lr", 1e-2)
        llama(*words, output=optimizer).finished()
        history = read_record(tmp_path / optimizer / "record.json").history
        losses[optimizer] = [entry["eval_loss"] for entry in history]
    exact, paged = losses.values()
    assert len(exact) == 3 and paged[-1] < paged[0]
    assert paged == pytest.approx(exact, rel=0.05)


def test_llama_bad_input_is_one_line(llama, model_folder, tmp_path, call, data):
    assert "--optimizer paged_adamw_8bit needs a GPU" in llama("--optimizer", "paged_adamw_8bit").refused()
    assert "needs a GPU" in llama(method="dora", quantization="int8").refused()
    stored = stored_in_nf4(AutoModelForCausalLM, model_folder, tmp_path / "stored")
    assert "is quantized already (nf4)" in llama("--model", stored).refused()
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot be quantized on loading"):
        load_model(str(tmp_path / "tiny.gguf"), torch.float32, CPU, quantization="nf4")
    assert not (tmp_path / "llama").exists()


def test_int8_trains_too(llama, tmp_path):
    _, out, err = llama(quantization="int8").finished()
    assert "fp32 over int8 on cpu" in out and "MatMul8bitLt" not in err
    assert read_record(tmp_path / "llama" / "record.json").model["quantization"] == "int8"


def test_bases_are_compared_by_the_gradients_over_them(model_folder, data, tmp_path, call):
    words = ("--model", model_folder, "--data", data / "train.json", "--rows", 2, "--device", "cpu", "--output_dir", tmp_path)
    call("QControl.gradient_error", *words, "--bases", "bf16", "fp8", "fp8-e5m2").finished()
    found = json.loads((tmp_path / "record.json").read_text())["relative_error"]
    assert (tmp_path / "gradient_error.png").stat().st_size > 10_000
    means = {base: sum(sum(values) for values in blocks.values()) for base, blocks in found.items()}
    assert 0 < means["bf16"] < means["fp8"] < means["fp8-e5m2"]
    assert "unknown base 'fp7'" in call("QControl.gradient_error", *words, "--bases", "fp7").refused()
