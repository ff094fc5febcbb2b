"""Settings: valid values of every field, changes, and what is saved."""
import json
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from tokenlabel.prompts import Question
from tokenlabel.settings import FIELDS, RULES, Settings, kl_weight, make_settings

NAN, INF = math.nan, math.inf
WRONG = dict(
    discriminator=["oracle", 1, None], label_tokens=[0, 1.0, "two", None], restarts=[0, -1, 2.0, True], steps=[0, -5, None, "5"],
    lr=[0.0, -0.1, NAN, INF, 1e39, "fast", True], weight_decay=[-0.1, INF, [], NAN], temperature=[
        (1.0,), (1.0, 0.5, 0.1), (0.0, 0.1), (1.0, -0.1), (NAN, 0.1), (1.0, NAN), (1e308, 1.0), (1.0, 1e-40), 1.0, "12", (1, True)],
    entropy_schedule=[(1.0,), (0, -1), None, (0, NAN), (0, INF)], prior_weight=[-0.1, INF, 1e300, "a", (1, 2)],
    init_std=[-0.1, NAN, None], accuracy_weight=[-0.1, NAN, INF, 1e300], entropy_weight=[-0.1, NAN, INF, 1e300, None],
    kl_weight=[-0.1, NAN, INF, 1e300, "much"], stop_weight=[-0.1, NAN, INF, 1e300], positive_weight=[-0.1, 0.0, 1.0, 1.5, NAN],
    calibrated=[1, 0, None, "yes"], batch_size=[1, 0, -3, 4.5, True], candidates=[0, 2.5], proposals=[-1, 1.5, None],
    view=["words", 1, ""], heldout=[1.0, -0.1, 1.5, NAN, None, "0.3"], seed=[-1, 2**64, "0", 0.0],
    prompts=[[], "Examples of {label}:", ["Examples:"], ["Examples of {label}:", 3], Question("Is {word} {label}?")])


def test_the_table_has_every_field():
    names = [field.name for field in fields(Settings)]
    assert set(RULES) == set(names) - {"prompts"} and list(FIELDS) == names and set(WRONG) == set(names)
    assert all(FIELDS.values()) and FIELDS["lr"] == "learning rate of AdamW"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_with_name_and_value(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError) as error: Settings(**{name: value})
        text = str(error.value)
        if name == "prompts": assert "prompt" in text
        else: assert f"{name}={value!r} is not " in text and "from" in text or '"' in text or "number" in text or "True" in text


@pytest.mark.parametrize("name, value, plain", [
    ("steps", np.int64(3), 3), ("lr", np.float32(0.5), 0.5), ("lr", 1, 1.0), ("temperature", [np.float64(1), 0.5], (1.0, 0.5)),
    ("temperature", np.array([1.0, 0.5]), (1.0, 0.5)), ("label_tokens", "auto", "auto"), ("kl_weight", None, None),
    ("positive_weight", None, None), ("batch_size", None, None), ("calibrated", np.bool_(False), False), ("proposals", 0, 0),
    ("kl_weight", 0, 0.0), ("heldout", 0, 0.0), ("seed", 2**63 - 1, 2**63 - 1), ("prompts", ["A {label}:"], ("A {label}:",))])
def test_a_right_value_becomes_a_plain_one(name, value, plain):
    found = getattr(Settings(**{name: value}), name)
    assert found == plain and type(found) is type(plain)


def test_the_defaults_are_valid_and_frozen_and_can_be_compared():
    assert Settings() == Settings() and hash(Settings()) == hash(Settings(prompts=None)) and Settings() != Settings(seed=1)
    with pytest.raises(FrozenInstanceError): Settings().steps = 3


def test_changes_keep_the_rest():
    settings = make_settings(Settings(steps=7), lr=0.1, seed=np.int64(2))
    assert settings == Settings(steps=7, lr=0.1, seed=2) and make_settings() == Settings()
    assert make_settings(settings) == settings


@pytest.mark.parametrize("name, near", [("step", "steps"), ("stop_wieght", "stop_weight"), ("temperatur", "temperature"),
                                        ("learning_rate", None), ("xyzxyz", None)])
def test_an_unknown_name_is_refused_with_the_nearest_one(name, near):
    with pytest.raises(ValueError, match=f"there is no setting '{name}'") as error: make_settings(**{name: 1})
    if near: assert near in str(error.value)


def test_settings_of_another_kind_are_refused():
    for wrong in (dict(steps=3), 3, "channel"):
        with pytest.raises(ValueError, match="is not a Settings object"): make_settings(wrong)


def test_prompts_have_to_fit_the_discriminator():
    question = Question("Is {word} an example of {label}?")
    assert Settings(discriminator="direct", prompts=question).prompts == question
    with pytest.raises(ValueError, match="prompts"): Settings(discriminator="direct", prompts=["A {label}:"])
    with pytest.raises(ValueError, match="prompts"): make_settings(Settings(prompts=["A {label}:"]), discriminator="direct")


@pytest.mark.parametrize("settings", [
    Settings(), Settings(steps=3, temperature=(2, 0.5), prompts=["A {label}:", "The {label}:"], label_tokens="auto", kl_weight=0.5),
    Settings(discriminator="direct", prompts=Question("Is {word} {label}?", few_shot=[["Is a b?", "no"]]), positive_weight=None)])
def test_saved_settings_come_back(settings):
    plain = json.loads(json.dumps(settings.plain()))
    assert plain == settings.plain() and list(plain) == list(FIELDS)
    assert Settings.from_plain(plain) == settings


def test_settings_of_another_version_are_refused_by_name():
    plain = Settings().plain()
    old = {name: value for name, value in plain.items() if name not in ("seed", "lr")}
    with pytest.raises(ValueError, match="saved settings lack lr, seed"): Settings.from_plain(old)
    with pytest.raises(ValueError, match="there is no setting 'ramp'"): Settings.from_plain(plain | {"ramp": [0, 1]})


def test_the_kl_weight_is_the_discriminators_unless_it_is_given():
    class Direct: kl_weight = 0.02
    assert kl_weight(Settings(), Direct) == 0.02 and kl_weight(Settings(kl_weight=0.0), Direct) == 0.0
