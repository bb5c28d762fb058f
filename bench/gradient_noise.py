"""Moved: python -m experiments.gradient_noise"""

if __name__ == "__main__":
    raise SystemExit("bench.gradient_noise is now experiments.gradient_noise: python -m experiments.gradient_noise")
