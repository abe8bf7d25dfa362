"""The kernel benchmark on the CPU, where ours is the torch path."""

import json


def test_compares_every_operation(call, tmp_path):
    asked = ("scripts.bench_kernels", "--device", "cpu", "--output", tmp_path / "k.json")
    done = call(*asked, "--tokens", 8, "--vocabulary", 99, "--repeats", 2).finished()
    results = json.loads((tmp_path / "k.json").read_text())["results"]
    assert len(results) == 5 and done.out.count("torch") == 5 and not done.err
    assert all(row["ours"]["seconds"] > 0 and row["torch"]["seconds"] > 0 for row in results)
