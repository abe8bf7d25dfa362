"""Control models in two processes over gloo: DDP and FSDP2, plain and in every memory mode, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import distributed

from peft_control import quantize_fp8
from peft_control.architectures import find_layers
from peft_control.memory import MODES, set_memory_mode

ONLY_LEAN = ("qwen3_moe", "gemma2")  # families without hand-written modes
FAMILIES = ("llama", "llama-fp8", "roberta", *ONLY_LEAN)


def build(family):
    base = tiny_models.build(family.removesuffix("-fp8"))
    if family.endswith("-fp8"):
        quantize_fp8(base, output_layer=True)
    fields = dict(target_modules=["q_proj", "v_proj"], r=2) if family.startswith("llama") else {}
    return tiny_models.adapted(base, ("attention", "mlp"), dropout=0.0, control_rank=4, **fields)


def losses(model, rows, steps=3):
    """Train on this process's rows of one fixed batch; return the mean loss of all processes at each step."""
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(5))[rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    causal, found = any(name.endswith("lm_head") for name, _ in model.named_modules()), []
    for _ in range(steps):
        if causal:  # with labels, a mode computes the loss without logits, reading the output layer's weight itself
            loss = model(input_ids=ids, labels=ids).loss
        else:
            loss = model(input_ids=ids).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if distributed.is_initialized():
            distributed.all_reduce(mean)
            mean /= distributed.get_world_size()
        found.append(mean.item())
    return found


def sharded(model, mode):
    """FSDP2 of each layer, of an output layer of its own, and of the rest; the mode is set before and after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, base = init_device_mesh("cpu", (2,)), model.get_base_model()
    units, head = [layer for layer, _ in find_layers(model).values()], base.get_output_embeddings()
    if head is not None and head.weight is not base.get_input_embeddings().weight:  # FSDP2 shards a weight once
        units.append(head)
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    return set_memory_mode(model, mode, chunk_tokens=5)


def worker(results: Path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {family: {} for family in FAMILIES}
    for family in FAMILIES:
        for mode in ("plain", "lean") if family in ONLY_LEAN else MODES:
            for kind in ("ddp", "fsdp2"):
                model = set_memory_mode(build(family), mode, chunk_tokens=5)
                model = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else sharded(model, mode)
                found[family][f"{mode} {kind}"] = losses(model, slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        results.write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    """Two processes for all families, since they take longer to start than to train."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    command += [str(tmp_path / "losses.json")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    for family, found in json.loads((tmp_path / "losses.json").read_text()).items():
        modes = {name.split()[0] for name in found} if family.endswith("fp8") else {"plain"}  # in FP8 each rounds differently
        alone = {mode: losses(set_memory_mode(build(family), mode, chunk_tokens=5), slice(0, 4)) for mode in modes}
        expected = alone["plain"]
        assert len(found) == (4 if family in ONLY_LEAN else 2 * len(MODES))
        for name, values in found.items():
            assert values == pytest.approx(alone.get(name.split()[0], expected), rel=1e-5), (family, name)
        if family != "roberta":
            assert expected[0] > expected[-1]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
