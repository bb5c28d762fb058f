"""The class of errors that a user can correct."""


class UserError(ValueError):
    """Something that the user gave cannot be used. The message says what it is, why not, and what to do.

    A program ends with this message alone. Any other error is taken for a bug, and keeps its traceback.
    """
