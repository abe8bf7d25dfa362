"""The demonstration task: tell intact sentences from corrupted ones, in CoLA's format.

It is made from the language reference that every Python carries (`pydoc_data.topics`), so that the first command of
the README needs no hub. It is not GLUE, and its figures say nothing about GLUE: it only shows that a method learns.

Each sentence appears as it is (label 1) and corrupted (label 0). A corruption is drawn from two kinds: word order (a
run of words is shuffled) and agreement (a verb, article or pronoun takes the wrong form). Train and dev come from
different topics, and a sentence that several topics share is kept once, so no text crosses. The text differs between
Python versions, so a run's record holds the checksum of what was made.
"""

from __future__ import annotations

import hashlib
import random
import re
from pydoc_data.topics import topics

SEED = 20250717
MAX_WORDS = 28
MIN_WORDS = 5
DEV_ROWS = 1000
TRAIN_ROWS = 8000
#: Share of corruptions that change agreement where a sentence allows it; the rest change word order.
AGREEMENT_SHARE = 0.3

_WRONG_FORM = {
    "is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has", "does": "do", "do": "does",
    "a": "an", "an": "a", "this": "these", "these": "this", "its": "it", "their": "them", "be": "been", "been": "be",
}  # fmt: skip


def make_demo() -> dict[str, list[tuple[str, int]]]:
    """`{"train": rows, "validation": rows}` of `(sentence, label)`; the same for the same Python version."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    by_topic: list[list[str]] = []
    for name in sorted(topics):  # a sentence that several topics share stays in the first
        if new := [sentence for sentence in dict.fromkeys(_sentences(topics[name])) if sentence not in seen]:
            by_topic.append(new)
            seen.update(new)
    rng.shuffle(by_topic)
    dev, train = [], []
    for sentences in by_topic:
        rows = dev if len(dev) < DEV_ROWS else train
        for sentence in sentences:
            rows += [(sentence, 1), (corrupt(sentence, rng), 0)]
    dev, train = dev[:DEV_ROWS], train[:TRAIN_ROWS]
    rng.shuffle(train)
    return {"train": train, "validation": dev}


def demo_checksum(splits: dict[str, list[tuple[str, int]]]) -> str:
    """SHA-256 of the rows, as CoLA's files would hold them."""
    lines = (f"demo\t{label}\t\t{sentence}\n" for rows in splits.values() for sentence, label in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def corrupt(sentence: str, rng: random.Random) -> str:
    """The sentence with one corruption; it always differs from what came in. Raises ValueError: fewer than two
    different words after the first, so that no order is wrong."""
    body = sentence.rstrip(".,:;!?")
    words, ending = body.split(), sentence[len(body) :]
    places = [place for place, word in enumerate(words) if word in _WRONG_FORM]
    if places and rng.random() < AGREEMENT_SHARE:
        for place in rng.sample(places, k=min(len(places), 2)):
            words[place] = _WRONG_FORM[words[place]]
    else:
        if len(set(words[1:])) < 2:
            raise ValueError(f"no word order of {sentence!r} is wrong")
        original = list(words)
        while words == original:  # the first word stays, or its capital alone would tell
            length = min(len(words) - 1, rng.randint(4, 7))
            start = rng.randint(1, len(words) - length)
            run = words[start : start + length]
            rng.shuffle(run)
            words[start : start + length] = run
    return " ".join(words) + ending


def _sentences(text: str) -> list[str]:
    """Sentences of running prose: at least four words in five are plain, so no code, tables or grammar rules."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(re.sub(r"[*\"“”]", "", paragraph).split())
        for sentence in re.split(r"(?<=[.:;!?])\s+", flat):
            words = sentence.split()
            plain = sum(bool(re.fullmatch(r"[(']?[A-Za-z]+(?:[-'][a-z]+)*[,;:.')]*", word)) for word in words)
            if MIN_WORDS <= len(words) <= MAX_WORDS and plain >= 0.8 * len(words):
                kept.append(sentence)
    return kept
