"""Hosts for faults of the network: network namespaces on this machine, each with a link to one switch.

The switch is a bridge in a namespace of its own: the machine's interfaces, routes and firewall are not touched. No
namespace has a name. Each lasts as long as a process in it, the first being one that ends when ours does, however it
ends, so nothing is left behind to be cleaned up later.

For whoever is not root they are made within a user namespace, where the system allows one. Processes there take
themselves for root; to everybody else they are the user's own, who can find and end them, and so are their files.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Self

INTERFACE = "eth0"
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}
RATE = "20mbit"  # of a slow link: a gradient of a small model takes some tenths of a second, not many
SECONDS_A_COMMAND = 10


@functools.cache
def probe() -> str | None:
    """Why no such hosts can be made here; None if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    missing = [f"{tool} ({package})" for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    try:
        with Hosts(1) as hosts:
            hosts.drop_outgoing(0)
    except OSError as error:
        if os.geteuid() != 0:
            return f"network namespaces need root, or a user namespace: {error}"
        return f"network namespaces cannot be made here: {error}"
    return None


@functools.cache
def shaping() -> str | None:
    """Why a link cannot be made slow here; None if it can."""
    if probe() is not None:
        return probe()
    try:
        with Hosts(1) as hosts:
            hosts.slow(0, 10)
    except OSError as error:
        return f"tc cannot shape traffic here: {error}"
    return None


@dataclass
class _Link:
    """What has been done to the way between a host and the switch."""

    drops: bool = False
    milliseconds: float | None = None


class Hosts:
    """`count` hosts that see each other and nobody else. A context manager; every method may be called by any thread.

    Raises OSError where the kernel or a tool refuses.
    """

    interface = INTERFACE
    """Of every host, the one way out."""

    def __init__(self, count: int) -> None:
        assert 1 <= count <= 250
        self._count = count
        self._in_user_namespace = os.geteuid() != 0
        self._holders: list[subprocess.Popen[bytes]] = []
        self._links = [_Link() for _ in range(count)]
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the namespaces: each ends with the last process in it."""
        for holder in self._holders:
            assert holder.stdin and holder.stdout and holder.stderr
            with contextlib.suppress(OSError):
                holder.stdin.close()
            holder.stdout.close()
            holder.stderr.close()
        for holder in self._holders:
            holder.wait(SECONDS_A_COMMAND)
        self._holders.clear()

    def command(self, host: int) -> list[str]:
        """What to put before a command so that it runs there. The command keeps the process id that it is given."""
        return self._in_namespace(host + 1)

    def address(self, host: int) -> str:
        return f"10.99.0.{host + 1}"

    def down(self, host: int) -> None:
        """Take its link down at the switch: it loses the carrier, and nothing passes either way."""
        self._run(0, "ip", "link", "set", f"port{host}", "down")

    def up(self, host: int) -> None:
        self._run(0, "ip", "link", "set", f"port{host}", "up")

    def drop_outgoing(self, host: int) -> None:
        """Lose all that it sends. What others send still arrives there."""
        self._change(host, drops=True)

    def restore_outgoing(self, host: int) -> None:
        self._change(host, drops=False)

    def slow(self, host: int, milliseconds: float) -> None:
        """Limit its link, either way, and delay what passes: by so long where the kernel can (netem), else by up to
        so long, as a full queue does."""
        self._change(host, milliseconds=milliseconds)

    def restore_speed(self, host: int) -> None:
        self._change(host, milliseconds=None)

    def _change(self, host: int, **to: float | bool | None) -> None:
        with self._changing:
            for name, value in to.items():
                setattr(self._links[host], name, value)
            link = self._links[host]
            self._shape(0, f"port{host}", link.milliseconds)
            if link.drops:
                self._run(host + 1, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "blackhole")
            else:
                self._shape(host + 1, INTERFACE, link.milliseconds)

    def _shape(self, namespace: int, device: str, milliseconds: float | None) -> None:
        replace = ("tc", "qdisc", "replace", "dev", device, "root")
        if milliseconds is None:
            with contextlib.suppress(OSError):  # there is none to remove
                self._run(namespace, "tc", "qdisc", "del", "dev", device, "root")
            return
        delay = f"{milliseconds:g}ms"
        try:
            self._run(namespace, *replace, "netem", "delay", delay, "rate", RATE)
        except OSError:
            self._run(namespace, *replace, "tbf", "rate", RATE, "burst", "16kb", "latency", delay)

    def _make(self) -> None:
        """Namespace 0 is the switch's, namespace n + 1 that of host n."""
        self._hold()
        self._run(0, "ip", "link", "add", "switch", "type", "bridge")
        self._run(0, "ip", "link", "set", "switch", "up")
        for host in range(self._count):
            holder = self._hold()
            port, peer = f"port{host}", ("peer", "name", INTERFACE, "netns", str(holder.pid))
            self._run(0, "ip", "link", "add", port, "type", "veth", *peer)
            self._run(0, "ip", "link", "set", port, "master", "switch", "up")
            # No second address: whoever asks for the interface's must get the one that peers are told.
            self._run(host + 1, "ip", "link", "set", INTERFACE, "addrgenmode", "none")
            self._run(host + 1, "ip", "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                self._run(host + 1, "ip", "link", "set", device, "up")

    def _hold(self) -> subprocess.Popen[bytes]:
        """A process that keeps a new namespace until its input ends, as it does when we do."""
        command = ["unshare", "--net", "cat"]
        if self._in_user_namespace and not self._holders:
            command[1:1] = ["--user", "--map-root-user"]
        pipe = subprocess.PIPE
        inside = [*self._in_the_user_namespace(), *command]
        holder = subprocess.Popen(inside, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._holders.append(holder)
        assert holder.stdin and holder.stdout and holder.stderr
        with contextlib.suppress(BrokenPipeError):  # it has left already
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        if holder.stdout.readline() != b"\n":  # an answer means that it is inside
            said, status = holder.stderr.read().decode(errors="replace").strip(), holder.wait()
            raise OSError(f"{' '.join(command)}: {said or f'exit status {status}'}")
        return holder

    def _in_namespace(self, number: int) -> list[str]:
        if not self._holders:
            raise OSError("these hosts are closed")
        net = f"--net=/proc/{self._holders[number].pid}/ns/net"
        return [*(self._in_the_user_namespace() or ["nsenter"]), net, "--"]

    def _in_the_user_namespace(self) -> list[str]:
        """The switch's holder has made it; nothing where there is none."""
        if not self._in_user_namespace or not self._holders:
            return []
        # Without the last, nsenter gives up the user's groups, which is not allowed there.
        return ["nsenter", f"--user=/proc/{self._holders[0].pid}/ns/user", "--preserve-credentials"]

    def _run(self, namespace: int, *command: str) -> None:
        inside = [*self._in_namespace(namespace), *command]
        try:
            done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=SECONDS_A_COMMAND)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{' '.join(command)} takes longer than {SECONDS_A_COMMAND} s") from None
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
