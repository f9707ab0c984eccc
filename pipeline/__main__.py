"""python -m pipeline: the shell's command line, whose imports run where Ctrl-C is one line."""

import datetime  # noqa: F401 - pydantic's core imports it and turns a Ctrl-C at that moment into a panic of its own
import io
import sys


def main() -> int:
    """Exit code: 0 done, 1 the worker failed, 2 the input is at fault, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    try:
        from pipeline import shell
        from pipeline.job.signals import exit_on_signals

        exit_on_signals()
        return shell.main()
    except KeyboardInterrupt as e:
        print(f"{chr(10) if sys.stderr.isatty() else ''}error: interrupted; {str(e) or 'nothing was written'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
