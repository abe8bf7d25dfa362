"""Memory modes of vision transformers and post-norm encoders: exact gradients, dropout replayed, nothing left behind."""

import pytest
import timm
import torch
from peft import get_peft_model
from timm.layers import GluMlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from tiny_models import FAMILIES, TimmImages, build, logits, randomize_adapters
from torch import nn

from peft_control import ControlConfig
from peft_control.memory import MODES, set_memory_mode
from peft_control.memory.families import halves

VISION = ("vit", "dinov2", "timm-vit")
POST_NORM = ("roberta", "xlm-roberta", "bert", "mpnet", "electra")
ATTENTION_LINEARS = {"vit": ["q_proj", "v_proj"], "dinov2": ["query", "value"], "timm-vit": ["qkv"], "mpnet": ["q", "v"]}


def control_model(family, dtype=torch.float64, lora=False, dropout=None, **fields):
    """A model in training mode; ``dropout`` sets the probability of every dropout and drop path of the base."""
    base = build(family, dtype)
    for module in base.modules():
        if dropout is not None and isinstance(getattr(module, "p", None), float):
            module.p = dropout
        if dropout is not None and hasattr(module, "drop_prob"):
            module.drop_prob = dropout
    per_weight = {}
    if lora:
        names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        wanted = ATTENTION_LINEARS.get(family, ["query", "value"])
        per_weight = dict(target_modules=[name for name in wanted if name in names] or ["q_proj"], r=2)
    config = ControlConfig(**{"control_blocks": ["attention", "mlp"], "control_rank": 4, **fields}, **per_weight)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return randomize_adapters(model).train()


def loss_and_gradients(model, family, mode, seed=2, dtype=torch.float64, **options):
    set_memory_mode(model, mode, **{"chunk_tokens": 5, **options})
    model.zero_grad()
    torch.manual_seed(seed)
    loss = logits(model, FAMILIES[family].inputs(dtype)).float().square().sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(gradient is not None for gradient in gradients.values())
    return loss.detach(), gradients


def distance(found, reference):
    assert found.keys() == reference.keys()
    flat = [torch.cat([g.double().flatten() for g in gradients.values()]) for gradients in (found, reference)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", VISION + POST_NORM)
def test_gradients_are_exact(family, lora):
    for blocks in (["mlp"], ["attention"], ["attention", "mlp"]):
        model = control_model(family, lora=lora, dropout=0.0, control_blocks=blocks, control_bias=True)
        loss, reference = loss_and_gradients(model, family, "plain")
        for mode in MODES[1:]:
            found_loss, found = loss_and_gradients(model, family, mode)
            torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)  # the loss itself is float32
            assert distance(found, reference) <= 1e-10, mode


@pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh", "quick_gelu"])
def test_any_elementwise_activation(activation):
    from transformers.activations import ACT2FN

    model = control_model("bert", dropout=0.0)
    for layer in model.get_submodule("base_model.model.bert.encoder.layer"):
        layer.intermediate.intermediate_act_fn = ACT2FN[activation]
    _, reference = loss_and_gradients(model, "bert", "plain")
    for mode in MODES[1:]:
        assert distance(loss_and_gradients(model, "bert", mode)[1], reference) <= 1e-10


@pytest.mark.parametrize("family", VISION + POST_NORM)
def test_dropout_is_plains(family):
    """With one chunk every mode draws what plain draws, in the same order: same seed, same gradients."""
    model = control_model(family, dropout=0.2, control_dropout=0.1)
    _, reference = loss_and_gradients(model, family, "plain")
    assert distance(loss_and_gradients(model, family, "plain", seed=3)[1], reference) > 1e-3
    for mode in MODES[1:]:
        _, found = loss_and_gradients(model, family, mode, chunk_tokens=None)
        assert distance(found, reference) <= 1e-10, mode


def test_chunks_replay_their_dropout():
    """Finite differences with masks drawn chunk by chunk: right only if the backward draws the same again."""
    model = control_model("roberta", dropout=0.2, control_dropout=0.1)
    _, gradients = loss_and_gradients(model, "roberta", "lean")
    inputs = FAMILIES["roberta"].inputs()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "layer.0" not in name:
            continue
        index, values = gradients[name].abs().argmax(), []
        exact = gradients[name].flatten()[index].item()
        for step in (1e-5, -1e-5):
            parameter.data.view(-1)[index] += step
            torch.manual_seed(2)
            values.append(logits(model, inputs).square().sum().item())
            parameter.data.view(-1)[index] -= step
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("family", ["timm-vit", "dinov2", "roberta"])
def test_under_autocast_as_near_to_float32_as_plain(family):
    """Float32 weights under bf16 autocast, as the training scripts of both domains run."""
    model = control_model(family, torch.float32, dropout=0.0)
    _, reference = loss_and_gradients(model, family, "plain", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = loss_and_gradients(model, family, "plain", dtype=torch.float32)
        for mode in MODES[1:]:
            _, found = loss_and_gradients(model, family, mode, dtype=torch.float32)
            assert all(gradient.dtype == torch.float32 for gradient in found.values())
            assert distance(found, reference) <= 1.5 * distance(plain, reference), mode


@pytest.mark.parametrize("family", ["timm-vit", "dinov2", "roberta", "mpnet"])
def test_chunks_share_one_cast_of_the_frozen_weights(family):
    model = control_model(family, torch.float32, dropout=0.0)
    set_memory_mode(model, "lean", chunk_tokens=5)
    (mlp, *_) = (vars(layer)["memory_plan"].mlp for layer in model.modules() if "memory_plan" in vars(layer))
    state = torch.randn(7, mlp.linears[0].in_features)
    assert mlp.for_chunks(state).linears[0] is mlp.linears[0]  # nothing to cast
    with torch.autocast("cpu", torch.bfloat16):
        cast = mlp.for_chunks(state)
        assert cast.linears[0].weight.dtype == torch.bfloat16 and mlp.linears[0].weight.dtype == torch.float32
        assert torch.equal(cast.forward(state, 0)[0], mlp.forward(state, 0)[0])
        assert torch.equal(cast.backward(state, (), state), mlp.backward(state, (), state))


@pytest.mark.parametrize("family", ["vit", "timm-vit", "mpnet"])
def test_plain_restores_everything_and_inference_is_untouched(family):
    model = control_model(family, torch.float32).eval()
    inputs, keys = FAMILIES[family].inputs(), list(model.state_dict())
    with torch.no_grad():
        before = logits(model, inputs)
        for mode in MODES[1:]:
            set_memory_mode(model, mode)
            assert list(model.state_dict()) == keys
            assert torch.equal(logits(model, inputs), before)
    set_memory_mode(model, "plain")
    assert not any("forward" in vars(module) or "memory_plan" in vars(module) for module in model.modules())


def test_attentions_are_still_there():
    model = set_memory_mode(control_model("mpnet"), "balanced")
    outputs = model(**FAMILIES["mpnet"].inputs(), output_attentions=True)
    assert len(outputs.attentions) == 2 and all(a.shape[-1] == 9 for a in outputs.attentions)


def _kept_bytes(model, family, mode, chunk_tokens=None):
    """Bytes that the forward leaves for the backward, each storage once, parameters aside."""
    set_memory_mode(model, mode, chunk_tokens=chunk_tokens)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = logits(model, FAMILIES[family].inputs(torch.float32)).square().sum()
    loss.backward()
    return sum(storages.values())


@pytest.mark.parametrize("family", ["vit", "timm-vit", "roberta"])
def test_each_mode_keeps_less_than_the_one_before(family):
    model = control_model(family, torch.float32, dropout=0.0, control_blocks=["mlp"])
    kept = [_kept_bytes(model, family, mode) for mode in MODES]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept


def test_what_cannot_be_done_says_so():
    images = TimmImages()
    images.set_grad_checkpointing()
    model = get_peft_model(images, ControlConfig())
    with pytest.raises(ValueError, match="replaces gradient checkpointing"):
        set_memory_mode(model, "lean")
    trained = control_model("roberta")
    trained.get_submodule("base_model.model.roberta.encoder.layer.1.output.LayerNorm").requires_grad_(True)
    with pytest.raises(ValueError, match="frozen MLP"):
        set_memory_mode(trained, "fast")
    assert not any("memory_plan" in vars(module) for module in trained.modules())
    normed = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, scale_mlp_norm=True)
    with pytest.raises(ValueError, match="without an inner norm"):
        set_memory_mode(get_peft_model(normed, ControlConfig()), "fast")


@pytest.mark.parametrize("kind", [{"mlp_layer": SwiGLU}, {"mlp_layer": GluMlp}, {"norm_layer": RmsNorm}])
def test_timm_blocks_that_only_look_like_those_known_are_refused(kind):
    block = Block(32, 4, **kind)
    with pytest.raises(ValueError, match="memory modes know timm's"):
        halves(block.requires_grad_(False))
