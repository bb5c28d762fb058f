"""The ground floor: command line, processes, files, streams and hardware. It imports nothing of this project."""
