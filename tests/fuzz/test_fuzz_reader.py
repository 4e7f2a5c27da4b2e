from millrace.engine.data import names
from tests.fuzz.fuzz_reader import ReaderFuzzer
from tests.fuzz.fuzz_shards import fuzz


def test_five_seconds_of_odd_input_bring_samples_or_one_reason(capsys):
    assert fuzz(5, seed=1, kind=ReaderFuzzer) == 0
    out = capsys.readouterr().out
    for outcome in ("caption read", "caption caption_not_json", "folder sample", "tar sample", "file read"):
        assert outcome in out


def test_files_that_vanish_unsaid_are_found(capsys, monkeypatch):
    monkeypatch.setattr(names, "OTHER_PICTURES", frozenset())
    monkeypatch.setattr(names.Counter, "total", lambda _self: 0)
    assert fuzz(60, seed=1, kind=ReaderFuzzer) == 1
    assert "are not accounted for" in capsys.readouterr().out
