"""The prompt templates of LLM-Adapters, white space included, as the paper's runs used them.

The authors' training and evaluation templates differ in white space. By default both use the training template here;
``style="authors"`` repeats the published mismatch at evaluation.
"""

from __future__ import annotations

from typing import Literal

Style = Literal["matched", "authors"]

# the authors' templates are indented string literals, and the indentation is part of the prompt
_I = " " * 16


def prompt(instruction: str, input: str = "", style: Style = "matched") -> str:
    """The text up to where the response begins; training appends the row's output to the "matched" one."""
    paired = ", paired with an input that provides further context" if input else ""
    begin = f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    begin += " " * ((style == "matched") + (not input))
    gap = "\n\n" if style == "authors" else f"\n{_I}\n"
    parts = {"Instruction": instruction, **({"Input": input} if input else {})}
    asked = "".join(f"{_I}### {name}:\n{_I}{text}{gap}" for name, text in parts.items())
    return f"{begin}\n\n{asked}{_I}### Response:\n{_I}"
