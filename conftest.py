"""Settings of all tests."""

import logging
import sys
from pathlib import Path

# Several domains have a script of the same name; tests say which they mean: `from RoBERTa import finetune`.
sys.path.append(str(Path(__file__).parent))

# On CPUs with AVX512-BF16 bitsandbytes warns at import that an optional kernel package is absent; pytest would print
# what conftest files logged below its own closing line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
