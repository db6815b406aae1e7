#!/usr/bin/env python
"""thumbtune: fine-tune CLIP's projections on (thumbnail, title) pairs.

    rows --data.sources--> data.cold: fetch, decode, towers once --> features --engine.train--> embeddings, loss, step
                                      eval.retrieval: Recall@K, triplet accuracy --> the run folder, the report

This file parses the command line and runs one command of engine/commands/ on this rank.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from data.text import clean_library_output, printable
from engine.config.cli import parse
from engine.config.fields import TOWERS, Config
from engine.run_folder import crash
from engine.run_folder.crash import CURRENT_RUN, explain_crash, rank_from_environment, say_error


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, a title can be printed
            stream.reconfigure(errors="backslashreplace")
    clean_library_output()
    command = ""
    try:
        command, cfg = parse("run.py", arguments)
        return run(command, cfg)
    except Exception as error:  # in the command line's own code, or an installation that is broken
        say_error(explain_crash(command, error, rank_from_environment()))
        return 1


def run(command: str, cfg: Config) -> int:
    """Run a command and return its exit code; UserError, RunFailed and OSError are printed as one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of our own call the tokenizer
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from engine.ranks.signals import StopSignal

    stop = StopSignal()  # before torch is loaded, which takes a while
    from safetensors import SafetensorError  # it wraps errors of the disk too

    from data.batch import AgreedError, RunFailed, UserError
    from engine.device import explain_out_of_memory
    from engine.ranks import world
    from engine.ranks.agreement import require_same_settings

    name = {"eval": "evaluate"}.get(command, command)  # a module called eval would hide the builtin
    try:
        run_command = getattr(import_module(f"engine.commands.{name}"), name)
        device = cfg.device if command in TOWERS else "cpu"  # the others run no tower, whatever the machine has
        # The collectives that do not name themselves average gradients.
        with (world.explain_collective_errors("averaging gradients", watched=False),
              explain_out_of_memory(command, cfg)):
            ranks = world.init(device, cfg.dist_timeout, cfg.quiet, command)
            require_same_settings(ranks, command, cfg)
            return run_command(cfg, ranks, stop)
    except BrokenPipeError:  # stdout was closed, as by `| head`
        crash.mute_stdout()
        return leave(141)
    except (UserError, RunFailed, OSError, SafetensorError) as error:  # the last two: a full disk, a folder gone
        rank, mistake = rank_from_environment(), isinstance(error, UserError)
        if not (rank and isinstance(error, AgreedError)):
            time.sleep(2 * bool(rank))  # let rank 0 print first: it has most likely met the same error
            say_error(f"run.py {command}{'' if mistake else ' failed'}: "
                      f"{printable(str(error)) if mistake else error}")
        return leave(2 if mistake else 1)
    except SystemExit as signalled:
        return leave(int(signalled.code or 0))
    except Exception as error:  # unforeseen: end here, so that other ranks do not wait for this one
        say_error(explain_crash(command, error, rank_from_environment()))
        return leave(1)
    finally:
        CURRENT_RUN.discard()
        world.close()


def leave(code: int) -> int:
    """Remove a new run folder that is unused and return the exit code; with several ranks this ends the process."""
    from engine.ranks import world

    CURRENT_RUN.discard()
    return world.exit_process(code)


if __name__ == "__main__":
    gc.set_threshold(100_000)  # libraries make as many objects and no garbage: collections would take .3 s
    atexit.register(gc.freeze)  # or Python would look through all objects once more as it ends: .3 s
    code = main(sys.argv[1:])
    crash.end_rank(code)
    sys.exit(code)
