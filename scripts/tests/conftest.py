"""Results folders made of small records, for the tests of tables, claims and report."""

import json

import pytest

from control_experiments.reporting.records import COMMONSENSE

DEVICE = {"kind": "cuda", "name": "Some GPU", "count": 1, "total_memory_bytes": 80 * 2**30}
ALONE = {"kind": "cuda allocator", "other_processes_bytes": 0}


class ResultsFolder:
    """Writes records as the domains' scripts do; keyword arguments replace what a test cares about."""

    def __init__(self, path):
        self.path = path

    def roberta(self, method, seed, last, best=None, *, task="cola", model="tiny-encoder", peak=100 * 2**20, seconds=10.0,
                lr=1e-3, folder=None, device="Some GPU", domain="roberta", resumed=None, others=0, torch="2.14.1", **hyperparameters):  # fmt: skip
        score = {"step": 20, "epoch": 2.0, "score": last}
        return self._record(
            f"{domain}/{folder or f'{model}_{task}_{method}_seed{seed}'}",
            domain=domain, method=method, task=task, seed=seed, model=model, device=device, torch=torch,
            hyperparameters={"lr": lr, "epochs": 2.0, "batch_size": 64, "control_rank": 16, "lora_rank": 8, **hyperparameters},
            best={**score, "score": last if best is None else best}, last=score,
            memory={"kind": "cuda allocator", "peak_allocated_bytes": peak, "other_processes_bytes": others},
            time={"train_seconds": seconds, "examples_per_second": 1000 / seconds, "resumed_from_step": resumed},
            history=[{"step": 10, "epoch": 1.0, "score": last - 0.1, "train_loss": 0.6}, {**score, "train_loss": 0.4}],
        )  # fmt: skip

    def vit(self, method, seed, last, *, data="cifar100", mlp_layers=2, lora_rank=1):
        row = {"step": 10, "epoch": 1, "test_accuracy": last, "train_loss": 1.0}
        return self._record(
            f"vit/{data}_{method}_{seed}", domain="vit", method=method, task=data, seed=seed, model="vit_tiny", last=row,
            hyperparameters={"mlp_layers": mlp_layers, "attention": "sdpa", "control_rank": 16, "lora_rank": lora_rank},
            memory={**ALONE, "peak_allocated_bytes": 2**30}, history=[row],
            time={"train_seconds": 60.0, "examples_per_second": 500.0},
        )  # fmt: skip

    def llama(self, method, seed, average, *, folder=None, limit=None, domain="llama", **more):
        """A training with its evaluation below it."""
        place = f"llama/{folder or f'{method}-seed{seed}'.replace(' ', '-')}"
        about = {"domain": domain, "method": method, "task": "commonsense", "model": "tiny-llama"}
        loss = {"step": 10, "epoch": 1.0, "train_loss": 1.0, "eval_loss": 1.1}
        self._record(
            place, **about, seed=seed, last=loss, memory={**ALONE, "peak_allocated_bytes": 3 * 2**30},
            hyperparameters={"lr": 1e-4, "epochs": 3, "control_rank": 64, "lora_rank": 32, **more},
            time={"train_seconds": 100.0, "tokens_per_second": 900.0}, history=[loss],
        )  # fmt: skip
        return self._record(
            f"{place}/evaluation", **about, seed=42, memory={}, time={"evaluate_seconds": 5.0},
            hyperparameters={"mode": "generate", "beams": 4, "limit": limit, "batch_size": 64},
            last={**dict.fromkeys(COMMONSENSE, average), "no_match": 1.5},
        )  # fmt: skip

    def benchmark(self, name="llama3-8b_4x1024.json", repeat="", shape="llama3-8b", batch=4, tokens=1024, weights=16e9,
                  others=0, **methods):  # fmt: skip
        """A file of scripts/bench_memory.py; methods are name=(seconds a step, GB over the weights)."""
        results = [
            {"method": method.replace("_", ":"), "trained_parameters": 7, "static_bytes": weights, "over_static_bytes": over * 1e9,
             "peak_bytes": weights + over * 1e9, "step_seconds": seconds, "tokens_per_second": batch * tokens / seconds,
             "memory": {"adapter_and_optimizer_bytes": 2**30, "other_processes_bytes": others}}
            for method, (seconds, over) in methods.items()
        ]  # fmt: skip
        options = {"shape": shape, "batch": batch, "tokens": tokens, "limit": None}
        return self._file(f"memory/{repeat}/{name}", options=options, results=results)

    def searched(self, name, cells, stopped=(), **options):
        """A file of bench_memory.py's --limit; `cells` are (method, GiB, tokens, seconds); --up_to has `stopped` methods."""
        found = [
            {"method": method, "limit_gib": limit, "longest_tokens": tokens, "step_seconds": seconds,
             "tokens_per_second": tokens / seconds} | ({"ended_by": "--up_to"} if method in stopped else {})
            for method, limit, tokens, seconds in cells
        ]  # fmt: skip
        limits = sorted({limit for _, limit, *_ in cells})
        options = {"shape": "llama3-8b", "batch": 1, "tokens": 1024, "limit": limits, "up_to": 1 << 20, **options}
        return self._file(f"memory/{name}.json", options=options, results=found)

    def _file(self, name, **contents):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": 1, "device": "Some GPU", **contents}))
        return path

    def _record(self, place, *, device="Some GPU", model, torch="2.14.1", last, best=None, memory=ALONE, **fields):
        from scripts.tests.faults import a_record  # with torch, for which the other tests need not wait

        folder = self.path / place
        return a_record(
            name=folder.name, git={"commit": None, "dirty": None}, versions={"torch": torch}, device={**DEVICE, "name": device},
            model={"id": model, "sha256": "ab" * 32, "class": "Tiny" if fields["domain"] != "vit" else model},
            data={"id": "data", "sha256": "cd" * 32, "sizes": {"train": 100, "validation": 10}}, memory=memory,
            adapter={"trainable_parameters": 1234}, metrics={"best": last if best is None else best, "last": last}, **fields,
        ).write(folder / "record.json")  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = ResultsFolder(tmp_path / "results")
    folder.path.mkdir()
    return folder
