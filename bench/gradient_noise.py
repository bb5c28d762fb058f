"""Moved: python -m experiments.gradient_noise"""

import sys

if __name__ == "__main__":
    sys.exit("bench.gradient_noise is now experiments.gradient_noise: python -m experiments.gradient_noise")
