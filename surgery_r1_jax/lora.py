"""Low-rank adapters: linear layers that learn a small correction while their own weights stay as they are.

An adapter hangs in the linear layer it corrects, so every program runs it where it runs the layer. Parameters fall
into two trees that `model.joined` puts together again: the base, frozen and held once, and the adapters. The graph
without adapters runs the base alone, which is GRPO's reference model at no cost.

Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; initial values and dropout as in huggingface/peft,
tuners/lora/layer.py.
"""

import functools
import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from surgery_r1_jax import errors, families, layers, model, options, sharding, weights

# What a checkpoint holds as a matrix, but PyTorch does not run as a linear layer, where PEFT could not adapt it.
NOT_LINEAR = ("tower.patch_embed", "decoder.blocks.mlp.router")


class Noise(nnx.Variable):
    """The key of an adapter's dropout, one a layer; handed in anew with every training step."""


class Adapter(nnx.Module):
    """The correction of one linear layer (or of a stack of them): scale * b(a(x)), nought at the start."""

    def __init__(self, linear: layers.Linear, settings: options.Lora, *, rngs):
        axes, shape = linear.kernel.get_metadata()["axes"], linear.kernel.get_value().shape
        stacked = int(axes[0] == "layers")
        outer = stacked + linear.inputs  # where the kernel's outputs begin
        bound = math.prod(shape[stacked:outer]) ** -0.5
        self.a = layers.param(
            rngs, (*shape[:outer], settings.rank), (*axes[:outer], "rank"), functools.partial(_uniform, bound), None
        )
        self.b = layers.param(
            rngs,
            (*shape[:stacked], settings.rank, *shape[outer:]),
            (*axes[:stacked], "rank", *axes[outer:]),
            nnx.initializers.zeros,
            None,
        )
        self.inputs, self.scale, self.dropout = linear.inputs, settings.scale, settings.dropout
        self.key = Noise(jax.random.split(rngs.params(), shape[:stacked])) if settings.dropout else None

    def __call__(self, x):
        """Map [..., in] to [..., out]."""
        if self.key is not None:
            key = jax.random.fold_in(self.key[...], x.size % 2**31)  # prefix and branches come through one adapter
            kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        low = sharding.by_frames(jnp.tensordot(x, self.a[...].astype(x.dtype), axes=self.inputs))
        return jnp.tensordot(low, self.b[...].astype(x.dtype), axes=1) * self.scale


def linears(config: model.Config) -> dict[str, str]:
    """Our path of every layer that may be adapted -> its module in transformers ({i}: layer of a stack)."""
    return {
        ours.removesuffix(".kernel"): weights.spelled(name).removesuffix(".weight")
        for ours, (name, _) in families.of(config).names.items()
        if ours.endswith(".kernel") and not ours.startswith(NOT_LINEAR)
    }


def chosen(config: model.Config, targets: tuple[str, ...]) -> list[str]:
    """Our paths of the layers that `targets` name: parts of the model, or patterns of transformers' module names.

    Raises: InputError for one that names no linear layer.
    """
    modules, found = linears(config), set()
    for target in targets:
        named = {
            path
            for path, module in modules.items()
            if model.part_of(tuple(path.split("."))) == target or _matches(module, target)
        }
        if not named:
            last = sorted({module.rsplit(".", 1)[-1] for module in modules.values()})
            others = [weights.spelled(name) for name, _ in families.of(config).names.values()]
            fused = any(".experts." in name and _matches(name.removesuffix(".weight"), target) for name in others)
            why = "names experts, which are fused: they cannot be adapted" if fused else "names no linear layer"
            raise errors.InputError(
                f"lora.targets: '{target}' {why}; take {', '.join(model.PARTS)}, or modules by name: {', '.join(last)}"
            )
        found |= named
    return [path for path in modules if path in found]


def build(
    config: model.Config, compute: options.Compute, settings: options.Lora, attend: Callable | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and abstract parameters of a model with adapters, as `model.build` gives them of one without (rank 0).

    With dropout the graph wants the keys of `noise` beside the parameters.
    """
    net = nnx.eval_shape(lambda: _adapted(config, compute, settings, nnx.Rngs(0), attend))
    graph, params, _ = nnx.split(net, nnx.Param, ...)
    return graph, params


def init(config: model.Config, settings: options.Lora, seed: int, shardings: dict) -> dict:
    """Fresh adapters: `a` uniform within +-1 / sqrt(inputs), `b` nought, so that the model starts as its base."""

    def draw(key):
        net = _adapted(config, options.Compute(), settings, nnx.Rngs(key))
        return split(nnx.to_pure_dict(nnx.state(net, nnx.Param)))[0]

    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


def split(params: dict) -> tuple[dict, dict]:
    """What is trained of a tree and what is frozen: adapters and base, or all and nothing where there are none."""
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if "lora" in path}
    if not adapters:
        return params, {}
    base = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(adapters), unflatten_dict(base)


def noise(adapters: dict, settings: options.Lora, key: jax.Array) -> dict:
    """The keys of the adapters' dropout in one training step, to be joined to them; empty without dropout."""
    keys = {}
    for path, a in flatten_dict(adapters).items():
        if settings.dropout and path[-1] == "a":
            key, own = jax.random.split(key)
            keys[*path[:-1], "key"] = jax.random.split(own, a.shape[:1] if model.is_stacked(path) else ())
    return unflatten_dict(keys)


def merged(base: dict, adapters: dict, settings: options.Lora) -> dict:
    """The parameters of a model without adapters that computes the same; gives away the adapted kernels of `base`."""
    flat, adapters = flatten_dict(base), flatten_dict(adapters)
    for *layer, last in adapters:
        if last == "a":
            path = (*layer[:-1], "kernel")
            a, b = adapters[*layer, "a"], adapters[*layer, "b"]
            flat[path] = _corrected(flat[path], a, b, settings.scale, model.is_stacked(path))
    return unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _corrected(kernel, a, b, scale: float, stacked: bool):
    lead, rank = kernel.shape[:stacked], a.shape[-1]
    change = jnp.matmul(
        a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), precision=jax.lax.Precision.HIGHEST
    ).reshape(kernel.shape)
    return (kernel + scale * change).astype(kernel.dtype)


def _adapted(
    config: model.Config,
    compute: options.Compute,
    settings: options.Lora,
    rngs: nnx.Rngs,
    attend: Callable | None = None,
) -> model.QwenVL:
    net = model.QwenVL(config, compute, attend, rngs=rngs)
    paths = set(chosen(config, settings.targets)) if settings.rank else set()
    for path, module in list(nnx.iter_modules(net)):
        if ".".join(map(str, path)) in paths:
            module.lora = nnx.data(Adapter(module, settings, rngs=rngs))
    return net


def _matches(module: str, pattern: str) -> bool:
    """Whether a pattern names a module, whole or by the last of its names."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def _uniform(bound: float, key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)
