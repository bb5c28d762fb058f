"""Moved: python -m experiments.sweep"""

import sys

if __name__ == "__main__":
    sys.exit("bench.sweep is now experiments.sweep: python -m experiments.sweep")
