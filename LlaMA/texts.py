"""Training data besides the commonsense questions: texts, chats and instructions of any length.

A text longer than the cutoff becomes several rows. A chat or an instruction is one row, and loses what is beyond the cutoff.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from control_experiments.errors import UserError
from LlaMA.commonsense import Row, TokenRow, read_rows, text_fields, token_row, tokenize_rows


class Chat(NamedTuple):
    """Turns as objects of "role" and "content"; the assistant's are learned. `where` is file and line."""

    messages: list[dict[str, str]]
    where: str


def read_data(path: str | Path) -> list[Row] | list[str | Chat | Row]:
    """What a file holds; a text is a plain string.

    - a `.json` list: commonsense questions, as `read_rows` checks them;
    - `.jsonl`, a row in each line: "messages", "text", or "instruction" and "output" (and "input");
    - any other file: one text; a folder: one text of each `.txt` file below it.

    Raises UserError: there is no such file or it holds nothing; or a row is none of these, and which.
    """
    path = Path(path)
    if path.is_dir():
        if not (found := sorted(path.rglob("*.txt"))):
            raise UserError(f"{path} holds no .txt file: each is a text to learn")
        return [_text(file) for file in found]
    if path.suffix == ".jsonl":
        lines = enumerate(_read(path).split("\n"), 1)
        rows = [_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
        if not rows:
            raise UserError(f"{path} is empty: it needs a row of JSON in each line")
        return rows
    if path.suffix != ".json" and path.exists():
        return [_text(path)]
    return read_rows(path)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{file} is no text in UTF-8: {error}") from error


def _text(file: Path) -> str:
    return text_fields({"text": _read(file)}, ["text"], str(file))["text"]


def _row(line: str, where: str) -> str | Chat | Row:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    found = entry if isinstance(entry, dict) else {}
    if "messages" in found:
        return Chat(_turns(found["messages"], where), where)
    if "text" in found:
        return text_fields(found, ["text"], where)["text"]
    if "instruction" not in found:
        kinds = "messages (a list of role and content), text, or instruction and output"
        raise UserError(f"{where}: must be an object with {kinds}")
    return Row(**text_fields({"input": "", **found}, ["instruction", "input", "output"], where), answer="")


def _turns(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: the field 'messages' must be a list of turns")
    for number, turn in enumerate(messages):
        asked = isinstance(turn, dict) and turn.get("role") != "assistant" and turn.get("content") == ""
        text_fields(turn, ["role"] if asked else ["role", "content"], f"{where}: message {number}")
    if all(turn["role"] != "assistant" for turn in messages):
        raise UserError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return messages


# -- tokens -----------------------------------------------------------------------------------------------------


def tokenize_data(
    data: Sequence[str | Chat | Row], tokenizer: PreTrainedTokenizerBase, cutoff: int, *, response_only: bool = False
) -> list[TokenRow]:
    """Rows of at most `cutoff` tokens. `response_only` is about instructions, see `tokenize_rows`.

    Raises UserError: the tokenizer knows no end-of-sequence token, or has no chat template, or one that refuses a chat.
    """
    rows: list[TokenRow] = []
    for kind, alike in groupby(data, type):
        if kind is Row:
            rows += tokenize_rows(list(alike), tokenizer, cutoff, response_only=response_only)
        elif kind is str:
            rows += (row for text in alike for row in _split(text, tokenizer, cutoff))
        else:
            rows += (_tokenize_chat(chat, tokenizer, cutoff) for chat in alike)
    return rows


def _split(text: str, tokenizer: PreTrainedTokenizerBase, cutoff: int) -> list[TokenRow]:
    """The text's tokens and the end-of-sequence token in rows of `cutoff`; a last row of one token has nothing to predict."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so texts could never end")
    ids = array("i", tokenizer(text, verbose=False)["input_ids"])
    if ids[-1:] != array("i", [tokenizer.eos_token_id]):
        ids.append(tokenizer.eos_token_id)
    pieces = [ids[start : start + cutoff] for start in range(0, len(ids), cutoff)]
    return [token_row(piece, b"\1" * len(piece), cutoff) for piece in pieces if len(piece) > 1 or len(pieces) == 1]


def _tokenize_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, cutoff: int) -> TokenRow:
    template = tokenizer.chat_template
    if not template:
        raise UserError("the tokenizer has no chat template (tokenizer.chat_template): take a model that was made for chats")
    try:
        if re.search(r"\{%-?\s*generation\b", str(template)):
            found = tokenizer.apply_chat_template(chat.messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, learned = found["input_ids"], bytes(found["assistant_masks"])
        else:
            ids, learned = _marked(chat, tokenizer)
    except UserError:
        raise
    except Exception as error:  # Jinja2's, and whatever the template's own code raises
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{chat.where}: the tokenizer's chat template refuses it: {reason}") from error
    return token_row(ids, learned, cutoff)


def _marked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bytes]:
    """Token ids, and a 1 for each token of the assistant's turns, its end-of-turn token included.

    For templates that do not mark these turns with `{% generation %}`. A turn begins where the chat so far ends with the
    header of the next answer, as at inference.
    """

    def written(turns: int, **more) -> str:
        return tokenizer.apply_chat_template(chat.messages[:turns], tokenize=False, **more)

    whole, spans = written(len(chat.messages)), []
    for number, turn in enumerate(chat.messages):
        if turn["role"] == "assistant":
            before, after = written(number, add_generation_prompt=True), written(number + 1)
            if not (whole.startswith(after) and after.startswith(before)):
                told = "whose text changes with later turns: mark the assistant's with {% generation %} in it"
                raise UserError(f"{chat.where}: message {number} follows a chat template {told}")
            spans.append((len(before), len(after.rstrip())))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks = bytearray(len(found["input_ids"]))
    for index, (first, last) in enumerate(found["offset_mapping"]):
        while spans and first >= spans[0][1]:
            del spans[0]
        marks[index] = bool(spans) and first < last and last > spans[0][0]  # a first word may hold the space before it
    return found["input_ids"], bytes(marks)
