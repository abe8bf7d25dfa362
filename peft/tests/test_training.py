"""Controls under the machinery people train and serve with: checkpointing, caches, compile, Trainers, Liger."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from tiny_models import FAMILIES, VOCAB, WIDTH, adapted, build, logits, randomize_adapters, step_of, step_on, word_tokenizer
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments
from transformers.models.llama import modeling_llama

from peft_control import ControlConfig
from peft_control.memory import set_memory_mode

INPUTS = FAMILIES["llama"].inputs()
QKV = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 4, "lora_alpha": 8}
adapted = partial(adapted, dtype=torch.float32)


# -- gradient checkpointing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "use_reentrant"),
    [
        *[("llama", fields, reentrant) for fields in ({}, QKV) for reentrant in (True, False)],
        *[(family, {}, False) for family in ("gemma2", "gpt2", "bert", "vit", "dinov2", "timm-vit")],
    ],
)
def test_gradient_checkpointing(family, fields, use_reentrant):
    model, inputs = adapted(family, dropout=0.0, **fields), FAMILIES[family].inputs()
    _, expected = step_on(model, inputs)
    if family == "timm-vit":
        model.base_model.model.set_grad_checkpointing()
    else:
        if use_reentrant:  # which sees only gradients of its inputs
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
    assert all(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(step_on(model, inputs)[1], expected, rtol=1e-4, atol=1e-6)


# -- generation ---------------------------------------------------------------------------------------------


def test_decoding_sees_every_change_of_the_control(tmp_path):
    """A bfloat16 base with float32 controls: one-token steps share a cast until the adapter changes, in whatever way."""
    model = get_peft_model(build("llama", torch.bfloat16), ControlConfig(task_type="CAUSAL_LM", control_rank=3))
    control = randomize_adapters(model).eval().base_model.model.model.layers[0].mlp_control
    state, prompt = (torch.randn(2, length, WIDTH).bfloat16() for length in (1, 3))

    def check(name="default"):
        A, B = (factor[name].weight.bfloat16() for factor in (control.control_A, control.control_B))
        for _ in range(2):
            assert torch.equal(control.control(torch.zeros_like(state), state), F.linear(F.linear(state, A), B))

    with torch.no_grad():
        check()
        assert control._weights("default", state)[0] is control._weights("default", state)[0]
        control.control_B["default"].weight.mul_(2)  # as an optimizer's step
        check()
        control.control_A["default"].weight = torch.nn.Parameter(torch.randn(3, WIDTH))
        check()
        model.save_pretrained(tmp_path)
        for _ in range(2):
            model.load_adapter(str(tmp_path), "second")
            model.set_adapter("second")
            control.control_A["second"].weight.mul_(2)
            check("second")
            model.delete_adapter("second")
        model.set_adapter("default")
        check()
        control.control_A["default"].weight.data.mul_(1e-9)  # of which no version tells
        control.control(prompt, prompt)
        check()
        model.half().float()  # where such numbers are zeros
        check()
    control.train().control(torch.zeros_like(state), state.requires_grad_()).sum().backward()
    assert state.grad is not None


# -- torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields"), [("llama", QKV), ("vit", {})], ids=["llama", "vit"]
)  # upstream's DoRA does not compile
def test_compile_fullgraph(family, fields):
    torch._dynamo.reset()
    model, inputs = adapted(family, **fields).eval(), FAMILIES[family].inputs()
    _, expected = step_on(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(logits(compiled, inputs), logits(model, inputs), atol=1e-5)
    _, found = step_of(model, lambda: logits(compiled, inputs).double().square().mean())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# -- trainers -----------------------------------------------------------------------------------------------


def repetitive_texts(rows: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(3, VOCAB, (rows, 1), generator=generator)
    ids = ((starts - 3 + torch.arange(8)) % (VOCAB - 3) + 3).tolist()  # each token is the one before plus one
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in ids]


TRAINING = {
    **dict(per_device_train_batch_size=8, max_steps=12, learning_rate=3e-2, logging_steps=1, use_cpu=True),
    **dict(report_to="none", save_strategy="no", disable_tqdm=True),
}


def check_run(trainer, folder):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(folder))
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    model = trainer.model.eval()
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "control_B" in n)
    reloaded = PeftModel.from_pretrained(build("llama"), folder).eval()
    assert torch.equal(logits(reloaded, INPUTS), logits(model, INPUTS))


def test_transformers_trainer_in_one_go_and_resumed(tmp_path):
    def trained(folder, steps, resume=False):
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), ControlConfig(task_type="CAUSAL_LM", **QKV))
        options = {**TRAINING, "max_steps": steps, "save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "constant"}
        arguments = TrainingArguments(output_dir=str(tmp_path / folder), gradient_checkpointing=True, **options)
        trainer = Trainer(model, arguments, train_dataset=repetitive_texts())
        trainer.train(resume_from_checkpoint=resume)
        return trainer, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    trainer, whole = trained("whole", 12)
    check_run(trainer, tmp_path / "adapter")
    trained("parts", 6)
    trainer, resumed = trained("parts", 12, resume=True)
    check_run(trainer, tmp_path / "resumed")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-7)


# -- memory modes in everybody's trainers -------------------------------------------------------------------


def text(start: int, length: int = 6) -> str:
    return " ".join(f"w{(start + step) % (VOCAB - 3) + 3}" for step in range(length))


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


#: Trainer, its options, the columns of its data from a row's number, what else it takes.
CASES = {
    "Trainer": ("Trainer", {}, None, {}),
    "label smoothing": ("Trainer", {"label_smoothing_factor": 0.2}, None, {}),
    "num_items_in_batch": ("Trainer", {"gradient_accumulation_steps": 2}, None, {}),
    "compute_loss_func": ("Trainer", {}, None, {"compute_loss_func": summed_loss}),
    "SFT": ("SFT", {"max_length": 16}, lambda n: {"text": text(n, 5 + n % 4)}, {}),
    "DPO": ("DPO", {}, lambda n: {"prompt": text(n), "chosen": text(n + 6), "rejected": text(2 * n)}, {}),
    "KTO": ("KTO", {}, lambda n: {"prompt": text(n), "completion": text(n + 6), "label": n % 2 == 0}, {}),
    "Reward": ("Reward", {}, lambda n: {"chosen": text(n), "rejected": text(2 * n, 4)}, {}),
    "GRPO": (
        "GRPO", {"num_generations": 4, "max_completion_length": 6}, lambda n: {"prompt": text(n)},
        {"reward_funcs": lambda completions, **_: [len({*text.split()}) / 6 for text in completions]},
    ),
}  # fmt: skip
ORDERS = {"plain": (), "before": ("lean",), "after": (None, "lean"), "undone": ("fast", "plain")}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """``logged(case, order)``: what each step of a trainer logs if the mode is set so before it is made and after."""
    return cache(lambda case, order: train(case, ORDERS[order], tmp_path_factory.mktemp("run")))


def train(case: str, modes: tuple, folder) -> list[dict]:
    from datasets import Dataset

    kind, options, row, named = CASES[case]
    if kind == "Trainer":
        trainer_class, arguments_class = Trainer, TrainingArguments
        data = repetitive_texts()
    else:
        trl = pytest.importorskip("trl")
        trainer_class, arguments_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
        data = Dataset.from_list([row(number) for number in range(16)])
        named = {**named, "processing_class": word_tokenizer()}
    base, task = build("llama"), "CAUSAL_LM"
    if kind == "Reward":
        config = base.config
        config.num_labels = 1
        torch.manual_seed(0)
        base, task = LlamaForSequenceClassification(config), "SEQ_CLS"
    model = adapted(base, task_type=task)
    if modes and modes[0]:
        set_memory_mode(model, modes[0])
    options = {**TRAINING, "max_steps": 3, "bf16": False, "learning_rate": 1e-2, **options}
    trainer = trainer_class(model=model, args=arguments_class(output_dir=str(folder), **options), train_dataset=data, **named)
    for mode in modes[1:]:
        set_memory_mode(trainer.model, mode)
    trainer.train()
    planned = any(hasattr(module, "memory_plan") for module in trainer.model.modules())
    assert planned == ("lean" in modes[-1:])
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "plain"])
@pytest.mark.parametrize("case", CASES)
def test_memory_modes_in_trainers(case, order, logged):
    """Whatever the order, every step logs what plain autograd's does."""
    expected, found = logged(case, "plain"), logged(case, order)
    assert len(expected) == len(found) == 3 and expected[0]["loss"] != expected[-1]["loss"]
    for plain, step in zip(expected, found):
        assert step.keys() == plain.keys()
        for name in plain:
            if not name.startswith(("step_time", "profiling")) and isinstance(plain[name], float):
                assert step[name] == pytest.approx(plain[name], abs=1e-5, rel=1e-4, nan_ok=True), name


# -- Liger --------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
LIGER = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.fixture
def liger(monkeypatch):
    """Liger's own patching and patched forwards, with torch in place of the two Triton kernels."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import rms_norm, swiglu

    calls = []

    class RMSNorm:
        @staticmethod
        def apply(x, weight, eps, *options):
            calls.append("norm")
            return F.rms_norm(x, weight.shape, weight, eps)

    def silu_mul(gate, up):
        calls.append("mlp")
        return F.silu(gate) * up

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", RMSNorm)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", silu_mul)
    return calls


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("order", ["before", "after", "after, saved norm"])
def test_liger_before_and_after_the_adapter(order, device, request, monkeypatch):
    """On a CPU without Liger's own kernels."""
    for name in ("LlamaRMSNorm", "LlamaMLP"):  # which it replaces for good
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    calls = request.getfixturevalue("liger") if device == "cpu" else None
    fields = {"modules_to_save": ["post_attention_layernorm"] if "saved" in order else None}
    model, inputs = adapted("llama", **fields).to(device).eval(), {name: x.to(device) for name, x in INPUTS.items()}
    expected, (_, reference) = logits(model, inputs), step_on(model, inputs)
    if order == "before":
        monkey_patch.apply_liger_kernel_to_llama(**LIGER)
        model = adapted("llama", **fields).to(device).eval()
    else:
        monkey_patch._apply_liger_kernel_to_instance(model=model.get_base_model(), **LIGER)
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5 if device == "cpu" else 1e-3)
    tolerance = dict(rtol=1e-3, atol=1e-6) if device == "cpu" else dict(rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(step_on(model, inputs)[1], reference, **tolerance)
    assert calls is None or (calls.count("mlp"), calls.count("norm")) == (2 * 2, 2 * 5)
