"""Small Hugging Face folders to convert, and what came of them."""

import json

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from codjax import models
from codjax.models import hf_names
from tests import small


def random_model(config):
    """Every parameter random, norms too; made by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=spec.shape), config.param_dtype)
        for name, spec in hf_names.param_specs(config).items()
    }
    return models.Decoder(config, params)


def write_model(folder, *, dtype="bfloat16", max_shard_bytes=10**9, **changes):
    """A Hugging Face folder of a small random model, with the files that come with one."""
    models.save_pretrained(
        random_model(small.decoder_config(num_layers=3, param_dtype=dtype, **changes)),
        folder,
        extra_fields={"eos_token_id": 5},
        max_shard_bytes=max_shard_bytes,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"):
        (folder / name).write_text(f'{{"of": "{name}"}}')
    (folder / "README.md").write_text("not a part of the model")
    return folder


def tensors_in(folder):
    """Name → dtype, shape and bytes of every tensor in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            for name in names:
                array = tensors.get_tensor(name)
                found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


def line_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def set_field(**changes):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return change
