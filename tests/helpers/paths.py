"""Where the repository's folders are, so that a test that moves still finds them."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
TINY_K2 = ROOT / "assets" / "tiny-k2"
