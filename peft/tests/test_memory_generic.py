"""Mode lean in layers that nobody wrote by hand: what runs how often, what is kept, and whose gradients arrive."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import get_peft_model
from tiny_models import MODELS, build, logits, randomize_adapters, skip_before
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_control import ControlConfig
from peft_control.architectures import find_layers
from peft_control.memory import generic, layers, set_memory_mode


def control(name, blocks=None, dtype=torch.float64, **fields):
    base = build(name, dtype).requires_grad_(False)
    every = next(iter(find_layers(base).values()))[1].blocks
    config = ControlConfig(control_blocks=list(blocks or every), control_rank=3, init_weights=False, **fields)
    return randomize_adapters(get_peft_model(base, config)).train()


def step(model, inputs, seed=3):
    """Loss and gradients of a step."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss if "labels" in inputs else logits(model, inputs).double().square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def labelled(name, **more):
    inputs = MODELS[name].inputs(torch.float64)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100), **more}


@pytest.fixture
def counted(monkeypatch):
    """How often a layer was run alone and by torch's checkpointing, and how its MLPs ran in the recomputation."""
    counts = {"alone": 0, "checkpoint": 0, "computed": 0, "left out": 0}
    own, node, recomputed = generic.GenericCall.forward, generic.Tokens.forward, generic.recomputed

    def alone(*arguments):
        counts["alone"] += 1
        return own(*arguments)

    def mlp(ctx, x, plan, own, shapes):
        counts["computed" if shapes is None else "left out"] += 1
        return node(ctx, x, plan, own, shapes)

    def checkpoint(*arguments, **named):
        counts["checkpoint"] += 1
        return recomputed(*arguments, **named)

    monkeypatch.setattr(generic.GenericCall, "forward", alone)
    monkeypatch.setattr(generic.Tokens, "forward", staticmethod(mlp))
    for module in (generic, layers):
        monkeypatch.setattr(module, "recomputed", checkpoint)
    return counts


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "llama4", "gemma2", "olmo2", "glm4", "phi3", "gemma4", "qwen3_vl", "clip"]
)
def test_a_step_runs_each_mlp_once_more(name, counted):
    """From the second step on; the first finds out that what follows an MLP needs none of its values."""
    if name == "gemma4":
        skip_before("transformers", "5.23", "has its layers share what torch's checkpointing must recompute")
    model, inputs = control(name), MODELS[name].inputs(torch.float64)
    count = len(find_layers(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    calls = []
    set_memory_mode(model, "lean", chunk_tokens=4)
    for plan in [p for module in model.modules() if isinstance(p := vars(module).get("memory_plan"), generic.TokensPlan)]:
        plan.pieces = lambda x, pieces=plan.pieces: calls.append(len(pieces(x))) or pieces(x)
    found = []
    for _ in range(2):
        calls.clear()
        before = dict(counted)
        step(model, inputs)
        found.append(({key: counted[key] - before[key] for key in counted}, len(calls)))
    # forward, the recomputed values, and the backward; then forward and backward
    assert found[0] == ({"alone": count, "checkpoint": 0, "computed": count, "left out": 0}, 3 * count)
    assert found[1] == ({"alone": count, "checkpoint": 0, "computed": 0, "left out": count}, 2 * count)
    assert max(calls) > 1


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "gpt2", "bart", "whisper"])
@pytest.mark.parametrize("offload", [False, True])
def test_dropout_is_replayed(name, offload, counted):
    fields = {"control_dropout": 0.3}
    model, inputs = control(name, **fields), MODELS[name].inputs(torch.float64)
    for module in model.modules():
        for attribute in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.2)
    if "input_ids" in inputs:
        inputs["use_cache"] = False
    expected, other = step(model, inputs), step(model, inputs, seed=4)
    set_memory_mode(model, "lean", offload=offload)
    for _ in range(2):
        loss, gradient = step(model, inputs)
        assert loss == pytest.approx(expected[0], rel=1e-12) and loss != pytest.approx(other[0], rel=1e-6)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-12)
    assert counted["alone"] == 2 * len(find_layers(model)) and not counted["checkpoint"]


@pytest.mark.parametrize("name", ["gemma2", "t5", "bart", "starcoder2", "gpt_oss", "clip", "whisper"])
def test_autocast_rounds_as_in_plain(name):
    """Bit for bit, dropout included: the same casts are made, and the backward runs outside of autocast."""
    model, inputs = control(name, dtype=torch.float32), MODELS[name].inputs()
    if "input_ids" in inputs and name != "clip":
        inputs["use_cache"] = False

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = logits(model, inputs).float().square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    expected = gradients()
    set_memory_mode(model, "lean")
    for _ in range(2):
        assert torch.equal(gradients(), expected)


@pytest.mark.parametrize("name, attribute", [("mixtral", "jitter_noise"), ("phimoe", "router_jitter_noise")])
def test_noise_of_routers_is_replayed(name, attribute, counted):
    model, inputs = control(name), {**MODELS[name].inputs(torch.float64), "use_cache": False}
    for module in model.modules():
        if hasattr(module, attribute):
            setattr(module, attribute, 0.2)
    expected = step(model, inputs)
    set_memory_mode(model, "lean", chunk_tokens=4)
    for _ in range(2):
        torch.testing.assert_close(step(model, inputs)[1], expected[1], rtol=1e-9, atol=1e-12)
    assert counted["alone"] == 4 and not counted["computed"] + counted["left out"]


def test_lora_beside_the_control_gets_its_gradients(counted):
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_dropout": 0.2}
    model, inputs = control("qwen3_moe", ("mlp",), **fields), MODELS["qwen3_moe"].inputs(torch.float64)
    inputs["use_cache"] = False
    expected = step(model, inputs)[1]
    set_memory_mode(model, "lean", chunk_tokens=5)
    torch.testing.assert_close(step(model, inputs)[1], expected, rtol=1e-9, atol=1e-12)
    assert counted["alone"] == 2


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_lora_on_experts_beside_the_control_gets_its_gradients(name, counted):
    """peft's target_parameters; what is trained in an MLP has it run within the layer's graph."""
    model = control(name, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    inputs = {**MODELS[name].inputs(torch.float64), "use_cache": False}
    expected = step(model, inputs)[1]
    set_memory_mode(model, "lean", chunk_tokens=5)
    torch.testing.assert_close(step(model, inputs)[1], expected, rtol=1e-9, atol=1e-12)
    assert counted["alone"] == 2 and not counted["computed"]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "qwen3_next"])
def test_the_loss_of_the_routers_keeps_its_gradient(name, counted):
    """Routers record their logits, which a layer does not return."""
    if name == "granitemoe":
        skip_before("transformers", "5.23", "cannot add this loss to one of its own")
    model = control(name)
    inputs = labelled(name, use_cache=False)
    with_routers = {**inputs, "output_router_logits": True}
    model.base_model.model.router_aux_loss_coef = 3.0
    alone = step(model, inputs)
    expected = step(model, with_routers)
    assert expected[0] > alone[0] + 1 and not torch.allclose(expected[1], alone[1], rtol=1e-3)
    set_memory_mode(model, "lean", chunk_tokens=4)
    loss, gradient = step(model, with_routers)
    assert loss == pytest.approx(expected[0], rel=1e-9)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-8, atol=1e-11)
    assert counted["checkpoint"] and not counted["alone"]
    step(model, inputs)
    assert counted["alone"] == len(find_layers(model))


HEADS = [name for name in MODELS if MODELS[name].kind == "decoder"]


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_models_own(name):
    model, inputs = control(name), labelled(name, use_cache=False)
    expected, plain = step(model, inputs)
    set_memory_mode(model, "lean", chunk_tokens=8)
    loss, gradient = step(model, inputs)
    wide = 1e-5 if name in ("llama", "mistral", "qwen2", "qwen3", "glm4_moe", "deepseek_v2", "deepseek_v3") else 1e-9
    # some models compute their loss in float32
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (gradient - plain).norm() <= max(wide, 1e-6) * plain.norm()


def test_most_decoders_make_no_logits():
    without = []
    for name in HEADS:
        model = control(name)
        set_memory_mode(model, "lean")
        if model(**labelled(name, use_cache=False)).logits is None:
            without.append(name)
    left = {"gpt2", "granite", "granitemoe", "granitemoehybrid", "cohere", "cohere2", "falcon_h1", "opt", "gptj", "gpt_neo"}
    left |= {"gemma3n", "gemma4", "gpt_neox", "gpt_neox-sequential", "mamba", "mamba2"}
    assert {*HEADS} - {*without} == left


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_alike(duplicate):
    model, inputs = control("qwen3_moe"), {**MODELS["qwen3_moe"].inputs(torch.float64), "use_cache": False}
    set_memory_mode(model, "lean", chunk_tokens=4)
    expected = step(model, inputs)[1]
    other = duplicate(model)
    set_memory_mode(model, "plain")
    torch.testing.assert_close(step(other, inputs)[1], expected, rtol=1e-9, atol=1e-12)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_somebody_put_into_a_layer_runs_in_checkpointing(counted):
    """A hook may keep what it sees, with gradients; so may a layer of one's own."""
    model, inputs, seen = control("qwen3_moe"), MODELS["qwen3_moe"].inputs(torch.float64), []
    inputs["use_cache"] = False
    set_memory_mode(model, "lean")
    hook = model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    step(model, inputs)
    assert seen[0].requires_grad and counted["alone"] == 1 and counted["checkpoint"] == 1
    hook.remove()
    step(model, inputs)
    assert counted["alone"] == 3 and counted["checkpoint"] == 1


def test_recorded_states_and_shared_keys_keep_their_gradients(counted):
    model, inputs = control("gemma2"), MODELS["gemma2"].inputs(torch.float64)
    for asked in ("output_hidden_states", "output_attentions"):
        torch.manual_seed(0)
        model.config._attn_implementation = "eager"
        grads = []
        for mode in ("plain", "lean"):
            set_memory_mode(model, mode)
            model.zero_grad()
            output = model(**inputs, use_cache=False, **{asked: True})
            sum(x.square().mean() for x in output[asked.removeprefix("output_")]).backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)
    assert not counted["alone"]


def test_keys_that_layers_share_keep_their_gradients():
    """A layer of Gemma 4 leaves its keys and values for later ones in a mapping, which is no return value."""
    import transformers as hf
    from tiny_models import _ANY_DECODER

    fields = {**_ANY_DECODER, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    base = (
        hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**fields, layer_types=kinds, vocab_size_per_layer_input=61))
        .double()
        .requires_grad_(False)
    )
    config = ControlConfig(control_blocks=["attention", "mlp"], control_rank=3, init_weights=False)
    model, inputs = get_peft_model(base, config).train(), MODELS["gemma4"].inputs(torch.float64)
    expected = step(model, {**inputs, "use_cache": False})[1]
    set_memory_mode(model, "lean")
    for _ in range(2):
        torch.testing.assert_close(step(model, {**inputs, "use_cache": False})[1], expected, rtol=1e-9, atol=1e-12)


def test_a_second_backward_and_changes_in_between_are_errors():
    inputs = {**MODELS["mixtral"].inputs(torch.float64), "use_cache": False}

    def loss():
        model = control("mixtral")
        set_memory_mode(model, "lean")
        return model, model(**inputs).logits.sum()

    model, value = loss()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once per forward"):
        value.backward()
    model, value = loss()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    model, value = loss()
    model.base_model.disable_adapter_layers()
    with pytest.raises(RuntimeError, match="adapters were switched"):
        value.backward()


class Alive(TorchDispatchMode):
    """Numbers in tensors that were made within and are still held by somebody; those of ``model`` are no news."""

    def __init__(self, model):
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        self.count, self.known = 0, {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                size = storage.nbytes() // tensor.element_size()
                self.count += size
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.gone, storage._cdata, size)
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.count -= size


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4", "gpt2"])
def test_a_layer_keeps_its_state_alone(name):
    """Between forward and backward; what the embeddings and the last norm keep is there without layers too."""
    model, inputs = control(name, dtype=torch.float32), {**MODELS[name].inputs(), "use_cache": False}
    inner = model.base_model.model.base_model
    stack = inner.h if name == "gpt2" else inner.layers
    layers_of_model = list(stack)

    def kept(mode, count):
        del stack[:]
        stack.extend(layers_of_model[:count])
        set_memory_mode(model, mode)
        inner.config.num_hidden_layers = count
        inner(**inputs)
        with Alive(model) as alive:
            output = inner(**inputs)
            gc.collect()
            now = alive.count
        del output
        return now

    state = inputs["input_ids"].numel() * 32
    assert kept("lean", 2) - kept("lean", 1) == state
    assert kept("plain", 2) - kept("plain", 1) > 8 * state


def test_the_tail_of_a_layer_is_read_off_its_graph():
    x = torch.ones(3, requires_grad=True)
    mlp = (x * 2).clone()
    node, scale = mlp.grad_fn, torch.ones(3, requires_grad=True)
    assert generic.only_adds((x + mlp.view(3, 1).squeeze(1) * 3).grad_fn, [node])
    assert not generic.only_adds((x + mlp * scale).grad_fn, [node])
    assert not generic.only_adds((x + mlp.sin() + mlp).grad_fn, [node])
    assert not generic.only_adds((x * mlp + x).grad_fn, [node])
