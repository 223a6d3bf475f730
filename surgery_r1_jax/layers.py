"""The layers that tower and decoder share: parameters with named axes, linear, norm, gated MLP, rotary.

A parameter names its logical axes where it is made; `sharding.RULES` says where they live. Layers of a stack
are one parameter with a leading `layers` axis, made here by `stack=` and sliced by the scan over the stack.
Compute runs in the dtype of the input; norms, softmax and angles stay in float32.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from surgery_r1_jax import sharding

Initializer = Callable[..., jax.Array]


def param(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], init: Initializer, stack: int | None) -> nnx.Param:
    """A float32 parameter with named logical axes; `stack` adds a leading layer axis."""
    if stack is not None:
        shape, axes = (stack, *shape), ("layers", *axes)
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def gathered(params: nnx.State, dtype: str) -> nnx.State:
    """One layer's parameters as it computes with them: matrices in the precision of compute and in one place.

    Said once a layer, so that what prefix and branches share travels once and in the narrower precision, and their
    gradients are added up before they travel back.
    """

    def gather(variable):
        x = variable.get_value()
        if not isinstance(x, jax.Array) or x.ndim < 2:  # packed matrices; norms, which are read in float32
            return variable
        return variable.replace(sharding.gathered(x.astype(dtype), variable.get_metadata()["axes"][-x.ndim :]))

    return jax.tree.map(gather, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def recomputed(layer: Callable, everything: bool) -> Callable:
    """A layer whose backward pass computes `everything` again from the layer's input, or only casts and placements.

    Those always, else every layer's parameters would be kept as `gathered` made them.
    """
    cheap = ("convert_element_type", "sharding_constraint")
    kept = None if everything else lambda primitive, *_, **__: primitive.name not in cheap
    return jax.checkpoint(layer, policy=kept, prevent_cse=everything)


class Linear(nnx.Module):
    """A linear map from the last `inputs` axes of its input to the remaining axes of `shape`."""

    def __init__(self, shape, axes, *, rngs, inputs=1, bias=False, stack=None):
        # Only models trained from scratch ever see this: outputs start as large as inputs.
        spread = nnx.initializers.normal(math.prod(shape[:inputs]) ** -0.5)
        self.kernel = param(rngs, shape, axes, spread, stack)
        self.bias = param(rngs, shape[inputs:], axes[inputs:], nnx.initializers.zeros, stack) if bias else None
        self.inputs = inputs
        self.lora = None  # or a module whose output is added: see lora.py

    def __call__(self, x):
        """Map [..., in] to [..., out]."""
        y = jnp.tensordot(sharding.by_frames(x), self.kernel[...].astype(x.dtype), axes=self.inputs)
        if self.lora is not None:
            y += self.lora(x)
        y = sharding.by_frames(y)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, size, *, rngs, eps, stack=None):
        self.scale = param(rngs, (size,), ("norm",), nnx.initializers.ones, stack)
        self.eps = eps

    def __call__(self, x):
        """Normalise [..., size]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean and variance norm over the last axis, in float32."""

    def __init__(self, size, *, rngs, eps, stack=None):
        self.scale = param(rngs, (size,), ("norm",), nnx.initializers.ones, stack)
        self.bias = param(rngs, (size,), ("norm",), nnx.initializers.zeros, stack)
        self.eps = eps

    def __call__(self, x):
        """Normalise [..., size]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class MLP(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, width, hidden, axes, *, activation, rngs, bias=False, stack=None):
        outer, inner = axes
        self.up = Linear((width, hidden), (outer, inner), rngs=rngs, bias=bias, stack=stack)
        self.down = Linear((hidden, width), (inner, outer), rngs=rngs, bias=bias, stack=stack)
        self.activation = activation

    def __call__(self, x):
        """Map [..., width] to [..., width]."""
        return self.down(self.activation(self.up(x)))


def quick_gelu(x: jax.Array) -> jax.Array:
    """The cheap GELU of CLIP: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class GatedMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width, hidden, axes, *, rngs, bias=False, stack=None):
        outer, inner = axes
        up = dict(shape=(width, hidden), axes=(outer, inner), rngs=rngs, bias=bias, stack=stack)
        self.gate, self.up = Linear(**up), Linear(**up)
        self.down = Linear((hidden, width), (inner, outer), rngs=rngs, bias=bias, stack=stack)

    def __call__(self, x):
        """Map [..., width] to [..., width]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Turn the halves of the last axis against each other: x [..., N, H] by float32 angles [..., H/2]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (f(angle)[..., None, :].astype(wide) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def inverse_frequencies(size: int, theta: float) -> jax.Array:
    """Rotary frequencies of `size` / 2 pairs, float32."""
    return 1.0 / theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
