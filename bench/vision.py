"""Moved: python -m experiments.vision"""

if __name__ == "__main__":
    raise SystemExit("bench.vision is now experiments.vision: python -m experiments.vision")
