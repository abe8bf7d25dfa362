"""The tiny models and data of the RoBERTa and LlaMA tests."""

from LlaMA.tests.conftest import data, model_folder, rows, tokenizer, train_llama  # noqa: F401
from RoBERTa.tests.conftest import encoders, glue_folder, train_roberta  # noqa: F401
