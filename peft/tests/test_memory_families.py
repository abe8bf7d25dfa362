"""Memory modes of vision transformers and post-norm encoders: exact gradients, dropout replayed, nothing left behind."""

import pytest
import timm
import torch
from peft import get_peft_model
from timm.layers import GluMlp, RmsNorm, SwiGLU
from tiny_models import FAMILIES, Live, adapted, assert_as_plain, distance, logits, randomize_adapters, step_of, step_on
from transformers.activations import ACT2FN

from peft_control import ControlConfig
from peft_control.memory import MODES, set_memory_mode

VISION = ("vit", "dinov2", "timm-vit")
POST_NORM = ("roberta", "xlm-roberta", "bert", "mpnet", "electra")
TARGETS = {**dict.fromkeys(VISION, r".*\.(qkv|q_proj|v_proj|query|value)"), "mpnet": ["q", "v"]}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", VISION + POST_NORM)
def test_gradients_are_exact(family, lora):
    fields = dict(target_modules=TARGETS.get(family, ["query", "value"]), r=2) if lora else {}
    for blocks in (["mlp"], ["attention"], ["attention", "mlp"]):
        model = adapted(family, dropout=0.0, control_blocks=blocks, control_bias=True, **fields)
        assert_as_plain(model, FAMILIES[family].inputs(torch.float64), *MODES[1:], tolerance=1e-10, chunk_tokens=5)


@pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh", "quick_gelu"])
def test_any_elementwise_activation(activation):
    model = adapted("bert", dropout=0.0)
    for layer in model.get_submodule("base_model.model.bert.encoder.layer"):
        layer.intermediate.intermediate_act_fn = ACT2FN[activation]
    assert_as_plain(model, FAMILIES["bert"].inputs(), *MODES[1:], tolerance=1e-10, chunk_tokens=5)


@pytest.mark.parametrize("family", VISION + POST_NORM)
def test_dropout_is_plains(family):
    """With one chunk every mode draws what plain draws, in the same order: same seed, same gradients."""
    model, inputs = adapted(family, dropout=0.2, control_dropout=0.1), FAMILIES[family].inputs(torch.float64)
    _, reference = assert_as_plain(model, inputs, *MODES[1:], tolerance=1e-10)
    assert distance(step_on(set_memory_mode(model, "plain"), inputs, seed=3)[1], reference) > 1e-3


def test_chunks_replay_their_dropout():
    """Finite differences with masks drawn chunk by chunk: right only if the backward draws the same again."""
    model, inputs = adapted("roberta", dropout=0.2, control_dropout=0.1), FAMILIES["roberta"].inputs()
    set_memory_mode(model, "lean", chunk_tokens=5)
    for name, gradient in step_on(model, inputs)[1].items():
        index, parameter = gradient.abs().argmax(), model.get_parameter(name)
        exact, values = gradient.flatten()[index].item(), []
        for step in (1e-5, -1e-5) if "layer.0" in name else ():
            parameter.data.view(-1)[index] += step
            values.append(step_on(model, inputs)[0].item())
            parameter.data.view(-1)[index] -= step
        assert not values or (values[0] - values[1]) / 2e-5 == pytest.approx(exact, rel=1e-4)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(("device", "half"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=gpu)])
@pytest.mark.parametrize("family", ["timm-vit", "vit", "dinov2", "roberta", "mpnet"])
def test_under_autocast_as_near_to_float32_as_plain(family, device, half):
    """In the mean of eight adapters, since of one alone the rounding may happen to be small."""
    model = adapted(family, dtype=torch.float32, dropout=0.0, control_rank=4).to(device)
    inputs = {name: value.to(device) for name, value in FAMILIES[family].inputs().items()}

    def step(mode, enabled):
        def loss():
            with torch.autocast(device, half, enabled=enabled):
                return logits(model, inputs).float().square().sum()

        set_memory_mode(model, mode, chunk_tokens=5)
        found = step_of(model, loss)[1]
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        return found

    apart = {mode: [] for mode in MODES}
    for seed in range(8):
        randomize_adapters(model, seed=seed)
        reference = step("plain", False)
        for mode in MODES:
            assert distance(step(mode, False), reference) <= 1e-4
            apart[mode].append(distance(step(mode, True), reference))
    apart = {mode: torch.tensor(found).square().mean().sqrt() for mode, found in apart.items()}
    assert max(apart.values()) <= 1.5 * apart["plain"], apart


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("family", ["llama", "vit", "bert"])
def test_attention_weights_that_the_configuration_asks_for_have_gradients(family, mode):
    model, inputs = adapted(family, dropout=0.0), FAMILIES[family].inputs(torch.float64)
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    base.config.output_attentions = True

    def gradients(mode):
        set_memory_mode(model, mode)
        return step_of(model, lambda: sum(weights.square().mean() for weights in model(**inputs).attentions))[1]

    assert distance(gradients(mode), gradients("plain")) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "vit", "timm-vit", "mpnet"])
def test_plain_restores_everything_and_inference_is_untouched(family):
    model = adapted(family, dtype=torch.float32).eval()
    inputs, keys = FAMILIES[family].inputs(), list(model.state_dict())

    def answers():
        words = model.generate(**inputs, max_new_tokens=5, do_sample=False) if family == "llama" else torch.zeros(1)
        return logits(model, inputs), words

    with torch.no_grad():
        before = answers()
        for mode in MODES[1:]:
            set_memory_mode(model, mode)
            assert list(model.state_dict()) == keys
            assert all(map(torch.equal, answers(), before))
    set_memory_mode(model, "plain")
    assert not any("forward" in vars(module) or "memory_plan" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["vit", "timm-vit", "roberta"])
def test_each_mode_keeps_less_than_the_one_before(family):
    """Between forward and backward."""
    model, kept = adapted(family, dtype=torch.float32, dropout=0.0, control_blocks=["mlp"]), []
    for mode in MODES:
        set_memory_mode(model, mode)
        with Live() as live:
            loss = logits(model, FAMILIES[family].inputs(torch.float32)).square().sum()
            kept.append(live.bytes())
        loss.backward()
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept


@pytest.mark.parametrize(
    "kind", [{"mlp_layer": SwiGLU}, {"mlp_layer": GluMlp}, {"norm_layer": RmsNorm}, {"scale_mlp_norm": True}]
)
def test_timm_blocks_that_only_look_like_those_known_are_refused(kind):
    base = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, **kind)
    with pytest.raises(ValueError, match="memory modes know timm's"):
        set_memory_mode(get_peft_model(base, ControlConfig()), "fast")
