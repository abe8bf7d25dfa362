"""Tables of what the benchmarks measured: memory against time, quantized bases, LLaMA's shapes, throughput, answers in
batches, scaling over GPUs. Files or records of one setting (shape, batch, tokens, device, torch) are repeats of each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..record import RunRecord
from .cells import MEBI, Cell, Section, Table, summary_cell
from .collection import Collection, Summary, measurement_kind, torch_minor

#: Ways of batching in LlaMA/benchmark_throughput.py, and what they are.
WAYS = {
    "published": "the published micro-batches, padded",
    "packed": "the same steps, packed",
    "large": "packed, more rows a step",
}

#: What a kernel does -> how the names of such kernels are recognised, in this order.
KERNELS = {
    "attention": "flash|fmha|attention",
    "matmuls": "gemm|nvjet|cutlass|xmma|splitk|::mm$|::addmm|::bmm",
    "control and residual sums": "add_low_rank",
    "norms, activations, positions, loss": "norm|swiglu|silu|gelu|rope|rotary|softmax|cross_entropy",
    "host copies": "memcpy (dtoh|htod)",
    "optimizer": "adam|multi_tensor",
}


def benchmark_tables(collection: Collection) -> list[Table]:
    """Every benchmark's table, whether or not there are records for it yet."""
    return [
        memory_speed_table(collection),
        step_profile_table(collection),
        quantized_memory_table(collection),
        llama_shapes_table(collection),
        throughput_table(collection),
        batches_table(collection),
        scaling_table(collection),
    ]


def _none_yet(sections: Sequence[Section], command: str) -> list[str]:
    return [] if sections else [f"No record yet: {command}"]


# -- scripts/bench_memory.py ----------------------------------------------------------------------------------


def memory_speed_table(collection: Collection) -> Table:
    """What scripts/bench_memory.py measured: memory over the weights against time, one section for each setting."""
    header = ["method", "trained parameters", "n", "weights GB", "over weights GB", "ms a step", "tokens/s",
              "time / fastest LoRA", "memory / leanest LoRA", "on the frontier", "runs"]  # fmt: skip
    sections = []
    for setting, measured in benchmark_settings(collection).items():
        points = {method: point for method, point in measured.items() if point.seconds}
        loras = [point for method, point in points.items() if method.startswith("lora")]
        fastest = min((point.seconds.mean for point in loras), default=None)
        leanest = min((point.over.mean for point in loras), default=None)
        frontier = frontier_of({method: (p.seconds.mean, p.over.mean) for method, p in points.items()})
        rows = []
        for method, point in measured.items():
            links = [(str(number), link) for number, link in enumerate(point.links, 1)]
            if not point.seconds:
                failed = Cell("failed", notes=[f"{method}: {point.error}."])
                rows.append(
                    [Cell(method), failed, Cell("0", 0), *[Cell("") for _ in range(7)], Cell("", links=links)]
                )
                continue
            rows.append([
                Cell(method), Cell(f"{point.trained:,}", point.trained), Cell(str(point.seconds.n), point.seconds.n),
                summary_cell(point.static, 2), summary_cell(point.over, 2),
                summary_cell(Summary.of([1000 * value for value in point.values["seconds"]]), 1),
                summary_cell(Summary.of(point.values["tokens"]), 0),
                _ratio(point.seconds.mean, fastest), _ratio(point.over.mean, leanest),
                Cell("yes" if method in frontier else "no"), Cell("", links=links),
            ])  # fmt: skip
        sections.append(Section(setting, header, rows, shape_domain(setting), list(measured)))
    for link, benchmark in collection.benchmarks.items():
        if benchmark["options"].get("limit"):
            sections.append(_longest_section(link, benchmark))
    return Table(
        "memory_speed",
        "Memory against speed",
        "One training step on random weights of the true shape; every method in a process of its own. The frontier are "
        "the methods that no other beats in both memory and time. GB are 10^9 bytes.",
        sections,
        remarks=_none_yet(sections, "bash scripts/rerun_memory.sh"),
    )


def _ratio(value: float, reference: float | None) -> Cell:
    return Cell(f"{value / reference:.2f}", value / reference) if reference else Cell("")


def _longest_section(link: str, benchmark: dict) -> Section:
    options = benchmark["options"]
    title = f"{options['shape']}, batch {options['batch']}: longest sequence within {options['limit']:g} GiB, {benchmark['device']}"
    rows = [
        [Cell(r["method"]), Cell(f"{r['longest_tokens']:,}", r["longest_tokens"]) if "longest_tokens" in r else Cell("failed"),
         Cell("", links=[("1", link)])]
        for r in benchmark["results"]
    ]  # fmt: skip
    return Section(
        title, ["method", "tokens", "runs"], rows, "llama", [r["method"] for r in benchmark["results"]]
    )


def step_profile_table(collection: Collection) -> Table:
    """What scripts/bench_memory.py --profile saw: the kernels of one step by what they do, one section for each file."""
    header = ["method", *(f"{kind} ms" for kind in (*KERNELS, "others")), "all ms", "ms a step", "runs"]
    sections = []
    for link, benchmark in collection.benchmarks.items():
        options = benchmark["options"]
        measured = [result for result in benchmark["results"] if "kernels" in result]
        if not options.get("profile") or not measured:
            continue
        rows = []
        for result in measured:
            times = dict.fromkeys((*KERNELS, "others"), 0.0)
            for kernel in result["kernels"]:
                times[kernel_kind(kernel["name"])] += 1000 * kernel["seconds"]
            numbers = [*times.values(), sum(times.values()), 1000 * result["step_seconds"]]
            rows.append([
                Cell(result["method"]), *(Cell(f"{ms:.1f}", ms) for ms in numbers), Cell("", links=[("1", link)])
            ])  # fmt: skip
        setting = (
            f"{options['shape']}, {options['batch']} x {tokens_of(benchmark)} tokens, {_where(benchmark)}"
        )
        methods = [result["method"] for result in measured]
        sections.append(Section(setting, header, rows, shape_domain(setting), methods))
    return Table(
        "step_profile",
        "Where a step's time goes",
        "Kernels of one step by what they do. Copies from and to the host run beside the others. The step of the last column was "
        "timed among others, without the profiler: on a GPU at its power limit it takes longer than the kernels of a single one.",
        sections,
        remarks=_none_yet(sections, "bash scripts/rerun_memory.sh --tasks llama3-8b-profile --seeds 1"),
    )


def kernel_kind(name: str) -> str:
    """What a kernel of this name does, one of `KERNELS` or "others"."""
    return next((kind for kind, names in KERNELS.items() if re.search(names, name.lower())), "others")


@dataclass
class Measured:
    """One method of the benchmark over its repeats: seconds a step and GB.

    `links` are all files that name it, `measured_in` those in which it did not fail, one for each value.
    """

    links: list[str] = field(default_factory=list)
    measured_in: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    trained: int = 0
    error: str = ""

    @property
    def seconds(self) -> Summary | None:
        return Summary.of(self.values.get("seconds", []))

    @property
    def over(self) -> Summary | None:
        return Summary.of(self.values.get("over", []))

    @property
    def static(self) -> Summary | None:
        return Summary.of(self.values.get("static", []))


def benchmark_settings(collection: Collection) -> dict[str, dict[str, Measured]]:
    """Setting -> method -> what was measured; files of one setting on one device are repeats of each other."""
    settings: dict[str, dict[str, Measured]] = {}
    for link, benchmark in collection.benchmarks.items():
        options = benchmark["options"]
        if options.get("limit") or options.get("profile"):
            continue
        setting = (
            f"{options['shape']}, {options['batch']} x {tokens_of(benchmark)} tokens, {_where(benchmark)}"
        )
        for result in benchmark["results"]:
            point = settings.setdefault(setting, {}).setdefault(result["method"], Measured())
            point.links.append(link)
            if "step_seconds" not in result:
                point.error = result.get("error", "no result")
                continue
            point.measured_in.append(link)
            point.trained = result["trained_parameters"]
            for name, value in (
                ("seconds", result["step_seconds"]),
                ("tokens", result["tokens_per_second"]),
                ("over", result["over_static_bytes"] / 1e9),
                ("static", result["static_bytes"] / 1e9),
            ):
                point.values.setdefault(name, []).append(value)
    return settings


def frontier_of(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other equals or beats in both coordinates (smaller is better), by the first one."""
    chosen, best = [], float("inf")
    for name, (_, second) in sorted(points.items(), key=lambda item: item[1]):
        if second < best:
            chosen.append(name)
            best = second
    return chosen


def tokens_of(benchmark: dict) -> int:
    """Tokens of each row as they were measured.

    Older files of a ViT note the option's default of 1,024 instead of the 197 that a ViT-B/16 has; what was measured is
    in the rate, which is batch times tokens over the seconds of a step.
    """
    options = benchmark["options"]
    for result in benchmark["results"]:
        if "step_seconds" in result:
            return round(result["tokens_per_second"] * result["step_seconds"] / options["batch"])
    return options["tokens"]


def shape_domain(shape: str) -> str:
    """The domain whose models have the shape, by its name or that of a setting, which begins with it."""
    name = shape.partition(",")[0]
    return next((domain for domain in ("vit", "roberta") if domain in name), "llama")


def _where(benchmark: dict) -> str:
    torch = torch_minor(benchmark.get("versions"))
    return benchmark["device"] + (f", torch {torch}" if torch else "")


# -- records of steps: QControl/quantized_memory.py and LlaMA/benchmark_methods.py -----------------------------------

#: Setting -> row (its labels) -> repeat -> (link, record).
Steps = dict[str, dict[tuple[str, ...], dict[str, tuple[str, RunRecord]]]]


def quantized_steps(collection: Collection) -> Steps:
    """Records of QControl/quantized_memory.py by method, weights and memory mode; a folder of cells is one repeat."""

    def place(record: RunRecord) -> tuple[str, tuple[str, ...]]:
        options = record.hyperparameters
        shape = f"{options['shape']}, {options['batch']} x {options['tokens']} tokens, {options['dtype']}"
        return shape, (record.method, options["weights"], options["mode"])

    return _steps(collection, "memory benchmark", place)


def shape_steps(collection: Collection) -> Steps:
    """Records of LlaMA/benchmark_methods.py by method and memory mode; a folder of cells is one repeat."""

    def place(record: RunRecord) -> tuple[str, tuple[str, ...]]:
        options, shape = record.hyperparameters, record.model["id"].removeprefix("random ")
        where = f"{shape}, {options['micro_batch_size']} x {options['cutoff']} tokens, {options['dtype']}"
        return where, (record.method, options["memory"])

    return _steps(collection, "shape benchmark", place)


def _steps(collection: Collection, kind: str, place: Callable) -> Steps:
    found: Steps = {}
    for link, record in collection.measurements.items():
        if measurement_kind(record) == kind:
            shape, labels = place(record)
            ranks = (
                f"ranks {record.hyperparameters['control_rank']} and {record.hyperparameters['lora_rank']}"
            )
            setting = ", ".join([shape, ranks, *_machine(record)])
            repeat = str(Path(link).parents[1])
            found.setdefault(setting, {}).setdefault(labels, {})[repeat] = (link, record)
    return found


def _machine(record: RunRecord) -> list[str]:
    torch = torch_minor(record.versions)
    return [record.device["name"], *([f"torch {torch}"] if torch else [])]


def peak_of(record: RunRecord) -> int | None:
    """Peak of the GPU's allocator in bytes; None on a CPU."""
    return record.memory.get("peak_allocated_bytes")


def alone(record: RunRecord) -> bool:
    """Whether no other process used the GPU, so that its times say something."""
    return not record.memory.get("other_processes_bytes")


def seconds_of(record: RunRecord) -> float | None:
    """Seconds a step; None on a GPU that others used."""
    return record.metrics["last"]["seconds_per_step"] if alone(record) else None


def _over(records: Iterable[RunRecord], value: Callable[[RunRecord], float | None], digits: int) -> Cell:
    values = [value(record) for record in records]
    return summary_cell(None if None in values else Summary.of(values), digits, "not measured")


def _mebibytes(name: str) -> Callable[[RunRecord], float | None]:
    def value(record: RunRecord) -> float | None:
        size = record.memory.get(name)
        return None if size is None else size / MEBI

    return value


def _links(links: Iterable[str]) -> Cell:
    return Cell("", links=[(str(number), link) for number, link in enumerate(links, 1)])


def _steps_table(
    name: str, title: str, about: str, labels: Sequence[str], steps: Steps, domain: Callable, command: str
) -> Table:
    header = [*labels, "trained parameters", "n", "weights MiB", "adapter + optimizer MiB", "activations MiB", "peak MiB",
              "ms a step", "tokens/s", "runs"]  # fmt: skip
    parts = ("weights_bytes", "adapter_and_optimizer_bytes", "activations_bytes")
    sections = []
    for setting, measured in steps.items():
        rows = []
        for row, repeats in measured.items():
            records = [record for _, record in repeats.values()]
            peak = _over(records, lambda r: peak_of(r) and peak_of(r) / MEBI, 0)
            if peak.value is None:
                peak = _over(records, _mebibytes("peak_resident_bytes"), 0)
                peak.notes.append(
                    "Resident memory of the whole process on a CPU, not comparable with a GPU's."
                )
            milliseconds = _over(records, lambda r: seconds_of(r) and 1000 * seconds_of(r), 1)
            if not all(map(alone, records)):
                milliseconds.notes.append("Not shown: other processes used the GPU at the same time.")
            trained = records[0].adapter["trainable_parameters"]
            rows.append([
                *map(Cell, row), Cell(f"{trained:,}", trained), Cell(str(len(records)), len(records)),
                *(_over(records, _mebibytes(part), 0) for part in parts), peak, milliseconds,
                _over(records, lambda r: r.time.get("tokens_per_second") if alone(r) else None, 0),
                _links(link for link, _ in repeats.values()),
            ])  # fmt: skip
        sections.append(Section(setting, header, rows, domain(setting), [row[0] for row in measured]))
    return Table(name, title, about, sections, remarks=_none_yet(sections, command))


def quantized_memory_table(collection: Collection) -> Table:
    """What QControl/quantized_memory.py measured, one section for each shape, batch and device."""
    return _steps_table(
        "quantized_memory",
        "Memory over quantized bases",
        "One training step on random weights of the true shape, whose frozen linear layers are stored as the column weights "
        "says; checkpointing is gradient checkpointing, the other modes are the control's.",
        ("method", "weights", "mode"),
        quantized_steps(collection),
        lambda setting: "qcontrol",
        "python -m QControl.quantized_memory --shape roberta-base, and --shape llama3-8b",
    )


def llama_shapes_table(collection: Collection) -> Table:
    """What LlaMA/benchmark_methods.py measured: the recipes' largest micro-batch at LLaMA's shapes."""
    return _steps_table(
        "llama_shapes",
        "LLaMA's shapes: the recipes' steps",
        "One training step on random weights of the true shape and the largest micro-batch that the launchers' recipes can "
        "meet: every row as long as the cutoff.",
        ("method", "memory mode"),
        shape_steps(collection),
        lambda setting: "llama",
        "python -m LlaMA.benchmark_methods --output_dir results/llama/shapes",
    )


# -- LlaMA/benchmark_throughput.py and LlaMA/evaluate.py --compare_batch_one ------------------------------------------


def model_name(record: RunRecord) -> str:
    """The last part of the model's id, or what a random one has the shape of."""
    return record.model["id"].rpartition("/")[2]


def grouped(collection: Collection, kind: str, key: Callable) -> dict[tuple, dict[str, RunRecord]]:
    """Measurements of a kind by `key(record)`, which leaves nothing but the repeat open."""
    found: dict[tuple, dict[str, RunRecord]] = {}
    for link, record in collection.measurements.items():
        if measurement_kind(record) == kind:
            found.setdefault(key(record), {})[link] = record
    return found


def throughputs(collection: Collection) -> dict[tuple, dict[str, RunRecord]]:
    """(model, method, memory mode, recipe, type, device, ...) -> link -> record of LlaMA/benchmark_throughput.py."""

    def key(record: RunRecord) -> tuple:
        options = record.hyperparameters
        recipe = f"{options['batch_size']} rows a step, at most {options['cutoff']} tokens each"
        mode = f"memory mode {options['memory']}"
        return (model_name(record), record.method, mode, recipe, options["dtype"], *_machine(record))

    return grouped(collection, "throughput", key)


def throughput_table(collection: Collection) -> Table:
    header = [
        "batching",
        "rows a step",
        "forwards a step",
        "attention",
        "n",
        "real tokens/s",
        "times published",
        "runs",
    ]
    sections = []
    for key, runs in throughputs(collection).items():
        rows = []
        for way, what in WAYS.items():
            results = [record.metrics["last"][way] for record in runs.values()]
            rows.append([
                Cell(f"{way}: {what}"), Cell(str(results[0]["rows_per_step"]), results[0]["rows_per_step"]),
                summary_cell(Summary.of([result["forwards_per_step"] for result in results]), 1),
                Cell(results[0]["attention"]), Cell(str(len(runs)), len(runs)),
                summary_cell(Summary.of([result["real_tokens_per_second"] for result in results]), 0),
                summary_cell(Summary.of([result["speedup"] for result in results]), 2), _links(runs),
            ])  # fmt: skip
        sections.append(Section(", ".join(key), header, rows, "llama", [key[1]] * len(rows)))
    return Table(
        "throughput",
        "Throughput of batching",
        "Real (non-padding) tokens a second of three ways to train on the same rows, measured in one process. Packed gives the "
        "published steps' gradients; large is another recipe with fewer, larger steps.",
        sections,
        remarks=_none_yet(
            sections,
            "python -m LlaMA.benchmark_throughput --shape llama3-8b --data commonsense_51k.json --output_dir "
            "results/llama/throughput-llama3-8b",
        ),
    )


def answer_batches(collection: Collection) -> dict[tuple, dict[str, RunRecord]]:
    """(model, method, batch size, quantization, type, device, ...) -> link -> record of --compare_batch_one."""

    def key(record: RunRecord) -> tuple:
        options, last = record.hyperparameters, record.metrics["last"]
        base = model_name(record)
        if options["quantization"] != "none":
            base += f", {options['quantization']}"
        return (
            base,
            record.method,
            f"{last['batch_size']} together",
            options["mode"],
            options["dtype"],
            *_machine(record),
        )

    return grouped(collection, "batches", key)


def batches_table(collection: Collection) -> Table:
    header = ["method", "batch", "mode", "n", "questions", "questions/s", "questions/s, one by one", "times one by one",
              "times published", "same answers %", "same as published %", "runs"]  # fmt: skip
    sections: dict[str, Section] = {}
    for (base, method, batch, mode, dtype, *machine), runs in answer_batches(collection).items():

        def over(name: str, digits: int, runs=runs) -> Cell:
            values = [record.metrics["last"].get(name) for record in runs.values()]
            return summary_cell(None if None in values else Summary.of(values), digits, "not measured")

        title = ", ".join([base, dtype, *machine])
        section = sections.setdefault(title, Section(title, header, [], "llama", []))
        section.rows.append([
            Cell(method), Cell(batch), Cell(mode), Cell(str(len(runs)), len(runs)), over("questions", 0),
            over("questions_per_second", 1), over("questions_per_second_batch_one", 2), over("speedup", 1),
            over("speedup_over_published", 1), over("answers_agree", 2), over("answers_agree_with_published", 2),
            _links(runs),
        ])  # fmt: skip
        section.methods.append(method)
    return Table(
        "batches",
        "Answers in batches",
        "The same commonsense questions answered in batches, one by one, and one by one without stopping early (as published), "
        "in one process. Same answers: in percent of the questions, against those of one by one.",
        list(sections.values()),
        remarks=_none_yet(
            list(sections.values()),
            "python -m LlaMA.evaluate --compare_batch_one 1000 --model MODEL --data DATA --output_dir results/llama/batches-NAME",
        ),
    )


# -- scripts/bench_scaling.py ---------------------------------------------------------------------------------


@dataclass
class Scaled:
    """One cell of the scaling benchmark over its repeats.

    `results` are by file; `efficiency` is the step time of one process over this one's, in percent, in the same file.
    """

    results: dict[str, dict] = field(default_factory=dict)
    efficiency: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def values(self, name: str) -> list[float]:
        return [result[name] for result in self.results.values() if result.get(name) is not None]

    def summary(self, name: str, scale: float = 1) -> Summary | None:
        return Summary.of([value / scale for value in self.values(name)])


def scaling_settings(collection: Collection) -> dict[str, dict[tuple[str, str, int], Scaled]]:
    """Setting -> (method, shard, processes) -> what was measured; methods in the order of the files, then by size."""
    settings: dict[str, dict[tuple[str, str, int], Scaled]] = {}
    for link, benchmark in collection.scalings.items():
        options = benchmark["options"]
        if options.get("longest"):  # from whichever length on it was looked for
            what = f"{options['shape']}, longest sequence, batch {options['batch']} a process"
        else:
            what = f"{options['shape']}, {options['batch']} x {options['tokens']} tokens a process"
        cells = settings.setdefault(f"{what}, {_where(benchmark)}", {})
        single = {(r["method"], r["shard"]): r for r in benchmark["results"] if r["processes"] == 1}
        for result in benchmark["results"]:
            cell = cells.setdefault((result["method"], result["shard"], result["processes"]), Scaled())
            if "error" in result:
                cell.error = result["error"]
                continue
            cell.results[link] = result
            alone = single.get((result["method"], result["shard"]), {})
            if result["processes"] > 1 and "step_seconds" in result and "step_seconds" in alone:
                cell.efficiency[link] = 100 * alone["step_seconds"] / result["step_seconds"]
    for setting, cells in settings.items():
        methods = list(dict.fromkeys(method for method, _, _ in cells))
        settings[setting] = dict(
            sorted(cells.items(), key=lambda item: (methods.index(item[0][0]), *item[0][1:]))
        )
    return settings


def scaling_table(collection: Collection) -> Table:
    sections = []
    for setting, cells in scaling_settings(collection).items():
        longest = any(cell.values("longest_tokens") for cell in cells.values())
        figures = ["longest tokens"] if longest else ["tokens/s", "efficiency %", "peak GB each", "sent MB each", "losses apart"]  # fmt: skip
        rows = []
        for (method, shard, processes), cell in cells.items():
            if longest:
                shown = [summary_cell(cell.summary("longest_tokens"), 0, "")]
                ends = {result["ended_by"] for result in cell.results.values() if "ended_by" in result}
                shown[0].notes += [
                    f"{method}, {shard}, {processes}: the next attempt ended by {end}." for end in ends
                ]
            else:
                apart = max(cell.values("loss_distance"), default=None)
                shown = [
                    summary_cell(cell.summary("tokens_per_second"), 0, ""),
                    summary_cell(Summary.of(list(cell.efficiency.values())), 1, ""),
                    summary_cell(cell.summary("peak_bytes_per_process", 1e9), 2, ""),
                    summary_cell(cell.summary("sent_bytes_per_process", 1e6), 1, ""),
                    Cell("") if apart is None else Cell(f"{apart:.1e}", apart),
                ]
            if not cell.results:
                shown[0] = Cell("failed", notes=[f"{method}, {shard}, {processes}: {cell.error}."])
            count = len(cell.results)
            rows.append([
                Cell(method), Cell(shard), Cell(str(processes), processes), Cell(str(count), count), *shown, _links(cell.results)
            ])  # fmt: skip
        header = ["method", "sharding", "processes", "n", *figures, "runs"]
        sections.append(Section(setting, header, rows, "llama", [method for method, _, _ in cells]))
    return Table(
        "scaling",
        "Scaling over GPUs",
        "Weak scaling: every process has the same work. Efficiency is the step time of one process over that of so many; ddp "
        "keeps the frozen weights on every GPU, fsdp2 shards them. Losses apart: the largest relative distance from one process "
        "that accumulates the same global batch.",
        sections,
        remarks=_none_yet(sections, "bash scripts/bench_scaling.sh"),
    )
