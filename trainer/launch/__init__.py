"""Starting processes: torchrun, its agents, forks."""
