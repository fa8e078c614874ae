"""Checks that work, fail, die and hang. Processes that run them import this module, which imports nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def works() -> str:
    print("not for people")
    return f"yes, in {os.getpid()}"


def fails() -> str:
    raise OSError("no such thing\nand more")


def leaves() -> str:
    sys.exit("never mind")


def dies() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "survived"


def hangs() -> str:
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
    return "woke up"


def lacks_a_package() -> str:
    raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
