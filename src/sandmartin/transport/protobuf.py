"""Protobuf's binary form, as far as the messages of the streams need it.

Content in JSON is base64: a third more bytes, and two more passes over them. These lines spare
every user of the client a protobuf package. What is decoded comes from a peer that may be broken:
nothing is taken that the bytes at hand do not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_WORD = 1 << 64

#: A field's value as it stands on the wire: a number, or what has a length.
Fields = Mapping[int, int | bytes]


# Encoding. As the proto3 rules have it, a field that has its default value is left out.


def integer(number: int, value: int) -> bytes:
    """A field of an integer or boolean type."""
    return varint(number << 3 | _VARINT) + varint(value % _WORD) if value else b""


def content(number: int, value: bytes | memoryview, *, always: bool = False) -> bytes:
    """A field of bytes or an encoded message; one of a `oneof` is there `always`."""
    if not value and not always:
        return b""
    return b"".join((varint(number << 3 | _LENGTH), varint(len(value)), value))


def text(number: int, value: str) -> bytes:
    return content(number, value.encode())


def texts(number: int, values: Iterable[str]) -> bytes:
    """A repeated string field."""
    return b"".join(content(number, value.encode(), always=True) for value in values)


def pairs(number: int, values: Mapping[str, str]) -> bytes:
    """A field that maps strings to strings."""
    entries = (text(1, name) + text(2, value) for name, value in values.items())
    return b"".join(content(number, entry, always=True) for entry in entries)


def varint(value: int) -> bytes:
    """A variable-length integer, not below 0."""
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# Decoding.


def decode(data: bytes) -> dict[int, int | bytes]:
    """The fields of a message by number; of one that comes twice the last. Raises ValueError."""
    return dict(fields(data))


def repeated(data: bytes, number: int) -> Iterator[bytes]:
    """The values of a repeated field that is no number. Raises ValueError."""
    return (value for key, value in fields(data) if key == number and isinstance(value, bytes))


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message, as they stand there. Raises ValueError."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = read_varint(data, at)
            yield number, value
            continue
        if kind == _LENGTH:
            size, at = read_varint(data, at)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            raise ValueError(f"field {number} has wire type {kind}")
        if size > len(data) - at:
            raise ValueError(f"field {number} is cut short")
        yield number, data[at : at + size]
        at += size


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length integer at `at`, and where it ends. Raises ValueError."""
    value = 0
    for shift, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if not byte & 0x80:
            return value % _WORD, at + shift + 1
    raise ValueError("a number is cut short or too long")


def signed(value: int) -> int:
    """The 32-bit integer that stands on the wire as `value`."""
    value %= 1 << 32
    return value - (1 << 32) if value >> 31 else value
