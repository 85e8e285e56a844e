"""What may be served, and the directories that it is served from."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from codjax.checks import WriteError
from codjax.rollout.sglang import weights
from tests.rollout.sglang import push_server, pushing

TABLE, OUTPUT = pushing.LAYOUTS


def replaced(**arrays):
    return [*(pushing.tensors_of(1) | arrays).items()]


def test_a_folder_holds_the_tensors_config_and_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    made = pushing.make(7, files=(tmp_path / "tokenizer.json",))
    staged = weights.stage_folder(made, folder=tmp_path / "shm")
    folder = tmp_path / "shm" / "weights-run-7"
    assert (staged.folder, staged.version, staged.num_bytes) == (folder, "run-7", 80)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((folder / "config.json").read_text()) == pushing.CONFIG
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, array in pushing.tensors_of(7).items():
        np.testing.assert_array_equal(found[name], array)


def test_more_than_a_shard_comes_with_an_index(tmp_path):
    folder = weights.stage_folder(pushing.make(), folder=tmp_path, max_shard_bytes=50).folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 80},
        "weight_map": {
            TABLE: "model-00001-of-00002.safetensors",
            OUTPUT: "model-00002-of-00002.safetensors",
        },
    }
    for name, file in index["weight_map"].items():
        assert list(safetensors.numpy.load_file(folder / file)) == [name]


def test_payloads_hold_the_tensors_in_buckets():
    for bucket_bytes, num_payloads in ((50, 2), (80, 1)):
        staged = weights.stage_payloads(pushing.make(3), bucket_bytes=bucket_bytes)
        assert len(staged.payloads) == num_payloads
        read = [pair for payload in staged.payloads for pair in push_server.read_payload(payload)]
        assert [name for name, _ in read] == [TABLE, OUTPUT]
        np.testing.assert_array_equal(read[1][1], pushing.tensors_of(3)[OUTPUT])


BAD = np.full((5, 2), np.nan, np.float32)
BAD[0] = 1, np.inf
REFUSED = {
    "another shape": (
        {"tensors": replaced(**{OUTPUT: np.ones((2, 5), np.float32)})},
        r"lm_head.weight of run-1 must be float32 of shape \(5, 2\), as the model has it; "
        r"got float32 of shape \(2, 5\)",
    ),
    "another dtype": (
        {"tensors": replaced(**{TABLE: np.ones((5, 2), ml_dtypes.bfloat16)})},
        r"embed_tokens.weight of run-1 must be float32 .* got bfloat16",
    ),
    "not finite": (
        {"tensors": replaced(**{OUTPUT: BAD})},
        "lm_head.weight of run-1 must be finite; 9 of 10 values are not, in float32",
    ),
    "missing": ({"tensors": replaced()[:1]}, "lm_head.weight and what follows it are missing"),
    "unknown": ({"tensors": replaced(x=np.ones(2))}, "x of run-1 is no tensor of the model"),
    "other order": (
        {"tensors": replaced()[::-1]},
        "lm_head.weight came where model.embed_tokens.weight was expected",
    ),
    "tied with an output": (
        {"config": pushing.CONFIG | {"tie_word_embeddings": True}},
        "tie_word_embeddings is True, so lm_head.weight must not be sent",
    ),
    "untied without an output": (
        {"layouts": {TABLE: pushing.LAYOUTS[TABLE]}, "tensors": replaced()[:1]},
        "tie_word_embeddings is False, so lm_head.weight must be sent",
    ),
    "a dtype that no route has": (
        {"layouts": pushing.LAYOUTS | {TABLE: (np.dtype(np.float64), (5, 2))}},
        "must be one of float32, bfloat16, float16; it is float64",
    ),
    "a probe outside the vocabulary": (
        {"probe": weights.Probe(tokens=np.asarray([1, 5]), logprobs=np.zeros(1, np.float32))},
        r"the probe must be at least 2 tokens in \[0, 5\); got \[1, 5\]",
    ),
    "a probe without log-probs": (
        {"probe": weights.Probe(tokens=np.asarray([1, 2]), logprobs=np.asarray([np.nan]))},
        r"the probe must have 1 finite log-probs; got \[nan\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_be_served_is_refused_and_leaves_nothing(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(weights.WeightsError, match=message):
        weights.stage_folder(pushing.make(**changes), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(weights.WeightsError, match=message):
        weights.stage_payloads(pushing.make(**changes))


def test_tied_embeddings_are_sent_without_an_output():
    made = pushing.make(
        config=pushing.CONFIG | {"tie_word_embeddings": True},
        layouts={TABLE: pushing.LAYOUTS[TABLE]},
        tensors=replaced()[:1],
    )
    assert [name for name, _ in weights.checked(made)] == [TABLE]


def test_a_version_that_is_there_is_replaced_as_a_whole(tmp_path):
    """A resumed run writes its versions again; a server may still read the files of the old."""
    folder = weights.stage_folder(pushing.make(), folder=tmp_path).folder
    (folder / "left").write_text("of the old")
    old = (folder / "model.safetensors").open("rb")
    weights.stage_folder(pushing.make(), folder=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["weights-run-1"]
    assert not (folder / "left").exists()
    with old:
        assert os.fstat(old.fileno()).st_ino != (folder / "model.safetensors").stat().st_ino
        assert len(old.read()) > 80


FULL_DISK = """
import pathlib, resource, signal, sys
from tests.rollout.sglang import pushing
from codjax.checks import WriteError
from codjax.rollout.sglang import weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    weights.stage_folder(pushing.make(), folder=pathlib.Path(sys.argv[1]), max_shard_bytes=50)
except WriteError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_no_half_directory(tmp_path):
    """No file may grow beyond 100 bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.startswith("the weights run-1 (0.00 GB) cannot be written to ")
    assert done.stdout.count("\n") == 1
    assert "the servers keep the weights that they have" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_not_begun(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    rows = free // 8 + 10**9
    layouts = dict.fromkeys(pushing.LAYOUTS, (pushing.F32, (rows, 2)))
    with pytest.raises(WriteError, match=r"GB\) cannot be written .* GB are free; make room"):
        weights.stage_folder(pushing.make(layouts=layouts), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
