"""tensorboardX's writer of event files, imported without PyTorch.

tensorboardX imports PyTorch where it is installed, for the type of one argument. That takes over a
second.
"""

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_hidden = 'torch' not in _modules
if _hidden:
    _modules['torch'] = None  # makes the import fail, as if PyTorch were not installed
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _hidden:
        del _modules['torch']

__all__ = ['Event', 'EventsWriter', 'SessionLog', 'Summary']
