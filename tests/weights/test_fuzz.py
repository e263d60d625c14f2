"""Weight files made wrong by the hundred (``fuzz.py``): each is read, or refused with a sentence that names it, within limits of time and memory.

``FEWSTEP_SR_FUZZ=10000`` reads as many; docs/reliability.md has what came of it.
"""

import os

import fuzz
import limits
import pytest

COUNT = int(os.environ.get("FEWSTEP_SR_FUZZ") or 300)


@pytest.mark.slow
@limits.forks
def test_broken_files():
    results = fuzz.in_parallel(0, COUNT, seed=0, jobs=min(2, os.cpu_count() or 1))
    assert [result["number"] for result in results] == list(range(COUNT))
    findings = [f"{result['number']} {result['file']} {result['result']}" for result in results if result["result"] not in ("loaded", "refused")]
    assert not findings, "\n".join([*findings[:20], fuzz.summary(results)])
    kinds = {(result["kind"], result["result"]) for result in results}
    assert COUNT < 300 or len(kinds) == 8, "some kind of file was never read, or never refused"


def test_a_number_gives_the_same_file(tmp_path):
    """So that a finding can be repeated."""
    for number in range(40):
        kind, path = fuzz.write(tmp_path, number)
        first = path.read_bytes()
        assert fuzz.write(tmp_path, number) == (kind, path) and path.read_bytes() == first


@limits.forks
def test_findings_are_found():
    """The limits mean something: what hangs, dies or takes memory is told apart from what is refused."""
    assert limits.outcome(lambda: (_ for _ in ()).throw(ValueError("a")))[0] == "ValueError: a"
    assert limits.outcome(lambda: __import__("time").sleep(9), seconds=0.5)[0] == "hang"
    assert limits.outcome(lambda: os._exit(1))[0] == "died"
    text, grown = limits.outcome(lambda: len(b"\1" * (100 << 20)))  # zeros would not be in memory yet
    assert text == f"returned: {100 << 20}" and 90 << 20 <= grown < 150 << 20
