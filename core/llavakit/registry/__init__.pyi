from .choices import (
    LATER as LATER,
    StepFolders as StepFolders,
    all_kinds as all_kinds,
    kind_of as kind_of,
    texts_in as texts_in,
)
from .components import KindT as KindT, Registry as Registry
from .installed import no_exit as no_exit
