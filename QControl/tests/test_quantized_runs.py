"""Quantized training and evaluation through the scripts and launchers, for real, on the CPU."""

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.training.quantization import loading_arguments
from LlaMA.models import load_model

CPU = torch.device("cpu")
LAUNCHER = "QControl/run_llama_quantization.sh"


@pytest.fixture
def llama(train_llama):
    """Train a tiny LLaMA for two steps over nf4."""
    return partial(train_llama, "--max_steps", 2, "--held_out", 4, "--method", "double control", "--quantization", "nf4")


@pytest.mark.parametrize(
    "method, model, quantization",
    [("dora", "mpnet", "nf4"), ("control+dora", "roberta", "fp4"), ("lora", "roberta", "int8"), ("control", "bert", "fp8")],
)
def test_encoders_train_quantized(train_roberta, encoders, tmp_path, method, model, quantization):
    train = partial(train_roberta, "--method", method, "--model", encoders[model])
    said = train("--quantization", quantization)
    record, plain = said.record, train("--max_steps", 1, "--output_dir", tmp_path / "plain").record
    assert f"fp32 over {quantization} on cpu" in said.out and "MatMul8bitLt" not in said.err
    assert (record.domain, record.model["quantization"]) == ("qcontrol", quantization)
    assert (plain.domain, plain.model["quantization"]) == ("roberta", "none")
    assert record.hyperparameters["quantization"] == quantization
    assert record.adapter["dtype"] == "float32"
    for counts in ("trainable_parameters", "head_parameters"):
        assert record.adapter[counts] == plain.adapter[counts]
    assert record.model["total_parameters"] == plain.model["total_parameters"]


def test_a_quantized_model_is_not_quantized_again_but_trains_as_it_is(train_roberta, llama, encoders, model_folder, tmp_path):
    for train, auto_model, model in (
        (train_roberta, AutoModelForSequenceClassification, encoders["bert"]), (llama, AutoModelForCausalLM, model_folder)
    ):  # fmt: skip
        stored = shutil.copytree(model, tmp_path / model.name)
        auto_model.from_pretrained(model, **loading_arguments("nf4", CPU, torch.float32)).save_pretrained(stored)
        assert "is quantized already (nf4)" in train("--model", stored, "--quantization", "int8").refused()
        assert not (tmp_path / "run").exists()
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot be quantized on loading"):
        load_model(str(tmp_path / "tiny.gguf"), torch.float32, CPU, quantization="nf4")
    assert train_roberta("--model", tmp_path / "bert", "--max_steps", 2).record.model["quantization"] == "nf4"


def test_what_quantization_needs_is_said(train_roberta, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    assert "pip install -U bitsandbytes" in train_roberta("--quantization", "nf4").refused()


def test_the_llama_launcher_trains_and_evaluates_over_nf4(call, started, model_folder, data, tmp_path):
    programs = started(
        LAUNCHER, "control+lora", 4, 2, 4, tmp_path / "out", "cpu", "--max_steps", 2, "--held_out", 4, MODEL=model_folder,
        DATA=data, TRAIN_DATA=data / "train.json", MEMORY="lean", EVALUATE_ARGS="--limit 1 --max_new_tokens 4",
    )  # fmt: skip
    assert not any("warning" in call(*program).finished().err for program in programs)
    for folder in ("out", "out/evaluation"):
        record = read_record(tmp_path / folder / "record.json")
        assert (record.domain, record.model["quantization"]) == ("qcontrol", "nf4")
        assert record.hyperparameters["quantization"] == "nf4"
    assert record.adapter["adapter_parameters"] == 2 * (2 * 4 * 32 + 2 * (32 + 32) + 2 * 2 * (32 + 16))


def test_evaluating_over_another_quantization_warns(llama, model_folder, data, tmp_path, call):
    llama().finished()
    words = (
        "--model", model_folder, "--adapter", tmp_path / "run" / "adapter", "--data", data, "--device", "cpu",
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
        history = llama(*words, "--output_dir", tmp_path / optimizer).record.history
        losses[optimizer] = [entry["eval_loss"] for entry in history]
    exact, paged = losses.values()
    assert len(exact) == 3 and paged[-1] < paged[0]
    assert paged == pytest.approx(exact, rel=0.05)


def test_bases_are_compared_by_the_gradients_over_them(model_folder, data, tmp_path, call):
    words = ("--model", model_folder, "--data", data / "train.json", "--rows", 2, "--device", "cpu", "--output_dir", tmp_path)
    call("QControl.gradient_error", *words, "--bases", "bf16", "fp8states", "fp8", "fp8-e5m2").finished()
    found = json.loads((tmp_path / "record.json").read_text())["relative_error"]
    assert (tmp_path / "gradient_error.png").stat().st_size > 10_000
    means = {base: sum(sum(values) for values in blocks.values()) for base, blocks in found.items()}
    assert 0 < means["bf16"] < means["fp8states"] < means["fp8"] < means["fp8-e5m2"]
    assert "argument --bases: invalid choice: 'fp7'" in call("QControl.gradient_error", *words, "--bases", "fp7").refused()
