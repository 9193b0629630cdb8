"""Campaigns: a calm run, runs with faults, and whether the faults left a trace.

`campaign` reads campaign files and runs them, `storm` draws random schedules and shrinks failing ones, `results` is
what comes out, and `report` and `timeline` show it.
"""
