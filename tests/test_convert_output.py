"""The folder that `codjax convert` writes: kills, full disks, and what is in its way."""

import errno
import fcntl
import json
import shutil
import signal
import subprocess
import sys

import pytest

from codjax import cli, convert
from codjax.models import hf_shards, orbax_params
from tests import converting

KILLED = """
import os, signal, sys
from codjax import cli, convert
from codjax.models import hf_names, hf_shards, json_files, orbax_params
number = 0

def killed(function):
    def call(*args, **kwargs):
        global number
        number += 1
        if number == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

{place} = killed({place})
cli.main(sys.argv[1:])
"""


def run_killed(args, *, place, after):
    """The command in a process of its own, which dies at a call of a function."""
    program = KILLED.format(place=place, after=after)
    process = subprocess.run([sys.executable, "-c", program, *args], check=False, timeout=200)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("place", "after", "num_whole"),
    [
        ("hf_names.Counterpart.to_tensor", 20, 2),  # in the middle of a file
        ("hf_shards.write_index", 1, 6),  # when all files are there
    ],
)
def test_an_export_that_is_killed_goes_on(place, after, num_whole, tmp_path, caplog):
    source = converting.write_model(tmp_path / "hf", max_shard_bytes=5000)
    convert.main(str(source), str(tmp_path / "orbax"))
    args = ["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'out'}"]
    args += ["--max-shard-size=4KB"]
    run_killed(args, place=place, after=after)
    assert not (tmp_path / "out").exists()  # nothing to be taken for a model
    partial = tmp_path / "out.partial"
    whole = sorted(partial.glob("*.safetensors"))
    assert len(whole) == num_whole
    before = {file.name: file.stat().st_mtime_ns for file in whole}
    assert not (partial / "config.json").exists()

    caplog.set_level("INFO", logger="codjax")
    assert cli.main(args) == 0
    assert "Going on with the interrupted conversion in " in caplog.text
    assert f"{num_whole} of 6 files are there already" in caplog.text
    after_it = {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")
    }
    assert before.items() <= after_it.items()  # what was there was not written again
    assert converting.tensors_in(tmp_path / "out") == converting.tensors_in(source)
    assert not partial.exists()
    assert not list((tmp_path / "out").glob("*.partial"))

    text = convert.main(str(tmp_path / "orbax"), str(tmp_path / "out"), max_shard_size="4KB")
    assert "is this conversion of " in text


@pytest.mark.parametrize(
    ("place", "after", "message"),
    [
        ("hf_names.Counterpart.read", 20, "were not all written; they are begun again"),
        ("json_files.write", 2, "were not all written; they are begun again"),  # 1: the record
        ("json_files.write", 3, "are there already, whole"),  # 2: that the parameters are whole
    ],
)
def test_an_import_that_is_killed_begins_again(place, after, message, tmp_path, caplog):
    source = converting.write_model(tmp_path / "hf")
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]
    run_killed(args, place=place, after=after)
    assert not (tmp_path / "out").exists()
    caplog.set_level("INFO", logger="codjax")
    assert cli.main(args) == 0
    assert message in caplog.text
    convert.main(str(tmp_path / "out"), str(tmp_path / "again"))
    assert converting.tensors_in(tmp_path / "again") == converting.tensors_in(source)


def test_what_another_conversion_began_is_removed(tmp_path, caplog, monkeypatch):
    first, second = (converting.write_model(tmp_path / name) for name in ("one", "two"))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(orbax_params, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert.main(str(first), str(tmp_path / "out"))
    caplog.set_level("INFO", logger="codjax")
    convert.main(str(second), str(tmp_path / "out"))
    assert "was the beginning of another conversion; it is removed" in caplog.text
    assert str(second) in (tmp_path / "out" / "conversion.json").read_text()


def test_two_at_once_are_not_let(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert "out.partial is being written by another codjax convert" in converting.line_of(capsys)


def test_an_output_that_is_there_stays(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for output in (other, other / "thesis.txt"):
        assert cli.main(["convert", f"--source={source}", f"--output={output}"]) == 2
        assert "must not exist: another thing is there" in converting.line_of(capsys)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert "out.partial is in the way, and not of codjax convert" in converting.line_of(capsys)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
    assert len(list((tmp_path / "out.partial").iterdir())) == 1


def test_a_disk_without_room(tmp_path, capsys, monkeypatch):
    source = converting.write_model(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert "has 1.00 KB left; make room" in converting.line_of(capsys)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("module", "name", "num_kept"), [(orbax_params, "write", 0), (hf_shards, "write_shard", 2)]
)
def test_a_disk_that_fills_up_meanwhile(module, name, num_kept, tmp_path, request):
    capsys, monkeypatch = map(request.getfixturevalue, ("capsys", "monkeypatch"))
    source = converting.write_model(tmp_path / "first", max_shard_bytes=5000)
    if module is hf_shards:
        convert.main(str(source), str(tmp_path / "orbax"))
        source = tmp_path / "orbax"
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]
    args += ["--max-shard-size=4KB"]
    calls = []
    write = getattr(module, name)

    def full(*args):
        calls.append(args)
        if len(calls) > num_kept:
            raise OSError(errno.ENOSPC, "No space left on device", "a file")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        assert cli.main(args) == 1
    assert converting.line_of(capsys) == (
        "codjax convert: a file: No space left on device; mend that, and the same command goes on "
        f"with what is in {tmp_path / 'out'}.partial.\n"
    )
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == num_kept
    assert cli.main(args) == 0
    assert not (tmp_path / "out.partial").exists()


def test_a_disk_without_locks(tmp_path, capsys, monkeypatch):
    source = converting.write_model(tmp_path / "hf")

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert converting.line_of(capsys) == (
        f"codjax convert: {tmp_path / 'out'}.partial cannot be locked (No locks available), so "
        "that two conversions could write it at once; give an --output on another disk.\n"
    )


def gone(folder):
    shutil.rmtree(folder / "params")


def truncated(folder):
    file = max((folder / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (gone, " is gone; remove the folder, and convert again.\n"),
        (truncated, " bytes, not "),
        (no_tokenizer, "but tokenizer.json is gone; remove the folder, and convert again.\n"),
    ],
)
def test_an_output_that_was_damaged_is_not_taken_for_whole(damage, message, tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]
    assert cli.main(args) == 0
    assert cli.main(args) == 0
    assert "is this conversion of" in capsys.readouterr().out
    damage(tmp_path / "out")
    assert cli.main(args) == 2
    assert message in converting.line_of(capsys)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (converting.set_field(rope_theta=77.0), "config"),
        (lambda folder: (folder / "tokenizer.json").write_text("{} "), "carried"),
        (lambda folder: (folder / "merges.txt").unlink(), "carried"),
    ],
)
def test_a_source_that_changed_since_is_another_conversion(change, key, tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    fields = json.loads((source / "config.json").read_text())
    del fields["rope_parameters"]  # one of the two spellings is enough
    (source / "config.json").write_text(json.dumps(fields))
    convert.main(str(source), str(tmp_path / "out"))
    change(source)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert converting.line_of(capsys) == (
        f"codjax convert: --output={tmp_path / 'out'} must not exist: it is the conversion of "
        f"something else, or of an earlier state ({key} differ; see its conversion.json); remove "
        "it, or give another folder.\n"
    )


def test_going_on_takes_the_small_files_as_they_are_now(tmp_path, caplog):
    source = converting.write_model(tmp_path / "hf")
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]
    run_killed(args, place="convert._copy", after=4)  # three are copied
    assert (tmp_path / "out.partial" / "merges.txt").exists()
    (source / "merges.txt").unlink()
    (source / "tokenizer.json").write_text("another")
    caplog.set_level("INFO", logger="codjax")
    assert cli.main(args) == 0
    assert "The parameters are there already, whole." in caplog.text
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "another"


def test_a_file_that_is_not_whole_is_written_again(tmp_path):
    source = converting.write_model(tmp_path / "hf", max_shard_bytes=5000)
    convert.main(str(source), str(tmp_path / "orbax"))
    args = ["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'out'}"]
    args += ["--max-shard-size=4KB"]
    run_killed(args, place="hf_shards.write_index", after=1)
    first, second, *_ = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    assert cli.main(args) == 0
    assert converting.tensors_in(tmp_path / "out") == converting.tensors_in(source)


def test_an_output_that_is_a_link(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        convert.main(str(source), str(link))
        assert link.is_symlink()
        assert (tmp_path / "disk" / name / "params").is_dir()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["empty", "new"]

    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'circle'}"]) == 2
    assert f"--output={tmp_path / 'circle'} leads nowhere: " in converting.line_of(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_source_that_changes_meanwhile(name, tmp_path, capsys, monkeypatch):
    source = converting.write_model(tmp_path / "hf")
    write = orbax_params.write

    def change(*args):
        write(*args)
        content = (source / name).read_bytes()
        (source / f"{name}.new").write_bytes(content + b" ")
        (source / f"{name}.new").replace(source / name)

    monkeypatch.setattr(orbax_params, "write", change)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert converting.line_of(capsys) == (
        f"codjax convert: --source changed while it was converted: {source / name}; give the "
        "command again when nothing writes to it.\n"
    )
    assert not (tmp_path / "out").exists()
