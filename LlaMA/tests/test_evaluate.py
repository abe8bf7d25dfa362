import json
import shutil

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from control_experiments.record import read_record
from control_experiments.training.arguments import parse_arguments
from LlaMA import evaluate, evaluation, finetune, training
from LlaMA.answering import Question, generate, pad, rank_words
from LlaMA.commonsense import ANSWER_LEAD, TASKS, offered_words, tokenize_prompts
from LlaMA.tests.conftest import adapted, tiny_model, training_options
from peft_control import memory


@pytest.fixture(scope="session")
def trained(tmp_path_factory, model_folder, data):
    """The output folder of a control+lora run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    longer = ("--max_steps", 60, "--eval_steps", 20, "--warmup_steps", 5, "--lr", "2e-2")
    words = map(str, training_options(model_folder, data, out, *longer))
    training.run(*parse_arguments(finetune.Options, argv=[*words]))
    return out


@pytest.fixture
def run(call, model_folder, data, tmp_path):
    """Evaluate the tiny model on the CPU into tmp_path/<name>."""

    def start(*more, name="evaluation"):
        given = ("--model", model_folder, "--data", data, "--output_dir", tmp_path / name, "--device", "cpu")
        return call("LlaMA.evaluate", *given, "--batch_size", 4, *more)

    return start


def test_a_home_is_found_in_every_option(monkeypatch):
    """A shell leaves --data=~/folder as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--data=~/a=b", "--output_dir", "~", "--model", "org/model~1"]
    (options,) = parse_arguments(evaluate.Options, argv=words)
    assert (options.data, options.output_dir, options.model) == ("/home/me/a=b", "/home/me", "org/model~1")


def test_help_says_what_the_opposite_of_a_switch_does(call):
    assert "--no-stop-when-decided The same as --stop_when_decided False." in " ".join(
        call("LlaMA.evaluate", "--help").out.split()
    )


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_streamed_weights_answer_alike(run, trained, tmp_path, monkeypatch, mode, adapted):
    monkeypatch.setattr(memory, "RESIDENT", 1)  # of two layers
    how = ("--limit", 3, "--tasks", "boolq", "--mode", mode, *(expected(trained) if adapted else ()))
    run(*how, name="resident").finished()
    run(*how, "--stream_weights", "True", name="streamed").finished()
    one, other = ((tmp_path / name / "boolq.jsonl").read_text() for name in ("resident", "streamed"))
    assert one == other != ""


def expected(trained, *more):
    ranks = ("--control_rank", 4, "--lora_rank", 2, "--lora_alpha", 4)
    return ("--adapter", trained / "adapter", "--method", "control+lora", *ranks, *more)


@pytest.fixture
def questions(rows, tokenizer, model):
    """Questions whose answer words are pieces of what this random model says, so that there is something to find."""
    prompts = tokenize_prompts(rows[:12], tokenizer)
    said = [reply.text for reply in generate(
        model, tokenizer, [Question(ids, ("x",), ("x",)) for ids in prompts], stop_when_decided=False
    )]  # fmt: skip
    spoken = [word for text in said for word in text.split()[1:3]]
    words = tuple(dict.fromkeys(word for word in spoken if word.isalpha() and len(word) > 2))
    assert len(words) >= 2
    return [Question(ids, words, words[:3]) for ids in prompts]


@pytest.mark.parametrize("method", [None, "double control", "miss", "shadow"])
def test_prompts_read_once_for_all_beams_say_what_the_published_search_says(model, tokenizer, questions, method):
    if method is not None:
        model = adapted(model, method).eval()
    longest_first = sorted(questions, key=lambda question: -len(question.ids))
    assert len(longest_first[0].ids) > len(longest_first[-1].ids)  # so that some are padded
    batch = pad(tokenizer, [question.ids for question in longest_first])
    length = batch["input_ids"].shape[1]
    config = GenerationConfig(
        num_beams=4, do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    published = model.generate(**batch, generation_config=config)[:, length:]
    texts = [text.strip() for text in tokenizer.batch_decode(published, skip_special_tokens=True)]
    said = generate(model, tokenizer, longest_first, stop_when_decided=False)
    assert [reply.text for reply in said] == texts


def test_stopping_when_decided_changes_no_answer_and_takes_fewer_steps(model, tokenizer, questions, monkeypatch):
    steps, forward = [], model.forward

    def counted(*args, **kwargs):
        steps.append(1)
        return forward(*args, **kwargs)

    def answers(stop_when_decided):
        steps.clear()
        said = (generate(model, tokenizer, [q], stop_when_decided=stop_when_decided) for q in questions)
        return [reply.answer for (reply,) in said], len(steps)

    monkeypatch.setattr(model, "forward", counted)
    (full, count_full), (stopped, count_stopped) = answers(False), answers(True)
    assert stopped == full and sum(answer is not None for answer in full) >= 2
    assert count_stopped < count_full


@pytest.mark.parametrize("method", [None, "miss", "shadow"])
def test_likelihood_ranks_as_whole_sequences_do(model, tokenizer, rows, method):
    if method is not None:
        model = adapted(model, method).eval()
    tests = [(row, TASKS["hellaswag"] if "ending" in row.answer else tuple(offered_words(row, TASKS["openbookqa"])))
             for row in rows[:10]]  # fmt: skip
    prompts = tokenize_prompts([row for row, _ in tests], tokenizer)
    questions = [
        Question(ids, words, words[: 2 + index % 3]) for index, (ids, (_, words)) in enumerate(zip(prompts, tests, strict=True))
    ]
    best = []
    model.requires_grad_(False)
    for question in questions:
        scores = []
        for word in question.offered:
            tail = tokenizer(f" {ANSWER_LEAD} {word}", add_special_tokens=False)["input_ids"]
            logits = model(input_ids=torch.tensor([question.ids + tail])).logits[0]
            logits = logits[len(question.ids) - 1 : -1]
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()))
        best.append(question.offered[scores.index(max(scores))])
    assert [reply.answer for reply in rank_words(model, tokenizer, questions)] == best
    assert len(set(best)) > 1


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_a_run_scores_all_tasks_and_keeps_every_answer(run, trained, tmp_path, mode):
    out = run(*expected(trained, "--mode", mode)).finished().out
    record = read_record(tmp_path / "evaluation" / "record.json")
    assert record.method == "control+lora"
    assert record.task == ("commonsense" if mode == "generate" else "commonsense-likelihood")
    assert mode == "generate" or record.metrics["last"]["no_match"] == 0
    accuracies = []
    for task in TASKS:
        written = (tmp_path / "evaluation" / f"{task}.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in written]
        assert sorted(line["row"] for line in lines) == list(range(7))
        assert all(line["correct"] == (line["answer"] == line["label"]) for line in lines)
        accuracies.append(100 * sum(line["correct"] for line in lines) / 7)
        assert record.metrics["last"][task] == pytest.approx(accuracies[-1])
        assert f"{task:14} accuracy" in out
    kept = np.load(tmp_path / "evaluation" / "outcomes.npz")
    assert len(set(kept["example"])) == 7 * 8
    for task, accuracy in zip(TASKS, accuracies, strict=True):
        assert 100 * kept["correct"][kept["group"] == task].mean() == pytest.approx(accuracy)
    assert record.metrics["last"]["average"] == pytest.approx(sum(accuracies) / 8)
    counts = [entry.adapter["trainable_parameters"] for entry in (record, read_record(trained / "record.json"))]
    assert counts[0] == counts[1]


def test_a_killed_run_answers_only_what_is_left(run, data, tmp_path, monkeypatch):
    words, folder = ("--tasks", "boolq", "piqa", "--batch_size", 3), tmp_path / "evaluation"
    run(*words).finished()
    (folder / "record.json").unlink()
    (folder / "piqa.jsonl").unlink()
    kept = (folder / "boolq.jsonl").read_text().splitlines(keepends=True)
    for spoiled in ({"row": -1}, {"correct": "yes"}):
        (folder / "boolq.jsonl").write_text(json.dumps({**json.loads(kept[0]), **spoiled}) + "\n")
        assert "line 1 is no answer to this test set" in run(*words).refused()
    (folder / "boolq.jsonl").write_text("".join(kept[:3]) + kept[3][:10])  # killed within a line

    asked, real = [], evaluation.generate

    def counted(model, tokenizer, questions, **kwargs):
        asked.extend(questions)
        return real(model, tokenizer, questions, **kwargs)

    monkeypatch.setattr(evaluation, "generate", counted)
    run(*words).finished()
    assert len(asked) == 4 + 7
    assert sorted((folder / "boolq.jsonl").read_text().splitlines()) == sorted(line.strip() for line in kept)
    assert "skipped" in run(*words).finished().out
    assert "beams 4 there, 1 asked for" in run("--tasks", "boolq", "--beams", 1).refused()
    other = shutil.copytree(data, tmp_path / data.name)
    shutil.copy(other / "boolq" / "test.json", other / "piqa" / "test.json")
    assert "belongs to another run (data_sha256" in run(*words, "--data", other).refused()


def test_comparison_with_batch_one(run, tmp_path):
    run("--compare_batch_one", 9, "--max_new_tokens", 6).finished()
    result = read_record(tmp_path / "evaluation" / "record.json").metrics["last"]
    assert (result["questions"], result["answers_agree"]) == (9, 100)
    speed = result["questions_per_second"] / result["questions_per_second_batch_one"]
    assert result["speedup"] == pytest.approx(speed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--control_rank", 8), "control_rank 4, but 8 was asked for"),
        (("--method", "double control"), "method control+lora, but double control"),
        (("--adapter", "nowhere"), "nowhere is no adapter folder"),
        (("--tasks", "glue"), "argument --tasks: invalid choice: 'glue'"),
        (("--data", "nowhere"), "cannot read nowhere"),
    ],
)
def test_bad_input_is_one_line(run, trained, tmp_path, change, message):
    assert message in run(*expected(trained, *change)).refused()
    assert not (tmp_path / "evaluation").exists()


def test_an_adapter_of_another_base_is_refused(call, trained, data, model_folder, tmp_path, tokenizer):
    other = tmp_path / "tiny-llama"  # the same name and shape, other weights
    shutil.copytree(model_folder, other)
    tiny_model(len(tokenizer) + 4, initializer_range=0.1).save_pretrained(other)
    arguments = ("--data", data, "--output_dir", tmp_path / "out", "--device", "cpu")
    assert "trained on another base model" in call("LlaMA.evaluate", "--model", other, *arguments, *expected(trained)).refused()

    bare = tmp_path / "adapter"  # without its record only the shapes can tell
    shutil.copytree(trained / "adapter", bare)
    tiny_model(len(tokenizer) + 4, hidden_size=48).save_pretrained(other)
    assert "does not fit" in call("LlaMA.evaluate", "--model", other, *arguments, "--adapter", bare).refused()


def test_a_lack_of_memory_is_one_line_and_what_was_answered_is_kept(run, tmp_path, monkeypatch):
    real, path, sizes = evaluation.generate, tmp_path / "evaluation" / "boolq.jsonl", []

    def generate(model, tokenizer, questions, **named):
        sizes.append(len(questions))
        if len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0")
        return real(model, tokenizer, questions, **named)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "generate", generate)
        assert "smaller --batch_size" in run("--tasks", "boolq").refused()
    assert sizes == [4, 3] and len(path.read_text().splitlines()) == 4
    run("--tasks", "boolq", "--batch_size", 1).finished()
    assert len(path.read_text().splitlines()) == 7
