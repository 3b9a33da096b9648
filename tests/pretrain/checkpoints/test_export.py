"""An export of a run that has not finished is refused in one line, whatever status.json holds."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoints import export
from pretrain.errors import UserError


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"done"', b"\xff", b"[" * 100_000])
def test_a_damaged_status_is_one_line_that_names_the_checkpoint(tmp_path: Path, content: bytes) -> None:
    checkpoint = tmp_path / "checkpoints/step-0000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        export.check_finished(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/status.json does not say whether the run is finished: ")
    assert message.endswith(f"; its newest checkpoint can be exported by name: {checkpoint}")
    assert "\n" not in message


def test_only_a_finished_run_is_exported(tmp_path: Path) -> None:
    export.check_finished(tmp_path)  # a checkpoint or a published model has no status
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopped", "step": 3, "why": "stopped by SIGTERM"}))
    with pytest.raises(UserError, match=r"is not finished \(stopped at step 3, stopped by SIGTERM\)$"):
        export.check_finished(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"state": "done", "step": 3}))
    export.check_finished(tmp_path)
