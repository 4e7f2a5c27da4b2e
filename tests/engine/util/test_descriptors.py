"""The soft limit of open files."""

import subprocess
import sys

CODE = """
import resource
from millrace.engine.util.descriptors import MOST, raise_limit
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, min(hard, 500) if hard > 0 else 500))
assert raise_limit() == 500
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (500, 500)
assert raise_limit() == 500
"""


def test_it_is_raised_to_the_hard_one():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
