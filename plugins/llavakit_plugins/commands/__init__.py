"""Commands of `llava-run` that come as plugins, by the entry points `llavakit.commands`."""
