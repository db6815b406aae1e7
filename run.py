#!/usr/bin/env python
"""thumbtune: fine-tune CLIP's projections on (thumbnail, title) pairs.

    rows --data.sources--> data.cold: fetch, decode, towers once --> features --engine.train--> embeddings, loss, step
                                      eval.retrieval: Recall@K, triplet accuracy --> the run folder, the report

This file parses the command line and runs one command of engine/commands/ on this rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from engine.config.cli import parse


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    command, cfg = parse("run.py", arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads call it
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from engine.ranks.signals import Stop

    stop = Stop()  # before torch is loaded, which takes a while
    from safetensors import SafetensorError  # which stands for what the disk said as well

    from data.batch import RunFailed, UserError
    from engine.ranks import world

    name = {"eval": "evaluate"}.get(command, command)  # a module called eval would hide the builtin
    run_command = getattr(import_module(f"engine.commands.{name}"), name)
    try:
        with world.asking("averaging gradients"):  # what else ranks ask of one another says so itself
            return run_command(cfg, world.init(cfg.device, cfg.dist_timeout, cfg.quiet), stop)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return world.leave(141)
    except (UserError, RunFailed, OSError, SafetensorError) as error:  # the last two: a full disk, a folder gone
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # rank 0 has most likely met the same and says it for all
        mistake = isinstance(error, UserError)
        print(f"run.py {command}{'' if mistake else ' failed'}: {error}", file=sys.stderr, flush=True)
        return world.leave(2 if mistake else 1)
    except SystemExit as signalled:
        return world.leave(int(signalled.code or 0))
    finally:
        world.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
