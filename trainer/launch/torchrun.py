"""The command `torchrun` of this environment: torch's own, with its traps (seen in torch 2.13) disarmed.

Each trap is numbered and described beside the code that disarms it. Where a version of torch does not have the parts
that a patch needs, the patch is left out with a line that says which traps stay.
"""

import contextlib
import datetime
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import signals, torch_versions
from trainer.checkpoint import memory
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_QUARANTINED, EXIT_USAGE, TopropeError, WorldError
from trainer.launch import forkserver, processes, rendezvous, transport
from trainer.parallel import elastic
from trainer.show import terminal

ON_PURPOSE = (EXIT_USAGE, EXIT_QUARANTINED, EXIT_PREEMPTED)  # exit statuses that are the job's, not a crash
EXIT_GRACE_SECONDS = 3
RENDEZVOUS_POLL_SECONDS = 0.1
RANK_SECONDS, MEETINGS = 5, 20  # wait for the ranks of a meeting; a node that dies in between ends the meeting
AWAITED_SECONDS = 5.0  # until a start says what it waits for
NAME_SECONDS = 4.0
ELASTIC = "torch.distributed.elastic"
PARTING_SECONDS = 10.0
LOST_STORE = (
    "The node that hosts the rendezvous is gone or out of reach, or the job has ended without this one. "
    "The same command resumes from the newest checkpoint."
)


def torchrun() -> None:
    """Run torch.distributed.run on the command line's arguments and leave with the job's exit status."""
    try:
        transport.prepare("trainer.launch.torchrun")
    except TopropeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    terminal.take()
    asked, note = os.pipe()  # signals are noted there, because no Python handler runs while torch waits in C++
    os.set_blocking(note, False)
    for number in signals.heeded():
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(note)
    # Trap 1. With one rendezvous store for agents and workers, a node that joins a running job hangs, and restarts
    # under --standalone are unreliable. The agent reads the variable that separates them, so it must be set here.
    os.environ.setdefault(elastic.SHARED_STORE, "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would too, with a warning; numerics.threads decides anyway
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are about peers that leave
    torch_versions.check()
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    parser = run.get_args_parser()
    # Trap 3. It takes the `--run` of `-m trainer train CONFIG --run DIR` for an abbreviation of its own --run-path and
    # refuses it (argparse before Python 3.12.8).
    parser.allow_abbrev = False
    heeded = [number.name for number in signals.heeded(signal.SIGQUIT)]
    parser.set_defaults(signals_to_handle=",".join(heeded or ["none"]))
    arguments = parser.parse_args(sys.argv[1:])
    if arguments.log_dir is None and arguments.redirects == arguments.tee == "0":
        arguments.log_dir = os.devnull  # nothing would be logged there, and torch leaves the directories behind in /tmp
    server = forkserver.fork(forkserver.PRELOADED) if arguments.module and _has_no_gpu() else None
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # the run's own lines tell of deaths and restarts; torch's would cut into them
    failures_file = elastic.make_failures_file()
    with_workers = threading.Event()
    threading.Thread(target=_leave_without_workers, args=(asked, with_workers, failures_file), daemon=True).start()
    _patch_meeting(run)
    _patch_stopping(api, with_workers)
    _patch_start(server)
    try:
        run.run(arguments)
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        on_purpose = [status for status in ON_PURPOSE if status in statuses]
        _free_terminal()
        if not on_purpose:
            print(error, file=sys.stderr)
        raise SystemExit(on_purpose[0] if on_purpose else EXIT_FAILED) from None
    except TopropeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except (RendezvousError, DistError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}\n  {LOST_STORE}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    except api.SignalException as error:
        # torchrun has passed the signal on to the workers, which have saved; the same command resumes.
        raise SystemExit(EXIT_PREEMPTED if error.sigval in signals.ASKING else 128 + error.sigval) from None
    finally:
        remove_notes(failures_file)


def remove_notes(failures_file: Path) -> None:
    """Remove what workers have told this launcher, and what they keep in memory for restarts within this job."""
    if (place := elastic.noted_memory(failures_file)) is not None:
        memory.discard(place)
    for file in (failures_file, *map(failures_file.with_suffix, (".final", ".memory"))):
        file.unlink(missing_ok=True)


# Signals


def _has_no_gpu() -> bool:
    """True if this build of torch knows no GPU: forked workers are tested on CPUs alone."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _leave_without_workers(asked: int, with_workers: threading.Event, failures_file: Path) -> None:
    """Thread: leave as soon as a signal comes, unless there are workers: then `_patch_stopping` lets them save."""
    while os.read(asked, 1):
        if not with_workers.is_set():
            failures_file.unlink(missing_ok=True)
            os._exit(EXIT_PREEMPTED)


@torch_versions.patch(
    "traps 5 and 7 stay: a restart may wait 30 s for workers that hang, and a second signal cuts off a save.",
    {
        f"{ELASTIC}.multiprocessing.api:_terminate_process_handler": 2,
        f"{ELASTIC}.multiprocessing.api:SignalException": 2,
        f"{ELASTIC}.multiprocessing.api:SubprocessContext._start": 1,
        f"{ELASTIC}.multiprocessing.api:SubprocessContext.close": 3,
    },
)
def _patch_stopping(api: Any, with_workers: threading.Event) -> None:
    """Disarm traps 5 and 7.

    Trap 5. Before a restart torchrun asks the surviving workers to end, and waits up to 30 s for one that is stopped or
    hangs. They hold nothing that a checkpoint does not, so they are killed: at once after a crash or if they are
    stopped, and after EXIT_GRACE_SECONDS if another worker left with an exit status.

    Trap 7. A second signal interrupts the wait for workers that save. Here it is ignored, except for a second Ctrl-C,
    which kills them.
    """
    context_class = api.SubprocessContext
    start, close = context_class._start, context_class.close

    def stop(number: int, _frame: Any) -> None:
        for later in signals.heeded(signal.SIGQUIT):
            signal.signal(later, signal.SIG_IGN if later != signal.SIGINT else lambda *_: None)
        raise api.SignalException(signal.Signals(number).name, signal.Signals(number))

    def start_and_listen(context: Any) -> None:
        with_workers.set()
        start(context)

    def close_soon(context: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        context.failed_first = set(context._failures)  # torch then adds those that it ends itself
        statuses = {failure.exitcode for failure in context._failures.values()}
        workers = [handler.proc for handler in context.subprocess_handlers.values()]
        if death_sig is not None and signal.SIGINT in signals.heeded():
            signal.signal(signal.SIGINT, lambda *_: _kill(workers))
        # A given signal is one that torchrun received and passes on: those workers must have time to save.
        if death_sig is None and statuses and not statuses & set(ON_PURPOSE):
            crashed = min(statuses) < 0
            death_sig, timeout = (signal.SIGKILL, timeout) if crashed else (signal.SIGTERM, EXIT_GRACE_SECONDS)
            _kill([worker for worker in workers if processes.stat(worker.pid)[:1] == ["T"]])  # no other signal ends one
        close(context, death_sig, timeout)

    api._terminate_process_handler = stop
    context_class._start, context_class.close = start_and_listen, close_soon


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)


# How nodes meet and part


@torch_versions.patch(
    "traps 2, 8 and 11 stay: a change of nodes takes up to 3 s longer, workers meet at the host's name, and a lost "
    "store ends the job.",
    {
        "torch.distributed.run:config_from_args": 1,
        f"{ELASTIC}.rendezvous.dynamic_rendezvous:_delay": 1,
        f"{ELASTIC}.rendezvous.dynamic_rendezvous:get_method_name": 1,
        f"{ELASTIC}.rendezvous.c10d_rendezvous_backend:TCPStore": None,
        f"{ELASTIC}.rendezvous.static_tcp_rendezvous:TCPStore": None,
        f"{ELASTIC}.rendezvous.c10d_rendezvous_backend:create_backend": 1,
        f"{ELASTIC}.rendezvous.c10d_rendezvous_backend:parse_rendezvous_endpoint": 2,
        f"{ELASTIC}.rendezvous.c10d_rendezvous_backend:C10dRendezvousBackend._call_store": 2,
        f"{ELASTIC}.rendezvous.c10d_rendezvous_backend:C10dRendezvousBackend._decode_state": 2,
        f"{ELASTIC}.rendezvous.dynamic_rendezvous:DynamicRendezvousHandler._get_store": 1,
        f"{ELASTIC}.rendezvous.dynamic_rendezvous:DynamicRendezvousHandler._wrap_store": 2,
    },
)
def _patch_meeting(run: Any) -> None:
    """Disarm traps 2, 8 and 11.

    Trap 2. While nodes meet, each polls the rendezvous store once a second, which adds up to 3 s to every change of
    membership. And each time it does, torch reads the source of its whole stack to name one method for its log, which
    is three quarters of a meeting's CPU time: 64 agents on two cores lost so many races for the shared state that
    they never met.

    Trap 8. Workers meet at the host's name, also where all are on this machine and the name does not resolve, and the
    stores listen on every network.

    Trap 11. A store that is gone for a moment ends the job (launch/rendezvous.py).
    """
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as c10d
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous as static

    from trainer.parallel import world

    configure = run.config_from_args

    def config_from_args(arguments: Any) -> Any:
        config, *command = configure(arguments)
        if config.local_addr is None and elastic.is_loopback(config.rdzv_endpoint.rpartition(":")[0]):
            config.local_addr = "127.0.0.1"  # who meets at a loopback address is on this machine
        elif config.local_addr is None and config.rdzv_backend != "static":
            require_host_name()
        _patch_restarts(config)
        return config, *command

    run.config_from_args = config_from_args
    dynamic_rendezvous._delay = lambda seconds: time.sleep(RENDEZVOUS_POLL_SECONDS)
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    rendezvous.patch_backend(c10d, dynamic_rendezvous.DynamicRendezvousHandler)
    for module in (c10d, static):
        setattr(module, "TCPStore", world.open_store)  # noqa: B010


def require_host_name(resolve: Callable[..., Any] = socket.getaddrinfo) -> None:
    """Raise WorldError, within NAME_SECONDS, if the name at which this node's workers would meet does not resolve."""
    found: list[Any] = []

    def look_up() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.append(resolve(socket.getfqdn(), None))

    asking = threading.Thread(target=look_up, daemon=True)  # a resolver without a network takes a minute
    asking.start()
    asking.join(NAME_SECONDS)
    if not found:
        raise WorldError(
            f"This host's name, {socket.gethostname()!r}, does not resolve, so the workers of the nodes cannot meet at "
            "it.\n  Give torchrun --local-addr with an address of this host that the other nodes reach, or enter the "
            "name in /etc/hosts."
        )


@torch_versions.patch(
    "traps 4, 9 and 10 stay: workers that left on purpose are restarted, and exit statuses 2, 75 and 76 become 1.",
    {
        f"{ELASTIC}.agent.server.local_elastic_agent:LocalElasticAgent.{name}": arguments
        for name, arguments in (
            ("_monitor_workers", 2),
            ("_restart_workers", 2),
            ("_stop_workers", 2),
            ("_rendezvous", 2),
            ("_assign_worker_ranks", 5),
            ("_exit_barrier", 1),
            ("_shutdown", 2),
        )
    }
    | {f"{ELASTIC}.rendezvous:RendezvousStoreInfo.build": 3},
)
def _patch_restarts(config: Any) -> None:
    """Disarm traps 4, 9 and 10, and note for the next attempt why the workers are started again.

    Trap 4. torchrun restarts workers that left on purpose, and itself leaves with status 1 and a traceback whatever
    their exit status was. Here wrong usage (2), preemption (75) and a node in quarantine (76) are not restarted and are
    the exit status of the job. Nor are workers restarted after an error that would only be repeated: a loss that is
    not finite twice, a disk that takes no checkpoint.

    Trap 9. If a node dies after the meeting and before all have their ranks, the others wait for it for a minute, then
    fail. Here they meet again after RANK_SECONDS.

    Trap 10. At the end of a job the node that hosts the store leaves first, and the others report that they lost it.
    """
    from torch.distributed import DistStoreError
    from torch.distributed.elastic.agent.server import local_elastic_agent
    from torch.distributed.elastic.rendezvous import RendezvousStoreInfo

    from trainer.parallel import world

    Agent: Any = local_elastic_agent.LocalElasticAgent
    monitor, restart, meet = Agent._monitor_workers, Agent._restart_workers, Agent._rendezvous
    exit_barrier, until_meeting = Agent._exit_barrier, _say_soon_what_is_awaited(config)

    def monitor_workers(agent: Any, worker_group: Any) -> Any:
        result = monitor(agent, worker_group)
        if elastic.gave_up() or any(failure.exitcode in ON_PURPOSE for failure in result.failures.values()):
            agent._remaining_restarts = 0
        left = any(failure.exitcode == EXIT_PREEMPTED for failure in result.failures.values())
        if left and config.rdzv_configs.get(rendezvous.RESUMABLE) == "1":
            worker_group.spec.rdzv_handler._close = lambda: None  # closed, the job could not come back under its id
        first = getattr(agent._pcontext, "failed_first", set())
        failed = [(rank, failure) for rank, failure in result.failures.items() if failure.local_rank in first]
        crashed = [(rank, failure) for rank, failure in failed if failure.exitcode < 0]
        # A worker that left with a status beside one that crashed has lost a peer: it is not the cause.
        agent.latest_failures = [elastic.failure(rank, end.pid, end.exitcode) for rank, end in crashed or failed]
        return result

    def restart_workers(agent: Any, worker_group: Any) -> None:
        lost = agent.latest_failures
        if not any(failure["signal"] for failure in lost) and _is_node_joining(agent):
            # Another agent saw the new node first and ended its workers; ours left because their peers were gone.
            lost = []
        elastic.note_failures(lost)
        _free_terminal()
        restart(agent, worker_group)

    def rendezvous_until_all_have_ranks(agent: Any, worker_group: Any) -> None:
        until_meeting.cancel()
        for left in reversed(range(MEETINGS)):
            awaited = _say_soon_what_is_awaited(config)
            try:
                meet(agent, worker_group)
                break
            except DistStoreError:
                if not left:
                    raise
            finally:
                awaited.cancel()
        agent.participants = _nodes(agent, "participants")

    def leave_together(agent: Any) -> None:
        exit_barrier(agent)
        group = agent._worker_group
        handler = group.spec.rdzv_handler
        if group.group_rank:
            handler._close = lambda: None  # one node tells those that come later that the job is over
        handler.shutdown()
        handler.shutdown = lambda: True
        # From here on nobody but the hosts of stores needs one; they leave last.
        with contextlib.suppress(RuntimeError):
            gone = agent._store.add("toprope/parted", 1)
            deadline = time.monotonic() + (PARTING_SECONDS if world.hosted_stores else 0)
            while gone < group.group_world_size and time.monotonic() < deadline:
                time.sleep(RENDEZVOUS_POLL_SECONDS)
                gone = agent._store.add("toprope/parted", 0)

    Agent._monitor_workers = monitor_workers
    Agent._restart_workers = restart_workers
    Agent._stop_workers = lambda agent, worker_group: agent._shutdown(signal.SIGKILL)  # before a restart: see trap 5
    Agent._rendezvous = rendezvous_until_all_have_ranks
    Agent._assign_worker_ranks = _not_waiting_long(Agent._assign_worker_ranks)
    setattr(RendezvousStoreInfo, "build", staticmethod(_not_waiting_long(RendezvousStoreInfo.build)))  # noqa: B010
    Agent._exit_barrier = leave_together


def _not_waiting_long(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function, whose second argument is a store, wait RANK_SECONDS for each key."""

    def call(first: Any, store: Any, *more: Any, **named: Any) -> Any:
        usual = store.timeout
        store.set_timeout(datetime.timedelta(seconds=RANK_SECONDS))
        try:
            return function(first, store, *more, **named)
        finally:
            store.set_timeout(usual)

    return call


def _say_soon_what_is_awaited(config: Any) -> threading.Timer:
    """Start the timer that tells whom this node waits for, unless it is cancelled before."""
    nodes = config.max_nodes if config.min_nodes == config.max_nodes else f"{config.min_nodes} to {config.max_nodes}"
    text = (
        f"torchrun waits at {config.rdzv_endpoint} (--rdzv-id {config.run_id}) until {nodes} node{'s' * (nodes != 1)} "
        "of this job have met.\n  Start the others with the same endpoint and id. If another job has taken the place, "
        "give each job an endpoint (or --master-port) and an --rdzv-id of its own."
    )
    alone = config.rdzv_endpoint == "localhost:0"  # --standalone
    timer = threading.Timer(AWAITED_SECONDS, lambda: alone or print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    return timer


def _is_node_joining(agent: Any) -> bool:
    """True if a node that was not in this round waits for the next."""
    agent._worker_group.spec.rdzv_handler.num_nodes_waiting()  # refreshes the state from the store
    return not agent.participants >= _nodes(agent, "wait_list")


def _nodes(agent: Any, which: str) -> set[Any]:
    """Participants or wait_list of the meeting. Empty for a rendezvous that keeps no state: its nodes are fixed."""
    holder = getattr(agent._worker_group.spec.rdzv_handler, "_state_holder", None)
    return set(getattr(holder.state, which)) if holder else set()


# Starting workers


@torch_versions.patch(
    "trap 6 stays: every start of a worker imports torch anew, which takes seconds.",
    {f"{ELASTIC}.multiprocessing.subprocess_handler:SubprocessHandler._popen": 3},
)
def _patch_start(server: forkserver.ForkServer | None) -> None:
    """Disarm trap 6.

    Trap 6. Every worker, at every start, imports torch and all the rest again, which takes seconds. On CPUs under Linux
    workers given as `-m MODULE` are forked from a process that has them imported (trainer/launch/forkserver.py).
    """
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    handler_class: Any = subprocess_handler.SubprocessHandler
    popen = handler_class._popen

    def start(handler: Any, command: Sequence[str], environment: Mapping[str, str]) -> Any:
        redirected = handler._stdout is not None or handler._stderr is not None
        if server is not None and list(command[:3]) == [sys.executable, "-u", "-m"] and not redirected:
            worker = server.start(command[3], command[4:], environment)
            if worker is not None:
                return worker
        return popen(handler, command, environment)

    handler_class._popen = start


def _free_terminal() -> None:
    """Erase the live line of a worker that was killed and show the cursor: nothing more is written into that line."""
    if terminal.has_cursor(sys.stdout):
        print(terminal.CLEAR, end="", flush=True)


if __name__ == "__main__":
    torchrun()
