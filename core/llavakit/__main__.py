"""`python -m llavakit` is `llava-run`."""

from llavakit.cli import main

raise SystemExit(main())
