"""A ladder's report: one plain tree, and what people see of it: a page, pictures, a table, a run in W&B.

OUT/report.json    the tree (told.py); `without_course` of it is a function of what the runs came to
OUT/report.html    one page, pictures included
OUT/NAME.png       each picture
"""

import json
import sys
from pathlib import Path

from trainer import files
from trainer.ladder.plan.ladder import Ladder
from trainer.ladder.report import pictures, summary_run
from trainer.ladder.report.build import look, tell, without_course
from trainer.ladder.report.estimates import Tree
from trainer.ladder.report.page import html
from trainer.ladder.report.pictures import Picture
from trainer.ladder.report.terminal import terminal

__all__ = ["PAGE", "html", "look", "make", "tell", "terminal", "without_course", "write"]

PAGE = "report.html"


def make(ladder: Ladder, out: Path) -> Tree:
    """Read a ladder's runs, write its report into OUT, show it in W&B, and return it. Starts and changes no run.

    Raises RunDirectoryError if OUT is another ladder's.
    """
    tree = tell(look(ladder, out))
    drawn = write(tree, out)
    summary_run.send(ladder, tree, drawn, out, lambda problem: print(problem, file=sys.stderr, flush=True))
    return tree


def write(tree: Tree, out: Path) -> list[Picture]:
    """The report's files, each whole or not at all; a picture that there is no more reason for goes."""
    drawn = pictures.draw(tree)
    out.mkdir(parents=True, exist_ok=True)
    for name in pictures.NAMES:
        (out / f"{name}.png").unlink(missing_ok=True)
    for picture in drawn:
        files.write(out / f"{picture.name}.png", picture.png)
    files.write(out / "report.json", f"{json.dumps(tree, indent=1, allow_nan=False)}\n")
    files.write(out / PAGE, html(tree, drawn))
    return drawn
