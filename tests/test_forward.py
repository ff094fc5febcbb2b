"""Reading on from a cache, packing, and the predictions, held against whole sequences that are read alone."""
import pytest
import torch
from conftest import FAMILIES, make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rank import KINDS, make

from tokenlabel.forward import Discriminator, Packing, forward_cached, label_log_probs, next_log_prob, pack, predict

CAPACITIES = (1, 2, 5, 256)


def random_sequences(lm, seed: int, lengths) -> list[list[int]]:
    "Sequences of random admissible tokens."
    ids, random = lm.admissible.nonzero()[:, 0], torch.Generator().manual_seed(seed)
    return [ids[torch.randint(len(ids), (n,), generator=random)].tolist() for n in lengths]


def whole_log_probs(lm, start, sequence) -> torch.Tensor:
    "Log-probability of each token of a sequence after a start, from one full forward pass."
    log_p = lm.model(input_ids=torch.tensor([[*start, *sequence]]), use_cache=False).logits[0].log_softmax(-1)
    return log_p[range(len(start) - 1, len(start) + len(sequence) - 1), sequence]


def packed_log_probs(lm, start, packing: Packing) -> torch.Tensor:
    "The same for all packed sequences, from the cache of the start."
    (K, P), n = packing.ids.shape, len(start)
    hidden, cache = forward_cached(lm, (), lm.embed([start]), torch.arange(n)[None], torch.zeros(1, 1, n, n) + causal(n))
    layers = [(layer.keys.expand(K, -1, -1, -1), layer.values.expand(K, -1, -1, -1)) for layer in cache.layers]
    visible = torch.cat([torch.ones(K, P, n, dtype=torch.bool), packing.visible], 2)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float16).min)
    behind, _ = forward_cached(lm, layers, lm.embed(packing.ids), n + packing.offset, mask[:, None])
    states = torch.cat([hidden[:, -1:].expand(K, -1, -1), behind], 1).flatten(0, 1)
    return predict(lm, states, packing.place, packing.column, packing.target)


def causal(n: int) -> torch.Tensor: return torch.full((n, n), torch.finfo(torch.float16).min).triu(1)


# --- reading on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_sequences_behind_a_cache_have_the_log_probs_of_whole_sequences(family):
    lm = make_tiny_lm(family)
    start, sequences = lm.encode_start("Examples of animals:"), random_sequences(lm, 0, [3, 1, 6, 1, 2, 4])
    sequences += [sequences[2][:4], sequences[2][:2] + sequences[5]]  # beginnings in common
    slow = torch.cat([whole_log_probs(lm, start, ids) for ids in sequences])
    for capacity in CAPACITIES: assert torch.allclose(packed_log_probs(lm, start, pack(sequences, capacity)), slow, atol=1e-4)


@torch.no_grad()
def test_reading_on_leaves_the_given_cache_alone_and_returns_a_longer_one():
    lm, zeros = make_tiny_lm("llama"), torch.zeros(1, 1, 5, 5)
    inputs = lm.embed([[40, 50, 60, 70, 80]])
    whole, _ = forward_cached(lm, (), inputs, torch.arange(5)[None], zeros + causal(5))
    first, cache = forward_cached(lm, (), inputs[:, :3], torch.arange(3)[None], zeros[..., :3, :3] + causal(3))
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    copies = [tuple(part.clone() for part in layer) for layer in layers]
    rest, longer = forward_cached(lm, layers, inputs[:, 3:], torch.tensor([[3, 4]]), zeros[..., 3:, :] + causal(5)[3:])
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)
    for layer, copy, new in zip(layers, copies, longer.layers):
        assert all(map(torch.equal, layer, copy)) and new.keys.shape[2] == new.values.shape[2] == 5


@torch.no_grad()
def test_predictions_at_a_slot_are_normalized_over_what_may_be_in_a_label():
    lm = make_tiny_lm("gemma3")  # caps its logits
    ids = torch.tensor([lm.encode_start("Examples of")])
    hidden, log_p = lm.model.base_model(ids).last_hidden_state[0], lm.model(ids).logits[0].log_softmax(-1)
    found, ok = label_log_probs(lm, hidden), lm.admissible
    assert torch.allclose(found[:, ok], log_p[:, ok].log_softmax(-1), atol=1e-5)
    assert found.exp().sum(-1).tolist() == pytest.approx([1.0] * len(found)) and (found.exp()[:, ~ok] == 0).all()
    assert torch.allclose(next_log_prob(lm, hidden, 44), log_p[:, 44], atol=1e-5)


@torch.no_grad()
def test_predictions_do_not_depend_on_how_many_logits_are_computed_at_once():
    lm, random = make_tiny_lm("qwen2"), torch.Generator().manual_seed(0)
    states = torch.randn(7, 32, generator=random)
    place, column = torch.tensor([6, 0, 3, 2]), torch.tensor([1, 3, 0, 0, 2, 3, 1])
    target = torch.tensor([5, 99, 310, 5, 40, 7, 8])
    expected = lm.logits(states)[place[column]].log_softmax(-1)[range(7), target]
    for block in (None, 1, 2 * 320, 3 * 320, 2**23):
        assert torch.allclose(predict(lm, states, place, column, target, block), expected, atol=1e-5)


# --- packing ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=7), min_size=1, max_size=12), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_each_token_is_predicted_from_the_tokens_before_it_and_no_others(sequences, capacity):
    packing = pack(sequences, capacity)
    (K, P), token = packing.ids.shape, 0
    assert P <= max(capacity, max(map(len, sequences)) - 1)
    for ids in sequences:
        for j, id in enumerate(ids):
            assert packing.target[token] == id
            row, at = divmod(int(packing.place[packing.column[token]]), 1 + P)
            seen = packing.visible[row, at - 1] if at else torch.zeros(P, dtype=torch.bool)
            assert packing.ids[row, seen].tolist() == ids[:j] and packing.offset[row, seen].tolist() == list(range(j))
            token += 1
    assert token == len(packing.target) == len(packing.column)


def test_sequences_share_the_positions_of_a_common_beginning():
    sequences = [[1, 2, 3, 4], [5], [1, 2, 6, 7], [1, 2, 3, 4, 8, 9], [5, 2], [1, 2, 3], [1, 2, 3, 4]]
    beginnings = {tuple(ids[:j]) for ids in sequences for j in range(1, len(ids))}
    assert pack(sequences).ids.shape == (1, len(beginnings))


def test_rows_have_similar_lengths():
    # Padding is computed, too: a second row that is nearly empty would cost as much as a full one.
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (90,), generator=random).tolist()
    sequences = [torch.randint(10**6, (n,), generator=random).tolist() for n in lengths]
    needed = sum(lengths) - 90
    for capacity in (64, 128, 256, 300):
        packing = pack(sequences, capacity)
        assert packing.ids.shape[1] <= capacity and needed <= packing.ids.numel() <= 1.25 * needed


@pytest.mark.parametrize("sequences", [[], [[]], [[1], [], [2]]])
def test_empty_sequences_are_refused(sequences):
    with pytest.raises(ValueError, match="empty"): pack(sequences)


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_discriminators_have_all_that_the_protocol_names(kind):
    one, names = make(kind), set(Discriminator.__annotations__) | {n for n in vars(Discriminator) if not n.startswith("_")}
    assert len(names) > 15 and not [name for name in names if not hasattr(one, name)]
    assert one.draws.shape == one.tokens.activation.shape
    assert one.batch().positions > 0 and torch.equal(one.batch().example, torch.arange(len(one.draws)))
