"""Training, as users of the original start it; any causal language model, not only Llama.

    torchrun --nproc-per-node 2 examples/llama_example.py --yaml_path configs/config.yaml

The same as `torchrun ... -m vectorlm.train --config FILE`: one process a GPU, started by torchrun.
The data must have been prepared before (`python preprocess_data.py --config FILE`).

To see what a run is made of, read on in `vectorlm/train.py` (signals, exit codes), then
`vectorlm/assemble.py` (the parts, put together) and `vectorlm/trainer.py` (the loop).
"""

from __future__ import annotations

from vectorlm.train import leave, main

if __name__ == "__main__":
    leave(main())
