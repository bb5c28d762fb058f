"""Moved: python -m bench.gpu"""

if __name__ == "__main__":
    raise SystemExit("bench.ladder is now bench.gpu: python -m bench.gpu")
