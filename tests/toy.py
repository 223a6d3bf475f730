"""A toy data set and a toy start model on disk, small enough for tests of whole runs."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surgery_r1_jax import hf, log, model, options, sharding, synth, tiny

SIZES = tiny.Sizes(
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=2,
    mlp=64,
    tower_width=32,
    tower_depth=2,
    tower_heads=2,
    tower_mlp=64,
    fullatt=(1,),
    size=(84, 56),
    mrope_section=(2, 3, 3),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """For modules that import it: programs that run for milliseconds are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def few_devices():
    """For modules that import it: a mesh takes the first devices, as many as its shape names, and by default one."""
    make_mesh = sharding.make_mesh

    def few(shape=(1, -1, 1)):
        return make_mesh(shape, jax.devices()[: max(1, math.prod(shape))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", few)
        yield


def params(config, seed=0, spread=0.1):
    """Parameters with nothing at its neutral value, drawn by NumPy: nothing to compile."""
    rng, flat = np.random.default_rng(seed), {}
    for path, variable in nnx.to_flat_state(model.build(config)[1]):
        noise = spread * rng.standard_normal(variable.get_value().shape, np.float32)
        flat[path] = jnp.asarray(noise + (path[-1] == "scale"))
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def write_data(root, frames=8, sequences=("seq_2", "seq_6")):
    """Frames in the EndoVis layout, one instrument each; seq_2 trains, seq_6 is the dev split."""
    synth.write(root, frames=frames, seed=3, size=(112, 84), max_tools=1, sequences=sequences)
    return root


def write_start(folder, frames):
    """What a run starts from: `folder`/data and `folder`/start."""
    write_data(folder / "data", frames)
    write_model(folder / "start")
    return folder


STEPS = 5  # of the run below


def sft_settings(folder, **changes):
    """A short run on what `write_start` wrote."""
    settings = dict(
        model=str(folder / "start"),
        data=options.Data(root=str(folder / "data"), frames=4, questions=2),
        optimizer=options.Optimizer(learning_rate=1e-2),
        schedule=options.Schedule(steps=STEPS, eval_every=3, save_every=100, log_every=1),
        evaluation=options.Evaluation(frames=4, questions=3, limit=1, max_tokens=4),
        compute=options.Compute(mesh=(2, 2, 2)),
    )
    return options.SFT(**(settings | changes))


def write_model(folder, seed=0, sizes=SIZES, spread=0.05):
    """A whole Hugging Face folder with random weights."""
    bare = tiny.write_folder(folder.with_name(folder.name + "_bare"), sizes)
    settings = hf.read_config(bare)
    return hf.write_folder(folder, params(settings, seed, spread), settings, bare)


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environ(folder):
    """That of a program of ours which others start; what it compiles is kept in `folder`."""
    ours = {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    ours |= {"XLA_FLAGS": flags.QUICK, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    return os.environ | ours | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start_group(folder, count, words):
    """A command as so many processes over loopback; what each prints goes to `folder`/printed0 and so on."""
    port, running = free_port(), []
    for index in range(count):
        place = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id", str(index)]
        program = [sys.executable, "-m", "surgery_r1_jax.cli", *words, *(place if count > 1 else [])]
        with (folder / f"printed{index}").open("w") as file:
            running.append(subprocess.Popen(program, env=environ(folder), stdout=file, stderr=subprocess.STDOUT))
    return running


def result(out, step):
    """All that a run arrived at by a step: the sums of all values, and its log without the time it took."""
    return json.loads((out / "checkpoints" / str(step) / "meta" / "metadata").read_text()), logged(out)


def logged(out):
    """What a run logged, without the time it took."""
    timed = ("elapsed_s", "speed/", "time/", "compile/", "memory/")
    rows = log.read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
