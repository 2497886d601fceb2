"""A file with something in it changed, at random but the same for the same draw: bytes, or what they mean."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

#: In place of any value of a document.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "a",
        "../../etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "\0",
        "\ud800",
        "x" * 5000,
        "__import__('os')",
        "a\nb",
    ),
    *([], [[]], [None, None], ["a"], {}, {"a": 1}, [{}, {"a": 1}]),
]
#: In place of a number in a file's bytes.
NUMBERS = (0, 1, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "X")


def mutated(draw: random.Random, seed: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes; those that keep a format's own checks whole (sums, lengths) as often as those that do not."""
    data = seed
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        inner = next((change for start, change in _INNER.items() if data.startswith(start)), None)
        if inner is None and data[8:9] == b"{":
            inner = _safetensors
        elif inner is None and data[:1] in (b"{", b"["):
            inner = _json
        if inner is not None and draw.random() < 0.6:
            try:
                data = inner(draw, data)
                continue
            except (
                ValueError,
                KeyError,
                IndexError,
                TypeError,
                AttributeError,
                struct.error,
                zipfile.BadZipFile,
                OverflowError,
            ):
                pass  # what an earlier change has broken
            except (RecursionError, EOFError, NotImplementedError, zlib.error, OSError, UnicodeError):
                pass
        data = _bytes(draw, data, others)
    return data


def changed(draw: random.Random, value: Any) -> Any:
    """One thing in a document changed, removed or repeated, at a random depth."""
    value = copy.copy(value)
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(VALUES)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = draw.random()
    if kind < 0.15:
        del value[key]
    elif kind < 0.25:
        if isinstance(value, list):
            value.append(value[key])
        else:
            value[str(draw.choice(VALUES))[:50]] = value[key]
    else:
        value[key] = changed(draw, value[key])
    return value


def _bytes(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if not data:
        return draw.choice(others)
    at = min(draw.randrange(len(data)), draw.randrange(len(data)))  # headers more often than what they tell of
    size = draw.choice((1, 2, 4, 8, 16, 100))
    kind = draw.randrange(8)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + draw.randbytes(size) + data[at + size :]
    if kind == 2:
        width = draw.choice((1, 2, 4, 8))
        number = draw.choice(NUMBERS) & (1 << 8 * width) - 1
        return data[:at] + number.to_bytes(width, draw.choice(("little", "big"))) + data[at + width :]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + data[at : at + size] * draw.choice((2, 3, 50)) + data[at + size :]
    if kind == 5:
        return data[:at]
    if kind == 6:
        other = draw.choice(others)
        start = draw.randrange(len(other))
        return data[:at] + other[start : start + size] + data[at + size :]
    token = str(draw.choice(VALUES)).encode("utf-8", "surrogatepass")
    return data[:at] + token + data[at + size :]


def _json(draw: random.Random, data: bytes) -> bytes:
    """JSON, or a line of several."""
    lines = data.splitlines()
    if len(lines) > 1 and lines[1][:1] in (b"{", b"["):
        k = draw.randrange(len(lines))
        lines[k] = json.dumps(changed(draw, json.loads(lines[k]))).encode()
        return b"\n".join(lines)
    return json.dumps(changed(draw, json.loads(data))).encode()


def _safetensors(draw: random.Random, data: bytes) -> bytes:
    """The header as a document, also the documents in its metadata; or a number of a tensor."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind, name = draw.random(), draw.choice(list(header))
    if name == "__metadata__":
        metadata = header[name]
        key = draw.choice(list(metadata))
        try:
            metadata[key] = json.dumps(changed(draw, json.loads(metadata[key])))
        except ValueError:
            metadata[key] = str(draw.choice(VALUES))
    elif kind < 0.2:
        header[name]["dtype"] = draw.choice(DTYPES)
    elif kind < 0.5:  # another shape of as many numbers, or not
        shape = header[name]["shape"]
        draw.choice((shape.reverse, lambda: shape.append(1), lambda: shape.insert(0, 1), lambda: shape.append(2)))()
        if draw.random() < 0.3:
            shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 3, 2**40, -1))
    elif kind < 0.7:
        parts = name.split(".")
        other = draw.choice([other for other in header if other != "__metadata__"]).split(".")
        at = draw.randrange(len(parts))
        parts[at] = draw.choice([*other, "", "alpha", "0", "lora_down", "dora_scale", "diff"])
        header[".".join(parts)] = header.pop(name)
    elif kind < 0.8:
        del header[name]
    elif kind < 0.9:
        start = header[name]["data_offsets"][0]
        body[start : start + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), 3e38, -0.0)))
    else:
        header = changed(draw, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def _png(draw: random.Random, data: bytes) -> bytes:
    """A chunk changed, with the sum that belongs to it; the pixels as they are before they are packed."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    k = draw.randrange(len(chunks))
    kind, content = chunks[k]
    if kind == b"tEXt" and b"\0{" in content:
        key, text = content.split(b"\0", 1)
        content = key + b"\0" + _json(draw, text)
    elif kind == b"IDAT" and draw.random() < 0.5:
        content = zlib.compress(_bytes(draw, zlib.decompress(content), [content]))
    else:
        content = _bytes(draw, content, [data])
    chunks[k] = (kind, content)
    if draw.random() < 0.1:
        chunks.insert(draw.randrange(len(chunks)), draw.choice(chunks))
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(packed)


def _zip(draw: random.Random, data: bytes) -> bytes:
    """A member changed, with the sum that belongs to it."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {name: old.read(name) for name in old.namelist()}
    name = draw.choice([*members, *(name for name in members if name.endswith("data.pkl")), *members])
    members[name] = _bytes(draw, members[name], list(members.values()))
    if draw.random() < 0.1:
        members[name + draw.choice(("x", "/../x"))] = members.pop(name)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return buffer.getvalue()


_INNER = {b"\x89PNG": _png, b"PK\x03\x04": _zip}
