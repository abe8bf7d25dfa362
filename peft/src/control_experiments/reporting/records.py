"""Every record below a results folder as one DataFrame, a row for each run or measurement; and the paper's figures.

Columns (missing where a kind has no such thing); benchmarks of steps and scaling have those of their own files too:

- `whose`: "ours" (shipped, below `published/`), "yours" (any other run of such a folder), or who published a figure.
- `kind`: "run" (a training with its scores), "search" (a run that chose a learning rate), "step" (scripts/bench_memory.py),
  "longest", "length" and "profile" (its --limit, --speed_at and --profile), "throughput", "batches", "padding" and "scaling".
- `links`: (text, file) of the records behind the row, files relative to the results folder.
- `domain`, `section` (model and setting: a heading of a table), `place` (the same without a step's shape), `task`, `row` (method with
  what else tells rows apart), `method`, `seed`, `n` (1 for a record).
- `last`, `best` and the commonsense test sets: percent. `trained`: parameters. `peak`: bytes. `seconds`: of the training. `rate`:
  examples or tokens a second.
- `base`: how frozen weights are stored, of a step bf16 and of a run none if nothing is said. `gib`: its peak in GiB. Of weights that wait on the host: `host` bytes, `copies` seconds a step to copy them, `resident_*` of the
  same method without, `floor` (the longer of both times) and `times_floor`. `card`: GB of the card that gives an allocator `limit_gib`.
- `shared`, `own`: conditions that all runs of a comparison, or all seeds of a row, must have in common.
- `problem`: why the record must not be shown, and `usable`: whether all of its row may be. `notes`: what a reader has to know.
- `record`, `folder`: the RunRecord and where it lies, for what only pictures and statistics need.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..errors import UserError
from ..paths import SEARCH_FOLDER
from ..record import RunRecord, read_json, read_record
from .pictures import CARDS

#: Folders whose runs belong to no comparison of methods: a demonstration, runs that vary settings, and our own tables.
LEFT_OUT = ("quickstart", "ablations", "mine", "logs")
#: Columns that exist whatever there are records of.
_TEXTS = "whose kind domain section place task row base method mode way shard error ended_by problem".split()  # noqa: SIM905
_NUMBERS = """n seed last best trained lr peak allocated seconds rate repeat timed sequences tokens limit_gib card longest_tokens
processes efficiency step_seconds tokens_per_second peak_bytes over_static_bytes
adapter_and_optimizer_bytes copies resident_peak_bytes resident_step_seconds floor""".split()  # noqa: SIM905
_OBJECTS = "links notes shared own record folder".split()  # noqa: SIM905
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
#: Columns of the commonsense tables, in the paper's order.
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa", "average")
UNQUANTIZED = "not quantized"
#: A GPU's tables of the host memory that it reads, as a share of it: they are no other process.
PAGE_TABLES = 1 / 256
SHARED_GPU = "Not shown: other processes used the GPU at the same time."
RESIDENT = "Resident memory of the whole process on a CPU, not comparable with a GPU's."
#: Ranks that need no mention in a method's label; other domains always mention them.
_USUAL_RANKS = {"roberta": (16, 8), "qcontrol": (16, 8), "vit": (16, 1)}
#: LLaMA's records name their targets always: those of the recipes need no mention.
_RECIPE_TARGETS = ({"q_proj", "k_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"})
#: Hyperparameters in which methods may differ from each other, but seeds of one method may not.
_METHODS_OWN = ("lr", "memory", "cuda_graphs", "stream_weights", "gradient_checkpointing", "shard", "lora_", "control_")
#: Hyperparameters that change neither what is learned nor what it costs, or that name what is compared. (Which adapter was
#: saved older records do not say: the step stands with the adapter.)
_NEUTRAL = ("method", "seed", "task", "data", "model", "limit", "mode", "quantization", "mlp_layers", "save")
#: What a kernel does -> how the names of such kernels are recognised, in this order.
KERNELS = {
    "attention_kernels": "flash|fmha|attention",
    "matmuls": "gemm|nvjet|cutlass|xmma|splitk|::mm$|::addmm|::bmm",
    "control and residual sums": "add_low_rank",
    "norms, activations, positions, loss": "norm|swiglu|silu|gelu|rope|rotary|softmax|cross_entropy",
    "host copies": "memcpy (dtoh|htod)",
    "optimizer": "adam|multi_tensor",
    "others": "",
}
#: Ways of batching in LlaMA/benchmark_throughput.py, and what they are.
WAYS = {"published": "the published micro-batches, padded", "packed": "the same steps, packed", "large": "packed, more rows a step"}  # fmt: skip


def load(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """All records below `root`, and a line for each that is left out. Raises UserError: `root` is no folder; never for a
    broken file."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one that holds the runs (default: results)")
    shipped = (root / "published").is_dir()
    rows, problems = [], []
    for path in sorted(root.rglob("*.json")):
        file = path.relative_to(root)
        own = not shipped or file.parts[0] == "published"
        place = file.parts[1:] if shipped and own else file.parts
        if len(place) < 2 or set(place) & set(LEFT_OUT):
            continue
        common = {"whose": "ours" if own else "yours", "n": 1, "notes": (), "files": [("", path.name)]}
        try:
            for row in _rows(path, place):
                links = [(text, (file.parent / part).as_posix()) for text, part in (common | row)["files"]]
                rows.append(common | row | {"links": links})
        except UserError as error:
            problems.append(str(error).replace(str(path), file.as_posix()))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            problems.append(f"{file.as_posix()} is a broken record ({error} is missing): delete it and run again")
    columns = dict.fromkeys([*_TEXTS, *_NUMBERS, *_OBJECTS, *(name for row in rows for name in row)])
    frame = pd.DataFrame(rows, columns=list(columns)).astype(dict.fromkeys(_NUMBERS, float)).copy()
    frame[_TEXTS] = frame[_TEXTS].astype(object).where(frame[_TEXTS].notna(), "")
    frame = _without_stopped(frame)
    problems += _mark_unequal(frame)
    row = [frame[name] for name in ("whose", "kind", "domain", "section", "task", "row")]
    frame["usable"] = ~(frame.problem != "").groupby(row).transform("any") if len(frame) else True
    return _beside_resident(frame), problems


def _rows(path: Path, place: tuple[str, ...]) -> Iterator[dict]:
    """What one JSON file holds, by where it lies and what it says."""
    top, name = place[0], path.name
    if name == "record.json":
        record, above = read_record(path), path.parents[1] / name
        if above.is_file() and _evaluates(record, read_record(above)):
            return  # read with its training
        compares = record.task == "throughput" or "questions_per_second_batch_one" in (record.metrics.get("last") or {})
        yield from _ways(record) if compares else _run(path, record, place)
    elif top in ("memory", "scaling") or name.startswith("benchmark_padding"):
        yield from {"memory": _steps, "scaling": _scaling}.get(top, _padding)(read_json(path))


# -- runs: one training each ----------------------------------------------------------------------------------


def _evaluates(record: RunRecord, training: RunRecord) -> bool:
    """Whether a record below a training's holds scores of what it answers; a LLaMA has one for each way of answering."""
    llama = record.task.startswith("commonsense") and training.task.startswith("commonsense")
    return llama and bool(training.history and not record.history and _scores(record, "last"))


def _run(path: Path, record: RunRecord, place: tuple[str, ...]) -> Iterator[dict]:
    """A training with its scores, a row for each evaluation that lies below it."""
    below = [(file, read_record(file)) for file in sorted(path.parent.glob("*/record.json"))]
    found = [(file, scored) for file, scored in below if _evaluates(scored, record)]
    # a ViT's without a history is a test of another's adapter
    if not found and _scores(record, "last") and (record.domain != "vit" or record.history):
        found = [(path, record)]
    for file, scored in found:
        row = _scored(record, scored, place)
        answers = [("answers", file.relative_to(path.parent).as_posix())] if file != path else []
        yield row | {"files": [(str(record.seed), path.name), *answers], "folder": file.parent}


def _scored(record: RunRecord, scored: RunRecord, place: tuple[str, ...]) -> dict:
    llama, options, memory, time = record.task.startswith("commonsense"), record.hyperparameters, record.memory, record.time
    domain = "llama" if llama else "qcontrol" if place[0] == "qcontrol" else record.domain
    quantization, limit = options.get("quantization") or "none", scored.hyperparameters.get("limit")
    model = record.model.get("class") if domain == "vit" else None  # a ViT's weights come under many file names
    section = [
        (model or str(record.model["id"]).rpartition("/")[2]).lower(),
        quantization if quantization != "none" else UNQUANTIZED if domain == "qcontrol" else "",
        f"{options.get('mlp_layers', 2)}-layer MLP" if domain == "vit" else "",
        f"{options['image_size']} pixels" if options.get("image_size", 224) != 224 else "",
        "AdamW" if domain == "vit" and options.get("optimizer") == "adamw" else "",
        f"first {limit} questions" if limit else "",
        "ranked by likelihood" if scored.task == "commonsense-likelihood" else "",
    ]
    resumed, measured = time.get("resumed_from_step") is not None, memory.get("peak_allocated_bytes")
    alone = not (record.device.get("kind") == "cuda" and memory.get("other_processes_bytes"))
    notes = {
        RESIDENT: not measured and memory.get("kind") == "resident set",
        f"{record.name} was resumed, so its record covers only a part of the memory and time.": resumed,
        SHARED_GPU: not alone,
    }
    timed, counted = not resumed and alone, "tokens" if llama else "examples"
    shared, own = _conditions(record, scored if scored is not record else None)
    return {
        "kind": "search" if SEARCH_FOLDER in place else "run", "domain": domain, "task": "commonsense" if llama else record.task,
        "section": ", ".join(filter(None, section)), "row": _label(domain, record.method, options),
        "base": quantization, "method": record.method, "seed": record.seed, **_scores(scored, "last"), "best": _scores(scored, "best")["last"],
        "trained": record.adapter.get("trainable_parameters"), "lr": options.get("lr"), "no_match": scored.metrics["last"].get("no_match"),
        "peak": (not resumed and (measured or memory.get("peak_resident_bytes"))) or None,
        "allocated": (not resumed and measured) or None, "seconds": (timed and time.get("train_seconds")) or None,
        "rate": (timed and time.get(f"{counted}_per_second")) or None, "shared": shared, "own": own,
        "notes": tuple(note for note, holds in notes.items() if holds), "record": record,
    }  # fmt: skip


def _scores(record: RunRecord, which: str) -> dict[str, float] | None:
    """{"last": percent, and the commonsense test sets}, or None for a record that holds no score of a task."""
    metrics = record.metrics.get(which)
    if not isinstance(metrics, dict):
        return None
    for name, scale in (("score", 100), ("test_accuracy", 1), ("average", 1)):
        if isinstance(metrics.get(name), float):
            return {"last": scale * metrics[name]} | {name: metrics[name] for name in COMMONSENSE if name in metrics}
    return None


def _label(domain: str, method: str, options: dict) -> str:
    """A method's name with what tells its rows apart: ranks other than the domain's usual ones, a control's alpha, memory mode,
    shards."""
    ranks = []
    for part, usual in zip(("control", "lora"), _USUAL_RANKS.get(domain, (None, None))):
        rank = options.get(f"{part}_rank")
        if (part in method or (part == "lora" and "dora" in method)) and rank not in (None, usual):
            ranks.append("matched" if rank == 0 else f"r{rank}")
    targets = options.get("lora_targets") or []
    alpha = options.get("control_alpha") if "control" in method else None
    parts = [
        " ".join([method, "+".join(ranks)]).strip(),
        f"alpha {alpha:g}" if alpha not in (None, 1) else "",
        f"on {'+'.join(targets)}" if targets and set(targets) not in _RECIPE_TARGETS else "",
        options.get("memory") if options.get("memory") != "plain" else "",
        "graphs" if options.get("cuda_graphs") else "",
        "streamed" if options.get("stream_weights") else "",
        "checkpointing" if options.get("gradient_checkpointing") else "",
        options.get("shard"),
    ]
    return ", ".join(filter(None, parts))


def _conditions(record: RunRecord, evaluation: RunRecord | None) -> tuple[dict[str, str], dict[str, str]]:
    """(what all runs of a comparison share, what seeds of one method share), as texts."""
    llama = record.task.startswith("commonsense")
    # the paper's recipe for LLaMA-2-7B has another batch for control+lora than for double control
    methods_own = (*_METHODS_OWN, "batch_size") if llama else _METHODS_OWN
    settled = {name: str(value) for name, value in record.hyperparameters.items()}
    own = {name: value for name, value in settled.items() if name.startswith(methods_own)}
    shared = {name: value for name, value in settled.items() if name not in (*own, *_NEUTRAL)}
    if record.method == "shadow":  # its own network reads dense masks, so no other kernel of attention can run it
        shared.pop("attention", None)
    for name, what in (("model", record.model), ("data", record.data)):
        shared[name] = str(what.get("sha256") or what.get("revision"))[:12]
    asked = shared if llama else {}  # zero-shot: nothing of it is training
    if evaluation or not llama:
        shared |= {"device": record.device["name"], "torch": ".".join(str(record.versions.get("torch")).split(".")[:2])}
    if evaluation:
        asked = {name: str(value) for name, value in evaluation.hyperparameters.items() if name not in _NEUTRAL}
        asked["data"] = str(evaluation.data.get("sha256"))[:12]
    asked = {f"evaluation {name}": value for name, value in asked.items() if name != "batch_size"}
    return (shared | asked if evaluation or not llama else asked), own


def _mark_unequal(frame: pd.DataFrame) -> list[str]:
    """Equal conditions: within a comparison one value of each shared condition, within a row of each own one and one run
    a seed. Rows with a run that differs get a `problem`; returned are the problems."""
    found: dict[int, str] = {}
    runs, keys = frame[frame.kind == "run"], ["whose", "domain", "section", "task", "row"]
    others = {"shared": "the others of its comparison", "own": "other seeds of its row"}
    for what, places in (("shared", keys[:-1]), ("own", keys)):
        for _, group in runs.groupby(places):
            conditions = pd.DataFrame(list(group[what]), index=group.index)
            usual = conditions.mode().reindex([0]).loc[0]
            wrong = conditions.notna() & (conditions != usual)
            for index in group.index[wrong.any(axis=1)]:
                name = wrong.loc[index].idxmax()
                differs = f"with {name} {conditions[name][index]}, {others[what]} with {usual[name]}"
                remedy = "run it again under equal conditions, or move it to another results folder"
                found.setdefault(index, f"{group.links[index][0][1]} was run {differs}: {remedy}")
    for (*_, row, seed), group in runs[runs.duplicated([*keys, "seed"], keep=False)].groupby([*keys, "seed"]):
        files = " and ".join(links[0][1] for links in group.links)
        found |= dict.fromkeys(group.index, f"{files} both claim {row} with seed {seed}: delete one of them")
    frame.loc[list(found), "problem"] = list(found.values())
    return list(dict.fromkeys(found.values()))


# -- measurements: steps, batches, scaling --------------------------------------------------------------------


def _where(device: str, versions: dict | None) -> str:
    """Where something was measured: device and torch without its patch, such as 2.14, if it was noted."""
    version = (versions or {}).get("torch")
    return f"{device}, torch {'.'.join(version.split('.')[:2])}" if version else device


def _steps(file: dict) -> Iterator[dict]:
    """A file of scripts/bench_memory.py: a row for each method and repeat."""
    o, where = file["options"], _where(file["device"], file.get("versions"))
    shape = o["shape"]
    setting = file.get("setting") or "{shape}, {batch} x {tokens} tokens".format(**o)
    section, place = f"{shape}, batch {o['batch']}" if o.get("limit") else setting, re.sub(r", \d+ x \d+ tokens", "", setting)
    common = {"section": f"{section}, {where}", "place": f"{place}, {where}", "task": shape, "sequences": o["batch"]}
    common["domain"] = next((name for name in ("vit", "roberta") if name in shape), "llama")
    for result in file["results"]:
        name, memory = result["method"], result.get("memory") or {}
        name += ":plain" if "control" in name and ":" not in name else ""
        name = re.sub(r"\+(fp8|nf4|bf16)((?:\+\w+)+)", r"\2+\1", name)  # the base last, wherever it was given
        waiting = result.get("streaming") or {}
        shared = (memory.get("other_processes_bytes") or 0) > PAGE_TABLES * waiting.get("bytes", 0)
        if result.get("peak_is") == "reserved":  # a graph's activations were allocated when it was made
            memory = memory | {"activations_bytes": None}
        row = {"tokens": o["tokens"], "host": waiting.get("bytes"), "copies": waiting.get("floor_seconds")} | memory | result
        row |= common | {"row": name, "gib": result["peak_bytes"] / 2**30 if result.get("peak_bytes") else None}
        row["base"] = next((part for part in re.split("[+:]", name) if part in ("nf4", "fp4", "int8", "fp8")), "bf16")
        if "tokens" in result:
            unfit = {} if result.get("fits", True) else {"error": f"{result['tokens']:,} tokens do not fit on this GPU"}
            yield from _repeats(row | {"kind": "length"} | unfit, result)
        elif limit := result.get("limit_gib"):
            ended = f"{name} within {limit:g} GiB: no longer sequence than {o.get('up_to', 0):,} tokens was tried."
            card = next((card for card in CARDS if limit <= card), limit)
            yield row | {"kind": "longest", "card": card, "notes": (ended,) if "ended_by" in result else ()}
        elif "step_seconds" not in result:
            if not o.get("profile"):
                yield row | {"kind": "step", "error": result.get("error", "no result")}
        elif o.get("profile"):
            kinds = dict.fromkeys(KERNELS, 0.0)
            for kernel in result["kernels"]:
                kinds[next(kind for kind in KERNELS if re.search(KERNELS[kind], kernel["name"].lower()))] += kernel["seconds"]
            yield row | kinds | {"kind": "profile", "all": sum(kinds.values())}
        else:
            yield from _repeats(row | {"kind": "step", "notes": (SHARED_GPU,) if shared else ()}, result, shared)


def _repeats(row: dict, result: dict, shared: bool = False) -> Iterator[dict]:
    """A row for each time that was measured, without times where others shared the GPU."""
    whole = result.get("step_seconds")
    for number, seconds in enumerate(result.get("step_seconds_repeats") or [whole]):
        timed = {"step_seconds": seconds, "tokens_per_second": seconds and result["tokens_per_second"] * whole / seconds}
        yield row | (dict.fromkeys(timed) if shared else timed) | {"repeat": number}


def _beside_resident(frame: pd.DataFrame) -> pd.DataFrame:
    """Steps whose weights wait on the host, beside the same step without (its files too), and the floor under both. What was not
    measured only lowers the floor."""
    steps, key = frame[frame.kind.isin(("step", "length"))], ["kind", "whose", "place", "sequences", "tokens", "twin"]
    steps = steps.assign(twin=steps.row.str.replace(r"\+(streamed3?|onboard|bf16)\b", "", regex=True))
    waits = steps.row.str.contains("+streamed", regex=False)
    how = {"peak_bytes": "max", "step_seconds": "mean", "links": "sum"}
    found = steps.loc[waits, [*key, "copies"]].join(steps[~waits].groupby(key).agg(how).add_prefix("resident_"), on=key)
    found["floor"] = found[["copies", "resident_step_seconds"]].max(axis=1)
    frame.update(found[["resident_peak_bytes", "resident_step_seconds", "floor"]])
    for index, links in found.resident_links.dropna().items():
        frame.at[index, "links"] = frame.at[index, "links"] + links
    return frame.assign(times_floor=frame.step_seconds / frame.floor)


def _without_stopped(frame: pd.DataFrame) -> pd.DataFrame:
    """Without searches that --up_to ended where another method over the same base went further: they say nothing of a limit."""
    alike = [frame[name] for name in ("whose", "section", "limit_gib", "base")]
    furthest = frame.longest_tokens.groupby(alike).transform("max")
    stopped = (frame.kind == "longest") & (frame.ended_by == "--up_to") & (frame.longest_tokens < furthest)
    return frame[~stopped].reset_index(drop=True)


def _ways(record: RunRecord) -> Iterator[dict]:
    """Ways of batching (LlaMA/benchmark_throughput.py) or of answering (evaluate.py --compare_batch_one), measured in one process."""
    o, last, model = record.hyperparameters, record.metrics["last"], record.model["id"].rpartition("/")[2]
    where, shared = _where(record.device["name"], record.versions), record.memory.get("other_processes_bytes")
    row = {
        "domain": record.domain, "task": model, "row": record.method, "method": record.method, "mode": o.get("mode"), "record": record,
        "timed": not shared and record.device.get("kind") == "cuda", "notes": (SHARED_GPU,) if shared else (),
    }  # fmt: skip
    if record.task != "throughput":
        base = model if o["quantization"] == "none" else f"{model}, {o['quantization']}"
        row |= {"section": f"{base}, {o['dtype']}, {where}", "batch": f"{last['batch_size']} together"}
        yield row | last | {"kind": "batches"}
        return
    recipe = f"{o['batch_size']} rows a step, at most {o['cutoff']} tokens each, {o['dtype']}"
    row["section"] = f"{model}, {record.method}, memory mode {o['memory']}, {recipe}, {where}"
    for way, what in WAYS.items():
        yield row | last[way] | {"kind": "throughput", "way": f"{way}: {what}"}


def _padding(file: dict) -> Iterator[dict]:
    model, epoch = file["settings"]["model"], "seconds_per_epoch"
    yield {"kind": "padding", "domain": "roberta", "section": f"{model} on {file['device']['name']}", "task": model,
           "seconds": file["longest"][epoch], "baseline": file["max_length"][epoch]}  # fmt: skip


def _scaling(file: dict) -> Iterator[dict]:
    """A file of scripts/bench_scaling.py; in percent `efficiency` is the step time of one process over this one's, and `share` the peak
    over LoRA's."""
    o, results, size = file["options"], file["results"], "peak_bytes_per_process"
    what = f"longest sequence, batch {o['batch']}" if o.get("longest") else f"{o['batch']} x {o['tokens']} tokens"
    what += f", within {o['limit']:g} GiB" if o.get("limit") else ""
    section = f"{o['shape']}, {what} a process, {_where(file['device'], file.get('versions'))}"
    alone = {(r["method"], r["shard"]): r.get("step_seconds") for r in results if r["processes"] == 1}
    lora = {(r["shard"], r["processes"]): r.get(size) for r in results if r["method"] == "lora"}
    for r in results:
        method, shard, processes = (r[name] for name in ("method", "shard", "processes"))
        row = {"kind": "scaling", "domain": "llama", "section": section, "row": method, "task": o["shape"]} | r
        if (single := alone.get((method, shard))) and r.get("step_seconds") and processes > 1:
            row["efficiency"] = 100 * single / r["step_seconds"]
        if (other := lora.get((shard, processes))) and r.get(size):
            row["share"] = 100 * r[size] / other
        if "ended_by" in r:
            row["notes"] = (f"{method}, {shard}, {processes}: the next attempt ended by {r['ended_by']}.",)
        yield row


# -- the paper ------------------------------------------------------------------------------------------------


class Paper(NamedTuple):
    """results/paper.json: `figures` (a row each, with its status "exact" or "inferred") and doubts about them."""

    figures: pd.DataFrame
    weaknesses: list[str]


def read_paper(path: Path) -> Paper:
    """Read results/paper.json; `figures` gets a column `text`: value, spread as it was printed, and status. Raises
    UserError: it is missing, or no JSON."""
    contents = read_json(path)
    figures = pd.DataFrame(contents["figures"]).astype({"value": float})
    return Paper(figures.assign(text=[_published(figure) for figure in figures.itertuples()]), contents["known_weaknesses"])


def beside_published(frame: pd.DataFrame, paper: Paper) -> pd.DataFrame:
    """With column `times_published`: LLaMA-3-8B's longest sequences, one a step, over those that are published for the card."""
    figures = paper.figures[paper.figures.table == "longest"]
    published = frame.card.map(dict(zip(figures.column.astype(int), figures.value)))
    ours = (frame.kind == "longest") & (frame.task == "llama3-8b") & (frame.sequences == 1)
    return frame.assign(times_published=(frame.longest_tokens / published).where(ours))


def _published(figure) -> str:
    spread = "" if pd.isna(figure.spread_as_printed) else f" ± {figure.spread_as_printed:g}"
    form = ",.0f" if figure.value >= 1000 else ".2f" if figure.unit == "%" else "g"
    return f"{figure.value:{form}}{spread}{'' if figure.unit == '%' else f' {figure.unit}'} ({figure.status})"
