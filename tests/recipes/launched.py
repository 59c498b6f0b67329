"""Several runs in one ``accelerate launch`` of two processes, which cost its imports once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tiny_run import RECIPES, ROOT

# Defines ``runs``, a list of lists of strings, and what has to happen between two of them.
SEVERAL = f"""
import json, runpy, sys
sys.path[:0] = [{str(RECIPES)!r}, {str(Path(__file__).parent)!r}]
from accelerate import PartialState
from tiny_run import forget_accelerate

PartialState.destroy_process_group = lambda *args: None  # all runs use one group
runs = json.loads(sys.argv[1])
"""

# Each run is a command line: a script and its flags.
COMMANDS = f"""{SEVERAL}
for sys.argv in runs:
    runpy.run_path(sys.argv[0], run_name="__main__")
    forget_accelerate()
"""


def launch(
    config: str, program: str, runs: list[list[str]], folder: Path, env: Mapping[str, str] | None = None
) -> None:
    """Two processes, as a config of the recipes has them, that execute ``program`` on ``runs``; fails if they do."""
    script = folder / "script.py"
    script.write_text(program)
    command = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / "configs" / "accelerate" / config]
    # Port 0: any free one.
    command += ["--num_processes", 2, "--mixed_precision", "no", "--num_cpu_threads_per_process", 1]
    command += ["--main_process_port", 0, script, json.dumps(runs)]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
