import pytest
import torch

from millrace.engine.encoders.side_stream import SideStream, use_after


def test_on_a_cpu_work_is_done_in_place():
    side = SideStream(torch.device("cpu"))
    x = torch.ones(3)
    with side.after_current([x]):
        y = x + 1
    with side.at_once():
        z = x + 2
    assert side.event() is None
    use_after(side.event(), [y, z])
    side.join()
    assert y.tolist() == [2.0] * 3
    assert z.tolist() == [3.0] * 3


@pytest.mark.cuda
def test_results_are_there_when_they_are_used_and_stay_until_they_were():
    device = torch.device("cuda")
    side = SideStream(device)
    slow = torch.randn(2048, 2048, device=device) / 2048**0.5
    for i in range(20):
        with side.at_once():
            x = torch.full((1 << 20,), float(i), device=device)
            y = slow
            for _ in range(4):
                y = y @ slow
            x = x + 0 * y.sum()
        ready = side.event()
        use_after(ready, [x])
        for _ in range(4):
            slow @ slow
        total = x.sum()
        del x  # its memory may be handed out again only after the sum has read it
        with side.at_once():
            torch.full((1 << 20,), float("nan"), device=device)
        assert float(total) == i * (1 << 20)
