"""Set-up of the library's tests; helpers stand in ``tiny_models.py``."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

# pytest names this file peft.tests.conftest and for that puts our folder ./peft into sys.modules as "peft";
# put the installed upstream package there instead.
if getattr(sys.modules.get("peft"), "__file__", None) is None:
    sys.modules.pop("peft", None)
    importlib.import_module("peft")

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not: for tiny_models


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
