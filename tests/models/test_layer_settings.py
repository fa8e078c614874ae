"""Settings by layer, recognized by their names."""

from __future__ import annotations

from typing import Any

import pytest

from avss_dist.models.remaining import settings_by_layer


@pytest.mark.parametrize(
    ("name", "value", "shortened"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "c", "d"]),
        ("no_rope_layers", [1, 0, 1, 1], [1, 1, 1]),
        ("layer_rope_theta", [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 4.0]),
        ("mlp_only_layers", [1, 2], [1]),
        ("moe_layers", [0, 1, 2, 3], [0, 1, 2]),
        ("full_attn_idxs", [3], [2]),
        ("num_key_value_heads", [4, 3, 2, 1], [4, 2, 1]),
        ("per_layer_config", {"1": {"a": 1}, "3": {"a": 3}}, {"2": {"a": 3}}),
        ("first_k_dense_replace", 2, 1),
        ("max_window_layers", 4, None),
        ("num_key_value_heads", 4, None),
        ("id2label", {"0": "a", "1": "b"}, None),
        ("task_specific_params", {"1": {}}, None),
        ("architectures", ["a", "b", "c", "d"], None),
        ("eos_token_id", [1, 2, 3, 0], None),
        ("moe_intermediate_size", [1, 2, 3, 4], None),
        ("mtp_layer_types", ["a", "b", "c", "d"], None),
        ("vision_feature_layer", [0, 1], None),
    ],
)
def test_settings_by_layer_are_told_by_their_names(name: str, value: Any, shortened: Any) -> None:
    assert settings_by_layer({name: value}, 4, [0, 2, 3]) == ({} if shortened is None else {name: shortened})
