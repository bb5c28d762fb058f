"""Each algorithm on one page, to be read first and copied: torch alone, one process, the paper's options.

The classes of the package have more options, compile, share the work over processes, and are faster.
"""
