"""The claims of claims.yaml, each judged by the records alone, and claims.md."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import yaml

from . import statistics as rules
from .records import UNQUANTIZED, Paper, beside_published
from .statistics import CONTRADICTED, NOT_DECIDED, NOT_TESTED, REPEATS, SUPPORTED, Pool, Test
from .tables import environment, linked

BASELINES = ("lora", "dora")
BELOW = "below the majority class"
SPECIFICATIONS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass
class Claim:
    """A statement with its tests, what the published figures say, and the command that tests it at full scale."""

    name: str
    statement: str
    whose: str
    command: str
    tests: list[Test]
    domain: str = ""
    scope: str = ""
    pools: list[Pool] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Of its pools, else of its tests: contradicted by one, supported only if all that have an interval support it."""
        if not (judging := self.pools or self.tests):
            return NOT_TESTED
        verdicts = {one.verdict for one in judging if one.interval is not None}
        return CONTRADICTED if CONTRADICTED in verdicts else SUPPORTED if verdicts == {SUPPORTED} else NOT_DECIDED

    @property
    def tally(self) -> str:
        counts = Counter(BELOW if test.below_majority else test.verdict for test in self.tests)
        order = (SUPPORTED, CONTRADICTED, NOT_DECIDED, BELOW)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "no test"


def judge(frame: pd.DataFrame, paper: Paper) -> list[Claim]:
    """Every claim with all tests that the records allow."""
    claims, frame = [], beside_published(frame, paper)
    for domain, about in SPECIFICATIONS["domains"].items():
        for quantity, specification in SPECIFICATIONS["quantities"].items():
            tests = list(_run_tests(frame, domain, about["methods"], **specification["test"]))
            if quantity == "quality":  # a single seed decides nothing: it stands in the tables where others have more
                tests = [test for test in tests if len(test.pairs) > 1] or tests
            statement = f"{about['title']}: {specification['says']}"
            claim = Claim(f"{domain}-{quantity}", statement, "the paper", about["command"], tests, domain)
            models = {test.what.partition(",")[0] for test in tests}
            far = "; not the paper's scale" if models and not models & set(about["models"]) else ""
            claim.scope = ", ".join(sorted(models)) + far
            claim.published = _published(paper, about["paper"], quantity, specification["published"])
            if quantity == "quality":  # a pool for each model and baseline: all its tasks
                pools: dict[str, list[Test]] = {}
                for test in tests:
                    where, _, what = test.what.partition(": ")
                    pools.setdefault(f"{where.rpartition(', ')[0]}, all tasks: {what}", []).append(test)
                claim.pools = list(itertools.starmap(Pool, pools.items()))
            claims.append(claim)
    for specification in SPECIFICATIONS["claims"]:
        tests = [test for one in specification["tests"] for test in _measured(frame, **one)]
        scope = list(dict.fromkeys(test.what.partition(",")[0].partition(":")[0] for test in tests))
        if scope and "DoRA" in specification["statement"] and not any(" against dora" in test.what for test in tests):
            scope.append("no record of DoRA yet")
        claims.append(Claim(**specification | {"tests": tests, "scope": ", ".join(scope)}))
    return claims


# -- tests ----------------------------------------------------------------------------------------------------


def _run_tests(frame: pd.DataFrame, domain: str, methods: Sequence[str], column: str, **test) -> Iterable[Test]:
    """Each control row against each baseline row that was run alike (with or without graphs), without memory modes."""
    runs = frame[(frame.kind == "run") & frame.usable & frame[column].notna()]
    runs = runs[runs.domain.mask(runs.base != "none", "qcontrol") == domain]
    runs = runs[~runs.section.str.endswith(UNQUANTIZED)]  # there for comparison, not what QControl claims
    for (section, task), group in runs.groupby(["section", "task"]):
        rows = {label: part.set_index(part.seed.astype(int)) for label, part in group.groupby("row")}
        how = {label: label.split(", ")[1:] for label in rows}
        first = {label: part.method.iloc[0] for label, part in rows.items()}
        baselines = sorted((label for label in rows if first[label] in BASELINES), key=lambda label: first[label] != "lora")
        for control in (label for label in rows if first[label] in methods and how[label] in ([], ["graphs"])):
            for baseline in (label for label in baselines if how[label] == how[control]):
                pair = {control: rows[control], baseline: rows[baseline]}
                yield from _pair(f"{section}, {task}", pair, column, task=task, **test)


def _measured(frame: pd.DataFrame, where: str, column: str, control: str = "", against: Sequence[str] = (), best: str = "",
              bound: float | str | None = None, what: str = "", **test) -> Iterable[Test]:  # fmt: skip
    """Tests on measurements, section by section, as claims.yaml describes them."""
    found = frame.query(where, engine="python")
    found = found[found[column].notna()].sort_values(["task", "tokens"], kind="stable") if column in found else found[:0]
    # both methods of a pair come from one file
    repeats = found.links.map(lambda links: links[0][1]) + found.repeat.fillna(0).map(" {:.0f}".format)
    if bound is not None:
        for _, group in found.groupby(["section", "row", "mode", "tokens", "processes", "limit_gib"], dropna=False, sort=False):
            limits = group[bound] if isinstance(bound, str) else [bound] * len(group)
            pairs = {repeat: values for repeat, *values in zip(repeats[group.index], group[column], limits)}
            files = dict.fromkeys(file for links in group.links for _, file in links)
            links = [(str(number), file) for number, file in enumerate(files, 1)]
            made = Test(f"{group.section.iloc[0]}: {what.format(**group.iloc[0])}", pairs, links=links, **test)
            if made.rule == "share":
                made.known = rules.share_interval(group.questions, group.answers_agree, bound)
            yield made
        return
    found = found[found[column] != 0]  # on a CPU memory is not measured: zero
    for section, group in found.groupby("section", sort=False):
        rows = {label: part.set_index(repeats[part.index]) for label, part in group.groupby("row")}
        if best and control in rows:  # over the same base, and measured beside control: with no other it makes pairs
            beside = repeats[group.index].isin(rows[control].index) & group.base.isin(rows[control].base)
            rivals = group[beside].query(best, engine="python")
            against = rivals.groupby("row")[column].mean().nsmallest(1).index
        for baseline in (name for name in against if name in rows and control in rows):
            yield from _pair(section, {control: rows[control], baseline: rows[baseline]}, column, **test)


def _pair(where: str, rows: dict[str, pd.DataFrame], column: str, rule: str, task: str = "", **test) -> Iterable[Test]:
    """Two rows, control and baseline, whose index is the seed or the repeat that pairs them."""
    (control, one), (baseline, other) = rows.items()
    if not (shared := sorted(set(one.index) & set(other.index))):
        return
    pairs = {key: (one[column][key], other[column][key]) for key in shared}
    every = [(name, key, part.links[key][0][1]) for key in shared for name, part in rows.items()]
    links = {file: (f"{name} {key}" if task else name, file) for name, key, file in every}
    made = Test(f"{where}: {control} against {baseline}", pairs, rule, links=list(links.values()), **test)
    if rule == "quality":
        made.size = one.record.iloc[0].model.get("total_parameters") or 0
        made.trained = one.trained.iloc[0] / other.trained.iloc[0]
        made.floor = SPECIFICATIONS["majority"].get(task)
        made.examples = rules.example_variance([(one.folder[seed], other.folder[seed]) for seed in shared])
    yield made


def _published(paper: Paper, table: str, quantity: str, kinds: list[str]) -> list[str]:
    """What the published figures themselves say on a claim."""
    figures = paper.figures[paper.figures.table == table]
    less = figures[(figures.quantity == "memory less than dora") & (quantity == "memory")]
    lines = [f"{f.model}: {f.row} needs {f.value:g} {f.unit} less than dora ({f.status})." for f in less.itertuples()]
    figures = figures[figures.quantity.isin(kinds) & ((figures.quantity != "score") | (figures.column == "average"))]
    unit, sign = ("points", 1) if quantity == "quality" else ("%", -1)
    for (model, column, _), group in figures.groupby(["model", "column", "quantity"], sort=False):
        controls, others = (group[group.row.str.startswith(names)] for names in (("control", "double control"), BASELINES))
        for one, other in itertools.product(controls.itertuples(), others.itertuples()):
            test = Test("", {0: (one.value, other.value)}, "quality", unit, sign)
            apart = f"{one.row} {one.text} against {other.row} {other.text}: {test.differences[0]:+.2f} {unit}"
            if isinstance(one.runs, dict) and isinstance(other.runs, dict):
                test.pairs = {seed: (run, other.runs[seed]) for seed, run in sorted(one.runs.items()) if seed in other.runs}
                apart += f"; paired over the printed seeds {test.statistic}, which by our rule is: {test.verdict}"
            lines.append(f"{model}, {column}: {apart}.")
    return lines


# -- claims.md ------------------------------------------------------------------------------------------------


def overview(claims: Sequence[Claim]) -> pd.DataFrame:
    """Quality, memory and time of each domain's control against LoRA, a row for each form of control. Quality is that on the
    domain's largest model, with the most seeds, at the most equal numbers of trained parameters."""

    def weight(pool: Pool) -> tuple[bool, float, int, float]:
        first = pool.tests[0]
        size = round(math.log2(first.size or 1), 1)  # position embeddings make no other model
        return bool(pool.counting), size, min(len(test.pairs) for test in pool.tests), -abs(math.log(first.trained))

    by_name, rows = {claim.name: claim for claim in claims}, []
    for domain, about in SPECIFICATIONS["domains"].items():
        pools = [pool for pool in by_name[f"{domain}-quality"].pools if " against lora" in pool.what]
        pools = sorted(pools, key=weight, reverse=True)
        largest = [pool for pool in pools if weight(pool)[:3] == weight(pools[0])[:3]]
        for mixed in dict.fromkeys(map(_with_lora, largest)) or [False]:
            where, quality, more = f"[{about['title']}](#{domain}-quality)", f"**{NOT_TESTED}**", "two seeds first"
            if pool := next((pool for pool in largest if _with_lora(pool) == mixed), None):
                section, _, control = pool.what.partition(" against ")[0].partition(", all tasks: ")
                where += f", {section}: {control.removesuffix(', graphs')}"
                if abs(pool.tests[0].trained - 1) > 0.05:
                    where += f" ({pool.tests[0].trained:.2f} of LoRA's parameters)"
                quality, more = f"**{pool.verdict}**: {pool.statistic}", rules.more_seeds(pool.tests)
            rows.append([where, quality, more, *(_costs(by_name, domain, quantity, mixed) for quantity in ("memory", "time"))])
    return pd.DataFrame(rows, columns=["control against LoRA", "quality", "more seeds to decide", "memory", "time"])


def _with_lora(one: Pool | Test) -> bool:
    """Whether the control of a comparison has LoRA beside it."""
    return ": control+lora" in one.what


def against_lora(claims: Sequence[Claim]) -> list[Pool]:
    """The pools of quality against LoRA that have an interval."""
    return [pool for claim in claims for pool in claim.pools if " against lora" in pool.what and pool.interval]


def _costs(by_name: dict[str, Claim], domain: str, quantity: str, mixed: bool) -> str:
    """From the smallest to the largest difference against LoRA of whole trainings, else of steps at true shapes; of memory
    the worst of the repeats, of time what was repeated if anything was."""
    for name in (f"{domain}-{quantity}", f"{domain}-shape-{quantity}"):
        tests = by_name[name].tests if name in by_name else []
        tests = [test for test in tests if " against lora" in test.what and _with_lora(test) == mixed]
        if quantity == "time":  # what was measured once decides nothing
            tests = [test for test in tests if len(test.pairs) >= REPEATS] or tests
        if tests:
            found = [test.differences.max() if quantity == "memory" else test.differences.mean() for test in tests]
            ends = [round(end(found)) for end in (max, min)]
            n = min(len(test.pairs) for test in tests)
            few = f", {n} of {REPEATS} repeats" if quantity == "time" and n < REPEATS else ""
            span = " to ".join(f"{end:+d}" for end in dict.fromkeys(ends))
            return f"**[{Claim('', '', '', '', tests).verdict}](#{name})**: {span} %{few}"
    return f"**{NOT_TESTED}**"


def markdown(claims: Sequence[Claim], paper: Paper, up: str = "") -> str:
    """The overview, all claims, each with its tests, records and command, and what is doubtful in the published figures."""
    template = environment(keep_trailing_newline=True).get_template("claims.md.jinja")
    return template.render(
        claims=claims, overview=overview(claims), picture=bool(against_lora(claims)), doubts=paper.weaknesses, below=BELOW,
        rules=rules, linked=partial(linked, up=up),
    )  # fmt: skip
