"""The paper's claims and this project's own, each judged by the run records alone.

A claim is tested wherever a control and a baseline were run under equal conditions, as a paired difference over seeds (or
repeats of a benchmark) with a 95 % t interval. A test supports its claim if the whole interval lies on the claimed side of
zero, contradicts it if it lies on the other, and decides nothing otherwise, or with fewer than two pairs. Two kinds of test
have another interval: whether something fits into a memory is decided by one measurement, since the allocator's peak does
not vary, and a share of questions has the exact binomial interval.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

from ..record import RunRecord, write_text_atomic
from .benchmark_tables import (
    alone,
    answer_batches,
    benchmark_settings,
    peak_of,
    quantized_steps,
    scaling_settings,
    seconds_of,
    shape_domain,
    shape_steps,
    throughputs,
)
from .collection import UNQUANTIZED, Collection, Comparison, Run
from .published import Paper

SUPPORTED, CONTRADICTED, NOT_DECIDED, NOT_TESTED = "supported", "contradicted", "not decided", "not tested"
CONFIDENCE = 0.95
BASELINES = ("lora", "dora")

#: Domain -> its name, the methods that stand for the paper's, the paper's models, and the command for the paper's scale.
DOMAINS = {
    "roberta": ("RoBERTa on GLUE", ("control",), ("roberta-base",), "bash scripts/rerun_glue.sh"),
    "vit": ("ViT on images", ("control",), ("vit_base_patch16_224",), "bash scripts/rerun_vit.sh"),
    "llama": (
        "LLaMA on commonsense reasoning",
        ("double control", "control+lora", "control"),
        ("llama-2-7b-hf", "meta-llama-3-8b"),
        "bash scripts/rerun_commonsense.sh --methods control+lora 'double control' lora dora",
    ),
    "qcontrol": ("quantized RoBERTa on GLUE", ("control",), ("roberta-base",), "bash scripts/rerun_quantized.sh"),
}  # fmt: skip
#: Quantity -> what is claimed, the unit of a difference, and its sign when the claim holds.
QUANTITIES = {
    "quality": ("loses no quality: its last score is at least the baseline's", "points", 1),
    "memory": ("needs less training memory (peak)", "%", -1),
    "time": ("trains in less time", "%", -1),
}


@dataclass
class Test:
    """One paired comparison.

    Attributes:
        pairs: seed or repeat -> (control, baseline).
        unit: of the differences; "%" makes them percent of the baseline.
        sign: +1 if the claim wants a positive difference, -1 if a negative one.
        known: interval of the difference where it is no t interval over the pairs.
    """

    what: str
    pairs: dict[object, tuple[float, float]]
    unit: str
    sign: int
    links: list[tuple[str, str]] = field(default_factory=list)
    known: tuple[float, float] | None = None

    @property
    def differences(self) -> list[float]:
        if self.unit == "%":
            return [100 * (one / other - 1) for one, other in self.pairs.values()]
        return [one - other for one, other in self.pairs.values()]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the mean difference; None for fewer than two pairs that have no other."""
        return self.known or t_interval(self.differences)

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return NOT_DECIDED
        low, high = sorted(self.sign * end for end in self.interval)
        return SUPPORTED if low > 0 else CONTRADICTED if high < 0 else NOT_DECIDED

    @property
    def statistic(self) -> str:
        """Mean difference, its interval and n, for people."""
        mean, n = statistics.fmean(self.differences), len(self.pairs)
        if self.interval is None:
            return f"{mean:+.2f} {self.unit}, n = {n}: no interval"
        if self.known and self.known[0] == self.known[1]:
            return f"{self.known[0]:+,.2f} {self.unit} at worst, n = {n}"
        low, high = self.interval
        return f"{mean:+.2f} {self.unit} [{low:+.2f}, {high:+.2f}], n = {n}"


@dataclass
class Claim:
    """A statement with its tests from records, what the published figures say, and how to test it at full scale."""

    name: str
    statement: str
    whose: str
    domain: str
    tests: list[Test]
    paper_models: Sequence[str] = ()
    models: Sequence[str] = ()
    published: list[str] = field(default_factory=list)
    how: str = ""

    @property
    def verdict(self) -> str:
        """Contradicted by one contradicting test; supported if all tests that have an interval support."""
        if not self.tests:
            return NOT_TESTED
        voting = [test.verdict for test in self.tests if test.interval is not None]
        if CONTRADICTED in voting:
            return CONTRADICTED
        return SUPPORTED if voting and set(voting) == {SUPPORTED} else NOT_DECIDED

    @property
    def scope(self) -> str:
        """Which models the tests are about, and whether the paper's are among them."""
        if not self.tests:
            return ""
        text = ", ".join(dict.fromkeys(self.models))
        return (
            text
            if set(self.models) & set(self.paper_models) or not self.paper_models
            else f"{text}; not the paper's scale"
        )

    @property
    def tally(self) -> str:
        counts = Counter(test.verdict for test in self.tests)
        return (
            ", ".join(f"{counts[v]} {v}" for v in (SUPPORTED, CONTRADICTED, NOT_DECIDED) if counts[v])
            or "no test"
        )


def bound(what: str, pairs: dict, unit: str, sign: int, links: list[tuple[str, str]]) -> Test:
    """A test of something that does not vary, such as the allocator's peak: the worst measurement decides."""
    worst = sign * min(sign * (one - other) for one, other in pairs.values())
    return Test(what, pairs, unit, sign, links, (worst, worst))


def t_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of a mean: mean ± t * s / sqrt(n); None for fewer than two values."""
    n = len(differences)
    if n < 2:
        return None
    mean = statistics.fmean(differences)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * statistics.stdev(differences) / n**0.5
    return (mean - half, mean + half)


def judge(collection: Collection, paper: Paper) -> list[Claim]:
    """Every claim with all tests that the records allow."""
    claims = [
        _domain_claim(collection, paper, domain, quantity) for domain in DOMAINS for quantity in QUANTITIES
    ]
    return [
        *claims,
        *_memory_benchmarks(collection),
        _quantized_fit(collection),
        _padding(collection),
        _packing(collection),
        *_answers(collection),
        *_scaling(collection),
    ]


# -- the paper's claims, by domain ------------------------------------------------------------------------------


def _domain_claim(collection: Collection, paper: Paper, domain: str, quantity: str) -> Claim:
    title, methods, models, command = DOMAINS[domain]
    says, unit, sign = QUANTITIES[quantity]
    tests, tested = [], []
    for comparison in collection.of(domain):
        if comparison.setting == UNQUANTIZED:  # there for comparison, not what QControl claims
            continue
        for test in _tests(comparison, methods, quantity, unit, sign):
            tests.append(test)
            tested.append(comparison.model)
    if (domain, quantity) == ("vit", "memory"):
        command = "bash scripts/rerun_memory.sh --tasks vit --seeds 1 2 3"
        for model, test in _vit_memory_tests(collection):
            tests.append(test)
            tested.append(model)
    return Claim(
        f"{domain}-{quantity}", f"{title}: control {says}.", "the paper", domain, tests, models, tested,
        _published(paper, domain, quantity), command,
    )  # fmt: skip


def _value(run: Run, quantity: str, column: str) -> float | None:
    if quantity == "quality":
        return run.last.get(column)
    if quantity == "memory":  # a CPU's resident memory is mostly the libraries'
        return None if run.resumed else run.record.memory.get("peak_allocated_bytes")
    return run.seconds


def _tests(
    comparison: Comparison, methods: Sequence[str], quantity: str, unit: str, sign: int
) -> Iterable[Test]:
    """Each control row against each baseline row, without memory modes, which are claims of their own."""
    # LLaMA's eight test sets come from one training: their average decides, lest one run count eight times
    column = "average" if comparison.domain == "llama" else comparison.task
    plain = {label: row for label, row in comparison.rows.items() if row.runs and "," not in label}
    method_of = {label: next(iter(row.runs.values())).method for label, row in plain.items()}
    for label in (label for label in plain if method_of[label] in methods):
        baselines = (other for name in BASELINES for other in plain if method_of[other] == name)
        for baseline in baselines:
            pairs, links = {}, []
            for seed in sorted(plain[label].runs.keys() & plain[baseline].runs.keys()):
                runs = plain[label].runs[seed], plain[baseline].runs[seed]
                values = [_value(run, quantity, column) for run in runs]
                if None not in values and (quantity == "quality" or values[1] > 0):
                    pairs[seed] = tuple(values)
                    links += [(f"{name} {seed}", run.links[0]) for name, run in zip((label, baseline), runs)]
            if pairs:
                where = (
                    f"{comparison.model}, {comparison.setting}" if comparison.setting else comparison.model
                )
                yield Test(
                    f"{where}, {comparison.task}: {label} against {baseline}", pairs, unit, sign, links
                )


def _vit_memory_tests(collection: Collection) -> Iterable[tuple[str, Test]]:
    """The memory table's cells; each folder below vit/memory is one repeat."""
    cells: dict[tuple, dict[str, dict[str, tuple[float, str]]]] = {}
    for link, record in collection.measurements.items():
        peak = record.memory.get("peak_allocated_bytes")
        if record.domain == "vit" and record.task == "memory" and peak:
            options = record.hyperparameters
            key = (record.model["class"], record.device["name"], options["batch_size"], options["attention"])
            cells.setdefault(key, {}).setdefault(record.method, {})[str(Path(link).parent)] = (peak, link)
    for (model, device, batch, attention), methods in sorted(cells.items()):
        for baseline in (name for name in BASELINES if name in methods and "control" in methods):
            shared = sorted(methods["control"].keys() & methods[baseline].keys())
            both = [(methods["control"][repeat], methods[baseline][repeat]) for repeat in shared]
            if both:
                pairs = {repeat: (one[0], other[0]) for repeat, (one, other) in zip(shared, both)}
                links = [
                    (name, cell[1]) for cells_ in both for name, cell in zip(("control", baseline), cells_)
                ]
                what = f"{model}, batch {batch}, {attention} attention, {device}: control against {baseline}"
                yield model, Test(what, pairs, "%", -1, links)


def _published(paper: Paper, domain: str, quantity: str) -> list[str]:
    """What the published figures themselves say on the claim, computed from results/paper.json."""
    table = {"roberta": "glue", "vit": "vit", "llama": "commonsense", "qcontrol": "quantized"}[domain]
    kinds = {
        "quality": ("best score", "score"), "memory": ("peak memory", "memory less than dora"), "time": ("training time",)
    }[quantity]  # fmt: skip
    figures = [
        f for f in paper.figures
        if f.table == table and f.quantity in kinds and (domain != "llama" or quantity != "quality" or f.column == "average")
    ]  # fmt: skip
    lines = []
    for figure in figures:
        if figure.quantity == "memory less than dora":
            lines.append(
                f"{figure.model}: {figure.row} needs {figure.value:g} {figure.unit} less than dora ({figure.status})."
            )
        if not figure.row.startswith(("control", "double control")):
            continue
        place = (figure.model, figure.column, figure.quantity)
        for other in figures:
            if other.row.startswith(BASELINES) and (other.model, other.column, other.quantity) == place:
                lines.append(_against(figure, other, quantity))
    return lines


def _against(figure, other, quantity: str) -> str:
    difference = (
        figure.value - other.value if quantity == "quality" else 100 * (figure.value / other.value - 1)
    )
    unit = "points" if quantity == "quality" else "%"
    line = f"{figure.model}, {figure.column}: {figure.row} {figure} against {other.row} {other}: {difference:+.2f} {unit}"
    if figure.runs and other.runs:
        shared = sorted(figure.runs.keys() & other.runs.keys())
        test = Test("", {seed: (figure.runs[seed], other.runs[seed]) for seed in shared}, "points", 1)
        line += f"; paired over the printed seeds {test.statistic}, which by our rule is: {test.verdict}"
    elif quantity == "quality" and difference < 0:
        line += "; the published figures themselves speak against the claim"
    return line + "."


# -- this project's own claims ----------------------------------------------------------------------------------


#: Domain -> what its claims at true shapes are about: words, the method that stands for the paper's, and the command.
SHAPES = {
    "llama": ("At LLaMA's shapes", "double control", "bash scripts/rerun_memory.sh --tasks llama3-8b llama2-7b --seeds 1 2 3"),
    "roberta": ("At RoBERTa-base's shape", "control", "bash scripts/rerun_memory.sh --tasks roberta-base --seeds 1 2 3"),
    "vit": ("At ViT-B/16's shape", "control", "bash scripts/rerun_memory.sh --tasks vit-b16 --seeds 1 2 3"),
}  # fmt: skip
#: Beginnings of shapes that the paper has; smaller ones are there to try things out.
_OF_PAPER = ("llama", "roberta-base", "vit-b16")


def _memory_benchmarks(collection: Collection) -> list[Claim]:
    claims = []
    for domain, (where, method, command) in SHAPES.items():
        for quantity, statement in (
            ("over", f"{where} {method} needs less memory over the weights than LoRA and DoRA."),
            ("seconds", f"{where} a step of {method} takes less time than one of LoRA and DoRA."),
        ):
            name = f"{domain}-shape-{'memory' if quantity == 'over' else 'time'}"
            tests = _shape_tests(collection, "control:plain", quantity, BASELINES, domain=domain)
            if domain == "llama":
                tests += _recipe_step_tests(collection, quantity)
            claims.append(_shape_claim(name, statement, "the paper", domain, tests, command))
    limits: dict[str, dict[str, tuple[float, float]]] = {}
    for link, benchmark in collection.benchmarks.items():
        options = benchmark["options"]
        if (options.get("limit") or 99) <= 24 and options["shape"] == "llama3-8b":
            for result in benchmark["results"]:
                if result["method"].startswith("control") and "longest_tokens" in result:
                    limits.setdefault(result["method"], {})[link] = (result["longest_tokens"], 0)
    fits = [
        bound(f"llama3-8b: longest sequence of {method}", pairs, "tokens", 1, _numbered(pairs))
        for method, pairs in limits.items()
    ]
    command = "bash scripts/rerun_memory.sh --seeds 1 2 3"
    claims.append(
        _shape_claim(
            "llama-24gb", "LLaMA-3-8B trains unquantized within 24 GB with control.", "the paper", "llama", fits,
            "bash scripts/rerun_memory.sh --tasks llama3-8b-limit --seeds 1 2 3",
        )
    )  # fmt: skip
    for name, statement, control, quantity in (
        ("lean-memory", "Memory mode lean needs less memory over the weights than the leanest LoRA that was measured.", "control:lean", "over"),
        ("fast-time", "Memory mode fast takes less time a step than the fastest LoRA that was measured.", "control:fast", "seconds"),
    ):  # fmt: skip
        tests = _shape_tests(collection, control, quantity, None)
        claims.append(_shape_claim(name, statement, "this project", "", tests, command))
    return claims


def _shape_claim(
    name: str, statement: str, whose: str, domain: str, tests: list[Test], command: str
) -> Claim:
    """A claim on random weights of true shapes; says so where no record of DoRA tests a statement that names it."""
    scope = [
        f"{shape} with random weights"
        for shape in (test.what.partition(",")[0].partition(":")[0] for test in tests)
    ]
    if tests and "DoRA" in statement and not any(test.what.endswith("dora") for test in tests):
        scope.append("no record of DoRA yet")
    return Claim(name, statement, whose, domain, tests, (), scope, [], command)


def _numbered(links: Iterable[str]) -> list[tuple[str, str]]:
    return [(str(number), link) for number, link in enumerate(links, 1)]


def _shape_tests(
    collection: Collection,
    control: str,
    quantity: str,
    baselines: Sequence[str] | None,
    domain: str | None = None,
) -> list[Test]:
    """`control` of scripts/bench_memory.py against each of `baselines`, or (None) against the best LoRA of a setting."""
    found = []
    for setting, measured in benchmark_settings(collection).items():
        if domain and not (shape_domain(setting) == domain and setting.startswith(_OF_PAPER)):
            continue
        points = {name: point for name, point in measured.items() if point.seconds}
        if control not in points:
            continue
        rivals = [name for name in baselines or () if name in points]
        if baselines is None:
            loras = [name for name in points if name.startswith("lora")]
            rivals = [min(loras, key=lambda name: getattr(points[name], quantity).mean)] if loras else []
        for rival in rivals:
            one, other = (
                dict(zip(points[n].measured_in, points[n].values[quantity])) for n in (control, rival)
            )
            # on a CPU memory is not measured: zero
            pairs = {link: (one[link], other[link]) for link in one if other.get(link)}
            if pairs:
                found.append(Test(f"{setting}: {control} against {rival}", pairs, "%", -1, _numbered(pairs)))
    return found


def _recipe_step_tests(collection: Collection, quantity: str) -> Iterable[Test]:
    """Double control against LoRA and DoRA in LlaMA/benchmark_methods.py, both as the paper has them."""

    def value(record: RunRecord) -> float | None:
        if quantity == "seconds":
            return seconds_of(record) if _timed(record) else None
        weights = record.memory.get("weights_bytes")
        return None if peak_of(record) is None or weights is None else peak_of(record) - weights

    for setting, rows in shape_steps(collection).items():
        control = rows.get(("double control", "plain"), {}) if setting.startswith(_OF_PAPER) else {}
        for baseline in BASELINES:
            other = rows.get((baseline, "plain"), {})
            pairs, links = {}, []
            for repeat in control.keys() & other.keys():
                values = value(control[repeat][1]), value(other[repeat][1])
                if None not in values:
                    pairs[repeat] = values
                    links += [("double control", control[repeat][0]), (baseline, other[repeat][0])]
            if pairs:
                yield Test(f"{setting}: double control against {baseline}", pairs, "%", -1, links)


def _quantized_fit(collection: Collection) -> Claim:
    """LLaMA-3-8B's shape over an NF4 base, lean, rows of 2,048 tokens, within 8 GiB."""
    tests = []
    for setting, rows in quantized_steps(collection).items():
        repeats = rows.get(("double control", "nf4", "lean"), {})
        peaks = {
            link: (peak_of(record) / 2**30, 8.0)
            for link, record in repeats.values()
            if peak_of(record)
            and record.hyperparameters["shape"] == "llama3-8b"
            and record.hyperparameters["tokens"] >= 2048
        }
        if peaks:
            tests.append(bound(f"{setting}: peak against 8 GiB", peaks, "GiB", -1, _numbered(peaks)))
    return _shape_claim(
        "nf4-8gib", "LLaMA-3-8B in NF4 trains with double control and memory mode lean within 8 GiB at 2,048 tokens.",
        "this project", "qcontrol", tests, "python -m QControl.quantized_memory --shape llama3-8b",
    )  # fmt: skip


def _padding(collection: Collection) -> Claim:
    tests: dict[tuple, Test] = {}
    for link, file in collection.paddings.items():
        key = (file["settings"]["model"], file["device"]["name"])
        test = tests.setdefault(
            key, Test(f"{key[0]} on {key[1]}: longest row against 128 tokens", {}, "%", -1)
        )
        test.pairs[link] = (file["longest"]["seconds_per_epoch"], file["max_length"]["seconds_per_epoch"])
        test.links.append((str(len(test.links) + 1), link))
    return Claim(
        "padding", "Batches padded to their longest row train in less time than the published padding to 128 tokens.",
        "this project", "roberta", list(tests.values()), (), [key[0] for key in tests],
        how="python -m RoBERTa.benchmark_padding --model roberta-base --device 0",
    )  # fmt: skip


def _timed(record: RunRecord) -> bool:
    """Whether the record's times decide anything: of a GPU that no other process used."""
    return record.device.get("kind") == "cuda" and alone(record)


def _packing(collection: Collection) -> Claim:
    tests, models = [], []
    for key, runs in throughputs(collection).items():
        pairs = {
            link: (record.metrics["last"]["packed"]["speedup"], 1.8)
            for link, record in runs.items()
            if _timed(record)
        }
        if pairs:
            tests.append(
                Test(
                    f"{', '.join(key)}: packed, times published, against 1.8",
                    pairs,
                    "times",
                    1,
                    _numbered(pairs),
                )
            )
            models.append(key[0])
    return Claim(
        "packing", "Packed, the published steps train on at least 1.8 times as many real tokens a second.", "this project",
        "llama", tests, (), models,
        how="for run in 1 2; do python -m LlaMA.benchmark_throughput --shape llama3-8b --data commonsense_170k.json "
        "--output_dir results/llama/throughput-llama3-8b-$run; done",
    )  # fmt: skip


def _answers(collection: Collection) -> list[Claim]:
    """Answers in batches: how fast, and whether they are the ones of single questions."""
    speeds, same, models = [], [], []
    for key, runs in answer_batches(collection).items():
        what = ", ".join(key)
        pairs = {
            link: (record.metrics["last"]["speedup"], 10.0) for link, record in runs.items() if _timed(record)
        }
        if pairs:
            speeds.append(Test(f"{what}: times one by one against 10", pairs, "times", 1, _numbered(pairs)))
        asked = sum(record.metrics["last"]["questions"] for record in runs.values())
        agreeing = sum(
            round(record.metrics["last"]["questions"] * record.metrics["last"]["answers_agree"] / 100)
            for record in runs.values()
        )
        share = stats.binomtest(agreeing, asked).proportion_ci(CONFIDENCE)
        same.append(
            Test(
                f"{what}: same answers of {asked:,} questions, against 99.5 %",
                {link: (record.metrics["last"]["answers_agree"], 99.5) for link, record in runs.items()},
                "points", 1, _numbered(runs), (100 * share.low - 99.5, 100 * share.high - 99.5),
            )
        )  # fmt: skip
        models.append(key[0])
    how = (
        "for run in 1 2; do python -m LlaMA.evaluate --compare_batch_one 1000 --model MODEL --data DATA "
        "--output_dir results/llama/batches-NAME-$run; done"
    )
    return [
        Claim("batches-speed", "In batches at least 10 times as many questions a second are answered as one by one.",
              "this project", "llama", speeds, (), models, how=how),
        Claim("batches-answers", "At least 99.5 % of the answers in batches are those of single questions.",
              "this project", "llama", same, (), models, how=how),
    ]  # fmt: skip


def _scaling(collection: Collection) -> list[Claim]:
    """DDP's efficiency, and control's memory when everything is sharded; both per number of GPUs."""
    fast, small = [], []
    for setting, cells in scaling_settings(collection).items():
        if setting.partition(", ")[2].startswith("longest") or ", cpu" in setting:
            continue
        for (method, shard, processes), cell in cells.items():
            if not method.startswith("control") or processes == 1:
                continue
            what = f"{setting}: {method} on {processes}"
            if shard == "ddp" and cell.efficiency:
                pairs = {link: (value, 95.0) for link, value in cell.efficiency.items()}
                fast.append(Test(f"{what}, efficiency against 95 %", pairs, "points", 1, _numbered(pairs)))
            lora = cells.get(("lora", shard, processes))
            if shard == "fsdp2" and method == "control:lean" and lora:
                peak = "peak_bytes_per_process"
                pairs = {
                    link: (100 * result[peak] / lora.results[link][peak], 60.0)
                    for link, result in cell.results.items()
                    if lora.results.get(link, {}).get(peak) and result.get(peak)
                }
                if pairs:
                    small.append(
                        bound(
                            f"{what}, memory in percent of LoRA's, against 60",
                            pairs,
                            "points",
                            -1,
                            _numbered(pairs),
                        )
                    )
    how = "bash scripts/bench_scaling.sh && bash scripts/bench_scaling.sh --output results/scaling/repeat2"
    return [
        _shape_claim("ddp-efficiency", "With DDP control keeps at least 95 % of one GPU's speed on each of several GPUs.",
                     "this project", "llama", fast, how),
        _shape_claim("fsdp2-memory", "With FSDP2 a GPU needs at most 0.6 of LoRA's memory for control in memory mode lean.",
                     "this project", "llama", small, how),
    ]  # fmt: skip


# -- claims.md --------------------------------------------------------------------------------------------------


def write_claims(claims: Sequence[Claim], paper: Paper, path: Path) -> Path:
    """Write the claims as Markdown into the results folder."""
    return write_text_atomic(path, markdown(claims, paper))


def markdown(claims: Sequence[Claim], paper: Paper) -> str:
    """A summary, each claim with its tests, records and what to run, and what is doubtful in the published figures."""
    lines = [
        "# Claims",
        "",
        "Made by `scripts/make_tables.py` from run records. Each test is a paired difference, control minus baseline, over "
        "seeds (or repeats of a benchmark), with a 95 % t interval in brackets, not corrected for the number of tests. It "
        "*supports* its claim if the whole interval lies on the claimed side of zero, *contradicts* it if it lies on the "
        "other side, and is *not decided* if it includes zero or has fewer than two pairs. A claim is contradicted by one "
        "contradicting test, and supported only if every test that has an interval supports it; a single pair has no vote. Whether "
        "something fits into a memory is decided by its worst measurement, and a share of questions by the exact binomial interval. "
        '"Not decided" on quality is no proof of equality. Memory hardly varies between repeats, so its intervals are '
        "narrow and say nothing about other models, batches or lengths.",
        "",
        "| claim | whose | verdict | tests | tested on |",
        "|---|---|---|---|---|",
    ]
    for claim in claims:
        lines.append(
            f"| [{claim.statement}](#{claim.name}) | {claim.whose} | **{claim.verdict}** | {claim.tally} | {claim.scope} |"
        )
    for claim in claims:
        lines += [
            "",
            f"## {claim.name}",
            "",
            f"{claim.statement} Claimed by {claim.whose}.",
            "",
            f"**{claim.verdict}**",
        ]
        if claim.tests:
            lines[-1] += f" ({claim.tally}; on {claim.scope})."
            lines += ["", "| test | difference | verdict | records |", "|---|---|---|---|"]
        else:
            lines[-1] += ": no record tests it yet."
        for test in claim.tests:
            links = ", ".join(f"[{text}]({link.replace(' ', '%20')})" for text, link in test.links)
            lines.append(f"| {test.what} | {test.statistic} | {test.verdict} | {links} |")
        if claim.published:
            lines += ["", "The published figures:", "", *(f"- {line}" for line in claim.published)]
        lines += ["", f"At full scale, with hub access and a GPU: `{claim.how}`"]
    lines += [
        "",
        "## Doubts about the published figures",
        "",
        *(f"- {weakness}" for weakness in paper.weaknesses),
    ]
    return "\n".join(lines) + "\n"
