"""Commonsense data in the LLM-Adapters format: tasks, answer words, validation, split and tokens."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from control_experiments.errors import UserError
from control_experiments.record import read_json
from LlaMA.prompts import Style, prompt


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


#: Each task's answer words, in the order of the paper's tables.
TASKS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"), "piqa": _numbered("solution", 2), "social_i_qa": _numbered("answer", 5),
    "hellaswag": _numbered("ending", 4), "winogrande": _numbered("option", 2), "ARC-Easy": _numbered("answer", 5),
    "ARC-Challenge": _numbered("answer", 5), "openbookqa": _numbered("answer", 5),
}  # fmt: skip
ALL_WORDS = tuple(dict.fromkeys(word for words in TASKS.values() for word in words))

#: What every output of the data says before its answer word.
ANSWER_LEAD = "the correct answer is"


class Row(NamedTuple):
    """One question; `output` is the response to learn, `answer` the word that counts."""

    instruction: str
    input: str
    output: str
    answer: str


def read_rows(path: str | Path, words: Sequence[str] = ALL_WORDS) -> list[Row]:
    """Read and check a JSON list of rows. Raises UserError: no file, no JSON, no rows, a field that is missing or
    no text, or an answer that is not one of `words`; the message names file, row (counted from 0) and field."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"cannot read {path}: there is no such file; AGI-Edgerunners/LLM-Adapters on GitHub has commonsense_170k.json in "
            "ft-training_set/ and the test sets in dataset/: name that file or folder with --data (a launcher: TRAIN_DATA=, DATA=)"
        )
    contents = read_json(path)
    if not isinstance(contents, list) or not contents:
        raise UserError(f"{path} must hold a JSON list of rows with at least one row")
    rows = [Row(**text_fields(entry, Row._fields, f"{path}, row {number}")) for number, entry in enumerate(contents)]
    for number, row in enumerate(rows):
        if row.answer not in words:
            raise UserError(f"{path}, row {number}: the field 'answer' is {row.answer!r}, not one of {'/'.join(words)}")
    return rows


def text_fields(entry: object, names: Sequence[str], where: str) -> dict[str, str]:
    """These fields of a row, which must be texts; only an "input" may be empty. Raises UserError: one is not, or the row is
    no JSON object."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object with the fields {', '.join(names)}")
    for name in names:
        text = entry.get(name)
        # half a surrogate pair is no character, and tokenizers refuse it
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text) or not (text.strip() or name == "input"):
            raise UserError(f"{where}: the field {name!r} must be text, got {text!r:.60}")
    return {name: entry[name] for name in names}


def read_tests(folder: str | Path, tasks: Sequence[str], limit: int | None = None) -> dict[str, list[Row]]:
    """The test sets `<folder>/<task>/test.json`; of each the first `limit` rows. Raises as `read_rows`."""
    return {task: read_rows(Path(folder) / task / "test.json", TASKS[task])[:limit] for task in tasks}


def extract_answer(text: str, words: Sequence[str]) -> str | None:
    """The first of the task's answer words in a response, or None (which counts as wrong)."""
    match = re.search("|".join(words), text)
    return match.group() if match else None


def offered_words(row: Row, words: Sequence[str]) -> list[str]:
    """The answer words that this question's "Answer format:" offers; all of the task's when it names none."""
    _, found, answer_format = row.instruction.rpartition("Answer format:")
    offered = set(re.split(r"[/\s]+", answer_format.strip())) if found else set()
    return [word for word in words if word in offered] or list(words)


def split_rows(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle with `seed` and hold out the first `held_out` rows; returns (training, held-out) rows. Raises
    UserError: nothing would be left to train on."""
    if not 0 < held_out < len(rows):
        raise UserError(f"--held_out {held_out} must be at least 1 and leave some of the {len(rows)} rows")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


#: The label of a token that the loss does not count.
IGNORE = -100


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one training row, and a 1 for each that the loss counts, which is never the first: nothing predicts it."""

    ids: Sequence[int]
    learned: bytes
    cut: bool = False

    @property
    def labels(self) -> list[int]:
        """The ids that the loss counts, `IGNORE` elsewhere."""
        return [token if one else IGNORE for token, one in zip(self.ids, self.learned, strict=True)]

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return sum(self.learned)


def token_row(ids: Sequence[int], learned: bytes, cutoff: int) -> TokenRow:
    """The row's first `cutoff` tokens."""
    return TokenRow(array("i", ids[:cutoff]), bytes(1) + learned[1:cutoff], cut=len(ids) > cutoff)


def tokenize_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, cutoff: int, *, response_only: bool = False
) -> list[TokenRow]:
    """Prompt, output and the end-of-sequence token, at most `cutoff` tokens.

    A row that is too long loses its end, and with it the end-of-sequence token: it has no end to learn. Raises
    UserError: the tokenizer knows no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so answers could never end")
    prompts = [prompt(row.instruction, row.input) for row in rows]
    texts = [text + row.output for text, row in zip(prompts, rows, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=response_only)
    result = []
    for index, ids in enumerate(encoded["input_ids"]):
        if ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        given = _prompt_length(encoded["offset_mapping"][index], len(prompts[index])) if response_only else 0
        result.append(token_row(ids, bytes(given) + b"\1" * (len(ids) - given), cutoff))
    return result


def tokenize_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, style: Style = "matched") -> list[list[int]]:
    """Token ids of each question, ending where they end in training.

    A byte-pair tokenizer joins the prompt's last space with the response's first word. Encoding the prompt alone would
    end in a token that training never shows there, so the prompt is encoded with the usual first words of a response,
    and the tokens that reach into the response are dropped. "authors" encodes the prompt alone, as published.
    """
    prompts = [prompt(row.instruction, row.input, style) for row in rows]
    if style == "authors":
        return tokenizer(prompts)["input_ids"]
    encoded = tokenizer([text + ANSWER_LEAD for text in prompts], return_offsets_mapping=True)
    return [
        ids[: _prompt_length(offsets, len(text))]
        for ids, offsets, text in zip(encoded["input_ids"], encoded["offset_mapping"], prompts, strict=True)
    ]


def _prompt_length(offsets: Sequence[tuple[int, int]], characters: int) -> int:
    """How many leading tokens lie wholly within the first `characters` of the text."""
    return next((index for index, (_, end) in enumerate(offsets) if end > characters), len(offsets))
