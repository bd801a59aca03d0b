"""A cascade from step 1 to a wished speed, in process and on a few tiny images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dyndet
import dyndet.lightning.step2 as step2_module
from dyndet.calibrate import calibrate
from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.lightning import lessons
from dyndet.lightning.lessons import collect
from dyndet.lightning.router_module import RouterModule, learn
from dyndet.models.detectors.dynamic import DynamicDetector, Seen
from dyndet.models.dynamicdet.offset import Constant, RunningMedian
from dyndet.predict import predict
from dyndet.speeds import timing
from dyndet.speeds.set import Calibration, Point, set_speed
from dyndet.train import train

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=10", "data.batch_size=4", "trainer.accelerator=cpu",
    "neck.channels=16", "head.num_convs=1", "head.norm_groups=4", "predictor.postprocess.score_threshold=0.01",
]  # fmt: skip
EPOCHS = ["trainer.max_epochs=4", "trainer.check_val_every_n_epoch=4", "router.batch_size=8", "optim.optimizer.lr=0.01"]


def step1(folder: Path, *overrides: str) -> dict[str, float]:
    keys = [*TINY, "trainer.max_epochs=1", f"output_dir={folder}", *overrides]
    return train(compose_experiment("shapes_dy_tiny", keys))


def step2(folder: Path, init: Path, *overrides: str) -> dict[str, float]:
    keys = [*TINY, "+router=exact", *EPOCHS, f"init={init}", f"output_dir={folder}", f"router.cache={folder}/lessons"]
    return train(compose_experiment("shapes_dy_tiny", [*keys, *overrides]))


def weights(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt").weights


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("joint")
    return folder, step1(folder)


@pytest.fixture(scope="module")
def init(joint: tuple[Path, dict[str, float]]) -> Path:
    return joint[0] / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, init: Path) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    step2(folder, init)
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, routed: Path) -> tuple[Path, Calibration]:
    folder = tmp_path_factory.mktemp("calibrated")
    file = folder / "new" / "fast.ckpt"
    keys = [f"ckpt={routed}/checkpoints/last.ckpt", f"out={file}", f"output_dir={folder}", "latency_images=2"]
    return file, calibrate(compose_command("calibrate", [*keys, "device=cpu"]))


def test_step_1_validates_both_detectors(joint: tuple[Path, dict[str, float]]) -> None:
    metrics = joint[1]
    assert {"val/AP", "val/first/AP", "val/first/AP50", "train/first/cls", "train/second/cls"} <= set(metrics)
    assert metrics["route/hard"] == 1


def test_step_2_moves_the_router_alone(init: Path, routed: Path) -> None:
    before, after = read_checkpoint(init).weights, weights(routed)
    assert {name for name in after if name not in before} == {name for name in after if name.startswith("router.")}
    assert all(torch.equal(before[name], after[name]) for name in before)  # running statistics, too
    fresh: DynamicDetector = build(compose_experiment("shapes_dy_tiny", [*TINY, "+router=exact", "init=x"]).detector)
    assert fresh.router is not None
    assert not torch.equal(after["router.hidden.weight"], fresh.router.hidden.weight)


def test_the_offset_is_the_exact_median_over_the_training_set(routed: Path) -> None:
    content = torch.load(routed / "checkpoints" / "last.ckpt", weights_only=True)
    (offset,) = content["dyndet"]["offset"]
    kept = load_file(next((routed / "lessons").glob("*/00000.safetensors")))
    difference = kept["losses"][0] - kept["losses"][1]
    assert len(difference) == 24 and offset == pytest.approx(float(difference.quantile(0.5)))


def test_kept_lessons_are_what_the_detectors_say(init: Path, tmp_path: Path) -> None:
    """Every image's losses are its own, however the loader batches them."""
    keys = [*TINY, "+router=exact", f"init={init}", "data.module.train_transform=[]"]
    config = compose_experiment("shapes_dy_tiny", keys)
    detector: DynamicDetector = build(config.detector)
    detector.load_state_dict(read_checkpoint(init).weights, strict=False)
    data = build(config.data.module)
    data.setup("fit")
    kept = collect(detector, data, passes=1, device=torch.device("cpu"), folder=tmp_path)
    assert not detector.first.training
    for index in range(len(data.train)):
        sample = data.train[index]
        _, losses = detector.image_losses([sample.image], [sample.target])
        torch.testing.assert_close(kept.losses[:, index], losses[:, 0], rtol=1e-4, atol=1e-5)


def test_lessons_are_named_by_what_they_depend_on(init: Path) -> None:
    def name(*keys: str) -> str:
        keys = (*TINY, "+router=exact", f"init={init}", *keys)
        config = compose_experiment("shapes_dy_tiny", keys)
        data = build(config.data.module)
        data.setup("fit")
        return step2_module._fingerprint(config, data)

    same = ["data.num_workers=2", "data.val_images=5", "data.max_val=3", "detector.router.reduction=2"]
    assert {name(key) for key in same} == {name()}
    others = ["data.train_images=20", "data.max_train=9", "seed=1", "router.passes=2", "detector.read_from=1"]
    assert len({name(), *(name(key) for key in others)}) == 1 + len(others)


def test_an_interrupted_pass_goes_on_where_it_stopped(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "CHUNK", 2)
    config = compose_experiment("shapes_dy_tiny", [*TINY, "+router=exact", f"init={init}"])
    detector: DynamicDetector = build(config.detector)

    def keep(folder: Path) -> lessons.Lesson:
        data = build(config.data.module)
        data.setup("fit")
        return collect(detector, data, passes=2, device=torch.device("cpu"), folder=folder)

    whole = keep(tmp_path / "whole")
    count = 0

    def fail(*args: object) -> object:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return learn(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lessons, "learn", fail)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "cut")
    (kept,) = (tmp_path / "cut").iterdir()
    assert kept.name == "00000.safetensors"
    again = keep(tmp_path / "cut")
    assert count == 4 + 10  # 12 batches, of which two were kept
    assert (
        len(again.pooled) == 48 and torch.equal(again.pooled, whole.pooled) and torch.equal(again.losses, whole.losses)
    )
    assert not torch.equal(whole.losses[:, :24], whole.losses[:, 24:])  # the second pass draws its own flips
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match=r"00000\.safetensors is damaged, so that it is computed again"):
        again = keep(tmp_path / "cut")
    assert count == 4 + 10 + 2 and torch.equal(again.losses, whole.losses)
    assert torch.equal(keep(tmp_path / "cut").losses, whole.losses) and count == 4 + 10 + 2


def test_an_interrupted_router_continues_exactly(init: Path, routed: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        with pytest.raises(KeyError, match="power cut"):
            step2(tmp_path / "off", init, f"+callbacks.stop={{_target_: test_training.StopAt, step: 5, path: {cut}}}")
    step2(tmp_path / "on", init, f"ckpt_path={cut}")
    expected, actual = weights(routed), weights(tmp_path / "on")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_the_online_way_learns_from_images(init: Path, tmp_path: Path) -> None:
    keys = ["router.cached=false", "router_loss.offset=running_median", "trainer.max_epochs=1"]
    step2(tmp_path, init, *keys, "trainer.check_val_every_n_epoch=1")
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    median, *seen = content["dyndet"]["offset"]
    assert len(seen) == 24 and seen == sorted(seen) and median == pytest.approx((seen[11] + seen[12]) / 2)
    before, after = read_checkpoint(init).weights, weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)  # running statistics, too


def test_only_the_router_is_in_training(init: Path) -> None:
    detector: DynamicDetector = build(compose_experiment("shapes_dy_tiny", [*TINY, "+router=exact", "init=x"]).detector)
    module = RouterModule(detector, offset=Constant(0.0), categories=read_checkpoint(init).categories)
    assert [part for part in detector.modules() if part.training] == [detector.preprocess]  # it places images
    assert {name.split(".")[0] for name, p in detector.named_parameters() if p.requires_grad} == {"router"}
    assert module.training


def test_the_running_median_is_of_all_processes(init: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector: DynamicDetector = build(compose_experiment("shapes_dy_tiny", [*TINY, "+router=exact", "init=x"]).detector)
    offset = RunningMedian()
    module = RouterModule(detector, offset=offset, categories=read_checkpoint(init).categories)
    monkeypatch.setattr("dyndet.lightning.router_module.gathered", lambda mine: [*mine, 7.0, 9.0, 8.0])
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    assert detector.router is not None
    pooled = torch.zeros(1, detector.router.hidden.in_features)
    module.training_step(lessons.Lesson(pooled, torch.tensor([[3.0], [1.0]])), 0)
    assert offset.state() == [7.5, 2.0, 7.0, 8.0, 9.0]


def test_an_experiment_behind_the_router_is_refused(init: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ["+router=exact", "+experiment=shapes_dy_tiny"]
    monkeypatch.setattr(step2_module.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(step2_module.HydraConfig, "get", lambda: SimpleNamespace(overrides=SimpleNamespace(task=task)))
    with pytest.raises(UserError, match="after \\+experiment"):
        step2_module._check_order()
    task.reverse()
    step2_module._check_order()


@pytest.mark.parametrize(("speed", "share"), [("easy", 0.0), ("hard", 1.0), ("hard_fraction:0.3", 0.3), ("macs", 0.5)])
def test_evaluating_at_a_wished_speed(
    calibrated: tuple[Path, Calibration], tmp_path: Path, speed: str, share: float
) -> None:
    file, calibration = calibrated
    easy, hard = (point.macs for point in calibration.points)
    wish = f"macs:{(easy + hard) / 2}" if speed == "macs" else speed
    keys = [f"ckpt={file}", f"output_dir={tmp_path}", "trainer.accelerator=cpu", f"speed={wish}"]
    metrics = evaluate(compose_command("evaluate", keys))
    assert metrics["route/hard"] == pytest.approx(share)
    assert metrics["macs/total_mean"] == pytest.approx(easy + share * (hard - easy))


def test_calibration_travels_with_the_checkpoint(calibrated: tuple[Path, Calibration], tmp_path: Path) -> None:
    file, calibration = calibrated
    saved = read_checkpoint(file)
    assert saved.calibration is not None and Calibration.of(saved.calibration) == calibration
    easy, hard = calibration.points
    assert easy.latency_ms and hard.latency_ms and easy.macs < hard.macs
    assert len(calibration.difficulty) == calibration.images == 10
    detector = dyndet.load_detector(file)
    assert isinstance(detector, DynamicDetector)
    ends = [Point(0.0, 1e9, 10.0), Point(0.0, 2e9, 20.0)]  # a busy machine may find the hard route faster
    set_speed(detector, "latency_ms:15", replace(calibration, points=ends))
    assert sum(value > detector.threshold for value in calibration.difficulty) == 5
    report = json.loads((file.parents[1] / "calibration.json").read_text())
    assert [row["fraction"] for row in report["splits"]] == [step / 10 for step in range(11)]
    assert -1 <= report["spearman"] <= 1


def test_step_2_validates_as_calibrate_does(routed: Path, calibrated: tuple[Path, Calibration]) -> None:
    metrics = json.loads((routed / "result.json").read_text())
    report = json.loads((calibrated[0].parents[1] / "calibration.json").read_text())
    assert metrics["val/spearman"] == pytest.approx(report["spearman"], abs=1e-6)
    for split in report["splits"][1:-1]:
        assert metrics[f"val/hard_{split['fraction']:.0%}/AP".replace("%", "")] == pytest.approx(split["ap"], abs=1e-6)


def test_evaluate_times_a_speed_and_both_ends(
    calibrated: tuple[Path, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that counts the second detector's work."""
    work = [0.0]
    wide = DynamicDetector._hard_maps

    def hard_maps(self: DynamicDetector, seen: Seen) -> list[Tensor]:
        work[0] += 0.25
        return wide(self, seen)

    def clock() -> float:
        work[0] += 0.5
        return work[0]

    monkeypatch.setattr(DynamicDetector, "_hard_maps", hard_maps)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    keys = [f"ckpt={calibrated[0]}", f"output_dir={tmp_path}", "trainer.accelerator=cpu", "speed=hard_fraction:0.3"]
    metrics = evaluate(compose_command("evaluate", [*keys, "latency=10"]))
    times = [metrics[f"time/latency_{name}ms"] for name in ("easy_", "", "hard_")]
    assert times == pytest.approx([500, 500 + 0.3 * 250, 750])


def test_predict_says_which_way_an_image_went(calibrated: tuple[Path, Calibration], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (80, 64), "white").save(tmp_path / "a.png")
    keys = [f"ckpt={calibrated[0]}", f"source={tmp_path}/a.png", f"out={tmp_path}/out", "device=cpu", "gates=true"]
    predict(compose_command("predict", [*keys, "speed=easy"]))
    (row,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert row["route"] == "easy" and 0 < row["difficulty"] < 1


def test_mistakes_are_named(init: Path, routed: Path, calibrated: tuple[Path, Calibration], tmp_path: Path) -> None:
    for wish, word in (
        ("fast", "hard_fraction:0.5"),
        ("macs:1", "out of reach"),
        ("hard_fraction:2", "between 0 and 1"),
        ("latency_ms:nan", "not understood"),
    ):
        with pytest.raises(UserError, match=word):
            dyndet.load_detector(calibrated[0], speed=wish)
    with pytest.raises(UserError, match=r"dyndet\.calibrate"):
        dyndet.load_detector(routed / "checkpoints" / "last.ckpt", speed="macs:1e9")
    with pytest.raises(UserError, match="no router yet"):
        dyndet.load_detector(init, speed="easy")
    with pytest.raises(UserError, match="another"):
        step2(tmp_path, init, "head.num_convs=2")
    with pytest.raises(UserError, match=r"no checkpoint at .* set init to"):
        step2(tmp_path, tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match="only a dynamic detector"):
        train(compose_experiment("shapes_dyn", ["+router=exact", f"init={init}", f"output_dir={tmp_path}"]))
    with pytest.raises(UserError, match=r"those of step 1 are given as init"):
        step2(tmp_path / "a", init, f"ckpt_path={init}")
    with pytest.raises(UserError, match="go on with the same"):
        step2(tmp_path / "b", init, f"ckpt_path={routed}/checkpoints/last.ckpt", "router_loss.offset=zero")
    with pytest.raises(UserError, match="not slower when calibrated"):
        slow_first = Calibration([Point(0.0, 1e9, 14.0), Point(0.0, 2e9, 12.0)], [0.0, 1.0])
        set_speed(dyndet.load_detector(calibrated[0]), "latency_ms:13", slow_first)
    with pytest.raises(UserError, match="no fixed twin"):
        keys = [f"ckpt={calibrated[0]}", f"output_dir={tmp_path}", "trainer.accelerator=cpu", "timing=2"]
        evaluate(compose_command("evaluate", keys))
    with pytest.raises(UserError, match="exact_median"):
        step2(tmp_path, init, "router_loss.offset=median")


def test_gates_have_speeds_too() -> None:
    torch.manual_seed(0)
    detector = dyndet.build_detector("shapes_dyn", ["head.depth=1"])
    images = torch.rand(1, 3, 64, 64)

    def used() -> float:
        _, routing = detector.detect_with_routing(images)
        assert isinstance(routing, dyndet.routing.Routing)
        return float(routing.used().sum())

    full = used()
    calibration = Calibration([Point(1.0, 1e6), Point(0.5, 2e6), Point(0.0, 4e6)])
    shares = []
    for speed, threshold in (("hard", 0.0), ("macs:3e6", 0.25), ("threshold:0.9", 0.9), ("easy", 1.0)):
        set_speed(detector, speed, calibration)
        assert detector.head.gate_threshold == pytest.approx(threshold)  # type: ignore[attr-defined]
        shares.append(used() / full)
    assert shares[0] == 1 and shares[-1] == 0 and shares == sorted(shares, reverse=True)
    with pytest.raises(UserError, match="for dynamic detectors"):
        set_speed(detector, "hard_fraction:0.5", calibration)
    with pytest.raises(UserError, match="one speed only"):
        set_speed(dyndet.build_detector("shapes_dyn", ["head=fixed_small"]), "easy", None)
