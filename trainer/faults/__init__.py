"""Faults on purpose: what can be broken (kinds), when (plan), by whom (worker inside, nemesis outside), and whether it
left a trace (checker). Nothing here does anything unless a config has `[[faults]]`.
"""
