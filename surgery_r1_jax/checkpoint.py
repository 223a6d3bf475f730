"""Models by their folders: a Hugging Face folder or what a run saved (see `saves`), whole or adapters; export, import.

OUT/model/            config, tokenizer and preprocessor files of the model that is trained; base.json with adapters
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from surgery_r1_jax import (
    config,
    errors,
    families,
    files,
    hf,
    lora,
    model,
    modelcard,
    options,
    peft,
    places,
    saves,
    sharding,
    sums,
    tensors,
)

BASE = "base.json"


class Base(config.Config):
    """What the adapters of a run correct: the file base.json."""

    path: str  # of the model that the run started from
    digest: str | None  # its `identity`; None: not known
    lora: options.Lora

    @staticmethod
    def write(base: "Base | None", folder: Path) -> None:
        """Write the file into a folder; with None see that there is none."""
        if base is None:
            (folder / BASE).unlink(missing_ok=True)
        else:
            files.write_text(folder / BASE, base.model_dump_json(indent=2) + "\n")

    @classmethod
    def of(cls, folder: Path) -> "Base | None":
        """That of a run folder; None for one without adapters. Raises InputError for a spoilt file."""
        path = folder / "model" / BASE
        try:
            return cls.model_validate_json(path.read_bytes()) if path.is_file() else None
        except ValueError as problem:
            raise errors.InputError(f"{path}: {errors.one_line(problem)}; restore it") from None

    @staticmethod
    def same(one: "Base | None", other: "Base | None") -> bool:
        """Whether two runs have the same base and the same settings, wherever the base lies."""
        about = lambda base: base and (base.digest, base.lora)  # noqa: E731
        return about(one) == about(other)

    def check(self, now: str, folder: Path) -> None:
        """Raises InputError where the model of this identity is not the one that adapters in `folder` correct."""
        if self.digest not in (None, now):
            raise errors.InputError(
                f"{folder}: its adapters were trained on another model than {self.path} holds now (digest "
                f"{self.digest[:12]}, now {now[:12]}); restore that one"
            )


class Loaded(NamedTuple):
    """A model ready to run."""

    config: model.Config
    params: dict
    folder: Path  # where its tokenizer and preprocessor files lie
    merged: str | None = None  # identity of a model that adapters were merged into
    classes: tuple[str, ...] | None = None  # the answers it was trained on, where its folder does not say


def here(path: str | Path) -> Path:
    """A model's folder; of a bucket a copy on this disk, but for a run folder on gs://, which Orbax reads there."""
    path = places.place(path)
    return path if places.is_gs(path) and _is_run(path) else places.fetched(path)


def folder_of(path: str | Path, above: tuple[Path, ...] = ()) -> Path:
    """Where config, tokenizer and preprocessor files of a Hugging Face folder, an adapter's or a run folder lie.

    Raises: InputError for an adapter whose base is not here, or is one of those `above` it.
    """
    path = here(path)
    if _is_run(path):
        return places.fetched(path / "model")
    return folder_of(peft.base_of(path), _below(above, path)) if peft.holds(path) else path


def load_model(
    path: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    *,
    which: str = "best",
    dtype: str = "float32",
    above: tuple[Path, ...] = (),
) -> Loaded:
    """The model in a Hugging Face folder or a run folder (its best parameters, or its last where there are none).

    Adapters are merged into their base. Raises: InputError, also where the base is no longer what it was.
    """
    path, folder = here(path), folder_of(path)
    settings = hf.read_config(folder)
    if found := adapters_of(path, settings, mesh, which):
        base, adapters = found
        if not places.place(base.path).is_dir():
            raise errors.InputError(f"{path / 'model' / BASE}: its base {base.path} is not here; write where it is")
        below = load_model(base.path, mesh, dtype=dtype, above=_below(above, path))
        known = identity(below)
        base.check(known, path)
        chain = [known, sums.digest(adapters), base.lora.scale]
        merged = hashlib.sha256(json.dumps(chain).encode()).hexdigest()
        own = hf.read_classes(path) if (path / hf.CLASSES).is_file() else below.classes
        return Loaded(settings, lora.merged(below.params, adapters, base.lora), folder, merged, own)
    _, abstract = model.build(settings)
    shardings = None if mesh is None else sharding.of_params(abstract, mesh)
    if folder == path:
        return Loaded(settings, hf.read_params(path, settings, shardings, dtype=dtype), folder)
    return Loaded(settings, saves.params(path, which, _wanted(nnx.to_pure_dict(abstract), shardings, dtype)), folder)


def adapters_of(
    path: str | Path, settings: model.Config, mesh: jax.sharding.Mesh | None = None, which: str = "best"
) -> tuple[Base, dict] | None:
    """The adapters in a run folder or in one of peft's, and their base; None where a whole model is."""
    path = here(path)
    base = Base.of(path)
    if base is not None:
        _, abstract = lora.build(settings, options.Compute(), base.lora)
        shardings = None if mesh is None else lora.split(sharding.of_params(abstract, mesh))[0]
        return base, saves.params(path, which, _wanted(lora.split(nnx.to_pure_dict(abstract))[0], shardings, "float32"))
    if peft.holds(path):
        adapted, adapters = peft.read(path, settings, mesh)
        return Base(path=str(peft.base_of(path)), digest=peft.digest_of(path), lora=adapted), adapters
    return None


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    which: str = "best",
    merge: bool = False,
    max_shard_bytes: int = 2 << 30,
    tell: hf.Tell = hf.untold,
) -> Path:
    """Write a run's parameters (or another folder's) as a Hugging Face folder with a model card.

    Adapters become an adapter's folder of peft, or with `merge` a whole model. Raises: InputError where there is
    nothing to merge.
    """
    source, out, folder = here(source), places.place(out), folder_of(source)
    settings = hf.read_config(folder)
    family = families.of(settings)
    card = functools.partial(modelcard.text, out.name, family.title, family.codec, source)
    found = adapters_of(source, settings, which=which)
    if merge and not found:
        raise errors.InputError(f"{source}: holds a whole model and no adapters; export it without --merge")
    if found and not merge:
        base, adapters = found
        if not (places.place(base.path) / "config.json").is_file():
            raise errors.InputError(
                f"{source}: its adapters correct {base.path}, which is no Hugging Face folder; export with --merge"
            )
        about = dict(base=base.path, digest=base.digest, classes=folder / hf.CLASSES)
        return peft.write(out, adapters, base.lora, settings, **about, dtype=dtype, card=card(adapter=True))
    if found or folder == source:
        take = functools.partial(hf.at, load_model(source, which=which, dtype=dtype).params)
    else:
        take = _taker(source, settings, which, dtype)
    how = dict(dtype=dtype, max_shard_bytes=max_shard_bytes, card=card(), tell=tell)
    return hf.write_parameters(out, take, settings, folder, **how)


def import_folder(source: str | Path, out: str | Path, *, dtype: str = "float32", tell: hf.Tell = hf.untold) -> Path:
    """A Hugging Face folder as a run folder: a checkpoint in shards, which every host reads its own part of.

    Its config.json comes last: without it the folder is no model. Raises: InputError where `out` holds anything but an
    import that was stopped, which is begun anew.
    """
    source, out = places.fetched(source), places.run_folder(out)
    if peft.holds(source):
        raise errors.InputError(f"{source}: holds adapters; export it with --merge first, and import that")
    settings, mesh = hf.read_config(source), sharding.make_mesh()
    hf.encoder_of(source, settings)  # what would be refused at every start from it is refused here
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out / "model" / "config.json").exists() or held - {"best", "model"} or out.is_file():
        raise errors.InputError(f"{out}: already exists; give a new folder")
    if jax.process_index() == 0:
        places.remove(out / "best")
    shardings = sharding.of_params(model.build(settings)[1], mesh)
    params = hf.read_params(source, settings, shardings, dtype=dtype, tell=tell)
    best = saves.Best(out, at_once=saves.gigabytes(params))
    best.save(0, params, 0.0)
    best.close()
    if jax.process_index() == 0:
        (out / "model").mkdir(parents=True, exist_ok=True)
        hf.copy_side_files(source, out / "model")
    return out


def identity(loaded: Loaded) -> str:
    """Tells a model from others, whatever dtype it was loaded in, and the same on every machine.

    That of merged adapters is made of those of their parts: merged numbers are rounded differently here and there.
    """
    return loaded.merged or sums.digest(loaded.params, "bfloat16")


def _below(above: tuple[Path, ...], path: Path) -> tuple[Path, ...]:
    """The folders of adapters on the way to a base. Raises: InputError where one comes again."""
    if path.resolve() in above:
        raise errors.InputError(f"{path}: is its own base by way of others; mend base_model_name_or_path or {BASE}")
    return (*above, path.resolve())


def _wanted(abstract: dict, shardings: dict | None, dtype: str) -> dict:
    """Shapes, dtypes and places to restore to; without shardings all on the first device."""
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    return jax.tree.map(
        lambda p, where: jax.ShapeDtypeStruct(p.shape, tensors.DTYPES[dtype], sharding=where), abstract, shardings
    )


def _taker(source: Path, settings: model.Config, which: str, dtype: str) -> hf.Take:
    """What gives the parameters of a run by their paths, one by one, so that they never lie there all."""
    abstract = nnx.to_pure_dict(model.build(settings)[1])

    def take(where):
        wanted = unflatten_dict({tuple(where): hf.at(abstract, where)})
        return hf.at(saves.params(source, which, _wanted(wanted, None, dtype)), where)

    return take


def _is_run(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()
