"""Commands of the quantization workbook: `python -m labkit doctor · fetch · refresh`."""

import sys

from workshop.commands import main

if __name__ == "__main__":
    sys.exit(main())
