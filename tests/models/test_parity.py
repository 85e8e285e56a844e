"""Every family against transformers' own, on weights that transformers initialised and wrote.

Needs torch; what runs without it is `test_families.py`, against numbers that

    python -m tests.models.test_parity > tests/golden/families.json

wrote: log-probabilities and greedy continuations of transformers. A real pretrained model is among
them where CODJAX_SMOLLM2 names the folder that `scripts/fetch_smollm2.py` makes:

    CODJAX_SMOLLM2=~/smollm2-135m-instruct pytest tests/models/test_parity.py -k pretrained -s
"""

import json
import os
import pathlib
import sys
import tempfile

import numpy as np
import pytest
import safetensors.numpy

from codjax import models
from tests.models import cases

REASON = "torch is not installed: pip install torch==2.13.0"
# float32 sums in another order, through two layers with weights of 0.3 and logits of a few units.
TOLERANCE = 1e-4


def their_model(fields):
    """A model of theirs with their own first weights, but norms that are not 1 and biases not 0."""
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def their_scores(model, tokens):
    import torch

    with torch.no_grad():
        rows = torch.from_numpy(tokens).long()
        scores = torch.log_softmax(model(rows).logits[:, :-1].float(), -1)
        return torch.gather(scores, -1, rows[:, 1:, None])[..., 0].numpy()


def their_greedy(model, prompt, num_new):
    """Not `generate`, which stops at the end-of-text ids that some of the classes begin with."""
    import torch

    rows = torch.from_numpy(prompt).long()
    with torch.no_grad():
        for _ in range(num_new):
            rows = torch.cat([rows, model(rows).logits[:, -1].argmax(-1, keepdim=True)], -1)
    return rows[:, prompt.shape[1] :].numpy()


@pytest.mark.parametrize("name", cases.CASES)
def test_agrees_with_transformers_on_weights_it_wrote(name, tmp_path):
    theirs = their_model(cases.fields_of(name))
    theirs.save_pretrained(tmp_path)
    ours = models.from_pretrained(tmp_path)
    tokens = cases.tokens_of(3, 24)
    scores = models.score(ours, tokens)
    np.testing.assert_allclose(scores, their_scores(theirs, tokens), atol=TOLERANCE)
    prompt = tokens[:, :9]
    expected = their_greedy(theirs, prompt, cases.NUM_NEW)
    np.testing.assert_array_equal(cases.greedy(ours, prompt, cases.NUM_NEW), expected)


@pytest.mark.parametrize("name", cases.CASES)
def test_transformers_loads_what_we_write(name, tmp_path):
    pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers")
    config = models.DecoderConfig.from_hf(
        cases.fields_of(name), dtype="float32", param_dtype="float32", remat="none"
    )
    ours = models.init(config, seed=0)
    models.save_pretrained(ours, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto"
    )
    assert not any(report.values())
    tokens = cases.tokens_of(2, 24)
    expected = their_scores(theirs.eval(), tokens)
    np.testing.assert_allclose(models.score(ours, tokens), expected, atol=TOLERANCE)


REAL_TEXTS = (
    "The capital of France is Paris, and that of Italy is",
    "Sort the numbers 3, 1 and 2. Then say which of them is the largest, and why.",
    " ".join(f"{i} times {i} is {i * i}." for i in range(1, 90)),
)


@pytest.mark.skipif("CODJAX_SMOLLM2" not in os.environ, reason="CODJAX_SMOLLM2 names no folder")
def test_agrees_with_transformers_on_a_pretrained_model():
    pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers")
    folder = pathlib.Path(os.environ["CODJAX_SMOLLM2"]).expanduser()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    ).eval()
    ours = models.from_pretrained(folder)
    for text in REAL_TEXTS:
        tokens = np.asarray([tokenizer(text)["input_ids"]], np.int32)
        found, expected = models.score(ours, tokens), their_scores(theirs, tokens)
        difference = np.abs(np.asarray(found) - expected).max()
        sys.stdout.write(f"{tokens.size} tokens: log-probs differ by at most {difference:.1e}\n")
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    for text in REAL_TEXTS[:2]:
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = np.asarray([tokenizer(chat)["input_ids"]], np.int32)
        expected = their_greedy(theirs, prompt, 24)
        np.testing.assert_array_equal(cases.greedy(ours, prompt, 24), expected)
        sys.stdout.write(f"{prompt.size} tokens, then {tokenizer.decode(expected[0])!r}\n")


def golden(name):
    """What transformers computes with weights that follow from the names of its tensors."""
    import transformers

    fields = cases.fields_of(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        their_model(fields).save_pretrained(folder)
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        shapes = {name: list(tensors[name].shape) for name in sorted(tensors)}
        cases.write_folder(folder, fields, shapes)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        )
    tokens = cases.tokens_of(2, 24)
    return {
        "tensors": shapes,
        "logprobs": np.round(their_scores(model.eval(), tokens).astype(float), 6).tolist(),
        "greedy": their_greedy(model, tokens[:, :9], cases.NUM_NEW).tolist(),
    }


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(golden(name))}' for name in cases.CASES]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")
