"""Folders of the user, where a program keeps what is its own."""

import os
from pathlib import Path


def user_folder(variable: str, *below_home: str) -> Path:
    """Folder that an XDG variable names, or one below the user's home.

    Parameters
    ----------
    variable : str
        Such as "XDG_STATE_HOME"; a path in it that is not absolute does not count.
    below_home : str
        Where it is otherwise, such as ".local", "state".

    Raises
    ------
    RuntimeError
        If the variable names none, and this user has no home folder.
    """
    named = Path(os.environ.get(variable, ""))
    return named if named.is_absolute() else Path.home().joinpath(*below_home)
