"""Door: prepare the data that a configuration names; the same as `vectorlm preprocess`.

python preprocess_data.py --config configs/config.yaml [--set dataset_preprocess.split=train]
"""

from __future__ import annotations

import sys

from vectorlm import cli

if __name__ == "__main__":
    sys.exit(cli.main(["preprocess", *sys.argv[1:]]))
