"""The store at which the agents of a job meet, as a process of its own; and how agents outlive it.

The store keeps what the agents last agreed on: who takes part. It keeps this in memory alone. When it comes back empty,
the agents put their last state back: the first to do so wins, and the others read that.
"""

import base64
import datetime
import os
import pickle
import signal
import sys
import threading
import time
from typing import Any

from trainer import signals
from trainer.errors import UsageError

STORE_SECONDS = "store_seconds"
"""Key of --rdzv-conf: so long agents look for a store that is gone before they give up. Default 0."""
RESUMABLE = "resumable"
"""Key of --rdzv-conf: 1 if the job may meet again, under the same id at the same store, after it has left with 75."""
LOOK_SECONDS, CONNECT_SECONDS = 0.2, 2.0


def store(address: str, port: int) -> None:
    """Serve a rendezvous store on this address alone, until the process that started this one is gone."""
    parent = os.getppid()
    port = _open(address, port)
    print(f"{address}:{port} listens", flush=True)
    while os.getppid() == parent:
        time.sleep(0.2)


def serve(listen: str) -> None:
    """Serve a rendezvous store at HOST:PORT (port 0: a free one) until a signal asks this process to leave."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {listen!r} is no address.\n  Give HOST:PORT of this machine; port 0: a free one.")
    own_port = _open(host.strip("[]"), int(port))
    asked = threading.Event()
    for number in signals.heeded():
        signal.signal(number, lambda *_: asked.set())
    print(f"{host}:{own_port} listens", flush=True)
    asked.wait()


def _open(address: str, port: int) -> int:
    """Open a store, which lives as long as this process, and return its port."""
    import torch.distributed as dist

    from trainer.parallel.world import open_store

    try:
        return open_store(address, port, is_master=True, wait_for_workers=False, alone=True).port
    except dist.DistNetworkError as error:
        raise UsageError(f"{error}.\n  Give an address of this machine and a port that is free.") from None


def patch_backend(c10d: Any, handler_class: Any) -> None:
    """Let the agents of this process look for a store that is gone, if --rdzv-conf says for how long."""
    create, backend_class = c10d.create_backend, c10d.C10dRendezvousBackend
    call, decode = backend_class._call_store, backend_class._decode_state

    def create_backend(params: Any) -> Any:
        backend, first = create(params)
        if seconds := params.get_as_int(STORE_SECONDS, 0):
            host, port = c10d.parse_rendezvous_endpoint(params.endpoint, default_port=c10d.DEFAULT_PORT)
            backend.lasting = _Lasting(host, port, seconds, first.timeout)
        return backend, first

    def call_store(backend: Any, operation: str, *arguments: Any) -> Any:
        lasting = getattr(backend, "lasting", None)
        seen = backend._store
        try:
            return call(backend, operation, *arguments)
        except c10d.RendezvousConnectionError:
            if lasting is None:
                raise
        deadline = time.monotonic() + lasting.seconds
        while True:
            try:
                with lasting.looking:  # keep-alives have a thread of their own
                    if backend._store is seen:
                        backend._store = lasting.find(backend._key, backend._NULL_SENTINEL)
                    seen = backend._store
                return call(backend, operation, *arguments)
            except (c10d.RendezvousConnectionError, RuntimeError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_SECONDS)

    def decode_state(backend: Any, state: bytes) -> Any:
        decoded = decode(backend, state)
        if decoded is not None and (lasting := getattr(backend, "lasting", None)) is not None:
            lasting.state = decoded[0]
        return decoded

    c10d.create_backend = create_backend
    backend_class._call_store, backend_class._decode_state = call_store, decode_state
    # The next meeting goes on where the backend has found the store.
    handler_class._get_store = lambda handler: handler._wrap_store(
        getattr(handler._state_holder._backend, "_store", handler._store)
    )


class _Lasting:
    """Address of an agent's store and the last state seen there, with which it is found again."""

    def __init__(self, host: str, port: int, seconds: int, timeout: datetime.timedelta) -> None:
        self._host, self._port, self._timeout = host, port, timeout
        self.seconds = seconds
        self.looking = threading.Lock()
        self.state: bytes | None = None
        """The state of the rendezvous, pickled, as this agent saw it last."""

    def find(self, key: str, nothing: str) -> Any:
        """Connect to the store, and put the last state back if it has none. Raises RuntimeError if it is not there."""
        from trainer.parallel.world import open_store

        found = open_store(
            self._host, self._port, timeout=datetime.timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False
        )
        found.set_timeout(self._timeout)
        found.compare_set(key, "", self._renewed() or nothing)
        return found

    def _renewed(self) -> str:
        """The last state, as if all had just given a sign of life: none could while the store was away."""
        if self.state is None:
            return ""
        state = pickle.loads(self.state)
        now = datetime.datetime.now(datetime.UTC)
        state.last_heartbeats = dict.fromkeys(state.last_heartbeats, now)
        return base64.b64encode(pickle.dumps(state)).decode()


if __name__ == "__main__":
    store(sys.argv[1], int(sys.argv[2]))
