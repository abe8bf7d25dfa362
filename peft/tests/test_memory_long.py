"""Long rows in mode lean: attention by groups of heads, everything else by chunks of tokens.

That gradients are plain's in all families, under autocast and over quantized weights is tested where that is tested of other
modes.
"""

from collections import Counter

import pytest
import torch
from test_memory import FAMILIES, batch, build, copied_in_pieces, distance, exact_norms, loss_and_gradients
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_control import memory
from peft_control.memory import set_memory_mode

__all__ = ["copied_in_pieces", "exact_norms"]  # fixtures


@pytest.fixture(autouse=True)
def all_rows_are_long(monkeypatch):
    monkeypatch.setattr(memory.long, "FROM_TOKENS", 1)


@pytest.fixture
def attended(monkeypatch):
    """The numbers of queries' heads that attention is called with."""
    calls, own = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, *arguments, **named):
        calls.append(query.shape[1])
        return own(module, query, *arguments, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
    return calls


def logits_gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_heads_give_plains_gradients(family, heads, waits, exact_norms, attended):
    """Keys and values of one head, of two and, as many as queries', of four; outputs and gradients."""
    model = build(family, config={"num_key_value_heads": heads}, control_bias=True, control_alpha=0.7)
    loss, reference = loss_and_gradients(model, "plain", padded=True)
    attended.clear()
    found_loss, found = loss_and_gradients(model, "lean", padded=True, offload=waits)
    assert abs(found_loss - loss) <= 1e-10 and distance(found, reference) <= 1e-10
    assert set(attended) == {4 // heads}
    # what waits is not computed again
    assert len(attended) == 3 * heads * (1 if waits else 2)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_rows(implementation, waits, exact_norms):
    model = build("qwen2", config={"attn_implementation": implementation})
    inputs = dict(input_ids=batch()[0]["input_ids"], position_ids=torch.arange(19).repeat(2, 1) % 7, use_cache=False)
    reference = logits_gradients(model, **inputs)
    set_memory_mode(model, "lean", chunk_tokens=8, offload=waits)
    assert distance(logits_gradients(model, **inputs), reference) <= 1e-10


@pytest.mark.parametrize("what", ["LoRA", "mask", "norm"])
def test_what_cannot_be_worked_by_groups_is_worked_whole(what, exact_norms, attended):
    model = build("qwen3", lora=what == "LoRA")
    if what == "norm":
        model.get_base_model().model.layers[1].self_attn.q_norm.weight.requires_grad_(True)
    inputs = dict(batch(padded=True)[0])
    if what == "mask":  # one that tells heads apart
        inputs["attention_mask"] = torch.rand(2, 4, 19, 19, dtype=torch.float64).log()
    reference = logits_gradients(model, **inputs)
    set_memory_mode(model, "lean", chunk_tokens=8)
    attended.clear()
    found = logits_gradients(model, **inputs)
    assert found.keys() == reference.keys() and distance(found, reference) <= 1e-10
    assert Counter(attended)[4] == (2 if what == "norm" else 6)


def test_a_few_tokens_are_worked_as_before(attended, monkeypatch):
    monkeypatch.setattr(memory.long, "FROM_TOKENS", 39)  # the batch has 38
    loss_and_gradients(build(), "lean")
    assert set(attended) == {4}


def test_dropout_is_replayed(exact_norms):
    """Finite differences of a loss whose masks are drawn anew: right only if the backward replays them."""
    model = build(control_dropout=0.4)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.3
    _, gradients = loss_and_gradients(model, "lean", offload=True)
    inputs, labels = batch()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "layers.1" not in name:
            continue
        index = gradients[name].abs().argmax()
        exact, values = gradients[name].flatten()[index].item(), []
        for step in (1e-5, -1e-5):
            parameter.data.view(-1)[index] += step
            torch.manual_seed(2)
            values.append(model(**inputs, labels=labels).loss.item())
            parameter.data.view(-1)[index] -= step
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(exact, rel=1e-4)


def test_what_waits_comes_back_from_the_host(copied_in_pieces, exact_norms):
    model = build()
    _, reference = loss_and_gradients(model, "plain")
    for _ in range(2):
        _, found = loss_and_gradients(model, "lean", offload=True)
        assert distance(found, reference) <= 1e-10
    hosts = {layer.memory_plan.host for layer in model.get_base_model().model.layers}
    assert [host._held for host in hosts] == [0] and copied_in_pieces


@pytest.mark.parametrize(("kib", "calls"), [(102, 6), (101, 8), (84, 8), (83, 10), (66, 10), (65, 12), (0, 12)])
def test_lean_takes_no_more_of_the_host_than_it_can_spare(kib, calls, exact_norms, attended, monkeypatch):
    """First each layer's own state (16 KiB of 38 tokens of 32 numbers), then attention's outputs (8 + 1 KiB a group)."""
    model = build()
    _, reference = loss_and_gradients(model, "plain")
    monkeypatch.setattr(memory.offload, "_free_memory", lambda: (kib << 10) / 0.75)
    attended.clear()
    _, found = loss_and_gradients(model, "lean", offload=True)
    assert distance(found, reference) <= 1e-10 and len(attended) == calls


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors that torch's functions have made within, while they exist, at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return found


def peaks(waits, tokens=4096, width=256, **config):
    """The most memory that a layer's forward and its backward take, in states, those of others beside it included."""

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, start):
            return torch.randn(1, tokens, width)

        @staticmethod
        def backward(ctx, dy):
            return None

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx, state):
            return torch.zeros(())

        @staticmethod
        def backward(ctx, dy):
            return torch.randn(1, tokens, width)

    shape = dict(hidden_size=width, intermediate_size=512, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=8)
    model = build(config={**shape, "head_dim": 16, **config}, dtype=torch.float32)
    set_memory_mode(model, "lean", chunk_tokens=64, offload=waits)
    base, found = model.get_base_model().model, []
    angles = base.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    with LiveBytes() as live:
        loss = Last.apply(base.layers[0](First.apply(torch.zeros((), requires_grad=True)), position_embeddings=angles))
        found.append(live.peak)
        live.peak = 0
        loss.backward()
        found.append(live.peak)
    return [round(peak / (tokens * width * 4), 2) for peak in found]


@pytest.mark.parametrize("waits", [False, True])
def test_memory_of_a_long_row(waits, monkeypatch):
    forward, backward = peaks(waits)
    # three and five states, chunks, and a group of an eighth of the heads, which without kernels takes more memory
    assert forward <= 4.0 and backward <= 6.8
    monkeypatch.setattr(memory.long, "FROM_TOKENS", 1 << 20)
    whole = peaks(waits)
    assert whole[0] > 1.8 * forward and whole[1] > 1.7 * backward
