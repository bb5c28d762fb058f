"""Moved: python -m experiments.rates"""

import sys

if __name__ == "__main__":
    sys.exit("bench.rates is now experiments.rates: python -m experiments.rates")
