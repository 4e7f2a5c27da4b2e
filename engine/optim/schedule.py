"""Learning-rate schedule: a pure function of the step, so that resuming needs no state."""

import math

from millrace.engine.config import Schedule


def learning_rate(step: int, peak: float, config: Schedule, steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of a run of `steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup` - 1; decays reach `final * peak` at the last.
    """
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.kind == "constant":
        return peak
    start = config.warmup if config.kind != "wsd" else max(config.warmup, steps - round(config.decay * steps))
    progress = min(max((step - start + 1) / max(steps - start, 1), 0.0), 1.0)
    if config.kind == "cosine":
        return peak * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - (1 - config.final) * progress)
