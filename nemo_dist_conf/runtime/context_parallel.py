"""Context parallelism: each rank holds a part of every sequence, and attention sees the keys and values of all.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, H heads, K key/value heads, D head width.

A sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r. Under a causal mask every rank then has
the same work (Llama 3, arXiv:2407.21783, section 3.3.2). Keys and values are gathered over the cp ranks and their
gradients scattered back, which runs on NCCL and gloo alike; torch's own ring attention runs on CUDA only.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["apply_context_parallel", "local_positions", "split_sequence"]

#: Groups over which a sequence was split: a model that gets whole rows would take them for parts of longer ones.
_split_over: set[str] = set()

log = logging.getLogger(__name__)

#: torch 2.13 renamed it; the old name warns there, the new one is unknown to torch 2.11.
_all_gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd


def split_sequence(tensor: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """This rank's chunks of a whole sequence along ``dim``. mesh: the axis cp. [B, S] -> [B, L].

    Raises ConfigError where the tokens do not split into 2 * cp equal chunks.
    """
    _split_over.add(mesh.get_group().group_name)
    length = tensor.size(dim)
    _check_length(length, mesh.size())
    positions = local_positions(length // mesh.size(), mesh, tensor.device)
    return tensor.index_select(dim, positions)


def local_positions(length: int, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Positions in the whole sequence of this rank's ``length`` tokens, [L] int64."""
    chunk = length // 2
    first, last = _chunks(mesh.get_local_rank(), mesh.size())
    steps = torch.arange(chunk, device=device)
    return torch.cat([first * chunk + steps, last * chunk + steps])


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let a transformers model attend over the sequence parts of all ranks of ``mesh``, the axis cp; in place.

    Its forward then takes this rank's tokens [B, L]; position ids that are not given are filled in.
    Raises ConfigError for a model whose attention cannot be exchanged.
    """
    if not hasattr(model, "set_attn_implementation"):
        what = f"cp_size={mesh.size()}: the attention of {type(model).__name__} cannot be exchanged"
        asked, allowed = f"parallelism.cp_size={mesh.size()}", "cp_size=1, or a model of transformers"
        raise ConfigError(Problem(what, asked, allowed, "parallelism.cp_size=1"))
    from transformers import AttentionInterface

    name = f"nemo_dist_conf_context_{mesh.get_group().group_name}"
    AttentionInterface.register(name, functools.partial(_attention, mesh))
    model.set_attn_implementation(name)  # type: ignore[operator]
    _split_over.discard(mesh.get_group().group_name)
    model.register_forward_pre_hook(functools.partial(_fill_positions, mesh), with_kwargs=True)
    log.info("context parallel over %d ranks", mesh.size())


def _chunks(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _check_length(length: int, size: int) -> None:
    if length % (2 * size):
        near = max(2 * size, round(length / (2 * size)) * 2 * size)
        what = f"cp_size={size} splits a sequence into {2 * size} equal chunks, and {length} tokens do not split so"
        raise ConfigError(Problem(what, f"{length} tokens", f"a multiple of {2 * size} tokens", f"{near} tokens"))


def _fill_positions(mesh: DeviceMesh, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Without them the model would count this rank's tokens from 0."""
    if kwargs.get("attention_mask") is not None:
        raise ConfigError(
            Problem(
                "an attention mask cannot be split over the sequence",
                f"attention_mask with parallelism.cp_size={mesh.size()}",
                "rows padded at their end with label -100: causal attention never looks there",
                "attention_mask=None",
            )
        )
    if kwargs.get("position_ids") is None:
        if mesh.get_group().group_name not in _split_over:
            raise ConfigError(
                Problem(
                    "the model was given rows that were not split over the cp ranks",
                    f"model(input_ids) with parallelism.cp_size={mesh.size()}",
                    "this rank's part of each row: mesh_context.split_sequence(input_ids, labels)",
                    "parallelism.cp_size=1",
                )
            )
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if tokens is not None:
            positions = local_positions(tokens.size(1), mesh, tokens.device)
            kwargs["position_ids"] = positions.expand(tokens.size(0), -1)
    return args, kwargs


def _attention(
    mesh: DeviceMesh,
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' registry: causal, over the whole sequence. [B, L, H, D]."""
    size, chunk = mesh.size(), query_BHLD.size(2) // 2
    key_BKSD, value_BKSD = (_whole(part, mesh) for part in (key_BKLD, value_BKLD))
    outputs = []
    for index, query in zip(_chunks(mesh.get_local_rank(), size), query_BHLD.chunk(2, dim=2)):
        end = (index + 1) * chunk
        outputs.append(
            F.scaled_dot_product_attention(
                query,
                key_BKSD[:, :, :end],
                value_BKSD[:, :, :end],
                attn_mask=_mask(chunk, end, sliding_window, query.device),
                dropout_p=dropout if module.training else 0.0,
                scale=scaling,
                enable_gqa=query.size(1) != key_BKSD.size(1),
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _whole(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, K, L, D] of every rank -> [B, K, S, D] in the order of the sequence."""
    gathered = _all_gather(part.contiguous(), 2, mesh.get_group())
    chunks = gathered.chunk(2 * mesh.size(), dim=2)
    # Rank r's two chunks stand at 2r and 2r + 1.
    held = [index for rank in range(mesh.size()) for index in _chunks(rank, mesh.size())]
    return torch.cat([chunks[held.index(index)] for index in range(len(held))], dim=2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where a query may look: the queries are the last of the keys."""
    query_positions = torch.arange(keys - queries, keys, device=device)[:, None]
    key_positions = torch.arange(keys, device=device)
    seen = key_positions <= query_positions
    return seen if window is None else seen & (query_positions - key_positions < window)
