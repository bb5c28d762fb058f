"""Moved: python -m bench.cpu generation"""

if __name__ == "__main__":
    raise SystemExit("bench.generation is now bench.cpu: python -m bench.cpu generation")
