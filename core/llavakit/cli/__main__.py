"""`python -m llavakit.cli` is `llava-run`."""

from llavakit.cli import main

raise SystemExit(main())
