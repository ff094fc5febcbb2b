"""The same answers on a GPU as on the CPU. Skipped where there is no GPU."""
from copy import deepcopy

import pytest
import torch
import transformers

from tokenlabel import captured, synthetic
from tokenlabel.bench import bench, interleave, peak_memory
from tokenlabel.captured import stepping
from tokenlabel.direct import PAPER_QUESTIONS, Question
from tokenlabel.evaluator import check_evaluator
from tokenlabel.feature import tokenize
from tokenlabel.lm import load_lm
from tokenlabel.many import label_features
from tokenlabel.negatives import reach
from tokenlabel.objective import LossWeights
from tokenlabel.descent import Search
from tokenlabel.optimize import DISCRIMINATORS, label_feature, score_labels
from tokenlabel.phase import sweep
from tokenlabel.search import RIVALS, oracle, race
from tokenlabel.softlabel import embed_softlabel, log_softlabel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHORT = {"words": Question("{word}? {label}?", answer=" ", yes="1", no="0"),
         "texts": Question("{text} {token}? {label}?", answer=" ", yes="1", no="0")}
KINDS = [("channel", "words"), ("channel", "texts"), ("direct", "words"), ("direct", "texts")]
FAMILIES = ["llama", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tiny_lm):
    "The same tiny model on the CPU and on the GPU."
    lm = tiny_lm(request.param)
    return lm, load_lm(deepcopy(lm.model), tokenizer=lm.tokenizer, device="cuda")


def feature_of(mode): return synthetic.animals(0, mode, size=16 if mode == "words" else 6)


def judge_of(lm, kind, mode, label_tokens=1):
    feature = feature_of(mode)
    prompts = SHORT[mode] if kind == "direct" else None
    tokens = tokenize(feature, lm, feature.heldout_types(0.3, 0))
    return DISCRIMINATORS[kind](lm, tokens, prompts, label_tokens)


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("label_tokens", [1, 2])
def test_logits_and_gradients(pair, kind, mode, label_tokens):
    found = []
    for lm in pair:
        judge = judge_of(lm, kind, mode, label_tokens)
        v = torch.randn(2, label_tokens, len(lm.embedding), generator=torch.Generator().manual_seed(0)).to(lm.device)
        v.requires_grad_()
        label = embed_softlabel(log_softlabel(v, 1.0, lm.admissible), lm)
        z, log_prior = judge.read(label, judge.batch())
        (z.square().sum() + log_prior.exp().square().sum()).backward()
        found.append([x.detach().cpu() for x in (z, log_prior.exp(), v.grad)])
    for cpu, gpu in zip(*found): assert (cpu - gpu).abs().max() <= 2e-4 * cpu.abs().max()


@pytest.mark.parametrize("kind, mode", KINDS)
def test_losses_of_hard_labels(pair, kind, mode):
    cpu, gpu = (score_labels(judge := judge_of(lm, kind, mode), torch.arange(40, 50, device=lm.device)[:, None],
                             LossWeights(), judge.batches()) for lm in pair)
    for one, other in zip(cpu, gpu): torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("label_tokens", [1, 2])
def test_a_whole_label(pair, kind, mode, label_tokens, tmp_path):
    _, lm = pair
    options = dict(prompts=SHORT[mode] if kind == "direct" else None, label_tokens=label_tokens, steps=6, progress=False)
    one, again = (label_feature(feature_of(mode), lm, kind, **options) for _ in range(2))
    assert one.label == again.label
    assert len(one.trace) <= 6 * 2 and not one.heldout.empty
    one.save(tmp_path / "result")


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("label_tokens", [1, 2])
def test_a_recording_does_what_the_steps_do(pair, kind, mode, label_tokens):
    judge = judge_of(pair[1], kind, mode, label_tokens)
    for seed in range(2):  # the second plays the recording of the first, if it has the same shapes
        one, other = (Search(judge, steps=8, label_tokens=label_tokens, seed=seed) for _ in range(2))
        rows = [row for _ in range(6) for row in one.step()]
        with stepping(other) as step:
            assert step != other.step
            again = [row for _ in range(6) for row in step()]
        assert judge.lm not in captured._unfit and (judge.lm.recordings or kind == "direct")
        for row, same in zip(rows, again):
            for name in ("loss", "accuracy_loss", "entropy", "kl", "hard_accuracy_loss", "temperature", "entropy_weight"):
                assert same[name] == pytest.approx(row[name], abs=2e-3, nan_ok=True)
        assert one.draw(4).unit.tolist() == other.draw(4).unit.tolist() and one.done == other.done


def test_a_model_that_cannot_be_recorded_takes_its_steps_itself(tiny_lm):
    config = transformers.MixtralConfig(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config).cuda()
    lm = load_lm(model, tokenizer=tiny_lm("llama").tokenizer)
    assert label_feature(feature_of("words"), lm, steps=4, progress=False).label


def test_many_together(pair):
    _, lm = pair
    features = [synthetic.numbers(seed, size=16) for seed in range(3)] + [feature_of("texts")]
    found = dict(label_features(features, lm, steps=6))
    assert sorted(found) == list(range(4)) and all(result.label for result in found.values())


@pytest.mark.parametrize("kind, mode", KINDS)
def test_the_oracle(pair, kind, mode):
    prompts = SHORT[mode] if kind == "direct" else None
    cpu, gpu = (oracle(feature_of(mode), lm, kind, prompts=prompts, top=3, progress=False).ranking for lm in pair)
    assert gpu.loss[0] == pytest.approx(cpu.loss[0], abs=1e-3)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals(pair, name):
    judge = judge_of(pair[1], "channel", "words")
    assert not race(RIVALS[name], judge, 3000).empty


def test_the_check_of_the_evaluator(pair):
    cpu, gpu = (check_evaluator(feature_of("words"), lm, ["a", "b"], distractors=["c", "d"]) for lm in pair)
    assert gpu.table.auroc.max() == pytest.approx(cpu.table.auroc.max(), abs=0.02)


def test_hard_negatives(pair):
    judge = judge_of(pair[1], "channel", "words")
    assert len(reach("a", judge.tokens.feature.texts, pair[1]))


def test_the_phase_map(pair):
    table = sweep(judge_of(pair[1], "channel", "words"), ["a"], entropies=(0.0, 0.1), kls=(0.0, 0.1), steps=4)
    assert len(table) == 4


def test_the_explorer(pair):
    exploration = pytest.importorskip("tokenlabel.widgets", exc_type=ImportError).Exploration(feature_of("words"), pair[1])
    for _ in range(6): rows = exploration.step()
    assert len(rows) and exploration.points


@pytest.mark.parametrize("mode", ["words", "texts"])
def test_the_steps_of_the_benchmark(pair, mode, monkeypatch):
    monkeypatch.setitem(PAPER_QUESTIONS, {"words": "mammals_words", "texts": "animals"}[mode], SHORT[mode])
    found = bench(pair[1], repeats=1, mode=mode, units=8)
    assert (found.GFLOP > 0).all() and len(found) == 10


def test_time_and_memory_of_the_gpu():
    call = lambda: torch.ones(1_000_000, device="cuda") + 1
    assert 8_000_000 <= peak_memory(call) < 9_000_000
    assert interleave({"a": call}, repeats=2).seconds["a"] > 0
