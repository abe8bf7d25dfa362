"""What all domains share: errors, records, run folders, metering, devices, checksums."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build

from control_experiments import record as record_module
from control_experiments.errors import Interrupted, StopRequest, UserError, run_main
from control_experiments.paths import REPOSITORY, public_path
from control_experiments.record import public_command, read_record, write_json_atomic
from control_experiments.training import checkpoints
from control_experiments.training.checkpoints import begin, find_damage, whole_folder
from control_experiments.training.checksums import fingerprint
from control_experiments.training.device import explain_out_of_memory
from control_experiments.training.losses import LossWatch, check_parameters
from control_experiments.training.metering import Throughput
from control_experiments.training.methods import adapter_config, load_adapter
from control_experiments.training.options import AdapterOptions
from control_experiments.training.runs import RunFolder
from scripts.tests.faults import Bomb, a_record

make_record = partial(a_record, seed=42, metrics={"best": {"x": 1.5}})


@pytest.fixture
def ends(capsys):
    """``ends(main)``: the exit code and the one line (or none) that an entry point leaves."""

    def run(main) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            run_main(main)
        said = capsys.readouterr().err
        assert said.count("\n") == (exit_.value.code > 0)
        return exit_.value.code, said.strip()

    return run


def test_exit_codes(ends):
    assert ends(Mock()) == (0, "")
    assert ends(Mock(side_effect=UserError("do\nthis"))) == (2, "error: do this")
    uncaptured = "this model's training step cannot be captured as a CUDA graph (why): train without cuda_graphs"
    assert ends(Mock(side_effect=RuntimeError(uncaptured))) == (2, f"error: {uncaptured}")
    full = OSError(errno.ENOSPC, "No space left on device")
    assert ends(Mock(side_effect=full)) == (2, f"error: a file cannot be read or written: {full}")
    with pytest.raises(OSError, match="Bad file"):  # which is a bug
        run_main(Mock(side_effect=OSError(errno.EBADF, "Bad file descriptor")))
    before = signal.getsignal(signal.SIGTERM)
    assert ends(Mock(side_effect=KeyboardInterrupt)) == (130, "interrupted")
    assert ends(partial(os.kill, os.getpid(), signal.SIGTERM)) == (143, "terminated")
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_main(lambda: 1 / 0)


def test_a_pickle_that_torch_refuses_is_one_line(ends, tmp_path):
    torch.save({"step": Bomb(tmp_path / "mark")}, tmp_path / "optimizer.pt")
    code, line = ends(partial(torch.load, tmp_path / "optimizer.pt", weights_only=True))
    assert code == 2 and "holds more than tensors and plain values" in line and not (tmp_path / "mark").exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = write_json_atomic(tmp_path / "x.json", {"old": 1})
    monkeypatch.setattr(record_module.os, "fsync", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json_atomic(path, {"new": 2})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_record_round_trip(tmp_path):
    history = [{"step": 1, "epoch": 0.5, "loss": float("nan")}]
    path = make_record(history=history).write(tmp_path / "record.json")
    read = read_record(path)
    assert read.metrics == {"best": {"x": 1.5}} and read.history == [{"step": 1, "epoch": 0.5, "loss": None}]
    assert (read.schema, read.status) == (1, "finished")
    with pytest.raises(UserError, match=r"none.json is no readable run record"):
        read_record(tmp_path / "none.json")


def test_no_private_path_reaches_a_record(tmp_path):
    record = make_record(
        command=f"python /home/someone/x.py --model={tmp_path}/m".split(),
        model={"id": "/home/someone/models/minilm", "paths": {tmp_path / "b"}},
        data={"id": str(REPOSITORY / "RoBERTa" / "glue.py")},
    )
    text = record.write(tmp_path / "record.json").read_text()
    assert "/home" not in text and str(tmp_path) not in text
    written = json.loads(text)
    assert written["command"] == ["python", "x.py", "--model=m"]
    assert written["model"] == {"id": "minilm", "paths": ["b"]}
    assert written["data"] == {"id": "RoBERTa/glue.py"}
    words = ["roberta-base", "nyu-mll/glue", "1/3", "a and/or b", "3e-4"]
    assert public_command([*words, "../models/x"]) == [*words, "x"]
    assert public_path(REPOSITORY / "peft") == "peft"


def test_a_folder_has_one_run_at_a_time_and_a_dead_one_lets_go(tmp_path):
    def hold():
        with RunFolder(tmp_path / "run") as folder:
            (folder.path / "work").write_text("x")
            ready.set()
            time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold)
    process.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match="in use by another run"):
        RunFolder(tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with RunFolder(tmp_path / "run") as folder:
        assert not folder.finished


def test_an_unused_folder_goes_away(tmp_path):
    with RunFolder(tmp_path / "results" / "roberta" / "run") as folder:
        folder.claim({"method": "lora"})
        (tmp_path / "results" / "mine").mkdir()
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be an output folder"):
        RunFolder(tmp_path / "file")


def checkpoint(folder: RunFolder, step: int, **state):
    path = folder.checkpoints / f"checkpoint-{step}"
    with whole_folder(path) as place:
        (place / "trainer_state.json").write_text(json.dumps({"step": step, **state}))
        torch.save({"step": torch.tensor(step)}, place / "optimizer.pt")
    return path


LORA, DORA = {"method": "lora", "ranks": (1, 2)}, {"method": "dora", "ranks": (1, 2)}


def test_the_newest_checkpoint_is_gone_on_with(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        assert folder.claim(LORA, resume=True) is None
        assert folder.claim(DORA) is None  # nothing was trained yet
        folder.claim(LORA)
        checkpoint(folder, 9)
        newest = checkpoint(folder, 100)
        begin(folder.checkpoints / "checkpoint-110")  # where a kill leaves what was being written
        assert folder.claim(LORA, resume=True) == newest
        assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["checkpoint-100", "checkpoint-9"]
        (folder.path / "run.json").write_text("{")
        with pytest.raises(UserError, match="missing or broken"):
            folder.claim(LORA)


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGES = {
    "optimizer.pt is not what was written": lambda c: flip(c / "optimizer.pt"),
    "optimizer.pt is missing": lambda c: (c / "optimizer.pt").unlink(),
    "more.pt is not in its manifest.json": lambda c: (c / "more.pt").write_bytes(b""),
    "it has no manifest.json": lambda c: (c / "manifest.json").unlink(),
    "manifest.json is no JSON file": lambda c: (c / "manifest.json").write_text('{"schema": 1, "sha'),
    "its manifest.json is of another schema": lambda c: (c / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize(("reason", "damage"), DAMAGES.items())
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_used(reason, damage, tmp_path, capsys):
    with RunFolder(tmp_path / "run") as folder:
        folder.claim({})
        whole, broken = checkpoint(folder, 3), checkpoint(folder, 10)
        assert find_damage(broken) is None
        damage(broken)
        assert folder.claim({}, resume=True) == whole
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: checkpoint-10 is broken") and reason in line
        assert line.endswith("set aside as checkpoint-10.broken")
        names = sorted(path.name for path in folder.checkpoints.iterdir())
        assert names == ["checkpoint-10.broken", "checkpoint-3"]

        damage(whole)
        with pytest.raises(UserError, match="no checkpoint in .* is whole.*nothing was changed"):
            folder.claim({}, resume=True)
        assert sorted(path.name for path in folder.checkpoints.iterdir()) == names


@pytest.mark.parametrize("place", [f"{checkpoints.__name__}.fingerprint", "pathlib.Path.read_text"])
def test_a_trouble_that_may_pass_sets_no_checkpoint_aside(place, tmp_path, monkeypatch):
    def fails(path, *_, **__):
        if path.name == "run.json":
            return "{}"
        raise OSError(errno.EMFILE, "Too many open files")

    with RunFolder(tmp_path / "run") as folder:
        folder.claim({})
        checkpoint(folder, 3)
        last = checkpoint(folder, 10)
        with monkeypatch.context() as patched, pytest.raises(UserError, match="Too many.*nothing was changed; try again"):
            patched.setattr(place, fails)
            folder.claim({}, resume=True)
        assert folder.claim({}, resume=True) == last


def test_a_checkpoint_is_worth_as_much_as_the_best_one_that_it_names(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        first, best = checkpoint(folder, 2, best_global_step=2), checkpoint(folder, 4, best_global_step=4)
        last = checkpoint(folder, 6, best_global_step=4)
        assert find_damage(last) is None
        flip(best / "optimizer.pt")
        assert "checkpoint-4, is broken: optimizer.pt" in find_damage(last)
        write_json_atomic(folder.path / "run.json", {})
        assert folder.claim({}, resume=True) == first


def test_a_whole_folder_is_there_at_once_or_not_at_all(tmp_path):
    place = tmp_path / "adapter"
    with whole_folder(place, sealed=False) as aside:
        (aside / "a").write_text("first")
        assert not place.exists()
    with pytest.raises(OSError, match="full"), whole_folder(place) as aside:
        (aside / "a").write_text("second")
        raise OSError("full")
    assert (place / "a").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["adapter"]
    with whole_folder(place, sealed=False) as aside:
        (aside / "b").write_text("third")
    assert [p.name for p in place.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("writer", ["python", "torch", "safetensors"])
def test_a_full_disk_is_one_line_and_costs_only_what_was_being_written(writer, small_disk, ends):
    disk, large = small_disk("64k"), torch.zeros(1 << 20)
    write = {
        "python": lambda place: (place / "x").write_bytes(large.numpy().tobytes()),
        "torch": lambda place: torch.save(large, place / "x.pt"),
        "safetensors": lambda place: save_file({"x": large}, place / "x.safetensors"),
    }[writer]

    def main():
        with RunFolder(disk / "run") as folder:
            folder.claim({})
            checkpoint(folder, 3)
            with whole_folder(folder.checkpoints / "checkpoint-4") as place:
                write(place)

    code, line = ends(main)
    assert code == 2 and all(words in line for words in ("is full", "checkpoint-3 is kept", "--resume"))
    (left,) = (disk / "run" / "checkpoints").iterdir()
    assert left.name == "checkpoint-3" and find_damage(left) is None

    def convert():  # a folder that is no run's
        with whole_folder(disk / "model", sealed=False) as place:
            write(place)

    code, line = ends(convert)
    assert code == 2 and f"the disk of {disk / 'model'} is full" in line
    assert [path.name for path in disk.iterdir()] == ["run"]


GLOO = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.30.7\nLast error:\n{}"


@pytest.mark.parametrize(
    ("processes", "message", "lost"),
    [
        (2, GLOO, True),
        (2, "failed to recv, got 0 bytes. Connection was likely closed. Did the remote end crash?", True),
        (2, NCCL.format("remote process exited or there was a network error", "socketProgress"), True),
        (1, GLOO, False),
        (2, NCCL.format("invalid usage", "Duplicate GPU detected: rank 1 and rank 0"), False),
        (2, "Tensors for NCCL must be contiguous", False),
    ],
)
def test_a_lost_peer_is_said_in_a_line_and_other_errors_keep_their_traceback(
    processes, message, lost, monkeypatch, tmp_path, ends
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))

    def main():
        with RunFolder(tmp_path / "run"):
            raise RuntimeError(message)

    if lost:
        code, line = ends(main)
        assert code == 2 and "another process of this run died" in line and "--resume" in line
    else:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run_main(main)


def test_sigterm_does_not_cut_off_the_line_that_says_why(ends):
    class Told(UserError):
        def __str__(self):  # torchrun sends SIGTERM when another process of the run has died
            os.kill(os.getpid(), signal.SIGTERM)
            return "another process died"

    assert ends(Mock(side_effect=Told)) == (2, "error: another process died")


def test_a_loop_learns_of_the_first_signal_and_is_ended_by_the_second():
    with StopRequest() as stop:
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # sent to every process of a job, and passed on by the launcher
        with pytest.raises(Interrupted) as raised:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert raised.value.number == signal.SIGINT


def test_losses_are_watched_and_the_first_bad_batch_is_named():
    watch = LossWatch(torch.device("cpu"))
    for step, loss in enumerate((1.0, 2.0, float("inf"), float("nan"), 1.0), start=11):
        watch.add(torch.tensor(loss), step)
        assert watch.due(step)
    with pytest.raises(UserError, match=r"at step 13 \(epoch 2, batch 5 of 8\); kept so"):
        watch.check(8, "kept so")
    with pytest.raises(UserError, match="parameters are NaN or infinite after step 4"):
        check_parameters([torch.ones(2), torch.tensor([1.0, torch.inf])], 4, "nothing")
    LossWatch(torch.device("cpu")).check(8, "nothing")
    check_parameters([torch.ones(2)], 4, "nothing")


FULL_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. If reserved but unallocated memory is large")


@pytest.mark.parametrize(
    ("asks", "reason"),
    [
        (Mock(side_effect=FULL_GPU), r"Tried to allocate 2.50 GiB\.;"),
        (Mock(side_effect=RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")), "ALLOC_FAILED when;"),
        (lambda: torch.empty(1 << 60), r"tried to allocate \d+ bytes.*;"),
        (lambda: bytearray(1 << 62), "the host's memory is used up;"),
    ],
)
def test_too_little_memory_is_explained(asks, reason):
    said = rf"on cpu needs more memory than there is: .*{reason} what lowers it: --less"
    with pytest.raises(UserError, match=said), explain_out_of_memory(torch.device("cpu"), "--less"):
        asks()
    with pytest.raises(RuntimeError, match="other"), explain_out_of_memory(torch.device("cpu"), "--less"):
        raise RuntimeError("other")


def test_throughput_counts_only_what_it_should(monkeypatch):
    meter, clock = Throughput(torch.device("cpu")), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert meter.summary()["examples_per_second"] is None
    meter.start()
    for seconds in (1, 2, 5):
        clock[0] += seconds
        meter.add(4, torch.tensor(10))
        meter.step()
    with meter.left_out():
        clock[0] += 100
    meter.stop()
    summary = meter.summary()
    assert (summary["examples"], summary["real_tokens"], summary["steps"]) == (12, 30, 3)
    assert (summary["train_seconds"], summary["median_step_seconds"], summary["tokens_per_second"]) == (8, 2, 30 / 8)


def test_fingerprints(tmp_path):
    (tmp_path / "x").write_bytes(b"one")
    (tmp_path / ".lock").write_text("")
    one = hashlib.sha256(b"one").hexdigest()
    assert fingerprint(tmp_path / "x") == one
    assert fingerprint(tmp_path) == hashlib.sha256(f"x\t{one}\n".encode()).hexdigest()
    with pytest.raises(UserError, match="does not exist"):
        fingerprint(tmp_path / "b")


def test_a_control_without_blocks_is_refused():
    with pytest.raises(UserError, match="are mlp, attention or both, got none"):
        AdapterOptions(method="control", control_blocks=[]).check()


PLACE = "base_model.model.model.layers.9.mlp_control.more"


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        *[(part, lambda name, tensor: {}, "it has no {name}") for part in ("lora_A", "lora_magnitude_vector", "control_B")],
        ("control_B", lambda name, tensor: {name: tensor, PLACE: tensor.clone()}, "mlp_control.more has no place"),
        ("control_B", lambda name, tensor: {name: tensor * torch.nan}, "{name} has numbers that are not finite"),
    ],
)
def test_an_adapter_must_be_whole_and_finite(part, change, said, tmp_path, recwarn):
    """Of a mixed adapter peft misses no LoRA tensor."""
    config = adapter_config(AdapterOptions(method="control+dora", lora_targets=["q_proj"]), task_type="CAUSAL_LM")
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    model, file = load_adapter(build("llama"), tmp_path, "llama"), tmp_path / "adapter_model.safetensors"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tensors = load_file(file)
    name = next(name for name in tensors if part in name)
    spoiled = change(name, tensors.pop(name))
    save_file({**tensors, **spoiled}, file)
    recwarn.clear()
    with pytest.raises(UserError, match=re.escape(said.format(name=name))):
        load_adapter(build("llama"), tmp_path, "llama")
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
