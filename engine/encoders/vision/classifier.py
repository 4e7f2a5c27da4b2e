"""Small classifier as a teacher of small pictures (`engine/evaluation/digit_judge.py` trains one)."""

from pathlib import Path

import torch
from torch import Tensor

from millrace.engine.config import AttentionAlignment
from millrace.engine.config import Teacher as TeacherConfig
from millrace.engine.encoders.small_classifier import PATCH, SmallClassifier, load_classifier, save_classifier
from millrace.engine.encoders.teacher import KEY, QueriesKeys, Teacher, VisionEntry
from millrace.engine.util.errors import UserError


class ClassifierTeacher(Teacher):
    """A small convolutional classifier: its feature map, one place for each 4 x 4 pixels."""

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        if config.path is None:
            raise UserError(
                f"alignment.teacher.kind classifier has no published weights; set {KEY} to a folder written "
                "by save_classifier"
            )
        self.network = load_classifier(config.path, KEY, device, getattr(torch, config.dtype))
        super().__init__(config, PATCH, self.network.dim, self.network, f"classifier {config.path}", device)

    def _compute(self, pictures: Tensor) -> tuple[Tensor, list[QueriesKeys]]:
        with torch.autocast(pictures.device.type, enabled=False):
            maps = self.network.features(pictures.to(getattr(torch, self.config.dtype)))
        return maps.flatten(2).transpose(1, 2), []


class ClassifierEntry(VisionEntry):
    """The registry's entry; nothing is published."""

    patch = PATCH

    def open_teacher(
        self, config: TeacherConfig, device: torch.device, _attention: AttentionAlignment | None
    ) -> Teacher:
        return ClassifierTeacher(config, device)

    def tiny(self, folder: Path) -> Path:
        return save_classifier(SmallClassifier(classes=2, width=8), folder)


ENTRY = ClassifierEntry()
