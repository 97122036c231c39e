"""A default of the configuration changes together with the version of a stage.

Keys of artifacts are made of the values that differ from the defaults (`QuantConfig.chosen`). A new
field therefore leaves them as they are, and so would a changed default, which changes numbers.

    python tests/test_defaults.py --write    after the version of the stage was raised
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from questlib import QuantConfig
from questlib.versions import STAGE_VERSIONS

GOLDEN = Path(__file__).with_name("golden_defaults.json")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = prefix + name
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def changed(golden: dict[str, Any], defaults: dict[str, Any], versions: dict[str, int]) -> list:
    """Fields whose default is another one, where no version was raised."""
    if versions != golden["versions"]:
        return []
    old = golden["defaults"]
    return [name for name, value in defaults.items() if name in old and old[name] != value]


def now() -> dict[str, Any]:
    return {"versions": STAGE_VERSIONS, "defaults": flat(QuantConfig().to_dict())}


def test_a_default_changes_with_a_version():
    golden = json.loads(GOLDEN.read_text())
    found = changed(golden, now()["defaults"], STAGE_VERSIONS)
    assert not found, f"raise the version of the stage in questlib/versions.py: {found}"


def test_new_versions_are_written():
    golden = json.loads(GOLDEN.read_text())
    assert golden["versions"] == STAGE_VERSIONS, "run python tests/test_defaults.py --write"


def test_a_changed_default_is_found_and_a_new_field_is_none():
    golden = {"versions": {"ranges": 1}, "defaults": {"seed": 0, "ranges.range_norm": 2.0}}
    other = {"seed": 0, "ranges.range_norm": 2.4, "new": 1}
    assert changed(golden, other, {"ranges": 1}) == ["ranges.range_norm"]
    assert changed(golden, other, {"ranges": 2}) == []


def test_keys_are_made_of_what_was_chosen():
    assert QuantConfig(weight_bits=4).hash() == QuantConfig().hash()
    assert QuantConfig(weight_bits=8).hash() != QuantConfig().hash()
    assert QuantConfig(range_norm=2.4).chosen() == {"ranges": {"range_norm": 2.4}}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_defaults.py --write")
    GOLDEN.write_text(json.dumps(now(), indent=1) + "\n")
