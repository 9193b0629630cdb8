"""A module as `nohup` and the background of a script start it: -m tests.ignoring MODULE ARGUMENTS

What starts a process decides which signals it ignores: these two, here and in all that it starts.
"""

import runpy
import signal
import sys

if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
