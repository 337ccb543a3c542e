"""All benchmarks: `make bench`, or ``python -m benchmarks``."""

import torch

import galore_rrf
from benchmarks import llama_60m, look_ahead, memory, range_finders, sketch

torch.set_num_threads(2)
print(f"galore_rrf {galore_rrf.__version__}, {galore_rrf.build_info()}, {torch.get_num_threads()} threads")
sketch.main()
range_finders.main()
look_ahead.main()
llama_60m.main()
memory.main()
