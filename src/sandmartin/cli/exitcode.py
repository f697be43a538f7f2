"""The exit codes of the `sandmartin` command. They are a contract.

`run` passes on the exit code of its command, which is 128 + N when signal N ended it. So that
the two can be told apart, what goes wrong in `run` itself has the codes that container tools use.
"""

from __future__ import annotations

FAILED = 1
USAGE = 2
#: `run`: Sandmartin itself failed, or was used wrongly; the command may not have run at all.
RUN_FAILED = 125
#: `run`: the command could not be started.
NOT_STARTED = 126
#: Added to a signal's number: 130 Ctrl-C, 141 nobody reads our output, 143 SIGTERM.
SIGNALLED = 128

EPILOG = """\
exit codes:
  0    success
  1    failure             2    wrong usage
  run: the command's own, 128 + N when signal N ended it, and of its own
  125  Sandmartin failed   126  the command could not be started
  130  Ctrl-C   141  nobody reads the output   143  SIGTERM
"""
