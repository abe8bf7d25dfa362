import os
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from control_experiments.reporting import records
from LlaMA import finetune, packing, training
from LlaMA.commonsense import read_rows, split_rows, tokenize_rows
from LlaMA.models import add_adapter, choose_pad_token
from LlaMA.tests.conftest import assert_same_adapters, configuration, interrupted, published_loss
from peft_control import ControlConfig, memory  # noqa: F401  registers CONTROL
from scripts.catalogue import LLAMA_SHAPES


@pytest.mark.parametrize("method", finetune.METHODS)
def test_every_method_trains_and_leaves_an_adapter_and_a_record(train_llama, tmp_path, method, monkeypatch):
    said = train_llama("--method", method)
    record = said.record
    assert record.method == method and "cut at 256 tokens" in said.out
    width, layers, rank, lora = 32, 2, 4, 2
    blocks = 2 if method == "double control" else 1 if "control" in method else 0
    controls = layers * blocks * 2 * width * rank
    qkv = layers * lora * ((32 + 32) + 2 * (32 + 16))
    up_down = layers * lora * 2 * (32 + 64)
    magnitudes = layers * (32 + 16 + 16)
    per_weight = 0 if method in ("control", "double control") else qkv + (0 if controls else up_down)
    if "dora" in method:
        per_weight += magnitudes + (0 if controls else layers * (64 + 32))
    if method == "miss":
        per_weight = layers * lora * (32 + 16 + 16 + 64 + 32)
    if method == "shadow":  # two small networks and two matrices a layer, and a whole layer beside the model
        own = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 3 * 32
        per_weight = layers * (2 * 32 * lora + 2 * (32 * lora + lora + lora * 32 + 32)) + own
    assert record.adapter["trainable_parameters"] == controls + per_weight
    assert record.time["real_tokens"] > 0
    assert [entry["step"] for entry in record.history] == [2, 4, 6]
    assert record.metrics["best"]["eval_loss"] == min(entry["eval_loss"] for entry in record.history)
    assert record.metrics["last"]["eval_loss"] < record.history[0]["eval_loss"]
    monkeypatch.chdir("/")
    adapter = tmp_path / "run" / "adapter"
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)  # finds its base by itself
    asked = AutoTokenizer.from_pretrained(adapter)("Which?", return_tensors="pt")
    assert torch.isfinite(loaded(**asked).logits).all()


@pytest.mark.parametrize("save, step", [("best", 4), ("last", 10)])
def test_the_best_checkpoint_is_saved_or_the_last(train_llama, tmp_path, monkeypatch, save, step):
    real, seen = packing.batch_loss, []

    def worse_after_the_second_evaluation(model, batch):
        value = real(model, batch)
        if model.training:
            return value
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return value + 10 * max(0, len(seen) - 2)

    monkeypatch.setattr(packing, "batch_loss", worse_after_the_second_evaluation)
    record = train_llama("--token_budget", 10_000, "--max_steps", 10, "--save", save).record
    assert (record.metrics["best"]["step"], record.metrics["last"]["step"], record.adapter["step"]) == (4, 10, step)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, tensor in seen[step // 2 - 1].items():
        torch.testing.assert_close(saved[name.replace(".default", "")], tensor)


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("method", ["lora", "control+lora"])
def test_the_trainer_learns_as_a_plain_loop_does(train_llama, model_folder, data, monkeypatch, method, batching):
    """Row for row and step for step: two epochs, whose last steps are short, against AdamW written out."""
    seen, collate = [], training.collate

    def noting(rows, **settings):
        seen.append(rows)
        return collate(rows, **settings)

    monkeypatch.setattr(training, "collate", noting)
    more = ("--epochs", 2, "--max_steps", -1, "--eval_steps", 1, "--warmup_steps", 3, "--lora_dropout", 0)
    history = train_llama(*more, "--batching", batching, "--method", method).record.history
    kept, _ = split_rows(read_rows(data / "train.json"), 6, seed=42)
    rows = [row.ids for row in tokenize_rows(kept, AutoTokenizer.from_pretrained(model_folder), 256)]
    epochs = [[row.ids for step in part for row in step] for part in (seen[:8], seen[8:])]
    assert len(seen) == 16 and epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows)

    torch.manual_seed(42)
    targets = finetune.Options(method=method, data="x").targets
    config = configuration(method, targets, lora_rank=2, lora_alpha=4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 16)
    for number, (step, entry) in enumerate(zip(seen, history, strict=True)):
        loss = published_loss(model, step)
        assert loss.item() == pytest.approx(entry["train_loss"], rel=2e-5), f"step {number + 1}"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert history[-1]["train_loss"] < 0.95 * history[0]["train_loss"]


def test_bases_that_cannot_be_trained(train_llama, model_folder, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    shutil.copytree(model_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "special*"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x07")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=600, **shape)).save_pretrained(tmp_path / "bert")
    for file in model_folder.glob("token*"):
        shutil.copy(file, tmp_path / "bert")
    for base, said in (
        ("bare", "whose folder must hold its files"),
        ("bert", "is a bert model, no causal language model"),
        ("cut.gguf", "no tokenizer can be loaded from"),
    ):
        assert said in train_llama("--model", tmp_path / base).refused()
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("quantization", ["none", "fp8", "nf4"])
def test_streamed_weights_train_to_the_same_bits_and_resume(train_llama, tmp_path, monkeypatch, quantization):
    monkeypatch.setattr(memory, "RESIDENT", 1)  # of two layers
    train = partial(train_llama, "--memory", "lean", "--dtype", "bf16", "--quantization", quantization)
    resident = train("--output_dir", tmp_path / "resident").record
    with interrupted(5):
        code, out, _ = train("--stream_weights", "True")
    assert code == 130 and "frozen weights of 2 layers wait on the host" in out
    streamed = train("--stream_weights", "True", "--resume").record
    assert_same_adapters(tmp_path / "resident", tmp_path / "run")
    assert streamed.history == resident.history
    rows = [records._label(run.domain, run.method, run.hyperparameters) for run in (streamed, resident)]
    assert ["streamed" in row for row in rows] == [True, False]


def test_a_host_without_room_for_streamed_weights_is_said(train_llama, monkeypatch):
    monkeypatch.setattr(memory.streaming, "_free_memory", lambda: 1000)
    assert "of the host's memory" in train_llama("--stream_weights", "True").refused()


@pytest.mark.parametrize(
    ("words", "roles", "spare", "pad"),
    [
        ("<unk> </s>", {"pad_token": "<unk>", "unk_token": "<unk>"}, 0, "</s>"),  # LLaMA-2, as its recipes padded
        ("<unk> </s>", {"unk_token": "<unk>"}, 8, "<|pad|>"),
        ("! </s> <|reserved_special_token_0|>", {"pad_token": "!"}, 0, "<|reserved_special_token_0|>"),  # LLaMA-3
        ("<|finetune_right_pad_id|> [PAD] </s>", {}, 9, "<|finetune_right_pad_id|>"),
        ("</s> [pad]", {"pad_token": "[pad]"}, 0, "[pad]"),
    ],
)
def test_the_pad_token_is_a_real_one(words, roles, spare, pad):
    vocabulary = models.WordLevel({word: index for index, word in enumerate(words.split())}, unk_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), eos_token="</s>", **roles)
    choose_pad_token(tokenizer, len(tokenizer) + spare)
    assert tokenizer.pad_token == pad


def test_shapes_have_the_published_numbers_of_adapter_parameters():
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    published = {("llama2-7b", "control+lora"): 41_943_040, ("llama3-8b", "double control"): 33_554_432}
    for (shape, method), count in published.items():
        with init_empty_weights():
            base = LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPES[shape]))
            model = add_adapter(base, configuration(method, control_rank=64, lora_rank=32))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_smollm2_gguf_trains(call, train_llama, tmp_path):
    files = sorted(Path(os.environ.get("PARALLEL_CONTROL_CACHE", "nowhere"), "models").rglob("SmolLM2*.gguf"))
    if not files:
        pytest.skip("SmolLM2's GGUF file is not in PARALLEL_CONTROL_CACHE/models")
    shorter = ("--max_steps", 1, "--eval_steps", 1, "--held_out", 2, "--batch_size", 2, "--micro_batch_size", 2)
    train = partial(train_llama, *shorter)
    with warnings.catch_warnings(record=True) as warned:
        said = train("--model", files[0])
    assert not [str(warning.message) for warning in warned if "config" in str(warning.message)]
    assert said.record.model["total_parameters"] == 134_515_008
    assert "Converting and de-quantizing" not in said.err  # transformers' own bar
    assert "python -m LlaMA.convert --model" in said.err
    converting = ("--model", files[0], "--output_dir", tmp_path / "folder", "--dtype", "fp32")
    call("LlaMA.convert", *converting).finished()
    assert "is there already" in call("LlaMA.convert", *converting).refused()
    # which a GGUF file cannot be
    train("--model", tmp_path / "folder", "--quantization", "nf4", "--output_dir", tmp_path / "nf4").finished()
