"""Proposals, prefilters, the shortlist, and beam search, on tiny random models."""
import pytest
import torch
from conftest import make_tiny_lm
from test_rank import ACTIVE, SENTENCES, TEXTS, WORDS, make

import tokenlabel.candidates as module
from tokenlabel.candidates import NoLabel, beam_search, expand, prefilter, prior_top_k, propose, shortlist
from tokenlabel.channel import channel
from tokenlabel.direct import direct
from tokenlabel.feature import Feature
from tokenlabel.forward import label_log_probs
from tokenlabel.prompts import Question
from tokenlabel.rank import rank_labels
from tokenlabel.search import Search, round_trips
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize


def searched(one=None, steps: int = 4, **settings) -> Search:
    "A search after some steps."
    search = Search(one or make(), Settings(steps=20, **settings))
    for _ in range(steps): search.step()
    return search


# --- proposals --------------------------------------------------------------------------------------------------------


GRADED = Feature.from_texts("animals", SENTENCES, [[(text.index(word), text.index(word) + len(word), 0.5 + 0.05 * i)
                                                    for i, word in enumerate(ACTIVE) if word in text] for text in SENTENCES])


@pytest.mark.parametrize("feature", [WORDS, GRADED])
def test_proposals_are_made_from_the_most_active_training_words(feature, monkeypatch):
    lm, read, types = make_tiny_lm("llama"), [], feature.heldout_types(0.3, 0)
    one = channel(lm, tokenize(feature, lm, types))
    monkeypatch.setattr(type(lm), "encode_start", lambda self, text: read.append(text) or self.encode(text))
    found = propose(one, 5)
    shown = [word for word in ACTIVE if word not in types]
    if feature is GRADED: shown = [word for word in reversed(shown) if any(word in text for text in SENTENCES)]
    assert set(read) == {f"{', '.join(shown)} and other"} and len(set(found)) == 5
    pairs = propose(one, 5, label_tokens=2)
    assert len(pairs) <= 5 and all(len(label) == 2 and round_trips(label, lm) for label in pairs)
    assert propose(one, 0) == []
    monkeypatch.setattr(lm, "context_length", len(lm.encode(f"{', '.join(shown[:2])} and other")))
    propose(one, 5)
    assert read[-1] == f"{', '.join(shown[:2])} and other"  # as many words as the model can read
    monkeypatch.setattr(lm, "context_length", 1)
    assert propose(one, 5) == []


@pytest.mark.parametrize("label_tokens", [1, 2])
def test_proposals_are_the_likeliest_labels_after_the_list(label_tokens):
    lm = make_tiny_lm("llama")
    one, tokens = channel(lm, tokenize(WORDS, lm)), lm.admissible.nonzero()[:, 0].tolist()
    ids = lm.encode_start(f"{', '.join(ACTIVE)} and other")
    log_p = lambda label: label_log_probs(lm, lm.model.base_model(torch.tensor([[*ids, *label]])).last_hidden_state[0, -1])
    with torch.no_grad():
        first = log_p(()).tolist()
        best = sorted(((id,) for id in tokens), key=lambda label: -first[label[0]])[:9]
        if label_tokens == 2:
            both = {(*label, id): first[label[0]] + p for label in best for id, p in enumerate(log_p(label).tolist())}
            best = [label for label in sorted(both, key=lambda label: -both[label])[:9] if round_trips(label, lm)]
    assert propose(one, 9, label_tokens) == best


def test_the_tokens_with_the_highest_prior_come_in_order():
    one = make()
    found = prior_top_k(one, 10**6)
    assert prior_top_k(one, 0) == [] and len(found) == one.lm.label_count and prior_top_k(one, 3) == found[:3]
    prior = one.label_prior[torch.tensor(found)[:, 0]]
    assert (prior.diff() <= 0).all() and one.lm.admissible[torch.tensor(found)[:, 0]].all()


# --- prefilter and shortlist ------------------------------------------------------------------------------------------


def test_a_prefilter_keeps_the_labels_with_the_lowest_losses_on_what_it_draws():
    search = searched(make(heldout=0), batch_size=16)
    labels = list(search.candidates)
    ranking = rank_labels(search.discriminator, labels)[0]
    found = prefilter(search, labels, 5, share=1.0)  # all the words there are
    assert [id for id, in found] == ranking.token_id[:5].tolist()
    assert len(prefilter(search, labels, 10**6, share=1.0)) == len(labels)
    free = Settings(accuracy_weight=0.0, stop_weight=0.0, kl_weight=1.0)
    assert prefilter(search, labels, 1, 1.0, settings=free)[0] == (ranking.token_id[ranking.kl.argmin()],)


def test_a_prefilter_draws_a_share_of_the_batch_but_not_too_few(monkeypatch):
    lm, sizes, ask = make_tiny_lm("llama"), [], {"words": "{word} {label}?", "texts": "{text} {token} {label}?"}
    features = {"words": WORDS, "texts": TEXTS}
    draw = Search.draw
    monkeypatch.setattr(Search, "draw", lambda self, size: sizes.append(size) or draw(self, size))
    for mode, feature in features.items():
        one = direct(lm, tokenize(feature, lm), Question(ask[mode], yes="1", no="0"))
        search = Search(one, Settings(discriminator="direct"))
        prefilter(search, [(70,), (80,)], 1, 1 / 4)
        prefilter(Search(channel(lm, tokenize(feature, lm))), [(70,), (80,)], 1, 1 / 4)
    assert sizes == [16, 16, 16, 2]  # questions and words, but whole texts


def test_the_shortlist_has_the_final_labels_and_no_more_than_asked_for():
    for count in (3, 40):
        search = searched(steps=6)
        found = shortlist(search, Settings(candidates=count), propose(search.discriminator))
        final = list(dict.fromkeys(map(tuple, search.log_p(1.0).argmax(-1).tolist())))
        assert found[:len(final)] == final and len(set(found)) == len(found) and count <= len(found) <= count + len(final)
        assert set(found) <= set(search.candidates)


def test_a_proposal_wins_if_it_is_better_than_all_candidates_of_the_search():
    search = searched(steps=1, restarts=1)
    everything = search.discriminator.lm.admissible.nonzero()[:, 0].tolist()
    settings, own = Settings(candidates=len(everything)), set(search.candidates)
    proposals = [(id,) for id in everything]
    found = shortlist(search, settings, proposals, second_proposals=len(everything))
    best = rank_labels(search.discriminator, everything)[0]
    assert set(found) == set(proposals) and rank_labels(search.discriminator, found)[0].label[0] == best.label[0]
    final = tuple(search.log_p(1.0).argmax(-1)[0].tolist())
    for label, (step, restart) in search.candidates.items():
        assert (step, restart) == ((-1, -1) if label not in own | {final} else (search.done if label not in own else 0, 0))


def test_without_any_label_that_round_trips_there_is_none(monkeypatch):
    search = searched(steps=1)
    monkeypatch.setattr(module, "round_trips", lambda label, lm: False)
    with pytest.raises(NoLabel, match="take more steps, or fewer label tokens"): shortlist(search, Settings())
    assert issubclass(NoLabel, ValueError)


def test_the_same_draws_give_the_same_shortlist():
    found = [shortlist(search, Settings(), propose(search.discriminator)) for search in (searched(), searched())]
    assert found[0] == found[1]


# --- labels of several tokens -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_expansion_adds_the_likeliest_tokens_at_either_end():
    one = make(heldout=0)
    lm, prefix = one.lm, (70,)
    found = expand(one, [prefix], k=3)
    behind = one.next_label_prior(lm.embed(torch.tensor([prefix])))[0].topk(3).indices.tolist()
    tokens = lm.admissible.nonzero()[:, 0]
    joint = one.label_prior[tokens] + one.next_label_prior(lm.embed(tokens[:, None]))[:, 70]
    front = tokens[joint.topk(3).indices].tolist()
    expected = [(70, id) for id in behind] + [(id, 70) for id in front]
    assert found == [label for label in dict.fromkeys(expected) if round_trips(label, lm)]
    assert all(len(label) == 3 for label in expand(one, [(70, 80)], k=3))


@pytest.mark.parametrize("kind", ["channel", "direct"])
def test_a_beam_search_finds_labels_of_the_length_that_are_read_as_they_are_written(kind):
    one = make(kind)
    found = beam_search(one, Settings(discriminator=kind, label_tokens=3, candidates=4), steps=2, beam=6, prior=32)
    assert len(found) == 4 and all(len(label) == 3 and round_trips(label, one.lm) for label in found)


def test_the_stop_penalty_counts_for_whole_labels_only_and_the_settings_are_those_of_the_search(monkeypatch):
    asked, searches, look = [], [], module.prefilter

    def spy(search, labels, *rest, settings=None, **options):
        settings = settings or rest[3]
        asked.append((len(labels[0]), settings.stop_weight))
        searches.append(search)
        return look(search, labels, *rest[:3], settings=settings)

    monkeypatch.setattr(module, "prefilter", spy)
    settings = Settings(label_tokens=2, lr=0.1, calibrated=False, steps=2)
    assert beam_search(make(), settings, beam=6, prior=16)
    assert asked == 2 * [(1, 0.0)] + 2 * [(2, 0.01)]
    assert searches[0].settings == Settings(lr=0.1, calibrated=False, steps=2) and searches[0].done == 2


def test_where_no_prefix_can_be_expanded_there_is_no_longer_label(monkeypatch):
    monkeypatch.setattr(module, "expand", lambda *args: [])
    assert beam_search(make(), Settings(label_tokens=3), steps=1, beam=4, prior=16) == []
