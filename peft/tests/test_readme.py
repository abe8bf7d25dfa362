"""README.md says what the code says: its tables, its snippets, its own-architecture example."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import build
from torch import nn

from peft_control import ARCHITECTURES, ControlConfig
from peft_control.memory import MODES
from peft_control.memory.families import FAMILIES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two header lines."""
    section = README.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_fields():
    own = {field.name for field in dataclasses.fields(ControlConfig)} - {field.name for field in dataclasses.fields(LoraConfig)}
    rows = table("### Fields of `ControlConfig`")
    assert {row[0].strip("`") for row in rows} == own and len(rows) == len(own)
    config = ControlConfig()
    for name, default, _ in rows:
        value = getattr(config, name.strip("`"))
        assert default.strip("`").replace('"', "'") == repr(value)


def test_architectures():
    families = [name for row in table("## Supported architectures") for name in re.findall("`(.*?)`", row[1])]
    assert sorted(families) == sorted(row.name for row in ARCHITECTURES)
    project = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"The table of architectures has {len(ARCHITECTURES)} rows" in project
    assert {row.name: [*row.blocks] for row in ARCHITECTURES if [*row.blocks] != ["attention", "mlp"]} == {
        "gemma3n": ["mlp"], "mamba": ["mixer"], "mamba2": ["mixer"]
    }  # fmt: skip


def test_files():
    files = {row[0].strip("`") for row in table("## How it is built")}
    source = Path(__file__).parent.parent / "src" / "peft_control"
    assert files == {path.name for path in source.glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_snippets_run(block, tmp_path, monkeypatch):
    """Each snippet runs on a tiny LLaMA (or its own layer) with what the earlier ones imported."""
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("base")
    base = build("llama")
    base.name_or_path = base.config._name_or_path = "base"
    names = dict(base=base, nn=nn, ControlConfig=ControlConfig, get_peft_model=get_peft_model)
    names |= dict(PeftModel=PeftModel, AutoPeftModelForCausalLM=AutoPeftModelForCausalLM)
    if "class Layer" in block:
        definition, use = block.split("\n\n\n")
        exec(definition, names)
        names["base"] = nn.Sequential(names["Layer"](8), names["Layer"](8))
        exec(use, names)
        assert names["model"](torch.ones(2, 8)).shape == (2, 8)
        return
    names["model"] = get_peft_model(base, ControlConfig(task_type="CAUSAL_LM"))
    if "load_adapter" in block:
        names["model"].save_pretrained("other")
    exec(block, names)
    for config in (names.get("double"), names.get("mixed")):
        if config is not None:
            get_peft_model(build("llama"), config)


def test_memory_modes():
    assert tuple(row[0].strip("`") for row in table("## Memory modes")) == MODES
    section = README.split("\n## Memory modes\n", 1)[1].split("\n#", 1)[0]
    named = re.search(r"They are there for (.*?); the MLP", section, re.DOTALL)[1]
    assert re.findall(r"`(.*?)`", named) == list(FAMILIES)
