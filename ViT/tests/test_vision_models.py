"""Base models, adapters on them, and the weights that do not fit."""

import copy

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from control_experiments.errors import UserError
from control_experiments.training.methods import count_parameters
from ViT.classifier import add_adapter
from ViT.finetune import RecipeOptions
from ViT.vision_models import create, load, set_attention, set_mlp_layers

ARCHITECTURE = "test_vit"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**arguments):
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, **{"img_size": 32, "num_classes": 3, **arguments}).eval()


@pytest.mark.parametrize(("method", "trained"), [("control", 381_220), ("lora", 316_516), ("dora", 436_324), ("probe", 76_900)])
def test_published_parameter_counts(method, trained):
    with torch.device("meta"):
        vit = create("vit_base_patch16_224", num_classes=100, image_size=224)
        set_mlp_layers(vit, 4)
        counts = count_parameters(add_adapter(vit, RecipeOptions(method=method, mlp_layers=4)))
    assert (counts["trainable_parameters"], counts["head_parameters"]) == (trained, 76_900)


def adapted(vit, method, **options):
    return add_adapter(copy.deepcopy(vit), RecipeOptions(method=method, **options))


@pytest.mark.parametrize(
    ("architecture", "targets"), [(ARCHITECTURE, ["qkv", "proj", "fc1", "fc2"]), ("vit_small_patch16_224", None)]
)
def test_matched_ranks_train_what_the_control_trains(architecture, targets):
    vit = create(architecture, num_classes=3, image_size=32)
    budget = count_parameters(adapted(vit, "control"))["adapter_parameters"]
    for method in ("lora", "dora", "control+lora"):
        model = adapted(vit, method, lora_rank=0, lora_targets=targets)
        count = count_parameters(model)["adapter_parameters"]
        assert budget - 5 * vit.embed_dim < count <= budget
        layers = [m for m in model.modules() if hasattr(m, "lora_A")]
        assert {scale for layer in layers for scale in layer.scaling.values()} == {2.0}
        assert len(layers) == len(vit.blocks) * (len(targets) if targets else 1 if "control" in method else 2)
    double = count_parameters(adapted(vit, "double control", lora_rank=0))["adapter_parameters"]
    assert abs(double / budget - 1) < 0.05
    miss = adapted(vit, "miss", lora_rank=0, lora_targets=targets)
    assert abs(count_parameters(miss)["adapter_parameters"] / budget - 1) < 0.05
    assert all(m.out_features % m.miss_block["default"].shape[1] == 0 for m in miss.modules() if hasattr(m, "miss_block"))


@pytest.mark.parametrize(
    ("mlp_layers", "targets", "layers"),
    [
        (2, None, {"fc1", "fc2"}),
        (2, ["all"], {"qkv", "proj", "fc1", "fc2"}),
        (2, ["proj", "fc2"], {"proj", "fc2"}),
        (4, None, {"fc1", "fc2", "eye1", "eye2"}),
    ],
)
def test_lora_and_miss_adapt_the_layers_that_were_asked_for(mlp_layers, targets, layers):
    for method, part in (("lora", "lora_A"), ("miss", "miss_block")):
        vit = small()
        set_mlp_layers(vit, mlp_layers)
        model = adapted(vit, method, lora_targets=targets, mlp_layers=mlp_layers)
        assert {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(part)} == layers
        assert not any(p.requires_grad for n, p in model.named_parameters() if "eye" in n and part[:4] not in n)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"lora_targets": ["fc3"]}, "lora on VisionTransformer"),
        ("miss", {"lora_targets": ["fc3"], "lora_rank": 0}, "miss on VisionTransformer"),
        ("dora", {"control_rank": 1, "lora_rank": 0}, "larger --control_rank"),
    ],
)
def test_adapters_that_cannot_be(method, options, message):
    with pytest.raises(UserError, match=message):
        adapted(small(), method, **options)


def test_four_layer_mlp_and_eager_attention_are_the_same_function():
    plain, deep = small(), small()
    set_mlp_layers(deep, 4)
    set_attention(deep, "eager")
    assert not any(block.attn.fused_attn for block in deep.blocks)
    torch.testing.assert_close(deep(IMAGES), plain(IMAGES))


def test_position_embeddings_are_resampled_and_the_head_is_new(tmp_path):
    path = tmp_path / "model.safetensors"
    source = small(img_size=96)
    save_file(source.state_dict(), path)
    model, base = load(str(path), ARCHITECTURE, num_classes=3, image_size=32)
    assert base.architecture == ARCHITECTURE and len(base.sha256) == 64
    old, new = source.pos_embed, model.pos_embed
    assert new.shape[1] == 5 and old.shape[1] == 37
    torch.testing.assert_close(new[:, 0], old[:, 0])  # the class token's is not a place
    torch.testing.assert_close(new[:, 1:].mean(), old[:, 1:].mean(), atol=5e-3, rtol=0)
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert not torch.equal(model.head.weight, source.head.weight) and model.head.bias.eq(0).all()


def original_npz(model, path):
    """The layout of the original JAX checkpoints (google-research/vision_transformer)."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    arrays = {
        "embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.patch_embed.proj.bias,
        "cls": model.cls_token,
        "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "Transformer/encoder_norm/scale": model.norm.weight,
        "Transformer/encoder_norm/bias": model.norm.bias,
    }
    for index, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{index}"
        attention = f"{at}/MultiHeadDotProductAttention_1"
        for name, qkv in zip(("query", "key", "value"), range(3)):
            weight, bias = (tensor.chunk(3)[qkv] for tensor in (block.attn.qkv.weight, block.attn.qkv.bias))
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = block.attn.proj.bias
        for name, layer in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            arrays |= {f"{at}/MlpBlock_3/{name}/kernel": layer.weight.T, f"{at}/MlpBlock_3/{name}/bias": layer.bias}
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            arrays |= {f"{at}/{name}/scale": norm.weight, f"{at}/{name}/bias": norm.bias}
    np.savez(path, **{name: tensor.detach().numpy() for name, tensor in arrays.items()})


def test_original_npz(tmp_path):
    source, path = small(), tmp_path / "ViT-test.npz"
    original_npz(source, path)
    model, _ = load(str(path), ARCHITECTURE, num_classes=3, image_size=32)
    torch.testing.assert_close(model.eval().forward_features(IMAGES), source.forward_features(IMAGES))
    with pytest.raises(UserError, match=r"another architecture .*6 layers, not 12"):
        load(str(path), "vit_tiny_patch16_224", num_classes=3, image_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"norm.weight": torch.zeros(32)}), "size mismatch for norm.weight"),
        (lambda state: state.pop("blocks.5.norm2.bias"), "Missing .*blocks.5.norm2.bias"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "Unexpected .*extra"),
    ],
)
def test_weights_of_another_architecture(tmp_path, change, message):
    state, path = small().state_dict(), tmp_path / "model.safetensors"
    change(state)
    save_file(state, path)
    with pytest.raises(UserError, match=f"another architecture than test_vit: .*{message}"):
        load(str(path), ARCHITECTURE, num_classes=3, image_size=32)
