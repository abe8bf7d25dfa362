"""What README.md and CONTRIBUTING.md tell people to type, open and import is there."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / document).read_text(), re.DOTALL)


COMMANDS = [line for block in blocks("README.md", "bash") for line in block.splitlines() if line]
COMMANDS += re.findall(r"`((?:bash|\S*python) [^`]+)`", (REPOSITORY / "README.md").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_existing_scripts_paths_and_options(command):
    interpreter, script, *arguments = shlex.split(command)
    if interpreter == ".venv/bin/python":
        assert script == "-m"
        script = arguments.pop(0).replace(".", "/") + ".py"
    else:
        assert interpreter == "bash"
    source = REPOSITORY / script
    assert source.is_file(), f"{script} does not exist"
    # a launcher hands its options on to the Python script that it names
    text = source.read_text() + "".join(
        path.read_text() for path in source.parent.glob("*.py") if path.name in source.read_text()
    )
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"\b{argument[2:]}\b", text), f"{script} knows no {argument}"
        elif "/" in argument and not argument.startswith("results/"):  # a run's output need not be there yet
            assert (REPOSITORY / argument).exists(), f"{argument} does not exist"


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    text = (REPOSITORY / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    paths = re.findall(
        r"\b(?:peft|scripts|RoBERTa|ViT|LlaMA|QControl)/[\w/.+-]*\w\.(?:py|sh|md|toml)\b", text
    )
    missing = [path for path in {*links, *paths} if not (REPOSITORY / path).exists()]
    assert not missing


@pytest.mark.parametrize("domain", ["RoBERTa", "LlaMA", "ViT", "QControl"])
def test_the_readme_tells_which_domains_exist(domain):
    (paragraph,) = re.findall(
        rf"^\*\*[^*\n]+\*\* \(.*{domain}/.*$", (REPOSITORY / "README.md").read_text(), re.M
    )
    assert ("not built yet" in paragraph) != any((REPOSITORY / domain).glob("*.sh"))


def test_the_readme_snippets_run(monkeypatch, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def tiny_model(_name):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny_model)
    monkeypatch.chdir(tmp_path)
    results = []
    for block in blocks("README.md", "python"):
        namespace = {"__name__": "readme"}
        exec(block, namespace)
        results.append(SimpleNamespace(**namespace))
    mine, own = results

    trained = sum(parameter.numel() for parameter in mine.model.parameters() if parameter.requires_grad)
    assert trained == 2 * 64 * (16 + 16)
    assert isinstance(PeftModel.from_pretrained(tiny_model(""), tmp_path / "adapter"), PeftModel)
    trained = sum(parameter.numel() for parameter in own.model.parameters() if parameter.requires_grad)
    assert trained == 2 * 4 * (64 + 64) + 64 * 10 + 10
