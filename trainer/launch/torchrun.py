"""Starting torchrun so that what toprope promises holds.

Installed as the command `torchrun` of the environment: torch's own, with six of its traps (torch 2.13) disarmed.

1. With the rendezvous store shared between agents and workers, a node that joins a running job hangs, and restarts
   under --standalone are unreliable. The variable that turns sharing off is read by the agent, so it is set here.
2. It takes the `--run` of `-m trainer train CONFIG --run DIR` for an abbreviation of its own --run-path and refuses it
   (argparse before Python 3.12.8). Abbreviated torchrun options are therefore not understood.
3. It restarts workers that left on purpose, and answers 1 and a traceback whatever their exit status was. Here wrong
   usage (2) and preemption (75) are neither restarted nor dressed up: they are the exit status of the job. Nor is an
   error restarted that would only come again: a loss that is not finite twice, a disk that takes no checkpoint.
4. Before a restart it asks the surviving workers to end and waits up to 30 s for one that is stopped or hangs. They
   hold nothing that a checkpoint does not, so here they are killed: at once after a crash or if they are stopped, and
   after some seconds for last words where another worker left with an exit status.
5. While nodes meet, each looks at the rendezvous store once a second, which adds up to 3 s to every change of
   membership. Here it looks ten times a second.
6. Every worker, at every start, imports torch and all the rest anew, which takes seconds. On CPUs under Linux workers
   given as `-m MODULE` are forked from a process that did so once (trainer/launch/forkserver.py).
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from trainer.launch import forkserver
from trainer.parallel import elastic

ON_PURPOSE = (EXIT_USAGE, EXIT_PREEMPTED)
LAST_WORDS_SECONDS = 3
RENDEZVOUS_POLL_SECONDS = 0.1
LOST_STORE = (
    "The node that hosts the rendezvous is gone or out of reach, or the job has ended without this one. "
    "The same command goes on from the newest checkpoint."
)


def torchrun() -> None:
    """Run torch.distributed.run on the command line's arguments and leave with the job's exit status."""
    os.environ.setdefault(elastic.SHARED_STORE, "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would too, with a warning; numerics.threads decides anyway
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous

    dynamic_rendezvous._delay = lambda seconds: time.sleep(RENDEZVOUS_POLL_SECONDS)
    _mend(LocalElasticAgent)
    _mend_waiting(SubprocessContext)
    parser = run.get_args_parser()
    parser.allow_abbrev = False
    parser.set_defaults(signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # Slurm's notice is SIGUSR1
    arguments = parser.parse_args(sys.argv[1:])
    if arguments.log_dir is None and arguments.redirects == arguments.tee == "0":
        arguments.log_dir = os.devnull  # nothing would be logged there, and torch leaves the directories behind in /tmp
    if arguments.module and _has_no_gpu():
        _mend_starting(SubprocessHandler, forkserver.fork(["trainer.launch.preload"]))
    failures_file = elastic.make_failures_file()
    try:
        run.run(arguments)
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        on_purpose = [status for status in ON_PURPOSE if status in statuses]
        if not on_purpose:
            print(error, file=sys.stderr)
        raise SystemExit(on_purpose[0] if on_purpose else EXIT_FAILED) from None
    except RendezvousError as error:
        print(f"RendezvousError: {error}\n  {LOST_STORE}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    except SignalException as error:
        # The workers were sent the signal too, and have saved; the same command goes on.
        preempted = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
        raise SystemExit(EXIT_PREEMPTED if preempted else 128 + error.sigval) from None
    finally:
        failures_file.unlink(missing_ok=True)
        failures_file.with_suffix(".final").unlink(missing_ok=True)


def store(address: str, port: int) -> None:
    """Be a rendezvous store on this address alone, until whoever started this process is gone."""
    parent = os.getppid()
    from torch.distributed import TCPStore

    with socket.create_server((address, port)) as listener:
        # torch's own server would listen on every address; it closes the descriptor that it is given.
        kept = TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
        print(f"{address}:{kept.port} listens", flush=True)
        while os.getppid() == parent:
            time.sleep(0.2)


def _mend(agent_class: Any) -> None:
    monitor, restart = agent_class._monitor_workers, agent_class._restart_workers
    meet = agent_class._rendezvous

    def monitor_workers(agent: Any, worker_group: Any) -> Any:
        result = monitor(agent, worker_group)
        if elastic.gave_up() or any(failure.exitcode in ON_PURPOSE for failure in result.failures.values()):
            agent._remaining_restarts = 0
        first = getattr(agent._pcontext, "failed_first", set())
        failed = [(rank, failure) for rank, failure in result.failures.items() if failure.local_rank in first]
        crashed = [(rank, failure) for rank, failure in failed if failure.exitcode < 0]
        # Who left with a status beside one that crashed has lost a peer: it is no cause.
        agent.latest_failures = [_record(rank, failure) for rank, failure in crashed or failed]
        return result

    def restart_workers(agent: Any, worker_group: Any) -> None:
        lost = agent.latest_failures
        if not any(failure["signal"] for failure in lost) and _is_joined(agent):
            lost = []  # they left since another agent, which saw the new node first, has ended their peers
        reason = ", ".join(f"rank {f['rank']} {_how(f)}" for f in lost) if lost else "a node is joining"
        elastic.note_failures(lost, reason)
        restart(agent, worker_group)

    def rendezvous(agent: Any, worker_group: Any) -> None:
        meet(agent, worker_group)
        agent.met = set(_meeting(agent).participants)

    def stop_workers(agent: Any, worker_group: Any) -> None:
        agent._shutdown(signal.SIGKILL)

    agent_class._monitor_workers = monitor_workers
    agent_class._restart_workers = restart_workers
    agent_class._stop_workers = stop_workers
    agent_class._rendezvous = rendezvous


def _is_joined(agent: Any) -> bool:
    """Whether a node that was not in this round waits for the next."""
    agent._worker_group.spec.rdzv_handler.num_nodes_waiting()  # it asks the store
    return not agent.met.issuperset(_meeting(agent).wait_list)


def _meeting(agent: Any) -> Any:
    return agent._worker_group.spec.rdzv_handler._state_holder.state


def _mend_waiting(context_class: Any) -> None:
    close = context_class.close

    def close_soon(context: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        context.failed_first = set(context._failures)  # torch then adds those that it ends itself
        statuses = {failure.exitcode for failure in context._failures.values()}
        if death_sig is None and statuses and not statuses & set(ON_PURPOSE):  # not a signal that we pass on
            crashed = min(statuses) < 0
            death_sig, timeout = (signal.SIGKILL, timeout) if crashed else (signal.SIGTERM, LAST_WORDS_SECONDS)
            for worker in (handler.proc for handler in context.subprocess_handlers.values()):
                if _is_stopped(worker.pid):  # no other signal reaches it
                    worker.kill()
        close(context, death_sig, timeout)

    context_class.close = close_soon


def _is_stopped(pid: int) -> bool:
    """Needs /proc: where there is none, no process is known to be stopped."""
    with contextlib.suppress(OSError):  # gone meanwhile
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    return False


def _mend_starting(handler_class: Any, server: forkserver.ForkServer | None) -> None:
    popen = handler_class._popen

    def start(handler: Any, command: Sequence[str], environment: Mapping[str, str]) -> Any:
        ordinary = [sys.executable, "-u", "-m"]
        redirected = handler._stdout is not None or handler._stderr is not None
        if server is not None and list(command[:3]) == ordinary and not redirected:
            worker = server.start(command[3], command[4:], environment)
            if worker is not None:
                return worker
        return popen(handler, command, environment)

    handler_class._popen = start


def _has_no_gpu() -> bool:
    """Forked workers have been tried on CPUs alone."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _record(rank: int, failure: Any) -> dict[str, Any]:
    name = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else None
    return {"rank": rank, "pid": failure.pid, "exitcode": failure.exitcode, "signal": name}


def _how(failure: dict[str, Any]) -> str:
    if failure["signal"] is not None:
        return f"was ended by {failure['signal']}"
    return f"left with exit status {failure['exitcode']}"


if __name__ == "__main__":
    torchrun()
