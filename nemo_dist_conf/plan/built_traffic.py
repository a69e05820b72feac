"""Collectives of a built model: what each tensor-parallel style does to each call of a module, and what cp gathers.

Sizes are those of the tensors that modules were given and returned in the forward on meta, so they hold whatever the
code between the layers does. What is called is in runtime/techniques/tensor/styles.py and partial_styles.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Iterator

from nemo_dist_conf.families.built_shape import BuiltShape, Passage
from nemo_dist_conf.families.shapes import Weight, weights
from nemo_dist_conf.families.styles import STYLES
from nemo_dist_conf.plan.built_costs import run_of
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage
from nemo_dist_conf.plan.rank_shards import padded

__all__ = ["context_gathers", "tensor_collectives"]

_CUT = "between stages"
_SUMS, _COLUMNS, _ROUTING = "row sums", "column inputs", "routing weights"
#: Inside of which a sequence that is split is whole.
_WHOLE = ("whole_inputs", "whole_sequence")
_EXPERTS, _SUMMED, _NORM = "moe_tp_experts", "replicated_with_grad_allreduce", "sequence_parallel"


@dataclass
class _Calls:
    """(kind, bytes, why) of what is called in a forward and in a backward; before: in forward, for a module's input."""

    before: list[tuple[str, int, str]] = field(default_factory=list)
    after: list[tuple[str, int, str]] = field(default_factory=list)
    backward: list[tuple[str, int, str]] = field(default_factory=list)


def tensor_collectives(job: Job, stage: Stage) -> Iterator[Collective]:
    """What a rank takes part in for the modules of a stage."""
    assert isinstance(job.model, BuiltShape)
    parts = _parts_of(job, stage)
    splits, found = _Splits(job), Counter[tuple[str, int, str, str]]()
    for name, passages in run_of(job, job.seq_len // job.cp).passages.items():
        for passage in passages:
            if passage.part in parts:
                found.update(_by_moment(job, passage, splits.calls(name, passage)))
    if job.sequence_parallel and not splits.embeds_parts():  # the first block cuts what comes in
        found["all_gather", job.tokens * job.model.hidden * DTYPE_BYTES[job.compute_dtype], "backward", _CUT] += 1
    times = job.microbatches * job.calls
    for (kind, size, when, why), calls in found.items():
        yield Collective("tp", kind, calls * times, size, when, why=why)


def context_gathers(job: Job, stage: Stage, recomputed: bool = False) -> Counter[tuple[str, int, bool]]:
    """How often cp gathers a tensor in the forward of a microbatch: by (why, bytes, whether it has a gradient).

    recomputed: those of blocks that are recomputed alone.
    """
    assert isinstance(job.model, BuiltShape)
    parts = _parts_of(job, stage)
    if recomputed:
        parts = {part for part in parts if 0 <= part < job.model.layers and job.recomputed[part]}
    found = job.model.gathered_of(job.cp, job.rows, job.seq_len, job.compute_dtype)
    return Counter(
        (one.why, one.size // (job.tp if one.of_heads else 1), one.has_gradient) for one in found if one.part in parts
    )


def _parts_of(job: Job, stage: Stage) -> set[int]:
    """Numbers of a stage's blocks, and of what it has outside of them."""
    parts = {*range(stage.first, stage.last)}
    parts |= {-1} if "embedding" in stage.outer else set()
    return parts | ({job.model.layers} if "final_norm" in stage.outer else set())


def _by_moment(job: Job, passage: Passage, calls: _Calls) -> Iterator[tuple[str, int, str, str]]:
    """(kind, bytes, when, why) of a module's calls, those that recomputing its block calls again among them.

    torch ends a recomputation with the last of what was saved, so a collective after that does not run again.
    """
    for kind, size, why in (*calls.before, *calls.after):
        yield kind, size, "forward", why
    if 0 <= passage.part < job.model.layers and job.recomputed[passage.part]:
        for kind, size, why in (*calls.before, *(calls.after if passage.again else ())):
            if job.checkpointing is True or kind != "reduce_scatter":  # selective keeps what that returned
                yield kind, size, "recompute", why
    for kind, size, why in calls.backward:
        yield kind, size, "backward", why


class _Splits:
    """The styles of a job's modules, and what a rank calls for one of their calls."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.model, BuiltShape)
        self.job, self.model, self.styles = job, job.model, job.styles
        self.weights: dict[str, Weight] = dict(weights(job.model))
        split = {name.rpartition(".")[0] for name, weight in self.weights.items() if weight.expert}
        self.apart = split if job.ep > 1 else set[str]()

    def embeds_parts(self) -> bool:
        """Whether what comes to the first block is split over the sequence."""
        tables = [name for name, weight in self.weights.items() if weight.part == "embedding"]
        return any(STYLES[style].splits_sequence for name in tables for style in (self.styles.of(name),))

    def calls(self, name: str, passage: Passage) -> _Calls:
        if name in self.apart:
            return self._whole_experts(passage)
        found = _Calls()
        if any(name.startswith(f"{other}.") for other in self.apart):
            return found
        for style in self.styles.of_module(name):
            self._of_weights(name, style, passage, found)
            self._of_parts(name, style, passage, found)
            why = "norms" if style == _NORM else "norms of heads" if "norm" in name else "whole parameters"
            found.backward += [("all_reduce", size, why) for size in self._summed_parameters(name, style)]
        return found

    def _of_weights(self, name: str, style: str, passage: Passage, found: _Calls) -> None:
        """Of a linear layer or an embedding: parts of features put together, parts of sums added up."""
        known, given = STYLES[style], [one for one in passage.given if one.has_gradient]
        weight, tp = self.weights.get(f"{name}.weight"), self.job.tp
        is_table = weight is not None and weight.layer == "Embedding"
        if style == "gather_input" or (
            known.splits == "output" and not is_table and not self._is_in(name, ("gather_input",))
        ):
            is_split = self.job.sequence_parallel and not self._is_in(name, _WHOLE)
            if is_split and passage.given:
                found.before.append(("all_gather", passage.given[0].size, _COLUMNS))
            found.backward += [
                ("reduce_scatter" if is_split else "all_reduce", one.size, _COLUMNS) for one in given[:1]
            ]
        if style == "colwise_gather_output":
            is_last = passage.part == self.model.layers and passage.width == self.model.vocab
            why = "logits" if is_last else "column outputs"
            found.after.append(("all_gather", _made_even(passage.returned, passage.width, tp), why))
        if known.splits == "input":
            found.after.append(("reduce_scatter" if known.splits_sequence else "all_reduce", passage.returned, _SUMS))
            found.backward += [("all_gather", passage.returned, _SUMS)] if known.splits_sequence else []
        if style == "rowwise_split_input":
            found.backward += [("all_gather", _made_even(one.size, one.width, tp), "row inputs") for one in given[:1]]

    def _of_parts(self, name: str, style: str, passage: Passage, found: _Calls) -> None:
        """Of a module whose code runs on parts."""
        given = [one for one in passage.given if one.has_gradient]
        if style in (_EXPERTS, "all_reduce"):
            found.after.append(("all_reduce", passage.returned, _SUMS))
        if style == _EXPERTS or (style == "all_reduce" and self._splits_own(name)):
            whys = (_COLUMNS, *[_ROUTING] * len(given))
            found.backward += [("all_reduce", one.size, why) for one, why in zip(given, whys)]
        if style == "mla_kv_a_proj" and given:
            rotary = passage.returned // passage.width * self.model.rotary_width
            found.backward.append(("all_reduce", rotary, "rotary keys"))
        if style == "whole_sequence" and given:
            found.before.append(("all_gather", given[0].size, _COLUMNS))
            found.backward.append(("all_gather", passage.returned, _SUMS))

    def _whole_experts(self, passage: Passage) -> _Calls:
        """Beside expert parallelism: a rank's experts have had a part of its tokens, and all ranks need all of them."""
        given = [one for one in passage.given if one.has_gradient]
        whys = ("inputs of experts", *[_ROUTING] * len(given))
        return _Calls(
            after=[("all_gather", passage.returned, "outputs of experts")],
            backward=[("all_gather", one.size, why) for one, why in zip(given, whys)],
        )

    def _summed_parameters(self, name: str, style: str) -> Iterator[int]:
        """Bytes of a module's whole parameters, of whose gradients each rank has a part."""
        item = DTYPE_BYTES[self.job.param_dtype]
        for own, weight in self.weights.items():
            if not own.startswith(f"{name}.") or not weight.trained or own in self.job.untrained:
                continue
            is_split = bool(STYLES[self.styles.of(own)].splits)
            is_packed_bias = style.startswith("packed") and own == f"{name}.bias"
            is_own = style == "sequence_parameters" and own.rpartition(".")[0] == name
            if style in (_SUMMED, _NORM) or is_packed_bias or is_own or (style == _EXPERTS and not is_split):
                yield weight.count * item

    def _is_in(self, name: str, styles: tuple[str, ...]) -> bool:
        """Whether something that a module is in has one of these styles."""
        parts = name.split(".")
        around = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return any(style in styles for one in around for style in self.styles.of_module(one))

    def _splits_own(self, name: str) -> bool:
        """Whether a module has parameters of its own that are split."""
        own = (one for one in self.weights if one.rpartition(".")[0] == name)
        return any(STYLES[self.styles.of(one)].splits for one in own)


def _made_even(size: int, width: int, parts: int) -> int:
    """Bytes of a tensor of so many features when they are padded for equal parts."""
    return size // width * padded(width, parts)
