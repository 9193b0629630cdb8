"""A command of the fuzz, in a process forked for it: `-m tests.fuzzed_command HOW ARGUMENTS`."""

import ctypes
import io
import json
import os
import sys


def become_ordinary() -> None:
    """Give up root's right to pass every mode: with a file's owner it has its mode, as for anybody."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # linux/capability.h: version 3, of this process
        if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError("capset")


def main() -> None:
    """Run the command as HOW says: {"output": "full" or "closed", "encoding": that of its terminal}."""
    how = json.loads(sys.argv.pop(1))
    become_ordinary()
    if how.get("output") == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif how.get("output") == "closed":
        os.close(1)
    if encoding := how.get("encoding"):
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            stream = io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), encoding=encoding, write_through=True)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    from trainer import cli

    cli.main()


if __name__ == "__main__":
    main()
