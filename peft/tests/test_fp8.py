"""Frozen linear layers in FP8: the arithmetic against float64 and torch's own FP8 product, models in every mode."""

import copy
import math
import os
import pickle
import subprocess
import sys
from unittest.mock import Mock

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapted, assert_as_plain, assert_equal, build, randomize_adapters, step_on
from transformers import AutoModelForCausalLM

from control_experiments.errors import UserError
from control_experiments.training.quantization import check_not_quantized, loading_arguments, quantization_of
from peft_control import Fp8Config, Fp8Experts, Fp8Linear, fp8, memory, quantize_fp8
from peft_control.memory import MODES, kernels, loss, set_memory_mode
from peft_control.memory.linear import input_gradient, joint_format, joint_gradient, outputs, rows_of

E4M3 = torch.float8_e4m3fn
IDS = {"input_ids": torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def on_kernels(monkeypatch):
    """The path of GPUs with FP8, on the CPU, whose `torch._scaled_mm` takes the same arguments; the calls are noted."""
    calls, own, rows, ones = [], torch._scaled_mm, torch.zeros(16, 16, dtype=E4M3), torch.ones(16, 1)
    try:
        own(rows, rows.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("oneDNN's product for this processor takes no scales by row")

    def noted(a, b, **named):
        assert a.is_contiguous() and b.t().is_contiguous()  # what cuBLAS and CUTLASS ask for
        shapes = named["scale_a"].shape, named["scale_b"].shape
        assert shapes in (((len(a), 1), (1, b.shape[1])), ((1, 1), (1, 1)))
        calls.append((a.dtype, b.dtype, *a.shape, b.shape[1]))
        return own(a, b, **named)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    return calls


def random(rows, width, seed=0, spread=2.0):
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, width, generator=generator) * sizes


def layer(width=48, out=64, bias=True, gradients="e4m3", seed=0):
    linear = torch.nn.Linear(width, out, bias=bias)
    linear.weight.data = random(out, width, seed=seed)
    return Fp8Linear.of(linear, gradients)


@pytest.mark.parametrize("dtype", fp8.FORMATS.values())
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_the_nearest_with_the_least_power_of_two(kind, dtype):
    x = torch.cat([random(6, 24, spread=1), torch.tensor([[448.0], [449.0], [0.25]]).expand(3, 24)]).to(kind)
    found, scale = fp8.quantize_rows(x, dtype)
    assert found.dtype == dtype and scale.dtype == torch.float32 and scale.shape == (9, 1)
    numbers = torch.arange(128, dtype=torch.uint8).view(dtype).double()  # the positive ones; the even lie at even places
    numbers = numbers[numbers.isfinite()]
    for row, q, factor in zip(x.double(), found.double(), scale.double().flatten()):
        assert math.frexp(factor)[0] == 0.5  # a power of two
        assert numbers[-1] * factor / 2 < row.abs().max() <= numbers[-1] * factor
        distances = (numbers - (row / factor).abs().unsqueeze(1)).abs() + torch.arange(len(numbers)) % 2 * 1e-12
        assert torch.equal(q, numbers[distances.argmin(1)].copysign(row))


def test_zero_huge_and_nan():
    nan, inf = math.nan, math.inf
    x = torch.tensor([[0, 0], [3e38, -1e38], [1e-42, 0], [1, nan], [inf, 1], [1, 2]])
    linear = Fp8Linear.of(torch.nn.Linear(2, 3, bias=False))
    for kind in (torch.float32, torch.bfloat16):
        q, scale = fp8.quantize_rows(x.to(kind))
        back = q.float() * scale
        assert torch.equal(back[0], x[0]) and torch.equal(back[5], x[5])
        assert back[1].isfinite().all() and torch.allclose(back[1], x[1], rtol=2**-4, atol=0)
        assert back[3:5].isnan().all()  # infinity too: a loss scaler must see it, and e4m3 has none
        for result in (linear(x.to(kind)), linear.input_gradient(torch.cat([x, x[:, :1]], 1).to(kind))):
            assert (result[0] == 0).all() and result[3:5].isnan().all() and result[[2, 5]].isfinite().all()
    assert linear(x[:0]).shape == (0, 3)


def error(x, scale):
    """The most by which e4m3 moves numbers: half a unit of 3 bits of fraction, 2**-4 of each, or half its least number."""
    return torch.maximum(x.abs() * 2**-4, scale.double() * 2**-10)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_are_within_e4m3s_rounding(kind):
    """Of a product of sums: |x| e(w) + e(x) |w| + e(x) e(w), and what bfloat16 rounds from the output, 2**-8 of it."""
    linear = torch.nn.Linear(48, 64)
    linear.weight.data = random(64, 48)
    linear = linear.to(kind)
    stored, w = Fp8Linear.of(linear), linear.weight.detach().double()
    x, dy = (random(40, width, seed=seed).to(kind) for width, seed in ((48, 1), (64, 2)))
    e_w = error(w, stored.weight_scale)
    folded = dy.double() * stored.weight_scale.double().view(1, -1)
    e_dy = error(folded, fp8.quantize_rows(folded.float())[1]) / stored.weight_scale.double().view(1, -1)
    leaf = x.clone().requires_grad_()
    y = stored(leaf)
    y.backward(dy)
    assert y.dtype == leaf.grad.dtype == kind
    for found, a, e_a, b, e_b, bias in (
        (y, x.double(), error(x.double(), fp8.quantize_rows(x)[1]), w.t(), e_w.t(), linear.bias.double()),
        (leaf.grad, dy.double(), e_dy, w, e_w, 0),
    ):
        exact = a @ b + bias
        bound = a.abs() @ e_b + e_a @ b.abs() + e_a @ e_b
        assert ((found.double() - exact).abs() <= bound + 2**-8 * (exact.abs() + bound)).all()
        assert 0.01 < (found.double() - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", fp8.FORMATS)
def test_kernels_and_emulation_give_the_same_bits(kind, gradients, on_kernels, monkeypatch):
    linear, x = layer(gradients=gradients), random(15, 48, seed=1).view(3, 5, 48).to(kind)
    dy = random(15, 64, seed=2).to(kind)

    def both():
        leaf = x.clone().requires_grad_()
        y = linear(leaf)
        y.backward(dy.view(y.shape))
        more = outputs(x, linear, linear)[1], input_gradient(dy, linear, torch.zeros(15, 48, dtype=kind))
        return y.detach(), leaf.grad, *more

    by_kernels = both()
    assert on_kernels[:2] == [(E4M3, E4M3, 15, 48, 64), (fp8.FORMATS[gradients], E4M3, 15, 64, 48)]
    assert len(on_kernels) == 5
    monkeypatch.setattr(fp8, "has_fp8", lambda device: False)
    emulated = both()
    assert len(on_kernels) == 5 and all(map(torch.equal, by_kernels, emulated))
    assert torch.equal(emulated[2], emulated[0]) and torch.equal(emulated[3], emulated[1].view(15, 48))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
        assert torch.equal(linear(x), linear(x.bfloat16()))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", fp8.FORMATS)
def test_layers_of_one_input_share_the_gradients_product(gradients, kind, on_kernels):
    """It is that of one layer with the weights of all."""
    linears = [layer(out=out, gradients=gradients, seed=out) for out in (64, 32, 16)]
    dy = random(15, 112, seed=2).to(kind)
    dtype, columns = joint_format(linears)
    rows, scales = fp8.quantize_rows(dy, dtype, torch.cat(columns))
    found = joint_gradient(rows, linears).to(kind) * scales
    assert on_kernels == [(fp8.FORMATS[gradients], E4M3, 15, 112, 48)]
    assert torch.equal(found, rows_of(linears, [slice(None)] * 3).input_gradient(dy))
    assert joint_format([*linears, torch.nn.Linear(48, 16)]) is None


def test_other_widths_are_emulated_with_one_warning(on_kernels):
    fp8._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="multiples of 16") as found:
        for width, out in ((40, 64), (48, 24)):
            layer(width, out)(random(3, width).requires_grad_()).sum().backward()
        assert not on_kernels
        layer()(random(3, 48))  # of rows there may be any number
    assert len(on_kernels) == len(found) == 1


def relative(found, reference):
    return (found - reference).norm() / reference.norm()


def test_lora_over_it_is_not_merged():
    model = get_peft_model(quantize_fp8(build("llama")), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
    mixed = adapted(quantize_fp8(build("llama")), target_modules=["q_proj"], use_dora=True)  # whose weights peft would write
    before = {name: weight.clone() for name, weight in mixed.state_dict().items()}
    for merge in (mixed.merge_and_unload, mixed.merge_adapter):
        with pytest.raises(ValueError, match="load the base in 16 bits and merge there"):
            merge()
    assert all(torch.equal(weight, before[name]) for name, weight in mixed.state_dict().items())


def test_one_quantized_activation_serves_several_layers(monkeypatch):
    model = adapted(quantize_fp8(build("llama")))
    quantize = Mock(wraps=fp8.quantize_rows)
    for place in ("peft_control.fp8", "peft_control.memory.linear", "peft_control.memory.kernels"):
        monkeypatch.setattr(f"{place}.quantize_rows", quantize)
    counts = {}
    for mode in ("plain", "fast"):
        set_memory_mode(model, mode)
        quantize.reset_mock()
        model(**IDS)
        counts[mode] = quantize.call_count / model.config.num_hidden_layers
    assert counts == {"plain": 7, "fast": 4}  # of q k v, o, gate up, down


def test_gradients_that_share_a_scale_are_no_rougher():
    """Those of q, k, v and of gate, up are one row in fast: against the same weights, multiplied in float32, as near as plain."""
    model = adapted(quantize_fp8(build("llama")))
    found = {mode: step_on(set_memory_mode(model, mode), IDS)[1] for mode in ("plain", "fast")}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Fp8Linear):
                dense = torch.nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dense.load_state_dict({**child.state_dict(), "weight": child.dequantize().float()}, strict=False)
                setattr(parent, name, dense.requires_grad_(False))
    _, exact = step_on(set_memory_mode(model, "plain"), IDS)
    errors = {mode: sum((g[name] - exact[name]).square().sum() for name in exact) for mode, g in found.items()}
    assert 0 < errors["fast"] < 1.2 * errors["plain"] and found["fast"].keys() == exact.keys()


def test_what_is_replaced():
    torch.manual_seed(0)
    base, lora = build("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["o_proj"])
    model = quantize_fp8(get_peft_model(base, lora), keep_last=0.5, gradients="e5m2")  # of two layers
    stored = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    names = ("self_attn.q_proj.base_layer", "self_attn.k_proj", "self_attn.v_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert stored.keys() == {f"base_model.model.model.layers.0.{name}" for name in names}
    assert {module.gradients for module in stored.values()} == {"e5m2"}
    with pytest.raises(ValueError, match="FP8 takes"):
        quantize_fp8(base, gradients="e3m4")
    with pytest.raises(ValueError, match="no nn.Linear and no experts"):
        quantize_fp8(build("gpt2"))


@pytest.mark.parametrize("name", ["opt", "bart", "t5", "mamba", "gemma3n"])
def test_a_model_may_have_its_adapter_before(name):
    """OPT's and BART's controls have their hooks on linear layers; T5, Mamba and Gemma-3n read weights of layers themselves."""
    inputs = tiny_models.MODELS[name].inputs()
    before, after = quantize_fp8(adapted(build(name))), adapted(quantize_fp8(build(name)))
    assert any(isinstance(module, Fp8Linear) for module in before.modules())
    (loss, gradients), (exact, _) = step_on(before, inputs), step_on(adapted(build(name)), inputs)
    assert tiny_models.distance(step_on(after, inputs)[1], gradients) == 0 and 0 < relative(loss, exact) < 0.02


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), *((name, torch.bfloat16) for name in ("llama", "qwen3_moe", "mixtral", "gpt_oss"))],
)
def test_models_are_quantized_as_they_are_read_and_saved_so(name, dtype, tmp_path):
    dense, load = build(name, dtype), AutoModelForCausalLM.from_pretrained
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=dtype, **loading_arguments("fp8", torch.device("cpu"), dtype))
    expected = quantize_fp8(dense).state_dict()
    model.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored")
    for found in (model, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(found.state_dict(), expected)
        assert quantization_of(found.config) == "fp8"
        stored = [module for module in found.modules() if isinstance(module, (Fp8Linear, Fp8Experts))]
        assert stored and not any(p.requires_grad for module in stored for p in module.parameters())
    with pytest.raises(UserError, match="quantized already"):
        check_not_quantized("nf4", again.config, "it")
    adapter = adapted(model, ("attention", "mlp")).eval()
    adapter.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**IDS).logits, adapter(**IDS).logits)
    torch.nn.Module.half(model)  # transformers' own refuses
    kept = {key for key, value in expected.items() if value.dtype in (torch.uint8, E4M3) or key.endswith("_scale")}
    state = {key: value for key, value in model.state_dict().items() if "_control" not in key}
    assert all(value.dtype == (expected[key].dtype if key in kept else torch.float16) for key, value in state.items())
    last = load(tmp_path / "dense", quantization_config=Fp8Config(keep_last=1.0))
    assert not any(isinstance(module, (Fp8Linear, Fp8Experts)) for module in last.modules())


def of_an_output_layer(kind, gradients="e4m3"):
    """Such a layer, states and labels, of which two count nothing."""
    labels = torch.arange(13) * 5
    labels[[3, 12]] = -1
    return layer(48, 64, gradients=gradients), random(13, 48, seed=1, spread=0.5).to(kind).requires_grad_(), labels


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_output_layers_loss_is_within_e4m3s_rounding(kind):
    """The logits' errors are those of a product, above: a loss moves by at most twice their largest. The gradient, against
    float64 from the same logits and the stored weight, has dy's rounding, after that to its type, and the output's."""
    head, hidden, labels = of_an_output_layer(kind)
    hidden.data.mul_(0.1)  # logits of ordinary sizes
    w, x, scale = head.dequantize().double(), hidden.detach().double(), head.weight_scale.double().view(1, -1)
    exact = (x @ w.t() + head.bias.double()).requires_grad_()
    moved = error(x, fp8.quantize_rows(hidden.detach())[1]) @ w.abs().t()
    moved = moved + 2**-8 * (exact.abs() + moved)
    every = torch.nn.functional.cross_entropy(exact, labels, ignore_index=-1, reduction="none")
    found = loss.LinearCrossEntropy.apply(hidden, labels, head, 5, None)
    assert 0 < (found - every.sum()).abs() <= (2 * moved.amax(1))[labels >= 0].sum()
    (gradient,) = torch.autograd.grad(found, hidden)
    dy = head(hidden).detach().double()
    kernels.cross_entropy_(dy, labels)
    folded = dy * scale
    e_dy = error(folded, fp8.quantize_rows(folded.float())[1]) / scale + 2**-7 * dy.abs()
    bound = e_dy @ w.abs()
    assert ((gradient - dy @ w).abs() <= bound + 2**-7 * ((dy @ w).abs() + bound)).all()
    assert 1e-3 < relative(gradient, dy @ w) < 0.06


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", fp8.FORMATS)
def test_an_output_layers_loss_is_that_of_its_forward_and_input_gradient(gradients, kind, softcap, request, monkeypatch):
    """In chunks too, of all rows or some, with weights or without; the weight is transposed once, whatever the chunks."""
    head, hidden, labels = of_an_output_layer(kind, gradients)
    weights, some = torch.rand(13), torch.tensor([7, 0, 2, 3, 9])
    logits, slope = head(hidden).detach(), 1.0
    if softcap is not None:
        part = torch.tanh(logits / softcap)
        slope, logits = 1 - part.square(), part * softcap
    losses = kernels.cross_entropy_(logits, labels)
    expected = head.input_gradient(logits * slope)
    turn = Mock(wraps=fp8.transposed)
    monkeypatch.setattr(loss, "transposed", turn)

    def check():
        for chunk in (1, 5, 13):
            for factors in (None, weights):
                for rows in (None, some):
                    turn.reset_mock()
                    found = loss.LinearCrossEntropy.apply(hidden, labels, head, chunk, softcap, factors, rows)
                    (gradient,) = torch.autograd.grad(found, hidden)
                    factor = (torch.ones(13) if factors is None else factors)[slice(None) if rows is None else rows]
                    torch.testing.assert_close(found, (losses[slice(None) if rows is None else rows] * factor).sum())
                    wanted = torch.zeros_like(hidden) if rows is not None else torch.empty_like(hidden)
                    at = slice(None) if rows is None else rows
                    wanted[at] = (expected[at] if factors is None else expected[at] * factor[:, None]).to(kind)
                    assert torch.equal(gradient, wanted) and turn.call_count == 1

    check()
    calls = request.getfixturevalue("on_kernels")
    check()
    assert {(48, 64), (64, 48)} == {call[3:] for call in calls}


def test_an_output_layer_in_fp8_trains_in_every_mode_and_answers():
    base = quantize_fp8(build("llama"), output_layer=True)
    assert isinstance(base.lm_head, Fp8Linear)
    model, ids = adapted(base), torch.randint(3, 61, (2, 17))
    # 32 labels count: rows of dy that are divided by a power of two are rounded alike
    inputs = {"input_ids": ids, "labels": ids}
    assert_as_plain(model, inputs, *MODES[1:], tolerance=1e-2, chunk_tokens=8)
    model.eval()
    with torch.no_grad():
        states = model.get_base_model().model(input_ids=ids).last_hidden_state
        assert torch.equal(model(input_ids=ids).logits, base.lm_head(states))
    assert model.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_layers_of_one_input_are_joined_in_mode_fast(name, monkeypatch):
    """Then one product computes them, with the same result, and are stored as before."""
    model, products = adapted(quantize_fp8(build(name))), []
    before = copy.deepcopy(model.state_dict())
    of_rows = Fp8Linear.of_rows
    monkeypatch.setattr(Fp8Linear, "of_rows", lambda linear, *rows: products.append(linear) or of_rows(linear, *rows))
    found = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(memory, "_JOINED_ON", device)
        products.clear()
        found.append((step_on(set_memory_mode(model, "fast"), IDS), len(products)))
    (one, apart), (two, joined) = found
    assert joined == apart - 3 * model.config.num_hidden_layers
    assert one[0] == two[0] and all(torch.equal(gradient, two[1][name]) for name, gradient in one[1].items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_output_layer_is_in_fp8_only_if_asked_for(tmp_path):
    lora = LoraConfig(target_modules=["lm_head"])
    model = get_peft_model(build("llama"), lora)
    assert type(quantize_fp8(model).get_output_embeddings().base_layer) is torch.nn.Linear
    assert type(quantize_fp8(model, output_layer=True).get_output_embeddings().base_layer) is Fp8Linear
    load = AutoModelForCausalLM.from_pretrained
    build("llama").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=Fp8Config(output_layer=True))
    model.save_pretrained(tmp_path / "stored")
    expected = quantize_fp8(build("llama"), output_layer=True).state_dict()
    assert expected["lm_head.weight"].dtype == torch.uint8
    for found in (model, load(tmp_path / "stored")):
        assert_equal(found.state_dict(), expected)
        assert not any(parameter.requires_grad for parameter in found.lm_head.parameters())
    tied = build("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    trained = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for refused, message in (
        (lambda: quantize_fp8(tied, output_layer=True), "output layer is its embedding"),
        (lambda: load(tmp_path / "tied", quantization_config=Fp8Config(output_layer=True)), "output layer is its embedding"),
        (lambda: quantize_fp8(trained, output_layer=True), "an nn.Linear and stays frozen"),
        (lambda: quantize_fp8(build("vit"), output_layer=True), "an nn.Linear and stays frozen"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not any(isinstance(module, Fp8Linear) for module in (*tied.modules(), *trained.modules()))


@pytest.mark.parametrize("block", [(16, 32), None])
def test_bases_stored_in_blocks_of_fp8_train_in_every_mode(block, monkeypatch):
    """transformers' layers, whose forward needs kernels of the hub: here it multiplies by what the blocks stand for."""
    import transformers.integrations.finegrained_fp8 as blocks

    tiny_models.skip_before("transformers", "5.23", "has no gradient through such layers")

    def multiply(x, weight, scale, block_size, bias, *rest):
        return torch.nn.functional.linear(x, blocks._dequantize_fp8_weight(weight, scale, block_size, x.dtype), bias)

    monkeypatch.setattr(blocks, "fp8_linear", multiply)
    base = build("llama")
    for parent in [module for layer in base.model.layers for module in (layer.self_attn, layer.mlp)]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                new = blocks.FP8Linear(linear.in_features, linear.out_features, block)
                new.weight.data = linear.weight.data.to(E4M3)
                new.weight_scale_inv.data.uniform_(0.5, 2.0)
                setattr(parent, name, new)
    assert_as_plain(adapted(base), IDS, *MODES[1:], tolerance=1e-5, chunk_tokens=8)


def test_where_there_is_no_fp8(monkeypatch):
    fp8._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="this cpu has no FP8") as found:
        layer()(layer(out=48)(random(3, 48)))
    assert len(found) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old GPU")
    with pytest.raises(UserError, match="An old GPU has no FP8.*choose --quantization nf4 or int8"):
        loading_arguments("fp8", torch.device("cuda", 7), torch.bfloat16)


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    model, compiled = quantize_fp8(build("llama")), quantize_fp8(build("llama"))
    compiled = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    assert torch.equal(model(**IDS).logits, compiled(**IDS).logits)


@pytest.mark.skipif(not torch.cuda.is_available() or not fp8.has_fp8(torch.device("cuda", 0)), reason="needs a GPU with FP8")
class TestOnGpu:
    """Kernels against the torch paths of the CPU: the same bits, but for the sums of a product."""

    @pytest.mark.parametrize("dtype", fp8.FORMATS.values())
    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("width", [16, 1000, 14336])
    def test_rows(self, width, kind, dtype):
        x = random(67, width, spread=3)
        x[0, 1], x[1, 2], x[2], x[3] = math.nan, math.inf, 0.0, 3e-39
        x[4, 0], x[4, 1:] = 448.0, 0.3
        columns = 2.0 ** torch.randint(-9, 3, (width,))
        for chosen in (None, columns):
            expected = fp8.quantize_rows(x.to(kind), dtype, chosen)
            found = fp8.quantize_rows(x.to(kind).cuda(), dtype, None if chosen is None else chosen.cuda())
            for a, b in zip(found, expected):
                assert torch.equal(a.cpu().float().nan_to_num(-1.0), b.float().nan_to_num(-1.0))

    def test_bytes_are_transposed(self):
        for rows, width in (((4096,), 1024), ((200, 16, 24), 48), ((1, 3), 7)):
            weights = [torch.randint(0, 256, (number, width), dtype=torch.uint8) for number in rows]
            found, ones = fp8.transposed(*(weight.cuda() for weight in weights))
            assert torch.equal(found.cpu(), torch.cat(weights).t()) and torch.equal(ones.cpu(), torch.ones(1, width))

    @pytest.mark.parametrize("dtype", fp8.FORMATS.values())
    @pytest.mark.parametrize(("heads", "few", "dim"), [(32, 8, 128), (3, 1, 20)])
    def test_rows_of_attentions_gradients(self, heads, few, dim, dtype):
        torch.manual_seed(0)
        parts = [torch.randn(2, n, 67, dim).bfloat16().transpose(1, 2) for n in (heads, few, few)]
        angles = torch.randn(1, 67, dim // 2).repeat(1, 1, 2)
        tables, columns = (angles.cos(), angles.sin()), [2.0 ** torch.randint(-9, 3, (n * dim,)) for n in (heads, few, few)]
        parts[2][1, 5, 0, 3] = math.nan
        expected, scale = kernels.rope_backward_rows(*parts, *tables, dtype, columns)
        parts, tables, columns = ([x.cuda() for x in some] for some in (parts, tables, columns))
        found, factor = kernels.rope_backward_rows(*parts, *tables, dtype, columns)
        one, two = found.cpu().double() * factor.cpu(), expected.double() * scale
        assert torch.equal(one.isnan(), two.isnan()) and one[67 + 5].isnan().all()
        assert relative(one.nan_to_num(), two.nan_to_num()) < 2e-3  # fused products' last bit

    def test_rows_of_a_norm(self):
        for width in (96, 4096):
            x, weight = (random(size, width, seed=size, spread=1).bfloat16().cuda() for size in (67, 1))
            (q, scale), rstd = kernels.rms_norm_rows(x, weight[0], 1e-5)
            normal, expected = kernels.rms_norm(x.float(), weight[0], 1e-5)  # which is not rounded
            torch.testing.assert_close(rstd, expected, rtol=1e-6, atol=0)  # sums of other orders
            rows, factors = fp8.quantize_rows(normal)
            assert relative(q.double() * scale, rows.double() * factors) < 1e-3

    @pytest.mark.parametrize("width", [1000, 17000])
    def test_rows_of_swiglu(self, width):
        gate, up, dact = (random(67, width, seed=seed, spread=1).bfloat16() for seed in range(3))
        columns = [2.0 ** torch.randint(-9, 3, (width,)) for _ in range(2)]

        def pairs(device):
            a, b, c = (x.to(device) for x in (gate, up, dact))
            return [kernels.swiglu_rows(a, b), kernels.swiglu_backward_rows(a, b, c, E4M3, [x.to(device) for x in columns])]

        for (found, scale), (expected, expected_scale) in zip(pairs("cuda"), pairs("cpu")):
            assert relative(found.cpu().double() * scale.cpu(), expected.double() * expected_scale) < 2e-3  # exp's last bit

    @pytest.mark.parametrize("dtype", fp8.FORMATS.values())
    @pytest.mark.parametrize("classes", [1000, 128256])
    def test_rows_of_cross_entropy(self, classes, dtype):
        logits, labels = random(67, classes, spread=1).bfloat16(), torch.arange(67) * 14
        logits[5, 7], labels[9], columns = math.nan, -1, 2.0 ** torch.randint(-9, 3, (classes,))
        expected, (q, scale) = kernels.cross_entropy_rows(logits.clone(), labels, dtype, columns)
        found, (rows, factors) = kernels.cross_entropy_rows(logits.cuda(), labels.cuda(), dtype, columns.cuda())
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
        one, two = (part[0].double() * part[1].double() for part in ((rows.cpu(), factors.cpu()), (q, scale)))
        assert torch.equal(one.isnan().any(1), two.isnan().any(1)) and two[5].isnan().all() and not one[9].any()
        assert relative(one.nan_to_num(), two.nan_to_num()) < 2e-3  # exp's last bit

    @pytest.mark.parametrize("gradients", fp8.FORMATS)
    @pytest.mark.parametrize("rows", [1, 15, 512])
    def test_products(self, rows, gradients):
        linear, x, dy = layer(256, 96, gradients=gradients), random(rows, 256, seed=1), random(rows, 96, seed=2)
        on_gpu = copy.deepcopy(linear).cuda()
        for found, expected in (
            (on_gpu(x.bfloat16().cuda()), linear(x.bfloat16())),
            (on_gpu.input_gradient(dy.bfloat16().cuda()), linear.input_gradient(dy.bfloat16())),
        ):
            assert relative(found.cpu().double(), expected.double()) < 5e-3  # Hopper adds up in about 14 bits

    @pytest.mark.parametrize("method", tiny_models.METHODS)
    def test_modes_give_the_same_gradients(self, method):
        torch.manual_seed(0)
        config = tiny_models.config_of(method, ["q_proj", "v_proj"])
        model = randomize_adapters(get_peft_model(quantize_fp8(build("llama")), config)).cuda().train()
        ids = {name: x.cuda() for name, x in IDS.items()}
        assert all(gradient.isfinite().all() for gradient in step_on(model, ids)[1].values())
        if "control" in method:
            assert_as_plain(model, ids, *MODES[1:], tolerance=2e-2, chunk_tokens=8)


INTERPRETED = """
import torch
from peft_control import fp8_kernels
from peft_control.memory import kernels

for width in (96, 1408, 17000):
    gate, up = torch.randn(3, 2 * width).bfloat16().chunk(2, dim=1)
    columns = [torch.exp2(torch.randint(-9, -5, (width,)).float()) for _ in range(2)]
    step = (gate, up, torch.randn(3, width).bfloat16(), torch.float8_e4m3fn, columns)
    both = []
    for kernels.uses_kernels in (lambda x: False, lambda x: True):
        both.append([kernels.swiglu_rows(gate, up), kernels.swiglu_backward_rows(*step)])
    for (q, scale), (other, other_scale) in zip(*both):
        one, two = q.float() * scale, other.float() * other_scale
        assert ((one - two).abs() <= one.abs() / 8 + scale).float().mean() > 0.9

for heads, few, dim in ((4, 2, 16), (3, 1, 20)):
    torch.manual_seed(0)
    parts = [torch.randn(2, number, 5, dim).bfloat16().transpose(1, 2) for number in (heads, few, few)]
    tables = [torch.randn(1, 5, dim // 2).repeat(1, 1, 2).bfloat16() for _ in range(2)]
    columns, both = [torch.exp2(torch.randint(-9, -5, (number * dim,)).float()) for number in (heads, few, few)], []
    for kernels.uses_kernels in (lambda x: False, lambda x: True):
        both.append(kernels.rope_backward_rows(*parts, *tables, torch.float8_e4m3fn, columns))
    (q, scale), (other, other_scale) = both
    assert q.shape == other.shape == (10, (heads + 2 * few) * dim) and torch.equal(scale, other_scale)
    assert (q.float() == other.float()).float().mean() > 0.9

torch.manual_seed(0)
for width in (96, 17000):
    logits, labels, both = torch.randn(3, width).bfloat16(), torch.tensor([2, -1, 95]), []
    columns = torch.exp2(torch.randint(-9, -5, (width,)).float())
    for kernels.uses_kernels in (lambda x: False, lambda x: True):
        both.append(kernels.cross_entropy_rows(logits.clone(), labels, torch.float8_e4m3fn, columns))
    (losses, (q, scale)), (other_losses, (other, other_scale)) = both
    assert torch.allclose(losses, other_losses) and torch.equal(scale, other_scale)
    assert (q.float() == other.float()).float().mean() > 0.75

kernels._use_triton = fp8_kernels.uses_kernels = kernels.uses_kernels
for width in (96, 1408):
    x, weight = torch.randn(5, width).bfloat16(), torch.randn(width).bfloat16()
    (q, scale), rstd = kernels.rms_norm_rows(x, weight, 1e-5)
    normal, expected = kernels.rms_norm(x.float(), weight, 1e-5)
    assert torch.equal(rstd, expected)
    for one, two in zip((q, scale), fp8_kernels.quantize_rows(normal)):
        assert torch.equal(one.float(), two.float())
scales = 2.0 ** torch.randint(-3, 3, (5, 1))
found = kernels.rms_norm_backward(normal, x.float(), weight, rstd, scales=scales)
joined, tables = torch.randn(10, 8 * 16), [torch.randn(1, 5, 8).repeat(1, 1, 2) for _ in range(2)]
parts = [part.view(2, 5, -1, 16) for part in joined.split([64, 32, 32], dim=1)]
turned, value = kernels.rope(*parts[:2], *tables), parts[2].clone()
assert all(one is two for one, two in zip(kernels.rope(*parts[:2], *tables, in_place=True), parts))
assert all(torch.equal(one, two) for one, two in zip((*turned, value), parts))
kernels._use_triton = lambda x: False
expected = kernels.rms_norm_backward(normal * scales, x.float(), weight, rstd)
assert torch.allclose(found, expected, atol=1e-5)
weights = [torch.randint(0, 256, (rows, 48), dtype=torch.uint8) for rows in (300, 16, 7)]
for some in (weights[:1], weights):
    found, ones = fp8_kernels.transposed(*some)
    assert torch.equal(found, torch.cat(some).t()) and torch.equal(ones, torch.ones(1, 48))
"""


def test_kernels_run_in_tritons_interpreter():
    """It rounds some numbers to FP8 wrongly; what is seen here is that the kernels get what they ask for."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]
