"""Batches without padding: rows laid end to end, each attending to itself alone, each weighted as published.

The published recipe takes micro-batches of padded rows, averages each one's loss over its tokens, and averages the
micro-batches of an optimizer step. A *pack* holds whole rows of one optimizer step up to a token budget. Each label's loss
weighs what the published averages would have given it: gradients of a step are the published ones, whatever the packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import ShadowModel
from torch.nn.attention import varlen
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DataCollatorWithFlattening, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from control_experiments.errors import UserError
from LlaMA.commonsense import IGNORE, TokenRow
from peft_control.memory.graphs import StepGraphs
from peft_control.memory.layers import replays_random_numbers
from peft_control.memory.loss import causal_lm_loss

#: Lays rows end to end, with what variable-length attention kernels take.
_flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


@dataclass
class Batch:
    """What one forward and backward works on.

    Attributes:
        inputs: keyword arguments of the model; ids are `(1, tokens)` packed, `(rows, tokens)` padded.
        labels: like the ids, `IGNORE` where nothing is to be predicted (a row's first token always).
        weights: like the labels; each label's loss counts so much, divided by `divisor`.
        divisor: a number, as a tensor without dimensions.
        sources: numbers of a pack's tokens whose next label counts; None: half or more do, and all tokens are asked.
        rows, tokens: how many rows and real (non-padding) tokens there are.
    """

    inputs: dict
    labels: torch.Tensor
    weights: torch.Tensor
    divisor: torch.Tensor
    rows: int
    tokens: int
    sources: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return replace(self, **send_to_device({"inputs": self.inputs, **self.tensors}, device, non_blocking=True))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors but the model's inputs."""
        found = {name: getattr(self, name) for name in ("labels", "weights", "divisor", "sources")}
        return {name: value for name, value in found.items() if value is not None}


def micro_batches(rows: Sequence[TokenRow], size: int) -> list[tuple[list[TokenRow], float]]:
    """One optimizer step's rows as published: micro-batches of `size`, each with its loss's divisor, which is its
    number of predicted tokens times the number of micro-batches."""
    groups = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [(group, max(1, sum(row.targets for row in group)) * len(groups)) for group in groups]


def padded_step(rows: Sequence[TokenRow], micro_batch: int, pad_token_id: int) -> list[Batch]:
    """One optimizer step as published: micro-batches padded on the right to their longest row."""
    batches = []
    for group, divisor in micro_batches(rows, micro_batch):
        ids = pad_sequence([torch.tensor(row.ids, dtype=torch.long) for row in group], True, pad_token_id)
        mask = pad_sequence([torch.ones(len(row.ids), dtype=torch.long) for row in group], True)
        labels = pad_sequence([torch.tensor(row.labels) for row in group], True, IGNORE)
        inputs, weights = {"input_ids": ids, "attention_mask": mask}, torch.ones(labels.shape)
        divisor = torch.tensor(float(divisor))
        batches.append(Batch(inputs, labels, weights, divisor, len(group), int(mask.sum())))
    return batches


def packed_step(rows: Sequence[TokenRow], micro_batch: int, token_budget: int) -> list[Batch]:
    """One optimizer step in as few packs of at most `token_budget` tokens as first-fit-decreasing finds. Raises
    UserError: a row alone is longer than the budget."""
    groups = micro_batches(rows, micro_batch)
    numbered = [(number, row) for number, (group, _) in enumerate(groups) for row in group]
    packs: list[list[tuple[int, TokenRow]]] = []
    room: list[int] = []
    for number, row in sorted(numbered, key=lambda entry: -len(entry[1].ids)):
        if len(row.ids) > token_budget:
            raise UserError(f"--token_budget {token_budget} is below a row's {len(row.ids)} tokens")
        fits = next((index for index, left in enumerate(room) if left >= len(row.ids)), len(packs))
        if fits == len(packs):
            packs.append([])
            room.append(token_budget)
        packs[fits].append((number, row))
        room[fits] -= len(row.ids)
    return [_pack(sorted(pack, key=lambda entry: entry[0]), groups) for pack in packs]


def _pack(pack: list[tuple[int, TokenRow]], groups: list[tuple[list[TokenRow], float]]) -> Batch:
    inputs = _flatten([{"input_ids": row.ids, "labels": row.labels} for _, row in pack])
    labels, divisor = inputs.pop("labels"), min(groups[number][1] for number, _ in pack)
    weights = torch.tensor([[divisor / groups[number][1] for number, row in pack for _ in row.ids]], dtype=torch.float32)
    sources = (labels[0, 1:] != IGNORE).nonzero()[:, 0]
    return Batch(
        inputs, labels, weights, torch.tensor(float(divisor)), len(pack), labels.numel(),
        sources=sources if 2 * len(sources) < labels.numel() else None,
    )  # fmt: skip


def fixed_shape(pack: Batch, quantum: int, rows: int, longest: int, pad_token_id: int) -> Batch:
    """A pack of the same loss in one of few shapes, as CUDA graphs need them.

    Its tokens are filled up to a multiple of `quantum` with rows of padding that weigh nothing, and its list of rows to
    `rows`, the most that a pack has, plus as many as that padding may need, with empty ones; no row has more than `longest`
    tokens. Its sources are filled up to a power of two with the last token, which predicts nothing.
    """
    tokens = pack.labels.shape[1]
    whole = -(-tokens // quantum) * quantum
    ends = pack.inputs["cu_seq_lens_q"].tolist()
    ends += [*range(ends[-1] + longest, whole, longest), whole]
    ends += [whole] * (rows + -(-quantum // longest) + 1 - len(ends))
    missing = (0, whole - tokens)
    positions = torch.cat([pack.inputs["position_ids"], torch.arange(missing[1])[None] % longest], dim=1)
    ids = F.pad(pack.inputs["input_ids"], missing, value=pad_token_id)
    lengths = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor(ends, dtype=torch.int32))
    lengths |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    sources = pack.sources
    if sources is not None:
        sources = F.pad(sources, (0, (1 << max(len(sources) - 1, 0).bit_length()) - len(sources)), value=whole - 1)
    return replace(
        pack,
        inputs={"input_ids": ids, "position_ids": positions, **lengths},
        labels=F.pad(pack.labels, missing, value=IGNORE),
        weights=F.pad(pack.weights, missing),
        sources=sources,
    )


def batch_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The batch's share of its optimizer step's loss: the weighted sum of its labels' cross entropies / divisor."""
    labels, weights = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE), F.pad(batch.weights[:, 1:], (0, 1))
    asked = {}
    if batch.sources is not None and "logits_to_keep" in inspect.signature(type(_causal_lm(model)).forward).parameters:
        asked["logits_to_keep"] = batch.sources
        labels, weights = labels[:, batch.sources], weights[:, batch.sources]
    logits = model(**batch.inputs, use_cache=False, **asked).logits.flatten(0, 1).float()
    losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return (losses * weights.flatten()).sum() / batch.divisor  # a product would be rounded by autocast


def fused_batch_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """`batch_loss` without the batch's logits in memory, for a frozen output layer."""
    base = _causal_lm(model)
    found = []
    handle = base.base_model.register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        # the model's own forward keeps wrappers (autocast, DDP) working; it is asked for no position's logits
        model(**batch.inputs, use_cache=False, logits_to_keep=batch.labels.new_empty(0))
    finally:
        handle.remove()
    return causal_lm_loss(
        found[0], batch.labels, base.get_output_embeddings(), chunk=1024, num_items_in_batch=batch.divisor,
        softcap=getattr(base.config, "final_logit_softcapping", None), weights=batch.weights, rows=batch.sources,
    )  # fmt: skip


def shadow_batch_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """`batch_loss`, and in training SHADOW's own loss: its backbone is to predict the labels too (peft's `ShadowConfig`).

    peft averages that loss over the batch's labels, which here weigh together what they weigh in the step.
    """
    loss = batch_loss(model, batch)
    tuner = next(module for module in model.modules() if isinstance(module, ShadowModel))
    if model.training:
        targets = batch.labels[:, 1:] != IGNORE
        weight = (batch.weights[:, 1:] * targets).sum() / batch.divisor
        share = tuner.peft_config[tuner.active_adapters[0]].auxiliary_loss_weight
        head = _causal_lm(model).get_output_embeddings().weight
        with torch.autocast(head.device.type, dtype=head.dtype, enabled=head.dtype != torch.float32):
            loss = loss + share * weight * tuner.shadow_auxiliary_loss(batch.labels)
    return loss


class GraphedLoss:
    """A batch loss that is replayed as CUDA graphs while training, for packs of `fixed_shape`.

    Small models' steps are bound by kernel launches, which a replay spares. Evaluation, CPUs, and dropout that a memory
    mode draws twice in a way that no graph can, run as they are.
    """

    def __init__(self, loss: Callable):
        self.loss, self.graphs = loss, StepGraphs()

    def __call__(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        training = model.training and torch.is_grad_enabled()
        if not (training and batch.labels.is_cuda) or replays_random_numbers(model):
            return self.loss(model, batch)
        names = [name for name, value in batch.inputs.items() if isinstance(value, torch.Tensor)]
        others = batch.tensors

        def compute(*values):
            inputs = {**batch.inputs, **dict(zip(names, values))}
            return self.loss(model, replace(batch, inputs=inputs, **dict(zip(others, values[len(names) :], strict=True))))

        tensors = [*(batch.inputs[name] for name in names), *others.values()]
        return self.graphs(compute, tensors, model, self.graphs.look_at(tensors, model, batch.inputs["max_length_q"]))


def _causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The causal language model inside peft's and DDP's wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


VARLEN = "packed_varlen"


def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length flash attention runs here: a GPU from Ampere on, in half precision."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, scaling=None, sliding_window=None, **_
):
    """A transformers attention function over packed rows, causal within each.

    Shapes: query `(1, heads, tokens, head_dim)`, key and value `(1, key_value_heads, tokens, head_dim)`; returns
    `(1, tokens, heads, head_dim)` and None. The scores of one row against another are never computed.
    """
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    output = varlen.varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
    )  # fmt: skip
    return output[None], None


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, flash_attention_mask)


def check_packing(model: torch.nn.Module, rows: Sequence[TokenRow]) -> None:
    """Check on two rows that this architecture keeps packed rows apart. Raises UserError: the second row's
    logits depend on the first."""
    weight = _causal_lm(model).get_input_embeddings().weight
    half = weight.dtype != torch.float32
    # the beginnings of all rows are alike, so one row's beginning goes before another's end
    first, second = (TokenRow(ids, bytes(len(ids))) for ids in (rows[0].ids[:32], rows[-1].ids[-32:]))

    def logits(packed: Sequence[TokenRow]) -> torch.Tensor:
        """Those of the second row, which stands last: micro-batches keep their order."""
        (pack,) = packed_step(packed, 1, token_budget=64)
        found = model(**pack.to(weight.device).inputs, use_cache=False).logits[0].float()
        return found[-len(second.ids) :]

    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(weight.device.type, dtype=weight.dtype, enabled=half):
        together, alone = logits([first, second]), logits([second])
    model.train(training)
    error = (together - alone).abs().max() / alone.abs().max()
    # 8-bit layers round their inputs, and which columns they leave exact depends on all rows together
    coarse = half or any(parameter.dtype == torch.int8 for parameter in model.parameters())
    if not error < (5e-2 if coarse else 1e-3):
        raise UserError(
            f"{type(_causal_lm(model)).__name__} does not keep packed rows apart (relative difference {error:.1e}): "
            "use --batching padded"
        )
