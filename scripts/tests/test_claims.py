"""Claims are judged by the rules that they state: checked against scipy's own tests, by hand, and by simulation."""

import itertools
import re

import numpy as np
import pytest
from scipy import stats

from control_experiments.outcomes import METRICS, write_outcomes
from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.reporting import statistics
from control_experiments.reporting.claims import SPECIFICATIONS, Claim, judge, markdown, overview
from control_experiments.reporting.page import draw
from control_experiments.reporting.pictures import svg
from control_experiments.reporting.records import load, read_paper
from control_experiments.reporting.statistics import Pool, Test, example_variance, more_seeds

Test.__test__ = False  # a class of ours, no tests
PAPER = read_paper(RESULTS / "paper.json")


def claims(results) -> dict[str, Claim]:
    return {claim.name: claim for claim in judge(load(results.path)[0], PAPER)}


def claim(results, name) -> Claim:
    return claims(results)[name]


def fill(results, control, lora, **kind):
    """Runs of both methods with these scores; `kind` has control's and LoRA's value of what else they are made with."""
    for seed, (one, other) in enumerate(zip(control, lora, strict=True)):
        results.roberta("control", seed, one, **{name: values[0] for name, values in kind.items()})
        results.roberta("lora", seed, other, **{name: values[1] for name, values in kind.items()})


def quality(*pairs, **more) -> Test:
    return Test("test", dict(enumerate(pairs)), "quality", "points", 1, **more)


# -- statistics -------------------------------------------------------------------------------------------------


def test_with_seeds_alone_the_interval_is_scipys_paired_one():
    control, lora = [61.0, 63.5, 60.2, 64.0], [60.1, 62.0, 60.9, 61.5]
    expected = stats.ttest_rel(control, lora).confidence_interval(0.95)
    assert quality(*zip(control, lora)).interval == pytest.approx((expected.low, expected.high))
    assert quality((1.0, 0.0)).interval is None


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.0, -0.1], "supported"),  # no loss to speak of, though the interval includes zero
        ([-0.9, -0.91, -0.9], "supported"),  # within the margin, though surely below zero
        ([-1.2, -1.21, -1.2], "contradicted"),
        ([-2.0, 3.0, 1.0], "not decided"),
        ([0.5], "not decided"),
    ],
)
def test_quality_is_a_question_of_non_inferiority(differences, verdict):
    assert quality(*((50 + difference, 50) for difference in differences)).verdict == verdict


def test_more_seeds_are_those_after_which_the_interval_decides():
    test = quality((50.5, 50.0), (51.5, 50.0), (48.0, 50.0))
    spread, mean = test.differences.std(ddof=1), test.differences.mean()
    needed = next(n for n in range(4, 200) if mean - stats.t.ppf(0.975, n - 1) * spread / n**0.5 > -1)
    assert more_seeds([test]) == str(needed - 3)
    assert more_seeds([quality((50.0, 50.0), (50.1, 50.0))]) == ""  # decided
    assert more_seeds([quality((50.0, 50.0))]) == "two seeds first"
    test.examples = 4.0  # no number of seeds makes up for so few examples
    assert "more test examples" in more_seeds([test])


def test_a_pool_is_the_mean_over_tasks_without_those_below_the_majority_class():
    tests = [quality((61.0, 60.0), (62.5, 60.0), (60.5, 60.0)), quality((70.0, 71.0), (71.0, 71.5), (69.0, 70.0))]
    parts = [test.differences.var(ddof=1) / 3 / 4 for test in tests]
    half = stats.t.ppf(0.975, sum(parts) ** 2 / sum(part**2 / 2 for part in parts)) * sum(parts) ** 0.5
    mean = np.mean([test.differences.mean() for test in tests])
    assert Pool("all", tests).interval == pytest.approx((mean - half, mean + half))
    flagged = quality((50.0, 20.0), (51.0, 20.0), floor=56.34)
    assert flagged.below_majority and not quality((50.0, 57.0), (51.0, 57.0), floor=56.34).below_majority
    assert Pool("all", [*tests, flagged]).interval == Pool("all", tests).interval


def outcomes(folder, arrays, **more):
    folder.mkdir(parents=True)
    write_outcomes(folder, range(len(next(iter(arrays.values())))), **arrays, **more)
    return folder


def test_examples_are_paired_too(tmp_path):
    generator = np.random.default_rng(0)
    correct = [generator.random((2, 500)) < 0.7 for _ in range(3)]
    differences = 100 * np.mean([rows[0].astype(float) - rows[1] for rows in correct], axis=0)
    several = np.array(["a"] * 100 + ["b"] * 400)  # weigh the same, however many examples each has
    expected = {"": differences.var() / 500, "ab": (differences[:100].var() / 100 + differences[100:].var() / 400) / 4}
    for name, variance in expected.items():
        pairs = [
            [outcomes(tmp_path / f"{name}{seed}{n}", {"correct": row}, group=name and several) for n, row in enumerate(rows)]
            for seed, rows in enumerate(correct)
        ]
        assert example_variance(pairs) == pytest.approx(variance, rel=0.15)


def test_a_metric_that_is_no_mean_is_bootstrapped_from_predictions(tmp_path):
    from sklearn.metrics import f1_score, matthews_corrcoef

    generator = np.random.default_rng(1)
    label = generator.integers(0, 2, 400)
    noisy = [np.where(generator.random(400) < 0.8, label, 1 - label) for _ in range(4)]
    one, other, *more = [
        outcomes(tmp_path / str(n), {"prediction": p, "label": label}, metric="matthews") for n, p in enumerate(noisy)
    ]
    found = example_variance([(one, other), more]) ** 0.5
    # standard error of the mean of two differences of correlations near 0.6
    assert found == pytest.approx(100 * (1 - 0.6**2) / 400**0.5, rel=0.4)
    assert METRICS["matthews"](noisy[0], label) == pytest.approx(matthews_corrcoef(label, noisy[0]))
    both = (np.mean(noisy[0] == label) + f1_score(label, noisy[0])) / 2
    assert METRICS["accuracy and F1"](noisy[0], label) == pytest.approx(both)
    x, y = generator.normal(size=(2, 50))
    expected = (stats.pearsonr(x, y)[0] + stats.spearmanr(x, y)[0]) / 2
    assert METRICS["Pearson and Spearman"](x, y) == pytest.approx(expected)


def test_outcomes_of_other_examples_or_of_some_runs_only_are_not_paired(tmp_path):
    one = outcomes(tmp_path / "one", {"correct": [1, 0, 1]})
    other = tmp_path / "other"
    other.mkdir()
    assert example_variance([(one, other)]) is None
    write_outcomes(other, [5, 6, 7], [1, 0, 1])
    assert example_variance([(one, other)]) is None
    (other / "outcomes.npz").write_bytes(b"broken")
    with pytest.raises(statistics.UserError, match="cannot be read"):
        example_variance([(one, other)])


def test_questions_that_are_asked_again_are_no_more_of_them():
    once = stats.binomtest(998, 1000).proportion_ci(0.95)
    for times in (1, 3):
        found = statistics.share_interval([1000] * times, [99.8] * times, 99.5)
        assert found == pytest.approx((100 * once.low - 99.5, 100 * once.high - 99.5))


def test_intervals_hold_what_they_promise():
    """Simulated: seeds and examples both vary, the true difference is 0; about 95 % of the intervals include it."""
    generator, held = np.random.default_rng(2), 0
    for _ in range(400):
        by_example = generator.normal(0, 20, 300)  # what examples do to both methods' difference, whatever the seed
        differences = generator.normal(0, 1, 3)[:, None] + by_example + generator.normal(0, 20, (3, 300))
        variance = differences.mean(axis=0).var() / 300
        low, high = quality(*((value, 0.0) for value in differences.mean(axis=1)), examples=variance).interval
        held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 1.0


# -- claims -----------------------------------------------------------------------------------------------------


def test_quality_from_records_is_paired_by_common_seeds_and_by_outcomes(results):
    fill(results, [0.70, 0.72, 0.71], [0.60, 0.61, 0.62])
    results.roberta("control", 9, 0.9)
    fill(results, [0.80], [0.90], task=("rte", "rte"))  # one seed, where another task has more
    (test,) = claim(results, "roberta-quality").tests
    assert test.pairs == {0: (70, 60), 1: (72, 61), 2: (71, 62)} and test.verdict == "supported"
    generator = np.random.default_rng(0)
    for seed, method in itertools.product(range(3), ("control", "lora")):
        folder = results.path / "roberta" / f"tiny-encoder_cola_{method}_seed{seed}"
        write_outcomes(folder, range(100), generator.random(100) < 0.6)
    (by_example,) = claim(results, "roberta-quality").tests
    assert "by example too" in by_example.statistic and by_example.interval[0] < test.interval[0]


def test_a_test_below_the_majority_class_is_flagged_and_does_not_count(results):
    fill(results, [0.5, 0.51, 0.52], [0.3, 0.3, 0.3], task=("wnli", "wnli"))
    judged = claim(results, "roberta-quality")
    assert (judged.verdict, judged.tally) == ("not decided", "1 below the majority class")
    assert "below the majority class, does not count" in markdown([*claims(results).values()], PAPER)


COSTS = {"peak": (80 * 2**20, 100 * 2**20), "seconds": (8.0, 10.0)}
SHARED = {"seconds": (12.0, 10.0), "others": (5 * 2**30, 5 * 2**30)}  # with who else used the GPU
FAST = {"lora": (0.4, 40.0), "lora+graphs": (0.1, 45.0), "control:lean": (0.3, 1.0), "control:fast": (0.2, 10.0)}
PLAIN = {"lora": (0.4, 40.0), "control:plain": (0.3, 20.0)}


def runs(count, costs=COSTS):
    return lambda results: fill(results, [0.6] * count, [0.6] * count, **costs)


def steps(count, **more):
    """So many repeats of a benchmark."""

    def make(results):
        for number in range(count):
            results.benchmark(repeat=f"repeat{number}", **more)

    return make


def fits(peak, method="control+nf4:lean", tokens=2048):
    point = {method: (0.4, peak * 2**30 / 1e9)}
    return steps(1, name=f"{peak}.json", batch=1, tokens=tokens, weights=0, **point)


def streamed(tokens, peak):
    return fits(peak, "control+streamed:lean", tokens)


def searched(tokens, name="a", **more):
    cells = [("control+nf4:lean", 7.5, tokens, 1.0), ("control+nf4:lean", 23.5, 150_000, 1.0), ("lora+nf4", 7.5, 512, 1.0)]
    return lambda results: results.searched(name, cells, **more)


def with_states_in_fp8(results):
    results.searched("fp8", [("control+nf4:lean", 78.5, 400_000, 9.0), ("control+fp8states+nf4:lean", 78.5, 700_000, 9.0)])


def padded(longest, published):
    def make(results):
        for run in range(3):
            times = {"longest": {"seconds_per_epoch": longest + run}, "max_length": {"seconds_per_epoch": published + run}}
            name = f"roberta/benchmark_padding_tiny_cpu_{run}.json"
            results._file(name, settings={"model": "tiny"}, **times, device={"kind": "cpu", "name": "Some CPU"})

    return make


@pytest.mark.parametrize(
    ("name", "makes", "expected"),
    [
        # memory is decided by one measurement, the worst, and time by three
        ("roberta-memory", [runs(1)], ["supported: -20.00 %"]),
        ("roberta-memory", [runs(2, {"peak": (101, 100)}), runs(1)], ["contradicted"]),
        ("roberta-time", [runs(1)], ["not decided: -20.00 %, n = 1 of 3 repeats: no interval"]),
        ("roberta-time", [runs(3)], ["supported"]),
        # time is not judged from GPUs that others used
        ("roberta-time", [runs(2, SHARED)], []),
        ("roberta-quality", [runs(2, SHARED)], ["supported"]),
        ("llama-shape-time", [steps(3, others=5 * 2**30, **PLAIN)], []),
        ("llama-shape-memory", [steps(3, others=5 * 2**30, **PLAIN)], ["supported: -50.00 % at worst, n = 3"]),
        ("padding", [padded(30, 500)], ["supported: -93"]),
        ("padding", [padded(500, 30)], ["contradicted: +1"]),
        # like is compared with like
        ("lean-memory", [steps(1, **FAST)], ["supported"]),
        ("fast-time", [steps(3, **FAST)], ["supported"]),
        ("fast-time", [steps(3, **FAST, **{"control+graphs:fast": (0.12, 11.0)})], ["supported", "contradicted"]),
        ("lean-memory", [steps(1, **{"lora": (0.4, 0.0), "control:lean": (0.3, 0.0)})], []),  # on a CPU
        # so the best rival is the best of those over the same base in control's file
        ("fast-time", [steps(3, **FAST), steps(3, name="fp8.json", **{"lora+compile+fp8": (0.1, 9.0)})], ["supported: -50"]),
        ("lean-memory", [steps(1, **FAST, **{"lora+checkpointing+nf4": (0.4, 0.5)})], ["supported: -97.5"]),
        ("fp8-time", [steps(3, **{"lora+compile+fp8": (0.2, 9.0), "control+graphs+fp8:fast": (0.1, 9.0)})], ["supported: -50"]),
        # each shape by its own domain's claim; RoBERTa's and ViT's single control says nothing on LLaMA's double one
        ("llama-shape-time", [steps(3, shape="vit-b16", **PLAIN)], []),
        ("vit-shape-time", [steps(3, shape="vit-b16", **PLAIN)], ["supported"]),
        ("roberta-shape-memory", [steps(3, shape="roberta-base", **PLAIN)], ["supported"]),
        ("llama-shape-time", [steps(3, dora=(0.2, 50.0), **PLAIN)], ["supported", "contradicted"]),
        # whether a model fits, by its worst peak
        ("nf4-8gib", [fits(7.5)], ["supported: -0.50 GiB"]),
        ("nf4-8gib", [fits(7.5), fits(8.5)], ["contradicted: +0.50 GiB"]),
        # at the length that is claimed: that a longer one needs more says nothing
        ("streaming-8b", [streamed(8192, 7.5), streamed(16384, 8.5)], ["supported: -0.50 GiB"]),
        # each card's longest sequence, beside what is published for it
        ("context-published", [searched(6144), searched(99_999, "b", batch=4)],
         ["supported: +0.07 times", "contradicted: -0.09 times"]),
        ("context-published", [with_states_in_fp8], ["supported: +0.04 times"]),
    ],
)  # fmt: skip
def test_verdicts(results, name, makes, expected):
    for make in makes:
        make(results)
    tests = [f"{test.verdict}: {test.statistic}" for test in claim(results, name).tests]
    assert len(tests) == len(expected) and all(map(str.startswith, tests, expected)), tests


def test_commands_measure_times_often_enough_to_decide():
    timed = [one for one in SPECIFICATIONS["claims"] if {test["rule"] for test in one["tests"]} == {"time"}]
    assert len(timed) > 5 and all(re.search(r"\b1 2 3\b|--speed_at|--repeats", one["command"]) for one in timed)


def test_without_records_a_claim_is_not_tested_and_says_what_to_run_and_what_is_published(results):
    found = claims(results)
    assert {claim.verdict for claim in found.values()} == {"not tested"}
    text = markdown([*found.values()], PAPER)
    for script in re.findall(r"`(?:bash|python) (scripts/[^`\s]+)", text):
        assert (REPOSITORY / script).is_file()
    assert text.count("At full scale") == len(found) == 35
    paired = "+2.05 points; paired over the printed seeds +2.05 points [-0.44, +4.53], n = 3, which by our rule is: supported"
    assert paired in found["roberta-quality"].published[0]
    assert found["vit-quality"].published[0].endswith("-0.62 points.")
    headings = re.findall(r"^## (\S+)$", text, re.M)
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == set(headings)


def test_ways_of_answering_are_no_repeats_of_each_other(results):
    for mode, speedup in (("generate", 40.0), ("likelihood", 5.0)):
        for run in range(3):
            results._record(
                f"llama/batches-{mode}-{run}", domain="llama", method="lora", task="commonsense", seed=1, model="tiny",
                hyperparameters={"mode": mode, "quantization": "none", "dtype": "float32"}, time={},
                last={"batch_size": 64, "questions_per_second_batch_one": 2.0, "speedup": speedup + run / 10},
            )  # fmt: skip
    assert {test.verdict for test in claim(results, "batches-speed").tests} == {"supported", "contradicted"}


def test_the_average_decides_for_llama_and_graphs_are_compared_with_graphs(results):
    for seed in (1, 2):
        results.llama("double control", seed, 50.0 + seed, cuda_graphs=True)
        results.llama("lora", seed, 40.0 + seed)
    assert claim(results, "llama-quality").verdict == "not tested"
    for seed in (1, 2):
        results.llama("lora", seed, 45.0 + seed, cuda_graphs=True, folder=f"graphs{seed}")
    judged = claim(results, "llama-quality")
    (test,) = judged.tests
    assert test.what == "tiny-llama, commonsense: double control r64, graphs against lora r32, graphs"
    assert (test.verdict, judged.scope) == ("supported", "tiny-llama; not the paper's scale")


def test_what_llama_learns_over_a_quantized_base_is_for_qcontrol_to_claim(results):
    for seed, method in itertools.product((1, 2), ("double control", "lora")):
        results.llama(method, seed, 50.0, quantization="fp8", folder=f"{method} {seed}")
    (test,) = claim(results, "qcontrol-quality").tests
    assert test.what == "tiny-llama, fp8, commonsense: double control r64 against lora r32"
    assert claim(results, "llama-quality").verdict == "not tested"


def test_the_overview_has_a_row_for_each_domain_unless_runs_must_not_be_mixed(results):
    fill(results, [0.70, 0.705, 0.71], [0.72, 0.71, 0.705], peak=(80 * 2**20, 100 * 2**20), seconds=(8.0, 10.0))
    table = overview(judge(load(results.path)[0], PAPER))
    assert len(table) == 4
    first = table.iloc[0]
    assert first.quality.startswith("**not decided**: -0.67 points [") and int(first["more seeds to decide"]) > 0
    assert first.memory == "**[supported](#roberta-memory)**: -20 %" and "supported" in first.time
    frame, _ = load(results.path)
    pictures = {kind: svg(figure) for kind, *_, figure in draw(frame, PAPER, judge(frame, PAPER))}
    assert "control, 1 task x 3 seeds" in pictures["quality"] and "points [-" in pictures["quality"]
    assert set(table.quality[1:]) == {"**not tested**"}
    results.roberta("lora", 5, 0.1, device="Other GPU")
    assert claim(results, "roberta-quality").verdict == "not tested"


def test_the_overview_gives_the_times_that_were_repeated_if_there_are_such(results):
    steps(1, tokens=256, lora=(0.4, 20.0), **{"control:plain": (0.1, 10.0)})(results)
    assert "-75 %, 1 of 3 repeats" in overview(judge(load(results.path)[0], PAPER)).time[2]
    steps(3, **PLAIN)(results)
    assert overview(judge(load(results.path)[0], PAPER)).time[2].startswith("**[supported](#llama-shape-time)**: -25 %")
