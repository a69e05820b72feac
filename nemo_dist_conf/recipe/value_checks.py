"""What is refused of the recipe's own values before a process is spent: train, data, optimizer, model, seed, device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Iterable, Mapping

from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.families.spec import Fields
from nemo_dist_conf.names import nearest
from nemo_dist_conf.schema.optimizers import optimizer_problems
from nemo_dist_conf.wording import assigned, typed, unknown_name

__all__ = [
    "PATH_ALLOWED",
    "TOKENIZER_ALLOWED",
    "data_problems",
    "schedule_problems",
    "train_problems",
    "value_problems",
]

PATH_ALLOWED = "a text file, a folder of text files, or a glob; null: the sources of Python's standard library"
TOKENIZER_ALLOWED = "a local tokenizer folder, or a tokenizer.json file; null: bytes"
_DEVICES = ("auto", "cpu", "cuda")
_SCHEDULES = ("constant", "cosine")


def value_problems(config: DictConfig) -> Iterable[Problem]:
    """Every wrong value that is no matter of the layout; nodes with ``_target_`` are the user's own."""
    device, seed = config.get("device"), config.get("seed")
    if str(device).partition(":")[0] not in _DEVICES:
        yield unknown_name(
            device,
            _DEVICES,
            what=f"device={device} is not supported",
            asked=assigned("device", device),
            allowed=", ".join(_DEVICES),
            offer=lambda known: assigned("device", known),
            meant=("cuda",) if device == "gpu" else (),
        )
    if not (_is_whole(seed, 0) and seed < 2**63):  # what torch and numpy both take
        allowed = "0 to 2**63 - 1" if _is_whole(seed, 0) else "0, 1, 2, ..."
        yield Problem(
            what=f"seed={typed(seed)} does not fit",
            asked=assigned("seed", seed),
            allowed=allowed,
            instead="seed=0",
        )
    if isinstance(config.get("train"), DictConfig):
        yield from train_problems(config.train)
        steps, warmup = config.train.get("steps"), config.train.get("warmup_steps")
        yield from schedule_problems(config.train.get("schedule"), 0 if warmup is None else warmup, steps)
    data, optimizer, model = (_values(config.get(key)) for key in ("data", "optimizer", "model"))
    if data is not None:
        yield from data_problems(data)
    if optimizer is not None:
        yield from optimizer_problems(optimizer)
    elif config.get("optimizer") is None:
        what = "training needs an optimizer"
        yield Problem(
            what=what, asked="optimizer=null", allowed="optimizer=adamw, optimizer=sgd", instead="optimizer=adamw"
        )
    if model is not None and isinstance(model.get("config"), Mapping) and not model.get("name_or_path"):
        yield from _model_problems(model["config"])


def _values(node: Any) -> dict[str, Any] | None:
    """The node's values, or None where it is no group, or builds something of the user's."""
    values: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else None
    return values if isinstance(values, dict) and "_target_" not in values else None


def train_problems(node: Any) -> list[Problem]:
    """Wrong values of ``train``, but for the batch sizes, which depend on the ranks, and the schedule."""
    problems: list[Problem] = []

    def wrong(key: str, allowed: str, example: Any) -> None:
        asked = assigned(f"train.{key}", node.get(key))
        problems.append(
            Problem(
                what=f"{asked} does not fit", asked=asked, allowed=allowed, instead=assigned(f"train.{key}", example)
            )
        )

    if not _is_whole(node.get("steps"), 1):
        wrong("steps", "1, 2, 3, ...", 200)
    norm = node.get("max_grad_norm")
    if norm is not None and not (_is_number(norm) and norm >= 0):
        wrong("max_grad_norm", "a number above 0; 0 or null: gradients are measured, not clipped", 1.0)
    if not _is_whole(node.get("log_every"), 1):
        wrong("log_every", "1, 2, 3, ...", 1)
    if not isinstance(node.get("tensorboard"), bool):
        wrong("tensorboard", "true, false", False)
    return problems


def schedule_problems(schedule: Any, warmup_steps: Any, steps: Any) -> list[Problem]:
    """What is wrong with the learning rate's schedule over so many steps."""
    problems = []
    if schedule not in _SCHEDULES:
        asked = assigned("train.schedule", schedule)
        problems.append(
            unknown_name(
                schedule,
                _SCHEDULES,
                what=f"{asked} is not a schedule",
                asked=asked,
                allowed=", ".join(_SCHEDULES),
                offer=lambda known: assigned("train.schedule", known),
            )
        )
    if not _is_whole(warmup_steps, 0):
        asked = assigned("train.warmup_steps", warmup_steps)
        allowed = "0, 1, 2, ...; longer than the run: the rate rises to its end"
        example = steps // 10 if _is_whole(steps, 1) else 0
        problems.append(
            Problem(what=f"{asked} does not fit", asked=asked, allowed=allowed, instead=f"train.warmup_steps={example}")
        )
    return problems


def data_problems(values: Mapping[Any, Any]) -> list[Problem]:
    """Wrong values of ``data``, as far as they can be told without reading any."""
    problems: list[Problem] = []

    def wrong(key: str, what: str, allowed: str, type_: str) -> None:
        asked = assigned(f"data.{key}", values.get(key))
        problems.append(Problem(what=f"data.{key}: {what}", asked=asked, allowed=allowed, instead=type_))

    for key, allowed in (("path", PATH_ALLOWED), ("tokenizer", TOKENIZER_ALLOWED)):
        if not isinstance(values.get(key), (str, Path, type(None))):
            wrong(key, f"expected a path, got {values[key]!r}", allowed, f"data.{key}=null")
    if not _is_whole(values.get("seq_len"), 1):
        wrong("seq_len", "expected a whole number of tokens, at least 1", "1, 2, 3, ...", "data.seq_len=64")
    max_mb = values.get("max_mb")
    if max_mb is not None and not (_is_number(max_mb) and max_mb > 0):
        wrong("max_mb", "expected a size above 0", "MB of text to read; null: all of it", "data.max_mb=null")
    return problems


def _model_problems(fields: Mapping[Any, Any]) -> Iterable[Problem]:
    """Misspelt fields, which transformers keeps without a word, and heads that do not fit each other."""
    family = find_family(fields.get("model_type"))
    if family is not None and family.config_fields:
        for key in map(str, fields):
            near = nearest(key, family.config_fields, cutoff=0.85)
            if key not in family.config_fields and near:
                yield unknown_name(
                    key,
                    near,
                    what=f"model.config.{key} is no field of a {family.name} config",
                    asked=assigned(f"+model.config.{key}", fields[key]),
                    offer=functools.partial(_assigned_field, fields[key]),
                    hint=True,
                    meant=near,
                )
    names = family.fields if family is not None else Fields()
    sizes = (names.vocab, names.hidden, names.intermediate, names.layers, names.heads, names.kv_heads)
    given = [key for key in sizes if fields.get(key) is not None]
    wrong = [key for key in given if not _is_whole(fields[key], 1)]
    for key in wrong:
        asked = assigned(f"model.config.{key}", fields[key])
        yield Problem(what=f"{asked} does not fit", asked=asked, allowed="1, 2, 3, ...", instead=f"~model.config.{key}")
    yield from _expert_problems(fields, names)
    dropout = fields.get("attention_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        asked = assigned("model.config.attention_dropout", dropout)
        yield Problem(
            what=f"{asked} does not fit",
            asked=asked,
            allowed="0 to below 1",
            instead="++model.config.attention_dropout=0.0",
        )
    if wrong:
        return
    hidden, heads, shared = (fields.get(key) for key in (names.hidden, names.heads, names.kv_heads))
    # Rotary embeddings turn pairs, so a head of these families has an even width.
    unit = 2 * heads if heads and family is not None and family.rotary else heads
    if hidden and heads and not fields.get(names.head_dim) and hidden % unit:
        parts = "pairs" if hidden % heads == 0 else "parts"
        what = f"the hidden size {hidden} does not split into {parts} for the model's {heads} attention heads"
        asked = f"model.config.{names.hidden}={hidden} model.config.{names.heads}={heads}"
        fits = max(1, round(hidden / unit)) * unit
        yield Problem(
            what=what,
            asked=asked,
            allowed=f"{names.hidden}: a multiple of {unit}",
            instead=f"model.config.{names.hidden}={fits}",
        )
    if heads and shared and heads % shared:
        what = f"the model's {shared} key/value heads do not divide its {heads} attention heads"
        asked = f"model.config.{names.heads}={heads} model.config.{names.kv_heads}={shared}"
        legal = [size for size in range(1, heads + 1) if heads % size == 0]
        best = max(size for size in legal if size <= max(1, shared))
        allowed = f"{names.kv_heads}: {', '.join(map(str, legal))}"
        yield Problem(what=what, asked=asked, allowed=allowed, instead=f"model.config.{names.kv_heads}={best}")


def _assigned_field(value: Any, name: str) -> str:
    return assigned(f"model.config.{name}", value)


def _expert_problems(fields: Mapping[Any, Any], names: Fields) -> Iterable[Problem]:
    """A token that asks for no expert, or for more than there are, which only the first forward would tell."""
    key = names.experts_per_token or "num_experts_per_tok"
    chosen = fields.get(key)
    counts = (names.experts, "num_local_experts", "num_experts")
    there = next((fields[count] for count in counts if fields.get(count) is not None), None)
    most = there if _is_whole(there, 1) else None
    if chosen is None or (_is_whole(chosen, 1) and (most is None or chosen <= most)):
        return
    asked = assigned(f"model.config.{key}", chosen)
    allowed = "1, 2, 3, ..." if most is None else f"1 to {most}, the number of experts"
    best = min(most or chosen, chosen) if _is_whole(chosen, 1) else 1
    yield Problem(what=f"{asked} does not fit", asked=asked, allowed=allowed, instead=f"++model.config.{key}={best}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
