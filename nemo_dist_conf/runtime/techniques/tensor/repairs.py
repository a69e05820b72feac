"""What a family's plan leaves out or gets wrong, found by trying it, and put right where a mechanism is known for it.

Plans of transformers are written for generation: nothing in them sums the gradient of a parameter between two split
layers, and some split what the code between takes in full. Every repair is tried again before it is used.
"""

from __future__ import annotations

import logging
from typing import Any, Mapping

from torch import nn

from nemo_dist_conf.families.styles import STYLES, match_pattern
from nemo_dist_conf.runtime.techniques.tensor.trial import Finding, Trial

__all__ = ["pattern_of", "repaired"]

log = logging.getLogger(__name__)

#: Each takes a run of the twin.
_MOST_REPAIRS = 6
_SUMMED = "replicated_with_grad_allreduce"
#: What keeps a part to itself -> what takes and gives the whole.
_WHOLE = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input", _SUMMED: "replicated"}
#: What splits one weight -> what splits two in one.
_PACKED = {"colwise": "packed_colwise", "rowwise": "packed_rowwise"}


def repaired(model: nn.Module, named: Mapping[str, Any], trial: Trial) -> tuple[dict[str, Any], Finding | None]:
    """Styles by name that compute what the plain model does, and None; or those given, and what is wrong with them.

    Where only gradients are wrong, and right in sum over the ranks, they are summed. A weight that is twice as wide as
    the one beside it is two, each split by itself. Where the code of a module takes more than its rank's part, its
    layers are still split, and what they give is gathered.
    """
    found = first = trial.finding(named)
    styles, changes = dict(named), list[dict[str, str]]()
    while found is not None and len(changes) < _MOST_REPAIRS:
        change = next(filter(None, (repair(model, styles, found) for repair in _REPAIRS)), None)
        if not change:
            return dict(named), first
        changes.append(change)
        styles.update(change)
        found = trial.finding(styles)
    if found is not None:
        return dict(named), first
    for change in changes:
        shown = {pattern_of(name): style for name, style in change.items()}
        log.info("tensor parallel: the family's own plan is changed: %s", shown)
    return styles, None


def pattern_of(name: str) -> str:
    """The name with * in the place of numbers: what it is called in every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _summed(model: nn.Module, styles: Mapping[str, Any], found: Finding) -> dict[str, str]:
    """Sums for gradients that are right in sum, where all that is wrong is such; of modules in no entry."""
    if not found.gradients or found.gradients != found.unsummed:
        return {}
    patterns = {pattern_of(name.rpartition(".")[0]) for name in found.gradients}
    return {
        name: _SUMMED
        for name, module in model.named_modules()
        if name not in styles
        and any(match_pattern(pattern, name) for pattern in patterns)
        and any(True for _ in module.parameters(recurse=False))
    }


def _packed(model: nn.Module, styles: Mapping[str, Any], found: Finding) -> dict[str, str]:
    """Of parameters directly in the module of a finding, those that are two weights in one."""
    parameters = dict(model.named_parameters())
    widths: dict[str, int] = {}
    for name, style in styles.items():
        if name in parameters and style in _PACKED and match_pattern(pattern_of(found.module), name.rpartition(".")[0]):
            dim = STYLES[style].split_dim("Linear", parameters[name].dim())
            widths |= {name: parameters[name].size(dim)} if dim is not None else {}
    narrow = min(widths.values(), default=0)
    return {name: _PACKED[styles[name]] for name, width in widths.items() if width == 2 * narrow}


def _owned(model: nn.Module, styles: Mapping[str, Any], found: Finding) -> dict[str, str]:
    """Modules directly in the one of a finding, where it is that their output was written into."""
    if "is a view and is being modified inplace" not in found.text:
        return {}
    return {
        name: "own_output"
        for name, _ in model.named_modules()
        if name not in styles
        and match_pattern(pattern_of(found.module), name.rpartition(".")[0])
        and any(other.startswith(f"{name}.") for other in styles)
    }


def _gathered(model: nn.Module, styles: Mapping[str, Any], found: Finding) -> dict[str, str]:
    """Layers directly in the module of a finding, or in the one around it, that give the whole instead of a part."""
    places = [found.module, found.module.rpartition(".")[0]]
    for place in filter(None, places):
        inside = pattern_of(place)
        change = {
            name: _WHOLE[style]
            for name, style in styles.items()
            if isinstance(style, str) and style in _WHOLE and match_pattern(inside, name.rpartition(".")[0])
        }
        if any(style.startswith(("colwise", "rowwise")) for style in change.values()):
            return {name: style for name, style in change.items() if name in dict(model.named_modules())}
    return {}


#: In the order in which they are thought of.
_REPAIRS = (_summed, _owned, _packed, _gathered)
