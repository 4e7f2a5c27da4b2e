"""User error: the one exception that commands turn into a single line and exit code 2."""


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do about it."""
