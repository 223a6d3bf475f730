"""Weight files that lie: each is refused in one line within a second, and nothing of its size is allocated."""

import json
import resource
import struct
import time

import pytest
import toy

from surgery_r1_jax import hf, tensors
from surgery_r1_jax.errors import InputError

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A sound folder with one weight file."""
    folder = toy.write_model(tmp_path_factory.mktemp("sound") / "model")
    assert hf.read_params(folder, hf.read_config(folder))
    return folder


def split(raw):
    """The header and the data of a file."""
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header, data, size=None):
    """A file again; the header may be bytes, and may claim another size than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(**changes):
    """Changes the entry of one tensor."""

    def change(header, data):
        return joined(header | {NORM: header[NORM] | changes}, data)

    return change


def moved(start, end):
    """Moves both offsets of one tensor by so many bytes."""

    def change(header, data):
        first, last = header[NORM]["data_offsets"]
        return joined(header | {NORM: header[NORM] | {"data_offsets": [first + start, last + end]}}, data)

    return change


def without(key):
    def change(header, data):
        return joined(header | {NORM: {k: v for k, v in header[NORM].items() if k != key}}, data)

    return change


def twice(header, data):
    text = json.dumps(header)
    again = json.dumps({NORM: header[NORM] | {"shape": [1]}})[1:-1]
    return joined(f"{text[:-1]}, {again}}}".encode(), data)


HOSTILE = {
    "a header of 2^63 bytes": lambda header, data: joined(header, data, size=2**63),
    "a header of 2^64 - 1 bytes": lambda header, data: joined(header, data, size=2**64 - 1),
    "a header of 100 MB that is not there": lambda header, data: joined(header, data, size=100_000_001),
    "a header longer than the file": lambda header, data: joined(header, b"", size=len(json.dumps(header)) + 1),
    "a header of no bytes": lambda header, data: joined(b"", data),
    "a header that is no JSON": lambda header, data: joined(b"{" * 64, data),
    "a header that is a list": lambda header, data: joined(b"[1, 2]", data),
    "a header that is no UTF-8": lambda header, data: joined(b"\xff\xfe" * 32, data),
    "a header nested without end": lambda header, data: joined(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data),
    "a header of spaces": lambda header, data: joined(b" " * 4096, data),
    "a header with nothing in it": lambda header, data: joined({}, data),
    "a name twice": twice,
    "an offset below nought": moved(-(2**40), 0),
    "an offset beyond 2^64": entry(data_offsets=[0, 2**65]),
    "an offset beyond the file": moved(0, 2**40),
    "an end before its start": entry(data_offsets=[8, 4]),
    "two tensors on one place": moved(-4, -4),
    "a hole between tensors": moved(4, 4),
    "an offset that is a text": entry(data_offsets=["0", "4"]),
    "an unknown type": entry(dtype="F99"),
    "a type of another width": entry(dtype="BF16"),
    "a shape of other size": entry(shape=[3, 5]),
    "a shape beyond 2^64": entry(shape=[2**33, 2**33]),
    "a shape below nought": entry(shape=[-1]),
    "a shape with nought": entry(shape=[0]),
    "a shape of texts": entry(shape=["32"]),
    "no offsets": without("data_offsets"),
    "no type": without("dtype"),
    "metadata that is no text": lambda header, data: joined(header | {"__metadata__": {"a": 1}}, data),
    "bytes behind the data": lambda header, data: joined(header, data + b"PK\x03\x04" * 64),
    "a file of another kind": lambda header, data: b"\x80\x04\x95" + bytes(200),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_file_that_lies_is_refused_at_once(source, tmp_path, lie):
    hf.copy_side_files(source, tmp_path)
    path = tmp_path / tensors.SINGLE
    path.write_bytes(HOSTILE[lie](*split((source / tensors.SINGLE).read_bytes())))
    settings = hf.read_config(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    since = time.monotonic()
    with pytest.raises(InputError) as refused:
        hf.read_params(tmp_path, settings)
    assert time.monotonic() - since < 1.0
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 32 << 20
