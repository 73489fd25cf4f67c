"""The one error that users are meant to see."""


class UserError(Exception):
    """Bad input: one line that says which key or file, what is wrong and what is allowed."""
