"""Settings of all tests, and what those of several domains need."""

import gc
import json
import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The tests need no network and do not try any. Tiny models gain nothing from a second thread, and OpenMP's threads would not
# live on in the processes that tests fork.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

# Several domains have a script of the same name; tests say which they mean: `from RoBERTa import finetune`.
ROOT = str(Path(__file__).parent)
sys.path.append(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)

# On CPUs with AVX512-BF16 bitsandbytes warns at import that an optional kernel package is absent; pytest would print
# what conftest files logged below its own closing line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# A machine that is busy is no error.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    """Slow tests first, lest one of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """The million objects of what is imported are no garbage: going through them takes a sixth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic_no_longer():
    """--deterministic holds for a whole process, in which torch then fills each new tensor first: 8B of them take a minute."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(False)


_NOTING = """#!{python}
import json, sys
with open({notes!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


class Noting:
    """A stand-in for Python (a launcher's PYTHON) that only notes what it is to run.

    A test can then run that in its own process, which has imported what a new one would import for seconds.
    """

    def __init__(self, folder: Path):
        self.interpreter, self._notes = folder / "noting-python", folder / "noting-python.notes"
        self.interpreter.write_text(_NOTING.format(python=sys.executable, notes=str(self._notes)))
        self.interpreter.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """The script and the options of each call, in order."""
        return [json.loads(line) for line in self._notes.read_text().splitlines()]


@pytest.fixture
def noting(tmp_path) -> Noting:
    return Noting(tmp_path)
