import logging

from millrace.engine.util.quiet_imports import quiet_imports


def test_warnings_inside_are_left_out_and_errors_are_not(caplog):
    logger = logging.getLogger("another.package")
    with quiet_imports():
        logger.warning("deprecated")
        logger.error("broken")
    logger.warning("after")
    assert [record.message for record in caplog.records] == ["broken", "after"]
