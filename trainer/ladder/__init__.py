"""Derisking ladders: a baseline and single changes of it, trained at several sizes, and the conclusions.

`plan` reads a ladder file into runs, `run` makes them, `collect` reads their results, `stats` fits loss against compute
and gives verdicts, `report` shows them; `judge` does the same for tables of runs made elsewhere. README.md explains the
statistics and how well they do on simulated ladders.
"""
