"""The method's formulas (paper, section 4), written out here from the frozen model's own submodules."""

import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from tiny_models import FAMILIES, MODELS, assert_as_plain, build, distance, is_adapter, logits, randomize_adapters, step_on
from torch import nn

from peft_control import ARCHITECTURES, ControlConfig
from peft_control.architectures import find_layers
from peft_control.memory import set_memory_mode

ALPHA = 0.7
GENERATES = ("decoder", "seq2seq", "vision-language", "whisper")


class Frozen:
    """A layer without controls that has run on the input and the arguments of one with controls.

    ``frozen.out(path)`` is what a module gave in that run, ``frozen(path, ..., state)`` sends another state through
    modules one after the other, each called as in that run.
    """

    def __init__(self, layer, args, kwargs):
        self.layer, self.calls, hooks = layer, {}, []
        for name, module in layer.named_modules():
            hooks.append(module.register_forward_hook(functools.partial(self._note, name), with_kwargs=True))
        self.plain = _first(layer(*args, **kwargs))
        for hook in hooks:
            hook.remove()

    def _note(self, name, module, args, kwargs, output):
        self.calls.setdefault(name, (args, kwargs, _first(output)))  # of a module called twice the first call

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def out(self, path):
        return self.calls[path][2]

    def __call__(self, paths, state):
        for path in paths.split():
            args, kwargs, _ = self.calls[path]
            if args:
                args = (state, *args[1:])
            else:
                key = next(key for key, value in kwargs.items() if isinstance(value, torch.Tensor))
                kwargs = {**kwargs, key: state}
            state = _first(self.layer.get_submodule(path)(*args, **kwargs))
        return state


# A formula takes the frozen layer, its input x, and the controls of its two blocks (or zero functions).


def pre_norm(attention, mlp, cross="", multiplier=None, parallel=None):
    """h = x + attention(x); y = h + mlp(h), or y = x + attention(x) + mlp(x) where the attribute ``parallel`` is true."""

    def formula(f, x, attention_control, mlp_control):
        scale = getattr(f, multiplier) if multiplier else 1.0
        first = next(path for path in attention.split("|") if path in f.calls)
        h = x + scale * f.out(first) + attention_control(x)
        if cross and cross.split()[0] in f.calls:
            h = h + f(cross, h)
        state = x if parallel is not None and getattr(f, parallel, True) else h
        return h + scale * f(mlp, state).view(x.shape) + mlp_control(state)

    return formula


def post_norm(attention, mlp, norm, cross=()):
    """a = attention(x), y = norm(mlp(a) + a), where the first one's norm is in it."""

    def formula(f, x, attention_control, mlp_control):
        a = f.out(attention) + attention_control(x)
        if cross and cross[0] in f.calls:
            a = f(cross[1], f(cross[0], a) + a)
        return f(norm, f(mlp, a) + a) + mlp_control(a)

    return formula


def beit(f, x, attention, mlp):
    h = x + f.lambda_1 * f.out("attention") + attention(x)
    return h + f.lambda_2 * f("layernorm_after mlp", h) + mlp(h)


def falcon_h1(f, x, attention, mlp):
    h = x + f.ssm_out_multiplier * f.out("mamba") + f.attn_out_multiplier * f.out("self_attn") + attention(x)
    return h + f("pre_ff_layernorm feed_forward", h) + mlp(h)


def gemma3n(f, x, _, mlp):
    ((h,), *_), (args, kwargs, _) = f.calls["pre_feedforward_layernorm"], f.calls[""]
    given = inspect.signature(type(f.layer).forward).bind(f.layer, *args, **kwargs).arguments
    y = h + f("pre_feedforward_layernorm mlp post_feedforward_layernorm", h) + mlp(h)
    corrected = f.altup.correct(f.altup.predict(x), y)
    first = f.altup.scale_corrected_output(corrected[f.config.altup_active_idx].clone())
    first = f.act_fn(f.per_layer_input_gate(first)) * given["per_layer_input"]
    corrected[1:] += f.post_per_layer_input_norm(f.per_layer_projection(first))
    return corrected


def gemma4(f, x, attention, mlp):
    return GEMMA(f, x, attention, mlp) * f.layer_scalar  # of the whole stream


def granitemoehybrid(f, x, attention, mlp):
    h = x + 0.3 * f.out("self_attn" if "self_attn" in f.calls else "mamba") + attention(x)
    normed = f.post_attention_layernorm(h)
    return h + 0.3 * (f("block_sparse_moe", normed) + f.shared_mlp(normed)) + mlp(h)


def mamba(f, x, mixer, _):
    return x + f.out("mixer") + mixer(x)


def t5(f, x, attention, mlp):
    h, last = x + f.out("layer.0.dropout") + attention(x), f"layer.{len(f.layer.layer) - 1}"
    if last == "layer.2":
        h = f("layer.1", h)  # with its own residual
    return h + f(f"{last}.layer_norm {last}.DenseReluDense", h) + mlp(h)


FFN, CROSS = "fc1 activation_fn fc2", "encoder_attn_layer_norm encoder_attn"
LLAMA = pre_norm("self_attn|linear_attn", "post_attention_layernorm mlp")
GRANITE = "post_attention_layernorm block_sparse_moe"
GEMMA = pre_norm("post_attention_layernorm", "pre_feedforward_layernorm mlp post_feedforward_layernorm")
OLMO = pre_norm("post_attention_layernorm", "mlp post_feedforward_layernorm")
COHERE = pre_norm("self_attn", "input_layernorm mlp", parallel="always")
VIT = pre_norm("attention", "layernorm_after mlp")
DINO = pre_norm("layer_scale1", "norm2 mlp layer_scale2")
CLIP = pre_norm("self_attn", "layer_norm2 mlp")
BERT = post_norm("attention", "intermediate output.dense", "output.LayerNorm")
BART = post_norm("self_attn_layer_norm", FFN, "final_layer_norm", CROSS.split()[::-1])
MBART = pre_norm("self_attn", f"final_layer_norm {FFN}", CROSS)
SPEECH = post_norm("layer_norm", "feed_forward", "final_layer_norm")
FORMULAS = {
    **dict.fromkeys(["gemma2", "gemma3"], GEMMA),
    **dict.fromkeys(["olmo2", "olmo3", "exaone4"], OLMO),
    **dict.fromkeys(["cohere", "cohere2", "phi"], COHERE),
    **dict.fromkeys(["mamba", "mamba2"], mamba),
    **dict.fromkeys(["roberta", "xlm-roberta", "bert", "mpnet", "electra", "camembert", "ernie", "deberta-v2"], BERT),
    **dict.fromkeys(["vit", "deit", "vit_mae", "audio-spectrogram-transformer"], VIT),
    **dict.fromkeys(["dinov2", "dinov2_with_registers", "dinov3_vit"], DINO),
    **dict.fromkeys(["clip", "siglip", "siglip2"], CLIP),
    **dict.fromkeys(["qwen2_vl-vision", "qwen2_5_vl-vision", "qwen3_vl-vision"], pre_norm("attn", "norm2 mlp")),
    **dict.fromkeys(["bart", "marian"], BART),
    **dict.fromkeys(["mbart", "whisper"], MBART),
    **dict.fromkeys(["wav2vec2", "hubert"], SPEECH),
    **dict.fromkeys(["wav2vec2-pre-norm", "hubert-pre-norm"], pre_norm("attention", "final_layer_norm feed_forward")),
    **dict.fromkeys(["gpt2", "gpt_neo"], pre_norm("attn", "ln_2 mlp")),
    "albert": post_norm("attention", "ffn activation ffn_output", "full_layer_layer_norm"),
    "apertus": pre_norm("self_attn", "feedforward_layernorm mlp"),
    "beit": beit,
    "distilbert": post_norm("sa_layer_norm", "ffn", "output_layer_norm"),
    "falcon_h1": falcon_h1,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "glm4": pre_norm("post_self_attn_layernorm", "post_attention_layernorm mlp post_mlp_layernorm"),
    "gpt_neox": pre_norm("attention", "post_attention_layernorm mlp", parallel="use_parallel_residual"),
    "gptj": pre_norm("attn", "ln_1 mlp", parallel="always"),
    "granite": pre_norm("self_attn", "post_attention_layernorm mlp", multiplier="residual_multiplier"),
    "granitemoe": pre_norm("self_attn", GRANITE, multiplier="residual_multiplier"),
    "granitemoehybrid": granitemoehybrid,
    "lfm2": pre_norm("self_attn|conv", "ffn_norm feed_forward"),
    "llama4": pre_norm("self_attn", "post_attention_layernorm feed_forward"),
    "modernbert": pre_norm("attn", "mlp_norm mlp"),
    "opt": pre_norm("self_attn", f"final_layer_norm {FFN}"),
    "stablelm-parallel": pre_norm("self_attn", "input_layernorm mlp", parallel="always"),
    "swin": pre_norm("drop_path", "layernorm_after mlp"),
    "t5": t5,
    "timm-vit": pre_norm("ls1", "norm2 mlp ls2"),
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
    """Register hooks that note each layer's arguments and output; filled by the next forward."""
    calls = {}

    def note(name, layer, args, kwargs, output):
        calls[name] = (args, kwargs, _first(output))

    for name in names:
        model.get_submodule(name).register_forward_hook(functools.partial(note, name), with_kwargs=True)
    return calls


def outputs(model, inputs):
    torch.manual_seed(3)
    return logits(model, inputs)


def adapted(base, blocks, **fields):
    config = ControlConfig(control_blocks=blocks, control_rank=3, control_alpha=ALPHA, **fields)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_row(name, tmp_path):
    """Identity at first, the exact formula in every layer, lean's gradients, save and reload, generation with its cache."""
    family, base = MODELS[name], build(name, torch.float64).requires_grad_(False)
    inputs, frozen, layers = family.inputs(torch.float64), copy.deepcopy(base), find_layers(base)
    bias, every = family.kind == "vision", list(next(iter(layers.values()))[1].blocks)
    with torch.no_grad():
        before = outputs(base, inputs)
        assert torch.equal(outputs(adapted(copy.deepcopy(base), every), inputs), before)
        for blocks in [every, *([block] for block in every if len(every) > 1)]:
            model = adapted(copy.deepcopy(base), blocks, control_bias=bias, init_weights=False)
            weights = {key: p for key, p in model.named_parameters() if is_adapter(key)}
            assert len(weights) == len(layers) * len(blocks) * (4 if bias else 2)
            assert {key for key, p in model.named_parameters() if p.requires_grad} == set(weights)
            assert not any("expert" in key or "gate" in key for key in weights)
            assert all(p.dtype == torch.float64 for p in weights.values())
            assert all(p.abs().min() > 0 for key, p in weights.items() if key.endswith("weight"))  # B too
            if bias:
                randomize_adapters(model)
            calls = record_calls(model.base_model.model, list(layers))
            cacheless = {"use_cache": False} if family.kind in GENERATES else {}
            outputs(model, {**inputs, **cacheless})
            state_dict = model.state_dict()
            assert len(calls) == len(layers)
            for place, (_, row) in layers.items():
                args, kwargs, output = calls[place]
                run = Frozen(frozen.get_submodule(place), args, kwargs)
                x = args[0] if args else kwargs["hidden_states"]
                formula = FORMULAS.get(name) or FORMULAS.get(row.name, LLAMA)
                controls = [control_of(state_dict, place, block) for block in (*row.blocks, "none")]
                controls = controls if "attention" in row.blocks or "mixer" in row.blocks else controls[::-1]
                expected = formula(run, x, *controls[:2])
                assert (output - expected).abs().max() <= 1e-10, place
                assert (formula(run, x, *[torch.zeros_like] * 2) - run.plain).abs().max() <= 1e-10
                assert (output - run.plain).abs().max() > 1e-3  # the controls do something here
    model = adapted(copy.deepcopy(base), every, init_weights=False).train()
    # the norms of some decoders compute in float32, and lean has those of four by hand
    by_hand = name in ("llama", "mistral", "qwen2", "qwen3")
    _, found = assert_as_plain(model, {**inputs, **cacheless}, "lean", tolerance=1e-5 if by_hand else 1e-10)
    assert len(found) == sum(p.requires_grad for p in model.parameters()) and all(x.abs().max() > 0 for x in found.values())
    # in the second step no MLP is computed once more than it must; some routers compute in float32
    rounds = by_hand or any("Rout" in type(m).__name__ for m in base.modules())
    set_memory_mode(model, "lean", chunk_tokens=4)
    chunked = [step_on(model, inputs)[1] for _ in range(2)]
    assert distance(chunked[1], found) <= (1e-5 if rounds else 1e-10)
    set_memory_mode(model, "plain").eval()
    with torch.no_grad():
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        expected = outputs(model, inputs)
        torch.testing.assert_close(outputs(again, inputs), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(expected, before)
        if family.kind in GENERATES and again.can_generate():
            prompt = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
            if family.kind in ("decoder", "vision-language"):
                prompt = {"input_ids": inputs["input_ids"].clamp(max=50)}  # without padding and image
            steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
            found = [
                again.generate(**prompt, **steps, use_cache=use_cache, return_dict_in_generate=True, output_logits=True)
                for use_cache in (True, False)
            ]
            assert torch.equal(found[0].sequences, found[1].sequences)
            for with_cache, without in zip(found[0].logits, found[1].logits, strict=True):
                torch.testing.assert_close(with_cache, without, rtol=1e-5, atol=1e-5)


def test_every_row_has_a_model():
    found = {row.name for name in MODELS for _, row in find_layers(build(name)).values()}
    assert found == {row.name for row in ARCHITECTURES} and len(found) == len(ARCHITECTURES) >= 45


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
        plain = calls[layer][2]
        model.base_model.enable_adapter_layers()
        model.eval()
        model(**inputs)
        full = calls[layer][2] - plain
        model.train()
        model(**inputs)
        dropped = calls[layer][2] - plain
    ratio = (dropped * full).sum(-1) / (full * full).sum(-1)
    is_zero, is_double = (ratio.abs() < 1e-9), ((ratio - 2).abs() < 1e-9)
    assert (is_zero | is_double).all()
    assert is_zero.any() and is_double.any()


def test_drop_path_does_not_drop_the_control():
    """While DINOv2's DropPath drops the whole frozen block, y = x + c(x) for both blocks in turn."""
    base = build("dinov2", torch.float64)
    config = ControlConfig(control_blocks=["attention", "mlp"], control_rank=3, control_alpha=ALPHA, init_weights=False)
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
            (x, *_), _, output = calls[name]
            h = x + control_of(state_dict, name, "attention")(x)
            expected = h + control_of(state_dict, name, "mlp")(h)
            assert (output - expected).abs().max() <= 1e-10
