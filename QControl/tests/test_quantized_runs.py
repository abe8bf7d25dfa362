"""Quantized training and evaluation through the scripts and launchers, for real, on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.quantization import loading_arguments
from control_experiments.training.trainer import ExperimentTrainer
from LlaMA import evaluate as llama_evaluate
from LlaMA import finetune as llama_finetune
from LlaMA.models import load_model
from LlaMA.tests.conftest import one_line
from QControl import gradient_error, quantized_memory
from RoBERTa import finetune as roberta_finetune
from scripts import bench_memory

CPU = torch.device("cpu")


@pytest.fixture
def roberta(encoders, glue_folder, tmp_path, call):
    """Train a tiny encoder on CoLA's tiny stand-in."""

    def run(method="control", model="bert", output="run", **options):
        options = {
            "method": method, "task": "cola", "model": encoders.get(model, model), "data": glue_folder, "device": "cpu",
            "epochs": 2, "lr": 1e-2, "batch_size": 8, "output_dir": tmp_path / output, **options,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return call(roberta_finetune.main, *words)

    return run


@pytest.fixture
def llama(model_folder, data, tmp_path, call):
    """Train a tiny LLaMA for two steps."""

    def run(*words, output="llama", quantization="nf4", method="double control"):
        return call(
            llama_finetune.main, "--method", method, "--model", model_folder, "--data", data / "train.json",
            "--output_dir", tmp_path / output, "--device", "cpu", "--max_steps", 2, "--held_out", 4,
            "--control_rank", 4, "--lora_rank", 2, "--lora_alpha", 4, "--quantization", quantization, *words,
        )  # fmt: skip

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
    code, out, err = roberta(method, model, quantization=quantization)
    assert code == 0, err
    assert f"fp32 over {quantization} on cpu" in out
    assert "MatMul8bitLt" not in err
    record = read_record(tmp_path / "run" / "record.json")
    assert (record.domain, record.model["quantization"]) == ("qcontrol", quantization)
    assert record.hyperparameters["quantization"] == quantization
    assert record.adapter["dtype"] == "float32"
    plain_code, _, _ = roberta(method, model, output="plain", max_steps=1)
    plain = read_record(tmp_path / "plain" / "record.json")
    assert plain_code == 0 and (plain.domain, plain.model["quantization"]) == ("roberta", "none")
    for counts in ("trainable_parameters", "head_parameters"):
        assert record.adapter[counts] == plain.adapter[counts]
    assert record.model["total_parameters"] == plain.model["total_parameters"]


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_a_killed_quantized_run_resumes_to_the_same_end(quantization, roberta, tmp_path, monkeypatch):
    """The checkpoint goes onto a freshly quantized base; evaluations before it change nothing."""
    assert roberta(output="whole", quantization=quantization, save_steps=2)[0] == 0
    step, calls = ExperimentTrainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # of 6, after the checkpoint of step 4 and the first epoch's evaluation
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ExperimentTrainer, "training_step", dies)
    assert roberta(quantization=quantization, save_steps=2)[0] == 130
    monkeypatch.undo()
    code, _, err = roberta(quantization="fp4", save_steps=2, resume=True)
    assert code == 2 and f"quantization '{quantization}' there, 'fp4' asked for" in one_line(err)
    assert roberta(quantization=quantization, save_steps=2, resume=True)[0] == 0
    assert read_record(tmp_path / "run" / "record.json").time["resumed_from_step"] == 4
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "run"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)


def test_a_memory_mode_over_nf4_learns_as_plain(roberta, tmp_path):
    for mode in ("plain", "lean"):
        code, _, err = roberta(output=mode, quantization="nf4", memory=mode, max_steps=3)
        assert code == 0, err
    plain, lean = (weights(tmp_path / mode) for mode in ("plain", "lean"))
    torch.testing.assert_close(lean, plain, rtol=0, atol=2e-4)


def test_a_quantized_encoder_is_not_quantized_again_but_trains_as_it_is(roberta, encoders, tmp_path):
    stored = tmp_path / "stored"
    loading = loading_arguments("nf4", CPU, torch.float32)
    AutoModelForSequenceClassification.from_pretrained(encoders["bert"], **loading).save_pretrained(stored)
    for file in encoders["bert"].glob("token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    code, _, err = roberta(model=str(stored), quantization="int8")
    assert code == 2 and "is quantized already (nf4)" in one_line(err)
    assert not (tmp_path / "run").exists()
    code, _, err = roberta(model=str(stored), max_steps=2)
    assert code == 0, err
    assert read_record(tmp_path / "run" / "record.json").model["quantization"] == "nf4"


def test_bad_input_is_one_line(roberta, tmp_path, monkeypatch):
    code, _, err = roberta(quantization="int3")
    assert code == 2 and "invalid choice: 'int3'" in one_line(err)
    code, _, err = roberta("dora", quantization="int8")
    assert code == 2 and "dora over int8 needs a GPU" in one_line(err)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    code, _, err = roberta(quantization="nf4")
    assert code == 2 and "pip install bitsandbytes" in one_line(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_roberta_launcher(launch, encoders, glue_folder, tmp_path):
    done = launch(
        "run_roberta_quantization.sh", "QControl", "rte", 1, "1e-2", "cpu", "--max_steps", 1, "--output_dir", "out",
        MODEL=encoders["roberta"], DATA=glue_folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "out" / "record.json")
    assert record.method == "control" and record.domain == "qcontrol"
    chosen = record.hyperparameters
    assert (chosen["quantization"], chosen["batch_size"], chosen["precision"]) == ("nf4", 256, "fp32")


@pytest.mark.parametrize(
    "name, method", [("QControl", "control"), ("QLoRA", "lora"), ("QDoRA", "dora"), ("double control", "double control")]
)
def test_the_roberta_launchers_recipe(launch, name, method):
    done = launch("run_roberta_quantization.sh", name, "rte", PYTHON="echo")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    for part in (
        f"--method {method} --task rte --model roberta-base --epochs 320 --lr 4e-4 --device 0 --seed 42",
        "--batch_size 256 --max_length 128 --warmup_ratio 0.06 --weight_decay 0.1",
        "--precision fp16",
        "--quantization nf4",
    ):
        assert part in said
    other = launch("run_roberta_quantization.sh", name, "rte", PYTHON="echo", QUANTIZATION="int8")
    assert "--quantization int8" in other.stdout.splitlines()[-1]


@pytest.mark.slow
def test_launchers_say_what_is_wrong(launch):
    for name, arguments, part in (
        ("run_roberta_quantization.sh", ["QControl"], "METHOD and TASK are needed"),
        ("run_roberta_quantization.sh", ["QBitFit", "rte"], "unknown method 'QBitFit': choose one of control"),
        ("run_roberta_quantization.sh", ["QControl", "sst5"], "unknown task 'sst5'"),
        ("run_llama_quantization.sh", ["control", 4], "METHOD CONTROL_RANK LORA_RANK"),
    ):
        done = launch(name, *arguments)
        assert done.returncode == 2
        assert part in one_line(done.stderr)


@pytest.mark.slow
def test_the_llama_launcher_trains_and_evaluates_over_nf4(launch, model_folder, data, tmp_path):
    done = launch(
        "run_llama_quantization.sh", "control+lora", 4, 2, 4, "out", "cpu", "--max_steps", 2, "--held_out", 4,
        MODEL=model_folder, DATA=data, TRAIN_DATA=data / "train.json", MEMORY="lean",
        EVALUATE_ARGS="--limit 1 --max_new_tokens 4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    for folder in ("out", "out/evaluation"):
        record = read_record(tmp_path / folder / "record.json")
        assert (record.domain, record.model["quantization"]) == ("qcontrol", "nf4")
        assert record.hyperparameters["quantization"] == "nf4"
    assert record.adapter["adapter_parameters"] == 2 * (2 * 4 * 32 + 2 * (32 + 32) + 2 * 2 * (32 + 16))


def test_evaluating_over_another_quantization_warns(llama, model_folder, data, tmp_path, call):
    assert llama()[0] == 0
    words = (
        "--model", model_folder, "--adapter", tmp_path / "llama" / "adapter", "--data", data, "--device", "cpu",
        "--limit", 1, "--max_new_tokens", 2, "--beams", 1, "--tasks", "boolq",
    )  # fmt: skip
    code, _, err = call(llama_evaluate.main, *words, "--output_dir", tmp_path / "other")
    assert code == 0
    assert err.count("warning:") == 1 and "--quantization nf4, the base here is loaded with none" in err
    words += ("--output_dir", tmp_path / "same", "--quantization")
    code, _, err = call(llama_evaluate.main, *words, "nf4")
    assert code == 0 and "warning:" not in err
    code, _, err = call(llama_evaluate.main, *words, "fp4")
    assert code == 2 and "quantization" in one_line(err)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_paged_optimizer_trains_nearly_as_adamw_does(llama, tmp_path):
    losses = {}
    for optimizer in ("adamw", "paged_adamw_8bit"):
        words = ("--device", 0, "--optimizer", optimizer, "--max_steps", 6, "--eval_steps", 2, "--lr", 1e-2)
        code, _, err = llama(*words, output=optimizer)
        assert code == 0, err
        history = read_record(tmp_path / optimizer / "record.json").history
        losses[optimizer] = [entry["eval_loss"] for entry in history]
    exact, paged = losses.values()
    assert len(exact) == 3 and paged[-1] < paged[0]
    assert paged == pytest.approx(exact, rel=0.05)


def test_llama_bad_input_is_one_line(llama, model_folder, tmp_path, call, data):
    code, _, err = llama("--optimizer", "paged_adamw_8bit")
    assert code == 2 and "--optimizer paged_adamw_8bit needs a GPU" in one_line(err)
    code, _, err = llama(method="dora", quantization="int8")
    assert code == 2 and "needs a GPU" in one_line(err)
    stored = tmp_path / "stored"
    loading = loading_arguments("nf4", CPU, torch.float32)
    AutoModelForCausalLM.from_pretrained(model_folder, **loading).save_pretrained(stored)
    for file in model_folder.glob("token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    code, _, err = llama("--model", stored)
    assert code == 2 and "is quantized already (nf4)" in one_line(err)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot be quantized on loading"):
        load_model(str(tmp_path / "tiny.gguf"), torch.float32, CPU, quantization="nf4")
    assert not (tmp_path / "llama").exists()


def test_int8_trains_too(llama, tmp_path):
    code, out, err = llama(quantization="int8")
    assert code == 0 and "fp32 over int8 on cpu" in out and "MatMul8bitLt" not in err, err
    assert read_record(tmp_path / "llama" / "record.json").model["quantization"] == "int8"


def test_benchmarks_tables_are_calls_of_the_memory_benchmark(call, monkeypatch):
    calls = []
    monkeypatch.setattr(bench_memory, "main", calls.append)
    for shape in ("roberta-base", "llama3-8b", "tiny-roberta", "tiny"):
        assert call(quantized_memory.main, "--shape", shape, "--device", "cpu", "--warmup", 0)[0] == 0
    options = [parse_arguments(bench_memory.Options, argv=words)[0] for words in calls]
    assert [(o.shape, o.batch, o.tokens) for o in options] == [
        ("roberta-base", 64, 128), ("roberta-base", 256, 128), ("llama3-8b", 1, 256), ("llama3-8b", 1, 2048),
        ("tiny-roberta", 2, 16), ("tiny", 2, 16),
    ]  # fmt: skip
    methods = [options[place].with_defaults().methods for place in (3, 4)]
    assert {"control+nf4:lean", "lora-qkv+uncast+nf4", "lora-qkv+uncast+checkpointing+nf4"} < set(methods[0])
    assert methods[1] == ["control+fp32", "lora+fp32", "control+nf4", "lora+nf4"]


def test_bases_are_compared_by_the_gradients_over_them(model_folder, data, tmp_path, call):
    words = ("--model", model_folder, "--data", data / "train.json", "--rows", 2, "--device", "cpu", "--output_dir", tmp_path)
    code, out, err = call(gradient_error.main, *words, "--bases", "bf16", "fp8", "fp8-e5m2")
    assert code == 0, err
    found = json.loads((tmp_path / "record.json").read_text())["relative_error"]
    assert (tmp_path / "gradient_error.png").stat().st_size > 10_000
    means = {base: sum(sum(values) for values in blocks.values()) for base, blocks in found.items()}
    assert 0 < means["bf16"] < means["fp8"] < means["fp8-e5m2"]
    code, _, err = call(gradient_error.main, *words, "--bases", "fp7")
    assert code == 2 and "unknown base 'fp7'" in one_line(err)
