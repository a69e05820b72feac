"""Kinds of models that people bring, and how far a run of one on some layout is from plain torch in one process.

Shapes: B rows of the global batch, S tokens, H width.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, Mapping, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import composed, full_state
from tests.dist.pool import run_ranks

__all__ = ["KINDS", "difference", "ids"]

ROWS, STEPS, VOCABULARY = 4, 3, 96
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4}
QUIET: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "attention_probs_dropout_prob": 0.0}
BERT: dict[str, Any] = {**TEXT, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, **QUIET}

#: (model, arguments of its forward); every tensor among them has B rows.
Made = tuple[nn.Module, dict[str, Any]]
KINDS: dict[str, Callable[[], Made]] = {}
Make = TypeVar("Make", bound=Callable[..., Made])


def kind(make: Make) -> Make:
    KINDS[make.__name__] = make
    return make


def ids(highest: int = 80, tokens: int = 16) -> Tensor:
    return torch.randint(3, highest, (ROWS, tokens))


def difference(
    world_size: int,
    name: str,
    *words: str,
    microbatches: int = 1,
    call: str = "",
    **options: Any,
) -> float:
    """The worst relative difference of losses, gradient norms and final weights from plain torch, on so many ranks.

    name: of KINDS. call: run this method of the model instead of forward. options: of the run.
    """
    return max(run_ranks(world_size, _difference, name, words, microbatches, call, options))


def _difference(name: str, words: tuple[str, ...], microbatches: int, call: str, options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    given, batch = KINDS[name]()
    given.train()
    plain = copy.deepcopy(given)
    words = (*words, *(["strategy.mp_policy=null"] if not any(w.startswith("strategy=") for w in words) else []))
    setup, model, update = instantiate(composed(*words), given, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
    context = setup.mesh_context
    reference = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    parts = [_rows(batch, index, context.data_size) for index in range(context.data_size)]
    mine = [_rows(parts[context.data_rank], index, microbatches) for index in range(microbatches)]
    worst = 0.0
    for step in range(STEPS):
        expected = 0.0
        for part in parts:
            for index in range(microbatches):
                seed(100 * step + index)
                loss = _loss(plain, _rows(part, index, microbatches), call) / microbatches / len(parts)
                loss.backward()
                expected += float(loss)
        total = torch.zeros(())
        for index, rows in enumerate(mine):
            seed(100 * step + index + 7777 * dist.get_rank())  # what ranks draw is their own
            with accumulate(model, last=index == microbatches - 1):
                loss = _loss(model, rows, call) / microbatches
                loss.backward()
            total += loss.detach().float()
        found = float(context.sum_over_data(total)) / context.data_size
        norms = float(clip_grad_norm_(model, None)), _norm(plain)
        worst = max(worst, _relative(found, expected), _relative(*norms))
        for optimizer in (update, reference):
            optimizer.step()
            optimizer.zero_grad()
    theirs = plain.state_dict()
    for key, value in full_state(model).items():
        worst = max(worst, _apart(value, theirs[key]))
    return worst


def seed(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)


def _loss(model: nn.Module, rows: dict[str, Any], call: str) -> Tensor:
    output = (getattr(model, call) if call else model)(**rows)
    if isinstance(output, Tensor):
        return output.float().square().mean()
    return output["loss"] if isinstance(output, Mapping) and "loss" in output else output[0].float().square().mean()


def _rows(batch: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    return {key: v.chunk(count)[index] if torch.is_tensor(v) else v for key, v in batch.items()}


def _norm(model: nn.Module) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    dense = [_real(g.to_dense() if g.is_sparse else g) for g in gradients]
    return float(torch.stack([g.double().norm() for g in dense]).norm())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-8)


def _apart(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = _real(found), _real(expected)
    scale = max(float(expected.double().abs().max()), 1e-3) if expected.numel() else 1.0
    return float((found.double() - expected.double()).abs().max()) / scale if expected.numel() else 0.0


# ------------------------------------------------------------------------------------------------ transformers' models


def transformers_model(name: str, config: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(config)


@kind
def clip() -> Made:
    from transformers import CLIPConfig

    text = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    batch = {"input_ids": ids(), "pixel_values": torch.randn(ROWS, 3, 16, 16), "return_loss": True}
    return transformers_model("CLIPModel", config), batch


@kind
def wav2vec2(**changed: Any) -> Made:
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config(
        **TEXT,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **{
            "layerdrop": 0.0,
            "hidden_dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "final_dropout": 0.0,
            "apply_spec_augment": False,
            "ctc_loss_reduction": "mean",
            **changed,
        },
    )
    batch = {"input_values": torch.randn(ROWS, 800), "labels": ids(tokens=5)}
    return transformers_model("Wav2Vec2ForCTC", config), batch


@kind
def modernbert() -> Made:
    from transformers import ModernBertConfig

    config = ModernBertConfig(**TEXT, max_position_embeddings=32, cls_token_id=1, sep_token_id=2)
    return transformers_model("ModernBertForMaskedLM", config), {"input_ids": ids(), "labels": ids()}


@kind
def bert_decoder() -> Made:
    from transformers import BertConfig

    batch = {"input_ids": ids(), "labels": ids()}
    return transformers_model("BertLMHeadModel", BertConfig(**BERT, is_decoder=True)), batch


@kind
def roberta_decoder() -> Made:
    from transformers import RobertaConfig

    model = transformers_model("RobertaForCausalLM", RobertaConfig(**BERT, is_decoder=True))
    return model, {"input_ids": ids(), "labels": ids()}


@kind
def gemma3_with_images() -> Made:
    from transformers import Gemma3Config

    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    x_BS = ids()
    x_BS[:, 2:6] = 90
    batch = {"input_ids": x_BS, "pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": ids()}
    batch["token_type_ids"] = (x_BS == 90).long()
    return transformers_model("Gemma3ForConditionalGeneration", config), batch


@kind
def opt_with_layerdrop() -> Made:
    """Each layer is skipped in every second step; a rank's random numbers are its own."""
    from transformers import OPTConfig

    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes["vocab_size"] = VOCABULARY
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=32, dropout=0.0, layerdrop=0.5)
    return transformers_model("OPTForCausalLM", config), {"input_ids": ids(), "labels": ids()}


@kind
def wav2vec2_with_layerdrop() -> Made:
    """Also in an adapter, which draws with numpy."""
    model, batch = wav2vec2(layerdrop=0.5, add_adapter=True, num_adapter_layers=2, output_hidden_size=32)
    return model, batch


@kind
def gemma3_text_alone() -> Made:
    """A vision-language model that is given no image: its vision tower has no gradients."""
    model, batch = gemma3_with_images()
    return model, {"input_ids": ids(), "labels": batch["labels"]}


# ------------------------------------------------------------------------------------------------------- own models


class Block(nn.Module):
    """A residual block with something of the kind in it."""

    def __init__(self, inner: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(self.norm(x)).tanh()
        return x if self.inner is None else x + self.inner(x)


class Stack(nn.Module):
    """Blocks one after the other, and a head."""

    def __init__(self, *inner: nn.Module | None, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(module, width) for module in (inner or (None, None, None)))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def rows(width: int = 8) -> dict[str, Any]:
    return {"x": torch.randn(ROWS, width) * torch.arange(1, ROWS + 1).view(-1, 1)}


@kind
def scalars() -> Made:
    """Parameters without a dimension, of the root, of a block, and one that is frozen."""

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__(Scale(), Scale(), Scale())
            self.temperature = nn.Parameter(torch.tensor(1.3))
            self.blocks[1].inner.factor.requires_grad_(False)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.temperature

    return Model(), rows()


@kind
def without_elements() -> Made:
    """Parameters of no elements, as tables of prompts of length 0."""

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.zeros(0, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.prompt.sum(0)

    return Stack(Prompt(), Prompt()), rows()


@kind
def levels() -> Made:
    """Levels whose parts stand in dictionaries, as a U-Net's."""

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [{"first": Block(), "then": nn.Linear(8, 8), "act": nn.Tanh()} for _ in range(2)]
            self.down = nn.ModuleList(nn.ModuleDict(part) for part in parts)
            self.up: Any = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for level in self.down:
                x = level["act"](level["then"](level["first"](x)))  # type: ignore[index]
            for first, second in self.up:
                x = second(first(x))
            return x

    return Levels(), rows()


@kind
def complex_parameters() -> Made:
    """Filters in the frequency domain."""

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8)

    return Stack(Filter(), nn.Linear(8, 8)), rows()


@kind
def shared_layer() -> Made:
    """A layer that every block uses, and a matrix that a block has from outside of it."""
    shared = nn.Linear(8, 8)
    model: Any = Stack(shared, nn.Linear(8, 8), nn.Linear(8, 8))
    model.blocks[2].up.weight = model.head.weight
    model.last = shared
    return model, rows()


@kind
def two_dtypes() -> Made:
    """Norms in float64 inside of blocks in float32, and a head that is all in float64."""

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()).float()

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.norm = Norm(8, dtype=torch.float64)
            self.head = self.head.double()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x.double())

    return Model(), rows()


@kind
def dtypes_in_one_module() -> Made:
    """A module with parameters of two dtypes of its own."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8) / 3)
            self.bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias.float()

    return Stack(Mixed(), Mixed()), rows()


@kind
def sparse_embedding() -> Made:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8, sparse=True)
            self.body = Stack()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(self.embedding(tokens).mean(1))

    return Model(), {"tokens": ids(32, 6)}


@kind
def plain_attributes() -> Made:
    """Tensors that are neither parameters nor buffers."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.linspace(0, 1, 8)
            self.tables = {"twice": torch.linspace(0, 2, 8)}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table + self.tables["twice"]

    return Stack(Table(), Table()), rows()


@kind
def recurrent() -> Made:
    """An LSTM keeps a list of its weights beside them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8)
            self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.lstm(self.embedding(tokens))[0])

    return Model(), {"tokens": ids(32, 6)}


@kind
def channels_last() -> Made:
    """Convolutions whose weights do not lie in memory in the order of their dimensions."""
    layers = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8)]
    model: Any = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(8 * 36, 4))
    return model.to(memory_format=torch.channels_last), {"input": torch.randn(ROWS, 3, 6, 6)}


@kind
def attention_and_weight_norm() -> Made:
    """nn.MultiheadAttention uses weights of a module that it never calls; a parametrized weight is computed."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = x.unsqueeze(1).expand(-1, 3, -1) * torch.linspace(0.5, 1, 3).view(1, 3, 1)
            return self.out(self.attention(y, y, y)[0].mean(1))

    return Stack(Attend(), Attend()), rows()


@kind
def frozen_and_trained() -> Made:
    """A frozen trunk in bfloat16 with trained parts in float32 beside it, as adapters have it."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x.bfloat16()).float() + self.up(self.down(x))

    return Stack(Adapter(), Adapter()), rows()
