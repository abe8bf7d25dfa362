"""What the experiments of every domain share: methods, run records, metering, checkpoints, devices and errors.

The method itself is `peft_control`; nothing in here is needed to use it. Entry points import this package before any
other, because bitsandbytes logs, as soon as transformers is imported, that an optional kernel for CPUs is absent.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda entry: not str(entry.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
