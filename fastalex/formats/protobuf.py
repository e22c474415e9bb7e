"""Protocol buffers as bytes: the fields of a message, every length checked against what is there.

Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_MOST_FIELDS = 1_000_000  # of one message: a hostile file of tiny ones would take all memory
_FIXED = {1: 8, 5: 4}  # bytes of the wire types that have no length of their own


class Message:
    """One message, read when it is made; what is in it stays bytes until it is asked for.

    Args:
        data: the bytes of the message.

    Raises:
        ValueError: where they are no message.
    """

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        place, count = 0, 0
        while place < len(data):
            count += 1
            if count > _MOST_FIELDS:
                raise ValueError(f"a message of more than {_MOST_FIELDS} fields")
            tag, place = _varint(data, place)
            number, wire = tag >> 3, tag & 7
            value: int | memoryview
            if wire == 0:
                value, place = _varint(data, place)
            elif wire == 2 or wire in _FIXED:
                length = _FIXED.get(wire)
                if length is None:
                    length, place = _varint(data, place)
                if number == 0 or length > len(data) - place:
                    raise ValueError(f"field {number} ends behind its message")
                value, place = data[place : place + length], place + length
            else:
                raise ValueError(f"field {number} is of no known type")
            self._fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def _of(self, number: int, kind: type) -> list[Any]:
        found = self._fields.get(number, [])
        if not all(isinstance(value, kind) for value in found):
            raise ValueError(f"field {number} is of another type than it has to be")
        return found

    def messages(self, number: int) -> list[Message]:
        """The messages of a repeated field."""
        return [Message(value) for value in self._of(number, memoryview)]

    def message(self, number: int) -> Message:
        """The message of a field; an empty one where it is missing."""
        return (self.messages(number) or [Message(memoryview(b""))])[-1]

    def strings(self, number: int) -> list[str]:
        return [bytes(value).decode("utf-8", "replace") for value in self._of(number, memoryview)]

    def string(self, number: int) -> str:
        """The text of a field; empty where it is missing."""
        return (self.strings(number) or [""])[-1]

    def number(self, number: int, default: int = 0) -> int:
        return int((self._of(number, int) or [default])[-1])

    def float(self, number: int, default: float = 0.0) -> float:
        found = self.array(number, "<f4")
        return float(found[-1]) if len(found) else default

    def numbers(self, number: int) -> list[int]:
        """The varints of a repeated field, packed or not."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(value)
                continue
            place = 0
            while place < len(value):
                one, place = _varint(value, place)
                found.append(one)
        return found

    def array(self, number: int, dtype: str) -> npt.NDArray[Any]:
        """The numbers of a repeated field of fixed size, or of raw bytes.

        Args:
            number: of the field.
            dtype: of its elements, as numpy calls it.
        """
        parts = self._of(number, memoryview)
        size = np.dtype(dtype).itemsize
        if any(len(part) % size for part in parts):
            raise ValueError(f"field {number} is cut in the middle of a number")
        arrays = [np.frombuffer(part, dtype) for part in parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.zeros(0, dtype), *arrays])


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The number that begins at ``place``, and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("ends in the middle of a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), place
    raise ValueError("a number of more than 64 bits")
