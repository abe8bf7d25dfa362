"""The card (README.md) of a saved adapter: what it is, on which base, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import ControlConfig

PAPER = "https://proceedings.mlr.press/v267/"
AUTO_CLASSES = {  # peft's and transformers' own names, by task type
    "CAUSAL_LM": "ModelForCausalLM",
    "SEQ_2_SEQ_LM": "ModelForSeq2SeqLM",
    "SEQ_CLS": "ModelForSequenceClassification",
    "TOKEN_CLS": "ModelForTokenClassification",
    "QUESTION_ANS": "ModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "ModelForFeatureExtraction",
}
BEGIN, END = "<!-- parallel-control: written on each save -->", "<!-- /parallel-control -->"
EMPTY = "# Model Card for Model ID"  # the heading of the template that peft writes into a new folder


def write_card(folder: str | Path, config: ControlConfig) -> None:
    """Write README.md into an adapter's folder, or the part of it between our two marks.

    peft's empty template is replaced, its metadata kept. Of a card that people wrote nothing else changes.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    ours = f"{BEGIN}\n{_describe(config)}\n{END}"
    if BEGIN in card.text and END in card.text:
        before, after = card.text.split(BEGIN, 1)[0], card.text.split(END, 1)[1]
        card.text = before + ours + after
    elif EMPTY in card.text:
        card.text = f"\n# Parallel Control adapter\n\n{ours}\n"
    else:
        card.text = f"{card.text.rstrip()}\n\n{ours}\n"
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "parallel-control"})
    card.save(path)


def _describe(config: ControlConfig) -> str:
    base = config.base_model_name_or_path or "a model that peft could not name"
    patterns = [p for p in (config.control_rank_pattern, config.control_alpha_pattern) if p]
    rows = {
        "base model": f"`{base}`",
        "task": config.task_type or "none named",
        "controlled blocks": ", ".join(config.control_blocks or []),
        "layers": config.layers_to_transform if config.layers_to_transform is not None else "all",
        "rank, alpha": f"{config.control_rank}, {config.control_alpha}"
        + "".join(f"; but for {pattern}" for pattern in patterns),
        "dropout, biases": f"{config.control_dropout}, {'yes' if config.control_bias else 'no'}",
        "part on the weights": _weights_part(config),
        "trained as a whole": ", ".join(config.modules_to_save or []) or "nothing",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    auto = AUTO_CLASSES.get(str(config.task_type or ""))
    load = (
        f'from peft import AutoPeft{auto}\n\nmodel = AutoPeft{auto}.from_pretrained("this folder")'
        if auto
        else 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "this folder")'
    )
    return f"""An adapter by [Parallel Control]({PAPER}) (Zhang, Ren, Cheng and Li, ICML 2025): each controlled block adds
`alpha * B(A(state))` to its output state, where `state` is its input state.

| | |
| --- | --- |
{table}

## How to load it

```bash
pip install ./peft  # from a copy of the Parallel Control repository
```

```python
import peft_control  # registers CONTROL with peft
{load}
```

Without the import peft ends in `KeyError: 'CONTROL'`: peft looks methods up in a table, and neither peft nor
transformers loads plug-ins. `python -m peft_control -m TOOL ...` registers the method for tools that import only peft.
`python -m peft_control export ADAPTER OUT` writes a model for serving that needs neither peft nor this package."""


def _weights_part(config: ControlConfig) -> str:
    targets = config.target_modules or config.target_parameters
    if not targets:
        return "none"
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    method = "DoRA" if config.use_dora else "LoRA"
    return f"{method} of rank {config.r}, alpha {config.lora_alpha}, on {names}"
