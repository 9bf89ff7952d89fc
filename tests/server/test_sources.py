"""Where a mask's file can come from, without an engine."""

from pathlib import Path

import pytest

from server.errors import UnwritableFolder
from server.sources import landing


def test_a_folder_that_takes_no_file_for_whatever_reason_is_said_to_be_so(tmp_path: Path):
    with (
        pytest.raises(
            UnwritableFolder, match="No such file or directory: the masks folder cannot be written"
        ),
        landing(tmp_path / "gone", 10),
    ):
        pass
