"""Results folders made of small records, for the tests of tables, claims and report."""

import json

import pytest

from control_experiments.record import RunRecord

DEVICE = {"kind": "cuda", "name": "Some GPU", "count": 1, "total_memory_bytes": 80 * 2**30}
ALONE = {"kind": "cuda allocator", "other_processes_bytes": 0}


class ResultsFolder:
    """Writes records as the domains' scripts do; keyword arguments replace what a test cares about."""

    def __init__(self, path):
        self.path = path

    def roberta(self, method, seed, last, best=None, *, task="cola", model="tiny-encoder", peak=100 * 2**20, seconds=10.0,
                lr=1e-3, folder=None, device="Some GPU", domain="roberta", resumed=None, others=0, **hyperparameters):  # fmt: skip
        name = folder or f"{model}_{task}_{method}_seed{seed}"
        score = {"step": 20, "epoch": 2.0, "score": last}
        record = self._record(
            domain=domain, name=name, method=method, task=task, seed=seed, model=model, device=device,
            hyperparameters={"method": method, "task": task, "model": model, "seed": seed, "lr": lr, "epochs": 2.0,
                             "batch_size": 64, "control_rank": 16, "lora_rank": 8, **hyperparameters},
            metrics={"best": {**score, "score": last if best is None else best}, "last": score},
            memory={"kind": "cuda allocator", "peak_allocated_bytes": peak, "other_processes_bytes": others},
            time={"train_seconds": seconds, "examples_per_second": 1000 / seconds, "resumed_from_step": resumed},
            history=[{"step": 10, "epoch": 1.0, "score": last - 0.1, "train_loss": 0.6}, {**score, "train_loss": 0.4}],
        )  # fmt: skip
        path = self.path / domain / name / "record.json"
        record.write(path)
        run = {"method": method, "task": task, "model": model, "seed": seed, **record.hyperparameters}
        (path.parent / "run.json").write_text(json.dumps(run))
        return path

    def vit(self, method, seed, last, *, data="cifar100", mlp_layers=2, **more):
        row = {"step": 10, "epoch": 1, "test_accuracy": last, "train_loss": 1.0}
        record = self._record(
            domain="vit", name=f"{data}_{method}_{seed}", method=method, task=data, seed=seed, model="vit_tiny",
            hyperparameters={"mlp_layers": mlp_layers, "attention": "sdpa", "control_rank": 16, "lora_rank": 1},
            metrics={"best": row, "last": row}, memory={**ALONE, "peak_allocated_bytes": 2**30},
            time={"train_seconds": 60.0, "examples_per_second": 500.0}, history=[row], **more,
        )  # fmt: skip
        return record.write(self.path / "vit" / record.name / "record.json")

    def llama(self, method, seed, average, *, folder=None, limit=None, ranks=(64, 32)):
        """A training with its evaluation below it; `seed` None: zero-shot, which has no training."""
        columns = (
            "boolq",
            "piqa",
            "social_i_qa",
            "hellaswag",
            "winogrande",
            "ARC-Easy",
            "ARC-Challenge",
            "openbookqa",
        )
        metrics = {**dict.fromkeys(columns, average), "average": average, "no_match": 1.5}
        answered = {"mode": "generate", "beams": 4, "limit": limit, "tasks": list(columns), "batch_size": 64}
        place = self.path / "llama" / (folder or f"{method.replace(' ', '-')}-seed{seed}")
        evaluation = self._record(
            domain="llama", name="evaluation", method=method, task="commonsense", seed=42, model="tiny-llama",
            hyperparameters=answered, metrics={"best": metrics, "last": metrics}, memory={}, time={"evaluate_seconds": 5.0},
        )  # fmt: skip
        if seed is None:
            return evaluation.write(place / "record.json")
        loss = {"step": 10, "epoch": 1.0, "train_loss": 1.0, "eval_loss": 1.1}
        self._record(
            domain="llama", name=place.name, method=method, task="commonsense", seed=seed, model="tiny-llama",
            hyperparameters={"lr": 1e-4, "epochs": 3, "control_rank": ranks[0], "lora_rank": ranks[1]},
            metrics={"best": loss, "last": loss}, memory={**ALONE, "peak_allocated_bytes": 3 * 2**30},
            time={"train_seconds": 100.0, "examples_per_second": 9.0}, history=[loss],
        ).write(place / "record.json")  # fmt: skip
        return evaluation.write(place / "evaluation" / "record.json")

    def benchmark(self, name="llama3-8b_4x1024.json", repeat="", **methods):
        """A file of scripts/bench_memory.py; methods are name=(seconds a step, GB over the weights) or None: failed."""
        results = []
        for method, point in methods.items():
            result = {"method": method.replace("_", ":"), "error": "out of memory"}
            if point:
                seconds, over = point
                result = {"method": result["method"], "trained_parameters": 7, "static_bytes": 16e9, "peak_bytes": 0,
                          "over_static_bytes": over * 1e9, "step_seconds": seconds, "tokens_per_second": 4096 / seconds}  # fmt: skip
            results.append(result)
        contents = {"schema": 1, "device": "Some GPU", "options": {"shape": "llama3-8b", "batch": 4, "tokens": 1024, "limit": None},
                    "results": results}  # fmt: skip
        path = self.path / "memory" / repeat / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents))
        return path

    def _record(self, *, device="Some GPU", model, history=(), **fields):
        return RunRecord(
            command=["python", "x.py"], created="2026-01-01T00:00:00+00:00", finished="2026-01-01T01:00:00+00:00",
            git={"commit": None, "dirty": None}, versions={"torch": "2.14.1"}, device={**DEVICE, "name": device},
            model={"id": model, "sha256": "ab" * 32, "class": "Tiny" if fields["domain"] != "vit" else model},
            data={"id": "data", "sha256": "cd" * 32, "sizes": {"train": 100, "validation": 10}},
            adapter={"trainable_parameters": 1234}, history=list(history), **fields,
        )  # fmt: skip


@pytest.fixture(scope="session")
def new_results(tmp_path_factory):
    """Makes empty results folders."""

    def make() -> ResultsFolder:
        return ResultsFolder(tmp_path_factory.mktemp("run") / "results")

    return make


@pytest.fixture
def results(new_results):
    folder = new_results()
    folder.path.mkdir()
    return folder
