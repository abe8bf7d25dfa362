"""``python -m peft_control``: registers the method, then runs a module or script that knows only peft."""

import subprocess
import sys

import pytest
from peft import get_peft_model
from tiny_models import build, randomize_adapters

from peft_control import ControlConfig

TOOL = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print(__name__, type(model.base_model).__name__, sys.argv[1:])
sys.exit(7)
"""


@pytest.mark.slow
def test_a_module_or_script_runs(tmp_path, monkeypatch, call):
    """The module in a process of its own: a package that imports us must not be imported before we are."""
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    randomize_adapters(get_peft_model(base, ControlConfig())).save_pretrained(tmp_path / "adapter")
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "__init__.py").write_text("from peft_control import ControlConfig")
    (tmp_path / "kit" / "__main__.py").write_text(TOOL)

    words, said = ("base", "adapter"), "__main__ ControlModel ['base', 'adapter']\n"
    command = [sys.executable, "-m", "peft_control", "-m", "kit", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, said)  # the tool's own
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a script's folder is added
    assert call("peft_control.__main__", "tool.py", *words)[:2] == (7, said)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "usage: python -m peft_control"),
        (["-m", "no_such_package.module"], "no_such_package.module"),
        (["-m", "json"], "'json' that can be run"),
        (["no_such_script.py"], "no_such_script.py"),
        (["architectures", "nowhere"], "error: "),
    ],
)
def test_what_cannot_run(arguments, text, call):
    code, out, said = call("peft_control.__main__", *arguments)
    assert code == 2 and text in said and said.count("\n") == 1 and not out


@pytest.mark.parametrize("command", ["", "architectures", "export"])
def test_help(command, call):
    code, out, _ = call("peft_control.__main__", *command.split(), "--help")
    assert not code and f"usage: python -m peft_control {command}" in out and ("lm_eval" in out) == (not command)


def test_architectures(tmp_path, call):
    build("qwen3_next").config.save_pretrained(tmp_path)
    out = call("peft_control.__main__", "architectures", tmp_path).finished().out
    assert "layers.0: Qwen3NextDecoderLayer, row qwen3_next, width 32" in out
    assert "attention: reads input_layernorm, writes linear_attn" in out
