"""Each bad value of a config with its message; every config file of the project is good."""

import functools
import importlib
import operator
import pathlib
import re

import pytest
from ml_collections import ConfigDict, config_dict

from codjax import config_files, types, validation
from codjax.config import default_config, evaluation, taskset

ROOT = pathlib.Path(__file__).parents[1]


def good_config():
    config = default_config()
    config.tasksets.unlock()
    config.evaluation.matrix.unlock()
    config.tasksets.lake = taskset(env="frozen_lake_obscure", split="train")
    config.tasksets.test = taskset(env="frozen_lake_obscure", split="test", num_records=64)
    config.rollout.tasksets = ("lake",)
    config.tokenizer.source = "builtin:bytes"
    config.batching.row_length = 12000
    config.evaluation.matrix.cod = evaluation(taskset="test", num_packs=8)
    return config


def set_key(config, key, value):
    """Sets `a.b.c`, whatever the lock and the type say: what a config file could end up with."""
    *sections, name = key.split(".")
    section = functools.reduce(operator.getitem, sections, config)
    with section.unlocked():
        if name in section:
            del section[name]
        section[name] = config_dict.placeholder(int) if value is None else value


def test_a_good_config_passes():
    validation.validate(good_config())


WRONG = [
    # Keys and types.
    ({"seed": None}, r"seed must be an integer; got None\."),
    ({"seed": True}, r"seed must be an integer; got True\."),
    ({"seed": -1}, r"seed must be at least 0: seeds are hashed as such; got -1\."),
    ({"num_steps": 2.5}, r"num_steps must be an integer; got 2\.5\."),
    ({"optimizer.learning_rate": "1e-6"}, r"optimizer\.learning_rate must be a number; got '1e-6'"),
    ({"optimizer.b1": False}, r"optimizer\.b1 must be a number; got False\."),
    ({"optimizer.eps": float("nan")}, r"optimizer\.eps must be a finite number; got nan\."),
    ({"packs.pad_to_full": "yes"}, r"packs\.pad_to_full must be true or false; got 'yes'\."),
    ({"loss.clip_mode": 3}, r"loss\.clip_mode must be a string; got 3\."),
    ({"credit.window": "2"}, r"credit\.window must be an integer; got '2'\."),
    (
        {"optimizer.learning_rat": 1.0},
        r"learning_rat is not a config key \(did you mean learning_rate",
    ),
    ({"mesh": ConfigDict({"data": 1})}, r"mesh\.context is missing: start from default_config\(\)"),
    ({"mesh": 3}, r"mesh must be a section of keys; got 3\."),
    ({"tasksets.a/b": ConfigDict()}, r"tasksets must have names without slashes.*got 'a/b'\."),
    ({"tasksets.lake": "x"}, r"tasksets\.lake must be made by taskset\(…\); got 'x'\."),
    # Model, tokenizer, mesh.
    ({"model.source": "Qwen/Qwen3-8B"}, r'model\.source must name a model: it is "init" or a Hugg'),
    ({"model.dtype": "float16"}, r"model\.dtype must be one of float32, bfloat16; got 'float16'"),
    ({"model.remat": "ful"}, r"got 'ful' \(did you mean full\?\)\."),
    ({"model.num_layers": 0}, r"model\.num_layers must be at least 1: it is a size; got 0\."),
    ({"model.num_heads": 3}, r"model\.num_heads must be a multiple of model\.num_kv_heads = 2: "),
    ({"model.head_dim": 15}, r"model\.head_dim must be even and at least 2: .*; got 15\."),
    ({"model.init_std": 0.0}, r"model\.init_std must be above 0: .*; got 0\.0\."),
    ({"tokenizer.source": None}, r"tokenizer\.source must be given: .*builtin:bytes or builtin:s"),
    ({"tokenizer.source": "builtin:byte"}, r"got 'builtin:byte' \(did you mean builtin:bytes\?\)"),
    ({"tokenizer.source": "/nowhere"}, r"tokenizer\.source must name a tokenizer: .*'/nowhere'\."),
    ({"mesh.data": 0}, r"mesh\.data must be at least 1, or -1: it counts devices; got 0\."),
    ({"mesh.fsdp": -1}, r"mesh must leave at most one axis at -1: .*got \('data', 'fsdp'\)\."),
    ({"mesh.tensor": 3}, r"model\.num_heads must be a multiple of mesh\.tensor = 3: .*; got 4\."),
    ({"mesh.tensor": 4}, r"model\.num_kv_heads must be a multiple of mesh\.tensor = 4: .*; got 2"),
    ({"mesh.fsdp": 3}, r"model\.hidden_size must be a multiple of mesh\.fsdp = 3: .*; got 64\."),
    ({"mesh.expert": 2}, r"mesh\.expert must be 1: model\.family qwen3 has no experts.*; got 2\."),
    ({"model.num_experts": 4}, r"model\.num_experts must be 0: model\.family is qwen3"),
    ({"model.family": "qwen3_moe"}, r"model\.num_experts must be at least 1: .*; got 0\."),
    ({"model.family": "gpt2"}, r"model\.family must be one of .*llama.*; got 'gpt2'"),
    ({"mesh.context": 7}, r"batching\.row_length must be a multiple of 7: .*mesh\.context"),
    (
        {"kernels.implementation": "pallas"},
        r"kernels\.implementation must be one of xla, pallas_tpu, pallas_gpu; got 'pallas'",
    ),
    # Packs and rollout.
    ({"packs.size": 0}, r"packs\.size must be at least 1: it counts the tasks of a pack; got 0\."),
    ({"packs.mode": "rolph_full"}, r"got 'rolph_full' \(did you mean ralph_full\?\)\."),
    ({"packs.keep_env_memory": True}, r"keep_env_memory must be false when packs\.mode is cod: "),
    ({"rollout.tasksets": ()}, r"rollout\.tasksets must name at least one task set: .*got \(\)\."),
    ({"rollout.tasksets": ("lak",)}, r"among config\.tasksets: lake, test; got 'lak' \(did you m"),
    ({"rollout.tasksets": ("lake", "lake")}, r"rollout\.tasksets must name each once: "),
    ({"rollout.tasks_per_step": 3}, r"rollout\.tasks_per_step must be at least 4: .*; got 3\."),
    (
        {"rollout.group_size": 1},
        r"rollout\.group_size must be at least 2: the baseline is a mean over the group; got 1\.",
    ),
    ({"rollout.temperature": 0.0}, r"rollout\.temperature must be above 0: greedy runs .*; got 0"),
    ({"rollout.max_response_tokens": 0}, r"rollout\.max_response_tokens must be at least 1: "),
    ({"rollout.response_length_request": 4000}, r"from 1 to rollout\.max_response_tokens = 2000"),
    ({"rollout.prompt_style": "short"}, r"rollout\.prompt_style must be one of full, compact; "),
    ({"rollout.max_staleness": -1}, r"rollout\.max_staleness must be at least 0: .*; got -1\."),
    (
        {"rollout.max_staleness": 1, "rollout.sync_every": 3},
        r"rollout\.sync_every must be at most rollout\.max_staleness \+ 1 = 2: .*; got 3\.",
    ),
    ({"rollout.sync_every": 0}, r"rollout\.sync_every must be at least 1: .*; got 0\."),
    ({"rollout.deadline_s": 0.0}, r"rollout\.deadline_s must be above 0: .*; got 0\.0\."),
    (
        {"rollout.in_flight_updates": True},
        r"rollout\.in_flight_updates must be false when rollout\.max_staleness is 0: .*; got True",
    ),
    (
        {"rollout.replay.max_uses": 2},
        r"rollout\.replay\.max_uses must be 1: rollout\.in_flight_updates is false.*; got 2\.",
    ),
    ({"rollout.steps_at_once": 4}, r"rollout\.steps_at_once must be 2: .* is false.*; got 4\."),
    (
        {"rollout.max_staleness": 1, "rollout.in_flight_updates": True, "rollout.steps_at_once": 0},
        r"rollout\.steps_at_once must be at least 1: .*; got 0\.",
    ),
    (
        {"rollout.sampler": "sglang"},
        r"server\.urls must name servers that run, or server\.local\.num say how many .*; got \(\)",
    ),
    ({"rollout.sampler": "sglan"}, r"got 'sglan' \(did you mean sglang\?\)"),
    (
        {"server.urls": ("10.0.0.2:30000",)},
        r"server\.urls must be like .*; got '10\.0\.0\.2:30000'",
    ),
    ({"server.urls": ("http://a",)}, r"server\.urls must be like .*; got 'http://a'"),
    ({"server.urls": ("http://a:1/v1",)}, r"server\.urls must be like .*; got 'http://a:1/v1'"),
    ({"server.urls": ("http://a:1", "http://a:1")}, r"server\.urls must name each once: .*"),
    ({"server.router": "http://a:1"}, r"server\.router must be left unset without server\.urls"),
    ({"server.route": "nccl"}, r"server\.route must be one of disk, bytes; got 'nccl'"),
    ({"server.max_in_flight": 0}, r"server\.max_in_flight must be at least 1: .*; got 0\."),
    ({"server.request_timeout_s": -1.0}, r"server\.request_timeout_s must be above 0: .*; got -1"),
    ({"server.probe_tolerance": 0.0}, r"server\.probe_tolerance must be above 0: .*; got 0\.0\."),
    (
        {"server.local.num": 2, "server.route": "bytes"},
        r'server\.route must be "disk" with server\.local: .*; got \'bytes\'\.',
    ),
    (
        {"server.local.num": 2, "server.local.first_port": 65535},
        r"server\.local\.first_port must leave room for 2 ports up to 65535: .*; got 65535\.",
    ),
    (
        {"server.local.arguments": ("--port=3",)},
        r"server\.local\.arguments must leave out --model-path, --host, --port and --dtype: .*",
    ),
    ({"server.local.command": ()}, r"server\.local\.command must name a program: .*; got \(\)\."),
    (
        {
            "rollout.sampler": "sglang",
            "server.urls": ("http://a:1",),
            "server.api_key_variable": "NOT_THERE",
        },
        r"server\.api_key_variable must be set in the environment: .*; got 'NOT_THERE'\.",
    ),
    ({"rollout.length_penalty.coef": -0.1}, r"length_penalty\.coef must be at least 0: "),
    ({"rollout.length_penalty.full_tokens": 5}, r"full_tokens must be above zero_tokens = 1000000"),
    ({"rollout.update_penalty.zero_tokens": 5}, r"be both set or both unset: .*got \(5, None\)\."),
    ({"rollout.update_penalty.min_tokens": 5}, r"min_tokens must be unset while zero_tokens and "),
    (
        {"rollout.update_penalty.zero_tokens": 9, "rollout.update_penalty.full_tokens": 9},
        r"rollout\.update_penalty\.full_tokens must be above zero_tokens = 9: ",
    ),
    # Engine.
    ({"engine.num_slots": 0}, r"engine\.num_slots must be at least 1: it is a count; got 0\."),
    ({"engine.max_tokens": 9000}, r"engine\.max_tokens must be at least 12000: .*; got 9000\."),
    ({"engine.prefill_chunks": (64, 16)}, r"engine\.prefill_chunks must be rising integers from 1"),
    ({"engine.prefill_chunks": ()}, r"engine\.prefill_chunks must be rising integers from 1: "),
    ({"engine.prefill_chunks": (16, 20000)}, r"must stay within engine\.max_tokens = 12000: "),
    # Credit.
    ({"credit.style": "window"}, r"got 'window' \(did you mean window_mean\?\)\."),
    ({"credit.style": "window_mean"}, r"credit\.window must be given: credit\.style is window_mea"),
    ({"credit.window": 2}, r"credit\.window must be left unset: credit\.style is mean, and only w"),
    ({"credit.style": "window_mean", "credit.window": 0}, r"credit\.window must be at least 1: "),
    ({"credit.gamma": 1.5}, r"credit\.gamma must be from 0 to 1: it is a fraction; got 1\.5\."),
    ({"credit.gamma": 0.5}, r"credit\.gamma must be 1\.0: credit\.style is mean, and only discoun"),
    ({"credit.reweight": "fixed"}, r"credit\.reweight_temperature must be given: "),
    ({"credit.reweight_temperature": 1.0}, r"reweight_temperature must be left unset: "),
    ({"credit.reweight": "fixed", "credit.reweight_temperature": 0.0}, r"must be above 0: "),
    ({"credit.coarse_decay": 0.5}, r"credit\.coarse_decay must be 1\.0: credit\.scheme is episode"),
    # Loss.
    ({"loss.clip_mode": "oneside"}, r"got 'oneside' \(did you mean one_side\?\)\."),
    ({"loss.eps_low": 1.2}, r"loss\.eps_low must be from 0 to 1: it is a fraction; got 1\.2\."),
    ({"loss.kl_coef": -1.0}, r"loss\.kl_coef must be at least 0: .*; got -1\.0\."),
    ({"loss.clip_mode": "ring", "loss.eps_high_outer": 0.1}, r"eps_high_outer must be at least 0."),
    ({"loss.weight_mode": "advantage"}, r"credit\.reweight must be off when loss\.weight_mode is "),
    ({"loss.aggregation": "constant"}, r"loss\.aggregation_constant must be given: "),
    ({"loss.aggregation_constant": 5.0}, r"loss\.aggregation_constant must be left unset: "),
    ({"loss.regulariser": "forward_kl"}, r"loss\.regulariser_coef must be above 0 exactly when "),
    ({"loss.regulariser_coef": 0.1}, r"loss\.regulariser is none, and one has no effect without"),
    # Optimizer, batching, warm-up.
    ({"optimizer.learning_rate": 0.0}, r"optimizer\.learning_rate must be above 0: "),
    ({"optimizer.b2": 1.0}, r"optimizer\.b2 must be in \[0, 1\): it is a decay rate; got 1\.0\."),
    ({"optimizer.schedule": "cos"}, r"optimizer\.schedule must be one of constant, cosine, linear"),
    (
        {"optimizer.warmup_steps": 101},
        r"optimizer\.warmup_steps must be from 0 to .*100: .*got 101",
    ),
    ({"batching.row_length": 4096}, r"batching\.row_length must be at least 12000: a row holds an"),
    ({"batching.scored_per_row": 100}, r"batching\.scored_per_row must be at least 2000: "),
    ({"mesh.data": 2, "mesh.fsdp": 2}, r"rows_per_microbatch must be a multiple of 4: .*; got 1\."),
    ({"warmup.follow_frac": 1.1}, r"warmup\.follow_frac must be from 0 to 1: .*; got 1\.1\."),
    ({"warmup.num_demos": 10}, r"warmup\.num_demos must be at least 64: a step draws warmup\.batc"),
    (
        {"warmup.num_steps": 10, "warmup.optimizer.learning_rate": -1.0},
        r"warmup\.optimizer\.learning_rate must be above 0: ",
    ),
    # Checkpoints, evaluation, metrics.
    ({"checkpoint.every_steps": 0}, r"checkpoint\.every_steps must be at least 1: .*; got 0\."),
    ({"checkpoint.keep": 0}, r"checkpoint\.keep must be at least 1: a run resumes from the newest"),
    ({"evaluation.temperature": -1.0}, r"evaluation\.temperature must be at least 0: 0 is greedy"),
    ({"evaluation.top_p": 0.0}, r"evaluation\.top_p must be in \(0, 1\]: .*; got 0\.0\."),
    ({"evaluation.top_k": -1}, r"evaluation\.top_k must be at least 0: 0 keeps all tokens; got -1"),
    ({"evaluation.endpoint.route": "text"}, r"evaluation\.endpoint\.route must be one of complet"),
    ({"evaluation.endpoint.model": ""}, r"evaluation\.endpoint\.model must say one: it names a m"),
    ({"evaluation.endpoint.max_in_flight": 0}, r"endpoint\.max_in_flight must be at least 1: it "),
    ({"evaluation.endpoint.request_timeout_s": 0.0}, r"request_timeout_s must be above 0"),
    ({"evaluation.endpoint.max_retries": -1}, r"endpoint\.max_retries must be at least 0: it co"),
    (
        {"evaluation.endpoint.api_key_variable": "sk-very-secret"},
        r"api_key_variable must be the name of a variable of the environment, as OPENAI_API_KEY: "
        r"the key itself belongs into that variable, not here\.$",
    ),
    ({"evaluation.matrix.cod.taskset": "tests"}, r"matrix\.cod\.taskset .*\(did you mean test\?\)"),
    ({"evaluation.matrix.cod.mode": "best"}, r"evaluation\.matrix\.cod\.mode must be one of cod, "),
    ({"evaluation.matrix.cod.condition": "blank"}, r"matrix\.cod\.condition must be one of none, "),
    ({"evaluation.matrix.cod.pack_size": 0}, r"evaluation\.matrix\.cod\.pack_size must be at leas"),
    ({"evaluation.matrix.cod.num_packs": 9}, r"num_packs must need no more than tasksets\.test\.n"),
    (
        {"evaluation.matrix.cod.condition": "hint_swapped", "evaluation.matrix.cod.num_packs": 1},
        r"evaluation\.matrix\.cod\.num_packs must be at least 2: hints are swapped between packs; ",
    ),
    (
        {"tasksets.test.num_records": None, "evaluation.matrix.cod.num_packs": 10**8},
        r"evaluation\.matrix\.cod\.num_packs = 100000000 asks for too many: frozen_lake_obscure: ",
    ),
    ({"metrics.packs_every_steps": 0}, r"metrics\.packs_every_steps must be at least 1: "),
    # Task sets and their environments.
    ({"tasksets.lake.split": "val"}, r"tasksets\.lake\.split must be one of train, test; got 'val"),
    ({"tasksets.lake.num_records": 3}, r"tasksets\.lake\.num_records must be at least 4: "),
    ({"tasksets.lake.num_records": 10**9}, r"tasksets\.lake\.num_records must be from 0 to"),
    ({"tasksets.lake.env": "frozen_lake"}, r"tasksets\.lake: unknown environment 'frozen_lake': "),
    ({"tasksets.lake.settings.no_such": 1}, r"tasksets\.lake\.settings\.no_such does not exist"),
    ({"tasksets.lake.data.no_such": 1}, r"tasksets\.lake\.data\.no_such does not exist"),
    ({"tasksets.lake.env": "frozen_lake_compact"}, r"tokenizer\.source must be builtin:symbols: "),
    ({"tokenizer.source": "builtin:symbols"}, r"tasksets\.lake\.env must be frozen_lake_compact w"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_wrong_value_is_refused_in_one_line(changes, message):
    config = good_config()
    for key, value in changes.items():
        set_key(config, key, value)
    with pytest.raises(validation.ConfigError, match=message) as caught:
        validation.validate(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_key_and_a_wrong_tree():
    config = good_config()
    with config.unlocked():
        del config.credit.gamma
    with pytest.raises(validation.ConfigError, match=r"^credit\.gamma is missing: "):
        validation.validate(config)
    with pytest.raises(validation.ConfigError, match=r"get_config\(\) must return a ConfigDict"):
        validation.validate({"seed": 0})


def test_model_and_tokenizer_folders_need_their_files(tmp_path):
    config = good_config()
    config.model.source = config.tokenizer.source = str(tmp_path)
    with pytest.raises(validation.ConfigError, match=r"^model\.source must name a model"):
        validation.validate(config)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(validation.ConfigError, match=r"^tokenizer\.source must name a tokenizer"):
        validation.validate(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    validation.validate(config)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_config_file_loads_and_validates(path, tmp_path):
    config = config_files.load(str(path))
    if config.model.source != "init":  # a folder that users fetch
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_text("{}")
        config.model.source = config.tokenizer.source = str(tmp_path)
    validation.validate(config)


@pytest.mark.parametrize(
    ("key", "module", "table"),
    [
        ("loss.clip_mode", "codjax.losses", "CLIP_MODES"),
        ("loss.weight_mode", "codjax.losses", "WEIGHT_MODES"),
        ("loss.aggregation", "codjax.losses", "AGGREGATIONS"),
        ("loss.regulariser", "codjax.losses", "REGULARISERS"),
        ("loss.kl_estimator", "codjax.losses", "KL_ESTIMATORS"),
        ("credit.style", "codjax.credit", "STYLES"),
        ("credit.baseline", "codjax.credit", "BASELINES"),
        ("credit.reweight", "codjax.credit", "REWEIGHT_MODES"),
        ("credit.reweight_group", "codjax.scoring", "RED_GROUPS"),
        ("evaluation.endpoint.route", "codjax.rollout.openai_wire", "ROUTES"),
    ],
)
def test_names_are_those_of_the_table_that_looks_them_up(key, module, table):
    assert set(validation.NAMES[key]) == set(getattr(importlib.import_module(module), table))


def test_pack_modes_are_those_of_the_records():
    assert validation.NAMES["packs.mode"] == tuple(map(str, types.PackMode))


def test_every_listed_name_passes_alone():
    """No name in the table is refused by another check, given what it needs beside it."""
    needs = {
        "window_mean": {"credit.window": 2},
        "fixed": {"credit.reweight_temperature": 1.0},
        "advantage": {"credit.reweight": "off"},
        "constant": {"loss.aggregation_constant": 10.0},
        "squared_log_ratio": {"loss.regulariser_coef": 0.1},
        "forward_kl": {"loss.regulariser_coef": 0.1},
        "sglang": {"server.urls": ("http://127.0.0.1:30000",)},
    }
    for key, names in validation.NAMES.items():
        for name in names:
            config = good_config()
            set_key(config, key, name)
            extra = needs.get(name, {}) if "schedule" not in key else {}
            if name == "qwen3_moe":
                sizes = ("num_experts", "experts_per_token", "moe_intermediate_size")
                extra = {f"model.{size}": 2 for size in sizes}
            if key == "model.param_dtype":
                extra = {"num_steps": 0}  # bfloat16 parameters are for evaluation
            for other, value in extra.items():
                set_key(config, other, value)
            validation.validate(config)


def test_the_message_of_an_unknown_key_names_the_nearest():
    config = good_config()
    set_key(config, "optimizer.learning_rat", 1.0)
    expected = "optimizer.learning_rat is not a config key (did you mean learning_rate?)."
    with pytest.raises(validation.ConfigError, match=f"^{re.escape(expected)}$"):
        validation.validate(config)
