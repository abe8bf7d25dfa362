"""No other formula: where a layer is not exactly what a memory mode knows, it runs the model's own modules or says no.

Everything is compared with the model in mode "plain", in float64.
"""

import functools
import importlib
import pickle
import random

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from peft import get_peft_model
from test_memory import FAMILIES, VOCABULARY, batch, build, distance, exact_norms  # noqa: F401
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_control import ControlConfig, memory
from peft_control.memory import MODES, set_memory_mode

ATTENTION_AND_MLP = {
    "attention": {"read": "input_layernorm", "write": "self_attn"},
    "mlp": {"read": "post_attention_layernorm", "write": "mlp"},
}
pytestmark = [pytest.mark.usefixtures("exact_norms"), pytest.mark.filterwarnings("ignore:memory modes")]


def layers(model):
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def step(model, **more):
    """The gradients of a loss of the logits, so that modes and plain work in the same dtype."""
    inputs, _ = batch(padded="position_ids" not in more)
    if "position_ids" in more:
        del inputs["attention_mask"]
    model.zero_grad()
    model(**inputs, **more).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def as_in_plain(model, mode, **more):
    """Whether a step in ``mode``, as the model stands, has plain's gradients."""
    torch.manual_seed(5)
    found = step(model, **more)
    set_memory_mode(model, "plain")
    torch.manual_seed(5)
    reference = step(model, **more)
    assert found.keys() == reference.keys() and distance(found, reference) <= 1e-10


def set_or_refused(model, mode):
    """Set ``mode``, chunks small; lean is never refused."""
    try:
        return set_memory_mode(model, mode, chunk_tokens=8)
    except ValueError as refusal:
        assert mode != "lean" and "memory mode" in str(refusal)
        return None


class Scaled(LlamaDecoderLayer):
    """A layer with a formula of its own."""

    def forward(self, hidden_states, **named):
        return 0.5 * super().forward(hidden_states, **named)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_subclass_with_a_forward_of_its_own(mode):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    base = transformers.LlamaForCausalLM(config).double()
    for layer in layers(base):
        layer.__class__ = Scaled
    row = {"layer": "Scaled", "norm": "input_layernorm", "blocks": ATTENTION_AND_MLP}
    control = ControlConfig(control_blocks=["attention", "mlp"], init_weights=False, control_architecture=row)
    model = get_peft_model(base, control, autocast_adapter_dtype=False).train()
    if set_or_refused(model, mode):
        as_in_plain(model, mode)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("block", ["mlp", "whole"])
def test_a_control_with_another_row_comes_after_the_mode(mode, block):
    base = set_memory_mode(build().unload(), mode, chunk_tokens=8)
    blocks = {block: {"read": "input_layernorm", "write": "mlp"}}
    row = {"layer": "LlamaDecoderLayer", "norm": "input_layernorm", "blocks": blocks}
    config = ControlConfig(control_blocks=[block], init_weights=False, control_architecture=row)
    as_in_plain(get_peft_model(base, config, autocast_adapter_dtype=False).train(), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_changed_between_a_forward_and_its_backward(mode, family):
    model = set_memory_mode(build(family, lora=True), mode, chunk_tokens=8)
    inputs, labels = batch()
    first, second = (model(**inputs, labels=labels).loss for _ in range(2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("what", ["trained", "all"])
def test_functional_calls(mode, what):
    """Of other weights than the modules hold when the backward runs."""
    model = build(lora=True)
    torch.manual_seed(7)
    given = {
        name: (p.detach() * (1 + 0.1 * torch.randn_like(p))).requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
        if what == "all" or p.requires_grad
    }
    trained = {name: p for name, p in given.items() if p.requires_grad}
    inputs, _ = batch()

    def gradients():
        loss = torch.func.functional_call(model, given, (), inputs).logits.square().mean()
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))

    reference = gradients()
    set_memory_mode(model, mode, chunk_tokens=8)
    assert distance(gradients(), reference) <= 1e-10


def doubled(module, given, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


PLACES = ["mlp", "self_attn", "input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.q_proj", "mlp.act_fn"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", [*PLACES, ""])
@pytest.mark.parametrize("what", ["hook", "forward"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_forwards_and_hooks_of_somebody_else(mode, what, place, when):
    model = build()
    if when == "after":
        set_memory_mode(model, mode, chunk_tokens=8)
        step(model)
    module = layers(model)[1].get_submodule(place)
    if what == "hook":
        module.register_forward_hook(doubled)
    else:
        own = module.forward
        module.forward = lambda *arguments, **named: doubled(None, None, own(*arguments, **named))
    if when == "before" and not set_or_refused(model, mode):
        return
    as_in_plain(model, mode)


class Halving(ModelHook):
    """Stands for accelerate's hooks, which move what a module is given to its device."""

    def pre_forward(self, module, *arguments, **named):
        return tuple(0.5 * x if x.is_floating_point() else x for x in arguments), named


@pytest.mark.parametrize("mode", MODES[1:])
def test_hooks_of_accelerate_come_and_go(mode):
    model = set_memory_mode(build(), mode, chunk_tokens=8)
    modules = [layers(model)[0], layers(model)[1].mlp]
    for module in modules:
        add_hook_to_module(module, Halving())
    as_in_plain(model, mode)
    for module in modules:
        remove_hook_from_module(module)
    as_in_plain(model, mode)  # in mode plain: what the hook had found there is gone
    if set_or_refused(model, mode):
        as_in_plain(model, mode)


@pytest.mark.parametrize("order", ["prepared first", "mode first"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_autocast_of_a_prepared_model(mode, order):
    model = build(dtype=torch.float32).get_base_model()
    AcceleratorState._reset_state(True)  # one precision a process
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    if order == "prepared first":
        model = set_memory_mode(accelerator.prepare(model), mode, chunk_tokens=8)
    else:
        model = accelerator.prepare(set_memory_mode(model, mode, chunk_tokens=8))
    seen, (inputs, labels) = set(), batch()
    model.model.layers[0].register_forward_hook(lambda module, given, output: seen.add(torch.is_autocast_enabled("cpu")))
    model(**inputs, labels=labels).loss.backward()
    set_memory_mode(model, "plain")
    model(**inputs, labels=labels).loss.backward()
    AcceleratorState._reset_state(True)
    assert seen == {True}


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_cache_asked_for_while_training(mode):
    model = set_memory_mode(build(), mode, chunk_tokens=8)
    ids = batch()[0]["input_ids"]

    def continued():
        first = model(input_ids=ids[:, :11], use_cache=True, labels=ids[:, :11])
        return model(input_ids=ids[:, 11:], past_key_values=first.past_key_values).logits

    found = continued()
    set_memory_mode(model, "plain")
    assert torch.allclose(found, continued(), atol=1e-10)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("cache", [None, False, True])
@pytest.mark.parametrize("mode", MODES[1:])
def test_packed_positions_without_a_mask(mode, cache, labels):
    """Documents attend to each other in plain where there is a cache, and only there."""
    model = build()
    model.get_base_model().config.use_cache = cache is not False
    positions = torch.cat([torch.arange(8), torch.arange(11)])[None].expand(2, -1)
    ids = batch()[0]["input_ids"]
    more = {"use_cache": True} if cache else {}

    def loss():
        found = model(input_ids=ids, position_ids=positions, labels=ids if labels else None, **more)
        return found.loss.item() if labels else found.logits.square().mean().item()

    set_memory_mode(model, mode, chunk_tokens=8)
    found = loss()
    set_memory_mode(model, "plain")
    assert found == pytest.approx(loss(), rel=1e-6 if labels else 1e-12)


@pytest.mark.parametrize("name", ["dropout_prob", "attention_dropout"])
def test_lean_replays_attentions_dropout_whatever_its_name(name, monkeypatch):
    """The oldest supported transformers calls DINOv2's by the first name, the newest by the second."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4, attention_probs_dropout_prob=0.3
    )
    base = transformers.Dinov2Model(config).double()
    for module in base.modules():
        for own in [x for x, value in vars(module).items() if "dropout" in x and isinstance(value, float)]:
            vars(module)[name] = vars(module).pop(own)
            kind, forward = type(module), type(module).forward

            @functools.wraps(forward)
            def named_otherwise(self, *given, own=own, forward=forward, **named):
                vars(self)[own] = vars(self).pop(name)
                try:
                    return forward(self, *given, **named)
                finally:
                    vars(self)[name] = vars(self).pop(own)

            if not hasattr(forward, "__wrapped__"):
                monkeypatch.setattr(kind, "forward", named_otherwise)
    model = get_peft_model(base, ControlConfig(init_weights=False), autocast_adapter_dtype=False).train()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(pixel_values=images).last_hidden_state.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    reference = gradients()
    set_memory_mode(model, "lean", chunk_tokens=8)
    assert distance(gradients(), reference) <= 1e-10


def test_dataparallel_is_refused(monkeypatch):
    """``replicate`` copies modules before it copies what they hold, so that one device shows it."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    with pytest.raises(RuntimeError, match="nn.DataParallel.*torchrun"):
        module.replicate(build(), [0, 1])


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_model_saved_whole_trains_in_its_mode_when_it_is_loaded(mode):
    model = set_memory_mode(build(), mode, chunk_tokens=8)
    again = pickle.loads(pickle.dumps(model))  # as torch.save does with a whole model
    assert distance(step(again), step(model)) == 0
    assert layers(again)[0].memory_plan.mode == mode and layers(again)[0].forward.module is layers(again)[0]


@pytest.mark.parametrize("mode", MODES[1:])
def test_labels_are_taken_and_refused_as_in_plain(mode):
    model = build(dtype=torch.float32)
    ids = batch()[0]["input_ids"]
    mask = torch.ones_like(ids)

    def outcome(labels, *positional):
        try:
            if positional:
                return model(*positional).loss.item()
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        except (RuntimeError, IndexError) as error:
            return type(error)

    base = model.get_base_model()
    given = [ids, torch.full_like(ids, -100), ids.masked_fill(ids == ids[0, 3], -1), ids.int(), ids + VOCABULARY]
    expected = [outcome(labels) for labels in given]
    by_position = base(ids, mask, None, None, None, ids).loss.item()
    set_memory_mode(model, mode, chunk_tokens=8)
    assert [outcome(labels) for labels in given] == [
        pytest.approx(x, rel=1e-5, nan_ok=True) if isinstance(x, float) else x for x in expected
    ]
    assert base(ids, mask, None, None, None, ids).loss.item() == pytest.approx(by_position, rel=1e-5)


@pytest.mark.parametrize("chunk", [-1, 0, 2.5, "4", True])
def test_chunks_of_no_size(chunk):
    with pytest.raises(ValueError, match="chunk_tokens must be an integer of at least 1"):
        set_memory_mode(build(), "lean", chunk_tokens=chunk)


def test_columns_that_the_trainer_hands_on_stay_the_same():
    """It asks the signature of forward for them."""
    import inspect

    model = build().get_base_model()
    columns = list(inspect.signature(model.forward).parameters)
    assert list(inspect.signature(set_memory_mode(model, "lean").forward).parameters) == columns


# -- random set-ups -----------------------------------------------------------------------------------------------


def subclass(module):
    """Give ``module`` a class of its own, with a formula of its own."""
    kind = type(module)

    def forward(self, *given, **named):
        return doubled(None, None, kind.forward(self, *given, **named))

    module.__class__ = type(f"Own{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def random_setup(seed):
    """A model with a few oddities, and what a step is called with; ``seed`` decides."""
    draw = random.Random(seed)
    family = draw.choice(list(FAMILIES))
    blocks = draw.choice([["mlp"], ["attention"], ["attention", "mlp"]])
    control = dict(control_blocks=blocks, control_rank=draw.choice([1, 4]), control_bias=draw.random() < 0.3)
    control |= dict(control_alpha=draw.choice([1.0, 0.5]), control_dropout=draw.choice([0.0, 0.0, 0.2]))
    model = build(family, lora=draw.choice([False, False, True, "attention"]), **control)
    base = model.get_base_model()
    for oddity in draw.sample(
        ["adapter", "hook", "forward", "subclass", "dropout", "cut", "norm", "off"], draw.choice([0, 1, 1, 2])
    ):
        layer = draw.choice(base.model.layers)
        if oddity == "adapter":
            model.add_adapter("other", ControlConfig(**{**control, "control_blocks": ["mlp"]}, init_weights=False))
            model.base_model.set_adapter(draw.choice([["other"], ["default", "other"]]))
            model.double()
            for module in model.modules():
                if hasattr(module, "control_A"):  # lean draws the masks of both chunk by chunk, plain one after the other
                    module.dropout = dict.fromkeys(module.dropout, 0.0)
        elif oddity == "hook":
            layer.get_submodule(draw.choice(PLACES)).register_forward_hook(doubled)
        elif oddity == "forward":
            module = layer.get_submodule(draw.choice(PLACES))
            own = module.forward
            module.forward = lambda *given, own=own, **named: doubled(None, None, own(*given, **named))
        elif oddity == "subclass":
            subclass(draw.choice([layer, layer.mlp, layer.self_attn]))
        elif oddity == "dropout":
            layer.self_attn.attention_dropout = 0.2
        elif oddity == "cut":
            layer.mlp.act_fn = nn.GELU()
        elif oddity == "norm":
            layer.post_attention_layernorm.weight.requires_grad_(True)
        elif oddity == "off":
            base.config.use_cache = False
    more = {}
    if draw.random() < 0.2:
        lengths = draw.choice([(8, 11), (19,), (1, 2, 16)])
        more["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    if draw.random() < 0.2:
        more["use_cache"] = draw.choice([True, False])
    options = dict(chunk_tokens=draw.choice([None, 1, 8, 64]), offload=draw.choice([None, True, False]))
    return model, draw.choice(MODES[1:]), options, more, draw.random() < 0.2


def check_setup(seed):
    model, mode, options, more, functional = random_setup(seed)
    given = {}
    if functional:
        given = {n: (1.5 * p.detach()).requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    inputs, _ = batch(padded="position_ids" not in more)
    if "position_ids" in more:
        del inputs["attention_mask"]
    trained = given or {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients():
        torch.manual_seed(seed)
        loss = torch.func.functional_call(model, given, (), {**inputs, **more}).logits.square().mean()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name: g for name, g in zip(trained, found) if g is not None}

    reference = gradients()
    try:
        set_memory_mode(model, mode, **options)
    except ValueError as refusal:
        assert mode != "lean" and "memory mode" in str(refusal), f"seed {seed}"
        return "refused"
    with pytest.MonkeyPatch.context() as patch:
        if seed % 2:
            patch.setattr(memory.long, "FROM_TOKENS", 1)
        found = gradients()
    assert found.keys() == reference.keys(), f"seed {seed}"
    assert distance(found, reference) <= 1e-9, f"seed {seed}"
    return mode


@pytest.mark.parametrize("start", range(0, 48, 12))
def test_random_setups(start):
    assert len({check_setup(seed) for seed in range(start, start + 12)}) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_random_setups():
    outcomes = [check_setup(seed) for seed in range(1000, 2100)]
    assert all(outcomes.count(outcome) > 50 for outcome in ("fast", "balanced", "lean", "refused"))
