"""The store in which ranks find one another: a file without a name on one machine, one port across machines.

What is read from a store is bytes that are compared or parsed, never objects: whoever reaches the port of a run on
several machines may end or mislead that run, and no more.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from longctx.errors import ConfigError, RankLostError, StorageError
from longctx.launcher import env

if TYPE_CHECKING:  # the launcher, which starts others that need torch, does without
    from torch.distributed import Store

MEMORY = Path("/dev/shm")


def nameless_file(*folders: Path) -> IO[bytes]:
    """Opens a file that has no name, so that nobody finds it, and nothing is left whoever is killed.

    Processes that inherit it open it again by ``path_of``. It lies in memory, or in the first of the temporary folder
    and ``folders`` whose file system has locks, which torch's ``FileStore`` needs.
    """
    tried = []
    for folder in (MEMORY, Path(tempfile.gettempdir()), *folders):
        try:
            with ExitStack() as opened:
                file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
                with Path(path_of(file.fileno())).open("r+b") as again:
                    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
                opened.pop_all()
                return file
        except OSError as error:
            tried.append(f"{folder}: {error.strerror or error}")
    raise StorageError(
        f"ranks need a file with locks to meet by, and there is none ({'; '.join(tried)}); set TMPDIR to a local folder"
    )


def path_of(descriptor: int) -> str:
    """Returns a path by which this process opens its open file once more."""
    return f"/proc/self/fd/{descriptor}"


def open_store(rank: env.RankEnvironment, handed: int | None, seconds: float) -> Store:
    """Opens the store of the world that ``rank`` belongs to.

    ``handed``: the descriptor of a ``nameless_file``, when a launcher has made one. ``seconds``: how long to look for
    the one who listens.
    """
    import torch.distributed as dist

    if handed is not None:
        return dist.FileStore(path_of(handed), -1)
    if rank.world_size == 1:
        env.keep_to_loopback()
        return dist.HashStore()
    address = env.read_address(rank)
    timeout = datetime.timedelta(seconds=seconds)
    try:
        if rank.rank == 0 and not address.agent:
            listening = listen(address)
            host, port = listening.getsockname()[:2]
            store = dist.TCPStore(
                host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        else:
            store = dist.TCPStore(address.host, address.port, None, False, timeout, wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankLostError(f"rank {rank.rank} finds no rank 0 at {address.host}:{address.port}: {reason}") from None
    return dist.PrefixStore(f"longctx/{address.attempt}", store)


def listen(address: env.Address) -> socket.socket:
    """Listens where the other ranks look for rank 0, on that interface alone."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR={address.host} is no address: {error.strerror or error}") from None
    places = [(family, place) for family, _, _, _, place in found]
    if not address.one_machine:
        # Some systems resolve their own name to a loopback address, which other machines cannot reach.
        outside = [(family, place) for family, place in places if not ipaddress.ip_address(place[0]).is_loopback]
        places = outside or [(socket.AF_INET, (_own_address(address.host), address.port))]
    why: OSError | None = None
    for family, place in places:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen(socket.SOMAXCONN)
            return listening
        except OSError as error:
            listening.close()
            why = error
    reason = (why.strerror or str(why)) if why else "it has no address"
    raise ConfigError(
        f"rank 0 cannot listen on MASTER_ADDR={address.host}, MASTER_PORT={address.port}: {reason}; MASTER_ADDR names "
        "the machine of rank 0 by the interface that all machines reach, MASTER_PORT a free port"
    )


def _own_address(host: str) -> str:
    """Returns the address of the interface that leads out of this machine; asking for it sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # an address that is nobody's
        except OSError:
            raise ConfigError(
                f"MASTER_ADDR={host} is a loopback address on rank 0's own machine, which other machines cannot reach; "
                "set it to the address of the interface that they share"
            ) from None
        own: str = asked.getsockname()[0]
        return own
