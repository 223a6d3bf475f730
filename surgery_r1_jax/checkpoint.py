"""Checkpoints of a run: all that training changes, in Orbax, and the way back onto any mesh.

    OUT/model/            config, tokenizer and preprocessor files of the model that is trained
    OUT/checkpoints/N/    state (parameters, optimiser, counters), data (Grain iterator), meta (JSON)
    OUT/best/N/           parameters of the best step by the dev split

Orbax writes beside the target and renames, so a killed save leaves no step that looks whole.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from surgery_r1_jax import errors, families, hf, model, modelcard, optim, sharding, tensors

FORMAT = 1


class Restored(NamedTuple):
    """What a resumed run goes on from."""

    state: optim.TrainState
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder; the two latest are kept."""

    def __init__(self, out: Path):
        self._manager = _manager(Path(out) / "checkpoints", keep=2)

    def latest(self) -> int | None:
        """Number of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: optim.TrainState, data: grain.DatasetIterator, meta: dict[str, Any]) -> None:
        """Save everything; returns when it is on disk."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=grain.checkpoint.CheckpointSave(data),
                meta=ocp.args.JsonSave(meta | {"format": FORMAT}),
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, abstract: optim.TrainState, data: grain.DatasetIterator) -> Restored:
        """Load the last checkpoint into `abstract`'s shapes and shardings and set the data iterator back."""
        step = self.latest()
        if step is None:
            raise errors.InputError(
                f"{self._manager.directory}: no checkpoint to resume from; remove this run or choose another --out, "
                "and start without --resume"
            )
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta.get("format") != FORMAT:
            raise errors.InputError(
                f"{self._manager.directory}/{step}: checkpoint format {meta.get('format')}, this version reads {FORMAT}"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract._asdict()),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
        return Restored(optim.TrainState(**restored["state"]), meta)

    def close(self) -> None:
        """Wait for the last save."""
        self._manager.close()


class Best:
    """Parameters of the best step so far, by the joint rate on the dev split.

    While they are saved, `at_once` gigabytes of them are copied at a time.
    """

    def __init__(self, out: Path, at_once: int = 96):
        # Weights are noise to a compressor: it takes longer than the disk.
        handlers = {"params": ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once, use_compression=False)}
        by_rate = dict(best_fn=lambda metrics: metrics["joint_rate"], item_handlers=handlers)
        self._manager = _manager(Path(out) / "best", keep=1, **by_rate)

    @property
    def rate(self) -> float:
        """The kept parameters' joint rate, -1 before there are any. Counts steps that a killed run has to repeat."""
        step = self._manager.best_step()
        return -1.0 if step is None else self._manager.metrics(step)["joint_rate"]

    def save(self, step: int, params: dict, rate: float) -> None:
        """Replace the kept parameters."""
        args = ocp.args.Composite(params=ocp.args.PyTreeSave(params))
        self._manager.save(step, args=args, metrics={"joint_rate": rate}, force=True)
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save."""
        self._manager.close()


class Loaded(NamedTuple):
    """A model ready to run."""

    config: model.Config
    params: dict
    folder: Path  # where its tokenizer and preprocessor files lie


def folder_of(path: str | Path) -> Path:
    """Where config, tokenizer and preprocessor files of a Hugging Face folder or a run folder lie."""
    inside = Path(path) / "model"
    return inside if (inside / "config.json").is_file() else Path(path)


def load_model(
    path: str | Path, mesh: jax.sharding.Mesh | None = None, *, which: str = "best", dtype: str = "float32"
) -> Loaded:
    """The model in a Hugging Face folder or a run folder (its best parameters, or its last where there are none)."""
    path, folder = Path(path), folder_of(path)
    settings = hf.read_config(folder)
    _, abstract = model.build(settings)
    shardings = None if mesh is None else sharding.of_params(abstract, mesh)
    if folder == path:
        return Loaded(settings, hf.read_params(path, settings, shardings, dtype=dtype), folder)
    best, last = _steps(path / "best"), _steps(path / "checkpoints")
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, nnx.to_pure_dict(abstract))
    wanted = jax.tree.map(
        lambda p, where: jax.ShapeDtypeStruct(p.shape, tensors.DTYPES[dtype], sharding=where),
        nnx.to_pure_dict(abstract),
        shardings,
    )
    if which == "best" and best:
        params = _pick(path / "best" / str(best[-1]) / "params", wanted)
    elif last:
        params = _pick(path / "checkpoints" / str(last[-1]) / "state", {"params": wanted})["params"]
    else:
        raise errors.InputError(f"{path}: a run folder without a checkpoint; let it train until its first save")
    return Loaded(settings, params, folder)


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    which: str = "best",
    max_shard_bytes: int = 2 << 30,
    tell: hf.Tell = hf.untold,
) -> Path:
    """Write a run's parameters (or another folder's) as a Hugging Face folder with a model card."""
    loaded, out = load_model(source, which=which, dtype=dtype), Path(out)
    card = modelcard.text(out.name, families.of(loaded.config).title, Path(source))
    how = dict(dtype=dtype, max_shard_bytes=max_shard_bytes, card=card, tell=tell)
    return hf.write_folder(out, loaded.params, loaded.config, loaded.folder, **how)


def import_folder(source: str | Path, out: str | Path, *, dtype: str = "float32", tell: hf.Tell = hf.untold) -> Path:
    """A Hugging Face folder as a run folder: a checkpoint in shards, which every host reads its own part of.

    Its config.json comes last: without it the folder is no model. Raises: InputError where `out` holds anything but an
    import that was stopped, which is begun anew.
    """
    source, out = Path(source), Path(out)
    settings, mesh = hf.read_config(source), sharding.make_mesh()
    hf.encoder_of(source, settings)  # what would be refused at every start from it is refused here
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out / "model" / "config.json").exists() or held - {"best", "model"} or out.is_file():
        raise errors.InputError(f"{out}: already exists; give a new folder")
    if jax.process_index() == 0:
        shutil.rmtree(out / "best", ignore_errors=True)
    shardings = sharding.of_params(model.build(settings)[1], mesh)
    params = hf.read_params(source, settings, shardings, dtype=dtype, tell=tell)
    best = Best(out, at_once=_gigabytes(params))
    best.save(0, params, 0.0)
    best.close()
    if jax.process_index() == 0:
        (out / "model").mkdir(parents=True, exist_ok=True)
        hf.copy_side_files(source, out / "model")
    return out


def digest(params: dict) -> str:
    """A hash of parameter values, to tell one reference model from another."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(json.dumps([str(k) for k in path]).encode())
        whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        total.update(np.ascontiguousarray(jax.device_get(whole)).tobytes())
    return total.hexdigest()


def _manager(folder: Path, keep: int, best_fn=None, item_handlers=None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=False, best_fn=best_fn
    )
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=item_handlers)


def _gigabytes(tree) -> int:
    """Whole gigabytes that hold the largest array of a tree, which Orbax must be allowed to have at hand."""
    return 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) // 10**9


def _pick(folder: Path, wanted: dict) -> dict:
    """The arrays of `wanted` (shapes, dtypes, shardings) out of a saved tree that may hold more, from any mesh."""
    how = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_gigabytes(wanted))) as checkpointer:
        found = checkpointer.restore(folder.absolute(), args=how)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if not isinstance(leaf, jax.Array):
            raise errors.InputError(f"{folder}: parameter {jax.tree_util.keystr(path)} is missing from this checkpoint")
    return found


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
