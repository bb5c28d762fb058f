"""Moved: python -m experiments.sweep"""

if __name__ == "__main__":
    raise SystemExit("bench.sweep is now experiments.sweep: python -m experiments.sweep")
