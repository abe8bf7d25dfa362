from control_experiments.record import read_record


def test_throughput_of_the_published_batching_and_ours(call, data, tmp_path):
    arguments = ("--shape", "tiny", "--cuda_graphs", "--data", data / "train.json", "--output_dir", tmp_path / "out",
                 "--large_batch", 16, "--device", "cpu", "--steps", 2, "--warmup", 1, "--control_rank", 4, "--lora_rank", 2)  # fmt: skip
    out = call("LlaMA.benchmark_throughput", *arguments).finished().out
    record = read_record(tmp_path / "out" / "record.json")
    ways = record.metrics["last"]
    assert list(ways) == ["published", "packed", "large"]
    assert ways["published"]["speedup"] == 1
    assert ways["published"]["forwards_per_step"] == 2
    assert ways["packed"]["forwards_per_step"] == 1
    assert all(f"{way:10}" in out for way in ways)
    # what tables group by
    assert record.task == "throughput" and record.model["id"] == "random tiny"
    options = ("memory", "batch_size", "cutoff", "dtype")
    assert [record.hyperparameters[name] for name in options] == ["plain", 8, 256, "float32"]
    assert "skipped" in call("LlaMA.benchmark_throughput", *arguments).finished().out
    for wrong, message in (
        (("--shape", "huge"), "argument --shape: invalid choice: 'huge'"),
        (("--token_budget", 0), "--token_budget must be"),
    ):
        assert message in call("LlaMA.benchmark_throughput", *arguments, *wrong).refused()
