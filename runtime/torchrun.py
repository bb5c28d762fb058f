"""torchrun that leaves a stopped run ten minutes to save: python -m runtime.torchrun [torchrun's options] SCRIPT ...

torchrun passes a signal on to the processes, and kills those that have not ended 30 seconds later. torch 2.13 and newer
read another number of seconds from TORCH_ELASTIC_SHUTDOWN_TIMEOUT. Older versions have it as the default value of a
function. This launcher sets both; a value that the user has set is kept.
"""

import os

from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main

if __name__ == "__main__":
    seconds = os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    PContext.close.__defaults__ = (None, int(seconds))  # of death_sig and timeout
    main()
