"""Tiny random encoders and tiny GLUE folders, made on the fly."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

WORDS = [
    "the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "big", "small", "red", "blue", "runs", "sleeps", "not", "and",
]  # fmt: skip


def save_encoder(folder: Path, kind: str = "Bert") -> Path:
    """A folder of a tiny random encoder with its tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=4 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=1, initializer_range=0.3, max_position_embeddings=130 if kind == "Bert" else 132,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    roles = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names = ["input_ids", "attention_mask"]
    transformers.BertTokenizerFast(vocabulary, model_input_names=names, **roles).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Folders of a tiny random BERT, RoBERTa and MPNet."""
    root = tmp_path_factory.mktemp("encoders")
    return {kind.lower(): save_encoder(root / kind.lower(), kind) for kind in ("Bert", "Roberta", "MPNet")}


# The column layouts of the official GLUE files, written from the benchmark's description, not from our reader.
HEADERS = {
    "CoLA": None,
    "SST-2": "sentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
}
TEST_HEADERS = {
    **dict.fromkeys(("CoLA", "SST-2"), "index\tsentence"),
    "MRPC": "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tquestion1\tquestion2",
    "STS-B": HEADERS["STS-B"].removesuffix("\tscore"),
    "MNLI": HEADERS["MNLI"].removesuffix("\tlabel1\tgold_label"),
}
LABELS = {
    **dict.fromkeys(("RTE", "QNLI"), ("entailment", "not_entailment")),
    "MNLI": ["entailment", "neutral", "contradiction"],
    "STS-B": ["0.000", "2.500", "4.250", "5.000"],
}
TEXT_COLUMNS = {"sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String"}
LABEL_COLUMNS = {"label", "Quality", "is_duplicate", "score", "gold_label"}


def write_glue(root: Path, folder: str, train: int = 24) -> Path:
    """A tiny folder of one task in the classic layout; returns `root`, the DATA to pass."""
    rng = random.Random(folder)
    labels = LABELS.get(folder, ["0", "1"])
    (root / folder).mkdir(parents=True)
    kinds = ("_matched", "_mismatched") if folder == "MNLI" else ("",)
    sizes = {"train": train, **{f"{split}{kind}": n for split, n in (("dev", 10), ("test", 7)) for kind in kinds}}
    for split, rows in sizes.items():
        header = HEADERS[folder]
        if split.startswith("test"):
            header = TEST_HEADERS.get(folder, (header or "").removesuffix("\tlabel"))
        columns = header.split("\t") if header else ["source", "label", "star", "sentence"]
        lines = [header] if header else []
        for row in range(rows):
            cells = dict.fromkeys(columns, str(row))
            cells |= {column: labels[row % len(labels)] for column in columns if column in LABEL_COLUMNS}
            cells |= {name: " ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for name in columns if name in TEXT_COLUMNS}
            lines.append("\t".join(cells.values()))
        (root / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory) -> Path:
    """All nine tasks in the classic layout."""
    root = tmp_path_factory.mktemp("glue")
    for folder in HEADERS:
        write_glue(root, folder)
    return root


@pytest.fixture
def train_roberta(call, encoders, glue_folder, tmp_path):
    """``train_roberta("--lr", 1)``: a run that takes a second, into tmp_path/"run" or where the last --output_dir says."""
    words = (
        "--method", "control", "--task", "cola", "--model", encoders["bert"], "--data", glue_folder, "--device", "cpu",
        "--epochs", 2, "--lr", 1e-2, "--batch_size", 8, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    return partial(call, "RoBERTa.finetune", *words)
