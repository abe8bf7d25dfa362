"""The encoder of a GLUE run: its tokenizer, its weights with a new head, the method's adapter, and its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from peft import PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from control_experiments.errors import UserError
from control_experiments.training.device import DTYPES
from control_experiments.training.methods import adapter_config, loading
from control_experiments.training.quantization import check_not_quantized, loading_arguments, prepare
from RoBERTa.finetune import Options
from RoBERTa.glue import Task

#: The names of the query and value projections, which LoRA adapts in the paper's recipe: peft's, and others that it lacks.
QUERY_VALUE = {**TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "mpnet": ["q", "v"], "distilbert": ["q_lin", "v_lin"]}


def load_tokenizer(name: str) -> Tokenizer:
    """The encoder's tokenizer. Raises UserError: there is none."""
    with loading(name):
        return AutoTokenizer.from_pretrained(name)


def load_model(
    name: str, task: Task, quantization: str = "none", device: torch.device | str = "cpu", precision: str = "fp32"
) -> PreTrainedModel:
    """The encoder in float32 with a new head for the task, or with its linear layers quantized, then on
    `device`. Raises UserError: there is no such model, it is no sequence classifier, or it cannot be quantized."""
    names = task.classes or ("score",)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if task.regression:
        labels["problem_type"] = "regression"
    quantized = loading_arguments(quantization, device, DTYPES[precision])
    with loading(name):
        config = AutoConfig.from_pretrained(name, **labels)
        check_not_quantized(quantization, config, name)
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=torch.float32, **quantized)
    return prepare(model)


def predict_mean(model: PreTrainedModel, labels: Sequence[float]) -> None:
    """Have a new head for regression predict the labels' mean for any row, so far as it predicts nothing else yet.

    From zero the first steps push the output of all rows the same way. An encoder may then end where all rows look the same,
    and the loss stays that of a constant, as with STS-B.
    """
    *_, head = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    with torch.no_grad():
        head.bias.fill_(sum(labels) / len(labels))


def save(model: PeftModel, tokenizer: Tokenizer, folder: Path) -> None:
    """The adapter, its tokenizer, and the base's configuration, from which `peft_control export` takes the classes' names."""
    for part in (model, tokenizer, model.get_base_model().config):
        part.save_pretrained(folder)


def check_length(options: Options, model: PreTrainedModel) -> None:
    """Raise UserError for a `max_length` of more tokens than the model has positions for.

    RoBERTa and its kin (XLM-RoBERTa, MPNet, ...) count positions from behind that of the padding token, so that they read
    that many fewer; their table of positions is known by its `padding_idx`.
    """
    longest = getattr(model.config, "max_position_embeddings", options.max_length)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    if options.max_length > longest:
        given = f"--max_length {options.max_length}"
        raise UserError(f"{given} is more than {options.model} can read ({longest} tokens)")


def add_adapter(model: PreTrainedModel, options: Options) -> PeftModel:
    """The model with the method's adapter; the adapter and the classifier are what trains. Raises UserError:
    the architecture has no such blocks or target modules."""
    targets = options.lora_targets or QUERY_VALUE.get(model.config.model_type, ["query", "value"])
    config = adapter_config(options, task_type="SEQ_CLS", targets=targets)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        asked = f" (target modules asked for: {', '.join(targets)})" if config.target_modules else ""
        raise UserError(f"{options.method} on {options.model}: {error}{asked}") from error


def tokenize(splits: datasets.DatasetDict, tokenizer: Tokenizer, max_length: int) -> datasets.DatasetDict:
    """Token ids of each row and their `length`; dev and test sets also get their `row` and are sorted by length, so
    that batches padded to their longest row waste little. Padding itself is the collator's."""

    def encode(rows: dict, indices: list[int]) -> dict:
        pair = rows["second"] if "second" in texts else None
        encoded = tokenizer(rows["first"], pair, truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]], "row": indices}

    texts = [column for column in next(iter(splits.values())).column_names if column != "label"]
    encoded = splits.map(encode, batched=True, with_indices=True, remove_columns=texts, keep_in_memory=True)
    for name in encoded:
        if name != "train":
            encoded[name] = encoded[name].sort("length", reverse=True, keep_in_memory=True)
    return encoded


def collator(options: Options, tokenizer: Tokenizer) -> DataCollatorWithPadding:
    multiple = 16 if options.cuda_graphs else None
    return DataCollatorWithPadding(tokenizer, options.padding, options.max_length, multiple)
