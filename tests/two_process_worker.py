"""One of two processes that train and evaluate together over loopback; started by test_two_processes.py.

python two_process_worker.py FOLDER PROCESS PORT
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax

from surgery_r1_jax import checkpoint, errors, evaluate, grpo, options, pipeline, sft, sharding

MAX_TOKENS = 4


def settings(folder: Path, kind, steps: int, **more):
    """A short run on the folder's data; its optimiser is near plain descent, so that rounding is not blown up."""
    return kind(
        model=str(folder / "start"),
        data=options.Data(root=str(folder / "data"), frames=4, questions=2),
        optimizer=options.Optimizer(learning_rate=0.1, b1=0.0, eps=1.0, schedule="constant", warmup=0.0),
        schedule=options.Schedule(steps=steps, save_every=100, log_every=1),
        evaluation=options.Evaluation(frames=4, questions=2, limit=3, max_tokens=MAX_TOKENS),
        **more,
    )


def grpo_settings(folder: Path):
    """One step of GRPO with a reference."""
    return settings(folder, options.GRPO, 1, samples=2, sampler=options.Sampler(max_tokens=MAX_TOKENS))


def answers(folder: Path) -> list[dict]:
    """Greedy answers of the start model to every question; neither rows nor frames divide by the batch."""
    mesh = sharding.make_mesh()
    loaded = checkpoint.load_model(folder / "start", mesh)
    runner = evaluate.runner_of(loaded.folder, loaded.config, mesh)
    data = options.Data(root=str(folder / "data"), split="all", frames=4, questions=2, limit=5)
    return evaluate.predict(runner, loaded.params, pipeline.read(data), data, MAX_TOKENS)


def stop_one_process(process: int) -> None:
    """Only the second process gets the signal, as it begins its second step."""
    put_batch, seen = sharding.put_batch, []

    def counted(*arguments):
        seen.append(1)
        if process == 1 and len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*arguments)

    sharding.put_batch = counted  # once a step


def main(folder: Path, process: int, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    found = {"devices": len(jax.devices()), "answers": answers(folder)}
    found["grpo"] = grpo.train(grpo_settings(folder), folder / "two_grpo")["n"]
    stop_one_process(process)
    try:
        sft.train(settings(folder, options.SFT, 200), folder / "two_sft")
    except errors.Preempted as stop:
        found["stopped"] = str(stop)
    (folder / f"found{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
