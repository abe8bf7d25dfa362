import pytest

from control_experiments.record import read_record
from control_experiments.training.arguments import parse_arguments
from LlaMA import benchmark_methods
from scripts import bench_memory


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


def test_methods_on_shapes_are_a_call_of_the_memory_benchmark(call, monkeypatch):
    calls = []
    monkeypatch.setattr(bench_memory, "main", calls.append)
    call("LlaMA.benchmark_methods", "--device", "cpu").finished()
    call("LlaMA.benchmark_methods", "--shape", "tiny", "--device", "cpu", "--methods", "lora").finished()
    options = [parse_arguments(bench_memory.Options, argv=words)[0] for words in calls]
    assert [(o.shape, o.batch, o.tokens) for o in options] == [
        ("llama2-7b", 4, 256), ("llama3-8b", 3, 256), ("tiny", 4, 256),
    ]  # fmt: skip
    assert options[0].methods == list(benchmark_methods.METHODS) and options[2].methods == ["lora"]
    assert all(o.with_defaults().device == "cpu" for o in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --model or --shape"),
        (("--shape", "huge"), "unknown --shape 'huge'"),
        (("--shape", "tiny", "--control_rank", 0), "--control_rank must be"),
        (("--shape", "tiny", "--token_budget", 0), "--token_budget must be"),
    ],
)
def test_bad_input(call, arguments, message):
    assert message in call("LlaMA.benchmark_throughput", "--data", "x", "--output_dir", "o", *arguments).refused()
