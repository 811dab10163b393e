"""Scores of finished runs on disk: each written once it is known, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mtl.transfer.configuration import digest

Scores = dict[str, float]


class ScoreCache:
    """A folder with one JSON file for each finished run, named by the run's configuration.

    A file comes into being under its name at once, with all it holds: an interrupted run, or one that is killed while
    it writes, leaves none.

    Args:
        folder: Made when the first score is written. Processes on several machines must share it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = ScoreCache(folder)
        ...     cache.write({"task": "age", "seed": 0}, {"loss": 0.5})
        ...     cache.read({"task": "age", "seed": 0}), cache.read({"task": "age", "seed": 1})
        ({'loss': 0.5}, None)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, described: Mapping[str, Any]) -> Path:
        """The file of a configuration."""
        return self.folder / f"{digest(described)}.json"

    def read(self, described: Mapping[str, Any]) -> Scores | None:
        """The scores of the run with this configuration, or None.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path(described)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {str(metric): float(value) for metric, value in content["scores"].items()}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no file of scores ({error}); delete it to have the run repeated.") from error

    def write(self, described: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Keep a run's scores, with what it depended on beside them for people to read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"configuration": dict(described), "scores": dict(scores)}, indent=1, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix="unfinished-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path(described))
        finally:
            Path(temporary).unlink(missing_ok=True)
