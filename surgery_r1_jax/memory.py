"""Bytes that training takes on each device, told before anything is trained.

What lies there all the time follows exactly from shapes and shardings. What comes and goes is either asked of the
compiler (`compiled`) or reckoned from the largest arrays of a step (`estimated`): at once, but only roughly, since
the compiler may keep more or less at a time. For Qwen2.5-VL-3B on eight devices in float32 the peak was reckoned as
0.97 (SFT) and 0.82 (GRPO) of what the compiler said for CPUs.
"""

from typing import NamedTuple

import jax

from surgery_r1_jax import lora, programs, scoring, stream
from surgery_r1_jax.programs import Job

LAYER_WIDTHS = 8  # arrays of a layer as wide as the model: norms, queries, attention's output, residuals
LOGIT_COPIES = 4  # of a chunk's logits in its backward pass: themselves, their softmax, target and cotangent


class Bytes(NamedTuple):
    """Bytes on one device."""

    parameters: int
    moments: int
    reference: int  # frozen copy of the parameters that GRPO's KL term needs
    gradients: int
    activations: int  # of a step, its batch and those that are placed ahead included
    rollout: int  # of drawing and of the reference's pass; at another time than gradients and activations
    offloaded: int  # moments and reference in the host's memory instead
    how: str  # "compiled" or "estimated"

    @property
    def peak(self) -> int:
        """What must fit."""
        lasting = self.parameters + self.moments + self.reference
        return lasting + max(self.gradients + self.activations, self.rollout)


def estimated(job: Job) -> Bytes:
    """Memory by arithmetic."""
    frames, batches, (state, _) = _frames(job), (1 + stream.AHEAD) * _batch(job), programs.state_of(job)
    moments, reference = _offloaded(state)
    # Of moments those of one array come to the device at a time, when activations are gone; the reference comes whole.
    activations = batches + max(_activations(job, frames=-(-frames // job.parts)), 2 * max(moments, default=0))
    rollout = batches + _rollout(job, frames) + reference if job.samples else 0
    return Bytes(*_lasting(state), activations, rollout, sum(moments) + reference, "estimated")


def compiled(job: Job) -> Bytes:
    """Memory by the compiler. Needs a mesh of real devices."""
    state, _ = programs.state_of(job)
    lasting, ahead = _lasting(state), stream.AHEAD * _batch(job)
    own = {
        name: programs.peak(program.lower().compile()) + program.beside - sum(lasting[:3]) + ahead
        for name, program in programs.of(job).items()
    }
    activations = own.pop("update") - lasting[3]
    moments, reference = _offloaded(state)
    rollout = max(own.values(), default=0)
    return Bytes(*lasting, activations, rollout, sum(moments) + reference, "compiled")


def _lasting(state: programs.State) -> tuple[int, int, int, int]:
    """Parameters, moments, reference and gradients."""
    train, frozen, reference = state
    trained, *others = map(programs.bytes_of, (train.params, frozen, train.opt_state, reference))
    return trained + others[0], others[1], others[2], trained


def _offloaded(state: programs.State) -> tuple[list[int], int]:
    """What each array of the moments takes in the host's memory, and what the reference takes there."""
    moments = [programs.bytes_of(leaf, offloaded=True) for leaf in jax.tree.leaves(state.train.opt_state)]
    return moments, programs.bytes_of(state.reference, offloaded=True)


def _frames(job: Job) -> int:
    """Frames of a batch on one device."""
    return -(-job.settings.data.frames // job.frame_devices)


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
        scores=text.num_attention_heads * (rows(P) * P + rows(J * T) * (P + T)),
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
