"""Answers of a causal language model to batches of questions, by generation or by likelihood, and how batches compare with
single questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import ModelOutput

from LlaMA.commonsense import ANSWER_LEAD, TASKS, Row, extract_answer, offered_words, tokenize_prompts
from LlaMA.prompts import Style


class Question(NamedTuple):
    """A prompt's token ids, the task's answer words, and the words that this question offers."""

    ids: list[int]
    words: tuple[str, ...]
    offered: tuple[str, ...]


class Reply(NamedTuple):
    """What the model said, and the answer word in it (None: no match)."""

    text: str
    answer: str | None


@lru_cache(maxsize=2 * len(TASKS))  # the runs of a study ask the same test sets, and the same held-out questions
def questions_of(rows: tuple[Row, ...], words: tuple[str, ...], tokenizer: Tokenizer, style: Style) -> list[Question]:
    """The rows as the model sees them."""
    prompts = tokenize_prompts(rows, tokenizer, style)
    return [Question(ids, words, tuple(offered_words(row, words))) for ids, row in zip(prompts, rows, strict=True)]


def batches(questions: Sequence[Question], size: int) -> BatchSampler:
    """Indices of questions in batches of like length, longest first (so that a lack of memory shows at once)."""
    ordered = sorted(range(len(questions)), key=lambda index: -len(questions[index].ids))
    return BatchSampler(ordered, size, drop_last=False)


def pad(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], side: str = "left") -> BatchEncoding:
    """Token ids and attention mask, `(rows, longest)` each, padded on the left or the right side."""
    return tokenizer.pad({"input_ids": rows}, padding_side=side, return_attention_mask=True, return_tensors="pt")


class AnswersDecided(StoppingCriteria):
    """Ends a batch's beam search once no continuation can change any row's answer.

    An answer is the first answer word of a response, so once a beam's text holds one, all its continuations have the
    same. A row is decided when all its live beams, and all its hypotheses that ended before, have one answer in common.
    Only when every row is decided does the search end: stopping single rows early would let them win with another
    length, hence another score, than the published search gives them.

    Args:
        prompt_length: tokens before the first generated one.
        questions: the batch's rows.
        beams: live beams per row; beam search hands over more candidates than these, best first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, questions: Sequence[Question], beams: int):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.questions, self.beams = questions, beams
        self.answer = lru_cache(maxsize=None)(self._answer)
        self.ended: list[set[str | None]] = [set() for _ in questions]

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        length = input_ids.shape[1] - self.prompt_length
        candidates = input_ids[:, self.prompt_length :].view(len(self.questions), -1, length)
        decided = [self._decided(row, beams) for row, beams in enumerate(candidates.tolist())]
        return torch.full((len(input_ids),), all(decided), device=input_ids.device)

    def _decided(self, row: int, candidates: list[list[int]]) -> bool:
        end = self.tokenizer.eos_token_id
        # an end counts only among the best `beams` candidates; the live beams are the best that did not end
        self.ended[row] |= {self.answer(row, tuple(best)) for best in candidates[: self.beams] if best[-1] == end}
        live = [tuple(tokens) for tokens in candidates if tokens[-1] != end][: self.beams]
        found = self.ended[row] | {self.answer(row, tokens) for tokens in live}
        return len(found) == 1 and None not in found

    def _answer(self, row: int, tokens: tuple[int, ...]) -> str | None:
        if tokens and (inherited := self.answer(row, tokens[:-1])) is not None:
            return inherited
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return extract_answer(text, self.questions[row].words)


def read(model: PreTrainedModel, prompts: Mapping[str, torch.Tensor]) -> ModelOutput:
    """The last token's logits of prompts that end at the right edge, and their keys and values."""
    positions = (prompts["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(**prompts, position_ids=positions, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    beams: int = 4,
    max_new_tokens: int = 32,
    stop_when_decided: bool = True,
) -> list[Reply]:
    """The published generation (beam search, no sampling) for one batch.

    With `stop_when_decided` texts may be shorter, answers are those of the full search.
    """
    batch = pad(tokenizer, [question.ids for question in questions]).to(model.device)
    prompt_length = batch["input_ids"].shape[1]
    stops = [AnswersDecided(tokenizer, prompt_length, questions, beams)] if stop_when_decided else []
    marks = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "eos", "bos")}
    config = GenerationConfig(num_beams=beams, do_sample=False, max_new_tokens=max_new_tokens, **marks)
    how = {"generation_config": config, "stopping_criteria": StoppingCriteriaList(stops)}
    # keys and values of all tokens but each prompt's last, computed once a prompt for all its beams
    cache = read(model, {name: part[:, :-1] for name, part in batch.items()}).past_key_values
    cache.batch_repeat_interleave(beams)
    output = model.generate(**batch, past_key_values=cache, **how)
    texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [Reply(text.strip(), extract_answer(text, question.words)) for text, question in zip(texts, questions, strict=True)]


@torch.inference_mode()
def rank_words(model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[Reply]:
    """The offered word whose tokens are likeliest after "the correct answer is", for one batch.

    Prompt, lead and what the words begin with are computed once for all words of a question: one forward pass fills the
    key-value cache. If words go on after their first own token, a short second pass scores the rest from it. A word's score is
    the sum of its tokens' log-probabilities, without those that all words have.
    """
    offered = dict.fromkeys(word for question in questions for word in question.offered)
    words = {word: tokenizer(f" {ANSWER_LEAD} {word}", add_special_tokens=False)["input_ids"] for word in offered}
    tokens = [*words.values()]
    alike = len([*takewhile(lambda column: len(set(column)) == 1, zip(*tokens, strict=False))])
    shared = min(alike, min(map(len, tokens)) - 1)
    batch = pad(tokenizer, [[*question.ids, *tokens[0][:shared]] for question in questions]).to(model.device)
    first = read(model, batch)

    # a row for each word of each question
    owner = torch.tensor([row for row, question in enumerate(questions) for _ in question.offered], device=model.device)
    tails = pad(tokenizer, [words[word][shared:] for question in questions for word in question.offered], "right")
    ids, mask = (tails[name].to(model.device) for name in ("input_ids", "attention_mask"))
    scores = first.logits[:, -1].float().log_softmax(-1)[owner].gather(1, ids[:, :1])[:, 0]
    if ids.shape[1] > 1:
        cache = first.past_key_values
        cache.batch_select_indices(owner)
        prefix_mask = batch["attention_mask"][owner]
        rest = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([prefix_mask, mask[:, :-1]], dim=1),
            position_ids=prefix_mask.sum(1, keepdim=True) + torch.arange(ids.shape[1] - 1, device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
        tokens = rest.logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scores = scores + (tokens * mask[:, 1:]).sum(1)
    parts = scores.split([len(question.offered) for question in questions])
    best = [question.offered[part.argmax()] for question, part in zip(questions, parts, strict=True)]
    return [Reply(word, word) for word in best]


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

    def timed(way: Answer, size: int) -> tuple[list[Reply], float]:
        """Replies in the questions' order, and questions per second."""
        replies: dict[int, Reply] = {}
        started = time.perf_counter()  # replies are text, so the device is never behind
        for indices in batches(questions, size):
            replies.update(zip(indices, way([questions[index] for index in indices]), strict=True))
        rate = len(questions) / (time.perf_counter() - started)
        return [replies[index] for index in range(len(questions))], rate

    def agreement(other: list[Reply]) -> float:
        return 100 * sum(a.answer == b.answer for a, b in zip(together, other, strict=True)) / len(questions)

    answer(questions[:batch_size])  # warm-up
    (together, rate), (alone, rate_one) = timed(answer, batch_size), timed(answer, 1)
    result = {
        "questions": len(questions), "batch_size": batch_size, "questions_per_second": rate,
        "questions_per_second_batch_one": rate_one, "speedup": rate / rate_one, "answers_agree": agreement(alone),
    }  # fmt: skip
    if published is None:
        return result
    full, rate_published = timed(published, 1)
    pairs = [(one, other) for one, other in zip(together, full, strict=True) if one.answer != other.answer]
    return result | {
        "questions_per_second_published": rate_published,
        "speedup_over_published": rate / rate_published,
        "answers_agree_with_published": agreement(full),
        "differing": [{"batch": one.text, "batch_one": other.text} for one, other in pairs],
    }
