"""Qwen-VL over a `FrameBatch`: the tower's vectors take the image places of the prefix, branches follow.

`QwenVL` defines and initialises; programs hold `(graph, params)` apart and put them together inside a jitted
step (`bind`), so that a step is an ordinary function of ordinary trees.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from surgery_r1_jax import backends, decoder, layers, options, sharding, vision
from surgery_r1_jax.attention import Queries
from surgery_r1_jax.batch import FrameBatch
from surgery_r1_jax.decoder import Cache, Stream

PARTS = ("tower", "merger", "decoder")  # what freezing and learning rates speak of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture and the token ids that have a meaning for it."""

    text: decoder.Config
    vision: vision.Config
    image_token_id: int
    tie_word_embeddings: bool
    family: str  # `model_type` of config.json


class QwenVL(nnx.Module):
    """Tower, embedding, decoder and head."""

    def __init__(self, config: Config, compute: options.Compute, attend: Callable | None = None, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        attend = attend or backends.choose(compute)
        V, D = config.text.vocab_size, config.text.hidden_size
        shape, axes = (V, D), ("vocab", "embed")
        self.tower = config.vision.tower(compute, attend, rngs)
        # A tied table is drawn small enough for its logits, an untied one large enough to outlast the first layers.
        small, large = (nnx.initializers.normal(scale) for scale in (D**-0.5, 1.0))
        self.embed = layers.param(rngs, shape, axes, small if config.tie_word_embeddings else large, None)
        self.decoder = decoder.Decoder(config.text, compute, attend, rngs=rngs)
        self.head = None if config.tie_word_embeddings else layers.param(rngs, shape, axes, small, None)

    @property
    def unembed_VD(self) -> jax.Array:
        """The matrix that turns final vectors into logits."""
        return (self.embed if self.head is None else self.head)[...]

    def hidden(self, batch: FrameBatch) -> jax.Array:
        """Final vectors of all branch tokens [B, J, T, D]; the prefix, tower included, is run once a frame."""
        return self.decoder(self._prefix(batch), self._lanes(batch))

    def scored(self, batch: FrameBatch) -> jax.Array:
        """Final vectors [B, L, D] of the tokens that `score_slot_BL` picks: the head runs on nothing else."""
        hidden = self.hidden(batch)
        flat = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        return jnp.take_along_axis(flat, batch.score_slot_BL[..., None], axis=1)

    def prefill(self, batch: FrameBatch) -> Cache:
        """Keys and values of the prefix in every layer."""
        return self.decoder.prefill(self._prefix(batch))

    def extend(self, ids_BJT, position_BJT, queries: Queries, prefix: Cache, prefix_mask_BP, cache, segment_BJU, slot):
        """Run new tokens of every lane against the caches: see `decoder.Decoder.extend`."""
        stream = self._text(ids_BJT, position_BJT, queries)
        return self.decoder.extend(stream, prefix, prefix_mask_BP.astype(jnp.int32), cache, segment_BJU, slot)

    def empty_cache(self, frames: int, lanes: int, slots: int) -> Cache:
        """A lane cache with nothing in it."""
        text = self.config.text
        shape = (text.num_hidden_layers, frames, lanes, slots, text.num_key_value_heads, text.head_dim)
        return Cache(jnp.zeros(shape, self.compute.dtype), jnp.zeros(shape, self.compute.dtype))

    def _embed(self, ids):
        return sharding.by_frames(jnp.take(self.embed[...], ids, axis=0).astype(self.compute.dtype))

    def _prefix(self, batch: FrameBatch) -> Stream:
        seen = self.tower(batch.patches_BWSC, batch.patch_hw_BWS2, batch.patch_image_BWS)
        unit = batch.prefix_unit_BP[..., None]

        def put(units_BMD, text_BPD):
            return jnp.where(unit >= 0, jnp.take_along_axis(units_BMD, jnp.maximum(unit, 0), axis=1), text_BPD)

        x_BPD = put(seen.units_BMD, self._embed(batch.prefix_ids_BP))
        deep = None if seen.deep_XBMD is None else jax.vmap(lambda units: put(units, 0))(seen.deep_XBMD)[:, :, None]
        P = x_BPD.shape[1]
        queries = Queries(batch.prefix_mask_BP[:, None].astype(jnp.int32), jnp.arange(P)[None, None])
        return Stream(x_BPD[:, None], jnp.moveaxis(batch.prefix_pos_B3P, 1, 0)[:, :, None], queries, deep)

    def _lanes(self, batch: FrameBatch) -> Stream:
        T = batch.branch_ids_BJT.shape[-1]
        queries = Queries(batch.branch_segment_BJT, jnp.arange(T)[None, None])
        return self._text(batch.branch_ids_BJT, batch.branch_pos_BJT, queries)

    def _text(self, ids_BJT, position_BJT, queries) -> Stream:
        position = jnp.broadcast_to(position_BJT, (3, *position_BJT.shape))
        return Stream(self._embed(ids_BJT), position, queries)


def build(
    config: Config, compute: options.Compute = options.Compute(), attend: Callable | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and abstract parameters of a model: shapes and logical axes, no memory.

    `attend` computes attention, as `backends.choose` gives it for a mesh.
    """
    return nnx.split(nnx.eval_shape(lambda: QwenVL(config, compute, attend, rngs=nnx.Rngs(0))))


def init(config: Config, seed: int) -> dict:
    """Freshly drawn parameters as a nested dict of float32 arrays."""

    @jax.jit
    def draw(key):
        return nnx.to_pure_dict(nnx.state(QwenVL(config, options.Compute(), rngs=nnx.Rngs(key))))

    return draw(jax.random.key(seed))


def bind(graph: nnx.GraphDef, params: dict) -> QwenVL:
    """The model with these parameters; to be called inside a jitted function."""
    return nnx.merge(graph, nnx.State(params))


def joined(*trees: dict) -> dict:
    """Nested dicts of parameters as one; nothing is copied, and of two leaves of one path the later one stays."""
    return unflatten_dict({path: leaf for tree in trees for path, leaf in flatten_dict(tree).items()})


def is_matrix(path: tuple) -> bool:
    """Whether a parameter is a matrix, or one for each layer and expert: what is cast as it is read, and decays."""
    return path[-1] in ("kernel", "gate_up", "down", "embed", "head", "a", "b")


def is_stacked(path: tuple) -> bool:
    """Whether a parameter has a leading axis of layers."""
    return "blocks" in path or "deep" in path


def part_of(path: tuple) -> str:
    """Which of PARTS a parameter belongs to; embedding and head count as decoder."""
    if path[0] != "tower":
        return "decoder"
    return "merger" if path[1] in ("merger", "deep") else "tower"
