"""The direct discriminator, held against a naive one that runs every full prompt alone and computes all logits."""
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_tiny_lm, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlabel.direct as module
from tokenlabel.direct import (FEW, PAPER_QUESTIONS, QUESTIONS, Question, answer_ids, direct, examples, render,
                               split_levels, split_prompt)
from tokenlabel.feature import Feature, tokenize
from tokenlabel.lm import load_lm
from tokenlabel.objective import LossWeights, objective
from tokenlabel.softlabel import embed_softlabel, log_softlabel

ATOL = 1e-4

WORDS = Feature.from_words("animals", active={"cat": 1.0, "horse": 1.0, "the dog and the horse": 0.7},
                           inactive=["house", "red", "é", "x"])
TEXTS = Feature.from_texts("animals", ["the cat sat.", "a house", "dog and the cat dog"],
                           [[(4, 7, 1.0)], [], [(0, 3, 0.8), (16, 19, 1.0)]])
ASK_WORD = Question('Is "{word}" a {label}? ', "Say Yes or No.", answer="A: ", yes="yes", no="no")
ASK_TEXT = Question('In "{text}", is "{token}" a {label}?', answer="Rating: ", yes="1", no="0",
                    shots=(('In "a mat", is "mat" a book?', "no"),))
ASK = {"words": ASK_WORD, "texts": ASK_TEXT}
CASES = {"words": (WORDS, [("Say Yes or No.\nIs \"" + word + '" a', "? \nA: ", "yes", "no")
                           for word in WORDS.texts]),
         "texts": (TEXTS, [('In "a mat", is "mat" a book?\nRating: 0\nIn "' + text + '", is "' + token + '" a',
                            "?\nRating: ", "1", "0")
                           for text, found in zip(TEXTS.texts, (["the", "cat", "sat", "."], ["a", "house"],
                                                                ["dog", "and", "the", "cat", "dog"]))
                           for token in found])}


def naive_logits(lm, prompts, label):
    "z [U] of one label [T, d]: each full prompt alone, and logits over the whole vocabulary."
    z = []
    for before, after, yes, no in prompts:
        start, end = (lm.model.get_input_embeddings()(torch.tensor(ids))
                      for ids in (lm.encode_start(before), lm.encode(after)))
        logits = lm.model(inputs_embeds=torch.cat([start, label, end])[None], use_cache=False).logits[0, -1].float()
        z.append(logits[lm.encode(yes)[0]] - logits[lm.encode(no)[0]])
    return torch.stack(z)


def soft_labels(lm, seed, B, T):
    "Label embeddings [B, T, d], none of them near one token."
    v = torch.randn(B, T, len(lm.embedding), generator=torch.Generator().manual_seed(seed))
    return embed_softlabel(log_softlabel(v, 0.5, lm.admissible), lm).detach()


def loss_and_gradient(judge, logits, label):
    "Total loss of the objective, for a function that gives the logits of all units, and its gradient for the label."
    label = label.clone().requires_grad_()
    lm = judge.lm
    log_p = log_softlabel(torch.zeros(len(label), len(lm.embedding)), 1.0, lm.admissible)
    loss = objective(logits(label), judge.tokens.activation, log_p, judge.log_prior, LossWeights(),
                     scale=judge.scaled).total
    return loss.detach(), torch.autograd.grad(loss.sum(), label)[0]


def close(a, b, atol=ATOL): return torch.allclose(a.double(), b.double(), rtol=0, atol=atol)


# --- equal to the naive one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("mode", ["words", "texts"])
def test_logits_loss_and_gradient_equal_the_naive_ones(family, T, mode):
    lm = make_tiny_lm(family)
    feature, prompts = CASES[mode]
    tokens, label = tokenize(feature, lm), soft_labels(lm, 0, 3, T)
    assert len({len(lm.encode_start(before)) for before, *_ in prompts}) > 2  # rows are padded
    naive = lambda label: torch.stack([naive_logits(lm, prompts, one) for one in label])
    judge = direct(lm, tokens, ASK[mode])
    slow_loss, slow_gradient = loss_and_gradient(judge, naive, label)
    with torch.no_grad(): slow = naive(label)
    assert len(slow[0]) == len(tokens.activation) and slow.std(1).min() > 1e-2  # there is something to compare
    assert slow_gradient.abs().max() > 1e-3
    for settings in ({}, {"memory": 0}, {"positions": 1}, {"memory": 0, "positions": 60}):
        judge = direct(lm, tokens, ASK[mode], **settings)
        with torch.no_grad(): assert close(judge.logits(label, judge.batch()), slow)
        loss, gradient = loss_and_gradient(judge, lambda x: judge.logits(x, judge.batch()), label)
        assert close(loss, slow_loss) and close(gradient, slow_gradient, ATOL * slow_gradient.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_bfloat16_stays_near_the_naive_one_in_bfloat16(family):
    lm = load_lm(tiny_model(family).to(torch.bfloat16), tokenizer=make_tiny_lm(family).tokenizer)
    judge = direct(lm, tokenize(WORDS, lm), ASK_WORD)
    label = soft_labels(lm, 1, 2, 1)
    fast = judge.logits(label, judge.batch())
    slow = torch.stack([naive_logits(lm, CASES["words"][1], one) for one in label])
    assert fast.dtype == torch.float32 and slow.std() > 0.2
    assert close(fast, slow, 0.03)  # two logits of size 2, with 8 bits each


@pytest.mark.parametrize("mode", ["words", "texts"])
@pytest.mark.parametrize("T", [1, 2])
@torch.no_grad()
def test_the_end_of_a_label_is_asked_behind_a_few_of_the_prompts(mode, T):
    lm = make_tiny_lm("llama")
    feature, prompts = CASES[mode]
    judge, label = direct(lm, tokenize(feature, lm), ASK[mode]), soft_labels(lm, 2, 3, T)
    few = [before for before, *_ in prompts][::max(1, len(prompts) // FEW)][:FEW]
    expected = []
    for one in label:
        starts = [lm.model.get_input_embeddings()(torch.tensor(lm.encode_start(before))) for before in few]
        last = [lm.model(inputs_embeds=torch.cat([start, one])[None], use_cache=False).logits[0, -1] for start in starts]
        expected.append(torch.stack([x.log_softmax(-1)[judge.after[0]] for x in last]).mean())
    assert close(judge.log_end(label), torch.stack(expected))


@given(family=st.sampled_from(FAMILIES), lengths=st.lists(st.integers(1, 30), min_size=2, max_size=9),
       memory=st.sampled_from([0, 20_000, 2**30]), positions=st.integers(1, 200), B=st.integers(1, 3),
       T=st.integers(1, 3), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_equal_to_the_naive_one_whatever_the_lengths_memory_and_parts(family, lengths, memory, positions, B, T, seed):
    lm = make_tiny_lm(family)
    letters = "the cat sat on a mat and the dog lay by it"
    words = [f"{letters[:n]}{i}" for i, n in enumerate(lengths)]
    feature = Feature.from_words("x", active=words[:1], inactive=words[1:])
    judge = direct(lm, tokenize(feature, lm), ASK_WORD, memory=memory, positions=positions)
    label = soft_labels(lm, seed, B, T).requires_grad_()
    prompts = [("Say Yes or No.\nIs \"" + word + '" a', "? \nA: ", "yes", "no") for word in feature.texts]
    fast = judge.logits(label, judge.batch())
    slow = torch.stack([naive_logits(lm, prompts, one) for one in label])
    assert close(fast, slow)
    direction = torch.randn(slow.shape, generator=torch.Generator().manual_seed(seed))
    a, b = (torch.autograd.grad((z * direction).sum(), label)[0] for z in (fast, slow))
    assert close(a, b, ATOL * max(1, b.abs().max()))


@torch.no_grad()
def test_hard_labels_are_the_prompts_with_the_tokens_in_them():
    lm = make_tiny_lm("opt")
    judge = direct(lm, tokenize(WORDS, lm), ASK_WORD)
    labels = torch.tensor([lm.encode(" the cat"), lm.encode(" dog car")[:2]])
    for row, label in zip(judge.hard_logits(labels, judge.batch()), labels.tolist()):
        for z, (before, after, yes, no) in zip(row, CASES["words"][1]):
            ids = [*lm.encode_start(before), *label, *lm.encode(after)]
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert close(z, logits[lm.encode(yes)[0]] - logits[lm.encode(no)[0]])


@torch.no_grad()
def test_a_chat_is_written_by_the_template():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}[assistant] {% endif %}")
    lm = load_lm(tiny_model("llama"), tokenizer=tokenizer)
    question = replace(ASK_WORD, shots=(('Is "cat" a house?', "no"),))
    judge = direct(lm, tokenize(WORDS, lm), question)
    before = '[system] Say Yes or No.\n[user] Is "cat" a house?\n[assistant] A: no\n[user] Is "{}" a'
    prompts = [(before.format(word), "? \n[assistant] A: ", "yes", "no") for word in WORDS.texts]  # <bos> put before
    label = soft_labels(lm, 2, 1, 1)
    assert close(judge.logits(label, judge.batch())[0], naive_logits(lm, prompts, label[0]))
    plain = direct(lm, tokenize(WORDS, lm), replace(ASK_WORD, chat=False))
    assert close(plain.logits(label, plain.batch())[0], naive_logits(lm, CASES["words"][1], label[0]))


def test_a_template_without_a_system_turn_gets_it_in_the_first_question():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.chat_template = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
                               "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    lm = load_lm(tiny_model("gpt2"), tokenizer=tokenizer)
    assert render(ASK_WORD, lm) == ('[user] Say Yes or No.\n\nIs "{word}" a {label}? \nA: ', True)


def test_on_the_default_model_with_real_words(lm):
    words = Feature.from_words("animals", active=["dog", "hippopotamus"], inactive=["chair", "金鱼缸"])
    tokens = tokenize(words, lm)
    question = Question('Q: Is "{word}" an example of {label}?', answer="A:", yes=" Yes", no=" No", chat=False)
    judge = direct(lm, tokens, question)
    label = torch.cat([lm.embed([lm.encode(" animal")]), soft_labels(lm, 0, 1, 1)]).requires_grad_()
    prompts = [(f'Q: Is "{word}" an example of', "?\nA:", " Yes", " No") for word in tokens.feature.texts]
    fast, slow = judge.logits(label, judge.batch()), torch.stack([naive_logits(lm, prompts, one) for one in label])
    assert close(fast, slow)
    a, b = (torch.autograd.grad(z.square().sum(), label)[0] for z in (fast, slow))
    assert close(a, b, ATOL * b.abs().max())


# --- what the search asks of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["words", "texts"])
@torch.no_grad()
def test_batches_cover_all_units_in_order_and_a_batch_has_its_units_logits(mode, monkeypatch):
    monkeypatch.setattr(module, "UNITS", 3)
    monkeypatch.setattr(module, "LABELS", 2)
    lm = make_tiny_lm("qwen2")
    judge = direct(lm, tokenize(CASES[mode][0], lm), ASK[mode], positions=50)
    U = len(judge.tokens.activation)
    assert torch.cat([batch.unit for batch in judge.batches()]).tolist() == list(range(U)) == judge.item.tolist()
    assert len(judge.batches()) > 1
    labels = lm.admissible.nonzero()[5:200:40]
    whole = judge.hard_logits(labels, judge.batch())
    assert close(torch.cat([judge.hard_logits(labels, batch) for batch in judge.batches()], 1), whole, 1e-5)
    assert close(judge.hard_logits(labels, judge.batch([4, 1])), whole[:, [4, 1]], 1e-5)
    assert close(judge.logits(lm.embed(labels), judge.batch()), whole, 1e-5)
    assert judge.question == ASK[mode]


def test_the_record_of_the_prompt_is_its_text():
    assert ASK_WORD.text == 'Say Yes or No.\nIs "{word}" a {label}? \nA: '
    assert ASK_TEXT.text.startswith('In "a mat", is "mat" a book?\nRating: 0\nIn "{text}"')


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_the_log_prior_is_the_mean_over_the_examples_that_are_not_held_out(family, monkeypatch):
    lm = make_tiny_lm(family)
    tokens = tokenize(WORDS, lm, frozenset({"cat", "red"}))
    log_p = []
    for (before, *_), heldout in zip(CASES["words"][1], tokens.heldout):
        if heldout: continue
        logits = lm.model(input_ids=torch.tensor([lm.encode_start(before)])).logits[0, -1].double()
        log_p.append(logits[lm.admissible].log_softmax(-1))
    mean = torch.stack(log_p).mean(0)
    for memory, read in ((2**30, 4096), (0, 4096), (2**30, 60)):
        monkeypatch.setattr(module, "READ", read)
        judge = direct(lm, tokens, ASK_WORD, memory=memory)
        assert close(judge.log_prior[lm.admissible], mean)
        assert (judge.log_prior[~lm.admissible] < -1e8).all()


@pytest.mark.parametrize("mode", ["words", "texts"])
@torch.no_grad()
def test_prior_shots_change_what_is_expected_as_a_label_and_nothing_else(mode):
    lm, shots = make_tiny_lm("llama"), (('Is "red" a book?', "no"), ('Is "red" a red?', "yes"))
    tokens, label = tokenize(CASES[mode][0], lm, frozenset({"cat"})), lm.embed([[40], [41]])
    plain, taught, shown = (direct(lm, tokens, replace(ASK[mode], **how))
                            for how in ({}, dict(prior_shots=shots), dict(shots=ASK[mode].shots + shots)))
    assert torch.equal(taught.logits(label, taught.batch()), plain.logits(label, plain.batch()))
    assert torch.equal(taught.log_end(label), plain.log_end(label))
    assert close(taught.log_prior[lm.admissible], shown.log_prior[lm.admissible])
    assert (taught.log_prior - plain.log_prior)[lm.admissible].abs().max() > .1


def test_prior_shots_that_do_not_fit_are_left_out():
    lm, long = make_tiny_lm("llama"), (("x" * 300, "no"),)
    plain, taught = (direct(lm, tokenize(WORDS, lm), replace(ASK_WORD, prior_shots=shots)) for shots in ((), long))
    assert torch.equal(taught.log_prior, plain.log_prior)


def test_the_memory_is_not_exceeded():
    lm = make_tiny_lm("llama")
    tokens = tokenize(TEXTS, lm)
    for memory in (0, 2_000, 20_000, 100_000, 2**30):
        judge = direct(lm, tokens, ASK_TEXT, memory=memory)
        kept = [level for level in judge.levels if level.past]
        assert sum(k.nbytes + v.nbytes for level in kept for k, v in level.past.layers) <= memory
    assert len(kept) == len(judge.levels) == 3  # the common beginning, texts, units


def test_what_is_kept_is_not_changed_by_its_use():
    lm = make_tiny_lm("gemma3")
    judge = direct(lm, tokenize(TEXTS, lm), ASK_TEXT)
    kept = [tensor.clone() for level in judge.levels for layer in level.past.layers for tensor in layer]
    label = soft_labels(lm, 0, 2, 1).requires_grad_()
    runs = [judge.logits(label, judge.batch()) for _ in range(2)]
    runs[0].sum().backward()
    assert torch.equal(*runs)
    now = [tensor for level in judge.levels for layer in level.past.layers for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(kept, now))


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.sampled_from("abc")),
                min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_levels_of_a_row_put_together_are_the_row(pairs):
    rows, groups = zip(*pairs)
    levels = split_levels(rows, groups)
    assert len(levels[-1].ids) == len(rows) and all(levels[-1].ids)
    for u, row in enumerate(rows):
        found, at = [], u
        for level in reversed(levels): found, at = level.ids[at] + found, int(level.parent[at])
        assert found == row


def test_a_token_may_be_named_before_its_text(monkeypatch):
    "Then the units of a text have little in common, and a text of several units nothing of its own."
    lm, question = make_tiny_lm("llama"), Question('Word "{token}" of "{text}": is it {label}?', chat=False)
    feature = Feature.from_texts("t", [*(f"the cat sat {i}" for i in range(6)), "dog"], [[(4, 7, 1.0)]] * 6 + [[(0, 3, 1.0)]])
    label, found = lm.embed([[70]]), []
    for read, memory in ((10_000, 1e9), (30, 1e9), (30, 0.0)):
        monkeypatch.setattr(module, "READ", read)
        judge = direct(lm, tokenize(feature, lm), question, memory=memory)
        found.append(judge.logits(label, judge.batch()))
    for z in found[1:]: assert torch.allclose(z, found[0], atol=1e-4)


def test_a_word_of_a_text_is_named_as_it_stands_there():
    lm = make_tiny_lm("llama")
    feature = Feature.from_texts("x", ["The Cats, 24 of them", "it  was {label} red"], [[(4, 8, 1.0)], []])
    found = examples(tokenize(feature, lm), lm)
    assert [x["token"] for x in found if x["text"] == feature.texts[0]][:3] == ["The", "Cats", ","]
    direct(lm, tokenize(feature, lm), ASK_TEXT)  # braces in a text are no slots


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user, mode, message", [
    ('Is "{word}" good?', "words", "each of the slots {word}, {label} once"),
    ('Is "{word}" a {label} {label}?', "words", "once"),
    ("Is it a {label}?", "words", "once"),
    ('Is "{word}" "{word}" a {label}?', "words", "once"),
    ('Is {label} what "{word}" is?', "words", "has to come after {word}"),
    ('Is "{word}" a {label}?', "texts", "each of the slots {text}, {token}, {label} once"),
    ('Is "{token}" a {label}?', "texts", "once"),
    ('Is "{token}" in "{text}" a {label}?', "words", "once"),
])
def test_slots_that_are_missing_or_misplaced_are_named(user, mode, message):
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError) as error: direct(lm, tokenize(CASES[mode][0], lm), Question(user))
    assert message in str(error.value) and user in str(error.value).replace("\\'", "'")


def test_something_stands_behind_the_label():
    lm, ends = make_tiny_lm("llama"), Question("Is {word} one of these?", answer="{label}", yes="y", no="n")
    with pytest.raises(ValueError, match="something has to stand behind it"): direct(lm, tokenize(CASES["words"][0], lm), ends)


@pytest.mark.parametrize("yes, no", [("Yes", "Yes"), ("tall", "tale"), ("", "No")])
def test_answers_that_begin_alike_or_are_empty_are_refused(yes, no):
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError, match="differ in their first token"):
        answer_ids(replace(ASK_WORD, yes=yes, no=no), lm)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_an_example_too_long_for_the_model_is_named(family):
    lm = make_tiny_lm(family)
    long = Feature.from_words("x", active=["cat"], inactive=["dog", "qz" * 150])
    with pytest.raises(ValueError, match="word 'qzqz.* takes"): direct(lm, tokenize(long, lm), ASK_WORD)
    text = "a dog " * 150
    long = Feature.from_texts("x", ["a cat", text], [[(2, 5, 1.0)], []])
    with pytest.raises(ValueError, match="token 'a' in text 'a dog .* takes"): direct(lm, tokenize(long, lm), ASK_TEXT)


def test_an_example_that_just_fits_is_fine():
    lm = make_tiny_lm("gpt2")
    room = 256 - 1 - len(lm.encode("? \nA: ")) - len(lm.encode_start('Say Yes or No.\nIs "" a'))
    words = Feature.from_words("x", active=["z" * room], inactive=["cat"])
    judge = direct(lm, tokenize(words, lm), ASK_WORD)
    label, long = soft_labels(lm, 0, 1, 1), f'Say Yes or No.\nIs "{"z" * room}" a'
    assert len(lm.encode_start(long)) + 1 + len(judge.after) == 256
    with pytest.raises(ValueError, match="takes"): direct(lm, tokenize(words, lm), ASK_WORD, label_tokens=2)
    with torch.no_grad():
        slow = naive_logits(lm, [(long, "? \nA: ", "yes", "no")], label[0])
        assert close(judge.logits(label, judge.batch())[0, :1], slow)


@torch.no_grad()
def test_padding_behind_a_long_text_does_not_run_out_of_the_models_positions():
    lm = make_tiny_lm("gpt2")
    texts = ["a dog " * 95 + "x.", "z" * 60 + " is red."]
    judge = direct(lm, tokenize(Feature.from_texts("x", texts, [[(0, 1, 1.0)], []]), lm), ASK_TEXT)
    longest = [max(map(len, level.ids)) for level in judge.levels]
    assert sum(longest) > 256
    label = soft_labels(lm, 0, 1, 1)
    before = CASES["texts"][1][0][0].split("In \"the cat")[0] + f'In "{texts[0]}", is "a" a'
    slow = naive_logits(lm, [(before, "?\nRating: ", "1", "0")], label[0])
    assert close(judge.logits(label, judge.batch([0]))[0], slow)


def test_the_built_in_questions_are_sound(lm):
    for mode, question in [*QUESTIONS.items(), *((("texts", "words")["{word}" in question.user], question)
                                                 for question in PAPER_QUESTIONS.values())]:
        before, after = split_prompt(render(question, lm)[0], mode)
        assert answer_ids(question, lm) and before and after
