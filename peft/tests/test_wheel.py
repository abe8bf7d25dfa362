"""What ``pip wheel ./peft`` and ``pip install -e ./peft`` give, built by the same backend without network."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import peft_control

DISTRIBUTION = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, in which building leaves its traces."""
    copy = tmp_path_factory.mktemp("source") / "peft"
    leave = shutil.ignore_patterns("tests", "__pycache__", "*.egg-info", "build")
    return Path(shutil.copytree(DISTRIBUTION, copy, ignore=leave))


def build(source: Path, kind: str, folder: Path) -> zipfile.ZipFile:
    done = subprocess.run([sys.executable, "-c", BUILD, kind, folder], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(source, tmp_path):
    wheel = build(source, "build_wheel", tmp_path)
    info = f"peft_control-{peft_control.__version__}.dist-info"
    names = {name for name in wheel.namelist() if not name.startswith(f"{info}/")}
    package = source / "src" / "peft_control"
    files = {f"peft_control/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()}
    assert names == files and {"peft_control/py.typed", "peft_control/modeling_control.py"} <= names
    licence = (DISTRIBUTION.parent / "LICENSE").read_text(encoding="utf-8")
    assert wheel.read(f"{info}/licenses/LICENSE").decode() == licence
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == peft_control.__version__ and metadata["License-Expression"] == "MIT"
    assert metadata["Author"] and "proceedings.mlr.press" in metadata["Project-URL"]
    assert set(metadata.get_all("Provides-Extra")) == {"gpu", "quantization"}
    ranges = {re.split("[<>=]", line)[0]: line for line in metadata.get_all("Requires-Dist") if "extra" not in line}
    assert ranges.keys() == {"torch", "transformers", "peft", "psutil"}
    assert "<0.22" in ranges["peft"] and "<6" in ranges["transformers"]


@pytest.mark.slow
def test_an_editable_install_finds_the_experiments_too(source, tmp_path):
    wheel = build(source, "build_editable", tmp_path)
    (path,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    assert wheel.read(path).decode().strip() == str(source / "src")
    assert (source / "src" / "control_experiments" / "__init__.py").exists()
