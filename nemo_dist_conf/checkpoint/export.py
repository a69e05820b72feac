"""A checkpoint of any layout as a folder of transformers, put together from the parts on disk.

No model is built and no layout is needed: each tensor is read from the files that hold parts of it and written to its
place, so that no process holds more than one tensor at a time. Ranks share the files to be written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dist_conf.checkpoint.adapter_export import Merge, adapter_names, base_sources, merges
from nemo_dist_conf.checkpoint.manifest import (
    STATE,
    Manifest,
    damaged,
    read_json,
    read_manifest,
    wrong_bytes,
    wrong_sizes,
)
from nemo_dist_conf.checkpoint.storage import FolderReader, Index
from nemo_dist_conf.checkpoint.tensor_file import write_tensors
from nemo_dist_conf.errors import DataError, Problem, TrainingError
from nemo_dist_conf.families.config_facts import plain_floats
from nemo_dist_conf.runtime.model.family_code import import_modeling
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.model.shard_boxes import Box
from nemo_dist_conf.runtime.model.stored_names import Part, stored_parts
from nemo_dist_conf.runtime.rank_agreement import together

__all__ = ["export_adapter", "export_hf"]

log = logging.getLogger(__name__)

_SHARD_BYTES = 5_000_000_000
_FIRST = "rank_00000.safetensors"
_INDEX = "model.safetensors.index.json"


def export_hf(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write the weights of a checkpoint as ``AutoModelForCausalLM.from_pretrained`` loads them; returns the folder.

    An adapter is merged into them; ``export_adapter`` writes it by itself.
    checkpoint: of a model of transformers. folder: replaced where it exists, once the new one is complete.
    tokenizer: a folder or tokenizer.json to be put beside the weights. shard_bytes: of a file, at most.
    Every rank calls it where there are several; a single process does as well.
    Raises DataError for a damaged checkpoint or one of another kind of model, TrainingError where it cannot be written.
    """
    source, target = Path(checkpoint), Path(folder).absolute()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    (manifest, index, model, adapter), _ = together(lambda: _opened(source), lambda opened: opened[0].files)
    together(lambda: _refuse(source, wrong_bytes(manifest, sorted(manifest.files)[rank::world_size])))
    parts = stored_parts(model)
    names, _ = together(lambda: _names(source, index, model, parts, adapter))
    files = _files(names, shard_bytes)
    partial = [target.with_name(f".partial-{target.name}-{uuid.uuid4().hex[:8]}")]
    if world_size > 1:
        dist.broadcast_object_list(partial, src=0)
    reader = FolderReader(manifest, index)

    def write() -> str:
        """What went wrong on this rank."""
        try:
            partial[0].mkdir(parents=True, exist_ok=True)
            for file in sorted(files)[rank::world_size]:
                layout = {name: (names[name].dtype, names[name].shape) for name in files[file]}
                write_tensors(partial[0] / file, layout, _values(reader, names, files[file]), {"format": "pt"})
            if rank == 0:
                _write_rest(partial[0], model, names, files, tokenizer)
        except OSError as error:
            return f"{error.strerror} (rank {rank})"
        return ""

    try:
        failed = next((reason for reason in together(write, lambda reason: reason)[1] if reason), "")
        if rank == 0 and not failed:
            _put_in_place(partial[0], target)
    finally:
        if rank == 0:
            shutil.rmtree(partial[0], ignore_errors=True)
    together(lambda: None)  # the folder is there when any rank returns
    if failed:
        raise TrainingError(f"{target} could not be written: {failed}\n  kept    {source}")
    log.info("exported %s to %s", source, target)
    return target


def export_adapter(checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write the adapter of a checkpoint as ``peft.PeftModel.from_pretrained`` loads it; returns the folder.

    checkpoint: of a model of transformers that was trained with ``adapter=lora`` or ``dora``. folder: replaced where it
    exists. Every rank calls it where there are several, and rank 0 writes.
    Raises DataError for a damaged checkpoint or one without an adapter, TrainingError where it cannot be written.
    """
    source, target = Path(checkpoint), Path(folder).absolute()
    rank = dist.get_rank() if dist.is_initialized() else 0

    def write() -> str:
        manifest = read_manifest(source)
        _refuse(source, wrong_sizes(manifest) or (wrong_bytes(manifest, sorted(manifest.files)) if not rank else ""))
        fields = read_json(source, STATE).get("adapter")
        if fields is None:
            what, asked = f"{source} holds no adapter", f"export_adapter({str(source)!r}, ...)"
            allowed = "a checkpoint of a run with adapter=lora or adapter=dora"
            instead = f"export_hf({str(source)!r}, ...)"
            raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead=instead))
        return _written_adapter(manifest, fields, target) if rank == 0 else ""

    failed = next((reason for reason in together(write, lambda reason: reason)[1] if reason), "")
    if failed:
        raise TrainingError(f"{target} could not be written: {failed}\n  kept    {source}")
    log.info("exported the adapter of %s to %s", source, target)
    return target


def _written_adapter(manifest: Manifest, fields: Mapping[str, Any], target: Path) -> str:
    """What went wrong, if anything."""
    import peft

    index = Index.read(manifest)
    held = {name.removeprefix("model."): entry for name, entry in index.stored.items() if name.startswith("model.")}
    sources = {
        name: _Source(f"model.{place}", held[place].dtype, held[place].shape, _box(Part(place, ()), held[place].shape))
        for name, place in adapter_names(held).items()
    }
    layout = {name: (source.dtype, source.shape) for name, source in sources.items()}
    partial = target.with_name(f".partial-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        values = _values(FolderReader(manifest, index), sources, list(sources))
        write_tensors(partial / "adapter_model.safetensors", layout, values, {"format": "pt"})
        peft.LoraConfig(**fields, inference_mode=True).save_pretrained(str(partial))
        _put_in_place(partial, target)
    except OSError as error:
        return str(error.strerror)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ""


class _Source:
    """What a tensor of the exported folder is made of: a part of a tensor of the checkpoint, and an adapter to it."""

    def __init__(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], box: Box, merge: Merge | None = None
    ) -> None:
        self.name, self.dtype, self.shape, self.box, self.merge = name, dtype, shape, box, merge

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _opened(source: Path) -> tuple[Manifest, Index, Any, Mapping[str, Any] | None]:
    """Manifest, index, the model on meta without an adapter, and the settings of an adapter."""
    manifest = read_manifest(source)
    _refuse(source, wrong_sizes(manifest))
    state = read_json(source, STATE)
    fields = state.get("model")
    asked = f"export_hf({str(source)!r}, ...)"
    if not fields:
        what = f"{source} holds no model of transformers"
        allowed = "a checkpoint of one; the files of this one are safetensors too"
        raise DataError(
            Problem(
                what=what,
                asked=asked,
                allowed=allowed,
                instead=f"safetensors.torch.load_file({str(source / _FIRST)!r})",
            )
        )
    import transformers

    import_modeling(fields.get("model_type"))
    try:
        config = transformers.AutoConfig.for_model(**plain_floats(fields))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many types: a family that this version does not know, or of another task
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"{source} holds a model ({fields.get('model_type')}) that is no causal language model here: {reason}"
        allowed = "a causal language model of the installed transformers; the files are safetensors too"
        instead = f"safetensors.torch.load_file({str(source / _FIRST)!r})"
        raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead=instead)) from error
    return manifest, Index.read(manifest), model, state.get("adapter")


def _refuse(source: Path, finding: str) -> None:
    if finding:
        raise damaged(source, finding)


def _names(
    source: Path, index: Index, model: Any, parts: Mapping[str, Part], adapter: Mapping[str, Any] | None
) -> dict[str, _Source]:
    """Every tensor of the folder by its stored name; tied ones once, under the name that the checkpoint has."""
    held = {name.removeprefix("model."): entry for name, entry in index.stored.items() if name.startswith("model.")}
    places, added = dict(zip(held, held)), dict[str, Merge]()
    if adapter is not None:
        places, added = base_sources(held), merges(held, adapter, model)
        if any(".modules_to_save." in places.get(name, "") for group in tied_names(model) for name in group):
            model.config.tie_word_embeddings = False  # one of the two was trained by itself
    stored = {base: held[name] for base, name in places.items()}
    followers = {name for group in tied_names(model) for name in group if name not in stored}
    wanted = parts or {name: Part(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    _refuse_others(source, stored, {part.parameter for part in wanted.values()} - followers, model)
    names = {}
    for name, part in wanted.items():
        if part.parameter in followers:
            continue
        entry = stored[part.parameter]
        place, box = places[part.parameter], _box(part, entry.shape)
        names[name] = _Source(f"model.{place}", entry.dtype, part.shape, box, added.get(place))
    return names


def _refuse_others(source: Path, stored: Mapping[str, Any], wanted: set[str], model: Any) -> None:
    """Raise DataError where the checkpoint's tensors are not all that the model has, and nothing else."""
    missing, others = sorted(wanted - set(stored)), sorted(set(stored) - wanted)
    if not missing and not others:
        return
    kind = type(model).__name__
    said = [f"{len(names)} {word} ({names[0]})" for word, names in (("missing", missing), ("more", others)) if names]
    what = f"{source} does not hold a {kind} as it is: {', '.join(said)}"
    allowed = f"the tensors of a {kind}, and no others; the files are safetensors too"
    instead = f"safetensors.torch.load_file({str(source / _FIRST)!r})"
    if any(name.startswith("base_model.model.") for name in others):
        what = f"{source} holds a {kind} with an adapter of peft around it, which this version does not export"
        allowed = f"a {kind} as it is, or with the adapter merged into it"
        instead = "load(folder, model) in one process, and model.merge_and_unload().save_pretrained(...)"
    raise DataError(Problem(what=what, asked=f"export_hf({str(source)!r}, ...)", allowed=allowed, instead=instead))


def _box(part: Part, shape: tuple[int, ...]) -> Box:
    if part.expert is None:
        return Box((0,) * len(shape), shape)
    return Box((part.expert, part.first, *[0] * (len(shape) - 2)), (1, part.rows, *shape[2:]))


def _files(names: Mapping[str, _Source], shard_bytes: int) -> dict[str, list[str]]:
    """File -> the tensors in it, in the model's order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, source in names.items():
        if shards[-1] and size + source.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += source.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _values(reader: FolderReader, names: Mapping[str, _Source], wanted: list[str]) -> Iterator[Tensor]:
    def read(name: str, wanted: Box | None = None) -> Tensor:
        entry = reader.index.stored[name]
        whole = wanted or Box((0,) * len(entry.shape), entry.shape)
        value = torch.empty(whole.sizes, dtype=entry.dtype)
        for place, box in reader.index.parts(name):
            both = whole.shared(box)
            if both is not None:
                both[0].of(value).copy_(both[1].of(reader.read(*place)))
        return value

    for name in wanted:
        source = names[name]
        value = read(source.name, source.box)
        if source.merge is not None:
            value = source.merge(value, lambda other: read(f"model.{other}"))
        yield value.view(source.shape)


def _write_rest(
    folder: Path, model: Any, names: Mapping[str, _Source], files: Mapping[str, list[str]], tokenizer: Any
) -> None:
    """The config, the index where there are several files, and the tokenizer."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(iter(names.values())).dtype
    model.config.use_cache = True
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if len(files) > 1:
        total = sum(source.bytes for source in names.values())
        places = {name: file for file, held in files.items() for name in held}
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(content, indent=2, sort_keys=True))
    if tokenizer is not None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(tokenizer).expanduser()
        if path.is_file():
            PreTrainedTokenizerFast(tokenizer_file=str(path)).save_pretrained(folder)
        else:
            AutoTokenizer.from_pretrained(str(path), local_files_only=True).save_pretrained(folder)


def _put_in_place(partial: Path, target: Path) -> None:
    """The new folder takes the old one's name; the old one goes only once the new one is there."""
    old = target.with_name(f"{partial.name}-old")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
