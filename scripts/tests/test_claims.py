"""Claims are judged by paired t intervals: checked against scipy's own test and by hand."""

import re

import pytest
from scipy import stats

from control_experiments.claims import Claim, Test, judge, markdown, t_interval
from control_experiments.collection import collect
from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.published import read_paper

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
    for script in re.findall(r"`bash ([^`\s]+)", text):
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
