"""Exit statuses and one-line messages of the command line."""

import json
import subprocess
import sys
import types

import pytest

import codjax
from codjax import checks, cli

CONFIG = """
from codjax.config import default_config, evaluation, taskset

def get_config():
    config = default_config()
    config.tasksets.unlock()
    config.evaluation.matrix.unlock()
    config.tasksets.lake = taskset(env="frozen_lake_obscure", split="train")
    config.rollout.tasksets = ("lake",)
    config.tokenizer.source = "builtin:bytes"
    config.batching.row_length = 12000
    config.evaluation.matrix.cod = evaluation(taskset="lake", num_packs=4)
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """Scripted train, evaluate and bench modules, and what they were called with."""
    made = []
    train = types.ModuleType("codjax.train")
    train.main = lambda config, workdir: made.append(("train", config, workdir))
    train.dry_run = lambda config: f"seed: {config.seed}"
    evaluate = types.ModuleType("codjax.evaluate")
    evaluate.main = lambda config, checkpoint, workdir: made.append(("eval", checkpoint, workdir))
    bench = types.ModuleType("codjax.bench")
    bench.BENCHES = {"learner": None}
    bench.main = lambda name, output: made.append(("bench", name, output))
    plan = types.ModuleType("codjax.plan")
    plan.main = lambda config, topology, output: made.append(("plan", topology)) or "16" in topology
    stand_ins = {"train": train, "evaluate": evaluate, "bench": bench, "plan": plan}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, f"codjax.{name}", module)
        monkeypatch.setattr(codjax, name, module, raising=False)
    return made


def one_line_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.rstrip("\n")


def test_train_passes_the_overridden_config_on(config_file, calls):
    args = ["train", "--config", config_file, "--workdir=runs/x"]
    overrides = [
        "--config.seed=7",
        "--config.optimizer.learning_rate",
        "3e-6",
        "--config.engine.prefill_chunks=(8, 16)",
        "--noconfig.packs.pad_to_full",
        "--config.credit.style=window_mean",
        "--config.credit.window=2",
    ]
    assert cli.main([*args, *overrides]) == 0
    [(command, config, workdir)] = calls
    assert (command, workdir) == ("train", "runs/x")
    assert config.seed == 7
    assert config.optimizer.learning_rate == 3e-6
    assert config.engine.prefill_chunks == (8, 16)
    assert config.packs.pad_to_full is False
    assert config.credit.window == 2
    assert config.is_locked


def test_overrides_may_stand_before_the_config(config_file, calls):
    args = ["train", "--config.seed=7", "--workdir=x", f"--config={config_file}"]
    assert cli.main(args) == 0
    assert calls[0][1].seed == 7


def test_dry_run_needs_no_workdir_and_prints(config_file, calls, capsys):
    assert cli.main(["train", f"--config={config_file}", "--dry-run", "--config.seed=3"]) == 0
    assert capsys.readouterr().out == "seed: 3\n"
    assert calls == []


def test_eval_and_bench_call_their_functions(config_file, calls):
    eval_args = ["eval", f"--config={config_file}", "--workdir=w"]
    assert cli.main(eval_args) == 0
    assert cli.main([*eval_args, "--checkpoint=120"]) == 0
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", "learner", "--output=b.json"]) == 0
    assert calls == [
        ("eval", "latest", "w"),
        ("eval", "120", "w"),
        ("bench", None, None),
        ("bench", "learner", "b.json"),
    ]


WRONG = [
    ([], "codjax: no command was given; the commands are train, eval, serve, plan, "),
    (["trian"], "codjax: there is no command trian (did you mean train?); the commands are"),
    (["train"], "codjax train: --config=FILE.py must be given, for example --config=configs/"),
    (["train", "--config"], "codjax train: --config=FILE.py must be given, "),
    (["train", "--config=a.py", "--config=b.py"], "--config=FILE.py must be given once, "),
    (["train", "--config=nowhere.py"], "--config=nowhere.py: there is no file nowhere.py; "),
    (["train", "GOOD"], "codjax train: --workdir=DIR must be given: "),
    (["eval", "GOOD"], "codjax eval: --workdir=DIR must be given: "),
    (["eval", "GOOD", "--workdir=x", "--checkpoint=last"], "--checkpoint must be latest, base, "),
    (["train", "GOOD", "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workd"),
    (["train", "GOOD", "--workdir"], "codjax train: Missing value for flag --workdir"),
    (["train", "GOOD", "stray"], "codjax train: unexpected argument 'stray': flags look like "),
    (
        ["train", "GOOD", "--config.optimizer.learning_rat=1"],
        "codjax train: config.optimizer.learning_rat is not a config key; did you mean "
        "config.optimizer.learning_rate?",
    ),
    (["train", "GOOD", "--config.group_size=4"], "did you mean config.rollout.group_size?"),
    (["train", "GOOD", "--config.zzz=4"], "config.zzz is not a config key; --dry-run shows all"),
    (["train", "GOOD", "--config.seed.x=1"], "config.seed.x is not a config key; "),
    (["train", "GOOD", "--config.seed=a"], "config.seed must be an integer; got 'a'."),
    (["train", "GOOD", "--config.seed=1.5"], "config.seed must be an integer; got '1.5'."),
    (["train", "GOOD", "--config.loss.eps_low=x"], "config.loss.eps_low must be a number; got 'x'"),
    (["train", "GOOD", "--config.packs.pad_to_full=maybe"], "must be true or false; got 'maybe'."),
    (["train", "GOOD", "--config.mesh=3"], "config.mesh must be a section of keys, as {'key': v"),
    (["train", "GOOD", "--config.mesh={'data': 1}"], "codjax train: mesh.context is missing: "),
    (
        ["train", "GOOD", "--workdir=x", "--config.rollout.group_size=1"],
        "codjax train: rollout.group_size must be at least 2: the baseline is a mean over the "
        "group; got 1.",
    ),
    (["plan", "GOOD"], "codjax plan: --topology=NAME must be given: the TPU slice to plan for, as"),
    (["data", "GOOD"], "codjax data: --taskset=NAME must be given: one of lake."),
    (["data", "GOOD", "--taskset=lak"], "got 'lak' (did you mean lake?)."),
    (["data", "GOOD", "--taskset=lake", "--num=0"], "--num must be at least 1: it counts tasks; "),
    (["data", "GOOD", "--taskset=lake", "--num=x"], "flag --num=x: "),
    (["data", "GOOD", "--taskset=lake", "--num=99999999"], "--num=99999999 asks for too many: "),
    (["bench", "learnr"], "codjax bench: NAME must be one of learner; got 'learnr' (did you mean"),
    (["bench", "learner", "other"], "codjax bench: unexpected argument 'other': "),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_a_mistake_ends_with_status_2_and_one_line(args, message, config_file, calls, capsys):
    args = [f"--config={config_file}" if arg == "GOOD" else arg for arg in args]
    assert cli.main(args) == 2
    assert message in one_line_of(capsys)
    assert calls == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "the file has no function get_config(); define one that returns default_con"),
        ("def get_config(:\n", "line 1 of the file raises SyntaxError: "),
        ("import no_such_module\n", "line 1 of the file raises ModuleNotFoundError: No module na"),
        ("def get_config():\n    return 1 / 0\n", "line 2 of the file raises ZeroDivisionError: "),
        ("def get_config():\n    return {}\n", "get_config() must return a ConfigDict, as default"),
        ("def get_config(size):\n    pass\n", "raises TypeError: get_config() missing 1 required"),
        (
            "from codjax.config import default_config\n"
            "def get_config():\n"
            "    config = default_config()\n"
            "    config.optimizer.learning_rat = 1.0\n",
            'line 4 of the file raises AttributeError: Key "learning_rat" does not exist and '
            'cannot be added since the config is locked. Did you mean "learning_rate" instead of',
        ),
    ],
)
def test_a_bad_config_file_is_told_in_one_line(text, message, tmp_path, calls, capsys):
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert cli.main(["train", f"--config={path}", "--workdir=x"]) == 2
    line = one_line_of(capsys)
    assert message in line
    assert line.startswith(f"codjax train: --config={path}: ")


def test_an_argument_of_get_config_follows_a_colon(tmp_path, calls):
    path = tmp_path / "sized.py"
    path.write_text(
        CONFIG.replace("get_config()", "get_config(seed)").replace(
            "    return", "    config.seed = int(seed)\n    return"
        )
    )
    assert cli.main(["train", f"--config={path}:5", "--workdir=x"]) == 0
    assert calls[0][1].seed == 5


def test_a_workdir_that_is_a_file_is_refused(config_file, calls, capsys):
    assert cli.main(["train", f"--config={config_file}", f"--workdir={config_file}"]) == 2
    assert "must be a folder; it is a file." in one_line_of(capsys)


def test_the_status_of_a_plan_says_whether_it_fits(config_file, calls):
    assert cli.main(["plan", f"--config={config_file}", "--topology=v5e:16x16"]) == 0
    assert cli.main(["plan", f"--config={config_file}", "--topology=v5e:1x1"]) == 1
    assert calls == [("plan", "v5e:16x16"), ("plan", "v5e:1x1")]


def test_an_empty_matrix_is_refused_by_eval_only(config_file, calls, capsys):
    with open(config_file, "a") as file:
        file.write("get_full = get_config\n\ndef get_config():\n    config = get_full()\n")
        file.write("    del config.evaluation.matrix.cod\n    return config\n")
    assert cli.main(["train", f"--config={config_file}", "--workdir=x"]) == 0
    assert cli.main(["eval", f"--config={config_file}", "--workdir=x"]) == 2
    assert "evaluation.matrix must have an entry: " in one_line_of(capsys)


def test_unexpected_errors_and_interrupts(config_file, calls, capsys, monkeypatch):
    def fail(config, workdir):
        raise RuntimeError("out of luck")

    def interrupt(config, workdir):
        raise KeyboardInterrupt

    args = ["train", f"--config={config_file}", "--workdir=x"]
    monkeypatch.setattr(sys.modules["codjax.train"], "main", fail)
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback ")
    assert error.endswith("RuntimeError: out of luck\n")
    monkeypatch.setattr(sys.modules["codjax.train"], "main", interrupt)
    assert cli.main(args) == 130
    assert capsys.readouterr().err == (
        "\ncodjax train: interrupted; the same command goes on from the newest checkpoint.\n"
    )


def raising(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize(("variable", "status"), [(None, 0), ("", 0), ("143", 143)])
def test_a_run_that_was_stopped_ends_as_who_started_it_wants(
    variable, status, config_file, calls, monkeypatch
):
    if variable is not None:
        monkeypatch.setenv("CODJAX_STOP_STATUS", variable)
    monkeypatch.setattr(codjax.train, "main", raising(checks.StoppedError("stopped")))
    assert cli.main(["train", f"--config={config_file}", "--workdir=runs/x"]) == status


@pytest.mark.parametrize("value", ["-1", "256", "²", "no"])
def test_the_status_of_a_stop_is_checked_before_the_run(
    value, config_file, calls, capsys, monkeypatch
):
    monkeypatch.setenv("CODJAX_STOP_STATUS", value)
    assert cli.main(["train", f"--config={config_file}", "--workdir=runs/x"]) == 2
    assert "CODJAX_STOP_STATUS must be an exit status from 0 to 255" in one_line_of(capsys)
    assert not calls


def test_a_nan_has_a_status_of_its_own(config_file, calls, capsys, monkeypatch):
    error = checks.NonFiniteMetricError("loss/total is nan at step 7: the run stops here.")
    monkeypatch.setattr(codjax.train, "main", raising(error))
    assert cli.main(["train", f"--config={config_file}", "--workdir=runs/x"]) == 3
    assert one_line_of(capsys) == f"codjax train: {error}"


def test_a_step_is_a_decimal_number(config_file, calls, capsys):
    flags = [f"--config={config_file}", "--workdir=runs/x", "--checkpoint=²"]
    assert cli.main(["eval", *flags]) == 2
    assert "--checkpoint must be latest, base, a step" in one_line_of(capsys)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["eval", "-h"], ["data", "-h"]])
def test_help_goes_to_stdout(args, capsys):
    assert cli.main(args) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: codjax ")
    assert captured.err == ""


def test_help_names_every_flag(capsys):
    for name, command in cli.COMMANDS.items():
        cli.main([name, "--help"])
        text = capsys.readouterr().out
        assert all(f"--{flag.name}" in text for flag in command.flags)
        assert ("--config=FILE.py" in text) == command.takes_config


def test_data_prints_samples(config_file, capsys):
    assert cli.main(["data", f"--config={config_file}", "--taskset=lake", "--num=2"]) == 0
    out = capsys.readouterr().out
    assert out.count("── first observation") == 2
    assert "lake, row 1: position 1 of the pack with seed " in out


def test_data_writes_json_lines(config_file, tmp_path, capsys):
    path = tmp_path / "out" / "lake.jsonl"
    args = ["data", f"--config={config_file}", "--taskset=lake", "--num=6", f"--output={path}"]
    assert cli.main(args) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["index"], row["position"]) for row in rows] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 0),
        (5, 1),
    ]
    assert {"taskset", "pack_seed", "record", "system_prompt", "observation"} <= set(rows[0])
    assert len({row["pack_seed"] for row in rows}) == 2
    assert capsys.readouterr().out == f"wrote 6 tasks of lake to {path}\n"


def test_as_a_program():
    """One real process each: exit statuses reach the shell, and nothing heavy is imported."""
    run = [sys.executable, "-m", "codjax"]
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, check=False)
    assert (version.returncode, version.stdout) == (0, f"codjax {codjax.__version__}\n")
    wrong = subprocess.run([*run, "trian"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    heavy = "{'jax', 'matplotlib', 'transformers'}"
    code = f"import sys, codjax.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
