"""Moved: python -m experiments.vision"""

import sys

if __name__ == "__main__":
    sys.exit("bench.vision is now experiments.vision: python -m experiments.vision")
