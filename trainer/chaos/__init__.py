"""Campaigns: a reference run, cases with faults, and checks that the faults left no trace.

`schema` reads a campaign file, `plan` makes its cases and `run` runs them; `command` is the job where it is no toprope
run. `schedule` draws random schedules and shrinks failing ones, `results` are the records, `report` shows everything to
a person.
"""
