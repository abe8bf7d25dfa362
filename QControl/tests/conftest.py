"""The tiny models and data of the RoBERTa and LlaMA tests, and how entry points are called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MPNetConfig, MPNetModel

from LlaMA.tests.conftest import call, data, model_folder, rows, tokenizer  # noqa: F401
from RoBERTa.tests.conftest import encoders as two_encoders  # noqa: F401
from RoBERTa.tests.conftest import glue_folder, save_tokenizer  # noqa: F401

FOLDER = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def encoders(two_encoders, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    """Folders of a tiny random BERT, RoBERTa and MPNet, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("mpnet") / "mpnet"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(**shape, vocab_size=20, max_position_embeddings=132, pad_token_id=1)).save_pretrained(folder)
    save_tokenizer(folder)
    return {**two_encoders, "mpnet": folder}


@pytest.fixture
def launch(tmp_path):
    """Run a launcher of this folder as users do, from another folder."""

    def run(name, *arguments, **variables) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHON": sys.executable}
        environment |= {key: str(value) for key, value in variables.items()}
        command = ["bash", str(FOLDER / name), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run
