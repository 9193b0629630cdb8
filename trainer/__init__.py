"""toprope: a miniature fault-tolerant distributed pretraining framework.

A run is a pure function of its config: faults, restarts, world size and sharding change when the
result arrives, never the result itself.
"""
