"""An evaluation by evaluate.py, from its options to its record."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import pandas as pd
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from tqdm.auto import tqdm

from control_experiments.errors import UserError
from control_experiments.outcomes import write_outcomes
from control_experiments.paths import public_path
from control_experiments.record import RunRecord, read_record
from control_experiments.training.checkpoints import check_adapter_files
from control_experiments.training.checksums import fingerprint, local_fingerprint
from control_experiments.training.device import DTYPES, describe_device, explain_out_of_memory
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import count_unquantized, describe_model, load_adapter
from control_experiments.training.options import check_method_runs
from control_experiments.training.quantization import quantization_of
from control_experiments.training.runs import RunFolder
from control_experiments.training.setup import choose
from LlaMA.answering import Answer, Question, batches, compare_batch_one, generate, questions_of, rank_words
from LlaMA.commonsense import TASKS, Row, read_tests
from LlaMA.demo import place_of, place_of_model
from LlaMA.evaluate import Options
from LlaMA.models import choose_pad_token, load_model, load_tokenizer, stream

LESS_MEMORY = "a smaller --batch_size, --dtype bf16, fewer --beams"


def run(options: Options, command: Sequence[str]) -> None:
    """Evaluate, unless that is done."""
    device, precision = choose(options, "dtype")
    dtype = DTYPES[precision]
    options.model = place_of_model(options.model)
    if options.adapter is not None:
        check_adapter(options)
    with RunFolder(options.output_dir, go_on="start the same command again") as folder:
        identity = {
            "model": public_path(options.model),
            "model_sha256": local_fingerprint(options.model),
            "adapter": options.adapter and fingerprint(options.adapter),
            "data": public_path(options.data),
            "data_sha256": options.checksums(),
            **options.settings(),
            "compare_batch_one": options.compare_batch_one,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if any(folder.path.glob("*.jsonl")):
            folder.check_same(identity)
        folder.claim(identity, resume=True)
        if folder.finished:
            print(f"{folder.path} is finished: skipped (delete the folder to run it again)")
            return
        with explain_out_of_memory(device, LESS_MEMORY):
            evaluate(options, folder, device, dtype, command)


def evaluate(options: Options, folder: RunFolder, device: torch.device, dtype: torch.dtype, command: Sequence[str]) -> None:
    """Answer all test sets (or compare batches with batch 1) and write the record."""
    started = time.perf_counter()
    tests = read_tests(place_of(options.data), options.tasks, options.limit)
    memory = MemoryMeter(device)
    tokenizer, model, total_parameters = load(options, dtype, device)
    memory.after_load()
    record = RunRecord.begin(
        options,
        domain="llama" if options.quantization == "none" else "qcontrol",
        name=folder.path.name,
        method=method_of(options, model),
        device=describe_device(device),
        task="commonsense-likelihood" if options.mode == "likelihood" else "commonsense",
        command=["python", "-m", "LlaMA.evaluate", *command],
        dtype=str(dtype).removeprefix("torch."),
        pad_token=tokenizer.pad_token,
    )
    seconds: dict[str, float] = {}
    questions = {task: questions_of(tuple(rows), TASKS[task], tokenizer, options.prompt_style) for task, rows in tests.items()}
    answer, published = partial(rank_words, model, tokenizer), None
    if options.mode == "generate":
        answer = partial(generate, model, tokenizer, beams=options.beams, max_new_tokens=options.max_new_tokens)
        published = partial(answer, stop_when_decided=False)
        answer = partial(answer, stop_when_decided=options.stop_when_decided)
    if options.compare_batch_one:
        size = {"count": options.compare_batch_one, "batch_size": options.batch_size}
        metrics = compare_batch_one([*chain(*questions.values())], answer, published, **size)
        shown = {name: value for name, value in metrics.items() if name != "differing"}
        print(json.dumps(shown, indent=2))
    else:
        metrics = answer_all(options, folder, answer, questions, tests, seconds)
        print(f"{'average':14} accuracy {metrics['average']:6.2f}  no match {metrics['no_match']:5.2f}")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = {task: len(rows) for task, rows in tests.items()}
    record.finish(
        folder.record,
        model=describe_model(options.model, base, total_parameters),
        data={"id": public_path(options.data), "sha256": options.checksums(), "sizes": sizes},
        adapter=describe_frozen_adapter(model, dtype),
        memory=memory.summary(),
        metrics={"best": {} if options.compare_batch_one else metrics, "last": metrics},
        time={"evaluate_seconds": time.perf_counter() - started, "task_seconds": seconds},
    )


def answer_all(
    options: Options, folder: RunFolder, answer: Answer, questions: dict, tests: dict[str, list[Row]], seconds: dict
) -> dict:
    """Answer all test sets, which takes `seconds`; returns the record's metrics."""
    answered, accuracies, no_match = [], {}, {}
    with tqdm(total=sum(map(len, tests.values())), unit="question", disable=None) as bar:
        for task, rows in tests.items():
            path, began = folder.path / f"{task}.jsonl", time.perf_counter()
            answers = read_answers(path, rows)
            left = len(rows) - len(answers)
            answer_task(path, rows, questions[task], answers, answer, options.batch_size, bar)
            answered.append(found := pd.DataFrame(answers.values()).assign(task=task))
            seconds[task] = time.perf_counter() - began
            rate = f", {left / seconds[task]:.1f} questions/s" if left else ""
            accuracies[task], no_match[task] = score(found)
            said = f"{task:14} accuracy {accuracies[task]:6.2f}  no match {no_match[task]:5.2f}{rate}"
            tqdm.write(said, file=sys.stdout)
    table = pd.concat(answered).sort_values(["task", "row"])
    examples = table.task + " " + table.row.astype(str)
    write_outcomes(folder.path, examples.tolist(), table.correct.tolist(), group=table.task.tolist())
    average = sum(accuracies.values()) / len(tests)
    shares = {f"{task}/no_match": share for task, share in no_match.items()}
    return {**accuracies, "average": average, **shares, "no_match": score(table)[1]}


def check_adapter(options: Options) -> None:
    """Check that the adapter is what the command line says, before anything large is loaded. Raises UserError:
    it is unreadable, of another method or rank, or was trained on another base model."""
    check_adapter_files(options.adapter)
    try:
        config = PeftConfig.from_pretrained(options.adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.adapter} is no adapter that peft can read: {error}") from error
    if options.method is not None:
        for name, found in described(config).items():
            if found != (asked := getattr(options, name)):
                told = f"has {name} {found}, but {asked} was asked for: give the values it was trained with"
                raise UserError(f"the adapter in {options.adapter} {told}")
    trained = trained_base(options.adapter) or {"id": config.base_model_name_or_path}
    checksum = local_fingerprint(options.model)
    if checksum and trained.get("sha256"):
        same = trained["sha256"] == checksum
    else:  # a folder may have moved: only its name counts
        same = not trained["id"] or Path(trained["id"]).name == Path(options.model).name
    if not same:
        other = f"{Path(trained['id']).name}, not this {Path(options.model).name}"
        told = f"{options.adapter} was trained on another base model ({other})"
        raise UserError(f"the adapter in {told}: give that one as --model")


def trained_base(adapter: str) -> dict | None:
    """What the training run's record beside the adapter says of its base model, if there is one."""
    record = Path(adapter).parent / "record.json"
    return read_record(record).model if record.is_file() else None


def described(config: PeftConfig) -> dict:
    """An adapter's method and ranks, by the names of the options that ask for them."""
    kind = config.peft_type.value.lower()
    if kind not in ("control", "lora"):
        return {"method": kind, "lora_rank": getattr(config, "r", None)}
    parts, ranks = [], {}
    if kind == "control":
        parts.append("double control" if len(config.control_blocks) > 1 else "control")
        ranks["control_rank"] = config.control_rank
    if config.target_modules:
        parts.append("dora" if config.use_dora else "lora")
        ranks |= {"lora_rank": config.r, "lora_alpha": config.lora_alpha}
    return {"method": "+".join(parts), **ranks}


def load(options: Options, dtype: torch.dtype, device: torch.device):
    """Tokenizer, model (with its adapter, if there is one) and the base's number of parameters."""
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype, device, quantization=options.quantization, on_host=options.stream_weights)
    choose_pad_token(tokenizer, model.get_input_embeddings().weight.shape[0])
    total = count_unquantized(model)
    if options.adapter is not None:
        stored = quantization_of(model.config)
        trained = (trained_base(options.adapter) or {"quantization": stored}).get("quantization", "none")
        if trained != stored:  # which is legitimate, but not the same
            told = f"{options.adapter} was trained with --quantization {trained}, the base here is loaded with {stored}"
            print(f"warning: the adapter in {told}: answers may differ", file=sys.stderr)
        model = load_adapter(model, options.adapter, options.model, autocast_adapter_dtype=False)
        check_method_runs(method_of(options, model), stored, device)
        for parameter in model.parameters():  # not buffers: rotary frequencies stay exact
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if options.stream_weights:
        stream(model.requires_grad_(False), "plain", device)
    return tokenizer, model.eval(), total


def method_of(options: Options, model) -> str:
    """The method's name in records: as asked for, else read off the adapter."""
    if options.adapter is None:
        return "zero-shot"
    return options.method or described(model.peft_config["default"])["method"]


def describe_frozen_adapter(model, dtype: torch.dtype) -> dict:
    """The record's `adapter` of a model that is not trained here."""
    count, config, kind = 0, None, None
    if isinstance(model, PeftModel):
        count = sum(map(torch.numel, get_peft_model_state_dict(model, save_embedding_layers=False).values()))
        config, kind = model.peft_config["default"].to_dict(), str(dtype).removeprefix("torch.")
    return {"config": config, "dtype": kind, "trainable_parameters": count, "adapter_parameters": count, "head_parameters": 0}


def read_answers(path: Path, rows: Sequence[Row]) -> dict[int, dict]:
    """The answers that a task's file holds, by row; a last line that a kill cut short is taken off the file.
    Raises UserError: a line that is none of ours."""
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
            row = entry["row"]
            label = rows[row].answer
            if row < 0 or entry["label"] != label or entry["correct"] is not (entry["answer"] == label):
                raise ValueError("another test set's, or not as it was written")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no answer to this test set: delete the file") from error
        answers[row] = entry
    return answers


def answer_task(
    path: Path, rows: Sequence[Row], questions: Sequence[Question], answers: dict, answer: Answer, size: int, bar: tqdm
) -> None:
    """Answer the questions that `answers`, those of `path`, lack and append them to both, batch by batch.

    A batch of which some answers are there is worked on whole: which questions share a batch never depends on where a
    run died, so that its answers do not either.
    """
    bar.update(len(answers))
    with path.open("a", encoding="utf-8") as file:
        for indices in batches(questions, size):
            missing = [index for index in indices if index not in answers]
            if not missing:
                continue
            replies = dict(zip(indices, answer([questions[index] for index in indices]), strict=True))
            for index in missing:
                reply, label = replies[index], rows[index].answer
                said = {"answer": reply.answer, "correct": reply.answer == label, "text": reply.text}
                answers[index] = {"row": index, "label": label, **said}
                file.write(json.dumps(answers[index], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(missing))


def score(answers: pd.DataFrame) -> tuple[float, float]:
    """Accuracy and share of answers without an answer word (which count as wrong), both in percent."""
    return tuple(100 * int(ones.sum()) / len(answers) for ones in (answers.correct, answers.answer.isna()))
