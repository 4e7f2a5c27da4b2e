"""Crash loops end."""

import pytest

from millrace.engine.run_log.failures import DEATHS, NAME, START, TIMES, Failures
from millrace.engine.util.errors import FailedElsewhere, UserError


def fail(folder, config="a", where="after step 17", text="out of memory at 0x7f3a, 1024 bytes"):
    Failures(folder, config).note(where, RuntimeError(text))


def test_the_same_failure_again_and_again(tmp_path):
    for number in range(TIMES):
        Failures(tmp_path, "a").refuse_loop()
        fail(tmp_path, text=f"out of memory at 0x{number}, {number} bytes\nand more")
    with pytest.raises(UserError, match=r"3 starts in a row failed after step 17 .*RuntimeError: out of"):
        Failures(tmp_path, "a").refuse_loop()


@pytest.mark.parametrize("other", [{"where": "after step 18"}, {"text": "Connection reset"}])
def test_another_step_or_another_failure_counts_anew(tmp_path, other):
    fail(tmp_path)
    fail(tmp_path)
    fail(tmp_path, **other)
    Failures(tmp_path, "a").refuse_loop()


def test_another_configuration_is_tried(tmp_path):
    for _ in range(TIMES):
        fail(tmp_path)
    Failures(tmp_path, "b").refuse_loop()
    fail(tmp_path, "b")
    Failures(tmp_path, "b").refuse_loop()


def test_what_a_user_gave_is_not_counted_at_the_start(tmp_path):
    for _ in range(TIMES):
        Failures(tmp_path, "a").note(START, UserError("no such folder"))
    Failures(tmp_path, "a").refuse_loop()


def test_a_good_end_forgets(tmp_path):
    for _ in range(TIMES):
        fail(tmp_path)
    Failures(tmp_path, "a").forget()
    Failures(tmp_path, "a").refuse_loop()


def test_only_the_first_rank_of_an_attempt_counts(tmp_path):
    first, second = Failures(tmp_path, "a"), Failures(tmp_path, "a")
    first.note("after step 17", ValueError("bad"))
    second.note("after step 17", RuntimeError("connection closed by peer"))
    second.note("after step 17", FailedElsewhere("bad"))
    assert "ValueError" in (tmp_path / NAME).read_text()


def test_deaths_behind_one_checkpoint(tmp_path):
    for _ in range(DEATHS):
        Failures(tmp_path, "a").refuse_loop()
        Failures(tmp_path, "a").note_death(saved=300)
    with pytest.raises(UserError, match=r"5 starts in a row failed behind the checkpoint of step 300 .*died"):
        Failures(tmp_path, "a").refuse_loop()


def test_a_new_checkpoint_between_deaths_counts_anew(tmp_path):
    for number in range(3 * DEATHS):
        Failures(tmp_path, "a").note_death(saved=300 + 100 * (number // (DEATHS - 1)))
        Failures(tmp_path, "a").refuse_loop()
