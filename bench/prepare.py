"""Moved: python -m bench.cpu tokenization memory"""

if __name__ == "__main__":
    raise SystemExit("bench.prepare is now bench.cpu: python -m bench.cpu tokenization memory")
