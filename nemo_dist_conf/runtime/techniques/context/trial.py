"""Whether context parallelism is right for a model: known of its family, or found out on a twin of it.

Three things can be wrong, and each is looked for:

- something beside the exchanged attention mixes tokens: a recurrence, a convolution, an attention that does not go
  through transformers' registry, pooling, statistics of a batch. In a twin whose registered attention mixes nothing,
  one token is changed: what every other token comes to must stay as it is.
- a module counts the tokens by itself, so that a rank would count its own: in the same twin, every torch.arange over
  as many numbers as there are tokens starts later. A module where that shows is given positions in the whole row.
- anything else: the twin is run on the ranks of the axis, each with its part of the rows, and what it returns has to
  be what the plain twin returns for whole rows.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.trial import differ, keep_generators, observed, parted, small_input, tensors_of, twin
from nemo_dist_conf.runtime.techniques.context.exchange import Exchange
from nemo_dist_conf.runtime.techniques.context.parallel import (
    exchange_tokens,
    own_configs,
    set_attention,
    split_sequence,
    takes_tokens,
    with_positions,
)
from nemo_dist_conf.runtime.techniques.context.position_counts import Site, counted_by, counting_from
from nemo_dist_conf.runtime.torch_inside import attention_of, is_hooked, name_attention

__all__ = ["try_context_parallel"]

log = logging.getLogger(__name__)

#: A row on which mixing is looked for once more, because some mix over a distance only: dilated convolutions, blocks.
_FAR_TOKENS = 256
#: Positions that a trained model hardly reaches: what changes at some length has changed there.
_FAR = 1_000_000
#: A token that nothing mixes into another leaves it as it was, but for experts that compute other groups of tokens.
_SAME = 1e-5
_NO_MIXING = "nemo_dist_conf_no_mixing"


def try_context_parallel(model: nn.Module, mesh: DeviceMesh, blocks: Blocks | None = None) -> dict[type, set[Site]]:
    """Classes of modules that count positions by themselves, and where they do, for ``apply_context_parallel``.

    model: plain, on meta or not; nothing of it changes. mesh: the axis cp; every rank of it calls this.
    Raises ConfigError, on every rank, for a model that would compute something else.
    """
    if _is_known(model):
        return {}
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    trial = _Trial(model, mesh, find_blocks(model) if blocks is None else blocks, device)
    with keep_generators():
        return trial.run()


def _is_known(model: nn.Module) -> bool:
    """Whether this is a model of a family whose numbers tests compare, with nothing in it that is not the family's."""
    config: Any = getattr(model, "config", None)
    family = find_family(getattr(config, "model_type", None))
    if family is None or "cp" not in family.proven or not type(model).__name__.endswith(("ForCausalLM", "Model")):
        return False
    if attention_of(config) not in ("eager", "sdpa") and not _is_kernel(attention_of(config)):
        return False  # somebody's own
    known = ("torch.nn.modules.", "transformers.activations", f"transformers.models.{family.name}.")
    for module in model.modules():
        if not type(module).__module__.startswith(known) or "forward" in vars(module):
            return False
        if is_hooked(module):
            return False
    return True


def _is_kernel(attention: str | None) -> bool:
    """Whether this is one of transformers' attentions that compute what ``eager`` does, on a GPU in half precision."""
    return attention is not None and (attention.startswith(("flash_attention", "flex_attention")) or "/" in attention)


class _Trial:
    """The trial of one model, on rows of ``length`` tokens."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, blocks: Blocks, device: torch.device) -> None:
        self.model, self.mesh, self.blocks, self.device = model, mesh, blocks, device
        self.length = 2 * mesh.size() * max(1, 8 // mesh.size())
        self.name = type(model).__name__

    def run(self) -> dict[type, set[Site]]:
        local, inputs = self._twin(torch.device("cpu"))
        with self._without_mixing(local):
            self._refuse_mixing(local, inputs, self.length)
            self._refuse_mixing(local, *self._longer(local, inputs))
            counts, far = self._counts(local, inputs)
        if self.device.type != "cpu":
            local, inputs = self._twin(self.device)
        self._compare(local, inputs, counts, far)
        shown = ", ".join(sorted(kind.__name__ for kind in counts)) or "none"
        log.info("context parallel: tried on %d tokens; modules that count positions: %s", self.length, shown)
        return counts

    def _refusal(self, what: str, allowed: str) -> ConfigError:
        asked = f"parallelism.cp_size={self.mesh.size()}"
        return ConfigError(
            Problem(
                what=f"cp_size={self.mesh.size()}: {what}",
                asked=asked,
                allowed=allowed,
                instead="parallelism.cp_size=1",
            )
        )

    def _twin(self, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        """A twin that runs, and its input; with all of its blocks where they do not hand on what they are given."""
        failure: Exception | None = None
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        for blocks in (self.blocks, {}):
            if not blocks and failure is not None and whole > 2**28:
                break
            try:
                tried = twin(self.model, blocks, device)
                name_attention([(c, "eager") for c in own_configs(tried) if _is_kernel(attention_of(c))])
                inputs = small_input(tried, self.length, device=device)
                if inputs is None or _tokens_of(inputs) is None:
                    what = f"nobody says what {self.name} takes, so what it does to the tokens of a row cannot be tried"
                    raise self._refusal(what, "cp_size=1, or a model of token ids")
                with torch.no_grad():
                    tried(**inputs)
                return tried, inputs
            except ConfigError:
                raise
            except Exception as error:  # the model's own code
                failure = failure or error
        what = f"{self.name} does not run on {self.length} tokens ({_first_line(failure)})"
        raise self._refusal(f"{what}, so what it does to the tokens of a row cannot be tried", "cp_size=1")

    @contextlib.contextmanager
    def _without_mixing(self, tried: nn.Module) -> Iterator[None]:
        """The twin, in training mode, with an attention that lets no token see another."""
        configs = own_configs(tried)
        before = [(config, attention_of(config)) for config in configs]
        if configs:
            from transformers import AttentionInterface, AttentionMaskInterface

            AttentionInterface.register(_NO_MIXING, _sees_itself)
            # Attention of a model's own may run with it.
            AttentionMaskInterface.register(_NO_MIXING, AttentionMaskInterface()["eager"])
            set_attention(configs, {}, _NO_MIXING)
        tried.train()
        try:
            yield
        finally:
            tried.eval()
            name_attention(before)

    def _longer(self, tried: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """(an input of more tokens, how many); the same again where the model takes none, as one with few positions."""
        length = _FAR_TOKENS
        while length > self.length:
            given = small_input(tried, length, device="cpu")
            try:
                with torch.no_grad():
                    if given is not None:
                        tried(**given)
                        return given, length
            except Exception as error:  # the model's own code
                log.debug("context parallel: not tried on %d tokens: %s", length, _first_line(error))
            length //= 2
        return inputs, self.length

    def _refuse_mixing(self, tried: nn.Module, inputs: Mapping[str, Any], length: int) -> None:
        """One token of ``length`` changes: the others have to come out as before."""
        tokens, place = _tokens_of(inputs), length // 3
        assert tokens is not None
        name, ids = tokens
        changed = ids.clone()
        if ids.is_floating_point():
            changed[:, place] += 1
        else:  # an id that stands elsewhere in the row
            lowest, highest = ids.amin(1), ids.amax(1)
            changed[:, place] = torch.where(ids[:, place] == highest, lowest, highest)
        others = [index for index in range(length) if index != place]

        def kept(tensor: Tensor) -> Tensor:
            by_token = _by_token(tensor, ids.size(0), length)
            return torch.zeros(()) if by_token is None else by_token[others]

        runs = []
        for given in (inputs, {**inputs, name: changed}):
            torch.manual_seed(0)
            try:
                runs.append(observed(tried, given, kept))
            except ConfigError:
                raise
            except Exception as error:
                what = f"{self.name} does not run where attention lets no token see another ({_first_line(error)})"
                raise self._refusal(f"{what}, so what else mixes tokens cannot be found", "cp_size=1") from error
        first, second = (run[-1].outputs for run in runs)
        if not first or first[0].dim() == 0:
            raise self._refusal(f"{self.name} returns nothing for each of a row's tokens", "a value for each token")
        if not any(differ(a, b, _SAME) for a, b in zip(first, second)):
            return
        where = parted(runs[0], runs[1], _SAME) or runs[0][-1]
        what = f"{where} mixes the tokens of a row, and not through the attention registry of transformers"
        raise self._refusal(f"{what}, so it would see this rank's tokens only", "cp_size=1, or another model")

    def _counts(self, tried: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[type, set[Site]], bool]:
        """Modules that count tokens where it shows, and whether they can count from far away."""
        tokens = _tokens_of(inputs)
        assert tokens is not None
        positions_BS = torch.arange(self.length).expand(tokens[1].size(0), -1)

        def fill(module: nn.Module, args: Any, kwargs: Any) -> Any:
            filled = kwargs.get("position_ids") is not None
            return (args, kwargs) if filled else with_positions(module, args, kwargs, positions_BS)

        def run() -> list[Tensor]:
            torch.manual_seed(0)
            modules = [module for module in tried.modules() if takes_tokens(module)]
            handles = [m.register_forward_pre_hook(fill, with_kwargs=True) for m in modules]
            try:
                with torch.no_grad():
                    return tensors_of(tried(**inputs))
            finally:
                for handle in handles:
                    handle.remove()

        try:
            found = counted_by(tried, self.length, run)
        except Exception as error:
            what = f"{self.name} does not run with the positions of its tokens ({_first_line(error)})"
            raise self._refusal(what, "cp_size=1") from error
        # Where transformers makes masks it counts too; those are replaced by rules.
        masks = getattr(sys.modules.get("transformers.masking_utils"), "__file__", None)
        found = {kind: {site for site in sites if site[0] != masks} for kind, sites in found.items()}
        matters: set[Site] = set()
        plain, far = run(), True
        for site in sorted(set().union(*found.values())):
            try:
                with counting_from(self.length, _FAR, {site}):
                    moved = run()
            except Exception:  # a table of positions ends before
                matters.add(site)
                far = False
                continue
            if any(differ(a, b) for a, b in zip(plain, moved)):
                matters.add(site)
        kinds = {kind: sites & matters for kind, sites in found.items()}
        return {kind: sites for kind, sites in kinds.items() if sites}, far

    def _compare(
        self, tried: nn.Module, inputs: Mapping[str, Any], counts: Mapping[type, set[Site]], far: bool
    ) -> None:
        """The twin on the ranks of the axis, against the plain one on whole rows; last, because it changes the twin."""
        sites = set().union(*counts.values())
        offsets = (0, _FAR) if sites and far else (0,)
        plain = []
        for offset in offsets:
            with counting_from(self.length, offset, sites):
                plain.append(observed(tried, inputs))
        tokens = _tokens_of(inputs)
        assert tokens is not None
        name, whole = tokens
        exchange = exchange_tokens(tried, self.mesh, counts)
        given = {**inputs, name: split_sequence(whole, self.mesh)}
        rows, length = whole.size(0), self.length // self.mesh.size()
        for offset, seen in zip(offsets, plain):
            try:
                with counting_from(length, offset, sites), torch.no_grad():
                    found = [_gathered(exchange, tensor, rows, length) for tensor in tensors_of(tried(**given))]
            except ConfigError:
                raise
            except Exception as error:
                what = f"{self.name} does not run on parts of a row ({_first_line(error)})"
                raise self._refusal(what, "cp_size=1") from error
            wanted = seen[-1].outputs
            wrong = len(found) != len(wanted) or any(a.shape != b.shape or differ(a, b) for a, b in zip(wanted, found))
            if not self._on_any_rank(wrong):
                continue
            with counting_from(length, offset, sites):
                other = observed(tried, given, lambda tensor: _gathered(exchange, tensor, rows, length))
            where = parted(seen, other) or seen[-1]
            what = f"{where} computes something else on parts of a row than on whole rows"
            raise self._refusal(what, "cp_size=1, or another model")

    def _on_any_rank(self, wrong: bool) -> bool:
        word = torch.tensor(wrong, dtype=torch.uint8, device=self.device)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self.mesh.get_group())
        return bool(word)


def _tokens_of(inputs: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The argument that holds a row's tokens, [B, S] or [B, S, width]."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name != "pixel_values" and value.dim() in (2, 3):
            return name, value
    return None


def _sees_itself(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Any = None,
    *,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention in which a token sees itself alone; it shows every change of what is told of a token."""
    if query_BHSD.size(2) != key_BKSD.size(2):
        raise NotImplementedError(f"attention from {query_BHSD.size(2)} to {key_BKSD.size(2)} tokens")
    groups = query_BHSD.size(1) // key_BKSD.size(1)
    key_BHSD, value_BHSD = (part.repeat_interleave(groups, 1) for part in (key_BKSD, value_BKSD))
    probe_D = torch.linspace(-1, 1, query_BHSD.size(-1), device=query_BHSD.device, dtype=query_BHSD.dtype)
    score = ((query_BHSD + 2 * key_BHSD) * probe_D).sum(-1, keepdim=True)
    for added in (attention_mask, position_bias):
        if isinstance(added, Tensor) and added.is_floating_point() and added.size(-1) == query_BHSD.size(2):
            own = added.expand(*added.shape[:-2], added.size(-1), -1).diagonal(dim1=-2, dim2=-1)
            score = score + own.unsqueeze(-1)
    return (value_BHSD * torch.sigmoid(score)).transpose(1, 2).contiguous(), None


def _by_token(tensor: Tensor, rows: int, length: int) -> Tensor | None:
    """[S, ...] of something that has a value for every token; None of anything else."""
    if tensor.shape[:2] == (rows, length):
        return tensor.transpose(0, 1)
    if tensor.dim() > 1 and tensor.size(0) == rows * length:
        return tensor.unflatten(0, (rows, length)).transpose(0, 1)
    return None


def _gathered(exchange: Exchange, tensor: Tensor, rows: int, length: int) -> Tensor:
    """The tensor for the whole row, where it has a value for every token of a rank."""
    if tensor.dtype == torch.bool:
        return _gathered(exchange, tensor.to(torch.uint8), rows, length).to(torch.bool)
    if tensor.shape[:2] == (rows, length):
        return exchange.whole(tensor, 1)
    if tensor.dim() > 1 and tensor.size(0) == rows * length:
        return exchange.whole(tensor.unflatten(0, (rows, length)), 1).flatten(0, 1)
    if tensor.dim() == 4 and tensor.size(2) == length:  # [B, H, L, D]
        return exchange.whole(tensor, 2)
    return tensor


def _first_line(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
