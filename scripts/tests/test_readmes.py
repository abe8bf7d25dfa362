"""Every command of every README and of the scripts' own help, and every launcher's defaults.

Commands run for real up to the Python script: the interpreter (and torchrun, accelerate) only notes how it is called. Each
call is then parsed by the script's own options, so that a renamed option or a value of the wrong type fails here, and run in
this process in its smallest form (smallest.py).
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.record import read_json
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.study import Cell
from LlaMA.study import CommonsenseStudy
from LlaMA.tests.conftest import data, model_folder, rows, tokenizer  # noqa: F401
from RoBERTa.encoder import QUERY_VALUE
from RoBERTa.tests.conftest import encoders, write_glue  # noqa: F401
from scripts.tests.smallest import ONLY_PARSED, SMALL, Runner, import_script
from ViT.tests.conftest import base_model, npz  # noqa: F401

READMES = sorted(path for path in REPOSITORY.glob("*/README.md") if not path.parent.name.startswith("."))
READMES = [REPOSITORY / "README.md", *READMES]
RECIPES = read_json(RESULTS / "paper.json")["recipes"]
#: Run for real by test_commands.py (they make environments), or no command of this project.
ELSEWHERE = ("bash scripts/quickstart.sh", "bash scripts/test.sh", "pip install ", "python -m peft_control ", "transformers ",
             "apt ", "git ")  # fmt: skip


def commands() -> list:
    """Every line of every bash block, without comments and usage lines such as `run.sh METHOD [GPU]`."""
    found = []
    for readme in READMES:
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+#.*", "", line).strip()
                if text and not text.startswith(("#", *ELSEWHERE)) and not re.search(r"\[|…|\.\.\.", text):
                    found.append(pytest.param(text, id=f"{readme.parent.name}: {text[:60]}"))
    return found


def shown_by_scripts() -> list:
    """The commands at the heads of scripts (which --help prints) and launchers; what follows two blanks says what they do."""
    found = []
    for folder in ("scripts", "RoBERTa", "ViT", "LlaMA", "QControl"):
        for script in sorted((REPOSITORY / folder).glob("*.*")):
            if script.suffix == ".py":
                head, sign = script.read_text().partition('"""\n\nfrom ')[0], "    "
            elif script.suffix == ".sh":
                head, sign = script.read_text().partition("\nset -euo")[0], r"#\s+"
            else:
                continue
            for line in re.findall(rf"^{sign}((?:[A-Z_]+=\S+ )*(?:python|bash|torchrun) .*)", head, re.M):
                text = re.split(r"\s{2,}", line)[0].strip()
                usage = re.search(r"\[|\.\.\.|\b(GPU|METHOD|CONTROL_RANK|FOLDER METHOD)\b", text)
                if not usage and not text.startswith(ELSEWHERE):
                    found.append(pytest.param(text, id=f"{folder}/{script.name}: {text[:60]}"))
    return found


#: Each command once, however many places show it.
COMMANDS = {parameter.values[0]: parameter for parameter in (*commands(), *shown_by_scripts())}


def script_and_arguments(call: list[str]) -> tuple[Path, list[str]]:
    """The Python script of a call of python, torchrun or accelerate launch, and what is passed on to it."""
    place = call.index("-m") + 1
    return REPOSITORY / (call[place].replace(".", "/") + ".py"), call[place + 1 :]


def parsed(call: list[str]):
    """The script's options as the call sets them."""
    path, arguments = script_and_arguments(call)
    assert path.is_file(), f"{path} does not exist"
    script = import_script(path)
    (options,) = parse_arguments(script.Options, argv=arguments)
    return options


@pytest.fixture(scope="module")
def runner(tmp_path_factory, encoders, data, model_folder, base_model, npz):  # noqa: F811
    glue = tmp_path_factory.mktemp("glue")
    for folder in ("CoLA", "RTE", "MNLI"):
        write_glue(glue, folder)
    vit = f"--data {npz} --model {base_model} --architecture test_vit --image_size 32"
    inputs = {"encoder": encoders["roberta"], "glue": glue, "llama": model_folder, "questions": data, "images": npz, "vit": vit}
    return Runner(tmp_path_factory.mktemp("commands"), **inputs)


@pytest.mark.parametrize("command", COMMANDS.values())
def test_commands_run_in_their_smallest_form(command, noted, runner):
    """Each is parsed as it stands; then the script runs here, small. ONLY_PARSED says which do not, and why.

    What torchrun and accelerate start runs as one process; the domains' tests run it as several.
    """
    calls = noted(command.replace(".venv/bin/python", "python"))
    assert calls, "nothing was run"
    for call in calls:
        path, arguments = script_and_arguments(call)
        name = path.relative_to(REPOSITORY).as_posix()
        if name != "scripts/download_models.py":  # which has no options
            options = parsed(call)
            if name == "RoBERTa/finetune.py":
                options.check()
        if name in SMALL:
            with pytest.MonkeyPatch.context() as patch:
                runner.run(path, arguments, patch)
        else:
            assert name in ONLY_PARSED


def test_no_readme_script_or_launcher_is_forgotten():
    assert {path.parent.name for path in READMES} >= {"RoBERTa", "ViT", "LlaMA", "peft", "results"}
    assert all((REPOSITORY / script).is_file() for script in (*SMALL, *ONLY_PARSED))
    run = " ".join(COMMANDS)
    launchers = [path for folder in ("RoBERTa", "ViT", "LlaMA", "QControl") for path in (REPOSITORY / folder).glob("*_*.sh")]
    missing = [path.name for path in launchers if f"{path.parent.name}/{path.name}" not in run]
    assert not missing, "no README or help shows a command with the launcher"


# -- launchers' defaults ----------------------------------------------------------------------------------------


def assert_recipe(options, recipe: dict) -> None:
    for name, value in recipe.items():
        if name in vars(options) and getattr(options, name) is not None:
            assert getattr(options, name) == value, f"{name}: {getattr(options, name)!r}, the paper has {value!r}"


#: Methods by the names that QControl's users know.
QUANTIZED = {"control": "QControl", "lora": "QLoRA", "dora": "QDoRA"}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize(
    ("domain", "command", "own"),
    [
        ("roberta", "RoBERTa/run_roberta.sh {method} cola", {"task": "cola"}),
        ("vit", "ViT/run_ViT.sh {method} 0", {"mlp_layers": 4}),  # the script's own default is the ordinary ViT
        ("qcontrol", "QControl/run_roberta_quantization.sh {quantized} rte 320 4e-4 0", None),
    ],
)
def test_defaults_are_the_papers(domain, command, own, method, noted):
    (call,) = noted(f"bash {command.format(method=method, quantized=QUANTIZED[method])}")
    options, recipe = parsed(call), RECIPES[domain]
    if domain == "qcontrol":
        recipe = {**RECIPES["roberta"], **recipe["rte"], "batch_size": recipe["batch_size"]}
    assert_recipe(options, recipe)
    assert options.method == method
    assert own is None or options == type(options)(method=method, **own), "launcher and script have different defaults"
    assert QUERY_VALUE["roberta"] == RECIPES["roberta"]["lora_targets"]  # of --lora_targets not given


@pytest.mark.parametrize("base", ["llama2_7B", "llama3_8B"])
@pytest.mark.parametrize(("launcher", "method"), [("Control+LoRA", "control+lora"), ("DoubleControl", "double control")])
def test_llama_defaults_are_the_papers(base, launcher, method, noted):
    train, evaluate = noted(f"bash LlaMA/{base}_{launcher}.sh 64 32 64 OUT 0")
    recipe = {**RECIPES["llama"], **RECIPES[base]}
    if method == "control+lora":
        recipe["batch_size"] = recipe.get("batch_size_control_lora", recipe["batch_size"])
    options = parsed(train)
    assert_recipe(options, recipe)
    assert (options.method, options.memory, options.output_dir) == (method, "plain", "OUT")
    answers = parsed(evaluate)
    assert_recipe(answers, {name: recipe[name] for name in ("model", "beams", "max_new_tokens", "control_rank", "lora_rank")})
    assert (answers.adapter, answers.method) == ("OUT/adapter", method)
    (call,) = noted(f'bash LlaMA/{base}_Evaluate.sh 64 32 64 OUT 0 "{method}"')
    assert parsed(call) == answers


def test_rerun_scripts_start_from_the_papers_recipes(noted):
    """And from what the domains' launchers say."""
    for table, launcher in (
        ("glue", "RoBERTa/run_roberta.sh control rte 80"),
        ("quantized", "QControl/run_roberta_quantization.sh control rte 320"),
        ("vit", "ViT/run_ViT.sh control 0"),
    ):
        study, run = (parsed(noted(f"bash {command}")[0]) for command in (f"scripts/rerun_{table}.sh", launcher))
        for name in vars(study).keys() & vars(run).keys() - {"data", "epochs", "task", "seed", "resume"}:
            assert getattr(study, name) == getattr(run, name), (table, name)
        epochs = study.epochs if table == "vit" else study.epochs_of("rte")
        assert epochs == run.epochs and study.methods == ["control", "lora", "dora"] and study.gpus == ["all"]
        if table == "glue":
            assert study.epochs_of("cola") == RECIPES["roberta"]["epochs"]


def test_commonsense_is_rerun_with_the_launchers_recipes(noted):
    methods = {"control+lora": "Control+LoRA", "double control": "DoubleControl"}
    calls = noted("bash scripts/rerun_commonsense.sh")
    for base, call in zip(("llama2_7B", "llama3_8B"), calls, strict=True):
        study = CommonsenseStudy(parsed(call))
        assert study.options.generate == "all" and study.options.gpus == ["all"]
        assert [arm.method for arm in study.arms] == ["control+lora", "double control", "lora", "dora", "zero-shot"]
        for arm in study.arms[:2]:
            run = study.plan(Cell(study.tasks[0], arm, 42, study.options.lr, False))
            train, _ = noted(f"bash LlaMA/{base}_{methods[arm.method]}.sh 64 32 64 OUT 0")
            own = {"output_dir": "OUT", "resume": False, "token_budget": None}
            assert run.budget == parsed(train).budget and replace(run, **own) == parsed(train)
