"""Claims are judged by paired t intervals: checked against scipy's own test and by hand."""

import json
import re

import pytest
from scipy import stats

from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.reporting.claims import Claim, Test, judge, markdown, t_interval
from control_experiments.reporting.collection import collect
from control_experiments.reporting.published import read_paper

Test.__test__ = False  # a class of ours, no tests
PAPER = read_paper(RESULTS / "paper.json")


def claim(results, name) -> Claim:
    (found,) = [claim for claim in judge(collect(results.path), PAPER) if claim.name == name]
    return found


def fill(results, control, lora, **kind):
    for seed, (one, other) in enumerate(zip(control, lora, strict=True)):
        results.roberta("control", seed, one, **{name: values[0] for name, values in kind.items()})
        results.roberta("lora", seed, other, **{name: values[1] for name, values in kind.items()})


def test_the_interval_is_scipys_paired_one():
    control, lora = [61.0, 63.5, 60.2, 64.0], [60.1, 62.0, 60.9, 61.5]
    differences = [one - other for one, other in zip(control, lora, strict=True)]
    expected = stats.ttest_rel(control, lora).confidence_interval(0.95)
    assert t_interval(differences) == pytest.approx((expected.low, expected.high))
    assert t_interval([1.0]) is None


@pytest.mark.parametrize(
    ("control", "lora", "verdict"),
    [
        ([0.70, 0.72, 0.71], [0.60, 0.61, 0.62], "supported"),
        ([0.60, 0.61, 0.62], [0.70, 0.72, 0.71], "contradicted"),
        ([0.70, 0.60, 0.65], [0.61, 0.69, 0.64], "not decided"),
        ([0.70], [0.10], "not decided"),
        ([0.70, 0.71], [0.70, 0.71], "not decided"),
    ],
)
def test_quality(results, control, lora, verdict):
    fill(results, control, lora)
    judged = claim(results, "roberta-quality")
    assert judged.verdict == verdict
    (test,) = judged.tests
    assert test.pairs == {seed: (100 * a, 100 * b) for seed, (a, b) in enumerate(zip(control, lora))}
    assert f"**{verdict}**" in markdown([judged], PAPER)


def test_memory_and_time_want_less(results):
    fill(results, [0.6, 0.6], [0.6, 0.6], peak=(80 * 2**20, 100 * 2**20), seconds=(12.0, 10.0))
    assert claim(results, "roberta-memory").verdict == "supported"
    assert claim(results, "roberta-memory").tests[0].statistic == "-20.00 % [-20.00, -20.00], n = 2"
    time = claim(results, "roberta-time")
    assert time.verdict == "contradicted" and "+20.00 %" in time.tests[0].statistic


@pytest.mark.parametrize("others", [5 * 2**30, None])
def test_time_is_not_judged_from_gpus_that_others_used(others, results):
    """None: records older than the meter; they were written at one time, so their runs overlapped."""
    for seed in (0, 1):
        results.roberta("control", seed, 0.6, seconds=12.0, others=others)
        results.roberta("lora", seed, 0.6, seconds=10.0, others=others)
    assert claim(results, "roberta-time").verdict == "not tested"
    assert claim(results, "roberta-quality").tests


def test_one_contradicting_test_contradicts_and_a_single_pair_has_no_vote(results):
    fill(results, [0.7, 0.71], [0.6, 0.62])
    results.roberta("control", 7, 0.5, task="rte")
    results.roberta("lora", 7, 0.6, task="rte")
    judged = claim(results, "roberta-quality")
    assert (judged.verdict, judged.tally) == ("supported", "1 supported, 1 not decided")
    results.roberta("control", 8, 0.5, task="rte")
    results.roberta("lora", 8, 0.601, task="rte")
    assert claim(results, "roberta-quality").verdict == "contradicted"


def test_only_common_seeds_are_paired(results):
    fill(results, [0.7, 0.71], [0.6, 0.62])
    results.roberta("control", 9, 0.9)
    assert set(claim(results, "roberta-quality").tests[0].pairs) == {0, 1}


def test_without_records_a_claim_is_not_tested_and_says_what_to_run(results):
    claims = judge(collect(results.path), PAPER)
    assert {claim.verdict for claim in claims} == {"not tested"}
    text = markdown(claims, PAPER)
    for script in re.findall(r"`(?:bash|python) ([^`\s]+)", text):
        assert (REPOSITORY / script).is_file()
    assert text.count("At full scale") == len(claims)


def test_runs_that_must_not_be_mixed_decide_nothing(results):
    fill(results, [0.7, 0.71], [0.6, 0.62])
    results.roberta("lora", 5, 0.1, device="Other GPU")
    assert claim(results, "roberta-quality").verdict == "not tested"


def test_the_average_decides_for_llama_not_each_of_its_eight_test_sets(results):
    for seed in (1, 2):
        results.llama("double control", seed, 50.0 + seed)
        results.llama("lora", seed, 40.0 + seed)
    (test,) = claim(results, "llama-quality").tests
    assert test.what == "tiny-llama, commonsense: double control r64 against lora r32"
    assert test.verdict == "supported"
    assert claim(results, "llama-quality").scope == "tiny-llama; not the paper's scale"


def test_benchmarks_are_paired_over_repeats(results):
    results.benchmark(lora=(0.4, 40.0), control_lean=(0.3, 1.0), control_fast=(0.2, 10.0))
    assert claim(results, "lean-memory").verdict == "not decided"
    results.benchmark(repeat="repeat2", lora=(0.41, 40.0), control_lean=(0.3, 1.0), control_fast=(0.2, 10.0))
    assert claim(results, "lean-memory").verdict == claim(results, "fast-time").verdict == "supported"
    results.benchmark("cpu.json", lora=(0.4, 0.0), control_lean=(0.3, 0.0))  # on a CPU memory is zero
    assert len(claim(results, "lean-memory").tests) == 1


def two(results, **methods):
    for repeat in ("", "repeat2"):
        results.benchmark(repeat=repeat, **methods)


def test_each_shape_is_judged_by_its_own_domains_claim(results):
    """RoBERTa's and ViT's control is a single one, on the mlp: it says nothing on double control at LLaMA's shapes."""
    points = {"lora": (0.4, 40.0), "control_plain": (0.3, 20.0)}
    two(results, name="vit.json", shape="vit-b16", batch=128, tokens=197, **points)
    two(results, name="roberta.json", shape="roberta-base", batch=64, tokens=128, **points)
    two(results, name="tiny.json", shape="tiny", **points)
    for quantity in ("memory", "time"):
        assert claim(results, f"llama-shape-{quantity}").verdict == "not tested"
        for domain, shape in (
            ("vit", "vit-b16, 128 x 197 tokens"),
            ("roberta", "roberta-base, 64 x 128 tokens"),
        ):
            judged = claim(results, f"{domain}-shape-{quantity}")
            (test,) = judged.tests
            assert (
                judged.verdict == "supported"
                and test.what == f"{shape}, Some GPU: control:plain against lora"
            )
            assert judged.scope.endswith("no record of DoRA yet")
    two(results, lora=(0.4, 40.0), dora=(0.2, 50.0), control_plain=(0.3, 30.0))
    judged = claim(results, "llama-shape-time")
    assert [test.verdict for test in judged.tests] == [
        "supported",
        "contradicted",
    ] and judged.verdict == "contradicted"
    assert "DoRA" not in judged.scope


def test_double_control_of_the_recipes_steps_is_judged_at_llamas_shapes(results):
    for repeat in ("one", "two"):
        results.step(f"llama/{repeat}/control", "double control", peak=10 * 2**30, seconds=0.1)
        results.step(f"llama/{repeat}/lora", "lora", others=5 * 2**30)
    memory = claim(results, "llama-shape-memory")
    assert memory.verdict == "supported" and memory.tests[0].statistic == "-25.00 % [-25.00, -25.00], n = 2"
    assert claim(results, "llama-shape-time").verdict == "not tested"  # LoRA's GPU was not its own


@pytest.mark.parametrize(("gibibytes", "verdict"), [((7.5,), "supported"), ((7.5, 8.5), "contradicted")])
def test_whether_a_quantized_model_fits_is_decided_by_its_worst_peak(results, gibibytes, verdict):
    for number, peak in enumerate(gibibytes):
        results.step(
            f"qcontrol/memory{number}/x", "double control", stored="nf4", mode="lean", peak=int(peak * 2**30)
        )
    results.step("qcontrol/memory0/y", "double control", stored="nf4", mode="lean", peak=2**34, tokens=256)
    judged = claim(results, "nf4-8gib")
    assert judged.verdict == verdict
    assert f"{gibibytes[-1] - 8:+.2f} GiB at worst" in judged.tests[0].statistic


def test_packing_and_answers_in_batches_need_repeats_for_speed_but_not_for_answers(results):
    results.throughput(2.0)
    results.batches(12.0, 100.0)
    assert claim(results, "packing").verdict == claim(results, "batches-speed").verdict == "not decided"
    assert claim(results, "batches-answers").verdict == "supported"  # none of 1,000: at least 99.63 %
    results.throughput(2.01, folder="throughput-y")
    on_cpu = results.throughput(1.0, folder="throughput-cpu")  # decides nothing
    contents = json.loads(on_cpu.read_text())
    on_cpu.write_text(json.dumps({**contents, "device": {"kind": "cpu", "name": "Some CPU"}}))
    results.batches(12.1, 99.2, folder="batches-y")
    assert claim(results, "packing").verdict == claim(results, "batches-speed").verdict == "supported"
    assert claim(results, "batches-answers").verdict == "not decided"  # 1,992 of 2,000: 99.2 to 99.8
    results.batches(12.1, 98.0, questions=5000, folder="batches-z")
    assert claim(results, "batches-answers").verdict == "contradicted"


def test_scaling_is_judged_for_control_on_several_gpus(results):
    cells = [("control:lean", "ddp", 1, 0.40, 20.0), ("control:lean", "ddp", 8, 0.41, 20.0), ("lora", "ddp", 1, 0.4, 30.0),
             ("lora", "ddp", 8, 0.8, 30.0), ("control:lean", "fsdp2", 8, 0.5, 10.0), ("lora", "fsdp2", 8, 0.5, 16.0)]  # fmt: skip
    results.scaling(cells)
    assert claim(results, "ddp-efficiency").verdict == "not decided"
    memory = claim(results, "fsdp2-memory")
    assert memory.verdict == "contradicted" and memory.tests[0].statistic == "+2.50 points at worst, n = 1"
    results.scaling(cells, repeat="repeat2")
    (test,) = claim(results, "ddp-efficiency").tests
    assert test.verdict == "supported" and "control:lean on 8" in test.what


def test_the_published_figures_are_judged_too(results):
    quality = claim(results, "roberta-quality").published
    assert "+2.05 points; paired over the printed seeds +2.05 points [-0.44, +4.53], n = 3" in quality[0]
    assert (
        "-0.62 points; the published figures themselves speak against the claim"
        in claim(results, "vit-quality").published[0]
    )


def test_the_projects_own_claims_link_to_records_that_are_there():
    text = (RESULTS / "claims.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and all((RESULTS / link).is_file() for link in links)
    anchors = re.findall(r"\]\(#([^)]+)\)", text)
    assert anchors == re.findall(r"^## (\S+)$", text, re.M)
