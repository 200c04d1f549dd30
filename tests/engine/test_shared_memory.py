"""Channels between two ends in one process: what is sent arrives, in whatever order it is asked for."""

import os
import socket
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipetrain.engine.message import Wire
from pipetrain.engine.shared_memory import Channel
from pipetrain.engine.transport import PeerLost

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (a, b):
        end.settimeout(5)
    yield Channel(a), Channel(b)
    a.close()
    b.close()


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def numbers(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int64)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]
)
def test_tensors_arrive_as_they_were(ends: Ends, dtype: torch.dtype) -> None:
    sent = torch.arange(77).to(dtype)
    ends[0].send(bytes_of(sent), 5)
    arrived = ends[1].take(5, Wire(77, dtype))
    assert torch.equal(arrived, sent)
    assert arrived.data_ptr() % 64 == 0


def test_messages_are_found_by_their_tags_in_any_order(ends: Ends) -> None:
    for tag in range(20):
        ends[0].send(bytes_of(numbers(tag + 1, tag)), tag)
    for tag in (7, 3, *range(19, 7, -1), 0, 1, 2, 4, 5, 6):
        assert torch.equal(ends[1].take(tag, Wire(tag + 1, torch.int64)), numbers(tag + 1, tag))


def test_messages_of_one_tag_keep_their_order_and_directions_are_apart(ends: Ends) -> None:
    for value in range(5):
        ends[0].send(bytes_of(numbers(1, value)), 9)
        ends[1].send(bytes_of(numbers(1, -value)), 9)
    ends[0].send(bytes_of(numbers(1)), 8)
    assert len(ends[1].take(8, Wire(1, torch.int64))) == 1
    for value in range(5):
        assert ends[1].take(9, Wire(1, torch.int64)).item() == value
        assert ends[0].take(9, Wire(1, torch.int64)).item() == -value


@pytest.mark.parametrize("unread", [0, 1, 3, 40])
def test_room_is_used_again_and_grows_where_it_is_not_enough(ends: Ends, unread: int) -> None:
    """Sizes that fit no ring evenly, with so many messages under way."""
    sizes = [1, 1000, 33_333, 7, 250_001, 64, 90_000] * 30
    reading = iter(enumerate(sizes))

    def read() -> None:
        number, size = next(reading)
        assert torch.equal(ends[1].take(number, Wire(size, torch.int64)), numbers(size, number))

    for number, size in enumerate(sizes):
        ends[0].send(bytes_of(numbers(size, number)), number)
        if number >= unread:
            read()
    for _ in range(unread):
        read()


def test_few_messages_under_way_need_little_memory(ends: Ends) -> None:
    """A ring, not a new segment for each: files would run out."""
    before = len(os.listdir("/proc/self/fd"))
    segments = set()
    for number in range(500):
        ends[0].send(bytes_of(numbers(40_000, number)), number)
        ends[1].take(number, Wire(40_000, torch.int64))
        segments.add(id(ends[0]._out))
    assert len(segments) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "one at each end"


def test_a_message_of_another_size_is_refused(ends: Ends) -> None:
    ends[0].send(bytes_of(numbers(3)), 1)
    with pytest.raises(RuntimeError, match="message 1 has 24 bytes, but"):
        ends[1].take(1, Wire(4, torch.int64))


def test_a_peer_that_has_gone_is_noticed_after_its_last_message() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left, right = Channel(a), Channel(b)
    left.send(bytes_of(numbers(3)), 1)
    a.close()
    assert torch.equal(right.take(1, Wire(3, torch.int64)), numbers(3))
    with pytest.raises(PeerLost, match="it has ended"):
        right.take(2, Wire(1, torch.int64))
    with pytest.raises(PeerLost, match="is gone"):
        right.send(bytes_of(numbers(1)), 3)
    b.close()


def test_a_peer_that_says_nothing_is_given_up() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    b.settimeout(0.05)
    with pytest.raises(PeerLost, match="nothing for too long"):
        Channel(b).take(1, Wire(1, torch.int64))
    a.close()
    b.close()
