"""Frozen linear layers in 8-bit floating point: half the weights' memory, and matmuls of twice the speed.

It is small and simple here because the block of a control is frozen and whole. No weight gradient exists, so nothing is
quantized along the tokens. No adapter sits between the matmuls, so each output goes on as it is. What remains are two
products of one stored weight, forward and input gradient:

- Weights are e4m3 with one scale per output channel. Activations are e4m3 with one scale per token, found anew each time.
- The input gradient is ``(dy * scale) @ weight``. The weight's scales join dy before its rows are quantized, so the one
  stored copy serves both directions, transposed on the fly. Layers of one input can share its gradient's product: their parts
  of dy are then one row with one scale.
- All scales are powers of two, as in torchao's rowwise recipe: multiplying by them is exact.

A product is summed in float32 and rounded once, to bfloat16, whatever the type of the layer's input. On GPUs that have FP8
it runs in ``torch._scaled_mm``; elsewhere it is emulated, with the same rounding and slowly. Source of the number formats:
"FP8 Formats for Deep Learning", arXiv 2209.05433. Experts of a mixture are stored so, but multiply in 16 bits:
:mod:`.fp8_experts`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from .architectures import find_layers
from .control_layer import ControlLayer
from .fp8_experts import Fp8Experts, InFp8, frozen, is_experts, quantized
from .fp8_kernels import compute_dtype, dequantize_rows, has_fp8, quantize_rows, transposed

METHOD = "fp8_rowwise"  # "fp8" is transformers' own, with scales of blocks
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_WEIGHT = torch.float8_e4m3fn
_MULTIPLE = 16  # of the widths that torch._scaled_mm takes


# -- arithmetic -------------------------------------------------------------------------------------------------


def _product(rows, scales, weight, weight_scales, bias, dtype):
    """``(rows * scales) @ (weight * weight_scales) + bias`` in ``dtype``.

    ``rows`` ``(rows, k)`` are FP8 with scales ``(rows, 1)``, ``weight`` is e4m3's bytes ``(k, n)``, one column behind the other,
    with scales ``(1, n)``. Without the former the latter are ones.
    """
    bias = None if bias is None else bias.to(torch.bfloat16)
    if scales is None:
        scales = weight_scales = weight_scales[:, :1]
    if _kernels_take(rows.device, *weight.shape) and len(rows):
        output = torch._scaled_mm(
            rows, weight.view(_WEIGHT), scale_a=scales, scale_b=weight_scales, bias=bias, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
        return output.to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        output = (rows.float() * scales) @ (weight.view(_WEIGHT).float() * weight_scales)
        return (output if bias is None else output + bias.float()).to(torch.bfloat16).to(dtype)


@torch.compiler.assume_constant_result  # so that compiled code can warn
def _kernels_take(device, *widths):
    """Whether ``torch._scaled_mm`` takes a weight of such ``widths`` there; it asks nothing of the number of rows."""
    if not has_fp8(device):
        instead = "; nf4 and int8 are for such GPUs" if device.type == "cuda" else ""
        _warn_once(f"this {device.type} has no FP8: its products are emulated, slowly{instead}")
    elif any(width % _MULTIPLE for width in widths):
        _warn_once(f"FP8 kernels take widths that are multiples of {_MULTIPLE}: products of others are emulated")
    else:
        return True
    return False


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=2)


# -- layers -----------------------------------------------------------------------------------------------------


class Fp8Linear(InFp8, nn.Linear):
    """A frozen linear layer with an e4m3 weight.

    Attributes:
        weight: ``(out, in)``, e4m3's bytes as uint8: whoever casts a model's floating-point parameters leaves them alone.
        weight_scale: ``(out, 1)``, float32 powers of two.
        bias: ``(out,)`` or None, in the type that it had.
        gradients: the format of the rows of dy, a key of :data:`FORMATS`.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, gradients="e4m3"):
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features, self.gradients = in_features, out_features, gradients
        self.weight = frozen(torch.empty(out_features, in_features, dtype=torch.uint8, device=device))
        self.weight_scale = frozen(torch.empty(out_features, 1, dtype=torch.float32, device=device))
        self.bias = frozen(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, gradients: str = "e4m3") -> Fp8Linear:
        """What stands for ``linear``, on its device; of a layer on the meta device without values."""
        weight, bias = linear.weight, linear.bias
        new = cls(*weight.shape[::-1], bias=False, device="meta", gradients=gradients)
        if bias is not None:
            new.bias = frozen(bias.detach())
        if not weight.is_meta:
            new.weight, new.weight_scale = quantized(weight)
        return new.train(linear.training)

    @property
    def W_q(self):
        """The name by which peft knows a layer that has ``dequantize``, which DoRA needs."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """The weight ``(out, in)`` in bfloat16, which holds it exactly."""
        return dequantize_rows(self.weight, self.weight_scale)

    def of_rows(self, rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The layer's output ``(rows, out)`` in ``dtype`` for rows of :func:`quantize_rows`, which layers may share."""
        weight_scales = self.weight_scale.float().view(1, -1)
        return _product(rows, scales, self.weight.t(), weight_scales, self.bias, dtype)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient ``(rows, in)`` of the layer's input for its output's ``(rows, out)``, in the same type."""
        return _input_gradient(dy, self.weight, self.weight_scale, self.gradients)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # both weights as arguments: autograd saves them; the views outside: an output may be changed in place
        rows = _Output.apply(x.reshape(-1, x.shape[-1]), self, self.weight, self.weight_scale)
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gradients={self.gradients}"


class _Output(torch.autograd.Function):
    """A layer's output; of a forward nothing is kept but the layer's weight."""

    @staticmethod
    def forward(ctx, x, linear, weight, weight_scale):
        ctx.gradients, ctx.dtype = linear.gradients, x.dtype
        ctx.save_for_backward(weight, weight_scale)
        dtype = compute_dtype(x)
        return linear.of_rows(*quantize_rows(x.to(dtype)), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _input_gradient(dy, *ctx.saved_tensors, ctx.gradients).to(ctx.dtype), None, None, None


def _input_gradient(dy, weight, weight_scale, gradients):
    return gradient_of_rows(quantize_rows(dy, FORMATS[gradients], weight_scale.float()), transposed(weight), dy.dtype)


def gradient_of_rows(rows, turned, dtype: torch.dtype) -> torch.Tensor:
    """The gradient ``(rows, in)`` of an input in ``dtype``, for what :func:`transposed` gives for the weights of its layers and
    the ``rows`` of their outputs' gradients: side by side, multiplied by the layers' ``weight_scale``, then quantized. They come
    with their scales, or with None for a gradient without them."""
    weight, ones = turned
    return _product(*rows, weight.t(), ones, None, dtype)


# -- models -----------------------------------------------------------------------------------------------------


def quantize_fp8(model: nn.Module, keep_last: float = 0.0, gradients: str = "e4m3", output_layer: bool = False) -> nn.Module:
    """Replace the frozen linear layers of the transformer layers by :class:`Fp8Linear` and their experts by
    :class:`Fp8Experts`, one after the other, in place.

    Embeddings, norms, routers, heads and everything of an adapter stay as they are, and so do layers whose weight a module reads
    itself (T5's ``wo``, Mamba's ``dt_proj``). Below LoRA the linear layer that it adapts is replaced, the experts that it adapts are not. Of heads a language
    model's output layer is replaced if asked for.

    Args:
        model: of an architecture that Control knows, with an adapter or before it gets one.
        keep_last: share of the transformer layers, the last ones, that stay as they are.
        gradients: format of the rows of the output's gradient, "e4m3" or "e5m2" (two bits of fraction, for a wide range).
        output_layer: whether a language model's output layer is replaced too. Logits, so losses as well, are then rounded.

    Raises:
        ValueError: a value is out of its range, no layer is found, or the output layer is to be replaced and is trained, no
            ``nn.Linear``, or one with the embedding, which reads its rows. The model is then as it was.
    """
    if not 0 <= keep_last <= 1 or gradients not in FORMATS:
        raise ValueError(
            f"FP8 takes keep_last from 0 to 1 and gradients {' or '.join(FORMATS)}, got {keep_last} and {gradients!r}"
        )
    layers = [layer for layer, _ in find_layers(model).values()]
    if not any(isinstance(module, nn.Linear) or is_experts(module) for layer in layers for module in layer.modules()):
        raise ValueError(f"{type(layers[0]).__name__} has no nn.Linear and no experts, which is what FP8 replaces")
    places = [_output_layer(model)] if output_layer else []
    for layer in layers[: len(layers) - round(keep_last * len(layers))]:
        places += _replaced(layer)
    for parent, name in places:
        child = parent._modules[name]
        parent._modules[name] = Fp8Experts.of(child) if is_experts(child) else Fp8Linear.of(child, gradients)
    for module in model.modules():
        if isinstance(module, ControlLayer):
            module.attach()  # what was replaced may have carried its hooks
    return model


def _in_fp8(model: nn.Module) -> list[InFp8]:
    return [module for module in model.modules() if isinstance(module, InFp8)]


def _replaced(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    adapts = isinstance(module, BaseTunerLayer)
    for name, child in module.named_children():
        if name != "base_layer" if adapts else _reads_weight(type(module), name):
            continue
        if type(child) is nn.Linear or (is_experts(child) and not adapts):
            yield module, name
        elif not isinstance(child, AuxiliaryTrainingWrapper):
            yield from _replaced(child)


@functools.cache
def _reads_weight(kind: type[nn.Module], name: str) -> bool:
    """Whether a module's own code uses the weight of a child, as Mamba's mixers do instead of calling it, or its type, as T5 does."""
    try:
        return f"self.{name}.weight" in inspect.getsource(kind)
    except (OSError, TypeError):  # no source
        return False


def _output_layer(model):
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = head.base_layer if isinstance(head, BaseTunerLayer) else head
    place = next(((parent, name) for parent, name in _replaced(model) if parent._modules[name] is head), None)
    if place is None:
        raise ValueError("output_layer=True needs an output layer that is an nn.Linear and stays frozen")
    tied = head.weight is getattr(model.get_input_embeddings(), "weight", None)
    if tied or getattr(model.config, "tie_word_embeddings", False):  # while a model is read, its weights are not tied yet
        raise ValueError("this model's output layer is its embedding, which FP8 leaves as it is: leave output_layer=True out")
    return place


@register_quantization_config(METHOD)
class Fp8Config(QuantizationConfigMixin):
    """``from_pretrained(..., quantization_config=Fp8Config())`` quantizes each weight as it is read: the model in 16 bits
    need never fit. Arguments are those of :func:`quantize_fp8`."""

    def __init__(self, keep_last: float = 0.0, gradients: str = "e4m3", output_layer: bool = False, **_):
        self.keep_last, self.gradients, self.output_layer, self.quant_method = keep_last, gradients, output_layer, METHOD


@register_quantizer(METHOD)
class Fp8Quantizer(HfQuantizer):
    """Loads models into :class:`Fp8Linear` and :class:`Fp8Experts`, and those that were saved so."""

    is_trainable = True
    is_compileable = True
    quantized_element_size = 1

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, InFp8) and name in module.stored

    def get_quantize_ops(self):
        return _Quantize()

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        quantize_fp8(model, config.keep_last, config.gradients, config.output_layer)
        if not self.pre_quantized:
            for module in _in_fp8(model):  # transformers 5.17 casts to this type before it quantizes
                for name in module.stored:
                    module._parameters[name].data = module._parameters[name].data.float()
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in _in_fp8(model):
            module.requires_grad_(False)
        return model


class _Quantize(ConversionOps):
    def convert(self, input_dict, **kwargs):
        ((name, weight),) = input_dict.items()
        stored = quantized(weight[0] if isinstance(weight, list) else weight)
        return dict(zip((name, f"{name}_scale"), stored, strict=True))
