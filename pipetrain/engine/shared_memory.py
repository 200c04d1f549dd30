"""Moves tensors between CPU processes of one machine, through memory that both have mapped.

A message is copied once into memory of the sender's, and out of it by the receiver. A few bytes through a Unix socket
say where it is and wake the receiver up. Against gloo's TCP this saves the calls, the threads and most of the copies. A
process that dies closes its sockets, which its peers notice at once; the memory has no name, so nothing stays behind.
"""

import datetime
import mmap
import os
import resource
import socket
import struct
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipetrain.engine.message import Wire
from pipetrain.engine.structure import ALIGNMENT_BYTES
from pipetrain.engine.transport import PeerLost, Replicas

_ANNOUNCED = struct.Struct("qqq")  # tag, where in the segment, number of bytes
_RANK = struct.Struct("q")
_FIRST_SEGMENT_BYTES = 1 << 20
_TOLD, _SUMMED = 1 << 40, 1 << 41  # above every tag of a tensor: small messages, and vectors that are added up


def machine() -> str:
    """The same text for processes that can share memory and sockets; nothing for one that cannot.

    (A limit to the size of files is one to that of shared memory.)
    """
    if sys.platform != "linux" or resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


class _Segment:
    """A ring in shared memory: one process writes messages, another reads them in the same order.

    Both count the bytes that they are through with since the begin. The reader's count lies in front of the ring; what
    was written is known by the announcements.
    """

    def __init__(self, file: int, num_bytes: int) -> None:
        mapped = mmap.mmap(file, num_bytes)
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)[ALIGNMENT_BYTES:]
        self._read = memoryview(mapped)[:8].cast("q")
        self._written = 0

    def find_room(self, num_bytes: int) -> int | None:
        """Where the next message can lie; None if the reader has not made room for it yet."""
        size, start = len(self._memory), self._written % len(self._memory)
        to_the_front = size - start if start + num_bytes > size else 0
        end = self._written + to_the_front + _padded(num_bytes)
        if num_bytes > size or end - self._read[0] > size:
            return None
        self._written = end
        return 0 if to_the_front else start

    def write(self, data: Tensor, start: int) -> None:
        self._memory[start : start + len(data)] = data

    def read(self, into: Tensor, start: int) -> None:
        """Copies a message out; its room can then be used again."""
        into.copy_(self._memory[start : start + len(into)])
        done = self._read[0]
        to_the_front = -done % len(self._memory) if start == 0 else 0
        self._read[0] = done + to_the_front + _padded(len(into))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Channel:
    """Both directions between this rank and another one.

    A message that finds no room in the last segment gets a new one, larger than the last: sending never waits.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._out: _Segment | None = None
        self._out_bytes = _FIRST_SEGMENT_BYTES
        self._in: _Segment | None = None
        self._early: dict[int, list[Tensor]] = {}  # by tag: what came before something that was waited for

    def send(self, data: Tensor, tag: int) -> None:
        """
        Args:
            data: uint8 [bytes], at least one.
        """
        files: list[int] = []
        start = None if self._out is None else self._out.find_room(len(data))
        if self._out is None or start is None:
            self._out_bytes = max(2 * self._out_bytes, 4 * _padded(len(data)))
            files.append(os.memfd_create("pipetrain"))
            os.ftruncate(files[0], ALIGNMENT_BYTES + self._out_bytes)
            self._out = _Segment(files[0], ALIGNMENT_BYTES + self._out_bytes)
            start = self._out.find_room(len(data))
        assert start is not None
        self._out.write(data, start)
        announced = _ANNOUNCED.pack(tag, start, len(data))
        with _peers_may_be_lost():
            if files:
                socket.send_fds(self._socket, [announced], files)
                os.close(files[0])
            else:
                self._socket.send(announced)

    def take(self, tag: int, wire: Wire) -> Tensor:
        """Waits for the next message of a tag."""
        early = self._early.get(tag)
        if early:
            return _as(early.pop(0), wire, tag)
        while True:
            found, data = self._next()
            if found == tag:
                return _as(data, wire, tag)
            self._early.setdefault(found, []).append(data)

    def _next(self) -> tuple[int, Tensor]:
        """The next message, whatever its tag: uint8 [bytes]."""
        with _peers_may_be_lost():
            announced, files, _, _ = socket.recv_fds(self._socket, _ANNOUNCED.size, 1)
        if not announced:
            raise PeerLost("the connection to another rank is gone: it has ended")
        tag, start, num_bytes = _ANNOUNCED.unpack(announced)
        if files:
            # The segment before it is read to its end: messages are announced in order.
            self._in = _Segment(files[0], os.fstat(files[0]).st_size)
            os.close(files[0])
        assert self._in is not None, "the first message brings a segment"
        data = torch.empty(num_bytes, dtype=torch.uint8)
        self._in.read(data, start)
        return tag, data


def _as(data: Tensor, wire: Wire, tag: int) -> Tensor:
    if len(data) != wire.numel * wire.dtype.itemsize:
        raise RuntimeError(f"message {tag} has {len(data)} bytes, but {wire} was expected")
    return data.view(wire.dtype)


@contextmanager
def _peers_may_be_lost() -> Iterator[None]:
    """Tells what the network raises from what the model raises."""
    try:
        yield
    except TimeoutError as error:
        raise PeerLost("another rank has sent nothing for too long") from error
    except OSError as error:
        raise PeerLost(f"the connection to another rank is gone: {error}") from error


class _Delivered:
    def wait(self) -> None:
        """In shared memory a message is there as soon as it is sent."""


_DELIVERED = _Delivered()


@dataclass
class _Expected:
    channel: Channel
    tag: int
    wire: Wire

    def wait(self) -> Tensor:
        return self.channel.take(self.tag, self.wire)


class SharedMemoryTransport:
    """All ranks of a pipeline, and of all other ones, which must be on one machine."""

    def __init__(self, timeout: datetime.timedelta, ranks: Sequence[int], replicas: Replicas) -> None:
        """
        Args:
            ranks: those of the default process group that are this pipeline.
        """
        self.rank = ranks.index(dist.get_rank())
        self.num_ranks = len(ranks)
        self.replicas = replicas
        self._channels = _connect(self.rank, self.num_ranks, replicas.number, timeout)

    def send(self, tensor: Tensor, to_rank: int, tag: int) -> _Delivered:
        self._channels[to_rank].send(tensor.detach().view(torch.uint8), tag)
        return _DELIVERED

    def post(self, wire: Wire, from_rank: int, tag: int) -> _Expected:
        return _Expected(self._channels[from_rank], tag, wire)

    def tell(self, data: Tensor, to_rank: int, tag: int) -> _Delivered:
        return self.send(data, to_rank, _TOLD + tag)

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        return self._channels[from_rank].take(_TOLD + tag, Wire(like.numel(), like.dtype)).view(like.shape)

    def all_reduce(self, vector: Tensor) -> Tensor:
        """The first rank adds up in the order of the ranks, and tells all."""
        wire, shape = Wire(vector.numel(), vector.dtype), vector.shape
        if self.num_ranks == 1 or not wire.numel:
            return vector
        flat = vector.reshape(-1)
        if self.rank > 0:
            self.send(flat, 0, _SUMMED)
            return self._channels[0].take(_SUMMED, wire).view(shape)
        total = flat.clone()
        for rank in range(1, self.num_ranks):
            total += self._channels[rank].take(_SUMMED, wire)
        for rank in range(1, self.num_ranks):
            self.send(total, rank, _SUMMED)
        return total.view(shape)


def _connect(rank: int, num_ranks: int, replica: int, timeout: datetime.timedelta) -> dict[int, Channel]:
    """A socket to every other rank of a pipeline, through names that only this machine's network namespace knows."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    address = f"\0pipetrain-{name[0]}-{replica}"
    channels: dict[int, Channel] = {}

    def add(other: int, connection: socket.socket) -> None:
        connection.settimeout(timeout.total_seconds())
        channels[other] = Channel(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"{address}-{rank}")
        listening.listen(num_ranks)
        dist.barrier()
        for other in range(rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(f"{address}-{other}")
            connection.send(_RANK.pack(rank))
            add(other, connection)
        while len(channels) < num_ranks - 1:
            connection, _ = listening.accept()
            if _user_of(connection) != os.getuid():  # names like these can be seen by all users
                connection.close()
                continue
            add(_RANK.unpack(connection.recv(_RANK.size))[0], connection)
    return channels


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
