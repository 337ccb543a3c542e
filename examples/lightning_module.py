"""Trains the byte-level Transformer of replace_adamw.py with Lightning; `configure_optimizers` is all that differs
from a module with AdamW."""

import argparse
import inspect

import lightning
import torch
from replace_adamw import Block
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import galore_rrf


class LanguageModel(lightning.LightningModule):
    def __init__(self, width: int = 128, rank: int = 16, lr: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Embedding(256, width), Block(width), Block(width), nn.Linear(width, 256)
        )

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = cross_entropy(self.layers(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        groups = galore_rrf.param_groups(self, rank=self.hparams.rank)
        opt = galore_rrf.GaLoreAdamW(groups, lr=self.hparams.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def windows(length: int = 64) -> list[torch.Tensor]:
    """The source text of argparse as bytes, cut into sequences one byte longer than `length`."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    return list(text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1))


if __name__ == "__main__":
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    model = LanguageModel()
    trainer.fit(model, DataLoader(windows(), batch_size=16, shuffle=True))
    state = galore_rrf.state_bytes(trainer.optimizers[0])
    print(f"loss {trainer.callback_metrics['loss']:.3f}, optimizer state {state:,} bytes")
