"""No other formula: where a layer is not exactly what a memory mode knows, it runs the model's own modules or says no.

Everything is compared with the model in mode "plain", in float64.
"""

import copy
import importlib
import inspect
import pickle
import random

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from test_memory import FAMILIES, batch, build
from tiny_models import VOCAB, distance, step_of, step_on
from torch import nn

from peft_control import ControlConfig, memory
from peft_control.memory import MODES, set_memory_mode

pytestmark = [pytest.mark.usefixtures("exact_norms"), pytest.mark.filterwarnings("ignore:memory modes")]


def layers(model):
    return model.get_base_model().model.layers


def step(model, **inputs):
    """The gradients of a loss of the logits, so that modes and plain work in the same dtype."""
    return step_on(model, inputs or batch(padded=True)[0])[1]


def as_in_plain(model):
    """Whether a step, as the model stands, has plain's gradients."""
    found = step(model)
    set_memory_mode(model, "plain")
    assert distance(found, step(model)) <= 1e-10


def set_or_refused(model, mode, **options):
    """Set ``mode``, chunks small; lean is never refused."""
    try:
        return set_memory_mode(model, mode, **{"chunk_tokens": 8, **options})
    except ValueError as refusal:
        assert mode != "lean" and "memory mode" in str(refusal)
        return None


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
    as_in_plain(model)
    for module in modules:
        remove_hook_from_module(module)
    as_in_plain(model)  # in mode plain: what the hook had found there is gone
    if set_or_refused(model, mode):
        as_in_plain(model)


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


def test_dataparallel_is_refused(monkeypatch):
    """``replicate`` copies modules before it copies what they hold, so that one device shows it."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    with pytest.raises(RuntimeError, match="nn.DataParallel.*torchrun"):
        module.replicate(build(), [0, 1])


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_in_their_originals_mode(duplicate, mode):
    """Pickled as torch.save does with a whole model."""
    model = set_memory_mode(build(), mode, chunk_tokens=8)
    twin = duplicate(model)
    found = step(twin)
    assert all(p.grad is None for p in model.parameters()) and distance(found, step(model)) == 0
    assert layers(twin)[0].memory_plan.mode == mode and layers(twin)[0].forward.module is layers(twin)[0]


@pytest.mark.parametrize("mode", MODES[1:])
def test_labels_are_taken_and_refused_as_in_plain(mode):
    model = build(dtype=torch.float32)
    ids = batch()[0]["input_ids"]
    mask = torch.ones_like(ids)

    def outcome(labels):
        try:
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        except (RuntimeError, IndexError) as error:
            return type(error)

    given = [ids, torch.full_like(ids, -100), ids.masked_fill(ids == ids[0, 3], -1), ids.int(), ids + VOCAB]
    expected = [pytest.approx(x, rel=1e-5, nan_ok=True) if isinstance(x, float) else x for x in map(outcome, given)]
    set_memory_mode(model, mode, chunk_tokens=8)
    assert [*map(outcome, given)] == expected


def test_columns_that_the_trainer_hands_on_stay_the_same():
    """It asks the signature of forward for them."""
    model = build().get_base_model()
    columns = list(inspect.signature(model.forward).parameters)
    assert list(inspect.signature(set_memory_mode(model, "lean").forward).parameters) == columns


# -- random set-ups -----------------------------------------------------------------------------------------------

PLACES = ["mlp", "self_attn", "input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.q_proj", "mlp.act_fn"]
PLACES += ["", "", ""]  # the layer


def doubled(module, given, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def hook(draw, model, layer):
    layer.get_submodule(draw.choice(PLACES)).register_forward_hook(doubled)


def forward(draw, model, layer):
    module = layer.get_submodule(draw.choice(PLACES))
    own = module.forward
    module.forward = lambda *given, **named: doubled(None, None, own(*given, **named))


def subclass(draw, model, layer):
    """A class of somebody's own, with a formula of its own."""
    module = draw.choice([layer, layer.mlp, layer.self_attn])
    kind = type(module)

    def forward(self, *given, **named):
        return doubled(None, None, kind.forward(self, *given, **named))

    module.__class__ = type(f"Own{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def adapter(draw, model, layer):
    lora = dict(target_modules=[draw.choice(["q_proj", "o_proj", "up_proj"])], r=2, init_lora_weights=False)
    config = ControlConfig(control_blocks=["mlp"], control_rank=3, init_weights=False, **draw.choice([{}, {}, lora]))
    model.add_adapter("other", config)
    model.base_model.set_adapter(draw.choice([["other"], ["default", "other"], ["default"]]))
    for name, parameter in model.named_parameters():  # of one that is off it takes no part
        parameter.requires_grad_("control_" in name or parameter.requires_grad)
    model.double()
    for module in model.modules():
        if hasattr(module, "control_A"):  # lean draws the masks of both chunk by chunk, plain one after the other
            module.dropout = dict.fromkeys(module.dropout, 0.0)


def dropout(draw, model, layer):
    layer.self_attn.attention_dropout = 0.2


def activation(draw, model, layer):
    layer.mlp.act_fn = nn.GELU()


def trained(draw, model, layer):
    place, path = draw.choice(
        [*((layer, path) for path in ("post_attention_layernorm", "input_layernorm", "mlp.down_proj", "self_attn.o_proj")),
         (model.get_base_model(), "model.norm"), (model.get_base_model(), "lm_head")]
    )  # fmt: skip
    module = getattr(place.get_submodule(path), "base_layer", place.get_submodule(path))
    if draw.random() < 0.5:
        module.weight = nn.Parameter(module.weight.detach().clone())
    module.weight.requires_grad_(True)


def off(draw, model, layer):
    model.base_model.disable_adapter_layers()
    model.get_base_model().lm_head.weight.requires_grad_(True)


def own_loss(draw, model, layer):
    model.get_base_model().loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()


def no_cache(draw, model, layer):
    model.get_base_model().config.use_cache = False


ODDITIES = [hook, forward, subclass, adapter, dropout, activation, trained, off, own_loss, no_cache]


def random_setup(draw):
    """A model and its mode with a few oddities, which come before or after the mode, and what a step is called with."""
    family = draw.choice(FAMILIES)
    blocks = draw.choice([["mlp"], ["attention"], ["attention", "mlp"]])
    control = dict(control_blocks=blocks, control_rank=draw.choice([1, 4]), control_bias=draw.random() < 0.3)
    control |= dict(control_alpha=draw.choice([1.0, 0.5]), control_dropout=draw.choice([0.0, 0.2]))
    padded = draw.random() < 0.5  # of a row without any key eager attention makes no numbers
    attention = "sdpa" if padded else draw.choice(["sdpa", "eager"])
    config = dict(num_key_value_heads=draw.choice([1, 2, 4]), attn_implementation=attention)
    model = build(family, lora=draw.choice([False, False, True, "attention"]), config=config, **control)
    inputs, labels = batch(padded)
    inputs = dict(inputs)
    if draw.random() < 0.2:
        lengths = draw.choice([(8, 11), (19,), (1, 2, 16)])
        inputs = {**inputs, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)}
        del inputs["attention_mask"]
    if draw.random() < 0.2:  # of any strides
        wide = torch.randn(19, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        inputs["inputs_embeds"] = draw.choice([wide.transpose(0, 1)[1:], wide[:, :1].transpose(0, 1).expand(2, 19, 32)])
        del inputs["input_ids"]
    if draw.random() < 0.2:
        inputs["use_cache"] = draw.choice([True, False])
    if draw.random() < 0.3:
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        renamed = dict(ignore_index=7, labels=labels.masked_fill(labels == -100, 7))
        inputs |= draw.choice([dict(labels=labels), dict(labels=labels), dict(labels=labels, shift_labels=shifted), renamed])
    options = dict(chunk_tokens=draw.choice([None, 1, 8, 8]), offload=draw.choice([None, True, False]))
    oddities = draw.sample(ODDITIES, draw.choice([0, 1, 1, 2, 2]))
    return model, draw.choice([*MODES[1:], "lean"]), options, inputs, oddities


def host_of(draw, patch):
    """A host, and rows, of random sizes against what a mode knows."""
    patch.setattr(memory.long, "FROM_TOKENS", draw.choice([1, 39]))
    if draw.random() < 0.5:
        patch.setattr(memory, "_PARAMETERS_PER_BYTE", 0)  # layers are large enough to hide all copies
    if draw.random() < 0.3:
        patch.setattr(memory, "_JOINED_ON", "cpu")
    if draw.random() < 0.3:  # states of 16 KiB
        free = (draw.randrange(8) * 16 << 10) / 0.75
        patch.setattr(memory.offload, "_free_memory", lambda: free)
    if draw.random() < 0.3:
        patch.setattr(memory.offload, "_SPARE_BYTES", draw.choice([0, 48, 100, 200]) << 10)


def check_setup(seed):
    """That a random set-up is refused or trains as in plain; return its mode, or "refused"."""
    draw = random.Random(seed)
    model, mode, options, inputs, oddities = random_setup(draw)
    late = draw.random() < 0.5 and subclass not in oddities

    def loss():
        output = model(**inputs)
        return output.loss if "labels" in inputs else output.logits.square().mean()

    with pytest.MonkeyPatch.context() as patch:
        host_of(draw, patch)
        for oddity in () if late else oddities:
            oddity(draw, model, draw.choice(layers(model)))
        if not set_or_refused(model, mode, **options):
            return "refused"
        if late:
            step(model, **inputs)
        for oddity in oddities if late else ():
            oddity(draw, model, draw.choice(layers(model)))
        found = step_of(model, loss, seed)[1]
        set_memory_mode(model, "plain")
        # transformers' own loss is float32 whatever the model's dtype
        tolerance = 1e-6 if "labels" in inputs else 1e-9
        assert distance(found, step_of(model, loss, seed)[1]) <= tolerance, f"seed {seed}"
    return mode


@pytest.mark.parametrize("start", range(0, 160, 32))
def test_random_setups(start):
    outcomes = [check_setup(seed) for seed in range(start, start + 32)]
    assert set(outcomes) == {"fast", "balanced", "lean", "refused"}
