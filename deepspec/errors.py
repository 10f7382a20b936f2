"""The one exception for a user's mistake: what was wrong, what was found, what to do, in one line."""


class DeepSpecError(Exception):
    """Raised for bad input. Entry points print its message on one line and exit with status 2."""
