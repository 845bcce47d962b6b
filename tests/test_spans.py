"""Time strings: what is read, what is refused, and in which words."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_ema.spans import FRACTIONAL_UNITS, UNITS, Span


def parse(time, **options):
    return Span.parse(time, name='half_life', **options)


@pytest.mark.parametrize(
    ('time', 'value', 'unit'),
    [
        ('1000ba', 1000, 'ba'),
        ('1.5ep', 1.5, 'ep'),
        ('2iter', 2, 'iter'),
        ('50000sp', 50000, 'sp'),
        ('1_000_000tok', 1_000_000, 'tok'),
        ('3e6sp', 3_000_000, 'sp'),
        ('1e-1dur', 0.1, 'dur'),
        ('2.0ba', 2, 'ba'),
        ('0ba', 0, 'ba'),
        (' 7 ba ', 7, 'ba'),
        ('7BA', 7, 'ba'),
        ('.5ep', 0.5, 'ep'),
    ],
)
def test_a_time_string_is_a_number_and_a_unit(time, value, unit):
    span = parse(time)
    assert (span.value, span.unit) == (value, unit)
    assert type(span.value) is (int if float(value).is_integer() and unit != 'dur' else float)


def test_a_share_of_the_run_stays_a_float():
    assert parse('1dur') == Span(1.0, 'dur')
    assert isinstance(parse('1dur').value, float)


def test_a_span_passes_through():
    assert parse(Span(3, 'ep')) == Span(3, 'ep')


def test_whatever_has_a_value_and_a_unit_is_a_time():
    assert parse(SimpleNamespace(value=3, unit=SimpleNamespace(value='ba'))) == Span(3, 'ba')


@pytest.mark.parametrize('time', ['1000ba', '2ep', '50000sp', '4tok', '3iter', '0.25dur'])
def test_composer_times_are_accepted(time):
    core = pytest.importorskip('composer.core', reason='needs Composer')
    assert parse(core.Time.from_timestring(time)) == parse(time)


@given(
    unit=st.sampled_from(sorted(UNITS)),
    value=st.one_of(st.integers(0, 10**15), st.floats(0, 1e15, allow_subnormal=False)),
)
def test_writing_and_reading_again_gives_the_same_span(unit, value):
    if unit not in FRACTIONAL_UNITS:
        value = int(value)
    span = parse(Span(value, unit))
    assert parse(str(span)) == span


@given(text=st.text(max_size=12) | st.from_regex(r'[-+.0-9e_]{1,5}(ba|ep|sp|tok|dur|iter|x)?', fullmatch=True))
def test_any_text_is_a_time_or_a_value_error_that_shows_it(text):
    message = ''
    try:
        span = parse(text)
    except ValueError as error:
        message = str(error)
    if message:
        assert message.startswith('half_life ')
        assert repr(text) in message
    else:
        assert span.unit in UNITS
        assert 0 <= span.value < float('inf')


@pytest.mark.parametrize('time', ['', 'ba', 'many ba', '1..5ep', '1000', '-', '1e', 'ba1000', '--1ba'])
def test_what_does_not_parse_is_shown_with_an_example(time):
    with pytest.raises(ValueError, match=r"half_life .*('1000ba'|half_life='2iter')") as error:
        parse(time)
    assert repr(time) in str(error.value)


@pytest.mark.parametrize('time', ['5min', '1000bat', '2epochs', '10'])
def test_an_unknown_unit_is_refused_with_the_legal_ones_and_an_example(time):
    with pytest.raises(ValueError, match=re.escape(repr(time))) as error:
        parse(time, units=('ba', 'ep'))
    assert 'ba (batches), ep (epochs)' in str(error.value)
    assert f"half_life='{'10ba' if time == '10' else '1000ba'}'" in str(error.value)


def test_a_unit_that_makes_no_sense_here_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"takes the units ba \(batches\), got '3ep'.*half_life='1000ba'"):
        parse('3ep', units=('ba',))


@pytest.mark.parametrize('time', ['-1ba', '-0.5ep', '-1dur'])
def test_a_negative_time_is_refused(time):
    with pytest.raises(ValueError, match=rf"half_life must not be negative, got '{time}'. Pass for example half_life="):
        parse(time)


@pytest.mark.parametrize('time', ['0ba', '0.0ep', '0dur', '-0ba'])
def test_zero_is_refused_where_it_has_no_meaning(time):
    with pytest.raises(ValueError, match=rf"must be above zero, got '{time}'. Pass for example"):
        parse(time, positive=True)
    assert parse(time).value == 0


@pytest.mark.parametrize('unit', sorted(UNITS.keys() - FRACTIONAL_UNITS))
def test_batches_samples_and_tokens_come_whole(unit):
    with pytest.raises(ValueError, match=rf"half_life counts whole {UNITS[unit]}, got '1.5{unit}'. Round it"):
        parse(f'1.5{unit}')


@pytest.mark.parametrize('value', ['inf', 'nan', '1e999', '-inf'])
def test_infinite_times_are_refused(value):
    with pytest.raises(ValueError, match='half_life'):
        parse(f'{value}ep')
    with pytest.raises(ValueError, match='half_life must be finite'):
        parse(SimpleNamespace(value=float(value), unit='ep'))


@pytest.mark.parametrize('time', [1000, 0.5, None, True, ['1ba'], ('1', 'ba'), {'value': 1}, b'1ba'])
def test_what_is_no_time_names_its_type_and_the_remedy(time):
    with pytest.raises(TypeError, match=rf'of type {type(time).__name__}\. .*write the unit') as error:
        parse(time)
    assert repr(time) in str(error.value)
