"""Mode lean in layers that nobody wrote by hand: what runs how often, what is kept, and whose gradients arrive."""

import gc

import pytest
import torch
from tiny_models import MODELS, Live, adapted, any_decoder, assert_as_plain, distance, logits, skip_before, step_of, step_on

from peft_control.architectures import find_layers
from peft_control.memory import generic, layers, set_memory_mode


def inputs_of(name, **more):
    """In float64; without a cache, which decoders would use in eval mode alone."""
    cacheless = {} if MODELS[name].kind == "clip" else {"use_cache": False}
    return {**MODELS[name].inputs(torch.float64), **cacheless, **more}


def labelled(name):
    inputs = inputs_of(name)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.fixture
def counted(monkeypatch):
    """How often a layer's MLPs were left to their own backward, or all of it to torch's checkpointing, and how MLPs ran."""
    counts = {"alone": 0, "checkpoint": 0, "computed": 0, "left out": 0}
    calls, node, recomputed = generic.MlpCalls, generic.Tokens.forward, generic.recomputed

    def alone(*arguments):
        counts["alone"] += 1
        counts["checkpoint"] -= 1
        return calls(*arguments)

    def mlp(ctx, x, plan, own, shapes):
        counts["computed" if shapes is None else "left out"] += 1
        return node(ctx, x, plan, own, shapes)

    def checkpoint(*arguments, **named):
        counts["checkpoint"] += 1
        return recomputed(*arguments, **named)

    monkeypatch.setattr(generic, "MlpCalls", alone)
    monkeypatch.setattr(generic.Tokens, "forward", staticmethod(mlp))
    for module in (generic, layers):
        monkeypatch.setattr(module, "recomputed", checkpoint)
    return counts


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4", "gemma2", "olmo2", "glm4", "phi3", "qwen3_vl", "clip"])
def test_a_step_runs_each_mlp_once_more(name, counted):
    """Where a norm follows an MLP from the second step on; the first finds that out."""
    model, inputs, calls = adapted(name, dropout=0.0), MODELS[name].inputs(torch.float64), []
    count = len(find_layers(model))
    set_memory_mode(model, "lean", chunk_tokens=4)
    for plan in [p for module in model.modules() if isinstance(p := vars(module).get("memory_plan"), generic.TokensPlan)]:
        plan.pieces = lambda x, pieces=plan.pieces: calls.append(len(pieces(x))) or pieces(x)
    found = []
    for _ in range(2):
        calls.clear()
        before = dict(counted)
        step_on(model, inputs)
        found.append(({key: counted[key] - before[key] for key in counted}, len(calls)))
    once = {"alone": count, "checkpoint": 0, "computed": count, "left out": count}
    twice = {"alone": count, "checkpoint": 0, "computed": 2 * count, "left out": 0}
    # forward and backward; with a norm behind it first the recomputed values too
    assert found[0] == ((twice, 3 * count) if name in ("gemma2", "olmo2", "glm4") else (once, 2 * count))
    assert found[1] == (once, 2 * count)
    assert max(calls) > 1


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "phimoe", "gemma2", "gpt2", "bart", "whisper"])
@pytest.mark.parametrize("offload", [False, True])
def test_dropout_and_noise_of_routers_are_replayed(name, offload, counted):
    model, inputs = adapted(name, dropout=0.2, control_dropout=0.3), inputs_of(name)
    for module in model.modules():
        for noise in {"jitter_noise", "router_jitter_noise"} & vars(module).keys():
            setattr(module, noise, 0.2)
    expected, _ = assert_as_plain(model, inputs, "lean", steps=2, offload=offload)
    assert step_on(model, inputs, seed=4)[0] != pytest.approx(expected.item(), rel=1e-6)
    assert counted["alone"] == 3 * len(find_layers(model)) and not counted["checkpoint"]


@pytest.mark.parametrize("name", ["gemma2", "t5", "bart", "starcoder2", "gpt_oss", "clip", "whisper"])
def test_autocast_rounds_as_in_plain(name):
    """Bit for bit, dropout included: the same casts are made, and the backward runs outside of autocast."""
    model = adapted(name, dtype=torch.float32)
    inputs = {**inputs_of(name), **MODELS[name].inputs()}

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model, inputs).float().square().mean()

    _, expected = step_of(model, loss)
    set_memory_mode(model, "lean")
    for _ in range(2):
        assert distance(step_of(model, loss)[1], expected) == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2}),
        ("gpt_oss", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
)
def test_lora_beside_the_control_gets_its_gradients(name, fields, counted):
    """Also on experts: what is trained in an MLP has it run within the layer's graph."""
    model = adapted(name, r=2, **fields)
    assert_as_plain(model, inputs_of(name), "lean", chunk_tokens=5)
    assert counted["alone"] == 2 and (counted["computed"] == 0) == ("target_parameters" in fields)


@pytest.mark.parametrize(("name", "part"), [("gemma2", "post_feedforward_layernorm"), ("beit", "lambda_2")])
def test_what_is_trained_behind_an_mlp_after_some_steps_gets_its_gradient(name, part, counted):
    """Until then the MLP's values were left out, or the norm behind it ran with it."""
    model, inputs = adapted(name, dropout=0.0), MODELS[name].inputs(torch.float64)
    set_memory_mode(model, "lean")
    for _ in range(2):
        step_on(model, inputs)
    for parameter in [p for path, p in model.named_parameters() if part in path]:
        parameter.requires_grad_(True)
    _, found = step_on(model, inputs)
    set_memory_mode(model, "plain")
    assert distance(found, step_on(model, inputs)[1]) <= 1e-9
    assert counted["alone"] == 3 * len(find_layers(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "qwen3_next"])
def test_the_loss_of_the_routers_keeps_its_gradient(name, counted):
    """Routers record their logits, which a layer does not return."""
    if name == "granitemoe":
        skip_before("transformers", "5.23", "cannot add this loss to one of its own")
    model, inputs = adapted(name), labelled(name)
    with_routers = {**inputs, "output_router_logits": True}
    model.base_model.model.router_aux_loss_coef = 3.0
    alone, gradients = step_on(model, inputs)
    loss, found = assert_as_plain(model, with_routers, "lean", tolerance=1e-8, chunk_tokens=4)
    assert loss > alone + 1 and distance(gradients, found) > 1e-3
    assert counted["checkpoint"] and not counted["alone"]
    step_on(model, inputs)
    assert counted["alone"] == len(find_layers(model))


HEADS = [name for name in MODELS if MODELS[name].kind == "decoder"]
OWN_LOSS = {"gpt2", "granite", "granitemoe", "granitemoehybrid", "cohere", "cohere2", "falcon_h1", "opt", "gptj", "gpt_neo"}
OWN_LOSS |= {"gemma3n", "gemma4", "gpt_neox", "gpt_neox-sequential", "mamba", "mamba2"}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_models_own_and_most_decoders_make_no_logits(name):
    model, inputs = adapted(name), labelled(name)
    wide = name in ("llama", "mistral", "qwen2", "qwen3", "glm4_moe", "deepseek_v2", "deepseek_v3")
    assert_as_plain(model, inputs, "lean", tolerance=1e-5 if wide else 1e-6, chunk_tokens=8)  # of losses in float32
    assert (model(**inputs).logits is not None) == (name in OWN_LOSS)


def test_what_somebody_put_into_a_layer_runs_in_checkpointing(counted):
    """A hook may keep what it sees, with gradients; so may a layer of one's own."""
    model, inputs, seen = adapted("qwen3_moe"), inputs_of("qwen3_moe"), []
    set_memory_mode(model, "lean")
    hook = model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    step_on(model, inputs)
    assert seen[0].requires_grad and counted["alone"] == 1 and counted["checkpoint"] == 1
    hook.remove()
    step_on(model, inputs)
    assert counted["alone"] == 3 and counted["checkpoint"] == 1


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "gpt2"])
def test_checkpointing_that_a_trainer_turns_on_changes_nothing(name, counted):
    model, inputs = adapted(name, dropout=0.0), inputs_of(name)
    expected, reference = step_on(model, inputs)
    set_memory_mode(model, "lean", chunk_tokens=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        loss, found = step_on(model, inputs)
        assert loss == pytest.approx(expected.item(), rel=1e-6) and distance(found, reference) <= 1e-9
    assert model.is_gradient_checkpointing and counted["alone"] % len(find_layers(model)) == 0 and not counted["checkpoint"]


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_recorded_states_keep_their_gradients(asked, counted):
    model, inputs = adapted("gemma2"), inputs_of("gemma2", **{asked: True})
    model.config._attn_implementation = "eager"

    def gradients(mode):
        set_memory_mode(model, mode)
        recorded = model(**inputs)[asked.removeprefix("output_")]
        return step_of(model, lambda: sum(x.square().mean() for x in recorded))[1]

    assert distance(gradients("lean"), gradients("plain")) <= 1e-9
    assert not counted["alone"]


def test_keys_that_layers_share_keep_their_gradients():
    """A layer of Gemma 4 leaves its keys and values for later ones in a mapping, which is no return value."""
    fields = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    base = any_decoder("Gemma4", **fields, layer_types=kinds, vocab_size_per_layer_input=61).build().double()
    assert_as_plain(adapted(base, init_weights=False), inputs_of("gemma4"), "lean", steps=2)


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4", "gpt2"])
def test_a_layer_keeps_its_state_alone(name):
    """Between forward and backward; what the embeddings and the last norm keep is there without layers too."""
    model, inputs = adapted(name, dtype=torch.float32), inputs_of(name)
    inner = model.base_model.model.base_model
    stack = inner.h if name == "gpt2" else inner.layers
    layers_of_model = list(stack)

    def kept(mode, count):
        del stack[:]
        stack.extend(layers_of_model[:count])
        set_memory_mode(model, mode)
        inner.config.num_hidden_layers = count
        inner(**inputs)
        with Live() as live:
            output = inner(**inputs)
            gc.collect()
            now = live.bytes() / 4
        del output
        return now

    state = inputs["input_ids"].numel() * 32
    assert kept("lean", 2) - kept("lean", 1) == state
    assert kept("plain", 2) - kept("plain", 1) > 8 * state
