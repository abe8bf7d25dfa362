"""``python -m peft_control -m MODULE ...`` or ``python -m peft_control SCRIPT ...``

Registers CONTROL with peft, then runs the module or script as ``python`` itself would: for tools that import
only peft, for example ``python -m peft_control -m lm_eval --model_args pretrained=BASE,peft=ADAPTER ...``.
"""

import os
import runpy
import sys

import peft_control  # noqa: F401  registers the method

USAGE = "usage: python -m peft_control (-m MODULE | SCRIPT) [ARGUMENT ...]"


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{USAGE}")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise SystemExit(USAGE)
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
