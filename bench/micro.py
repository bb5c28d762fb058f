"""Moved: python -m bench.parts"""

if __name__ == "__main__":
    raise SystemExit("bench.micro is now bench.parts: python -m bench.parts")
