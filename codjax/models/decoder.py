"""The decoder: token table, layers of attention and MLP under norms, output table.

What a layer consists of is its family's (`models/families.py`).

    model = init(config, seed=0)
    hidden = model(tokens, token_positions, subtree_end)          # [B T D], of a TokenBatch
    logits = hidden @ model.unembedding.T                         # but see codjax.logprobs

`param_specs` is the one table of parameters: name, shape, logical axes, initial values. Layers are
stacked along a leading axis and scanned, so that compile time does not grow with depth. Letters
are those of `codjax.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from codjax_kernels import embedding_lookup, forest_attention
from flax import nnx
from jaxtyping import Array, Float, Int

from codjax import seeds
from codjax.models import blocks, experts, families
from codjax.models.config import DecoderConfig
from codjax.models.family import Layer, ParamSpec, Rope, RunExperts

Constrain = Callable[[Array, tuple[str, ...]], Array]
Attend = Callable[[Array, Array, Array, Array], Array]
Lookup = Callable[[Array, Array, str], Array]

_ACTIVATION_AXES = ("batch", "tokens", "width")
_LAYERS = "layers."


def param_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Every parameter by name; those of the layers begin with "layers." and have L leading."""
    width = config.hidden_size
    table = ParamSpec((config.vocab_size, width), ("vocab", "embed"), config.embedding_std)
    specs = {"embedding": table, "final_norm": ParamSpec((width,), ("norm",), None)}
    if not config.tie_embeddings:
        specs["output"] = table._replace(init_std=config.init_std)
    for name, spec in families.of(config).layer_specs(config).items():
        shape, axes = (config.num_layers, *spec.shape), ("layers", *spec.axes)
        specs[_LAYERS + name] = ParamSpec(shape, axes, spec.init_std)
    return specs


def init(config: DecoderConfig, seed: int) -> Decoder:
    """A fresh model: normal matrices, norms of 1, biases of 0; every parameter has its own key.

    For large models, jit it with shardings: ``jax.jit(lambda: nnx.to_pure_dict(nnx.state(
    init(config, seed))), out_shardings=sharding.param_shardings(nnx.eval_shape(…), mesh))``.
    """
    params = {}
    for name, spec in param_specs(config).items():
        if spec.init_std is None:
            params[name] = jnp.ones(spec.shape, config.param_dtype)
        else:
            key = jax.random.key(seeds.derive_seed(seed, "model", name))
            values = spec.init_std * jax.random.normal(key, spec.shape, jnp.float32)
            params[name] = values.astype(config.param_dtype)
    return Decoder(config, params)


class Decoder(nnx.Module):
    """A decoder; its parameters are `nnx.Param`s that carry `logical_axes`.

    Attributes:
        config: sizes and numerics.
        embedding: token table `[V D]`.
        layers: parameters of all layers by name, L leading.
        final_norm: scale `[D]`.
        output: output table `[V D]`, or None when it is the token table.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Array]):
        """Hold these parameters; names and shapes are those of `param_specs(config)`."""
        specs = param_specs(config)
        held = {
            name: nnx.Param(params[name], logical_axes=spec.axes) for name, spec in specs.items()
        }
        self.config = config
        self.embedding = held["embedding"]
        self.layers = nnx.Dict(
            {
                name.removeprefix(_LAYERS): param
                for name, param in held.items()
                if name.startswith(_LAYERS)
            }
        )
        self.final_norm = held["final_norm"]
        self.output = held.get("output")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        token_positions: Int[Array, "B T"],
        subtree_end: Int[Array, "B T"],
        *,
        constrain: Constrain = lambda x, axes: x,
        attend: Attend = forest_attention,
        lookup: Lookup = embedding_lookup,
        run_experts: RunExperts = experts.run,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm, in the compute dtype.

        Args:
            tokens: ids in `[0, V)`.
            token_positions: depth from the sequence's own start.
            subtree_end: token `i` sees token `j` of its row iff ``j <= i < subtree_end[j]``.
            constrain: pins activations, given with their logical axes, to a mesh;
                `sharding.constrain(mesh)` makes one.
            attend: attention under the interval mask, ``(q, k, v, subtree_end)``; on a mesh,
                `codjax_kernels.forest_attention` with its layout bound.
            lookup: rows of the token table, ``(table, tokens, dtype)``; on a mesh,
                `codjax_kernels.embedding_lookup` with its layout bound.
            run_experts: of families that have experts; on a mesh, `sharding.run_experts(mesh)`.
        """
        config = self.config
        rope = blocks.rope_angles(token_positions, config)

        def run_layer(x: Array, stored: Mapping[str, Array]) -> tuple[Array, None]:
            layer = in_compute_dtype(stored, config)
            q, k, v = attention_inputs(layer, x, rope, config)
            attended = attend(q, k, v, subtree_end)
            x = layer_output(layer, x, attended, config, run_experts=run_experts)
            return constrain(x, _ACTIVATION_AXES), None

        x = constrain(self.embed(tokens, lookup), _ACTIVATION_AXES)
        x, _ = jax.lax.scan(_rematerialised(run_layer, config.remat), x, self.layer_arrays())
        return self.normalise(x)

    def embed(
        self, tokens: Int[Array, "B T"], lookup: Lookup = embedding_lookup
    ) -> Float[Array, "B T D"]:
        """Rows of the token table, in the compute dtype."""
        return lookup(self.embedding[...], tokens, self.config.dtype)

    def layer_arrays(self) -> dict[str, Array]:
        """Parameters of all layers by name, L leading: what `jax.lax.scan` takes."""
        return {name: param[...] for name, param in self.layers.items()}

    def normalise(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm."""
        return blocks.rms_norm(x, self.final_norm[...].astype(x.dtype), self.config.norm_eps)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The output table, in the compute dtype."""
        table = self.embedding if self.output is None else self.output
        return table[...].astype(self.config.dtype)


def logical_axes(model: Decoder) -> dict[str, Any]:
    """Logical axes of every parameter, in the nested dict of `nnx.to_pure_dict(nnx.state(model))`.

    Leaves are tuples of names, one a dimension. The model may be abstract (`nnx.eval_shape`).
    """

    def axes(param: nnx.Variable) -> tuple[str, ...]:
        return param.get_metadata()["logical_axes"]

    def is_param(node: object) -> bool:
        return isinstance(node, nnx.Variable)

    return nnx.to_pure_dict(jax.tree.map(axes, nnx.state(model), is_leaf=is_param))


def attention_inputs(
    layer: Layer, x: Float[Array, "B T D"], rope: Rope, config: DecoderConfig
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
    """Queries, keys and values of a layer, turned to their positions."""
    x = blocks.rms_norm(x, layer["attention_norm"], config.norm_eps)
    return families.of(config).attention_inputs(layer, x, rope, config)


def layer_output(
    layer: Layer,
    x: Float[Array, "B T D"],
    attended: Float[Array, "B T N H"],
    config: DecoderConfig,
    *,
    run_experts: RunExperts = experts.run,
) -> Float[Array, "B T D"]:
    """The layer's result: its input, what it attended to, and the MLP of both."""
    x = x + blocks.attention_output(layer, attended)
    y = blocks.rms_norm(x, layer["mlp_norm"], config.norm_eps)
    return x + families.of(config).mlp(layer, y, config, run_experts)


def in_compute_dtype(stored: Mapping[str, Array], config: DecoderConfig) -> Layer:
    """Parameters as the matrix products take them."""
    return {name: value.astype(config.dtype) for name, value in stored.items()}


def _rematerialised(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`body` of a scan, with the intermediate values that `remat` names computed again."""
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    if remat == "none":
        return body
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)
