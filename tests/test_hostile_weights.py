"""Weight files that lie: each is refused in one line within a second, and nothing of its size is allocated.

The mutated files are held against the `safetensors` package: what it refuses is refused, and what is read is, byte for
byte, what it reads. All 20,000 of them: pytest -m slow tests/test_hostile_weights.py
"""

import json
import resource
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
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
    since = time.process_time()
    with pytest.raises(InputError) as refused:
        hf.read_params(tmp_path, settings)
    assert time.process_time() - since < 1.0
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 32 << 20


TOKENS = (
    *(b"null", b"true", b"NaN", b"-1", b"1e3", b"0.5", b"00", b"18446744073709551616", b"9223372036854775808"),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'"__metadata__":{}', b"\\u0000", b"\\ud800", b"\n", b"\xff"),
    *(b'"F64"', b'"F16"', b'"BF16"', b'"I8"', b'"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'),
)
# Two tokens' worth: other names, types and shapes, some of which fit.
SWAPS = ((b"F16", b"BF16"), (b"BF16", b"F16"), (b"[2,3]", b"[3,2]"), (b'"a"', b'"\\n"'), (b'"c"', b'"b"'))


def longer(raw, by):
    """The length at the head of a file, grown."""
    return ((int.from_bytes(raw[:8], "little") + by) % 2**64).to_bytes(8, "little")


def mutated(raw, rng):
    """A file with one to three changes in its header or in the header's length."""
    out, end = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, to = (int(n) for n in rng.integers(8, end, 2))
        span = bytes(out[at : at + int(rng.integers(1, 40))])
        match rng.integers(10):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.integers(256))
            case 2:
                del out[at : at + len(span)]
            case 3:
                out[to:to] = span
            case 4:
                out[to : to + len(span)] = span
            case 5:
                out[at:at] = TOKENS[rng.integers(len(TOKENS))]
            case 6:  # a digit for a digit: the file stays sound JSON
                digits = [i for i in range(8, min(end, len(out))) if 48 <= out[i] < 58]
                out[digits[int(rng.integers(len(digits)))] if digits else at] = 48 + int(rng.integers(10))
            case 7:
                old, new = SWAPS[rng.integers(len(SWAPS))]
                changed = bytes(out[8:]).replace(old, new, 1)
                out[:] = longer(out, len(changed) - len(out) + 8) + changed
            case 8:  # the length grows or shrinks with the header
                token = TOKENS[rng.integers(len(TOKENS))]
                out[at:at] = token
                out[:8] = longer(out, len(token))
            case _:
                out[int(rng.integers(8))] = int(rng.integers(256))
    return bytes(out)


def small_file():
    """Every type that is read, a tensor without axes and one without numbers."""
    held = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.ones((3, 1), np.float16),
        "e": np.full((), 7, np.float32),
        "f": np.zeros((0, 3), np.float32),
    }
    return safetensors.numpy.save(held, metadata={"format": "pt"})


def read(folder):
    """Bytes, type and shape of all tensors, as our reader gives them."""
    found = {}
    for name, stored in tensors.opened(folder).items():
        value = tensors.numbers(stored, tuple(stored.shape))
        found[name] = (stored.kind, list(value.shape), value.tobytes())
    return found


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_mutated_header_is_refused_or_read_as_the_format_s_own_library_reads_it(tmp_path, count):
    rng, raw, path = np.random.default_rng(count), small_file(), tmp_path / tensors.SINGLE
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = alike = 0
    for number in range(count):
        changed = mutated(raw, rng)
        path.write_bytes(changed)
        since = time.process_time()
        try:
            found = read(tmp_path)
        except InputError as problem:
            message = str(problem)
            assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 600, (number, message)
            refused += 1
        else:
            want = safetensors.deserialize(changed)
            assert found == {name: (held["dtype"], held["shape"], held["data"]) for name, held in want}, number
            alike += 1
        assert time.process_time() - since < 1.0, number
    assert refused > count / 2 and alike > count / 100
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 32 << 20
