"""Hosts on one machine: a network namespace each, joined by a bridge, with names, processes and mounts of their own.

What runs on a "host" sees no process and no loopback of the others, so ranks can only meet over TCP, as on two machines.
Where ssh and sshd would be, stand this file's `agent HOST COMMAND...`, which both MPIs' mpirun can start in ssh's place,
and its server. Needs root, `ip` (iproute2), `unshare` and `nsenter` (util-linux).
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

PORT = 514  # rsh's
ENVIRONMENT = ["PATH=/usr/bin:/bin", "HOME=/root"]


def why_not() -> str | None:
    """Return why hosts cannot be made here; None if they can."""
    for tool in ("ip", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    if os.geteuid() != 0:
        return "needs root"
    name = f"llmpack-{uuid.uuid4().hex[:6]}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"ip netns: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


class Hosts:
    """Makes `count` hosts, named host0 and so on, at 10.77.0.1 and so on; use as a context manager.

    `folder` gets the list of hosts; each host finds what `mounts[host]` names, source to target, under the target only.
    """

    def __init__(self, count: int, folder: Path, mounts: list[dict[Path, Path]] | None = None) -> None:
        self.names = [f"host{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self.folder = folder
        self._mounts = mounts or [{} for _ in self.names]
        self._tag = uuid.uuid4().hex[:5]
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.kill()  # the first process of its namespace: all the others go with it
            keeper.wait()
        for i in range(len(self.names)):
            subprocess.run(["ip", "netns", "del", self._namespace(i)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"lp{self._tag}"], capture_output=True, check=False)

    @property
    def agent(self) -> Path:
        """A program to give to mpirun in place of ssh."""
        return self.folder / "agent"

    def command(self, host: int, *command: str) -> list[str]:
        """Return the command line that runs `command` on a host, with nothing of our environment."""
        inside = ["nsenter", "--target", str(self._pids[host]), "--net", "--uts", "--mount", "--pid", "--ipc"]
        return [*inside, "env", "-i", *ENVIRONMENT, *command]

    def _namespace(self, i: int) -> str:
        return f"lp{self._tag}-{i}"

    def _make(self) -> None:
        bridge = f"lp{self._tag}"
        table = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True)
        )
        (self.folder / "hosts").write_text(table)
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            namespace, inside, outside = self._namespace(i), f"e{self._tag}{i}", f"v{self._tag}{i}"
            _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", outside, "master", bridge, "up")
            _run("ip", "link", "set", inside, "netns", namespace)
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", inside)
            _run("ip", "-n", namespace, "link", "set", inside, "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            steps = [f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts", f"hostname {name}"]
            for source, target in self._mounts[i].items():
                steps.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(target))}")
            ready = self.folder / f"ready-{i}"
            serve = shlex.join(["exec", sys.executable, __file__, "serve", address, str(ready)])
            script = " && ".join([*steps, serve])
            keeper = subprocess.Popen(
                ["ip", "netns", "exec", namespace, "unshare", "--uts", "--mount", "--pid", "--ipc", "--fork",
                 "--kill-child", "--mount-proc", "sh", "-c", script]
            )  # fmt: skip
            self._keepers.append(keeper)
            until = time.monotonic() + 10
            while not ready.exists():
                if keeper.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{name} did not come up")
                time.sleep(0.02)
            # `ip netns exec` becomes unshare, whose one child is the first process of the host.
            children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
            self._pids.append(int(children[0]))
        self.agent.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} agent "$@"\n')
        self.agent.chmod(0o755)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")


# As programs


def serve(address: str, ready: str) -> None:
    """Be a host's first process: run what agents ask for, with the connection as its standard streams."""
    signal.signal(signal.SIGCHLD, _reap)
    with socket.create_server((address, PORT)) as server:
        Path(ready).touch()
        while True:
            connection, _ = server.accept()
            size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
            command = connection.recv(size, socket.MSG_WAITALL).decode()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                for descriptor in (0, 1, 2):
                    os.dup2(connection.fileno(), descriptor)
                os.chdir("/")
                os.execve("/bin/sh", ["sh", "-c", command], dict(pair.split("=", 1) for pair in ENVIRONMENT))
            connection.close()


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def agent(arguments: list[str]) -> None:
    """Stand where ssh would: `[options] HOST COMMAND...`; the command is a shell's, its parts joined by spaces."""
    while arguments[0].startswith("-"):
        arguments = arguments[1:]
    command = " ".join(arguments[1:]).encode()
    with socket.create_connection((arguments[0], PORT)) as connection:
        connection.sendall(len(command).to_bytes(4, "big") + command)
        ends = {0: connection.fileno(), connection.fileno(): 1}
        while connection.fileno() in ends:
            for source in select.select(list(ends), [], [])[0]:
                if data := os.read(source, 65536):
                    while data:
                        data = data[os.write(ends[source], data) :]
                else:
                    del ends[source]
                    if source == 0:
                        connection.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        agent(sys.argv[2:])
