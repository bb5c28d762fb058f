"""Runs a command that ends with its parent: python experiments/tied.py PARENT COMMAND ...

PARENT is the id of the process that starts this. The command gets SIGTERM when the parent has ended, even by SIGKILL;
a trainer then saves its last step. Only Linux can do that; on other systems the command just runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h; exec keeps it


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            sys.exit("the parent process has ended")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
