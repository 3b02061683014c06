"""The error that a user can mend."""


class UserError(Exception):
    """Something that the user can mend. The message names the thing, its value and the remedy."""
