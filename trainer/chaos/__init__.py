"""Campaigns: a reference run, runs with faults, and whether the faults left a trace.

`file` is what a campaign file may hold, `campaign` plans its runs and `runner` does them, `storm` draws random
schedules and shrinks failing ones, `results` is what comes out, and `report` shows it.
"""
