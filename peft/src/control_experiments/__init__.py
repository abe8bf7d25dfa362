"""What the experiments of every domain share: methods, run records, metering, checkpoints, devices and errors.

The method itself is `peft_control`; nothing in here is needed to use it.
"""

import logging

# As soon as anything imports bitsandbytes it logs that an optional kernel for CPUs is absent.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda entry: not str(entry.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
