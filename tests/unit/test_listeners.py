"""What listens in a guest, out of its kernel's tables, be they true or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandmartin.control.listeners import MOST_BYTES, MOST_LISTENERS, Listener, read_listeners

HEAD = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
REST = b" 00000000:00000000 00:00000000 00000000     0        0 101683 1 00000000736d02ef 100 0\n"


def line(local: str, state: str = "0A", remote: str = "") -> bytes:
    remote = remote or "0" * len(local.partition(":")[0]) + ":0000"
    return f"   0: {local} {remote} {state}".encode() + REST


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("00000000:1F90", Listener(8080, "0.0.0.0", loopback=False)),
        ("0100007F:1F90", Listener(8080, "127.0.0.1", loopback=True)),
        ("3500007F:0035", Listener(53, "127.0.0.53", loopback=True)),
        ("0500000A:FFFF", Listener(65535, "10.0.0.5", loopback=False)),
        ("0" * 32 + ":0050", Listener(80, "::", loopback=False)),
        ("0" * 24 + "01000000:0050", Listener(80, "::1", loopback=True)),
        ("000080FE000000000000000001000000:0050", Listener(80, "fe80::1", loopback=False)),
        ("0" * 16 + "FFFF00000100007F:0050", Listener(80, "127.0.0.1", loopback=True)),
    ],
)
def test_an_address_is_read_as_the_kernel_means_it(local: str, expected: Listener) -> None:
    assert read_listeners(HEAD + line(local)) == [expected]


def test_only_what_listens_counts_once_and_in_order() -> None:
    table = HEAD + line("00000000:1F90") + line("0100007F:0016") + line("00000000:1F90")
    # Connected, and waiting for its end.
    table += line("0100007F:2000", "01", "0100007F:9999") + line("0100007F:2001", "06")
    assert [each.port for each in read_listeners(table)] == [22, 8080]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 100,
        HEAD,
        b"0: 00000000:1F90",
        line("00000000:0000"),
        line("00000000:1f90"),
        line("00000000:01F90"),
        line("000000000000:1F90"),
        line("00000000:1F90", "0A0A"),
        line("00000000:1F90").replace(b"0: ", b"<b>: "),
        line("00000000:1F90").replace(b"\n", b"x" * 300 + b"\n"),
        f"   0: {chr(0xFF10) * 8}:1F90 00000000:0000 0A\n".encode(),
    ],
)
def test_what_is_no_line_is_left_out(garbage: bytes) -> None:
    assert read_listeners(garbage) == []
    good = line("00000000:1F90")
    assert [each.port for each in read_listeners(garbage + b"\n" + good)] == [8080]


def test_a_table_without_an_end_is_bounded() -> None:
    many = b"".join(line(f"{address:08X}:1F90") for address in range(1, 3000))
    assert len(read_listeners(many)) == MOST_LISTENERS
    assert read_listeners(b" " * MOST_BYTES + line("00000000:1F90")) == []


@given(st.binary(max_size=2000))
def test_no_bytes_are_too_much(table: bytes) -> None:
    for each in read_listeners(HEAD + table):
        assert 0 < each.port <= 65535
