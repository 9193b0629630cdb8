"""The command `torchrun` of this environment: torch's own, with six of its traps (torch 2.13) disarmed.

Each trap is numbered and described beside the code that disarms it.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from trainer.launch import forkserver, processes
from trainer.parallel import elastic
from trainer.show import terminal

ON_PURPOSE = (EXIT_USAGE, EXIT_PREEMPTED)  # exit statuses that are the job's, not a crash
EXIT_GRACE_SECONDS = 3
RENDEZVOUS_POLL_SECONDS = 0.1
LOST_STORE = (
    "The node that hosts the rendezvous is gone or out of reach, or the job has ended without this one. "
    "The same command resumes from the newest checkpoint."
)


def torchrun() -> None:
    """Run torch.distributed.run on the command line's arguments and leave with the job's exit status."""
    terminal.take()
    # Trap 1. With one rendezvous store for agents and workers, a node that joins a running job hangs, and restarts
    # under --standalone are unreliable. The agent reads the variable that separates them, so it must be set here.
    os.environ.setdefault(elastic.SHARED_STORE, "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would too, with a warning; numerics.threads decides anyway
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous

    # Trap 2. While nodes meet, each polls the rendezvous store once a second, which adds up to 3 s to every change
    # of membership.
    dynamic_rendezvous._delay = lambda seconds: time.sleep(RENDEZVOUS_POLL_SECONDS)
    _patch_restarts(LocalElasticAgent)
    _patch_close(SubprocessContext)
    parser = run.get_args_parser()
    # Trap 3. It takes the `--run` of `-m trainer train CONFIG --run DIR` for an abbreviation of its own --run-path and
    # refuses it (argparse before Python 3.12.8).
    parser.allow_abbrev = False
    parser.set_defaults(signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # Slurm's notice is SIGUSR1
    arguments = parser.parse_args(sys.argv[1:])
    if arguments.log_dir is None and arguments.redirects == arguments.tee == "0":
        arguments.log_dir = os.devnull  # nothing would be logged there, and torch leaves the directories behind in /tmp
    if arguments.module and _has_no_gpu():
        _patch_start(SubprocessHandler, forkserver.fork(["trainer.launch.preload"]))
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
        # torchrun has passed the signal on to the workers, which have saved; the same command resumes.
        preempted = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
        raise SystemExit(EXIT_PREEMPTED if preempted else 128 + error.sigval) from None
    finally:
        failures_file.unlink(missing_ok=True)
        failures_file.with_suffix(".final").unlink(missing_ok=True)


def store(address: str, port: int) -> None:
    """Serve a rendezvous store on this address alone, until the process that started this one is gone."""
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


def _patch_restarts(agent_class: Any) -> None:
    """Disarm trap 4, and note for the next attempt why the workers are started again.

    Trap 4. torchrun restarts workers that left on purpose, and itself leaves with status 1 and a traceback whatever
    their exit status was. Here wrong usage (2) and preemption (75) are not restarted and are the exit status of the
    job. Nor are workers restarted after an error that would only be repeated: a loss that is not finite twice, a disk
    that takes no checkpoint.
    """
    monitor, restart, rendezvous = agent_class._monitor_workers, agent_class._restart_workers, agent_class._rendezvous

    def monitor_workers(agent: Any, worker_group: Any) -> Any:
        result = monitor(agent, worker_group)
        if elastic.gave_up() or any(failure.exitcode in ON_PURPOSE for failure in result.failures.values()):
            agent._remaining_restarts = 0
        first = getattr(agent._pcontext, "failed_first", set())
        failed = [(rank, failure) for rank, failure in result.failures.items() if failure.local_rank in first]
        crashed = [(rank, failure) for rank, failure in failed if failure.exitcode < 0]
        # A worker that left with a status beside one that crashed has lost a peer: it is not the cause.
        agent.latest_failures = [_record(rank, failure) for rank, failure in crashed or failed]
        return result

    def restart_workers(agent: Any, worker_group: Any) -> None:
        lost = agent.latest_failures
        if not any(failure["signal"] for failure in lost) and _is_node_joining(agent):
            # Another agent saw the new node first and ended its workers; ours left because their peers were gone.
            lost = []
        reason = ", ".join(f"rank {f['rank']} {_describe(f)}" for f in lost) if lost else "a node is joining"
        elastic.note_failures(lost, reason)
        restart(agent, worker_group)

    def rendezvous_and_remember(agent: Any, worker_group: Any) -> None:
        rendezvous(agent, worker_group)
        agent.participants = set(_rendezvous_state(agent).participants)

    def stop_workers(agent: Any, worker_group: Any) -> None:
        agent._shutdown(signal.SIGKILL)

    agent_class._monitor_workers = monitor_workers
    agent_class._restart_workers = restart_workers
    agent_class._stop_workers = stop_workers  # before a restart: see trap 5
    agent_class._rendezvous = rendezvous_and_remember


def _is_node_joining(agent: Any) -> bool:
    """True if a node that was not in this round waits for the next."""
    agent._worker_group.spec.rdzv_handler.num_nodes_waiting()  # refreshes the state from the store
    return not agent.participants.issuperset(_rendezvous_state(agent).wait_list)


def _rendezvous_state(agent: Any) -> Any:
    return agent._worker_group.spec.rdzv_handler._state_holder.state


def _patch_close(context_class: Any) -> None:
    """Disarm trap 5.

    Trap 5. Before a restart torchrun asks the surviving workers to end, and waits up to 30 s for one that is stopped or
    hangs. They hold nothing that a checkpoint does not, so they are killed: at once after a crash or if they are
    stopped, and after EXIT_GRACE_SECONDS if another worker left with an exit status.
    """
    close = context_class.close

    def close_soon(context: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        context.failed_first = set(context._failures)  # torch then adds those that it ends itself
        statuses = {failure.exitcode for failure in context._failures.values()}
        # A given signal is one that torchrun received and passes on: those workers must have time to save.
        if death_sig is None and statuses and not statuses & set(ON_PURPOSE):
            crashed = min(statuses) < 0
            death_sig, timeout = (signal.SIGKILL, timeout) if crashed else (signal.SIGTERM, EXIT_GRACE_SECONDS)
            for worker in (handler.proc for handler in context.subprocess_handlers.values()):
                if processes.stat(worker.pid)[:1] == ["T"]:  # stopped: no other signal reaches it
                    worker.kill()
        close(context, death_sig, timeout)

    context_class.close = close_soon


def _patch_start(handler_class: Any, server: forkserver.ForkServer | None) -> None:
    """Disarm trap 6.

    Trap 6. Every worker, at every start, imports torch and all the rest again, which takes seconds. On CPUs under Linux
    workers given as `-m MODULE` are forked from a process that has them imported (trainer/launch/forkserver.py).
    """
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
    """True for a torch without GPU support. Forked workers are tested on CPUs alone."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _record(rank: int, failure: Any) -> dict[str, Any]:
    name = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else None
    return {"rank": rank, "pid": failure.pid, "exitcode": failure.exitcode, "signal": name}


def _describe(failure: dict[str, Any]) -> str:
    if failure["signal"] is not None:
        return f"was ended by {failure['signal']}"
    return f"left with exit status {failure['exitcode']}"


if __name__ == "__main__":
    torchrun()
