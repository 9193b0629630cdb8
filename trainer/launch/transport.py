"""Multipath TCP below torch: with TOPROPE_TRANSPORT=mptcp a link that dies costs a pause and no restart.

Neither gloo nor the store can ask for MPTCP, so a small library is preloaded that does (transport.c). It must be there
when a process starts: a launcher that wants it starts itself anew. Where there is no MPTCP, plain TCP is used, and a
line says why. Which addresses a connection may use, the kernel must be told by `ip mptcp endpoint` (docs/clusters.md).
"""

import contextlib
import functools
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.data.cache import cache_root
from trainer.errors import UsageError

TRANSPORT = "TOPROPE_TRANSPORT"
"""Environment variable: "tcp" (default) or "mptcp"."""
SOURCE = Path(__file__).with_name("transport.c")
BUILD_SECONDS = 60
ENABLED = Path("/proc/sys/net/mptcp/enabled")


@functools.cache
def missing() -> str:
    """Reason why there is no MPTCP here; "" if there is."""
    if sys.platform != "linux":
        return "MPTCP needs Linux"
    with contextlib.suppress(OSError):
        if ENABLED.read_text(encoding="ascii").strip() == "0":
            return "MPTCP is off: sysctl net.mptcp.enabled=1"
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except (OSError, AttributeError) as error:
        return f"the kernel has no MPTCP: {error}"
    return "" if _compiler() else "no C compiler (cc) builds the library that asks for MPTCP"


def library() -> Path:
    """The library to preload, built if the cache does not have it. Raises OSError if it cannot be built."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = cache_root("") / f"mptcp-{digest}-{os.uname().machine}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            command = [_compiler(), "-shared", "-fPIC", "-O2", "-o", str(made), str(SOURCE), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
            if done.returncode:
                raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
            made.replace(built)
    return built


def prepare(module: str) -> None:
    """Start `python -m MODULE` with this process's arguments anew, over MPTCP, if the environment asks for that.

    Returns if it does not, if this process is over MPTCP already, or where there is none, with a line that says why.
    """
    wanted = os.environ.get(TRANSPORT) or "tcp"
    if wanted not in ("tcp", "mptcp"):
        raise UsageError(f"{TRANSPORT}={wanted} is no transport.\n  Give tcp or mptcp.")
    if wanted == "tcp":
        return
    if not (reason := missing()):
        try:
            path = str(library())
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(error)
        else:
            preloaded = os.environ.get("LD_PRELOAD", "")
            if path in preloaded.split(":"):
                return
            environment = os.environ | {"LD_PRELOAD": ":".join(filter(None, [path, preloaded]))}
            print("sockets are MPTCP: connections go on over another link when one dies", file=sys.stderr, flush=True)
            os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)
    print(f"{TRANSPORT}={wanted}: plain TCP is used: {reason}", file=sys.stderr, flush=True)


def _compiler() -> str:
    return shutil.which("cc") or ""
