"""A process that is killed at one of its calls of the system."""

import functools
import itertools
import os


def killed_at(count, calls, action):
    """Whether a copy of this process that does ``action()`` was killed before its end.

    That is at its ``count``-th call, from 0, of the functions of `os` that ``calls`` names.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    try:
        numbers = itertools.count()

        def call(real, *args, **kwargs):
            if next(numbers) == count:
                os.kill(os.getpid(), 9)
            return real(*args, **kwargs)

        for name in calls:
            setattr(os, name, functools.partial(call, getattr(os, name)))
        action()
    finally:
        os._exit(0)
