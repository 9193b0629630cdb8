"""A module whose output is lost, as a shell can arrange it: -m tests.lost_output closed|full|left MODULE ARGUMENTS"""

import os
import runpy
import sys

if __name__ == "__main__":
    how, module, *arguments = sys.argv[1:]
    if how == "closed":
        os.close(1)
        sys.stdout = sys.__stdout__ = None  # pyright: ignore[reportAttributeAccessIssue] - as Python starts then
    else:
        if how == "full":
            lost = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, lost = os.pipe()
            os.close(reader)
        for descriptor in (1, 2):
            os.dup2(lost, descriptor)
        os.close(lost)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
