"""What does each executor stop? Makes every attempt of the escape suite here and writes the table of docs/executors.md.

Needs root, podman with a runtime, and bubblewrap; about half a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "security"))

import escape_kit as kit  # noqa: E402

from potluck.worker.jobs import executors  # noqa: E402

PAGE = ROOT / "docs" / "executors.md"
MEASURED = ("process", "bubblewrap", "podman")


def main() -> int:
    found = {one.name: one for one in executors.found()}
    missing = [f"{name}: {found[name].reason}" for name in MEASURED if not found[name].works]
    if missing or not kit.is_root():
        print("the table needs root and all of them working here:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    results: dict[str, dict[str, bool]] = {}

    def attempt_all() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in MEASURED:
                results[name], _ = kit.measure(executors.ALL[name], Path(folder) / name / "home")

    kit.in_own_network(attempt_all)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(kit.BEGIN)
    _, _, after = rest.partition(kit.END)
    PAGE.write_text(f"{before}{kit.BEGIN}\n{kit.table(results)}\n{kit.END}{after}", encoding="utf-8")
    print(f"{PAGE}: {sum(map(len, results.values()))} attempts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
