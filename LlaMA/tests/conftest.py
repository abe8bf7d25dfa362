"""A tiny random LLaMA with its own tokenizer, a small data set, and a way to run entry points in this process."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from control_experiments.errors import run_main
from LlaMA.commonsense import TASKS, Row
from LlaMA.models import add_adapter, expected_config, train_tokenizer

NOUNS = ("river", "teacher", "engine", "garden", "letter", "window", "doctor", "bridge", "candle", "market")


def make_row(task: str, number: int) -> dict:
    """A question in the LLM-Adapters format, of a length that depends on its number."""
    draw = random.Random(f"{task} {number}")
    words = TASKS[task][:4]
    answer = draw.choice(words)
    asked = " ".join(draw.choices(NOUNS, k=draw.randint(3, 30)))
    instruction = f"Please choose the correct answer: {asked}?\n\nAnswer format: {'/'.join(words)}"
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """train.json (64 rows) and <task>/test.json (7 rows each)."""
    folder = tmp_path_factory.mktemp("data")
    rows = [make_row(task, number) for number in range(8) for task in TASKS]
    (folder / "train.json").write_text(json.dumps(rows))
    for task in TASKS:
        (folder / task).mkdir()
        (folder / task / "test.json").write_text(json.dumps([make_row(task, 100 + n) for n in range(7)]))
    return folder


@pytest.fixture(scope="session")
def rows(data) -> list[Row]:
    return [Row(**entry) for entry in json.loads((data / "train.json").read_text())]


@pytest.fixture(scope="session")
def tokenizer(rows):
    return train_tokenizer(rows, vocabulary=500)


def tiny_model(vocabulary: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocabulary, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_model(len(tokenizer) + 4)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model(len(tokenizer) + 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(model, method="control+lora"):
    """The model with an adapter whose parameters are random, so that it changes something."""
    model = add_adapter(model, expected_config(method, 4, 1.0, 0.0, 4, 8, 0.0, ("q_proj", "k_proj", "v_proj")))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def call(capsys):
    """Run an entry point as the command line would: (exit code, stdout, stderr)."""

    def run(main, *arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_main(lambda: main([str(argument) for argument in arguments]))
        output = capsys.readouterr()
        return exit_.value.code, output.out, output.err

    return run


def one_line(error: str) -> str:
    """The single `error:` line of what went to stderr."""
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]
