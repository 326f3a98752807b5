"""What a user can cause and mend: a command prints it as one line, without a traceback."""


class UserError(ValueError):
    """Its message says where, what was given, what is needed and what to do."""
