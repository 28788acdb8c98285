"""Shapes that fit together, and those that do not."""

import pytest

from refimpl.model.config import Config, Rope

SIZES = {"vocabulary": 61, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}


def test_no_window_is_none_for_every_layer():
    """Oracle: by hand."""
    assert Config(**SIZES).sliding_window == (None, None, None)
    assert Config(**SIZES, sliding_window=(None, 4, 5)).sliding_window == (None, 4, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({name: 0}, f"{name}=0 must be at least 1") for name in SIZES],
        ({"max_positions": 0}, "max_positions=0"),
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"sliding_window": (4,)}, "sliding_window has 1 entries for 3 layers"),
        ({"sliding_window": (4, 0, None)}, "must be at least 1, or None"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**SIZES | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "longrope"}, "must be one of default"),
        ({"theta": 1.0}, "theta=1.0"),
        ({"type": "yarn", "factor": 2.0}, "original_max_positions"),
        ({"type": "llama3", "original_max_positions": 8, "low_freq_factor": 4.0}, "low_freq_factor=4.0"),
    ],
)
def test_rope_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Rope(**fields)
