"""Which stage holds which layers, and which rank which stage."""

import pytest

from nemo_dist_conf.topology.stage_layers import rank_of_stage, spread_layers, stages_for


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [
        (8, 2, [4, 4]),
        (32, 4, [8, 8, 8, 8]),
        (4, 4, [1, 1, 1, 1]),  # embedding and head find no room of their own
        (3, 2, [1, 2]),
        (10, 4, [2, 3, 3, 2]),
        (7, 1, [7]),
    ],
)
def test_embedding_and_head_count_as_a_layer_each(layers, stages, counts):
    assert spread_layers(layers, stages) == counts


@pytest.mark.parametrize("weighted", [True, False])
def test_every_stage_has_a_layer_and_no_two_loads_differ_by_more_than_one(weighted):
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            counts = spread_layers(layers, stages, weighted)
            assert sum(counts) == layers and len(counts) == stages and min(counts) >= 1
            if stages > 1:
                loads = [counts[0] + weighted, *counts[1:-1], counts[-1] + weighted]
                assert max(loads) - min(loads) <= 1


def test_rounding():
    assert stages_for(8, 3, 2, None) == 3
    assert stages_for(8, 3, 2, "up") == 4
    assert stages_for(8, 3, 2, "down") == 2
    assert stages_for(2, 2, 4, "down") == 4  # never none


def test_stages_lie_round_after_round_or_in_a_v():
    assert [rank_of_stage(stage, 6, 3) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [rank_of_stage(stage, 6, 3, v_shaped=True) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
