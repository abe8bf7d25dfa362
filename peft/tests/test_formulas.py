"""The method's formulas (paper, section 4), written out here from the frozen model's own submodules."""

import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny_models import FAMILIES, WIDTH, build, is_adapter, logits, randomize_adapters
from torch import nn

from peft_control import ARCHITECTURES, ControlConfig
from peft_control.architectures import find_layers

BLOCKS = (["mlp"], ["attention"], ["attention", "mlp"])
ALPHA = 0.7


# Each takes the frozen layer, its input x, what else the layer got, and the two controls (or zero functions).


def llama_like(layer, x, context, attention, mlp):
    h = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **context)[0] + attention(x)
    return h + layer.mlp(layer.post_attention_layernorm(h)) + mlp(h)


def gemma_like(layer, x, context, attention, mlp):
    attended = layer.self_attn(hidden_states=layer.input_layernorm(x), **context)[0]
    h = x + layer.post_attention_layernorm(attended) + attention(x)
    return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h))) + mlp(h)


def gpt2(layer, x, context, attention, mlp):
    h = x + layer.attn(layer.ln_1(x), **context)[0] + attention(x)
    return h + layer.mlp(layer.ln_2(h)) + mlp(h)


def post_norm(layer, x, context, attention, mlp):
    a = layer.attention(x, **context)[0] + attention(x)
    return layer.output.LayerNorm(layer.output.dense(layer.intermediate(a)) + a) + mlp(a)


def hf_vit(layer, x, context, attention, mlp):
    h = x + layer.attention(layer.layernorm_before(x), **context)[0] + attention(x)
    return h + layer.mlp(layer.layernorm_after(h)) + mlp(h)


def dinov2(layer, x, context, attention, mlp):
    h = x + layer.layer_scale1.lambda1 * _first(layer.attention(layer.norm1(x), **context)) + attention(x)
    return h + layer.layer_scale2.lambda1 * layer.mlp(layer.norm2(h)) + mlp(h)


def timm_vit(layer, x, context, attention, mlp):
    h = x + layer.ls1.gamma * layer.attn(layer.norm1(x), **context) + attention(x)
    return h + layer.ls2.gamma * layer.mlp(layer.norm2(h)) + mlp(h)


FORMULAS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3"], llama_like),
    **dict.fromkeys(["gemma2", "gemma3"], gemma_like),
    **dict.fromkeys(["roberta", "xlm-roberta", "bert", "mpnet", "electra"], post_norm),
    "gpt2": gpt2,
    "vit": hf_vit,
    "dinov2": dinov2,
    "timm-vit": timm_vit,
}


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def control_of(state_dict: dict, layer: str, block: str):
    """alpha * B(A(state)) from the saved names alone, or zero where the layer has no such control."""

    def value(name, factor):
        return state_dict.get(f"base_model.model.{layer}.{block}_control.control_{factor}.default.{name}")

    if value("weight", "A") is None:
        return torch.zeros_like
    A, B = (value("weight", factor) for factor in "AB")
    return lambda state: ALPHA * F.linear(F.linear(state, A, value("bias", "A")), B, value("bias", "B"))


def record_calls(model: nn.Module, names: list[str]) -> dict:
    """Register hooks that note each layer's bound arguments and output; filled by the next forward."""
    calls = {}

    def hook_for(name):
        def hook(layer, args, kwargs, output):
            bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
            bound.update(bound.pop("kwargs", {}))
            calls[name] = (bound, _first(output))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True)
    return calls


@pytest.mark.parametrize("blocks", BLOCKS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_formula(family, blocks):
    base = build(family, torch.float64)
    frozen = copy.deepcopy(base)
    names = list(find_layers(base))
    config = ControlConfig(
        control_blocks=blocks,
        control_rank=3,
        control_alpha=ALPHA,
        control_bias=FAMILIES[family].kind == "vision",
        init_weights=False,
    )
    model = get_peft_model(base, config).eval()
    weights = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    assert len(weights) == len(names) * len(blocks) * (4 if config.control_bias else 2)
    assert all(p.dtype == torch.float64 for p in weights.values())
    assert all(p.abs().min() > 0 for name, p in weights.items() if name.endswith("weight"))  # B too
    if config.control_bias:
        randomize_adapters(model)
    calls = record_calls(model.base_model.model, names)
    with torch.no_grad():
        model(**FAMILIES[family].inputs(torch.float64))
        state_dict = model.state_dict()
        assert len(calls) == len(names)
        for name in names:
            bound, output = calls[name]
            (_, _), (_, x), *rest = bound.items()  # self, the input, and the rest
            context = {key: value for key, value in rest if value is not None and key != "past_key_values"}
            controls = [control_of(state_dict, name, block) for block in ("attention", "mlp")]
            expected = FORMULAS[family](frozen.get_submodule(name), x, context, *controls)
            plain = FORMULAS[family](frozen.get_submodule(name), x, context, *[torch.zeros_like] * 2)
            assert (output - expected).abs().max() <= 1e-10
            assert (output - plain).abs().max() > 1e-3  # the controls do something here


def test_every_architecture_has_a_formula():
    assert {row.name for row in ARCHITECTURES} == set(FORMULAS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_at_init(family):
    base = build(family)
    inputs = FAMILIES[family].inputs()
    with torch.no_grad():
        before = logits(base, inputs)
        model = get_peft_model(
            base, ControlConfig(control_blocks=["attention", "mlp"], control_rank=4, control_bias=True)
        ).eval()
        assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize(
    ("family", "init", "expected"),
    [
        ("llama", None, "kaiming"),
        ("vit", None, "kaiming"),
        ("roberta", None, "normal"),
        ("roberta", "kaiming", "kaiming"),
        ("llama", "normal", "normal"),
    ],
)
def test_initialisation_of_A(family, init, expected):
    base = build(family)
    base.config.initializer_range = 0.5
    model = get_peft_model(base, ControlConfig(control_rank=512, control_init=init, control_bias=True))
    weights = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    for name, weight in weights.items():
        if "control_A" in name and name.endswith("weight"):
            bound = weight.shape[1] ** -0.5  # Kaiming-uniform with a=√5: U(-1/√fan_in, 1/√fan_in)
            std = bound / 3**0.5 if expected == "kaiming" else 0.5
            assert weight.std().item() == pytest.approx(std, rel=0.03)
            assert (weight.abs().max() <= bound) == (expected == "kaiming")
        else:
            assert not weight.any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "dinov2"])
def test_gradients_equal_finite_differences(family):
    config = ControlConfig(control_blocks=["attention", "mlp"], control_rank=2, control_alpha=1.3)
    model = randomize_adapters(get_peft_model(build(family, torch.float64), config).eval(), std=0.1)
    for norm in model.modules():  # LLaMA's computes in float32, too coarse for a difference quotient
        if type(norm).__name__ == "LlamaRMSNorm":
            norm.forward = functools.partial(
                F.rms_norm, normalized_shape=(WIDTH,), weight=norm.weight, eps=1e-6
            )
    inputs = FAMILIES[family].inputs(torch.float64)
    direction = torch.randn_like(logits(model, inputs))

    def loss():
        return (logits(model, inputs) * direction).sum()

    loss().backward()
    step = 1e-5
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            assert parameter.grad is None or not parameter.requires_grad
            continue
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in (0, flat.numel() // 2):
            value = flat[index].item()
            ends = []
            for shift in (step, -step):
                flat[index] = value + shift
                ends.append(loss().item())
            flat[index] = value
            difference = (ends[0] - ends[1]) / (2 * step)
            assert gradient[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-7), name


def test_control_dropout_acts_in_training_only():
    config = ControlConfig(control_rank=4, control_dropout=0.5, init_weights=False)
    model = get_peft_model(build("llama"), config)
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        model.eval()
        assert torch.equal(logits(model, inputs), logits(model, inputs))
        model.train()
        assert not torch.equal(logits(model, inputs), logits(model, inputs))


def test_control_dropout_sits_between_A_and_B():
    """With rank 1 a dropped hidden state removes the whole control of that position, a kept one doubles it."""
    config = ControlConfig(control_rank=1, control_dropout=0.5, init_weights=False, layers_to_transform=[1])
    model = get_peft_model(build("llama", torch.float64), config)
    layer = "model.layers.1"
    calls = record_calls(model.base_model.model, [layer])
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        model.base_model.disable_adapter_layers()
        model(**inputs)
        plain = calls[layer][1]
        model.base_model.enable_adapter_layers()
        model.eval()
        model(**inputs)
        full = calls[layer][1] - plain
        model.train()
        model(**inputs)
        dropped = calls[layer][1] - plain
    ratio = (dropped * full).sum(-1) / (full * full).sum(-1)
    is_zero, is_double = (ratio.abs() < 1e-9), ((ratio - 2).abs() < 1e-9)
    assert (is_zero | is_double).all()
    assert is_zero.any() and is_double.any()


def test_drop_path_does_not_drop_the_control():
    """While DINOv2's DropPath drops the whole frozen block, y = x + c(x) for both blocks in turn."""
    base = build("dinov2", torch.float64)
    config = ControlConfig(
        control_blocks=["attention", "mlp"], control_rank=3, control_alpha=ALPHA, init_weights=False
    )
    model = get_peft_model(base, config).train()
    for module in model.modules():
        if type(module).__name__ == "Dinov2DropPath":
            module.drop_prob = 1 - 1e-12
    names = list(find_layers(model.base_model.model))
    calls = record_calls(model.base_model.model, names)
    with torch.no_grad():
        model(**FAMILIES["dinov2"].inputs(torch.float64))
        state_dict = model.state_dict()
        for name in names:
            bound, output = calls[name]
            x = bound["hidden_states"]
            h = x + control_of(state_dict, name, "attention")(x)
            expected = h + control_of(state_dict, name, "mlp")(h)
            assert (output - expected).abs().max() <= 1e-10


def test_chunked_feed_forward():
    """BERT may run its feed-forward in pieces along the sequence; each piece gets its own control."""
    model = get_peft_model(
        build("bert", torch.float64), ControlConfig(control_rank=3, init_weights=False)
    ).eval()
    inputs = FAMILIES["bert"].inputs()
    with torch.no_grad():
        whole = logits(model, inputs)
        for module in model.modules():
            if hasattr(module, "chunk_size_feed_forward"):
                module.chunk_size_feed_forward = 3
        assert torch.allclose(logits(model, inputs), whole, atol=1e-12)
