"""What finetune.py does alike in every domain, what its adapters' cards say, and what every launcher says of itself."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from control_experiments.paths import REPOSITORY
from control_experiments.record import read_record
from LlaMA.tests.conftest import assert_same_adapters, data, interrupted, model_folder, rows, tokenizer, train_llama  # noqa: F401
from peft_control.export import export
from RoBERTa.tests.conftest import encoders, glue_folder, train_roberta  # noqa: F401
from ViT.classifier import restore
from ViT.tests.conftest import base_model, npz, train_vit  # noqa: F401


@pytest.fixture
def train(request, domain):
    """``train("--lr", 1)``: a tiny run of the domain into tmp_path/"run", or where the last --output_dir says."""
    if domain == "qcontrol":
        return partial(request.getfixturevalue("train_roberta"), "--quantization", "nf4")
    return request.getfixturevalue(f"train_{domain}")


@pytest.mark.parametrize(
    ("domain", "more"), [("roberta", ()), ("qcontrol", ()), ("vit", ()), ("vit", ("--optimizer", "adamw")), ("llama", ())]
)
def test_a_killed_run_resumes_to_the_same_bits(train, more, tmp_path):
    train = partial(train, *more, "--lr", 0.01)
    assert train("--output_dir", tmp_path / "whole").record.time["resumed_from_step"] is None
    with interrupted(5):
        assert train().code == 130
    assert "add --resume" in train().refused()
    assert "lr 0.01 there, 1.0 asked for" in train("--resume", "--lr", 1).refused()
    record = train("--resume").record
    assert record.time["resumed_from_step"] in (3, 4)
    assert_same_adapters(tmp_path / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    text = (tmp_path / "run" / "record.json").read_text()
    assert str(tmp_path) not in text and f"{Path.home()}/" not in text

    assert "is finished" in train().finished().out
    assert "lr 0.01 there, 0.02 asked for" in train("--lr", 0.02).refused()
    assert read_record(tmp_path / "run" / "record.json") == record


@pytest.mark.parametrize(
    ("domain", "more", "close"),
    [
        ("roberta", ("--epochs", 1), 1e-5),  # dropout included: every mode draws what plain draws
        ("qcontrol", ("--max_steps", 3), 2e-4),
        ("vit", ("--mlp_layers", 2), 1e-5),
        ("vit", ("--mlp_layers", 4), 1e-5),
        ("llama", ("--lora_dropout", 0, "--lr", 1e-3), 1e-4),
    ],
)
def test_memory_modes_train_alike(train, domain, more, close, tmp_path):
    """--cuda_graphs replays packs of fixed shape on a GPU; here they run as they are."""
    states, tokens = [], set()
    hows = [f"--memory {mode}" for mode in ("plain", "fast", "balanced", "lean")]
    for how in [*hows, *(["--gradient_checkpointing", "--cuda_graphs"] if domain == "llama" else [])]:
        record = train(*more, *how.split(), "--output_dir", tmp_path / how).record
        assert f"--memory {record.hyperparameters['memory']}" == (how if how in hows else hows[0])
        tokens.add(record.time.get("real_tokens"))
        states.append(load_file(tmp_path / how / "adapter" / "adapter_model.safetensors"))
        torch.testing.assert_close(states[-1], states[0], rtol=1e-3, atol=close)
    assert len(tokens) == 1


BAD = {
    "roberta": [
        ("--method adapter", "unknown method 'adapter': choose one of control, lora, dora"),
        ("--task snli", "unknown task 'snli'"),
        ("--precision fp16", "fp16 needs a GPU"),
        ("--device gpu", "GPU must be an index"),
        ("--control_blocks memory", "memory"),
        ("--method lora --lora_targets nowhere", "nowhere"),
        ("--data /nonexistent", "no data for cola"),
        ("--lora_alpha inf", "--lora_alpha must be a finite number"),
        ("--seed 4294967296", "--seed must be at most 4294967295"),
        ("--max_length 131", "more than {bert} can read (130 tokens)"),
        ("--task demo --predict", "no test set"),
        ("--model {tmp}", "no model folder: it has no config.json"),
        ("--model {tmp}/nowhere", "there is no model at {tmp}/nowhere"),
        ("--output_dir=", "the output folder's name is empty"),
        ("--lr -1e-3", "--lr must be greater than 0, got -0.001"),
    ],
    "vit": [
        ("--data {tmp}/set", "bad.jpg is no readable image"),
        ("--data nowhere", "no data"),
        ("--data {tmp}/notes.txt", "is no .npz"),
        ("--image_size 40", "40 is not divisible by the patch size 16 of test_vit: choose 32 or 48"),
        ("--architecture resnet18", "no timm VisionTransformer"),
        ("--architecture vit_smal_patch16_224", "no timm VisionTransformer"),
        ("--architecture vit_tiny_patch16_224", "weights of another architecture"),
        ("--model {tmp}/none.safetensors", "there is no model"),
        ("--model {tmp}/text.safetensors", "is broken or holds weights of another"),
        ("--device 7", "no GPU 7"),
        ("--lr fast", "invalid float value"),
        ("--crop 0", "--crop must be greater than 0, got 0"),
        ("--method probe --lr_head 1", "--lr_head is for methods with an adapter"),
        ("--warmup_steps 2", "--warmup_steps is for --optimizer adamw"),
        ("--method lora --memory fast", "--memory fast: memory modes need a frozen MLP"),
        ("--predict {tmp}", "needs --adapter"),
        ("--evaluate {tmp}", "no adapter folder"),
        ("--validation_share 0 --output_dir {tmp}/learning_rate_search", "--validation_share must be greater than 0, got 0.0"),
        ("--validation_share 0.1 --output_dir {tmp}/run", "--output_dir below a folder named learning_rate_search"),
        ("--validation_share 0.1 --evaluate {tmp}", "is for training"),
    ],
    "llama": [
        ("--ranks 3", "unknown argument"),
        ("--control_rank 0", "--control_rank must be at least 1"),
        ("--data nowhere.json", "cannot read nowhere.json"),
        ("--model ./nowhere", "there is no model at ./nowhere"),
        ("--batch_size 6", "multiple of --micro_batch_size"),
        ("--token_budget 8", "--token_budget 8 must be at least --cutoff"),
        ("--lora_targets q_proj vproj", "no module 'vproj' for LoRA"),
        ("--cutoff 1", "no training row has a token to learn within --cutoff 1"),
        ("--held_out 64", "--held_out 64"),
        ("--attention varlen", "--attention varlen needs"),
        ("--max_steps 0", "--max_steps must be at least 1, or -1 for no limit, got 0"),
        ("--optimizer paged_adamw_8bit", "--optimizer paged_adamw_8bit needs a GPU"),
        ("--cuda_graphs --batching padded", "needs packed rows"),
        ("--cuda_graphs --gradient_checkpointing", "choose one of the two"),
        *[
            (f"--stream_weights True {more}", f"--stream_weights does not go together with {more}")
            for more in ("--memory fast", "--cuda_graphs", "--quantization int8", "--method shadow")
        ],
    ],
    "qcontrol": [
        ("--quantization int3", "invalid choice: 'int3'"),
        ("--method dora --quantization int8", "dora over int8 needs a GPU"),
    ],
}


@pytest.mark.parametrize(("domain", "words", "message"), [(domain, *case) for domain in BAD for case in BAD[domain]])
def test_bad_input_is_one_line_and_leaves_nothing(train, encoders, tmp_path, words, message):  # noqa: F811
    named = {"tmp": tmp_path, "bert": encoders["bert"]}
    for split in ("train", "test"):
        (tmp_path / "set" / split / "one").mkdir(parents=True)
        (tmp_path / "set" / split / "one" / "bad.jpg").write_bytes(b"no image")
    for name in ("notes.txt", "text.safetensors"):
        (tmp_path / name).write_text("hello")
    assert message.format(**named) in train(*words.format(**named).split()).refused()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["RoBERTa.finetune", "RoBERTa.study", "LlaMA.study", "ViT.finetune", "ViT.small_table"])
def test_help_says_where_runs_go(call, program):
    assert "Default: results/" in " ".join(call(program, "--help").finished().out.split())


# -- adapters' cards ----------------------------------------------------------------------------------------------


def loaded_as_the_card_says(record, adapter: Path, base: str, **places) -> dict:
    """What the lines that a reader of the card would copy define, once `places` stand for the names in them."""
    card = ModelCard.load(adapter / "README.md")
    assert card.data.base_model == base and str(adapter.parents[1]) not in card.content
    assert f"{record.adapter['trainable_parameters']:,} of" in card.text and "rank" in card.text
    (lines,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for shown, place in {re.search(r"\"(results/.*)\"", lines)[1]: str(adapter), **places}.items():
        lines = lines.replace(shown, place)
    exec(lines, loaded := {})
    return loaded


@pytest.mark.parametrize(
    ("method", "task", "labels"), [("control", "mnli", ["entailment", "neutral", "contradiction"]), ("lora", "stsb", ["score"])]
)
def test_a_text_adapters_card_loads_it_and_it_is_exported(train_roberta, tmp_path, method, task, labels):  # noqa: F811
    record, adapter = train_roberta("--method", method, "--task", task, "--max_steps", 1).record, tmp_path / "run" / "adapter"
    loaded = loaded_as_the_card_says(record, adapter, "bert")
    assert list(loaded["model"].config.id2label.values()) == labels
    assert loaded["tokenizer"]("the cat")["input_ids"]
    if method == "control":
        config = export(str(adapter), tmp_path / "exported").config
        assert [*config.id2label.values()] == labels
        assert config.label2id == {name: label for label, name in enumerate(labels)}


@pytest.mark.parametrize("mlp_layers", [2, 4])
def test_an_image_adapters_card_loads_it(train_vit, base_model, tmp_path, mlp_layers):  # noqa: F811
    record, adapter = train_vit("--epochs", 1, "--mlp_layers", mlp_layers).record, tmp_path / "run" / "adapter"
    base = f"{base_model.parent.name}/model.safetensors"
    loaded = loaded_as_the_card_says(record, adapter, base, **{base: str(base_model)})
    assert loaded["classes"] == ["red", "green", "blue"]
    again, _, _ = restore(adapter, model=str(base_model))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded["model"].eval()(images), again.eval()(images))


# -- launchers ----------------------------------------------------------------------------------------------------

LAUNCHERS = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("[RVLQ]*/*_*.sh"))


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_and_too_few_arguments_print_the_usage(launch, script):
    done = launch(script)
    assert done.code == 2 and re.search("usage: bash|are needed|bash .*GPU", done.err + done.out)
    done = launch(script, "--help")
    assert (done.code, done.err) == (0, "") and f"bash {script} " in done.out
    assert "llama" not in script.lower() or ("  MODEL=" in done.out and "  DATA=" in done.out)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("ViT/run_ViT.sh", "control"),
        ("LlaMA/llama3_8B_DoubleControl.sh", "64 32 64 out"),
        ("LlaMA/llama3_8B_Evaluate.sh", "64 32 64 out cpu"),
    ],
)
def test_an_option_does_not_stand_for_the_argument_before_it(launch, script, words):
    done = launch(script, *words.split(), "--seed", 1)
    assert done.code == 2 and re.search("usage: bash .* GPU|METHOD and GPU are missing", done.err)


@pytest.mark.parametrize(
    ("launcher", "table", "words", "named", "changed"),
    [
        ("RoBERTa/run_roberta.sh", "glue", "rte 1 1e-3 cpu", "roberta_rte", ("--epochs 7", "has epochs 1.0, not 7.0")),
        ("QControl/run_roberta_quantization.sh", "quantized", "rte 1 1e-3 cpu", "roberta_nf4_rte", ("--epochs 7", "not 7.0")),
        ("ViT/run_ViT.sh", "vit", "cpu --image_size 32", "vit_colors", ("--mlp_layers 2", "has mlp_layers 4, not 2")),
    ],
)
def test_a_table_counts_the_launchers_runs(
    call, started, encoders, glue_folder, base_model, npz, tmp_path, launcher, table, words, named, changed  # noqa: F811
):  # fmt: skip
    """The same recipe, variables and names, whoever started the run."""
    about = {"MODEL": encoders["roberta"], "DATA": glue_folder, "BATCH_SIZE": 8, "CONTROL_RANK": 4, "EPOCHS": 1, "LR": "1e-3"}
    more = ("--tasks", "rte")
    if table == "vit":
        shutil.copytree(base_model.parent, tmp_path / "vit")
        about = {"MODEL": tmp_path / "vit", "ARCHITECTURE": "test_vit", "DATA": npz, "EPOCHS": 1, "BATCH": 16}
        more = ("--image_size", 32)
    run_folder = tmp_path / f"{named}_control_seed5"
    ((program, *options),) = started(launcher, "control", *words.split(), "--seed", 5, "--output_dir", run_folder, **about)
    call(program, *options).finished()
    asked = ("--methods", "control", "lora", "--seeds", 5, "--gpus", "cpu", "--output_dir", tmp_path, *more)
    (study,) = started(f"scripts/rerun_{table}.sh", *asked, **about)
    (line,) = call(*study, "--dry_run").finished().out.splitlines()
    assert line.startswith(f"python -m {program} ") and " --method lora " in line
    assert call(*study).finished().out.endswith("all 2 runs are finished\n")
    assert call(*study, "--dry_run").finished().out == ""
    assert changed[1] in call(*study, *changed[0].split()).refused()
