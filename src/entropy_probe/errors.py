"""The one exception that means: the input is at fault, and this line says how."""


class InputError(ValueError):
    """Bad input, told in one line: what was found, what was expected, what to do.

    The command line prints the message alone and exits with 2; anything else that is raised is a fault of ours (exit 1).
    """


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of another library's message, or its type's name: what fits into a line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest]
