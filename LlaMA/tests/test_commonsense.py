import json
import os
from pathlib import Path

import pytest

from control_experiments.errors import UserError
from control_experiments.paths import REPOSITORY
from LlaMA.commonsense import TASKS, Row, extract_answer, offered_words, read_rows, tokenize_prompts, tokenize_rows
from LlaMA.prompts import prompt

ROW = {"instruction": "Which?", "input": "", "output": "the correct answer is answer1", "answer": "answer1"}


def test_prompts_are_the_published_templates():
    shared = Path(os.environ.get("PARALLEL_CONTROL_SHARED", REPOSITORY.parent / "shared"))
    file = shared / "paper" / "prompts.json"
    if not file.is_file():
        pytest.skip("the published templates are not here (PARALLEL_CONTROL_SHARED)")
    published = json.loads(file.read_text())
    for name, given in (("with_input", "{x}"), ("without_input", "")):  # braces are text
        training = published["train"][name].format(instruction="I", input=given, output="O")
        assert prompt("I", given) + "O" == training
        authors = published["evaluate_authors"][name].format(instruction="I", input=given)
        assert prompt("I", given, "authors") == authors


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("[{", "no JSON file"),
        ("[]", "at least one row"),
        (json.dumps([{**ROW, "answer": "maybe"}]), "row 0: the field 'answer' is 'maybe', not one of answer1"),
    ],
)
def test_a_bad_data_file_is_named_with_row_and_field(tmp_path, contents, message):
    file = tmp_path / "rows.json"
    file.write_text(contents)
    with pytest.raises(UserError, match=f"rows.json.*{message}"):
        read_rows(file, TASKS["openbookqa"])


@pytest.mark.parametrize(
    ("text", "task", "answer"),
    [
        ("the correct answer is answer3", "ARC-Easy", "answer3"),
        ("false, not true", "boolq", "false"),
        ("I do not know", "piqa", None),
        ("True", "boolq", None),
    ],
)
def test_the_first_answer_word_counts(text, task, answer):
    assert extract_answer(text, TASKS[task]) == answer


def test_only_offered_words_are_ranked():
    row = Row("Which?\n\nAnswer format: answer1/answer2/answer3", "", "o", "answer1")
    assert offered_words(row, TASKS["social_i_qa"]) == ["answer1", "answer2", "answer3"]
    assert offered_words(Row("Which?", "", "o", "true"), TASKS["boolq"]) == ["true", "false"]


def test_rows_end_in_eos_unless_they_are_cut(rows, tokenizer):
    whole = tokenize_rows(rows, tokenizer, cutoff=1000)
    assert all(row.ids[-1] == tokenizer.eos_token_id and not row.cut for row in whole)
    text = prompt(rows[0].instruction) + rows[0].output
    assert tokenizer.decode(whole[0].ids[:-1]) == text

    cutoff = len(whole[0].ids)
    assert not tokenize_rows(rows[:1], tokenizer, cutoff)[0].cut
    (cut,) = tokenize_rows(rows[:1], tokenizer, cutoff - 1)
    assert cut.cut
    assert cut.ids == whole[0].ids[: cutoff - 1]


def test_prompts_are_tokenized_as_in_training(rows, tokenizer):
    trained = tokenize_rows(rows, tokenizer, cutoff=1000, response_only=True)
    for ids, row, full in zip(tokenize_prompts(rows, tokenizer), rows, trained, strict=True):
        assert list(full.ids[: len(ids)]) == ids
        assert full.learned.index(1) == len(ids)
        assert tokenizer.decode(full.ids[len(ids) : -1]).strip() == row.output
