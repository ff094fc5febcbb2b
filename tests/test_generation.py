"""Texts from labels and words from directions: what the model itself says of a label."""
import pytest
import torch

from tokenlabel.generation import WRITE, generation_score, steer, steered_rank, steered_words, write_texts
from tokenlabel.live import SAE, latents

TEXTS = [f"the {a} and the {b} sat on the {c}." for a in ("cat", "dog", "horse") for b in ("animal", "book") for c in ("mat", "car", "house")]


def make(lm, hook, W_enc, b_enc, W_dec):
    return latents(lm, SAE("standard", hook, dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=torch.zeros(32))), TEXTS, progress=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_texts_depend_on_the_label_and_the_seed_and_do_not_repeat_the_prompt(family, tiny_lm):
    lm = tiny_lm(family)
    texts = write_texts(lm, " cat", count=7, length=9)
    assert len(texts) == 7 and {len(ids) for ids in texts} == {9}
    assert texts == write_texts(lm, " cat", count=7, length=9)
    assert texts != write_texts(lm, " dog", count=7, length=9) and texts != write_texts(lm, " cat", count=7, length=9, seed=1)
    prompts = [lm.encode_start(prompt.format(" cat")) for prompt in WRITE]
    assert not any(ids[:3] == prompt[:3] for ids in texts for prompt in prompts)
    assert not {id for ids in texts for id in ids} & lm.control


def test_the_score_is_the_share_of_texts_in_which_the_latent_fires(tiny_lm):
    lm = tiny_lm("gpt2")
    found = make(lm, "blocks.0.hook_resid_post", torch.zeros(32, 2), torch.tensor([1.0, -1.0]), torch.ones(2, 32))
    scores = generation_score(found, 0, " cat", [" dog", " Cat"], count=5)  # fires everywhere, with 1
    assert list(scores.label) == [" cat", " dog"] and list(scores.fires) == [1.0, 1.0]
    with pytest.raises(ValueError, match="latent 1 is dead"): generation_score(found, 1, " cat", [" dog"])
    with pytest.raises(ValueError, match="needs other labels"): generation_score(found, 0, " cat", ["cat "])
    with pytest.raises(TypeError, match="others has to be a list"): generation_score(found, 0, " cat", " dog")


def test_a_direction_towards_a_token_makes_the_token_likelier(tiny_lm):
    lm = tiny_lm("llama")
    token = lm.encode(" c")[0]
    with torch.no_grad(): goal = lm.head.weight[token] - lm.head.weight.mean(0)
    found = make(lm, "blocks.1.hook_resid_post", torch.zeros(32, 1), torch.ones(1), 50 * goal[None])
    change = steer(found, 0)
    assert steered_rank(lm, change, lm.token(token)) > 0.99 and token in [lm.encode(word)[0] for word in steered_words(lm, change).label]
    assert steer(found, 0, strength=0.0).abs().max() < 1e-5
    assert steered_rank(lm, steer(found, 0, strength=-1.0), lm.token(token)) < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_neuron_is_steered_along_its_own_weights(family, tiny_lm):
    lm = tiny_lm(family)
    found = latents(lm, 0, TEXTS, progress=False)
    number = int(found.top.key.amax(1).argmax())
    assert steer(found, number).shape == lm.logits(torch.zeros(lm.head.weight.shape[1])).shape and steer(found, number).abs().max() > 1e-4


def test_a_transcoder_writes_at_the_output_of_its_module(tiny_lm):
    lm, draw = tiny_lm("llama"), torch.Generator().manual_seed(0)
    weights = dict(W_enc=torch.randn(32, 4, generator=draw), b_enc=torch.zeros(4), W_dec=torch.randn(4, 32, generator=draw), b_dec=torch.zeros(32))
    reads, same = (SAE("topk", "layers.0.mlp", weights, k=1, side=side, subtract=False) for side in ("input", "output"))
    found, other = (latents(lm, sae, TEXTS, progress=False) for sae in (reads, same))
    other.top = found.top  # the same strength
    torch.testing.assert_close(steer(found, 0), steer(other, 0))


def test_control_tokens_without_a_row_in_the_model_are_no_obstacle(tiny_lm, monkeypatch):
    lm = tiny_lm("llama")
    monkeypatch.setitem(lm.__dict__, "control", frozenset(lm.control | {len(lm.embedding) + 5}))
    assert len(write_texts(lm, " cat", count=3, length=2)) == 3
