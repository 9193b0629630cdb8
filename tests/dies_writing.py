"""The command line, which dies when it has half written a file: -m tests.dies_writing NAME train CONFIG --run RUN …"""

import os
import sys
from pathlib import Path

from trainer import cli, files

if __name__ == "__main__":
    write, name = files.write, sys.argv.pop(1)

    def die(path: Path, content: str | bytes) -> None:
        if path.name == name:
            path.with_name(f".{name}.0123abcd.partial").write_text("half", encoding="utf-8")
            os._exit(9)
        write(path, content)

    files.write = die
    cli.main()
