"""The channel discriminator, held against a slow one that writes out every prompt in full and runs each alone."""
import gc
import math
import weakref

import pytest
import torch
from conftest import FAMILIES, MODEL_SIZE, make_tiny_lm, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forward import random_sequences

import tokenlabel.channel as module
from tokenlabel.channel import (ChannelLayout, MarginalCache, Part, channel, marginal_log_probs, read_parts, read_prompt,
                                stack_prompts, start_log_probs)
from tokenlabel.feature import Feature
from tokenlabel.forward import Query, pack
from tokenlabel.lm import load_lm
from tokenlabel.prompts import PROMPTS
from tokenlabel.softlabel import embed_softlabel, log_softlabel
from tokenlabel.tokenize import tokenize

TEMPLATE = "Examples of {label}: "
UNEVEN = ("A {label}:", "The following are examples of {label}: ", "Some {label} are:")  # different before and after

WORDS = Feature.from_words("animals", active={"cat": 1.0, "horse": 1.0, "the dog": 0.7}, inactive=["house", "red", "é"])
TEXTS = Feature.from_texts("animals", ["the cat sat on the mat.", "a house", "dog and horse are animals"],
                           [[(4, 7, 1.0)], [], [(0, 3, 0.8), (8, 13, 1.0)]])
FEATURES = {"words": WORDS, "texts": TEXTS}


# --- the slow discriminator -------------------------------------------------------------------------------------------


def slow_log_probs(lm, prompt, label, sequence):
    "Log-probability of each token of one sequence after a label [..., T, d]: full prompts, no cache, no packing."
    embed, shape = lm.model.get_input_embeddings(), label.shape[:-2]
    before, after, end = (embed(torch.tensor(list(ids))).expand(*shape, -1, -1)
                          for ids in (prompt.before, prompt.after, sequence))
    full = torch.cat([before, label, after, end], -2)
    log_p = lm.model(inputs_embeds=full.reshape(-1, *full.shape[-2:]), use_cache=False).logits.log_softmax(-1)
    start = full.shape[-2] - len(sequence) - 1
    return torch.stack([log_p[:, start + j, id] for j, id in enumerate(sequence)], -1).reshape(*shape, len(sequence))


def slow_next(lm, prompt, label):
    "Log-probabilities [V] after the start of a prompt and a label [t, d]."
    full = torch.cat([lm.model.get_input_embeddings()(torch.tensor(prompt.before)), label])
    return lm.model(inputs_embeds=full[None], use_cache=False).logits[0, -1].log_softmax(-1)


def slow_prior(lm, prompt, label):
    "The same, over the tokens that may be in a label."
    return slow_next(lm, prompt, label).double().masked_fill(~lm.admissible, -math.inf).log_softmax(0)


def slow_marginal(lm, prompt, sequence, top=128, continued=4):
    "log p(token | tokens before): a quotient of mixtures over the `top` (first token) or `continued` likeliest labels."
    log_pi, found = slow_prior(lm, prompt, torch.zeros(0, lm.embedding.shape[1])), []
    for count in (top, continued):
        best, labels = log_pi.topk(min(count, lm.label_count))
        given = slow_log_probs(lm, prompt, lm.embed(labels[:, None]), sequence).double()
        joint = (best.log_softmax(0)[:, None] + given.cumsum(1)).logsumexp(0)  # log p(tokens so far)
        found.append(joint.diff(prepend=torch.zeros(1).double()))
    return torch.cat([found[0][:1], found[1][1:]])


def slow_logits(one, label, index):
    "z [B, E] of labels [B, T, d] for one prompt: the gain of the tokens of each example."
    tokens, prompt = one.tokens, one.read_prompts[index]
    gain = torch.cat([slow_log_probs(one.lm, prompt, label, ids) for ids in tokens.documents], -1) - one.marginal[index]
    return gain.new_zeros(len(label), len(tokens.activation)).index_add(1, tokens.token_example, gain)


def soft_labels(lm, seed, *shape):
    "Embeddings of soft labels [B, T, d], none of them close to one token."
    v = torch.randn(*shape, len(lm.embedding), generator=torch.Generator().manual_seed(seed))
    return embed_softlabel(log_softlabel(v, 0.5, lm.admissible), lm).detach()


def token_log_probs(lm, prompts, label, packing):
    "Log-probability of each packed token [Q, B, N]."
    return read_parts(lm, stack_prompts(lm, prompts), [Part(torch.arange(len(prompts)), label, packing)])[0][0]


def make(family="llama", mode="words", prompts=UNEVEN, label_tokens=1, heldout=frozenset()):
    lm = make_tiny_lm(family)
    return channel(lm, tokenize(FEATURES[mode], lm, heldout), prompts, label_tokens)


def close(a, b, atol=1e-4): return torch.allclose(a.double(), b.double(), rtol=0, atol=atol)


def with_gradient(read, label):
    "What `read` gives for a label, and the gradient of a sum of squares of all of that."
    label = label.clone().requires_grad_()
    z, prior = read(label)
    ((z ** 2).sum() + (prior.clamp(min=-30) ** 2).sum() / 1e3).backward()
    return z.detach(), prior.detach().clamp(min=-1e3), label.grad


def same(one, other):
    return all(close(a, b, 1e-4 * max(1.0, float(b.detach().abs().max()))) for a, b in zip(one, other, strict=True))


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T, mode", [(1, "texts"), (2, "words")])
@torch.no_grad()
def test_prompts_of_different_lengths_in_one_pass_give_what_the_slow_one_gives(family, T, mode):
    one = make(family, mode, label_tokens=T)
    lm, prompts, label, batch = one.lm, one.read_prompts, soft_labels(one.lm, 0, 2, T), one.batch()
    assert len({len(p.before) for p in prompts}) == 3 and len({len(p.after) for p in prompts}) == 2
    slow = torch.stack([slow_logits(one, label, i) for i in range(3)])
    prior = torch.stack([torch.stack([torch.stack([slow_prior(lm, p, x[:t]) for t in range(T)]) for x in label])
                         for p in prompts])
    z, found = one.read(label, batch)
    assert z.shape == (2, len(one.tokens.activation)) and found.shape == (2, T, MODEL_SIZE) and slow.std() > 0.1
    assert close(z, slow.mean(0), 2e-4)  # a sum over the tokens of an example
    assert close(found[..., lm.admissible], prior.mean(0)[..., lm.admissible])
    assert (found.exp()[..., ~lm.admissible] == 0).all() and torch.isfinite(found).all()
    for i in range(3):
        z, found = one.read(label, batch, i)
        assert close(z, slow[i], 2e-4) and close(found[:, 1:, lm.admissible], prior[i][:, 1:, lm.admissible])
        assert torch.equal(one.read(label, batch, i + 3)[0], z)  # prompts take turns


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_the_gradient_for_the_soft_label_equals_the_slow_one(family):
    one = make(family, prompts=[TEMPLATE])
    lm, [prompt] = one.lm, one.read_prompts
    table, direction = lm.model.get_input_embeddings()(torch.arange(MODEL_SIZE)), torch.linspace(-1, 1, 6)

    def gradient(logits):
        v = torch.randn(2, 1, MODEL_SIZE, generator=torch.Generator().manual_seed(4)).requires_grad_()
        (logits(v) * direction).sum().backward()
        return v.grad

    def slow(v):
        label = v.masked_fill(~lm.admissible, -math.inf).softmax(-1) @ table
        return torch.stack([slow_log_probs(lm, prompt, label, ids).sum(-1) for ids in one.tokens.documents], 1)

    a = gradient(lambda v: one.read(embed_softlabel(log_softlabel(v, 1.0, lm.admissible), lm), one.batch())[0])
    b = gradient(slow)
    assert b.abs().max() > 1e-3 and close(a, b, 1e-4 * b.abs().max())
    assert (a[..., lm.admissible] != 0).all() and (a[..., ~lm.admissible] == 0).all()


@given(family=st.sampled_from(FAMILIES), capacity=st.integers(1, 20), T=st.integers(1, 3), seed=st.integers(0, 10**6),
       sizes=st.lists(st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 3)), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_log_probs_equal_the_slow_ones_whatever_is_read_together(family, capacity, T, seed, sizes):
    lm = make_tiny_lm(family)
    prompts, parts = [read_prompt(text, lm) for text in UNEVEN], []
    for i, (lengths, B) in enumerate(sizes):
        sequences = random_sequences(lm, seed + i, lengths)
        parts.append((sequences, Part(torch.tensor([i, (i + 1) % 3]), soft_labels(lm, seed + i, B, T), pack(sequences, capacity))))
    with torch.no_grad():
        found = read_parts(lm, stack_prompts(lm, prompts), [part for _, part in parts])
        for (log_p, hidden), (sequences, part) in zip(found, parts, strict=True):
            slow = torch.stack([torch.cat([slow_log_probs(lm, prompts[q], part.label, ids) for ids in sequences], -1)
                                for q in part.prompt.tolist()])
            assert log_p.dtype == torch.float32 and close(log_p, slow)
            assert hidden.shape[:3] == (2, len(part.label), T)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_rows_may_be_longer_than_the_context_of_the_model(family):
    # The length of a sequence counts: a layer of gemma3 sees 128 positions, the other models have 256.
    lm = make_tiny_lm(family)
    prompt, sequences, label = read_prompt(TEMPLATE, lm), random_sequences(lm, 5, [6] * 70), soft_labels(lm, 6, 1, 1)
    packing = pack(sequences, 350)
    assert len(packing.ids) == 1 and packing.ids.shape[1] > 256 > packing.offset.max()
    fast = token_log_probs(lm, [prompt], label, packing).reshape(70, 6)
    for i in (0, 30, 69): assert close(fast[i], slow_log_probs(lm, prompt, label[0], sequences[i]))


@pytest.mark.parametrize("mode", FEATURES)
@torch.no_grad()
def test_a_batch_has_the_logits_of_its_examples(mode):
    one, labels = make(mode=mode), torch.tensor([[44], [123], [200]])
    whole = one.token_logits(labels, one.batch())
    assert close(one.read(one.lm.embed(labels), one.batch())[0], whole, 1e-5)
    for documents in ([0], [0, 2], [2, 0]):
        batch = one.batch(documents)
        assert set(one.draws[batch.example].tolist()) == set(documents)
        assert close(one.token_logits(labels, batch), whole[:, batch.example], 1e-5)
    for most, count in ((1, len(one.tokens.documents)), (9, None), (1000, 1)):
        batches = one.batches(most)
        assert count in (None, len(batches))
        assert torch.equal(torch.cat([batch.example for batch in batches]), torch.arange(len(one.tokens.activation)))
        assert close(torch.cat([one.token_logits(labels, batch) for batch in batches], 1), whole, 1e-5)


@torch.no_grad()
def test_many_labels_are_read_in_parts_and_without_gradient(monkeypatch):
    one, labels = make(), torch.arange(40, 65)[:, None]
    whole, sizes, read = one.token_logits(labels, one.batch()), [], module.read_parts
    monkeypatch.setattr(module, "chunk", lambda lm, size: 50)
    monkeypatch.setattr(module, "read_parts", lambda lm, prompts, parts: sizes.append(len(parts[0].label)) or read(lm, prompts, parts))
    with torch.enable_grad(): found = one.token_logits(labels, one.batch(), 1)
    assert len(sizes) > 3 and not found.requires_grad and close(found, one.read(one.lm.embed(labels), one.batch(), 1)[0], 1e-5)
    assert close(one.token_logits(labels, one.batch()), whole, 1e-5)


@torch.no_grad()
def test_in_half_precision_the_logits_are_nearly_the_same():
    half, found = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True), dtype=torch.bfloat16), []
    for lm in (make_tiny_lm("llama"), half):
        one, label = channel(lm, tokenize(WORDS, lm)), soft_labels(lm, 5, 2, 1)
        assert label.dtype == lm.dtype
        found.append(one.read(label, one.batch())[0])
    assert found[1].dtype == torch.float32 and close(*found, 0.5)


# --- several discriminators in one pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("T", [1, 2])
def test_features_read_together_get_the_answers_that_each_gets_alone(family, T):
    ones = [make(family, mode, label_tokens=T) for mode in ("words", "texts", "words")]
    batches = [one.batch(draws) for one, draws in zip(ones, ([0, 3], [2, 0], [1, 2, 4, 5]))]
    for indices in ((0, 2, 1), (None, 1, None)):
        labels = [soft_labels(ones[0].lm, i, i + 1, T).requires_grad_() for i in range(3)]
        queries = [Query(*query) for query in zip(ones, labels, batches, indices)]
        together = ones[0].read_together(queries)
        alone = [one.read(*query[1:]) for one, query in zip(ones, queries)]
        for pair in zip(together, alone, strict=True): assert same(*pair)
        total = lambda answers: sum((z ** 2).sum() + prior.clamp(min=-30).sum() for z, prior in answers)
        assert same(*(torch.autograd.grad(total(answers), labels) for answers in (together, alone)))


@pytest.mark.parametrize("family, mode", [(family, "words") for family in FAMILIES] + [("llama", "texts"), ("gemma3", "texts")])
@pytest.mark.parametrize("T", [1, 2])
def test_a_layout_is_read_like_its_batches(family, mode, T):
    one = make(family, mode, label_tokens=T)
    batches, label = [one.batch(draws) for draws in ([0, 2], [1], [2, 1, 0])], soft_labels(one.lm, 5, 2, T)
    layout = one.layout(batches, [0, 1, 5], T, rows=2)
    for step, (batch, index) in enumerate(zip(batches, [0, 1, 2])):
        now, E = ChannelLayout(*(table[step] for table in layout)), len(batch.example)
        assert now.example[:E].equal(batch.example) and (now.example[E:] == -1).all()

        def read(x):
            z, prior = one.read_layout(x, now)
            return z[:, :E], prior

        assert same(with_gradient(read, label), with_gradient(lambda x: one.read(x, batch, index), label))


def test_layouts_of_similar_batches_have_one_shape():
    one = make()
    shapes = {tuple(table.shape for table in one.layout([one.batch(draws)], [0], 1, 2)) for draws in ([2], [0, 2], [2, 4, 5])}
    assert len(shapes) == 1 and all(n % 16 == 0 for table in list(shapes)[0][1:] for n in table[-1:])


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("mode, heldout", [("words", {"cat", "red"}), ("texts", {"cat", "on"}), ("texts", set())])
@torch.no_grad()
def test_after_all_stages_the_logits_are_complete_and_no_more_is_added_than_the_bound(family, mode, heldout):
    one = make(family, mode, heldout=frozenset(heldout))
    labels = one.lm.admissible.nonzero()[::3]
    whole, train, stages = one.token_logits(labels, one.batch()), ~one.tokens.heldout, one.stages()
    z, missing = torch.zeros_like(whole), -one.marginal.mean(0)  # of a token: its surprise is the most that it can add
    for stage in stages:
        z[:, stage.batch.example] = one.token_logits(labels, stage.batch)
        missing[stage.batch.token] = 0.0
        assert close(torch.zeros(len(train)).index_add(0, one.tokens.token_example, missing), stage.bound)
        assert (whole - z <= stage.bound + 1e-4)[:, train].all()
        assert close(whole[:, stage.known & train], z[:, stage.known & train]) and not stage.bound[stage.known].any()
    assert len(stages) > 1 and stages[-1].known[train].all()
    assert not torch.isin(torch.cat([stage.batch.example for stage in stages]), (~train).nonzero()).any() or mode == "texts"


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_is_read_up_to_its_slot(family):
    lm = make_tiny_lm(family)
    prompt = read_prompt("Examples of {label}:", lm)
    assert list(prompt.before) == lm.encode_start("Examples of") and list(prompt.after) == lm.encode(":")
    expected = slow_prior(lm, prompt, torch.zeros(0, lm.embedding.shape[1]))
    assert close(prompt.label_prior[lm.admissible], expected[lm.admissible])


@torch.no_grad()
def test_the_next_token_and_the_stop_are_predicted_behind_the_label():
    one = make("gemma")
    lm, prompts, label = one.lm, one.read_prompts, soft_labels(one.lm, 1, 3, 2)
    mean = lambda f: torch.stack([torch.stack([f(p, x) for p in prompts]).mean(0) for x in label])
    ok = lm.admissible
    assert close(one.next_label_prior(label)[:, ok], mean(lambda p, x: slow_prior(lm, p, x))[:, ok])
    assert close(one.next_label_prior(label[:, :1])[:, ok], one.read(label, one.batch())[1][:, 1, ok])
    assert close(one.stop_log_prob(label), mean(lambda p, x: slow_next(lm, p, x)[p.after[0]]))
    alone = torch.stack([slow_next(lm, prompts[1], x)[prompts[1].after[0]] for x in label])
    assert close(one.stop_log_prob(label, 1), alone)


@pytest.mark.parametrize("text, message", [
    ("Examples of animals:", "0 label slots"), ("{label} and {label}:", "2 label slots"),
    ("{label}: examples", "before and after"), ("  {label}:", "before and after"), ("Examples of {label}", "before and after"),
    ("ab cd " * 100 + "{label}:", "prompt 'ab cd .* takes 256 tokens")])
def test_a_bad_prompt_is_refused(text, message):
    with pytest.raises(ValueError, match=message): read_prompt(text, make_tiny_lm("llama"))


def tiny_copy(): return load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True))


def test_a_prompt_is_read_once_for_a_model_and_is_not_changed_by_its_use():
    lm, other = tiny_copy(), tiny_copy()
    prompt = read_prompt(TEMPLATE, lm)
    kept = [tuple(part.clone() for part in layer) for layer in prompt.cache]
    label, packing = soft_labels(lm, 0, 3, 1).requires_grad_(), pack([[40, 50, 60], [70, 80]], 2)
    runs = [token_log_probs(lm, [prompt], label, packing) for _ in range(3)]
    runs[-1].sum().backward()
    assert all(torch.equal(run, runs[0]) for run in runs)
    for layer, copies in zip(prompt.cache, kept): assert all(map(torch.equal, layer, copies))
    assert read_prompt(TEMPLATE, lm) is prompt and start_log_probs(lm, prompt, 5) is start_log_probs(lm, prompt, 5)
    assert read_prompt(TEMPLATE, other) is not prompt and read_prompt("Other {label}:", lm) is not prompt
    assert not torch.equal(start_log_probs(lm, prompt, 5), start_log_probs(lm, prompt, 6))


def test_prompts_do_not_keep_a_model_alive():
    lm = tiny_copy()
    start_log_probs(lm, read_prompt(TEMPLATE, lm), 5)
    gone = weakref.ref(lm)
    del lm
    gc.collect()
    assert gone() is None


# --- without a label --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_the_marginal_is_the_mixture_over_likely_labels(family):
    lm = make_tiny_lm(family)
    prompt, sequences = read_prompt(TEMPLATE, lm), random_sequences(lm, 3, [1, 4, 2, 1, 3])
    for tops in ((1, 1), (7, 7), (128, 4), (10**6, 10**6)):  # there are 297 labels
        slow = torch.cat([slow_marginal(lm, prompt, ids, *tops) for ids in sequences])
        assert close(marginal_log_probs(lm, prompt, sequences, *tops), slow)
    one = make(family, prompts=[TEMPLATE])
    assert close(one.marginal[0], torch.cat([slow_marginal(lm, prompt, ids) for ids in one.tokens.documents]))


def test_marginals_of_documents_are_computed_once_and_in_parts(monkeypatch):
    lm, asked, compute = make_tiny_lm("llama"), [], module.marginal_log_probs
    monkeypatch.setattr(module, "marginal_log_probs", lambda lm, prompt, documents: asked.extend(documents) or compute(lm, prompt, documents))
    documents = [tuple(ids) for ids in random_sequences(lm, 3, [3, 1, 4, 2])]
    expected = torch.stack([compute(lm, read_prompt(text, lm), documents) for text in UNEVEN])
    known = MarginalCache(lm, UNEVEN)
    assert close(known(documents[:2] + documents[:1]), expected[:, [0, 1, 2, 3, 0, 1, 2]])
    assert close(known(documents, most=1), expected) and close(known(documents[::-1]), expected[:, [8, 9, 4, 5, 6, 7, 3, 0, 1, 2]])
    assert len(asked) == 3 * len(documents)  # once for each prompt
    one = tokenize(WORDS, lm)
    shared, alone = channel(lm, one, UNEVEN, caches={tuple(UNEVEN): known}), channel(lm, one, UNEVEN)
    assert shared.prompts == tuple(UNEVEN) and close(shared.marginal, alone.marginal) and torch.equal(shared.label_prior, alone.label_prior)


# --- a feature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FEATURES)
def test_the_default_prompts_are_those_of_the_mode(mode):
    one = make(mode=mode, prompts=None)
    assert one.prompts == tuple(PROMPTS[mode]) and len(one.marginal) == len(one.prompts) == len(one.read_prompts)
    assert torch.equal(one.draws, one.tokens.example_document)
    assert (16 <= one.batch_size <= 64) if mode == "words" else (4 <= one.batch_size <= 6)


@pytest.mark.parametrize("prompts", [[], (), "", "Examples of {label}:"])
def test_prompts_must_be_a_list_with_something_in_it(prompts):
    with pytest.raises(ValueError, match="prompts"): make(prompts=prompts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_the_longest_text_that_is_accepted_has_the_right_numbers_and_the_next_is_refused_by_number(family):
    lm = make_tiny_lm(family)
    prompt = read_prompt(TEMPLATE, lm)
    room = lm.context_length - len(prompt.before) - 1 - len(prompt.after)
    text = "é" * (room // 2 - 1) + "a" * (1 + room % 2)  # a space; each é has two tokens
    tokens_of = lambda text: tokenize(Feature.from_texts("e", ["a b", text], [[(0, 1, 1.0)], []]), lm)
    longer, tokens = tokens_of(text + "a"), tokens_of(text)
    assert len(longer.documents[1]) == room + 1 and len(tokens.documents[1]) == room > 100
    with pytest.raises(ValueError, match=f"text 1 has {room + 1} tokens .*split"): channel(lm, longer, [TEMPLATE])
    with pytest.raises(ValueError, match="text 1 has"): channel(lm, tokens, [TEMPLATE], 3)
    one, label = channel(lm, tokens, [TEMPLATE]), lm.embed([[44]])
    assert close(token_log_probs(lm, [prompt], label, pack(tokens.documents[1:]))[0, 0],
                 slow_log_probs(lm, prompt, label[0], tokens.documents[1]))
    assert torch.isfinite(one.read(label, one.batch())[0]).all()
