"""The commands and snippets of the users' pages are run as they stand there.

In a scratch folder that has what the pages speak of: a recording, a bundle, a model folder. What
takes minutes gets smaller numbers appended (the last option wins), what serves a free port; what
cannot run in a test is listed with its reason, and its options must still be understood.
"""

import ctypes
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.cli import main
from heartbeat_fast.clip import Clip
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_training.phantom import record

ROOT = Path(__file__).parent.parent
PAGES = tuple(ROOT / page for page in ("README.md", *(f"docs/{name}.md" for name in (
    "embed", "benchmark", "rebuild", "serve"))))  # fmt: skip
PARSERS = {
    "heartbeat": "heartbeat_fast.cli",
    "heartbeat-bench": "heartbeat_benchmarks.cli",
    "heartbeat-export": "heartbeat_export.cli",
    "heartbeat-train": "heartbeat_training.cli",
}
PROGRAMS = (*PARSERS, "make", "pip", "python")
LONGEST = 120.0  # seconds of one command on a busy machine; on an idle core each takes a few

SMALL = "--bundle nano --engine onnxruntime"
SMALLER = {  # the longest beginning counts
    "heartbeat sample": f"{SMALL} --steps 2",
    "heartbeat-bench latency": f"{SMALL} --steps 2 --sets text --runs 1 --cold-starts 1",
    "heartbeat-bench soak": f"{SMALL} --steps 2 --minutes 0.03 --clients 1 --pyigtl 0 --bad 1",
    "heartbeat-bench pictures": f"{SMALL} --steps 2",
}
SERVERS = {
    "heartbeat serve web": f"{SMALL} --host 127.0.0.1 --port 0",
    "heartbeat serve igtl": f"{SMALL} --steps 2 --port 0",
}
NOT_RUN = {
    "make demo": "makes an environment from a package index; its command is tested below",
    "pip install": "needs a package index; the extras it names are tested",
    "heartbeat-bench waterfall": "minutes of eager torch; tests/test_bench_waterfall.py runs it",
    "heartbeat-bench scaling": "exports a bundle a size, minutes; tests/test_bench_compare.py",
    "heartbeat-bench peers": "other systems' networks at full size: minutes, gigabytes",
    "heartbeat-bench quality": "trains a segmenter first: minutes; tests/test_tiny.py has it",
    "heartbeat-bench real": "needs patients, which are not in the repository",
    "python -m pytest benchmarks/micro": "a benchmark: statistics of many rounds",
}
HOST = """\
import numpy as np
from heartbeat_fast.inputs import open_source
_record = open_source("phantom:7", None, 16, 256)
my_masks, my_motion = _record.labels, _record.flow
done, show = True, lambda pixels: None
"""  # what docs/embed.md says the host has


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def fences(page: Path) -> Iterator[tuple[str, int, str]]:
    """Language, first line's number and content of every fenced block."""
    content = page.read_text("utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", content, re.M | re.S):
        yield found[1], content.count("\n", 0, found.start()) + 2, found[2]


def commands(page: Path) -> list[Command]:
    """The commands of our programs in a page's blocks of shell."""
    found = []
    for language, first, block in fences(page):
        if language not in ("", "sh", "bash"):
            continue
        whole = block.replace("\\\n", "  ")
        for offset, line in enumerate(whole.splitlines()):
            text = re.sub(r"\s+#.*$", "", line).strip()
            words = [word for word in text.split() if not re.match(r"[A-Z_]+=", word)]
            if words and words[0] in PROGRAMS:
                found.append(Command(page.name, first + offset, text))
    return found


def setting(text: str, table: dict[str, str]) -> str | None:
    """The entry for the longest beginning of a command, variables before it left out."""
    bare = re.sub(r"^([A-Z_]+=\S*\s+)+", "", text)
    fits = [key for key in table if bare == key or bare.startswith((f"{key} ", f"{key}/"))]
    return table[max(fits, key=len)] if fits else None


ALL = [command for page in PAGES for command in commands(page)]
RUN = [c for c in ALL if setting(c.text, NOT_RUN) is None and setting(c.text, SERVERS) is None]
SERVED = [c for c in ALL if setting(c.text, SERVERS) is not None]


class Running:
    """A command in a process group of its own, which `stop` ends whatever it does."""

    def __init__(self, text: str, folder: Path) -> None:
        self.text, self.log = text, folder / "said.txt"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", text], cwd=folder, env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                # A shell that runs the tests in the background hands down SIGINT ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self, seconds: float = LONGEST) -> int:
        """Its exit code; killed, with a sentence, where it does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            sentence = f"{self.text!r} had not ended after {seconds:g} s and was killed"
            raise AssertionError(f"{sentence}: {self.said()[-2000:]}") from None

    def until(self, pattern: str) -> re.Match[str]:
        """What it says, once it says so."""
        end = time.monotonic() + LONGEST
        while not (found := re.search(pattern, self.said())):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, f"{self.text!r} did not begin: {self.said()}"
            time.sleep(0.05)
        return found

    def stop(self, how: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)


@pytest.fixture(scope="module")
def scratch(
    nano_bundle: Bundle,
    nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A page's own folder, with what the pages' commands name."""
    made = tmp_path_factory.mktemp("pages")
    fresh = made / "fresh"
    shutil.copytree(nano_bundle.path, fresh / "nano")
    shutil.copytree(nano_bundle.path, fresh / "bundles" / "mine")
    model = fresh / "runs" / "mine" / "model-stage2"
    trained = HeartBeat(nano_model.config)
    state = nano_model.state_dict()
    moved = {name: 1.01 * state[name] for name in state if name.startswith("denoiser.conv_")}
    trained.load_state_dict({**state, **moved})
    trained.save_pretrained(model)
    nano_tokenizer.save(model / "tokenizer.json")
    (model / "provenance.json").write_text(json.dumps({"data": "none: random weights"}))
    phantom = record(7, frames=16, size=256)
    how = phantom.spacing_mm, phantom.fps
    patient = Clip(phantom.frames, *how, conditions=phantom.conditions())
    patient.save(fresh / "patient0001_4CH_half_sequence.nii.gz")
    Clip(np.concatenate([phantom.frames, phantom.frames]), *how).save(fresh / "loop.dcm")
    shutil.copytree(ROOT / "benchmarks" / "results", fresh / "benchmarks" / "results")
    newest = max((ROOT / "benchmarks" / "results").glob("latency-*.json"))
    for name in ("A", "B", "FILE"):
        shutil.copy(newest, fresh / name)
    shutil.copy(ROOT / "docs" / "benchmark.md", fresh / "F.md")

    def of(page: str) -> Path:
        if not (made / page).exists():
            shutil.copytree(fresh, made / page)
        return made / page

    return of


@pytest.mark.parametrize("command", RUN, ids=str)
def test_commands_run(command: Command, scratch: Callable[[str], Path]) -> None:
    text = f"{command.text} {setting(command.text, SMALLER) or ''}".strip()
    running = Running(text, scratch(command.page))
    assert running.wait() == 0, f"{command} (as {text!r}): {running.said()[-3000:]}"
    assert "Traceback" not in running.said()


@pytest.mark.parametrize("command", SERVED, ids=str)
def test_servers_serve(command: Command, scratch: Callable[[str], Path]) -> None:
    running = Running(f"{command.text} {setting(command.text, SERVERS)}", scratch(command.page))
    try:
        kind, host, port = running.until(r"(\w+)://([\d.]+):(\d+)").groups()
        if kind == "http":
            with urllib.request.urlopen(f"http://{host}:{port}/health/live", timeout=30) as answer:
                assert json.load(answer) == {"status": "live"}
        running.stop(signal.SIGINT)
        assert running.wait(30) in (0, 130, -signal.SIGINT), running.said()
    finally:
        running.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="tgkill is Linux's")
@pytest.mark.parametrize("kind", SERVERS)
def test_servers_end_when_another_thread_takes_the_signal(
    kind: str, scratch: Callable[[str], Path]
) -> None:
    """The kernel may give Ctrl-C to any thread, and then the main one sleeps on."""
    running = Running(f"{kind} {SERVERS[kind]}", scratch("serve.md"))
    try:
        running.until(r"://[\d.]+:\d+")
        time.sleep(0.3)  # for the main thread to wait
        main_thread, tgkill = running.process.pid, ctypes.CDLL(None).tgkill
        threads = {int(task) for task in os.listdir(f"/proc/{main_thread}/task")} - {main_thread}
        assert any(tgkill(main_thread, thread, signal.SIGINT) == 0 for thread in threads)
        assert running.wait(30) in (0, 130, -signal.SIGINT), running.said()
    finally:
        running.stop()


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=str)
def test_snippets_run(page: Path, scratch: Callable[[str], Path]) -> None:
    """All of a page's Python in order, as one program; `assert` is the reader's eye."""
    blocks = [block for language, _, block in fences(page) if language == "python"]
    folder = scratch(page.name)
    (folder / "page.py").write_text("\n".join((HOST, *blocks, "assert clip.frames.std() > 1")))
    running = Running(f"{shlex.quote(sys.executable)} page.py", folder)
    assert running.wait() == 0, running.said()[-3000:]
    assert (folder / "clip.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    "command",
    [c for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
     for c in commands(page)],
    ids=str,
)  # fmt: skip
def test_options_of_every_page_are_understood(command: Command) -> None:
    words = shlex.split(re.sub(r"\[-[^]]*\]|…", "", command.text.replace("=…", "=x")))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for named in re.findall(r"\[(.*?)\]", command.text):
            assert set(named.split(",")) <= set(extras["optional-dependencies"]), command
    elif words[0] == "python":
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command
    else:
        parser = importlib.import_module(PARSERS[words[0]])._parser()
        if words[0] == "heartbeat" and words[1] == "sample" and "--out" not in words:
            words += ["--out", "clip.gif"]
        parser.parse_args(words[1:])


@pytest.mark.parametrize("key", [*SMALLER, *SERVERS, *NOT_RUN])
def test_no_entry_is_left_over(key: str) -> None:
    assert any(setting(command.text, {key: key}) for command in ALL), f"{key}: on no page"


def test_every_page_has_something_to_run() -> None:
    assert {command.page for command in RUN + SERVED} == {page.name for page in PAGES}


def test_a_command_that_hangs_is_killed_with_a_sentence(tmp_path: Path) -> None:
    running = Running("sleep 300", tmp_path)
    with pytest.raises(AssertionError, match=r"'sleep 300' had not ended after 0\.3 s and was kil"):
        running.wait(0.3)
    assert running.process.wait(5) == -signal.SIGKILL


def test_the_demo_says_nothing_but_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`make demo` installs no OpenVINO; that nobody asked for it is nothing to warn of."""
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    how = ["--from", "phantom:7", "--seed", "1", "--steps", "2", "--out", str(tmp_path / "a.gif")]
    assert f"heartbeat sample {' '.join(how[:4])} " in (ROOT / "Makefile").read_text()
    assert main(["sample", *how]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "onnxruntime" in out
    assert out.count("\n") == 1
