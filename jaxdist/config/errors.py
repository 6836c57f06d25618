"""Errors that are the user's to mend. The command line prints them without a traceback and exits with 2."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what would work."""


class ConfigError(UserError):
    """Every mistake of a config at once; `problems` holds one line for each."""

    def __init__(self, problems: list[str], source: str = "config"):
        self.problems = problems
        self.source = source
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {p}" for p in problems)]))
