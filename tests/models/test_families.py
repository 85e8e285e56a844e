"""Every family against numbers that transformers computed, and what its config.json may say."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from codjax import models, validation
from codjax.models import blocks, families
from codjax.models import config as config_lib
from tests import small
from tests.models import cases

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "families.json").read_text())
EXPERTS = {
    "family": "qwen3_moe",
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_intermediate_size": 8,
}


def read(fields):
    return models.DecoderConfig.from_hf(
        fields, dtype="float32", param_dtype="float32", remat="none"
    )


@pytest.mark.parametrize("name", cases.CASES)
def test_log_probs_and_greedy_continuations_are_those_of_transformers(name, tmp_path):
    expected = GOLDEN[name]
    cases.write_folder(tmp_path, cases.fields_of(name), expected["tensors"])
    model = models.from_pretrained(tmp_path)
    tokens = cases.tokens_of(2, 24)
    # float32 sums in another order; the numbers are of a few units.
    np.testing.assert_allclose(models.score(model, tokens), expected["logprobs"], atol=1e-4)
    found = cases.greedy(model, tokens[:, :9], cases.NUM_NEW)
    assert found.tolist() == expected["greedy"]


@pytest.mark.parametrize("name", cases.CASES)
def test_config_json_written_and_read_is_the_same_decoder(name):
    config = read(cases.fields_of(name))
    assert read(config.to_hf()) == config
    assert config.to_hf()["max_position_embeddings"] == 512


@pytest.mark.parametrize("name", cases.CASES)
def test_folders_give_every_parameter_back(name, tmp_path):
    model = models.init(read(cases.fields_of(name)), seed=3)
    models.save_pretrained(model, tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(model),
        nnx.state(models.from_pretrained(tmp_path)),
    )


def test_pieces_with_the_cache_equal_the_whole_for_experts():
    """Chunks of a prompt meet the experts in other company, and must not notice."""
    model = models.init(small.decoder_config(**EXPERTS), seed=0)
    tokens = jnp.asarray(cases.tokens_of(2, 12) % 24)
    index = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    whole = model(tokens, index, jnp.full((2, 12), 12))
    cache, parts = models.init_cache(model.config, 2, 12), []
    for begin, end in ((0, 7), (7, 8), (8, 12)):
        part, cache = models.extend(
            model, cache, tokens[:, begin:end], jnp.full(2, begin, jnp.int32)
        )
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


MOE = cases.fields_of("qwen3_moe")
LLAMA = cases.fields_of("llama3_scaled")
WITHOUT_EXPERTS = {name: value for name, value in MOE.items() if name != "num_experts"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2; codjax supports 1 only"),
        (MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]; codjax supports \[\] only"),
        (WITHOUT_EXPERTS, "lacks num_experts"),
        (MOE | {"num_experts": None}, "num_experts = None; it must be a whole number"),
        (MOE | {"num_local_experts": 7}, "num_local_experts = 7 and num_experts = 6, which are"),
        (MOE | {"num_key_value_heads": None}, "num_key_value_heads = None; it must be a whole"),
        (MOE | {"head_dim": None}, "head_dim = None; it must be a whole number"),
        (cases.fields_of("qwen3") | {"head_dim": None}, "head_dim = None; it must be a whole num"),
        (cases.fields_of("qwen2") | {"head_dim": None}, "head_dim = None; it must be a whole num"),
        (LLAMA | {"tie_word_embeddings": "false"}, "= 'false'; it must be true or false"),
        (LLAMA | {"attention_bias": 0}, "attention_bias = 0; it must be true or false"),
        (LLAMA | {"num_hidden_layers": 36.7}, "num_hidden_layers = 36.7; it must be a whole num"),
        (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers = True; it must be a whole num"),
        (LLAMA | {"hidden_size": "32"}, "hidden_size = '32'; it must be a whole number"),
        (LLAMA | {"vocab_size": 0}, "vocab_size = 0; it must be above 0"),
        (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps = -1; it must be above 0"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan; it must be a finite number"),
        (LLAMA | {"initializer_range": -0.1}, "initializer_range = -0.1; it must be at least 0"),
        (LLAMA | {"rope_theta": None}, "rope_theta = None; it must be a finite number"),
        (LLAMA | {"rope_theta": 0}, "rope_theta = 0; it must be above 0"),
        (LLAMA | {"rope_theta": float("inf")}, "rope_theta = inf; it must be a finite number"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta = 1000.*; it must be a finite number"),
        (LLAMA | {"dual_chunk_attention_config": {"chunk_size": 9}}, "dual_chunk_attention_config"),
        (MOE | {"num_experts_per_tok": 7}, "experts_per_token must be at most .* = 6; got 7"),
        (MOE | {"use_sliding_window": True}, "use_sliding_window = True"),
        (cases.fields_of("qwen2") | {"use_sliding_window": True}, "use_sliding_window = True"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved = True"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = "),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' with factor"),
        (LLAMA | {"rope_parameters": {"rope_theta": 5e3}}, "different rotary scalings"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA | {"model_type": "qwen3_5"}, "model_type 'qwen3_5'; codjax has the decoders of"),
    ],
)
def test_settings_that_we_do_not_honour_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        read(fields)


def test_the_names_that_transformers_writes_are_read_too():
    renamed = {k: v for k, v in MOE.items() if k != "num_experts"} | {"num_local_experts": 6}
    assert read(renamed) == read(MOE)
    spelled = {k: v for k, v in LLAMA.items() if not k.startswith("rope_")}
    spelled["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}
    assert read(spelled) == read(LLAMA)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (8, 4)),  # D / N, and as many key-value heads as heads
        ({"num_key_value_heads": 2, "head_dim": 6}, (6, 2)),
        ({"head_dim": None, "num_key_value_heads": None}, (8, 4)),
    ],
)
def test_sizes_that_a_llama_leaves_out(fields, expected):
    bare = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
    config = read(bare | fields)
    assert (config.head_dim, config.num_kv_heads) == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_absent_and_null_are_what_transformers_makes_of_them(name):
    transformers = pytest.importorskip("transformers")
    from huggingface_hub import errors

    optional = ("head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    sizes = cases.fields_of({"llama": "smollm2"}.get(name, name)) | {"num_attention_heads": 32}
    sizes["hidden_size"] = 32 * 6
    bare = {key: value for key, value in sizes.items() if key not in optional}
    for changes in ({}, *({key: None} for key in optional)):
        try:
            theirs = transformers.AutoConfig.for_model(**bare, **changes)
        except errors.StrictDataclassError:  # of the kind of the value
            theirs = None
        if theirs is None or (name in ("qwen2", "qwen3_moe") and "head_dim" in changes):
            with pytest.raises(ValueError, match=r"= None; it must be a"):
                read(bare | changes)  # theirs is refused, or fails when the model is made
            continue
        ours = read(bare | changes)
        default = theirs.hidden_size // theirs.num_attention_heads
        assert ours.head_dim == getattr(theirs, "head_dim", default)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.norm_eps == theirs.rms_norm_eps


def test_tokens_of_pre_training_are_the_positions_unless_they_are_said():
    scaling = {k: v for k, v in LLAMA["rope_scaling"].items() if "original" not in k}
    bare = {k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}
    assert read(LLAMA | {"rope_scaling": scaling}).rope_scaling.original_tokens == 512
    assert read(bare | {"rope_scaling": scaling}).rope_scaling.original_tokens == 2048


def test_llama3_scaling_keeps_fast_turns_and_slows_the_others():
    """Turns within 64 tokens: 10.2 (kept), 2.5 (between), 0.6 and 0.14 (divided by 8)."""
    config = small.decoder_config(
        head_dim=8,
        rope_theta=256.0,
        rope_scaling=models.RopeScaling(kind="llama3", factor=8.0, original_tokens=64),
    )
    plain = blocks.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    kept = (64 * 0.25 / (2 * np.pi) - 1) / 3
    expected = [1.0, 0.25 * (kept + (1 - kept) / 8), 0.0625 / 8, 0.015625 / 8]
    np.testing.assert_allclose(plain, [1.0, 0.25, 0.0625, 0.015625], rtol=1e-6)
    np.testing.assert_allclose(blocks.rope_frequencies(config), expected, rtol=1e-5)


def test_rope_scaling_comes_back_from_json():
    scaling = models.RopeScaling(kind="linear", factor=2.0)
    config = small.decoder_config(rope_scaling=scaling)
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    assert models.DecoderConfig(**written) == config
    with pytest.raises(ValueError, match=r"rope scaling must be one of .* got 'yarn'"):
        models.RopeScaling(kind="yarn", factor=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "mamba"}, r"model.family must be one of .*; got 'mamba'"),
        ({"num_experts": 4}, "model.num_experts must be 0 with model.family qwen3"),
        (EXPERTS | {"experts_per_token": 0}, "model.experts_per_token must be at least 1"),
        (EXPERTS | {"experts_per_token": 5}, "must be at most model.num_experts = 4; got 5"),
    ],
)
def test_experts_and_family_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        small.decoder_config(**changes)


def test_one_table_of_families():
    assert tuple(families.FAMILIES) == config_lib.FAMILIES
    assert validation.NAMES["model.family"] == config_lib.FAMILIES
