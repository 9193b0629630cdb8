"""Starting torchrun so that what toprope promises holds.

Installed as the command `torchrun` of the environment: torch's own, with two of its traps (torch 2.13) disarmed.
"""

import os
import sys


def torchrun() -> None:
    """torch.distributed.run, for a program whose options it must not mistake for its own.

    1. With the rendezvous store shared between agents and workers, a node that joins a running job hangs, and restarts
       under --standalone are unreliable. The variable that turns sharing off is read by the agent, in this process.
    2. torchrun takes the `--run` of `-m trainer train CONFIG --run DIR` for an abbreviation of its own --run-path and
       refuses it (argparse before Python 3.12.8). Abbreviated torchrun options are therefore not understood here.
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run

    parser = run.get_args_parser()
    parser.allow_abbrev = False
    run.run(parser.parse_args(sys.argv[1:]))
