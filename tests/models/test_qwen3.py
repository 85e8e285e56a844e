"""The decoder against transformers' own, its folders, and token forests."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from codjax_kernels.xla import attention as xla
from flax import nnx

from codjax import logprobs, models
from codjax.models import decoder
from tests import small

CONFIG = small.decoder_config(
    vocab_size=40,
    num_layers=3,
    hidden_size=32,
    intermediate_size=48,
    head_dim=12,
    rope_theta=7000.0,
    norm_eps=1e-05,
    tie_embeddings=True,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def tokens_of(num_rows, num_tokens, *, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, (num_rows, num_tokens)).astype(np.int32)


def random_model(config=CONFIG):
    """A model whose norms are not 1, so that mixing them up shows."""
    model = models.init(config, seed=1)
    rng = np.random.default_rng(3)

    def shake(x):
        return x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)

    nnx.update(model, jax.tree.map(shake, nnx.state(model)))
    return model


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, *rows):
    return nnx.merge(graphdef, params)(*rows)


def theirs(config):
    """transformers' model with random weights, also in the norms."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = config.to_hf() | {"_attn_implementation": "eager"}
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def their_scores(model, tokens):
    import torch

    with torch.no_grad():
        rows = torch.from_numpy(tokens).long()
        scores = torch.log_softmax(model(rows).logits[:, :-1].float(), -1)
        return torch.gather(scores, -1, rows[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_agrees_with_transformers_on_weights_it_wrote(config, tmp_path):
    model = theirs(config)
    model.save_pretrained(tmp_path)
    tokens = tokens_of(3, 21)
    ours = models.from_pretrained(tmp_path)
    assert ours.config == dataclasses.replace(config, embedding_std=config.init_std)
    np.testing.assert_allclose(models.score(ours, tokens), their_scores(model, tokens), atol=1e-4)


def test_reads_sharded_folders(tmp_path):
    model = theirs(UNTIED)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tokens = tokens_of(2, 9)
    got = models.score(models.from_pretrained(tmp_path), tokens)
    np.testing.assert_allclose(got, their_scores(model, tokens), atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_transformers_agrees_with_what_we_write(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    models.save_pretrained(model, tmp_path, extra_fields={"eos_token_id": 5})
    loaded, report = transformers.Qwen3ForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto"
    )
    assert not any(report.values())
    assert loaded.config.eos_token_id == 5
    tokens = tokens_of(3, 21)
    np.testing.assert_allclose(models.score(model, tokens), their_scores(loaded, tokens), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writing_and_reading_gives_the_parameters_back(dtype, tmp_path):
    model = random_model(dataclasses.replace(UNTIED, param_dtype=dtype))
    models.save_pretrained(model, tmp_path)
    again = models.from_pretrained(tmp_path, param_dtype=dtype, remat="full")
    assert again.config.remat == "full"
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(again))


def test_tied_table_stored_twice_must_be_the_same(tmp_path):
    models.save_pretrained(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, file)
    models.from_pretrained(tmp_path)
    tensors["lm_head.weight"] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head"):
        models.from_pretrained(tmp_path)


def test_wrong_tensors_are_listed(tmp_path):
    models.save_pretrained(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="the tensors are not those of") as error:
        models.from_pretrained(tmp_path)
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight has shape (31,), not (32,)",
        "model.layers.2.mlp.up_proj.weight is I8, not a float",
    ):
        assert part in str(error.value)


def test_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; give a Hugging Face"):
        models.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling = "),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 7e3}}, "'linear' with a factor"),
        ({"rope_parameters": {"rope_theta": 7e3, "partial_rotary_factor": 0.5}}, "'default'"),
        ({"rope_theta": 5e5}, "different rotary bases"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types = \['sliding_attention'\]"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size = None; it must be a whole number"),
        ({"head_dim": 11}, "model.head_dim must be even"),
        ({"num_key_value_heads": 3}, "multiple of model.num_kv_heads = 3"),
    ],
)
def test_fields_that_we_do_not_honour_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        models.DecoderConfig.from_hf(
            CONFIG.to_hf() | fields, dtype="float32", param_dtype="float32", remat="none"
        )


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({}, 1e4),
    ],
)
def test_both_spellings_of_the_rotary_base(rope, theta):
    fields = CONFIG.to_hf()
    del fields["rope_theta"], fields["rope_parameters"]
    config = models.DecoderConfig.from_hf(
        fields | rope, dtype="float32", param_dtype="float32", remat="none"
    )
    assert config.rope_theta == theta


def test_bad_config_names_the_key():
    with pytest.raises(ValueError, match=r"model.remat must be one of .*; got 'some'"):
        dataclasses.replace(CONFIG, remat="some")
    with pytest.raises(ValueError, match=r"model.num_layers must be at least 1; got 0"):
        dataclasses.replace(CONFIG, num_layers=0)


def test_parameters_have_keys_of_their_own_names():
    deep, wide = (
        models.init(dataclasses.replace(CONFIG, **change), seed=4)
        for change in ({}, {"intermediate_size": 64})
    )
    np.testing.assert_array_equal(deep.embedding[...], wide.embedding[...])
    np.testing.assert_array_equal(deep.layers["query"][...], wide.layers["query"][...])
    std = float(jnp.std(deep.layers["gate"][...]))
    assert std == pytest.approx(CONFIG.init_std, rel=0.05)
    assert float(jnp.std(deep.embedding[...])) == pytest.approx(CONFIG.embedding_std, rel=0.05)
    assert float(jnp.max(jnp.abs(deep.final_norm[...] - 1))) == 0.0


def test_logical_axes_line_up_with_the_parameters():
    model = nnx.eval_shape(lambda: models.init(UNTIED, 0))
    params, axes = nnx.to_pure_dict(nnx.state(model)), models.logical_axes(model)
    ranks = jax.tree.map(lambda x: x.ndim, params)
    assert ranks == jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert axes["layers"]["query"] == ("layers", "embed", "heads", "head_dim")
    assert axes["output"] == axes["embedding"] == ("vocab", "embed")


def test_score_takes_lists_and_rejects_nonsense():
    model = random_model()
    tokens = tokens_of(2, 6)
    as_list = models.score(model, tokens.tolist())
    np.testing.assert_array_equal(as_list, models.score(model, jnp.asarray(tokens)))
    assert models.score(model, tokens[:, :1]).shape == (2, 0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 40\)"):
        models.score(model, [[0, 40]])
    with pytest.raises(ValueError, match=r"whole numbers \[B T\]"):
        models.score(model, [0, 1])


# A forest of one row: two sequences with a common prefix of 3, then a lone third sequence.
#   0 ─ 1 ─ 2 ─ 3 ─ 4 ─ 5      branch a, tokens 3..5
#           └── 6 ─ 7          branch b, tokens 6..7
#   8 ─ 9 ─ 10
SUBTREE_END = np.array([[8, 8, 8, 6, 6, 6, 8, 8, 11, 11, 11]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2]], np.int32)
SEQUENCES = ([0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7], [8, 9, 10])


def test_forest_equals_every_sequence_alone():
    model, row = random_model(), tokens_of(1, 11)
    hidden = forward(*nnx.split(model), row, POSITIONS, SUBTREE_END)
    for index in SEQUENCES:
        length = len(index)
        plain = row[:, index]
        ends = np.full((1, length), length)
        alone = forward(*nnx.split(model), plain, np.arange(length)[None], ends)
        np.testing.assert_allclose(hidden[:, index], alone, atol=1e-5)


def test_forest_gradient_equals_the_sum_over_sequences():
    model, row = random_model(), tokens_of(1, 11)
    graphdef, params = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(params, rows, source, target):
        model = nnx.merge(graphdef, params)
        hidden = model(*rows)
        scores, _ = logprobs.scored_logprobs(hidden, model.unembedding, source, target)
        return jnp.sum(scores)

    edges = np.array([edge for index in SEQUENCES for edge in itertools.pairwise(index)])
    forest = gradient(params, (row, POSITIONS, SUBTREE_END), edges[None, :, 0], row[:, edges[:, 1]])
    total = jax.tree.map(jnp.zeros_like, params)
    for index in SEQUENCES:
        length = len(index)
        plain = (row[:, index], np.arange(length)[None], np.full((1, length), length))
        alone = gradient(params, plain, np.arange(length - 1)[None], row[:, index[1:]])
        total = jax.tree.map(jnp.add, total, alone)
    for one, other in zip(jax.tree.leaves(forest), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(other))))


def test_a_token_cannot_move_another_tree_branch_or_the_past():
    model, row = random_model(), tokens_of(1, 11)
    hidden = forward(*nnx.split(model), row, POSITIONS, SUBTREE_END)
    changed = row.copy()
    changed[0, 4] = (row[0, 4] + 1) % CONFIG.vocab_size
    other = forward(*nnx.split(model), changed, POSITIONS, SUBTREE_END)
    moved = np.any(np.asarray(other != hidden), axis=-1)[0]
    assert np.flatnonzero(moved).tolist() == [4, 5]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    tokens = jnp.asarray(tokens_of(2, 7))

    def gradient(config):
        graphdef, params = nnx.split(models.init(config, 0))

        def loss(params):
            model = nnx.merge(graphdef, params)
            index = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
            return jnp.sum(model(tokens, index, jnp.full((2, 7), 7)) ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    saved = gradient(CONFIG)
    again = gradient(dataclasses.replace(CONFIG, remat=remat))
    for one, other in zip(saved, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(one))))


def test_long_rows_attend_in_blocks(monkeypatch):
    model, tokens = random_model(), tokens_of(1, 37)
    whole = models.score(model, tokens)
    monkeypatch.setattr(xla, "SINGLE_BLOCK_TOKENS", 8)
    monkeypatch.setattr(xla, "QUERY_BLOCK", 8)
    jax.clear_caches()
    np.testing.assert_allclose(models.score(model, tokens), whole, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_stays_close():
    narrow = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = models.init(narrow, seed=1)
    assert model.embedding[...].dtype == jnp.float32
    tokens = tokens_of(2, 9)
    index = np.broadcast_to(np.arange(9)[None], (2, 9))
    hidden = forward(*nnx.split(model), tokens, index, np.full((2, 9), 9))
    assert hidden.dtype == model.unembedding.dtype == ml_dtypes.bfloat16
    exact = models.score(models.init(CONFIG, seed=1), tokens)
    # 8-bit mantissas through 3 layers, logits of a few units.
    assert float(jnp.mean(jnp.abs(models.score(model, tokens) - exact))) < 0.1


def test_param_specs_name_every_parameter():
    model = random_model(UNTIED)
    names = {".".join(path) for path in nnx.to_flat_state(nnx.state(model)).paths}
    assert names == set(decoder.param_specs(UNTIED))


def test_config_json_is_plain(tmp_path):
    models.save_pretrained(random_model(), tmp_path, dtype="bfloat16")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}
