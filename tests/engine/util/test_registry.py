"""Registry: every name that a configuration offers has its entry, and every entry is offered."""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import get_args

import pytest

from millrace.engine.config import Autoencoder, Optimizer, PerceptualDino, Routing, Teacher, TextTower
from millrace.engine.config.data import Part
from millrace.engine.encoders.autoencoder import AutoencoderEntry, autoencoder_entry
from millrace.engine.encoders.dino import DinoEntry
from millrace.engine.encoders.teacher import VisionEntry, vision_entry
from millrace.engine.encoders.text_encoder import TextEncoderEntry, text_encoder_entry
from millrace.engine.model.routing import POLICIES
from millrace.engine.optim.training_optimizer import OptimizerEntry
from millrace.engine.util.registry import entry

KINDS = {
    "encoders.text_encoders": (TextTower, "kind", TextEncoderEntry),
    "encoders.autoencoders": (Autoencoder, "kind", AutoencoderEntry),
    "encoders.vision": (Teacher, "kind", VisionEntry),
    "optim": (Optimizer, "kind", OptimizerEntry),
    "data.sources": (Part, "source", Callable),
}
"""Package of the entries: section and key that choose one, and the entries' type."""


def offered(section, key):
    return set(get_args(section.model_fields[key].annotation))


@pytest.mark.parametrize("package", KINDS)
def test_names_and_entries_are_the_same(package):
    section, key, kind = KINDS[package]
    folder = import_module(f"millrace.engine.{package}").__path__
    found = {
        module.name
        for module in pkgutil.iter_modules(folder)
        if hasattr(import_module(f"millrace.engine.{package}.{module.name}"), "ENTRY")
    }
    assert found == offered(section, key)
    assert all(isinstance(entry(package, name), kind) for name in found)


def test_every_routing_policy_has_its_entry():
    assert set(POLICIES) == offered(Routing, "policy")


def test_perceptual_losses_take_kinds_of_dino():
    for name in offered(PerceptualDino, "kind"):
        assert isinstance(vision_entry(name), DinoEntry)
        assert vision_entry(name).base is not None


def test_what_has_weights_has_a_small_twin(tmp_path):
    """A kind with weights to download that lacks one could not run with --smoke."""
    for name in offered(TextTower, "kind"):
        text = text_encoder_entry(name)
        assert (text.source is None) == (text.tiny is None) == (text.revision is None)
    for name in offered(Autoencoder, "kind"):
        network = autoencoder_entry(name).network
        assert network is None or network.tiny
