"""Starting torchrun so that what toprope promises holds.

Installed as the command `torchrun` of the environment: torch's own, with three of its traps (torch 2.13) disarmed.

1. With the rendezvous store shared between agents and workers, a node that joins a running job hangs, and restarts
   under --standalone are unreliable. The variable that turns sharing off is read by the agent, so it is set here.
2. It takes the `--run` of `-m trainer train CONFIG --run DIR` for an abbreviation of its own --run-path and refuses it
   (argparse before Python 3.12.8). Abbreviated torchrun options are therefore not understood.
3. It restarts workers that left on purpose, and answers 1 and a traceback whatever their exit status was. Here wrong
   usage (2) and preemption (75) are neither restarted nor dressed up: they are the exit status of the job.
"""

import os
import sys
from typing import Any

from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE

ON_PURPOSE = (EXIT_USAGE, EXIT_PREEMPTED)


def torchrun() -> None:
    """Run torch.distributed.run on the command line's arguments and leave with the job's exit status."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would too, with a warning; numerics.threads decides anyway
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _spare_workers_that_left_on_purpose(LocalElasticAgent)
    parser = run.get_args_parser()
    parser.allow_abbrev = False
    try:
        run.run(parser.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        on_purpose = [status for status in ON_PURPOSE if status in statuses]
        if not on_purpose:
            print(error, file=sys.stderr)
        raise SystemExit(on_purpose[0] if on_purpose else EXIT_FAILED) from None


def _spare_workers_that_left_on_purpose(agent_class: Any) -> None:
    monitor = agent_class._monitor_workers

    def monitor_workers(agent: Any, worker_group: Any) -> Any:
        result = monitor(agent, worker_group)
        if any(failure.exitcode in ON_PURPOSE for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    agent_class._monitor_workers = monitor_workers
