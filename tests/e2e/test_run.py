"""`sandmartin run`: the main job, with and without a running agent."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time

from tests.e2e.conftest import COMMAND, Place, agent


def test_run_starts_what_it_needs_and_leaves_nothing(place: Place) -> None:
    done = place.run("run", "--", "python3", "-c", "print(6*7)")
    assert (done.returncode, done.stdout) == (0, b"42\n"), done.stderr
    assert done.stderr == b""


def test_run_passes_on_what_goes_in_and_out(place: Place) -> None:
    data = place.path / "numbers.csv"
    data.write_text("n\n1\n2\n39\n")
    with agent(place) as running:
        upper = place.run("run", "--", "tr", "a-z", "A-Z", stdin=b"hi\n")
        assert (upper.returncode, upper.stdout) == (0, b"HI\n")
        assert place.run("run", "--", "sh", "-c", "exit 7").returncode == 7
        words = ["--file", f"{data}:/data/n.csv", "--env", "ADD=1", "--timeout", "60"]
        script = 'awk -v add=$ADD \'NR>1{s+=$1}END{print s+add; print "done" >"/dev/stderr"}\''
        summed = place.run("run", *words, "--", "sh", "-c", f"{script} /data/n.csv")
        assert (summed.stdout, summed.stderr) == (b"43\n", b"done\n")
        missing = place.run("run", "--", "no-such-command")
        assert missing.returncode == 126 and b"not found" in missing.stderr
        assert place.run("run", "-t", "nowhere", "--", "true").returncode == 125
        late = place.run("run", "--timeout", "1", "--", "sleep", "100")
        assert late.returncode == 128 + signal.SIGKILL
        assert place.run("ls", "--json").stdout == b"[]\n"
        place.run("ls")
        running.end()
    # It was idle: its slots are all it had.
    with agent(place) as again:
        _terminate(again.socket)


def _terminate(socket: object) -> None:
    url = "http://agent/hostagent.v1.HostAgentService/Terminate"
    command = ["curl", "-sS", "--unix-socket", str(socket), url, "-d", "{}"]
    subprocess.run([*command, "-H", "Content-Type: application/json"], check=True, timeout=60)


def test_ctrl_c_on_a_terminal_ends_the_command_and_leaves_nothing(place: Place) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        script = "trap 'echo caught; exit 9' INT; echo waiting; while :; do sleep 0.1; done"
        os.execve(COMMAND[0], [*COMMAND, "run", "--", "sh", "-c", script], place.environment)
    seen, until = b"", time.monotonic() + 60
    try:
        while b"waiting" not in seen and time.monotonic() < until:
            seen += os.read(terminal, 4096)
        os.write(terminal, b"\x03")
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:
                break
            seen += piece
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert b"caught" in seen, seen
    assert os.waitstatus_to_exitcode(status) == 9
