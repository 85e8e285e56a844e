"""What a run keeps on a device, counted by hand; a model that leaves no room for sampling."""

import jax
import pytest

from codjax import build, memory, models, sharding
from codjax.checks import ConfigError
from codjax.config import default_config
from tests import small

GIB = 2**30
STATE = {"params": 4 * GIB, "gradients": 4 * GIB, "optimizer": 8 * GIB, "reference": 0}
SAMPLER = {"weights": 4 * GIB, "cache": GIB}


def test_the_sampler_holds_a_copy_and_a_cache():
    config = default_config()
    config.engine.num_slots, config.engine.max_tokens = 3, 50
    model = models.init(small.decoder_config(dtype="bfloat16"), seed=0)
    params = build.params_of(model)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    mesh = sharding.make_mesh(1, 4, 2)
    many = memory.sampler_bytes(config, model, mesh, num_processes=2)
    # Keys and values of 2 layers, 3 slots of 50 tokens, 2 heads of 8, in bfloat16.
    assert many == {"weights": whole, "cache": 2 * 2 * 3 * 50 * 2 * 8 * 2}
    cut = jax.device_put(params, sharding.param_shardings(model, mesh))
    shards = (x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cut))
    alone = memory.sampler_bytes(config, model, mesh, num_processes=1)
    assert alone == many | {"weights": sum(shards)}
    assert alone["weights"] < whole / 4


def test_a_sampler_without_room_is_refused_before_it_is_filled():
    memory.require_room(STATE, SAMPLER, max_staleness=0, limit=17 * GIB)
    with pytest.raises(ConfigError) as error:
        memory.require_room(STATE, SAMPLER, max_staleness=1, limit=17 * GIB)
    assert str(error.value) == (
        "sampling in this process must fit beside the learner: each device would hold 4.00 GiB of "
        "the sampler's weights, its cache of 1.00 GiB (engine.num_slots x engine.max_tokens) and "
        "16.00 GiB of state, and has 17.00 GiB; take a smaller model or cache, or devices with "
        "more memory."
    )


class _Accelerator:
    def memory_stats(self):
        return {"bytes_limit": 1000}


def test_devices_that_tell_their_size_are_asked(monkeypatch):
    config = default_config()
    model = models.init(small.decoder_config(), seed=0)
    mesh = sharding.one_device()
    made = build.policy_learner(config, model, mesh)
    memory.check_sampler(config, model, made, mesh)  # CPUs do not tell
    monkeypatch.setattr(jax, "local_devices", lambda: [_Accelerator()])
    with pytest.raises(ConfigError, match=r"and has 0\.00 GiB"):
        memory.check_sampler(config, model, made, mesh)
