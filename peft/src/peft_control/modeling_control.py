"""A model of transformers with Parallel Control: controlled blocks add alpha * B(A(state)) to their output states.

``python -m peft_control export`` wrote this file; it needs torch and transformers alone. ``state`` is the residual
stream where the block reads it. Source: Zhang, Ren, Cheng and Li, ICML 2025.
"""

import threading

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.models.llama.configuration_llama import LlamaConfig as BaseConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as BaseModel
from transformers.models.llama.modeling_llama import LlamaModel as BaseBackbone


class Control(nn.Module):
    """The control of one block: catches the state where the block reads, adds to its output where it writes."""

    def __init__(self, layer, read, write, shared, width, rank, alpha, bias):
        super().__init__()
        self.A, self.B = nn.Linear(width, rank, bias=bias), nn.Linear(rank, width, bias=bias)
        self.alpha = alpha
        self.shared = shared  # whether both blocks write through one module
        self.states = {}  # by thread: servers run one model in several
        layer.register_forward_pre_hook(self.forget)
        layer.get_submodule(read).register_forward_pre_hook(self.catch, with_kwargs=True)
        layer.get_submodule(write).register_forward_hook(self.add)

    def forget(self, module, args):
        self.states.pop(thread(), None)

    def catch(self, module, args, kwargs):
        self.states[thread()] = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))

    def add(self, module, args, output):
        state = self.states.pop(thread(), None)
        if state is None:
            if self.shared:
                return output  # the other block's call
            raise RuntimeError("a controlled block wrote without reading: its forward has been replaced")
        if isinstance(output, tuple):
            return (self.added(output[0], state), *output[1:])
        return self.added(output, state)

    def added(self, output, state):
        hidden = linear(state.reshape(output.shape), self.A)
        return torch.add(output, linear(hidden, self.B).to(output.dtype), alpha=self.alpha)


def linear(x, layer):
    if layer.weight.is_meta:  # offloaded by accelerate, whose hooks fetch the weights of a module that is called
        return layer(x.to(layer.weight.dtype))
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def thread():
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def add_controls(model):
    backbone = getattr(model, model.base_model_prefix, model)
    if backbone is not model and isinstance(backbone, ControlledBackbone):
        return  # it has them already
    for block, control in model.config.control.items():
        for name, fields in control["layers"].items():
            layer = backbone.get_submodule(name)
            layer.add_module(f"{block}_control", Control(layer, **fields))


class ControlledConfig(BaseConfig):
    model_type = (
        f"control_{BaseConfig.model_type}"  # a type of its own: who does not trust this file gets an error, not the base model
    )


class ControlledBackbone(BaseBackbone):
    config_class = ControlledConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        add_controls(self)

    @classmethod
    def is_custom_code(cls):
        return False  # of such code transformers leaves buffers empty (Falcon-H1's)


AutoModel.register(ControlledConfig, ControlledBackbone, exist_ok=True)  # some heads make their backbone with it


# -- with its head ----------------------------------------------------------------------------------------------


class ControlledModel(BaseModel):
    config_class = ControlledConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        add_controls(self)

    @classmethod
    def is_custom_code(cls):
        return False
