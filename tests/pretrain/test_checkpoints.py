"""Checkpoints under faults: damage, a full disk, a folder that cannot be written."""

import errno
import os

import pytest
import torch
from pretrain import checkpoints
from pretrain.checkpoints import Checkpoints
from pretrain.errors import UserError
from pretrain.files import write_atomically


def state(step):
    return {"step": step, "model": torch.full((1000,), float(step)), "optimizer": {}}


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
    assert torch.equal(loaded["model"], state(10)["model"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other", "other archive"])
def test_damaged_ones_are_passed_over(saved, damage):
    """Guards against a damaged checkpoint loaded, kept in the place of sound ones, or lost."""
    path = saved.path(10)
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((8,), 10.0).numpy().tobytes()) + 100] ^= 1
    if damage == "other archive":
        torch.save({"x": 1}, path)
    else:
        path.write_bytes({"flip": content, "truncate": content[:2000], "empty": b"", "other": b"hi"}[damage])
    left = path.read_bytes()
    said = []
    assert saved.load_newest(said.append)["step"] == 2
    assert len(said) == 1
    assert str(path) in said[0]
    assert path.with_suffix(".damaged").read_bytes() == left
    saved.save(3, state(3))
    assert saved.steps() == [2, 3]
    assert saved.load_newest(pytest.fail)["step"] == 3


def test_none_sound(saved):
    """Guards against a run begun anew, and files renamed that somebody may still mend."""
    for step in saved.steps():
        saved.path(step).write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* can be read .*step-000010\.pt.*step-000002\.pt"
    ):
        saved.load_newest(pytest.fail)
    assert saved.steps() == [2, 10]


def test_what_a_killed_process_left(saved):
    """Guards against a disk that fills with halves of checkpoints."""
    (saved.folder / ".step-000011.pt.tmp").write_bytes(b"half")
    saved.load_newest(pytest.fail)
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-000002.pt", "step-000010.pt"]


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
    with pytest.raises(UserError, match=r"No space left on device \(that of step 10 is whole; "):
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
