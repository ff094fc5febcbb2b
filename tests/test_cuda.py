"""A GPU gives the answers of the CPU. Skipped without a GPU."""
from copy import deepcopy

import pytest
import torch
import transformers
from test_search import same_rows

from tokenlabel import cudagraph, synthetic
from tokenlabel.compare import METHODS, compare
from tokenlabel.cudagraph import stepping
from tokenlabel.evaluator import check_evaluator
from tokenlabel.exhaustive import oracle
from tokenlabel.exploration import Exploration
from tokenlabel.generation import generation_score, steer
from tokenlabel.label import label_feature
from tokenlabel.live import SAE, latents
from tokenlabel.lm import load_lm
from tokenlabel.many import label_features
from tokenlabel.negatives import reach
from tokenlabel.phase import sweep
from tokenlabel.prompts import Question
from tokenlabel.rank import score_labels
from tokenlabel.search import Search, make_discriminator, step
from tokenlabel.settings import Settings
from tokenlabel.softlabel import embed_softlabel, log_softlabel
from tokenlabel.tokenize import tokenize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHORT = {"words": Question("{word}? {label}?", answer=" ", yes="1", no="0"),
         "texts": Question("{text} {token}? {label}?", answer=" ", yes="1", no="0")}
KINDS = [("channel", "words"), ("channel", "texts"), ("direct", "words"), ("direct", "texts")]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request, tiny_lm):
    "The same tiny model on the CPU and on the GPU."
    lm = tiny_lm(request.param)
    return lm, load_lm(deepcopy(lm.model), tokenizer=lm.tokenizer, device="cuda")


def feature_of(mode): return synthetic.animals(0, mode, size=16 if mode == "words" else 6)


def settings_of(kind, mode, **changes):
    return Settings(discriminator=kind, prompts=SHORT[mode] if kind == "direct" else None, **changes)


def make(lm, kind, mode, label_tokens=1):
    feature = feature_of(mode)
    tokens = tokenize(feature, lm, feature.heldout_types(0.3, 0))
    return make_discriminator(lm, tokens, settings_of(kind, mode, label_tokens=label_tokens))


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("T", [1, 2])
def test_logits_and_gradients(pair, kind, mode, T):
    found = []
    for lm in pair:
        one = make(lm, kind, mode, T)
        v = torch.randn(2, T, len(lm.embedding), generator=torch.Generator().manual_seed(0)).to(lm.device).requires_grad_()
        z, prior = one.read(embed_softlabel(log_softlabel(v, 1.0, lm.admissible), lm), one.batch())
        (z.square().sum() + prior.exp().square().sum()).backward()
        found.append([x.detach().cpu() for x in (z, prior.exp(), v.grad)])
    for cpu, gpu in zip(*found): assert (cpu - gpu).abs().max() <= 2e-4 * cpu.abs().max()


@pytest.mark.parametrize("kind, mode", KINDS)
def test_losses_of_discrete_labels(pair, kind, mode):
    cpu, gpu = (score_labels(one := make(lm, kind, mode), torch.arange(40, 50, device=lm.device)[:, None], Settings(), one.batches())
                for lm in pair)
    for one, other in zip(cpu, gpu): torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("T", [1, 2])
def test_a_whole_label(pair, kind, mode, T, tmp_path):
    settings = settings_of(kind, mode, label_tokens=T, steps=6)
    one, again = (label_feature(feature_of(mode), pair[1], settings, progress=False) for _ in range(2))
    assert one.label == again.label and len(one.trace) <= 6 * 2 and not one.heldout.empty
    one.save(tmp_path / "result")


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("T", [1, 2])
def test_a_recording_does_what_the_steps_do(pair, kind, mode, T):
    one = make(pair[1], kind, mode, T)
    for seed in range(2):  # the second search replays the recording of the first if it has the same shapes
        first, second = (Search(one, settings_of(kind, mode, label_tokens=T, steps=8, seed=seed)) for _ in range(2))
        rows = [row for _ in range(6) for row in first.step()]
        with stepping(second) as replay:
            assert replay != second.step
            same_rows(rows, [row for _ in range(6) for row in replay()])
        assert one.lm not in cudagraph._unrecordable and (one.lm.recordings or kind == "direct")
        assert first.draw(4).example.tolist() == second.draw(4).example.tolist() and first.done == second.done
        first.step(), second.step()
        assert (first.v - second.v).abs().max() < 2e-2


def test_a_model_that_cannot_be_recorded_is_stepped_by_the_search(tiny_lm):
    config = transformers.MixtralConfig(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=8)
    lm = load_lm(transformers.AutoModelForCausalLM.from_config(config).cuda(), tokenizer=tiny_lm("llama").tokenizer)
    assert label_feature(feature_of("words"), lm, steps=4, progress=False).label


def test_searches_together(pair):
    ones = [make(pair[1], *kind) for kind in KINDS]
    together, alone = ([Search(one, Settings(steps=4)) for one in ones] for _ in range(2))
    for _ in range(2):
        for rows, search in zip(step(together), alone): same_rows(rows, search.step())


def test_many_features(pair):
    features = [synthetic.numbers(seed, size=16) for seed in range(3)] + [feature_of("texts")]
    found = dict(label_features(features, pair[1], steps=6))
    assert sorted(found) == list(range(4)) and all(result.label for result in found.values())


@pytest.mark.parametrize("kind, mode", KINDS)
def test_the_oracle(pair, kind, mode):
    cpu, gpu = (oracle(feature_of(mode), lm, settings_of(kind, mode), top=3, progress=False).ranking for lm in pair)
    assert gpu.loss[0] == pytest.approx(cpu.loss[0], abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_other_methods(pair, name):
    assert not compare(METHODS[name], make(pair[1], "channel", "words"), 3000).empty


def test_the_check_of_the_evaluator(pair):
    cpu, gpu = (check_evaluator(feature_of("words"), lm, ["a", "b"], distractors=["c", "d"]) for lm in pair)
    assert gpu.table.auroc.max() == pytest.approx(cpu.table.auroc.max(), abs=0.02)


def test_hard_negatives(pair):
    assert len(reach("a", feature_of("words").texts, pair[1])) == 16


def test_the_phase_map(pair):
    assert len(sweep(make(pair[1], "channel", "words"), ["a"], entropies=(0.0, 0.1), kls=(0.0, 0.1), steps=4)) == 4


def test_the_exploration(pair):
    exploration = Exploration(feature_of("words"), pair[1])
    for _ in range(6): rows = exploration.step()
    assert len(rows) and exploration.scores


def test_latents_and_their_texts(pair):
    width = pair[0].embedding.shape[1]
    directions = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    sae = SAE("topk", "layers.0", dict(W_enc=directions.T, W_dec=directions, b_enc=torch.zeros(16), b_dec=torch.zeros(width)), k=2)
    cpu, gpu = (latents(lm, sae, feature_of("texts").texts, progress=False) for lm in pair)
    number = int(cpu.rows.argmax())
    assert (cpu.rows - gpu.rows).abs().max() <= 1
    assert generation_score(gpu, number, " cat", [" dog"], count=3).fires.between(0, 1).all()
    torch.testing.assert_close(steer(cpu, number), steer(gpu, number), atol=0.01, rtol=0.01)
