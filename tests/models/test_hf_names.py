"""Every parameter of every family ↔ the tensors that transformers stores it in."""

import numpy as np
import pytest

from codjax.models import hf_folder, hf_names
from codjax.models.qwen3 import ParamSpec

L, D, N, M, H, F, E, V = 3, 6, 4, 2, 5, 7, 4, 11
ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
# Parameter → axes after the layers', shape there, tensor, shape of the tensor.
TABLE = {
    "embedding": (("vocab", "embed"), (V, D), "model.embed_tokens.weight", (V, D)),
    "output": (("vocab", "embed"), (V, D), "lm_head.weight", (V, D)),
    "final_norm": (("norm",), (D,), "model.norm.weight", (D,)),
    "layers.attention_norm": (("norm",), (D,), "model.layers.{}.input_layernorm.weight", (D,)),
    "layers.query": (("embed", "heads", "head_dim"), (D, N, H), ATTENTION + "q_proj.weight", None),
    "layers.query_bias": (("heads", "head_dim"), (N, H), ATTENTION + "q_proj.bias", (N * H,)),
    "layers.key": (("embed", "kv_heads", "head_dim"), (D, M, H), ATTENTION + "k_proj.weight", None),
    "layers.key_bias": (("kv_heads", "head_dim"), (M, H), ATTENTION + "k_proj.bias", (M * H,)),
    "layers.value_bias": (("kv_heads", "head_dim"), (M, H), ATTENTION + "v_proj.bias", (M * H,)),
    "layers.query_norm": (("head_dim",), (H,), ATTENTION + "q_norm.weight", (H,)),
    "layers.attention_output": (
        ("heads", "head_dim", "embed"),
        (N, H, D),
        ATTENTION + "o_proj.weight",
        (D, N * H),
    ),
    "layers.attention_output_bias": (("norm",), (D,), ATTENTION + "o_proj.bias", (D,)),
    "layers.gate": (("embed", "mlp"), (D, F), MLP + "gate_proj.weight", (F, D)),
    "layers.gate_bias": (("mlp",), (F,), MLP + "gate_proj.bias", (F,)),
    "layers.down": (("mlp", "embed"), (F, D), MLP + "down_proj.weight", (D, F)),
    "layers.down_bias": (("norm",), (D,), MLP + "down_proj.bias", (D,)),
    "layers.router": (("embed", "experts"), (D, E), MLP + "gate.weight", (E, D)),
}
EXPERTS = {
    "layers.gate": (("embed", "mlp"), (D, F), MLP + "experts.{}.gate_proj.weight", (F, D)),
    "layers.up": (("embed", "mlp"), (D, F), MLP + "experts.{}.up_proj.weight", (F, D)),
    "layers.down": (("mlp", "embed"), (F, D), MLP + "experts.{}.down_proj.weight", (D, F)),
}


def spec_of(name, axes, shape, *, num_experts=0):
    stacked = [("layers", L)] if name.startswith("layers.") else []
    stacked += [("experts", num_experts)] if num_experts else []
    names, sizes = [axis for axis, _ in stacked], [size for _, size in stacked]
    return ParamSpec((*sizes, *shape), (*names, *axes), None)


CASES = [(name, spec_of(name, *row[:2]), *row[2:]) for name, row in TABLE.items()] + [
    (name, spec_of(name, *row[:2], num_experts=E), *row[2:]) for name, row in EXPERTS.items()
]
IDS = [case[2] for case in CASES]


@pytest.mark.parametrize(("name", "spec", "template", "shape"), CASES, ids=IDS)
def test_the_tensors_of_a_parameter(name, spec, template, shape):
    found = hf_names.counterpart(name, spec)
    assert found.template == template
    if shape is not None:
        assert found.tensor_shape == shape
    assert len(list(found.tensors())) == np.prod(spec.shape[: found.num_stacked])

    value = np.arange(np.prod(spec.shape)).reshape(spec.shape)
    tensors = {tensor: found.to_tensor(value[index]) for tensor, index in found.tensors()}
    for tensor, index in found.tensors():
        if "embed_tokens" in template or "lm_head" in template:
            expected = value
        elif len(found.tensor_shape) == 2:  # [out in]
            expected = value[index].reshape(found.tensor_shape[::-1]).T
        else:
            expected = value[index].reshape(-1)
        np.testing.assert_array_equal(tensors[tensor], expected)

    rng = np.random.default_rng(0)
    for trial in range(20):
        sizes_read = []

        def read_tensor(tensor, index, sizes_read=sizes_read):
            sizes_read.append(tensors[tensor][index].size)
            return tensors[tensor][index]

        ends = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in spec.shape]
        part = [slice(*map(int, pair)) for pair in ends]
        cuts_heads = "head_dim" in spec.axes and trial % 2  # no sharding does
        if "head_dim" in spec.axes and not cuts_heads:
            part[spec.axes.index("head_dim")] = slice(None)
        part = tuple(part)
        np.testing.assert_array_equal(found.read(part, read_tensor, value.dtype), value[part])
        if not cuts_heads:
            assert sum(sizes_read) == value[part].size  # nothing is read that is not wanted
    everything = (slice(None),) * value.ndim
    np.testing.assert_array_equal(found.read(everything, read_tensor, value.dtype), value)


def test_names_are_listed_by_runs():
    experts = [f"a.{layer}.b.{expert}.w" for layer in range(3) for expert in (0, 1, 5)]
    assert hf_names.collapsed([*experts, "z"]) == ["a.{0-2}.b.{0-1,5}.w", "z"]
    assert hf_names.collapsed(["a.7.w"]) == ["a.7.w"]


def test_mismatches_are_counted_and_all_named():
    wanted = {f"a.{layer}.w": (2, 3) for layer in range(40)}
    found = {f"a.{layer}.w": (3, 2) for layer in range(10)} | {"b": (1,), "c": (1,)}
    assert hf_names.mismatches(found, wanted) == [
        "30 missing, 2 unexpected, 10 of another shape",
        "missing a.{10-39}.w",
        "unexpected b",
        "unexpected c",
        "a.{0-9}.w has shape (3, 2), not (2, 3)",
    ]
    assert hf_names.mismatches(wanted, wanted) == []


@pytest.mark.parametrize(
    ("model_type", "fields", "params"),
    [
        ("qwen2", {}, {"query_bias", "key_bias", "value_bias", "gate", "up", "down"}),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            {"query_bias", "key_bias", "value_bias", "attention_output_bias", "gate", "gate_bias"}
            | {"up", "up_bias", "down", "down_bias"},
        ),
        ("qwen3_moe", {"num_experts": 2, "head_dim": 4}, {"query_norm", "key_norm", "router"}),
    ],
)
def test_transformers_has_these_names(model_type, fields, params, tmp_path):
    """The tensors of a folder that it writes are those that the table names, and no other."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 8}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert torch is not None  # transformers makes no model without it

    always = {"attention_norm", "query", "key", "value", "attention_output", "mlp_norm"}
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    axes = ("layers", "embed")
    for name in always | params:
        wanted.add(hf_names.counterpart(f"layers.{name}", ParamSpec((1, 8), axes, None)).template)
    if model_type == "qwen3_moe":
        stacked = ParamSpec((1, 2, 8), ("layers", "experts", "embed"), None)
        for name in ("gate", "up", "down"):
            template = hf_names.counterpart(f"layers.{name}", stacked).template
            wanted |= {template.format("{}", expert) for expert in (0, 1)}
    found = hf_folder.Folder(tmp_path).tensors
    assert set(found) == {name.replace("{}", "0", 1) for name in wanted}
