import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from control_experiments.errors import UserError
from LlaMA import packing
from LlaMA.commonsense import TokenRow, tokenize_rows
from LlaMA.models import add_adapter, ready_to_train
from LlaMA.tests.conftest import adapted, configuration, published_loss


@pytest.fixture(params=["all", "response"])
def step(rows, tokenizer, request) -> list[TokenRow]:
    """10 rows of unlike lengths: micro-batches of 4, 4 and 2. Their loss is on all tokens, or on few."""
    return tokenize_rows(random.Random(0).sample(rows, 10), tokenizer, cutoff=256, response_only=request.param == "response")


def gradients(model, batches, loss):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        total += value.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(found, wanted):
    for name, gradient in wanted.items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("method", ["control+lora", "double control"])
@pytest.mark.parametrize("loss", [packing.batch_loss, packing.fused_batch_loss])
@pytest.mark.parametrize("budget", [256, 700, 100_000])
def test_packed_loss_and_gradients_are_the_published_ones(model, step, method, loss, budget):
    """From every row once, in packs within the budget."""
    model, packs = adapted(model, method), packing.packed_step(step, 4, budget)
    assert all(pack.tokens <= budget for pack in packs) and sum(pack.rows for pack in packs) == len(step)
    expected, wanted = gradients(model, [step], published_loss)
    total, found = gradients(model, packs, loss)
    assert total == pytest.approx(expected, rel=1e-5)
    assert_alike(found, wanted)


@pytest.mark.parametrize("loss", [packing.batch_loss, packing.fused_batch_loss])
def test_packs_of_fixed_shape_lose_the_same(model, step, loss):
    model = adapted(model)
    packs = packing.packed_step(step, 4, 700)
    fixed = [packing.fixed_shape(pack, 128, len(step), 256, pad_token_id=0) for pack in packs]
    assert all(whole.labels.shape[1] % 128 == 0 and len(whole.inputs["cu_seq_lens_q"]) == len(step) + 2 for whole in fixed)
    expected, wanted = gradients(model, packs, loss)
    total, found = gradients(model, fixed, packing.GraphedLoss(loss))
    assert total == pytest.approx(expected, rel=1e-5)
    assert_alike(found, wanted)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("method", ["double control", "control+lora", "lora", "dora"])
@pytest.mark.parametrize("loss", [packing.batch_loss, packing.fused_batch_loss])
def test_graphs_replay_the_packs_of_a_step(model, step, loss, method):
    """Packs of several shapes whose gradients add up, in any order, replayed with other rows than they were captured with."""
    model = adapted(model.bfloat16(), method).cuda().train()
    model.base_model.model.set_attn_implementation(packing.VARLEN)
    # as accelerate does: inside, autocast keeps casts even though the capture asks it not to
    model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    ready_to_train(model, "fast" if loss is packing.fused_batch_loss and "control" in method else "plain", half=True)
    graphed = packing.GraphedLoss(loss)
    for turn, rows in enumerate((step, step[::-1][:9], step, step[:4])):
        packs = [pack.to("cuda") for pack in packing.packed_step(rows, 4, 700)]
        fixed = [packing.fixed_shape(pack, 128, len(step), 256, 0).to("cuda") for pack in packing.packed_step(rows, 4, 700)]
        with torch.autocast("cuda", torch.bfloat16):
            expected, wanted = gradients(model, packs, loss)
            total, found = gradients(model, fixed[:: -1 if turn % 2 else 1], graphed)
        assert total == pytest.approx(expected, rel=1e-2)
        for name in wanted:
            assert (found[name] - wanted[name]).norm() <= 0.05 * wanted[name].norm(), name
    assert 2 <= len(graphed.graphs._graphs) <= 6  # also while the loss of the pack before is still there


@needs_gpu
@pytest.mark.parametrize("method", ["control+lora", "lora", "dora"])
def test_lora_dropout_draws_anew_in_each_replay(model, step, method):
    model = add_adapter(model.bfloat16(), configuration(method, lora_dropout=0.5)).cuda().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_model.model.set_attn_implementation(packing.VARLEN)
    ready_to_train(model, "plain", half=True)
    graphed, seen = packing.GraphedLoss(packing.batch_loss), []
    fixed = [packing.fixed_shape(pack, 128, len(step), 256, 0).to("cuda") for pack in packing.packed_step(step, 4, 700)]
    for _ in range(6):
        with torch.autocast("cuda", torch.bfloat16):
            total, found = gradients(model, fixed, graphed)
        assert total < 10 and all(torch.isfinite(gradient).all() for gradient in found.values())
        seen.append(torch.cat([gradient.flatten() for gradient in found.values()]))
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))


@pytest.mark.parametrize("batched", [packing.padded_step, packing.packed_step])
def test_shadow_learns_by_pefts_own_loss(model, step, batched):
    """Its network's loss added, and rows kept apart in that network too."""
    model = adapted(model, "shadow").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    (padded,) = packing.padded_step(step, len(step), 0)
    expected = model(**padded.inputs, labels=padded.labels).loss
    assert expected.item() > 1.02 * packing.batch_loss(model, padded).item()
    (batch,) = batched(step, len(step), 10_000 if batched is packing.packed_step else 0)
    assert packing.shadow_batch_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_response_only_loss_counts_responses_alone(model, rows, tokenizer):
    rows = tokenize_rows(rows[:3], tokenizer, cutoff=256, response_only=True)
    expected = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        chosen = logits.gather(1, torch.tensor(row.ids[1:])[:, None])[row.learned.index(1) - 1 :]
        expected -= chosen.sum().item()
    expected /= sum(row.targets for row in rows)
    (pack,) = packing.packed_step(rows, len(rows), 10_000)
    asked = []
    model.lm_head.register_forward_hook(lambda module, args, output: asked.append(output.shape[1]))
    assert packing.batch_loss(model, pack).item() == pytest.approx(expected, rel=1e-5)
    assert asked == [sum(row.targets for row in rows)]  # prompts cost no logits


def test_packing_is_refused_where_rows_would_mix_or_do_not_fit(model, step):
    with pytest.raises(UserError, match="--token_budget 10"):
        packing.packed_step(step, 4, 10)
    packing.check_packing(model, step)
    forward = model.model.forward

    def without_positions(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    model.model.forward = without_positions
    with pytest.raises(UserError, match="--batching padded"):
        packing.check_packing(model, step)


def test_varlen_attention_equals_the_masked_one(model, step, monkeypatch):
    """The kernel itself needs a GPU: here each row's attention is computed alone, as its documentation says."""

    def reference(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert window_size == (-1, 0)
        assert max_q == int(cu_q.diff().max())
        parts = []
        for a, b in pairwise(cu_q.tolist()):
            q, k, v = (states[a:b].transpose(0, 1) for states in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
        return torch.cat(parts, dim=1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    (pack,) = packing.packed_step(step, 4, 10_000)
    expected = model(**pack.inputs, use_cache=False).logits
    model.set_attn_implementation(packing.VARLEN)
    torch.testing.assert_close(model(**pack.inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
