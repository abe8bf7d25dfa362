"""The scaling benchmark in two processes over gloo, on a tiny shape."""

import json

import pytest

from scripts import scaling


def test_two_processes_lose_what_one_loses(call, tmp_path):
    asked = (
        "--device", "cpu", "--shape", "tiny", "--processes", 2, "--methods", "control:lean", "--batch", 2, "--tokens", 8,
        "--steps", 1, "--warmup", 1, "--output", tmp_path,
    )  # fmt: skip
    call("scripts.bench_scaling", *asked).finished()
    record = json.loads((tmp_path / "tiny_2x8.json").read_text())
    cells = {(cell["shard"], cell["processes"]): cell for cell in record["results"]}
    assert set(cells) == {("ddp", 2), ("fsdp2", 2)}
    for cell in cells.values():
        assert cell["tokens_per_second"] > 0 and len(cell["losses"]) == 3
        assert cell["loss_distance"] <= 1e-5  # from those of one process
    adapters = 2 * 2 * 2 * 64 * 64  # two layers, two blocks, A and B of rank 64 and width 64
    assert cells["ddp", 2]["sent_bytes_per_process"] == pytest.approx(4 * adapters, abs=200)
    assert cells["fsdp2", 2]["sent_bytes_per_process"] > 2 * 4 * adapters

    # a run that was killed after both measurements
    (tmp_path / "tiny_2x8.json").rename(tmp_path / "tiny_2x8.json.partial")
    assert "2 measured before" in call("scripts.bench_scaling", *asked).finished().out
    assert json.loads((tmp_path / "tiny_2x8.json").read_text())["results"] == record["results"]


def test_the_longest_sequence_outlives_the_attempt_that_does_not_fit(monkeypatch, tmp_path, capfd):
    def step_within(limit):
        def step(number, tokens):
            if tokens > limit:
                raise MemoryError(f"{tokens} tokens")

        return step

    with pytest.raises(MemoryError, match="6144 tokens"):
        scaling.longest(512, step_within(5000), tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"longest_tokens": 4096}
    assert "4096 tokens, 0 s" in capfd.readouterr().out
    monkeypatch.setattr(scaling, "LONGEST", 2048)
    scaling.longest(512, step_within(10_000), tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"longest_tokens": 2048}
