"""What a data module keeps in checkpoints, so that a resumed run goes on with the next batch."""

import pytorch_lightning as pl

from nmlightning.datamodules.training_batches import OrderState, ResumableOrder


class ResumableData(pl.LightningDataModule):
    """A data module with which a resumed run goes on with the order that it began.

    Within an epoch that is with the very next batch. Lightning's checkpoint holds how many batches
    of the epoch are done, and the state of this module what their order follows from.

    Attributes:
        sampler: of the latest training loader, by which each sets it.
        interrupted: the state of the sampler of the run that is resumed, if any.
    """

    sampler: ResumableOrder | None = None
    interrupted: OrderState | None = None

    def state_dict(self) -> OrderState:
        """Return the seed of the order, what the data are and how they are batched."""
        return self.sampler.state_dict() if self.sampler else {}

    def load_state_dict(self, state_dict: OrderState) -> None:
        """Let the next training loader go on with the order of the run that was interrupted."""
        self.interrupted = dict(state_dict)

    def teardown(self, stage: str) -> None:
        """Forget the interrupted run: the next one may be another."""
        self.interrupted = None
