"""Moved: python -m bench.cpu optimizers matrices"""

if __name__ == "__main__":
    raise SystemExit("bench.optimizer_step is now bench.cpu: python -m bench.cpu optimizers matrices")
