import replay
import torch
from lightning.pytorch.callbacks import Callback

from grpo_lightning.callbacks.gradient_norm import GradientNorm


class Logged(Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.ends_update:
            self.norms.append(float(trainer.callback_metrics["policy/gradient_norm"]))


def test_it_is_the_norm_of_the_accumulated_gradient_before_the_clip():
    logged = Logged()
    record, _ = replay.run(accumulate=2, iterations=3, callbacks=(GradientNorm(), logged), gradient_clip_val=1e-3)
    assert len(logged.norms) == 3
    expected = torch.tensor([float(gradient.norm()) for gradient in record.gradients])
    assert expected.min() > 1e-3  # so that the clip has something to do
    # Lightning keeps logged values in fp32.
    torch.testing.assert_close(torch.tensor(logged.norms), expected, rtol=1e-6, atol=0.0)
