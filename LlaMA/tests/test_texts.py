"""Texts, chats and instructions as training data: what is learned of them, bad files, and training through the door."""

import json
import random
import shutil

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from control_experiments.errors import UserError
from LlaMA.commonsense import IGNORE, Row, tokenize_rows
from LlaMA.tests.conftest import NOUNS, training_options
from LlaMA.texts import Chat, read_data, tokenize_data

#: ChatML, with the assistant's turns marked as transformers wants them, and without.
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '> ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' </end>' }}"
    "{% endgeneration %}{% else %}{{ m.content + ' </end>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
BARE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHANGING = "{% for m in messages %}{{ messages | length ~ m.role + ': ' + m.content }}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def chat(*turns: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]


@pytest.fixture
def talking(tokenizer, tmp_path):
    """The tokenizer with a chat template."""
    tokenizer.save_pretrained(tmp_path / "talking")
    return AutoTokenizer.from_pretrained(tmp_path / "talking", chat_template=BARE)


@pytest.mark.parametrize("template", [MARKED, BARE])
def test_only_what_the_assistant_says_is_learned(talking, template):
    talking.chat_template = template
    system = {"role": "system", "content": "river garden"}
    messages = [system, *chat("which bridge?", "the candle", "and then?", "market window river")]
    (row,) = tokenize_data([Chat(messages, "here")], talking, cutoff=10_000)
    whole = talking.apply_chat_template(messages, tokenize=False)
    assert list(row.ids) == talking(whole, add_special_tokens=False)["input_ids"]
    learned = talking.decode([token for token in row.labels if token != IGNORE]).replace(" ", "")
    assert learned == "thecandle</end>marketwindowriver</end>" and row.labels[0] == IGNORE
    assert row.targets == sum(token != IGNORE for token in row.labels)
    (short,) = tokenize_data([Chat(messages, "here")], talking, cutoff=len(row.ids) - 3)
    assert short.cut and not row.cut and short.labels == row.labels[:-3]


def test_a_long_text_becomes_rows_that_hold_all_of_it(tokenizer):
    words = " ".join(random.Random(0).choices(NOUNS, k=500))
    rows = tokenize_data([words, "river"], tokenizer, cutoff=64)
    *text, short = [list(row.ids) for row in rows]
    assert [token for ids in text for token in ids] == [*tokenizer(words)["input_ids"], tokenizer.eos_token_id]
    assert {len(ids) for ids in text[:-1]} == {64} and short[-1] == tokenizer.eos_token_id
    assert not any(row.cut for row in rows) and all(row.labels == [IGNORE, *row.ids[1:]] for row in rows)


def test_instructions_in_json_lines_are_those_of_the_recipe(tokenizer, tmp_path):
    entry = {"instruction": "Which river?", "input": "garden", "output": "the bridge"}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(entry)}\n\n{json.dumps({'instruction': 'Which?', 'output': 'window'})}\n")
    rows = [Row("Which river?", "garden", "the bridge", ""), Row("Which?", "", "window", "")]
    assert read_data(file) == rows
    for response_only in (True, False):
        expected = tokenize_rows(rows, tokenizer, 99, response_only=response_only)
        assert tokenize_data(rows, tokenizer, 99, response_only=response_only) == expected


def test_every_format_is_read(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name in ("b.txt", "below/a.txt", "no.md"):
        (tmp_path / "folder" / name).write_text(name)
    assert read_data(tmp_path / "folder") == ["b.txt", "below/a.txt"]
    assert read_data(tmp_path / "folder" / "no.md") == ["no.md"]
    rows = [{"messages": chat("a", "b")}, {"text": "c"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_data(tmp_path / "rows.jsonl")
    assert (first.messages, second) == (chat("a", "b"), "c")


LINE = json.dumps({"text": "a"})


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "rows.jsonl is empty"),
        (f"{LINE}\n{{", "rows.jsonl, line 2: no JSON"),
        (f"{LINE}\n\n3", "rows.jsonl, line 3: must be an object with messages"),
        ('{"prompt": "a"}', "line 1: must be an object with messages (a list of role and content), text, or instruction"),
        ('{"text": 3}', "line 1: the field 'text' must be text, got 3"),
        ('{"text": "\\ud800"}', "line 1: the field 'text' must be text, got '\\ud800'"),
        (f"{LINE}\n" + '{"messages": []}', "line 2: the field 'messages' must be a list of turns"),
        ('{"messages": ["a"]}', "line 1: message 0: must be an object with the fields role, content"),
        ('{"messages": [{"role": "user"}]}', "line 1: message 0: the field 'content' must be text, got None"),
        (json.dumps({"messages": chat("a")}), "line 1: no message is the assistant's"),
        (b"\xff\xfe", "rows.jsonl is no text in UTF-8"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number(call, model_folder, tmp_path, contents, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    for option in ("--data", "--validation"):
        words = [*arguments(model_folder, tmp_path / "out"), "--data", tmp_path / "other.txt", option, file]
        (tmp_path / "other.txt").write_text("river garden " * 200)
        assert message in call("LlaMA.finetune", *words).refused()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        (REFUSING, "rows, line 7: the tokenizer's chat template refuses it: roles must alternate"),
        (CHANGING, "rows, line 7: message 1 follows a chat template whose text changes with later turns"),
    ],
)
def test_a_template_that_cannot_be_used(talking, template, message):
    talking.chat_template = template
    with pytest.raises(UserError, match=message):
        tokenize_data([Chat(chat("a", "b", "c", "d"), "rows, line 7")], talking, 99)


# -- training -----------------------------------------------------------------------------------------------------


def arguments(model, out, *more):
    long = ("--held_out", 2, "--lr", "2e-2", "--batch_size", 2, "--micro_batch_size", 1, "--memory", "lean", "--cutoff", 512)
    return training_options(model, out, out, *long, *more, method="double control")


@pytest.fixture
def texts(tmp_path):
    """A folder of two texts, which say the same words again and again."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(" ".join(random.Random(name).choices(NOUNS[:3], k=4000)))
    return folder


def test_long_texts_are_learned(call, model_folder, texts, tmp_path):
    said = call("LlaMA.finetune", *arguments(model_folder, tmp_path / "run", "--data", texts))
    record = said.record
    before, last = record.metrics["before"]["eval_loss"], record.metrics["last"]["eval_loss"]
    assert record.task == "texts" and [entry["step"] for entry in record.history] == [0, 2, 4, 6]
    assert last < 0.9 * before and record.metrics["best"]["step"] > 0
    assert f"held-out loss {before:.4f} before, {record.metrics['best']['eval_loss']:.4f} at step" in said.out
    assert record.data["sizes"]["held_out"] == 2 and record.data["sizes"]["cut"] == 0


def test_chats_train_with_their_own_validation_data(call, model_folder, talking, tmp_path):
    talking.save_pretrained(shutil.copytree(model_folder, tmp_path / "model"))
    for name, count in (("train", 9), ("validation", 3)):
        draw = random.Random(name)
        rows = [{"messages": chat(" ".join(draw.choices(NOUNS, k=40)), "river river river")} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--data", tmp_path / "train.jsonl", "--validation", tmp_path / "validation.jsonl")
    losses = {}
    for batching in ("packed", "padded"):
        out = tmp_path / batching
        said = call("LlaMA.finetune", *arguments(tmp_path / "model", out, *words, "--batching", batching))
        losses[batching] = [entry["eval_loss"] for entry in said.record.history]
        assert "9 training and 3 held-out rows, 0 cut at 512 tokens" in said.out
        assert losses[batching][-1] < 0.95 * losses[batching][0]
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-3)
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0]))
    refused = call("LlaMA.finetune", *arguments(tmp_path / "model", out, *words, "--batching", "padded")).refused()
    assert "validation" in refused, "another validation file is another run"


def test_rows_beyond_the_models_positions(call, model_folder, texts, tokenizer, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    more = ("--data", texts, "--max_steps", 1, "--eval_steps", 1)
    err = call("LlaMA.finetune", *arguments(folder, tmp_path / "out", *more)).finished().err
    (note,) = [line for line in err.splitlines() if line.startswith("note: rows")]
    assert "rows have up to 512 tokens" in note and "made for 256 (max_position_embeddings)" in note and "(default)" in note
    again = call("LlaMA.finetune", *arguments(folder, tmp_path / "other", *more, "--cutoff", 256)).finished()
    assert "note: rows" not in again.err

    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + 4, **shape)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    words = arguments(tmp_path / "gpt2", tmp_path / "none", *more, "--memory", "plain")
    assert "has no more positions: choose --cutoff 128 or less" in call("LlaMA.finetune", *words).refused()
