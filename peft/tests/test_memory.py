"""Memory modes: exact gradients in every mode, reversible, and clear about what they cannot do."""

import copy
import functools
import warnings
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, load_model, save_model
from streams import Event, Stream
from tiny_models import VOCAB, TimmImages, adapted, distance, step_of
from tiny_models import build as tiny_build
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from peft_control import ControlConfig, memory
from peft_control.memory import MODES, set_memory_mode
from peft_control.memory.loss import causal_lm_loss

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
pytestmark = pytest.mark.usefixtures("exact_norms")


def build(family="llama", dtype=torch.float64, lora=False, config=None, **control):
    base = tiny_build(family, dtype, **{"num_hidden_layers": 3, **(config or {})})
    targets = ["q_proj", "k_proj", "v_proj", *(["o_proj"] if lora == "attention" else [])]
    per_weight = dict(target_modules=targets, r=2) if lora else {}
    return adapted(base, ("attention", "mlp"), **{"task_type": "CAUSAL_LM", "control_rank": 4, **per_weight, **control})


def batch(padded=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, 19), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :3] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def loss_and_gradients(model, mode, padded=False, **options):
    options["offload"] = WAITS.get(options.get("offload"), options.get("offload"))
    set_memory_mode(model, mode, chunk_tokens=8, **options)
    inputs, labels = batch(padded)

    def loss():
        if mode != "plain":
            return model(**inputs, labels=labels).loss
        logits = model(**inputs).logits[:, :-1]  # transformers' own loss is float32 whatever the model's dtype
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    loss, gradients = step_of(model, loss)
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    return loss, gradients


def as_plain(model, mode, padded=False, **options):
    """Assert that loss and gradients are those of plain autograd."""
    loss, reference = loss_and_gradients(model, "plain", padded)
    found_loss, found = loss_and_gradients(model, mode, padded, **options)
    assert abs(found_loss - loss) <= 1e-10 and distance(found, reference) <= 1e-10


def step(model, **inputs):
    """The gradients of a training step, as the model stands."""
    given = {**batch()[0], "labels": batch()[1], **inputs}
    return step_of(model, lambda: model(**{name: value for name, value in given.items() if value is not None}).loss)[1]


def count_calls(names, patch):
    """A counter of the calls of some linear layers, by what ``names`` calls them.

    With a hook on them the memory modes would have the model's own modules run.
    """
    calls, forward = Counter(), torch.nn.Linear.forward

    @functools.wraps(forward)
    def counted(self, x):
        calls.update([names[self]] if self in names else [])
        return forward(self, x)

    patch.setattr(torch.nn.Linear, "forward", counted)
    return calls


@pytest.fixture
def large_layers(monkeypatch, request):
    """With the parameter "all" of `offload`, layers count as large enough to hide all copies; with it or True attention's
    backward takes one sequence at a time; with "long", rows count as long enough to be worked by groups of heads."""
    offload = request.node.callspec.params.get("offload")
    if offload == "all":
        monkeypatch.setattr(memory, "_PARAMETERS_PER_BYTE", 0)
    if offload in (True, "all"):
        monkeypatch.setattr(memory.attention, "_TOGETHER", 1)
    if str(offload).startswith("long"):
        monkeypatch.setattr(memory.long, "FROM_TOKENS", 1)


#: A mode and whether the states wait on the host, "all" with queries, keys and values.
WAITS = {"all": True, "too much": True, "long": False, "long, waiting": True}
WAYS = [
    *((mode, None) for mode in MODES[1:]),
    *(("lean", offload) for offload in (True, "all", "long", "long, waiting")),
    ("balanced", "all"),
]


#: Windows, biases, norms of queries and keys; LoRA before attention, whose projections are then the model's own, and behind.
ATTENTIONS = [("llama", False), ("llama", True), ("llama", "attention"), ("mistral", False), ("qwen2", False)]
ATTENTIONS += [("qwen3", False), ("qwen3", "attention")]


@pytest.mark.parametrize(("mode", "offload"), WAYS)
@pytest.mark.parametrize(("family", "lora"), ATTENTIONS)
def test_gradients_are_exact(family, lora, mode, offload, large_layers):
    model = build(family, lora=lora, control_bias=True, control_alpha=0.7)
    as_plain(model, mode, padded=True, offload=offload)


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_output_layer_of_whatever_kind_trains(mode):
    """peft wraps one that shares its weight with trained tokens."""
    model = build(config={"tie_word_embeddings": True}, trainable_token_indices=[3, 4, 5])
    _, reference = loss_and_gradients(model, "plain")
    set_memory_mode(model, mode)
    assert distance(step(model), reference) <= 1e-6


class Doubled(Qwen3RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("mode", "offload"), WAYS)
def test_norms_of_heads_of_another_class_are_called(mode, offload, large_layers):
    model = build("qwen3")
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_norm.__class__ = Doubled
    as_plain(model, mode, offload=offload)


@pytest.mark.parametrize("mode", MODES[1:])
def test_norms_of_heads_that_an_adapter_trains_can_be_switched_off(mode):
    model = build("qwen3", modules_to_save=["q_norm"])
    with model.disable_adapter():  # the norms that run are then frozen
        set_memory_mode(model, mode)
    as_plain(model, mode)


@pytest.fixture
def stacked(monkeypatch):
    """Mode fast has gate and up as one matmul, and queries, keys and values, as on a GPU."""
    monkeypatch.setattr(memory, "_JOINED_ON", "cpu")


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_weights_are_one_matmul_and_the_same_model(family, mode, stacked, monkeypatch):
    """Gate's and up's weights are of shape (48, 32), both together (96, 32); those of keys and values (16, 32), all three (64, 32)."""
    multiplied, linear = Counter(), F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: multiplied.update([tuple(w.shape)]) or linear(x, w, *b))
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    _, reference = loss_and_gradients(model, "plain")
    for one in (model, copy.deepcopy(model), copy.deepcopy(set_memory_mode(model, mode))):
        multiplied.clear()
        _, gradients = loss_and_gradients(one, mode)
        assert (multiplied[48, 32] == 0) == (multiplied[96, 32] > 0) == (mode == "fast")
        assert (multiplied[16, 32] == 0) == (multiplied[64, 32] > 0) == (mode == "fast")
        assert distance(gradients, reference) <= 1e-10
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("change", ["moved", "loaded"])
def test_stacked_weights_part_where_they_must(change, stacked):
    """After the mode was set: what runs is what the layers say."""
    model = set_memory_mode(build(), "fast", chunk_tokens=8)
    if change == "moved":
        linear = next(m for name, m in model.named_modules() if name.endswith("gate_proj"))
        linear.weight.data = 1.5 * linear.weight.data
    else:
        model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()}, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("control_" in name)
    found = step(model)
    set_memory_mode(model, "plain")
    assert distance(found, step(model)) <= 1e-6


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize(
    "path", ["input_layernorm", "self_attn.k_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"]
)
def test_a_trained_parameter_in_the_place_of_a_frozen_one_gets_its_gradient(path, mode):
    model = set_memory_mode(build(), mode, chunk_tokens=8)
    part = model.get_base_model().model.layers[1].get_submodule(path)
    part.weight = torch.nn.Parameter(part.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layer runs its own forward from here on
        found = step(model)
    set_memory_mode(model, "plain")
    assert distance(found, step(model)) <= 1e-6


def test_stacked_weights_are_saved_and_loaded_as_any(tmp_path, stacked):
    """Libraries look at storages to find weights that are tied."""
    model = build(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    set_memory_mode(model, "fast")
    ups = {name for name in before if "up_proj" in name}
    Accelerator().save_model(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() >= ups
    save_model(model, tmp_path / "whole.safetensors")
    for parameter in model.parameters():
        parameter.data.zero_()
    load_model(model, tmp_path / "whole.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    up = next(p for name, p in model.named_parameters() if "up_proj" in name)
    assert up.untyped_storage().nbytes() == up.nbytes


@pytest.mark.parametrize(
    ("mode", "offload", "twice"),
    [
        ("fast", None, ()),
        ("balanced", None, ("q_proj", "k_proj", "v_proj", "up_proj")),
        ("balanced", "all", ("up_proj",)),
        ("balanced", "too much", ("q_proj", "k_proj", "v_proj", "up_proj")),
        ("lean", None, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")),
        ("lean", True, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
        ("lean", "all", ("gate_proj", "up_proj")),
        ("lean", "too much", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    ],
)
def test_what_is_computed_twice(mode, offload, twice, large_layers, monkeypatch):
    if offload == "too much":
        monkeypatch.setattr(memory, "_PARAMETERS_PER_BYTE", 0)
        monkeypatch.setattr(memory.offload, "_SPARE_BYTES", 1000)
    model = build()
    set_memory_mode(model, mode, offload=WAITS.get(offload, offload))
    modules = model.get_base_model().model.layers[1].named_modules()
    calls = count_calls({module: name.partition(".")[2] for name, module in modules if name.endswith("_proj")}, monkeypatch)
    step(model)
    assert len(calls) == 7 and max(calls.values()) <= 2
    assert not any(layer.memory_plan.host and layer.memory_plan.host._held for layer in model.get_base_model().model.layers)
    assert {name for name, count in calls.items() if count == 2} == set(twice)


@pytest.fixture
def held(monkeypatch):
    """The bytes on the host after each push."""
    found, push = [], memory.offload.HostStates.push

    def measured(self, *tensors, **own):
        ticket = push(self, *tensors, **own)
        found.append(self._held)
        return ticket

    monkeypatch.setattr(memory.offload.HostStates, "push", measured)
    return found


@pytest.mark.parametrize(
    ("states", "launcher", "once"),
    [
        (6, None, {0, 1, 2}),
        (5, "LOCAL_WORLD_SIZE", {0, 1}),
        (4, "OMPI_COMM_WORLD_LOCAL_SIZE", {0}),
        (3, "SLURM_NTASKS_PER_NODE", set()),
        (2, None, set()),
        (0, None, set()),
    ],
)
@pytest.mark.parametrize("offload", [True, "all"])
def test_lean_takes_no_more_of_the_host_than_it_can_spare(
    states, launcher, once, offload, large_layers, held, monkeypatch, caplog
):
    """First each layer's own state, then those between the halves, whose layers need no output projection again."""
    model = build()
    free = (states * 16 << 10) / 0.75
    monkeypatch.setattr(memory.offload, "_free_memory", lambda: 2 * free if launcher else free)
    if launcher:
        monkeypatch.setenv(launcher, "2")
    layers = enumerate(model.get_base_model().model.layers)
    calls = count_calls({layer.self_attn.o_proj: number for number, layer in layers}, monkeypatch)
    with caplog.at_level("INFO", "peft_control.memory.offload"):
        as_plain(model, "lean", offload=offload)
    assert max(held, default=0) == states * 16 << 10  # a state of 38 tokens of 32 numbers in float64 takes 16 KiB
    assert {number: 3 - (number in once) for number in range(3)} == calls  # plain's are one of them
    waiting = min(states, 3)
    assert caplog.messages[-1].startswith(f"38 tokens: {waiting} of 3 layers' states")
    assert f"for up to {states - waiting} of them" in caplog.text


@pytest.mark.parametrize("rows", ["short", "long"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_in_fp8_change_gradients_little_and_losses_not_at_all(family, rows, held, monkeypatch):
    """They take a byte a number and four a token; rounding them to 3 bits of fraction, up to 2^-4 off, is not biased."""
    monkeypatch.setattr(memory.long, "FROM_TOKENS", 1 if rows == "long" else 39)
    model = build(family)
    loss, reference = loss_and_gradients(model, "plain")
    found_loss, found = loss_and_gradients(model, "lean", offload="fp8")
    assert abs(found_loss - loss) <= 1e-10 and 0.005 < distance(found, reference) < 0.05
    assert held == [2048, 4096, 6144]  # 38 tokens of 32 numbers


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("own", ["/", "/slurm/job7/step_0"])
def test_memory_that_a_container_or_job_has_to_spare(version, own, tmp_path, monkeypatch):
    """The tightest limit counts, of the process's own control group or of one around it."""
    top, most, used = tmp_path / "cgroup", "memory.max", "memory.current"
    if version == 1:
        top, most, used = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
    (tmp_path / "own").write_text(f"5:cpu,memory:{own}\n" if version == 1 else f"0::{own}\n")
    monkeypatch.setattr(memory.offload, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory.offload, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory.offload.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert memory.offload._free_memory() == 5000
    cached = "total_" if version == 1 else ""
    for folder in {top, top / own.strip("/"), top / own.strip("/").partition("/")[0]}:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / used).write_text("900")
        (folder / "memory.stat").write_text(f"{cached}inactive_file 50\n{cached}active_file 30\n")
        for size, expected in ((9000, 5000), (1000, 180), (500, 0), ("max", 5000)):
            (folder / most).write_text(str(size))
            assert memory.offload._free_memory() == expected


@pytest.fixture
def copied_in_pieces(monkeypatch):
    """Tensors are copied as from a GPU, in pieces of 4 KiB; returns the buffers that were made.

    A layer's forward takes ``computing.step`` milliseconds and the copy of a state one.
    """
    made, computing, copying = [], Stream(), Stream()
    settle = memory.offload.HostStates.settle

    def compute_and_settle(self):
        computing.time += computing.step
        settle(self)

    def buffer(size):
        made.append(torch.full((size,), 77, dtype=torch.uint8))
        return made[-1]

    def pieces(tensors, buffers, pieces=memory.offload._pieces):
        copying.time += sum(tensor.nbytes for tensor in tensors) / (38 * 32 * 8)
        return pieces(tensors, buffers)

    monkeypatch.setattr(memory.offload, "_COPIED_FROM", "cpu")
    monkeypatch.setattr(memory.offload, "_pieces", pieces)
    monkeypatch.setattr(memory.offload.HostStates, "settle", compute_and_settle)
    monkeypatch.setattr(memory.offload, "_PIECE", 4 << 10)
    monkeypatch.setattr(memory.offload, "_pinned", buffer)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return SimpleNamespace(buffers=made, computing=computing)


@pytest.mark.parametrize(
    ("mode", "offload", "most"),
    [
        *(("lean", offload, None) for offload in (True, "all", "long, waiting")),
        ("balanced", "all", None),
        *(("lean", offload, most) for offload in (True, "long, waiting") for most in (0, 4, 7)),
    ],
)
def test_states_come_back_from_the_pieces_that_they_wait_in(
    mode, offload, most, copied_in_pieces, large_layers, monkeypatch, caplog
):
    """What is beyond the ``most`` buffers that the system pins stays where it is."""

    def refusing(size, own=memory.offload._pinned):
        if len(copied_in_pieces.buffers) == most:
            raise RuntimeError("CUDA error: out of memory\nlong story")
        return own(size)

    monkeypatch.setattr(memory.offload, "_pinned", refusing)
    model = build()
    for _ in range(2):  # a state is 9,728 bytes: two pieces and a part of one
        as_plain(model, mode, offload=offload)
    if most is None:
        sizes = {len(buffer) for buffer in copied_in_pieces.buffers}
        assert max(sizes) == 4096 > min(sizes)
    else:
        assert len(copied_in_pieces.buffers) == most
        assert "(CUDA error: out of memory): what would wait there stays on the GPU" in caplog.text


@pytest.mark.parametrize(
    ("mode", "computing", "again"),
    [
        # with queries, keys and values four states a layer; a quarter of it may be waited for
        ("lean", 3.3, ()),
        ("lean", 3.1, ("q_proj", "o_proj")),
        # three
        ("balanced", 2.5, ()),
        ("balanced", 2.3, ("q_proj",)),
    ],
)
def test_what_waits_on_the_host_depends_on_how_fast_copies_are(mode, computing, again, copied_in_pieces, monkeypatch):
    monkeypatch.setattr(memory, "_PARAMETERS_PER_BYTE", 0)
    model = build()
    _, reference = loss_and_gradients(model, "plain")
    layers, names = model.get_base_model().model.layers[1:], ("q_proj", "o_proj")
    calls = count_calls({getattr(layer.self_attn, name): name for layer in layers for name in names}, monkeypatch)

    def computed_twice(steps):
        for _ in range(steps):
            calls.clear()
            assert distance(step(model), reference) <= 1e-10
        return {name for name, count in calls.items() if count == 4}

    copied_in_pieces.computing.step = computing
    set_memory_mode(model, mode)
    assert computed_twice(1) == set()  # nothing is known yet
    assert computed_twice(17) == set(again)
    copied_in_pieces.computing.step = 100
    assert computed_twice(9) == set(again)  # that is decided
    copied_in_pieces.computing.step = 0.1
    for options in (dict(offload=True), dict(cuda_graphs=True)):  # which measure nothing
        set_memory_mode(model, mode, **options)
        assert computed_twice(9) == set()


def test_the_host_gives_no_more_than_the_longest_sequence_takes(copied_in_pieces):
    host = memory.offload.HostStates(3)
    for shape in ((3,), (2, 3500), (9000,), (2, 20), (4096,), (12_289,), (64, 128), (5000,)):
        tensors = [torch.randn(shape) for _ in range(3)]
        tensors[1] = torch.stack([tensors[1]] * 2, -1)[..., 0]  # not contiguous
        waiting = [host.push(tensor) for tensor in tensors]
        host.push(tensors[0])  # of a forward without a backward
        host.settle()
        for ticket, tensor in zip(waiting[::-1], tensors[::-1]):
            (back,) = host.pop(ticket)
            assert torch.equal(back, tensor) and back.dtype == tensor.dtype
    assert host._held == 0
    # four times 12,289 numbers of 4 bytes: twelve pieces of 4 KiB, and smaller ones of all sizes
    assert sum(size * len(buffers) for size, buffers in host._free[False].items()) <= 4 * (12 * 4096 + 2 * 4096)


@pytest.mark.parametrize(("mode", "offload"), WAYS)
@pytest.mark.parametrize("how", ["bfloat16", "autocast", "autocast with LoRA"])
def test_half_precision_is_as_near_to_float32_as_plain(how, mode, offload, large_layers):
    lora = how == "autocast with LoRA"
    _, reference = loss_and_gradients(build(dtype=torch.float32, lora=lora), "plain")
    model = build(dtype=torch.bfloat16 if how == "bfloat16" else torch.float32, lora=lora)
    with nullcontext() if how == "bfloat16" else torch.autocast("cpu", torch.bfloat16):
        _, plain = loss_and_gradients(model, "plain")
        _, found = loss_and_gradients(model, mode, offload=offload)
    assert distance(found, reference) <= 1.5 * distance(plain, reference)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
def test_rows_that_count_lose_the_same_in_half_precision(width, weighted):
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 9, 8).to(width).requires_grad_(), torch.nn.Linear(8, 23).bfloat16().requires_grad_(False)
    labels, weights = torch.full((1, 9), -100), torch.rand(1, 9) if weighted else None
    labels[0, 3:5] = 7
    with torch.autocast("cpu", torch.bfloat16):
        rows = (torch.tensor([2, 3]), None)
        few, whole = (causal_lm_loss(hidden, labels, head, chunk=4, weights=weights, rows=which) for which in rows)
    torch.testing.assert_close((few, *torch.autograd.grad(few, hidden)), (whole, *torch.autograd.grad(whole, hidden)))


@pytest.mark.parametrize(
    ("counting", "backend"), [*((counting, None) for counting in (0, 1, 18, 19)), (1, "aot_eager"), (19, "aot_eager")]
)
def test_prompts_and_padding_cost_no_logits(counting, backend, monkeypatch):
    """Unless half of all labels count or more: then all states are worked on, as they lie. Compiled models train so too."""
    model = build(dtype=torch.float32, config={"num_hidden_layers": 1})
    inputs, _ = batch()
    labels = torch.full((2, 19), -100)
    labels[:, 1:][torch.arange(36).view(2, 18) < counting] = 3
    labels[:, 0] = 5  # which nothing predicts

    def loss(model):
        return model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss

    expected, reference = step_of(model, lambda: loss(model))
    set_memory_mode(model, "lean", chunk_tokens=8)
    torch._dynamo.reset()
    learning = model if backend is None else torch.compile(model, backend=backend)
    seen, head = [], model.get_base_model().lm_head.weight
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: seen.append(len(x) if w is head else 0) or linear(x, w, *b))
    found, gradients = step_of(model, lambda: loss(learning))
    torch.testing.assert_close((found, gradients), (expected, reference), rtol=1e-5, atol=1e-6)
    assert backend or sum(seen) == (counting if counting < 19 else 38)


OFFLOAD, CHUNK = "offload must be None, True, False or, in mode 'lean', 'fp8'", "chunk_tokens must be an integer of at least 1"


@pytest.mark.parametrize("rows", ["all", "those that count", "others too"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_loss_equals_the_whole(chunk, softcap, rows):
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 23, dtype=torch.float64).requires_grad_(False)
    labels = torch.randint(23, (2, 9))
    labels[0, 2:5] = -100
    logits = head(hidden)[:, :-1]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    whole = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    (expected,) = torch.autograd.grad(3 * whole, hidden)
    counting = F.pad(labels[:, 1:] >= 0, (0, 1)).flatten().nonzero()[:, 0]
    given = {"all": None, "those that count": counting, "others too": F.pad(counting, (0, 1), value=17)}[rows]
    for _ in range(2):
        chunked = causal_lm_loss(hidden, labels, head, chunk=chunk, softcap=softcap, rows=given)
        (found,) = torch.autograd.grad(3 * chunked, hidden)
        torch.testing.assert_close(chunked, whole)
        torch.testing.assert_close(found, expected)
        with torch.no_grad():  # which predict nothing
            hidden[:, -1] = float("nan")
            hidden[0, 1:4] = float("inf")


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("slim", {}, "unknown memory mode 'slim': choose from plain"),
        ("lean", {"offload": "fp4"}, OFFLOAD),
        ("balanced", {"offload": "fp8"}, OFFLOAD),
        *(("lean", {"chunk_tokens": size}, CHUNK) for size in (-1, 0, 2.5, "4", True)),
    ],
)
def test_settings_without_a_meaning_are_refused(mode, options, message):
    with pytest.raises(ValueError, match=message):
        set_memory_mode(build(), mode, **options)


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight)


ROW = {"layer": "LlamaDecoderLayer", "norm": "input_layernorm", "blocks": {"mlp": {"read": "mlp", "write": "mlp"}}}


def changed(part, change):
    """A model of which ``change`` was made to one part."""
    model = build()
    change(model.get_submodule(f"base_model.model.{part}"))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_peft_model(tiny_build("gpt2"), ControlConfig()), "supports llama, mistral"),
        (lambda: changed("model.layers.0.mlp", lambda m: setattr(m, "act_fn", torch.nn.GELU())), "with SwiGLU, not GELU"),
        (lambda: changed("model.layers.0.mlp.up_proj", lambda m: setattr(m, "__class__", Scaled)), "need a frozen MLP"),
        (lambda: changed("model.layers.1.mlp", lambda m: m.requires_grad_(True)), "need a frozen MLP"),
        (lambda: get_peft_model(build().unload(), LoraConfig(target_modules=["up_proj"])), "frozen MLP"),
        (lambda: build(control_architecture=ROW, control_blocks=["mlp"]), "not mlp_control"),
    ],
)
def test_layers_that_are_not_those_known_are_refused(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        set_memory_mode(model, "fast")
    assert not any("memory_plan" in vars(module) for module in model.modules())


def test_gradient_checkpointing_is_refused():
    images, decoder = get_peft_model(TimmImages(), ControlConfig()), build()
    images.get_base_model().set_grad_checkpointing()
    decoder.gradient_checkpointing_enable()
    for model in (images, decoder):
        with pytest.raises(ValueError, match="replaces gradient checkpointing"):
            set_memory_mode(model, "lean")


ERRORS = {
    "second": "once per forward",
    "adapter": "adapters were switched",
    "evaluation": "between a forward and its backward",
    "weights": "modified by an inplace operation",
}


@pytest.mark.parametrize(
    ("layers", "mode", "change"),
    [
        *(("by hand", mode, change) for mode in MODES[1:] for change in ERRORS),
        *((layers, "lean", change) for layers in ("others", "hooked") for change in ERRORS if change != "second"),
    ],
)
@pytest.mark.filterwarnings("ignore:memory modes")
def test_a_backward_after_another_or_after_a_change_is_an_error(layers, mode, change):
    model = adapted("mixtral", control_dropout=0.1) if layers == "others" else build(control_dropout=0.1)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.double()
    set_memory_mode(model, mode, chunk_tokens=8)
    for layer in model.get_base_model().model.layers if layers == "hooked" else ():
        layer.mlp.register_forward_hook(lambda module, given, output: output)
    inputs, labels = batch()
    loss = model(**inputs, labels=labels).loss
    if change == "adapter":
        model.set_adapter("other")
    elif change == "evaluation":
        model.eval()
    elif change == "weights":
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1)
    else:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=ERRORS[change]):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_can_be_taken_at_leaves_put_in_the_parameters_places(mode):
    """What a capture of CUDA graphs does, in every mode."""
    model = set_memory_mode(build(lora=True), mode, chunk_tokens=5)
    step(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with memory.graphs._own_leaves(model, parameters) as leaves:
        found = torch.autograd.grad(model(**batch()[0], labels=batch()[1]).loss, leaves)
    assert all(torch.equal(gradient, parameter.grad) for gradient, parameter in zip(found, parameters))
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(map(lambda a, b: a is b, after, parameters))
    places = memory.graphs._copied([None, *found[1:]], [torch.zeros_like(gradient) for gradient in found])
    assert places[0] is None and torch.equal(places[1], found[1])
    with pytest.raises(RuntimeError, match="some steps only"):
        memory.graphs._copied(found, [None, *found[1:]])


@pytest.mark.parametrize("mode", MODES)
def test_a_control_small_against_the_state_survives_half_precision(mode):
    """Added to a residual sum that is already rounded, it would be lost in every element at once."""
    model = set_memory_mode(build(dtype=torch.bfloat16, init_weights=True, control_rank=32), mode)
    layer = model.get_base_model().model.layers[0]
    layer.self_attn.o_proj.weight.data.mul_(4)  # what both blocks add is off the state's rounding grid, as in real models
    state = (4 * torch.randn(1, 512, 32)).bfloat16().requires_grad_()
    rotary = model.get_base_model().model.rotary_emb(state, torch.arange(512)[None])

    def output(scale):
        for control in (layer.attention_control, layer.mlp_control):
            torch.nn.init.eye_(control.control_A["default"].weight)
            control.control_B["default"].weight.data.copy_(scale * torch.eye(32))
        result = layer(state, attention_mask=None, position_embeddings=rotary)
        return (result[0] if isinstance(result, tuple) else result).detach().double()

    change, expected = output(2**-12) - output(0.0), 2 * 2**-12 * state.detach().double()
    assert (change * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.2)


# -- what users do that the layers' own code would have noticed ---------------------------------------------------


@pytest.mark.parametrize("mode", MODES[1:])
def test_attention_is_told_the_positions(mode, monkeypatch):
    """Flash attention finds packed sequences by them."""
    seen = []

    def attention(module, *arguments, position_ids=None, **named):
        seen.append(position_ids)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *arguments, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "noting", attention)
    model = build()
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = "noting"
    set_memory_mode(model, mode)
    positions = torch.arange(19).repeat(2, 1) % 7
    step(model, position_ids=positions, attention_mask=None, use_cache=False)  # with one the layers run their own forward
    assert seen and all(torch.equal(found, positions) for found in seen)
