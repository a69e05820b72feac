"""Whether context parallelism is right for a model: known of its family, or found out on a twin of it.

Three things can be wrong, and each is looked for:

- something beside the exchanged attention mixes tokens: a recurrence, a convolution, an attention that does not go
  through transformers' registry, pooling, statistics of a batch. In a twin whose registered attention mixes nothing,
  one token is changed: what every other token comes to must stay as it is.
- a module counts the tokens by itself, so that a rank would count its own: in the same twin, every torch.arange over
  as many numbers as there are tokens starts later. A module where that shows is given positions in the whole row.
- anything else: the twin is run on the ranks of the axis, each with its part of the rows, and what it returns has to
  be what the plain twin returns for whole rows.

The module where one of them shows is run on whole rows (whole_rows.py), and the model tried again, its gradients too;
where that does not help, the modules around it are, as long as some blocks of the model are still split.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
from typing import Any, Collection, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.trial import (
    differ,
    first_line,
    keep_generators,
    observed,
    parted,
    small_input,
    tensors_of,
    twin,
)
from nemo_dist_conf.runtime.techniques.context.exchange import Exchange
from nemo_dist_conf.runtime.techniques.context.parallel import (
    Ways,
    exchange_tokens,
    own_configs,
    set_attention,
    split_sequence,
    takes_tokens,
    with_positions,
)
from nemo_dist_conf.runtime.techniques.context.position_counts import Site, counted_by, counting_from
from nemo_dist_conf.runtime.techniques.context.trial_runs import (
    Unmixed,
    by_token,
    gathered,
    gradients_differ,
    gradients_of,
    sees_itself,
    tokens_of,
    watched,
)
from nemo_dist_conf.runtime.techniques.context.whole_rows import TokenDims, token_dims
from nemo_dist_conf.runtime.torch_inside import attention_of, is_hooked, name_attention, names_attention
from nemo_dist_conf.schema.context import MASKLESS

__all__ = ["try_context_parallel", "ways_on_paper"]

log = logging.getLogger(__name__)

#: A row on which mixing is looked for once more, because some mix over a distance only: dilated convolutions, blocks.
_FAR_TOKENS = 256
#: Positions that a trained model hardly reaches: what changes at some length has changed there.
_FAR = 1_000_000
#: A token that nothing mixes into another leaves it as it was, but for experts that compute other groups of tokens.
_SAME = 1e-5
_NO_MIXING = "nemo_dist_conf_no_mixing"
#: Modules that cannot be told of by the tokens that they are given.
_HOLDS_NO_TOKENS = ("torch.nn.modules.linear", "torch.nn.modules.sparse", "torch.nn.modules.normalization")


def try_context_parallel(
    model: nn.Module, mesh: DeviceMesh, blocks: Blocks | None = None, method: str = "auto", tp: int = 1
) -> Ways:
    """What is to be done to which modules of the model, for ``apply_context_parallel``.

    model: plain, on meta or not; nothing of it changes. mesh: the axis cp; every rank of it calls this.
    method: as ``context.method`` says. tp: ranks over which heads will be split.
    Raises ConfigError, on every rank, for a model that would compute something else, or cannot have this method.
    """
    if _is_known(model):
        _refuse_heads_of_family(model, Exchange(mesh, method, tp))
        return Ways()
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    trial = _Trial(model, mesh, find_blocks(model) if blocks is None else blocks, device, method, tp)
    with keep_generators():
        return trial.run()


def ways_on_paper(model: nn.Module, size: int, blocks: Blocks) -> Ways:
    """What ``try_context_parallel`` would find, as far as one process can tell.

    It does not run the model on parts of rows, in which more may show. model: plain, on meta or not; nothing of it
    changes. size: ranks along cp. Raises ConfigError for a model that would be refused.
    """
    if _is_known(model):
        return Ways()
    with keep_generators():
        return _Trial(model, None, blocks, torch.device("cpu"), size=size).run()


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


def _refuse_heads_of_family(model: nn.Module, exchange: Exchange) -> None:
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    exchange.by_heads(type(model), heads, kv_heads, has_bias=False)


def _is_kernel(attention: str | None) -> bool:
    """Whether this is one of transformers' attentions that compute what ``eager`` does, on a GPU in half precision."""
    return attention is not None and (attention.startswith(MASKLESS) or "/" in attention)


class _Fault(Exception):
    """What is wrong with a model on parts of rows, and the name of the module where it shows."""

    def __init__(self, refusal: ConfigError, place: str) -> None:
        super().__init__(refusal)
        self.refusal, self.place = refusal, place


class _Trial:
    """The trial of one model, on rows of ``length`` tokens. mesh None: on one process, without parts of rows."""

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | None,
        blocks: Blocks,
        device: torch.device,
        method: str = "auto",
        tp: int = 1,
        size: int = 1,
    ) -> None:
        self.model, self.mesh, self.blocks, self.device = model, mesh, blocks, device
        self.method, self.tp = method, tp
        self.size = size if mesh is None else mesh.size()
        self.length = 2 * self.size * max(1, 8 // self.size)
        self.name = type(model).__name__
        self.local: tuple[nn.Module, dict[str, Any]] | None = None

    def run(self) -> Ways:
        whole: dict[type, TokenDims] = {}
        faults: list[_Fault] = []
        while True:
            try:
                ways = self._tried(whole)
                break
            except _Fault as fault:
                faults.append(self._agreed(fault))
                reason = self._run_on_whole_rows(faults[-1].place, whole)
                if reason is not None:
                    raise self._of_all(faults, reason) from fault.__cause__
        self._refuse_maskless(ways)
        counts, rows = (
            ", ".join(sorted(kind.__name__ for kind in kinds)) or "none" for kinds in (ways.counts, ways.whole_rows)
        )
        text = "context parallel: tried on %d tokens; modules that count positions: %s; that are run on whole rows: %s"
        log.info(text, self.length, counts, rows)
        return ways

    def _tried(self, whole: dict[type, TokenDims]) -> Ways:
        """What was found, with these modules run on whole rows. Raises _Fault."""
        local, inputs = self.local = self.local or self._twin(torch.device("cpu"))
        fills = self._fills(local, inputs)
        longer, far_length = self._longer(local, inputs)
        attended: set[tuple[type, int, int]] = set()
        with self._without_mixing(local, whole, attended) as unmixed:
            self._find_mixing(local, inputs, self.length, unmixed)
            self._find_mixing(local, longer, far_length, unmixed)
            counts, far = self._counts(local, (inputs, longer), whole, fills)
        if self.mesh is not None:
            self._refuse_method(attended, self.mesh)
        ways = Ways(counts, dict(whole), fills)
        if self.mesh is not None:
            if self.device.type != "cpu":
                local, inputs = self._twin(self.device)
            else:
                self.local = None  # it is changed
            self._compare(local, inputs, ways, far, self.mesh)
        return dataclasses.replace(ways, whole_rows=self._outermost(whole))

    def _agreed(self, fault: _Fault) -> _Fault:
        """The same on all ranks: of what they found, the last in the model, because one may see less than another."""
        if self.mesh is None:
            return fault
        names = [name for name, _ in self.model.named_modules()]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (names.index(fault.place), fault.refusal), group=self.mesh.get_group())
        number, refusal = max(found, key=lambda each: each[0])
        return _Fault(refusal, names[number])

    def _of_all(self, faults: list[_Fault], reason: str) -> ConfigError:
        """The refusal of the first fault, with what came of running modules on whole rows."""
        problem = faults[0].refusal.problems[0]
        what = problem.what
        if len(faults) > 1:
            last = faults[-1].refusal.problems[0].what.removeprefix(f"cp_size={self.size}: ")
            what = f"{what}; with what it is in run on whole rows, {last}"
        if reason:
            what = f"{what} ({reason})"
        return ConfigError(dataclasses.replace(problem, what=what))

    def _run_on_whole_rows(self, place: str, whole: dict[type, TokenDims]) -> str | None:
        """Add to ``whole`` the module at this place, or the next one around it; why not, if that cannot be."""
        names, why = place.split("."), ""
        for count in range(len(names), 0, -1):
            name = ".".join(names[:count])
            module = self.model.get_submodule(name)
            if not name or any(block.startswith(f"{name}.") for block in self.blocks):
                return why
            kind = type(module)
            if name in self.blocks and {type(block) for block in self.blocks.values()} <= {kind, *whole}:
                return why  # nothing of the model would be split
            if kind in whole or kind.__module__.startswith(_HOLDS_NO_TOKENS):
                continue
            try:
                whole[kind] = self._token_dims(kind)
                return None
            except ConfigError:
                raise
            except Exception as error:  # also the model's own
                why = why or first_line(error)
        return why

    def _token_dims(self, kind: type) -> TokenDims:
        local, inputs = self.local = self.local or self._twin(torch.device("cpu"))
        longer, far_length = self._longer(local, inputs)
        if far_length == self.length:
            longer, far_length = small_input(local, self.length // 2, device="cpu") or {}, self.length // 2
        fills = self._fills(local, inputs)
        runs = {
            length: functools.partial(self._outputs, local, given, fills)
            for length, given in ((self.length, inputs), (far_length, longer))
        }
        tokens = tokens_of(inputs)
        assert tokens is not None
        return token_dims(local, kind, runs, tokens[1].size(0))

    def _outermost(self, whole: Mapping[type, TokenDims]) -> dict[type, TokenDims]:
        """Without the classes whose modules are all inside of others that are run on whole rows."""
        names = {name: type(module) for name, module in self.model.named_modules() if type(module) in whole}
        outer = {
            kind for name, kind in names.items() if not any(name.startswith(f"{other}.") for other in names if other)
        }
        return {kind: dims for kind, dims in whole.items() if kind in outer}

    def _refusal(self, what: str, allowed: str) -> ConfigError:
        asked = f"parallelism.cp_size={self.size}"
        return ConfigError(
            Problem(
                what=f"cp_size={self.size}: {what}",
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
                if inputs is None or tokens_of(inputs) is None:
                    what = f"nobody says what {self.name} takes, so what it does to the tokens of a row cannot be tried"
                    raise self._refusal(what, "cp_size=1, or a model of token ids")
                with torch.no_grad():
                    tried(**inputs)
                return tried, inputs
            except ConfigError:
                raise
            except Exception as error:  # the model's own code
                failure = failure or error
        what = f"{self.name} does not run on {self.length} tokens ({first_line(failure)})"
        raise self._refusal(f"{what}, so what it does to the tokens of a row cannot be tried", "cp_size=1")

    @contextlib.contextmanager
    def _without_mixing(
        self, tried: nn.Module, whole: Mapping[type, TokenDims], attended: set[tuple[type, int, int]]
    ) -> Iterator[list[Unmixed]]:
        """The twin, in training mode, with an attention that lets no token see another.

        attended: gets the class and the heads, of queries and of keys, of what asks for an attention.
        Yields what stands for the forwards of the modules that are to be run on whole rows.
        """
        configs = own_configs(tried, whole)
        before = [(config, attention_of(config)) for config in configs]
        if configs:
            from transformers import AttentionInterface, AttentionMaskInterface

            AttentionInterface.register(_NO_MIXING, functools.partial(sees_itself, attended))
            # Attention of a model's own may run with it.
            AttentionMaskInterface.register(_NO_MIXING, AttentionMaskInterface()["eager"])
            set_attention(configs, {}, _NO_MIXING)
        apart = [(module, vars(module).get("forward")) for module in tried.modules() if type(module) in whole]
        unmixed = [Unmixed(module.forward, whole[type(module)]) for module, _ in apart]
        for (module, _), forward in zip(apart, unmixed):
            module.forward = forward
        tried.train()
        try:
            yield unmixed
        finally:
            tried.eval()
            name_attention(before)
            for module, own in apart:
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def _refuse_method(self, attended: Collection[tuple[type, int, int]], mesh: DeviceMesh) -> None:
        """Where ulysses is asked for and an attention has too few heads, or nothing attends that it could serve."""
        if self.method != "ulysses":
            return
        if not attended:
            what = f"context.method=ulysses: nothing of {self.name} asks the attention registry of transformers"
            asked = f"context.method=ulysses parallelism.cp_size={self.size}"
            allowed = "context.method=gather: what mixes tokens in it is run on whole rows"
            raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="context.method=gather"))
        exchange = Exchange(mesh, self.method, self.tp)
        for kind, heads, kv_heads in sorted(attended, key=str):
            exchange.by_heads(kind, heads, kv_heads, has_bias=False)

    def _refuse_maskless(self, ways: Ways) -> None:
        """Where what is run on whole rows is given masks of queries and keys, and asks for an attention without."""
        masked = [kind for kind, dims in ways.whole_rows.items() if any(len(d) == 2 for d in dims.given.values())]
        for name, module in self.model.named_modules():
            if type(module) not in masked:
                continue
            values = [value for inner in module.modules() for value in vars(inner).values()]
            kernels = {attention_of(value) for value in values if names_attention(value)}
            for kernel in sorted(filter(_is_kernel, kernels), key=str):
                what = f"{name} ({type(module).__name__}) is run on whole rows, with a mask that {kernel} does not take"
                asked = f"attn_implementation={kernel} with parallelism.cp_size={self.size}"
                allowed, instead = "attn_implementation=eager, or cp_size=1", "parallelism.cp_size=1"
                raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead=instead))

    def _outputs(self, tried: nn.Module, inputs: Mapping[str, Any], fills: bool) -> list[Tensor]:
        """What the twin returns; fills: given the positions of its tokens, as a rank's part of a row is."""
        tokens = tokens_of(inputs)
        assert tokens is not None
        positions_BS = torch.arange(tokens[1].size(1)).expand(tokens[1].size(0), -1)

        def fill(module: nn.Module, args: Any, kwargs: Any) -> Any:
            filled = kwargs.get("position_ids") is not None
            return (args, kwargs) if filled else with_positions(module, args, kwargs, positions_BS)

        torch.manual_seed(0)
        modules = [module for module in tried.modules() if fills and takes_tokens(module)]
        handles = [m.register_forward_pre_hook(fill, with_kwargs=True) for m in modules]
        try:
            with torch.no_grad():
                return tensors_of(tried(**inputs))
        finally:
            for handle in handles:
                handle.remove()

    def _fills(self, tried: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether positions from 0 are what the model takes where it is given none."""
        plain = self._outputs(tried, inputs, False)
        try:
            filled = self._outputs(tried, inputs, True)
        except Exception as error:  # the model's own code
            log.debug("context parallel: %s is given no positions: %s", self.name, first_line(error))
            return False
        return len(plain) == len(filled) and not any(
            one.shape != other.shape or differ(one, other) for one, other in zip(plain, filled)
        )

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
                log.debug("context parallel: not tried on %d tokens: %s", length, first_line(error))
            length //= 2
        return inputs, self.length

    def _find_mixing(
        self, tried: nn.Module, inputs: Mapping[str, Any], length: int, unmixed: Collection[Unmixed]
    ) -> None:
        """One token of ``length`` changes: the others have to come out as before. Raises _Fault."""
        tokens, place = tokens_of(inputs), length // 3
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
            of_tokens = by_token(tensor, ids.size(0), length)
            return torch.zeros(()) if of_tokens is None else of_tokens[others]

        runs = []
        for number, given in enumerate((inputs, {**inputs, name: changed})):
            torch.manual_seed(0)
            for forward in unmixed:
                forward.start(None if number == 0 else (ids.size(0), length, place))
            with watched(tried) as running:
                try:
                    runs.append(observed(tried, given, kept))
                except Exception as error:
                    what = f"{self.name} does not run where attention lets no token see another ({first_line(error)})"
                    refusal = self._refusal(f"{what}, so what else mixes tokens cannot be found", "cp_size=1")
                    raise _Fault(refusal, running[-1] if running else "") from error
        for forward in unmixed:
            forward.stop()
        first, second = (run[-1].outputs for run in runs)
        if not first or first[0].dim() == 0:
            raise self._refusal(f"{self.name} returns nothing for each of a row's tokens", "a value for each token")
        if not any(differ(a, b, _SAME) for a, b in zip(first, second)):
            return
        where = parted(runs[0], runs[1], _SAME) or runs[0][-1]
        what = f"{where} mixes the tokens of a row, and not through the attention registry of transformers"
        refusal = self._refusal(f"{what}, so it would see this rank's tokens only", "cp_size=1, or another model")
        raise _Fault(refusal, where.module)

    def _counts(
        self,
        tried: nn.Module,
        inputs: tuple[Mapping[str, Any], Mapping[str, Any]],
        whole: Collection[type],
        fills: bool,
    ) -> tuple[dict[type, set[Site]], bool]:
        """Modules that count tokens where it shows, and whether they can count from far away.

        inputs: for rows of ``self.length`` tokens, and longer ones.
        """
        run = functools.partial(self._outputs, tried, fills=fills)
        by_length = []
        for given in inputs:
            tokens = tokens_of(given)
            assert tokens is not None
            try:
                by_length.append(counted_by(tried, tokens[1].size(1), functools.partial(run, given), whole))
            except Exception as error:
                what = f"{self.name} does not run with the positions of its tokens ({first_line(error)})"
                raise self._refusal(what, "cp_size=1") from error
        found, longer = by_length
        # Where transformers makes masks it counts too; those are replaced by rules.
        masks = getattr(sys.modules.get("transformers.masking_utils"), "__file__", None)
        found = {kind: {site for site in sites if site[0] != masks} for kind, sites in found.items()}
        everywhere = set().union(*longer.values())
        matters: set[Site] = set()
        plain, far = run(inputs[0]), True
        for site in sorted(set().union(*found.values())):
            if site[2] == "cumsum":  # taken over the whole row, it is right whether or not it shows
                if site in everywhere:
                    matters.add(site)
                continue
            try:
                with counting_from(self.length, _FAR, {site}):
                    moved = run(inputs[0])
                with counting_from(self.length, self.length, {site}, only_late=True):
                    torn = run(inputs[0])
            except Exception:  # a table of positions ends before
                matters.add(site)
                far = False
                continue
            if any(differ(a, b) for other in (moved, torn) for a, b in zip(plain, other)):
                matters.add(site)
        kinds = {kind: sites & matters for kind, sites in found.items()}
        return {kind: sites for kind, sites in kinds.items() if sites}, far

    def _compare(self, tried: nn.Module, inputs: Mapping[str, Any], ways: Ways, far: bool, mesh: DeviceMesh) -> None:
        """The twin on the ranks of the axis, against the plain one on whole rows; last, because it changes the twin.

        Raises _Fault where they differ.
        """
        sites = set().union(*ways.counts.values())
        offsets = (0, _FAR) if any(site[2] == "arange" for site in sites) and far else (0,)
        plain = []
        for offset in offsets:
            with counting_from(self.length, offset, sites):
                plain.append(observed(tried, inputs))
        tokens = tokens_of(inputs)
        assert tokens is not None
        name, whole = tokens
        rows, length = whole.size(0), self.length // mesh.size()
        wanted_gradients: list[Tensor] = []
        if ways.whole_rows:
            with self._running(tried):
                wanted_gradients = gradients_of(tried, inputs, rows, self.length)
        exchange = exchange_tokens(tried, mesh, ways, self.method, self.tp)
        given = {**inputs, name: split_sequence(whole, mesh)}
        for offset, seen in zip(offsets, plain):
            with counting_from(length, offset, sites), torch.no_grad(), self._running(tried):
                found = [gathered(exchange, tensor, rows, length) for tensor in tensors_of(tried(**given))]
            wanted = seen[-1].outputs
            wrong = len(found) != len(wanted) or any(a.shape != b.shape or differ(a, b) for a, b in zip(wanted, found))
            if not self._on_any_rank(wrong, mesh):
                continue
            with counting_from(length, offset, sites):
                other = observed(tried, given, lambda tensor: gathered(exchange, tensor, rows, length))
            where = parted(seen, other) or seen[-1]
            what = f"{where} computes something else on parts of a row than on whole rows"
            raise _Fault(self._refusal(what, "cp_size=1, or another model"), where.module)
        if ways.whole_rows:
            with self._running(tried):
                gradients = gradients_of(tried, given, rows, length, exchange)
            for gradient in gradients:
                dist.all_reduce(gradient, group=mesh.get_group())
            if self._on_any_rank(gradients_differ(wanted_gradients, gradients), mesh):
                kinds = ", ".join(sorted(kind.__name__ for kind in ways.whole_rows))
                what = (
                    f"{self.name} has other gradients on parts of a row than on whole rows, with {kinds} on whole ones"
                )
                raise self._refusal(what, "cp_size=1, or another model")

    @contextlib.contextmanager
    def _running(self, tried: nn.Module) -> Iterator[None]:
        """What does not run on parts of a row is a _Fault of the module that was running."""
        with watched(tried) as running:
            try:
                yield
            except Exception as error:
                refusal = error if isinstance(error, ConfigError) else None
                if refusal is None:
                    what = f"{self.name} does not run on parts of a row ({first_line(error)})"
                    refusal = self._refusal(what, "cp_size=1")
                raise _Fault(refusal, running[-1] if running else "") from error

    def _on_any_rank(self, wrong: bool, mesh: DeviceMesh) -> bool:
        word = torch.tensor(wrong, dtype=torch.uint8, device=self.device)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=mesh.get_group())
        return bool(word)
