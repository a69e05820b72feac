"""A tiny model trained through the hook on any layout, and the single process that every layout must equal.

Shapes: B rows of the global batch, S tokens of a sequence, V ids of the vocabulary.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hydra import compose, initialize
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist_conf.composition.sections import SECTIONS
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.distributed_setup import DistributedSetup
from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline

__all__ = [
    "ADAMW",
    "FEWER_STEPS",
    "LLAMA",
    "MAX_NORM",
    "MODELS",
    "Net",
    "Operators",
    "ROWS",
    "SGD",
    "STEPS",
    "Trajectory",
    "batch",
    "composed",
    "full_gradients",
    "full_state",
    "full_tensor",
    "plain_model",
    "single_process",
    "take_plain_steps",
    "take_steps",
    "train",
]

#: An odd vocabulary and 15 tokens: nothing divides evenly but what must.
VOCABULARY = 97
TOKENS = 15
#: Four data ranks with four microbatches each have one row a microbatch.
ROWS = 16

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "use_cache": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"config": LLAMA},
    "tied": {"config": {**LLAMA, "tie_word_embeddings": True}},
    # FSDP2 shards its embedding and head in units of their own.
    "wide": {"config": {**LLAMA, "vocab_size": 4096}},
    "module": {"_target_": "tests.dist.layouts.Net"},
}
#: eps: at the default 1e-8 Adam makes full steps out of gradients that are rounding errors.
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "decay_1d": True}
#: Adam divides a wrong scale of the gradients away; this one does not.
SGD: dict[str, Any] = {"name": "sgd", "lr": 1.0, "momentum": 0.9}
#: Below every norm of these models, so that clipping always scales.
MAX_NORM = 0.25
STEPS = 5
#: Of options of what the matrix of layouts (matrix.py) and test_parity.py run for five.
FEWER_STEPS = 3


class Block(nn.Module):
    """A residual block of a user's own model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return x_BSH + self.down(F.silu(self.up(self.norm(x_BSH))))


class Net(nn.Module):
    """A user's own model: ids in, a plain tensor of logits out; nothing says where its blocks are."""

    def __init__(self, width: int = 32, depth: int = 3, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed(ids_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(x_BSH)


#: What a word chooses a file of; the keys of all other words are values.
_GROUPS = ("strategy", *SECTIONS)


@functools.cache
def choice_of(words: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize(version_base=None, config_path=None):
        return compose("nemo_dist_conf", overrides=list(words))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Hydra takes 0.3 s for the groups and sets the values last, so the groups are composed once for each choice."""
    chosen = tuple(word for word in overrides if word.partition("=")[0] in _GROUPS)
    cfg = copy.deepcopy(choice_of(chosen))
    values = OverridesParser.create().parse_overrides([word for word in overrides if word not in chosen])
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    tree = OmegaConf.to_container(cfg)
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


def composed(*overrides: str, **nodes: Any) -> DictConfig:
    """What Hydra composes from the base config and these overrides, with the app's own nodes (model, optimizer)."""
    return OmegaConf.create({**_composed(overrides), **nodes})


def batch(length: int = TOKENS) -> tuple[Tensor, Tensor]:
    """(ids [B, S], labels [B, S]) of every step's global batch; rows have between S and S - 4 labels that count."""
    ids_BT = torch.randint(VOCABULARY, (ROWS, length + 1), generator=torch.Generator().manual_seed(0))
    labels_BS = ids_BT[:, 1:].clone()
    for row in range(ROWS):
        labels_BS[row, : row % 5] = -100
    return ids_BT[:, :-1], labels_BS


def loss_sum(model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    output = model(ids_BS)
    logits_BSV = getattr(output, "logits", output)
    if isinstance(logits_BSV, DTensor):
        logits_BSV = logits_BSV.full_tensor()
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, however it is sharded. A collective."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer in full, by the name that it has in the unwrapped model."""
    return over_stages(
        model, {name.removeprefix("module."): full_tensor(value) for name, value in model.state_dict().items()}
    )


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient in full, by the name that it has in the unwrapped model."""
    found = {
        name.removeprefix("module."): full_tensor(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return over_stages(model, found)


def over_stages(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the stages of all pipeline ranks have, each name from the rank that holds it; any other model as it is."""
    if not isinstance(model, Pipeline):
        return found
    everywhere: list[Any] = [None] * model.pp_mesh.size()
    dist.all_gather_object(everywhere, found, group=model.pp_mesh.get_group())
    return {name: value for rank in everywhere for name, value in rank.items()}


@dataclass
class Trajectory:
    """losses and norms: one a step. weights: before the first step. gradients: of the first step, before clipping.

    weights and gradients are whole, by name, where they were asked for.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def train(
    cfg: DictConfig, microbatches: int = 1, steps: int = STEPS, whole: bool = False, length: int = TOKENS
) -> Trajectory:
    """Steps on this rank as a user writes them: the hook, ``accumulate`` and ``clip_grad_norm_``.

    length: tokens of a row. whole: also gather weights and gradients, which takes longer than the steps; only rank 0's
    travel back.
    """
    return take_steps(*instantiate(cfg), microbatches, steps, whole, length)


def take_steps(
    setup: DistributedSetup, model: Any, optimizer: Any, microbatches: int, steps: int, whole: bool, length: int
) -> Trajectory:
    """``train`` with what the hook has returned."""
    context = setup.mesh_context
    weights = full_state(model) if whole else {}
    gradients: dict[str, Tensor] = {}
    seen = Trajectory()
    for step in range(steps):
        everything = batch(length)
        rows_of_rank = (part.chunk(context.data_size)[context.data_rank] for part in everything)
        ids_BS, labels_BS = context.split_sequence(*rows_of_rank)
        tokens = int((everything[1] != -100).sum())
        total = torch.zeros((), dtype=torch.float64)
        rows = len(ids_BS) // microbatches
        for index in range(microbatches):
            part = slice(index * rows, (index + 1) * rows)
            if isinstance(model, Pipeline):
                mean = model.microbatches if model.scales_gradients else 1
                total += mean * model.step(ids_BS[part], labels_BS[part], mean * context.gradient_size / tokens)
                continue
            with accumulate(model, last=index == microbatches - 1):
                loss = loss_sum(model, ids_BS[part], labels_BS[part])
                (loss * context.gradient_size / tokens).backward()
            total += loss.detach()
        if step == 0 and whole:
            gradients = full_gradients(model)
        seen.losses.append(float(context.sum_over_data(total)) / tokens)
        seen.norms.append(float(clip_grad_norm_(model, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        seen.weights, seen.gradients = weights, gradients
    return seen


def plain_model(kind: str | dict[str, Any]) -> nn.Module:
    """The model of ``MODELS``, of a class (``_target_``) or of a transformers config, as it is built without us."""
    if kind == "module":
        return Net()
    if isinstance(kind, dict) and "_target_" in kind:
        return hydra_instantiate(kind)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = kind if isinstance(kind, dict) else MODELS[kind]["config"]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)


def single_process(
    kind: str | dict[str, Any], optimizer: dict[str, Any], weights: dict[str, Tensor], length: int = TOKENS
) -> Trajectory:
    """What every layout must reproduce: plain torch on the whole batch, nothing of ours but the initial weights."""
    model = plain_model(kind)
    model.load_state_dict(weights)
    seen = take_plain_steps(model, optimizer, STEPS, length)
    seen.weights = weights
    return seen


def take_plain_steps(
    model: nn.Module, optimizer: dict[str, Any], steps: int, length: int, microbatches: int = 1
) -> Trajectory:
    """``single_process`` with its model, which is trained in place."""
    options = {key: value for key, value in optimizer.items() if key not in ("name", "decay_1d")}
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    update = kinds[optimizer["name"]](model.parameters(), **options)
    seen = Trajectory()
    for step in range(steps):
        whole = batch(length)
        tokens, total = (whole[1] != -100).sum(), torch.zeros(())
        for ids_BS, labels_BS in zip(*(part.chunk(microbatches) for part in whole)):
            loss = loss_sum(model, ids_BS, labels_BS) / tokens
            loss.backward()
            total += loss.detach()
        if step == 0:
            seen.gradients = full_gradients(model)
        seen.losses.append(float(total))
        seen.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        update.step()
        update.zero_grad()
    return seen


class Operators(TorchDispatchMode):
    """Every operator that runs inside, as (its name, dtype of its first tensor), in ``calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        self.calls.append((str(func), tensors[0].dtype if tensors else None))
        return func(*args, **(kwargs or {}))

    def count(self, *words: str) -> int:
        """Calls of operators whose name holds one of the words."""
        return sum(any(word in name for word in words) for name, _ in self.calls)

    def dtypes(self, word: str) -> set[torch.dtype | None]:
        return {dtype for name, dtype in self.calls if word in name}
