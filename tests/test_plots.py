"""Pictures: which panels and lines they have, what labels them, that nothing overlaps, and where they are written."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from points import classified

from composer_ema.pictures import curves, smoothing, style, weights, writing
from composer_ema.pictures.curves import RunCurves
from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.previews import describe, draw_previews
from composer_ema.pictures.runs import draw_runs
from composer_ema.pictures.writing import check_out, write
from composer_ema.posthoc.shares import shares
from composer_ema.recipe import preview
from composer_ema.recipe.metrics import Report
from composer_ema.recipe.preview import Preview, Profile
from composer_ema.run_folder import recorder
from composer_ema.run_folder.outputs import Curve

LONG = [f'resnet_on_cifar10_sgd_momentum_cosine_with_warmup_learning_rate_{rate}_seed_1' for rate in range(4)]


def curve(values: Sequence[float], *, per_epoch: int = 100) -> Curve:
    batch = np.arange(1, len(values) + 1, dtype=np.float64)
    return Curve(batch / per_epoch, batch, 10 * batch, np.asarray(values, dtype=np.float64))


def make_run(name: str = 'run', *, batches: int = 300, weights: Sequence[str] = ('training', 'ema')) -> RunCurves:
    t = np.arange(batches) / batches
    noise = 0.3 * np.sin(np.arange(batches) * 1.7)
    points = [classified(epoch, 0.8 + 0.03 * epoch, 1 / epoch, 100 * epoch, 1000 * epoch) for epoch in (1, 2, 3)]
    return RunCurves(
        name=name,
        loss=curve(2 - t + noise),
        rates={'group 0': curve(0.1 * (1 - t))},
        momenta={'group 0': curve(0.85 + 0.1 * t)},
        evaluations={each: points for each in weights},
        distances={each: curve([0.3, 0.2, 0.1], per_epoch=1) for each in weights if each != 'training'},
        report=Report(target_accuracy=0.86),
        momentum_names=('momentum',),
    )


def with_losses(run: RunCurves, **losses: Sequence[float]) -> RunCurves:
    """The run with these evaluation losses, by label."""
    points = {
        label: [classified(epoch, 0.5, loss, 100 * epoch, 1000 * epoch) for epoch, loss in enumerate(values, start=1)]
        for label, values in losses.items()
    }
    return dataclasses.replace(run, evaluations=points)


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel().split('\n')[0]: axes for axes in figure.axes}


def remarks(axes: Axes) -> str:
    return axes.get_title(loc='left').replace('\N{NO-BREAK SPACE}', ' ')


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


class TestPanels:
    def test_one_run_has_all_six_with_units(self):
        assert list(panels(draw_runs([make_run()]))) == [
            'training loss', 'evaluation loss (nats)', 'accuracy (%)', 'learning rate', 'momentum',
            'distance of the average from',
        ]  # fmt: skip

    def test_lines_hold_the_numbers(self):
        run = make_run()
        drawn = panels(draw_runs([run]))
        [rate] = drawn['learning rate'].lines
        assert rate.get_xydata().tolist() == list(
            map(list, zip(run.rates['group 0'].epoch, run.rates['group 0'].value, strict=True))
        )
        accuracies = [line for line in drawn['accuracy (%)'].lines if len(line.get_xdata()) == 3]
        assert [line.get_ydata() for line in accuracies] == [pytest.approx([83, 86, 89])] * 2

    def test_noise_is_drawn_in_grey_behind_its_mean_and_said(self):
        panel = panels(draw_runs([make_run()]))['training loss']
        raw, mean = panel.lines
        assert np.array_equal(raw.get_ydata(), make_run().loss.value)
        assert np.ptp(mean.get_ydata()[20:]) < np.ptp(raw.get_ydata()[20:])
        assert panel.get_title(loc='left') == 'mean over 7 batches, each batch in grey'

    def test_panels_without_data_are_left_out(self):
        bare = RunCurves('old', curve([2.0, 1.0]), {}, {}, {})
        assert list(panels(draw_runs([bare]))) == ['training loss']
        without = make_run(weights=['training'])
        assert 'distance of the average from' not in panels(draw_runs([without]))
        flat = RunCurves('sgd', curve([2.0]), {'group 0': curve([0.1])}, {'group 0': curve([0.0])}, {})
        assert list(panels(draw_runs([flat]))) == ['training loss', 'learning rate'], 'no momentum'

    def test_short_runs_are_drawn_over_batches_and_longer_ones_over_epochs(self):
        assert {axes.get_xlabel() for axes in draw_runs([make_run()]).axes} == {'epoch'}
        short = RunCurves('short', curve([2.0, 1.5, 1.0]), {}, {}, {})
        assert {axes.get_xlabel() for axes in draw_runs([make_run(), short]).axes} == {'batch'}
        assert {axes.get_xlabel() for axes in draw_runs([make_run()], axis='sample').axes} == {'sample'}

    def test_rates_of_different_size_get_a_logarithmic_axis(self):
        small = RunCurves('adam', curve([1.0]), {'group 0': curve([0.001, 0.0])}, {}, {})
        assert panels(draw_runs([make_run(), small]))['learning rate'].get_yscale() == 'log'
        assert panels(draw_runs([make_run(), make_run('b')]))['learning rate'].get_yscale() == 'linear'

    def test_groups_that_differ_are_labelled(self):
        run = RunCurves('a', curve([1.0] * 9), {'groups 0, 2': curve([0.1] * 9), 'group 1': curve([0.2] * 9)}, {}, {})
        panel = panels(draw_runs([run]))['learning rate']
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ['groups 0, 2', 'group 1']
        assert len({line.get_linestyle() for line in panel.lines}) == 2

    @pytest.mark.parametrize(
        ('names', 'said'),
        [
            ([('momentum',)], 'momentum'),
            ([('beta1',)], 'β₁'),
            ([('beta1',), ('momentum',)], 'momentum, β₁'),
            ([('momentum', 'beta1')], 'momentum, β₁'),
        ],
    )
    def test_momentum_is_called_as_the_optimizers_call_it(self, names, said):
        runs = [dataclasses.replace(make_run(str(own)), momentum_names=own) for own in names]
        assert list(panels(draw_runs(runs)))[4] == said


class TestDivergence:
    def test_a_run_that_diverged_is_drawn(self):
        run = RunCurves('a', curve([2.0, 1.0, math.nan, math.inf] * 30), {}, {}, {})
        panel = panels(draw_runs([run]))['training loss']
        low, high = panel.get_ylim()
        assert 0 < low < high < 3
        assert remarks(panel).endswith('×: NaN or infinite')

    @pytest.mark.parametrize(
        ('losses', 'scale'),
        [
            ({'training': [2.3, 0.5, 0.3]}, 'linear'),
            ({'training': [2.3, 0.5, 0.3], 'ema': [2.2, 0.4, 0.2]}, 'linear'),
            ({'training': [1.0, 0.8, 4e4], 'ema': [1.0, 0.7, 0.6]}, 'log'),
            ({'training': [1.0, 1e5, 2e5, 3e5]}, 'log'),
            ({'training': [40.0, 5.0, 1.1, 0.8, 0.6]}, 'log'),
            ({'training': [1.0, math.nan, math.inf]}, 'linear'),
            ({'training': [math.nan, math.nan]}, 'linear'),
            ({'training': [-1.0, -0.5, 0.2, 4e4]}, 'symlog'),
            ({'training': [0.0, 0.0, 0.0]}, 'linear'),
            ({'training': [1.0, 1e308]}, 'log'),
        ],
        ids=str,
    )
    def test_an_evaluation_loss_that_would_flatten_the_rest_gets_a_logarithmic_axis(self, losses, scale):
        figure = draw_runs([with_losses(make_run(), **losses)])
        figure.draw_without_rendering()
        assert panels(figure)['evaluation loss (nats)'].get_yscale() == scale

    def test_a_training_loss_that_comes_down_again_gets_a_logarithmic_axis_that_reaches_its_peak(self):
        loss = np.r_[2.3, 1e4, 5e17, 5e19, 1e19, np.tile([40.0, 50.0], 30)]
        run = dataclasses.replace(make_run(), loss=curve(loss, per_epoch=20))
        panel = panels(draw_runs([run]))['training loss']
        assert panel.get_yscale() == 'log'
        low, high = panel.get_ylim()
        assert low < 2.3
        assert high > 5e19

    @pytest.mark.parametrize('first', [2.4, 2.5])
    def test_a_training_loss_is_drawn_from_its_start_unless_that_would_squeeze_it(self, first):
        runs = [dataclasses.replace(make_run(name), loss=curve(np.linspace(first, 1, 60))) for name in 'ab']
        assert panels(draw_runs(runs))['training loss'].get_ylim()[1] > first
        steep = [dataclasses.replace(run, loss=curve([9.0, *np.linspace(first, 1, 60)])) for run in runs]
        assert panels(draw_runs(steep))['training loss'].get_ylim()[1] < 3

    def test_the_highest_distance_stands_below_the_edge(self):
        runs = [dataclasses.replace(make_run(), distances={'ema': curve([0.24, 0.28, 0.3], per_epoch=1)})] * 2
        panel = panels(draw_runs(runs))['distance of the average from']
        assert panel.get_ylim() == (0, pytest.approx(0.324))

    def test_a_run_among_others_that_diverged_before_its_first_evaluation_gets_one_too(self):
        runs = [with_losses(make_run(), training=[1.0, 0.5]), with_losses(make_run('b'), training=[1e6, 1e6])]
        assert panels(draw_runs(runs))['evaluation loss (nats)'].get_yscale() == 'log'

    def test_distances_get_one_only_where_they_rise(self):
        def scale(*values: float) -> str:
            run = dataclasses.replace(make_run('b'), distances={'ema': curve(values, per_epoch=1)})
            return panels(draw_runs([make_run('a'), run]))['distance of the average from'].get_yscale()

        assert scale(0.5, *[0.001] * 9) == 'linear'
        assert scale(0.1, 0.05, 1e4) == 'log'

    def test_values_that_are_no_number_are_marked_at_the_upper_edge_and_said(self):
        run = with_losses(make_run(), training=[1.0, math.nan, math.nan], ema=[1.0, 0.5, 0.4])
        panel = panels(draw_runs([run]))['evaluation loss (nats)']
        [marks] = [line for line in panel.lines if line.get_marker() == 'x']
        assert marks.get_xdata().tolist() == [2, 3]
        assert marks.get_color() == style.VERMILION
        assert remarks(panel) == '×: NaN'
        infinite = panels(draw_runs([with_losses(run, training=[1.0, math.inf])]))['evaluation loss (nats)']
        assert remarks(infinite) == '×: infinite'

    @pytest.mark.parametrize('number', [1, 3])
    def test_runs_of_nothing_but_nan_are_drawn_without_a_scale(self, number):
        nothing = [math.nan] * 40
        runs = [
            dataclasses.replace(
                with_losses(make_run(str(index)), training=nothing[:3]),
                loss=curve(nothing), rates={'group 0': curve(nothing)}, distances={'ema': curve(nothing)},
            )
            for index in range(number)
        ]  # fmt: skip
        figure = draw_runs(runs)
        figure.draw_without_rendering()
        assert len(panels(figure)['training loss'].get_yticks()) == 0

    def test_a_run_that_is_nan_after_its_first_batches_is_drawn(self):
        draw_runs([dataclasses.replace(make_run(), loss=curve([2.0, 1.0, 3.0] + [math.nan] * 400))])

    def test_a_run_without_anything_to_draw_is_refused(self):
        with pytest.raises(PlotError, match='nothing to draw'):
            draw_runs([RunCurves('a', curve([]), {}, {}, {'ema': [classified(1.0, None, None)]})])


class TestEqualCurves:
    def test_a_line_that_is_covered_is_wider_than_what_covers_it(self):
        figure = draw_runs([make_run('first'), make_run('second'), make_run('third')])
        for name in ('evaluation loss (nats)', 'distance of the average from'):
            lines = [line for line in panels(figure)[name].lines if line.get_color() in style._COLOURS[:3]]
            by_run = [[line for line in lines if line.get_color() == colour] for colour in style._COLOURS[:3]]
            for covered, covering in itertools.pairwise(by_run):
                assert covered[0].get_linewidth() > covering[0].get_linewidth()
                assert covered[0].get_markersize() > covering[0].get_markersize()

    def test_lines_that_only_cross_are_alike(self):
        run = with_losses(make_run(), training=[1.0, 0.5, 0.4], ema=[0.9, 0.5, 0.3])
        first, second = panels(draw_runs([run]))['evaluation loss (nats)'].lines
        assert first.get_linewidth() == second.get_linewidth()

    def test_an_average_that_equals_the_weights_shows_both(self):
        first, second = panels(draw_runs([make_run()]))['evaluation loss (nats)'].lines
        assert first.get_linewidth() > second.get_linewidth()
        accuracy = panels(draw_runs([make_run()]))['accuracy (%)']
        dots = [each.get_linestyle() for each in accuracy.collections]
        assert len(dots) == 2, 'both reach the target in one epoch'
        assert dots[0] != dots[1]

    def test_short_runs_and_recipes_too(self):
        for figure in (
            draw_runs([make_run(name, batches=5) for name in 'ab']),
            draw_previews([make_preview(name, batches=5) for name in 'ab']),
        ):
            first, second = panels(figure)['learning rate'].lines
            assert first.get_markersize() > second.get_markersize()

    def test_the_legend_says_which_are_equal(self):
        same, other = [make_run(name) for name in 'abc'], make_run('d', batches=200)
        assert legend_of(draw_runs([*same, other]))[:4] == ['a', 'b = a', 'c = a', 'd']
        figure = draw_previews([make_preview('a'), make_preview('b'), make_preview('c', weight=0.02)])
        assert [text.split('\n')[0] for text in legend_of(figure)] == ['a', 'b = a', 'c']


def make_preview(name: str = 'recipe', *, weight: float = 0.01, batches: int = 300, momentum: float = 0.9) -> Preview:
    weights = [1.0, *[weight] * (batches - 1)]
    profile = Profile('ema', np.arange(1.0, batches + 1), shares(weights), batches, 'half_life=69ba', 0.23)
    rates = {'group 0': curve(np.linspace(0.1, 0, batches).tolist())}
    momenta = {'group 0': curve([momentum] * batches)}
    return Preview(name, batches, 100, rates, momenta, [profile], momentum_names=('beta1',))


class TestRecipes:
    def test_one_recipe_has_all_four_with_units(self):
        figure = draw_previews([make_preview()])
        assert [axes.get_ylabel().replace('\n', ' ') for axes in figure.axes] == [
            'learning rate', 'β₁', 'weight of each step in the average at the end (%)',
            'part of the average that is made up to here (%)',
        ]  # fmt: skip
        assert {axes.get_xlabel() for axes in figure.axes} == {'epoch'}
        assert legend_of(figure) == [
            'ema: half_life=69ba (23 % of the run), effective number of steps 1/Σw² = 134 of 300'
        ]

    def test_lines_hold_the_shares_in_per_cent(self):
        preview = make_preview()
        drawn = panels(draw_previews([preview]))
        [weights] = drawn['weight of each step in'].lines
        assert weights.get_ydata() == pytest.approx(100 * preview.profiles[0].share)
        cumulated = drawn['part of the average that is'].lines[0]
        assert cumulated.get_ydata()[[0, -1]] == pytest.approx([0, 100])
        assert drawn['weight of each step in'].get_title(loc='left') == (
            f'shaded: half of the average, made in the last {preview.profiles[0].newest_half} batches'
        )

    def test_weights_of_different_size_get_a_logarithmic_axis(self):
        def scale(*previews: Preview) -> str:
            return panels(draw_previews(previews))['weight of each step in'].get_yscale()

        assert scale(make_preview()) == scale(make_preview(), make_preview('b', weight=0.02)) == 'linear'
        assert scale(make_preview(), make_preview('b', weight=0.5)) == 'log'
        assert scale(make_preview(weight=1e-4)) == 'log', 'the first copy makes nearly all'

    def test_what_no_recipe_has_is_left_out(self):
        bare = Preview('sgd', 3, 100, {'group 0': curve([0.1] * 3)}, {'group 0': curve([0.0] * 3)})
        figure = draw_previews([bare])
        assert list(panels(figure)) == ['learning rate']
        assert figure.axes[0].get_xlabel() == 'batch', 'less than an epoch'
        assert legend_of(figure) == []

    def test_several_recipes_are_named_with_their_averages(self):
        figure = draw_previews([make_preview(name, weight=0.01 * index) for index, name in enumerate(LONG, start=1)])
        assert [text.split('\n')[0] for text in legend_of(figure)] == LONG
        assert all('effective number of steps' in text for text in legend_of(figure))

    def test_each_of_several_averages_has_a_line_of_its_own_in_the_legend(self):
        one, other = make_preview(), make_preview(weight=0.02)
        several = dataclasses.replace(
            one, profiles=[one.profiles[0], dataclasses.replace(other.profiles[0], name='long')]
        )
        figure = draw_previews([several])
        assert [text.partition(':')[0] for text in legend_of(figure)] == ['ema', 'long']
        assert len({line.get_color() for line in figure.legends[0].get_lines()}) == 2
        beside = draw_previews([several, make_preview('b')])
        assert [text.partition(':')[0].partition('\n')[0] for text in legend_of(beside)] == [
            'recipe',
            'ema',
            'long',
            'b',
        ]
        assert len({line.get_linestyle() for line in beside.legends[0].get_lines()[1:3]}) == 2

    @pytest.mark.parametrize(('steps', 'said'), [([1.0], '1 of 1'), ([1.0] + [0.001] * 9999, '1,999 of 10,000')])
    def test_numbers_are_rounded_for_reading(self, steps, said):
        profile = Profile('ema', np.arange(1.0, len(steps) + 1), shares(steps), len(steps), 'smoothing=0.999')
        assert describe(profile) == f'ema: smoothing=0.999, effective number of steps 1/Σw² = {said}'


class TestLegend:
    def test_one_run_is_the_title_and_its_first_epochs_stand_in_the_legend(self):
        figure = draw_runs([make_run()])
        assert figure.get_suptitle() == 'run'
        assert legend_of(figure) == [
            'evaluated: training weights, in epoch 2 first at 86 %', 'evaluated: average, in epoch 2 first at 86 %',
        ]  # fmt: skip

    def test_several_runs_are_named(self):
        figure = draw_runs([make_run(name, batches=300 + index) for index, name in enumerate(LONG)])
        assert legend_of(figure) == [*LONG, 'evaluated: training weights', 'evaluated: average']

    def test_names_are_taken_literally(self):
        figure = draw_runs([make_run('_private'), make_run('$x^2$', batches=200)])
        figure.draw_without_rendering()
        assert legend_of(figure)[:2] == [' _private', r'\$x^2\$']

    def test_runs_differ_in_colour_and_marker_the_first_ones_in_grey_too(self):
        figure = draw_runs([make_run(str(number)) for number in range(7)])
        lines = panels(figure)['learning rate'].lines
        assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 7
        greys = sorted(np.dot([0.2126, 0.7152, 0.0722], np.power(to_rgb(line.get_color()), 2.2)) for line in lines[:3])
        assert min(np.diff(greys)) > 0.1


@pytest.mark.parametrize(
    'drawn',
    [
        [make_run('resnet on cifar10 ' * 12)],
        [make_run('resnet_on_cifar10_' * 12)],
        [make_run(name) for name in LONG],
        [make_run(f'run {number}', batches=400) for number in range(8)],
        [make_run('three', batches=3), make_run('no average', weights=['training'])],
        [make_run('long', batches=10_000)],
        [make_preview()],
        [make_preview(name, weight=weight) for name, weight in zip(LONG, (0.5, 0.1, 0.01, 0.001), strict=True)],
        [make_preview('three', batches=3), make_preview('long', batches=10_000)],
    ],
    ids=[
        'long title',
        'no spaces',
        'long names',
        'eight',
        'three batches',
        '10,000 batches',
        'recipe',
        'recipes',
        'recipes of 3 and 10,000 batches',
    ],
)
def test_text_stays_inside_the_picture_and_does_not_overlap(drawn):
    figure = draw_runs(drawn) if isinstance(drawn[0], RunCurves) else draw_previews(drawn)
    figure.draw_without_rendering()
    hidden = hidden_labels(figure)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    texts = [text for text in texts if id(text) not in hidden]
    boxes = [text.get_window_extent() for text in texts]
    whole = figure.bbox
    for text, box in zip(texts, boxes, strict=True):
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
    for i, box in enumerate(boxes):
        for j in range(i):
            assert not box.padded(-1).overlaps(boxes[j].padded(-1)), (texts[i], texts[j])


def hidden_labels(figure: Figure) -> set[int]:
    """Labels of ticks beyond the limits, which matplotlib keeps without drawing them."""
    hidden = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {id(tick.label1), id(tick.label2)}
    return hidden


class TestWriting:
    def test_two_files_that_parse_and_nothing_beside_them(self, tmp_path):
        paths = write(draw_runs([make_run()]), tmp_path / 'new/curves')
        assert [path.name for path in paths] == ['curves.png', 'curves.svg']
        assert sorted(paths) == sorted((tmp_path / 'new').iterdir())
        assert paths[0].read_bytes().startswith(b'\x89PNG')
        assert ElementTree.parse(paths[1]).getroot().tag.endswith('svg')

    def test_an_ending_writes_that_one(self, tmp_path):
        [path] = write(draw_runs([make_run()]), tmp_path / 'a.pdf')
        assert path.read_bytes().startswith(b'%PDF')

    def test_the_same_curves_give_the_same_file(self, tmp_path):
        for name in ('a.svg', 'b.svg'):
            write(draw_runs([make_run()]), tmp_path / name)
        assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()

    def test_a_place_may_be_a_string(self, tmp_path):
        assert write(draw_runs([make_run()]), str(tmp_path / 'a.svg')) == [tmp_path / 'a.svg']

    def test_names_with_dots_are_names(self):
        assert check_out(Path('lr0.05')) == [Path('lr0.05.png'), Path('lr0.05.svg')]

    def test_bad_places_are_said(self, tmp_path):
        with pytest.raises(PlotError, match=r'has the ending \.gif'):
            check_out(tmp_path / 'a.gif')
        with pytest.raises(PlotError, match='is a folder'):
            check_out(tmp_path)
        (tmp_path / 'file').write_text('')
        with pytest.raises(PlotError, match='cannot be written'):
            write(draw_runs([make_run()]), tmp_path / 'file/a.png')

    def test_a_long_run_makes_a_small_svg(self, tmp_path):
        [path] = write(draw_runs([make_run(batches=20_000)]), tmp_path / 'a.svg')
        assert path.stat().st_size < 1_000_000


class TestWeights:
    def test_colours_are_the_weights_for_one_run(self):
        lines = panels(draw_runs([make_run()]))['accuracy (%)'].lines
        assert [line.get_color() for line in lines[:2]] == [style.VERMILION, style.BLUE]

    @pytest.mark.parametrize('label', ['ema', 'swa', 'half_life_100ba'])
    def test_an_average_looks_the_same_under_any_name(self, label):
        figure = draw_runs([make_run(weights=['training', label])])
        _, line = panels(figure)['accuracy (%)'].lines[:2]
        assert (line.get_color(), line.get_marker(), line.get_linestyle()) == (style.BLUE, 'o', '-')
        [distance] = panels(figure)['distance of the average from'].lines
        assert (distance.get_color(), distance.get_marker()) == (style.BLUE, 'o')
        assert legend_of(figure)[1] == 'evaluated: average, in epoch 2 first at 86 %'

    def test_several_averages_differ_and_are_called_by_their_labels(self):
        labels = ['training', 'slow', 'fast', 'third']
        figure = draw_runs([make_run(weights=labels)])
        lines = panels(figure)['evaluation loss (nats)'].lines
        assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 4
        assert [text.split(',')[0] for text in legend_of(figure)] == [
            'evaluated: training weights', 'evaluated: slow', 'evaluated: fast', 'evaluated: third',
        ]  # fmt: skip
        distances = panels(figure)['distance of the average from'].lines
        assert [line.get_color() for line in distances] == [line.get_color() for line in lines[1:]]

    def test_averages_of_several_runs_differ_in_their_dashes(self):
        figure = draw_runs([make_run(), make_run('b', weights=['training', 'swa'])])
        lines = panels(figure)['evaluation loss (nats)'].lines
        assert [line.get_linestyle() for line in lines] == ['--', '-', '--', '-.']
        assert legend_of(figure)[2:] == ['evaluated: training weights', 'evaluated: ema', 'evaluated: swa']


@pytest.mark.parametrize(
    'module', [curves, smoothing, style, weights, writing, preview, recorder], ids=lambda module: module.__name__
)
def test_examples_of_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
