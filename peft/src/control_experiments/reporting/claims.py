"""The paper's claims and this project's own, each judged by the records alone, and claims.md.

`statistics` has the rules. A claim is a statement with tests; how its tests are found in the records is said once for each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd
from scipy import stats

from .records import UNQUANTIZED, Paper
from .statistics import (
    CONFIDENCE,
    CONTRADICTED,
    MARGIN,
    NOT_DECIDED,
    NOT_TESTED,
    REPEATS,
    SUPPORTED,
    Pool,
    Test,
    example_variance,
    more_seeds,
)
from .statistics import MAJORITY as FLOORS
from .tables import markdown_rows, step_means

BASELINES = ("lora", "dora")
#: Domain -> its name, the methods that stand for the paper's, the paper's models, and the command for the paper's scale.
DOMAINS = {
    "roberta": ("RoBERTa on GLUE", ("control",), ("roberta-base",), "bash scripts/rerun_glue.sh"),
    "vit": ("ViT on images", ("control",), ("vit_base_patch16_224",), "bash scripts/rerun_vit.sh"),
    "llama": ("LLaMA on commonsense reasoning", ("double control", "control+lora", "control"), ("llama-2-7b-hf", "meta-llama-3-8b"),
              "bash scripts/rerun_commonsense.sh --methods control+lora 'double control' lora dora"),
    "qcontrol": ("quantized RoBERTa on GLUE", ("control",), ("roberta-base",), "bash scripts/rerun_quantized.sh"),
}  # fmt: skip
#: Quantity -> what is claimed, its column, unit, sign and rule.
QUANTITIES = {
    "quality": (f"loses no quality: its last score is at most {MARGIN:g} point below the baseline's", "last", "points", 1, "quality"),
    "memory": ("needs less training memory (peak)", "allocated", "%", -1, "peak"),
    "time": ("trains in less time", "seconds", "%", -1, "time"),
}  # fmt: skip
#: Domain -> where its shape claims hold, the method that stands for the paper's, and the tasks of scripts/rerun_memory.sh.
SHAPES = {
    "llama": ("At LLaMA's shapes", "double control", "llama3-8b llama2-7b"),
    "roberta": ("At RoBERTa-base's shape", "control", "roberta-base"),
    "vit": ("At ViT-B/16's shape", "control", "vit-b16"),
}
#: Beginnings of shapes that the paper has; smaller ones are there to try things out.
_OF_PAPER = ("llama", "roberta-base", "vit-b16")


@dataclass
class Claim:
    """A statement with its tests, what the published figures say, and how to test it at full scale."""

    name: str
    statement: str
    whose: str
    domain: str
    tests: list[Test]
    how: str
    scope: str = ""
    pools: list[Pool] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Of its pools where it has some, else of its tests: contradicted by one, supported only by all that can decide."""
        judged = self.pools or self.tests
        if not judged:
            return NOT_TESTED
        verdicts = {one.verdict for one in judged if one.interval is not None}
        return CONTRADICTED if CONTRADICTED in verdicts else SUPPORTED if verdicts == {SUPPORTED} else NOT_DECIDED

    @property
    def tally(self) -> str:
        counts = Counter("below the majority class" if test.below_majority else test.verdict for test in self.tests)
        order = (SUPPORTED, CONTRADICTED, NOT_DECIDED, "below the majority class")
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "no test"


def judge(frame: pd.DataFrame, paper: Paper) -> list[Claim]:
    """Every claim with all tests that the records allow."""
    claims = []
    for domain, (title, methods, models, command) in DOMAINS.items():
        for quantity, (says, *_) in QUANTITIES.items():
            tests = list(_run_tests(frame, domain, methods, quantity))
            how = command
            if (domain, quantity) == ("vit", "memory"):
                tests += _paired(_vit_steps(frame), "control", BASELINES, "peak", "peak", "%", -1)
                how = "bash scripts/rerun_memory.sh --tasks vit --seeds 1"
            claim = Claim(f"{domain}-{quantity}", f"{title}: control {says}.", "the paper", domain, tests, how)
            names = dict.fromkeys(test.what.partition(",")[0] for test in tests)
            claim.scope = ", ".join(names) + ("; not the paper's scale" if names and not set(names) & set(models) else "")
            claim.published = _published(paper, domain, quantity)
            if quantity == "quality":
                claim.pools = _pools(tests)
            claims.append(claim)
    return [*claims, *_shapes(frame), *_bounds(frame)]


# -- how tests are found --------------------------------------------------------------------------------------


def _run_tests(frame: pd.DataFrame, domain: str, methods: Sequence[str], quantity: str) -> Iterable[Test]:
    """Each control row against each baseline row that was run alike (with or without graphs), without memory modes."""
    _, column, unit, sign, rule = QUANTITIES[quantity]
    runs = frame[(frame.kind == "run") & (frame.domain == domain) & frame.usable]
    runs = runs[runs[column].notna()].astype({"seed": int}) if column in runs else runs[:0]
    for (section, task), group in runs.groupby(["section", "task"], sort=True):
        if section.endswith(UNQUANTIZED):  # there for comparison, not what QControl claims
            continue
        rows = {label: part.drop_duplicates("seed").set_index("seed") for label, part in group.groupby("row")}
        how = {label: set(label.split(", ")[1:]) for label in rows}
        for label, one in rows.items():
            if one.method.iloc[0] not in methods or how[label] - {"graphs"}:
                continue
            for other_label, other in sorted(rows.items(), key=lambda item: item[1].method.iloc[0] != "lora"):
                seeds = sorted(one.index.intersection(other.index))
                if other.method.iloc[0] not in BASELINES or how[other_label] != how[label] or not seeds:
                    continue
                test = Test(f"{section}, {task}: {label} against {other_label}",
                            {seed: (one[column][seed], other[column][seed]) for seed in seeds}, rule, unit, sign)  # fmt: skip
                for seed in seeds:
                    test.links += [(f"{name} {seed}", part.links[seed][0][1]) for name, part in ((label, one), (other_label, other))]
                test.size = one.record.iloc[0].model.get("total_parameters") or 0
                if quantity == "quality":
                    test.examples = example_variance([(one.folder[seed], other.folder[seed]) for seed in seeds])
                    test.floor = FLOORS.get(task)
                yield test


def _pools(tests: list[Test]) -> list[Pool]:
    """A pool for each model and baseline: all its tasks."""
    pools: dict[str, list[Test]] = {}
    for test in tests:
        where, _, what = test.what.partition(": ")
        pools.setdefault(f"{where.rpartition(', ')[0]}, all tasks: {what}", []).append(test)
    return [Pool(what, part) for what, part in pools.items()]


def _vit_steps(frame: pd.DataFrame) -> pd.DataFrame:
    steps = frame[frame.kind == "vit step"]
    return steps.assign(section=steps.section + ", " + steps.attention + " attention") if len(steps) else steps


def _paired(steps: pd.DataFrame, control: str, baselines: Sequence[str], column: str, rule: str, unit: str, sign: int) -> Iterable[Test]:
    """`control` against each baseline within each section, paired by the folder (a repeat) that both lie in."""
    steps = steps[steps[column].notna() & (steps[column] != 0)] if len(steps) else steps  # on a CPU memory is not measured: zero
    for section, group in steps.groupby("section", sort=False):
        rows = {label: {_repeat(links[0][1]): (value, links[0][1]) for links, value in zip(part.links, part[column])}
                for label, part in group.groupby("row")}  # fmt: skip
        for baseline in (name for name in baselines if name in rows and control in rows):
            shared = sorted(rows[control].keys() & rows[baseline].keys())
            if shared:
                both = [(rows[control][repeat], rows[baseline][repeat]) for repeat in shared]
                links = [(name, cell[1]) for pair in both for name, cell in zip((control, baseline), pair)]
                test = Test(f"{section}: {control} against {baseline}", {r: (a[0], b[0]) for r, (a, b) in zip(shared, both)}, rule, unit, sign)
                test.links = list(dict((file, (text, file)) for text, file in links).values())
                yield test


def _repeat(file: str) -> str:
    """What both methods of a pair have in common: their file, or the folder of their records' folders."""
    return file.rpartition("/")[0].rpartition("/")[0] if file.endswith("/record.json") else file.rpartition("/")[0] if "/vit/memory/" in f"/{file}" else file


def _bound(rows: pd.DataFrame, column: str, bound: float, what: str, unit: str, sign: int, rule: str, scale: float = 1) -> Iterable[Test]:
    """Each section and row against a bound."""
    rows = rows[rows[column].notna()] if column in rows else rows[:0]
    for (section, label), group in rows.groupby(["section", "row"], sort=False):
        files = [links[0][1] for links in group.links]
        pairs = {file: (scale * value, bound) for file, value in zip(files, group[column])}
        yield Test(f"{section}: {what.format(label)}", pairs, rule, unit, sign, [(str(n), file) for n, file in enumerate(files, 1)])


def _shapes(frame: pd.DataFrame) -> list[Claim]:
    """Claims on a training step over random weights of true shapes."""
    steps, means = frame[(frame.kind == "step") & frame.seconds.notna()], step_means(frame).droplevel("whose")
    recipe = frame[(frame.kind == "recipe step") & (frame["mode"] == "plain")] if "mode" in frame else frame[:0]
    timed = recipe[recipe.timed.fillna(False).astype(bool)] if len(recipe) else recipe
    claims = []
    for domain, (where, method, tasks) in SHAPES.items():
        mine = steps[(steps.domain == domain) & steps.section.str.startswith(_OF_PAPER)]
        for quantity, says, column, rule in (("memory", f"{where} {method} needs less memory over the weights than LoRA and DoRA.", "over", "peak"),
                                             ("time", f"{where} a step of {method} takes less time than one of LoRA and DoRA.", "seconds", "time")):  # fmt: skip
            tests = list(_paired(mine, "control:plain", BASELINES, column, rule, "%", -1))
            if domain == "llama":
                tests += _paired(recipe if column == "over" else timed, "double control", BASELINES, column, rule, "%", -1)
            repeats = f"--seeds {'1' if rule == 'peak' else '1 2 3'}"
            claims.append(_claim(f"{domain}-shape-{quantity}", says, "the paper", domain, tests, f"bash scripts/rerun_memory.sh --tasks {tasks} {repeats}"))

    def best(control: str, column: str, graphs: bool) -> Iterable[Test]:
        for section, part in steps.groupby("section", sort=False):
            loras = [row for row in dict.fromkeys(part.row) if row.startswith("lora") and ("graphs" in row) == graphs]
            if loras:
                rival = min(loras, key=lambda row: means[column][section, row])
                yield from _paired(part, control, [rival], column, "peak" if column == "over" else "time", "%", -1)

    claims.append(_claim("lean-memory", "Memory mode lean needs less memory over the weights than the leanest LoRA that was measured.", "this project",
                         "", list(best("control:lean", "over", False)), "bash scripts/rerun_memory.sh --seeds 1"))  # fmt: skip
    claims.append(_claim("fast-time", "Memory mode fast takes less time a step than the fastest LoRA that was measured; both without CUDA graphs, or both with.",
                         "this project", "", [*best("control:fast", "seconds", False), *best("control+graphs:fast", "seconds", True)],
                         "bash scripts/rerun_memory.sh --seeds 1 2 3"))  # fmt: skip
    return claims


def _claim(name: str, statement: str, whose: str, domain: str, tests: Iterable[Test], how: str) -> Claim:
    """A claim on random weights of true shapes; says so where no record of DoRA tests a statement that names it."""
    claim = Claim(name, statement, whose, domain, list(tests), how)
    scope = list(dict.fromkeys(test.what.partition(",")[0].partition(":")[0] for test in claim.tests))
    if scope and "DoRA" in statement and not any(test.what.endswith("dora") for test in claim.tests):
        scope.append("no record of DoRA yet")
    claim.scope = ", ".join(scope)
    return claim


def _bounds(frame: pd.DataFrame) -> list[Claim]:
    """Claims that hold a measurement against a number."""

    def rows(kind: str) -> pd.DataFrame:
        return frame[frame.kind == kind]

    def timed(part: pd.DataFrame) -> pd.DataFrame:
        return part[part.timed.fillna(False).astype(bool)] if len(part) else part

    longest, nf4, scaling = rows("longest"), rows("quantized step"), rows("scaling")
    if len(longest):
        longest = longest[(longest.limit <= 24) & (longest.task == "llama3-8b") & longest.row.str.startswith("control")]
    if len(nf4):
        nf4 = nf4[(nf4.task == "llama3-8b") & (nf4.tokens >= 2048) & (nf4.stored == "nf4") & (nf4["mode"] == "lean") & (nf4.row == "double control")]
    fast = small = scaling
    if len(scaling):
        scaling = scaling[~scaling.on_cpu.astype(bool)].assign(row=lambda f: f.row + " on " + f.processes.astype(int).astype(str))
        fast = scaling[(scaling["shard"] == "ddp") & scaling.row.str.startswith("control")]
        keys = scaling.links.map(lambda links: links[0][1]) + scaling["shard"] + scaling.processes.astype(str)
        lora = scaling[scaling.method == "lora"].peak.groupby(keys).first()
        small = scaling.assign(share=100 * scaling.peak / keys.map(lora))
        small = small[(small["shard"] == "fsdp2") & (small.method == "control:lean") & (small.processes > 1)]
    padding = [
        Test(f"{part.section.iloc[0]}: longest row against 128 tokens", {links[0][1]: (one, other) for links, one, other in zip(part.links, part.seconds, part.baseline)},
             "time", "%", -1, [(str(n), links[0][1]) for n, links in enumerate(part.links, 1)])
        for _, part in rows("padding").groupby("section")
    ]  # fmt: skip
    answers = "for run in 1 2 3; do python -m LlaMA.evaluate --compare_batch_one 1000 --model MODEL --data DATA --output_dir results/llama/batches-NAME-$run; done"
    scale = "bash scripts/bench_scaling.sh && bash scripts/bench_scaling.sh --output results/scaling/repeat2"
    return [
        _claim("llama-24gb", "LLaMA-3-8B trains unquantized within 24 GB with control.", "the paper", "llama",
               _bound(longest, "longest", 0, "longest sequence of {}", "tokens", 1, "peak"), "bash scripts/rerun_memory.sh --tasks llama3-8b-limit --seeds 1"),
        _claim("nf4-8gib", "LLaMA-3-8B in NF4 trains with double control and memory mode lean within 8 GiB at 2,048 tokens.", "this project", "qcontrol",
               _bound(nf4, "allocated", 8, "peak of {} against 8 GiB", "GiB", -1, "peak", 2**-30), "python -m QControl.quantized_memory --shape llama3-8b"),
        _claim("padding", "Batches padded to their longest row train in less time than the published padding to 128 tokens.", "this project", "roberta",
               padding, "python -m RoBERTa.benchmark_padding --model roberta-base --device 0"),
        _claim("packing", "Packed, the published steps train on at least 1.8 times as many real tokens a second.", "this project", "llama",
               _bound(timed(rows("throughput")), "speedup", 1.8, "packed, times published, against 1.8", "times", 1, "time"),
               "for run in 1 2 3; do python -m LlaMA.benchmark_throughput --shape llama3-8b --data commonsense_170k.json "
               "--output_dir results/llama/throughput-llama3-8b-$run; done"),
        _claim("batches-speed", "In batches at least 10 times as many questions a second are answered as one by one.", "this project", "llama",
               _bound(timed(rows("batches")), "speedup", 10, "{}, times one by one against 10", "times", 1, "time"), answers),
        _claim("batches-answers", "At least 99.5 % of the answers in batches are those of single questions.", "this project", "llama",
               [_share(test, rows("batches")) for test in _bound(rows("batches"), "answers_agree", 99.5, "same answers of {}, against 99.5 %", "points", 1, "share")],
               answers),
        _claim("ddp-efficiency", "With DDP control keeps at least 95 % of one GPU's speed on each of several GPUs.", "this project", "llama",
               _bound(fast, "efficiency", 95, "{}, efficiency against 95 %", "points", 1, "time"), scale),
        _claim("fsdp2-memory", "With FSDP2 a GPU needs at most 0.6 of LoRA's memory for control in memory mode lean.", "this project", "llama",
               _bound(small, "share", 60, "{}, memory in percent of LoRA's, against 60", "points", -1, "peak"), scale),
    ]  # fmt: skip


def _share(test: Test, rows: pd.DataFrame) -> Test:
    """A share of questions has the exact binomial interval."""
    asked = rows[rows.links.map(lambda links: links[0][1] in test.pairs)]
    agreeing = (asked.questions * asked.answers_agree / 100).round().sum()
    share = stats.binomtest(int(agreeing), int(asked.questions.sum())).proportion_ci(CONFIDENCE)
    test.known = (100 * share.low - 99.5, 100 * share.high - 99.5)
    return test


# -- the published figures ------------------------------------------------------------------------------------


def _published(paper: Paper, domain: str, quantity: str) -> list[str]:
    """What the published figures themselves say on the claim."""
    table = {"roberta": "glue", "vit": "vit", "llama": "commonsense", "qcontrol": "quantized"}[domain]
    kinds = {"quality": ("best score", "score"), "memory": ("peak memory",), "time": ("training time",)}[quantity]
    figures = paper.figures[paper.figures.table == table]
    lines = []
    if quantity == "memory":
        less = figures[figures.quantity == "memory less than dora"]
        lines = [f"{f.model}: {f.row} needs {f.value:g} {f.unit} less than dora ({f.status})." for f in less.itertuples()]
    figures = figures[figures.quantity.isin(kinds) & ((figures.column == "average") | (domain != "llama") | (quantity != "quality"))]
    for (model, column, _), group in figures.groupby(["model", "column", "quantity"], sort=False):
        for one in group[group.row.str.startswith(("control", "double control"))].itertuples():
            for other in group[group.row.str.startswith(BASELINES)].itertuples():
                lines.append(f"{model}, {column}: {one.row} {one.text} against {other.row} {other.text}: {_against(one, other, quantity)}.")
    return lines


def _against(one, other, quantity: str) -> str:
    if quantity != "quality":
        return f"{100 * (one.value / other.value - 1):+.2f} %"
    line = f"{one.value - other.value:+.2f} points"
    if isinstance(one.runs, dict) and isinstance(other.runs, dict):
        seeds = sorted(one.runs.keys() & other.runs.keys())
        test = Test("", {seed: (one.runs[seed], other.runs[seed]) for seed in seeds}, "quality")
        line += f"; paired over the printed seeds {test.statistic}, which by our rule is: {test.verdict}"
    return line


# -- claims.md ------------------------------------------------------------------------------------------------


def overview(claims: Sequence[Claim]) -> pd.DataFrame:
    """A row for each domain: quality, memory and time of its main control against LoRA, on the largest model with tests."""
    by_name = {claim.name: claim for claim in claims}
    rows = []
    for domain, (title, *_) in DOMAINS.items():
        quality = by_name[f"{domain}-quality"]
        pools = [pool for pool in quality.pools if " against lora" in pool.what]
        pool = max(pools, key=lambda pool: (len(pool.counting), pool.tests[0].size), default=None)
        more = more_seeds(pool.tests) if pool else ""
        rows.append({
            "control against LoRA": f"[{title}](#{domain}-quality)" + (f" ({pool.what.partition(', all tasks')[0]})" if pool else ""),
            "quality": f"{pool.statistic}: **{pool.verdict}**" if pool else NOT_TESTED,
            "seeds that would decide": f"{more} more" if more.isdigit() else more or "",
            "memory": _range(by_name, domain, "memory"), "time": _range(by_name, domain, "time"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _range(by_name: dict[str, Claim], domain: str, quantity: str) -> str:
    """From the smallest to the largest difference of a domain's tests against LoRA, and what they decide together."""
    for name in (f"{domain}-{quantity}", f"{domain}-shape-{quantity}"):  # whole trainings, else steps at true shapes
        tests = [test for test in by_name[name].tests if " against lora" in test.what] if name in by_name else []
        if tests:
            break
    else:
        return NOT_TESTED
    means = [test.differences.mean() for test in tests]
    claim = Claim("", "", "", domain, tests, "")
    n = min(len(test.pairs) for test in tests)
    few = f", {n} of {REPEATS} repeats" if quantity == "time" and n < REPEATS else ""
    between = f"{max(means):+.0f} to {min(means):+.0f} %" if round(max(means)) != round(min(means)) else f"{min(means):+.0f} %"
    return f"{between}{few}: **[{claim.verdict}](#{name})**"


ABOUT = f"""Made by `scripts/make_tables.py` from run records. Differences are control minus baseline, with 95 % intervals in brackets.

- **Quality** asks whether control loses anything, with a margin of {MARGIN:g} point. The answer is *supported* if the interval's lower end lies
  above -{MARGIN:.1f}. It is *contradicted* if the upper end lies below 0 and the lower end not above -{MARGIN:.1f}. Else it is *not decided*.
- Runs are paired by seed, and example by example where outcomes lie beside the records. A model's tasks are judged one by one and pooled.
- A test in which neither method is above the most frequent class is flagged and does not count.
- **Memory** is the allocator's peak, which is deterministic: one measurement decides, the worst of several.
- **Time** needs {REPEATS} repeats and an interval on one side of zero.
- Intervals are not corrected for the number of tests."""


def markdown(claims: Sequence[Claim], paper: Paper, up: str = "") -> str:
    """The overview, all claims, each with its tests, records and what to run, and what is doubtful in the published figures."""
    lines = ["# Claims", "", *markdown_rows(overview(claims)), "", ABOUT, "", "## All claims", ""]
    lines += markdown_rows(pd.DataFrame([
        {"claim": f"[{claim.statement}](#{claim.name})", "whose": claim.whose, "verdict": f"**{claim.verdict}**", "tests": claim.tally, "tested on": claim.scope}
        for claim in claims
    ]))  # fmt: skip
    for claim in claims:
        lines += ["", f"## {claim.name}", "", f"{claim.statement} Claimed by {claim.whose}.", ""]
        lines.append(f"**{claim.verdict}**" + (f" ({claim.tally}; on {claim.scope})." if claim.tests else ": no record tests it yet."))
        rows = [_shown(pool.what, pool, pool.tests, "the tests below") for pool in claim.pools if len(pool.tests) > 1]
        rows += [_shown(test.what, test, [test], ", ".join(f"[{text}]({(up + file).replace(' ', '%20')})" for text, file in test.links)) for test in claim.tests]
        if rows:
            table = pd.DataFrame(rows)
            lines += ["", *markdown_rows(table if claim.pools else table.drop(columns="more seeds"))]
        if claim.published:
            lines += ["", "The published figures:", "", *(f"- {line}" for line in claim.published)]
        lines += ["", f"At full scale, with hub access and a GPU: `{claim.how}`"]
    return "\n".join([*lines, "", "## Doubts about the published figures", "", *(f"- {doubt}" for doubt in paper.weaknesses)]) + "\n"


def _shown(what: str, judged: Test | Pool, tests: list[Test], links: str) -> dict[str, str]:
    below = isinstance(judged, Test) and judged.below_majority
    decided = "below the majority class: does not count" if below else judged.verdict
    return {"test": what, "difference": judged.statistic, "verdict": decided, "more seeds": "" if below else more_seeds(tests) if tests[0].rule == "quality" else "", "records": links}
