"""The sentence and the figures at the top of a page: what a run trained, and the results."""

from typing import NamedTuple

from dex.common.units import duration
from dex.report.charts import number
from dex.report.runs import RunRecord, plain, real, whole, within

_MEASURE = ("model.norm_pix_loss", "model.mask_ratio", "model.img_size", "model.patch_size", "run.evaluate_images")
"""Fields that must be equal for held-out losses to be comparable."""


def sentence(run: RunRecord) -> str:
    """The model, its data, and the change of the held-out loss."""
    get = run.config.get
    known = {k: plain(get(f"model.{k}")) for k in ("embed_dim", "depth", "num_heads", "num_experts", "top_k")}
    shape = f"width {known['embed_dim']}, {known['depth']} layers, {known['num_heads']} heads"
    if run.has_experts:
        kind = "a DEX vision transformer"
        shape += f"; {known['num_experts']} experts per layer, {known['top_k']} per image"
    else:
        kind = "a vision transformer with dense MLPs, the monolithic control"
    image = f"{plain(get('model.img_size'))} px images in patches of {plain(get('model.patch_size'))}"
    masked = real(get("model.mask_ratio"))
    text = f"Masked autoencoder with {kind} ({shape}), {image}"
    text += f", {masked:.0%} masked. " if masked is not None else ". "
    data = run.starts[-1].get("data")
    if isinstance(data, dict):
        counts = [c for c in map(whole, data["images"].values()) if c] if isinstance(data.get("images"), dict) else []
        text += f"Data: {data.get('name')}, {sum(counts):,} images of {len(counts)} modalities. "
    first = next((v for _, v in run.points("val_loss") if v is not None), None)
    final = run.last("val_loss")
    if first is not None and final is not None and len(run.points("val_loss")) > 1:
        step = run.last_step("val_loss")
        text += f"The held-out masked loss went from {number(first)} to {number(final)} at step {step:,}."
    return text


_SWAPPED = ("other modality", "random")
"""Kinds of swap gap; the first that was measured is shown."""


class Fact(NamedTuple):
    """A figure at the top of a page."""

    value: str
    more: str = ""
    """Shown in small print."""
    score: float | None = None
    """Lower is better; None for a figure that is neither good nor bad."""


def facts(run: RunRecord) -> dict[str, Fact]:
    """The figures by label, in the order shown."""
    return _effort(run) | _results(run) | _health(run)


def _effort(run: RunRecord) -> dict[str, Fact]:
    """Steps, images, time and speed."""
    planned = f" of {run.planned:,}" if run.planned is not None else ""
    result = {"steps": Fact(f"{run.step:,}{planned}", run.state())}
    if run.batch:
        epoch = run.last("epoch")
        epochs = f", {number(epoch, 3)} epochs" if epoch is not None else ""
        result["images seen"] = Fact(f"{run.step * run.batch:,}", f"batches of {run.batch:,}{epochs}")
    if stretches := run.stretches():
        seconds = sum(s.seconds for s in stretches)
        starts = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
        evaluation = sum(v for _, v in run.points("evaluation_s") if v is not None)
        share = f" ({evaluation / (evaluation + seconds):.1%} of both)" if evaluation else ""
        result["training time"] = Fact(duration(seconds), f"without evaluation{share} and saving{starts}")
        waits = [s.seconds * s.waiting for s in stretches if s.waiting is not None]
        wait = f"{sum(waits) / seconds:.1%} of the time waiting for data" if waits else ""
        speeds = dict(run.points("images_per_s"))
        images = sum(s.seconds * (speeds[s.step] or 0.0) for s in stretches)
        result["images/s"] = Fact(number(images / seconds), wait)
    return result


def _results(run: RunRecord) -> dict[str, Fact]:
    result = {}
    if (value := run.last("loss")) is not None:
        result["training loss"] = Fact(number(value), _trained(run, "loss"))
    if (value := run.last("val_loss")) is not None:
        lowest, step = min((v, s) for s, v in run.points("val_loss") if v is not None)
        more = f"; lowest {number(lowest)} at step {step:,}" if lowest < value else ""
        result["held-out loss"] = Fact(number(value), f"{_held_out(run, 'val_loss')}{more}", value)
    if (value := run.last("ema_val_loss")) is not None:
        result["held-out loss of averaged weights"] = Fact(number(value), _held_out(run, "ema_val_loss"), value)
    if run.has_experts:
        for key, label in (("align_loss", "align loss"), ("balance_loss", "balance loss")):
            if (value := run.last(key)) is not None:
                result[label] = Fact(number(value), f"unweighted; {_trained(run, key)}")
    kind = next((kind for kind in _SWAPPED if run.last("swap_gap", kind) is not None), None)
    if kind is not None:
        low, high = (run.last(f"swap_gap_{end}", kind) for end in ("low", "high"))
        ends = "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]; "
        others = "random" if kind == "random" else "another modality's"
        measured = _held_out(run, "swap_gap_of", "swap_gap_images")
        more = f"{ends}loss with {others} experts minus loss with an image's own; {measured}"
        result["swap gap"] = Fact(f"{run.last('swap_gap', kind):+.3f}", more)
    if (value := run.last("probe_linear")) is not None:
        pixels = run.last("probe_pixels")
        reference = "" if pixels is None else f", pixels alone {pixels:.1%}"
        measured = _held_out(run, "probe_linear", "probe_images")
        more = f"balanced accuracy of the modality on unseen sources{reference}; {measured}"
        result["linear probe"] = Fact(f"{value:.1%}", more)
    if (value := run.last("probe_knn")) is not None:
        result["kNN probe"] = Fact(f"{value:.1%}", f"accuracy of the modality; {_held_out(run, 'probe_knn')}", -value)
    return result


def _trained(run: RunRecord, key: str) -> str:
    """The steps and images over which the newest training value of ``key`` is a mean."""
    before, step = _before_last(run, key), run.last_step(key)
    images = f", {(step - before) * run.batch:,} images" if run.batch else ""
    steps = f"step {step:,}" if step == before + 1 else f"steps {before + 1:,} to {step:,}"
    return f"{steps}{images}"


def _held_out(run: RunRecord, key: str, counted: str = "val_images") -> str:
    """The step of the newest ``key``, and the number of images, which ``counted`` holds."""
    images = run.last(counted)
    return f"step {run.last_step(key):,}" + (f", {int(images):,} images" if images is not None else "")


def _health(run: RunRecord) -> dict[str, Fact]:
    """Use of the device, and what went wrong."""
    result = {}
    if (value := run.last("mfu")) is not None:
        result["MFU"] = Fact(f"{value:.1%}", f"of the device's peak, up to step {run.last_step('mfu'):,}")
    if memory := [v for _, v in run.points("memory_mb") if v is not None]:
        result["memory"] = Fact(f"{max(memory):,.0f} MB", f"peak up to step {run.last_step('memory_mb'):,}")
    if agree := [row["ranks_agree"] for row in run.rows if isinstance(row.get("ranks_agree"), bool)]:
        result["ranks agree"] = Fact(f"{sum(agree)} of {len(agree)}", "evaluations, bit for bit")
    skipped = sum(int(v) for _, v in run.points("skipped") if v is not None)
    if skipped:
        result["steps skipped"] = Fact(f"{skipped:,}", "not finite; they left the weights unchanged")
    return result


def _before_last(run: RunRecord, key: str) -> int:
    """The step before the first one in the mean of the newest training value of ``key``."""
    points = run.points(key)
    last = max(i for i, (_, v) in enumerate(points) if v is not None)
    return points[last - 1][0] if last else 0


def unlike(runs: list[RunRecord]) -> list[str]:
    """Why the losses of these runs are not comparable; empty if they are."""
    if len(runs) < 2:
        return []
    fields = [f for f in _MEASURE if len({plain(r.config.get(f)) for r in runs}) > 1]
    fingerprints = {plain(within(r.starts[-1].get("data"), "fingerprint")) for r in runs}
    fields += ["the data set"] if len(fingerprints) > 1 else []
    return [f"The losses of these runs are not comparable: the runs differ in {', '.join(fields)}"] if fields else []
