"""A ladder's report: one JSON tree, and what people see of it: a page, pictures, a terminal, a run in W&B.

OUT/report.json    the tree (build.py); `without_execution` of it is a function of the runs' results alone
OUT/report.html    one page, pictures included
OUT/NAME.png       each picture
"""

import json
import sys
from pathlib import Path

from trainer import files
from trainer.ladder.plan.ladder import Ladder
from trainer.ladder.report import page, summary_run
from trainer.ladder.report.build import build_report, collect_ladder, without_execution
from trainer.ladder.report.estimates import Tree
from trainer.ladder.report.page import Picture, html
from trainer.ladder.report.terminal import terminal

__all__ = ["PAGE", "build_report", "collect_ladder", "html", "make", "terminal", "without_execution", "write"]

PAGE = "report.html"


def make(ladder: Ladder, out: Path) -> Tree:
    """Read a ladder's runs, write its report into OUT, show it in W&B, and return it. Starts and changes no run.

    Raises RunDirectoryError if OUT is another ladder's.
    """
    tree = build_report(collect_ladder(ladder, out))
    drawn = write(tree, out)
    summary_run.send(ladder, tree, drawn, out, lambda problem: print(problem, file=sys.stderr, flush=True))
    return tree


def write(tree: Tree, out: Path) -> list[Picture]:
    """Write the report's files, each whole or not at all, and return its pictures."""
    drawn = page.draw(tree)
    out.mkdir(parents=True, exist_ok=True)
    # An earlier report may have had a picture for which there are no data now.
    for name in {*page.NAMES} - {picture.name for picture in drawn}:
        path = out / f"{name}.png"
        if path.is_symlink() or files.is_file(path):
            path.unlink()
    for picture in drawn:
        files.write(out / f"{picture.name}.png", picture.png)
    files.write(out / "report.json", f"{json.dumps(tree, indent=1, allow_nan=False)}\n")
    files.write(out / PAGE, html(tree, drawn))
    return drawn
