"""Configuration: which value wins, what is refused, and that nothing else than a helpful refusal ever comes out."""

from __future__ import annotations

import math
import tomllib
from itertools import product

import pytest

from dprandp.config import schema, toml
from dprandp.config.schema import SIZES, STAGE_CONFIGS, as_dict, build, resolve
from dprandp.errors import InputError, UsageError

STAGES = tuple(STAGE_CONFIGS)


def write(folder, text):
    file = folder / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------------------------- which one wins


def test_flags_beat_the_file_and_the_file_beats_the_size(tmp_path):
    assert resolve("generate", "small", None, {}).count == 24_000
    file = write(tmp_path, "[generate]\ncount = 7\nseed = 3\n[probe]\nsteps = 9\n")
    from_file = resolve("generate", "small", file, {})
    assert (from_file.count, from_file.seed, from_file.size) == (7, 3, "small")
    assert from_file.resolution == resolve("generate", "small", None, {}).resolution  # what the file leaves open
    both = resolve("generate", "small", file, {"count": 5})
    assert (both.count, both.seed) == (5, 3)


def test_flags_that_were_not_given_change_nothing(tmp_path):
    file = write(tmp_path, "[pretrain]\nrandom_init = true\nlr = 0.5")
    not_given = dict.fromkeys(STAGE_CONFIGS["pretrain"].__dataclass_fields__)
    assert resolve("pretrain", "tiny", file, not_given) == resolve("pretrain", "tiny", file, {})
    assert resolve("pretrain", "tiny", file, {"random_init": False}).random_init is False  # False is given, None is not


def test_the_sizes_cover_every_stage_and_grow():
    assert set(schema.SIZE_DEFAULTS) == set(SIZES)
    assert all(set(table) == set(STAGES) for table in schema.SIZE_DEFAULTS.values())
    counts = [resolve("generate", size, None, {}).count for size in SIZES]
    assert counts == sorted(set(counts))


def test_a_file_cannot_claim_another_size_than_its_defaults_have(tmp_path):
    file = write(tmp_path, '[generate]\nsize = "paper"')
    assert resolve("generate", "paper", file, {}).count == 105_000
    with pytest.raises(UsageError, match="'paper' for generate, the command says 'tiny'"):
        resolve("generate", "tiny", file, {})


# ----------------------------------------------------------------------------------------------------------- round trip


def test_toml_round_trip_for_every_stage_and_size(tmp_path):
    for stage, size in product(STAGES, SIZES):
        built = resolve(stage, size, None, {})
        assert (built.size, type(built)) == (size, STAGE_CONFIGS[stage])
        if (stage, size) != ("finetune", "paper"):  # whose recipe overrides the size
            assert schema.SIZE_DEFAULTS[size][stage].items() <= vars(built).items()
        file = write(tmp_path, toml.dumps({stage: as_dict(built)}))
        assert resolve(stage, size, file, {}) == built
        again = build(stage, tomllib.loads(toml.dumps(as_dict(built))))  # as config.toml in the stage's folder
        assert as_dict(again) == as_dict(built)  # settings of the other architecture are not recorded
    odd = resolve("probe", "tiny", None, {"epsilon": math.inf, "data": 'npz:a "b"\\cé.npz', "delta": 1e-300})
    assert resolve("probe", "tiny", write(tmp_path, toml.dumps({"probe": as_dict(odd)})), {}) == odd


def test_whole_numbers_become_floats_where_the_setting_is_one():
    built = build("probe", {"epsilon": 2, "lr": 10, "delta": None})
    assert (type(built.epsilon), type(built.lr), built.delta) == (float, float, None)
    assert as_dict(built)["lr"] == 10.0
    assert "delta" not in as_dict(built)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("stage", "key", "offered"), [("probe", "epsilom", "'epsilon'"), ("finetune", "zzz", "known: ")]
)
def test_an_unknown_key_offers_the_nearest(tmp_path, stage, key, offered):
    with pytest.raises(UsageError) as caught:
        resolve(stage, "tiny", write(tmp_path, f"[{stage}]\n{key} = 1"), {})
    assert repr(key) in caught.value.problem
    assert offered in caught.value.fix


def test_an_unknown_table_offers_the_nearest(tmp_path):
    with pytest.raises(UsageError) as caught:
        resolve("probe", "tiny", write(tmp_path, "[prob]\nsteps = 1"), {})
    assert "[prob]" in caught.value.problem
    assert "'probe'" in caught.value.fix
    with pytest.raises(UsageError, match="steps"):
        resolve("probe", "tiny", write(tmp_path, "steps = 1"), {})


@pytest.mark.parametrize(
    ("stage", "key", "value", "kind"),
    [
        ("generate", "count", 10.0, "int"),
        ("generate", "count", True, "int"),
        ("generate", "process", 3, "str"),
        ("generate", "seed", None, "int"),
        ("pretrain", "random_init", 1, "bool"),
        ("probe", "delta", "1e-5", "float"),
        ("probe", "epsilon", [1.0], "float"),
    ],
)
def test_a_wrong_type_is_refused_naming_key_value_and_type(stage, key, value, kind):
    with pytest.raises(UsageError) as caught:
        build(stage, {key: value})
    assert f"{key} = {value!r}" in caught.value.problem
    assert caught.value.problem.endswith(f"of type {kind}")
    assert "None" not in caught.value.fix


NAN, INF = math.nan, math.inf
RANGES = [  # stage, key, refused, accepted next to the bounds
    ("generate", "count", [0, -1], [1]),
    ("generate", "seed", [-1, 2**63, 10**400], [0, 2**63 - 1]),
    ("pretrain", "lr", [0.0, -0.1, NAN, INF, 10**400], [1e-9]),
    ("pretrain", "momentum", [-0.1, 1.0, NAN], [0.0, 0.999]),
    ("pretrain", "layers", [0, 3], [1, 2]),
    ("probe", "epsilon", [0.0, -1.0, NAN, -INF], [1e-9, INF]),
    ("probe", "delta", [0.0, 1.0, -1e-5, NAN, INF], [1e-300, 0.999]),
    ("probe", "share", [0.0, 1.001, NAN, -0.1], [1e-9, 1.0]),
    ("probe", "clip_norm", [0.0, NAN, INF], [1e-3]),
    ("probe", "statistics_views", [0, 10**4], [1, 5]),
    ("probe", "classes", [-1, 0, 1], [2]),
    ("probe", "tuned_on", ["", "a\nb", "x" * 501], ["our scans"]),
    ("finetune", "ema", [-0.1, 1.0, NAN], [0.0]),
    ("finetune", "extractor_scale", [-0.1, NAN, INF], [0.0, 3.0]),
]


@pytest.mark.parametrize(("stage", "key", "refused", "accepted"), RANGES)
def test_ranges(stage, key, refused, accepted):
    for value in refused:
        with pytest.raises(UsageError, match=key):
            build(stage, {key: value})
    for value in accepted:
        assert getattr(build(stage, {key: value}), key) == value


@pytest.mark.parametrize(
    ("stage", "key", "wrong", "offered"),
    [
        ("pretrain", "colour", "gray", "'grey'"),
        ("pretrain", "optimizer", "adam", "'adamw'"),
        ("finetune", "optimizer", "adamw", "'adam'"),
        ("generate", "size", "smal", "'small'"),
    ],
)
def test_choices_offer_the_nearest(stage, key, wrong, offered):
    with pytest.raises(UsageError) as caught:
        build(stage, {key: wrong})
    assert repr(wrong) in caught.value.problem
    assert offered in caught.value.fix


def test_what_is_no_toml_or_cannot_be_read_is_refused_naming_the_file(tmp_path):
    file = tmp_path / "settings.toml"
    long = b"x = " + b"9" * 5000  # Python refuses to read so long a number
    for content in (b"[probe", b"[probe]\nsteps = ", b"[probe]\nsteps = 1\nsteps = 2", b"\xff\xfe", long):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"settings\.toml is not valid TOML"):
            resolve("probe", "tiny", file, {})
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            resolve("probe", "tiny", path, {})


def test_a_stage_that_is_no_table_is_refused(tmp_path):
    for text in ("probe = 5", "probe = []", "[[probe]]\nsteps = 1"):
        with pytest.raises(UsageError, match="probe is not a table"):
            resolve("probe", "tiny", write(tmp_path, text), {})
