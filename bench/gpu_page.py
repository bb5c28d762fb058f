"""Moved: python -m bench.page"""

if __name__ == "__main__":
    raise SystemExit("bench.gpu_page is now bench.page: python -m bench.page")
