"""Moved: python -m training.plot"""

import sys

if __name__ == "__main__":
    sys.exit("runtime.plot is now training.plot: python -m training.plot")
