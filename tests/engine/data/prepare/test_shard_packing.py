import numpy as np
import pytest

from millrace.engine.data.prepare.inputs import find_inputs
from millrace.engine.data.prepare.parts import data_path, do_part
from millrace.engine.data.prepare.shard_packing import done_path, load_shard, make_shard, plan_shards
from millrace.engine.data.reject_reasons import Reason


@pytest.fixture
def parts(tmp_path, bad, settings):
    """Parts and files of two tars with wide, high and square pictures; the second one has a key twice."""
    for name in ("a", "b"):
        tar = bad.TarBuilder(tmp_path / "in" / f"{name}.tar")
        for i, size in enumerate([(80, 40), (40, 80), (40, 40)] * 2):
            tar.sample(f"{i}", bad.jpeg(*size, seed=i))
        if name == "b":
            tar.sample("0", bad.jpeg(40, 80))
        tar.close()
    (tmp_path / "parts").mkdir()
    found = find_inputs(tmp_path / "in", settings)
    done = [do_part(part, tmp_path / "parts", settings, lambda *_: None) for part in found.parts]
    for number, part in enumerate(done):
        part.rows["file"] = number
    return done, [data_path(tmp_path / "parts", part.key) for part in found.parts]


def test_samples_go_to_their_buckets_in_order(parts, settings):
    plan = plan_shards(*parts, settings)
    assert [(reject.key, reject.reason) for reject in plan.duplicates] == [("b.tar/0", Reason.DUPLICATE_KEY)]
    assert [(shard.bucket, shard.number, shard.first) for shard in plan.shards] == [
        ((24, 48), 0, 0),
        ((32, 32), 0, 4),
        ((48, 24), 0, 8),
    ]
    for shard in plan.shards:
        assert shard.rows["file"].tolist() == [0, 0, 1, 1]
        assert (np.diff(shard.rows["offset"][:2]) > 0).all()
    assert len(plan.rows) == 12
    rows = np.concatenate([part.samples for part in parts[0]])
    assert (rows[plan.kept][plan.order] == plan.rows).all()


def test_a_shard_is_made_once(tmp_path, parts, settings):
    plan = plan_shards(*parts, settings).shards[1]
    (tmp_path / "done").mkdir()
    where = tmp_path / "out", tmp_path / "done"
    assert load_shard(plan, *where) is None
    counts, files = [], dict(enumerate(parts[1]))
    shard = make_shard(plan, where[0], files, where[1], lambda *n: counts.append(n))
    assert counts == [(1, 0)] * 4
    assert load_shard(plan, *where) == shard
    tar = where[0] / shard.file
    tar.write_bytes(tar.read_bytes()[:-1])
    assert load_shard(plan, *where) is None
    again = make_shard(plan, where[0], files, where[1], lambda *_: None)
    assert again == shard
    done_path(plan, where[1]).write_text("{")
    assert load_shard(plan, *where) is None
