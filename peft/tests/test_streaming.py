"""Frozen weights that wait on the host: the same losses and gradients, to the bit, and the weights there at any time."""

import copy
import logging
import math
import pickle
from contextlib import nullcontext
from itertools import product

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from streams import Stream
from tiny_models import assert_equal
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from peft_control import ControlConfig, memory, quantize_fp8
from peft_control.memory import set_memory_mode, streaming

LAYERS = 5


def build(base="dense", lora=True, dtype=torch.float32, **control):
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS)
    model = tiny_models.build("llama", dtype, **shape)
    if base == "fp8":
        quantize_fp8(model)
    elif base == "nf4":
        tiny_models.bits_of_four(model.model.layers)
    per_weight = dict(target_modules=["q_proj", "v_proj"], r=2) if lora else {}
    return tiny_models.adapted(model, ("attention", "mlp"), task_type="CAUSAL_LM", **per_weight, **control)


def ids():
    return torch.randint(3, tiny_models.VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


def step(model):
    """The loss and the gradients of one batch."""
    loss, found = tiny_models.step_of(model.train(), lambda: model(input_ids=ids(), labels=ids()).loss)
    return {"loss": loss, **found}


def answers(model):
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids()).logits
        words = model.generate(input_ids=ids()[:, :4], max_new_tokens=5, do_sample=False)
    return {"logits": logits, "words": words}


def as_resident(model, mode, run=step, **options):
    """Set ``mode`` and stream the weights; assert that ``run`` gives to the bit what it gives without."""
    set_memory_mode(model, mode, **options)
    reference = run(model)
    set_memory_mode(model, mode, stream_weights=True, **options)
    assert_equal(run(model), reference)


class Watch(TorchDispatchMode):
    """Within, nothing is computed with weights on the host; ``copies`` are the layers whose weights are copied from there."""

    def __init__(self, stream):
        super().__init__()
        self.starts, self.copies = [weights.buffer.data_ptr() for weights in stream.layers], []
        self.sizes = [weights.nbytes for weights in stream.layers]

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        given = [x.data_ptr() for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        found = function(*arguments, **(named or {}))
        on_host = [
            index
            for index, (start, size) in enumerate(zip(self.starts, self.sizes))
            if any(start <= address < start + size for address in given)
        ]
        if function is torch.ops.aten.copy_.default:
            self.copies += on_host
        elif on_host:
            assert not torch.is_tensor(found) or found.data_ptr() in given, f"{function} reads weights on the host"
        return found


def streamed(resident=True, **fields):
    return set_memory_mode(build(**fields), "lean", stream_weights=resident)


def stream_of(model):
    (stream,) = streaming.streams(model)
    return stream


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_may_wait_on_the_host_too(offload, dtype):
    as_resident(build(dtype=dtype, control_dropout=0.3), "lean", offload=offload)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_models_without_a_control_are_streamed(adapter):
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_dora=adapter == "dora")
    model = get_peft_model(build().unload(), config)
    as_resident(model, "plain")
    reference = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_equal(step(model), reference)


@pytest.mark.parametrize("family", tiny_models.MODELS)
def test_layers_of_every_architecture_are_streamed(family, monkeypatch):
    """Through a single slot. Those that no memory mode knows run their own forward inside torch's checkpointing."""
    monkeypatch.setattr(memory, "RESIDENT", 1)
    model = tiny_models.adapted(family, dtype=torch.float32, init_weights=False).eval()

    def run(model):
        output, found = tiny_models.step_on(model, tiny_models.MODELS[family].inputs())
        assert found
        return {"output": output, **found}

    for mode in ("plain", "lean"):
        as_resident(model, mode, run)


@pytest.mark.parametrize("resident", [2, 3])
def test_each_layer_is_copied_once_on_each_way_but_at_the_turns(resident):
    model = streamed(resident)
    step(model)
    with Watch(stream_of(model)) as watch:
        step(model)
    assert watch.copies == [*range(resident, LAYERS), *reversed(range(LAYERS - resident))]
    model.eval()
    for _ in range(2):
        with torch.no_grad(), Watch(stream_of(model)) as watch:
            model(input_ids=ids())
    shares = [n for n in range(LAYERS) if any(n != other and (n - other) % resident == 0 for other in range(LAYERS))]
    assert sorted(watch.copies) == shares  # the last ones fetch the first for the next forward


def test_a_state_dict_is_right_at_any_time(tmp_path):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    set_memory_mode(model, "lean", stream_weights=True)
    step(model)
    assert_equal(model.state_dict(), before)
    for tensor in model.state_dict().values():  # a file of weights takes each by itself
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    name = "model.layers.3.self_attn.o_proj.weight"
    assert torch.equal(again.state_dict()[name], before[f"base_model.model.{name}"])

    def look(module, given):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    with torch.no_grad(), model.get_base_model().model.layers[2].mlp.register_forward_pre_hook(look):
        model(input_ids=ids())
    (within,) = seen
    assert_equal(within, before)


def test_weights_that_are_written_to_or_replaced_are_fetched_anew():
    model, twin = streamed(lora=False), set_memory_mode(build(lora=False), "lean")
    reference = step(twin)
    assert_equal(step(model), reference)
    for changed in (model, twin):
        with torch.no_grad():
            layers = changed.get_base_model().model.layers
            layers[1].mlp.up_proj.weight.mul_(2)
            layers[0].mlp.load_state_dict({name: -x for name, x in layers[0].mlp.state_dict().items()})
            layers[3].self_attn.v_proj.weight.data = layers[3].self_attn.v_proj.weight + 1
    changed = step(twin)
    assert not torch.equal(changed["loss"], reference["loss"])
    assert_equal(step(model), changed)


def test_adapters_are_left_where_they_are_and_may_be_switched():
    model = build()
    config = ControlConfig(control_rank=3, target_modules=["k_proj"], r=2, init_weights=False, init_lora_weights=False)
    model.add_adapter("other", config)
    set_memory_mode(model, "lean", stream_weights=True)
    assert not {id(p) for name, p in model.named_parameters() if tiny_models.is_adapter(name)} & stream_of(model).holders
    first = step(model)
    model.set_adapter("other")
    other = step(model)
    set_memory_mode(model, "lean")
    assert_equal(step(model), other)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_equal(step(model), first)


def test_a_lora_is_merged_on_the_host_and_taken_out_again():
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(build().unload(), config)
    twin = copy.deepcopy(model)
    set_memory_mode(model, "plain", stream_weights=True)
    assert_equal(answers(model), answers(twin))
    for change in ("merge_adapter", "unmerge_adapter"):
        for changed in (model, twin):
            getattr(changed, change)()
        assert_equal(answers(model), answers(twin))


def test_a_step_that_broke_off_leaves_the_next_one_right():
    model = streamed()
    reference = step(model)
    layers = model.get_base_model().model.layers

    def fail(*_):
        raise KeyboardInterrupt

    for register in (
        layers[3].self_attn.q_proj.base_layer.register_forward_hook,
        layers[0].mlp_control.control_A["default"].weight.register_hook,  # in the backward
    ):
        hook = register(fail)
        with pytest.raises(KeyboardInterrupt):
            step(model)
        hook.remove()
        assert_equal(step(model), reference)


def test_moves_and_casts():
    model = streamed()
    reference = step(model)
    stream = stream_of(model)
    model.to("cpu", torch.float32)
    assert_equal(step(model), reference)
    with pytest.raises(RuntimeError, match="keep their type"):
        model.to(torch.bfloat16)
    model.to("meta")  # adapters and the rest do move
    assert {p.device.type for p in model.parameters() if id(p) not in stream.holders} == {"meta"}
    assert {place.get().device.type for weights in stream.layers for place in weights.places} == {"cpu"}


def test_the_plan_is_said_in_one_line(caplog):
    model = build(lora=False)
    assert streaming.describe(model) is None
    with caplog.at_level(logging.INFO, logger=streaming.__name__):
        set_memory_mode(model, "lean", stream_weights=3)
    (line,) = caplog.messages
    assert line.startswith(streaming.describe(model)) and "\n" not in line
    assert "5 layers wait on the host" in line and "holds 3 of them" in line
    layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)
    assert [weights.nbytes for weights in stream_of(model).layers] == [layer] * LAYERS
    assert stream_of(model).slot_bytes() == [layer] * 3


def test_a_streamed_model_is_not_copied():
    model = streamed()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="set_memory_mode"):
            copied(model)
    set_memory_mode(model, "plain")
    assert_equal(copy.deepcopy(model).state_dict(), model.state_dict())
    assert not any("forward" in vars(m) or "_apply" in vars(m) for m in model.modules())


def test_what_cannot_be_streamed_is_refused_and_leaves_the_model_as_it_is(monkeypatch):
    model = build()
    reference = step(model)
    for options, said in (
        ({"mode": "lean", "cuda_graphs": True}, "CUDA graphs"),
        ({"mode": "fast"}, "mode fast"),
        ({"mode": "lean", "stream_weights": 1}, "from 2 on"),
        ({"mode": "lean", "stream_weights": "yes"}, "from 2 on"),
    ):
        with pytest.raises(ValueError, match=said):
            set_memory_mode(model, **{"stream_weights": True, **options})
    with pytest.raises(ValueError, match="no layer"):
        set_memory_mode(torch.nn.Linear(3, 3), "plain", stream_weights=True)
    monkeypatch.setattr(streaming, "_free_memory", lambda: 40_000)
    with pytest.raises(ValueError, match=r"takes .* of the host's memory .* are free"):
        set_memory_mode(model, "lean", stream_weights=True)
    monkeypatch.undo()
    assert not streaming.streams(model)
    assert_equal(step(model), reference)
    set_memory_mode(model, "lean", stream_weights=True)
    model.get_base_model().model.layers[2].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="trained since"):
        step(model)


def test_ddp_leaves_streamed_weights_out():
    model = streamed()
    by_name = dict(model.named_parameters())
    ignored = {id(by_name[name]) for name in model._ddp_params_and_buffers_to_ignore}
    assert ignored and ignored == stream_of(model).holders & {id(p) for p in by_name.values()}
    set_memory_mode(model, "plain")
    assert model._ddp_params_and_buffers_to_ignore == []


class Computing(Stream):
    """The stream of the computation, which runs at once, but for copies that it waits for."""

    def wait_event(self, event):
        copies, position = event
        while copies.done < position:
            copies.queue[copies.done]()
            copies.done += 1


class Copies:
    """A stream that copies as late as it may."""

    def __init__(self, *_):
        self.queue, self.done, self.waited = [], 0, False

    def wait_stream(self, other):
        assert isinstance(other, Computing)
        self.waited = True

    def record_event(self):
        return self, len(self.queue)

    def synchronize(self):
        Computing().wait_event(self.record_event())


class Deferred(TorchFunctionMode):
    def __init__(self, copies):
        self.copies = copies

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.Tensor.copy_:
            assert self.copies.waited, "the slot may still be read"
            self.copies.queue.append(lambda: function(*arguments))
            return arguments[0]
        return function(*arguments, **(named or {}))

    def __exit__(self, *error):
        self.copies.waited = False
        return super().__exit__(*error)


@pytest.fixture
def late_copies(monkeypatch):
    """Copies of weights, which come as late as the computation's stream lets them."""
    computing = Computing()
    monkeypatch.setattr(streaming, "_COPIED_TO", "cpu")
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    monkeypatch.setattr(streaming, "_page_lock", lambda buffers, owner: lambda: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", Copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", Deferred)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return True


@pytest.mark.parametrize("mode", ["plain", "balanced", "lean"])
@pytest.mark.parametrize("base, lora", product(["dense", "fp8", "nf4", "late copies"], [False, True]))
def test_losses_gradients_and_answers_are_those_of_resident_weights(base, lora, mode, request):
    """The computation waits for what it needs, and copies for what is read."""
    late = base == "late copies" and request.getfixturevalue("late_copies")
    model = build(base, lora)
    set_memory_mode(model, mode, chunk_tokens=8)
    reference, answered = step(model), answers(model)
    for resident in (True, 3, LAYERS + 4) if base in ("dense", "late copies") else (True,):  # bytes are bytes
        set_memory_mode(model, mode, chunk_tokens=8, stream_weights=resident)
        for _ in range(2):  # training and evaluation in turns
            assert_equal(step(model), reference)
            with Watch(stream_of(model)) if not late else nullcontext():
                assert_equal(step(model), reference)
                assert_equal(answers(model), answered)
        assert streaming.describe(model)
    set_memory_mode(model, mode, chunk_tokens=8)
    assert_equal(step(model), reference)
    assert_equal(answers(model), answered)


@pytest.mark.parametrize("streams, offload", [(True, None), (False, None), (True, True)])
def test_states_leave_the_way_to_weights_where_tokens_are_few(monkeypatch, caplog, streams, offload):
    """From so many tokens on that a backward, three forwards, takes as long as weights and tokens travel."""
    rate = 10  # parameters that a forward multiplies a token by while a byte travels
    monkeypatch.setattr(memory, "_PARAMETERS_PER_BYTE", rate)
    model = set_memory_mode(build(lora=False), "lean", stream_weights=streams, offload=offload)
    layer = model.get_base_model().model.layers[0]
    linears = [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    parameters, weights = sum(x.numel() for x in linears), sum(p.nbytes for p in layer.parameters() if not p.requires_grad)
    queries, keys = layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features
    a_token = 4 * (2 * 64 + queries + 2 * keys)  # bytes: both states, and queries, keys and values
    enough = math.ceil(rate * weights / (3 * parameters - rate * a_token))
    host, leaves = layer.memory_plan.host, streams and offload is None
    with caplog.at_level(logging.INFO, "peft_control"):
        assert host.room_for(torch.zeros(enough - 1, 64)) == (0 if leaves else 2)
    assert ("stay on the GPU, for streamed weights" in caplog.text) == leaves
    assert host.room_for(torch.zeros(enough + 1, 64)) == 2
