"""The report of a run, as a tracker: report.html and report.md, one file each."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_trackers() -> Mapping[str, str]:
    return {"report": "llavakit_plugins.reporting.report:Report"}
