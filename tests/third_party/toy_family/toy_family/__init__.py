"""The row of a family that nemo_dist_conf knows nothing of: other names for everything. No torch."""

from nemo_dist_conf.families.mixers import OWN_ATTENTION
from nemo_dist_conf.families.spec import Family, Fields, Places, Shapes, TensorPlan

_DEFAULTS = {
    "width": 32,
    "feed_width": 48,
    "depth": 2,
    "n_heads": 4,
    "n_words": 96,
    "n_experts": 0,
    "n_chosen": 2,
    "tie_word_embeddings": False,
}

FAMILY = Family(
    name="toy",
    places=Places(base="trunk", embedding="words", blocks="stack", final_norm="last", head="to_words"),
    tensor_plan=TensorPlan(
        norms=("before_mix", "before_feed"),
        inputs=("mix", "feed"),
        block={
            "mix.query": "colwise",
            "mix.key": "colwise",
            "mix.value": "colwise",
            "mix.out": "rowwise",
            "feed.gate": "colwise",
            "feed.wide": "colwise",
            "feed.narrow": "rowwise",
        },
    ),
    expert_plan={
        "stack.*.feed.experts": "ep_dispatch_experts",
        "stack.*.feed.experts.gate_wide": "grouped_gemm",
        "stack.*.feed.experts.narrow": "grouped_gemm",
    },
    mixers=(OWN_ATTENTION,),
    fields=Fields(
        hidden="width",
        intermediate="feed_width",
        layers="depth",
        heads="n_heads",
        kv_heads="",
        head_dim="",
        vocab="n_words",
        experts="n_experts",
        experts_per_token="n_chosen",
        expert_width="feed_width",
        other_names={"heads": "n_heads"},
    ),
    config_fields=frozenset({"model_type", "heads", *_DEFAULTS}),
    shapes=Shapes(
        defaults=_DEFAULTS,
        weights="toy_family.weights",
        is_sparse=lambda config, layer: config["n_experts"] > 0,
    ),
    modeling="toy_family.modeling",
)
