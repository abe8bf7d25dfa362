"""What stopped users, as they type it in a fresh checkout: from the first command to a served adapter.

Elsewhere: trainers and memory modes (peft/tests/test_training.py), the wheel (peft/tests/test_wheel.py), export and `transformers
serve` (peft/tests/test_export.py), axolotl (peft/tests/test_axolotl.py), help and quickstart (test_commands.py), claims
(test_claims.py), README's recipes and links (test_documents.py).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from control_experiments.paths import REPOSITORY
from control_experiments.record import read_record
from RoBERTa.tests.conftest import encoders, write_glue  # noqa: F401

pytestmark = pytest.mark.slow
RUN = "results/roberta/tiny_rte_control_seed42"
TRAIN = "MODEL=tiny DATA=glue bash RoBERTa/run_roberta.sh control rte 1 1e-3 cpu"
SHIPPED = ("claims.md", "report.html", "tables/glue.md", "tables/glue.csv", "tables/vit_accuracy.md")


@pytest.fixture(scope="module")
def type_in(tmp_path_factory, encoders):  # noqa: F811
    """``type_in(command)``: the output of a shell's command in a copy of the checkout, in which RTE was trained."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("RoBERTa", "ViT", "LlaMA", "QControl", "scripts", "peft"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("tests", "*.egg-info"))
    for name in ("published", "tables", "pictures"):
        shutil.copytree(REPOSITORY / "results" / name, root / "results" / name)
    for path in (REPOSITORY / "results").glob("*.*"):
        shutil.copy2(path, root / "results")
    shutil.copytree(encoders["roberta"], root / "tiny")
    write_glue(root / "glue", "RTE")

    def run(command: str, code: int = 0) -> str:
        paths = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": f"{root / 'peft' / 'src'}:{root}"}
        kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
        variables = {**kept, **paths, "PYTHON": sys.executable}
        done = subprocess.run(["bash", "-c", command], cwd=root, env=variables, capture_output=True, text=True, timeout=280)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    run.root = root
    run(TRAIN)
    return run


def test_the_first_command_runs_and_drops_nothing_shipped(type_in):
    record = read_record(type_in.root / RUN / "record.json")
    assert (record.method, record.task, record.seed) == ("control", "rte", 42)
    given = {"epochs": 1.0, "lr": 1e-3, "max_length": 128, "batch_size": 64, "weight_decay": 0.1}
    assert {name: record.hyperparameters[name] for name in given} == given
    refused = type_in(f"{TRAIN} --lr 1e-2", code=2)
    assert all(words in refused for words in ("lr 0.001 there, 0.01 asked for", "--output_dir", "--overwrite"))
    shipped = {name: (type_in.root / "results" / name).read_text() for name in SHIPPED}
    type_in("python -m scripts.make_tables")
    assert {name: (type_in.root / "results" / name).read_text() for name in SHIPPED} == shipped
    assert "yours" in (type_in.root / "results" / "mine" / "tables" / "glue.md").read_text()


@pytest.mark.parametrize(("domain", "run"), [("RoBERTa", RUN), ("QControl", "results/qcontrol/tiny_rte_control_nf4_seed42")])
def test_the_adapter_loads_with_the_readmes_lines(type_in, domain, run):
    if domain == "QControl":
        type_in(TRAIN.replace("RoBERTa/run_roberta.sh control", "QControl/run_roberta_quantization.sh QControl"))
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / domain / "README.md").read_text(), re.S)
    block = re.sub(r"results/\w+/RUN", run, block)
    (type_in.root / "load.py").write_text(block + 'print(labels, len(tokenizer("a", "b")["input_ids"]) > 2)\n')
    assert "{0: 'entailment', 1: 'not_entailment'} True" in type_in("python load.py")
