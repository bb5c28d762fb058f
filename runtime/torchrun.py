"""torchrun for runs that save when they are stopped: python -m runtime.torchrun [torchrun's options] SCRIPT ...

It differs from torchrun in four things.

- A stopped run has ten minutes to save. torchrun passes a signal on to the processes, and kills those that have not
  ended 30 seconds later. torch 2.13 and newer read another number of seconds from TORCH_ELASTIC_SHUTDOWN_TIMEOUT. Older
  versions have it as the default value of a function. This launcher sets both; a value that the user has set is kept.
- If a process was killed, the others get 15 seconds to say which one is missing, before they are ended. After any
  failure they have at most 15 more seconds.
- SIGUSR1 stops a run, too. With torchrun it ends torchrun alone, and the processes go on without it.
- A failure is one line instead of torchrun's traceback, because the process that failed has already said why. The exit
  code is that of this process, and 128 plus the number of the signal for a run that was stopped.
"""

import os
import sys
import time
from typing import Any

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
LAST_WORDS = 15  # seconds
end_processes = PContext.close


def close(context: Any, death_sig: Any = None, timeout: int | None = None) -> None:
    """End the processes that torchrun has started, with a signal."""

    def codes() -> list[int | None]:
        return [handler.proc.poll() for handler in context.subprocess_handlers.values()]

    end = time.monotonic() + LAST_WORDS
    killed = any(code is not None and code < 0 for code in codes())
    while killed and None in codes() and time.monotonic() < end:
        time.sleep(0.1)
    patience = LAST_WORDS if any(codes()) else int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    end_processes(context, death_sig, patience)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    PContext.close = close  # type: ignore[assignment, method-assign]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)  # the default of torchrun's option --signals_to_handle
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ValueError as error:  # only for its own options; the programs are other processes
        sys.exit(f"torchrun: {error}")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode  # minus the number of a signal that ended the process
        reason = f"was ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        print(f"torchrun: process {rank} {reason}; its messages, if it had any, are above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
