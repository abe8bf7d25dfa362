"""A study on several GPUs: a process on each, started with the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from ..errors import UserError


def share_out(gpus: Sequence[str]) -> str | None:
    """Do what this process was started for, in a process on each of `gpus` (indices, cpu or all); or, if it is one, say which.

    Raises UserError: no GPU is visible, or one of the processes failed.
    """
    gpus = list(dict.fromkeys(gpus))
    if "all" in gpus:
        import torch  # which --help and a wrong option do not wait for

        gpus = [str(index) for index in range(torch.cuda.device_count())]
        if not gpus:
            raise UserError("no GPU is visible: add --gpus cpu to run on the CPU, or --dry_run to see the commands")
    if len(gpus) == 1:
        return gpus[0]
    codes = _run_all([[sys.executable, *sys.orig_argv[1:], "--gpus", gpu] for gpu in gpus])
    if failed := [gpu for gpu, code in zip(gpus, codes, strict=True) if code]:
        raise UserError(f"not all could be done on GPU {', '.join(failed)} (reasons above)")
    return None


def _run_all(commands: Sequence[Sequence[str]]) -> list[int]:
    """The exit codes of commands that are run at once.

    When this process is asked to end, each command is, with all that it started, and its end is waited for: it may save its state.
    """
    processes: list[subprocess.Popen] = []
    try:
        processes += (subprocess.Popen(command, start_new_session=True) for command in commands)
        return [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait()
        raise
