"""Answer the 8 commonsense test sets with a base model, with or without an adapter, and write a run record.

    python -m LlaMA.evaluate --adapter OUT/adapter --data FOLDER_OF_TEST_SETS --output_dir OUT/evaluation
    python -m LlaMA.evaluate --model SmolLM2.gguf --data FOLDER --output_dir zero-shot          no adapter: zero-shot
    python -m LlaMA.evaluate ... --mode likelihood                    rank the answer words instead of generating
    python -m LlaMA.evaluate ... --compare_batch_one 200              only measure batches against batch 1

Generation is as published (4 beams, 32 new tokens, no sampling), in left-padded batches of like length that end once
every answer is decided. Each raw answer goes to <task>.jsonl as soon as it is there; a run that was killed goes on with
the questions that are left when it is started again. See LlaMA/README.md.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm

import peft_control  # noqa: F401  registers CONTROL with peft
from control_experiments.errors import UserError, run_main
from control_experiments.paths import public_path
from control_experiments.record import RunRecord, git_state, package_versions, read_record, utc_now
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.checkpoints import check_adapter_files
from control_experiments.training.checksums import fingerprint, local_fingerprint
from control_experiments.training.device import describe_device, explain_out_of_memory, select_device
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import load_adapter
from control_experiments.training.quantization import QUANTIZATION_HELP, check_method_runs, quantization_of
from control_experiments.training.quiet import quieten
from control_experiments.training.runs import RunFolder
from LlaMA.answering import Question, Reply, generate, rank_words
from LlaMA.commonsense import TASKS, Row, offered_words, read_tests, tokenize_prompts
from LlaMA.models import (
    choose_pad_token,
    describe_model,
    expected_config,
    load_model,
    load_tokenizer,
    resolve_dtype,
)

LESS_MEMORY = "a smaller --batch_size, --dtype bf16, fewer --beams"


@dataclass
class Options:
    data: str = field(metadata={"help": "Folder with <task>/test.json for each task."})
    output_dir: str = field(metadata={"help": "Folder for the raw answers and the record."})
    model: str = field(
        default="meta-llama/Llama-2-7b-hf",
        metadata={"help": "Hub id, folder or GGUF file of the base model."},
    )
    adapter: Optional[str] = field(
        default=None, metadata={"help": "Adapter folder; without it the base model answers."}
    )
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Test sets to answer."})
    limit: Optional[int] = field(
        default=None, metadata={"help": "Only the first so many questions of each test set."}
    )
    mode: Literal["generate", "likelihood"] = field(
        default="generate",
        metadata={"help": "generate: as published; likelihood: the likeliest offered answer word."},
    )
    batch_size: int = field(default=64, metadata={"help": "Questions answered together."})
    beams: int = field(default=4, metadata={"help": "Beams of the search."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest response, in tokens."})
    prompt_style: Literal["matched", "authors"] = field(
        default="matched",
        metadata={
            "help": "matched: prompts as in training; authors: the published, slightly different ones."
        },
    )
    stop_when_decided: bool = field(
        default=True, metadata={"help": "End a batch once no continuation can change an answer."}
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Type of all weights."}
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = field(
        default="none", metadata={"help": QUANTIZATION_HELP}
    )
    compare_batch_one: int = field(
        default=0,
        metadata={
            "help": "Instead of an evaluation: answer so many questions in batches and one by one, and compare."
        },
    )
    method: Optional[str] = field(
        default=None, metadata={"help": "What the adapter must be; with it the ranks below are checked too."}
    )
    control_rank: int = field(default=64, metadata={"help": "Expected rank of the control."})
    lora_rank: int = field(default=32, metadata={"help": "Expected rank of LoRA or DoRA."})
    lora_alpha: float = field(default=64, metadata={"help": "Expected LoRA alpha."})
    seed: int = field(default=42, metadata={"help": "Only noted: nothing here is random."})

    def check(self) -> None:
        """Raise UserError for values that cannot be."""
        check_numbers(self, "batch_size", "beams", "max_new_tokens", "limit", at_least=1)
        check_numbers(self, "compare_batch_one", at_least=0)
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} is no adapter folder: it has no adapter_config.json")

    def settings(self) -> dict:
        """What is to be answered, and how. Batches are left out: a run may go on with smaller ones."""
        names = ("mode", "beams", "max_new_tokens", "prompt_style", "limit", "tasks")
        return {name: getattr(self, name) for name in names}

    def checksums(self) -> dict[str, str | None]:
        """Of each test set."""
        return {task: local_fingerprint(Path(self.data) / task / "test.json") for task in self.tasks}


# -- the adapter --------------------------------------------------------------------------------------------


def check_adapter(options: Options) -> None:
    """Check that the adapter is what the command line says, before anything large is loaded.

    Raises:
        UserError: it is unreadable, of another method or rank, or was trained on another base model.
    """
    check_adapter_files(options.adapter)
    try:
        config = PeftConfig.from_pretrained(options.adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.adapter} is no adapter that peft can read: {error}") from error
    if options.method is not None:
        expected = expected_config(
            options.method, options.control_rank, 1.0, 0.0, options.lora_rank, options.lora_alpha, 0.0,
            config.target_modules or ("q_proj",),
        )  # fmt: skip
        for name, wanted in _identity(expected).items():
            if (found := _identity(config).get(name)) != wanted:
                raise UserError(
                    f"the adapter in {options.adapter} has {name} {found}, but {options.method} with {name} {wanted} "
                    "was asked for: give the values it was trained with"
                )
    check_base(options, config.base_model_name_or_path)
    return config


def check_base(options: Options, noted: str | None) -> None:
    """Compare the base with the training run's record beside the adapter, else with the adapter's own note.

    Raises:
        UserError: the adapter was trained on another base model.
    """
    record = Path(options.adapter).parent / "record.json"
    trained = read_record(record).model if record.is_file() else {"id": noted}
    checksum = local_fingerprint(options.model)
    if checksum and trained.get("sha256"):
        same = trained["sha256"] == checksum
    else:  # a folder may have moved: only its name counts
        same = not trained["id"] or Path(trained["id"]).name == Path(options.model).name
    if not same:
        raise UserError(
            f"the adapter in {options.adapter} was trained on another base model ({Path(trained['id']).name}, not this "
            f"{Path(options.model).name}): give that one as --model"
        )


def warn_of_other_quantization(adapter: str, quantization: str) -> None:
    """Say on stderr when the adapter was trained on a base quantized otherwise; that is legitimate, but not the same."""
    record = Path(adapter).parent / "record.json"
    trained = read_record(record).model.get("quantization", "none") if record.is_file() else quantization
    if trained != quantization:
        print(
            f"warning: the adapter in {adapter} was trained with --quantization {trained}, the base here is loaded with "
            f"{quantization}: answers may differ",
            file=sys.stderr,
        )


def _identity(config: PeftConfig) -> dict:
    control = hasattr(config, "control_rank")
    identity = {"method": "control" if control else "lora"}
    if control:
        identity |= {"control_rank": config.control_rank, "control_blocks": sorted(config.control_blocks)}
    if config.target_modules:
        identity |= {"use_dora": config.use_dora, "lora_rank": config.r, "lora_alpha": config.lora_alpha}
    return identity


def load(options: Options, dtype: torch.dtype, device: torch.device):
    """Tokenizer, model (with its adapter, if there is one) and the base's number of parameters."""
    tokenizer = load_tokenizer(options.model)
    base = load_model(options.model, dtype, device, quantization=options.quantization)
    choose_pad_token(tokenizer, base.get_input_embeddings().weight.shape[0])
    total = base.num_parameters()
    if options.adapter is None:
        return tokenizer, base, total
    warn_of_other_quantization(options.adapter, quantization_of(base.config))
    model = load_adapter(base, options.adapter, options.model, autocast_adapter_dtype=False)
    check_method_runs(_method(options, model), quantization_of(base.config), device)
    for parameter in model.parameters():  # not buffers: rotary frequencies stay exact
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return tokenizer, model.eval(), total


# -- answering ----------------------------------------------------------------------------------------------


def questions_of(rows: Sequence[Row], words: tuple[str, ...], tokenizer, style) -> list[Question]:
    """The rows as the model sees them."""
    prompts = tokenize_prompts(rows, tokenizer, style)
    return [
        Question(ids, words, tuple(offered_words(row, words))) for ids, row in zip(prompts, rows, strict=True)
    ]


def batches(questions: Sequence[Question], indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of questions in batches of like length, longest first (so that a lack of memory shows at once)."""
    ordered = sorted(indices, key=lambda index: -len(questions[index].ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def answerer(options: Options, model, tokenizer) -> Callable[[Sequence[Question]], list[Reply]]:
    """The function that answers one batch."""
    if options.mode == "likelihood":
        return partial(rank_words, model, tokenizer)
    return partial(
        generate,
        model,
        tokenizer,
        beams=options.beams,
        max_new_tokens=options.max_new_tokens,
        stop_when_decided=options.stop_when_decided,
    )


def in_parts(
    answer: Callable[[Sequence[Question]], list[Reply]],
) -> Callable[[Sequence[Question]], list[Reply]]:
    """`answer`, which halves a batch that the GPU's memory does not hold until it does.

    Raises:
        torch.OutOfMemoryError: it does not hold a single question.
    """
    said = []

    def answered(questions: Sequence[Question]) -> list[Reply]:
        try:
            return answer(questions)
        except torch.OutOfMemoryError:
            if len(questions) == 1:
                raise
        # outside of the except clause, which keeps what the failed batch had on the GPU
        torch.cuda.empty_cache()
        if not said:
            said.append(True)
            tqdm.write(
                f"warning: {len(questions)} questions at once need more memory than the GPU has: answered in parts "
                "(a smaller --batch_size saves the attempts)",
                file=sys.stderr,
            )
        middle = len(questions) // 2
        return [*answered(questions[:middle]), *answered(questions[middle:])]

    return answered


def read_answers(path: Path, rows: Sequence[Row]) -> dict[int, dict]:
    """The answers that a task's file holds, by row; a last line that a kill cut short is taken off the file.

    Raises:
        UserError: a line that is none of ours.
    """
    if not path.is_file():
        return {}
    contents = path.read_bytes()
    whole = contents[: contents.rfind(b"\n") + 1]
    if whole != contents:
        os.truncate(path, len(whole))
    answers = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            row, answer = entry["row"], entry["answer"]
            if type(row) is not int or row < 0 or entry["label"] != rows[row].answer:
                raise ValueError("another test set's")
            if not isinstance(answer, str | None) or entry["correct"] is not (answer == rows[row].answer):
                raise ValueError("not as it was written")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is no answer to this test set: delete the file"
            ) from error
        answers[row] = entry
    return answers


def answer_task(
    path: Path, rows: Sequence[Row], questions: Sequence[Question], answer: Callable, size: int, bar: tqdm
) -> dict[int, dict]:
    """Answer the questions that `path` lacks and append them to it, batch by batch.

    A batch of which some answers are there is worked on whole: which questions share a batch never depends on where a
    run died, so that its answers do not either.
    """
    answers = read_answers(path, rows)
    bar.update(len(answers))
    with path.open("a", encoding="utf-8") as file:
        for indices in batches(questions, range(len(rows)), size):
            missing = [index for index in indices if index not in answers]
            if not missing:
                continue
            replies = answer([questions[index] for index in indices])
            for index, reply in zip(indices, replies, strict=True):
                if index not in missing:
                    continue
                answers[index] = {
                    "row": index,
                    "label": rows[index].answer,
                    "answer": reply.answer,
                    "correct": reply.answer == rows[index].answer,
                    "text": reply.text,
                }
                file.write(json.dumps(answers[index], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(missing))
    return answers


def score(answers: dict[int, dict]) -> dict:
    """Accuracy and share of answers without an answer word (which count as wrong), both in percent."""
    count = len(answers)
    return {
        "accuracy": 100 * sum(entry["correct"] for entry in answers.values()) / count,
        "no_match": 100 * sum(entry["answer"] is None for entry in answers.values()) / count,
        "questions": count,
    }


def summarise(scores: dict[str, dict]) -> dict:
    """The record's metrics: each task's accuracy under its name, their mean, and the no-match rates."""
    tasks = {task: entry["accuracy"] for task, entry in scores.items()}
    no_match = {f"{task}/no_match": entry["no_match"] for task, entry in scores.items()}
    questions = sum(entry["questions"] for entry in scores.values())
    return {
        **tasks,
        "average": sum(tasks.values()) / len(tasks),
        **no_match,
        "no_match": sum(entry["no_match"] * entry["questions"] for entry in scores.values()) / questions,
    }


# -- batches against batch 1 --------------------------------------------------------------------------------


def compare_batch_one(options: Options, model, tokenizer, tests: dict[str, list[Row]], device) -> dict:
    """Answer the same questions in batches, one by one, and one by one without stopping early (as published).

    Returns agreement with batch 1 in percent of answers and of texts, questions per second of each, and their ratios.
    """
    questions = [
        question
        for task, rows in tests.items()
        for question in questions_of(rows, TASKS[task], tokenizer, options.prompt_style)
    ]
    step = max(1, len(questions) // options.compare_batch_one)
    questions = questions[::step][: options.compare_batch_one]  # spread evenly over the tasks
    answer = answerer(options, model, tokenizer)
    answer(questions[: options.batch_size])  # warm-up

    def timed(answer: Callable, size: int) -> tuple[list[Reply], float]:
        replies: dict[int, Reply] = {}
        _wait(device)
        started = time.perf_counter()
        for indices in batches(questions, range(len(questions)), size):
            replies.update(zip(indices, answer([questions[index] for index in indices]), strict=True))
        _wait(device)
        return [replies[index] for index in range(len(questions))], len(questions) / (
            time.perf_counter() - started
        )

    together, rate = timed(answer, options.batch_size)
    alone, rate_one = timed(answer, 1)
    result = {
        "questions": len(questions),
        "batch_size": options.batch_size,
        "questions_per_second": rate,
        "questions_per_second_batch_one": rate_one,
        "speedup": rate / rate_one,
        "answers_agree": _agreement(together, alone, "answer"),
    }
    if options.mode == "generate":
        published, rate_published = timed(partial(answer, stop_when_decided=False), 1)
        result |= {
            "questions_per_second_published": rate_published,
            "speedup_over_published": rate / rate_published,
            "answers_agree_with_published": _agreement(together, published, "answer"),
            "differing": [
                {"batch": one.text, "batch_one": other.text}
                for one, other in zip(together, published, strict=True)
                if one.answer != other.answer
            ],
        }
    return result


def _agreement(one: Sequence[Reply], other: Sequence[Reply], name: str) -> float:
    same = sum(getattr(a, name) == getattr(b, name) for a, b in zip(one, other, strict=True))
    return 100 * same / len(one)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the run ------------------------------------------------------------------------------------------------


def evaluate(
    options: Options, folder: RunFolder, device: torch.device, dtype: torch.dtype, command: Sequence[str]
) -> RunRecord:
    """Answer all test sets (or compare batches with batch 1) and write the record."""
    created, started = utc_now(), time.perf_counter()
    tests = read_tests(options.data, options.tasks, options.limit)
    memory = MemoryMeter(device)
    tokenizer, model, total_parameters = load(options, dtype, device)
    memory.after_load()
    count = sum(map(len, tests.values()))
    adapter = {
        "config": None,
        "dtype": None,
        "trainable_parameters": 0,
        "adapter_parameters": 0,
        "head_parameters": 0,
    }
    if options.adapter is not None:
        adapter = _describe_adapter(model, dtype)
    seconds: dict = {}
    if options.compare_batch_one:
        comparison = compare_batch_one(options, model, tokenizer, tests, device)
        metrics = {"best": {}, "last": comparison}
        print(
            json.dumps({name: value for name, value in comparison.items() if name != "differing"}, indent=2)
        )
    else:
        answer, scores = in_parts(answerer(options, model, tokenizer)), {}
        with tqdm(
            total=count, unit="question", disable=None, mininterval=0.2 if sys.stderr.isatty() else 20
        ) as bar:
            for task, rows in tests.items():
                path, began = folder.path / f"{task}.jsonl", time.perf_counter()
                done = len(read_answers(path, rows))
                questions = questions_of(rows, TASKS[task], tokenizer, options.prompt_style)
                scores[task] = score(answer_task(path, rows, questions, answer, options.batch_size, bar))
                seconds[task] = time.perf_counter() - began
                answered = len(rows) - done
                rate = f", {answered / seconds[task]:.1f} questions/s" if answered else ""
                tqdm.write(
                    f"{task:14} accuracy {scores[task]['accuracy']:6.2f}  no match {scores[task]['no_match']:5.2f}{rate}",
                    file=sys.stdout,
                )
        summary = summarise(scores)
        metrics = {"best": summary, "last": summary}
        print(f"{'average':14} accuracy {summary['average']:6.2f}  no match {summary['no_match']:5.2f}")
    record = RunRecord(
        domain="llama" if options.quantization == "none" else "qcontrol",
        name=folder.path.name,
        method=_method(options, model),
        task="commonsense-likelihood" if options.mode == "likelihood" else "commonsense",
        seed=options.seed,
        command=["python", "-m", "LlaMA.evaluate", *command],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model=describe_model(
            options.model, getattr(model, "get_base_model", lambda: model)(), total_parameters
        ),
        data={
            "id": public_path(options.data),
            "sha256": options.checksums(),
            "sizes": {task: len(rows) for task, rows in tests.items()},
        },
        adapter=adapter,
        hyperparameters={
            **options.settings(),
            "batch_size": options.batch_size,
            "stop_when_decided": options.stop_when_decided,
            "quantization": options.quantization,
            "dtype": str(dtype).removeprefix("torch."),
            "pad_token": tokenizer.pad_token,
        },
        metrics=metrics,
        memory=memory.summary(),
        time={"evaluate_seconds": time.perf_counter() - started, "task_seconds": seconds},
    )
    record.write(folder.record)
    return record


def _describe_adapter(model: PeftModel, dtype: torch.dtype) -> dict:
    count = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if any(part.startswith(("lora_", "control_")) for part in name.split("."))
    )
    return {
        "config": model.peft_config["default"].to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "trainable_parameters": count,
        "adapter_parameters": count,
        "head_parameters": 0,
    }


def _method(options: Options, model) -> str:
    """The method's name in records: as asked for, else read off the adapter."""
    if options.adapter is None:
        return "zero-shot"
    if options.method is not None:
        return options.method
    config = model.peft_config["default"]
    per_weight = None if not config.target_modules else "dora" if config.use_dora else "lora"
    if not hasattr(config, "control_rank"):
        return per_weight
    control = "double control" if len(config.control_blocks) > 1 else "control"
    return f"{control}+{per_weight}" if per_weight else control


def main(argv: Sequence[str] | None = None) -> RunRecord | None:
    """Evaluate as the command line says and write the run's record; None when the run was finished before."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options.check()
    device = select_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    quieten()
    if options.adapter is not None:
        check_adapter(options)
    with RunFolder(options.output_dir, go_on="start the same command again") as folder:
        identity = {
            "model": public_path(options.model),
            "model_sha256": local_fingerprint(options.model),
            "adapter": options.adapter and fingerprint(options.adapter),
            "data": public_path(options.data),
            "data_sha256": options.checksums(),
            "quantization": options.quantization,
            **options.settings(),
            "compare_batch_one": options.compare_batch_one,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if any(folder.path.glob("*.jsonl")):
            folder.check_same(identity)
        folder.claim(identity, resume=True)
        if folder.finished:
            print(f"{folder.path} is finished: skipped (delete the folder to run it again)")
            return None
        with explain_out_of_memory(device, LESS_MEMORY):
            return evaluate(options, folder, device, dtype, command)


if __name__ == "__main__":
    run_main(main)
