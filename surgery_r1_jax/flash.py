"""Flash attention for TPUs, in Pallas: scores exist only block by block, in the forward and in the backward pass.

Who sees whom is said by two integers a query and two a key (`Marks`), so that one kernel serves causal prefixes,
branches over a shared prefix, and images side by side. A block in which nobody can see anybody is neither computed
nor fetched. Grouped heads are more rows: those that share a key head lie one after the other.

    forward     for each block of rows:   over the blocks of keys, out and log-sum-exp
    backward    for each block of rows:   over the blocks of keys, the gradient of q
                for each block of keys:   over the blocks of rows, the gradients of k and v

Algorithm: FlashAttention-2 (arXiv:2307.08691). Scores, softmax and sums are float32, weights are used in the
precision of the input, as in `attention.attend`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from surgery_r1_jax.attention import MASKED

NOBODY, EVERYBODY = -2, -1  # segments of keys: an empty slot; a key that every query sees
LANES = 128  # of a TPU's registers: what blocks are multiples of
AB, ABt = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # products of matrices, the second one as it is or turned


class Marks(NamedTuple):
    """A query sees the keys of its own segment at or before its place in time, and those of EVERYBODY."""

    segment: jax.Array  # int32 [B, T]: from 1; of queries 0 = padding; of keys also NOBODY and EVERYBODY
    order: jax.Array  # int32 [B, T]


def sees(segment, order, key_segment, key_order):
    """Whether queries with the first two marks see keys with the last two."""
    return ((key_segment == segment) & (key_order <= order)) | (key_segment == EVERYBODY)


class Blocks(NamedTuple):
    """How the work is cut; `interpret` imitates the kernels on any device, slowly, for tests."""

    rows: int = 512  # queries times the heads of a group
    keys: int = 512
    interpret: bool = False


BLOCKS = Blocks()


def attend(q_BTNH, k_BUKH, v_BUKH, queries: Marks, keys: Marks, blocks: Blocks = BLOCKS) -> jax.Array:
    """softmax(q k' / sqrt(H)) v over what each query may see: [B, T, N, H], nought where that is nothing."""
    B, T, N, H = q_BTNH.shape
    U, K = k_BUKH.shape[1:3]
    G = N // K
    rows, slots = min(blocks.rows, _up(T * G, LANES)), min(blocks.keys, _up(U, LANES))

    def head_first(x_BXKH, block):
        return _padded(jnp.swapaxes(x_BXKH, 1, 2), block, axis=2)

    def lines(segment, order, empty, block):
        segment = _padded(segment, block, axis=1, value=empty)
        return jnp.stack([segment, _padded(order, block, axis=1)], axis=1)[:, None]

    q_BTKGH = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, T, K, G, H)
    q_BKRH = _padded(jnp.moveaxis(q_BTKGH, 2, 1).reshape(B, K, T * G, H), rows, axis=2)
    row_marks = lines(*(jnp.repeat(mark, G, axis=1) for mark in queries), 0, rows)
    key_marks = lines(*keys, NOBODY, slots)
    live = _live(row_marks[:, 0], key_marks[:, 0], rows, slots)
    k_BKUH, v_BKUH = head_first(k_BUKH, slots), head_first(v_BUKH, slots)
    out = _flash(q_BKRH, k_BKUH, v_BKUH, row_marks, key_marks, live, Blocks(rows, slots, blocks.interpret))
    return jnp.moveaxis(out[:, :, : T * G].reshape(B, K, T, G, H), 1, 2).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q_BKRH, k_BKUH, v_BKUH, row_marks, key_marks, live, blocks):
    return _forward(q_BKRH, k_BKUH, v_BKUH, row_marks, key_marks, live, blocks)[0]


def _forward(q, k, v, row_marks, key_marks, live, blocks):
    B, K, R, H = q.shape
    stay, passing = (q, row_marks), (k, v, key_marks)
    made = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, K, 1, R), jnp.float32)
    scratch = [(blocks.rows, H), (blocks.rows, 1), (blocks.rows, 1)]
    out, lse = _sweep(_forward_kernel, live, stay, passing, made, scratch, blocks.rows, blocks.keys, blocks.interpret)
    return out, (q, k, v, row_marks, key_marks, live, out, lse)


def _backward(blocks, residuals, d_out):
    q, k, v, row_marks, key_marks, live, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    rows, keys = (q, d_out, lse, delta, row_marks), (k, v, key_marks)
    like = lambda *arrays: tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)  # noqa: E731
    R, U, H = blocks.rows, blocks.keys, q.shape[-1]
    (dq,) = _sweep(_rows_kernel, live, rows, keys, like(q), [(R, H)], R, U, blocks.interpret)
    turned = jnp.swapaxes(live, 1, 2)
    dk, dv = _sweep(_keys_kernel, turned, keys, rows, like(k, v), [(U, H)] * 2, U, R, blocks.interpret)
    return dq, dk, dv, None, None, None


_flash.defvjp(_forward, _backward)


def _sweep(kernel, live, stay, passing, made, scratch, stay_block, pass_block, interpret):
    """Run a kernel over [B, K, blocks that stay, blocks that pass by], those passing that are live.

    Arrays are [B, K, n, H], cut along n, or lines [B, K or 1, 1 or 2, n], cut along n. A block that is not live is
    given as the last one that was, which then is not fetched again.
    """
    B, K = stay[0].shape[:2]
    n_stay, n_pass = live.shape[1:]
    number = jnp.where(live, jnp.arange(n_pass), -1)
    fetched = jax.lax.cummax(number, axis=2).reshape(-1)

    def spec(array, block, at):
        heads = array.shape[1] > 1
        if array.shape[2] > 2:
            return pl.BlockSpec((None, None, block, array.shape[3]), lambda b, h, *ij: (b, h * heads, at(b, *ij), 0))
        return pl.BlockSpec((None, None, array.shape[2], block), lambda b, h, *ij: (b, h * heads, 0, at(b, *ij)))

    here = lambda b, i, j, fetched: i  # noqa: E731
    nearest = lambda b, i, j, fetched: jnp.maximum(fetched[(b * n_stay + i) * n_pass + j], 0)  # noqa: E731

    def guarded(fetched, *refs):
        b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
        alive = fetched[(b * n_stay + i) * n_pass + j] == j
        kernel(*refs, first=j == 0, alive=alive, last=j == n_pass - 1)

    return pl.pallas_call(
        guarded,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, n_stay, n_pass),
            in_specs=[spec(a, stay_block, here) for a in stay] + [spec(a, pass_block, nearest) for a in passing],
            out_specs=[spec(a, stay_block, here) for a in made],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=made,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
    )(fetched, *stay, *passing)


def _forward_kernel(q, row_marks, k, v, key_marks, out, lse, total, top, weight, *, first, alive, last):
    @pl.when(first)
    def _():
        total[...], weight[...] = jnp.zeros_like(total), jnp.zeros_like(weight)
        top[...] = jnp.full_like(top, MASKED)

    @pl.when(alive)
    def _():
        s = jnp.where(_sees(row_marks[...].T, key_marks[...]), _dot(q, k, ABt), MASKED)
        higher = jnp.maximum(top[...], s.max(axis=1, keepdims=True))
        # A row that has seen nothing yet counts what is masked; the first key that it sees makes nought of that.
        p, shrink = jnp.exp(s - higher), jnp.exp(top[...] - higher)
        total[...] = total[...] * shrink + _dot(p.astype(v.dtype), v, AB)
        weight[...] = weight[...] * shrink + p.sum(axis=1, keepdims=True)
        top[...] = higher

    @pl.when(last)
    def _():
        saw = top[...] > MASKED
        safe = jnp.where(saw, weight[...], 1.0)
        out[...] = jnp.where(saw, total[...] / safe, 0.0).astype(out.dtype)
        lse[...] = jnp.where(saw, top[...] + jnp.log(safe), 0.0).T


def _rows_kernel(q, d_out, lse, delta, row_marks, k, v, key_marks, dq, total, *, first, alive, last):
    @pl.when(first)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(alive)
    def _():
        s = jnp.where(_sees(row_marks[...].T, key_marks[...]), _dot(q, k, ABt), MASKED)
        p = jnp.exp(s - lse[...].T)
        ds = p * (_dot(d_out, v, ABt) - delta[...].T)
        total[...] += _dot(ds.astype(k.dtype), k, AB)

    @pl.when(last)
    def _():
        dq[...] = total[...].astype(dq.dtype)


def _keys_kernel(k, v, key_marks, q, d_out, lse, delta, row_marks, dk, dv, k_total, v_total, *, first, alive, last):
    """Everything turned, keys down and rows across, so that lines of rows are used as they lie."""

    @pl.when(first)
    def _():
        k_total[...], v_total[...] = jnp.zeros_like(k_total), jnp.zeros_like(v_total)

    @pl.when(alive)
    def _():
        s = jnp.where(_sees(row_marks[...], key_marks[...].T), _dot(k, q, ABt), MASKED)
        p = jnp.exp(s - lse[...])
        v_total[...] += _dot(p.astype(d_out.dtype), d_out, AB)
        ds = p * (_dot(v, d_out, ABt) - delta[...])
        k_total[...] += _dot(ds.astype(q.dtype), q, AB)

    @pl.when(last)
    def _():
        dk[...], dv[...] = k_total[...].astype(dk.dtype), v_total[...].astype(dv.dtype)


def _sees(row_marks, key_marks):
    """Which rows see which keys, of lines [2, n] and their transpose [n, 2], whichever is which."""
    rows, keys = ((m[:1], m[1:]) if m.shape[0] == 2 else (m[:, :1], m[:, 1:]) for m in (row_marks, key_marks))
    return sees(*rows, *keys)


def _dot(a, b, contraction):
    return jax.lax.dot_general(a[...], b[...], contraction, preferred_element_type=jnp.float32)


def _live(row_marks, key_marks, rows: int, slots: int):
    """Blocks [B, blocks of rows, blocks of keys] in which somebody may see somebody, by the ranges of their marks."""
    cut = lambda lines, block: jnp.moveaxis(lines.reshape(*lines.shape[:2], -1, block), 1, 0)  # noqa: E731
    (segment, order), (key_segment, key_order) = cut(row_marks, rows), cut(key_marks, slots)
    far = jnp.iinfo(jnp.int32).max
    span = lambda x, ok: (jnp.where(ok, x, far).min(-1), jnp.where(ok, x, -far).max(-1))  # noqa: E731
    (low, high), (_, latest) = span(segment, segment > 0), span(order, segment > 0)
    (key_low, key_high), (earliest, _) = span(key_segment, key_segment > 0), span(key_order, key_segment > 0)
    row, key = (lambda x: x[:, :, None]), (lambda x: x[:, None])
    meet = (key(key_low) <= row(high)) & (row(low) <= key(key_high)) & (key(earliest) <= row(latest))
    return meet | key((key_segment == EVERYBODY).any(-1))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(x, multiple: int, axis: int, value=0):
    more = _up(x.shape[axis], multiple) - x.shape[axis]
    return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)], constant_values=value)
