"""Prompts and questions as data, and what is refused."""
import json

import pytest

from tokenlabel.prompts import (PAPER_QUESTIONS, PROMPTS, QUESTIONS, Question, check_prompts, plain_prompts,
                                prompts_from, split_at_slot)

ASK = Question('Is "{word}" a {label}? ', "Say Yes or No.", "A: ", "yes", "no", few_shot=(('Is "cat" a house?', "no"),))


def test_the_built_in_prompts_have_one_slot():
    for texts in PROMPTS.values():
        check_prompts(texts, "channel")
        assert all(text.format(label="x").endswith("x:") or split_at_slot(text)[1] for text in texts)


@pytest.mark.parametrize("text, message", [
    ("A list:", "has 0 label slots"), ("{label} and {label}:", "has 2 label slots"),
    ("{label}: a list", "before and after"), ("A list of {label}", "before and after"),
    (" {label}:", "before and after"), (None, "is a text"), (3, "is a text")])
def test_a_prompt_needs_one_slot_with_text_on_both_sides(text, message):
    with pytest.raises(ValueError, match=message): split_at_slot(text)


def test_the_text_of_a_question_has_one_turn_per_line():
    assert ASK.text == 'Say Yes or No.\nIs "cat" a house?\nA: no\nIs "{word}" a {label}? \nA: '
    assert ASK.turns()[0] == ("system", "Say Yes or No.") and Question("Is {word} {label}?").turns() == [
        ("user", "Is {word} {label}?")]


@pytest.mark.parametrize("name", ["few_shot", "prior_few_shot"])
def test_a_few_shot_reply_is_yes_or_no(name):
    with pytest.raises(ValueError, match="'Rating: 1'.*'yes' or 'no'"): Question("?", **{name: [("?", "Rating: 1")]})


def test_lists_from_json_become_tuples():
    assert Question("?", few_shot=[["a", "yes"]]) == Question("?", few_shot=(("a", "yes"),))
    assert hash(Question("?", few_shot=[["a", "yes"]]))


def test_the_built_in_questions_have_the_slots_of_one_mode():
    for question in [*QUESTIONS.values(), *PAPER_QUESTIONS.values()]:
        slots = {"word": "y"} if "{word}" in question.user else {"text": "y", "token": "z"}
        filled = question.text.format(label="x", **slots)
        assert "{" not in filled and question.user.count("{label}") == 1
    assert "{word}" in QUESTIONS["words"].user and "{token}" in QUESTIONS["texts"].user


@pytest.mark.parametrize("prompts, discriminator", [
    (None, "channel"), (["A {label}:"], "channel"), (("A {label}:", "Some {label}:"), "channel"), (None, "direct"),
    (ASK, "direct")])
def test_prompts_that_fit(prompts, discriminator):
    assert check_prompts(prompts, discriminator) is None


@pytest.mark.parametrize("prompts, discriminator, message", [
    ("A {label}:", "channel", "takes a list of one or more"), ("", "channel", "takes a list"),
    ([], "channel", "takes a list"), (ASK, "channel", "takes a list"),
    (3, "channel", "prompts is 3"), ([3], "channel", "is a text"),
    (["A list:"], "channel", "0 label slots"), ("A {label}:", "direct", "takes a Question"),
    (["A {label}:"], "direct", "takes a Question"), ({"user": "?"}, "direct", "takes a Question")])
def test_prompts_that_do_not_fit(prompts, discriminator, message):
    with pytest.raises(ValueError, match=message): check_prompts(prompts, discriminator)


@pytest.mark.parametrize("prompts", [None, ("A {label}:",), ASK, *PAPER_QUESTIONS.values(), *QUESTIONS.values()])
def test_prompts_survive_json(prompts):
    assert prompts_from(json.loads(json.dumps(plain_prompts(prompts)))) == prompts
    assert prompts_from(prompts) == prompts
