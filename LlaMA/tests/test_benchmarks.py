import pytest

from control_experiments.record import read_record
from LlaMA import benchmark_methods, benchmark_throughput

TINY = ("--device", "cpu", "--steps", 2, "--warmup", 1, "--control_rank", 4, "--lora_rank", 2)


def test_throughput_of_the_published_batching_and_ours(call, data, tmp_path):
    arguments = ("--data", data / "train.json", "--output_dir", tmp_path / "out", "--large_batch", 16, *TINY)
    arguments = ("--shape", "tiny", "--cuda_graphs", *arguments)
    code, out, err = call(benchmark_throughput.main, *arguments)
    assert code == 0, err
    ways = read_record(tmp_path / "out" / "record.json").metrics["last"]
    assert list(ways) == ["published", "packed", "large"]
    assert ways["published"]["speedup"] == 1
    assert ways["published"]["forwards_per_step"] == 2
    assert ways["packed"]["forwards_per_step"] == 1
    assert all(f"{way:10}" in out for way in ways)
    code, out, _ = call(benchmark_throughput.main, *arguments)
    assert (code, "skipped" in out) == (0, True)


def test_methods_on_a_shape_one_record_each(call, tmp_path):
    code, out, err = call(
        benchmark_methods.main, "--shapes", "tiny", "--output_dir", tmp_path, "--cutoff", 16, *TINY,
        "--methods", "lora", "double control", "--memories", "plain", "fast",
    )  # fmt: skip
    assert code == 2, "LoRA inside the MLP has no fast mode"
    assert "not measured: tiny-lora-fast" in err
    names = ("tiny-lora-plain", "tiny-double-control-plain", "tiny-double-control-fast")
    for name in names:
        record = read_record(tmp_path / name / "record.json")
        assert record.metrics["last"]["seconds_per_step"] > 0
        assert record.time["real_tokens"] == 2 * 4 * 16
        assert name in out
    assert not (tmp_path / "tiny-lora-fast").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (benchmark_throughput.main, ("--data", "x", "--output_dir", "o"), "either --model or --shape"),
        (
            benchmark_throughput.main,
            ("--data", "x", "--output_dir", "o", "--shape", "huge"),
            "unknown shape 'huge'",
        ),
        (benchmark_methods.main, ("--output_dir", "o", "--shapes", "huge"), "unknown shape 'huge'"),
        (benchmark_methods.main, ("--output_dir", "o", "--memories", "less"), "unknown memory mode 'less'"),
        (benchmark_methods.main, ("--output_dir", "o", "--control_rank", "0"), "control_rank must be"),
    ],
)
def test_bad_input(call, main, arguments, message):
    code, _, err = call(main, *arguments)
    assert code == 2
    assert message in err
