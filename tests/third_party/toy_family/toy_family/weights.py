"""The weights of the toy, for the plan."""

from nemo_dist_conf.families.shapes import ModelShape, Weight


def block_weights(shape: ModelShape, sparse: bool) -> tuple[Weight, ...]:
    hidden, wide = shape.hidden, shape.intermediate
    dense = (
        Weight("feed.narrow.weight", (hidden, wide), "mlp"),
        Weight("feed.wide.weight", (wide, hidden), "mlp"),
        Weight("feed.gate.weight", (wide, hidden), "mlp"),
    )
    experts = (
        Weight("feed.experts.narrow", (shape.experts, hidden, wide), "mlp", expert=True),
        Weight("feed.experts.gate_wide", (shape.experts, 2 * wide, hidden), "mlp", expert=True),
        Weight("feed.choose.weight", (shape.experts, hidden), "mlp"),
    )
    return (
        *(experts if sparse else dense),
        Weight("before_feed.weight", (hidden,), "norm"),
        *(Weight(f"mix.{name}.weight", (hidden, hidden), "attention") for name in ("out", "value", "key", "query")),
        Weight("before_mix.weight", (hidden,), "norm"),
    )


def outer_weights(shape: ModelShape) -> tuple[Weight, ...]:
    embedding = Weight("trunk.words.weight", (shape.vocab, shape.hidden), "embedding")
    norm = Weight("trunk.last.weight", (shape.hidden,), "final_norm")
    return (embedding, norm, Weight("to_words.weight", (shape.vocab, shape.hidden), "head"))
