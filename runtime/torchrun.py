"""torchrun for runs that save when they are stopped: python -m runtime.torchrun [torchrun's options] SCRIPT ...

It differs from torchrun in three things.

- A stopped run has ten minutes to save. torchrun passes a signal on to the processes, and kills those that have not
  ended 30 seconds later. torch 2.13 and newer read another number of seconds from TORCH_ELASTIC_SHUTDOWN_TIMEOUT. Older
  versions have it as the default value of a function. This launcher sets both; a value that the user has set is kept.
- SIGUSR1 stops a run, too. It would end torchrun, and the processes would go on alone.
- A failure is one line instead of torchrun's traceback, because the process that failed has already said why. The exit
  code is that of this process, and 128 plus the number of the signal for a run that was stopped.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"

if __name__ == "__main__":
    seconds = os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    PContext.close.__defaults__ = (None, int(seconds))  # of death_sig and timeout
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)  # the default of torchrun's option --signals_to_handle
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode  # minus the number of a signal that ended the process
        reason = f"was ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        print(f"torchrun: process {rank} {reason}; its messages, if it had any, are above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
