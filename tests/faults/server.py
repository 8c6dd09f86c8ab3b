"""Starts each run in a fork of a process that has already imported everything.

Reads a JSON list from each line of the standard input, the arguments after `python -m
xmixup_jax.main` and the file for the output, last; answers with the process's number, and with
its exit code once it has ended (minus a signal's number).
"""

import json
import os
import sys

from xmixup_jax.cli import program, train

assert train  # imports everything that a run needs


def run(arguments: list[str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    program.main(['train', *arguments])
    sys.stdout.flush()
    os._exit(0)


if __name__ == '__main__':
    for line in sys.stdin:
        *arguments, log = json.loads(line)
        process = os.fork()
        if not process:
            run(arguments, log)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
