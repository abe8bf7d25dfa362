"""What the two benchmarks share: a bare training loop, and a tokenizer for models that have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from control_experiments.training.metering import MemoryMeter, Throughput
from LlaMA.commonsense import Row
from LlaMA.packing import Batch
from LlaMA.prompts import prompt


def run_steps(
    model: torch.nn.Module,
    steps: Sequence[list[Batch]],
    loss: Callable,
    device: torch.device,
    dtype: torch.dtype,
    *,
    warmup: int,
    memory: MemoryMeter | None = None,
) -> Throughput:
    """Train on `steps` (each a list of batches whose gradients add up) with AdamW under autocast.

    The first `warmup` steps, in which kernels are chosen and memory is first taken, are not timed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    throughput = Throughput(device)
    model.train()
    for number, batches in enumerate(steps):
        if number == warmup:
            throughput.start()
        for batch in batches:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                value = loss(model, batch.to(device))
            value.backward()
            if number >= warmup:
                throughput.add(batch.rows, batch.tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number >= warmup:
            throughput.step()
        if memory is not None:
            memory.after_optimizer()
    throughput.stop()
    return throughput


def train_tokenizer(
    rows: Sequence[Row], vocabulary: int = 16384, limit: int = 4000
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer made from the data's own prompts, for shapes with random weights: rows get about as many
    tokens as a LLaMA tokenizer gives them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [prompt(row.instruction, row.input) + row.output for row in islice(rows, limit)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
