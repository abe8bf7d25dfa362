"""A tiny random LLaMA with its own tokenizer, and a small data set."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM

from control_experiments.training.methods import adapter_config
from control_experiments.training.options import AdapterOptions
from LlaMA.commonsense import IGNORE, TASKS, Row, read_rows
from LlaMA.finetune import MIXED_TARGETS
from LlaMA.models import add_adapter, train_tokenizer

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


def save_data(folder: Path) -> Path:
    """train.json (64 rows) and <task>/test.json (7 rows each) in a folder."""
    for task in TASKS:
        (folder / task).mkdir(parents=True)
        (folder / task / "test.json").write_text(json.dumps([make_row(task, 100 + n) for n in range(7)]))
    (folder / "train.json").write_text(json.dumps([make_row(task, number) for number in range(8) for task in TASKS]))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def rows(data) -> list[Row]:
    return read_rows(data / "train.json")


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


def save_model(folder: Path, tokenizer) -> Path:
    tiny_model(len(tokenizer) + 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_model(len(tokenizer) + 4)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


def configuration(method, targets=MIXED_TARGETS, **options):
    """peft's configuration of a method at rank 4."""
    options = AdapterOptions(method=method, **{"control_rank": 4, "lora_rank": 4, "lora_alpha": 8, **options})
    return adapter_config(options, task_type="CAUSAL_LM", targets=targets)


def adapted(model, method="control+lora"):
    """The model with an adapter whose parameters are random, so that it changes something."""
    model = add_adapter(model, configuration(method))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def published_loss(model, step, micro_batch=4):
    """The Trainer's own arithmetic: transformers' mean loss of each padded micro-batch, averaged over them."""
    losses = []
    for start in range(0, len(step), micro_batch):
        rows = step[start : start + micro_batch]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], True, IGNORE)
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.labels) for row in rows], True, IGNORE)
        losses.append(model(input_ids=ids.clamp(min=0), attention_mask=(ids != IGNORE).long(), labels=labels).loss)
    return sum(losses) / len(losses)


def interrupted(steps: int):
    """``with interrupted(5):`` a training is interrupted when so many steps are done."""
    left = [None] * steps

    def take_one(*_):
        if not left:
            raise KeyboardInterrupt
        left.pop()

    return register_optimizer_step_pre_hook(take_one)


def assert_same_adapters(one, other):
    """The adapters of two runs are the same to the bit."""
    weights = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def training_options(model, data, out, *more, method="control+lora") -> list:
    """Options of a training of the tiny model that takes a second."""
    return [
        "--method", method, "--model", model, "--data", data / "train.json", "--output_dir", out, "--device", "cpu",
        "--max_steps", 6, "--eval_steps", 2, "--held_out", 6, "--warmup_steps", 1, "--lr", "1e-2", "--control_rank", 4,
        "--lora_rank", 2, "--lora_alpha", 4, *more,
    ]  # fmt: skip


@pytest.fixture
def train_llama(call, model_folder, data, tmp_path):
    """``train_llama("--lr", 1)``: such a training into tmp_path/"run", or where the last --output_dir says."""
    return partial(call, "LlaMA.finetune", *training_options(model_folder, data, tmp_path / "run"))
