"""Tensor and sequence parallelism against one process: losses, every gradient, ties, plain outputs; and refusals.

Each rank holds the single process's model too, so one call trains both and returns how far they are apart.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.plans import complete_plan
from nemo_dist_conf.families.registry import FAMILY_NAMES, find_family
from nemo_dist_conf.families.styles import STYLES
from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel
from nemo_dist_conf.runtime.techniques.tensor.styles import STYLE_OBJECTS
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FAMILIES = [row.name for row in map(find_family, FAMILY_NAMES) if row is not None and row.tensor_plan is not None]

VOCAB = 64
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Own(nn.Module):
    """A user's model, of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Declares(Own):
    tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))  # in no module of its own, and in no plan

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale


OWN_PLAN = {
    "embed": "embedding_rowwise",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
    "head": "colwise_rep",
}
OWN_SEQUENCE_PLAN = {
    "embed": "embedding_rowwise_scatter_output",
    "layers.*.norm": "sequence_parallel",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise_scatter_output",
    "norm": "sequence_parallel",
    "head": "colwise_gather_output",
}


@dataclass
class Case:
    """One layout of one model. config: over SMALL; None: the class is the user's own."""

    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    sequence_parallel: bool = False
    dp: int = 1
    seq_len: int = 8
    checkpoint: bool = False
    steps: int = 5
    frozen: str = "none"

    def model(self) -> nn.Module:
        torch.manual_seed(7)
        model = {"own": Own, "declares": Declares}[self.family]() if self.family in ("own", "declares") else None
        if model is None:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(self.family, **{**SMALL, **self.config})
            model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.5)  # ones and zeros would hide mistakes
            if self.frozen in name:
                parameter.requires_grad_(False)
        return model


def logits_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def compare(case: Case) -> dict[str, Any]:
    """Train one process's model and the parallel one for some steps; how far apart they are."""
    tp = dist.get_world_size() // case.dp
    mesh = init_device_mesh("cpu", (case.dp, tp), mesh_dim_names=("dp", "tp"))
    single, model = case.model(), case.model()
    styles = apply_tensor_parallel(model, mesh["tp"], plan=case.plan, sequence_parallel=case.sequence_parallel)
    layers: Any = model.get_submodule("layers" if isinstance(model, Own) else "model.layers")
    if case.checkpoint:
        for index, block in enumerate(layers):
            layers[index] = checkpoint_wrapper(block)
    if case.dp > 1:
        for block in layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (single, model)]
    report: dict[str, Any] = {"loss": 0.0, "gradient": {}, "logits": 0.0, "styles": list(styles)}
    torch.manual_seed(3)
    for _ in range(case.steps):
        batch = torch.randint(VOCAB, (2 * case.dp, case.seq_len + 1))
        mine = batch.chunk(case.dp)[mesh.get_local_rank("dp")]
        expected_logits = logits_of(single(batch[:, :-1]))
        expected = nn.functional.cross_entropy(expected_logits.flatten(0, 1), batch[:, 1:].flatten())
        logits = logits_of(model(mine[:, :-1]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        expected.backward()
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        report["loss"] = max(report["loss"], abs(float(mean - expected.detach()) / float(expected.detach())))
        mine_expected = expected_logits.chunk(case.dp)[mesh.get_local_rank("dp")]
        report["logits"] = max(report["logits"], float((logits - mine_expected).detach().abs().max()))
        report["type"] = type(logits)
        wanted = dict(single.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
        for name, parameter in model.named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "")
            want, got = wanted.pop(name).grad, parameter.grad
            if want is None or got is None:
                assert want is got is None or (want is None and not parameter.requires_grad), name
                continue
            if isinstance(got, DTensor):
                assert not any(placement.is_partial() for placement in got.placements), name
                got = got.full_tensor()
            report["gradient"][name] = float((got - want).abs().max() / (want.abs().max() + 1e-3 * largest))
        assert not wanted, wanted
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    head = getattr(model, "lm_head", None)
    report["tied"] = head is not None and head.weight is model.get_submodule("model.embed_tokens").weight
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in model.parameters()}
    report["meshes"] = len(meshes)
    if len(meshes) == 1:
        report["norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, logits.detach())
    place = dist.get_rank() - mesh.get_local_rank("tp")
    report["same"] = torch.equal(logits, gathered[place])
    return report


TIED = {"tie_word_embeddings": True}
CASES = {
    "llama": (2, Case()),
    "llama sp": (2, Case(sequence_parallel=True)),
    "llama tied": (2, Case(config=TIED)),
    "llama tied sp": (2, Case(config=TIED, sequence_parallel=True)),
    "llama biases": (2, Case(config={"attention_bias": True, "mlp_bias": True})),
    "llama biases sp": (2, Case(config={"attention_bias": True, "mlp_bias": True}, sequence_parallel=True)),
    "llama recomputed sp": (2, Case(checkpoint=True, sequence_parallel=True)),
    "llama partly frozen sp": (2, Case(frozen="layers.0", sequence_parallel=True)),
    "qwen3": (2, Case("qwen3")),
    "qwen3 sp": (2, Case("qwen3", sequence_parallel=True)),
    "qwen2 sp": (2, Case("qwen2", sequence_parallel=True, steps=2)),
    "mistral": (2, Case("mistral", {"sliding_window": 4})),
    "mistral sp": (2, Case("mistral", {"sliding_window": 4}, sequence_parallel=True)),
    # A family that only transformers' own plan is known of, its scaled embedding tied to the head.
    "gemma2 tied": (2, Case("gemma2", {"head_dim": 8, **TIED, "query_pre_attn_scalar": 8}, steps=2)),
    "phi3": (2, Case("phi3", {"pad_token_id": 0}, steps=2)),
    "odd length, odd vocabulary": (2, Case(config={"vocab_size": 65, "pad_token_id": 1}, seq_len=7)),
    "odd length, odd vocabulary sp": (
        2,
        Case(config={"vocab_size": 65, "pad_token_id": 1}, seq_len=7, sequence_parallel=True),
    ),
    "shorter than the ranks sp": (
        4,
        Case(config={"num_key_value_heads": 4, **TIED}, seq_len=3, sequence_parallel=True, steps=2),
    ),
    "qwen3 tied x dp": (4, Case("qwen3", TIED, dp=2)),
    "qwen3 tied x dp sp": (4, Case("qwen3", TIED, dp=2, sequence_parallel=True)),
    "llama x dp, recomputed, odd length sp": (
        4,
        Case(dp=2, checkpoint=True, seq_len=5, sequence_parallel=True, steps=2),
    ),
    "own": (2, Case("own", plan=OWN_PLAN)),
    "own sp": (2, Case("own", plan=OWN_SEQUENCE_PLAN, sequence_parallel=True, seq_len=7)),
    "own x dp": (4, Case("own", plan=OWN_PLAN, dp=2)),
    "own, plan declared": (2, Case("declares")),
    "own, torch objects": (
        2,
        Case("own", plan={"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}, steps=2),
    ),
}


@pytest.mark.parametrize("world_size, case", CASES.values(), ids=CASES.keys())
def test_training_equals_one_process(world_size: int, case: Case) -> None:
    for report in run_ranks(world_size, compare, case):
        assert report["loss"] < 1e-6
        assert report["logits"] < 1e-5
        assert max(report["gradient"].values()) < 1e-4, report["gradient"]
        assert report["type"] is torch.Tensor and report["same"]
        assert report["tied"] is bool(case.config.get("tie_word_embeddings"))
        if case.family in FAMILIES:
            assert report["meshes"] == 1  # and so torch's own clip_grad_norm_ works


def use_every_input(family: str, sequence_parallel: bool) -> dict[str, Any]:
    """How far outputs of the parallel model are from the single process's for what transformers' forward takes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    single, model = Case(family).model(), Case(family).model()
    apply_tensor_parallel(model, mesh["tp"], sequence_parallel=sequence_parallel)
    ids = torch.randint(VOCAB, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    far: dict[str, Any] = {}
    inputs: dict[str, dict[str, Any]] = {
        "plain": {},
        "mask": {"attention_mask": mask},
        "packed": {"position_ids": positions, "use_cache": False},
        "some logits": {"logits_to_keep": 2},
    }
    for name, kwargs in inputs.items():
        want, got = single(ids, **kwargs).logits, model(ids, **kwargs).logits
        shown = mask.bool() if name == "mask" else ...  # what padding sees is nobody's business
        far[name] = float((want[shown] - got[shown]).detach().abs().max())
    far["loss"] = abs(float(single(ids, labels=ids).loss.detach() - model(ids, labels=ids).loss.detach()))
    hidden = [m(ids, output_hidden_states=True).hidden_states for m in (single, model)]
    assert len(hidden[0]) == len(hidden[1]) and {type(x) for x in hidden[1]} == {torch.Tensor}
    far["hidden states"] = max(float((a - b).detach().abs().max()) for a, b in zip(*hidden))
    embedded = [single.get_submodule("model.embed_tokens")(ids).detach().requires_grad_() for _ in range(2)]
    for m, x in zip((single, model), embedded):
        m(inputs_embeds=x).logits.square().sum().backward()
    want, got = (x.grad for x in embedded)
    assert want is not None and got is not None
    far["gradient of embeddings"] = float((want - got).abs().max() / want.abs().max())
    with torch.no_grad():
        how: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        same = torch.equal(single.generate(ids, **how), model.generate(ids, **how))  # type: ignore[operator]
    far["generated"] = 0.0 if same else 1.0
    far["changed in place"] = 0.0 if model(ids).logits.mul_(2).requires_grad else 1.0
    alone, base = Case(family).model().get_submodule("model"), Case(family).model().get_submodule("model")
    apply_tensor_parallel(base, mesh["tp"], sequence_parallel=sequence_parallel)
    want, got = alone(ids).last_hidden_state, base(ids).last_hidden_state
    assert type(got) is torch.Tensor
    far["without a head"] = float((want - got).detach().abs().max())
    return far


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_all_that_forward_takes_and_gives(family: str, sequence_parallel: bool) -> None:
    for far in run_ranks(2, use_every_input, family, sequence_parallel):
        assert max(far.values()) < 1e-5, far


def build_on_meta(dp: int, sequence_parallel: bool) -> tuple[float, bool, set[type]]:
    """The same values after sharding on meta as before sharding with values."""
    mesh = init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))
    single = Case("qwen3", TIED).model()
    with torch.device("meta"):
        model = Case("qwen3", TIED).model()
    apply_tensor_parallel(model, mesh["tp"], sequence_parallel=sequence_parallel)
    tied = model.lm_head.weight is model.get_submodule("model.embed_tokens").weight  # type: ignore[union-attr]
    if dp > 1:
        for block in model.get_submodule("model.layers").children():
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    for name, buffer in single.named_buffers():
        model.get_buffer(name).copy_(buffer)
    wanted = dict(single.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            placed = distribute_tensor(wanted[name], parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(placed.to_local())
    ids = torch.randint(VOCAB, (2, 8))
    far = float((single(ids).logits - model(ids).logits).detach().abs().max())
    return far, tied, {type(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("dp", [1, 2])
def test_a_model_on_meta_is_sharded_without_values(dp: int) -> None:
    for far, tied, kinds in run_ranks(2 * dp, build_on_meta, dp, dp == 2):
        assert far < 1e-5 and tied and kinds <= {nn.Parameter, DTensor}


def compile_blocks(sequence_parallel: bool) -> tuple[float, float, int]:
    from torch._dynamo.utils import counters

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    single, model = Case("qwen3").model(), Case("qwen3").model()
    apply_tensor_parallel(model, mesh["tp"], sequence_parallel=sequence_parallel)
    torch._dynamo.reset()
    counters.clear()
    for block in model.get_submodule("model.layers").children():
        block.compile(backend="aot_eager")
    ids = torch.randint(VOCAB, (2, 8))
    losses = [m(ids, labels=ids).loss for m in (single, model)]
    for loss in losses:
        loss.backward()
    wanted = dict(single.named_parameters())
    far = 0.0
    for name, parameter in model.named_parameters():
        got, want = parameter.grad, wanted[name].grad
        assert isinstance(got, DTensor) and want is not None
        far = max(far, float((got.full_tensor() - want).abs().max()))
    return float((losses[0] - losses[1]).detach()), far, sum(counters["graph_break"].values())


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch cannot; it is refused (strategies/fsdp2.py)")
def test_blocks_compile_in_one_graph_with_sequence_parallelism() -> None:
    for loss, gradient, breaks in run_ranks(2, compile_blocks, True):
        assert abs(loss) < 1e-6 and gradient < 1e-5 and breaks == 0


# What is refused.


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pair = {"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)}
        self.layers: Any = nn.ModuleList([nn.ModuleDict(pair)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["fc2"](layer["fc1"](x).tanh())
        return self.norm(x)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


class Convolution(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(4, 4, 1))


def odd_llama() -> nn.Module:
    return Case(config={"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 50}).model()


def mixture() -> nn.Module:
    return Case("qwen3_moe", {"moe_intermediate_size": 33, "num_experts": 4}).model()


GOOD = {"layers.*.fc1": "colwise", "layers.*.fc2": "rowwise"}
GOOD_WORD = "'strategy.tp_plan={layers.*.fc1:colwise,layers.*.fc2:rowwise}'"
#: model, plan, sequence_parallel -> first words of each problem, the words to type instead.
REFUSED: dict[str, tuple[Any, Any, bool, list[str], str]] = {
    "no plan": (Chain, None, False, ["no tensor-parallel plan is known for Chain"], GOOD_WORD),
    "no plan, nothing linear": (Convolution, None, False, ["no tensor-parallel plan"], "parallelism.tp_size=1"),
    "a word": (Chain, "colwise", False, ["strategy.tp_plan is 'colwise'"], GOOD_WORD),
    "empty": (Chain, {}, False, ["strategy.tp_plan is empty"], GOOD_WORD),
    "several at once": (
        Chain,
        {"layers.*.fc1": "colwse", "layers.*.fc3": "rowwise", "norm": "colwise"},
        False,
        [
            "tp_plan: 'colwse' is not the name of a style",
            "tp_plan: no module is named layers.*.fc3",
            "tp_plan: the style colwise is for Linear or Conv1D or Embedding, and norm is LayerNorm",
        ],
        GOOD_WORD,
    ),
    "a number as style": (
        Chain,
        {**GOOD, "norm": 3},
        False,
        ["tp_plan: 3 is not the name of a style"],
        GOOD_WORD.replace("}", ",norm:replicated}"),
    ),
    "two patterns for one module": (
        Chain,
        {**GOOD, "layers.0.*": "replicated"},
        False,
        ["two entries of tp_plan mean the module layers.0.fc1"],
        GOOD_WORD,
    ),
    "nothing splits the sequence": (
        Chain,
        GOOD,
        True,
        ["sequence_parallel is on, but no entry"],
        "strategy.sequence_parallel=false",
    ),
    "tied apart": (
        TiedHead,
        {"embed": "embedding_rowwise"},
        False,
        ["embed.weight and head.weight are one parameter"],
        "'strategy.tp_plan={embed:embedding_rowwise,head:colwise_gather_output}'",
    ),
    "heads and width": (
        odd_llama,
        None,
        False,
        ["tp_size=4 does not divide the model's 2 key/value heads and 50 MLP columns"],
        "parallelism.tp_size=2",
    ),
    "experts": (mixture, None, False, ["tp_size=2 does not divide the model's 33 columns"], "parallelism.tp_size=1"),
}


def refuse(make: Any, plan: Any, sequence_parallel: bool) -> tuple[ConfigError | None, bool]:
    """The error, and whether the model is as it was."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make()
    before = [id(parameter) for parameter in model.parameters()]
    try:
        apply_tensor_parallel(model, mesh, plan=plan, sequence_parallel=sequence_parallel)
    except ConfigError as error:
        return error, before == [id(parameter) for parameter in model.parameters()]
    return None, False


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_type_and_that_works(name: str) -> None:
    make, plan, sequence_parallel, whats, way_out = REFUSED[name]
    world_size = 4 if name == "heads and width" else 2
    (error, untouched), *_ = run_ranks(world_size, refuse, make, plan, sequence_parallel)
    assert error is not None and untouched
    assert [problem.what[: len(what)] for problem, what in zip(error.problems, whats)] == whats
    assert len(error.problems) == len(whats)
    assert {problem.instead for problem in error.problems} == {way_out}
    follow(way_out, make, plan, sequence_parallel)


def follow(way_out: str, make: Any, plan: Any, sequence_parallel: bool) -> None:
    """Do what an error told to type, as the command line would."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (word,) = shlex.split(way_out)
    override = OverridesParser.create().parse_override(word)
    key = override.key_or_group
    value: Any = override.value()
    if key == "strategy.tp_plan":
        plan = value
    if key == "strategy.sequence_parallel":
        sequence_parallel = bool(value)
    if key == "parallelism.tp_size" and value == 1:
        return  # without tensor parallelism nothing of this is called
    world_size = value if key == "parallelism.tp_size" else 2
    if make is odd_llama:
        world_size = 2
    (error, _), *_ = run_ranks(int(world_size), refuse, make, plan, sequence_parallel)
    assert error is None, error


def test_a_width_that_does_not_split_is_refused_with_the_sizes_that_do() -> None:
    (error, untouched), *_ = run_ranks(4, refuse, Narrow, {"a": "colwise", "b": "rowwise"}, False)
    assert error is not None and untouched
    assert error.what == "tp_size=4 does not divide the width of a (6), b (6)"
    assert (error.allowed, error.type) == ("tp_size: 1, 2, 3, 6", "parallelism.tp_size=2")


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_every_style_name_has_an_object_and_every_family_a_plan() -> None:
    of_places = ("packed_rowwise", "mla_kv_a_proj")  # what they do depends on where they stand
    assert {*STYLE_OBJECTS, *of_places} == set(STYLES)
    for family in FAMILIES:
        for sequence_parallel in (False, True):
            plan = complete_plan(family, sequence_parallel=sequence_parallel)
            if sequence_parallel and family in ("mixtral", "qwen3_moe"):
                assert plan is None  # experts are not split so
                continue
            assert plan is not None and set(plan.values()) <= set(STYLES)
    assert complete_plan("unheard_of") is None
