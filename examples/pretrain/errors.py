"""What a person can mend: a sentence, and exit status 2."""


class UserError(Exception):
    """Names what is wrong, its value, and what is allowed or what to do."""
