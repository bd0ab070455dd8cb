import sys

from cdm_plugin.cli import main

sys.exit(main())
