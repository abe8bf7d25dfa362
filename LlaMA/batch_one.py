"""Batches against batch 1: do they answer alike, and how much faster are they?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from LlaMA.answering import Question, Reply, batches

Answer = Callable[[Sequence[Question]], list[Reply]]


def compare_batch_one(
    questions: Sequence[Question], answer: Answer, published: Answer | None, *, count: int, batch_size: int
) -> dict:
    """Answer the same questions in batches and one by one, and one by one as published if there is such a way.

    Args:
        count: so many of the questions, spread evenly.
        published: does not stop early.

    Returns agreement with batch 1 in percent of answers, questions per second of each, and their ratios.
    """
    questions = questions[:: max(1, len(questions) // count)][:count]
    answer(questions[:batch_size])  # warm-up
    together, rate = _timed(answer, questions, batch_size)
    alone, rate_one = _timed(answer, questions, 1)
    result = {
        "questions": len(questions),
        "batch_size": batch_size,
        "questions_per_second": rate,
        "questions_per_second_batch_one": rate_one,
        "speedup": rate / rate_one,
        "answers_agree": _agreement(together, alone),
    }
    if published is None:
        return result
    full, rate_published = _timed(published, questions, 1)
    return result | {
        "questions_per_second_published": rate_published,
        "speedup_over_published": rate / rate_published,
        "answers_agree_with_published": _agreement(together, full),
        "differing": [
            {"batch": one.text, "batch_one": other.text}
            for one, other in zip(together, full, strict=True)
            if one.answer != other.answer
        ],
    }


def _timed(answer: Answer, questions: Sequence[Question], size: int) -> tuple[list[Reply], float]:
    """Replies in the questions' order, and questions per second."""
    replies: dict[int, Reply] = {}
    _wait()
    started = time.perf_counter()
    for indices in batches(questions, range(len(questions)), size):
        replies.update(zip(indices, answer([questions[index] for index in indices]), strict=True))
    _wait()
    rate = len(questions) / (time.perf_counter() - started)
    return [replies[index] for index in range(len(questions))], rate


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _agreement(one: Sequence[Reply], other: Sequence[Reply]) -> float:
    return 100 * sum(a.answer == b.answer for a, b in zip(one, other, strict=True)) / len(one)
