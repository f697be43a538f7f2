"""The exit codes of the `sandmartin` command. They are a contract.

`run`, `exec` and `shell` pass on the exit code of their command, which is 128 + N when signal N
ended it. So that the two can be told apart, what goes wrong in these verbs themselves has the
codes that container tools use.
"""

from __future__ import annotations

FAILED = 1
USAGE = 2
#: Of those three: Sandmartin itself failed, or was used wrongly; the command may not have run.
RUN_FAILED = 125
#: Of those three: the command could not be started.
NOT_STARTED = 126
#: Added to a signal's number: 130 Ctrl-C, 141 nobody reads our output, 143 SIGTERM.
SIGNALLED = 128

EPILOG = """\
exit codes:
  0    success
  1    failure             2    wrong usage
  run, exec, shell: the command's own, 128 + N when signal N ended it, and of their own
  125  Sandmartin failed   126  the command could not be started
  130  Ctrl-C   141  nobody reads the output   143  SIGTERM
"""
