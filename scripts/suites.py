"""The test verb: each suite in a pytest process of its own, then one closing line for all of them.

They cannot share a process: with the host on the path `nodes` is the host's module, and a process holds one host.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from console import SetupError, say
from environment import writable
from hosts import ROOT, Host, others
from processes import run_to_its_end

SUITES = ("pure", "host", "e2e")
REPORTS = ROOT / "test-results"
NOTHING_COLLECTED = 5
BY_FILE = ("--dist", "loadfile", "--no-loadscope-reorder")
"""How tests are handed to workers: in order, so that a file of few and long tests is not left for the end."""
WORKER_GIB = 8
"""Memory of the machine that a worker process may count on."""


def workers() -> int:
    """How many processes share a suite: one a core, as a test takes one, and no more than fit into memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / WORKER_GIB), 8))


@dataclass
class Tally:
    """What the suites came to."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def closing_line(self) -> str:
        """The last line of a run."""
        return f"{self.passed} passed, {self.failed} failed, {self.skipped.total()} skipped"

    def read(self, report: Path, code: int, suite: str) -> None:
        """Add a pytest process: its junit report and its exit code. A crash counts as a failure."""
        failures_before = self.failed
        for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failed += 1
            elif skipped is not None:
                self.skipped[f"{suite}: {skipped.get('message', '')}"] += 1
            else:
                self.passed += 1
        if code not in (0, NOTHING_COLLECTED) and self.failed == failures_before:
            say(f"FAILED: pytest ended with exit code {code} in {suite}, with no failed test to show for it")
            self.failed += 1


@dataclass(frozen=True)
class Suite:
    """One pytest process: what to collect, with which Python and host. workers: processes that share its files."""

    title: str
    paths: tuple[str, ...]
    python: Path
    host: Host | None = None
    workers: int = 1

    def run(self, options: Sequence[str], tally: Tally) -> None:
        """Run it and add its results to `tally`."""
        report = REPORTS / f"{self.title.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"}
        if self.host is not None:
            environment["COMFYUI_PATH"] = str(self.host.path)
        say(f"\n== {self.title} ==")
        arguments = ["-n", str(self.workers), *BY_FILE] if self.workers > 1 else []
        arguments += [f"--junitxml={report}", *self.paths, *options]
        command = [str(self.python), "-m", "pytest", "-q", "-rs", *arguments]
        code = run_to_its_end(command, cwd=ROOT, env=environment)
        tally.read(report, code, self.title)


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Sort pytest arguments into paths by suite, and options; without any path every suite runs whole."""
    chosen: dict[str, list[str]] = {}
    options: list[str] = []
    for argument in arguments:
        parts = Path(argument.split("::")[0]).parts
        suites = [name for name in SUITES if parts[:2] == ("tests", name)] if parts[:1] == ("tests",) else []
        if parts == ("tests",):
            suites = list(SUITES)
        for name in suites:
            chosen.setdefault(name, []).append(argument if len(parts) > 1 else f"tests/{name}")
        if not suites:
            options.append(argument)
    if not chosen:
        chosen = {name: [f"tests/{name}"] for name in SUITES}
    return {name: tuple(chosen[name]) for name in SUITES if name in chosen}, options


def further_hosts(main: Host, cache: Path, tally: Tally) -> list[tuple[Host, Path]]:
    """The other hosts of the matrix with their interpreters; what is absent or cannot be built is skipped aloud."""
    if main.asked_for or main.in_place:
        return []
    ready = []
    for host in others(cache):
        try:
            ready.append((host, host.python(cache)))
        except SetupError as error:
            say(f"SKIPPED: no environment for the host {host.version}. {error}")
            tally.skipped[f"host {host.version}: its environment could not be built"] += 1
    if not others(cache):
        say(f"SKIPPED: no second host in {cache / 'hosts'} (unpack another ComfyUI there as <version>/ to test it)")
        tally.skipped[f"no second host in {cache / 'hosts'}"] += 1
    return ready


def run_tests(main: Host, cache: Path, arguments: Sequence[str]) -> int:
    """Every suite that the arguments ask for; 0 when nothing failed."""
    paths, options = split_arguments(arguments)
    tally = Tally()
    writable(REPORTS, "A report")
    python = main.python(cache, "pytest", "hypothesis", "xdist")
    share = workers()
    suites = [Suite("pure", paths["pure"], python, workers=share)] if "pure" in paths else []
    if "host" in paths:
        for host, its_python in [(main, python), *further_hosts(main, cache, tally)]:
            suites.append(Suite(f"host {host.version}", paths["host"], its_python, host, share))
    if "e2e" in paths:
        suites.append(Suite("e2e", paths["e2e"], python, main))
    for suite in suites:
        suite.run(options, tally)
    say("")
    for reason, count in sorted(tally.skipped.items()):
        say(f"SKIPPED [{count}] {reason}")
    say(tally.closing_line())
    return 1 if tally.failed else 0
