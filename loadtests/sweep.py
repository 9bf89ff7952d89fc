"""Load a server at several rates, one after another, and write the report of it.

    python loadtests/sweep.py -H http://127.0.0.1:8000 --rates 2 4 8 --seconds 30 --out runs/sweep
    python loadtests/sweep.py -H http://127.0.0.1:8000 --users Zipf Swapper --rates 4 -- --swap-every 2

Each rate is a run of locustfile.py with one user of each class, whose options go after `--`; each class but
Swapper sends so many requests a second. With `--arrivals trace` after it, rates are how many times as fast
the trace is played. The report is in OUT, as loadreport.py writes it.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import loadreport

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def sweep(
    host: str, users: list[str], rates: list[float], seconds: float, out: Path, options: list[str]
) -> None:
    """One run for each rate. Exits where locust could not run; requests that fail are in the report."""
    for rate in rates:
        folder, number = out / f"rate-{rate:g}", str(len(users))
        command = [
            sys.executable,
            "-m",
            "locust",
            "--headless",
            "--only-summary",
            "-f",
            str(LOCUSTFILE),
            "-H",
            host,
        ]
        command += ["-u", number, "-r", number, "-t", f"{seconds:g}s", "--out", str(folder)]
        command += ["--rate", str(rate), "--trace-speed", str(rate), *options, *users]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (folder / "run.json").exists():
            sys.exit(done.stderr[-3000:])
        print(f"{rate:g}: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-H", "--host", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--users", nargs="+", default=["Zipf"], help="classes of locustfile.py")
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=60, help="of each rate")
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    loadreport.add_options(parser)
    parser.add_argument("options", nargs="*", help="of locustfile.py, after --")
    args = parser.parse_args()
    for old in args.out.glob("rate-*"):  # the report would take them for loads of this sweep
        shutil.rmtree(old)
    sweep(args.host, args.users, args.rates, args.seconds, args.out, args.options)
    loadreport.report(args.out, args)


if __name__ == "__main__":
    main()
