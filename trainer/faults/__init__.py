"""Faults on purpose: kinds (fault.py and the modules imported below), when they fire (plan), what fires them (injector
inside a rank, nemesis beside the job), and whether the run survived (attribution, checker). Nothing here acts unless a
config has `[[faults]]`.
"""

# Importing a module registers its kinds. The order of the modules is the order of the catalogue.
# isort: off
from trainer.faults import process, time, network, storage, corruption, membership, clock, quorum, copies
# isort: on

__all__ = ["clock", "copies", "corruption", "membership", "network", "process", "quorum", "storage", "time"]
