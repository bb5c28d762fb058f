"""The typed run configuration, its loader, and one runnable file per model size."""
