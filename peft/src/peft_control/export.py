"""``python -m peft_control export ADAPTER OUT``: base and adapter as one model for serving.

The folder OUT holds weights, configuration, tokenizer or image processor, a card and one modeling file that needs
neither peft nor this package. A control cannot be merged into weights; it stays a low-rank path beside its block.
LoRA and DoRA parts are merged.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import PeftType, load_peft_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from transformers.models.auto import modeling_auto

from .command_line import parse_export, refuse
from .config import ControlConfig
from .control_layer import ControlLayer
from .model_card import AUTO_CLASSES, PAPER

MODELING = "modeling_control"
HEAD = "# -- with its head"  # what follows in the modeling file is for models with a task's head
TABLES = {  # by auto class, of models whose names do not end with its task
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def export(adapter: str, out: str | Path, base: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """Write the adapter's model into the new folder ``out`` and return it, on the meta device.

    Args:
        adapter: folder or hub id of a control adapter.
        out: folder to write; it must not exist, or be empty. It appears whole or not at all.
        base: folder or hub id of the base model; default: the one that the adapter names.
        dtype: of the weights, "float32" for example; "auto" is the base's. In half precision merging LoRA rounds.

    Raises:
        ValueError, OSError: what is wrong with the adapter, the base or ``out``, in one line.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose a new folder")
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, ControlConfig):
        method = PeftType(config.peft_type).value
        raise ValueError(f"{adapter} is a {method} adapter: peft's merge_and_unload exports it")
    model, auto = _load(adapter, config, base, dtype)
    controls, weights = _take_apart(model)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        exported = _write(partial, model.get_base_model(), auto, controls, weights)
        _copy_processor(partial, adapter, str(base or config.base_model_name_or_path))
        (partial / "README.md").write_text(_card(exported, auto, config, adapter), encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _load(adapter: str, config: ControlConfig, base: str | None, dtype: str) -> tuple[PeftModel, str]:
    """The adapted model and the name of the auto class that will load it."""
    place = base or config.base_model_name_or_path
    cls, auto = _base_class(config)
    if not place:
        raise ValueError(f"{adapter} does not name its base model: pass --base FOLDER")
    if os.path.isdir(adapter) and not os.path.exists(os.path.join(adapter, "adapter_model.safetensors")):
        raise ValueError(f"{adapter} has no adapter_model.safetensors")
    base_config = AutoConfig.from_pretrained(place)
    if config.task_type and base_config.architectures and type(base_config) not in cls._model_mapping:
        cls, auto = _named("transformers", base_config.architectures[0])  # peft's tasks know nothing of images
    if getattr(base_config, "quantization_config", None):
        raise ValueError(f"{place} is quantized, and export needs its weights: pass --base FOLDER of the original")
    saved = load_peft_weights(adapter, device="cpu")
    if broken := [name for name, tensor in saved.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{adapter} holds numbers that are not finite, in {broken[0]}")
    heads = [tensor for name, tensor in saved.items() if re.search(r"\.(classifier|score|head)\b.*weight$", name)]
    labels = _labels(adapter) or ({"num_labels": heads[-1].shape[0]} if heads and "Classification" in auto else {})
    if labels.get("num_labels") == base_config.num_labels:
        labels = {}  # the base has names for them
    loaded = cls.from_pretrained(place, dtype=dtype, ignore_mismatched_sizes=True, **labels)
    for name, module in loaded.named_modules():
        keys = [f"base_model.model.{name}.{part}weight" for part in ("", "base_layer.", "token_adapter.base_layer.")]
        found = next((saved[key] for key in keys if key in saved), None)
        if isinstance(module, torch.nn.Embedding) and found is not None and len(found) != module.num_embeddings:
            loaded.resize_token_embeddings(len(found), mean_resizing=False)  # tokens were added before the adapter was trained
            break
    model = PeftModel.from_pretrained(loaded, adapter).eval()
    if missing := sorted(get_peft_model_state_dict(model).keys() - saved.keys()):
        raise ValueError(f"{adapter} lacks {len(missing)} tensors, for example {missing[0]}")
    return model, auto


def _base_class(config: ControlConfig) -> tuple[Any, str]:
    if config.task_type:
        auto = f"Auto{AUTO_CLASSES[config.task_type]}".replace("AutoModelForFeatureExtraction", "AutoModel")
        return getattr(transformers, auto), auto
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library", "?"), mapping.get("base_model_class", "?")
    if not library.startswith("transformers."):  # nothing else is imported because an adapter says so
        raise ValueError(
            f"the adapter's base is {library}.{name}: only models of transformers can be exported; serve it as it was "
            "trained, with PeftModel.from_pretrained"
        )
    return _named(library, name)


def _named(library: str, name: str) -> tuple[Any, str]:
    task = re.search(r"For\w+$", name)
    auto = next((auto for auto, models in TABLES.items() if name in models.values()), f"AutoModel{task[0] if task else ''}")
    return getattr(importlib.import_module(library), name), auto


def _labels(adapter: str) -> dict:
    """The names of the classes, where whoever trained the adapter put a config.json beside it."""
    try:
        names = json.loads(Path(adapter, "config.json").read_text(encoding="utf-8"))["id2label"]
    except (OSError, KeyError):
        return {}
    id2label = {int(index): label for index, label in names.items()}
    return {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}


def _take_apart(model: PeftModel) -> tuple[dict, dict[str, torch.Tensor]]:
    """Merge LoRA, DoRA and trained tokens, unload the rest; return where the controls are, and their weights by name."""
    base: Any = model.get_base_model()
    prefix = f"{base.base_model_prefix}." if hasattr(base, base.base_model_prefix) else ""
    controls, weights = {}, {}
    for name, module in base.named_modules():
        if not isinstance(module, ControlLayer):
            continue
        adapter = module.active_adapters[0]
        A, B = module.control_A[adapter], module.control_B[adapter]
        layer, _, child = name.rpartition(".")
        control = controls.setdefault(child.removesuffix("_control"), {"layers": {}})
        control["layers"][layer.removeprefix(prefix)] = {
            "read": module.block.read,
            "write": module.block.write,
            "shared": module.write_is_shared,
            "width": module.width,
            "rank": module.rank[adapter],
            "alpha": module.alpha[adapter] / module.multiplier,
            "bias": A.bias is not None,
        }
        dtype = module._reference().dtype
        for letter, linear in (("A", A), ("B", B)):
            for key, tensor in linear.state_dict().items():
                weights[f"{name}.{letter}.{key}"] = tensor.to(dtype)
    shared = set()
    for parent in [*base.modules()]:  # the adapter may change one of two that are tied, or that are one module
        for name, module in parent.named_children():
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) in shared:
                twin = copy.copy(module)
                twin._parameters = {**module._parameters, "weight": torch.nn.Parameter(weight.detach().clone())}
                setattr(parent, name, twin)
            shared.add(id(weight))
    for module in base.modules():
        if isinstance(module, (LoraLayer, TrainableTokensLayer)):
            module.merge(safe_merge=True)
    model.unload()
    return controls, weights


def _write(folder: Path, base: Any, auto: str, controls: dict, weights: dict) -> PreTrainedModel:
    backbone = getattr(base, base.base_model_prefix, base)
    if not isinstance(backbone, PreTrainedModel) or auto == "AutoModel":  # a timm model's wrapper; DINOv3
        backbone = base
    classes = {"Config": type(base.config), "Backbone": type(backbone), "Model": type(base)}
    source = Path(__file__).with_name(f"{MODELING}.py").read_text(encoding="utf-8")
    lines = [f"from {cls.__module__} import {cls.__name__} as Base{role}\n" for role, cls in classes.items()]
    source = re.sub(r"(?m)^from transformers\.\S+ import \w+ as BaseConfig\n(from .* as Base\w+\n)*", "".join(lines), source)
    if base is backbone:
        source = source.split(HEAD)[0].rstrip() + "\n"
    for role, cls in classes.items():
        source = source.replace(f"Controlled{role}", f"Control{cls.__name__}")
    (folder / f"{MODELING}.py").write_text(source, encoding="utf-8")

    spec = importlib.util.spec_from_file_location(MODELING, folder / f"{MODELING}.py")
    assert spec and spec.loader
    modeling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(modeling)
    names = {role: f"Control{cls.__name__}" for role, cls in classes.items()}
    fields = {k: v for k, v in base.config.to_dict().items() if k not in ("model_type", "auto_map", "architectures")}
    tensors = {**base.state_dict(), **weights}
    parted = any(not torch.equal(tensors[one], tensors[other]) for one, other in base.all_tied_weights_keys.items())
    if parted and not base.config.is_encoder_decoder:  # T5's field says how outputs are scaled
        fields["tie_word_embeddings"] = False
    config = getattr(modeling, names["Config"])(**fields, control=controls)
    config.auto_map = {
        "AutoConfig": f"{MODELING}.{names['Config']}",
        "AutoModel": f"{MODELING}.{names['Backbone']}",
        auto: f"{MODELING}.{names['Model']}",
    }
    with torch.device("meta"):
        exported = getattr(modeling, names["Model"])(config)
    exported.load_state_dict(tensors, assign=True)
    if not parted:
        exported.tie_weights()
    if exported.can_generate():
        exported.generation_config = base.generation_config
    exported.save_pretrained(folder)
    # `transformers serve` takes the architecture from transformers: the auto class leads on to the modeling file.
    config.architectures = [auto]
    config.save_pretrained(folder)
    return exported


def _copy_processor(folder: Path, *places: str) -> None:
    """Save the tokenizer or image processor of the first place that has one."""
    for place in places:
        try:
            AutoProcessor.from_pretrained(place).save_pretrained(folder)
            return
        except (OSError, ValueError, KeyError):
            continue
    print("note: neither the adapter nor its base has a tokenizer or image processor to copy", file=sys.stderr)


def _card(model: PreTrainedModel, auto: str, config: ControlConfig, adapter: str) -> str:
    base = config.base_model_name_or_path
    serve = ""
    if auto == "AutoModelForCausalLM":
        serve = "\nIt also runs under `transformers serve --trust-remote-code`.\n"
    return f"""---
library_name: transformers
tags: [parallel-control]
---

# {type(model).__name__}

`{base}` and its [Parallel Control]({PAPER}) adapter `{Path(adapter).name}` as one model. Blocks with a
control: {", ".join(model.config.control)}. LoRA and DoRA parts, if any, are merged into the weights.

```python
from transformers import {auto}

model = {auto}.from_pretrained("this folder", trust_remote_code=True)
```

`{MODELING}.py` is all the code that it needs beside torch and transformers: read it before you trust it.
`AutoTokenizer` and `pipeline` take `trust_remote_code=True` too. Without it the folder does not load.
{serve}"""


def main(arguments: list[str]) -> None:
    """The command line; what is wrong ends in one line on stderr and exit code 2."""
    options = parse_export(arguments)
    transformers.logging.set_verbosity_error()
    try:
        model = export(**vars(options))
    except (ValueError, OSError, SafetensorError) as error:  # the last one of a full disk
        refuse(str(error))
    print(f"{options.out}: {type(model).__name__}; its README.md says how to load it")
