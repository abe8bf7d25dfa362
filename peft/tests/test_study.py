"""A study of runs whose score is a formula: what is searched, chosen and tested, by one process and by several."""

import fcntl
import json
import math
import multiprocessing
from dataclasses import dataclass, field

import pytest

from control_experiments.errors import UserError
from control_experiments.record import RunRecord
from control_experiments.training.losses import Diverged
from control_experiments.training.options import AdapterOptions, RunOptions, TrainingOptions
from control_experiments.training.study import Study, StudyOptions, beyond, command_of, make_run

#: The rate at which each method is best.
BEST = {"control": 1e-3, "lora": 3e-5, "probe": 3e-4}


@dataclass(kw_only=True)
class Run(RunOptions, AdapterOptions, TrainingOptions):
    """One run."""


@dataclass(kw_only=True)
class Options(StudyOptions, AdapterOptions, TrainingOptions):
    method: str = field(init=False, default="control")


class Parabolas(Study):
    """Scores fall with the distance of the rate from the method's best, in decades; above 1e-2 runs diverge."""

    def plan(self, cell):
        own = {"seed": cell.seed, "lr": cell.lr, "output_dir": str(self.folder(cell))}
        return make_run(Run, self.options, cell.arm, **own)

    def train(self, cell, run):
        if run.control_rank == 13:
            raise UserError("out of memory")
        if run.lr > 1e-2:
            raise Diverged("the loss is NaN")
        with (self.output / "log").open("a") as log:
            log.write(f"{self.folder(cell).name}\n")
        record = RunRecord.begin(run, domain="none", task=cell.task, name="run", device={}, command=command_of(run))
        score = round(-(math.log10(run.lr / BEST[run.method]) ** 2), 9)
        record.finish(self.folder(cell) / "record.json", metrics={"last": {"score": score}})


def study(folder, **options):
    folder.mkdir(exist_ok=True)
    options = Options(**{"methods": ["control", "lora"], "grid": [3e-4, 1e-3], "growth": 3, "seeds": [1, 2], **options})
    return Parabolas(options, "model", ["task"], folder)


def done(folder):
    return sorted((folder / "log").read_text().split())


def test_the_grid_grows_until_the_best_rate_lies_inside_it(tmp_path, capsys):
    study(tmp_path).run()
    said = capsys.readouterr().out
    assert "control on task: lr 0.001 is chosen" in said and "lora on task: lr 3e-05 is chosen" in said
    tried = {
        method: {float(name.partition("_lr")[2]) for name in done(tmp_path) if f"_{method}_seed0" in name} for method in BEST
    }
    assert tried["control"] == {3e-4, 1e-3, 3e-3} and tried["lora"] == {1e-5, 3e-5, 9e-5, 3e-4, 1e-3}
    tests = [name for name in done(tmp_path) if "_lr" not in name]
    assert tests == [f"model_task_{method}_seed{seed}" for method in ("control", "lora") for seed in (1, 2)]
    before = done(tmp_path)
    study(tmp_path).run()
    assert done(tmp_path) == before, "nothing is done twice"
    record = json.loads((tmp_path / "model_task_lora_seed2" / "record.json").read_text())
    assert record["hyperparameters"]["lr"] == 3e-5 and record["command"][record["command"].index("--lr") + 1] == "3e-05"


def test_growth_ends_and_a_rate_that_diverges_is_an_edge(tmp_path, capsys):
    study(tmp_path, growth=1, search_only=True).run()
    assert [name for name in done(tmp_path) if "lora" in name] == [
        f"model_task_lora_seed0_lr{rate}" for rate in ("0.0003", "0.001", "9e-05")
    ]
    study(tmp_path, methods=["probe"], grid=[9e-4, 1e-4], growth=0, search_only=True).run()
    assert "probe on task: lr 0.0001 is chosen" in capsys.readouterr().out  # the smallest of equal ones
    with pytest.raises(UserError, match="probe on task diverges with every learning rate of --grid: add lower"):
        study(tmp_path, methods=["probe"], grid=[0.02, 0.04], growth=0).run()
    # what diverged is not tried again; the grid grows down to where it does not
    study(tmp_path, methods=["probe"], grid=[0.02, 0.04]).run()
    assert "model_task_probe_seed0_lr0.005" in done(tmp_path) and "model_task_probe_seed1" in done(tmp_path)
    assert beyond(3e-4, 1e-3) == 9e-5 and beyond(4e-3, 2e-3) == 8e-3


def test_several_processes_share_the_runs(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=study(tmp_path).run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    found = done(tmp_path)
    assert len(found) == len(set(found)) == 3 + 5 + 4


def test_methods_have_options_of_their_own(tmp_path):
    study(tmp_path, methods=["control:control_rank=8", "control"], grid=None, lr=1e-3, seeds=[1]).run()
    names = ["model_task_control_control_rank8_seed1", "model_task_control_seed1"]
    assert done(tmp_path) == names
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in names]
    assert [record["hyperparameters"]["control_rank"] for record in records] == [8, 16]
    with pytest.raises(UserError, match="has lora_rank 8, not 4: delete such folders"):
        study(tmp_path, grid=None, lr=1e-3, seeds=[1], lora_rank=4, methods=["control"]).run()


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path, capsys):
    asked = study(tmp_path, methods=["control:control_rank=13", "lora"], grid=None, lr=1e-3, seeds=[1], max_hours=1)
    for _ in range(2):
        with pytest.raises(UserError, match="^model_task_control_control_rank13_seed1 failed: out of memory$"):
            asked.run()
        assert capsys.readouterr().err.count("warning:") == 1 and done(tmp_path) == ["model_task_lora_seed1"]
        asked.failed.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["control:rank"]}, "come options as NAME=VALUE"),
        ({"methods": ["control:width=8"]}, "has no option 'width' of its own"),
        ({"methods": ["control:lr=8"]}, "has no option 'lr' of its own"),
        ({"methods": ["control:control_rank=0"]}, "--control_rank must be at least 1"),
        ({"grid": [1e-3, -1.0]}, "--lr must be greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        study(tmp_path, **options).check()
    assert not list(tmp_path.iterdir())


def test_the_time_also_ends_while_other_processes_work_on_all_that_is_left(tmp_path, capsys):
    asked = study(tmp_path, methods=["control"], grid=None, lr=1e-3, seeds=[1], max_minutes=1e-3)
    (cell,) = asked.left()
    asked.lock(cell).parent.mkdir()
    with asked.lock(cell).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        asked.run()
    assert "does not fit into 0.001 minutes" in capsys.readouterr().out and not (tmp_path / "log").exists()
