"""The two ways a program of this project ends badly, and what each means to the person who started it."""


class InputError(ValueError):
    """What the caller gave is wrong: the message names the bad thing, what is allowed and the remedy (exit status 2)."""


class WorkError(RuntimeError):
    """The work itself failed, with everything finished so far intact (exit status 1): a full disk, a NaN."""
