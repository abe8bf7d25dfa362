"""Long rows in mode lean: attention by groups of heads, everything else by chunks of tokens.

That gradients are plain's in all families, under autocast and over quantized weights is tested where that is tested of other
modes.
"""

from collections import Counter

import pytest
import torch
from test_memory import as_plain, batch, build
from tiny_models import Live, distance, step_on
from torch.autograd.graph import get_gradient_edge
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_control import memory
from peft_control.memory import set_memory_mode

pytestmark = pytest.mark.usefixtures("exact_norms")


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("family", "heads"), [("llama", 1), ("llama", 2), ("llama", 4), ("mistral", 2), ("qwen3", 2)])
def test_groups_of_heads_give_plains_gradients(family, heads, waits, padded, attended):
    """Keys and values of one head, of two and, as many as queries', of four; outputs and gradients."""
    model = build(family, config={"num_key_value_heads": heads}, control_bias=True, control_alpha=0.7)
    as_plain(model, "lean", padded=padded, offload=waits)
    groups = attended[3:]  # plain's come first
    assert set(groups) == {4 // heads}
    # what waits is not computed again; with a mask attention may keep more than may wait
    if not (padded or family == "mistral"):
        assert len(groups) == 3 * heads * (1 if waits else 2)


@pytest.mark.parametrize("what", ["LoRA", "mask", "norm", "dropout"])
def test_what_cannot_be_worked_by_groups_is_worked_whole(what, attended):
    model = build("qwen3", lora=what == "LoRA")
    if what == "norm":
        model.get_base_model().model.layers[1].self_attn.q_norm.weight.requires_grad_(True)
    for layer in model.get_base_model().model.layers if what == "dropout" else ():
        layer.self_attn.attention_dropout = 0.3
    inputs = batch(padded=True)[0]
    if what == "mask":  # one that tells heads apart
        inputs["attention_mask"] = torch.rand(2, 4, 19, 19, dtype=torch.float64).log()
    _, reference = step_on(model, inputs)
    set_memory_mode(model, "lean", chunk_tokens=8)
    attended.clear()
    assert distance(step_on(model, inputs)[1], reference) <= 1e-10
    assert Counter(attended)[4] == (2 if what == "norm" else 6)


def peaks(waits, tokens=4096, width=256):
    """The most memory that a layer's forward and its backward take, in states, those of others beside it included."""
    shape = dict(hidden_size=width, intermediate_size=512, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=8)
    model = build(config={**shape, "head_dim": 16}, dtype=torch.float32)
    set_memory_mode(model, "lean", chunk_tokens=64, offload=waits)
    base = model.get_base_model().model
    angles = base.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    with Live() as live:
        state = torch.randn(1, tokens, width).requires_grad_()
        end = get_gradient_edge(base.layers[0](state, position_embeddings=angles))
        forward, live.peak = live.peak, 0
        trained = [p for p in base.layers[0].parameters() if p.requires_grad]
        torch.autograd.grad([end], [state, *trained], [torch.randn(1, tokens, width)])
    return [round(peak / (tokens * width * 4), 2) for peak in (forward, live.peak)]


@pytest.mark.parametrize("waits", [False, True])
def test_memory_of_a_long_row(waits, monkeypatch):
    forward, backward = peaks(waits)
    # three and five states, chunks, and a group of an eighth of the heads, which without kernels takes more memory
    assert forward <= 4.1 and backward <= 6.8
    monkeypatch.setattr(memory.long, "FROM_TOKENS", 1 << 20)
    whole = peaks(waits)
    assert whole[0] > 1.8 * forward and whole[1] > 1.6 * backward
