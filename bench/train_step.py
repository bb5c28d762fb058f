"""Moved: python -m bench.cpu training exact loop loader start"""

if __name__ == "__main__":
    raise SystemExit("bench.train_step is now bench.cpu: python -m bench.cpu training exact loop loader start")
