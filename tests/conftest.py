"""One thread for each process: the tensors here are small, and pytest-xdist has processes enough."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dialect import BORROWED, COMPILED_FOR, INTERPRETED

if TYPE_CHECKING:
    from dialect.processes import Pool

torch.set_num_threads(1)

# Tests run with the repository's root on the path, where transformers, which looks for Hugging Face's package of this
# name, would find the folder of ours.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

if INTERPRETED:
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A device function within a kernel, whose launch has prepared the language already. Triton does that again at
        each call, by going through all of it, which is a third of the time of small kernels; but what else a module
        sees of the language, as Triton's own do, is prepared by the first of its functions for good."""
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if COMPILED_FOR:
    from dialect.kernel_session import DEVICE, kernel_session, sound_kernels
    from virtual_gpu import NoCompiler

    session = contextlib.ExitStack()

    def pytest_configure(config: pytest.Config) -> None:
        try:
            session.enter_context(kernel_session())
        except NoCompiler as missing:
            # Who asks for compiled kernels is not to take skipped tests for passed ones.
            raise pytest.UsageError(f"VIRTUAL_GPU={COMPILED_FOR}: {missing}") from None

    def pytest_unconfigure(config: pytest.Config) -> None:
        session.close()

    @pytest.fixture(autouse=True)
    def _sound_kernels() -> Iterator[None]:
        with sound_kernels():
            yield

    def pytest_sessionfinish(session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launched"] = dict(DEVICE.totals)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(node: Any) -> None:
        """Of pytest-xdist: what a worker has launched."""
        DEVICE.totals.update(getattr(node, "workeroutput", {}).get("launched", {}))

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        counted = ", ".join(f"{number:,} {what}" for what, number in DEVICE.totals.items())
        terminalreporter.write_line(
            f"{'borrowed' if BORROWED else 'virtual'} GPU, sm_{COMPILED_FOR}: {counted or 'nothing'}"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="without nightly tests, and fewer cases of thinned ones")


class Thinning:
    """Which cases of tests ``--quick`` does without.

    Of a thinned test those remain whose parameters' places add up to a multiple of what it is thinned by: each value of
    a parameter with some of the others, and with three parameters usually each pair of values.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[object, int], dict[str, int]] = defaultdict(dict)

    def leaves_out(self, item: pytest.Item) -> bool:
        if item.get_closest_marker("nightly") is not None:
            return True
        thinned = item.get_closest_marker("thinned")
        every = 1 if thinned is None else thinned.args[0]
        # Of each parametrisation the value's name; pytest numbers combinations, but not values.
        names = item.callspec._idlist if hasattr(item, "callspec") else []
        if COMPILED_FOR and item.path.parent.name != "kernels":
            # What is to be compiled takes longest, pairwise kernels most of all.
            every *= 3 if "pairwise" in names else 2
        total = 0
        for i, name in enumerate(names):
            places = self._places[item.function, i]
            place = places.setdefault(name, len(places))
            total += 0 if name == "pairwise" else place
        return total % every != 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        thinning = Thinning()
        out = [thinning.leaves_out(item) for item in items]
        config.hook.pytest_deselected(items=list(compress(items, out)))
        items[:] = [item for item, left_out in zip(items, out) if not left_out]


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes that only values show are errors; as on a GPU, compiled kernels' tests have to ask for it."""
    if COMPILED_FOR:
        monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")


@pytest.fixture
def command_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set that the command looks at, and no settings have been found before."""
    from alrp_triton import info

    for name in info.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALRP_TRITON_CACHE", str(tmp_path / "settings"))


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes that rank together; started once, for the worker that has their tests."""
    from dialect.processes import SIZE, Pool

    pool = Pool(SIZE, tmp_path_factory.mktemp("store") / "store")
    yield pool
    pool.close()
