"""The direct discriminator, held against a naive one that runs every full prompt alone and computes all logits."""
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_tiny_lm, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.direct import DirectLayout, direct, encode_question, read_levels, render, slot_values, split_levels
from tokenlabel.feature import Feature
from tokenlabel.forward import Query
from tokenlabel.lm import load_lm
from tokenlabel.objective import RowWeights, class_weights, objective
from tokenlabel.prompts import PAPER_QUESTIONS, QUESTIONS, Question
from tokenlabel.softlabel import embed_softlabel, log_softlabel
from tokenlabel.tokenize import tokenize

ATOL = 1e-4

WORDS = Feature.from_words("animals", active={"cat": 1.0, "horse": 1.0, "the dog and the horse": 0.7},
                           inactive=["house", "red", "é", "x"])
TEXTS = Feature.from_texts("animals", ["the cat sat.", "a house", "dog and the cat dog"],
                           [[(4, 7, 1.0)], [], [(0, 3, 0.8), (16, 19, 1.0)]])
ASK_WORD = Question('Is "{word}" a {label}? ', "Say Yes or No.", answer="A: ", yes="yes", no="no")
ASK_TEXT = Question('In "{text}", is "{token}" a {label}?', answer="Rating: ", yes="1", no="0",
                    few_shot=(('In "a mat", is "mat" a book?', "no"),))
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
    "Label embeddings [B, T, d], none of them close to one token."
    v = torch.randn(B, T, len(lm.embedding), generator=torch.Generator().manual_seed(seed))
    return embed_softlabel(log_softlabel(v, 0.5, lm.admissible), lm).detach()


def loss_and_gradient(discriminator, logits, label):
    "Total loss of the objective, for a function that gives the logits of all examples, and its gradient for the label."
    label = label.clone().requires_grad_()
    lm = discriminator.lm
    log_p = log_softlabel(torch.zeros(len(label), len(lm.embedding)), 1.0, lm.admissible)
    on, off = class_weights(discriminator.tokens.activation, smooth=discriminator.needs_scale)
    loss = objective(logits(label), on, off, log_p, discriminator.label_prior, RowWeights(1.0, 0.2, 0.02),
                     discriminator.needs_scale).total
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
    discriminator = direct(lm, tokens, ASK[mode])
    slow_loss, slow_gradient = loss_and_gradient(discriminator, naive, label)
    with torch.no_grad(): slow = naive(label)
    assert len(slow[0]) == len(tokens.activation) and slow.std(1).min() > 1e-2  # there is something to compare
    assert slow_gradient.abs().max() > 1e-3
    for settings in ({}, {"memory": 0}, {"positions": 1}, {"memory": 0, "positions": 60}):
        discriminator = direct(lm, tokens, ASK[mode], **settings)
        with torch.no_grad(): assert close(discriminator.read(label, discriminator.batch())[0], slow)
        fast = lambda label: discriminator.read(label, discriminator.batch())[0]
        loss, gradient = loss_and_gradient(discriminator, fast, label)
        assert close(loss, slow_loss) and close(gradient, slow_gradient, ATOL * slow_gradient.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_bfloat16_stays_near_the_naive_one_in_bfloat16(family):
    lm = load_lm(tiny_model(family).to(torch.bfloat16), tokenizer=make_tiny_lm(family).tokenizer)
    discriminator = direct(lm, tokenize(WORDS, lm), ASK_WORD)
    label = soft_labels(lm, 1, 2, 1)
    fast = discriminator.read(label, discriminator.batch())[0]
    slow = torch.stack([naive_logits(lm, CASES["words"][1], one) for one in label])
    assert fast.dtype == torch.float32 and slow.std() > 0.2
    assert close(fast, slow, 0.03)  # two logits of size 2, with 8 bits each


@pytest.mark.parametrize("mode", ["words", "texts"])
@pytest.mark.parametrize("T", [1, 2])
@torch.no_grad()
def test_the_end_of_a_label_is_asked_after_four_of_the_prompts(mode, T):
    lm = make_tiny_lm("llama")
    feature, prompts = CASES[mode]
    discriminator, label = direct(lm, tokenize(feature, lm), ASK[mode]), soft_labels(lm, 2, 3, T)
    few = [before for before, *_ in prompts][::max(1, len(prompts) // 4)][:4]
    expected = []
    for one in label:
        starts = [lm.model.get_input_embeddings()(torch.tensor(lm.encode_start(before))) for before in few]
        last = [lm.model(inputs_embeds=torch.cat([start, one])[None], use_cache=False).logits[0, -1]
                for start in starts]
        expected.append(torch.stack([x.log_softmax(-1)[discriminator.after[0]] for x in last]).mean())
    assert close(discriminator.stop_log_prob(label), torch.stack(expected))


@given(family=st.sampled_from(FAMILIES), lengths=st.lists(st.integers(1, 30), min_size=2, max_size=9),
       memory=st.sampled_from([0, 20_000, 2**30]), positions=st.integers(1, 200), B=st.integers(1, 3),
       T=st.integers(1, 3), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_equal_to_the_naive_one_whatever_the_lengths_memory_and_parts(family, lengths, memory, positions, B, T, seed):
    lm = make_tiny_lm(family)
    letters = "the cat sat on a mat and the dog lay by it"
    words = [f"{letters[:n]}{i}" for i, n in enumerate(lengths)]
    feature = Feature.from_words("x", active=words[:1], inactive=words[1:])
    discriminator = direct(lm, tokenize(feature, lm), ASK_WORD, memory=memory, positions=positions)
    label = soft_labels(lm, seed, B, T).requires_grad_()
    prompts = [("Say Yes or No.\nIs \"" + word + '" a', "? \nA: ", "yes", "no") for word in feature.texts]
    fast = discriminator.read(label, discriminator.batch())[0]
    slow = torch.stack([naive_logits(lm, prompts, one) for one in label])
    assert close(fast, slow)
    direction = torch.randn(slow.shape, generator=torch.Generator().manual_seed(seed))
    a, b = (torch.autograd.grad((z * direction).sum(), label)[0] for z in (fast, slow))
    assert close(a, b, ATOL * max(1, b.abs().max()))


@torch.no_grad()
def test_discrete_labels_are_the_prompts_with_the_tokens_in_them():
    lm = make_tiny_lm("opt")
    discriminator = direct(lm, tokenize(WORDS, lm), ASK_WORD)
    labels = torch.tensor([lm.encode(" the cat"), lm.encode(" dog car")[:2]])
    for row, label in zip(discriminator.token_logits(labels, discriminator.batch()), labels.tolist()):
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
    question = replace(ASK_WORD, few_shot=(('Is "cat" a house?', "no"),))
    discriminator = direct(lm, tokenize(WORDS, lm), question)
    before = '[system] Say Yes or No.\n[user] Is "cat" a house?\n[assistant] A: no\n[user] Is "{}" a'
    prompts = [(before.format(word), "? \n[assistant] A: ", "yes", "no") for word in WORDS.texts]  # <bos> put before
    label = soft_labels(lm, 2, 1, 1)
    assert close(discriminator.read(label, discriminator.batch())[0][0], naive_logits(lm, prompts, label[0]))
    plain = direct(lm, tokenize(WORDS, lm), replace(ASK_WORD, chat=False))
    assert close(plain.read(label, plain.batch())[0][0], naive_logits(lm, CASES["words"][1], label[0]))


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
    discriminator = direct(lm, tokens, question)
    label = torch.cat([lm.embed([lm.encode(" animal")]), soft_labels(lm, 0, 1, 1)]).requires_grad_()
    prompts = [(f'Q: Is "{word}" an example of', "?\nA:", " Yes", " No") for word in tokens.feature.texts]
    fast, _ = discriminator.read(label, discriminator.batch())
    slow = torch.stack([naive_logits(lm, prompts, one) for one in label])
    assert close(fast, slow)
    a, b = (torch.autograd.grad(z.square().sum(), label)[0] for z in (fast, slow))
    assert close(a, b, ATOL * b.abs().max())


# --- what the search asks of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["words", "texts"])
@torch.no_grad()
def test_batches_cover_all_examples_in_order_and_a_batch_has_the_logits_of_its_examples(mode):
    lm = make_tiny_lm("qwen2")
    discriminator = direct(lm, tokenize(CASES[mode][0], lm), ASK[mode], positions=50)
    batches, everything = discriminator.batches(size=3), discriminator.batch()
    assert torch.cat([batch.example for batch in batches]).tolist() == list(range(len(discriminator.tokens.activation)))
    assert torch.equal(discriminator.draws, everything.example)
    assert len(batches) > 1 and len(discriminator.batches()) == 1
    cost = len(everything.example) * (1 + len(discriminator.after))
    assert everything.positions == cost == sum(batch.positions for batch in batches)
    labels = lm.admissible.nonzero()[5:200:40]
    whole = discriminator.token_logits(labels, everything)
    assert close(torch.cat([discriminator.token_logits(labels, batch, size=2) for batch in batches], 1), whole, 1e-5)
    assert close(discriminator.token_logits(labels, discriminator.batch([4, 1])), whole[:, [4, 1]], 1e-5)
    assert close(discriminator.read(lm.embed(labels), everything)[0], whole, 1e-5)
    assert discriminator.prompts == ASK[mode]


@torch.no_grad()
def test_read_gives_what_is_expected_in_later_slots():
    lm = make_tiny_lm("qwen2")
    discriminator, label = direct(lm, tokenize(WORDS, lm), ASK_WORD, label_tokens=3), soft_labels(lm, 4, 2, 3)
    _, prior = discriminator.read(label, discriminator.batch())
    assert prior.shape == (2, 3, len(lm.embedding))
    assert torch.equal(prior[:, 0], discriminator.label_prior.expand(2, -1))
    assert torch.equal(discriminator.read(label, discriminator.batch(), prompt_index=5)[1], prior)
    for t in (1, 2):
        assert close(discriminator.next_label_prior(label[:, :t])[:, lm.admissible], prior[:, t, lm.admissible])


@torch.no_grad()
def test_queries_are_read_one_after_another():
    lm = make_tiny_lm("llama")
    discriminators = [direct(lm, tokenize(CASES[mode][0], lm), ASK[mode]) for mode in ("words", "texts")]
    queries = [Query(one, soft_labels(lm, i, 2, 1 + i), one.batch([i, 3])) for i, one in enumerate(discriminators)]
    for (z, prior), (discriminator, *rest) in zip(discriminators[0].read_together(queries), queries):
        expected = discriminator.read(*rest)
        assert torch.equal(z, expected[0]) and torch.equal(prior, expected[1])


def test_stages_cover_the_training_examples():
    lm = make_tiny_lm("llama")
    discriminator = direct(lm, tokenize(WORDS, lm, frozenset({"cat", "red"})), ASK_WORD)
    stages, train = discriminator.stages(size=2), ~discriminator.tokens.heldout
    assert [len(stage.batch.example) for stage in stages] == [2, 2, 1]
    assert torch.equal(stages[-1].known, train) and stages[0].known.sum() == 2
    assert torch.equal(torch.cat([stage.batch.example for stage in stages]), train.nonzero()[:, 0])
    for stage in stages: assert (stage.bound[stage.known] == 0).all() and stage.bound[~stage.known].isinf().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["words", "texts"])
@pytest.mark.parametrize("T", [1, 2])
def test_a_layout_is_read_like_its_batches(family, mode, T):
    lm = make_tiny_lm(family)
    discriminator = direct(lm, tokenize(CASES[mode][0], lm), ASK[mode], T)
    assert len(discriminator.levels) == {"words": 2, "texts": 3}[mode]
    batches, label = [discriminator.batch(draws) for draws in ([0, 4, 2], [3, 1], [5, 0, 3])], soft_labels(lm, 5, 2, T)
    layout = discriminator.layout(batches, [0, 0, 0], T, rows=2)
    assert layout.example.tolist() == [[0, 4, 2], [3, 1, -1], [5, 0, 3]]
    for step, batch in enumerate(batches):
        found, gradients, now = [], [], DirectLayout(*(part[step] for part in layout))
        for read in (lambda x: discriminator.read(x, batch), lambda x: discriminator.read_layout(x, now)):
            x = label.clone().requires_grad_()
            z, prior = read(x)
            z = z[:, :len(batch.example)]
            both = z.square().sum() + prior[..., lm.admissible].square().sum() / 1e3
            gradients.append(torch.autograd.grad(both, x)[0])
            found.append((z.detach(), prior.detach()[..., lm.admissible]))
        for a, b in zip(*found): assert close(a, b)
        assert close(*gradients, ATOL * max(1, gradients[0].abs().max()))


def test_no_layout_of_steps_that_need_several_passes_or_that_read_prefixes_anew():
    lm = make_tiny_lm("llama")
    tokens, positions = tokenize(WORDS, lm), 2 * 3 * (1 + len(direct(lm, tokenize(WORDS, lm), ASK_WORD).after))
    for options, fits in (({"positions": positions}, True), ({"positions": positions - 1}, False),
                          ({"memory": 0}, False)):
        discriminator = direct(lm, tokens, ASK_WORD, **options)
        assert (discriminator.layout([discriminator.batch([0, 1, 2])], [0], 1, rows=2) is not None) == fits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_the_label_prior_is_the_mean_over_the_training_examples(family):
    lm = make_tiny_lm(family)
    tokens = tokenize(WORDS, lm, frozenset({"cat", "red"}))
    log_p = []
    for (before, *_), heldout in zip(CASES["words"][1], tokens.heldout):
        if heldout: continue
        logits = lm.model(input_ids=torch.tensor([lm.encode_start(before)])).logits[0, -1].double()
        log_p.append(logits[lm.admissible].log_softmax(-1))
    mean = torch.stack(log_p).mean(0)
    for memory in (2**30, 0):
        discriminator = direct(lm, tokens, ASK_WORD, memory=memory)
        assert close(discriminator.label_prior[lm.admissible], mean)
        assert (discriminator.label_prior[~lm.admissible] < -1e8).all()


@pytest.mark.parametrize("mode", ["words", "texts"])
@torch.no_grad()
def test_prior_few_shot_changes_the_label_prior_and_nothing_else(mode):
    lm, shots = make_tiny_lm("llama"), (('Is "red" a book?', "no"), ('Is "red" a red?', "yes"))
    tokens, label = tokenize(CASES[mode][0], lm, frozenset({"cat"})), lm.embed([[40], [41]])
    plain, taught, shown = (direct(lm, tokens, replace(ASK[mode], **how))
                            for how in ({}, dict(prior_few_shot=shots), dict(few_shot=ASK[mode].few_shot + shots)))
    assert torch.equal(taught.read(label, taught.batch())[0], plain.read(label, plain.batch())[0])
    assert torch.equal(taught.stop_log_prob(label), plain.stop_log_prob(label))
    assert close(taught.label_prior[lm.admissible], shown.label_prior[lm.admissible])
    assert (taught.label_prior - plain.label_prior)[lm.admissible].abs().max() > .1


def test_prior_few_shot_that_does_not_fit_has_no_effect():
    lm, long = make_tiny_lm("llama"), (("x" * 300, "no"),)
    plain, taught = (direct(lm, tokenize(WORDS, lm), replace(ASK_WORD, prior_few_shot=shots)) for shots in ((), long))
    assert torch.equal(taught.label_prior, plain.label_prior)


def test_the_memory_is_not_exceeded():
    lm = make_tiny_lm("llama")
    tokens = tokenize(TEXTS, lm)
    for memory in (0, 2_000, 20_000, 100_000, 2**30):
        discriminator = direct(lm, tokens, ASK_TEXT, memory=memory)
        kept = [level for level in discriminator.levels if level.cache]
        assert sum(k.nbytes + v.nbytes for level in kept for k, v in level.cache.layers) <= memory
    assert len(kept) == len(discriminator.levels) == 3  # the common beginning, texts, units


def test_use_does_not_change_the_caches():
    lm = make_tiny_lm("gemma3")
    discriminator = direct(lm, tokenize(TEXTS, lm), ASK_TEXT)
    kept = [tensor.clone() for level in discriminator.levels for layer in level.cache.layers for tensor in layer]
    label = soft_labels(lm, 0, 2, 1).requires_grad_()
    runs = [discriminator.read(label, discriminator.batch())[0] for _ in range(2)]
    runs[0].sum().backward()
    assert torch.equal(*runs)
    now = [tensor for level in discriminator.levels for layer in level.cache.layers for tensor in layer]
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


@pytest.mark.parametrize("memory", [2**30, 20_000, 0])
def test_levels_read_in_small_parts_give_the_same_hidden_states(memory):
    "With the token before its text, the examples of a text have little in common, and some texts have no level row."
    lm, question = make_tiny_lm("llama"), Question('Word "{token}" of "{text}": is it {label}?', chat=False)
    texts = [*(f"the cat sat {i}" for i in range(6)), "dog"]
    feature = Feature.from_texts("t", texts, [[(4, 7, 1.0)]] * 6 + [[(0, 3, 1.0)]])
    values = slot_values(tokenize(feature, lm), lm)
    rows, *_ = encode_question(question, values, lm)
    levels = split_levels(rows, [one["text"] for one in values])
    _, expected = read_levels(lm, levels, 2**30)
    _, found = read_levels(lm, levels, memory, positions=30)
    assert close(found, expected)
    with torch.no_grad():
        for row, state in zip(rows[::9], expected[::9]):
            assert close(lm.model.base_model(torch.tensor([row])).last_hidden_state[0, -1], state)


def test_a_word_of_a_text_is_named_as_it_stands_there():
    lm = make_tiny_lm("llama")
    feature = Feature.from_texts("x", ["The Cats, 24 of them", "it  was {label} red"], [[(4, 8, 1.0)], []])
    found = slot_values(tokenize(feature, lm), lm)
    assert [x["token"] for x in found if x["text"] == feature.texts[0]][:3] == ["The", "Cats", ","]
    direct(lm, tokenize(feature, lm), ASK_TEXT)  # braces in a text are no slots


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user, mode, message", [
    ('Is "{word}" good?', "words", "each of the slots {word}, {label} once"),
    ('Is "{word}" a {label} {label}?', "words", "but has {word}, {label}, {label}"),
    ("Is it a {label}?", "words", "but has {label}"),
    ("Is it good?", "words", "but has none"),
    ('Is "{word}" "{word}" a {label}?', "words", "once"),
    ('Is {label} what "{word}" is?', "words", "{label} as the last"),
    ('Is "{word}" a {label}?', "texts", "each of the slots {text}, {token}, {label} once"),
    ('Is "{token}" a {label}?', "texts", "once"),
    ('Is "{token}" in "{text}" a {label}?', "words", "once"),
])
def test_slots_that_are_missing_or_misplaced_are_named(user, mode, message):
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError) as error: direct(lm, tokenize(CASES[mode][0], lm), Question(user))
    assert message in str(error.value) and user in str(error.value).replace("\\'", "'")


def test_the_label_needs_text_after_it():
    lm, ends = make_tiny_lm("llama"), Question("Is {word} one of these?", answer="{label}", yes="y", no="n")
    with pytest.raises(ValueError, match="text after it"): direct(lm, tokenize(WORDS, lm), ends)


def test_prompts_of_the_channel_are_refused():
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError, match="takes a Question"): direct(lm, tokenize(WORDS, lm), ["Examples of {label}:"])


@pytest.mark.parametrize("yes, no", [("Yes", "Yes"), ("tall", "tale"), ("", "No"), ("Yes", ""), ("", "")])
def test_answers_that_begin_alike_or_are_empty_are_refused(yes, no):
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError, match="differ in their first token"):
        direct(lm, tokenize(WORDS, lm), replace(ASK_WORD, yes=yes, no=no))


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_an_example_too_long_for_the_model_is_named(family):
    lm = make_tiny_lm(family)
    long = Feature.from_words("x", active=["cat"], inactive=["dog", "qz" * 150])
    with pytest.raises(ValueError, match="word 'qzqz.* takes"): direct(lm, tokenize(long, lm), ASK_WORD)
    text = "a dog " * (lm.context_length // 2 - 5)
    long = Feature.from_texts("x", ["a cat", text], [[(2, 5, 1.0)], []])
    with pytest.raises(ValueError, match="token 'a' in text 'a dog .* takes"): direct(lm, tokenize(long, lm), ASK_TEXT)


def test_an_example_that_just_fits_is_fine():
    lm = make_tiny_lm("gpt2")
    room = 256 - 1 - len(lm.encode("? \nA: ")) - len(lm.encode_start('Say Yes or No.\nIs "" a'))
    words = Feature.from_words("x", active=["z" * room], inactive=["cat"])
    discriminator = direct(lm, tokenize(words, lm), ASK_WORD)
    label, long = soft_labels(lm, 0, 1, 1), f'Say Yes or No.\nIs "{"z" * room}" a'
    assert len(lm.encode_start(long)) + 1 + len(discriminator.after) == 256
    with pytest.raises(ValueError, match="takes"): direct(lm, tokenize(words, lm), ASK_WORD, label_tokens=2)
    with torch.no_grad():
        slow = naive_logits(lm, [(long, "? \nA: ", "yes", "no")], label[0])
        assert close(discriminator.read(label, discriminator.batch())[0][0, :1], slow)


@torch.no_grad()
def test_padding_behind_a_long_text_does_not_run_out_of_the_models_positions():
    lm = make_tiny_lm("gpt2")
    texts = ["a dog " * 95 + "x.", "z" * 60 + " is red."]
    discriminator = direct(lm, tokenize(Feature.from_texts("x", texts, [[(0, 1, 1.0)], []]), lm), ASK_TEXT)
    longest = [max(map(len, level.ids)) for level in discriminator.levels]
    assert sum(longest) > 256
    label = soft_labels(lm, 0, 1, 1)
    before = CASES["texts"][1][0][0].split("In \"the cat")[0] + f'In "{texts[0]}", is "a" a'
    slow = naive_logits(lm, [(before, "?\nRating: ", "1", "0")], label[0])
    assert close(discriminator.read(label, discriminator.batch([0]))[0][0], slow)


def test_the_built_in_questions_are_sound(lm):
    for question in [*QUESTIONS.values(), *PAPER_QUESTIONS.values()]:
        values = [{"word": "dog"}] if "{word}" in question.user else [{"text": "A dog.", "token": "dog"}]
        [row], after, answers = encode_question(question, values, lm)
        assert row and after and len(answers) == 2
