"""make_tables.py on folders of records: figures by hand, published figures, and folders that are broken."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial, reduce

import matplotlib
import pandas as pd
import pytest

from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.record import read_json
from control_experiments.reporting.page import draw
from control_experiments.reporting.records import load, read_paper
from control_experiments.reporting.tables import SPECIFICATIONS, Table, make_table

PAPER = read_paper(RESULTS / "paper.json")


def table(results, name) -> Table:
    return make_table(name, load(results.path)[0], PAPER)


def sections(results, name) -> dict:
    return {section.title: section for section in table(results, name).sections}


def rows(results, name, section, *columns, **where) -> list:
    """The rows of a section as {header: text}, those with the texts in `where`; of `columns` the texts alone."""
    lines = sections(results, name)[section].shown.to_dict("records")
    found = [line for line in lines if all(line[key] == value for key, value in where.items())]
    return [tuple(line[column] for column in columns) for line in found] if columns else found


def row(results, name, section, *columns, **where):
    (line,) = rows(results, name, section, *columns, **where)
    return line


def notes(results, name, section) -> list[str]:
    return sections(results, name)[section].notes


def problems(results) -> list[str]:
    return load(results.path)[1]


# -- figures ----------------------------------------------------------------------------------------------------


#: Where figures of a table of runs stand in a record, and in what unit; of training steps in a result of a benchmark's file.
RUNS = {
    "trained parameters": ("adapter.trainable_parameters", 1),
    "peak MiB": ("memory.peak_allocated_bytes", 2**-20),
    "train s": ("time.train_seconds", 1),
}
SCORES = {"last": ("metrics.last.score", 100), "best": ("metrics.best.score", 100)}
STEPS = {
    "trained parameters": ("trained_parameters", 1),
    "weights GB": ("static_bytes", 1e-9),
    "over weights GB": ("over_static_bytes", 1e-9),
    "activations MiB": ("memory.activations_bytes", 2**-20),
    "peak MiB": ("peak_bytes", 2**-20),
    "ms a step": ("step_seconds", 1e3),
}
MEANS = {
    "glue": RUNS | SCORES,
    "quantized": RUNS | SCORES,
    "vit_accuracy": RUNS | {"last": ("metrics.last.test_accuracy", 1), "best": ("metrics.best.test_accuracy", 1)},
    "commonsense": {name.replace("_", " "): (f"metrics.last.{name}", 1) for name in ("average", "boolq", "no_match")},
    **dict.fromkeys(("memory_speed", "quantized_memory", "vit_memory", "llama_shapes"), STEPS),
    "longest": {"longest tokens": ("longest_tokens", 1)},
    "length_speed": {"s a step": ("step_seconds", 1), "peak GB": ("peak_bytes", 1e-9)},
    "scaling": {"tokens/s": ("tokens_per_second", 1), "peak GB each": ("peak_bytes_per_process", 1e-9)},
}
#: Columns that tell a file's results apart.
KEYS = {"tokens": "tokens", "GiB": "limit_gib", "sharding": "shard", "processes": "processes"}


def shipped(name: str) -> pd.DataFrame:
    """The rows of a tracked table that show records; a text in the place of a figure is NaN."""
    rows = pd.read_csv(RESULTS / "tables" / f"{name}.csv").query("whose == 'ours' and n > 0")
    figures = rows.columns.difference(["section", "method", "sharding", "runs"])
    return rows.assign(**rows[figures].apply(pd.to_numeric, errors="coerce"))


def parts(method: str) -> list[str]:
    """A benchmark's method by its switches, whose order has changed."""
    return sorted(re.split("[+:]", method.removesuffix(":plain")))


def measured(row: dict) -> list[dict]:
    """The records that a row links to, or of a benchmark's file its results; a result's repeats count each."""
    found = []
    for record in (read_json(RESULTS / file) for file in row["runs"].split()):
        results = [one for one in record.get("results", ()) if parts(one["method"]) == parts(row["method"])]
        options = record.get("options", {})
        tokens = None if options.get("limit") else options.get("tokens")  # the longest sequences are of no number of them
        for key in row.keys() & KEYS.keys():
            results = [one for one in results if {"tokens": tokens, **one}.get(KEYS[key]) == row[key]]
        for one in results if "results" in record else [record]:
            found += [{**one, "step_seconds": s} for s in one.get("step_seconds_repeats", ())] or [one]
    return found


@pytest.mark.parametrize("name", MEANS)
def test_shipped_figures_are_means_and_sample_deviations_of_the_records_that_they_link_to(name):
    checked = 0
    for row in shipped(name).to_dict("records"):
        records = measured(row)
        for header, (place, factor) in MEANS[name].items():
            if pd.notna(row.get(header)):
                values = [reduce(lambda part, key: (part or {}).get(key), place.split("."), record) for record in records]
                values = [factor * value for value in values if value is not None]
                assert row[header] == pytest.approx(statistics.fmean(values)), (row["runs"], header)
                if len(values) > 1:
                    assert row[f"{header} sd"] == pytest.approx(statistics.stdev(values), abs=1e-6), (row["runs"], header)
                checked += 1
    assert checked > 5


def test_shipped_ratios_are_those_of_their_columns():
    for _, rows in shipped("memory_speed").groupby("section"):
        loras = rows[rows.method.str.startswith("lora")]
        for ratio, figure in (("time / fastest LoRA", "ms a step"), ("memory / leanest LoRA", "over weights GB")):
            assert rows[ratio].tolist() == pytest.approx((rows[figure] / loras[figure].min()).tolist(), nan_ok=True)
    rows = shipped("streaming")
    assert rows["floor ms"].tolist() == pytest.approx(rows[["copies ms", "resident ms"]].max(axis=1).tolist(), nan_ok=True)
    assert rows["times the floor"].tolist() == pytest.approx((rows["ms a step"] / rows["floor ms"]).tolist(), nan_ok=True)


def test_published_figures_stand_below_ours_with_their_status(results):
    results.roberta("control", 42, 0.6, model="roberta-base")
    ours, paper = rows(results, "glue", "roberta-base", task="cola", method="control")
    assert (ours["whose"], ours["best"]) == ("ours", "60.00")
    assert (paper["whose"], paper["best"], paper["last"]) == ("paper", "65.32 ± 0.44 (exact)", "not published")
    assert "Published: roberta-base, lora: peak memory 14.03 GB (inferred)." in table(results, "glue").remarks
    at_scale = "vit_base_patch16_224, 4-layer MLP"
    lora = row(results, "vit_accuracy", at_scale, method="lora", whose="paper")
    assert lora["peak MiB"] == "17,067 MiB (exact)"
    assert "Wall time of the whole run, evaluations included." in notes(results, "vit_accuracy", at_scale)
    data = sections(results, "vit_accuracy")[at_scale].data.query("whose == 'paper' and method == 'lora'")
    assert (lora["trained parameters"], *data["trained parameters"]) == ("0.32 M (exact)", 320_000)


def test_rows_and_sections_are_what_was_measured_told_apart_by_rank_alpha_and_mode(results):
    """What was measured comes first, the paper's scale without records last; a method with other ranks has no empty row beside it."""
    for options, last in (({}, 0.5), ({"control_rank": 64}, 0.6), ({"memory": "lean"}, 0.7), ({"control_alpha": 0.5}, 0.8)):
        results.roberta("control", 1, last, folder=f"run{last}", **options)
    shown = {line["method"]: line["last"] for line in rows(results, "glue", "tiny-encoder")}
    assert (shown["control"], shown["control r64"], shown["control, lean"]) == ("50.00", "60.00", "70.00")
    assert shown["control, alpha 0.5"] == "80.00"
    assert [*sections(results, "glue")] == ["tiny-encoder", "roberta-base"]
    results.llama("lora", 1, 50.0)
    first, *_, last = sections(results, "commonsense").values()
    assert first.title == "tiny-llama" and set(last.shown.whose) == {"paper"}
    results.vit("control", 1, 80.0)
    results.vit("lora", 1, 80.0, lora_rank=0)
    lines = rows(results, "vit_accuracy", "vit_tiny, 2-layer MLP")
    assert [(line["method"], line["n"]) for line in lines] == [("control", 1), ("lora matched", 1), ("dora", 0)]


def test_settings_that_are_not_comparable_have_sections_of_their_own(results):
    """Unquantized runs stand with the quantized ones that they are compared with."""
    for layers, last in ((2, 80.0), (4, 70.0)):
        results.vit("control", 1, last, mlp_layers=layers, data=f"cifar{layers}")
    results.llama("lora", 1, 50.0)
    results.llama("lora", 1, 49.0, limit=20, folder="short")
    results.llama("lora", 1, 48.0, folder="nf4", domain="qcontrol", quantization="nf4")
    for setting, average in (("", "50.00"), (", first 20 questions", "49.00"), (", nf4", "48.00")):
        line = row(results, "commonsense", f"tiny-llama{setting}", "average", "tokens/s", method="lora r32")
        assert line == (average, "900")
    results.roberta("control", 1, 0.6)
    results.roberta("control", 1, 0.4, domain="qcontrol", quantization="nf4")
    path = results.roberta("control", 1, 0.5, domain="qcontrol", folder="none", quantization="none")
    path.write_text(path.read_text().replace('"domain": "qcontrol"', '"domain": "roberta"'))
    for name, section, last in (
        ("glue", "tiny-encoder", "60.00"), ("quantized", "tiny-encoder, nf4", "40.00"),
        ("quantized", "tiny-encoder, not quantized", "50.00"), ("vit_accuracy", "vit_tiny, 2-layer MLP", "80.00"),
        ("vit_accuracy", "vit_tiny, 4-layer MLP", "70.00"),
    ):  # fmt: skip
        (line,) = [line for line in rows(results, name, section, method="control") if line["n"]]
        assert line["last"] == last


def test_the_longest_sequences_are_drawn_against_the_card_beside_unsloths(results):
    ours = [("control+nf4:lean", limit, tokens, 2.0) for limit, tokens in ((7.5, 16384), (23.5, 262144), (78.5, 524288))]
    results.searched("a", [*ours, ("lora+nf4", 7.5, 0, 1.0), ("lora+nf4", 23.5, 15360, 1.5)])
    cells = [("control+nf4:lean", 23.5, 32768, 1.0), ("control+bf16:lean", 23.5, 98304, 1.0)]
    results.searched("b", cells, stopped=("control+nf4:lean", "control+bf16:lean"))  # the first went further in the other
    title = "llama3-8b, batch 1, Some GPU"
    assert row(results, "longest", title, "times published", GiB="7.5", method="control+nf4:lean") == ("5.51",)
    ((_, _, drawn, figure),) = draw(load(results.path)[0], PAPER)
    lines = {line.get_label(): dict(zip(*map(list, line.get_data()))) for line in figure.axes[0].lines}
    assert drawn == title and lines["control+nf4:lean"] == {8: 16384, 24: 262144, 80: 524288}
    named = {text.get_text(): text.xy for text in figure.axes[0].texts}
    assert {name: tuple(place) for name, place in named.items()} == {"lora+nf4": (24, 15360), "control+bf16:lean": (24, 98304)}
    assert list(lines["no longer one was tried"]) == [24]
    assert lines["published: Unsloth, QLoRA r32"][24] == 78475


def test_activations_of_a_graph_are_not_said_to_be_none(results):
    path = results.benchmark("graphs.json", **{"control+fp8:fast": (0.2, 6.0), "control+graphs+fp8:fast": (0.1, 7.0)})
    contents = json.loads(path.read_text())
    for result, kind, size in zip(contents["results"], ("allocated", "reserved"), (2**30, 0), strict=True):
        result["peak_is"], result["memory"]["activations_bytes"] = kind, size
    path.write_text(json.dumps(contents))
    assert rows(results, "quantized_memory", "llama3-8b, Some GPU", "activations MiB") == [("1,024",), ("not measured",)]


def test_encoders_that_are_not_quantized_are_stored_in_as_many_bits_as_the_table_says():
    (path, *_) = (RESULTS / "published" / "qcontrol").glob("*_none_*/record.json")
    record, about = read_json(path), make_table("quantized", load(RESULTS)[0][:0], PAPER).about
    bits = round(8 * record["memory"]["weights_bytes"] / record["model"]["total_parameters"])
    assert f"and in {bits} under the same recipe" in about


def test_the_recipes_steps_are_those_of_their_micro_batches(results):
    for shape, batch in (("llama3-8b", 3), ("llama3-8b", 4), ("llama2-7b", 4)):
        results.benchmark(
            f"{shape}{batch}.json", shape=shape, batch=batch, tokens=256, lora=(0.2, 6.0), **{"control+fp8:fast": (0.1, 3.0)}
        )
    assert [*sections(results, "llama_shapes")] == [
        f"{shape} x 256 tokens, Some GPU" for shape in ("llama2-7b, 4", "llama3-8b, 3")
    ]
    assert rows(results, "llama_shapes", "llama3-8b, 3 x 256 tokens, Some GPU", "method") == [("lora",)]


def test_a_method_that_failed_says_why(results):
    path = results.benchmark(lora=(0.4, 40.0), dora=(0.4, 40.0))
    contents = json.loads(path.read_text())
    contents["results"][1] = {"method": "dora", "error": "out of memory"}
    path.write_text(json.dumps(contents))
    title = "llama3-8b, 4 x 1024 tokens, Some GPU"
    assert row(results, "memory_speed", title, "ms a step", method="dora") == ("failed <sup>1</sup>",)
    assert notes(results, "memory_speed", title) == ["dora: out of memory."]


# -- broken folders ---------------------------------------------------------------------------------------------


def test_a_broken_record_is_left_out_by_name(results):
    results.roberta("lora", 1, 0.5)
    for seed, contents in enumerate(("{", '{"schema": 0}'), 2):
        results.roberta("lora", seed, 0.5).write_text(contents)
    lacking = {results.roberta("dora", 1, 0.5): "metrics", results.benchmark(lora=(0.4, 40.0)): "device"}
    for file, missing in lacking.items():
        found = json.loads(file.read_text())
        del found[missing]
        file.write_text(json.dumps(found))
    told = problems(results)
    for file in lacking:
        assert any(line.startswith(f"{file.relative_to(results.path)} ") for line in told)
    assert len(told) == 4 and sum("is missing): delete it and run again" in line for line in told) == 1, told
    assert row(results, "glue", "tiny-encoder", "n", method="lora") == (1,)


def test_two_runs_that_claim_one_cell_leave_it_empty(results):
    for folder in (None, "again"):
        results.roberta("control", 1, 0.5, folder=folder)
    results.roberta("lora", 1, 0.5)
    both = "roberta/again/record.json and roberta/tiny-encoder_cola_control_seed1/record.json both claim control"
    assert both in problems(results)[0] and both in notes(results, "glue", "tiny-encoder")[0]
    line = row(results, "glue", "tiny-encoder", method="control")
    assert (line["last"], line["runs"]) == ("no record", "left out <sup>1</sup>")
    assert row(results, "glue", "tiny-encoder", method="lora")["last"] == "50.00"


@pytest.mark.parametrize("change", [{"device": "Other GPU"}, {"batch_size": 8}, {"torch": "2.11.0"}])
def test_a_run_under_other_conditions_is_not_mixed_in(results, change):
    """Methods may have learning rates of their own, but seeds of one may not."""
    for seed in (1, 2):
        results.roberta("control", seed, 0.6, lr=1e-4)
        results.roberta("lora", seed, 0.5, torch=f"2.14.{seed}")  # a patch is no other condition
    odd = results.roberta("dora", 1, 0.7, **change)
    (message,) = problems(results)
    assert odd.parent.name in message and next(iter(change)).replace("device", "device Other GPU") in message
    assert "torch" not in change or "with torch 2.11, the others of its comparison with 2.14" in message
    assert row(results, "glue", "tiny-encoder", method="dora")["last"] == "no record"
    assert row(results, "glue", "tiny-encoder", method="control")["last"] == "60.00"
    results.roberta("control", 3, 0.6, lr=1e-3)
    told = "control_seed3/record.json was run with lr 0.001, other seeds of its row with 0.0001"
    assert any(told in problem for problem in problems(results))


def test_shadow_alone_may_attend_with_dense_masks(results):
    for method, attention in (("lora", "packed_varlen"), ("control", "packed_varlen"), ("shadow", "sdpa"), ("miss", "sdpa")):
        results.llama(method, 1, 50.0, attention=attention)
    (message,) = problems(results)
    assert "miss-seed1" in message and "attention sdpa, the others of its comparison with packed_varlen" in message


def test_a_resumed_run_keeps_its_score_but_not_its_cost(results):
    path = results.roberta("control", 1, 0.6, resumed=10)
    line = row(results, "glue", "tiny-encoder", method="control")
    assert (line["last"], line["train s"], line["peak MiB"]) == ("60.00", "not measured", "not measured <sup>1</sup>")
    assert "was resumed" in notes(results, "glue", "tiny-encoder")[0]
    for folder in ("quickstart", "roberta/learning_rate_search", "roberta/ablations"):  # what lies there is no result
        (results.path / folder).mkdir(parents=True)
        path.parent.rename(results.path / folder / "control")
        assert [*sections(results, "glue")] == ["roberta-base"]  # the paper's
        (results.path / folder / "control").rename(path.parent)


# -- files ------------------------------------------------------------------------------------------------------


def test_the_command_writes_everything_and_says_what_it_left_out(results, call):
    assert "nowhere is no folder" in call("scripts.make_tables", "--results", results.path / "nowhere").refused()
    for seed in (1, 2):
        results.roberta("control", seed, 0.5 + seed / 10, model="roberta-base")
    results.roberta("lora", 1, 0.5).write_text("{")
    stale, own = (results.path / "pictures" / name for name in ("rates_of_a_record_that_is_gone.png", "own.png"))
    stale.parent.mkdir()
    for path in (stale, own):
        path.touch()
    code, _, stderr = call("scripts.make_tables", "--results", results.path, "--strict")
    assert code == 1 and stderr.startswith("left out: roberta/tiny-encoder_cola_lora_seed1/record.json")
    data = pd.read_csv(results.path / "tables" / "glue.csv").query("task == 'cola' and method == 'control'")
    ours, paper = data.to_dict("records")
    assert float(ours["last"]) == pytest.approx(65) and ours["last sd"] == pytest.approx(statistics.stdev([60, 70]))
    assert ours["runs"].split() == [f"roberta/roberta-base_cola_control_seed{n}/record.json" for n in (1, 2)]
    assert (float(paper["best"]), paper["best status"]) == (65.32, "exact")
    tables = {f"tables/{name}.{kind}" for name in SPECIFICATIONS for kind in ("md", "csv")}
    assert not stale.exists() and own.exists()
    assert len(tables) == 2 * 17 and tables | {"claims.md", "report.html"} <= files(results.path).keys()


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_links_lead_somewhere(page) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text := page.read_text())
    assert (links or "No record yet: bash" in text) and all((page.parent / link).resolve().is_file() for link in links)


def test_a_users_runs_stand_beside_the_shipped_ones_and_change_nothing_of_theirs(results, call):
    mine = type(results)(results.path / "shipped")
    results.path = mine.path / "published"
    for seed in (1, 2):
        results.roberta("control", seed, 0.6)
        results.roberta("lora", seed, 0.5)
    results.benchmark(lora=(0.4, 40.0), control_fast=(0.2, 13.0))
    assert call("scripts.make_tables", "--results", mine.path)[0] == 0
    before = files(mine.path)
    mine.roberta("control", 1, 0.9)  # the same cell again, and another device
    mine.roberta("lora", 1, 0.8)
    mine.roberta("dora", 1, 0.8, device="Other GPU")
    mine.benchmark(lora=(0.1, 4.0))
    mine.roberta("control", 2, 0.9).write_text("{")
    stderr = call("scripts.make_tables", "--results", mine.path).finished().err
    after = files(mine.path)
    assert {name: after[name] for name in before} == before
    assert "published" not in stderr and "left out: roberta/" in stderr
    shown = after["mine/tables/glue.md"].decode()
    assert "| cola | control | 0.001 | ours | 2 | 1,234 | 60.00 |" in shown and "| cola | control | 0.001 | yours |" in shown
    assert "| lora | yes | yours | 1 |" in after["mine/tables/memory_speed.md"].decode()
    for name in ("tables/glue.md", "claims.md"):
        assert_links_lead_somewhere(mine.path / "mine" / name)


def test_a_fresh_clone_reproduces_the_tracked_files_byte_for_byte(tmp_path, call):
    """Pictures and the page only with the matplotlib that drew them."""
    shutil.copytree(RESULTS / "published", tmp_path / "published")
    assert call("scripts.make_tables", "--results", tmp_path, "--strict")[0] == 0
    made, drawn_here = files(tmp_path), f"Matplotlib version{matplotlib.__version__}".encode()
    tracked = {
        name: content
        for name, content in files(RESULTS).items()
        if (name.startswith(("tables/", "pictures/")) or name == "claims.md")
        and (not name.endswith(".png") or drawn_here in content)
    }
    assert len(tracked) > 28 and [name for name, content in tracked.items() if made.get(name) != content] == []
    for page in [*(tmp_path / "tables").glob("*.md"), tmp_path / "claims.md"]:
        assert_links_lead_somewhere(page)


# -- published figures ------------------------------------------------------------------------------------------


def test_published_figures_are_consistent():
    figures = PAPER.figures
    assert set(figures.source) <= read_json(RESULTS / "paper.json")["sources"].keys()
    for figure in figures[figures.runs.notna()].itertuples():  # printed means are rounded or cut
        assert figure.value == pytest.approx(statistics.fmean(figure.runs.values()), abs=0.01)
    scores = figures[figures.quantity == "score"].pivot(index=["model", "row"], columns="column", values="value").dropna()
    apart = (scores.drop(columns="average").mean(axis=1) - scores.average).abs()
    weak = scores.average == 78.56  # the known weakness
    assert len(scores) == 5 and (apart[~weak] < 0.01).all() and (apart[weak] < 0.12).all() and weak.sum() == 1
    assert any("78.67" in weakness and "78.56" in weakness for weakness in PAPER.weaknesses)


def test_the_search_says_how_wide_the_good_range_is_and_what_loras_rate_costs(results):
    tried = {
        "lora": {1e-3: (0.60, 0.70), 3e-3: (0.69, 0.71), 1e-2: (0.1, 0.1)},  # means 65, 70, 10
        "control": {1e-4: (0.68, 0.68), 3e-4: (0.685, 0.695), 1e-3: (0.68, 0.69), 3e-3: (0.40, 0.50), 1e-2: (0.69, 0.69)},
        "dora": {1e-3: (0.7, 0.7)},
    }  # fmt: skip
    for method, rates in tried.items():
        for rate, scores in rates.items():
            for seed, score in enumerate(scores):
                results.roberta(method, seed, score, lr=rate, folder=f"learning_rate_search/{method}_{seed}_{rate}")
    (section,) = table(results, "learning_rates").sections
    shown = section.shown.set_index("method")[["n", "best rate", "score", "from", "to", "lost at LoRA's rate"]]
    # control's 1e-2 is as good as its best, but 3e-3 between them is not: equals go to the smaller rate
    assert shown.loc["control"].tolist() == [2, "0.0003", "69.00 ± 0.71", "0.0001", "0.001", "24.00"]
    assert shown.loc["lora"].tolist() == [2, "0.003", "70.00 ± 1.41", "0.003", "0.003", "0.00"]
    assert shown.loc["dora"].tolist() == [2, "0.001", "70.00", "0.001", "0.001", ""]


def test_the_quickstarts_table_says_what_the_records_say(results, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = results.path / "roberta"
    folder.mkdir()
    shown = partial(call, "scripts.quickstart_table", folder)
    assert "holds no run of the demonstration: start scripts/quickstart.sh first" in shown().refused()
    results.roberta("control", 42, 0.70, 0.72, task="demo", folder="control")
    results.roberta("lora", 42, 0.65, task="demo", folder="lora", seconds=60.4)
    out = " ".join(shown().finished().out.split())
    assert "(not GLUE)" in out and "left out" not in out
    assert "control 0.001 1 1,234 70.00 72.00 100 10.0 100 " in out and "lora 0.001 1 1,234 65.00 65.00 100 60.4 17 " in out
    assert "dora" in out and "no record" in out  # a method that has not run keeps its row
    text = (folder / "table.md").read_text()
    assert "| control | 0.001 | 1 | 1,234 | 70.00 | 72.00 |" in text and "(control/record.json)" in text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    results.roberta("lora", 42, 0.65, task="demo", folder="lora").write_text("{")
    assert "record.json is no readable run record" in shown().finished().err


def test_reporting_needs_neither_training_nor_torch():
    command = "import sys, control_experiments.reporting.page, scripts.make_tables; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loaded = done.stdout.split()
    assert "control_experiments.reporting.page" in loaded and "torch" not in loaded
    assert not [name for name in loaded if name.startswith("control_experiments.training")]
