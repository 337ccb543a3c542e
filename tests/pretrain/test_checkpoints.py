"""Checkpoints under faults: damage, a full disk, a folder that cannot be written."""

import errno
import os

import pytest
import torch
from pretrain import checkpoints
from pretrain.checkpoints import Checkpoints, write_atomically
from pretrain.errors import UserError


def state(step):
    return {"step": step, "weights": torch.full((1000,), float(step))}


@pytest.fixture
def saved(tmp_path):
    files = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 10):
        files.save(step, state(step))
    return files


def test_the_last_ones_are_kept(saved):
    """Guards against a full folder, and the wrong ones removed: 10 comes after 2."""
    assert saved.steps() == [2, 10]
    assert len(list(saved.folder.iterdir())) == 2
    loaded = saved.load_newest(pytest.fail)
    assert loaded["step"] == 10
    assert torch.equal(loaded["weights"], state(10)["weights"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other"])
def test_damaged_ones_are_passed_over(saved, damage):
    """Guards against a damaged checkpoint loaded, or one that hides the sound one before it."""
    path = saved.path(10)
    content = bytearray(path.read_bytes())
    position = content.find(torch.full((8,), 10.0).numpy().tobytes()) + 100
    content[position] ^= 1
    damaged = {"flip": content, "truncate": content[: len(content) // 2], "empty": b"", "other": b"hello"}[
        damage
    ]
    path.write_bytes(damaged)
    said = []
    assert saved.load_newest(said.append)["step"] == 2
    assert len(said) == 1
    assert str(path) in said[0]
    saved.path(2).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        saved.load_newest(said.append)


def test_no_checkpoint_yet(tmp_path):
    """Guards against an error for a run that was killed before its first checkpoint."""
    assert Checkpoints(tmp_path / "none", keep=1).load_newest(pytest.fail) is None


def test_full_disk(saved, monkeypatch):
    """Guards against an older checkpoint lost to one that does not fit, and half a file left in its place."""

    class Full:
        def __init__(self, file):
            self.file = file
            self.written = 0

        def write(self, data):
            self.written += len(data)
            if self.written > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    save = torch.save
    monkeypatch.setattr(checkpoints.torch, "save", lambda value, file: save(value, Full(file)))
    with pytest.raises(UserError, match=r"No space left on device \(that of step 10 is whole\)"):
        saved.save(11, state(11))
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-000002.pt", "step-000010.pt"]
    assert saved.load_newest(pytest.fail)["step"] == 10


def test_a_folder_that_cannot_be_made(tmp_path):
    """Guards against a traceback where the path is no folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1).save(1, state(1))


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    """Guards against half a file under the final name, whatever stops the writing."""
    path = tmp_path / "x"
    write_atomically(path, lambda file: file.write(b"before"))

    def stopped(file):
        file.write(b"after")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, stopped)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
