"""Several runs of the trainer in the same processes, under torchrun: sharded_runs.py MACHINES LINE ...

A line holds the arguments of a run, separated by blanks. The processes are divided over that many machines.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if os.environ.get("PATCH"):
    exec(Path(os.environ["PATCH"]).read_text())  # a fault that a test puts in

from config.load import load_config
from runtime.command import one_line
from runtime.distributed import start_world
from train_gpt import train_run


def main(machines: str, *lines: str) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(machines))
    with one_line("sharded_runs"), start_world("cpu") as world:
        for line in lines:
            config, *overrides = line.split()
            train_run(load_config(config, overrides), world, fresh=False, accept_changes=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
