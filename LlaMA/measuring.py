"""A tokenizer for models of random weights, which have none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from LlaMA.commonsense import Row
from LlaMA.prompts import prompt


def train_tokenizer(rows: Sequence[Row], vocabulary: int = 16384, limit: int = 4000) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer made from the data's own prompts, for shapes with random weights: rows get about as many
    tokens as a LLaMA tokenizer gives them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [prompt(row.instruction, row.input) + row.output for row in islice(rows, limit)]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    how = {"special_tokens": list(special.values()), "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **how)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
