"""Learning-rate schedule: linear warm-up, then step decay."""


def lr_at(
    step: int, *, steps_per_epoch: int, peak: float, warmup_steps: int, decay_factor: float, decay_epochs: int
) -> float:
    """Learning rate of optimiser step `step` (the first step is 0).

    Warm-up: peak * (step + 1) / warmup_steps, so that the first step already moves. The decay counts
    epochs from the start of training: times decay_factor after every `decay_epochs` epochs.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    n_decays = step // (steps_per_epoch * decay_epochs)
    return peak * warmup * decay_factor**n_decays


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of a moving average of weights at a step, counted from 0.

    It rises as (1 + step) / (10 + step), the ramp of TensorFlow's ExponentialMovingAverage: the average always spans
    the last tenth or so of the steps, so that the first weights, which are far off, are forgotten.
    """
    return min(decay, (1 + step) / (10 + step))
