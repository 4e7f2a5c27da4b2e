"""Captioned pictures and the deterministic stream of training samples made of them."""

from millrace.engine.data.batch import Batch, signed_unit
from millrace.engine.data.crop import evaluation_view
from millrace.engine.data.sources.open_source import fingerprint, open_source
from millrace.engine.data.sources.pictures import Captions, Source, UnreadablePicture
from millrace.engine.data.stream import SampleStream

__all__ = [
    "Batch",
    "Captions",
    "SampleStream",
    "Source",
    "UnreadablePicture",
    "evaluation_view",
    "fingerprint",
    "open_source",
    "signed_unit",
]
