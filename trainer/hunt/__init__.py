"""A wrong operator: found on a machine before a run (burnin), or in a run that has symptoms (hunt)."""
