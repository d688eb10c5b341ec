import torch

from dex.analysis.source_probe import leave_sources_out, pixels


def drawn(each=6, sources_each=4, classes=3, seed=0):
    """Sources with a mark of their own, classes with another: ``(mark of class, mark of source, labels, sources)``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(sources_each * each)
    sources = torch.arange(classes * sources_each).repeat_interleave(each)
    of_class = torch.randn(classes, 8, generator=generator)[labels]
    of_source = torch.randn(classes * sources_each, 8, generator=generator)[sources]
    return of_class, of_source, labels, sources, 0.1 * torch.randn(len(labels), 8, generator=generator)


def test_what_only_tells_sources_apart_tells_no_class():
    """A probe that is judged by sources it knows would be right about all of these."""
    of_class, of_source, labels, sources, noise = drawn()
    assert leave_sources_out(of_class + noise, labels, sources).value == 1.0
    found = [leave_sources_out(s + n, l, g).value for _, s, l, g, n in (drawn(seed=i) for i in range(8))]  # noqa: E741
    assert abs(sum(found) / 8 - 1 / 3) < 0.2
    interval = leave_sources_out(of_source + noise, labels, sources)
    assert interval.low <= interval.value <= interval.high < 1.0


def test_classes_of_one_source_are_not_judged():
    of_class, _, labels, sources, _ = drawn()
    alone = torch.where(labels == 2, 99, sources)
    assert leave_sources_out(of_class, labels, alone).value == 1.0
    assert leave_sources_out(of_class, labels, torch.where(labels >= 1, labels, sources)) is None


def test_pixels_are_small_grey_pictures():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[1, :, :16] = 255
    small = pixels(images).view(2, 16, 16)
    assert small[0].abs().max() == 0 and torch.equal(small[1, :8], torch.ones(8, 16)) and small[1, 8:].max() == 0
