"""Search methods at the same cost: each pays for its questions, and its log is true. On tiny random models."""
import gc
import json
import weakref
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import make_tiny_lm, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer

from tokenlabel.channel import Channel, channel
from tokenlabel.compare import METHODS, Problem, compare, explainer, first_order_change, pmi
from tokenlabel.exhaustive import Meter, count_positions
from tokenlabel.feature import Feature
from tokenlabel.label import label_feature
from tokenlabel.lm import load_lm
from tokenlabel.rank import rank_labels
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

ACTIVE = "cat dog horse cow sheep goat mouse bird".split()
WORDS = Feature.from_words("animals", ACTIVE, "car house book red lamp tree stone river".split())
SENTENCES = ["the cat sat on the mat.", "a dog and a horse ran.", "the house is red.", "no book is here.",
             "one cow, one goat.", "the mouse saw a bird.", "a lamp and a stone."]
SPANS = [[(text.index(word), text.index(word) + len(word), 1.0) for word in ACTIVE if word in text] for text in SENTENCES]
FEATURES = {"words": WORDS, "texts": Feature.from_texts("animals", SENTENCES, SPANS)}


def discriminator_of(feature, heldout=0.3, seed=0) -> Channel:
    lm = make_tiny_lm("llama")
    return channel(lm, tokenize(feature, lm, feature.heldout_types(heldout, seed) if heldout else frozenset()))


@lru_cache
def by_hand(name="words") -> pd.DataFrame:
    "The loss of each label, by `rank_labels`."
    one = discriminator_of(FEATURES[name])
    return rank_labels(one, one.lm.admissible.nonzero()[:, 0].tolist())[0].set_index("token_id")


# --- each method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_log_is_true_and_paid_for(method, name):
    one = discriminator_of(FEATURES[name])
    with count_positions(one.lm) as meter: table = compare(METHODS[method], one, 2000)
    assert table.loss[:-1].is_monotonic_decreasing and table.loss.iloc[-1] == table.loss.iloc[-2]
    assert table.positions.is_monotonic_increasing and table.positions.iloc[0] > 0
    np.testing.assert_allclose(table.loss, by_hand(name).loss[table.token_id], atol=1e-4, rtol=0)
    assert one.lm.admissible[table.token_id.tolist()].all() and meter.positions > table.positions.iloc[-1]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_a_model_that_is_not_kept(method):
    lm = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True), dtype=torch.bfloat16)
    table = compare(METHODS[method], channel(lm, tokenize(WORDS, lm)), 300)
    assert np.isfinite(table.loss).all() and table.token_id.isin(by_hand().index).all()
    alive = weakref.ref(lm)
    del lm
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_log(method):
    one = discriminator_of(WORDS)
    a, b = (compare(METHODS[method], one, 1000, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("method", ["random", "prior", "explainer"])
def test_a_list_of_labels_continues_to_the_best_of_all(method):
    table = compare(METHODS[method], discriminator_of(WORDS), 10**9)
    assert table.loss.iloc[-1] == pytest.approx(by_hand().loss.min(), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_method_of_this_package_is_label_feature(seed):
    table = compare(METHODS["token space"], discriminator_of(WORDS, seed=seed), 1, seed=seed)
    result = label_feature(WORDS, make_tiny_lm("llama"), seed=seed, progress=False)
    assert table.token_id.iloc[-1] == result.ranking.token_id[0]
    assert table.loss.iloc[-1] == pytest.approx(result.ranking.loss[0], abs=1e-4)


def test_a_method_is_stopped_soon_after_its_budget_is_spent():
    one = discriminator_of(WORDS)
    first, small, large = (compare(METHODS["random"], one, budget).positions.iloc[-1] for budget in (1, 6000, 15_000))
    group = 16 * first  # labels are scored in groups
    assert 6000 <= small < 6000 + group and 15_000 <= large < 15_000 + group


def test_a_method_that_scores_no_label_is_refused():
    with pytest.raises(ValueError, match="not scored any label"): compare(lambda problem: iter(()), discriminator_of(WORDS), 9)
    with pytest.raises(ValueError, match="no setting"): compare(METHODS["prior"], discriminator_of(WORDS), 9, kl=1)


# --- the problem ------------------------------------------------------------------------------------------------------


def test_a_repeated_question_is_free_and_no_label_is_refused():
    one = discriminator_of(WORDS)
    with count_positions(one.lm) as meter:
        problem = Problem(one, Settings(), meter)
        first = problem.score(torch.tensor([70, 80]))
        paid = meter.positions
        assert problem.score(torch.tensor([80, 70, 80])).tolist() == [first[1], first[0], first[1]]
        assert meter.positions == paid > 0 and len(problem.log) == 1
    with pytest.raises(ValueError, match="cannot be labels"): problem.score(torch.tensor([0]))


def test_the_first_order_change_is_the_slope_of_the_loss():
    one = discriminator_of(WORDS)
    begin, lm, here = lambda: Problem(one, Settings(kl_weight=0.1), Meter()), one.lm, torch.tensor(70)
    change = first_order_change(begin(), here)
    assert change[~lm.admissible].isposinf().all()
    for id in torch.tensor([80, 95]):
        at = [begin().accuracy((1 - share) * lm.embed(here[None]) + share * lm.embed(id[None])).item()
              for share in (-1e-3, 1e-3)]
        slope = (at[1] - at[0]) / 2e-3 + 0.1 * (one.label_prior[here] - one.label_prior[id])
        assert slope.item() == pytest.approx((change[id] - change[here]).item(), rel=0.05, abs=2e-3)


def test_pmi_tries_tokens_of_active_words_first():
    one = discriminator_of(Feature.from_words("x", ["xb", "xc", "xd", "xe"], ["ob", "oc", "od", "pe"]), heldout=0)
    final = set(one.lm.encode(" xb")) & set(one.lm.encode(" xe")) - set(one.lm.encode(" pe"))
    problem = Problem(one, Settings(), Meter())
    next(pmi(problem))
    assert set(problem.losses) <= final and len(problem.losses) == 1
    for _ in pmi(problem): pass
    assert set(problem.losses) <= {id for document in one.tokens.documents for id in document}


def test_another_model_can_explain_and_pays():
    one, other = discriminator_of(WORDS), make_tiny_lm("llama", seed=1)
    with count_positions(one.lm) as meter:
        problem = Problem(one, Settings(), meter)
        steps = explainer(problem, other)
        assert meter.positions > 30 and not problem.losses  # it has read the examples
        next(steps)
    assert len(problem.losses) == 1


def renumbered(model, tokenizer):
    "The same language model, with other numbers for its tokens."
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    order = [*range(3), *reversed(range(3, len(names)))]  # the special tokens stay where they are
    state["model"]["vocab"] = {names[id]: place for place, id in enumerate(order)}
    for part in {model.get_input_embeddings(), model.get_output_embeddings()}:
        part.weight.data[:len(order)] = part.weight.data[order].clone()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    return load_lm(model, tokenizer=transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special))


@torch.no_grad()
def test_an_explainer_with_another_vocabulary_is_understood_by_its_texts():
    one, tried = discriminator_of(WORDS), []
    for lm in (None, renumbered(tiny_model("llama", 0), tiny_tokenizer(True))):
        problem = Problem(one, Settings(), Meter())
        problem.score = lambda ids: tried.extend(ids.tolist())
        for _ in explainer(problem, lm): pass
    ours, theirs = tried[:one.lm.label_count], tried[one.lm.label_count:]
    assert ours == theirs and sorted(ours) == one.lm.admissible.nonzero()[:, 0].tolist() != ours
