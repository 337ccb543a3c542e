"""examples/lightning_module.py in the Trainer of Lightning, against a loop by hand."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_module import LanguageModel, windows
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import same

from galore_rrf import GaLoreAdamW

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning:lightning",  # of torch, to Lightning
    "ignore:.*does not have many workers",
    "ignore:Checkpoint directory .* is not empty",
)

STEPS, ACCUMULATE, BATCH, CLIP, LR = 14, 2, 4, 0.1, 0.01


def module(seed=0):
    lightning.seed_everything(seed, verbose=False)
    return LanguageModel(width=32, rank=4, lr=LR)


def batches():
    """Those of an epoch, half of the training."""
    return DataLoader(windows(length=16)[: STEPS // 2 * ACCUMULATE * BATCH], batch_size=BATCH)


def fit(model, folder, **options):
    """The optimizer of a training; checkpoints lie in `folder` by their epochs."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,  # by max_steps Lightning 2.6 takes a batch twice when it resumes
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        callbacks=[ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches(), **options)
    return trainer.optimizers[0]


def test_lightning_trains_as_a_loop_by_hand(tmp_path):
    """Guards against closures, accumulation, clipping or schedules that do not reach the optimizer as they do in
    a loop."""
    found, expected = module(), module()
    fit(found, tmp_path)

    named = dict(expected.named_parameters())
    inside = [p for n, p in named.items() if p.dim() == 2 and (".attn." in n or ".mlp." in n)]
    outside = [p for p in named.values() if all(p is not q for q in inside)]
    opt = GaLoreAdamW([{"params": inside, "rank": 4}, {"params": outside}], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    for i, batch in enumerate([*batches(), *batches()]):
        loss = cross_entropy(expected.layers(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        (loss / ACCUMULATE).backward()
        if i % ACCUMULATE == ACCUMULATE - 1:
            assert torch.nn.utils.clip_grad_norm_([*inside, *outside], CLIP) > CLIP
            opt.step()
            opt.zero_grad()
            schedule.step()
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_resumed_training_is_the_same_to_the_bit(tmp_path):
    """Guards against state that a checkpoint of Lightning loses, or that only an unsafe load takes, before a
    refresh."""
    whole, resumed = module(), module(seed=5)
    opt = fit(whole, tmp_path)
    opt_resumed = fit(resumed, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(opt_resumed.state_dict(), opt.state_dict())
