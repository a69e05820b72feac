"""Which models can be cut into stages, and what is said of those that cannot."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.model.blocks import find_blocks
from nemo_dist_conf.runtime.techniques.pipeline.stages import Chain, chain_of, cut, plan_stages, spread
from nemo_dist_conf.schema import PipelineConf

SETTINGS: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(PipelineConf)}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma3_text", "mixtral", "qwen3_moe", "gpt_neox"]
WIDTH, VOCABULARY = 16, 11


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return x + self.mix(x) if extra is None else x + self.mix(x) * extra


class Plain(nn.Module):
    """The chain that every other model here departs from in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, ids: Tensor) -> Any:
        x = self.drop(self.embed(ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Scaled(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * 4.0
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ScaledInPlace(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            x.mul_(4.0)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Skip(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        first = x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, first)
        return self.head(x)


class Positions(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(32, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.size(1)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Remembers(Plain):
    """What a block returns goes to a later one where nothing tells of it: not as an argument, and not for gradients."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        shift = 0.0
        for layer in self.layers:
            x = layer(x) + shift
            shift = float(x.detach().sum())
        return self.head(x)


class Writes(Plain):
    """Blocks that hand on more than they return."""

    class Layer(Layer):
        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            y = super().forward(x)
            extra["last"] = y
            return y

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, seen = self.embed(ids), dict[str, Tensor]()
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(x + seen.get("last", 0.0))


class Cache:
    def __init__(self) -> None:
        self.held: list[Tensor] = []


class Caches(Plain):
    """Each block keeps something in a cache that all are given, and reads its own."""

    of = -1

    class Layer(Layer):
        def __init__(self, of: int) -> None:
            super().__init__()
            self.of = of

        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            extra.held.append(self.mix(x))
            return x + extra.held[self.of]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(self.of) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, cache = self.embed(ids), Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x)


class Reads(Caches):
    """Each block reads what the first one has kept."""

    of = 0


class Counts(Plain):
    """Blocks that hand on whole numbers, which follow from weights and have no gradients."""

    class Layer(Layer):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
            y = super().forward(x)
            order = y.argsort(-1) if extra is None else extra
            return y.gather(-1, order), order

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, order = self.embed(ids), None
        for layer in self.layers:
            x, order = layer(x, order)
        return self.head(x)


class Twice(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return self.head(x)


class Between(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.shared(layer(x))
        return self.head(x)


class Loose(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Dicts(Plain):
    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"scores": super().forward(ids)}


class Broken(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        raise RuntimeError("no batch of two rows")


class Idle(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)


def chain(model: nn.Module, **changed: Any) -> Chain:
    return chain_of(model, find_blocks(model, getattr(model, "where", "layers")), SETTINGS | changed)


def cut_all(model: nn.Module, found: Chain, count: int) -> list[nn.Module]:
    placed = spread(found, plan_stages(found, SETTINGS, count), SETTINGS)
    cuts = [cut(model, placed, tuple(found.parts), stage, SETTINGS) for stage in range(count)]
    for _, forward in cuts:
        forward.watch()
    return [stage for stage, _ in cuts]


def in_a_row(stages: list[nn.Module], ids: Tensor) -> Tensor:
    """What the last stage returns, each given what the one before it does."""
    handed: Any = ()
    for stage in stages:
        handed = stage(ids, received=handed)
        handed = handed if isinstance(handed, tuple) else (handed,)
    assert len(handed) == 1
    return handed[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_order_is_that_of_forward(device: str) -> None:
    """Not that of the attributes; what works on the residual stream without parameters is a part too."""
    with torch.device(device):
        found = chain(Plain())
    assert (found.before, found.after) == (("embed", "drop"), ("head",))
    assert found.blocks == ("layers.0", "layers.1", "layers.2")
    assert found.flow.output.of(5, 7) == (5, 7, VOCABULARY) and found.flow.output.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Twice, "not layers.0, layers.1, layers.2 once each"),
        (Dicts, "returns dict"),
        (Broken, "does not run without its layers .RuntimeError: no batch of two rows"),
        (Remembers, "hand on something else than tensors with gradients"),
        (Writes, "layers.0 writes into what it is given"),
        (Reads, "layers.1 reads what layers.0 has written, which lies on another stage"),
        (Counts, "hand on something else than tensors with gradients"),
    ],
)
def test_a_model_that_is_no_chain_is_refused(model: type[nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        found = chain(model())
        spread(found, plan_stages(found, SETTINGS, 3), SETTINGS)
    assert caught.value.problems[0].instead


def test_a_model_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))
    with pytest.raises(ConfigError, match="no repeated layers"):
        chain_of(model, find_blocks(model), SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers_are_chains(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    config = AutoConfig.for_model(family, **sizes, **heads, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = chain_of(model, find_blocks(model), SETTINGS)
    assert len(found.blocks) == 2 and found.flow.output.of(5, 7) == (5, 7, VOCABULARY)
    held = {name for part in found.names for name, _ in model.get_submodule(part).named_parameters(part)}
    assert held == {name for name, _ in model.named_parameters()}


def test_stages_in_a_row_compute_what_the_model_does() -> None:
    """On one process: the output of one stage is the input of the next."""
    model = Plain().eval()
    found = chain(model)
    stages = cut_all(model, found, 3)
    ids = torch.arange(12).view(2, 6) % VOCABULARY
    assert torch.equal(in_a_row(stages, ids), model(ids))
    parameters = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(parameters) == sorted(name for name, _ in model.named_parameters())
    assert stages[1].get_parameter("layers.1.mix.weight") is model.get_parameter("layers.1.mix.weight")


class Pairs(Plain):
    """Blocks that return a tuple, of which the second goes on unchanged; the last one's is used at the end."""

    class Layer(Layer):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
            extra = x.mean(-1, keepdim=True) if extra is None else extra
            return super().forward(x, extra), extra, None

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, extra = self.embed(ids), None
        for layer in self.layers:
            x, extra, _ = layer(x, extra)
        return self.head(x * extra)


class Rooted(Plain):
    """Learned positions at the root, used before the blocks and after them, and a norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(32, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.kinds = [type(layer).__name__ for layer in self.layers]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids) + self.places[: ids.size(1)])
        for layer in self.layers[: len(self.kinds)]:
            x = layer(x) if isinstance(layer.mix, nn.Linear) else x
        return self.head(self.norm(x) - self.places[: ids.size(1)]) * 0.5


class WithoutModule(Plain):
    """A head that is the embedding's weight, without a module of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x @ self.embed.weight.T + self.head(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "kind", [Scaled, ScaledInPlace, Skip, Positions, Between, Loose, Tied, Idle, Pairs, Rooted, WithoutModule, Caches]
)
def test_what_is_around_the_blocks_runs_where_it_is_needed(kind: type[nn.Module], device: str) -> None:
    """Output and gradients of stages in a row are those of the model; what they hand on is found without values too."""
    model = kind().eval()
    ids = torch.arange(12).view(2, 6) % VOCABULARY
    want = model(ids)
    want.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    tried = model
    if device == "meta":
        with torch.device("meta"):
            tried = kind().eval()
    found = chain(tried)
    placed = spread(found, plan_stages(found, SETTINGS, 3), SETTINGS)
    stages = []
    for stage in range(3):
        module, forward = cut(model, placed, tuple(found.parts), stage, SETTINGS)
        forward.watch()
        stages.append(module)
    output = in_a_row(stages, ids)
    assert torch.equal(output, want)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        found_gradient, gradient = parameter.grad, gradients[name]
        assert (found_gradient is None) == (gradient is None)
        assert found_gradient is None or gradient is None or torch.equal(found_gradient, gradient)
    held = {id(parameter) for stage in stages for parameter in stage.parameters()}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_a_stage_holds_what_it_uses_and_nothing_else() -> None:
    found = chain(Rooted())
    placed = spread(found, plan_stages(found, SETTINGS, 3), SETTINGS)
    assert placed.parts == (("embed", "norm", "layers.0"), ("layers.1",), ("layers.2", "norm", "head"))
    assert placed.loose == ({"places"}, set(), {"places"})
    assert [len(values) for values in placed.handed] == [1, 1]
    pairs = chain(Pairs())
    assert [len(v) for v in spread(pairs, plan_stages(pairs, SETTINGS, 3), SETTINGS).handed] == [2, 2]


def test_a_hook_of_one_stage_is_not_one_of_another() -> None:
    model = Plain()
    found = chain(model)
    first, last = cut_all(model, found, 2)
    first.register_forward_hook(lambda *_: None)
    assert len(first._forward_hooks) == 1 and not last._forward_hooks and not model._forward_hooks


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([["embed", "drop", "layers.0"], ["layers.1", "layer.2", "head"]], "names layer.2"),
        ([["embed", "drop", "layers.0"], ["layers.1", "layers.2"]], "leaves out head"),
        ([["layers.0", "embed", "drop"], ["layers.1", "layers.2", "head"]], "does not follow the order"),
        ([["embed", "drop", "layers.0", "layers.0"], ["layers.1", "layers.2", "head"]], "does not follow the order"),
    ],
)
def test_parts_by_name_hold_everything_once_and_in_order(parts: list[list[str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_stages(chain(Plain()), SETTINGS | {"module_fqns_per_model_part": parts}, 2)


def test_too_few_layers_are_refused_where_no_one_knew_them_before() -> None:
    with pytest.raises(ConfigError, match="3 layers are too few for 4 pipeline stages"):
        plan_stages(chain(Plain()), SETTINGS, 4)


class Counting(Plain):
    """Keeps in attributes and lists what it was given, and draws."""

    layers: Any
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, [torch.zeros(())]
        self.layers[0].register_forward_pre_hook(lambda module, args: setattr(module, "calls", module.calls + 1))
        for layer in self.layers:
            layer.calls = 0
        self.register_buffer("tokens", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(ids)
        self.seen[0] += 1
        self.tokens += ids.numel()
        random.random()
        torch.rand(())
        return super().forward(ids)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_trial_leaves_no_trace(device: str) -> None:
    with torch.device(device):
        model = Counting()
    before = random.getstate(), torch.get_rng_state()
    chain_of(model, find_blocks(model, "layers"), SETTINGS)
    assert model.calls == 0 and len(model.seen) == 1 and [layer.calls for layer in model.layers] == [0, 0, 0]
    if device == "cpu":
        assert float(model.seen[0]) == float(model.tokens) == 0
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
