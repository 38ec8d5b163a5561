"""Which of a run's sample videos there are, whatever lies in its folder."""

from pathlib import Path

from longtake.training.sampled import run_samples


def test_a_sample_of_which_its_json_does_not_tell_is_left_out_and_named(tmp_path: Path) -> None:
    samples, said = tmp_path / "samples", []
    samples.mkdir()
    odd = [b"", b"\xff", b"[" * 99999, b"[3]", b'"step"', b'{"step": 3}', b'{"step": "3", "prompt": "x"}']
    for index, content in enumerate([b'{"step": 2, "prompt": "A red kite"}', *odd]):
        (samples / f"step-00000003-{index}.json").write_bytes(content)
        (samples / f"step-00000003-{index}.mp4").touch()
    (samples / "step-00000003-9.json").mkdir()
    assert run_samples(tmp_path, said.append) == (("samples/step-00000003-0.mp4", "A red kite"),)
    assert [line.partition(": ")[0] for line in said] == [
        str(samples / f"step-00000003-{index}.json") for index in (*range(1, 8), 9)
    ]
