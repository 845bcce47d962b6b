"""The benchmarks run, their result files say what they promise, and every peer really averages."""

from __future__ import annotations

import importlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
MODEL = 'squeezenet1_1'


@pytest.fixture(autouse=True)
def checkout_on_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def run(name, out, *arguments) -> dict:
    module = importlib.import_module(f'benchmarks.{name}')
    module.main(['--device', 'cpu', '--out', str(out), *arguments])
    return json.loads(out.read_text())


def check_head(result, name) -> None:
    assert result['benchmark'] == name
    assert result['date'].count('-') == 2
    assert {'cpu', 'cores', 'threads', 'device'} <= result['machine'].keys()
    assert result['versions']['torch'] == torch.__version__
    assert result['versions']['python']
    keys = [row['key'] for row in result['rows']]
    assert len(set(keys)) == len(keys) > 0


def test_update_writes_ours_the_limit_and_each_peer_or_why_it_is_missing(tmp_path, capsys) -> None:
    from benchmarks import peers, update

    small = ['--models', MODEL, '--rounds', '2', '--seconds', '1', '--heap', 'as is']  # in this process
    result = run('update', tmp_path / 'update.json', *small)
    check_head(result, 'update')
    measured = {row['contestant'] for row in result['rows']}
    missing = {entry['name'] for entry in result['missing']}
    assert measured | missing == {each.name for each in peers.CONTESTANTS} | {update.LIMIT, update.COPY}
    assert not measured & missing
    assert all(entry['reason'] for entry in result['missing'])
    limit = next(row for row in result['rows'] if row['contestant'] == update.LIMIT)
    assert limit['ratio'] == 1
    assert all(row['ms'] > 0 and row['rounds'] == 2 for row in result['rows'])
    assert result['summary'][MODEL]['fastest_peer'] in measured
    printed = capsys.readouterr().out
    assert all(name in printed for name in measured | missing)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='asks the GNU C library')
def test_each_heap_is_set_before_its_part_is_measured_and_the_first_is_memory_kept(
    tmp_path, monkeypatch, capsys
) -> None:
    from benchmarks import common, peers, update

    done, interleave = [], common.interleave
    monkeypatch.setattr(common, 'in_own_process', lambda call, *given: call(*given))
    monkeypatch.setattr(common, 'set_heap', done.append)

    def interleave_noted(*given, **options):
        done.append('timed')
        return interleave(*given, **options)

    monkeypatch.setattr(common, 'interleave', interleave_noted)
    result = run('update', tmp_path / 'update.json', '--models', MODEL, '--rounds', '1', '--seconds', '0')
    assert done == ['kept', 'timed', 'returned', 'timed']
    ours = next(row for row in result['rows'] if row['contestant'] == peers.OURS)
    limit = next(row for row in result['rows'] if row['contestant'] == update.LIMIT)
    assert ours['over_ours'] == ours['over_ours_returned'] == 1
    assert limit['ratio'] == limit['ratio_returned'] == 1
    assert result['settings'].items() >= {'after': 'itself', 'heap': 'kept and returned'}.items()
    assert result['measures'] == ['ms', 'ms_returned']
    assert 'freed memory returned' in capsys.readouterr().out


def test_a_launch_is_what_a_profiler_saw_on_the_device_and_nobody_named() -> None:
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.common import is_launch

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.zeros(3).add_(1)
    events = list(profiled.events())
    assert any(event.device_type == torch.autograd.DeviceType.CPU for event in events)
    assert not any(map(is_launch, events))
    on_cuda = SimpleNamespace(device_type=type(events[0].device_type)(torch.autograd.DeviceType.CUDA.value))
    assert is_launch(on_cuda)
    assert not is_launch(SimpleNamespace(device_type=on_cuda.device_type, is_user_annotation=True))


def test_the_limit_reads_the_parameters_themselves() -> None:
    from benchmarks.update import flatten_

    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = flatten_(model)
    assert flat.numel() == (3 * 5 + 5) + (4 * 5) + (5 * 2 + 2)
    assert torch.equal(flat[:15].view(5, 3), model[0].weight)
    assert flat.data_ptr() == model[0].weight.data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_step_writes_a_ratio_for_each_contestant_and_the_published_one(tmp_path) -> None:
    small = ['--models', MODEL, '--batch-size', '1', '--image-size', '32', '--rounds', '1', '--budget-seconds', '1']
    result = run('step', tmp_path / 'step.json', *small, '--contestants', 'none,overlap,inline,optimizer,multi,wrapper')
    check_head(result, 'step')
    (row,) = result['rows']
    assert set(row['over_none']) == {
        'none', 'ours, in line', 'ours, EMAOptimizer', 'AveragedModel multi_avg_fn', 'optimizer wrapper (mul, add)',
    }  # fmt: skip
    assert row['speedup_in_line'] > 0
    assert row['published_speedup'] == pytest.approx(14.325 / 14.26)
    assert [entry['name'] for entry in result['missing']] == ['ours, overlapped']
    assert result['settings']['batch_size'] == 1


def test_the_published_figures_are_all_there() -> None:
    from benchmarks import common, step

    published = step.read_published()
    assert len(published) == 42
    assert common.geometric_mean(list(published.values())) == pytest.approx(1.10, abs=0.005)
    assert max(published.values()) == pytest.approx(1.46, abs=0.005)


def test_scaling_writes_each_sweep_and_leaves_out_what_does_not_fit(tmp_path) -> None:
    from benchmarks import scaling

    small = ['--tensors', '10', '--tensor-floats', '1000', '--averages', '2', '--average-floats', '1000']
    small += ['--guarded', MODEL, '--seconds', '1', '--ranks', '']
    result = run('scaling', tmp_path / 'scaling.json', *small, '--parameters', '1e3,1e15', '--rounds', '1')
    check_head(result, 'scaling')
    assert {(row['sweep'], row['size']) for row in result['rows']} == {
        ('tensors', 10), ('parameters', 1000), ('averages', 2), ('guard', MODEL),
    }  # fmt: skip
    missing = {entry['name'] for entry in result['missing']}
    assert missing - set(scaling.PEERS) == {'parameters 1000000000000000'}
    of_two = {row['call']: row for row in result['rows'] if row['sweep'] == 'averages'}
    several = {'prepared step', 'ShadowModels.update', '2 x ShadowModel.update'}
    assert set(of_two) == {scaling.LIMIT} | several | {f'2 x {name}' for name in scaling.PEERS if name not in missing}
    assert all(row['target'] == pytest.approx(20 / 12) for row in of_two.values())
    plain, guarded = (
        next(row for row in result['rows'] if row['sweep'] == 'guard' and row['call'] == call)
        for call in (scaling.PLAIN, scaling.GUARDED)
    )
    assert plain['over_plain'] == 1
    assert guarded['over_plain'] == pytest.approx(guarded['ms'] / plain['ms'])


@pytest.fixture
def tiny(monkeypatch) -> None:
    """In place of torchvision's models."""
    from benchmarks import common

    def make_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        layers = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(1000)
        model = nn.Sequential(*layers).to(device)
        model(torch.zeros(2, 3, 8, 8, device=device))
        return model.to(dtype)

    monkeypatch.setattr(common, 'make_model', make_model)


def test_scaling_compares_settings_by_the_bytes_that_they_move(tiny, tmp_path) -> None:
    from benchmarks import scaling

    none = ['--tensors', '', '--parameters', '', '--averages', '', '--guarded', '', '--ranks', '']
    result = run('scaling', tmp_path / 'scaling.json', *none, '--settings', 'tiny', '--rounds', '2')
    rows = {row['call']: row for row in result['rows']}
    assert rows.keys() == {scaling.LIMIT, *scaling.SETTINGS}
    plain, wide = rows[scaling.PLAIN_SETTING], rows['float32, compensated']
    assert (plain['bytes'], wide['bytes']) == (12, 20)
    assert plain['over_plain_per_byte'] == 1
    assert wide['over_plain_per_byte'] == pytest.approx(wide['ms'] / plain['ms'] * 12 / 20)
    assert wide['gb_per_s'] == pytest.approx(20 * wide['floats'] / wide['ms'] / 1e6)


def test_offload_times_each_interval_beside_none_and_averages_meanwhile(tiny, tmp_path, monkeypatch) -> None:
    from benchmarks import common, offload

    made, build = [], offload.ShadowModel
    monkeypatch.setattr(offload, 'ShadowModel', lambda *given, **named: made.append(build(*given, **named)) or made[-1])
    parsed = SimpleNamespace(
        device='cpu', threads=None, out=tmp_path / 'offload.json', batch_size=2, image_size=8, precision='fp32',
        intervals='1,3', iterations=5, rounds=2, seconds=1.0,
    )  # fmt: skip
    result = common.start('offload', parsed)
    rows = offload.measure('tiny', parsed, result)
    assert [row['average'] for row in rows] == [
        offload.NONE, offload.ON_DEVICE, 'on the host, every batch', 'on the host, every 3 batches'
    ]  # fmt: skip
    assert all(row['ms'] > 0 and row['rounds'] == 2 for row in rows)
    assert rows[0]['over_none'] == 1
    # Three updates and a turn to warm up, and a turn each round, of 1 + 5 iterations.
    assert [shadow.num_updates for shadow in made] == [3 + 18, 3 + 18, 3 + 18 // 3]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--device', 'cpu'], r'needs a CUDA device, got cpu: .*Pass --device cuda\.'),
        (['--device', 'cuda', '--precision', 'tf32,tf16'], r"--precision takes fp32, .*got 'tf16'"),
    ],
)
def test_offload_refuses_what_it_cannot_measure_before_it_begins(arguments, message, capsys) -> None:
    from benchmarks import offload

    with pytest.raises(SystemExit):
        offload.main(arguments)
    assert re.search(message, ' '.join(capsys.readouterr().err.split()))


@pytest.mark.slow
def test_scaling_shares_a_model_and_projects_what_was_measured(tmp_path, capsys) -> None:
    from benchmarks import ranks

    small = ['--tensors', '', '--parameters', '', '--averages', '', '--guarded', '', '--rounds', '2']
    result = run('scaling', tmp_path / 'scaling.json', *small, '--ranks', '1,2', '--rank-floats', '1e6')
    check_head(result, 'scaling')
    assert {(row['size'], row['call']) for row in result['rows']} == {
        (size, call) for size in (1, 2) for call in (ranks.LIMIT, ranks.WHOLE, ranks.SHARDED)
    }
    alone, shared = (row for row in result['rows'] if row['call'] == ranks.SHARDED)
    assert alone['faster'] == 1
    assert alone['lasting'] == pytest.approx(1, abs=0.15)
    assert shared['lasting'] == pytest.approx(0.5, abs=0.15)  # with the buffer for small tensors
    printed = capsys.readouterr().out
    assert all(row['what'] in printed for row in result['summary']['projection'])
    assert 'projection to 1,024 processes and 70,000,000,000 parameters' in printed


def found_by_two(*ms: list[float]):
    from benchmarks.ranks import LIMIT, SHARDED, Found

    # 500 parameters each.
    return [Found(2, 10, 1000, {LIMIT: [1.0, 1.0], SHARDED: each}, 2000, 2500, 2100, 4000, 0.5) for each in ms]


def test_several_processes_take_as_long_as_the_slowest_by_its_median() -> None:
    from benchmarks.ranks import LIMIT, SHARDED, Found, rows

    alone = [Found(1, 10, 1000, {LIMIT: [2.0, 2.0], SHARDED: [6.0, 6.0]}, 4000, 4000, 4200, 2000, 1.0)]
    shared = found_by_two([3.0, 3.0, 9.0], [1.0, 8.0, 2.0])
    made = {(row['size'], row['call']): row for row in rows({1: alone, 2: shared})}
    assert made[2, SHARDED]['ms'] == 3
    assert made[2, SHARDED]['faster'] == 2
    assert made[2, SHARDED]['ratio'] == 3
    assert (made[2, SHARDED]['lasting'], made[2, SHARDED]['peak']) == (0.5, 0.625)
    assert made[1, SHARDED]['lasting'] == made[1, SHARDED]['faster'] == 1
    assert 'lasting' not in made[2, LIMIT]


def test_a_projection_keeps_what_was_measured_apart_from_what_it_comes_to() -> None:
    from benchmarks.ranks import Rates, projection

    rates = Rates.of(found_by_two([3.0, 3.0], [1.0, 2.0]))
    assert rates == Rates(
        update_bytes_per_s=500 * 12 / 3e-3, lasting=4, peak=5, saved=4.2, save_bytes_per_s=4200, metadata=200
    )
    rows = projection(rates, processes=1000, parameters=2e9)
    kinds = [row['kind'] for row in rows]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {'measured', 'computed'}
    computed = {row['what']: (row['value'], row['unit']) for row in rows if row['kind'] == 'computed'}
    assert computed['parameters of a process'] == (2.0, 'M')
    assert computed['memory of the average'] == (8.0, 'MB')
    assert computed['an update'] == (pytest.approx(2e6 * 12 / 2e6 * 1e3), 'ms')
    assert computed['all files of a save'] == (pytest.approx(8.4), 'GB')
    assert computed['received if it were gathered'] == (8.0, 'GB')
    assert computed['.metadata of a save'] == (pytest.approx(723 * 1000 * 200 / 1e6), 'MB')


def test_host_writes_match_and_what_is_beyond_the_kernel(tmp_path) -> None:
    result = run('host', tmp_path / 'host.json', '--model', MODEL, '--rounds', '3')
    check_head(result, 'host')
    us = {row['call']: row['us'] for row in result['rows'] if row['size'] == 'one element'}
    assert result['summary']['match_us'] == us['match, all events']
    assert result['summary']['beyond_kernel_us'] == us['match and apply, whole batch'] - us['kernel calls']


@pytest.mark.slow
def test_memory_of_ours_is_the_shadow_hardly_more_no_peak_and_one_stash(tmp_path) -> None:
    result = run('memory', tmp_path / 'memory.json', '--models', MODEL, '--precision', 'fp32')
    check_head(result, 'memory')
    ours = next(row for row in result['rows'] if row['contestant'] == 'ours')
    # Beside the shadow, what small tensors are gathered into: at most 128 KiB each for parameters and buffers.
    assert 0 <= ours['lasting_mib'] - ours['weights_mib'] <= 0.25
    assert ours['update_peak_mib'] == 0
    assert ours['swap_peak_mib'] == pytest.approx(ours['weights_mib'])


def test_split_shows_the_share_of_each_number_of_ranks(tmp_path) -> None:
    result = run('split', tmp_path / 'split.json', '--models', MODEL, '--ranks', '1,2,4', '--rounds', '2')
    check_head(result, 'split')
    assert [row['ranks'] for row in result['rows']] == [1, 2, 4]
    for row in result['rows']:
        assert row['share'] == pytest.approx(1 / row['ranks'], abs=0.01)
        assert row['ms'] > 0


def test_bytes_are_counted_at_their_peak_and_at_the_end() -> None:
    from benchmarks.memory import allocated

    kept = []

    def call() -> None:
        temporary = torch.empty(1000, dtype=torch.uint8)
        kept.append(torch.empty(500, dtype=torch.uint8))
        del temporary

    assert allocated(call, torch.device('cpu')) == (500, 1500)


def test_every_contestant_that_is_installed_moves_its_average_part_of_the_way() -> None:
    from benchmarks import common, peers

    result = common.Result('none', torch.device('cpu'), Path('none'), {})
    for contestant in peers.CONTESTANTS:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        average = peers.build_one(contestant, model, result)
        if average is None:
            continue
        before = [tensor.detach().clone() for tensor in average.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        average.update()
        moved = [new.detach() - old for new, old in zip(average.parameters(), before, strict=True)]
        assert all(((step > 0) & (step < 1)).all() for step in moved), contestant.name
        if average.swap is not None:
            weights = [parameter.detach().clone() for parameter in model.parameters()]
            average.swap()
            assert all(map(torch.equal, weights, model.parameters())), contestant.name


def test_rounds_interleave_and_medians_are_those_of_the_rounds() -> None:
    from benchmarks.common import Sample, interleave, medians, ratio

    order = []
    times = iter(range(1, 100))

    def time_one(call) -> Sample:
        call()
        ms = float(next(times))
        return Sample(ms, ms)

    samples = interleave({name: lambda n=name: order.append(n) for name in 'ab'}, time_one, rounds=3)
    assert [sorted(order[i : i + 2]) for i in (0, 2, 4)] == [['a', 'b']] * 3
    assert medians([Sample(3, 1), Sample(1, 1), Sample(2, 1)])['ms'] == 2
    assert ratio([Sample(2, 0), Sample(9, 0), Sample(4, 0)], [Sample(1, 0), Sample(3, 0), Sample(1, 0)]) == 3
    assert all(len(taken) == 3 for taken in samples.values())


def test_a_timer_repeats_a_short_call_untimed_and_then_as_often_timed(monkeypatch) -> None:
    from benchmarks import common

    clock, calls = [0.0], []

    def call() -> None:
        calls.append(clock[0])
        clock[0] += 0.004 if len(calls) <= 3 else 0.002  # steady after three calls

    monkeypatch.setattr(common.time, 'perf_counter', lambda: clock[0])
    sample = common.Timer(torch.device('cpu'), 'itself')(call)
    assert len(calls) == 6
    assert sample.ms == pytest.approx(2)


def test_training_comes_before_every_call_that_is_timed_after_it() -> None:
    from benchmarks.common import Timer

    done = []
    timer = Timer(torch.device('cpu'), 'training', lambda: done.append('train'))
    for _ in range(2):
        timer(lambda: done.append('call'))
    assert done == ['train', 'call'] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='says what the GNU C library does')
def test_memory_costs_clean_pages_at_every_call_where_it_is_returned_and_none_where_it_is_kept() -> None:
    script = (
        'import ctypes, resource, statistics, torch\n'
        'from benchmarks import common\n'
        'c = ctypes.CDLL(None)\n'
        'c.malloc.restype = ctypes.c_void_p\n'
        'def pages(size=2**23):\n'
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    memory = ctypes.c_void_p(c.malloc(ctypes.c_size_t(size)))\n'
        '    c.memset(memory, 1, ctypes.c_size_t(size))\n'
        '    c.free(memory)\n'
        '    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n'
        'for heap in common.heaps(torch.device("cpu")):\n'
        '    common.set_heap(heap)\n'
        '    print(heap, statistics.median_low(pages() for _ in range(9)))\n'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    usual = {heap: int(count) for heap, count in (line.split() for line in done.stdout.splitlines())}
    assert usual['kept'] == 0
    assert usual['returned'] > 0


def test_tables_are_rich_on_a_terminal_and_markdown_elsewhere(monkeypatch, capsys) -> None:
    from benchmarks.common import show

    show('title', ['name', 'number'], [['one', 1234.5], ['none', None]])
    assert '| one  | 1,234.5 |' in capsys.readouterr().out
    pytest.importorskip('rich')
    monkeypatch.setenv('FORCE_COLOR', '1')
    show('title', ['name', 'number'], [['one', 1234.5]])
    assert '┃' in capsys.readouterr().out


def result_file(path, rows, **changes) -> str:
    content = {
        'benchmark': 'update', 'machine': {'cpu': 'x'}, 'versions': {'torch': '2'}, 'settings': {}, 'measures': ['ms'],
        'rows': rows, **changes,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return str(path)


def test_compare_prints_hand_computed_ratios_and_fails_above_the_bound(tmp_path, capsys) -> None:
    from benchmarks import compare

    before = result_file(
        tmp_path / 'a.json',
        [{'key': 'one', 'ms': 2.0, 'us': {'x': 1.0}}, {'key': 'two', 'ms': 4.0}, {'key': 'gone', 'ms': 1.0}],
    )
    after = result_file(
        tmp_path / 'b.json',
        [{'key': 'one', 'ms': 1.0, 'us': {'x': 3.0}}, {'key': 'two', 'ms': 6.0}],
        versions={'torch': '3'},
    )
    assert compare.main([before, after]) == 0
    printed = capsys.readouterr().out
    assert 'only in the first file: gone' in printed
    assert 'torch was 2, is 3' in printed
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in printed.splitlines()]
    assert ['one', 'ms', '2.000', '1.000', '0.500'] in cells
    assert ['two', 'ms', '4.000', '6.000', '1.500'] in cells
    assert 'geometric mean 0.866, largest 1.500' in printed

    assert compare.main([before, after, '--fail-above', '1.5']) == 0
    assert compare.main([before, after, '--fail-above', '1.4']) == 1
    assert compare.main([before, after, '--measure', 'us', '--fail-above', '2.9']) == 1
    assert compare.main([before, after, '--measure', 'absent']) == 2
    other = result_file(tmp_path / 'c.json', [], benchmark='step')
    assert compare.main([before, other]) == 2


def test_reconstruct_measures_ours_beside_every_method_and_ours_is_nearest(tmp_path, capsys) -> None:
    from benchmarks import reconstruct

    result = run('reconstruct', tmp_path / 'reconstruct.json', '--steps', '160', '--files', '8')
    check_head(result, 'reconstruct')
    errors: dict[str, dict[str, float]] = {}
    for row in result['rows']:
        errors.setdefault(row['contestant'], {})[row['target']] = row['error_percent']
    ours = errors['ours, snapshots']
    assert len(ours) == len(reconstruct.TARGETS)
    assert ours['sigma 0.25'] < 2
    for contestant in ('continuous time, appendix C', 'shares, step by step', 'LAWA, best number of checkpoints'):
        assert ours['sigma 0.25'] < errors[contestant]['sigma 0.25'] / 3
    assert all(row['disk_kib'] > 0 for row in result['rows'])
    measured = any(contestant.startswith(reconstruct.PEER) for contestant in errors)
    assert measured != any(entry['name'] == reconstruct.PEER for entry in result['missing'])
    assert 'ours, snapshots in float32' in capsys.readouterr().out
