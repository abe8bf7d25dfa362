"""What README.md and CONTRIBUTING.md tell people to type, open and import is there."""

import re

import pytest

from control_experiments.paths import REPOSITORY

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
README = (REPOSITORY / "README.md").read_text()


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / document).read_text(), re.DOTALL)


COMMANDS = [line for block in blocks("README.md", "bash") for line in block.splitlines() if line]
COMMANDS += re.findall(r"`((?:bash|\S*python) [^`]+)`", README)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    text = (REPOSITORY / document).read_text()
    if document == "CHANGELOG.md":  # the first column of its tables is what was
        text = re.sub(r"^\|.*?\|", "|", text, flags=re.M)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    paths = re.findall(r"\b(?:peft|scripts|RoBERTa|ViT|LlaMA|QControl)/[\w/.+-]*\w\.(?:py|sh|md|toml)\b", text)
    missing = [path for path in {*links, *paths} if not (REPOSITORY / path.partition("#")[0]).exists()]
    for path, anchor in (link.split("#") for link in links if "#" in link):
        headings = re.findall(r"^#+ (.*)", (REPOSITORY / path).read_text(), re.M)
        if anchor not in (re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings):
            missing.append(f"{path}#{anchor}")
    assert not missing


def test_the_first_screen_is_short_and_leads_to_every_domain():
    lines = README.splitlines()
    assert COMMANDS[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert len(lines) <= 150 and lines.index("bash scripts/test.sh") < 30 and README.count("](results/pictures/") == 1
    for domain in ("RoBERTa", "LlaMA", "ViT", "QControl"):
        assert f"]({domain}/README.md)" in README and any(command.startswith(f"bash {domain}/") for command in COMMANDS)


def test_the_readmes_answers_are_those_of_claims():
    """Every figure of its first table stands in claims.md, which is made from records."""
    answers = README.split("| against LoRA |")[1].split("\n\n")[0]
    claims = (REPOSITORY / "results" / "claims.md").read_text()
    summary = claims.split("## All claims")[0]
    figures = re.findall(r"[-+][\d.]+ to [-+][\d.]+ %|[-+][\d.]+ points \[[^]]+\]", answers)
    assert len(figures) >= 6 and all(figure in claims for figure in figures)
    for name in re.findall(r"claims\.md#([\w-]+)", answers):
        assert f"\n## {name}\n" in claims
    verdicts = re.findall(r"\*\*([Nn]ot decided|[Cc]ontradicted|[Ss]upported)\*\*[^*]*?#([\w-]+)", answers)
    assert len(verdicts) >= 3
    for verdict in verdicts:
        assert f"**[{verdict[0].lower()}](#{verdict[1]})**" in summary or f"(#{verdict[1]})" in summary


@pytest.mark.parametrize("document", ["README.md", "peft/README.md"])
def test_sentences_are_short(document):
    text = re.sub(r"```.*?```|^[|#>!].*?$|\]\([^)]*\)|`[^`]*`", "", (REPOSITORY / document).read_text(), flags=re.S | re.M)
    for sentence in re.split(r"(?<=[.:;])\s|\n\n|^- ", text, flags=re.M):
        assert len(re.findall(r"[\w'’-]*[A-Za-z][\w'’-]*", sentence)) <= 25, sentence


def test_the_readme_snippet_runs(monkeypatch, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def tiny_model(_name):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny_model)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md", "python")
    namespace = {"__name__": "readme"}
    exec(block, namespace)
    parameters = namespace["model"].parameters()
    assert sum(parameter.numel() for parameter in parameters if parameter.requires_grad) == 2 * (64 + 3 * 32) * (16 + 16)
    assert isinstance(PeftModel.from_pretrained(tiny_model(""), tmp_path / "adapter"), PeftModel)
