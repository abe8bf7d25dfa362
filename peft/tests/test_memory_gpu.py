"""The Triton kernels against the pure torch path, and the modes in bf16: needs a GPU."""

import copy
import gc
from functools import partial

import pytest
import torch
from peft import get_peft_model
from test_memory import count_calls
from tiny_models import FAMILIES, adapted, bits_of_four, logits
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_control import ControlConfig, memory, quantize_fp8
from peft_control.fp8 import has_fp8
from peft_control.memory import MODES, kernels, set_memory_mode, streaming

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def llama(dtype=torch.float32, adapter=(), **fields):
    """A model on the GPU whose controls, unless ``adapter`` says otherwise, are no identity."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": 101, **fields})).to(dtype)
    blocks = dict(task_type="CAUSAL_LM", control_blocks=["attention", "mlp"], init_weights=False)
    return get_peft_model(base, ControlConfig(**{**blocks, **dict(adapter)})).cuda().train()


def gradients_of(model, ids, **more):
    model.zero_grad()
    model(**{"input_ids": ids, "labels": ids, **more}).loss.backward()
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


def learn(build, mode, **options):
    """The losses of twelve steps of a float32 adapter on a bf16 base, and the last one's gradients."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = build().bfloat16()
    adapter = ControlConfig(task_type="CAUSAL_LM", control_blocks=["attention", "mlp"], control_rank=16)
    model = set_memory_mode(get_peft_model(base, adapter).train(), mode, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    words = base.config.vocab_size
    ids = torch.randint(words, (2, 512), generator=torch.Generator().manual_seed(1)).cuda()
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in trained])
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def close(got, expected, tolerance):
    got, expected = got.double().cpu(), expected.double().cpu()
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_kernels_equal_the_torch_path(dtype, tolerance):
    torch.manual_seed(0)
    x, dy, r = (torch.randn(37, 576, dtype=dtype) for _ in range(3))
    w = torch.randn(576, dtype=dtype)
    y, rstd = kernels.rms_norm(x.cuda(), w.cuda(), 1e-6)
    y_ref, rstd_ref = kernels.rms_norm(x.double(), w.double(), 1e-6)
    close(y, y_ref, tolerance)
    dx = kernels.rms_norm_backward(dy.cuda(), x.cuda(), w.cuda(), rstd, r.cuda())
    close(dx, kernels.rms_norm_backward(dy.double(), x.double(), w.double(), rstd_ref, r.double()), tolerance)
    scales = 2.0 ** torch.randint(-3, 3, (37, 1))
    dx = kernels.rms_norm_backward(dy.cuda(), x.cuda(), w.cuda(), rstd, scales=scales.cuda())
    close(dx, kernels.rms_norm_backward(dy.double(), x.double(), w.double(), rstd_ref, scales=scales), tolerance)

    norm = torch.nn.LayerNorm(576, dtype=dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(norm.bias)
    wide = copy.deepcopy(norm).double()
    got = kernels.layer_norm(x.cuda() + 3, copy.deepcopy(norm).cuda(), torch.float32)
    assert got.dtype == torch.float32
    close(got, wide(x.double() + 3), tolerance)
    got = kernels.layer_norm_backward(dy.cuda(), x.cuda(), copy.deepcopy(norm).cuda(), r.cuda())
    close(got, kernels.layer_norm_backward(dy.double(), x.double(), wide, r.double()), tolerance)

    for rank in (3, 64, 80):
        hidden, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((37, rank), (rank, 576), (576,)))
        for up in (weight, weight.float().t().contiguous().t()):  # the backward's and the forward's
            for residual in (None, r, r.float()):
                tensors = x, hidden, up, 0.7, bias, residual
                on_gpu = [t.cuda() if torch.is_tensor(t) else t for t in tensors]
                wide = [t.double() if torch.is_tensor(t) else t for t in tensors]
                got, reference = kernels.add_low_rank(*on_gpu), kernels.add_low_rank(*wide)
                assert got.dtype == (x if residual is None else residual).dtype
                close(got, reference, tolerance)
                if residual is None:
                    assert kernels.add_low_rank(*on_gpu, out=on_gpu[0]) is on_gpu[0]
                    close(on_gpu[0], reference, tolerance)

    for count, width, rank in ((2050, 96, 16), (128, 256, 64)):  # the second's tiles are whole
        for like in (dtype, torch.float32):
            tensors = (
                torch.randn(count, width, dtype=dtype),
                torch.randn(count, rank, dtype=dtype),
                torch.randn(rank, width, dtype=like),
            )
            got = kernels.add_low_rank(*(t.cuda() for t in tensors))
            close(got, kernels.add_low_rank(*(t.double() for t in tensors)), tolerance)

    halves = torch.cat((x, dy), dim=-1).cuda().chunk(2, dim=-1)  # joined layers give such
    for gate, up in ((x.cuda(), dy.cuda()), halves):
        close(kernels.swiglu(gate, up), kernels.swiglu(x.double(), dy.double()), tolerance)
        got = kernels.swiglu_backward_(gate, up, r.cuda())
        for a, b in zip(got, kernels.swiglu_backward_(x.double(), dy.double(), r.double())):
            close(a, b, tolerance)

    query, key = torch.randn(2, 5, 6, 64, dtype=dtype), torch.randn(2, 2, 5, 64, dtype=dtype).transpose(1, 2)
    angle = torch.randn(1, 5, 32).repeat(1, 1, 2)
    mixed = key.transpose(2, 3).contiguous().transpose(2, 3)  # as attention may give gradients
    for tensors in ((query, key, angle.cos(), angle.sin()), (query, mixed, angle.cos(), angle.sin())):
        for backward in (False, True):
            found = kernels.rope(*(x.cuda() for x in tensors), backward)
            for got, reference in zip(found, kernels.rope(*(x.double() for x in tensors), backward)):
                close(got, reference, tolerance)
    joined = torch.cat([query.flatten(2), key.flatten(2)], dim=-1).cuda()  # as layers of one input give them
    parts = [x.unflatten(-1, (-1, 64)) for x in joined.split([6 * 64, 2 * 64], dim=-1)]
    found = kernels.rope(*parts, angle.cos().cuda(), angle.sin().cuda(), in_place=True)
    for got, part, reference in zip(found, parts, kernels.rope(*(x.double() for x in (query, key, angle.cos(), angle.sin())))):
        assert got is part
        close(got, reference, tolerance)

    logits, labels = torch.randn(19, 20011, dtype=dtype) * 3, torch.randint(20011, (19,))
    labels[4] = -1
    ours, reference = logits.cuda(), logits.double()
    close(kernels.cross_entropy_(ours, labels.cuda()), kernels.cross_entropy_(reference, labels), 1e-5)
    close(ours, reference, tolerance)
    assert not ours[4].any()


def test_prompts_cost_no_logits():
    model, labels = llama(torch.bfloat16, vocab_size=20011), torch.full((2, 512), -100, device="cuda")
    ids = torch.randint(20011, (2, 512), generator=torch.Generator().manual_seed(1)).cuda()
    labels[:, 500:] = ids[:, 500:]
    reference = gradients_of(model, ids, labels=labels)
    set_memory_mode(model, "fast")
    gradients_of(model, ids, labels=labels)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    close(gradients_of(model, ids, labels=labels), reference, 2e-2)
    assert torch.cuda.max_memory_allocated() - before < 16 << 20  # of 41 MB of logits


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("mode", "offload", "rows"),
    [
        *((mode, False, "") for mode in MODES[1:]),
        *(("lean", True, rows) for rows in ("", "kept", "long", "in turns")),
        *(("lean", False, "long"), ("lean", False, "in turns"), ("lean", "fp8", ""), ("balanced", True, "kept")),
    ],
)
def test_float32_adapters_on_a_bf16_base_learn_as_in_plain(mode, cuda_graphs, offload, rows, monkeypatch):
    """The same steps on the same data: the losses of all modes lie on each other."""
    if rows == "kept":  # queries, keys and values too
        monkeypatch.setattr(memory, "_PARAMETERS_PER_BYTE", 0)
    if rows == "long":
        monkeypatch.setattr(memory.long, "FROM_TOKENS", 1)
    if rows == "in turns":
        monkeypatch.setattr(memory.attention, "_TOGETHER", 1)
    heads = dict(num_attention_heads=8, num_key_value_heads=2)
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=32000, **heads)
    build = partial(LlamaForCausalLM, config)
    plain, reference = learn(build, "plain")
    losses, gradients = learn(build, mode, cuda_graphs=cuda_graphs, offload=offload)
    assert plain[-1] < 10.0
    assert losses[-1] == pytest.approx(plain[-1], rel=2e-3)
    close(gradients, reference, 0.05)


@pytest.mark.parametrize("offload, chunk", [(False, None), (True, None), (True, 300)])
def test_experts_in_grouped_kernels_learn_as_in_plain(offload, chunk):
    sizes = dict(hidden_size=512, moe_intermediate_size=256, num_hidden_layers=3, head_dim=64, vocab_size=8000)
    heads = dict(num_attention_heads=8, num_key_value_heads=2)
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=4)

    def build():
        base = Qwen3MoeForCausalLM(config)
        assert base.config._experts_implementation == "grouped_mm"
        return base

    (plain, _), (lean, _) = learn(build, "plain"), learn(build, "lean", offload=offload, chunk_tokens=chunk)
    assert plain[-1] < plain[0] - 0.1
    assert lean == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("mode", MODES[1:])
def test_eager_attention_with_as_many_keys_as_queries(mode):
    """Its gradients of the keys have other strides than their heads; sharp attention shows it."""
    model = llama(hidden_size=256, intermediate_size=512, num_key_value_heads=4, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 10
    ids = torch.randint(101, (2, 33), device="cuda")
    reference = gradients_of(model, ids)
    set_memory_mode(model, mode)
    close(gradients_of(model, ids), reference, 1e-3)
    blocks = [layer.memory_plan.mlp for layer in model.get_base_model().model.layers]
    assert all((len(block.joined.now()) == 1) == (mode == "fast") for block in blocks)


def test_graphs_follow_shapes_and_refuse_what_would_be_wrong():
    model = llama(torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(ids, mask=None, **options):
        set_memory_mode(model, "fast", **options)
        first, replayed = (gradients_of(model, ids, attention_mask=mask) for _ in range(2))
        assert torch.equal(first, replayed)
        return first

    for tokens in (16, 40):
        ids = torch.randint(101, (3, tokens), device="cuda")
        mask = torch.ones_like(ids)
        close(gradients(ids, mask, cuda_graphs=True), gradients(ids, mask), 1e-2)
        mask[0, -5:] = 0
        close(gradients(ids, mask, cuda_graphs=True), gradients(ids, mask), 1e-2)

    def accumulated(**options):
        set_memory_mode(model, "fast", **options)
        model.zero_grad()
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in trained])

    close(accumulated(cuda_graphs=True), 3 * gradients(ids), 1e-2)

    set_memory_mode(model, "fast", cuda_graphs=True)
    first, second = (model(input_ids=ids, labels=ids).loss for _ in range(2))
    second.backward()
    with pytest.raises(RuntimeError, match="before the next forward"):
        first.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["timm-vit", "vit", "dinov2", "roberta", "bert"])
def test_graphs_of_encoders_take_the_same_steps(family, mode):
    """With float16 autocast, a loss scaler's factor, and dropout that draws the same numbers as without graphs."""
    inputs = {name: value.cuda() for name, value in FAMILIES[family].inputs(torch.float32).items()}

    def train(**options):
        torch.manual_seed(0)
        dropout = 0.3 if family in ("roberta", "bert") and mode != "lean" else 0.0  # lean's graphs draw others
        model = adapted(family, dtype=torch.float32, dropout=dropout, control_rank=4).cuda()
        set_memory_mode(model, mode, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2)
        torch.manual_seed(1)
        losses = []
        for _ in range(5):
            with torch.autocast("cuda", torch.float16):
                loss = logits(model, inputs).float().square().mean()
            (1024 * loss).backward()
            for parameter in trained:
                parameter.grad /= 1024
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses), torch.cat([p.detach().flatten() for p in trained])

    (losses, trained), (reference, expected) = train(cuda_graphs=True), train()
    assert len(set(reference.tolist())) == 5
    # a captured step masks the attention explicitly, so another kernel may sum in another order
    torch.testing.assert_close(losses, reference, rtol=5e-3, atol=1e-6)
    close(trained, expected, 5e-3)


def test_balanced_with_lora_on_the_output_projection_is_captured():
    """Attention's half is then torch's checkpoint, which must not look at the generator while it is captured."""
    model = llama(adapter=dict(target_modules=["o_proj"], r=4, init_weights=True), intermediate_size=128, vocab_size=97)
    ids, losses = torch.randint(97, (2, 16), device="cuda"), []
    for cuda_graphs in (False, True):
        set_memory_mode(model, "balanced", cuda_graphs=cuda_graphs)
        losses += [model(input_ids=ids, labels=ids).loss for _ in range(3)]
        losses[-1].backward()
    assert max(losses) - min(losses) < 1e-4


@pytest.mark.parametrize("worth", [-1.0, 1e9])
@pytest.mark.parametrize("mode", ["lean", "balanced"])
def test_copies_that_are_measured_to_be_slow_give_way_to_computing(mode, worth, monkeypatch):
    monkeypatch.setattr(memory, "_PARAMETERS_PER_BYTE", 0)
    monkeypatch.setattr(memory.pace, "_WORTH", worth)
    shape = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=97)
    model = llama(torch.bfloat16, {"init_weights": True}, **shape)
    ids = torch.randint(97, (2, 1024), device="cuda")
    reference = gradients_of(model, ids)
    attention = model.get_base_model().model.layers[2].self_attn
    calls = count_calls({getattr(attention, name): name for name in ("q_proj", "o_proj")}, monkeypatch)
    set_memory_mode(model, mode)
    for _ in range(24):
        calls.clear()
        found = gradients_of(model, ids)  # on the CPU, so that the next forward knows of one layer at least
    close(found, reference, 0.05)
    twice = ({"q_proj", "o_proj"} if mode == "lean" else {"q_proj"}) if worth < 0 else set()
    assert {name for name, count in calls.items() if count == 2} == twice
    assert model.get_base_model().model.layers[0].memory_plan.host._pace._decided


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_dropout_on_the_gpu_is_replayed(mode, cuda_graphs):
    """The directional derivative along the gradient, with the masks drawn anew from the same seed."""
    model = adapted("roberta", dtype=torch.float32, dropout=0.2, control_rank=4, control_dropout=0.1).cuda()
    inputs = {name: value.cuda() for name, value in FAMILIES["roberta"].inputs().items()}
    set_memory_mode(model, mode, chunk_tokens=5, cuda_graphs=cuda_graphs)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss():
        torch.manual_seed(2)
        for twins in model.get_base_model().memory_plan.graphs._twins.values() if cuda_graphs else ():
            twins.forward.set_offset(0)
        return logits(model, inputs).double().square().sum()

    if cuda_graphs:
        loss()  # captures
        first, second = (logits(model, inputs) for _ in range(2))
        assert not torch.equal(first, second)  # each replay draws new masks
    gradients = [g.clone() for g in torch.autograd.grad(loss(), trained)]  # a graph's own memory, used again
    slope = sum(gradient.double().square().sum() for gradient in gradients).item()
    values = []
    for step in (1e-3, -1e-3):
        scale = step / slope**0.5
        torch._foreach_add_([p.data for p in trained], gradients, alpha=scale)
        with torch.enable_grad():
            values.append(loss().item())
        torch._foreach_add_([p.data for p in trained], gradients, alpha=-scale)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope**0.5, rel=2e-2)


def test_layers_of_a_lean_graph_draw_numbers_of_their_own():
    from peft_control.memory.replay import Twins

    device = torch.device("cuda", torch.cuda.current_device())
    one, other = Twins(device, 0), Twins(device, 1)

    def drawn(context):
        with context:
            return torch.rand(8, device=device)

    first = drawn(one.first())
    assert torch.equal(first, drawn(one.again()))
    assert not torch.equal(first, drawn(one.first())) and not torch.equal(first, drawn(other.first()))


@pytest.mark.parametrize("change", ["moved", "assigned", "alpha", "dropout", "adapter"])
@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_graphs_notice_what_they_were_not_captured_with(mode, change):
    model = llama(num_hidden_layers=4)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.cuda()
    ids = torch.randint(101, (3, 24), device="cuda")
    set_memory_mode(model, mode, cuda_graphs=True)
    for _ in range(3):
        before = gradients_of(model, ids)
    controls = [module for module in model.modules() if hasattr(module, "control_A")]
    if change == "moved":
        model.cpu()
        taken = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]  # where the weights were
        model.cuda()
        del taken
    elif change == "assigned":
        model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("control_" in name and ".default." in name)
    elif change == "alpha":
        for control in controls:
            control.alpha["default"] = 3.0
    elif change == "dropout":
        for control in controls:
            control.dropout["default"] = 0.5
        assert not torch.equal(gradients_of(model, ids), gradients_of(model, ids))
        return
    else:
        model.set_adapter("other")
    found = [gradients_of(model, ids) for _ in range(2)][1]
    set_memory_mode(model, "plain")
    close(found, gradients_of(model, ids), 1e-4)
    assert change == "moved" or (found - before).norm() > 1e-2 * before.norm()


@pytest.mark.parametrize("mode", ["plain", "balanced", "lean"])
@pytest.mark.parametrize("base", ["dense", "fp8", "nf4"])
def test_streamed_weights_take_the_same_steps_to_the_bit(base, mode):
    """Twelve layers whose copies take longer than their computation, and states that wait on the host too."""
    if base == "fp8" and not has_fp8(torch.device("cuda", 0)):
        pytest.skip("needs a GPU with FP8")
    torch.manual_seed(0)
    shape = dict(hidden_size=2048, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4)
    words = dict(vocab_size=101, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = LlamaConfig(**shape, **words, attn_implementation="eager")  # the others add up gradients in any order
    model = LlamaForCausalLM(config).bfloat16()
    if base == "fp8":
        quantize_fp8(model)
    elif base == "nf4":
        bits_of_four(model.model.layers, "cuda")
    adapter = ControlConfig(control_blocks=["attention", "mlp"], control_rank=8, init_weights=False)
    model = get_peft_model(model, adapter).train()
    ids = torch.randint(3, 101, (2, 64), device="cuda")

    def steps():
        found = []
        for _ in range(3):
            model.train().zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            found += [p.grad for p in model.parameters() if p.grad is not None]
            with torch.no_grad():
                model.eval()
                found += [model(input_ids=ids).logits, model.generate(input_ids=ids[:, :8], max_new_tokens=4, do_sample=False)]
        return [x.cpu() for x in found]  # what stays on the GPU would count in the next peak

    reference, most = None, {}
    for resident in (2, 3, False):  # the weights come to the GPU last
        set_memory_mode(model, mode, stream_weights=resident, offload=mode == "lean" or None)
        model.cuda()
        gc.collect()  # models of other tests count until then
        torch.cuda.reset_peak_memory_stats()
        found = steps()
        most[resident] = torch.cuda.max_memory_allocated()
        reference = reference or found
        assert len(found) == len(reference) > 6
        assert all(torch.equal(one, other) for one, other in zip(found, reference))
    layer = sum(p.nbytes for p in model.get_base_model().model.layers[0].parameters() if not p.requires_grad)
    assert most[False] - most[2] > 8 * layer and 0.9 * layer < most[3] - most[2] < 1.1 * layer


def test_a_model_on_the_gpu_is_streamed_from_there_and_comes_back():
    model = llama(num_hidden_layers=4)
    ids = torch.randint(101, (3, 24), device="cuda")
    set_memory_mode(model, "lean")
    reference, before = gradients_of(model, ids), {name: x.clone() for name, x in model.state_dict().items()}
    set_memory_mode(model, "lean", stream_weights=True)
    assert torch.equal(gradients_of(model, ids), reference)
    on_host = {name for name, x in model.state_dict().items() if x.device.type == "cpu"}
    assert on_host and all("layers" in name and "control" not in name for name in on_host)
    for layer in streaming.streams(model)[0].layers:
        assert layer.on_host[0].is_pinned()  # torch does not ask for the buffer, which it made itself
    set_memory_mode(model, "lean")
    assert all(x.is_cuda and torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(gradients_of(model, ids), reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("mode", MODES[1:])
def test_a_model_dispatched_over_two_gpus(mode):
    """accelerate's hooks move what each module is given; fast and balanced refuse them, lean runs them."""
    from accelerate import dispatch_model

    model = llama(num_hidden_layers=4).cpu()
    ids = torch.randint(101, (3, 24))
    reference = gradients_of(model, ids)
    base = model.get_base_model()
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    dispatch_model(base, {**places, **{f"model.layers.{number}": number // 2 for number in range(4)}})
    close(gradients_of(model, ids.cuda()), reference, 1e-4)
    try:
        set_memory_mode(model, mode)
    except ValueError as refusal:
        assert mode != "lean" and "somebody else" in str(refusal)
    close(gradients_of(model, ids.cuda()), reference, 1e-4)
