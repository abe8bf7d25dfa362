"""What the experiments of every domain share: methods, run records, metering, checkpoints, devices and errors.

The method itself is `peft_control`; nothing in here is needed to use it.
"""
