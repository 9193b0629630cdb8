"""Hosts for network faults: network namespaces on this machine, each with one or more links.

Each link of a host leads to a switch of its own, which all hosts share. The switches are bridges in a namespace of
their own, so the machine's interfaces, routes and firewall are not touched. Nothing has to be cleaned up after a crash:
a namespace has no name and lasts as long as a process in it, and the process that holds it ends with ours, even if ours
is killed.

For users other than root the namespaces are made within a user namespace, where the system allows one. Processes there
see themselves as root. For all others they and their files belong to the user.
"""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Self

INTERFACE = "eth0"  # every host's first one, which down(), dropping() and sent_bytes() are about
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}
RATE = "20mbit"  # of a slow link: a small model's gradient takes some tenths of a second
COMMAND_SECONDS = 10


@functools.cache
def probe() -> str | None:
    """Reason why no hosts can be made here; None if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    missing = [f"{tool} ({package})" for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    try:
        with Hosts(1) as hosts, hosts.dropping(0):
            return None
    except OSError as error:
        need = "cannot be made here" if os.geteuid() == 0 else "need root, or a user namespace"
        return f"network namespaces {need}: {error}"


@functools.cache
def shaping() -> str | None:
    """Reason why no link can be made slow here; None if one can."""
    if probe() is not None:
        return probe()
    try:
        with Hosts(1) as hosts, hosts.slow(0, 10):
            return None
    except OSError as error:
        return f"tc cannot shape traffic here: {error}"


@functools.cache
def multipath() -> str | None:
    """Reason why connections between hosts cannot use two links here; None if they can."""
    if probe() is not None:
        return probe()
    try:
        with Hosts(1, links=2) as hosts:
            hosts.allow_multipath()
            return None
    except OSError as error:
        return f"ip cannot set up MPTCP here: {error}"


class Hosts:
    """`count` hosts that reach each other and no other machine. A context manager; any thread may call any method.

    All methods raise OSError if the kernel or a tool refuses.
    """

    def __init__(self, count: int, links: int = 1) -> None:
        """`links` is the number of links of each host, each to a switch and a network of its own."""
        assert 1 <= count <= 250
        self._count, self._links = count, links
        self._in_user_namespace = os.geteuid() != 0
        self._holders: list[subprocess.Popen[bytes]] = []
        self._drops: set[int] = set()
        self._slow: dict[tuple[int, int], tuple[float, str]] = {}
        """Milliseconds that slow links delay a packet, and their rate, by host and link."""
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def links(self) -> int:
        """Number of links of each host."""
        return self._links

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._make()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the namespaces end, each with the last process in it."""
        for holder in self._holders:
            assert holder.stdin and holder.stdout and holder.stderr
            with contextlib.suppress(OSError):
                holder.stdin.close()
            holder.stdout.close()
            holder.stderr.close()
        for holder in self._holders:
            holder.wait(COMMAND_SECONDS)
        self._holders.clear()

    def command(self, host: int) -> list[str]:
        """Words before a command that make it run on `host`. The command keeps the process id of the whole."""
        return self._in_namespace(host + 1)

    def address(self, host: int, link: int = 0) -> str:
        return f"10.{99 - link}.0.{host + 1}"

    @contextlib.contextmanager
    def down(self, host: int) -> Iterator[None]:
        """Inside this context the host's first link is down at the switch: no carrier, nothing passes either way."""
        try:
            self._run(0, "ip", "link", "set", _port(host), "down")
            yield
        finally:
            self._run(0, "ip", "link", "set", _port(host), "up")

    def allow_multipath(self) -> None:
        """Let connections of Multipath TCP use every link of every host."""
        for host in range(self._count):
            self._run(host + 1, "ip", "mptcp", "limits", "set", "subflow", "4", "add_addr_accepted", "4")
            for link in range(1, self._links):
                endpoint = (self.address(host, link), "dev", _interface(link), "subflow", "signal")
                self._run(host + 1, "ip", "mptcp", "endpoint", "add", *endpoint)

    @contextlib.contextmanager
    def dropping(self, host: int) -> Iterator[None]:
        """Inside this context what the host sends over its first link is dropped. Packets for it still arrive."""
        try:
            self._drops.add(host)
            self._change(host)
            yield
        finally:
            self._drops.discard(host)
            self._change(host)

    @contextlib.contextmanager
    def slow(self, host: int, milliseconds: float, rate: str = RATE, link: int = 0) -> Iterator[None]:
        """Inside this context a link has a rate, as tc writes it, and delays its packets, in both directions.

        With netem in the kernel the delay is `milliseconds`; else it is at most that, by a queue that fills up.
        """
        usual = self._slow.get((host, link))
        try:
            self._slow[host, link] = milliseconds, rate
            self._change(host, link)
            yield
        finally:
            del self._slow[host, link]
            if usual is not None:
                self._slow[host, link] = usual
            self._change(host, link)

    def _change(self, host: int, link: int = 0) -> None:
        with self._changing:
            slow = self._slow.get((host, link))
            self._shape(0, _port(host, link), slow)
            if link == 0 and host in self._drops:
                self._run(host + 1, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "blackhole")
            else:
                self._shape(host + 1, _interface(link), slow)

    def sent_bytes(self, host: int) -> int:
        """Bytes that the host has sent over its first link so far, headers and all."""
        told = self._run(host + 1, "ip", "-s", "-j", "link", "show", "dev", INTERFACE)
        return int(json.loads(told)[0]["stats64"]["tx"]["bytes"])

    def _shape(self, namespace: int, device: str, slow: tuple[float, str] | None) -> None:
        replace = ("tc", "qdisc", "replace", "dev", device, "root")
        if slow is None:
            with contextlib.suppress(OSError):  # there is none to remove
                self._run(namespace, "tc", "qdisc", "del", "dev", device, "root")
            return
        milliseconds, rate = slow
        delay = f"{milliseconds:g}ms"
        try:
            self._run(namespace, *replace, "netem", "delay", delay, "rate", rate)
        except OSError:
            self._run(namespace, *replace, "tbf", "rate", rate, "burst", "16kb", "latency", delay)

    def _make(self) -> None:
        """Make namespace 0 for the switches and namespace n + 1 for host n, and link them."""
        self._hold()
        for link in range(self._links):
            self._run(0, "ip", "link", "add", f"switch{link}", "type", "bridge")
            self._run(0, "ip", "link", "set", f"switch{link}", "up")
        for host in range(self._count):
            holder = self._hold()
            self._run(host + 1, "ip", "link", "set", "lo", "up")
            for link in range(self._links):
                self._link(host, link, holder.pid)

    def _link(self, host: int, link: int, holder: int) -> None:
        """Link a host, whose namespace the process `holder` holds, to a switch."""
        port, device = _port(host, link), _interface(link)
        self._run(0, "ip", "link", "add", port, "type", "veth", "peer", "name", device, "netns", str(holder))
        self._run(0, "ip", "link", "set", port, "master", f"switch{link}", "up")
        # No IPv6 address: a process that looks up its interface's address must get the one that its peers know.
        self._run(host + 1, "ip", "link", "set", device, "addrgenmode", "none")
        self._run(host + 1, "ip", "address", "add", f"{self.address(host, link)}/24", "dev", device)
        self._run(host + 1, "ip", "link", "set", device, "up")

    def _hold(self) -> subprocess.Popen[bytes]:
        """Start a process that holds a new namespace until its input ends, which it does at the latest when we end."""
        command = ["unshare", "--net", "cat"]
        if self._in_user_namespace and not self._holders:
            command[1:1] = ["--user", "--map-root-user"]
        pipe = subprocess.PIPE
        inside = [*self._in_the_user_namespace(), *command]
        holder = subprocess.Popen(inside, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._holders.append(holder)
        assert holder.stdin and holder.stdout and holder.stderr
        with contextlib.suppress(BrokenPipeError):  # it has failed already; the empty answer below shows it
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        if holder.stdout.readline() != b"\n":  # `cat` answers once it is inside the namespace
            complaint, status = holder.stderr.read().decode(errors="replace").strip(), holder.wait()
            raise OSError(f"{' '.join(command)}: {complaint or f'exit status {status}'}")
        return holder

    def _in_namespace(self, number: int) -> list[str]:
        if not self._holders:
            raise OSError("these hosts are closed")
        net = f"--net=/proc/{self._holders[number].pid}/ns/net"
        return [*(self._in_the_user_namespace() or ["nsenter"]), net, "--"]

    def _in_the_user_namespace(self) -> list[str]:
        """Words before a command that make it run in the user namespace of the first holder; empty for root."""
        if not self._in_user_namespace or not self._holders:
            return []
        # Without --preserve-credentials nsenter gives up the user's groups, which is not allowed there.
        return ["nsenter", f"--user=/proc/{self._holders[0].pid}/ns/user", "--preserve-credentials"]

    def _run(self, namespace: int, *command: str) -> str:
        inside = [*self._in_namespace(namespace), *command]
        try:
            done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{' '.join(command)} takes longer than {COMMAND_SECONDS} s") from None
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
        return done.stdout


def entered(command: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Take the words of `Hosts.command` off a command: the file of the network namespace that they enter, and the rest.

    ("", command) where there are none, or where they enter a user namespace too.
    """
    if list(command[:1]) == ["nsenter"] and command[1].startswith("--net=") and command[2] == "--":
        return command[1].removeprefix("--net="), command[3:]
    return "", command


def _interface(link: int) -> str:
    """Name of a link's device on its host; the first is INTERFACE."""
    return f"eth{link}" if link else INTERFACE


def _port(host: int, link: int = 0) -> str:
    """Name of a link's device at the switch."""
    return f"port{host}" if link == 0 else f"port{host}-{link}"
