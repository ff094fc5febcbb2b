"The figures of a run and the summary figure: what is on the page, that it is true, and the files."
import io
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from tokenlabel import plot, summary
from tokenlabel.feature import Feature
from tokenlabel.label import label_feature
from tokenlabel.score import heldout_table

ODD = ["·中国", "⟨E4 B8⟩", "⏎", "ünï", "·동물", "どうぶつ", "·$a_b$", "$",
       "_x_", "^2", r"\frac", "·حيوان", "{", "%", "&", "#", "", "\t", "ཀ", "😀"]
WORDS = ["·animal", "·animals", "·creature", "·characteristically", "·the", "·these", "·a", "·zoo", *ODD]
WORDS += [f"·word{i}" for i in range(200)]


@pytest.fixture(autouse=True)
def no_warning_and_no_open_figure():
    "A missing glyph fails a test, as any warning of matplotlib does."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("default", ResourceWarning)  # of what an earlier test left behind
        yield
    plt.close("all")


def make_trace(restarts=4, steps=80, words=WORDS, seed=0, noise=0.0):
    "A trace as a search gives it: wide at first, collapsed onto one of the first tokens at the end."
    rng = np.random.default_rng(seed)
    rows = []
    for restart in range(restarts):
        start, goal = rng.normal(size=len(words)), rng.integers(0, 3)
        for step in range(steps):
            share = step / max(1, steps - 1)
            v = start + 6 * share * (np.arange(len(words)) == goal) + 2 * share * (np.arange(len(words)) < 8)
            p = np.exp(v * 10 ** share)
            p /= p.sum()
            top = np.argsort(-p)[:10]
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
            accuracy = 0.1 + 0.6 * (1 - share) ** 2 + noise * rng.normal()
            kl = 1 + 4 * share + restart / 5
            rows.append(dict(step=step, restart=restart, temperature=0.1 ** share, entropy_weight=0.2 * share,
                             loss=accuracy + 0.05 * kl + 0.2 * share * entropy, accuracy_loss=accuracy,
                             entropy=entropy, kl=kl,
                             accuracy_active=0.5 + share / 2, accuracy_inactive=0.6 + 0.4 * share,
                             tokens=[words[i] for i in top], probabilities=p[top].tolist()))
    return pd.DataFrame(rows)


def make_ranking(n=200, seed=0):
    rng = np.random.default_rng(seed)
    kl, accuracy = 1.5 + rng.gamma(3, 1.6, n), 0.15 + 0.6 * rng.beta(5, 2, n)
    kl[:3], accuracy[:3] = [4.4, 4.2, 6], [0.1, 0.12, 0.14]
    table = pd.DataFrame(dict(label=WORDS[:n], token=WORDS[:n], accuracy_loss=accuracy, kl=kl))
    return table.assign(loss=accuracy + 0.05 * kl).sort_values("loss", ignore_index=True)


def make_heldout():
    activation, noise = np.repeat([1.0, 0.0], 30), np.random.default_rng(0).normal(size=(2, 60))
    return heldout_table(noise[0] + 2 * activation - 1, noise[1] + 3 * activation - 1.5, activation)


WORDS_FEATURE = Feature.from_words("digits", active=["one", "two", "three", "four"], inactive=["cat", "dog", "tree", "sun"])
TRACE, RANKING, HELDOUT = make_trace(), make_ranking(), make_heldout()

def make_verdict(**changes):
    "A row of a summary, ten seeds."
    row = dict(experiment="animals", form="running text", paper="converges to `animal`",
               labels=["·animal"] * 8 + ["·animals"] * 2, matches=[True] * 8 + [False] * 2,
               auroc=[.9, .91, .92, .93, .94, .94, .94, .95, .99, 1.0], found=[.942, .9, .97], right=[.97, .93, 1.0],
               verdict="reproduced", reason="most seeds agree")
    return dict(descent_matches=changes.get("matches", row["matches"])) | row | changes


VERDICTS = [
    make_verdict(),
    make_verdict(experiment="Chinese", labels=["·中文", "⟨E4 B8⟩", "·" + "W" * 60 + "ing", "ཀ", *["·中文"] * 6],
                 form="isolated words", auroc=[1.0] * 10),
    make_verdict(experiment="palindromes", paper="fails (goes to `a`): the evaluator cannot do it, as it cannot spell",
                 labels=[f"·word{i}" for i in range(10)], matches=[False] * 10,
                 auroc=[.2, .25, .3, .35, .4, .5, .5, .6, .6, .7], found=[.44, .3, .5], right=[.52, .4, .6], verdict="deviates", reason="labels of `$x_1$` ≥ 10 kinds, each found once only"),
    make_verdict(experiment="mammals_balanced", form="words", labels=["·a"], matches=[True], descent_matches=[False],
                 auroc=[.5], found=[.5, .4, .6], verdict="partly", reason=""),
    *[make_verdict(experiment=f"number {i}", labels=["·animal"] * 20, matches=[True] * 20, auroc=[1 - i / 20] * 20)
      for i in range(2)]]

PANELS = {"losses": lambda ax=None: plot.plot_losses(TRACE, ax=ax),
          "tokens": lambda ax=None: plot.plot_tokens(TRACE, ax=ax),
          "plane": lambda ax=None: plot.plot_plane(TRACE, RANKING, ax=ax),
          "accuracy": lambda ax=None: plot.plot_accuracy(TRACE, ax=ax),
          "heldout": lambda ax=None: plot.plot_heldout(HELDOUT, ax=ax)}
FIGURES = {**{name: (lambda draw=draw: draw().figure) for name, draw in PANELS.items()},
           "result": lambda: plot.plot_result(TRACE, RANKING, HELDOUT, title="a label for 动物"),
           "four": lambda: plot.plot_result(TRACE, RANKING),
           "summary": lambda: summary.plot_summary(VERDICTS),
           "one row": lambda: summary.plot_summary([make_verdict(labels=["·animal"], matches=[True], auroc=[.5])])}


def texts(fig):
    "What can be read in a figure: all its texts but the names of ticks beyond the ends of an axis."
    fig.savefig(io.BytesIO())
    beyond = {tick.label1 for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks()
              if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())}
    return [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]


def shown(fig): return {t.get_text() for t in texts(fig)}


# --- what is on the page

@pytest.mark.parametrize("name", FIGURES)
def test_text_is_large_enough_apart_and_inside_the_page(name):
    fig = FIGURES[name]()
    found = texts(fig)
    assert min(t.get_fontsize() for t in found) >= (7 if name in ("summary", "one row") else 8)
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in found]        # of the words, without the leader lines
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, text
    assert [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)] == []


@pytest.mark.parametrize("tokens", [ODD[:8], ODD[8:16], ODD[16:] + ["·the"]], ids=["scripts", "marks", "undrawable"])
def test_any_token_is_drawn_without_a_missing_glyph_and_never_as_mathematics(tokens):
    ax = plot.plot_tokens(make_trace(1, 20, tokens))
    ax.figure.savefig(io.BytesIO(), format="pdf")
    found = {t.get_text(): t for t in texts(ax.figure)}
    for token in tokens: assert not found[plot.drawable(token)].get_parse_math()


def test_undrawable_characters_are_named_and_the_rest_kept():
    assert plot.drawable(" the") == plot.drawable("·the") == "·the"
    assert plot.drawable("  a b") == "··a b"
    assert plot.drawable("\n") == "⏎" and plot.drawable("\t") == "⟨U+0009⟩" and plot.drawable("aཀ") == "a⟨U+0F40⟩"
    assert plot.drawable("") == "⟨⟩"
    assert plot.drawable("中国 日本語 한국어 $x_1$") == "中国 日本語 한국어 $x_1$"


def test_long_names_keep_their_ends_and_fit():
    ax = plot.plot_tokens(make_trace(1, 20, ["·" + "W" * 60 + "ing"] + WORDS[:5]))
    name, = [t for t in texts(ax.figure) if t.get_text().startswith("·W")]
    assert "…" in name.get_text() and name.get_text().endswith("ing")
    assert name.get_window_extent().x1 <= ax.figure.bbox.x1


@pytest.mark.slow
@pytest.mark.parametrize("restarts, steps", [(1, 80), (1, 1), (4, 1), (4, 2), (12, 10)])
def test_any_number_of_restarts_and_steps(restarts, steps):
    trace = make_trace(restarts, steps)
    fig = plot.plot_result(trace, RANKING, HELDOUT)
    assert {"KL", "total", "accuracy loss", "entropy", "active", "inactive", "chance"} <= shown(fig)


def test_constant_and_tied_tables_can_be_drawn():
    trace, ranking = make_trace(3, 5), RANKING.copy()
    trace[["loss", "accuracy_loss", "entropy", "kl", "accuracy_active", "accuracy_inactive"]] = 0.0
    ranking[["accuracy_loss", "kl"]] = 0.0
    fig = plot.plot_result(trace, ranking)
    assert {"KL", "total", "accuracy loss", "entropy"} <= shown(fig)


# --- that it is true

def test_rings_are_the_accuracy_loss_of_the_best_restarts_top_discrete_label():
    best = plot.best_restart(TRACE)
    alone = TRACE.accuracy_loss.where(TRACE.step % 5 == 0) + 0.2
    ax = plot.plot_losses(TRACE.assign(discrete_accuracy_loss=alone))
    [rings] = [line for line in ax.lines if line.get_marker() == "o"]
    shown = alone[TRACE.restart == best].dropna()
    assert rings.get_ydata().tolist() == shown.tolist() and len(shown) < (TRACE.restart == best).sum()
    assert ax.get_legend().get_texts()[0].get_text() == "accuracy loss of the top label"
    assert not [line for line in plot.plot_losses(TRACE).lines if line.get_marker() == "o"]


@pytest.mark.parametrize("weights", [dict(), dict(accuracy_weight=0.5, kl_weight=0.2, entropy_weight=1.0)], ids=["defaults", "others"])
def test_weighted_terms_of_a_run_add_up_to_its_loss(tiny_lm, weights):
    result = label_feature(WORDS_FEATURE, tiny_lm("llama"), steps=8, restarts=2, proposals=0, progress=False, **weights)
    kl, accuracy = weights.get("kl_weight", 0.03), result.settings.accuracy_weight
    trace = result.trace.assign(accuracy_weight=accuracy)
    terms = plot.weighted_terms(trace)
    np.testing.assert_allclose(terms.accuracy_loss + terms.entropy + terms.kl, trace.loss, rtol=1e-6)
    np.testing.assert_allclose(terms.accuracy_loss, accuracy * trace.accuracy_loss, rtol=1e-3)
    np.testing.assert_allclose(terms.kl, kl * trace.kl, rtol=1e-3)
    lines = {line.get_color(): line.get_ydata() for line in plot.plot_losses(trace).lines if line.get_linewidth() > 1 and len(line.get_xdata()) == 8}
    drawn = lines[plot.COLORS["vermillion"]] + lines[plot.COLORS["blue"]] + lines[plot.COLORS["green"]]
    np.testing.assert_allclose(drawn, lines["black"], rtol=1e-6)


def test_weights_that_change_in_a_run_are_those_of_the_trace():
    weight = np.where(TRACE.step < 40, 1.0, 2.0)
    trace = TRACE.assign(accuracy_weight=weight, loss=TRACE.loss + (weight - 1) * TRACE.accuracy_loss)
    terms = plot.weighted_terms(trace)
    np.testing.assert_allclose(terms.accuracy_loss, weight * TRACE.accuracy_loss)
    np.testing.assert_allclose(terms.kl, 0.05 * TRACE.kl)


def test_the_title_says_where_the_descent_ends_if_not_at_the_label():
    end = TRACE[TRACE.restart == plot.best_restart(TRACE)].tokens.iloc[-1][0]
    same, other = RANKING.assign(token=[end, *RANKING.token[1:]]), RANKING.assign(token=["·Chinese", *RANKING.token[1:]])
    assert "words: x" in shown(plot.plot_result(TRACE, same, title="words: x"))
    assert f"words: x (the descent alone: {end})" in shown(plot.plot_result(TRACE, other, title="words: x"))


def test_losses_are_those_of_the_trace_and_the_best_restart_is_bold():
    trace = TRACE.copy()
    trace.loc[(trace.restart == 2) & (trace.step == trace.step.max()), "loss"] = 0
    assert plot.best_restart(trace) == 2
    ax = plot.plot_losses(trace)
    lines = [line for line in ax.lines if line.get_color() == "black" and len(line.get_xdata()) == 80]
    assert len(lines) == 4
    bold, = [line for line in lines if line.get_linewidth() >= 2]
    assert bold.get_ydata().tolist() == trace[trace.restart == 2].loss.tolist()


def test_token_lines_carry_the_recorded_probabilities_and_zero_elsewhere():
    trace = pd.DataFrame(dict(step=[0, 1, 2], restart=0, loss=[3, 2, 1], tokens=[["a", "b"], ["b", "c"], ["c", "a"]],
                              probabilities=[[.6, .3], [.5, .4], [.9, .1]]))
    lines = [list(line.get_ydata()) for line in plot.plot_tokens(trace).lines[:3]]
    assert lines == [[0, .4, .9], [.6, 0, .1], [.3, .5, 0]]          # c, a, b: the winner first


def test_tokens_that_look_the_same_are_one_line():
    same = dict(tokens=[["·a", " a"]] * 2, probabilities=[[.5, .25]] * 2)
    trace = pd.DataFrame(dict(step=[0, 1], restart=0, loss=[1, 0], **same))
    assert plot.plot_tokens(trace).lines[0].get_ydata().tolist() == [.75, .75]


def test_top_tokens_are_the_eight_with_the_highest_peaks_of_the_best_restart():
    run, peaks = TRACE[TRACE.restart == plot.best_restart(TRACE)], {}
    for tokens, probabilities in zip(run.tokens, run.probabilities):
        for token, p in zip(tokens, probabilities): peaks[token] = max(p, peaks.get(token, 0))
    ax = plot.plot_tokens(TRACE)
    assert sorted(line.get_ydata().max() for line in ax.lines[:8]) == sorted(peaks.values())[-8:]
    assert "Tokens with the 8 highest peaks, best restart" in shown(plot.plot_result(TRACE, RANKING))


def test_names_at_the_ends_are_in_the_order_of_the_ends():
    ax = plot.plot_tokens(TRACE)
    ax.figure.savefig(io.BytesIO())
    leaders = ax.lines[8:]
    ends = [line.get_ydata()[-1] for line in ax.lines[:8]]
    assert np.round(ends, 3).tolist() == sorted(np.round(ends, 3), reverse=True)
    assert [round(line.get_ydata()[-1], 9) for line in leaders] == sorted(round(line.get_ydata()[-1], 9) for line in leaders)
    assert [t.get_text() for t in ax.texts][-1] == TRACE[TRACE.restart == plot.best_restart(TRACE)].tokens.iloc[-1][0]


@pytest.mark.parametrize("y, low, high", [
    ([0, 0, 0, 0], 0, 100), ([100] * 8, 0, 100), ([3, 4, 50, 99], 0, 100), ([5, 5], 0, 5)])
def test_spread_names_keep_their_distance(y, low, high):
    got = plot._spread(np.array(y, dtype=float), 9, low, high)
    assert (np.diff(got) >= 9 - 1e-9).all() and got[0] >= low - 1e-9
    if 9 * (len(y) - 1) <= high - low: assert got[-1] <= high + 1e-9


def test_plane_names_the_label_the_runners_up_and_the_favorites_of_the_prior():
    names = {*RANKING.token[:6], *RANKING.nsmallest(3, "kl").token}
    ax = plot.plot_plane(TRACE, RANKING)
    drawn = [t for t in ax.texts if t.get_visible()]
    assert drawn[0].get_text() == RANKING.token[0] and len(drawn) >= 7
    assert {t.get_text() for t in drawn} <= {plot.drawable(n) for n in names}


def test_plane_draws_every_candidate_and_every_path_from_start_to_end():
    ax = plot.plot_plane(TRACE, RANKING)
    assert len(ax.lines[0].get_xdata()) == len(RANKING)
    paths = [line for line in ax.lines if len(line.get_xdata()) == 80]
    assert len(paths) == 4
    for line, (_, run) in zip(paths, TRACE.groupby("restart")):
        assert line.get_xdata().tolist() == run.kl.tolist()
        loss, drawn = run.accuracy_loss.to_numpy(), line.get_ydata()
        np.testing.assert_allclose(drawn[[0, 40, -1]], [loss[:3].mean(), loss[38:43].mean(), loss[-3:].mean()])


def test_the_mean_of_five_steps_is_of_one_restart_and_in_the_order_of_steps():
    trace = pd.DataFrame(dict(restart=[1, 0] * 3, step=[2, 0, 1, 1, 0, 2], x=[60., 0, 30, 3, 0, 6], kl=range(1, 7)))
    got = plot._smoothed(trace, ["x"])
    assert got.x.tolist() == [3, 3, 3, 30, 30, 30] and got.kl.tolist() == [2, 4, 6, 5, 3, 1]
    assert trace.x.tolist() == [60, 0, 30, 3, 0, 6]


def test_names_in_a_crowded_plane_do_not_overlap():
    ax = plot.plot_plane(TRACE, RANKING, annotate=list(RANKING.token[:40]))
    ax.figure.canvas.draw()
    names = [t for t in ax.texts if t.get_visible()]
    boxes = [Text.get_window_extent(t) for t in names]
    assert len(names) > 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_plane_without_names():
    assert [t for t in plot.plot_plane(TRACE, RANKING, annotate=[]).texts if t.get_text()] == []


def test_chance_is_at_one_half_and_heldout_points_are_the_values():
    chance = [line for line in plot.plot_accuracy(TRACE).lines if line.get_linestyle() == ":"]
    assert chance[0].get_ydata().tolist() == [0.5, 0.5]
    ax = plot.plot_heldout(HELDOUT)
    points = [line for line in ax.lines if line.get_marker() == "o"][0]
    assert points.get_xdata().tolist() == HELDOUT[HELDOUT.label == "discrete"].value.tolist()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["discrete label", "soft label", "chance"]
    bars = HELDOUT[HELDOUT.label == "chance"]
    np.testing.assert_allclose([(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches], bars[["low", "high"]])


def test_token_lines_differ_without_color_and_lead_to_their_names_in_their_own_dashes():
    lines = plot.plot_tokens(TRACE).lines
    half = len(lines) // 2
    dashes = [line._dash_pattern[1] and tuple(np.divide(line._dash_pattern[1], line.get_linewidth())) for line in lines]
    assert half == 8 and len({(d, line.get_linewidth() > 2) for d, line in zip(dashes[:8], lines[:8])}) == 8
    own = {line.get_color(): d and tuple(np.round(d, 6)) for d, line in zip(dashes[:8], lines[:8])}
    assert own == {line.get_color(): d and tuple(np.round(d, 6)) for d, line in zip(dashes[8:], lines[8:])}


# --- the summary

def test_every_row_of_a_summary_is_shown_with_its_numbers():
    fig = summary.plot_summary(VERDICTS)
    words, (shares, scores) = [t.get_text() for t in texts(fig)], fig.axes
    names = ["animals", "Chinese", "palindromes", "balanced", "number 0", "number 1"]
    assert [words.count(name) for name in names] == [1] * len(VERDICTS) and "⟨⟩" not in words
    assert [t.get_text() for t in shares.get_yticklabels()] == ["8 → 8/10"] * 2 + ["0 → 0/10", "0 → 1/1"] + ["20 → 20/20"] * 2
    alone, ranked = [line.get_xdata().tolist() for line in shares.lines if line.get_marker() == "s"]
    assert (alone, ranked) == ([.8, .8, 0, 0, 1, 1], [.8, .8, 0, 1, 1, 1])
    for marker, name, bars in zip("sD", ("found", "right"), scores.collections):
        mean, = [line for line in scores.lines if line.get_marker() == marker]
        assert mean.get_xdata().tolist() == [row[name][0] for row in VERDICTS]
        np.testing.assert_allclose([[x for x, _ in path] for path in bars.get_segments()], [row[name][1:] for row in VERDICTS])
    assert [line.get_xdata() for line in scores.lines if line.get_linestyle() == ":"] == [[.5, .5]]


def test_a_dot_for_each_seed_in_its_row_none_over_another_or_over_a_mean():
    fig = summary.plot_summary(VERDICTS)
    fig.canvas.draw()
    scores, edges = fig.axes[1], sorted({line.get_ydata()[0] for line in fig.artists if isinstance(line, Line2D)})
    dots = [line for line in scores.lines if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in dots] == [row["auroc"] for row in VERDICTS]
    found, right = [line for line in scores.lines if line.get_marker() in ("s", "D")]
    size = (dots[0].get_markersize() + 1e-6) * fig.dpi / 72
    for line, lane, below, top, bottom in zip(dots, found.get_ydata(), right.get_ydata(), edges, edges[1:]):
        y = np.array(line.get_ydata())
        assert top + 1.5 < y.min() and y.max() + 1.5 + 1.75 < lane < below - 3.5 < bottom - 5.25
        at = scores.transData.transform(line.get_xydata())
        apart = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))[np.triu_indices(len(at), 1)]
        assert (apart >= size).all()
        assert (at[:, 0] + size / 2 <= scores.bbox.x1).all() and (at[:, 0] - size / 2 >= scores.bbox.x0).all()


def test_a_verdict_is_a_word_and_a_symbol_of_its_own():
    symbols, colors = zip(*summary.VERDICTS.values())
    assert len(set(symbols)) == len(set(colors)) == len(summary.VERDICTS)
    for verdict, (symbol, _) in summary.VERDICTS.items():
        words = shown(summary.plot_summary([make_verdict(verdict=verdict)]))
        assert words & {*summary.VERDICTS, *symbols} == {verdict, symbol}


def test_labels_of_a_summary_are_counted_ticked_and_shortened():
    words = shown(summary.plot_summary(VERDICTS[:1]))
    assert {"·animal 8/10 ✓", "·animals 2/10"} <= words
    labels = ["·b", "·a", " a", "·c", "·d", "·" + "W" * 60 + "ing"]
    words = shown(summary.plot_summary([make_verdict(labels=labels, matches=[False] * 5 + [True], auroc=[.9] * 6)]))
    long, = [w for w in words if w.startswith("·W")]
    assert "…" in long and long.endswith("ng 1/6 ✓") and {"·a 2/6", "+ 3 others"} <= words


def test_texts_of_a_summary_stay_beside_their_dots_where_a_notebook_crops_the_page():
    fig, pictures = summary.plot_summary(VERDICTS[:2]), []
    for box in (None, Bbox([[1, 0], [6, fig.get_figheight()]])):
        fig.savefig(buffer := io.BytesIO(), dpi=100, bbox_inches=box)
        pictures.append(plt.imread(io.BytesIO(buffer.getvalue())))
    whole, cropped = pictures
    assert np.abs(whole[:, 100:600] - cropped).mean() < 0.001


def test_the_legend_of_a_summary_is_below_the_rows():
    fig = summary.plot_summary(VERDICTS)
    fig.canvas.draw()
    box = fig.legends[0].get_window_extent()
    assert 0 <= box.y0 and box.y1 <= min(ax.bbox.y0 for ax in fig.axes) and box.x1 < fig.axes[0].bbox.x0
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {"descent alone", "with ranking", "one seed", "chance",
                                                                 "mean, 95 % interval by word", "right label on the same words"}


@pytest.mark.parametrize("x", [[.5] * 20, [0, .1, .2, 1, 1.1, 5], np.linspace(3, 0, 20)], ids=["tied", "few", "dense"])
def test_a_swarm_keeps_its_dots_apart_and_close_to_the_line(x):
    y = summary._swarm(np.array(x, dtype=float), 1)
    assert all(np.hypot(x[i] - x[j], y[i] - y[j]) >= 1 - 1e-9 for i in range(len(x)) for j in range(i))
    assert np.abs(y).max() <= len(x) / 2


# --- style

@pytest.mark.parametrize("name", PANELS)
def test_settings_are_left_alone_and_a_given_axes_is_used(name):
    fig, ax = plt.subplots()
    before, open_before = dict(matplotlib.rcParams), plt.get_fignums()
    assert PANELS[name](ax=ax) is ax
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == open_before


def test_a_result_is_not_kept_open_by_pyplot():
    fig = plot.plot_result(TRACE, RANKING, HELDOUT)
    assert len(fig.axes) == 5 and len(plot.plot_result(TRACE, RANKING).axes) == 4 and plt.get_fignums() == []


# --- files

@pytest.mark.slow
def test_saved_twice_the_same_bytes_whatever_the_user_has_set(tmp_path):
    one = plot.save_figure(FIGURES["result"](), tmp_path / "one", pdf=True)
    with plt.rc_context({"font.size": 20, "axes.grid": True, "lines.linewidth": 9, "savefig.bbox": "tight",
                         "pdf.fonttype": 3, "axes.facecolor": "black", "font.family": "serif", "savefig.dpi": 30}):
        two = plot.save_figure(FIGURES["result"](), tmp_path / "two.png", pdf=True)
    assert (one, two) == (tmp_path / "one.png", tmp_path / "two.png")
    for suffix in (".png", ".pdf"): assert one.with_suffix(suffix).read_bytes() == two.with_suffix(suffix).read_bytes()


def test_pdf_has_truetype_fonts_and_no_date_and_png_has_200_dpi(tmp_path):
    png = plot.save_figure(plot.plot_tokens(TRACE).figure, tmp_path / "tokens", pdf=True)
    content = png.with_suffix(".pdf").read_bytes()
    assert b"/FontFile2" in content and b"/Type3" not in content and b"Date" not in content
    height, width, _ = plt.imread(png).shape
    assert (width, height) == (round(200 * plot.WIDTH), round(200 * plot.HEIGHT))
    assert b"Software" not in png.read_bytes()


@pytest.mark.slow
def test_the_palette_of_a_png_keeps_the_colors(tmp_path):
    fig = FIGURES["result"]()
    saved = plt.imread(plot.save_figure(fig, tmp_path / "a"))[..., :3]
    fig.savefig(buffer := io.BytesIO(), dpi=200)
    buffer.seek(0)
    assert np.abs(saved - plt.imread(buffer)[..., :3]).mean() < 0.001


def test_a_caption_is_in_the_metadata_of_both_files(tmp_path):
    fig = plot.plot_accuracy(TRACE).figure
    png = plot.save_figure(fig, tmp_path / "a", pdf=True, caption="Accuracy of 动物.")
    assert Image.open(png).text == {"Description": "Accuracy of 动物."}
    assert b"/Subject" in png.with_suffix(".pdf").read_bytes()
    assert Image.open(plot.save_figure(fig, tmp_path / "b")).text == {}
    own = Image.open(plot.save_figure(FIGURES["result"](), tmp_path / "c")).text["Description"]
    assert own.startswith("a label for 动物") and own.endswith("those of chance.")


def test_one_png_a_dot_in_the_name_stays_and_the_folder_is_made(tmp_path):
    path = plot.save_figure(plot.plot_accuracy(TRACE).figure, tmp_path / "new" / "v1.2")
    assert path == tmp_path / "new" / "v1.2.png" and [*path.parent.iterdir()] == [path]


def test_nothing_is_written_on_error(tmp_path, monkeypatch):
    fig, savefig = plot.plot_accuracy(TRACE).figure, matplotlib.figure.Figure.savefig
    before = plot.save_figure(fig, tmp_path / "a", pdf=True).read_bytes()

    def fails(self, *args, format, **kw):
        if format == "pdf": raise OSError("disk full")
        return savefig(self, *args, format=format, **kw)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    for stem in (tmp_path / "a", tmp_path / "new" / "b"):
        with pytest.raises(OSError, match="disk full"): plot.save_figure(plot.plot_losses(TRACE).figure, stem, pdf=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


# --- bad input

@pytest.mark.parametrize("call, message", [
    (lambda: plot.plot_losses(TRACE.drop(columns="kl")), "the trace has no column kl"),
    (lambda: plot.plot_losses(TRACE[:0]), "no rows"),
    (lambda: plot.plot_losses(TRACE.assign(kl=np.nan)), "nan in column kl, row 0"),
    (lambda: plot.plot_tokens(TRACE.drop(columns="tokens")), "the trace has no column tokens"),
    (lambda: plot.plot_plane(TRACE, RANKING, annotate=["·nowhere"]), "not in the ranking: ·nowhere"),
    (lambda: plot.plot_plane(TRACE, RANKING.drop(columns="token")), "the ranking has no column token"),
    (lambda: plot.plot_heldout(HELDOUT.assign(label="other")), "'other'"),
    (lambda: summary.plot_summary([]), "no verdicts"),
    (lambda: summary.plot_summary([make_verdict(), {"form": "words"}]), "row 1 of the verdicts has no experiment, paper"),
    (lambda: summary.plot_summary([make_verdict(verdict="fine")]), "animals, running text.*'fine'; it is one of"),
    (lambda: summary.plot_summary([make_verdict(auroc=[.9] * 9)]), "10 labels, 10 and 10 matches and 9 AUROCs"),
    (lambda: summary.plot_summary([make_verdict(labels=[], matches=[], auroc=[])]), "0 labels"),
    (lambda: summary.plot_summary([make_verdict(auroc=[.9] * 9 + [np.nan])]), "an AUROC of nan; it is from 0 to 1"),
    (lambda: summary.plot_summary([make_verdict(found=[.8, .9, .95])]), "found 0.8 outside its interval"),
])
def test_bad_input_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message): call()
    assert plt.get_fignums() == []
