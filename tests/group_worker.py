"""What every process of a group does; alone it says what the others are held against. Started by test_groups.py.

python group_worker.py FOLDER PROCESS COUNT PORT
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from surgery_r1_jax import (
    checkpoint,
    errors,
    evaluate,
    grpo,
    milestones,
    optim,
    options,
    pipeline,
    sft,
    sharding,
    speed,
)

MAX_TOKENS, SEEDS, LEG = 4, (0, 1, 2), 2
PATIENCE = 300  # seconds


def settings(folder: Path, kind, **more):
    """A short run on the folder's data; its optimiser is near plain descent, so that rounding is not blown up."""
    return kind(
        model=str(folder / "start"),
        data=options.Data(root=str(folder / "data"), frames=4, questions=2),
        optimizer=options.Optimizer(learning_rate=0.1, b1=0.0, eps=1.0, schedule="constant", warmup=0.0),
        evaluation=options.Evaluation(frames=4, questions=2, limit=5, max_tokens=MAX_TOKENS),
        **more,
    )


def sft_settings(folder: Path, steps: int, offload: bool = False):
    schedule = options.Schedule(steps=steps, save_every=1000, log_every=1)
    return settings(folder, options.SFT, schedule=schedule, compute=options.Compute(offload=offload))


def together(folder: Path) -> dict:
    """Answers, drawn tokens, an update on them, and which images were opened for a batch."""
    chosen = settings(folder, options.GRPO, samples=2, sampler=options.Sampler(max_tokens=MAX_TOKENS))
    mesh = sharding.make_mesh()
    loaded = checkpoint.load_model(chosen.model, mesh)
    runner = evaluate.runner_of(loaded.folder, loaded.config, mesh)
    frames, asked = milestones.dev_frames(chosen.data, chosen.evaluation)
    found = {"answers": evaluate.predict(runner, loaded.params, frames, asked, MAX_TOKENS), "tokens": {}}

    stream = pipeline.rollouts(pipeline.read(chosen.data), runner.encoder, chosen.data, seed=0, shard=runner.shard)
    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    host_prompts, gold = stream[0]
    found["opened"] = sorted({Path(path).name for path in opened if path.endswith(".png")})
    prompts = sharding.put_batch(host_prompts, mesh)
    clock = speed.Clock(mesh.devices)
    for seed in SEEDS:
        drawn, *_, mask_BJT, _ = grpo.sample(runner, chosen, loaded.params, prompts, gold, jax.random.key(seed), clock)
        found["tokens"][seed] = sharding.local_rows(drawn.tokens_BJT).tolist()

    # An advantage for every lane, so that the update does not hang on what an untrained model is paid.
    J = drawn.tokens_BJT.shape[1]
    advantage_BJ = np.array([[(-1.0) ** j * (1 + frame) for j in range(J)] for frame in gold.frame_B], np.float32)
    batch = grpo.lay_out(prompts, drawn, chosen.samples)
    drawn_logp = drawn.logp_BJT
    experience = grpo.Experience(batch, mask_BJT, drawn_logp, drawn_logp * 0.9, sharding.put_batch(advantage_BJ, mesh))
    tx = optim.transformation(chosen.optimizer, 1, loaded.params)
    state = jax.jit(lambda params: optim.start(params, tx))(loaded.params)
    allowed_V = runner.vocabulary.allowed_V
    state, stats = grpo.update_step(runner.graph, tx, chosen, state, {}, experience, allowed_V, np.int32(0))
    found["update"] = {name: float(value) for name, value in stats.items()}
    params = multihost_utils.process_allgather(state.params, tiled=True)
    if jax.process_index() == 0:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        np.savez(folder / f"updated{jax.process_count()}.npz", *leaves)
    return found


def relays(folder: Path, count: int) -> dict:
    """Take two runs over from others and hand them on: `forth` goes from one process to four and to two, one of which
    is told to stop, `back` from one to two and to four. Four keep the moments of `forth` in the host's memory.
    """
    if count == 4:
        leg(folder / "forth", 2 * LEG, offload=True)
        await_leg(folder / "back")
        leg(folder / "back", 3 * LEG)
        return {}
    leg(folder / "back", 2 * LEG)
    await_leg(folder / "forth")
    stop_one_process(jax.process_index())
    try:
        leg(folder / "forth", 200)
    except errors.Preempted as stop:
        return {"stopped": str(stop)}
    return {}


def leg(out: Path, steps: int, offload: bool = False) -> None:
    """Go on with a run up to a step, and tell who waits for it."""
    sft.train(sft_settings(out.parent, steps, offload), out, resume=True)
    out.with_suffix(".ready").touch()


def await_leg(out: Path) -> None:
    """Wait for the other group."""
    limit = time.monotonic() + PATIENCE
    while not out.with_suffix(".ready").exists():
        assert time.monotonic() < limit, f"nobody made a leg of {out.name}"
        time.sleep(0.1)


def stop_one_process(process: int) -> None:
    """Only the second process gets the signal, as it places its second batch; batches come slowly."""
    put_batch, seen = sharding.put_batch, []

    def counted(*arguments, **named):
        seen.append(1)
        time.sleep(0.1)
        if process == 1 and len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*arguments, **named)

    sharding.put_batch = counted  # once a step


def main(folder: Path, process: int, count: int, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
    found = {"devices": len(jax.devices())} | together(folder) | relays(folder, count)
    (folder / f"found{count}_{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
