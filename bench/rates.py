"""Moved: python -m experiments.rates"""

if __name__ == "__main__":
    raise SystemExit("bench.rates is now experiments.rates: python -m experiments.rates")
