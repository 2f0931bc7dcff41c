"""Write docs/architectures.md: the table of architectures with their exact and refused sites.

.venv-tl4/bin/python docs/make_architectures.py
"""

import logging
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(HERE.parent))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from tests.support.architectures import page

    (HERE / "architectures.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
