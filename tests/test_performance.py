"""The performance notebook's module on a table that can be checked by hand, and the committed measurements: whole, of one machine, with the cases that the bars need."""
import pandas as pd
import pytest
from mgsr_nb.files import project_root
from mgsr_nb.run.performance import BARS, against, bars, measured

PARTS = ('loss', 'growth', 'scrg', 'step')

def write(folder, part, **seconds):
    pd.DataFrame([dict(case=c, seconds_median=s, peak_mb=10 * s) for c, s in seconds.items()]).to_csv(folder/f'{part}.csv', index=False)

def test_a_bar_is_a_ratio_of_sums(tmp_path):
    write(tmp_path, 'loss', mgsr=1.2, dense_forward_kl=1., liger_jsd=2.)
    write(tmp_path, 'scrg', generate=2., generate_and_scrg=6., score=1.)
    write(tmp_path, 'step', floor_student=1., floor_teacher=.5, floor_decode=1.5, kd=2., mgsr=6., mgsr_off_policy_replay=3., gkd_without_nll=3.)
    found = bars(tmp_path)
    assert list(found.measured[:6].round(6)) == [.6, 1.2, 1.2, 2.5, 1.5, 1.5] and pd.isna(found.measured.iloc[6])
    assert list(found.reached) == [True, True, False, False, True, False, None]

def test_what_was_not_measured_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match='make performance'): measured('loss', tmp_path)

@pytest.mark.parametrize('part', PARTS)
def test_the_committed_measurements_are_whole(part):
    table = measured(part)
    assert table[['machine', 'torch', 'threads', 'device']].drop_duplicates().shape[0] == 1 and (table.seconds_median > 0).all() and table.seconds_min.le(table.seconds_median).all()
    for _, of, cases, bases, column, _ in BARS:
        if of == part: assert against(table, cases, bases, column) > 0

def test_the_committed_profile_is_of_the_same_size_as_the_measurements():
    table, loss = measured('profile'), measured('loss')
    assert {'mgsr', 'dense_forward_kl'} <= set(table.index) and (table.seconds > 0).all()
    assert (table[['N', 'V', 'H', 'threads', 'torch']].drop_duplicates().values == loss[['N', 'V', 'H', 'threads', 'torch']].drop_duplicates().values).all()
