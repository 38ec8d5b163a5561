"""A model's name that does not exist is told the nearest that does."""

import pytest

from longtake.errors import ModelError
from longtake.models.wan.variants import VARIANTS, variant

NEAREST = {
    "wan2.1-i2v-14b-480": "wan2.1-i2v-14b-480p",
    "Wan2.1-I2V-14B-720P": "wan2.1-i2v-14b-720p",
    "wan2.1-i2v-14b": "wan2.1-i2v-14b-480p or wan2.1-i2v-14b-720p",
    "wan2.1_t2v_14b": "wan2.1-t2v-14b",
    "wan21-t2v-1.3b": "wan2.1-t2v-1.3b",
    "wan2.1-fl2v-14b-720p": "wan2.1-flf2v-14b-720p",
    "wan2.2-5b": "wan2.2-ti2v-5b",
    "wan2.2-t2v-14b": "wan2.2-t2v-a14b",
    "wan2.2-i2v": "wan2.2-i2v-a14b",
    "tiny-tv2": "tiny-t2v",
}


@pytest.mark.parametrize(("name", "near"), NEAREST.items())
def test_the_nearest_name_is_suggested(name: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        variant(name)
    what = f"model.name: there is no model called '{name}'"
    assert str(caught.value) == f"{what}; did you mean {near}? [model-name-unknown]"


def test_a_name_that_is_like_none_is_told_all() -> None:
    with pytest.raises(ModelError) as caught:
        variant("hunyuan-video")
    assert f"choose one of {', '.join(VARIANTS)} [" in str(caught.value)
