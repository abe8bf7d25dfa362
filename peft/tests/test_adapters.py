"""Adapters as peft users handle them: training, saving, loading, switching, removing, copying."""

import ast
import copy
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, MODELS, assert_equal, build, is_adapter, logits, randomize_adapters
from torch import nn
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM

from peft_control import ARCHITECTURES, ControlConfig
from peft_control.architectures import Architecture, find_layers, propose

METHODS = ("control", "double control", "control+lora", "control+dora")
INPUTS = FAMILIES["llama"].inputs()


def config_of(method: str = "control", **fields) -> ControlConfig:
    return tiny_models.config_of(method, **{"task_type": "CAUSAL_LM", "control_rank": 3, "control_alpha": 0.7, **fields})


def llama(method: str = "control", **fields) -> PeftModel:
    """The tiny LLaMA in eval mode with a random adapter of the method."""
    return randomize_adapters(get_peft_model(build("llama"), config_of(method, **fields)).eval())


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, INPUTS)


def reloaded(folder) -> PeftModel:
    return PeftModel.from_pretrained(build("llama"), folder).eval()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapter(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if is_adapter(name)}


def controls(model: nn.Module) -> dict[str, nn.Module]:
    """The control layers by the names of their blocks, as in "layers.0.mlp"."""
    return {
        name.partition("model.model.model.")[2].removesuffix("_control"): module
        for name, module in model.named_modules()
        if name.endswith("_control")
    }


def without_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


# -- what trains, and what stays as it was ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "roberta", "timm-vit"])
def test_the_adapter_alone_trains_and_the_base_keeps_its_names_and_values(family, method):
    targets = {"llama": tiny_models.QKV, "roberta": ["query", "value"], "timm-vit": ["qkv"]}[family]
    base = build(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = randomize_adapters(get_peft_model(base, tiny_models.config_of(method, targets)).eval())
    names = trained(model)
    assert names == adapter(model) and any("mlp_control" in name for name in names)
    assert any("attention_control" in name for name in names) == (method == "double control")
    assert any("lora_" in name for name in names) == ("+" in method)
    initial = {name: model.get_parameter(name).detach().clone() for name in names}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    logits(model, FAMILIES[family].inputs()).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(model.get_parameter(name), value) for name, value in initial.items())
    # upstream's LoRA layer keeps the linear it wraps as `base_layer`
    after = {name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if not is_adapter(name)}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# -- saving and loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_reload_is_exact(method, tmp_path, base_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config_of(method)).eval()
    expected = outputs(randomize_adapters(model))
    assert not torch.allclose(expected, outputs(AutoModelForCausalLM.from_pretrained(base_folder)))
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONTROL"

    def fresh():
        return AutoModelForCausalLM.from_pretrained(base_folder)

    def injected():
        base = fresh()
        base.load_adapter(str(tmp_path))
        return base

    def second():
        other = get_peft_model(fresh(), config_of("double control"))
        other.load_adapter(str(tmp_path), adapter_name="saved")
        other.set_adapter("saved")
        return other

    trainable = PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True)
    assert trained(trainable) == adapter(trainable)
    ways = {
        "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(fresh(), tmp_path),
        "low_cpu_mem_usage": lambda: PeftModel.from_pretrained(fresh(), tmp_path, low_cpu_mem_usage=True),
        "is_trainable": lambda: trainable,
        "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        "PreTrainedModel.load_adapter": injected,
        "PeftModel.load_adapter": second,
    }
    for name, load in ways.items():
        assert torch.equal(outputs(load().eval()), expected), name


def test_the_card_says_what_the_adapter_is_and_how_to_load_it(tmp_path, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, config_of("control+dora", control_rank_pattern={"0.mlp": 2}))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for text in (
        f"base_model: {base_folder}",
        "parallel-control",
        f"| base model | `{base_folder}` |",
        "| controlled blocks | mlp |",
        "| rank, alpha | 3, 0.7; but for {'0.mlp': 2} |",
        "| part on the weights | DoRA of rank 4, alpha 8, on k_proj, q_proj, v_proj |",
        "pip install ./peft",
        "AutoPeftModelForCausalLM.from_pretrained",
    ):
        assert text in card, text
    assert "More Information Needed" not in card and card.count("PEFT") == 0
    snippet = card.split("```python\n")[1].split("```")[0].replace("this folder", str(tmp_path))
    exec(snippet, names := {})
    assert torch.equal(outputs(names["model"].eval()), outputs(model.eval()))

    # what people wrote on it stays
    model, card = llama(), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    card.write_text(card.read_text().replace("# Parallel Control adapter", "# Mine") + "\n## Results\n\n87.1\n")
    model.peft_config["default"].control_alpha = 0.9  # as if trained anew into the same folder
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert "# Mine" in text and "87.1" in text and text.count("controlled blocks") == 1
    assert "| rank, alpha | 3, 0.9 |" in text
    card.write_text("# Only mine\n")
    model.save_pretrained(tmp_path)
    assert card.read_text().count("controlled blocks") == 1 and "# Only mine" in card.read_text()


# -- several adapters ---------------------------------------------------------------------------------------


def test_set_disable_delete_unload():
    base = build("llama")
    plain, names = outputs(base), list(base.state_dict())
    model = get_peft_model(base, config_of(init_weights=False), adapter_name="one")
    model.add_adapter("two", config_of("double control", control_rank=5, init_weights=False))
    one = outputs(model.eval())
    model.set_adapter("two")
    two = outputs(model)
    assert {n.split(".")[-2] for n in trained(model)} == {"two"} and not torch.allclose(one, two)
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    assert torch.equal(outputs(model), two)
    model.set_adapter("one")
    assert torch.equal(outputs(model), one)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(outputs(model), two) and not any(".one." in name for name in model.state_dict())
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded), plain)
    assert list(unloaded.state_dict()) == names and without_hooks(unloaded)
    assert torch.equal(outputs(get_peft_model(unloaded, config_of()).eval()), plain)


@pytest.mark.parametrize("left", [("two",), ("two", "three")])
def test_one_adapter_takes_the_place_of_a_deleted_one(left):
    """Of layers that have different ones."""
    blocks = {"one": ["mlp"], "two": ["attention"], "three": ["mlp"]}
    model = get_peft_model(build("llama"), config_of(), adapter_name="one").eval()
    for name in left:
        model.add_adapter(name, config_of(control_blocks=blocks[name], init_weights=False))
    model.set_adapter("two")
    expected = outputs(model)
    model.set_adapter("one")
    model.delete_adapter("one")
    assert model.active_adapters == ["two"] and torch.equal(outputs(model), expected)
    assert {name.split(".")[-2] for name in trained(model)} == {"two"}


@pytest.mark.parametrize("method", ["control", "control+lora"])
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_weighted_adapters(method, kind, tmp_path):
    """The sum of two weighted controls: exact with "cat", and with "svd" of full rank; "linear" with one adapter."""
    fields = {"init_weights": False, "init_lora_weights": False, "control_bias": True}
    if "lora" in method:
        fields["target_modules"] = ["q_proj"]
    model = get_peft_model(build("llama"), config_of(method, **fields), adapter_name="one")
    model.add_adapter("two", config_of(method, control_blocks=["attention", "mlp"], control_alpha=1.3, **fields))
    model.add_adapter("long", config_of(method, control_rank=5, **fields))
    randomize_adapters(model.eval())
    names, weights = (["two"], [0.25]) if kind == "linear" else (["one", "two"], [0.5, -0.7])
    model.add_weighted_adapter(names, weights, "sum", kind, **({"svd_rank": 32} if kind == "svd" else {}))
    model.set_adapter("sum")
    found = outputs(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(outputs(reloaded(tmp_path / "sum")), found)
    for name, weight in zip(names, weights):
        for module in model.modules():
            if name in getattr(module, "alpha", ()):
                module.alpha[name] *= weight
            if name in getattr(module, "lora_B", ()):
                module.lora_B[name].weight.data.mul_(weight)
    model.base_model.set_adapter(names)
    torch.testing.assert_close(outputs(model), found, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="equal ranks"):
        model.add_weighted_adapter(["one", "long"], [1.0, 1.0], "other", "linear")
    assert "other" not in model.peft_config


# -- options ------------------------------------------------------------------------------------------------


def test_a_saved_norm_that_a_control_reads(tmp_path):
    """modules_to_save puts a wrapper where the hook sat; the control must read there all the same."""

    def scaled():
        base = build("llama")
        for layer in base.model.layers:
            layer.post_attention_layernorm.weight.data.mul_(1.5)
        return base

    model = llama(modules_to_save=["post_attention_layernorm"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    expected = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(build("llama")))
    assert torch.equal(outputs(randomize_adapters(get_peft_model(scaled(), config_of()).eval())), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reloaded(tmp_path)), expected)
    unloaded = model.unload()  # which keeps the trained norm: that is upstream's rule for modules_to_save
    assert without_hooks(unloaded) and torch.equal(outputs(unloaded), outputs(scaled()))


def test_rank_and_alpha_patterns(tmp_path):
    config = config_of(
        "double control",
        control_rank_pattern={"layers.0.mlp": 5, r".*\.attention": 2},
        control_alpha_pattern={"1.attention": 0.0},
    )
    model = get_peft_model(build("llama"), config)
    assert {name: (control.rank["default"], control.alpha["default"]) for name, control in controls(model).items()} == {
        "layers.0.attention": (2, 0.7),
        "layers.0.mlp": (5, 0.7),
        "layers.1.attention": (2, 0.0),
        "layers.1.mlp": (3, 0.7),
    }
    expected = outputs(randomize_adapters(model.eval()))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reloaded(tmp_path)), expected)


@pytest.mark.parametrize(
    ("family", "fields", "controlled"),
    [
        ("llama", {"layers_to_transform": [1]}, ["layers.1"]),
        ("llama", {"layers_to_transform": 0}, ["layers.0"]),
        ("llama", {"exclude_modules": ["layers.0"]}, ["layers.1"]),
        ("llama", {"exclude_modules": r".*layers\.1"}, ["layers.0"]),
        ("llama", {"modules_to_save": ["layers.0"]}, ["layers.1"]),
        ("qwen2_5_vl", {}, [f"{part}.{n}" for part in ("visual.blocks", "language_model.layers") for n in (0, 1)]),
        ("qwen2_5_vl", {"layers_pattern": "language_model.layers"}, ["language_model.layers.0", "language_model.layers.1"]),
        ("qwen2_5_vl", {"layers_pattern": ["blocks"], "layers_to_transform": [1]}, ["visual.blocks.1"]),
    ],
)
def test_choice_of_layers_and_parts(family, fields, controlled, tmp_path):
    model = get_peft_model(build(family), ControlConfig(target_modules=["qkv", "q_proj"], r=2, **fields))
    for kind in ("mlp_control",) if "exclude_modules" in fields else ("mlp_control", "lora_A"):
        found = [re.search(r"[a-z_.]*(?:layers|blocks)\.\d", n)[0] for n, _ in model.named_modules() if n.endswith(kind)]
        assert [name.removeprefix("base_model.model.model.") for name in found] == controlled
    expected = logits(randomize_adapters(model.eval()), MODELS[family].inputs())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(logits(again, MODELS[family].inputs()), expected)


@pytest.mark.parametrize(
    ("base", "cast", "autocast"), [(torch.bfloat16, True, False), (torch.bfloat16, False, False), (torch.float32, True, True)]
)
def test_half_precision_bases_and_autocast_have_float32_adapters(base, cast, autocast):
    dtype = torch.float32 if cast else torch.bfloat16
    model = get_peft_model(build("llama", base), config_of("control+lora"), autocast_adapter_dtype=cast)
    parameters = [p for n, p in randomize_adapters(model.eval()).named_parameters() if is_adapter(n)]
    assert {p.dtype for p in parameters} == {dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**INPUTS, labels=INPUTS["input_ids"])
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in parameters)
    exact = outputs(llama("control+lora"))
    assert (output.logits.float() - exact).norm() < 0.05 * exact.norm()


def test_a_base_stored_in_fp8_rounds_no_adapter(tmp_path):
    """transformers' load_adapter reads an adapter into parameters of the type of the layer's."""
    llama().save_pretrained(tmp_path)
    base = build("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.to(torch.float8_e4m3fn)
    base.load_adapter(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert_equal(base.get_adapter_state_dict(), {name.removeprefix("base_model.model."): x for name, x in saved.items()})


# -- what cannot be done ------------------------------------------------------------------------------------


def test_what_a_control_cannot_do():
    alone = llama()
    for merge in (alone.merge_and_unload, alone.merge_adapter):
        with pytest.raises(ValueError, match=r"cannot be merged into its weights; keep the adapter loaded"):
            merge()
    model = llama("control+lora")
    with pytest.raises(ValueError, match="controls are combined by cat, linear, svd"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "ties")
    with pytest.raises(ValueError, match=r"there are \['default'\]"):
        model.add_weighted_adapter(["nobody"], [1.0], "sum")
    for fields in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}):
        with pytest.raises(ValueError, match="or trainable_token_indices cannot be combined"):
            llama(**fields).add_weighted_adapter(["default"], [1.0], "sum", "cat")
    assert torch.equal(outputs(model), outputs(llama("control+lora")))  # nothing was left half-done


def test_weights_that_accelerate_has_offloaded(base_folder, tmp_path):
    """Its hooks fetch them for modules that are called; to layers that lie elsewhere already no control can be added."""
    model = llama("control+lora", control_bias=True)
    expected = outputs(model)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model), expected)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "lm_head"), "cpu")
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path
    )
    with pytest.raises(ValueError, match="accelerate has offloaded weights"):
        get_peft_model(base, config_of())


def test_forwards_that_a_control_cannot_follow_are_errors():
    model = llama()
    layer = model.base_model.model.model.layers[0]
    with patch.object(layer.mlp, "forward", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        outputs(model)  # which leaves no state behind
    layer.forward = lambda hidden_states, **kwargs: hidden_states + layer.mlp(hidden_states)
    with pytest.raises(RuntimeError, match=r"wrote to 'mlp' without calling 'post_attention_layernorm'"):
        outputs(model)
    albert = build("albert")
    albert.albert.encoder.albert_layer_groups[0].albert_layers[0].chunk_size_feed_forward = 3
    with pytest.raises(RuntimeError, match="works on a part of the state"):
        logits(get_peft_model(albert, ControlConfig()), MODELS["albert"].inputs())
    said = pytest.raises(RuntimeError, match=r"for something else too, which the row must say \('shared': true")
    for shared, ends in (({}, said), ({"shared": True}, nullcontext())):
        block = {"read": "layernorm_after", "write": "dropout", **shared}
        row = {"layer": "SwinLayer", "norm": "layernorm_after", "blocks": {"mlp": block}}
        swin = get_peft_model(build("swin"), ControlConfig(control_architecture=row))
        with ends:
            logits(swin, MODELS["swin"].inputs())


# -- copies -------------------------------------------------------------------------------------------------


def test_threads_share_a_model():
    model = llama("double control")
    batches = [torch.randint(0, 32, (1, length)) for length in (5, 9, 17, 33)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in batches]

    def answer(number):
        with torch.no_grad():
            return number % 4, model(batches[number % 4]).logits

    with ThreadPoolExecutor(4) as pool:
        for number, found in pool.map(answer, range(80)):
            torch.testing.assert_close(found, expected[number])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(method, duplicate):
    model = llama(method)
    expected = outputs(model)
    twin = duplicate(model)
    assert torch.equal(outputs(twin), expected)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0)
    twin(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.allclose(outputs(twin), expected)
    assert torch.equal(outputs(model), expected)
    del model
    base = twin.base_model.unload()  # its own hooks, not the original's
    assert torch.equal(outputs(base), outputs(build("llama"))) and list(base.state_dict()) == list(build("llama").state_dict())


# -- a model of one's own -----------------------------------------------------------------------------------

ROW = {"layer": "OwnLayer", "norm": "norm", "blocks": {"body": {"read": "norm", "write": "body"}}}


class OwnLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return x + self.body(self.norm(x))


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([OwnLayer(), OwnLayer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_own_architecture(tmp_path):
    fields = dict(control_architecture=ROW, control_blocks="body", control_rank=2, control_alpha=3.0)
    model = get_peft_model(OwnModel(), ControlConfig(**fields, init_weights=False))
    x = torch.randn(4, 8)
    expected = x
    for frozen, layer in zip(OwnModel().layers, model.base_model.model.layers, strict=True):
        A = layer.body_control.control_A["default"].weight
        B = layer.body_control.control_B["default"].weight
        expected = frozen(expected) + 3.0 * expected @ A.T @ B.T
    assert torch.allclose(model(x), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(OwnModel(), tmp_path)
    assert again.peft_config["default"].control_architecture == ROW and torch.equal(again(x), model(x))
    other = {**ROW, "blocks": {"body": {"read": "body", "write": "body"}}}
    with pytest.raises(ValueError, match="layers.0 has a control of 'body' by another row"):
        model.add_adapter("other", ControlConfig(**{**fields, "control_architecture": other}))
    assert torch.equal(again(x), model(x))


# -- configuration errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control_blocks": []}, "control_blocks is empty"),
        ({"control_blocks": [3]}, "control_blocks must be"),
        ({"control_rank": 0}, "control_rank must be an integer of at least 1, got 0"),
        ({"control_rank_pattern": {"mlp": 0}}, r"control_rank_pattern\['mlp'\] must be an integer of at least 1"),
        ({"control_rank_pattern": [1]}, "control_rank_pattern must be a dict"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        *[({"control_alpha": value}, "control_alpha must be a finite number") for value in ("1", float("nan"), 10**400)],
        ({"control_dropout": 1.0}, r"control_dropout must lie in \[0, 1\), got 1.0"),
        ({"control_init": "zeros"}, "control_init must be 'kaiming', 'normal' or None"),
        ({"control_architecture": {"layer": "L"}}, "control_architecture must look like"),
        ({"control_architecture": {**ROW, "blocks": {"mlp": {"read": "a"}}}}, "control_architecture must look like"),
        ({"control_architecture": {**ROW, "layer": 3}}, "control_architecture must look like"),
        ({"layers_pattern": "("}, r"layers_pattern: '\(' is no regular expression"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        ControlConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control_blocks": ["conv"]}, "llama has no block 'conv': choose from attention, mlp"),
        ({"layers_to_transform": [0, 9]}, r"layers_to_transform names layers that do not exist: \[9\]"),
        ({"layers_to_transform": []}, "layers_to_transform is empty"),
        ({"control_rank_pattern": {"mpl": 2}}, "control_rank_pattern .mpl. matches no block"),
        ({"target_modules": ["q_porj"]}, r"target_modules \{'q_porj'\} not found in LlamaForCausalLM"),
        ({"exclude_modules": ".*layers.*"}, "exclude_modules and modules_to_save leave no layer to control"),
        ({"layers_pattern": "blocks"}, "layers_pattern 'blocks' leaves none of model.layers.0, model.layers.1"),
        ({"control_architecture": ROW}, r"LlamaForCausalLM has no layer of class 'OwnLayer'"),
        (
            {"control_architecture": {**ROW, "layer": "LlamaDecoderLayer"}, "control_blocks": "body"},
            "LlamaDecoderLayer has no module 'norm'",
        ),
    ],
)
def test_configurations_that_do_not_fit_the_model(fields, message):
    base, model = build("llama"), llama()
    names, expected = list(base.state_dict()), outputs(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ControlConfig(**fields))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", ControlConfig(**fields))
    assert list(base.state_dict()) == names and torch.equal(outputs(model), expected)


def test_an_unknown_architecture_says_where_the_known_ones_are():
    with pytest.raises(ValueError, match="OwnModel has no layer that Control knows") as error:
        get_peft_model(OwnModel(), ControlConfig())
    said = str(error.value)
    assert f"`python -m peft_control architectures` lists {len(ARCHITECTURES)}" in said and "control_architecture" in said
    assert "layers: 2 × OwnLayer (norm, body); no known pattern fits" in said


def test_an_unknown_model_is_proposed_a_row_ready_to_paste():
    config = {**build("llama").config.to_dict(), "model_type": "arcee", "architectures": ["ArceeForCausalLM"]}
    base = ArceeForCausalLM(ArceeConfig(**config))
    with pytest.raises(ValueError, match="ArceeDecoderLayer .*candidate row, untested") as error:
        get_peft_model(base, ControlConfig())
    row = ast.literal_eval(str(error.value).split("untested: ")[1])
    model = get_peft_model(base, ControlConfig(control_architecture=row, init_weights=False))
    assert len(controls(model)) == 2


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "glm4", "olmo2", "granite", "bart", "mbart", "bert", "dinov2", "phi", "t5"]
)
def test_a_proposed_row_is_the_tested_one(family):
    """A class that has no row, with the modules and the forward of one that has."""
    layer, row = list(find_layers(build(family)).values())[-1]
    proposed = propose(layer)
    assert Architecture.from_dict(proposed.as_dict()) == proposed
    assert {name: block.of(layer) for name, block in proposed.blocks.items()} == {
        name: block.of(layer) for name, block in row.blocks.items()
    }
