"""The prompt templates of LLM-Adapters, white space included, as the paper's runs used them.

The authors' training and evaluation templates differ in white space. By default both use the training template here;
``style="authors"`` repeats the published mismatch at evaluation.
"""

from __future__ import annotations

from typing import Literal

Style = Literal["matched", "authors"]

# the authors' templates are indented string literals, and the indentation is part of the prompt
_I = " " * 16

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

_MATCHED = {
    True: f"{_WITH_INPUT} \n\n{_I}### Instruction:\n{_I}{{instruction}}\n{_I}\n"
    f"{_I}### Input:\n{_I}{{input}}\n{_I}\n{_I}### Response:\n{_I}",
    False: f"{_WITHOUT_INPUT}  \n\n{_I}### Instruction:\n{_I}{{instruction}}\n{_I}\n{_I}### Response:\n{_I}",
}
_AUTHORS_EVALUATION = {
    True: f"{_WITH_INPUT}\n\n{_I}### Instruction:\n{_I}{{instruction}}\n\n"
    f"{_I}### Input:\n{_I}{{input}}\n\n{_I}### Response:\n{_I}",
    False: f"{_WITHOUT_INPUT} \n\n{_I}### Instruction:\n{_I}{{instruction}}\n\n{_I}### Response:\n{_I}",
}


def prompt(instruction: str, input: str = "", style: Style = "matched") -> str:
    """The text up to where the response begins; training appends the row's output to the "matched" one."""
    templates = _AUTHORS_EVALUATION if style == "authors" else _MATCHED
    return templates[bool(input)].format(instruction=instruction, input=input)
