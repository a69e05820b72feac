"""One gradient norm for every layout: torch's on plain parameters, the whole model's where they are sharded."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from tests.dist.layouts import Operators, full_tensor
from tests.dist.pool import run_ranks


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> nn.Parameter:
    found = nn.Parameter(torch.zeros(shape, dtype=dtype))
    found.grad = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    return found


def parameters(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[nn.Parameter]:
    shapes = ((3, 5), (7,), (), (2, 3, 4))
    return [parameter(*shape, seed=seed, dtype=dtype, scale=scale) for seed, shape in enumerate(shapes)]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_plain_parameters_are_clipped_as_by_torch(max_norm: float, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    norm = clip_grad_norm_(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-6
    assert float(norm) == pytest.approx(float(expected), rel=tolerance)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == dtype  # type: ignore[union-attr]
        torch.testing.assert_close(mine.grad, other.grad, rtol=tolerance, atol=tolerance)


def test_complex_gradients_are_clipped_as_by_torch() -> None:
    ours, theirs = ([parameter(3, 5), parameter(7, dtype=torch.complex64)] for _ in range(2))
    for parameters_ in (ours, theirs):
        parameters_[1].grad = torch.full((7,), 3 + 4j)
    norm = clip_grad_norm_(ours, 1.0)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 1.0)), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_norm_of_low_precision_gradients_is_computed_in_float32() -> None:
    """In float16 the square of 300 overflows, and 4096 small ones do not add up."""
    large = [parameter(4, dtype=torch.float16, scale=3e4)]
    expected = large[0].grad.double().norm()  # type: ignore[union-attr]
    assert float(clip_grad_norm_(large, None)) == pytest.approx(float(expected), rel=1e-3)
    many = [parameter(1, seed=seed, dtype=torch.bfloat16) for seed in range(512)]
    expected = torch.cat([p.grad.double() for p in many]).norm()  # type: ignore[union-attr]
    assert float(clip_grad_norm_(many, None)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_norm_of_many_elements_is_as_exact_as_that_of_few(transposed: bool) -> None:
    """Torch's own of 9 million in float32 is 3e-4 off on a CPU."""
    large = parameter(3000, 3000)
    large.grad = large.grad.T if transposed else large.grad  # type: ignore[union-attr]
    expected = float(large.grad.double().norm())  # type: ignore[union-attr]
    assert float(clip_grad_norm_([large], None)) == pytest.approx(expected, rel=1e-6)


def test_a_sparse_gradient_counts_and_is_scaled_like_any_other() -> None:
    found = nn.Embedding(50, 4, sparse=True)
    found(torch.tensor([3, 7, 3])).sum().backward()
    dense = found.weight.grad.to_dense()  # type: ignore[union-attr]
    assert float(clip_grad_norm_(found, 1.0)) == pytest.approx(float(dense.norm()))
    torch.testing.assert_close(found.weight.grad.to_dense(), dense / dense.norm())  # type: ignore[union-attr]


@pytest.mark.parametrize("max_norm", [None, 0, 0.0])
def test_without_a_limit_the_norm_is_only_measured(max_norm: Any) -> None:
    ours, same = parameters(), parameters()
    expected = nn.utils.get_total_norm([each.grad for each in same if each.grad is not None])
    assert float(clip_grad_norm_(ours, max_norm)) == pytest.approx(float(expected))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, same, strict=True))  # type: ignore[arg-type]


def test_a_model_a_list_a_generator_and_one_tensor_are_accepted() -> None:
    model = nn.Linear(3, 2, bias=False)
    model(torch.ones(2, 3)).sum().backward()
    kinds = (model, list(model.parameters()), model.parameters(), model.weight)
    norms = [float(clip_grad_norm_(kind, None)) for kind in kinds]
    assert norms[0] == norms[1] == norms[2] == norms[3] > 0


def test_parameters_without_gradient_count_nothing() -> None:
    some = parameters()
    expected = float(clip_grad_norm_(some, None))
    some.insert(1, nn.Parameter(torch.ones(9)))
    assert float(clip_grad_norm_(some, 0.5)) == pytest.approx(expected)
    assert some[1].grad is None
    assert float(clip_grad_norm_([nn.Parameter(torch.ones(3))], 1.0)) == 0.0
    assert float(clip_grad_norm_(nn.Identity(), 1.0)) == 0.0
    assert float(clip_grad_norm_([parameter(0), parameter(0, 4)], 1.0)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    ours = parameters()
    ours[1].grad[3] = bad  # type: ignore[index]
    assert not math.isfinite(float(clip_grad_norm_(ours, 1.0)))


# ------------------------------------------------------------------------------------------ on ranks


def sharded_parameters() -> tuple[list[nn.Parameter], Tensor]:
    """One parameter on each of several meshes and placements, and all their gradients in one tensor."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("c",))
    layouts: list[tuple[Any, Any]] = [
        (both, [Shard(0), Shard(1)]),
        (both, [Replicate(), Shard(0)]),
        (both, [Shard(1), Replicate()]),
        (both["a"], [Shard(0)]),
        (both["b"], [Replicate()]),
        (line, [Shard(0)]),  # 5 rows over 4 ranks
        (line, [Replicate()]),
        (None, None),
    ]
    found, whole = [], []
    for seed, (mesh, placements) in enumerate(layouts):
        gradient = parameter(5, 6, seed=seed).grad
        assert gradient is not None
        whole.append(gradient.flatten())
        if mesh is not None:
            gradient = distribute_tensor(gradient, mesh, placements)
        each = nn.Parameter(torch.zeros_like(gradient))
        each.grad = gradient
        found.append(each)
    return found, torch.cat(whole)


def clip_sharded(max_norm: float | None) -> tuple[float, float, float]:
    """(norm, norm of the whole gradients, norm after clipping)"""
    found, whole = sharded_parameters()
    norm = clip_grad_norm_(found, max_norm)
    assert not isinstance(norm, DTensor) and norm.dim() == 0
    after = torch.cat([full_tensor(each.grad).flatten() for each in found])  # type: ignore[arg-type]
    scale = min(1.0, (max_norm or math.inf) / float(norm))
    torch.testing.assert_close(after, whole * scale, rtol=1e-5, atol=1e-7)
    return float(norm), float(whole.norm()), float(after.norm())


@pytest.mark.dist
@pytest.mark.parametrize("max_norm", [None, 1.5, 1e6])
def test_each_element_counts_once_on_mixed_meshes_and_placements(max_norm: float | None) -> None:
    found = run_ranks(4, clip_sharded, max_norm)
    norm, whole, after = found[0]
    assert norm == pytest.approx(whole, rel=1e-6)
    assert after == pytest.approx(min(whole, max_norm or math.inf), rel=1e-5)
    assert len({rank[0] for rank in found}) == 1  # the same number on all ranks, to the last bit


class Gate(nn.Module):
    """So narrow that most ranks hold nothing of it."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 1)
        if unused:
            self.spare = nn.Linear(6, 8)

    def forward(self, x_BH: Tensor) -> Tensor:
        return self.fc(x_BH)


def clip_narrow(unused: bool) -> tuple[float, float, int]:
    torch.manual_seed(3)
    plain = Gate(unused)
    sharded: Any = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    x_BH = torch.randn(4, 6)
    for model in (plain, sharded):
        model(x_BH).sum().backward()
    held = sum(p.to_local().numel() for p in sharded.parameters() if p.grad is not None)
    norm = clip_grad_norm_(sharded, 0.5)
    for mine, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(full_tensor(mine.grad), other.grad * (0.5 / float(norm)))
    return float(norm), float(nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])), held


@pytest.mark.dist
@pytest.mark.parametrize("unused", [False, True])
def test_ranks_that_hold_nothing_take_part(unused: bool) -> None:
    found = run_ranks(2, clip_narrow, unused)
    assert [held for _, _, held in found] == [7, 0]
    assert all(norm == pytest.approx(expected, rel=1e-6) for norm, expected, _ in found)


def reductions_in_ddp() -> list[int]:
    model = DistributedDataParallel(nn.Linear(3, 2))
    found = []
    for last in (False, False, True):
        with Operators() as operators, accumulate(model, last=last):
            model(torch.ones(2, 3)).sum().backward()
        found.append(operators.count("allreduce"))
    return found


@pytest.mark.dist
def test_ddp_reduces_in_the_last_microbatch_only() -> None:
    """FSDP2's reductions are counted in tests/dist/test_sharding_fields.py."""
    assert run_ranks(2, reductions_in_ddp) == [[0, 0, 1]] * 2


def test_accumulate_leaves_any_other_module_alone() -> None:
    model = nn.Linear(2, 2)
    for last in (False, True):
        with accumulate(model, last=last):
            model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(model.bias.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
