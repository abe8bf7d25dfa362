"""What stopped users, as they type it in a fresh checkout: from the first command to an adapter that loads.

Elsewhere: trainers and memory modes (peft/tests/test_training.py), the wheel (peft/tests/test_wheel.py), export and
`transformers serve` (peft/tests/test_export.py), axolotl (peft/tests/test_axolotl.py), help and quickstart (test_commands.py),
claims (test_claims.py), tables of one's own runs (test_tables.py), README's recipes and links (test_documents.py).
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from control_experiments.paths import REPOSITORY
from control_experiments.record import read_record
from RoBERTa.tests.conftest import encoders, write_glue  # noqa: F401

pytestmark = pytest.mark.slow
TRAIN = "MODEL=tiny DATA=glue bash RoBERTa/run_roberta.sh control rte 1 1e-3 cpu"


@pytest.fixture(scope="module")
def type_in(tmp_path_factory, encoders):  # noqa: F811
    """``type_in(command)``: the output of a shell's command in a copy of the checkout."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("RoBERTa", "ViT", "LlaMA", "QControl", "scripts", "peft"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("tests", "*.egg-info"))
    shutil.copytree(encoders["roberta"], root / "tiny")
    write_glue(root / "glue", "RTE")

    def run(command: str) -> str:
        variables = {name: os.environ[name] for name in ("HOME", "PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
        variables |= {"PYTHONPATH": f"{root / 'peft' / 'src'}:{root}", "PYTHON": sys.executable}
        done = subprocess.run(["bash", "-c", command], cwd=root, env=variables, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run.root = root
    return run


@pytest.mark.parametrize(
    ("domain", "command", "run"),
    [
        ("RoBERTa", TRAIN, "results/roberta/tiny_rte_control_seed42"),
        ("QControl", TRAIN.replace("RoBERTa/run_roberta.sh control", "QControl/run_roberta_quantization.sh QControl"),
         "results/qcontrol/tiny_rte_control_nf4_seed42"),
    ],
)  # fmt: skip
def test_a_run_lies_where_it_says_and_its_adapter_loads_with_the_readmes_lines(type_in, domain, command, run, monkeypatch):
    type_in(command)
    record = read_record(type_in.root / run / "record.json")
    assert (record.method, record.task, record.seed) == ("control", "rte", 42)
    given = {"epochs": 1.0, "lr": 1e-3, "max_length": 128, "weight_decay": 0.1}
    assert {name: record.hyperparameters[name] for name in given} == given
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / domain / "README.md").read_text(), re.S)
    monkeypatch.chdir(type_in.root)
    exec(re.sub(r"results/\w+/RUN", run, block), loaded := {})
    assert loaded["labels"] == loaded["model"].config.id2label == {0: "entailment", 1: "not_entailment"}
    assert len(loaded["tokenizer"]("a", "b")["input_ids"]) > 2
