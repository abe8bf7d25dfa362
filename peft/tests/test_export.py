"""``python -m peft_control export``: one folder that needs neither peft nor peft_control computes what the adapter computes."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, MODELS, build, logits, randomize_adapters, skip_before, word_tokenizer

from peft_control import ControlConfig
from peft_control.export import export

KINDS = {  # peft's task, and transformers' class
    "decoder": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "encoder": ("SEQ_CLS", transformers.AutoModelForSequenceClassification),
    "vision": (None, transformers.AutoModelForImageClassification),
    "seq2seq": ("SEQ_2_SEQ_LM", transformers.AutoModelForSeq2SeqLM),
}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}


def adapter(folder, family="llama", dtype=torch.float32, config=None, tokens=None, **fields) -> PeftModel:
    """Save a tiny base and an adapter of it below ``folder``; return the adapted model in eval mode. ``tokens``: how many the
    base has from then on."""
    build(family, dtype, **config or {}).save_pretrained(folder / "base")
    base = type(build(family)).from_pretrained(folder / "base")
    if tokens:
        base.resize_token_embeddings(tokens, mean_resizing=False)
    kind = MODELS[family].kind
    heads = {"modules_to_save": ["classifier"]} if kind == "vision" else {}
    task = KINDS[kind][0] if kind in KINDS else None
    fields = {"task_type": task, "control_rank": 3, "control_alpha": 0.7, **heads, **fields}
    model = randomize_adapters(get_peft_model(base, ControlConfig(**fields))).eval()
    model.save_pretrained(folder / "adapter")
    return model


def reload(folder, family="llama"):
    return KINDS[MODELS[family].kind][1].from_pretrained(folder / "out", trust_remote_code=True).eval()


def exported(folder, family="llama", **fields):
    """An adapted model, and what its exported folder is read as."""
    model = adapter(folder, family, **fields)
    export(str(folder / "adapter"), folder / "out")
    return model, reload(folder, family)


def assert_same(model, exported, family, atol=0.0):
    with torch.no_grad():
        expected, found = (logits(m, MODELS[family].inputs()) for m in (model, exported))
        assert torch.allclose(found, expected, rtol=0, atol=atol)
        with model.disable_adapter():
            assert not torch.allclose(found, logits(model, MODELS[family].inputs()), atol=1e-3)


@pytest.mark.parametrize("family", [*sorted({*FAMILIES} - {"timm-vit"}), "granite", "llama4", "lfm2", "falcon_h1", "t5"])
def test_every_family(family, tmp_path):
    if family == "lfm2":
        skip_before("transformers", "5.23", "does not read its configuration back")
    bias = MODELS[family].kind == "vision"
    model, again = exported(tmp_path, family, control_blocks=["attention", "mlp"], control_bias=bias)
    assert_same(model, again, family)
    assert type(again).__name__ == f"Control{type(model.base_model.model).__name__}"
    again.save_pretrained(tmp_path / "again" / "out")
    assert_same(model, reload(tmp_path / "again", family), family)


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("gpt2", "AutoModelForCausalLM"),
        ("marian", "AutoModelForSeq2SeqLM"),
        ("whisper", "AutoModelForSpeechSeq2Seq"),
        ("qwen2_5_vl", "AutoModelForImageTextToText"),
        ("dinov3_vit", "AutoModel"),  # which has a model within, of another signature
    ],
)
def test_an_adapter_without_a_task_is_loaded_by_its_models_auto_class(family, auto, tmp_path):
    model = adapter(tmp_path, family, task_type=None, modules_to_save=None)
    export(str(tmp_path / "adapter"), tmp_path / "out")
    assert f"import {auto}\n" in (tmp_path / "out" / "README.md").read_text()
    assert_same(model, getattr(transformers, auto).from_pretrained(tmp_path / "out", trust_remote_code=True).eval(), family)


def test_a_task_of_text_over_images(tmp_path):
    """TRL's examples of vision and language have peft's task CAUSAL_LM."""
    model = adapter(tmp_path, "qwen2_5_vl", task_type="CAUSAL_LM")
    export(str(tmp_path / "adapter"), tmp_path / "out")
    auto = transformers.AutoModelForImageTextToText
    assert_same(model, auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval(), "qwen2_5_vl")


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_part_on_weights_is_merged(family, use_dora, tmp_path):
    patterns = {"control_rank_pattern": {"0.mlp": 2}, "control_alpha_pattern": {"1.mlp": -1.0}}
    both = exported(tmp_path, family, target_modules=TARGETS[family], r=4, use_dora=use_dora, **patterns)
    assert_same(*both, family, atol=1e-4)
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "fields",
    [
        {"trainable_token_indices": [4, 5]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_what_an_adapter_makes_of_tied_embeddings(fields, family, tmp_path):
    """T5's embeddings are always tied."""
    config = {} if family == "t5" else {"tie_word_embeddings": True}
    model = adapter(tmp_path, family, config=config, **fields)
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name or "tokens_delta" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "out")
    assert_same(model, reload(tmp_path, family), family, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("t5", {"target_modules": ["shared"]}),  # which then is one module with those of encoder and decoder
        ("t5", {"trainable_token_indices": [4, 65]}),
    ],
)
def test_tokens_that_were_added_to_the_base(family, fields, tmp_path):
    assert_same(*exported(tmp_path, family, tokens=70, **fields), family, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_and_without_cache(dtype, tmp_path):
    model, again = exported(tmp_path, dtype=dtype, control_blocks=["attention", "mlp"])
    inputs = {name: value.flip(1) for name, value in FAMILIES["llama"].inputs().items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert again.dtype == dtype
    assert torch.equal(again.generate(**inputs, **options), expected)
    if dtype == torch.float32:
        assert torch.equal(again.generate(**inputs, **options, use_cache=False), expected)


def test_a_model_that_accelerate_has_offloaded(tmp_path):
    model, again = exported(tmp_path, control_bias=True)
    assert_same(model, cpu_offload(again, torch.device("cpu")), "llama")


def test_trained_head_names_of_classes_and_backbone(tmp_path):
    model = adapter(tmp_path, "bert")
    model.base_model.classifier.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    names = {"id2label": {"0": "bad", "1": "good"}}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(names))
    export(str(tmp_path / "adapter"), tmp_path / "out")
    again = reload(tmp_path, "bert")
    assert_same(model, again, "bert")
    assert again.config.id2label == {0: "bad", 1: "good"}
    backbone = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    hidden, expected = (m(**FAMILIES["bert"].inputs())[0] for m in (backbone, model.base_model.bert))
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_head_with_other_classes_than_the_base_has(family, tmp_path):
    """LLaMA's classifier makes its backbone by AutoModel; BERT's base here has two classes."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    build(family).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    model = randomize_adapters(get_peft_model(base, ControlConfig(task_type="SEQ_CLS"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "out")
    assert_same(model, load(tmp_path / "out", trust_remote_code=True).eval(), family)


def test_the_folder_needs_neither_package_and_says_what_it_is(tmp_path):
    exported(tmp_path)
    tree = ast.parse((tmp_path / "out" / "modeling_control.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"threading", "torch", "transformers"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "mlp" in card and "adapter" in card
    with pytest.raises(ValueError, match="trust_remote_code"):  # never the base model alone
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_command_line(tmp_path, call):
    adapter(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "base").rename(tmp_path / "moved")
    words = (tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "moved", "--dtype", "float32")
    out = call("peft_control.__main__", "export", *words).finished().out
    assert out.startswith(f"{tmp_path / 'out'}: ControlLlamaForCausalLM")
    assert reload(tmp_path).dtype == torch.float32


def spoil(value):
    """Put a value, or nothing, in the place of a control's B."""

    def change(folder):
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        key = next(key for key in weights if "control_B" in key)
        lost = weights.pop(key)
        spoiled = {} if value is None else {key: torch.full_like(lost, value)}
        save_file({**weights, **spoiled}, folder / "adapter" / "adapter_model.safetensors")

    return change


def rewrite(file, **fields):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def replace_by_lora(folder):
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_by_lora, "is a LORA adapter: peft's merge_and_unload exports it"),
        (spoil(float("nan")), "not finite, in"),
        (spoil(None), "lacks 1 tensors"),
        (rewrite("adapter/adapter_config.json", base_model_name_or_path=None), "pass --base FOLDER"),
        (
            rewrite("adapter/adapter_config.json", task_type=None, auto_mapping={"parent_library": "timm.models"}),
            "only models of transformers can be exported",
        ),
        (rewrite("base/config.json", quantization_config={"load_in_4bit": True}), "is quantized"),
        (lambda folder: (folder / "adapter" / "adapter_model.safetensors").unlink(), "has no adapter_model"),
        (lambda folder: (folder / "adapter" / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda folder: (folder / "base").rename(folder / "gone"), "base"),
        (lambda folder: (folder / "out").write_text("mine"), "out exists already"),
    ],
)
def test_what_cannot_be_exported_is_one_line(change, message, tmp_path, call):
    adapter(tmp_path)
    change(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert message in call("peft_control.__main__", "export", tmp_path / "adapter", tmp_path / "out").refused()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line(tmp_path, call, small_disk):
    adapter(tmp_path)
    disk = small_disk("16k")
    assert "No space left" in call("peft_control.__main__", "export", tmp_path / "adapter", disk / "out").refused()
    assert not any(disk.iterdir())


@pytest.mark.slow
def test_transformers_serve_answers_over_http(tmp_path):
    """A real server with the exported folder; its greedy text is the adapter's."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn and openai")
    model, tokenizer = adapter(tmp_path, control_blocks=["attention", "mlp"]), word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    export(str(tmp_path / "adapter"), tmp_path / "out")
    prompt = "w5 w9 w11"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    said = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, 3:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = re.search("`transformers (serve .*)`", (tmp_path / "out" / "README.md").read_text())[1].split()
    command = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", command, *serve, "--device", "cpu", "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        piped = dict(stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": ""})
        server = subprocess.Popen([*command, "--port", str(port)], **piped)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        body = {"model": str(tmp_path / "out"), "prompt": prompt, "max_tokens": 6, "temperature": 0}
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), kind)
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        assert answer["choices"][0]["text"].split() == tokenizer.decode(said, skip_special_tokens=True).split()
    finally:
        server.terminate()
        server.wait(30)
