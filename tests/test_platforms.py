"""What has to work where the calls of Unix are missing: planning on a laptop."""

import subprocess
import sys

import pytest

WITHOUT = """
import torch, diffusers.models.transformers.transformer_wan, diffusers.models.autoencoders.autoencoder_kl_wan, peft
import sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
import longtake.explanations, longtake.planner.command, longtake.planner.planning, longtake.training.exporting
print("imported")
"""
"""The libraries have what they import there; what is ours may not ask for what Windows lacks."""


@pytest.mark.long
def test_plan_and_export_need_none_of_what_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "imported\n", done.stderr
