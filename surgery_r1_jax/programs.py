"""The jitted programs of a run on abstract arrays: what can be compiled before there are weights, data or devices.

They are lowered as the run's own loop calls them, with the same shardings, and go to whatever devices the mesh is of.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from surgery_r1_jax import (
    backends,
    evaluate,
    grid,
    grpo,
    hlo,
    lora,
    model,
    optim,
    options,
    packed,
    run,
    sampling,
    sft,
    sharding,
)
from surgery_r1_jax.batch import FrameBatch, Shape


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
    def frame_devices(self) -> int:
        """Over how many devices the frames of a batch are spread."""
        return sharding.frame_devices(self.mesh)

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


class State(NamedTuple):
    """What lies on the devices all through a run, as abstract arrays in their places."""

    train: optim.TrainState
    frozen: dict
    reference: dict  # GRPO's copy of the start; empty where there is none


class Program(NamedTuple):
    """One of a run's programs."""

    lower: Callable[[], jax.stages.Lowered]
    beside: int  # bytes on each device that lie there while it runs without being handed to it


def blank_batch(architecture: model.Config, image: tuple[int, int], text: int, lanes: Shape, frames: int) -> FrameBatch:
    """A batch that has extents and takes no memory: a frame is an image (width, height in pixels) and `text` tokens.

    Of `lanes` only what is about branches is read.
    """
    tower = architecture.vision
    at = image[1] // tower.patch_size, image[0] // tower.patch_size
    layout = grid.arrange([at], side=tower.window_side, merge=tower.spatial_merge_size)
    P, (W, S) = len(layout.unit_of_token) + text, layout.source_WS.shape
    J, T, L = lanes.lanes, lanes.lane_tokens, lanes.scored
    blank = lambda dtype, *shape: np.broadcast_to(np.zeros((), dtype), (frames, *shape))  # noqa: E731
    return FrameBatch(
        patches_BWSC=blank(np.float32, W, S, tower.values_per_patch),
        patch_hw_BWS2=blank(np.int32, W, S, 2),
        patch_image_BWS=blank(np.int32, W, S),
        prefix_ids_BP=blank(np.int32, P),
        prefix_unit_BP=blank(np.int32, P),
        prefix_pos_B3P=blank(np.int32, 3, P),
        prefix_mask_BP=blank(np.bool_, P),
        branch_ids_BJT=blank(np.int32, J, T),
        branch_pos_BJT=blank(np.int32, J, T),
        branch_segment_BJT=blank(np.int32, J, T),
        score_slot_BL=blank(np.int32, L),
        score_target_BL=blank(np.int32, L),
        score_weight_BL=blank(np.float32, L),
    )


def of(job: Job) -> dict[str, Program]:
    """All programs of a run by name: `update`, for GRPO `rollout` and `reference` too."""
    settings, mesh, graph = job.settings, job.mesh, _graph(job, job.settings.lora)
    state, tx = state_of(job)
    train, frozen, reference = state
    batch = _spread(job.batch, mesh)
    if not job.samples:
        step = run.keep_layout(functools.partial(sft.train_step, graph, tx, settings=settings), train)
        return {"update": Program(lambda: step.lower(train, frozen, batch, _by_word(job, np.int32)), 0)}

    B, Q = batch.branch_ids_BJT.shape[:2]
    numbers = _spread((np.zeros(B, np.int32), np.zeros((B, Q), np.int32)), mesh)  # of frames and questions
    key, words = jax.eval_shape(jax.random.key, 0), sampling.Vocabulary(_by_word(job, np.bool_), 0, 0)
    rollout = (
        _graph(job, settings.lora.still),
        settings,
        model.joined(frozen, train.params),
        batch,
        key,
        numbers,
        words,
    )
    drawn = _spread(jax.eval_shape(functools.partial(grpo.roll_out, *rollout[:2]), *rollout[2:]), mesh)
    laid_out = _spread(jax.eval_shape(lambda b, d: sampling.branches(b, d, settings.samples), batch, drawn), mesh)
    advantage_BJ = _spread(jax.eval_shape(lambda x_BJT: x_BJT[..., 0], drawn.logp_BJT), mesh)
    graded = grpo.Experience(laid_out, drawn.mask_BJT, drawn.logp_BJT, drawn.logp_BJT, advantage_BJ)
    step = run.keep_layout(functools.partial(grpo.update_step, graph, tx, settings), train)
    held_against = (_graph(job, options.Lora()), settings, reference or frozen, laid_out, words.allowed_V)

    moments, beside = bytes_of(train.opt_state), bytes_of(reference)
    programs = {
        "rollout": Program(lambda: grpo.roll_out.lower(*rollout), moments + beside),
        "reference": Program(lambda: grpo.reference_logp.lower(*held_against), moments + bytes_of(train.params)),
        "update": Program(lambda: step.lower(train, frozen, graded, words.allowed_V, np.int32(0)), beside),
    }
    if not settings.objective.beta:
        del programs["reference"]
    return programs


def evaluation(job: Job) -> Program:
    """Greedy decoding in a run, the batch of the job being the prompts."""
    settings, graph = job.settings, _graph(job, job.settings.lora.still)
    (train, frozen, reference), _ = state_of(job)
    greedy = options.Sampler(max_tokens=settings.evaluation.max_tokens, temperature=0.0)
    params, prompts = model.joined(frozen, train.params), _spread(job.batch, job.mesh)
    given = (graph, params, prompts, _by_word(job, np.bool_), (greedy, 0, 0))
    return Program(lambda: evaluate.greedily.lower(*given), bytes_of(train.opt_state) + bytes_of(reference))


def state_of(job: Job) -> tuple[State, optim.Transformation]:
    """What lies there all the time, and the optimiser."""
    settings, adapted = job.settings, job.settings.lora
    _, abstract = lora.build(job.architecture, options.Compute(), adapted)
    params, frozen = lora.split(nnx.to_pure_dict(abstract))
    places, frozen_places = lora.split(sharding.of_params(abstract, job.mesh))
    compute, steps = settings.compute, settings.schedule.steps
    tx = optim.transformation(settings.optimizer, steps, params, offload=compute.offload)
    train = run.abstract_state(jax.tree.map(_placed, params, places), tx, job.mesh)
    kept = jax.tree.map(functools.partial(_placed, dtype=adapted.kept), frozen, frozen_places)
    if adapted.four_bits:
        kept = packed.abstract(kept, job.architecture, adapted.base)
    reference = {}
    if job.has_reference:
        made = jax.eval_shape(functools.partial(grpo.frozen_copy, compute=compute), train.params)
        put = sharding.offloaded if compute.offload else lambda where: where
        reference = jax.tree.map(lambda leaf, of: _placed(leaf, put(of.sharding)), made, train.params)
    return State(train, kept, reference), tx


def stacks(job: Job) -> dict[str, hlo.Stack]:
    """Every matrix that has an axis of layers, by its path: for `hlo.whole_stacks`."""
    (train, frozen, _), _ = state_of(job)
    tower = job.architecture.vision
    groups = {tower.depth, tower.period, tower.period - 1} - {0, 1}
    found = {}
    for path, leaf in flatten_dict(model.joined(frozen, train.params)).items():
        if model.is_stacked(path) and model.is_matrix(path) and isinstance(leaf, jax.ShapeDtypeStruct):
            layers = tuple(groups) if path[:2] == ("tower", "blocks") else leaf.shape[:1]
            found[".".join(path)] = hlo.Stack(layers, leaf.shape[1:], leaf.sharding.shard_shape(leaf.shape)[1:])
    return found


def bytes_of(tree, *, offloaded: bool = False) -> int:
    """Bytes of abstract arrays on each device; `offloaded`: of those that its host's memory has for it."""
    leaves = jax.tree.leaves(tree)
    return sum(_local_bytes(leaf) for leaf in leaves if sharding.is_offloaded(leaf.sharding) == offloaded)


def peak(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program has in use on a device, its arguments included."""
    used = compiled.memory_analysis()
    if told := getattr(used, "peak_memory_in_bytes", 0):
        beside = used.host_output_size_in_bytes - used.host_alias_size_in_bytes
        return told - used.host_argument_size_in_bytes - beside  # TPUs count what is in the host's memory too
    own = used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    return used.argument_size_in_bytes + own


def _graph(job: Job, adapters: options.Lora) -> nnx.GraphDef:
    """The model as the job's mesh computes it."""
    compute = job.settings.compute
    return lora.build(job.architecture, compute, adapters, backends.choose(compute, job.mesh))[0]


def _by_word(job: Job, dtype) -> jax.ShapeDtypeStruct:
    """A value for each word of the vocabulary."""
    return jax.ShapeDtypeStruct((job.architecture.text.vocab_size,), dtype, sharding=sharding.replicated(job.mesh))


def _placed(leaf, where, dtype=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where)


def _spread(tree, mesh: Mesh):
    """Abstract arrays whose frames are spread over the mesh."""
    return jax.tree.map(functools.partial(_placed, where=NamedSharding(mesh, sharding.FRAMES)), tree)


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    bits = 4 if leaf.dtype in (jax.numpy.int4, jax.numpy.uint4) else 8 * leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8
