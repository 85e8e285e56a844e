"""Operations of a micro-batch against the formula written out."""

import pytest
from flax import nnx

from codjax import models
from codjax.plan import counts
from tests import small

# Two layers of width 16, 4 heads of 8 over 2 key-value heads, MLP of 32, vocabulary of 24.
PRODUCTS = 16 * (4 + 2 + 2) * 8 + 4 * 8 * 16 + 3 * 16 * 32  # of one token in one layer
WORK = counts.Work(
    rows=2, row_length=10, scored_per_row=3, sample_length=1000, head_in_forward=True
)
FORWARD = 2 * 20 * 2 * PRODUCTS
PAIRS = 2 * 10 * 11 / 2  # every token sees itself and those before it
PRODUCT = 2 * PAIRS * 4 * 8 * 2
HEAD = 2 * 6 * 16 * 24


def operations(remat, sizes=None, **changes):
    config = small.decoder_config(remat=remat, **(sizes or {}))
    model = nnx.eval_shape(lambda: models.init(config, seed=0))
    return counts.operations(model, WORK._replace(**changes))


def test_the_model_is_three_forwards():
    found = operations("none")
    assert found["layers"] == 3 * FORWARD
    assert found["attention"] == 6 * PRODUCT
    assert found["head"] == 3 * HEAD
    assert found["model"] == 3 * FORWARD + 6 * PRODUCT + 3 * HEAD


@pytest.mark.parametrize(
    ("remat", "again"),
    # Of a layer computed again, the last product is left out: nothing needs its result.
    [("none", 0), ("dots", 0), ("full", FORWARD - 2 * 20 * 2 * 16 * 32)],
)
def test_the_hardware_also_does_what_is_computed_again(remat, again):
    attention = (7 + 2 + (remat != "none") * 2) * PRODUCT
    assert operations(remat)["hardware"] == 3 * FORWARD + again + attention + 3 * HEAD
    late = operations(remat, head_in_forward=False)["hardware"]
    assert late == operations(remat)["hardware"] + HEAD


@pytest.mark.parametrize("width", [24, 96])
def test_of_experts_the_chosen_ones_count(width):
    sizes = {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": width}
    found = operations("none", sizes | {"family": "qwen3_moe"})
    mlp, router, experts, their_sum = 3 * 16 * 32, 16 * 8, 2 * 3 * 16 * width, 2 * 16
    forward = 2 * 20 * 2 * (PRODUCTS - mlp + router + experts + their_sum)
    assert found["layers"] == 3 * forward
    assert found["hardware"] - found["model"] == 3 * PRODUCT  # attention alone computes again


def test_samples_shorter_than_the_row_see_less():
    found = operations("none", sample_length=4)
    assert found["attention"] == 6 * PRODUCT * 5 / 11


def test_parameters():
    model = nnx.eval_shape(lambda: models.init(small.decoder_config(), seed=0))
    layer = PRODUCTS + 2 * 16 + 2 * 8
    assert counts.num_parameters(model) == 2 * 24 * 16 + 16 + 2 * layer
