import json

from millrace.engine.data.reject_reasons import Reason, Reject


def test_names_are_those_that_files_have():
    """Other programs read them: a new reason may come, but none may be renamed."""
    known = (
        "missing_caption empty_caption ambiguous_caption caption_not_utf8 caption_not_json caption_not_text "
        "caption_too_long missing_picture empty_picture corrupt_picture unsupported_format animated "
        "decompression_bomb picture_too_large too_small duplicate_key unsafe_name special_file "
        "unreadable_file truncated_tar corrupt_tar corrupt_parquet"
    )
    assert set(known.split()) <= {str(reason) for reason in Reason}
    reject = Reject("a", Reason.ANIMATED, "b")
    assert json.dumps(reject._asdict()) == '{"key": "a", "reason": "animated", "detail": "b"}'


def test_only_small_pictures_are_not_bad():
    assert [reason for reason in Reason if not reason.is_bad] == [Reason.TOO_SMALL]
