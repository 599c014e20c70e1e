"""Runs a command on a terminal of its own and answers its question, as a person would.

Usage: answer.py QUESTION ANSWER COMMAND [ARGUMENT ...]. When QUESTION has been shown, ANSWER is typed, once. Prints what
the terminal has shown, and exits as the command does.
"""

import os
import pty
import signal
import sys

question, answer, *command = (os.fsencode(argument) for argument in sys.argv[1:])
child, terminal = pty.fork()
if child == 0:
    os.execv(command[0], command)
# A command that neither asks nor ends is killed with its terminal.
signal.alarm(30)
shown, is_answered = b"", False
while True:
    try:
        some = os.read(terminal, 4096)
    except OSError:  # EIO: the other end is closed.
        some = b""
    if not some:
        break
    shown += some
    if question in shown and not is_answered:
        os.write(terminal, answer)
        is_answered = True
_, status = os.waitpid(child, 0)
sys.stdout.buffer.write(shown)
sys.stdout.flush()
sys.exit(os.waitstatus_to_exitcode(status))
