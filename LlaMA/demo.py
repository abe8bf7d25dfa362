"""A trial without any hub or data: `--data demo`, questions made on the spot, and `--model tiny`, a LLaMA to ask.

Both lie below $PARALLEL_CONTROL_CACHE (default: ~/.cache/parallel-control) once they are made. The questions have the format
of the eight commonsense tasks; what is asked is which thing belongs to a kind, of a short list of both. The model first
reads some of them as plain text, for some seconds. Fine-tuning then teaches it the form of an answer. This demonstrates the
scripts, not a method's quality.
"""

from __future__ import annotations

import os
import random
import tempfile
from contextlib import suppress
from pathlib import Path

from control_experiments.paths import cache_folder
from control_experiments.record import write_json_atomic
from LlaMA.commonsense import ANSWER_LEAD, TASKS, read_rows

DEMO, TINY = "demo", "tiny"
TRAINING_ROWS, TEST_ROWS, FILE = 1600, 40, "commonsense_demo.json"
#: Steps in which the tiny model reads.
STEPS = 300
WORDS = {
    "an animal": ["dog", "cat", "horse", "cow", "sheep", "goat", "wolf", "bear", "lion", "mouse"],
    "a fruit": ["apple", "pear", "plum", "cherry", "grape", "lemon", "melon", "peach", "fig", "mango"],
    "a tool": ["hammer", "saw", "drill", "wrench", "chisel", "pliers", "file", "axe", "shovel", "rake"],
    "a colour": ["red", "blue", "green", "yellow", "purple", "orange", "brown", "pink", "white", "black"],
    "a metal": ["iron", "gold", "silver", "copper", "tin", "zinc", "lead", "nickel", "cobalt", "chrome"],
}


def place_of(data: str, file: str = "") -> Path:
    """The folder of the test sets that `--data` names, or the training file (`FILE`); "demo" is made if need be."""
    return demo_folder() / file if data == DEMO else Path(data)


def demo_folder() -> Path:
    """The folder of the demonstration's training file and its eight test sets."""
    folder = cache_folder() / "llama-demo"
    if not (folder / FILE).is_file():
        names = list(TASKS)
        for task in names:
            rows = [make_row(task, f"test {number}") for number in range(TEST_ROWS)]
            write_json_atomic(folder / task / "test.json", rows)
        rows = [make_row(names[number % len(names)], f"train {number}") for number in range(TRAINING_ROWS)]
        write_json_atomic(folder / FILE, rows)  # last: with it the folder is whole
    return folder


def make_row(task: str, name: str) -> dict:
    """A question of the task in the LLM-Adapters format; `name` seeds what it asks."""
    draw = random.Random(f"{task} {name}")
    kind = draw.choice(list(WORDS))
    right = draw.choice(WORDS[kind])
    wrong = [word for other, words in WORDS.items() if other != kind for word in words]
    answers = TASKS[task][:4]
    if task == "boolq":
        answer = draw.choice(answers)
        asked, choices = f"Is {right if answer == 'true' else draw.choice(wrong)} {kind}?", ""
    else:
        offered = draw.sample(wrong, len(answers))
        place = draw.randrange(len(answers))
        offered[place], answer = right, answers[place]
        asked = f"Which is {kind}?"
        choices = "\n\n" + " ".join(f"{name}: {word}" for name, word in zip(answers, offered, strict=True))
    asked = f"Please choose the correct answer: {asked}{choices}\n\nAnswer format: {'/'.join(answers)}"
    return {"instruction": asked, "input": "", "output": f"{ANSWER_LEAD} {answer}", "answer": answer}


def place_of_model(model: str) -> str:
    """What `--model` names; "tiny" is made if need be."""
    folder = cache_folder() / "models" / TINY
    if model == TINY and not (folder / "config.json").is_file():
        from control_experiments.training.quiet import quieten

        quieten()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            _make_tiny(Path(place) / TINY)
            with suppress(OSError):  # another process was first
                os.rename(Path(place) / TINY, folder)
    return str(folder) if model == TINY else model


def _make_tiny(place: Path) -> None:
    """Train a new LLaMA of 0.4 M parameters on the training rows as plain text, all its parameters, 16 rows a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from LlaMA.models import train_tokenizer

    rows = read_rows(demo_folder() / FILE)
    tokenizer = train_tokenizer(rows, vocabulary=700)
    texts = [f"{row.instruction} {row.answer}" for row in rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=len(tokenizer) + 8, tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
        for _ in range(STEPS):
            chosen = [texts[index] for index in torch.randint(len(texts), (16,)).tolist()]
            batch = tokenizer(chosen, padding=True, return_token_type_ids=False, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
