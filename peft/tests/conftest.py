"""Set-up of the library's tests; helpers stand in ``tiny_models.py``."""

import importlib
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch
import transformers

# pytest names this file peft.tests.conftest and for that puts our folder ./peft into sys.modules as "peft";
# put the installed upstream package there instead.
if getattr(sys.modules.get("peft"), "__file__", None) is None:
    sys.modules.pop("peft", None)
    importlib.import_module("peft")

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not: for tiny_models


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers computes RMSNorm in float32 whatever the model's dtype; in float64 here, for comparison."""

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normal).to(x.dtype)

    for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        module = getattr(transformers.models, family.lower())
        cls = getattr(getattr(module, f"modeling_{family.lower()}"), f"{family}RMSNorm")
        monkeypatch.setattr(cls, "forward", FunctionType(forward.__code__, forward.__globals__))
        cls.forward.__module__ = cls.__module__  # as if transformers had written it
