"""Pretrains a Llama on text, with galore_rrf's optimizer or those it is compared with.

    python examples/pretrain_llama.py                                     a 60M Llama for ten minutes
    python examples/pretrain_llama.py --config configs/tiny.yaml          a small one, for two
    python examples/pretrain_llama.py --resume runs/tiny-20260101-120000  continues a run

`--help` lists and explains all options; docs/pretraining.md says more.
"""

from __future__ import annotations

import gc
import shlex
import sys
from pathlib import Path

from pretrain.command_line import parse
from pretrain.errors import in_sentences

CONFIGS = Path(__file__).parents[1] / "configs"


def default_configs() -> list[Path]:
    from pretrain.run import has_gpu

    return [CONFIGS / "llama_60m.yaml", CONFIGS / f"pretrain_{'gpu' if has_gpu() else 'cpu'}.yaml"]


@in_sentences("stopped at once; what checkpoints there are, are whole")
def main() -> int:
    config, resume = parse(sys.argv[1:], default_configs)
    from pretrain.run import Interrupted, run  # seconds, which --help and wrong options need not wait

    gc.freeze()  # to look through all that the imports made stalls a step by a third of a second
    try:
        run(config, resume is not None)
    except Interrupted as stop:
        again = shlex.join([sys.executable, sys.argv[0], "--resume", str(config.out)])
        print(f"{stop}; to go on: {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
