"""``python -m peft_control``: registers the method, then runs a module or script that knows only peft."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tiny_models import build, randomize_adapters

from peft_control import ControlConfig
from peft_control.__main__ import main

TOOL = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, *rest = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
print(__name__, type(model.base_model).__name__, rest)
sys.exit(7 if rest else 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    base = build("llama")
    base.save_pretrained(folder / "base")
    torch.manual_seed(0)
    randomize_adapters(get_peft_model(base, ControlConfig())).save_pretrained(folder / "adapter")
    (folder / "tool.py").write_text(TOOL)
    (folder / "kit").mkdir()
    (folder / "kit" / "__init__.py").write_text("from peft_control import ControlConfig")
    (folder / "kit" / "__main__.py").write_text(TOOL)
    return folder


def run(folder, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_module_or_script_runs_and_without_us_it_cannot_load_the_adapter(folder):
    result = run(folder, "-m", "peft_control", "-m", "kit", "base", "adapter", "--limit", "3")
    assert result.stdout == "__main__ ControlModel ['--limit', '3']\n", result.stderr
    assert result.returncode == 7  # the module's own
    result = run(folder, "-m", "peft_control", str(folder / "tool.py"), "base", "adapter")
    assert (result.stdout, result.returncode) == ("__main__ ControlModel []\n", 0), result.stderr
    result = run(folder, "tool.py", "base", "adapter")
    assert result.returncode == 1 and "CONTROL" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "usage: python -m peft_control"),
        (["-m"], "usage: python -m peft_control"),
        (["-m", "no_such_module"], "no_such_module"),
        (["-m", "no_such_package.module"], "no_such_package.module"),
        (["-m", "json"], "'json' that can be run"),
        (["-m", ".relative"], ".relative"),
        (["no_such_script.py"], "no_such_script.py"),
        (["/"], "no script '/'"),
    ],
)
def test_what_cannot_run(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft_control", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert text in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("command", ["", "architectures", "export"])
def test_help(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["peft_control", *command.split(), "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    printed = capsys.readouterr().out
    assert f"usage: python -m peft_control {command}" in printed and ("lm_eval" in printed) == (not command)
