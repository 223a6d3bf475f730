"""Bytes that training takes on each device, told before anything is trained.

What lies there all the time follows exactly from shapes and shardings. What comes and goes is either asked of the
compiler (`compiled`) or reckoned from the largest arrays of a step (`estimated`): at once, but only roughly, since
the compiler may keep more or less at a time. For Qwen2.5-VL-3B on eight devices in float32 the peak was reckoned as
0.97 (SFT) and 0.82 (GRPO) of what the compiler said for CPUs.
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from surgery_r1_jax import (
    backends,
    grpo,
    lora,
    model,
    optim,
    options,
    packed,
    run,
    sampling,
    scoring,
    sft,
    sharding,
    stream,
)
from surgery_r1_jax.batch import FrameBatch, Shape

LAYER_WIDTHS = 8  # arrays of a layer as wide as the model: norms, queries, attention's output, residuals
LOGIT_COPIES = 4  # of a chunk's logits in its backward pass: themselves, their softmax, target and cotangent


class Bytes(NamedTuple):
    """Bytes on one device."""

    parameters: int
    moments: int
    reference: int  # frozen copy of the parameters that GRPO's KL term needs
    gradients: int
    activations: int  # of a step, its batch and those that are placed ahead included
    rollout: int  # caches and logits; at another time than gradients and activations
    how: str  # "compiled" or "estimated"

    @property
    def peak(self) -> int:
        """What must fit."""
        lasting = self.parameters + self.moments + self.reference
        return lasting + max(self.gradients + self.activations, self.rollout)


class Job(NamedTuple):
    """What is trained, where, and on batches of which shape."""

    settings: options.SFT | options.GRPO
    architecture: model.Config
    mesh: Mesh | AbstractMesh
    batch: FrameBatch  # NumPy arrays of a whole batch as the pipeline gives it

    @property
    def params(self) -> dict:
        """Shapes of all parameters."""
        return nnx.to_pure_dict(model.build(self.architecture)[1])

    @property
    def frame_axes(self) -> int:
        """Devices that the frames of a batch are spread over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into before it goes through the model."""
        return self.settings.accumulate * getattr(self.settings, "minibatches", 1)

    @property
    def samples(self) -> int:
        """Completions drawn for each question; 0 in SFT, which draws none."""
        return getattr(self.settings, "samples", 0)

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy of the parameters is kept; adapters leave the base as it was, which serves."""
        return bool(self.samples) and self.settings.objective.beta > 0 and not self.settings.lora.rank

    @property
    def shape(self) -> Shape:
        """Extents of what one update goes through."""
        W, P = self.batch.patch_image_BWS.shape[1], self.batch.prefix_ids_BP.shape[1]
        J, T = self.batch.branch_ids_BJT.shape[1:]
        if not self.samples:
            return Shape(W, P, J, T, self.batch.score_target_BL.shape[1])
        Tc = self.settings.sampler.max_tokens
        return Shape(W, P, J * self.samples, T + Tc, J * self.samples * Tc)


def estimated(job: Job) -> Bytes:
    """Memory by arithmetic."""
    lasting = _lasting(job)
    frames, batches = _frames(job), (1 + stream.AHEAD) * _batch(job)
    activations = batches + _activations(job, frames=-(-frames // job.parts))
    rollout = batches + _rollout(job, frames) if job.samples else 0
    return Bytes(*lasting, activations, rollout, "estimated")


def compiled(job: Job) -> Bytes:
    """Memory by the compiler. Needs a mesh of real devices."""
    parameters, moments, reference, gradients = _lasting(job)
    step, drawing = lowered(job)
    ahead = stream.AHEAD * _batch(job)
    activations = _peak(step) - parameters - moments - gradients + ahead
    rollout = _peak(drawing) - parameters + ahead if drawing else 0
    return Bytes(parameters, moments, reference, gradients, activations, rollout, "compiled")


def lowered(job: Job) -> tuple[jax.stages.Lowered, jax.stages.Lowered | None]:
    """The very programs of the run on abstract arrays: an update, and for GRPO a rollout."""
    settings, mesh, V = job.settings, job.mesh, job.architecture.text.vocab_size
    attend = backends.choose(settings.compute, mesh)
    graph, _ = lora.build(job.architecture, settings.compute, settings.lora, attend)
    still, _ = lora.build(job.architecture, settings.compute, settings.lora.still, attend)
    state, frozen, tx = _state(job)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    batch = _spread(job.batch, mesh)
    by_word = lambda dtype: jax.ShapeDtypeStruct((V,), dtype, sharding=sharding.replicated(mesh))  # noqa: E731
    if not job.samples:
        step = run.keep_layout(functools.partial(sft.train_step, graph, tx, settings=settings), shardings)
        return step.lower(state, frozen, batch, by_word(np.int32)), None
    B, Q = batch.branch_ids_BJT.shape[:2]
    numbers = _spread((np.zeros(B, np.int32), np.zeros((B, Q), np.int32)), mesh)  # of frames and questions
    key, words = jax.eval_shape(jax.random.key, 0), sampling.Vocabulary(by_word(np.bool_), 0, 0)
    policy = model.joined(frozen, state.params)
    drawing = grpo.roll_out.lower(still, settings, policy, batch, key, numbers, words)
    drawn = _spread(drawing.out_info, mesh)
    laid_out = _spread(jax.eval_shape(lambda b, d: sampling.branches(b, d, settings.samples), batch, drawn), mesh)
    logp_BJT = drawn.logp_BJT
    advantage_BJ = _spread(jax.eval_shape(lambda x_BJT: x_BJT[..., 0], logp_BJT), mesh)
    graded = grpo.Experience(laid_out, drawn.mask_BJT, logp_BJT, logp_BJT, advantage_BJ)
    step = run.keep_layout(functools.partial(grpo.update_step, graph, tx, settings), shardings)
    return step.lower(state, frozen, graded, words.allowed_V, np.int32(0)), drawing


def _lasting(job: Job) -> tuple[int, int, int, int]:
    """Parameters, moments, reference and gradients."""
    state, frozen, _ = _state(job)
    size = lambda tree: sum(_local_bytes(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    trained = size(state.params)
    return trained + size(frozen), size(state.opt_state), trained * job.has_reference, trained


def _state(job: Job):
    """The train state and what is frozen as abstract arrays with their shardings, and the optimiser."""
    adapted = job.settings.lora
    _, abstract = lora.build(job.architecture, options.Compute(), adapted)
    params, frozen = lora.split(nnx.to_pure_dict(abstract))
    places, frozen_places = lora.split(sharding.of_params(abstract, job.mesh))
    tx = optim.transformation(job.settings.optimizer, job.settings.schedule.steps, params)
    state = jax.eval_shape(lambda params: optim.start(params, tx), params)
    dtype = "bfloat16" if adapted.four_bits else adapted.base
    kept = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where), frozen, frozen_places
    )
    if adapted.four_bits:
        kept = packed.abstract(kept, job.architecture, adapted.base)
    return run.abstract_state(state, run.state_shardings(state, places, job.mesh)), kept, tx


def _spread(tree, mesh: Mesh):
    """Abstract arrays whose frames are spread over the mesh."""
    where = NamedSharding(mesh, sharding.FRAMES)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    bits = 4 if leaf.dtype in (jax.numpy.int4, jax.numpy.uint4) else 8 * leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8


def _peak(lowered: jax.stages.Lowered) -> int:
    """Bytes that a program has in use on a device, its arguments included."""
    used = lowered.compile().memory_analysis()
    own = used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    return used.argument_size_in_bytes + own


def _frames(job: Job) -> int:
    """Frames of a batch on one device."""
    return -(-job.settings.data.frames // job.frame_axes)


def _batch(job: Job) -> int:
    """Bytes of them."""
    return sum(leaf.nbytes for leaf in job.batch) * _frames(job) // len(job.batch.prefix_ids_BP)


def _activations(job: Job, frames: int) -> int:
    """The largest arrays of a forward and backward pass over so many frames."""
    text, tower, compute, shape = job.architecture.text, job.architecture.vision, job.settings.compute, job.shape
    tensor, width = job.mesh.shape["tensor"], _width(job)
    P, J, T, n = shape.prefix, shape.lanes, shape.lane_tokens, shape.windows * tower.slots
    held = compute.attention in ("auto", "xla")  # flash kernels hold no scores; `auto` may take one, or may not
    rows = lambda tokens: held * min(compute.query_chunk or tokens, tokens)  # noqa: E731 - whose scores exist at once

    def stack(depth, tokens, model_width, mlp, scores, remat, trained=True):
        """What is kept for the backward pass, and one layer with its cotangents."""
        layer = tokens * (LAYER_WIDTHS * model_width + 3 * mlp // tensor) * width
        layer += scores // tensor * (12 + width)  # in float32 apart and joined, weights, and the weights as used
        return depth * (tokens * model_width * width if remat else layer) * trained + 2 * layer

    decoder = stack(
        *(text.num_hidden_layers, P + J * T, text.hidden_size, text.intermediate_size),
        scores=text.num_attention_heads * (rows(P) * P + held * J * T * (P + T)),
        remat=compute.remat,
    )
    seeing = stack(
        *(tower.depth, n, tower.hidden_size, tower.intermediate_size),
        scores=tower.num_heads * max(n * tower.slots, rows(n) * n // (1 if compute.tower_remat else tower.period)),
        remat=compute.tower_remat,
        trained=_tower_learns(job),
    )
    logits = min(scoring.CHUNK, shape.scored) * text.vocab_size // tensor * 4 * LOGIT_COPIES
    return frames * (max(decoder, seeing) + logits) + _gathered(job, copies=2)


def _tower_learns(job: Job) -> bool:
    """Whether the backward pass goes through the tower."""
    adapted = job.settings.lora
    reached = not adapted.rank or any(p.startswith("tower.") for p in lora.chosen(job.architecture, adapted.targets))
    return job.settings.optimizer.rates.tower > 0 and reached


def _rollout(job: Job, frames: int) -> int:
    """Caches, logits and gathered weights while so many frames' completions are drawn."""
    text, shape, tensor = job.architecture.text, job.shape, job.mesh.shape["tensor"]
    slots = shape.prefix + shape.lanes * shape.lane_tokens
    cache = text.num_hidden_layers * slots * 2 * text.num_key_value_heads * text.head_dim * _width(job)
    logits = shape.lanes * text.vocab_size // tensor * 4 * LOGIT_COPIES
    return frames * (2 * cache + logits) + _gathered(job, copies=1)  # the cache is copied when lanes are split


def _gathered(job: Job, copies: int) -> int:
    """Weights in use as whole copies in the compute precision: a layer's and the head's."""
    layer = sum(leaf.size for leaf in jax.tree.leaves(job.params["decoder"]["blocks"]))
    layer //= job.architecture.text.num_hidden_layers
    head = job.architecture.text.vocab_size * job.architecture.text.hidden_size
    return copies * (layer + head) // job.mesh.shape["tensor"] * _width(job)


def _width(job: Job) -> int:
    """Bytes of a number in the compute precision."""
    return jax.numpy.dtype(job.settings.compute.dtype).itemsize
